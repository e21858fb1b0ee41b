# SPDX-License-Identifier: Apache-2.0
"""What one would write, or install, without tritool: one module per operation.

The plain PyTorch versions are the strongest we know of for each operation; nothing they need and
could keep between calls (grids, coordinates, float64 projections) is made inside the timed call.
Packages are measured as installed and left out where they are not.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType


def installed(package: str) -> ModuleType | None:
    """The package, or None if it cannot be imported here."""
    try:
        return import_module(package)
    except ImportError:
        return None


def package_versions() -> dict[str, str]:
    """The versions of the packages measured here."""
    found = {name: installed(module) for name, module in (("kornia", "kornia"), ("opencv", "cv2"))}
    return {name: module.__version__ for name, module in found.items() if module is not None}
