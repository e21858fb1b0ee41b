# SPDX-License-Identifier: Apache-2.0
"""Images as the networks' weights expect them."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["normalize_images"]

# ImageNet's mean and standard deviation of red, green and blue, from 0 to 1.
_MEAN = (0.485, 0.456, 0.406)
_STD = (0.229, 0.224, 0.225)


def normalize_images(images: Tensor, *, order: str = "rgb") -> Tensor:
    """Pixel values of photographs to what the networks take: (x / 255 - mean) / std.

    Mean and standard deviation are those of ImageNet.

    Args:
        images: `[..., 3, H, W]`, uint8, channels red, green, blue, as in `tritool.data.Sample`.
        order: `"rgb"`, for weights of torchvision and the package's own; `"bgr"`, for the official
            weights of learnable triangulation: the channels are flipped to blue, green, red, and
            ImageNet's numbers applied to the first, second and third of them all the same.

    Returns:
        `[..., 3, H, W]`, float32.

    Raises:
        TypeError: `images` is not a uint8 tensor.
        ValueError: The shape does not fit, or `order` is neither.

    Example:
        >>> grey = torch.full((1, 3, 2, 4), 128, dtype=torch.uint8)
        >>> normalize_images(grey)[0, :, 0, 0]
        tensor([0.0741, 0.2052, 0.4265])
    """
    if not isinstance(images, Tensor):
        raise TypeError(f"images must be a tensor, got {type(images).__name__}")
    if images.dtype != torch.uint8:
        raise TypeError(f"images must be torch.uint8, got {images.dtype}")
    if images.ndim < 3 or images.shape[-3] != 3:
        raise ValueError(f"images must be [..., 3, H, W], got {tuple(images.shape)}")
    if order not in ("rgb", "bgr"):
        raise ValueError(f"order must be one of 'rgb', 'bgr', got {order!r}")
    channels = images.unbind(-3)
    if order == "bgr":
        channels = channels[::-1]
    # Numbers, not tensors: those would have to be copied to the device.
    return torch.stack(
        [
            (channel.float() - 255 * mean) * (1 / (255 * std))
            for channel, mean, std in zip(channels, _MEAN, _STD, strict=True)
        ],
        -3,
    )
