# SPDX-License-Identifier: Apache-2.0
"""The command line: what it prints, what it writes, and how it fails."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import one_error_line
from test_recording import BAD_ARRAYS, BAD_FILES, generated, saved

from tritool import cli
from tritool.cli import main

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def recording(tmp_path: Path) -> Path:
    arrays = generated()
    arrays["kp2d"][1, 0, 1:, 2] = np.nan
    return saved(tmp_path / "in.npz", arrays)


# --- triangulate ---------------------------------------------------------------------------------


def test_triangulate_writes_and_reports(
    recording: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.npz"
    assert main(["triangulate", str(recording), "-o", str(out)]) == 0
    printed, err = capsys.readouterr()
    assert err == ""
    assert "29 of 30 points" in printed
    assert "1 fewer than two views" in printed
    assert "camera_3" in printed
    assert str(out) in printed
    with np.load(recording) as given, np.load(out) as made:
        error = np.abs(made["keypoints_3d"] - given["gt3d"])
        assert np.isnan(error[1, 0, 2]).all()
        assert np.nanmax(error) < 1e-6


def test_triangulate_json(
    recording: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, plot = tmp_path / "out.csv", tmp_path / "out.png"
    arguments = ["triangulate", str(recording), "-o", str(out), "--plot", str(plot), "--json"]
    assert main(arguments) == 0
    printed, err = capsys.readouterr()
    assert err == ""
    result = json.loads(printed)
    assert (result["total"], result["found"]) == (30, 29)
    assert result["missing"] == {"fewer than two views": 1}
    assert result["reference_error"]["count"] == 29
    assert result["reference_error"]["p90"] < 1e-6
    assert set(result["camera_errors"]) == {f"camera_{view}" for view in range(4)}
    assert result["written"] == [str(out), str(plot)]
    assert result["board_error"] is None
    with out.open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 30
    content = plot.read_bytes()
    assert content.startswith(PNG)
    # Neither blank nor a thumbnail.
    assert len(content) > 30_000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.npz", "out.csv", "out.png"]


@pytest.mark.parametrize(
    ("options", "settings"),
    [
        ([], {"mode": "homogeneous", "reweight": 0, "min_confidence": 0.0}),
        (["--mode", "inhomogeneous", "--reweight", "2"], {"mode": "inhomogeneous", "reweight": 2}),
        (["--min-confidence", "0.5"], {"min_confidence": 0.5, "weighting": "confidence"}),
        (["--unweighted"], {"weighting": "none"}),
    ],
)
def test_options_reach_the_computation(
    recording: Path, tmp_path: Path, options: list[str], settings: dict[str, Any]
) -> None:
    out = tmp_path / "out.npz"
    assert main(["triangulate", str(recording), "-o", str(out), *options]) == 0
    with np.load(out) as made, np.load(recording) as given:
        used = json.loads(str(made["settings"]))
        assert settings.items() <= used.items()
        present = np.isfinite(given["kp2d"]).all(-1) & (given["conf"] >= used["min_confidence"])
        weight = given["conf"] if used["weighting"] == "confidence" else 1.0
        np.testing.assert_array_equal(made["weights"], np.where(present, weight, 0))


def test_nothing_found_is_still_a_result(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arrays = generated()
    arrays["kp2d"][:, :, 1:] = np.nan
    path = saved(tmp_path / "in.npz", arrays)
    out, plot = tmp_path / "out.csv", tmp_path / "out.png"
    arguments = ["triangulate", str(path), "-o", str(out), "--plot", str(plot)]
    assert main(arguments) == 0
    printed, _ = capsys.readouterr()
    assert "0 of 30 points" in printed
    assert "30 fewer than two views" in printed
    assert plot.read_bytes().startswith(PNG)
    assert main([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["worst_camera"] is None


@pytest.mark.parametrize("suffix", [".pdf", ".svg"])
def test_plots_in_other_formats(recording: Path, tmp_path: Path, suffix: str) -> None:
    plot = tmp_path / f"plot{suffix}"
    arguments = ["triangulate", str(recording), "-o", str(tmp_path / "o.csv"), "--plot", str(plot)]
    assert main(arguments) == 0
    assert plot.read_bytes()[:5] in (b"%PDF-", b"<?xml")


def test_existing_output_is_replaced(recording: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.csv"
    out.write_text("old")
    assert main(["triangulate", str(recording), "-o", str(out)]) == 0
    assert out.read_text().startswith("frame,actor,joint,x_mm")


# --- bad input: one line, exit status 1, nothing written -----------------------------------------


@pytest.mark.parametrize("fault", BAD_ARRAYS)
def test_bad_arrays(tmp_path: Path, fault: str, capsys: pytest.CaptureFixture[str]) -> None:
    spoil, message = BAD_ARRAYS[fault]
    arrays = generated()
    spoil(arrays)
    path = saved(tmp_path / "in.npz", arrays)
    assert main(["triangulate", str(path), "-o", str(tmp_path / "out.npz")]) == 1
    error = one_error_line(capsys)
    assert str(path) in error
    assert message in error
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("fault", BAD_FILES)
def test_bad_files(tmp_path: Path, fault: str, capsys: pytest.CaptureFixture[str]) -> None:
    spoil, message = BAD_FILES[fault]
    path = saved(tmp_path / "in.npz", generated())
    spoil(path)
    assert main(["triangulate", str(path), "-o", str(tmp_path / "out.npz")]) == 1
    assert message in one_error_line(capsys)
    assert not (tmp_path / "out.npz").exists()
    assert len(list(tmp_path.iterdir())) == path.exists()


def test_a_missing_output_folder_is_told_first(
    recording: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["triangulate", str(recording), "-o", str(tmp_path / "no" / "out.csv")]) == 1
    assert "there is no folder" in one_error_line(capsys)


@pytest.mark.parametrize("option", ["-o", "--plot"])
def test_a_folder_in_the_way(
    recording: Path, tmp_path: Path, option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    outputs = {"-o": tmp_path / "out.csv", "--plot": tmp_path / "out.png"}
    outputs[option].mkdir()
    flat = [text for name, path in outputs.items() for text in (name, str(path))]
    assert main(["triangulate", str(recording), *flat]) == 1
    error = one_error_line(capsys)
    assert str(outputs[option]) in error
    assert "cannot be written: Is a directory" in error
    assert not list(tmp_path.glob(".*"))


def test_a_full_disk(
    recording: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    out = tmp_path / "out.npz"
    assert main(["triangulate", str(recording), "-o", str(out)]) == 1
    expected = f"tritool: error: {out}: cannot be written: No space left on device\n"
    assert one_error_line(capsys) == expected
    assert list(tmp_path.iterdir()) == [recording]


@pytest.mark.parametrize("before", [True, False])
def test_debug_shows_the_traceback(
    tmp_path: Path, before: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["triangulate", str(tmp_path / "no.npz"), "-o", str(tmp_path / "out.npz")]
    assert main(["--debug", *arguments] if before else [*arguments, "--debug"]) == 1
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert err.splitlines()[-1].startswith("tritool: error: ")


# --- wrong use: one line, exit status 2 ----------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: COMMAND"),
        (["juggle"], "'juggle'"),
        (["triangulate"], "RECORDING"),
        (["triangulate", "in.npz"], "-o"),
        (["triangulate", "in.npz", "-o", "out.txt"], "must end in .npz or .csv"),
        (["triangulate", "in.npz", "-o", "out.npz", "--plot", "a.gif"], "must end in .png"),
        (["triangulate", "in.npz", "-o", "out.npz", "--mode", "best"], "'best'"),
        (["triangulate", "in.npz", "-o", "out.npz", "--reweight", "-1"], "no whole number >= 0"),
        (["triangulate", "in.npz", "-o", "out.npz", "--reweight", "1.5"], "no whole number >= 0"),
        (["triangulate", "in.npz", "-o", "out.npz", "--min-confidence", "nan"], "no number >= 0"),
        (["triangulate", "in.npz", "-o", "out.npz", "--unknown"], "--unknown"),
        (["info", "more"], "more"),
    ],
)
def test_wrong_use(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    error = one_error_line(capsys)
    assert message in error
    assert "--help" in error


def test_the_recording_is_never_overwritten(
    recording: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    link = tmp_path / "link.npz"
    link.symlink_to(recording)
    content = recording.read_bytes()
    for out in (recording, link):
        assert main(["triangulate", str(recording), "-o", str(out)]) == 2
        assert "overwritten" in one_error_line(capsys)
    assert recording.read_bytes() == content


# --- the rest ------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["demo", "triangulate", "train", "evaluate", "info"])
def test_help_has_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    printed = capsys.readouterr().out
    assert "example:" in printed
    assert f"  tritool {command}" in printed


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    for key in ("tritool", "torch", "python"):
        assert facts[key] in text
    assert facts["paths"]["cpu"] in text


def test_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "new" / "demo"
    assert main(["demo", "-o", str(folder), "--json"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    report = json.loads(out)
    plain, weighted, reweighted = (each["mean"] for each in report["errors"].values())
    # What the demonstration is there to show.
    assert weighted < plain / 2
    assert reweighted < weighted
    assert report["pipeline_error"] < plain
    assert sorted(path.name for path in folder.iterdir()) == [
        "demo.png",
        "errors.csv",
        "recording.npz",
    ]
    assert (folder / "demo.png").read_bytes().startswith(PNG)
    # The recording is one that the other command takes, and says the same about.
    arguments = [str(folder / "recording.npz"), "-o", str(tmp_path / "again.csv"), "--json"]
    assert main(["triangulate", *arguments]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["reference_error"] == report["errors"]["confidence-weighted"]


def test_the_demo_is_the_same_every_time() -> None:
    from tritool.demo import generate_recording, run_pipeline

    first, second = generate_recording(), generate_recording()
    np.testing.assert_array_equal(first.kp2d, second.kp2d)
    pipelines = [run_pipeline(each, 40) for each in (first, second)]
    np.testing.assert_array_equal(pipelines[0].grad_heatmaps, pipelines[1].grad_heatmaps)


def test_the_demo_draws_true_gradients() -> None:
    """The arrows of the picture are derivatives: pixels moved along them do what they say."""
    import torch

    from tritool.demo import generate_recording, run_pipeline
    from tritool.ops import triangulate

    recording = generate_recording()
    pipeline = run_pipeline(recording, 40)
    assert recording.gt3d is not None
    target = torch.from_numpy(recording.gt3d[40, 0])
    weights = torch.from_numpy(recording.conf[40, 0].T)
    direction = np.random.default_rng(6).normal(size=pipeline.pixels.shape)

    def error(step: float) -> float:
        moved = torch.from_numpy(pipeline.pixels + step * direction).movedim(0, 1)
        cameras = recording.cameras
        points = triangulate(cameras.undistort(moved), cameras.projections, weights)
        return float(torch.linalg.vector_norm(points - target, dim=-1).mean())

    assert error(0) == pytest.approx(pipeline.error, rel=1e-9)
    slope = (error(1e-4) - error(-1e-4)) / 2e-4
    assert slope == pytest.approx(float((pipeline.grad_pixels * direction).sum()), rel=1e-5)


def test_interrupts_are_quiet(
    recording: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(path: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("tritool.data.recording.read_recording", interrupted)
    assert main(["triangulate", str(recording), "-o", "out.csv"]) == 130
    assert capsys.readouterr() == ("", "")


def test_unforeseen_errors_are_one_line_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails() -> None:
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setattr("tritool._native.describe", fails)
    assert main(["info"]) == 1
    expected = "RuntimeError: first line (--debug shows where)"
    assert expected in one_error_line(capsys)


@pytest.mark.filterwarnings("always")
def test_warnings_are_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def warns() -> dict[str, str]:
        import warnings

        warnings.warn("tritool: slow\nthough right", UserWarning, stacklevel=2)
        return {}

    monkeypatch.setattr("tritool._native.describe", warns)
    assert main(["info"]) == 0
    assert capsys.readouterr().err == "tritool: warning: slow though right\n"


def test_as_a_module_help_needs_no_torch() -> None:
    program = (
        "import sys, runpy; sys.argv = ['tritool', '--help']\n"
        "try: runpy.run_module('tritool', run_name='__main__')\n"
        "finally: print('torch' in sys.modules, 'matplotlib' in sys.modules)"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    assert ran.returncode == 0
    assert ran.stderr == ""
    assert "usage: tritool" in ran.stdout
    assert ran.stdout.splitlines()[-1] == "False False"


def test_a_reader_that_leaves_early_is_no_error() -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as nobody:
        ran = subprocess.run(
            [sys.executable, "-m", "tritool", "info"],
            stdout=nobody,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
            check=False,
        )
    assert ran.returncode == cli.BROKEN_PIPE
    assert ran.stderr == ""
