# SPDX-License-Identifier: Apache-2.0
"""Soft-argmax with a second map's expectation in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tritool.ops.composite._vjp import vjp
from tritool.ops.composite.soft_argmax import accumulator_dtype, softmax_moments

__all__ = [
    "soft_argmax25d",
    "soft_argmax25d_backward",
    "soft_argmax25d_double_backward",
]


def soft_argmax25d(
    heatmaps: Tensor, depth_maps: Tensor, inverse_temperature: float
) -> tuple[Tensor, Tensor]:
    """See `tritool.ops.soft_argmax25d`; the arguments are those of `SoftArgmax25d.apply`."""
    *_, partition = softmax_moments(heatmaps, 2, inverse_temperature, False)
    position = _position(heatmaps, depth_maps, inverse_temperature)
    return position.to(accumulator_dtype(heatmaps)), partition


def soft_argmax25d_backward(
    grad: Tensor,
    heatmaps: Tensor,
    depth_maps: Tensor,
    position: Tensor,
    partition: Tensor,
    inverse_temperature: float,
) -> tuple[Tensor, Tensor]:
    """The gradients to both maps."""
    to_heatmaps, to_depth_maps = _gradient(grad, heatmaps, depth_maps, inverse_temperature)
    return (
        torch.empty_like(heatmaps).copy_(to_heatmaps),
        torch.empty_like(depth_maps).copy_(to_depth_maps),
    )


def soft_argmax25d_double_backward(
    cotangents: Sequence[Tensor],
    grad: Tensor,
    heatmaps: Tensor,
    depth_maps: Tensor,
    inverse_temperature: float,
) -> tuple[Tensor, ...]:
    """The gradients of <cotangents, gradients of SoftArgmax25d> to grad and both maps."""

    def gradient(g: Tensor, h: Tensor, d: Tensor) -> tuple[Tensor, ...]:
        return _gradient(g, h, d, inverse_temperature)

    _, pull = vjp(gradient, grad, heatmaps, depth_maps)
    grads: tuple[Tensor, ...] = pull(tuple(cotangents))
    return grads


def _gradient(
    grad: Tensor, heatmaps: Tensor, depth_maps: Tensor, inverse_temperature: float
) -> tuple[Tensor, ...]:
    position, pull = vjp(lambda h, d: _position(h, d, inverse_temperature), heatmaps, depth_maps)
    # An incoming NaN must not survive as 0 * NaN where there is no result.
    grads: tuple[Tensor, ...] = pull(torch.where(position.isnan(), 0, grad.to(position.dtype)))
    return grads


def _position(heatmaps: Tensor, depth_maps: Tensor, inverse_temperature: float) -> Tensor:
    """Mean position and expectation in float64."""
    flat = heatmaps.flatten(-2).double() * inverse_temperature
    depth = depth_maps.flatten(-2).double()
    spoilt = (flat == -torch.inf).all(-1) | flat.isnan().any(-1) | (flat == torch.inf).any(-1)
    weights = torch.where(spoilt[..., None], 0, flat).softmax(-1)
    ys, xs = (
        torch.arange(n, dtype=torch.float64, device=heatmaps.device) for n in heatmaps.shape[-2:]
    )
    pixels = weights.unflatten(-1, heatmaps.shape[-2:])
    x, y = pixels.sum(-2) @ xs, pixels.sum(-1) @ ys
    # Weights that are zero to the kernels: what the map holds there does not count.
    takes_part = weights.to(accumulator_dtype(heatmaps)) > 0
    finite = depth.isfinite()
    expectation = (weights * torch.where(takes_part & finite, depth, 0)).sum(-1)
    expectation = torch.where((takes_part & ~finite).any(-1), torch.nan, expectation)
    position = torch.stack([x, y, expectation], -1)
    return torch.where(spoilt[..., None], torch.nan, position)
