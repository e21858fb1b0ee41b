# SPDX-License-Identifier: Apache-2.0
"""Runs methods over the same samples, with all views and with fewer, and keeps what they found.

Knows neither configurations nor checkpoints: a method is a function of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from tritool.data.sample import Batch, Sample, collate

__all__ = [
    "ALL_VIEWS",
    "Estimate",
    "Found",
    "Interval",
    "PixelScore",
    "Truth",
    "ViewedSamples",
    "bootstrap",
    "draw_views",
    "hidden_joints",
    "measure",
    "paired_errors",
]

# The number of views that stands for all a sample has.
ALL_VIEWS = 0
# How many samples are looked at to learn how many cameras there are.
_LOOKED_AT = 16
_RESAMPLES = 10_000


class Estimate(Protocol):
    """What a method gives for a batch of B samples with C views."""

    @property
    def keypoints_3d(self) -> Tensor:
        """`[B, J, 3]`, millimetres, NaN where there is no prediction."""

    @property
    def keypoints_2d(self) -> Tensor | None:
        """`[B, C, J, 2]`, pixels of the crops; None for a method without."""


Method = Callable[[Batch], Estimate]


class ViewedSamples(Protocol):
    """A data set: what has a length and gives samples."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Sample: ...


@dataclass(frozen=True, eq=False)
class Truth:
    """What is known of F samples.

    Attributes:
        keypoints_3d: `[F, J, 3]`, float64, millimetres; NaN where not known.
        hidden: `[F, J]`, boolean: `hidden_joints` of each sample.
        views: `[F]`, how many views each sample has.
        cameras: `[F]`, how many cameras, with those whose view is absent.
        indices: F positions in the data set.
        subjects: F names.
        actions: F names.
        joint_names: J names.
    """

    keypoints_3d: Tensor
    hidden: Tensor
    views: Tensor
    cameras: Tensor
    indices: tuple[int, ...]
    subjects: tuple[str, ...]
    actions: tuple[str, ...]
    joint_names: tuple[str, ...]


@dataclass(frozen=True)
class PixelScore:
    """The 2D error of one kind of joints, over all views.

    Args:
        mean: Pixels of the crops; None where no joint counts.
        median: Likewise.
        joints: How many joints of all views the two are over.
        missing: How many more have a true place but no read-out.
    """

    mean: float | None
    median: float | None
    joints: int
    missing: int


@dataclass(frozen=True, eq=False)
class Found:
    """What a method found, with so many views of each of F samples.

    Attributes:
        keypoints_3d: `[F, J, 3]`, float64, millimetres; NaN where it found nothing.
        pixels: 2D errors by kind of joint, "visible", "hidden" and "outside" of the crop; None if
            the method has no 2D joints or was given fewer than all views.
    """

    keypoints_3d: Tensor
    pixels: Mapping[str, PixelScore] | None


@dataclass(frozen=True)
class Interval:
    """A mean and where it would lie had other samples been drawn.

    Args:
        mean: None where no joint counts.
        low: Lower end of the 95 % interval; None for fewer than two poses.
        high: Upper end.
        poses: How many poses the mean is over.
        joints: How many joints of all these poses.
    """

    mean: float | None
    low: float | None
    high: float | None
    poses: int
    joints: int


def draw_views(sample: Sample, count: int, seed: int) -> list[int]:
    """Draws which views of a sample are used: the same for every method.

    The present views are permuted by (seed, the sample's index), and the first are taken: those of
    a smaller count are among those of a larger one.

    Args:
        sample: Its absent views are never drawn.
        count: How many; `ALL_VIEWS`, or more than there are: all.
        seed: Of the permutation.

    Returns:
        Positions in ascending order, for the order of the cameras to stay as it is.
    """
    present = sample.views.nonzero()[:, 0].tolist()
    if count == ALL_VIEWS or count >= len(present):
        return present
    order = np.random.default_rng((seed, sample.index)).permutation(len(present))
    return sorted(present[at] for at in order[:count])


def hidden_joints(sample: Sample) -> Tensor:
    """Tells which joints are hidden in at least half of the views there are.

    Returns:
        `[J]`, boolean. A joint outside of a crop is hidden in it. False where no view is present.
    """
    present = sample.views.sum()
    hidden = (~sample.visibility & sample.views[:, None]).sum(0)
    return (2 * hidden >= present) & (present > 0)


def measure(
    methods: Mapping[str, Method],
    data: ViewedSamples,
    *,
    views: Sequence[int] = (),
    seed: int = 0,
    limit: int | None = None,
    batch_size: int = 8,
    workers: int = 0,
    device: torch.device | str = "cpu",
    progress: Callable[[int], object] | None = None,
) -> tuple[Truth, dict[str, dict[int, Found]]]:
    """Runs methods over the same samples.

    Args:
        methods: By name.
        data: The samples.
        views: Numbers of views to try besides all, each at least 1.
        seed: Of `draw_views`.
        limit: How many samples to take, from the start; None: all.
        batch_size: Samples given to a method at once.
        workers: Processes that prepare samples; 0: none besides this one.
        device: Where batches go to.
        progress: Called with the number of samples done since the last call.

    Returns:
        What is known of the samples; and what each method found, by number of views, `ALL_VIEWS`
        first. Everything is on the CPU.

    Raises:
        ValueError: An option is out of its range; there is no sample; a method gives another number
            of joints than the data have.
    """
    count = _checked_count(data, limit)
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    numbers = [ALL_VIEWS, *_checked_views(views, data, count)]

    samples: list[_Known] = []
    points: dict[str, dict[int, list[Tensor]]] = {
        name: {number: [] for number in numbers} for name in methods
    }
    pixels: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in methods}
    with torch.no_grad():
        for batch in _batches(data, count, batch_size, workers):
            samples += [_Known(sample) for sample in batch]
            whole = collate(batch).to(device)
            for name, method in methods.items():
                estimate = method(whole)
                everything = _checked_points(name, estimate.keypoints_3d, whole)
                if estimate.keypoints_2d is not None:
                    pixels[name].append(_pixel_errors(estimate.keypoints_2d, whole))
                for number in numbers:
                    drawn = [draw_views(sample, number, seed) for sample in batch]
                    present = [sample.views.nonzero()[:, 0].tolist() for sample in batch]
                    if number == ALL_VIEWS or drawn == present:
                        points[name][number].append(everything)
                        continue
                    # Left out instead of masked: it means the same, and takes less time. A sample
                    # without any view keeps its absent ones.
                    pairs = zip(batch, drawn, strict=True)
                    chosen = [sample.select(at) if at else sample for sample, at in pairs]
                    fewer = collate(chosen).to(device)
                    some = _checked_points(name, method(fewer).keypoints_3d, fewer)
                    points[name][number].append(some)
            if progress is not None:
                progress(len(batch))

    found = {
        name: {
            number: Found(
                torch.cat(points[name][number]),
                _pixel_scores(pixels[name]) if number == ALL_VIEWS and pixels[name] else None,
            )
            for number in numbers
        }
        for name in methods
    }
    return _truth(samples), found


def paired_errors(
    found: Mapping[str, Tensor], target: Tensor, error: Callable[[Tensor, Tensor], Tensor]
) -> dict[str, Tensor]:
    """Errors of several methods on the joints that all of them found.

    A method that found not a single joint takes no part: its errors are NaN, the others' do not
    depend on it.

    Args:
        found: Joints `[F, J, 3]` by method, NaN where there is none.
        target: `[F, J, 3]`.
        error: Of joints and target, `[F, J]`; NaN where a joint does not count.

    Returns:
        Errors `[F, J]` by method; NaN where a joint does not count for one of the methods.
    """
    there = {name: points.isfinite().all(-1) for name, points in found.items()}
    common = torch.ones(target.shape[:-1], dtype=torch.bool)
    for some in there.values():
        if some.any():
            common &= some
    errors = {
        name: error(torch.where(common[..., None], points, torch.nan), target)
        for name, points in found.items()
    }
    counts = torch.ones_like(common)
    for name, values in errors.items():
        if there[name].any():
            counts &= ~values.isnan()
    return {name: torch.where(counts, values, torch.nan) for name, values in errors.items()}


def bootstrap(errors: Tensor, *, seed: int = 0) -> Interval:
    """The mean over the joints of each pose, then over poses, with its 95 % interval.

    The interval is between percentiles of the means of 10 000 samples of the poses, drawn with
    replacement (Efron's percentile bootstrap).

    Args:
        errors: `[F, J]`, NaN where a joint does not count.
        seed: Of the drawing; the same for all methods.
    """
    poses = errors.nanmean(-1)
    values = poses[~poses.isnan()].numpy()
    joints = int((~errors.isnan()).sum())
    if len(values) == 0:
        return Interval(None, None, None, 0, 0)
    mean = float(values.mean())
    if len(values) == 1:
        return Interval(mean, None, None, 1, joints)
    random = np.random.default_rng(seed)
    # In parts, for the memory: about a million numbers at once.
    part = max(1, 1_000_000 // len(values))
    means = np.concatenate([
        values[random.integers(len(values), size=(min(part, _RESAMPLES - at), len(values)))].mean(1)
        for at in range(0, _RESAMPLES, part)
    ])  # fmt: skip
    low, high = np.percentile(means, (2.5, 97.5))
    return Interval(mean, float(low), float(high), len(values), joints)


class _Known:
    """What is kept of a sample: no images."""

    def __init__(self, sample: Sample) -> None:
        self.keypoints_3d = sample.keypoints_3d.double()
        self.hidden = hidden_joints(sample)
        self.views, self.cameras = int(sample.views.sum()), len(sample.cameras)
        self.index, self.subject, self.action = sample.index, sample.subject, sample.action
        self.joint_names = sample.joint_names


def _truth(samples: Sequence[_Known]) -> Truth:
    return Truth(
        keypoints_3d=torch.stack([sample.keypoints_3d for sample in samples]),
        hidden=torch.stack([sample.hidden for sample in samples]),
        views=torch.tensor([sample.views for sample in samples]),
        cameras=torch.tensor([sample.cameras for sample in samples]),
        indices=tuple(sample.index for sample in samples),
        subjects=tuple(sample.subject for sample in samples),
        actions=tuple(sample.action for sample in samples),
        joint_names=samples[0].joint_names,
    )


def _batches(
    data: ViewedSamples, count: int, batch_size: int, workers: int
) -> Iterator[list[Sample]]:
    if workers == 0:
        for start in range(0, count, batch_size):
            yield [data[at] for at in range(start, min(start + batch_size, count))]
        return
    from torch.utils.data import DataLoader

    loader: Any = DataLoader(
        data,  # type: ignore[arg-type]  # what a loader needs of a data set, it has
        batch_size,
        sampler=range(count),
        num_workers=workers,
        collate_fn=list,
    )
    yield from loader


def _checked_count(data: ViewedSamples, limit: int | None) -> int:
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}")
    count = len(data) if limit is None else min(limit, len(data))
    if count == 0:
        raise ValueError("the data must have at least one sample, got none")
    return count


def _checked_views(views: Sequence[int], data: ViewedSamples, count: int) -> list[int]:
    if len(set(views)) != len(views) or any(number < 1 for number in views):
        raise ValueError(f"views must be different numbers of at least 1, got {list(views)}")
    if views:
        most = max(len(data[at].cameras) for at in range(min(count, _LOOKED_AT)))
        if max(views) > most:
            raise ValueError(f"views must be at most the {most} of the data, got {max(views)}")
    return list(views)


def _checked_points(name: str, points: Tensor, batch: Batch) -> Tensor:
    if points.shape != batch.keypoints_3d.shape:
        raise ValueError(
            f"{name}: keypoints_3d must be {tuple(batch.keypoints_3d.shape)} as in the data, "
            f"got {tuple(points.shape)}"
        )
    points = points.detach().double().cpu()
    # A point with one infinite coordinate is no point.
    return torch.where(points.isfinite().all(-1, keepdim=True), points, torch.nan)


_KINDS = ("visible", "hidden", "outside")


def _pixel_errors(keypoints_2d: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """2D errors [N], NaN where there is no read-out, and of which kind each joint is."""
    true = batch.keypoints_2d
    high, wide = batch.images.shape[-2:]
    x, y = true.unbind(-1)
    inside = (x >= -0.5) & (x <= wide - 0.5) & (y >= -0.5) & (y <= high - 0.5)
    known = true.isfinite().all(-1) & batch.views[..., None]
    kind = torch.where(batch.visibility, 0, torch.where(inside, 1, 2))
    error = (keypoints_2d.double() - true.double()).norm(dim=-1)
    error = torch.where(error.isfinite(), error, torch.nan)
    return error[known].cpu(), kind[known].cpu()


def _pixel_scores(parts: Sequence[tuple[Tensor, Tensor]]) -> dict[str, PixelScore]:
    errors, kinds = (torch.cat(each) for each in zip(*parts, strict=True))
    scores = {}
    for number, name in enumerate(_KINDS):
        own = errors[kinds == number]
        there = own[~own.isnan()]
        some = there.numel() > 0
        scores[name] = PixelScore(
            mean=float(there.mean()) if some else None,
            # Not torch's median, which is the lower of the two in the middle.
            median=float(np.median(there.numpy())) if some else None,
            joints=there.numel(),
            missing=own.numel() - there.numel(),
        )
    return scores
