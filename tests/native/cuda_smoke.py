# SPDX-License-Identifier: Apache-2.0
"""Every operation forward and backward on the GPU, on awkward sizes: food for compute-sanitizer.

Results and gradients are compared with the CPU, so that a kernel that did nothing would not pass
either. Not a pytest file: under a sanitizer it should start nothing but torch. Exit status 0
passed, 1 failed, 77 no GPU.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from tritool import VoxelGrid, ops

NO_GPU = 77
# Against the CPU kernels in the same precision: rounding apart, multiplied by the conditioning of
# the case. What is stored in half precision may be rounded to the other side.
TOLERANCES = {
    torch.float16: 2e-3,
    torch.bfloat16: 1e-2,
    torch.float32: 2e-3,
    torch.float64: 1e-8,
}
Call = Callable[..., tuple[Tensor, ...]]


def cases(dtype: torch.dtype) -> Iterator[tuple[str, Call, list[Tensor]]]:
    """A name, a function of tensors, and its differentiable arguments on the CPU."""
    random = torch.Generator().manual_seed(7)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float64).to(dtype)

    for shape in ((1, 1, 1), (3, 5, 7), (2, 33, 31), (1, 129, 257), (65, 4, 3), (0, 4, 4)):
        yield (
            f"soft_argmax2d {shape}",
            lambda x: (ops.soft_argmax2d(x, inverse_temperature=3.0),),
            [normal(*shape)],
        )
        yield f"softmax_moments2d {shape}", ops.softmax_moments2d, [normal(*shape)]
    channels_last = normal(2, 13, 11, 17).permute(0, 3, 1, 2)
    yield "soft_argmax2d channels last", lambda x: (ops.soft_argmax2d(x),), [channels_last]
    masked = normal(3, 9, 10)
    masked[0, :, 3:] = -torch.inf
    masked[1] = -torch.inf
    masked[2, 4, 4] = torch.nan
    yield "soft_argmax2d masked", lambda x: (ops.soft_argmax2d(x),), [masked]

    def depths(*maps: Tensor) -> tuple[Tensor]:
        return (ops.soft_argmax25d(*maps),)

    yield "soft_argmax25d masked", depths, [masked, masked.nan_to_num(torch.nan, 0.0, torch.nan)]
    for shape in ((2, 1, 1), (3, 5, 7), (9, 40, 32), (2, 130, 90)):
        head = normal(3, 2 * shape[0], *shape[1:])
        for layout in (head, head.contiguous(memory_format=torch.channels_last)):
            halves = list(layout.chunk(2, 1))
            yield f"soft_argmax25d {shape} {halves[0].stride()}", depths, halves

    for shape in ((2, 1, 1, 1, 1), (1, 3, 5, 6, 7), (2, 2, 17, 9, 33)):
        size = (shape[-3], shape[-2], shape[-1])
        yield f"soft_argmax3d {shape}", lambda x: (ops.soft_argmax3d(x),), [normal(*shape)]
        yield f"softmax_moments3d {shape}", ops.softmax_moments3d, [normal(*shape)]

        def in_a_box(
            volumes: Tensor, center: Tensor, size: tuple[int, int, int] = size
        ) -> tuple[Tensor, ...]:
            grid = VoxelGrid.cube(center, 2000.0, size)
            return (ops.soft_argmax3d(volumes, grid=grid),)

        yield (
            f"soft_argmax3d in a box {shape}",
            in_a_box,
            [normal(*shape), 100 * normal(shape[0], 3)],
        )

    for count, views in ((1, 2), (31, 3), (33, 4), (257, 5), (3, 31), (0, 4)):
        projections, points_3d = scene(count, views, random)
        points = ops.project(points_3d, projections) + normal(count, views, 2).double()
        weights = normal(count, views).abs().double() + 0.1
        if count > 4 and views > 2:
            points[1, 0] = torch.nan
            weights[2, 1] = 0.0
            weights[3] = 0.0
        arguments = [tensor.to(dtype) for tensor in (points, projections, weights)]
        name = f"N={count} C={views}"
        for mode in ("homogeneous", "inhomogeneous"):
            yield (
                f"triangulate {mode} {name}",
                lambda *x, mode=mode: (ops.triangulate(*x, mode=mode),),
                arguments,
            )
        yield f"triangulate unweighted {name}", lambda *x: (ops.triangulate(*x),), arguments[:2]
        yield (
            f"triangulate reweighted {name}",
            lambda *x: (ops.triangulate(*x, reweight=1),),
            arguments,
        )
        own_cameras = arguments[1].expand(count, views, 3, 4).clone()
        yield (
            f"triangulate own cameras {name}",
            lambda *x: (ops.triangulate(*x),),
            [arguments[0], own_cameras, arguments[2]],
        )
        yield (
            f"project {name}",
            lambda *x: (ops.project(*x),),
            [points_3d.to(dtype), arguments[1]],
        )

    for count, size in ((1, 4), (33, 17), (257, 5), (3, 100), (0, 4)):
        source = normal(count, size, 3)
        target = 1.5 * source.roll(1, -1) + 0.1 * normal(count, size, 3) + 3.0
        weights = normal(count, size).abs() + 0.1
        if count > 2:
            source[1, 0, 2] = torch.nan
            weights[2, 1] = 0.0
            weights[0] = 0.0
        for with_scale in (False, True):
            name = f"rigid_align N={size} B={count} with_scale={with_scale}"

            def align(*x: Tensor, with_scale: bool = with_scale) -> tuple[Tensor, ...]:
                return tuple(ops.rigid_align(*x, with_scale=with_scale))

            yield name, align, [source, target, weights]
            yield f"{name} unweighted", align, [source, target]

    yield from unprojections(dtype, random)


def unprojections(
    dtype: torch.dtype, random: torch.Generator
) -> Iterator[tuple[str, Call, list[Tensor]]]:
    """Cases of `unproject`, in float32 also with features in half precision."""
    half = [torch.float16, torch.bfloat16] if dtype == torch.float32 else []
    # Channels that fill no vector, vectors, rows of several, more than a group of threads takes.
    for channels, views, batch, size in (
        (1, 2, 2, (3, 2, 5)),
        (3, 3, 1, (2, 4, 3)),
        (17, 4, 1, (3, 3, 2)),
        (40, 2, 2, (4, 3, 3)),
        (4, 11, 1, (2, 3, 3)),
        (3, 2, 0, (2, 3, 3)),
    ):
        height, width = 12, 15
        shape = (batch, views, channels, height, width)
        features = torch.randn(shape, generator=random, dtype=torch.float64)
        to_map = torch.tensor([[width / 1000, 0, 0], [0, height / 800, 0], [0, 0, 1.0]])
        while True:  # away from where a rounding would decide between two cells
            projections = to_map.double() @ scene(0, views, random)[0]
            center = torch.randn((batch, 3), generator=random, dtype=torch.float64)
            points = VoxelGrid.cube(center, 9.0, size).points()
            pixels = ops.project(points.flatten(1, 3), projections[None, None])
            if ((pixels - pixels.round()).abs() > 1e-4).all():
                break
        confidences = torch.rand((batch, views, channels), generator=random).double() + 0.1
        if batch > 0 and views > 2:
            confidences[0, 1] = 0.0
            confidences[0, 2, 0] = torch.nan
        for aggregation in ("sum", "mean", "softmax", "max"):
            outside = "exclude" if views % 2 == 0 else "zeros"

            def in_a_box(
                features: Tensor,
                projections: Tensor,
                center: Tensor,
                confidences: Tensor,
                size: tuple[int, int, int] = size,
                aggregation: str = aggregation,
                outside: str = outside,
            ) -> tuple[Tensor, ...]:
                grid = VoxelGrid.cube(center, 9.0, size)
                options = {"aggregation": aggregation, "outside": outside}
                volume = ops.unproject(
                    features, projections, grid, confidences=confidences, **options
                )
                return (volume,)

            def at_points(
                *x: Tensor, aggregation: str = aggregation, outside: str = outside
            ) -> tuple[Tensor, ...]:
                return (ops.unproject(*x, aggregation=aggregation, outside=outside),)

            small = [projections[None], center, confidences]
            for element in (dtype, *half):
                name = f"unproject {aggregation} {shape} {element}"
                there = features.to(element)
                last = there.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
                for layout, maps in (("", there), (" channels last", last)):
                    tensors = [maps, *(tensor.to(dtype) for tensor in small)]
                    yield f"{name}{layout}", in_a_box, tensors
            tensors = [tensor.to(dtype) for tensor in (features, projections[None], points)]
            yield f"unproject at points {aggregation} {shape}", at_points, tensors


def scene(count: int, views: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Cameras in a half circle of radius 10 that look at points of size 1, in float64."""
    angle = torch.linspace(0, 3, views, dtype=torch.float64)
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    rotation = torch.stack(
        [
            torch.stack(row, -1)
            for row in ((cos, zero, -sin), (zero, zero + 1, zero), (sin, zero, cos))
        ],
        -2,
    )
    translation = torch.tensor([0.0, 0.0, 10.0], dtype=torch.float64).expand(views, 3)
    intrinsics = torch.tensor([[900.0, 0, 500], [0, 880, 400], [0, 0, 1]], dtype=torch.float64)
    projections = intrinsics @ torch.cat([rotation, translation[..., None]], -1)
    return projections, torch.randn((count, 3), generator=random, dtype=torch.float64)


def run(call: Call, arguments: list[Tensor], device: str) -> list[Tensor]:
    """Results and gradients, on the CPU."""
    inputs = [argument.detach().to(device).requires_grad_() for argument in arguments]
    outputs = call(*inputs)
    random = torch.Generator().manual_seed(11)
    grads = [
        torch.randn(output.shape, generator=random, dtype=torch.float64).to(output)
        for output in outputs
    ]
    results = [*outputs, *torch.autograd.grad(outputs, inputs, grads)]
    return [result.detach().cpu() for result in results]


def run_deterministic(call: Call, arguments: list[Tensor], device: str) -> list[Tensor]:
    """As `run`; PyTorch is asked for deterministic algorithms."""
    torch.use_deterministic_algorithms(True)
    try:
        return run(call, arguments, device)
    finally:
        torch.use_deterministic_algorithms(False)


def are_close(found: list[Tensor], expected: list[Tensor]) -> bool:
    """Compare with the largest finite number of each tensor as the scale; NaN is equal to NaN."""
    for have, want in zip(found, expected, strict=True):
        finite = want[want.isfinite()]
        scale = float(finite.abs().max()) if finite.numel() > 0 else 1.0
        atol = TOLERANCES[have.dtype] * scale
        if not torch.isclose(have, want, rtol=0, atol=atol, equal_nan=True).all():
            return False
    return True


def main() -> int:
    if not torch.cuda.is_available():
        print("cuda_smoke.py: no CUDA GPU here; nothing was run")
        return NO_GPU
    ran = failures = 0
    for dtype in (torch.float32, torch.float64):
        for name, call, arguments in cases(dtype):
            ran += 1
            expected = run(call, arguments, "cpu")
            problems = []
            if not are_close(run(call, arguments, "cuda"), expected):
                problems.append("CUDA differs from the CPU")
            if name.startswith("unproject"):  # the one that has another way of summing then
                found = run_deterministic(call, arguments, "cuda")
                if not are_close(found, expected):
                    problems.append("deterministic CUDA differs from the CPU")
                again = run_deterministic(call, arguments, "cuda")
                if not all(
                    map(
                        torch.equal,
                        (t.nan_to_num() for t in found),
                        (t.nan_to_num() for t in again),
                    )
                ):
                    problems.append("deterministic CUDA differs from itself")
            failures += bool(problems)
            for problem in problems:
                print(f"cuda_smoke.py: {name} {dtype}: {problem}")
    torch.cuda.synchronize()
    print(f"cuda_smoke.py: {ran} cases on {torch.cuda.get_device_name(0)}, {failures} failed")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
