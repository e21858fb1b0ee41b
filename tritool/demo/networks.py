# SPDX-License-Identifier: Apache-2.0
"""The three networks of learnable triangulation, trained and compared on people nobody filmed.

Each starts from small weights that come with the package and that `tritool train` made (see
`tritool/weights/README.md`), goes on learning for a few minutes, and is then asked about people,
rooms and cameras that none of them has seen, with things and other people in the way.
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

# The worst first, if it goes as in the paper. Each preset's network starts from shipped weights.
METHODS = {
    "RANSAC": "demo-ransac",
    "algebraic": "demo-algebraic",
    "volumetric": "demo-volumetric",
}


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
    from tritool.plot.networks import plot_learning_curves, plot_methods
    from tritool.training import load_config, train
    from tritool.training.evaluation import compare

    say = progress or (lambda text: None)
    folder.mkdir(parents=True, exist_ok=True)
    minutes: dict[str, float] = {}
    reached: dict[str, int] = {}
    trained: dict[str, tuple[Config, Path]] = {}
    for name, preset in METHODS.items():
        config = load_config(preset, steps=steps)
        config = replace(config, training=replace(config.training, seed=seed))
        say(f"training the {name} network for {config.training.steps} steps")
        start = time.monotonic()
        result = train(config, folder / preset.removeprefix("demo-"), progress=show)
        if result.stopped is not None:
            raise KeyboardInterrupt
        minutes[name] = (time.monotonic() - start) / 60
        reached[name] = result.step
        trained[name] = config, Path(result.checkpoint)

    say("comparing them on people and cameras that none has seen")
    start = time.monotonic()
    views = (2, 3)
    comparison = compare(trained, views=views, limit=samples, output=folder)
    minutes["comparing"] = (time.monotonic() - start) / 60

    plot_methods(folder / "methods.png", comparison)
    curves = {
        name: folder / preset.removeprefix("demo-") / "metrics.jsonl"
        for name, preset in METHODS.items()
    }
    plot_learning_curves(folder / "learning_curves.png", curves)
    report = NetworksReport(comparison, minutes, reached, ())
    for file, text in (
        ("table.txt", comparison.table() + "\n"),
        ("results.json", json.dumps(report.to_json(), indent=1, allow_nan=False) + "\n"),
    ):
        with written_aside(folder / file) as aside:
            aside.write_text(text, encoding="utf-8")
    written = sorted(str(path) for path in folder.iterdir() if path.is_file())
    return replace(report, written=tuple(written))
