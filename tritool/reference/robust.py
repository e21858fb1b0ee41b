# SPDX-License-Identifier: Apache-2.0
"""Triangulation by the views that agree, and refinement by reprojection error."""

from __future__ import annotations

from itertools import combinations
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import ArrayLike

from tritool.reference._common import BoolArray, FloatArray, as_float
from tritool.reference.project import project
from tritool.reference.triangulate import triangulate

Loss: TypeAlias = Literal["huber", "cauchy", "squared"]


class RobustTriangulation(NamedTuple):
    """Points [..., 3], and which views [..., C] they were fitted to."""

    points: FloatArray
    inliers: BoolArray


def robust_triangulate(
    points: ArrayLike,
    projections: ArrayLike,
    weights: ArrayLike | None = None,
    *,
    threshold: float,
    refine: bool = True,
) -> RobustTriangulation:
    """Triangulate every point from the views that agree on it.

    Every pair of views proposes its (inhomogeneous) linear solution. A view is an inlier of a
    proposal that it sees, from the front, less than `threshold` pixels from its own point. The
    proposal with the most inliers wins; among equals the one with the least sum of squares of their
    errors; among equals the first, in the order (0, 1), (0, 2), ..., (1, 2), .... The point is
    fitted to the inliers of the winner, with one round of reweighting by depth; the inliers of the
    fit take their place if there are not fewer; the point is fitted once more, weights included,
    and refined with Huber's loss of scale `threshold / 2`.

    A view is absent as for `triangulate`. The result is NaN, without inliers, if no proposal has
    two inliers, or a present view has a negative or non-finite weight or other input that is not
    finite.

    Args:
        points: [..., C, 2], pixels.
        projections: [..., C, 3, 4], world to pixels.
        weights: [..., C], >= 0; all 1 by default. They count in the last fit and the refinement.
        threshold: pixels.
        refine: whether to refine at the end.

    Returns:
        The points and their inliers.
    """
    x, p, w = _broadcast(points, projections, weights)
    batch, views = x.shape[:-2], x.shape[-2]
    found = np.full((*batch, 3), np.nan)
    inliers = np.zeros((*batch, views), dtype=bool)
    for index in np.ndindex(*batch):
        usable = _usable(x[index], p[index], w[index])
        if usable is None:
            continue
        best: tuple[int, float] = (1, np.inf)  # the inliers and errors to surpass
        for i, j in combinations(np.flatnonzero(usable), 2):
            pair = [i, j]
            proposal = triangulate(x[index][pair], p[index][pair], mode="inhomogeneous")
            near, squares = _near(proposal, x[index], p[index], usable, threshold)
            score = (int(near.sum()), float(squares[near].sum()))
            if score[0] > best[0] or (score[0] == best[0] and score[1] < best[1]):
                best, inliers[index] = score, near
        if not inliers[index].any():
            continue
        fit = triangulate(
            x[index], p[index], 1.0 * inliers[index], mode="inhomogeneous", reweight=1
        )
        near, _ = _near(fit, x[index], p[index], usable, threshold)
        if near.sum() >= inliers[index].sum():
            inliers[index] = near
        taken = np.where(inliers[index], w[index], 0.0)
        fit = triangulate(x[index], p[index], taken, mode="inhomogeneous", reweight=1)
        if refine:
            fit = _refine_point(fit, x[index], p[index], taken, "huber", threshold / 2, 200)
        found[index] = fit
        inliers[index] &= bool(np.isfinite(fit).all())
    return RobustTriangulation(found, inliers)


def refine(
    points_3d: ArrayLike,
    points: ArrayLike,
    projections: ArrayLike,
    weights: ArrayLike | None = None,
    *,
    loss: Loss = "huber",
    scale: float,
    iterations: int = 200,
) -> FloatArray:
    """Find the points with the least sum of w^2 rho(r), r the reprojection errors in pixels.

    rho is r^2 / 2 ("squared"); the same up to the scale s and s (r - s / 2) beyond ("huber"); or
    s^2 / 2 log(1 + r^2 / s^2) ("cauchy"). The method is that of reweighted least squares: every
    step solves for the squares of errors times rho'(r) / r, and is halved until the sum does not
    rise.

    The result is NaN if the start is not finite, fewer than two views are present, or one that is
    has a negative or non-finite weight or other input that is not finite. It is the start if that
    is not in front of every view that is present, or if these do not determine a point: the least
    singular value of the Jacobian is not above 1e-6 of the greatest.

    Args:
        points_3d: [..., 3], where to start.
        points: [..., C, 2], pixels; NaN: the view is absent.
        projections: [..., C, 3, 4], world to pixels.
        weights: [..., C], >= 0; all 1 by default; 0: the view is absent.
        loss: "huber", "cauchy" or "squared".
        scale: s, pixels.
        iterations: steps; the method converges linearly, so 200 reach rounding in most cases.

    Returns:
        [..., 3], in world units.
    """
    x, p, w = _broadcast(points, projections, weights)
    start = as_float(points_3d)
    batch = np.broadcast_shapes(start.shape[:-1], x.shape[:-2])
    views = x.shape[-2]
    start = np.broadcast_to(start, (*batch, 3))
    x = np.broadcast_to(x, (*batch, views, 2))
    p = np.broadcast_to(p, (*batch, views, 3, 4))
    w = np.broadcast_to(w, (*batch, views))
    found = np.empty((*batch, 3))
    for index in np.ndindex(*batch):
        found[index] = _refine_point(
            start[index], x[index], p[index], w[index], loss, scale, iterations
        )
    return found


def _broadcast(
    points: ArrayLike, projections: ArrayLike, weights: ArrayLike | None
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Check the shapes and give everything the whole batch."""
    x, p = as_float(points), as_float(projections)
    if x.ndim < 2 or x.shape[-1] != 2:
        raise ValueError(f"points must be [..., C, 2], got {x.shape}")
    views = x.shape[-2]
    w = np.ones(views) if weights is None else as_float(weights)
    if p.shape[-3:] != (views, 3, 4):
        raise ValueError(f"projections must be [..., C, 3, 4] with C = {views}, got {p.shape}")
    if w.shape[-1:] != (views,):
        raise ValueError(f"weights must be [..., C] with C = {views}, got {w.shape}")
    batch = np.broadcast_shapes(x.shape[:-2], p.shape[:-3], w.shape[:-1])
    return (
        np.broadcast_to(x, (*batch, views, 2)),
        np.broadcast_to(p, (*batch, views, 3, 4)),
        np.broadcast_to(w, (*batch, views)),
    )


def _usable(x: FloatArray, p: FloatArray, w: FloatArray) -> BoolArray | None:
    """Return which views are present, or None if one of them makes the point NaN."""
    present: BoolArray = (w != 0.0) & ~np.isnan(x).any(-1)
    sound = np.isfinite(x).all(-1) & np.isfinite(p).all((-1, -2)) & np.isfinite(w) & (w > 0.0)
    return None if (present & ~sound).any() else present


def _near(
    y: FloatArray, x: FloatArray, p: FloatArray, usable: BoolArray, threshold: float
) -> tuple[BoolArray, FloatArray]:
    """Return which usable views see y where they should, and the squares of the errors."""
    squares = np.where(usable, ((project(y, p) - x) ** 2).sum(-1), np.nan)
    return squares < threshold**2, squares


def _refine_point(
    start: FloatArray,
    x: FloatArray,
    p: FloatArray,
    w: FloatArray,
    loss: Loss,
    scale: float,
    iterations: int,
) -> FloatArray:
    usable = _usable(x, p, w)
    if usable is None or usable.sum() < 2 or not np.isfinite(start).all():
        return np.full(3, np.nan)
    x, p, w = x[usable], p[usable], w[usable] / w[usable].max()

    def cost_at(y: FloatArray) -> float:
        r = np.linalg.norm(project(y, p) - x, axis=-1)  # NaN behind a camera
        return float((w**2 * _rho(r, loss, scale)).sum())

    def linearised(y: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Return the weighted errors [2C] and their Jacobian [2C, 3]."""
        pixel = project(y, p)
        depth = p[:, 2, :3] @ y + p[:, 2, 3]
        jacobian = (p[:, :2, :3] - pixel[:, :, None] * p[:, 2:, :3]) / depth[:, None, None]
        error = pixel - x
        r = np.linalg.norm(error, axis=-1)
        factor = w * np.sqrt(_influence(r, loss, scale))
        weighted = (factor[:, None, None] * jacobian).reshape(-1, 3)
        return (factor[:, None] * error).reshape(-1), weighted

    y, cost = start, cost_at(start)
    if not np.isfinite(cost):
        return start
    for _ in range(iterations):
        error, jacobian = linearised(y)
        step = -np.linalg.lstsq(jacobian, error, rcond=None)[0]
        for _ in range(30):
            then = cost_at(y + step)
            if then <= cost * (1 + 1e-12):  # a rise by rounding does not count; NaN is none
                y, cost = y + step, then
                break
            step = step / 2
    s = np.linalg.svd(linearised(y)[1], compute_uv=False)
    return y if s[2] > 1e-6 * s[0] else start


def _rho(r: FloatArray, loss: Loss, scale: float) -> FloatArray:
    if loss == "squared":
        return r**2 / 2
    if loss == "huber":
        return np.where(r <= scale, r**2 / 2, scale * (r - scale / 2))
    if loss == "cauchy":
        return scale**2 / 2 * np.log1p((r / scale) ** 2)
    raise ValueError(f"loss must be 'huber', 'cauchy' or 'squared', got {loss!r}")


def _influence(r: FloatArray, loss: Loss, scale: float) -> FloatArray:
    """Return rho'(r) / r."""
    if loss == "squared":
        return np.ones_like(r)
    if loss == "huber":
        return scale / np.maximum(r, scale)
    return 1 / (1 + (r / scale) ** 2)
