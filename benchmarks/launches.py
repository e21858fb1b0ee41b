# SPDX-License-Identifier: Apache-2.0
"""What calls of the suites launch on a GPU, and the bytes that they cannot do without.

The launches are those of the host code in csrc/kernels, for float32. The trip counts belong to the
loops of the kernels, named by the text of their line; sass.py finds them in the compiled code, and
refuses code with a loop that has no count here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

WARP = 32


@dataclass
class Launch:
    """A kernel's launch: whose instructions, by how many threads, and how often its loops run."""

    kernel: str
    block: int
    blocks: int
    threads: int  # that have something to do
    trips: Mapping[str, float] | None = field(default_factory=dict)  # None: too little to count
    skip: Sequence[str] = ()
    through: Sequence[str] = ()
    dynamic_shared: int = 0
    own_bytes: int = 0  # that a thread reads several times, side by side with nobody else's


# One batch dimension is left of the suites' operands, or none: nothing to take apart.
ONE_BATCH_DIMENSION = "offset[o] += item * static_cast<Index>(stride[0][o])"
# Loops of every kernel. A thread has one item, as no grid of the suites is capped.
TRIPS = {"for (int d = dims - 1": 0.0, "thread_index()": 1.0, "blockIdx.x": 1.0}
# As times are floors: of the four Jacobi sweeps (csrc/math/svd3.h) the last is not needed, and the
# secular equation, which needs "2 or 3 steps" (csrc/math/triangulate.h), takes 2.
SVD, SECULAR = {"sweep < jacobi_sweeps": 3.0}, {"if (all(settled)) break": 2.0}
AGGREGATIONS = {"sum": 0, "mean": 1, "softmax": 2, "max": 3}


def launches_of(op: str, size: str, shape: Mapping[str, int], mode: str) -> list[Launch]:
    """The kernels of a float32 call of the suites, launched as csrc/kernels does."""
    backward = mode == "backward"
    if op.startswith("soft_argmax"):
        found = _soft_argmax(op, shape, backward)
    elif op == "unproject":
        found = _unproject(size, shape, backward)
    elif op == "triangulate":
        found = [_triangulate(shape["N"], shape["C"], backward)]
    elif op == "project":
        make = _project_backward if backward else _project
        found = [make(shape["N"], shape["C"])]
    else:
        found = [_rigid_align(shape["N"], shape["J"], backward)]
    if op != "unproject" or shape["B"] > 1:
        for launch in found:
            launch.through = [*launch.through, ONE_BATCH_DIMENSION]
    return found


def _triangulate(points: int, views: int, backward: bool) -> Launch:
    return Launch(
        f"triangulate_{'backward_' if backward else ''}kernel<float>",
        128,
        math.ceil(points / 128),
        points,
        SVD | SECULAR | {"c < views.count": views},
        # Projections share their gradient, and want none here.
        skip=["out[4 * i + j] ="],
        through=["const T norm = T(1) +"],  # the homogeneous method is the default
        own_bytes=12 * views,  # pixels and weights
    )


def _project(points: int, views: int) -> Launch:
    """All points share the matrices: a thread has one view of four of them."""
    assert views <= 128, "threads have several views"
    rows = 128 // views
    blocks = math.ceil(points / (4 * rows))
    block = views * rows
    # Threads beyond the last point: less than a block's.
    threads = math.ceil(points / 4) * views
    return Launch("project_rig_kernel<float>", block, blocks, threads, {"view < params.views": 1})


def _project_backward(points: int, views: int) -> Launch:
    """The same; a block has copied the matrices, whose gradient the suites do not want."""
    trips = {"view < params.views": views, "n < params.views * 12": 12 * views / 128}
    kernel, blocks = "project_backward_rig_kernel<float>", math.ceil(points / 128)
    return Launch(kernel, 128, blocks, points, trips, dynamic_shared=48 * views)


def _rigid_align(sets: int, joints: int, backward: bool) -> Launch:
    """A warp copies its 32 sets to shared memory: operands without gaps, rows of odd length."""
    assert joints % 2 == 1, "another copy, row by row"
    groups = math.ceil(joints / 32)  # kPointsPerSum
    warp_bytes = 32 * 7 * joints * 4
    block = next(threads for threads in (128, 64, 32) if threads // 32 * warp_bytes <= 48 << 10)
    # Turns of the loop that copies 4 times 32 times 16 bytes, on average over operands; gradients
    # of weights are not wanted.
    rows = [3 * joints, 3 * joints, joints, *([3 * joints, 3 * joints, 0] if backward else [9])]
    turns = [math.ceil(32 * length / 4 / 128) for length in rows]
    trips = SVD | {
        "first < parts": sum(turns) / len(turns),
        "row < rows": 0,
        "i < length": 0,
        "n < points.count": joints,
        "first < points.count": groups,
        "n < end": joints / groups,
    }
    name = f"rigid_align_{'backward_' if backward else ''}staged_kernel<float, true>"
    through = ["trace = trace +", "const T share = to_scale"]  # with_scale
    skip = ["copy_element(memory[rest], "]  # 32 rows are a multiple of 16 bytes
    skip += ["params.grad_weights"]  # not wanted
    dynamic_shared = block // 32 * warp_bytes
    return Launch(name, block, math.ceil(sets / block), sets, trips, skip, through, dynamic_shared)


def _soft_argmax(op: str, shape: Mapping[str, int], backward: bool) -> list[Launch]:
    axes = [n for axis, n in shape.items() if axis in ("HW" if "H" in shape else "XYZ")]
    elements = math.prod(axes)
    maps = math.prod(shape.values()) // elements
    values = op == "soft_argmax25d"
    assert axes[-1] % 4 == 0, "another kernel, without loads of 16 bytes, serves these"
    if backward:
        chunks = min(math.ceil(elements / 2048), 4096)
        return [
            Launch(
                f"moments_backward_rows_kernel<float, {'true' if values else 'false'}, 4>",
                256,
                maps * chunks,
                maps * chunks * 256,
                # A load has 4 elements.
                {"load_index < loads": elements / 4 / (chunks * 256)},
                # Covariance and log-partition are not asked for.
                ("grad[d * dims + e]", "params.covariance[", "params.grad_log_partition[map]"),
            )
        ]
    keep = 2 if values else 0
    splits = max(1, min(math.ceil(elements / 8192), math.ceil(1024 / maps), 64))
    rows = Launch(
        f"moments_rows_kernel<float, (Keep){keep}, 4>",
        256,
        maps * splits,
        maps * splits * 256,
        {"load_index < loads": elements / 4 / (splits * 256)},
        # One thread a block merges the warps' sums and writes them.
        ("state.merge(unpack_state<T, kKeep>(&merged[other", "write_result_or_partial"),
    )
    if splits == 1:
        return [rows]
    trips = {"split = lane; split < splits": splits / 32}
    merge = f"moments_merge_kernel<float, (Keep){keep}>"
    return [rows, Launch(merge, 256, math.ceil(maps / 8), maps * 32, trips)]


def _unproject(size: str, shape: Mapping[str, int], backward: bool) -> list[Launch]:
    """Features that are not channels last are staged so, and their gradient copied back."""
    last, by = "channels last" in size, size.partition(",")[0]
    views, voxels = shape["C"], shape["X"] * shape["Y"] * shape["Z"]
    assert shape["K"] % 4 == 0, "rows have to be filled up"
    vectors = shape["K"] // 4
    lanes = min(8, 1 << (vectors - 1).bit_length())
    features = shape["B"] * views * shape["K"] * shape["H"] * shape["W"]
    blocks = math.ceil(voxels / (256 // lanes)) * shape["B"]

    def elementwise(kernel: str) -> Launch:
        # Where a loop takes four numbers a turn if it can, a thread has but one.
        return Launch(kernel, 256, math.ceil(features / 256), features)

    unread = backward and not _backward_samples(size)
    stage = [] if last or unread else [elementwise("unproject_stage_kernel<float>")]
    skip = ["from[a * params.grid_stride[1]]"]  # points that are no grid
    # The voxel is on a grid, the view sees it, and nothing is unknown or 0.
    through = ["voxel_center(", "result[n].add(", "factor_of(", "value_slope("]
    skip += [] if by == "mean" else ["params.confidences_stride"]
    trips = {
        "n < params.views * 12": 0.0,  # a block's matrices: by a quarter of its threads, once
        "round < tiling.rounds": math.ceil(vectors / lanes),
        "view < params.views": views,
        "n < width * tiling.voxels": 0 if last else 4,  # [channels, voxels] of a block
    }
    geometry = 64 + 48 * views
    if not backward:
        skip += ["to[n * stride[0]] ="] if last else []
        kernel = f"unproject_kernel<float, (Aggregation){AGGREGATIONS[by]}, 4>"
        tile = 0 if last else lanes * 4 * (256 // lanes + 1) * 4
        shared = geometry + tile
        return [*stage, Launch(kernel, 256, blocks, blocks * 256, trips, skip, through, shared)]
    confident = by == "mean"
    # Blocks share the tiles out, 4096 blocks for the whole batch; each has as many.
    parts = min(math.ceil(4096 / shape["B"]), blocks // shape["B"])
    trips |= {
        "tile < tiling.per_item": blocks / shape["B"] / parts,
        "tap < 4": 4,
        # The sums of the lanes that share a channel, for the confidences' gradient.
        "mask >= tiling.lanes": math.log2(32 // lanes) if confident else 0,
        # Of gradients to projections and grids, and of the fixed-point sums: not wanted.
        "mask = tiling.lanes / 2": 0,
        "start < tiling.voxels": 0,
        "view += kWarps": 0,
        "params.views * tiling.voxels * 2": 0,
        "n < plan.entries": 0,
        "(int64_t(1) << bits) < points": 0,
    }
    skip += ["unsigned long long", "exponent_above(", "atomicMax("]
    skip += ["const auto vector = *reinterpret_cast<const Vector<In, kWidth>*>(map + at)"]
    skip += [] if confident else ["warp_confidences[view"]
    skip += ["load(from + n * stride[0])"] if last else []
    if unread:  # what sample() does
        skip += ["vector[tap] = *reinterpret_cast", "value[n] + weight * load(&vector[tap]"]
    kernel = f"unproject_backward_kernel<float, (Aggregation){AGGREGATIONS[by]}, 4>"
    grid = parts * shape["B"]
    main = Launch(kernel, 256, grid, grid * 256, trips, skip, through, geometry)
    fill = elementwise("unproject_fill_kernel<float>")
    copy = [] if last else [elementwise("unproject_features_kernel<float, false>")]
    sums = shape["B"] * 8 * views * shape["K"]  # of the confidences' gradient, by each warp
    add = [Launch("unproject_sums_kernel<float>", 256, sums // 8, sums * WARP, None)]
    return [*stage, fill, main, *copy, *(add if confident else [])]


def operand_bytes(op: str, size: str, shape: Mapping[str, int], mode: str) -> dict[str, int]:
    """Bytes that a float32 call cannot do without: each input read once, each result written once.

    As bench.operands has them, and for the backward: the same inputs and the incoming gradient; the
    gradients that the suites ask for.
    """
    elements = math.prod(shape.values())
    if op.startswith("soft_argmax"):
        maps = elements // math.prod(n for axis, n in shape.items() if axis in "HWXYZ")
        taken = elements * 8 if op == "soft_argmax25d" else elements * 4
        made, wanted = maps * (8 if op == "soft_argmax2d" else 12), taken
    elif op == "triangulate":
        points, views = shape["N"], shape["C"]
        taken, made, wanted = points * views * 12 + views * 48, points * 12, points * views * 12
    elif op == "project":
        points, views = shape["N"], shape["C"]
        taken, made, wanted = points * 12 + views * 48, points * views * 8, points * 12
    elif op == "rigid_align":
        sets, points = shape["N"], shape["J"]
        taken, made, wanted = sets * points * 28, sets * 52, sets * points * 24
    else:
        assert op == "unproject", op
        batch, views, channels = (shape[axis] for axis in "BCK")
        features = batch * views * channels * shape["H"] * shape["W"] * 4
        confidences = batch * views * 4 if size.startswith("mean") else 0
        taken, wanted = features + views * 48 + confidences, features + confidences
        made = batch * channels * shape["X"] * shape["Y"] * shape["Z"] * 4
    if mode == "forward":
        return {"inputs": taken, "outputs": made}
    if op == "unproject" and not _backward_samples(size):
        taken -= features
    return {"inputs": taken + made, "outputs": wanted}


def l2_bytes(op: str, size: str, shape: Mapping[str, int], mode: str) -> int:
    """What unproject's taps take from L2 if the first-level cache keeps nothing.

    4 taps x views x channels x 4 bytes a voxel. The backward reads them twice, where it does, and
    adds to as many.
    """
    if op != "unproject":
        return 0
    taps = 4 * 4 * math.prod(shape[axis] for axis in "BCKXYZ")
    return taps if mode == "forward" or not _backward_samples(size) else 3 * taps


def _backward_samples(size: str) -> bool:
    """A sum without confidences has a gradient that does not depend on the features."""
    return not size.startswith("sum")
