# SPDX-License-Identifier: Apache-2.0
"""What people do: joint angles of everyday positions, drawn at random and free of collisions."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tritool.data.synthetic.body import BONES, Array, Dimensions, Pose, turn
from tritool.skeletons import HUMAN36M_JOINTS

__all__ = ["ACTIONS", "draw_pose"]

Range = tuple[float, float]

# How many poses are drawn at once, of which the first one without collision is taken.
_TRIES = 8
_BONE = {bone: row for row, bone in enumerate(BONES)}
_JOINT = {joint: row for row, joint in enumerate(HUMAN36M_JOINTS)}


class _Angles:
    """Angles [T, bones, 3] in the making, degrees."""

    def __init__(self, rng: np.random.Generator, count: int) -> None:
        """Starts from relaxed standing."""
        self.rng, self.count = rng, count
        self.values: Array = np.zeros((count, len(BONES), 3))
        self.set("abdomen", (-4, 8), (-4, 4), (-6, 6))
        self.set("chest", (-4, 10), (-4, 4), (-8, 8))
        self.set("head", (-12, 22), (-10, 10), (-45, 45))
        self.both("upper_arm", (-12, 22), (4, 22), (-10, 30))
        self.both("forearm", (8, 45))
        self.both("hand", (-15, 25), (-8, 8), (-20, 20))
        self.both("thigh", (-4, 10), (0, 9), (-12, 4))
        self.both("shank", (2, 14))

    def draw(self, span: Range) -> Array:
        return self.rng.uniform(*span, self.count)

    def set(self, bone: str, *spans: Range) -> None:
        """Draws flexion, and abduction and twist if given."""
        for axis, span in enumerate(spans):
            self.values[:, _BONE[bone], axis] = self.draw(span)

    def both(self, bone: str, *spans: Range) -> None:
        """Draws for each side by itself."""
        for side in "rl":
            self.set(f"{side}_{bone}", *spans)

    def alike(self, bone: str, *spans: Range, spread: float = 6) -> None:
        """Draws nearly the same for both sides."""
        for axis, span in enumerate(spans):
            shared = self.draw(span)
            for side in "rl":
                jitter = self.draw((-spread, spread))
                self.values[:, _BONE[f"{side}_{bone}"], axis] = shared + jitter

    def side(self) -> tuple[str, str]:
        """A side of the body, and the other one."""
        return ("r", "l") if self.rng.integers(2) else ("l", "r")


def _standing(a: _Angles) -> None:
    if a.rng.random() < 0.3:  # hands on the hips
        a.alike("upper_arm", (-25, -5), (35, 50), (25, 45))
        a.alike("forearm", (75, 100))


def _walking(a: _Angles, stride: Range = (16, 32), elbow: Range = (12, 40)) -> None:
    phase, size = a.draw((0, 2 * np.pi)), a.draw(stride)
    lean = a.draw((2, 7))
    for side, shift in (("r", 0.0), ("l", np.pi)):
        swing, forward = np.sin(phase + shift), np.cos(phase + shift)
        a.values[:, _BONE[f"{side}_thigh"], 0] = size * swing + lean + 4
        # The knee bends most while the leg comes forward.
        bend = 6 + 1.9 * size * np.clip(forward + 0.2, 0, None) ** 1.4
        a.values[:, _BONE[f"{side}_shank"], 0] = bend
        a.values[:, _BONE[f"{side}_upper_arm"], 0] = -0.9 * size * swing + a.draw((-6, 6))
        a.values[:, _BONE[f"{side}_forearm"], 0] = a.draw(elbow) + 0.3 * size * (1 - swing)
    a.values[:, _BONE["pelvis"], 0] = lean


def _running(a: _Angles) -> None:
    _walking(a, (32, 48), (70, 105))
    a.values[:, _BONE["pelvis"], 0] += a.draw((4, 12))


def _sitting(a: _Angles) -> None:
    pitch = a.draw((-14, 14))
    a.values[:, _BONE["pelvis"], 0] = pitch
    a.alike("thigh", (74, 92), (2, 22), (-8, 8))
    a.values[:, [_BONE["r_thigh"], _BONE["l_thigh"]], 0] += pitch[:, None]
    a.both("shank", (65, 108))
    a.set("abdomen", (0, 18), (-6, 6), (-8, 8))
    a.set("chest", (0, 18), (-6, 6), (-10, 10))
    kind = a.rng.integers(3)
    if kind == 0:  # hands on the knees
        a.alike("upper_arm", (20, 45), (4, 16), (-5, 10))
        a.alike("forearm", (30, 65))
    elif kind == 1:  # as if at a desk
        a.both("upper_arm", (20, 55), (4, 22), (0, 30))
        a.both("forearm", (50, 95))


def _floor_sitting(a: _Angles) -> None:
    pitch = a.draw((-28, 4))
    a.values[:, _BONE["pelvis"], 0] = pitch
    if a.rng.random() < 0.5:  # legs stretched out
        a.both("thigh", (84, 100), (4, 24), (-20, 10))
        a.both("shank", (4, 40))
    else:  # knees drawn up
        a.alike("thigh", (104, 124), (4, 20), (-10, 10))
        a.alike("shank", (85, 125))
    a.values[:, [_BONE["r_thigh"], _BONE["l_thigh"]], 0] += pitch[:, None]
    a.set("abdomen", (6, 30), (-6, 6), (-6, 6))
    if a.rng.random() < 0.4:  # propped on the hands
        a.alike("upper_arm", (-48, -28), (8, 22), (-20, 5))
        a.alike("forearm", (4, 18))
    else:
        a.both("upper_arm", (15, 60), (2, 20), (0, 25))
        a.both("forearm", (15, 70))


def _crouching(a: _Angles) -> None:
    pitch, depth = a.draw((8, 34)), a.draw((84, 124))
    a.values[:, _BONE["pelvis"], 0] = pitch
    a.alike("thigh", (0, 0), (6, 26), (-22, -4))
    for side in "rl":
        # Shanks lean forward, so that the feet are below the trunk.
        knee = depth + a.draw((-8, 8))
        a.values[:, _BONE[f"{side}_shank"], 0] = knee
        a.values[:, _BONE[f"{side}_thigh"], 0] = knee - a.draw((20, 30)) + pitch
    a.set("abdomen", (4, 30), (-5, 5), (-8, 8))
    a.both("upper_arm", (30, 85), (2, 22), (0, 25))
    a.both("forearm", (10, 75))


def _kneeling(a: _Angles) -> None:
    down, up = a.side()
    pitch = a.draw((-4, 14))
    a.values[:, _BONE["pelvis"], 0] = pitch
    a.set(f"{down}_thigh", (-6, 12), (2, 10), (-5, 5))
    a.set(f"{down}_shank", (85, 105))
    a.set(f"{up}_thigh", (74, 96), (2, 16), (-5, 5))
    a.set(f"{up}_shank", (82, 104))
    a.both("upper_arm", (0, 60), (4, 25), (0, 25))
    a.both("forearm", (15, 85))


def _reaching(a: _Angles) -> None:
    near, _ = a.side()
    a.set(f"{near}_upper_arm", (55, 150), (0, 60), (-25, 25))
    a.set(f"{near}_forearm", (4, 45))
    a.values[:, _BONE["pelvis"], 0] = a.draw((0, 14))
    a.alike("thigh", (2, 16), (0, 9), (-12, 4))
    a.set("chest", (-5, 15), (-10, 10), (-18, 18))
    if a.rng.random() < 0.35:
        a.alike("upper_arm", (50, 110), (0, 30), (-10, 20))
        a.both("forearm", (5, 50))


def _arms_up(a: _Angles) -> None:
    a.alike("upper_arm", (140, 175), (0, 35), (-25, 25), spread=15)
    a.both("forearm", (4, 80))
    a.set("head", (-30, 10), (-8, 8), (-30, 30))


def _arms_out(a: _Angles) -> None:
    a.both("upper_arm", (-15, 25), (55, 105), (-40, 40))
    a.both("forearm", (4, 90))


def _bending(a: _Angles) -> None:
    pitch = a.draw((25, 62))
    a.values[:, _BONE["pelvis"], 0] = pitch
    a.alike("thigh", (-6, 12), (0, 12), (-10, 4))
    a.alike("shank", (4, 40), spread=4)
    for side in "rl":
        bend = a.values[:, _BONE[f"{side}_shank"], 0]
        a.values[:, _BONE[f"{side}_thigh"], 0] += pitch + 0.5 * bend
    a.set("abdomen", (10, 40), (-8, 8), (-12, 12))
    a.set("chest", (5, 30), (-8, 8), (-15, 15))
    a.both("upper_arm", (45, 110), (-5, 25), (-10, 20))
    a.both("forearm", (4, 45))


def _phoning(a: _Angles) -> None:
    near, far = a.side()
    a.set(f"{near}_upper_arm", (22, 55), (18, 40), (15, 45))
    a.set(f"{near}_forearm", (120, 142))
    if a.rng.random() < 0.5:
        a.set(f"{far}_upper_arm", (-10, 30), (6, 25), (20, 50))
        a.set(f"{far}_forearm", (30, 100))


def _gesturing(a: _Angles) -> None:
    a.both("upper_arm", (-5, 70), (5, 50), (-30, 40))
    a.both("forearm", (45, 120))


def _lying(a: _Angles) -> None:
    kind = a.rng.integers(3)
    if kind == 0:  # on the back
        a.set("pelvis", (-94, -86), (-6, 6))
        a.both("upper_arm", (-6, 10), (10, 100), (-30, 10))
        a.both("thigh", (0, 45), (2, 18), (-20, 5))
        for side in "rl":
            raised = a.values[:, _BONE[f"{side}_thigh"], 0]
            a.values[:, _BONE[f"{side}_shank"], 0] = 2 * raised + a.draw((2, 12))
        a.set("head", (0, 20), (-8, 8), (-40, 40))
    elif kind == 1:  # on the front
        a.set("pelvis", (84, 92), (-6, 6))
        a.both("upper_arm", (60, 150), (20, 60), (-10, 20))
        a.both("thigh", (-8, 4), (2, 22), (-10, 10))
        a.both("shank", (2, 30))
        a.set("head", (-35, -5), (-8, 8), (-40, 40))
    else:  # on a side
        a.set("pelvis", (-8, 8), (82, 94) if a.rng.integers(2) else (-94, -82))
        a.both("upper_arm", (30, 90), (-10, 15), (-10, 20))
        a.both("forearm", (20, 100))
        a.alike("thigh", (20, 80), (-6, 4), (-10, 10), spread=12)
        a.alike("shank", (30, 95), spread=12)


_MAKERS: dict[str, Callable[[_Angles], None]] = {
    "standing": _standing,
    "walking": _walking,
    "running": _running,
    "sitting": _sitting,
    "sitting on the floor": _floor_sitting,
    "crouching": _crouching,
    "kneeling": _kneeling,
    "reaching": _reaching,
    "arms up": _arms_up,
    "arms out": _arms_out,
    "bending": _bending,
    "phoning": _phoning,
    "gesturing": _gesturing,
    "lying": _lying,
}
ACTIONS = tuple(_MAKERS)


def draw_pose(rng: np.random.Generator, body: Dimensions, action: str) -> Pose:
    """Draws one pose, T = 1, the pelvis at the origin, facing anywhere.

    Args:
        rng: Where chance comes from.
        body: Whose pose.
        action: One of `ACTIONS`.
    """
    angles = _Angles(rng, _TRIES)
    _MAKERS[action](angles)
    pose = turn(body, angles.values, rng.uniform(-np.pi, np.pi))
    # argmin takes the first of equals, so the first pose that is free, or the one closest to it.
    return pose[int(np.argmin(_collisions(pose.joints, body)))]


def _collisions(joints: Array, body: Dimensions) -> Array:
    """[T], by how many millimetres in all parts of the body pass through others."""
    thick = body.girth * body.stature / 1750
    trunk = [("pelvis", "neck")]
    rules: list[tuple[str, list[tuple[str, str]], float]] = []
    for side, other in (("r", "l"), ("l", "r")):
        rules += [
            (f"{side}_wrist", trunk, 165 * thick),
            (f"{side}_elbow", trunk, 150 * thick),
            (f"{side}_wrist", [("neck", "head_top")], 125),
            (f"{side}_elbow", [("neck", "head_top")], 125),
            (f"{side}_wrist", [("r_hip", "r_knee"), ("l_hip", "l_knee")], 100 * thick),
            (f"{side}_wrist", [("r_knee", "r_ankle"), ("l_knee", "l_ankle")], 85 * thick),
            (f"{side}_wrist", [(f"{other}_elbow", f"{other}_wrist")], 75),
            (f"{side}_knee", trunk, 190 * thick),
            (f"{side}_knee", [(f"{other}_hip", f"{other}_knee")], 125 * thick),
            (f"{side}_ankle", [(f"{other}_knee", f"{other}_ankle")], 95 * thick),
        ]
    points = [_JOINT[joint] for joint, segments, _ in rules for _ in segments]
    starts = [_JOINT[start] for _, segments, _ in rules for start, _ in segments]
    ends = [_JOINT[end] for _, segments, _ in rules for _, end in segments]
    wanted = np.array([distance for _, segments, distance in rules for _ in segments])
    start, along = joints[:, starts], joints[:, ends] - joints[:, starts]
    offset = joints[:, points] - start
    share = np.clip((offset * along).sum(-1) / (along * along).sum(-1), 0, 1)
    distance = np.linalg.norm(offset - share[..., None] * along, axis=-1)
    result: Array = np.clip(wanted - distance, 0, None).sum(-1)
    return result
