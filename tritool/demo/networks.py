# SPDX-License-Identifier: Apache-2.0
"""The three networks of learnable triangulation, trained and compared on people nobody filmed.

The weights that come with the package are trained a little further on new samples; or everything is
trained from the first weights on. Then the networks are asked about people and poses that none of
them has seen, with things and other people in the way.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tritool.data.recording import written_aside

if TYPE_CHECKING:
    from tritool.training import Config
    from tritool.training.evaluation import Comparison

__all__ = ["METHODS", "NetworksReport", "run_networks"]

# In the order of training; presets by method.
METHODS = {
    "RANSAC": "small-ransac",
    "algebraic": "small-algebraic",
    "volumetric": "small-volumetric",
}
# The same 2D network, whose joints are read as those of the algebraic one.
SOFT = "RANSAC, soft-argmax"
_PREFIX = "small-"
# How much further the weights of the package are trained, and at which part of their first rates.
FURTHER_STEPS = {"RANSAC": 200, "algebraic": 200, "volumetric": 100}
_FURTHER_RATE = 0.1


@dataclass(frozen=True)
class NetworksReport:
    """What became of the networks.

    Attributes:
        comparison: Their errors on the same samples.
        minutes: How long training each took, and comparing them.
        steps: How many steps each was trained for.
        written: The files made.
    """

    comparison: Comparison
    minutes: dict[str, float]
    steps: dict[str, int]
    written: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Returns the same as what JSON can hold."""
        return {
            "comparison": self.comparison.to_json(),
            "minutes": self.minutes,
            "steps": self.steps,
            "written": list(self.written),
        }

    def to_text(self) -> str:
        """Returns the same for people, the table first."""
        times = ", ".join(f"{name} {value:.1f}" for name, value in self.minutes.items())
        return "\n".join(
            [
                self.comparison.table(),
                "",
                f"minutes  {times}",
                *(f"written  {path}" for path in self.written),
            ]
        )


def run_networks(
    folder: Path,
    *,
    seed: int = 0,
    from_scratch: bool = False,
    steps: int | None = None,
    samples: int | None = None,
    show: bool = False,
    progress: Callable[[str], object] | None = None,
) -> NetworksReport:
    """Trains the networks, compares them, and draws what came out.

    A run that was stopped goes on where it was.

    Args:
        folder: Where everything goes; made if need be.
        seed: Of what is drawn in training, and of the people that the networks are compared on.
        from_scratch: Train from the first weights on, for the presets' numbers of steps, which
            takes hours on two cores. The weights are also written as they come with the
            package, `weights/*.safetensors`. False: go on with those of the package.
        steps: Replaces the length of each training.
        samples: Compare on the first so many samples only.
        show: Progress bars on standard error.
        progress: Called with a sentence when something begins.

    Returns:
        The comparison and the files written.

    Raises:
        ImportError: What training needs is not installed.
        OSError: A file cannot be written.
    """
    from tritool.plot import plot_learning_curves
    from tritool.training import train
    from tritool.training.evaluation import compare

    say = progress or (lambda text: None)
    folder.mkdir(parents=True, exist_ok=True)
    minutes: dict[str, float] = {}
    reached: dict[str, int] = {}
    trained: dict[str, tuple[Config, Path]] = {}
    for name, preset in METHODS.items():
        config = _config(name, folder, seed, from_scratch, steps)
        say(f"training the {name} network for {config.training.steps} steps")
        start = time.monotonic()
        result = train(config, folder / preset.removeprefix(_PREFIX), progress=show)
        if result.stopped is not None:
            raise KeyboardInterrupt
        minutes[name] = (time.monotonic() - start) / 60
        reached[name] = result.step
        trained[name] = config, _best(folder, preset)
    if from_scratch:
        _release(folder / "weights", trained)

    say("comparing them on people that none has seen")
    start = time.monotonic()
    config, checkpoint = trained["RANSAC"]
    soft = replace(config, model=replace(config.model, readout="soft_argmax"))
    methods = {"RANSAC": trained["RANSAC"], SOFT: (soft, checkpoint), **trained}
    comparison = compare(methods, views=(2, 3), limit=samples, output=folder)
    minutes["comparing"] = (time.monotonic() - start) / 60

    curves = {
        name: folder / preset.removeprefix(_PREFIX) / "metrics.jsonl"
        for name, preset in METHODS.items()
    }
    plot_learning_curves(folder / "learning_curves.png", curves)
    report = NetworksReport(comparison, minutes, reached, ())
    with written_aside(folder / "networks.json") as aside:
        text = json.dumps(report.to_json(), indent=1, allow_nan=False)
        aside.write_text(text + "\n", encoding="utf-8")
    written = sorted(str(path) for path in folder.iterdir() if path.is_file())
    return replace(report, written=tuple(written))


def _best(folder: Path, preset: str) -> Path:
    return folder / preset.removeprefix(_PREFIX) / "best.safetensors"


def _config(name: str, folder: Path, seed: int, from_scratch: bool, steps: int | None) -> Config:
    """A preset that starts where it should and looks for its files in the folder."""
    from tritool.training import load_config

    preset = METHODS[name]
    if steps is None and not from_scratch:
        steps = FURTHER_STEPS[name]
    config = load_config(preset, steps=steps)
    training = replace(config.training, seed=seed)
    if from_scratch:
        # Each network starts from the backbone of the one before it.
        before = list(METHODS).index(name) - 1
        first = None if before < 0 else str(_best(folder, list(METHODS.values())[before]))
    else:
        first = f"tritool:{preset}"
        rates = training.learning_rate
        training = replace(
            training,
            learning_rate=replace(
                rates,
                **{part: getattr(rates, part) * _FURTHER_RATE for part in vars(rates)},
            ),
            schedule=replace(training.schedule, warmup=10),
            validate_every=max(25, (training.steps or 0) // 4),
            validation_samples=60,
        )
    model = replace(config.model, backbone_from=first)
    if config.kind == "volumetric":
        model = replace(model, algebraic_from=str(_best(folder, METHODS["algebraic"])))
    validation = replace(config.data.validation, seed=config.data.validation.seed + seed)
    data = replace(config.data, validation=validation)
    return replace(config, model=model, training=training, data=data)


def _release(folder: Path, trained: dict[str, tuple[Config, Path]]) -> None:
    """Writes the weights as they come with the package: in 8 bits."""
    import torch

    from tritool.training.state import read_model, write_model

    folder.mkdir(exist_ok=True)
    for name, (config, checkpoint) in trained.items():
        tensors, info = read_model(checkpoint)
        # Where the weights came from means nothing elsewhere.
        settings = replace(config.model, backbone_from=None)
        if config.kind == "volumetric":
            settings = replace(settings, algebraic_from=None)
        path = folder / f"{METHODS[name]}.safetensors"
        released = replace(config, model=settings)
        write_model(path, tensors, released, info["step"], dtype=torch.int8)
