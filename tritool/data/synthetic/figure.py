# SPDX-License-Identifier: Apache-2.0
"""A subject: a body with flesh, hair and clothes, made of quadrics that hang on the bones.

Clothes are the same on both sides, so that left and right are told by the front and the back:
the face, the hair, the feet, the way the knees and elbows bend, a print on the chest. Only suits
with marked sides, which are asked for, tell them by colour.
"""

from __future__ import annotations

import colorsys
from dataclasses import dataclass, replace

import numpy as np

from tritool.data.synthetic.body import BONES, Dimensions, Pose, draw_dimensions
from tritool.data.synthetic.shapes import (
    Array,
    Flags,
    Solids,
    cones,
    ellipsoids,
    joined,
    patterned,
    plain,
)
from tritool.skeletons import HUMAN36M_JOINTS

__all__ = ["Subject", "draw_subject", "lowest", "posed"]

_SKIN = np.array(
    [[0.96, 0.80, 0.69], [0.87, 0.67, 0.53], [0.72, 0.51, 0.37], [0.50, 0.34, 0.24],
     [0.33, 0.22, 0.16]]
)  # fmt: skip
_HAIR = np.array(
    [[0.08, 0.06, 0.05], [0.22, 0.14, 0.08], [0.42, 0.27, 0.14], [0.74, 0.58, 0.33],
     [0.55, 0.54, 0.52], [0.45, 0.20, 0.10]]
)  # fmt: skip

# Of suits with marked sides.
_SIDE_MARKS = {"l": np.array([0.15, 0.55, 1.0]), "r": np.array([1.0, 0.5, 0.1])}


@dataclass(frozen=True, eq=False)
class Subject:
    """One person of the studio.

    Attributes:
        body: Lengths.
        flesh: N quadrics, each in the axes of its bone.
        bones: [N], which bone.
        tolerance: [17], mm: what lies less than this before a joint does not hide it.
    """

    body: Dimensions
    flesh: Solids
    bones: np.typing.NDArray[np.int64]
    tolerance: Array


@dataclass(frozen=True, eq=False)
class _Clothes:
    skin: Array
    hair: Array
    shirt: Array
    trousers: Array
    shoes: Array
    long_sleeves: bool
    long_trousers: bool
    long_hair: bool
    bald: bool


class _Flesh:
    """Quadrics in the making."""

    def __init__(self) -> None:
        self.parts: list[Solids] = []
        self.bones: list[int] = []

    def ball(
        self,
        bone: str,
        centre: tuple[float, float, float],
        radii: tuple[float, float, float] | float,
        texture: Array,
        own: str = "",
        tilt: float = 0.0,
    ) -> None:
        """An ellipsoid, tilted forward about x by degrees."""
        size = (radii,) * 3 if isinstance(radii, float) else radii
        cos, sin = np.cos(np.deg2rad(tilt)), np.sin(np.deg2rad(tilt))
        axes = np.array([[[1, 0, 0], [0, cos, sin], [0, -sin, cos]]])
        self.parts.append(
            ellipsoids(np.array([centre]), axes, np.array([size]), texture[None], _owned(own))
        )
        self.bones.append(BONES.index(bone))

    def cone(
        self,
        bone: str,
        span: tuple[float, float],
        radii: tuple[float, float],
        texture: Array,
        own: str = "",
        flatness: float = 1.0,
        shift: tuple[float, float] = (0.0, 0.0),
    ) -> None:
        """A cone along the bone, between two heights of its own z, shifted in x and y."""
        self.parts.append(
            cones(
                np.array([[*shift, 0.0]]),
                np.eye(3)[None],
                np.array([span]),
                np.array([radii]),
                np.array([flatness]),
                texture[None],
                _owned(own),
            )
        )
        self.bones.append(BONES.index(bone))


def _owned(joints: str) -> Flags:
    names = joints.split()
    return np.array([[joint in names for joint in HUMAN36M_JOINTS]])


def draw_subject(rng: np.random.Generator, *, marked: bool = False) -> Subject:
    """Draws a body and clothes.

    Args:
        rng: What it is drawn from; the same bodies with and without marks.
        marked: Each arm and leg wears the colour of its side.
    """
    body = draw_dimensions(rng)
    return _dressed(body, _draw_clothes(rng), marked)


def colour(
    rng: np.random.Generator,
    saturation: tuple[float, float] = (0.1, 0.85),
    value: tuple[float, float] = (0.12, 0.95),
) -> Array:
    """[3], a random red, green, blue, 0 to 1."""
    return np.array(
        colorsys.hsv_to_rgb(rng.random(), rng.uniform(*saturation), rng.uniform(*value))
    )


def _draw_clothes(rng: np.random.Generator) -> _Clothes:
    def cloth(chance: float, period: float) -> Array:
        first = colour(rng)
        if rng.random() < chance:
            return patterned(rng, first, colour(rng), period)
        return plain(first)

    tone = rng.uniform(0, len(_SKIN) - 1)
    low = min(int(tone), len(_SKIN) - 2)
    skin = _SKIN[low] + (tone - low) * (_SKIN[low + 1] - _SKIN[low])
    return _Clothes(
        skin=plain(skin, 0.03),
        hair=plain(_HAIR[int(rng.integers(len(_HAIR)))] * rng.uniform(0.8, 1.2), 0.25, 0.2),
        shirt=cloth(0.55, 90),
        trousers=cloth(0.2, 70),
        shoes=plain(colour(rng, (0.0, 0.5)) * 0.8),
        long_sleeves=bool(rng.random() < 0.5),
        long_trousers=bool(rng.random() < 0.7),
        long_hair=bool(rng.random() < 0.4),
        bald=bool(rng.random() < 0.1),
    )


def _marked(clothes: _Clothes, side: str) -> _Clothes:
    """The clothes of one side: long sleeves and trousers in its colour, as bright as they were."""
    bright = 0.75 + 0.25 * float(clothes.shirt[0:3].mean())
    suit = replace_colours(clothes.shirt, _SIDE_MARKS[side] * bright)
    return replace(clothes, shirt=suit, trousers=suit, long_sleeves=True, long_trousers=True)


def _dressed(body: Dimensions, clothes: _Clothes, marked: bool) -> Subject:
    size = body.stature / 1750  # lengths below are those of a person of 1750 mm
    thick = size * body.girth
    flesh = _Flesh()
    _add_trunk(flesh, body, clothes, size, thick)
    _add_head(flesh, body, clothes, size)
    for side in "rl":
        worn = _marked(clothes, side) if marked else clothes
        _add_arm(flesh, side, body, worn, thick)
        _add_leg(flesh, side, body, worn, size, thick)
    tolerance = dict.fromkeys(HUMAN36M_JOINTS, 60 * thick) | {
        "pelvis": 130 * thick, "spine": 120 * thick, "neck": 110 * thick,
        "nose": 30.0, "head_top": 40.0,
    }  # fmt: skip
    for side in "rl":
        tolerance |= {f"{side}_hip": 115 * thick, f"{side}_shoulder": 75 * thick}
    return Subject(
        body,
        joined(flesh.parts),
        np.array(flesh.bones),
        np.array([tolerance[joint] for joint in HUMAN36M_JOINTS]),
    )


def _add_trunk(
    flesh: _Flesh, body: Dimensions, clothes: _Clothes, size: float, thick: float
) -> None:
    wide = body.shoulder
    trunk = "pelvis spine neck"
    flesh.ball(
        "pelvis", (0, -8 * size, -8 * size), (body.hip + 60 * thick, 112 * thick, 112 * size),
        clothes.trousers, "pelvis spine r_hip l_hip",
    )  # fmt: skip
    flesh.cone(
        "abdomen", (-35 * size, body.loin + 20), (158 * thick, 140 * thick), clothes.shirt,
        trunk, 0.72,
    )  # fmt: skip
    # Where the trunk bends, a ball keeps it closed.
    flesh.ball(
        "chest", (0, 0, 0), (140 * thick, 101 * thick, 90 * size), clothes.shirt, trunk
    )  # fmt: skip
    top = body.back * 0.72
    flesh.cone(
        "chest", (-10, top), (140 * thick, 0.55 * wide + 72 * thick), clothes.shirt, trunk, 0.7
    )
    flesh.ball(
        "chest", (0, -4 * size, top), (0.62 * wide + 72 * thick, 112 * thick, 84 * size),
        clothes.shirt, trunk,
    )  # fmt: skip
    # The print: shows the front at a distance.
    darker = replace_colours(clothes.shirt, np.array([0.92, 0.9, 0.85]))
    if clothes.shirt[0:3].mean() > 0.55:
        darker = replace_colours(clothes.shirt, np.array([0.15, 0.15, 0.2]))
    flesh.ball(
        "chest", (0, 82 * thick, 0.55 * body.back), (66 * size, 48 * thick, 52 * size), darker,
        trunk,
    )  # fmt: skip


def replace_colours(texture: Array, colour: Array) -> Array:
    """[TEXTURE], the same grain in one colour."""
    return plain(colour, float(texture[13]), float(texture[14]))


def _add_head(flesh: _Flesh, body: Dimensions, clothes: _Clothes, size: float) -> None:
    skin, hair = clothes.skin, clothes.hair
    forward, up = body.nose
    centre = body.head - 118 * size  # of the skull
    face = forward - 17 * size  # y of the face
    flesh.cone(
        "head", (-45 * size, 0.5 * body.head), (63 * size, 54 * size), skin, "neck", 1.0,
        (0.0, 4 * size),
    )  # fmt: skip
    skull = face - 96 * size
    flesh.ball("head", (0, skull, centre), (76 * size, 98 * size, 116 * size), skin, "head_top")
    flesh.ball(
        "head", (0, skull + 46 * size, centre - 66 * size), (52 * size, 50 * size, 50 * size), skin
    )
    flesh.ball(
        "head", (0, forward - 17 * size, up + 4 * size), (13 * size, 20 * size, 24 * size),
        replace_colours(skin, skin[0:3] * 0.88), "nose",
    )  # fmt: skip
    dark = plain(np.array([0.07, 0.05, 0.06]), 0.0)
    lips = replace_colours(skin, skin[0:3] * [0.85, 0.5, 0.5])
    eye = centre + 12 * size
    for sign in (1, -1):
        flesh.ball(
            "head", (sign * 30 * size, face - 13 * size, eye), (15 * size, 12 * size, 11 * size),
            dark,
        )  # fmt: skip
        flesh.ball(
            "head", (sign * 76 * size, skull - 4 * size, centre - 12 * size),
            (11 * size, 20 * size, 30 * size), skin,
        )  # fmt: skip
    flesh.ball(
        "head", (0, face - 11 * size, up - 40 * size), (26 * size, 14 * size, 8 * size), lips
    )
    if clothes.bald:
        return
    flesh.ball(
        "head", (0, skull - 17 * size, centre + 17 * size), (82 * size, 96 * size, 108 * size),
        hair, "head_top",
    )  # fmt: skip
    if clothes.long_hair:
        flesh.ball(
            "head", (0, skull - 52 * size, centre - 75 * size), (76 * size, 46 * size, 130 * size),
            hair,
        )  # fmt: skip


def _add_arm(flesh: _Flesh, side: str, body: Dimensions, clothes: _Clothes, thick: float) -> None:
    arm = clothes.shirt if clothes.long_sleeves else clothes.skin
    extra = 1.12 if clothes.long_sleeves else 1.0
    shoulder, elbow, wrist = (f"{side}_{joint}" for joint in ("shoulder", "elbow", "wrist"))
    upper, fore, hand = (f"{side}_{bone}" for bone in ("upper_arm", "forearm", "hand"))
    flesh.ball(upper, (0, 0, -4), 56 * thick, clothes.shirt, shoulder)
    flesh.cone(
        upper, (-body.upper_arm, 0), (39 * thick * extra, 51 * thick * extra), arm,
        f"{shoulder} {elbow}",
    )  # fmt: skip
    if not clothes.long_sleeves:
        flesh.cone(
            upper, (-0.55 * body.upper_arm, 0), (54 * thick, 57 * thick), clothes.shirt,
            f"{shoulder} {elbow}",
        )  # fmt: skip
    flesh.ball(upper, (0, 0, -body.upper_arm), 40 * thick * extra, arm, elbow)
    flesh.cone(
        fore, (-body.forearm, 0), (28 * thick * extra, 41 * thick * extra), arm,
        f"{elbow} {wrist}",
    )  # fmt: skip
    flesh.ball(fore, (0, 0, -body.forearm), 28 * thick * extra, clothes.skin, wrist)
    flesh.ball(
        hand, (0, 4, -0.47 * body.hand), (22 * thick, 42 * thick, 0.53 * body.hand), clothes.skin,
        wrist,
    )  # fmt: skip
    flesh.ball(
        hand, (0, 42 * thick, -0.34 * body.hand), (14 * thick, 16 * thick, 0.26 * body.hand),
        clothes.skin, wrist, 25,
    )  # fmt: skip


def _add_leg(
    flesh: _Flesh, side: str, body: Dimensions, clothes: _Clothes, size: float, thick: float
) -> None:
    leg = clothes.trousers if clothes.long_trousers else clothes.skin
    extra = 1.08 if clothes.long_trousers else 1.0
    hip, knee, ankle = (f"{side}_{joint}" for joint in ("hip", "knee", "ankle"))
    thigh, shank, foot = (f"{side}_{bone}" for bone in ("thigh", "shank", "foot"))
    flesh.ball(thigh, (0, 0, -5), 86 * thick, clothes.trousers, hip)
    flesh.cone(
        thigh, (-body.thigh, 0), (54 * thick * extra, 82 * thick * extra), leg, f"{hip} {knee}"
    )
    if not clothes.long_trousers:
        flesh.cone(
            thigh, (-0.72 * body.thigh, 0), (76 * thick, 91 * thick), clothes.trousers,
            f"{hip} {knee}",
        )  # fmt: skip
    flesh.ball(thigh, (0, 0, -body.thigh), 56 * thick * extra, leg, knee)
    flesh.cone(
        shank, (-body.shank, 0), (37 * thick * extra, 54 * thick * extra), leg, f"{knee} {ankle}"
    )
    flesh.ball(
        shank, (0, -16 * thick, -0.29 * body.shank),
        (50 * thick * extra, 52 * thick * extra, 0.27 * body.shank), leg, f"{knee} {ankle}",
    )  # fmt: skip
    flesh.ball(shank, (0, 0, -body.shank), 40 * thick, clothes.shoes, ankle)
    flesh.ball(
        foot, (0, 0.24 * body.foot, -0.5 * body.ankle),
        (44 * size, 0.53 * body.foot, 0.5 * body.ankle), clothes.shoes, ankle,
    )  # fmt: skip


def posed(subject: Subject, pose: Pose, offset: Array | None = None) -> Solids:
    """The flesh of one pose (T = 1) in the world, shifted by [3], mm."""
    turns, origins = pose.turns[0, subject.bones], pose.origins[0, subject.bones]
    origin = origins + np.einsum("nij,nj->ni", turns, subject.flesh.origin)
    if offset is not None:
        origin = origin + offset
    return replace(
        subject.flesh,
        origin=origin,
        axes=np.einsum("nik,njk->nij", subject.flesh.axes, turns),
    )


def lowest(solids: Solids, which: Flags | None = None) -> float:
    """How high the lowest point is of the closed quadrics, mm; open ends lie within those."""
    closed = np.isinf(solids.cut[:, 0])
    if which is not None:
        closed &= which
    upward = solids.axes[closed, :, 2] * solids.high[closed]
    return float((solids.origin[closed, 2] - np.sqrt((upward * upward).sum(-1))).min())
