# SPDX-License-Identifier: Apache-2.0
"""Triangulation in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tritool.ops.composite._solve3 import solve3
from tritool.ops.composite._vjp import vjp

__all__ = [
    "triangulate",
    "triangulate_backward",
    "triangulate_double_backward",
]


def triangulate(
    points: Tensor, projections: Tensor, weights: Tensor | None, homogeneous: bool
) -> Tensor:
    """See `tritool.ops.triangulate`; the arguments are those of `Triangulate.apply`."""
    start = _solve_by_svd(points, projections, weights, homogeneous)
    return _polish(points, projections, weights, homogeneous, start)


def triangulate_backward(
    grad: Tensor,
    points: Tensor,
    projections: Tensor,
    weights: Tensor | None,
    homogeneous: bool,
    want_points: bool,
    want_projections: bool,
    want_weights: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients that are wanted, and empty tensors for the others."""
    start = _solve_by_svd(points, projections, weights, homogeneous)
    wanted = [want_points, want_projections, want_weights]
    grads = _gradient(grad, points, projections, weights, homogeneous, start, wanted)
    results = [grads.pop(0) if want else points.new_empty(0) for want in wanted]
    return results[0], results[1], results[2]


def triangulate_double_backward(
    cotangents: Sequence[Tensor],
    grad: Tensor,
    points: Tensor,
    projections: Tensor,
    weights: Tensor | None,
    homogeneous: bool,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """The gradients of <cotangents, gradients of Triangulate> to grad and the op's arguments."""
    start = torch.ops.tritool.triangulate.default(
        *(x if x is None else x.detach() for x in (points, projections, weights)), homogeneous
    )
    inputs = [grad, points, projections] + ([weights] if weights is not None else [])

    def gradient(*inputs: Tensor) -> tuple[Tensor, ...]:
        given = inputs[3] if weights is not None else None
        return tuple(_gradient(inputs[0], inputs[1], inputs[2], given, homogeneous, start, wanted))

    _, pull = vjp(gradient, *inputs)
    results = pull(tuple(c for c, want in zip(cotangents, wanted, strict=True) if want))
    return *results, *(None,) * (4 - len(results))


def _gradient(
    grad: Tensor, points: Tensor, projections: Tensor, weights: Tensor | None,
    homogeneous: bool, start: Tensor, wanted: Sequence[bool],
) -> list[Tensor]:  # fmt: skip
    """The wanted gradients of <grad, point>, as functions that autograd can differentiate again."""
    inputs: list[Any] = [points, projections, weights]
    chosen = [i for i, want in enumerate(wanted) if want]

    def forward(*changed: Tensor) -> Tensor:
        all_inputs = list(inputs)
        for i, tensor in zip(chosen, changed, strict=True):
            all_inputs[i] = tensor
        return _polish(all_inputs[0], all_inputs[1], all_inputs[2], homogeneous, start)

    # An incoming NaN must not survive as 0 * NaN at a point that is not valid.
    grad = torch.where(start.isnan(), 0, grad)
    _, pull = vjp(forward, *(inputs[i] for i in chosen))
    return list(pull(grad))


def _rows(points: Tensor, projections: Tensor, weights: Tensor | None) -> Tensor:
    """A [..., 2C, 4] in float64, with zero rows for absent views, whose contents go nowhere."""
    present = ~points.isnan().any(-1)
    if weights is not None:
        present = present & (weights != 0)
    points = torch.where(present[..., None], points, 0).double()
    projections = torch.where(present[..., None, None], projections, 0).double()
    rows = points[..., None] * projections[..., 2:3, :] - projections[..., :2, :]
    if weights is not None:
        weights = torch.where(present, weights, 0).double()
        # Weights of any scale: the result does not depend on it, the rounding of lambda does.
        scale = weights.detach().amax(-1, keepdim=True)
        weights = weights / torch.where((scale > 0) & scale.isfinite(), scale, 1)
        weights = torch.where(weights < 0, torch.nan, weights)
        rows = rows * weights[..., None, None]
    return rows.flatten(-3, -2)


def _solve_by_svd(
    points: Tensor, projections: Tensor, weights: Tensor | None, homogeneous: bool
) -> Tensor:
    """The point [..., 3], without gradient, NaN where it is not determined."""
    with torch.no_grad():
        rows = _rows(points, projections, weights)
        finite = rows.isfinite().all(-1).all(-1)
        rows = torch.where(finite[..., None, None], rows, 0)
        present = (rows != 0).any(-1).unflatten(-1, (-1, 2)).any(-1).sum(-1)
        if rows.shape[-2] < 4:  # one view or none: LAPACK wants the full set of singular vectors
            rows = torch.nn.functional.pad(rows, (0, 0, 0, 4 - rows.shape[-2]))
        singular = torch.linalg.svdvals(rows[..., :3])
        smallest = singular[..., 2] ** 2
        if homogeneous:
            _, values, vectors = torch.linalg.svd(rows, full_matrices=False)
            point = vectors[..., 3, :3] / vectors[..., 3, 3:]
            gap = smallest - values[..., 3] ** 2
        else:
            point = torch.linalg.pinv(rows[..., :3]) @ -rows[..., 3:]
            point, gap = point.squeeze(-1), smallest
        tau = 1e-6 if points.dtype == torch.float32 else 1e-13
        valid = finite & (present >= 2) & (singular[..., 2] > tau * singular[..., 0])
        valid = valid & (gap > tau * smallest) & point.isfinite().all(-1)
        return torch.where(valid[..., None], point, torch.nan)


def _polish(
    points: Tensor, projections: Tensor, weights: Tensor | None, homogeneous: bool, start: Tensor
) -> Tensor:
    """Newton steps from `start` on the equations that define the point and so its derivatives.

    F(y) = A3^T A (y, 1) - lambda(y) y with lambda(y) = |A (y, 1)|^2 / (1 + |y|^2), or 0. After k
    steps from the solution, held constant, the derivatives are right up to order 2^k - 1: three
    steps serve seven.
    """
    rows = _rows(points, projections, weights)
    valid = ~start.isnan().any(-1)
    rows = torch.where(valid[..., None, None], rows, 0)
    point = torch.where(valid[..., None], start.detach(), 0).double()
    block = rows[..., :3].mT @ rows[..., :3]
    eye = torch.eye(3, dtype=torch.float64, device=rows.device)
    block = torch.where(valid[..., None, None], block, eye)
    for _ in range(3):
        residual = (rows[..., :3] @ point[..., None]).squeeze(-1) + rows[..., 3]
        equation = (rows[..., :3].mT @ residual[..., None]).squeeze(-1)
        jacobian = block
        if homogeneous:
            norm = 1 + point.square().sum(-1, keepdim=True)
            level = residual.square().sum(-1, keepdim=True) / norm
            equation = equation - level * point
            jacobian = (
                block
                - level[..., None] * eye
                - point[..., None] * (2 * equation / norm)[..., None, :]
            )
        point = point - solve3(jacobian, equation)
    return torch.where(valid[..., None], point.to(points.dtype), torch.nan)
