# SPDX-License-Identifier: Apache-2.0
"""What a run is made of: network, data, loss and training, read from YAML."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tritool.training._parse import ConfigError, build, nearest, plain, read_yaml
from tritool.training.sections import (
    AlgebraicSettings,
    DataSettings,
    HeatmapLoss,
    LearningRates,
    NetworkSettings,
    PositionLoss,
    RansacSettings,
    Schedule,
    StudioPart,
    SyntheticData,
    TrainingSettings,
    VolumetricLoss,
    VolumetricSettings,
)
from tritool.training.weak_sections import MixtureData, WeakSettings, WeakSupervision

__all__ = [
    "DATA",
    "KINDS",
    "AlgebraicSettings",
    "Config",
    "ConfigError",
    "HeatmapLoss",
    "Kind",
    "LearningRates",
    "MixtureData",
    "NetworkSettings",
    "PositionLoss",
    "RansacSettings",
    "Schedule",
    "StudioPart",
    "SyntheticData",
    "TrainingSettings",
    "VolumetricLoss",
    "VolumetricSettings",
    "WeakSettings",
    "WeakSupervision",
    "load_config",
    "presets",
]


@dataclass(frozen=True)
class Kind:
    """One kind of network: its settings, those of its loss, and what trains it.

    Attributes:
        model: Dataclass of the section `model`.
        loss: Dataclass of the section `loss`.
        task: `module:class` of a `tritool.training.tasks.Task`, imported when it is needed.
    """

    model: type[NetworkSettings]
    loss: type
    task: str


KINDS: dict[str, Kind] = {
    "ransac": Kind(RansacSettings, HeatmapLoss, "tritool.training.tasks:RansacTask"),
    "algebraic": Kind(AlgebraicSettings, PositionLoss, "tritool.training.tasks:AlgebraicTask"),
    "volumetric": Kind(VolumetricSettings, VolumetricLoss, "tritool.training.tasks:VolumetricTask"),
    "weak": Kind(WeakSettings, WeakSupervision, "tritool.training.weak:WeakTask"),
}
DATA: dict[str, type[DataSettings]] = {"synthetic": SyntheticData, "mixture": MixtureData}


@dataclass(frozen=True)
class Config:
    """A run.

    Attributes:
        name: Of the run.
        model: The network: a dataclass of `KINDS`.
        data: What it learns from: a dataclass of `DATA`.
        loss: What is minimised: the dataclass of the network's kind.
        training: How.
    """

    name: str
    model: Any
    data: Any
    loss: Any
    training: TrainingSettings

    @property
    def kind(self) -> str:
        """Of the network: a key of `KINDS`."""
        return str(self.model.kind)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Config:
        """Makes a configuration of what `to_dict` gives, or a file holds.

        Raises:
            ConfigError: A key is unknown or missing, or a value is impossible: one line.
        """
        return build(cls, values, "")

    @classmethod
    def parse(cls, values: object, where: str) -> Config:
        """Reads the sections; which settings they have depends on the kind."""
        if not isinstance(values, Mapping):
            raise ConfigError(f"a configuration is a mapping of sections, got {values!r:.60}")
        sections = ("name", "model", "data", "loss", "training")
        for key in values:
            if key not in sections:
                raise ConfigError(f"{key} is unknown{nearest(str(key), sections)}")
        for key in ("name", "model", "data", "training"):
            if key not in values:
                raise ConfigError(f"{key} is missing")
        if not isinstance(values["name"], str):
            raise ConfigError(f"name must be a text, got {values['name']!r}")
        kind = KINDS[_kind(values["model"], KINDS, "model")]
        data = DATA[_kind(values["data"], DATA, "data")]
        model = build(kind.model, values["model"], "model")
        return cls(
            name=values["name"],
            model=model,
            data=build(data, values["data"], "data"),
            loss=build(kind.loss, values.get("loss") or {}, "loss"),
            training=build(TrainingSettings, values["training"], "training"),
        )

    def __post_init__(self) -> None:
        """Checks that the sections belong together."""
        kind = KINDS.get(getattr(self.model, "kind", ""))
        if kind is None:
            raise ConfigError(f"model must be settings of {', '.join(KINDS)}, got {self.model!r}")
        if not isinstance(self.loss, kind.loss):
            raise ConfigError(
                f"loss must be {kind.loss.__name__} for kind {self.kind}, "
                f"got {type(self.loss).__name__}"
            )

    def to_dict(self) -> dict[str, Any]:
        """All settings, those left at their defaults included, as what YAML and JSON hold."""
        values: dict[str, Any] = plain(self)
        return values


def load_config(
    source: str | os.PathLike[str],
    *,
    overrides: Sequence[str] = (),
    steps: int | None = None,
) -> Config:
    """Reads a configuration.

    Args:
        source: A YAML file, or the name of a preset (`presets`).
        overrides: Settings to replace, such as `"training.batch_size=4"`; values are YAML.
        steps: Replaces the length of training.

    Raises:
        OSError: The file cannot be read.
        ConfigError: Something in it is wrong: one line, `FILE: training.lerning_rate is unknown;
            did you mean learning_rate?`.
    """
    path = _find(os.fspath(source))
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ConfigError(f"{source}: it is no text") from None
    try:
        values = read_yaml(text)
        for override in overrides:
            values = _overridden(values, override)
        config = build(Config, values, "")
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None
    if steps is None:
        return config
    if steps < 1:
        raise ConfigError(f"steps must be at least 1, got {steps}")
    return replace(config, training=replace(config.training, steps=steps, epochs=None))


def presets() -> tuple[str, ...]:
    """The names of the configurations that come with the package."""
    return tuple(sorted(path.stem for path in _folder().glob("*.yaml")))


def _folder() -> Path:
    return Path(__file__).parents[1] / "configs"


def _find(source: str) -> Path:
    path = Path(source)
    if path.suffix in (".yaml", ".yml") or path.parent != Path() or path.exists():
        return path
    if source not in presets():
        raise ConfigError(f"{source}: no such file or preset{nearest(source, presets())}")
    return _folder() / f"{source}.yaml"


def _kind(section: object, known: Mapping[str, Any], where: str) -> str:
    if not isinstance(section, Mapping):
        raise ConfigError(f"{where} must be a mapping of settings, got {section!r:.60}")
    if "kind" not in section:
        raise ConfigError(f"{where}.kind is missing; known are {', '.join(known)}")
    kind = section["kind"]
    if kind not in known:
        raise ConfigError(f"{where}.kind {kind!r} is unknown{nearest(str(kind), known)}")
    return str(kind)


def _overridden(values: object, override: str) -> dict[str, Any]:
    """A copy with the setting `a.b=VALUE` replaced."""
    name, equals, text = override.partition("=")
    keys = name.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError(f"a replaced setting must be like training.seed=1, got {override!r}")
    if not isinstance(values, Mapping):
        raise ConfigError(f"a configuration is a mapping of sections, got {values!r:.60}")
    result = dict(values)
    section = result
    for key in keys[:-1]:
        inner = section.get(key, {})
        if not isinstance(inner, Mapping):
            # Such as a single learning rate: its parts cannot be replaced one by one.
            raise ConfigError(f"{name} cannot be replaced: {key} is not a mapping in this file")
        section[key] = dict(inner)
        section = section[key]
    section[keys[-1]] = read_yaml(text)
    # The length of training is one of the two.
    if keys[0] == "training" and keys[1:] in (["steps"], ["epochs"]):
        section.pop({"steps": "epochs", "epochs": "steps"}[keys[1]], None)
    return result
