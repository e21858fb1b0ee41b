# SPDX-License-Identifier: Apache-2.0
"""Rigid and similarity alignment of corresponding points."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tritool.reference._common import (
    BoolArray,
    FloatArray,
    as_float,
    sum_to_shape,
    times,
    transpose,
)


class RigidTransform(NamedTuple):
    """Rotation [..., 3, 3], translation [..., 3] and scale [...] of x -> scale R x + t."""

    rotation: FloatArray
    translation: FloatArray
    scale: FloatArray


def rigid_align(
    source: ArrayLike,
    target: ArrayLike,
    weights: ArrayLike | None = None,
    *,
    with_scale: bool = False,
    tau: float = 1e-13,
) -> RigidTransform:
    """Find the rotation, translation and scale that carry `source` closest to `target`.

    Minimises sum w |y - (s R x + t)|^2 with det R = 1 in closed form: S. Umeyama, "Least-Squares
    Estimation of Transformation Parameters Between Two Point Patterns", TPAMI 13(4), 1991,
    equations (40)-(43), with weights. With mx and my the weighted means of x and y and
        M = sum w (y - my)(x - mx)^T = U diag(s1, s2, s3) V^T,   d = det(U V^T) = +-1,
        R = U diag(1, 1, d) V^T,   s = tr(R^T M) / sum w |x - mx|^2,   t = my - s R mx.

    A point is absent if its weight is 0 or a coordinate of its source or target is NaN. The result
    is NaN if a present point has a weight that is negative or not finite or an infinite
    coordinate, or if the points do not determine a rotation: none or one of them, all in one place,
    on one line, or as close to a reflection by the one plane as by another: s2 + d s3 <= tau s1, or
    s1 <= tau sqrt(vx vy) with vx = sum w |x - mx|^2 and vy = sum w |y - my|^2, where M is nothing
    but rounding.

    Args:
        source: [..., N, 3], x.
        target: [..., N, 3], y, in any unit.
        weights: [..., N], w >= 0 (of squared distances); all 1 by default.
        with_scale: whether to estimate s; it is 1 otherwise.
        tau: relative threshold of degenerate point sets, for both comparisons; 1e-6 suits float32.

    Returns:
        The transform, all of it NaN where it is not determined.
    """
    fit = _fit(source, target, weights, with_scale, tau)
    return RigidTransform(
        np.where(fit.valid[..., None, None], fit.rotation, np.nan),
        np.where(fit.valid[..., None], fit.translation, np.nan),
        np.where(fit.valid, fit.scale, np.nan),
    )


def rigid_align_vjp(
    grads: tuple[ArrayLike | None, ArrayLike | None, ArrayLike | None],
    source: ArrayLike,
    target: ArrayLike,
    weights: ArrayLike | None = None,
    *,
    with_scale: bool = False,
    tau: float = 1e-13,
) -> tuple[FloatArray, FloatArray, FloatArray | None]:
    """Return the gradients of `rigid_align` to source, target and weights.

    R is the orthogonal factor of M (for d = 1 its polar factor), so R^T M = P is symmetric. A small
    turn dR = R [w]x keeps it so if [w]x P + P [w]x = R^T dM - dM^T R, that is if
        (tr(P) I - P) w = vee(R^T dM - dM^T R),   with vee([w]x) = w.
    The matrix on the left has the eigenvalues s2 + d s3, s1 + d s3 and s1 + s2: equal singular
    values do no harm. Hence, with a = vee(R^T G - G^T R) for the gradient G to R,
        (tr(P) I - P) b = a,   dL/dM = R [b]x.
    The trace of P changes by <R, dM>, as tr([w]x P) = 0; the means in M need no derivative, as the
    sums of w (x - mx) and w (y - my) are 0.

    Args:
        grads: gradients to rotation [..., 3, 3], translation [..., 3] and scale [...]; None is 0.
        source: as in `rigid_align`.
        target: as in `rigid_align`.
        weights: as in `rigid_align`.
        with_scale: as in `rigid_align`; without, the gradient to the scale goes nowhere.
        tau: as in `rigid_align`.

    Returns:
        grad_source, grad_target and grad_weights (None without weights) in the shapes of the
        inputs; exactly 0 to absent points and where the transform is NaN, even for NaN `grads`.
    """
    fit = _fit(source, target, weights, with_scale, tau)
    valid = fit.valid
    grad_rotation = _masked_grad(grads[0], valid, (3, 3))
    grad_translation = _masked_grad(grads[1], valid, (3,))
    grad_scale = _masked_grad(grads[2], valid, ())

    # t = my - s R mx
    scale = fit.scale[..., None]
    rotated_mean = times(fit.rotation, fit.source_mean)
    grad_target_mean = grad_translation
    grad_source_mean = -scale * times(transpose(fit.rotation), grad_translation)
    grad_rotation = grad_rotation - scale[..., None] * _outer(grad_translation, fit.source_mean)
    grad_scale = grad_scale - (grad_translation * rotated_mean).sum(-1)

    # R = R(M): in the basis of V, tr(P) I - P is diagonal.
    s1, s2, s3 = np.moveaxis(fit.singular_values, -1, 0)  # s3 with the sign d
    eigenvalues = np.where(valid[..., None], np.stack([s2 + s3, s1 + s3, s1 + s2], -1), 1.0)
    a = _vee(transpose(fit.rotation) @ grad_rotation)
    b = times(transpose(fit.vt), times(fit.vt, a) / eigenvalues)
    grad_m = fit.rotation @ _cross_matrix(b)

    # s = tr(R^T M) / variance
    grad_variance = np.zeros_like(grad_scale)
    if with_scale:
        per_variance = grad_scale / np.where(valid, fit.variance, 1.0)
        grad_m = grad_m + per_variance[..., None, None] * fit.rotation
        grad_variance = -per_variance * fit.scale

    # M = sum w y x^T and variance = sum w |x|^2, with x and y from the means on; the means.
    x, y, w = fit.source, fit.target, fit.weights[..., None]
    total = np.where(valid, fit.weights.sum(-1), 1.0)[..., None, None]
    m_x = times(grad_m[..., None, :, :], x)
    mean_terms = grad_source_mean[..., None, :] / total, grad_target_mean[..., None, :] / total
    twice_grad_variance = 2.0 * grad_variance[..., None, None]
    grad_x = w * (
        times(transpose(grad_m)[..., None, :, :], y) + twice_grad_variance * x + mean_terms[0]
    )
    grad_y = w * (m_x + mean_terms[1])
    grad_w = (y * (m_x + mean_terms[1]) + x * (0.5 * twice_grad_variance * x + mean_terms[0])).sum(
        -1
    )
    grad_w = np.ldexp(grad_w, -fit.exponent[..., None])

    used = fit.present & valid[..., None]
    return (
        sum_to_shape(np.where(used[..., None], grad_x, 0.0), np.shape(source)),
        sum_to_shape(np.where(used[..., None], grad_y, 0.0), np.shape(target)),
        None if weights is None else sum_to_shape(np.where(used, grad_w, 0.0), np.shape(weights)),
    )


class _Fit(NamedTuple):
    """An alignment with what its derivative needs; finite also where it is not valid."""

    source: FloatArray  # [..., N, 3], from the mean; 0 where absent
    target: FloatArray  # [..., N, 3], from the mean; 0 where absent
    weights: FloatArray  # [..., N], times 2^-exponent; 0 where absent
    exponent: NDArray[np.int32]  # [...]
    present: BoolArray  # [..., N]
    source_mean: FloatArray  # [..., 3]
    variance: FloatArray  # [...], sum w |x - mx|^2
    singular_values: FloatArray  # [..., 3], of M, the last with the sign d
    vt: FloatArray  # [..., 3, 3], V^T
    rotation: FloatArray  # [..., 3, 3]
    translation: FloatArray  # [..., 3]
    scale: FloatArray  # [...]
    valid: BoolArray  # [...]


def _fit(
    source: ArrayLike,
    target: ArrayLike,
    weights: ArrayLike | None,
    with_scale: bool,
    tau: float,
) -> _Fit:
    x, y = as_float(source), as_float(target)
    if x.ndim < 2 or x.shape[-1] != 3:
        raise ValueError(f"source must be [..., N, 3], got {x.shape}")
    count = x.shape[-2]
    w = np.ones(count) if weights is None else as_float(weights)
    if y.shape[-2:] != (count, 3):
        raise ValueError(f"target must be [..., N, 3] with N = {count}, got {y.shape}")
    if w.shape[-1:] != (count,):
        raise ValueError(f"weights must be [..., N] with N = {count}, got {w.shape}")
    batch = np.broadcast_shapes(x.shape[:-2], y.shape[:-2], w.shape[:-1])
    x = np.broadcast_to(x, (*batch, count, 3))
    y = np.broadcast_to(y, (*batch, count, 3))
    w = np.broadcast_to(w, (*batch, count))

    present = (w != 0.0) & ~np.isnan(x).any(-1) & ~np.isnan(y).any(-1)
    sound = np.isfinite(w) & (w > 0.0) & np.isfinite(x).all(-1) & np.isfinite(y).all(-1)
    usable = present.any(-1) & (sound | ~present).all(-1)
    taken = present & usable[..., None]
    # A common factor of the weights changes nothing; a power of two rounds nothing.
    w = np.where(taken, w, 0.0)
    exponent = np.frexp(w.max(-1, initial=0.0))[1]
    w = np.ldexp(w, -exponent[..., None])

    total = np.where(usable, w.sum(-1), 1.0)[..., None]
    x, source_mean = _centred(x, w, taken, total)
    y, target_mean = _centred(y, w, taken, total)
    with np.errstate(over="ignore", invalid="ignore"):
        m = transpose(w[..., None] * y) @ x
        variance = (w * (x * x).sum(-1)).sum(-1)
        target_variance = (w * (y * y).sum(-1)).sum(-1)
        most = np.sqrt(variance) * np.sqrt(target_variance)  # s1 + s2 + s3 are at most this
        finite = np.isfinite(m).all((-1, -2)) & np.isfinite(most)
    m = np.where(finite[..., None, None], m, 0.0)
    u, s, vt = np.linalg.svd(m)
    d = np.where(np.linalg.det(u) * np.linalg.det(vt) < 0.0, -1.0, 1.0)
    s = np.concatenate([s[..., :2], (d * s[..., 2])[..., None]], axis=-1)
    determined = (s[..., 1] + s[..., 2] > tau * s[..., 0]) & (s[..., 0] > tau * most)
    valid = usable & finite & determined

    signs = np.stack([np.ones_like(d), np.ones_like(d), d], axis=-1)
    rotation = (u * signs[..., None, :]) @ vt
    scale = np.ones(batch)
    if with_scale:
        scale = np.where(valid, s.sum(-1) / np.where(valid, variance, 1.0), 1.0)
    return _Fit(
        source=x,
        target=y,
        weights=w,
        exponent=exponent,
        present=present,
        source_mean=source_mean,
        variance=variance,
        singular_values=s,
        vt=vt,
        rotation=rotation,
        translation=target_mean - scale[..., None] * times(rotation, source_mean),
        scale=scale,
        valid=valid,
    )


def _centred(
    points: FloatArray, weights: FloatArray, taken: BoolArray, total: FloatArray
) -> tuple[FloatArray, FloatArray]:
    """Return the points from their weighted mean on, 0 where not taken, and the mean."""
    points = np.where(taken[..., None], points, 0.0)
    mean = (weights[..., None] * points).sum(-2) / total
    return np.where(taken[..., None], points - mean[..., None, :], 0.0), mean


def _masked_grad(grad: ArrayLike | None, valid: BoolArray, shape: tuple[int, ...]) -> FloatArray:
    """Broadcast an incoming gradient to [..., *shape], 0 where the result is not valid."""
    mask = np.reshape(valid, (*valid.shape, *(1,) * len(shape)))
    return np.where(mask, 0.0 if grad is None else as_float(grad), np.zeros(shape))


def _outer(a: FloatArray, b: FloatArray) -> FloatArray:
    return a[..., :, None] * b[..., None, :]


def _vee(matrices: FloatArray) -> FloatArray:
    """The vector a with [a]x = A - A^T."""
    skew = matrices - transpose(matrices)
    return np.stack([skew[..., 2, 1], skew[..., 0, 2], skew[..., 1, 0]], axis=-1)


def _cross_matrix(vectors: FloatArray) -> FloatArray:
    """[b]x, the matrix of the cross product with b."""
    matrices = np.zeros((*vectors.shape, 3))
    for i, j, k in ((0, 1, 2), (1, 2, 0), (2, 0, 1)):
        matrices[..., k, j] = vectors[..., i]
        matrices[..., j, k] = -vectors[..., i]
    return matrices
