# SPDX-License-Identifier: Apache-2.0
"""The demonstration of the networks, in miniature: every step runs, every file is there."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import tritool.training
from tritool.cli import main
from tritool.demo import networks
from tritool.demo.networks import METHODS
from tritool.training import Config, load_config
from tritool.training.tasks import build_task, weights_file


def miniature(source: str, **options: Any) -> Config:
    """The preset with a narrow network and few samples."""
    config = load_config(source, **options)
    narrow = {"width": 4, "deconv_channels": 8}
    if config.kind == "volumetric":
        narrow |= {"v2v_width": 2, "volume_channels": 2}
    validation = replace(config.data.validation, length=4)
    return replace(
        config,
        model=replace(config.model, **narrow),
        data=replace(config.data, validation=validation),
        training=replace(
            config.training, batch_size=2, workers=0, validation_samples=2, tensorboard=False
        ),
    )


def test_networks_are_trained_compared_and_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tritool.training, "load_config", miniature)
    arguments = ["demo", "--networks", "--from-scratch", "--steps", "2", "--samples", "3"]
    arguments += ["-o", str(tmp_path)]
    assert main([*arguments, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["steps"] == dict.fromkeys(METHODS, 2)
    assert set(result["minutes"]) == {*METHODS, "comparing"}
    names = {Path(path).name for path in result["written"]}
    assert {"comparison.json", "methods.png", "learning_curves.png", "networks.json"} <= names
    assert all(Path(path).stat().st_size > 0 for path in result["written"])
    saved = json.loads((tmp_path / "networks.json").read_text())
    assert saved["comparison"] == result["comparison"]
    assert set(result["comparison"]["methods"]) == {*METHODS, "RANSAC, soft-argmax"}
    # Each starts from the one before it, and the algebraic one finds the pelvis.
    settings = load_config(tmp_path / "algebraic" / "config.yaml").model
    assert settings.backbone_from == str(tmp_path / "ransac" / "best.safetensors")
    settings = load_config(tmp_path / "volumetric" / "config.yaml").model
    assert settings.backbone_from == str(tmp_path / "algebraic" / "best.safetensors")
    assert settings.algebraic_from == str(tmp_path / "algebraic" / "best.safetensors")
    # What the package would come with.
    for preset in METHODS.values():
        released = load_file(tmp_path / "weights" / f"{preset}.safetensors")
        assert released["model.backbone.layer4.1.conv2.weight"].dtype == torch.int8
    # Started again, nothing is left to train.
    before = (tmp_path / "ransac" / "last.safetensors").read_bytes()
    assert main(arguments) == 0
    assert (tmp_path / "ransac" / "last.safetensors").read_bytes() == before


def test_the_weights_of_the_package_are_what_it_goes_on_from(tmp_path: Path) -> None:
    total = 0
    for name, preset in METHODS.items():
        config = networks._config(name, tmp_path, 3, False, None)
        assert config.training.steps == networks.FURTHER_STEPS[name]
        assert config.training.seed == 3
        assert config.data.validation.seed == load_config(preset).data.validation.seed + 3
        task = build_task(config)
        own = task.model.state_dict()
        [told] = task.start_weights()
        assert told == f"tritool:{preset}: {len(own)} of {len(own)} tensors loaded"
        total += weights_file(f"tritool:{preset}").stat().st_size
    assert total < 5e6


def test_its_options_belong_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--steps", "3", "-o", str(tmp_path)]) == 2
    assert "--networks" in capsys.readouterr().err
