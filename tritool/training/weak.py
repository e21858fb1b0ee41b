# SPDX-License-Identifier: Apache-2.0
"""Training of the 2.5D network without 3D labels.

Iqbal, Molchanov, Kautz, "Weakly-Supervised 3D Human Pose Learning via Multi-view Images in the
Wild" (CVPR 2020). Extrinsics are read in two places only: where the error of a pose is measured,
and in full supervision, which is there to compare with.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from tritool import losses
from tritool.data.sample import Batch
from tritool.data.synthetic import ordinary_limb_lengths
from tritool.metrics import n_mpjpe, pa_mpjpe
from tritool.models import (
    WeaklySupervisedPose,
    WeakOutput,
    absolute_scale,
    normalize_images,
    reconstruct_pose,
    reconstruct_pose_median,
)
from tritool.training.sampling import MODEL, seed_of
from tritool.training.tasks import (
    Measured,
    Prediction,
    Task,
    Terms,
    heatmap_cells,
    trained_task,
)

__all__ = ["ImagePoses", "WeakTask"]


@dataclass(frozen=True, eq=False)
class ImagePoses:
    """Poses of N images.

    Attributes:
        pose: `[N, J, 3]`, millimetres, coordinates of the image's camera; of the size of a person
            with mean limbs.
        keypoints_2d: `[N, J, 2]`, pixels.
        confidences: `[N, J]`.
        heatmaps: `[N, J, H/4, W/4]`, before the softmax.
        valid: `[N]`, boolean: the root's depth is determined. Other poses are finite, but mean
            little.
    """

    pose: Tensor
    keypoints_2d: Tensor
    confidences: Tensor
    heatmaps: Tensor
    valid: Tensor


class WeakTask(Task):
    """2D labels where there are some, and the agreement of views where there are several."""

    kind = "weak"
    # Without 3D labels there is nothing to choose by.
    keeps_best: ClassVar[bool] = False
    measures: ClassVar[tuple[str, ...]] = ("n_mpjpe", "pa_mpjpe", "reversed", "wrong_knees")

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self._step = 0
        # The network whose 2D joints stand in for labels; read when first needed.
        self._teacher: WeakTask | None = None
        limbs, millimetres = (
            ordinary_limb_lengths()
            if config.model.limb_lengths == "studio"
            else losses.published_limb_lengths(millimetres=True)
        )
        self.limbs = limbs
        self.millimetres = torch.tensor(millimetres)
        # The pair's own length is 1 in every pose.
        pair = set(config.model.pair)
        unit = next(
            (length for limb, length in zip(limbs, millimetres, strict=True) if set(limb) == pair),
            None,
        )
        if unit is None:
            raise ValueError(
                f"model.pair {list(config.model.pair)} must be a limb of known length, such as "
                "[8, 0], neck and pelvis"
            )
        self.unit = unit

    def _build(self, settings: Any) -> WeaklySupervisedPose:
        return WeaklySupervisedPose(
            settings.num_joints,
            settings.depth,
            root=settings.pelvis[0],
            pair=settings.pair,
            inverse_temperature=settings.inverse_temperature,
            confidence=settings.confidence,
            learnable_temperature=settings.learnable_temperature,
            width=settings.width,
            deconv_channels=settings.deconv_channels,
            checkpointing=settings.checkpointing,
            min_ratio=settings.min_ratio,
        )

    def begin_step(self, step: int) -> None:
        """Tells which step comes: what counts depends on it."""
        self._step = step

    def counted(self, batch: Batch) -> int:
        """How many images there are: the terms are means over different things."""
        return int(batch.views.sum())

    # ---- The loss ----

    def _loss(self, batch: Batch, images: Tensor, generator: torch.Generator | None) -> Terms:
        settings = self.config.loss
        # Only the images there are: samples of one view are padded to as many as the others have.
        seen = batch.views
        held = self._step < settings.pretrain_steps + settings.hold_2d_steps
        output = self._network(images[seen], batch.intrinsics[seen], hold_2d=held)
        labels, known = self._labels(batch, images)
        several = seen.sum(1) > 1
        poses = _scattered(output.pose, seen)[several]
        confidences = _scattered(output.confidences, seen, 0.0)[several]
        sound = _scattered(output.valid, seen, False)[several]
        weights = losses.WeakLossSettings(
            heatmap=settings.heatmap_weight,
            heatmap_loss=settings.heatmap_loss,
            sigma=settings.heatmap_sigma,
            inverse_temperature=self.config.model.inverse_temperature,
            bending_margin=settings.bending_margin,
            norm=settings.norm,
            through_transform=settings.through_transform,
            min_joints=settings.min_joints,
            floor=settings.floor,
            **self._factors(),
        )
        lengths = self.millimetres.to(poses) / self.unit
        cells = heatmap_cells(labels, batch.images.shape[-2:], output.heatmaps.shape[-2:])
        heatmaps = output.heatmaps
        if settings.heatmap_loss == "cross_entropy" and isinstance(
            self.model, WeaklySupervisedPose
        ):
            factor = self.model.log_temperature_factor
            # What the soft-argmax reads.
            heatmaps = heatmaps if factor is None else heatmaps * factor.exp()[:, None, None]
        found = losses.weak_total(
            weights,
            heatmaps=heatmaps,
            target=cells,
            target_valid=known,
            poses=poses,
            confidences=confidences,
            valid=sound,
            mean_lengths=lengths,
            limbs=self.limbs,
        )
        # A network that has broken down has no pose that counts: the loss would be 0.
        broken = ~output.heatmaps.detach().sum().isfinite()
        terms = {
            "heatmaps": weights.heatmap * found.heatmaps,
            "consistency": weights.alpha * found.consistency,
            "limbs": weights.psi * found.limb_lengths,
        }
        if settings.depth_bound and (settings.alpha or settings.psi):
            depths = _scattered(output.relative_depth, seen)[several]
            bound = losses.limb_depth_bound(depths, lengths, self.limbs, valid=seen[several])
            bound = bound + losses.limb_depth_bound(
                depths,
                (settings.pair_depth,),
                (self.config.model.pair,),
                valid=seen[several],
                slack=1.0,
            )
            begun = self._step >= settings.pretrain_steps
            terms["depth_bound"] = (settings.depth_bound if begun else 0.0) * bound
        if settings.mean_depth:
            # From the first step on: large depths of random signs are hard to turn later.
            terms["mean_depth"] = (
                settings.mean_depth * output.relative_depth.mean(0).square().mean()
            )
        if settings.bending:
            terms["bending"] = weights.bending * found.bending
        if settings.depth:
            weight = settings.depth if self._step >= settings.pretrain_steps else 0.0
            terms["depth"] = weight * self._depth_error(batch, output)
        return {name: torch.where(broken, torch.nan, term) for name, term in terms.items()}

    def _factors(self) -> dict[str, float]:
        """Of the terms that need several views, at this step."""
        settings = self.config.loss
        after = self._step - settings.pretrain_steps
        if after < 0:
            return {"alpha": 0.0, "psi": 0.0, "bending": 0.0}
        if after < settings.bending_steps:
            return {"alpha": 0.0, "psi": 0.0, "bending": settings.bending}
        return {"alpha": settings.alpha, "psi": settings.psi, "bending": 0.0}

    def _labels(self, batch: Batch, images: Tensor) -> tuple[Tensor, Tensor]:
        """2D joints `[N, J, 2]`, pixels, of the images there are, and their weights `[N, J]`."""
        seen = batch.views
        labels = batch.keypoints_2d[seen]
        known = labels.isfinite().all(-1)
        source = self.config.model.pseudo_from
        if source is None:
            return labels, known.to(labels.dtype)
        chosen = self._chosen(batch).to(seen.device) & (seen.sum(1) > 1)
        rows = (chosen[:, None] & seen)[seen] & ~known.any(1)
        if rows.any():
            if self._teacher is None:
                # Never trained here: that it may have had a teacher itself does not matter.
                teacher = trained_task(source, self.config, self.kind)
                assert isinstance(teacher, WeakTask)
                teacher.model.to(images.device).eval()
                self._teacher = teacher
            with torch.no_grad():
                own = self._teacher.images(batch.images[seen][rows])
                taught = self._teacher.model(own, batch.intrinsics[seen][rows])
            sure = taught.confidences > self.config.model.pseudo_threshold
            labels, known = labels.clone(), known.clone()
            labels[rows] = torch.where(sure[..., None], taught.keypoints_2d, torch.nan).to(
                labels.dtype
            )
            known[rows] = sure
        return labels, known.to(labels.dtype)

    def _chosen(self, batch: Batch) -> Tensor:
        """`[B]`: the samples that get pseudo-labels; the same in every epoch and run."""
        fraction = self.config.model.pseudo_fraction
        draws = [seed_of(0, MODEL, index) / 2**63 for index in batch.indices]
        return torch.tensor([draw < fraction for draw in draws])

    def _depth_error(self, batch: Batch, output: WeakOutput) -> Tensor:
        """Mean absolute error of relative depths, in lengths of the pair."""
        k, l = self.config.model.pair
        joints = batch.keypoints_3d
        unit = (joints[:, k] - joints[:, l]).norm(dim=-1)
        root = self.config.model.pelvis[0]
        depths = _in_cameras(batch, joints)[..., 2]  # [B, C, J]
        true = ((depths - depths[..., root, None]) / unit[:, None, None])[batch.views]
        known = true.isfinite()
        difference = torch.where(known, output.relative_depth - torch.where(known, true, 0), 0)
        mean: Tensor = difference.abs().sum() / known.sum().clamp(min=1)
        return mean

    # ---- Poses ----

    def poses(self, images: Tensor, intrinsics: Tensor) -> ImagePoses:
        """The poses in images; call it in evaluation mode.

        Args:
            images: `[N, 3, H, W]`, as the network takes them.
            intrinsics: `[N, 3, 3]`, of these images.
        """
        settings = self.config.model
        output = self._network(images, intrinsics)
        pose, valid, depths = output.pose, output.valid, output.relative_depth
        guards = {"min_ratio": settings.min_ratio, "depth_range": (1.0, 100.0)}
        if settings.reconstruction == "flat":
            depths = torch.zeros_like(depths)
            flat = reconstruct_pose(
                output.keypoints_2d, depths, intrinsics, pair=settings.pair, **guards
            )
            pose, valid = flat.pose, flat.valid
        if settings.reconstruction != "pair":
            found = reconstruct_pose_median(
                output.keypoints_2d,
                depths,
                intrinsics,
                limbs=self.limbs,
                lengths=self.millimetres.to(pose) / self.unit,
                **guards,
            )
            pose = torch.where(found.valid[:, None, None], found.pose, pose)
            valid = valid | found.valid
        scale = absolute_scale(pose, output.confidences, self.millimetres.to(pose), self.limbs)
        # Of a network that is sure of nothing: the size of the pair.
        scale = torch.where(scale.isfinite(), scale, self.unit)
        return ImagePoses(
            pose * scale[:, None, None],
            output.keypoints_2d,
            output.confidences,
            output.heatmaps,
            valid,
        )

    def _predict(self, batch: Batch, images: Tensor) -> Prediction:
        """Of each sample the pose in its first view, moved into the world to be compared."""
        seen = batch.views
        found = self.poses(images[seen], batch.intrinsics[seen])
        first = seen.to(torch.uint8).argmax(1)
        rows = torch.arange(len(batch), device=seen.device)
        pose = _scattered(found.pose, seen)[rows, first]
        motion = _motions(batch)[rows, first]  # [B, 3, 4]
        # The inverse of a rotation is its transpose.
        away = pose - motion[:, None, :, 3]
        world = (motion[:, None, :, :3] * away[..., None]).sum(-2)
        return Prediction(
            world,
            keypoints_2d=_scattered(found.keypoints_2d, seen),
            heatmaps=_scattered(found.heatmaps, seen),
            confidences=_scattered(found.confidences, seen, 0.0),
        )

    def measured(self, batch: Batch, prediction: Prediction) -> dict[str, Measured]:
        """Errors up to size and up to a similarity, and whether depths are reversed."""
        found, true = prediction.keypoints_3d.double(), batch.keypoints_3d.double()
        root = self.config.model.pelvis
        each = {
            "n_mpjpe": n_mpjpe(found, true, root=root, reduction="pose"),
            "pa_mpjpe": pa_mpjpe(found, true, reduction="pose"),
        }
        result = {name: (e.nansum(), e.isfinite().sum()) for name, e in each.items()}
        # Mirrored at the root's depth, along the optical axis of the view that was looked at.
        first = batch.views.to(torch.uint8).argmax(1)
        rows = torch.arange(len(batch), device=found.device)
        motion = _motions(batch)[rows, first].double()
        sign = losses.depth_sign_check(_moved(found, motion), _moved(true, motion), root=root[0])
        poses = result["n_mpjpe"][1]
        for name, value in (("reversed", sign.reversed), ("wrong_knees", sign.wrong_knees)):
            known = value.isfinite()
            result[name] = (torch.where(known, value, 0) * poses, known * poses)
        return result

    def _network(self, images: Tensor, intrinsics: Tensor, *, hold_2d: bool = False) -> WeakOutput:
        output: WeakOutput = self.model(images, intrinsics, hold_2d=hold_2d)
        return output

    def images(self, images: Tensor) -> Tensor:
        """Images `[..., 3, H, W]`, uint8, as the network takes them."""
        return normalize_images(images, order=self.config.model.channel_order)


def _scattered(values: Tensor, seen: Tensor, filler: float | bool = torch.nan) -> Tensor:
    """Values of the images there are, `[N, ...]`, as `[B, C, ...]`."""
    result = values.new_full((*seen.shape, *values.shape[1:]), filler)
    result[seen] = values
    return result


def _motions(batch: Batch) -> Tensor:
    """`[B, C, 3, 4]`: from the world to the coordinates of each camera."""
    motions: Tensor = torch.linalg.solve(batch.intrinsics, batch.projections)
    return motions


def _in_cameras(batch: Batch, joints: Tensor) -> Tensor:
    """Joints `[B, J, 3]` of the world in the coordinates of each camera, `[B, C, J, 3]`."""
    return _moved(joints[:, None], _motions(batch))


def _moved(joints: Tensor, motion: Tensor) -> Tensor:
    """Joints `[..., J, 3]` after motions `[..., 3, 4]`."""
    # Not a matmul: autocast and TF32 would round it.
    turned = (motion[..., None, :, :3] * joints[..., None, :]).sum(-1)
    return turned + motion[..., None, :, 3]
