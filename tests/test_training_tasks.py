# SPDX-License-Identifier: Apache-2.0
"""Tasks: the loss of each kind of network on a batch, its answer, its parameters, its start."""

from __future__ import annotations

from dataclasses import fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from tritool import losses
from tritool.data import Batch, collate
from tritool.models import VolumetricTriangulation, normalize_images
from tritool.training import load_network
from tritool.training.config import Config
from tritool.training.state import write_model
from tritool.training.tasks import Task, build_task, joints_that_count

NETWORKS: dict[str, dict[str, Any]] = {
    "ransac": {},
    "algebraic": {},
    "volumetric": {"volume_size": 32, "volume_channels": 4, "v2v_width": 2},
}
# Batch norm as it is at the beginning: what one sample or view gives does not depend on the others.
FROZEN = {"freeze_batch_norm": True}


def config(
    kind: str,
    model: dict[str, Any] | None = None,
    loss: dict[str, Any] | None = None,
    **training: Any,
) -> Config:
    studio = {"views": 3, "image_size": [160, 128], "obstacles": [0, 1]}
    return Config.from_dict(
        {
            "name": "test",
            "model": {
                "kind": kind,
                "depth": 18,
                "width": 4,
                "deconv_channels": 8,
                **NETWORKS[kind],
                **(model or {}),
            },
            "data": {
                "kind": "synthetic",
                "train": {"length": 4, "seed": 1, "studio": studio},
                "validation": {"length": 4, "seed": 2, "studio": studio},
            },
            "loss": loss or {},
            "training": {"steps": 1, **training},
        }
    )


def task_of(kind: str, *args: Any, **kwargs: Any) -> Task:
    torch.manual_seed(3)
    task = build_task(config(kind, *args, **kwargs))
    task.train_mode()
    return task


@cache
def batch() -> Batch:
    """Two samples of three views, pictures of 160 x 128."""
    data = config("ransac").data.dataset("train")
    return collate([data[0], data[1]])


def viewed(given: Batch, order: list[int]) -> Batch:
    """Some of the views, in this order."""
    per_view = ("images", "projections", "intrinsics", "keypoints_2d", "visibility", "views")
    chosen = {name: getattr(given, name)[:, order] for name in (*per_view, "boxes")}
    return replace(given, **chosen)


def only(given: Batch, which: int) -> Batch:
    """One of the samples."""
    names = [field.name for field in fields(given) if field.name != "joint_names"]
    return replace(given, **{name: getattr(given, name)[which : which + 1] for name in names})


def loss_of(task: Task, given: Batch, seed: int = 5) -> Tensor:
    return task.loss(given, torch.Generator().manual_seed(seed))[0]


def gradients(task: Task, loss: Tensor) -> Tensor:
    task.model.zero_grad()
    loss.backward()
    found = [p.grad.flatten() for p in task.model.parameters() if p.grad is not None]
    return torch.cat(found)


# ---- Losses ----


def test_the_ransac_loss_is_that_of_gaussians_cell_by_cell() -> None:
    task = task_of("ransac", loss={"heatmap_weight": 3.0, "heatmap_sigma": 1.5}, **FROZEN)
    heatmaps = task.predict(batch()).heatmaps
    assert heatmaps is not None
    rows, columns = heatmaps.shape[-2:]
    assert (rows, columns) == (32, 40)
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    # Cell (0, 0) is centred between pixels 1 and 2 of the image.
    pixels = torch.stack([4 * x + 1.5, 4 * y + 1.5], -1)
    away = (pixels - batch().keypoints_2d[..., None, None, :]).square().sum(-1)
    gaussians = torch.exp(-away / (2 * (4 * 1.5) ** 2))
    expected = 3 * (heatmaps - gaussians).square().mean()
    torch.testing.assert_close(loss_of(task, batch()), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("position", ["soft_mse", "mse", "l1", "l2"])
def test_the_algebraic_loss_is_in_centimetres(position: str) -> None:
    task = task_of("algebraic", loss={"position": position, "heatmap_weight": 2.0}, **FROZEN)
    found = task.predict(batch())
    assert found.heatmaps is not None
    error = (found.keypoints_3d - batch().keypoints_3d) / 10
    square = error.square()
    expected = {
        "soft_mse": torch.where(square < 400, square, square**0.1 * 400**0.9).mean(),
        "mse": square.mean(),
        "l1": error.abs().mean(),
        "l2": error.norm(dim=-1).mean(),
    }[position]
    total, terms = task.loss(batch())
    torch.testing.assert_close(terms["position"], expected, rtol=1e-4, atol=0)
    cells = (batch().keypoints_2d + 0.5) / 4 - 0.5
    expected_maps = 2 * losses.heatmap_mse(found.heatmaps, cells, sigma=2.0)
    torch.testing.assert_close(terms["heatmaps"], expected_maps, rtol=1e-5, atol=0)
    torch.testing.assert_close(total.detach(), terms["position"] + terms["heatmaps"])


def test_the_volumetric_loss_is_that_of_millimetres_with_the_official_balance() -> None:
    task = task_of("volumetric", {"random_rotation": False}, {"beta": 0.02, "scale": 0.1}, **FROZEN)
    found = task.predict(batch())
    assert found.volumes is not None
    assert found.grid is not None
    millimetres = losses.volumetric_loss(
        found.volumes, found.grid, batch().keypoints_3d, beta=0.02 / 0.1
    )
    torch.testing.assert_close(loss_of(task, batch()), millimetres * 0.1, rtol=1e-4, atol=0)


def test_one_view_is_compared_relative_to_the_pelvis() -> None:
    one = viewed(batch(), [1])
    options = {"random_rotation": False}
    relative = task_of("volumetric", options, {"beta": 0.0}, **FROZEN)
    found = relative.predict(one).keypoints_3d

    def own(joints: Tensor) -> Tensor:
        return torch.cat([joints[:, :1], joints[:, 1:] - joints[:, :1]], 1)

    expected = (own(found) - own(one.keypoints_3d)).abs().mean() / 10
    torch.testing.assert_close(loss_of(relative, one), expected, rtol=1e-4, atol=0)

    absolute = task_of(
        "volumetric", options, {"beta": 0.0, "relative_single_view": False}, **FROZEN
    )
    expected = (found - one.keypoints_3d).abs().mean() / 10
    torch.testing.assert_close(loss_of(absolute, one), expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("kind", NETWORKS)
def test_an_absent_view_is_one_left_out(kind: str) -> None:
    task = task_of(kind, loss={"heatmap_weight": 1.0} if kind != "volumetric" else {}, **FROZEN)
    without = viewed(batch(), [0, 2])
    views = batch().views.clone()
    views[:, 1] = False
    masked = replace(
        batch(),
        views=views,
        projections=torch.where(views[..., None, None], batch().projections, torch.nan),
        keypoints_2d=torch.where(views[..., None, None], batch().keypoints_2d, torch.nan),
    )
    losses_ = [loss_of(task, each) for each in (without, masked)]
    torch.testing.assert_close(losses_[1], losses_[0], rtol=1e-4, atol=0)
    slopes = [gradients(task, loss) for loss in losses_]
    assert slopes[1].isfinite().all()
    assert (slopes[1] - slopes[0]).norm() < 1e-3 * slopes[0].norm()
    answers = [task.predict(each).keypoints_3d for each in (without, masked)]
    torch.testing.assert_close(answers[1], answers[0], rtol=1e-4, atol=0.5)


@pytest.mark.parametrize("kind", NETWORKS)
def test_the_order_of_views_does_not_matter(kind: str) -> None:
    task = task_of(kind, **FROZEN)
    turned = viewed(batch(), [2, 0, 1])
    torch.testing.assert_close(loss_of(task, turned), loss_of(task, batch()), rtol=1e-4, atol=0)


@pytest.mark.parametrize("kind", ["algebraic", "volumetric"])
def test_joints_not_known_do_not_count(kind: str) -> None:
    """The loss of a batch is the mean over known joints, however they are spread over samples."""
    task = task_of(kind, {"random_rotation": False} if kind == "volumetric" else {}, **FROZEN)
    keypoints = batch().keypoints_3d.clone()
    keypoints[0, 4] = torch.nan
    keypoints[1, 6:] = torch.nan
    given = replace(batch(), keypoints_3d=keypoints)
    assert joints_that_count(given).sum(1).tolist() == [16, 6]

    expected = (16 * loss_of(task, only(given, 0)) + 6 * loss_of(task, only(given, 1))) / 22
    # A joint beyond the cube does not count in its likelihood; here none is.
    torch.testing.assert_close(loss_of(task, given), expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("kind", NETWORKS)
def test_parts_weigh_by_what_they_have(kind: str) -> None:
    """The loss of a batch is the mean of its samples', weighted by what each counts."""
    task = task_of(kind, {"random_rotation": False} if kind == "volumetric" else {}, **FROZEN)
    views = torch.tensor([[True, True, True], [False, True, False]])
    keypoints_2d = torch.where(views[..., None, None], batch().keypoints_2d, torch.nan)
    given = replace(batch(), views=views, keypoints_2d=keypoints_2d)
    parts = [only(given, which) for which in (0, 1)]
    counts = [task.counted(part) for part in parts]
    # One view is no triangulation.
    assert counts == {"ransac": [51, 17], "algebraic": [17, 0], "volumetric": [17, 17]}[kind]
    assert task.counted(given) == sum(counts)
    weighted = sum(c * loss_of(task, part) for c, part in zip(counts, parts, strict=True))
    torch.testing.assert_close(loss_of(task, given), weighted / sum(counts), rtol=1e-4, atol=0)


@pytest.mark.parametrize("kind", NETWORKS)
def test_nothing_known_teaches_nothing(kind: str) -> None:
    task = task_of(kind)
    given = replace(
        batch(),
        keypoints_3d=torch.full_like(batch().keypoints_3d, torch.nan),
        keypoints_2d=torch.full_like(batch().keypoints_2d, torch.nan),
    )
    loss = loss_of(task, given)
    assert loss == 0
    assert (gradients(task, loss) == 0).all()


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("where", ["backbone.bn1.weight", "backbone.deconv_layers.0.weight"])
def test_a_network_that_has_broken_down_has_no_loss(kind: str, where: str) -> None:
    """Not 0, as the mean over no joints would be."""
    task = task_of(kind)
    with torch.no_grad():
        dict(task.model.named_parameters())[where].fill_(torch.nan)
    assert loss_of(task, batch()).isnan()


@pytest.mark.parametrize("kind", NETWORKS)
def test_every_trained_parameter_gets_a_gradient(kind: str) -> None:
    task = task_of(kind)
    loss_of(task, batch()).backward()
    without = [
        name
        for name, parameter in task.model.named_parameters()
        if parameter.requires_grad and (parameter.grad is None or not parameter.grad.any())
    ]
    # What a ReLU has switched off for all pixels may be left out, here and there; no layer is.
    assert len(without) <= 3, without
    assert all(p.grad is None for p in task.model.parameters() if not p.requires_grad)


@pytest.mark.parametrize("kind", NETWORKS)
def test_half_precision_comes_close(kind: str) -> None:
    task = task_of(kind, {"random_rotation": False} if kind == "volumetric" else {}, **FROZEN)
    exact = loss_of(task, batch())
    with torch.autocast("cpu", torch.bfloat16):
        rounded = loss_of(task, batch())
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, exact, rtol=0.1, atol=0)
    assert gradients(task, rounded).isfinite().all()


# ---- What is drawn ----


def test_draws_come_from_the_generator_alone() -> None:
    task = task_of("volumetric", {"center_noise": 50.0}, **FROZEN)
    first = loss_of(task, batch(), seed=1)
    torch.manual_seed(99)
    assert torch.equal(loss_of(task, batch(), seed=1), first)
    assert not torch.equal(loss_of(task, batch(), seed=2), first)


def test_draws_do_not_depend_on_how_a_batch_is_cut() -> None:
    task = task_of("volumetric", {"center_noise": 50.0}, **FROZEN)
    parts = [loss_of(task, only(batch(), which)) for which in (0, 1)]
    torch.testing.assert_close(loss_of(task, batch()), sum(parts) / 2, rtol=1e-4, atol=0)


def test_cubes_turn_evenly_and_in_training_only(monkeypatch: pytest.MonkeyPatch) -> None:
    task = task_of("volumetric", **FROZEN)
    seen: list[Tensor | None] = []

    def spied(*_: object, rotation: Tensor | None = None, **__: object) -> None:
        seen.append(rotation)
        raise InterruptedError

    monkeypatch.setattr(VolumetricTriangulation, "forward", spied)
    for seed in range(200):
        with pytest.raises(InterruptedError):
            task.loss(batch(), torch.Generator().manual_seed(seed))
    angles = torch.stack([angle for angle in seen if angle is not None])
    assert angles.shape == (200, 2)
    shares = torch.histc(angles, 4, 0, 2 * torch.pi) / angles.numel()
    assert shares.sum() == 1
    assert (shares - 0.25).abs().max() < 0.08
    # Samples of a batch turn apart.
    assert (angles[:, 0] - angles[:, 1]).abs().min() > 0
    task.model.eval()
    with pytest.raises(InterruptedError):
        task.loss(batch())
    assert seen[-1] is None


def test_the_centre_is_shifted_in_training_only(monkeypatch: pytest.MonkeyPatch) -> None:
    noise = 50.0
    task = task_of("volumetric", {"center_noise": noise}, **FROZEN)
    seen: list[Tensor] = []
    forward = VolumetricTriangulation.forward

    def spied(self: Any, images: Tensor, projections: Tensor, centers: Tensor, **rest: Any) -> Any:
        seen.append(centers)
        return forward(self, images, projections, centers, **rest)

    monkeypatch.setattr(VolumetricTriangulation, "forward", spied)
    task.predict(batch())
    assert torch.equal(seen.pop(), batch().keypoints_3d[:, 0])
    for seed in range(6):
        loss_of(task, batch(), seed)
    shifts = torch.stack(seen) - batch().keypoints_3d[:, 0]
    assert 0.6 * noise < shifts.std() < 1.4 * noise


# ---- Answers ----


@pytest.mark.parametrize("kind", NETWORKS)
def test_prediction_changes_nothing(kind: str) -> None:
    task = task_of(kind)
    frozen = next(m for m in task.model.modules() if isinstance(m, _BatchNorm))
    frozen.eval()
    modes = {name: module.training for name, module in task.model.named_modules()}
    state = {name: value.clone() for name, value in task.model.state_dict().items()}
    found = task.predict(batch())
    assert not found.keypoints_3d.requires_grad
    assert found.keypoints_3d.shape == (2, 17, 3)
    assert torch.equal(task.predict(batch()).keypoints_3d, found.keypoints_3d)
    assert modes == {name: module.training for name, module in task.model.named_modules()}
    assert all(torch.equal(value, state[name]) for name, value in task.model.state_dict().items())


def test_random_pairs_are_the_same_each_time() -> None:
    task = task_of("ransac", {"pairs": 1})
    torch.nn.init.normal_(task.model.backbone.final_layer.weight)
    first = task.predict(batch()).keypoints_3d
    torch.manual_seed(1)
    assert torch.equal(task.predict(batch()).keypoints_3d, first)


def test_what_each_kind_says() -> None:
    said = {}
    for kind in NETWORKS:
        found = task_of(kind).predict(batch())
        said[kind] = {f.name for f in fields(found) if getattr(found, f.name) is not None}
    maps = {"keypoints_3d", "keypoints_2d", "heatmaps", "confidences"}
    assert said["ransac"] == said["algebraic"] == maps
    assert said["volumetric"] == {"keypoints_3d", "volumes", "grid"}


def test_colours_in_the_order_the_network_takes() -> None:
    found = {
        order: task_of("algebraic", {"channel_order": order}).predict(batch()).heatmaps
        for order in ("rgb", "bgr")
    }
    task = task_of("algebraic").model.eval()
    flipped = normalize_images(batch().images, order="bgr")
    with torch.no_grad():
        expected = task(flipped, batch().projections).heatmaps
    assert torch.equal(found["bgr"], expected)
    assert not torch.equal(found["bgr"], found["rgb"])


# ---- Parameters ----


@pytest.mark.parametrize("kind", NETWORKS)
def test_groups_have_every_trained_parameter_once(kind: str) -> None:
    rates = {"backbone": 1e-5, "head": 1e-4, "volume": 1e-3}
    task = task_of(kind, learning_rate=rates)
    groups = task.parameter_groups()
    assert all(group["lr"] == rates[group["name"]] for group in groups)
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    trained = [id(p) for p in task.model.parameters() if p.requires_grad]
    assert sorted(grouped) == sorted(trained)
    names = {id(p): name for name, p in task.model.named_parameters()}
    of = {names[id(p)]: group["name"] for group in groups for p in group["params"]}
    assert of["backbone.conv1.weight"] == of["backbone.layer4.1.bn2.bias"] == "backbone"
    assert of["backbone.deconv_layers.0.weight"] == "head"
    if kind == "algebraic":
        assert of["backbone.alg_confidences.head.4.weight"] == "head"
        assert of["backbone.final_layer.weight"] == "head"
    if kind == "volumetric":
        assert of["process_features.0.weight"] == of["volume_net.output_layer.bias"] == "volume"


def test_a_rate_of_0_freezes_a_part_and_its_statistics() -> None:
    task = task_of("algebraic", learning_rate={"backbone": 0.0, "head": 1e-3, "volume": 0.0})
    state = {name: value.clone() for name, value in task.model.state_dict().items()}
    optimizer = torch.optim.Adam(task.parameter_groups())
    loss_of(task, batch()).backward()
    optimizer.step()
    changed = {
        name
        for name, value in task.model.state_dict().items()
        if not torch.equal(value, state[name])
    }
    assert changed
    heads = ("backbone.deconv_layers.", "backbone.final_layer.", "backbone.alg_confidences.")
    assert all(name.startswith(heads) for name in changed)
    assert "backbone.deconv_layers.1.running_mean" in changed


def test_frozen_batch_norm_is_trained_but_keeps_its_statistics() -> None:
    task = task_of("volumetric", **FROZEN)
    statistics = {n: b.clone() for n, b in task.model.named_buffers()}
    loss_of(task, batch()).backward()
    assert all(torch.equal(b, statistics[n]) for n, b in task.model.named_buffers())
    weight = dict(task.model.named_parameters())["backbone.bn1.weight"]
    assert weight.grad is not None
    assert weight.grad.any()


# ---- Where training starts ----


def saved(task: Task, path: Path, step: int = 7) -> Path:
    write_model(path, task.model, task.config, step)
    return path


def test_a_backbone_from_another_kind(tmp_path: Path) -> None:
    source = task_of("algebraic")
    path = saved(source, tmp_path / "algebraic.safetensors")
    torch.manual_seed(8)
    target = build_task(config("volumetric", {"backbone_from": str(path)}))
    own = {name: value.clone() for name, value in target.model.state_dict().items()}
    (line,) = target.start_weights()
    assert str(path) in line
    there = source.model.state_dict()
    for name, value in target.model.state_dict().items():
        if name.startswith("backbone."):
            assert torch.equal(value, there[name]), name
        else:
            assert torch.equal(value, own[name]), name


def test_a_backbone_that_does_not_fit(tmp_path: Path) -> None:
    path = saved(task_of("algebraic"), tmp_path / "narrow.safetensors")
    target = build_task(config("algebraic", {"backbone_from": str(path), "width": 6}))
    state = {name: value.clone() for name, value in target.model.state_dict().items()}
    with pytest.raises(ValueError, match=r"narrow\.safetensors: it has no backbone") as caught:
        target.start_weights()
    assert "\n" not in str(caught.value)
    assert all(torch.equal(value, state[name]) for name, value in target.model.state_dict().items())
    missing = build_task(config("algebraic", {"backbone_from": str(tmp_path / "no")}))
    with pytest.raises(FileNotFoundError):
        missing.start_weights()
    unknown = build_task(config("algebraic", {"backbone_from": "tritool:no-such"}))
    with pytest.raises(ValueError, match="tritool:no-such: no such weights come with"):
        unknown.start_weights()


def test_published_weights_of_the_trunk(tmp_path: Path) -> None:
    source = task_of("algebraic").model.state_dict()
    trunk = {
        name.removeprefix("backbone."): value
        for name, value in source.items()
        if name.startswith(("backbone.conv1", "backbone.bn1", "backbone.layer"))
    }
    path = tmp_path / "resnet18.pth"
    torch.save(trunk, path)
    torch.manual_seed(8)
    target = build_task(config("volumetric", {"imagenet_trunk": str(path)}))
    assert target.start_weights()
    state = target.model.state_dict()
    assert all(torch.equal(state[f"backbone.{name}"], value) for name, value in trunk.items())


def test_an_official_checkpoint(tmp_path: Path) -> None:
    source = task_of("algebraic").model.state_dict()
    path = tmp_path / "official.pth"
    torch.save({f"module.{name}": value for name, value in source.items()}, path)
    torch.manual_seed(8)
    target = build_task(config("algebraic", {"official_checkpoint": str(path)}))
    assert target.start_weights()
    assert all(torch.equal(v, source[n]) for n, v in target.model.state_dict().items())


def test_the_centre_of_an_algebraic_network(tmp_path: Path) -> None:
    source = task_of("algebraic")
    path = saved(source, tmp_path / "algebraic.safetensors")
    task = task_of("volumetric", {"algebraic_from": str(path), "pelvis": [1, 4]})
    found = task.predict(batch())
    expected = source.predict(batch()).keypoints_3d[:, [1, 4]].mean(1)
    assert found.grid is not None
    middle = found.grid.origin + found.grid.axes.sum(1) * (found.grid.size[0] - 1) / 2
    torch.testing.assert_close(middle, expected, rtol=1e-4, atol=0.1)
    # In training the centre is the truth.
    assert loss_of(task, batch()).isfinite()
    # It takes its own order of colours.
    other = task_of(
        "volumetric", {"algebraic_from": str(path), "pelvis": [1, 4], "channel_order": "bgr"}
    )
    grid = other.predict(batch()).grid
    assert grid is not None
    torch.testing.assert_close(grid.origin, found.grid.origin)
    # It is no part of what is saved.
    assert not [name for name in task.model.state_dict() if "algebraic" in name]


def test_a_centre_from_something_else(tmp_path: Path) -> None:
    path = saved(task_of("ransac"), tmp_path / "ransac.safetensors")
    task = task_of("volumetric", {"algebraic_from": str(path)})
    with pytest.raises(ValueError, match=r"ransac\.safetensors: it is of kind ransac"):
        task.predict(batch())


@pytest.mark.parametrize("kind", sorted(NETWORKS))
def test_a_trained_network_is_loaded_as_it_was(kind: str, tmp_path: Path) -> None:
    # What it once started from need not be there any more.
    settings = config(kind, {"backbone_from": "gone.safetensors"})
    torch.manual_seed(3)
    trained = build_task(settings).model
    write_model(tmp_path / "best.safetensors", trained, settings, 7)
    network = load_network(tmp_path / "best.safetensors")
    assert type(network) is type(trained)
    assert not network.training
    assert network.state_dict().keys() == trained.state_dict().keys()
    for name, tensor in trained.state_dict().items():
        assert torch.equal(network.state_dict()[name], tensor), name


def test_no_trained_network(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no such weights.*known are small-algebraic, small-r"):
        load_network("tritool:small")
    (tmp_path / "text.safetensors").write_text("nothing")
    with pytest.raises(ValueError, match=r"text\.safetensors"):
        load_network(tmp_path / "text.safetensors")
    with pytest.raises(OSError, match=r"none\.safetensors"):
        load_network(tmp_path / "none.safetensors")
