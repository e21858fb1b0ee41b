# SPDX-License-Identifier: Apache-2.0
"""Numerical derivatives to compare gradients with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


def numerical_gradient(
    function: Callable[[Array], float], at: Array, step: float | Array = 1e-3
) -> Array:
    """Differentiate by central differences with two step sizes, extrapolated: error ~ step^4."""
    gradient = np.zeros(at.shape)
    steps = np.broadcast_to(step, at.shape)
    for index in np.ndindex(at.shape):

        def slope(h: float, index: tuple[int, ...] = index) -> float:
            ends = []
            for sign in (1.0, -1.0):
                moved = at.copy()
                moved[index] += sign * h
                ends.append(function(moved))
            return (ends[0] - ends[1]) / (2.0 * h)

        h = float(steps[index])
        gradient[index] = (4.0 * slope(h / 2.0) - slope(h)) / 3.0
    return gradient


def assert_close(actual: Array, expected: Array, relative: float) -> None:
    """Compare to a tolerance relative to the largest entry, as befits gradients."""
    assert actual.shape == expected.shape
    scale = np.abs(expected).max(initial=0.0)
    np.testing.assert_allclose(actual, expected, rtol=0.0, atol=relative * scale)


def slope_along(function: Callable[[Array], float], at: Array, direction: Array) -> float:
    """Differentiate along a direction, as `numerical_gradient` does, the step being its length."""

    def slope(h: float) -> float:
        return (function(at + h * direction) - function(at - h * direction)) / (2.0 * h)

    return (4.0 * slope(0.5) - slope(1.0)) / 3.0
