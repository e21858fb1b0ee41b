# SPDX-License-Identifier: Apache-2.0
"""Which joints of a body are joined, found by the joints' names, so that poses can be drawn."""

from __future__ import annotations

import re
from collections.abc import Sequence

Limb = tuple[str, str]

# The 17 joints of Human3.6M in the order most pose papers use, pelvis first.
HUMAN36M_JOINTS = (
    "pelvis",
    "r_hip", "r_knee", "r_ankle",
    "l_hip", "l_knee", "l_ankle",
    "spine", "neck", "nose", "head_top",
    "l_shoulder", "l_elbow", "l_wrist",
    "r_shoulder", "r_elbow", "r_wrist",
)  # fmt: skip

_ARMS: tuple[Limb, ...] = (
    ("neck", "l_shoulder"), ("l_shoulder", "l_elbow"), ("l_elbow", "l_wrist"),
    ("neck", "r_shoulder"), ("r_shoulder", "r_elbow"), ("r_elbow", "r_wrist"),
)  # fmt: skip
_LEGS: tuple[Limb, ...] = (
    ("l_hip", "l_knee"), ("l_knee", "l_ankle"),
    ("r_hip", "r_knee"), ("r_knee", "r_ankle"),
)  # fmt: skip

HUMAN36M_LIMBS: tuple[Limb, ...] = (
    ("pelvis", "l_hip"), ("pelvis", "r_hip"), *_LEGS,
    ("pelvis", "spine"), ("spine", "neck"), ("neck", "nose"), ("nose", "head_top"), *_ARMS,
)  # fmt: skip

# OpenPose's BODY_25B: no pelvis and no spine, but feet and face.
BODY_25B_LIMBS: tuple[Limb, ...] = (
    ("l_hip", "r_hip"), ("l_shoulder", "l_hip"), ("r_shoulder", "r_hip"), *_LEGS, *_ARMS,
    ("neck", "head_top"), ("neck", "nose"),
    ("nose", "l_eye"), ("l_eye", "l_ear"), ("nose", "r_eye"), ("r_eye", "r_ear"),
    ("l_ankle", "l_heel"), ("l_ankle", "l_big_toe"), ("l_big_toe", "l_small_toe"),
    ("r_ankle", "r_heel"), ("r_ankle", "r_big_toe"), ("r_big_toe", "r_small_toe"),
)  # fmt: skip

_SIDES = {"left": "l", "right": "r"}


def limbs(joint_names: Sequence[str]) -> tuple[tuple[int, int], ...]:
    """Finds the limbs of a joint set by its names.

    The table that knows more limbs between the given joints is taken. Names are compared without
    regard to case, separators, and to whether a side is written ``l_``, ``left`` or ``L``.

    Args:
        joint_names: J names.

    Returns:
        Pairs of joint indices; none if the names are not those of a body.

    Example:
        >>> limbs(["LeftKnee", "r_knee", "l_ankle"])
        ((0, 2),)
        >>> limbs(["corner_0", "corner_1"])
        ()
    """
    index = {_plain(name): at for at, name in enumerate(joint_names)}
    found = [
        tuple((index[a], index[b]) for a, b in table if a in index and b in index)
        for table in (HUMAN36M_LIMBS, BODY_25B_LIMBS)
    ]
    return max(found, key=len)


def side(joint_name: str) -> str:
    """Tells the side of the body a joint belongs to.

    Args:
        joint_name: the joint's name, spelled as in `limbs`.

    Returns:
        ``"l"``, ``"r"``, or ``""`` for the middle of the body and for unknown names.

    Example:
        >>> side("left_wrist"), side("rKnee"), side("nose")
        ('l', 'r', '')
    """
    start = _plain(joint_name)[:2]
    return start[0] if start in ("l_", "r_") else ""


def _plain(name: str) -> str:
    """Spells ``LeftKnee``, ``left-knee``, ``LKnee`` and ``knee_l`` all as ``l_knee``."""
    words = [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", name)]
    words = [_SIDES.get(word, word) for word in words]
    return "_".join(sorted(words, key=lambda word: word not in _SIDES.values()))
