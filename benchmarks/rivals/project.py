# SPDX-License-Identifier: Apache-2.0
"""Projection of points into all views."""

from __future__ import annotations

import torch
from torch import Tensor


def project_einsum(points: Tensor, projections: Tensor) -> Tensor:
    """Rotate and translate into every view, divide by the depth."""
    image = torch.einsum("cij,nj->nci", projections[..., :3], points) + projections[..., 3]
    return image[..., :2] / image[..., 2:]


def project_matmul(points: Tensor, projections: Tensor) -> Tensor:
    """The same as one matrix product of all points with all views."""
    matrix = projections.flatten(0, 1)
    image = torch.addmm(matrix[:, 3], points, matrix[:, :3].T).unflatten(-1, (-1, 3))
    return image[..., :2] / image[..., 2:]
