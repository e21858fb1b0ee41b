# SPDX-License-Identifier: Apache-2.0
"""Training without 3D labels: what the loss may know, its phases, pseudo-labels, whole runs."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from training_runs import same, tensors

from tritool import losses
from tritool.data import Batch, Sample, collate
from tritool.data.synthetic import ordinary_limb_lengths
from tritool.models import absolute_scale, normalize_images
from tritool.models.pose_resnet import PoseResNetOutput
from tritool.skeletons import HUMAN36M_JOINTS
from tritool.training import Config, ConfigError, evaluate, loop, train
from tritool.training.state import CheckpointError, read_model, write_model
from tritool.training.tasks import Prediction, build_task
from tritool.training.weak import ImagePoses, WeakTask

PELVIS, NECK = HUMAN36M_JOINTS.index("pelvis"), HUMAN36M_JOINTS.index("neck")
Terms = dict[str, Tensor]


def part(length: int, seed: int, views: int) -> dict[str, Any]:
    studio = {"preset": "easy", "views": views, "image_size": [32, 64], "clutter": [0, 0]}
    return {"length": length, "seed": seed, "studio": studio}


VALUES: dict[str, Any] = {
    "name": "tiny weak",
    "model": {
        "kind": "weak", "depth": 18, "width": 4, "deconv_channels": 8, "confidence": "mass",
        "limb_lengths": "studio",
    },
    "data": {
        "kind": "mixture", "labelled": part(5, 1, 1), "multi_view": part(4, 2, 3),
        "validation": part(4, 3, 2), "images": 2,
    },
    "loss": {"heatmap_loss": "cross_entropy", "heatmap_sigma": 1.0},
    "training": {
        "steps": 3, "batch_size": 3, "learning_rate": 1e-3, "log_every": 1, "validate_every": 100,
        "save_every": 100, "tensorboard": False,
    },
}  # fmt: skip


def tiny_values(**changes: dict[str, Any]) -> dict[str, Any]:
    values = copy.deepcopy(VALUES)
    for section, change in changes.items():
        values[section] |= change
    return values


def tiny(**changes: dict[str, Any]) -> Config:
    return Config.from_dict(tiny_values(**changes))


def task_of(seed: int = 3, **changes: dict[str, Any]) -> WeakTask:
    """A network whose maps say something, with batch norm as it is at the beginning."""
    torch.manual_seed(seed)
    changes["training"] = {"freeze_batch_norm": True} | changes.get("training", {})
    task = build_task(tiny(**changes))
    assert isinstance(task, WeakTask)
    nn.init.normal_(backbone_of(task).final_layer.weight, std=0.2)
    task.train_mode()
    return task


def backbone_of(task: WeakTask) -> Any:
    return task.model.backbone


@cache
def samples(kind: str = "3d") -> tuple[Sample, ...]:
    """Two labelled images, then two samples of three views."""
    data = tiny(data={"labels": kind}).data.dataset("train")
    return tuple(data[at] for at in (0, 3, 5, 8))


def batch(kind: str = "none") -> Batch:
    return collate(samples(kind))


def loss_of(task: WeakTask, given: Batch, step: int = 0) -> tuple[Tensor, Terms]:
    task.begin_step(step)
    return task.loss(given, torch.Generator().manual_seed(5))


def gradients(task: WeakTask, loss: Tensor) -> Tensor:
    task.model.zero_grad()
    loss.backward()
    found = [p.grad.flatten() for p in task.model.parameters() if p.grad is not None]
    return torch.cat(found)


def with_views(given: Batch, views: Tensor) -> Batch:
    """Some views are absent; where they were is rubbish."""

    def spoilt(values: Tensor) -> Tensor:
        filler = 255 if values.dtype == torch.uint8 else torch.nan
        return torch.where(views.reshape(*views.shape, *[1] * (values.dim() - 2)), values, filler)

    names = ("images", "intrinsics", "projections", "keypoints_2d")
    changes: dict[str, Any] = {
        n: spoilt(getattr(given, n)).to(getattr(given, n).dtype) for n in names
    }
    return replace(given, views=views, **changes)


def rows(given: Batch, chosen: list[int]) -> Batch:
    """Some of the samples."""
    changes: dict[str, Any] = {}
    for field in fields(given):
        value = getattr(given, field.name)
        if isinstance(value, Tensor):
            changes[field.name] = value[chosen]
        elif field.name != "joint_names":
            changes[field.name] = tuple(value[at] for at in chosen)
    return replace(given, **changes)


# ---- What the loss may know ----


def test_neither_extrinsics_nor_3d_labels_are_read() -> None:
    # True ones, of which the 2D labels of several views alone are hidden.
    told = batch("3d")
    hidden = told.keypoints_2d.clone()
    hidden[2:] = torch.nan
    told = replace(told, keypoints_2d=hidden)
    blind = replace(
        told,
        projections=torch.full_like(told.projections, torch.nan),
        keypoints_3d=torch.full_like(told.keypoints_3d, torch.nan),
        visibility=torch.zeros_like(told.visibility),
        boxes=torch.full_like(told.boxes, torch.nan),
    )
    found = []
    for given in (told, blind, batch("none")):
        task = task_of()
        loss, terms = loss_of(task, given)
        assert all(term > 0 for term in terms.values()), terms
        found.append((loss.detach(), gradients(task, loss)))
    for loss, gradient in found[1:]:
        assert torch.equal(loss, found[0][0])
        assert torch.equal(gradient, found[0][1])


def test_the_terms_are_those_of_the_losses() -> None:
    settings: Any = {"heatmap_weight": 3.0, "alpha": 2.0, "psi": 4.0, "norm": "l2", "floor": 0.001}
    settings |= {"depth_bound": 6.0, "pair_depth": 0.2}
    task, given = task_of(loss=settings, model={"inverse_temperature": 7.0}), batch("none")
    with torch.no_grad():
        # Depths that some limbs are too short for.
        backbone_of(task).final_layer.weight[17:] *= 20
    _, terms = loss_of(task, given)
    images = normalize_images(given.images)
    with torch.no_grad():
        output = task.model(images, given.intrinsics, views=given.views)
    limbs, lengths = ordinary_limb_lengths()
    unit = lengths[limbs.index((PELVIS, NECK))]
    several = slice(2, 4)
    phi, valid = output.confidences[several], output.valid[several]
    cells = (given.keypoints_2d + 0.5) / 4 - 0.5
    expected = {
        "heatmaps": 3
        * losses.heatmap_cross_entropy(
            output.heatmaps[:2, 0], cells[:2, 0], sigma=1.0, inverse_temperature=7.0
        ),
        "consistency": 2
        * losses.multi_view_consistency(
            output.pose[several], phi, valid=valid, norm="l2", floor=0.001
        ),
        "limbs": 4
        * losses.limb_length_loss(
            output.pose[several], [length / unit for length in lengths], limbs, phi, valid=valid
        ),
        # Of poses that are not valid, too; and as sure of every joint.
        "depth_bound": 6
        * (
            losses.limb_depth_bound(
                output.relative_depth[several], [length / unit for length in lengths], limbs
            )
            + losses.limb_depth_bound(
                output.relative_depth[several],
                [0.2],
                [(NECK, PELVIS)],
                slack=1.0,
            )
        ),
    }
    assert terms.keys() == expected.keys()
    for name, term in terms.items():
        assert term > 0
        torch.testing.assert_close(term, expected[name], rtol=1e-4, atol=1e-6, msg=name)


def test_settings_reach_network_and_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = {
        "inverse_temperature": 7.0, "confidence": "peak", "min_ratio": 0.1, "pelvis": [7],
        "pair": [2, 1], "learnable_temperature": True,
    }  # fmt: skip
    loss: Any = {
        "heatmap_weight": 3.0, "heatmap_loss": "mse", "heatmap_sigma": 1.5, "alpha": 2.0,
        "psi": 4.0, "norm": "l2", "through_transform": True, "min_joints": 6, "floor": 0.02,
        "bending_margin": 0.4,
    }  # fmt: skip
    task = task_of(model=model, loss=loss)
    network: Any = task.model
    assert (network.inverse_temperature, network.confidence) == (7.0, "peak")
    assert (network.min_ratio, network.root, network.pair) == (0.1, 7, (2, 1))
    assert network.log_temperature_factor is not None
    seen = []
    total = losses.weak_total

    def spied(settings: losses.WeakLossSettings, **given: Any) -> losses.WeakLoss:
        seen.append(settings)
        return total(settings, **given)

    monkeypatch.setattr(losses, "weak_total", spied)
    loss_of(task, batch())
    assert seen == [
        losses.WeakLossSettings(
            heatmap=3.0, heatmap_loss="mse", sigma=1.5, inverse_temperature=7.0, alpha=2.0, psi=4.0,
            norm="l2", through_transform=True, min_joints=6, floor=0.02, bending_margin=0.4,
        )
    ]  # fmt: skip


def test_full_supervision_by_loops() -> None:
    task, given = task_of(loss={"depth": 3.0}), batch("3d")
    views = torch.tensor([[True, False, False]] * 2 + [[True, False, True], [True] * 3])
    joints = given.keypoints_3d.clone()
    joints[2, 5] = torch.nan
    given = replace(with_views(given, views), keypoints_3d=joints)
    _, terms = loss_of(task, given)
    images = normalize_images(given.images)
    total, count = 0.0, 0
    for at, sample in enumerate(samples("3d")):
        points = joints[at].double()
        unit = (points[NECK] - points[PELVIS]).norm()
        for view in views[at].nonzero()[:, 0].tolist():
            with torch.no_grad():
                said = task.model(images[at, view][None], given.intrinsics[at, view])
            R, t = sample.cameras.R[view].double(), sample.cameras.t[view].double()
            for joint in range(17):
                depth, root = ((R @ points[j] + t)[2] for j in (joint, PELVIS))
                error = abs(float(said.relative_depth[0, joint] - (depth - root) / unit))
                if error == error:
                    total, count = total + error, count + 1
    assert count == 5 * 17 - 2
    assert terms["depth"].item() == pytest.approx(3 * total / count, rel=1e-4)
    # Where there are no 3D labels there is nothing to learn from.
    assert loss_of(task, batch("none"))[1]["depth"] == 0


def test_true_depths_are_not_rounded() -> None:
    task, given = task_of(loss={"depth": 1.0}), batch("3d")
    output = task.model(normalize_images(given.images)[given.views], given.intrinsics[given.views])
    expected = task._depth_error(given, output)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(task._depth_error(given, output), expected)


def test_phases() -> None:
    task = task_of(
        loss={
            "pretrain_steps": 2, "bending_steps": 3, "bending": 2.0, "bending_margin": 3.0,
            "alpha": 7.0, "psi": 5.0, "depth_bound": 0.0,
        }
    )  # fmt: skip
    found = [loss_of(task, batch(), step) for step in range(7)]
    active = [{name for name, term in terms.items() if term != 0} for _, terms in found]
    maps = {"heatmaps"}
    assert active[:2] == [maps] * 2
    assert active[2:5] == [maps | {"bending"}] * 3
    assert active[5:] == [maps | {"consistency", "limbs"}] * 2
    assert all(terms.keys() == found[0][1].keys() for _, terms in found)
    for loss, terms in found:
        torch.testing.assert_close(loss.detach(), torch.stack(list(terms.values())).sum())
    # Depths are not trained by heat maps alone.
    depths = backbone_of(task).final_layer.weight
    for step, moves in ((0, False), (3, True), (6, True)):
        gradients(task, loss_of(task, batch(), step)[0])
        assert bool(depths.grad[17:].any()) == moves


def test_joints_are_held_for_the_steps_asked_for() -> None:
    """While they are, views and limbs do not reach the heat maps."""
    loss = {"heatmap_weight": 0.0, "pretrain_steps": 1, "hold_2d_steps": 2, "mean_depth": 2.0}
    task = task_of(loss=loss)
    final = backbone_of(task).final_layer.weight
    for step, moves in ((1, False), (2, False), (3, True)):
        gradients(task, loss_of(task, batch(), step)[0])
        assert bool(final.grad[:17].any()) == moves
        assert final.grad[17:].any()


def test_the_mean_depth_over_images_counts() -> None:
    task, given = task_of(loss={"pretrain_steps": 1, "mean_depth": 2.0}), batch()
    _, terms = loss_of(task, given, 0)
    assert loss_of(task, given, 1)[1]["mean_depth"] == terms["mean_depth"]
    with torch.no_grad():
        seen = given.views
        output = task.model(normalize_images(given.images)[seen], given.intrinsics[seen])
    depths = output.relative_depth.double().numpy()
    expected = 2 * sum(float(depths[:, j].mean()) ** 2 for j in range(17)) / 17
    assert terms["mean_depth"].item() == pytest.approx(expected, rel=1e-4)
    assert expected > 0


# ---- Views that there are not, poses that there are not ----


def test_images_alone_have_no_agreement() -> None:
    task, given = task_of(), collate(samples("none")[:2])
    assert given.views.shape == (2, 1)
    loss, terms = loss_of(task, given)
    assert terms["consistency"] == terms["limbs"] == 0
    assert loss == terms["heatmaps"] > 0
    assert gradients(task, loss).isfinite().all()
    # Padding is no view.
    padded, _ = loss_of(task, rows(batch(), [0, 1]))
    assert padded == loss
    assert task.counted(given) == 2
    assert task.counted(batch()) == 8


def test_an_absent_view_is_a_view_left_out() -> None:
    views = torch.tensor([[True, False, False]] * 2 + [[True, False, True], [False, True, False]])
    task = task_of()
    loss, terms = loss_of(task, with_views(batch(), views))
    assert all(terms[name] > 0 for name in ("heatmaps", "consistency", "limbs"))
    gradient = gradients(task, loss)
    assert gradient.isfinite().all()
    assert task.counted(with_views(batch(), views)) == 5
    two = samples("none")[2].select([0, 2])
    expected, _ = loss_of(
        task, collate([*samples("none")[:2], two, samples("none")[3].select([1])])
    )
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    turned, _ = loss_of(task, collate([*samples("none")[:2], two.select([1, 0])]))
    torch.testing.assert_close(turned, loss, rtol=1e-5, atol=0)


def test_a_batch_without_labels_or_views() -> None:
    task, given = task_of(), rows(batch(), [2, 3])
    loss, terms = loss_of(task, given)
    assert terms["heatmaps"] == 0
    assert loss > 0
    assert gradients(task, loss).isfinite().all()
    alone = with_views(given, torch.tensor([[True, False, False], [False, True, False]]))
    loss, terms = loss_of(task, alone)
    assert loss == 0
    assert not gradients(task, loss).any()


def foreshortened(task: WeakTask, how: str) -> None:
    """From now on the network sees the torso of some or all people end-on."""

    def instead(module: nn.Module, given: object, found: PoseResNetOutput) -> PoseResNetOutput:
        maps = found.heatmaps.clone()
        if how == "same pixels":
            maps[:, NECK] = maps[:, PELVIS]
        if how == "same pixels for some":
            maps[::2, NECK] = maps[::2, PELVIS]
        if how == "far deeper":
            maps[:, 17 + NECK] = maps[:, 17 + PELVIS] + 3
        if how == "as deep as long":
            maps[:, 17 + NECK] = maps[:, 17 + PELVIS] + 1
        return found._replace(heatmaps=maps)

    backbone_of(task).register_forward_hook(instead)


@pytest.mark.parametrize(
    "how", ["same pixels", "same pixels for some", "far deeper", "as deep as long"]
)
@pytest.mark.parametrize("step", [0, 3])
def test_a_torso_seen_end_on_leaves_numbers(how: str, step: int) -> None:
    task = task_of(loss={"bending": 1.0, "bending_steps": 1, "depth": 1.0, "bending_margin": 3.0})
    foreshortened(task, how)
    loss, terms = loss_of(task, batch("3d"), step)
    assert loss.isfinite()
    assert terms["heatmaps"] > 0
    if how in ("same pixels", "far deeper"):
        assert terms["consistency"] == terms["limbs"] == terms["bending"] == 0
    gradient = gradients(task, loss)
    assert gradient.isfinite().all()
    assert gradient.any()
    found = task.predict(batch("3d")).keypoints_3d
    assert found.isfinite().all()


@pytest.mark.parametrize("weight", ["bn1.weight", "final_layer.weight"])
def test_a_network_that_has_broken_down_has_no_loss(weight: str) -> None:
    task = task_of()
    with torch.no_grad():
        dict(backbone_of(task).named_parameters())[weight].fill_(torch.nan)
    assert loss_of(task, batch())[0].isnan()
    # Not 0 either where there are no labels.
    assert loss_of(task, rows(batch(), [2, 3]))[0].isnan()


# ---- Pseudo-labels ----


@pytest.fixture
def targets(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, Tensor]]:
    """What heat maps are compared with, cells and weights, at every loss."""
    seen: list[tuple[Tensor, Tensor]] = []
    total = losses.weak_total

    def spied(*args: Any, **given: Any) -> Any:
        seen.append((given["target"], given["target_valid"]))
        return total(*args, **given)

    monkeypatch.setattr(losses, "weak_total", spied)
    return seen


def teacher_in(folder: Path, **model: Any) -> tuple[Path, WeakTask]:
    task = task_of(8, model={"deconv_channels": 6, **model})
    path = folder / "teacher.safetensors"
    write_model(path, task.model, task.config, 7)
    return path, task


def student_of(path: Path, threshold: float, **model: Any) -> WeakTask:
    given = {"pseudo_from": str(path), "pseudo_threshold": threshold, **model}
    return task_of(model=given)


def test_a_teacher_stands_in_for_labels(
    tmp_path: Path, targets: list[tuple[Tensor, Tensor]]
) -> None:
    path, teacher = teacher_in(tmp_path)
    said = teacher.predict(batch())
    assert said.confidences is not None
    assert said.keypoints_2d is not None
    threshold = said.confidences[2:].median().item()
    task = student_of(path, threshold)
    loss, terms = loss_of(task, batch())
    _, own = loss_of(task_of(), batch())
    assert loss.isfinite()
    assert terms["heatmaps"] != own["heatmaps"]
    assert terms["consistency"] == own["consistency"]
    assert gradients(task, loss).isfinite().all()
    (target, weight), (_, before) = targets
    # Two images as they are labelled; of the views what the teacher is sure of.
    assert (weight[:2] == 1).all()
    torch.testing.assert_close(target[:2], (batch().keypoints_2d[:2, 0] + 0.5) / 4 - 0.5)
    sure = (said.confidences[2:] > threshold).flatten(0, 1)
    assert torch.equal(weight[2:] == 1, sure)
    assert 0 < sure.sum() < sure.numel()
    taught = (said.keypoints_2d[2:].flatten(0, 1) + 0.5) / 4 - 0.5
    torch.testing.assert_close(target[2:][sure], taught[sure], rtol=1e-4, atol=1e-4)
    assert (weight[2:][~sure] == 0).all()
    assert (before[2:] == 0).all()
    # Single images it does not label.
    hidden = batch().keypoints_2d.clone()
    hidden[0] = torch.nan
    loss_of(task, replace(batch(), keypoints_2d=hidden))
    assert (targets[-1][1].sum(1) > 0).tolist()[:2] == [False, True]
    # The teacher is no part of what is trained or saved.
    assert task.model.state_dict().keys() == task_of().model.state_dict().keys()
    assert all(p.grad is None for p in teacher.model.parameters())


def test_labels_are_better_than_a_teacher(
    tmp_path: Path, targets: list[tuple[Tensor, Tensor]]
) -> None:
    path, _ = teacher_in(tmp_path)
    loss_of(student_of(path, 0.0), batch("2d"))
    loss_of(task_of(), batch("2d"))
    (target, weight), (expected, all_known) = targets
    assert torch.equal(target, expected)
    assert torch.equal(weight, all_known)
    assert (weight == 1).all()


def test_a_part_of_the_samples_is_taught_and_always_the_same(
    tmp_path: Path, targets: list[tuple[Tensor, Tensor]]
) -> None:
    path, _ = teacher_in(tmp_path)
    many = rows(batch(), [2] * 24)
    upwards = replace(many, indices=tuple(range(24)))
    downwards = replace(many, indices=tuple(reversed(range(24))))
    chosen: list[set[int]] = []
    for fraction, given in ((0.5, upwards), (0.5, downwards), (0.7, upwards), (0.0, upwards)):
        loss_of(student_of(path, 0.0, pseudo_fraction=fraction), given, step=len(chosen))
        weight = targets.pop()[1].reshape(24, 3 * 17)
        assert (weight.min(1).values == weight.max(1).values).all()
        chosen.append({i for i, w in zip(given.indices, weight.tolist(), strict=True) if w[0]})
    half, again, more, none = chosen
    assert half == again
    assert 6 < len(half) < 18
    assert half < more
    assert len(more) < 24
    assert not none


def test_a_teacher_takes_its_own_order_of_colours(
    tmp_path: Path, targets: list[tuple[Tensor, Tensor]]
) -> None:
    path, teacher = teacher_in(tmp_path, channel_order="bgr")
    said = teacher.predict(batch()).keypoints_2d
    assert said is not None
    loss_of(student_of(path, 0.0), batch())
    taught = (said[2:].flatten(0, 1) + 0.5) / 4 - 0.5
    torch.testing.assert_close(targets[0][0][2:], taught, rtol=1e-4, atol=1e-4)


def test_a_teacher_of_something_else(tmp_path: Path) -> None:
    other = tiny_values()
    other["model"] = {"kind": "ransac", "depth": 18, "width": 4, "deconv_channels": 8}
    other["loss"] = {}
    config = Config.from_dict(other)
    path = tmp_path / "ransac.safetensors"
    write_model(path, build_task(config).model, config, 1)
    with pytest.raises(CheckpointError, match=r"ransac\.safetensors: it is of kind ransac, not"):
        loss_of(student_of(path, 0.5), batch())
    with pytest.raises(FileNotFoundError):
        loss_of(student_of(tmp_path / "no", 0.5), batch())


# ---- Poses ----


def validation() -> tuple[Batch, Tensor, Tensor]:
    """Three samples of two views, two of which have lost one; true joints in their cameras.

    The cameras' rotations and translations are those of the first view that is there.
    """
    data = tiny().data.dataset("validation")
    given = collate([data[at] for at in range(3)])
    views = torch.tensor([[True, True], [False, True], [True, False]])
    first = [0, 1, 0]
    R = torch.stack([data[at].cameras.R[view] for at, view in enumerate(first)]).double()
    t = torch.stack([data[at].cameras.t[view] for at, view in enumerate(first)]).double()
    # The absent ones have their optical axis where the present ones have x.
    other = torch.cat([R.roll(-1, -2).float(), torch.zeros(3, 3, 1)], -1)[:, None]
    present = views[..., None, None]
    return (
        replace(
            given,
            views=views,
            projections=torch.where(present, given.projections, other),
            intrinsics=torch.where(present, given.intrinsics, torch.eye(3)),
        ),
        R,
        t,
    )


def test_predictions_are_poses_of_the_first_view_in_the_world(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    task = task_of()
    given, R, t = validation()
    truth = (given.keypoints_3d.double() @ R.mT + t[:, None]).float()

    def known(images: Tensor, intrinsics: Tensor) -> ImagePoses:
        assert images.shape == (4, 3, 64, 32)
        assert torch.equal(intrinsics, given.intrinsics[given.views])
        pose = torch.full((4, 17, 3), torch.nan)
        pose[[0, 2, 3]] = truth  # the second image is another view of the first sample
        return ImagePoses(
            pose, pose[..., :2], pose[..., 0], torch.zeros(4, 17, 16, 8), torch.ones(4) > 0
        )

    monkeypatch.setattr(task, "poses", known)
    found = task.predict(given)
    error = (found.keypoints_3d - given.keypoints_3d).norm(dim=-1)
    assert error.max() < 0.1  # millimetres
    assert found.heatmaps is not None
    assert found.heatmaps.shape == (3, 2, 17, 16, 8)
    assert found.heatmaps[~given.views].isnan().all()
    measured = task.measured(given, found)
    assert set(measured) == set(task.measures)
    values = {name: float(total / count) for name, (total, count) in measured.items()}
    assert values["n_mpjpe"] < 0.1
    assert values["pa_mpjpe"] < 0.1
    assert values["reversed"] == values["wrong_knees"] == 0


def test_mirrored_depths_are_told() -> None:
    task = task_of()
    given, R, t = validation()
    camera = given.keypoints_3d.double() @ R.mT + t[:, None]
    mirrored = camera.clone()
    mirrored[..., 2] = 2 * camera[:, :1, 2] - camera[..., 2]
    counts = []
    for wrong in ([0, 1, 2], [1], []):
        pose = camera.clone()
        pose[wrong] = mirrored[wrong]
        world = (1.2 * pose - t[:, None]) @ R  # of a person 20 % too big and too far away
        measured = task.measured(given, Prediction(world))
        values = {name: float(total / count) for name, (total, count) in measured.items()}
        assert values["reversed"] == pytest.approx(len(wrong) / 3)
        assert (values["n_mpjpe"] > 10) == (values["pa_mpjpe"] > 10) == bool(wrong)
        if not wrong:
            assert values["n_mpjpe"] < 1e-3
        counts.append(values["wrong_knees"])
    assert counts[0] > counts[2] == 0
    # Of no pose nothing is known.
    nothing = Prediction(torch.full_like(given.keypoints_3d, torch.nan))
    assert all(n == 0 and total == 0 for total, n in task.measured(given, nothing).values())


@pytest.mark.parametrize("limb_lengths", ["published", "studio"])
@pytest.mark.parametrize("reconstruction", ["median", "pair"])
def test_poses_are_as_big_as_people(limb_lengths: str, reconstruction: str) -> None:
    """With true pixels and relative depths: the median of the limbs is that of mean lengths."""
    task = task_of(model={"limb_lengths": limb_lengths, "reconstruction": reconstruction})
    given, R, t = validation()
    first = torch.tensor([0, 1, 0])
    K = given.intrinsics[torch.arange(3), first]
    camera = (given.keypoints_3d.double() @ R.mT + t[:, None]).float()
    unit = (camera[:, NECK] - camera[:, PELVIS]).norm(dim=-1)[:, None]
    relative = (camera[..., 2] - camera[:, PELVIS, None, 2]) / unit
    projected = camera @ K.mT
    pixels = projected[..., :2] / projected[..., 2:]
    network = task._network

    def perfect(images: Tensor, intrinsics: Tensor) -> Any:
        output = network(images, intrinsics)
        # The median has no need of the pose of the pair.
        pose = (
            torch.full((3, 17, 3), torch.nan)
            if reconstruction == "median"
            else camera / unit[..., None]
        )
        return replace(
            output, keypoints_2d=pixels, relative_depth=relative, pose=pose,
            confidences=torch.ones(3, 17), valid=torch.ones(3, dtype=torch.bool),
        )  # fmt: skip

    task._network = perfect  # type: ignore[method-assign]
    images = normalize_images(given.images[torch.arange(3), first])
    with torch.no_grad():
        found = task.poses(images, K)
    assert found.valid.all()
    pose = found.pose
    ratio = pose[..., 2] / camera[..., 2]
    assert (ratio - ratio[:, :1]).abs().max() < 0.02  # a matter of size and of rounding
    assert (ratio - 1).abs().max() < 0.15  # people differ from the mean
    size = absolute_scale(pose, None, task.millimetres, task.limbs)
    torch.testing.assert_close(size, torch.ones(3), rtol=1e-4, atol=0)


def test_flat_poses_for_comparison() -> None:
    given, _, _ = validation()
    first = torch.tensor([0, 1, 0])
    K, images = given.intrinsics[torch.arange(3), first], given.images[torch.arange(3), first]
    found = {}
    for reconstruction in ("flat", "median"):
        task = task_of(model={"limb_lengths": "studio", "reconstruction": reconstruction})
        with torch.no_grad():
            found[reconstruction] = task.poses(normalize_images(images), K)
    flat, usual = found["flat"], found["median"]
    assert flat.valid.all()
    depths = flat.pose[..., 2]
    torch.testing.assert_close(depths, depths[:, :1].expand_as(depths), rtol=1e-5, atol=0)
    assert (usual.pose[..., 2] - usual.pose[:, :1, 2]).abs().max() > 1
    projected = flat.pose @ K.mT
    torch.testing.assert_close(
        projected[..., :2] / projected[..., 2:], usual.keypoints_2d, rtol=1e-4, atol=1e-2
    )


# ---- Runs ----


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def talking(folder: Path) -> str:
    """A checkpoint to start from: of the first one nothing but heat maps would be trained."""
    folder.mkdir(exist_ok=True)
    task = task_of()
    write_model(folder / "start.safetensors", task.model, task.config, 0)
    return str(folder / "start.safetensors")


PHASES = {"pretrain_steps": 1, "bending_steps": 1, "bending": 1.0, "bending_margin": 3.0}


def test_a_run_without_3d_labels(tmp_path: Path) -> None:
    start = {"backbone_from": talking(tmp_path)}
    config = tiny(training={"validate_every": 3}, loss=PHASES, model=start)
    result = train(config, tmp_path, device="cpu")
    *curve, told = lines(tmp_path)
    assert [line["step"] for line in curve] == [1, 2, 3]
    # The steps are those of the phases: before, within and after the bending prior.
    terms = ("heatmaps", "consistency", "limbs", "bending")
    active = [[line[name] > 0 for name in terms] for line in curve]
    assert active == [
        [True, False, False, False],
        [True, False, False, True],
        [True, True, True, False],
    ]
    for line in curve:
        assert line["loss"] == pytest.approx(sum(line[name] for name in (*terms, "depth_bound")))
        assert (line["depth_bound"] > 0) == (line["step"] > 1)
    assert told["validation"] == result.validation
    assert {"n_mpjpe", "pa_mpjpe", "reversed", "wrong_knees"} < told["validation"].keys()
    assert told["validation"]["poses"] == 4
    assert 0 <= told["validation"]["reversed"] <= 1
    assert told["validation"]["pa_mpjpe"] <= told["validation"]["mpjpe_relative"]

    evaluation = evaluate(config, tmp_path / "best.safetensors", device="cpu", output=tmp_path)
    average = evaluation.report.average
    for name in ("mpjpe_relative", "n_mpjpe", "pa_mpjpe"):
        assert average[name].value == pytest.approx(told["validation"][name], rel=1e-4), name
    assert "tiny weak, 4 poses" in evaluation.table()
    assert "of kind weak" in evaluation.table()
    assert (tmp_path / "evaluation.txt").read_text().strip() == evaluation.table().strip()
    assert (tmp_path / "prediction_p000.png").exists()


def test_the_weights_of_the_last_validation_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Choosing by the error in 3D would use 3D labels."""

    def worse(self: Any) -> dict[str, Any]:
        return {"mpjpe_absolute": 10.0 * self.step, "mpjpe_relative": None}

    monkeypatch.setattr(loop._Trainer, "_measured", worse)
    train(tiny(training={"validate_every": 1}), tmp_path, device="cpu")
    assert read_model(tmp_path / "best.safetensors")[1]["step"] == 3
    best, last = (tensors(tmp_path / f"{name}.safetensors") for name in ("best", "last"))
    assert all(torch.equal(best[name], last[name]) for name in best)


@pytest.mark.parametrize("taught", [False, True])
def test_a_stopped_run_goes_on_to_the_same_bits(tmp_path: Path, taught: bool) -> None:
    model: dict[str, Any] = {"backbone_from": talking(tmp_path)}
    data: dict[str, Any] = {"remember": True}
    if taught:
        model |= {"pseudo_from": str(teacher_in(tmp_path)[0]), "pseudo_fraction": 0.5}
        model |= {"pseudo_threshold": 0.0, "learnable_temperature": True}
        data = {"labels": "none"}
    config = tiny(training={"steps": 4, "ema": 0.9}, loss=PHASES, model=model, data=data)
    train(config, tmp_path / "whole", device="cpu")
    again = tmp_path / "again"
    stops = [train(config, again, device="cpu", stop_after_seconds=1e-9).stopped for _ in range(4)]
    assert stops == ["time"] * 3 + [None]
    for name in ("last.safetensors", "best.safetensors"):
        assert same(tmp_path / "whole" / name, again / name)
    curves = [
        [line["loss"] for line in lines(f) if "loss" in line] for f in (tmp_path / "whole", again)
    ]
    assert curves[0] == curves[1]


def test_batches_that_are_no_mixture_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"training\.batch_size must be a multiple of 3, the 2 \+ 1"
    ):
        train(tiny(training={"batch_size": 4}), tmp_path, device="cpu")


# ---- Settings ----


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("model.inverse_temperature", 0, "model.inverse_temperature must be above 0, got 0"),
        ("model.min_ratio", 0, "model.min_ratio must be above 0, got 0"),
        ("model.confidence", "height", "model.confidence must be one of peak, mass"),
        ("model.limb_lengths", "mine", "model.limb_lengths must be one of published, studio"),
        ("model.reconstruction", "mean", "model.reconstruction must be one of median, pair"),
        ("model.pair", [8, 8], "model.pair must be two joints from 0 to 16, got [8, 8]"),
        ("model.pair", [8, 17], "model.pair must be two joints from 0 to 16, got [8, 17]"),
        ("model.pelvis", [1, 4], "model.pelvis must be one joint, the root, got [1, 4]"),
        ("model.num_joints", 16, "model.num_joints must be 17, the joints of Human3.6M"),
        ("model.official_conventions", True, "model.official_conventions and official_checkpoint"),
        ("model.official_checkpoint", "a.pth", "there is no official code of this kind"),
        ("model.pseudo_threshold", -0.1, "model.pseudo_threshold must be at least 0, got -0.1"),
        ("model.pseudo_fraction", 1.5, "model.pseudo_fraction must be at most 1, got 1.5"),
        ("loss.heatmap_loss", "l2", "loss.heatmap_loss must be one of mse, cross_entropy"),
        ("loss.heatmap_sigma", 0, "loss.heatmap_sigma must be above 0, got 0"),
        ("loss.alpha", -1, "loss.alpha must be at least 0, got -1"),
        ("loss.norm", "l3", "loss.norm must be one of l1, l2"),
        ("loss.min_joints", 2, "loss.min_joints must be at least 3, got 2"),
        ("loss.bending", 1, "loss.bending and bending_steps must be given together, got 1 and 0"),
        ("loss.bending_steps", 9, "loss.bending and bending_steps must be given together"),
        ("loss", {"heatmap_weight": 0, "alpha": 0, "psi": 0}, "nothing would be learned"),
        ("data.images", 0, "data.images must be at least 1, got 0"),
        ("data.labels", "4d", "data.labels must be one of none, 2d, 3d"),
        ("data.validation", part(2, 2, 1), "data.validation.seed must differ from those of label"),
        (
            "data.multi_view",
            part(2, 2, 1),
            "data.multi_view.studio.views must be at least 2, got 1",
        ),
        (
            "data.labelled",
            {"length": 2, "seed": 1, "studio": {"image_size": [64, 32]}},
            "data.image_size must be the same in all parts, got [(32, 64), (64, 32)]",
        ),
    ],
)
def test_what_is_wrong_is_said_in_one_line(name: str, value: Any, message: str) -> None:
    values = tiny_values()
    *sections, key = name.split(".")
    section = values
    for each in sections:
        section = section[each]
    section[key] = value
    with pytest.raises(ConfigError) as caught:
        Config.from_dict(values)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_pair_is_a_limb_of_known_length() -> None:
    with pytest.raises(ValueError, match=r"model\.pair \[13, 2\] must be a limb of known length"):
        build_task(tiny(model={"pair": [13, 2]}))
    thigh = build_task(tiny(model={"pair": [2, 1], "limb_lengths": "published"}))
    assert isinstance(thigh, WeakTask)
    assert thigh.unit == pytest.approx(487.03)


def test_settings_survive_a_dictionary() -> None:
    config = tiny(loss=PHASES, model={"pseudo_from": "a"}, data={"labels": "2d"})
    assert Config.from_dict(config.to_dict()) == config
    assert config.data.labels == "2d"


# ---- The same loss of heat maps elsewhere ----


@pytest.mark.parametrize("kind", ["ransac", "algebraic"])
def test_other_networks_may_learn_by_cross_entropy(kind: str) -> None:
    values = tiny_values()
    values["model"] = {
        "kind": kind, "depth": 18, "width": 4, "deconv_channels": 8, "inverse_temperature": 5.0,
    }  # fmt: skip
    if kind == "algebraic":
        values["model"]["use_confidences"] = False
    values["loss"] = {"heatmap_loss": "cross_entropy", "heatmap_sigma": 1.5, "heatmap_weight": 2.0}
    values["training"]["freeze_batch_norm"] = True
    torch.manual_seed(0)
    task = build_task(Config.from_dict(values))
    final: Any = task.model.get_submodule("backbone.final_layer")
    nn.init.normal_(final.weight, std=0.2)
    task.train_mode()
    given = batch("3d")
    _, terms = task.loss(given)
    heatmaps = task.predict(given).heatmaps
    assert heatmaps is not None
    cells = (given.keypoints_2d + 0.5) / 4 - 0.5
    expected = 2 * losses.heatmap_cross_entropy(
        heatmaps, cells, sigma=1.5, inverse_temperature=5.0, valid=given.views[..., None]
    )
    torch.testing.assert_close(terms["heatmaps"], expected, rtol=1e-5, atol=0)
