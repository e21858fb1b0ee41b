# SPDX-License-Identifier: Apache-2.0
"""Which samples a step sees, and what chance draws in it: from seed and step alone.

A run that starts again at step n therefore sees what it would have seen, and nothing random has to
be kept.
"""

from __future__ import annotations

import signal
from collections.abc import Generator, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from tritool.data.mixture import Portion
from tritool.data.sample import Batch, Sample, collate

__all__ = ["Order", "SizedSamples", "portions_of", "seed_of", "training_batches"]

# What is drawn; each has its own stream of numbers.
ORDER, VIEWS, MODEL = range(3)


class SizedSamples(Protocol):
    """A data set: what has a length and gives samples."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Sample: ...


def seed_of(seed: int, what: int, *numbers: int) -> int:
    """A seed of 63 bits for one of the streams, at one step."""
    state = np.random.SeedSequence((seed, what, *numbers)).generate_state(1, np.uint64)
    return int(state[0]) >> 1


class Order:
    """The order of samples: every epoch a permutation, drawn from the seed and its number.

    Batches are cut from the permutations one after the other, so that one may reach into the next
    epoch and no sample is left out. Portions have permutations of their own and take turns, so that
    every batch, and every part of one, is the same mixture.

    Args:
        portions: Of the data set.
        batch_size: Samples of a step.
        seed: Of the run.
        parts: How many equal parts a batch is cut into; each a multiple of the sum of the shares.

    Raises:
        ValueError: The parts are not such a multiple.
    """

    def __init__(
        self, portions: Sequence[Portion], batch_size: int, seed: int, parts: int = 1
    ) -> None:
        self.portions, self.batch_size, self.seed = tuple(portions), batch_size, seed
        # One round of turns: which portion, and the how manieth of it.
        self._turns = [
            (which, at) for which, each in enumerate(portions) for at in range(each.share)
        ]
        if batch_size % (parts * len(self._turns)):
            shares = " + ".join(str(each.share) for each in portions)
            cut = f" times {parts}, processes times accumulate" if parts > 1 else ""
            raise ValueError(
                f"training.batch_size must be a multiple of {len(self._turns)}, the {shares} "
                f"samples that come in turn{cut}, got {batch_size}"
            )
        lengths = [each.length for each in portions]
        self._starts = [sum(lengths[:which]) for which in range(len(lengths))]
        # The current permutations alone: positions only grow.
        self._epochs = [-1] * len(portions)
        self._permutations = [torch.empty(0, dtype=torch.long)] * len(portions)

    def samples(self, step: int) -> list[int]:
        """Positions in the data set that the step with this number, from 0, sees."""
        first = step * self.batch_size
        return [self._sample(at) for at in range(first, first + self.batch_size)]

    def _sample(self, position: int) -> int:
        turn, place = divmod(position, len(self._turns))
        which, at = self._turns[place]
        portion = self.portions[which]
        epoch, at = divmod(turn * portion.share + at, portion.length)
        if epoch != self._epochs[which]:
            source = torch.Generator().manual_seed(seed_of(self.seed, ORDER, epoch, which))
            self._epochs[which] = epoch
            self._permutations[which] = torch.randperm(portion.length, generator=source)
        return self._starts[which] + int(self._permutations[which][at])


def portions_of(data: SizedSamples) -> tuple[Portion, ...]:
    """The portions that a data set says it has, else all of it."""
    return getattr(data, "portions", None) or (Portion(len(data)),)


# Which sample, and at which step and place of the batch: what its views are drawn from.
Key = tuple[int, int, int]


class _Parts(Sampler[list[Key]]):
    """The parts of the batches that one process computes, from one step to another."""

    def __init__(self, order: Order, steps: range, parts: int, own: range) -> None:
        self.order, self.steps, self.own = order, steps, own
        self.size = order.batch_size // parts

    def __iter__(self) -> Iterator[list[Key]]:
        for step in self.steps:
            samples = self.order.samples(step)
            for part in self.own:
                places = range(part * self.size, (part + 1) * self.size)
                yield [(samples[place], step, place) for place in places]

    def __len__(self) -> int:
        return len(self.steps) * len(self.own)


class _Viewed(Dataset[Sample]):
    """Samples with some of their views, as many for all samples of a step.

    Which ones is drawn for each sample. A sample with fewer than the number drawn keeps all.
    """

    def __init__(self, data: SizedSamples, views: tuple[int, int] | None, seed: int) -> None:
        self.data, self.views, self.seed = data, views, seed

    def __getitem__(self, key: Key) -> Sample:
        index, step, place = key
        sample = self.data[index]
        if self.views is None:
            return sample
        fewest, most = self.views
        count = np.random.default_rng((self.seed, VIEWS, step)).integers(fewest, most + 1)
        present = sample.views.nonzero()[:, 0].tolist()
        if not present or count >= len(present):
            return sample
        source = np.random.default_rng((self.seed, VIEWS, step, place + 1))
        chosen = source.permutation(len(present))[:count]
        return sample.select(sorted(present[at] for at in chosen))


def training_batches(
    data: SizedSamples,
    order: Order,
    steps: range,
    *,
    parts: int,
    own: range,
    views: tuple[int, int] | None,
    workers: int,
    pin_memory: bool,
) -> Generator[Batch, None, None]:
    """The parts of the batches that one process computes, in order.

    Args:
        data: The samples.
        order: Which of them a step sees.
        steps: Which steps.
        parts: How many equal parts a batch is cut into, over all processes.
        own: Which of them are this process's.
        views: As of `TrainingSettings`.
        workers: Processes that make samples; 0: this one does.
        pin_memory: Put batches where a GPU can fetch them from.
    """
    # A loader draws a seed for its workers, which nothing uses: not from the run's own numbers.
    generator = torch.Generator().manual_seed(order.seed)
    loader: Any = DataLoader(
        _Viewed(data, views, order.seed),
        batch_sampler=_Parts(order, steps, parts, own),
        num_workers=workers,
        collate_fn=collate,
        pin_memory=pin_memory,
        worker_init_fn=_ignore_signals,
        generator=generator,
    )
    yield from loader


def _ignore_signals(_: int) -> None:
    """A signal to the whole group is for the main process, which still needs its workers."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
