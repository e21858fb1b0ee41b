# SPDX-License-Identifier: Apache-2.0
"""What an evaluation says, with how it was made; and several methods on the same samples."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from tritool.metrics import PoseErrors, PoseReport, Score, mpjpe, pa_mpjpe
from tritool.training.measuring import (
    ALL_VIEWS,
    Found,
    Interval,
    PixelScore,
    Truth,
    bootstrap,
    paired_errors,
)

__all__ = [
    "MEASURES",
    "Comparison",
    "Difference",
    "Evaluation",
    "Origin",
    "ViewsScore",
    "make_comparison",
    "make_evaluation",
]

ROOT = "pelvis"
# More subjects than these are counted, not named, and have no table.
_NAMED_SUBJECTS = 12

# What methods are compared by, and how a table calls it.
MEASURES = {
    "absolute": "MPJPE abs",
    "absolute_hidden": "hidden joints abs",
    "relative": "MPJPE rel",
    "relative_hidden": "hidden joints rel",
    "aligned": "PA-MPJPE",
}
_MISSING = "-"


@dataclass(frozen=True)
class Origin:
    """Where a method comes from.

    Args:
        name: What it is called here.
        kind: Of the network.
        checkpoint: The file of its weights; None: it has those it was built with.
        step: How many steps it was trained for; None if not known.
        center: Where the centre of the cube comes from; None for a method without.
        notes: What else must be known, in sentences.
    """

    name: str
    kind: str
    checkpoint: str | None = None
    step: int | None = None
    center: str | None = None
    notes: tuple[str, ...] = ()

    def sentences(self) -> tuple[str, ...]:
        """The same in words."""
        trained = "weights as built, no checkpoint"
        if self.checkpoint is not None:
            at = "" if self.step is None else f", step {self.step}"
            trained = f"checkpoint {self.checkpoint}{at}"
        center = () if self.center is None else (f"Centre of the cube: {self.center}.",)
        return (f"Method: {self.name}, of kind {self.kind}, {trained}.", *center, *self.notes)


@dataclass(frozen=True)
class ViewsScore:
    """The scores with so many views of each sample.

    Args:
        views: How many; None: all there are.
        average: By measure, as of `PoseReport`.
        fewer: Samples that have fewer views, of which all were taken.
        missing: Joints with a true place but without a prediction.
    """

    views: int | None
    average: Mapping[str, Score]
    fewer: int
    missing: int


@dataclass(frozen=True)
class Evaluation:
    """How well a method does, and how that was found out.

    Args:
        origin: Which method.
        report: With all views.
        sweep: With all views first, then by number of views.
        pixels: 2D errors by kind of joint, "visible", "hidden" and "outside" of the crop; None for
            a method without 2D joints.
        protocol: How everything was done, in sentences, besides the report's own.
        settings: Of the data, as in the configuration.
    """

    origin: Origin
    report: PoseReport
    sweep: tuple[ViewsScore, ...]
    pixels: Mapping[str, PixelScore] | None
    protocol: tuple[str, ...]
    settings: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Returns all of it as what JSON can hold."""
        values = asdict(replace(self, report=replace(self.report, protocol=())))
        values["origin"]["notes"] = list(self.origin.notes)
        values["report"] = self.report.to_json()
        values["sweep"] = list(values["sweep"])
        values["protocol"] = list(self.protocol)
        return values

    def table(self) -> str:
        """Returns the figures as text, how they were made below them."""
        blocks = [f"{self.origin.name}, {self.report.poses} poses", self._sweep_block()]
        # Without its last block, which are the protocol's sentences.
        *tables, _ = self.report.table().split("\n\n")
        # Without actions the first is what the sweep's last line says.
        blocks += tables[0 if self.report.actions else 1 :]
        if self.pixels is not None:
            blocks.append(_pixel_block(self.pixels))
        blocks.append("\n".join((*self.protocol, *self.report.protocol)))
        return "\n\n".join(blocks)

    def __str__(self) -> str:
        return self.table()

    def _sweep_block(self) -> str:
        headings = self.report.headings
        rows = [["views", "poses", *headings.values(), "not found"]]
        for row in [*self.sweep[1:], self.sweep[0]]:
            first = next(iter(row.average.values()))
            scores = [_scored(name, row.average[name].value) for name in headings]
            views = "all" if row.views is None else str(row.views)
            rows.append([views, str(first.poses), *scores, str(row.missing)])
        return _aligned(rows)


@dataclass(frozen=True)
class Difference:
    """What one method gains over another, on the joints that all methods found.

    Args:
        first: A method.
        second: Another.
        measure: One of `MEASURES`.
        value: The error of the second less that of the first, millimetres: below 0, the second is
            better. Its interval is that of the paired differences.
        better: Part of the poses in which the second is better; None where none counts.
    """

    first: str
    second: str
    measure: str
    value: Interval
    better: float | None


@dataclass(frozen=True, eq=False)
class Comparison:
    """Several methods on the same samples.

    Attributes:
        evaluations: By method: each with the joints it found.
        joint_names: J names.
        errors: By method, `[F, J]` absolute errors in millimetres; NaN where there is no true place
            or no prediction.
        known: `[F, J]`, boolean: the joints with a true place.
        hidden: `[F, J]`, boolean: those hidden in at least half of the views.
        means: By method, then by measure of `MEASURES`: on the joints that all methods found.
        sweep: Absolute, by number of views, 0 meaning all; then by method. On the joints that all
            methods found which found any with so many views.
        differences: Of each method and the one before it, by measure.
        protocol: How everything was done, in sentences.
    """

    evaluations: Mapping[str, Evaluation]
    joint_names: tuple[str, ...]
    errors: Mapping[str, Tensor]
    known: Tensor
    hidden: Tensor
    means: Mapping[str, Mapping[str, Interval]]
    sweep: Mapping[int, Mapping[str, Interval]]
    differences: tuple[Difference, ...]
    protocol: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Returns the figures as what JSON can hold; not the single errors."""
        return {
            "methods": {
                name: {
                    "means": {key: asdict(value) for key, value in means.items()},
                    "joints": self._by_joint(name),
                    "evaluation": self.evaluations[name].to_json(),
                }
                for name, means in self.means.items()
            },
            "sweep": [
                {
                    "views": None if number == ALL_VIEWS else number,
                    "methods": {name: asdict(value) for name, value in row.items()},
                }
                for number, row in self.sweep.items()
            ],
            "differences": [asdict(each) for each in self.differences],
            "hidden_joints": int((self.hidden & self.known).sum()),
            "known_joints": int(self.known.sum()),
            "protocol": list(self.protocol),
        }

    def table(self) -> str:
        """Returns the figures as text, how they were made below them."""
        methods = [["", *MEASURES.values(), "not found", "2D visible", "2D hidden"]]
        for name, means in self.means.items():
            evaluation = self.evaluations[name]
            methods.append([
                name,
                *(_spread(means[key]) for key in MEASURES),
                str(evaluation.sweep[0].missing),
                *(
                    _pixels(evaluation.pixels[kind].mean) if evaluation.pixels else _MISSING
                    for kind in ("visible", "hidden")
                ),
            ])  # fmt: skip
        blocks = ["Error, mm, with its 95 % interval", _aligned(methods)]
        pairs: dict[tuple[str, str], list[str]] = {}
        for each in self.differences:
            pairs.setdefault((each.first, each.second), []).append(_spread(each.value, sign=True))
        if pairs:
            rows = [["", *MEASURES.values()]]
            rows += [[f"{second} - {first}", *cells] for (first, second), cells in pairs.items()]
            blocks += [
                "Paired difference, mm, with its 95 % interval; below 0 the method named first is "
                "better",
                _aligned(rows),
            ]
        if len(self.sweep) > 1:
            rows = [["views", *self.means]]
            order = [number for number in self.sweep if number != ALL_VIEWS] + [ALL_VIEWS]
            for number in order:
                cells = [_spread(value) for value in self.sweep[number].values()]
                rows.append(["all" if number == ALL_VIEWS else str(number), *cells])
            blocks += ["MPJPE abs by number of views", _aligned(rows)]
        blocks.append("\n".join(self.protocol))
        return "\n\n".join(blocks)

    def __str__(self) -> str:
        return self.table()

    def _by_joint(self, name: str) -> dict[str, float | None]:
        means = self.errors[name].nanmean(0)
        return {
            joint: None if mean.isnan() else float(mean)
            for joint, mean in zip(self.joint_names, means, strict=True)
        }


def make_evaluation(
    origin: Origin,
    truth: Truth,
    found: Mapping[int, Found],
    *,
    data: Sequence[str],
    settings: Mapping[str, Any],
    exclude: Collection[tuple[str, str]] = (),
) -> Evaluation:
    """Makes the figures of one method.

    Args:
        origin: Which method.
        truth: What is known of the samples.
        found: By number of views, `ALL_VIEWS` among them.
        data: Where the samples come from, in sentences.
        settings: The same as what JSON can hold.
        exclude: Pairs (subject, action) left out, as of `PoseErrors.report`.
    """
    people = sorted(set(filter(None, truth.subjects)))
    named = len(people) <= _NAMED_SUBJECTS or bool(exclude)
    root = ROOT if ROOT in truth.joint_names else None
    reports = {}
    for number, each in found.items():
        errors = PoseErrors(root=root, joint_names=truth.joint_names)
        errors.add(
            each.keypoints_3d,
            truth.keypoints_3d,
            actions=truth.actions,
            subjects=truth.subjects if named else None,
        )
        reports[number] = errors.report(exclude=exclude)
    sweep = tuple(
        ViewsScore(
            views=None if number == ALL_VIEWS else number,
            average=report.average,
            fewer=int((truth.views < number).sum()),
            missing=report.without_prediction,
        )
        for number, report in sorted(reports.items())
    )
    report = reports[ALL_VIEWS]
    # Every subject without a name of its own would be a table of one row.
    subjects = report.subjects if len(report.subjects) <= _NAMED_SUBJECTS else {}
    report = replace(report, subjects=subjects)
    return Evaluation(
        origin=origin,
        report=report,
        sweep=sweep,
        pixels=found[ALL_VIEWS].pixels,
        protocol=(
            *origin.sentences(),
            *data,
            *_people(people, named),
            *_views(truth, sweep),
            *_pixel_protocol(found[ALL_VIEWS].pixels, exclude),
        ),
        settings=settings,
    )


def make_comparison(
    evaluations: Mapping[str, Evaluation],
    truth: Truth,
    found: Mapping[str, Mapping[int, Found]],
    *,
    data: Sequence[str],
) -> Comparison:
    """Makes the figures of several methods on the same samples.

    Args:
        evaluations: By method.
        truth: What is known of the samples.
        found: By method, then by number of views.
        data: Where the samples come from, in sentences.
    """
    target = truth.keypoints_3d
    known = target.isfinite().all(-1)
    points = {name: each[ALL_VIEWS].keypoints_3d for name, each in found.items()}
    errors = {name: _absolute(each, target) for name, each in points.items()}

    by_measure = _errors_by_measure(points, truth)
    means = {
        name: {
            key: bootstrap(each[name]) if key in by_measure else Interval(None, None, None, 0, 0)
            for key, each in ((key, by_measure.get(key, {})) for key in MEASURES)
        }
        for name in found
    }
    names = list(found)
    differences = tuple(
        _difference(first, second, key, by_measure[key])
        for first, second in pairwise(names)
        for key in MEASURES
        if key in by_measure
    )
    sweep = {}
    for number in found[names[0]]:
        some = {name: each[number].keypoints_3d for name, each in found.items()}
        paired = paired_errors(some, target, _absolute)
        sweep[number] = {name: bootstrap(each) for name, each in paired.items()}

    common = torch.stack([~each.isnan() for each in by_measure["absolute"].values()]).any(0)
    origins = [part for name in names for part in evaluations[name].origin.sentences()]
    first = evaluations[names[0]]
    return Comparison(
        evaluations=dict(evaluations),
        joint_names=truth.joint_names,
        errors=errors,
        known=known,
        hidden=truth.hidden,
        means=means,
        sweep=sweep,
        differences=differences,
        protocol=(
            *origins,
            *data,
            *_views(truth, first.sweep),
            f"All methods see the same {len(target)} samples and views. Means and differences are "
            f"over the {int(common.sum())} joints that all methods found, of "
            f"{int(known.sum())} that are known; a method that found none with so many views is "
            "left out. \"Not found\" counts each method's own.",
            f"Hidden joints: those hidden in, or outside of, at least half of a sample's views, "
            f"{int((truth.hidden & common).sum())} of these.",
            "Mean over the joints of each pose, then over poses. Intervals: 2.5th and 97.5th "
            "percentile of 10 000 bootstrap means over poses.",
            *_pixel_protocol(next((e.pixels for e in evaluations.values() if e.pixels), None)),
        ),
    )  # fmt: skip


def _errors_by_measure(points: Mapping[str, Tensor], truth: Truth) -> dict[str, dict[str, Tensor]]:
    """Errors by measure, then by method; nothing relative where there is no root."""
    target = truth.keypoints_3d
    made = {"absolute": paired_errors(points, target, _absolute)}
    if ROOT in truth.joint_names:
        root = truth.joint_names.index(ROOT)

        def relative(prediction: Tensor, target: Tensor) -> Tensor:
            return mpjpe(prediction, target, root=root, reduction="none")

        made["relative"] = paired_errors(points, target, relative)
    made["aligned"] = paired_errors(
        points, target, lambda prediction, target: pa_mpjpe(prediction, target, reduction="none")
    )
    for key in ("absolute", "relative"):
        if key in made:
            made[f"{key}_hidden"] = {
                name: torch.where(truth.hidden, each, torch.nan) for name, each in made[key].items()
            }
    return made


def _absolute(prediction: Tensor, target: Tensor) -> Tensor:
    return mpjpe(prediction, target, reduction="none")


def _difference(first: str, second: str, measure: str, errors: Mapping[str, Tensor]) -> Difference:
    change = errors[second] - errors[first]
    poses = change.nanmean(-1)
    poses = poses[~poses.isnan()]
    better = float((poses < 0).double().mean()) if poses.numel() else None
    return Difference(first, second, measure, bootstrap(change), better)


# ---- Words ----


def _people(people: Sequence[str], named: bool) -> Iterable[str]:
    if not named:
        yield f"Subjects: {len(people)}."


def _views(truth: Truth, sweep: Sequence[ViewsScore]) -> Iterable[str]:
    low, high = int(truth.cameras.min()), int(truth.cameras.max())
    cameras = str(high) if low == high else f"{low} to {high}"
    absent = int((truth.cameras - truth.views).sum())
    yield f"Cameras: {cameras} a sample; {absent} of {int(truth.cameras.sum())} views are absent."
    if len(sweep) > 1:
        numbers = ", ".join(str(row.views) for row in sweep[1:])
        yield (
            f"With {numbers} views: the first of a permutation of each sample's views, the same "
            "for every method; the others are left out."
        )
        short = [f"{row.fewer} with fewer than {row.views}" for row in sweep if row.fewer]
        if short:
            yield f"Samples that have fewer views take part with all of theirs: {', '.join(short)}."


def _pixel_protocol(
    pixels: Mapping[str, PixelScore] | None, exclude: Collection[tuple[str, str]] = ()
) -> Iterable[str]:
    if pixels is not None:
        yield (
            "2D: distance of the 2D joints to the true ones, pixels of the crops, over all joints "
            "of all views; hidden: in the crop, but something is in front; outside: beyond the "
            "crop."
        )
        if exclude:
            yield "2D figures are over all poses, also those that are excluded."


def _pixel_block(pixels: Mapping[str, PixelScore]) -> str:
    rows = [["2D joints", "count", "mean px", "median px", "not found"]]
    for name, score in pixels.items():
        values = [_pixels(score.mean), _pixels(score.median)]
        rows.append([name, str(score.joints), *values, str(score.missing)])
    return _aligned(rows)


def _pixels(value: float | None) -> str:
    return _MISSING if value is None else f"{value:.2f}"


def _scored(measure: str, value: float | None) -> str:
    if value is None:
        return _MISSING
    return f"{100 * value if measure in ('pck', 'auc') else value:.1f}"


def _spread(value: Interval, *, sign: bool = False) -> str:
    if value.mean is None:
        return _MISSING
    show: Callable[[float], str] = "{:+.1f}".format if sign else "{:.1f}".format
    if value.low is None or value.high is None:
        return show(value.mean)
    return f"{show(value.mean)} [{show(value.low)}, {show(value.high)}]"


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
        for row in rows
    )
