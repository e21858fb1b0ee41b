# SPDX-License-Identifier: Apache-2.0
"""Volumetric triangulation: features of all views in one volume, and a 3D network on it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tritool.grid import VoxelGrid
from tritool.models import _views
from tritool.models.algebraic import AlgebraicTriangulation
from tritool.models.pose_resnet import PoseResNet
from tritool.models.v2v import V2V
from tritool.ops import soft_argmax3d, unproject

__all__ = ["VolumetricOutput", "VolumetricTriangulation"]

# The network's aggregations as those of `unproject`; which of them weigh views by confidences.
_AGGREGATIONS = {"sum": "sum", "mean": "mean", "conf": "sum", "softmax": "softmax", "max": "max"}
_CONFIDENT = ("mean", "conf")
_OUTSIDE = ("zeros", "exclude")
_MULTIPLE = 32  # V2V halves a side five times
_OFFICIAL_PELVIS = 6

Vector = tuple[int, int, int]


@dataclass(frozen=True, eq=False)
class VolumetricOutput:
    """What a `VolumetricTriangulation` makes of B scenes of C views.

    Attributes:
        keypoints_3d: `[B, J, 3]`, world units; NaN without a view or without a centre.
        volumes: `[B, J, X, Y, Z]`, before the softmax.
        grid: Where the voxels lie in the world; NaN without a centre.
        centers: `[B, 3]`, of the grid, world units.
        features: `[B, C, K, H/4, W/4]`, the maps that were unprojected; without meaning where there
            is no view.
        confidences: `[B, C, K]`, the weights of the views, before the division by their sum in
            `"mean"`; 0 where there is no view. None with an aggregation that uses none.
    """

    keypoints_3d: Tensor
    volumes: Tensor
    grid: VoxelGrid
    centers: Tensor
    features: Tensor
    confidences: Tensor | None


torch.export.register_dataclass(VolumetricOutput, serialized_type_name="tritool.VolumetricOutput")


class VolumetricTriangulation(nn.Module):
    r"""3D joints from images by unprojection into a cube of voxels and a 3D network.

    The volumetric model of Iskakov et al., "Learnable Triangulation of Human Pose" (ICCV 2019),
    equations (6)-(14): features of a `PoseResNet`, reduced to K channels, are unprojected into a
    cube around the person, the views aggregated, a `V2V` gives a volume for each joint, and its
    soft-argmax is the joint. One view is enough, if the cube's centre is given. Parameters are
    named as in the official checkpoints (`backbone.*`, `process_features.*`, `volume_net.*`).

    The cube stands upright: its second axis (index j) points up, the first has the direction given
    by an angle about the vertical, random in training. So weights do not know which axis of the
    world points up: trained with `vertical="z"`, they serve in a world with `vertical="-y"`.

    The backbone's 2D head (`final_layer`) and branches of confidences that are not used are frozen:
    no gradient would reach them.

    Args:
        num_joints: J.
        depth: Of the backbone: 18, 34, 50, 101 or 152.
        volume_size: Voxels along an edge, a multiple of 32; 64 in the paper.
        side: The cube's edge in world units, 2.5 metres in the paper.
        aggregation: `"sum"` (8); `"mean"`, with confidences (9), called `conf_norm` in the official
            code; `"conf"`, the sum weighted by confidences without a division; `"softmax"`
            (10)-(11); `"max"`.
        inverse_temperature: Of the volumes' softmax, 1 in the paper.
        official_conventions: Compute as the official code does, whose weights expect it: outermost
            voxel centres on the cube's faces, its mapping of pixels (`unproject`'s `"official"`, no
            shift by half a pixel), the cube's axes along the world's (`upright=False`).
        backbone: The network to use in place of a new one; then `depth`, `width` and
            `deconv_channels` have no meaning.
        algebraic: The model whose pelvis is the cube's centre where none is given. It is put into
            evaluation mode, moves with this network (`to`, `double`, ...) and is no part of its
            parameters or state dict: save it on its own.
        volume_channels: K, 32 in the paper.
        v2v_width: Channels of the 3D network at full resolution, 32 in the paper.
        v2v_front_width: Channels of its first convolution; default: half of `v2v_width`, as in the
            paper.
        vertical: Which direction of the world points up: `"x"`, `"y"`, `"z"`, `"-x"`, `"-y"`,
            `"-z"`. Human3.6M: `"z"`; CMU Panoptic, whose y points down: `"-y"`.
        pelvis: The joint of `algebraic` that is the centre, or several, for their mean. Default: 0,
            or with `official_conventions` 6, the pelvis in the official order of joints.
        random_rotation: In training turn each cube about the vertical by a random angle.
        upright: False: the cube's axes are those of the world, in order, at angle 0. Default: True,
            with `official_conventions` False. (True with `vertical="z"` is the official code's way
            to use weights trained in a world whose second axis is vertical.)
        width: Channels of the backbone's first convolution.
        deconv_channels: Channels of the backbone's transposed convolutions.
        outside: What a view means to a voxel that it does not see, as for `unproject`: `"zeros"`
            (the paper) or `"exclude"`.
        checkpointing: Less memory in training, as for `PoseResNet` and `V2V`.

    Raises:
        TypeError: `backbone` or `algebraic` is of another class.
        ValueError: A number or an option does not fit, or `backbone` has other joints or lacks the
            branch of confidences.

    Example:
        >>> network = VolumetricTriangulation(
        ...     5, 18, 32, width=4, deconv_channels=8, volume_channels=4, v2v_width=2
        ... ).eval()
        >>> images, projections = torch.zeros(2, 4, 3, 64, 96), torch.rand(2, 4, 3, 4)
        >>> output = network(images, projections, centers=torch.zeros(2, 3))
        >>> output.keypoints_3d.shape, output.volumes.shape
        (torch.Size([2, 5, 3]), torch.Size([2, 5, 32, 32, 32]))
    """

    def __init__(
        self,
        num_joints: int = 17,
        depth: int = 152,
        volume_size: int = 64,
        side: float = 2500.0,
        aggregation: str = "softmax",
        inverse_temperature: float = 1.0,
        official_conventions: bool = False,
        *,
        backbone: PoseResNet | None = None,
        algebraic: AlgebraicTriangulation | None = None,
        volume_channels: int = 32,
        v2v_width: int = 32,
        v2v_front_width: int | None = None,
        vertical: str = "z",
        pelvis: int | Sequence[int] | None = None,
        random_rotation: bool = True,
        upright: bool | None = None,
        width: int = 64,
        deconv_channels: int = 256,
        outside: str = "zeros",
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        _views.one_of("aggregation", aggregation, tuple(_AGGREGATIONS))
        _views.one_of("vertical", vertical, tuple(_DIRECTIONS))
        _views.one_of("outside", outside, _OUTSIDE)
        if official_conventions and outside != "zeros":
            raise ValueError(f"outside must be 'zeros' with official_conventions, got {outside!r}")
        if volume_size < _MULTIPLE or volume_size % _MULTIPLE:
            raise ValueError(f"volume_size must be a multiple of {_MULTIPLE}, got {volume_size}")
        if volume_channels < 1:
            raise ValueError(f"volume_channels must be at least 1, got {volume_channels}")
        self.side = _views.positive("side", side)
        self.inverse_temperature = _views.positive("inverse_temperature", inverse_temperature)
        use_confidences = aggregation in _CONFIDENT
        backbone = _views.made_backbone(
            backbone,
            depth,
            num_joints,
            volumetric_confidences=volume_channels if use_confidences else 0,
            width=width,
            deconv_channels=deconv_channels,
            checkpointing=checkpointing,
        )
        if use_confidences:
            _check_branch(backbone, volume_channels)
        self.num_joints = num_joints
        self.volume_size = volume_size
        self.aggregation = aggregation
        self.use_confidences = use_confidences
        self.official_conventions = official_conventions
        self.random_rotation = random_rotation
        self.outside = outside
        self._entries = _frame_entries(
            _DIRECTIONS[vertical], not official_conventions if upright is None else upright
        )

        self.backbone = backbone
        self.process_features = nn.Sequential(
            nn.Conv2d(backbone.feature_channels, volume_channels, 1)
        )
        self.volume_net = V2V(
            volume_channels,
            num_joints,
            width=v2v_width,
            front_width=v2v_front_width,
            checkpointing=checkpointing,
        )
        _views.freeze(backbone.final_layer)
        _views.freeze(backbone.alg_confidences)
        if not use_confidences:
            _views.freeze(backbone.vol_confidences)

        if pelvis is None:
            pelvis = _OFFICIAL_PELVIS if official_conventions else 0
        self.pelvis = (pelvis,) if isinstance(pelvis, int) else tuple(pelvis)
        # In a tuple it is no submodule: not saved, not trained, not waited for.
        self._algebraic: tuple[AlgebraicTriangulation, ...] = ()
        if algebraic is not None:
            _check_pelvis(algebraic, self.pelvis)
            self._algebraic = (algebraic.eval(),)

    @property
    def algebraic(self) -> AlgebraicTriangulation | None:
        """The model whose pelvis is the cube's centre where none is given."""
        return self._algebraic[0] if self._algebraic else None

    def _apply(
        self, fn: Callable[[Tensor], Tensor], recurse: bool = True
    ) -> VolumetricTriangulation:
        """What `to`, `cuda`, `double` and their like call: the algebraic model goes along."""
        if recurse:
            for model in self._algebraic:
                model._apply(fn)  # type: ignore[no-untyped-call]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def forward(
        self,
        images: Tensor,
        projections: Tensor,
        centers: Tensor | None = None,
        *,
        views: Tensor | None = None,
        rotation: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> VolumetricOutput:
        """The 3D joints of every scene.

        Args:
            images: `[B, C, 3, H, W]`; H and W multiples of 32, with confidences at least 128.
                Values as the weights expect them: see `normalize_images`.
            projections: `[B, C, 3, 4]`, float32 or float64, world to pixels of these images.
            centers: `[B, 3]`, float32 or float64, the cubes' centres in world units, about the
                persons' pelvises. NaN: the joints of that scene are NaN. Default: what `algebraic`
                finds in these images, without gradient.
            views: `[B, C]`, boolean; False: the view is absent, and neither its image nor its
                projection is looked at. (In training, batch norm sees a blank image there.)
            rotation: `[B]`, the cubes' angles about the direction that points up, radians. Default:
                0, in training with `random_rotation` uniform in the full circle.
            generator: The source of these random angles.

        Returns:
            The joints, and what they were made of. Everything is float32 or float64, under autocast
            too.

        Raises:
            TypeError: An argument is no tensor or has another dtype.
            ValueError: Shapes or devices do not fit, or there is no centre.
        """
        views = _views.checked_views(images, projections, views)
        batch = images.shape[0]
        for name, value, shape in (("centers", centers, (3,)), ("rotation", rotation, ())):
            _views.check_extra(name, value, (batch, *shape), images)
        if centers is None:
            centers = self._estimated_centers(images, projections, views)
        dtype = torch.promote_types(projections.dtype, centers.dtype)
        centers = centers.to(dtype)
        angles = self._angles(rotation, generator, centers)

        # A scene without centre is computed at the origin: NaN would reach batch norm.
        located = (centers.isfinite().all(-1) & angles.isfinite())[:, None]
        grid = VoxelGrid.cube(
            torch.where(located, centers, 0),
            self.side,
            self.volume_size,
            self._frames(torch.where(located[:, 0], angles, 0)),
            corner_aligned=self.official_conventions,
        )
        output = self.backbone(_views.without_absent(images, views))
        features = self.process_features(output.features.flatten(0, 1))
        features = features.unflatten(0, images.shape[:2])
        confidences = output.volumetric_confidences if self.use_confidences else None
        if confidences is not None:
            confidences = _views.at_least_float32(confidences)
            if views is not None:
                confidences = torch.where(views[..., None], confidences, 0)
        weights = confidences
        if weights is None and views is not None:
            weights = views.to(dtype)
        volumes = unproject(
            features,
            _views.heatmap_projections(
                projections,
                features.shape[-2:],
                images.shape[-2:],
                official=self.official_conventions,
            ),
            grid,
            aggregation=_AGGREGATIONS[self.aggregation],
            confidences=weights,
            outside=self.outside,
            sampling="official" if self.official_conventions else "center",
        )
        volumes = _views.at_least_float32(self.volume_net(volumes))
        keypoints_3d = soft_argmax3d(
            volumes, inverse_temperature=self.inverse_temperature, grid=grid
        )
        known = located if views is None else located & views.any(1, keepdim=True)
        return VolumetricOutput(
            keypoints_3d=torch.where(known[..., None], keypoints_3d, torch.nan),
            volumes=volumes,
            grid=VoxelGrid(torch.where(located, grid.origin, torch.nan), grid.axes, grid.size),
            centers=centers,
            features=_views.at_least_float32(features),
            confidences=confidences,
        )

    def _estimated_centers(
        self, images: Tensor, projections: Tensor, views: Tensor | None
    ) -> Tensor:
        """The pelvises `[B, 3]` of the algebraic model."""
        if not self._algebraic:
            raise ValueError(
                "centers must be given, [B, 3], to a network built without an algebraic model, "
                "got None"
            )
        if images.shape[1] < 2:
            raise ValueError(
                "centers must be given, [B, 3], with fewer than two views, as these cannot be "
                "triangulated, got None"
            )
        with torch.no_grad():
            joints = self._algebraic[0](images, projections, views=views).keypoints_3d
        return torch.stack([joints[:, joint] for joint in self.pelvis]).mean(0)

    def _angles(
        self, rotation: Tensor | None, generator: torch.Generator | None, centers: Tensor
    ) -> Tensor:
        """The cubes' angles `[B]`."""
        if rotation is not None:
            return rotation.to(centers.dtype)
        if not (self.training and self.random_rotation):
            return torch.zeros_like(centers[:, 0])
        device = centers.device if generator is None else generator.device
        turns = torch.rand(
            centers.shape[0], dtype=centers.dtype, device=device, generator=generator
        )
        return 2 * math.pi * turns.to(centers.device, non_blocking=True)

    def _frames(self, angles: Tensor) -> Tensor:
        """The cubes' axes `[B, 3, 3]` at these angles, one in each column."""
        cos, sin = angles.cos(), angles.sin()
        zero, one = torch.zeros_like(angles), torch.ones_like(angles)
        terms = {"0": zero, "1": one, "-1": -one, "c": cos, "-c": -cos, "s": sin, "-s": -sin}
        return torch.stack([terms[name] for name in self._entries], -1).reshape(-1, 3, 3)


# ---- The cube's frame ----

_DIRECTIONS: dict[str, Vector] = {
    "x": (1, 0, 0),
    "y": (0, 1, 0),
    "z": (0, 0, 1),
    "-x": (-1, 0, 0),
    "-y": (0, -1, 0),
    "-z": (0, 0, -1),
}


def _frame_entries(up: Vector, upright: bool) -> tuple[str, ...]:
    """The nine entries of a cube's axes, row by row, that stands on the plane below `up`.

    "0", "1", "c" and "s" for 0, 1, the cosine and the sine of its angle about `up`, with signs: the
    axes at angle 0 are axes of the world or opposite to them, so no entry is a sum.
    """
    columns: tuple[Vector, ...] = ((1, 0, 0), (0, 1, 0), (0, 0, 1))
    if upright:
        first: Vector = (1, 0, 0) if up[0] == 0 else (0, 1, 0)
        columns = (first, up, _cross(first, up))
    entries = [["0"] * 3 for _ in range(3)]
    for column, axis in enumerate(columns):
        along = sum(a * b for a, b in zip(axis, up, strict=True))
        side = _cross(up, axis)  # where the axis is after a quarter turn
        for row in range(3):
            terms = (("1", along * up[row]), ("c", axis[row] - along * up[row]), ("s", side[row]))
            for name, factor in terms:
                if factor:
                    entries[row][column] = name if factor > 0 else f"-{name}"
    return tuple(entry for row in entries for entry in row)


def _cross(a: Vector, b: Vector) -> Vector:
    return (
        a[1] * b[2] - a[2] * b[1],
        a[2] * b[0] - a[0] * b[2],
        a[0] * b[1] - a[1] * b[0],
    )


# ---- Checks ----


def _check_branch(backbone: PoseResNet, channels: int) -> None:
    """Raises if a backbone lacks the confidences that the aggregation needs."""
    branch = backbone.vol_confidences
    count = 0 if branch is None else branch.head[-1].out_features
    if count != channels:
        raise ValueError(
            f"backbone must have volumetric_confidences = volume_channels = {channels} "
            f"with this aggregation, got {count}"
        )


def _check_pelvis(algebraic: AlgebraicTriangulation, pelvis: tuple[int, ...]) -> None:
    """Raises if the model that finds the centre is none, or has no such joints."""
    if not isinstance(algebraic, AlgebraicTriangulation):
        raise TypeError(
            f"algebraic must be an AlgebraicTriangulation or None, got {type(algebraic).__name__}"
        )
    joints = algebraic.num_joints
    if not pelvis or any(not 0 <= joint < joints for joint in pelvis):
        raise ValueError(
            f"pelvis must be joints of the algebraic model, 0 to {joints - 1}, got {pelvis}"
        )
