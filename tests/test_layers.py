# SPDX-License-Identifier: Apache-2.0
"""Who may depend on whom (CONTRIBUTING.md, "Layers"), read from includes, imports, symbols."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CSRC = ROOT / "csrc"
PACKAGE = ROOT / "tritool"

# What the first file may include: a layer, "<name>" prefixes for system headers.
STANDARD = re.compile(
    r"<(c?(math|stdint|string|stddef|stdlib)|utility|type_traits|limits|immintrin)(\.h)?>"
)
TORCH = re.compile(r"<torch/(csrc/stable|headeronly)/")

# Which modules of the package each may import, besides its own folder.
LEAVES = {"cameras", "grid", "skeletons"}
PYTHON = {
    "cameras": set(),
    "grid": set(),
    "skeletons": set(),
    "reference": set(),
    "_native": set(),
    "ops": {"_native"} | LEAVES,
    "models": {"ops"} | LEAVES,
    "_poses": {"ops"},
    "losses": {"_poses", "ops"} | LEAVES,
    "metrics": {"_poses", "ops"} | LEAVES,
    "data": LEAVES,
    "reconstruction": {"ops", "data"} | LEAVES,
    "plot": {"data"} | LEAVES,
    "training": {"ops", "models", "losses", "metrics", "data", "plot"} | LEAVES,
    "demo": {"ops", "models", "metrics", "data", "plot", "reconstruction", "training"} | LEAVES,
    "cli": {"_native", "ops", "data", "plot", "demo", "reconstruction", "training"} | LEAVES,
    "__main__": {"cli"},
    "__init__": LEAVES,
}
# Third-party packages at the top of a module; matplotlib is only ever imported inside functions.
THIRD_PARTY = {
    "reference": {"numpy"},
    "cameras": {"torch"},
    "grid": {"torch"},
    "skeletons": set(),
    "ops": {"torch"},
    "models": {"torch"},
    "_native": {"torch"},
    "_poses": {"torch"},
    "losses": {"torch"},
    "metrics": {"torch"},
    "data": {"numpy", "torch"},
    "cli": set(),
    "__main__": set(),
    "__init__": set(),
}


def includes(path: Path) -> list[str]:
    return re.findall(r'^\s*#\s*include\s+([<"][^>"]+[>"])', path.read_text(), re.MULTILINE)


def sources(folder: str) -> list[Path]:
    found = sorted(
        p for p in (CSRC / folder).iterdir() if p.suffix in {".h", ".cuh", ".cpp", ".cu"}
    )
    assert found
    return found


@pytest.mark.parametrize("path", sources("math"), ids=lambda p: p.name)
def test_math_knows_nothing_but_itself(path: Path) -> None:
    for include in includes(path):
        assert include.startswith('"math/') or STANDARD.match(include), include
    code = path.read_text()
    for forbidden in ("std::vector", "new ", "malloc", "throw", "static "):
        lines = [line.split("//")[0] for line in code.splitlines()]
        assert not any(
            forbidden in line and "static constexpr" not in line and "static Pack of" not in line
            and "static_assert" not in line
            for line in lines
        ), f"{forbidden} in {path.name}"  # fmt: skip


@pytest.mark.parametrize("path", sources("kernels"), ids=lambda p: p.name)
def test_kernels_know_no_torch(path: Path) -> None:
    for include in includes(path):
        cuda = path.suffix in {".cu", ".cuh"} and include in {
            "<cuda_runtime.h>",
            '"emulator.h"',
        }
        assert include.startswith(('"math/', '"kernels/')) or STANDARD.match(include) or cuda, (
            include
        )
        if path.suffix == ".h":
            assert not include.endswith('.cuh"'), include
    code = path.read_text()
    for forbidden in (
        "at::",
        "c10::",
        "torch::",
        "std::thread",
        "cudaDeviceSynchronize",
        "cudaMalloc",
    ):
        assert forbidden not in code, f"{forbidden} in {path.name}"


@pytest.mark.parametrize("path", sources("torch"), ids=lambda p: p.name)
def test_bindings_use_the_stable_interface_only(path: Path) -> None:
    standard = re.compile(r"<(cstdint|initializer_list|optional|tuple|vector|dlfcn\.h)>")
    for include in includes(path):
        # Of the formulas, the element types alone.
        allowed = include.startswith(('"kernels/', '"torch/', '"math/half.h')) or TORCH.match(
            include
        )
        assert allowed or standard.match(include), include
    code = path.read_text()
    for forbidden in ("at::", "c10::", "<<<"):
        assert forbidden not in code, f"{forbidden} in {path.name}"


def test_the_library_needs_no_unstable_symbol() -> None:
    library = PACKAGE / "_C.so"
    if not library.exists():
        pytest.skip(reason="the native library is not built")
    if shutil.which("nm") is None:
        pytest.skip(reason="nm is not installed")
    symbols = subprocess.run(
        ["nm", "-DCu", str(library)], capture_output=True, text=True, check=True
    ).stdout
    assert "aoti_torch" in symbols
    wrong = [s for s in symbols.splitlines() if re.search(r"\b(at|c10|_?Py\w*)::|\bPy_?[A-Z]", s)]
    assert not wrong


def module_of(path: Path) -> str:
    relative = path.relative_to(PACKAGE)
    return relative.parts[0].removesuffix(".py")


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def imported(tree: ast.AST, path: Path) -> set[str]:
    """Names of modules of the package that this one imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
            if node.module == "tritool":
                names = [f"tritool.{alias.name}" for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "tritool" and len(parts) > 1:
                home = {"Cameras": "cameras", "Distortion": "cameras", "VoxelGrid": "grid"}
                found.add(home.get(parts[1], parts[1]))
    return found - {module_of(path)}


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_python_modules_import_downwards_only(path: Path) -> None:
    module = module_of(path)
    assert module in PYTHON, f"{module} has no place in the layers: give it one here"
    tree = ast.parse(path.read_text())
    assert imported(tree, path) <= PYTHON[module], imported(tree, path) - PYTHON[module]
    if module not in THIRD_PARTY:
        return
    top = {
        name.split(".")[0]
        for node in tree.body
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for name in (
            [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
        )
    }
    third = top & {"torch", "numpy", "scipy", "matplotlib", "tqdm"}
    assert third <= THIRD_PARTY[module], third - THIRD_PARTY[module]


@pytest.mark.parametrize("folder", ["benchmarks", "examples"])
def test_users_of_the_package_take_its_public_names(folder: str) -> None:
    for path in sorted((ROOT / folder).rglob("*.py")):
        assert not re.search(r"tritool(\.\w+)*\._\w|from tritool\S* import _", path.read_text()), (
            path
        )
