# SPDX-License-Identifier: Apache-2.0
"""The RANSAC baseline: peaks to pixels, views that agree, absent views, compilers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import rigs
import torch
from torch import Tensor, nn

from tritool import ops
from tritool.models import PoseResNet, load_official_checkpoint
from tritool.models.pose_resnet import PoseResNetOutput
from tritool.models.ransac import RansacOutput, RansacTriangulation

HEIGHT, WIDTH = 256, 320
JOINTS = 5


class Painted(PoseResNet):
    """A backbone whose heat maps are given."""

    def __init__(self, heatmaps: Tensor) -> None:
        super().__init__(18, JOINTS, width=4, deconv_channels=6)
        self.heatmaps = heatmaps

    def forward(self, images: Tensor) -> PoseResNetOutput:
        return PoseResNetOutput(self.heatmaps, self.heatmaps, None, None)


def studio(views: int) -> rigs.Rig:
    return rigs.ring(views, focal=320.0, image_size=(WIDTH, HEIGHT))


def projections_of(rig: rigs.Rig, batch: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.from_numpy(rig.projections).to(dtype).expand(batch, -1, -1, -1).clone()


def people(
    batch: int, views: int, seed: int = 0, size: float = 500.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Truth `[B, J, 3]`, pixels `[B, C, J, 2]` and projections `[B, C, 3, 4]`."""
    generator = torch.Generator().manual_seed(seed)
    projections = projections_of(studio(views), batch)
    truth = size * torch.randn(batch, JOINTS, 3, generator=generator) + torch.tensor([0, 0, 950.0])
    return truth, ops.project(truth, projections[:, None]).transpose(1, 2), projections


def paint(pixels: Tensor) -> Tensor:
    """Heat maps of Gaussians at image pixels, `[..., H/4, W/4]`, by the package's convention."""
    x = 4 * torch.arange(WIDTH // 4, dtype=pixels.dtype) + 1.5
    y = 4 * torch.arange(HEIGHT // 4, dtype=pixels.dtype) + 1.5
    squares = (x - pixels[..., :1, None]) ** 2 + (y[:, None] - pixels[..., 1:, None]) ** 2
    return torch.exp(-squares / (2 * 8**2))


def run(heatmaps: Tensor, projections: Tensor, views: Tensor | None = None, **options: Any) -> Any:
    generator = options.pop("generator", None)
    network = RansacTriangulation(JOINTS, backbone=Painted(heatmaps), **options).eval()
    images = torch.zeros(*heatmaps.shape[:2], 3, HEIGHT, WIDTH)
    return network(images, projections, views=views, generator=generator)


def small(dtype: torch.dtype = torch.float64, **options: Any) -> RansacTriangulation:
    torch.manual_seed(0)
    network = RansacTriangulation(JOINTS, 18, width=4, deconv_channels=6, **options)
    nn.init.normal_(network.backbone.final_layer.weight)
    return network.eval().to(dtype)


def images(batch: int, views: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, views, 3, 64, 96, generator=generator, dtype=dtype)


def fields(output: RansacOutput) -> list[Tensor]:
    return [output.keypoints_3d, output.keypoints_2d, output.inliers, output.heatmaps]


# ---- From heat maps to joints ----


@pytest.mark.parametrize("readout", ["argmax", "soft_argmax"])
def test_finds_people(readout: str) -> None:
    truth, pixels, projections = people(3, 5)
    output = run(paint(pixels), projections, readout=readout)
    assert output.keypoints_3d.shape == (3, JOINTS, 3)
    assert output.keypoints_2d.shape == (3, 5, JOINTS, 2)
    assert output.heatmaps.shape == (3, 5, JOINTS, HEIGHT // 4, WIDTH // 4)
    assert output.inliers.shape == (3, 5, JOINTS)
    assert output.inliers.dtype == torch.bool
    inside = ((pixels > 0) & (pixels < torch.tensor([WIDTH, HEIGHT]))).all(-1)
    assert inside.float().mean() > 0.9
    # A peak is off by up to half a cell, 2 pixels; 5 m away a pixel is 15 mm.
    error = (output.keypoints_2d - pixels).abs().amax(-1)[inside]
    assert error.max() <= 2.01
    off = (output.keypoints_3d - truth).norm(dim=-1)[inside.all(1)]
    assert off.numel() > 6
    assert off.max() < (60 if readout == "argmax" else 20)
    assert output.inliers.transpose(1, 2)[inside.all(1)].all()


def test_cells_are_centred_between_pixels_or_as_in_the_official_code() -> None:
    heatmaps = torch.zeros(1, 2, JOINTS, HEIGHT // 4, WIDTH // 4)
    heatmaps[..., 11, 23] = 1
    projections = projections_of(studio(2), 1)
    own = run(heatmaps, projections)
    official = run(heatmaps, projections, official_conventions=True)
    assert torch.equal(own.keypoints_2d, torch.tensor([93.5, 45.5]).expand(1, 2, JOINTS, 2))
    assert torch.equal(official.keypoints_2d, torch.tensor([92.0, 44.0]).expand(1, 2, JOINTS, 2))
    # The images need not be square, nor four times the maps.
    network = RansacTriangulation(JOINTS, backbone=Painted(heatmaps))
    output = network(torch.zeros(1, 2, 3, HEIGHT // 2, WIDTH), projections)
    assert torch.equal(output.keypoints_2d, torch.tensor([93.5, 22.5]).expand(1, 2, JOINTS, 2))


def test_a_wrong_view_is_left_out() -> None:
    truth, pixels, projections = people(2, 4, size=150.0)
    pixels[:, 1] += torch.tensor([80.0, 30.0])
    for options in ({}, {"official_conventions": True, "threshold": 7.5}):
        options |= {"readout": "soft_argmax", "inverse_temperature": 20.0}  # not just the peak
        output = run(paint(pixels), projections, **options)
        inliers = output.inliers.transpose(1, 2)
        assert inliers.tolist() == [[[True, False, True, True]] * JOINTS] * 2
        # The official convention is off by 1.5 pixels.
        error = (output.keypoints_3d - truth).norm(dim=-1).max()
        assert error < (40 if "official_conventions" in options else 5)
    of_all = ops.triangulate(pixels.transpose(1, 2), projections[:, None])
    assert (of_all - truth).norm(dim=-1).min() > 100


def test_official_errors_are_half_the_distance() -> None:
    truth, pixels, projections = people(1, 4, seed=5, size=100.0)
    pixels[:, 2, :, 1] += 38  # what no fit brings below 15 in all views, but below 30
    heatmaps = paint(pixels)
    own = run(heatmaps, projections, readout="soft_argmax")
    official = run(heatmaps, projections, readout="soft_argmax", official_conventions=True)
    assert not own.inliers[:, 2].any()
    assert own.inliers[:, [0, 1, 3]].all()
    assert official.inliers.all()
    narrow = run(
        heatmaps, projections, readout="soft_argmax", official_conventions=True, threshold=7.5
    )
    assert torch.equal(narrow.inliers, own.inliers)
    # The joints are those of least error under Huber's loss of 2 pixels.
    want = ops.refine(
        truth, official.keypoints_2d.transpose(1, 2), projections[:, None], scale=2.0, iterations=40
    )
    torch.testing.assert_close(official.keypoints_3d, want, rtol=0, atol=0.5)
    plain = run(
        heatmaps, projections, readout="soft_argmax", official_conventions=True, refine=False
    )
    linear = ops.triangulate(
        plain.keypoints_2d.transpose(1, 2), projections[:, None], mode="inhomogeneous", reweight=1
    )
    torch.testing.assert_close(plain.keypoints_3d, linear, rtol=0, atol=1e-2)
    assert (plain.keypoints_3d - official.keypoints_3d).norm(dim=-1).min() > 5


def test_joints_on_which_no_views_agree() -> None:
    _, pixels, projections = people(1, 3, seed=5, size=150.0)
    pixels, projections = pixels[:, :2].clone(), projections[:, :2]
    pixels[:, 0, :, 1] += 60
    output = run(paint(pixels), projections, threshold=3.0)
    assert not output.inliers.any()
    want = ops.triangulate(
        output.keypoints_2d.transpose(1, 2), projections[:, None], mode="inhomogeneous", reweight=1
    )
    assert want.isfinite().all()
    assert torch.equal(output.keypoints_3d, want)


def test_heat_maps_without_a_peak_are_absent() -> None:
    _, pixels, projections = people(1, 5)
    heatmaps = paint(pixels)
    want = run(heatmaps[:, 1:], projections[:, 1:])
    for value in (torch.nan, -torch.inf):
        spoilt = heatmaps.clone()
        spoilt[:, 0] = value
        output = run(spoilt, projections)
        assert output.keypoints_2d[:, 0].isnan().all()
        assert not output.inliers[:, 0].any()
        torch.testing.assert_close(output.keypoints_3d, want.keypoints_3d, rtol=0, atol=1e-2)


def test_pairs_at_random_follow_their_generator() -> None:
    _, pixels, projections = people(2, 8)
    noise = torch.Generator().manual_seed(0)
    heatmaps = paint(pixels + 60 * torch.randn(pixels.shape, generator=noise).round())

    def drawn(seed: int, **options: Any) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        output = run(heatmaps, projections, pairs=2, generator=generator, **options)
        return output.keypoints_3d

    assert torch.equal(drawn(0), drawn(0))
    assert not torch.equal(drawn(0), drawn(1))
    every = run(heatmaps, projections)
    assert torch.equal(run(heatmaps, projections, pairs=28).keypoints_3d, every.keypoints_3d)


# ---- Views ----


@pytest.mark.parametrize("official", [False, True])
def test_a_masked_view_is_a_view_left_out(official: bool) -> None:
    network = small(official_conventions=official, threshold=40.0)
    batch, projections = images(2, 4), projections_of(studio(4), 2, torch.float64)
    views = torch.ones(2, 4, dtype=torch.bool)
    views[:, 2] = False
    kept = [0, 1, 3]
    want = network(batch[:, kept], projections[:, kept])
    spoilt, lost = batch.clone(), projections.clone()
    spoilt[:, 2], lost[:, 2] = torch.nan, torch.nan
    have = network(spoilt, lost, views=views)
    assert have.keypoints_2d[:, 2].isnan().all()
    assert not have.inliers[:, 2].any()
    assert want.inliers.any()
    torch.testing.assert_close(have.keypoints_3d, want.keypoints_3d, rtol=1e-8, atol=1e-6)
    assert torch.equal(have.inliers[:, kept], want.inliers)
    assert torch.equal(have.keypoints_2d[:, kept], want.keypoints_2d)
    every = network(batch, projections, views=torch.ones_like(views))
    for masked, plain in zip(fields(every), fields(network(batch, projections)), strict=True):
        assert torch.equal(masked, plain)


def test_order_of_views_does_not_matter() -> None:
    network = small(threshold=40.0)
    batch, projections = images(2, 4), projections_of(studio(4), 2, torch.float64)
    order = [2, 0, 3, 1]
    have = network(batch, projections)
    other = network(batch[:, order], projections[:, order])
    torch.testing.assert_close(other.keypoints_3d, have.keypoints_3d, rtol=1e-8, atol=1e-6)
    assert torch.equal(other.inliers, have.inliers[:, order])


def test_too_few_views() -> None:
    network = small()
    projections = projections_of(studio(3), 2, torch.float64)
    one = network(images(2, 1), projections[:, :1])
    assert one.keypoints_3d.isnan().all()
    assert one.keypoints_2d.isfinite().all()
    views = torch.tensor([[False, False, False], [True, True, True]])
    none = network(images(2, 3), projections, views=views)
    assert none.keypoints_3d[0].isnan().all()
    assert none.keypoints_3d[1].isfinite().all()
    empty = network(images(0, 3), projections[:0])
    assert empty.keypoints_3d.shape == (0, JOINTS, 3)


# ---- Training, precision, compilers ----


def test_gradients() -> None:
    projections = projections_of(studio(3), 2, torch.float64)
    network = small(readout="soft_argmax", threshold=500.0)
    network(images(2, 3), projections).keypoints_3d.square().mean().backward()
    assert all(p.grad.isfinite().all() for p in network.parameters())
    assert all((p.grad != 0).any() for p in network.parameters())
    output = small()(images(2, 3), projections)
    assert not output.keypoints_3d.requires_grad
    assert output.heatmaps.requires_grad


def test_autocast_leaves_geometry_alone() -> None:
    _, pixels, projections = people(2, 4)
    heatmaps = paint(pixels)
    for readout in ("argmax", "soft_argmax"):
        want = run(heatmaps, projections, readout=readout)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            have = run(heatmaps, projections, readout=readout)
            real = small(torch.float32)(images(2, 4).float(), projections)
        for h, w in zip(fields(have), fields(want), strict=True):
            assert torch.equal(h, w)
        assert [x.dtype for x in fields(real)] == [torch.float32] * 2 + [torch.bool, torch.float32]
        assert real.keypoints_3d.isfinite().all()


def test_compiles_in_one_graph() -> None:
    network = small(threshold=40.0, refine=False)
    batch, projections = images(2, 4), projections_of(studio(4), 2, torch.float64)
    views = torch.tensor([[True] * 4, [True, False, True, True]])
    with torch.no_grad():
        want = network(batch, projections, views=views)
        compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
        have = compiled(batch, projections, views=views)
    assert isinstance(have, RansacOutput)
    for h, w in zip(fields(have), fields(want), strict=True):
        torch.testing.assert_close(h, w, rtol=1e-9, atol=1e-7, equal_nan=True)


def test_exports_with_any_batch_size() -> None:
    network = small(threshold=40.0)
    batch, projections = images(3, 4), projections_of(studio(4), 3, torch.float64)
    size = torch.export.Dim("size", min=2, max=64)
    with torch.no_grad():
        program = torch.export.export(
            network,
            (batch[:2], projections[:2]),
            dynamic_shapes={
                "images": {0: size}, "projections": {0: size}, 
            },
        )  # fmt: skip
        have, want = program.module()(batch, projections), network(batch, projections)
    assert isinstance(have, RansacOutput)
    for h, w in zip(fields(have), fields(want), strict=True):
        torch.testing.assert_close(h, w, rtol=1e-9, atol=1e-7)


# ---- Construction and bad input ----


def test_parameters_are_the_backbone_s() -> None:
    network = small()
    assert all(name.startswith("backbone.") for name in network.state_dict())
    branches = PoseResNet(
        18, JOINTS, algebraic_confidences=True, volumetric_confidences=4, width=4, deconv_channels=6
    )
    given = RansacTriangulation(JOINTS, backbone=branches)
    assert given.backbone is branches
    frozen = {n for n, p in given.named_parameters() if not p.requires_grad}
    assert frozen == {n for n, _ in given.named_parameters() if "_confidences." in n}


def test_reads_an_official_checkpoint(tmp_path: Path) -> None:
    source, target = small(torch.float32), small(torch.float32)
    nn.init.normal_(source.backbone.final_layer.weight)
    torch.save({f"module.{k}": v for k, v in source.state_dict().items()}, tmp_path / "weights.pth")
    load_official_checkpoint(target, tmp_path / "weights.pth", strict=True)
    batch, projections = images(1, 3, torch.float32), projections_of(studio(3), 1)
    assert torch.equal(target(batch, projections).heatmaps, source(batch, projections).heatmaps)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"threshold": 0.0}, ValueError, "threshold must be a finite number above 0"),
        ({"inverse_temperature": -1.0}, ValueError, "inverse_temperature must be a finite number"),
        ({"pairs": 0}, ValueError, "pairs must be 1 or more, got 0"),
        ({"pairs": 1.5}, TypeError, "pairs must be an integer or None, got float"),
        ({"readout": "max"}, ValueError, "readout must be one of 'argmax', 'soft_argmax'"),
        ({"depth": 19}, ValueError, "depth must be one of"),
        ({"backbone": nn.Identity()}, TypeError, "backbone must be a PoseResNet"),
        ({"num_joints": 4}, ValueError, "num_joints = 4"),
    ],
)
def test_settings_that_do_not_fit(
    options: dict[str, Any], error: type[Exception], words: str
) -> None:
    options = {"num_joints": JOINTS, "depth": 18, "width": 4, "deconv_channels": 6} | options
    if options["num_joints"] == 4:
        options["backbone"] = PoseResNet(18, JOINTS, width=4, deconv_channels=6)
    with pytest.raises(error, match=words):
        RansacTriangulation(**options)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ((images(1, 3)[0], projections_of(studio(3), 1)), ValueError, "images must be"),
        ((images(1, 3).int(), projections_of(studio(3), 1)), TypeError, "images must be float"),
        ((images(1, 3), projections_of(studio(2), 1)), ValueError, "projections must be"),
        ((images(1, 3), projections_of(studio(3), 1).half()), TypeError, "projections must be"),
    ],
)
def test_input_that_does_not_fit(
    arguments: tuple[Tensor, Tensor], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        small()(*arguments)


def test_views_that_do_not_fit() -> None:
    batch, projections = images(1, 3), projections_of(studio(3), 1, torch.float64)
    with pytest.raises(TypeError, match="views must be boolean"):
        small()(batch, projections, views=torch.ones(1, 3))
    with pytest.raises(ValueError, match="views must be"):
        small()(batch, projections, views=torch.ones(1, 2, dtype=torch.bool))
