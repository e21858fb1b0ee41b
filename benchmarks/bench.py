# SPDX-License-Identifier: Apache-2.0
"""How time, accuracy and memory are measured, and what is written down about the machine.

Time: the variants of a case take turns (A B C A B C ...), so that a drift of the machine meets all
of them alike; the medians and quartiles over the rounds are kept, and those of every round's ratio
to tritool. On the CPU a sample is as many calls as take a millisecond. On a GPU it is one call
between two CUDA events, its inputs swept out of the L2 cache beforehand; where Python takes longer
to launch than the GPU to compute, that is in the time, as it is for every user.

Accuracy: the distance from the float64 result on the same float32 inputs, before anything is timed.
"""

from __future__ import annotations

import ctypes
import gc
import json
import math
import os
import platform
import re
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import rivals
import torch
from suites.case import SEED, Array, Case, Outputs, Variant, float64
from torch import Tensor

Json = dict[str, Any]
Call = Callable[[], object]

MODES = ("forward", "forward_backward")
WARM_UP_CALLS = 3
WARM_UP_SECONDS = 0.2
SAMPLE_SECONDS = 1e-3
MIN_ROUNDS, MAX_ROUNDS = 9, 300


# ---- calls ----


def prepared_call(case: Case, variant: Variant, mode: str) -> Call:
    """The call to be timed: forward, or forward and the gradients of `case.wrt`."""
    inputs = {name: case.inputs[name] for name in variant.uses}
    if mode == "forward":

        def forward() -> Outputs:
            with torch.no_grad():
                return variant.run(**inputs)

        return forward

    wrt = [name for name in case.wrt if name in variant.uses]
    for name in wrt:
        inputs[name] = inputs[name].clone().requires_grad_()
    leaves = [inputs[name] for name in wrt]
    grad = cotangent(variant.run(**inputs))

    def forward_backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(variant.run(**inputs), leaves, grad)

    return forward_backward


def cotangent(outputs: Outputs) -> tuple[Tensor, ...]:
    """The incoming gradient of every output: seeded, the same for all variants of a case."""
    generator = torch.Generator().manual_seed(SEED + 1)
    return tuple(
        torch.randn(output.shape, generator=generator).to(output.device, output.dtype)
        for output in parts(outputs)
    )


def parts(outputs: Any) -> tuple[Any, ...]:
    """What an operation returns as a tuple, also if it is one tensor or array."""
    return tuple(outputs) if isinstance(outputs, tuple) else (outputs,)


def modes_of(variant: Variant) -> tuple[str, ...]:
    return MODES if variant.differentiable else MODES[:1]


# ---- accuracy ----


class Exact:
    """Results and gradients in float64, computed once for each set of inputs that variants use."""

    def __init__(self, case: Case) -> None:
        self._case = case
        self._results: dict[tuple[str, ...], Any] = {}
        self._grads: dict[tuple[str, ...], dict[str, Array]] = {}

    def result(self, uses: tuple[str, ...]) -> Any:
        if uses not in self._results:
            inputs = float64({name: self._case.inputs[name] for name in uses})
            self._results[uses] = self._case.reference(**inputs)
        return self._results[uses]

    def grads(self, uses: tuple[str, ...], grad: Any) -> dict[str, Array]:
        if uses not in self._grads:
            inputs = float64({name: self._case.inputs[name] for name in uses})
            self._grads[uses] = self._case.vjp(grad, **inputs)
        return self._grads[uses]


def spread_of_errors(errors: Array) -> Json:
    """Median, 99.9 % and maximum of the finite errors, and how many are not finite."""
    finite = errors[np.isfinite(errors)]
    spread: Json = {"not_finite": int(errors.size - finite.size)}
    values = np.quantile(finite, [0.5, 0.999, 1.0]) if finite.size else [None] * 3
    for name, value in zip(("median", "p999", "max"), values, strict=True):
        spread[name] = None if value is None else significant(value)
    return spread


def accuracy(case: Case, variant: Variant, exact: Exact) -> Json:
    """`error`, in the unit of the result, and `gradient_error`, relative per item and input."""
    outputs: Any = prepared_call(case, variant, "forward")()
    expected = exact.result(variant.uses)
    for output, want in zip(parts(outputs), parts(expected), strict=True):
        if tuple(output.shape) != want.shape:
            raise ValueError(f"result has shape {tuple(output.shape)}, want {want.shape}")
    measured: Json = {"error": spread_of_errors(case.error(like(outputs, outputs), expected))}
    if not variant.differentiable:
        return measured

    grads = prepared_call(case, variant, "forward_backward")()
    wanted = exact.grads(variant.uses, like(outputs, cotangent(outputs)))
    wrt = [name for name in case.wrt if name in variant.uses]
    measured["gradient_error"] = {}
    for name, grad in zip(wrt, grads, strict=True):  # type: ignore[call-overload]
        items = math.prod(wanted[name].shape[: case.batch_dims])
        want = wanted[name].reshape(items, -1)
        off = np.linalg.norm(grad.cpu().double().numpy().reshape(items, -1) - want, axis=-1)
        scale = np.linalg.norm(want, axis=-1)
        measured["gradient_error"][name] = spread_of_errors(off / np.where(scale > 0, scale, 1))
    return measured


def like(outputs: Outputs, tensors: Outputs) -> Any:
    """The tensors in float64, as one array where the operation returns one tensor."""
    arrays = tuple(tensor.cpu().double().numpy() for tensor in parts(tensors))
    return arrays if isinstance(outputs, tuple) else arrays[0]


def significant(value: float, digits: int = 4) -> float:
    return float(f"{value:.{digits - 1}e}")


# ---- time ----


def time_calls(calls: Mapping[str, Call], reference: str, device: str, seconds: float) -> Json:
    """Times of all calls, which take turns for about `seconds`, but at least `MIN_ROUNDS` rounds.

    Returns:
        For each name, `median_ms`, `q1_ms`, `q3_ms`, `best_ms` and `rounds`, and `ratio`,
        `ratio_q1`, `ratio_q3`: the time divided by that of `reference` in the same round.
    """
    with _quiet_interpreter():
        sample = _cuda_sampler() if device == "cuda" else _cpu_sampler
        warm_up = min(WARM_UP_SECONDS, seconds / 20)
        repeats = {
            name: 1 if device == "cuda" else _repeats(call, warm_up) for name, call in calls.items()
        }
        start = time.perf_counter()
        rounds = [{name: sample(call, repeats[name]) for name, call in calls.items()}]
        spent = time.perf_counter() - start
        wanted = min(max(MIN_ROUNDS, round(seconds / spent)), MAX_ROUNDS)
        rounds += [
            {name: sample(call, repeats[name]) for name, call in calls.items()}
            for _ in range(wanted - 1)
        ]
    times: Json = {}
    base = np.array([one[reference] for one in rounds])
    for name in calls:
        samples = np.array([one[name] for one in rounds])
        q1, median, q3 = np.quantile(samples, [0.25, 0.5, 0.75])
        ratio_q1, ratio, ratio_q3 = np.quantile(samples / base, [0.25, 0.5, 0.75])
        times[name] = {
            "median_ms": significant(median),
            "q1_ms": significant(q1),
            "q3_ms": significant(q3),
            "best_ms": significant(samples.min()),
            "rounds": len(rounds),
            "ratio": significant(ratio),
            "ratio_q1": significant(ratio_q1),
            "ratio_q3": significant(ratio_q3),
        }
    return times


@contextmanager
def _quiet_interpreter() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _repeats(call: Call, seconds: float) -> int:
    """Warms up, and says how many calls make a sample."""
    start = time.perf_counter()
    calls = 0
    last = 0.0
    while last < seconds and (calls < WARM_UP_CALLS or time.perf_counter() - start < seconds):
        before = time.perf_counter()
        call()
        calls += 1
        last = time.perf_counter() - before
    return max(1, math.ceil(SAMPLE_SECONDS / last))


def _cpu_sampler(call: Call, repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats * 1e3


def _cuda_sampler() -> Callable[[Call, int], float]:
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    sweep = torch.empty(2 * max(cache, 1 << 20), dtype=torch.int8, device="cuda")
    warm: set[Call] = set()

    def sample(call: Call, repeats: int) -> float:
        if call not in warm:
            for _ in range(10 * WARM_UP_CALLS):
                call()
            warm.add(call)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        sweep.zero_()
        begin.record()
        call()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end))

    return sample


def bandwidth(device: str, seconds: float, bytes_: int = 256 << 20) -> dict[str, float]:
    """What memory gives, in GB/s: PyTorch's copy of a large tensor, read + written, and its sum."""
    source = torch.ones(bytes_ // 4, device=device)
    target = torch.zeros_like(source).fill_(1)  # zeros alone may have no memory of their own yet
    times = time_calls(
        {"copy": lambda: target.copy_(source), "sum": source.sum}, "copy", device, seconds
    )
    moved = {"copy": 2 * bytes_, "sum": bytes_}
    return {
        name: significant(moved[name] / times[name]["median_ms"] / 1e6) for name in ("copy", "sum")
    }


# ---- memory ----


def can_reset_peak() -> bool:
    """Whether Linux lets this process forget the peak of its resident memory."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak_memory(call: Call, device: str) -> float:
    """MiB that one call needs above what was there before it, its outputs included.

    On the CPU the process must give freed memory back (see `RETURNED_PAGES`). Where the peak cannot
    be reset, it can be asked for once in the life of a process.
    """
    if device == "cuda":
        call()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)
    resettable = can_reset_peak()
    if resettable:
        call()  # code, thread pools and workspaces come into memory with the first call
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    if resettable:
        can_reset_peak()
        before = _status_kib("VmRSS")
        call()
        return round((_status_kib("VmHWM") - before) / 1024, 1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    call()
    return round((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024, 1)


def operands(case: Case, variant: Variant) -> dict[str, float]:
    """MiB of what goes into one forward call and of what comes out: what it cannot do without."""
    outputs: Any = prepared_call(case, variant, "forward")()
    tensors = {"inputs": [case.inputs[name] for name in variant.uses], "outputs": parts(outputs)}
    return {
        name: round(sum(tensor.numel() * tensor.element_size() for tensor in group) / 2**20, 2)
        for name, group in tensors.items()
    }


def _status_kib(field: str) -> int:
    match = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert match is not None
    return int(match[1])


# By default glibc maps large blocks afresh on every call, and whoever allocates most pays most page
# faults. Kept pages favour the rivals, so they are what is measured; suite "ops-default-malloc"
# measures the other.
KEPT_PAGES = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}
RETURNED_PAGES = {"MALLOC_MMAP_THRESHOLD_": str(64 << 10), "MALLOC_TRIM_THRESHOLD_": "0"}


# ---- the machine ----


def environment(device: str) -> Json:
    """What a reader needs to judge the numbers; nothing that names a host or a user."""
    info = json.loads(_output([sys.executable, "-m", "tritool", "info", "--json"]) or "{}")
    found: Json = {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "cores_allowed": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "rivals": rivals.package_versions(),
        "tritool": info,
        "git": git_state(),
    }
    if device == "cuda":
        fields = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.limit"
        values = (
            _output(["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]) or ""
        ).splitlines()
        found["gpu"] = (
            dict(zip(fields.split(","), map(str.strip, values[0].split(",")), strict=False))
            if values
            else {"name": torch.cuda.get_device_name(0)}
        )
        found["gpu"]["l2_bytes"] = torch.cuda.get_device_properties(0).L2_cache_size
    return found


def git_state() -> Json:
    """The commit, whether the measured sources differ from it, and whether the library is older."""
    root = Path(__file__).resolve().parents[1]
    sources = ["csrc", "tritool", "setup.py", "benchmarks/*.py"]
    sources += [f":!benchmarks/{name}.py" for name in ("report", "recorded", "plots", "compare")]
    changed = _output(["git", "-C", str(root), "status", "--porcelain", "--", *sources])
    library = root / "tritool" / "_C.so"
    newest = max((f.stat().st_mtime for f in root.glob("csrc/**/*") if f.is_file()), default=0.0)
    return {
        "commit": (_output(["git", "-C", str(root), "rev-parse", "HEAD"]) or "").strip() or None,
        "dirty": None if changed is None else bool(changed.strip()),
        "library_older_than_sources": library.exists() and library.stat().st_mtime < newest,
    }


def cpu_model() -> str:
    try:
        match = re.search(
            r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE
        )
    except OSError:
        match = None
    return match[1].strip() if match else platform.processor() or platform.machine()


def machine_slug(device: str) -> str:
    """A file name's part for the processor measured: its model, never a host's name."""
    name = torch.cuda.get_device_name(0) if device == "cuda" else cpu_model()
    name = re.sub(r"\(R\)|\(TM\)|\bCPU\b|@.*$|\b\d+-Core Processor\b", " ", name)
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _output(command: Sequence[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
