# SPDX-License-Identifier: Apache-2.0
"""`ops.robust_triangulate`, and what it shares with `ops.refine`: laws, batches, bad input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import rigs
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation
from torch import Tensor

from tritool import ops, reference
from tritool.ops import robust


def spoil(points: rigs.Array, counts: int, seed: int, least: float = 80.0) -> rigs.Array:
    """Points `[N, C, 2]` with so many views of each moved by `least` pixels or up to thrice that.

    Returns:
        Which views were moved, `[N, C]`; the points are changed in place.
    """
    rng = np.random.default_rng(seed)
    moved = rng.permuted(np.arange(points.shape[1]) < counts, axis=-1)
    moved = rng.permuted(np.broadcast_to(moved, points.shape[:2]), axis=-1)
    angle = rng.uniform(0, 2 * np.pi, points.shape[:2])
    size = rng.uniform(least, 3 * least, points.shape[:2]) * moved
    points += size[..., None] * np.stack([np.cos(angle), np.sin(angle)], -1)
    return moved


def scene(
    rig: rigs.Rig, count: int, *, wrong: int = 0, noise: float = 1.0, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Points, projections, weights, truth and which views were moved, in float64."""
    seen = rigs.observe(rig, count, noise=noise, weights="uniform", seed=seed)
    moved = spoil(seen.points, wrong, seed)
    arrays = (seen.points, seen.projections, seen.weights, seen.truth, moved)
    points, projections, weights, truth, mask = (torch.from_numpy(np.array(a)) for a in arrays)
    return points, projections, weights, truth, mask


@st.composite
def scenes(
    draw: st.DrawFn, *, min_views: int = 2, noise: float | None = None
) -> tuple[rigs.Rig, tuple[Tensor, ...]]:
    rig = draw(rigs.rigs(min_views=min_views, max_views=7, crowd=False))
    most = max(len(rig) - 3, 0)
    levels = [0.0, 0.5, 3.0] if noise is None else [noise]
    made = scene(
        rig,
        draw(st.integers(1, 4)),
        wrong=draw(st.integers(0, most)),
        noise=draw(st.sampled_from(levels)),
        seed=draw(st.integers(0, 2**32 - 1)),
    )
    return rig, made


# ---- The reference ----


@settings(max_examples=15)
@given(scenes(), st.booleans(), st.booleans(), st.sampled_from([2.0, 8.0]))
def test_robust_agrees_with_the_reference(
    made: tuple[rigs.Rig, tuple[Tensor, ...]], weighted: bool, refined: bool, threshold: float
) -> None:
    points, projections, weights, _, _ = made[1]
    weights = weights if weighted else None
    have = ops.robust_triangulate(points, projections, weights, threshold=threshold, refine=refined)
    want = reference.robust_triangulate(
        points.numpy(),
        projections.numpy(),
        None if weights is None else weights.numpy(),
        threshold=threshold,
        refine=refined,
    )
    # Two proposals of equal score, but for rounding, are not told apart alike: then more than one
    # answer is right. With noise that does not happen.
    assert have.inliers.tolist() == want.inliers.tolist()
    if not refined:
        np.testing.assert_allclose(have.points.numpy(), want.points, rtol=1e-6, atol=1e-6)
        return
    # The cost is flat at its minimum, so it is the cost that ten rounds bring down.
    chosen = have.inliers if weights is None else torch.where(have.inliers, weights, 0)
    arguments = (points, projections, chosen.double(), "huber", threshold / 2)
    np.testing.assert_allclose(have.points.numpy(), want.points, rtol=1e-4, atol=1)
    least = cost_at(torch.from_numpy(want.points), *arguments).nan_to_num()
    assert (cost_at(have.points, *arguments).nan_to_num() <= least * (1 + 1e-4) + 1e-12).all()


def test_the_fit_to_the_inliers_may_have_others() -> None:
    """One pair a point misses views that the fit to its inliers finds."""
    points, projections, _, _, _ = scene(rigs.pan31(), 60, noise=2.0, seed=1)

    def found(pairs: int) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return ops.robust_triangulate(
            points, projections, threshold=6.0, pairs=pairs, generator=generator
        ).inliers.sum(-1)

    assert found(1).double().mean() > 28  # the pairs have 25 themselves
    assert (found(465) >= found(1)).all()
    # With all pairs that is rare: here it happens once.
    points, projections, _, _, _ = scene(rigs.ring(9), 40, noise=3.0, seed=1)
    have = ops.robust_triangulate(points, projections, threshold=5.0, refine=False)
    want = reference.robust_triangulate(points, projections, threshold=5.0, refine=False)
    assert have.inliers.tolist() == want.inliers.tolist()
    np.testing.assert_allclose(have.points.numpy(), want.points, rtol=0, atol=1e-6)


def test_among_equals_the_least_error_wins() -> None:
    """Two of four views see one point and two another, the second more exactly."""
    projections = torch.from_numpy(rigs.h36m4().projections)
    truth = torch.tensor([[-400.0, 300, 900], [500, -300, 1500]], dtype=torch.float64)
    points = ops.project(truth, projections)
    mixed = torch.cat([points[0, :2], points[1, 2:]])
    mixed[0, 1] += 3.0
    found = ops.robust_triangulate(mixed, projections, threshold=4.0)
    assert found.inliers.tolist() == [False, False, True, True]
    torch.testing.assert_close(found.points, truth[1])
    mixed[2, 1] += 6.0  # now the first
    mixed[0, 1] -= 2.0
    found = ops.robust_triangulate(mixed, projections, threshold=4.0)
    assert found.inliers.tolist() == [True, True, False, False]


def cost_at(
    at: Tensor, points: Tensor, projections: Tensor, weights: Tensor | None, loss: str, scale: float
) -> Tensor:
    """The sum that `refine` minimises, written once more."""
    r = torch.linalg.vector_norm(ops.project(at, projections) - points, dim=-1)
    rho = r**2 / 2
    if loss == "huber":
        rho = torch.where(r <= scale, rho, scale * (r - scale / 2))
    elif loss == "cauchy":
        rho = scale**2 / 2 * torch.log(1 + (r / scale) ** 2)
    return (rho if weights is None else weights**2 * rho).sum(-1)


# ---- Laws ----


@settings(max_examples=20)
@given(scenes(min_views=5, noise=0.0))
def test_exact_data_give_the_exact_point_past_outliers(
    made: tuple[rigs.Rig, tuple[Tensor, ...]],
) -> None:
    """All but three of five and more views may be wrong."""
    points, projections, weights, truth, moved = made[1]
    for options in ({"refine": False}, {}):
        found = ops.robust_triangulate(points, projections, weights, threshold=0.5, **options)
        torch.testing.assert_close(found.points, truth, rtol=0, atol=1e-5)
        # A wrong view may be right by chance along the ray of a good one, but no good one is lost.
        assert (found.inliers | moved).all()
        assert (found.inliers & moved).sum() == 0
    single = ops.robust_triangulate(points.float(), projections.float(), threshold=2.0)
    assert (single.points - truth).norm(dim=-1).max() < 0.1


@settings(max_examples=15)
@given(scenes(noise=1.0), st.randoms(use_true_random=False))
def test_order_of_views_does_not_matter(
    made: tuple[rigs.Rig, tuple[Tensor, ...]], random: Any
) -> None:
    points, projections, weights, _, _ = made[1]
    order = list(range(points.shape[1]))
    random.shuffle(order)
    have = ops.robust_triangulate(points, projections, weights, threshold=4.0)
    other = ops.robust_triangulate(
        points[:, order], projections[order], weights[:, order], threshold=4.0
    )
    assert torch.equal(have.inliers[:, order], other.inliers)
    torch.testing.assert_close(have.points, other.points, rtol=0, atol=1e-5, equal_nan=True)
    start = have.points.nan_to_num(900.0)
    refined = ops.refine(start, points, projections, weights, scale=2.0)
    other_refined = ops.refine(
        start, points[:, order], projections[order], weights[:, order], scale=2.0
    )
    torch.testing.assert_close(refined, other_refined, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_absent_view_is_a_view_left_out(dtype: torch.dtype, device: str) -> None:
    points, projections, weights, _, _ = (
        x.to(device, dtype) if x.is_floating_point() else x
        for x in scene(rigs.ring(6), 20, wrong=2, seed=1)
    )
    kept = [0, 1, 3, 4, 5]
    want = ops.robust_triangulate(points[:, kept], projections[kept], weights[:, kept], threshold=4)
    start = want.points.nan_to_num(1000.0)
    refined = ops.refine(start, points[:, kept], projections[kept], weights[:, kept], scale=2)
    nan_point, no_weight, nan_projection = points.clone(), weights.clone(), projections.clone()
    nan_point[:, 2, 0] = torch.nan
    no_weight[:, 2] = 0
    nan_projection[2, 1, 1] = torch.nan
    for arguments in (
        (nan_point, projections, weights),
        (points, projections, no_weight),
        (nan_point, nan_projection, no_weight),
    ):
        have = ops.robust_triangulate(*arguments, threshold=4)
        assert not have.inliers[:, 2].any()
        assert torch.equal(have.inliers[:, kept], want.inliers)
        tolerance = 1e-3 if dtype == torch.float32 else 1e-9
        torch.testing.assert_close(have.points, want.points, rtol=0, atol=tolerance, equal_nan=True)
        torch.testing.assert_close(
            ops.refine(start, *arguments, scale=2), refined, rtol=0, atol=tolerance
        )


@settings(max_examples=15)
@given(scenes(noise=1.0), st.integers(0, 2**32 - 1), st.sampled_from([1.0, 1e-3]))
def test_moves_with_the_world(
    made: tuple[rigs.Rig, tuple[Tensor, ...]], seed: int, unit: float
) -> None:
    points, projections, weights, _, _ = made[1]
    rng = np.random.default_rng(seed)
    rotation = torch.from_numpy(Rotation.random(random_state=seed).as_matrix())
    shift = torch.from_numpy(rng.uniform(-3000, 3000, 3))
    moved = projections.clone()  # P (y, 1) = P' (unit (R y + s), 1)
    moved[..., :3] = projections[..., :3] @ rotation.mT / unit
    moved[..., 3] -= (projections[..., :3] @ rotation.mT @ shift).reshape(moved[..., 3].shape)
    have = ops.robust_triangulate(points, projections, weights, threshold=4.0)
    there = ops.robust_triangulate(points, moved, weights, threshold=4.0)
    want = unit * (have.points @ rotation.mT + shift)
    assert torch.equal(have.inliers, there.inliers)
    torch.testing.assert_close(there.points, want, rtol=0, atol=1e-4 * unit, equal_nan=True)


def test_robust_beats_the_linear_solution(device: str) -> None:
    points, projections, _, truth, moved = scene(rigs.h36m4(), 200, wrong=1, noise=2.0, seed=5)
    points, projections = points.to(device), projections.to(device)
    found = ops.robust_triangulate(points, projections, threshold=12.0)
    error = (found.points.cpu() - truth).norm(dim=-1)
    linear = ops.triangulate(points, projections, mode="inhomogeneous").cpu()
    assert error.median() < 15
    assert (linear - truth).norm(dim=-1).median() > 60
    assert (found.inliers.cpu() & moved).double().mean() < 0.01


def test_refinement_lowers_the_cost_of_the_fit() -> None:
    points, projections, weights, _, _ = scene(rigs.ring(6), 100, noise=4.0, seed=2)
    plain = ops.robust_triangulate(points, projections, weights, threshold=20.0, refine=False)
    refined = ops.robust_triangulate(points, projections, weights, threshold=20.0)
    assert torch.equal(plain.inliers, refined.inliers)
    chosen = torch.where(refined.inliers, weights, 0)
    lower = cost_at(refined.points, points, projections, chosen, "huber", 10.0)
    assert (lower < cost_at(plain.points, points, projections, chosen, "huber", 10.0)).all()


# ---- What is no point ----


@given(rigs.degeneracies())
@example(rigs.degenerate("parallel rays", rigs.h36m4(), np.random.default_rng(0)))
@example(rigs.degenerate("coincident cameras", rigs.h36m4(), np.random.default_rng(0)))
def test_degenerate_views(case: rigs.Degenerate) -> None:
    arrays = (case.points, case.projections, case.weights)
    for dtype in (torch.float32, torch.float64):
        inputs = [torch.from_numpy(a).to(dtype).requires_grad_() for a in arrays]
        found = ops.robust_triangulate(*inputs, threshold=5.0)
        assert found.points.isnan().all(), case.reason
        assert not found.inliers.any()
        grads = torch.autograd.grad(found.points, inputs, torch.full((3,), torch.nan, dtype=dtype))
        assert all(g.eq(0).all() for g in grads)

        if case.reason == "parallel rays":  # the least cost is at infinity, and has no least point
            continue
        start = torch.tensor([100.0, 200.0, 900.0], dtype=dtype, requires_grad=True)
        refined = ops.refine(start, *inputs, scale=5.0)
        grads = torch.autograd.grad(refined.sum(), [start, *inputs])
        assert all(g.eq(0).all() for g in grads[1:])
        if case.reason in ("same view twice", "coincident cameras"):
            assert torch.equal(refined, start)
            assert grads[0].eq(1).all()
        else:
            assert refined.isnan().all(), case.reason
            assert grads[0].eq(0).all()


def test_views_that_disagree() -> None:
    points, projections, _, _, _ = scene(rigs.h36m2(), 20, noise=0.0)
    points[:, 0, 1] += 200
    points.requires_grad_()
    found = ops.robust_triangulate(points, projections, threshold=5.0)
    assert found.points.isnan().all()
    assert not found.inliers.any()
    (grad,) = torch.autograd.grad(found.points.nan_to_num().sum(), points)
    assert grad.eq(0).all()


def test_a_point_behind_a_camera_is_not_seen_by_it() -> None:
    """The pixel of a point behind a camera fits as well as that of one in front."""
    points, projections, _, truth, _ = scene(rigs.ring(5), 4, noise=0.0)
    projections[4] *= -1  # the same pixels, of depth below 0
    found = ops.robust_triangulate(points, projections, threshold=1.0)
    assert found.inliers.tolist() == [[True] * 4 + [False]] * 4
    torch.testing.assert_close(found.points, truth)


@pytest.mark.parametrize("shape", [(0, 4), (2, 0, 5), (3, 1), (3, 0)])
def test_no_points_and_no_views(shape: tuple[int, ...], device: str) -> None:
    views = shape[-1]
    points = torch.zeros(*shape, 2, device=device, requires_grad=True)
    projections = torch.eye(3, 4, device=device).expand(views, 3, 4)
    found = ops.robust_triangulate(points, projections, threshold=1.0)
    assert found.points.shape == (*shape[:-1], 3)
    assert found.inliers.shape == shape
    assert found.inliers.dtype == torch.bool
    assert found.points.isnan().all()
    refined = ops.refine(torch.ones(3, device=device), points, projections, scale=1.0)
    assert refined.isnan().all()
    for result in (found.points, refined):
        (grad,) = torch.autograd.grad(result.sum(), points, retain_graph=True)
        assert grad.eq(0).all()


# ---- Batches, dtypes, memory ----


@pytest.mark.parametrize(
    ("points_batch", "projections_batch", "weights_batch"),
    [((), (), ()), ((3, 2), (3, 1), (2,)), ((2,), (3, 2), (3, 1)), ((), (3,), (2, 1))],
)
def test_batches_broadcast(
    points_batch: tuple[int, ...],
    projections_batch: tuple[int, ...],
    weights_batch: tuple[int, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    generator = torch.Generator().manual_seed(0)
    points, projections, weights, truth, _ = scene(rigs.ring(4), 1, noise=0.0)

    def randn(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    points = points[0] + randn(*points_batch, 4, 2)
    projections = projections * (1 + 1e-4 * randn(*projections_batch, 4, 3, 4))
    weights = weights[0] * (1 + 0.1 * randn(*weights_batch, 4))
    batch = torch.broadcast_shapes(points_batch, projections_batch, weights_batch)
    inputs = [x.clone().requires_grad_() for x in (points, projections, weights)]
    full = [
        x.expand(*batch, *x.shape[x.dim() - dims :]).reshape(-1, *x.shape[x.dim() - dims :])
        for x, dims in zip(inputs, (2, 3, 1), strict=True)
    ]
    have = ops.robust_triangulate(*inputs, threshold=30.0)
    start = truth[0] + 5
    refined = ops.refine(start, *inputs, scale=3.0)
    assert have.points.shape == refined.shape == (*batch, 3)
    alone = [ops.robust_triangulate(*one, threshold=30.0) for one in zip(*full, strict=True)]
    alone_refined = [ops.refine(start, *one, scale=3.0) for one in zip(*full, strict=True)]
    for h, w in (
        (have.points, torch.stack([x.points for x in alone])),
        (refined, torch.stack(alone_refined)),
    ):
        torch.testing.assert_close(h.reshape(-1, 3), w, rtol=0, atol=1e-8)
        got = torch.autograd.grad(h.square().sum(), inputs, retain_graph=True)
        want = torch.autograd.grad(w.square().sum(), inputs, retain_graph=True)
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    assert torch.equal(have.inliers.reshape(-1, 4), torch.stack([x.inliers for x in alone]))
    monkeypatch.setattr(robust, "_PIECE", 1)
    again = ops.robust_triangulate(*inputs, threshold=30.0)
    assert torch.equal(again.inliers, have.inliers)
    assert torch.equal(again.points, have.points)


def test_many_views_are_searched_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """31 views, 465 pairs: no piece of the search holds more than 64 MiB of float32."""
    points, projections, _, truth, moved = scene(rigs.pan31(), 250, wrong=15, noise=1.0, seed=4)
    sizes = []

    def triangulate(x: Tensor, p: Tensor, *args: Any, **options: Any) -> Tensor:
        if x.dim() == 4:
            assert p.shape == (1, 465, 2, 3, 4)  # shared cameras are not copied
            sizes.append(x.shape[0])
        return ops.triangulate(x, p, *args, **options)

    monkeypatch.setattr(robust, "triangulate", triangulate)
    found = ops.robust_triangulate(points, projections, threshold=6.0)
    assert sum(sizes) == 250
    assert len(sizes) > 1
    assert max(sizes) * 465 * 31 * 8 <= 2**24
    assert (found.points - truth).norm(dim=-1).max() < 10
    assert not (found.inliers & moved).any()


def test_float32_is_float64_to_rounding(device: str) -> None:
    for rig, wrong in ((rigs.h36m4(), 1), (rigs.par2(), 0), (rigs.pan31(), 5)):
        points, projections, weights, truth, _ = (
            x.to(device) for x in scene(rig, 50, wrong=wrong, noise=0.5)
        )
        singles = [x.float() for x in (points, projections, weights)]
        doubles = [x.double() for x in singles]
        have = ops.robust_triangulate(*singles, threshold=5.0)
        want = ops.robust_triangulate(*doubles, threshold=5.0)
        assert have.points.dtype == torch.float32
        assert torch.equal(have.inliers, want.inliers)
        assert (have.points - want.points).norm(dim=-1).max() < 2e-3
        start = truth.float()
        refined = ops.refine(start, *singles, scale=1.0)
        assert refined.dtype == torch.float32
        wanted = ops.refine(start.double(), *doubles, scale=1.0)
        assert (refined - wanted).norm(dim=-1).max() < 1e-3


def test_autocast_changes_nothing(device: str) -> None:
    points, projections, weights, truth, _ = (x.to(device) for x in scene(rigs.ring(5), 8, wrong=1))
    inputs = [x.float().requires_grad_() for x in (points, projections, weights)]

    def run() -> list[Tensor]:
        found = ops.robust_triangulate(*inputs, threshold=5.0)
        return [found.points, ops.refine(truth.float(), *inputs, scale=1.0)]

    plain = run()
    with torch.autocast(device, dtype=torch.bfloat16):
        cast = run()
    for p, c in zip(plain, cast, strict=True):
        assert c.dtype == torch.float32
        assert torch.equal(p, c)
        for g, h in zip(*(torch.autograd.grad(x.sum(), inputs) for x in (p, c)), strict=True):
            assert torch.equal(g, h)
    half = ops.robust_triangulate(inputs[0].detach().half(), inputs[1].detach(), threshold=9.0)
    assert half.points.dtype == torch.float32


# ---- Pairs at random ----


def test_random_pairs_follow_their_generator(device: str) -> None:
    points, projections, weights, truth, _ = (
        x.to(device) for x in scene(rigs.pan31(), 30, wrong=8, seed=6)
    )

    def run(seed: int, pairs: int) -> ops.RobustTriangulation:
        generator = torch.Generator(device).manual_seed(seed)
        return ops.robust_triangulate(
            points, projections, weights, threshold=5.0, pairs=pairs, generator=generator
        )

    first, again, other = run(0, 10), run(0, 10), run(1, 10)
    assert torch.equal(first.points, again.points)
    assert torch.equal(first.inliers, again.inliers)
    assert (first.points - truth).norm(dim=-1).median() < 3
    one, another = run(0, 1), run(1, 1)
    assert not torch.equal(one.inliers, another.inliers)
    assert other.inliers.sum() >= one.inliers.sum()
    every = ops.robust_triangulate(points, projections, weights, threshold=5.0)
    assert torch.equal(run(2, 465).points, every.points)
    assert torch.equal(run(2, 10**6).points, every.points)


@given(st.integers(2, 9), st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_pairs_are_drawn_once_and_usable_ones_first(total: int, count: int, seed: int) -> None:
    count = min(count, total)
    generator = torch.Generator().manual_seed(seed)
    usable = torch.rand(50, total, generator=generator) < 0.4
    drawn = robust._draw(usable, count, generator)
    assert drawn.shape == (50, count)
    assert all(len(set(row)) == count for row in drawn.tolist())
    taken = usable.gather(1, drawn).sum(-1)
    assert torch.equal(taken, usable.sum(-1).clamp_max(count))


def test_every_pair_is_drawn_alike() -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = robust._draw(torch.ones(6000, 6, dtype=torch.bool), 2, generator)
    share = torch.bincount(drawn.flatten(), minlength=6) / 6000
    assert (share - 1 / 3).abs().max() < 0.03


def test_random_pairs_with_cameras_of_their_own() -> None:
    points, projections, _, truth, _ = scene(rigs.ring(6), 7, noise=0.0)
    generator = torch.Generator().manual_seed(3)
    found = ops.robust_triangulate(
        points, projections.expand(7, 6, 3, 4).clone(), threshold=1.0, pairs=2, generator=generator
    )
    torch.testing.assert_close(found.points, truth)
    assert found.inliers.all()


# ---- Derivatives ----


def leaves(*tensors: Tensor) -> list[Tensor]:
    return [x.clone().requires_grad_() for x in tensors]


@pytest.mark.parametrize("refined", [False, True])
def test_gradients_of_the_fit(refined: bool, device: str) -> None:
    points, projections, weights, _, moved = (
        x.to(device) for x in scene(rigs.ring(5), 2, wrong=1, noise=2.0, seed=8)
    )
    points[1, (~moved[1]).nonzero()[0, 0]] = torch.nan  # and one that is absent
    absent = points.isnan().any(-1)
    inputs = leaves(points.nan_to_num(), torch.zeros_like(projections), weights)

    def function(x: Tensor, change: Tensor, w: Tensor) -> Tensor:
        p = projections * (1 + 1e-3 * change)
        x = torch.where(absent[..., None], torch.nan, x)
        return ops.robust_triangulate(x, p, w, threshold=15.0, refine=refined).points

    found = ops.robust_triangulate(points, projections, weights, threshold=15.0)
    assert torch.equal(found.inliers, ~(moved | absent))
    assert torch.autograd.gradcheck(function, inputs, rtol=1e-4, atol=1e-5)
    grads = torch.autograd.grad(function(*inputs).sum(), inputs)
    out = moved | absent
    assert grads[0][out].eq(0).all()
    assert grads[2][out].eq(0).all()
    assert (grads[0][~out] != 0).all()
    assert (grads[2][~out] != 0).all()


# ---- Compilers and transforms ----


def both(x: Tensor, p: Tensor, start: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    found = ops.robust_triangulate(x, p, threshold=5.0, refine=False)
    refined = ops.refine(start, x, p, loss="cauchy", scale=2.0, iterations=2)
    return found.points, found.inliers, refined


def test_compiles_in_one_graph() -> None:
    points, projections, _, truth, _ = scene(rigs.ring(5), 4, wrong=1)
    inputs = leaves(points, projections)
    compiled = torch.compile(both, backend="aot_eager", fullgraph=True)
    have, want = compiled(*inputs, truth), both(*inputs, truth)
    for h, w in zip(have, want, strict=True):
        torch.testing.assert_close(h, w, rtol=0, atol=1e-9)
    for i in (0, 2):
        got = torch.autograd.grad(have[i].sum(), inputs, retain_graph=True)
        expected = torch.autograd.grad(want[i].sum(), inputs, retain_graph=True)
        torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-8)


def test_exports_with_any_number_of_points() -> None:
    class Both(torch.nn.Module):
        def forward(self, x: Tensor, p: Tensor, start: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return both(x, p, start)

    points, projections, _, truth, _ = scene(rigs.ring(5), 7, wrong=1)
    count = torch.export.Dim("count", min=2, max=1000)
    program = torch.export.export(
        Both(),
        (points[:4], projections, truth[:4]),
        dynamic_shapes=({0: count}, None, {0: count}),
    )
    have, want = program.module()(points, projections, truth), both(points, projections, truth)
    for h, w in zip(have, want, strict=True):
        torch.testing.assert_close(h, w, rtol=0, atol=1e-9)


def test_vmap_and_jacrev() -> None:
    points, projections, _, truth, _ = scene(rigs.ring(5), 3, wrong=1)

    def one(x: Tensor, start: Tensor) -> Tensor:
        return ops.refine(start, x, projections, scale=2.0)

    have = torch.func.vmap(one)(points, truth)
    torch.testing.assert_close(have, one(points, truth), rtol=0, atol=1e-9)
    jacobian = torch.func.jacrev(one)(points[0], truth[0])
    (leaf,) = leaves(points[0])
    found = one(leaf, truth[0])
    want = torch.stack([torch.autograd.grad(v, leaf, retain_graph=True)[0] for v in found])
    torch.testing.assert_close(jacobian, want, rtol=1e-9, atol=1e-9)
    robustly = torch.func.vmap(lambda x: ops.robust_triangulate(x, projections, threshold=5.0))
    torch.testing.assert_close(
        robustly(points).points, ops.robust_triangulate(points, projections, threshold=5.0).points
    )


# ---- Bad input ----


X, P, Y = torch.zeros(2, 4, 2), torch.zeros(4, 3, 4), torch.zeros(2, 3)
BAD: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: ops.robust_triangulate(X[..., :1], P, threshold=1.0), ValueError, "points must be"),
    (lambda: ops.robust_triangulate(X, P[:3], threshold=1.0), ValueError, "projections must be"),
    (lambda: ops.robust_triangulate(X, P, X[..., 0].long(), threshold=1.0), TypeError, "weights"),
    (lambda: ops.robust_triangulate(X, P, X[:, :3, 0], threshold=1.0), ValueError, "weights must"),
    (lambda: ops.robust_triangulate(X, P.expand(3, 4, 3, 4), threshold=1.0), ValueError, "broad"),
    (lambda: ops.robust_triangulate(X, P, threshold=0.0), ValueError, "threshold must be a number"),
    (lambda: ops.robust_triangulate(X, P, threshold=torch.ones(())), TypeError, "threshold"),
    (lambda: ops.robust_triangulate(X, P, threshold=1.0, pairs=0), ValueError, "pairs must be 1"),
    (lambda: ops.robust_triangulate(X, P, threshold=1.0, pairs=2.0), TypeError, "pairs must be an"),
    (lambda: ops.robust_triangulate(X.int(), P, threshold=1.0), TypeError, "points must have"),
    (lambda: ops.robust_triangulate([[0.0]], P, threshold=1.0), TypeError, "points must be a ten"),
    (lambda: ops.refine(Y[:, :2], X, P, scale=1.0), ValueError, "points_3d must be"),
    (lambda: ops.refine([0.0], X, P, scale=1.0), TypeError, "points_3d must be a tensor"),
    (lambda: ops.refine(torch.zeros(3, 3), X, P, scale=1.0), ValueError, "points_3d"),
    (lambda: ops.refine(Y, X, P, scale=-1.0), ValueError, "scale must be a number"),
    (lambda: ops.refine(Y, X, P, loss="l1", scale=1.0), ValueError, "loss must be one of"),
    (lambda: ops.refine(Y, X, P, scale=1.0, iterations=0), ValueError, "iterations must be 1"),
    (lambda: ops.refine(Y, X, P, scale=1.0, iterations=1.5), TypeError, "iterations must be an"),
]


@pytest.mark.parametrize(("call", "error", "words"), BAD)
def test_bad_input(call: Callable[[], Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words) as caught:
        call()
    assert "\n" not in str(caught.value)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_generator_of_another_device() -> None:
    with pytest.raises(ValueError, match="generator must be on the device of points"):
        ops.robust_triangulate(
            X.cuda(), P.cuda(), threshold=1.0, pairs=2, generator=torch.Generator()
        )
