# SPDX-License-Identifier: Apache-2.0
"""Samples as pinhole cameras would have taken them, which is what the networks take."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch.nn.functional import grid_sample

from tritool.cameras import Cameras
from tritool.data.sample import Sample

__all__ = ["undistorted"]


def undistorted(sample: Sample) -> Sample:
    """Resamples a sample's images as pinhole cameras of the same K would see them.

    Args:
        sample: Any; one without lens distortion comes back as it is.

    Returns:
        The sample with pinhole cameras of the same K and image size. Images are interpolated
        bilinearly, black where the lens does not reach or the crop ends. `keypoints_2d` are moved;
        NaN where the lens does not reach. What is no longer in its crop is not visible. `boxes`
        still say where in the distorted full images the crops were.
    """
    cameras = sample.cameras
    if cameras.distortion is None:
        return sample
    height, width = sample.images.shape[-2:]
    exact = cameras.to(torch.float64)
    rows, columns = torch.meshgrid(
        torch.arange(height, dtype=torch.float64),
        torch.arange(width, dtype=torch.float64),
        indexing="ij",
    )
    ideal = torch.stack([columns, rows], -1)[:, :, None].expand(-1, -1, len(cameras), -1)
    measured = exact.distort(ideal).movedim(2, 0)  # [C, H, W, 2]
    # From pixels to grid_sample's span of -1 to 1, edge to edge; 2 is outside.
    place = (2 * measured + 1) / torch.tensor([width, height]) - 1
    images = grid_sample(
        sample.images.float(),
        torch.where(place.isfinite(), place, 2.0).float(),
        padding_mode="zeros",
        align_corners=False,
    )
    moved = exact.undistort(sample.keypoints_2d.double().movedim(0, 1)).movedim(1, 0)
    size = torch.tensor([width, height])
    inside = ((moved >= -0.5) & (moved < size - 0.5)).all(-1)
    return replace(
        sample,
        images=images.round().clamp(0, 255).to(torch.uint8),
        cameras=Cameras(cameras.K, cameras.R, cameras.t, None, cameras.image_size, cameras.names),
        keypoints_2d=moved.to(torch.float32),
        visibility=sample.visibility & inside,
    )
