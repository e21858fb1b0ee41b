# SPDX-License-Identifier: Apache-2.0
"""What every reader of images gives, one scene at one moment, and how such samples are batched."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from tritool.cameras import Cameras

__all__ = ["Batch", "Sample", "collate"]


@dataclass(frozen=True, eq=False)
class Sample:
    """One person at one moment, seen by C cameras: the contract of every reader.

    Attributes:
        images: `[C, 3, H, W]`, uint8, red, green, blue: the crops around the person.
        cameras: The C cameras of these crops, their `image_size` (W, H).
        keypoints_3d: `[J, 3]`, float32, millimetres in the world; NaN where not known.
        keypoints_2d: `[C, J, 2]`, float32, pixels of the crops as the lenses image them; NaN where
            not known. A joint may lie outside of its crop.
        visibility: `[C, J]`, boolean: the joint is in the crop and nothing hides it.
        views: `[C]`, boolean: False for a camera without an image, whose entries mean nothing.
        boxes: `[C, 4]`, float32, `x0, y0, x1, y1` of the crops, pixels of the full images.
        joint_names: J names.
        index: Which sample of its data set this is.
        subject: Who is seen; may be empty.
        action: What the person does, or which trial it is; may be empty.

    Raises:
        TypeError: A tensor is of another dtype.
        ValueError: Shapes do not fit together.
    """

    images: Tensor
    cameras: Cameras
    keypoints_3d: Tensor
    keypoints_2d: Tensor
    visibility: Tensor
    views: Tensor
    boxes: Tensor
    joint_names: tuple[str, ...]
    index: int = 0
    subject: str = ""
    action: str = ""

    def __post_init__(self) -> None:
        """Checks dtypes and shapes."""
        count, joints = len(self.cameras), len(self.joint_names)
        expected: dict[str, tuple[torch.dtype, tuple[int | None, ...]]] = {
            "images": (torch.uint8, (count, 3, None, None)),
            "keypoints_3d": (torch.float32, (joints, 3)),
            "keypoints_2d": (torch.float32, (count, joints, 2)),
            "visibility": (torch.bool, (count, joints)),
            "views": (torch.bool, (count,)),
            "boxes": (torch.float32, (count, 4)),
        }
        for name, (dtype, shape) in expected.items():
            value = getattr(self, name)
            if value.dtype != dtype:
                raise TypeError(f"{name} must be {dtype}, got {value.dtype}")
            fits = value.ndim == len(shape) and all(
                want in (None, have) for have, want in zip(value.shape, shape, strict=True)
            )
            if not fits:
                wanted = ", ".join("*" if n is None else str(n) for n in shape)
                raise ValueError(f"{name} must be [{wanted}], got {tuple(value.shape)}")

    def select(self, views: Sequence[int] | slice) -> Sample:
        """The same moment in some of the views, in the order asked for.

        Args:
            views: Positions, at least one.
        """
        rows = list(range(len(self.cameras)))[views] if isinstance(views, slice) else list(views)
        chosen = {
            name: getattr(self, name)[rows]
            for name in ("images", "keypoints_2d", "visibility", "views", "boxes")
        }
        return replace(self, cameras=self.cameras.select(rows), **chosen)


@dataclass(frozen=True, eq=False)
class Batch:
    """B samples as tensors, padded to the same number of views C.

    Attributes:
        images: `[B, C, 3, H, W]`, uint8, red, green, blue; zeros where there is no view.
        projections: `[B, C, 3, 4]`, float32, world to pixels of the crops.
        intrinsics: `[B, C, 3, 3]`, float32, of the crops.
        keypoints_3d: `[B, J, 3]`, float32, millimetres; NaN where not known.
        keypoints_2d: `[B, C, J, 2]`, float32, pixels of the crops; NaN where not known.
        visibility: `[B, C, J]`, boolean.
        views: `[B, C]`, boolean: which views there are. Where there is none, projections and
            intrinsics are those of a camera at the origin and the 2D joints are NaN.
        boxes: `[B, C, 4]`, float32, pixels of the full images.
        joint_names: J names.
        indices: B positions in the data set.
        subjects: B names.
        actions: B names.
    """

    images: Tensor
    projections: Tensor
    intrinsics: Tensor
    keypoints_3d: Tensor
    keypoints_2d: Tensor
    visibility: Tensor
    views: Tensor
    boxes: Tensor
    joint_names: tuple[str, ...]
    indices: tuple[int, ...]
    subjects: tuple[str, ...]
    actions: tuple[str, ...]

    def __len__(self) -> int:
        """The number of samples B."""
        return self.images.shape[0]

    def to(self, *args: Any, **kwargs: Any) -> Batch:
        """The batch on another device; arguments as of `torch.Tensor.to`."""
        return self._each(lambda tensor: tensor.to(*args, **kwargs))

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory, as `torch.utils.data.DataLoader` asks for."""
        return self._each(lambda tensor: tensor.pin_memory())

    def _each(self, change: Any) -> Batch:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return Batch(**{k: change(v) if isinstance(v, Tensor) else v for k, v in values.items()})


def collate(samples: Sequence[Sample]) -> Batch:
    """Puts samples together; those of fewer views get absent ones at the end.

    Args:
        samples: At least one; the same joints, and images of the same size. Cameras without lens
            distortion: the networks know projection matrices only.

    Raises:
        ValueError: The samples do not fit together, or a camera has lens distortion.
    """
    if not samples:
        raise ValueError("collate needs at least one sample, got none")
    first = samples[0]
    for sample in samples:
        if sample.cameras.distortion is not None:
            raise ValueError(
                f"sample {sample.index}: images must be undistorted for a network, got cameras "
                f"with lens {sample.cameras.lens!r}"
            )
        if sample.joint_names != first.joint_names:
            raise ValueError(
                f"sample {sample.index} has other joints than sample {first.index}: "
                f"{sample.joint_names} and {first.joint_names}"
            )
        if sample.images.shape[1:] != first.images.shape[1:]:
            raise ValueError(
                f"sample {sample.index} has images of {tuple(sample.images.shape[1:])}, "
                f"sample {first.index} of {tuple(first.images.shape[1:])}"
            )
    most = max(len(sample.cameras) for sample in samples)
    nowhere = torch.eye(3, 4)

    def padded(values: Sequence[Tensor], filler: Tensor | float | bool) -> Tensor:
        shape = (len(values), most, *values[0].shape[1:])
        result = values[0].new_empty(shape)
        result[:] = torch.as_tensor(filler, dtype=result.dtype)
        for row, value in zip(result, values, strict=True):
            row[: len(value)] = value
        return result

    views = padded([sample.views for sample in samples], False)
    projections = padded([sample.cameras.projections.float() for sample in samples], nowhere)
    intrinsics = padded([sample.cameras.K.float() for sample in samples], nowhere[:, :3])
    keypoints_2d = padded([sample.keypoints_2d for sample in samples], torch.nan)
    present = views[..., None, None]
    return Batch(
        images=torch.where(
            present[..., None], padded([sample.images for sample in samples], 0), 0
        ).to(torch.uint8),
        projections=torch.where(present, projections, nowhere),
        intrinsics=torch.where(present, intrinsics, nowhere[:, :3]),
        keypoints_3d=torch.stack([sample.keypoints_3d for sample in samples]),
        keypoints_2d=torch.where(present, keypoints_2d, torch.nan),
        visibility=padded([sample.visibility for sample in samples], False) & views[..., None],
        views=views,
        boxes=padded([sample.boxes for sample in samples], 0.0),
        joint_names=first.joint_names,
        indices=tuple(sample.index for sample in samples),
        subjects=tuple(sample.subject for sample in samples),
        actions=tuple(sample.action for sample in samples),
    )
