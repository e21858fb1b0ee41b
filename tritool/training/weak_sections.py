# SPDX-License-Identifier: Apache-2.0
"""The sections of a configuration that learns 3D poses without 3D labels."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Literal

from tritool.training.sections import (
    HeatmapKind,
    NetworkSettings,
    Part,
    StudioPart,
    above,
    at_least,
)

if TYPE_CHECKING:
    from torch.utils.data import Dataset

    from tritool.data import Remembered, Sample
    from tritool.data.synthetic import Studio

__all__ = ["MixtureData", "WeakSettings", "WeakSupervision"]


@dataclass(frozen=True)
class WeakSettings(NetworkSettings):
    """The 2.5D network: one image, one pose (`tritool.models.WeaklySupervisedPose`).

    Attributes:
        inverse_temperature: Of the soft-argmax.
        learnable_temperature: Learn a factor of it for each joint.
        confidence: What a joint's confidence is: see `WeaklySupervisedPose`.
        pair: The two joints whose distance is 1.
        min_ratio: Torsos seen more end-on than this are left out in training.
        limb_lengths: The mean lengths of limbs, the one thing known of 3D: published ones, or those
            of the studio's ordinary body.
        reconstruction: How the depth of the root is found at test time: from the median over all
            limbs, or from the pair, as in training. "flat": the same median, with 0 for all
            relative depths, about their mean where cameras stand all around: what 2D joints alone
            are worth, to compare with.
        pseudo_from: A checkpoint of this kind whose confident 2D joints stand in for the labels
            that samples of several views lack; none: nothing does.
        pseudo_threshold: The confidence that they need.
        pseudo_fraction: The part of those samples that get any.
    """

    kind: Literal["weak"] = "weak"
    inverse_temperature: float = 20.0
    learnable_temperature: bool = False
    confidence: Literal["peak", "mass"] = "peak"
    pair: tuple[int, int] = (8, 0)
    min_ratio: float = 0.01
    limb_lengths: Literal["published", "studio"] = "published"
    reconstruction: Literal["median", "pair", "flat"] = "median"
    pseudo_from: str | None = None
    pseudo_threshold: float = 0.5
    pseudo_fraction: float = 1.0

    def __post_init__(self) -> None:
        """Checks the values."""
        super().__post_init__()
        above(self, 0, "inverse_temperature", "min_ratio")
        at_least(self, 0, "pseudo_threshold", "pseudo_fraction")
        if self.pseudo_fraction > 1:
            raise ValueError(f"pseudo_fraction must be at most 1, got {self.pseudo_fraction}")
        if self.min_ratio >= 1:
            raise ValueError(f"min_ratio must be below 1, got {self.min_ratio}")
        if len(set(self.pair)) < 2 or not all(0 <= j < self.num_joints for j in self.pair):
            raise ValueError(
                f"pair must be two joints from 0 to {self.num_joints - 1}, got {list(self.pair)}"
            )
        if len(self.pelvis) != 1:
            raise ValueError(f"pelvis must be one joint, the root, got {list(self.pelvis)}")
        if self.num_joints != 17:
            raise ValueError(
                "num_joints must be 17, the joints of Human3.6M, whose limbs are known, "
                f"got {self.num_joints}"
            )
        if self.official_conventions or self.official_checkpoint is not None:
            raise ValueError(
                "official_conventions and official_checkpoint must be left out: there is no "
                "official code of this kind"
            )


@dataclass(frozen=True)
class WeakSupervision:
    """Heat maps, agreement of views and limb lengths: `tritool.losses.weak_total`.

    In the order of a run: `pretrain_steps` with heat maps alone, `bending_steps` with the bending
    prior beside them, and the rest with views and limbs in its place. Limb lengths say nothing of a
    depth's sign and hold on to whatever it is: they wait until the prior has chosen.

    Attributes:
        heatmap_weight: Factor of the heat maps; 0: no 2D label is used.
        heatmap_loss: See `HeatmapLoss`.
        heatmap_sigma: Standard deviation of the Gaussians, cells of the heat map.
        alpha: Factor of the agreement of views.
        psi: Factor of the limb lengths.
        depth_bound: Factor of `tritool.losses.limb_depth_bound`, of all limbs and once more of the
            pair, in the steps in which views or limbs count; no part of the paper. 0: depths that
            are impossible leave the other losses for good.
        pair_depth: How much depth the pair may span there, as a part of its length. The more of it
            points at the camera, the smaller the rest of the pose, and the smaller every error of
            agreement: a way to please the views that leads nowhere.
        mean_depth: Factor of the squared mean of each joint's relative depth over the images of a
            batch, in all steps; no part of the paper. Seen from all sides, depths average out: this
            keeps a network from giving all images the same depths, which limbs and even views
            reward at first, and random depths small. 0 where the cameras do not surround people.
        norm: As for `tritool.losses.multi_view_consistency`.
        through_transform: As for `tritool.losses.multi_view_consistency`.
        min_joints: As for `tritool.losses.multi_view_consistency`.
        floor: As for `tritool.losses.multi_view_consistency`.
        depth: Factor of the absolute error of relative depths, where the data have 3D labels: full
            supervision, for comparison.
        pretrain_steps: Steps before anything but heat maps counts.
        hold_2d_steps: Steps after those in which views and limbs move depths alone, not the 2D
            joints: while depths are flat, moving joints is the easier way to agree.
        bending: Factor of the bending prior, which is no part of the paper.
        bending_margin: As for `tritool.losses.bending_prior`.
        bending_steps: Steps with it.
    """

    heatmap_weight: float = 1.0
    heatmap_loss: HeatmapKind = "mse"
    heatmap_sigma: float = 2.0
    alpha: float = 10.0
    psi: float = 5.0
    depth_bound: float = 10.0
    pair_depth: float = 0.9
    mean_depth: float = 0.0
    norm: Literal["l1", "l2"] = "l1"
    through_transform: bool = False
    min_joints: int = 4
    floor: float = 0.01
    depth: float = 0.0
    pretrain_steps: int = 0
    hold_2d_steps: int = 0
    bending: float = 0.0
    bending_margin: float = 0.3
    bending_steps: int = 0

    def __post_init__(self) -> None:
        """Checks the values."""
        at_least(self, 0, "heatmap_weight", "alpha", "psi", "depth", "depth_bound")
        at_least(self, 0, "mean_depth", "bending")
        at_least(self, 0, "floor")
        at_least(self, 0, "pretrain_steps", "hold_2d_steps", "bending_steps")
        at_least(self, 3, "min_joints")
        above(self, 0, "heatmap_sigma", "pair_depth")
        if self.pair_depth > 1:
            raise ValueError(f"pair_depth must be at most 1, got {self.pair_depth}")
        if not any((self.heatmap_weight, self.alpha, self.psi, self.depth)):
            raise ValueError(
                "heatmap_weight, alpha, psi and depth cannot all be 0: nothing would be learned"
            )
        if (self.bending > 0) != (self.bending_steps > 0):
            raise ValueError(
                "bending and bending_steps must be given together, "
                f"got {self.bending:g} and {self.bending_steps}"
            )


@dataclass(frozen=True)
class MixtureData:
    """Two sources of images from the studio: single ones with 2D joints, and several views.

    Attributes:
        labelled: Images with 2D joints.
        multi_view: Samples of several views.
        validation: What is validated on; of each sample the first view.
        labels: What is known of the samples of several views: nothing but intrinsics, 2D joints
            too, or 3D joints and extrinsics too.
        images: How many labelled samples a batch has for each of several views. The batch size is
            a multiple of this and one more.
        remember: Keep samples in memory once they are made, until the process ends; each worker its
            own.
    """

    labelled: StudioPart
    multi_view: StudioPart
    validation: StudioPart
    kind: Literal["mixture"] = "mixture"
    labels: Literal["none", "2d", "3d"] = "none"
    images: int = 4
    remember: bool = False

    def __post_init__(self) -> None:
        """Checks the values."""
        at_least(self, 1, "images")
        if self.validation.seed in (self.labelled.seed, self.multi_view.seed):
            raise ValueError(
                "validation.seed must differ from those of labelled and multi_view, "
                f"got {self.validation.seed}"
            )
        if self.multi_view.studio.views < 2:
            raise ValueError(
                f"multi_view.studio.views must be at least 2, got {self.multi_view.studio.views}"
            )
        sizes = {
            part.studio.image_size for part in (self.labelled, self.multi_view, self.validation)
        }
        if len(sizes) > 1:
            raise ValueError(f"image_size must be the same in all parts, got {sorted(sizes)}")

    def dataset(self, part: Part) -> Dataset[Sample]:
        """The samples to train on, or those to validate on."""
        from tritool.data import Mixture

        made = _remembered if self.remember else _studio
        if part == "validation":
            return made(self.validation)
        return Mixture(
            made(self.labelled), made(self.multi_view), labels=self.labels, images=self.images
        )


def _studio(part: StudioPart) -> Studio:
    from tritool.data.synthetic import Studio

    return Studio(part.studio, length=part.length, seed=part.seed)


@cache
def _remembered(part: StudioPart) -> Remembered:
    """One memory for all runs of a process that ask for the same samples."""
    from tritool.data import Remembered

    return Remembered(_studio(part))
