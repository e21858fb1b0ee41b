# SPDX-License-Identifier: Apache-2.0
"""Limbs of poses, pairs of joints with a mean length each: what networks and losses share."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tritool.ops import _check

__all__ = ["checked_lengths", "checked_limbs", "take"]


def checked_limbs(
    name: str, limbs: Sequence[tuple[int, int]], joints: int
) -> tuple[list[int], list[int]]:
    """The first and the second joints of limbs, at least one."""
    if not len(limbs):
        raise ValueError(f"{name} must be one or more pairs of joints, got none")
    for limb in limbs:
        ends = tuple(limb)
        if (
            len(ends) != 2
            or ends[0] == ends[1]
            or any(not isinstance(j, int) or not 0 <= j < joints for j in ends)
        ):
            raise ValueError(
                f"{name} must be two different joint indices from 0 to {joints - 1}, got {ends}"
            )
    return [limb[0] for limb in limbs], [limb[1] for limb in limbs]


def checked_lengths(
    name: str, lengths: Sequence[float] | Tensor, count: int, like: Tensor
) -> Tensor:
    """Lengths [L] with dtype and device of a tensor.

    Numbers have to be above 0 and finite. Those in a tensor are not looked at: that would wait.
    """
    if isinstance(lengths, Tensor):
        _check.tensors({"poses": like, name: lengths})
        values = lengths
    else:
        wrong = [n for n in lengths if not (n > 0 and math.isfinite(n))]
        if wrong:
            raise ValueError(f"{name} must be finite numbers above 0, got {wrong[0]}")
        values = torch.tensor(list(lengths), dtype=like.dtype)
    if values.shape != (count,):
        raise ValueError(
            f"{name} must be [L] with L = {count} as in limbs, got {tuple(values.shape)}"
        )
    return values.to(like.device, like.dtype, non_blocking=True)


def take(values: Tensor, joints: Sequence[int], dim: int) -> Tensor:
    """Some joints along a dimension; indexing with a list would copy it to the device, and wait."""
    each = values.unbind(dim)
    return torch.stack([each[joint] for joint in joints], dim)
