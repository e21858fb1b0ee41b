# SPDX-License-Identifier: Apache-2.0
"""What bounds the CUDA kernels on an H200, counted from compiled code. Nothing here is measured.

    python benchmarks/roofline.py

Needs nvcc and nvdisasm (pip install nvidia-cuda-nvdisasm), not a GPU. Compiles the kernels for
sm_90, counts registers, accesses to memory and instructions (sass.py says how), and divides them by
what the device is assumed to do in a second. The times are floors: no waiting is in them. Writes
benchmarks/results/<version>/roofline--h200.json and docs/roofline.md.
"""

from __future__ import annotations

import argparse
import datetime
import math
import re
import shutil
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import bench
import suites
import torch
from bench import Json
from launches import SECULAR, SVD, TRIPS, WARP, Launch, l2_bytes, launches_of, operand_bytes
from recorded import number, table
from run import SCHEMA, write
from sass import Code, by_kind, count
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests/native"))
import check_ptxas  # noqa: E402  (a script of the tests, not in a package)

ARCH = "90"
PAPER_TIMES_TEN = ("soft_argmax2d", "soft_argmax25d", "soft_argmax3d")

# ---- the device, as assumed ----


@dataclass(frozen=True)
class Device:
    """An H200; rates a second. The published ones, except for those of copies and of L2."""

    multiprocessors: int = 132
    copy_bytes: float = 4.3e12  # read + written, by a copy in memory
    l2_bytes: float = 5.5e12
    flop32: float = 67e12
    flop64: float = 33.5e12
    l1_bytes: int = 256 << 10  # of a multiprocessor, shared memory included

    @property
    def instructions(self) -> float:
        """Instructions of single threads: a multiply-add is two operations of `flop32`.

        The four schedulers of a multiprocessor issue one instruction of a warp each in a cycle,
        which is this very rate: no kernel issues more, whatever its instructions are.
        """
        return self.flop32 / 2

    @property
    def rates(self) -> dict[str, float]:
        """Of the units that are narrower than the schedulers, in instructions of threads."""
        return {
            "instructions": self.instructions,
            "float64": self.flop64 / 2,
            "special": self.instructions / 8,  # 16 of 128 lanes
            "load/store": self.instructions / 4,  # 32 of 128 lanes; shuffles too
        }


H200 = Device()


def resident_warps(registers: int, shared: int, block: int) -> int:
    """Warps that a multiprocessor of compute capability 9.0 holds, by the CUDA Programming Guide.

    Registers are given to warps in units of 256, from four files of 16384; shared memory to blocks
    in units of 128 bytes, 1 KiB of each block being the driver's, 228 KiB of a multiprocessor.
    """
    warps = math.ceil(block / WARP)
    per_warp = math.ceil(max(registers, 1) * WARP / 256) * 256
    by_registers = 4 * (16384 // per_warp) // warps
    by_shared = (228 << 10) // (math.ceil(shared / 128) * 128 + 1024)
    return warps * min(by_registers, by_shared, 64 // warps, 32)


def floors_us(operands: int, from_l2: int, work: Mapping[str, float]) -> dict[str, float]:
    """The least time of a call, by what takes it. `work`: instructions of all threads, by kind."""
    seconds = {"memory": operands / H200.copy_bytes}
    if from_l2:
        seconds["L2"] = from_l2 / H200.l2_bytes
    seconds |= {kind: work[kind] / rate for kind, rate in H200.rates.items()}
    return {name: time * 1e6 for name, time in seconds.items()}


def target_us(
    op: str, shape: Mapping[str, int], mode: str, floors: Mapping[str, float]
) -> float | None:
    """The time that a kernel should take at most; None: none is set."""
    if op in PAPER_TIMES_TEN:
        return floors["memory"] / 0.85  # 85 % of the bandwidth of a copy
    if op == "unproject" and mode == "forward":
        return 2 * max(floors["memory"], floors["L2"])
    if op == "triangulate" and mode == "forward" and shape["C"] == 4 and shape["N"] > 10000:
        return shape["N"] / 2e9 * 1e6
    if op in ("rigid_align", "project") and shape["N"] > 10000:
        return floors["memory"]  # bounded by memory, that is: nothing else takes longer
    return None


# ---- compiling ----


@dataclass
class Kernel:
    usage: check_ptxas.Usage
    traffic: check_ptxas.Traffic
    section: str

    def per_thread(self, launch: Launch) -> dict[str, float]:
        assert launch.trips is not None
        return by_kind(
            count(Code(self.section), {**launch.trips, **TRIPS}, launch.skip, launch.through)
        )


def find_nvdisasm(cuda: Path) -> str | None:
    site = Path(sysconfig.get_paths()["platlib"])
    candidates = [cuda / "bin/nvdisasm", *sorted(site.glob("nvidia/*/bin/nvdisasm"))]
    found = next((path for path in candidates if path.exists()), None)
    return str(found) if found else shutil.which("nvdisasm")


def compile_kernels(nvcc: str, nvdisasm: str, source: Path) -> dict[str, Kernel]:
    """Compile one file for sm_90, as the package does, and take its kernels apart."""
    with tempfile.TemporaryDirectory() as folder:
        target = [f"-arch=sm_{ARCH}", "-cubin", "-Xptxas=-v", "-o", f"{folder}/code.cubin"]
        # Line numbers change no instruction.
        keep = ["-lineinfo", "-keep", "-keep-dir", folder]
        log = check_ptxas.run([nvcc, *check_ptxas.FLAGS, *target, *keep, str(source)])
        sass = check_ptxas.run([nvdisasm, "-c", "-gi", f"{folder}/code.cubin"])
        ptx = dict(check_ptxas.entries(next(Path(folder).glob("*.ptx")).read_text()))
    usages = {usage.kernel: usage for usage in check_ptxas.parse_usage(source.name, log)}
    sections = re.split(r"^\t\.section\t\.text\.", sass, flags=re.MULTILINE)[1:]
    texts = {text.partition(",")[0]: text for text in sections}
    names = check_ptxas.demangle(sorted(usages))
    return {
        names[name]: Kernel(usage, check_ptxas.parse_traffic(name, ptx[name]), texts[name])
        for name, usage in usages.items()
    }


# ---- the result ----


class Calls(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Collects the operations that PyTorch itself carries out and that are not mere views."""

    FREE = ("promote_types", "scalar_tensor")

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = str(func)
        if name.startswith("aten.") and not func.is_view and name.split(".")[1] not in self.FREE:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def pytorch_operations(specs: Sequence[suites.Spec]) -> dict[tuple[str, str], int]:
    """How many of PyTorch's own operations a call makes besides ours, by operation and mode."""
    counts: dict[tuple[str, str], int] = {}
    for spec in specs:
        case = spec.build("cpu")
        ours = case.variants[0]
        inputs = {n: case.inputs[n].clone().requires_grad_(n in case.wrt) for n in ours.uses}
        with Calls() as forward:
            outputs = bench.parts(ours.run(**inputs))
        grads = bench.cotangent(outputs)
        with Calls() as backward:
            torch.autograd.grad(outputs, [inputs[name] for name in case.wrt], grads)
        for mode, calls in (("forward", forward), ("backward", backward)):
            counts.setdefault((spec.op, mode), len(calls.names))
    return counts


def sizes() -> Iterator[tuple[str, str, dict[str, int]]]:
    """Operation, size and shape of the suites; the first of each soft-argmax also ten times."""
    for spec in suites.specs():
        yield spec.op, spec.size, spec.shape
        if spec.op in PAPER_TIMES_TEN and spec.headline:
            shape = spec.shape | {"B": 10 * spec.shape["B"]}
            yield spec.op, "x".join(map(str, shape.values())), shape


def describe(launch: Launch, kernel: Kernel) -> Json:
    usage = kernel.usage
    warps = resident_warps(usage.registers, usage.shared + launch.dynamic_shared, launch.block)
    per_multiprocessor = warps * WARP // launch.block
    widths = {kind: {str(w): n for w, n in found.items()} for kind, found in
              kernel.traffic.by_kind().items()}  # fmt: skip
    requests = {kind: sum(found.values()) for kind, found in kernel.traffic.by_kind().items()}
    return {
        "kernel": launch.kernel,
        "file": usage.file,
        "block": launch.block,
        "blocks": launch.blocks,
        "threads": launch.threads,
        "registers": usage.registers,
        "shared_bytes": usage.shared + launch.dynamic_shared,
        "stack_bytes": usage.stack,
        "spilled_bytes": usage.spill_stores + usage.spill_loads,
        "resident_warps": warps,
        "waves": launch.blocks / (per_multiprocessor * H200.multiprocessors),
        "own_bytes": launch.own_bytes,
        "global_memory_by_width": widths,
        "sectors_per_request": {
            kind: total / requests[kind] if requests[kind] else 0.0
            for kind, total in kernel.traffic.sectors.items()
        },
        "per_thread": kernel.per_thread(launch) if launch.trips is not None else None,
    }


def case_of(
    op: str, size: str, shape: dict[str, int], mode: str, kernels: Mapping[str, Kernel]
) -> Json:
    """What is counted of one call, and the times that follow."""
    launches = [describe(one, kernels[one.kernel]) for one in launches_of(op, size, shape, mode)]
    work = dict.fromkeys(H200.rates, 0.0)
    for one in launches:
        for kind, spent in (one["per_thread"] or {}).items():
            work[kind] = work.get(kind, 0.0) + spent * one["threads"]
    operands = operand_bytes(op, size, shape, mode)
    floors = floors_us(sum(operands.values()), l2_bytes(op, size, shape, mode), work)
    target = target_us(op, shape, mode, floors)
    bound = max(floors, key=lambda name: floors[name])
    return {
        "op": op,
        "size": size,
        "shape": shape,
        "mode": mode,
        "operand_bytes": operands,
        "launches": launches,
        "instructions": work["instructions"],
        "floors_us": {name: bench.significant(us) for name, us in floors.items()},
        "bound": bound,
        "target_us": None if target is None else bench.significant(target),
        "floor_over_target": None if target is None else bench.significant(floors[bound] / target),
    }


def roofline(kernels: Mapping[str, Kernel], only: str, tools: Json) -> Json:
    """The JSON: all cases of the operation `only`, or of all."""
    asked = [spec for spec in suites.specs(quick=True) if only in ("", spec.op)]
    return {
        "schema": SCHEMA,
        "suite": "study-roofline",  # the report on measured times leaves studies alone
        "machine": "h200",
        "device": "cuda",
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "settings": {"architecture": f"sm_{ARCH}", "dtype": "float32", "assumed": asdict(H200)},
        "environment": {
            "tritool": version("tritool"),
            "torch": torch.__version__,
            "git": bench.git_state(),
            **tools,
        },
        "pytorch_operations": {
            f"{op} {mode}": n for (op, mode), n in pytorch_operations(asked).items()
        },
        "cases": [
            case_of(op, size, shape, mode, kernels)
            for op, size, shape in sizes()
            if only in ("", op)
            for mode in ("forward", "backward")
        ],
    }


# ---- the page ----

INTRODUCTION = """\
# Roofline

Written by `benchmarks/roofline.py`; do not edit. What bounds the CUDA kernels on an H200, while
nobody has timed them: **counted** from the operands' sizes and the code that nvcc makes, or
**assumed**. Nothing on this page is measured.

- Counted: bytes that a call cannot do without (each input read once, each result written once);
  registers, shared memory, stack, spills; widths and sectors of accesses to global memory, each
  once as it stands in the code, neighbouring threads at neighbouring addresses; instructions of a
  thread, on the shortest way through the code that does the work, loops as often as the sizes say.
  What sizes do not settle: the secular equation of `triangulate` takes {secular:g} steps here, a
  singular value decomposition {sweeps:g} of its 4 sweeps, all views see all voxels in `unproject`,
  the level is never raised in `soft_argmax*`.
- Assumed: {copy:g} TB/s for a copy, read and written; {l2:g} TB/s from L2; {flop32:g} TFLOP/s in
  float32, that is {instructions:.3g}e12 instructions of threads a second, whatever they do; half
  as many in float64, a quarter for loads, stores and shuffles, an eighth for special functions;
  {multiprocessors} multiprocessors.
- A time below is a floor: the work over the rate, all units busy all the time. Kernels take longer.
  The cost of launches, some microseconds each, is in none of them; it is most of the time of small
  sizes. Those with a floor below a microsecond are only in the JSON.
- Targets: `soft_argmax*` 85 % of the bandwidth of a copy; `unproject` forward twice the larger of
  its floors of memory and L2; `triangulate` 2e9 points of four views a second; `rigid_align` and
  `project` bounded by memory.
"""

CASES = ("size", "", "MB", "launches", "memory us", "L2 us", "instructions us", "bound by")
KERNELS = (
    *("kernel", "registers", "shared B", "stack B", "spilled B", "warps of 64", "waves"),
    *("loads", "stores", "atomics", "sectors a request", "instructions a thread"),
)
# What a case has many of, for instructions each.
UNITS = {
    "triangulate": "point",
    "rigid_align": "pair of point sets",
    "project": "pixel",
    "unproject": "voxel",
}


def units_of(case: Json) -> int:
    shape = case["shape"]
    if case["op"].startswith("soft_argmax"):
        return math.prod(shape.values())
    if case["op"] == "unproject":
        return int(math.prod(shape[axis] for axis in "BXYZ"))
    return int(shape["N"] * (shape["C"] if case["op"] == "project" else 1))


def is_long(case: Json) -> bool:
    """Whether the floor is above what a launch costs at the least: else it says nothing."""
    return bool(case["floors_us"][case["bound"]] >= 1)


def page(result: Json) -> str:
    assumed, tools = result["settings"]["assumed"], result["environment"]
    commit = (tools["git"]["commit"] or "unknown")[:10]
    commit += " with changes" if tools["git"]["dirty"] else ""
    parts = [
        INTRODUCTION.format(
            secular=next(iter(SECULAR.values())),
            sweeps=next(iter(SVD.values())),
            copy=assumed["copy_bytes"] / 1e12,
            l2=assumed["l2_bytes"] / 1e12,
            flop32=assumed["flop32"] / 1e12,
            instructions=H200.instructions / 1e12,
            multiprocessors=assumed["multiprocessors"],
        ),
        f"{result['date'][:10]}; tritool {tools['tritool']}, commit {commit}; "
        f"{result['settings']['architecture']}, float32; nvcc {tools['nvcc']}, nvdisasm "
        f"{tools['nvdisasm']}.\n",
        "## Against the targets\n",
        *targets_section(result["cases"]),
    ]
    for op in dict.fromkeys(case["op"] for case in result["cases"]):
        cases = [case for case in result["cases"] if case["op"] == op]
        parts += [f"## {op}\n", *op_section(op, cases, result["pytorch_operations"])]
    return "\n".join(parts)


def targets_section(cases: Sequence[Json]) -> Iterator[str]:
    """Everything that has a target; by how much the floor alone is beyond it."""
    rows = []
    for case in cases:
        if case["target_us"] is None or not is_long(case):
            continue
        floor, over = case["floors_us"][case["bound"]], case["floor_over_target"]
        if over > 1:
            verdict = f"**out of reach, {number(over)}x**"
        else:
            verdict = f"{100 * over:.0f} % of the target"
        rows.append([
            f"`{case['op']}`", case["size"], case["mode"], case["bound"], number(floor),
            number(case["target_us"]), verdict,
        ])  # fmt: skip
    header = ("", "size", "", "bound by", "floor us", "target us", "floor")
    yield table(header, rows, left=4) + "\n"
    yield (
        "A floor just below its target is not a promise: a kernel that issues nine tenths of what "
        "it could is rare. Sizes of a few microseconds are decided by launches.\n"
    )


def op_section(op: str, cases: Sequence[Json], operations: Mapping[str, int]) -> Iterator[str]:
    rows = []
    for case in filter(is_long, cases):
        floors, ours = case["floors_us"], len(case["launches"])
        theirs = operations[f"{op} {case['mode']}"]
        rows.append([
            case["size"], case["mode"], number(sum(case["operand_bytes"].values()) / 1e6),
            f"{ours} + {theirs}" if theirs else str(ours), number(floors["memory"]),
            number(floors.get("L2")), number(floors["instructions"]), case["bound"],
        ])  # fmt: skip
    yield table(CASES, rows, left=2) + "\n"
    first: dict[str, Json] = {}
    for case in filter(is_long, cases):
        first.setdefault(case["mode"], case)
    kernels: dict[str, list[str]] = {}
    # The other aggregations of `unproject` differ little from its sum.
    for case in [*first.values(), *(c for c in cases if c["size"].startswith("sum"))]:
        for launch in case["launches"]:
            kernels.setdefault(launch["kernel"], kernel_row(launch))
    yield table(KERNELS, list(kernels.values()), left=1) + "\n"
    yield " ".join(sentences(op, first, operations)) + "\n"


def kernel_row(launch: Json) -> list[str]:
    widths = [
        " + ".join(f"{n} x {width} B" for width, n in found.items()) or "-"
        for found in launch["global_memory_by_width"].values()
    ]
    sectors = "/".join(number(n) for n in launch["sectors_per_request"].values())
    spent = launch["per_thread"]
    return [
        f"`{launch['kernel']}`",
        *(str(launch[k]) for k in ("registers", "shared_bytes", "stack_bytes", "spilled_bytes")),
        str(launch["resident_warps"]),
        number(launch["waves"]),
        *widths,
        sectors,
        f"{spent['instructions']:.0f}" if spent else "not counted",
    ]


def sentences(op: str, first: Mapping[str, Json], operations: Mapping[str, int]) -> Iterator[str]:
    """What the counts say, in words; for the first size of each mode."""
    for mode in ("forward", "backward"):
        case = first[mode]
        units, floors = units_of(case), case["floors_us"]
        unit = UNITS.get(op, "cell")
        budget = floors["memory"] * 1e-6 * H200.instructions / units
        yield (
            f"{mode.capitalize()}, {case['size']}: while memory moves what it must, the device "
            f"issues {number(budget)} instructions a {unit}; the code takes "
            f"{number(case['instructions'] / units)}, "
            f"{number(100 * share(case, 'float32'))} % of them float32 arithmetic, "
            f"{number(100 * share(case, 'float64'))} % float64."
        )
        for launch in case["launches"]:
            if launch["stack_bytes"]:
                yield (
                    f"`{launch['kernel']}` keeps {launch['stack_bytes']} bytes a thread in local "
                    "memory."
                )
            if launch["own_bytes"]:
                held = launch["own_bytes"] * launch["resident_warps"] * WARP
                yield (
                    f"A thread of `{launch['kernel']}` walks over {launch['own_bytes']} bytes of "
                    "its own several times, so that a request of a warp touches up to 32 sectors. "
                    f"All threads of a multiprocessor have {held >> 10} KiB, its first-level cache "
                    f"{H200.l1_bytes >> 10} KiB"
                    + (": later passes read from L2." if held > H200.l1_bytes else ".")
                )
            if 1 < launch["waves"] < 1.5:
                yield (
                    f"The blocks of `{launch['kernel']}` fill the device {number(launch['waves'])} "
                    f"times: the second round occupies {100 * (launch['waves'] - 1):.0f} % of it."
                )
    if any(operations[f"{op} {mode}"] for mode in first):
        yield (
            "PyTorch's own operations, the second number of launches, are those of the dispatcher; "
            "some launch more than once."
        )
    if op == "triangulate":
        case = first["forward"]
        spilled = sum(launch["spilled_bytes"] for c in first.values() for launch in c["launches"])
        yield f"The same code serves any number of views; it spills {spilled} bytes."
        rate = case["shape"]["N"] / case["floors_us"][case["bound"]] / 1e3
        yield f"By the counts alone, {number(rate)}e9 points of four views a second."


def share(case: Json, kind: str) -> float:
    spent = sum(one["per_thread"][kind] * one["threads"] for one in case["launches"]
                if one["per_thread"])  # fmt: skip
    return float(spent / case["instructions"])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", metavar="OP", default="", help="one operation; prints its page")
    parser.add_argument("--output", type=Path, metavar="FILE", help="the JSON")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="folder of roofline.md")
    options = parser.parse_args(arguments)
    setup = check_ptxas.load_setup()
    if (cuda := setup.find_cuda()) is None:
        print(f"roofline.py needs nvcc; type: pip install {setup.NVCC_PACKAGES}", file=sys.stderr)
        return 1
    if (nvdisasm := find_nvdisasm(cuda)) is None:
        print("roofline.py needs nvdisasm; type: pip install nvidia-cuda-nvdisasm", file=sys.stderr)
        return 1
    nvcc = str(cuda / "bin/nvcc")
    kernels: dict[str, Kernel] = {}
    for source in sorted((ROOT / "csrc/kernels").glob("*_cuda.cu")):
        stem = source.name.removesuffix("_cuda.cu")
        if options.only.startswith(stem) or not options.only:
            kernels |= compile_kernels(nvcc, nvdisasm, source)
    if not kernels:
        print(f"roofline.py: no operation is called {options.only!r}", file=sys.stderr)
        return 1
    release = re.compile(r"V(\d[\d.]+)")
    tools = {
        Path(tool).name: release.findall(check_ptxas.run([tool, "--version"]))[0]
        for tool in (nvcc, nvdisasm)
    }
    result = roofline(kernels, options.only, tools)
    version = result["environment"]["tritool"]
    output = options.output or (
        None if options.only else ROOT / f"benchmarks/results/{version}/roofline--h200.json"
    )
    if output:
        write(output, result)
    if options.only:
        print(page(result))
    else:
        (options.docs / "roofline.md").write_text(page(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
