# SPDX-License-Identifier: Apache-2.0
"""Trains small networks several times over and writes down how well they do.

    python benchmarks/studies.py ablation     what each part of weak supervision is good for
    python benchmarks/studies.py views        error against the number of unlabelled views
    python benchmarks/studies.py pseudo       error against the part of views with pseudo-labels
    python benchmarks/studies.py networks     the networks of `tritool demo --networks`

`--jobs` runs at a time, with one thread each; what is done already, in `--runs`, is not done again.
Writes benchmarks/results/<version>/study-<name>--<machine>--cpu.json, and the table between
`<!-- study:<name> -->` and `<!-- study:end -->` of the page where there are such marks.
"""

from __future__ import annotations

import argparse
import datetime
import json
import multiprocessing
import re
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import bench
from bench import Json
from run import default_output, write

SCHEMA = 1
ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Arm:
    """One way of training, at all seeds.

    Attributes:
        name: As in the table.
        settings: What differs from the preset, `NAME=VALUE`.
        start: Go on from what labels alone have taught (`START`) of the same seed; else anew.
        taught: That network also gives the pseudo-labels.
        steps: How many.
    """

    name: str
    settings: tuple[str, ...] = ()
    start: bool = True
    taught: bool = False
    steps: int = 1600


_NO_KNEES = ("loss.bending=0", "loss.bending_steps=0")
_LABELS_ONLY = ("loss.alpha=0", "loss.psi=0", "loss.mean_depth=0", *_NO_KNEES)
# Views would be passed through the network for nothing. Depths stay random, but small: limbs would
# hold on to whatever signs large ones have.
START = Arm(
    "start",
    (*_LABELS_ONLY, "data.images=31", "training.batch_size=32", "loss.mean_depth=3"),
    start=False,
    steps=2500,
)
_WEAK = Arm("labels, views, limbs (weak supervision)")

STUDIES: dict[str, tuple[Arm, ...]] = {
    "ablation": (
        Arm(
            "views alone",
            ("loss.heatmap_weight=0", "loss.psi=0", "loss.hold_2d_steps=0", *_NO_KNEES),
            start=False,
        ),
        Arm("2D labels alone, flat poses", (*_LABELS_ONLY, "model.reconstruction=flat")),
        Arm("labels, limbs", ("loss.alpha=0",)),
        Arm("labels, views", ("loss.psi=0",)),
        _WEAK,
        Arm("the same without knees first", _NO_KNEES),
        Arm("the same, views move 2D joints too", ("loss.hold_2d_steps=0",)),
        Arm("full 3D supervision", (*_LABELS_ONLY, "data.labels=3d", "loss.depth=2")),
    ),
    "views": (
        Arm("2 views", ("data.multi_view.studio.views=2",)),
        Arm("3 views", ("data.multi_view.studio.views=3",)),
        _WEAK,
    ),
    "pseudo": (
        _WEAK,
        Arm("pseudo-labels on half of the views", ("model.pseudo_fraction=0.5",), taught=True),
        Arm("pseudo-labels on all", taught=True),
        Arm("true 2D labels on all", ("data.labels=2d",)),
    ),
}

MEASURES = {
    "n_mpjpe": "N-MPJPE mm",
    "pa_mpjpe": "PA-MPJPE mm",
    "mpjpe": "MPJPE mm",
    "pck": "3DPCK %",
    "auc": "AUC %",
    "pixels": "2D px",
    "reversed": "reversed %",
}
NETWORK_MEASURES = {
    "absolute": "MPJPE mm",
    "relative": "relative to the pelvis",
    "absolute_hidden": "hidden joints",
}


def train_and_measure(arm: Arm, seed: int, runs: Path, extra: Sequence[str]) -> Json:
    """One network: its errors on unseen people, by the names of `MEASURES`."""
    from tritool.training import evaluate, load_config, train

    folder = _folder(arm, seed, runs)
    done = folder / "measured.json"
    if done.exists():
        made: Json = json.loads(done.read_text())
        return made
    # Heat maps alone come first in `START`; the others have that behind them.
    settings = [
        *arm.settings, f"training.steps={arm.steps}", "loss.pretrain_steps=0",
        f"training.seed={seed}", "training.tensorboard=false", "training.validate_every=1000",
        f"training.learning_rate={2e-3 if arm is START else 1.5e-3}", *extra,
    ]  # fmt: skip
    started = _folder(START, seed, runs) / "best.safetensors"
    if arm.start:
        settings.append(f"model.backbone_from={started}")
    if arm.taught:
        settings.append(f"model.pseudo_from={started}")
    config = load_config("small-weak", overrides=settings)
    train(config, folder, device="cpu")
    evaluation = evaluate(config, folder / "best.safetensors", device="cpu")
    measured = _measured(evaluation.to_json(), folder / "metrics.jsonl")
    write(done, measured)
    return measured


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


def _folder(arm: Arm, seed: int, runs: Path) -> Path:
    slug = re.sub(r"[^a-z0-9]+", "-", arm.name.lower()).strip("-")
    return runs / f"{slug}-{seed}"


def _measured(evaluation: Json, metrics: Path) -> Json:
    average = evaluation["report"]["average"]
    values = {name: average[name]["value"] for name in ("n_mpjpe", "pa_mpjpe")}
    values["mpjpe"] = average["mpjpe_relative"]["value"]
    for name in ("pck", "auc"):
        values[name] = 100 * average[name]["value"]
    values["pixels"] = evaluation["pixels"]["visible"]["mean"]
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    last = [record["validation"] for record in records if "validation" in record][-1]
    values["reversed"] = 100 * last["reversed"]
    return values


def summary(arms: Mapping[str, Mapping[int, Json]]) -> list[Json]:
    """A row for each arm: mean, least and greatest of every measure over the seeds."""
    rows = []
    for name, by_seed in arms.items():
        row: Json = {"arm": name, "seeds": {str(seed): made for seed, made in by_seed.items()}}
        for measure in next(iter(by_seed.values())):
            values = [made[measure] for made in by_seed.values()]
            row[measure] = {
                "mean": statistics.fmean(values), "least": min(values), "greatest": max(values),
            }  # fmt: skip
        rows.append(row)
    return rows


def table(rows: Sequence[Json], headings: Mapping[str, str]) -> str:
    """Markdown: means over the seeds, with least and greatest."""
    lines = ["|  | " + " | ".join(headings.values()) + " |", "| --- |" + " ---: |" * len(headings)]
    for row in rows:
        cells = []
        for measure in headings:
            value = row[measure]
            mean = f"{value['mean']:.1f}"
            spread = f" ({value['least']:.1f} to {value['greatest']:.1f})"
            cells.append(mean + (spread if len(row["seeds"]) > 1 else ""))
        lines.append(f"| {row['arm']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def insert(page: Path, name: str, text: str) -> None:
    """Puts the text between the page's marks, if it has some."""
    old = page.read_text(encoding="utf-8")
    begin, end = f"<!-- study:{name} -->", "<!-- study:end -->"
    before, found, rest = old.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        return
    aside = page.with_name(f"{page.name}.part")
    aside.write_text(f"{before}{begin}\n{text}\n{end}{after}", encoding="utf-8")
    aside.replace(page)


def run_weak(study: str, seeds: int, jobs: int, runs: Path, extra: Sequence[str]) -> list[Json]:
    """All arms of a study at all seeds."""
    arms = STUDIES[study]
    made: dict[str, dict[int, Json]] = {arm.name: {} for arm in arms}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context, initializer=_one_thread) as pool:
        for some in ((START,), arms):
            waiting = {
                pool.submit(train_and_measure, arm, seed, runs, extra): (arm.name, seed)
                for seed in range(seeds)
                for arm in some
            }
            for each in as_completed(waiting):
                name, seed = waiting[each]
                measured = each.result()
                told = ", ".join(f"{key} {value:.1f}" for key, value in measured.items())
                print(f"{name}, seed {seed}: {told}", file=sys.stderr, flush=True)
                if name in made:
                    made[name][seed] = measured
    return summary({name: dict(sorted(by_seed.items())) for name, by_seed in made.items()})


def run_networks(seeds: int, runs: Path) -> list[Json]:
    """The demonstration's networks at all seeds: absolute error of each method, and the gains."""
    made: dict[str, dict[int, Json]] = {}
    for seed in range(seeds):
        folder = runs / f"networks-{seed}"
        done = subprocess.run(
            [sys.executable, "-m", "tritool", "demo", "--networks", "--seed", str(seed),
             "-o", str(folder), "--json"],
            stdout=subprocess.PIPE, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            raise SystemExit(f"studies: tritool demo ended with {done.returncode}")
        told = json.loads(done.stdout)
        for method, each in told["comparison"]["methods"].items():
            means = {key: value["mean"] for key, value in each["means"].items()}
            made.setdefault(method, {})[seed] = {key: means[key] for key in NETWORK_MEASURES}
    return summary(made)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a study."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("study", choices=(*STUDIES, "networks"))
    parser.add_argument("--seeds", type=int, default=3, help="how many (default: 3)")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time (default: 2)")
    parser.add_argument("--runs", type=Path, default=ROOT / ".benchmarks" / "studies")
    parser.add_argument("--output", type=Path, help="the JSON (default: benchmarks/results/...)")
    parser.add_argument("--docs", type=Path, help="the page (default: that of the study)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="for every run"
    )
    options = parser.parse_args(arguments)
    if options.study == "networks":
        rows = run_networks(options.seeds, options.runs)
    else:
        rows = run_weak(options.study, options.seeds, options.jobs, options.runs, options.set)
    environment = bench.environment("cpu")
    result = {
        "schema": SCHEMA,
        "suite": f"study-{options.study}",
        "machine": bench.machine_slug("cpu"),
        "device": "cpu",
        "date": datetime.date.today().isoformat(),
        "settings": {"seeds": options.seeds, "set": options.set},
        "environment": environment,
        "rows": rows,
    }
    write(options.output or default_output(result, quick=False), result)
    networks = options.study == "networks"
    text = table(rows, NETWORK_MEASURES if networks else MEASURES)
    pages = ["README.md", "docs/training.md"] if networks else ["docs/weak_supervision.md"]
    for page in [options.docs] if options.docs else [ROOT / page for page in pages]:
        insert(page, options.study, text)
    print(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
