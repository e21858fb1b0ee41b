# SPDX-License-Identifier: Apache-2.0
"""Weighted linear triangulation (DLT) of batched points, differentiable twice and more."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tritool.ops import _check, composite
from tritool.ops._register import Function, expand_batched, register

__all__ = ["Triangulate", "TriangulateBackward", "triangulate"]

_MODES = ("homogeneous", "inhomogeneous")


def triangulate(
    points: Tensor,
    projections: Tensor,
    weights: Tensor | None = None,
    *,
    mode: str = "homogeneous",
    reweight: int = 0,
) -> Tensor:
    r"""The 3D point that each group of 2D points sees, by the weighted direct linear transform.

    Every view contributes the rows :math:`w (u P_3 - P_1)` and :math:`w (v P_3 - P_2)` to a matrix
    :math:`A`; the result minimises :math:`\|A (y, 1)\|^2 / (1 + \|y\|^2)` (`"homogeneous"`) or
    :math:`\|A (y, 1)\|^2` (`"inhomogeneous"`). The first is equations (3)-(4) of Iskakov et al.,
    "Learnable Triangulation of Human Pose" (ICCV 2019); its result on noisy data depends on the
    unit and the origin of the world, that of the second does not. Batch dimensions broadcast; an
    operand that broadcasts is read in place.

    Args:
        points: `[..., C, 2]`, pixels (x, y), one per view. NaN: the view is absent.
        projections: `[..., C, 3, 4]`, world to pixels.
        weights: `[..., C]`, at least 0. 0: the view is absent (its gradient is then 0 too, as the
            weight enters squared). None: every view counts alike.
        mode: `"homogeneous"` or `"inhomogeneous"`.
        reweight: Rounds in which every view's weight is divided by the depth of the previous
            solution, differentiated through. One round brings the inhomogeneous solution close to
            the least reprojection error; the homogeneous one keeps its pull away from the origin
            (docs/ops/triangulate.md has the distances).

    Returns:
        `[..., 3]`, world units, in the widest dtype of the arguments and at least float32. NaN,
        with zero gradient to every argument, where fewer than two views are present or the rays are
        parallel to rounding; also where a view that is present has a negative or non-finite weight
        or a non-finite projection.

    Raises:
        TypeError: An argument is not a floating-point tensor.
        ValueError: Shapes or devices do not fit, `mode` is unknown or `reweight` negative.

    Example:
        >>> P = torch.tensor([[[1.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 4]],
        ...                   [[0.0, 0, 1, 0], [0, 1, 0, 0], [-1, 0, 0, 4]]])
        >>> point = torch.tensor([0.5, -0.25, 1.0])
        >>> triangulate(project(point, P), P)
        tensor([ 0.5000, -0.2500,  1.0000])
    """
    _check.one_of("mode", mode, _MODES)
    if reweight < 0:
        raise ValueError(f"reweight must be 0 or more rounds, got {reweight}")
    homogeneous = mode == "homogeneous"
    tensors = {"points": points, "projections": projections}
    if weights is not None:
        tensors["weights"] = weights
    _check.tensors(tensors)
    _check.trailing("points", points, "[..., C, 2]", (None, 2))
    views = points.shape[-2]
    _check.trailing("projections", projections, "[..., C, 3, 4]", (views, 3, 4), of="points")
    if weights is not None:
        _check.trailing("weights", weights, "[..., C]", (views,), of="points")

    dtype = _check.geometry_dtype(tensors.values())
    batch = _check.broadcast_batch(
        {"points": points.shape[:-2], "projections": projections.shape[:-3]}
        | ({"weights": weights.shape[:-1]} if weights is not None else {})
    )
    points = points.to(dtype).expand(*batch, views, 2)
    projections = _check.align_batch(projections.to(dtype), batch, 3)
    if weights is not None:
        weights = weights.to(dtype).expand(*batch, views)

    points_3d: Tensor = Triangulate.apply(points, projections, weights, homogeneous)
    for _ in range(reweight):
        points_3d = _reweighted(points_3d, points, projections, weights, homogeneous)
    return points_3d


def _reweighted(
    previous: Tensor, points: Tensor, projections: Tensor, weights: Tensor | None, homogeneous: bool
) -> Tensor:
    """One more solution, each view's weight divided by its depth of the previous one."""
    valid = ~previous.isnan().any(-1, keepdim=True)
    # What is not a number here and does not count must not reach a gradient as 0 * NaN: points that
    # are not valid and the matrices of absent views go on as zeros, and their depth as 1.
    counts = valid & ~points.isnan().any(-1)
    if weights is not None:
        counts = counts & (weights != 0)
    at = torch.where(valid, previous, 0)
    row = torch.where(counts[..., None], projections[..., 2, :], 0)
    # Not a matmul: autocast and TF32 would round it.
    depth = (row[..., :3] * at[..., None, :]).sum(-1) + row[..., 3]
    nonzero = counts & (depth != 0)
    scale = 1 / torch.where(nonzero, depth, 1).abs()
    scale = torch.where(nonzero | ~counts, scale, torch.inf)  # in the camera's plane: no solution
    refined = Triangulate.apply(
        points, projections, scale if weights is None else weights * scale, homogeneous
    )
    return torch.where(valid, refined, previous)


class Triangulate(Function):
    """The op behind `triangulate`.

    `Triangulate.apply(points, projections, weights, homogeneous)`: points `[batch, C, 2]` and
    weights `[batch, C]` (or None) in the full batch, projections `[batch, C, 3, 4]` with as many
    dimensions, of size 1 where they broadcast; all of one dtype, float32 or float64. Returns
    `[batch, 3]`.
    """

    @staticmethod
    def forward(
        points: Tensor, projections: Tensor, weights: Tensor | None, homogeneous: bool
    ) -> Tensor:
        """Calls the kernel."""
        points_3d: Tensor = torch.ops.tritool.triangulate.default(
            points, projections, weights, homogeneous
        )
        return points_3d

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keeps the inputs; the backward solves again rather than store 80 bytes a point."""
        points, projections, weights, ctx.homogeneous = inputs
        ctx.save_for_backward(points, projections, weights)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        """The gradients that were asked for."""
        if grad is None:
            return None, None, None, None
        points, projections, weights = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        grads = TriangulateBackward.apply(
            grad, points, projections, weights, ctx.homogeneous, wanted[0], wanted[1], wanted[2]
        )
        return *(g if want else None for g, want in zip(grads, wanted, strict=False)), None


class TriangulateBackward(Function):
    """The vector-Jacobian product of `Triangulate`, differentiable in plain PyTorch."""

    @staticmethod
    def forward(
        grad: Tensor,
        points: Tensor,
        projections: Tensor,
        weights: Tensor | None,
        homogeneous: bool,
        want_points: bool,
        want_projections: bool,
        want_weights: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Calls the kernel; a gradient that is not wanted is an empty tensor."""
        return torch.ops.tritool.triangulate_backward.default(  # type: ignore[no-any-return]
            grad, points, projections, weights, homogeneous,
            want_points, want_projections, want_weights,
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Keeps the inputs."""
        grad, points, projections, weights, *ctx.flags = inputs
        ctx.save_for_backward(grad, points, projections, weights)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient of the gradients, by differentiating the composite twice."""
        homogeneous, *wanted = ctx.flags
        grad, points, projections, weights = ctx.saved_tensors
        results = composite.triangulate_double_backward(
            cotangents, grad, points, projections, weights, homogeneous, wanted
        )
        return *results, None, None, None, None


def _fake(points: Tensor, projections: Tensor, weights: Tensor | None, homogeneous: bool) -> Tensor:
    return points.new_empty(*points.shape[:-2], 3)


def _fake_backward(
    grad: Tensor, points: Tensor, projections: Tensor, weights: Tensor | None, homogeneous: bool,
    want_points: bool, want_projections: bool, want_weights: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    def gradient_of(tensor: Tensor | None, wanted: bool) -> Tensor:
        return points.new_empty(tensor.shape if wanted and tensor is not None else (0,))

    return (
        gradient_of(points, want_points),
        gradient_of(projections, want_projections),
        gradient_of(weights, want_weights),
    )


def _vmap(
    call: Callable[..., Any], info: Any, in_dims: tuple[int | None, ...], *args: Any
) -> tuple[Tensor, int]:
    return call(*expand_batched(info.batch_size, in_dims, args, full=(0, 2))), 0


def _vmap_backward(
    call: Callable[..., Any], info: Any, in_dims: tuple[int | None, ...], *args: Any
) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
    # Each mapped slice wants its own gradient of projections, also where they are shared: expand
    # those too.
    moved = expand_batched(info.batch_size, in_dims, args, full=(0, 1, 2, 3))
    wanted = args[5:8]
    grads = call(*moved)
    present = (True, True, args[3] is not None)
    return grads, tuple(0 if w and p else None for w, p in zip(wanted, present, strict=True))


register(
    Triangulate,
    "triangulate(Tensor points, Tensor projections, Tensor? weights, bool homogeneous) -> Tensor",
    fake=_fake,
    composite=composite.triangulate,
    vmap=_vmap,
)
register(
    TriangulateBackward,
    "triangulate_backward(Tensor grad, Tensor points, Tensor projections, Tensor? weights, "
    "bool homogeneous, bool want_points, bool want_projections, bool want_weights) "
    "-> (Tensor, Tensor, Tensor)",
    fake=_fake_backward,
    composite=composite.triangulate_backward,
    vmap=_vmap_backward,
)
