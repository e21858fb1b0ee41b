# SPDX-License-Identifier: Apache-2.0
"""Measures one case, or memory's bandwidth, in a process of its own and prints JSON; for run.py.

A process per case: a rival that crashes takes nothing with it, no case inherits another's heap, and
the settings of malloc and of the thread pools, which libraries read when they are loaded, hold from
the start.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import traceback

import bench
import rivals
import suites
import torch
from bench import Json


def main() -> None:
    request: Json = json.loads(sys.argv[1])
    if request["threads"]:
        torch.set_num_threads(request["threads"])
        if (cv2 := rivals.installed("cv2")) is not None:
            cv2.setNumThreads(request["threads"])
    if request["what"] == "bandwidth":
        size = 8 << 20 if request["quick"] else 256 << 20
        print(json.dumps(bench.bandwidth(request["device"], request["seconds"], size)))
        return
    spec = next(s for s in suites.specs(request["quick"]) if s.name == request["case"])
    case = spec.build(request["device"])
    if request["compile"]:
        case = with_compiled(case)
    measure = {"time": measure_time, "memory": measure_memory}[request["what"]]
    print(json.dumps(measure(spec, case, request)))


def with_compiled(case: suites.Case) -> suites.Case:
    """Adds the plain PyTorch rivals under torch.compile, except loops, which it unrolls."""
    compiled = [
        dataclasses.replace(
            variant,
            name=f"torch.compile({variant.name})",
            kind="compiled",
            run=torch.compile(variant.run, dynamic=False),
        )
        for variant in case.variants
        if variant.kind == "pytorch" and not variant.name.startswith("loop")
    ]
    return dataclasses.replace(case, variants=[*case.variants, *compiled])


def measure_time(spec: suites.Spec, case: suites.Case, request: Json) -> Json:
    """Accuracy first, then times; a variant that fails is reported, not timed."""
    exact = bench.Exact(case)
    rows: dict[str, Json] = {}
    for variant in case.variants:
        row: Json = {"name": variant.name, "kind": variant.kind, "note": variant.note}
        try:
            row |= bench.accuracy(case, variant, exact)
            error = row["error"]
            row["accurate"] = error["not_finite"] == 0 and error["p999"] <= spec.tolerance
        except Exception as failure:  # a rival may fail in any way; that is its result
            if variant.kind == "tritool":
                raise
            traceback.print_exc()
            row |= {"failure": f"{type(failure).__name__}: {failure}".splitlines()[0][:200]}
        row |= {"times": {}, "peak_memory_mib": {}}
        rows[variant.name] = row
    del exact

    for mode in bench.MODES:
        calls = {
            variant.name: bench.prepared_call(case, variant, mode)
            for variant in case.variants
            if "failure" not in rows[variant.name] and mode in bench.modes_of(variant)
        }
        times = bench.time_calls(calls, "tritool", request["device"], request["seconds"])
        for name, measured in times.items():
            rows[name]["times"][mode] = measured
        if request["device"] == "cuda" and spec.memory:
            for name, call in calls.items():
                rows[name]["peak_memory_mib"][mode] = bench.peak_memory(call, "cuda")
    measured: Json = {"variants": list(rows.values())}
    if spec.memory:
        measured["operands_mib"] = bench.operands(case, case.variants[0])
    return measured


def measure_memory(spec: suites.Spec, case: suites.Case, request: Json) -> Json:
    """Peak memory on the CPU of the calls that are asked for."""
    peaks: Json = {}
    for variant in case.variants:
        for mode in bench.modes_of(variant):
            if [variant.name, mode] in request["memory_of"]:
                call = bench.prepared_call(case, variant, mode)
                peaks.setdefault(variant.name, {})[mode] = bench.peak_memory(call, "cpu")
    return peaks


if __name__ == "__main__":
    main()
