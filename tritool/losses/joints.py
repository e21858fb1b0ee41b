# SPDX-License-Identifier: Apache-2.0
"""Losses of joint positions: squared, absolute, Euclidean, and squared with a soft limit."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from tritool._poses import checked_pair, distances
from tritool.losses._mean import joint_weights, weighted_mean

__all__ = ["l1", "l2", "mse", "soft_mse"]

# The exponent of (15) beyond the threshold.
_EXPONENT = 0.1


def soft_mse(
    prediction: Tensor,
    target: Tensor,
    *,
    threshold: float = 400.0,
    valid: Tensor | None = None,
    per: Literal["coordinate", "joint"] = "coordinate",
) -> Tensor:
    r"""Squared error that grows only as its tenth root beyond a threshold.

    Equation (15) of Iskakov et al., "Learnable Triangulation of Human Pose" (ICCV 2019): with the
    squared error :math:`e` and the threshold :math:`\varepsilon`, :math:`e` where
    :math:`e < \varepsilon`, else :math:`e^{0.1} \varepsilon^{0.9}`. It is continuous; its slope
    falls to a tenth at the threshold. The paper's threshold is (20 cm)^2, so the default belongs
    to coordinates in **centimetres**. For millimetres, give `threshold=40000.0`, and the loss is
    100 times as large, or divide prediction and target by 10.

    Args:
        prediction: `[..., J, D]`, any unit; D is 3 in the paper.
        target: `[..., J, D]`. A joint with NaN in either does not count.
        threshold: :math:`\varepsilon`, in the squared unit of the coordinates.
        valid: `[..., J]` or what broadcasts to it; boolean, or weights of at least 0. None: every
            joint counts alike.
        per: What the threshold is compared with: the squared error of each "coordinate", as in the
            official code (mean over joints and coordinates), or the squared distance of each
            "joint", as the paper words it (mean over joints).

    Returns:
        `[]`, squared unit of the coordinates, float32 or float64: the mean over the joints that
        count, weighted by `valid`. 0, with zero gradient, if none does; NaN, with zero gradient,
        if the weight of a joint that is there is negative or not finite.

    Raises:
        TypeError: An argument is not a tensor of the right kind.
        ValueError: Shapes or devices do not fit, `threshold` is not a finite number above 0, or
            `per` is something else.

    Example:
        >>> target = torch.zeros(1, 3)
        >>> float(soft_mse(target + 10, target))
        100.0
        >>> round(float(soft_mse(target + 10_000, target)), 2)  # 1e8 as mean squared error
        1386.29
    """
    if not (threshold > 0 and math.isfinite(threshold)):
        raise ValueError(f"threshold must be a finite number above 0, got {threshold}")
    if per not in ("coordinate", "joint"):
        raise ValueError(f"per must be 'coordinate' or 'joint', got {per!r}")
    difference, weights = _difference(prediction, target, valid)
    square = difference.square()
    if per == "joint":
        square = square.sum(-1, keepdim=True)
    # The root of what is beyond the threshold only: its slope at 0 is infinite.
    beyond = square.clamp(min=threshold) ** _EXPONENT * threshold ** (1 - _EXPONENT)
    return weighted_mean(torch.where(square < threshold, square, beyond).mean(-1), weights)


def mse(prediction: Tensor, target: Tensor, *, valid: Tensor | None = None) -> Tensor:
    """Mean squared error over joints and coordinates.

    Args:
        prediction: `[..., J, D]`, any unit.
        target: `[..., J, D]`. A joint with NaN in either does not count.
        valid: `[..., J]` or what broadcasts to it; boolean, or weights of at least 0.

    Returns:
        `[]`, squared unit of the coordinates; 0 and NaN as for `soft_mse`.

    Raises:
        TypeError: An argument is not a tensor of the right kind.
        ValueError: Shapes or devices do not fit.
    """
    difference, weights = _difference(prediction, target, valid)
    return weighted_mean(difference.square().mean(-1), weights)


def l1(prediction: Tensor, target: Tensor, *, valid: Tensor | None = None) -> Tensor:
    """Mean absolute error over joints and coordinates.

    Args:
        prediction: `[..., J, D]`, any unit.
        target: `[..., J, D]`. A joint with NaN in either does not count.
        valid: `[..., J]` or what broadcasts to it; boolean, or weights of at least 0.

    Returns:
        `[]`, unit of the coordinates; 0 and NaN as for `soft_mse`.

    Raises:
        TypeError: An argument is not a tensor of the right kind.
        ValueError: Shapes or devices do not fit.
    """
    difference, weights = _difference(prediction, target, valid)
    return weighted_mean(difference.abs().mean(-1), weights)


def l2(prediction: Tensor, target: Tensor, *, valid: Tensor | None = None) -> Tensor:
    """Mean distance over joints: the mean per joint position error as a loss.

    Its gradient has length 1 over the number of joints at every joint, and is 0 where prediction
    and target are equal.

    Args:
        prediction: `[..., J, D]`, any unit.
        target: `[..., J, D]`. A joint with NaN in either does not count.
        valid: `[..., J]` or what broadcasts to it; boolean, or weights of at least 0.

    Returns:
        `[]`, unit of the coordinates; 0 and NaN as for `soft_mse`. Unlike `tritool.metrics.mpjpe`,
        the mean is over all joints that count, whichever pose they belong to.

    Raises:
        TypeError: An argument is not a tensor of the right kind.
        ValueError: Shapes or devices do not fit.
    """
    difference, weights = _difference(prediction, target, valid)
    return weighted_mean(distances(difference), weights)


def _difference(prediction: Tensor, target: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """The difference [..., J, D], 0 at joints that do not count, and the weights [..., J]."""
    prediction, target = checked_pair(prediction, target)
    present = ~(prediction.isnan() | target.isnan()).any(-1)
    weights = joint_weights(present, valid, prediction.dtype)
    # A weight that is wrong makes the loss NaN in the end, not here.
    counts = (weights != 0)[..., None]
    return torch.where(counts, prediction, 0) - torch.where(counts, target, 0), weights
