# SPDX-License-Identifier: Apache-2.0
"""The kernels of `soft_argmax25d`, every backend, against `tritool.reference`.

They are the softmax-moment kernels (test_kernels_moments.py) with a second map beside the first.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import rigs
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_bridge import (
    Array,
    Kernels,
    assert_same_bits,
    assert_zero,
    every_float32_kernel,
    every_kernel,
    other_workers,
)

from tritool import reference

laws = settings(derandomize=True, deadline=None, max_examples=12)


def channels_last(maps: Array) -> Array:
    """The same maps [..., J, H, W], neighbours in memory."""
    return np.moveaxis(np.ascontiguousarray(np.moveaxis(maps, -3, -1)), -1, -3)


def halves(head: Array) -> tuple[Array, Array]:
    """Heat maps and depth maps of a head of 2 J channels: views."""
    joints = head.shape[-3] // 2
    return head[..., :joints, :, :], head[..., joints:, :, :]


def check(
    kernels: Kernels, heatmaps: Array, depth_maps: Array, alpha: float, seed: int = 0
) -> None:
    """Compare result and gradients with the reference, to a few roundings of what they sum."""
    heatmaps, depth_maps = kernels.cast(heatmaps, depth_maps)
    result = kernels.soft_argmax25d(heatmaps, depth_maps, alpha)
    expected = reference.soft_argmax25d(heatmaps, depth_maps, inverse_temperature=alpha)
    eps = np.finfo(kernels.dtype).eps
    size, depth = max(heatmaps.shape[-2:]), np.abs(np.nan_to_num(depth_maps)).max(initial=0.0)
    finite = np.where(np.isfinite(heatmaps), heatmaps, 0.0).astype(np.float64)
    exponent = alpha * np.abs(finite).max(initial=0.0)
    share = 8.0 * eps + np.finfo(np.float64).eps * (32.0 + 4.0 * exponent)
    np.testing.assert_allclose(result[0][..., :2], expected[..., :2], rtol=0.0, atol=share * size)
    np.testing.assert_allclose(result[0][..., 2], expected[..., 2], rtol=0.0, atol=share * depth)

    grad = np.random.default_rng(seed).standard_normal(expected.shape)
    found = kernels.soft_argmax25d_vjp(grad, heatmaps, depth_maps, result, alpha)
    wanted = reference.soft_argmax25d_vjp(
        *kernels.cast(grad), heatmaps, depth_maps, inverse_temperature=alpha
    )
    within = 4.0 * share * np.abs(grad).max(initial=1.0)
    np.testing.assert_allclose(found[0], wanted[0], rtol=0.0, atol=within * alpha * (size + depth))
    np.testing.assert_allclose(found[1], wanted[1], rtol=0.0, atol=within)
    for gradient in found:
        assert_zero(gradient[heatmaps == -np.inf])


@every_kernel
@laws
@given(
    heatmaps=rigs.logits(2),
    alpha=st.sampled_from([1.0, 1e-3, 0.3, 100.0]),
    offset=st.sampled_from([0.0, 1000.0]),
    seed=st.integers(0, 2**32),
)
def test_agrees_with_the_reference(
    kernels: Kernels, heatmaps: Array, alpha: float, offset: float, seed: int
) -> None:
    depth_maps = offset + 30.0 * np.random.default_rng(seed).standard_normal(heatmaps.shape)
    depth_maps[heatmaps == -np.inf] = np.nan  # does not count
    check(kernels, heatmaps, depth_maps, alpha, seed)


@every_kernel
def test_every_layout(kernels: Kernels) -> None:
    """Rows with and without vector loads, adjacent maps, one layout beside another, splits."""
    rng = np.random.default_rng(0)
    head = 4.0 * rng.standard_normal((3, 74, 24, 16)).astype(kernels.dtype)
    heatmaps, depth_maps = halves(head)
    large = rng.standard_normal((6, 130, 90))
    one_map = np.broadcast_to(depth_maps[:1, :1], heatmaps.shape)
    layouts = {
        "dense": (heatmaps.copy(), depth_maps.copy()),
        "halves of a head": halves(head),
        "halves of a channels-last head": halves(channels_last(head)),
        "halves of a small channels-last head": halves(channels_last(head[:, :6])),
        "alternate channels": (head[:, ::2], head[:, 1::2]),
        "alternate channels, last": (channels_last(head)[:, ::2], channels_last(head)[:, 1::2]),
        "rows of an odd length": halves(head[..., 1:]),
        "one misaligned": (heatmaps[..., :-8], depth_maps[..., 5:-3]),
        "one channels-last": (heatmaps, channels_last(depth_maps)),
        "the other channels-last": (channels_last(heatmaps), depth_maps),
        "one transposed": (heatmaps, depth_maps.swapaxes(-1, -2).copy().swapaxes(-1, -2)),
        "one reversed": (heatmaps[..., ::-1, ::-1], depth_maps),
        "steps": halves(head[..., ::3, ::2]),
        "a shared depth map": (heatmaps, one_map),
        "a shared heat map": (one_map, heatmaps),
        "a shared depth map, channels-last": (channels_last(heatmaps), one_map),
        "one map": (head[0, 0], head[0, 1]),
        "split maps": halves(large),
        "split channels-last maps": halves(channels_last(rng.standard_normal((12, 99, 101)))),
    }
    for seed, (name, maps) in enumerate(layouts.items()):
        print(name)
        check(kernels, *maps, 1.3, seed)


@every_kernel
def test_gradients_lie_in_memory_as_their_maps(kernels: Kernels) -> None:
    heatmaps, depth_maps = np.random.default_rng(1).standard_normal((2, 2, 9, 5, 6))
    maps = kernels.cast(channels_last(heatmaps), depth_maps)
    gradients = kernels.soft_argmax25d_vjp(np.ones((2, 9, 3)), *maps, kernels.soft_argmax25d(*maps))
    assert [g.strides for g in gradients] == [m.strides for m in maps]


@every_kernel
@pytest.mark.parametrize("layout", [np.ascontiguousarray, channels_last])
def test_position_is_the_soft_argmax(kernels: Kernels, layout: Callable[[Array], Array]) -> None:
    """And the mean of the coordinates themselves is it again; of a constant, the constant."""
    rng = np.random.default_rng(2)
    heatmaps = layout(3.0 * rng.standard_normal((2, 19, 12, 33)))
    y, x = np.broadcast_arrays(*np.ogrid[:12.0, :33.0])
    eps = np.finfo(kernels.dtype).eps
    mean = kernels.moments(heatmaps, 2, 2.0).mean
    for depth, wanted in ((x, mean[..., 0]), (y, mean[..., 1]), (0.0 * x - 1234.5, -1234.5)):
        depth_maps = layout(np.broadcast_to(depth, heatmaps.shape))
        position, _ = kernels.soft_argmax25d(heatmaps, depth_maps, 2.0)
        np.testing.assert_allclose(position[..., :2], mean, rtol=0.0, atol=8 * 33 * eps)
        within = 8 * eps * np.abs(depth).max()
        np.testing.assert_allclose(position[..., 2] - wanted, 0.0, rtol=0.0, atol=within)


@every_kernel
@pytest.mark.parametrize("layout", [np.ascontiguousarray, channels_last])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_bad_depth_counts_where_its_pixel_weighs_anything(
    kernels: Kernels, layout: Callable[[Array], Array], bad: float
) -> None:
    """Wherever it lies: before or after the peak, in whatever lane, thread or split."""
    rng = np.random.default_rng(3)
    size = (9, 35)
    heatmaps = rng.standard_normal((33, *size)).astype(kernels.dtype)
    depth_maps = rng.standard_normal((33, *size)).astype(kernels.dtype)
    peaks, places = (rng.permuted(np.arange(33 * 9).reshape(9, 33), axis=0) for _ in range(2))
    grad = rng.standard_normal((33, 3))
    for map_ in range(33):
        heatmaps[map_].flat[peaks[map_ % 9, map_]] = 5.0
    # The heat maps' values there: masked, nothing (2^-1443), little (2^-72), and some.
    for logit, counts in ((-np.inf, False), (-1000.0, False), (-45.0, True), (0.0, True)):
        for map_ in range(33):
            heatmaps[map_].flat[places[map_ % 9, map_]] = logit
            depth_maps[map_].flat[places[map_ % 9, map_]] = 0.0
        maps = [layout(heatmaps), layout(depth_maps)]
        clean = kernels.soft_argmax25d(*maps)
        for map_ in range(0, 33, 2):  # every second one
            depth_maps[map_].flat[places[map_ % 9, map_]] = bad
        maps[1] = layout(depth_maps)
        result = kernels.soft_argmax25d(*maps)
        spoilt = counts & (np.arange(33) % 2 == 0)
        assert np.isnan(result[0][spoilt, 2]).all()
        assert_same_bits(result[0][..., :2], clean[0][..., :2])
        assert_same_bits(result[0][~spoilt], clean[0][~spoilt])
        # Without the depth its gradient counts as 0, also if it is NaN.
        incoming = np.where(spoilt[:, None] & (np.arange(3) == 2), np.nan, grad)
        found = kernels.soft_argmax25d_vjp(incoming, *maps, result)
        zeroed = np.where(spoilt[:, None] & (np.arange(3) == 2), 0.0, grad)
        wanted = kernels.soft_argmax25d_vjp(zeroed, maps[0], np.zeros_like(maps[1]), clean)
        assert_zero(found[1][spoilt])
        np.testing.assert_array_equal(found[0][spoilt], wanted[0][spoilt])
        assert all(np.isfinite(gradient).all() for gradient in found)


@every_kernel
@pytest.mark.parametrize("layout", [np.ascontiguousarray, channels_last])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_spoilt_heat_map_is_nan_without_gradient_and_alone(
    kernels: Kernels, layout: Callable[[Array], Array], bad: float
) -> None:
    rng = np.random.default_rng(5)
    heatmaps, depth_maps = rng.standard_normal((2, 33, 7, 12)).astype(kernels.dtype)
    depth_maps = layout(depth_maps)
    grad = rng.standard_normal((33, 3))
    clean = kernels.soft_argmax25d(layout(heatmaps), depth_maps)
    clean_gradients = kernels.soft_argmax25d_vjp(grad, layout(heatmaps), depth_maps, clean)
    for spoilt in (0, 4, 15, 32):
        maps = heatmaps.copy()
        maps[spoilt] = bad if bad == -np.inf else maps[spoilt]
        maps[spoilt, 0, 5] = bad
        maps = layout(maps)
        result = kernels.soft_argmax25d(maps, depth_maps)
        others = np.arange(33) != spoilt
        assert np.isnan(result[0][spoilt]).all()
        assert_same_bits(result[0][others], clean[0][others])
        for incoming in (1.0, np.nan):
            spoilt_grad = np.where(others[:, None], grad, incoming)
            gradients = kernels.soft_argmax25d_vjp(spoilt_grad, maps, depth_maps, result)
            for gradient, wanted in zip(gradients, clean_gradients, strict=True):
                assert_zero(gradient[spoilt])
                assert_same_bits(gradient[others], wanted[others])


@every_float32_kernel
@pytest.mark.parametrize("layout", [np.asarray, channels_last])
def test_half_precision_maps_are_read_as_they_are(
    kernels: Kernels, layout: Callable[[Array], Array]
) -> None:
    rng = np.random.default_rng(4)
    wide = 10.0 * rng.standard_normal((3, 10, 6, 16)).astype(np.float32)
    wide[0, 0, 0, :3] = -np.inf
    float16 = wide.astype(np.float16)
    bits = (wide.view(np.uint32) >> 16).astype(np.uint16)  # bfloat16
    bfloat16 = (bits.astype(np.uint32) << 16).view(np.float32)
    grad = rng.standard_normal((3, 5, 3))
    for half, full, steps in (
        (float16, float16.astype(np.float32), 2**-10),
        (bits, bfloat16, 2**-7),
    ):
        maps, wide_maps = halves(layout(half)), halves(layout(full))
        result, expected = kernels.soft_argmax25d(*maps), kernels.soft_argmax25d(*wide_maps)
        assert result[0].dtype == np.float32
        np.testing.assert_allclose(result[0], expected[0], rtol=2e-6, atol=4e-6)
        found = kernels.soft_argmax25d_vjp(grad, *maps, expected)
        wanted = kernels.soft_argmax25d_vjp(grad, *wide_maps, expected)
        for gradient, exact in zip(found, wanted, strict=True):
            assert gradient.dtype == half.dtype
            if half is bits:
                gradient = (gradient.astype(np.uint32) << 16).view(np.float32)
            # Rounded once; float16 has steps of 2^-24 below 2^-14.
            np.testing.assert_allclose(gradient, exact, rtol=0.51 * steps, atol=2**-25 + 1e-6)


@every_kernel
@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 5, 4), (2, 0, 3), (3, 0), (0, 0)])
def test_maps_of_nothing(kernels: Kernels, shape: tuple[int, ...]) -> None:
    maps = np.zeros(shape)
    result = kernels.soft_argmax25d(maps, maps)
    np.testing.assert_array_equal(result[0], reference.soft_argmax25d(maps, maps))
    gradients = kernels.soft_argmax25d_vjp(result[0], maps, maps, result)
    assert all(gradient.shape == shape for gradient in gradients)


@every_kernel
def test_result_does_not_depend_on_who_computes_it(kernels: Kernels) -> None:
    rng = np.random.default_rng(7)
    head = rng.standard_normal((12, 130, 90)).astype(kernels.dtype)  # split among blocks
    head[8, 100, 3] = np.nan
    for maps in (halves(head[:6]), halves(channels_last(head))):
        result = kernels.soft_argmax25d(*maps)
        grad = rng.standard_normal(result[0].shape)
        gradients = kernels.soft_argmax25d_vjp(grad, *maps, result)
        for other in other_workers(kernels):
            assert_same_bits(other.soft_argmax25d(*maps), result)
            assert_same_bits(other.soft_argmax25d_vjp(grad, *maps, result), gradients)
