# SPDX-License-Identifier: Apache-2.0
"""The pictures of docs/benchmarks.md: speed-ups, the bandwidth reached, and how times scale."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from bench import MODES, Json
from launches import operand_bytes
from matplotlib.axes import Axes
from recorded import MODE_NAMES, factor, fastest_rival, ours, processor

COLOURS = dict(zip(MODES, ("#1f77b4", "#ff7f0e"), strict=True))
SPEED_UP_TICKS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500)
VERSIONS = {"tritool": "tritool", "rival": "fastest accurate plain PyTorch"}


def save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, metadata={"Software": None})
    plt.close(figure)


def measured(result: Json) -> list[Json]:
    return [case for case in result["cases"] if "failure" not in case]


def case_panels(cases: Sequence[Sequence[Json]]) -> tuple[Any, Sequence[Axes]]:
    """Panels side by side, with a row for each case, from the top."""
    size = (7.5 * len(cases), 1.2 + 0.42 * max(map(len, cases)))
    figure, panels = plt.subplots(1, len(cases), figsize=size, squeeze=False, layout="constrained")
    for panel, rows in zip(panels[0], cases, strict=True):
        labels = [f"{case['op']}  {case['size']}" for case in rows]
        panel.set_yticks(range(len(labels)), labels, fontsize=8)
        panel.set_ylim(len(labels) - 0.4, -0.6)
        panel.grid(axis="x", alpha=0.3)
        panel.set_axisbelow(True)
    return figure, panels[0]


def draw_headlines(result: Json, path: Path) -> None:
    """The README's sizes: speed-ups, and beside them the bandwidth reached."""
    cases = [case for case in measured(result) if case["headline"]]
    figure, (left, right) = case_panels([cases, cases])
    draw_speed_up_bars(left, cases)
    draw_bandwidth_bars(right, cases, result["settings"]["bandwidth_gb_s"])
    right.set_yticklabels([])
    figure.suptitle(processor(result))
    save(figure, path)


# ---- speed-ups ----


def draw_speed_ups(results: Sequence[Json], path: Path) -> None:
    """All cases, one panel for each machine of the main suite."""
    figure, panels = case_panels([measured(result) for result in results])
    for panel, result in zip(panels, results, strict=True):
        draw_speed_up_bars(panel, measured(result))
        panel.set_title(processor(result))
    save(figure, path)


def draw_speed_up_bars(panel: Axes, cases: Sequence[Json]) -> None:
    """Horizontal bars from 1, on a logarithmic axis."""
    for shift, mode in zip((-0.2, 0.2), MODES, strict=True):
        bars = [
            (row + shift, rival["times"][mode]["ratio"])
            for row, case in enumerate(cases)
            if (rival := fastest_rival(case, mode)) is not None
        ]
        panel.barh(
            [row for row, _ in bars],
            [ratio - 1 for _, ratio in bars],
            height=0.38,
            left=1,
            color=COLOURS[mode],
            label=MODE_NAMES[mode],
        )
        for row, ratio in bars:
            beside = {"xytext": (3, 0), "ha": "left"}
            if ratio < 1:
                beside = {"xytext": (-3, 0), "ha": "right"}
            panel.annotate(
                factor(ratio), (ratio, row), textcoords="offset points", va="center",
                fontsize=7, **beside,
            )  # fmt: skip
    panel.set(xscale="log")
    panel.set_xlabel("speed-up over the fastest accurate plain PyTorch version")
    panel.axvline(1, color="black", linewidth=0.8)
    low, high = panel.get_xlim()
    low, high = min(low, 0.7) * 0.8, high * 1.6
    ticks = [tick for tick in SPEED_UP_TICKS if low <= tick <= high]
    panel.set_xticks(ticks, [f"{tick:g}x" for tick in ticks])
    panel.set_xlim(low, high)
    panel.minorticks_off()
    panel.legend(loc="lower right", fontsize=8)


# ---- bandwidth ----


def bytes_moved(case: Json, mode: str) -> int:
    """What a call cannot do without: each input read once, each result written once."""
    passes = ("forward", "backward") if mode == "forward_backward" else ("forward",)
    return sum(
        sum(operand_bytes(case["op"], case["size"], case["shape"], one).values()) for one in passes
    )


def share_of_bandwidth(case: Json, row: Json, mode: str, available: Mapping[str, float]) -> float:
    """Of the faster of a copy and a sum: 1 is as fast as memory."""
    gb_s = bytes_moved(case, mode) / row["times"][mode]["median_ms"] / 1e6
    return gb_s / max(available.values())


LEAST_BYTES = 4 << 20
"""Smaller operands stay in the caches, and their calls are mostly overhead."""


def large(result: Json) -> list[Json]:
    return [case for case in measured(result) if bytes_moved(case, "forward") >= LEAST_BYTES]


def draw_bandwidth(results: Sequence[Json], path: Path) -> None:
    """All large cases, one panel for each machine of the main suite."""
    figure, panels = case_panels([large(result) for result in results])
    for panel, result in zip(panels, results, strict=True):
        draw_bandwidth_bars(panel, large(result), result["settings"]["bandwidth_gb_s"])
        panel.set_title(processor(result))
    save(figure, path)


def draw_bandwidth_bars(panel: Axes, cases: Sequence[Json], available: Mapping[str, float]) -> None:
    """Bars for tritool, marks for the fastest rival; what memory gives is the line at 100 %."""
    for shift, mode in zip((-0.2, 0.2), MODES, strict=True):
        rows = [row + shift for row in range(len(cases))]
        shares = [share_of_bandwidth(case, ours(case), mode, available) for case in cases]
        panel.barh(rows, shares, height=0.38, color=COLOURS[mode], label=MODE_NAMES[mode])
        for row, share in zip(rows, shares, strict=True):
            panel.annotate(
                f"{100 * share:.0f} %", (share, row), xytext=(3, 0), textcoords="offset points",
                va="center", fontsize=7,
            )  # fmt: skip
        rivals = [
            (row, share_of_bandwidth(case, rival, mode, available))
            for row, case in zip(rows, cases, strict=True)
            if (rival := fastest_rival(case, mode)) is not None
        ]
        panel.plot(
            [share for _, share in rivals], [row for row, _ in rivals],
            "D", color="black", markersize=3, label=VERSIONS["rival"] if mode == MODES[0] else None,
        )  # fmt: skip
    panel.axvline(1, color="black", linewidth=0.8)
    panel.set_xlim(0, panel.get_xlim()[1] * 1.08)
    panel.xaxis.set_major_formatter(lambda share, _: f"{100 * share:.0f} %")
    panel.set_xlabel(f"bandwidth reached, of {max(available.values()):.3g} GB/s")
    panel.legend(loc="lower right", fontsize=8)


# ---- scaling ----


@dataclass(frozen=True)
class Sweep:
    """Cases of an operation that differ in one thing."""

    op: str
    axis: str
    label: str
    fixed: Mapping[str, int] = field(default_factory=dict)
    size: str = ""
    """What the sizes begin with, where their shapes do not tell all."""

    def cases(self, result: Json) -> list[Json]:
        found = [
            case
            for case in measured(result)
            if case["op"] == self.op
            and case["size"].startswith(self.size)
            and "channels last" not in case["size"]
            and all(case["shape"][axis] == size for axis, size in self.fixed.items())
        ]
        return sorted(found, key=lambda case: case["shape"][self.axis])

    @property
    def title(self) -> str:
        fixed = ", ".join(f"{axis}={size}" for axis, size in self.fixed.items())
        return f"{self.op} {self.size}".strip() + (f"\n{fixed}" if fixed else "\n")


SWEEPS = (
    Sweep("triangulate", "N", "points N", {"C": 4}),
    Sweep("triangulate", "C", "views C", {"N": 100011}),
    Sweep("project", "C", "views C", {"N": 100000}),
    Sweep("rigid_align", "N", "poses N", {"J": 17}),
    Sweep("soft_argmax3d", "B", "batch B", {"X": 64}),
    Sweep("soft_argmax3d", "X", "voxels along a side X", {"B": 4}),
    Sweep("unproject", "B", "batch B", {"C": 4, "K": 32, "X": 64}, "softmax"),
    Sweep("unproject", "C", "views C", {"B": 1, "K": 32, "X": 64}, "softmax"),
    Sweep("unproject", "K", "channels K", {"B": 1, "C": 4, "X": 64}, "softmax"),
    Sweep("unproject", "X", "voxels along a side X", {"B": 1, "C": 4, "K": 32}, "softmax"),
)
COLUMNS = 4


def draw_scaling(results: Sequence[Json], threaded: Sequence[Json], path: Path) -> None:
    """Times over one size each, and what several threads bring; a block for each machine."""
    rows = -(-(len(SWEEPS) + 1) // COLUMNS)
    figure = plt.figure(
        figsize=(3.1 * COLUMNS, (2.7 * rows + 0.4) * len(results)), layout="constrained"
    )
    blocks = figure.subfigures(len(results), 1, squeeze=False)[:, 0]
    for block, result in zip(blocks, results, strict=True):
        block.suptitle(processor(result))
        panels = list(block.subplots(rows, COLUMNS).flat)
        for panel, sweep in zip(panels, SWEEPS, strict=False):
            if cases := sweep.cases(result):
                draw_sweep(panel, sweep, cases)
            else:
                panel.set_axis_off()
        handles, names = panels[0].get_legend_handles_labels()
        block.legend(handles, names, loc="outside lower center", ncols=4, fontsize=8)
        rest = panels[len(SWEEPS) :]
        more = next(
            (
                r
                for r in threaded
                if (r["machine"], r["device"]) == (result["machine"], result["device"])
            ),
            None,
        )
        if more is not None:
            draw_threads(rest.pop(0), result, more)
        for panel in rest:
            panel.set_axis_off()
    save(figure, path)


def draw_sweep(panel: Axes, sweep: Sweep, cases: Sequence[Json]) -> None:
    for version, style in (("tritool", "o-"), ("rival", "D--")):
        for mode in MODES:
            found = [
                (case["shape"][sweep.axis], row["times"][mode]["median_ms"])
                for case in cases
                if (row := ours(case) if version == "tritool" else fastest_rival(case, mode))
            ]
            panel.plot(
                [size for size, _ in found], [ms for _, ms in found], style,
                color=COLOURS[mode], markersize=3, linewidth=1,
                alpha=1 if version == "tritool" else 0.6,
                label=f"{VERSIONS[version]}, {MODE_NAMES[mode]}",
            )  # fmt: skip
    panel.set(xscale="log", yscale="log", ylabel="ms")
    panel.set_title(sweep.title, fontsize=9)
    panel.set_xlabel(sweep.label, fontsize=8)
    sizes = [case["shape"][sweep.axis] for case in cases]
    panel.set_xticks(sizes, [f"{size:g}" for size in sizes])
    panel.minorticks_off()
    panel.tick_params(labelsize=7)
    panel.grid(alpha=0.3)


def draw_threads(panel: Axes, one: Json, several: Json) -> None:
    """How many times as fast several threads are."""
    threads = several["settings"]["threads"]
    alone = {(case["op"], case["size"]): case for case in measured(one)}
    cases = [c for c in measured(several) if c["headline"] and (c["op"], c["size"]) in alone]
    for shift, mode in zip((-0.2, 0.2), MODES, strict=True):
        gains = [
            ours(alone[case["op"], case["size"]])["times"][mode]["median_ms"]
            / ours(case)["times"][mode]["median_ms"]
            for case in cases
        ]
        panel.barh(
            [row + shift for row in range(len(cases))], gains, height=0.38, color=COLOURS[mode]
        )
    labels = [f"{case['op']} {case['shape'].get('N', '')}" for case in cases]
    panel.set_yticks(range(len(cases)), labels, fontsize=7)
    panel.invert_yaxis()
    panel.axvline(threads, color="black", linewidth=0.8)
    panel.set_title(f"{threads} threads over one", fontsize=9)
    panel.xaxis.set_major_formatter(lambda gain, _: f"{gain:g}x")
    panel.tick_params(labelsize=7)
    panel.grid(axis="x", alpha=0.3)
    panel.set_axisbelow(True)
