# SPDX-License-Identifier: Apache-2.0
"""The unprojection kernels of every backend against `tritool.reference`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import rigs
import scenes
from hypothesis import given, settings
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
from scenes import Unprojection, unprojection

from tritool import reference

laws = settings(derandomize=True, deadline=None, max_examples=25)
aggregations = pytest.mark.parametrize("aggregation", scenes.AGGREGATIONS)
layouts = pytest.mark.parametrize("channels_last", [False, True], ids=["first", "last"])


# --- against the reference -----------------------------------------------------------------------


def in_layout(scene: Unprojection, channels_last: bool) -> Unprojection:
    """Lay the features out with the channels of a pixel side by side."""
    if not channels_last:
        return scene
    features = np.moveaxis(np.moveaxis(scene.features, 2, -1).copy(), -1, 2)
    return replace(scene, features=features)


def pixel_error(scene: Unprojection, eps: float) -> Array:
    """Bound the error of a projection in `eps`, per voxel in pixels, [B, 1, ...]."""
    points = scene.points
    flat = np.abs(points.reshape(len(points), 1, -1, 3))
    p = np.abs(scene.projections[:, :, None])
    terms = (p[..., :3] * flat[..., None, :]).sum(-1) + p[..., 3]
    pixels, depth = scene.pixels()
    x, y = np.abs(pixels.reshape(*terms.shape[:-1], 2)).transpose(3, 0, 1, 2)
    with np.errstate(all="ignore"):
        z = np.abs(depth.reshape(terms.shape[:-1]))
        bound = (terms[..., 0] + terms[..., 1] + (x + y) * terms[..., 2]) / z
    # What is far beside the image may be off by far.
    bound = np.where((x > 1e3) | (y > 1e3), 0.0, bound).max(1, initial=0.0)
    bound = 4.0 * eps * bound.reshape(len(bound), 1, *points.shape[1:-1])
    return np.broadcast_to(bound, (scene.batch, *bound.shape[1:]))


def full_gradients(gradients: Any, scene: Unprojection) -> list[Array]:
    """Bring the reference's gradients into the form of the kernels', where the batch is full."""
    features, projections, grid, confidences = gradients
    if isinstance(scene.grid, tuple):
        grid = np.concatenate([grid[0][:, None], grid[1]], 1)
    else:
        grid = grid.reshape(len(grid), -1, 3)
    return [features, projections, grid, *([] if confidences is None else [confidences])]


def reduced(gradients: Any, scene: Unprojection) -> list[Array]:
    """Sum the kernels' gradients over the batch where an operand is shared."""
    operands = [scene.features, scene.projections, None, scene.confidences]
    grid = scene.grid[0] if isinstance(scene.grid, tuple) else scene.grid
    sizes = [len(grid) if i == 2 else None if a is None else len(a) for i, a in enumerate(operands)]
    results = []
    for i, (gradient, size) in enumerate(zip(gradients, sizes, strict=True)):
        if gradient is None or size is None:
            continue
        total = gradient.astype(np.float64)
        total = total.sum(0, keepdims=True) if size == 1 else total
        if i == 3 and scene.confidences is not None and scene.confidences.ndim == 2:
            total = total.sum(-1)
        results.append(total)
    return results


def conditions(exact: Unprojection, eps: float) -> tuple[Array, Array, float]:
    """Say where results are compared, the error of pixels there, and what multiplies errors."""
    error = pixel_error(exact, eps)
    smooth = exact.clear(0.1) & (error < 0.05)  # away from where values or slopes jump
    size = float(1.0 + np.abs(exact.features).max())
    # A softmax of spread features multiplies their error by their range.
    return smooth, error, size**2 if exact.aggregation == "softmax" else size


def check_gradients(
    found: Any, grad: Array, exact: Unprojection, eps: float, rounded: float = 0.0
) -> None:
    """Compare with the reference; `rounded` is the unit roundoff of the features' gradient."""
    smooth, error, steep = conditions(exact, eps)
    wanted = reference.unproject_vjp(grad.astype(np.float64), *exact.arguments, **exact.options)
    worst = float(np.where(smooth, error, 0.0).max(initial=0.0))
    results = zip(reduced(found, exact), full_gradients(wanted, exact), strict=True)
    for i, (have, want) in enumerate(results):
        within = (np.abs(want).max(initial=0.0) + 1e-2) * steep * (400 * eps + 8 * worst)
        rtol = rounded if i == 0 else 0.0
        np.testing.assert_allclose(have, want, rtol=rtol, atol=within)


def check(kernels: Kernels, scene: Unprojection, seed: int, channels_last: bool) -> None:
    """Compare values and gradients with the reference, away from where they jump."""
    exact = scene.astype(kernels.dtype).astype(np.float64)
    scene = in_layout(scene.astype(kernels.dtype), channels_last)
    eps = float(np.finfo(kernels.dtype).eps)
    smooth, error, steep = conditions(exact, eps)

    volume = kernels.unproject(scene, channels_last=channels_last)
    expected = reference.unproject(*exact.arguments, **exact.options)
    within = steep * (20.0 * eps + 4.0 * error)
    np.testing.assert_array_less(
        np.where(smooth, np.abs(volume - expected), 0.0), np.broadcast_to(within, volume.shape)
    )

    # float32 decides between views that are equal to rounding, and sums of softmax gradients by
    # rounding alone where the features' range is large: their gradients are compared in float64.
    if kernels.dtype == np.float32 and (scene.aggregation == "max" or steep > 1e3):
        return
    grad = np.random.default_rng(seed).standard_normal(volume.shape)
    grad = (grad * smooth).astype(kernels.dtype)
    found = kernels.unproject_vjp(grad, scene, channels_last=channels_last)
    check_gradients(found, grad, exact, eps)


@every_kernel
@layouts
@laws
@given(scene=scenes.unprojections())
def test_unproject_agrees_with_the_reference(
    kernels: Kernels, channels_last: bool, scene: Unprojection
) -> None:
    check(kernels, scene, 1, channels_last)


@every_kernel
@aggregations
@pytest.mark.parametrize(
    ("channels", "channels_last"), [(1, False), (3, True), (16, True), (17, False), (40, True)]
)
def test_every_number_of_channels(
    kernels: Kernels, aggregation: str, channels: int, channels_last: bool
) -> None:
    rng = np.random.default_rng(channels)
    for frame in (True, False):
        scene = unprojection(
            rng, channels=channels, batch=(2, 1, 2, 2), confidences="channels",
            zero_confidences=0.2, aggregation=aggregation, outside="exclude", frame=frame,
        )  # fmt: skip
        check(kernels, scene, channels, channels_last)


@every_kernel
@aggregations
def test_many_views(kernels: Kernels, aggregation: str) -> None:
    """More than the CPU's backward keeps samples of."""
    rng = np.random.default_rng(0)
    for outside in scenes.OUTSIDE:
        check(
            kernels, unprojection(rng, views=11, aggregation=aggregation, outside=outside), 2, True
        )


def to_half(array: Array, dtype: str) -> Array:
    """Round to float16, or cut off to bfloat16, which NumPy keeps as its bits."""
    if dtype == "float16":
        return array.astype(np.float16)
    return (np.ascontiguousarray(array, np.float32).view(np.uint32) >> 16).astype(np.uint16)


def from_half(array: Array) -> Array:
    if array.dtype == np.float16:
        return array.astype(np.float64)
    bits = np.ascontiguousarray(array).astype(np.uint32) << 16
    return bits.view(np.float32).astype(np.float64)


@every_float32_kernel
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@layouts
def test_half_precision_features_are_read_as_they_are(
    kernels: Kernels, dtype: str, channels_last: bool
) -> None:
    """Computed with in float32: the only roundings to half precision are those of the results."""
    rng = np.random.default_rng(3)
    scene = unprojection(rng, channels=9, confidences="views").astype(np.float32)
    stored = to_half(scene.features, dtype)
    exact = replace(scene, features=from_half(stored)).astype(np.float64)
    half = in_layout(replace(scene, features=stored), channels_last)
    eps = float(np.finfo(np.float32).eps)
    # Unit roundoffs: significands of 11 and of 8 bits.
    rounded = 2.0**-11 if dtype == "float16" else 2.0**-8
    smooth, error, steep = conditions(exact, eps)

    volume = from_half(kernels.unproject(half, channels_last=channels_last))
    expected = reference.unproject(*exact.arguments, **exact.options)
    within = steep * (20.0 * eps + 4.0 * error) + rounded * np.abs(expected)
    np.testing.assert_array_less(np.where(smooth, np.abs(volume - expected), 0.0), within)

    grad = np.where(smooth, rng.integers(-4, 5, volume.shape), 0).astype(np.float32)
    found = kernels.unproject_vjp(to_half(grad, dtype), half, channels_last=channels_last)
    assert found[0] is not None
    check_gradients((from_half(found[0]), *found[1:]), grad, exact, eps, rounded)


# --- accuracy ------------------------------------------------------------------------------------


@every_float32_kernel
@aggregations
def test_float32_is_within_1e_5_of_the_value_range(kernels: Kernels, aggregation: str) -> None:
    """Maps of 96 x 97, 4 views, 64^3 voxels; the emulated device takes some planes of these."""
    rng = np.random.default_rng(5)
    planes = 2 if kernels.backend == CUDA else 64
    rig = rigs.h36m4()
    to_map = np.diag([97 / rig.image_size[0], 96 / rig.image_size[1], 1.0])
    spacing = 2500.0 / 63
    origin = rigs.BOX_CENTER - 1250.0 + np.array([(64 - planes) / 2 * spacing, 0.0, 0.0])
    scene = Unprojection(
        rng.standard_normal((1, 4, 32, 96, 97)),
        (to_map @ rig.projections)[None],
        (origin[None], spacing * np.eye(3)[None], (planes, 64, 64)),
        aggregation=aggregation,
    ).astype(np.float32)
    exact = scene.astype(np.float64)
    volume = kernels.unproject(in_layout(scene, True), channels_last=True)
    # A volume of this size goes past the caches, in both layouts.
    assert_same_bits(kernels.unproject(scene), volume)
    expected = reference.unproject(*exact.arguments, **exact.options)
    # At the very border of a map a rounding decides whether a voxel is seen: not an error of value.
    smooth = np.broadcast_to(exact.clear(1e-4), volume.shape)
    assert smooth.mean() > 0.9
    assert np.abs(volume - expected)[smooth].max() <= 1e-5 * np.ptp(exact.features)


# --- laws ----------------------------------------------------------------------------------------


def ball_scene(aggregation: str = "softmax", **options: Any) -> Unprojection:
    rng = np.random.default_rng(7)
    return unprojection(rng, batch=(3, 3, 3, 3), aggregation=aggregation, **options)


@every_kernel
@aggregations
def test_the_order_of_equal_arguments_does_not_matter(kernels: Kernels, aggregation: str) -> None:
    scene = ball_scene(aggregation, views=4, confidences="views").astype(kernels.dtype)
    smooth = scene.astype(np.float64).clear()
    there = kernels.unproject(scene)
    back = kernels.unproject(scene.select_views(slice(None, None, -1)))
    bound = 1e-9 if kernels.dtype == np.float64 else 1e-3
    np.testing.assert_allclose(there * smooth, back * smooth, rtol=0, atol=bound)


@every_kernel
@aggregations
@pytest.mark.parametrize("outside", scenes.OUTSIDE)
def test_a_view_of_confidence_zero_is_absent(
    kernels: Kernels, aggregation: str, outside: str
) -> None:
    """Whatever it holds: its features, and its projection."""
    scene = ball_scene(aggregation, views=3, confidences="views", outside=outside)
    scene = scene.astype(kernels.dtype)
    assert scene.confidences is not None
    scene.confidences[:, 1] = 0.0
    scene.features[:, 1] = np.nan
    scene.projections[1, 1] = np.nan
    left = scene.select_views([0, 2])
    volume = kernels.unproject(scene)
    np.testing.assert_array_equal(volume, kernels.unproject(left))
    grad = np.ones_like(volume)
    gradients = kernels.unproject_vjp(grad, scene, deterministic=True)
    expected = kernels.unproject_vjp(grad, left, deterministic=True)
    for have, want, axis in zip(gradients, expected, (1, 1, None, 1), strict=True):
        assert have is not None
        assert want is not None
        if axis is None:
            np.testing.assert_allclose(have, want, rtol=1e-5)
            continue
        np.testing.assert_allclose(have[:, [0, 2]], want, rtol=1e-5, atol=1e-5)
        assert_zero(have[:, 1])


@every_kernel
@aggregations
@pytest.mark.parametrize("confidences", [False, True])
def test_a_voxel_that_no_view_sees_changes_no_other(
    kernels: Kernels, aggregation: str, confidences: bool
) -> None:
    """Voxels that all views see are aggregated without asking each view, if they fill a block."""
    rng = np.random.default_rng(11)
    rig = rigs.h36m4()
    to_map = np.diag([25 / rig.image_size[0], 24 / rig.image_size[1], 1.0])
    points = rigs.BOX_CENTER + rng.uniform(-300.0, 300.0, (1, 32, 3))
    seen = Unprojection(
        rng.standard_normal((1, 4, 18, 24, 25)),
        (to_map @ rig.projections)[None],
        points,
        rng.uniform(0.1, 1.0, (1, 4, 18)) if confidences else None,
        aggregation=aggregation,
    ).astype(kernels.dtype)
    assert not (seen.pixels()[0] < 0).any()
    moved = points.copy()
    moved[0, -1] += 1e6
    other = replace(seen, grid=moved.astype(kernels.dtype))
    volume, alike = kernels.unproject(seen), kernels.unproject(other)
    assert_same_bits(volume[..., :-1], alike[..., :-1])
    assert (volume[..., -1] != alike[..., -1]).any()
    grad = rng.standard_normal(volume.shape).astype(kernels.dtype)
    grad[..., -1] = 0
    gradients = kernels.unproject_vjp(grad, seen, deterministic=True)
    for have, want in zip(
        gradients, kernels.unproject_vjp(grad, other, deterministic=True), strict=True
    ):
        assert (have is None) == (want is None)
        if have is not None and want is not None:
            assert_same_bits(have, want)


@every_kernel
@aggregations
def test_what_is_not_known_is_nan_without_gradient_and_alone(
    kernels: Kernels, aggregation: str
) -> None:
    clean = ball_scene(aggregation, confidences="channels").astype(kernels.dtype)
    scene = clean.with_operands([a.copy() for a in clean.operands()])
    scene.projections[0, 1, 2, 3] = np.nan
    assert scene.confidences is not None
    scene.confidences[1, 0, 0] = -1.0
    scene.confidences[1, 2, 1] = np.inf
    volume = kernels.unproject(scene)
    assert np.isnan(volume[0]).all()
    assert np.isnan(volume[1]).all()
    np.testing.assert_array_equal(volume[2], kernels.unproject(clean)[2])
    grad = np.full_like(volume, np.nan)
    grad[2] = 1.0
    gradients = kernels.unproject_vjp(grad, scene)
    expected = kernels.unproject_vjp(grad[2:], select_item(clean, 2))
    for have, want in zip(gradients, expected, strict=True):
        assert have is not None
        assert want is not None
        assert_zero(have[:2])
        np.testing.assert_allclose(have[2:], want, rtol=1e-4, atol=1e-4)


def select_item(scene: Unprojection, item: int) -> Unprojection:
    return scene.with_operands([a[item : item + 1] for a in scene.operands()])


@every_kernel
@aggregations
def test_a_nan_among_the_features_spoils_what_samples_it(
    kernels: Kernels, aggregation: str
) -> None:
    clean = ball_scene(aggregation).astype(kernels.dtype)
    features = clean.features.copy()
    features[0, 0, 1, 3:5, 4:6] = np.nan
    scene = replace(clean, features=features)
    volume = kernels.unproject(scene)
    spoilt = np.isnan(volume)
    assert spoilt[0, 1].any()
    assert not spoilt[:, 0].any()
    assert not spoilt[1:].any()
    np.testing.assert_array_equal(volume[~spoilt], kernels.unproject(clean)[~spoilt])
    for gradient in kernels.unproject_vjp(np.ones_like(volume), scene):
        assert gradient is None or np.isfinite(gradient).all()


# --- how the work is divided ---------------------------------------------------------------------


@every_kernel
@aggregations
def test_results_do_not_depend_on_who_computes_them(kernels: Kernels, aggregation: str) -> None:
    rng = np.random.default_rng(11)
    scene = unprojection(
        rng, channels=20, size=(7, 9, 5), aggregation=aggregation, confidences="channels"
    ).astype(kernels.dtype)
    grad = rng.standard_normal(scene.shape)
    volume = kernels.unproject(scene)
    gradients = kernels.unproject_vjp(grad, scene, deterministic=True)
    for other in other_workers(kernels):
        assert_same_bits(other.unproject(scene), volume)
        assert_same_bits(other.unproject_vjp(grad, scene, deterministic=True), gradients)
        # Without the request a GPU may add in any order; the others have one order only.
        loose = other.unproject_vjp(grad, scene)
        if kernels.backend != CUDA:
            assert_same_bits(loose, gradients)
        for have, want in zip(loose, gradients, strict=True):
            assert have is not None
            assert want is not None
            np.testing.assert_allclose(have, want, rtol=1e-4, atol=1e-4 * np.abs(want).max())


@every_kernel
def test_a_gradient_that_is_not_wanted_changes_no_other(kernels: Kernels) -> None:
    names = ("want_features", "want_projections", "want_grid", "want_confidences")
    for frame in (True, False):
        scene = ball_scene(confidences="views", frame=frame).astype(kernels.dtype)
        grad = np.ones(scene.shape)
        everything = kernels.unproject_vjp(grad, scene, deterministic=True)
        for i, name in enumerate(names):
            others = {other: other == name for other in names}
            found = kernels.unproject_vjp(grad, scene, deterministic=True, **others)
            assert [g is not None for g in found] == [j == i for j in range(4)]
            np.testing.assert_allclose(found[i], everything[i], rtol=1e-4, atol=1e-4)


@every_kernel
def test_an_infinite_gradient_stays_in_its_item(kernels: Kernels) -> None:
    """Also where the sums are integers, which cannot hold it."""
    scene = ball_scene("mean").astype(kernels.dtype)
    grad = np.ones(scene.shape)
    expected = kernels.unproject_vjp(grad, scene, deterministic=True)
    grad[1].flat[:] = np.inf
    found = kernels.unproject_vjp(grad, scene, deterministic=True)
    assert found[0] is not None
    assert expected[0] is not None
    assert not np.isfinite(found[0][1]).all()
    np.testing.assert_array_equal(found[0][[0, 2]], expected[0][[0, 2]])


@every_kernel
@pytest.mark.parametrize(
    ("batch", "views", "channels", "points"),
    [(0, 3, 2, 5), (2, 0, 2, 5), (2, 3, 0, 5), (2, 3, 2, 0)],
)
def test_unprojection_of_nothing(
    kernels: Kernels, batch: int, views: int, channels: int, points: int
) -> None:
    scene = Unprojection(
        np.ones((batch, views, channels, 4, 5)),
        np.ones((batch, views, 3, 4)),
        np.ones((batch, points, 3)),
    ).astype(kernels.dtype)
    volume = bridge.unproject(
        kernels._handle, *kernels._unproject_arguments(scene)[0],
        **kernels._unproject_arguments(scene)[1], channels_last=False,
    )  # fmt: skip
    assert volume.shape == (batch, channels, points)
    assert (volume == 0.0).all()
    arguments, options = kernels._unproject_arguments(scene)
    gradients = bridge.unproject_backward(
        kernels._handle, volume, *arguments, **options, channels_last=False, deterministic=False
    )
    assert_zero(*gradients[:3])
