# SPDX-License-Identifier: Apache-2.0
"""The weakly supervised loss as a whole, wrong solutions, bending, and the sign of depth."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import weak_scenes
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck
from weak_scenes import PAIR, at
from weak_study import LIMBS, cells, gaussians

from tritool import losses
from tritool.losses import (
    WeakLossSettings,
    bending,
    bending_prior,
    depth_sign_check,
    limb_length_loss,
    mean_limb_lengths,
    multi_view_consistency,
    weak_total,
)
from tritool.models.reconstruct import reconstruct_pose

seeds = st.integers(0, 2**31)


def noisy(count: int = 4) -> Tensor:
    """Poses [2, count, 17, 3] of the same people that do not quite agree."""
    generator = torch.Generator().manual_seed(0)
    poses = weak_scenes.views(0, count=count).pose
    return poses + 0.1 * torch.randn(poses.shape, generator=generator, dtype=torch.float64)


def weights(*shape: int) -> Tensor:
    return weak_scenes.uniform(torch.Generator().manual_seed(0), 0.3, 1.0, *shape)


# ---- Bending and the sign of depth ----

MIRROR = torch.tensor([1.0, 1, -1], dtype=torch.float64)


@given(seeds)
def test_law_bending_is_of_the_body_and_turns_with_reflections(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    bodies = weak_scenes.people(generator, 5)
    value = bending(bodies)
    assert (value[:, :2] > 0).all()  # knees
    moved = bodies @ weak_scenes.rotations(generator).mT * 3 + 100
    torch.testing.assert_close(bending(moved), value)
    torch.testing.assert_close(bending(bodies * MIRROR), -value)


def test_bending_of_a_square_knee() -> None:
    body = torch.zeros(17, 3)
    body[at("neck")] = torch.tensor([0.0, 0, 1])
    body[at("l_hip")], body[at("r_hip")] = torch.tensor([[0.0, 1, 0], [0.0, -1, 0]])
    body[at("l_knee")] = torch.tensor([0.0, 1, -1])
    body[at("l_ankle")] = torch.tensor([-1.0, 1, -1])
    # The knee is half a diagonal before the line from hip to ankle, at 45 degrees to the front.
    (value,) = bending(body, joints=("l_knee",))
    assert value.item() == pytest.approx(0.5)
    body[at("l_ankle"), 0] = 1.0
    assert bending(body, joints=("l_knee",)).item() == pytest.approx(-0.5)
    assert bending_prior(body, joints=("l_knee",)) == pytest.approx(0.5)
    assert bending_prior(body, joints=("l_knee",), margin=0.3) == pytest.approx(0.8)


def test_bending_that_is_not_known() -> None:
    bodies = weak_scenes.people(torch.Generator().manual_seed(0), 3)
    bodies[0, at("pelvis")] = torch.nan
    bodies[1, at("l_ankle")] = torch.inf
    bodies[2] = 1.0
    bodies.requires_grad_()
    value = bending(bodies)
    assert value.isnan().tolist() == [[True] * 4, [True, False, False, False], [True] * 4]
    value.nansum().backward()
    assert bodies.grad.isfinite().all()
    assert (bodies.grad[[0, 2]] == 0).all()


def test_bending_derivatives() -> None:
    bodies = (
        weak_scenes.people(torch.Generator().manual_seed(0), 2) / 492 * MIRROR
    ).requires_grad_()
    phi = weights(2, 17).requires_grad_()

    def call(p: Tensor, w: Tensor) -> Tensor:
        return bending_prior(p, w, margin=0.2, joints=("l_knee", "r_elbow"))

    assert gradcheck(call, (bodies, phi))
    assert gradcheck(lambda p: bending(p), (bodies,))


def test_bending_prior_leaves_out_and_weighs() -> None:
    bodies = weak_scenes.people(torch.Generator().manual_seed(0), 4) * MIRROR
    expected = bending(bodies)[..., :2].neg().mean()
    torch.testing.assert_close(bending_prior(bodies), expected)
    assert bending_prior(bodies * MIRROR) == 0
    valid = torch.tensor([True, False, False, True])
    torch.testing.assert_close(bending_prior(bodies, valid=valid), bending_prior(bodies[valid]))
    phi = torch.ones(4, 17, dtype=torch.float64)
    phi[~valid, at("l_ankle")] = phi[~valid, at("r_hip")] = 0
    torch.testing.assert_close(bending_prior(bodies, phi), bending_prior(bodies[valid]))
    phi[0, at("l_hip")] = phi[0, at("l_knee")] = -1  # whose product is 1
    assert bending_prior(bodies, phi).isnan()
    assert bending_prior(torch.full((2, 17, 3), torch.nan)) == 0
    with pytest.raises(ValueError, match="joints must be of l_knee"):
        bending_prior(bodies, joints=("chin",))
    with pytest.raises(ValueError, match="joint_names must have neck"):
        bending(torch.zeros(1, 3), joint_names=("corner",))


def test_depth_sign() -> None:
    scene = weak_scenes.views(1, batch=20)
    truth, pose = scene.camera_mm, scene.pose
    good, bad = depth_sign_check(pose, truth), depth_sign_check(pose * MIRROR, truth)
    assert good.error < 1e-9
    assert good.mirrored_error > 100
    assert good.reversed == good.wrong_knees == 0
    assert bad.mirrored_error < 1e-9
    assert bad.error > 100
    assert bad.reversed == bad.wrong_knees == 1
    assert bad.wrong_elbows.item() == pytest.approx(1 - good.wrong_elbows.item())
    assert good.wrong_elbows < 0.3
    mixed = torch.where(torch.arange(20)[:, None, None, None] < 5, pose * MIRROR, pose)
    assert depth_sign_check(mixed, truth).reversed == 0.25
    # Without any truth, knees tell.
    blind = depth_sign_check(mixed)
    assert blind.error.isnan()
    assert blind.reversed.isnan()
    assert 0.2 < blind.wrong_knees < 0.3  # of those that are bent


def test_depth_sign_of_missing_joints() -> None:
    scene = weak_scenes.views(1, batch=3)
    truth, pose = scene.camera_mm.clone(), scene.pose.clone()
    truth[0, :, at("pelvis")] = torch.nan  # no root
    truth[1, 0, 5], pose[1, 1, 7] = torch.nan, torch.nan
    found = depth_sign_check(pose, truth)
    assert found.error < 1e-9
    assert found.mirrored_error.isfinite()
    valid = torch.ones(3, 4, 17)
    valid[:, :, 1:] = 0
    assert all(each.isnan() for each in depth_sign_check(pose, truth, valid=valid))
    other = depth_sign_check(pose[..., :4, :], truth[..., :4, :], joint_names=["a", "b", "c", "d"])
    assert other.error.isfinite()
    assert other.wrong_knees.isnan()
    with pytest.raises(ValueError, match="target must have the shape"):
        depth_sign_check(pose, truth[0])


# ---- The total ----


def total(scene: weak_scenes.Views, xy: Tensor, relative_depth: Tensor) -> losses.WeakLoss:
    """The loss of a network that says this."""
    found = reconstruct_pose(xy, relative_depth, scene.K, pair=PAIR)
    return weak_total(
        WeakLossSettings(),
        heatmaps=gaussians(cells(xy)),
        target=cells(scene.xy),
        poses=found.pose,
        valid=found.valid,
        mean_lengths=mean_limb_lengths(scene.pose, LIMBS, pair=PAIR),
        limbs=LIMBS,
    )


@pytest.mark.parametrize("seed", range(5))
def test_collapsed_solutions_are_worse_than_the_truth(seed: int) -> None:
    scene = weak_scenes.views(seed)
    truth = total(scene, scene.xy, scene.relative_depth)
    assert truth.total < 1e-9
    flat = total(scene, scene.xy, torch.zeros_like(scene.relative_depth))
    assert flat.heatmaps < 1e-9
    assert flat.consistency > 0.15
    assert flat.limb_lengths > 1e-3
    # One and the same pose for every image agrees with itself, but not with the images.
    K = scene.K.mean((0, 1)).expand_as(scene.K)
    same = weak_scenes.Views(**{**vars(scene), "K": K})
    one, depth = (x[:1, :1].expand_as(x).clone() for x in (scene.xy, scene.relative_depth))
    constant = total(same, one, depth)
    assert constant.consistency < 1e-9
    assert constant.heatmaps > 5e-3
    assert constant.total > truth.total + 5e-3
    # Shrinking towards the pelvis: one length is known, so the pose moves away instead.
    center = scene.xy[..., PAIR[1], None, :]
    small = total(scene, center + 0.5 * (scene.xy - center), 0.5 * scene.relative_depth)
    assert small.heatmaps > 2e-3
    assert small.total > truth.total + 0.1
    reversed_depth = total(scene, scene.xy, -scene.relative_depth)
    assert reversed_depth.total > truth.total + 0.5  # cameras at 2 to 3 m


def test_terms_add_up() -> None:
    scene = weak_scenes.views(0)
    poses, phi = noisy(), weights(2, 4, 17)
    valid = torch.tensor([True, True, True, False])
    mean = [0.5] * len(LIMBS)
    maps, target = torch.zeros(5, 17, 12, 16).double(), 8 * torch.rand(5, 17, 2).double()
    known = torch.rand(5, 17) < 0.5
    settings = WeakLossSettings(
        heatmap=3.0, alpha=2.0, psi=4.0, bending=0.5, sigma=1.5, norm="l2", floor=0.2,
        bending_margin=0.4,
    )  # fmt: skip
    found = weak_total(
        settings, heatmaps=maps, target=target, target_valid=known, poses=poses, confidences=phi,
        valid=valid, mean_lengths=mean, limbs=LIMBS,
    )  # fmt: skip
    expected = (
        losses.heatmap_mse(maps, target, sigma=1.5, valid=known),
        multi_view_consistency(poses, phi, valid=valid, norm="l2", floor=0.2),
        limb_length_loss(poses, mean, LIMBS, phi, valid=valid),
        bending_prior(poses, phi, valid=valid, margin=0.4),
    )
    for ours, theirs in zip(found[1:], expected, strict=True):
        assert ours > 0
        assert torch.equal(ours, theirs)
    assert found.total.item() == pytest.approx(
        sum(f * float(term) for f, term in zip((3, 2, 4, 0.5), expected, strict=True))
    )
    # Each kind of data alone; what has factor 0 is not computed.
    labelled = weak_total(settings, heatmaps=maps, target=target, target_valid=known)
    assert labelled[2:] == (0, 0, 0)
    assert labelled.total == 3 * expected[0]
    unlabelled = weak_total(WeakLossSettings(psi=0.0), poses=poses, valid=valid)
    assert unlabelled.heatmaps == unlabelled.limb_lengths == 0
    assert unlabelled.total == 10 * unlabelled.consistency
    none = weak_total(WeakLossSettings(alpha=0.0, psi=0.0), poses=scene.pose)
    assert none.total == 0


def test_heat_maps_by_cross_entropy() -> None:
    maps, target = torch.randn(5, 17, 12, 16).double(), 8 * torch.rand(5, 17, 2).double()
    known = torch.rand(5, 17) < 0.5
    settings = WeakLossSettings(
        heatmap=3.0, heatmap_loss="cross_entropy", sigma=1.5, inverse_temperature=4.0
    )
    found = weak_total(settings, heatmaps=maps, target=target, target_valid=known)
    expected = losses.heatmap_cross_entropy(
        maps, target, sigma=1.5, inverse_temperature=4.0, valid=known
    )
    assert expected > 1
    assert torch.equal(found.heatmaps, expected)
    assert found.total == 3 * expected
    # The temperature is the default network's, and the squared error knows none.
    usual = weak_total(WeakLossSettings(heatmap_loss="cross_entropy"), heatmaps=maps, target=target)
    same = losses.heatmap_cross_entropy(maps, target, inverse_temperature=20.0)
    assert torch.equal(usual.heatmaps, same)
    squares = [
        weak_total(WeakLossSettings(inverse_temperature=t), heatmaps=maps, target=target).total
        for t in (1.0, 20.0)
    ]
    assert squares[0] == squares[1] == losses.heatmap_mse(maps, target)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "heatmaps or poses must be given"),
        ({"heatmaps": torch.zeros(1, 2, 2)}, "heatmaps and target must be given together"),
        ({"poses": torch.zeros(2, 17, 3)}, "mean_lengths and limbs must be given"),
        (
            {"heatmaps": torch.zeros(1, 2, 2), "target": torch.zeros(1, 2), "valid": torch.ones(1)},
            "confidences and valid must come with poses",
        ),
        (
            {"poses": torch.zeros(2, 17, 3), "target_valid": torch.ones(1)},
            "target_valid must come with target",
        ),
    ],
)
def test_what_a_total_needs(given: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        weak_total(WeakLossSettings(), **given)


def test_factors_must_not_be_negative() -> None:
    with pytest.raises(ValueError, match="alpha must be a finite number of at least 0, got -1"):
        WeakLossSettings(alpha=-1)


def test_a_loss_of_heat_maps_that_there_is_not() -> None:
    unknown: Any = "entropy"
    with pytest.raises(ValueError, match="heatmap_loss must be one of 'mse', 'cross_entropy', got"):
        WeakLossSettings(heatmap_loss=unknown)


def test_total_on_samples_without_views_has_finite_gradients() -> None:
    poses = noisy().requires_grad_()
    valid = torch.tensor([[True, False, False, False], [False] * 4])
    found = weak_total(
        WeakLossSettings(bending=1.0), poses=poses, valid=valid,
        mean_lengths=[0.5] * len(LIMBS), limbs=LIMBS,
    )  # fmt: skip
    assert found.consistency == 0
    found.total.backward()
    assert poses.grad.isfinite().all()
    assert (poses.grad[1] == 0).all()
    assert (poses.grad[0, 1:] == 0).all()
