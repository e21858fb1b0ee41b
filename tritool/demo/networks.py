# SPDX-License-Identifier: Apache-2.0
"""The three networks of learnable triangulation, trained and compared on people nobody filmed.

The small presets are trained one after the other, each from the one before, and then asked about
people and poses that none of them has seen, with things and other people in the way.
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

# In the order of training, each from the backbone of the one before; presets by method.
METHODS = {
    "RANSAC": "small-ransac",
    "algebraic": "small-algebraic",
    "volumetric": "small-volumetric",
}
_PREFIX = "small-"


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
    steps: int | None = None,
    samples: int | None = None,
    show: bool = False,
    progress: Callable[[str], object] | None = None,
) -> NetworksReport:
    """Trains the networks, compares them, and draws what came out.

    A run that was stopped goes on where it was.

    Args:
        folder: Where everything goes; made if need be.
        seed: Of what is drawn in training. Data and first weights stay.
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
    before: Path | None = None
    for name, preset in METHODS.items():
        config = _config(preset, before, folder, seed, steps)
        say(f"training the {name} network for {config.training.steps} steps")
        start = time.monotonic()
        result = train(config, folder / preset.removeprefix(_PREFIX), progress=show)
        if result.stopped is not None:
            raise KeyboardInterrupt
        before = folder / preset.removeprefix(_PREFIX) / "best.safetensors"
        minutes[name] = (time.monotonic() - start) / 60
        reached[name] = result.step
        trained[name] = config, before

    say("comparing them on people and cameras that none has seen")
    start = time.monotonic()
    views = (2, 3)
    comparison = compare(trained, views=views, limit=samples, output=folder)
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


def _config(preset: str, before: Path | None, folder: Path, seed: int, steps: int | None) -> Config:
    """A preset that starts from the network before, and takes its centres from the algebraic."""
    from tritool.training import load_config

    config = load_config(preset, steps=steps)
    model = config.model
    if before is not None:
        model = replace(model, backbone_from=str(before))
    if config.kind == "volumetric":
        model = replace(model, algebraic_from=str(folder / "algebraic" / "best.safetensors"))
    return replace(config, model=model, training=replace(config.training, seed=seed))
