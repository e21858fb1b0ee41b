# SPDX-License-Identifier: Apache-2.0
"""`Sample`, `Batch` and `collate`: the contract between readers of images and networks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tritool import Cameras
from tritool.data import Batch, Sample, collate

WIDTH, HEIGHT = 12, 20
NAMES = ("pelvis", "neck", "nose")


def make_sample(views: int = 3, index: int = 0, seed: int = 0, **changes: Any) -> Sample:
    generator = torch.Generator().manual_seed(seed)
    K = torch.tensor([[100.0, 0.0, 5.5], [0.0, 110.0, 9.5], [0.0, 0.0, 1.0]]).repeat(views, 1, 1)
    K[:, 0, 2] += torch.arange(views)
    t = torch.randn(views, 3, generator=generator) + torch.tensor([0.0, 0.0, 3000.0])
    cameras = Cameras(K, torch.eye(3).repeat(views, 1, 1), t, None, (WIDTH, HEIGHT))
    points = 10 * torch.randn(len(NAMES), 3, generator=generator)
    values: dict[str, Any] = {
        "images": torch.randint(
            0, 256, (views, 3, HEIGHT, WIDTH), generator=generator, dtype=torch.uint8
        ),
        "cameras": cameras,
        "keypoints_3d": points,
        "keypoints_2d": cameras.project(points).movedim(0, 1).contiguous(),
        "visibility": torch.ones(views, len(NAMES), dtype=torch.bool),
        "views": torch.ones(views, dtype=torch.bool),
        "boxes": torch.rand(views, 4, generator=generator),
        "joint_names": NAMES,
        "index": index,
        "subject": f"subject {index}",
        "action": "standing",
    }
    return Sample(**values | changes)


@pytest.mark.parametrize(
    ("name", "value", "error", "words"),
    [
        ("images", torch.zeros(3, 3, HEIGHT, WIDTH), TypeError, "images must be torch.uint8"),
        ("images", torch.zeros(2, 3, HEIGHT, WIDTH, dtype=torch.uint8), ValueError, r"\[3, 3, \*"),
        ("keypoints_3d", torch.zeros(3, 3).double(), TypeError, "keypoints_3d must be"),
        ("keypoints_3d", torch.zeros(4, 3), ValueError, r"keypoints_3d must be \[3, 3\]"),
        ("keypoints_2d", torch.zeros(3, 3, 3), ValueError, r"keypoints_2d must be \[3, 3, 2\]"),
        ("visibility", torch.zeros(3, 3), TypeError, "visibility must be torch.bool"),
        ("views", torch.zeros(2, dtype=torch.bool), ValueError, r"views must be \[3\]"),
        ("boxes", torch.zeros(3, 2), ValueError, r"boxes must be \[3, 4\]"),
    ],
)
def test_a_sample_checks_dtypes_and_shapes(
    name: str, value: torch.Tensor, error: type[Exception], words: str
) -> None:
    good = make_sample()
    with pytest.raises(error, match=words):
        replace(good, **{name: value})  # type: ignore[arg-type]


def test_select_takes_views_in_the_order_asked_for() -> None:
    sample = make_sample(4)
    chosen = sample.select([2, 0])
    assert torch.equal(chosen.images, sample.images[[2, 0]])
    assert torch.equal(chosen.keypoints_2d, sample.keypoints_2d[[2, 0]])
    assert torch.equal(chosen.boxes, sample.boxes[[2, 0]])
    assert torch.equal(chosen.cameras.K, sample.cameras.K[[2, 0]])
    assert torch.equal(chosen.keypoints_3d, sample.keypoints_3d)
    assert torch.equal(sample.select(slice(1, 3)).images, sample.images[1:3])
    assert torch.equal(sample.select([-1]).images, sample.images[3:])
    with pytest.raises(ValueError, match="at least one camera"):
        sample.select([])


def test_collate_keeps_everything_of_samples_of_the_same_views() -> None:
    samples = [make_sample(3, index, seed=index) for index in (4, 7)]
    batch = collate(samples)
    assert isinstance(batch, Batch)
    assert len(batch) == 2
    assert batch.indices == (4, 7)
    assert batch.subjects == ("subject 4", "subject 7")
    assert batch.actions == ("standing", "standing")
    assert batch.joint_names == NAMES
    for row, sample in enumerate(samples):
        for name in ("images", "keypoints_3d", "keypoints_2d", "visibility", "views", "boxes"):
            assert torch.equal(getattr(batch, name)[row], getattr(sample, name)), name
        assert torch.equal(batch.projections[row], sample.cameras.projections)
        assert torch.equal(batch.intrinsics[row], sample.cameras.K)
    assert batch.images.dtype == torch.uint8


def test_collate_adds_absent_views_at_the_end() -> None:
    few, many = make_sample(2, 0, seed=1), make_sample(5, 1, seed=2)
    batch = collate([few, many])
    assert batch.views.tolist() == [[True] * 2 + [False] * 3, [True] * 5]
    assert torch.equal(batch.images[0, :2], few.images)
    assert not batch.images[0, 2:].any()
    assert not batch.visibility[0, 2:].any()
    assert batch.keypoints_2d[0, 2:].isnan().all()
    nowhere = torch.eye(3, 4)
    assert torch.equal(batch.projections[0, 2:], nowhere.expand(3, 3, 4))
    assert torch.equal(batch.intrinsics[0, 2:], torch.eye(3).expand(3, 3, 3))
    alone = collate([few])
    assert torch.equal(alone.projections[0], batch.projections[0, :2])


def test_collate_wipes_the_views_that_a_sample_lacks() -> None:
    sample = make_sample(3)
    lacking = replace(sample, views=torch.tensor([True, False, True]))
    batch = collate([lacking])
    assert not batch.images[0, 1].any()
    assert not batch.visibility[0, 1].any()
    assert batch.keypoints_2d[0, 1].isnan().all()
    assert torch.equal(batch.projections[0, 1], torch.eye(3, 4))
    kept = batch.views[0]
    assert torch.equal(batch.images[0, kept], sample.images[kept])


def test_nan_of_unknown_joints_stays() -> None:
    points = make_sample().keypoints_3d.clone()
    points[1] = torch.nan
    batch = collate([make_sample(keypoints_3d=points)])
    assert batch.keypoints_3d[0, 1].isnan().all()
    assert batch.keypoints_3d[0, [0, 2]].isfinite().all()


def test_a_batch_moves_all_of_its_tensors() -> None:
    batch = collate([make_sample()])
    moved = batch.to("meta")
    for name in ("images", "projections", "intrinsics", "keypoints_3d", "views", "boxes"):
        assert getattr(moved, name).device.type == "meta"
        assert getattr(batch, name).device.type == "cpu"
    assert moved.indices == batch.indices


def test_collate_says_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="at least one sample"):
        collate([])
    with pytest.raises(ValueError, match="other joints"):
        collate([make_sample(), make_sample(joint_names=("a", "b", "c"))])
    small = torch.zeros(3, 3, HEIGHT, WIDTH + 1, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"images of \(3, 20, 13\)"):
        collate([make_sample(), make_sample(images=small)])
    pinhole = make_sample().cameras
    bent = Cameras(pinhole.K, pinhole.R, pinhole.t, torch.full((3, 5), 0.01), (WIDTH, HEIGHT))
    with pytest.raises(ValueError, match="must be undistorted"):
        collate([make_sample(cameras=bent)])
