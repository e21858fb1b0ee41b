# SPDX-License-Identifier: Apache-2.0
"""Triangulation: equations (3)-(4)."""

from __future__ import annotations

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
    transpose,
)

Mode: TypeAlias = Literal["homogeneous", "inhomogeneous"]


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
    grad_point = np.where(valid, as_float(grad), 0.0)
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
            used[..., None], grad_depth[..., None] * homogeneous(before.point)[..., None, :], 0.0
        )
        third_rows = np.where(used[..., None], before.projections[..., 2, :3], 0.0)
        grad_point = (grad_depth[..., None] * third_rows).sum(-2)

    from_points, from_projections, from_weights = _dlt_vjp(grad_point, solutions[0])
    grad_weights = np.where(valid & last.present, grad_weights + from_weights, 0.0)
    return (
        sum_to_shape(grad_points + from_points, np.shape(points)),
        sum_to_shape(grad_projections + from_projections, np.shape(projections)),
        None if weights is None else sum_to_shape(grad_weights, np.shape(weights)),
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
    x, p = as_float(points), as_float(projections)
    if x.ndim < 2 or x.shape[-1] != 2:
        raise ValueError(f"points must be [..., C, 2], got {x.shape}")
    views = x.shape[-2]
    w = np.ones(views) if weights is None else as_float(weights)
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
            y = -times(transpose(vt), times(transpose(u), a4) / s)
        # Two Newton steps on A3^T r = lambda y with r = A (y, 1), the gradient of the ratio set to
        # 0. Lambda, the ratio itself, is stationary there and counts as constant in each step. The
        # residuals are updated, not formed anew from the rounded y: a view that outweighs the
        # others has residuals far below that rounding, and the derivative needs them.
        residuals = times(a3, y) + a4
        for _ in range(2):
            eigenvalue = _ratio(residuals, y, kappa)
            defect = eigenvalue[..., None] * y - times(transpose(a3), residuals)
            step = _solve_shifted((s, vt), eigenvalue, defect)
            y = y + step
            residuals = residuals + times(a3, step)
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
            defect = solution.eigenvalue[..., None] * q3 - grad - times(transpose(a3), a3_q3)
            step = _solve_shifted(solution.svd, solution.eigenvalue, defect)
            q3, a3_q3 = q3 + step, a3_q3 + times(a3, step)

        mu = (q3 * y).sum(-1) / (solution.kappa + (y * y).sum(-1))
        mu = mu[..., None, None]
        p = homogeneous(y)
        r, a3_q3 = solution.residuals.reshape(pairs), a3_q3.reshape(pairs)
        q = np.concatenate([q3, np.zeros_like(q3[..., :1])], axis=-1)
        grad_rows = w[..., None] * (
            (a3_q3 - 2.0 * mu * r)[..., None] * p[..., None, None, :]
            + r[..., None] * q[..., None, None, :]
        )  # [..., C, 2, 4]
        grad_points = times(grad_rows, solution.projections[..., 2, :])
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
    coefficients = times(vt, right) / (s * s - eigenvalue[..., None])
    return times(transpose(vt), coefficients)


def _depth(solution: _Solution) -> FloatArray:
    """P3.(y, 1) of each view, [..., C]: the depth, where P = K [R | t]."""
    return times(solution.projections[..., 2, :], homogeneous(solution.point))
