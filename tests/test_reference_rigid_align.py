# SPDX-License-Identifier: Apache-2.0
"""The definition of rigid_align on its own: SciPy, closed forms, laws, differences.

Nothing here may lean on anything else of the package.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import rigs
import scenes
from differences import assert_close, numerical_gradient
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from tritool import reference

Array = npt.NDArray[Any]

laws = settings(derandomize=True, deadline=None, max_examples=60)
scales = pytest.mark.parametrize("with_scale", [False, True])


def apply(transform: reference.RigidTransform, points: Array) -> Array:
    moved = np.einsum("...ij,...nj->...ni", transform.rotation, points)
    return np.asarray(
        transform.scale[..., None, None] * moved + transform.translation[..., None, :]
    )


def determinants_are_one(rotation: Array) -> bool:
    orthogonal = np.abs(rotation @ rotation.swapaxes(-1, -2) - np.eye(3)).max(initial=0.0) < 1e-13
    return bool(orthogonal and (np.abs(np.linalg.det(rotation) - 1.0) < 1e-13).all())


def loss_of(
    grads: tuple[Array, Array, Array], x: Array, y: Array, w: Array | None, **options: Any
) -> float:
    found = reference.rigid_align(x, y, w, **options)
    return float(sum((g * o).sum() for g, o in zip(grads, found, strict=True)))


def draw_grads(rng: np.random.Generator, batch: tuple[int, ...] = ()) -> tuple[Array, Array, Array]:
    """Draw gradients that weigh all three parts alike, for points some hundred mm apart."""
    return (
        500.0 * rng.normal(size=(*batch, 3, 3)),
        rng.normal(size=(*batch, 3)),
        500.0 * rng.normal(size=batch),
    )


# --- values --------------------------------------------------------------------------------------


@laws
@given(scenes.alignments(), st.booleans())
def test_the_rotation_is_the_one_of_scipy(sets: scenes.PointSets, with_scale: bool) -> None:
    found = reference.rigid_align(*sets.arguments, with_scale=with_scale)
    assert determinants_are_one(found.rotation)
    weights = np.ones(sets.source.shape[:-1]) if sets.weights is None else sets.weights
    for n in np.ndindex(sets.source.shape[:-2]):
        x, y, w = sets.source[n], sets.target[n], weights[n]
        kept = (w > 0.0) & ~np.isnan(x + y).any(-1)
        x, y, w = x[kept], y[kept], w[kept]
        mx, my = w @ x / w.sum(), w @ y / w.sum()
        m = (w[:, None] * (y - my)).T @ (x - mx)
        s = np.linalg.svd(m, compute_uv=False)
        gap = (s[1] + np.sign(np.linalg.det(m)) * s[2]) / s[0]
        far = (np.abs(x).max() + np.abs(y).max()) / np.abs(x - mx).max()
        expected = Rotation.align_vectors(y - my, x - mx, weights=w)[0].as_matrix()
        atol = 1e-14 * far / gap
        np.testing.assert_allclose(found.rotation[n], expected, rtol=0.0, atol=atol)
        scale = np.trace(found.rotation[n].T @ m) / (w * ((x - mx) ** 2).sum(-1)).sum()
        np.testing.assert_allclose(found.scale[n], scale if with_scale else 1.0, rtol=1e-12)
        moved = found.scale[n] * found.rotation[n] @ mx + found.translation[n]
        np.testing.assert_allclose(moved, my, rtol=0.0, atol=1e-11)


@laws
@given(scenes.alignments(max_noise=0.0))
def test_exact_motions_are_recovered(sets: scenes.PointSets) -> None:
    if sets.reflected and sets.kind != "planar":
        return  # no motion
    atol = rounding(sets)
    for with_scale in (True, False) if (sets.scale == 1.0).all() else (True,):
        found = reference.rigid_align(*sets.arguments, with_scale=with_scale)
        np.testing.assert_allclose(found.scale, sets.scale, rtol=1e-11)
        residual = apply(found, sets.source) - sets.target
        present = ~np.isnan(residual)
        if sets.weights is not None:
            present &= (sets.weights > 0.0)[..., None]
        np.testing.assert_allclose(residual[present], 0.0, atol=1e3 * atol)
        if not sets.reflected:
            np.testing.assert_allclose(found.rotation, sets.rotation, rtol=0.0, atol=atol)
        assert determinants_are_one(found.rotation)


@scales
def test_the_result_minimises_the_weighted_squares(with_scale: bool) -> None:
    rng = np.random.default_rng(0)
    for reflect in (False, True):
        sets = scenes.point_sets(
            "cloud", rng, batch=(30,), noise=80.0, reflect=reflect, weights="uniform"
        )
        x, y, w = sets.source, sets.target, sets.weights
        assert w is not None

        def cost(
            transform: reference.RigidTransform, x: Array = x, y: Array = y, w: Array = w
        ) -> Array:
            return np.asarray((w * ((y - apply(transform, x)) ** 2).sum(-1)).sum(-1))

        found = reference.rigid_align(x, y, w, with_scale=with_scale)
        assert (found.scale == 1.0).all() != with_scale
        for angle in (1e-4, 1e-2, 0.5, 3.0):
            axis = rng.normal(size=(30, 3))
            turn = Rotation.from_rotvec(angle * axis / np.linalg.norm(axis, axis=-1)[:, None])
            mean = (w[..., None] * x).sum(-2) / w.sum(-1)[:, None]
            rotation = found.rotation @ turn.as_matrix()
            # About the mean, so that the turn is not undone by what it moves.
            change = np.einsum("nij,nj->ni", found.rotation - rotation, mean)
            turned = reference.RigidTransform(
                rotation, found.translation + found.scale[:, None] * change, found.scale
            )
            assert (cost(turned) > cost(found)).all()
            moved = found._replace(translation=found.translation + 100.0 * angle * axis)
            assert (cost(moved) > cost(found)).all()
            if with_scale:
                change = found.scale[:, None] * np.einsum("nij,nj->ni", found.rotation, mean)
                for factor in (1.0 + 0.1 * angle, 1.0 - 0.1 * angle):
                    stretched = found._replace(
                        scale=factor * found.scale,
                        translation=found.translation + (1.0 - factor) * change,
                    )
                    assert (cost(stretched) > cost(found)).all()


def test_a_quarter_turn_and_a_mirror_in_closed_form() -> None:
    source = np.array([[3.0, 0, 0], [-3, 0, 0], [0, 2, 0], [0, -2, 0], [0, 0, 1], [0, 0, -1]])
    quarter = np.array([[0.0, -1, 0], [1, 0, 0], [0, 0, 1]])
    found = reference.rigid_align(source, 2.0 * source @ quarter.T + [1, 2, 3], with_scale=True)
    np.testing.assert_allclose(found.rotation, quarter, atol=1e-15)
    np.testing.assert_allclose(found.translation, [1.0, 2.0, 3.0], atol=1e-14)
    np.testing.assert_allclose(found.scale, 2.0, rtol=1e-15)
    # M of the mirror image is diag(-18, 8, 2): the least is lost to keep det R = 1.
    found = reference.rigid_align(source, source * [-1.0, 1.0, 1.0], with_scale=True)
    np.testing.assert_allclose(found.rotation, np.diag([-1.0, 1.0, -1.0]), atol=1e-15)
    np.testing.assert_allclose(found.scale, (18.0 + 8.0 - 2.0) / 28.0, rtol=1e-15)


def test_weights_are_numbers_of_points() -> None:
    """They count w, not w^2: a point of weight 3 is three points."""
    rng = np.random.default_rng(1)
    sets = scenes.point_sets("cloud", rng, count=6, noise=100.0)
    counts = np.array([3, 1, 2, 1, 4, 1])
    found = reference.rigid_align(sets.source, sets.target, counts, with_scale=True)
    repeated = reference.rigid_align(
        sets.source.repeat(counts, axis=0), sets.target.repeat(counts, axis=0), with_scale=True
    )
    for one, other in zip(found, repeated, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-11)


# --- laws ----------------------------------------------------------------------------------------


@laws
@given(scenes.alignments(kinds=["cloud"]), st.booleans(), rigs.generators())
def test_motions_of_source_and_target_compose(
    sets: scenes.PointSets, with_scale: bool, rng: np.random.Generator
) -> None:
    x, y, w = sets.arguments
    found = reference.rigid_align(x, y, w, with_scale=with_scale)
    q, d = scenes.rotations(rng), rng.uniform(-500.0, 500.0, 3)
    s = 1.7 if with_scale else 1.0
    of_target = reference.rigid_align(x, s * y @ q.T + d, w, with_scale=with_scale)
    of_source = reference.rigid_align(s * x @ q.T + d, y, w, with_scale=with_scale)
    atol = rounding(sets)
    np.testing.assert_allclose(of_target.rotation, q @ found.rotation, rtol=0.0, atol=atol)
    np.testing.assert_allclose(of_source.rotation, found.rotation @ q.T, rtol=0.0, atol=atol)
    np.testing.assert_allclose(of_target.scale, s * found.scale, rtol=1e-9)
    np.testing.assert_allclose(of_source.scale, found.scale / s, rtol=1e-9)
    moved = apply(found, x)
    np.testing.assert_allclose(apply(of_target, x), s * moved @ q.T + d, rtol=0.0, atol=1e4 * atol)
    np.testing.assert_allclose(apply(of_source, s * x @ q.T + d), moved, rtol=0.0, atol=1e4 * atol)


def rounding(sets: scenes.PointSets) -> float:
    """How far rotations may be apart: few points with spread weights determine little."""
    return 1e-13 / float(conditioning(sets).min(initial=1.0))


def conditioning(sets: scenes.PointSets) -> Array:
    """(s2 + d s3) / s1 of each set."""
    x, y = np.nan_to_num(sets.source), np.nan_to_num(sets.target)
    w = np.ones(x.shape[:-1]) if sets.weights is None else sets.weights
    w = w * ~np.isnan(sets.source + sets.target).any(-1)
    total = w.sum(-1)[..., None]
    x = x - ((w[..., None] * x).sum(-2) / total)[..., None, :]
    y = y - ((w[..., None] * y).sum(-2) / total)[..., None, :]
    m = np.einsum("...n,...ni,...nj->...ij", w, y, x)
    s = np.linalg.svd(m, compute_uv=False)
    return np.asarray((s[..., 1] + np.sign(np.linalg.det(m)) * s[..., 2]) / s[..., 0])


@laws
@given(scenes.alignments(kinds=["cloud", "planar"]), st.booleans(), rigs.generators())
def test_absent_points_are_not_there(
    sets: scenes.PointSets, with_scale: bool, rng: np.random.Generator
) -> None:
    x, y, w = sets.arguments
    w = np.ones(x.shape[:-1]) if w is None else w
    at = int(rng.integers(x.shape[-2] + 1))
    grads = draw_grads(rng, x.shape[:-2])
    found = reference.rigid_align(x, y, w, with_scale=with_scale)
    x, y = (np.insert(a, at, 1e3 * rng.normal(size=3), axis=-2) for a in (x, y))
    w = np.insert(w, at, 0.0, axis=-1)
    for junk, weight in (
        (0.0, 0.0),
        (np.inf, 0.0),
        (np.nan, np.nan),
        (np.nan, -1.0),
        (np.nan, 2.0),
    ):
        x[..., at, 1] = junk
        w[..., at] = weight
        again = reference.rigid_align(x, y, w, with_scale=with_scale)
        for one, other in zip(again, found, strict=True):
            np.testing.assert_allclose(one, other, rtol=0.0, atol=1e4 * rounding(sets))
        for gradient in reference.rigid_align_vjp(grads, x, y, w, with_scale=with_scale):
            assert gradient is not None
            assert (np.take(gradient, at, axis=x.ndim - 2) == 0.0).all()


@laws
@given(scenes.alignments(kinds=["cloud"]), st.booleans(), rigs.generators())
def test_order_and_common_scale_of_weights_do_not_matter(
    sets: scenes.PointSets, with_scale: bool, rng: np.random.Generator
) -> None:
    x, y, w = sets.arguments
    w = np.ones(x.shape[:-1]) if w is None else w
    found = reference.rigid_align(x, y, w, with_scale=with_scale)
    order = rng.permutation(x.shape[-2])
    moved = reference.rigid_align(
        x[..., order, :], y[..., order, :], 0.37 * w[..., order], with_scale=with_scale
    )
    for one, other in zip(moved, found, strict=True):
        np.testing.assert_allclose(one, other, rtol=0.0, atol=1e4 * rounding(sets))
    grads = draw_grads(rng, x.shape[:-2])
    gradients = reference.rigid_align_vjp(grads, x, y, w, with_scale=with_scale)
    for exponent in (-900, 900):
        scaled = reference.rigid_align(x, y, np.ldexp(w, exponent), with_scale=with_scale)
        for one, other in zip(scaled, found, strict=True):
            np.testing.assert_array_equal(one, other)
        again = reference.rigid_align_vjp(grads, x, y, np.ldexp(w, exponent), with_scale=with_scale)
        np.testing.assert_array_equal(again[0], gradients[0])
        assert again[2] is not None
        np.testing.assert_array_equal(np.ldexp(again[2], exponent), gradients[2])


@laws
@given(scenes.alignments(kinds=["cloud"]), rigs.generators())
def test_gradients_know_what_does_not_move_the_result(
    sets: scenes.PointSets, rng: np.random.Generator
) -> None:
    x, y, w = sets.arguments
    w = np.ones(x.shape[:-1]) if w is None else w
    batch = x.shape[:-2]
    grads = draw_grads(rng, batch)
    _, grad_y, grad_w = reference.rigid_align_vjp(grads, x, y, w, with_scale=True)
    assert grad_w is not None
    bound = 1e-8 * (np.abs(w * grad_w).sum(-1) + 1.0)
    assert (np.abs((w * grad_w).sum(-1)) <= bound).all()
    # A shift of the target moves the translation alone.
    np.testing.assert_allclose(grad_y.sum(-2), grads[1], rtol=1e-7, atol=1e-7)


# --- gradients -----------------------------------------------------------------------------------


@scales
@pytest.mark.parametrize(
    ("kind", "reflect"),
    [*((kind, False) for kind in scenes.SHAPES), ("cloud", True), ("planar", True)],
)
def test_vjp_agrees_with_differences(kind: str, reflect: bool, with_scale: bool) -> None:
    rng = np.random.default_rng(2)
    sets = scenes.point_sets(
        kind, rng, count=5, noise=20.0, reflect=reflect, scaled=True, weights="uniform"
    )
    x, y, w = sets.arguments
    assert w is not None
    grads = draw_grads(rng)
    found = reference.rigid_align_vjp(grads, x, y, w, with_scale=with_scale)

    def loss(a: Array, b: Array, c: Array) -> float:
        return loss_of(grads, a, b, c, with_scale=with_scale)

    assert_close(found[0], numerical_gradient(lambda v: loss(v, y, w), x, 0.3), 1e-6)
    assert_close(found[1], numerical_gradient(lambda v: loss(x, v, w), y, 0.3), 1e-6)
    assert found[2] is not None
    assert_close(found[2], numerical_gradient(lambda v: loss(x, y, v), w, 1e-4), 1e-6)


@scales
@pytest.mark.parametrize("kind", ["cube", "simplex"])
def test_equal_singular_values_do_no_harm(kind: str, with_scale: bool) -> None:
    """A cube and a regular simplex onto themselves, turned: M is a multiple of a rotation."""
    rng = np.random.default_rng(3)
    sets = scenes.point_sets(kind, rng)
    x, y, _ = sets.arguments
    centred = y - y.mean(0)
    singular = np.linalg.svd(centred.T @ (x - x.mean(0)), compute_uv=False)
    np.testing.assert_allclose(singular, singular[0], rtol=1e-12)
    grads = draw_grads(rng)
    found = reference.rigid_align_vjp(grads, x, y, with_scale=with_scale)
    for gradient, at in ((found[0], 0), (found[1], 1)):

        def loss(v: Array, at: int = at) -> float:
            return loss_of(grads, *((v, y) if at == 0 else (x, v)), None, with_scale=with_scale)

        assert np.isfinite(gradient).all()
        assert_close(gradient, numerical_gradient(loss, (x, y)[at], 0.3), 1e-7)
    assert found[2] is None


def test_gradients_are_summed_over_broadcasts_and_none_is_zero() -> None:
    rng = np.random.default_rng(4)
    x = 300.0 * rng.normal(size=(2, 1, 5, 3))
    y = 300.0 * rng.normal(size=(3, 5, 3))
    w = rng.uniform(0.1, 1.0, (2, 1, 5))
    grads = draw_grads(rng, (2, 3))
    found = reference.rigid_align_vjp(grads, x, y, w, with_scale=True)
    full = reference.rigid_align_vjp(
        grads,
        np.broadcast_to(x, (2, 3, 5, 3)),
        np.broadcast_to(y, (2, 3, 5, 3)),
        np.broadcast_to(w, (2, 3, 5)),
        with_scale=True,
    )
    assert found[2] is not None
    assert full[2] is not None
    np.testing.assert_allclose(found[0], full[0].sum(1, keepdims=True), rtol=1e-12)
    np.testing.assert_allclose(found[1], full[1].sum(0), rtol=1e-12)
    np.testing.assert_allclose(found[2], full[2].sum(1, keepdims=True), rtol=1e-12)
    parts = [
        reference.rigid_align_vjp(
            tuple(g if i == j else None for j, g in enumerate(grads)), x, y, w, with_scale=True
        )
        for i in range(3)
    ]
    assert_close(sum(part[0] for part in parts), found[0], 1e-12)
    without_scale = reference.rigid_align_vjp((None, None, grads[2]), x, y, w)
    assert all(g is not None and (g == 0.0).all() for g in without_scale)


# --- degenerate sets -----------------------------------------------------------------------------


@scales
@pytest.mark.parametrize("reason", scenes.UNALIGNABLE)
def test_what_determines_no_motion_is_nan_without_gradient(reason: str, with_scale: bool) -> None:
    for seed in range(5):
        sets = scenes.unalignable(reason, np.random.default_rng(seed))
        for tau in (1e-13, 1e-6):
            for part in reference.rigid_align(*sets.arguments, with_scale=with_scale, tau=tau):
                assert np.isnan(part).all()
            for value in (1.0, np.nan):
                grads = (np.full((3, 3), value), np.full(3, value), np.array(value))
                for gradient, argument in zip(
                    reference.rigid_align_vjp(
                        grads, *sets.arguments, with_scale=with_scale, tau=tau
                    ),
                    sets.arguments,
                    strict=True,
                ):
                    assert gradient is not None
                    assert argument is not None
                    assert gradient.shape == argument.shape
                    assert (gradient == 0.0).all()


@laws
@given(scenes.alignments())
def test_in_float32_the_threshold_keeps_what_determines_a_motion(sets: scenes.PointSets) -> None:
    single = sets.astype(np.float32)
    found = reference.rigid_align(*single.arguments, tau=1e-6)
    determined = conditioning(sets) > 1e-5
    assert np.isfinite(found.rotation[determined]).all()
    assert determined.all() or sets.weights is not None or sets.kind == "three points"


def test_what_is_not_correlated_determines_no_motion() -> None:
    """M is then nothing but rounding, whose singular values look as sound as any."""
    for seed in range(20):
        rng = np.random.default_rng(seed)
        to_one_side, same = rng.normal(0.0, 400.0, (2, 6, 3))
        source = np.concatenate([to_one_side, -to_one_side]) + rng.normal(0.0, 400.0, 3)
        target = np.concatenate([same, same]) + rng.normal(0.0, 400.0, 3)
        m = (target - target.mean(0)).T @ (source - source.mean(0))
        values = np.linalg.svd(m)[1]
        assert values[1] - values[2] > 1e-13 * values[0] > 0.0
        for with_scale in (False, True):
            for part in reference.rigid_align(source, target, with_scale=with_scale):
                assert np.isnan(part).all()
            grads = (np.full((3, 3), np.nan), np.ones(3), np.array(1.0))
            gradients = reference.rigid_align_vjp(grads, source, target, with_scale=with_scale)
            assert gradients[2] is None
            for gradient in gradients[:2]:
                assert gradient is not None
                assert (gradient == 0.0).all()
        # A trace of correlation is enough.
        assert np.isfinite(reference.rigid_align(source, target + 1e-9 * source).rotation).all()


def test_one_degenerate_set_leaves_the_others_alone() -> None:
    rng = np.random.default_rng(5)
    sets = scenes.point_sets("cloud", rng, batch=(4,), noise=50.0, weights="uniform")
    x, y, w = (np.array(a) for a in sets.arguments)
    grads = draw_grads(rng, (4,))
    clean = reference.rigid_align(x, y, w, with_scale=True)
    clean_gradients = reference.rigid_align_vjp(grads, x, y, w, with_scale=True)
    w[1, 2] = np.nan
    x[2] = x[2, :1]
    for g in grads:
        g[[1, 2]] = np.nan
    found = reference.rigid_align(x, y, w, with_scale=True)
    gradients = reference.rigid_align_vjp(grads, x, y, w, with_scale=True)
    for after, before in zip(found, clean, strict=True):
        np.testing.assert_array_equal(after[[0, 3]], before[[0, 3]])
        assert np.isnan(after[[1, 2]]).all()
    for after, before in zip(gradients, clean_gradients, strict=True):
        assert after is not None
        assert before is not None
        np.testing.assert_array_equal(after[[0, 3]], before[[0, 3]])
        assert (after[[1, 2]] == 0.0).all()


# --- shapes --------------------------------------------------------------------------------------


@laws
@given(rigs.batch_shapes(), st.sampled_from([0, 1, 3, 7]), st.booleans())
def test_shapes(batch: tuple[int, ...], count: int, weighted: bool) -> None:
    source = np.random.default_rng(6).normal(size=(*batch, count, 3))
    target = np.random.default_rng(7).normal(size=(count, 3))
    weights = np.ones(count) if weighted else None
    found = reference.rigid_align(source, target, weights)
    assert found.rotation.shape == (*batch, 3, 3)
    assert found.translation.shape == (*batch, 3)
    assert found.scale.shape == batch
    assert np.isnan(found.scale).all() == (count < 3 or found.scale.size == 0)
    gradients = reference.rigid_align_vjp((np.eye(3), np.ones(3), 1.0), source, target, weights)
    assert gradients[0].shape == source.shape
    assert gradients[1].shape == target.shape
    assert (gradients[2] is None) == (weights is None)
    assert gradients[2] is None or gradients[2].shape == (count,)


@pytest.mark.parametrize(
    ("source", "target", "weights", "message"),
    [
        ((17, 2), (17, 3), None, r"source must be \[..., N, 3\], got \(17, 2\)"),
        ((3,), (3,), None, r"source must be \[..., N, 3\], got \(3,\)"),
        ((17, 3), (16, 3), None, r"target must be .* with N = 17, got \(16, 3\)"),
        ((17, 3), (17, 3), (3,), r"weights must be .* with N = 17, got \(3,\)"),
    ],
)
def test_wrong_shapes_raise_in_words(
    source: tuple[int, ...], target: tuple[int, ...], weights: tuple[int, ...] | None, message: str
) -> None:
    w = None if weights is None else np.ones(weights)
    with pytest.raises(ValueError, match=message):
        reference.rigid_align(np.ones(source), np.ones(target), w)
