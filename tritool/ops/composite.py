# SPDX-License-Identifier: Apache-2.0
"""The ops in plain PyTorch: for second derivatives, and where nothing is compiled.

Slow beside the kernels and accurate: geometry is computed in float64 whatever comes in. The
formulas here are for autograd, the ones for the kernels are in csrc/math; tests compare both with
tritool.reference.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "accumulator_dtype",
    "project",
    "project_backward",
    "project_double_backward",
    "softmax_moments",
    "softmax_moments_backward",
    "softmax_moments_double_backward",
    "triangulate",
    "triangulate_backward",
    "triangulate_double_backward",
]


def _vjp(function: Callable[..., Any], *inputs: Tensor) -> tuple[Any, Callable[..., Any]]:
    outputs, pull = torch.func.vjp(function, *inputs)[:2]
    return outputs, pull


# ---- Triangulation ----


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

    _, pull = _vjp(gradient, *inputs)
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
    _, pull = _vjp(forward, *(inputs[i] for i in chosen))
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
        point = point - _solve3(jacobian, equation)
    return torch.where(valid[..., None], point.to(points.dtype), torch.nan)


def _solve3(matrix: Tensor, right: Tensor) -> Tensor:
    """Solves 3x3 systems by Cramer's rule: differentiable to any order, no library call to fail."""
    scale = matrix.detach().abs().amax((-2, -1), keepdim=True).clamp_min(1e-300)
    matrix, right = matrix / scale, right / scale[..., 0]
    first, second, third = matrix.unbind(-1)
    cross = torch.linalg.cross(second, third)
    determinant = (first * cross).sum(-1, keepdim=True)
    numerators = [cross, torch.linalg.cross(third, first), torch.linalg.cross(first, second)]
    solution: Tensor = torch.stack([(right * n).sum(-1) for n in numerators], -1) / determinant
    return solution


# ---- Projection ----


def project(points: Tensor, projections: Tensor) -> Tensor:
    """See `tritool.ops.project`; the arguments are those of `Project.apply`."""
    homogeneous = (projections[..., :3] @ points[..., None, :, None]).squeeze(-1)
    image = homogeneous + projections[..., 3]
    visible = (image[..., 2:] > 0) & image.isfinite().all(-1, keepdim=True)
    # Once more on harmless values, so that no NaN is differentiated.
    safe_points = torch.where(points.isfinite(), points, 0)[..., None, :, None]
    safe = torch.where(visible[..., None], projections, 0)
    image = (safe[..., :3] @ safe_points).squeeze(-1) + safe[..., 3]
    pixels = image[..., :2] / torch.where(visible, image[..., 2:], 1)
    return torch.where(visible & pixels.isfinite().all(-1, keepdim=True), pixels, torch.nan)


def project_backward(
    grad: Tensor, points: Tensor, projections: Tensor, want_points: bool, want_projections: bool
) -> tuple[Tensor, Tensor]:
    """The gradients that are wanted, and empty tensors for the others."""
    wanted = (want_points, want_projections)
    grads = _project_gradient(grad, points, projections, wanted)
    results = [grads.pop(0) if want else points.new_empty(0) for want in wanted]
    return results[0], results[1]


def project_double_backward(
    cotangents: Sequence[Tensor],
    grad: Tensor,
    points: Tensor,
    projections: Tensor,
    wanted: Sequence[bool],
) -> tuple[Tensor, ...]:
    """The gradients of <cotangents, gradients of Project> to grad, points and projections."""

    def gradient(*inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(_project_gradient(inputs[0], inputs[1], inputs[2], wanted))

    _, pull = _vjp(gradient, grad, points, projections)
    given = tuple(c for c, want in zip(cotangents, wanted, strict=True) if want)
    grads: tuple[Tensor, ...] = pull(given)
    return grads


def _project_gradient(
    grad: Tensor, points: Tensor, projections: Tensor, wanted: Sequence[bool]
) -> list[Tensor]:
    pixels, pull = _vjp(project, points, projections)
    grads = pull(torch.where(pixels.isnan(), 0, grad))
    return [g for g, want in zip(grads, wanted, strict=True) if want]


# ---- Softmax moments ----


def accumulator_dtype(logits: Tensor) -> torch.dtype:
    """What logits are summed in, and their moments come back in."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def softmax_moments(
    logits: Tensor, dims: int, inverse_temperature: float, with_covariance: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `tritool.ops.softmax_moments2d`; the arguments are those of `SoftmaxMoments.apply`."""
    dtype = accumulator_dtype(logits)
    mean, covariance, log_partition = _moments(logits, dims, inverse_temperature)
    # The backward of the kernels makes weights from an integer level in base 2 and their sum.
    flat = logits.flatten(-dims).double() * (inverse_temperature / math.log(2))
    level = flat.amax(-1).ceil() if flat.shape[-1] else flat.sum(-1) - torch.inf
    total = (flat - torch.where(level.isinf() & (level < 0), 0, level)[..., None]).exp2().sum(-1)
    partition = torch.stack([level, total], -1)
    if not with_covariance:
        covariance = covariance.new_empty(0)
    return mean.to(dtype), covariance.to(dtype), log_partition.to(dtype), partition.to(dtype)


def softmax_moments_backward(
    grad_mean: Tensor | None,
    grad_covariance: Tensor | None,
    grad_log_partition: Tensor | None,
    logits: Tensor,
    mean: Tensor,
    covariance: Tensor,
    partition: Tensor,
    dims: int,
    inverse_temperature: float,
) -> Tensor:
    """The gradient to the logits."""
    grads = (grad_mean, grad_covariance, grad_log_partition)
    gradient = _moments_gradient(grads, logits, dims, inverse_temperature)
    return torch.empty_like(logits).copy_(gradient)


def softmax_moments_double_backward(
    cotangent: Tensor,
    grads: Sequence[Tensor | None],
    logits: Tensor,
    dims: int,
    inverse_temperature: float,
) -> tuple[Tensor | None, ...]:
    """The gradients of <cotangent, gradient of SoftmaxMoments> to its gradients and logits."""
    present = [g for g in grads if g is not None]

    def gradient(*inputs: Tensor) -> Tensor:
        left = list(inputs[:-1])
        given = [left.pop(0) if g is not None else None for g in grads]
        return _moments_gradient(given, inputs[-1], dims, inverse_temperature)

    _, pull = _vjp(gradient, *present, logits)
    results = list(pull(cotangent))
    return *(results.pop(0) if g is not None else None for g in grads), results[-1]


def _moments_gradient(
    grads: Sequence[Tensor | None], logits: Tensor, dims: int, inverse_temperature: float
) -> Tensor:
    moments, pull = _vjp(lambda x: _moments(x, dims, inverse_temperature), logits)
    spoilt = moments[0].isnan().any(-1)

    def clean(grad: Tensor | None, moment: Tensor) -> Tensor:
        # An incoming NaN must not survive as 0 * NaN in a map that has no mean.
        if grad is None:
            return torch.zeros_like(moment)
        where = spoilt.reshape(*spoilt.shape, *(1,) * (moment.dim() - spoilt.dim()))
        return torch.where(where, 0, grad.to(moment.dtype))

    (gradient,) = pull(tuple(clean(g, m) for g, m in zip(grads, moments, strict=True)))
    return gradient  # type: ignore[no-any-return]


def _moments(
    logits: Tensor, dims: int, inverse_temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, covariance and log-partition in float64."""
    size = logits.shape[-dims:]
    flat = logits.flatten(-dims).double() * inverse_temperature
    nothing = (flat == -torch.inf).all(-1)
    spoilt = nothing | flat.isnan().any(-1) | (flat == torch.inf).any(-1)
    flat = torch.where(spoilt[..., None], 0, flat)
    weights = flat.softmax(-1)
    axes = [torch.arange(n, dtype=torch.float64, device=logits.device) for n in size]
    places = torch.stack([a.flatten() for a in torch.meshgrid(*axes, indexing="ij")], -1)
    if dims == 2:
        places = places.flip(-1)  # (x, y), where a heat map is [H, W]
    mean = weights @ places
    squares = (places[:, :, None] * places[:, None, :]).flatten(-2)
    second = (weights @ squares).unflatten(-1, (dims, dims))
    covariance = second - mean[..., :, None] * mean[..., None, :]
    log_partition = torch.where(spoilt, torch.nan, flat.logsumexp(-1))
    return (
        torch.where(spoilt[..., None], torch.nan, mean),
        torch.where(spoilt[..., None, None], torch.nan, covariance),
        torch.where(nothing, -torch.inf, log_partition),
    )
