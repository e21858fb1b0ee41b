# SPDX-License-Identifier: Apache-2.0
"""The measures of `tritool.metrics`: against independent code, their laws, missing joints."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy.spatial import procrustes
from scipy.spatial.transform import Rotation
from torch import Tensor

from tritool import metrics

Metric = Callable[..., Tensor]
METRICS: dict[str, Metric] = {
    "mpjpe": metrics.mpjpe,
    "n_mpjpe": metrics.n_mpjpe,
    "pa_mpjpe": metrics.pa_mpjpe,
    "pck": metrics.pck,
    "auc": metrics.auc,
}
of_poses = pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS.keys())
seeds = st.integers(0, 2**31)


def poses(*size: int, seed: int = 0, noise: float = 60.0) -> tuple[Tensor, Tensor]:
    """Prediction and target [*size, 3], millimetres, some metres from the origin."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    target = 300 * randn(*size, 3) + 2000 * randn(*size[:-1], 1, 3)
    return target + noise * randn(*size, 3), target


def similarity(seed: int) -> Callable[[Tensor], Tensor]:
    rng = np.random.default_rng(seed)
    turn = torch.from_numpy(Rotation.random(random_state=rng.integers(2**31)).as_matrix())
    scale, shift = rng.uniform(0.3, 3), torch.from_numpy(rng.normal(0, 1000, 3))
    return lambda points: scale * points @ turn.T + shift


# ---- Values ----


def test_closed_forms() -> None:
    target = torch.tensor([[[0.0, 0, 0], [300, 0, 0], [0, 400, 0]]])
    prediction = target + torch.tensor([[[0.0, 0, 12], [0, 0, 0], [0, 0, 100]]])
    assert metrics.mpjpe(prediction, target) == pytest.approx(112 / 3)
    assert metrics.mpjpe(prediction, target, root=0) == pytest.approx((12 + 88) / 3)
    # The mean of joints 0 and 1 is 6 mm too high.
    assert metrics.mpjpe(prediction, target, root=(0, 1)) == pytest.approx((6 + 6 + 94) / 3)
    none = metrics.mpjpe(prediction, target, reduction="none")
    assert none.tolist() == [[12, 0, 100]]
    assert metrics.pck(prediction, target, threshold=100) == pytest.approx(2 / 3)
    assert metrics.pck(prediction, target, threshold=100.001) == 1
    # Below how many of 0, 5, ..., 150: of 15 to 150; 5 to 150; 105 to 150.
    assert metrics.auc(prediction, target) == pytest.approx((28 + 30 + 10) / 31 / 3)


def test_auc_of_perfect_poses() -> None:
    _, target = poses(4, 17)
    assert metrics.AUC_THRESHOLDS[::30] == (0, 150)
    assert len(metrics.AUC_THRESHOLDS) == 31
    assert metrics.auc(target, target) == pytest.approx(30 / 31)
    assert metrics.pck(target, target) == 1
    assert metrics.auc(target, target, thresholds=[1.0]) == 1


@given(seeds)
def test_against_numpy(seed: int) -> None:
    prediction, target = poses(5, 7, seed=seed)
    p, t = prediction.numpy(), target.numpy()
    assert metrics.mpjpe(prediction, target).item() == pytest.approx(
        np.linalg.norm(p - t, axis=-1).mean()
    )
    p, t = p - p[:, 2:3], t - t[:, 2:3]
    errors = np.linalg.norm(p - t, axis=-1)
    assert metrics.mpjpe(prediction, target, root=2).item() == pytest.approx(errors.mean())
    assert metrics.pck(prediction, target, root=2, threshold=90).item() == pytest.approx(
        (errors < 90).mean()
    )
    curve = [(errors < threshold).mean() for threshold in np.linspace(0, 150, 31)]
    assert metrics.auc(prediction, target, root=2).item() == pytest.approx(np.mean(curve))
    scaled = []
    for a, b in zip(p, t, strict=True):
        scale = np.linalg.lstsq(a.reshape(-1, 1), b.reshape(-1), rcond=None)[0]
        scaled.append(np.linalg.norm(scale * a - b, axis=-1).mean())
    assert metrics.n_mpjpe(prediction, target, root=2).item() == pytest.approx(np.mean(scaled))


def aligned_error(prediction: npt.NDArray[Any], target: npt.NDArray[Any]) -> float:
    """By SciPy: rotation by `Rotation.align_vectors`, scale as least squares."""
    p, t = prediction - prediction.mean(0), target - target.mean(0)
    turned = Rotation.align_vectors(t, p)[0].apply(p)
    scale = np.linalg.lstsq(turned.reshape(-1, 1), t.reshape(-1), rcond=None)[0]
    return float(np.linalg.norm(scale * turned - t, axis=-1).mean())


@given(seeds, st.sampled_from([10.0, 100.0, 1000.0]))
def test_pa_mpjpe_against_scipy(seed: int, noise: float) -> None:
    prediction, target = poses(3, 6, seed=seed, noise=noise)
    got = metrics.pa_mpjpe(prediction, target, reduction="pose")
    expected = [aligned_error(*pair) for pair in zip(prediction.numpy(), target.numpy())]  # noqa: B905
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-9)


@given(seeds)
def test_pa_mpjpe_against_scipys_procrustes(seed: int) -> None:
    """Close poses need no reflection, so SciPy's Procrustes, which allows one, has the same."""
    prediction, target = (x[0] for x in poses(1, 8, seed=seed, noise=20.0))
    size = (target - target.mean(0)).norm()
    normalised, moved, _ = procrustes(target.numpy(), prediction.numpy())
    expected = size * np.linalg.norm(normalised - moved, axis=-1).mean()
    assert metrics.pa_mpjpe(prediction, target).item() == pytest.approx(expected.item())


def test_pa_mpjpe_takes_no_mirror_image() -> None:
    _, target = poses(6, 8)
    mirrored = target * torch.tensor([-1.0, 1, 1])
    assert metrics.pa_mpjpe(mirrored, target) > 10


# ---- Laws ----


@given(seeds)
def test_law_translation(seed: int) -> None:
    prediction, target = poses(4, 5, seed=seed)
    shift = torch.tensor([100.0, -2000, 30], dtype=torch.float64)
    for root in (0, 4, (1, 2)):
        for metric in (metrics.mpjpe, metrics.n_mpjpe, metrics.pck, metrics.auc):
            torch.testing.assert_close(
                metric(prediction + shift, target, root=root),
                metric(prediction, target, root=root),
            )
    assert metrics.mpjpe(prediction + shift, target) > 1000
    # Exactly right but for a place: the whole error is absolute.
    assert metrics.mpjpe(target + shift, target).item() == pytest.approx(shift.norm().item())
    assert metrics.mpjpe(target + shift, target, root=0).item() == pytest.approx(0, abs=1e-9)


@given(seeds, st.floats(0.01, 100))
def test_law_scale(seed: int, scale: float) -> None:
    prediction, target = poses(4, 5, seed=seed)
    expected = metrics.n_mpjpe(prediction, target, root=1)
    torch.testing.assert_close(metrics.n_mpjpe(scale * prediction, target, root=1), expected)
    assert metrics.n_mpjpe(scale * target, target, root=1).item() == pytest.approx(0, abs=1e-6)
    # The best scale is best in squares.
    centred = [x - x[:, 1:2] for x in (prediction, target)]

    def squares(factor: float) -> Tensor:
        errors = metrics.mpjpe(factor * centred[0], centred[1], reduction="none")
        return errors.square().sum(-1)

    best = metrics.n_mpjpe(*centred, reduction="none").square().sum(-1)
    assert (best <= squares(scale) * (1 + 1e-12)).all()
    assert (best <= squares(1.0) * (1 + 1e-12)).all()


@given(seeds, seeds)
def test_law_similarity(seed: int, motion: int) -> None:
    prediction, target = poses(4, 6, seed=seed)
    move = similarity(motion)
    expected = metrics.pa_mpjpe(prediction, target, reduction="none")
    got = metrics.pa_mpjpe(move(prediction), target, reduction="none")
    torch.testing.assert_close(got, expected, rtol=1e-7, atol=1e-7)
    assert metrics.pa_mpjpe(move(target), target).item() == pytest.approx(0, abs=1e-7)


@given(seeds)
def test_law_aligned_squares_are_no_larger(seed: int) -> None:
    prediction, target = poses(4, 6, seed=seed)
    squares = [
        metric(prediction, target, reduction="none", **options).square().sum(-1)
        for metric, options in (
            (metrics.pa_mpjpe, {}),
            (metrics.n_mpjpe, {"root": 3}),
            (metrics.mpjpe, {"root": 3}),
        )
    ]
    assert (squares[0] <= squares[1] * (1 + 1e-9)).all()
    assert (squares[1] <= squares[2] * (1 + 1e-9)).all()


@given(seeds, st.lists(st.floats(0, 400), min_size=2, max_size=6))
def test_law_pck_grows_with_the_threshold(seed: int, thresholds: list[float]) -> None:
    prediction, target = poses(4, 6, seed=seed)
    values = [metrics.pck(prediction, target, threshold=t).item() for t in sorted(thresholds)]
    assert values == sorted(values)
    assert 0 <= values[0] <= values[-1] <= 1
    curve = metrics.auc(prediction, target, thresholds=thresholds).item()
    assert curve == pytest.approx(np.mean(values))


@given(seeds, st.floats(1, 3))
def test_law_larger_errors_are_no_better(seed: int, factor: float) -> None:
    prediction, target = poses(4, 6, seed=seed)
    worse = target + factor * (prediction - target)
    for metric in (metrics.pck, metrics.auc):
        assert metric(worse, target) <= metric(prediction, target)


@of_poses
@given(seed=seeds)
def test_law_order(metric: Metric, seed: int) -> None:
    prediction, target = poses(5, 6, seed=seed)
    valid = torch.rand(5, 6, generator=torch.Generator().manual_seed(seed)) < 0.9
    order, joints = torch.randperm(5), torch.randperm(6)
    expected = metric(prediction, target, valid=valid)
    torch.testing.assert_close(
        metric(prediction[order], target[order], valid=valid[order]), expected
    )
    shuffled = (x[:, joints] for x in (prediction, target))
    torch.testing.assert_close(metric(*shuffled, valid=valid[:, joints]), expected)


# ---- What is averaged over what ----


def gaps(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Poses [5, 6] with holes of all kinds, and which joints are left."""
    prediction, target = poses(5, 6, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    kind = torch.randint(0, 8, (5, 6), generator=generator)
    kind[0] = 5
    prediction[kind == 0] = torch.nan
    target[kind == 1] = torch.nan
    prediction[..., 1][kind == 2] = torch.inf
    return prediction, target, kind > 2


@of_poses
@given(seed=seeds)
def test_missing_joints_are_absent(metric: Metric, seed: int) -> None:
    prediction, target, there = gaps(seed)
    assume(not there.all())
    each = metric(prediction, target, reduction="none")
    by_pose = metric(prediction, target, reduction="pose")
    assert not each[~there].isfinite().any()
    for pose in range(5):
        alone = (x[pose, there[pose]] for x in (prediction, target))
        if int(there[pose].sum()) == 0:
            assert by_pose[pose].isnan()
            continue
        torch.testing.assert_close(
            by_pose[pose], metric(*alone), equal_nan=True, rtol=1e-6, atol=1e-6
        )
    # The same by a mask, whatever hides behind it.
    mask = metric(prediction, target, valid=there, reduction="none")
    torch.testing.assert_close(mask, each, equal_nan=True)
    filled = prediction.nan_to_num(7.0, 1e30), target.nan_to_num(-7.0)
    mask = metric(*filled, valid=there.float(), reduction="none")
    torch.testing.assert_close(mask, each, equal_nan=True)


@of_poses
@given(seed=seeds)
def test_reductions(metric: Metric, seed: int) -> None:
    prediction, target, _ = gaps(seed)
    each = metric(prediction, target, reduction="none")
    by_pose, by_joint = (metric(prediction, target, reduction=r) for r in ("pose", "joint"))
    torch.testing.assert_close(by_pose, each.nanmean(1), equal_nan=True)
    torch.testing.assert_close(by_joint, each.nanmean(0), equal_nan=True)
    torch.testing.assert_close(metric(prediction, target), by_pose.nanmean(), equal_nan=True)
    # Any batch is the same poses.
    views = (x[None, :, None] for x in (prediction, target))
    grouped = metric(*views, reduction="none")
    assert grouped.shape == (1, 5, 1, 6)
    torch.testing.assert_close(grouped[0, :, 0], each, equal_nan=True)
    single = metric(prediction[0], target[0], reduction="joint")
    torch.testing.assert_close(single, each[0], equal_nan=True)


def test_mean_is_over_poses_not_over_joints() -> None:
    target = torch.zeros(2, 2, 3)
    prediction = torch.zeros(2, 2, 3)
    prediction[..., 0] = torch.tensor([[10.0, 20.0], [60.0, torch.nan]])
    assert metrics.mpjpe(prediction, target) == (15 + 60) / 2
    assert metrics.mpjpe(prediction, target, reduction="joint").tolist() == [35, 20]


@of_poses
def test_chosen_joints(metric: Metric) -> None:
    prediction, target = poses(4, 6)
    each = metric(prediction, target, reduction="none")
    got = metric(prediction, target, joints=[4, 0], reduction="none")
    torch.testing.assert_close(got, each[:, [4, 0]])
    torch.testing.assert_close(metric(prediction, target, joints=[4, 0]), got.mean())


def test_a_pose_without_its_root_does_not_count() -> None:
    prediction, target = poses(4, 5)
    prediction[0, 1] = torch.nan
    target[1, 2] = torch.nan
    valid = torch.ones(4, 5, dtype=torch.bool)
    valid[2, 1] = False
    for metric in (metrics.mpjpe, metrics.n_mpjpe, metrics.pck, metrics.auc):
        for root, whole in ((1, [False, True, False, True]), ((1, 2), [False, False, False, True])):
            got = metric(prediction, target, root=root, valid=valid, reduction="none")
            assert got.isfinite().any(-1).tolist() == whole


def test_undetermined_poses_do_not_count() -> None:
    prediction, target = poses(5, 6)
    prediction[0] = prediction[0, :1]  # one place
    line = torch.linspace(-1, 1, 6, dtype=torch.float64)[:, None]
    target[1] = line * torch.tensor([3.0, 1, 2])
    target[2, 2:] = torch.nan
    aligned = metrics.pa_mpjpe(prediction, target, reduction="pose")
    assert aligned.isnan().tolist() == [True, True, True, False, False]
    torch.testing.assert_close(metrics.pa_mpjpe(prediction, target), aligned[3:].mean())
    scaled = metrics.n_mpjpe(prediction, target, root=0, reduction="pose")
    assert scaled.isnan().tolist() == [True, False, False, False, False]


@of_poses
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_nothing_counts(metric: Metric, dtype: torch.dtype) -> None:
    holes = torch.full((2, 4, 3), torch.nan, dtype=dtype)
    for reduction in ("mean", "pose", "joint", "none"):
        got = metric(holes, torch.zeros_like(holes), reduction=reduction)
        assert got.isnan().all()
        assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    empty = torch.zeros(0, 4, 3)
    assert metric(empty, empty).isnan()


@of_poses
def test_gradients_are_finite(metric: Metric) -> None:
    prediction, target, there = gaps(1)
    prediction[0] = target[0]
    prediction[1] = 5.0  # in one place: no alignment
    there[1] = target[1].isfinite().all(-1)
    leaves = prediction.requires_grad_(), target.requires_grad_()
    metric(*leaves).backward()
    for leaf in leaves:
        assert leaf.grad.isfinite().all()
        assert (leaf.grad[~there] == 0).all()


def test_gradients_go_down() -> None:
    """The measures that are smooth serve as losses."""
    for metric in (metrics.mpjpe, metrics.n_mpjpe, metrics.pa_mpjpe):
        prediction, target = poses(2, 5)
        assert torch.autograd.gradcheck(
            lambda p, t, metric=metric: metric(p, t), (prediction.requires_grad_(), target)
        )


@of_poses
def test_compiles_in_one_graph(metric: Metric) -> None:
    torch._dynamo.reset()
    prediction, target, _ = gaps(0)
    compiled = torch.compile(metric, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(prediction, target), metric(prediction, target))


# ---- Bad input ----


@of_poses
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"prediction": torch.zeros(2, 4, 2)},
            ValueError,
            r"prediction must be \[..., J, 3\], got",
        ),
        ({"target": torch.zeros(4, 3)}, ValueError, "target must have the shape of prediction"),
        ({"target": None}, TypeError, "target must be a tensor, got NoneType"),
        ({"valid": torch.ones(3)}, ValueError, r"valid must be .* to \(2, 4\), got \(3,\)"),
        ({"joints": [0, 4]}, ValueError, r"joints must be joint indices from 0 to 3, got \(0, 4\)"),
        ({"joints": []}, ValueError, "joints must be joint indices"),
        ({"reduction": "sum"}, ValueError, "reduction must be 'mean', .* got 'sum'"),
    ],
)
def test_bad_input_is_refused(
    metric: Metric, change: dict[str, Any], error: type[Exception], message: str
) -> None:
    arguments = {"prediction": torch.zeros(2, 4, 3), "target": torch.zeros(2, 4, 3), **change}
    with pytest.raises(error, match=message):
        metric(**arguments)


@pytest.mark.parametrize("root", [-1, 4, (0, 7), (), 1.0])
def test_bad_root_is_refused(root: Any) -> None:
    root = (root,) if isinstance(root, float) else root
    for metric in (metrics.mpjpe, metrics.n_mpjpe, metrics.pck, metrics.auc):
        with pytest.raises(ValueError, match="root must be joint indices from 0 to 3"):
            metric(torch.zeros(2, 4, 3), torch.zeros(2, 4, 3), root=root)


def test_bad_thresholds_are_refused() -> None:
    pose = torch.zeros(4, 3)
    with pytest.raises(ValueError, match="threshold must be a number"):
        metrics.pck(pose, pose, threshold=math.nan)
    with pytest.raises(ValueError, match="thresholds must be one or more"):
        metrics.auc(pose, pose, thresholds=[])
