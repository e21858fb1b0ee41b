# SPDX-License-Identifier: Apache-2.0
"""Unprojection of features into a volume: Iskakov et al. (ICCV 2019), equations (8) to (11).

The voxels' world coordinates are kept between calls; their pixels are not, because the cameras and
the cube's centre change with every sample.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

Aggregation = Literal["sum", "mean", "softmax", "max"]
UNSEEN = -3.0
"""Off every image, as a pixel and as a coordinate of `grid_sample`: nothing is found there."""


def homogeneous(points: Tensor) -> Tensor:
    """World points [B, X, Y, Z, 3] as [B, 4, XYZ]: what a projection matrix multiplies."""
    flat = points.flatten(1, -2).mT
    return torch.cat([flat, torch.ones_like(flat[:, :1])], 1)


def pixels(projections: Tensor, world: Tensor) -> Tensor:
    """Where voxels [B, 4, N] are seen by cameras [B, C, 3, 4]: x and y, [B, C, N, 2].

    One matrix product for all views of an item; x and y stay apart in memory, which is the fastest
    of the ways tried, `grid_sample` included.
    """
    image = (projections.flatten(1, 2) @ world).unflatten(1, (-1, 3))
    depth = image[:, :, 2:]
    return torch.where(depth > 0, image[:, :, :2] / depth, UNSEEN).mT


def sampling_grid(projections: Tensor, world: Tensor, height: int, width: int) -> Tensor:
    """The same in the coordinates of `grid_sample`: the image's edges are -1 and 1."""
    to_grid = [[2 / width, 0, 1 / width - 1], [0, 2 / height, 1 / height - 1], [0, 0, 1]]
    return pixels(torch.tensor(to_grid, device=projections.device) @ projections, world)


def sample(features: Tensor, grid: Tensor) -> Tensor:
    """Bilinear values [M, K, N] of maps [M, K, H, W] at [M, N, 2], zero beyond the border."""
    sampled = torch.nn.functional.grid_sample(
        features, grid[:, None], mode="bilinear", padding_mode="zeros", align_corners=False
    )
    return sampled.flatten(2)


def aggregate(values: Tensor, aggregation: Aggregation, confidences: Tensor | None) -> Tensor:
    """All views' values [B, C, K, N] to one, [B, K, N]; confidences are [B, C]."""
    if aggregation == "sum":
        return values.sum(1)
    if aggregation == "mean":
        assert confidences is not None
        weights = confidences / confidences.sum(1, keepdim=True)
        return torch.einsum("bckn,bc->bkn", values, weights)
    if aggregation == "softmax":
        return (values.softmax(1) * values).sum(1)
    return values.amax(1)  # much faster than max(1), whose indices nobody needs here


def all_views(
    world: Tensor, size: tuple[int, int, int], aggregation: Aggregation
) -> Callable[..., Tensor]:
    """One `grid_sample` over all views of all items, then the aggregation over the views."""

    def run(features: Tensor, projections: Tensor, confidences: Tensor | None = None) -> Tensor:
        grid = sampling_grid(projections, world, *features.shape[-2:])
        values = sample(features.flatten(0, 1), grid.flatten(0, 1))
        values = values.unflatten(0, features.shape[:2])
        return aggregate(values, aggregation, confidences).unflatten(-1, size)

    return run


def view_by_view(
    world: Tensor, size: tuple[int, int, int], aggregation: Aggregation
) -> Callable[..., Tensor]:
    """A running aggregate, so that one view's values exist at a time (in the forward pass)."""
    accumulate = {
        "sum": _running_sum,
        "mean": _running_sum,
        "softmax": _running_softmax,
        "max": _running_max,
    }[aggregation]

    def run(features: Tensor, projections: Tensor, confidences: Tensor | None = None) -> Tensor:
        if aggregation == "mean":
            assert confidences is not None
            confidences = confidences / confidences.sum(1, keepdim=True)

        def view(c: int) -> Tensor:
            grid = sampling_grid(projections[:, c : c + 1], world, *features.shape[-2:])
            values = sample(features[:, c], grid[:, 0])
            return values if confidences is None else values * confidences[:, c, None, None]

        return accumulate(view, features.shape[1]).unflatten(-1, size)

    return run


def _running_sum(view: Callable[[int], Tensor], views: int) -> Tensor:
    total = view(0)
    for c in range(1, views):
        total = total + view(c)
    return total


def _running_max(view: Callable[[int], Tensor], views: int) -> Tensor:
    largest = view(0)
    for c in range(1, views):
        largest = torch.maximum(largest, view(c))
    return largest


def _running_softmax(view: Callable[[int], Tensor], views: int) -> Tensor:
    """Numerator and denominator relative to the largest value so far."""
    largest = view(0)
    numerator, denominator = largest, torch.ones_like(largest)
    for c in range(1, views):
        value = view(c)
        larger = torch.maximum(largest, value)
        shrink, weight = torch.exp(largest - larger), torch.exp(value - larger)
        numerator = numerator * shrink + value * weight
        denominator = denominator * shrink + weight
        largest = larger
    return numerator / denominator


def bags(
    world: Tensor, size: tuple[int, int, int], aggregation: Literal["sum", "mean"]
) -> Callable[..., Tensor]:
    """A sum over views is a sparse matrix product: a bag of 4 C channel rows for every voxel."""

    def run(features: Tensor, projections: Tensor, confidences: Tensor | None = None) -> Tensor:
        batch, views, channels, height, width = features.shape
        rows = features.movedim(2, -1).reshape(-1, channels)
        indices, weights = _corners(pixels(projections, world), height, width)
        if aggregation == "mean":
            assert confidences is not None
            confidences = confidences / confidences.sum(1, keepdim=True)
            weights = weights * confidences[:, :, None, None]
        summed = torch.nn.functional.embedding_bag(
            indices.transpose(1, 2).reshape(-1, 4 * views),
            rows,
            mode="sum",
            per_sample_weights=weights.transpose(1, 2).reshape(-1, 4 * views),
        )
        return summed.view(batch, -1, channels).mT.unflatten(-1, size)

    return run


def _corners(places: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """The four pixels around [B, C, N, 2]: rows of the flattened features and weights, [.., 4]."""
    x, y = places.unbind(-1)
    x0, y0 = x.floor(), y.floor()
    fx, fy = x - x0, y - y0
    first = torch.arange(x.shape[0] * x.shape[1], device=x.device) * (height * width)
    first = first.view(*x.shape[:2], 1)
    indices, weights = [], []
    for row, in_row in ((y0, 1 - fy), (y0 + 1, fy)):
        for column, in_column in ((x0, 1 - fx), (x0 + 1, fx)):
            inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
            index = first + (row * width + column).long()
            indices.append(torch.where(inside, index, first))
            weights.append(torch.where(inside, in_row * in_column, 0.0))
    return torch.stack(indices, -1), torch.stack(weights, -1)
