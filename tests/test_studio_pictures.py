# SPDX-License-Identifier: Apache-2.0
"""What the studio draws: rays meet what is there, pictures show it, hidden joints are hidden."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from test_studio import CLEAN, JOINT, SIZE, bare_take, small, whole_body

from tritool.data import collate, undistorted
from tritool.data.synthetic import Studio, StudioSettings
from tritool.data.synthetic.body import rotations
from tritool.data.synthetic.eyes import Eyes
from tritool.data.synthetic.render import render
from tritool.data.synthetic.shapes import Blocks, boxes, cones, ellipsoids, joined, plain
from tritool.data.synthetic.studio import Take, draw_take, visible
from tritool.data.synthetic.trace import (
    NOTHING,
    Quadrics,
    first_depths,
    keep_faces,
    keep_solids,
    plane_forms,
)
from tritool.skeletons import HUMAN36M_JOINTS

# --- rays and pictures ---------------------------------------------------------------------------


def random_shapes(rng: np.random.Generator) -> tuple[Any, Any]:
    count = 12
    axes = rotations(rng.uniform(-3, 3, (2 * count, 3)))
    origin = rng.uniform(-500, 500, (2 * count, 3)) + np.array([0, 0, 900])
    texture = np.stack([plain(rng.random(3))] * count)
    solids = joined(
        [
            ellipsoids(origin[:count], axes[:count], rng.uniform(20, 300, (count, 3)), texture),
            cones(
                origin[count:], axes[count:], np.sort(rng.uniform(-400, 400, (count, 2))),
                rng.uniform(20, 200, (count, 2)), rng.uniform(0.5, 1, count), texture,
            ),
        ]
    )  # fmt: skip
    faces = boxes(
        Blocks(
            rng.uniform(-500, 500, (4, 3)) + np.array([0, 0, 900]), rng.uniform(20, 300, (4, 3)),
            rng.uniform(-3, 3, 4), texture[:4],
        )
    )  # fmt: skip
    return solids, faces


@pytest.mark.parametrize("seed", range(3))
def test_rays_meet_surfaces_first_where_a_search_along_them_does(seed: int) -> None:
    rng = np.random.default_rng(seed)
    solids, faces = random_shapes(rng)
    eyes, _ = whole_body(bare_take(seed=seed))
    rays = rng.uniform(-0.15, 0.15, (len(eyes.R), 40, 2))
    depth, on_faces = first_depths(eyes, solids, faces, rays)
    directions = np.einsum("cki,cjk->cji", eyes.R, np.concatenate([rays, np.ones((4, 40, 1))], -1))
    steps = np.linspace(150, 9000, 6000)
    found = 0
    for view in range(4):
        for ray in range(0, 40, 3):
            line = eyes.centres[view] + steps[:, None] * directions[view, ray]
            local = np.einsum("nij,snj->nsi", solids.axes, line[:, None] - solids.origin)
            A, B, C, D, E = solids.quadric.T[..., None]
            x, y, z = np.moveaxis(local, -1, 0)
            value = A * x * x + B * y * y + C * z * z + D * z + E
            within = (z >= solids.cut[:, :1]) & (z <= solids.cut[:, 1:])
            # Entries from outside to inside; the renderer takes the first one only.
            enters = (value[:, :-1] > 0) & (value[:, 1:] <= 0)
            for n in range(len(solids)):
                places = np.flatnonzero(enters[n])
                first = places[0] if len(places) else None
                got = depth[view, ray, n]
                if first is not None and within[n, first] and within[n, first + 1]:
                    assert steps[first] - 1e-6 <= got <= steps[first + 1] + 1e-6
                    found += 1
                elif np.isfinite(got):  # grazed between two steps, or at the cut
                    assert first is None or within[n, first] != within[n, first + 1]
    assert found > 30
    # Points on faces: in their planes and between their edges.
    view, ray, face = np.nonzero(np.isfinite(on_faces))
    assert len(view) > 10
    t = on_faces[view, ray, face][:, None]
    offset = eyes.centres[view] + t * directions[view, ray] - faces.origin[face]
    u, v = faces.u[face], faces.v[face]
    normal = np.cross(u, v)
    np.testing.assert_allclose(
        (offset * normal).sum(-1) / np.linalg.norm(normal, axis=-1), 0, atol=1e-6
    )
    assert (np.abs((offset * u).sum(-1)) <= (u * u).sum(-1) * (1 + 1e-9)).all()
    assert (np.abs((offset * v).sum(-1)) <= (v * v).sum(-1) * (1 + 1e-9)).all()
    assert ((directions[view, ray] * normal).sum(-1) < 0).all()  # from the front


@pytest.mark.parametrize("distortion", [0.0, 0.3])
def test_pictures_show_what_single_rays_meet(distortion: float) -> None:
    settings = small(distortion=distortion, obstacles=(2, 2), distractors=(1, 1))
    take = draw_take(settings, 0, np.random.default_rng(8))
    width, height = 150, 130
    cameras = take.rig.cameras.resize((width, height))
    eyes = Eyes.of(cameras, width, height)
    solids, faces = take.scene.solids, take.scene.faces
    keys = np.full(len(eyes.x), NOTHING)
    keep_solids(eyes, solids, Quadrics.of(eyes.R, eyes.centres, solids), keys)
    blocks = 3 * len(solids)
    keep_faces(eyes, faces, plane_forms(eyes.R, eyes.centres, faces), keys, blocks)
    keys = keys.reshape(3, -1)
    rows, columns = np.mgrid[:height, :width]
    pixels = np.broadcast_to(np.stack([columns, rows], -1).reshape(-1, 2), (3, width * height, 2))
    rays = eyes.rays(pixels.astype(np.float64))
    some = slice(None, None, 7)
    depths = np.concatenate(first_depths(eyes, solids, faces, rays[:, some]), -1)
    nearest, depth = depths.argmin(-1), depths.min(-1)
    got = keys[:, some]
    empty = got == NOTHING
    block = got & 0xFFFFFFFF
    shape = np.where(
        block < blocks, block % len(solids), len(solids) + (block - blocks) % len(faces)
    )
    at = (got >> 32).astype(np.int32).view(np.float32)
    # Rays of a distorted lens are interpolated.
    close = np.abs(at / depth - 1) < (1e-3 if distortion else 1e-4)
    same = np.where(empty, np.isinf(depth), (shape == nearest) & close)
    # All but pixels on an outline, by rounding.
    assert same.mean() > 0.997
    wanted = torch.from_numpy(rays).float().reshape(-1, 2)
    got_rays = torch.from_numpy(np.stack([eyes.x, eyes.y], -1))
    scale = float(cameras.K[:, 0, 0].max())
    assert (got_rays - wanted).abs().nan_to_num(0).max() * scale < 0.1  # pixels
    assert 0.1 < empty.mean() < 0.97


def paint(take: Take, joints: set[str], colour: tuple[float, float, float]) -> Take:
    """The flesh that belongs to these joints alone in one colour."""
    solids = take.scene.solids
    wanted = np.array([name in joints for name in HUMAN36M_JOINTS])
    chosen = (solids.own == wanted).all(-1)
    assert chosen.any()
    texture = solids.texture.copy()
    texture[chosen] = plain(np.array(colour), 0.0)
    scene = replace(take.scene, solids=replace(solids, texture=texture))
    return replace(take, scene=scene)


@pytest.mark.parametrize("side", ["r", "l"])
def test_the_left_hand_is_the_left_hand_in_pictures(side: str) -> None:
    other = {"r": "l", "l": "r"}[side]
    compared = 0
    for seed in range(4):
        take = paint(bare_take("arms out", seed), {f"{side}_wrist"}, (1.0, 0.0, 0.0))
        eyes, pixels = whole_body(take)
        red, green, blue = render(eyes, take.scene).reshape(3, 4, eyes.height, eyes.width)
        for view in range(4):
            y, x = np.nonzero((red[view] > 0) & (green[view] == 0) & (blue[view] == 0))
            if len(x) < 4:
                continue
            centre = np.array([x.mean(), y.mean()])
            mine = np.linalg.norm(centre - pixels[view, JOINT[f"{side}_wrist"]])
            theirs = np.linalg.norm(centre - pixels[view, JOINT[f"{other}_wrist"]])
            depth = eyes.R[view, 2] @ (take.joints[JOINT[f"{side}_wrist"]] - eyes.centres[view])
            assert mine * depth / float(eyes.cameras.K[view, 0, 0]) < 150  # mm
            apart = np.linalg.norm(
                pixels[view, JOINT[f"{side}_wrist"]] - pixels[view, JOINT[f"{other}_wrist"]]
            )
            if apart > 12:
                assert mine < theirs
                compared += 1
    assert compared > 6


def test_the_face_is_seen_from_the_front_only() -> None:
    seen = {True: 0, False: 0}
    for seed in range(6):
        take = paint(bare_take("standing", seed), {"nose"}, (1.0, 0.0, 0.0))
        eyes, _ = whole_body(take, 600, 500)
        red, green, _ = render(eyes, take.scene).reshape(3, 4, -1)
        shown = ((red > 0) & (green == 0)).any(-1)
        nose, neck = take.joints[JOINT["nose"]], take.joints[JOINT["neck"]]
        facing = (nose - neck)[:2] / np.linalg.norm((nose - neck)[:2])
        for view in range(4):
            towards = (eyes.centres[view] - nose)[:2]
            angle = facing @ towards / np.linalg.norm(towards)
            if abs(angle) > 0.75:
                assert shown[view] == (angle > 0)
                seen[bool(angle > 0)] += 1
    assert min(seen.values()) > 2


# --- visibility ----------------------------------------------------------------------------------


def seen_joints(take: Take) -> tuple[np.ndarray, np.ndarray, Eyes]:
    settings = small(views=4)
    eyes, pixels = whole_body(take)
    full = np.tile([-0.5, -0.5, *(np.array(settings.full_size) - 0.5)], (4, 1))
    inside = ((pixels >= -0.5) & (pixels < np.array([eyes.width, eyes.height]) - 0.5)).all(-1)
    return visible(take, eyes, pixels, full + 0.5, settings), inside, eyes


def test_nothing_but_its_own_flesh_around_it_a_joint_is_visible() -> None:
    for action in ("standing", "sitting", "lying"):
        take = bare_take(action, 1)
        for joint in range(17):
            solids = take.scene.solids
            kept = [
                type(solids)(**{k: v[[n]] for k, v in vars(solids).items()})
                for n in range(len(solids))
                if solids.own[n, joint]
            ]
            faces = boxes(Blocks.none())
            alone = replace(take, scene=replace(take.scene, solids=joined(kept), faces=faces))
            seen, inside, _ = seen_joints(alone)
            assert (seen[:, joint] == inside[:, joint]).all()


@pytest.mark.parametrize("kind", ["ball", "panel"])
def test_what_is_before_a_joint_hides_it_and_what_is_behind_does_not(kind: str) -> None:
    take = bare_take("arms out", 3)
    before, _, eyes = seen_joints(take)
    view, joint = np.argwhere(before)[5]
    point, centre = take.joints[joint], eyes.centres[view]
    back = plain(np.full(3, 0.5))[None]
    for share, hides in ((0.6, True), (1.25, False)):
        spot = (centre + share * (point - centre))[None]
        solids, faces = take.scene.solids, take.scene.faces
        if kind == "ball":
            ball = ellipsoids(spot, np.eye(3)[None], np.full((1, 3), 60.0), back)
            solids = joined([solids, ball])
        else:
            yaw = np.arctan2(*(point - centre)[1::-1])
            panel = boxes(Blocks(spot, np.array([[8.0, 80.0, 80.0]]), np.array([yaw]), back))
            faces = joined([faces, panel])
        changed = replace(take, scene=replace(take.scene, solids=solids, faces=faces))
        after, _, _ = seen_joints(changed)
        assert after[view, joint] != hides
        assert (after <= before).all()  # what is added shows nothing new


def test_a_body_hides_its_far_side() -> None:
    hidden, counted = 0, 0
    for seed in range(8):
        take = bare_take("standing", seed)
        seen, inside, eyes = seen_joints(take)
        right = take.joints[JOINT["r_shoulder"]] - take.joints[JOINT["l_shoulder"]]
        for view in range(4):
            towards = eyes.centres[view] - take.joints[0]
            angle = (
                right[:2] @ towards[:2] / np.linalg.norm(right[:2]) / np.linalg.norm(towards[:2])
            )
            if abs(angle) > 0.85 and inside[view].all():
                near, far = ("r", "l") if angle > 0 else ("l", "r")
                assert seen[view, JOINT[f"{near}_shoulder"]]
                counted += 1
                hidden += not seen[view, JOINT[f"{far}_shoulder"]]
    assert counted > 3
    assert hidden == counted


def test_harder_presets_hide_more() -> None:
    share = {}
    for name in ("easy", "default", "occluded"):
        settings = StudioSettings.preset(name, views=3, image_size=(24, 32))  # type: ignore[arg-type]
        studio = Studio(settings, length=30, seed=1)
        share[name] = np.mean([studio[i].visibility.float().mean().item() for i in range(30)])
    assert share["easy"] > share["default"] > share["occluded"] + 0.05
    assert share["easy"] > 0.8
    assert 0.3 < share["occluded"] < 0.75


# --- lenses --------------------------------------------------------------------------------------


def test_undistorted_images_are_those_of_a_pinhole() -> None:
    settings = small(
        distortion=0.3, image_size=(150, 170), full_size=(400, 420), field_of_view=(60, 60), **CLEAN
    )
    sample = Studio(settings, length=3, seed=1)[2]
    flat = undistorted(sample)
    assert flat.cameras.lens == "pinhole"
    assert torch.equal(flat.cameras.K, sample.cameras.K)
    projected = flat.cameras.project(flat.keypoints_3d).movedim(0, 1)
    assert (projected - flat.keypoints_2d).abs().max() < 0.05
    assert collate([flat]).images.shape == (1, 3, 3, 170, 150)
    # The same moment drawn by pinhole cameras.
    take = draw_take(settings, 1, np.random.default_rng([1, 1, 2]))
    drawn = render(Eyes.of(flat.cameras.to(torch.float64), 150, 170), take.scene)
    wanted = torch.from_numpy(drawn * 255).clamp(0, 255).view(3, 3, 170, 150).swapaxes(0, 1)
    moved = (sample.keypoints_2d - flat.keypoints_2d).norm(dim=-1).amax(-1)
    compared = 0
    for view in range(3):
        lit = (flat.images[view] > 0).any(0)
        difference = (flat.images[view].float() - wanted[view]).abs().mean(0)[lit].mean()
        before = (sample.images[view].float() - wanted[view]).abs().mean(0)[lit].mean()
        if moved[view] > 3:
            assert difference < 0.5 * before
            compared += 1
    assert compared >= 1


def test_undistorted_leaves_pinholes_alone() -> None:
    sample = Studio(small(), length=1)[0]
    assert undistorted(sample) is sample


def test_undistorted_marks_what_leaves_the_crop() -> None:
    sample = Studio(small(distortion=0.3, crop_margin=(0.0, 0.0)), length=1, seed=4)[0]
    flat = undistorted(sample)
    inside = ((flat.keypoints_2d >= -0.5) & (flat.keypoints_2d < torch.tensor(SIZE) - 0.5)).all(-1)
    assert not (flat.visibility & ~inside).any()
    assert torch.equal(flat.visibility, sample.visibility & inside)


def test_marked_sides_tell_left_from_right_by_colour() -> None:
    settings = replace(small(**CLEAN), obstacles=(0, 0), distractors=(0, 0))
    marked = replace(settings, marked_sides=True)
    studio, plainly = (Studio(s, length=12, seed=3) for s in (marked, settings))
    blue: dict[str, list[float]] = {"l": [], "r": []}
    for sample in studio:
        for name, values in blue.items():
            knee = JOINT[f"{name}_knee"]
            for image, at, seen in zip(
                sample.images, sample.keypoints_2d[:, knee], sample.visibility[:, knee], strict=True
            ):
                if seen:
                    x, y = at.round().long().tolist()
                    red, _, third = image[:, y, x].int().tolist()
                    values.append(third - red)
    assert len(blue["l"]) > 10
    assert len(blue["r"]) > 10
    assert np.mean(np.array(blue["l"]) > 0) > 0.9
    assert np.mean(np.array(blue["r"]) < 0) > 0.9
    # The same people do the same.
    assert torch.equal(studio[0].keypoints_3d, plainly[0].keypoints_3d)
