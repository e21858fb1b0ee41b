# SPDX-License-Identifier: Apache-2.0
"""Pictures of networks: written whole, not blank, and honest about what is missing."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tritool import Cameras, VoxelGrid
from tritool.data import Sample
from tritool.plot import (
    View,
    joint_colours,
    plot_learning_curves,
    plot_methods,
    plot_prediction,
    project_volume,
)
from tritool.skeletons import HUMAN36M_JOINTS

WIDTH, HEIGHT, JOINTS, VIEWS = 30, 44, len(HUMAN36M_JOINTS), 3
PNG = b"\x89PNG"


@pytest.fixture
def sample() -> Sample:
    generator = torch.Generator().manual_seed(3)
    K = torch.tensor([[60.0, 0.0, 14.5], [0.0, 60.0, 21.5], [0.0, 0.0, 1.0]]).repeat(VIEWS, 1, 1)
    # z of the world is up, and the cameras are upright.
    R = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, -1.0], [0.0, 1.0, 0.0]]).repeat(VIEWS, 1, 1)
    t = torch.tensor([0.0, 1000.0, 3000.0]).repeat(VIEWS, 1)
    cameras = Cameras(K, R, t, None, (WIDTH, HEIGHT))
    points = 300 * torch.randn(JOINTS, 3, generator=generator) + torch.tensor([0.0, 0.0, 1000.0])
    return Sample(
        images=torch.randint(
            0, 256, (VIEWS, 3, HEIGHT, WIDTH), generator=generator, dtype=torch.uint8
        ),
        cameras=cameras,
        keypoints_3d=points,
        keypoints_2d=cameras.project(points).movedim(0, 1).contiguous(),
        visibility=torch.ones(VIEWS, JOINTS, dtype=torch.bool),
        views=torch.ones(VIEWS, dtype=torch.bool),
        boxes=torch.zeros(VIEWS, 4),
        joint_names=HUMAN36M_JOINTS,
        subject="a $5 man",
        action="sitting_down",
    )


def predicted(points: torch.Tensor, **parts: Any) -> SimpleNamespace:
    empty = dict.fromkeys(("keypoints_2d", "confidences", "volumes", "grid"))
    return SimpleNamespace(keypoints_3d=points[None], **{**empty, **parts})


def cube(center: torch.Tensor, count: tuple[int, int, int] = (8, 10, 12)) -> VoxelGrid:
    step = 200.0
    origin = center - step * (torch.tensor(count) - 1) / 2
    return VoxelGrid(origin[None], step * torch.eye(3)[None], count)


def words(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """All that is written into figures from now on."""
    from matplotlib.text import Text

    said: list[str] = []
    draw = Text.draw

    def listening(self: Text, *args: Any, **kwargs: Any) -> None:
        said.append(self.get_text())
        draw(self, *args, **kwargs)

    monkeypatch.setattr(Text, "draw", listening)
    return said


def colours_in(path: Path) -> int:
    with Image.open(path) as picture:
        return len(np.unique(np.asarray(picture.convert("RGB")).reshape(-1, 3), axis=0))


# ---- A prediction ----


def test_a_prediction_says_how_far_off_it_is(
    sample: Sample, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = words(monkeypatch)
    points = sample.keypoints_3d.clone()
    points[1:, 0] += 34.0
    points[5] = torch.nan
    pixels = sample.keypoints_2d + torch.tensor([3.0, 4.0])
    path = tmp_path / "picture.png"
    plot_prediction(path, sample, predicted(points, keypoints_2d=pixels[None]), name="mine")
    assert path.read_bytes().startswith(PNG)
    with Image.open(path) as picture:
        assert picture.width > 1200
    assert colours_in(path) > 500
    # 15 joints of the 16 found are 34 mm off.
    assert any(text.startswith("mine:  MPJPE 31.9 mm, 31.9 mm relative") for text in said)
    assert any("1 of 17 joints not found" in text for text in said)
    assert "not found" in said
    assert "view 1: heat maps 5.0 px off" in said
    assert any(r"a \$5 man" in text for text in said)


def test_a_volume_and_an_absent_view_are_drawn(
    sample: Sample, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = words(monkeypatch)
    sample = replace(sample, views=torch.tensor([True, False, True]))
    grid = cube(sample.keypoints_3d[0])
    volumes = torch.randn(1, JOINTS, *grid.size, generator=torch.Generator().manual_seed(0))
    path = tmp_path / "picture.svg"
    # More than one sample in the batch: the second row is this one.
    two = predicted(sample.keypoints_3d)
    two = SimpleNamespace(
        keypoints_3d=torch.cat([two.keypoints_3d + 900, two.keypoints_3d]),
        keypoints_2d=None, confidences=None, volumes=torch.cat([volumes, volumes]), grid=grid,
    )  # fmt: skip
    plot_prediction(path, sample, two, row=1)
    assert "view 2: no image" in said
    assert any("8x10x12 voxels" in text for text in said)
    assert any(text.startswith("MPJPE 0.0 mm") for text in said)
    assert any("2 of 3 views" in text for text in said)
    assert "</svg>" in path.read_text()


def test_joints_are_drawn_where_the_cameras_see_them(
    sample: Sample, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.axes import Axes

    drawn: list[np.ndarray[Any, Any]] = []
    scatter = Axes.scatter

    def watching(self: Axes, x: Any, y: Any, *args: Any, **kwargs: Any) -> Any:
        drawn.append(np.stack([x, y], -1))
        return scatter(self, x, y, *args, **kwargs)

    monkeypatch.setattr(Axes, "scatter", watching)
    points = sample.keypoints_3d.clone()
    points[4, 1] -= 9000.0  # behind the cameras
    plot_prediction(tmp_path / "picture.svg", sample, predicted(points))
    expected = sample.keypoints_2d.numpy().copy()
    expected[:, 4] = np.nan
    for view in expected:
        close = [
            np.allclose(each, view, atol=1e-2, equal_nan=True)
            for each in drawn
            if each.shape == view.shape
        ]
        assert any(close)


def test_nothing_found_is_drawn_too(
    sample: Sample, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = words(monkeypatch)
    nothing = torch.full_like(sample.keypoints_3d, torch.nan)
    plot_prediction(tmp_path / "picture.png", sample, predicted(nothing))
    assert "no joint with both a prediction and a truth" in said
    assert any("17 of 17 joints not found" in text for text in said)
    # Nor does it need the truth.
    unknown = replace(sample, keypoints_3d=nothing)
    plot_prediction(tmp_path / "other.png", unknown, predicted(sample.keypoints_3d))
    assert colours_in(tmp_path / "other.png") > 500


def test_what_was_there_stays_if_nothing_can_be_drawn(sample: Sample, tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    path.write_text("kept")
    with pytest.raises(ValueError, match=r"keypoints_3d \(17, 3\) as the sample, got \(5, 3\)"):
        plot_prediction(path, sample, predicted(sample.keypoints_3d[:5]))
    assert path.read_text() == "kept"
    with pytest.raises(OSError, match="none"):
        plot_prediction(tmp_path / "none" / "a.png", sample, predicted(sample.keypoints_3d))
    assert [each.name for each in tmp_path.iterdir()] == ["picture.png"]


def test_a_volume_is_seen_where_it_is() -> None:
    grid = cube(torch.tensor([100.0, -200.0, 900.0]))
    logits = torch.zeros(1, *grid.size)
    logits[0, 1, 2, 9] = 30.0
    place = grid.origin[0].numpy() + 200.0 * np.array([1, 2, 9])
    up, ahead = np.array([0.0, 0.0, 1.0]), np.array([0.0, 1.0, 0.0])
    for azimuth, elevation in ((0, 0), (70, 20)):
        eye = View.around(up, ahead, azimuth=azimuth, elevation=elevation)
        picture, (low, high) = project_volume(logits, grid, eye)
        assert picture.max() == 1.0
        row, column = np.unravel_index(picture[0].argmax(), picture[0].shape)
        size = np.array(picture.shape[:0:-1])
        seen = low + (np.array([column, row]) + 0.5) / size * (high - low)
        # The peak is as wide as a voxel.
        assert np.abs(seen - eye(place)).max() < 110
    window = np.stack([eye(place) + 1000, eye(place) + 1500])
    elsewhere, corners = project_volume(logits, grid, eye, window=window)
    assert np.array_equal(corners, window)
    assert np.isfinite(elsewhere).all()


def test_joints_have_colours_of_their_own() -> None:
    colours = joint_colours(HUMAN36M_JOINTS)
    assert colours.shape == (JOINTS, 3)
    assert len(np.unique(colours.round(3), axis=0)) == JOINTS
    for name, (red, _, blue) in zip(HUMAN36M_JOINTS, colours, strict=True):
        if name.startswith("l_"):
            assert blue > red
        if name.startswith("r_"):
            assert red > blue


# ---- Methods ----


def interval(mean: float | None, half: float | None = 2.0) -> SimpleNamespace:
    ends = None if mean is None or half is None else (mean - half, mean + half)
    return SimpleNamespace(mean=mean, low=ends and ends[0], high=ends and ends[1])


def compared(**means: float | None) -> SimpleNamespace:
    """Methods with these means; one without finds nothing."""
    errors = {
        name: torch.full((6, JOINTS), torch.nan if mean is None else mean) + torch.rand(6, JOINTS)
        for name, mean in means.items()
    }
    pair = list(means)
    return SimpleNamespace(
        joint_names=HUMAN36M_JOINTS,
        errors=errors,
        known=torch.ones(6, JOINTS, dtype=torch.bool),
        means={
            name: {"absolute": interval(mean), "absolute_hidden": interval(mean and 2 * mean)}
            for name, mean in means.items()
        },
        sweep={
            number: {name: interval(mean) for name, mean in means.items()} for number in (0, 2, 3)
        },
        differences=[
            SimpleNamespace(first=a, second=b, measure="absolute", value=interval(-3.0))
            for a, b in pairwise(pair)
        ],
    )


def test_methods_beside_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = words(monkeypatch)
    path = tmp_path / "methods.png"
    plot_methods(path, compared(ransac=40.0, algebraic=30.0, volumetric=22.5))
    assert path.read_bytes().startswith(PNG)
    assert colours_in(path) > 50
    assert "volumetric: 22.5 mm, the least of all" in said
    assert any(text.startswith("algebraic\n-3.0 mm\n[-5.0, -1.0]") for text in said)
    assert any("on the same 6 samples" in text for text in said)
    assert {"2", "3", "all"} <= set(said)


@pytest.mark.parametrize("means", [{"alone": 12.0}, {"good": 12.0, "nothing": None}])
def test_one_method_and_one_that_finds_nothing(
    means: dict[str, float | None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = words(monkeypatch)
    plot_methods(tmp_path / "methods.png", compared(**means))
    assert any("12.0 mm" in text for text in said)
    assert ("  no joint" in said) == ("nothing" in means)


# ---- Learning curves ----


def write_curve(path: Path, last: str = "") -> Path:
    lines: list[dict[str, Any]] = []
    for step in range(10, 210, 10):
        lines.append({"step": step, "loss": 5.0 / step, "lr": {"head": 1e-3}, "seconds": 0.5})
        if step % 50 == 0:
            errors = {"mpjpe_absolute": 900.0 / step, "mpjpe_relative": None, "poses": 9}
            lines.append({"step": step, "validation": {**errors, "missing": 0}})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + last)
    return path


def test_learning_curves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = words(monkeypatch)
    # The second is being written just now.
    curves = {
        "one": write_curve(tmp_path / "1.jsonl"),
        "two": write_curve(tmp_path / "2.jsonl", '{"step": 210, "lo'),
    }
    path = tmp_path / "curves.png"
    plot_learning_curves(path, curves)
    assert path.read_bytes().startswith(PNG)
    assert colours_in(path) > 50
    assert any("one 4.5 mm at step 200   |   two 4.5 mm at step 200" in text for text in said)


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda p: {}, ValueError, "curves must be at least one file"),
        (lambda p: {"a": p / "none.jsonl"}, FileNotFoundError, "none.jsonl"),
        (lambda p: {"a": p / "empty.jsonl"}, ValueError, "empty.jsonl: there is no line"),
        (lambda p: {"a": p / "bad.jsonl"}, ValueError, "bad.jsonl: line 2 is no line"),
    ],
)
def test_bad_curves_are_named(
    make: Callable[[Path], dict[str, Path]],
    error: type[Exception],
    match: str,
    tmp_path: Path,
) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "bad.jsonl").write_text('{"step": 1, "loss": 2.0}\n[3]\n{"step": 2, "loss": 1.0}\n')
    picture = tmp_path / "curves.png"
    picture.write_text("kept")
    with pytest.raises(error, match=match):
        plot_learning_curves(picture, make(tmp_path))
    assert picture.read_text() == "kept"
