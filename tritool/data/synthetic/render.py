# SPDX-License-Identifier: Apache-2.0
"""Draws a scene into all views of a sample: nearest shapes first, then only those are shaded."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tritool.data.synthetic.eyes import Eyes, Floats, Integers
from tritool.data.synthetic.scene import Room, Scene
from tritool.data.synthetic.shapes import TEXTURE, Array, Faces, Flags, Solids, cross
from tritool.data.synthetic.trace import NOTHING, Quadrics, keep_faces, keep_solids, plane_forms

__all__ = ["render"]

_PORTION = 1 << 13  # pixels shaded at a time: what is looked up for them stays in the cache

# Grain: fixed noise that textures look up, the same in every process.
_GRAIN = np.random.default_rng(20190808).standard_normal(64 * 64).astype(np.float32)

Shade = Callable[[Floats, Floats, Floats, Floats], Floats]


def render(eyes: Eyes, scene: Scene) -> Floats:
    """Draws all views.

    Args:
        eyes: C cameras.
        scene: What there is to see.

    Returns:
        [3, C H W], red, green, blue, 0 to about 1 (highlights may be brighter).
    """
    quadrics = Quadrics.of(eyes.R, eyes.centres, scene.solids)
    planes = plane_forms(eyes.R, eyes.centres, scene.faces)
    keys = np.full(len(eyes.x), NOTHING)
    keep_solids(eyes, scene.solids, quadrics, keys)
    blocks = len(eyes.centres) * len(scene.solids)
    keep_faces(eyes, scene.faces, planes, keys, blocks)

    image = np.zeros((3, len(eyes.x)), np.float32)
    free = keys == NOTHING
    hit = np.flatnonzero(~free)
    found = keys.take(hit)
    block = found & 0xFFFFFFFF
    depth = (found >> 32).astype(np.int32).view(np.float32)
    solid = block < blocks
    for chosen, table, shade, first in (
        (solid, _solids_table(quadrics, scene.solids, scene.room), _shade_solids, 0),
        (~solid, _faces_table(planes, scene.faces, scene.room), _shade_faces, blocks),
    ):
        pixel, t, column = hit[chosen], depth[chosen], block[chosen] - first
        _paint(eyes, pixel, t, column, table, shade, image)
    # Nothing at all where the lens does not reach.
    if eyes.cameras.distortion is not None:
        free &= np.isfinite(eyes.x)
    _paint_room(eyes, scene, free, image)
    return image


def _paint(
    eyes: Eyes,
    pixel: Integers,
    t: Floats,
    column: Integers,
    table: Floats,
    shade: Shade,
    image: Floats,
) -> None:
    """Shades pixels, of which each has its column of a table of what the shade needs."""
    for start in range(0, len(pixel), _PORTION):
        part = slice(start, start + _PORTION)
        where = pixel[part]
        colours = shade(
            table.take(column[part], 1), eyes.x.take(where), eyes.y.take(where), t[part]
        )
        for channel, values in zip(image, colours, strict=True):
            channel[where] = values


def _solids_table(quadrics: Quadrics, solids: Solids, room: Room) -> Floats:
    """[37, C N]: the ray in own axes (12), A to D, light and vertical in them, texture."""
    per_solid = np.concatenate(
        [solids.quadric[:, :4], solids.axes @ room.light, solids.axes[:, :, 2], solids.texture], 1
    )
    table = np.concatenate(
        [
            quadrics.axes.reshape(-1, 9),
            quadrics.start.reshape(-1, 3),
            np.tile(per_solid, (len(quadrics.c), 1)),
        ],
        1,
    )
    # The light's share, already with its strength, and the half of D that the normal has.
    table[:, 15] /= 2
    table[:, 16:19] *= room.diffuse
    table[:, 19:22] *= 0.2 * room.ambient
    return np.append(table, np.full((len(table), 1), 0.85 * room.ambient), 1).T.astype(np.float32)


def _shade_solids(s: Floats, x: Floats, y: Floats, t: Floats) -> Floats:
    px, py, pz = (s[9 + k] + t * (s[3 * k] * x + s[3 * k + 1] * y + s[3 * k + 2]) for k in range(3))
    nx, ny, nz = s[12] * px, s[13] * py, s[14] * pz + s[15]
    scale = 1 / np.sqrt(nx * nx + ny * ny + nz * nz + np.float32(1e-20))
    lit = np.maximum(nx * s[16] + ny * s[17] + nz * s[18], 0)
    # Light from the ceiling and less of it from the floor.
    upward = nx * s[19] + ny * s[20] + nz * s[21]
    bright = s[22 + TEXTURE] + scale * (lit + upward)
    return _texture(s[22 : 22 + TEXTURE], px + np.float32(0.7) * py, pz, bright)


def _faces_table(planes: Array, faces: Faces, room: Room) -> Floats:
    """[9 + TEXTURE, C M]: the forms p and q, lengths of the edges, brightness, texture."""
    normal = cross(faces.u, faces.v)
    normal = normal / np.linalg.norm(normal, axis=-1, keepdims=True)
    bright = room.ambient * (0.85 + 0.2 * normal[:, 2])
    bright = bright + room.diffuse * np.clip(normal @ room.light, 0, None)
    sides = [np.linalg.norm(edge, axis=-1) for edge in (faces.u, faces.v)]
    per_face = np.concatenate([np.stack([*sides, bright], 1), faces.texture], 1)
    forms = planes[:, :, 1:].reshape(-1, 6)
    return np.concatenate([forms, np.tile(per_face, (len(planes), 1))], 1).T.astype(np.float32)


def _shade_faces(s: Floats, x: Floats, y: Floats, t: Floats) -> Floats:
    u, v = (t * s[6 + k] * (s[3 * k] * x + s[3 * k + 1] * y + s[3 * k + 2]) for k in range(2))
    return _texture(s[9 : 9 + TEXTURE], u, v, s[8])


def _paint_room(eyes: Eyes, scene: Scene, free: Flags, image: Floats) -> None:
    """Floor, walls and ceiling, seen from inside, where the views are free.

    Along a ray the inverse depth of each of the six planes is linear in x and y, and the greatest
    one is that of the surface seen.
    """
    room, area = scene.room, eyes.width * eyes.height
    inward = np.array(
        [[-1, 0, 0], [1, 0, 0], [0, -1, 0], [0, 1, 0], [0, 0, -1], [0, 0, 1]], np.float64
    )
    bright = room.ambient + 0.7 * room.diffuse * np.clip(inward @ room.light, 0, None)
    signs = np.array([1.0, -1.0, 1.0, -1.0, 1.0, -1.0])
    axes = np.array([0, 0, 1, 1, 2, 2])
    places = signs * room.half[axes]
    places[5] = 0.0  # the floor
    for view, (R, centre) in enumerate(zip(eyes.R, eyes.centres, strict=True)):
        forms = (R[:, axes] / (places - centre[axes])).T.astype(np.float32)  # [6, 3]
        pixels = np.flatnonzero(free[view * area : (view + 1) * area]) + view * area
        for start in range(0, len(pixels), 2 * _PORTION):
            pixel = pixels[start : start + 2 * _PORTION]
            x, y = eyes.x.take(pixel), eyes.y.take(pixel)
            inverses = {
                k: forms[k, 0] * x + forms[k, 1] * y + forms[k, 2] for k in _seen(forms, x, y)
            }
            inverse = np.maximum.reduce(list(inverses.values()))
            for which, own in inverses.items():
                part = np.flatnonzero(own == inverse)
                at = x.take(part), y.take(part), 1 / inverse.take(part)
                u, v = (
                    _coordinate(R, centre, k, *at)
                    for k in ((0, 1), (0, 2), (1, 2))[2 - axes[which]]
                )
                shade = np.full(len(part), bright[which], np.float32)
                if which == 5:
                    # Corners are darker than the middle of the room.
                    reach = float((room.half[:2] ** 2).sum())
                    shade *= np.float32(1.05) - (u * u + v * v) * np.float32(0.3 / reach)
                    _cast_shadows(scene.shadows, u, v, shade)
                where = pixel.take(part)
                colours = _texture(room.textures[which, :, None].astype(np.float32), u, v, shade)
                for channel, values in zip(image, colours, strict=True):
                    channel[where] = values


def _seen(forms: Floats, x: Floats, y: Floats) -> list[int]:
    """Which of linear forms [K, 3] can be the greatest in the rectangle around x and y.

    What another one exceeds in all four corners never is.
    """
    corners = np.array([[i, j, 1] for i in (x.min(), x.max()) for j in (y.min(), y.max())])
    values = forms @ corners.T
    below = (values[:, None] < values).all(-1).any(-1)
    return [int(which) for which in np.flatnonzero(~below)]


def _coordinate(R: Array, centre: Array, k: int, x: Floats, y: Floats, t: Floats) -> Floats:
    """Coordinate k in the world of points at depths t on rays of one view."""
    (a, b, c), start = R[:, k].astype(np.float32), np.float32(centre[k])
    point: Floats = start + t * (a * x + b * y + c)
    return point


def _cast_shadows(shadows: Array, px: Floats, py: Floats, shade: Floats) -> None:
    """Darkens the floor at px, py around people."""
    for x, y, radius in shadows.astype(np.float32):
        away = (px - x) ** 2 + (py - y) ** 2
        near = np.flatnonzero(away < 6 * radius * radius)
        shade[near] *= 1 - np.float32(0.5) * np.exp(away.take(near) / (-radius * radius))


def _texture(s: Floats, u: Floats, v: Floats, bright: Floats) -> Floats:
    """[3, n], colours of points u, v of textures [TEXTURE, n or 1], lit by [n]."""
    cell_u, cell_v = ((s[14] * c).astype(np.int32) & 63 for c in (u, v))
    shade = bright * (1 + s[13] * _GRAIN.take(cell_u * 64 + cell_v))
    if s[12].any():
        wave = _wave(s[6] * u + s[7] * v + s[8])
        if s[9:11].any():  # stripes have one wave only
            wave *= _wave(s[9] * u + s[10] * v + s[11])
        share = np.clip(np.float32(0.5) + s[12] * wave, 0, 1)
    else:
        share = np.full(1, 0.5, np.float32)
    result: Floats = (s[0:3] + share * (s[3:6] - s[0:3])) * shade
    return result


def _wave(turns: Floats) -> Floats:
    """A triangle between -1 and 1 of period 1, 1 at one half: quicker than a sine."""
    turns -= np.rint(turns)
    np.abs(turns, out=turns)
    turns *= 4
    turns -= 1
    return turns
