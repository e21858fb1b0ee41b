# SPDX-License-Identifier: Apache-2.0
"""The vocabulary of the suites: a case is one operation at one size, computed in several ways."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from torch import Tensor

SEED = 20240607
Kind = Literal["tritool", "pytorch", "compiled", "package"]
Unit = Literal["px", "mm", "value"]
"""Of a result: pixels, millimetres, or what the features have that were put in."""
Array = npt.NDArray[np.float64]
Outputs = Tensor | tuple[Tensor, ...]


def distance(found: Array, expected: Array) -> Array:
    """Between points, the last dimension being their coordinates."""
    norms: Array = np.linalg.norm(found - expected, axis=-1)
    return norms


def difference(found: Array, expected: Array) -> Array:
    """Of values, each on its own."""
    return np.abs(found - expected)


@dataclass(frozen=True)
class Variant:
    """One way to compute an operation: a function of the inputs named in `uses`."""

    name: str
    kind: Kind
    run: Callable[..., Outputs]
    uses: tuple[str, ...]
    differentiable: bool = True
    note: str = ""


@dataclass(frozen=True)
class Case:
    """One operation at one size, with everything needed to check and time it."""

    inputs: dict[str, Tensor]
    """float32, on the device."""
    wrt: tuple[str, ...]
    """The inputs that forward + backward differentiates."""
    reference: Callable[..., Any]
    """The result in float64, from the inputs of a variant as float64 arrays."""
    vjp: Callable[..., dict[str, Array]]
    """Its gradients in float64, from the incoming gradient and the same inputs."""
    variants: Sequence[Variant]
    batch_dims: int = 1
    """Leading dimensions of the differentiable inputs that number independent items."""
    error: Callable[..., Array] = distance
    """How far a result, or tuple of results, is from the one in float64, item by item."""


@dataclass(frozen=True)
class Spec:
    """A case that has not been built yet."""

    op: str
    size: str
    shape: dict[str, int]
    unit: Unit
    tolerance: float
    """Accurate: all results finite, 99.9 % of them within this distance of float64."""
    build: Callable[[str], Case]
    """Makes the case on a device."""
    headline: bool = False
    """Goes into the README's table."""
    memory: bool = False
    """Large enough for its peak memory to mean something."""

    @property
    def name(self) -> str:
        return f"{self.op} {self.size}"


def float64(inputs: dict[str, Tensor]) -> dict[str, Array]:
    return {name: tensor.detach().cpu().double().numpy() for name, tensor in inputs.items()}
