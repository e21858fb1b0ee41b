# SPDX-License-Identifier: Apache-2.0
"""Errors of many poses, gathered batch by batch, and the tables that say what they mean."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from tritool._poses import checked_pair, checked_valid
from tritool.metrics.poses import AUC_THRESHOLDS, fraction_below, mpjpe, n_mpjpe, pa_mpjpe

__all__ = ["HUMAN36M_DAMAGED_SCENES", "PoseErrors", "PoseReport", "Score"]

# (subject, trial): the true poses are shifted against the cameras. Relative to the root they are
# right. Named by the project page and the code of Iskakov et al. (ICCV 2019).
HUMAN36M_DAMAGED_SCENES = (("S9", "Greeting-2"), ("S9", "SittingDown-2"), ("S9", "Waiting-1"))

_TRIAL = re.compile(r"[-_ ]\d+$")


@dataclass(frozen=True)
class Score:
    """One measure of one set of poses.

    Args:
        value: Millimetres, or for PCK and AUC a fraction; None where no joint counts.
        poses: How many poses the mean is over.
        joints: How many joints, of all these poses.
    """

    value: float | None
    poses: int
    joints: int


Scores = Mapping[str, Score]


@dataclass(frozen=True)
class PoseReport:
    """Scores of all poses and of groups of them, and how they were made.

    Args:
        average: By measure, over all poses.
        actions: By action, then by measure; empty if no actions were named.
        subjects: By subject, then by measure; empty if no subjects were named.
        joints: By joint, then by measure.
        headings: By measure, how it is called in a table.
        poses: How many poses there are, without those that were excluded.
        excluded: How many poses each exclusion, "subject trial", took out.
        without_target: Joints that do not count because there is no valid target.
        without_prediction: Joints with a valid target that do not count because there is no
            prediction.
        protocol: How the scores were made, in sentences.
    """

    average: Scores
    actions: Mapping[str, Scores]
    subjects: Mapping[str, Scores]
    joints: Mapping[str, Scores]
    headings: Mapping[str, str]
    poses: int
    excluded: Mapping[str, int]
    without_target: int
    without_prediction: int
    protocol: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Returns all of it as what JSON can hold."""
        return {**asdict(self), "protocol": list(self.protocol)}

    def table(self) -> str:
        """Returns the scores as text, the protocol below them.

        Millimetres with one decimal, PCK and AUC in percent. `poses` is how many poses the first
        measure is over; where another is over fewer, the last lines say so.
        """
        blocks = [
            self._block("action", self.actions),
            self._block("subject", self.subjects),
            self._block("joint", self.joints),
        ]
        if not self.actions:
            blocks.insert(0, self._block("", {}))
        fewer: dict[int, list[str]] = {}
        for name, score in self.average.items():
            if score.poses < self.poses:
                fewer.setdefault(score.poses, []).append(self.headings[name])
        notes = [
            f"Over {poses} of the {self.poses} poses, as no joint of the others counts: "
            f"{', '.join(names)}."
            for poses, names in fewer.items()
        ]
        return "\n\n".join([*filter(None, blocks), "\n".join([*self.protocol, *notes])])

    def __str__(self) -> str:
        return self.table()

    def _block(self, title: str, groups: Mapping[str, Scores]) -> str:
        if title and not groups:
            return ""
        rows = dict(groups) if title == "joint" else {**groups, "Average": self.average}
        first = next(iter(self.average))
        lines = [[title, "poses", *self.headings.values()]]
        for name, scores in rows.items():
            cells = [_cell(measure, scores[measure].value) for measure in self.headings]
            lines.append([name, str(scores[first].poses), *cells])
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join(
            "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])])
            for line in lines
        )


@dataclass
class _Batch:
    """What is kept of a batch of F poses: errors [F, J], NaN where a joint does not count."""

    errors: dict[str, Tensor]
    without_target: Tensor  # [F]
    without_prediction: Tensor  # [F]
    actions: tuple[str, ...]
    subjects: tuple[str, ...]


@dataclass
class PoseErrors:
    """Gathers the errors of predicted poses and makes reports of them.

    Measures: `mpjpe_absolute` in the coordinates as they are; with a root also `mpjpe_relative` and
    `n_mpjpe`, relative to it; `pa_mpjpe`; `pck` and `auc`, relative to the root if there is one.
    See `tritool.metrics` for each. Everything is computed in float64 on the CPU, so the figures do
    not depend on a device, and adding a batch waits for it.

    Args:
        root: The joint at the origin, index or name, or several, whose mean is. None: no measure
            is relative.
        joints: The joints to average over, indices or names; None: all. Root, scale and alignment
            are those of all joints.
        joint_names: J names; default: the numbers.
        threshold: Of PCK, millimetres.

    Raises:
        ValueError: A joint is not known by its name, or the threshold is NaN.

    Example:
        >>> errors = PoseErrors(root="pelvis", joint_names=["pelvis", "neck", "nose"])
        >>> target = torch.tensor([[[0.0, 0, 900], [0, 0, 1400], [0, 90, 1500]]])
        >>> errors.add(target + 20, target, actions="Waiting-1", subjects="S9")
        >>> report = errors.report()
        >>> round(report.average["mpjpe_absolute"].value, 2)
        34.64
        >>> report.actions["Waiting"]["mpjpe_relative"]
        Score(value=0.0, poses=1, joints=3)
    """

    root: int | str | Sequence[int | str] | None = None
    joints: Sequence[int | str] | None = None
    joint_names: Sequence[str] | None = None
    threshold: float = 150.0
    _batches: list[_Batch] = field(default_factory=list, init=False, repr=False)
    _count: int | None = field(default=None, init=False, repr=False)  # J

    def __post_init__(self) -> None:
        """Checks the names."""
        if math.isnan(self.threshold):
            raise ValueError(f"threshold must be a number, got {self.threshold}")
        self._indices("root", self.root)
        self._indices("joints", self.joints)
        if self.joint_names is not None:
            self._count = len(self.joint_names)

    def add(
        self,
        prediction: Tensor,
        target: Tensor,
        valid: Tensor | None = None,
        *,
        actions: str | Sequence[str] | None = None,
        subjects: str | Sequence[str] | None = None,
    ) -> None:
        """Adds a batch of poses.

        Args:
            prediction: `[F, J, 3]` or `[J, 3]`, millimetres; a joint that is not finite is not
                predicted.
            target: Of the same shape, millimetres; a joint that is not finite has no target.
            valid: `[F, J]` or what broadcasts to it; False or 0: the joint has no valid target.
            actions: The action or trial of each pose, or of all.
            subjects: The subject of each pose, or of all.

        Raises:
            TypeError: A tensor is not of the right kind.
            ValueError: Shapes, devices or numbers of names do not fit.
        """
        prediction, target = checked_pair(prediction, target, 3)
        if prediction.dim() not in (2, 3):
            raise ValueError(
                f"prediction must be [F, J, 3] or [J, 3], got {tuple(prediction.shape)}"
            )
        count = prediction.shape[-2]
        if self._count not in (None, count):
            raise ValueError(
                f"prediction must have J = {self._count} joints, got {tuple(prediction.shape)}"
            )
        there = target.isfinite().all(-1)
        if valid is not None:
            there = there & (checked_valid(valid, there) > 0)
        there = there.reshape(-1, count).cpu()
        predicted = prediction.detach().reshape(-1, count, 3).cpu().double()
        true = target.detach().reshape(-1, count, 3).cpu().double()

        root, joints = self._indices("root", self.root), self._indices("joints", self.joints)
        options: dict[str, Any] = {"valid": there, "joints": joints, "reduction": "none"}
        errors = {"mpjpe_absolute": mpjpe(predicted, true, **options)}
        if root is not None:
            errors["mpjpe_relative"] = mpjpe(predicted, true, root=root, **options)
            errors["n_mpjpe"] = n_mpjpe(predicted, true, root=root, **options)
        errors["pa_mpjpe"] = pa_mpjpe(predicted, true, **options)
        distance = errors["mpjpe_absolute" if root is None else "mpjpe_relative"]
        errors["pck"] = fraction_below(distance, (self.threshold,))
        errors["auc"] = fraction_below(distance, AUC_THRESHOLDS)

        chosen = list(range(count) if joints is None else joints)
        missing = there & ~predicted.isfinite().all(-1)
        poses = predicted.shape[0]
        self._count = count
        self._batches.append(
            _Batch(
                errors,
                (~there)[:, chosen].sum(-1),
                missing[:, chosen].sum(-1),
                _names("actions", actions, poses),
                _names("subjects", subjects, poses),
            )
        )

    def report(
        self, *, exclude: Collection[tuple[str, str]] = (), pool_trials: bool = True
    ) -> PoseReport:
        """Makes a report of everything that has been added.

        Args:
            exclude: Pairs (subject, action or trial), as they were added, whose poses are left out,
                for example `HUMAN36M_DAMAGED_SCENES`.
            pool_trials: Whether the trials of an action, "Waiting-1" and "Waiting-2", are one row.

        Returns:
            The report. Each score is the mean over the joints of each pose, then over poses; that
            of a joint is the mean over its poses.

        Raises:
            ValueError: Nothing has been added.
        """
        if not self._batches:
            raise ValueError("add poses before asking for a report")
        batches = self._batches
        errors = {
            name: torch.cat([batch.errors[name] for batch in batches]) for name in batches[0].errors
        }
        actions = [name for batch in batches for name in batch.actions]
        subjects = [name for batch in batches for name in batch.subjects]
        scenes = list(zip(subjects, actions, strict=True))
        unwanted = {(subject, action): 0 for subject, action in exclude}
        for scene in scenes:
            if scene in unwanted:
                unwanted[scene] += 1
        excluded = {" ".join(scene): count for scene, count in unwanted.items()}
        kept = torch.tensor([scene not in unwanted for scene in scenes], dtype=torch.bool)
        if pool_trials:
            actions = [_TRIAL.sub("", name) for name in actions]

        total = {
            name: int(torch.cat([getattr(batch, name) for batch in batches])[kept].sum())
            for name in ("without_target", "without_prediction")
        }
        poses = int(kept.sum())
        average = _scores(errors, kept)
        used = average["mpjpe_absolute"].joints
        return PoseReport(
            average=average,
            actions=_grouped(errors, actions, kept),
            subjects=_grouped(errors, subjects, kept),
            joints=self._by_joint(errors, kept),
            headings={name: self._heading(name) for name in errors},
            poses=poses,
            excluded=excluded,
            **total,
            protocol=self._protocol(
                poses, used, excluded, total, subjects, kept, pool_trials and any(actions)
            ),
        )

    def _indices(
        self, name: str, joints: int | str | Sequence[int | str] | None
    ) -> tuple[int, ...] | None:
        if joints is None:
            return None
        names = list(self.joint_names or ())
        found = []
        for joint in (joints,) if isinstance(joints, (int, str)) else joints:
            if isinstance(joint, str) and joint not in names:
                raise ValueError(f"{name} must be among joint_names, {names}, got {joint!r}")
            found.append(names.index(joint) if isinstance(joint, str) else joint)
        return tuple(found)

    def _label(self, joint: int) -> str:
        return str(joint) if self.joint_names is None else self.joint_names[joint]

    def _by_joint(self, errors: Mapping[str, Tensor], kept: Tensor) -> dict[str, Scores]:
        columns = errors["mpjpe_absolute"].shape[1]
        joints = self._indices("joints", self.joints) or range(columns)
        return {
            self._label(joint): _scores(
                {name: error[:, column, None] for name, error in errors.items()}, kept
            )
            for column, joint in enumerate(joints)
        }

    def _heading(self, measure: str) -> str:
        return {
            "mpjpe_absolute": "MPJPE abs",
            "mpjpe_relative": "MPJPE rel",
            "n_mpjpe": "N-MPJPE",
            "pa_mpjpe": "PA-MPJPE",
            "pck": f"PCK@{self.threshold:g} %",
            "auc": "AUC %",
        }[measure]

    def _protocol(
        self,
        poses: int,
        used: int,
        excluded: Mapping[str, int],
        total: Mapping[str, int],
        subjects: Sequence[str],
        kept: Tensor,
        pooled: bool,
    ) -> tuple[str, ...]:
        of = "all joints"
        if (joints := self._indices("joints", self.joints)) is not None:
            of = f"{len(joints)} joints: {', '.join(map(self._label, joints))}"
        sentences = [
            f"Poses: {poses}" + _listed(subjects, kept) + f"; {of}; millimetres.",
            "Mean over the joints of each pose, then over poses; each pose counts alike, whatever "
            "its action.",
        ]
        if pooled:
            sentences.append("The trials of an action are one row.")
        root = self._indices("root", self.root)
        if root is None:
            sentences.append("PCK and AUC of the absolute error.")
        else:
            name = " and ".join(map(self._label, root))
            name = f"joint {name}" if self.joint_names is None else name
            name = f"mean of {name}" if len(root) > 1 else name
            sentences.append(
                "Relative, N-MPJPE, PCK and AUC: prediction and target each relative to their "
                f"own {name}."
            )
            if len(root) == 1 and (joints is None or root[0] in joints):
                sentences.append("The root counts like any joint, with its relative error of 0.")
        sentences += [
            "N-MPJPE: after the best scale. " * (root is not None)
            + "PA-MPJPE: after the best rotation, translation and scale.",
            f"PCK: errors below {self.threshold:g} mm. AUC: mean of PCK over 0, 5, ..., 150 mm.",
            f"Joints that count: {used}; left out without a valid target: "
            f"{total['without_target']}, with one but without a prediction: "
            f"{total['without_prediction']}.",
        ]
        parts = [f"{name} ({count} poses)" for name, count in excluded.items()]
        sentences.append(f"Excluded: {', '.join(parts) if parts else 'nothing'}.")
        return tuple(sentences)


def _names(argument: str, names: str | Sequence[str] | None, poses: int) -> tuple[str, ...]:
    if names is None or isinstance(names, str):
        return (names or "",) * poses
    if len(names) != poses:
        raise ValueError(f"{argument} must be one name or one for each of {poses} poses, "
                         f"got {len(names)}")  # fmt: skip
    return tuple(names)


def _scores(errors: Mapping[str, Tensor], chosen: Tensor) -> dict[str, Score]:
    scores = {}
    for name, error in errors.items():
        part = error[chosen]
        by_pose = part.nanmean(-1)
        by_pose = by_pose[~by_pose.isnan()]
        value = float(by_pose.mean()) if by_pose.numel() else None
        scores[name] = Score(value, by_pose.numel(), int((~part.isnan()).sum()))
    return scores


def _grouped(errors: Mapping[str, Tensor], names: Sequence[str], kept: Tensor) -> dict[str, Scores]:
    """By name in alphabetical order; poses without a name are in no group."""
    return {
        name: _scores(errors, kept & torch.tensor([n == name for n in names]))
        for name in sorted({n for n, k in zip(names, kept.tolist(), strict=True) if n and k})
    }


def _listed(subjects: Sequence[str], kept: Tensor) -> str:
    found = sorted({s for s, k in zip(subjects, kept.tolist(), strict=True) if s and k})
    return f" of {', '.join(found)}" if found else ""


def _cell(measure: str, value: float | None) -> str:
    if value is None:
        return "-"
    return f"{100 * value if measure in ('pck', 'auc') else value:.1f}"
