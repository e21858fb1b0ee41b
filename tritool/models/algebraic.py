# SPDX-License-Identifier: Apache-2.0
"""Algebraic triangulation: every view's 2D joints, weighted and triangulated, end to end."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tritool.models import _views
from tritool.models.pose_resnet import PoseResNet
from tritool.ops import soft_argmax2d, triangulate

__all__ = ["AlgebraicOutput", "AlgebraicTriangulation"]

_LEAST_WEIGHT = 1e-5  # the official code's; a view at 0 would never get a gradient again


@dataclass(frozen=True, eq=False)
class AlgebraicOutput:
    """What an `AlgebraicTriangulation` makes of B scenes of C views.

    Attributes:
        keypoints_3d: `[B, J, 3]`, world units; NaN with fewer than two views.
        keypoints_2d: `[B, C, J, 2]`, pixels (x, y) of the images; NaN where there is no view.
        heatmaps: `[B, C, J, H/4, W/4]`, before the softmax; without meaning where there is no view.
        confidences: `[B, C, J]`, the weights of the triangulation: they sum to 1 + C / 100000 over
            the C views that are there; 0 where there is no view.
    """

    keypoints_3d: Tensor
    keypoints_2d: Tensor
    heatmaps: Tensor
    confidences: Tensor


torch.export.register_dataclass(AlgebraicOutput, serialized_type_name="tritool.AlgebraicOutput")


class AlgebraicTriangulation(nn.Module):
    r"""3D joints from images by a weighted linear triangulation of 2D joints, trained end to end.

    The algebraic model of Iskakov et al., "Learnable Triangulation of Human Pose" (ICCV 2019),
    equations (1)-(5): a `PoseResNet` gives heat maps and a confidence for each view and joint, the
    soft-argmax with inverse temperature :math:`\alpha` the 2D joints, the weighted direct linear
    transform the 3D ones. Confidences are divided by their sum over the views; then 1e-5 is added,
    as in the official code. Parameters are named as in the official checkpoints (`backbone.*`).

    The world's unit and origin are the user's, but the paper's triangulation is not independent of
    them where the rays do not meet: see `tritool.ops.triangulate`, mode `"homogeneous"`.

    Args:
        num_joints: J.
        depth: Of the backbone: 18, 34, 50, 101 or 152.
        use_confidences: False: all views count alike, and the backbone has no branch for them.
        inverse_temperature: :math:`\alpha`, 100 in the paper.
        backbone: The network to use in place of a new one; then `depth`, `width`,
            `deconv_channels` and `checkpointing` have no meaning. Branches of confidences that are
            not used are frozen.
        official_conventions: Heat-map cell i is image pixel i s, with s = W / w, as in the official
            code, whose weights expect it; default: pixel (i + 1/2) s - 1/2.
        width: Channels of the backbone's first convolution.
        deconv_channels: Channels of the backbone's transposed convolutions.
        checkpointing: Less memory in training, as for `PoseResNet`.

    Raises:
        TypeError: `backbone` is not a `PoseResNet`.
        ValueError: A number does not fit, or `backbone` has other joints or lacks the branch.

    Example:
        >>> network = AlgebraicTriangulation(5, 18, width=8, deconv_channels=16).eval()
        >>> output = network(torch.zeros(2, 4, 3, 128, 160), torch.rand(2, 4, 3, 4))
        >>> output.keypoints_3d.shape, output.keypoints_2d.shape
        (torch.Size([2, 5, 3]), torch.Size([2, 4, 5, 2]))
    """

    def __init__(
        self,
        num_joints: int = 17,
        depth: int = 152,
        use_confidences: bool = True,
        inverse_temperature: float = 100.0,
        *,
        backbone: PoseResNet | None = None,
        official_conventions: bool = False,
        width: int = 64,
        deconv_channels: int = 256,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.inverse_temperature = _views.positive("inverse_temperature", inverse_temperature)
        backbone = _views.made_backbone(
            backbone,
            depth,
            num_joints,
            algebraic_confidences=use_confidences,
            width=width,
            deconv_channels=deconv_channels,
            checkpointing=checkpointing,
        )
        if use_confidences and backbone.alg_confidences is None:
            raise ValueError(
                "backbone must have algebraic_confidences=True with use_confidences, got False"
            )
        self.num_joints = num_joints
        self.use_confidences = use_confidences
        self.official_conventions = official_conventions
        self.backbone = backbone
        _views.freeze(backbone.vol_confidences)
        if not use_confidences:
            _views.freeze(backbone.alg_confidences)

    def forward(
        self, images: Tensor, projections: Tensor, *, views: Tensor | None = None
    ) -> AlgebraicOutput:
        """The 3D joints of every scene.

        Args:
            images: `[B, C, 3, H, W]`; H and W multiples of 32, with confidences at least 128.
                Values as the weights expect them: see `normalize_images`.
            projections: `[B, C, 3, 4]`, float32 or float64, world to pixels of these images.
            views: `[B, C]`, boolean; False: the view is absent, and neither its image nor its
                projection is looked at. (In training, batch norm sees a blank image there.)

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
        points = soft_argmax2d(heatmaps, inverse_temperature=self.inverse_temperature)
        keypoints_2d = _views.image_from_heatmap(
            points, heatmaps.shape[-2:], images.shape[-2:], official=self.official_conventions
        )
        raw = output.algebraic_confidences if self.use_confidences else None
        raw = torch.ones_like(points[..., 0]) if raw is None else _views.at_least_float32(raw)
        if views is not None:
            keypoints_2d = torch.where(views[..., None, None], keypoints_2d, torch.nan)
        confidences = _normalized(raw, views)
        return AlgebraicOutput(
            keypoints_3d=triangulate(
                keypoints_2d.transpose(1, 2), projections[:, None], confidences.transpose(1, 2)
            ),
            keypoints_2d=keypoints_2d,
            heatmaps=heatmaps,
            confidences=confidences,
        )


def _normalized(raw: Tensor, views: Tensor | None) -> Tensor:
    """Weights `[B, C, J]` from confidences: shares of the views' sum, and at least a little."""
    if views is None:
        return raw / _or_one(raw.sum(1, keepdim=True)) + _LEAST_WEIGHT
    present = views[..., None]
    raw = torch.where(present, raw, 0)
    shares = raw / _or_one(raw.sum(1, keepdim=True)) + _LEAST_WEIGHT
    return torch.where(present, shares, 0)


def _or_one(total: Tensor) -> Tensor:
    """1 in place of 0: no view at all, or all confidences underflowed."""
    return torch.where(total == 0, 1, total)
