# SPDX-License-Identifier: Apache-2.0
"""A kinematic figure: bones of fixed lengths, turned by joint angles within the limits of a body.

The world has z up. A body's own axes are x to its right, y forward, z up; in the rest position
it stands upright and its limbs hang down. Every bone is turned against its parent by three angles,
`Rx(flexion) Ry(abduction) Rz(twist)`, whose signs are chosen so that a positive number means the
same on both sides: flexion brings arms, thighs and forearms forward, shanks back, the trunk and the
head forward and down; abduction takes a limb away from the body; twist turns it inwards.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tritool.skeletons import HUMAN36M_JOINTS

__all__ = [
    "BONES",
    "LIMITS",
    "Dimensions",
    "Pose",
    "draw_dimensions",
    "ordinary_limb_lengths",
    "put_on_floor",
    "turn",
]

Array = npt.NDArray[np.float64]

_ARM = ("upper_arm", "forearm", "hand")
_LEG = ("thigh", "shank", "foot")
BONES = (
    "pelvis", "abdomen", "chest", "head",
    *(f"{side}_{bone}" for limb in (_ARM, _LEG) for side in "rl" for bone in limb),
)  # fmt: skip
_PARENTS = (-1, 0, 1, 2, 2, 4, 5, 2, 7, 8, 0, 10, 11, 0, 13, 14)

# Degrees: flexion, abduction, twist, each from and to. Elbows and knees are hinges. The pelvis has
# no parent: it says how the whole body lies in the world.
_CENTRE_LIMITS = {
    "pelvis": ((-180, 180), (-180, 180), (-180, 180)),
    "abdomen": ((-20, 45), (-20, 20), (-20, 20)),
    "chest": ((-15, 35), (-15, 15), (-25, 25)),
    "head": ((-40, 45), (-30, 30), (-65, 65)),
}
_SIDE_LIMITS = {
    "upper_arm": ((-50, 178), (-25, 120), (-60, 90)),
    "forearm": ((3, 145), (0, 0), (0, 0)),
    "hand": ((-45, 55), (-15, 15), (-30, 30)),
    "thigh": ((-22, 125), (-15, 50), (-35, 35)),
    "shank": ((2, 150), (0, 0), (0, 0)),
    "foot": ((-50, 30), (0, 0), (0, 0)),
}
LIMITS: Array = np.array(
    [_CENTRE_LIMITS.get(bone) or _SIDE_LIMITS[bone[2:]] for bone in BONES], dtype=np.float64
)
"""[bones, 3, 2], degrees."""

_CENTRE_SIGNS = (-1.0, 1.0, 1.0)
_SIDE_SIGNS = {
    bone: (-1.0 if bone == "shank" else 1.0, -1.0, 1.0) for bone in (*_ARM, *_LEG)
}  # the right side; mirrored on the left
_SIGNS: Array = np.array(
    [
        _CENTRE_SIGNS if bone in _CENTRE_LIMITS
        else np.multiply(_SIDE_SIGNS[bone[2:]], (1, 1, 1) if bone[0] == "r" else (1, -1, -1))
        for bone in BONES
    ]
)  # fmt: skip


@dataclass(frozen=True)
class Dimensions:
    """Lengths of one body, millimetres, and how stout it is.

    Attributes:
        stature: Standing height.
        girth: Thickness of all parts against the ordinary one.
        hip: From the pelvis to a hip joint.
        thigh: From the hip to the knee.
        shank: From the knee to the ankle.
        ankle: Height of the ankle above the sole.
        foot: Length of the foot.
        loin: From the pelvis to the joint "spine".
        back: From the spine to the neck.
        shoulder: From the neck to a shoulder.
        upper_arm: From the shoulder to the elbow.
        forearm: From the elbow to the wrist.
        hand: Length of the hand.
        nose: Forward and up from the neck to the tip of the nose.
        head: From the neck to the top of the head.
    """

    stature: float
    girth: float
    hip: float
    thigh: float
    shank: float
    ankle: float
    foot: float
    loin: float
    back: float
    shoulder: float
    upper_arm: float
    forearm: float
    hand: float
    nose: tuple[float, float]
    head: float


# Parts of the stature, rounded from common anthropometric tables.
_PARTS = {
    "hip": 0.058, "thigh": 0.247, "shank": 0.246, "ankle": 0.045, "foot": 0.152, "loin": 0.133,
    "back": 0.150, "shoulder": 0.104, "upper_arm": 0.172, "forearm": 0.150, "hand": 0.100,
    "head": 0.179,
}  # fmt: skip
_NOSE = (0.065, 0.088)
# Mean of all statures that are drawn, before they are clipped.
_STATURE = 1705.0


def draw_dimensions(rng: np.random.Generator) -> Dimensions:
    """Draws an adult body, 1.5 to 2.0 m tall."""
    # Two groups of statures, as of women and men.
    mean, deviation = ((1640.0, 65.0), (1770.0, 70.0))[int(rng.integers(2))]
    stature = float(np.clip(rng.normal(mean, deviation), 1500, 2000))
    noise = np.clip(rng.normal(0, 0.03, len(_PARTS)), -0.08, 0.08)
    lengths = {
        name: float(stature * part * (1 + each))
        for (name, part), each in zip(_PARTS.items(), noise, strict=True)
    }
    forward, up = (float(stature * part) for part in _NOSE)
    girth = float(np.clip(rng.normal(1.0, 0.11), 0.82, 1.3))
    return Dimensions(stature=stature, girth=girth, nose=(forward, up), **lengths)


def ordinary_limb_lengths(
    joint_names: Sequence[str] = HUMAN36M_JOINTS,
) -> tuple[tuple[tuple[int, int], ...], tuple[float, ...]]:
    """The limbs of the studio's ordinary body, of 1705 mm.

    The one thing that weakly supervised learning may know of 3D
    (`tritool.losses.limb_length_loss`).

    Args:
        joint_names: J names, spelled as in `tritool.skeletons.HUMAN36M_JOINTS`.

    Returns:
        The limbs, pairs of joints, and the length of each in millimetres; from pelvis to neck that
        of a straight back.

    Raises:
        ValueError: No limb has both its joints among them.
    """
    parts = _PARTS
    of_names = {
        ("pelvis", "neck"): parts["loin"] + parts["back"],
        ("pelvis", "spine"): parts["loin"],
        ("spine", "neck"): parts["back"],
        ("neck", "nose"): math.hypot(*_NOSE),
        ("neck", "head_top"): parts["head"],
    }
    for side in "lr":
        of_names |= {
            ("pelvis", f"{side}_hip"): parts["hip"],
            (f"{side}_hip", f"{side}_knee"): parts["thigh"],
            (f"{side}_knee", f"{side}_ankle"): parts["shank"],
            ("neck", f"{side}_shoulder"): parts["shoulder"],
            (f"{side}_shoulder", f"{side}_elbow"): parts["upper_arm"],
            (f"{side}_elbow", f"{side}_wrist"): parts["forearm"],
        }
    index = {name: at for at, name in enumerate(joint_names)}
    found = [
        ((index[a], index[b]), _STATURE * part)
        for (a, b), part in of_names.items()
        if a in index and b in index
    ]
    if not found:
        raise ValueError(f"joint_names must have limbs, got {', '.join(joint_names) or 'none'}")
    limbs, lengths = zip(*found, strict=True)
    return limbs, lengths


@dataclass(frozen=True, eq=False)
class Pose:
    """Where a body's bones are: T poses of it.

    Attributes:
        origins: [T, bones, 3], where each bone begins, mm.
        turns: [T, bones, 3, 3], from the bone's own axes to the world's.
        joints: [T, 17, 3], HUMAN36M_JOINTS, mm.
    """

    origins: Array
    turns: Array
    joints: Array

    def __getitem__(self, which: int) -> Pose:
        """One of the T poses, T = 1."""
        row = slice(which, which + 1)
        return Pose(self.origins[row], self.turns[row], self.joints[row])

    def moved(self, offset: Array) -> Pose:
        """The poses shifted by [3] or [T, 1, 3], mm."""
        return Pose(self.origins + offset, self.turns, self.joints + offset)


def rotations(angles: Array) -> Array:
    """[..., 3, 3], `Rx(a) Ry(b) Rz(c)` of [..., 3] radians."""
    (sa, sb, sc), (ca, cb, cc) = np.moveaxis(np.sin(angles), -1, 0), np.moveaxis(
        np.cos(angles), -1, 0
    )  # fmt: skip
    result = np.empty((*angles.shape[:-1], 3, 3))
    result[..., 0, 0], result[..., 0, 1], result[..., 0, 2] = cb * cc, -cb * sc, sb
    result[..., 1, 0] = ca * sc + sa * sb * cc
    result[..., 1, 1] = ca * cc - sa * sb * sc
    result[..., 1, 2] = -sa * cb
    result[..., 2, 0] = sa * sc - ca * sb * cc
    result[..., 2, 1] = sa * cc + ca * sb * sc
    result[..., 2, 2] = ca * cb
    return result


def turn(body: Dimensions, angles: Array, yaw: Array | float) -> Pose:
    """Forward kinematics: the pelvis at the origin, feet as flat as the ankles allow.

    Args:
        body: The lengths.
        angles: [T, bones, 3], degrees; clipped to `LIMITS`. Those of the feet are replaced.
        yaw: [T] or one, which way the body faces: turns it about the vertical, radians.
    """
    count = len(angles)
    local = rotations(
        np.deg2rad(np.clip(angles, LIMITS[..., 0], LIMITS[..., 1])) * _SIGNS
    )  # [T, bones, 3, 3]
    facing = np.zeros((count, 3))
    facing[:, 2] = yaw
    turns = np.empty_like(local)
    for bone, parent in enumerate(_PARENTS):
        above = rotations(facing) if parent < 0 else turns[:, parent]
        if BONES[bone].endswith("foot"):
            local[:, bone] = _flat_foot(above)
        turns[:, bone] = above @ local[:, bone]

    def along(bone: str, offset: tuple[float, float, float]) -> Array:
        moved: Array = turns[:, BONES.index(bone)] @ np.asarray(offset)
        return moved

    at: dict[str, Array] = {"pelvis": np.zeros((count, 3))}
    at["spine"] = along("abdomen", (0, 0, body.loin))
    at["neck"] = at["spine"] + along("chest", (0, 0, body.back))
    at["nose"] = at["neck"] + along("head", (0, *body.nose))
    at["head_top"] = at["neck"] + along("head", (0, 0, body.head))
    for side, sign in (("r", 1.0), ("l", -1.0)):
        # The shoulder girdle lifts when the arm is raised beyond 30 degrees.
        down = local[:, BONES.index(f"{side}_upper_arm"), 2, 2]
        raised = np.arccos(np.clip(down, -1, 1))
        lift = np.deg2rad(-14) + 0.25 * np.clip(raised - np.pi / 6, 0, None)
        girdle = np.stack([sign * np.cos(lift), 0 * lift, np.sin(lift)], -1) * body.shoulder
        at[f"{side}_shoulder"] = at["neck"] + np.einsum(
            "tij,tj->ti", turns[:, BONES.index("chest")], girdle
        )
        at[f"{side}_hip"] = along("pelvis", (sign * body.hip, 0, 0))
        for limb in (
            (f"{side}_shoulder", "elbow", "upper_arm", body.upper_arm),
            (f"{side}_elbow", "wrist", "forearm", body.forearm),
            (f"{side}_hip", "knee", "thigh", body.thigh),
            (f"{side}_knee", "ankle", "shank", body.shank),
        ):
            start, end, bone_name, length = limb
            at[f"{side}_{end}"] = at[start] + along(f"{side}_{bone_name}", (0, 0, -length))
    begins = ["pelvis", "pelvis", "spine", "neck"] + [
        f"{side}_{joint}"
        for limb_joints in (("shoulder", "elbow", "wrist"), ("hip", "knee", "ankle"))
        for side in "rl"
        for joint in limb_joints
    ]
    return Pose(
        origins=np.stack([at[joint] for joint in begins], 1),
        turns=turns,
        joints=np.stack([at[joint] for joint in HUMAN36M_JOINTS], 1),
    )


def _flat_foot(shank: Array) -> Array:
    """[T, 3, 3], the turn of a foot in its shank that brings the sole closest to the floor's."""
    up = shank[:, 2]  # the world's vertical in the shank's axes
    angles = np.zeros((len(shank), 3))
    low, high = np.deg2rad(LIMITS[BONES.index("r_foot"), 0])
    angles[:, 0] = np.clip(np.arctan2(-up[:, 1], up[:, 2]), low, high)
    return rotations(angles)


def put_on_floor(pose: Pose, lowest: Array) -> Pose:
    """The poses shifted along z so that what is lowest of each touches the floor, z = 0.

    Args:
        pose: T poses.
        lowest: [T], z of the lowest point of the flesh, mm.
    """
    offset = np.zeros((len(pose.joints), 1, 3))
    offset[:, 0, 2] = -lowest
    return pose.moved(offset)
