# SPDX-License-Identifier: Apache-2.0
"""Everything that only a machine with a GPU can show, in one go and one JSON.

The CUDA tests, compute-sanitizer over every operation on awkward sizes, and the benchmarks. Each
step says whether it ran, with which status and what it printed last; a step that did not run is
never counted as passed.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path

import bench
import torch
from bench import Json
from run import write

ROOT = Path(__file__).resolve().parents[1]
SMOKE = ROOT / "tests" / "native" / "cuda_smoke.py"
SANITIZERS = ("memcheck", "racecheck", "synccheck")
SANITIZER_STATUS = 99
TAIL_CHARACTERS = 4000
SCHEMA = 1


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, metavar="FILE", help="the JSON")
    parser.add_argument("--quick", action="store_true", help="tiny benchmark sizes")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print(
            "gpu_test.py: needs an NVIDIA GPU with its driver and a torch built for CUDA "
            f"(this one is {torch.__version__}); nothing was run",
            file=sys.stderr,
        )
        return 1
    output = options.output or (
        ROOT / ".benchmarks" / f"gpu-test--{bench.machine_slug('cuda')}.json"
    )
    started = datetime.datetime.now(datetime.timezone.utc)
    steps = [cuda_tests()]
    steps += [sanitizer(tool) for tool in SANITIZERS]
    for suite in ("ops", "ops-compiled"):
        steps.append(
            benchmarks(suite, output.with_name(f"{output.stem}--{suite}.json"), options.quick)
        )
    write(
        output,
        {
            "schema": SCHEMA,
            "date": started.strftime("%Y-%m-%dT%H:%M:%SZ"),
            "environment": bench.environment("cuda"),
            "steps": steps,
        },
    )
    for step in steps:
        print(f"{step['outcome']:8} {step['name']}: {step['detail']}", file=sys.stderr)
    print(f"gpu_test.py: wrote {output}", file=sys.stderr)
    return 0 if all(step["outcome"] == "passed" for step in steps) else 1


def cuda_tests() -> Json:
    """The tests marked `cuda`; those that skipped do not make the step pass."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        step = command(
            "CUDA tests", [sys.executable, "-m", "pytest", "-m", "cuda", f"--junitxml={report}"]
        )
        counts = junit_counts(report) if report.exists() else None
    step["counts"] = counts
    if counts is None or counts["passed"] == 0:
        return step | {"outcome": "failed", "detail": "no CUDA test ran"}
    return step | {"detail": ", ".join(f"{count} {what}" for what, count in counts.items())}


def junit_counts(report: Path) -> dict[str, int]:
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        kinds = {child.tag for child in case}
        failed = kinds & {"failure", "error"}
        counts["failed" if failed else "skipped" if "skipped" in kinds else "passed"] += 1
    return counts


def sanitizer(tool: str) -> Json:
    """One tool of compute-sanitizer over the smoke script."""
    name = f"compute-sanitizer {tool}"
    program = find_sanitizer()
    if program is None:
        detail = "compute-sanitizer is neither on PATH nor in CUDA_HOME or /usr/local/cuda"
        return {"name": name, "outcome": "not run", "detail": detail}
    options = ["--tool", tool, "--error-exitcode", str(SANITIZER_STATUS)]
    # Without PyTorch's cache every tensor is an allocation of its own, whose bounds memcheck knows.
    plain_allocations = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    step = command(name, [program, *options, sys.executable, str(SMOKE)], plain_allocations)
    if step["status"] == SANITIZER_STATUS:
        step["detail"] = "errors found"
    return step


def find_sanitizer() -> str | None:
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    folders = [str(Path(home) / "bin") for home in homes if home]
    return shutil.which(
        "compute-sanitizer", path=os.pathsep.join([os.environ.get("PATH", ""), *folders])
    )


def benchmarks(suite: str, output: Path, quick: bool) -> Json:
    output.unlink(missing_ok=True)
    script = str(Path(__file__).with_name("run.py"))
    arguments = ["--suite", suite, "--device", "cuda", "--output", str(output)]
    arguments += ["--quick"] if quick else []
    step = command(f"benchmarks, {suite}", [sys.executable, script, *arguments])
    if output.exists():
        step["result"] = json.loads(output.read_text())
    elif step["outcome"] == "passed":
        step |= {"outcome": "failed", "detail": "no result was written"}
    return step


def command(name: str, arguments: Sequence[str], variables: dict[str, str] | None = None) -> Json:
    """Runs a command in the repository and says how it went."""
    print(f"gpu_test.py: {name}", file=sys.stderr)
    start = time.perf_counter()
    done = subprocess.run(
        arguments,
        cwd=ROOT,
        env={**os.environ, **(variables or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    return {
        "name": name,
        "outcome": "passed" if done.returncode == 0 else "failed",
        "detail": f"status {done.returncode}",
        "status": done.returncode,
        "seconds": round(time.perf_counter() - start, 1),
        "tail": done.stdout[-TAIL_CHARACTERS:],
    }


if __name__ == "__main__":
    sys.exit(main())
