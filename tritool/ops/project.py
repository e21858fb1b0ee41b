# SPDX-License-Identifier: Apache-2.0
"""Projection of batched points into several views."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tritool.ops import _check, composite
from tritool.ops._register import Function, expand_batched, register

__all__ = ["Project", "ProjectBackward", "project"]


def project(points: Tensor, projections: Tensor) -> Tensor:
    """The pixels at which C cameras see world points.

    Batch dimensions broadcast; an operand that broadcasts is read in place. The inverse of
    `triangulate` on exact data.

    Args:
        points: `[..., 3]`, world units.
        projections: `[..., C, 3, 4]`, world to pixels; third row scaled so that it gives depth with
            positive sign.

    Returns:
        `[..., C, 2]`, pixels (x, y), in the widest dtype of the arguments and at least float32.
        NaN, with zero gradient, in a view whose camera the point is not in front of (depth 0 or
        less), and where anything is not finite.

    Raises:
        TypeError: An argument is not a floating-point tensor.
        ValueError: Shapes or devices do not fit.

    Example:
        >>> P = torch.tensor([[[100., 0, 32, 0], [0, 100, 24, 0], [0, 0, 1, 0]]])
        >>> project(torch.tensor([[1., 2, 10], [1, 2, -10]]), P)
        tensor([[[42., 44.]],
        <BLANKLINE>
                [[nan, nan]]])
    """
    tensors = {"points": points, "projections": projections}
    _check.tensors(tensors)
    _check.trailing("points", points, "[..., 3]", (3,))
    _check.trailing("projections", projections, "[..., C, 3, 4]", (None, 3, 4))
    dtype = _check.geometry_dtype(tensors.values())
    batch = _check.broadcast_batch(
        {"points": points.shape[:-1], "projections": projections.shape[:-3]}
    )
    points = points.to(dtype).expand(*batch, 3)
    projections = _check.align_batch(projections.to(dtype), batch, 3)
    pixels: Tensor = Project.apply(points, projections)
    return pixels


class Project(Function):
    """The op behind `project`.

    `Project.apply(points, projections)`: points `[batch, 3]` in the full batch, projections
    `[batch, C, 3, 4]` with as many dimensions, of size 1 where they broadcast; one dtype, float32
    or float64. Returns `[batch, C, 2]`.
    """

    @staticmethod
    def forward(points: Tensor, projections: Tensor) -> Tensor:
        """Calls the kernel."""
        return torch.ops.tritool.project.default(points, projections)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keeps the inputs."""
        ctx.save_for_backward(*inputs)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        """The gradients that were asked for."""
        if grad is None:
            return None, None
        wanted = ctx.needs_input_grad
        grads = ProjectBackward.apply(grad, *ctx.saved_tensors, wanted[0], wanted[1])
        return tuple(g if want else None for g, want in zip(grads, wanted, strict=True))


class ProjectBackward(Function):
    """The vector-Jacobian product of `Project`, itself differentiable, in plain PyTorch."""

    @staticmethod
    def forward(
        grad: Tensor,
        points: Tensor,
        projections: Tensor,
        want_points: bool,
        want_projections: bool,
    ) -> tuple[Tensor, Tensor]:
        """Calls the kernel; a gradient that is not wanted is an empty tensor."""
        return torch.ops.tritool.project_backward.default(  # type: ignore[no-any-return]
            grad, points, projections, want_points, want_projections
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Keeps the inputs."""
        grad, points, projections, *ctx.wanted = inputs
        ctx.save_for_backward(grad, points, projections)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient of the gradients, by differentiating the composite twice."""
        grad, points, projections = ctx.saved_tensors
        results = composite.project_double_backward(
            cotangents, grad, points, projections, ctx.wanted
        )
        return *results, None, None


def _fake(points: Tensor, projections: Tensor) -> Tensor:
    return points.new_empty(*points.shape[:-1], projections.shape[-3], 2)


def _fake_backward(
    grad: Tensor, points: Tensor, projections: Tensor, want_points: bool, want_projections: bool
) -> tuple[Tensor, Tensor]:
    return (
        points.new_empty(points.shape if want_points else (0,)),
        points.new_empty(projections.shape if want_projections else (0,)),
    )


def _vmap(
    call: Callable[..., Any], info: Any, in_dims: tuple[int | None, ...], *args: Any
) -> tuple[Tensor, int]:
    return call(*expand_batched(info.batch_size, in_dims, args, full=(0,))), 0


def _vmap_backward(
    call: Callable[..., Any], info: Any, in_dims: tuple[int | None, ...], *args: Any
) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
    # Each mapped slice wants its own gradient of projections, also where they are shared: expand
    # those too.
    moved = expand_batched(info.batch_size, in_dims, args, full=(0, 1, 2))
    return call(*moved), tuple(0 if want else None for want in args[3:])


register(
    Project,
    "project(Tensor points, Tensor projections) -> Tensor",
    fake=_fake,
    composite=composite.project,
    vmap=_vmap,
)
register(
    ProjectBackward,
    "project_backward(Tensor grad, Tensor points, Tensor projections, bool want_points, "
    "bool want_projections) -> (Tensor, Tensor)",
    fake=_fake_backward,
    composite=composite.project_backward,
    vmap=_vmap_backward,
)
