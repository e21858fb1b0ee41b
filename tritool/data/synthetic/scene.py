# SPDX-License-Identifier: Apache-2.0
"""What stands around the subject: a room, its light, furniture, things in the way."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from tritool.data.synthetic.figure import colour
from tritool.data.synthetic.shapes import (
    Array,
    Blocks,
    Faces,
    Solids,
    cones,
    ellipsoids,
    joined,
    patterned,
    plain,
)

__all__ = ["Room", "Scene", "Thing", "draw_clutter", "draw_obstacle", "draw_room", "seat"]

# How far what stands in the way keeps from cameras and from people's joints, mm.
_CAMERA_CLEARANCE = 350.0
_PERSON_CLEARANCE = 150.0
_TRIES = 12


@dataclass(frozen=True, eq=False)
class Room:
    """Floor, walls, ceiling and light.

    Attributes:
        half: [3], half width, half depth, height of the room, mm; the floor is z = 0.
        textures: [6, TEXTURE]: the walls at +x, -x, +y, -y, the ceiling, the floor.
        light: [3], unit vector towards the light.
        ambient: How bright is what the light does not reach.
        diffuse: How much the light adds.
    """

    half: Array
    textures: Array
    light: Array
    ambient: float
    diffuse: float


@dataclass(frozen=True, eq=False)
class Scene:
    """All there is to see at one moment.

    Attributes:
        room: Floor, walls and light.
        solids: The subject, other people, round things.
        faces: Flat things.
        shadows: [P, 3], people's soft shadows on the floor: x, y, radius, mm.
    """

    room: Room
    solids: Solids
    faces: Faces
    shadows: Array


@dataclass(frozen=True, eq=False)
class Thing:
    """Something that stands on the floor: around its own origin at first, then in its place.

    Attributes:
        blocks: Its boxes.
        radius: What it needs of the floor, mm.
        round: Its round parts, or None.
    """

    blocks: Blocks
    radius: float
    round: Solids | None = None

    def at(self, spot: Array, yaw: float) -> Thing:
        """The same turned about the vertical and moved to x, y [2], mm."""
        cos, sin = np.cos(yaw), np.sin(yaw)
        turned = np.array([[cos, sin, 0], [-sin, cos, 0], [0, 0, 1]])
        shift = np.append(spot, 0.0)
        blocks = replace(
            self.blocks, centre=self.blocks.centre @ turned + shift, yaw=self.blocks.yaw + yaw
        )
        if self.round is None:
            return Thing(blocks, self.radius)
        moved = replace(
            self.round, origin=self.round.origin @ turned + shift, axes=self.round.axes @ turned
        )
        return Thing(blocks, self.radius, moved)


def draw_room(rng: np.random.Generator, cameras: Array) -> Room:
    """Draws a room around cameras at [C, 3], mm, and around everything near the origin."""
    reach = np.maximum(np.abs(cameras).max(0), [3500.0, 3500.0, 2400.0])
    half = reach + rng.uniform(300, 3000, 3) * [1, 1, 0.6]
    paint_of_all = colour(rng, (0.0, 0.35), (0.3, 0.95))

    def wall() -> Array:
        paint = np.clip(paint_of_all + rng.normal(0, 0.05, 3), 0.05, 1)
        if rng.random() < 0.5:
            other = np.clip(paint * rng.uniform(0.6, 1.2) + rng.normal(0, 0.06, 3), 0, 1)
            result = patterned(rng, paint, other, float(rng.uniform(250, 1500)))
        else:
            result = plain(paint)
        result[13], result[14] = rng.uniform(0.01, 0.1), 10 ** rng.uniform(-2.3, -1.3)
        return result

    floor = colour(rng, (0.0, 0.5), (0.25, 0.9))
    other = np.clip(floor * rng.uniform(0.65, 0.95), 0, 1)
    ground = patterned(rng, floor, other, float(rng.uniform(350, 1200)))
    ground[13], ground[14] = rng.uniform(0.01, 0.12), 10 ** rng.uniform(-2.2, -1.2)
    textures = np.stack([wall() for _ in range(4)] + [plain(np.full(3, 0.85)), ground])
    angle, height = rng.uniform(-np.pi, np.pi), rng.uniform(0.5, 1.4)
    light = np.array(
        [np.cos(angle) * np.cos(height), np.sin(angle) * np.cos(height), np.sin(height)]
    )
    ambient = rng.uniform(0.4, 0.65)
    return Room(half, textures, light, ambient, rng.uniform(1.0, 1.25) - ambient)


def _material(rng: np.random.Generator) -> Array:
    if rng.random() < 0.4:
        return patterned(rng, colour(rng), colour(rng), float(rng.uniform(60, 300)))
    return plain(colour(rng, (0.0, 0.7)), float(rng.uniform(0.02, 0.1)), 0.04)


def _legs(x: float, y: float, height: float, thick: float) -> tuple[list[Array], list[Array]]:
    centres = [np.array([i * x, j * y, height / 2]) for i in (-1, 1) for j in (-1, 1)]
    return centres, [np.array([thick, thick, height / 2])] * 4


def _table(rng: np.random.Generator) -> Thing:
    x, y, height = rng.uniform(300, 650), rng.uniform(220, 400), rng.uniform(420, 820)
    centres, halves = _legs(x - 40, y - 40, height, 24.0)
    centres.append(np.array([0, 0, height]))
    halves.append(np.array([x, y, 22.0]))
    return _of_boxes(rng, centres, halves)


def _chair(rng: np.random.Generator) -> Thing:
    half, height = rng.uniform(180, 240), rng.uniform(400, 500)
    centres, halves = _legs(half - 20, half - 20, height, 18.0)
    back = rng.uniform(220, 300)
    centres += [np.array([0, 0, height]), np.array([0, half - 15, height + back])]
    halves += [np.array([half, half, 20.0]), np.array([half, 15.0, back])]
    return _of_boxes(rng, centres, halves)


def _crate(rng: np.random.Generator) -> Thing:
    half = np.array([rng.uniform(120, 380), rng.uniform(120, 320), rng.uniform(120, 560)])
    return _of_boxes(rng, [np.array([0, 0, half[2]])], [half])


def _panel(rng: np.random.Generator) -> Thing:
    half = np.array([rng.uniform(150, 420), 12.0, rng.uniform(350, 850)])
    raised = float(rng.uniform(0, 300)) if rng.random() < 0.5 else 0.0
    centres, halves = [np.array([0, 0, raised + half[2]])], [half]
    if raised:  # on a foot
        centres.append(np.array([0, 0, raised / 2]))
        halves.append(np.array([30.0, 30.0, raised / 2]))
    return _of_boxes(rng, centres, halves)


def _of_boxes(rng: np.random.Generator, centres: list[Array], halves: list[Array]) -> Thing:
    centre, half = np.stack(centres), np.stack(halves)
    radius = float(np.linalg.norm(np.abs(centre[:, :2]) + half[:, :2], axis=-1).max())
    paint = np.repeat(_material(rng)[None], len(centre), 0)
    return Thing(Blocks(centre, half, np.zeros(len(centre)), paint), radius)


def _pole(rng: np.random.Generator) -> Thing:
    radius, height = float(rng.uniform(20, 110)), float(rng.uniform(1300, 2600))
    paint = _material(rng)[None]
    shaft = cones(
        np.zeros((1, 3)), np.eye(3)[None], np.array([[0, height]]),
        np.array([[radius, radius]]), np.ones(1), paint,
    )  # fmt: skip
    cap = ellipsoids(
        np.array([[0, 0, height]]), np.eye(3)[None], np.array([[radius, radius, 0.5 * radius]]),
        paint,
    )  # fmt: skip
    return Thing(Blocks.none(), radius=radius, round=joined([shaft, cap]))


def _plant(rng: np.random.Generator) -> Thing:
    height = float(rng.uniform(250, 450))
    pot = cones(
        np.zeros((1, 3)), np.eye(3)[None], np.array([[0, height]]), np.array([[110.0, 160.0]]),
        np.ones(1), _material(rng)[None],
    )  # fmt: skip
    count = int(rng.integers(4, 8))
    green = np.stack(
        [
            plain(np.array([0.15, 0.42, 0.14]) * rng.uniform(0.6, 1.4), 0.3, 0.06)
            for _ in range(count)
        ]
    )
    centre = np.stack(
        [rng.normal(0, 110, count), rng.normal(0, 110, count),
         height + rng.uniform(20, 800, count)], 1,
    )  # fmt: skip
    radii = rng.uniform(70, 230, (count, 3))
    leaves = ellipsoids(centre, np.tile(np.eye(3), (count, 1, 1)), radii, green)
    return Thing(Blocks.none(), radius=320.0, round=joined([pot, leaves]))


_THINGS = (_table, _chair, _crate, _panel, _pole, _plant)


def draw_obstacle(
    rng: np.random.Generator, subject: Array, cameras: Array, people: Array
) -> Thing | None:
    """Puts something between the subject and one of the cameras, close to the subject.

    Args:
        rng: Where chance comes from.
        subject: [J, 3], the subject's joints, mm.
        cameras: [C, 3], centres, mm.
        people: [P, J, 3], joints of all people, which nothing may pass through.

    Returns:
        The thing in its place; None where no free place was found.
    """
    centre = subject[:, :2].mean(0)
    for _ in range(_TRIES):
        thing = _THINGS[int(rng.integers(len(_THINGS)))](rng)
        towards = cameras[int(rng.integers(len(cameras))), :2] - centre
        distance = float(np.linalg.norm(towards))
        towards = towards / max(distance, 1.0)
        across = np.array([-towards[1], towards[0]])
        # As close to the subject as its limbs on that side allow, and a little further.
        reach = float(((subject[:, :2] - centre) @ towards).max())
        ahead = reach + thing.radius + rng.uniform(150, 900)
        spot = centre + ahead * towards + rng.normal(0, 220) * across
        yaw = float(np.arctan2(towards[1], towards[0]) + np.pi / 2 + rng.normal(0, 0.4))
        if _free(spot, thing.radius, cameras, people):
            return thing.at(spot, yaw)
    return None


def _free(spot: Array, radius: float, cameras: Array, people: Array) -> bool:
    from_cameras, from_people = cameras[:, :2] - spot, people[..., :2] - spot
    return bool(
        (from_cameras**2).sum(-1).min() > (radius + _CAMERA_CLEARANCE) ** 2
        and (from_people**2).sum(-1).min() > (radius + _PERSON_CLEARANCE) ** 2
    )


def draw_clutter(
    rng: np.random.Generator, room: Room, cameras: Array, people: Array
) -> Thing | None:
    """Puts something at a wall of the room: furniture, or a picture on the wall.

    Arguments and result as of `draw_obstacle`.
    """
    for _ in range(_TRIES):
        wall, along = int(rng.integers(4)), rng.uniform(-0.85, 0.85)
        axis, sign = wall // 2, 1 - 2 * (wall % 2)
        spot = np.zeros(2)
        if rng.random() < 0.4:  # a picture
            half = np.array([rng.uniform(200, 700), 10.0, rng.uniform(200, 600)])
            spot[axis] = sign * (room.half[axis] - 12)
            spot[1 - axis] = along * room.half[1 - axis]
            centre = np.array([[*spot, rng.uniform(900, 2100)]])
            paint = patterned(rng, colour(rng), colour(rng), float(rng.uniform(120, 700)))
            yaw = np.array([np.pi / 2 if axis == 0 else 0.0])
            return Thing(Blocks(centre, half[None], yaw, paint[None]), 0.0)
        thing = _THINGS[int(rng.integers(len(_THINGS)))](rng)
        spot[axis] = sign * (room.half[axis] - thing.radius - rng.uniform(0, 400))
        spot[1 - axis] = along * room.half[1 - axis]
        if _free(spot, thing.radius, cameras, people):
            return thing.at(spot, rng.uniform(-np.pi, np.pi))
    return None


def seat(rng: np.random.Generator, pelvis: Array, forward: Array, height: float) -> Thing:
    """What the subject sits on: a stool, or a chair with a back.

    Args:
        rng: Where chance comes from.
        pelvis: [3], mm.
        forward: [3], unit vector, where the sitting person looks; its z is ignored.
        height: Of the seat, mm.
    """
    yaw = float(np.arctan2(-forward[0], forward[1]))
    half = float(rng.uniform(160, 210))
    solid = rng.random() < 0.4
    if solid:
        centres, halves = [np.array([0, 0, height / 2])], [np.array([half, half, height / 2])]
    else:
        centres, halves = _legs(half - 20, half - 20, height, 18.0)
        centres.append(np.array([0, 0, height - 18]))
        halves.append(np.array([half, half, 18.0]))
    if rng.random() < 0.35:
        back = rng.uniform(180, 270)
        centres.append(np.array([0, -half - 60, height + back]))
        halves.append(np.array([half, 14.0, back]))
    return _of_boxes(rng, centres, halves).at(pelvis[:2], yaw)
