# SPDX-License-Identifier: Apache-2.0
"""`ops.unproject`: values, batches, layouts, dtypes, laws.

The kernels' accuracy and degenerate cases are tested on every variant in test_kernels_unproject.py,
derivatives and transforms in test_contract.py, bad input in test_unproject_arguments.py.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import rigs
import scenes
import torch
from differences import assert_close, numerical_gradient
from scenes import Unprojection, unprojection
from torch import Tensor

from tritool import VoxelGrid, ops, reference

aggregations = pytest.mark.parametrize("aggregation", scenes.AGGREGATIONS)


def scene_of(seed: int = 0, **options: Any) -> Unprojection:
    return unprojection(np.random.default_rng(seed), **options)


def operands_of(
    scene: Unprojection, device: str, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    """Leaves: features, projections, origin and axes or points, confidences if there are."""
    return [torch.as_tensor(x, dtype=dtype, device=device) for x in scene.operands()]


def leaves_of(scene: Unprojection, device: str, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [x.requires_grad_() for x in operands_of(scene, device, dtype)]


def unproject(scene: Unprojection, operands: Sequence[Tensor]) -> Tensor:
    """The public function on tensors in the place of the scene's arrays."""
    filled = scene.with_operands(operands)
    grid: Any = VoxelGrid(*filled.grid) if isinstance(filled.grid, tuple) else filled.grid
    features: Any = filled.features
    return ops.unproject(features, filled.projections, grid, **filled.options)


def expected_gradients(grad: np.ndarray, scene: Unprojection) -> list[np.ndarray]:
    features, projections, grid, w = reference.unproject_vjp(
        grad, *scene.arguments, **scene.options
    )
    places = list(grid) if isinstance(scene.grid, tuple) else [grid]
    return [features, projections, *places, *([] if w is None else [w])]


def check(scene: Unprojection, device: str) -> None:
    """Values and all gradients against the reference, away from where they jump."""
    leaves = leaves_of(scene, device)
    have = unproject(scene, leaves)
    want = reference.unproject(*scene.arguments, **scene.options)
    assert have.shape == want.shape == scene.shape
    assert have.dtype == torch.float64
    clear = np.broadcast_to(scene.clear(1e-3), want.shape)
    np.testing.assert_allclose(have.detach().cpu().numpy()[clear], want[clear], atol=1e-9)
    grad = np.random.default_rng(1).standard_normal(want.shape) * clear
    found = torch.autograd.grad(have, leaves, torch.as_tensor(grad, device=device))
    for got, wanted in zip(found, expected_gradients(grad, scene), strict=True):
        scale = 1.0 + np.abs(wanted).max(initial=0.0)
        np.testing.assert_allclose(got.cpu().numpy(), wanted, rtol=0, atol=1e-9 * scale)


def random_grad(volume: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    grad = torch.randn(volume.shape, generator=generator, dtype=torch.float64)
    return grad.to(volume.device, volume.dtype)


# ---- Values and batches ----


@aggregations
@pytest.mark.parametrize("outside", scenes.OUTSIDE)
@pytest.mark.parametrize("sampling", scenes.SAMPLINGS)
def test_agrees_with_the_reference(
    aggregation: str, outside: str, sampling: str, device: str
) -> None:
    options = {"aggregation": aggregation, "outside": outside, "sampling": sampling}
    check(scene_of(batch=(2, 2, 2, 2), confidences="channels", **options), device)
    check(scene_of(1, frame=False, size=(11,), channels=19, **options), device)


@pytest.mark.parametrize("size", [(), (1,), (5,), (2, 3), (2, 1, 3, 2)], ids=str)
def test_points_of_any_shape(size: tuple[int, ...], device: str) -> None:
    check(scene_of(batch=(1, 1, 3, 1), frame=False, size=size), device)


def test_a_grid_is_its_points(device: str) -> None:
    scene = scene_of(batch=(2, 1, 2, 1))
    features, projections, *frame = operands_of(scene, device)
    grid = VoxelGrid(*frame, scene.grid[2])  # type: ignore[misc,arg-type]
    volume = ops.unproject(features, projections, grid)
    points = ops.unproject(features, projections, grid.points())
    torch.testing.assert_close(volume, points, rtol=0, atol=1e-10)


@pytest.mark.parametrize("channels", [3, 32])
@pytest.mark.parametrize("aggregation", ["sum", "softmax"])
def test_a_large_grid_is_its_points(aggregation: str, channels: int, device: str) -> None:
    """More voxels than the CPU kernels take at once, in tiles that do not come out even."""
    options = {"size": (11, 17, 32), "channels": channels, "aggregation": aggregation}
    scene = scene_of(batch=(2, 1, 1, 1), **options)
    features, projections, *frame = operands_of(scene, device)
    features = features.requires_grad_()
    grid = VoxelGrid(*frame, scene.grid[2])  # type: ignore[misc,arg-type]
    volume, points = (
        ops.unproject(features, projections, voxels, aggregation=aggregation)
        for voxels in (grid, grid.points())
    )
    torch.testing.assert_close(volume, points, rtol=0, atol=1e-10)
    grad = random_grad(volume)
    have, want = (torch.autograd.grad(found, features, grad)[0] for found in (volume, points))
    torch.testing.assert_close(have, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("batch", list(itertools.product([1, 3], repeat=4)), ids=str)
@pytest.mark.parametrize("frame", [True, False], ids=["frame", "points"])
def test_every_operand_broadcasts(batch: tuple[int, ...], frame: bool, device: str) -> None:
    """The gradient of what is shared is the sum over the items that share it."""
    scene = scene_of(
        batch=batch, frame=frame, size=(2, 3, 2), confidences="channels", zero_confidences=0.2
    )
    check(scene, device)


def test_confidences_per_view_are_those_of_all_channels(device: str) -> None:
    scene = scene_of(batch=(2, 1, 1, 2), channels=5, confidences="views", zero_confidences=0.3)
    check(scene, device)
    *rest, per_view = leaves_of(scene, device)
    per_channel = per_view.detach()[..., None].repeat(1, 1, 5).requires_grad_()
    volume, same = (unproject(scene, [*rest, w]) for w in (per_view, per_channel))
    torch.testing.assert_close(volume, same, rtol=0, atol=0)
    grad = random_grad(volume)
    (have,) = torch.autograd.grad(volume, per_view, grad)
    (want,) = torch.autograd.grad(same, per_channel, grad)
    torch.testing.assert_close(have, want.sum(-1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("channels", [3, 16])
def test_shared_operands_are_not_copied_out(channels: int, device: str) -> None:
    """Features of one item for 50 000: as many copies would take terabytes."""
    count = 50_000
    scene = scene_of(channels=channels, frame=False, size=(1,), map_size=(500, 900))
    features, projections, _ = operands_of(scene, device, torch.float32)
    points = 300 * torch.randn(count, 1, 3, generator=torch.Generator().manual_seed(0))
    points = (points + torch.tensor([0.0, 0, 950])).to(device).requires_grad_()
    every = features.expand(count, -1, -1, -1, -1)
    assert every.numel() * every.element_size() > 8e11
    volume = ops.unproject(every, projections.expand(count, -1, -1, -1), points)
    want = ops.unproject(features, projections, points.squeeze(1)[None])
    torch.testing.assert_close(volume.squeeze(2), want.squeeze(0).mT, rtol=0, atol=1e-6)
    (have,) = torch.autograd.grad(volume.sum(), points)
    (grad,) = torch.autograd.grad(want.sum(), points)
    torch.testing.assert_close(have, grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("empty", ["B", "C", "K", "N"])
@aggregations
def test_nothing_to_do(empty: str, aggregation: str, device: str) -> None:
    sizes = {"B": 2, "C": 3, "K": 4, "N": 5} | {empty: 0}
    batch, views, channels, count = sizes.values()
    features = torch.zeros(batch, views, channels, 6, 7, device=device, requires_grad=True)
    projections = torch.zeros(1, views, 3, 4, device=device, requires_grad=True)
    points = torch.zeros(1, count, 3, device=device, requires_grad=True)
    volume = ops.unproject(features, projections, points, aggregation=aggregation)
    assert volume.shape == (batch, channels, count)
    assert (volume == 0).all()  # without views no view takes part
    grads = torch.autograd.grad(volume.sum(), (features, projections, points))
    assert all((g == 0).all() for g in grads)


def test_meta_tensors_give_shape_and_layout() -> None:
    features = torch.empty(2, 3, 4, 6, 7, device="meta")
    projections = torch.empty(1, 3, 3, 4, device="meta")
    grid = VoxelGrid(
        torch.empty(1, 3, device="meta"), torch.empty(1, 3, 3, device="meta"), (5, 8, 9)
    )
    volume = ops.unproject(features, projections, grid)
    assert volume.shape == (2, 4, 5, 8, 9)
    assert volume.is_contiguous()
    last = features.movedim(2, -1).contiguous().movedim(-1, 2)
    volume = ops.unproject(last, projections, grid)
    assert volume.shape == (2, 4, 5, 8, 9)
    assert volume.is_contiguous(memory_format=torch.channels_last_3d)


# ---- Layouts ----


def layouts(features: Tensor) -> dict[str, Tensor]:
    """The same values in other places."""
    batch, views, channels, height, width = features.shape
    backbone = features.flatten(0, 1).contiguous(memory_format=torch.channels_last)
    last = backbone.view(features.shape)

    def within(*larger: int) -> Tensor:
        return features.new_full(larger, torch.nan)

    cropped = within(batch, views, channels, height + 3, width + 5)[..., 2:-1, 1:-4]
    spread = within(batch, views, channels, height, 3 * width)[..., ::3]
    some = within(batch, 2 * views, channels + 4, height, width)[:, 1::2, 3:-1]
    some_last = within(batch, views, height, width, channels + 4).movedim(-1, 2)[:, :, 1:-3]
    odd_last = within(batch, views, height, width + 1, channels).movedim(-1, 2)[..., 1:]
    results = {"cropped": cropped, "spread": spread, "some": some, "some last": some_last}
    results |= {"odd last": odd_last}
    for result in results.values():
        result.copy_(features)
    turned = features.mT.contiguous().mT
    views_inside = features.transpose(1, 3).contiguous().transpose(1, 3)
    return results | {"last": last, "turned": turned, "views inside": views_inside}


@pytest.mark.parametrize("channels", [1, 5, 16, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_features_in_any_layout(channels: int, dtype: torch.dtype, device: str) -> None:
    scene = scene_of(batch=(2, 1, 1, 1), channels=channels)
    plain, *rest = leaves_of(scene, device, torch.float32)
    plain = plain.detach().to(dtype).requires_grad_()
    want = unproject(scene, [plain, *rest])
    assert want.is_contiguous()
    grad = random_grad(want)
    wanted = torch.autograd.grad(want, [plain, *rest], grad)
    close: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {}
    for name, laid_out in layouts(plain.detach()).items():
        leaves = [laid_out.requires_grad_(), *rest]
        have = unproject(scene, leaves)
        torch.testing.assert_close(have, want, **close, msg=lambda m, name=name: f"{name}: {m}")
        if channels > 1:  # else a layout is both
            last = have.is_contiguous(memory_format=torch.channels_last_3d)
            assert last == name.endswith("last"), name
            assert have.is_contiguous() != last, name
        found = torch.autograd.grad(have, leaves, grad)
        for got, w in zip(found, wanted, strict=True):
            size = float(w.abs().max())
            rounding = 1e-5 if got.dtype == torch.float32 else 1e-2
            torch.testing.assert_close(got, w, rtol=0, atol=rounding * size)
        if name in ("last", "turned", "views inside"):  # dense
            assert found[0].stride() == laid_out.stride(), name


def test_a_backbone_in_channels_last_feeds_a_volume_in_channels_last(device: str) -> None:
    """No layout is converted on the way from a 2D network to a 3D one, nor on the way back."""
    torch.manual_seed(0)
    options = {"device": device, "memory_format": torch.channels_last}
    before = torch.nn.Conv2d(3, 8, 3, padding=1).to(**options)
    after = torch.nn.Conv3d(8, 4, 3, padding=1).to(device, memory_format=torch.channels_last_3d)
    scene = scene_of(batch=(2, 1, 1, 1), channels=8)
    _, *rest = operands_of(scene, device, torch.float32)
    images = torch.randn(6, 3, 7, 10, device=device).to(memory_format=torch.channels_last)
    maps = before(images)
    seen: list[Tensor] = []
    maps.register_hook(seen.append)
    volume = unproject(scene, [maps.view(2, 3, 8, 7, 10), *rest])
    assert volume.is_contiguous(memory_format=torch.channels_last_3d)
    after(volume).square().sum().backward()
    assert seen[0].is_contiguous(memory_format=torch.channels_last)
    assert (before.weight.grad != 0).any()


# ---- Dtypes ----


@aggregations
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_features_are_summed_in_float32(
    dtype: torch.dtype, aggregation: str, device: str
) -> None:
    scene = scene_of(batch=(2, 1, 2, 1), channels=9, confidences="views", aggregation=aggregation)
    features, *rest = leaves_of(scene, device, torch.float32)
    half = features.detach().to(dtype).requires_grad_()
    single = half.detach().float().requires_grad_()
    have, want = (unproject(scene, [x, *rest]) for x in (half, single))
    assert have.dtype == dtype
    assert want.dtype == torch.float32
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(have, want.to(dtype), rtol=eps, atol=1e-6)
    grad = random_grad(have)
    found = torch.autograd.grad(have, [half, *rest], grad)
    wanted = torch.autograd.grad(want, [single, *rest], grad.float())
    assert [g.dtype for g in found] == [dtype] + [torch.float32] * len(rest)
    size = float(wanted[0].abs().max())
    torch.testing.assert_close(found[0], wanted[0].to(dtype), rtol=eps, atol=1e-5 * size)
    for got, w in zip(found[1:], wanted[1:], strict=True):
        torch.testing.assert_close(got, w, rtol=0, atol=1e-5 * float(w.abs().max()))


@pytest.mark.parametrize(
    ("of_features", "of_geometry", "of_volume"),
    [
        (torch.float64, torch.float32, torch.float64),
        (torch.float32, torch.float64, torch.float32),
        (torch.float16, torch.float64, torch.float16),
    ],
)
def test_geometry_takes_the_dtype_of_the_sums(
    of_features: torch.dtype, of_geometry: torch.dtype, of_volume: torch.dtype, device: str
) -> None:
    scene = scene_of(confidences="channels")
    features, *rest = operands_of(scene, device, torch.float32)
    leaves = [features.to(of_features), *(x.to(of_geometry) for x in rest)]
    leaves = [x.requires_grad_() for x in leaves]
    volume = unproject(scene, leaves)
    assert volume.dtype == of_volume
    accumulator = torch.promote_types(of_features, torch.float32)
    same = unproject(scene, [leaves[0], *(x.detach().to(accumulator) for x in leaves[1:])])
    torch.testing.assert_close(volume, same, rtol=0, atol=0)
    grads = torch.autograd.grad(volume.sum(), leaves)
    assert [g.dtype for g in grads] == [x.dtype for x in leaves]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_autocast_does_not_round_geometry(dtype: torch.dtype, device: str) -> None:
    scene = scene_of(confidences="views")
    features, *rest = leaves_of(scene, device, torch.float32)
    leaves = [features.detach().to(dtype).requires_grad_(), *rest]
    want = unproject(scene, leaves)
    with torch.autocast(device, dtype=torch.bfloat16):
        have = unproject(scene, leaves)
    assert have.dtype == dtype
    torch.testing.assert_close(have, want, rtol=0, atol=0)
    grad = random_grad(want)
    found = torch.autograd.grad(have, leaves, grad)
    for got, wanted in zip(found, torch.autograd.grad(want, leaves, grad), strict=True):
        bound = 1e-5 * float(wanted.abs().max())  # atomics on a GPU
        torch.testing.assert_close(got, wanted, rtol=0, atol=0 if device == "cpu" else bound)


# ---- What is not known ----


@aggregations
def test_one_spoilt_item_leaves_its_neighbours_alone(aggregation: str, device: str) -> None:
    scene = scene_of(batch=(4, 4, 4, 4), confidences="views", aggregation=aggregation)
    features, projections, origin, axes, w = operands_of(scene, device)
    projections[1, 0] = torch.nan
    w[2, 1] = -1.0
    leaves = [x.requires_grad_() for x in (features, projections, origin, axes, w)]
    volume = unproject(scene, leaves)
    assert volume[[0, 3]].isfinite().all()
    assert volume[[1, 2]].isnan().all()
    # Even a gradient of NaN, as that of a loss on these voxels, reaches nothing.
    found = torch.autograd.grad(volume.square().sum(), leaves)
    alone = [x.detach()[[0, 3]].requires_grad_() for x in leaves]
    wanted = torch.autograd.grad(unproject(scene, alone).square().sum(), alone)
    for got, want in zip(found, wanted, strict=True):
        assert (got[[1, 2]] == 0).all()
        torch.testing.assert_close(got[[0, 3]], want, rtol=1e-12, atol=1e-12)
    with torch.no_grad():  # a view of confidence 0 may be anything
        w[1, 0] = 0
        assert unproject(scene, leaves)[1].isfinite().all()


# ---- Determinism ----


@pytest.fixture
def deterministic() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


@aggregations
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.usefixtures("deterministic")
def test_deterministic_algorithms(aggregation: str, dtype: torch.dtype, device: str) -> None:
    """No operation refuses, and the same comes out twice; what is shared included."""
    scene = scene_of(
        batch=(1, 2, 1, 2), channels=6, size=(6, 7, 8), confidences="channels",
        aggregation=aggregation,
    )  # fmt: skip
    features, *rest = leaves_of(scene, device, torch.promote_types(dtype, torch.float32))
    runs = []
    for last in (False, False, True, True):
        maps = features.detach().to(dtype)
        maps = maps.movedim(2, -1).contiguous().movedim(-1, 2) if last else maps
        leaves = [maps.requires_grad_(), *rest]
        volume = unproject(scene, leaves)
        runs.append([volume, *torch.autograd.grad(volume, leaves, random_grad(volume))])
    for first, second in (runs[:2], runs[2:]):
        for a, b in zip(first, second, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)
    for a, b in zip(runs[0], runs[2], strict=True):
        eps = torch.finfo(a.dtype).eps
        torch.testing.assert_close(a, b, rtol=0, atol=50 * eps * float(b.detach().abs().max()))


# ---- Laws ----


def moved(scene: Unprojection, seed: int) -> Unprojection:
    """The world turned and shifted, with its cameras and its grid."""
    rng = np.random.default_rng(seed)
    turn, shift = scenes.rotations(rng), rng.uniform(-500, 500, 3)
    back = np.eye(4)
    back[:3, :3], back[:3, 3] = turn.T, -turn.T @ shift
    assert isinstance(scene.grid, tuple)
    origin, axes, size = scene.grid
    grid = (origin @ turn.T + shift, axes @ turn.T, size)
    return replace(scene, projections=scene.projections @ back, grid=grid)


@aggregations
def test_a_motion_of_the_world_changes_nothing(aggregation: str, device: str) -> None:
    scene = scene_of(batch=(2, 2, 2, 1), aggregation=aggregation)
    volumes = [unproject(s, operands_of(s, device)) for s in (scene, moved(scene, 5))]
    clear = torch.as_tensor(scene.clear(1e-6).copy(), device=device).expand_as(volumes[0])
    assert clear.double().mean() > 0.9
    torch.testing.assert_close(volumes[0][clear], volumes[1][clear], rtol=0, atol=1e-8)


@pytest.mark.parametrize("sampling", scenes.SAMPLINGS)
def test_a_single_pixel_is_a_tent(sampling: str, device: str) -> None:
    """Each voxel shows it as far as its own pixel is near: x is x, y is y, corners included."""
    scene = scene_of(2, views=2, channels=1, sampling=sampling, aggregation="sum", size=(6, 7, 8))
    height, width = scene.features.shape[-2:]
    pixels, _ = scene.pixels()
    sees = scene.sees()
    lit = 0
    for x, y in [(0, 0), (width - 1, 0), (0, height - 1), (4, 2), (width - 1, height - 1), (8, 5)]:
        scene.features[:] = 0
        scene.features[:, 1, :, y, x] = 2.0
        have = unproject(scene, operands_of(scene, device)).cpu().numpy()[:, 0]
        away = np.abs(pixels[:, 1] - [x, y])
        want = np.where(sees[:, 1], 2.0 * np.prod(np.maximum(0.0, 1.0 - away), -1), 0.0)
        np.testing.assert_allclose(have, want, rtol=0, atol=1e-9)
        lit += np.count_nonzero(want)
    assert lit > 10


def inner(scene: Unprojection) -> np.ndarray:
    """Voxels that every view has whole cells of, [B, 1, ...]."""
    pixels, depth = scene.pixels()
    last = np.array(scene.features.shape[:-3:-1]) - 1
    whole = (pixels >= 0).all(-1) & (pixels <= last).all(-1) & (depth > 0)
    return np.asarray(whole.all(1, keepdims=True))


@aggregations
def test_linear_maps_are_reproduced(aggregation: str, device: str) -> None:
    """A map that rises linearly has at a voxel what it has at its pixel; a constant, itself."""
    scene = scene_of(3, views=3, channels=2, size=(6, 7, 8), aggregation=aggregation)
    y, x = np.indices(scene.features.shape[-2:])
    scene.features[:, :, 0] = 0.3 * x - 0.5 * y + 1.0
    scene.features[:, :, 1] = 0.7
    have = unproject(scene, operands_of(scene, device)).cpu().numpy()
    pixels, _ = scene.pixels()
    values = (pixels * [0.3, -0.5]).sum(-1) + 1.0
    share = np.exp(values) / np.exp(values).sum(1, keepdims=True)
    want = {
        "sum": values.sum(1),
        "mean": values.mean(1),
        "softmax": (share * values).sum(1),
        "max": values.max(1),
    }[aggregation]
    whole = inner(scene)[:, 0]
    assert whole.sum() > 20
    np.testing.assert_allclose(have[:, 0][whole], want[whole], rtol=0, atol=1e-9)
    constant = 2.1 if aggregation == "sum" else 0.7
    np.testing.assert_allclose(have[:, 1][whole], constant, rtol=0, atol=1e-12)


def test_equal_views(device: str) -> None:
    """Their sum is C times one, every other aggregate is one of them."""
    scene = scene_of(4, views=1)
    volumes = {}
    for views in (1, 5):
        for aggregation in scenes.AGGREGATIONS:
            several = replace(scene.select_views([0] * views), aggregation=aggregation)
            volumes[views, aggregation] = unproject(several, operands_of(several, device))
    one = volumes[1, "sum"]
    assert (one != 0).any()
    torch.testing.assert_close(volumes[5, "sum"], 5 * one)
    for aggregation in scenes.AGGREGATIONS[1:]:
        for views in (1, 5):
            torch.testing.assert_close(volumes[views, aggregation], one)


@pytest.mark.parametrize("outside", scenes.OUTSIDE)
def test_aggregates_are_in_order(outside: str, device: str) -> None:
    """mean <= softmax <= max, as large values count more; the least is that of -features."""
    scene = scene_of(5, batch=(2, 2, 1, 2), confidences="views", outside=outside)
    volumes = {}
    for sign, aggregation in itertools.product((1, -1), scenes.AGGREGATIONS):
        features, *rest = operands_of(replace(scene, aggregation=aggregation), device)
        volume = unproject(replace(scene, aggregation=aggregation), [sign * features, *rest])
        volumes[sign, aggregation] = sign * volume
    tiny = 1e-12
    assert (volumes[-1, "max"] <= volumes[-1, "softmax"] + tiny).all()
    assert (volumes[-1, "softmax"] <= volumes[1, "mean"] + tiny).all()
    assert (volumes[1, "mean"] <= volumes[1, "softmax"] + tiny).all()
    assert (volumes[1, "softmax"] <= volumes[1, "max"] + tiny).all()
    assert (volumes[1, "softmax"] > volumes[1, "mean"] + 1e-3).any()


@aggregations
def test_a_view_without_confidence_is_a_view_left_out(aggregation: str, device: str) -> None:
    scene = scene_of(6, views=4, confidences="views", aggregation=aggregation)
    assert scene.confidences is not None
    scene.confidences[:, 2] = 0
    scene.features[:, 2] = np.nan
    volume = unproject(scene, operands_of(scene, device))
    rest = scene.select_views([0, 1, 3])
    torch.testing.assert_close(volume, unproject(rest, operands_of(rest, device)))


@aggregations
def test_an_excluded_view_is_a_view_left_out(aggregation: str, device: str) -> None:
    """Where it does not see the voxel; and "zeros" is a view that sees a black image there."""
    scene = scene_of(7, views=4, size=(6, 7, 8), aggregation=aggregation, outside="exclude")
    sees = torch.as_tensor(scene.sees(), device=device)
    volumes = {
        views: unproject(part, operands_of(part, device))
        for n in range(1, 5)
        for views in itertools.combinations(range(4), n)
        for part in [scene.select_views(list(views))]
    }
    every = volumes.pop((0, 1, 2, 3))
    assert (every[:, :, ~sees.any(1)[0]] == 0).all()
    compared = 0
    for views, volume in volumes.items():
        others = [c for c in range(4) if c not in views]
        here = (sees[:, list(views)].all(1) & ~sees[:, others].any(1))[0]
        torch.testing.assert_close(every[:, :, here], volume[:, :, here])
        compared += int(here.sum())
    assert compared > 20

    black = replace(scene, outside="zeros")
    with_zeros = unproject(black, operands_of(black, device))
    features, *rest = operands_of(black, device)
    values = torch.stack(
        [
            ops.unproject(
                features[:, c : c + 1], rest[0][:, c : c + 1], VoxelGrid(*rest[1:], scene.grid[2])
            )  # type: ignore[misc,arg-type]
            for c in range(4)
        ]
    )
    want = {
        "sum": values.sum(0),
        "mean": values.mean(0),
        "softmax": (values.softmax(0) * values).sum(0),
        "max": values.amax(0),
    }[aggregation]
    torch.testing.assert_close(with_zeros, want)


@aggregations
@pytest.mark.parametrize("frame", [True, False], ids=["frame", "points"])
def test_gradients_to_geometry_against_differences(aggregation: str, frame: bool) -> None:
    """Autograd of the public function, by moving cameras and grids, away from cells' borders."""
    scene = scene_of(8, batch=(1, 2, 1, 1), frame=frame, size=(2, 2, 3), aggregation=aggregation)
    clear = torch.as_tensor(scene.clear(0.05).copy())
    assert clear.sum() > 5
    operands = operands_of(scene, "cpu")
    weights = random_grad(torch.empty(scene.shape, dtype=torch.float64)) * clear

    def loss(operands: Sequence[Tensor]) -> Tensor:
        return (weights * unproject(scene, operands)).sum()

    leaves = [x.clone().requires_grad_() for x in operands]
    grads = torch.autograd.grad(loss(leaves), leaves)
    for n in range(1, len(operands)):

        def moved_loss(at: np.ndarray, n: int = n) -> float:
            changed = [*operands[:n], torch.as_tensor(at), *operands[n + 1 :]]
            return float(loss(changed))

        at = operands[n].numpy()
        # Far less than 0.05 pixels: a projection's entries are up to some 1e4.
        step = 1e-6 * np.abs(at) + 1e-8 if n == 1 else 1e-2
        numeric = numerical_gradient(moved_loss, at, step)
        # A step along one entry is not far below rounding where the entry is small.
        assert_close(grads[n].numpy(), numeric, 1e-5)


# ---- From maps to a point ----


def test_a_person_is_found_in_the_volume(device: str) -> None:
    """Peaks at a joint's pixels give a peak at the joint, and its error moves the cameras."""
    width, height = 40, 30
    joints = torch.tensor([[180.0, -150.0, 900.0], [-260.0, 80.0, 1300.0]], device=device)
    angle = np.deg2rad([20.0, 110.0, 200.0, 300.0])
    centers = np.stack([4000 * np.cos(angle), 4000 * np.sin(angle), np.full(4, 1500.0)], -1)
    rig = rigs.look_at(centers, [0.0, 0.0, 1000.0], focal=60.0, image_size=(width, height))
    projections = torch.as_tensor(rig.projections, dtype=torch.float32, device=device)
    pixels = ops.project(joints, projections).movedim(0, 1)  # [C, K, 2]
    y, x = torch.meshgrid(
        torch.arange(height, device=device), torch.arange(width, device=device), indexing="ij"
    )
    squared = (x - pixels[..., :1, None]).square() + (y - pixels[..., 1:, None]).square()
    maps = torch.exp(-squared / 4.5)[None]
    center = torch.tensor([[0.0, 0.0, 1000.0]], device=device)
    grid = VoxelGrid.cube(center, side=1600.0, size=(24, 20, 16))
    voxel = grid.axes.norm(dim=-1).max()

    def find(projections: Tensor) -> Tensor:
        volume = ops.unproject(maps, projections[None], grid, aggregation="sum")
        return ops.soft_argmax3d(volume, inverse_temperature=8.0, grid=grid)[0]

    assert ((find(projections) - joints).norm(dim=-1) < voxel).all()
    # Cameras that are off by pixels are drawn to where they belong.
    offset = torch.tensor([[1.5, -1.0], [-1.0, 1.0], [1.0, 1.5], [-1.5, 0.5]], device=device)
    offset.requires_grad_()
    optimizer = torch.optim.Adam([offset], lr=0.1)
    errors = []
    for _ in range(25):
        shifted = projections[:, :2] + offset[..., None] * projections[:, 2:]
        found = find(torch.cat([shifted, projections[:, 2:]], 1))
        error = (found - joints).square().sum()
        optimizer.zero_grad()
        error.backward()
        assert (offset.grad != 0).all()
        optimizer.step()
        errors.append(float(error.detach()))
    assert errors[-1] < 0.2 * errors[0]
