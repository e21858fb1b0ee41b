# SPDX-License-Identifier: Apache-2.0
"""Types and array helpers that the definitions share."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

FloatArray: TypeAlias = NDArray[np.float64]
BoolArray: TypeAlias = NDArray[np.bool_]


def as_float(array: ArrayLike) -> FloatArray:
    return np.asarray(array, dtype=np.float64)


def homogeneous(points: FloatArray) -> FloatArray:
    """[..., 3] -> [..., 4] with a 1 appended."""
    return np.concatenate([points, np.ones_like(points[..., :1])], axis=-1)


def times(matrices: FloatArray, vectors: FloatArray) -> FloatArray:
    """Matrix [..., m, n] times vector [..., n]; the batch dimensions broadcast."""
    product: FloatArray = (matrices @ vectors[..., None])[..., 0]
    return product


def transpose(matrices: FloatArray) -> FloatArray:
    return matrices.swapaxes(-1, -2)


def sum_to_shape(array: FloatArray, shape: tuple[int, ...]) -> FloatArray:
    """Undo a broadcast: sum over the dimensions that `shape` lacks or has as 1."""
    array = array.sum(axis=tuple(range(array.ndim - len(shape))))
    ones = tuple(i for i, n in enumerate(shape) if n == 1)
    summed: FloatArray = array.sum(axis=ones, keepdims=True)
    return summed
