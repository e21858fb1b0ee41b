# SPDX-License-Identifier: Apache-2.0
"""`evaluate` and `compare`: figures that can be worked out by hand, and what they are over."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tritool import Cameras
from tritool.data import Batch, Sample
from tritool.metrics import pa_mpjpe
from tritool.skeletons import HUMAN36M_JOINTS
from tritool.training import Config, compare, evaluate
from tritool.training import evaluation as module
from tritool.training.measuring import (
    ALL_VIEWS,
    bootstrap,
    draw_views,
    hidden_joints,
    measure,
    paired_errors,
)
from tritool.training.sections import SyntheticData
from tritool.training.state import write_model
from tritool.training.tasks import build_task
from tritool.training.weak_sections import MixtureData

WIDTH, HEIGHT, JOINTS = 20, 28, len(HUMAN36M_JOINTS)
PELVIS, WRIST = HUMAN36M_JOINTS.index("pelvis"), HUMAN36M_JOINTS.index("l_wrist")
STUDIO = {"views": 3, "image_size": [32, 64]}


def make_sample(index: int, count: int = 4, **changes: Any) -> Sample:
    generator = torch.Generator().manual_seed(index)
    K = torch.tensor([[60.0, 0.0, 9.5], [0.0, 60.0, 13.5], [0.0, 0.0, 1.0]]).repeat(count, 1, 1)
    # Each camera is known by its principal point.
    K[:, 0, 2] += torch.arange(count)
    t = torch.tensor([0.0, 0.0, 6000.0]).repeat(count, 1)
    cameras = Cameras(K, torch.eye(3).repeat(count, 1, 1), t, None, (WIDTH, HEIGHT))
    points = 300 * torch.randn(JOINTS, 3, generator=generator)
    values: dict[str, Any] = {
        "images": torch.full((count, 3, HEIGHT, WIDTH), index, dtype=torch.uint8),
        "cameras": cameras,
        "keypoints_3d": points,
        "keypoints_2d": cameras.project(points).movedim(0, 1).contiguous(),
        "visibility": torch.ones(count, JOINTS, dtype=torch.bool),
        "views": torch.ones(count, dtype=torch.bool),
        "boxes": torch.zeros(count, 4),
        "joint_names": HUMAN36M_JOINTS,
        "index": index,
        "subject": f"S{index % 2}",
        "action": "waiting",
    }
    return Sample(**values | changes)


class Data:
    """Samples in a list, as a data set."""

    def __init__(self, *samples: Sample) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        return self.samples[index]


def moved(change: Mapping[int, tuple[float, float, float]]) -> Callable[[Batch], SimpleNamespace]:
    """A method that is wrong by known vectors, by joint."""

    def method(batch: Batch) -> SimpleNamespace:
        points = batch.keypoints_3d.clone()
        for joint, vector in change.items():
            points[:, joint] += torch.tensor(vector)
        return SimpleNamespace(keypoints_3d=points, keypoints_2d=None)

    return method


def make_config(
    kind: str = "algebraic", *, train: int = 1, validation: int = 2, **model: Any
) -> Config:
    small = {"depth": 18, "width": 4, "deconv_channels": 4, **model}
    if kind == "algebraic":
        small = {"use_confidences": False, **small}
    return Config.from_dict(
        {
            "name": f"tiny {kind}",
            "model": {"kind": kind, **small},
            "data": {
                "kind": "synthetic",
                "train": {"length": 2, "seed": train, "studio": STUDIO},
                "validation": {"length": 3, "seed": validation, "studio": STUDIO},
            },
            "training": {"steps": 1, "batch_size": 2},
        }
    )


@dataclass
class FakeTask:
    """A task whose network adds known vectors to the truth."""

    config: Config
    method: Callable[[Batch], Any]

    def __post_init__(self) -> None:
        self.model = nn.Linear(1, 1)

    def predict(self, batch: Batch) -> Any:
        return self.method(batch)

    def start_weights(self) -> list[str]:
        return []


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Puts samples in the place of the studio's, and methods, by kind, in that of networks."""

    def put(data: Data, **methods: Callable[[Batch], Any]) -> None:
        monkeypatch.setattr(SyntheticData, "dataset", lambda self, part: data)
        monkeypatch.setattr(module, "build_task", lambda c: FakeTask(c, methods[c.kind]))

    return put


# ---- Figures ----


def test_figures_are_those_worked_out_by_hand(fake: Callable[..., None]) -> None:
    # The pelvis is 17 mm off: absolute 17/17; relative to it the 16 others are.
    data = Data(*(make_sample(index) for index in range(3)))
    fake(data, algebraic=moved({PELVIS: (0.0, 17.0, 0.0)}))
    average = evaluate(make_config(), None, device="cpu").report.average
    assert average["mpjpe_absolute"].value == pytest.approx(1.0, abs=1e-4)
    assert average["mpjpe_relative"].value == pytest.approx(16.0, abs=1e-3)
    assert average["mpjpe_absolute"].poses == 3
    assert average["pck"].value == 1.0
    # All joints moved alike: nothing is left relative to the root, or aligned.
    fake(data, algebraic=moved(dict.fromkeys(range(JOINTS), (2.0, 3.0, 6.0))))
    average = evaluate(make_config(), None, device="cpu").report.average
    assert average["mpjpe_absolute"].value == pytest.approx(7.0, abs=1e-3)
    assert average["mpjpe_relative"].value == pytest.approx(0.0, abs=1e-3)
    assert average["pa_mpjpe"].value == pytest.approx(0.0, abs=1e-3)


def test_missing_joints_are_counted(fake: Callable[..., None]) -> None:
    unknown = make_sample(1)
    unknown.keypoints_3d[3] = torch.nan

    def loses(batch: Batch) -> SimpleNamespace:
        points = moved({WRIST: (17.0, 0.0, 0.0)})(batch).keypoints_3d
        # One infinite coordinate is as good as none.
        points[[i == 0 for i in batch.indices], 5, 1] = torch.inf
        return SimpleNamespace(keypoints_3d=points, keypoints_2d=None)

    fake(Data(make_sample(0), unknown, make_sample(2)), algebraic=loses)
    evaluation = evaluate(make_config(), None, device="cpu")
    assert evaluation.report.without_prediction == 1
    assert evaluation.report.without_target == 1
    assert evaluation.sweep[0].missing == 1
    # Two poses have 16 joints that count, one has 17.
    expected = (17 / 16 + 17 / 16 + 17 / 17) / 3
    assert evaluation.report.average["mpjpe_absolute"].value == pytest.approx(expected, abs=1e-4)
    assert "with one but without a prediction: 1" in evaluation.table()


def test_2d_errors_are_told_apart_by_what_hides_the_joint() -> None:
    sample = make_sample(0, count=2)
    inside = torch.tensor([9.0, 12.0]).repeat(2, JOINTS, 1)
    inside[0, 1] = torch.tensor([WIDTH + 5.0, 3.0])
    visibility = torch.ones(2, JOINTS, dtype=torch.bool)
    visibility[0, 1] = visibility[1, 2] = visibility[1, 3] = False
    sample = replace(sample, keypoints_2d=inside, visibility=visibility)

    def method(batch: Batch) -> SimpleNamespace:
        points = batch.keypoints_2d + torch.tensor([3.0, 4.0])
        points[0, 0, 1] += torch.tensor([3.0, 4.0])
        points[0, 1, 2] += torch.tensor([6.0, 8.0])
        points[0, 1, 3] = torch.nan
        return SimpleNamespace(keypoints_3d=batch.keypoints_3d, keypoints_2d=points)

    _, found = measure({"it": method}, Data(sample))
    pixels = found["it"][ALL_VIEWS].pixels
    assert pixels is not None
    assert (pixels["visible"].mean, pixels["visible"].joints) == (5.0, 2 * JOINTS - 3)
    assert (pixels["outside"].mean, pixels["outside"].joints) == (10.0, 1)
    hidden = pixels["hidden"]
    assert (hidden.mean, hidden.joints, hidden.missing) == (15.0, 1, 1)


def test_a_joint_is_hidden_if_half_of_the_views_there_are_do_not_see_it() -> None:
    visibility = torch.ones(4, JOINTS, dtype=torch.bool)
    visibility[:1, 4] = False  # one of three
    visibility[:2, 5] = False  # two of three
    visibility[3, 6] = False  # in the view that is absent
    views = torch.tensor([True, True, True, False])
    hidden = hidden_joints(make_sample(0, visibility=visibility, views=views))
    assert hidden.nonzero()[:, 0].tolist() == [5]
    two = torch.tensor([True, True, False, False])
    assert hidden_joints(make_sample(0, visibility=visibility, views=two))[4]
    assert not hidden_joints(make_sample(0, visibility=~visibility, views=~two & two)).any()


# ---- Views ----


def test_fewer_views_are_among_the_more_and_never_absent_ones() -> None:
    views = torch.tensor([True, False, True, True, True])
    sample = replace(make_sample(7, count=5), views=views)
    drawn = [draw_views(sample, count, seed=3) for count in (1, 2, 3, 4, 9, ALL_VIEWS)]
    assert [len(each) for each in drawn] == [1, 2, 3, 4, 4, 4]
    for fewer, more in pairwise(drawn):
        assert set(fewer) <= set(more)
        assert more == sorted(more)
    assert drawn[-1] == [0, 2, 3, 4]
    # Neither the same for all samples, nor for all seeds.
    assert len({tuple(draw_views(make_sample(i), 2, seed=0)) for i in range(20)}) > 2
    assert len({tuple(draw_views(make_sample(0), 2, seed=s)) for s in range(20)}) > 2


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_all_methods_see_the_same_views_whatever_the_batch(batch_size: int) -> None:
    samples = [make_sample(index) for index in range(5)]
    samples[1] = replace(samples[1], views=torch.tensor([True, False, False, True]))
    seen: dict[str, list[tuple[int, int, tuple[float, ...]]]] = {"one": [], "other": []}

    def watching(name: str) -> Callable[[Batch], SimpleNamespace]:
        def method(batch: Batch) -> SimpleNamespace:
            for row, index in enumerate(batch.indices):
                # The last of the intrinsics of a camera says which it is.
                own = batch.intrinsics[row, batch.views[row], 0, 2] - 9.5
                seen[name].append((index, len(own), tuple(own.tolist())))
            return SimpleNamespace(keypoints_3d=batch.keypoints_3d, keypoints_2d=None)

        return method

    methods = {name: watching(name) for name in seen}
    truth, _ = measure(methods, Data(*samples), views=(2, 3), seed=5, batch_size=batch_size)
    assert seen["one"] == seen["other"]
    expected = {
        (index, len(drawn), tuple(map(float, drawn)))
        for index, sample in enumerate(samples)
        for drawn in (draw_views(sample, count, 5) for count in (2, 3, ALL_VIEWS))
    }
    assert set(seen["one"]) == expected
    assert truth.views.tolist() == [4, 2, 4, 4, 4]


def test_a_sweep_has_a_row_for_each_number_of_views(fake: Callable[..., None]) -> None:
    def by_count(batch: Batch) -> SimpleNamespace:
        points = batch.keypoints_3d.clone()
        points[..., 0] += 60 / batch.views.sum(1)[:, None]
        return SimpleNamespace(keypoints_3d=points, keypoints_2d=None)

    short = replace(make_sample(1), views=torch.tensor([True, False, False, True]))
    fake(Data(make_sample(0), short), algebraic=by_count)
    evaluation = evaluate(make_config(), None, views=(3, 2), device="cpu")
    rows = {row.views: row for row in evaluation.sweep}
    values = {n: row.average["mpjpe_absolute"].value for n, row in rows.items()}
    # The sample of two views has no more of them.
    assert values[2] == pytest.approx(30, abs=1e-3)
    assert values[3] == pytest.approx((20 + 30) / 2, abs=1e-3)
    assert values[None] == pytest.approx((15 + 30) / 2, abs=1e-3)
    assert (rows[2].fewer, rows[3].fewer) == (0, 1)
    assert "1 with fewer than 3" in evaluation.table()


# ---- Comparison ----


def test_methods_are_compared_on_joints_that_all_found(fake: Callable[..., None]) -> None:
    visibility = torch.ones(4, JOINTS, dtype=torch.bool)
    visibility[:2, WRIST] = False
    data = Data(*(make_sample(index, visibility=visibility) for index in range(4)))

    def loses(batch: Batch) -> SimpleNamespace:
        points = moved(dict.fromkeys(range(JOINTS), (40.0, 0.0, 0.0)))(batch).keypoints_3d
        points[:, WRIST, 0] += 20
        points[:, 2] = torch.nan
        return SimpleNamespace(keypoints_3d=points, keypoints_2d=None)

    # Far off where the other finds nothing: this must not count.
    better = moved({**dict.fromkeys(range(JOINTS), (0.0, 30.0, 0.0)), 2: (0.0, 0.0, 900.0)})
    fake(data, ransac=loses, algebraic=better)
    methods = {"first": (make_config("ransac"), None), "second": (make_config(), None)}
    comparison = compare(methods, views=(2,), device="cpu")
    first, second = comparison.means["first"], comparison.means["second"]
    assert first["absolute"].mean == pytest.approx((15 * 40 + 60) / 16, abs=1e-3)
    assert second["absolute"].mean == pytest.approx(30, abs=1e-3)
    assert first["absolute"].joints == 4 * 16
    assert first["absolute_hidden"].mean == pytest.approx(60, abs=1e-3)
    assert second["absolute_hidden"].mean == pytest.approx(30, abs=1e-3)
    differences = {each.measure: each for each in comparison.differences}
    absolute = differences["absolute"]
    assert (absolute.first, absolute.second, absolute.better) == ("first", "second", 1.0)
    assert absolute.value.mean == pytest.approx(30 - (15 * 40 + 60) / 16, abs=1e-3)
    assert differences["absolute_hidden"].value.mean == pytest.approx(-30, abs=1e-3)
    assert comparison.sweep[2]["second"].mean == pytest.approx(30, abs=1e-3)
    # Each one's own figures are over what it found.
    assert comparison.evaluations["first"].sweep[0].missing == 4
    assert comparison.evaluations["second"].sweep[0].missing == 0
    own = comparison.evaluations["second"].report.average["mpjpe_absolute"].value
    assert own == pytest.approx((16 * 30 + 900) / 17, abs=1e-3)


def test_a_method_that_finds_nothing_takes_nothing_from_the_others() -> None:
    target = torch.zeros(2, 3, 3)
    nothing, something = torch.full((2, 3, 3), torch.nan), torch.ones(2, 3, 3)
    something[0, 1] = torch.nan

    def error(points: Tensor, target: Tensor) -> Tensor:
        return (points - target).norm(dim=-1)

    errors = paired_errors({"a": nothing, "b": something}, target, error)
    assert errors["a"].isnan().all()
    assert torch.equal(errors["b"].isnan(), something[..., 0].isnan())
    assert errors["b"][1, 1] == pytest.approx(math.sqrt(3))


def test_alignment_is_by_the_joints_that_all_found() -> None:
    # The other method's wild joint, which the first did not find, must not bend its alignment.
    target = make_sample(0).keypoints_3d[None].double()
    loses, wild = target.clone(), target.clone()
    loses[:, 2] = torch.nan
    wild[:, 2] += 5000

    def error(points: Tensor, target: Tensor) -> Tensor:
        return pa_mpjpe(points, target, reduction="none")

    assert float(error(wild, target)[0, 3]) > 10
    errors = paired_errors({"loses": loses, "wild": wild}, target, error)
    assert errors["wild"][0, 2].isnan()
    assert float(errors["wild"].nan_to_num().max()) < 1e-6


def test_intervals() -> None:
    empty = bootstrap(torch.full((3, 2), torch.nan))
    assert (empty.mean, empty.low, empty.high, empty.poses, empty.joints) == (None,) * 3 + (0, 0)
    one = bootstrap(torch.tensor([[3.0, torch.nan, 5.0], [torch.nan] * 3]))
    assert (one.mean, one.low, one.high, one.poses, one.joints) == (4.0, None, None, 1, 2)
    same = bootstrap(torch.full((9, 2), 7.0))
    assert (same.low, same.mean, same.high) == (7.0, 7.0, 7.0)
    # Of 400 normal values the mean is known to 1.96 / 20 of their deviation.
    values = torch.randn(400, 1, generator=torch.Generator().manual_seed(1)).double()
    normal = bootstrap(values)
    assert normal.mean is not None
    assert normal.low is not None
    assert normal.high is not None
    assert normal.low < normal.mean < normal.high
    assert (normal.high - normal.low) / 2 == pytest.approx(
        1.96 / 20 * float(values.std()), rel=0.08
    )
    assert bootstrap(values) == normal


def test_only_the_same_data_are_compared() -> None:
    methods = {"one": (make_config(), None), "other": (make_config(validation=9), None)}
    with pytest.raises(ValueError, match=r"validation\.seed is 2 for one and 9 for other"):
        compare(methods)
    with pytest.raises(ValueError, match="methods must be at least one"):
        compare({})
    # What they were trained on does not matter, not even its kind.
    part = make_config().data.validation
    mixed = MixtureData(
        labelled=replace(part, seed=5),
        multi_view=replace(part, seed=6),
        validation=part,
    )
    module._check_same_data({
        "one": (make_config(), None),
        "mixed": (replace(make_config(), data=mixed), None),
    })  # fmt: skip


# ---- Checkpoints, files, options ----


def test_a_trained_network_is_measured_and_written(tmp_path: Path) -> None:
    config, file = make_config(), tmp_path / "network.safetensors"
    torch.manual_seed(0)
    write_model(file, build_task(config).model, config, 123)
    done: list[int] = []
    evaluation = evaluate(
        config, file, views=(2,), output=tmp_path / "new" / "folder", pictures=1, device="cpu",
        progress=done.append,
    )  # fmt: skip
    assert sum(done) == 3
    values = json.loads((tmp_path / "new" / "folder" / "evaluation.json").read_text())
    assert values == json.loads(json.dumps(evaluation.to_json(), allow_nan=False))
    assert values["origin"]["step"] == 123
    assert values["settings"]["validation"]["seed"] == 2
    assert [row["views"] for row in values["sweep"]] == [None, 2]
    assert set(values["pixels"]) == {"visible", "hidden", "outside"}
    assert values["report"]["average"]["mpjpe_absolute"]["value"] > 0
    text = (tmp_path / "new" / "folder" / "evaluation.txt").read_text()
    assert text == evaluation.table() + "\n"
    for words in ("step 123", "seed 2", "Cameras: 3 a sample", "Excluded: nothing", "MPJPE abs"):
        assert words in text
    names = {path.name for path in (tmp_path / "new" / "folder").iterdir()}
    assert names == {"evaluation.json", "evaluation.txt", "prediction_p050.png"}
    again = evaluate(config, file, views=(2,), batch_size=3, device="cpu")
    assert again.report.average["mpjpe_absolute"].value == pytest.approx(
        evaluation.report.average["mpjpe_absolute"].value, rel=1e-4
    )


def test_pictures_go_from_the_best_pose_to_the_worst(
    fake: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def by_index(batch: Batch) -> SimpleNamespace:
        points = batch.keypoints_3d.clone()
        points[..., 0] += 10.0 * torch.tensor([(3 * i) % 5 for i in batch.indices])[:, None]
        return SimpleNamespace(keypoints_3d=points, keypoints_2d=None)

    drawn: dict[str, int] = {}
    monkeypatch.setattr(
        "tritool.plot.plot_prediction",
        lambda path, sample, *_, **__: drawn.update({path.name: sample.index}),
    )
    fake(Data(*(make_sample(index) for index in range(5))), algebraic=by_index)
    evaluate(make_config(), None, output=tmp_path, pictures=3, device="cpu")
    # Errors of samples 0 to 4: 0, 30, 10, 40, 20.
    assert drawn == {
        "prediction_p000.png": 0, "prediction_p050.png": 4, "prediction_p100.png": 3,
    }  # fmt: skip
    drawn.clear()
    evaluate(make_config(), None, output=tmp_path, pictures=9, device="cpu")
    assert sorted(drawn.values()) == [0, 1, 2, 3, 4]
    drawn.clear()
    evaluate(make_config(), None, output=tmp_path, pictures=0, device="cpu")
    assert drawn == {}


def test_a_comparison_is_written(
    fake: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[str] = []
    monkeypatch.setattr(
        "tritool.plot.plot_prediction", lambda path, *_, **__: drawn.append(path.name)
    )
    off = moved({WRIST: (17.0, 0.0, 0.0)})
    fake(Data(*(make_sample(index) for index in range(3))), ransac=off, algebraic=off)
    methods = {"a/b": (make_config("ransac"), None), "a b": (make_config(), None)}
    comparison = compare(methods, output=tmp_path, device="cpu")
    values = json.loads((tmp_path / "comparison.json").read_text())
    assert values == json.loads(json.dumps(comparison.to_json(), allow_nan=False))
    assert list(values["methods"]) == ["a/b", "a b"]
    assert values["methods"]["a b"]["joints"]["l_wrist"] == pytest.approx(17, abs=1e-3)
    assert values["known_joints"] == 3 * JOINTS
    assert (tmp_path / "comparison.txt").read_text() == comparison.table() + "\n"
    assert (tmp_path / "methods.png").stat().st_size > 20_000
    # Names that differ in what a file name cannot hold do not share a file.
    assert drawn == ["prediction_a-b.png", "prediction_a-b-2.png"]


def test_a_bad_checkpoint_is_told_in_one_line_and_nothing_is_written(tmp_path: Path) -> None:
    config, output = make_config(), tmp_path / "output"
    model = build_task(config).model
    good, noise = tmp_path / "good.safetensors", tmp_path / "noise.safetensors"
    write_model(good, model, config, 1)
    noise.write_bytes(good.read_bytes()[:-100])
    bad = [
        (config, noise, "damaged"),
        (make_config("ransac"), good, "it is of kind algebraic, not ransac"),
        (make_config(width=8), good, "it is of another network: backbone.conv1.weight"),
    ]
    for other, file, words in bad:
        with pytest.raises(ValueError, match=words) as caught:
            evaluate(other, file, output=output, device="cpu")
        assert str(caught.value).startswith(str(file))
        assert "\n" not in str(caught.value)
    with pytest.raises(FileNotFoundError):
        evaluate(config, tmp_path / "none.safetensors", output=output, device="cpu")
    assert not output.exists()


def test_what_differs_from_training_is_said(fake: Callable[..., None], tmp_path: Path) -> None:
    trained, file = make_config(train=2, validation=5), tmp_path / "network.safetensors"
    fake(Data(make_sample(0)), algebraic=moved({}))
    write_model(file, nn.Linear(1, 1), trained, 1)
    now = make_config(train=1, validation=2, inverse_temperature=7.0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        table = evaluate(now, file, device="cpu").table()
    said = [str(each.message) for each in caught]
    assert len(said) == 2
    assert all(str(file) in each for each in said)
    assert "inverse_temperature 7.0 (in training 100.0)" in table
    assert "trained on data of the same seed, 2" in table
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        table = evaluate(trained, file, device="cpu").table()
    assert "differ from training" not in table
    assert "same seed" not in table


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"limit": 0}, "limit must be at least 1, got 0"),
        ({"views": (0,)}, "views must be different numbers of at least 1"),
        ({"views": (2, 2)}, "views must be different numbers of at least 1"),
        ({"views": (5,)}, "views must be at most the 4 of the data, got 5"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"pictures": -1}, "pictures must be 0 or more, got -1"),
        ({"device": "abacus"}, "device must be one of this machine, got 'abacus'"),
    ],
)
def test_impossible_options_are_named(
    fake: Callable[..., None], options: dict[str, Any], words: str
) -> None:
    fake(Data(make_sample(0)), algebraic=moved({}))
    with pytest.raises(ValueError, match=words):
        evaluate(make_config(), None, **{"device": "cpu", **options})


def test_a_file_in_the_way_and_other_joints_are_named(
    fake: Callable[..., None], tmp_path: Path
) -> None:
    fake(Data(make_sample(0)), algebraic=moved({}))
    (tmp_path / "file").write_text("kept")
    with pytest.raises(NotADirectoryError):
        evaluate(make_config(), None, output=tmp_path / "file", device="cpu")
    assert (tmp_path / "file").read_text() == "kept"

    def fewer(batch: Batch) -> SimpleNamespace:
        return SimpleNamespace(keypoints_3d=batch.keypoints_3d[:, :5], keypoints_2d=None)

    fake(Data(make_sample(0)), algebraic=fewer)
    with pytest.raises(ValueError, match=r"tiny algebraic: keypoints_3d must be \(1, 17, 3\)"):
        evaluate(make_config(), None, device="cpu")


def test_excluded_poses_and_the_first_samples(fake: Callable[..., None]) -> None:
    def by_subject(batch: Batch) -> SimpleNamespace:
        points = batch.keypoints_3d.clone()
        points[..., 2] += torch.tensor([50.0 * (i % 2) for i in batch.indices])[:, None]
        return SimpleNamespace(keypoints_3d=points, keypoints_2d=batch.keypoints_2d)

    fake(Data(*(make_sample(index) for index in range(6))), algebraic=by_subject)
    everything = evaluate(make_config(), None, device="cpu")
    assert everything.report.average["mpjpe_absolute"].value == pytest.approx(25, abs=1e-3)
    some = evaluate(make_config(), None, exclude=[("S1", "waiting")], device="cpu")
    assert some.report.average["mpjpe_absolute"].value == pytest.approx(0, abs=1e-3)
    assert some.report.excluded == {"S1 waiting": 3}
    assert "2D figures are over all poses" in some.table()
    first = evaluate(make_config(), None, limit=1, device="cpu")
    assert first.report.poses == 1
    assert first.settings["samples"] == 1
