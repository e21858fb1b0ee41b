# SPDX-License-Identifier: Apache-2.0
"""Measures the accuracy figures of docs/ops/*.md and writes them into the pages.

    .venv/bin/python docs/measure.py            print the tables
    .venv/bin/python docs/measure.py --write    and put them between the markers of the pages

Errors are those of float32 results against tritool.reference in float64 on the same float32 inputs,
so that they hold the rounding of the algorithm alone. Rigs: tests/rigs.py. Everything is seeded.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

DOCS = Path(__file__).resolve().parent
sys.path.insert(0, str(DOCS.parent / "tests"))

import rigs  # noqa: E402
import scenes  # noqa: E402

import tritool  # noqa: E402
from tritool import _native, ops, reference  # noqa: E402

Array = npt.NDArray[Any]

CASES: list[tuple[str, float, rigs.WeightKind]] = [
    ("h36m4", 0.0, "one"),
    ("h36m4", 5.0, "one"),
    ("h36m4", 20.0, "one"),
    ("h36m4", 5.0, "log"),
    ("h36m2", 5.0, "one"),
    ("par2", 1.0, "one"),
    ("far2", 0.0, "one"),
    ("pan31", 5.0, "one"),
    ("pan31", 5.0, "log"),
]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def spread(errors: Array) -> str:
    """Median, 99.9 % and largest."""
    finite = errors[np.isfinite(errors)]
    if finite.size == 0:
        return "none finite"
    values = (np.median(finite), np.percentile(finite, 99.9), finite.max())
    text = " / ".join(f"{value:.1e}" for value in values)
    lost = errors.size - finite.size
    return f"{text}, {lost} of {errors.size} not finite" if lost else text


def single(*arrays: Array) -> list[torch.Tensor]:
    """Rounds to float32."""
    return [torch.from_numpy(np.asarray(array, dtype=np.float32)) for array in arrays]


def double(*tensors: torch.Tensor) -> list[Array]:
    """The same numbers in float64."""
    return [tensor.double().numpy() for tensor in tensors]


# ---- Triangulation ----


def by_svd(points: torch.Tensor, projections: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Equation (4) by the library's singular value decomposition."""
    *_, vectors = torch.linalg.svd(rows(points, projections, weights), full_matrices=False)
    return vectors[..., 3, :3] / vectors[..., 3, 3:]


def by_eigh(points: torch.Tensor, projections: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Equation (4) by the library's eigendecomposition of A^T A."""
    a = rows(points, projections, weights)
    vector = torch.linalg.eigh(a.mT @ a)[1][..., 0]
    return vector[..., :3] / vector[..., 3:]


def rows(points: torch.Tensor, projections: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """A [..., 2C, 4]."""
    unweighted = points[..., None] * projections[..., 2:3, :] - projections[..., :2, :]
    return (weights[..., None, None] * unweighted).flatten(-3, -2)


def distance(points: torch.Tensor | Array, others: Array) -> Array:
    """Distances along the last axis."""
    return np.linalg.norm(np.asarray(points, dtype=np.float64) - others, axis=-1)


def forward_errors(count: int) -> str:
    """Distance in mm from the exact minimiser, three ways to compute it."""
    lines = []
    for name, noise, kind in CASES:
        seen = rigs.observe(rigs.RIGS[name](), count, noise=noise, weights=kind)
        inputs = single(seen.points, seen.projections, seen.weights)
        exact = reference.triangulate(*double(*inputs))
        ways: list[Callable[..., torch.Tensor]] = [ops.triangulate, by_svd, by_eigh]
        cells = [spread(distance(way(*inputs), exact)) for way in ways]
        lines.append([f"{name}, {noise:g} px{', log weights' * (kind == 'log')}", *cells])
    return table(["rig", "tritool", "`torch.linalg.svd`", "`torch.linalg.eigh` of A^T A"], lines)


def unit_errors(count: int) -> str:
    """The same data in three units of the world; errors in mm."""
    lines = []
    seen = rigs.observe(rigs.h36m4(), count, noise=5.0)
    for unit, size in (("mm", 1.0), ("cm", 10.0), ("m", 1000.0)):
        projections = seen.projections * [1.0, 1.0, 1.0, 1.0 / size]
        inputs = single(seen.points, projections, seen.weights)
        exact = reference.triangulate(*double(*inputs))
        ways: list[Callable[..., torch.Tensor]] = [ops.triangulate, by_svd, by_eigh]
        lines.append([unit, *(spread(size * distance(way(*inputs), exact)) for way in ways)])
    return table(
        ["world in", "tritool", "`torch.linalg.svd`", "`torch.linalg.eigh` of A^T A"], lines
    )


def least_reprojection(start: Array, points: Array, projections: Array) -> Array:
    """The least squared reprojection error by damped Gauss-Newton in float64."""

    def residuals(at: Array) -> tuple[Array, Array]:
        x = np.einsum("cij,nj->nci", projections[..., :3], at) + projections[..., 3]
        pixels = x[..., :2] / x[..., 2:]
        slope = projections[:, :2, :3] - pixels[..., None] * projections[:, 2:, :3]
        flat = (slope / x[..., 2, None, None]).reshape(len(at), -1, 3)
        return (pixels - points).reshape(len(at), -1), flat

    at, damping = start.copy(), np.full(len(start), 1e-3)
    value, slope = residuals(at)
    for _ in range(100):
        normal = slope.mT @ slope
        damped = normal * (1 + damping[:, None, None] * np.eye(3))
        step = np.linalg.solve(damped, slope.mT @ value[..., None])[..., 0]
        new_value, new_slope = residuals(at - step)
        better = (new_value**2).sum(-1) <= (value**2).sum(-1)
        at = np.where(better[:, None], at - step, at)
        value = np.where(better[:, None], new_value, value)
        slope = np.where(better[:, None, None], new_slope, slope)
        damping = np.where(better, damping / 10, damping * 10)
    return at


def constraint_errors(count: int) -> str:
    """What the constraint does: distance to the least reprojection error, and to the truth, mm."""
    lines = []
    for name, noise in (("h36m4", 1.0), ("h36m4", 5.0), ("h36m4", 20.0), ("pan31", 5.0)):
        seen = rigs.observe(rigs.RIGS[name](), count, noise=noise)
        points, projections = torch.from_numpy(seen.points), torch.from_numpy(seen.projections)
        in_metres = projections * torch.tensor([1.0, 1.0, 1.0, 1e-3], dtype=torch.float64)
        results = {
            "homogeneous, mm": ops.triangulate(points, projections),
            "homogeneous, m": 1000 * ops.triangulate(points, in_metres),
            "inhomogeneous": ops.triangulate(points, projections, mode="inhomogeneous"),
            "homogeneous, mm, `reweight=1`": ops.triangulate(points, projections, reweight=1),
            "inhomogeneous, `reweight=1`": ops.triangulate(
                points, projections, mode="inhomogeneous", reweight=1
            ),
        }
        least = least_reprojection(seen.truth, seen.points, seen.projections)
        results["least reprojection error"] = torch.from_numpy(least)
        for way, result in results.items():
            to_least, to_truth = distance(result, least), distance(result, seen.truth)
            cells = [f"{np.median(e):.2g} / {e.max():.2g}" for e in (to_least, to_truth)]
            if result is results["least reprojection error"]:
                cells[0] = "0"
            lines.append([f"{name}, {noise:g} px", way, *cells])
    return table(["rig", "method", "to the least reprojection error", "to the truth"], lines)


def gradient_errors(count: int) -> str:
    """Relative error of the gradients, against the norm of each point's own gradient."""
    lines = []
    for name, noise, kind in CASES:
        if noise == 0:
            continue
        seen = rigs.observe(rigs.RIGS[name](), count, noise=noise, weights=kind)
        inputs = single(seen.points, seen.projections, seen.weights)
        (grad,) = single(np.random.default_rng(1).standard_normal((count, 3)))
        exact_points, _, exact_weights = reference.triangulate_vjp(*double(grad, *inputs))
        points, weights = (inputs[i].requires_grad_() for i in (0, 2))
        cells = []
        for way in (ops.triangulate, by_svd):
            pulled = torch.autograd.grad(way(*inputs), (points, weights), grad)
            for found, exact in zip(pulled, (exact_points, exact_weights), strict=True):
                flat = exact.reshape(count, -1)
                error = distance(found.numpy().reshape(count, -1), flat)
                cells.append(spread(error / np.linalg.norm(flat, axis=-1)))
        label = f"{name}, {noise:g} px{', log weights' * (kind == 'log')}"
        lines.append([label, *cells])
    ways = ["tritool", "svd"]
    head = [f"{way}, to {what}" for way in ways for what in ("points", "weights")]
    return table(["rig", *head], lines)


def determinacy(count: int) -> str:
    """Least ratio of the singular values of the first three columns of A, rows in float32."""

    def ratio(*inputs: torch.Tensor) -> float:
        leading = rows(*inputs)[..., :3].double()
        singular = torch.linalg.svdvals(leading)
        return float((singular[..., 2] / singular[..., 0]).min())

    lines = []
    for name in rigs.RIGS:
        for kind in ("one", "log"):
            seen = rigs.observe(rigs.RIGS[name](), count, weights=kind)
            value = ratio(*single(seen.points, seen.projections, seen.weights))
            lines.append([f"{name}{', log weights' * (kind == 'log')}", f"{value:.1e}"])
    for reason in ("same view twice", "coincident cameras", "parallel rays"):
        rng = np.random.default_rng(0)
        bad = [rigs.degenerate(reason, rigs.h36m4(), rng) for _ in range(200)]
        values = [ratio(*single(b.points, b.projections, b.weights)) for b in bad]
        lines.append([reason, f"at most {max(values):.1e}"])
    return table(["points", "sqrt(s_3 / s_1)"], lines)


# ---- Rigid alignment ----

# What is aligned, mirrored or not, and its noise, mm. Sizes are those of a person.
ALIGNMENTS: list[tuple[str, str, bool, float]] = [
    ("cloud", "cloud", False, 20.0),
    ("cloud, no noise", "cloud", False, 0.0),
    ("cloud, mirrored", "cloud", True, 20.0),
    ("flat", "planar", False, 20.0),
    ("close to a line", "nearly collinear", False, 1.0),
    ("cube onto itself", "cube", False, 0.0),
]


def align_by_svd(
    source: torch.Tensor, target: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rotation, translation and scale by the library's singular value decomposition."""
    share = (weights / weights.sum(-1, keepdim=True))[..., None]
    source_mean, target_mean = ((share * p).sum(-2, keepdim=True) for p in (source, target))
    x, y = source - source_mean, target - target_mean
    u, s, vt = torch.linalg.svd((share * y).mT @ x)
    sign = torch.linalg.det(u @ vt)
    signs = torch.stack([torch.ones_like(sign), torch.ones_like(sign), sign], -1)
    rotation = (u * signs[..., None, :]) @ vt
    scale = (s * signs).sum(-1) / (share * x * x).sum((-2, -1))
    moved = (rotation @ source_mean.mT).squeeze(-1)
    return rotation, target_mean.squeeze(-2) - scale[..., None] * moved, scale


def aligned(kind: str, reflect: bool, noise: float, count: int) -> list[torch.Tensor]:
    """Sources, targets and weights in float32."""
    rng = np.random.default_rng(0)
    sets = scenes.point_sets(
        kind, rng, batch=(count,), noise=noise, reflect=reflect, scaled=True, weights="uniform"
    )
    weights = np.ones_like(sets.weights) if kind == "cube" else sets.weights
    return single(sets.source, sets.target, weights)


def alignment_errors(count: int) -> str:
    """Largest error of an entry of R, and of an aligned point in mm."""
    lines = []
    for label, kind, reflect, noise in ALIGNMENTS:
        inputs = aligned(kind, reflect, noise, count)
        exact_inputs = double(*inputs)
        exact = reference.rigid_align(*exact_inputs, with_scale=True)

        def move(transform: Any, points: Array = exact_inputs[0]) -> Array:
            r, t, s = (np.asarray(part, dtype=np.float64) for part in transform)
            return s[:, None, None] * np.einsum("nij,npj->npi", r, points) + t[:, None]

        cells = []
        for found in (ops.rigid_align(*inputs, with_scale=True), align_by_svd(*inputs)):
            error = np.abs(found[0].numpy() - exact.rotation).max((-2, -1))
            distances = np.linalg.norm(move(found) - move(exact), axis=-1).max(-1)
            cells += [spread(error), spread(distances)]
        lines.append([label, *cells])
    head = [f"{way}, {what}" for way in ("tritool", "svd") for what in ("R", "points, mm")]
    return table(["points", *head], lines)


def alignment_gradient_errors(count: int) -> str:
    """Relative error of the gradients, against the norm of each set's own gradient."""
    lines = []
    for label, kind, reflect, noise in ALIGNMENTS:
        inputs = aligned(kind, reflect, noise, count)
        rng = np.random.default_rng(1)
        shapes = ((count, 3, 3), (count, 3), (count,))
        sizes = (500.0, 1.0, 500.0)  # as of a loss on points some 500 mm from their mean
        grads = single(*(g * rng.standard_normal(s) for g, s in zip(sizes, shapes, strict=True)))
        exact = reference.rigid_align_vjp(tuple(double(*grads)), *double(*inputs), with_scale=True)
        leaves = [x.requires_grad_() for x in inputs]
        kept = (0, 1, 2) if noise else (0, 1)  # exact data do not move with the weights
        cells = []
        for outputs in (ops.rigid_align(*leaves, with_scale=True), align_by_svd(*leaves)):
            pulled = torch.autograd.grad(list(outputs), leaves, grads)
            errors = []
            for n in kept:
                flat = np.asarray(exact[n]).reshape(count, -1)
                found = pulled[n].numpy().reshape(count, -1)
                errors.append(distance(found, flat) / np.linalg.norm(flat, axis=-1))
            points = np.stack(errors[:2])
            worst = np.where(np.isfinite(points).all(0), points.max(0), np.nan)
            cells += [spread(worst), spread(errors[2]) if noise else ""]
        lines.append([label, *cells])
    head = [f"{way}, to {what}" for way in ("tritool", "svd") for what in ("points", "weights")]
    return table(["points", *head], lines)


# ---- Unprojection ----


class Unprojection(NamedTuple):
    """Four cameras of 4 to 5.5 m around a cube of 2.5 m, noise for features."""

    features: torch.Tensor  # [1, 4, 32, H, W]
    projections: torch.Tensor  # [1, 4, 3, 4]
    confidences: torch.Tensor  # [1, 4, 32]
    grid: tritool.VoxelGrid
    frame: tuple[Array, Array, tuple[int, int, int]]  # the same in float64


def unprojection(side: int) -> Unprojection:
    """A cube of `side` voxels an edge; 64 have maps of 96 x 104 cells."""
    height, width = 3 * side // 2, 13 * side // 8
    rng = np.random.default_rng(0)
    rig = rigs.look_at(
        rigs.h36m4().centers, rigs.BOX_CENTER, focal=0.9 * width, image_size=(width, height)
    )
    features, projections, confidences, center = single(
        rng.standard_normal((1, 4, 32, height, width)),
        rig.projections[None],
        rng.uniform(0.1, 1.0, (1, 4, 32)),
        rigs.BOX_CENTER[None] + rng.uniform(-100.0, 100.0, (1, 3)),
    )
    grid = tritool.VoxelGrid.cube(center, side=2500.0, size=side)
    origin, axes = double(grid.origin, grid.axes)
    return Unprojection(features, projections, confidences, grid, (origin, axes, (side,) * 3))


def by_grid_sample(scene: Unprojection, aggregation: str) -> torch.Tensor:
    """Voxels by one matrix product to pixels, `grid_sample`, then the views put together."""
    features = scene.features
    points = scene.grid.points().flatten(1, -2)
    world = torch.cat([points, torch.ones_like(points[..., :1])], -1)
    image = (scene.projections @ world[:, None].mT).mT
    last = torch.tensor(features.shape[:-3:-1]) - 1
    places = 2 * (image[..., :2] / image[..., 2:]) / last - 1
    sampled = torch.nn.functional.grid_sample(
        features.flatten(0, 1), places.transpose(0, 1), align_corners=True
    )
    v, w = sampled[:, :, 0], scene.confidences[0, :, :, None]
    if aggregation == "max":
        volume = v.amax(0)
    else:
        w = w * (v - v.amax(0)).exp() if aggregation == "softmax" else w
        volume = (w * v).sum(0) / (1 if aggregation == "sum" else w.sum(0))
    return volume.unflatten(-1, scene.grid.size)[None]


def unprojection_errors(side: int) -> str:
    """Errors of the values, relative to the range that they have in the volume."""
    scene = unprojection(side)
    features, projections, confidences = double(*scene[:3])
    lines = []
    for aggregation in scenes.AGGREGATIONS:
        exact = reference.unproject(
            features, projections, scene.frame, aggregation=aggregation, confidences=confidences
        )
        results = [
            ops.unproject(*scene[:2], scene.grid, aggregation=aggregation, confidences=scene[2]),
            by_grid_sample(scene, aggregation),
        ]
        cells = [spread(np.abs(r.numpy() - exact) / np.ptp(exact)) for r in results]
        lines.append([aggregation, *cells])
    return table(["aggregation", "tritool", "`grid_sample`"], lines)


def unprojection_gradient_errors(side: int) -> str:
    """Largest error of each gradient, relative to its largest entry."""
    scene = unprojection(side)
    leaves = [x.requires_grad_() for x in (*scene[:3], scene.grid.origin)]
    rng = np.random.default_rng(1)
    (grad,) = single(rng.standard_normal((1, 32, *scene.grid.size)))
    features, projections, confidences, exact_grad = double(*(x.detach() for x in scene[:3]), grad)
    lines = []
    for aggregation in scenes.AGGREGATIONS:
        to_features, to_projections, to_frame, to_confidences = reference.unproject_vjp(
            exact_grad,
            features,
            projections,
            scene.frame,
            aggregation=aggregation,
            confidences=confidences,
        )
        results = [
            ops.unproject(*scene[:2], scene.grid, aggregation=aggregation, confidences=scene[2]),
            by_grid_sample(scene, aggregation),
        ]
        cells = [aggregation]
        for result in results:
            pulled = torch.autograd.grad(
                result, leaves, grad, allow_unused=True, materialize_grads=True
            )
            for found, exact in zip(
                pulled, (to_features, to_projections, to_confidences, to_frame[0]), strict=True
            ):
                largest = np.abs(exact).max()
                error = np.abs(found.numpy() - exact).max()
                cells.append(f"{error / largest:.1e}" if largest else "")
        lines.append(cells)
    gradients = ("features", "P", "w", "origin")
    head = [f"{way}, {what}" for way in ("tritool", "`grid_sample`") for what in gradients]
    return table(["aggregation", *head], lines)


# ---- Soft-argmax ----


def online_softmax_mean(volume: Array, alpha: float) -> Array:
    """One pass in float32, rescaled by exp(old maximum - new maximum) at every new maximum."""
    f = np.float32
    coordinates = np.indices(volume.shape, dtype=f).reshape(volume.ndim, -1).T
    largest, total, sums = f(-np.inf), f(0), np.zeros(volume.ndim, dtype=f)
    scaled = f(alpha) * volume.ravel()
    for logit, place in zip(scaled, coordinates, strict=True):
        if logit > largest:
            factor = np.exp(largest - logit)
            largest, total, sums = logit, total * factor, sums * factor
        p = np.exp(logit - largest)
        total, sums = total + p, sums + p * place
    return sums / total


def library_mean(volume: torch.Tensor, alpha: float) -> torch.Tensor:
    """The mean by torch.softmax and two or three products."""
    p = (alpha * volume).flatten().softmax(0).view_as(volume)
    means = []
    for axis in range(volume.ndim):
        others = [a for a in range(volume.ndim) if a != axis]
        means.append((p.sum(others) * torch.arange(volume.shape[axis])).sum())
    return torch.stack(means)


def mean_errors(size: int) -> str:
    """Largest error of the mean over the axes, in pixels or voxels; one map a line."""
    rng = np.random.default_rng(0)
    y, x = np.indices((size, size + size // 3))
    peak = np.exp(-((x - 0.61 * size) ** 2 + (y - 0.38 * size) ** 2) / 128)
    noise = 0.02 * rng.standard_normal(peak.shape)
    side = 2 * size // 3
    ramp = np.arange(side**3).reshape(side, side, side) / side**3
    cases = [
        ("heat map, peak 1, alpha 100", peak + noise, 100.0),
        ("the same + 1, alpha 100: logits near 200", peak + noise + 1, 100.0),
        ("the same + 100: logits near 10 000", peak + noise + 100, 100.0),
        ("volume, standard normal", rng.standard_normal((side, side, side)), 1.0),
        ("volume, rising ramp of slope 20", 20 * ramp, 1.0),
    ]
    lines = []
    for label, values, alpha in cases:
        (logits,) = single(values)
        (exact_logits,) = double(logits)
        if logits.ndim == 2:
            exact = reference.soft_argmax2d(exact_logits, inverse_temperature=alpha)[::-1]
            found = ops.soft_argmax2d(logits, inverse_temperature=alpha).flip(0)
        else:
            exact = reference.soft_argmax3d(exact_logits, inverse_temperature=alpha)
            found = ops.soft_argmax3d(logits, inverse_temperature=alpha)
        results = [
            found.numpy(),
            library_mean(logits, alpha).numpy(),
            online_softmax_mean(logits.numpy(), alpha),
        ]
        errors = (np.abs(result - exact).max() for result in results)
        lines.append([label, "x".join(map(str, values.shape)), *(f"{e:.1e}" for e in errors)])
    return table(["map", "size", "tritool", "`torch.softmax`", "online, one accumulator"], lines)


# ---- The pages ----

TABLES: dict[str, tuple[str, Callable[[int], str], int]] = {
    "forward": ("ops/triangulate.md", forward_errors, 20000),
    "unit": ("ops/triangulate.md", unit_errors, 20000),
    "constraint": ("ops/triangulate.md", constraint_errors, 5000),
    "gradient": ("ops/triangulate.md", gradient_errors, 3000),
    "determinacy": ("ops/triangulate.md", determinacy, 5000),
    "alignment": ("ops/rigid_align.md", alignment_errors, 20000),
    "alignment-gradient": ("ops/rigid_align.md", alignment_gradient_errors, 20000),
    "unprojection": ("ops/unproject.md", unprojection_errors, 64),
    "unprojection-gradient": ("ops/unproject.md", unprojection_gradient_errors, 64),
    "mean": ("ops/soft_argmax.md", mean_errors, 96),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures what is asked for."""
    parser = argparse.ArgumentParser(description="Measure the accuracy figures of docs/ops.")
    parser.add_argument("tables", nargs="*", metavar="TABLE", help=f"of {', '.join(TABLES)}")
    parser.add_argument("--write", action="store_true", help="put them into the pages")
    options = parser.parse_args(arguments)
    variant = _native.describe()["paths"]["cpu"]
    print(f"torch {torch.__version__}, kernels: {variant}")
    for name in options.tables or TABLES:
        page, measure, count = TABLES[name]
        text = measure(count)
        print(f"\n{name}\n{text}")
        if options.write:
            path = DOCS / page
            begin, end = f"<!-- measured:{name} -->", "<!-- measured:end -->"
            replaced, found = re.subn(
                f"(?s){begin}.*?{end}",
                lambda _, whole=f"{begin}\n{text}\n{end}": whole,
                path.read_text(),
            )
            if found != 1:
                sys.exit(f"{path} must hold {begin} once, holds it {found} times")
            path.write_text(replaced)


if __name__ == "__main__":
    main()
