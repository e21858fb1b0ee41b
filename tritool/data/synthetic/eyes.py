# SPDX-License-Identifier: Apache-2.0
"""The rays of all pixels of all views of a sample."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from tritool.cameras import Cameras
from tritool.data.synthetic.shapes import Array, Flags

__all__ = ["NEAR", "Eyes", "Floats", "Integers"]

Floats = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int64]

NEAR = 150.0
"""What is closer to a camera is not seen, mm."""

# Cells along the longer side in which rays of a distorted lens are interpolated: with the strongest
# lens the error is below a tenth of a pixel.
_LENS_CELLS = 64


@dataclass(frozen=True, eq=False)
class Eyes:
    """C cameras as the renderer wants them.

    Attributes:
        cameras: The cameras of the images to draw, float64.
        R: [C, 3, 3], from the world to the camera.
        centres: [C, 3], mm.
        width: Of the images, pixels.
        height: Of the images, pixels.
        x: [C H W], ideal normalised coordinate of the pixels' rays, float32; NaN where the lens
            does not reach.
        y: [C H W], the other one.
    """

    cameras: Cameras
    R: Array
    centres: Array
    width: int
    height: int
    x: Floats
    y: Floats

    @classmethod
    def of(cls, cameras: Cameras, width: int, height: int) -> Eyes:
        """Works out the rays of all pixels."""
        R = cameras.R.numpy()
        centres = -np.einsum("cij,ci->cj", R, cameras.t.numpy())
        K = cameras.K.numpy()
        if cameras.distortion is None:
            columns, rows = np.arange(width), np.arange(height)
            x = (columns - K[:, 0, 2, None]) / K[:, 0, 0, None]
            y = (rows - K[:, 1, 2, None]) / K[:, 1, 1, None]
            shape = (len(K), height, width)
            grid_x, grid_y = (
                np.broadcast_to(x[:, None], shape),
                np.broadcast_to(y[..., None], shape),
            )
        else:
            grid_x, grid_y = _lens_rays(cameras, width, height)
        flat_x, flat_y = (g.astype(np.float32).reshape(-1) for g in (grid_x, grid_y))
        return cls(cameras, R, centres, width, height, flat_x, flat_y)

    def rays(self, pixels: Array) -> Array:
        """[C, N, 2], ideal normalised coordinates of pixels [C, N, 2], float64."""
        ideal = self.cameras.undistort(torch.from_numpy(pixels).movedim(0, 1)).movedim(0, 1).numpy()
        return _normalised(self.cameras, ideal)

    def bounds(self, corners: Array) -> tuple[Integers, Flags]:
        """Pixel boxes of hulls of points.

        Args:
            corners: [C, N, P, 3], camera coordinates, mm.

        Returns:
            [C, N, 4], `x0, y0, x1, y1`, ends exclusive, within the image; and [C, N], whether any
            of it can be seen.
        """
        depth = corners[..., 2]
        ahead = (depth > NEAR).all(-1)
        at = corners[..., :2] / np.where(depth > NEAR, depth, 1.0)[..., None]
        K = self.cameras.K.numpy()
        pixels = at * K[:, None, None, [0, 1], [0, 1]] + K[:, None, None, :2, 2]
        slack = 0.6
        if self.cameras.distortion is not None:
            flat = torch.from_numpy(pixels.reshape(len(K), -1, 2)).movedim(0, 1)
            moved = self.cameras.distort(flat).movedim(0, 1).numpy().reshape(pixels.shape)
            # Straight edges bulge between the corners by a part of what the corners move.
            slack = 2 + 0.3 * np.abs(moved - pixels).max((-2, -1), initial=0)[..., None]
            pixels = moved
        low, high = pixels.min(-2) - slack, pixels.max(-2) + slack
        # Not all of it in front, or beyond the lens: anywhere in the image.
        anywhere = ~ahead | ~np.isfinite(low).all(-1) | ~np.isfinite(high).all(-1)
        low, high = (np.where(anywhere[..., None], e, b) for e, b in ((-1e6, low), (1e6, high)))
        size = np.array([self.width, self.height])
        first = np.clip(np.ceil(low), 0, size).astype(np.int64)
        last = np.clip(np.floor(high) + 1, 0, size).astype(np.int64)
        return np.concatenate([first, last], -1), (first < last).all(-1) & (depth > NEAR).any(-1)


def _normalised(cameras: Cameras, ideal: Array) -> Array:
    K = cameras.K.numpy()[:, None]
    return np.stack(
        [(ideal[..., 0] - K[..., 0, 2]) / K[..., 0, 0],
         (ideal[..., 1] - K[..., 1, 2]) / K[..., 1, 1]], -1,
    )  # fmt: skip


def _lens_rays(cameras: Cameras, width: int, height: int) -> tuple[Array, Array]:
    """[C, H, W] each: undistorted on a coarse grid, bilinear in between."""
    step = -(-max(width, height) // _LENS_CELLS)
    columns = np.arange(0, width + step, step, dtype=np.float64)
    rows = np.arange(0, height + step, step, dtype=np.float64)
    grid = np.stack(np.meshgrid(columns, rows), -1).reshape(-1, 1, 2)
    grid = np.repeat(grid, len(cameras), 1)
    ideal = cameras.undistort(torch.from_numpy(grid)).movedim(0, 1).numpy()
    coarse = _normalised(cameras, ideal).reshape(len(cameras), len(rows), len(columns), 2)
    for axis, count in ((1, height), (2, width)):
        cell, share = np.divmod(np.arange(count), step)
        share = (share / step).reshape((-1, 1, 1) if axis == 1 else (-1, 1))
        coarse = np.take(coarse, cell, axis) * (1 - share) + np.take(coarse, cell + 1, axis) * share
    return coarse[..., 0], coarse[..., 1]
