# SPDX-License-Identifier: Apache-2.0
"""The definitions of triangulation and projection on their own: laws, exact arithmetic.

Nothing here may lean on anything else of the package.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import rigs
from differences import assert_close, numerical_gradient
from hypothesis import given, settings
from hypothesis import strategies as st

from tritool import reference

Array = npt.NDArray[Any]

laws = settings(derandomize=True, deadline=None, max_examples=40)
modes = pytest.mark.parametrize("mode", ["homogeneous", "inhomogeneous"])
MODES = st.sampled_from(["homogeneous", "inhomogeneous"])


# --- triangulation: values -----------------------------------------------------------------------


def tolerance(points: Array, projections: Array, weights: Array, mode: str, k: float) -> Array:
    """Return k roundings of inputs a few metres away, in mm, by how ill-posed each point is."""
    rows = points[..., None] * projections[..., 2:, :] - projections[..., :2, :]
    a = (weights[..., None, None] * rows).reshape(*points.shape[:-2], -1, 4)
    s = np.linalg.svd(a[..., :3], compute_uv=False)
    gap = np.ones(s.shape[:-1])
    if mode == "homogeneous":
        gap = 1.0 - (np.linalg.svd(a, compute_uv=False)[..., 3] / s[..., 2]) ** 2
    distance = np.abs(projections[..., 3]).max() / np.abs(projections[..., :3]).max()
    return np.asarray(k * 2.2e-16 * distance * s[..., 0] / s[..., 2] / gap)


def assert_same_points(actual: Array, expected: Array, within: Array) -> None:
    distance = np.linalg.norm(actual - expected, axis=-1)
    assert (distance <= within).all(), (distance, within)


@modes
@pytest.mark.parametrize("name", rigs.RIGS)
@pytest.mark.parametrize(
    ("noise", "kind"), [(0.0, "one"), (1.0, "one"), (5.0, "uniform"), (20.0, "one"), (5.0, "log")]
)
def test_triangulate_agrees_with_exact_arithmetic(
    name: str, noise: float, kind: rigs.WeightKind, mode: reference.Mode
) -> None:
    seen = rigs.observe(rigs.RIGS[name](), 3, noise=noise, weights=kind, seed=7)
    found = reference.triangulate(seen.points, seen.projections, seen.weights, mode=mode)
    exact = np.stack(
        [
            rigs.exact_triangulate(x, seen.projections, w, mode=mode)
            for x, w in zip(seen.points, seen.weights, strict=True)
        ]
    )
    within = tolerance(seen.points, seen.projections, seen.weights, mode, 20.0)
    assert_same_points(found, exact, within)


def test_the_reference_is_good_to_fifteen_digits_in_a_room() -> None:
    seen = rigs.observe(rigs.h36m4(), 20, noise=5.0, seed=8)
    found = reference.triangulate(seen.points, seen.projections)
    exact = [rigs.exact_triangulate(x, seen.projections) for x in seen.points]
    assert np.linalg.norm(found - exact, axis=-1).max() < 2e-12  # mm, at coordinates of 1e3 mm


@laws
@given(rigs.observations(max_noise=0.0), MODES, st.integers(0, 2))
def test_exact_data_give_the_exact_point(
    drawn: tuple[rigs.Rig, rigs.Observations], mode: reference.Mode, reweight: int
) -> None:
    _, seen = drawn
    found = reference.triangulate(
        seen.points, seen.projections, seen.weights, mode=mode, reweight=reweight
    )
    within = tolerance(seen.points, seen.projections, seen.weights, mode, 200.0)
    assert_same_points(found, seen.truth, within)


@modes
def test_the_result_minimises_what_the_mode_says(mode: reference.Mode) -> None:
    seen = rigs.observe(rigs.h36m4(), 50, noise=20.0, weights="uniform", seed=9)
    rng = np.random.default_rng(10)

    def cost(y: Array) -> Array:
        x = np.concatenate([y, np.ones((*y.shape[:-1], 1))], axis=-1)
        u, v, depth = np.moveaxis(np.einsum("cij,nj->nci", seen.projections, x), -1, 0)
        rows = [depth * seen.points[..., 0] - u, depth * seen.points[..., 1] - v]
        error = (seen.weights**2 * (rows[0] ** 2 + rows[1] ** 2)).sum(-1)
        return np.asarray(error / (1.0 + (y * y).sum(-1)) if mode == "homogeneous" else error)

    found = reference.triangulate(seen.points, seen.projections, seen.weights, mode=mode)
    for length in (0.1, 1.0, 30.0, 1000.0):
        step = rng.normal(size=found.shape)
        step *= length / np.linalg.norm(step, axis=-1, keepdims=True)
        assert (cost(found + step) > cost(found)).all()
        assert (cost(found - step) > cost(found)).all()


def test_the_modes_differ_as_much_as_they_should() -> None:
    seen = rigs.observe(rigs.h36m4(), 500, noise=5.0, seed=11)
    homogeneous = reference.triangulate(seen.points, seen.projections)
    inhomogeneous = reference.triangulate(seen.points, seen.projections, mode="inhomogeneous")
    apart = np.median(np.linalg.norm(homogeneous - inhomogeneous, axis=-1))
    assert 0.3 < apart < 3.0  # mm


@laws
@given(rigs.observations(), MODES, rigs.generators())
def test_a_view_with_weight_zero_or_a_nan_point_is_absent(
    drawn: tuple[rigs.Rig, rigs.Observations], mode: reference.Mode, rng: np.random.Generator
) -> None:
    _, seen = drawn
    expected = reference.triangulate(seen.points, seen.projections, seen.weights, mode=mode)
    within = tolerance(seen.points, seen.projections, seen.weights, mode, 100.0)
    at = int(rng.integers(seen.points.shape[-2] + 1))
    junk = rng.normal(size=(len(seen.points), 2)) * 100.0
    points = np.insert(seen.points, at, junk, axis=-2)
    projections = np.insert(seen.projections, at, rng.normal(size=(3, 4)), axis=-3)
    weights = np.insert(seen.weights, at, 0.0, axis=-1)
    by_weight = reference.triangulate(points, projections, weights, mode=mode)
    assert_same_points(by_weight, expected, within)

    projections[at] = np.nan  # what an absent view holds is not looked at
    by_weight_again = reference.triangulate(points, projections, weights, mode=mode)
    np.testing.assert_array_equal(by_weight_again, by_weight)
    points[:, at, rng.integers(2)] = np.nan
    weights[:, at] = rng.choice([2.0, np.nan, -1.0])
    by_point = reference.triangulate(points, projections, weights, mode=mode)
    np.testing.assert_array_equal(by_point, by_weight)


@laws
@given(rigs.observations(), MODES, rigs.generators())
def test_order_and_common_scales_do_not_matter(
    drawn: tuple[rigs.Rig, rigs.Observations], mode: reference.Mode, rng: np.random.Generator
) -> None:
    _, seen = drawn
    expected = reference.triangulate(seen.points, seen.projections, seen.weights, mode=mode)
    within = tolerance(seen.points, seen.projections, seen.weights, mode, 100.0)
    order = rng.permutation(seen.points.shape[-2])
    for points, projections, weights in (
        (seen.points[:, order], seen.projections[order], seen.weights[:, order]),
        (seen.points, seen.projections, 0.37 * seen.weights),
        (seen.points, -5.3 * seen.projections, seen.weights),
    ):
        found = reference.triangulate(points, projections, weights, mode=mode)
        assert_same_points(found, expected, within)
    for exponent in (-900, -3, 900):
        weights = np.ldexp(seen.weights, exponent)
        found = reference.triangulate(seen.points, seen.projections, weights, mode=mode)
        np.testing.assert_array_equal(found, expected)


@laws
@given(rigs.observations(), rigs.generators())
def test_the_world_may_be_turned_and_in_the_inhomogeneous_mode_moved_and_scaled(
    drawn: tuple[rigs.Rig, rigs.Observations], rng: np.random.Generator
) -> None:
    _, seen = drawn
    turn = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    move = rng.uniform(-2000.0, 2000.0, 3)
    turned = seen.projections.copy()
    turned[:, :, :3] = seen.projections[:, :, :3] @ turn.T
    moved = turned.copy()
    moved[:, :, 3] -= turned[:, :, :3] @ move
    moved[:, :, 3] *= 1e-3  # metres
    for mode in ("homogeneous", "inhomogeneous"):
        within = tolerance(seen.points, seen.projections, seen.weights, mode, 1000.0)
        expected = reference.triangulate(seen.points, seen.projections, seen.weights, mode=mode)
        found = reference.triangulate(seen.points, turned, seen.weights, mode=mode)
        assert_same_points(found, expected @ turn.T, within)
    found = reference.triangulate(seen.points, moved, seen.weights, mode="inhomogeneous")
    assert_same_points(1e3 * found, expected @ turn.T + move, within)


def test_reweighting_divides_by_depth_and_approaches_the_least_reprojection_error() -> None:
    rig = rigs.h36m4()
    seen = rigs.observe(rig, 300, noise=10.0, weights="uniform", seed=12)
    rounds = [
        reference.triangulate(seen.points, seen.projections, seen.weights, reweight=n)
        for n in range(3)
    ]
    for before, after in pairwise(rounds):
        depth = np.einsum("cj,nj->nc", rig.R[:, 2], before) + rig.t[:, 2]
        by_hand = reference.triangulate(seen.points, seen.projections, seen.weights / depth)
        np.testing.assert_allclose(after, by_hand, rtol=0.0, atol=1e-9)

    def error(y: Array) -> Array:
        difference = reference.project(y, seen.projections) - seen.points
        return np.asarray((seen.weights[..., None] ** 2 * difference**2).sum((-1, -2)))

    # The algebraic optimum of the last round has the reprojection error as its cost.
    assert error(rounds[1]).mean() < 0.999 * error(rounds[0]).mean()
    assert np.mean(error(rounds[1]) < error(rounds[0])) > 0.95


# --- triangulation: gradients --------------------------------------------------------------------


@modes
@pytest.mark.parametrize(
    ("name", "noise", "kind", "count"),
    [
        ("h36m4", 1.0, "one", 2),
        ("h36m4", 20.0, "uniform", 1),
        ("h36m4", 5.0, "log", 2),
        ("h36m2", 5.0, "log", 2),
        ("par2", 1.0, "uniform", 1),
        ("far2", 1.0, "one", 1),
    ],
)
def test_triangulate_vjp_agrees_with_exact_arithmetic(
    name: str, noise: float, kind: rigs.WeightKind, count: int, mode: reference.Mode
) -> None:
    seen = rigs.observe(rigs.RIGS[name](), count, noise=noise, weights=kind, seed=13)
    grad = np.random.default_rng(14).normal(size=(count, 3))
    for x, w, g in zip(seen.points, seen.weights, grad, strict=True):
        found = reference.triangulate_vjp(g, x, seen.projections, w, mode=mode)
        exact = rigs.exact_triangulate_vjp(g, x, seen.projections, w, mode=mode)
        for ours, theirs, bound in zip(found, exact, (1e-12, 1e-12, 1e-8), strict=True):
            assert ours is not None
            assert_close(ours, theirs, bound)


@modes
@pytest.mark.parametrize("reweight", [0, 1, 2])
def test_triangulate_vjp_agrees_with_differences_through_reweighting_and_broadcasts(
    mode: reference.Mode, reweight: int
) -> None:
    rng = np.random.default_rng(15)
    seen = rigs.observe(rigs.h36m4(), 2, noise=20.0, weights="uniform", seed=16)
    # Batch [3, 2]: points [3, 2, ...], one rig for each column, weights for each row.
    points = seen.points + rng.normal(size=(3, 2, 4, 2))
    projections = seen.projections * rng.uniform(0.99, 1.01, size=(2, 4, 3, 4))
    weights = rng.uniform(0.2, 1.0, size=(3, 1, 4))
    points[1, 0, 2] = np.nan
    weights[2, 0, 1] = 0.0
    grad = rng.normal(size=(3, 2, 3))

    def loss(x: Array, p: Array, w: Array) -> float:
        return float((grad * reference.triangulate(x, p, w, mode=mode, reweight=reweight)).sum())

    found = reference.triangulate_vjp(
        grad, points, projections, weights, mode=mode, reweight=reweight
    )
    steps = 1e-3 * np.maximum(np.abs(projections), 0.1)
    assert_close(
        found[0], numerical_gradient(lambda x: loss(x, projections, weights), points, 0.3), 1e-7
    )
    assert_close(
        found[1] * steps,
        numerical_gradient(lambda p: loss(points, p, weights), projections, steps) * steps,
        1e-6,
    )
    present = weights > 0.0  # a step away from 0 would add the view
    numerical = numerical_gradient(lambda w: loss(points, projections, w), weights, 1e-3)
    assert found[2] is not None
    assert (found[2][~present] == 0.0).all()
    assert_close(found[2][present], numerical[present], 1e-7)
    without = reference.triangulate_vjp(grad, points, projections, mode=mode, reweight=reweight)
    assert without[2] is None


@laws
@given(rigs.observations(max_noise=20.0), MODES, rigs.generators())
def test_gradients_know_what_does_not_move_the_point(
    drawn: tuple[rigs.Rig, rigs.Observations], mode: reference.Mode, rng: np.random.Generator
) -> None:
    _, seen = drawn
    grad = rng.normal(size=seen.truth.shape)
    _, grad_projections, grad_weights = reference.triangulate_vjp(
        grad,
        seen.points,
        seen.projections[None] + np.zeros((len(grad), 1, 1, 1)),
        seen.weights,
        mode=mode,
    )
    assert grad_weights is not None
    # The common scale of the weights, and that of the projections. Single terms of the sums below
    # are bounded by those of the gradient to the projections.
    terms = grad_projections * seen.projections
    scale = np.abs(terms).sum((-1, -2, -3))
    assert (np.abs((seen.weights * grad_weights).sum(-1)) <= 1e-11 * scale).all()
    assert (np.abs(terms.sum((-1, -2, -3))) <= 1e-11 * scale).all()


@laws
@given(rigs.observations(kinds=("one", "uniform")), MODES)
def test_a_power_of_two_on_the_weights_divides_their_gradient(
    drawn: tuple[rigs.Rig, rigs.Observations], mode: reference.Mode
) -> None:
    _, seen = drawn
    first = reference.triangulate_vjp(
        np.ones(3), seen.points, seen.projections, seen.weights, mode=mode
    )
    second = reference.triangulate_vjp(
        np.ones(3), seen.points, seen.projections, np.ldexp(seen.weights, 40), mode=mode
    )
    np.testing.assert_array_equal(second[0], first[0])
    np.testing.assert_array_equal(second[1], first[1])
    assert second[2] is not None
    np.testing.assert_array_equal(np.ldexp(second[2], 40), first[2])


# --- triangulation: degenerate points ------------------------------------------------------------


@modes
@pytest.mark.parametrize("reason", rigs.DEGENERACIES)
def test_degenerate_points_are_nan_without_gradient(reason: str, mode: reference.Mode) -> None:
    for seed in range(5):
        rng = np.random.default_rng(seed)
        bad = rigs.degenerate(reason, (rigs.h36m4, rigs.h36m2, rigs.pan31)[seed % 3](), rng)
        arguments = (bad.points, bad.projections, bad.weights)
        for reweight in (0, 1):
            found = reference.triangulate(*arguments, mode=mode, reweight=reweight)
            assert np.isnan(found).all()
            for grad in (np.ones(3), np.full(3, np.nan)):
                gradients = reference.triangulate_vjp(
                    grad, *arguments, mode=mode, reweight=reweight
                )
                for gradient, argument in zip(gradients, arguments, strict=True):
                    assert gradient is not None
                    assert gradient.shape == argument.shape
                    assert (gradient == 0.0).all()


@laws
@given(rigs.degeneracies(), MODES)
def test_random_rigs_degenerate_too(bad: rigs.Degenerate, mode: reference.Mode) -> None:
    found = reference.triangulate(bad.points, bad.projections, bad.weights, mode=mode)
    assert np.isnan(found).all()
    if bad.reason not in ("same view twice", "coincident cameras", "parallel rays"):
        found = reference.triangulate(bad.points, bad.projections, bad.weights, mode=mode, tau=0.0)
        assert np.isnan(found).all()  # whatever the rounding of singular values says


@modes
def test_tau_sets_what_counts_as_parallel(mode: reference.Mode) -> None:
    """In float32 the threshold 1e-6 tells poor rigs from degenerate ones, as 1e-13 in float64."""
    for name, make in rigs.RIGS.items():
        seen = rigs.observe(make(), 50, noise=0.1, seed=17)
        found = reference.triangulate(
            np.float32(seen.points), np.float32(seen.projections), mode=mode, tau=1e-6
        )
        assert np.isfinite(found).all(), name
    for reason in ("same view twice", "parallel rays", "coincident cameras"):
        for seed in range(5):
            bad = rigs.degenerate(reason, rigs.h36m4(), np.random.default_rng(seed))
            single = (np.float32(bad.points), np.float32(bad.projections), np.float32(bad.weights))
            assert np.isnan(reference.triangulate(*single, mode=mode, tau=1e-6)).all()


def test_a_homogeneous_solution_on_its_way_to_infinity_is_degenerate() -> None:
    """Three well-conditioned columns do not help when p of |p| = 1 has next to no last entry."""
    slant = 1e-4
    a = np.array([[2.0, 0, 0, 0], [0, 2.0, 0, 0], [0, 0, 1.0, 0], [0, 0, slant, 3.0]])
    projections = np.zeros((2, 3, 4))  # with P3 = 0 the rows of A are -P1 and -P2
    projections[:, :2] = -a.reshape(2, 2, 4)
    points = np.zeros((2, 2))
    found = reference.triangulate(points, projections)  # (s3^2 - lambda) / s3^2 is 1.1e-8
    np.testing.assert_allclose(found[2], rigs.exact_triangulate(points, projections)[2], rtol=1e-7)
    assert abs(found[2]) > 1e4
    assert np.isnan(reference.triangulate(points, projections, tau=1e-6)).all()
    gradients = reference.triangulate_vjp(np.ones(3), points, projections, tau=1e-6)
    assert (gradients[0] == 0.0).all()
    assert (gradients[1] == 0.0).all()
    inhomogeneous = reference.triangulate(points, projections, mode="inhomogeneous", tau=1e-6)
    assert np.isfinite(inhomogeneous).all()


@modes
def test_one_degenerate_point_leaves_the_others_alone(mode: reference.Mode) -> None:
    seen = rigs.observe(rigs.h36m4(), 4, noise=2.0, weights="uniform", seed=18)
    grad = np.random.default_rng(19).normal(size=(4, 3))
    points, weights = seen.points.copy(), seen.weights.copy()
    weights[1, 3] = np.nan
    points[2, :3] = np.nan
    grad_bad = grad.copy()
    grad_bad[[1, 2]] = np.nan
    good = [0, 3]
    for reweight in (0, 2):
        options: dict[str, Any] = {"mode": mode, "reweight": reweight}
        found = reference.triangulate(points, seen.projections, weights, **options)
        clean = reference.triangulate(
            seen.points[good], seen.projections, seen.weights[good], **options
        )
        np.testing.assert_array_equal(found[good], clean)
        assert np.isnan(found[[1, 2]]).all()
        gradients = reference.triangulate_vjp(
            grad_bad, points, seen.projections, weights, **options
        )
        alone = reference.triangulate_vjp(
            grad[good], seen.points[good], seen.projections, seen.weights[good], **options
        )
        np.testing.assert_array_equal(gradients[0][good], alone[0])
        np.testing.assert_allclose(gradients[1], alone[1], rtol=1e-12)  # shared, so summed
        assert gradients[2] is not None
        assert (gradients[0][[1, 2]] == 0.0).all()
        assert (gradients[2][[1, 2]] == 0.0).all()


# --- triangulation: shapes -----------------------------------------------------------------------


@laws
@given(rigs.batch_shapes(), st.sampled_from([0, 1, 2, 5]), st.booleans())
def test_triangulate_shapes(batch: tuple[int, ...], views: int, weighted: bool) -> None:
    projections = rigs.ring(5).projections[:views]
    points = np.ones((*batch, views, 2))
    weights = np.ones(views) if weighted else None
    found = reference.triangulate(points, projections, weights, reweight=1)
    assert found.shape == (*batch, 3)
    assert found.dtype == np.float64
    assert np.isnan(found).all() == (views < 2 or found.size == 0)
    gradients = reference.triangulate_vjp(np.ones(3), points, projections, weights, reweight=1)
    assert gradients[0].shape == points.shape
    assert gradients[1].shape == projections.shape
    assert (gradients[2] is None) == (weights is None)
    assert gradients[2] is None or gradients[2].shape == (views,)


@pytest.mark.parametrize(
    ("points", "projections", "weights", "options", "message"),
    [
        ((4, 17, 3), (4, 3, 4), None, {}, r"points must be \[..., C, 2\], got \(4, 17, 3\)"),
        ((2,), (4, 3, 4), None, {}, r"points must be \[..., C, 2\], got \(2,\)"),
        ((4, 2), (3, 3, 4), None, {}, r"projections must be .* with C = 4, got \(3, 3, 4\)"),
        ((4, 2), (3, 4), None, {}, r"projections must be .* got \(3, 4\)"),
        ((4, 2), (4, 3, 4), (5,), {}, r"weights must be .* got \(5,\)"),
        ((4, 2), (4, 3, 4), None, {"mode": "dlt"}, "mode must be .* got 'dlt'"),
        ((4, 2), (4, 3, 4), None, {"reweight": -1}, "reweight must be .* got -1"),
    ],
)
def test_wrong_arguments_raise_in_words(
    points: tuple[int, ...],
    projections: tuple[int, ...],
    weights: tuple[int, ...] | None,
    options: dict[str, Any],
    message: str,
) -> None:
    w = None if weights is None else np.ones(weights)
    with pytest.raises(ValueError, match=message):
        reference.triangulate(np.ones(points), np.ones(projections), w, **options)


# --- projection ----------------------------------------------------------------------------------


@laws
@given(rigs.rigs(), rigs.generators())
def test_project_is_the_pinhole_camera(rig: rigs.Rig, rng: np.random.Generator) -> None:
    y = rng.uniform(rigs.BOX_LOW, rigs.BOX_HIGH, size=(2, 3))
    pixels = reference.project(y, rig.projections)
    assert pixels.shape == (2, len(rig), 2)
    for n in range(2):
        for c in range(len(rig)):
            x, y_, z = rig.R[c] @ y[n] + rig.t[c]
            assert z > 0
            expected = rig.K[c][[0, 1], [0, 1]] * [x / z, y_ / z] + rig.K[c][:2, 2]
            np.testing.assert_allclose(pixels[n, c], expected, rtol=0.0, atol=1e-9)


def test_project_of_what_cannot_be_seen_is_nan_without_gradient() -> None:
    camera = np.eye(3, 4)
    cases = {
        "behind": ([1.0, 2.0, -3.0], camera),
        "in the camera plane": ([1.0, 2.0, 0.0], camera),
        "the camera centre": ([0.0, 0.0, 0.0], camera),
        "not a number": ([np.nan, 2.0, 3.0], camera),
        "at infinity": ([np.inf, 2.0, 3.0], camera),
        "NaN projection": ([1.0, 2.0, 3.0], np.where(np.eye(3, 4, k=1) > 0, np.nan, camera)),
        "infinite depth": ([1.0, 2.0, 3.0], np.where(np.eye(3, 4) > 0, [1, 1, np.inf, 1], camera)),
    }
    for name, (y, p) in cases.items():
        both = np.stack([p, camera])
        assert np.isnan(reference.project(y, p[None])).all(), name
        pixels = reference.project(np.array([1.0, 2.0, 3.0]), both)
        np.testing.assert_array_equal(pixels[1], [1.0 / 3.0, 2.0 / 3.0])
        for grad in (np.ones((1, 2)), np.full((1, 2), np.nan)):
            for gradient in reference.project_vjp(grad, y, p[None]):
                assert (gradient == 0.0).all(), name


def test_project_vjp_agrees_with_differences() -> None:
    rng = np.random.default_rng(20)
    y = rng.uniform(rigs.BOX_LOW, rigs.BOX_HIGH, size=(3, 1, 3))
    projections = rigs.h36m4().projections * rng.uniform(0.99, 1.01, size=(2, 4, 3, 4))
    projections[1, 2, 0, 0] = np.nan  # that view of that rig takes no part
    grad = rng.normal(size=(3, 2, 4, 2))

    def loss(y_: Array, p: Array) -> float:
        return float(np.nansum(grad * reference.project(y_, p)))

    grad_points, grad_projections = reference.project_vjp(grad, y, projections)
    assert_close(grad_points, numerical_gradient(lambda v: loss(v, projections), y, 10.0), 1e-9)
    steps = np.nan_to_num(1e-3 * np.maximum(np.abs(projections), 0.1), nan=1.0)
    numerical = numerical_gradient(lambda p: loss(y, p), projections, steps)
    assert_close(grad_projections * steps, numerical * steps, 1e-8)
    assert (grad_projections[1, 2] == 0.0).all()


@modes
def test_triangulate_inverts_project(mode: reference.Mode) -> None:
    y = np.random.default_rng(21).uniform(rigs.BOX_LOW, rigs.BOX_HIGH, size=(5, 2, 3))
    projections = rigs.pan31().projections
    pixels = reference.project(y, projections)
    found = reference.triangulate(pixels, projections, mode=mode)
    np.testing.assert_allclose(found, y, rtol=0.0, atol=1e-9)


def test_project_raises_on_shapes() -> None:
    with pytest.raises(ValueError, match=r"points must be \[..., 3\], got \(2,\)"):
        reference.project(np.ones(2), np.ones((4, 3, 4)))
    with pytest.raises(ValueError, match=r"projections must be \[..., C, 3, 4\], got \(3, 4\)"):
        reference.project(np.ones(3), np.ones((3, 4)))
