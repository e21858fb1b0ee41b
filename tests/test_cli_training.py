# SPDX-License-Identifier: Apache-2.0
"""`tritool train` and `tritool evaluate`: what they print and write, and how they fail."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from command_line import one_error_line

from tritool.cli import main
from tritool.training import load_config, presets
from tritool.training.state import read_model

# A network that says nothing useful, quickly.
CONFIG = """\
name: tiny
model: {kind: ransac, depth: 18, width: 8, deconv_channels: 8}
data:
  kind: synthetic
  train: {length: 6, seed: 1, studio: {views: 2, image_size: [96, 64]}}
  validation: {length: 3, seed: 2, studio: {views: 2, image_size: [96, 64]}}
training:
  steps: 2
  batch_size: 2
  learning_rate: 1e-3  # YAML 1.1 takes it for a text
  save_every: 1
  validate_every: 2
  log_every: 1
  tensorboard: false
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a configuration and a finished run."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "tiny.yaml").write_text(CONFIG)
    assert main(["train", str(folder / "tiny.yaml"), "-o", str(folder / "out"), "--json"]) == 0
    return folder


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(CONFIG)
    return path


# ---- train ----


def test_train_prints_one_line_and_goes_on(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = config.parent / "new" / "run"
    assert main(["train", str(config), "-o", str(output)]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.startswith("2 steps, loss ")
    assert out.count("\n") == 1
    assert str(output / "last.safetensors") in out
    assert {path.name for path in output.iterdir()} == {
        ".lock",
        "best.safetensors",
        "config.yaml",
        "last.safetensors",
        "metrics.jsonl",
    }
    # The folder's own configuration is the run's, and a longer run goes on.
    again = ["train", str(output / "config.yaml"), "-o", str(output), "--steps", "3", "--json"]
    assert main(again) == 0
    out, err = capsys.readouterr()
    assert err == ""
    result = json.loads(out)
    assert result["step"] == 3
    assert result["stopped"] is None
    assert result["validation"]["poses"] == 3
    steps = [json.loads(line)["step"] for line in (output / "metrics.jsonl").open()]
    assert steps == [1, 2, 2, 3, 3]


def test_settings_are_replaced(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = config.parent / "run"
    replaced = ["model.deconv_channels=16", "loss.heatmap_sigma=1.5", "training.seed=7"]
    options = [text for setting in replaced for text in ("--set", setting)]
    assert main(["train", str(config), "-o", str(output), "--steps", "1", *options]) == 0
    _, info = read_model(output / "last.safetensors")
    assert info["step"] == 1
    assert info["config"]["model"]["deconv_channels"] == 16
    assert info["config"]["loss"]["heatmap_sigma"] == 1.5
    assert info["config"]["training"]["seed"] == 7
    assert info["config"]["training"]["learning_rate"]["head"] == 1e-3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--set", "training.lerning_rate=1"], "training.lerning_rate is unknown; did you mean"),
        (["--set", "training.batch_size=two"], "training.batch_size must be a whole number"),
        (["--set", "training.batch_size=3", "--set", "training.accumulate=2"], "a multiple of"),
        (["--set", "model.kind=algebraik"], "model.kind 'algebraik' is unknown; did you mean"),
        (["--set", "model.num_joints=16"], "model.num_joints must be 17 as in the data"),
        (["--set", "training.views=[1, 3]"], "training.views must be at most the 2 of the data"),
        (["--set", "data.train.studio.views=0"], "data.train.studio.views must be"),
        (["--set", "data.train.seed=2"], "data.validation.seed must differ"),
        (["--set", "model.backbone_from=tritool:none"], "no such weights come with the package"),
        (["--set", "nonsense"], "must be like training.seed=1"),
    ],
)
def test_wrong_settings(
    config: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    output = config.parent / "run"
    assert main(["train", str(config), "-o", str(output), *options]) == 1
    assert message in one_error_line(capsys)
    assert not list(output.glob("*.safetensors"))


@pytest.mark.parametrize("name", ["smal-ransac", "no/such.yaml"])
def test_no_such_configuration(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", name, "-o", str(tmp_path / "run")]) == 1
    error = one_error_line(capsys)
    assert name in error
    if "/" not in name:
        assert "did you mean small-ransac?" in error
    assert not (tmp_path / "run").exists()


def test_no_yaml(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for text, message in (
        ("name: [", "it is no YAML"),
        (f"{CONFIG}name: again\n", "line 15: name is there twice"),
        ("- a list", "a configuration is a mapping"),
        ("", "a configuration is a mapping"),
    ):
        config.write_text(text)
        assert main(["train", str(config), "-o", str(config.parent / "run")]) == 1
        error = one_error_line(capsys)
        assert str(config) in error
        assert message in error
    config.write_bytes(b"\xff\xfe\x00")
    assert main(["train", str(config), "-o", str(config.parent / "run")]) == 1
    assert "it is no text" in one_error_line(capsys)


def test_another_run_is_not_overwritten(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    checkpoint = run / "out" / "last.safetensors"
    content = checkpoint.read_bytes()
    arguments = ["train", str(run / "tiny.yaml"), "-o", str(run / "out")]
    assert main([*arguments, "--set", "training.batch_size=4"]) == 1
    error = one_error_line(capsys)
    assert "another configuration: training.batch_size is 2, here 4" in error
    assert main([*arguments, "--steps", "1"]) == 1
    assert "2 steps are done, more than the 1 asked for" in one_error_line(capsys)
    assert checkpoint.read_bytes() == content


def test_a_damaged_checkpoint_is_told(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = config.parent / "run"
    output.mkdir()
    checkpoint = output / "last.safetensors"
    checkpoint.write_bytes(b"not a checkpoint")
    assert main(["train", str(config), "-o", str(output)]) == 1
    error = one_error_line(capsys)
    assert str(checkpoint) in error
    assert "damaged" in error
    assert checkpoint.read_bytes() == b"not a checkpoint"


def test_a_file_in_the_way(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(config), "-o", str(config)]) == 1
    assert f"{config}: File exists" in one_error_line(capsys)
    assert config.read_text() == CONFIG


def test_sigterm_saves_and_exits_with_143(config: Path) -> None:
    output = config.parent / "run"
    command = [sys.executable, "-m", "tritool", "train", str(config), "-o", str(output)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*command, "--steps", "1000000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    deadline = time.monotonic() + 300
    while not (output / "last.safetensors").exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 143
    assert out == ""
    _, info = read_model(output / "last.safetensors")
    expected = f"stopped after step {info['step']} and saved; the same command goes on from there"
    assert err == f"tritool: {expected}\n"


def test_only_the_first_of_several_processes_tells(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others' results are the same."""
    from tritool.training import loop

    given: dict[str, Any] = {}
    result = loop.TrainResult(2, (), None, None, Path("last"), None, 1.0)

    def trained(*_: object, **options: object) -> loop.TrainResult:
        given.update(options)
        return result

    monkeypatch.setattr("tritool.training.loop.train", trained)
    monkeypatch.setenv("RANK", "1")
    arguments = ["train", str(config), "-o", str(config.parent / "run"), "--device", "cpu"]
    assert main(arguments) == 0
    assert capsys.readouterr() == ("", "")
    assert given["device"] == "cpu"
    monkeypatch.setenv("RANK", "0")
    assert main(arguments) == 0
    assert capsys.readouterr().out == "2 steps, 1 s; last\n"


# ---- evaluate ----


def test_evaluate(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    checkpoint = run / "out" / "best.safetensors"
    arguments = ["evaluate", str(run / "tiny.yaml"), "--checkpoint", str(checkpoint)]
    assert main(arguments) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "MPJPE" in out
    assert "3 poses" in out
    assert main([*arguments, "--samples", "2", "--json", "-o", str(tmp_path / "figures")]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert isinstance(json.loads(out), dict)
    assert list((tmp_path / "figures").glob("*.png"))


def test_evaluate_what_cannot_be(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    start = ["evaluate", str(run / "tiny.yaml"), "--checkpoint"]
    best = str(run / "out" / "best.safetensors")
    for arguments, message in (
        ([*start, str(run / "no.safetensors")], "no.safetensors: No such file"),
        ([*start, str(run / "tiny.yaml")], "tiny.yaml: it is no checkpoint"),
        ([*start, best, "--set", "model.width=16"], "best.safetensors"),
        ([*start, best, "--views", "2,3"], "views must be at most the 2 of the data"),
    ):
        assert main(arguments) == 1
        assert message in one_error_line(capsys)


# ---- The rest ----


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "small-ransac"], "-o"),
        (["train", "-o", "run"], "CONFIG"),
        (["train", "small-ransac", "-o", "run", "--steps", "0"], "no whole number >= 1"),
        (["train", "small-ransac", "-o", "run", "--device", "tpu"], "'tpu' is not cpu, cuda"),
        (["evaluate", "small-ransac"], "--checkpoint"),
        (["evaluate", "small-ransac", "--checkpoint", "a", "--views", "2,x"], "--views"),
        (["evaluate", "small-ransac", "--checkpoint", "a", "--views", "0"], "--views"),
    ],
)
def test_wrong_use(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    error = one_error_line(capsys)
    assert message in error
    assert "--help" in error


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_help_has_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    printed = capsys.readouterr().out
    assert "example:" in printed
    assert f"  tritool {command}" in printed


@pytest.mark.parametrize("name", presets())
def test_presets_can_be_read(name: str) -> None:
    config = load_config(name)
    assert config.name == name
    if name.startswith("official"):
        assert (config.model.depth, config.model.official_conventions) == (152, True)
        assert config.data.train.studio.image_size == (384, 384)
