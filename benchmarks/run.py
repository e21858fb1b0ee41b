# SPDX-License-Identifier: Apache-2.0
"""Measures tritool beside plain PyTorch and installed packages, and writes one JSON.

Suites: `ops`, every operation at every size; `ops-compiled`, the headline sizes, rivals also under
torch.compile; `ops-default-malloc`, the same as a user gets them who sets nothing. The JSON goes to
benchmarks/results/<version>/<suite>--<machine>--<device>.json (with --quick to .benchmarks/).
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import bench
import suites
import torch
from bench import Json
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
SCHEMA = 1
SUITES = ("ops", "ops-compiled", "ops-default-malloc")


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("run.py: --device cuda needs an NVIDIA GPU and a torch built for it", file=sys.stderr)
        return 1
    result = measure(options)
    output = options.output or default_output(result, options.quick)
    write(output, result)
    print(f"run.py: wrote {output}", file=sys.stderr)
    return 1 if any("failure" in case for case in result["cases"]) else 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0],
        epilog="example: taskset -c 0 python benchmarks/run.py --suite ops --threads 1",
    )
    parser.add_argument("--suite", choices=SUITES, default="ops")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", choices=("1", "all"), default="1", help="of the CPU")
    parser.add_argument("--only", metavar="TEXT", default="", help="cases whose name contains TEXT")
    parser.add_argument(
        "--seconds", type=float, help="for timing a case, forward or both (default: 8, quick 0.1)"
    )
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does everything run?")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="the JSON, replaced if it exists"
    )
    return parser.parse_args(arguments)


def measure(options: argparse.Namespace) -> Json:
    threads = 1 if options.threads == "1" else len(os.sched_getaffinity(0))
    seconds = options.seconds or (0.1 if options.quick else 8.0)
    specs = [s for s in suites.specs(options.quick) if options.only in s.name]
    if options.suite != "ops":
        specs = [spec for spec in specs if spec.headline]
    if not specs:
        sys.exit(f"run.py: no case contains {options.only!r}")
    environment = bench.environment(options.device)
    if environment["git"]["library_older_than_sources"]:
        print("run.py: tritool/_C.so is older than csrc: type make first", file=sys.stderr)
    request = {
        "device": options.device,
        "threads": threads,
        "seconds": seconds,
        "quick": options.quick,
        "compile": options.suite == "ops-compiled",
    }
    malloc = {} if options.suite == "ops-default-malloc" else bench.KEPT_PAGES
    started = datetime.datetime.now(datetime.timezone.utc)
    load_before = os.getloadavg()[0]
    bandwidth = work(request | {"what": "bandwidth"}, malloc)
    cases = []
    quiet = not sys.stderr.isatty()
    with tqdm(specs, file=sys.stderr, unit="case", leave=False, disable=quiet) as bar:
        for spec in bar:
            bar.set_postfix_str(spec.name)
            case = measure_case(spec, request, malloc)
            cases.append(case)
            bar.write(summary(case), file=sys.stderr)
    return {
        "schema": SCHEMA,
        "suite": options.suite if options.threads == "1" else f"{options.suite}-all-threads",
        "quick": options.quick,
        "machine": bench.machine_slug(options.device),
        "device": options.device,
        "date": started.strftime("%Y-%m-%dT%H:%M:%SZ"),
        "settings": {
            "threads": threads,
            "seconds_per_case_and_mode": seconds,
            "seed": suites.SEED,
            "malloc": malloc,
            "cold_l2": options.device == "cuda",
            "bandwidth_gb_s": bandwidth,
            "load_average": [round(load_before, 2), round(os.getloadavg()[0], 2)],
        },
        "environment": environment,
        "cases": cases,
    }


def measure_case(spec: suites.Spec, request: Json, malloc: dict[str, str]) -> Json:
    case: Json = {
        "op": spec.op,
        "size": spec.size,
        "shape": spec.shape,
        "dtype": "float32",
        "unit": spec.unit,
        "tolerance": spec.tolerance,
        "headline": spec.headline,
    }
    try:
        case |= work(request | {"case": spec.name, "what": "time"}, malloc)
        if spec.memory and request["device"] == "cpu":
            add_peak_memory(spec, request, case["variants"])
    except ChildFailed as failure:
        case |= {"failure": str(failure), "variants": []}
    return case


def add_peak_memory(spec: suites.Spec, request: Json, rows: list[Json]) -> None:
    """In a fresh process; in one for each call where a peak cannot be reset."""
    calls = [[row["name"], mode] for row in rows for mode in row["times"]]
    groups = [calls] if bench.can_reset_peak() else [[call] for call in calls]
    for group in groups:
        asked = request | {"case": spec.name, "what": "memory", "memory_of": group}
        for name, peaks in work(asked, bench.RETURNED_PAGES).items():
            next(row for row in rows if row["name"] == name)["peak_memory_mib"].update(peaks)


class ChildFailed(Exception):
    """A measuring process came to nothing."""


def work(request: Json, malloc: dict[str, str]) -> Json:
    """What worker.py answers; its standard error is shown, its environment set."""
    threads = {name: str(request["threads"]) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("worker.py")), json.dumps(request)],
        env={**os.environ, **threads, **malloc},
        stdout=subprocess.PIPE,
        text=True,
    )
    if done.returncode != 0:
        raise ChildFailed(f"the measuring process ended with status {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def summary(case: Json) -> str:
    if "failure" in case:
        return f"{case['op']} {case['size']}: {case['failure']}"
    rows = []
    for row in case["variants"]:
        times = "  ".join(
            f"{row['times'][mode]['median_ms']:>9.4g} ms ({row['times'][mode]['ratio']:.3g})"
            for mode in bench.MODES
            if mode in row["times"]
        )
        error = row.get("failure") or f"p99.9 {row['error']['p999']} {case['unit']}"
        flag = "" if row.get("accurate") else "   NOT ACCURATE"
        rows.append(f"  {row['name']:34} {times:50} {error}{flag}")
    return "\n".join([f"{case['op']} {case['size']}", *rows])


def default_output(result: Json, quick: bool) -> Path:
    name = "--".join((result["suite"], result["machine"], result["device"])) + ".json"
    if quick:
        return ROOT / ".benchmarks" / f"quick--{name}"
    return ROOT / "benchmarks" / "results" / result["environment"]["tritool"]["tritool"] / name


def write(path: Path, result: Json) -> None:
    """Written aside and renamed: there is never half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.{os.getpid()}.part")
    aside.write_text(json.dumps(result, indent=1) + "\n")
    aside.replace(path)


if __name__ == "__main__":
    start = time.perf_counter()
    status = main()
    print(f"run.py: {time.perf_counter() - start:.0f} s", file=sys.stderr)
    sys.exit(status)
