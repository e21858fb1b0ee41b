# SPDX-License-Identifier: Apache-2.0
"""Losses of heat maps: values against loops, laws, gradients, missing joints, half precision."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from tritool.losses import heatmap_cross_entropy, heatmap_mse

seeds = st.integers(0, 2**31)
HEIGHT, WIDTH = 6, 9
Loss = Callable[..., Tensor]
both = pytest.mark.parametrize("loss", [heatmap_mse, heatmap_cross_entropy])


def scene(*batch: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Maps [*batch, 6, 9] and targets [*batch, 2], some of them beside the map."""
    generator = torch.Generator().manual_seed(seed)
    maps = torch.randn(*batch, HEIGHT, WIDTH, generator=generator, dtype=torch.float64)
    place = torch.rand(*batch, 2, generator=generator, dtype=torch.float64)
    return maps.to(dtype), (place * torch.tensor([WIDTH + 4, HEIGHT + 4]) - 2).to(dtype)


def inside(*batch: int) -> tuple[Tensor, Tensor]:
    """The same with every target within the map."""
    maps, target = scene(*batch)
    return maps, target.clamp(torch.tensor(0.0), torch.tensor([WIDTH - 1.0, HEIGHT - 1.0]))


def by_loops(maps: Tensor, target: Tensor, sigma: float) -> np.ndarray:
    """The mean over the cells of each joint [...], cell by cell."""
    flat, places = maps.flatten(0, -3).tolist(), target.flatten(0, -2).tolist()
    each = []
    for heatmap, (x, y) in zip(flat, places, strict=True):
        total = 0.0
        for row, values in enumerate(heatmap):
            for column, value in enumerate(values):
                distance = (column - x) ** 2 + (row - y) ** 2
                total += (value - math.exp(-distance / (2 * sigma**2))) ** 2
        each.append(total / (HEIGHT * WIDTH))
    return np.array(each).reshape(maps.shape[:-2])


def entropies_by_loops(maps: Tensor, target: Tensor, sigma: float, alpha: float) -> np.ndarray:
    """The cross entropy of each joint [...], cell by cell; NaN beyond the border."""
    flat, places = maps.flatten(0, -3).tolist(), target.flatten(0, -2).tolist()
    each = []
    for heatmap, (x, y) in zip(flat, places, strict=True):
        cells = [(row, column) for row in range(HEIGHT) for column in range(WIDTH)]
        heights = [
            math.exp(-((column - x) ** 2 + (row - y) ** 2) / (2 * sigma**2))
            for row, column in cells
        ]
        powers = [math.exp(alpha * heatmap[row][column]) for row, column in cells]
        total = 0.0
        for height, power in zip(heights, powers, strict=True):
            total -= height / sum(heights) * math.log(power / sum(powers))
        there = -0.5 <= x <= WIDTH - 0.5 and -0.5 <= y <= HEIGHT - 0.5
        each.append(total if there else math.nan)
    return np.array(each).reshape(maps.shape[:-2])


def gaussian(target: Tensor, height: int, width: int) -> Tensor:
    """Maps [..., H, W] with sigma 2."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    x, y = target[..., None, None, :].unbind(-1)
    return torch.exp(-((columns - x) ** 2 + (rows - y) ** 2) / 8)


@given(seeds, st.sampled_from([0.7, 2.0, 5.0]))
def test_against_loops(seed: int, sigma: float) -> None:
    maps, target = scene(2, 3, seed=seed)
    each = by_loops(maps, target, sigma)
    assert heatmap_mse(maps, target, sigma=sigma).item() == pytest.approx(each.mean())
    weights = torch.rand(2, 3, generator=torch.Generator().manual_seed(seed)) + 0.1
    got = heatmap_mse(maps, target, sigma=sigma, valid=weights)
    assert got.item() == pytest.approx(np.average(each, weights=weights.numpy()), rel=1e-6)


def test_the_gaussian_is_the_minimum_and_x_comes_first() -> None:
    target = torch.tensor([[6.25, 1.5]])
    exact = gaussian(target, HEIGHT, WIDTH)
    assert heatmap_mse(exact, target) < 1e-14
    assert heatmap_mse(exact, target.flip(-1)) > 0.01
    assert heatmap_mse(exact, target, sigma=2.5) > 1e-3


def test_outside_of_the_map_the_tail_remains() -> None:
    maps = torch.zeros(1, HEIGHT, WIDTH, dtype=torch.float64)
    near = heatmap_mse(maps, torch.tensor([[-2.0, 3.0]], dtype=torch.float64))
    assert near.item() == pytest.approx(by_loops(maps, torch.tensor([[-2.0, 3.0]]), 2.0)[0])
    assert near > 1e-3
    assert heatmap_mse(maps, torch.tensor([[1e30, 3.0]])) == 0


@given(seeds)
def test_law_flips_transposes_and_borders(seed: int) -> None:
    maps, target = scene(3, seed=seed)
    expected = heatmap_mse(maps, target)
    torch.testing.assert_close(heatmap_mse(maps.mT, target.flip(-1)), expected)
    mirrored = torch.stack([WIDTH - 1 - target[..., 0], target[..., 1]], -1)
    torch.testing.assert_close(heatmap_mse(maps.flip(-1), mirrored), expected)
    # A border that holds the Gaussian exactly only adds cells.
    moved = target + torch.tensor([3.0, 2.0], dtype=torch.float64)
    framed = gaussian(moved, HEIGHT + 2, WIDTH + 3)
    framed[..., 2:, 3:] = maps
    cells = HEIGHT * WIDTH / ((HEIGHT + 2) * (WIDTH + 3))
    torch.testing.assert_close(heatmap_mse(framed, moved), expected * cells)


@both
def test_what_does_not_count_leaves_no_trace(loss: Loss) -> None:
    maps, target = inside(2, 4)
    valid = torch.ones(2, 4, dtype=torch.bool)
    valid[0, 1] = valid[1, 2] = False
    expected = loss(maps[valid], target[valid])
    spoilt = maps.clone()
    spoilt[0, 1], spoilt[1, 2, 0] = torch.nan, torch.inf
    spoilt.requires_grad_()
    got = loss(spoilt, target, valid=valid)
    torch.testing.assert_close(got, expected)
    got.backward()
    assert torch.equal(spoilt.grad[~valid], torch.zeros_like(spoilt.grad[~valid]))
    assert spoilt.grad[valid].ne(0).any((-2, -1)).all()
    # An unknown target needs no mask.
    target[0, 1, 0], target[1, 2] = torch.nan, -torch.inf
    torch.testing.assert_close(loss(maps, target), expected)
    torch.testing.assert_close(loss(spoilt.detach(), target), expected)


@both
@pytest.mark.parametrize("why", ["masked", "nan", "no joints", "no images"])
def test_nothing_to_learn_from(loss: Loss, why: str) -> None:
    batch = {"no joints": (2, 0), "no images": (0, 3)}.get(why, (2, 3))
    maps = torch.randn(*batch, HEIGHT, WIDTH, requires_grad=True)
    target = torch.full((*batch, 2), torch.nan if why == "nan" else 1.0)
    got = loss(maps, target, valid=torch.zeros(batch) if why == "masked" else None)
    assert got == 0
    got.backward()
    assert torch.equal(maps.grad, torch.zeros_like(maps))


@pytest.mark.parametrize(
    "loss",
    [heatmap_mse, heatmap_cross_entropy],
)
def test_maps_without_cells(loss: Loss) -> None:
    maps = torch.zeros(2, 3, 0, WIDTH, requires_grad=True)
    got = loss(maps, torch.ones(2, 3, 2))
    assert got == 0
    got.backward()


@both
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_map_that_is_not_finite_is_told(loss: Loss, bad: float) -> None:
    maps, target = inside(2, 3)
    maps[1, 1, 2, 3] = bad
    maps.requires_grad_()
    got = loss(maps, target)
    assert got.isnan()
    got.backward()
    assert torch.equal(maps.grad, torch.zeros_like(maps))


@both
@pytest.mark.parametrize("weight", [-1.0, torch.nan, torch.inf])
def test_a_wrong_weight_is_told(loss: Loss, weight: float) -> None:
    maps, target = inside(3)
    maps.requires_grad_()
    got = loss(maps, target, valid=torch.tensor([1.0, weight, 1.0]))
    assert got.isnan()
    got.backward()
    assert torch.equal(maps.grad, torch.zeros_like(maps))


@both
def test_derivatives(loss: Loss) -> None:
    maps, target = (x.requires_grad_() for x in inside(2, 3))
    weights = (0.5 + torch.rand(2, 3, dtype=torch.float64)).requires_grad_()

    def call(m: Tensor, t: Tensor, w: Tensor) -> Tensor:
        return loss(m, t, sigma=1.3, valid=w)

    assert gradcheck(call, (maps, target, weights))
    assert gradgradcheck(call, (maps, target, weights))


@both
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_float32(loss: Loss, dtype: torch.dtype) -> None:
    # Small and even residuals: sums of halves would stop growing.
    target = torch.tensor([[100.0, 40.0]])
    maps = torch.full((1, 96, 160), 0.0625, dtype=dtype, requires_grad=True)
    got = loss(maps, target)
    assert got.dtype == torch.float32
    wide = maps.detach().double().requires_grad_()
    expected = loss(wide, target.double())
    assert got.item() == pytest.approx(expected.item(), rel=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(loss(maps, target), got)
    got.backward()
    expected.backward()
    assert maps.grad.dtype == dtype
    torch.testing.assert_close(maps.grad.double(), wide.grad, rtol=1e-2, atol=1e-7)


def test_one_map_is_kept_for_the_backward() -> None:
    maps, target = scene(4, 5, dtype=torch.float32)
    maps = maps.half().requires_grad_()
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.numel() >= maps.numel():
            kept[tensor.untyped_storage().data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        heatmap_mse(maps, target)
    assert list(kept.values()) == [maps.numel()]


@both
@pytest.mark.parametrize(
    ("maps", "target", "settings", "error", "words"),
    [
        ((3, 6, 9), (2, 2), {}, ValueError, r"target must be \[\.\.\., J, 2\] .*\(3, 2\)"),
        ((6, 9), (2,), {}, ValueError, r"heatmaps must be \[\.\.\., J, H, W\]"),
        ((3, 6, 9), (3, 2), {"sigma": 0.0}, ValueError, "sigma must be a number"),
        ((3, 6, 9), (3, 2), {"valid": torch.ones(2)}, ValueError, "valid must be"),
        ((3, 6, 9), (3, 2), {"valid": [True]}, TypeError, "valid must be a tensor"),
    ],
)
def test_arguments_that_do_not_fit(
    loss: Loss,
    maps: tuple[int, ...],
    target: tuple[int, ...],
    settings: dict[str, Any],
    error: type[Exception],
    words: str,
) -> None:
    with pytest.raises(error, match=words):
        loss(torch.zeros(maps), torch.zeros(target), **settings)


@both
def test_integers_are_refused(loss: Loss) -> None:
    with pytest.raises(TypeError, match=r"heatmaps .* torch\.int64"):
        loss(torch.zeros(1, 6, 9, dtype=torch.long), torch.zeros(1, 2))


# ---- Cross entropy alone ----


@given(seeds, st.sampled_from([0.6, 2.0, 5.0]), st.sampled_from([0.5, 1.0, 4.0]))
def test_cross_entropy_against_loops(seed: int, sigma: float, alpha: float) -> None:
    maps, target = scene(2, 3, seed=seed)
    target[0, 0] = torch.tensor([7.25, 1.5])  # one at least is within the map
    each = entropies_by_loops(maps, target, sigma, alpha)
    settings: Any = {"sigma": sigma, "inverse_temperature": alpha}
    got = heatmap_cross_entropy(maps, target, **settings)
    assert got.item() == pytest.approx(np.nanmean(each))
    weights = torch.rand(2, 3, generator=torch.Generator().manual_seed(seed)) + 0.1
    got = heatmap_cross_entropy(maps, target, valid=weights, **settings)
    there = np.isfinite(each)
    expected = np.average(each[there], weights=weights.numpy()[there])
    assert got.item() == pytest.approx(expected, rel=1e-6)


def test_a_joint_beyond_the_border_does_not_count() -> None:
    maps, _ = scene(1)
    at = [[8.5, 5.5], [-0.5, -0.5], [8.51, 3.0], [5.0, 5.51], [-0.51, 3.0], [5.0, -0.51]]
    values = [heatmap_cross_entropy(maps, torch.tensor([place])) for place in at]
    assert all(value > 1 for value in values[:2])
    assert values[2:] == [0] * 4
    x_is_not_y = torch.tensor([[7.0, 2.0], [2.0, 7.0]])
    got = heatmap_cross_entropy(maps.expand(2, -1, -1), x_is_not_y)
    torch.testing.assert_close(got, heatmap_cross_entropy(maps, x_is_not_y[:1]))


def test_the_logarithm_of_the_gaussian_is_the_minimum() -> None:
    target = torch.tensor([[6.25, 1.5]], dtype=torch.float64)
    q = gaussian(target, HEIGHT, WIDTH)
    exact = (q.log() / 3.0).requires_grad_()
    least = heatmap_cross_entropy(exact, target, inverse_temperature=3.0)
    q = q / q.sum()
    assert least.item() == pytest.approx(-(q * q.log()).sum().item())
    least.backward()
    assert exact.grad is not None
    assert exact.grad.abs().max() < 1e-12
    for seed in range(5):
        other = exact.detach() + 0.1 * scene(1, seed=seed)[0]
        assert heatmap_cross_entropy(other, target, inverse_temperature=3.0) > least + 1e-3


@given(seeds, st.floats(-50, 50))
def test_law_constants_temperatures_and_flips(seed: int, constant: float) -> None:
    maps, target = scene(3, seed=seed)
    expected = heatmap_cross_entropy(maps, target)
    torch.testing.assert_close(heatmap_cross_entropy(maps + constant, target), expected)
    cooler = heatmap_cross_entropy(maps / 7, target, inverse_temperature=7.0)
    torch.testing.assert_close(cooler, expected)
    torch.testing.assert_close(heatmap_cross_entropy(maps.mT, target.flip(-1)), expected)
    mirrored = torch.stack([WIDTH - 1 - target[..., 0], target[..., 1]], -1)
    torch.testing.assert_close(heatmap_cross_entropy(maps.flip(-1), mirrored), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_cross_entropy_of_half_precision(dtype: torch.dtype) -> None:
    maps, target = inside(2, 3)
    maps = maps.to(dtype).requires_grad_()
    got = heatmap_cross_entropy(maps, target.float(), inverse_temperature=20.0)
    assert got.dtype == torch.float32
    wide = maps.detach().double().requires_grad_()
    expected = heatmap_cross_entropy(wide, target, inverse_temperature=20.0)
    assert got.item() == pytest.approx(expected.item(), rel=1e-6)
    got.backward()
    expected.backward()
    assert maps.grad is not None
    assert maps.grad.dtype == dtype
    assert wide.grad is not None
    torch.testing.assert_close(maps.grad.double(), wide.grad, rtol=1e-2, atol=1e-4)


def test_cross_entropy_does_not_change_under_autocast() -> None:
    maps, target = inside(2, 3)
    maps, target = maps.float(), target.float()
    expected = heatmap_cross_entropy(maps, target)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(heatmap_cross_entropy(maps, target), expected)


def test_the_temperature_must_be_above_0() -> None:
    with pytest.raises(ValueError, match="inverse_temperature must be a number"):
        heatmap_cross_entropy(torch.zeros(3, 6, 9), torch.zeros(3, 2), inverse_temperature=0.0)
