# SPDX-License-Identifier: Apache-2.0
"""What losses and metrics share: a prediction, the truth beside it, and which joints count."""

from __future__ import annotations

import torch
from torch import Tensor

from tritool.ops import _check

__all__ = ["checked_pair", "checked_valid", "distances"]


def checked_pair(
    prediction: Tensor, target: Tensor, coordinates: int | None = None
) -> tuple[Tensor, Tensor]:
    """Two sets of poses [..., J, D] of one shape, in one dtype, float32 at least.

    They do not broadcast: a missing dimension would be averaged over without a word.
    """
    _check.tensors({"prediction": prediction, "target": target})
    pattern = "[..., J, D]" if coordinates is None else f"[..., J, {coordinates}]"
    _check.trailing("prediction", prediction, pattern, (None, coordinates))
    if target.shape != prediction.shape:
        raise ValueError(
            f"target must have the shape of prediction, {tuple(prediction.shape)}, "
            f"got {tuple(target.shape)}"
        )
    dtype = _check.geometry_dtype((prediction, target))
    return prediction.to(dtype), target.to(dtype)


def checked_valid(valid: Tensor, like: Tensor) -> Tensor:
    """Masks or weights [..., J], in the full shape of a tensor that has the same meaning."""
    if not isinstance(valid, Tensor):
        raise TypeError(f"valid must be a tensor, got {type(valid).__name__}")
    if valid.is_complex():
        raise TypeError(f"valid must be boolean or real, got {valid.dtype}")
    if valid.device != like.device:
        raise ValueError(
            f"valid must be on the device of prediction, {like.device}, got {valid.device}"
        )
    shape, have = tuple(like.shape), tuple(valid.shape)
    fits = len(have) <= len(shape) and all(
        size in (1, want) for size, want in zip(reversed(have), reversed(shape), strict=False)
    )
    if not fits:
        raise ValueError(f"valid must be [..., J] and broadcast to {shape}, got {have}")
    return valid.expand(shape)


def distances(difference: Tensor) -> Tensor:
    """Euclidean lengths over the last dimension; the gradient at length 0 is 0, to any order."""
    square = difference.square().sum(-1)
    nonzero = square > 0
    return torch.where(nonzero, torch.where(nonzero, square, 1).sqrt(), 0)
