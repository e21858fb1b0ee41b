# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from training_runs import tiny, tiny_values

from tritool.training import Config, ConfigError, load_config, presets
from tritool.training.config import KINDS


def written(folder: Path, values: object) -> Path:
    path = folder / "run.yaml"
    path.write_text(values if isinstance(values, str) else yaml.safe_dump(values))
    return path


def changed(name: str, value: Any) -> dict[str, Any]:
    values = tiny_values()
    *sections, key = name.split(".")
    section = values
    for each in sections:
        section = section[each]
    section[key] = value
    return values


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (
            "training.lerning_rate",
            1,
            "lerning_rate is unknown; did you mean learning_rate",
        ),
        ("trainning", {}, "trainning is unknown; did you mean training"),
        ("model.kind", "algebra", "model.kind 'algebra' is unknown; did you mean algebraic"),
        ("model.volume_size", 64, "model.volume_size is unknown"),
        ("model.depth", 17, "model.depth must be one of 18, 34, 50, 101, 152, got 17"),
        ("model.depth", "deep", "model.depth must be a whole number, got 'deep'"),
        ("model.width", 4.5, "model.width must be a whole number, got 4.5"),
        ("model.width", True, "model.width must be a whole number, got True"),
        ("model.pelvis", [17], "model.pelvis must be joints from 0 to 16"),
        ("training.batch_size", 0, "training.batch_size must be at least 1, got 0"),
        ("training.accumulate", 3, "training.batch_size must be a multiple of accumulate"),
        ("training.learning_rate", -1, "training.learning_rate.backbone must be at least 0"),
        ("training.learning_rate", float("nan"), "must be a finite number"),
        ("training.learning_rate", 0, "nothing would be trained"),
        ("training.learning_rate", {"heads": 1}, "training.learning_rate.heads is unknown"),
        ("training.epochs", 3, "training.steps or epochs must be given, got both"),
        ("training.steps", None, "training.steps or epochs must be given, got neither"),
        ("training.views", [3, 2], "training.views must be [fewest, most]"),
        ("training.views", [2], "training.views must be a list of 2"),
        ("training.ema", 1, "training.ema must be between 0 and 1"),
        ("training.optimizer", "adan", "training.optimizer must be one of adam, adamw"),
        ("training.mixed_precision", "fp8", "must be one of no, bf16, fp16"),
        ("training.schedule", {"kind": "step"}, "training.schedule.milestones must be given"),
        ("training.schedule", 3, "training.schedule must be a mapping of settings, got 3"),
        ("loss.position", "huber", "loss.position must be one of soft_mse, mse, l1, l2"),
        ("loss.beta", 1, "loss.beta is unknown"),
        ("data.train.length", 0, "data.train.length must be at least 1"),
        ("data.train.studio", {"view": 2}, "data.train.studio.view is unknown; did you mean views"),
        ("data.train.studio", {"views": 0}, "data.train.studio.views must be"),
        ("data.train.studio", {"preset": "hard"}, "data.train.studio.preset"),
        ("data.train.seed", 2, "data.validation.seed must differ from train.seed"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    tmp_path: Path, name: str, value: Any, message: str
) -> None:
    path = written(tmp_path, changed(name, value))
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    text = str(caught.value)
    assert text.startswith(f"{path}: "), text
    assert message in text
    assert "\n" not in text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1", "it is no YAML"),
        ("- 1", "a configuration is a mapping of sections"),
        ("", "a configuration is a mapping of sections"),
        ("name: a\nname: b", "line 2: name is there twice"),
        ("name: a", "model is missing"),
    ],
)
def test_files_of_something_else(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=r"run\.yaml: ") as caught:
        load_config(written(tmp_path, text))
    assert message in str(caught.value)


def test_settings_survive_a_dictionary_and_yaml(tmp_path: Path) -> None:
    values = tiny_values(
        learning_rate={"backbone": 0, "head": 1e-3},
        schedule={"kind": "step", "milestones": [2, 3]},
        views=[1, 2],
        mixed_precision="bf16",
    )
    config = Config.from_dict(values)
    assert Config.from_dict(config.to_dict()) == config
    assert load_config(written(tmp_path, config.to_dict())) == config
    assert config.training.learning_rate.backbone == 0
    assert config.training.views == (1, 2)
    assert config.data.train.studio.views == 2


def test_yaml_reads_numbers_and_no_as_they_are_meant(tmp_path: Path) -> None:
    # YAML 1.1 takes 1e-3 for a text and a bare `no` for false.
    text = yaml.safe_dump(tiny_values()) + "\n"
    text = text.replace("learning_rate: 0.001", "learning_rate: 1e-3\n  mixed_precision: no")
    config = load_config(written(tmp_path, text))
    assert config.training.learning_rate.volume == 1e-3
    assert config.training.mixed_precision == "no"


def test_settings_are_replaced(tmp_path: Path) -> None:
    path = written(tmp_path, tiny_values())
    config = load_config(path, overrides=["training.seed=7", "loss.position=l1"], steps=9)
    assert (config.training.seed, config.loss.position, config.training.steps) == (7, "l1", 9)
    for wrong in ("training.seed", "=1", "training.seed.deep=1", "training.sed=1"):
        with pytest.raises(ConfigError):
            load_config(path, overrides=[wrong])
    with pytest.raises(ConfigError, match="steps must be at least 1"):
        load_config(path, steps=0)


def test_the_length_in_epochs_is_rounded_up() -> None:
    settings = tiny(steps=None, epochs=1.5, batch_size=4).training
    assert settings.total_steps(10) == 4
    assert tiny(steps=3).training.total_steps(10) == 3


def test_presets_are_read_by_name() -> None:
    assert presets()
    for name in presets():
        config = load_config(name)
        assert config.name == name
        assert Config.from_dict(config.to_dict()) == config
    with pytest.raises(ConfigError, match="no such file or preset"):
        load_config("small-algebra")
    with pytest.raises(FileNotFoundError):
        load_config("nowhere/run.yaml")


def test_sections_of_two_kinds_do_not_go_together() -> None:
    config = tiny()
    with pytest.raises(ConfigError, match="loss must be PositionLoss"):
        Config(config.name, config.model, config.data, KINDS["ransac"].loss(), config.training)
