# SPDX-License-Identifier: Apache-2.0
"""The 2.5D network: definitions, absent views, gradients, compilers, and depth from views."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import weak_scenes
from torch import Tensor, nn
from torch.autograd import gradcheck
from weak_scenes import PAIR, PELVIS
from weak_study import FIRM, LIMBS, PRIOR, Direct, errors, gaussians, written

from tritool import losses
from tritool.models import PoseResNet, weak25d
from tritool.models.pose_resnet import PoseResNetOutput
from tritool.models.reconstruct import reconstruct_pose
from tritool.models.weak25d import WeaklySupervisedPose, WeakOutput
from tritool.ops import soft_argmax25d

# ---- The network ----

K128 = torch.tensor([[300.0, 0, 60], [0, 310, 50], [0, 0, 1]])


def tiny(**settings: Any) -> WeaklySupervisedPose:
    """Not trained, but with maps that say something: peaks near 1 and depths."""
    torch.manual_seed(0)
    options = {"width": 4, "deconv_channels": 6, "min_ratio": 1e-6, "depth_range": None}
    network = WeaklySupervisedPose(17, 18, **{**options, **settings})
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, mean=0.1, std=0.2)
        norm.momentum = 1.0
    nn.init.normal_(network.backbone.final_layer.weight, std=0.3)
    with torch.no_grad():
        network.train()(images(4), K128)
    for norm in norms:
        norm.momentum = 0.1
    return network.eval()


def images(*batch: int, height: int = 64, width: int = 96) -> Tensor:
    return torch.randn(*batch, 3, height, width, generator=torch.Generator().manual_seed(1))


def tensors(output: WeakOutput) -> dict[str, Tensor]:
    return dict(vars(output))


def test_outputs_and_their_definitions() -> None:
    network, x = tiny(), images(2, 3)
    intrinsics = K128 + torch.rand(2, 3, 1, 1) * torch.tensor([[9.0, 0, 5], [0, 9, 5], [0, 0, 0]])
    output = network(x, intrinsics)
    maps = network.backbone(x).heatmaps
    assert maps.shape == (2, 3, 34, 16, 24)
    torch.testing.assert_close(output.heatmaps, maps[:, :, :17])
    torch.testing.assert_close(output.depth_maps, maps[:, :, 17:])
    read = soft_argmax25d(maps[:, :, :17], maps[:, :, 17:], inverse_temperature=20.0)
    torch.testing.assert_close(output.keypoints_2d, (read[..., :2] + 0.5) * 4 - 0.5)
    torch.testing.assert_close(output.relative_depth, read[..., 2] - read[..., :1, 2])
    assert (output.relative_depth[..., PELVIS] == 0).all()
    found = reconstruct_pose(output.keypoints_2d, output.relative_depth, intrinsics, pair=PAIR)
    for name in ("pose", "root_depth", "discriminant", "valid"):
        assert torch.equal(getattr(output, name), getattr(found, name)), name
    assert output.keypoints_3d is output.pose
    assert output.valid.any()
    bone = (output.pose[..., PAIR[0], :] - output.pose[..., PAIR[1], :]).norm(dim=-1)
    torch.testing.assert_close(bone[output.valid], torch.ones_like(bone[output.valid]))


def test_confidences_are_heat_maps_between_cells() -> None:
    network = tiny()
    output = network(images(2, 3), K128)
    cells = (output.keypoints_2d.detach() + 0.5) / 4 - 0.5
    maps = output.heatmaps.detach().flatten(0, 2)[:, None]
    grid = (2 * cells + 1) / torch.tensor([24.0, 16.0]) - 1
    expected = nn.functional.grid_sample(
        maps, grid.reshape(-1, 1, 1, 2), padding_mode="border", align_corners=False
    )
    expected = expected.reshape(2, 3, 17).clamp(0, 1)
    assert 0 < expected.mean() < 1
    torch.testing.assert_close(output.confidences, expected, rtol=1e-4, atol=1e-4)
    assert not output.confidences.requires_grad


def peaks(*cells: tuple[int, int], height: int = 16, width: int = 24) -> Tensor:
    """A map with peaks at (x, y), before a softmax of temperature 1/20."""
    result = torch.zeros(height, width)
    for x, y in cells:
        result[y, x] = 1.0
    return result


def spoken(network: WeaklySupervisedPose, maps: Tensor) -> None:
    """Lets the first heat map of every image be this one."""

    def instead(module: nn.Module, given: object, found: PoseResNetOutput) -> PoseResNetOutput:
        heatmaps = found.heatmaps.clone()
        heatmaps[..., 0, :, :] = maps
        return found._replace(heatmaps=heatmaps)

    network.backbone.register_forward_hook(instead)


def test_the_mass_near_a_joint_by_loops() -> None:
    network = tiny(confidence="mass", inverse_temperature=3.0)
    output = network(images(1, 2), K128)
    cells = (output.keypoints_2d.detach().double() + 0.5) / 4 - 0.5
    logits = 3.0 * output.heatmaps.detach().double()
    for view in range(2):
        for joint in range(0, 17, 4):
            powers = (logits[0, view, joint] - logits[0, view, joint].max()).exp()
            x, y = cells[0, view, joint].tolist()
            expected = 0.0
            for row in range(16):
                for column in range(24):
                    # All of a cell whose centre is at most 1.5 away, nothing beyond 2.5.
                    near = [min(max(2.5 - abs(d), 0), 1) for d in (column - x, row - y)]
                    expected += near[0] * near[1] * float(powers[row, column] / powers.sum())
            assert output.confidences[0, view, joint].item() == pytest.approx(expected, abs=1e-5)
    assert 0.01 < output.confidences.mean() < 0.9
    assert not output.confidences.requires_grad


@pytest.mark.parametrize(
    ("maps", "low", "high"),
    [
        (peaks((15, 3)), 0.999, 1.0),
        (peaks((23, 15)), 0.999, 1.0),  # in a corner
        (peaks((3, 3), (19, 3)), 0.0, 1e-3),
        (peaks((12, 2), (12, 13)), 0.0, 1e-3),
        (peaks((11, 8), (13, 8)), 0.999, 1.0),
        (peaks(), 0.03, 0.1),  # 25 of 384 cells
        (peaks((15, 3)) * torch.nan, 0.0, 0.0),
        (peaks((15, 3)) - 1e3, 0.999, 1.0),  # of any height
    ],
)
def test_mass_of_peaks(maps: Tensor, low: float, high: float) -> None:
    network = tiny(confidence="mass")
    spoken(network, maps)
    confidences = network(images(1, 2), K128).confidences
    assert (confidences[..., 0] >= low).all()
    assert (confidences[..., 0] <= high).all()
    assert confidences.isfinite().all()


def test_mass_follows_the_learned_temperature_and_absent_views() -> None:
    network, views = (
        tiny(confidence="mass", learnable_temperature=True),
        torch.tensor([True, False]),
    )
    before = network(images(2), K128, views=views).confidences
    assert (before[1] == 0).all()
    assert (before[0] > 0).all()
    with torch.no_grad():
        network.log_temperature_factor[:5] += math.log(3)
    after = network(images(2), K128, views=views).confidences
    hot = tiny(confidence="mass", inverse_temperature=60.0)(images(2), K128).confidences
    torch.testing.assert_close(after[0, :5], hot[0, :5])
    assert torch.equal(after[:, 5:], before[:, 5:])


def test_mass_is_not_rounded_under_autocast() -> None:
    maps = 3 * torch.randn(5, 16, 24, generator=torch.Generator().manual_seed(0))
    probabilities = maps.flatten(-2).softmax(-1).reshape(maps.shape)
    points = torch.tensor([[7.2, 5.1]]).expand(5, 2)
    expected = weak25d._mass_near(probabilities, points)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(weak25d._mass_near(probabilities, points), expected)


def test_batch_dimensions_lead_and_images_do_not_mix() -> None:
    network, x = tiny(), images(2, 3)
    together = tensors(network(x, K128))
    flat = tensors(network(x.flatten(0, 1), K128.expand(6, 3, 3)))
    for name, value in together.items():
        torch.testing.assert_close(flat[name], value.flatten(0, 1), msg=name, equal_nan=True)
    shuffled = tensors(network(x.flip(1), K128))
    for name, value in together.items():
        torch.testing.assert_close(shuffled[name].flip(1), value, msg=name, equal_nan=True)
    empty = network(x[:, :0], K128)
    assert empty.pose.shape == (2, 0, 17, 3)


def test_a_masked_view_is_a_view_left_out() -> None:
    network, x = tiny(), images(2, 3)
    K = K128.expand(2, 3, 3, 3).clone()
    expected = tensors(network(x[:, [0, 2]], K[:, [0, 2]]))
    x[:, 1], K[:, 1] = torch.nan, torch.nan
    x.requires_grad_()
    views = torch.tensor([True, False, True]).expand(2, 3)
    output = network(x, K, views=views)
    for name, value in expected.items():
        torch.testing.assert_close(getattr(output, name)[:, [0, 2]], value, msg=name)
    for absent in (output.keypoints_2d, output.relative_depth, output.pose, output.root_depth):
        assert absent[:, 1].isnan().all()
    assert (output.confidences[:, 1] == 0).all()
    assert not output.valid[:, 1].any()
    loss = losses.weak_total(
        losses.WeakLossSettings(floor=0.0),
        heatmaps=output.heatmaps,
        target=output.keypoints_2d.detach() / 4,
        poses=output.pose,
        confidences=output.confidences,
        valid=output.valid,
        mean_lengths=[0.5] * len(LIMBS),
        limbs=LIMBS,
    )
    assert loss.total > 0
    loss.total.backward()
    assert x.grad.isfinite().all()
    assert (x.grad[:, 1] == 0).all()
    for name, parameter in network.named_parameters():
        assert parameter.grad.isfinite().all(), name


def test_state_and_settings() -> None:
    network = WeaklySupervisedPose(17, 18, width=4, deconv_channels=6)
    assert (network.root, network.pair) == (PELVIS, PAIR)
    assert {name.split(".")[0] for name in network.state_dict()} == {"backbone"}
    backbone = PoseResNet(18, 34, width=4, deconv_channels=6, algebraic_confidences=True)
    other = WeaklySupervisedPose(backbone=backbone)
    assert other.backbone is backbone
    frozen = {n.split(".")[1] for n, p in other.named_parameters() if not p.requires_grad}
    assert frozen == {"alg_confidences"}
    other.load_state_dict(network.state_dict(), strict=False)
    few = WeaklySupervisedPose(3, 18, root=1, pair=(0, 2), width=4, deconv_channels=6)
    assert few.eval()(images(1), K128).relative_depth[0, 1] == 0


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"num_joints": 16}, ValueError, "root must be given unless num_joints is 17, got 16"),
        ({"num_joints": 16, "root": 0}, ValueError, "pair must be given"),
        ({"num_joints": 1}, ValueError, "num_joints must be at least 2"),
        ({"root": 17}, ValueError, "root must be a joint from 0 to 16"),
        ({"pair": (2, 2)}, ValueError, "pair must be two different"),
        ({"length": -1.0}, ValueError, "length must be a number"),
        ({"min_ratio": 2.0}, ValueError, "min_ratio must be"),
        ({"inverse_temperature": 0.0}, ValueError, "inverse_temperature must be"),
        ({"confidence": "height"}, ValueError, "confidence must be one of 'peak', 'mass', got"),
        ({"backbone": PoseResNet(18, 17, width=4)}, ValueError, "must have num_joints = 34"),
        ({"backbone": nn.Identity()}, TypeError, "backbone must be a PoseResNet"),
    ],
)
def test_settings_that_do_not_fit(
    settings: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        WeaklySupervisedPose(**{"depth": 18, "width": 4, "deconv_channels": 6, **settings})


@pytest.mark.parametrize(
    ("x", "K", "views", "error", "words"),
    [
        (torch.zeros(1, 3, 64, 96).byte(), K128, None, TypeError, "images must be floating-point"),
        (torch.zeros(1, 3, 60, 96), K128, None, ValueError, "multiples of 32"),
        (torch.zeros(1, 3, 64, 96), K128[:2], None, ValueError, "intrinsics must be"),
        (torch.zeros(1, 3, 64, 96), K128.expand(2, 3, 3), None, ValueError, "intrinsics must be"),
        (torch.zeros(1, 3, 64, 96), K128.half(), None, TypeError, "float32 or float64"),
        (torch.zeros(1, 3, 64, 96), K128, torch.ones(1), TypeError, "views must be a boolean"),
        (
            torch.zeros(1, 3, 64, 96),
            K128,
            torch.ones(2).bool(),
            ValueError,
            r"views must be \(1,\)",
        ),
    ],
)
def test_inputs_that_do_not_fit(
    x: Tensor, K: Tensor, views: Tensor | None, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        tiny()(x, K, views=views)


def test_temperature_can_be_learned() -> None:
    network, x = tiny(learnable_temperature=True), images(2)
    plain = tiny()
    for name, value in tensors(plain(x, K128)).items():
        torch.testing.assert_close(getattr(network(x, K128), name), value, msg=name)
    with torch.no_grad():
        network.log_temperature_factor += math.log(3)
    hot = tiny(inverse_temperature=60.0)
    output = network(x, K128)
    torch.testing.assert_close(output.keypoints_2d, hot(x, K128).keypoints_2d)
    output.pose.square().mean().backward()
    assert network.log_temperature_factor.grad.ne(0).all()


def test_the_default_temperature_reads_gaussians() -> None:
    """What the heat-map loss asks for is read where it is: 0.05 cells, not 0.3 as at 100."""
    generator = torch.Generator().manual_seed(0)
    target = weak_scenes.uniform(generator, 8, 40, 500, 2)
    maps = gaussians(target, (48, 64))
    default = WeaklySupervisedPose(17, 18, width=4, deconv_channels=4).inverse_temperature
    for alpha, low, high in ((default, 0.0, 0.05), (100.0, 0.25, 0.5)):
        read = soft_argmax25d(maps, torch.zeros_like(maps), inverse_temperature=alpha)
        worst = (read[..., :2] - target).abs().max()
        assert low <= worst < high


def test_gradients_from_the_pose_reach_every_parameter() -> None:
    network, x = tiny(), images(2, 2).requires_grad_()
    output = network(x, K128)
    (output.pose * torch.linspace(-1, 1, 51).reshape(17, 3)).sum().backward()
    for name, tensor in [("images", x), *network.named_parameters()]:
        assert tensor.grad.isfinite().all(), name
        assert tensor.grad.ne(0).any(), name


def test_derivatives_of_the_network() -> None:
    torch.manual_seed(0)
    network = tiny(width=2, deconv_channels=2, inverse_temperature=3.0).double()
    K = K128.double()
    x = images(2, height=32, width=64).double().requires_grad_()
    mean = [0.5] * len(LIMBS)

    def call(x: Tensor) -> Tensor:
        output = network(x[None], K)
        phi = torch.ones_like(output.relative_depth)
        loss = losses.weak_total(
            losses.WeakLossSettings(through_transform=True, norm="l2"),
            heatmaps=output.heatmaps,
            target=torch.full_like(output.keypoints_2d, 3.0),
            poses=output.pose,
            confidences=phi,
            valid=output.valid,
            mean_lengths=mean,
            limbs=LIMBS,
        )
        return torch.stack([loss.heatmaps, loss.consistency, loss.limb_lengths])

    assert (call(x) > 0).all()
    assert gradcheck(call, (x,), fast_mode=True, eps=1e-7, atol=1e-3, rtol=1e-2)


def test_autocast() -> None:
    network, x = tiny(), images(1, 2)
    with torch.autocast("cpu", torch.bfloat16):
        output = network(x, K128)
    for name, value in tensors(output).items():
        assert value.dtype == (torch.bool if name == "valid" else torch.float32), name
        assert value.isfinite().all(), name
    bone = (output.pose[..., PAIR[0], :] - output.pose[..., PAIR[1], :]).norm(dim=-1)
    torch.testing.assert_close(bone[output.valid], torch.ones_like(bone[output.valid]))


def test_compile_and_export() -> None:
    torch._dynamo.reset()
    network, x = tiny(), images(1, 2)
    views = torch.tensor([[True, False]])
    expected = tensors(network(x, K128, views=views))
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        found = [compiled(x, K128, views=views)]
    program = torch.export.export(network, (x, K128), {"views": views})
    found.append(program.module()(x, K128, views=views))
    for output in found:
        assert isinstance(output, WeakOutput)
        for name, value in tensors(output).items():
            torch.testing.assert_close(
                value, expected[name], rtol=1e-3, atol=1e-3, equal_nan=True, msg=name
            )


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_nothing_waits_for_the_device() -> None:
    network, x = tiny().cuda(), images(1, 3).cuda()
    K, views = K128.cuda(), torch.tensor([[True, True, False]]).cuda()
    mean = torch.full((len(LIMBS),), 0.5).cuda()
    expected = tiny()(images(1, 3), K128, views=views.cpu())
    for _ in range(2):  # the first round compiles and allocates
        torch.cuda.set_sync_debug_mode("error")
        try:
            output = network(x, K, views=views)
            loss = losses.weak_total(
                losses.WeakLossSettings(bending=1.0),
                heatmaps=output.heatmaps,
                target=output.keypoints_2d.detach() / 4,
                poses=output.pose,
                confidences=output.confidences,
                valid=output.valid,
                mean_lengths=mean,
                limbs=LIMBS,
            )
            loss.total.backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(
        output.keypoints_2d.cpu(), expected.keypoints_2d, rtol=1e-2, atol=1e-2, equal_nan=True
    )


# ---- Learning depth from views ----


@pytest.mark.parametrize("seed", [0, 1])
def test_views_teach_depth_from_nearby(seed: int) -> None:
    scene = weak_scenes.views(seed)
    depth, loss = Direct(seed, scene.relative_depth, scene).descend((400, FIRM))
    right, reversed_ = errors(depth, scene)
    assert (right < 0.05).all()  # from 0.17 to 0.20
    assert (reversed_ > 0.4).all()
    assert loss < 0.15


@pytest.mark.parametrize("seed", [0, 1])
def test_the_reversed_basin_is_a_trap(seed: int) -> None:
    """Cameras at 2 to 3 m do not lead out of it: a sign has to come from elsewhere."""
    scene = weak_scenes.views(seed)
    depth, _ = Direct(seed, -scene.relative_depth, scene).descend((400, FIRM))
    right, reversed_ = errors(depth, scene)
    assert (reversed_ < 0.25).all()
    assert (right > 0.4).all()


@pytest.mark.parametrize("seed", [0, 1])
def test_knees_first_choose_the_right_basin(seed: int) -> None:
    """From flat poses: the bending prior alone for a while, then the views without it."""
    scene = weak_scenes.views(seed, batch=4)
    flat = torch.zeros_like(scene.relative_depth)
    depth, _ = Direct(seed, flat, scene).descend((100, PRIOR), (300, FIRM))
    right, reversed_ = errors(depth, scene)
    assert (right < reversed_).all()
    assert right.median() < 0.2


def test_the_page_has_the_tables_of_the_study() -> None:
    """Same lines and columns; the figures themselves take minutes."""
    page = (Path(__file__).parents[1] / "docs" / "weak_supervision.md").read_text()
    for name, lines in written(seeds=1, steps=4).items():
        (body,) = re.findall(rf"(?s)<!-- study:{name} -->\n(.*?)\n<!-- study:end -->", page)
        assert [line.split("|")[1] for line in body.splitlines()] == [
            line.split("|")[1] for line in lines
        ]


def test_held_joints_have_no_gradient_from_the_pose() -> None:
    torch.manual_seed(0)
    network = WeaklySupervisedPose(17, 18, width=4, deconv_channels=8).eval()
    images = torch.randn(2, 3, 32, 64)
    K = torch.tensor([[60.0, 0, 32], [0, 60, 16], [0, 0, 1]])
    free, held = network(images, K), network(images, K, hold_2d=True)
    for name in ("keypoints_2d", "relative_depth", "pose", "heatmaps"):
        assert torch.equal(getattr(free, name), getattr(held, name))
    final = network.backbone.final_layer.weight
    for output, moves in ((free, True), (held, False)):
        (grad,) = torch.autograd.grad(
            output.relative_depth.square().sum(), final, retain_graph=True
        )
        assert bool(grad[:17].any()) == moves
        assert grad[17:].any()
    (grad,) = torch.autograd.grad(held.pose.square().sum(), final, retain_graph=True)
    assert not grad[:17].any()
    (grad,) = torch.autograd.grad(held.heatmaps.square().sum(), final)
    assert grad[:17].any()
