# SPDX-License-Identifier: Apache-2.0
"""The weighted linear triangulation (DLT) of Iskakov et al., equations (3) and (4).

For the DLT itself: Hartley and Zisserman, "Multiple View Geometry", 12.2.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

import torch
from torch import Tensor


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
