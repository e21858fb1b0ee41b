# SPDX-License-Identifier: Apache-2.0
"""Recordings in, reconstructions out: what is accepted, what is refused, and what comes of it."""

from __future__ import annotations

import csv
import json
import math
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tritool.data import (
    RecordingError,
    Status,
    make_recording,
    read_recording,
    write_reconstruction,
    write_recording,
)
from tritool.data import recording as recording_module
from tritool.reconstruction import board_distances, reconstruct, summarise

SHARED = Path(os.environ.get("TRITOOL_SHARED", Path(__file__).resolve().parents[2] / "shared"))

Arrays = dict[str, Any]


def shared(name: str) -> Path:
    path = SHARED / "data" / name
    if not path.exists():
        pytest.skip(reason=f"{path} is absent: real recordings are not part of the repository")
    return path


def project(X: Any, K: Any, R: Any, t: Any, dist: Any) -> Any:
    """OpenCV's projection of [..., 3], written out here once more, independent of the package."""
    x, y, z = np.moveaxis(X @ R.T + t, -1, 0)
    x, y = x / z, y / z
    k1, k2, p1, p2, k3 = dist
    s = x * x + y * y
    g = 1 + k1 * s + k2 * s**2 + k3 * s**3
    u = x * g + 2 * p1 * x * y + p2 * (s + 2 * x * x)
    v = y * g + p1 * (s + 2 * y * y) + 2 * p2 * x * y
    return np.stack([K[0, 0] * u + K[0, 1] * v + K[0, 2], K[1, 1] * v + K[1, 2]], axis=-1)


def generated(frames: int = 3, actors: int = 2, views: int = 4, joints: int = 5) -> Arrays:
    """An exact recording, with strong distortion, W != H, fx != fy and skew."""
    random = np.random.default_rng(1)
    X = random.uniform([-900, -900, 100], [900, 900, 1800], (frames, actors, joints, 3))
    arrays: dict[str, list[Any]] = {"K": [], "R": [], "t": [], "dist": [], "kp2d": []}
    for view in range(views):
        angle = 2 * math.pi * view / views + 0.3
        centre = np.array([4500 * math.cos(angle), 4500 * math.sin(angle), 1500 + 200 * view])
        ahead = np.array([0, 0, 900]) - centre
        ahead /= np.linalg.norm(ahead)
        right = np.cross(ahead, [0, 0, 1])
        right /= np.linalg.norm(right)
        R = np.stack([right, np.cross(ahead, right), ahead])
        K = np.array([[1100.0 + view, 2.0, 650.0], [0, 1080.0, 350.0], [0, 0, 1]])
        dist = np.array([-0.25, 0.08, 0.002, -0.003, 0.01])
        for key, value in (("K", K), ("R", R), ("t", -R @ centre), ("dist", dist)):
            arrays[key].append(value)
        arrays["kp2d"].append(project(X, K, R, -R @ centre, dist))
    made: Arrays = {key: np.array(value) for key, value in arrays.items()}
    made["kp2d"] = made["kp2d"].transpose(1, 2, 0, 3, 4)
    made["conf"] = random.uniform(0.3, 1.0, made["kp2d"].shape[:-1])
    made["image_size"] = np.tile([1280, 720], (views, 1))
    made["gt3d"] = X
    return made


def saved(path: Path, arrays: Arrays) -> Path:
    np.savez(path, **arrays)
    return path


# --- what comes of a good recording --------------------------------------------------------------


@pytest.mark.parametrize("mode", ["homogeneous", "inhomogeneous"])
@pytest.mark.parametrize("reweight", [0, 1])
def test_truth_is_recovered(tmp_path: Path, mode: Any, reweight: int) -> None:
    recording = read_recording(saved(tmp_path / "r.npz", generated()))
    made = reconstruct(recording, mode=mode, reweight=reweight)
    assert recording.gt3d is not None
    assert np.abs(made.keypoints_3d - recording.gt3d).max() < 1e-6
    assert made.reprojection_error.max() < 1e-8
    assert (made.status == Status.FOUND).all()
    assert (made.views_used == 4).all()


def test_distortion_matters() -> None:
    arrays = generated()
    ideal = make_recording(**{**arrays, "dist": None})
    assert np.linalg.norm(reconstruct(ideal).keypoints_3d - arrays["gt3d"], axis=-1).max() > 10


def test_results_do_not_depend_on_the_chunk() -> None:
    recording = make_recording(**generated())
    done: list[int] = []
    whole = reconstruct(recording)
    pieces = reconstruct(recording, chunk=7, progress=done.append)
    np.testing.assert_array_equal(pieces.keypoints_3d, whole.keypoints_3d)
    np.testing.assert_array_equal(pieces.reprojection_error, whole.reprojection_error)
    assert sum(done) == 3 * 2 * 5
    assert len(done) == 5


def test_reprojection_error_is_in_measured_pixels() -> None:
    arrays = generated()
    arrays["kp2d"][0, 0, 2, 0] += [30.0, -40.0]
    # So little weight that the point stays where the other three put it.
    arrays["conf"][0, 0, 2, 0] = 1e-9
    made = reconstruct(make_recording(**arrays))
    assert made.reprojection_error[0, 0, 2, 0] == pytest.approx(50.0, abs=1e-4)
    unweighted = reconstruct(make_recording(**arrays), weighting="none")
    assert (unweighted.weights == 1).all()
    assert np.linalg.norm(unweighted.keypoints_3d - arrays["gt3d"], axis=-1)[0, 0, 0] > 5


def test_every_status() -> None:
    arrays = generated(frames=1, actors=1, joints=7)
    kp2d, conf = arrays["kp2d"][0, 0], arrays["conf"][0, 0]  # [V, J, 2], [V, J]
    kp2d[1:, 1] = np.nan
    conf[[0, 2], 2] = 0
    conf[3, 2] = 0.1
    kp2d[0, 3, 1] = np.inf
    conf[0, 4] = np.nan
    # A point behind two cameras projects to where lines meet that no ray does.
    views, behind = [0, 1], np.array([9000.0, 9000.0, 1500.0])
    for view in views:
        ideal = np.append(arrays["R"][view] @ behind + arrays["t"][view], 1)
        assert ideal[2] < 0
    arrays["dist"][:] = 0
    for view in range(4):
        x, y, z = arrays["R"][view] @ behind + arrays["t"][view]
        kp2d[view, 5] = (arrays["K"][view] @ [x / z, y / z, 1])[:2]
    conf[2:, 5] = 0
    kp2d[0, 6] = np.nan
    made = reconstruct(make_recording(**arrays), min_confidence=0.2)
    expected = [
        Status.FOUND,
        Status.TOO_FEW_VIEWS,
        Status.TOO_FEW_VIEWS,
        Status.INVALID_INPUT,
        Status.INVALID_INPUT,
        Status.BEHIND_CAMERA,
        Status.FOUND,
    ]
    assert made.status[0, 0].tolist() == expected
    assert made.views_used[0, 0, [0, 1, 2, 6]].tolist() == [4, 1, 1, 3]
    missing = made.status != Status.FOUND
    assert np.isnan(made.keypoints_3d[missing]).all()
    assert np.isnan(made.reprojection_error[0, 0, 0, 6])
    assert np.isfinite(made.keypoints_3d[~missing]).all()
    summary = summarise(make_recording(**arrays), made)
    assert summary.found == 2
    assert summary.missing == {
        Status.TOO_FEW_VIEWS.meaning: 2,
        Status.BEHIND_CAMERA.meaning: 1,
        Status.INVALID_INPUT.meaning: 2,
    }


def test_parallel_rays_are_given_up() -> None:
    arrays = generated(frames=1, actors=1, views=2)
    random = np.random.default_rng(2)
    # Twice the same camera, with a detector's noise: the rays meet in it, or anywhere.
    for key in ("K", "R", "t", "dist"):
        arrays[key][1] = arrays[key][0]
    kp2d = arrays["kp2d"]
    kp2d[:, :, 1] = kp2d[:, :, 0] + 0.3 * random.normal(size=kp2d[:, :, 0].shape)
    made = reconstruct(make_recording(**arrays))
    assert (made.status == Status.DEGENERATE).all()
    assert np.isnan(made.keypoints_3d).all()


def test_summary_names_the_worst_camera() -> None:
    arrays = generated(frames=8)
    noise = np.random.default_rng(3).normal(size=arrays["kp2d"].shape)
    arrays["kp2d"] += noise * np.array([0.5, 0.5, 6.0, 0.5])[:, None, None]
    recording = make_recording(**arrays, camera_names=["a", "b", "c", "d"])
    summary = summarise(recording, reconstruct(recording, weighting="none"))
    assert summary.worst_camera == "c"
    assert summary.reprojection_error.count == 8 * 2 * 4 * 5
    json.dumps(summary.to_json(), allow_nan=False)


def test_board_distances_follow_any_motion() -> None:
    random = np.random.default_rng(4)
    board = np.array([[x, y, 0.0] for x in range(4) for y in range(3)]) * 54
    rotations = np.linalg.qr(random.normal(size=(6, 3, 3)))[0]
    rotations *= np.sign(np.linalg.det(rotations))[:, None, None]
    moved = board @ rotations.mT + random.normal(size=(6, 1, 3)) * 1000
    assert board_distances(moved, board).max() < 1e-9
    moved[0, 2] += 10 * rotations[0, :, 2]
    moved[1, :9] = np.nan
    moved[2, [1, 2, 4, 5, 7, 8, 10, 11]] = np.nan
    moved[3, 4, 1] = np.inf
    distances = board_distances(moved, board)
    # A lever of twelve points takes up part of the blow, but not most of it.
    assert 5 < distances[0, 2] < 10
    assert np.isnan(distances[1:3]).all()  # three points, four on a line
    assert np.isnan(distances[3]).tolist() == [j == 4 for j in range(12)]
    assert np.nanmax(distances[3:]) < 1e-9


@pytest.mark.parametrize(
    ("name", "weighting", "figure", "median", "mean", "p90"),
    [
        ("charuco_dev.npz", "none", "board_error", 0.68, 0.80, 1.39),
        ("pose2sim_balancing.npz", "none", "reference_error", 9.8, 27.7, 57.2),
        ("pose2sim_balancing.npz", "confidence", "reference_error", 0.8, 35.3, 58.2),
    ],
)
def test_real_recordings_reach_an_independent_reference(
    name: str, weighting: Any, figure: str, median: float, mean: float, p90: float
) -> None:
    recording = read_recording(shared(name))
    error = getattr(summarise(recording, reconstruct(recording, weighting=weighting)), figure)
    rounding = 0.005 if figure == "board_error" else 0.05
    assert error.median == pytest.approx(median, abs=rounding)
    assert error.mean == pytest.approx(mean, abs=rounding)
    assert error.p90 == pytest.approx(p90, abs=rounding)


def test_ignored_distortion_shows_on_the_real_board() -> None:
    with np.load(shared("charuco_dev.npz"), allow_pickle=False) as archive:
        arrays = {key: archive[key] for key in ("K", "R", "t", "kp2d", "conf", "board_points")}
    recording = make_recording(**arrays)
    error = summarise(recording, reconstruct(recording)).board_error
    assert error is not None
    assert (error.median, error.mean, error.p90) == pytest.approx((3.4, 4.3, 9.4), abs=0.05)


# --- reading -------------------------------------------------------------------------------------


def test_what_is_optional_is_filled_in(tmp_path: Path) -> None:
    arrays = generated()
    arrays["kp2d"][0, 0, 0, 0] = np.nan
    required = {key: arrays[key] for key in ("K", "R", "t", "kp2d")}
    recording = read_recording(saved(tmp_path / "r.npz", required))
    assert recording.conf[0, 0, 0, 0] == 0
    assert recording.conf.sum() == recording.conf.size - 1
    assert not recording.dist.any()
    assert recording.joint_names == tuple(f"joint_{joint}" for joint in range(5))
    assert recording.camera_names == tuple(f"camera_{view}" for view in range(4))
    assert recording.frame_ids.tolist() == [0, 1, 2]
    assert recording.unit == "mm"
    assert recording.image_size is None
    assert recording.gt3d is None


def test_written_recordings_read_back(tmp_path: Path) -> None:
    recording = make_recording(
        **generated(),
        lens="human36m",
        joint_names=list("abcde"),
        frame_ids=[4, 6, 9],
        meta={"world_unit": "m", "name": "tëst"},
        board_points=np.eye(5, 3),
    )
    write_recording(tmp_path / "r.npz", recording)
    back = read_recording(tmp_path / "r.npz")
    for key in recording_module.Recording.__dataclass_fields__:
        np.testing.assert_array_equal(getattr(back, key), getattr(recording, key), err_msg=key)
    assert back.unit == "m"
    assert back.lens == "human36m"


def changed(key: str, change: Callable[[Any], Any]) -> Callable[[Arrays], None]:
    def apply(arrays: Arrays) -> None:
        arrays[key] = change(arrays[key])

    return apply


def put(key: str, value: Any) -> Callable[[Arrays], None]:
    return lambda arrays: arrays.__setitem__(key, value)


def poke(key: str, at: Any, value: Any) -> Callable[[Arrays], None]:
    return lambda arrays: arrays[key].__setitem__(at, value)


def fewer_views(count: int) -> Callable[[Arrays], None]:
    def apply(arrays: Arrays) -> None:
        for key in ("K", "R", "t", "dist", "image_size"):
            arrays[key] = arrays[key][:count]
        for key in ("kp2d", "conf"):
            arrays[key] = arrays[key][:, :, :count]

    return apply


BAD_ARRAYS = {
    "no K": (lambda arrays: arrays.pop("K"), "has no K; it holds R"),
    "one actor without its axis": (changed("kp2d", lambda a: a[:, 0]), "kp2d[:, None]"),
    "three coordinates": (
        changed("kp2d", lambda a: a.repeat(2, -1)[..., :3]),
        "got (3, 2, 4, 5, 3)",
    ),
    "no frames": (changed("kp2d", lambda a: a[:0]), "no point at all"),
    "one camera": (fewer_views(1), "two or more"),
    "too few K": (changed("K", lambda a: a[:3]), "K must be [views, rows, columns] = (4, 3, 3)"),
    "R as vectors": (changed("R", lambda a: a[:, 0]), "R must be"),
    "conf of another shape": (changed("conf", lambda a: a[..., :2]), "got (3, 2, 4, 2)"),
    "six coefficients": (put("dist", np.zeros((4, 6))), "dist"),
    "unknown lens": (put("lens", "pancake"), "pancake"),
    "NaN in K": (poke("K", (1, 0, 0), np.nan), "camera_1: K is not finite"),
    "infinite t": (poke("t", (2, 0), np.inf), "camera_2: t is not finite"),
    "NaN in dist": (poke("dist", (3, 0), np.nan), "camera_3: distortion is not finite"),
    "singular K": (poke("K", (0, 1, 1), 0.0), "camera_0: K is singular"),
    "transposed K": (changed("K", lambda a: a.swapaxes(1, 2)), "transposed"),
    "R no rotation": (changed("R", lambda a: 1.1 * a), "R is not a rotation"),
    "R a reflection": (changed("R", lambda a: -a), "reflection"),
    "negative conf": (poke("conf", (0, 0, 0, 0), -0.5), "conf must not be negative"),
    "text in kp2d": (changed("kp2d", lambda a: a.astype(str)), "kp2d must hold real numbers"),
    "complex t": (changed("t", lambda a: a + 1j), "t must hold real numbers, got complex128"),
    "fractional size": (put("image_size", np.full((4, 2), 10.5)), "whole pixels"),
    "names of three cameras": (put("camera_names", list("abc")), "4 names, got 3"),
    "the same name twice": (put("joint_names", list("abcda")), "'a' twice"),
    "names as numbers": (put("joint_names", np.arange(5)), "joint_names must be a list of texts"),
    "frame_ids too short": (put("frame_ids", [1, 2]), "frame_ids must be 3"),
    "gt3d of another shape": (put("gt3d", np.zeros((3, 5, 3))), "gt3d must be"),
    "board with NaN": (put("board_points", np.full((5, 3), np.nan)), "board_points"),
    "meta no JSON": (put("meta", "{"), "meta must be one text holding a JSON object"),
    "meta a list": (put("meta", "[1]"), "meta must be one text holding a JSON object"),
    "unit a number": (put("meta", '{"world_unit": 3}'), "world_unit"),
    "object array": (put("conf", np.array([None, 1])), "conf is a pickled object array"),
    "object names": (put("joint_names", np.array(list("abcde"), dtype=object)), "pickled"),
}


@pytest.mark.parametrize("fault", BAD_ARRAYS)
def test_bad_arrays_are_one_line(tmp_path: Path, fault: str) -> None:
    spoil, message = BAD_ARRAYS[fault]
    arrays = generated()
    spoil(arrays)
    path = saved(tmp_path / "bad.npz", arrays)
    with pytest.raises(RecordingError) as raised:
        read_recording(path)
    text = str(raised.value)
    assert text.startswith(f"{path}: ")
    assert message in text
    assert "\n" not in text


def absent(path: Path) -> None:
    path.unlink()


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


def foreign(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("notes.txt", "hello")


def absurd(path: Path) -> None:
    header = "{'descr': '<f8', 'fortran_order': False, 'shape': (9999999999999,), }"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(
            "K.npy", b"\x93NUMPY\x01\x00" + bytes([118, 0]) + header.ljust(118).encode()
        )


def one_array(path: Path) -> None:
    with path.open("wb") as file:
        np.save(file, np.eye(3))


BAD_FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "absent": (absent, "No such file"),
    "empty": (lambda path: path.write_bytes(b""), "is empty"),
    "text": (lambda path: path.write_text("x,y\n1,2\n"), "no .npz file"),
    "a single array": (one_array, "a single .npy array"),
    "truncated": (truncated, "truncated or damaged"),
    "a flipped byte": (flipped, "truncated or damaged"),
    "a zip of something else": (foreign, "no array"),
    "an absurd shape": (absurd, "K cannot be read"),
}


@pytest.mark.parametrize("fault", BAD_FILES)
def test_bad_files_are_one_line(tmp_path: Path, fault: str) -> None:
    spoil, message = BAD_FILES[fault]
    path = saved(tmp_path / "bad.npz", generated())
    spoil(path)
    with pytest.raises(RecordingError) as raised:
        read_recording(path)
    text = str(raised.value)
    assert text.startswith(f"{path}: ")
    assert message in text
    assert "\n" not in text


def test_any_damage_is_a_recording_error(tmp_path: Path) -> None:
    path = saved(tmp_path / "bad.npz", generated(frames=1, actors=1))
    sound = path.read_bytes()
    random = np.random.default_rng(5)
    messages = []
    for _ in range(150):
        content = bytearray(
            sound[: random.integers(7, len(sound))] if random.random() < 0.3 else sound
        )
        for at in random.integers(4, len(content), 3):
            content[at] = random.integers(256)
        path.write_bytes(content)
        try:
            read_recording(path)
        except RecordingError as error:
            messages.append(str(error))
    assert len(messages) > 100
    assert not any("\n" in message for message in messages)


def test_options_out_of_range_are_refused() -> None:
    recording = make_recording(**generated(frames=1))
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"mode": "best"}, "mode"),
        ({"weighting": "more"}, "weighting"),
        ({"reweight": -1}, "reweight"),
        ({"min_confidence": -0.1}, "min_confidence"),
        ({"min_confidence": math.nan}, "min_confidence"),
        ({"chunk": 0}, "chunk"),
    ]
    for options, name in wrong:
        with pytest.raises(ValueError, match=name):
            reconstruct(recording, **options)


# --- writing -------------------------------------------------------------------------------------


@pytest.fixture
def reconstruction() -> Any:
    arrays = generated()
    arrays["kp2d"][0, 1, 1:, 3] = np.nan
    return reconstruct(make_recording(**arrays, joint_names=["a,b", "c", "d", "e", "f"]))


def test_npz_holds_everything(tmp_path: Path, reconstruction: Any) -> None:
    write_reconstruction(tmp_path / "out.npz", reconstruction)
    with np.load(tmp_path / "out.npz", allow_pickle=False) as out:
        for key in ("keypoints_3d", "reprojection_error", "weights", "views_used", "status"):
            np.testing.assert_array_equal(out[key], getattr(reconstruction, key))
        assert out["keypoints_3d"].shape == (3, 2, 5, 3)
        assert out["reprojection_error"].shape == out["weights"].shape == (3, 2, 4, 5)
        assert out["status_meanings"][out["status"][0, 1, 3]] == "fewer than two views"
        assert tuple(out["joint_names"]) == reconstruction.joint_names
        assert "mm" in str(out["units"])
        assert json.loads(str(out["settings"]))["mode"] == "homogeneous"


def test_csv_is_long(tmp_path: Path, reconstruction: Any) -> None:
    write_reconstruction(tmp_path / "out.csv", reconstruction)
    with (tmp_path / "out.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 * 2 * 5
    first, lost = rows[0], rows[1 * 5 + 3]
    assert first["joint"] == "a,b"
    at = [float(first[f"{axis}_mm"]) for axis in "xyz"]
    np.testing.assert_allclose(at, reconstruction.keypoints_3d[0, 0, 0], atol=1e-7)
    assert float(first["mean_reprojection_error_px"]) < 1e-8
    assert [lost[key] for key in ("frame", "actor", "joint", "x_mm", "views", "status")] == [
        "0", "1", "e", "", "1", "fewer than two views",
    ]  # fmt: skip


@pytest.mark.parametrize("suffix", [".npz", ".csv"])
def test_nothing_half_written_stays(
    tmp_path: Path, reconstruction: Any, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / f"out{suffix}"
    path.write_text("what was there before")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as raised:
        write_reconstruction(path, reconstruction)
    assert raised.value.filename == str(path)
    assert path.read_text() == "what was there before"
    assert list(tmp_path.iterdir()) == [path]


def test_interrupted_writing_leaves_nothing(tmp_path: Path) -> None:
    def interrupted() -> None:
        with recording_module.written_aside(tmp_path / "out.csv") as aside:
            aside.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not list(tmp_path.iterdir())


def test_writing_follows_links_and_the_umask(tmp_path: Path, reconstruction: Any) -> None:
    target, link = tmp_path / "target.csv", tmp_path / "link.csv"
    target.write_text("old")
    link.symlink_to(target)
    write_reconstruction(link, reconstruction)
    assert link.is_symlink()
    assert target.read_text().startswith("frame,actor,joint")
    plain = tmp_path / "plain"
    plain.touch()
    assert target.stat().st_mode == plain.stat().st_mode


def test_other_endings_are_refused(tmp_path: Path, reconstruction: Any) -> None:
    with pytest.raises(ValueError, match=r"written as \.npz or \.csv"):
        write_reconstruction(tmp_path / "out.txt", reconstruction)
    assert not list(tmp_path.iterdir())
