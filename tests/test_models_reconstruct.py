# SPDX-License-Identifier: Apache-2.0
"""From 2.5D to 3D in closed form: exactness, crops, guards, gradients, several limbs, scale."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import weak_scenes
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck
from weak_scenes import HUMAN36M_JOINTS, PAIR, PELVIS, SIZE, at

from tritool import losses
from tritool.models.reconstruct import (
    Reconstruction,
    absolute_scale,
    augmented_intrinsics,
    flip_affine,
    intrinsics_fallback,
    map_points,
    mirrored_joints,
    reconstruct_pose,
    reconstruct_pose_median,
    rotation_affine,
)
from tritool.skeletons import limbs

seeds = st.integers(0, 2**31)
LIMBS = limbs(HUMAN36M_JOINTS)


def reconstructed(scene: weak_scenes.Views, **settings: Any) -> Reconstruction:
    return reconstruct_pose(scene.xy, scene.relative_depth, scene.K, pair=PAIR, **settings)


# ---- Closed form: exactness ----


@given(seeds)
def test_the_pose_comes_back(seed: int) -> None:
    """Random bones, also nearly end-on: exact wherever the discriminant allows."""
    generator = torch.Generator().manual_seed(seed)
    pose = torch.randn(50, 5, 3, generator=generator, dtype=torch.float64)
    length = (pose[:, 1] - pose[:, 3]).norm(dim=-1)
    pose = 0.7 * pose / length[:, None, None]
    pose[..., 2] += weak_scenes.uniform(generator, 4, 15, 50, 1)
    K = weak_scenes.views(seed, batch=50, count=1, skew=True).K[:, 0]
    pixels = pose @ K.mT
    relative = pose[..., 2] - pose[:, :1, 2]
    found = reconstruct_pose(
        pixels[..., :2] / pixels[..., 2:], relative, K, pair=(1, 3), length=0.7
    )
    # The larger root is the true one unless the bone recedes faster than it moves sideways.
    d = pose[:, 1, :2] / pose[:, 1, 2:] - pose[:, 3, :2] / pose[:, 3, 2:]
    bone = pose[:, 1] - pose[:, 3]
    larger = (d * bone[:, :2]).sum(-1) > 1e-3 * d.norm(dim=-1)
    assert larger.double().mean() > 0.8
    assert (found.discriminant > 0)[larger].all()
    torch.testing.assert_close(found.root_depth[larger], pose[larger, 0, 2], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.pose[larger], pose[larger], rtol=1e-9, atol=1e-9)
    assert found.valid[larger].all()


@given(seeds)
def test_the_quadratic_equation(seed: int) -> None:
    """Coefficients as the papers have them, on data that belong to no pose."""
    generator = torch.Generator().manual_seed(seed)
    scene = weak_scenes.views(seed, skew=True)
    xy = scene.xy + 5 * torch.randn(scene.xy.shape, generator=generator)
    z = scene.relative_depth + 0.2 * torch.randn(scene.relative_depth.shape, generator=generator)
    found = reconstruct_pose(xy, z, scene.K, pair=PAIR, length=1.3)
    ones = torch.ones_like(xy[..., :1])
    m = torch.linalg.solve(scene.K, torch.cat([xy, ones], -1).mT).mT
    k, l = PAIR
    for index in np.ndindex(*z.shape[:-1]):
        (uk, vk, _), (ul, vl, _) = m[index][k].tolist(), m[index][l].tolist()
        zk, zl = z[index][k].item(), z[index][l].item()
        a = (uk - ul) ** 2 + (vk - vl) ** 2
        b = 2 * ((uk - ul) * (uk * zk - ul * zl) + (vk - vl) * (vk * zk - vl * zl))
        c = (uk * zk - ul * zl) ** 2 + (vk * zk - vl * zl) ** 2 + (zk - zl) ** 2 - 1.3**2
        assert found.discriminant[index].item() == pytest.approx(b * b - 4 * a * c, abs=1e-12)
        if found.valid[index]:
            root = (-b + math.sqrt(b * b - 4 * a * c)) / (2 * a)
            assert found.root_depth[index].item() == pytest.approx(root, rel=1e-9)
    pose = (found.root_depth[..., None] + z)[..., None] * m
    torch.testing.assert_close(found.pose, pose)


@given(seeds)
def test_float32_keeps_six_digits(seed: int) -> None:
    scene = weak_scenes.views(seed)
    exact = reconstructed(scene)
    found = reconstruct_pose(
        scene.xy.float(), scene.relative_depth.float(), scene.K.float(), pair=PAIR
    )
    assert found.pose.dtype == torch.float32
    torch.testing.assert_close(found.pose.double(), exact.pose, rtol=2e-5, atol=2e-5)


def test_batches_broadcast() -> None:
    scene = weak_scenes.views(0)
    found = reconstruct_pose(scene.xy[:, 0], scene.relative_depth[0, 0], scene.K[0, 0], pair=PAIR)
    for b in range(2):
        one = reconstruct_pose(scene.xy[b, 0], scene.relative_depth[0, 0], scene.K[0, 0], pair=PAIR)
        for ours, theirs in zip(found, one, strict=True):
            assert torch.equal(ours[b], theirs)
    empty = reconstruct_pose(scene.xy[:0], scene.relative_depth[:0], scene.K[:0], pair=PAIR)
    assert empty.pose.shape == (0, 4, 17, 3)
    assert empty.valid.shape == (0, 4)


def test_units_and_factors() -> None:
    scene = weak_scenes.views(0)
    unit = reconstructed(scene)
    found = reconstruct_pose(
        scene.xy, 492 * scene.relative_depth, -3 * scene.K, pair=PAIR[::-1], length=492.0
    )
    torch.testing.assert_close(found.pose, 492 * unit.pose)
    torch.testing.assert_close(
        found.pose[..., PELVIS, :], scene.camera_mm[..., PELVIS, :] * 492 / 492
    )


# ---- Closed form: crops ----


@given(seeds, st.floats(-3, 3), st.floats(0.5, 2))
def test_law_augmented_crops_change_nothing(seed: int, angle: float, scale: float) -> None:
    scene = weak_scenes.views(seed)
    turn = rotation_affine(torch.tensor(angle, dtype=torch.float64), SIZE, scale=scale)
    crop = torch.tensor([[2.0, 0, -7], [0, 3, 11]], dtype=torch.float64)
    expected = reconstructed(scene)
    for affine in (turn, crop, torch.stack([turn, crop])[:, None]):
        K, xy = augmented_intrinsics(scene.K, affine), map_points(scene.xy, affine)
        found = reconstruct_pose(xy, scene.relative_depth, K, pair=PAIR)
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs)


@given(seeds)
def test_law_a_flip_swaps_the_sides(seed: int) -> None:
    """What a network sees in a flipped image is a mirrored person whose left is right."""
    scene = weak_scenes.views(seed)
    flip = flip_affine(SIZE[0], dtype=torch.float64)
    order = list(mirrored_joints(HUMAN36M_JOINTS))
    seen = map_points(scene.xy, flip)[..., order, :]
    depth = scene.relative_depth[..., order]
    K = augmented_intrinsics(scene.K, flip)
    found = reconstruct_pose(seen, depth, K, pair=PAIR).pose[..., order, :]
    torch.testing.assert_close(found, reconstructed(scene).pose)
    torch.testing.assert_close(map_points(map_points(scene.xy, flip), flip), scene.xy)


def test_the_affine_maps() -> None:
    quarter = rotation_affine(torch.tensor(math.pi / 2), (7, 5))
    points = torch.tensor([[3.0, 2.0], [4.0, 2.0], [3.0, 3.0]])
    expected = torch.tensor([[3.0, 2.0], [3.0, 3.0], [2.0, 2.0]])  # x turns towards y
    torch.testing.assert_close(map_points(points, quarter), expected)
    flipped = map_points(torch.tensor([[0.0, 1.0], [6.0, 2.0]]), flip_affine(7))
    torch.testing.assert_close(flipped, torch.tensor([[6.0, 1.0], [0.0, 2.0]]))
    many = rotation_affine(torch.zeros(3), (7, 5), scale=torch.tensor([1.0, 2, 3]))
    assert many.shape == (3, 2, 3)
    torch.testing.assert_close(many[1], torch.tensor([[2.0, 0, -3], [0, 2, -2]]))
    assert map_points(torch.full((1, 2), torch.nan), quarter).isnan().all()


def test_mirrored_joints() -> None:
    order = mirrored_joints(HUMAN36M_JOINTS)
    assert order[at("l_knee")] == at("r_knee")
    assert order[at("nose")] == at("nose")
    assert [order[j] for j in order] == list(range(17))
    assert mirrored_joints(["LKnee", "RKnee", "rightAnkle", "left-ankle"]) == (1, 0, 3, 2)
    with pytest.raises(ValueError, match="got 'l_toe' without counterpart"):
        mirrored_joints(["l_toe", "r_heel"])


def test_fallback_intrinsics() -> None:
    K = intrinsics_fallback((640, 480))
    assert K.tolist() == [[640, 0, 319.5], [0, 640, 239.5], [0, 0, 1]]
    with pytest.raises(ValueError, match=r"image_size must be \(W, H\)"):
        intrinsics_fallback((0, 480))


# ---- Closed form: guards ----


def foreshortened(angle: float) -> tuple[Tensor, Tensor, Tensor]:
    """A torso at 5 lengths, `angle` radians from pointing at the camera, and a wrist."""
    neck = torch.tensor([0.0, -math.sin(angle), -math.cos(angle)], dtype=torch.float64)
    joints = torch.stack([torch.zeros(3, dtype=torch.float64), neck, -neck])
    joints = joints + torch.tensor([0.0, 0, 5], dtype=torch.float64)
    K = torch.tensor([[900.0, 0, 50], [0, 910, 60], [0, 0, 1]], dtype=torch.float64)
    pixels = joints @ K.T
    return pixels[:, :2] / pixels[:, 2:], joints[:, 2] - 5, K


@pytest.mark.parametrize("angle", [0.0, 1e-7, 1e-4, 0.01, 0.1])
def test_torsos_seen_end_on(angle: float) -> None:
    xy, depth, K = (x.requires_grad_() for x in foreshortened(angle))
    found = reconstruct_pose(xy, depth, K, pair=(1, 0), min_ratio=0.01, depth_range=(1, 100))
    assert found.pose.isfinite().all()
    assert found.valid == (angle >= 0.1 + 1e-3) or angle == 0.1
    found.pose.sum().backward()
    for each in (xy, depth, K):
        assert each.grad.isfinite().all()
    if angle < 0.1:
        assert not found.valid
    if angle >= 1e-3:
        exact = reconstruct_pose(xy, depth, K, pair=(1, 0), min_spread=1e-12)
        assert exact.valid
        assert exact.root_depth.item() == pytest.approx(5, rel=1e-6)


@pytest.mark.parametrize("min_ratio", [0.0, 1e-6, 0.01])
def test_impossible_depths(min_ratio: float) -> None:
    """A depth difference beyond the length: no pose has it."""
    xy, depth, K = foreshortened(1.0)
    depth[1] = -1.5
    xy, depth, K = (x.requires_grad_() for x in (xy, depth, K))
    found = reconstruct_pose(xy, depth, K, pair=(1, 0), min_ratio=min_ratio)
    assert found.discriminant < 0
    assert not found.valid
    assert found.pose.isfinite().all()
    found.pose.sum().backward()
    for each in (xy, depth, K):
        assert each.grad.isfinite().all()


def test_exactly_on_the_edge() -> None:
    """Both joints on the optical axis, a whole length apart: everything is 0."""
    xy = torch.zeros(2, 2, requires_grad=True)
    depth = torch.tensor([0.0, 1.0], requires_grad=True)
    for min_ratio in (0.0, 0.1):
        found = reconstruct_pose(xy, depth, torch.eye(3), pair=(0, 1), min_ratio=min_ratio)
        assert not found.valid
        assert found.pose.isfinite().all()
        for gradient in torch.autograd.grad(found.pose.sum(), (xy, depth)):
            assert gradient.isfinite().all()


def test_depth_range() -> None:
    scene = weak_scenes.views(0)
    middle = scene.root_depth.median().item()
    found = reconstructed(scene, depth_range=(middle, 50.0))
    torch.testing.assert_close(found.root_depth, scene.root_depth.clamp(min=middle))
    assert torch.equal(found.valid, scene.root_depth >= middle - 1e-12)
    behind = reconstruct_pose(scene.xy, scene.relative_depth - 20, scene.K, pair=PAIR)
    assert behind.valid.all()  # the root is 20 nearer to the relative zero, nothing else
    away = reconstruct_pose(scene.xy, scene.relative_depth + 20, scene.K, pair=PAIR)
    assert (away.root_depth < 0).all()
    assert not away.valid.any()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_missing_joints(bad: float) -> None:
    scene = weak_scenes.views(0)
    expected = reconstructed(scene)
    xy, depth, K = scene.xy.clone(), scene.relative_depth.clone(), scene.K.clone()
    xy[0, 0, 4, 1] = bad  # a knee
    depth[0, 1, 13] = bad  # a wrist
    xy[0, 2, PAIR[0]] = bad  # a joint of the pair
    depth[1, 0, PAIR[1]] = bad
    K[1, 1, 0, 0] = bad
    xy, depth, K = (x.requires_grad_() for x in (xy, depth, K))
    found = reconstruct_pose(xy, depth, K, pair=PAIR)
    lost = torch.zeros(2, 4, 17, dtype=torch.bool)
    lost[0, 0, 4] = lost[0, 1, 13] = lost[0, 2] = lost[1, 0] = lost[1, 1] = True
    assert torch.equal(found.pose.isnan().any(-1), lost)
    torch.testing.assert_close(found.pose[~lost], expected.pose[~lost])
    assert torch.equal(found.valid, ~lost.all(-1))
    assert torch.equal(found.root_depth.isnan(), lost.all(-1))
    assert torch.equal(found.discriminant.isnan(), lost.all(-1))
    found.pose.square().sum().backward()
    for each in (xy, depth):
        assert each.grad.isfinite().all()
        assert (each.grad[lost] == 0).all()
    assert K.grad.isfinite().all()
    assert (K.grad[1, 1] == 0).all()


@pytest.mark.parametrize("why", ["transposed", "zero", "singular", "projective"])
def test_matrices_that_are_no_intrinsics(why: str) -> None:
    scene = weak_scenes.views(0)
    K = scene.K.clone()
    if why == "transposed":
        K = K.mT.contiguous()
    elif why == "zero":
        K.zero_()
    elif why == "singular":
        K[..., 0, 0] = 0
    elif why == "projective":
        K[..., 2, 0] = 1e-3
    K.requires_grad_()
    xy = scene.xy.clone().requires_grad_()
    found = reconstruct_pose(xy, scene.relative_depth, K, pair=PAIR)
    assert found.pose.isnan().all()
    assert not found.valid.any()
    found.pose.nansum().backward()
    assert (xy.grad == 0).all()
    assert (K.grad == 0).all()


@pytest.mark.parametrize("median", [False, True])
def test_derivatives(median: bool) -> None:
    scene = weak_scenes.views(0, batch=1, count=2, skew=True)
    arguments = [x.clone().requires_grad_() for x in (scene.xy, scene.relative_depth, scene.K)]
    mean = losses.mean_limb_lengths(scene.pose, LIMBS, pair=PAIR) * 1.02

    def call(xy: Tensor, depth: Tensor, K: Tensor) -> tuple[Tensor, ...]:
        K = K * torch.tensor([[1.0, 1, 1], [1, 1, 1], [0, 0, 1]], dtype=torch.float64)
        if median:
            found = reconstruct_pose_median(xy, depth, K, limbs=LIMBS, lengths=mean)
        else:
            found = reconstruct_pose(xy, depth, K, pair=PAIR)
        return found[:3]

    assert gradcheck(call, arguments)


def test_autocast_changes_nothing() -> None:
    scene = weak_scenes.views(0)
    arguments = scene.xy.float(), scene.relative_depth.float(), scene.K.float()
    expected = reconstruct_pose(*arguments, pair=PAIR)
    with torch.autocast("cpu", torch.bfloat16):
        found = reconstruct_pose(*arguments, pair=PAIR)
        turned = augmented_intrinsics(arguments[2], rotation_affine(torch.tensor(0.3), SIZE))
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)
    assert turned.dtype == torch.float32
    again = augmented_intrinsics(arguments[2], rotation_affine(torch.tensor(0.3), SIZE))
    assert torch.equal(turned, again)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"xy": torch.zeros(17, 3)}, ValueError, r"xy must be \[\.\.\., J, 2\]"),
        ({"relative_depth": torch.zeros(16)}, ValueError, "with J = 17 as in xy"),
        ({"K": torch.zeros(3, 4)}, ValueError, r"K must be \[\.\.\., 3, 3\]"),
        ({"K": torch.zeros(2, 3, 3), "xy": torch.zeros(3, 17, 2)}, ValueError, "must broadcast"),
        ({"xy": torch.zeros(17, 2).long()}, TypeError, "xy must have a floating-point dtype"),
        ({"pair": (3, 3)}, ValueError, "pair must be two different joint indices from 0 to 16"),
        ({"pair": (0, 17)}, ValueError, "pair must be two different joint indices"),
        ({"length": 0.0}, ValueError, "length must be a number"),
        ({"min_spread": 0.0}, ValueError, "min_spread must be a finite number above 0"),
        ({"min_ratio": 1.0}, ValueError, "min_ratio must be a number from 0 to below 1"),
        ({"depth_range": (5.0, 2.0)}, ValueError, "depth_range must be two numbers"),
    ],
)
def test_arguments_that_do_not_fit(
    change: dict[str, Any], error: type[Exception], words: str
) -> None:
    given = {"xy": torch.zeros(17, 2), "relative_depth": torch.zeros(17), "K": torch.eye(3)}
    given |= {"pair": PAIR, **change}
    with pytest.raises(error, match=words):
        reconstruct_pose(**given)


# ---- Several limbs, and scale ----


def test_median_of_exact_limbs_is_exact() -> None:
    scene = weak_scenes.views(2, skew=True)
    mean = losses.mean_limb_lengths(scene.pose, LIMBS, pair=PAIR)
    found = reconstruct_pose_median(
        scene.xy, scene.relative_depth, scene.K, limbs=LIMBS, lengths=mean
    )
    torch.testing.assert_close(found.root_depth, scene.root_depth)
    torch.testing.assert_close(found.pose, scene.pose)
    assert found.valid.all()
    for limb, length in zip(LIMBS, mean.tolist(), strict=True):
        one = reconstruct_pose_median(
            scene.xy, scene.relative_depth, scene.K, limbs=[limb], lengths=[length], min_ratio=1e-6
        )
        pair = reconstruct_pose(scene.xy, scene.relative_depth, scene.K, pair=limb, length=length)
        for ours, theirs in zip(one, pair, strict=True):
            torch.testing.assert_close(ours[pair.valid], theirs[pair.valid])
        assert one.pose[~pair.valid].isnan().all()


def test_median_resists_a_wrong_torso() -> None:
    scene = weak_scenes.views(2)
    mean = losses.mean_limb_lengths(scene.pose, LIMBS, pair=PAIR)
    depth = scene.relative_depth.clone()
    depth[..., PAIR[0]] += 0.6  # the neck alone
    one = reconstruct_pose(scene.xy, depth, scene.K, pair=PAIR, min_ratio=0.01)
    many = reconstruct_pose_median(scene.xy, depth, scene.K, limbs=LIMBS, lengths=mean)
    errors = [(found.root_depth - scene.root_depth).abs().max() for found in (one, many)]
    assert errors[1] < 0.05
    assert errors[0] > 0.2


def test_median_without_any_limb() -> None:
    scene = weak_scenes.views(2)
    xy = scene.xy.clone()
    xy[0] = torch.nan
    xy[1, 0, :6] = torch.nan
    xy.requires_grad_()
    lengths = torch.full((len(LIMBS),), 0.5, dtype=torch.float64, requires_grad=True)
    found = reconstruct_pose_median(xy, scene.relative_depth, scene.K, limbs=LIMBS, lengths=lengths)
    assert found.valid.tolist() == [[False] * 4, [True] * 4]
    assert found.root_depth[0].isnan().all()
    assert found.pose[0].isnan().all()
    assert found.pose[1, 0, :6].isnan().all()
    found.pose.nansum().backward()
    assert xy.grad.isfinite().all()
    assert (xy.grad[0] == 0).all()
    assert lengths.grad.isfinite().all()


def test_absolute_scale() -> None:
    scene = weak_scenes.views(1)
    mean = losses.mean_limb_lengths(scene.camera_mm, LIMBS)
    scale = absolute_scale(scene.pose, None, mean, LIMBS)
    torch.testing.assert_close(scale[..., None, None] * scene.pose, scene.camera_mm)
    # The least squares of any lengths and weights.
    generator = torch.Generator().manual_seed(0)
    lengths = weak_scenes.uniform(generator, 50, 500, len(LIMBS))
    phi = weak_scenes.uniform(generator, 0, 1, 2, 4, 17)
    scale = absolute_scale(scene.pose, phi, lengths, LIMBS)
    i, j = (torch.tensor([limb[end] for limb in LIMBS]) for end in (0, 1))
    l = (scene.pose[..., i, :] - scene.pose[..., j, :]).norm(dim=-1)
    w = (phi[..., i] * phi[..., j]).sqrt()
    expected = torch.linalg.lstsq((w * l)[..., None], (w * lengths)[..., None]).solution
    torch.testing.assert_close(scale, expected[..., 0, 0])
    assert torch.equal(scale, absolute_scale(scene.pose, phi, lengths.tolist(), LIMBS))


def test_absolute_scale_of_what_is_missing() -> None:
    pose = weak_scenes.views(1).pose.clone()
    pose[0, 0, 4], pose[0, 1], pose[0, 2] = torch.nan, torch.nan, 1.0
    phi = torch.ones(2, 4, 17, dtype=torch.float64)
    phi[0, 3, 2] = -1
    phi[1, 0] = 0
    pose.requires_grad_()
    scale = absolute_scale(pose, phi, [100.0] * len(LIMBS), LIMBS)
    assert scale.isnan().tolist() == [[False, True, True, True], [True, False, False, False]]
    scale.nansum().backward()
    assert pose.grad.isfinite().all()
    assert (pose.grad[0, 1:] == 0).all()
