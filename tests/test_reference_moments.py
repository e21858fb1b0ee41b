# SPDX-License-Identifier: Apache-2.0
"""The definitions of the soft-argmax and of softmax moments on their own.

Everything else is compared with `tritool.reference`, so nothing here may lean on anything else of
the package.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import rigs
import scipy.special
from differences import assert_close, numerical_gradient
from hypothesis import given, settings
from hypothesis import strategies as st

from tritool import reference

Array = npt.NDArray[Any]

laws = settings(derandomize=True, deadline=None, max_examples=40)


def test_soft_argmax2d_of_one_pixel_is_that_pixel() -> None:
    heatmaps = np.full((3, 7, 11), -np.inf)
    for n, (x, y) in enumerate([(0, 0), (10, 6), (9, 2)]):
        heatmaps[n, y, x] = -4.0
    np.testing.assert_array_equal(reference.soft_argmax2d(heatmaps), [[0, 0], [10, 6], [9, 2]])


def test_soft_argmax3d_of_one_voxel_is_its_index_or_its_position() -> None:
    volume = np.full((5, 4, 3), -np.inf)
    volume[4, 1, 2] = 7.0
    np.testing.assert_array_equal(reference.soft_argmax3d(volume), [4, 1, 2])
    grid = (np.array([100.0, 200.0, 300.0]), np.diag([10.0, 20.0, 30.0])[[1, 2, 0]])
    # The first axis of the grid runs along world y, the second along z, the third along x.
    np.testing.assert_array_equal(
        reference.soft_argmax3d(volume, grid=grid), [100 + 2 * 10, 200 + 4 * 20, 300 + 1 * 30]
    )


def test_a_high_inverse_temperature_finds_the_maximum() -> None:
    heatmap = np.random.default_rng(0).permutation(12 * 9).reshape(12, 9) / 10.0
    y, x = np.unravel_index(heatmap.argmax(), heatmap.shape)
    found = reference.soft_argmax2d(heatmap, inverse_temperature=1e3)
    np.testing.assert_allclose(found, [x, y], atol=1e-12)
    np.testing.assert_allclose(
        reference.soft_argmax2d(heatmap, inverse_temperature=0.0), [4.0, 5.5], atol=1e-12
    )


@laws
@given(rigs.logits(2), st.sampled_from([0.0, 0.5, 1.0, 100.0]))
def test_moments2d_are_weighted_averages(logits: Array, alpha: float) -> None:
    moments = reference.softmax_moments2d(logits, inverse_temperature=alpha)
    lead, (height, width) = logits.shape[:-2], logits.shape[-2:]
    assert moments.mean.shape == (*lead, 2)
    assert moments.covariance.shape == (*lead, 2, 2)
    assert moments.log_partition.shape == lead
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    for n in np.ndindex(lead):
        kept = logits[n] > -np.inf
        if not kept.any():
            assert np.isnan(moments.mean[n]).all()
            assert np.isnan(moments.covariance[n]).all()
            assert moments.log_partition[n] == -np.inf
            continue
        p = scipy.special.softmax(alpha * logits[n][kept])
        coordinates = np.stack([x[kept], y[kept]])
        np.testing.assert_allclose(moments.mean[n], coordinates @ p, rtol=1e-10, atol=1e-10)
        spread = np.cov(coordinates, aweights=p, ddof=0)
        np.testing.assert_allclose(moments.covariance[n], spread, rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(
            moments.log_partition[n], scipy.special.logsumexp(alpha * logits[n][kept]), rtol=1e-13
        )
    np.testing.assert_array_equal(
        reference.soft_argmax2d(logits, inverse_temperature=alpha), moments.mean
    )


@laws
@given(rigs.logits(3, max_size=7), rigs.generators())
def test_moments3d_in_the_world_are_weighted_averages_of_positions(
    logits: Array, rng: np.random.Generator
) -> None:
    lead = logits.shape[:-3]
    batch = lead[:1]  # a grid for each element of the first batch dimension, if there is one
    grid = (rng.normal(size=(*batch, 3)), rng.normal(size=(*batch, 3, 3)))
    moments = reference.softmax_moments3d(logits, grid=grid)
    index = reference.softmax_moments3d(logits)
    ijk = np.indices(logits.shape[-3:]).reshape(3, -1)
    for n in np.ndindex(lead):
        kept = logits[n].ravel() > -np.inf
        if not kept.any():
            assert np.isnan(moments.mean[n]).all()
            continue
        origin, axes = (part[n[:1]] for part in grid)
        positions = (origin + ijk.T @ axes).T[:, kept]
        p = scipy.special.softmax(logits[n].ravel()[kept])
        np.testing.assert_allclose(moments.mean[n], positions @ p, rtol=1e-9, atol=1e-9)
        spread = np.cov(positions, aweights=p, ddof=0)
        np.testing.assert_allclose(moments.covariance[n], spread, rtol=1e-8, atol=1e-8)
        np.testing.assert_allclose(index.mean[n], ijk[:, kept] @ p, rtol=1e-10, atol=1e-10)
    np.testing.assert_array_equal(moments.log_partition, index.log_partition)
    np.testing.assert_array_equal(reference.soft_argmax3d(logits, grid=grid), moments.mean)


@laws
@given(rigs.logits(2, masks=False), st.integers(0, 5), st.integers(0, 5), st.floats(-50, 50))
def test_a_masked_border_shifts_the_mean_and_a_constant_does_not(
    logits: Array, left: int, top: int, constant: float
) -> None:
    border = [(0, 0)] * (logits.ndim - 2) + [(top, 3), (left, 1)]
    shifted = np.pad(logits + constant, border, constant_values=-np.inf)
    np.testing.assert_allclose(
        reference.soft_argmax2d(shifted),
        reference.soft_argmax2d(logits) + np.array([left, top]),
        rtol=0.0,
        atol=1e-9,  # logits of 1e4 and their shift round to 2e-12 before the exponential
    )


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_spoilt_map_is_nan_without_gradient_and_alone(bad: float) -> None:
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(3, 5, 4))
    clean = reference.softmax_moments2d(logits)
    spoilt_logits = logits.copy()
    spoilt_logits[1, 2, 3] = bad
    spoilt_logits[1, 0, 0] = -np.inf
    spoilt = reference.softmax_moments2d(spoilt_logits)
    for after, before in zip(spoilt, clean, strict=True):
        assert np.isnan(after[1]).all()
        np.testing.assert_array_equal(after[[0, 2]], before[[0, 2]])

    grad = rng.normal(size=(3, 2))
    gradient = reference.soft_argmax2d_vjp(grad, logits)
    grad[1] = np.nan
    spoilt_gradient = reference.soft_argmax2d_vjp(grad, spoilt_logits)
    assert (spoilt_gradient[1] == 0.0).all()
    np.testing.assert_array_equal(spoilt_gradient[[0, 2]], gradient[[0, 2]])


def test_masked_elements_have_no_gradient_whatever_comes_in() -> None:
    logits = np.random.default_rng(2).normal(size=(2, 3, 4, 5))
    masked = np.random.default_rng(3).uniform(size=logits.shape) < 0.4
    masked[1] = True
    logits[masked] = -np.inf
    nan3 = np.full(3, np.nan)
    grid = (np.zeros(3), np.eye(3))
    for gradient in (
        reference.soft_argmax3d_vjp(nan3, logits),
        reference.soft_argmax3d_vjp(nan3, logits, grid=grid)[0],
        reference.softmax_moments3d_vjp(nan3, np.nan, np.nan, logits),
    ):
        assert (gradient[masked] == 0.0).all()
        assert np.isnan(gradient[~masked]).all()
    _, grad_origin, grad_axes = reference.soft_argmax3d_vjp(np.ones(3), logits, grid=grid)
    mean = reference.soft_argmax3d(logits[0])
    np.testing.assert_array_equal(grad_origin, np.ones(3))  # of the first volume alone
    np.testing.assert_allclose(grad_axes, mean[:, None] * np.ones(3), rtol=1e-14)


@pytest.mark.parametrize("alpha", [1.0, 3.0, -0.7])
def test_soft_argmax2d_vjp(alpha: float) -> None:
    rng = np.random.default_rng(4)
    heatmaps, grad = rng.normal(size=(2, 4, 5)), rng.normal(size=(2, 2))
    heatmaps[1, 0, :2] = -np.inf

    def loss(h: Array) -> float:
        return float((grad * reference.soft_argmax2d(h, inverse_temperature=alpha)).sum())

    gradient = reference.soft_argmax2d_vjp(grad, heatmaps, inverse_temperature=alpha)
    assert_close(gradient, numerical_gradient(loss, heatmaps), 1e-9)
    np.testing.assert_allclose(gradient.sum((-1, -2)), 0.0, atol=1e-13)


def test_soft_argmax3d_vjp_reaches_volumes_origin_and_axes() -> None:
    rng = np.random.default_rng(5)
    volumes, grad = rng.normal(size=(2, 2, 2, 3, 4)), rng.normal(size=(2, 2, 3))
    origin, axes = rng.normal(size=(2, 3)), rng.normal(size=(2, 3, 3))

    def loss(v: Array, o: Array, a: Array) -> float:
        world = reference.soft_argmax3d(v, inverse_temperature=1.5, grid=(o, a))
        return float((grad * world).sum())

    gradients = reference.soft_argmax3d_vjp(
        grad, volumes, inverse_temperature=1.5, grid=(origin, axes)
    )
    assert_close(gradients[0], numerical_gradient(lambda v: loss(v, origin, axes), volumes), 1e-9)
    assert_close(gradients[1], numerical_gradient(lambda o: loss(volumes, o, axes), origin), 1e-9)
    assert_close(gradients[2], numerical_gradient(lambda a: loss(volumes, origin, a), axes), 1e-9)

    index_gradient = reference.soft_argmax3d_vjp(grad, volumes, inverse_temperature=1.5)
    identity = reference.soft_argmax3d_vjp(
        grad, volumes, inverse_temperature=1.5, grid=(np.zeros(3), np.eye(3))
    )
    np.testing.assert_array_equal(index_gradient, identity[0])
    assert identity[1].shape == (3,)
    np.testing.assert_allclose(identity[1], grad.sum((0, 1)), rtol=1e-13)


@pytest.mark.parametrize("dims", [2, 3])
def test_softmax_moments_vjp(dims: int) -> None:
    rng = np.random.default_rng(6)
    logits = rng.normal(size=(2, 3, 2, 4)[-dims - 1 :])
    logits[0, ..., 0] = -np.inf
    lead = logits.shape[:-dims]
    # The gradient to the covariance need not be symmetric.
    grads = tuple(rng.normal(size=(*lead, *shape)) for shape in ((dims,), (dims, dims), ()))
    moments: Callable[..., reference.Moments] = getattr(reference, f"softmax_moments{dims}d")
    vjp: Callable[..., Array] = getattr(reference, f"softmax_moments{dims}d_vjp")

    def loss(x: Array) -> float:
        outputs = moments(x, inverse_temperature=1.7)
        return float(sum((g * o).sum() for g, o in zip(grads, outputs, strict=True)))

    gradient = vjp(*grads, logits, inverse_temperature=1.7)
    assert_close(gradient, numerical_gradient(loss, logits), 1e-9)


@given(batch=rigs.batch_shapes())
@laws
def test_soft_argmax_of_empty_batches(batch: tuple[int, ...]) -> None:
    assert reference.soft_argmax2d(np.zeros((*batch, 2, 3))).shape == (*batch, 2)
    gradient = reference.soft_argmax3d_vjp(np.ones((*batch, 3)), np.zeros((*batch, 2, 3, 4)))
    assert gradient.shape == (*batch, 2, 3, 4)


def test_a_map_without_elements_has_no_mean() -> None:
    moments = reference.softmax_moments2d(np.zeros((2, 0, 3)))
    assert np.isnan(moments.mean).all()
    assert np.isnan(moments.covariance).all()
    assert (moments.log_partition == -np.inf).all()


# --- soft-argmax with depth ----------------------------------------------------------------------


@laws
@given(rigs.logits(2), rigs.generators(), st.sampled_from([0.5, 1.0, 30.0]))
def test_soft_argmax25d_adds_the_mean_depth(
    heatmaps: Array, rng: np.random.Generator, alpha: float
) -> None:
    depths = rng.normal(2000.0, 500.0, heatmaps.shape[-2:])
    found = reference.soft_argmax25d(heatmaps, depths, inverse_temperature=alpha)
    np.testing.assert_array_equal(
        found[..., :2], reference.soft_argmax2d(heatmaps, inverse_temperature=alpha)
    )
    for n in np.ndindex(heatmaps.shape[:-2]):
        kept = heatmaps[n] > -np.inf
        if not kept.any():
            assert np.isnan(found[n]).all()
            continue
        p = scipy.special.softmax(alpha * heatmaps[n][kept])
        np.testing.assert_allclose(found[n][2], p @ depths[kept], rtol=1e-11)


def test_the_mean_depth_of_coordinates_is_the_mean_pixel() -> None:
    heatmaps = np.random.default_rng(7).normal(size=(3, 5, 4))
    y, x = np.indices((5, 4))
    for coordinate, axis in ((x, 0), (y, 1)):
        found = reference.soft_argmax25d(heatmaps, coordinate)
        np.testing.assert_allclose(found[..., 2], found[..., axis], rtol=1e-13)


def test_soft_argmax25d_vjp() -> None:
    rng = np.random.default_rng(8)
    heatmaps, depths = rng.normal(size=(2, 3, 4, 5)), rng.normal(size=(3, 4, 5))
    heatmaps[1, 0, :2, 1] = -np.inf
    grad = rng.normal(size=(2, 3, 3))

    def loss(h: Array, d: Array) -> float:
        return float((grad * reference.soft_argmax25d(h, d, inverse_temperature=1.7)).sum())

    found = reference.soft_argmax25d_vjp(grad, heatmaps, depths, inverse_temperature=1.7)
    assert_close(found[0], numerical_gradient(lambda h: loss(h, depths), heatmaps), 1e-9)
    assert_close(found[1], numerical_gradient(lambda d: loss(heatmaps, d), depths), 1e-9)
    pixels_alone = reference.soft_argmax25d_vjp(grad * [1, 1, 0], heatmaps, depths)
    np.testing.assert_allclose(
        pixels_alone[0], reference.soft_argmax2d_vjp(grad[..., :2], heatmaps), rtol=1e-12, atol=0.0
    )
    assert (pixels_alone[1] == 0.0).all()


@pytest.mark.parametrize("absent", [-np.inf, -1e4])  # masked, or so low that p underflows
def test_depths_where_p_is_zero_do_not_count(absent: float) -> None:
    rng = np.random.default_rng(9)
    heatmaps, depths, grad = (rng.normal(size=(2, *s)) for s in ((4, 5), (4, 5), (3,)))
    heatmaps[:, 1, 2] = absent
    expected = reference.soft_argmax25d(heatmaps, depths)
    gradients = reference.soft_argmax25d_vjp(grad, heatmaps, depths)
    assert (gradients[1][:, 1, 2] == 0.0).all()
    for junk in (np.nan, np.inf, 1e300):
        depths[:, 1, 2] = junk
        np.testing.assert_array_equal(reference.soft_argmax25d(heatmaps, depths), expected)
        again = reference.soft_argmax25d_vjp(grad, heatmaps, depths)
        np.testing.assert_array_equal(again, gradients)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, [np.inf, -np.inf], [np.nan, np.inf]])
def test_a_mean_depth_that_is_not_finite_spoils_the_depth_alone(bad: float | list[float]) -> None:
    rng = np.random.default_rng(10)
    heatmaps, depths, grad = (rng.normal(size=(2, *s)) for s in ((4, 5), (4, 5), (3,)))
    clean = reference.soft_argmax25d(heatmaps, depths)
    clean_gradients = reference.soft_argmax25d_vjp(grad, heatmaps, depths)
    depths[1, 0, 3:5] = bad
    found = reference.soft_argmax25d(heatmaps, depths)
    assert np.isnan(found[1, 2])
    np.testing.assert_array_equal(found[1, :2], clean[1, :2])
    np.testing.assert_array_equal(found[0], clean[0])
    for g_z in (grad[1, 2], np.nan):
        grad[1, 2] = g_z
        gradients = reference.soft_argmax25d_vjp(grad, heatmaps, depths)
        pixels_alone = reference.soft_argmax2d_vjp(grad[1, :2], heatmaps[1])
        assert_close(gradients[0][1], pixels_alone, 1e-14)
        assert (gradients[1][1] == 0.0).all()
        np.testing.assert_array_equal(gradients[0][0], clean_gradients[0][0])
        np.testing.assert_array_equal(gradients[1][0], clean_gradients[1][0])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_map_without_mean_has_no_depth_either(bad: float) -> None:
    heatmaps = np.random.default_rng(11).normal(size=(2, 4, 5))
    heatmaps[1] = bad
    depths = np.ones((4, 5))
    assert np.isnan(reference.soft_argmax25d(heatmaps, depths)[1]).all()
    for grad in (np.ones(3), np.full((2, 3), [[1.0, 1.0, 1.0], [np.nan, np.nan, np.nan]])):
        grad_heatmaps, grad_depths = reference.soft_argmax25d_vjp(grad, heatmaps, depths)
        assert (grad_heatmaps[1] == 0.0).all()
        np.testing.assert_allclose(grad_depths.sum(), 1.0, rtol=1e-13)  # of the first map


def test_soft_argmax25d_raises_on_shapes() -> None:
    with pytest.raises(ValueError, match=r"heatmaps must be \[..., H, W\], got \(4,\)"):
        reference.soft_argmax25d(np.ones(4), np.ones(4))
    with pytest.raises(ValueError, match=r"depth_maps must be .* H, W = \(4, 5\), got \(5, 4\)"):
        reference.soft_argmax25d(np.ones((4, 5)), np.ones((5, 4)))
