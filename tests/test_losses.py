# SPDX-License-Identifier: Apache-2.0
"""`tritool.losses`: values, laws, gradients, and that a missing joint does no harm."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import log_softmax
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from tritool import VoxelGrid, losses, ops

Loss = Callable[..., Tensor]

OF_JOINTS: dict[str, Loss] = {
    "mse": losses.mse,
    "l1": losses.l1,
    "l2": losses.l2,
    "soft_mse": losses.soft_mse,
    "soft_mse per joint": lambda *a, **k: losses.soft_mse(*a, per="joint", **k),
}
of_joints = pytest.mark.parametrize("loss", OF_JOINTS.values(), ids=OF_JOINTS.keys())
seeds = st.integers(0, 2**31)


def poses(*size: int, seed: int = 0, scale: float = 30.0) -> tuple[Tensor, Tensor]:
    """Prediction and target [*size, 3], centimetres; some errors on each side of 20 cm."""
    generator = torch.Generator().manual_seed(seed)
    target = 100 * torch.randn(*size, 3, generator=generator, dtype=torch.float64)
    return target + scale * torch.randn(*size, 3, generator=generator).double(), target


def volumes_and_truth(
    batch: int = 2, joints: int = 3, seed: int = 0
) -> tuple[Tensor, VoxelGrid, Tensor]:
    """Logits in a turned box of unequal sides and truths in it."""
    generator = torch.Generator().manual_seed(seed)
    size = (4, 5, 6)
    logits = torch.randn(batch, joints, *size, generator=generator, dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(batch, 3, 3, generator=generator).double())[0]
    center = 50 * torch.randn(batch, 3, generator=generator).double()
    grid = VoxelGrid.cube(center, (200.0, 250.0, 100.0), size, turn)
    inside = torch.rand(batch, joints, 3, generator=generator).double()
    truth = grid.to_world(inside * torch.tensor(size) - 0.5)
    return logits, grid, truth


# ---- Values ----


def test_closed_forms() -> None:
    target = torch.zeros(1, 2, 3)
    prediction = torch.tensor([[[3.0, 4.0, 0.0], [0.0, 0.0, -40.0]]])
    assert losses.mse(prediction, target) == pytest.approx((9 + 16 + 1600) / 6)
    assert losses.l1(prediction, target) == pytest.approx((3 + 4 + 40) / 6)
    assert losses.l2(prediction, target) == pytest.approx((5 + 40) / 2)
    limited = 1600**0.1 * 400**0.9
    assert losses.soft_mse(prediction, target) == pytest.approx((9 + 16 + limited) / 6)
    per_joint = losses.soft_mse(prediction, target, per="joint")
    assert per_joint == pytest.approx((25 + limited) / 2)


def test_threshold_is_for_each_coordinate_or_for_the_joint() -> None:
    # 15 cm along each axis: below 20 cm each, 26 cm in all.
    prediction, target = torch.full((1, 3), 15.0), torch.zeros(1, 3)
    assert losses.soft_mse(prediction, target) == pytest.approx(225)
    assert losses.soft_mse(prediction, target, per="joint") == pytest.approx(675**0.1 * 400**0.9)


@given(seeds)
def test_against_numpy(seed: int) -> None:
    rng = np.random.default_rng(seed)
    prediction, target = poses(4, 5, seed=seed)
    valid = rng.random((4, 5)) < 0.7
    p, t = prediction.numpy()[valid], target.numpy()[valid]
    square = (p - t) ** 2
    # The official code's: sum over the valid, over three times their number.
    soft = np.where(square < 400, square, square**0.1 * 400**0.9).sum() / max(square.size, 1)
    mask = torch.from_numpy(valid)
    assert losses.soft_mse(prediction, target, valid=mask).item() == pytest.approx(soft)
    if valid.any():
        distance = np.linalg.norm(p - t, axis=-1)
        assert losses.l2(prediction, target, valid=mask).item() == pytest.approx(distance.mean())
        assert losses.l1(prediction, target, valid=mask).item() == pytest.approx(abs(p - t).mean())
        assert losses.mse(prediction, target, valid=mask).item() == pytest.approx(square.mean())


@pytest.mark.parametrize("per", ["coordinate", "joint"])
@given(threshold=st.floats(1e-3, 1e6))
def test_soft_mse_at_the_threshold(per: Any, threshold: float) -> None:
    target = torch.zeros(1, 3, dtype=torch.float64)

    def value_and_slope(square: float) -> tuple[float, float]:
        """Of one coordinate's square; the two others are 0."""
        error = torch.tensor([[math.sqrt(square), 0, 0]], dtype=torch.float64, requires_grad=True)
        loss = losses.soft_mse(error, target, threshold=threshold, per=per)
        (gradient,) = torch.autograd.grad(loss, error)
        assert gradient.isfinite().all()
        count = 3 if per == "coordinate" else 1
        return count * loss.item(), count * gradient[0, 0].item() / (2 * math.sqrt(square))

    below, slope_below = value_and_slope(threshold * (1 - 1e-9))
    above, slope_above = value_and_slope(threshold * (1 + 1e-9))
    assert below == pytest.approx(threshold, rel=1e-8)
    assert above == pytest.approx(threshold, rel=1e-8)
    assert slope_below == pytest.approx(1)
    assert slope_above == pytest.approx(0.1)


def test_soft_mse_limits_outliers() -> None:
    target = torch.zeros(1, 3)
    near, far = (losses.soft_mse(torch.full((1, 3), d), target) for d in (20.0, 20_000.0))
    assert far / near == pytest.approx(1e6**0.1, rel=1e-5)


@given(seeds, st.floats(1e-2, 1e2))
def test_law_units(seed: int, unit: float) -> None:
    """In another unit the losses are the same loss: how the default serves centimetres only."""
    prediction, target = poses(3, 4, seed=seed)
    other = prediction * unit, target * unit
    close = {"rtol": 1e-9, "atol": 0.0}
    for per in ("coordinate", "joint"):
        expected = unit**2 * losses.soft_mse(prediction, target, per=per)
        got = losses.soft_mse(*other, threshold=400 * unit**2, per=per)
        torch.testing.assert_close(got, expected, **close)
    for loss, power in ((losses.mse, 2), (losses.l1, 1), (losses.l2, 1)):
        torch.testing.assert_close(loss(*other), unit**power * loss(prediction, target), **close)


@of_joints
@given(seed=seeds)
def test_law_moving_both_and_order_change_nothing(loss: Loss, seed: int) -> None:
    prediction, target = poses(3, 4, seed=seed)
    expected = loss(prediction, target)
    shift = torch.tensor([1.0, -200, 30], dtype=torch.float64)
    torch.testing.assert_close(loss(prediction + shift, target + shift), expected)
    torch.testing.assert_close(loss(target, prediction), expected)
    torch.testing.assert_close(loss(prediction.flip(0, 1), target.flip(0, 1)), expected)
    assert loss(target, target) == 0


@of_joints
@given(seed=seeds)
def test_law_a_whole_weight_is_that_many_copies(loss: Loss, seed: int) -> None:
    prediction, target = poses(4, seed=seed)
    counts = torch.tensor([0, 3, 1, 2])
    copies = (x.repeat_interleave(counts, 0) for x in (prediction, target))
    torch.testing.assert_close(loss(prediction, target, valid=counts), loss(*copies))
    torch.testing.assert_close(
        loss(prediction, target, valid=counts), loss(prediction, target, valid=counts / 7.0)
    )


@of_joints
def test_masks_broadcast(loss: Loss) -> None:
    prediction, target = poses(2, 3, 4)
    joints = torch.tensor([True, False, True, True])
    expected = loss(prediction[..., joints, :], target[..., joints, :])
    torch.testing.assert_close(loss(prediction, target, valid=joints), expected)
    torch.testing.assert_close(
        loss(prediction, target, valid=joints.expand(2, 3, 4).double()), expected
    )


def test_two_coordinates() -> None:
    prediction, target = torch.tensor([[3.0, 4.0]]), torch.zeros(1, 2)
    assert losses.l2(prediction, target) == 5
    assert losses.mse(prediction, target) == 12.5


# ---- Missing joints ----


@of_joints
@pytest.mark.parametrize("hole", [torch.nan, torch.inf])
def test_what_does_not_count_leaves_no_trace(loss: Loss, hole: float) -> None:
    prediction, target = poses(3, 4)
    valid = torch.ones(3, 4, dtype=torch.bool)
    valid[0, 1] = valid[2, 3] = valid[1, 0] = False
    spoilt_prediction, spoilt_target = prediction.clone(), target.clone()
    spoilt_prediction[0, 1, 2] = spoilt_prediction[2, 3] = hole
    spoilt_target[1, 0] = spoilt_target[2, 3, 0] = hole
    # NaN needs no mask, everything else does.
    mask = None if math.isnan(hole) else valid
    spoilt_prediction.requires_grad_()
    spoilt_target.requires_grad_()
    got = loss(spoilt_prediction, spoilt_target, valid=mask)
    got.backward()
    clean = prediction[valid].requires_grad_()
    expected = loss(clean, target[valid])
    expected.backward()
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(spoilt_prediction.grad[valid], clean.grad)
    torch.testing.assert_close(spoilt_target.grad[valid], -clean.grad)
    for gradient in (spoilt_prediction.grad, spoilt_target.grad):
        assert torch.equal(gradient[~valid], torch.zeros(3, 3, dtype=torch.float64))


@of_joints
@pytest.mark.parametrize("why", ["masked", "nan", "no joints", "no poses"])
def test_nothing_to_learn_from(loss: Loss, why: str) -> None:
    size = {"no joints": (2, 0), "no poses": (0, 4)}.get(why, (2, 4))
    prediction = torch.randn(*size, 3, requires_grad=True)
    target = torch.full((*size, 3), torch.nan if why == "nan" else 1.0)
    valid = torch.zeros(size, dtype=torch.bool) if why == "masked" else None
    got = loss(prediction, target, valid=valid)
    assert got == 0
    got.backward()
    assert torch.equal(prediction.grad, torch.zeros_like(prediction))


@of_joints
@pytest.mark.parametrize("weight", [-1.0, torch.nan, torch.inf])
def test_a_wrong_weight_is_told(loss: Loss, weight: float) -> None:
    prediction, target = (x.requires_grad_() for x in poses(4))
    weights = torch.tensor([1.0, weight, 2.0, 1.0], requires_grad=True)
    got = loss(prediction, target, valid=weights)
    assert got.isnan()
    got.backward()
    for each in (prediction, target, weights):
        assert torch.equal(each.grad, torch.zeros_like(each))
    # The weight of a joint that is not there says nothing.
    hidden = target.detach().clone()
    hidden[1] = torch.nan
    assert loss(prediction, hidden, valid=weights).isfinite()


@of_joints
def test_equal_points_have_a_gradient(loss: Loss) -> None:
    _, target = poses(4)
    prediction = target.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(prediction, target), prediction, create_graph=True)
    assert torch.equal(gradient, torch.zeros_like(gradient))
    (second,) = torch.autograd.grad(gradient.sum(), prediction, allow_unused=True)
    assert second is None or second.isfinite().all()


# ---- Derivatives ----


@of_joints
def test_derivatives(loss: Loss) -> None:
    prediction, target = (x.requires_grad_() for x in poses(2, 3))
    weights = (0.5 + torch.rand(2, 3, dtype=torch.float64)).requires_grad_()

    def call(p: Tensor, t: Tensor, w: Tensor) -> Tensor:
        return loss(p, t, valid=w)

    assert gradcheck(call, (prediction, target, weights))
    assert gradgradcheck(call, (prediction, target, weights))


def test_derivatives_of_volumes() -> None:
    logits, grid, truth = volumes_and_truth()
    logits.requires_grad_()
    weights = (0.5 + torch.rand(2, 3, dtype=torch.float64)).requires_grad_()

    def nll(v: Tensor, w: Tensor) -> Tensor:
        return losses.volumetric_nll(v, grid, truth, inverse_temperature=1.5, valid=w)

    def both(v: Tensor, w: Tensor) -> Tensor:
        return losses.volumetric_loss(v, grid, truth, beta=0.3, valid=w)

    for call in (nll, both):
        assert gradcheck(call, (logits, weights))
    assert gradgradcheck(nll, (logits, weights))


# ---- Volumes ----


def explicit_nll(logits: Tensor, grid: VoxelGrid, truth: Tensor, alpha: float) -> np.ndarray:
    """[B, J] by the nearest of all voxel centres and the log-softmax over all voxels."""
    centers = grid.points().flatten(1, 3).expand(logits.shape[0], -1, -1)
    nearest = torch.cdist(grid_axes(grid, truth), grid_axes(grid, centers)).argmin(-1).numpy()
    log_p = log_softmax(alpha * logits.detach().flatten(2).numpy(), axis=-1)
    return -np.take_along_axis(log_p, nearest[..., None], -1)[..., 0]


def grid_axes(grid: VoxelGrid, points: Tensor) -> Tensor:
    """Points in units of the voxels' sides, by a linear solve."""
    axes = grid.axes.expand(points.shape[0], 3, 3)
    return torch.linalg.solve(axes.mT, points.mT).mT


@given(seeds, st.sampled_from([0.3, 1.0, 20.0]))
def test_nll_against_log_softmax(seed: int, alpha: float) -> None:
    logits, grid, truth = volumes_and_truth(seed=seed)
    each = explicit_nll(logits, grid, truth, alpha)
    got = losses.volumetric_nll(logits, grid, truth, inverse_temperature=alpha)
    assert got.item() == pytest.approx(each.mean(), rel=1e-10)
    weights = torch.tensor([[1.0, 0, 2], [0.5, 3, 0]])
    got = losses.volumetric_nll(logits, grid, truth, inverse_temperature=alpha, valid=weights)
    assert got.item() == pytest.approx(np.average(each, weights=weights), rel=1e-10)


def test_nll_gradient_is_softmax_minus_the_true_voxel() -> None:
    logits, grid, truth = volumes_and_truth(batch=1, joints=1)
    logits.requires_grad_()
    losses.volumetric_nll(logits, grid, truth, inverse_temperature=2.0).backward()
    expected = 2 * (2 * logits.detach()).flatten().softmax(0).reshape(logits.shape)
    expected[(0, 0, *grid.to_index(truth).round().long()[0, 0])] -= 2
    torch.testing.assert_close(logits.grad, expected)


def test_nll_stays_exact_where_the_probability_underflows() -> None:
    logits = torch.zeros(1, 1, 4, 4, 4)
    logits[..., 0, 0, 0] = 1000.0
    grid = VoxelGrid(torch.zeros(1, 3), torch.eye(3)[None], (4, 4, 4))
    truth = torch.full((1, 1, 3), 3.0)
    assert losses.volumetric_nll(logits, grid, truth) == 1000
    logits[..., 3, 3, 3] = -torch.inf
    logits.requires_grad_()
    masked = losses.volumetric_nll(logits, grid, truth)
    assert masked == torch.inf
    masked.backward()
    assert logits.grad.isfinite().all()
    assert losses.volumetric_loss(logits, grid, truth, beta=0).isfinite()


def test_the_voxel_that_holds_a_point() -> None:
    size = (2, 3, 4)
    logits = torch.arange(24.0).reshape(1, 1, *size)
    grid = VoxelGrid(torch.tensor([[10.0, 20, 30]]), 2 * torch.eye(3)[None], size)
    partition = logits.flatten().logsumexp(0).item()

    def at(*index: float) -> float:
        truth = grid.to_world(torch.tensor([[index]], dtype=torch.float32))
        return round(partition - losses.volumetric_nll(logits, grid, truth).item(), 3)

    assert at(0, 0, 0) == 0
    assert at(1, 2, 3) == 23
    assert at(1, 0.49, 2.51) == 12 + 3
    # On the face between two voxels, the upper one.
    assert at(0, 0.5, 0) == 4
    assert at(0, 1.5, 0) == 8
    # Half a voxel beyond the outermost centres is still inside, the lower face included.
    assert at(-0.5, -0.49, 3.49) == 3
    for outside in ((-0.51, 0, 0), (1.5, 0, 0), (0, 2.5, 0), (0, 0, 4), (0, 0, 1e30)):
        assert at(*outside) == round(partition, 3)  # the loss is 0


def test_joints_that_do_not_count_in_volumes() -> None:
    logits, grid, truth = volumes_and_truth(batch=2, joints=4)
    expected = explicit_nll(logits, grid, truth, 1.0)
    truth[0, 0] = torch.nan
    truth[0, 1, 2] += 1e4
    truth[1, 0] = torch.inf
    logits[1, 2, 0, 0, 0] = torch.nan
    logits[1, 3] = -torch.inf
    logits[1, 1, 0, 0, 0] = torch.inf
    logits.requires_grad_()
    counts = torch.zeros(2, 4, dtype=torch.bool)
    counts[0, 2:] = True
    got = losses.volumetric_nll(logits, grid, truth)
    assert got.item() == pytest.approx(expected[counts.numpy()].mean())
    got.backward()
    assert (logits.grad[counts] != 0).all()
    assert torch.equal(logits.grad[~counts], torch.zeros_like(logits.grad[~counts]))
    # The absolute error needs no voxel: the joint outside of the grid counts in it.
    logits.grad = None
    truth[1, 0] = torch.nan
    losses.volumetric_loss(logits, grid, truth).backward()
    counts[0, 1] = True
    assert (logits.grad[counts] != 0).any(-1).all()
    assert torch.equal(logits.grad[~counts], torch.zeros_like(logits.grad[~counts]))


def test_no_volume_counts() -> None:
    logits, grid, truth = volumes_and_truth()
    logits.requires_grad_()
    for loss in (losses.volumetric_nll, losses.volumetric_loss):
        for got in (
            loss(logits, grid, torch.full_like(truth, torch.nan)),
            loss(logits, grid, truth, valid=torch.zeros(3, dtype=torch.bool)),
        ):
            assert got == 0
            (gradient,) = torch.autograd.grad(got, logits)
            assert torch.equal(gradient, torch.zeros_like(gradient))


@given(seeds, st.floats(0, 10))
def test_volumetric_loss_is_the_sum_of_its_terms(seed: int, beta: float) -> None:
    logits, grid, truth = volumes_and_truth(seed=seed)
    valid = torch.tensor([1.0, 0, 3])
    options = {"inverse_temperature": 1.5}
    prediction = ops.soft_argmax3d(logits, grid=grid, **options)
    expected = losses.l1(prediction, truth, valid=valid)
    expected = expected + beta * losses.volumetric_nll(logits, grid, truth, valid=valid, **options)
    got = losses.volumetric_loss(logits, grid, truth, beta=beta, valid=valid, **options)
    torch.testing.assert_close(got, expected)


def test_volumes_of_any_batch_and_layout() -> None:
    logits, grid, truth = volumes_and_truth(batch=1, joints=6)
    expected = losses.volumetric_loss(logits, grid, truth)
    twice = logits.reshape(1, 2, 3, *grid.size), grid, truth.reshape(1, 2, 3, 3)
    single = logits[0], grid, truth[0]
    last = logits.contiguous(memory_format=torch.channels_last_3d), grid, truth
    turned = logits.mT.contiguous().mT, grid, truth
    for arguments in (twice, single, last, turned):
        torch.testing.assert_close(losses.volumetric_loss(*arguments), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_volumes_of_lower_precision(dtype: torch.dtype) -> None:
    logits, grid, truth = volumes_and_truth()
    logits, truth, grid = logits.to(dtype).requires_grad_(), truth.float(), grid.to(torch.float32)
    got = losses.volumetric_nll(logits, grid, truth)
    assert got.dtype == torch.float32
    expected = explicit_nll(logits.double(), grid.to(torch.float64), truth.double(), 1.0).mean()
    assert got.item() == pytest.approx(expected, rel=1e-5)
    got.backward()
    assert logits.grad.dtype == dtype


# ---- Under torch's transforms ----


CALLS: dict[str, Callable[[Tensor, Tensor, Tensor, VoxelGrid, Tensor], Tensor]] = {
    **{
        name: lambda p, v, w, g, t, loss=loss: loss(p, t, valid=w)
        for name, loss in OF_JOINTS.items()
    },
    "volumetric_nll": lambda p, v, w, g, t: losses.volumetric_nll(v, g, t, valid=w),
    "volumetric_loss": lambda p, v, w, g, t: losses.volumetric_loss(v, g, t, valid=w),
}


def call_arguments(dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    logits, grid, truth = volumes_and_truth()
    prediction = (truth + 3).to(dtype).requires_grad_()
    weights = torch.tensor([[1.0, 0, 2], [0.5, 3, 1]])
    truth[1, 1] = torch.nan
    return (
        prediction, logits.to(dtype).requires_grad_(), weights,
        grid.to(torch.float32), truth.to(torch.float32),
    )  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_compiles_in_one_graph(name: str) -> None:
    torch._dynamo.reset()
    arguments = call_arguments()
    leaf = arguments[1 if name.startswith("vol") else 0]
    compiled = torch.compile(CALLS[name], fullgraph=True, backend="aot_eager")
    got, expected = compiled(*arguments), CALLS[name](*arguments)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(torch.autograd.grad(got, leaf), torch.autograd.grad(expected, leaf))


@pytest.mark.parametrize("name", CALLS)
def test_autocast_changes_nothing(name: str) -> None:
    arguments = call_arguments()
    leaf = arguments[1 if name.startswith("vol") else 0]
    expected = CALLS[name](*arguments)
    with torch.autocast("cpu", torch.bfloat16):
        got = CALLS[name](*arguments)
    assert got.dtype == torch.float32
    assert torch.equal(got, expected)
    assert torch.equal(*(torch.autograd.grad(x, leaf)[0] for x in (got, expected)))
    half = CALLS[name](*call_arguments(torch.bfloat16))
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, expected, rtol=0.05, atol=0)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("name", CALLS)
def test_does_not_wait_for_the_device(name: str) -> None:
    arguments = [x.detach().cuda() for x in call_arguments() if isinstance(x, Tensor)]
    prediction, logits, weights, truth = arguments
    grid = call_arguments()[3].to("cuda")
    prediction.requires_grad_()
    logits.requires_grad_()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        CALLS[name](prediction, logits, weights, grid, truth).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ---- Bad input ----


@of_joints
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"prediction": torch.zeros(3)}, ValueError, r"prediction must be \[..., J, D\], got"),
        ({"target": torch.zeros(4, 3)}, ValueError, r"target must have the shape of prediction"),
        ({"target": [0.0]}, TypeError, r"target must be a tensor, got list"),
        ({"prediction": torch.zeros(2, 4, 3).long()}, TypeError, r"floating-point dtype"),
        ({"valid": torch.ones(2, 3)}, ValueError, r"valid must be .* to \(2, 4\), got \(2, 3\)"),
        ({"valid": torch.ones(1, 2, 4)}, ValueError, r"valid must be .*got \(1, 2, 4\)"),
        ({"valid": True}, TypeError, r"valid must be a tensor, got bool"),
        ({"valid": torch.ones(4).cfloat()}, TypeError, r"valid must be boolean or real"),
        ({"valid": torch.ones(4, device="meta")}, ValueError, r"valid must be on the device"),
    ],
)
def test_bad_input_is_refused(
    loss: Loss, change: dict[str, Any], error: type[Exception], message: str
) -> None:
    arguments = {"prediction": torch.zeros(2, 4, 3), "target": torch.zeros(2, 4, 3), **change}
    with pytest.raises(error, match=message):
        loss(arguments["prediction"], arguments["target"], valid=arguments.get("valid"))


@pytest.mark.parametrize("threshold", [0.0, -1.0, math.nan, math.inf])
def test_bad_threshold_is_refused(threshold: float) -> None:
    with pytest.raises(ValueError, match="threshold must be a finite number above 0"):
        losses.soft_mse(torch.zeros(1, 3), torch.zeros(1, 3), threshold=threshold)
    with pytest.raises(ValueError, match="per must be 'coordinate' or 'joint', got 'pose'"):
        losses.soft_mse(torch.zeros(1, 3), torch.zeros(1, 3), per="pose")  # type: ignore[arg-type]


@pytest.mark.parametrize("loss", [losses.volumetric_nll, losses.volumetric_loss])
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"volumes": torch.zeros(2, 3, 4, 5, 7)}, ValueError, r"of the size of grid, \(4, 5, 6\)"),
        ({"volumes": torch.zeros(4, 5, 6)}, ValueError, r"volumes must be \[..., J, X, Y, Z\]"),
        ({"target": torch.zeros(1, 3, 3)}, ValueError, r"to fit volumes, \(2, 3, 3\), got"),
        ({"volumes": torch.zeros(5, 3, 4, 5, 6), "target": torch.zeros(5, 3, 3)},
         ValueError, "grid must have batch 1 or that of volumes, 5, got 2"),
        ({"grid": torch.zeros(2, 3)}, TypeError, "grid must be a VoxelGrid, got Tensor"),
        ({"inverse_temperature": 0.0}, ValueError, "inverse_temperature must be a number"),
    ],
)  # fmt: skip
def test_bad_volumes_are_refused(
    loss: Loss, change: dict[str, Any], error: type[Exception], message: str
) -> None:
    logits, grid, truth = volumes_and_truth()
    arguments = {"volumes": logits, "grid": grid, "target": truth, **change}
    with pytest.raises(error, match=message):
        loss(**arguments)


@pytest.mark.parametrize("beta", [-0.1, math.nan, math.inf])
def test_bad_beta_is_refused(beta: float) -> None:
    with pytest.raises(ValueError, match="beta must be a finite number of at least 0"):
        losses.volumetric_loss(*volumes_and_truth(), beta=beta)
