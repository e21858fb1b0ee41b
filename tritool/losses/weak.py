# SPDX-License-Identifier: Apache-2.0
"""The weakly supervised loss as a whole, and which of two mirrored depths it has found."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from tritool._poses import checked_pair, checked_valid, distances
from tritool.losses._mean import weighted_mean
from tritool.losses.heatmaps import heatmap_cross_entropy, heatmap_mse
from tritool.losses.multi_view import limb_length_loss, multi_view_consistency
from tritool.ops import _check
from tritool.skeletons import HUMAN36M_JOINTS

__all__ = [
    "DepthSign",
    "WeakLoss",
    "WeakLossSettings",
    "bending",
    "bending_prior",
    "depth_sign_check",
    "weak_total",
]

# What bends, between what, and where to with respect to the front of hips or shoulders.
_HINGES = {
    "l_knee": ("l_hip", "l_ankle", "hip", 1.0),
    "r_knee": ("r_hip", "r_ankle", "hip", 1.0),
    "l_elbow": ("l_shoulder", "l_wrist", "shoulder", -1.0),
    "r_elbow": ("r_shoulder", "r_wrist", "shoulder", -1.0),
}


@dataclass(frozen=True)
class WeakLossSettings:
    """What `weak_total` adds up, and how.

    The factors are those of the paper as far as they are known: docs/weak_supervision.md.

    Attributes:
        heatmap: Factor of the heat maps; 0: not computed. Their loss is a mean over the cells, most
            of which are far from any joint: to give a moved joint the same weight on maps of
            another size, scale the factor with the number of cells.
        alpha: Factor of the consistency of views; 0: not computed.
        psi: Factor of the limb lengths; 0: not computed.
        bending: Factor of `bending_prior`, which is no part of the paper; 0: not computed.
        heatmap_loss: "mse": `heatmap_mse`, as in the paper; "cross_entropy":
            `heatmap_cross_entropy`, with which small networks learn sooner. Heat maps have no peaks
            of height 1 then: see the `confidence` of `tritool.models.WeaklySupervisedPose`.
        sigma: Of the Gaussians of either, cells.
        inverse_temperature: Of the cross entropy: the network's.
        norm: As for `multi_view_consistency`.
        through_transform: As for `multi_view_consistency`.
        min_joints: As for `multi_view_consistency`.
        floor: As for `multi_view_consistency`.
        bending_margin: As for `bending_prior`.

    Raises:
        ValueError: A factor is negative or not finite, or `heatmap_loss` is not known.
    """

    heatmap: float = 1.0
    alpha: float = 10.0
    psi: float = 5.0
    bending: float = 0.0
    heatmap_loss: Literal["mse", "cross_entropy"] = "mse"
    sigma: float = 2.0
    inverse_temperature: float = 20.0
    norm: Literal["l1", "l2"] = "l1"
    through_transform: bool = False
    min_joints: int = 4
    floor: float = 0.01
    bending_margin: float = 0.0

    def __post_init__(self) -> None:
        """Checks the factors; the rest is checked where it is used."""
        for name in ("heatmap", "alpha", "psi", "bending"):
            value = getattr(self, name)
            if not (value >= 0 and math.isfinite(value)):
                raise ValueError(f"{name} must be a finite number of at least 0, got {value}")
        _check.one_of("heatmap_loss", self.heatmap_loss, ("mse", "cross_entropy"))


class WeakLoss(NamedTuple):
    """The loss of `weak_total` and its terms, each a scalar and without its factor.

    Attributes:
        total: The sum, each term times its factor in the settings.
        heatmaps: The loss of the heat maps; 0 without labels.
        consistency: `multi_view_consistency`; 0 without poses.
        limb_lengths: `limb_length_loss`; 0 without poses.
        bending: `bending_prior`; 0 unless it is switched on.
    """

    total: Tensor
    heatmaps: Tensor
    consistency: Tensor
    limb_lengths: Tensor
    bending: Tensor


def weak_total(
    settings: WeakLossSettings,
    *,
    heatmaps: Tensor | None = None,
    target: Tensor | None = None,
    target_valid: Tensor | None = None,
    poses: Tensor | None = None,
    confidences: Tensor | None = None,
    valid: Tensor | None = None,
    mean_lengths: Sequence[float] | Tensor | None = None,
    limbs: Sequence[tuple[int, int]] | None = None,
    joint_names: Sequence[str] = HUMAN36M_JOINTS,
) -> WeakLoss:
    r"""Heat maps where there are 2D labels, consistency and limb lengths where there are views.

    :math:`L = L_H + \alpha L_{MC} + \psi L_B` of Iqbal, Molchanov, Kautz (CVPR 2020). The two
    kinds of data are independent: labelled images give `heatmaps` and `target`, multi-view samples
    `poses` and what belongs to them, and pseudo-labels of the latter may be among the former. Each
    term is a mean over what counts, so the sizes of the two do not matter.

    Args:
        settings: Factors and options.
        heatmaps: `[..., J, H, W]`, as for `heatmap_mse`. None: no labelled images.
        target: `[..., J, 2]`, cells; needed with `heatmaps`.
        target_valid: `[..., J]`, the `valid` of `heatmap_mse`.
        poses: `[..., C, J, 3]`, of a unit in which people are of about equal size. None: no views.
        confidences: `[..., C, J]`, at least 0; best detached.
        valid: `[..., C]`: which views take part.
        mean_lengths: `[L]`; needed with `poses` unless `psi` is 0.
        limbs: L pairs of joints; needed with `poses` unless `psi` is 0.
        joint_names: J names, for the bending of knees.

    Returns:
        `WeakLoss(total, heatmaps, consistency, limb_lengths, bending)`, `[]` each.

    Raises:
        TypeError: As the losses of the terms.
        ValueError: As the losses of the terms; or an argument that is needed is missing.

    Example:
        >>> pose = torch.tensor([[0.0, 0, 0], [0, 1, 0], [1, 0, 0], [0, 0, 2]])
        >>> loss = weak_total(
        ...     WeakLossSettings(), poses=pose.expand(2, 4, 3), mean_lengths=[3.0], limbs=[(0, 3)]
        ... )
        >>> loss.limb_lengths, loss.total
        (tensor(1.), tensor(5.))
    """
    if heatmaps is None and poses is None:
        raise ValueError("heatmaps or poses must be given, got neither")
    if (heatmaps is None) != (target is None):
        raise ValueError("heatmaps and target must be given together, got one of them")
    if target is None and target_valid is not None:
        raise ValueError("target_valid must come with target, got it alone")
    if poses is None and not (confidences is None and valid is None):
        raise ValueError("confidences and valid must come with poses, got them alone")
    first = heatmaps if heatmaps is not None else poses
    assert first is not None
    zero = torch.zeros((), dtype=_check.geometry_dtype((first,)), device=first.device)
    terms = {"heatmaps": zero, "consistency": zero, "limb_lengths": zero, "bending": zero}
    if heatmaps is not None and target is not None and settings.heatmap:
        sigma = settings.sigma
        if settings.heatmap_loss == "mse":
            terms["heatmaps"] = heatmap_mse(heatmaps, target, sigma=sigma, valid=target_valid)
        else:
            terms["heatmaps"] = heatmap_cross_entropy(
                heatmaps,
                target,
                sigma=sigma,
                inverse_temperature=settings.inverse_temperature,
                valid=target_valid,
            )
    if poses is not None and settings.alpha:
        terms["consistency"] = multi_view_consistency(
            poses,
            confidences,
            valid=valid,
            norm=settings.norm,
            through_transform=settings.through_transform,
            min_joints=settings.min_joints,
            floor=settings.floor,
        )
    if poses is not None and settings.psi:
        if mean_lengths is None or limbs is None:
            raise ValueError("mean_lengths and limbs must be given with poses unless psi is 0")
        terms["limb_lengths"] = limb_length_loss(
            poses, mean_lengths, limbs, confidences, valid=valid
        )
    if poses is not None and settings.bending:
        terms["bending"] = bending_prior(
            poses, confidences, valid=valid, margin=settings.bending_margin, joint_names=joint_names
        )
    total = (
        settings.heatmap * terms["heatmaps"]
        + settings.alpha * terms["consistency"]
        + settings.psi * terms["limb_lengths"]
        + settings.bending * terms["bending"]
    )
    return WeakLoss(total, **terms)


def bending(
    poses: Tensor,
    *,
    joints: Sequence[str] = ("l_knee", "r_knee", "l_elbow", "r_elbow"),
    joint_names: Sequence[str] = HUMAN36M_JOINTS,
) -> Tensor:
    """How far knees bend forwards and elbows backwards, as bodies do.

    The offset of the joint from the straight line through its two neighbours, along the body's
    front, over the mean length of its two limbs. The front is the direction of the cross product
    of the vector from right to left hip (shoulder for elbows) with that from pelvis to neck.
    Reversing all depths, a reflection, turns every sign.

    Args:
        poses: `[..., J, 3]`, any unit and any right-handed axes, camera coordinates among them.
        joints: Which knees and elbows.
        joint_names: J names, spelled as in `tritool.skeletons.HUMAN36M_JOINTS`.

    Returns:
        `[..., len(joints)]`: 0 for a straight limb, above 0 for one bent as it should be, below
        for one that bends the wrong way: not impossible for elbows, which also point forwards when
        the hands are behind the head, but rare for knees. NaN, with zero gradient, where a joint
        that is needed is not finite or the front is not determined.

    Raises:
        TypeError: `poses` is not a floating-point tensor.
        ValueError: The shape does not fit, or a joint is not known.
    """
    value, known = _bending(poses, joints, joint_names)
    return torch.where(known, value, torch.nan)


def bending_prior(
    poses: Tensor,
    confidences: Tensor | None = None,
    *,
    valid: Tensor | None = None,
    margin: float = 0.0,
    joints: Sequence[str] = ("l_knee", "r_knee"),
    joint_names: Sequence[str] = HUMAN36M_JOINTS,
) -> Tensor:
    """How far knees bend the wrong way: a weak prior against reversed depths.

    The consistency of views hardly tells a pose from the one with all relative depths reversed when
    the cameras are far away: docs/weak_supervision.md, section 5. This does, with knowledge that is
    no part of the paper; so it is off by default in `weak_total`.

    Args:
        poses: `[..., J, 3]`, as for `bending`.
        confidences: `[..., J]`, at least 0; the weight is the product of those of the three joints.
        valid: `[...]`, or what broadcasts to it; 0 or False leaves a pose out.
        margin: What `bending` should at least be; finite.
        joints: As for `bending`.
        joint_names: As for `bending`.

    Returns:
        `[]`: the mean of `max(margin - bending, 0)` over the joints that count. 0, with zero
        gradient, if none does; NaN, with zero gradient, if the confidence of a joint that counts is
        negative or not finite.

    Raises:
        TypeError: An argument is not a tensor of the right kind.
        ValueError: Shapes or devices do not fit, or a joint is not known.
    """
    if not math.isfinite(margin):
        raise ValueError(f"margin must be a finite number, got {margin}")
    value, known = _bending(poses, joints, joint_names)
    if valid is not None:
        known = known & (checked_valid(valid, poses[..., 0, 0]) != 0)[..., None]
    weights = known.to(value.dtype)
    if confidences is not None:
        _check.tensors({"poses": poses, "confidences": confidences})
        if confidences.shape != poses.shape[:-1]:
            raise ValueError(
                f"confidences must be [..., J] to fit poses, {tuple(poses.shape[:-1])}, "
                f"got {tuple(confidences.shape)}"
            )
        each = [[confidences[..., j] for j in _hinge(name, joint_names)[:3]] for name in joints]
        product = torch.stack([a * b * c for a, b, c in each], -1).to(value.dtype)
        # Two negative ones would multiply to a weight that looks right.
        negative = torch.stack([(a < 0) | (b < 0) | (c < 0) for a, b, c in each], -1)
        weights = torch.where(known, torch.where(negative, torch.nan, product), 0)
    return weighted_mean((margin - torch.where(known, value, margin)).clamp(min=0), weights)


class DepthSign(NamedTuple):
    """Whether a network has learned depths or reversed depths; scalars, NaN where not known.

    Attributes:
        error: Mean distance to the true joints, in the unit of the target.
        mirrored_error: The same for the predictions with all relative depths reversed. Less than
            `error`: the network has learned reversed depths.
        reversed: The share of the poses whose mirror image is nearer to the truth.
        wrong_knees: The share of the bent knees that bend backwards.
        wrong_elbows: The share of the bent elbows that bend forwards; a third or so is not
            suspicious.
    """

    error: Tensor
    mirrored_error: Tensor
    reversed: Tensor
    wrong_knees: Tensor
    wrong_elbows: Tensor


def depth_sign_check(
    prediction: Tensor,
    target: Tensor | None = None,
    *,
    root: int = 0,
    valid: Tensor | None = None,
    least_bend: float = 0.1,
    joint_names: Sequence[str] = HUMAN36M_JOINTS,
) -> DepthSign:
    """Tells reversed depths at validation, with true poses or without any.

    With a target, pose and mirror image are each scaled to fit it best, relative to the root, and
    compared with it. The mirror image is that at the root's depth, a good approximation of the pose
    with the same pixels and reversed relative depths unless the camera is close. Without a target
    there are still the directions in which knees and elbows bend.

    Args:
        prediction: `[..., J, 3]`, camera coordinates, any unit. A joint that is not finite is left
            out.
        target: `[..., J, 3]`, coordinates of the same cameras, any unit.
        root: The joint that both are relative to.
        valid: `[..., J]`, or what broadcasts to it; 0 or False leaves a joint out.
        least_bend: Joints whose `bending` is less than this either way count as straight.
        joint_names: J names, for knees and elbows. Of names without them those shares are NaN.

    Returns:
        `DepthSign(error, mirrored_error, reversed, wrong_knees, wrong_elbows)`.

    Raises:
        TypeError: An argument is not a tensor of the right kind.
        ValueError: Shapes or devices do not fit.
    """
    _check.tensors({"prediction": prediction})
    _check.trailing("prediction", prediction, "[..., J, 3]", (None, 3))
    prediction = prediction.detach().to(_check.geometry_dtype((prediction,)))
    if not 0 <= root < prediction.shape[-2]:
        raise ValueError(f"root must be from 0 to {prediction.shape[-2] - 1}, got {root}")
    counts = prediction.isfinite().all(-1)
    if valid is not None:
        counts = counts & (checked_valid(valid, counts) != 0)
    nothing = prediction.new_full((), torch.nan)
    error, mirrored, share = nothing, nothing, nothing
    if target is not None:
        prediction, target = checked_pair(prediction, target.detach(), 3)
        both = counts & target.isfinite().all(-1)
        both = both & both[..., root, None]
        ours, theirs = (
            torch.where(both[..., None], p - p[..., root, None, :], 0) for p in (prediction, target)
        )
        flip = torch.tensor([1.0, 1.0, -1.0], dtype=ours.dtype).to(ours.device, non_blocking=True)
        kept, turned = _scaled_errors(ours, theirs, both), _scaled_errors(ours * flip, theirs, both)
        error, mirrored = kept.nanmean(), turned.nanmean()
        nearer = torch.where(kept.isnan(), torch.nan, (turned < kept).to(kept.dtype))
        share = nearer.nanmean()
    poses = torch.where(counts[..., None], prediction, torch.nan)
    return DepthSign(
        error,
        mirrored,
        share,
        *(
            _wrong_share(poses, [f"{side}_{kind}" for side in "lr"], least_bend, joint_names)
            for kind in ("knee", "elbow")
        ),
    )


def _scaled_errors(prediction: Tensor, target: Tensor, counts: Tensor) -> Tensor:
    """The mean distance [...] after the best scale; NaN where no joint but the root counts."""
    size = prediction.square().sum((-2, -1))
    scale = (prediction * target).sum((-2, -1)) / torch.where(size > 0, size, 1)
    # Not turned inside out.
    scale = scale.clamp(min=0)
    each = distances(prediction * scale[..., None, None] - target)
    number = counts.sum(-1)
    return torch.where((number > 1) & (size > 0), each.sum(-1) / number.clamp(min=1), torch.nan)


def _wrong_share(
    poses: Tensor, joints: Sequence[str], least_bend: float, joint_names: Sequence[str]
) -> Tensor:
    try:
        value = bending(poses, joints=joints, joint_names=joint_names)
    except ValueError:
        return poses.new_full((), torch.nan)
    bent = value.abs() > least_bend
    number = bent.sum()
    share = (bent & (value < 0)).sum().to(value.dtype) / number.clamp(min=1)
    return torch.where(number > 0, share, torch.nan)


def _bending(
    poses: Tensor, joints: Sequence[str], joint_names: Sequence[str]
) -> tuple[Tensor, Tensor]:
    """The bending [..., N] and where it is known; 0 elsewhere."""
    _check.tensors({"poses": poses})
    _check.trailing("poses", poses, "[..., J, 3]", (len(joint_names), 3), of="joint_names")
    if not joints:
        raise ValueError("joints must be one or more, got none")
    poses = poses.to(_check.geometry_dtype((poses,)))
    finite = poses.isfinite().all(-1)
    poses = torch.where(finite[..., None], poses, 0)
    up = poses[..., _at("neck", joint_names), :] - poses[..., _at("pelvis", joint_names), :]
    trunk = finite[..., _at("neck", joint_names)] & finite[..., _at("pelvis", joint_names)]
    values, known = [], []
    for name in joints:
        middle, first, last, left, right, sign = _hinge(name, joint_names)
        a, m, b = (poses[..., joint, :] for joint in (first, middle, last))
        front = torch.linalg.cross(poses[..., left, :] - poses[..., right, :], up)
        straight = b - a
        length, along = distances(front), straight.square().sum(-1)
        limbs = 0.5 * (distances(m - a) + distances(b - m))
        there = trunk & (length > 0) & (along > 0) & (limbs > 0)
        for joint in (first, middle, last, left, right):
            there = there & finite[..., joint]
        part = ((m - a) * straight).sum(-1) / torch.where(along > 0, along, 1)
        offset = m - a - part[..., None] * straight
        scale = torch.where(there, length * limbs, 1)
        values.append(torch.where(there, sign * (offset * front).sum(-1) / scale, 0))
        known.append(there)
    return torch.stack(values, -1), torch.stack(known, -1)


def _hinge(name: str, joint_names: Sequence[str]) -> tuple[int, int, int, int, int, float]:
    """A joint that bends, its neighbours, left and right of the body there, and the sign."""
    if name not in _HINGES:
        raise ValueError(f"joints must be of {', '.join(_HINGES)}, got {name}")
    first, last, across, sign = _HINGES[name]
    names = (name, first, last, f"l_{across}", f"r_{across}")
    middle, a, b, left, right = (_at(each, joint_names) for each in names)
    return middle, a, b, left, right, sign


def _at(name: str, joint_names: Sequence[str]) -> int:
    if name not in joint_names:
        raise ValueError(f"joint_names must have {name}, got {', '.join(joint_names)}")
    return list(joint_names).index(name)
