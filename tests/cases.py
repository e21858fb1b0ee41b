# SPDX-License-Identifier: Apache-2.0
"""One table of the ops, from which test_contract.py derives its tests; a new op adds its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tritool import VoxelGrid, ops


@dataclass(frozen=True)
class OpCase:
    """A public function of tensors, with samples, and the dispatcher's ops it stands on.

    Args:
        name: Of the test.
        function: Of tensors alone, returning a tensor or a tuple of tensors; differentiable in all.
        sample: Makes its arguments: float64, small, well conditioned, H differing from W. Its
            argument is the size of the leading batch dimension that all of them have.
        raw: The dispatcher's ops behind it, each with arguments made from the sample.
    """

    name: str
    function: Callable[..., Any]
    sample: Callable[[int], tuple[Tensor, ...]]
    raw: dict[str, Callable[..., tuple[Any, ...]]] = field(default_factory=dict)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _randn(*size: int, seed: int) -> Tensor:
    return torch.randn(*size, generator=_generator(seed), dtype=torch.float64)


def _scene(batch: int, views: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """Points [batch, views, 2], own projections [batch, views, 3, 4], weights: units of order 1."""
    world = 0.5 * _randn(batch, 3, seed=0)
    rotations = torch.linalg.qr(_randn(batch, views, 3, 3, seed=1))[0]
    rotations = rotations * torch.linalg.det(rotations)[..., None, None]
    distance = torch.tensor([0.1, -0.2, 4.0], dtype=torch.float64)
    projections = torch.cat([rotations, distance.expand(batch, views, 3)[..., None]], -1)
    points = ops.project(world, projections) + 0.02 * _randn(batch, views, 2, seed=2)
    weights = 0.5 + torch.rand(batch, views, generator=_generator(3), dtype=torch.float64)
    return points, projections, weights


def _project_scene(batch: int) -> tuple[Tensor, Tensor]:
    _, projections, _ = _scene(batch)
    return 0.5 * _randn(batch, 3, seed=4), projections


def _logits(*size: int) -> Callable[[int], tuple[Tensor, ...]]:
    return lambda batch: (2 * _randn(batch, *size, seed=5),)


def _volume_and_frame(batch: int) -> tuple[Tensor, Tensor, Tensor]:
    origin, axes = _randn(batch, 3, seed=6), _randn(batch, 3, 3, seed=7)
    return 2 * _randn(batch, 2, 2, 3, 4, seed=5), origin, axes


def _moments_raw(dims: int) -> dict[str, Callable[..., tuple[Any, ...]]]:
    def forward(logits: Tensor) -> tuple[Any, ...]:
        return logits, dims, 1.3, True

    def forward_mean_only(logits: Tensor) -> tuple[Any, ...]:
        return logits, dims, 1.3, False

    def backward(logits: Tensor) -> tuple[Any, ...]:
        with torch.no_grad():
            outputs = torch.ops.tritool.softmax_moments(logits, dims, 1.3, True)
        mean, covariance, log_partition, partition = outputs
        grads = [torch.ones_like(x, requires_grad=True) for x in (mean, covariance, log_partition)]
        return *grads, logits, mean, covariance, partition, dims, 1.3

    def backward_mean_only(logits: Tensor) -> tuple[Any, ...]:
        grad, _, _, *rest = backward(logits)
        return grad, None, None, *rest

    return {
        "softmax_moments": forward,
        "softmax_moments/mean": forward_mean_only,
        "softmax_moments_backward": backward,
        "softmax_moments_backward/mean": backward_mean_only,
    }


def _heatmaps_and_depth_maps(batch: int) -> tuple[Tensor, Tensor]:
    return 2 * _randn(batch, 2, 3, 4, seed=5), 3 + _randn(batch, 2, 3, 4, seed=8)


def _soft_argmax25d_backward(heatmaps: Tensor, depth_maps: Tensor) -> tuple[Any, ...]:
    with torch.no_grad():
        position, partition = torch.ops.tritool.soft_argmax25d(heatmaps, depth_maps, 1.3)
    grad = torch.ones_like(position, requires_grad=True)
    return grad, heatmaps, depth_maps, position, partition, 1.3


def _triangulate_raw(homogeneous: bool) -> dict[str, Callable[..., tuple[Any, ...]]]:
    def backward(points: Tensor, projections: Tensor, weights: Tensor) -> tuple[Any, ...]:
        grad = torch.ones(len(points), 3, dtype=points.dtype, device=points.device)
        wanted = (True, True, True)
        return grad.requires_grad_(), points, projections, weights, homogeneous, *wanted

    return {
        "triangulate": lambda points, projections, weights: (
            points, projections, weights, homogeneous,
        ),
        "triangulate/unweighted": lambda points, projections, weights: (
            points, projections, None, homogeneous,
        ),
        "triangulate_backward": backward,
    }  # fmt: skip


def _project_backward(points: Tensor, projections: Tensor) -> tuple[Any, ...]:
    grad = torch.ones(*projections.shape[:2], 2, dtype=points.dtype, device=points.device)
    return grad.requires_grad_(), points, projections, True, True


def _unproject_scene(batch: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Features, projections, a frame for 2 x 1 x 3 voxels, confidences; some voxels unseen."""
    _, views, _ = _scene(batch)
    intrinsics = torch.tensor([[6.0, 0, 2.1], [0, 6, 1.4], [0, 0, 1]], dtype=torch.float64)
    projections = (intrinsics[..., None] * views[..., None, :, :]).sum(-2)
    features = _randn(batch, 3, 2, 4, 5, seed=8)
    origin = torch.tensor([-0.8, 0.1, -0.9], dtype=torch.float64) + 0.1 * _randn(batch, 3, seed=9)
    axes = 0.7 * torch.eye(3, dtype=torch.float64) + 0.1 * _randn(batch, 3, 3, seed=10)
    confidences = 0.5 + torch.rand(batch, 3, 2, generator=_generator(11), dtype=torch.float64)
    return features, projections, origin, axes, confidences


def _unproject_raw(aggregation: int, exclude: bool) -> dict[str, Callable[..., tuple[Any, ...]]]:
    def frame(origin: Tensor, axes: Tensor) -> Tensor:
        return torch.cat([origin[:, None], axes], 1)

    def forward(
        features: Tensor, projections: Tensor, origin: Tensor, axes: Tensor, confidences: Tensor
    ) -> tuple[Any, ...]:
        options = ((2, 1, 3), aggregation, exclude, False, False)
        return features, projections, frame(origin, axes), confidences, *options

    def points(
        features: Tensor, projections: Tensor, origin: Tensor, axes: Tensor, confidences: Tensor
    ) -> tuple[Any, ...]:
        return (
            features,
            projections,
            frame(origin, axes),
            None,
            (),
            aggregation,
            exclude,
            True,
            True,
        )

    def backward(*args: Tensor) -> tuple[Any, ...]:
        *inputs, size, by, without, official, _ = forward(*args)
        grad = torch.ones(len(args[0]), 2, 6, dtype=args[0].dtype, device=args[0].device)
        wanted = (True, True, True, True)
        return grad.requires_grad_(), *inputs, size, by, without, official, False, *wanted

    def backward_points(*args: Tensor) -> tuple[Any, ...]:
        *inputs, size, by, without, official, _ = points(*args)
        grad = torch.ones(len(args[0]), 2, 4, dtype=args[0].dtype, device=args[0].device)
        wanted = (True, True, True, False)
        return grad.requires_grad_(), *inputs, size, by, without, official, True, *wanted

    return {
        "unproject": forward,
        "unproject/points": points,
        "unproject_backward": backward,
        "unproject_backward/points": backward_points,
    }


def _unproject(aggregation: str, outside: str, weighted: bool = True) -> Callable[..., Any]:
    def function(
        features: Tensor,
        projections: Tensor,
        origin: Tensor,
        axes: Tensor,
        confidences: Tensor | None = None,
    ) -> Tensor:
        grid = VoxelGrid(origin, axes, (2, 1, 3))
        return ops.unproject(
            features, projections, grid,
            aggregation=aggregation, confidences=confidences, outside=outside,
        )  # fmt: skip

    return function


def _point_sets(batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """Source and target [batch, 5, 3], a noisy motion apart, weights [batch, 5]."""
    source = _randn(batch, 5, 3, seed=8)
    rotation = torch.linalg.qr(_randn(batch, 3, 3, seed=9))[0]
    rotation = rotation * torch.linalg.det(rotation)[..., None, None]
    target = 1.3 * source @ rotation.mT + _randn(batch, 1, 3, seed=10)
    target = target + 0.2 * _randn(batch, 5, 3, seed=11)
    weights = 0.5 + torch.rand(batch, 5, generator=_generator(12), dtype=torch.float64)
    return source, target, weights


def _cubes(batch: int) -> tuple[Tensor, Tensor]:
    """A cube and itself, moved: M has three equal singular values, and others two."""
    corners = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=torch.float64)] * 3)
    source = corners * torch.linspace(1, 1.5, batch, dtype=torch.float64)[:, None, None]
    rotation = torch.linalg.qr(_randn(batch, 3, 3, seed=13))[0]
    rotation = rotation * torch.linalg.det(rotation)[..., None, None]
    return source, source @ rotation.mT + _randn(batch, 1, 3, seed=14)


def _rigid_align_raw(with_scale: bool) -> dict[str, Callable[..., tuple[Any, ...]]]:
    def grads(source: Tensor) -> list[Tensor]:
        sizes = ((3, 3), (3,), ())
        return [
            torch.ones(len(source), *size, dtype=source.dtype, device=source.device).cos()
            .requires_grad_() for size in sizes
        ]  # fmt: skip

    def backward(source: Tensor, target: Tensor, weights: Tensor) -> tuple[Any, ...]:
        return *grads(source), source, target, weights, with_scale, True, True, True

    def backward_some(source: Tensor, target: Tensor, weights: Tensor) -> tuple[Any, ...]:
        _, grad_translation, _ = grads(source)
        return None, grad_translation, None, source, target, None, with_scale, True, False, False

    return {
        "rigid_align": lambda *args: (*args, with_scale),
        "rigid_align/unweighted": lambda source, target, weights: (
            source, target, None, with_scale,
        ),
        "rigid_align_backward": backward,
        "rigid_align_backward/some": backward_some,
    }  # fmt: skip


CASES = [
    OpCase(
        "triangulate",
        ops.triangulate,
        _scene,
        _triangulate_raw(True),
    ),
    OpCase(
        "triangulate-inhomogeneous",
        lambda *args: ops.triangulate(*args, mode="inhomogeneous"),
        _scene,
        _triangulate_raw(False),
    ),
    OpCase(
        "triangulate-unweighted",
        lambda points, projections: ops.triangulate(points, projections),
        lambda batch: _scene(batch)[:2],
    ),
    OpCase(
        "triangulate-reweighted",
        lambda *args: ops.triangulate(*args, reweight=1),
        _scene,
    ),
    OpCase(
        "project",
        ops.project,
        _project_scene,
        {
            "project": lambda points, projections: (points, projections),
            "project_backward": _project_backward,
        },
    ),
    OpCase(
        "soft_argmax2d",
        lambda x: ops.soft_argmax2d(x, inverse_temperature=1.3),
        _logits(2, 3, 4),
    ),
    OpCase(
        "soft_argmax3d",
        lambda x: ops.soft_argmax3d(x, inverse_temperature=1.3),
        _logits(2, 2, 3, 4),
    ),
    OpCase(
        "soft_argmax3d-grid",
        lambda x, origin, axes: ops.soft_argmax3d(x, grid=VoxelGrid(origin, axes, (2, 3, 4))),
        _volume_and_frame,
    ),
    OpCase(
        "softmax_moments2d",
        lambda x: tuple(ops.softmax_moments2d(x, inverse_temperature=1.3)),
        _logits(2, 3, 4),
        _moments_raw(2),
    ),
    OpCase(
        "softmax_moments3d",
        lambda x: tuple(ops.softmax_moments3d(x, inverse_temperature=1.3)),
        _logits(2, 2, 3, 4),
        _moments_raw(3),
    ),
    OpCase(
        "softmax_moments3d-grid",
        lambda x, origin, axes: tuple(
            ops.softmax_moments3d(x, grid=VoxelGrid(origin, axes, (2, 3, 4)))
        ),
        _volume_and_frame,
    ),
    OpCase(
        "unproject-softmax",
        _unproject("softmax", "zeros"),
        _unproject_scene,
        _unproject_raw(2, False),
    ),
    OpCase(
        "unproject-mean",
        _unproject("mean", "exclude"),
        _unproject_scene,
    ),
    OpCase(
        "unproject-sum",
        _unproject("sum", "zeros"),
        lambda batch: _unproject_scene(batch)[:4],
    ),
    OpCase(
        "unproject-max",
        _unproject("max", "exclude"),
        lambda batch: _unproject_scene(batch)[:4],
    ),
    OpCase(
        "unproject-points",
        lambda features, projections, points: ops.unproject(
            features,
            projections,
            points[:, None],
            outside="exclude",
            sampling="official",
        ),
        lambda batch: (*_unproject_scene(batch)[:2], _unproject_scene(batch)[3]),
    ),
    OpCase(
        "soft_argmax25d",
        lambda *maps: ops.soft_argmax25d(*maps, inverse_temperature=1.3),
        _heatmaps_and_depth_maps,
        {
            "soft_argmax25d": lambda heatmaps, depth_maps: (heatmaps, depth_maps, 1.3),
            "soft_argmax25d_backward": _soft_argmax25d_backward,
        },
    ),
    OpCase(
        "rigid_align",
        lambda *args: tuple(ops.rigid_align(*args))[:2],
        _point_sets,
        _rigid_align_raw(False),
    ),
    OpCase(
        "rigid_align-scale",
        lambda *args: tuple(ops.rigid_align(*args, with_scale=True)),
        _point_sets,
        _rigid_align_raw(True),
    ),
    OpCase(
        "rigid_align-equal-singular-values",
        lambda source, target: tuple(ops.rigid_align(source, target, with_scale=True)),
        _cubes,
    ),
    OpCase(
        "rigid_align-apply",
        lambda source, target: ops.rigid_align(source, target).apply(source),
        lambda batch: _point_sets(batch)[:2],
    ),
]
