# SPDX-License-Identifier: Apache-2.0
"""Two sources in one data set: which labels are there, and in which order samples come."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tritool import Cameras
from tritool.data import Mixture, Portion, Remembered, Sample, collate
from tritool.training.sampling import ORDER, Order, portions_of, seed_of, training_batches

JOINTS = ("head", "hand", "foot")
HEIGHT, WIDTH = 24, 16


def make_sample(index: int, count: int) -> Sample:
    generator = torch.Generator().manual_seed(10 * index + count)
    K = torch.tensor([[60.0, 0, 7.5], [0, 50, 11.5], [0, 0, 1]]).repeat(count, 1, 1)
    K[:, 0, 2] += torch.arange(count) + index
    R = torch.linalg.qr(torch.randn(count, 3, 3, generator=generator))[0]
    t = torch.tensor([0.0, 0, 5000]) + torch.randn(count, 3, generator=generator)
    names = [f"camera {at}" for at in range(count)]
    return Sample(
        images=torch.full((count, 3, HEIGHT, WIDTH), index, dtype=torch.uint8),
        cameras=Cameras(K, R, t, None, (WIDTH, HEIGHT), names),
        keypoints_3d=torch.randn(len(JOINTS), 3, generator=generator),
        keypoints_2d=torch.randn(count, len(JOINTS), 2, generator=generator),
        visibility=torch.rand(count, len(JOINTS), generator=generator) < 0.7,
        views=torch.arange(count) != 2,
        boxes=torch.rand(count, 4, generator=generator),
        joint_names=JOINTS,
        index=index,
        subject=f"S{index}",
        action="waiting",
    )


class Counted:
    """Samples of so many views, and how often each was made."""

    def __init__(self, length: int, count: int) -> None:
        self.made, self.count = [0] * length, count

    def __len__(self) -> int:
        return len(self.made)

    def __getitem__(self, index: int) -> Sample:
        self.made[index] += 1
        return make_sample(index, self.count)


def mixture(**settings: Any) -> Mixture:
    """5 labelled images, then 3 samples of 4 views, of which one is absent."""
    return Mixture(Counted(5, 1), Counted(3, 4), **settings)


# ---- Labels ----


@pytest.mark.parametrize("labels", ["none", "2d", "3d"])
@pytest.mark.parametrize("index", [0, 4, 5, 7])
def test_labels_that_are_there(labels: Any, index: int) -> None:
    image = index < 5
    sample = mixture(labels=labels)[index]
    plain = make_sample(index, 1) if image else make_sample(index - 5, 4)
    assert sample.index == index
    for name in ("images", "views", "boxes"):
        assert torch.equal(getattr(sample, name), getattr(plain, name)), name
    assert (sample.subject, sample.action) == (plain.subject, plain.action)
    assert torch.equal(sample.cameras.K, plain.cameras.K)
    assert sample.cameras.names == plain.cameras.names
    assert sample.cameras.image_size is not None
    assert sample.cameras.image_size.tolist() == [[WIDTH, HEIGHT]] * len(plain.cameras)

    everything = labels == "3d" and not image
    if everything:
        assert torch.equal(sample.keypoints_3d, plain.keypoints_3d)
        assert torch.equal(sample.cameras.projections, plain.cameras.projections)
    else:
        assert sample.keypoints_3d.isnan().all()
        assert torch.equal(sample.cameras.R, torch.eye(3).expand_as(plain.cameras.R))
        assert not sample.cameras.t.any()
    if image or labels != "none":
        assert torch.equal(sample.keypoints_2d, plain.keypoints_2d)
        assert torch.equal(sample.visibility, plain.visibility)
    else:
        assert sample.keypoints_2d.isnan().all()
        assert not sample.visibility.any()


def test_a_mixture_has_both_sources_one_after_the_other() -> None:
    data = mixture(images=2)
    assert len(data) == 8
    assert data.portions == (Portion(5, 2), Portion(3, 1))
    assert portions_of(data) is data.portions
    assert portions_of(Counted(4, 1)) == (Portion(4),)
    assert mixture().portions[0].share == 4
    batch = collate([data[4], data[6]])
    assert batch.indices == (4, 6)
    assert batch.views.tolist() == [[True, False, False, False], [True, True, False, True]]
    with pytest.raises(IndexError):
        data[8]


def test_places_from_the_end() -> None:
    data = mixture()
    assert data[-1].index == 7
    assert len(data[-1].cameras) == 4


def test_a_mixture_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="images must be at least 1, got 0"):
        mixture(images=0)
    with pytest.raises(ValueError, match="labels must be none, 2d or 3d, got '4d'"):
        mixture(labels="4d")


def test_the_source_is_left_as_it_was() -> None:
    source = Remembered(Counted(2, 3))
    Mixture(source, source)[1]
    assert source[1].keypoints_3d.isfinite().all()
    assert source[1].index == 1
    assert torch.equal(source[1].cameras.t, make_sample(1, 3).cameras.t)


def test_remembered_samples_are_made_once() -> None:
    source = Counted(4, 1)
    data = Remembered(source)
    assert len(data) == 4
    first = data[2]
    assert data[2] is first
    assert data[0] is not first
    assert torch.equal(first.keypoints_3d, make_sample(2, 1).keypoints_3d)
    assert [data[at].index for at in (3, 2, 0)] == [3, 2, 0]
    assert source.made == [1, 0, 1, 1]


# ---- Order ----


portions = st.lists(
    st.builds(Portion, st.integers(1, 9), st.integers(1, 4)), min_size=1, max_size=3
)


def portion_at(every: Sequence[Portion], sample: int) -> int:
    """Which of the portions a position belongs to."""
    for which, each in enumerate(every):
        if sample < each.length:
            return which
        sample -= each.length
    raise AssertionError(sample)


@given(portions, st.integers(1, 3), st.integers(0, 5))
def test_law_every_batch_is_the_same_mixture(every: list[Portion], rounds: int, seed: int) -> None:
    turns = sum(each.share for each in every)
    order = Order(every, rounds * turns, seed)
    pattern = [which for which, each in enumerate(every) for _ in range(each.share)]
    for step in range(12):
        samples = order.samples(step)
        # Each round, and with it each part of the batch of so many samples.
        assert [portion_at(every, sample) for sample in samples] == rounds * pattern
        # From any step, without those before.
        assert Order(every, rounds * turns, seed).samples(step) == samples


@given(portions, st.integers(0, 5))
def test_law_every_epoch_of_a_portion_has_its_samples_once(every: list[Portion], seed: int) -> None:
    order = Order(every, sum(each.share for each in every), seed)
    seen = [sample for step in range(30) for sample in order.samples(step)]
    start = 0
    for each in every:
        own = [sample for sample in seen if start <= sample < start + each.length]
        epochs = [own[at : at + each.length] for at in range(0, len(own), each.length)]
        assert len(epochs) > 3 * each.share
        for epoch in epochs[:-1]:
            assert sorted(epoch) == list(range(start, start + each.length))
        start += each.length


def test_portions_and_epochs_are_shuffled_apart() -> None:
    order = Order([Portion(20, 1), Portion(20, 1)], 2, seed=1)
    pairs = [order.samples(step) for step in range(40)]
    one, other = ([pair[0] for pair in pairs], [pair[1] - 20 for pair in pairs])
    assert one[:20] != other[:20]
    assert one[:20] != one[20:]
    assert other[:20] != other[20:]
    assert order.samples(0) != Order([Portion(20, 1), Portion(20, 1)], 2, seed=2).samples(0)


def test_one_portion_has_the_order_of_old() -> None:
    """A permutation for each epoch from its own seed: checkpoints of before go on as they would."""
    expected: list[int] = []
    for epoch in range(3):
        source = torch.Generator().manual_seed(seed_of(7, ORDER, epoch))
        expected += torch.randperm(10, generator=source).tolist()
    order = Order([Portion(10)], 5, seed=7)
    assert [sample for step in range(6) for sample in order.samples(step)] == expected
    # The first of several is in this order, too, however many come at once.
    several = Order([Portion(10, 2), Portion(4, 1)], 3, seed=7)
    seen = [sample for step in range(15) for sample in several.samples(step)]
    assert [sample for sample in seen if sample < 10] == expected


def test_a_batch_that_is_no_mixture_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"training\.batch_size must be a multiple of 5, the 4 \+ 1"
    ):
        Order([Portion(9, 4), Portion(9)], 8, seed=0)


@pytest.mark.parametrize("parts", [1, 2])
def test_parts_of_a_batch_are_the_same_mixture(parts: int) -> None:
    data = mixture(images=2)
    batches = training_batches(
        data, Order(data.portions, 6, 0), range(1, 4), parts=parts, own=range(parts), views=None,
        workers=0, pin_memory=False,
    )  # fmt: skip
    found = list(batches)
    assert len(found) == 3 * parts
    for batch in found:
        assert batch.views.sum(1).tolist() == [1, 1, 3] * (2 // parts)
        assert [index < 5 for index in batch.indices] == [True, True, False] * (2 // parts)


def test_parts_that_would_be_no_mixture_are_refused() -> None:
    data = mixture(images=3)
    assert len(Order(data.portions, 8, 0, parts=2).samples(0)) == 8
    with pytest.raises(ValueError, match=r"multiple of 4, the 3 \+ 1 samples.* times 4, .* got 8"):
        Order(data.portions, 8, 0, parts=4)
