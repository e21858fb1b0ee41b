# SPDX-License-Identifier: Apache-2.0
"""Losses without 3D labels: views of one person agree, and limbs have the length of limbs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Literal

import torch
from torch import Tensor

from tritool._poses import distances
from tritool.losses._mean import weighted_mean
from tritool.ops import _check, rigid_align
from tritool.ops._limbs import checked_lengths, checked_limbs, take
from tritool.skeletons import HUMAN36M_JOINTS

__all__ = [
    "limb_depth_bound",
    "limb_length_loss",
    "mean_limb_lengths",
    "multi_view_consistency",
    "published_limb_lengths",
]

# Mean lengths of NVIDIA's DeepStream sample for 3D body pose: where neck and pelvis are 1 apart,
# and in millimetres. Its joints are not exactly those of Human3.6M.
_PUBLISHED: Mapping[tuple[str, str], tuple[float, float]] = {
    ("pelvis", "neck"): (1.0, 492.69),
    ("pelvis", "spine"): (0.5, 246.34),
    ("spine", "neck"): (0.5, 246.34),
    ("pelvis", "r_hip"): (0.2610, 128.69),
    ("pelvis", "l_hip"): (0.2610, 128.69),
    ("r_hip", "r_knee"): (0.9889, 487.03),
    ("l_hip", "l_knee"): (0.9912, 488.18),
    ("r_knee", "r_ankle"): (0.8175, 402.44),
    ("l_knee", "l_ankle"): (0.8171, 402.26),
    ("neck", "r_shoulder"): (0.3433, 169.18),
    ("neck", "l_shoulder"): (0.3422, 168.61),
    ("r_shoulder", "r_elbow"): (0.5724, 281.99),
    ("l_shoulder", "l_elbow"): (0.5724, 281.99),
    ("r_elbow", "r_wrist"): (0.5078, 249.95),
    ("l_elbow", "l_wrist"): (0.5078, 249.95),
    ("r_hip", "r_shoulder"): (0.7942, 391.63),
    ("l_hip", "l_shoulder"): (0.8259, 407.58),
}


def multi_view_consistency(
    poses: Tensor,
    confidences: Tensor | None = None,
    *,
    valid: Tensor | None = None,
    norm: Literal["l1", "l2"] = "l1",
    through_transform: bool = False,
    min_joints: int = 4,
    floor: float = 0.01,
) -> Tensor:
    r"""How far the poses that several views give of one person are from rigid motions of another.

    Iqbal, Molchanov, Kautz, "Weakly-Supervised 3D Human Pose Learning via Multi-view Images in the
    Wild" (CVPR 2020), without extrinsics. For each ordered pair of views (v, v') the pose of v' is
    laid onto that of v by the rotation and translation with the least sum of squares
    (`tritool.ops.rigid_align`, no scale and no reflection), weighted by the products of
    confidences; the loss is the mean of what remains. 0, up to rounding, if the poses are rigid
    motions of each other.

    With "l2" a rigid motion of any view's pose changes nothing. With "l1" a rotation does, unless
    the loss is 0: the differences are measured along the axes of camera v.

    Args:
        poses: `[..., C, J, 3]`, any unit, each in the coordinates of its own camera. A joint that
            is not finite is absent.
        confidences: `[..., C, J]`, at least 0; the weight of a joint in a pair is the product of
            its two. None: 1 each. Detach them, or the network may learn to doubt where it errs.
        valid: `[..., C]`, or what broadcasts to it; boolean, or numbers of which 0 leaves a view
            out.
        norm: "l1": the sum of the absolute differences of the three coordinates, as in the paper;
            "l2": the distance.
        through_transform: Let the gradient pass through the motions too. Without, they are
            constants, as in the paper; the gradient reaches the poses of both views all the same.
        min_joints: A pair in which fewer joints count is left out; at least 3.
        floor: A joint counts in a pair if its weight is above this.

    Returns:
        `[]`, unit of `poses`, float32 or float64: the mean over the pairs and joints that count,
        weighted by the products. 0, with zero gradient, if there is no pair of views that counts;
        NaN, with zero gradient, if the confidence of a joint that is there is negative or not
        finite.

    Raises:
        TypeError: An argument is not a tensor of the right kind.
        ValueError: Shapes or devices do not fit, or a setting is not as above.

    Example:
        >>> pose = torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 2, 0], [0, 0, 3]])
        >>> turned = pose[:, [1, 2, 0]] + 5
        >>> bool(multi_view_consistency(torch.stack([pose, turned])) < 1e-5)
        True
        >>> mirrored = pose * torch.tensor([1.0, 1, -1])
        >>> bool(multi_view_consistency(torch.stack([pose, mirrored])) > 0.5)
        True
    """
    _check.one_of("norm", norm, ("l1", "l2"))
    if min_joints < 3:
        raise ValueError(f"min_joints must be at least 3, got {min_joints}")
    if not (floor >= 0 and math.isfinite(floor)):
        raise ValueError(f"floor must be a finite number of at least 0, got {floor}")
    poses, confidences, present, wrong = _checked(
        poses, confidences, "[..., C, J, 3]", (None, None, 3)
    )
    if valid is not None:
        present = present & _checked_mask(valid, "[..., C]", poses.shape[:-2], poses)[..., None]
        wrong = wrong & present
    # Absent joints are 0 from here on, and of weight 0.
    weights = torch.where(present & ~wrong, confidences, 0)
    poses = torch.where((weights != 0)[..., None], poses, 0)

    count = poses.shape[-3]
    pairs = weights[..., :, None, :] * weights[..., None, :, :]  # [..., target, source, J]
    others = ~torch.eye(count, dtype=torch.bool, device=poses.device)[..., None]
    counts = others & (pairs > floor)
    counts = counts & (counts.sum(-1, keepdim=True) >= min_joints)
    pairs = torch.where(counts, pairs, 0)
    target, source = poses[..., :, None, :, :], poses[..., None, :, :, :]
    with nullcontext() if through_transform else torch.no_grad():
        motion = rigid_align(source, target, pairs)
    moved = motion.apply(source)
    # Joints on a line, say, determine no motion.
    counts = counts & ~moved.detach().isnan().any(-1)
    difference = torch.where(
        counts[..., None], target - torch.where(counts[..., None], moved, 0), 0
    )
    each = difference.abs().sum(-1) if norm == "l1" else distances(difference)
    mean = weighted_mean(each, torch.where(counts, pairs, 0))
    return torch.where(wrong.any(), torch.nan, mean)


def limb_length_loss(
    poses: Tensor,
    mean_lengths: Sequence[float] | Tensor,
    limbs: Sequence[tuple[int, int]],
    confidences: Tensor | None = None,
    *,
    valid: Tensor | None = None,
) -> Tensor:
    """Mean squared difference of limbs' lengths to mean lengths.

    Keeps poses plausible that are known up to depth only. Iqbal, Molchanov, Kautz (CVPR 2020): of
    3D, nothing but these averages is used.

    Args:
        poses: `[..., J, 3]`, any unit; that of a `Reconstruction` has people of about equal size. A
            limb with a joint that is not finite does not count.
        mean_lengths: L finite numbers above 0, or `[L]`: the mean length of each limb in the unit
            of `poses`. See `mean_limb_lengths` and `published_limb_lengths`.
        limbs: L pairs of joints, at least one.
        confidences: `[..., J]`, at least 0; the weight of a limb is the product of those of its
            ends. None: 1 each.
        valid: `[...]`, or what broadcasts to it; boolean, or numbers of which 0 leaves a pose out.

    Returns:
        `[]`, squared unit of `poses`, float32 or float64: the mean over the limbs that count,
        weighted by the products. 0, with zero gradient, if none does; NaN, with zero gradient, if
        the confidence of a joint that is there is negative or not finite.

    Raises:
        TypeError: An argument is not a tensor of the right kind.
        ValueError: Shapes or devices do not fit, or a length is not above 0.

    Example:
        >>> pose = torch.tensor([[0.0, 0, 0], [0, 3, 4], [0, 3, 5]])
        >>> limb_length_loss(pose, (4.0, 1.0), ((0, 1), (1, 2)))
        tensor(0.5000)
    """
    poses, confidences, present, wrong = _checked(poses, confidences, "[..., J, 3]", (None, 3))
    ends = checked_limbs("limbs", limbs, poses.shape[-2])
    mean = checked_lengths("mean_lengths", mean_lengths, len(limbs), poses)
    if valid is not None:
        present = present & _checked_mask(valid, "[...]", poses.shape[:-2], poses)[..., None]
        wrong = wrong & present
    weights = torch.where(present & ~wrong, confidences, 0)
    poses = torch.where((weights != 0)[..., None], poses, 0)
    lengths, weight = _lengths(poses, ends), _product(weights, ends)
    square = torch.where(weight != 0, (lengths - mean).square(), 0)
    return torch.where(wrong.any(), torch.nan, weighted_mean(square, weight))


def limb_depth_bound(
    relative_depth: Tensor,
    mean_lengths: Sequence[float] | Tensor,
    limbs: Sequence[tuple[int, int]],
    confidences: Tensor | None = None,
    *,
    valid: Tensor | None = None,
    slack: float = 1.1,
) -> Tensor:
    """How far depths differ along limbs by more than the limbs are long.

    The depth of a pose whose torso is deeper than long cannot be reconstructed, so that losses of
    poses leave it out: a network can rid itself of them by making depths impossible, and nothing
    would lead back. This does. It is no part of the paper.

    Args:
        relative_depth: `[..., J]`, any unit. A limb with a joint that is not finite does not count.
        mean_lengths: As for `limb_length_loss`, in the unit of `relative_depth`.
        limbs: L pairs of joints, at least one.
        confidences: As for `limb_length_loss`.
        valid: `[...]`, or what broadcasts to it; 0 or False leaves a pose out.
        slack: What the mean lengths are multiplied by, for long limbs; at least 1.

    Returns:
        `[]`, squared unit of `relative_depth`: the mean of `max(|z_a - z_b| - slack length, 0)^2`
        over the limbs that count, weighted by the products of confidences. 0, with zero gradient,
        if none does; NaN, with zero gradient, if the confidence of a joint that is there is
        negative or not finite.

    Raises:
        TypeError: An argument is not a tensor of the right kind.
        ValueError: Shapes or devices do not fit, a length is not above 0, or `slack` is below 1.

    Example:
        >>> limb_depth_bound(torch.tensor([0.0, 0.5, 2.1]), (1.0, 1.0), ((0, 1), (0, 2)))
        tensor(0.5000)
    """
    if not (slack >= 1 and math.isfinite(slack)):
        raise ValueError(f"slack must be a finite number of at least 1, got {slack}")
    _check.tensors({"relative_depth": relative_depth})
    _check.trailing("relative_depth", relative_depth, "[..., J]", (None,))
    # Along one axis a depth is a pose.
    poses = torch.nn.functional.pad(relative_depth[..., None], (0, 2))
    poses, confidences, present, wrong = _checked(poses, confidences, "[..., J, 3]", (None, 3))
    first, second = checked_limbs("limbs", limbs, poses.shape[-2])
    mean = checked_lengths("mean_lengths", mean_lengths, len(limbs), poses)
    if valid is not None:
        present = present & _checked_mask(valid, "[...]", poses.shape[:-2], poses)[..., None]
        wrong = wrong & present
    weights = torch.where(present & ~wrong, confidences, 0)
    depths = torch.where(weights != 0, poses[..., 0], 0)
    difference = (take(depths, first, -1) - take(depths, second, -1)).abs()
    weight = _product(weights, (first, second))
    excess = torch.where(weight != 0, (difference - slack * mean).clamp(min=0), 0)
    return torch.where(wrong.any(), torch.nan, weighted_mean(excess.square(), weight))


def mean_limb_lengths(
    poses: Tensor,
    limbs: Sequence[tuple[int, int]],
    *,
    pair: tuple[int, int] | None = None,
    valid: Tensor | None = None,
) -> Tensor:
    """The mean lengths of limbs over poses, as `limb_length_loss` asks for.

    Args:
        poses: `[..., J, 3]`, any unit: of people other than those of the test, or of a mean
            skeleton. A joint that is not finite is left out with its limbs.
        limbs: L pairs of joints, at least one.
        pair: Divide each pose by the distance of these two joints first; a pose in which that is
            missing or 0 does not count. None: lengths in the unit of `poses`.
        valid: `[...]`, or what broadcasts to it; 0 or False leaves a pose out.

    Returns:
        `[L]`, float32 or float64. NaN for a limb that no pose has.

    Raises:
        TypeError: An argument is not a tensor of the right kind.
        ValueError: Shapes or devices do not fit.

    Example:
        >>> pose = torch.tensor([[0.0, 0, 0], [0, 500, 0], [0, 500, 250]])
        >>> mean_limb_lengths(pose, ((1, 2),), pair=(0, 1))
        tensor([0.5000])
    """
    poses, confidences, present, _ = _checked(poses, None, "[..., J, 3]", (None, 3))
    ends = checked_limbs("limbs", limbs, poses.shape[-2])
    if valid is not None:
        present = present & _checked_mask(valid, "[...]", poses.shape[:-2], poses)[..., None]
    poses = torch.where(present[..., None], poses, 0)
    weights = torch.where(present, confidences, 0)
    lengths, weight = _lengths(poses, ends), _product(weights, ends)
    if pair is not None:
        unit_ends = checked_limbs("pair", (pair,), poses.shape[-2])
        unit = _lengths(poses, unit_ends)
        known = (_product(weights, unit_ends) != 0) & (unit > 0)
        lengths = lengths / torch.where(known, unit, 1)
        weight = torch.where(known, weight, 0)
    dims = tuple(range(lengths.dim() - 1))
    total = weight.sum(dims) if dims else weight
    summed = (weight * lengths).sum(dims) if dims else weight * lengths
    return torch.where(total > 0, summed / torch.where(total > 0, total, 1), torch.nan)


def published_limb_lengths(
    joint_names: Sequence[str] = HUMAN36M_JOINTS, *, millimetres: bool = False
) -> tuple[tuple[tuple[int, int], ...], tuple[float, ...]]:
    """Mean lengths of limbs from NVIDIA's DeepStream sample for 3D body pose.

    That sample's network is a descendant of the weakly supervised one; its joints differ a little
    from those of Human3.6M, so lengths of a mean skeleton of your own joints (`mean_limb_lengths`)
    are better where one is allowed. The head's limbs are not among them.

    Args:
        joint_names: J names, spelled as in `tritool.skeletons.HUMAN36M_JOINTS`.
        millimetres: In millimetres, for `tritool.models.absolute_scale`. Default: in units of the
            distance from neck to pelvis, for `limb_length_loss`; that bone, whose length is 1
            whatever the pose, is left out then.

    Returns:
        The limbs, pairs of joints, and the length of each.

    Raises:
        ValueError: No two of the joints are in the table.
    """
    index = {name: at for at, name in enumerate(joint_names)}
    found = [
        ((index[a], index[b]), lengths[int(millimetres)])
        for (a, b), lengths in _PUBLISHED.items()
        if a in index and b in index and (millimetres or (a, b) != ("pelvis", "neck"))
    ]
    if not found:
        raise ValueError(
            f"joint_names must have limbs of {', '.join(HUMAN36M_JOINTS)}, "
            f"got {', '.join(joint_names) or 'none'}"
        )
    limbs, lengths = zip(*found, strict=True)
    return limbs, lengths


def _checked(
    poses: Tensor, confidences: Tensor | None, pattern: str, sizes: tuple[int | None, ...]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Poses and confidences of one dtype; which joints are there; which of them are weighed wrong.

    Confidences are 0 where they are wrong.
    """
    tensors = {"poses": poses} | ({} if confidences is None else {"confidences": confidences})
    _check.tensors(tensors)
    _check.trailing("poses", poses, pattern, sizes)
    if confidences is not None and confidences.shape != poses.shape[:-1]:
        raise ValueError(
            f"confidences must be {pattern.removesuffix(', 3]')}] to fit poses, "
            f"{tuple(poses.shape[:-1])}, got {tuple(confidences.shape)}"
        )
    dtype = _check.geometry_dtype(tensors.values())
    poses = poses.to(dtype)
    present = poses.isfinite().all(-1)
    if confidences is None:
        return poses, present.to(dtype), present, torch.zeros_like(present)
    confidences = confidences.to(dtype)
    wrong = ~((confidences >= 0) & confidences.isfinite())
    return poses, torch.where(wrong, 0, confidences), present, wrong & present


def _checked_mask(valid: Tensor, pattern: str, shape: torch.Size, like: Tensor) -> Tensor:
    """Which views or poses take part, in the full shape."""
    if not isinstance(valid, Tensor):
        raise TypeError(f"valid must be a tensor, got {type(valid).__name__}")
    if valid.device != like.device:
        raise ValueError(f"valid must be on the device of poses, {like.device}, got {valid.device}")
    have = tuple(valid.shape)
    fits = len(have) <= len(shape) and all(
        size in (1, want) for size, want in zip(reversed(have), reversed(shape), strict=False)
    )
    if not fits:
        raise ValueError(f"valid must be {pattern} and broadcast to {tuple(shape)}, got {have}")
    return (valid != 0).expand(shape)


def _lengths(poses: Tensor, ends: tuple[list[int], list[int]]) -> Tensor:
    first, second = (take(poses, joints, -2) for joints in ends)
    return distances(first - second)


def _product(weights: Tensor, ends: tuple[list[int], list[int]]) -> Tensor:
    first, second = (take(weights, joints, -1) for joints in ends)
    return first * second
