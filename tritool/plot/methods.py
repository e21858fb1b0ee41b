# SPDX-License-Identifier: Apache-2.0
"""Pictures of several methods beside each other: their errors, and how they learned."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from torch import Tensor

from tritool.data.recording import Array
from tritool.plot.drawing import (
    GREY,
    INK,
    PALE,
    headline,
    light,
    new_figure,
    save_figure,
    tint,
    title,
    verbatim,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Told apart by colour-blind eyes, and by how light they are.
METHOD_COLOURS = ("#e69f00", "#0072b2", "#009e73", "#cc79a7", "#56b4e9", "#7a5195", "#8c6d31")
# The curve of errors ends where this part of all joints, of the worst method, is below.
_CURVE_END = 0.95
# Losses are drawn as they are, pale, and as a running mean over this part of the steps.
_SMOOTH = 0.02


class Interval(Protocol):
    """A mean and its 95 % interval; None where nothing counts."""

    @property
    def mean(self) -> float | None:
        """The mean, mm."""

    @property
    def low(self) -> float | None:
        """Where the interval begins."""

    @property
    def high(self) -> float | None:
        """Where it ends."""


class Difference(Protocol):
    """What one method gains over another."""

    @property
    def first(self) -> str:
        """The one."""

    @property
    def second(self) -> str:
        """The other."""

    @property
    def measure(self) -> str:
        """Among the measures of `Comparison`."""

    @property
    def value(self) -> Interval:
        """The error of the second less that of the first."""


class Comparison(Protocol):
    """Methods on the same F samples of J joints, as `tritool.training.compare` gives it."""

    @property
    def joint_names(self) -> Sequence[str]:
        """J names."""

    @property
    def errors(self) -> Mapping[str, Tensor]:
        """By method, `[F, J]`, mm; NaN where there is none."""

    @property
    def known(self) -> Tensor:
        """`[F, J]`, which joints have a true place."""

    @property
    def means(self) -> Mapping[str, Mapping[str, Interval]]:
        """By method, then by measure: "absolute" and "absolute_hidden"."""

    @property
    def sweep(self) -> Mapping[int, Mapping[str, Interval]]:
        """By number of views, 0 for all, then by method."""

    @property
    def differences(self) -> Sequence[Difference]:
        """Of methods that follow on each other."""


def plot_methods(path: str | os.PathLike[str], comparison: Comparison) -> None:
    """Draws how methods compare: means, joints, numbers of views, all errors.

    Args:
        path: the file, ``.png``, ``.pdf`` or ``.svg``; replaced if it exists.
        comparison: of `tritool.training.compare`.

    Raises:
        OSError: the file cannot be written; what was there before is untouched.
    """
    names = list(comparison.means)
    colours = {
        name: METHOD_COLOURS[at % len(METHOD_COLOURS)] for at, name in enumerate(names)
    }  # fmt: skip
    figure = new_figure(14.0, 10.0)
    best = [
        (value.mean, name) for name in names
        if (value := comparison.means[name]["absolute"]).mean is not None
    ]  # fmt: skip
    text = "No joint that all methods found"
    if best:
        least, name = min(best)
        text = f"{name}: {least:.1f} mm" + (", the least of all" if len(best) > 1 else "")
    count = len(comparison.known)
    headline(
        figure, text,
        f"MPJPE, absolute, on the same {count} samples; bars and bands: 95 % intervals",
        left=0.05,
    )  # fmt: skip
    grid = figure.add_gridspec(
        2, 2, left=0.12, right=0.975, top=0.85, bottom=0.07, hspace=0.42, wspace=0.28,
        width_ratios=(1.1, 1), height_ratios=(1, 1.15),
    )  # fmt: skip
    _draw_means(figure.add_subplot(grid[0, 0]), comparison, colours)
    _draw_sweep(figure.add_subplot(grid[0, 1]), comparison, colours)
    _draw_joints(figure.add_subplot(grid[1, 0]), comparison, colours)
    _draw_curve(figure.add_subplot(grid[1, 1]), comparison, colours)
    save_figure(path, figure)


def _draw_means(axes: Axes, comparison: Comparison, colours: Mapping[str, str]) -> None:
    rows: list[str] = []
    right = 0.0
    for row, (name, means) in enumerate(comparison.means.items()):
        bars = (("absolute", -0.2, 0.95), ("absolute_hidden", 0.2, 0.45))
        for key, shift, strength in bars:
            value = means[key]
            if value.mean is None:
                axes.text(0, row + shift, "  no joint", va="center", fontsize=9, color=GREY)
                continue
            axes.barh(row + shift, value.mean, 0.36, color=tint(colours[name], strength))
            end = value.mean
            if value.low is not None and value.high is not None:
                axes.plot(
                    [value.low, value.high], [row + shift] * 2, color=INK, linewidth=1.6,
                    solid_capstyle="butt",
                )  # fmt: skip
                end = value.high
            label = f"  {value.mean:.1f}" + ("  hidden joints" if key != "absolute" else "")
            axes.text(end, row + shift, label, va="center", fontsize=9.5, color=INK)
            right = max(right, end)
        rows.append(verbatim(name))
        gains = [
            each.value for each in comparison.differences
            if each.second == name and each.measure == "absolute"
        ]  # fmt: skip
        if gains and gains[0].mean is not None:
            rows[-1] += f"\n{gains[0].mean:+.1f} mm"
            if gains[0].low is not None and gains[0].high is not None:
                rows[-1] += f"\n[{gains[0].low:+.1f}, {gains[0].high:+.1f}]"
    axes.set_yticks(range(len(rows)), rows)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlim(0, 1.28 * right or 1)
    light(axes)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color=PALE, linewidth=0.8)
    axes.set_axisbelow(True)
    title(
        axes, "MPJPE [mm]",
        "below a name: paired difference to the method above\nhidden: in at least half of the "
        "views",
    )  # fmt: skip


def _draw_sweep(axes: Axes, comparison: Comparison, colours: Mapping[str, str]) -> None:
    numbers = sorted(comparison.sweep, key=lambda number: number or np.inf)
    for name, colour in colours.items():
        values = [comparison.sweep[number][name] for number in numbers]
        mean, low, high = (
            np.array([getattr(value, end) for value in values], dtype=np.float64)
            for end in ("mean", "low", "high")
        )
        places = np.arange(len(numbers), dtype=np.float64)
        axes.fill_between(places, low, high, color=colour, alpha=0.18, linewidth=0)
        axes.plot(
            places, mean, "o-", color=colour, linewidth=2, markersize=6, markeredgecolor="white"
        )
        for place, value in zip(places, mean, strict=True):
            if np.isfinite(value) and len(numbers) == 1:
                axes.annotate(f"{value:.1f}", (place, value), (9, 0), textcoords="offset points")
    axes.set_xticks(range(len(numbers)), ["all" if n == 0 else str(n) for n in numbers])
    axes.set_xlim(-0.3, len(numbers) - 0.7)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("views")
    axes.set_ylabel("MPJPE [mm]")
    light(axes)
    axes.grid(axis="y", color=PALE, linewidth=0.8)
    axes.set_axisbelow(True)
    title(axes, "Error against number of views", "the same views for every method")
    _key(axes, colours)


def _draw_joints(axes: Axes, comparison: Comparison, colours: Mapping[str, str]) -> None:
    common = np.all([~np.isnan(_array(each)) for each in comparison.errors.values()], axis=0)
    means = {
        name: _column_means(np.where(common, _array(each), np.nan))
        for name, each in comparison.errors.items()
    }
    count = len(comparison.joint_names)
    together = np.stack(list(means.values()))
    for joint in range(count):
        column = together[:, joint]
        column = column[np.isfinite(column)]
        if len(column):
            axes.plot([column.min(), column.max()], [joint] * 2, color=PALE, linewidth=3, zorder=1)
    for name, colour in colours.items():
        axes.scatter(
            means[name],
            range(count),
            s=52,
            color=colour,
            edgecolors="white",
            linewidths=0.8,
            zorder=3,
        )
    labels = [verbatim(name.replace("_", " ")) for name in comparison.joint_names]
    axes.set_yticks(range(count), labels)
    axes.set_ylim(count - 0.4, -0.6)
    axes.set_xlim(left=0)
    axes.set_xlabel("mean error [mm]")
    light(axes)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color=PALE, linewidth=0.8)
    axes.set_axisbelow(True)
    title(axes, "Error per joint", "where all methods found it")


def _draw_curve(axes: Axes, comparison: Comparison, colours: Mapping[str, str]) -> None:
    known = comparison.known.cpu().numpy().astype(bool)
    end = 0.0
    for name, each in comparison.errors.items():
        errors = _array(each)[known]
        found = np.sort(errors[np.isfinite(errors)])
        if not len(found):
            continue
        # Joints that were not found are below no threshold: the curve does not reach 100 %.
        share = 100 * np.arange(1, len(found) + 1) / known.sum()
        axes.plot(found, share, color=colours[name], linewidth=2, drawstyle="steps-post")
        end = max(end, float(np.quantile(found, _CURVE_END)))
    axes.set_xlim(0, end or 1)
    axes.set_ylim(0, 100)
    axes.set_xlabel("threshold [mm]")
    axes.set_ylabel("joints with a smaller error [%]")
    light(axes)
    axes.grid(color=PALE, linewidth=0.8)
    axes.set_axisbelow(True)
    title(axes, "All errors", "joints that were not found are below no threshold")


def plot_learning_curves(
    path: str | os.PathLike[str], curves: Mapping[str, str | os.PathLike[str]]
) -> None:
    """Draws how networks learned: losses and validation error against steps.

    Args:
        path: the file, ``.png``, ``.pdf`` or ``.svg``; replaced if it exists.
        curves: by method, the ``metrics.jsonl`` that `tritool train` writes.

    Raises:
        OSError: a file cannot be read or written; the picture that was there before is untouched.
        ValueError: there is no curve, or a file is not of that kind.
    """
    if not curves:
        raise ValueError("curves must be at least one file, got none")
    records = {name: _records(file) for name, file in curves.items()}
    colours = {
        name: METHOD_COLOURS[at % len(METHOD_COLOURS)] for at, name in enumerate(records)
    }  # fmt: skip
    figure = new_figure(14.0, 5.4)
    ends = [
        f"{name} {validated[-1][1]:.1f} mm at step {validated[-1][0]}"
        for name, each in records.items()
        if (validated := _validation(each, "mpjpe_absolute"))
    ]
    headline(figure, "How they learned", "validation MPJPE at the end:  " + "   |   ".join(ends)
             if ends else "not validated yet", left=0.05)  # fmt: skip
    cells = figure.add_gridspec(
        1, 3, left=0.065, right=0.98, top=0.73, bottom=0.12, wspace=0.24
    )  # fmt: skip
    loss, absolute, relative = (figure.add_subplot(cells[column]) for column in range(3))
    for name, each in records.items():
        points = [(r["step"], r["loss"]) for r in each if _positive(r.get("loss"))]
        if points:
            steps, values = np.array(points, dtype=np.float64).T
            # Kinds of networks have losses of different units: relative to where each began.
            values = values / values[0]
            _draw_noisy(loss, steps, values, colours[name])
    loss.set_yscale("log")
    loss.set_ylabel("loss / first loss")
    title(loss, "Training loss", "each relative to its first; line: running mean")
    for axes, key, heading in (
        (absolute, "mpjpe_absolute", "absolute"),
        (relative, "mpjpe_relative", "relative to the pelvis"),
    ):
        for name, each in records.items():
            measured = _validation(each, key)
            if measured:
                axes.plot(
                    *zip(*measured, strict=True), "o-", color=colours[name], linewidth=2,
                    markersize=5, markeredgecolor="white",
                )  # fmt: skip
        axes.set_yscale("log")
        axes.set_ylabel("MPJPE [mm]")
        title(axes, "Validation error", heading)
    for axes in (loss, absolute, relative):
        axes.set_xlabel("step")
        axes.set_xlim(left=0)
        light(axes)
        axes.grid(color=PALE, linewidth=0.8, which="both")
        axes.set_axisbelow(True)
        _plain_ticks(axes)
    _key(absolute, colours)
    save_figure(path, figure)


def _draw_noisy(axes: Axes, steps: Array, values: Array, colour: str) -> None:
    """Draws a noisy curve: as it is, pale, and its running mean."""
    axes.plot(steps, values, color=colour, linewidth=0.8, alpha=0.3)
    reach = max(1, round(_SMOOTH * len(values)))
    total = np.concatenate([[0.0], np.cumsum(values)])
    at = np.arange(len(values))
    low, high = np.maximum(at - reach, 0), np.minimum(at + reach + 1, len(values))
    axes.plot(steps, (total[high] - total[low]) / (high - low), color=colour, linewidth=2)


def _records(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The lines of a file of learning curves; a last line that was being written is left out."""
    lines = Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    found = []
    for number, line in enumerate(lines):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            found.append(record)
        elif number + 1 < len(lines):
            raise ValueError(f"{os.fspath(path)}: line {number + 1} is no line of learning curves")
    if not found:
        raise ValueError(f"{os.fspath(path)}: there is no line of learning curves in it")
    return found


def _validation(records: Sequence[Mapping[str, Any]], key: str) -> list[tuple[int, float]]:
    """(step, value) of each validation that has one."""
    values = ((each["step"], each.get("validation")) for each in records)
    return [
        (step, value[key]) for step, value in values
        if isinstance(value, Mapping) and _positive(value.get(key))
    ]  # fmt: skip


def _positive(value: object) -> bool:
    return isinstance(value, int | float) and value > 0


def _key(axes: Axes, colours: Mapping[str, str]) -> None:
    """Names the methods above an axes, at the right."""
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=colour, marker="o", markeredgecolor="white", linewidth=2,
               label=verbatim(name))
        for name, colour in colours.items()
    ]  # fmt: skip
    axes.legend(
        handles=handles, loc="best", frameon=False, fontsize=10, labelcolor=INK, handlelength=1.6
    )


def _plain_ticks(axes: Axes) -> None:
    """Numbers of a logarithmic scale as people write them."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    for which in ("major", "minor"):
        getattr(axes.yaxis, f"set_{which}_formatter")(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_locator(LogLocator(subs=()))


def _column_means(values: Array) -> Array:
    """Means over rows; NaN where a column has none, without a warning."""
    finite = np.isfinite(values)
    count = finite.sum(axis=0)
    total = np.where(finite, values, 0).sum(axis=0)
    means: Array = np.where(count > 0, total / np.maximum(count, 1), np.nan)
    return means


def _array(tensor: Tensor) -> Array:
    return np.asarray(tensor.detach().cpu().double().numpy())
