# SPDX-License-Identifier: Apache-2.0
"""`PoseErrors` and its reports: against the measures themselves, group by group."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tritool import metrics
from tritool.metrics import PoseErrors, Score

NAMES = ("pelvis", "r_hip", "l_hip", "neck", "nose")


def evaluation() -> tuple[Tensor, Tensor, list[str], list[str]]:
    """Twelve poses of two subjects, in trials of three actions."""
    generator = torch.Generator().manual_seed(0)
    target = 300 * torch.randn(12, 5, 3, generator=generator, dtype=torch.float64) + 1000
    prediction = target + 60 * torch.randn(12, 5, 3, generator=generator)
    actions = ["Greeting-1", "Greeting-2", "Waiting-1", "Eating"] * 3
    subjects = ["S9"] * 8 + ["S11"] * 4
    return prediction, target, actions, subjects


def gathered(**options: Any) -> PoseErrors:
    prediction, target, actions, subjects = evaluation()
    errors = PoseErrors(**{"root": "pelvis", "joint_names": NAMES, **options})
    for start in (0, 3, 7):  # batches of several sizes
        part = slice(start, {0: 3, 3: 7, 7: 12}[start])
        errors.add(prediction[part], target[part], actions=actions[part], subjects=subjects[part])
    return errors


def values(scores: Any) -> dict[str, float]:
    return {name: score.value for name, score in scores.items()}


def by_functions(prediction: Tensor, target: Tensor, root: Any = 0) -> dict[str, Any]:
    return {
        "mpjpe_absolute": pytest.approx(metrics.mpjpe(prediction, target).item()),
        "mpjpe_relative": pytest.approx(metrics.mpjpe(prediction, target, root=root).item()),
        "n_mpjpe": pytest.approx(metrics.n_mpjpe(prediction, target, root=root).item()),
        "pa_mpjpe": pytest.approx(metrics.pa_mpjpe(prediction, target).item()),
        "pck": pytest.approx(metrics.pck(prediction, target, root=root).item()),
        "auc": pytest.approx(metrics.auc(prediction, target, root=root).item()),
    }


def test_report_is_what_the_functions_say_of_each_group() -> None:
    prediction, target, actions, subjects = evaluation()
    report = gathered().report()
    assert report.poses == 12
    assert values(report.average) == by_functions(prediction, target)
    assert list(report.actions) == ["Eating", "Greeting", "Waiting"]
    for name, scores in report.actions.items():
        chosen = [a.startswith(name) for a in actions]
        assert values(scores) == by_functions(prediction[chosen], target[chosen])
        assert scores["pck"].poses == sum(chosen)
    for name, scores in report.subjects.items():
        chosen = [s == name for s in subjects]
        assert values(scores) == by_functions(prediction[chosen], target[chosen])
    for joint, scores in enumerate(report.joints.values()):
        each = metrics.mpjpe(prediction, target, root=0, reduction="joint")[joint]
        assert scores["mpjpe_relative"].value == pytest.approx(each.item())
    assert list(report.joints) == list(NAMES)
    assert report.joints["pelvis"]["mpjpe_relative"] == Score(0.0, 12, 12)
    trials = gathered().report(pool_trials=False)
    assert list(trials.actions) == ["Eating", "Greeting-1", "Greeting-2", "Waiting-1"]
    assert values(trials.average) == values(report.average)


def test_average_is_over_poses_not_actions() -> None:
    errors = PoseErrors()
    target = torch.zeros(3, 1, 3)
    prediction = torch.tensor([10.0, 20, 60])[:, None, None] * torch.tensor([1.0, 0, 0])
    errors.add(prediction, target, actions=["a", "a", "b"])
    report = errors.report()
    assert report.average["mpjpe_absolute"] == Score(30.0, 3, 3)
    assert report.actions["a"]["mpjpe_absolute"] == Score(15.0, 2, 2)
    assert report.actions["b"]["mpjpe_absolute"] == Score(60.0, 1, 1)


def test_exclusions() -> None:
    prediction, target, actions, subjects = evaluation()
    report = gathered().report(exclude=metrics.HUMAN36M_DAMAGED_SCENES)
    damaged = {f"{subject} {action}" for subject, action in metrics.HUMAN36M_DAMAGED_SCENES}
    kept = [f"{s} {a}" not in damaged for s, a in zip(subjects, actions, strict=True)]
    assert sum(kept) == report.poses == 8
    assert values(report.average) == by_functions(prediction[kept], target[kept])
    assert report.excluded == {"S9 Greeting-2": 2, "S9 SittingDown-2": 0, "S9 Waiting-1": 2}
    # The other trial and the other subject stay.
    assert report.actions["Greeting"]["pck"].poses == 4
    assert report.actions["Waiting"]["pck"].poses == 1
    assert "S9 SittingDown-2 (0 poses)" in report.table()
    everything = gathered().report(exclude=[("S9", a) for a in set(actions)])
    assert list(everything.subjects) == ["S11"]


def test_missing_joints_are_counted() -> None:
    prediction, target, actions, _ = evaluation()
    prediction[0, 3] = torch.nan
    prediction[1] = torch.inf
    target[2, 4] = torch.nan
    valid = torch.ones(12, 5, dtype=torch.bool)
    valid[3, 1:3] = False
    prediction[3, 1] = torch.nan  # neither: there was nothing to predict
    errors = PoseErrors(root=0)
    errors.add(prediction, target, valid, actions=actions)
    report = errors.report()
    assert (report.without_target, report.without_prediction) == (3, 6)
    joints = 12 * 5 - 3 - 6
    score = report.average["mpjpe_relative"]
    assert (score.poses, score.joints) == (11, joints)
    assert score.value == pytest.approx(
        metrics.mpjpe(prediction, target, root=0, valid=valid).item()
    )
    assert f"Joints that count: {joints};" in report.table()
    assert "Over 11 of the 12 poses" in report.table()


def test_groups_of_which_nothing_counts() -> None:
    errors = PoseErrors(root=0)
    target = torch.zeros(2, 4, 3)
    errors.add(torch.full_like(target, torch.nan), target, actions="lost")
    report = errors.report()
    assert report.average["pa_mpjpe"] == Score(None, 0, 0)
    assert "-" in report.table().splitlines()[1]
    assert json.loads(json.dumps(report.to_json(), allow_nan=False))["average"]["auc"] == {
        "value": None,
        "poses": 0,
        "joints": 0,
    }


@given(st.permutations(range(12)), st.integers(1, 12))
def test_law_order_and_batches_of_poses(order: list[int], batch: int) -> None:
    prediction, target, actions, subjects = evaluation()
    shuffled = PoseErrors(root="pelvis", joint_names=NAMES)
    for start in range(0, 12, batch):
        part = order[start : start + batch]
        shuffled.add(
            prediction[part], target[part],
            actions=[actions[i] for i in part], subjects=[subjects[i] for i in part],
        )  # fmt: skip
    have, want = shuffled.report(), gathered().report()
    assert have.table() == want.table()
    for group in want.actions:
        assert values(have.actions[group]) == pytest.approx(values(want.actions[group]))


def test_names_and_numbers_are_the_same_joints() -> None:
    by_name = gathered(root=("r_hip", "l_hip"), joints=["neck", "nose"]).report()
    by_number = gathered(root=(1, 2), joints=[3, 4], joint_names=None).report()
    assert values(by_name.average) == values(by_number.average)
    prediction, target, _, _ = evaluation()
    expected = metrics.mpjpe(prediction, target, root=(1, 2), joints=(3, 4))
    assert by_name.average["mpjpe_relative"].value == pytest.approx(expected.item())
    assert list(by_name.joints) == ["neck", "nose"]
    assert list(by_number.joints) == ["3", "4"]
    assert "relative to their own mean of r_hip and l_hip." in by_name.table()
    assert "2 joints: neck, nose" in by_name.table()


def test_without_root_nothing_is_relative() -> None:
    prediction, target, _, _ = evaluation()
    errors = PoseErrors(threshold=100)
    errors.add(prediction, target)
    report = errors.report()
    assert list(report.average) == ["mpjpe_absolute", "pa_mpjpe", "pck", "auc"]
    expected = metrics.pck(prediction, target, threshold=100).item()
    assert report.average["pck"].value == pytest.approx(expected)
    assert (report.actions, report.subjects) == ({}, {})
    assert "PCK@100 %" in report.table()
    assert "PCK and AUC of the absolute error." in report.protocol


def test_table_states_its_protocol() -> None:
    report = gathered().report()
    text = str(report)
    assert text == report.table()
    first = text.splitlines()[0].split()
    assert first[:4] == ["action", "poses", "MPJPE", "abs"]
    average = next(line for line in text.splitlines() if line.startswith("Average"))
    assert average.split()[1:3] == ["12", f"{report.average['mpjpe_absolute'].value:.1f}"]
    for sentence in (
        "Poses: 12 of S11, S9; all joints; millimetres.",
        "Mean over the joints of each pose, then over poses",
        "The trials of an action are one row.",
        "each relative to their own pelvis.",
        "The root counts like any joint",
        "Excluded: nothing.",
    ):
        assert sentence in text
    blocks = text.split("\n\n")
    assert len(blocks) == 4
    for block in blocks[:3]:
        assert len({len(line) for line in block.splitlines()}) == 1  # aligned


def test_report_survives_json() -> None:
    report = gathered().report(exclude=metrics.HUMAN36M_DAMAGED_SCENES)
    back = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert back["average"]["mpjpe_relative"] == {
        "value": report.average["mpjpe_relative"].value,
        "poses": 8,
        "joints": 40,
    }
    assert back["protocol"] == list(report.protocol)
    assert set(back["actions"]) == set(report.actions)


def test_a_report_changes_nothing() -> None:
    errors = gathered()
    first = errors.report()
    errors.report(exclude=metrics.HUMAN36M_DAMAGED_SCENES)
    assert errors.report() == first
    assert PoseErrors() == PoseErrors()  # nothing is shared
    with pytest.raises(ValueError, match="add poses before"):
        PoseErrors().report()


def test_tensors_that_need_gradients_and_single_poses() -> None:
    prediction, target, _, _ = evaluation()
    errors = PoseErrors()
    for pair in zip(prediction, target, strict=True):
        errors.add(pair[0].float().requires_grad_(), pair[1].float(), actions="walk", subjects="A")
    report = errors.report()
    assert report.actions["walk"]["auc"].poses == report.subjects["A"]["auc"].poses == 12
    assert report.average["mpjpe_absolute"].value == pytest.approx(
        metrics.mpjpe(prediction, target).item(), rel=1e-5
    )


# ---- Bad input ----


def test_bad_threshold_is_refused() -> None:
    with pytest.raises(ValueError, match="threshold must be a number"):
        PoseErrors(threshold=math.nan)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"root": "pelvis"}, r"root must be among joint_names, \[\], got 'pelvis'"),
        ({"joints": ["knee"], "joint_names": ["hip"]}, "joints must be among joint_names"),
    ],
)
def test_unknown_names_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PoseErrors(**options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prediction": torch.zeros(1, 2, 5, 3), "target": torch.zeros(1, 2, 5, 3)},
         r"prediction must be \[F, J, 3\] or \[J, 3\], got \(1, 2, 5, 3\)"),
        ({"prediction": torch.zeros(2, 4, 3), "target": torch.zeros(2, 4, 3)},
         r"prediction must have J = 5 joints, got \(2, 4, 3\)"),
        ({"actions": ["a"]}, "actions must be one name or one for each of 2 poses, got 1"),
        ({"subjects": ["a"] * 3}, "subjects must be one name or one for each of 2 poses, got 3"),
    ],
)  # fmt: skip
def test_bad_batches_are_refused(arguments: dict[str, Any], message: str) -> None:
    pose = torch.zeros(2, 5, 3)
    for errors in (PoseErrors(joint_names=NAMES), PoseErrors(joints=[0, 1])):
        errors.add(pose, pose)
        with pytest.raises(ValueError, match=message):
            errors.add(**{"prediction": pose, "target": pose, **arguments})
        assert errors.report().poses == 2
