# SPDX-License-Identifier: Apache-2.0
"""Losses without 3D labels: values by loops, laws, gradients, missing views, wrong solutions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import weak_scenes
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck
from weak_scenes import HUMAN36M_JOINTS, PAIR, at

from tritool.losses import (
    limb_depth_bound,
    limb_length_loss,
    mean_limb_lengths,
    multi_view_consistency,
    published_limb_lengths,
)
from tritool.skeletons import limbs

seeds = st.integers(0, 2**31)
LIMBS = limbs(HUMAN36M_JOINTS)
norms = pytest.mark.parametrize("norm", ["l1", "l2"])


def noisy(seed: int = 0, *, batch: int = 2, count: int = 3, noise: float = 0.1) -> Tensor:
    """Poses [batch, count, 17, 3] of the same people that do not quite agree."""
    generator = torch.Generator().manual_seed(seed)
    poses = weak_scenes.views(seed, batch=batch, count=count).pose
    return poses + noise * torch.randn(poses.shape, generator=generator, dtype=torch.float64)


def weights(*shape: int, seed: int = 0) -> Tensor:
    return weak_scenes.uniform(torch.Generator().manual_seed(seed), 0.3, 1.0, *shape)


def procrustes(
    source: np.ndarray, target: np.ndarray, w: np.ndarray, points: np.ndarray | None = None
) -> np.ndarray:
    """Points (the source itself) moved as the source is to be laid onto the target, one pose."""
    w = w[:, None] / w.sum()
    a, b = (w * source).sum(0), (w * target).sum(0)
    u, _, vt = np.linalg.svd((w * (source - a)).T @ (target - b))
    turn = vt.T @ np.diag([1, 1, np.linalg.det(vt.T @ u.T)]) @ u.T
    return ((source if points is None else points) - a) @ turn.T + b


def by_loops(poses: Tensor, confidences: Tensor, norm: str, floor: float, least: int) -> float:
    """The loss of poses [B, C, J, 3], pair by pair."""
    p, phi = poses.numpy(), confidences.numpy()
    total = weight = 0.0
    for b in range(p.shape[0]):
        for v in range(p.shape[1]):
            for other in range(p.shape[1]):
                w = phi[b, v] * phi[b, other]
                used = w > floor
                if v == other or used.sum() < least:
                    continue
                moved = procrustes(p[b, other][used], p[b, v][used], w[used])
                difference = p[b, v][used] - moved
                each = (
                    abs(difference).sum(-1) if norm == "l1" else np.linalg.norm(difference, axis=-1)
                )
                total += (w[used] * each).sum()
                weight += w[used].sum()
    return total / weight if weight else 0.0


# ---- Consistency: values and laws ----


@norms
@given(seed=seeds)
def test_against_loops(norm: Any, seed: int) -> None:
    poses, phi = noisy(seed), weights(2, 3, 17, seed=seed)
    phi[0, 1, 3:], phi[1, 2, 5] = 0.05, 0.0  # a pair of too few joints, a single joint
    got = multi_view_consistency(poses, phi, norm=norm, floor=0.1)
    assert got.item() == pytest.approx(by_loops(poses, phi, norm, 0.1, 4), rel=1e-9)
    ones = torch.ones_like(phi)
    got = multi_view_consistency(poses, norm=norm)
    assert got.item() == pytest.approx(by_loops(poses, ones, norm, 0.01, 4), rel=1e-9)


@given(seeds)
def test_law_rigid_motions_of_one_pose_are_consistent(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    person = weak_scenes.people(generator, 3) / 492
    turn = weak_scenes.rotations(generator, 3, 5)
    shift = weak_scenes.uniform(generator, -5, 5, 3, 5, 1, 3)
    poses = torch.einsum("bcij,bnj->bcni", turn, person) + shift
    for norm in ("l1", "l2"):
        assert multi_view_consistency(poses, norm=norm) < 1e-13
        assert multi_view_consistency(poses.float(), norm=norm) < 2e-5
        # Also where some joints are missing in some views.
        holes = torch.where(torch.rand(3, 5, 17, 1, generator=generator) < 0.2, torch.nan, poses)
        assert multi_view_consistency(holes, norm=norm) < 1e-13


@given(seeds)
def test_law_a_rigid_motion_of_any_view_changes_no_distance(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    poses, phi = noisy(seed), weights(2, 3, 17, seed=seed)
    turn = weak_scenes.rotations(generator, 2, 3)
    shift = weak_scenes.uniform(generator, -5, 5, 2, 3, 1, 3)
    moved = torch.einsum("bcij,bcnj->bcni", turn, poses) + shift
    expected = multi_view_consistency(poses, phi, norm="l2")
    assert expected > 0.05
    torch.testing.assert_close(multi_view_consistency(moved, phi, norm="l2"), expected)
    # Along the axes of a camera only shifts change nothing.
    expected = multi_view_consistency(poses, phi, norm="l1")
    torch.testing.assert_close(multi_view_consistency(poses + shift, phi, norm="l1"), expected)
    rotated = multi_view_consistency(moved, phi, norm="l1")
    assert 0.5 < rotated / expected < 2


@norms
@given(seed=seeds)
def test_law_order_and_absent_views(norm: Any, seed: int) -> None:
    poses, phi = noisy(seed, count=4), weights(2, 4, 17, seed=seed)
    expected = multi_view_consistency(poses, phi, norm=norm)
    order = torch.tensor([2, 0, 3, 1])
    got = multi_view_consistency(poses[:, order], phi[:, order], norm=norm)
    torch.testing.assert_close(got, expected)
    expected = multi_view_consistency(poses[:, [0, 1, 3]], phi[:, [0, 1, 3]], norm=norm)
    valid = torch.tensor([True, True, False, True])
    torch.testing.assert_close(multi_view_consistency(poses, phi, valid=valid, norm=norm), expected)
    blank = poses.clone()
    blank[:, 2] = torch.nan
    torch.testing.assert_close(multi_view_consistency(blank, phi, norm=norm), expected)
    doubt = phi.clone()
    doubt[:, 2] = 0
    torch.testing.assert_close(multi_view_consistency(poses, doubt, norm=norm), expected)


@norms
def test_law_unit_and_scale_of_confidences(norm: Any) -> None:
    poses, phi = noisy(), weights(2, 3, 17)
    expected = multi_view_consistency(poses, phi, norm=norm, floor=0)
    got = multi_view_consistency(492 * poses, phi / 7, norm=norm, floor=0)
    torch.testing.assert_close(got, 492 * expected)


def test_mirror_images_do_not_agree() -> None:
    poses = weak_scenes.views(0).pose
    mirrored = poses.clone()
    mirrored[:, 1, :, 2] *= -1
    assert multi_view_consistency(mirrored) > 0.1


def test_views_without_a_batch_and_pairs_of_one() -> None:
    poses = noisy(batch=1)
    torch.testing.assert_close(multi_view_consistency(poses[0]), multi_view_consistency(poses))
    assert multi_view_consistency(poses[:, :1]) == 0


# ---- Consistency: gradients ----


@norms
def test_derivatives(norm: Any) -> None:
    poses, phi = noisy(batch=1)[..., :6, :].requires_grad_(), weights(1, 3, 6).requires_grad_()

    def call(p: Tensor, w: Tensor) -> Tensor:
        return multi_view_consistency(p, w, norm=norm, through_transform=True)

    assert gradcheck(call, (poses, phi))


@norms
def test_the_motion_is_a_constant_by_default(norm: Any) -> None:
    poses, phi = noisy(batch=1, count=2), weights(1, 2, 17)
    p = poses[0].numpy()
    w = (phi[0, 0] * phi[0, 1]).numpy()

    frame = np.vstack([np.zeros(3), np.eye(3)])

    def motion(source: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        moved = procrustes(source, target, w, frame)
        return (moved[1:] - moved[0]).T, moved[0]

    expected = torch.zeros_like(poses[0])
    for v, other in ((0, 1), (1, 0)):
        turn, shift = motion(p[other], p[v])
        difference = p[v] - (p[other] @ turn.T + shift)
        slope = np.sign(difference)
        if norm == "l2":
            slope = difference / np.linalg.norm(difference, axis=-1, keepdims=True)
        slope = slope * w[:, None] / (2 * w.sum())
        expected[v] += torch.from_numpy(slope)
        expected[other] -= torch.from_numpy(slope @ turn)
    poses.requires_grad_()
    multi_view_consistency(poses, phi, norm=norm).backward()
    torch.testing.assert_close(poses.grad[0], expected)
    assert (poses.grad != 0).any(-1).all()


@norms
@pytest.mark.parametrize("through", [False, True])
@pytest.mark.parametrize(
    "why", ["one view", "no view", "masked", "nan", "few joints", "line", "equal", "empty", "doubt"]
)
def test_nothing_to_compare(norm: Any, through: bool, why: str) -> None:
    poses, phi = noisy(), weights(2, 3, 17)
    valid = torch.ones(2, 3, dtype=torch.bool)
    if why == "one view":
        valid[:, 1:] = False
    elif why == "no view":
        poses, phi, valid = poses[:, :0], phi[:, :0], valid[:, :0]
    elif why == "masked":
        valid[:] = False
    elif why == "nan":
        poses[:, 1:] = torch.nan
    elif why == "few joints":
        poses[:, :, 3:] = torch.nan
    elif why == "line":
        poses = torch.arange(17.0, dtype=torch.float64)[:, None].expand(2, 3, 17, 3).clone()
    elif why == "equal":
        poses = torch.ones_like(poses)
    elif why == "empty":
        poses, phi, valid = poses[:0], phi[:0], valid[:0]
    elif why == "doubt":
        phi[:] = 0.05
    poses.requires_grad_()
    phi.requires_grad_()
    got = multi_view_consistency(
        poses, phi, valid=valid, norm=norm, through_transform=through, floor=0.01
    )
    assert got == 0
    got.backward()
    for each in (poses, phi):
        assert torch.equal(each.grad, torch.zeros_like(each))


def test_a_sample_of_one_view_contributes_nothing() -> None:
    poses = noisy(batch=3)
    valid = torch.tensor([[True, True, True], [False, True, False], [True, True, True]])
    expected = multi_view_consistency(poses[[0, 2]])
    poses = poses.requires_grad_()
    got = multi_view_consistency(poses, valid=valid)
    torch.testing.assert_close(got, expected)
    got.backward()
    assert (poses.grad[1] == 0).all()
    assert poses.grad.isfinite().all()


@pytest.mark.parametrize("wrong", [-0.5, torch.nan, torch.inf])
def test_wrong_confidences_are_told(wrong: float) -> None:
    poses, phi = noisy().requires_grad_(), weights(2, 3, 17)
    phi[1, 2, 4] = wrong
    phi.requires_grad_()
    lengths = [0.5] * len(LIMBS)
    for got in (
        multi_view_consistency(poses, phi),
        limb_length_loss(poses, lengths, LIMBS, phi),
    ):
        assert got.isnan()
        for gradient in torch.autograd.grad(got, (poses, phi), allow_unused=True):
            assert gradient is None or (gradient == 0).all()
    # Those of a view that takes no part say nothing, nor those of a joint that is not there.
    valid = torch.tensor([[True, True, True], [True, True, False]])
    assert multi_view_consistency(poses, phi, valid=valid).isfinite()
    assert limb_length_loss(poses, lengths, LIMBS, phi, valid=valid).isfinite()
    hidden = poses.detach().clone()
    hidden[1, 2, 4] = torch.nan
    assert multi_view_consistency(hidden, phi).isfinite()


def test_precision_under_autocast() -> None:
    poses = noisy().float()
    expected = multi_view_consistency(poses)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(multi_view_consistency(poses), expected)
    assert multi_view_consistency(poses.half()).dtype == torch.float32


@pytest.mark.parametrize(
    ("shape", "settings", "error", "words"),
    [
        ((17, 3), {}, ValueError, r"poses must be \[\.\.\., C, J, 3\], got \(17, 3\)"),
        ((3, 17, 2), {}, ValueError, r"poses must be \[\.\.\., C, J, 3\]"),
        ((3, 17, 3), {"confidences": torch.ones(17)}, ValueError, r"\[\.\.\., C, J\] to fit"),
        ((3, 17, 3), {"valid": torch.ones(17)}, ValueError, r"valid must be \[\.\.\., C\]"),
        ((3, 17, 3), {"valid": [True]}, TypeError, "valid must be a tensor"),
        ((3, 17, 3), {"norm": "huber"}, ValueError, "norm must be one of 'l1', 'l2'"),
        ((3, 17, 3), {"min_joints": 2}, ValueError, "min_joints must be at least 3"),
        ((3, 17, 3), {"floor": -1.0}, ValueError, "floor must be"),
    ],
)
def test_arguments_that_do_not_fit(
    shape: tuple[int, ...], settings: Any, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        multi_view_consistency(torch.zeros(shape), **settings)


# ---- Limbs ----


@given(seeds)
def test_limb_lengths_by_loops(seed: int) -> None:
    poses, phi = noisy(seed), weights(2, 3, 17, seed=seed)
    poses[0, 1, at("l_knee")] = torch.nan
    mean = weak_scenes.uniform(torch.Generator().manual_seed(seed), 0.2, 1.0, len(LIMBS))
    total = weight = 0.0
    for b in range(2):
        for v in range(3):
            for (i, j), mu in zip(LIMBS, mean.tolist(), strict=True):
                length = (poses[b, v, i] - poses[b, v, j]).norm().item()
                if not np.isnan(length):
                    w = (phi[b, v, i] * phi[b, v, j]).item()
                    total, weight = total + w * (length - mu) ** 2, weight + w
    got = limb_length_loss(poses, mean, LIMBS, phi)
    assert got.item() == pytest.approx(total / weight)
    assert limb_length_loss(poses, mean.tolist(), LIMBS, phi) == got
    valid = torch.tensor([[True, False, True], [True, True, True]])
    got = limb_length_loss(poses, mean, LIMBS, phi, valid=valid)
    torch.testing.assert_close(got, limb_length_loss(poses[valid], mean, LIMBS, phi[valid]))


def test_limb_lengths_are_kept_by_motions_and_learned_from_poses() -> None:
    poses = weak_scenes.views(3).pose
    mean = mean_limb_lengths(poses, LIMBS, pair=PAIR)
    assert limb_length_loss(poses, mean, LIMBS) < 1e-20
    assert limb_length_loss(1.1 * poses, mean, LIMBS) > 1e-3
    # In millimetres, and of bodies of other sizes, the lengths relative to the pair are the same.
    bodies = weak_scenes.people(torch.Generator().manual_seed(0), 4)
    sizes = torch.tensor([0.8, 1.0, 1.1, 1.3], dtype=torch.float64)[:, None, None]
    torch.testing.assert_close(mean_limb_lengths(sizes * bodies, LIMBS, pair=PAIR), mean)
    absolute = mean_limb_lengths(sizes * bodies, LIMBS)
    torch.testing.assert_close(absolute, 492 * sizes.mean() * mean)


def test_mean_lengths_leave_out_what_is_missing() -> None:
    bodies = weak_scenes.people(torch.Generator().manual_seed(0), 4)
    expected = mean_limb_lengths(bodies[1:], LIMBS, pair=PAIR)
    bodies[0, PAIR[0]] = torch.nan
    torch.testing.assert_close(mean_limb_lengths(bodies, LIMBS, pair=PAIR), expected)
    bodies[0] = 0
    torch.testing.assert_close(mean_limb_lengths(bodies, LIMBS, pair=PAIR), expected)
    valid = torch.tensor([False, True, True, True])
    torch.testing.assert_close(mean_limb_lengths(bodies, LIMBS, valid=valid), 492 * expected)
    bodies[:, at("nose")] = torch.nan
    missing = mean_limb_lengths(bodies, LIMBS, pair=PAIR).isnan()
    assert missing.tolist() == [at("nose") in limb for limb in LIMBS]
    one = mean_limb_lengths(bodies[1], LIMBS, pair=PAIR)
    assert one.shape == (len(LIMBS),)


def test_published_lengths() -> None:
    pairs, lengths = published_limb_lengths()
    assert len(pairs) == len(lengths) == 16
    assert PAIR[::-1] not in pairs
    table = dict(zip(pairs, lengths, strict=True))
    assert table[at("r_hip"), at("r_knee")] == 0.9889
    absolute = dict(zip(*published_limb_lengths(millimetres=True), strict=True))
    assert absolute[PAIR[::-1]] == 492.69
    for limb, length in table.items():
        assert absolute[limb] / 492.69 == pytest.approx(length, abs=1.5e-3)
    # Bodies are about like that; where shoulders are is a matter of definition.
    own = mean_limb_lengths(weak_scenes.views(0).pose, pairs, pair=PAIR)
    assert (own - torch.tensor(lengths)).abs().max() < 0.2
    some, _ = published_limb_lengths(["l_knee", "l_ankle", "tail"])
    assert some == ((0, 1),)
    with pytest.raises(ValueError, match="joint_names must have limbs of pelvis"):
        published_limb_lengths(["corner"])


def test_limb_derivatives() -> None:
    poses, phi = noisy(batch=1).requires_grad_(), weights(1, 3, 17).requires_grad_()
    mean = torch.full((len(LIMBS),), 0.5, dtype=torch.float64, requires_grad=True)

    def call(p: Tensor, w: Tensor, m: Tensor) -> Tensor:
        return limb_length_loss(p, m, LIMBS, w)

    assert gradcheck(call, (poses, phi, mean))


def test_limbs_of_no_length_have_a_gradient() -> None:
    poses = torch.ones(2, 17, 3, requires_grad=True)
    limb_length_loss(poses, [0.5] * len(LIMBS), LIMBS).backward()
    assert poses.grad.isfinite().all()


@pytest.mark.parametrize("why", ["masked", "nan", "empty"])
def test_no_limb_to_measure(why: str) -> None:
    poses = noisy()[: 0 if why == "empty" else 2]
    if why == "nan":
        poses[:] = torch.nan
    poses.requires_grad_()
    valid = torch.zeros(3) if why == "masked" else None
    got = limb_length_loss(poses, [0.5] * len(LIMBS), LIMBS, valid=valid)
    assert got == 0
    got.backward()
    assert torch.equal(poses.grad, torch.zeros_like(poses))


@pytest.mark.parametrize(
    ("lengths", "pairs", "words"),
    [
        ([1.0], [(0, 1), (1, 2)], r"mean_lengths must be \[L\] with L = 2"),
        ([-1.0], [(0, 1)], "mean_lengths must be finite numbers above 0, got -1.0"),
        ([1.0], [(0, 17)], "limbs must be two different joint indices from 0 to 16"),
        ([1.0], [(3, 3)], "limbs must be two different joint indices"),
        ([], [], "limbs must be one or more pairs"),
    ],
)
def test_limbs_that_do_not_fit(lengths: Any, pairs: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        limb_length_loss(torch.zeros(17, 3), lengths, pairs)


# ---- The bound of depths along limbs ----


@given(seeds)
def test_depth_bound_against_loops(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    depths = torch.randn(2, 3, 5, generator=generator, dtype=torch.float64)
    depths[0, 1, 2] = torch.nan
    sure = torch.rand(2, 3, 5, generator=generator, dtype=torch.float64)
    limbs, lengths = ((0, 1), (1, 2), (4, 2)), (0.5, 0.8, 1.2)
    total = weight = 0.0
    for b in range(2):
        for c in range(3):
            for (i, j), length in zip(limbs, lengths, strict=True):
                difference = abs(float(depths[b, c, i] - depths[b, c, j]))
                if difference == difference:
                    w = float(sure[b, c, i] * sure[b, c, j])
                    total += w * max(difference - 1.1 * length, 0) ** 2
                    weight += w
    found = limb_depth_bound(depths, lengths, limbs, sure)
    assert found.item() == pytest.approx(total / weight)


def test_depth_bound_leads_back_and_leaves_possible_depths_alone() -> None:
    limbs, lengths = ((0, 1),), (1.0,)
    possible = torch.tensor([0.0, 1.09], requires_grad=True)
    limb_depth_bound(possible, lengths, limbs).backward()
    assert possible.grad is not None
    assert (possible.grad == 0).all()
    wrong = torch.tensor([0.0, 3.0], requires_grad=True)
    limb_depth_bound(wrong, lengths, limbs).backward()
    assert wrong.grad is not None
    assert wrong.grad[0] < 0 < wrong.grad[1]
    double = torch.tensor([[0.1, 3.0], [-2.0, 1.0]], dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda depths: limb_depth_bound(depths, lengths, limbs), double)
    assert limb_depth_bound(wrong, lengths, limbs, slack=3.0) == 0
    assert limb_depth_bound(wrong[None], lengths, limbs, valid=torch.tensor([False])) == 0
    assert limb_depth_bound(wrong, lengths, limbs, torch.tensor([1.0, -1.0])).isnan()
    with pytest.raises(ValueError, match=r"slack must be a finite number of at least 1, got 0\.5"):
        limb_depth_bound(wrong, lengths, limbs, slack=0.5)
    with pytest.raises(ValueError, match="relative_depth must be"):
        limb_depth_bound(torch.tensor(1.0), lengths, limbs)
