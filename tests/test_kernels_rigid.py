# SPDX-License-Identifier: Apache-2.0
"""The rigid-alignment kernels of every backend against `tritool.reference`.

The bounds on float32 are those of docs/ops/rigid_align.md.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest
import scenes
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_bridge import (
    CUDA,
    Alignment,
    Array,
    Kernels,
    assert_same_bits,
    assert_zero,
    every_kernel,
    other_workers,
)

from tritool import reference

laws = settings(derandomize=True, deadline=None, max_examples=12)
scales = pytest.mark.parametrize("with_scale", [False, True], ids=["rigid", "scaled"])

# How the targets come about from the sources.
KINDS = ("generic", "near exact", "planar", "mirrored", "cube", "elongated")


class PointSets(NamedTuple):
    """Sources and targets [count, N, 3] and weights [count, N]."""

    source: Array
    target: Array
    weights: Array


def rotations(rng: np.random.Generator, count: int) -> Array:
    q = np.linalg.qr(rng.standard_normal((count, 3, 3)))[0]
    return q * np.linalg.det(q)[:, None, None]


def point_sets(
    kind: str, count: int, points: int, seed: int = 0, distance: float = 3000.0
) -> PointSets:
    """Make sets of the size of a person in mm, some metres from the origin."""
    rng = np.random.default_rng(seed)
    local = rng.standard_normal((count, points, 3)) * [200.0, 250.0, 450.0]
    if kind == "cube":
        corners = np.stack(np.meshgrid(*[[-1.0, 1.0]] * 3), -1).reshape(8, 3)
        local = np.broadcast_to(300.0 * corners, (count, 8, 3)).copy()
    if kind == "planar":
        local[..., 2] = 0.0
    if kind == "elongated":
        local *= [0.02, 0.02, 1.0]
    noise = {"near exact": 0.0, "cube": 0.0, "elongated": 0.5}.get(kind, 25.0)
    moved = local * ([-1.0, 1.0, 1.0] if kind == "mirrored" else 1.0)
    moved = moved * rng.uniform(0.5, 2.0, (count, 1, 1)) @ rotations(rng, count).mT
    target = moved + noise * rng.standard_normal(local.shape)
    shifts = distance * rng.standard_normal((2, count, 1, 3))
    weights = 10.0 ** rng.uniform(-1.5, 0.5, local.shape[:2])
    return PointSets(local + shifts[0], target + shifts[1], weights)


def gradients_for(rng: np.random.Generator, batch: tuple[int, ...]) -> tuple[Array, Array, Array]:
    """Gradients as a loss on aligned points in mm gives them: those to rotations are larger."""
    return (
        500.0 * rng.standard_normal((*batch, 3, 3)),
        rng.standard_normal((*batch, 3)),
        500.0 * rng.standard_normal(batch),
    )


def tau_of(kernels: Kernels) -> float:
    return 1e-6 if kernels.dtype == np.float32 else 1e-13


def conditioning(sets: PointSets) -> Array:
    """Return (s2 + det s3) / s1 of each set: 1 is well posed, 0 degenerate."""
    source, target, weights = (a.astype(np.float64) for a in sets)
    share = weights[..., None] / weights.sum(-1)[..., None, None]
    x, y = (p - (share * p).sum(-2, keepdims=True) for p in (source, target))
    m = (share * y).mT @ x
    s = np.linalg.svd(m, compute_uv=False)
    return np.asarray((s[..., 1] + np.sign(np.linalg.det(m)) * s[..., 2]) / s[..., 0])


def check(kernels: Kernels, sets: PointSets, with_scale: bool, rng: np.random.Generator) -> None:
    """Compare values and gradients with the reference, in roundings."""
    sets = PointSets(*kernels.cast(*sets))
    # In float64 the reference is no more exact than the kernel: its own rounding counts, too.
    eps = np.finfo(kernels.dtype).eps * (1.0 if kernels.dtype == np.float32 else 20.0)
    gap = conditioning(sets)
    posed = gap > (1e-3 if kernels.dtype == np.float32 else 1e-6)
    exact = [a.astype(np.float64) for a in sets]
    found = kernels.rigid_align(*sets, with_scale=with_scale)
    expected = reference.rigid_align(*exact, with_scale=with_scale)
    rotation = found.rotation.astype(np.float64)
    error = np.abs(rotation - expected.rotation).max((-1, -2))
    assert (error <= 4.0 * eps / gap)[posed].all()
    assert (np.abs(rotation.mT @ rotation - np.eye(3)).max((-1, -2)) <= 4.0 * eps).all()
    assert (np.linalg.det(rotation) > 0).all()
    assert (np.abs(found.scale / expected.scale - 1.0) <= 12.0 * eps)[posed].all()
    far = np.abs(exact[0]).max((-1, -2)) * expected.scale + np.abs(exact[1]).max((-1, -2))
    error = np.abs(found.translation - expected.translation).max(-1)
    assert (error <= 12.0 * eps * far / gap)[posed].all()
    if not with_scale:
        assert (found.scale == 1.0).all()

    grads = kernels.cast(*gradients_for(rng, gap.shape))
    found_gradients = kernels.rigid_align_vjp(grads, *sets, with_scale=with_scale)
    exact_grads = [g.astype(np.float64) for g in grads]
    expected_gradients = reference.rigid_align_vjp(exact_grads, *exact, with_scale=with_scale)
    # t depends on R by way of the source's mean: distance over size enters, as the gradient to R
    # is made of terms that much larger.
    spread = np.abs(exact[0] - exact[0].mean(-2, keepdims=True)).max((-1, -2))
    leverage = 1.0 + np.abs(exact[0]).max((-1, -2)) / spread
    for name, a, b in zip(
        ("source", "target", "weights"), found_gradients, expected_gradients, strict=True
    ):
        assert b is not None
        axes = tuple(range(1, a.ndim))
        size = np.abs(b).max(axes)
        if name == "weights":
            # e . dL/dy / w, where the residual e is a difference of the points themselves.
            y = np.abs(exact[1] - exact[1].mean(-2, keepdims=True))
            size = ((np.abs(expected_gradients[1]) * y).sum(-1) / exact[2]).max(-1)
        relative = np.abs(a - b).max(axes) / size
        assert (relative <= 40.0 * eps * leverage / gap)[posed].all(), name


@every_kernel
@scales
@pytest.mark.parametrize("kind", KINDS)
def test_agrees_with_the_reference(kernels: Kernels, kind: str, with_scale: bool) -> None:
    rng = np.random.default_rng(1)
    for points, distance in ((4, 0.0), (17, 3000.0), (70, 500.0)):
        check(kernels, point_sets(kind, 37, points, points, distance), with_scale, rng)


@every_kernel
def test_large_gradients_are_those_of_their_parts(kernels: Kernels) -> None:
    """Large results are written past the caches, small ones not."""
    points, count = 32, 50 if kernels.backend == CUDA else 44000
    sets = PointSets(*kernels.cast(*point_sets("generic", count, points)))
    assert kernels.backend == CUDA or sets.source.nbytes > 16 << 20
    grads = kernels.cast(*gradients_for(np.random.default_rng(3), (count,)))
    found = kernels.rigid_align_vjp(grads, *sets, with_scale=True)
    for some in np.array_split(np.arange(count), 5):
        part = kernels.rigid_align_vjp(
            [grad[some] for grad in grads], *(array[some] for array in sets), with_scale=True
        )
        for a, b in zip(found, part, strict=True):
            assert_same_bits(a[some], b)


@every_kernel
@laws
@given(st.sampled_from(KINDS), st.integers(4, 40), st.booleans(), st.integers(0, 10**6))
def test_agrees_with_the_reference_on_any_set(
    kernels: Kernels, kind: str, points: int, with_scale: bool, seed: int
) -> None:
    check(kernels, point_sets(kind, 5, points, seed), with_scale, np.random.default_rng(seed))


@every_kernel
def test_keeps_its_bounds_on_people(kernels: Kernels) -> None:
    """The figures that docs/ops/rigid_align.md gives, with room for other instruction sets."""
    count = 500 if kernels.backend == CUDA else 5000
    sets = PointSets(*kernels.cast(*point_sets("generic", count, 17)))
    posed = conditioning(sets) > 0.2
    assert posed.mean() > 0.8
    eps = np.finfo(kernels.dtype).eps * (1.0 if kernels.dtype == np.float32 else 20.0)
    exact = [a.astype(np.float64) for a in sets]
    found = kernels.rigid_align(*sets, with_scale=True)
    expected = reference.rigid_align(*exact, with_scale=True)
    error = np.abs(found.rotation - expected.rotation).max((-1, -2))[posed]
    assert np.median(error) < eps  # 1.2e-7 in float32
    assert error.max() < 5.0 * eps
    grads = kernels.cast(*gradients_for(np.random.default_rng(2), (count,)))
    gradients = kernels.rigid_align_vjp(grads, *sets, with_scale=True)
    exact_grads = [g.astype(np.float64) for g in grads]
    wanted = reference.rigid_align_vjp(exact_grads, *exact, with_scale=True)
    # Of the weights' gradient, residuals of 25 mm in 500 mm cost a digit.
    for a, b, bound in zip(gradients, wanted, (20.0, 20.0, 500.0), strict=True):
        assert b is not None
        axes = tuple(range(1, a.ndim))
        relative = np.linalg.norm(a - b, axis=axes) / np.linalg.norm(b, axis=axes)
        assert np.quantile(relative[posed], 0.999) < bound * eps


@every_kernel
@scales
def test_equal_singular_values_are_no_special_case(kernels: Kernels, with_scale: bool) -> None:
    """A cube onto itself, exactly: the derivative of a library's SVD is NaN there."""
    source = point_sets("cube", 9, 8, distance=0.0).source
    sets = PointSets(source, 2.0 * source, np.ones(source.shape[:2]))
    found = kernels.rigid_align(*sets, with_scale=with_scale)
    np.testing.assert_allclose(found.rotation, np.broadcast_to(np.eye(3), (9, 3, 3)), atol=1e-6)
    check(kernels, sets, with_scale, np.random.default_rng(3))


# --- laws ----------------------------------------------------------------------------------------


@every_kernel
@laws
@given(st.sampled_from(KINDS), st.integers(4, 20), st.booleans(), st.integers(0, 10**6))
def test_an_absent_point_does_not_matter(
    kernels: Kernels, kind: str, points: int, with_scale: bool, seed: int
) -> None:
    """Weight 0 or a NaN coordinate; whatever else the point holds, its gradients are exactly 0."""
    rng = np.random.default_rng(seed)
    sets = point_sets(kind, 5, points, seed)
    count = sets.source.shape[1]
    at = int(rng.integers(count + 1))
    source = np.insert(sets.source, at, rng.standard_normal((5, 3)), axis=-2)
    target = np.insert(sets.target, at, rng.standard_normal((5, 3)), axis=-2)
    weights = np.insert(sets.weights, at, 0.0, axis=-1)
    grads = gradients_for(rng, (5,))
    first = kernels.rigid_align(source, target, weights, with_scale=with_scale)
    gradients = kernels.rigid_align_vjp(grads, source, target, weights, with_scale=with_scale)
    for gradient, axis in zip(gradients, (-2, -2, -1), strict=True):
        assert_zero(gradient.take(at, axis))
    if count < 32:  # one group of the sums either way
        without = kernels.rigid_align(*sets, with_scale=with_scale)
        assert_same_bits(first, without)

    for reason in ("weight", "source", "target"):
        moved, to, given = source.copy(), target.copy(), weights.copy()
        moved[:, at], to[:, at] = rng.choice([np.nan, np.inf, 7.0], (2, 5, 3))
        if reason == "weight":
            given[:, at] = 0.0
        else:
            given[:, at] = rng.choice([2.0, np.nan, -1.0, np.inf])
            (moved if reason == "source" else to)[:, at, rng.integers(3)] = np.nan
        found = kernels.rigid_align(moved, to, given, with_scale=with_scale)
        assert_same_bits(found, first)
        others = kernels.rigid_align_vjp(grads, moved, to, given, with_scale=with_scale)
        assert_same_bits(others, gradients)


@every_kernel
@laws
@given(st.sampled_from(KINDS), st.integers(4, 40), st.booleans(), st.integers(0, 10**6))
def test_powers_of_two_change_no_rounding(
    kernels: Kernels, kind: str, points: int, with_scale: bool, seed: int
) -> None:
    """Of the weights and of either unit."""
    sets = PointSets(*kernels.cast(*point_sets(kind, 5, points, seed)))
    grads = gradients_for(np.random.default_rng(seed), (5,))
    first = kernels.rigid_align(*sets, with_scale=with_scale)
    gradients = kernels.rigid_align_vjp(grads, *sets, with_scale=with_scale)
    for power in (-50, 3, 40):
        scaled = np.ldexp(sets.weights, power)
        found = kernels.rigid_align(sets.source, sets.target, scaled, with_scale=with_scale)
        assert_same_bits(found, first)
        others = kernels.rigid_align_vjp(
            grads, sets.source, sets.target, scaled, with_scale=with_scale
        )
        assert_same_bits(others[:2], gradients[:2])
        assert_same_bits(np.ldexp(others[2], power), gradients[2])
    for power in (-10, 12):
        unit = np.ldexp(sets.source, power), np.ldexp(sets.target, power), sets.weights
        found = kernels.rigid_align(*unit, with_scale=with_scale)
        assert_same_bits((found.rotation, found.scale), (first.rotation, first.scale))
        assert_same_bits(found.translation, np.ldexp(first.translation, power))


@every_kernel
@laws
@given(st.integers(5, 20), st.booleans(), st.integers(0, 10**6))
def test_gradients_know_what_does_not_move_the_result(
    kernels: Kernels, points: int, with_scale: bool, seed: int
) -> None:
    """A common factor of the weights; R and s do not see where either set lies."""
    sets = PointSets(*kernels.cast(*point_sets("generic", 5, points, seed)))
    grads = gradients_for(np.random.default_rng(seed), (5,))
    posed = conditioning(sets) > 0.05
    eps = np.finfo(kernels.dtype).eps
    *_, to_weights = kernels.rigid_align_vjp(grads, *sets, with_scale=with_scale)
    terms = sets.weights.astype(np.float64) * to_weights
    assert (np.abs(terms.sum(-1)) <= 1e3 * eps * np.abs(terms).sum(-1))[posed].all()
    only = (grads[0], None, grads[2])
    for gradient in kernels.rigid_align_vjp(only, *sets, with_scale=with_scale)[:2]:
        total, size = gradient.astype(np.float64).sum(-2), np.abs(gradient).sum(-2)
        assert (np.abs(total).max(-1) <= 100 * eps * size.max(-1))[posed].all()
    _, to_target, _ = kernels.rigid_align_vjp((None, grads[1], None), *sets, with_scale=with_scale)
    total = to_target.astype(np.float64).sum(-2)
    np.testing.assert_allclose(total[posed], grads[1][posed], rtol=0, atol=1e3 * eps * 10)


# --- degenerate sets -----------------------------------------------------------------------------


def degenerate_sets(rng: np.random.Generator) -> dict[str, PointSets]:
    """One set each; all but the last few hold only finite numbers."""
    source, target, weights = (a[0] for a in point_sets("generic", 1, 6, 5, 0.0))
    along = np.array([1.0, -2.0, 0.5])
    line = rng.standard_normal((6, 1)) * along * 100.0
    cross = 300.0 * np.concatenate([np.eye(3), -np.eye(3)])
    turned = cross @ rotations(rng, 1)[0].T
    prism = cross * [2.0, 1.0, 1.0]
    return {
        "no point": PointSets(source[:0], target[:0], weights[:0]),
        "one point": PointSets(source[:1], target[:1], weights[:1]),
        "one point, weight 0.3": PointSets(source[:1], target[:1], weights[:1] * 0.0 + 0.3),
        "two points": PointSets(source[:2], target[:2], weights[:2]),
        "source in one place": PointSets(np.repeat(source[:1], 6, 0), target, weights),
        "target in one place": PointSets(source, np.repeat(target[:1], 6, 0), weights),
        "source on a line": PointSets(line, target, weights),
        "target on a line": PointSets(source, line, weights),
        "no weight": PointSets(source, target, 0.0 * weights),
        "two weights": PointSets(source, target, weights * (np.arange(6) < 2)),
        "all NaN": PointSets(np.full_like(source, np.nan), target, weights),
        "point reflection": PointSets(cross, -2.0 * cross, np.ones(6)),
        "turned reflection": PointSets(cross, -turned, np.ones(6)),
        "mirror image with a free axis": PointSets(prism, prism * [1.0, 1.0, -1.0], np.ones(6)),
        "negative weight": PointSets(source, target, np.where(np.arange(6) == 2, -1.0, weights)),
        "NaN weight": PointSets(source, target, np.where(np.arange(6) == 4, np.nan, weights)),
        "infinite weight": PointSets(source, target, np.where(np.arange(6) == 0, np.inf, weights)),
        "infinite source": PointSets(
            np.where(np.arange(18).reshape(6, 3) == 7, np.inf, source), target, weights
        ),
        "infinite target": PointSets(
            source, np.where(np.arange(18).reshape(6, 3) == 0, -np.inf, target), weights
        ),
    }


@every_kernel
@scales
def test_degenerate_sets_are_nan_without_gradient(kernels: Kernels, with_scale: bool) -> None:
    for seed in range(5):
        rng = np.random.default_rng(seed)
        for reason, bad in degenerate_sets(rng).items():
            expected = reference.rigid_align(
                *bad, with_scale=with_scale, tau=tau_of(kernels) * (1 + 1e-3)
            )
            assert np.isnan(expected.rotation).all(), reason
            found = kernels.rigid_align(*bad, with_scale=with_scale)
            for value in found:
                assert np.isnan(value).all(), reason
            for incoming in (1.0, np.nan, np.inf):
                grads = tuple(np.full(shape, incoming) for shape in ((3, 3), (3,), ()))
                gradients = kernels.rigid_align_vjp(grads, *bad, with_scale=with_scale)
                assert_zero(*gradients)


@every_kernel
@scales
@pytest.mark.parametrize("reason", scenes.UNALIGNABLE)
def test_unalignable_sets_are_nan_without_gradient(
    kernels: Kernels, reason: str, with_scale: bool
) -> None:
    """The sets of the reference's own tests, some metres from the origin."""
    tested = 0
    for seed in range(20):
        bad = scenes.unalignable(reason, np.random.default_rng(seed)).astype(kernels.dtype)
        bad = bad.astype(np.float64).arguments
        # A line some metres away is no line any more after rounding to float32.
        expected = reference.rigid_align(*bad, tau=0.5 * tau_of(kernels)).rotation
        if "line" in reason and np.isfinite(expected).all():
            continue
        tested += 1
        found = kernels.rigid_align(*bad, with_scale=with_scale)
        assert all(np.isnan(value).all() for value in found)
        grads = tuple(np.full(shape, np.nan) for shape in ((3, 3), (3,), ()))
        gradients = kernels.rigid_align_vjp(grads, *bad, with_scale=with_scale)
        assert_zero(*gradients)
    assert tested >= 5


@every_kernel
def test_nearly_degenerate_sets_are_still_rotations(kernels: Kernels) -> None:
    """Close to a line: what is there of a second direction is used as far as the dtype carries."""
    rng = np.random.default_rng(4)
    for thickness in (1e-1, 1e-2) if kernels.dtype == np.float32 else (1e-2, 1e-4, 1e-5):
        source = rng.standard_normal((50, 12, 3)) * [1.0, thickness, thickness]
        target = source @ rotations(rng, 50).mT
        sets = PointSets(*kernels.cast(source, target, np.ones((50, 12))))
        found = kernels.rigid_align(*sets).rotation.astype(np.float64)
        assert np.isfinite(found).all()
        eps = np.finfo(kernels.dtype).eps
        assert np.abs(found.mT @ found - np.eye(3)).max() < 4 * eps
        check(kernels, sets, False, rng)


@every_kernel
def test_a_spoilt_set_leaves_its_neighbours_alone(kernels: Kernels) -> None:
    """Neighbours share SIMD lanes and warps."""
    sets = PointSets(*kernels.cast(*point_sets("generic", 35, 6)))
    grads = kernels.cast(*gradients_for(np.random.default_rng(6), (35,)))
    first = kernels.rigid_align(*sets, with_scale=True)
    first_gradients = kernels.rigid_align_vjp(grads, *sets, with_scale=True)
    bad = degenerate_sets(np.random.default_rng(7))
    for spoilt in (0, 3, 15, 16, 34):
        others = np.arange(35) != spoilt
        for reason, one in bad.items():
            if one.source.shape != (6, 3):
                continue
            arrays = [a.copy() for a in sets]
            incoming = [g.copy() for g in grads]
            for array, values in zip(arrays, one, strict=True):
                array[spoilt] = values
            for g in incoming:
                g[spoilt] = np.nan
            found = kernels.rigid_align(*arrays, with_scale=True)
            assert np.isnan(found.rotation[spoilt]).all(), reason
            assert_same_bits(tuple(f[others] for f in found), tuple(f[others] for f in first))
            gradients = kernels.rigid_align_vjp(incoming, *arrays, with_scale=True)
            assert_zero(*(g[spoilt] for g in gradients))
            assert_same_bits(
                tuple(g[others] for g in gradients), tuple(g[others] for g in first_gradients)
            )


# --- batches -------------------------------------------------------------------------------------


def batches(kernels: Kernels) -> dict[str, tuple[Array, Array, Array]]:
    """Return source, target and weights [batch, ...] of awkward strides."""
    sets = point_sets("generic", 5 * 7 * 2, 9)
    source, target, weights = kernels.cast(*(a.reshape(5, 7, 2, *a.shape[1:]) for a in sets))
    return {
        "plain": (source, target, weights),
        "one source": (source[0, 0, 0], target, weights),
        "one target": (source, target[0, 0, 0], weights),
        "shared by the last": (source[:, :, :1], target, weights[0, 0]),
        "shared by the middle": (source, target[:, :1], weights[:, :1]),
        "broadcast weights": (source, target, np.broadcast_to(kernels.dtype(1), weights.shape)),
        "one set": (source[0, 0, 0], target[0, 0, 0], weights[0, 0, 0]),
        "reversed": (source[::-1, :, :, ::-1], target[::-1, :, :, ::-1], weights[::-1, ..., ::-1]),
        "steps": (source[::2, 1::3, :, ::2], target[::2, 1::3, :, ::2], weights[::2, 1::3, :, ::2]),
        "transposed": tuple(
            np.asfortranarray(a).swapaxes(0, 1) for a in (source, target, weights)
        ),
        "nobody": (source[:0], target[0], weights[:0]),
        "nobody of some": (source[:, :0], target[:, :1], weights[:, :0]),
    }  # fmt: skip


@every_kernel
@scales
def test_reads_batches_through_their_strides(kernels: Kernels, with_scale: bool) -> None:
    rng = np.random.default_rng(9)
    for name, (source, target, weights) in batches(kernels).items():
        batch = np.broadcast_shapes(source.shape[:-2], target.shape[:-2], weights.shape[:-1])
        arguments: tuple[Any, ...] = (source, target, weights)
        copies = tuple(
            np.ascontiguousarray(np.broadcast_to(a, (*batch, *a.shape[a.ndim - trailing :])))
            for a, trailing in zip(arguments, (2, 2, 1), strict=True)
        )
        expected = kernels.rigid_align(*copies, with_scale=with_scale)
        assert expected.rotation.shape == (*batch, 3, 3)
        assert_same_bits(kernels.rigid_align(*arguments, with_scale=with_scale), expected)
        if name == "broadcast weights":
            # Without the multiplication by 1 there may be fused operations elsewhere.
            plain = kernels.rigid_align(source, target, with_scale=with_scale)
            eps = np.finfo(kernels.dtype).eps
            np.testing.assert_allclose(plain.rotation, expected.rotation, atol=20 * eps)

        grads = kernels.cast(*gradients_for(rng, batch))
        mixed = (np.asfortranarray(grads[0]), grads[1][..., ::-1].copy()[..., ::-1], grads[2])
        singly = kernels.rigid_align_vjp(tuple(grads), *copies, with_scale=with_scale)
        gradients = kernels.rigid_align_vjp(mixed, *arguments, with_scale=with_scale)
        assert_same_bits(gradients, singly)
        for kept in range(3):  # what is not wanted is not computed, and changes nothing else
            want = {f"want_{n}": i == kept for i, n in enumerate(("source", "target", "weights"))}
            some = kernels.rigid_align_vjp(mixed, *arguments, with_scale=with_scale, **want)
            assert [g is None for g in some] == [i != kept for i in range(3)]
            assert_same_bits(some[kept], gradients[kept])
        for absent in range(3):  # an absent gradient is a zero
            zeroed = list(grads)
            zeroed[absent] = np.zeros_like(grads[absent])
            left = [None if i == absent else g for i, g in enumerate(grads)]
            assert_same_bits(
                kernels.rigid_align_vjp(tuple(left), *copies, with_scale=with_scale),
                kernels.rigid_align_vjp(tuple(zeroed), *copies, with_scale=with_scale),
            )


@every_kernel
@pytest.mark.parametrize("points", [0, 1, 2, 3, 4, 16, 17, 27, 28, 54, 55, 70])
def test_any_number_of_points_by_any_way(kernels: Kernels, points: int) -> None:
    """On CUDA shared memory holds the smaller sets; they come there in several ways."""
    rng = np.random.default_rng(10)
    for count in (1, 5, 37, 130):
        sets = kernels.cast(*point_sets("generic", count, points))
        grads = tuple(kernels.cast(*gradients_for(rng, (count,))))
        odd = []  # not aligned to 16 bytes
        for array in sets:
            odd.append(np.empty(array.size + 1, kernels.dtype)[1:].reshape(array.shape))
            odd[-1][...] = array
        for weighted in (True, False):
            arguments = sets if weighted else sets[:2]
            expected = kernels.rigid_align(*arguments)
            gradients = kernels.rigid_align_vjp(grads, *arguments)
            assert (gradients[2] is not None) == weighted
            if points > 3:
                assert np.isfinite(expected.rotation).all()
            for others in (
                odd,
                [np.asfortranarray(a) for a in sets],
                [a[::-1].copy()[::-1] for a in sets],
            ):
                mixed = [sets[0], *others[1:]]  # one operand without gaps, the others not
                for them in (others, mixed):
                    them = them if weighted else them[:2]
                    assert_same_bits(kernels.rigid_align(*them), expected)
                    assert_same_bits(kernels.rigid_align_vjp(grads, *them), gradients)
            alone = [a[count // 2] for a in arguments]
            one = kernels.rigid_align(*alone)
            assert_same_bits(tuple(one), tuple(a[count // 2] for a in expected))
            shared = kernels.rigid_align_vjp(grads, alone[0], *arguments[1:])
            copies = np.broadcast_to(alone[0], sets[0].shape).copy()
            assert_same_bits(shared, kernels.rigid_align_vjp(grads, copies, *arguments[1:]))


@every_kernel
def test_does_not_depend_on_who_computes_it(kernels: Kernels) -> None:
    for count, points in ((1, 17), (37, 5), (100, 40)):
        sets = PointSets(*kernels.cast(*point_sets("generic", count, points)))
        grads = tuple(kernels.cast(*gradients_for(np.random.default_rng(0), (count,))))

        def results(k: Kernels, sets: PointSets = sets, grads: Any = grads) -> tuple[Array, ...]:
            found: Alignment = k.rigid_align(*sets, with_scale=True)
            return (*found, *k.rigid_align_vjp(grads, *sets, with_scale=True))

        first = results(kernels)
        for other in other_workers(kernels):
            assert_same_bits(results(other), first)
