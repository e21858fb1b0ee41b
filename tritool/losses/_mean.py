# SPDX-License-Identifier: Apache-2.0
"""The mean over the joints that count, of which any number may be missing."""

from __future__ import annotations

import torch
from torch import Tensor

from tritool._poses import checked_valid

__all__ = ["joint_weights", "weighted_mean"]


def joint_weights(present: Tensor, valid: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The weight [..., J] of each joint, 0 where it is not present."""
    if valid is None:
        return present.to(dtype)
    valid = checked_valid(valid, present)
    return torch.where(present & (valid != 0), valid.to(dtype), 0)


def weighted_mean(values: Tensor, weights: Tensor) -> Tensor:
    """The mean of values [..., J], finite where the weight is 0; 0 if there is no weight at all.

    NaN, with zero gradient, if a weight is negative or not finite.
    """
    wrong = ~((weights >= 0) & weights.isfinite())
    weights = torch.where(wrong, 0, weights)
    total = weights.sum()
    mean = (weights * values).sum() / torch.where(total > 0, total, 1)
    return torch.where(wrong.any(), torch.nan, mean)
