# SPDX-License-Identifier: Apache-2.0
"""Builds the native library tritool/_C.so; everything else about the package is in pyproject.toml.

The library is plain C++ and CUDA against torch's stable ABI: no Python headers, no CUDA build of
torch. So every build that finds a CUDA compiler compiles and links the CUDA kernels, also beside a
CPU-only torch.

Environment: TRITOOL_CUDA=auto|0|1, TORCH_CUDA_ARCH_LIST, CUDA_HOME, MAX_JOBS, CXX.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
ARCHITECTURES = "75;80;86;89;90;100;120+PTX"
NVCC_PACKAGES = "nvidia-cuda-nvcc nvidia-cuda-crt nvidia-cuda-runtime nvidia-cuda-cccl nvidia-nvvm"
# Instruction sets compiled beside the baseline, see csrc/kernels/isa.h.
X86_VARIANTS = {
    "avx2": ["-march=x86-64-v3"],
    "avx512": ["-march=x86-64-v4", "-mprefer-vector-width=512"],
}


def find_torch() -> Path:
    try:
        import torch
    except ImportError:
        sys.exit(
            "tritool: torch is not installed; type: pip install 'torch>=2.11' && "
            "pip install --no-build-isolation ."
        )
    if tuple(int(n) for n in re.findall(r"\d+", torch.__version__)[:2]) < (2, 11):
        sys.exit(f"tritool: torch {torch.__version__} is too old; type: pip install 'torch>=2.11'")
    return Path(torch.__file__).parent


def find_cuda() -> Path | None:
    """The folder of the CUDA toolkit: one that holds both the compiler and its headers."""
    nvcc = shutil.which("nvcc")
    site = Path(sysconfig.get_paths()["platlib"])
    candidates = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    candidates += [str(Path(os.path.realpath(nvcc)).parent.parent)] if nvcc else []
    candidates += [str(folder) for folder in sorted(site.glob("nvidia/cu*"))]
    for candidate in candidates:
        folder = Path(candidate) if candidate else None
        if (
            folder
            and (folder / "bin/nvcc").exists()
            and (folder / "include/cuda_runtime.h").exists()
        ):
            return folder
    return None


def choose_cuda() -> Path | None:
    wanted = os.environ.get("TRITOOL_CUDA", "auto")
    if wanted not in ("auto", "0", "1"):
        sys.exit(f"tritool: TRITOOL_CUDA is {wanted!r}; it takes auto, 0 or 1")
    cuda = None if wanted == "0" else find_cuda()
    if wanted == "1" and cuda is None:
        sys.exit(
            "tritool: TRITOOL_CUDA=1, but no folder with bin/nvcc and include/cuda_runtime.h in "
            "CUDA_HOME, CUDA_PATH, /usr/local/cuda or beside nvcc; set CUDA_HOME, or type: "
            f"pip install {NVCC_PACKAGES}"
        )
    return cuda


def gencode(architectures: str) -> tuple[list[str], str]:
    """Flags of nvcc for a TORCH_CUDA_ARCH_LIST like "8.0;9.0+PTX", and the list in numbers."""
    flags, names = [], []
    for entry in architectures.replace(" ", ";").replace(",", ";").split(";"):
        match = re.fullmatch(r"(\d+)\.?(\d)([af]?)(\+PTX)?", entry.strip())
        if not entry.strip():
            continue
        if match is None:
            sys.exit(
                f"tritool: TORCH_CUDA_ARCH_LIST holds {entry!r}; an entry is like 9.0 or 9.0+PTX"
            )
        number = match[1] + match[2] + match[3]
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if match[4]:
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
        names.append(number + (match[4] or ""))
    return flags, ";".join(names)


class BuildNative(build_ext):
    """Compiles csrc/ in parallel, only what has changed, and links it into one library."""

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", "/") + ".so"

    def build_extension(self, ext: Extension) -> None:
        torch = find_torch()
        cuda = choose_cuda()
        compiler = shlex.split(os.environ.get("CXX", "c++"))
        if shutil.which(compiler[0]) is None:
            print(
                f"tritool: no C++ compiler ({compiler[0]}): installing without the native library; "
                "plain PyTorch serves in its place, slower"
            )
            return
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        objects = Path(self.build_temp).resolve()
        jobs = self.compile_jobs(torch, cuda, compiler, objects)
        newest = max(
            f.stat().st_mtime for f in [*ROOT.glob("csrc/**/*"), ROOT / "setup.py"] if f.is_file()
        )
        stale = []
        for target, command in jobs:
            stamp = target.with_suffix(".cmd")
            line = shlex.join(command)
            if not target.exists() or target.stat().st_mtime < newest or stamp.read_text() != line:
                stale.append((target, command, stamp, line))
        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))) as pool:
            list(pool.map(self.compile_one, stale))
        output.parent.mkdir(parents=True, exist_ok=True)
        link = [*compiler, "-shared", "-o", str(output), *(str(target) for target, _ in jobs)]
        link += [f"-L{torch / 'lib'}", "-Wl,--as-needed", "-ltorch_cpu", "-Wl,-z,defs"]
        if cuda:
            link += [f"-L{folder}" for folder in (cuda / "lib64", cuda / "lib") if folder.exists()]
            link += ["-lcudart_static", "-ldl", "-lrt", "-lpthread"]
        subprocess.check_call([*link, "-ldl"])
        with_cuda = f" and the CUDA kernels with {cuda}" if cuda else ""
        print(f"tritool: built the CPU kernels{with_cuda}")
        if cuda is None and os.environ.get("TRITOOL_CUDA", "auto") == "auto":
            print(
                "tritool: no CUDA compiler found, so no CUDA kernels; for them: "
                f"pip install {NVCC_PACKAGES}"
            )

    def compile_jobs(
        self, torch: Path, cuda: Path | None, compiler: list[str], objects: Path
    ) -> list[tuple[Path, list[str]]]:
        variants = X86_VARIANTS if platform.machine() in ("x86_64", "AMD64") else {}
        flags, architectures = gencode(os.environ.get("TORCH_CUDA_ARCH_LIST", ARCHITECTURES))
        cxx = [
            *compiler,
            "-std=c++17",
            "-O3",
            "-fPIC",
            "-fvisibility=hidden",
            "-I",
            str(ROOT / "csrc"),
        ]
        cxx += ["-DTRITOOL_X86_VARIANTS"] if variants else []
        cxx += [f'-DTRITOOL_CUDA="{architectures}"'] if cuda else []
        # The kernels need no errno and no traps; contraction to FMA is the policy of
        # csrc/math/scalar.h.
        kernel = ["-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-Wno-psabi"]
        binding = ["-DTORCH_TARGET_VERSION=0x020b000000000000"]
        binding += [
            f"-isystem{torch / 'include'}",
            f"-isystem{torch / 'include/torch/csrc/api/include'}",
        ]

        jobs = []
        for source in sorted(ROOT.glob("csrc/*/*.cpp")):
            name = objects / source.parent.name / source.stem
            extra = binding if source.parent.name == "torch" else kernel
            jobs.append((name.with_suffix(".o"), [*cxx, *extra, "-c", str(source)]))
            if source.stem.endswith("_cpu"):
                jobs += [
                    (
                        name.with_name(f"{source.stem}.{isa}.o"),
                        [*cxx, *extra, *march, f"-DTRITOOL_ISA={isa}", "-c", str(source)],
                    )
                    for isa, march in variants.items()
                ]
        for source in sorted(ROOT.glob("csrc/*/*.cu")) if cuda else []:
            nvcc = [
                str(cuda / "bin/nvcc"),
                "-std=c++17",
                "-O3",
                "-lineinfo",
                "-Xcompiler=-fPIC,-fvisibility=hidden",
            ]
            nvcc += ["-ccbin", compiler[0], *flags, "-I", str(ROOT / "csrc"), "-c", str(source)]
            jobs.insert(
                0, (objects / source.parent.name / f"{source.stem}.o", nvcc)
            )  # the longest first
        return [(target, [*command, "-o", str(target)]) for target, command in jobs]

    @staticmethod
    def compile_one(job: tuple[Path, list[str], Path, str]) -> None:
        target, command, stamp, line = job
        target.parent.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"tritool: {line}\n{done.stdout}{done.stderr}")
        sys.stdout.write(done.stdout + done.stderr)
        stamp.write_text(line)


class PlatformWheel(bdist_wheel):
    """The library has no Python symbols: one wheel for every Python 3 of a platform."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[Extension("tritool._C", [])],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": PlatformWheel},
)
