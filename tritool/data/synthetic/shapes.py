# SPDX-License-Identifier: Apache-2.0
"""What scenes are built of: quadrics cut along an axis, flat faces, and patterns in two colours.

A quadric's surface is `A x^2 + B y^2 + C z^2 + D z + E = 0` in its own axes, negative inside:
ellipsoids, and cones of elliptical section, of which only the part between two heights exists.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from tritool.skeletons import HUMAN36M_JOINTS

__all__ = [
    "TEXTURE",
    "Blocks",
    "Faces",
    "Solids",
    "boxes",
    "cones",
    "cross",
    "ellipsoids",
    "joined",
    "patterned",
    "plain",
]

Array = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]

TEXTURE = 15
"""Columns of a texture: two colours (3 + 3); two triangle waves, each by how many periods it
advances per millimetre of u and of v and where it starts (3 + 3); how sharply the colours are
divided, 0 for the mean of both; strength and scale (1/mm) of the grain."""


@dataclass(frozen=True, eq=False)
class Solids:
    """N quadrics.

    Attributes:
        origin: [N, 3], mm.
        axes: [N, 3, 3], rows are the unit vectors of the own axes.
        quadric: [N, 5], A to E, for own coordinates in mm.
        cut: [N, 2], the surface exists between these z only.
        low: [N, 3], the least own coordinates of the surface, mm.
        high: [N, 3], the greatest.
        texture: [N, TEXTURE]; u is `x + 0.7 y`, v is z.
        own: [N, 17], of which joints of the subject this is the flesh: it never hides those.
    """

    origin: Array
    axes: Array
    quadric: Array
    cut: Array
    low: Array
    high: Array
    texture: Array
    own: Flags

    def __len__(self) -> int:
        """The number of quadrics N."""
        return len(self.origin)

    def of_nobody(self) -> Solids:
        """The same, belonging to no joint of the subject."""
        return replace(self, own=np.zeros_like(self.own))


@dataclass(frozen=True, eq=False)
class Faces:
    """M parallelograms, seen from their front only.

    Attributes:
        origin: [M, 3], the centres, mm.
        u: [M, 3], from the centre to the middle of an edge, mm.
        v: [M, 3], to that of the next edge; `u x v` points to the front.
        texture: [M, TEXTURE]; u and v in mm from the centre along the edges.
    """

    origin: Array
    u: Array
    v: Array
    texture: Array

    def __len__(self) -> int:
        """The number of parallelograms M."""
        return len(self.origin)


def cross(a: Array, b: Array) -> Array:
    """[N, 3], products of [N, 3]; many times as quick as NumPy's for the few of a scene."""
    (ax, ay, az), (bx, by, bz) = a.T, b.T
    return np.array([ay * bz - az * by, az * bx - ax * bz, ax * by - ay * bx]).T


@dataclass(frozen=True, eq=False)
class Blocks:
    """K upright boxes.

    Attributes:
        centre: [K, 3], mm.
        half: [K, 3], half of the sides, mm.
        yaw: [K], turn about the vertical, radians.
        texture: [K, TEXTURE].
    """

    centre: Array
    half: Array
    yaw: Array
    texture: Array

    @classmethod
    def none(cls) -> Blocks:
        """K = 0."""
        return cls(np.zeros((0, 3)), np.zeros((0, 3)), np.zeros(0), np.zeros((0, TEXTURE)))


Shapes = TypeVar("Shapes", Solids, Faces, Blocks)


def joined(parts: Sequence[Shapes]) -> Shapes:
    """All of them as one; at least one part."""
    first = parts[0]
    values = {
        field.name: np.concatenate([getattr(part, field.name) for part in parts])
        for field in fields(first)
    }
    return type(first)(**values)


def ellipsoids(
    origin: Array, axes: Array, radii: Array, texture: Array, own: Flags | None = None
) -> Solids:
    """Ellipsoids.

    Args:
        origin: [N, 3], centres, mm.
        axes: [N, 3, 3], rows are the directions of the radii.
        radii: [N, 3], mm.
        texture: [N, TEXTURE].
        own: [N, 17], or None for none.
    """
    count = len(origin)
    quadric = np.concatenate([radii**-2.0, np.zeros((count, 1)), -np.ones((count, 1))], 1)
    cut = np.tile([-np.inf, np.inf], (count, 1))
    own = np.zeros((count, len(HUMAN36M_JOINTS)), bool) if own is None else own
    return Solids(origin, axes, quadric, cut, -radii, radii, texture, own)


def cones(
    origin: Array,
    axes: Array,
    span: Array,
    radii: Array,
    flatness: Array,
    texture: Array,
    own: Flags | None = None,
) -> Solids:
    """Open cones along their own z.

    Args:
        origin: [N, 3], where z is 0, mm.
        axes: [N, 3, 3], rows are the own axes.
        span: [N, 2], the least and the greatest z, mm.
        radii: [N, 2], the radius along x at either end, mm.
        flatness: [N], the radius along y as a part of that along x.
        texture: [N, TEXTURE].
        own: [N, 17], or None for none.
    """
    count = len(origin)
    slope = (radii[:, 1] - radii[:, 0]) / (span[:, 1] - span[:, 0])
    start = radii[:, 0] - slope * span[:, 0]
    quadric = np.stack(
        [np.ones(count), flatness**-2.0, -slope * slope, -2 * start * slope, -start * start], 1
    )
    widest = radii.max(1)
    high = np.stack([widest, widest * flatness, span[:, 1]], 1)
    low = np.stack([-widest, -widest * flatness, span[:, 0]], 1)
    own = np.zeros((count, len(HUMAN36M_JOINTS)), bool) if own is None else own
    return Solids(origin, axes, quadric, span, low, high, texture, own)


# The faces of a cube: outward normal and the two edges, as own axes with signs.
_CUBE = np.array(
    [
        [[1, 0, 0], [0, 1, 0], [0, 0, 1]], [[-1, 0, 0], [0, -1, 0], [0, 0, 1]],
        [[0, 1, 0], [-1, 0, 0], [0, 0, 1]], [[0, -1, 0], [1, 0, 0], [0, 0, 1]],
        [[0, 0, 1], [1, 0, 0], [0, 1, 0]], [[0, 0, -1], [-1, 0, 0], [0, 1, 0]],
    ],
    dtype=np.float64,
)  # fmt: skip


def boxes(blocks: Blocks) -> Faces:
    """The faces of upright boxes, six for each."""
    yaw, half = blocks.yaw, blocks.half
    cos, sin, zero = np.cos(yaw), np.sin(yaw), np.zeros_like(yaw)
    turns = np.stack(
        [np.stack([cos, -sin, zero], -1), np.stack([sin, cos, zero], -1)], 1
    )  # [K, 2, 3]
    turns = np.concatenate([turns, np.tile([[[0.0, 0.0, 1.0]]], (len(yaw), 1, 1))], 1)
    # [K, 6, 3 (normal, u, v), 3]
    vectors = np.einsum("kij,fnj->kfni", turns, _CUBE)
    lengths = np.einsum("kj,fnj->kfn", half, np.abs(_CUBE))
    vectors = (vectors * lengths[..., None]).reshape(-1, 3, 3)
    return Faces(
        origin=np.repeat(blocks.centre, 6, 0) + vectors[:, 0],
        u=vectors[:, 1],
        v=vectors[:, 2],
        texture=np.repeat(blocks.texture, 6, 0),
    )


def plain(colour: Array, grain: float = 0.06, scale: float = 0.08) -> Array:
    """[TEXTURE], one colour (red, green, blue, 0 to 1) with some grain."""
    result = np.zeros(TEXTURE)
    result[0:3] = result[3:6] = colour
    result[13], result[14] = grain, scale
    return result


def patterned(rng: np.random.Generator, first: Array, second: Array, period: float) -> Array:
    """[TEXTURE], two colours as stripes, rings, checks or patches.

    Args:
        rng: Where chance comes from.
        first: Red, green, blue, 0 to 1.
        second: The other colour.
        period: About how many millimetres from one stripe to the next.
    """
    result = plain(first)
    result[3:6] = second
    rate = 1 / (period * rng.uniform(0.7, 1.4))
    kind = int(rng.integers(4))
    waves = {
        0: ((rate, 0.0), (0.0, 0.0)),
        1: ((0.0, rate), (0.0, 0.0)),
        2: ((rate, 0.0), (0.0, rate)),
        3: ((0.6 * rate, 0.8 * rate), (-0.7 * rate, 0.45 * rate)),
    }[kind]
    result[6:8], result[9:11] = waves
    # Half of a period from its start, without advancing, the second wave is 1.
    result[8], result[11] = rng.random(), 0.5
    result[12] = rng.choice([1.0, 4.0, 8.0])
    return result
