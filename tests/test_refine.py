# SPDX-License-Identifier: Apache-2.0
"""`ops.refine`: the reference, SciPy, the cost, derivatives of the minimum.

Degenerate views, batches, dtypes, compilers and bad input are in test_robust_triangulate.py.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import rigs
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import least_squares
from test_robust_triangulate import cost_at, leaves, scene, scenes
from torch import Tensor

from tritool import ops, reference
from tritool.ops import robust

LOSSES = ("huber", "cauchy", "squared")


@settings(max_examples=15)
@given(scenes(), st.sampled_from(LOSSES), st.booleans())
def test_refine_agrees_with_the_reference(
    made: tuple[rigs.Rig, tuple[Tensor, ...]], loss: Any, weighted: bool
) -> None:
    points, projections, weights, truth, _ = made[1]
    weights = weights if weighted else None
    start = truth + 20
    have = ops.refine(start, points, projections, weights, loss=loss, scale=5.0, iterations=40)
    want = reference.refine(
        start.numpy(),
        points.numpy(),
        projections.numpy(),
        None if weights is None else weights.numpy(),
        loss=loss,
        scale=5.0,
    )
    gradient = slope_at(have, points, projections, weights, loss, 5.0)
    np.testing.assert_allclose(gradient.numpy(), 0, atol=1e-6)
    if loss == "cauchy":  # many minima: any will do that is one
        return
    np.testing.assert_allclose(have.numpy(), want, rtol=1e-6, atol=1e-3)


def slope_at(at: Tensor, *args: Any) -> Tensor:
    leaf = at.clone().requires_grad_()
    (slope,) = torch.autograd.grad(cost_at(leaf, *args).sum(), leaf)
    return slope


@pytest.mark.parametrize("loss", LOSSES)
def test_refine_agrees_with_scipy(loss: str) -> None:
    points, projections, _, truth, _ = scene(rigs.pan31()[:7], 12, wrong=1, noise=2.0, seed=3)
    have = ops.refine(truth + 15, points, projections, loss=loss, scale=4.0, iterations=20)
    p = projections.numpy()
    for n in range(12):
        found = least_squares(
            lambda y, n=n: np.linalg.norm(reference.project(y, p) - points[n].numpy(), axis=-1),
            truth[n].numpy() + 15,
            loss={"squared": "linear"}.get(loss, loss),
            f_scale=4.0,
            xtol=1e-14,
            ftol=1e-14,
            gtol=1e-14,
        )
        # SciPy sees norms, whose derivative it takes by differences: its tolerance, not ours.
        np.testing.assert_allclose(have[n].numpy(), found.x, atol=2e-2)
        ours = cost_at(have[n], points[n], projections, None, loss, 4.0)
        assert ours <= found.cost * (1 + 1e-9)


@pytest.mark.parametrize("loss", LOSSES)
def test_the_rise_of_a_step_is_the_difference_of_costs(loss: str) -> None:
    """Within the scale, beyond it, and across it both ways."""
    points, projections, weights, truth, _ = scene(rigs.ring(5), 200, wrong=1, noise=3.0)
    generator = torch.Generator().manual_seed(0)
    step = 40 * torch.randn(truth.shape, generator=generator, dtype=truth.dtype)
    arguments = (points, projections, weights, loss, 5.0)
    before, after = (robust._look(at, *arguments) for at in (truth, truth + step))
    rise = robust._rise(before, after, step, weights, loss, 5.0)
    want = cost_at(truth + step, *arguments) - cost_at(truth, *arguments)
    torch.testing.assert_close(rise, want, rtol=1e-9, atol=1e-9)
    inside = [view.error.norm(dim=-1) < 5 for view in (before, after)]
    assert all((inside[0] == i).logical_and(inside[1] == j).any() for i in (0, 1) for j in (0, 1))


@settings(max_examples=10)
@given(
    scenes(noise=3.0), st.sampled_from(LOSSES), st.sampled_from([1.0, 100.0, 2000.0]),
    st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_the_cost_never_rises(
    made: tuple[rigs.Rig, tuple[Tensor, ...]], loss: str, distance: float, seed: int
) -> None:
    points, projections, weights, truth, _ = made[1]
    generator = torch.Generator().manual_seed(seed)
    start = truth + distance * torch.randn(truth.shape, generator=generator, dtype=truth.dtype)
    start = torch.where(
        ops.project(start, projections).isnan().flatten(1).any(-1)[:, None], truth, start
    )
    arguments = (points, projections, weights, loss, 2.0)
    costs = [cost_at(start, *arguments)]
    for iterations in range(1, 8):
        at = ops.refine(
            start, points, projections, weights, loss=loss, scale=2.0, iterations=iterations
        )
        costs.append(cost_at(at, *arguments))
    for before, after in itertools.pairwise(costs):
        assert (after <= before * (1 + 1e-9)).all()  # to rounding of pixels
    assert (costs[-1] < costs[0]).all()


def test_a_start_behind_a_camera_comes_back() -> None:
    points, projections, weights, truth, _ = scene(rigs.ring(4), 3)
    start = truth.clone()
    start[1] = torch.from_numpy(rigs.ring(4).centers[2] * 2)
    start[2, 0] = torch.inf
    inputs = [x.requires_grad_() for x in (start, points, projections, weights)]
    refined = ops.refine(*inputs, scale=2.0)
    assert torch.equal(refined[1], start[1])
    assert refined[2].isnan().all()
    grads = torch.autograd.grad(refined.sum(), inputs)
    assert grads[0].tolist() == [[0, 0, 0], [1, 1, 1], [0, 0, 0]]
    assert grads[1][1:].eq(0).all()
    assert grads[3][1:].eq(0).all()
    assert (grads[1][0] != 0).all()


@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_of_the_minimum(loss: str, device: str) -> None:
    points, projections, weights, truth, _ = (
        x.to(device) for x in scene(rigs.ring(5), 2, wrong=1, noise=3.0, seed=9)
    )
    weights[0, 1] = 0
    inputs = leaves(points, torch.zeros_like(projections), weights)

    def function(x: Tensor, change: Tensor, w: Tensor) -> Tensor:
        # Entries of projections differ by 1e6, and so do derivatives: so take relative changes.
        p = projections * (1 + 1e-3 * change)
        w = torch.where(weights == 0, 0, w)
        return ops.refine(truth + 10, x, p, w, loss=loss, scale=4.0, iterations=15)

    r = (ops.project(function(*inputs), projections) - points).norm(dim=-1)
    assert ((r - 4).abs() > 1e-3).all()  # away from Huber's kink
    assert (r > 4).any()
    assert (r < 4).any()
    assert torch.autograd.gradcheck(function, inputs, rtol=1e-4, atol=1e-5)
    small = leaves(points[:1], weights[:1])
    assert torch.autograd.gradgradcheck(
        lambda x, w: ops.refine(truth[:1] + 10, x, projections, w * (weights[:1] != 0),
                                loss=loss, scale=4.0, iterations=15),
        small, rtol=1e-3, atol=1e-5,
    )  # fmt: skip


@pytest.mark.parametrize("loss", LOSSES)
def test_second_derivatives_to_projections(loss: str) -> None:
    points, projections, weights, truth, _ = scene(rigs.ring(3), 1, noise=3.0, seed=9)
    (leaf,) = leaves(torch.zeros_like(projections))
    assert torch.autograd.gradgradcheck(
        lambda change: ops.refine(truth, points, projections * (1 + 1e-3 * change), weights,
                                  loss=loss, scale=4.0, iterations=15),
        leaf, rtol=1e-3, atol=1e-4,
    )  # fmt: skip


def test_the_gradient_does_not_depend_on_the_start() -> None:
    points, projections, weights, truth, _ = scene(rigs.ring(5), 3, noise=3.0, seed=2)
    inputs = leaves(points, projections, weights)
    grads = []
    for shift in (0.0, 40.0):
        start = (truth + shift).requires_grad_()
        refined = ops.refine(start, *inputs, scale=2.0, iterations=20)
        own, *others = torch.autograd.grad(refined.square().sum(), [start, *inputs])
        assert own.eq(0).all()
        grads.append(others)
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-6, atol=1e-6)


def test_a_common_factor_of_the_weights_changes_nothing() -> None:
    points, projections, weights, truth, _ = scene(rigs.ring(5), 3, noise=3.0, seed=2)
    (leaf,) = leaves(weights)
    refined = ops.refine(truth, points, projections, leaf, scale=2.0, iterations=20)
    (grad,) = torch.autograd.grad(refined.square().sum(), leaf)
    assert ((leaf * grad).sum(-1).abs() < 1e-7 * (leaf * grad).abs().sum(-1)).all()
    for factor in (1e-200, 1e30, 1e160):
        other = ops.refine(truth, points, projections, factor * weights, scale=2.0, iterations=20)
        torch.testing.assert_close(other, refined, rtol=0, atol=1e-8)
