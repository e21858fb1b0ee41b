# SPDX-License-Identifier: Apache-2.0
"""The 2.5D network: 3D poses from one image each, trained from several views without 3D labels."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from tritool.models import _views
from tritool.models.pose_resnet import PoseResNet
from tritool.models.reconstruct import Reconstruction, reconstruct_pose
from tritool.ops import _check, soft_argmax25d
from tritool.skeletons import HUMAN36M_JOINTS

__all__ = ["WeakOutput", "WeaklySupervisedPose"]

# Standard deviation of the depth maps' weights, times the root of their number.
_INITIAL_DEPTH = 0.5


@dataclass(frozen=True, eq=False)
class WeakOutput:
    """What a `WeaklySupervisedPose` makes of images of any batch dimensions, `[...]`.

    Attributes:
        keypoints_2d: `[..., J, 2]`, pixels (x, y) of the images; NaN where there is no view.
        relative_depth: `[..., J]`, depth minus that of the root, in units of the known length.
        pose: `[..., J, 3]`, coordinates of the image's own camera, in units of the known length:
            of a person of unknown size.
        root_depth: `[...]`, depth of the root in the same unit.
        discriminant: `[...]`, of the equation that gave it, see `reconstruct_pose`.
        confidences: `[..., J]` in [0, 1], without gradient: how sure the heat map is of its joint;
            0 where there is no view.
        valid: `[...]`, boolean: the pose is determined. Leave the others out of losses.
        heatmaps: `[..., J, H/4, W/4]`, before the softmax; without meaning where there is no view.
        depth_maps: `[..., J, H/4, W/4]`, depths before that of the root is subtracted; likewise.
    """

    keypoints_2d: Tensor
    relative_depth: Tensor
    pose: Tensor
    root_depth: Tensor
    discriminant: Tensor
    confidences: Tensor
    valid: Tensor
    heatmaps: Tensor
    depth_maps: Tensor

    @property
    def keypoints_3d(self) -> Tensor:
        """`pose`, under the name that it has in the outputs of the other networks."""
        return self.pose


torch.export.register_dataclass(WeakOutput, serialized_type_name="tritool.WeakOutput")


class WeaklySupervisedPose(nn.Module):
    r"""A 3D pose up to scale from every single image, differentiable from pixels to coordinates.

    The 2.5D model of Iqbal, Molchanov, Kautz, "Weakly-Supervised 3D Human Pose Learning via
    Multi-view Images in the Wild" (CVPR 2020): a heat map and a map of depths for each joint; the
    soft-argmax reads both; the intrinsics of the image and one length of the body, that of the
    pair, give the pose by `reconstruct_pose`. Extrinsics never enter: the losses of
    `tritool.losses` compare the views of a person without them. The trunk here is that of
    `PoseResNet`, with 2 J channels, heat maps first.

    Args:
        num_joints: J.
        depth: Of the backbone: 18, 34, 50, 101 or 152.
        backbone: The network to use in place of a new one, with `num_joints` 2 J; then `depth`,
            `width`, `deconv_channels` and `checkpointing` have no meaning. Branches of confidences
            are frozen.
        root: The joint that depths are relative to. None: the pelvis of
            `tritool.skeletons.HUMAN36M_JOINTS`, for 17 joints only.
        pair: The two joints of the known length. None: neck and pelvis of the same joints.
        length: The known length; it sets the unit of poses and depths.
        inverse_temperature: :math:`\lambda`, the factor of the heat maps before the softmax. 20
            reads Gaussians with the sigma of `tritool.losses.heatmap_mse` to 0.05 cells; 100, as in
            learnable triangulation, to 0.3: the softmax is then narrower than a cell.
        confidence: "peak": the heat map's value at the predicted joint, as in the paper, for maps
            that are trained to be Gaussians of height 1 (`tritool.losses.heatmap_mse`); "mass": the
            softmax's mass within 2 cells of it along each axis, for maps of any height
            (`tritool.losses.heatmap_cross_entropy`). Of two peaks the mean lies between, where
            there is little of either.
        learnable_temperature: Learn a factor of :math:`\lambda` for each joint, 1 at first.
        width: Channels of the backbone's first convolution.
        deconv_channels: Channels of the backbone's transposed convolutions.
        checkpointing: Less memory in training, as for `PoseResNet`.
        min_spread: As for `reconstruct_pose`.
        min_ratio: As for `reconstruct_pose`; the default is a pair 6 degrees from being seen
            end-on.
        depth_range: As for `reconstruct_pose`, in units of `length`.

    Raises:
        TypeError: `backbone` is not a `PoseResNet`.
        ValueError: A number does not fit, or `root` or `pair` is missing.

    Example:
        >>> network = WeaklySupervisedPose(17, 18, width=8, deconv_channels=16).eval()
        >>> K = torch.tensor([[500.0, 0, 80], [0, 500, 64], [0, 0, 1]])
        >>> output = network(torch.zeros(2, 4, 3, 128, 160), K)
        >>> output.pose.shape, output.valid.shape
        (torch.Size([2, 4, 17, 3]), torch.Size([2, 4]))
    """

    def __init__(
        self,
        num_joints: int = 17,
        depth: int = 50,
        *,
        backbone: PoseResNet | None = None,
        root: int | None = None,
        pair: tuple[int, int] | None = None,
        length: float = 1.0,
        inverse_temperature: float = 20.0,
        confidence: Literal["peak", "mass"] = "peak",
        learnable_temperature: bool = False,
        width: int = 64,
        deconv_channels: int = 256,
        checkpointing: bool = False,
        min_spread: float = 1e-6,
        min_ratio: float = 0.01,
        depth_range: tuple[float, float] | None = (1.0, 100.0),
    ) -> None:
        super().__init__()
        if num_joints < 2:
            raise ValueError(f"num_joints must be at least 2, got {num_joints}")
        names = HUMAN36M_JOINTS
        for name, value in (("root", root), ("pair", pair)):
            if value is None and num_joints != len(names):
                raise ValueError(
                    f"{name} must be given unless num_joints is {len(names)}, got {num_joints}"
                )
        root = names.index("pelvis") if root is None else root
        pair = (names.index("neck"), names.index("pelvis")) if pair is None else pair
        if not 0 <= root < num_joints:
            raise ValueError(f"root must be a joint from 0 to {num_joints - 1}, got {root}")
        own = backbone is None
        backbone = _views.made_backbone(
            backbone,
            depth,
            2 * num_joints,
            width=width,
            deconv_channels=deconv_channels,
            checkpointing=checkpointing,
        )
        self.num_joints = num_joints
        self.root = root
        self.pair = pair
        self.length = _check.positive_number("length", length)
        self.inverse_temperature = _check.positive_number(
            "inverse_temperature", inverse_temperature
        )
        _check.one_of("confidence", confidence, ("peak", "mass"))
        self.confidence = confidence
        self.min_spread, self.min_ratio, self.depth_range = min_spread, min_ratio, depth_range
        self.log_temperature_factor = (
            nn.Parameter(torch.zeros(num_joints)) if learnable_temperature else None
        )
        self.backbone = backbone
        if own:
            # At flat poses neither sign of the depths is better, so that views alone lead away from
            # there very slowly: depths start at random, of about half a length.
            weights = backbone.final_layer.weight[num_joints:]
            with torch.no_grad():
                nn.init.normal_(weights, std=_INITIAL_DEPTH / math.sqrt(weights[0].numel()))
        _views.freeze(backbone.alg_confidences)
        _views.freeze(backbone.vol_confidences)
        # No image at all: the guards are checked where they are used.
        self._reconstructed(torch.zeros(0, num_joints, 2), torch.zeros(0, num_joints), torch.eye(3))

    def forward(
        self,
        images: Tensor,
        intrinsics: Tensor,
        *,
        views: Tensor | None = None,
        hold_2d: bool = False,
    ) -> WeakOutput:
        """The pose in every image; no image knows of another.

        Args:
            images: `[..., 3, H, W]` with at least one batch dimension: `[N, 3, H, W]`, or
                `[B, C, 3, H, W]` for C views; H and W multiples of 32. Values as the weights expect
                them: see `normalize_images`.
            intrinsics: `[..., 3, 3]`, float32 or float64, of these images: those of the whole image
                after its crop and scaling (`Cameras.crop`, `Cameras.resize`,
                `augmented_intrinsics`). The batch broadcasts to that of the images.
            views: `[...]`, boolean; False: the view is absent, and neither its image nor its
                intrinsics are looked at. (In training, batch norm sees a blank image there.)
            hold_2d: No gradient from joints, depths and pose to the heat maps: what is asked of a
                pose then moves depths alone. `heatmaps` itself has its gradient.

        Returns:
            The poses, and what they were made of. Everything is float32 or float64, under autocast
            too.

        Raises:
            TypeError: An argument is no tensor or has another dtype.
            ValueError: Shapes or devices do not fit.
        """
        self._check(images, intrinsics, views)
        output = self.backbone(_views.without_absent(images, views))
        maps = _views.at_least_float32(output.heatmaps)
        heatmaps, depth_maps = (
            maps[..., : self.num_joints, :, :],
            maps[..., self.num_joints :, :, :],
        )
        logits = heatmaps
        if self.log_temperature_factor is not None:
            logits = heatmaps * self.log_temperature_factor.exp()[:, None, None]
        if hold_2d:
            logits = logits.detach()
        read = soft_argmax25d(logits, depth_maps, inverse_temperature=self.inverse_temperature)
        cells, depths = read[..., :2], read[..., 2]
        if self.confidence == "peak":
            confidences = _values_at(heatmaps.detach(), cells.detach()).clamp(0, 1)
        else:
            probabilities = (self.inverse_temperature * logits.detach()).flatten(-2).softmax(-1)
            confidences = _mass_near(probabilities.view(logits.shape), cells.detach())
        pixels = _views.image_from_heatmap(cells, heatmaps.shape[-2:], images.shape[-2:])
        relative = depths - depths[..., self.root, None]
        if views is not None:
            pixels = torch.where(views[..., None, None], pixels, torch.nan)
            relative = torch.where(views[..., None], relative, torch.nan)
            confidences = torch.where(views[..., None], confidences, 0)
        found = self._reconstructed(pixels, relative, intrinsics)
        return WeakOutput(
            keypoints_2d=pixels,
            relative_depth=relative,
            pose=found.pose,
            root_depth=found.root_depth,
            discriminant=found.discriminant,
            confidences=confidences,
            valid=found.valid,
            heatmaps=heatmaps,
            depth_maps=depth_maps,
        )

    def _reconstructed(
        self, pixels: Tensor, relative_depth: Tensor, intrinsics: Tensor
    ) -> Reconstruction:
        return reconstruct_pose(
            pixels,
            relative_depth,
            intrinsics,
            pair=self.pair,
            length=self.length,
            min_spread=self.min_spread,
            min_ratio=self.min_ratio,
            depth_range=self.depth_range,
        )

    def _check(self, images: Tensor, intrinsics: Tensor, views: Tensor | None) -> None:
        for name, value in (("images", images), ("intrinsics", intrinsics)):
            if not isinstance(value, Tensor):
                raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
        if not images.is_floating_point():
            raise TypeError(
                f"images must be floating-point, got {images.dtype}; normalize_images makes them so"
            )
        if intrinsics.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"intrinsics must be float32 or float64, got {intrinsics.dtype}")
        batch = images.shape[:-3]
        shape = tuple(intrinsics.shape)
        fits = intrinsics.dim() >= 2 and shape[-2:] == (3, 3) and len(shape) - 2 <= len(batch)
        if not fits or any(
            n not in (1, m) for n, m in zip(shape[-3::-1], reversed(batch), strict=False)
        ):
            raise ValueError(
                f"intrinsics must be [..., 3, 3] and broadcast to the batch {tuple(batch)} of "
                f"images, got {shape}"
            )
        if intrinsics.device != images.device:
            raise ValueError(
                f"intrinsics must be on the device of images, {images.device}, "
                f"got {intrinsics.device}"
            )
        if views is None:
            return
        if not isinstance(views, Tensor) or views.dtype != torch.bool:
            got = views.dtype if isinstance(views, Tensor) else type(views).__name__
            raise TypeError(f"views must be a boolean tensor or None, got {got}")
        if views.shape != batch or views.device != images.device:
            raise ValueError(
                f"views must be {tuple(batch)} as the batch of images, on {images.device}, "
                f"got {tuple(views.shape)} on {views.device}"
            )


def _values_at(maps: Tensor, points: Tensor) -> Tensor:
    """Values [..., J] between the cells of maps [..., J, H, W]; 0 at points that are not finite."""
    height, width = maps.shape[-2:]
    known = points.isfinite().all(-1)
    x, y = torch.where(known[..., None], points, 0).unbind(-1)
    left, top = x.floor().clamp(0, max(width - 2, 0)), y.floor().clamp(0, max(height - 2, 0))
    right, bottom = (left + 1).clamp(max=width - 1), (top + 1).clamp(max=height - 1)
    corners = torch.stack(
        [top * width + left, top * width + right, bottom * width + left, bottom * width + right], -1
    )
    a, b, c, d = maps.flatten(-2).gather(-1, corners.long()).unbind(-1)
    across, down = (x - left).clamp(0, 1), (y - top).clamp(0, 1)
    upper, lower = a + across * (b - a), c + across * (d - c)
    return torch.where(known, upper + down * (lower - upper), 0)


def _mass_near(probabilities: Tensor, points: Tensor, radius: float = 2.0) -> Tensor:
    """The sum [..., J] of cells of [..., J, H, W] within the radius along each axis of points."""

    def near(place: Tensor, size: int) -> Tensor:
        cells = torch.arange(size, dtype=place.dtype, device=place.device)
        # Fading over one cell, so that it does not jump with the joint.
        return (radius + 0.5 - (cells - place[..., None]).abs()).clamp(0, 1)

    height, width = probabilities.shape[-2:]
    x, y = points.unbind(-1)
    # Not a matmul: autocast and TF32 would round it.
    columns = (probabilities * near(x, width)[..., None, :]).sum(-1)
    # A place that is not finite comes of a map that is not: no confidence.
    return (columns * near(y, height)).sum(-1).nan_to_num(0.0).clamp(0, 1)
