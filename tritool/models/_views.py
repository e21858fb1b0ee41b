# SPDX-License-Identifier: Apache-2.0
"""What networks of several views share: checks, absent views, image pixels and map pixels.

A heat map of h x w cells shows the whole image of H x W pixels. By the package's own convention
cell i is centred at pixel (i + 1/2) s - 1/2 with s = W / w; the official code of learnable
triangulation places it at i s.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tritool.models.pose_resnet import PoseResNet

__all__ = [
    "at_least_float32",
    "check_extra",
    "checked_views",
    "freeze",
    "heatmap_projections",
    "image_from_heatmap",
    "made_backbone",
    "one_of",
    "positive",
    "without_absent",
]


def checked_views(images: Tensor, projections: Tensor, views: Tensor | None) -> Tensor | None:
    """Checks what every network of several views takes.

    Args:
        images: `[B, C, 3, H, W]`, floating-point.
        projections: `[B, C, 3, 4]`, float32 or float64.
        views: `[B, C]`, boolean; None: all views are there.

    Returns:
        `views`.

    Raises:
        TypeError: An argument is no tensor or has another dtype.
        ValueError: Shapes or devices do not fit.
    """
    for name, value in (("images", images), ("projections", projections)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if not images.is_floating_point():
        raise TypeError(
            f"images must be floating-point, got {images.dtype}; normalize_images makes them so"
        )
    shape = tuple(images.shape)
    if images.ndim != 5 or shape[2] != 3 or shape[1] < 1:
        raise ValueError(f"images must be [B, C, 3, H, W] with at least one view, got {shape}")
    if projections.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"projections must be float32 or float64, got {projections.dtype}")
    batch, count = images.shape[:2]
    if projections.ndim != 4 or projections.shape != (batch, count, 3, 4):
        raise ValueError(
            f"projections must be [B, C, 3, 4] with B = {batch} and C = {count} as in images, "
            f"got {tuple(projections.shape)}"
        )
    _check_device("projections", projections, images)
    if views is None:
        return None
    if not isinstance(views, Tensor):
        raise TypeError(f"views must be a tensor or None, got {type(views).__name__}")
    if views.dtype != torch.bool:
        raise TypeError(f"views must be boolean, got {views.dtype}")
    if views.ndim != 2 or views.shape != (batch, count):
        raise ValueError(
            f"views must be [B, C] with B = {batch} and C = {count} as in images, "
            f"got {tuple(views.shape)}"
        )
    _check_device("views", views, images)
    return views


def made_backbone(
    backbone: PoseResNet | None, depth: int, num_joints: int, **settings: Any
) -> PoseResNet:
    """The backbone that was given, or a new one.

    Raises:
        TypeError: What was given is no `PoseResNet`.
        ValueError: It is for another number of joints.
    """
    if backbone is None:
        return PoseResNet(depth, num_joints, **settings)
    if not isinstance(backbone, PoseResNet):
        raise TypeError(f"backbone must be a PoseResNet or None, got {type(backbone).__name__}")
    if backbone.num_joints != num_joints:
        raise ValueError(f"backbone must have num_joints = {num_joints}, got {backbone.num_joints}")
    return backbone


def check_extra(name: str, value: Tensor | None, shape: tuple[int, ...], images: Tensor) -> None:
    """Raises if what is given for each scene, beside the images, does not fit; None does."""
    if value is None:
        return
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor or None, got {type(value).__name__}")
    if value.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{name} must be float32 or float64, got {value.dtype}")
    if tuple(value.shape) != shape:
        raise ValueError(
            f"{name} must be {list(shape)} with B = {shape[0]} as in images, "
            f"got {tuple(value.shape)}"
        )
    _check_device(name, value, images)


def one_of(name: str, value: str, choices: Sequence[str]) -> None:
    """Raises unless an option is one of these."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def positive(name: str, value: float) -> float:
    """A finite number above 0."""
    number = float(value)
    if not 0 < number < math.inf:
        raise ValueError(f"{name} must be a finite number above 0, got {value}")
    return number


def freeze(part: nn.Module | None) -> None:
    """No gradients for a part (or None) that no loss reaches: distributed training would wait."""
    if part is not None:
        part.requires_grad_(False)


def without_absent(images: Tensor, views: Tensor | None) -> Tensor:
    """The images, zeros where there is no view, so that nothing there reaches batch norm.

    Args:
        images: `[B, C, 3, H, W]`.
        views: `[B, C]`, boolean, or None.
    """
    return images if views is None else torch.where(views[..., None, None, None], images, 0)


def at_least_float32(x: Tensor) -> Tensor:
    """What autocast made float16 or bfloat16, as float32; float64 stays."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def image_from_heatmap(
    points: Tensor,
    heatmap_size: Sequence[int],
    image_size: Sequence[int],
    *,
    official: bool = False,
) -> Tensor:
    """Image pixels of points in a heat map.

    Args:
        points: `[..., 2]`, (x, y) in cells, the centre of the first being (0, 0).
        heatmap_size: (h, w).
        image_size: (H, W).
        official: The official code's mapping, without the shift by half a pixel.

    Returns:
        `[..., 2]`, pixels (x, y).
    """
    scale_y, scale_x = _scales(heatmap_size, image_size)
    x, y = points.unbind(-1)
    if official:
        return torch.stack([x * scale_x, y * scale_y], -1)
    return torch.stack(
        [x * scale_x + (scale_x - 1) / 2, y * scale_y + (scale_y - 1) / 2],
        -1,
    )


def heatmap_projections(
    projections: Tensor,
    heatmap_size: Sequence[int],
    image_size: Sequence[int],
    *,
    official: bool = False,
) -> Tensor:
    """World to cells of the heat map, from world to pixels of the image.

    Args:
        projections: `[..., 3, 4]`.
        heatmap_size: (h, w).
        image_size: (H, W).
        official: As for `image_from_heatmap`, which this undoes.

    Returns:
        `[..., 3, 4]`.
    """
    scale_y, scale_x = _scales(heatmap_size, image_size)
    x, y, z = projections.unbind(-2)
    x, y = x / scale_x, y / scale_y
    if not official:
        x = x + (0.5 / scale_x - 0.5) * z
        y = y + (0.5 / scale_y - 0.5) * z
    return torch.stack([x, y, z], -2)


def _scales(heatmap_size: Sequence[int], image_size: Sequence[int]) -> tuple[float, float]:
    """Image pixels a cell, down and across."""
    return image_size[0] / heatmap_size[0], image_size[1] / heatmap_size[1]


def _check_device(name: str, value: Tensor, images: Tensor) -> None:
    if value.device != images.device:
        raise ValueError(
            f"{name} must be on the device of images, {images.device}, got {value.device}"
        )
