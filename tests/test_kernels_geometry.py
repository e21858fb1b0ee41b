# SPDX-License-Identifier: Apache-2.0
"""The triangulation and projection kernels of every backend against `tritool.reference`.

The bounds on float32 are those of docs/ops/triangulate.md.
"""

from __future__ import annotations

import functools
import mmap
from typing import Any

import numpy as np
import pytest
import rigs
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_bridge import (
    CUDA,
    Array,
    Kernels,
    assert_same_bits,
    assert_zero,
    bridge,
    every_float32_kernel,
    every_kernel,
    other_workers,
)

from tritool import reference

laws = settings(derandomize=True, deadline=None, max_examples=12)
modes = pytest.mark.parametrize("mode", ["homogeneous", "inhomogeneous"])
MODES = st.sampled_from(["homogeneous", "inhomogeneous"])


# --- how well the data determine a point ---------------------------------------------------------


def conditioning(
    points: Array, projections: Array, weights: Array, mode: str
) -> tuple[Array, Array]:
    """Return s3 / s1 and (s3^2 - lambda) / s3^2 of each point: 1 is well posed, 0 degenerate."""
    rows = points[..., None] * projections[..., 2:, :] - projections[..., :2, :]
    a = (weights[..., None, None] * rows).reshape(*points.shape[:-2], -1, 4)
    s = np.linalg.svd(a[..., :3], compute_uv=False)
    gap = np.ones(s.shape[:-1])
    if mode == "homogeneous":
        gap -= (np.linalg.svd(a, compute_uv=False)[..., 3] / s[..., 2]) ** 2
    return s[..., 2] / s[..., 0], gap


def check_triangulation(
    kernels: Kernels,
    points: Array,
    projections: Array,
    weights: Array,
    mode: Any,
    rng: np.random.Generator,
) -> None:
    """Compare values and gradients of the well-posed points with the reference, in roundings."""
    points, projections, weights, grad = kernels.cast(
        points, projections, weights, rng.standard_normal((*points.shape[:-2], 3))
    )
    exact = [a.astype(np.float64) for a in (points, projections, weights)]
    eps = np.finfo(kernels.dtype).eps
    ratio, gap = conditioning(*exact, mode)
    posed = (ratio > (1e-4 if kernels.dtype == np.float32 else 1e-9)) & (
        gap > (0.1 if kernels.dtype == np.float32 else 1e-3)
    )
    found = kernels.triangulate(points, projections, weights, mode=mode)
    expected = reference.triangulate(*exact, mode=mode)
    distance = np.abs(projections[..., 3]).max() / np.abs(projections[..., :3]).max()
    error = np.linalg.norm(found - expected, axis=-1)
    assert (error[posed] <= (3.0 * eps * distance / ratio / gap)[posed]).all()

    # Each point with projections of its own, so that no gradient hides behind another's.
    own = np.broadcast_to(projections, (*points.shape[:-2], *projections.shape[-3:])).copy()
    gradients = kernels.triangulate_vjp(grad, points, own, weights, mode=mode)
    expected_gradients = reference.triangulate_vjp(grad, points, own, weights, mode=mode)
    within = 100.0 * eps / ratio / gap**2
    for name, a, b in zip(
        ("points", "projections"), gradients[:2], expected_gradients[:2], strict=True
    ):
        axes = tuple(range(points.ndim - 2, a.ndim))
        relative = np.abs(a - b).max(axes) / np.abs(b).max(axes)
        assert (relative[posed] <= within[posed]).all(), name
    # dL/dw is a small difference; its terms are those of the gradient to the projections.
    assert expected_gradients[2] is not None
    terms = np.abs(expected_gradients[1] * own).max((-1, -2, -3))
    error = np.abs(weights * (gradients[2] - expected_gradients[2])).max(-1)
    assert (error[posed] <= (within * terms)[posed]).all()


# --- triangulation: values and gradients ---------------------------------------------------------


@every_kernel
@laws
@given(rigs.observations(), MODES, rigs.generators())
def test_triangulate_agrees_with_the_reference(
    kernels: Kernels,
    drawn: tuple[rigs.Rig, rigs.Observations],
    mode: str,
    rng: np.random.Generator,
) -> None:
    _, seen = drawn
    check_triangulation(kernels, seen.points, seen.projections, seen.weights, mode, rng)


@every_kernel
@modes
@pytest.mark.parametrize("name", rigs.RIGS)
def test_triangulate_agrees_with_the_reference_on_the_named_rigs(
    kernels: Kernels, name: str, mode: str
) -> None:
    for noise, kind in ((0.0, "one"), (5.0, "uniform"), (20.0, "log")):
        seen = rigs.observe(rigs.RIGS[name](), 37, noise=noise, weights=kind, seed=1)
        check_triangulation(
            kernels, seen.points, seen.projections, seen.weights, mode, np.random.default_rng(2)
        )


@every_kernel
@pytest.mark.parametrize("views", [2, 5, 8, 31, 33, 70])
def test_triangulate_takes_any_number_of_views(kernels: Kernels, views: int) -> None:
    """Beside its cameras in the room: as many as the CPU keeps in lanes, and more."""
    seen = rigs.observe(rigs.h36m4(), 19, noise=3.0, weights="uniform", seed=views)
    taken = np.resize(np.arange(4), views)
    rng = np.random.default_rng(views)
    points = seen.points[..., taken, :] + rng.normal(size=(19, views, 2))
    projections, weights = seen.projections[taken], rng.uniform(0.1, 1.0, (19, views))
    check_triangulation(kernels, points, projections, weights, "homogeneous", rng)
    apart = np.repeat(kernels.cast(points)[0], 3, -2)[..., ::3, :]  # the same, with gaps
    same = kernels.triangulate(apart, projections, weights, mode="homogeneous")
    plain = kernels.triangulate(points, projections, weights, mode="homogeneous")
    np.testing.assert_array_equal(same, plain)


@every_kernel
@pytest.mark.parametrize("views", [31, 33])
def test_large_gradients_are_those_of_their_points(kernels: Kernels, views: int) -> None:
    """Large results are written past the caches, small ones not, nor those of more views."""
    count = 50 if kernels.backend == CUDA else 70000
    seen = rigs.observe(rigs.h36m4(), count, noise=2.0, weights="uniform", seed=20)
    taken = np.arange(views) % 4
    points, weights = seen.points[:, taken], seen.weights[:, taken]
    arrays = kernels.cast(seen.truth, points, weights)
    assert kernels.backend == CUDA or arrays[1].nbytes > 16 << 20
    projections = seen.projections[taken]

    def gradients(some: slice | Array) -> tuple[Array, Array, Array]:
        grad, points, weights = (array[some] for array in arrays)
        return kernels.triangulate_vjp(
            grad, points, projections, weights, mode="homogeneous", want_projections=False
        )

    found = gradients(slice(None))
    for some in np.array_split(np.arange(count), 5):
        to_points, _, to_weights = gradients(some)
        assert_same_bits(found[0][some], to_points)
        assert_same_bits(found[2][some], to_weights)


@every_kernel
@pytest.mark.parametrize("views", [31, 33])
def test_many_pixels_are_those_of_their_points(kernels: Kernels, views: int) -> None:
    """As above, of the projection."""
    count = 50 if kernels.backend == CUDA else 70000
    seen = rigs.observe(rigs.h36m4(), count, noise=0.0, seed=21)
    points, projections = kernels.cast(seen.truth, seen.projections[np.arange(views) % 4])
    found = kernels.project(points, projections)
    assert kernels.backend == CUDA or found.nbytes > 16 << 20
    for some in np.array_split(np.arange(count), 5):
        assert_same_bits(found[some], kernels.project(points[some], projections))


@functools.cache
def room(count: int) -> tuple[rigs.Observations, Array, Array, Array, Array]:
    """Return 5 px of noise in h36m4 in float32, a gradient, and what is right for it."""
    seen = rigs.observe(rigs.h36m4(), count, noise=5.0, weights="uniform", seed=3)
    arrays = (seen.truth, seen.points, seen.projections, seen.weights)
    seen = rigs.Observations(*(a.astype(np.float32) for a in arrays))
    grad = np.random.default_rng(4).standard_normal((count, 3)).astype(np.float32)
    projections = np.broadcast_to(seen.projections, (count, 4, 3, 4))
    arguments = (seen.points, projections, seen.weights)
    gradients = reference.triangulate_vjp(grad, *arguments)
    assert gradients[2] is not None
    return seen, grad, reference.triangulate(*arguments), gradients[0], gradients[2]


@every_float32_kernel
def test_triangulate_keeps_its_float32_bounds_in_a_room(kernels: Kernels) -> None:
    seen, grad, expected, to_points, to_weights = room(2000 if kernels.backend == CUDA else 20000)
    arguments = (seen.points, seen.projections, seen.weights)
    found = kernels.triangulate(*arguments, mode="homogeneous")
    error = np.linalg.norm(found - expected, axis=-1)
    # A GPU and AVX2 fuse multiplication and addition; without that up to twice as much is lost.
    loss = 1.0 if kernels.backend in ("cpu:avx2", "cpu:avx512") else 2.0
    assert np.quantile(error, 0.999) < 3e-4 * loss  # mm
    assert np.median(error) < 6e-5 * loss

    found_points, _, found_weights = kernels.triangulate_vjp(grad, *arguments, mode="homogeneous")
    for a, b, bound in ((found_points, to_points, 1e-6), (found_weights, to_weights, 1e-3)):
        axes = tuple(range(1, a.ndim))
        relative = np.linalg.norm(a - b, axis=axes) / np.linalg.norm(b, axis=axes)
        assert np.quantile(relative, 0.999) < bound * loss


@every_kernel
@laws
@given(rigs.observations(kinds=("one", "uniform")), MODES, rigs.generators())
def test_an_absent_view_does_not_matter(
    kernels: Kernels,
    drawn: tuple[rigs.Rig, rigs.Observations],
    mode: str,
    rng: np.random.Generator,
) -> None:
    """Weight 0 or a NaN pixel; whatever else the view holds, its gradients are exactly 0."""
    rig, seen = drawn
    at = int(rng.integers(len(rig) + 1))
    points = np.insert(seen.points, at, rng.normal(size=(len(seen.points), 2)), axis=-2)
    projections = np.insert(seen.projections, at, rng.normal(size=(3, 4)), axis=-3)
    weights = np.insert(seen.weights, at, 0.0, axis=-1)
    grad = rng.standard_normal((len(points), 3))
    first = kernels.triangulate(points, projections, weights, mode=mode)
    first_gradients = kernels.triangulate_vjp(grad, points, projections, weights, mode=mode)
    for gradient, axis in zip(first_gradients, (-2, -3, -1), strict=True):
        assert_zero(gradient.take(at, axis))
    # Rotating a row of zeros in rounds, so the bits may differ from those without the view.
    without = kernels.triangulate(seen.points, seen.projections, seen.weights, mode=mode)
    ratio, gap = conditioning(seen.points, seen.projections, seen.weights, mode)
    within = 1e4 * np.finfo(kernels.dtype).eps / ratio / gap * 10.0
    posed = (ratio > 1e-4) & (gap > 0.1)
    assert (np.linalg.norm(first - without, axis=-1) <= within)[posed].all()

    projections[at] = rng.choice([np.nan, np.inf])
    assert_same_bits(kernels.triangulate(points, projections, weights, mode=mode), first)
    points[:, at, rng.integers(2)] = np.nan
    weights[:, at] = rng.choice([2.0, np.nan, -1.0, np.inf])
    assert_same_bits(kernels.triangulate(points, projections, weights, mode=mode), first)
    gradients = kernels.triangulate_vjp(grad, points, projections, weights, mode=mode)
    assert_same_bits(gradients, first_gradients)


@every_kernel
@laws
@given(rigs.observations(max_noise=2.0), MODES, rigs.generators())
def test_order_and_scales_do_not_matter(
    kernels: Kernels,
    drawn: tuple[rigs.Rig, rigs.Observations],
    mode: str,
    rng: np.random.Generator,
) -> None:
    rig, seen = drawn
    points, projections, weights = kernels.cast(seen.points, seen.projections, seen.weights)
    grad = rng.standard_normal((len(points), 3))
    first = kernels.triangulate(points, projections, weights, mode=mode)
    gradients = kernels.triangulate_vjp(grad, points, projections, weights, mode=mode)
    order = rng.permutation(len(rig))
    ratio, gap = conditioning(*(a.astype(np.float64) for a in (points, projections, weights)), mode)
    posed = (ratio > 1e-4) & (gap > 0.1)
    within = 1e5 * np.finfo(kernels.dtype).eps / ratio / gap
    for other in (
        kernels.triangulate(points[:, order], projections[order], weights[:, order], mode=mode),
        kernels.triangulate(points, -projections, weights, mode=mode),
        kernels.triangulate(points, projections, 0.75 * weights, mode=mode),
    ):
        assert (np.linalg.norm(other - first, axis=-1) <= within)[posed].all()

    # Powers of two change no rounding: of the weights, of all projections, and without the
    # constraint |(y, 1)| = 1 of the unit of the world.
    for power in (-50, 3, 40):
        scaled = np.ldexp(weights, power)
        assert_same_bits(kernels.triangulate(points, projections, scaled, mode=mode), first)
        others = kernels.triangulate_vjp(grad, points, projections, scaled, mode=mode)
        assert_same_bits(others[:2], gradients[:2])
        assert_same_bits(np.ldexp(others[2], power), gradients[2])
        scaled = np.ldexp(projections, power)
        assert_same_bits(kernels.triangulate(points, scaled, weights, mode=mode), first)
    if mode == "inhomogeneous":
        unit = projections * np.array([1024.0, 1024.0, 1024.0, 1.0], kernels.dtype)
        other = kernels.triangulate(points, unit, weights, mode=mode)
        assert_same_bits(1024.0 * other, first)


@every_kernel
@laws
@given(rigs.observations(kinds=("one", "uniform"), max_noise=20.0), MODES, rigs.generators())
def test_gradients_know_what_does_not_move_the_point(
    kernels: Kernels,
    drawn: tuple[rigs.Rig, rigs.Observations],
    mode: str,
    rng: np.random.Generator,
) -> None:
    """A common factor of the weights, or of the projections."""
    _, seen = drawn
    points, projections, weights = kernels.cast(seen.points, seen.projections, seen.weights)
    own = np.repeat(projections[None], len(points), axis=0)
    grad = rng.standard_normal((len(points), 3))
    _, to_projections, to_weights = kernels.triangulate_vjp(grad, points, own, weights, mode=mode)
    ratio, gap = conditioning(points.astype(np.float64), own.astype(np.float64), weights, mode)
    posed = (ratio > 1e-3) & (gap > 0.1)
    terms = to_projections.astype(np.float64) * own
    within = 20.0 * np.finfo(kernels.dtype).eps * np.abs(terms).sum((-1, -2, -3)) / ratio / gap
    assert (np.abs((weights * to_weights.astype(np.float64)).sum(-1)) <= within)[posed].all()
    assert (np.abs(terms.sum((-1, -2, -3))) <= within)[posed].all()


# --- triangulation: degenerate points ------------------------------------------------------------


@every_kernel
@laws
@given(st.data(), MODES)
def test_degenerate_points_are_nan_without_gradient(
    kernels: Kernels, data: st.DataObject, mode: str
) -> None:
    for reason in rigs.DEGENERACIES:
        bad = data.draw(rigs.degeneracies([reason]))
        arguments = (bad.points, bad.projections, bad.weights)
        assert np.isnan(kernels.triangulate(*arguments, mode=mode)).all(), reason
        for incoming in (1.0, np.nan, np.inf):
            grad = np.full(3, incoming)
            assert_zero(*kernels.triangulate_vjp(grad, *arguments, mode=mode))


@every_kernel
@modes
def test_a_degenerate_point_leaves_its_neighbours_alone(kernels: Kernels, mode: str) -> None:
    """Neighbours share SIMD lanes, warps and the sum to the projections."""
    seen = rigs.observe(rigs.h36m4(), 35, noise=2.0, weights="uniform", seed=5)
    grad = np.random.default_rng(6).standard_normal((35, 3))
    arrays = kernels.cast(seen.points, seen.projections, seen.weights)
    first = kernels.triangulate(*arrays, mode=mode)
    first_gradients = kernels.triangulate_vjp(grad, *arrays, mode=mode)
    for spoilt in (0, 3, 15, 16, 34):
        others = np.arange(35) != spoilt
        for kind in ("NaN points", "NaN weight", "zero weights", "infinite point"):
            points, weights, incoming = arrays[0].copy(), arrays[2].copy(), grad.copy()
            incoming[spoilt] = np.nan
            if kind == "NaN points":
                points[spoilt, :3] = np.nan
            elif kind == "infinite point":
                points[spoilt, 1, 0] = np.inf
            else:
                weights[spoilt] = np.nan if kind == "NaN weight" else 0.0
            found = kernels.triangulate(points, arrays[1], weights, mode=mode)
            assert np.isnan(found[spoilt]).all()
            assert_same_bits(found[others], first[others])
            gradients = kernels.triangulate_vjp(incoming, points, arrays[1], weights, mode=mode)
            assert_zero(gradients[0][spoilt], gradients[2][spoilt])
            assert_same_bits(gradients[0][others], first_gradients[0][others])
            assert_same_bits(gradients[2][others], first_gradients[2][others])
            # As if its incoming gradient had been 0.
            silent = np.where(others[:, None], grad, 0.0)
            quiet = kernels.triangulate_vjp(silent, *arrays, mode=mode)
            eps = np.finfo(kernels.dtype).eps
            np.testing.assert_allclose(
                gradients[1], quiet[1], rtol=0.0, atol=100 * eps * np.abs(quiet[1]).max()
            )


# --- batches -------------------------------------------------------------------------------------


def batches(kernels: Kernels, views: int = 3) -> dict[str, tuple[Array, Array, Array]]:
    """Return points, projections and weights [batch, ...] of awkward strides."""
    rig = rigs.h36m4()[:views]
    seen = rigs.observe(rig, 5 * 7 * 2, noise=3.0, weights="uniform", seed=7)
    rng = np.random.default_rng(8)
    points = seen.points.reshape(5, 7, 2, views, 2)
    weights = seen.weights.reshape(5, 7, 2, views)
    moving = rig.projections * rng.uniform(0.99, 1.01, size=(5, 7, 2, views, 1, 1))
    points, weights, moving, still = kernels.cast(points, weights, moving, rig.projections)
    ones = np.broadcast_to(kernels.dtype(1), weights.shape)
    return {
        "one rig": (points, still, weights),
        "a rig each": (points, moving, weights),
        "shared by the last": (points, moving[:, :, :1], weights[0, 0]),
        "shared by the middle": (points, moving[:, :1], weights[:, :1]),
        "shared by the first": (points, moving[:1], ones),
        "broadcast views": (points, np.broadcast_to(still, moving.shape), weights),
        "one point": (points[0, 0, 0], moving[0, 0, 0], weights[0, 0, 0]),
        "points broadcast": (points[:, :1, :1], moving, weights[:1]),
        "reversed": (points[::-1, :, :, ::-1], moving[::-1, :, :, ::-1], weights[::-1, ..., ::-1]),
        "steps": (points[::2, 1::3], moving[::2, 1::3], weights[::2, 1::3]),
        "transposed": tuple(np.asfortranarray(a).swapaxes(0, 1) for a in (points, moving, weights)),
        "nobody": (points[:0], still, weights[:0]),
        "nobody of some": (points[:, :0], moving[:, :1], weights[:, :0]),
    }


def dense(array: Array, shape: tuple[int, ...]) -> Array:
    return np.ascontiguousarray(np.broadcast_to(array, shape))


def sum_to(array: Array, shape: tuple[int, ...]) -> Array:
    """Undo a broadcast in float64."""
    array = array.astype(np.float64)
    array = array.sum(axis=tuple(range(array.ndim - len(shape))))
    return np.asarray(array.sum(tuple(i for i, n in enumerate(shape) if n == 1), keepdims=True))


@every_kernel
@modes
def test_triangulate_reads_batches_through_their_strides(kernels: Kernels, mode: str) -> None:
    for name, (points, projections, weights) in batches(kernels).items():
        batch = np.broadcast_shapes(points.shape[:-2], projections.shape[:-3], weights.shape[:-1])
        copies = (
            dense(points, (*batch, 3, 2)),
            dense(projections, (*batch, 3, 3, 4)),
            dense(weights, (*batch, 3)),
        )
        grad = np.random.default_rng(9).standard_normal((*batch, 3)).astype(kernels.dtype)
        arguments = (points, projections, weights)
        expected = kernels.triangulate(*copies, mode=mode)
        assert expected.shape == (*batch, 3)
        assert_same_bits(kernels.triangulate(*arguments, mode=mode), expected)
        if name == "shared by the first":
            assert_same_bits(kernels.triangulate(points, projections, mode=mode), expected)

        gradients = kernels.triangulate_vjp(grad, *arguments, mode=mode)
        singly = kernels.triangulate_vjp(grad, *copies, mode=mode)
        assert_same_bits((gradients[0], gradients[2]), (singly[0], singly[2]))
        total = sum_to(singly[1], projections.shape)
        size = sum_to(np.abs(singly[1]), projections.shape).max(initial=0.0)
        within = 10 * np.finfo(kernels.dtype).eps * size
        np.testing.assert_allclose(gradients[1], total, rtol=0.0, atol=within, err_msg=name)

        for kept in range(3):  # what is not wanted is not computed, and changes nothing else
            want = {
                f"want_{n}": i == kept for i, n in enumerate(("points", "projections", "weights"))
            }
            some = kernels.triangulate_vjp(grad, *arguments, mode=mode, **want)
            assert [g is None for g in some] == [i != kept for i in range(3)]
            assert_same_bits(some[kept], gradients[kept])


@every_kernel
@pytest.mark.parametrize("views", [0, 1])
def test_triangulate_without_enough_views(kernels: Kernels, views: int) -> None:
    points, projections = np.ones((300, views, 2)), np.ones((views, 3, 4))
    weights = np.ones((300, views))
    found = kernels.triangulate(points, projections, weights, mode="homogeneous")
    assert found.shape == (300, 3)
    assert np.isnan(found).all()
    gradients = kernels.triangulate_vjp(found, points, projections, weights, mode="homogeneous")
    assert_zero(*gradients)
    assert kernels.project(np.ones((300, 3)), projections).shape == (300, views, 2)


@every_kernel
def test_geometry_does_not_depend_on_who_computes_it(kernels: Kernels) -> None:
    """Nor do sums to shared projections, for one way of cutting them into units."""
    count = 600 if kernels.backend == CUDA else 2400  # more than a unit holds
    seen = rigs.observe(rigs.h36m4(), count, noise=3.0, weights="uniform", seed=10)
    for split in ((count,), (count // 4, 4), (5, count // 5)):
        points, weights = (a.reshape(*split, *a.shape[1:]) for a in (seen.points, seen.weights))
        truth = seen.truth.reshape(*split, 3)
        rows = (split[0], *(1,) * (len(split) - 1)) if len(split) > 1 else (1,)
        shared = np.broadcast_to(seen.projections, (*rows, 4, 3, 4)).copy()
        for units in (0, 40):
            mine = Kernels(kernels.backend, kernels.dtype, items_per_unit=units)

            def results(
                k: Kernels,
                points: Array = points,
                shared: Array = shared,
                weights: Array = weights,
                truth: Array = truth,
            ) -> tuple[Array, ...]:
                pixels = k.project(truth, shared)
                return (
                    k.triangulate(points, shared, weights, mode="homogeneous"),
                    *k.triangulate_vjp(truth, points, shared, weights, mode="homogeneous"),
                    pixels,
                    *k.project_vjp(pixels, truth, shared),
                )

            first = results(mine)
            for other in other_workers(mine):
                assert_same_bits(results(other), first)


# --- projection ----------------------------------------------------------------------------------


@every_kernel
@laws
@given(rigs.rigs(), rigs.generators())
def test_project_agrees_with_the_reference(
    kernels: Kernels, rig: rigs.Rig, rng: np.random.Generator
) -> None:
    """Also for points behind a camera, in its plane, or nowhere."""
    points = rng.uniform(rigs.BOX_LOW, rigs.BOX_HIGH, size=(37, 3))
    points[3] = 2.0 * rig.centers[0] - rigs.BOX_CENTER
    points[8, rng.integers(3)] = rng.choice([np.nan, np.inf])
    points, projections = kernels.cast(points, rig.projections)
    pixels = kernels.project(points, projections)
    expected = reference.project(points, projections)
    eps = np.finfo(kernels.dtype).eps
    finite = np.nan_to_num(points, nan=0.0, posinf=0.0)
    terms = np.abs(projections[..., :3]) @ np.abs(finite.T) + np.abs(projections[..., 3:])
    depth = np.abs(projections[:, 2, :3] @ finite.T + projections[:, 2, 3:])
    size = np.abs(expected).max(-1).T
    within = (4 * eps * (terms[:, :2].max(1) + size * terms[:, 2]) / depth).T
    seen = np.isfinite(expected).all(-1)
    np.testing.assert_array_equal(np.isnan(pixels), np.isnan(expected))
    assert np.isnan(pixels[8]).all()
    assert np.isnan(pixels[3, 0]).all()
    assert (np.abs(pixels - expected).max(-1)[seen] <= within[seen]).all()

    grad = rng.standard_normal(pixels.shape).astype(kernels.dtype)
    own = np.repeat(projections[None], len(points), axis=0)
    to_points, to_projections = kernels.project_vjp(grad, points, own)
    for found, want in zip(
        (to_points, to_projections), reference.project_vjp(grad, points, own), strict=True
    ):
        axes = tuple(range(1, found.ndim))
        scale = np.maximum(np.abs(want).max(axes), 1e-30)
        assert (np.abs(found - want).max(axes) <= 2e4 * eps * scale).all()
    assert_zero(to_points[8], to_projections[8], to_projections[3, 0])
    # Nor does a NaN that comes in for what was not seen, beside the lanes and sums of the others.
    spoilt = np.where(seen[..., None], grad, np.nan)
    assert_same_bits(kernels.project_vjp(spoilt, points, own), (to_points, to_projections))
    shared = kernels.project_vjp(spoilt, points, projections)
    assert_same_bits(shared[0], to_points)
    total, size = to_projections.astype(np.float64).sum(0), np.abs(to_projections).sum(0).max()
    np.testing.assert_allclose(shared[1], total, rtol=0.0, atol=10 * eps * size)


@every_kernel
def test_project_reads_batches_through_their_strides(kernels: Kernels) -> None:
    for name, (_, projections, weights) in batches(kernels).items():
        points = weights[..., :3] * 100.0
        batch = np.broadcast_shapes(points.shape[:-1], projections.shape[:-3])
        copies = (dense(points, (*batch, 3)), dense(projections, (*batch, 3, 3, 4)))
        pixels = kernels.project(points, projections)
        assert_same_bits(pixels, kernels.project(*copies))
        gradients = kernels.project_vjp(pixels, points, projections)
        singly = kernels.project_vjp(pixels, *copies)
        assert_same_bits(gradients[0], singly[0])
        total = sum_to(singly[1], projections.shape)
        size = sum_to(np.abs(singly[1]), projections.shape).max(initial=0.0)
        within = 10 * np.finfo(kernels.dtype).eps * size
        np.testing.assert_allclose(gradients[1], total, rtol=0.0, atol=within, err_msg=name)
        for want in ({"want_points": False}, {"want_projections": False}):
            some = kernels.project_vjp(pixels, points, projections, **want)
            for a, b in zip(some, gradients, strict=True):
                if a is not None:
                    assert_same_bits(a, b)


@every_kernel
@pytest.mark.parametrize("views", [1, 3, 4, 31, 130, 300])
def test_a_shared_rig_is_no_other_than_one_each(kernels: Kernels, views: int) -> None:
    """Kernels of their own serve it on CUDA, of 32-bit offsets; also the gradient to points."""
    rng = np.random.default_rng(11)
    rig = np.resize(rigs.h36m4().projections, (views, 3, 4)) * rng.uniform(
        0.99, 1.01, (views, 1, 1)
    )
    for batch in ((), (1,), (5,), (131,), (3, 7)):
        points, projections = kernels.cast(rng.uniform(-900, 900, (*batch, 3)), rig)
        own = np.broadcast_to(projections, (*batch, views, 3, 4)).copy()
        pixels = kernels.project(points, projections)
        assert_same_bits(pixels, kernels.project(points, own))
        grad = rng.standard_normal(pixels.shape).astype(kernels.dtype)
        expected, _ = kernels.project_vjp(grad, points, own)
        odd = np.empty(grad.size + 1, kernels.dtype)[1:].reshape(grad.shape)  # no pairs are aligned
        odd[...] = grad
        for them in (
            grad,
            odd,
            grad[..., ::-1].copy()[..., ::-1],
            np.repeat(grad, 2, -2)[..., ::2, :],
        ):
            found, none = kernels.project_vjp(them, points, projections, want_projections=False)
            assert none is None
            assert_same_bits(found, expected)
        # Every other point of a tensor, and its coordinates last to first.
        strided = np.repeat(points[..., None, ::-1], 2, -2)[..., 0, ::-1]
        assert_same_bits(kernels.project(strided, projections), pixels)
        found, _ = kernels.project_vjp(grad, strided, projections, want_projections=False)
        assert_same_bits(found, expected)


@every_kernel
def test_offsets_go_beyond_32_bits(kernels: Kernels) -> None:
    """Points far apart in memory of which next to nothing exists."""
    size, far = np.dtype(kernels.dtype).itemsize, 2**31 + 6
    reserve = getattr(mmap, "MAP_NORESERVE", 0x4000)  # Linux
    memory = mmap.mmap(-1, (far + 6) * size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | reserve)
    points, projections = kernels.cast(np.arange(6.0).reshape(2, 3), rigs.h36m4().projections)
    apart = np.ndarray((2, 3), kernels.dtype, memory, strides=(far * size, size))
    apart[...] = points
    pixels = kernels.project(points, projections)
    assert np.isfinite(pixels).all()
    assert_same_bits(kernels.project(apart, projections), pixels)
    expected, _ = kernels.project_vjp(pixels, points, projections, want_projections=False)
    found, _ = kernels.project_vjp(pixels, apart, projections, want_projections=False)
    assert_same_bits(found, expected)
    wide = np.ndarray((2, 3), kernels.dtype, memory, strides=(size, far // 2 * size))
    wide[...] = points
    assert_same_bits(kernels.project(wide, projections), pixels)


def test_the_bridge_refuses_what_does_not_fit() -> None:
    backend = bridge.Backend("cpu:baseline")
    with pytest.raises(ValueError, match="no backend cpu:z80"):
        bridge.Backend("cpu:z80")
    with pytest.raises(ValueError, match=r"points must end in \(-1, 2\), got \(2, 3\)"):
        bridge.triangulate(backend, np.zeros((2, 3)), np.zeros((2, 3, 4)))
    with pytest.raises(ValueError, match="do not broadcast"):
        bridge.triangulate(backend, np.zeros((5, 2, 2)), np.zeros((4, 2, 3, 4)))
    with pytest.raises(TypeError, match="projections has another dtype"):
        bridge.triangulate(backend, np.zeros((2, 2)), np.zeros((2, 3, 4), np.float32))
    with pytest.raises(TypeError, match="float32 or float64 expected, got int64"):
        bridge.softmax_moments(backend, np.zeros((2, 2), np.int64), dims=2)
