# SPDX-License-Identifier: Apache-2.0
"""A room with cameras around it, as in Human3.6M; millimetres and pixels."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def room(count: int, views: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Projections `[C, 3, 4]` of cameras 4 to 5.5 m away, points in a box of 2 x 2 x 1.9 m; mm."""
    kinds: dict[str, Any] = {"generator": generator, "dtype": torch.float64}
    angle = 2 * math.pi * (torch.arange(views) + 0.3 * torch.rand(views, **kinds)) / views
    radius = 4000 + 1500 * torch.rand(views, **kinds)
    height = 1400 + 200 * torch.rand(views, **kinds)
    centers = torch.stack([radius * angle.cos(), radius * angle.sin(), height], -1)
    forward = torch.nn.functional.normalize(torch.tensor([0.0, 0.0, 950.0]) - centers, dim=-1)
    up = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64).expand_as(forward)
    right = torch.nn.functional.normalize(torch.linalg.cross(forward, up), dim=-1)
    rotation = torch.stack([right, torch.linalg.cross(forward, right), forward], -2)
    intrinsics = torch.tensor(
        [[1145.0, 0.0, 512.0], [0.0, 1143.0, 508.0], [0.0, 0.0, 1.0]], dtype=torch.float64
    )
    extrinsics = torch.cat([rotation, -rotation @ centers[..., None]], -1)
    low, high = torch.tensor([[-1000.0, -1000.0, 0.0], [1000.0, 1000.0, 1900.0]])
    points = low + (high - low) * torch.rand((count, 3), **kinds)
    return intrinsics @ extrinsics, points
