# SPDX-License-Identifier: Apache-2.0
"""Triangulation that survives wrong detections, and refinement of points by reprojection error."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tritool.ops import _check
from tritool.ops._register import Function
from tritool.ops.composite._solve3 import solve3
from tritool.ops.project import project
from tritool.ops.triangulate import triangulate

__all__ = ["RobustTriangulation", "refine", "robust_triangulate"]

_LOSSES = ("huber", "cauchy", "squared")
# Numbers that one piece of the search may hold at a time: 64 MiB of float32.
_PIECE = 1 << 24
# Huber's scale, in thresholds, of the refinement at the end of `robust_triangulate`.
_SCALE = 0.5
# Least ratio of eigenvalues of the normal matrix at which the views determine a point: 1e-6 in
# singular values, as for `triangulate` in float32, and what float64 can tell of a matrix squared.
_DETERMINED = 1e-12
# Multiples of the Gauss-Newton step that are tried in every round of `refine`, and the factors of
# all steps after a round that did not help, or did.
_MULTIPLES = (1.0, 2.0, 4.0)
_SHORTER, _LONGER = 0.25, 4.0


class RobustTriangulation(NamedTuple):
    """Points, and the views that they were fitted to."""

    points: Tensor
    """`[..., 3]`, world units; NaN where no two views agree."""
    inliers: Tensor
    """`[..., C]`, bool."""


def robust_triangulate(
    points: Tensor,
    projections: Tensor,
    weights: Tensor | None = None,
    *,
    threshold: float,
    refine: bool = True,
    pairs: int | None = None,
    generator: torch.Generator | None = None,
) -> RobustTriangulation:
    r"""The 3D point that most views agree on, and which views those are.

    Every pair of views proposes a point. The proposal with the most inliers wins: views that have
    it in front of them and less than `threshold` pixels from their own point. Among equals, the
    least sum of the inliers' squared errors wins, as in Torr and Zisserman, "MLESAC" (CVIU 2000),
    then the first pair. The point is fitted to the inliers, they are sought again (and taken if
    there are not fewer), and it is fitted again: Chum, Matas and Kittler, "Locally Optimized
    RANSAC" (DAGM 2003). There are C (C - 1) / 2 pairs and no set of views is missed for chance.
    Batch dimensions broadcast.

    The choice of views has no gradient; the fit to them is differentiated as `triangulate` and
    `refine` are, in points, projections and weights. The result does not depend on the unit, the
    origin or the axes of the world. Memory for the search is bounded, whatever the batch, except
    under `torch.compile` and `torch.export`, which take it in one piece.

    Args:
        points: `[..., C, 2]`, pixels (x, y), one per view. NaN: the view is absent.
        projections: `[..., C, 3, 4]`, world to pixels; third row scaled so that it gives depth with
            positive sign.
        weights: `[..., C]`, at least 0. 0: the view is absent. They count in the fit, as for
            `triangulate`, and not in the choice of views. None: every view counts alike.
        threshold: Pixels, above 0.
        refine: End with five rounds of `refine`, with Huber's loss of scale `threshold / 2`; else
            the fit is `triangulate(..., mode="inhomogeneous", reweight=1)`.
        pairs: Try so many pairs, drawn at random for every point from those of its views that are
            present, no pair twice. None, or as many as there are: all pairs, and a result without
            chance.
        generator: To draw the pairs with, of the device of `points`; None: PyTorch's own.

    Returns:
        `RobustTriangulation(points [..., 3], inliers [..., C])`, points in the widest dtype of the
        arguments and at least float32. NaN, with zero gradient and no inliers, where no two views
        agree on a point: fewer than two are present, all disagree, or rays are parallel; also where
        a view that is present has a negative or non-finite weight, an infinite point or a
        non-finite projection.

    Raises:
        TypeError: An argument is not a floating-point tensor, or an option not of its type.
        ValueError: Shapes or devices do not fit, `threshold` is not above 0 or `pairs` below 1.

    Example:
        >>> P = torch.eye(3, 4).repeat(4, 1, 1)
        >>> P[:, :2, 3] = -torch.tensor([[0.0, 0], [1, 0], [0, 1], [1, 1]])
        >>> seen = 100 * project(torch.tensor([0.25, 0.5, 5.0]), P)
        >>> seen[1] += 30
        >>> P[:, :2] *= 100
        >>> found = robust_triangulate(seen, P, threshold=3.0)
        >>> found.inliers
        tensor([ True, False,  True,  True])
        >>> torch.allclose(found.points, torch.tensor([0.25, 0.5, 5.0]), atol=1e-4)
        True
    """
    points, projections, weights = _checked(points, projections, weights)
    limit = _check.positive_number("threshold", threshold)
    if pairs is not None:
        _check_count("pairs", pairs)
    if generator is not None and generator.device.type != points.device.type:
        raise ValueError(
            f"generator must be on the device of points, {points.device}, got {generator.device}"
        )
    with torch.no_grad():
        inliers = _consensus(points, projections, weights, limit, pairs, generator)
    chosen = inliers.to(points.dtype) if weights is None else torch.where(inliers, weights, 0)
    found = triangulate(points, projections, chosen, mode="inhomogeneous", reweight=1)
    if refine:
        found = _refined(found, points, projections, chosen, "huber", _SCALE * limit, 5)
    # Weights that differ by more than their dtype can tell may leave one view.
    return RobustTriangulation(found, inliers & ~found.detach().isnan().any(-1, keepdim=True))


def refine(
    points_3d: Tensor,
    points: Tensor,
    projections: Tensor,
    weights: Tensor | None = None,
    *,
    loss: str = "huber",
    scale: float,
    iterations: int = 5,
) -> Tensor:
    r"""Moves points to where their reprojection errors are least, from where they are.

    Minimises :math:`F(y) = \sum_c w_c^2 \, \rho(|\pi_c(y) - x_c|)` with :math:`\pi_c(y)` the pixel
    at which view c sees y and :math:`x_c` the one at which it should. Every round tries Newton's
    step and that of the reweighted least squares (Gauss-Newton) at several lengths, and takes the
    best if F falls; else the next steps are shorter. So F never rises. Weights enter squared, as in
    `triangulate`.

    With r the error, :math:`\rho` is :math:`r^2/2` (`"squared"`); the same up to the scale s and
    :math:`s (r - s/2)` beyond (`"huber"`); or :math:`s^2/2 \log(1 + r^2/s^2)` (`"cauchy"`).

    The gradient is that of the minimum itself: with :math:`\nabla F(y, \theta) = 0`,
    :math:`dy/d\theta = -(\nabla^2 F)^{-1} \, \partial_\theta \nabla F`, evaluated at the result. It
    is exact, to any order, where the iterations have converged, and does not depend on `points_3d`;
    before that it lacks terms of the order of the last step. Where the Hessian is not positive
    definite (possible with `"cauchy"` and far outliers) the Gauss-Newton matrix takes its place
    here too. Computed in float64 whatever comes in.

    Args:
        points_3d: `[..., 3]`, where to start, world units.
        points: `[..., C, 2]`, pixels (x, y), one per view. NaN: the view is absent.
        projections: `[..., C, 3, 4]`, world to pixels; third row scaled so that it gives depth with
            positive sign.
        weights: `[..., C]`, at least 0. 0: the view is absent. None: every view counts alike.
        loss: `"huber"`, `"cauchy"` or `"squared"`.
        scale: s, pixels, above 0; without meaning for `"squared"`.
        iterations: Rounds, at least 1. Two bring the linear solution to the minimum of `"squared"`,
            to rounding; five that of `"huber"` where most errors are within the scale. A scale far
            below the noise takes more, as does a start that is far off.

    Returns:
        `[..., 3]`, in the widest dtype of the arguments and at least float32. NaN, with zero
        gradient, where `points_3d` is not finite, fewer than two views are present, or one that is
        present has a negative or non-finite weight, an infinite point or a non-finite projection.
        The point as it came, with its gradient passed on to `points_3d` alone, where it is not in
        front of every view that is present, or where these do not determine a point at the end
        (one view seen twice, cameras in one place). With parallel rays it goes far away.

    Raises:
        TypeError: An argument is not a floating-point tensor, or an option not of its type.
        ValueError: Shapes or devices do not fit, `loss` is unknown, `scale` not above 0 or
            `iterations` below 1.

    Example:
        >>> P = torch.eye(3, 4).repeat(3, 1, 1)
        >>> P[:, :2, 3] = -torch.tensor([[0.0, 0], [1, 0], [0, 1]])
        >>> point = torch.tensor([0.25, 0.5, 5.0])
        >>> refined = refine(point + 0.1, project(point, P), P, scale=1.0)
        >>> torch.allclose(refined, point, atol=1e-5)
        True
    """
    points, projections, weights = _checked(points, projections, weights, points_3d)
    _check.one_of("loss", loss, _LOSSES)
    s = _check.positive_number("scale", scale)
    _check_count("iterations", iterations)
    start = points_3d.to(points.dtype).expand(*points.shape[:-2], 3)
    return _refined(start, points, projections, weights, loss, s, iterations)


# --- arguments -----------------------------------------------------------------------------------


def _checked(
    points: Tensor, projections: Tensor, weights: Tensor | None, points_3d: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Points and weights in the full batch, projections aligned to it, in one dtype."""
    tensors = {} if points_3d is None else {"points_3d": points_3d}
    tensors |= {"points": points, "projections": projections}
    if weights is not None:
        tensors["weights"] = weights
    _check.tensors(tensors)
    batches = {}
    if points_3d is not None:
        _check.trailing("points_3d", points_3d, "[..., 3]", (3,))
        batches["points_3d"] = points_3d.shape[:-1]
    _check.trailing("points", points, "[..., C, 2]", (None, 2))
    views = points.shape[-2]
    _check.trailing("projections", projections, "[..., C, 3, 4]", (views, 3, 4), of="points")
    batches |= {"points": points.shape[:-2], "projections": projections.shape[:-3]}
    if weights is not None:
        _check.trailing("weights", weights, "[..., C]", (views,), of="points")
        batches["weights"] = weights.shape[:-1]
    dtype = _check.geometry_dtype(tensors.values())
    batch = _check.broadcast_batch(batches)
    points = points.to(dtype).expand(*batch, views, 2)
    projections = _check.align_batch(projections.to(dtype), batch, 3)
    if weights is not None:
        weights = weights.to(dtype).expand(*batch, views)
    return points, projections, weights


def _check_count(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name} must be 1 or more, got {value}")


def _usable(points: Tensor, projections: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """Which views count `[..., C]`, and where all that are present are sound `[...]`."""
    present = ~points.isnan().any(-1)
    sound = points.isfinite().all(-1) & projections.isfinite().all(-1).all(-1)
    if weights is not None:
        present = present & (weights != 0)  # NaN is present, and not sound
        sound = sound & weights.isfinite() & (weights > 0)
    return present & sound, (sound | ~present).all(-1)


# --- the choice of views -------------------------------------------------------------------------


def _consensus(
    points: Tensor,
    projections: Tensor,
    weights: Tensor | None,
    threshold: float,
    pairs: int | None,
    generator: torch.Generator | None,
) -> Tensor:
    """The inliers `[..., C]` of every point, of which there are none or at least two."""
    batch, views = points.shape[:-2], points.shape[-2]
    usable, sound = _usable(points, projections, weights)
    usable = usable & sound[..., None]
    if views < 2:
        return torch.zeros_like(usable)
    points = torch.where(usable[..., None], points, torch.nan).reshape(-1, views, 2)
    usable = usable.reshape(-1, views)
    shared = all(size == 1 for size in projections.shape[:-3])
    own = projections.reshape(-1, views, 3, 4)
    if shared:
        rows = None
    else:  # which of the matrices belong to a point: repeats indices in place of matrices
        rows = torch.arange(own.shape[0], device=own.device).reshape(projections.shape[:-3])
        rows = rows.expand(batch).reshape(-1)

    def piece(part: slice) -> Tensor:
        cameras = own if rows is None else own[rows[part]]
        return _search(points[part], cameras, usable[part], threshold, pairs, generator)

    every = math.comb(views, 2)
    tried = every if pairs is None else min(pairs, every)
    size = max(1, _PIECE // (tried * (8 * views + 32)))
    # A loop would fix the batch size of a compiled graph.
    if torch.compiler.is_compiling() or points.shape[0] <= size:
        inliers = piece(slice(None))
    else:
        pieces = [piece(slice(at, at + size)) for at in range(0, points.shape[0], size)]
        inliers = torch.cat(pieces)
    return inliers.reshape(*batch, views)


def _search(
    points: Tensor,
    projections: Tensor,
    usable: Tensor,
    threshold: float,
    pairs: int | None,
    generator: torch.Generator | None,
) -> Tensor:
    """The inliers `[N, C]` of points `[N, C, 2]`, projections `[N or 1, C, 3, 4]`."""
    views = points.shape[1]
    index = torch.triu_indices(views, views, 1, device=points.device).mT  # [pairs, 2], i < j
    if pairs is None or pairs >= index.shape[0]:
        pixels, cameras = points[:, index], projections[:, index]
    else:
        index = index[_draw(usable[:, index].all(-1), pairs, generator)]  # [N, pairs, 2]
        number = torch.arange(points.shape[0], device=points.device)[:, None, None]
        pixels = points[number, index]
        shared = projections.shape[0] == 1
        cameras = projections[0, index] if shared else projections[number, index]
    proposals = triangulate(pixels, cameras, mode="inhomogeneous")  # [N, pairs, 3]
    inliers, errors = _inliers(proposals, points[:, None], projections[:, None], threshold)
    counts = inliers.sum(-1)
    # Among proposals with equally many inliers, each of the others adds the same threshold squared.
    errors = torch.where(inliers, errors, 0).sum(-1)
    most = counts.amax(-1, keepdim=True)
    best = torch.where(counts == most, errors, torch.inf).argmin(-1, keepdim=True)
    first = inliers.gather(1, best[..., None].expand(-1, 1, views)).squeeze(1)

    fitted = triangulate(
        points, projections, first.to(points.dtype), mode="inhomogeneous", reweight=1
    )
    second, _ = _inliers(fitted, points, projections, threshold)
    not_fewer = second.sum(-1, keepdim=True) >= first.sum(-1, keepdim=True)
    found = torch.where(not_fewer, second, first)
    return found & (found.sum(-1, keepdim=True) >= 2)


def _draw(usable: Tensor, count: int, generator: torch.Generator | None) -> Tensor:
    """Indices `[N, count]` of pairs, none twice, those of usable views `[N, pairs]` first."""
    order = torch.rand(usable.shape, generator=generator, device=usable.device)
    return (order + usable.to(order.dtype)).topk(count, -1, sorted=False).indices


def _inliers(
    found: Tensor, points: Tensor, projections: Tensor, threshold: float
) -> tuple[Tensor, Tensor]:
    """Which views see points where they should `[..., C]`, and the squares of the errors."""
    errors = (project(found, projections) - points).square().sum(-1)
    return errors < threshold**2, errors  # NaN, behind the camera too, is not


# --- refinement ----------------------------------------------------------------------------------


def _refined(
    start: Tensor,
    points: Tensor,
    projections: Tensor,
    weights: Tensor | None,
    loss: str,
    scale: float,
    iterations: int,
) -> Tensor:
    """See `refine`; the arguments fit and have one batch."""
    dtype = start.dtype
    counts, sound = _usable(points, projections, weights)
    valid = sound & (counts.sum(-1) >= 2) & start.isfinite().all(-1)
    # What does not count goes on as 0, or it would reach a gradient as 0 * NaN.
    start = torch.where(valid[..., None], start, 0)
    points = torch.where(counts[..., None], points, 0)
    finite = projections.isfinite().all(-1, keepdim=True).all(-2, keepdim=True)
    projections = torch.where(finite, projections, 0)
    if weights is None:
        factors = counts.double()
    else:
        factors = torch.where(counts, weights, 0).double()
        # A common factor moves nothing; this one keeps squares in range.
        largest = factors.detach().amax(-1, keepdim=True) if factors.shape[-1] else factors
        factors = factors / torch.where(largest > 0, largest, 1)
    found, _ = _Refine.apply(
        start.double(), points.double(), projections.double(), factors, loss, scale, iterations
    )
    return torch.where(valid[..., None], found.to(dtype), torch.nan)


class _Refine(Function):
    """`refine` in float64, for finite arguments.

    `_Refine.apply(start, points, projections, weights, loss, scale, iterations)`: start
    `[batch, 3]`, points `[batch, C, 2]` and weights `[batch, C]` in the full batch, weight 0 for
    what does not count, projections `[batch, C, 3, 4]` with as many dimensions, of size 1 where
    they broadcast. Returns the points `[batch, 3]` and whether they were refined `[batch]`.

    The backward is made of differentiable functions of its inputs and the result, so that
    derivatives of every order are those of the minimum.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        start: Tensor, points: Tensor, projections: Tensor, weights: Tensor,
        loss: str, scale: float, iterations: int,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Every round tries several steps and takes the one that lowers the cost most, if any."""
        at = start
        view = _look(at, points, projections, weights, loss, scale)
        movable = view.ahead
        reach = torch.ones_like(start[..., :1])
        for _ in range(iterations):
            steps = reach * _steps(view, projections)
            tried = at + steps
            then = _look(tried, points, projections, weights, loss, scale)
            rise = _rise(view, then, tried - at, weights, loss, scale)
            rise = torch.where(then.ahead & (rise < 0), rise, 0)  # NaN is not below 0
            least, best = rise.min(0, keepdim=True)
            better = least[0] < 0
            chosen = tried.gather(0, best[..., None].expand(1, *at.shape))[0]
            at = torch.where(better[..., None], chosen, at)
            view = _look(at, points, projections, weights, loss, scale)
            reach = torch.where(better[..., None], (_LONGER * reach).clamp_max(1), _SHORTER * reach)
        refined = movable & _definite(_curvature(view, projections)[1])
        return torch.where(refined[..., None], at, start), refined

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        """Keeps the inputs but the start, and the result."""
        _, points, projections, weights, ctx.loss, ctx.scale, _ = inputs
        ctx.save_for_backward(points, projections, weights, *output)
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        """By the implicit function theorem: docs/ops/robust_triangulate.md, section 5."""
        points, projections, weights, found, refined = ctx.saved_tensors
        passed = torch.where(refined[..., None], 0, grad)
        grad = torch.where(refined[..., None], grad, 0)
        view = _look(found, points, projections, weights, ctx.loss, ctx.scale)
        hessian, normal = _curvature(view, projections)
        matrix = torch.where(_definite(hessian)[..., None, None], hessian, normal)
        eye = torch.eye(3, dtype=matrix.dtype, device=matrix.device)
        z = -solve3(torch.where(refined[..., None, None], matrix, eye), grad)

        # The gradient of <z, grad F> = sum w^2 phi(|e|^2) e.a to what the error e = pi - x and its
        # change a along z are made of: x, w and P, with q = P (y, 1), b = P (z, 0), pi = q12 / q3
        # and a = (b12 - b3 pi) / q3.
        slope, bend = _loss_of(view.error.square().sum(-1), ctx.loss, ctx.scale)
        b = (projections[..., :3] * z[..., None, None, :]).sum(-1)
        a = (b[..., :2] - b[..., 2:] * view.pixel) / view.depth[..., None]
        along = (view.error * a).sum(-1)
        squares = weights.square()
        grad_a = (squares * slope)[..., None] * view.error
        grad_error = (squares * slope)[..., None] * a
        grad_error = grad_error + (2 * squares * bend * along)[..., None] * view.error
        grad_weights = 2 * weights * slope * along
        grad_pixel = grad_error - (b[..., 2:] / view.depth[..., None]) * grad_a
        grad_depth = -(grad_pixel * view.pixel).sum(-1) - (grad_a * a).sum(-1)
        grad_q = torch.cat([grad_pixel, grad_depth[..., None]], -1) / view.depth[..., None]
        grad_b3 = -(grad_a * view.pixel).sum(-1, keepdim=True)
        grad_b = torch.cat([grad_a, grad_b3], -1) / view.depth[..., None]
        at = torch.cat([found, torch.ones_like(found[..., :1])], -1)[..., None, None, :]
        along_z = torch.cat([z, torch.zeros_like(z[..., :1])], -1)[..., None, None, :]
        grad_projections = grad_q[..., None] * at + grad_b[..., None] * along_z
        wanted = ctx.needs_input_grad
        return (
            passed if wanted[0] else None,
            -grad_error if wanted[1] else None,
            grad_projections.sum_to_size(projections.shape) if wanted[2] else None,
            grad_weights if wanted[3] else None,
            None, None, None,
        )  # fmt: skip


class _View(NamedTuple):
    """What the views see of the points, and how much that counts."""

    pixel: Tensor  # [..., C, 2]
    depth: Tensor  # [..., C], 1 for views that do not count
    error: Tensor  # [..., C, 2], pixel - point, 0 for views that do not count
    jacobian: Tensor  # [..., C, 2, 3], of the pixel to the point
    slope: Tensor  # [..., C], w^2 rho'(r) / r
    bend: Tensor  # [..., C], w^2 times the derivative of rho'(r) / r to r^2
    ahead: Tensor  # [...], whether the point is in front of every view that counts


def _look(
    at: Tensor, points: Tensor, projections: Tensor, weights: Tensor, loss: str, scale: float
) -> _View:
    # Not a matmul here and below: on a GPU that would be a call for each small matrix.
    q = (projections[..., :3] * at[..., None, None, :]).sum(-1) + projections[..., 3]
    counts = weights > 0
    front = counts & (q[..., 2] > 0)
    depth = torch.where(front, q[..., 2], 1)
    pixel = torch.where(front[..., None], q[..., :2], 0) / depth[..., None]
    error = torch.where(front[..., None], pixel - points, 0)
    rows = projections[..., :2, :3] - pixel[..., None] * projections[..., 2:, :3]
    jacobian = rows / depth[..., None, None]
    slope, bend = _loss_of(error.square().sum(-1), loss, scale)
    squares = weights.square()
    ahead = (front | ~counts).all(-1)
    return _View(pixel, depth, error, jacobian, squares * slope, squares * bend, ahead)


def _loss_of(r2: Tensor, loss: str, scale: float) -> tuple[Tensor, Tensor]:
    """rho'(r) / r and the derivative of that to r^2, as functions of r^2."""
    if loss == "squared":
        return torch.ones_like(r2), torch.zeros_like(r2)
    s2 = scale * scale
    if loss == "cauchy":
        slope = 1 / (1 + r2 / s2)
        return slope, -slope.square() / s2
    outer = r2 > s2
    r = torch.where(outer, r2, s2).sqrt()  # no root of 0, whose derivative is infinite
    slope = scale / r
    return slope, torch.where(outer, -slope / (2 * r * r), 0)


def _rise(
    view: _View, then: _View, step: Tensor, weights: Tensor, loss: str, scale: float
) -> Tensor:
    """By how much a step raises the cost, `[...]`.

    Not the difference of two costs: its rounding hides steps below 1e-6 mm, and derivatives by
    differences would be noise. A pixel moves by exactly J step (depth before) / (depth after).
    """
    moved = (view.jacobian * step[..., None, None, :]).sum(-1)
    moved = moved * (view.depth / then.depth)[..., None]
    change = (moved * (2 * view.error + moved)).sum(-1)  # of r^2
    before, after = view.error.square().sum(-1), then.error.square().sum(-1)
    s2 = scale * scale
    if loss == "squared":
        rise = change / 2
    elif loss == "cauchy":
        rise = s2 / 2 * torch.log1p(change / (s2 + before))
    else:
        inner = (after.clamp_max(s2) - before.clamp_max(s2)) / 2
        r, new_r = before.clamp_min(s2).sqrt(), after.clamp_min(s2).sqrt()
        across = inner + scale * (new_r - r)
        outer = scale * change / (r + new_r)
        both_inner, both_outer = (before <= s2) & (after <= s2), (before > s2) & (after > s2)
        rise = torch.where(both_inner, change / 2, torch.where(both_outer, outer, across))
    return (weights.square() * rise).sum(-1)


def _slope(view: _View) -> Tensor:
    """The gradient of the cost to the point, `[..., 3]`."""
    pull = view.slope[..., None] * view.error
    return (pull[..., None] * view.jacobian).sum((-3, -2))


def _steps(view: _View, projections: Tensor) -> Tensor:
    """Steps to try, `[S, ..., 3]`.

    Newton's converges fastest but may lead astray. That of the reweighted least squares
    (Gauss-Newton) leads down, but is short where many views are beyond the scale: it is also tried
    at multiples of its length.
    """
    hessian, normal = _curvature(view, projections)
    slope = _slope(view)
    newton = torch.where(_definite(hessian)[..., None, None], hessian, normal)
    newton_step, step = -solve3(newton, slope), -solve3(normal, slope)
    return torch.stack([newton_step, *(multiple * step for multiple in _MULTIPLES)])


def _curvature(view: _View, projections: Tensor) -> tuple[Tensor, Tensor]:
    """The Hessian of the cost, and its Gauss-Newton part, `[..., 3, 3]`."""
    jacobian = view.jacobian
    scaled = view.slope[..., None, None] * jacobian
    normal = (scaled[..., :, None] * jacobian[..., None, :]).sum((-4, -3))
    u = (view.error[..., None] * jacobian).sum(-2)  # [..., C, 3]
    bent = ((2 * view.bend)[..., None] * u)[..., :, None] * u[..., None, :]
    # The second derivative of a pixel: -(J p3^T + p3 J^T) / depth, with p3 the third row.
    ahead = (view.slope / view.depth)[..., None] * u
    turned = ahead[..., :, None] * projections[..., 2, None, :3]
    second = (bent - turned - turned.mT).sum(-3)
    return normal + second, normal


def _definite(matrix: Tensor) -> Tensor:
    """Whether symmetric matrices are positive definite, the least eigenvalue not next to 0.

    By Sylvester's minors; the determinant over the sum of the principal minors is between the least
    eigenvalue and a third of it.
    """
    xx, yy, zz = matrix.diagonal(dim1=-2, dim2=-1).unbind(-1)
    xy, xz, yz = matrix[..., 0, 1], matrix[..., 0, 2], matrix[..., 1, 2]
    in_xy, in_xz, in_yz = xx * yy - xy * xy, xx * zz - xz * xz, yy * zz - yz * yz
    determinant = xx * in_yz - xy * (xy * zz - yz * xz) + xz * (xy * yz - yy * xz)
    trace, minors = xx + yy + zz, in_xy + in_xz + in_yz
    return (xx > 0) & (in_xy > 0) & (determinant > _DETERMINED * trace * minors)


def _select(mask: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """`new` where the mask `[...]` is set, for tensors with further dimensions."""
    return torch.where(mask[(..., *(None,) * (new.dim() - mask.dim()))], new, old)
