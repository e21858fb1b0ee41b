# SPDX-License-Identifier: Apache-2.0
"""Says what moved between two results beyond noise: quartile ranges apart, medians by over 5 %.

Two runs on one machine can differ as a whole. `--relative` compares each variant's ratio to tritool
in the same round, which such a drift leaves alone.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bench import Json

THRESHOLD = 0.05
FIELDS = {False: ("median_ms", "q1_ms", "q3_ms"), True: ("ratio", "ratio_q1", "ratio_q3")}


@dataclass(frozen=True)
class Move:
    """One time that changed."""

    case: str
    variant: str
    mode: str
    before: float
    after: float

    @property
    def factor(self) -> float:
        return self.after / self.before


def timings(result: Json, relative: bool) -> dict[tuple[str, str, str], tuple[float, float, float]]:
    """(median, first quartile, third quartile) by (case, variant, mode)."""
    median, q1, q3 = FIELDS[relative]
    return {
        (f"{case['op']} {case['size']}", row["name"], mode): (times[median], times[q1], times[q3])
        for case in result["cases"]
        for row in case["variants"]
        for mode, times in row["times"].items()
    }


def moves(before: Json, after: Json, relative: bool = False) -> Iterator[Move]:
    """What both files hold and what moved beyond noise."""
    old, new = timings(before, relative), timings(after, relative)
    for key in old.keys() & new.keys():
        old_median, old_q1, old_q3 = old[key]
        new_median, new_q1, new_q3 = new[key]
        apart = new_q1 > old_q3 or new_q3 < old_q1
        if apart and abs(new_median / old_median - 1) > THRESHOLD:
            yield Move(*key, old_median, new_median)


def missing(before: Json, after: Json) -> list[tuple[str, str, str]]:
    """What only one of the two files holds."""
    return sorted(timings(before, False).keys() ^ timings(after, False).keys())


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--relative", action="store_true", help="compare ratios to tritool")
    parser.add_argument(
        "--fail", action="store_true", help="exit with status 1 if tritool became slower"
    )
    options = parser.parse_args(arguments)
    if options.fail and options.relative:
        parser.error("--fail looks at tritool's own times, --relative divides by them")
    before, after = (json.loads(path.read_text()) for path in (options.before, options.after))
    for field in ("machine", "device", "suite"):
        if before[field] != after[field]:
            print(f"compare.py: {field} differs: {before[field]}, {after[field]}", file=sys.stderr)

    found = sorted(moves(before, after, options.relative), key=lambda move: -move.factor)
    unit = "x tritool" if options.relative else "ms"
    for move in found:
        print(
            f"{'slower' if move.factor > 1 else 'faster'}  {move.factor:6.2f}x  "
            f"{move.before:9.4g} -> {move.after:9.4g} {unit}  {move.case}, {move.variant}, "
            f"{move.mode.replace('_', ' + ')}"
        )
    for case, variant, mode in missing(before, after):
        print(f"in one file only: {case}, {variant}, {mode.replace('_', ' + ')}")
    if not found:
        print("nothing moved beyond noise")
    slower = any(move.factor > 1 and move.variant.startswith("tritool") for move in found)
    return 1 if options.fail and slower else 0


if __name__ == "__main__":
    sys.exit(main())
