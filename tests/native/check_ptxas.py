# SPDX-License-Identifier: Apache-2.0
"""Compile the CUDA kernels for every architecture of the package and look at what became of them.

Needs nvcc, not a GPU. Prints registers, shared memory, stack and spills of every kernel, and how it
goes to global memory: its instructions by width, and the sectors (32 bytes) that they touch. Writes
the same to build/cuda-check.json, and fails where

- a kernel without float64 in its template arguments spills registers, or
- a kernel that is to load or store 16 bytes at once does not.
"""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from unittest import mock

ROOT = Path(__file__).resolve().parents[2]
FLAGS = ["-std=c++17", "-O3", "-I", str(ROOT / "csrc")]
# Kernels that read several elements at once, by name; the group is the template argument that says
# how many. Where it is more than 1, loads of 16 bytes are wanted.
VECTOR_KERNELS = (
    re.compile(r"^moments_(?:backward_)?rows_kernel<.*, (\d+)>$"),
    re.compile(r"^unproject_\w*kernel<.*, (\d+)>$"),
)
# Those of them that store as many.
VECTOR_STORES = (
    re.compile(r"^moments_backward_rows_kernel<.*, (\d+)>$"),
    re.compile(r"^unproject_kernel<.*, (\d+)>$"),
)
WARP_SIZE, SECTOR_BYTES = 32, 32
MEMORY_KINDS = {"ld": "loads", "st": "stores", "atom": "atomics", "red": "atomics"}
# `@%p1 ld.global.nc.v4.f32 {...}`: predicate, instruction, qualifiers that end in the type.
INSTRUCTION = re.compile(r"^\s*(?:@!?%p\d+\s+)?(ld|st|atom|red)\.([\w.:]+)\s", re.MULTILINE)
OTHER_SPACES = {"param", "shared", "local", "const"}


@dataclass
class Usage:
    """What one kernel takes on one architecture."""

    kernel: str
    file: str
    arch: int
    registers: int = 0
    shared: int = 0
    stack: int = 0
    spill_stores: int = 0
    spill_loads: int = 0


@dataclass
class Traffic:
    """The instructions with which a kernel goes to global memory, each counted once.

    Loads, stores and atomics by their width in bytes a thread. Counted in the code, not in a run: a
    loop's body counts once, and both sides of a branch.
    """

    kernel: str
    loads: dict[int, int]
    stores: dict[int, int]
    atomics: dict[int, int]

    @property
    def sectors(self) -> dict[str, int]:
        """The sectors that a warp touches if it runs each once and its lanes are neighbours."""
        return {
            kind: sum(WARP_SIZE * width // SECTOR_BYTES * n for width, n in counts.items())
            for kind, counts in self.by_kind().items()
        }

    def by_kind(self) -> dict[str, dict[int, int]]:
        return {"loads": self.loads, "stores": self.stores, "atomics": self.atomics}


def load_setup() -> ModuleType:
    """Return setup.py as a module: where it finds CUDA, and the architectures it builds for."""
    spec = importlib.util.spec_from_file_location("tritool_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with mock.patch("setuptools.setup"):
        spec.loader.exec_module(module)
    return module


def run(command: list[str]) -> str:
    """Return what the command says on both channels; end the program where it fails."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def demangle(names: list[str]) -> dict[str, str]:
    """Map each symbol to its name without namespace and parameters: `project_kernel<float>`."""
    lines = run(["c++filt", *names]).splitlines()
    short = {}
    for name, line in zip(names, lines, strict=True):
        line = re.sub(r"\(anonymous namespace\)::|_GLOBAL__N_\w+::|\w+::", "", line)
        match = re.search(r"(\w+(?:<.*>)?)\(", line)
        short[name] = match[1] if match else line
    return short


def parse_usage(file: str, log: str) -> Iterator[Usage]:
    """Read the output of `ptxas -v`; kernels have their mangled names."""
    usage = None
    for line in log.splitlines():
        if match := re.search(r"Compiling entry function '(\w+)' for 'sm_(\d+)", line):
            usage = Usage(match[1], file, int(match[2]))
        elif usage is None:
            continue
        elif match := re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line
        ):
            usage.stack, usage.spill_stores, usage.spill_loads = map(int, match.groups())
        elif match := re.search(r"Used (\d+) registers", line):
            usage.registers = int(match[1])
            shared = re.search(r"(\d+) bytes smem", line)
            usage.shared = int(shared[1]) if shared else 0
            yield usage
            usage = None


def entries(ptx: str) -> Iterator[tuple[str, str]]:
    """Yield the mangled name and the text of every kernel in a PTX file."""
    starts = list(re.finditer(r"^(?:\.visible|\.weak)?\s*\.entry (\w+)\(", ptx, re.MULTILINE))
    for start, end in zip(starts, [*(m.start() for m in starts[1:]), len(ptx)], strict=True):
        yield start[1], ptx[start.start() : end]


def parse_traffic(kernel: str, body: str) -> Traffic:
    """Count what a kernel's PTX does in global memory, or through a pointer to anywhere."""
    counts: dict[str, Counter[int]] = {kind: Counter() for kind in MEMORY_KINDS.values()}
    for name, rest in INSTRUCTION.findall(body):
        *qualifiers, kind = rest.split(".")
        if OTHER_SPACES & {qualifier.partition("::")[0] for qualifier in qualifiers}:
            continue
        bits = re.fullmatch(r"[a-z]+(\d+)(x2)?", kind)
        assert bits is not None, rest
        elements = next((int(q[1:]) for q in qualifiers if re.fullmatch(r"v\d", q)), 1)
        width = int(bits[1]) // 8 * (2 if bits[2] else 1) * elements
        counts[MEMORY_KINDS[name]][width] += 1
    return Traffic(kernel, **{kind: dict(sorted(found.items())) for kind, found in counts.items()})


def is_vectorised(kernel: str, rules: tuple[re.Pattern[str], ...]) -> bool:
    """Whether a rule names the kernel and says that it handles more than one element at once."""
    return any((match := rule.search(kernel)) and int(match[1]) > 1 for rule in rules)


def compile_for(nvcc: str, arch: str, source: Path) -> list[Usage]:
    """Compile one file for one architecture."""
    with tempfile.TemporaryDirectory() as folder:
        target = [f"-arch=sm_{arch}", "-cubin", "-Xptxas=-v", "-o", f"{folder}/code.cubin"]
        log = run([nvcc, *FLAGS, *target, str(source)])
    return list(parse_usage(source.name, log))


def compile_to_ptx(nvcc: str, source: Path) -> list[tuple[str, str]]:
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder, "code.ptx")
        run([nvcc, *FLAGS, "-arch=compute_80", "-ptx", "-o", str(target), str(source)])
        return list(entries(target.read_text()))


def print_table(usages: list[Usage]) -> None:
    """Print a line for every kernel and use of resources, with the architectures that share it."""
    shared: dict[tuple[str, int, int, int, int], list[int]] = {}
    for u in usages:
        spills = u.spill_stores + u.spill_loads
        shared.setdefault((u.kernel, u.registers, u.shared, u.stack, spills), []).append(u.arch)
    width = max(len(key[0]) for key in shared)
    print(f"{'kernel':<{width}}  registers  shared  stack  spills  architectures")
    for (kernel, registers, memory, stack, spills), archs in sorted(shared.items()):
        names = " ".join(map(str, sorted(archs)))
        print(f"{kernel:<{width}}  {registers:>9}  {memory:>6}  {stack:>5}  {spills:>6}  {names}")


def print_traffic(traffic: list[Traffic]) -> None:
    """Print each kernel's instructions by width, and the sectors of a warp."""
    width = max(len(t.kernel) for t in traffic)
    widths = sorted({w for t in traffic for counts in t.by_kind().values() for w in counts})
    wide = f"{'/'.join(map(str, widths))} bytes"
    heads = [f"{kind} of {wide}" for kind in ("loads", "stores", "atomics")]
    print("\nglobal memory, instructions in the code; sectors: a warp, each once, neighbours")
    print(f"{'kernel':<{width}}  {'  '.join(heads)}  sectors loaded/stored/atomic")
    for t in traffic:
        cells = [
            f"{'/'.join(str(counts.get(w, 0)) for w in widths):>{len(head)}}"
            for head, counts in zip(heads, t.by_kind().values(), strict=True)
        ]
        print(f"{t.kernel:<{width}}  {'  '.join(cells)}  {'/'.join(map(str, t.sectors.values()))}")


def main() -> int:
    setup = load_setup()
    cuda = setup.find_cuda()
    if cuda is None:
        print(f"cuda-check needs nvcc; type: pip install {setup.NVCC_PACKAGES}", file=sys.stderr)
        return 1
    _, architectures = setup.gencode(setup.ARCHITECTURES)
    archs = [arch.partition("+")[0] for arch in architectures.split(";")]
    sources = sorted((ROOT / "csrc/kernels").glob("*_cuda.cu"))
    nvcc = str(cuda / "bin/nvcc")
    with ThreadPoolExecutor(2) as pool:
        compiled = [
            pool.submit(compile_for, nvcc, arch, source) for source in sources for arch in archs
        ]
        to_ptx = [pool.submit(compile_to_ptx, nvcc, source) for source in sources]
        usages = [usage for done in compiled for usage in done.result()]
        ptx = [entry for done in to_ptx for entry in done.result()]

    names = demangle(sorted({u.kernel for u in usages} | {name for name, _ in ptx}))
    for usage in usages:
        usage.kernel = names[usage.kernel]
    usages.sort(key=lambda u: (u.file, u.kernel, u.arch))
    traffic = [parse_traffic(names[name], body) for name, body in ptx]
    traffic.sort(key=lambda t: t.kernel)
    print_table(usages)
    print_traffic(traffic)
    report = ROOT / "build/cuda-check.json"
    report.parent.mkdir(exist_ok=True)
    text = {
        "architectures": architectures,
        "kernels": [asdict(u) for u in usages],
        "global_memory": [asdict(t) | {"sectors": t.sectors} for t in traffic],
    }
    report.write_text(json.dumps(text, indent=1) + "\n")

    problems = []
    expected = {int(arch.rstrip("af")) for arch in archs}
    for kernel in sorted(set(names.values())):
        missing = expected - {u.arch for u in usages if u.kernel == kernel}
        if missing:
            problems.append(f"{kernel} was not compiled for {sorted(missing)}")
    for u in usages:
        if u.spill_stores + u.spill_loads > 0 and "double" not in u.kernel:
            problems.append(f"{u.kernel} spills registers on sm_{u.arch}")
    vector_kernels = 0
    for t in traffic:
        if is_vectorised(t.kernel, VECTOR_KERNELS):
            vector_kernels += 1
            if 16 not in t.loads:
                problems.append(f"{t.kernel} has no load of 16 bytes")
        if is_vectorised(t.kernel, VECTOR_STORES) and 16 not in t.stores:
            problems.append(f"{t.kernel} has no store of 16 bytes")
    if vector_kernels == 0:
        problems.append("no kernel with loads of 16 bytes was found")
    for problem in problems:
        print(f"cuda-check: {problem}", file=sys.stderr)
    if not problems:
        print(
            f"{len(set(names.values()))} kernels for {architectures}: no float32 spills, "
            f"{vector_kernels} with loads of 16 bytes; {report.relative_to(ROOT)}"
        )
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
