# SPDX-License-Identifier: Apache-2.0
"""Unprojection of feature maps into a volume and aggregation over views: equations (8)-(11)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tritool.reference._common import (
    BoolArray,
    FloatArray,
    as_float,
    homogeneous,
    sum_to_shape,
    times,
)

Frame: TypeAlias = tuple[ArrayLike, ArrayLike, tuple[int, int, int]]
Aggregation: TypeAlias = Literal["sum", "mean", "softmax", "max"]
Outside: TypeAlias = Literal["zeros", "exclude"]
Sampling: TypeAlias = Literal["center", "official"]


def unproject(
    features: ArrayLike,
    projections: ArrayLike,
    grid: Frame | ArrayLike,
    *,
    aggregation: Aggregation,
    confidences: ArrayLike | None = None,
    outside: Outside = "zeros",
    sampling: Sampling = "center",
) -> FloatArray:
    """Fill each voxel with what the views show at its projection, equations (8)-(11).

    With h = P (X, 1) the voxel X lies at the depth z = h2 and the pixel (sx h0 / z, sy h1 / z) of a
    view. The view sees it if z > 0 and the pixel is less than one from the map: -1 < x < W and
    -1 < y < H. The view's value v is then interpolated between the four pixels around, with zeros
    beyond the border; otherwise it is 0. Over the views that take part, with confidences w,
        "sum"      sum w v                              equation (8)
        "mean"     sum w v / sum w                      equation (9)
        "softmax"  sum w exp(v) v / sum w exp(v)        equations (10)-(11)
        "max"      the largest v, whatever the w are
    A view of confidence 0 takes no part, nor does, where `outside` is "exclude", one that does not
    see the voxel. Where no view takes part the result is 0.

    The result is NaN where depth or pixel in a view with w != 0 are NaN (unless z <= 0: behind a
    camera nothing is seen), where the w of a view that takes part is negative or NaN, and where
    arithmetic on the features makes it so.

    Args:
        features: [B, C, K, H, W].
        projections: [B, C, 3, 4], world to feature-map pixels.
        grid: (origin [B, 3], axes [B, 3, 3], (X, Y, Z)), voxel (i, j, k) being centred at
            `origin + i axes[0] + j axes[1] + k axes[2]`; or points, an array [B, ..., 3].
        aggregation: "sum", "mean", "softmax" or "max".
        confidences: [B, C] or [B, C, K], >= 0; all 1 by default.
        outside: whether views that do not see a voxel give it "zeros" or are "exclude"d.
        sampling: "center" takes h / z for pixels as they are; "official" multiplies them by
            sx = (W - 1) / H and sy = (H - 1) / W, which is what becomes of them in the paper's
            published code.

    Returns:
        [B, K, X, Y, Z], or [B, K, ...] for points. B is 1 or the same in every argument.
    """
    scene = _prepare(features, projections, grid, confidences, (aggregation, outside, sampling))
    result = np.empty((*scene.batch_and_channels, scene.points.shape[1]))
    for b, part in _parts(scene):
        views, values = _look(scene, b, part)
        outcome = _aggregate(views, values, scene.confidences[b], aggregation, outside)
        result[b, :, part] = outcome.result
    return result.reshape(*scene.batch_and_channels, *scene.shape)


def unproject_vjp(
    grad: ArrayLike,
    features: ArrayLike,
    projections: ArrayLike,
    grid: Frame | ArrayLike,
    *,
    aggregation: Aggregation,
    confidences: ArrayLike | None = None,
    outside: Outside = "zeros",
    sampling: Sampling = "center",
) -> tuple[FloatArray, FloatArray, FloatArray | tuple[FloatArray, FloatArray], FloatArray | None]:
    """Return the gradients of `unproject`.

    With the incoming gradient g of a voxel, its result u and p = w exp(v) / sum w exp(v):
        "sum"      dL/dv = g w                  dL/dw = g v
        "mean"     dL/dv = g w / sum w          dL/dw = g (v - u) / sum w
        "softmax"  dL/dv = g p (1 + v - u)      dL/dw = g exp(v) (v - u) / sum w exp(v)
        "max"      dL/dv = g, first largest     dL/dw = 0
    The interpolation is differentiated in the cell of the pixel, at a border of cells the one at
    larger x and y, then the projection as in `project_vjp`.

    Args:
        grad: [B, K, X, Y, Z] or [B, K, ...], the gradient to the result.
        features: as in `unproject`.
        projections: as in `unproject`.
        grid: as in `unproject`.
        aggregation: as in `unproject`.
        confidences: as in `unproject`.
        outside: as in `unproject`.
        sampling: as in `unproject`.

    Returns:
        grad_features, grad_projections, grad_grid and grad_confidences (None without confidences),
        in the shapes of the arguments; grad_grid is (grad_origin, grad_axes), or an array for
        points. Where the result is NaN they are exactly 0, even for a NaN `grad`; but "sum" and
        "mean" are linear, and NaN in the features alone leaves the gradient to the features.
    """
    scene = _prepare(features, projections, grid, confidences, (aggregation, outside, sampling))
    grad_result = as_float(grad)
    if grad_result.shape != (*scene.batch_and_channels, *scene.shape):
        raise ValueError(
            f"grad must be {(*scene.batch_and_channels, *scene.shape)}, got {grad_result.shape}"
        )
    grad_result = grad_result.reshape(*scene.batch_and_channels, -1)
    grad_features = np.zeros(scene.features.shape)
    grad_projections = np.zeros(scene.projections.shape)
    grad_points = np.zeros(scene.points.shape)
    grad_confidences = np.zeros(scene.confidences.shape)

    for b, part in _parts(scene):
        views, values = _look(scene, b, part)
        outcome = _aggregate(views, values, scene.confidences[b], aggregation, outside)
        grad_values, grad_w = _aggregate_vjp(grad_result[b, :, part], values, outcome, aggregation)
        grad_confidences[b] += grad_w
        smooth = ~np.isnan(outcome.result)
        for c, view in enumerate(views):
            grad_features[b, c] += _scatter(view, grad_values[c], scene.features.shape[-2:])
            grad_h = _pixel_vjp(view, scene.features[b, c], np.where(smooth, grad_values[c], 0.0))
            sees = view.sees[:, None]
            x = np.where(sees, homogeneous(scene.points[b, part]), 0.0)
            grad_projections[b, c] += grad_h.T @ x
            with np.errstate(invalid="ignore"):  # a projection may be NaN and see nothing
                grad_x = grad_h @ scene.projections[b, c, :, :3]
            grad_points[b, part] += np.where(sees, grad_x, 0.0)

    return (
        sum_to_shape(grad_features, np.shape(features)),
        sum_to_shape(grad_projections, np.shape(projections)),
        _positions_vjp(grad_points.reshape(len(grad_points), *scene.shape, 3), grid),
        None if confidences is None else _confidences_vjp(grad_confidences, np.shape(confidences)),
    )


# --- arguments -----------------------------------------------------------------------------------


class _Scene(NamedTuple):
    """The arguments of `unproject` in standard shapes, B being that of the result in all."""

    features: FloatArray  # [B, C, K, H, W]
    projections: FloatArray  # [B, C, 3, 4]
    points: FloatArray  # [B, V, 3], the voxels' centres
    confidences: FloatArray  # [B, C, K]
    scale: FloatArray  # [2], sx and sy
    shape: tuple[int, ...]  # of the V voxels

    @property
    def batch_and_channels(self) -> tuple[int, int]:
        return self.features.shape[0], self.features.shape[2]


def _prepare(
    features: ArrayLike,
    projections: ArrayLike,
    grid: Frame | ArrayLike,
    confidences: ArrayLike | None,
    options: tuple[str, str, str],
) -> _Scene:
    choices = {
        "aggregation": ("sum", "mean", "softmax", "max"),
        "outside": ("zeros", "exclude"),
        "sampling": ("center", "official"),
    }
    for (name, allowed), option in zip(choices.items(), options, strict=True):
        if option not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {option!r}")

    maps, p = as_float(features), as_float(projections)
    if maps.ndim != 5:
        raise ValueError(f"features must be [B, C, K, H, W], got {maps.shape}")
    views, channels, height, width = maps.shape[1:]
    if p.ndim != 4 or p.shape[1:] != (views, 3, 4):
        raise ValueError(f"projections must be [B, C, 3, 4] with C = {views}, got {p.shape}")
    w = np.ones((1, views)) if confidences is None else as_float(confidences)
    if w.shape[1:] not in ((views,), (views, channels)):
        raise ValueError(
            f"confidences must be [B, C] or [B, C, K] with C = {views}, K = {channels}, "
            f"got {w.shape}"
        )
    w = w.reshape(*w.shape, *(1,) * (3 - w.ndim))
    points = _positions(grid)
    flat = points.reshape(len(points), math.prod(points.shape[1:-1]), 3)

    (batch,) = np.broadcast_shapes(maps.shape[:1], p.shape[:1], flat.shape[:1], w.shape[:1])
    scale = np.ones(2)
    if options[2] == "official":
        # It divides the pixel's x by H and its y by W, taking the results for shares of the map,
        # and samples where these shares of W - 1 and H - 1 are.
        scale = np.array([(width - 1) / height, (height - 1) / width])
    return _Scene(
        features=np.broadcast_to(maps, (batch, *maps.shape[1:])),
        projections=np.broadcast_to(p, (batch, *p.shape[1:])),
        points=np.broadcast_to(flat, (batch, *flat.shape[1:])),
        confidences=np.broadcast_to(w, (batch, views, channels)),
        scale=scale,
        shape=points.shape[1:-1],
    )


def _parts(scene: _Scene) -> Iterator[tuple[int, slice]]:
    """Yield volumes by pieces, small enough for the arrays [C, K, V] to be handled fast."""
    for b in range(len(scene.points)):
        for start in range(0, scene.points.shape[1], 1 << 14):
            yield b, slice(start, start + (1 << 14))


def _positions(grid: Frame | ArrayLike) -> FloatArray:
    """Return the centres [B, X, Y, Z, 3] of the voxels of a frame, or the points [B, ..., 3]."""
    if not isinstance(grid, tuple):
        points = as_float(grid)
        if points.ndim < 2 or points.shape[-1] != 3:
            raise ValueError(
                f"grid must be points [B, ..., 3] or (origin, axes, size), got {points.shape}"
            )
        return points
    if len(grid) != 3:
        raise ValueError(f"grid must be (origin, axes, size), got a tuple of {len(grid)}")
    origin, axes, size = as_float(grid[0]), as_float(grid[1]), grid[2]
    if origin.shape[1:] != (3,) or axes.shape[1:] != (3, 3) or len(size) != 3:
        raise ValueError(
            "grid must be (origin [B, 3], axes [B, 3, 3], (X, Y, Z)), "
            f"got {origin.shape}, {axes.shape} and {size}"
        )
    i, j, k = np.indices(size)[..., None]
    a0, a1, a2 = (axes[:, None, None, None, n] for n in range(3))
    return np.asarray(origin[:, None, None, None] + i * a0 + j * a1 + k * a2)


def _positions_vjp(
    grad: FloatArray, grid: Frame | ArrayLike
) -> FloatArray | tuple[FloatArray, FloatArray]:
    """From the gradient [B, ..., 3] to the voxels' centres."""
    if not isinstance(grid, tuple):
        return sum_to_shape(grad, np.shape(grid))
    indices = np.indices(grid[2], dtype=np.float64)
    grad_axes = np.einsum("nxyz,bxyzd->bnd", indices, grad)
    return (
        sum_to_shape(grad.sum((1, 2, 3)), np.shape(grid[0])),
        sum_to_shape(grad_axes, np.shape(grid[1])),
    )


def _confidences_vjp(grad: FloatArray, shape: tuple[int, ...]) -> FloatArray:
    """From the gradient [B, C, K] to confidences [B, C] or [B, C, K]."""
    padded = (*shape, *(1,) * (3 - len(shape)))
    return sum_to_shape(grad, padded).reshape(shape)


# --- one view ------------------------------------------------------------------------------------


class _View(NamedTuple):
    """Where V voxels are in the map of a view.

    The map has a border of zeros, one pixel wide, so that every cell of four pixels in which a seen
    voxel may lie is whole. What is not seen is put into the first cell.
    """

    sees: BoolArray  # [V]
    unknown: BoolArray  # [V]
    pixel: FloatArray  # [V, 2], (x, y); 0 where not seen
    depth: FloatArray  # [V]; 1 where not seen
    scale: FloatArray  # [2], sx and sy
    corner: NDArray[np.int64]  # [2, V], (x, y) of the cell's first pixel in the map with border
    fraction: FloatArray  # [2, V], (x, y) in the cell


def _look(scene: _Scene, b: int, part: slice) -> tuple[list[_View], FloatArray]:
    """Find some voxels in each view of a scene, and the values [C, K, V] they have there."""
    points, maps = scene.points[b, part], scene.features[b]
    views = [_find(points, p, scene.scale, maps.shape[-2:]) for p in scene.projections[b]]
    values = np.zeros((*maps.shape[:2], len(points)))
    for c, view in enumerate(views):
        fx, fy = view.fraction
        (v00, v01), (v10, v11) = _cells(maps[c], view)
        with np.errstate(invalid="ignore"):
            value = (1 - fy) * ((1 - fx) * v00 + fx * v01) + fy * ((1 - fx) * v10 + fx * v11)
        values[c] = np.where(view.sees, value, 0.0)
    return views, values


def _find(
    points: FloatArray, projection: FloatArray, scale: FloatArray, size: tuple[int, ...]
) -> _View:
    """Project the points [V, 3] into a map of the size (H, W)."""
    with np.errstate(all="ignore"):
        h = times(projection, homogeneous(points))
        depth = h[:, 2]
        pixel = scale * (h[:, :2] / depth[:, None])
        behind = depth <= 0.0
        inside = (pixel > -1.0).all(-1) & (pixel[:, 0] < size[1]) & (pixel[:, 1] < size[0])
    unknown = ~behind & (~np.isfinite(depth) | np.isnan(pixel).any(-1))
    sees = ~behind & ~unknown & inside
    pixel = np.where(sees[:, None], pixel, 0.0)
    corner = np.floor(pixel)
    return _View(
        sees=sees,
        unknown=unknown,
        pixel=pixel,
        depth=np.where(sees, depth, 1.0),
        scale=scale,
        corner=corner.T.astype(np.int64) + 1,
        fraction=(pixel - corner).T,
    )


def _cells(maps: FloatArray, view: _View) -> FloatArray:
    """Return the pixels [2, 2, K, V] around each voxel, indexed by y and x of the cell."""
    bordered = np.pad(maps, [(0, 0), (1, 1), (1, 1)])
    x, y = view.corner
    return np.array([[bordered[:, y + dy, x + dx] for dx in (0, 1)] for dy in (0, 1)])


def _scatter(view: _View, grad: FloatArray, size: tuple[int, ...]) -> FloatArray:
    """Add the gradients [K, V] to the values up in the pixels they were interpolated from."""
    channels = len(grad)
    bordered = (channels, size[0] + 2, size[1] + 2)
    total = np.zeros(math.prod(bordered))
    grad = np.where(view.sees, grad, 0.0)
    offset = np.arange(channels)[:, None] * (bordered[1] * bordered[2])
    for dy, share_y in enumerate((1.0 - view.fraction[1], view.fraction[1])):
        for dx, share_x in enumerate((1.0 - view.fraction[0], view.fraction[0])):
            pixel = (view.corner[1] + dy) * bordered[2] + view.corner[0] + dx
            addends = share_y * share_x * grad
            total += np.bincount((offset + pixel).ravel(), addends.ravel(), len(total))
    return total.reshape(bordered)[:, 1:-1, 1:-1]


def _pixel_vjp(view: _View, maps: FloatArray, grad: FloatArray) -> FloatArray:
    """Return the gradient to h = P (X, 1), [V, 3], from that to the values, [K, V]."""
    fx, fy = view.fraction
    (v00, v01), (v10, v11) = _cells(maps, view)
    with np.errstate(invalid="ignore"):
        along_x = (1 - fy) * (v01 - v00) + fy * (v11 - v10)
        along_y = (1 - fx) * (v10 - v00) + fx * (v11 - v01)
    # What has no share in the result may hold anything.
    used = view.sees & (grad != 0.0)
    gx = np.where(used, grad * np.where(used, along_x, 0.0), 0.0).sum(0)
    gy = np.where(used, grad * np.where(used, along_y, 0.0), 0.0).sum(0)
    # (x, y) = (sx h0, sy h1) / h2
    grad_pixel = np.stack([gx, gy], axis=-1)
    grad_depth = -(grad_pixel * view.pixel).sum(-1, keepdims=True)
    return np.concatenate([view.scale * grad_pixel, grad_depth], axis=-1) / view.depth[:, None]


# --- aggregation over views ----------------------------------------------------------------------


class _Outcome(NamedTuple):
    """An aggregation over C views with what its derivative needs."""

    result: FloatArray  # [K, V]
    takes_part: BoolArray  # [C, K, V]
    shares: FloatArray  # [C, K, V], dL/dv / g but for the softmax's factor 1 + v - u
    total: FloatArray  # [K, V], the sum that the shares are divided by; 1 if none
    factors: FloatArray  # [C, K, V], exp(v) times a common factor that `total` has too; or 1
    linear: BoolArray  # [K, V], whether the shares are sound whatever the values are


def _aggregate(
    views: list[_View],
    values: FloatArray,
    confidences: FloatArray,
    aggregation: str,
    outside: str,
) -> _Outcome:
    """Equations (8)-(11), of values [C, K, V] with confidences [C, K]."""
    w = confidences[..., None]
    sees = np.array([view.sees for view in views], dtype=bool).reshape(
        values.shape[0], 1, values.shape[2]
    )
    unknown = np.array([view.unknown for view in views], dtype=bool).reshape(sees.shape)
    takes_part = (w != 0.0) & (sees | (outside == "zeros") | unknown)
    defined = ~(takes_part & (unknown | ~((w >= 0.0) & (w < np.inf)))).any(0)
    w = np.where(takes_part, w, 0.0)
    v = np.where(takes_part, values, 0.0)
    largest = np.where(takes_part, values, -np.inf).max(0, initial=-np.inf)

    with np.errstate(all="ignore"):
        factors = np.ones_like(v)
        if aggregation == "softmax":
            factors = np.exp(np.where(takes_part, v - largest, 0.0))
        total = np.ones_like(largest)
        if aggregation in ("mean", "softmax"):
            total = np.where(takes_part.any(0), (w * factors).sum(0), 1.0)
        if aggregation == "max":
            is_largest = takes_part & (v == largest)
            shares = np.where(is_largest & (is_largest.cumsum(0) == 1), 1.0, 0.0)
            result = np.where(takes_part.any(0), largest, 0.0)
        else:
            shares = w * factors / total
            result = (shares * v).sum(0)
    return _Outcome(
        result=np.where(defined, result, np.nan),
        takes_part=takes_part,
        shares=shares,
        total=total,
        factors=factors,
        linear=defined & np.isfinite(shares).all(0) & (aggregation in ("sum", "mean")),
    )


def _aggregate_vjp(
    grad: FloatArray, values: FloatArray, outcome: _Outcome, aggregation: str
) -> tuple[FloatArray, FloatArray]:
    """Return the gradients to the values, [C, K, V], and to the confidences, [C, K]."""
    takes_part, shares = outcome.takes_part, outcome.shares
    valid = ~np.isnan(outcome.result)
    flows = valid | outcome.linear
    with np.errstate(all="ignore"):
        excess = np.where(valid, values - outcome.result, 0.0)
        by_value, by_confidence = shares, excess / outcome.total
        if aggregation == "sum":
            by_confidence = values
        elif aggregation == "softmax":
            by_value = shares * (1.0 + excess)
            by_confidence = outcome.factors * by_confidence
        elif aggregation == "max":
            by_confidence = np.zeros_like(values)
        grad_values = np.where(takes_part & flows & (by_value != 0.0), grad * by_value, 0.0)
        grad_w = np.where(takes_part & valid & (by_confidence != 0.0), grad * by_confidence, 0.0)
    return grad_values, grad_w.sum(-1)
