# SPDX-License-Identifier: Apache-2.0
"""Unprojection in plain PyTorch: every view's samples of all channels and voxels are kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tritool.ops.composite._vjp import vjp

__all__ = ["unproject", "unproject_backward", "unproject_double_backward"]

SUM, MEAN, SOFTMAX, MAX = range(4)


def unproject(
    features: Tensor,
    projections: Tensor,
    grid: Tensor,
    confidences: Tensor | None,
    size: Sequence[int],
    aggregation: int,
    exclude: bool,
    official: bool,
    channels_last: bool,
) -> Tensor:
    """See `tritool.ops.unproject`; the arguments are those of `Unproject.apply`."""
    options = (size, aggregation, exclude, official)
    volume = _unproject(features, projections, grid, confidences, *options).to(features.dtype)
    return volume.movedim(-2, -1).contiguous().movedim(-1, -2) if channels_last else volume


def unproject_backward(
    grad: Tensor,
    features: Tensor,
    projections: Tensor,
    grid: Tensor,
    confidences: Tensor | None,
    size: Sequence[int],
    aggregation: int,
    exclude: bool,
    official: bool,
    deterministic: bool,
    want_features: bool,
    want_projections: bool,
    want_grid: bool,
    want_confidences: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients that are wanted, and empty tensors for the others."""
    inputs = [features, projections, grid, confidences]
    want_confidences = want_confidences and confidences is not None
    wanted = [want_features, want_projections, want_grid, want_confidences]
    grads = _gradient(grad, inputs, wanted, size, aggregation, exclude, official)
    results = [grads.pop(0) if want else features.new_empty(0) for want in wanted]
    results[0] = torch.empty_like(features).copy_(results[0]) if want_features else results[0]
    return results[0], results[1], results[2], results[3]


def unproject_double_backward(
    cotangents: Sequence[Tensor],
    grad: Tensor,
    features: Tensor,
    projections: Tensor,
    grid: Tensor,
    confidences: Tensor | None,
    size: Sequence[int],
    aggregation: int,
    exclude: bool,
    official: bool,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """The gradients of <cotangents, gradients of Unproject> to grad and the op's arguments."""
    present = [grad, features, projections, grid]
    present += [confidences] if confidences is not None else []

    def gradient(*inputs: Tensor) -> tuple[Tensor, ...]:
        arguments = [*inputs[1:4], inputs[4] if confidences is not None else None]
        return tuple(_gradient(inputs[0], arguments, wanted, size, aggregation, exclude, official))

    _, pull = vjp(gradient, *present)
    results = pull(tuple(c for c, want in zip(cotangents, wanted, strict=True) if want))
    return *results, *(None,) * (5 - len(results))


def _gradient(
    grad: Tensor, inputs: Sequence[Any], wanted: Sequence[bool], *options: Any
) -> list[Tensor]:
    """The wanted gradients of <grad, volume>, as functions that autograd can differentiate."""
    chosen = [i for i, want in enumerate(wanted) if want]

    def forward(*changed: Tensor) -> Tensor:
        arguments = list(inputs)
        for i, tensor in zip(chosen, changed, strict=True):
            arguments[i] = tensor
        return _unproject(*arguments, *options)

    _, pull = vjp(forward, *(inputs[i] for i in chosen))
    return list(pull(grad.double()))


class _Taps(NamedTuple):
    """Where the views sample: cells and places within, [..., C, 1, N]."""

    pixel: list[Tensor]
    """Of the four pixels around, within H W, those outside moved to the border."""
    weight: list[Tensor]
    """Theirs in the bilinear sample, 0 outside; differentiable."""
    seen: Tensor
    unknown: Tensor


def _unproject(
    features: Tensor, projections: Tensor, grid: Tensor, confidences: Tensor | None,
    size: Sequence[int], aggregation: int, exclude: bool, official: bool,
) -> Tensor:  # fmt: skip
    """The volume [..., K, N] in float64."""
    height, width = features.shape[-2:]
    taps = _project(projections.double(), _world(grid.double(), size), height, width, official)
    flat = features.flatten(-2)
    channels = flat.shape[-2]
    shape = (*taps.seen.shape[:-2], channels, taps.seen.shape[-1])
    samples = [flat.gather(-1, index.expand(shape)).double() for index in taps.pixel]

    weights = torch.ones((), dtype=torch.float64, device=features.device)
    weights = weights if confidences is None else confidences.double()[..., None]
    takes_part = (weights != 0) & (taps.seen | taps.unknown | (not exclude))
    weights = torch.where(takes_part, weights, 0)
    weights = torch.where((weights < 0) | weights.isinf(), torch.nan, weights)

    def values(tap_weights: Sequence[Tensor]) -> Tensor:
        total = torch.zeros((), dtype=torch.float64, device=features.device)
        for sample, weight in zip(samples, tap_weights, strict=True):
            total = total + torch.where(weight != 0, sample, sample.detach()) * weight
        value = torch.where(taps.seen, total, 0)
        return torch.where(takes_part, torch.where(taps.unknown, torch.nan, value), 0)

    with torch.no_grad():
        value = values(taps.weight)
        spoilt = _aggregate(value, weights, takes_part, aggregation).isnan()[..., None, :, :]
        lost = spoilt  # no gradient at all
        if aggregation in (SUM, MEAN):
            lost = (weights + torch.where(taps.unknown & takes_part, torch.nan, 0)).isnan()
            lost = lost.any(-3, keepdim=True)
    # Once more, with what must not be differentiated at a NaN held constant: where() passes a zero,
    # a product would pass 0 * NaN.
    tap_weights = [torch.where(spoilt, w.detach(), w) for w in taps.weight]
    weights = torch.where(spoilt, weights.detach(), weights)
    value = values(tap_weights)
    volume = _aggregate(
        torch.where(lost, 0, value), torch.where(lost, 0, weights), takes_part, aggregation
    )
    if aggregation in (SUM, MEAN):
        return torch.where(lost.squeeze(-3), torch.nan, volume)
    return torch.where(spoilt.squeeze(-3), torch.nan, volume)


def _world(grid: Tensor, size: Sequence[int]) -> Tensor:
    """The voxels' centres, [..., N, 3]."""
    if not size:
        return grid
    axes = [torch.arange(n, dtype=grid.dtype, device=grid.device) for n in size]
    index = torch.stack([a.flatten() for a in torch.meshgrid(*axes, indexing="ij")], -1)
    origin, steps = grid[..., :1, :], grid[..., 1:, :]
    return origin + (index[:, :, None] * steps[..., None, :, :]).sum(-2)


def _project(projections: Tensor, world: Tensor, height: int, width: int, official: bool) -> _Taps:
    # Products of finite numbers only, so that a zero gradient stays one; the rest keeps its NaN.
    def images(matrices: Tensor, points: Tensor) -> Tensor:
        product = matrices[..., None, :, :3] * points[..., None, :, None, :]
        return product.sum(-1) + matrices[..., None, :, 3]

    scale = torch.tensor(
        [(width - 1) / height, (height - 1) / width] if official else [1.0, 1.0],
        dtype=torch.float64, device=world.device,
    )  # fmt: skip
    with torch.no_grad():
        image = images(projections, world)
        depth = image[..., 2]
        pixel = image[..., :2] / depth[..., None] * scale
        limit = torch.tensor([width, height], dtype=torch.float64, device=world.device)
        in_front = (depth > 0) & depth.isfinite()
        unknown = ~(depth <= 0) & (~depth.isfinite() | pixel.isnan().any(-1))
        seen = in_front & ((pixel > -1) & (pixel < limit)).all(-1)
    finite = torch.where(projections.isfinite(), projections, 0)
    image = images(finite, torch.where(world.isfinite(), world, 0))
    image = torch.where(seen[..., None], image, 1)
    pixel = image[..., :2] / image[..., 2:] * scale
    corner = pixel.detach().floor()
    x, y = (pixel - corner).unbind(-1)
    column, row = corner.long().unbind(-1)
    index, weight = [], []
    for j, along_y in ((0, 1 - y), (1, y)):
        for i, along_x in ((0, 1 - x), (1, x)):
            inside = seen & (column + i >= 0) & (column + i < width)
            inside = inside & (row + j >= 0) & (row + j < height)
            place = (row + j).clamp(0, height - 1) * width + (column + i).clamp(0, width - 1)
            index.append(place[..., None, :])
            weight.append(torch.where(inside, along_x * along_y, 0)[..., None, :])
    return _Taps(index, weight, seen[..., None, :], unknown[..., None, :])


def _aggregate(value: Tensor, weights: Tensor, takes_part: Tensor, aggregation: int) -> Tensor:
    """Over the views, the third dimension from the end."""
    weights = weights.expand(torch.broadcast_shapes(weights.shape, takes_part.shape))
    if aggregation == MAX:
        weight_spoils = torch.where(weights.isnan(), torch.nan, 0)
        largest = torch.where(takes_part, value + weight_spoils, -torch.inf)
        top = largest.detach().amax(-3, keepdim=True)
        first = ((largest == top) | largest.isnan()).long().argmax(-3, keepdim=True)
        largest = largest.gather(-3, first).squeeze(-3)
        return torch.where(takes_part.any(-3), largest, 0)
    if aggregation == SOFTMAX:
        level = torch.where(takes_part, value, -torch.inf).detach().amax(-3, keepdim=True)
        level = torch.where(takes_part.any(-3, keepdim=True), level, 0)
        weights = weights * torch.where(takes_part, value - level, 0).exp()
    total = (weights * value).sum(-3)
    if aggregation == SUM:
        return total
    norm = weights.sum(-3)
    return total / torch.where(norm == 0, 1, norm)
