# SPDX-License-Identifier: Apache-2.0
"""Compile the CUDA kernels for every architecture of the package and look at what became of them.

Needs nvcc, not a GPU. Prints registers, shared memory, stack and spills of every kernel, writes
them to build/cuda-check.json, and fails where

- a kernel without float64 in its template arguments spills registers, or
- a kernel that is to load 16 bytes at once does not.
"""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from unittest import mock

ROOT = Path(__file__).resolve().parents[2]
FLAGS = ["-std=c++17", "-O3", "-I", str(ROOT / "csrc")]
# The last template argument of these is the number of elements a load.
VECTOR_KERNEL = re.compile(r"moments_(?:backward_)?rows_kernel<.*, (\d+)>$")
LOAD_OF_16_BYTES = re.compile(r"\bld\.global[\w.]*\.v(?:4\.[bfsu]32|2\.[bfsu]64|8\.[bfsu]16)\b")


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
    print_table(usages)
    report = ROOT / "build/cuda-check.json"
    report.parent.mkdir(exist_ok=True)
    text = {"architectures": architectures, "kernels": [asdict(u) for u in usages]}
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
    for name, body in ptx:
        match = VECTOR_KERNEL.search(names[name])
        if match and int(match[1]) > 1:
            vector_kernels += 1
            if not LOAD_OF_16_BYTES.search(body):
                problems.append(f"{names[name]} has no load of 16 bytes")
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
