# SPDX-License-Identifier: Apache-2.0
"""The studio: samples are the same every time, true to their cameras, and of possible bodies."""

from __future__ import annotations

import pickle
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from tritool.data import Sample, collate
from tritool.data.synthetic import (
    ACTIONS,
    Studio,
    StudioSettings,
    contact_sheet,
    ordinary_limb_lengths,
)
from tritool.data.synthetic.body import BONES, LIMITS, draw_dimensions, rotations, turn
from tritool.data.synthetic.eyes import Eyes
from tritool.data.synthetic.figure import draw_subject, lowest, posed
from tritool.data.synthetic.poses import draw_pose
from tritool.data.synthetic.studio import Take, draw_take
from tritool.skeletons import HUMAN36M_JOINTS, HUMAN36M_LIMBS

JOINT = {name: row for row, name in enumerate(HUMAN36M_JOINTS)}
SIZE = (80, 112)  # width, height
TENSORS = ("images", "keypoints_3d", "keypoints_2d", "visibility", "views", "boxes")
BARE: dict[str, Any] = {"obstacles": (0, 0), "distractors": (0, 0), "clutter": (0, 0)}
CLEAN: dict[str, Any] = {
    "noise": (0, 0), "blur": (0, 0), "exposure": (1, 1), "colour_cast": 0.0,
}  # fmt: skip


def small(**changes: Any) -> StudioSettings:
    return StudioSettings(**{"views": 3, "image_size": SIZE} | changes)


def assert_same(first: Sample, second: Sample) -> None:
    for name in TENSORS:
        one, other = getattr(first, name), getattr(second, name)
        assert torch.equal(one.nan_to_num(-1e9), other.nan_to_num(-1e9)), name
    for name in ("K", "R", "t"):
        assert torch.equal(getattr(first.cameras, name), getattr(second.cameras, name)), name
    assert (first.index, first.subject, first.action) == (
        second.index, second.subject, second.action,
    )  # fmt: skip


@lru_cache
def bare_take(action: str = "standing", seed: int = 0, views: int = 4) -> Take:
    """Somebody alone in an empty room."""
    settings = small(views=views, actions=(action,), **BARE)
    return draw_take(settings, seed, np.random.default_rng(seed))


def whole_body(take: Take, width: int = 150, height: int = 130) -> tuple[Eyes, np.ndarray]:
    """Views of the full images, scaled down, and the joints' pixels in them."""
    cameras = take.rig.cameras.resize((width, height))
    pixels = cameras.project(torch.from_numpy(take.joints)).movedim(0, 1).numpy()
    return Eyes.of(cameras, width, height), pixels


# --- the same every time -------------------------------------------------------------------------


def test_a_sample_depends_on_seed_and_index_alone() -> None:
    settings = small()
    first, again = Studio(settings, length=10, seed=4), Studio(settings, length=20, seed=4)
    for index in (3, 0, 7):  # the other one in another order
        again[9 - index]
        assert_same(first[index], again[index])
    assert_same(first[-1], first[9])
    assert not torch.equal(first[0].keypoints_3d, first[1].keypoints_3d)
    assert not torch.equal(first[0].images, first[1].images)
    other = Studio(settings, length=10, seed=5)[0]
    assert not torch.equal(first[0].keypoints_3d, other.keypoints_3d)


def test_workers_and_threads_change_nothing() -> None:
    studio = Studio(small(), length=4, seed=2)
    loader: DataLoader[Sample] = DataLoader(studio, batch_size=2, num_workers=2, collate_fn=collate)  # type: ignore[arg-type]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        here = [collate([studio[0], studio[1]]), collate([studio[2], studio[3]])]
    finally:
        torch.set_num_threads(threads)
    for mine, theirs in zip(here, loader, strict=True):
        for name in ("images", "keypoints_3d", "keypoints_2d", "projections", "visibility"):
            assert torch.equal(getattr(mine, name), getattr(theirs, name)), name


def test_a_studio_can_be_pickled() -> None:
    studio = Studio(small(), length=3, seed=6)
    assert_same(pickle.loads(pickle.dumps(studio))[1], studio[1])


def test_people_of_different_seeds_are_different_people() -> None:
    settings = small(subjects=4, image_size=(32, 40), **BARE)
    names, lengths = [], []
    for seed in (1, 2):
        samples = [Studio(settings, length=24, seed=seed)[index] for index in range(24)]
        names.append({sample.subject for sample in samples})
        lengths.append({sample.subject: shape_of(sample) for sample in samples})
        assert len(names[-1]) == 4
        for sample in samples:  # the same lengths every time
            assert torch.allclose(shape_of(sample), lengths[-1][sample.subject], atol=1e-2)
    assert not names[0] & names[1]
    every = torch.stack([*lengths[0].values(), *lengths[1].values()])
    assert torch.cdist(every, every).fill_diagonal_(torch.inf).min() > 1  # mm


def shape_of(sample: Sample) -> torch.Tensor:
    points = sample.keypoints_3d.double()
    return torch.stack([(points[JOINT[a]] - points[JOINT[b]]).norm() for a, b in HUMAN36M_LIMBS])


# --- bodies --------------------------------------------------------------------------------------


def test_rotations_are_products_of_turns_about_the_axes() -> None:
    angles = np.random.default_rng(0).uniform(-3, 3, (20, 3))

    def about(axis: int, angle: float) -> np.ndarray:
        i, j = (axis + 1) % 3, (axis + 2) % 3
        result = np.eye(3)
        result[[i, j], [i, j]] = np.cos(angle)
        result[i, j], result[j, i] = -np.sin(angle), np.sin(angle)
        return result

    for each, got in zip(angles, rotations(angles), strict=True):
        want = about(0, each[0]) @ about(1, each[1]) @ about(2, each[2])
        np.testing.assert_allclose(got, want, atol=1e-12)


def test_positive_angles_mean_what_they_say() -> None:
    body = draw_dimensions(np.random.default_rng(0))

    def joints(**angles: tuple[float, float]) -> dict[str, np.ndarray]:
        values = np.zeros((1, len(BONES), 3))
        for bone, (flexion, abduction) in angles.items():
            values[0, BONES.index(bone), :2] = flexion, abduction
        pose = turn(body, values, 0.0)
        return {name: pose.joints[0, row] for name, row in JOINT.items()}

    rest = joints()
    # x to the right, y forward, z up.
    assert rest["r_shoulder"][0] > 0 > rest["l_shoulder"][0]
    assert rest["nose"][1] > rest["neck"][1]
    assert rest["head_top"][2] > rest["neck"][2] > rest["pelvis"][2] > rest["r_ankle"][2]
    for side, sign in (("r", 1), ("l", -1)):
        raised = joints(**{f"{side}_upper_arm": (90, 0)})
        assert raised[f"{side}_elbow"][1] > rest[f"{side}_elbow"][1] + 200
        out = joints(**{f"{side}_upper_arm": (0, 80), f"{side}_thigh": (0, 40)})
        assert sign * (out[f"{side}_wrist"][0] - rest[f"{side}_wrist"][0]) > 200
        assert sign * (out[f"{side}_knee"][0] - rest[f"{side}_knee"][0]) > 200
        step = joints(**{f"{side}_thigh": (60, 0), f"{side}_shank": (60, 0)})
        assert step[f"{side}_knee"][1] > 200
        assert abs(step[f"{side}_ankle"][1] - step[f"{side}_knee"][1]) < 20
    bent = joints(pelvis=(45, 0), head=(30, 0))
    assert bent["head_top"][1] > 300
    assert bent["head_top"][2] < rest["head_top"][2]


@pytest.mark.parametrize("action", ACTIONS)
def test_poses_are_possible(action: str) -> None:
    rng = np.random.default_rng(ACTIONS.index(action))
    for _ in range(12):
        subject = draw_subject(rng)
        pose = draw_pose(rng, subject.body, action)
        at = {name: pose.joints[0, row] for name, row in JOINT.items()}
        for side in "rl":
            for upper, parts, sign in (
                ("upper_arm", ("shoulder", "elbow", "wrist"), 1),
                ("thigh", ("hip", "knee", "ankle"), -1),
            ):
                start, hinge, end = (at[f"{side}_{part}"] for part in parts)
                axes = pose.turns[0, BONES.index(f"{side}_{upper}")]
                lower = axes.T @ (end - hinge) / np.linalg.norm(end - hinge)
                # Elbows bend forward, knees back, about the hinge, never through.
                assert abs(lower[0]) < 1e-9
                assert sign * lower[1] >= np.sin(np.deg2rad(1.9))
                np.testing.assert_allclose(
                    axes.T @ (hinge - start) / np.linalg.norm(hinge - start), [0, 0, -1], atol=1e-9
                )
        flesh = posed(subject, pose)
        grounded = pose.moved(np.array([0, 0, -lowest(flesh)]))
        assert abs(lowest(posed(subject, grounded))) < 1e-6
        assert grounded.joints[0, :, 2].min() > 15  # the joints lie within the flesh
        assert grounded.joints[0, :, 2].max() < 2 * subject.body.stature


def test_upright_people_are_as_tall_as_they_say() -> None:
    rng = np.random.default_rng(3)
    for _ in range(20):
        subject = draw_subject(rng)
        pose = turn(subject.body, np.zeros((1, len(BONES), 3)), 0.3)
        height = pose.joints[0, JOINT["head_top"], 2] - lowest(posed(subject, pose))
        assert abs(height / subject.body.stature - 1) < 0.06
        assert 1500 <= subject.body.stature <= 2000


def test_angles_beyond_a_body_s_limits_are_cut() -> None:
    body = draw_dimensions(np.random.default_rng(1))
    far = turn(body, np.full((1, len(BONES), 3), 500.0), 0.0)
    limit = turn(body, LIMITS[None, :, :, 1], 0.0)
    np.testing.assert_allclose(far.joints, limit.joints)


def test_the_feet_of_the_standing_are_flat_on_the_floor() -> None:
    take = bare_take("standing", 2)
    ankles = take.joints[[JOINT["r_ankle"], JOINT["l_ankle"]], 2]
    assert (ankles > 30).all()
    assert (ankles < 200).all()


# --- cameras and crops ---------------------------------------------------------------------------


@pytest.mark.parametrize("distortion", [0.0, 0.3])
def test_joints_in_images_are_those_in_space_projected(distortion: float) -> None:
    studio = Studio(small(distortion=distortion), length=6, seed=3)
    for index in range(6):
        sample = studio[index]
        assert sample.cameras.lens == ("brown_conrady" if distortion else "pinhole")
        assert not sample.cameras.problems()
        projected = sample.cameras.to(torch.float64).project(sample.keypoints_3d.double())
        difference = (projected.movedim(0, 1) - sample.keypoints_2d).abs()
        assert difference.max() < 0.02  # pixels


@pytest.mark.parametrize("distortion", [0.0, 0.2])
def test_a_rig_projects_as_its_cameras_do(distortion: float) -> None:
    rig = draw_take(small(distortion=distortion), 0, np.random.default_rng(2)).rig
    points = np.random.default_rng(0).normal(0, 3000, (200, 3))  # some behind the cameras
    want = rig.cameras.project(torch.from_numpy(points)).movedim(0, 1).numpy()
    np.testing.assert_allclose(rig.project(points), want, rtol=1e-9, atol=1e-6)
    assert np.isnan(want).any()


@pytest.mark.parametrize("distortion", [0.0, 0.2])
def test_crops_come_from_their_boxes(distortion: float) -> None:
    settings = small(distortion=distortion, full_size=(640, 360))
    take = draw_take(settings, 1, np.random.default_rng([1, 1, 0]))
    sample = Studio(settings, length=1, seed=1)[0]
    assert take.action == sample.action
    x0, y0, x1, y1 = sample.boxes.double().unbind(-1)
    width, height = SIZE
    full = take.rig.cameras.project(sample.keypoints_3d.double()).movedim(0, 1)
    cropped = torch.stack(
        [
            (full[..., 0] - x0[:, None] + 0.5) * (width / (x1 - x0))[:, None] - 0.5,
            (full[..., 1] - y0[:, None] + 0.5) * (height / (y1 - y0))[:, None] - 0.5,
        ],
        -1,
    )
    assert (cropped - sample.keypoints_2d).abs().max() < 0.02
    assert torch.allclose((x1 - x0) / (y1 - y0), torch.tensor(width / height).double())
    # The box holds the body, with some of it perhaps beyond by the jitter.
    inside = ((sample.keypoints_2d >= -0.5) & (sample.keypoints_2d < torch.tensor(SIZE) - 0.5)).all(
        -1
    )
    assert inside.float().mean() > 0.95


@pytest.mark.parametrize("views", [1, 2, 31])
def test_any_number_of_cameras(views: int) -> None:
    sample = Studio(small(views=views, image_size=(24, 40)), length=1, seed=1)[0]
    assert sample.images.shape == (views, 3, 40, 24)
    assert len(sample.cameras) == views
    assert sample.cameras.names is not None
    centres = sample.cameras.centers
    if views > 1:
        assert torch.cdist(centres, centres).fill_diagonal_(torch.inf).min() > 50
    assert sample.images.float().std() > 5


def test_cameras_are_where_the_settings_say() -> None:
    settings = small(
        views=5, ring_radius=(3000, 3500), camera_height=(1500, 1700), field_of_view=(40, 50)
    )
    for seed in range(3):
        take = draw_take(settings, 0, np.random.default_rng(seed))
        away = np.linalg.norm(take.rig.centres[:, :2] - take.joints[0, :2], axis=-1)
        assert ((away >= 2999) & (away <= 3501)).all()
        assert ((take.rig.centres[:, 2] >= 1500) & (take.rig.centres[:, 2] <= 1700)).all()
        half = np.rad2deg(np.arctan(500 / take.rig.cameras.K[:, 0, 0].numpy()))
        assert ((half >= 19.9) & (half <= 25.1)).all()
        np.testing.assert_allclose(
            take.rig.R @ take.rig.R.swapaxes(-1, -2), np.broadcast_to(np.eye(3), (5, 3, 3)),
            atol=1e-12,
        )  # fmt: skip
        assert (np.linalg.det(take.rig.R) > 0).all()
        down = take.rig.R @ np.array([0, 0, -1.0])
        assert (down[:, 1] > 0.7).all()  # upright


def test_a_fixed_rig_stays_for_all_samples_and_seeds() -> None:
    settings = small(fixed_rig=True, rig_seed=3)
    centres = [
        Studio(settings, length=3, seed=seed)[index].cameras.centers
        for seed, index in ((0, 0), (0, 1), (9, 2))
    ]
    assert torch.allclose(centres[0], centres[1], atol=1)
    assert torch.allclose(centres[0], centres[2], atol=1)
    other = Studio(replace(settings, rig_seed=4), length=1)[0].cameras.centers
    assert not torch.allclose(centres[0], other, atol=1)
    moving = Studio(small(), length=2)
    assert not torch.allclose(moving[0].cameras.centers, moving[1].cameras.centers, atol=1)


def test_beyond_the_camera_s_image_there_is_nothing() -> None:
    settings = small(full_size=(300, 260), crop_margin=(2.0, 2.0), **CLEAN)
    sample = Studio(settings, length=1, seed=2)[0]
    width, height = SIZE
    beyond_somewhere = False
    for view in range(3):
        x0, y0, x1, y1 = sample.boxes[view].tolist()
        x = (torch.arange(width) + 0.5) * (x1 - x0) / width - 0.5 + x0
        y = (torch.arange(height) + 0.5) * (y1 - y0) / height - 0.5 + y0
        inside = ((y >= -0.5) & (y < 259.5))[:, None] & ((x >= -0.5) & (x < 299.5))
        dark = (sample.images[view] == 0).all(0)
        assert dark[~inside].all()
        assert dark[inside].float().mean() < 0.05
        beyond_somewhere |= bool((~inside).any())
    assert beyond_somewhere


def test_dropped_views_are_absent_and_two_stay() -> None:
    settings = small(views=5, drop_views=0.5, image_size=(24, 40), **BARE)
    studio = Studio(settings, length=40, seed=1)
    present = torch.stack([studio[index].views for index in range(40)])
    assert (present.sum(-1) >= 2).all()
    assert 0.4 < present.float().mean() < 0.7
    for index in range(4):
        sample = studio[index]
        gone = ~sample.views
        assert not sample.images[gone].any()
        assert not sample.visibility[gone].any()
        assert sample.keypoints_2d[gone].isnan().all()
        assert sample.keypoints_2d[sample.views].isfinite().all()
        everything = Studio(replace(settings, drop_views=0.0), length=40, seed=1)[index]
        assert everything.views.all()
        assert torch.equal(everything.keypoints_3d, sample.keypoints_3d)
    alone = Studio(small(views=1, drop_views=1.0, image_size=(24, 40)), length=1)[0]
    assert alone.views.all()


# --- settings ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"views": 0}, ValueError, "views must be 1 to 31, got 0"),
        ({"views": 32}, ValueError, "views must be 1 to 31, got 32"),
        ({"views": 2.0}, TypeError, "views must be a whole number"),
        ({"views": True}, TypeError, "views must be a whole number"),
        ({"image_size": (64,)}, ValueError, "image_size must be two whole numbers, got 1"),
        ({"image_size": 64}, TypeError, "image_size must be two whole numbers"),
        ({"image_size": (64, 8)}, ValueError, "image_size must be 16 to 8192"),
        ({"ring_radius": (5000, 3000)}, ValueError, "least and the greatest value"),
        ({"ring_radius": (100, 3000)}, ValueError, "ring_radius must be 1800 to 50000"),
        ({"camera_height": (0, 3000)}, ValueError, "camera_height must be more than 0"),
        ({"obstacles": (0.5, 2)}, TypeError, "obstacles must be two whole numbers"),
        ({"distractors": (-1, 2)}, ValueError, "distractors must be 0 to 50"),
        ({"subjects": 0}, ValueError, "subjects must be 1 or more, got 0"),
        ({"actions": ()}, ValueError, "actions must be different ones of"),
        ({"actions": "walking"}, TypeError, "actions must be a sequence"),
        ({"actions": ("flying",)}, ValueError, "actions must be different ones of"),
        ({"drop_views": 1.5}, ValueError, "drop_views must be 0 to 1, got 1.5"),
        ({"drop_views": float("nan")}, ValueError, "drop_views must be 0 to 1, got nan"),
        ({"distortion": "yes"}, TypeError, "distortion must be a number"),
        ({"fixed_rig": 1}, TypeError, "fixed_rig must be True or False"),
        ({"blur": (0, 3)}, ValueError, "blur must be 0 to 0.8"),
    ],
)
def test_a_wrong_setting_is_named(
    changes: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        StudioSettings(**changes)


def test_lists_do_for_pairs() -> None:
    from_file = StudioSettings(image_size=[64, 96], actions=["walking"])  # type: ignore[arg-type]
    assert from_file == StudioSettings(image_size=(64, 96), actions=("walking",))
    assert hash(from_file) == hash(StudioSettings(image_size=(64, 96), actions=("walking",)))


def test_presets_take_changes_and_know_their_names() -> None:
    assert StudioSettings.preset("default") == StudioSettings()
    assert StudioSettings.preset("occluded", views=7).views == 7
    assert StudioSettings.preset("occluded", views=7).obstacles[0] > 0
    with pytest.raises(ValueError, match="preset must be one of easy, default, occluded"):
        StudioSettings.preset("hard")  # type: ignore[arg-type]


def test_a_studio_checks_its_arguments() -> None:
    with pytest.raises(ValueError, match="length must be 1 or more"):
        Studio(length=0)
    with pytest.raises(ValueError, match="seed must be 0 or more"):
        Studio(length=1, seed=-1)
    with pytest.raises(TypeError, match="length must be a whole number"):
        Studio(length=2.5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="settings must be StudioSettings"):
        Studio({"views": 2}, length=1)  # type: ignore[arg-type]
    studio = Studio(length=2)
    assert len(studio) == 2
    for index in (2, -3):
        with pytest.raises(IndexError, match="2 samples"):
            studio[index]


def test_only_the_actions_asked_for_are_shown() -> None:
    studio = Studio(small(actions=("lying", "walking"), image_size=(24, 32)), length=12)
    assert {studio[index].action for index in range(12)} == {"lying", "walking"}


def test_a_contact_sheet_is_a_picture(tmp_path: Path) -> None:
    studio = Studio(small(image_size=(40, 56)), length=2)
    contact_sheet([studio[0], studio[1]], tmp_path / "sheet.png")
    image = (tmp_path / "sheet.png").read_bytes()
    assert image.startswith(b"\x89PNG")
    assert len(image) > 5000
    with pytest.raises(ValueError, match="at least one"):
        contact_sheet([], tmp_path / "none.png")


def test_mean_limbs_are_those_of_many_bodies() -> None:
    limbs, lengths = ordinary_limb_lengths()
    assert len(limbs) == 17
    rng = np.random.default_rng(0)
    straight = np.zeros((1, len(BONES), 3))
    joints = np.stack([turn(draw_dimensions(rng), straight, 0.0).joints[0] for _ in range(400)])
    first, second = np.array(limbs).T
    drawn = np.linalg.norm(joints[:, first] - joints[:, second], axis=-1).mean(0)
    np.testing.assert_allclose(lengths, drawn, rtol=0.02)


def test_mean_limbs_of_other_joints() -> None:
    limbs, lengths = ordinary_limb_lengths()
    known = {
        frozenset(HUMAN36M_JOINTS[j] for j in limb): n
        for limb, n in zip(limbs, lengths, strict=True)
    }
    few, own = ordinary_limb_lengths(("l_knee", "chin", "neck", "l_hip", "pelvis"))
    assert set(few) == {(4, 2), (4, 3), (3, 0)}
    assert own[few.index((4, 2))] == known[frozenset(("pelvis", "neck"))]
    with pytest.raises(ValueError, match="joint_names must have limbs, got l_knee, nose"):
        ordinary_limb_lengths(("l_knee", "nose"))
