# SPDX-License-Identifier: Apache-2.0
"""The softmax-moment kernels of every backend against `tritool.reference`.

The bounds on float32 are those of docs/ops/soft_argmax.md.
"""

from __future__ import annotations

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
    every_float32_kernel,
    every_kernel,
    other_workers,
)

from tritool import reference

laws = settings(derandomize=True, deadline=None, max_examples=12)
both_dims = pytest.mark.parametrize("dims", [2, 3])


def reference_moments(logits: Array, dims: int, alpha: float) -> reference.Moments:
    function = reference.softmax_moments2d if dims == 2 else reference.softmax_moments3d
    return function(logits, inverse_temperature=alpha)


def reference_moments_vjp(grads: Any, logits: Array, dims: int, alpha: float) -> Array:
    function = reference.softmax_moments2d_vjp if dims == 2 else reference.softmax_moments3d_vjp
    return function(*grads, logits, inverse_temperature=alpha)


def random_grads(rng: np.random.Generator, moments: Any) -> tuple[Array, Array, Array]:
    mean, covariance, log_partition = (rng.standard_normal(m.shape) for m in moments[:3])
    return mean, covariance, log_partition


def check_moments(kernels: Kernels, logits: Array, dims: int, alpha: float, seed: int) -> None:
    """Compare values and gradients with the reference, to a few roundings of what they stand on."""
    (logits,) = kernels.cast(logits)
    moments = kernels.moments(logits, dims, alpha)
    expected = reference_moments(logits, dims, alpha)
    eps = np.finfo(kernels.dtype).eps
    size = max(logits.shape[-dims:])
    finite = np.where(np.isfinite(logits), logits, 0.0).astype(np.float64)
    exponent = alpha * np.abs(finite).max(initial=0.0)
    # The reference rounds alpha l before it subtracts the largest, and adds in one long sum.
    share = 8.0 * eps + np.finfo(np.float64).eps * (32.0 + 4.0 * exponent)
    np.testing.assert_allclose(moments.mean, expected.mean, rtol=0.0, atol=share * size)
    np.testing.assert_allclose(
        moments.covariance, expected.covariance, rtol=0.0, atol=share * size**2
    )
    within = share * 4.0 + 2.0 * eps * exponent
    np.testing.assert_allclose(moments.log_partition, expected.log_partition, rtol=0.0, atol=within)

    grads = random_grads(np.random.default_rng(seed), expected)
    found = kernels.moments_vjp(grads, logits, moments, dims, alpha)
    expected_grad = reference_moments_vjp(kernels.cast(*grads), logits, dims, alpha)
    within = alpha * share * size**2 * np.abs(grads[1]).max(initial=1.0) * dims**2
    np.testing.assert_allclose(found, expected_grad, rtol=0.0, atol=within)
    assert_zero(found[np.broadcast_to(logits == -np.inf, found.shape)])


@every_kernel
@both_dims
@laws
@given(data=st.data(), alpha=st.sampled_from([1.0, 1e-3, 0.3, 100.0]), seed=st.integers(0, 2**32))
def test_moments_agree_with_the_reference(
    kernels: Kernels, dims: int, data: st.DataObject, alpha: float, seed: int
) -> None:
    check_moments(kernels, data.draw(rigs.logits(dims)), dims, alpha, seed)


@every_kernel
@both_dims
def test_moments_in_every_layout(kernels: Kernels, dims: int) -> None:
    """Rows with and without vector loads, adjacent maps, broadcast and reversed ones, splits."""
    rng = np.random.default_rng(0)
    shape = (24, 16) if dims == 2 else (6, 5, 16)
    dense = rng.standard_normal((3, 37, *shape)).astype(kernels.dtype) * 4.0
    last = np.ascontiguousarray(np.moveaxis(dense, 1, -1))
    layouts = {
        "aligned rows": dense,
        "rows of an odd length": dense[..., 1:],
        "misaligned rows": np.ravel(dense)[1 : 1 + 2 * 37 * dense[0, 0].size].reshape(
            2, 37, *shape
        ),
        "steps": dense[..., ::2],
        "reversed": dense[:, ::-1, ..., ::-1],
        "transposed": dense.swapaxes(-1, -2),
        "channels last": np.moveaxis(last, -1, 1),
        "few channels last": np.moveaxis(last[..., :5], -1, 1),
        "one map": dense[0, 0],
        "broadcast": np.broadcast_to(dense[:, :1], (3, 4, *shape)),
        "one split map": rng.standard_normal((130, 90) if dims == 2 else (21, 32, 20)) * 4.0,
        "split channels last": np.moveaxis(rng.standard_normal((101, 99, 6)), -1, 0)
        if dims == 2
        else np.moveaxis(rng.standard_normal((20, 21, 25, 6)), -1, 0),
    }
    for seed, (name, logits) in enumerate(layouts.items()):
        print(name)
        check_moments(kernels, logits, dims, 1.3, seed)


@every_float32_kernel
def test_rows_of_every_length(kernels: Kernels) -> None:
    """Shorter than the vectors, whole vectors, and some elements more."""
    rng = np.random.default_rng(10)
    for width in (*range(1, 36), 47, 48, 49):
        check_moments(kernels, 3.0 * rng.standard_normal((2, 5, width)), 2, 1.3, width)


@every_kernel
@both_dims
@pytest.mark.parametrize("order", [1, -1], ids=["rising", "falling"])
def test_levels_rise_row_by_row(kernels: Kernels, dims: int, order: int) -> None:
    """Every row, or none but the first, is above all that were seen before it."""
    rng = np.random.default_rng(11)
    shape = (3, 20, 19) if dims == 2 else (3, 4, 5, 19)
    rows = np.arange(20.0)[::order].reshape(*shape[1:-1], 1)
    check_moments(kernels, 3.0 * rows + rng.random(shape), dims, 1.0, 0)


@every_float32_kernel
def test_a_large_gradient_is_that_of_its_maps(kernels: Kernels) -> None:
    """Large results are written past the caches, small ones not."""
    maps = 2 if kernels.backend == CUDA else 35
    rng = np.random.default_rng(12)
    logits = rng.standard_normal((maps, 32, 64, 64)).astype(np.float32)
    assert kernels.backend == CUDA or logits.nbytes > 16 << 20 > logits.nbytes / 5
    moments = kernels.moments(logits, 3)
    grads = random_grads(rng, moments)
    found = kernels.moments_vjp(grads, logits, moments, 3)
    for some in np.array_split(np.arange(maps), 5):
        part = kernels.moments_vjp(
            [grad[some] for grad in grads], logits[some], kernels.moments(logits[some], 3), 3
        )
        assert_same_bits(found[some], part)


@every_kernel
def test_a_map_and_its_channels_last_copy_agree(kernels: Kernels) -> None:
    first = np.random.default_rng(1).standard_normal((2, 19, 12, 9)).astype(kernels.dtype)
    last = np.ascontiguousarray(first.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    moments, other = kernels.moments(first, 2, 2.0), kernels.moments(last, 2, 2.0)
    eps = np.finfo(kernels.dtype).eps
    for a, b in zip(moments[:3], other[:3], strict=True):
        np.testing.assert_allclose(a, b, rtol=0.0, atol=10 * eps * np.abs(b).max())
    grads = random_grads(np.random.default_rng(2), moments)
    gradient = kernels.moments_vjp(grads, first, moments, 2, 2.0)
    other_gradient = kernels.moments_vjp(grads, last, other, 2, 2.0)
    assert other_gradient.strides == last.strides  # in the memory format of the logits
    np.testing.assert_allclose(gradient, other_gradient, rtol=0.0, atol=100 * eps)


def accuracy_maps(size: tuple[int, int]) -> dict[str, tuple[Array, float]]:
    """Return the maps of the op page's accuracy table as (logits, inverse temperature)."""
    rng = np.random.default_rng(3)
    y, x = np.mgrid[: size[0], : size[1]]
    gaussian = np.exp(-((x - 0.4 * size[1]) ** 2 + (y - 0.6 * size[0]) ** 2) / (2 * 2.0**2))
    gaussian += 0.02 * rng.standard_normal(size)
    ramp = np.linspace(-20.0, 20.0, size[0] * size[1]).reshape(size)
    return {
        "Gaussian": (gaussian, 100.0),
        "Gaussian at 100": (gaussian + 100.0, 100.0),
        "noise": (rng.standard_normal(size), 1.0),
        "ramp": (ramp, 1.0),
    }


@every_float32_kernel
@pytest.mark.parametrize(("size", "bound"), [((96, 100), 1e-5), ((1000, 992), 5e-5)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_soft_argmax_keeps_its_float32_bounds(
    kernels: Kernels, size: tuple[int, int], bound: float, channels_last: bool
) -> None:
    if size[0] == 1000 and kernels.backend == CUDA:
        size = (250, 248)  # as long a sum for every emulated thread, in fewer blocks
    for name, (logits, alpha) in accuracy_maps(size).items():
        maps = np.repeat(logits.astype(np.float32)[..., None], 4, axis=-1).transpose(2, 0, 1)
        maps = maps if channels_last else np.ascontiguousarray(maps[:1])
        expected = reference.soft_argmax2d(maps[:1], inverse_temperature=alpha)
        error = np.abs(kernels.moments(maps, 2, alpha).mean - expected).max()
        assert error <= bound, (name, error)


@every_float32_kernel
@both_dims
def test_half_precision_logits_are_read_as_they_are(kernels: Kernels, dims: int) -> None:
    rng = np.random.default_rng(4)
    wide = 10.0 * rng.standard_normal((3, 8, 6, 16)).astype(np.float32)
    wide[0, 0, 0, :3] = -np.inf
    float16 = wide.astype(np.float16)
    bits = (wide.view(np.uint32) >> 16).astype(np.uint16)  # bfloat16
    bfloat16 = (bits.astype(np.uint32) << 16).view(np.float32)
    for half, full, steps in (
        (float16, float16.astype(np.float32), 2**-10),
        (bits, bfloat16, 2**-7),
    ):
        for layout in (lambda a: a, lambda a: np.moveaxis(np.moveaxis(a, 0, -1).copy(), -1, 0)):
            moments, expected = (kernels.moments(layout(a), dims) for a in (half, full))
            for a, b in zip(moments, expected, strict=True):
                assert a.dtype == np.float32
                np.testing.assert_allclose(a, b, rtol=2e-6, atol=2e-6)
            grads = random_grads(rng, expected)
            found, gradient = (
                kernels.moments_vjp(grads, layout(a), expected, dims) for a in (half, full)
            )
            assert found.dtype == half.dtype
            if half is bits:
                found = (found.astype(np.uint32) << 16).view(np.float32)
            # Rounded once; float16 has steps of 2^-24 below 2^-14.
            np.testing.assert_allclose(found, gradient, rtol=0.51 * steps, atol=2**-25 + 1e-6)


@every_kernel
@laws
@given(st.data(), st.sampled_from([1.0, 0.5, 30.0]), st.integers(-(2**12), 2**12))
def test_a_constant_shifts_the_log_partition_alone(
    kernels: Kernels, data: st.DataObject, alpha: float, shift: int
) -> None:
    logits = (
        np.round(data.draw(rigs.logits(2, max_size=20)) * 64.0) / 64.0
    )  # so that adding is exact
    logits = np.clip(logits, None, 4096.0)
    moments, shifted = (kernels.moments(a, 2, alpha) for a in (logits, logits + shift))
    eps = np.finfo(kernels.dtype).eps
    np.testing.assert_allclose(moments.mean, shifted.mean, rtol=0.0, atol=200 * eps)
    within = 4 * eps * alpha * (abs(shift) + np.abs(logits[np.isfinite(logits)]).max(initial=1.0))
    np.testing.assert_allclose(
        shifted.log_partition, moments.log_partition + alpha * shift, rtol=0.0, atol=within
    )


@every_kernel
@both_dims
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_spoilt_map_is_nan_without_gradient_and_alone(
    kernels: Kernels, dims: int, channels_last: bool, bad: float
) -> None:
    """Neighbours share SIMD lanes and warps: they keep every bit."""
    rng = np.random.default_rng(5)
    shape = (33, 7, 12) if dims == 2 else (33, 3, 4, 8)
    logits = rng.standard_normal(shape).astype(kernels.dtype)
    if channels_last:
        logits = np.moveaxis(np.moveaxis(logits, 0, -1).copy(), -1, 0)
    clean = kernels.moments(logits, dims)
    grads = random_grads(rng, clean)
    clean_gradient = kernels.moments_vjp(grads, logits, clean, dims)
    for spoilt in (0, 4, 15, 32):
        maps = logits.copy(order="K")
        maps[spoilt, ...] = bad if bad == -np.inf else maps[spoilt]
        maps[(spoilt, *(0,) * (dims - 1), 5)] = bad
        moments = kernels.moments(maps, dims)
        others = np.arange(33) != spoilt
        assert np.isnan(moments.mean[spoilt]).all()
        assert np.isnan(moments.covariance[spoilt]).all()
        log_partition = moments.log_partition[spoilt]
        assert log_partition == -np.inf if bad == -np.inf else np.isnan(log_partition)
        assert_same_bits(tuple(m[others] for m in moments), tuple(m[others] for m in clean))

        for incoming in (1.0, np.nan):
            spoilt_grads = [
                np.where((np.arange(33) == spoilt).reshape(33, *(1,) * (g.ndim - 1)), incoming, g)
                for g in grads
            ]
            gradient = kernels.moments_vjp(spoilt_grads, maps, moments, dims)
            assert_zero(gradient[spoilt])
            assert_same_bits(gradient[others], clean_gradient[others])


@every_kernel
def test_absent_gradients_of_the_moments_count_as_zero(kernels: Kernels) -> None:
    rng = np.random.default_rng(6)
    logits = rng.standard_normal((5, 6, 8))
    for maps in (logits, np.moveaxis(np.moveaxis(logits, 0, -1).copy(), -1, 0)):
        moments = kernels.moments(maps, 2)
        grads = random_grads(rng, moments)
        for wanted in range(1, 8):
            some = tuple(g if wanted >> n & 1 else None for n, g in enumerate(grads))
            zeros = tuple(0.0 * g if s is None else g for g, s in zip(grads, some, strict=True))
            found = kernels.moments_vjp(some, maps, moments, 2)
            assert_same_bits(found + 0.0, kernels.moments_vjp(zeros, maps, moments, 2) + 0.0)


@every_kernel
@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 5, 3, 4), (2, 0, 3), (3, 0), (0, 0)])
def test_moments_of_nothing(kernels: Kernels, shape: tuple[int, ...]) -> None:
    logits = np.zeros(shape)
    moments = kernels.moments(logits, 2)
    expected = reference.softmax_moments2d(logits)
    for found, want in zip(moments[:3], expected, strict=True):
        np.testing.assert_array_equal(found, want)
    assert kernels.moments_vjp(moments[:3], logits, moments, 2).shape == shape


@every_kernel
@both_dims
def test_moments_do_not_depend_on_who_computes_them(kernels: Kernels, dims: int) -> None:
    rng = np.random.default_rng(7)
    shape = (130, 90) if dims == 2 else (6, 21, 93)  # split among blocks
    for logits in (
        rng.standard_normal((3, *shape)).astype(kernels.dtype),
        np.moveaxis(rng.standard_normal((*shape, 35)).astype(kernels.dtype)[..., :6, :, :], -1, 0),
    ):
        moments = kernels.moments(logits, dims)
        grads = random_grads(rng, moments)
        gradient = kernels.moments_vjp(grads, logits, moments, dims)
        for other in other_workers(kernels):
            assert_same_bits(tuple(other.moments(logits, dims)), tuple(moments))
            assert_same_bits(other.moments_vjp(grads, logits, moments, dims), gradient)
