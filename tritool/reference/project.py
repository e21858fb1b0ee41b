# SPDX-License-Identifier: Apache-2.0
"""Projection of points into every view."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from tritool.reference._common import (
    FloatArray,
    as_float,
    homogeneous,
    sum_to_shape,
    times,
)


def project(points: ArrayLike, projections: ArrayLike) -> FloatArray:
    """Project world points into every view.

    Args:
        points: [..., 3], world units.
        projections: [..., C, 3, 4], world to pixels.

    Returns:
        [..., C, 2], pixels (x, y); NaN in a view where the point is not in front of the camera
        (depth <= 0) or anything is not finite.
    """
    return _project(as_float(points), as_float(projections))[0]


def project_vjp(
    grad: ArrayLike, points: ArrayLike, projections: ArrayLike
) -> tuple[FloatArray, FloatArray]:
    """Return the gradients of `project` to points and projections, in their shapes.

    Args:
        grad: [..., C, 2], the gradient to the result; ignored where that is NaN.
        points: as in `project`.
        projections: as in `project`.

    Returns:
        grad_points and grad_projections, summed over broadcast dimensions.
    """
    y, p = as_float(points), as_float(projections)
    pixels, depth = _project(y, p)
    valid = np.isfinite(pixels[..., :1])  # a pixel is NaN as a whole
    grad = np.where(valid, as_float(grad), 0.0)
    pixels = np.where(valid, pixels, 0.0)
    depth = np.where(valid, depth[..., None], 1.0)
    # (u, v) = (x1, x2) / x3, so dL/dx = (gu, gv, -(gu u + gv v)) / x3 with x = P (y, 1).
    grad_x = np.concatenate([grad, -(grad * pixels).sum(-1, keepdims=True)], axis=-1) / depth
    finite_p = np.where(valid[..., None], p, 0.0)
    finite_y = np.where(valid, homogeneous(y)[..., None, :], 0.0)
    grad_points = np.einsum("...cr,...crk->...k", grad_x, finite_p[..., :3])
    grad_projections = grad_x[..., :, None] * finite_y[..., None, :]
    return (
        sum_to_shape(grad_points, np.shape(points)),
        sum_to_shape(grad_projections, np.shape(projections)),
    )


def _project(y: FloatArray, projections: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Return the pixels [..., C, 2] and the depths [..., C]."""
    if y.shape[-1:] != (3,):
        raise ValueError(f"points must be [..., 3], got {y.shape}")
    if projections.ndim < 3 or projections.shape[-2:] != (3, 4):
        raise ValueError(f"projections must be [..., C, 3, 4], got {projections.shape}")
    with np.errstate(all="ignore"):
        x = times(projections, homogeneous(y)[..., None, :])
        depth = x[..., 2]
        pixels = x[..., :2] / depth[..., None]
        valid = np.isfinite(x).all(-1) & np.isfinite(pixels).all(-1) & (depth > 0.0)
    return np.where(valid[..., None], pixels, np.nan), depth
