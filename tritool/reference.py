# SPDX-License-Identifier: Apache-2.0
"""The operations of tritool in NumPy float64: what they compute, before how they compute it fast.

Every function here is written after the formulas of K. Iskakov, E. Burkov, V. Lempitsky and
Y. Malkov, "Learnable Triangulation of Human Pose", ICCV 2019 (equation numbers refer to it), and is
followed by its vector-Jacobian product `<name>_vjp`, derived by hand. The module depends on NumPy
alone and shares neither code nor method with the compiled kernels: their agreement is evidence.

Conventions: all inputs are converted to float64; batch dimensions lead and broadcast; a pixel is
(x, y) with (0, 0) the centre of the first; `projections [..., C, 3, 4]` map world to pixels.
Invalid data are NaN or weight 0; a result that cannot be computed is NaN, and its gradient is
exactly 0 whatever gradient comes in. Values never raise, shapes do.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, TypeAlias, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

FloatArray: TypeAlias = NDArray[np.float64]
BoolArray: TypeAlias = NDArray[np.bool_]
Grid: TypeAlias = tuple[ArrayLike, ArrayLike]
Mode: TypeAlias = Literal["homogeneous", "inhomogeneous"]

__all__ = [
    "Moments",
    "project",
    "project_vjp",
    "soft_argmax2d",
    "soft_argmax2d_vjp",
    "soft_argmax3d",
    "soft_argmax3d_vjp",
    "softmax_moments2d",
    "softmax_moments2d_vjp",
    "softmax_moments3d",
    "softmax_moments3d_vjp",
    "triangulate",
    "triangulate_vjp",
]


class Moments(NamedTuple):
    """Mean [..., d], covariance [..., d, d] and log-partition [...] of a softmax over a map."""

    mean: FloatArray
    covariance: FloatArray
    log_partition: FloatArray


# --- soft-argmax: equations (1)-(2) in the image, (13)-(14) in the volume ------------------------


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
    return _mean_vjp(_as_float(grad), _softmax(heatmaps, 2, inverse_temperature))


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
    return origin + _times(_transpose(axes), index)


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
    grad = np.broadcast_to(_as_float(grad), softmax.mean.shape)
    if grid is None:
        return _mean_vjp(grad, softmax)

    origin, axes = _expand_grid(grid, grad.ndim)
    valid = softmax.valid[..., None]
    grad_origin = np.where(valid, grad, 0.0)
    grad_axes = np.where(valid, softmax.mean, 0.0)[..., :, None] * grad_origin[..., None, :]
    return (
        _mean_vjp(_times(axes, grad), softmax),
        _sum_to_shape(grad_origin, origin.shape).reshape(np.shape(grid[0])),
        _sum_to_shape(grad_axes, axes.shape).reshape(np.shape(grid[1])),
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
        mean = origin + _times(_transpose(axes), mean)
        covariance = _transpose(axes) @ covariance @ axes
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
    maps = _as_float(maps)
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


def _covariance(softmax: _Softmax) -> FloatArray:
    """Sum p_i (c_i - m)(c_i - m)^T: about the mean, where nothing cancels."""
    offsets = softmax.coordinates - softmax.mean[..., None, :]
    covariance = _transpose(softmax.p[..., None] * offsets) @ offsets
    return np.where(softmax.valid[..., None, None], covariance, np.nan)


def _mean_vjp(grad: FloatArray, softmax: _Softmax) -> FloatArray:
    """With m = sum p_i c_i: dL/dl_i = alpha p_i g.(c_i - m)."""
    offsets = softmax.coordinates - softmax.mean[..., None, :]
    return _logits_vjp(_times(offsets, np.broadcast_to(grad, softmax.mean.shape)), softmax)


def _moments_vjp(
    grad_mean: ArrayLike, grad_covariance: ArrayLike, grad_log: ArrayLike, softmax: _Softmax
) -> FloatArray:
    """With d_i = c_i - m: dL/dl_i = alpha p_i (g.d_i + d_i^T G d_i - <G, C> + g_log)."""
    offsets = softmax.coordinates - softmax.mean[..., None, :]
    covariance = _covariance(softmax)
    g = np.broadcast_to(_as_float(grad_mean), softmax.mean.shape)
    big_g = np.broadcast_to(_as_float(grad_covariance), covariance.shape)
    g_log = np.broadcast_to(_as_float(grad_log), softmax.valid.shape)
    return _logits_vjp(
        _times(offsets, g)
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
    origin, axes = _as_float(grid[0]), _as_float(grid[1])
    if origin.shape[-1:] != (3,) or axes.shape[-2:] != (3, 3):
        raise ValueError(
            f"grid must be (origin [B, 3], axes [B, 3, 3]), got {origin.shape} and {axes.shape}"
        )
    origin = origin.reshape(*origin.shape[:-1], *(1,) * (ndim - origin.ndim), 3)
    axes = axes.reshape(*axes.shape[:-2], *(1,) * (ndim + 1 - axes.ndim), 3, 3)
    return origin, axes


# --- triangulation: equations (3)-(4) ------------------------------------------------------------


def triangulate(
    points: ArrayLike,
    projections: ArrayLike,
    weights: ArrayLike | None = None,
    *,
    mode: Mode = "homogeneous",
    reweight: int = 0,
    tau: float = 1e-13,
) -> FloatArray:
    """Intersect the rays of C views by the weighted linear method (DLT), equations (3)-(4).

    View c gives two rows of A, w (u P3 - P1) and w (v P3 - P2), with P1..P3 the rows of its
    projection. "homogeneous" minimises |A p| over |p| = 1 and returns y with p ~ (y, 1), that is
    the minimum of |A (y, 1)|^2 / (1 + |y|^2): the paper's. "inhomogeneous" minimises |A (y, 1)|^2.

    A view is absent if its weight is 0 or its point is NaN. The result is NaN if fewer than two
    views are present, if a present view has a weight that is negative or not finite or any other
    input that is not finite, or if the views do not determine a point: with s1 >= s2 >= s3 the
    singular values of the first three columns and lambda the minimum of the homogeneous problem,
    valid means s3 > tau s1 and s3^2 - lambda > tau s3^2.

    Accuracy: LAPACK's SVD is stable for a matrix as a whole, while the columns of A differ by 1e3
    and more (in millimetres), so Newton steps follow it. Against exact arithmetic the error of y,
    relative to the distance of cameras and point from the origin, is then at most a few times
    2e-16 (s1 / s3) s3^2 / (s3^2 - lambda), and mostly far less: 1e-12 mm for four cameras around a
    room, 1e-9 mm for two that are 100 mm apart at 50 m.

    Args:
        points: [..., C, 2], pixels.
        projections: [..., C, 3, 4], world to pixels.
        weights: [..., C], >= 0; all 1 by default. They multiply rows, so errors weigh as w^2.
        mode: "homogeneous" or "inhomogeneous".
        reweight: number of rounds in which the weights are divided by the views' depths P3.(y, 1)
            of the solution before, which turns the algebraic error into one in pixels.
        tau: the threshold of validity; 1e-13 suits float64, 1e-6 is what float32 can tell.

    Returns:
        [..., 3], in world units.
    """
    solutions = _reweighted_dlt(points, projections, weights, mode, reweight, tau)
    return solutions[-1].point


def triangulate_vjp(
    grad: ArrayLike,
    points: ArrayLike,
    projections: ArrayLike,
    weights: ArrayLike | None = None,
    *,
    mode: Mode = "homogeneous",
    reweight: int = 0,
    tau: float = 1e-13,
) -> tuple[FloatArray, FloatArray, FloatArray | None]:
    """Return the gradients of `triangulate` to points, projections and weights.

    Args:
        grad: [..., 3], the gradient to the result.
        points: as in `triangulate`.
        projections: as in `triangulate`.
        weights: as in `triangulate`.
        mode: as in `triangulate`.
        reweight: as in `triangulate`; the rounds are differentiated through.
        tau: as in `triangulate`.

    Returns:
        grad_points, grad_projections and grad_weights (None without weights) in the shapes of the
        inputs; exactly 0 from invalid points and to absent views, even for a NaN `grad`.
    """
    solutions = _reweighted_dlt(points, projections, weights, mode, reweight, tau)
    last = solutions[-1]
    valid = last.valid[..., None]
    grad_point = np.where(valid, _as_float(grad), 0.0)
    grad_projections = np.zeros(last.projections.shape)
    grad_points = np.zeros(last.points.shape)
    grad_weights = np.zeros(last.weights.shape)

    for before, solution in zip(solutions[-2::-1], solutions[:0:-1], strict=True):
        # w' = w / |d| with the depth d = P3.(y, 1) of the round before.
        from_points, from_projections, from_weights = _dlt_vjp(grad_point, solution)
        grad_points += from_points
        grad_projections += from_projections
        used = valid & before.present
        depth = np.where(used, _depth(before), 1.0)
        grad_weights += np.where(used, from_weights / np.abs(depth), 0.0)
        grad_depth = np.where(used, -from_weights * solution.weights / depth, 0.0)
        grad_projections[..., 2, :] += np.where(
            used[..., None], grad_depth[..., None] * _homogeneous(before.point)[..., None, :], 0.0
        )
        third_rows = np.where(used[..., None], before.projections[..., 2, :3], 0.0)
        grad_point = (grad_depth[..., None] * third_rows).sum(-2)

    from_points, from_projections, from_weights = _dlt_vjp(grad_point, solutions[0])
    grad_weights = np.where(valid & last.present, grad_weights + from_weights, 0.0)
    return (
        _sum_to_shape(grad_points + from_points, np.shape(points)),
        _sum_to_shape(grad_projections + from_projections, np.shape(projections)),
        None if weights is None else _sum_to_shape(grad_weights, np.shape(weights)),
    )


class _Solution(NamedTuple):
    """One weighted DLT, with what its derivative needs; batch dimensions broadcast."""

    points: FloatArray  # [..., C, 2]
    projections: FloatArray  # [..., C, 3, 4]
    weights: FloatArray  # [..., C]
    present: BoolArray  # [..., C]
    scaled_weights: FloatArray  # [..., C], weights 2^-exponent; 0 where absent
    exponent: NDArray[np.int32]  # [...]
    a3: FloatArray  # [..., 2C, 3], the first three columns of A; rows of absent views are 0
    svd: tuple[FloatArray, FloatArray]  # of a3: singular values [..., 3], V^T [..., 3, 3]
    residuals: FloatArray  # [..., 2C], A (y, 1)
    eigenvalue: FloatArray  # [...], lambda; 0 in the inhomogeneous mode
    kappa: float  # the constraint is kappa + |y|^2: 1, or infinity in the inhomogeneous mode
    point: FloatArray  # [..., 3]
    valid: BoolArray  # [...]


def _reweighted_dlt(
    points: ArrayLike,
    projections: ArrayLike,
    weights: ArrayLike | None,
    mode: Mode,
    reweight: int,
    tau: float,
) -> list[_Solution]:
    """Solve once, and `reweight` times more with the weights divided by the latest depths."""
    x, p = _as_float(points), _as_float(projections)
    if x.ndim < 2 or x.shape[-1] != 2:
        raise ValueError(f"points must be [..., C, 2], got {x.shape}")
    views = x.shape[-2]
    w = np.ones(views) if weights is None else _as_float(weights)
    if p.shape[-3:] != (views, 3, 4):
        raise ValueError(f"projections must be [..., C, 3, 4] with C = {views}, got {p.shape}")
    if w.shape[-1:] != (views,):
        raise ValueError(f"weights must be [..., C] with C = {views}, got {w.shape}")
    if mode not in ("homogeneous", "inhomogeneous"):
        raise ValueError(f"mode must be 'homogeneous' or 'inhomogeneous', got {mode!r}")
    if reweight < 0:
        raise ValueError(f"reweight must be 0 or more rounds, got {reweight}")

    batch = np.broadcast_shapes(x.shape[:-2], p.shape[:-3], w.shape[:-1])
    x = np.broadcast_to(x, (*batch, views, 2))
    p = np.broadcast_to(p, (*batch, views, 3, 4))
    w = np.broadcast_to(w, (*batch, views))
    kappa = 1.0 if mode == "homogeneous" else np.inf
    solutions = [_dlt(x, p, w, kappa, tau)]
    for _ in range(reweight):
        latest = solutions[-1]
        with np.errstate(all="ignore"):  # an invalid point's NaN depths keep it NaN
            w_round = np.where(latest.present, w / np.abs(_depth(latest)), 0.0)
        solutions.append(_dlt(x, p, w_round, kappa, tau))
    return solutions


def _dlt(
    points: FloatArray, projections: FloatArray, weights: FloatArray, kappa: float, tau: float
) -> _Solution:
    """Equations (3)-(4): the point with the least |A (y, 1)|^2 / (kappa + |y|^2)."""
    present = (weights != 0.0) & ~np.isnan(points).any(-1)
    with np.errstate(all="ignore"):
        rows = points[..., None] * projections[..., 2:, :] - projections[..., :2, :]
    rows = np.where(present[..., None, None], rows, 0.0)
    sound = np.isfinite(rows).all((-1, -2)) & np.isfinite(projections).all((-1, -2))
    sound &= np.isfinite(weights) & (weights > 0.0)
    usable = (present.sum(-1) >= 2) & (sound | ~present).all(-1)

    # A common factor of the weights does not move the minimum: a power of two keeps w^2 in range
    # without rounding anything.
    taken = np.where(present & usable[..., None], weights, 0.0)
    exponent = np.frexp(taken.max(-1, initial=0.0))[1]
    taken = np.ldexp(taken, -exponent[..., None])

    batch, views = weights.shape[:-1], weights.shape[-1]
    finite_rows = np.where(usable[..., None, None, None], rows, 0.0)
    a = np.zeros((*batch, max(2 * views, 4), 4))  # at least 4 rows, so that V below is complete
    a[..., : 2 * views, :] = (taken[..., None, None] * finite_rows).reshape(*batch, 2 * views, 4)
    a3, a4 = a[..., :3], a[..., 3]
    u, s, vt = np.linalg.svd(a3, full_matrices=False)

    with np.errstate(all="ignore"):
        if kappa == 1.0:
            p = np.linalg.svd(a, full_matrices=False)[2][..., 3, :]  # of the least singular value
            y = p[..., :3] / p[..., 3:]
        else:
            y = -_times(_transpose(vt), _times(_transpose(u), a4) / s)
        # Two Newton steps on A3^T r = lambda y with r = A (y, 1), the gradient of the ratio set to
        # 0. Lambda, the ratio itself, is stationary there and counts as constant in each step. The
        # residuals are updated, not formed anew from the rounded y: a view that outweighs the
        # others has residuals far below that rounding, and the derivative needs them.
        residuals = _times(a3, y) + a4
        for _ in range(2):
            eigenvalue = _ratio(residuals, y, kappa)
            defect = eigenvalue[..., None] * y - _times(_transpose(a3), residuals)
            step = _solve_shifted((s, vt), eigenvalue, defect)
            y = y + step
            residuals = residuals + _times(a3, step)
        eigenvalue = _ratio(residuals, y, kappa)
        gap = s[..., 2] ** 2 - eigenvalue
        valid = usable & (s[..., 2] > tau * s[..., 0]) & (gap > tau * s[..., 2] ** 2)
        valid &= np.isfinite(y).all(-1)
    return _Solution(
        points=points,
        projections=projections,
        weights=weights,
        present=present,
        scaled_weights=taken,
        exponent=exponent,
        a3=a3[..., : 2 * views, :],
        svd=(s, vt),
        residuals=residuals[..., : 2 * views],
        eigenvalue=eigenvalue,
        kappa=kappa,
        point=np.where(valid[..., None], y, np.nan),
        valid=valid,
    )


def _dlt_vjp(grad: FloatArray, solution: _Solution) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Return the gradients of `_dlt` to points, projections and weights, not summed over batches.

    With B = A3^T A3, p = (y, 1), the residuals r = A p and
        q3 = -(B - lambda)^-1 grad,   mu = q3.y / (kappa + |y|^2),
    first-order perturbation of the eigenvector gives, for the row a of A with residual r,
        dL/da = (a3.q3 - 2 mu r) p + r (q3, 0).
    """
    y, present = solution.point, solution.present
    grad = np.where(solution.valid[..., None], grad, 0.0)
    y = np.where(solution.valid[..., None], y, 0.0)
    w = solution.scaled_weights[..., None]  # [..., C, 1]
    a3 = solution.a3
    pairs = (*w.shape[:-1], 2)  # [..., C, 2]: the rows of A by view

    with np.errstate(all="ignore"):
        # From 0, the first step solves and the others correct. A3 q3 is updated like the
        # residuals, and for the same reason.
        q3, a3_q3 = np.zeros_like(y), np.zeros_like(solution.residuals)
        for _ in range(3):
            defect = solution.eigenvalue[..., None] * q3 - grad - _times(_transpose(a3), a3_q3)
            step = _solve_shifted(solution.svd, solution.eigenvalue, defect)
            q3, a3_q3 = q3 + step, a3_q3 + _times(a3, step)

        mu = (q3 * y).sum(-1) / (solution.kappa + (y * y).sum(-1))
        mu = mu[..., None, None]
        p = _homogeneous(y)
        r, a3_q3 = solution.residuals.reshape(pairs), a3_q3.reshape(pairs)
        q = np.concatenate([q3, np.zeros_like(q3[..., :1])], axis=-1)
        grad_rows = w[..., None] * (
            (a3_q3 - 2.0 * mu * r)[..., None] * p[..., None, None, :]
            + r[..., None] * q[..., None, None, :]
        )  # [..., C, 2, 4]
        grad_points = _times(grad_rows, solution.projections[..., 2, :])
        grad_projections = np.concatenate(
            [-grad_rows, (solution.points[..., None] * grad_rows).sum(-2, keepdims=True)], axis=-2
        )
        # The weights enter as w^2: no gradient where one is 0 (here: beside the largest, by far).
        grad_weights = np.where(w > 0.0, 2.0 * r / w * (a3_q3 - mu * r), 0.0).sum(-1)
        grad_weights = np.ldexp(grad_weights, -solution.exponent[..., None])

    used = present & solution.valid[..., None]
    return (
        np.where(used[..., None], grad_points, 0.0),
        np.where(used[..., None, None], grad_projections, 0.0),
        np.where(used, grad_weights, 0.0),
    )


def _ratio(residuals: FloatArray, y: FloatArray, kappa: float) -> FloatArray:
    """|A (y, 1)|^2 / (kappa + |y|^2): the eigenvalue, once y is the minimum."""
    ratio: FloatArray = (residuals * residuals).sum(-1) / (kappa + (y * y).sum(-1))
    return ratio


def _solve_shifted(
    svd: tuple[FloatArray, FloatArray], eigenvalue: FloatArray, right: FloatArray
) -> FloatArray:
    """(A3^T A3 - lambda)^-1 right, by the singular values and right vectors of A3."""
    s, vt = svd
    coefficients = _times(vt, right) / (s * s - eigenvalue[..., None])
    return _times(_transpose(vt), coefficients)


def _depth(solution: _Solution) -> FloatArray:
    """P3.(y, 1) of each view, [..., C]: the depth, where P = K [R | t]."""
    return _times(solution.projections[..., 2, :], _homogeneous(solution.point))


# --- projection ----------------------------------------------------------------------------------


def project(points: ArrayLike, projections: ArrayLike) -> FloatArray:
    """Project world points into every view.

    Args:
        points: [..., 3], world units.
        projections: [..., C, 3, 4], world to pixels.

    Returns:
        [..., C, 2], pixels (x, y); NaN in a view where the point is not in front of the camera
        (depth <= 0) or anything is not finite.
    """
    return _project(_as_float(points), _as_float(projections))[0]


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
    y, p = _as_float(points), _as_float(projections)
    pixels, depth = _project(y, p)
    valid = np.isfinite(pixels[..., :1])  # a pixel is NaN as a whole
    grad = np.where(valid, _as_float(grad), 0.0)
    pixels = np.where(valid, pixels, 0.0)
    depth = np.where(valid, depth[..., None], 1.0)
    # (u, v) = (x1, x2) / x3, so dL/dx = (gu, gv, -(gu u + gv v)) / x3 with x = P (y, 1).
    grad_x = np.concatenate([grad, -(grad * pixels).sum(-1, keepdims=True)], axis=-1) / depth
    finite_p = np.where(valid[..., None], p, 0.0)
    finite_y = np.where(valid, _homogeneous(y)[..., None, :], 0.0)
    grad_points = np.einsum("...cr,...crk->...k", grad_x, finite_p[..., :3])
    grad_projections = grad_x[..., :, None] * finite_y[..., None, :]
    return (
        _sum_to_shape(grad_points, np.shape(points)),
        _sum_to_shape(grad_projections, np.shape(projections)),
    )


def _project(y: FloatArray, projections: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Return the pixels [..., C, 2] and the depths [..., C]."""
    if y.shape[-1:] != (3,):
        raise ValueError(f"points must be [..., 3], got {y.shape}")
    if projections.ndim < 3 or projections.shape[-2:] != (3, 4):
        raise ValueError(f"projections must be [..., C, 3, 4], got {projections.shape}")
    with np.errstate(all="ignore"):
        x = _times(projections, _homogeneous(y)[..., None, :])
        depth = x[..., 2]
        pixels = x[..., :2] / depth[..., None]
        valid = np.isfinite(x).all(-1) & np.isfinite(pixels).all(-1) & (depth > 0.0)
    return np.where(valid[..., None], pixels, np.nan), depth


# --- shared --------------------------------------------------------------------------------------


def _as_float(array: ArrayLike) -> FloatArray:
    return np.asarray(array, dtype=np.float64)


def _homogeneous(points: FloatArray) -> FloatArray:
    """[..., 3] -> [..., 4] with a 1 appended."""
    return np.concatenate([points, np.ones_like(points[..., :1])], axis=-1)


def _times(matrices: FloatArray, vectors: FloatArray) -> FloatArray:
    """Matrix [..., m, n] times vector [..., n]; the batch dimensions broadcast."""
    product: FloatArray = (matrices @ vectors[..., None])[..., 0]
    return product


def _transpose(matrices: FloatArray) -> FloatArray:
    return matrices.swapaxes(-1, -2)


def _sum_to_shape(array: FloatArray, shape: tuple[int, ...]) -> FloatArray:
    """Undo a broadcast: sum over the dimensions that `shape` lacks or has as 1."""
    array = array.sum(axis=tuple(range(array.ndim - len(shape))))
    ones = tuple(i for i, n in enumerate(shape) if n == 1)
    summed: FloatArray = array.sum(axis=ones, keepdims=True)
    return summed
