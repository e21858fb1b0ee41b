# SPDX-License-Identifier: Apache-2.0
"""`heatmap_mse`: values against loops, laws, gradients, missing joints, half precision."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from tritool.losses import heatmap_mse

seeds = st.integers(0, 2**31)
HEIGHT, WIDTH = 6, 9


def scene(*batch: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Maps [*batch, 6, 9] and targets [*batch, 2], some of them beside the map."""
    generator = torch.Generator().manual_seed(seed)
    maps = torch.randn(*batch, HEIGHT, WIDTH, generator=generator, dtype=torch.float64)
    place = torch.rand(*batch, 2, generator=generator, dtype=torch.float64)
    return maps.to(dtype), (place * torch.tensor([WIDTH + 4, HEIGHT + 4]) - 2).to(dtype)


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


def test_what_does_not_count_leaves_no_trace() -> None:
    maps, target = scene(2, 4)
    valid = torch.ones(2, 4, dtype=torch.bool)
    valid[0, 1] = valid[1, 2] = False
    expected = heatmap_mse(maps[valid], target[valid])
    spoilt = maps.clone()
    spoilt[0, 1], spoilt[1, 2, 0] = torch.nan, torch.inf
    spoilt.requires_grad_()
    got = heatmap_mse(spoilt, target, valid=valid)
    torch.testing.assert_close(got, expected)
    got.backward()
    assert torch.equal(spoilt.grad[~valid], torch.zeros_like(spoilt.grad[~valid]))
    assert spoilt.grad[valid].ne(0).any((-2, -1)).all()
    # An unknown target needs no mask.
    target[0, 1, 0], target[1, 2] = torch.nan, -torch.inf
    torch.testing.assert_close(heatmap_mse(maps, target), expected)
    torch.testing.assert_close(heatmap_mse(spoilt.detach(), target), expected)


@pytest.mark.parametrize("why", ["masked", "nan", "no joints", "no images", "no cells"])
def test_nothing_to_learn_from(why: str) -> None:
    batch = {"no joints": (2, 0), "no images": (0, 3)}.get(why, (2, 3))
    maps = torch.randn(*batch, 0 if why == "no cells" else HEIGHT, WIDTH, requires_grad=True)
    target = torch.full((*batch, 2), torch.nan if why == "nan" else 1.0)
    got = heatmap_mse(maps, target, valid=torch.zeros(batch) if why == "masked" else None)
    assert got == 0
    got.backward()
    assert torch.equal(maps.grad, torch.zeros_like(maps))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_map_that_is_not_finite_is_told(bad: float) -> None:
    maps, target = scene(2, 3)
    maps[1, 1, 2, 3] = bad
    maps.requires_grad_()
    got = heatmap_mse(maps, target)
    assert got.isnan()
    got.backward()
    assert torch.equal(maps.grad, torch.zeros_like(maps))


@pytest.mark.parametrize("weight", [-1.0, torch.nan, torch.inf])
def test_a_wrong_weight_is_told(weight: float) -> None:
    maps, target = scene(3)
    maps.requires_grad_()
    got = heatmap_mse(maps, target, valid=torch.tensor([1.0, weight, 1.0]))
    assert got.isnan()
    got.backward()
    assert torch.equal(maps.grad, torch.zeros_like(maps))


def test_derivatives() -> None:
    maps, target = (x.requires_grad_() for x in scene(2, 3))
    weights = (0.5 + torch.rand(2, 3, dtype=torch.float64)).requires_grad_()

    def call(m: Tensor, t: Tensor, w: Tensor) -> Tensor:
        return heatmap_mse(m, t, sigma=1.3, valid=w)

    assert gradcheck(call, (maps, target, weights))
    assert gradgradcheck(call, (maps, target, weights))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_float32(dtype: torch.dtype) -> None:
    # Small and even residuals: sums of halves would stop growing.
    target = torch.tensor([[100.0, 40.0]])
    maps = torch.full((1, 96, 160), 0.0625, dtype=dtype, requires_grad=True)
    got = heatmap_mse(maps, target)
    assert got.dtype == torch.float32
    wide = maps.detach().double().requires_grad_()
    expected = heatmap_mse(wide, target.double())
    assert got.item() == pytest.approx(expected.item(), rel=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(heatmap_mse(maps, target), got)
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
    maps: tuple[int, ...],
    target: tuple[int, ...],
    settings: dict[str, object],
    error: type[Exception],
    words: str,
) -> None:
    with pytest.raises(error, match=words):
        heatmap_mse(torch.zeros(maps), torch.zeros(target), **settings)


def test_integers_are_refused() -> None:
    with pytest.raises(TypeError, match=r"heatmaps .* torch\.int64"):
        heatmap_mse(torch.zeros(1, 6, 9, dtype=torch.long), torch.zeros(1, 2))
