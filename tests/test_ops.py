# SPDX-License-Identifier: Apache-2.0
"""The public functions: against the reference on any batch shape and dtype, on bad input, at scale.

The kernels' accuracy and laws are tested on every variant in test_kernels_*.py, derivatives and
transforms in test_contract.py.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import rigs
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tritool import VoxelGrid, ops, reference
from tritool.ops import composite

DTYPES = [torch.float32, torch.float64]


def tensor(array: Any, dtype: torch.dtype = torch.float64, device: str = "cpu") -> Tensor:
    return torch.as_tensor(np.asarray(array), dtype=dtype, device=device)


def scene(count: int, noise: float = 5.0, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    rig = rigs.h36m4()
    observed = rigs.observe(rig, count, noise=noise, weights="uniform", seed=seed)
    return tensor(observed.points), tensor(rig.projections), tensor(observed.weights)


@st.composite
def broadcast_shapes(draw: st.DrawFn, operands: int) -> list[tuple[int, ...]]:
    """Batch shapes that broadcast together, with sizes of 0 and 1 and missing dimensions."""
    batch = draw(st.lists(st.integers(0, 3), max_size=3))
    return [
        tuple(
            1 if draw(st.booleans()) else size for size in batch[draw(st.integers(0, len(batch))) :]
        )
        for _ in range(operands)
    ]


@given(broadcast_shapes(3), st.sampled_from(["homogeneous", "inhomogeneous"]), st.booleans())
def test_triangulate_on_any_batch(shapes: list[tuple[int, ...]], mode: str, weighted: bool) -> None:
    rng = np.random.default_rng(0)
    rig = rigs.h36m4()
    points = rng.uniform(100, 900, (*shapes[0], 4, 2))
    projections = np.broadcast_to(rig.projections, (*shapes[1], 4, 3, 4)) * rng.uniform(
        0.9, 1.1, (*shapes[1], 4, 1, 1)
    )
    weights = rng.uniform(0.1, 1, (*shapes[2], 4)) if weighted else None
    arrays = [points, projections] + ([weights] if weighted else [])
    inputs = [tensor(a).requires_grad_() for a in arrays]
    have = ops.triangulate(*inputs, mode=mode)
    want = reference.triangulate(*arrays, mode=mode)
    assert have.shape == want.shape
    np.testing.assert_allclose(have.detach().numpy(), want, rtol=1e-8, atol=1e-7)
    grad = rng.normal(size=want.shape)
    grads = torch.autograd.grad(have, inputs, tensor(grad))
    expected = reference.triangulate_vjp(grad, *arrays, mode=mode)
    for got, wanted in zip(grads, expected, strict=False):
        assert got.shape == wanted.shape
        np.testing.assert_allclose(got.numpy(), wanted, rtol=1e-6, atol=1e-6 * scale_of(wanted))


def scale_of(array: np.ndarray) -> float:
    return float(np.abs(array).max()) if array.size else 1.0


@given(broadcast_shapes(2))
def test_project_on_any_batch(shapes: list[tuple[int, ...]]) -> None:
    rng = np.random.default_rng(0)
    points = rng.uniform(-800, 800, (*shapes[0], 3))
    projections = np.broadcast_to(rigs.h36m4().projections, (*shapes[1], 4, 3, 4)) * rng.uniform(
        0.9, 1.1, (*shapes[1], 4, 1, 1)
    )
    inputs = [tensor(points).requires_grad_(), tensor(projections).requires_grad_()]
    have = ops.project(*inputs)
    want = reference.project(points, projections)
    assert have.shape == want.shape
    np.testing.assert_allclose(have.detach().numpy(), want, rtol=1e-12, atol=1e-9)
    grad = rng.normal(size=want.shape)
    expected = reference.project_vjp(grad, points, projections)
    for got, wanted in zip(torch.autograd.grad(have, inputs, tensor(grad)), expected, strict=True):
        np.testing.assert_allclose(got.numpy(), wanted, rtol=1e-10, atol=1e-12 * scale_of(wanted))


@given(rigs.logits(2), st.floats(0.1, 100))
def test_moments2d_on_any_map(logits: np.ndarray, alpha: float) -> None:
    have = ops.softmax_moments2d(tensor(logits), inverse_temperature=alpha)
    want = reference.softmax_moments2d(logits, inverse_temperature=alpha)
    for h, w in zip(have, want, strict=True):
        np.testing.assert_allclose(h.numpy(), w, rtol=1e-9, atol=1e-9)


@given(rigs.logits(3), st.floats(0.1, 100))
def test_moments3d_in_the_world(logits: np.ndarray, alpha: float) -> None:
    rng = np.random.default_rng(1)
    batch = logits.shape[0] if logits.ndim > 3 else 1
    origin, axes = rng.normal(size=(batch, 3)), rng.normal(size=(batch, 3, 3))
    grid = VoxelGrid(tensor(origin), tensor(axes), logits.shape[-3:])
    have = ops.softmax_moments3d(tensor(logits), inverse_temperature=alpha, grid=grid)
    frame = (origin, axes) if logits.ndim > 3 else (origin[0], axes[0])
    want = reference.softmax_moments3d(logits, inverse_temperature=alpha, grid=frame)
    for h, w in zip(have, want, strict=True):
        np.testing.assert_allclose(h.numpy(), w, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_maps_are_summed_in_float32(dtype: torch.dtype, device: str) -> None:
    torch.manual_seed(0)
    maps = (3 * torch.randn(3, 5, 12, 20)).to(device, dtype)
    want = ops.softmax_moments2d(maps.double())
    have = ops.softmax_moments2d(maps)
    for h, w in zip(have, want, strict=True):
        assert h.dtype == torch.float32
        torch.testing.assert_close(h.double(), w, rtol=2e-6, atol=2e-5)
    leaf = maps.clone().requires_grad_()
    (grad,) = torch.autograd.grad(ops.soft_argmax2d(leaf).sum(), leaf)
    exact = maps.double().requires_grad_()
    (wanted,) = torch.autograd.grad(ops.soft_argmax2d(exact).sum(), exact)
    assert grad.dtype == dtype
    torch.testing.assert_close(grad, wanted.to(dtype))


def test_geometry_is_never_in_half_precision(device: str) -> None:
    points, projections, weights = (x.to(device) for x in scene(5))
    assert ops.triangulate(points.half(), projections.float()).dtype == torch.float32
    assert ops.triangulate(points.float(), projections, weights.bfloat16()).dtype == torch.float64
    leaf = weights.half().requires_grad_()
    (grad,) = torch.autograd.grad(ops.triangulate(points, projections, leaf).sum(), leaf)
    assert grad.dtype == torch.float16


@pytest.mark.parametrize("layout", ["channels_last", "transposed", "sliced", "expanded"])
def test_maps_of_any_strides(layout: str, device: str) -> None:
    torch.manual_seed(1)
    plain = torch.randn(2, 21, 9, 14, device=device)
    given_maps = {
        "channels_last": lambda: plain.contiguous(memory_format=torch.channels_last),
        "transposed": lambda: plain.mT.contiguous().mT,
        "sliced": lambda: torch.cat([plain, plain], -1)[..., : plain.shape[-1]],
        "expanded": lambda: plain[:, :1].expand(-1, 21, -1, -1),
    }[layout]()
    same = given_maps.contiguous()
    maps = given_maps.detach().requires_grad_()
    other = same.detach().requires_grad_()
    for h, w in zip(ops.softmax_moments2d(maps), ops.softmax_moments2d(other), strict=True):
        torch.testing.assert_close(h, w, rtol=1e-5, atol=2e-5)
    (have,) = torch.autograd.grad(ops.soft_argmax2d(maps).square().sum(), maps)
    (want,) = torch.autograd.grad(ops.soft_argmax2d(other).square().sum(), other)
    torch.testing.assert_close(have, want, rtol=1e-4, atol=1e-6)
    if layout == "channels_last":
        assert have.is_contiguous(memory_format=torch.channels_last)


def test_one_spoilt_item_leaves_its_neighbours_alone(device: str) -> None:
    points, projections, weights = (x.to(device) for x in scene(40))
    points[7, 2] = torch.nan  # absent: three views are left
    points[11, 1:] = torch.nan  # one view is left
    weights[13, 0] = torch.nan
    weights[17] = 0
    inputs = [x.requires_grad_() for x in (points, projections, weights)]
    result = ops.triangulate(*inputs)
    bad = [11, 13, 17]
    assert result.isnan().any(-1).nonzero().flatten().tolist() == bad
    good = [n for n in range(40) if n not in bad]
    alone = [
        points.detach()[good].requires_grad_(),
        projections,
        weights.detach()[good].requires_grad_(),
    ]
    torch.testing.assert_close(result[good], ops.triangulate(*alone), rtol=0, atol=1e-9)
    # A loss that masks its terms by their validity sees no NaN from the points it leaves out.
    loss = torch.where(result.isnan(), 0, result).square().sum()
    grads = torch.autograd.grad(loss, inputs)
    wanted = torch.autograd.grad(ops.triangulate(*alone).square().sum(), alone)
    assert all(g.isfinite().all() for g in grads)
    assert (grads[0][bad] == 0).all()
    assert (grads[2][bad] == 0).all()
    torch.testing.assert_close(grads[1], wanted[1], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(grads[0][good], wanted[0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("reweight", [1, 3])
def test_reweighting_keeps_bad_points_apart(reweight: int, device: str) -> None:
    points, projections, weights = (x.to(device) for x in scene(10))
    points[3, 1:] = torch.nan
    projections = projections.expand(10, 4, 3, 4).clone()
    projections[5, 2] = torch.nan
    weights[5, 2] = 0
    projections[8, 1] = torch.nan
    inputs = [x.requires_grad_() for x in (points, projections, weights)]
    result = ops.triangulate(*inputs, reweight=reweight)
    assert result.isnan().any(-1).nonzero().flatten().tolist() == [3, 8]
    grads = torch.autograd.grad(result.nan_to_num().sum(), inputs)
    assert all(g.isfinite().all() for g in grads)
    want = reference.triangulate(*(x.detach().cpu().numpy() for x in inputs), reweight=reweight)
    np.testing.assert_allclose(result.detach().cpu().numpy(), want, rtol=1e-9, atol=1e-7)


def test_reweighting_approaches_the_least_reprojection_error(device: str) -> None:
    rig = rigs.h36m4()
    observed = rigs.observe(rig, 300, noise=10.0, weights="one", seed=3)
    points, projections = (
        tensor(observed.points, device=device),
        tensor(rig.projections, device=device),
    )

    def error(result: Tensor) -> float:
        return float((ops.project(result, projections) - points).square().sum(-1).mean())

    plain = error(ops.triangulate(points, projections))
    once = error(ops.triangulate(points, projections, reweight=1))
    twice = error(ops.triangulate(points, projections, reweight=2))
    assert once < plain
    assert twice <= once * 1.001


def test_training_goes_through_degenerate_batches(device: str) -> None:
    """Views come and go, whole points vanish: parameters stay finite and the error falls."""
    torch.manual_seed(0)
    rig = rigs.h36m4()
    observed = rigs.observe(rig, 64, noise=0.0, weights="one", seed=1)
    truth = tensor(observed.truth, torch.float32, device)
    projections = tensor(rig.projections, torch.float32, device)
    noisy = tensor(observed.points, torch.float32, device) + 20 * torch.randn(
        64, 4, 2, device=device
    )
    offsets = torch.zeros_like(noisy, requires_grad=True)
    optimizer = torch.optim.Adam([offsets], lr=0.5)
    losses = []
    for _ in range(60):
        weights = (torch.rand(64, 4, device=device) > 0.4).float()
        result = ops.triangulate(noisy + offsets, projections, weights)
        found = ~result.isnan().any(-1)
        loss = torch.where(found[:, None], result - truth, 0).norm(dim=-1).sum() / found.sum()
        optimizer.zero_grad()
        loss.backward()
        assert offsets.grad is not None
        assert offsets.grad.isfinite().all()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert np.mean(losses[-10:]) < 0.5 * np.mean(losses[:10])


def test_a_million_points_in_one_call(device: str) -> None:
    points, projections, weights = scene(1000, noise=2.0)
    want = ops.triangulate(points, projections, weights)
    inputs = [
        points.float().repeat(1000, 1, 1).to(device).requires_grad_(),
        projections.float().to(device).requires_grad_(),
        weights.float().repeat(1000, 1).to(device).requires_grad_(),
    ]
    result = ops.triangulate(*inputs)
    assert result.shape == (1_000_000, 3)
    error = (result.detach()[-1000:].cpu().double() - want).norm(dim=-1)
    assert error.quantile(0.999) < 2e-3  # the float32 rounding of the inputs, mostly
    grads = torch.autograd.grad(result.sum(), inputs)
    torch.testing.assert_close(grads[0][:1000], grads[0][-1000:], rtol=0, atol=0)
    assert grads[1].shape == (4, 3, 4)
    assert grads[1].isfinite().all()


@pytest.mark.parametrize("mode", ["homogeneous", "inhomogeneous"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_composites_agree_with_the_kernels(mode: str, dtype: torch.dtype) -> None:
    points, projections, weights = (x.to(dtype) for x in scene(30))
    points[3, 1:] = torch.nan
    weights[5, 1] = 0
    weights[6] = 0
    args = (points, projections[None], weights, mode == "homogeneous")
    close = {"rtol": 1e-4, "atol": 1e-3} if dtype == torch.float32 else {"rtol": 1e-8, "atol": 1e-7}
    have = composite.triangulate(*args)
    torch.testing.assert_close(have, torch.ops.tritool.triangulate(*args), equal_nan=True, **close)
    grad = torch.full_like(have, torch.nan).where(have.isnan(), 1)
    flags = (True, True, True)
    got = composite.triangulate_backward(grad, *args, *flags)
    want = torch.ops.tritool.triangulate_backward(grad, *args, *flags)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=close["rtol"] * 10, atol=1e-4 * float(w.abs().max()))
    maps = 4 * torch.randn(3, 6, 9, dtype=dtype)
    maps[1, 2, 3] = torch.nan
    maps[2, :3] = -torch.inf
    for with_covariance in (False, True):
        have_all = composite.softmax_moments(maps, 2, 1.5, with_covariance)
        want_all = torch.ops.tritool.softmax_moments(maps, 2, 1.5, with_covariance)
        for h, w in list(zip(have_all, want_all, strict=True))[:3]:
            torch.testing.assert_close(h, w, equal_nan=True, rtol=1e-5, atol=1e-5)
    world = torch.randn(5, 3, dtype=dtype)
    world[2] = torch.nan
    near = projections[None] * torch.tensor([1.0, -1, 1, 1], dtype=dtype)[:, None, None]
    torch.testing.assert_close(
        composite.project(world, near), torch.ops.tritool.project(world, near), equal_nan=True,
        rtol=1e-4, atol=1e-2,
    )  # fmt: skip


def test_without_the_native_library_plain_torch_serves() -> None:
    """One warning, the same results and gradients, and `describe` says so."""
    code = """
import warnings, pathlib
import tritool._native as native
native._LIBRARY = pathlib.Path("there-is-none.so")
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import torch
    from tritool import ops
    P = torch.eye(3, 4).expand(3, 3, 4).clone()
    P[:, 0, 3] = torch.tensor([0.0, -1.0, -2.0])
    P[:, 2, 3] = 4.0
    point = torch.tensor([0.3, 0.2, 1.0], requires_grad=True)
    pixels = ops.project(point, P)
    back = ops.triangulate(pixels, P)
    assert torch.allclose(back, point, atol=1e-5), back
    (grad,) = torch.autograd.grad(back.sum(), point)
    assert torch.allclose(grad, torch.ones(3), atol=1e-4), grad
    maps = torch.zeros(2, 5, 7); maps[:, 3, 4] = 50
    assert torch.allclose(ops.soft_argmax2d(maps), torch.tensor([4.0, 3.0]))
ours = [w for w in caught if "tritool" in str(w.message)]
assert len(ours) == 1 and "plain PyTorch serves" in str(ours[0].message), caught
assert native.describe()["paths"]["cpu"] == "plain PyTorch"
assert "triangulate" in native.describe()["ops"]
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_meta_tensors_give_shapes() -> None:
    points, projections, _ = scene(5)
    assert ops.triangulate(points.to("meta"), projections.to("meta")).shape == (5, 3)
    assert ops.soft_argmax2d(torch.empty(2, 3, 8, 9, device="meta")).shape == (2, 3, 2)


def test_gradients_nobody_asked_for_are_not_made(device: str) -> None:
    points, projections, weights = (x.to(device) for x in scene(5))
    grad = torch.ones(5, 3, dtype=points.dtype, device=device)
    made = torch.ops.tritool.triangulate_backward(
        grad, points, projections[None], weights, True, True, False, False
    )
    assert [g.numel() for g in made] == [points.numel(), 0, 0]


P34 = torch.zeros(2, 3, 4)
X2 = torch.zeros(2, 2)


def cube(batch: int) -> VoxelGrid:
    return VoxelGrid.cube(torch.zeros(batch, 3), 1.0, 8)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ops.triangulate(torch.zeros(4, 3), P34), ValueError,
         "points must be [..., C, 2], got (4, 3)"),
        (lambda: ops.triangulate(X2, torch.zeros(3, 3, 4)), ValueError,
         "projections must be [..., C, 3, 4] with C = 2 as in points, got (3, 3, 4)"),
        (lambda: ops.triangulate(X2, P34, torch.ones(3)), ValueError,
         "weights must be [..., C] with C = 2 as in points, got (3,)"),
        (lambda: ops.triangulate(X2.expand(3, 2, 2), P34.expand(4, 2, 3, 4)), ValueError,
         "batch dimensions must broadcast, got (3,) of points, (4,) of projections"),
        (lambda: ops.triangulate(X2, P34, mode="dlt"), ValueError,
         "mode must be one of 'homogeneous', 'inhomogeneous', got 'dlt'"),
        (lambda: ops.triangulate(X2, P34, reweight=-1), ValueError,
         "reweight must be 0 or more rounds, got -1"),
        (lambda: ops.triangulate(X2.long(), P34), TypeError,
         "points must have a floating-point dtype, got torch.int64"),
        (lambda: ops.triangulate([[0, 0], [1, 1]], P34), TypeError,  # type: ignore[arg-type]
         "points must be a tensor, got list"),
        (lambda: ops.triangulate(X2, P34.to("meta")), ValueError,
         "projections must be on the device of points, cpu, got meta"),
        (lambda: ops.project(torch.zeros(4), P34), ValueError,
         "points must be [..., 3], got (4,)"),
        (lambda: ops.project(torch.zeros(3), torch.zeros(3, 4)), ValueError,
         "projections must be [..., C, 3, 4], got (3, 4)"),
        (lambda: ops.soft_argmax2d(torch.zeros(7)), ValueError,
         "heatmaps must be [..., H, W], got (7,)"),
        (lambda: ops.soft_argmax3d(torch.zeros(7, 8)), ValueError,
         "volumes must be [..., X, Y, Z], got (7, 8)"),
        (lambda: ops.soft_argmax2d(torch.zeros(7, 8), inverse_temperature=0), ValueError,
         "inverse_temperature must be a number from 1e-30 to 1e30, got 0"),
        (lambda: ops.soft_argmax2d(torch.zeros(7, 8), inverse_temperature=float("nan")), ValueError,
         "inverse_temperature must be a number from 1e-30 to 1e30, got nan"),
        (lambda: ops.soft_argmax2d(X2, inverse_temperature=torch.ones(())), TypeError,  # type: ignore[arg-type]
         "inverse_temperature must be a number, got a tensor; "
         "to learn it, multiply the input by it"),
        (lambda: ops.soft_argmax3d(torch.zeros(2, 7, 8, 9), grid=cube(2)),
         ValueError, "grid must have the size of the volumes, (7, 8, 9), got (8, 8, 8)"),
        (lambda: ops.soft_argmax3d(torch.zeros(2, 8, 8, 8), grid=cube(3)),
         ValueError, "grid must have batch 1 or that of the volumes, 2, got 3"),
    ],
)  # fmt: skip
def test_bad_arguments_in_one_line(
    call: Callable[[], Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == message


@pytest.mark.parametrize(
    "arguments",
    [
        (torch.zeros(4, 3), P34[None], None, True),
        (X2[None], torch.zeros(1, 3, 3, 4), None, True),
        (X2[None], P34, None, True),
        (X2[None], P34[None].double(), None, True),
        (X2[None], P34.expand(2, 2, 3, 4), None, True),
        (X2[None].half(), P34[None].half(), None, True),
    ],
)
def test_raw_ops_are_memory_safe(arguments: tuple[Any, ...]) -> None:
    """What the Python checks would have caught never reaches a kernel."""
    with pytest.raises(RuntimeError, match=r"triangulate|points|projections"):
        torch.ops.tritool.triangulate(*arguments)


@pytest.mark.parametrize("shape", [(0, 4, 5), (2, 0, 4, 5)])
def test_empty_batches(shape: tuple[int, ...], device: str) -> None:
    maps = torch.zeros(shape, device=device, requires_grad=True)
    result = ops.soft_argmax2d(maps)
    assert result.shape == (*shape[:-2], 2)
    (grad,) = torch.autograd.grad(result.sum(), maps)
    assert grad.shape == maps.shape
    projections = torch.zeros(3, 3, 4, device=device, requires_grad=True)
    points = torch.zeros(*shape[:-2], 3, 2, device=device, requires_grad=True)
    grads = torch.autograd.grad(ops.triangulate(points, projections).sum(), (points, projections))
    assert (grads[1] == 0).all()


@pytest.mark.parametrize("shape", [(3, 0, 5), (3, 4, 0)])
def test_maps_without_pixels_have_no_mean(shape: tuple[int, ...], device: str) -> None:
    moments = ops.softmax_moments2d(torch.zeros(shape, device=device))
    assert moments.mean.isnan().all()
    assert (moments.log_partition == -torch.inf).all()
