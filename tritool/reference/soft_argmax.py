# SPDX-License-Identifier: Apache-2.0
"""Soft-argmax: equations (1)-(2) in the image, (13)-(14) in the volume, and softmax moments."""

from __future__ import annotations

from typing import NamedTuple, TypeAlias, overload

import numpy as np
from numpy.typing import ArrayLike

from tritool.reference._common import (
    BoolArray,
    FloatArray,
    as_float,
    sum_to_shape,
    times,
    transpose,
)

Grid: TypeAlias = tuple[ArrayLike, ArrayLike]


class Moments(NamedTuple):
    """Mean [..., d], covariance [..., d, d] and log-partition [...] of a softmax over a map."""

    mean: FloatArray
    covariance: FloatArray
    log_partition: FloatArray


def soft_argmax2d(heatmaps: ArrayLike, *, inverse_temperature: float = 1.0) -> FloatArray:
    """Return the centre of mass of the softmax of each heat map, equations (1)-(2).

    Args:
        heatmaps: [..., H, W]. -inf masks a pixel; NaN or +inf spoils its own map only.
        inverse_temperature: alpha of (1).

    Returns:
        [..., 2], (x, y) in heat-map pixels; NaN where every pixel is masked or one is NaN or +inf.
    """
    return _softmax(heatmaps, 2, inverse_temperature).mean


def soft_argmax2d_vjp(
    grad: ArrayLike, heatmaps: ArrayLike, *, inverse_temperature: float = 1.0
) -> FloatArray:
    """Return the gradient to the heat maps of `soft_argmax2d` for the gradient `grad` [..., 2]."""
    return _mean_vjp(as_float(grad), _softmax(heatmaps, 2, inverse_temperature))


def soft_argmax3d(
    volumes: ArrayLike, *, inverse_temperature: float = 1.0, grid: Grid | None = None
) -> FloatArray:
    """Return the centre of mass of the softmax of each volume, equations (13)-(14).

    Args:
        volumes: [..., X, Y, Z], with a batched grid [B, ..., X, Y, Z]. Masking as in 2D.
        inverse_temperature: alpha; (13) has 1.
        grid: (origin, axes) of shapes ([3], [3, 3]) or ([B, 3], [B, 3, 3]); voxel (i, j, k) is
            centred at `origin + i axes[0] + j axes[1] + k axes[2]`.

    Returns:
        [..., 3], the index (i, j, k), or with a grid the position in its unit.
    """
    index = _softmax(volumes, 3, inverse_temperature).mean
    if grid is None:
        return index
    origin, axes = _expand_grid(grid, index.ndim)
    return origin + times(transpose(axes), index)


@overload
def soft_argmax3d_vjp(
    grad: ArrayLike, volumes: ArrayLike, *, inverse_temperature: float = 1.0, grid: None = None
) -> FloatArray: ...


@overload
def soft_argmax3d_vjp(
    grad: ArrayLike, volumes: ArrayLike, *, inverse_temperature: float = 1.0, grid: Grid
) -> tuple[FloatArray, FloatArray, FloatArray]: ...


def soft_argmax3d_vjp(
    grad: ArrayLike,
    volumes: ArrayLike,
    *,
    inverse_temperature: float = 1.0,
    grid: Grid | None = None,
) -> FloatArray | tuple[FloatArray, FloatArray, FloatArray]:
    """Return the gradient of `soft_argmax3d` to the volumes, with a grid also to origin and axes.

    Args:
        grad: [..., 3], the gradient to the result.
        volumes: as in `soft_argmax3d`.
        inverse_temperature: as in `soft_argmax3d`.
        grid: as in `soft_argmax3d`.

    Returns:
        grad_volumes, or (grad_volumes, grad_origin, grad_axes), in the shapes of the inputs.
    """
    softmax = _softmax(volumes, 3, inverse_temperature)
    grad = np.broadcast_to(as_float(grad), softmax.mean.shape)
    if grid is None:
        return _mean_vjp(grad, softmax)

    origin, axes = _expand_grid(grid, grad.ndim)
    valid = softmax.valid[..., None]
    grad_origin = np.where(valid, grad, 0.0)
    grad_axes = np.where(valid, softmax.mean, 0.0)[..., :, None] * grad_origin[..., None, :]
    return (
        _mean_vjp(times(axes, grad), softmax),
        sum_to_shape(grad_origin, origin.shape).reshape(np.shape(grid[0])),
        sum_to_shape(grad_axes, axes.shape).reshape(np.shape(grid[1])),
    )


def soft_argmax25d(
    heatmaps: ArrayLike, depth_maps: ArrayLike, *, inverse_temperature: float = 1.0
) -> FloatArray:
    """Return the mean pixel and the mean depth of each map under the softmax of its heat map.

    The pixel is that of equations (1)-(2); the depth is sum p_i D_i with the same p, as in
    U. Iqbal, P. Molchanov, T. Breuel, J. Gall and J. Kautz, "Hand Pose Estimation via Latent 2.5D
    Heatmap Regression", ECCV 2018.

    Args:
        heatmaps: [..., H, W]. Masking as in `soft_argmax2d`.
        depth_maps: [..., H, W], in any unit. What a pixel with p = 0 holds does not count.
        inverse_temperature: alpha of (1).

    Returns:
        [..., 3], (x, y) in heat-map pixels and the depth in its unit; all NaN where `soft_argmax2d`
        is; the depth alone is NaN where that of a pixel with p > 0 is NaN or infinite.
    """
    softmax, depths = _softmax_and_depths(heatmaps, depth_maps, inverse_temperature)
    mean_depth = _mean_depth(softmax, depths)
    return np.concatenate([softmax.mean, mean_depth[..., None]], axis=-1)


def soft_argmax25d_vjp(
    grad: ArrayLike,
    heatmaps: ArrayLike,
    depth_maps: ArrayLike,
    *,
    inverse_temperature: float = 1.0,
) -> tuple[FloatArray, FloatArray]:
    """Return the gradients of `soft_argmax25d` to heat maps and depth maps, in their shapes.

    With m the mean pixel and E the mean depth, dL/dl_i = alpha p_i (g_xy.(r_i - m) + g_z (D_i - E))
    and dL/dD_i = p_i g_z. Where E alone is NaN, g_z counts as 0.

    Args:
        grad: [..., 3], the gradient to the result.
        heatmaps: as in `soft_argmax25d`.
        depth_maps: as in `soft_argmax25d`.
        inverse_temperature: as in `soft_argmax25d`.

    Returns:
        grad_heatmaps and grad_depth_maps; exactly 0 where p is 0 or the map has no mean.
    """
    softmax, depths = _softmax_and_depths(heatmaps, depth_maps, inverse_temperature)
    mean_depth = _mean_depth(softmax, depths)
    grad = np.broadcast_to(as_float(grad), (*softmax.mean.shape[:-1], 3))
    known = ~np.isnan(mean_depth)
    grad_depth = np.where(known, grad[..., 2], 0.0)[..., None]

    offsets = softmax.coordinates - softmax.mean[..., None, :]
    counts = (softmax.p > 0.0) & known[..., None]
    with np.errstate(invalid="ignore"):
        depth_offsets = np.where(counts, depths - mean_depth[..., None], 0.0)
    grad_log_p = times(offsets, grad[..., :2]) + grad_depth * depth_offsets
    grad_heatmaps = _logits_vjp(grad_log_p, softmax)
    grad_depths = np.where(softmax.p > 0.0, softmax.p * grad_depth, 0.0).reshape(softmax.shape)
    return (
        sum_to_shape(grad_heatmaps, np.shape(heatmaps)),
        sum_to_shape(grad_depths, np.shape(depth_maps)),
    )


def softmax_moments2d(logits: ArrayLike, *, inverse_temperature: float = 1.0) -> Moments:
    """Return mean, covariance and log-partition of the softmax of each map.

    Args:
        logits: [..., H, W]; masking as in `soft_argmax2d`.
        inverse_temperature: alpha of (1).

    Returns:
        Mean [..., 2] in pixels (x, y), covariance [..., 2, 2] in squared pixels and
        log sum exp(alpha l) [...]: -inf where every pixel is masked, NaN in a map with NaN or +inf.
    """
    softmax = _softmax(logits, 2, inverse_temperature)
    return Moments(softmax.mean, _covariance(softmax), softmax.log_partition)


def softmax_moments2d_vjp(
    grad_mean: ArrayLike,
    grad_covariance: ArrayLike,
    grad_log_partition: ArrayLike,
    logits: ArrayLike,
    *,
    inverse_temperature: float = 1.0,
) -> FloatArray:
    """Return the gradient of `softmax_moments2d` to the logits; the incoming ones broadcast."""
    softmax = _softmax(logits, 2, inverse_temperature)
    return _moments_vjp(grad_mean, grad_covariance, grad_log_partition, softmax)


def softmax_moments3d(
    logits: ArrayLike, *, inverse_temperature: float = 1.0, grid: Grid | None = None
) -> Moments:
    """Return mean, covariance and log-partition of the softmax of each volume.

    Args:
        logits: [..., X, Y, Z]; masking as in `soft_argmax2d`.
        inverse_temperature: alpha; (13) has 1.
        grid: as in `soft_argmax3d`.

    Returns:
        Mean [..., 3] and covariance [..., 3, 3] in index coordinates, or with a grid in world
        coordinates; log sum exp(alpha l) [...], which no grid changes.
    """
    softmax = _softmax(logits, 3, inverse_temperature)
    mean, covariance = softmax.mean, _covariance(softmax)
    if grid is not None:
        origin, axes = _expand_grid(grid, mean.ndim)
        mean = origin + times(transpose(axes), mean)
        covariance = transpose(axes) @ covariance @ axes
    return Moments(mean, covariance, softmax.log_partition)


def softmax_moments3d_vjp(
    grad_mean: ArrayLike,
    grad_covariance: ArrayLike,
    grad_log_partition: ArrayLike,
    logits: ArrayLike,
    *,
    inverse_temperature: float = 1.0,
) -> FloatArray:
    """Return the gradient of `softmax_moments3d` (without grid) to the logits."""
    softmax = _softmax(logits, 3, inverse_temperature)
    return _moments_vjp(grad_mean, grad_covariance, grad_log_partition, softmax)


class _Softmax(NamedTuple):
    """Softmax of maps with N elements each; what is not valid is NaN."""

    shape: tuple[int, ...]  # of the maps, with their d axes
    coordinates: FloatArray  # [N, d]: (x, y) of pixels, (i, j, k) of voxels
    p: FloatArray  # [..., N]
    mean: FloatArray  # [..., d]
    log_partition: FloatArray  # [...]
    valid: BoolArray  # [...]: some element is not masked, none is NaN or +inf
    slope: FloatArray  # [..., N], alpha p; 0 where masked or not valid


def _softmax(maps: ArrayLike, dims: int, inverse_temperature: float) -> _Softmax:
    """Equations (1) and (13), and the sums over r in (2) and (14)."""
    maps = as_float(maps)
    if maps.ndim < dims:
        wanted = "heatmaps must be [..., H, W]" if dims == 2 else "volumes must be [..., X, Y, Z]"
        raise ValueError(f"{wanted}, got {maps.shape}")
    index = np.indices(maps.shape[-dims:], dtype=np.float64).reshape(dims, -1).T
    coordinates = index[:, ::-1] if dims == 2 else index  # x runs along the last axis of an image
    logits = maps.reshape(*maps.shape[:-dims], len(index))

    masked = logits == -np.inf
    spoilt = (np.isnan(logits) | (logits == np.inf)).any(-1, keepdims=True)
    with np.errstate(all="ignore"):
        # A masked element has no share whatever alpha is, so -inf is never multiplied.
        scaled = np.where(masked, -np.inf, inverse_temperature * np.where(masked, 0.0, logits))
        scaled = np.where(spoilt, np.nan, scaled)
        peak = scaled.max(-1, keepdims=True, initial=-np.inf)
        peak = np.where(np.isfinite(peak), peak, 0.0)
        exponentials = np.exp(scaled - peak)
        partition = exponentials.sum(-1, keepdims=True)
        valid = np.isfinite(partition) & (partition > 0.0)
        p = np.where(valid, exponentials / partition, np.nan)
        return _Softmax(
            shape=maps.shape,
            coordinates=coordinates,
            p=p,
            mean=np.where(valid, p @ coordinates, np.nan),
            log_partition=(peak + np.log(partition))[..., 0],
            valid=valid[..., 0],
            slope=np.where(valid & ~masked, inverse_temperature * p, 0.0),
        )


def _softmax_and_depths(
    heatmaps: ArrayLike, depth_maps: ArrayLike, inverse_temperature: float
) -> tuple[_Softmax, FloatArray]:
    """Broadcast maps and depths against each other; the depths come back as [..., N]."""
    maps, depths = as_float(heatmaps), as_float(depth_maps)
    if maps.ndim < 2:
        raise ValueError(f"heatmaps must be [..., H, W], got {maps.shape}")
    if depths.shape[-2:] != maps.shape[-2:]:
        raise ValueError(
            f"depth_maps must be [..., H, W] with H, W = {maps.shape[-2:]}, got {depths.shape}"
        )
    maps, depths = np.broadcast_arrays(maps, depths)
    softmax = _softmax(maps, 2, inverse_temperature)
    return softmax, depths.reshape(softmax.p.shape)


def _mean_depth(softmax: _Softmax, depths: FloatArray) -> FloatArray:
    """Sum p_i D_i over the pixels with p_i > 0; NaN where it is not finite or there is no mean."""
    with np.errstate(invalid="ignore", over="ignore"):
        mean = np.where(softmax.p > 0.0, softmax.p * depths, 0.0).sum(-1)
    return np.where(softmax.valid & np.isfinite(mean), mean, np.nan)


def _covariance(softmax: _Softmax) -> FloatArray:
    """Sum p_i (c_i - m)(c_i - m)^T: about the mean, where nothing cancels."""
    offsets = softmax.coordinates - softmax.mean[..., None, :]
    covariance = transpose(softmax.p[..., None] * offsets) @ offsets
    return np.where(softmax.valid[..., None, None], covariance, np.nan)


def _mean_vjp(grad: FloatArray, softmax: _Softmax) -> FloatArray:
    """With m = sum p_i c_i: dL/dl_i = alpha p_i g.(c_i - m)."""
    offsets = softmax.coordinates - softmax.mean[..., None, :]
    return _logits_vjp(times(offsets, np.broadcast_to(grad, softmax.mean.shape)), softmax)


def _moments_vjp(
    grad_mean: ArrayLike, grad_covariance: ArrayLike, grad_log: ArrayLike, softmax: _Softmax
) -> FloatArray:
    """With d_i = c_i - m: dL/dl_i = alpha p_i (g.d_i + d_i^T G d_i - <G, C> + g_log)."""
    offsets = softmax.coordinates - softmax.mean[..., None, :]
    covariance = _covariance(softmax)
    g = np.broadcast_to(as_float(grad_mean), softmax.mean.shape)
    big_g = np.broadcast_to(as_float(grad_covariance), covariance.shape)
    g_log = np.broadcast_to(as_float(grad_log), softmax.valid.shape)
    return _logits_vjp(
        times(offsets, g)
        + ((offsets @ big_g) * offsets).sum(-1)
        + (g_log - (big_g * covariance).sum((-1, -2)))[..., None],
        softmax,
    )


def _logits_vjp(grad_log_p: FloatArray, softmax: _Softmax) -> FloatArray:
    """Multiply by alpha p_i, giving exactly 0 to what is masked or not valid."""
    used = softmax.slope != 0.0
    return np.where(used, softmax.slope * grad_log_p, 0.0).reshape(softmax.shape)


def _expand_grid(grid: Grid, ndim: int) -> tuple[FloatArray, FloatArray]:
    """Give origin and axes the rank of points [B, ..., 3] and of matrices [B, ..., 3, 3]."""
    origin, axes = as_float(grid[0]), as_float(grid[1])
    if origin.shape[-1:] != (3,) or axes.shape[-2:] != (3, 3):
        raise ValueError(
            f"grid must be (origin [B, 3], axes [B, 3, 3]), got {origin.shape} and {axes.shape}"
        )
    origin = origin.reshape(*origin.shape[:-1], *(1,) * (ndim - origin.ndim), 3)
    axes = axes.reshape(*axes.shape[:-2], *(1,) * (ndim + 1 - axes.ndim), 3, 3)
    return origin, axes
