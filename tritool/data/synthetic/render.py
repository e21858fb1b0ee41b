# SPDX-License-Identifier: Apache-2.0
"""Draws a scene into all views of a sample at once: rays against quadrics and parallelograms.

A pixel's ray is `centre + t R^T (x, y, 1)`, with ideal normalised coordinates x and y, so t is the
depth. What it meets of a quadric follows from polynomials in x and y, whose coefficients are worked
out once for each pair of view and shape (a "block"): half of the linear coefficient in t,
`b . (x, y, 1)`, and the discriminant `(x, y, 1) S (x, y, 1)^T`; with the constant c the ray enters
at `t = c / (sqrt(discriminant) - b)`, also where cones have a second half. All pixels of all blocks
stand in one flat list, the nearest block of every pixel is kept, and only that one is shaded.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from tritool.cameras import Cameras
from tritool.data.synthetic.scene import Room, Scene
from tritool.data.synthetic.shapes import TEXTURE, Array, Faces, Flags, Solids

__all__ = ["Eyes", "first_depths", "render"]

Floats = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int64]

_NEAR = 150.0  # mm, what is closer to a camera is not seen
_CHUNK = 1 << 15  # pixels at a time: a few arrays of them stay in the cache
_NOTHING = np.iinfo(np.int64).max
_LENS_GRID = 8  # pixels; in between, rays of a distorted lens are interpolated

# Grain: fixed noise that textures look up, the same in every process.
_GRAIN = np.random.default_rng(20190808).standard_normal(64 * 64).astype(np.float32)


@dataclass(frozen=True, eq=False)
class Eyes:
    """C cameras as the renderer wants them.

    Attributes:
        cameras: The cameras of the images to draw, float64.
        R: [C, 3, 3], from the world to the camera.
        centres: [C, 3], mm.
        width: Of the images, pixels.
        height: Of the images, pixels.
        x: [C H W], ideal normalised coordinate of the pixels' rays, float32; NaN where the lens
            does not reach.
        y: [C H W], the other one.
    """

    cameras: Cameras
    R: Array
    centres: Array
    width: int
    height: int
    x: Floats
    y: Floats

    @classmethod
    def of(cls, cameras: Cameras, width: int, height: int) -> Eyes:
        """Works out the rays of all pixels."""
        R = cameras.R.numpy()
        centres = -np.einsum("cij,ci->cj", R, cameras.t.numpy())
        K = cameras.K.numpy()
        if cameras.distortion is None:
            columns, rows = np.arange(width), np.arange(height)
            x = (columns - K[:, 0, 2, None]) / K[:, 0, 0, None]
            y = (rows - K[:, 1, 2, None]) / K[:, 1, 1, None]
            shape = (len(K), height, width)
            grid_x, grid_y = (
                np.broadcast_to(x[:, None], shape),
                np.broadcast_to(y[..., None], shape),
            )
        else:
            grid_x, grid_y = _lens_rays(cameras, width, height)
        flat_x, flat_y = (g.astype(np.float32).reshape(-1) for g in (grid_x, grid_y))
        return cls(cameras, R, centres, width, height, flat_x, flat_y)

    def rays(self, pixels: Array) -> Array:
        """[C, N, 2], ideal normalised coordinates of pixels [C, N, 2], float64."""
        ideal = self.cameras.undistort(torch.from_numpy(pixels).movedim(0, 1)).movedim(0, 1).numpy()
        return _normalised(self.cameras, ideal)

    def bounds(self, corners: Array) -> tuple[Integers, Flags]:
        """Pixel boxes of hulls of points.

        Args:
            corners: [C, N, P, 3], camera coordinates, mm.

        Returns:
            [C, N, 4], `x0, y0, x1, y1`, ends exclusive, within the image; and [C, N], whether any
            of it can be seen.
        """
        depth = corners[..., 2]
        ahead = (depth > _NEAR).all(-1)
        at = corners[..., :2] / np.where(depth > _NEAR, depth, 1.0)[..., None]
        K = self.cameras.K.numpy()
        pixels = at * K[:, None, None, [0, 1], [0, 1]] + K[:, None, None, :2, 2]
        slack = 0.6
        if self.cameras.distortion is not None:
            flat = torch.from_numpy(pixels.reshape(len(K), -1, 2)).movedim(0, 1)
            moved = self.cameras.distort(flat).movedim(0, 1).numpy().reshape(pixels.shape)
            # Straight edges bulge between the corners by a part of what the corners move.
            slack = 2 + 0.3 * np.abs(moved - pixels).max((-2, -1), initial=0)[..., None]
            pixels = moved
        low, high = pixels.min(-2) - slack, pixels.max(-2) + slack
        # Not all of it in front, or beyond the lens: anywhere in the image.
        anywhere = ~ahead | ~np.isfinite(low).all(-1) | ~np.isfinite(high).all(-1)
        low, high = (np.where(anywhere[..., None], e, b) for e, b in ((-1e6, low), (1e6, high)))
        size = np.array([self.width, self.height])
        first = np.clip(np.ceil(low), 0, size).astype(np.int64)
        last = np.clip(np.floor(high) + 1, 0, size).astype(np.int64)
        return np.concatenate([first, last], -1), (first < last).all(-1) & (depth > _NEAR).any(-1)


def _normalised(cameras: Cameras, ideal: Array) -> Array:
    K = cameras.K.numpy()[:, None]
    return np.stack(
        [(ideal[..., 0] - K[..., 0, 2]) / K[..., 0, 0],
         (ideal[..., 1] - K[..., 1, 2]) / K[..., 1, 1]], -1,
    )  # fmt: skip


def _lens_rays(cameras: Cameras, width: int, height: int) -> tuple[Array, Array]:
    """[C, H, W] each: undistorted on a coarse grid, bilinear in between."""
    columns = np.arange(0, width + _LENS_GRID, _LENS_GRID, dtype=np.float64)
    rows = np.arange(0, height + _LENS_GRID, _LENS_GRID, dtype=np.float64)
    grid = np.stack(np.meshgrid(columns, rows), -1).reshape(-1, 1, 2)
    grid = np.repeat(grid, len(cameras), 1)
    ideal = cameras.undistort(torch.from_numpy(grid)).movedim(0, 1).numpy()
    coarse = _normalised(cameras, ideal).reshape(len(cameras), len(rows), len(columns), 2)
    for axis, count in ((1, height), (2, width)):
        cell, share = np.divmod(np.arange(count), _LENS_GRID)
        share = (share / _LENS_GRID).reshape((-1, 1, 1) if axis == 1 else (-1, 1))
        coarse = np.take(coarse, cell, axis) * (1 - share) + np.take(coarse, cell + 1, axis) * share
    return coarse[..., 0], coarse[..., 1]


@dataclass(frozen=True, eq=False)
class _Quadrics:
    """Coefficients of C views of N quadrics, float64: see the module's text."""

    axes: Array  # [C, N, 3, 3]: own coordinates of a ray's point are start + t axes (x, y, 1)
    start: Array  # [C, N, 3]
    S: Array  # [C, N, 3, 3]
    b: Array  # [C, N, 3]
    c: Array  # [C, N]

    @classmethod
    def of(cls, R: Array, centres: Array, solids: Solids) -> _Quadrics:
        axes = np.einsum("nij,ckj->cnik", solids.axes, R)
        start = np.einsum("nij,cnj->cni", solids.axes, centres[:, None] - solids.origin)
        square, linear, constant = solids.quadric[:, :3], solids.quadric[:, 3], solids.quadric[:, 4]
        gradient = square * start
        gradient[..., 2] += linear / 2
        b = np.einsum("cni,cnik->cnk", gradient, axes)
        c = ((gradient * start).sum(-1) + linear / 2 * start[..., 2]) + constant
        G = np.einsum("ni,cnij,cnik->cnjk", square, axes, axes)
        return cls(axes, start, b[..., :, None] * b[..., None, :] - c[..., None, None] * G, b, c)


def _plane_coefficients(R: Array, centres: Array, faces: Faces) -> Array:
    """[C, M, 3, 3]: rows w, p, q of linear forms in (x, y, 1).

    1 / t = w, the place on the face from -1 to 1 along u is p / w, along v it is q / w; w is not
    positive where the face is seen from its back.
    """
    # The point centre + t d = origin + p u + q v, solved with dual vectors of u, v, normal.
    normal = np.cross(faces.u, faces.v)
    area = (normal * normal).sum(-1, keepdims=True)
    dual_u, dual_v = np.cross(faces.v, normal) / area, np.cross(normal, faces.u) / area
    offset = faces.origin - centres[:, None]  # [C, M, 3]
    away = (normal * offset).sum(-1)  # negative in front
    directions = np.einsum("cki,mi->cmk", R, normal)
    w = directions / np.where(away < 0, away, -np.inf)[..., None]
    shift = [(dual * offset).sum(-1)[..., None] for dual in (dual_u, dual_v)]
    along = [np.einsum("cki,mi->cmk", R, dual) for dual in (dual_u, dual_v)]
    p, q = (each - s * w for each, s in zip(along, shift, strict=True))
    return np.stack([w, p, q], 2)


def render(eyes: Eyes, scene: Scene) -> Floats:
    """Draws all views.

    Args:
        eyes: C cameras.
        scene: What there is to see.

    Returns:
        [3, C H W], red, green, blue, 0 to about 1 (highlights may be brighter).
    """
    quadrics = _Quadrics.of(eyes.R, eyes.centres, scene.solids)
    planes = _plane_coefficients(eyes.R, eyes.centres, scene.faces)
    keys = np.full(len(eyes.x), _NOTHING)
    _draw_solids(eyes, scene.solids, quadrics, keys)
    count = len(eyes.centres) * len(scene.solids)
    _draw_faces(eyes, scene.faces, planes, keys, count)
    image = np.zeros((3, len(eyes.x)), np.float32)
    hit = np.flatnonzero(keys != _NOTHING)
    found = keys[hit]
    block = found & 0xFFFFFFFF
    depth = (found >> 32).astype(np.int32).view(np.float32)
    solid = block < count
    room = scene.room
    where = hit[solid]
    image[:, where] = _shade_solids(
        eyes.x[where], eyes.y[where], depth[solid], block[solid], quadrics, scene.solids, room
    )
    where = hit[~solid]
    image[:, where] = _shade_faces(
        eyes.x[where],
        eyes.y[where],
        depth[~solid],
        block[~solid] - count,
        planes,
        scene.faces,
        room,
    )
    # Nothing at all where the lens does not reach.
    where = np.flatnonzero((keys == _NOTHING) & np.isfinite(eyes.x))
    image[:, where] = _shade_room(eyes, where, scene)
    return image


def _chunks(widths: Integers) -> Iterator[slice]:
    """Ranges of rows that together have about `_CHUNK` pixels."""
    ends = np.cumsum(widths)
    total = int(ends[-1]) if len(ends) else 0
    cuts = np.searchsorted(ends, np.arange(_CHUNK, total + _CHUNK, _CHUNK), "left") + 1
    first = 0
    for last in np.minimum(cuts, len(widths)).tolist():
        if last > first:
            yield slice(first, last)
            first = last


@dataclass(frozen=True, eq=False)
class _Rows:
    """Stretches of pixels in the blocks' rows."""

    block: Integers
    view: Integers
    y: Integers
    first: Integers
    width: Integers

    @classmethod
    def of(cls, boxes: Integers, seen: Flags) -> _Rows:
        """All rows of boxes [C, N, 4] that are seen [C, N]; blocks are numbered along C, N."""
        blocks = np.flatnonzero(seen)
        x0, y0, x1, y1 = boxes.reshape(-1, 4)[blocks].T
        height = y1 - y0
        start = np.cumsum(height) - height
        which = np.repeat(np.arange(len(blocks)), height)
        y = np.arange(len(which)) - start[which] + y0[which]
        block = blocks[which]
        return cls(block, block // seen.shape[1], y, x0[which], (x1 - x0)[which])

    def narrowed(self, first: Integers, last: Integers) -> _Rows:
        """Those of which something is left between two columns, ends exclusive."""
        first = np.maximum(first, self.first)
        width = np.minimum(last, self.first + self.width) - first
        kept = np.flatnonzero(width > 0)
        return _Rows(self.block[kept], self.view[kept], self.y[kept], first[kept], width[kept])

    def pixels(self, eyes: Eyes) -> Iterator[tuple[Integers, Integers]]:
        """Pixels of the flat image and the rows' blocks, repeated, in portions."""
        place = (self.view * eyes.height + self.y) * eyes.width + self.first
        for part in _chunks(self.width):
            width = self.width[part]
            shift = place[part] - (np.cumsum(width) - width)
            pixel = np.repeat(shift, width)
            pixel += np.arange(len(pixel))
            yield pixel, np.repeat(self.block[part], width)


def _keep_nearest(keys: Integers, pixel: Integers, t: Floats, block: Integers) -> None:
    # Positive floats are in the order of their bits.
    found = t.view(np.int32).astype(np.int64)
    found <<= 32
    found |= block
    np.minimum.at(keys, pixel, found)


def _draw_solids(eyes: Eyes, solids: Solids, quadrics: _Quadrics, keys: Integers) -> None:
    low, high = solids.low, solids.high
    choice = np.array([[i, j, k] for i in (0, 1) for j in (0, 1) for k in (0, 1)], bool)
    corners = np.where(choice, high[:, None], low[:, None])  # [N, 8, 3]
    world = solids.origin[:, None] + np.einsum("npi,nij->npj", corners, solids.axes)
    seen_from = np.einsum("cij,cnpj->cnpi", eyes.R, world - eyes.centres[:, None, None])
    boxes, seen = eyes.bounds(seen_from)
    rows = _Rows.of(boxes, seen)
    S = quadrics.S.reshape(-1, 3, 3)
    if eyes.cameras.distortion is None:
        rows = _silhouette(eyes, rows, S)
    table = np.stack(
        [S[:, 0, 0], 2 * S[:, 0, 1], 2 * S[:, 0, 2], S[:, 1, 1], 2 * S[:, 1, 2], S[:, 2, 2],
         *quadrics.b.reshape(-1, 3).T, quadrics.c.reshape(-1),
         *quadrics.axes.reshape(-1, 3, 3)[:, 2].T, quadrics.start.reshape(-1, 3)[:, 2],
         *np.tile(solids.cut, (len(eyes.centres), 1)).T]
    ).astype(np.float32)  # fmt: skip
    for pixel, block in rows.pixels(eyes):
        x, y = eyes.x[pixel], eyes.y[pixel]
        s = [column[block] for column in table]
        discriminant = (s[0] * x + s[1] * y + s[2]) * x + (s[3] * y + s[4]) * y + s[5]
        b = s[6] * x + s[7] * y + s[8]
        # Comparisons with NaN, of pixels that the lens does not reach, are False.
        with np.errstate(divide="ignore", invalid="ignore"):
            t = s[9] / (np.sqrt(np.maximum(discriminant, 0)) - b)
            z = s[13] + t * (s[10] * x + s[11] * y + s[12])
        met = (discriminant >= 0) & (t > _NEAR) & (z >= s[14]) & (z <= s[15])
        met = np.flatnonzero(met)
        _keep_nearest(keys, pixel[met], t[met], block[met])


def _silhouette(eyes: Eyes, rows: _Rows, S: Array) -> _Rows:
    """Cuts rows of pinhole views to where the discriminant is positive, if that is a stretch."""
    K = eyes.cameras.K.numpy()[rows.view]
    y = (rows.y - K[:, 1, 2]) / K[:, 1, 1]
    form = S[rows.block]
    square = form[:, 0, 0]
    half = form[:, 0, 1] * y + form[:, 0, 2]
    constant = (form[:, 1, 1] * y + 2 * form[:, 1, 2]) * y + form[:, 2, 2]
    root = half * half - square * constant
    convex = square < 0
    divisor = np.where(convex, square, -1.0)
    spread = np.sqrt(np.maximum(root, 0)) / -divisor
    middle = half / -divisor
    ends = [(middle + s * spread) * K[:, 0, 0] + K[:, 0, 2] for s in (-1, 1)]
    first, last = (np.clip(end, -1, eyes.width) for end in ends)
    start = np.where(convex, np.ceil(first), 0).astype(np.int64)
    end = np.where(convex, np.floor(last) + 1, eyes.width).astype(np.int64)
    return rows.narrowed(start, np.where(convex & (root < 0), 0, end))


def _draw_faces(eyes: Eyes, faces: Faces, planes: Array, keys: Integers, first_block: int) -> None:
    if not len(faces):
        return
    signs = np.array([[-1, -1], [-1, 1], [1, 1], [1, -1]], np.float64)
    corners = faces.origin[:, None] + np.einsum(
        "pk,kmi->mpi", signs, np.stack([faces.u, faces.v])
    )  # [M, 4, 3]
    seen_from = np.einsum("cij,cmpj->cmpi", eyes.R, corners - eyes.centres[:, None, None])
    boxes, seen = eyes.bounds(seen_from)
    # w vanishes for faces seen from behind.
    rows = _Rows.of(boxes, seen & planes[:, :, 0].any(-1))
    table = planes.reshape(-1, 9).T.astype(np.float32)
    for pixel, block in rows.pixels(eyes):
        x, y = eyes.x[pixel], eyes.y[pixel]
        w, p, q = (
            table[k][block] * x + table[k + 1][block] * y + table[k + 2][block] for k in (0, 3, 6)
        )
        met = np.flatnonzero(
            (np.abs(p) <= w) & (np.abs(q) <= w) & (w > 0) & (w < np.float32(1 / _NEAR))
        )
        _keep_nearest(keys, pixel[met], 1 / w[met], block[met] + first_block)


def _shade_solids(
    x: Floats,
    y: Floats,
    t: Floats,
    block: Integers,
    quadrics: _Quadrics,
    solids: Solids,
    room: Room,
) -> Floats:
    views = len(quadrics.c)
    light = solids.axes @ room.light
    per_solid = np.concatenate(
        [solids.quadric[:, :4], light, solids.axes[:, :, 2], solids.texture], 1
    )
    table = np.concatenate(
        [
            quadrics.axes.reshape(-1, 9),
            quadrics.start.reshape(-1, 3),
            np.tile(per_solid, (views, 1)),
        ],
        1,
    )
    s = table.T.astype(np.float32).take(block, 1)
    px, py, pz = (s[9 + k] + t * (s[3 * k] * x + s[3 * k + 1] * y + s[3 * k + 2]) for k in range(3))
    nx, ny, nz = s[12] * px, s[13] * py, s[14] * pz + s[15] * np.float32(0.5)
    scale = 1 / np.sqrt(nx * nx + ny * ny + nz * nz + np.float32(1e-20))
    lit = np.maximum((nx * s[16] + ny * s[17] + nz * s[18]) * scale, 0)
    upward = (nx * s[19] + ny * s[20] + nz * s[21]) * scale
    # Light from the ceiling and less of it from the floor.
    bright = np.float32(room.ambient) * (np.float32(0.85) + np.float32(0.2) * upward)
    bright += np.float32(room.diffuse) * lit
    return _texture(s[22 : 22 + TEXTURE], px + np.float32(0.7) * py, pz, bright)


def _shade_faces(
    x: Floats, y: Floats, t: Floats, block: Integers, planes: Array, faces: Faces, room: Room
) -> Floats:
    views = len(planes)
    normal = np.cross(faces.u, faces.v)
    normal = normal / np.linalg.norm(normal, axis=-1, keepdims=True)
    bright = room.ambient * (0.85 + 0.2 * normal[:, 2])
    bright = bright + room.diffuse * np.clip(normal @ room.light, 0, None)
    sides = [np.linalg.norm(edge, axis=-1) for edge in (faces.u, faces.v)]
    per_face = np.concatenate([np.stack([*sides, bright], 1), faces.texture], 1)
    table = np.concatenate([planes[:, :, 1:].reshape(-1, 6), np.tile(per_face, (views, 1))], 1)
    s = table.T.astype(np.float32).take(block, 1)
    u, v = (t * s[6 + k] * (s[3 * k] * x + s[3 * k + 1] * y + s[3 * k + 2]) for k in range(2))
    return _texture(s[9 : 9 + TEXTURE], u, v, s[8])


def _shade_room(eyes: Eyes, where: Integers, scene: Scene) -> Floats:
    """Floor, walls and ceiling, seen from inside."""
    room = scene.room
    x, y = eyes.x[where], eyes.y[where]
    view = where // (eyes.width * eyes.height)
    R, centres = eyes.R.astype(np.float32), eyes.centres.astype(np.float32)
    d = [R[:, 0, k][view] * x + R[:, 1, k][view] * y + R[:, 2, k][view] for k in range(3)]
    o = [centres[:, k][view] for k in range(3)]
    half = room.half.astype(np.float32)
    with np.errstate(divide="ignore"):
        tx = (np.copysign(half[0], d[0]) - o[0]) / d[0]
        ty = (np.copysign(half[1], d[1]) - o[1]) / d[1]
        tz = (np.where(d[2] > 0, half[2], np.float32(0)) - o[2]) / d[2]
    t = np.minimum(np.minimum(tx, ty), tz)
    px, py, pz = (o[k] + t * d[k] for k in range(3))
    level, wall_x = t == tz, tx < ty
    surface = np.where(
        level, np.where(d[2] > 0, 4, 5), np.where(wall_x, np.where(d[0] > 0, 0, 1), 0)
    )
    surface += np.where(level | wall_x, 0, np.where(d[1] > 0, 2, 3))
    inward = np.array(
        [[-1, 0, 0], [1, 0, 0], [0, -1, 0], [0, 1, 0], [0, 0, -1], [0, 0, 1]], np.float64
    )
    bright = room.ambient + 0.7 * room.diffuse * np.clip(inward @ room.light, 0, None)
    s = room.textures.T.astype(np.float32).take(surface, 1)
    u = np.where(level | ~wall_x, px, py)
    v = np.where(level, py, pz)
    shade = bright.astype(np.float32)[surface]
    # Corners are darker than the middle of the room.
    far = (px * px + py * py) / np.float32((half[:2] ** 2).sum())
    shade = shade * (np.float32(1.05) - np.float32(0.3) * far)
    floor = np.flatnonzero(surface == 5)
    for sx, sy, radius in scene.shadows.astype(np.float32):
        away = (px[floor] - sx) ** 2 + (py[floor] - sy) ** 2
        shade[floor] *= 1 - np.float32(0.5) * np.exp(-away / (radius * radius))
    return _texture(s, u, v, shade)


def _texture(s: Floats, u: Floats, v: Floats, bright: Floats) -> Floats:
    """[3, n], colours of points u, v of textures [TEXTURE, n], lit by [n]."""
    wave = np.sin(s[6] * u + s[7] * v + s[8]) * np.sin(s[9] * u + s[10] * v + s[11])
    share = np.clip(np.float32(0.5) + s[12] * wave, 0, 1)
    cell_u, cell_v = ((s[14] * c).astype(np.int32) & 63 for c in (u, v))
    shade = bright * (1 + s[13] * _GRAIN[cell_u * 64 + cell_v])
    result: Floats = (s[0:3] + share * (s[3:6] - s[0:3])) * shade
    return result


def first_depths(eyes: Eyes, scene: Scene, rays: Array) -> tuple[Array, Array]:
    """Where single rays meet the shapes, in float64.

    Args:
        eyes: C cameras.
        scene: The shapes; the room hides nothing.
        rays: [C, J, 2], ideal normalised coordinates.

    Returns:
        Depths [C, J, N] of the solids and [C, J, M] of the faces, mm; inf where there are none.
    """
    d = np.concatenate([rays, np.ones_like(rays[..., :1])], -1)
    quadrics = _Quadrics.of(eyes.R, eyes.centres, scene.solids)
    discriminant = np.einsum("cji,cnik,cjk->cjn", d, quadrics.S, d)
    b = np.einsum("cji,cni->cjn", d, quadrics.b)
    with np.errstate(divide="ignore", invalid="ignore"):
        t = quadrics.c[:, None] / (np.sqrt(np.maximum(discriminant, 0)) - b)
        z = quadrics.start[:, None, :, 2] + t * np.einsum("cji,cni->cjn", d, quadrics.axes[:, :, 2])
        cut = scene.solids.cut
        met = (discriminant >= 0) & (t > _NEAR) & (z >= cut[:, 0]) & (z <= cut[:, 1])
        w, p, q = np.einsum(
            "cji,cmki->kcjm", d, _plane_coefficients(eyes.R, eyes.centres, scene.faces)
        )
        on = (np.abs(p) <= w) & (np.abs(q) <= w) & (w > 0)
        return np.where(met, t, np.inf), np.where(on, 1 / np.where(on, w, 1.0), np.inf)
