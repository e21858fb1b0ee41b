# SPDX-License-Identifier: Apache-2.0
"""Volumetric triangulation: the cube, aggregation, absent views, laws, compilers."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import rigs
import torch
from torch import Tensor, nn

from tritool import VoxelGrid, ops
from tritool.models import (
    AlgebraicTriangulation,
    PoseResNet,
    PoseResNetOutput,
    VolumetricOutput,
    VolumetricTriangulation,
)

HEIGHT, WIDTH = 128, 160
JOINTS, CHANNELS = 3, 4
AGGREGATIONS = ("sum", "mean", "conf", "softmax", "max")
UPS = ("x", "y", "z", "-x", "-y", "-z")


def direction(name: str) -> Tensor:
    sign = -1.0 if name.startswith("-") else 1.0
    return sign * torch.eye(3, dtype=torch.float64)["xyz".index(name[-1])]


def projections_of(batch: int, views: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Cameras in a ring, another height for each scene, `[B, C, 3, 4]`; z is up."""
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
    return 1200 * spread + torch.tensor([0.0, 0.0, 950.0])


def centers_of(batch: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor([[40.0, -30.0, 900.0], [0.0, 60.0, 1000.0], [9.0, 9.0, 950.0]])[:batch].to(
        dtype
    )


def images(batch: int, views: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, views, 3, HEIGHT, WIDTH, generator=generator, dtype=dtype)


def small(
    dtype: torch.dtype = torch.float64, *, thin: bool = True, **options: Any
) -> VolumetricTriangulation:
    """A narrow network whose outputs differ from place to place and from view to view.

    Thin: one convolution stands for the 3D network, which takes seconds in float64.
    """
    torch.manual_seed(0)
    settings = {"width": 4, "deconv_channels": 6, "volume_channels": CHANNELS, "v2v_width": 2}
    network = VolumetricTriangulation(JOINTS, 18, 32, **{**settings, **options})
    nn.init.normal_(network.process_features[0].weight)
    if thin:
        network.volume_net = nn.Conv3d(network.volume_net.in_channels, JOINTS, 3, padding=1)
    else:
        nn.init.normal_(network.volume_net.output_layer.weight, std=3.0)
    if network.use_confidences:
        # Larger ones saturate the sigmoid: all views alike.
        nn.init.normal_(network.backbone.vol_confidences.head[-1].weight, std=0.01)
    return network.eval().to(dtype)


def moved(projections: Tensor, turn: Tensor, shift: Tensor | float = 0.0) -> Tensor:
    """Projections of the world after X -> turn X + shift."""
    turned = projections[..., :3] @ turn.T
    offset = (turned @ (torch.zeros(3).double() + shift))[..., None]
    return torch.cat([turned, projections[..., 3:] - offset], -1)


def turn_about(axis: Tensor, angle: float) -> Tensor:
    zero = torch.zeros((), dtype=torch.float64)
    x, y, z = axis
    cross = torch.stack([zero, -z, y, z, zero, -x, -y, x, zero]).reshape(3, 3)
    return torch.linalg.matrix_exp(angle * cross)


def close(ours: VolumetricOutput, theirs: VolumetricOutput, **tolerance: float) -> None:
    for name in ("keypoints_3d", "volumes", "centers", "features", "confidences"):
        a, b = getattr(ours, name), getattr(theirs, name)
        assert (a is None) == (b is None), name
        if a is not None:
            torch.testing.assert_close(a, b, equal_nan=True, **tolerance)
    assert ours.grid.size == theirs.grid.size
    torch.testing.assert_close(ours.grid.origin, theirs.grid.origin, equal_nan=True, **tolerance)
    torch.testing.assert_close(ours.grid.axes, theirs.grid.axes, **tolerance)


# ---- From maps to joints, without the 3D network ----


class Painted(PoseResNet):
    """A backbone whose features are Gaussians at the joints' image pixels."""

    def __init__(self, pixels: Tensor, *, official: bool = False) -> None:
        super().__init__(18, pixels.shape[2], width=2, deconv_channels=pixels.shape[2])
        offset = 0.0 if official else 1.5
        x = 4 * torch.arange(WIDTH // 4, dtype=pixels.dtype) + offset
        y = 4 * torch.arange(HEIGHT // 4, dtype=pixels.dtype) + offset
        squares = (x - pixels[..., :1, None]) ** 2 + (y[:, None] - pixels[..., 1:, None]) ** 2
        self.maps = torch.exp(-squares / (2 * 8**2))

    def forward(self, images: Tensor) -> PoseResNetOutput:
        return PoseResNetOutput(self.maps, self.maps, None, None)


def painted(truth: Tensor, projections: Tensor, **options: Any) -> VolumetricTriangulation:
    """A network that finds joints where all views see them; the 3D network does nothing."""
    joints = truth.shape[1]
    pixels = ops.project(truth, projections[:, None]).transpose(1, 2)
    network = VolumetricTriangulation(
        joints,
        volume_size=64,
        inverse_temperature=20.0,
        aggregation="sum",
        backbone=Painted(pixels),
        volume_channels=joints,
        v2v_width=2,
        **options,
    ).eval()
    nn.init.eye_(network.process_features[0].weight.flatten(1))
    nn.init.zeros_(network.process_features[0].bias)
    network.volume_net = nn.Identity()
    return network.double()


@pytest.mark.parametrize("up", UPS)
def test_finds_what_all_views_see(up: str) -> None:
    # A world with another axis upwards: a third of a turn, and a half if it points down.
    turn = torch.stack([direction(n) for n in {"x": "yzx", "y": "zxy", "z": "xyz"}[up[-1]]]).T
    if up.startswith("-"):
        turn = -turn.flip(1) * torch.tensor([1.0, 1.0, 1.0])
        turn[:, [0, 2]] = turn[:, [2, 0]]
        turn = turn @ torch.diag(torch.tensor([-1.0, 1.0, 1.0]).double())
    torch.testing.assert_close(turn @ direction("z"), direction(up))
    torch.testing.assert_close(turn.det(), torch.ones(()).double())
    projections, truth = moved(projections_of(2, 4), turn), people(2) @ turn.T
    centers = centers_of(2) @ turn.T
    network = painted(truth, projections, vertical=up)
    angles = torch.tensor([0.4, -2.0]).double()
    output = network(images(2, 4), projections, centers, rotation=angles)
    assert output.volumes.shape == (2, JOINTS, 64, 64, 64)
    # A voxel is 39 mm.
    assert (output.keypoints_3d - truth).norm(dim=-1).max() < 20
    spacing = 2500 / 64
    torch.testing.assert_close(output.grid.axes[:, 1] / spacing, direction(up).expand(2, 3))
    # The first axis turns about the direction upwards, by the right hand.
    start = network(images(2, 4), projections, centers).grid.axes / spacing
    for b, angle in enumerate(angles.tolist()):
        expected = turn_about(direction(up), angle) @ start[b].T
        torch.testing.assert_close(output.grid.axes[b] / spacing, expected.T)
    torch.testing.assert_close(torch.linalg.det(start), torch.ones(2).double())
    middle = output.grid.to_world(torch.full((1, 1, 3), 31.5).double())
    torch.testing.assert_close(middle[:, 0], centers)


@pytest.mark.parametrize("up", UPS)
def test_official_cube(up: str) -> None:
    network = small(official_conventions=True, vertical=up)
    angles = torch.tensor([0.0, 1.2]).double()
    output = network(images(2, 2), projections_of(2, 2), centers_of(2), rotation=angles)
    spacing = 2500 / 31
    for b, angle in enumerate(angles.tolist()):
        expected = turn_about(direction(up), angle).T
        torch.testing.assert_close(output.grid.axes[b] / spacing, expected)
    corner = output.grid.to_world(torch.zeros(1, 1, 3).double())[0, 0]
    torch.testing.assert_close(corner, centers_of(1)[0] - 1250)


def test_official_cube_may_stand_upright_and_ours_not() -> None:
    arguments = images(1, 2), projections_of(1, 2), centers_of(1)
    own = small()(*arguments).grid.axes
    official = small(official_conventions=True, upright=True)(*arguments).grid.axes
    torch.testing.assert_close(official / (2500 / 31), own / (2500 / 32))
    world = small(upright=False)(*arguments).grid.axes
    torch.testing.assert_close(world[0], (2500 / 32) * torch.eye(3).double())


def test_pixels_of_the_official_code() -> None:
    projections, truth = projections_of(1, 4), people(1)
    network = painted(truth, projections, official_conventions=True)
    pixels = ops.project(truth, projections[:, None]).transpose(1, 2)
    network.backbone = Painted(pixels, official=True).double()
    shifted = network(images(1, 4), projections, centers_of(1)).keypoints_3d
    # Its mapping is of square maps; on others it is wrong, and more so than by half a pixel.
    assert (shifted - truth).norm(dim=-1).mean() > 40
    network.official_conventions = False
    wrong = network(images(1, 4), projections, centers_of(1)).keypoints_3d
    network.backbone = Painted(pixels).double()
    right = network(images(1, 4), projections, centers_of(1)).keypoints_3d
    assert (right - truth).norm(dim=-1).mean() < (wrong - truth).norm(dim=-1).mean() / 3


# ---- Aggregation ----


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_volume_is_that_of_unproject(aggregation: str) -> None:
    network = small(aggregation=aggregation)
    x, projections, centers = images(2, 3), projections_of(2, 3), centers_of(2)
    output = network(x, projections, centers)
    assert output.keypoints_3d.shape == (2, JOINTS, 3)
    assert output.volumes.shape == (2, JOINTS, 32, 32, 32)
    assert output.features.shape == (2, 3, CHANNELS, HEIGHT // 4, WIDTH // 4)
    assert torch.equal(output.centers, centers)
    sees = network.backbone(x)
    assert network.use_confidences == (aggregation in ("mean", "conf"))
    if network.use_confidences:
        assert output.confidences.shape == (2, 3, CHANNELS)
        assert torch.equal(output.confidences, sees.volumetric_confidences)
        assert output.confidences.std(1).max() > 0.01
        assert output.confidences.min() > 0.01
    else:
        assert output.confidences is None
    # The cell i of a map is at pixel 4 i + 1.5.
    to_cells = torch.tensor([[0.25, 0, -0.375], [0, 0.25, -0.375], [0, 0, 1]]).double()
    weights = output.confidences
    if aggregation == "conf":
        aggregation = "sum"
    elif aggregation == "mean":
        weights = weights / weights.sum(1, keepdim=True)
        aggregation = "sum"
    volume = ops.unproject(
        output.features,
        to_cells @ projections,
        output.grid.points(),
        aggregation=aggregation,
        confidences=weights,
    )
    volumes = network.volume_net(volume)
    torch.testing.assert_close(output.volumes, volumes)
    joints = ops.soft_argmax3d(volumes, grid=output.grid)
    torch.testing.assert_close(output.keypoints_3d, joints)


def test_inverse_temperature_and_outside() -> None:
    arguments = images(1, 3), projections_of(1, 3), centers_of(1)
    cold, warm = small(inverse_temperature=9.0)(*arguments), small()(*arguments)
    torch.testing.assert_close(cold.volumes, warm.volumes)
    assert (cold.keypoints_3d - warm.keypoints_3d).norm(dim=-1).min() > 1
    # A cube of 12 m is not seen whole.
    zeros, exclude = (small(side=12000.0, outside=o)(*arguments) for o in ("zeros", "exclude"))
    assert (zeros.volumes - exclude.volumes).abs().max() > 1e-3


# ---- Laws ----


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_an_absent_view_is_a_view_left_out(aggregation: str) -> None:
    network = small(aggregation=aggregation)
    x, projections, centers = images(2, 3), projections_of(2, 3), centers_of(2)
    views = torch.tensor([[True, False, True], [False, True, False]])
    # What is there in place of a view has no meaning.
    x[~views], projections[~views] = torch.nan, torch.inf
    output = network(x, projections, centers, views=views)
    for b in range(2):
        rows = views[b]
        alone = network(x[b, rows][None], projections[b, rows][None], centers[b : b + 1])
        torch.testing.assert_close(output.volumes[b], alone.volumes[0])
        torch.testing.assert_close(output.keypoints_3d[b], alone.keypoints_3d[0])
        assert output.keypoints_3d[b].isfinite().all()
        if output.confidences is not None:
            torch.testing.assert_close(output.confidences[b, rows], alone.confidences[0])
            assert output.confidences[b, ~rows].eq(0).all()


def test_all_views_present_is_no_mask() -> None:
    network, arguments = small(), (images(2, 3), projections_of(2, 3), centers_of(2))
    close(network(*arguments, views=torch.ones(2, 3).bool()), network(*arguments))


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_the_order_of_views_does_not_matter(aggregation: str) -> None:
    network, x, projections = small(aggregation=aggregation), images(1, 4), projections_of(1, 4)
    order = [2, 0, 3, 1]
    expected = network(x, projections, centers_of(1))
    output = network(x[:, order], projections[:, order], centers_of(1))
    torch.testing.assert_close(output.volumes, expected.volumes)
    torch.testing.assert_close(output.keypoints_3d, expected.keypoints_3d)


@pytest.mark.parametrize("official", [False, True])
@pytest.mark.parametrize("up", ["z", "-y"])
def test_the_world_moved_moves_the_joints(up: str, official: bool) -> None:
    network = small(vertical=up, official_conventions=official)
    x, projections, centers = images(2, 3), projections_of(2, 3), centers_of(2)
    if up == "-y":  # cameras that see something from where they are
        tip = torch.stack([direction("x"), -direction("z"), direction("y")])
        projections, centers = moved(projections, tip), centers @ tip.T
    angle = 0.7
    turn, shift = turn_about(direction(up), angle), torch.tensor([300.0, -2000.0, 900.0]).double()
    start = torch.tensor([0.0, 0.5]).double()
    expected = network(x, projections, centers, rotation=start).keypoints_3d @ turn.T + shift
    output = network(
        x, moved(projections, turn, shift), centers @ turn.T + shift, rotation=start + angle
    )
    torch.testing.assert_close(output.keypoints_3d, expected, rtol=1e-9, atol=1e-6)


@pytest.mark.parametrize("up", UPS)
def test_weights_serve_whichever_axis_points_up(up: str) -> None:
    x, projections, centers = images(1, 3), projections_of(1, 3), centers_of(1)
    first, other = small(vertical="z"), small(vertical=up)
    expected = first(x, projections, centers)
    here = expected.grid.axes[0] / (2500 / 32)
    there = other(x, projections, centers).grid.axes[0] / (2500 / 32)
    turn = there.T @ here  # cube to cube
    torch.testing.assert_close(turn @ direction("z"), direction(up))
    output = other(x, moved(projections, turn), centers @ turn.T)
    torch.testing.assert_close(output.volumes, expected.volumes)
    torch.testing.assert_close(output.keypoints_3d, expected.keypoints_3d @ turn.T)


def test_samples_do_not_meet() -> None:
    network, x, projections, centers = small(), images(3, 2), projections_of(3, 2), centers_of(3)
    expected = network(x, projections, centers)
    for b in range(3):
        alone = network(x[b : b + 1], projections[b : b + 1], centers[b : b + 1])
        torch.testing.assert_close(alone.keypoints_3d[0], expected.keypoints_3d[b])


# ---- Random rotation ----


def test_cubes_turn_at_random_in_training_alone() -> None:
    network = small(torch.float32).train()
    x, projections = images(3, 2, torch.float32), projections_of(3, 2, torch.float32)

    def axes(seed: int | None = None, **options: Any) -> Tensor:
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        centers = centers_of(3, torch.float32)
        return network(x, projections, centers, generator=generator, **options).grid.axes

    torch.manual_seed(5)
    first = axes()
    assert not torch.equal(first, axes())
    torch.manual_seed(5)
    assert torch.equal(first, axes())
    assert torch.equal(axes(1), axes(1))
    assert not torch.equal(axes(1), axes(2))
    assert torch.equal(axes(1, rotation=torch.zeros(3)), axes(2, rotation=torch.zeros(3)))
    # Each scene by an angle of its own, from the full circle, about the vertical.
    many = torch.cat([axes(seed) for seed in range(6)])
    angles = torch.atan2(many[:, 0, 1], many[:, 0, 0])
    assert angles.unique().numel() == 18
    assert (angles > math.pi / 2).any()
    assert (angles < -math.pi / 2).any()
    torch.testing.assert_close(many[:, 1], torch.tensor([0.0, 0.0, 2500 / 32]).expand(18, 3))
    still = network.eval() and axes()
    torch.testing.assert_close(still[:, 0], torch.tensor([2500 / 32, 0.0, 0.0]).expand(3, 3))
    network.train().random_rotation = False
    assert torch.equal(axes(), still)


# ---- The centre ----


def algebraic(**options: Any) -> AlgebraicTriangulation:
    torch.manual_seed(3)
    network = AlgebraicTriangulation(8, 18, width=4, deconv_channels=6, **options)
    nn.init.normal_(network.backbone.final_layer.weight, std=0.01)
    return network.to(torch.float64)


def test_centre_is_the_pelvis_of_the_algebraic_model() -> None:
    x, projections = images(2, 3), projections_of(2, 3)
    views = torch.tensor([[True, True, False], [True, True, True]])
    model = algebraic()
    for pelvis, official, expected in (
        (None, False, [0]),
        (None, True, [6]),
        (3, False, [3]),
        ((1, 2), True, [1, 2]),
    ):
        network = small(algebraic=model, pelvis=pelvis, official_conventions=official)
        output = network(x, projections, views=views)
        found = model(x, projections, views=views).keypoints_3d[:, expected].mean(1)
        torch.testing.assert_close(output.centers, found.detach())
        assert not output.centers.requires_grad
        close(output, network(x, projections, found.detach(), views=views))


def test_the_algebraic_model_is_no_part_of_the_network() -> None:
    model = algebraic().float().train()
    network = small(torch.float32, algebraic=model)
    assert network.algebraic is model
    assert network.state_dict().keys() == small().state_dict().keys()
    assert not model.training
    assert not network.train().algebraic.training
    network.double()
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    before = copy.deepcopy(model.state_dict())
    twin = copy.deepcopy(network)
    assert twin.algebraic is not model
    network(images(2, 3), projections_of(2, 3)).volumes.square().mean().backward()
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert small().algebraic is None


def test_centres_are_needed() -> None:
    x, projections = images(1, 2), projections_of(1, 2)
    with pytest.raises(ValueError, match="without an algebraic model, got None"):
        small()(x, projections)
    with pytest.raises(ValueError, match="fewer than two views"):
        small(algebraic=algebraic())(x[:, :1], projections[:, :1])


def test_a_scene_without_centre_is_nan_and_spoils_nothing() -> None:
    network = small(algebraic=algebraic()).train()
    x, projections, centers = images(2, 2), projections_of(2, 2), centers_of(2)
    centers[0, 1] = torch.nan
    x.requires_grad_()
    output = network(x, projections, centers)
    assert output.keypoints_3d[0].isnan().all()
    assert output.keypoints_3d[1].isfinite().all()
    assert output.grid.origin[0].isnan().all()
    assert output.grid.axes.isfinite().all()
    assert output.volumes.isfinite().all()
    output.keypoints_3d.backward(torch.ones(2, JOINTS, 3).double())
    assert all(b.isfinite().all() for b in network.buffers())
    assert all(p.grad is None or p.grad.isfinite().all() for p in network.parameters())
    assert x.grad.isfinite().all()
    # One view is left of the first scene: the algebraic model finds no centre.
    views = torch.tensor([[True, False], [True, True]])
    output = network.eval()(x, projections, views=views)
    assert output.centers[0].isnan().all()
    assert output.keypoints_3d[0].isnan().all()
    assert output.keypoints_3d[1].isfinite().all()
    output = network(x, projections, centers_of(2), rotation=torch.tensor([torch.nan, 0]).double())
    assert output.keypoints_3d[0].isnan().all()
    assert output.keypoints_3d[1].isfinite().all()


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_no_view_is_nan_and_one_is_enough(aggregation: str) -> None:
    network = small(aggregation=aggregation)
    x, projections, centers = images(2, 1), projections_of(2, 1), centers_of(2)
    x.requires_grad_()
    views = torch.tensor([[False], [True]])
    output = network(x, projections, centers, views=views)
    assert output.keypoints_3d[0].isnan().all()
    assert output.volumes.isfinite().all()
    one = network(x[1:], projections[1:], centers[1:])
    torch.testing.assert_close(output.keypoints_3d[1], one.keypoints_3d[0])
    assert one.keypoints_3d.isfinite().all()
    output.keypoints_3d[1].sum().backward()
    assert x.grad[0].eq(0).all()
    assert x.grad[1].ne(0).any()


def test_no_samples() -> None:
    output = small()(images(0, 3), projections_of(0, 3), centers_of(0))
    assert output.keypoints_3d.shape == (0, JOINTS, 3)
    assert output.volumes.shape == (0, JOINTS, 32, 32, 32)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"images": torch.zeros(2, 3, HEIGHT, WIDTH)}, ValueError, r"images must be \[B, C, 3"),
        ({"projections": torch.zeros(2, 3, 3, 4)}, ValueError, "C = 2 as in images"),
        ({"views": torch.ones(2, 3).bool()}, ValueError, r"views must be \[B, C\]"),
        ({"centers": torch.zeros(3)}, ValueError, r"centers must be \[2, 3\] .* got \(3,\)"),
        ({"centers": torch.zeros(2, 3).int()}, TypeError, "centers must be float32 or float64"),
        ({"centers": (0, 0, 0)}, TypeError, "centers must be a tensor or None, got tuple"),
        ({"centers": torch.zeros(2, 3, device="meta")}, ValueError, "on the device of images"),
        ({"rotation": torch.zeros(2, 1)}, ValueError, r"rotation must be \[2\]"),
        ({"rotation": 0.5}, TypeError, "rotation must be a tensor or None, got float"),
    ],
)
def test_input_that_does_not_fit(change: dict[str, Any], error: type, words: str) -> None:
    good = {
        "images": images(2, 2, torch.float32),
        "projections": projections_of(2, 2, torch.float32),
        "centers": centers_of(2, torch.float32),
    }
    with pytest.raises(error, match=words):
        small(torch.float32)(**{**good, **change})


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"volume_size": 48}, ValueError, "volume_size must be a multiple of 32, got 48"),
        ({"volume_size": 0}, ValueError, "multiple of 32, got 0"),
        ({"side": -1.0}, ValueError, "side must be a finite number above 0"),
        ({"aggregation": "conf_norm"}, ValueError, "aggregation must be one of 'sum', 'mean'"),
        ({"inverse_temperature": 0.0}, ValueError, "inverse_temperature must be"),
        ({"vertical": "up"}, ValueError, "vertical must be one of 'x', 'y', 'z', '-x'"),
        ({"outside": "mirror"}, ValueError, "outside must be one of"),
        (
            {"outside": "exclude", "official_conventions": True},
            ValueError,
            "outside must be 'zeros' with official_conventions",
        ),
        ({"volume_channels": 0}, ValueError, "volume_channels must be at least 1"),
        ({"v2v_width": 3}, ValueError, "width must be even"),
        ({"backbone": nn.Identity()}, TypeError, "backbone must be a PoseResNet"),
        ({"backbone": PoseResNet(18, 4, width=2)}, ValueError, "num_joints = 3, got 4"),
        (
            {"backbone": PoseResNet(18, 3, width=2), "aggregation": "mean"},
            ValueError,
            "volumetric_confidences = volume_channels = 4 with this aggregation, got 0",
        ),
        ({"algebraic": nn.Identity()}, TypeError, "must be an AlgebraicTriangulation or None"),
        ({"algebraic": algebraic(), "pelvis": 8}, ValueError, r"0 to 7, got \(8,\)"),
        ({"algebraic": algebraic(), "pelvis": ()}, ValueError, r"got \(\)"),
    ],
)
def test_settings_that_do_not_fit(settings: dict[str, Any], error: type, words: str) -> None:
    options = {"num_joints": 3, "depth": 18, "width": 2, "volume_channels": 4, "v2v_width": 2}
    with pytest.raises(error, match=words):
        VolumetricTriangulation(**{**options, **settings})


# ---- Training ----


def test_no_parameter_waits_for_a_gradient() -> None:
    backbone = PoseResNet(
        18,
        JOINTS,
        algebraic_confidences=True,
        volumetric_confidences=CHANNELS,
        width=4,
        deconv_channels=6,
    )
    for aggregation in ("mean", "softmax"):
        network = VolumetricTriangulation(
            JOINTS,
            volume_size=32,
            aggregation=aggregation,
            backbone=copy.deepcopy(backbone),
            volume_channels=CHANNELS,
            v2v_width=2,
        )
        output = network(
            images(2, 2, torch.float32),
            projections_of(2, 2, torch.float32),
            centers_of(2, torch.float32),
        )
        output.keypoints_3d.square().mean().backward()
        for name, parameter in network.named_parameters():
            used = "alg_" not in name and "final_layer" not in name
            used &= "vol_" not in name or aggregation == "mean"
            assert parameter.requires_grad == used, name
            assert (parameter.grad is not None) == used, name


@pytest.mark.parametrize("aggregation", ["softmax", "mean"])
def test_derivatives_from_images_to_a_loss(aggregation: str) -> None:
    # In one of the cases with the 3D network.
    network = small(
        thin=aggregation == "mean",
        aggregation=aggregation,
        width=2,
        deconv_channels=2,
        volume_channels=2,
    )
    pairs = [(n, p) for n, p in network.named_parameters() if p.requires_grad]
    names, parameters = zip(*pairs, strict=True)
    sizes = [p.numel() for p in parameters]
    views = torch.tensor([[True, True, False]])

    def forward(x: Tensor, projections: Tensor, centers: Tensor, flat: Tensor) -> Tensor:
        pieces = zip(flat.split(sizes), parameters, strict=True)
        state = dict(zip(names, [v.view_as(p) for v, p in pieces], strict=True))
        output = torch.func.functional_call(
            network, state, (x, projections / 1000, centers * 1000), {"views": views}
        )
        metres = output.keypoints_3d / 1000
        factors = torch.linspace(-1, 2, metres.numel(), dtype=metres.dtype)
        return (metres.flatten() * factors).sum() + output.volumes.square().mean()

    x = images(1, 3).requires_grad_()
    projections = (1000 * projections_of(1, 3)).requires_grad_()
    centers = (centers_of(1) / 1000).requires_grad_()
    flat = torch.cat([p.detach().flatten() for p in parameters]).requires_grad_()
    inputs = (x, projections, centers, flat)
    assert torch.autograd.gradcheck(forward, inputs, fast_mode=True, eps=1e-7, atol=1e-4)


def test_overfits_one_batch() -> None:
    torch.manual_seed(0)
    x, projections = images(2, 3, torch.float32), projections_of(2, 3, torch.float32)
    truth, centers = people(2).float(), centers_of(2, torch.float32)
    network = VolumetricTriangulation(
        JOINTS, 18, 32, width=8, deconv_channels=16, volume_channels=2, v2v_width=4,
        v2v_front_width=8, random_rotation=False,
    )  # fmt: skip
    optimizer = torch.optim.Adam(network.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-2, total_steps=100)
    for _ in range(100):
        optimizer.zero_grad()
        loss = (network(x, projections, centers).keypoints_3d - truth).norm(dim=-1).mean()
        loss.backward()
        optimizer.step()
        schedule.step()
    # A quarter of a voxel; the joints of the two scenes are seven voxels or more apart.
    error = (network(x, projections, centers).keypoints_3d - truth).norm(dim=-1)
    assert error.max() < 2500 / 32 / 4


def test_checkpointing_changes_nothing() -> None:
    results = []
    arguments = tuple(v.float() for v in (images(2, 2), projections_of(2, 2), centers_of(2)))
    for checkpointing in (False, True):
        network = small(torch.float32, thin=False, checkpointing=checkpointing).train()
        assert network.volume_net.checkpointing == checkpointing
        assert network.backbone.checkpointing == checkpointing
        output = network(*arguments, generator=torch.Generator().manual_seed(0))
        output.keypoints_3d.square().mean().backward()
        results.append([p.grad for p in network.parameters() if p.requires_grad])
    assert all(map(torch.equal, *results))


# ---- Compilers, precision ----


def test_autocast() -> None:
    network = small(torch.float32, thin=False, aggregation="mean")
    arguments = (
        images(2, 3, torch.float32),
        projections_of(2, 3, torch.float32),
        centers_of(2, torch.float32),
    )
    expected = network(*arguments)
    with torch.autocast("cpu", torch.bfloat16):
        output = network(*arguments)
    for name in ("keypoints_3d", "volumes", "centers", "features", "confidences"):
        value = getattr(output, name)
        assert value.dtype == torch.float32
        assert value.isfinite().all()
    assert torch.equal(output.grid.origin, expected.grid.origin)
    assert torch.equal(output.grid.axes, expected.grid.axes)
    assert (output.volumes - expected.volumes).abs().max() < 0.1 * expected.volumes.abs().max()
    joints = ops.soft_argmax3d(output.volumes, grid=output.grid)
    torch.testing.assert_close(output.keypoints_3d, joints)


def test_geometry_may_be_more_precise_than_images() -> None:
    network, x = small(torch.float32), images(2, 3, torch.float32)
    projections, centers = projections_of(2, 3), centers_of(2)
    output = network(x, projections, centers.float())
    assert output.keypoints_3d.dtype == output.grid.dtype == torch.float64
    assert network(x, projections.float(), centers).keypoints_3d.dtype == torch.float64
    assert output.volumes.dtype == torch.float32


@pytest.mark.parametrize("aggregation", ["softmax", "mean"])
def test_compile(aggregation: str) -> None:
    torch._dynamo.reset()
    network = small(aggregation=aggregation)
    arguments = images(2, 3), projections_of(2, 3), centers_of(2)
    options = {}
    if aggregation == "mean":
        options["views"] = torch.tensor([[True, False, True], [True, True, True]])
        options["rotation"] = torch.tensor([0.1, 0.2]).double()
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        close(compiled(*arguments, **options), network(*arguments, **options))


def test_compiled_training() -> None:
    torch._dynamo.reset()
    network, gradients = small().train(), []
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    for run in (network, compiled):
        x = images(2, 2).requires_grad_()
        angles = torch.tensor([0.3, 2.0]).double()
        output = run(x, projections_of(2, 2), centers_of(2), rotation=angles)
        output.keypoints_3d.square().mean().backward()
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-6)
    output = compiled(images(2, 2), projections_of(2, 2), centers_of(2))
    assert not torch.equal(output.grid.axes[0], output.grid.axes[1])


def exported(network: VolumetricTriangulation, batch: int, **options: Tensor) -> nn.Module:
    """The program for any batch size, from an example of this one."""
    arguments = images(batch, 2), projections_of(batch, 2), centers_of(batch)
    auto = {0: torch.export.Dim.AUTO}
    dynamic = {name: auto for name in ("images", "projections", "centers", *options)}
    return torch.export.export(network, arguments, options, dynamic_shapes=dynamic).module()


@pytest.mark.parametrize("aggregation", ["softmax", "mean"])
def test_export_with_another_batch(aggregation: str) -> None:
    network = small(aggregation=aggregation, thin=aggregation == "mean")
    masked = aggregation == "mean"
    program = exported(network, 2, **({"views": torch.ones(2, 2).bool()} if masked else {}))
    arguments = images(1, 2), projections_of(1, 2), centers_of(1)
    options = {"views": torch.tensor([[True, False]])} if masked else {}
    with torch.no_grad():
        output = program(*arguments, **options)
        assert isinstance(output, VolumetricOutput)
        assert isinstance(output.grid, VoxelGrid)
        close(output, network(*arguments, **options))


@pytest.mark.parametrize(("example", "batch"), [(2, 3), (3, 2)])
def test_export_with_a_batch_of_three(example: int, batch: int) -> None:
    network = small()
    arguments = images(batch, 2), projections_of(batch, 2), centers_of(batch)
    with torch.no_grad():
        close(exported(network, example)(*arguments), network(*arguments))


def test_export_with_an_algebraic_model() -> None:
    network = small(algebraic=algebraic())
    arguments = images(2, 2), projections_of(2, 2)
    program = torch.export.export(network, arguments)
    with torch.no_grad():
        close(program.module()(*arguments), network(*arguments))
