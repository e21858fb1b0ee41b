# SPDX-License-Identifier: Apache-2.0
"""The committed JSON: what is read, which version counts as the rival, how figures are written."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from bench import Json

MODE_NAMES = {"forward": "forward", "forward_backward": "forward + backward"}
NETWORKS, CALLS = "networks", "calls"
SUITE_ORDER = ("ops", "ops-all-threads", "ops-compiled", "ops-default-malloc")


# ---- reading ----


def load(folder: Path, version: str | None = None) -> list[Json]:
    """All results of one version, by default the highest; the main suite and CPUs first."""
    versions = sorted(
        (path for path in folder.iterdir() if path.is_dir() and any(path.glob("*.json"))),
        key=lambda path: tuple(
            int(part) if part.isdigit() else -1 for part in path.name.split(".")
        ),
    )
    if not versions or version not in {None, *(path.name for path in versions)}:
        raise SystemExit(f"report.py: no results of version {version or 'any'} in {folder}")
    chosen = folder / version if version else versions[-1]
    results = [json.loads(path.read_text()) for path in sorted(chosen.glob("*.json"))]
    # Training steps and small calls have tables of their own; studies write theirs themselves.
    results = [
        result
        for result in results
        if result["suite"] not in (NETWORKS, CALLS) and not result["suite"].startswith("study-")
    ]

    def order(result: Json) -> tuple[int, str, str]:
        suite = result["suite"]
        rank = SUITE_ORDER.index(suite) if suite in SUITE_ORDER else len(SUITE_ORDER)
        return rank, result["device"], result["machine"]

    return sorted(results, key=order)


def load_suite(folder: Path, version: str, suite: str) -> list[Json]:
    """What was measured of one of the suites with tables of their own, with a version."""
    found = sorted((folder / version).glob(f"{suite}--*.json"))
    return [json.loads(path.read_text()) for path in found]


def ours(case: Json) -> Json:
    return next(row for row in case["variants"] if row["name"] == "tritool")  # type: ignore[no-any-return]


def plain_pytorch(case: Json) -> list[Json]:
    """The plain PyTorch versions that are accurate; packages are not plain PyTorch."""
    kinds = ("pytorch", "compiled")
    return [row for row in case["variants"] if row["kind"] in kinds and row.get("accurate")]


def fastest_rival(case: Json, mode: str) -> Json | None:
    rows = [row for row in plain_pytorch(case) if mode in row["times"]]
    return min(rows, key=lambda row: row["times"][mode]["ratio"], default=None)


# ---- writing ----


def number(value: float | None) -> str:
    """Three digits, without an exponent where that stays readable."""
    if value is None:
        return "-"
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return f"{value:.1e}"


def factor(value: float) -> str:
    return f"{value:.0f}x" if value >= 10 else f"{value:.2g}x"


def table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int) -> str:
    """A Markdown table, its first `left` columns flush left and the others right."""
    rule = ["---"] * left + ["---:"] * (len(header) - left)
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, rule, *rows))


def processor(result: Json) -> str:
    environment = result["environment"]
    if result["device"] == "cuda":
        return str(environment["gpu"]["name"])
    threads = result["settings"]["threads"]
    return f"{environment['cpu']}, {threads} thread{'s' if threads > 1 else ''}"
