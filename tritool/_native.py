# SPDX-License-Identifier: Apache-2.0
"""The compiled library: loaded once; if it cannot be, one sentence says why and what serves."""

from __future__ import annotations

import ctypes
import platform
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import torch

__all__ = ["available", "cuda_architectures", "describe"]

_LIBRARY = Path(__file__).with_name("_C.so")


@cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    """The library, or None and the reason."""
    if not _LIBRARY.exists():
        return None, "the native library was not built (no C++ compiler at installation)"
    try:
        torch.ops.load_library(str(_LIBRARY))  # type: ignore[no-untyped-call]
        library = ctypes.CDLL(str(_LIBRARY))
    except OSError as error:
        return None, f"the native library does not load: {str(error).splitlines()[0]}"
    for name in ("tritool_cpu_variant", "tritool_cuda_architectures"):
        getattr(library, name).restype = ctypes.c_char_p
    return library, ""


@cache
def available() -> bool:
    """Whether the native kernels are there; warns, once, if plain PyTorch serves in their place."""
    library, reason = _load()
    if library is None:
        warnings.warn(
            f"tritool: {reason}; plain PyTorch serves instead, slower. To build it: install a C++ "
            "compiler and type: pip install --no-build-isolation --force-reinstall --no-deps .",
            UserWarning,
            stacklevel=2,
        )
    return library is not None


def cuda_architectures() -> str:
    """The CUDA architectures compiled in, like "80;90+PTX"; empty without CUDA kernels."""
    library, _ = _load()
    return library.tritool_cuda_architectures().decode() if library is not None else ""


def describe() -> dict[str, Any]:
    """What this installation is made of and which path its ops take here, for `tritool info`."""
    from importlib.metadata import PackageNotFoundError, version

    library, reason = _load()
    architectures = cuda_architectures()
    cpu = library.tritool_cpu_variant().decode() if library is not None else ""
    if library is None:
        cpu_path = cuda_path = "plain PyTorch"
    else:
        cpu_path = f"native, {cpu}"
        cuda_path = f"native, {architectures}" if architectures else "not built, raises"
    # Every op of the dispatcher's namespace that has been defined, so after `import tritool.ops`.
    names = sorted(
        name.removeprefix("tritool::")
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("tritool::") and not name.endswith("_backward")
    )
    try:
        tritool_version = version("tritool")
    except PackageNotFoundError:
        tritool_version = "not installed"
    return {
        "tritool": tritool_version,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": version("numpy"),
        "native_library": "loaded" if library is not None else reason,
        "cpu_instructions": cpu,
        "cpu_threads": torch.get_num_threads(),
        "cuda_architectures": architectures,
        "torch_cuda": torch.version.cuda or "",
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "ops": names,
        "paths": {"cpu": cpu_path, "cuda": cuda_path},
    }
