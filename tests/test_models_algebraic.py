# SPDX-License-Identifier: Apache-2.0
"""Algebraic triangulation: heat maps to joints, confidences, absent views, laws, compilers."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import rigs
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tritool import ops
from tritool.models import (
    AlgebraicOutput,
    AlgebraicTriangulation,
    PoseResNet,
    PoseResNetOutput,
    normalize_images,
)

HEIGHT, WIDTH = 128, 160
JOINTS = 5


class Painted(PoseResNet):
    """A backbone whose heat maps and confidences are given."""

    def __init__(self, heatmaps: Tensor, confidences: Tensor | None = None) -> None:
        joints = heatmaps.shape[2]
        super().__init__(18, joints, algebraic_confidences=True, width=4, deconv_channels=6)
        self.heatmaps, self.confidences = heatmaps, confidences

    def forward(self, images: Tensor) -> PoseResNetOutput:
        return PoseResNetOutput(self.heatmaps, self.heatmaps, self.confidences, None)


def projections_of(batch: int, views: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Cameras in a ring, another height for each scene, `[B, C, 3, 4]`."""
    scenes = [
        rigs.ring(views, height=1500.0 + 100 * b, focal=150.0, image_size=(WIDTH, HEIGHT))
        for b in range(batch)
    ]
    rows = [torch.from_numpy(rig.projections).to(dtype) for rig in scenes]
    return torch.stack(rows) if rows else torch.empty(0, views, 3, 4, dtype=dtype)


def people(batch: int, joints: int = JOINTS) -> Tensor:
    """Joints around the middle of the ring, `[B, J, 3]`, float64."""
    generator = torch.Generator().manual_seed(0)
    spread = torch.rand(batch, joints, 3, generator=generator, dtype=torch.float64) - 0.5
    return 1000 * spread + torch.tensor([0.0, 0.0, 950.0])


def exact_heatmaps(pixels: Tensor, *, official: bool = False) -> Tensor:
    """Maps whose soft-argmax at inverse temperature 100 is exactly at image pixels `[..., 2]`.

    All is masked but the four cells around, in which the softmax has the bilinear weights.
    """
    cells = pixels / 4 if official else (pixels + 0.5) / 4 - 0.5
    heatmaps = pixels.new_full((*pixels.shape[:-1], HEIGHT // 4, WIDTH // 4), -torch.inf)
    for index in torch.cartesian_prod(*map(torch.arange, pixels.shape[:-1])).tolist():
        x, y = cells[tuple(index)].tolist()
        for row in (int(y), int(y) + 1):
            for column in (int(x), int(x) + 1):
                weight = (1 - abs(x - column)) * (1 - abs(y - row))
                heatmaps[(*index, row, column)] = math.log(weight) / 100
    return heatmaps


def painted(
    truth: Tensor, projections: Tensor, confidences: Tensor | None = None, **options: Any
) -> AlgebraicTriangulation:
    """A network that sees these joints exactly."""
    pixels = ops.project(truth, projections[:, None]).transpose(1, 2)
    heatmaps = exact_heatmaps(pixels, official=options.get("official_conventions", False))
    options.setdefault("use_confidences", confidences is not None)
    return AlgebraicTriangulation(
        truth.shape[1], backbone=Painted(heatmaps, confidences), **options
    ).eval()


def small(dtype: torch.dtype = torch.float64, **options: Any) -> AlgebraicTriangulation:
    """A narrow network whose outputs differ from place to place and from view to view."""
    torch.manual_seed(0)
    settings = {"inverse_temperature": 3.0, "width": 4, "deconv_channels": 6, **options}
    network = AlgebraicTriangulation(JOINTS, 18, **settings)
    nn.init.normal_(network.backbone.final_layer.weight, std=0.3)
    if network.use_confidences:
        # Larger ones saturate the sigmoid: all views alike.
        nn.init.normal_(network.backbone.alg_confidences.head[-1].weight, std=0.01)
    return network.eval().to(dtype)


def images(batch: int, views: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, views, 3, HEIGHT, WIDTH, generator=generator, dtype=dtype)


def fields(output: AlgebraicOutput) -> list[Tensor]:
    return [output.keypoints_3d, output.keypoints_2d, output.heatmaps, output.confidences]


def same(ours: AlgebraicOutput, theirs: AlgebraicOutput, **tolerance: float) -> None:
    for a, b in zip(fields(ours), fields(theirs), strict=True):
        torch.testing.assert_close(a, b, equal_nan=True, **(tolerance or {}))


# ---- From heat maps to joints ----


@pytest.mark.parametrize("official", [False, True])
def test_exact_maps_give_the_exact_joints(official: bool) -> None:
    projections, truth = projections_of(2, 3, torch.float64), people(2)
    network = painted(truth, projections, official_conventions=official)
    output = network(images(2, 3), projections)
    assert output.keypoints_3d.shape == (2, JOINTS, 3)
    assert output.keypoints_2d.shape == (2, 3, JOINTS, 2)
    assert output.heatmaps.shape == (2, 3, JOINTS, HEIGHT // 4, WIDTH // 4)
    assert output.confidences.shape == (2, 3, JOINTS)
    pixels = ops.project(truth, projections[:, None]).transpose(1, 2)
    torch.testing.assert_close(output.keypoints_2d, pixels, rtol=0, atol=1e-9)
    torch.testing.assert_close(output.keypoints_3d, truth, rtol=0, atol=1e-6)


def test_cells_are_centred_between_pixels_or_as_in_the_official_code() -> None:
    heatmaps = torch.zeros(1, 2, JOINTS, HEIGHT // 4, WIDTH // 4)
    heatmaps[..., 11, 23] = 1
    for official, pixel in ((False, (93.5, 45.5)), (True, (92.0, 44.0))):
        network = AlgebraicTriangulation(
            JOINTS,
            use_confidences=False,
            inverse_temperature=1000.0,
            backbone=Painted(heatmaps),
            official_conventions=official,
        )
        output = network(images(1, 2, torch.float32), projections_of(1, 2))
        expected = torch.tensor(pixel).expand(1, 2, JOINTS, 2)
        torch.testing.assert_close(output.keypoints_2d, expected)
    # The images need not be four times the maps.
    blurred = images(1, 2, torch.float32)[..., ::2, :]
    network.official_conventions = False
    expected = torch.tensor([93.5, 22.5]).expand(1, 2, JOINTS, 2)
    torch.testing.assert_close(network(blurred, projections_of(1, 2)).keypoints_2d, expected)


def test_confidences_are_shares_and_a_little_more() -> None:
    projections, truth = projections_of(2, 4, torch.float64), people(2)
    raw = torch.rand(2, 4, JOINTS, generator=torch.Generator().manual_seed(2)).double()
    views = torch.tensor([[True, True, False, True], [True, True, True, True]])
    output = painted(truth, projections, raw)(images(2, 4), projections, views=views)
    for b in range(2):
        for j in range(JOINTS):
            total = sum(raw[b, c, j] for c in range(4) if views[b, c])
            for c in range(4):
                expected = raw[b, c, j] / total + 1e-5 if views[b, c] else torch.zeros(())
                torch.testing.assert_close(output.confidences[b, c, j], expected.double())
    plain = painted(truth, projections)(images(2, 4), projections, views=views)
    expected = torch.tensor([[1 / 3, 1 / 3, -1e-5, 1 / 3], [0.25] * 4]).double() + 1e-5
    torch.testing.assert_close(plain.confidences, expected[..., None].expand(-1, -1, JOINTS))
    # All confidences may underflow; then all views count alike.
    output = painted(truth, projections, torch.zeros_like(raw))(images(2, 4), projections)
    torch.testing.assert_close(output.confidences, torch.full_like(raw, 1e-5))
    torch.testing.assert_close(output.keypoints_3d, truth, rtol=0, atol=1e-6)


def test_the_triangulation_is_weighted_by_the_confidences() -> None:
    projections, truth = projections_of(1, 4, torch.float64), people(1)
    raw = torch.ones(1, 4, JOINTS).double()
    raw[:, 2] = 1e-9
    network = painted(truth, projections, raw)
    # One view sees something else.
    network.backbone.heatmaps[:, 2] = network.backbone.heatmaps[:, 1].roll(9, -1)
    wrong = network(images(1, 4), projections).keypoints_3d - truth
    network.backbone.confidences = torch.ones_like(raw)
    worse = network(images(1, 4), projections).keypoints_3d - truth
    assert wrong.norm(dim=-1).max() < 1e-3
    assert worse.norm(dim=-1).min() > 10


# ---- Laws ----


@pytest.mark.parametrize("use_confidences", [True, False])
def test_an_absent_view_is_a_view_left_out(use_confidences: bool) -> None:
    network = small(use_confidences=use_confidences)
    x, projections = images(2, 4), projections_of(2, 4, torch.float64)
    views = torch.tensor([[True, False, True, True], [False, True, True, True]])
    # What is there in place of a view has no meaning.
    x[~views], projections[~views] = torch.nan, torch.inf
    output = network(x, projections, views=views)
    for b in range(2):
        alone = network(x[b, views[b]][None], projections[b, views[b]][None])
        torch.testing.assert_close(output.keypoints_3d[b], alone.keypoints_3d[0])
        torch.testing.assert_close(output.keypoints_2d[b, views[b]], alone.keypoints_2d[0])
        torch.testing.assert_close(output.confidences[b, views[b]], alone.confidences[0])
    assert output.keypoints_2d[~views].isnan().all()
    assert output.confidences[~views].eq(0).all()
    assert output.heatmaps.isfinite().all()


def test_all_views_present_is_no_mask() -> None:
    network, x, projections = small(), images(2, 3), projections_of(2, 3, torch.float64)
    same(network(x, projections, views=torch.ones(2, 3).bool()), network(x, projections))


def test_the_order_of_views_does_not_matter() -> None:
    network, x, projections = small(), images(2, 4), projections_of(2, 4, torch.float64)
    order = [2, 0, 3, 1]
    expected = network(x, projections)
    output = network(x[:, order], projections[:, order])
    torch.testing.assert_close(output.keypoints_3d, expected.keypoints_3d)
    torch.testing.assert_close(output.confidences, expected.confidences[:, order])


def test_samples_do_not_meet() -> None:
    network, x, projections = small(), images(3, 3), projections_of(3, 3, torch.float64)
    expected = network(x, projections)
    for b in range(3):
        alone = network(x[b : b + 1], projections[b : b + 1])
        same(alone, AlgebraicOutput(*(field[b : b + 1] for field in fields(expected))))


def rotation() -> Tensor:
    q, r = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(3)).double())
    q = q * r.diagonal().sign()
    return q * q.det()


def test_the_world_turned_about_its_origin_turns_the_joints() -> None:
    network, x, projections = small(), images(2, 4), projections_of(2, 4, torch.float64)
    turn = rotation()
    turned = torch.cat([projections[..., :3] @ turn.T, projections[..., 3:]], -1)
    expected = network(x, projections).keypoints_3d @ turn.T
    # The rays do not meet: the network knows nothing.
    torch.testing.assert_close(network(x, turned).keypoints_3d, expected, rtol=1e-7, atol=1e-5)


def test_the_world_moved_moves_the_joints() -> None:
    # Where the rays meet; the homogeneous solution of others depends on the origin.
    projections, truth = projections_of(2, 4, torch.float64), people(2)
    turn, shift = rotation(), torch.tensor([300.0, -2000.0, 900.0]).double()
    network = painted(truth, projections, torch.rand(2, 4, JOINTS).double() + 0.1)
    turned = projections[..., :3] @ turn.T
    moved = torch.cat([turned, projections[..., 3:] - (turned @ shift)[..., None]], -1)
    output = network(images(2, 4), moved).keypoints_3d
    torch.testing.assert_close(output, truth @ turn.T + shift, rtol=0, atol=1e-6)


# ---- Degenerate input ----


def test_one_view_or_none_is_nan_without_gradient() -> None:
    network, projections = small(), projections_of(2, 3, torch.float64)
    assert network(images(2, 1), projections[:, :1]).keypoints_3d.isnan().all()
    views = torch.tensor([[False, False, False], [True, True, True]])
    x = images(2, 3).requires_grad_()
    output = network(x, projections, views=views)
    assert output.keypoints_3d[0].isnan().all()
    assert output.keypoints_3d[1].isfinite().all()
    assert output.confidences[0].eq(0).all()
    output.keypoints_3d.backward(torch.full((2, JOINTS, 3), 1.0).double())
    assert x.grad[0].eq(0).all()
    assert x.grad[1].ne(0).any()
    assert all(p.grad.isfinite().all() for p in network.parameters())


def test_a_sample_that_is_nan_spoils_no_other() -> None:
    network, x, projections = small(), images(3, 3), projections_of(3, 3, torch.float64)
    expected = network(x, projections)
    x[1, 2], projections[2, 0] = torch.nan, torch.nan
    output = network(x, projections)
    assert output.keypoints_3d[1:].isnan().all()
    torch.testing.assert_close(output.keypoints_3d[0], expected.keypoints_3d[0])


def test_no_samples() -> None:
    output = small()(images(0, 3), projections_of(0, 3, torch.float64))
    assert output.keypoints_3d.shape == (0, JOINTS, 3)
    assert output.keypoints_2d.shape == (0, 3, JOINTS, 2)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"images": torch.zeros(2, 3, HEIGHT, WIDTH)}, ValueError, r"images must be \[B, C, 3"),
        ({"images": torch.zeros(2, 0, 3, HEIGHT, WIDTH)}, ValueError, "at least one view"),
        ({"images": torch.zeros(2, 3, 3, 64, 96)}, ValueError, "H and W at least 128"),
        ({"images": torch.zeros(2, 3, 3, 128, 160).byte()}, TypeError, "normalize_images"),
        ({"images": [1]}, TypeError, "images must be a tensor, got list"),
        ({"projections": torch.zeros(2, 4, 3, 4)}, ValueError, "C = 3 as in images"),
        ({"projections": torch.zeros(3, 4)}, ValueError, r"got \(3, 4\)"),
        ({"projections": torch.zeros(2, 3, 3, 4).half()}, TypeError, "float32 or float64"),
        ({"projections": torch.zeros(2, 3, 3, 4, device="meta")}, ValueError, "on the device of"),
        ({"views": torch.ones(2, 3)}, TypeError, r"views must be boolean, got torch\.float32"),
        ({"views": torch.ones(3).bool()}, ValueError, r"views must be \[B, C\] with B = 2"),
        ({"views": True}, TypeError, "views must be a tensor or None, got bool"),
    ],
)
def test_input_that_does_not_fit(change: dict[str, Any], error: type, words: str) -> None:
    good = {"images": images(2, 3, torch.float32), "projections": projections_of(2, 3)}
    network = small(torch.float32)
    network(**good)
    with pytest.raises(error, match=words):
        network(**{**good, **change})


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"inverse_temperature": 0.0}, ValueError, "inverse_temperature must be a finite number"),
        ({"inverse_temperature": float("nan")}, ValueError, "got nan"),
        ({"depth": 20}, ValueError, "depth must be one of"),
        ({"backbone": nn.Identity()}, TypeError, "must be a PoseResNet or None, got Identity"),
        ({"backbone": PoseResNet(18, 4, width=2)}, ValueError, "num_joints = 17, got 4"),
        ({"backbone": PoseResNet(18, 17, width=2)}, ValueError, "algebraic_confidences=True"),
    ],
)
def test_settings_that_do_not_fit(settings: dict[str, Any], error: type, words: str) -> None:
    with pytest.raises(error, match=words):
        AlgebraicTriangulation(**settings)


# ---- Training ----


def test_no_parameter_waits_for_a_gradient() -> None:
    backbone = PoseResNet(
        18, JOINTS, algebraic_confidences=True, volumetric_confidences=3, width=4, deconv_channels=6
    )
    for use_confidences in (True, False):
        network = AlgebraicTriangulation(
            JOINTS, use_confidences=use_confidences, backbone=copy.deepcopy(backbone)
        )
        output = network(images(2, 3, torch.float32), projections_of(2, 3))
        output.keypoints_3d.square().mean().backward()
        for name, parameter in network.named_parameters():
            used = "vol_" not in name and (use_confidences or "alg_" not in name)
            assert parameter.requires_grad == used, name
            assert (parameter.grad is not None) == used, name


def test_absent_images_reach_batch_norm_as_blanks() -> None:
    network, x = small().train(), images(2, 3)
    views = torch.tensor([[True, False, True], [True, True, True]])
    x[~views] = torch.nan
    twin = copy.deepcopy(network)
    network(x, projections_of(2, 3, torch.float64), views=views)
    twin.backbone(x.nan_to_num())
    for ours, theirs in zip(network.buffers(), twin.buffers(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("use_confidences", [True, False])
def test_derivatives_from_images_to_a_loss(use_confidences: bool) -> None:
    network = small(use_confidences=use_confidences, width=2, deconv_channels=2)
    names, parameters = zip(*network.named_parameters(), strict=True)
    sizes = [p.numel() for p in parameters]
    views = torch.tensor([[True, True, False], [True, True, True]])

    def forward(x: Tensor, projections: Tensor, flat: Tensor) -> Tensor:
        pieces = zip(flat.split(sizes), parameters, strict=True)
        state = dict(zip(names, [v.view_as(p) for v, p in pieces], strict=True))
        output = torch.func.functional_call(
            network, state, (x, projections / 1000), {"views": views}
        )
        metres = output.keypoints_3d / 1000
        factors = torch.linspace(-1, 2, metres.numel(), dtype=metres.dtype)
        return (metres.flatten() * factors).sum() + output.heatmaps.square().mean()

    x = images(2, 3).requires_grad_()
    projections = (1000 * projections_of(2, 3, torch.float64)).requires_grad_()
    flat = torch.cat([p.detach().flatten() for p in parameters]).requires_grad_()
    inputs = (x, projections, flat)
    assert torch.autograd.gradcheck(forward, inputs, fast_mode=True, eps=1e-7, atol=1e-4)


def test_overfits_one_batch() -> None:
    torch.manual_seed(0)
    projections, truth = projections_of(2, 4), people(2).float()
    network = AlgebraicTriangulation(JOINTS, 18, width=8, deconv_channels=16)
    x = images(2, 4, torch.float32)
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=200)
    for _ in range(200):
        optimizer.zero_grad()
        loss = (network(x, projections).keypoints_3d - truth).norm(dim=-1).mean()
        loss.backward()
        optimizer.step()
        schedule.step()
    assert (network(x, projections).keypoints_3d - truth).norm(dim=-1).mean() < 1


# ---- Compilers, precision ----


def test_geometry_stays_precise_under_autocast() -> None:
    network, x, projections = (
        small(torch.float32),
        images(2, 3, torch.float32),
        projections_of(2, 3),
    )
    with torch.autocast("cpu", torch.bfloat16):
        output = network(x, projections)
        exact = painted(people(1), projections_of(1, 3, torch.float64))
        joints = exact(images(1, 3), projections_of(1, 3, torch.float64)).keypoints_3d
    for field in fields(output):
        assert field.dtype == torch.float32
        assert field.isfinite().all()
    torch.testing.assert_close(joints, people(1), rtol=0, atol=1e-6)
    # Exactly the geometry of these maps in float32.
    points = ops.soft_argmax2d(output.heatmaps, inverse_temperature=3.0) * 4 + 1.5
    assert torch.equal(output.keypoints_2d, points)
    joints = ops.triangulate(
        points.transpose(1, 2), projections[:, None], output.confidences.transpose(1, 2)
    )
    torch.testing.assert_close(output.keypoints_3d, joints, rtol=1e-5, atol=1e-2)


def test_projections_may_be_more_precise_than_images() -> None:
    output = small(torch.float32)(images(2, 3, torch.float32), projections_of(2, 3, torch.float64))
    assert output.keypoints_3d.dtype == torch.float64
    assert output.keypoints_2d.dtype == torch.float32


class Shallow(PoseResNet):
    """One layer in place of the trunk: quick to compile, which the whole one is elsewhere."""

    def forward(self, images: Tensor) -> PoseResNetOutput:
        features = F.avg_pool2d(self.conv1(images.flatten(0, 1)), 2)
        heatmaps = self.final_layer(features)
        confidences = heatmaps.mean((2, 3)).sigmoid()
        outputs = [x.unflatten(0, images.shape[:2]) for x in (heatmaps, features, confidences)]
        return PoseResNetOutput(*outputs, None)


@pytest.mark.parametrize("masked", [False, True])
def test_compile(masked: bool) -> None:
    torch._dynamo.reset()
    network = small(backbone=Shallow(18, JOINTS, algebraic_confidences=True, deconv_channels=64))
    projections, results = projections_of(2, 3, torch.float64), []
    views = torch.tensor([[True, False, True], [True, True, True]]) if masked else None
    for run in (network, torch.compile(network, fullgraph=True, backend="aot_eager")):
        x = images(2, 3).requires_grad_()
        output = run(x, projections, views=views)
        output.keypoints_3d.square().mean().backward()
        results.append((output, x.grad))
    (ours, gradient), (theirs, expected) = results
    same(ours, theirs)
    torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-6)
    assert expected.ne(0).any()


@pytest.mark.parametrize("masked", [False, True])
def test_export_with_any_batch(masked: bool) -> None:
    network = small(torch.float32)
    dynamic: dict[str, Any] = {
        name: {0: torch.export.Dim.AUTO} for name in ("images", "projections")
    }
    options: dict[str, Any] = {}
    if masked:
        options["views"] = torch.tensor([[True, False, True]] * 3)
        dynamic["views"] = {0: torch.export.Dim.AUTO}
    x, projections = images(3, 3, torch.float32), projections_of(3, 3)
    program = torch.export.export(network, (x, projections), options, dynamic_shapes=dynamic)
    x, projections = x[:2], projections[:2]
    options = {name: value[:2] for name, value in options.items()}
    with torch.no_grad():
        output = program.module()(x, projections, **options)
        assert isinstance(output, AlgebraicOutput)
        same(output, network(x, projections, **options), rtol=1e-4, atol=1e-3)


# ---- Images ----


def test_normalized_images() -> None:
    generator = torch.Generator().manual_seed(4)
    x = torch.randint(256, (2, 3, 4, 6), generator=generator, dtype=torch.uint8)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    for order in ("rgb", "bgr"):
        result = normalize_images(x, order=order)
        assert result.dtype == torch.float32
        for place in range(3):
            channel = x[:, place if order == "rgb" else 2 - place].double()
            expected = (channel / 255 - mean[place]) / std[place]
            torch.testing.assert_close(result[:, place].double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("x", "order", "error", "words"),
    [
        (torch.zeros(3, 4, 6), "rgb", TypeError, r"torch\.uint8, got torch\.float32"),
        (torch.zeros(4, 6, 3).byte(), "rgb", ValueError, r"\[\.\.\., 3, H, W\], got \(4, 6, 3\)"),
        (torch.zeros(3, 4, 6).byte(), "gbr", ValueError, "order must be one of"),
        ([0], "rgb", TypeError, "images must be a tensor, got list"),
    ],
)
def test_images_that_do_not_fit(x: Any, order: str, error: type, words: str) -> None:
    with pytest.raises(error, match=words):
        normalize_images(x, order=order)
