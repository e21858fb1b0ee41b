# SPDX-License-Identifier: Apache-2.0
"""Geometry kernels for PyTorch: from several cameras to 3D joints, with gradients to the pixels.

`tritool.ops` holds the operations, `tritool.Cameras` and `tritool.VoxelGrid` what they work on,
`tritool.reference` the same mathematics in NumPy to read and to compare with.
"""

from typing import TYPE_CHECKING, Any

__all__ = ["Cameras", "Distortion", "VoxelGrid"]

if TYPE_CHECKING:
    from tritool.cameras import Cameras, Distortion
    from tritool.grid import VoxelGrid

_HOMES = {"Cameras": "cameras", "Distortion": "cameras", "VoxelGrid": "grid"}
_MODULES = ("ops", "models", "losses", "metrics", "reference", "cameras", "grid")


def __getattr__(name: str) -> Any:
    """Loads torch and the kernels on first use, so that `import tritool` is instant."""
    from importlib import import_module

    if name in _HOMES:
        return getattr(import_module(f"tritool.{_HOMES[name]}"), name)
    if name in _MODULES:
        return import_module(f"tritool.{name}")
    raise AttributeError(f"module 'tritool' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *_MODULES])
