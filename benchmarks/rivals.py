# SPDX-License-Identifier: Apache-2.0
"""What one would write, or install, without tritool.

The plain PyTorch versions are the strongest we know of for each operation; nothing they need and
could keep between calls (grids, coordinates, float64 projections) is made inside the timed call.
Sources of the formulas: Iskakov et al., "Learnable Triangulation of Human Pose" (ICCV 2019), for
soft-argmax and the weighted linear triangulation (DLT); Hartley and Zisserman, "Multiple View
Geometry", 12.2, for the DLT itself. Packages are measured as installed and left out where they are
not.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

# ---- soft-argmax ----


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


# ---- triangulation ----


def dlt_rows(points: Tensor, projections: Tensor, weights: Tensor | None) -> Tensor:
    """The matrix A `[N, 2C, 4]` of equation (3), in the dtype of the arguments."""
    rows = points[..., None] * projections[..., 2:3, :] - projections[..., :2, :]
    if weights is not None:
        rows = rows * weights[..., None, None]
    return rows.flatten(-3, -2)


def dlt_svd(points: Tensor, projections: Tensor, weights: Tensor | None = None) -> Tensor:
    """The last right singular vector of A, all points in one call."""
    _, _, vectors = torch.linalg.svd(dlt_rows(points, projections, weights), full_matrices=False)
    return vectors[..., 3, :3] / vectors[..., 3, 3:]


def dlt_svd_loop(points: Tensor, projections: Tensor, weights: Tensor | None = None) -> Tensor:
    """The same, one call a point: how the operation is commonly found in research code."""
    results = []
    for rows in dlt_rows(points, projections, weights):
        vectors = torch.svd(rows).V
        results.append(vectors[:3, 3] / vectors[3, 3])
    return torch.stack(results)


def dlt_eigh(dtype: torch.dtype) -> Callable[..., Tensor]:
    """The first eigenvector of the 4x4 matrix A^T A, formed and decomposed in `dtype`."""

    def run(points: Tensor, projections: Tensor, weights: Tensor | None = None) -> Tensor:
        rows = dlt_rows(points, projections, weights).to(dtype)
        _, vectors = torch.linalg.eigh(rows.mT @ rows)
        return (vectors[..., :3, 0] / vectors[..., 3:, 0]).to(points.dtype)

    return run


def kornia_triangulate(solver: str) -> Callable[..., Tensor]:
    """The package's own: two views, no weights."""
    function = import_module("kornia.geometry.epipolar").triangulate_points

    def run(points: Tensor, projections: Tensor) -> Tensor:
        return function(  # type: ignore[no-any-return]
            projections[0], projections[1], points[:, 0], points[:, 1], solver=solver
        )

    return run


def opencv_triangulate(points: Tensor, projections: Tensor) -> Tensor:
    """`cv2.triangulatePoints`: two views, no weights, no gradient, on the CPU."""
    cv2 = import_module("cv2")
    first, second = points.numpy().transpose(1, 2, 0)
    found = cv2.triangulatePoints(projections[0].numpy(), projections[1].numpy(), first, second)
    return torch.from_numpy((found[:3] / found[3:]).T)


# ---- projection ----


def project_einsum(points: Tensor, projections: Tensor) -> Tensor:
    """Rotate and translate into every view, divide by the depth."""
    image = torch.einsum("cij,nj->nci", projections[..., :3], points) + projections[..., 3]
    return image[..., :2] / image[..., 2:]


def project_matmul(points: Tensor, projections: Tensor) -> Tensor:
    """The same as one matrix product of all points with all views."""
    matrix = projections.flatten(0, 1)
    image = torch.addmm(matrix[:, 3], points, matrix[:, :3].T).unflatten(-1, (-1, 3))
    return image[..., :2] / image[..., 2:]


# ---- what is there ----


def installed(package: str) -> ModuleType | None:
    """The package, or None if it cannot be imported here."""
    try:
        return import_module(package)
    except ImportError:
        return None


def package_versions() -> dict[str, str]:
    """The versions of the packages measured here."""
    found = {name: installed(module) for name, module in (("kornia", "kornia"), ("opencv", "cv2"))}
    return {name: module.__version__ for name, module in found.items() if module is not None}
