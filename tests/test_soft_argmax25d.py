# SPDX-License-Identifier: Apache-2.0
"""`ops.soft_argmax25d`: batches, dtypes, layouts, degenerate maps, bad input.

The kernels themselves are tested on every backend in test_kernels_soft_argmax25d.py, derivatives
and transforms in test_contract.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tritool import ops, reference
from tritool.ops import composite

MAP = torch.zeros(2, 3)


def head(*, last: bool = False, device: str = "cpu", seed: int = 0) -> Tensor:
    """What a network gives, `[4, 2 J, H, W]`: heat maps, then depth maps."""
    generator = torch.Generator().manual_seed(seed)
    maps = (3 * torch.randn(4, 34, 12, 9, generator=generator)).to(device)
    return maps.contiguous(memory_format=torch.channels_last) if last else maps


@given(
    shapes=st.sampled_from(
        [((), ()), ((3,), ()), ((), (0,)), ((2, 1), (3,)), ((1, 3), (2, 3)), ((2, 0), (1,))]
    ),
    alpha=st.floats(0.1, 100),
)
def test_any_batch(shapes: tuple[tuple[int, ...], ...], alpha: float) -> None:
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal((*shape, 5, 8)) for shape in shapes]
    maps = [torch.from_numpy(a).requires_grad_() for a in arrays]
    have = ops.soft_argmax25d(*maps, inverse_temperature=alpha)
    want = reference.soft_argmax25d(*arrays, inverse_temperature=alpha)
    assert have.shape == want.shape
    np.testing.assert_allclose(have.detach().numpy(), want, rtol=1e-12, atol=1e-12)
    grad = rng.standard_normal(want.shape)
    found = torch.autograd.grad(have, maps, torch.from_numpy(grad))
    expected = reference.soft_argmax25d_vjp(grad, *arrays, inverse_temperature=alpha)
    for got, wanted in zip(found, expected, strict=True):
        np.testing.assert_allclose(got.numpy(), wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("last", [False, True])
def test_a_split_head_is_read_in_place(last: bool, device: str) -> None:
    leaf = head(last=last, device=device).requires_grad_()
    heatmaps, depth_maps = leaf[:, :17], leaf[:, 17:]
    position = ops.soft_argmax25d(heatmaps, depth_maps)
    saved = position.grad_fn.saved_tensors  # type: ignore[union-attr]
    assert [x.data_ptr() for x in saved[:2]] == [heatmaps.data_ptr(), depth_maps.data_ptr()]
    apart = [x.detach().clone(memory_format=torch.contiguous_format).requires_grad_()
             for x in (heatmaps, depth_maps)]  # fmt: skip
    other = ops.soft_argmax25d(*apart)
    torch.testing.assert_close(position, other, rtol=0, atol=1e-5)
    torch.testing.assert_close(position[..., :2], ops.soft_argmax2d(apart[0]), rtol=0, atol=1e-5)
    weights = torch.linspace(-1, 1, position.numel(), device=device).reshape(position.shape)
    (gradient,) = torch.autograd.grad((position * weights).sum(), leaf)
    wanted = torch.cat(torch.autograd.grad((other * weights).sum(), apart), 1)
    torch.testing.assert_close(gradient, wanted, rtol=0, atol=1e-5)
    # In the format of the maps, too.
    for maps in saved[:2]:
        mine = maps.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(ops.soft_argmax25d(mine, mine).sum(), mine)
        last_format = gradient.is_contiguous(memory_format=torch.channels_last)
        assert last_format if last else gradient.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_maps_are_summed_in_float32(dtype: torch.dtype, device: str) -> None:
    maps = [x.to(dtype) for x in head(device=device).chunk(2, 1)]
    exact = [x.double().requires_grad_() for x in maps]
    leaves = [x.clone().requires_grad_() for x in maps]
    have, want = ops.soft_argmax25d(*leaves), ops.soft_argmax25d(*exact)
    assert have.dtype == torch.float32
    torch.testing.assert_close(have.double(), want, rtol=2e-6, atol=2e-5)
    found = torch.autograd.grad(have.sum(), leaves)
    wanted = torch.autograd.grad(want.sum(), exact)
    for got, w in zip(found, wanted, strict=True):
        assert got.dtype == dtype
        torch.testing.assert_close(got, w.to(dtype))


@pytest.mark.parametrize(
    ("first", "second", "result"),
    [
        (torch.float16, torch.float32, torch.float32),
        (torch.float32, torch.float64, torch.float64),
        (torch.float16, torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.bfloat16, torch.float32),
    ],
)
def test_dtypes_are_promoted(
    first: torch.dtype, second: torch.dtype, result: torch.dtype, device: str
) -> None:
    heatmaps, depth_maps = head(device=device).chunk(2, 1)
    maps = [heatmaps.to(first).requires_grad_(), depth_maps.to(second).requires_grad_()]
    position = ops.soft_argmax25d(*maps)
    assert position.dtype == result
    want = ops.soft_argmax25d(*(x.detach().to(torch.float64) for x in maps))
    torch.testing.assert_close(position.double(), want, rtol=2e-6, atol=2e-5)
    grads = torch.autograd.grad(position.sum(), maps)
    assert [g.dtype for g in grads] == [first, second]


def test_autocast_changes_nothing(device: str) -> None:
    maps = [x.requires_grad_() for x in head(device=device).chunk(2, 1)]
    want = ops.soft_argmax25d(*maps)
    with torch.autocast(device, dtype=torch.bfloat16):
        have = ops.soft_argmax25d(*maps)
    torch.testing.assert_close(have, want, rtol=0, atol=0)
    for got, wanted in zip(
        torch.autograd.grad(have.sum(), maps), torch.autograd.grad(want.sum(), maps), strict=True
    ):
        torch.testing.assert_close(got, wanted, rtol=0, atol=0)


def degenerate_maps(dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    """Six maps: sound; NaN in both; no pixel; depth NaN, masked; the same, weighing; infinite."""
    generator = torch.Generator().manual_seed(1)
    heatmaps, depth_maps = torch.randn(2, 6, 5, 8, generator=generator, dtype=torch.float64)
    heatmaps[1, 2, 3] = depth_maps[1, 2, 3] = torch.nan
    heatmaps[2] = -torch.inf
    heatmaps[3, :2] = -torch.inf
    depth_maps[3, :2] = torch.nan
    depth_maps[4, 1, 1] = torch.nan
    depth_maps[5, 4, 7] = -torch.inf
    return heatmaps.to(device, dtype), depth_maps.to(device, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_degenerate_maps_stay_apart(dtype: torch.dtype, device: str) -> None:
    heatmaps, depth_maps = (x.requires_grad_() for x in degenerate_maps(dtype, device))
    position = ops.soft_argmax25d(heatmaps, depth_maps)
    bad = [[False] * 3, [True] * 3, [True] * 3, [False] * 3, *[[False, False, True]] * 2]
    assert position.isnan().tolist() == bad
    # A loss that is NaN where the result is reaches no parameter.
    to_heatmaps, to_depth_maps = torch.autograd.grad(position.sum(), (heatmaps, depth_maps))
    assert to_heatmaps.isfinite().all()
    assert to_depth_maps.isfinite().all()
    assert (to_heatmaps[[1, 2]] == 0).all()
    assert (to_depth_maps[[1, 2, 4, 5]] == 0).all()
    assert (to_depth_maps[3, :2] == 0).all()
    assert (to_depth_maps[3, 2:] > 0).all()
    # Where the depth alone is missing, the position keeps its gradient.
    flat = ops.soft_argmax2d(heatmaps)
    (wanted,) = torch.autograd.grad(flat.sum(), heatmaps)
    close = 1e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(to_heatmaps[4:], wanted[4:], rtol=0, atol=close)
    torch.testing.assert_close(position[:, :2], flat, rtol=0, atol=close, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_composites_agree_with_the_kernels(dtype: torch.dtype) -> None:
    maps = degenerate_maps(dtype, "cpu")
    have = composite.soft_argmax25d(*maps, 1.5)
    want = torch.ops.tritool.soft_argmax25d(*maps, 1.5)
    for h, w in zip(have, want, strict=True):
        assert h.dtype == w.dtype
    torch.testing.assert_close(have[0], want[0], equal_nan=True, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(have[1][0], want[1][0], rtol=1e-5, atol=0)
    grad = torch.full_like(have[0], torch.nan).where(have[0].isnan(), 1)
    got = composite.soft_argmax25d_backward(grad, *maps, *want, 1.5)
    wanted = torch.ops.tritool.soft_argmax25d_backward(grad, *maps, *want, 1.5)
    for g, w in zip(got, wanted, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-5)


def test_second_derivatives_of_degenerate_maps_are_finite() -> None:
    maps = [x.requires_grad_() for x in degenerate_maps(torch.float64, "cpu")]
    position = ops.soft_argmax25d(*maps)
    gradients = torch.autograd.grad(position.nansum(), maps, create_graph=True)
    twice = torch.autograd.grad(sum(g.square().sum() for g in gradients), maps)
    assert all(g.isfinite().all() for g in twice)
    assert (twice[0][0] != 0).all()
    assert (twice[1][0] != 0).any()


def test_learns_depth(device: str) -> None:
    """Both maps are found from the results alone, by gradient descent."""
    torch.manual_seed(0)
    maps = (0.1 * torch.randn(2, 17, 12, 9, device=device)).requires_grad_()
    size = torch.tensor([8.0, 11.0, 500.0], device=device)
    target = torch.rand(17, 3, device=device) * size
    optimizer = torch.optim.Adam([maps], lr=0.3)
    for _ in range(300):
        position = ops.soft_argmax25d(maps[0], 100 * maps[1])
        loss = ((position - target) / size).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 1e-4


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ops.soft_argmax25d(torch.zeros(7), MAP), ValueError,
         "heatmaps must be [..., H, W], got (7,)"),
        (lambda: ops.soft_argmax25d(MAP, torch.zeros(7)), ValueError,
         "depth_maps must be [..., H, W], got (7,)"),
        (lambda: ops.soft_argmax25d(MAP, torch.zeros(4, 3, 2)), ValueError,
         "depth_maps must be [..., H, W] with H, W = (2, 3) as in heatmaps, got (4, 3, 2)"),
        (lambda: ops.soft_argmax25d(torch.zeros(4, 2, 3), torch.zeros(5, 2, 3)), ValueError,
         "batch dimensions must broadcast, got (4,) of heatmaps, (5,) of depth_maps"),
        (lambda: ops.soft_argmax25d(MAP, MAP.long()), TypeError,
         "depth_maps must have a floating-point dtype, got torch.int64"),
        (lambda: ops.soft_argmax25d([[0.0]], MAP), TypeError,  # type: ignore[arg-type]
         "heatmaps must be a tensor, got list"),
        (lambda: ops.soft_argmax25d(MAP, MAP.to("meta")), ValueError,
         "depth_maps must be on the device of heatmaps, cpu, got meta"),
        (lambda: ops.soft_argmax25d(MAP, MAP, inverse_temperature=-1), ValueError,
         "inverse_temperature must be a number from 1e-30 to 1e30, got -1"),
    ],
)  # fmt: skip
def test_bad_arguments_in_one_line(
    call: Callable[[], Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == message


@pytest.mark.parametrize(
    "maps",
    [
        (torch.zeros(4, 2, 3), torch.zeros(1, 2, 3)),
        (torch.zeros(4, 2, 3), torch.zeros(4, 3, 2)),
        (MAP, MAP.double()),
        (MAP, torch.zeros(1, 2, 3)),
    ],
)
def test_raw_ops_are_memory_safe(maps: tuple[Tensor, Tensor]) -> None:
    """What the Python checks would have caught never reaches a kernel."""
    batch = maps[0].shape[:-2]
    results = torch.zeros(*batch, 3), torch.zeros(*batch, 2)
    with pytest.raises(RuntimeError, match="depth_maps"):
        torch.ops.tritool.soft_argmax25d(*maps, 1.0)
    with pytest.raises(RuntimeError, match="depth_maps"):
        torch.ops.tritool.soft_argmax25d_backward(results[0], *maps, *results, 1.0)


@pytest.mark.parametrize("short", range(3))
def test_raw_backward_wants_results_of_the_maps(short: int) -> None:
    results = [torch.zeros(4, 3), torch.zeros(4, 3), torch.zeros(4, 2)]
    maps = torch.zeros(4, 5, 6)
    for wrong in (results[short][..., 1:], results[short][1:], results[short].double()):
        grad, position, partition = (*results[:short], wrong, *results[short + 1 :])
        with pytest.raises(RuntimeError, match=r"grad|position|partition"):
            torch.ops.tritool.soft_argmax25d_backward(grad, maps, maps, position, partition, 1.0)
