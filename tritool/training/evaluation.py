# SPDX-License-Identifier: Apache-2.0
"""Trained networks on the validation part of their data: figures, tables, pictures."""

from __future__ import annotations

import errno
import json
import os
import re
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tritool.data.recording import written_aside
from tritool.data.sample import Batch, Sample, collate
from tritool.metrics import mpjpe
from tritool.training.config import Config
from tritool.training.measuring import ALL_VIEWS, Found, Truth, ViewedSamples, measure
from tritool.training.report import (
    Comparison,
    Evaluation,
    Origin,
    make_comparison,
    make_evaluation,
)
from tritool.training.tasks import Prediction, Task, build_task

__all__ = ["Comparison", "Evaluation", "compare", "evaluate"]

# `compare` draws the pose at this place among all ordered by their error: hard, not the hardest.
_HARD = 0.9

# Model settings that may differ from those of training without a word.
_FREE = frozenset(
    {
        "backbone_from", "official_checkpoint", "imagenet_trunk", "checkpointing", "center_noise",
        "random_rotation", "algebraic_from", "readout", "threshold", "pairs", "refine",
        "reconstruction", "pseudo_from", "pseudo_threshold", "pseudo_fraction",
    }
)  # fmt: skip


def evaluate(
    config: Config,
    checkpoint: str | os.PathLike[str] | None,
    *,
    views: Sequence[int] | None = None,
    output: str | os.PathLike[str] | None = None,
    limit: int | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    exclude: Collection[tuple[str, str]] = (),
    pictures: int = 4,
    workers: int = 0,
    device: str | None = None,
    progress: Callable[[int], object] | None = None,
) -> Evaluation:
    """Measures a network on the validation part of its data.

    Args:
        config: Of the network and its data.
        checkpoint: Its weights, the averaged ones if there are any; None: those it is built with,
            or that the configuration says training starts from.
        views: Numbers of views to measure with, besides all.
        output: Folder for `evaluation.json`, `evaluation.txt` and pictures; made if need be.
            None: nothing is written.
        limit: How many samples, from the start; None: all.
        batch_size: Samples at once; None: as in training.
        seed: Of the drawing of views.
        exclude: Pairs (subject, action) whose poses are left out of the 3D figures.
        pictures: How many poses are drawn into `output`: from the best to the worst in even steps,
            `prediction_p000.png` to `prediction_p100.png`. Of one, the one in the middle.
        workers: Processes that make samples; 0: none besides this one.
        device: "cpu", "cuda" or "cuda:1"; None: a GPU if there is one.
        progress: Called with the number of samples done since the last call.

    Returns:
        The figures and how they were made.

    Raises:
        CheckpointError: The checkpoint is damaged, or of another network: one line.
        ImportError: Reading checkpoints needs a package that is not installed.
        OSError: A file cannot be read or written.
        ValueError: An option does not fit the data, or the configuration the checkpoint.
    """
    if pictures < 0:
        raise ValueError(f"pictures must be 0 or more, got {pictures}")
    folder = _checked_folder(output)
    method = _load(config.name, config, checkpoint, _device(device))
    data: ViewedSamples = config.data.dataset("validation")
    truth, found = measure(
        {config.name: method.predict},
        data,
        views=views or (),
        seed=seed,
        limit=limit,
        batch_size=config.training.batch_size if batch_size is None else batch_size,
        workers=workers,
        device=method.device,
        progress=progress,
    )
    evaluation = make_evaluation(
        method.origin,
        truth,
        found[config.name],
        data=_data_sentences(config, truth, seed),
        settings=_data_settings(config, len(truth.indices), seed),
        exclude=exclude,
    )
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        places = [0.5] if pictures == 1 else np.linspace(0, 1, pictures).tolist()
        for place, position in _pictured(truth, found[config.name], places).items():
            _draw(folder / f"prediction_p{100 * place:03.0f}.png", method, data[position])
        _write(folder, "evaluation", evaluation.to_json(), evaluation.table())
    return evaluation


def compare(
    methods: Mapping[str, tuple[Config, str | os.PathLike[str] | None]],
    *,
    views: Sequence[int] | None = None,
    output: str | os.PathLike[str] | None = None,
    limit: int | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    workers: int = 0,
    device: str | None = None,
    progress: Callable[[int], object] | None = None,
) -> Comparison:
    """Measures several networks on the same samples, and the differences between them.

    Args:
        methods: By name: configuration and checkpoint, as of `evaluate`. Each is compared with the
            one before it. Their validation data are the same.
        views: As of `evaluate`.
        output: Folder for `comparison.json`, `comparison.txt`, `methods.png` and a picture of one
            sample for each method; made if need be. None: nothing is written.
        limit: As of `evaluate`.
        batch_size: Samples at once; None: the least of the configurations.
        seed: As of `evaluate`.
        workers: As of `evaluate`.
        device: As of `evaluate`.
        progress: As of `evaluate`.

    Returns:
        The figures and how they were made.

    Raises:
        CheckpointError: As of `evaluate`.
        ImportError: As of `evaluate`.
        OSError: As of `evaluate`.
        ValueError: As of `evaluate`; or there is no method, or the data differ.
    """
    _check_same_data(methods)
    folder = _checked_folder(output)
    where = _device(device)
    loaded = {
        name: _load(name, config, checkpoint, where)
        for name, (config, checkpoint) in methods.items()
    }
    first = next(iter(methods.values()))[0]
    data: ViewedSamples = first.data.dataset("validation")
    least = min(config.training.batch_size for config, _ in methods.values())
    truth, found = measure(
        {name: method.predict for name, method in loaded.items()},
        data,
        views=views or (),
        seed=seed,
        limit=limit,
        batch_size=least if batch_size is None else batch_size,
        workers=workers,
        device=where,
        progress=progress,
    )
    sentences = _data_sentences(first, truth, seed)
    settings = _data_settings(first, len(truth.indices), seed)
    evaluations = {
        name: make_evaluation(method.origin, truth, found[name], data=sentences, settings=settings)
        for name, method in loaded.items()
    }
    comparison = make_comparison(evaluations, truth, found, data=sentences)
    if folder is not None:
        from tritool.plot import plot_methods

        folder.mkdir(parents=True, exist_ok=True)
        plot_methods(folder / "methods.png", comparison)
        # A pose that is hard for the method that is compared last.
        for position in _pictured(truth, found[list(loaded)[-1]], [_HARD]).values():
            sample = data[position]
            for file, method in zip(_file_names(loaded), loaded.values(), strict=True):
                _draw(folder / f"prediction_{file}.png", method, sample)
        _write(folder, "comparison", comparison.to_json(), comparison.table())
    return comparison


@dataclass(frozen=True, eq=False)
class _Method:
    """A network with its weights."""

    origin: Origin
    task: Task
    device: torch.device

    def predict(self, batch: Batch) -> Prediction:
        return self.task.predict(batch)


def _load(
    name: str, config: Config, checkpoint: str | os.PathLike[str] | None, device: torch.device
) -> _Method:
    task = build_task(config)
    notes: list[str] = []
    step = None
    if checkpoint is None:
        notes += [f"Loaded before any training: {line}." for line in task.start_weights()]
    else:
        from tritool.training.state import CheckpointError, read_model

        weights, info = read_model(checkpoint, kind=config.kind)
        own = task.model.state_dict()
        for key in [*own, *weights]:
            here = tuple(own[key].shape) if key in own else "none"
            there = tuple(weights[key].shape) if key in weights else "none"
            if here != there:
                raise CheckpointError(
                    f"{os.fspath(checkpoint)}: it is of another network: {key} is {there} in it, "
                    f"{here} in the configuration {config.name}"
                )
        task.model.load_state_dict(weights)
        step = info.get("step")
        notes += _changed(config, info.get("config", {}))
        for note in notes:
            warnings.warn(f"tritool: {os.fspath(checkpoint)}: {note}", stacklevel=3)
    task.model.to(device)
    origin = Origin(
        name=name,
        kind=config.kind,
        checkpoint=None if checkpoint is None else os.fspath(checkpoint),
        step=step,
        center=_center(config),
        notes=tuple(notes),
    )
    return _Method(origin, task, device)


def _changed(config: Config, trained: Mapping[str, Any]) -> list[str]:
    """What differs from training, or should, and does not: the figures may not be right."""
    now = _plain(config.to_dict()["model"])
    then = _plain(trained.get("model", {}))
    different = [
        f"{key} {now[key]} (in training {then[key]})"
        for key in now
        if key in then and key not in _FREE and now[key] != then[key]
    ]
    notes = []
    if different:
        notes.append(f"Model settings differ from training: {', '.join(different)}.")
    # The people of a studio belong to its seed.
    parts = trained.get("data", {})
    learnt = [
        part.get("seed")
        for name, part in parts.items()
        if name != "validation" and isinstance(part, Mapping)
    ]
    measured = _plain(config.to_dict()["data"]).get("validation", {}).get("seed")
    if measured is not None and measured in learnt:
        notes.append(f"It was trained on data of the same seed, {measured}: on the same people.")
    return notes


def _center(config: Config) -> str | None:
    """Where the centre of the cube comes from."""
    settings = config.model
    if config.kind != "volumetric":
        return None
    source = getattr(settings, "algebraic_from", None)
    return (
        "the true pelvis, given"
        if source is None
        else f"the pelvis found by the algebraic network {source} in the same views"
    )


def _check_same_data(
    methods: Mapping[str, tuple[Config, str | os.PathLike[str] | None]],
) -> None:
    if not methods:
        raise ValueError("methods must be at least one, got none")
    settings = {}
    for name, (config, _) in methods.items():
        part = _validation(config)
        # What they were trained on may differ, in kind as well.
        settings[name] = _flat({k: v for k, v in part.items() if k != "kind"} or part)
    first, *others = settings
    for name in others:
        for key in [*settings[first], *settings[name]]:
            one, other = settings[first].get(key), settings[name].get(key)
            if one != other:
                raise ValueError(
                    f"methods must have the same validation data, but {key} is {one!r} for "
                    f"{first} and {other!r} for {name}"
                )


def _validation(config: Config) -> Any:
    """The part of the data that is measured on, as what JSON can hold."""
    data = _plain(config.to_dict()["data"])
    return (
        {"kind": data["kind"], "validation": data["validation"]} if "validation" in data else data
    )


def _data_settings(config: Config, samples: int, seed: int) -> dict[str, Any]:
    return {**_validation(config), "samples": samples, "views_seed": seed}


def _data_sentences(config: Config, truth: Truth, seed: int) -> tuple[str, ...]:
    data = _validation(config)
    part = data.get("validation", {})
    told = {key: value for key, value in part.items() if not isinstance(value, Mapping)}
    told |= _unusual(getattr(getattr(config.data, "validation", None), "studio", None))
    count = len(truth.indices)
    of = f" of {part['length']}" if part.get("length", count) != count else ""
    settings = ", ".join(
        f"{key} {_told(value)}" for key, value in told.items() if key not in ("kind", "length")
    )
    return (
        f"Data: {data['kind']}, validation part, {count} samples{of}"
        + (f"; {settings}." if settings else "."),
        f"Joints: {len(truth.joint_names)}. Seed of the views: {seed}.",
    )


def _unusual(settings: Any) -> dict[str, Any]:
    """The settings of a dataclass that are not its defaults."""
    if settings is None:
        return {}
    usual = type(settings)()
    values = {field.name: getattr(settings, field.name) for field in fields(settings)}
    return {key: value for key, value in values.items() if value != getattr(usual, key)}


def _told(value: object) -> str:
    if isinstance(value, list | tuple):
        return "(" + ", ".join(map(_told, value)) + ")"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _pictured(
    truth: Truth, found: Mapping[int, Found], places: Sequence[float]
) -> dict[float, int]:
    """Positions of the samples at places from 0 to 1 in the order of their errors, each once.

    None for poses of which nothing was found.
    """
    errors = mpjpe(found[ALL_VIEWS].keypoints_3d, truth.keypoints_3d, reduction="pose").numpy()
    order = np.argsort(errors)[: int(np.isfinite(errors).sum())]
    chosen: dict[float, int] = {}
    for place in places if len(order) else ():
        position = int(order[round(place * (len(order) - 1))])
        if position not in chosen.values():
            chosen[place] = position
    return chosen


def _draw(path: Path, method: _Method, sample: Sample) -> None:
    from tritool.plot import plot_prediction

    prediction = method.predict(collate([sample]).to(method.device))
    plot_prediction(
        path,
        sample,
        prediction,
        name=method.origin.name,
        inverse_temperature=float(getattr(method.task.config.model, "inverse_temperature", 1.0)),
    )


def _checked_folder(output: str | os.PathLike[str] | None) -> Path | None:
    """The folder to write into: what is in its way is said before anything is computed."""
    if output is None:
        return None
    folder = Path(output)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), os.fspath(folder))
    return folder


def _write(folder: Path, name: str, values: Mapping[str, Any], table: str) -> None:
    text = json.dumps(values, indent=1, allow_nan=False)
    for suffix, content in ((".txt", table), (".json", text)):
        with written_aside(folder / f"{name}{suffix}") as aside:
            aside.write_text(content + "\n", encoding="utf-8")


def _file_names(names: Collection[str]) -> list[str]:
    """What files of each are called: without what a file name may not have, no two alike."""
    found: list[str] = []
    for name in names:
        plain = re.sub(r"[^\w.-]+", "-", name).strip(".-") or "method"
        number = 1
        while (file := plain if number == 1 else f"{plain}-{number}") in found:
            number += 1
        found.append(file)
    return found


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"device must be one of this machine, got {name!r}: {reason}") from None
    return device


def _plain(values: Any) -> Any:
    """The same after a way through JSON: pairs are lists, as in a checkpoint."""
    return json.loads(json.dumps(values))


def _flat(values: Any, start: str = "") -> dict[str, Any]:
    if not isinstance(values, Mapping):
        return {start: values}
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{start}.{key}" if start else str(key))
    return flat
