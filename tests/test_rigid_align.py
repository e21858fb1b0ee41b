# SPDX-License-Identifier: Apache-2.0
"""`ops.rigid_align` against the reference on any batch shape and dtype, on bad input, at scale.

The kernels' accuracy and laws are tested on every variant in test_kernels_rigid.py, derivatives and
transforms in test_contract.py.
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

DTYPES = [torch.float32, torch.float64]


def rotations(*batch: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    q = torch.linalg.qr(torch.randn(*batch, 3, 3, generator=generator, dtype=torch.float64))[0]
    return q * torch.linalg.det(q)[..., None, None]


def people(count: int, points: int = 17, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Sets in mm some metres from the origin, the same moved with 20 mm of noise, weights."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    source = randn(count, points, 3) * 300
    target = source @ rotations(count, seed=seed).mT + 1000 * randn(count, 1, 3)
    weights = 0.2 + torch.rand(count, points, generator=generator, dtype=torch.float64)
    return source + 2000 * randn(count, 1, 3), target + 20 * randn(count, points, 3), weights


@st.composite
def broadcast_shapes(draw: st.DrawFn) -> list[tuple[int, ...]]:
    """Three batch shapes that broadcast together, with sizes of 0 and 1 and missing dimensions."""
    batch = draw(st.lists(st.integers(0, 3), max_size=3))
    return [
        tuple(
            1 if draw(st.booleans()) else size for size in batch[draw(st.integers(0, len(batch))) :]
        )
        for _ in range(3)
    ]


@given(broadcast_shapes(), st.booleans(), st.booleans())
def test_on_any_batch(shapes: list[tuple[int, ...]], with_scale: bool, weighted: bool) -> None:
    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=(*shape, 6, 3)) for shape in shapes[:2]]
    if weighted:
        arrays.append(rng.uniform(0.1, 1, (*shapes[2], 6)))
    inputs = [torch.from_numpy(a).requires_grad_() for a in arrays]
    have = ops.rigid_align(*inputs, with_scale=with_scale)
    want = reference.rigid_align(*arrays, with_scale=with_scale)
    for h, w in zip(have, want, strict=True):
        assert h.shape == w.shape
        np.testing.assert_allclose(h.detach().numpy(), w, rtol=1e-9, atol=1e-9)
    grads = [rng.normal(size=w.shape) for w in want]
    got = torch.autograd.grad(list(have), inputs, [torch.from_numpy(np.asarray(g)) for g in grads])
    expected = reference.rigid_align_vjp(tuple(grads), *arrays, with_scale=with_scale)
    for g, e in zip(got, expected, strict=False):
        assert g.shape == e.shape
        np.testing.assert_allclose(g.numpy(), e, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_scale", [False, True])
def test_finds_an_exact_motion(with_scale: bool, dtype: torch.dtype, device: str) -> None:
    source = people(50)[0]
    rotation, translation = (
        rotations(50, seed=1),
        torch.linspace(-9, 9, 150).reshape(50, 3).double(),
    )
    scale = torch.linspace(0.1, 4, 50).double() if with_scale else torch.ones(50).double()
    moved = ops.RigidTransform(rotation, translation, scale).apply(source)
    inputs = [x.to(device, dtype) for x in (source, moved)]
    found = ops.rigid_align(*inputs, with_scale=with_scale)
    rounding = 1e-6 if dtype == torch.float32 else 1e-13
    torch.testing.assert_close(found.rotation.cpu().double(), rotation, rtol=0, atol=2 * rounding)
    torch.testing.assert_close(found.scale.cpu().double(), scale, rtol=2 * rounding, atol=0)
    # Rounding of the rotation, times the distance of several metres to the origin.
    error = (found.apply(inputs[0]).cpu().double() - moved).norm(dim=-1)
    assert error.max() < 2e4 * rounding


def test_is_the_least_sum_of_squares(device: str) -> None:
    """No rotation, translation or scale nearby does better."""
    source, target, weights = (x.to(device) for x in people(20))

    def cost(transform: ops.RigidTransform) -> Tensor:
        return (weights * (transform.apply(source) - target).square().sum(-1)).sum(-1)

    found = ops.rigid_align(source, target, weights, with_scale=True)
    rigid = ops.rigid_align(source, target, weights)
    assert (rigid.scale == 1).all()
    assert (cost(found) < cost(rigid)).all()
    generator = torch.Generator().manual_seed(0)
    for transform in (found, rigid):
        for _ in range(20):
            twist = 1e-3 * torch.randn(20, 3, 3, generator=generator, dtype=torch.float64)
            turn = torch.linalg.matrix_exp(twist - twist.mT).to(device)
            shift = torch.randn(20, 3, generator=generator, dtype=torch.float64).to(device)
            other = transform._replace(
                rotation=turn @ transform.rotation, translation=transform.translation + shift
            )
            assert (cost(other) > cost(transform)).all()
    for factor in (0.999, 1.001):
        assert (cost(found._replace(scale=found.scale * factor)) > cost(found)).all()


def test_is_never_a_reflection(device: str) -> None:
    source = people(30)[0].to(device)
    mirrored = source * torch.tensor([-1.0, 1, 1], dtype=torch.float64, device=device)
    rotation = ops.rigid_align(source, mirrored).rotation
    torch.testing.assert_close(torch.linalg.det(rotation).cpu(), torch.ones(30).double())


def test_apply_broadcasts(device: str) -> None:
    transform = ops.RigidTransform(
        rotations(4, 1).to(device),
        torch.ones(4, 1, 3, device=device).double(),
        torch.full((4, 1), 2.0, device=device).double(),
    )
    points = torch.randn(5, 7, 3, device=device).double()
    moved = transform.apply(points)
    assert moved.shape == (4, 5, 7, 3)
    want = 2 * points @ transform.rotation.mT + 1
    torch.testing.assert_close(moved, want)
    with torch.autocast(device, dtype=torch.bfloat16):
        torch.testing.assert_close(transform.apply(points), moved, rtol=0, atol=0)


def test_is_never_in_half_precision(device: str) -> None:
    source, target, weights = (x.to(device) for x in people(5))
    assert ops.rigid_align(source.half(), target.float()).rotation.dtype == torch.float32
    found = ops.rigid_align(source.float(), target, weights.bfloat16())
    assert all(x.dtype == torch.float64 for x in found)
    leaf = weights.half().requires_grad_()
    (grad,) = torch.autograd.grad(ops.rigid_align(source, target, leaf).translation.sum(), leaf)
    assert grad.dtype == torch.float16


def test_one_spoilt_set_leaves_its_neighbours_alone(device: str) -> None:
    source, target, weights = (x.to(device) for x in people(40))
    source[7, 2] = torch.nan  # absent: sixteen points are left
    target[11, 2:] = torch.nan  # two points are left
    weights[13, 0] = torch.nan
    weights[17] = 0
    source[19] = source[19, :1]  # in one place
    target[23, 5, 1] = torch.inf
    bad = [11, 13, 17, 19, 23]
    good = [n for n in range(40) if n not in bad]
    inputs = [x.requires_grad_() for x in (source, target, weights)]
    result = ops.rigid_align(*inputs, with_scale=True)
    for value in result:
        assert value.reshape(40, -1).isnan().all(-1).nonzero().flatten().tolist() == bad
        assert value[good].isfinite().all()
    alone = [x.detach()[good].requires_grad_() for x in inputs]
    wanted = ops.rigid_align(*alone, with_scale=True)
    # A loss that masks its terms by their validity sees no NaN from the sets it leaves out.
    loss = sum(x.nan_to_num().square().sum() for x in result)
    grads = torch.autograd.grad(loss, inputs)  # type: ignore[arg-type]
    expected = torch.autograd.grad(sum(x.square().sum() for x in wanted), alone)  # type: ignore[arg-type]
    for g, w in zip(grads, expected, strict=True):
        assert (g[bad] == 0).all()
        torch.testing.assert_close(g[good], w, rtol=1e-9, atol=1e-9)


def test_gradients_go_to_the_outputs_that_were_used(device: str) -> None:
    source, target, weights = (x.to(device).requires_grad_() for x in people(6))
    found = ops.rigid_align(source, target, weights, with_scale=True)
    grads = [torch.ones_like(x) for x in found]
    whole = torch.autograd.grad(list(found), (source, target, weights), grads, retain_graph=True)
    parts = [
        torch.autograd.grad(output, (source, target, weights), grad, retain_graph=True)
        for output, grad in zip(found, grads, strict=True)
    ]
    for n, total in enumerate(whole):
        torch.testing.assert_close(sum(part[n] for part in parts), total, rtol=1e-9, atol=1e-9)
    (only,) = torch.autograd.grad(found.rotation.sum(), target)
    torch.testing.assert_close(only, parts[0][1])
    made = torch.ops.tritool.rigid_align_backward(
        grads[0].detach(), None, None, source.detach(), target.detach(), weights.detach(),
        True, False, True, False,
    )  # fmt: skip
    assert [g.numel() for g in made] == [0, target.numel(), 0]
    constant = ops.rigid_align(source, target).scale
    assert torch.autograd.grad(constant.sum(), source, allow_unused=True) == (None,)


@pytest.mark.parametrize("with_scale", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_composite_agrees_with_the_kernels(with_scale: bool, dtype: torch.dtype) -> None:
    source, target, weights = (x.to(dtype) for x in people(30))
    source[3, 2:] = torch.nan
    weights[5, 1] = 0
    weights[6] = 0
    weights[7, 4] = -1
    target[8] = target[8, :1]
    target[9] = target[9, :1] + torch.linspace(0, 900, 17, dtype=dtype)[:, None]
    source[10, 4, 1] = torch.inf
    cross = 300 * torch.cat([torch.eye(3, dtype=dtype), -torch.eye(3, dtype=dtype)])
    source[11, :6], target[11, :6], weights[11, 6:] = cross, -cross, 0
    weights[11, :6] = 1
    rounding = 1e-6 if dtype == torch.float32 else 1e-14
    for given_weights in (weights, None):
        args = (source, target, given_weights, with_scale)
        have, want = composite.rigid_align(*args), torch.ops.tritool.rigid_align(*args)
        lost = {3, 6, 7, 8, 9, 10, 11} if given_weights is not None else {3, 8, 9, 10}
        found = want[0].isnan().flatten(1).any(-1).nonzero().flatten().tolist()
        assert lost <= set(found)
        for h, w, size in zip(have, want, (1, 5000, 1), strict=True):
            torch.testing.assert_close(h, w, equal_nan=True, rtol=0, atol=20 * size * rounding)
        grads = [torch.full_like(h, torch.nan).where(h.isnan(), 1) for h in have]
        for some in (grads, [None, grads[1], None]):
            got = composite.rigid_align_backward(*some, *args, True, True, True)
            wanted = torch.ops.tritool.rigid_align_backward(*some, *args, True, True, True)
            for g, w in zip(got, wanted, strict=True):
                assert g.shape == w.shape
                if g.numel():
                    bound = 1e3 * rounding * float(w.abs().max())
                    torch.testing.assert_close(g, w, rtol=0, atol=bound)


def test_a_hundred_thousand_sets_in_one_call(device: str) -> None:
    source, target, weights = people(1000)
    want = ops.rigid_align(source, target, weights)
    inputs = [
        x.float().repeat(100, *(1,) * (x.dim() - 1)).to(device).requires_grad_()
        for x in (source, target, weights)
    ]
    result = ops.rigid_align(*inputs)
    assert result.rotation.shape == (100_000, 3, 3)
    error = (result.rotation.detach()[-1000:].cpu().double() - want.rotation).abs().amax((-1, -2))
    assert error.max() < 1e-5  # the float32 rounding of the inputs, mostly
    grads = torch.autograd.grad(result.rotation.sum() + result.translation.sum(), inputs)
    for grad in grads:
        torch.testing.assert_close(grad[:1000], grad[-1000:], rtol=0, atol=0)


def test_training_goes_through_degenerate_batches(device: str) -> None:
    """Points come and go, whole sets vanish: parameters stay finite and the error falls."""
    torch.manual_seed(0)
    source, target, _ = (x.float().to(device) for x in people(32, points=6))
    offsets = torch.zeros_like(source, requires_grad=True)
    optimizer = torch.optim.Adam([offsets], lr=2.0)
    losses = []
    for _ in range(60):
        weights = (torch.rand(32, 6, device=device) > 0.4).float()
        moved = ops.rigid_align(source + offsets, target, weights).apply(source + offsets)
        found = ~moved.isnan().any(-1).any(-1)
        loss = torch.where(found[:, None, None], moved - target, 0).norm(dim=-1).sum() / found.sum()
        optimizer.zero_grad()
        loss.backward()
        assert offsets.grad is not None
        assert offsets.grad.isfinite().all()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert np.mean(losses[-10:]) < 0.5 * np.mean(losses[:10])


def test_meta_tensors_and_empty_batches() -> None:
    meta = ops.rigid_align(torch.empty(4, 5, 3, device="meta"), torch.empty(5, 3, device="meta"))
    assert [tuple(x.shape) for x in meta] == [(4, 3, 3), (4, 3), (4,)]
    for shape in ((0, 5, 3), (2, 0, 5, 3), (3, 0, 3)):
        points = torch.zeros(shape, requires_grad=True)
        found = ops.rigid_align(points, points)
        assert found.rotation.shape == (*shape[:-2], 3, 3)
        assert found.rotation.isnan().all()
        (grad,) = torch.autograd.grad(found.translation.sum(), points)
        assert grad.shape == shape


X5 = torch.zeros(5, 3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ops.rigid_align(torch.zeros(5, 2), X5), ValueError,
         "source must be [..., N, 3], got (5, 2)"),
        (lambda: ops.rigid_align(torch.zeros(3), X5), ValueError,
         "source must be [..., N, 3], got (3,)"),
        (lambda: ops.rigid_align(X5, torch.zeros(4, 3)), ValueError,
         "target must be [..., N, 3] with N = 5 as in source, got (4, 3)"),
        (lambda: ops.rigid_align(X5, X5, torch.ones(1)), ValueError,
         "weights must be [..., N] with N = 5 as in source, got (1,)"),
        (lambda: ops.rigid_align(X5.expand(3, 5, 3), X5.expand(4, 5, 3)), ValueError,
         "batch dimensions must broadcast, got (3,) of source, (4,) of target"),
        (lambda: ops.rigid_align(X5.long(), X5), TypeError,
         "source must have a floating-point dtype, got torch.int64"),
        (lambda: ops.rigid_align(X5, X5.numpy()), TypeError,  # type: ignore[arg-type]
         "target must be a tensor, got ndarray"),
        (lambda: ops.rigid_align(X5, X5.to("meta")), ValueError,
         "target must be on the device of source, cpu, got meta"),
        (lambda: ops.rigid_align(X5, X5).apply(torch.zeros(3)), ValueError,
         "points must be [..., M, 3], got (3,)"),
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
        (X5[None], torch.zeros(1, 4, 3), None, True),
        (X5[None], X5, None, True),
        (X5[None].expand(2, 5, 3), X5[None], None, True),
        (X5[None], X5[None], torch.zeros(1, 4), True),
        (X5[None], X5[None].double(), None, True),
        (X5[None].half(), X5[None].half(), None, True),
    ],
)
def test_raw_op_is_memory_safe(arguments: tuple[Any, ...]) -> None:
    """What the Python checks would have caught never reaches a kernel."""
    with pytest.raises(RuntimeError, match=r"rigid_align|source|target|weights"):
        torch.ops.tritool.rigid_align(*arguments)
