# SPDX-License-Identifier: Apache-2.0
"""Softmax moments in plain PyTorch."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tritool.ops.composite._vjp import vjp

__all__ = [
    "accumulator_dtype",
    "softmax_moments",
    "softmax_moments_backward",
    "softmax_moments_double_backward",
]


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

    _, pull = vjp(gradient, *present, logits)
    results = list(pull(cotangent))
    return *(results.pop(0) if g is not None else None for g in grads), results[-1]


def _moments_gradient(
    grads: Sequence[Tensor | None], logits: Tensor, dims: int, inverse_temperature: float
) -> Tensor:
    moments, pull = vjp(lambda x: _moments(x, dims, inverse_temperature), logits)
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
