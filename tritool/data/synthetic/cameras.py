# SPDX-License-Identifier: Apache-2.0
"""Rigs of calibrated cameras around a spot, and the boxes that are cut out of their images."""

from __future__ import annotations

import numpy as np
import torch

from tritool.cameras import Cameras
from tritool.data.synthetic.shapes import Array

__all__ = ["Rig", "crop_boxes", "draw_rig"]


class Rig:
    """C cameras, the same as float64 arrays and as `Cameras`.

    Attributes:
        cameras: The cameras of the full images, float64.
        centres: [C, 3], where they stand, mm.
        R: [C, 3, 3], from the world to the camera.
    """

    def __init__(self, cameras: Cameras) -> None:
        """Takes float64 cameras apart."""
        self.cameras = cameras
        self.R: Array = cameras.R.numpy()
        self.centres: Array = -np.einsum("cij,ci->cj", self.R, cameras.t.numpy())

    def project(self, points: Array) -> Array:
        """[C, N, 2], pixels of the full images of [N, 3], mm; NaN as of `Cameras.project`."""
        if self.cameras.distortion is None:  # the same, quicker for few points
            at = (points - self.centres[:, None]) @ self.R.swapaxes(-1, -2)
            at = at[..., :2] / np.where(at[..., 2:] > 0, at[..., 2:], np.nan)
            K = self.cameras.K.numpy()
            pixels: Array = at * K[:, None, [0, 1], [0, 1]] + K[:, None, :2, 2]
            return pixels
        return self.cameras.project(torch.from_numpy(points)).numpy().swapaxes(0, 1)


def draw_rig(
    rng: np.random.Generator,
    views: int,
    *,
    target: Array,
    radius: tuple[float, float],
    height: tuple[float, float],
    field_of_view: tuple[float, float],
    full_size: tuple[int, int],
    distortion: float,
) -> Rig:
    """Draws cameras on a ring that look at a target.

    Args:
        rng: Where chance comes from.
        views: How many, C.
        target: [3], what they look near, mm; the ring is around it.
        radius: Horizontal distance to the target, from and to, mm.
        height: Above the floor, from and to, mm.
        field_of_view: Horizontal, from and to, degrees.
        full_size: Width and height of the images, pixels.
        distortion: The largest absolute k1 of the Brown-Conrady lenses; 0 for pinholes.
    """
    # Jittered by less than half of the step, so that no two cameras are in the same direction.
    turn = 2 * np.pi * (np.arange(views) + rng.uniform(-0.35, 0.35, views)) / views
    turn = turn + rng.uniform(-np.pi, np.pi)
    away = rng.uniform(*radius, views)
    centre = np.stack(
        [target[0] + away * np.cos(turn), target[1] + away * np.sin(turn),
         rng.uniform(*height, views)], 1,
    )  # fmt: skip
    # An inaccurate aim, more so from afar, and a camera not quite upright.
    aim = target + rng.normal(0, 0.035, (views, 3)) * away[:, None]
    R = _looking(centre, aim, np.deg2rad(rng.normal(0, 1.5, views)))
    width, tall = full_size
    focal = width / 2 / np.tan(np.deg2rad(rng.uniform(*field_of_view, views)) / 2)
    K = np.zeros((views, 3, 3))
    K[:, 0, 0] = focal
    K[:, 1, 1] = focal * rng.uniform(0.995, 1.005, views)
    K[:, 0, 2] = (width - 1) / 2 + rng.normal(0, 0.01, views) * width
    K[:, 1, 2] = (tall - 1) / 2 + rng.normal(0, 0.01, views) * tall
    K[:, 2, 2] = 1
    coefficients = None
    if distortion:
        k1 = rng.uniform(-distortion, distortion, views)
        k2 = -0.25 * k1 * rng.uniform(0, 1, views)
        tangential = rng.uniform(-0.01, 0.01, (2, views)) * distortion
        coefficients = torch.from_numpy(np.stack([k1, k2, *tangential, 0 * k1], 1))
    return Rig(
        Cameras(
            torch.from_numpy(K),
            torch.from_numpy(R),
            torch.from_numpy(-np.einsum("cij,cj->ci", R, centre)),
            coefficients,
            full_size,
            [f"camera_{row:02d}" for row in range(views)],
        )
    )


def _looking(centre: Array, aim: Array, roll: Array) -> Array:
    """[C, 3, 3], turns of cameras at [C, 3] that look at [C, 3], rolled by [C] radians."""
    ahead = aim - centre
    ahead = ahead / np.linalg.norm(ahead, axis=-1, keepdims=True)
    right = np.cross(ahead, [0.0, 0.0, 1.0])
    right = right / np.linalg.norm(right, axis=-1, keepdims=True)
    down = np.cross(ahead, right)
    cos, sin = np.cos(roll)[:, None], np.sin(roll)[:, None]
    return np.stack([cos * right + sin * down, cos * down - sin * right, ahead], 1)


def crop_boxes(
    rng: np.random.Generator,
    pixels: Array,
    *,
    margin: tuple[float, float],
    jitter: float,
    image_size: tuple[int, int],
) -> Array:
    """Boxes around a projected body, of the crops' aspect, displaced a little.

    Args:
        rng: Where chance comes from.
        pixels: [C, N, 2], points of the body in the full images; NaN for none.
        margin: Free space on either side as a part of the body's extent, from and to.
        jitter: Standard deviation of the box's centre as a part of its side.
        image_size: Width and height of the crops.

    Returns:
        [C, 4], `x0, y0, x1, y1`.
    """
    low, high = np.nanmin(pixels, 1), np.nanmax(pixels, 1)
    views = len(pixels)
    extent = (high - low) * (1 + 2 * rng.uniform(*margin, (views, 1)))
    wide, tall = image_size
    # The least box of this aspect that holds the body; never so small that a crop is a blur.
    scale = np.maximum(extent / [wide, tall], 8 / min(image_size)).max(1)
    size = scale[:, None] * [wide, tall]
    centre = (low + high) / 2 + rng.normal(0, 1, (views, 2)) * jitter * size
    return np.concatenate([centre - size / 2, centre + size / 2], 1)
