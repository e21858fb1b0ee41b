# SPDX-License-Identifier: Apache-2.0
"""Small linear systems."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["solve3"]


def solve3(matrix: Tensor, right: Tensor) -> Tensor:
    """Solves 3x3 systems by Cramer's rule: differentiable to any order, no library call to fail."""
    scale = matrix.detach().abs().amax((-2, -1), keepdim=True).clamp_min(1e-300)
    matrix, right = matrix / scale, right / scale[..., 0]
    first, second, third = matrix.unbind(-1)
    cross = torch.linalg.cross(second, third)
    determinant = (first * cross).sum(-1, keepdim=True)
    numerators = [cross, torch.linalg.cross(third, first), torch.linalg.cross(first, second)]
    solution: Tensor = torch.stack([(right * n).sum(-1) for n in numerators], -1) / determinant
    return solution
