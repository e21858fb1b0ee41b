# SPDX-License-Identifier: Apache-2.0
"""Soft-argmax: Iskakov et al., "Learnable Triangulation of Human Pose" (ICCV 2019)."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

import torch
from torch import Tensor


def _probabilities(maps: Tensor, dims: int, alpha: float) -> Tensor:
    flat = maps.flatten(-dims)
    return (flat if alpha == 1.0 else flat * alpha).softmax(-1).unflatten(-1, maps.shape[-dims:])


def soft_argmax2d_marginals(
    height: int, width: int, alpha: float, device: str
) -> Callable[..., Tensor]:
    """Softmax, then the mean of each marginal: the matrix of pixel coordinates is never read."""
    xs = torch.arange(width, dtype=torch.float32, device=device)
    ys = torch.arange(height, dtype=torch.float32, device=device)

    def run(heatmaps: Tensor) -> Tensor:
        p = _probabilities(heatmaps, 2, alpha)
        return torch.stack([p.sum(-2) @ xs, p.sum(-1) @ ys], -1)

    return run


def soft_argmax2d_grid(height: int, width: int, alpha: float, device: str) -> Callable[..., Tensor]:
    """Softmax, then one matrix product with the coordinates of all pixels."""
    ys, xs = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    grid = torch.stack([xs.flatten(), ys.flatten()], -1).to(device, torch.float32)

    def run(heatmaps: Tensor) -> Tensor:
        return _probabilities(heatmaps, 2, alpha).flatten(-2) @ grid

    return run


def soft_argmax25d_marginals(
    height: int, width: int, alpha: float, device: str
) -> Callable[..., Tensor]:
    """Softmax, the mean of each marginal, and the sum of the weighted depths."""
    xs = torch.arange(width, dtype=torch.float32, device=device)
    ys = torch.arange(height, dtype=torch.float32, device=device)

    def run(heatmaps: Tensor, depth_maps: Tensor) -> Tensor:
        p = _probabilities(heatmaps, 2, alpha)
        depth = (p * depth_maps).sum((-2, -1))
        return torch.stack([p.sum(-2) @ xs, p.sum(-1) @ ys, depth], -1)

    return run


def soft_argmax25d_products(
    height: int, width: int, alpha: float, device: str
) -> Callable[..., Tensor]:
    """Softmax, then matrix products: with the coordinates of all pixels, and with the depths."""
    ys, xs = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    grid = torch.stack([xs.flatten(), ys.flatten()], -1).to(device, torch.float32)

    def run(heatmaps: Tensor, depth_maps: Tensor) -> Tensor:
        p = _probabilities(heatmaps, 2, alpha).flatten(-2)
        depth = (p[..., None, :] @ depth_maps.flatten(-2)[..., None]).squeeze(-1)
        return torch.cat([p @ grid, depth], -1)

    return run


def soft_argmax3d_marginals(
    size: tuple[int, int, int], origin: Tensor, axes: Tensor
) -> Callable[..., Tensor]:
    """Softmax, the mean index from the marginals, then the affine map to the world."""
    x, y, z = (torch.arange(n, dtype=torch.float32, device=origin.device) for n in size)

    def run(volumes: Tensor) -> Tensor:
        p = _probabilities(volumes, 3, 1.0)
        xy = p.sum(-1)
        index = torch.stack([xy.sum(-1) @ x, xy.sum(-2) @ y, p.sum(-3).sum(-2) @ z], -1)
        return origin[:, None] + index @ axes

    return run


def soft_argmax3d_coordinates(coordinates: Tensor) -> Callable[..., Tensor]:
    """Softmax, then a batched product with the world coordinates `[B, XYZ, 3]` of all voxels."""

    def run(volumes: Tensor) -> Tensor:
        return _probabilities(volumes, 3, 1.0).flatten(-3) @ coordinates

    return run


def kornia_soft_argmax2d(alpha: float) -> Callable[..., Tensor]:
    """The package's own, in pixels."""
    function = import_module("kornia.geometry.subpix").spatial_soft_argmax2d
    # The package multiplies by its temperature in some releases and divides in others: ask it.
    peak = torch.zeros(1, 1, 1, 9)
    peak[..., 6] = 1.0
    expected = (peak.flatten() * 4.0).softmax(0) @ torch.arange(9.0)
    multiplies = abs(float(function(peak, 4.0, False)[0, 0, 0] - expected)) < 1e-3
    temperature = alpha if multiplies else 1 / alpha

    def run(heatmaps: Tensor) -> Tensor:
        return function(heatmaps, temperature, False)  # type: ignore[no-any-return]

    return run
