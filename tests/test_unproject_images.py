# SPDX-License-Identifier: Apache-2.0
"""The example that unprojects a recording's images: a drawn ball is found where it is."""

from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.image import imsave

from tritool import Cameras

SOURCE = Path(__file__).parents[1] / "examples" / "unproject_images.py"
spec = importlib.util.spec_from_file_location("unproject_images", SOURCE)
assert spec is not None
assert spec.loader is not None
example = importlib.util.module_from_spec(spec)
sys.modules["unproject_images"] = example  # dataclasses look their module up
spec.loader.exec_module(example)

BALL = np.array([150.0, -220.0, 900.0])
RADIUS = 250.0
COLOUR = np.array([230, 120, 20])
BACKGROUNDS = np.array([[30, 30, 200], [20, 160, 60], [200, 200, 210], [120, 20, 140]])
SIZE = (160, 120)
AFFINE = (0.5, 4.0, -3.0)  # of the image files: half as large, shifted
FILE_SIZE = (88, 60)


def rig() -> tuple[np.ndarray, ...]:
    """K, R, t, dist of four cameras in a room, their lenses far from ideal."""
    angles = np.arange(4) * math.pi / 2 + 0.4
    centers = np.stack([3500 * np.cos(angles), 3500 * np.sin(angles), np.full(4, 1500.0)], -1)
    forward = np.array([0.0, 0.0, 900.0]) - centers
    forward /= np.linalg.norm(forward, axis=-1, keepdims=True)
    right = np.cross(forward, [0.0, 0.0, 1.0])
    right /= np.linalg.norm(right, axis=-1, keepdims=True)
    R = np.stack([right, np.cross(forward, right), forward], 1)
    K = np.array([[150.0, 0, 79.5], [0, 150.0, 59.5], [0, 0, 1]])
    dist = np.array([-0.25, 0.06, 0.0, 0.0, 0.0])
    t = -(R @ centers[..., None])[..., 0]
    return np.tile(K, (4, 1, 1)), R, t, np.tile(dist, (4, 1))


def write_scene(folder: Path, *, named: bool = True) -> Path:
    """A recording whose one joint set is on the ball, and images in which the ball is drawn."""
    K, R, t, dist = rig()
    cameras = Cameras(*map(torch.from_numpy, (K, R, t)), torch.from_numpy(dist), image_size=SIZE)
    x, y = np.meshgrid(np.arange(FILE_SIZE[0]), np.arange(FILE_SIZE[1]))
    pixels = (np.stack([x, y], -1) - AFFINE[1:]) / AFFINE[0]
    ideal = cameras.undistort(torch.from_numpy(pixels)[:, :, None].expand(-1, -1, 4, 2)).numpy()
    names = []
    for view in range(4):
        rays = np.concatenate([ideal[:, :, view], np.ones((*x.shape, 1))], -1)
        rays = rays @ np.linalg.inv(K[view]).T
        rays /= np.linalg.norm(rays, axis=-1, keepdims=True)
        center = R[view] @ BALL + t[view]
        off = np.linalg.norm(np.cross(rays, center), axis=-1)
        image = np.where((off < RADIUS)[..., None], COLOUR, BACKGROUNDS[view]).astype(np.uint8)
        names.append(f"cam{view}_0007.png")
        imsave(folder / names[-1], image)
    joints = BALL + np.array([[-60.0, 0, 0], [60.0, 0, 0], [-60.0, 0, 90], [60.0, 0, 90]])
    measured = cameras.project(torch.from_numpy(joints)).numpy().swapaxes(0, 1)
    arrays: dict[str, Any] = {
        **{"K": K, "R": R, "t": t, "dist": dist, "image_size": np.tile(SIZE, (4, 1))},
        "kp2d": np.stack([measured, measured])[:, None],
        "joint_names": ["r_hip", "l_hip", "r_shoulder", "l_shoulder"],
        "camera_names": [f"cam{view}" for view in range(4)],
        "frame_ids": np.array([3, 7]),
        "image_affine": np.tile(AFFINE, (4, 1)),
    }
    if named:
        arrays["images"] = np.array([[""] * 4, names])
    np.savez(folder / "scene.npz", **arrays)
    return folder / "scene.npz"


@pytest.mark.parametrize("named", [True, False], ids=["named", "pattern"])
def test_a_ball_is_found_in_its_colour_at_its_place(
    tmp_path: Path, named: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    recording = write_scene(tmp_path, named=named)
    picture = tmp_path / "ball.png"
    options = ["--side", "1600", "--voxels", "32", "-o", str(picture)]
    if not named:
        options += ["--images", str(tmp_path / "{camera}_{frame:04}.png"), "--frame", "7"]
    colours = example.main([str(recording), *options])
    assert "frame 7" in capsys.readouterr().out
    assert picture.stat().st_size > 10_000

    away = np.linalg.norm(colours.grid.points()[0].double().numpy() - BALL, axis=-1)
    inside = torch.from_numpy(away < 0.6 * RADIUS)
    assert inside.sum() > 100
    off = (colours.mean[inside] * 255 - torch.from_numpy(COLOUR)).abs()
    assert off.max() < 3
    # Agreement is smoothed over 3 x 3 x 3 voxels, so it falls off before the ball's surface.
    assert colours.agreement[torch.from_numpy(away < 0.3 * RADIUS)].min() > 0.99
    # The cameras' backgrounds differ, so nothing else agrees but near the ball.
    assert colours.agreement[torch.from_numpy(away > 2 * RADIUS)].max() < 0.2
    places = colours.grid.points()[0][colours.agreement > 0.5].double().mean(0).numpy()
    assert np.linalg.norm(places - BALL) < 20


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--frame", "3"], "frame 3 has no images; those that have: 7"),
        (["--joint", "tail"], "no joint is called tail"),
        (["--images", "nowhere/{camera}.png"], "nowhere/cam0.png"),
        (["--images", "{view}.png"], "view"),
        (["--actor", "4"], "actor"),
        (["--voxels", "0"], "size must be at least 1"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    tmp_path: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    recording = write_scene(tmp_path)
    with pytest.raises(SystemExit) as caught:
        example.main([str(recording), *options])
    assert str(caught.value).startswith("unproject_images.py: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_real_recording(shared_data: Path, tmp_path: Path) -> None:
    recording = shared_data / "pose2sim_balancing.npz"
    if not recording.exists():
        pytest.skip(reason=f"no {recording}")
    picture = tmp_path / "person.png"
    colours = example.main([str(recording), "--voxels", "64", "-o", str(picture)])
    assert picture.stat().st_size > 50_000
    # Black trousers: dark, and all views agree, below the middle of the hips.
    hips = torch.tensor([-1381.0, -2.0, 830.0])
    index = colours.grid.to_index(hips[None, None])[0, 0].round().long().tolist()
    around = tuple(slice(i - 1, i + 2) for i in index)
    assert colours.mean[around].mean() < 0.25
    assert colours.agreement[around].mean() > 0.6
