# SPDX-License-Identifier: Apache-2.0
"""The definition of unproject on its own: torch's grid_sample, laws, differences.

Nothing here may lean on anything else of the package.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import rigs
import scenes
import torch
from differences import slope_along
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tritool import reference

Array = npt.NDArray[Any]

laws = settings(derandomize=True, deadline=None, max_examples=60)
aggregations = pytest.mark.parametrize("aggregation", scenes.AGGREGATIONS)
every_outside = pytest.mark.parametrize("outside", scenes.OUTSIDE)
samplings = pytest.mark.parametrize("sampling", scenes.SAMPLINGS)


def unproject(scene: scenes.Unprojection) -> Array:
    return reference.unproject(*scene.arguments, **scene.options)


def gradients(grad: npt.ArrayLike, scene: scenes.Unprojection) -> list[Array]:
    """Return the gradients to features, projections, points or origin and axes, confidences."""
    grad = np.broadcast_to(grad, scene.shape)
    f, p, grid, w = reference.unproject_vjp(grad, *scene.arguments, **scene.options)
    found = [f, p, *(grid if isinstance(grid, tuple) else [grid])]
    assert (w is None) == (scene.confidences is None)
    return found if w is None else [*found, w]


# --- values and gradients ------------------------------------------------------------------------


def by_torch(scene: scenes.Unprojection) -> tuple[Tensor, list[Tensor]]:
    """Unproject by torch's grid_sample, as a method of its own; return also the operands."""
    leaves = [torch.tensor(a, requires_grad=True) for a in scene.operands()]
    tensors = scene.with_operands(leaves)
    features, p = tensors.features, tensors.projections
    views, channels, height, width = features.shape[1:]
    if isinstance(tensors.grid, tuple):
        origin, axes, size = tensors.grid
        index = torch.stack(torch.meshgrid(*(torch.arange(n) for n in size), indexing="ij"), -1)
        points = origin[:, None] + index.reshape(-1, 3).double() @ axes
    else:
        points = tensors.grid.reshape(len(tensors.grid), -1, 3)
    batch, voxels = scene.batch, points.shape[1]

    h = p[..., :3] @ points[:, None].transpose(-1, -2) + p[..., 3:]  # [B, C, 3, V]
    front = (h[:, :, 2] > 0.0).expand(batch, views, voxels)
    x, y = (h[:, :, :2] / torch.where(h[:, :, 2:] > 0.0, h[:, :, 2:], 1.0)).unbind(2)
    if scene.sampling == "official":
        # As published: x over the map's first size, which is its height, then twice less one.
        normalised = torch.stack([x / height, y / width], -1)
        pixels = normalised * torch.tensor([width - 1.0, height - 1.0])
        where = 2.0 * (normalised - 0.5)
    else:
        pixels = torch.stack([x, y], -1)
        where = 2.0 * pixels / torch.tensor([width - 1.0, height - 1.0]) - 1.0
    inside = (pixels > -1.0).all(-1) & (pixels < torch.tensor([width, height])).all(-1)
    values = torch.nn.functional.grid_sample(
        features.expand(batch, -1, -1, -1, -1).flatten(0, 1),
        where.expand(batch, views, voxels, 2).reshape(-1, 1, voxels, 2).clamp(-1e6, 1e6),
        padding_mode="zeros",
        align_corners=True,
    ).reshape(batch, views, channels, voxels)
    values = values * front[:, :, None]

    w = torch.ones(1, views, 1, 1, dtype=torch.float64)
    if tensors.confidences is not None:
        w = tensors.confidences.reshape(*tensors.confidences.shape[:2], -1, 1)
    takes_part = (w != 0.0).expand_as(values)
    if scene.outside == "exclude":
        takes_part = takes_part & (inside & front)[:, :, None]
    w = torch.where(takes_part, w, 0.0)
    if scene.aggregation == "max":
        volume = torch.where(takes_part, values, -torch.inf).max(1).values
        volume = torch.where(takes_part.any(1), volume, 0.0)
    else:
        if scene.aggregation == "softmax":
            w = w * values.exp()
        volume = (w * values).sum(1)
        if scene.aggregation != "sum":
            volume = volume / torch.where(takes_part.any(1), w.sum(1), 1.0)
    return volume.reshape(scene.shape), leaves


@samplings
@every_outside
@aggregations
@pytest.mark.parametrize("frame", [True, False])
@pytest.mark.parametrize("confidences", [None, "views", "channels"])
def test_torch_agrees_on_values_and_gradients(
    confidences: str | None, frame: bool, aggregation: str, outside: str, sampling: str
) -> None:
    rng = np.random.default_rng(0)
    counts = np.zeros(4, dtype=int)
    for batch in ((1, 1, 1, 1), (2, 1, 1, 2), (1, 2, 2, 1), (2, 2, 2, 2)):
        scene = scenes.unprojection(
            rng,
            batch=batch,
            views=4,
            frame=frame,
            confidences=confidences,
            zero_confidences=0.2,
            aggregation=aggregation,
            outside=outside,
            sampling=sampling,
        )
        clear = scene.clear(1e-6)
        volume, leaves = by_torch(scene)
        grad = rng.normal(size=scene.shape) * clear
        # The summands of a projection's gradient differ by world units squared.
        np.testing.assert_allclose(unproject(scene), volume.detach().numpy(), rtol=0.0, atol=1e-11)
        expected = torch.autograd.grad(volume, leaves, torch.tensor(grad), allow_unused=True)
        found = gradients(grad, scene)
        for ours, theirs, leaf in zip(found, expected, leaves, strict=True):
            other = np.zeros(leaf.shape) if theirs is None else theirs.numpy()
            scale = np.abs(other).max(initial=0.0)
            np.testing.assert_allclose(ours, other, rtol=0.0, atol=1e-10 * scale)
        seen, depth = scene.sees(), scene.pixels()[1]
        counts += [seen.sum(), (~seen).sum(), (depth < 0.0).sum(), seen.all(1).sum()]
    assert (counts > 0).all()  # some are seen and some not, some are behind a camera


@samplings
@every_outside
@aggregations
@pytest.mark.parametrize("confidences", [None, "views", "channels"])
def test_vjp_agrees_with_differences(
    confidences: str | None, aggregation: str, outside: str, sampling: str
) -> None:
    rng = np.random.default_rng(1)
    for frame, batch in product([True, False], [(1, 1, 1, 1), (2, 1, 2, 1), (1, 2, 1, 2)]):
        scene = scenes.unprojection(
            rng,
            batch=batch,
            views=3,
            frame=frame,
            confidences=confidences,
            aggregation=aggregation,
            outside=outside,
            sampling=sampling,
        )
        clear = scene.clear(0.1)
        assert clear.any()
        grad = rng.normal(size=scene.shape) * clear
        for n, gradient in enumerate(gradients(grad, scene)):
            array = scene.operands()[n]
            for _ in range(2):
                # Steps that move pixels by far less than a tenth.
                size = 1e-5 * (np.abs(array) if n == 1 else np.abs(array).mean())
                direction = size * rng.normal(size=array.shape)
                terms = gradient * direction
                slope = slope_along(partial(loss_of, grad, scene, n), array, direction)
                assert abs(slope - terms.sum()) <= 1e-6 * np.abs(terms).sum() + 1e-12, n


def loss_of(grad: Array, scene: scenes.Unprojection, n: int, operand: Array) -> float:
    """<grad, result> as a function of one operand."""
    arrays = scene.operands()
    arrays[n] = operand
    return float((grad * unproject(scene.with_operands(arrays))).sum())


def test_the_official_pixel_is_that_of_a_map_whose_sizes_are_exchanged() -> None:
    """On a map [H, W] it divides x by H and y by W; coordinates 0..1 span W - 1 and H - 1."""
    features = np.arange(3.0 * 5.0).reshape(1, 1, 1, 3, 5) + 1.0  # 1 + 5 y + x
    points = np.array([[[1.5, 2.5, 1.0]]])  # x = 1.5 / 3 * 4 = 2, y = 2.5 / 5 * 2 = 1
    camera = np.eye(3, 4)[None, None]
    found = reference.unproject(features, camera, points, aggregation="sum", sampling="official")
    np.testing.assert_allclose(found, [[[1.0 + 5.0 * 1.0 + 2.0]]], rtol=1e-15)
    found = reference.unproject(features, camera, points, aggregation="sum")
    np.testing.assert_allclose(found, [[[0.5 * (1.0 + 10.0 + 1.5)]]], rtol=1e-15)  # y = 2.5


# --- laws ----------------------------------------------------------------------------------------


@laws
@given(scenes.unprojections(), st.floats(-20.0, 20.0))
def test_a_constant_stays_where_all_views_see(scene: scenes.Unprojection, value: float) -> None:
    height, width = scene.features.shape[-2:]
    pixels, depth = scene.pixels()
    whole = (depth > 0.0) & ((pixels >= 0.0) & (pixels <= [width - 1, height - 1])).all(-1)
    whole = np.broadcast_to(whole.all(1)[:, None], scene.shape)
    weights = np.ones((1, scene.features.shape[1], 1))
    if scene.confidences is not None:
        weights = scene.confidences.reshape(*scene.confidences.shape[:2], -1)
    expected = value * (weights.sum(1) if scene.aggregation == "sum" else (weights > 0.0).any(1))
    found = unproject(replace(scene, features=np.full_like(scene.features, value)))
    expected = expected.reshape(*expected.shape, *(1,) * (found.ndim - 2))
    expected = np.broadcast_to(expected, found.shape)[whole]
    np.testing.assert_allclose(found[whole], expected, rtol=1e-13, atol=1e-13)


@aggregations
def test_a_delta_at_a_projected_voxel_is_found_there(aggregation: str) -> None:
    size = (5, 6, 7)
    grid = (np.array([[-20.0, 10.0, 30.0]]), 10.0 * np.eye(3)[None], size)
    # Three views along the axes of the grid, to whole pixels two from the border.
    projections = np.zeros((1, 3, 3, 4))
    for c, (a, b) in enumerate([(0, 1), (1, 2), (2, 0)]):
        projections[0, c, 0, a] = projections[0, c, 1, b] = 0.1
        projections[0, c, :2, 3] = 2.0 - grid[0][0, [a, b]] / 10.0
        projections[0, c, 2, 3] = 1.0
    for voxel in [(0, 0, 0), (4, 5, 6), (1, 3, 2)]:
        features = np.zeros((1, 3, 1, 11, 12))
        for c, (a, b) in enumerate([(0, 1), (1, 2), (2, 0)]):
            features[0, c, 0, 2 + voxel[b], 2 + voxel[a]] = 1.0
        volume = reference.unproject(features, projections, grid, aggregation=aggregation)[0, 0]
        np.testing.assert_allclose(volume[voxel], 3.0 if aggregation == "sum" else 1.0, rtol=1e-9)
        if aggregation != "max":
            assert np.unravel_index(volume.argmax(), size) == voxel
            assert np.partition(volume.ravel(), -2)[-2] < 0.8 * volume[voxel]


@laws
@given(scenes.unprojections(), rigs.generators())
def test_the_order_of_views_does_not_matter(
    scene: scenes.Unprojection, rng: np.random.Generator
) -> None:
    order = rng.permutation(scene.features.shape[1])
    found = unproject(scene.select_views(order))
    exactly = scene.aggregation == "max"
    rtol = 0.0 if exactly else 1e-12
    np.testing.assert_allclose(found, unproject(scene), rtol=rtol, atol=rtol * 100.0)


@laws
@given(scenes.unprojections(), st.integers(1, 5))
def test_identical_views_add_up_or_change_nothing(scene: scenes.Unprojection, count: int) -> None:
    one = scene.select_views([0])
    found = unproject(scene.select_views([0] * count))
    expected = unproject(one) * (count if scene.aggregation == "sum" else 1)
    np.testing.assert_allclose(found, expected, rtol=1e-13, atol=1e-13)


@laws
@given(scenes.unprojections(aggregations=["mean", "softmax", "max"]))
def test_averages_lie_between_the_views(scene: scenes.Unprojection) -> None:
    views = scene.features.shape[1]
    alone = []
    for c in range(views):
        one = replace(scene.select_views([c]), confidences=None, aggregation="sum")
        value = np.broadcast_to(unproject(one), scene.shape)
        takes_part = one.sees()[:, 0, None] | (scene.outside == "zeros")
        if scene.confidences is not None:
            w = scene.confidences[:, c].reshape(len(scene.confidences), -1)
            takes_part = takes_part & (w.reshape(*w.shape, *(1,) * (value.ndim - 2)) > 0.0)
        alone.append(np.where(np.broadcast_to(takes_part, value.shape), value, np.nan))
    anyone = ~np.isnan(alone).all(0)
    low, high = np.fmin.reduce(alone), np.fmax.reduce(alone)
    found = unproject(scene)
    assert (found[anyone] >= (low - 1e-12 - 1e-12 * np.abs(low))[anyone]).all()
    assert (found[anyone] <= (high + 1e-12 + 1e-12 * np.abs(high))[anyone]).all()
    if scene.aggregation == "max":
        np.testing.assert_array_equal(found[anyone], high[anyone])
    assert (found[~anyone] == 0.0).all()


@laws
@given(scenes.unprojections(), rigs.generators())
def test_a_view_of_confidence_zero_is_left_out_whatever_it_holds(
    scene: scenes.Unprojection, rng: np.random.Generator
) -> None:
    views = scene.features.shape[1]
    w = scene.confidences
    if w is None:
        w = np.ones((1, views))
        scene = replace(scene, confidences=w)
    at = int(rng.integers(views + 1))
    grad = rng.normal(size=scene.shape)
    expected, expected_gradients = unproject(scene), gradients(grad, scene)
    for junk in (1e3, np.nan, np.inf):
        more = replace(
            scene,
            features=np.insert(scene.features, at, junk, axis=1),
            projections=np.insert(scene.projections, at, junk, axis=1),
            confidences=np.insert(w, at, 0.0, axis=1),
        )
        np.testing.assert_array_equal(unproject(more), expected)
        found = gradients(grad, more)
        for n in (0, 1, len(found) - 1):
            assert (found[n][:, at] == 0.0).all()
            found[n] = np.delete(found[n], at, axis=1)
        for ours, theirs in zip(found, expected_gradients, strict=True):
            np.testing.assert_array_equal(ours, theirs)


@laws
@given(scenes.unprojections(outside=["exclude"]), rigs.generators())
def test_excluded_views_are_left_out(scene: scenes.Unprojection, rng: np.random.Generator) -> None:
    """Where a view does not see, it might as well not be there; not even its confidence counts."""
    seen = scene.sees()
    found = unproject(scene)
    for c in range(scene.features.shape[1]):
        if scene.features.shape[1] == 1:
            return
        others = [n for n in range(scene.features.shape[1]) if n != c]
        unseen = np.broadcast_to(~seen[:, c, None], scene.shape)
        left = unproject(scene.select_views(others))
        np.testing.assert_array_equal(found[unseen], left[unseen])
        if scene.confidences is not None:
            w = scene.confidences.copy()
            w[:, c] = rng.choice([np.nan, -1.0])
            spoilt = unproject(replace(scene, confidences=w))
            np.testing.assert_array_equal(spoilt[unseen], left[unseen])
            assert np.isnan(spoilt[~unseen]).all()


@laws
@given(scenes.unprojections(), rigs.generators())
def test_the_world_may_move(scene: scenes.Unprojection, rng: np.random.Generator) -> None:
    q, d = scenes.rotations(rng), rng.uniform(-500.0, 500.0, 3)
    projections = scene.projections.copy()
    projections[..., :3] = scene.projections[..., :3] @ q.T
    projections[..., 3] -= projections[..., :3] @ d
    grid: Any
    if isinstance(scene.grid, tuple):
        grid = (scene.grid[0] @ q.T + d, scene.grid[1] @ q.T, scene.grid[2])
    else:
        grid = scene.grid @ q.T + d
    clear = np.broadcast_to(scene.clear(1e-6), scene.shape)
    found = unproject(replace(scene, projections=projections, grid=grid))
    np.testing.assert_allclose(found[clear], unproject(scene)[clear], rtol=1e-8, atol=1e-7)


@laws
@given(scenes.unprojections(), st.floats(0.1, 10.0))
def test_common_factors_of_projections_and_confidences(
    scene: scenes.Unprojection, factor: float
) -> None:
    clear = np.broadcast_to(scene.clear(1e-6), scene.shape)
    expected = unproject(scene)
    found = unproject(replace(scene, projections=factor * scene.projections))
    np.testing.assert_allclose(found[clear], expected[clear], rtol=1e-9, atol=1e-9)
    if scene.confidences is not None:
        found = unproject(replace(scene, confidences=factor * scene.confidences))
        factor = factor if scene.aggregation == "sum" else 1.0
        np.testing.assert_allclose(found, factor * expected, rtol=1e-12, atol=1e-12)


@laws
@given(scenes.unprojections(), rigs.generators())
def test_shared_operands_are_as_good_as_repeated_ones(
    scene: scenes.Unprojection, rng: np.random.Generator
) -> None:
    repeated = scene.with_operands(
        [np.broadcast_to(a, (scene.batch, *a.shape[1:])) for a in scene.operands()]
    )
    np.testing.assert_array_equal(unproject(scene), unproject(repeated))
    grad = rng.normal(size=scene.shape)
    for shared, own in zip(gradients(grad, scene), gradients(grad, repeated), strict=True):
        summed = own.sum(0, keepdims=True) if len(shared) < len(own) else own
        scale = np.abs(own).max(initial=0.0)
        np.testing.assert_allclose(shared, summed, rtol=0.0, atol=1e-13 * scale)


@laws
@given(scenes.unprojections())
def test_a_frame_is_the_points_it_stands_for(scene: scenes.Unprojection) -> None:
    if not isinstance(scene.grid, tuple):
        return
    points = replace(scene, grid=scene.points)
    clear = np.broadcast_to(scene.clear(1e-6), scene.shape)
    np.testing.assert_allclose(
        unproject(points)[clear], unproject(scene)[clear], rtol=1e-9, atol=1e-9
    )
    grad = scene.clear(1e-6) * np.ones(scene.shape)
    of_points = gradients(grad, points)[2]
    of_frame = gradients(grad, scene)
    np.testing.assert_allclose(
        of_frame[2].sum(0), of_points.sum((0, 1, 2, 3)), rtol=1e-7, atol=1e-9
    )


def test_many_voxels_are_handled_by_pieces() -> None:
    scene = scenes.unprojection(np.random.default_rng(2), size=(40, 30, 30), aggregation="mean")
    assert isinstance(scene.grid, tuple)
    grad = np.random.default_rng(3).normal(size=scene.shape)
    halves, parts = [], []
    for half in (0, 1):
        part = replace(scene, grid=scene.points[:, 20 * half : 20 * half + 20])
        halves.append(unproject(part))
        parts.append(gradients(grad[:, :, 20 * half : 20 * half + 20], part))
    np.testing.assert_allclose(np.concatenate(halves, axis=2), unproject(scene), atol=1e-11)
    found = gradients(grad, scene)
    for n in (0, 1):
        np.testing.assert_allclose(
            parts[0][n] + parts[1][n], found[n], rtol=1e-7, atol=1e-9 * np.abs(found[n]).max()
        )


# --- borders -------------------------------------------------------------------------------------


def at_pixels(
    pixels: npt.ArrayLike, features: Array, depth: float = 1.0, **options: Any
) -> tuple[Array, Array]:
    """Sample one map [H, W] where one camera sees points; return also the gradients to them."""
    points = np.asarray(pixels, dtype=np.float64)
    points = depth * np.concatenate([points, np.ones((len(points), 1))], axis=-1)[None]
    scene = scenes.Unprojection(
        features[None, None, None], np.eye(3, 4)[None, None], points, **options
    )
    return unproject(scene)[0, 0], gradients(1.0, scene)[2][0]


def test_values_fade_beyond_the_border_and_slopes_are_those_to_the_right() -> None:
    features = np.array([[2.0, 6.0, 8.0], [4.0, 7.0, 1.0]])
    pixels = [[0, 0], [2, 1], [-0.5, 0], [2.75, 1], [1, -0.25], [0, 1.5], [-1, 0], [3, 1], [1, 2]]
    found, slopes = at_pixels(pixels, features, aggregation="sum")
    np.testing.assert_array_equal(found, [2, 1, 1, 0.25, 4.5, 2, 0, 0, 0])
    expected = [[4, 2], [-1, -1], [2, 1], [-1, -0.25], [1.5, 6], [1.5, -4], [0, 0], [0, 0], [0, 0]]
    np.testing.assert_array_equal(slopes[:, :2], expected)
    # Along the ray nothing changes.
    np.testing.assert_allclose((slopes * [[*p, 1] for p in pixels]).sum(-1), 0.0, atol=1e-15)
    _, farther = at_pixels(pixels, features, depth=4.0, aggregation="sum")
    np.testing.assert_array_equal(4.0 * farther, slopes)


def test_the_first_of_equal_views_takes_the_gradient_of_the_maximum() -> None:
    scene = scenes.unprojection(np.random.default_rng(4), views=1, aggregation="max")
    scene = scene.select_views([0, 0, 0])
    grad_features, grad_projections, *_ = gradients(1.0, scene)
    assert np.abs(grad_features[:, 0]).sum() > 0.0
    assert (grad_features[:, 1:] == 0.0).all()
    assert (grad_projections[:, 1:] == 0.0).all()


def test_softmax_needs_no_small_features() -> None:
    scene = scenes.unprojection(np.random.default_rng(5), noise=1e4, aggregation="softmax")
    largest = unproject(replace(scene, aggregation="max"))
    found = unproject(scene)
    assert np.isfinite(found).all()
    assert np.mean(np.abs(found - largest) <= 1e-9 * np.abs(largest)) > 0.9
    assert all(np.isfinite(g).all() for g in gradients(1.0, scene))


# --- invalid data --------------------------------------------------------------------------------


@every_outside
@aggregations
@pytest.mark.parametrize(
    "reason", ["NaN projection", "NaN point", "infinite point", "NaN confidence", "negative one"]
)
def test_unknown_voxels_are_nan_without_gradient(
    reason: str, aggregation: str, outside: str
) -> None:
    rng = np.random.default_rng(6)
    scene = scenes.unprojection(
        rng,
        views=3,
        size=(30,),
        frame=False,
        confidences="channels",
        aggregation=aggregation,
        outside=outside,
    )
    clean, clean_seen = unproject(scene), scene.sees()
    grad = rng.normal(size=scene.shape)
    assert isinstance(scene.grid, np.ndarray)
    w, points, p = scene.confidences.copy(), scene.grid.copy(), scene.projections.copy()
    bad = np.zeros(scene.shape, dtype=bool)
    if reason == "NaN projection":
        p[0, 1, 0, 2] = np.nan
        bad |= (scene.pixels()[1] > 0.0)[:, 1, None]  # behind that camera nothing is seen
    elif reason == "NaN point":
        points[0, 7, 1] = np.nan
        bad[:, :, 7] = True
    elif reason == "infinite point":
        points[0, 7] = np.inf
        h = p[0, :, :, :3].sum(-1)  # of the direction (1, 1, 1)
        mixed = ((p[0, :, :, :3] > 0).any(-1) & (p[0, :, :, :3] < 0).any(-1)).any(-1)
        bad[:, :, 7] = mixed.any() or (h[:, 2] > 0).any()
    else:
        w[0, 1, 0] = np.nan if reason.startswith("NaN") else -0.3
        takes_part = clean_seen[:, 1] | (outside == "zeros")
        bad[:, 0] = takes_part
    assert bad.any()
    spoilt = replace(scene, confidences=w, grid=points, projections=p)
    found = unproject(spoilt)
    assert np.isnan(found[bad]).all()
    rest = ~bad
    if reason == "infinite point":
        rest[:, :, 7] = False
    np.testing.assert_array_equal(found[rest], clean[rest])

    reference_gradients = gradients(np.where(bad, 0.0, grad), spoilt)
    for value in (0.0, 1.0, np.nan):
        for ours, theirs in zip(
            gradients(np.where(bad, value, grad), spoilt), reference_gradients, strict=True
        ):
            np.testing.assert_array_equal(ours, theirs)
            assert np.isfinite(ours).all()

    # A view of confidence 0 spoils nothing.
    silent = w.copy()
    silent[:, 1] = 0.0
    if reason in ("NaN projection", "NaN confidence", "negative one"):
        expected = unproject(scene.select_views([0, 2]))
        np.testing.assert_array_equal(unproject(replace(spoilt, confidences=silent)), expected)


@every_outside
@aggregations
def test_nan_features_leave_linear_gradients_alone(aggregation: str, outside: str) -> None:
    rng = np.random.default_rng(7)
    scene = scenes.unprojection(
        rng, views=3, confidences="views", aggregation=aggregation, outside=outside
    )
    grad = rng.normal(size=scene.shape)
    clean_gradients = gradients(grad, scene)
    features = scene.features.copy()
    features[0, 1, 0] = np.nan
    spoilt = replace(scene, features=features)
    found = unproject(spoilt)
    bad = np.isnan(found)
    np.testing.assert_array_equal(bad[:, 0], scene.sees()[:, 1])
    assert not bad[:, 1:].any()
    np.testing.assert_array_equal(found[~bad], unproject(scene)[~bad])
    spoilt_gradients = gradients(grad, spoilt)
    without = gradients(np.where(bad, 0.0, grad), scene)
    if aggregation in ("sum", "mean"):
        np.testing.assert_array_equal(spoilt_gradients[0], clean_gradients[0])
    else:
        np.testing.assert_allclose(spoilt_gradients[0], without[0], rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(spoilt_gradients[1:], without[1:], strict=True):
        assert np.isfinite(ours).all()
        np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-12)


@every_outside
@aggregations
def test_without_views_the_volume_is_zero(aggregation: str, outside: str) -> None:
    rng = np.random.default_rng(8)
    scene = scenes.unprojection(
        rng, confidences="views", zero_confidences=1.0, aggregation=aggregation, outside=outside
    )
    beside = scene.projections.copy()
    beside[:, :, :2] += 1e3 * beside[:, :, 2:]
    no_views = {"features": scene.features[:, :0], "projections": scene.projections[:, :0]}
    for nothing in (
        scene,
        replace(scene, confidences=None, **no_views),
        replace(scene, projections=beside, confidences=None),
    ):
        assert (unproject(nothing) == 0.0).all()
        for gradient in gradients(1.0, nothing):
            assert (gradient == 0.0).all()


# --- shapes --------------------------------------------------------------------------------------


@laws
@given(scenes.unprojections())
def test_shapes(scene: scenes.Unprojection) -> None:
    found = unproject(scene)
    assert found.shape == scene.shape
    assert found.dtype == np.float64
    for gradient, operand in zip(gradients(1.0, scene), scene.operands(), strict=True):
        assert gradient.shape == operand.shape


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": np.ones((3, 2, 7, 10))}, r"features must be \[B, C, K, H, W\], got \(3, 2"),
        ({"projections": np.ones((1, 2, 3, 4))}, r"projections must be .* with C = 3, got \(1, 2"),
        ({"grid": np.ones((1, 5, 2))}, r"grid must be points \[B, ..., 3\] or .*, got \(1, 5, 2\)"),
        ({"grid": np.ones(3)}, r"grid must be points \[B, ..., 3\] or .*, got \(3,\)"),
        ({"grid": (np.ones((1, 3)), np.ones((1, 3, 3)))}, r"grid must be .* got a tuple of 2"),
        ({"grid": (np.ones(3), np.eye(3), (2, 2, 2))}, r"grid must be .* got \(3,\), \(3, 3\)"),
        ({"confidences": np.ones((1, 2))}, r"confidences must be .* K = 2, got \(1, 2\)"),
        ({"confidences": np.ones((1, 3, 3))}, r"confidences must be .* got \(1, 3, 3\)"),
        ({"aggregation": "median"}, r"aggregation must be one of sum, mean, .* got 'median'"),
        ({"outside": "border"}, r"outside must be one of zeros, exclude, got 'border'"),
        ({"sampling": "half"}, r"sampling must be one of center, official, got 'half'"),
    ],
)
def test_wrong_arguments_raise_in_words(change: dict[str, Any], message: str) -> None:
    scene = scenes.unprojection(np.random.default_rng(9))
    with pytest.raises(ValueError, match=message):
        unproject(replace(scene, **change))
    with pytest.raises(ValueError, match=r"grad must be \(1, 2, 3, 4, 5\), got \(1, 2\)"):
        reference.unproject_vjp(np.ones((1, 2)), *scene.arguments, **scene.options)
