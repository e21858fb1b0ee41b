# SPDX-License-Identifier: Apache-2.0
"""Two sources of samples for learning without 3D labels, and a memory for samples.

Iqbal, Molchanov, Kautz (CVPR 2020): images with 2D joints, and views of people without any label.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, Protocol, TypeVar

import torch
from torch import Tensor
from torch.utils.data import Dataset

from tritool.cameras import Cameras
from tritool.data.sample import Sample

__all__ = ["Labels", "Mixture", "Portion", "Remembered"]

Labels = Literal["none", "2d", "3d"]
_T = TypeVar("_T", covariant=True)


class _Sized(Protocol[_T]):
    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> _T: ...


@dataclass(frozen=True)
class Portion:
    """Neighbours in a data set of which every step of training sees the same number.

    Attributes:
        length: How many samples; the portions of a data set follow each other.
        share: How many of them come in a row before it is the next portion's turn.
    """

    length: int
    share: int = 1


class Mixture(Dataset[Sample]):
    """Labelled images first, then samples of several views, in one data set.

    What a source is not to be known for is not there: the labelled images have no 3D joints, and
    the views only the labels asked for. Extrinsics are there with 3D labels only; without, every
    camera is at the origin of a world of its own.

    Args:
        labelled: Samples with 2D joints, of one view each or more.
        multi_view: Samples of at least two views.
        labels: What is known of the latter.
        images: How many labelled samples a batch has for each of several views.

    Attributes:
        portions: The two sources, for `tritool.training`: every batch is the same mixture.

    Raises:
        ValueError: `images` is less than 1.
    """

    def __init__(
        self,
        labelled: _Sized[Sample],
        multi_view: _Sized[Sample],
        *,
        labels: Labels = "none",
        images: int = 4,
    ) -> None:
        if images < 1:
            raise ValueError(f"images must be at least 1, got {images}")
        if labels not in ("none", "2d", "3d"):
            raise ValueError(f"labels must be none, 2d or 3d, got {labels!r}")
        self.labelled, self.multi_view, self.labels = labelled, multi_view, labels
        self.portions = (Portion(len(labelled), images), Portion(len(multi_view)))

    def __len__(self) -> int:
        """The number of samples of both sources."""
        return len(self.labelled) + len(self.multi_view)

    def __getitem__(self, index: int) -> Sample:
        """One sample, with the labels that it is to have; its index is that of the mixture."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"index must be in a mixture of {len(self)} samples, got {index}")
        index, count = index % len(self), len(self.labelled)
        if index < count:
            return replace(_with_labels(self.labelled[index], "2d"), index=index)
        return replace(_with_labels(self.multi_view[index - count], self.labels), index=index)


class Remembered(Dataset[Sample]):
    """Samples that are made once and then kept in memory.

    With workers each of them remembers what it has made itself.

    Args:
        data: The samples; they must be the same each time.
    """

    def __init__(self, data: _Sized[Sample]) -> None:
        self.data = data
        self._made: dict[int, Sample] = {}

    def __len__(self) -> int:
        """The number of samples."""
        return len(self.data)

    def __getitem__(self, index: int) -> Sample:
        """One sample."""
        if index not in self._made:
            self._made[index] = self.data[index]
        return self._made[index]


def _with_labels(sample: Sample, labels: Labels) -> Sample:
    if labels == "3d":
        return sample
    cameras = sample.cameras
    count = len(cameras)
    known = labels == "2d"
    return replace(
        sample,
        cameras=Cameras(
            cameras.K,
            torch.eye(3, dtype=cameras.K.dtype).expand(count, 3, 3),
            torch.zeros(count, 3, dtype=cameras.K.dtype),
            distortion=cameras.distortion,
            lens=cameras.lens,
            image_size=cameras.image_size,
            names=cameras.names,
        ),
        keypoints_3d=_nothing(sample.keypoints_3d),
        keypoints_2d=sample.keypoints_2d if known else _nothing(sample.keypoints_2d),
        visibility=sample.visibility if known else torch.zeros_like(sample.visibility),
    )


def _nothing(joints: Tensor) -> Tensor:
    return torch.full_like(joints, torch.nan)
