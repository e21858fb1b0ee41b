# SPDX-License-Identifier: Apache-2.0
"""The measures of 3D pose: MPJPE and its aligned variants, PCK and AUC."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from tritool._poses import checked_pair, checked_valid, distances
from tritool.ops import rigid_align

__all__ = ["AUC_THRESHOLDS", "Reduction", "auc", "mpjpe", "n_mpjpe", "pa_mpjpe", "pck"]

Reduction = Literal["mean", "pose", "joint", "none"]

# Millimetres, both ends included: the curve of MPI-INF-3DHP.
AUC_THRESHOLDS = tuple(range(0, 151, 5))


def mpjpe(
    prediction: Tensor,
    target: Tensor,
    *,
    root: int | Sequence[int] | None = None,
    valid: Tensor | None = None,
    joints: Sequence[int] | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Mean per joint position error: the mean distance between predicted and true joints.

    Absolute, in the coordinates as they are, or with `root` relative: prediction and target are
    each moved so that their own root is at the origin. Ionescu et al., "Human3.6M" (IEEE PAMI 36,
    2014).

    Args:
        prediction: `[..., J, 3]`, millimetres.
        target: `[..., J, 3]`, millimetres. A joint that is not finite in either does not count.
        root: The joint at the origin, or several, whose mean is (the hips, say). Where one of them
            does not count, neither does the pose. The root itself counts, with an error of 0.
        valid: `[..., J]` or what broadcasts to it; False or 0: the joint does not count. No weight.
        joints: Which joints to report, in this order; None: all. Root, scale and alignment are
            those of all joints.
        reduction: "mean": the mean over the joints of each pose, then over the poses, of which
            those without a joint are left out; "pose": the former alone; "joint": the mean over the
            poses for each joint; "none": no mean.

    Returns:
        `[]`, `[...]`, `[J]` or `[..., J]` by `reduction`, millimetres, float32 or float64. NaN
        where no joint counts.

    Raises:
        TypeError: An argument is not a tensor of the right kind.
        ValueError: Shapes, devices, joints or the reduction do not fit.

    Example:
        >>> target = torch.zeros(2, 2, 3)
        >>> prediction = torch.tensor([[[3.0, 4, 0], [0, 0, 0]], [[0, 0, 1], [torch.nan, 0, 0]]])
        >>> mpjpe(prediction, target)
        tensor(1.7500)
        >>> mpjpe(prediction, target, reduction="joint")
        tensor([3., 0.])
    """
    errors = _errors(*_prepared(prediction, target, root, valid))
    return _reduced(errors, joints, reduction)


def n_mpjpe(
    prediction: Tensor,
    target: Tensor,
    *,
    root: int | Sequence[int] | None = None,
    valid: Tensor | None = None,
    joints: Sequence[int] | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""`mpjpe` after each prediction is scaled to fit its target best.

    Rhodin et al., "Unsupervised Geometry-Aware Representation for 3D Human Pose Estimation" (ECCV
    2018): with both poses relative to the root, the prediction is multiplied by
    :math:`s = \langle \hat P, P \rangle / \langle \hat P, \hat P \rangle`, which minimises the
    squared error.

    Args:
        prediction: `[..., J, 3]`, any unit.
        target: `[..., J, 3]`, millimetres.
        root: As for `mpjpe`. None: the poses are scaled about the origin, so they should be
            relative to a root already.
        valid: As for `mpjpe`.
        joints: As for `mpjpe`.
        reduction: As for `mpjpe`.

    Returns:
        As `mpjpe`. A pose whose scale is not determined, all predicted joints being at the root,
        does not count.

    Raises:
        TypeError: As for `mpjpe`.
        ValueError: As for `mpjpe`.
    """
    prediction, target, counts = _prepared(prediction, target, root, valid)
    size = prediction.square().sum((-2, -1))
    determined = size > 0
    scale = (prediction * target).sum((-2, -1)) / torch.where(determined, size, 1)
    errors = _errors(prediction * scale[..., None, None], target, counts & determined[..., None])
    return _reduced(errors, joints, reduction)


def pa_mpjpe(
    prediction: Tensor,
    target: Tensor,
    *,
    valid: Tensor | None = None,
    joints: Sequence[int] | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """`mpjpe` after a similarity motion has laid each prediction onto its target.

    Rotation, translation and scale by `tritool.ops.rigid_align` from the joints that count, never a
    reflection. Also called P-MPJPE, PMPJPE, "protocol 2" and reconstruction error.

    Args:
        prediction: `[..., J, 3]`, any unit.
        target: `[..., J, 3]`, millimetres.
        valid: As for `mpjpe`.
        joints: As for `mpjpe`.
        reduction: As for `mpjpe`.

    Returns:
        As `mpjpe`. A pose whose alignment is not determined (fewer than three joints count, or
        those of prediction or target are on one line) does not count.

    Raises:
        TypeError: As for `mpjpe`.
        ValueError: As for `mpjpe`.
    """
    prediction, target, counts = _prepared(prediction, target, None, valid)
    absent = ~counts[..., None]
    source = torch.where(absent, torch.nan, prediction)
    moved = rigid_align(source, target, with_scale=True).apply(source)
    counts = counts & moved.isfinite().all(-1)
    moved = torch.where(counts[..., None], moved, 0)
    return _reduced(_errors(moved, target, counts), joints, reduction)


def pck(
    prediction: Tensor,
    target: Tensor,
    *,
    threshold: float = 150.0,
    root: int | Sequence[int] | None = None,
    valid: Tensor | None = None,
    joints: Sequence[int] | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Fraction of correct keypoints: those with an error below a threshold.

    The 3DPCK of Mehta et al., "Monocular 3D Human Pose Estimation In The Wild Using Improved CNN
    Supervision" (3DV 2017), whose threshold is 150 mm. An error equal to the threshold is wrong.

    Args:
        prediction: `[..., J, 3]`, millimetres.
        target: `[..., J, 3]`, millimetres.
        threshold: Millimetres.
        root: As for `mpjpe`; MPI-INF-3DHP is evaluated relative to the pelvis.
        valid: As for `mpjpe`.
        joints: As for `mpjpe`.
        reduction: As for `mpjpe`.

    Returns:
        As `mpjpe`, but fractions from 0 to 1. A joint without prediction does not count, as
        everywhere; it is not wrong.

    Raises:
        TypeError: As for `mpjpe`.
        ValueError: As for `mpjpe`, or the threshold is NaN.
    """
    if math.isnan(threshold):
        raise ValueError(f"threshold must be a number, got {threshold}")
    errors = _errors(*_prepared(prediction, target, root, valid))
    return _reduced(fraction_below(errors, (threshold,)), joints, reduction)


def auc(
    prediction: Tensor,
    target: Tensor,
    *,
    thresholds: Sequence[float] = AUC_THRESHOLDS,
    root: int | Sequence[int] | None = None,
    valid: Tensor | None = None,
    joints: Sequence[int] | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Area under the curve of `pck`: its mean over thresholds.

    By default those of MPI-INF-3DHP (Mehta et al., 3DV 2017), 0, 5, ..., 150 mm. No error is below
    0, so the best that can be reached is 30/31.

    Args:
        prediction: `[..., J, 3]`, millimetres.
        target: `[..., J, 3]`, millimetres.
        thresholds: Millimetres, at least one.
        root: As for `mpjpe`.
        valid: As for `mpjpe`.
        joints: As for `mpjpe`.
        reduction: As for `mpjpe`.

    Returns:
        As `pck`.

    Raises:
        TypeError: As for `mpjpe`.
        ValueError: As for `mpjpe`, or there is no threshold.
    """
    if not thresholds:
        raise ValueError("thresholds must be one or more, got none")
    errors = _errors(*_prepared(prediction, target, root, valid))
    return _reduced(fraction_below(errors, thresholds), joints, reduction)


def fraction_below(errors: Tensor, thresholds: Sequence[float]) -> Tensor:
    """The share of the thresholds that each error is below; NaN stays."""
    below = torch.zeros_like(errors)
    for threshold in thresholds:
        below = below + (errors < threshold)
    return torch.where(errors.isnan(), errors, below / len(thresholds))


def _prepared(
    prediction: Tensor,
    target: Tensor,
    root: int | Sequence[int] | None,
    valid: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Both poses relative to their roots, 0 where a joint does not count, and which do."""
    prediction, target = checked_pair(prediction, target, 3)
    counts = (prediction.isfinite() & target.isfinite()).all(-1)
    if valid is not None:
        counts = counts & (checked_valid(valid, counts) > 0)
    prediction = torch.where(counts[..., None], prediction, 0)
    target = torch.where(counts[..., None], target, 0)
    if root is None:
        return prediction, target, counts
    roots = _checked_joints("root", (root,) if isinstance(root, int) else root, counts)
    for joint in roots:
        counts = counts & counts[..., joint, None]
    prediction = torch.where(counts[..., None], prediction - _mean_joint(prediction, roots), 0)
    target = torch.where(counts[..., None], target - _mean_joint(target, roots), 0)
    return prediction, target, counts


def _checked_joints(name: str, joints: Sequence[int], counts: Tensor) -> tuple[int, ...]:
    joints = tuple(joints)
    if not joints or any(not isinstance(j, int) or not 0 <= j < counts.shape[-1] for j in joints):
        raise ValueError(
            f"{name} must be joint indices from 0 to {counts.shape[-1] - 1}, got {joints}"
        )
    return joints


def _mean_joint(poses: Tensor, joints: tuple[int, ...]) -> Tensor:
    # One joint after the other: indexing with a list would copy it to the device, and wait.
    return torch.stack([poses[..., joint, :] for joint in joints]).mean(0)[..., None, :]


def _errors(prediction: Tensor, target: Tensor, counts: Tensor) -> Tensor:
    """The distances [..., J], NaN where a joint does not count."""
    return torch.where(counts, distances(prediction - target), torch.nan)


def _reduced(errors: Tensor, joints: Sequence[int] | None, reduction: Reduction) -> Tensor:
    if reduction not in ("mean", "pose", "joint", "none"):
        raise ValueError(f"reduction must be 'mean', 'pose', 'joint' or 'none', got {reduction!r}")
    if joints is not None:
        chosen = _checked_joints("joints", joints, errors)
        errors = torch.stack([errors[..., joint] for joint in chosen], -1)
    if reduction == "none":
        return errors
    if reduction == "joint":
        return errors.flatten(0, -2).nanmean(0) if errors.dim() > 1 else errors
    poses = errors.nanmean(-1)
    return poses if reduction == "pose" else poses.nanmean()
