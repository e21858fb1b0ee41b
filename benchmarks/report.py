# SPDX-License-Identifier: Apache-2.0
"""Writes the README's table, docs/benchmarks.md and its pictures from the committed JSON.

`--check` writes nothing and exits with status 1 if the README or the page is not what the JSON
says.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import plots
from bench import MODES, Json
from recorded import (
    CALLS,
    MODE_NAMES,
    NETWORKS,
    factor,
    fastest_rival,
    load,
    load_suite,
    number,
    ours,
    plain_pytorch,
    processor,
    table,
)

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- benchmark:begin -->", "<!-- benchmark:end -->"


def caption(result: Json) -> str:
    environment = result["environment"]
    git = environment["git"]
    commit = (git["commit"] or "unknown")[:10] + (" with changes" if git["dirty"] else "")
    if git["library_older_than_sources"]:
        commit += ", built from older sources"
    tritool = environment["tritool"]["tritool"]
    path = environment["tritool"]["paths"][result["device"]]
    return (
        f"{processor(result)}; {result['date'][:10]}; tritool {tritool}, commit {commit} ({path}); "
        f"torch {environment['torch']}; float32"
    )


README_HEADER = (
    *("", "size", "", "fastest accurate plain PyTorch"),
    *("tritool ms", "PyTorch ms", "speed-up", "error of both"),
)


def readme_rows(result: Json) -> Iterator[list[str]]:
    for case in result["cases"]:
        if not case["headline"] or "failure" in case:
            continue
        for mode in MODES:
            own, rival = ours(case), fastest_rival(case, mode)
            case_cells = [f"`{case['op']}`", case["size"], MODE_NAMES[mode]]
            own_ms = number(own["times"][mode]["median_ms"])
            own_error = number(own["error"]["p999"])
            if rival is None:
                error = f"{own_error} / - {case['unit']}"
                yield [*case_cells, "none is accurate", own_ms, "-", "-", error]
                continue
            times = rival["times"][mode]
            error = f"{own_error} / {number(rival['error']['p999'])} {case['unit']}"
            rival_ms, speed_up = number(times["median_ms"]), factor(times["ratio"])
            yield [*case_cells, rival["name"], own_ms, rival_ms, speed_up, error]


MEMORY_HEADER = (
    *("peak memory, forward + backward", "size", "inputs + results MiB"),
    *("tritool MiB", "leanest accurate plain PyTorch", "PyTorch MiB"),
)


def memory_rows(result: Json) -> Iterator[list[str]]:
    for case in result["cases"]:
        operands = case.get("operands_mib")
        if not case["headline"] or "failure" in case or operands is None:
            continue
        peaks = [
            (peak, row)
            for row in plain_pytorch(case)
            if (peak := row["peak_memory_mib"].get(MODES[1])) is not None
        ]
        leanest, rival = min(peaks, key=lambda one: one[0], default=(None, None))
        own = ours(case)["peak_memory_mib"].get(MODES[1])
        yield [
            *(f"`{case['op']}`", case["size"], number(sum(operands.values()))),
            *(of_operands(own, operands), rival["name"] if rival else "none"),
            of_operands(leanest, operands),
        ]


def of_operands(peak: float | None, operands: Json | None) -> str:
    """A peak, and how many times inputs and results together it is."""
    if peak is None or not operands or sum(operands.values()) == 0:
        return number(peak)
    return f"{number(peak)} ({peak / sum(operands.values()):.2g}x)"


def readme_block(results: Sequence[Json]) -> str:
    parts: list[str] = []
    for result in (r for r in results if r["suite"] == "ops"):
        if not parts:
            parts.append(
                f"![Speed-ups, and the bandwidth reached](docs/images/{HEADLINES})\n\n"
                "Right: the bytes that a call cannot do without, over its time, of what PyTorch's "
                "copy or sum reaches; a call at 100 % is as fast as memory."
            )
        parts.append(table(README_HEADER, list(readme_rows(result)), left=4))
        parts.append(f"{caption(result)}. A speed-up below 1 is a loss.")
        if memory := list(memory_rows(result)):
            parts.append(table(MEMORY_HEADER, memory, left=2))
            parts.append(
                "Peak memory of one call above its inputs, results included; in brackets, how many "
                "times the inputs and results of the forward call together that is."
            )
    parts.append(
        "Median over rounds in which all versions take turns; the speed-up is the median of the "
        "rounds' ratios. Error: 99.9 % of the results lie within this distance of float64. "
        "All sizes and rivals: [docs/benchmarks.md](docs/benchmarks.md)."
    )
    if not any(r["device"] == "cuda" for r in results):
        parts.append("The CUDA kernels have not been timed yet: no result from a GPU is recorded.")
    return "\n\n".join(parts)


def with_block(readme: str, block: str) -> str:
    """The README with what stands between the markers replaced."""
    if (
        readme.count(BEGIN) != 1
        or readme.count(END) != 1
        or readme.index(BEGIN) > readme.index(END)
    ):
        raise SystemExit(f"report.py: the README must hold {BEGIN} and then {END}, each once")
    head, rest = readme.split(BEGIN)
    _, tail = rest.split(END)
    return f"{head}{BEGIN}\n\n{block}\n\n{END}{tail}"


METHOD = """\
# Benchmarks

Written by `benchmarks/report.py` from the JSON under `benchmarks/results`; do not edit. To measure:
`make bench`, on a GPU `make bench ARGS="--device cuda"`, with the packages that are compared in
`.venv`: `pip install -c constraints.txt kornia opencv-python-headless`. To compare two files:
`python benchmarks/compare.py A.json B.json`.

How it is measured:

- All versions of an operation get the same seeded float32 inputs and take turns within each round
  (A B C A B C ...). The tables give medians over the rounds, the quartiles in brackets, and the
  median of the ratios to tritool within a round: above 1, tritool is faster. Losses stand beside
  wins.
- *Forward + backward* differentiates what a network computes (points and weights, heat maps or
  volumes, features and confidences, both point sets), for a fixed random incoming gradient.
- Before anything is timed, each result is compared with float64 (`tritool.reference`) on the same
  inputs. A version of which more than 0.1 % of the results are farther off than the tolerance
  stated, or that yields anything not finite, is marked *not accurate*: it is timed and listed, but
  never the rival that a speed-up is counted against.
- The error of `rigid_align` is the distance between the points where both transforms put them, that
  of `unproject` the difference of values (standard normal features).
- The gradient error is relative to the float64 gradient, item by item: median / 99.9 %, of the
  worst input.
- Plain PyTorch versions keep what they can between calls (grids, coordinates). kornia and OpenCV
  are measured as installed; what they do less of is in the name. Neither is plain PyTorch, so
  neither counts as the rival in the README.
- On the CPU, one thread unless said otherwise, and malloc is told to keep its pages, which favours
  the rivals, who allocate more (suite `ops-default-malloc` does not). On a GPU, CUDA events around
  one call, inputs swept out of the L2 cache before it.
- Peak memory is that of one call above its inputs, results included, in a fresh process (resident
  memory; on a GPU PyTorch's allocator); in brackets, how many times the inputs and results of the
  forward call together that is. Less than 1 is possible: the inputs are there already.
"""


HEADLINES, SPEED_UPS, BANDWIDTH, SCALING = (
    f"benchmark-{name}.png" for name in ("headlines", "speed-ups", "bandwidth", "scaling")
)
PICTURES = f"""\
![Speed-up over the fastest accurate plain PyTorch version]({{images}}/{SPEED_UPS})

How near calls come to what memory gives: the bytes that a call cannot do without (each input read
once, each result written once; forward + backward: both, one after the other), over its time and
the faster of PyTorch's copy and sum of 256 MiB on the same machine. Operands of 4 MiB and more.
More than 100 % is possible: for operands that are still in the caches, and for results written past
them, while a copy may fetch the lines that it overwrites. Where a bar is short, computing bounds
the call.

![Bandwidth reached, of what memory gives]({{images}}/{BANDWIDTH})

Times over one size each, the others as they stand above the panel:

![Times over numbers of points, views, batches, channels and voxels]({{images}}/{SCALING})
"""


# What a CPU thread is to reach: operation, size, the rival (None: the fastest accurate plain
# PyTorch version), and how many times as fast as that, forward and with the backward.
TARGETS = (
    ("soft_argmax2d", "4x4x17x96x96", None, 5),
    ("soft_argmax3d", "4x17x64x64x64", None, 6),
    ("triangulate", "N=100011 C=4", "batched svd", 20),
    ("triangulate", "N=100011 C=31", "batched svd", 10),
    ("unproject", "softmax, 1x4x32x96x96 to 64^3", None, 10),
    ("unproject", "sum, 1x4x32x96x96 to 64^3", None, 10),
    ("unproject", "mean, 1x4x32x96x96 to 64^3", None, 10),
    ("unproject", "max, 1x4x32x96x96 to 64^3", None, 10),
    ("rigid_align", "N=100000 J=17", None, 20),
)

MEMORY_TARGET = ("unproject", "softmax, 1x4x32x96x96 to 64^3", 1.2)

BOUNDS = """\
The last column: how many times as fast as the rival a call would be that took no longer than memory
takes for its operands (see the second picture; stores past the caches can be a little faster). A
target well above it is out of reach.

What stands between the others and their targets, and what was tried:

- `soft_argmax*` comes near the speed of memory. Tried and kept: one pass over each row in place of
  two; prefetching; gradients of large volumes written past the caches.
- `unproject` reads 2 KiB of features for every voxel (four views, four pixels of 32 channels) and
  takes 128 exponentials for a softmax; the backward does all of that again and then adds as much to
  the gradient. Tried and kept: blocks of voxels in tiles of the grid, which see the same pixels;
  features and the sums of their gradient in tiles of a page of memory; the incoming gradient, whose
  channels lie far from each other, prefetched a few lines for each voxel, and the next pixels; no
  features read for a gradient that does not depend on them; cells that lie in the map with all of
  their pixels found with one division and hardly a comparison; no question to a view where all
  views see the whole block; confidences judged once for all voxels; no division from one block to
  the next; results written past the caches. Dropped: blocks of 32 voxels, channels in groups of 16
  and the next pixels prefetched in the forward (all slower); the number of views known to the
  compiler, rows of pixels turned against each other so that they share no cache set, larger and
  smaller tiles of the grid, rows of voxels projected by steps of equal length (no faster).
- `triangulate` and `rigid_align` compute. The rotations of their singular value decomposition wait
  for each other, each of them for two square roots and two divisions in turn. Tried and kept: views
  and sets gathered once, by whole vectors turned over in registers; the next sets prefetched, one
  for each point computed; the last of four sweeps left out where it would change nothing; large
  gradients written past the caches. Dropped: reciprocal square roots by estimate and a Newton step
  (less accurate where views hardly agree).
"""


def targets_section(result: Json) -> str:
    """What was to be reached beside what is, for the main suite on a CPU."""
    rows = []
    for op, size, rival, target in TARGETS:
        for case in result["cases"]:
            if (case["op"], case["size"]) != (op, size) or "failure" in case:
                continue
            for mode in MODES:
                named = next((row for row in case["variants"] if row["name"] == rival), None)
                other = named if rival else fastest_rival(case, mode)
                if other is None or mode not in other["times"]:
                    continue
                reached = other["times"][mode]["ratio"]
                available = result["settings"]["bandwidth_gb_s"]
                as_memory = 1 / plots.share_of_bandwidth(case, other, mode, available)
                rows.append([
                    f"`{op}`", size, MODE_NAMES[mode], other["name"], factor(target),
                    factor(reached) if reached >= target else f"**{factor(reached)}**",
                    factor(as_memory),
                ])  # fmt: skip
    if not rows:
        return ""
    header = ["", "size", "", "rival", "target", "reached", "as fast as memory"]
    parts = [table(header, rows, left=4), *memory_target(result), BOUNDS]
    return "\n\n".join(["### Against the targets", *parts])


def memory_target(result: Json) -> Iterator[str]:
    """All memory of forward + backward, what it is given included, beside what it cannot spare."""
    op, size, target = MEMORY_TARGET
    for case in result["cases"]:
        if (case["op"], case["size"]) != (op, size) or "failure" in case:
            continue
        given = sum(case["operands_mib"].values())  # inputs, and an incoming gradient
        used = given + ours(case)["peak_memory_mib"][MODES[1]]
        yield (
            f"Memory of forward + backward of `{op}`, {size}: {number(used)} MiB, what is given "
            f"included; inputs, results and gradients alone are {number(2 * given)} MiB. That is "
            f"{used / (2 * given):.3g} times as much (target: {target:g})."
        )


def docs_page(
    results: Sequence[Json],
    images: str,
    networks: Sequence[Json] = (),
    calls: Sequence[Json] = (),
) -> str:
    parts = [METHOD, PICTURES.format(images=images)]
    for result in results:
        parts.append(f"## {result['suite']}: {processor(result)}\n")
        parts.append(f"{caption(result)}.\n\n{setting_lines(result)}\n")
        if (result["suite"], result["device"]) == ("ops", "cpu"):
            parts.append(targets_section(result))
        for case in result["cases"]:
            parts.append(f"### {case['op']}, {case['size']}\n")
            parts.append(case_section(case) + "\n")
    parts += map(calls_section, calls)
    parts += map(networks_section, networks)
    return "\n".join(parts)


def calls_section(result: Json) -> str:
    """What each function costs where there is next to nothing to compute."""
    rows = [
        [
            f"`{row['name']}`",
            *(
                text
                for mode in ("no_grad", "forward_backward")
                for text in (
                    number(1e3 * row[mode]["median_ms"]),
                    number(row[mode]["ratio"]),
                )
            ),
        ]
        for row in result["calls"]
    ]
    header = ["function", "no grad us", "ratio", "fwd + bwd us", "ratio"]
    return "\n\n".join([
        f"## Small calls: {processor(result)}",
        "One frame of one person (17 joints, 4 views), or inputs as small: what is left is the "
        "cost of a call, beside PyTorch functions that check their arguments as well. Medians; "
        f"ratios are to `{result['reference']}` in the same round.",
        f"{caption(result)}.",
        table(header, rows, left=1),
    ]) + "\n"  # fmt: skip


def networks_section(result: Json) -> str:
    """Time and memory of a training step of each network."""
    rows = []
    for case in result["cases"]:
        for row in case["variants"]:
            times = row["times"]
            quartiles = f"[{number(times['q1_ms'])}, {number(times['q3_ms'])}]"
            rows.append([
                case["size"], row["name"], f"{number(times['median_ms'])} {quartiles}",
                number(times["ratio"]), number(row["peak_memory_mib"]),
                f"{number(100 * row['op_shares']['all'])} %" if "op_shares" in row else "-",
            ])  # fmt: skip
    header = ["network", "geometry", "step ms", "ratio", "peak MiB", "tritool's ops"]
    git = result["environment"]["git"]
    commit = (git["commit"] or "unknown")[:10] + (" with changes" if git["dirty"] else "")
    return "\n\n".join([
        f"## Training steps of networks: {processor(result)}",
        "One step: forward, loss, backward, Adam; float32 unless said otherwise, images on the "
        "device. The versions differ in their geometry alone and take turns. Peak memory is that "
        "of a step in a fresh process, above weights and images. The last column is the part of "
        "a profiled step that tritool's operations take; the rest is nearly all convolutions.",
        f"{result['date'][:10]}; commit {commit}; torch {result['environment']['torch']}; load "
        "average at the beginning and the end: {}, {}.".format(*result["settings"]["load_average"]),
        table(header, rows, left=2),
    ]) + "\n"  # fmt: skip


def setting_lines(result: Json) -> str:
    environment, settings = result["environment"], result["settings"]
    packages = ", ".join(f"{name} {version}" for name, version in environment["rivals"].items())
    given = settings["bandwidth_gb_s"]
    lines = [
        f"System: {environment['system']}, {environment['cores']} cores, "
        f"{environment['memory_gib']} GiB, Python {environment['python']}.",
        f"Packages: {packages or 'none'}.",
        f"Memory: {number(given['copy'])} GB/s copied (read + written), "
        f"{number(given['sum'])} GB/s summed up.",
        "Load average at the beginning and the end: {}, {}.".format(*settings["load_average"]),
    ]
    if settings["malloc"]:
        variables = " ".join(f"{name}={value}" for name, value in settings["malloc"].items())
        lines.append(f"malloc: `{variables}`.")
    if "gpu" in environment:
        lines.append("GPU: " + ", ".join(f"{k} {v}" for k, v in environment["gpu"].items()) + ".")
    return "\n".join(lines)


def case_section(case: Json) -> str:
    if "failure" in case:
        return f"Not measured: {case['failure']}."
    header = [
        "version",
        "forward ms",
        "ratio",
        "fwd + bwd ms",
        "ratio",
        f"error {case['unit']}",
        "gradient error",
        "peak MiB",
    ]
    operands = case.get("operands_mib")
    rows = [list(variant_cells(row, operands)) for row in case["variants"]]
    tolerance = f"Tolerance {case['tolerance']:g} {case['unit']}."
    if operands:
        tolerance += " Inputs {inputs:g} MiB, results {outputs:g} MiB.".format(**operands)
    return f"{tolerance}\n\n" + table(header, rows, left=1)


def variant_cells(row: Json, operands: Json | None) -> Iterator[str]:
    name = row["name"] if row["kind"] != "tritool" else f"**{row['name']}**"
    marks = [row["note"]] if row["note"] and row["note"] not in row["name"] else []
    if "failure" in row:
        yield f"{name}: failed, {row['failure']}"
        yield from ["-"] * 7
        return
    if not row["accurate"]:
        marks.append("*not accurate*")
    yield f"{name} ({'; '.join(marks)})" if marks else name
    for mode in MODES:
        times = row["times"].get(mode)
        if times is None:
            yield from ("-", "-")
            continue
        quartiles = f"[{number(times['q1_ms'])}, {number(times['q3_ms'])}]"
        yield f"{number(times['median_ms'])} {quartiles}"
        yield number(times["ratio"])
    error = row["error"]
    lost = f" ({error['not_finite']} not finite)" if error["not_finite"] else ""
    yield " / ".join(number(error[name]) for name in ("median", "p999", "max")) + lost
    gradients = row.get("gradient_error", {}).values()
    worst = max(gradients, key=lambda error: error["median"] or 0.0, default=None)
    yield f"{number(worst['median'])} / {number(worst['p999'])}" if worst else "-"
    peaks = [of_operands(row["peak_memory_mib"].get(mode), operands) for mode in MODES]
    yield " / ".join(peaks) if row["peak_memory_mib"] else "-"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--check", action="store_true", help="write nothing; status 1 if anything is stale"
    )
    parser.add_argument("--version", help="of the results (default: the highest)")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="folder of benchmarks.md")
    options = parser.parse_args(arguments)

    results = load(options.results, options.version)
    version = results[0]["environment"]["tritool"]["tritool"]
    networks, calls = (load_suite(options.results, version, suite) for suite in (NETWORKS, CALLS))
    images = options.docs / "images"
    pictures = [images / name for name in (HEADLINES, SPEED_UPS, BANDWIDTH, SCALING)]
    page = options.docs / "benchmarks.md"
    texts = {
        options.readme: with_block(options.readme.read_text(), readme_block(results)),
        page: docs_page(results, "images", networks, calls),
    }
    if options.check:
        stale = [
            path for path, text in texts.items() if not path.exists() or path.read_text() != text
        ]
        stale += [picture for picture in pictures if not picture.exists()]
        for path in stale:
            print(
                f"report.py: {path} is not what the results say; type: python benchmarks/report.py",
                file=sys.stderr,
            )
        return 1 if stale else 0
    options.docs.mkdir(parents=True, exist_ok=True)
    for path, text in texts.items():
        path.write_text(text)
    main_suite, threaded = (
        [r for r in results if r["suite"] == suite] for suite in ("ops", "ops-all-threads")
    )
    plots.draw_headlines(main_suite[0], images / HEADLINES)
    plots.draw_speed_ups(main_suite, images / SPEED_UPS)
    plots.draw_bandwidth(main_suite, images / BANDWIDTH)
    plots.draw_scaling(main_suite, threaded, images / SCALING)
    return 0


if __name__ == "__main__":
    sys.exit(main())
