# SPDX-License-Identifier: Apache-2.0
"""The baseline of learnable triangulation: 2D joints of every view, and the views that agree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tritool.models import _views
from tritool.models.pose_resnet import PoseResNet
from tritool.ops import refine, robust_triangulate, soft_argmax2d, triangulate

__all__ = ["RansacOutput", "RansacTriangulation"]

_READOUTS = ("argmax", "soft_argmax")
# The official code takes half the distance for the error, ten pairs, and Huber's loss of scale 1 on
# that error, minimised to convergence.
_OFFICIAL_FACTOR = 2.0
_OFFICIAL_PAIRS = 10
_OFFICIAL_SCALE = 1.0
_OFFICIAL_ITERATIONS = 10


@dataclass(frozen=True, eq=False)
class RansacOutput:
    """What a `RansacTriangulation` makes of B scenes of C views.

    Attributes:
        keypoints_3d: `[B, J, 3]`, world units; NaN with fewer than two views.
        keypoints_2d: `[B, C, J, 2]`, pixels (x, y) of the images; NaN where there is no view.
        inliers: `[B, C, J]`, bool: the views that a 3D joint was fitted to. None at all: no two
            views agree, and it was fitted to every view.
        heatmaps: `[B, C, J, H/4, W/4]`; without meaning where there is no view.
    """

    keypoints_3d: Tensor
    keypoints_2d: Tensor
    inliers: Tensor
    heatmaps: Tensor


torch.export.register_dataclass(RansacOutput, serialized_type_name="tritool.RansacOutput")


class RansacTriangulation(nn.Module):
    """3D joints from the peaks of heat maps, triangulated from the views that agree.

    The baseline "RANSAC" of Iskakov et al., "Learnable Triangulation of Human Pose" (ICCV 2019): a
    `PoseResNet` that is trained on 2D joints, and no learning after it. Where the paper's baseline
    draws pairs of views at random, this one tries all of them: see
    `tritool.ops.robust_triangulate`. A joint on which no two views agree is triangulated from every
    view, as the paper's is, so that an error counts; it has no inliers. Parameters are named as in
    the official checkpoints (`backbone.*`).

    The 2D joints have no gradient with `"argmax"`: train the heat maps, for example with
    `tritool.losses.heatmap_mse`.

    Args:
        num_joints: J.
        depth: Of the backbone: 18, 34, 50, 101 or 152.
        backbone: The network to use in place of a new one; then `depth`, `width`,
            `deconv_channels` and `checkpointing` have no meaning. Its branches of confidences are
            not used and frozen.
        threshold: Largest reprojection error of a view that agrees, in pixels of the images, above
            0. With `official_conventions`, of half that error.
        pairs: How many pairs of views to try for each joint, drawn at random; None: all, or ten
            with `official_conventions`. As many as there are, or more: all.
        readout: `"argmax"`: the cell with the peak; `"soft_argmax"`: the mean under a softmax.
        inverse_temperature: Of that softmax.
        refine: End by minimising the reprojection error under Huber's loss, of scale
            `threshold / 2`, or, with `official_conventions`, 2 pixels.
        official_conventions: Heat-map cell i is image pixel i s, with s = W / w, as in the official
            code, whose weights expect it; default: pixel (i + 1/2) s - 1/2. Also half the distance
            as error, ten pairs and Huber's loss as above. What stays: equal numbers of inliers are
            told apart by their errors, there by chance; no pair is drawn twice, so up to five views
            have all pairs tried; and the linear solutions do not depend on the world's unit.
        width: Channels of the backbone's first convolution.
        deconv_channels: Channels of the backbone's transposed convolutions.
        checkpointing: Less memory in training, as for `PoseResNet`.

    Raises:
        TypeError: `backbone` is not a `PoseResNet`, or `pairs` no integer.
        ValueError: A number does not fit, `readout` is unknown, or `backbone` has other joints.

    Example:
        >>> network = RansacTriangulation(5, 18, width=8, deconv_channels=16).eval()
        >>> output = network(torch.zeros(2, 4, 3, 64, 96), torch.rand(2, 4, 3, 4))
        >>> output.keypoints_3d.shape, output.inliers.shape
        (torch.Size([2, 5, 3]), torch.Size([2, 4, 5]))
    """

    def __init__(
        self,
        num_joints: int = 17,
        depth: int = 152,
        *,
        backbone: PoseResNet | None = None,
        threshold: float = 15.0,
        pairs: int | None = None,
        readout: str = "argmax",
        inverse_temperature: float = 100.0,
        refine: bool = True,
        official_conventions: bool = False,
        width: int = 64,
        deconv_channels: int = 256,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.threshold = _views.positive("threshold", threshold)
        self.inverse_temperature = _views.positive("inverse_temperature", inverse_temperature)
        _views.one_of("readout", readout, _READOUTS)
        if pairs is not None:
            if isinstance(pairs, bool) or not isinstance(pairs, int):
                raise TypeError(f"pairs must be an integer or None, got {type(pairs).__name__}")
            if pairs < 1:
                raise ValueError(f"pairs must be 1 or more, got {pairs}")
        backbone = _views.made_backbone(
            backbone,
            depth,
            num_joints,
            width=width,
            deconv_channels=deconv_channels,
            checkpointing=checkpointing,
        )
        self.num_joints = num_joints
        self.pairs = pairs
        self.readout = readout
        self.refine = refine
        self.official_conventions = official_conventions
        self.backbone = backbone
        _views.freeze(backbone.alg_confidences)
        _views.freeze(backbone.vol_confidences)

    def forward(
        self,
        images: Tensor,
        projections: Tensor,
        *,
        views: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> RansacOutput:
        """The 3D joints of every scene.

        Args:
            images: `[B, C, 3, H, W]`; H and W multiples of 32. Values as the weights expect them:
                see `normalize_images`.
            projections: `[B, C, 3, 4]`, float32 or float64, world to pixels of these images; third
                row scaled so that it gives depth with positive sign.
            views: `[B, C]`, boolean; False: the view is absent, and neither its image nor its
                projection is looked at. (In training, batch norm sees a blank image there.)
            generator: To draw pairs of views with, of the device of `images`; None: PyTorch's own.

        Returns:
            The joints, and what they were made of. Everything is float32 or float64, under autocast
            too.

        Raises:
            TypeError: An argument is no tensor or has another dtype.
            ValueError: Shapes or devices do not fit.
        """
        views = _views.checked_views(images, projections, views)
        output = self.backbone(_views.without_absent(images, views))
        heatmaps = _views.at_least_float32(output.heatmaps)
        if self.readout == "argmax":
            cells = _peaks(heatmaps)
        else:
            cells = soft_argmax2d(heatmaps, inverse_temperature=self.inverse_temperature)
        keypoints_2d = _views.image_from_heatmap(
            cells, heatmaps.shape[-2:], images.shape[-2:], official=self.official_conventions
        )
        if views is not None:
            keypoints_2d = torch.where(views[..., None, None], keypoints_2d, torch.nan)
        keypoints_3d, inliers = self._triangulated(
            keypoints_2d.transpose(1, 2), projections[:, None], generator
        )
        return RansacOutput(keypoints_3d, keypoints_2d, inliers.transpose(1, 2), heatmaps)

    def _triangulated(
        self, points: Tensor, projections: Tensor, generator: torch.Generator | None
    ) -> Sequence[Tensor]:
        """Joints `[B, J, 3]` and inliers `[B, J, C]` of points `[B, J, C, 2]`."""
        official = self.official_conventions
        found, inliers = robust_triangulate(
            points,
            projections,
            threshold=self.threshold * (_OFFICIAL_FACTOR if official else 1),
            refine=self.refine and not official,
            pairs=_OFFICIAL_PAIRS if official and self.pairs is None else self.pairs,
            generator=generator,
        )
        if self.refine and official:
            found = refine(
                found,
                points,
                projections,
                inliers.to(points.dtype),
                scale=_OFFICIAL_FACTOR * _OFFICIAL_SCALE,
                iterations=_OFFICIAL_ITERATIONS,
            )
        of_all = triangulate(points, projections, mode="inhomogeneous", reweight=1)
        return torch.where(inliers.any(-1, keepdim=True), found, of_all), inliers


def _peaks(heatmaps: Tensor) -> Tensor:
    """The cells `[..., 2]` (x, y) of the greatest values; NaN where none is finite."""
    width = heatmaps.shape[-1]
    value, index = heatmaps.detach().flatten(-2).max(-1)
    cells = torch.stack([index % width, index // width], -1).to(heatmaps.dtype)
    return torch.where(value.isfinite()[..., None], cells, torch.nan)
