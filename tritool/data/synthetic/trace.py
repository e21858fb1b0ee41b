# SPDX-License-Identifier: Apache-2.0
"""What rays meet: quadrics and parallelograms, for all pixels of all views at once.

A pixel's ray is `centre + t R^T (x, y, 1)`, with ideal normalised coordinates x and y, so t is the
depth. What it meets of a quadric follows from polynomials in x and y, whose coefficients are worked
out once for each pair of view and shape (a "block"): half of the linear coefficient in t,
`b . (x, y, 1)`, and the discriminant `(x, y, 1) S (x, y, 1)^T`; with the constant c the ray enters
at `t = c / (sqrt(discriminant) - b)`, also where cones have a second half. All pixels of all blocks
stand in one flat list, and the nearest block of every pixel is kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

import numpy as np

from tritool.data.synthetic.eyes import NEAR, Eyes, Floats, Integers
from tritool.data.synthetic.shapes import Array, Faces, Flags, Solids, cross

__all__ = ["NOTHING", "Quadrics", "first_depths", "keep_faces", "keep_solids", "plane_forms"]

NOTHING = np.iinfo(np.int64).max
"""The key of a pixel whose ray meets no shape."""

_CHUNK = 1 << 15  # pixels at a time: a few arrays of them stay in the cache


@dataclass(frozen=True, eq=False)
class Quadrics:
    """Coefficients of C views of N quadrics, float64: see the module's text."""

    axes: Array  # [C, N, 3, 3]: own coordinates of a ray's point are start + t axes (x, y, 1)
    start: Array  # [C, N, 3]
    S: Array  # [C, N, 3, 3]
    b: Array  # [C, N, 3]
    c: Array  # [C, N]

    @classmethod
    def of(cls, R: Array, centres: Array, solids: Solids) -> Quadrics:
        """Works them out for cameras turned by R [C, 3, 3] at centres [C, 3]."""
        axes = np.einsum("nij,ckj->cnik", solids.axes, R)
        start = np.einsum("nij,cnj->cni", solids.axes, centres[:, None] - solids.origin)
        square, linear, constant = solids.quadric[:, :3], solids.quadric[:, 3], solids.quadric[:, 4]
        gradient = square * start
        gradient[..., 2] += linear / 2
        b = np.einsum("cni,cnik->cnk", gradient, axes)
        c = ((gradient * start).sum(-1) + linear / 2 * start[..., 2]) + constant
        G = np.matmul((square[:, :, None] * axes).swapaxes(-1, -2), axes)
        return cls(axes, start, b[..., :, None] * b[..., None, :] - c[..., None, None] * G, b, c)


def plane_forms(R: Array, centres: Array, faces: Faces) -> Array:
    """[C, M, 3, 3]: rows w, p, q of linear forms in (x, y, 1).

    1 / t = w, the place on the face from -1 to 1 along u is p / w, along v it is q / w; w is not
    positive where the face is seen from its back.
    """
    # The point centre + t d = origin + p u + q v, solved with dual vectors of u, v, normal.
    normal = cross(faces.u, faces.v)
    area = (normal * normal).sum(-1, keepdims=True)
    dual_u, dual_v = cross(faces.v, normal) / area, cross(normal, faces.u) / area
    offset = faces.origin - centres[:, None]  # [C, M, 3]
    away = (normal * offset).sum(-1)  # negative in front
    directions = np.einsum("cki,mi->cmk", R, normal)
    w = directions / np.where(away < 0, away, -np.inf)[..., None]
    shift = [(dual * offset).sum(-1)[..., None] for dual in (dual_u, dual_v)]
    along = [np.einsum("cki,mi->cmk", R, dual) for dual in (dual_u, dual_v)]
    p, q = (each - s * w for each, s in zip(along, shift, strict=True))
    return np.stack([w, p, q], 2)


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
        return _Rows(self.block, self.view, self.y, first, width).only(width > 0)

    def only(self, which: Flags) -> _Rows:
        """Those chosen."""
        kept = np.flatnonzero(which)
        return _Rows(*(getattr(self, field.name).take(kept) for field in fields(self)))

    def pixels(self, eyes: Eyes, table: Floats) -> Iterator[tuple[Integers, Integers, Floats]]:
        """Pixels of the flat image, their blocks and the blocks' columns of a table, in portions.

        NumPy repeats more quickly than it looks up, and `take` is quicker than an index.
        """
        place = (self.view * eyes.height + self.y) * eyes.width + self.first
        for part in _chunks(self.width):
            width = self.width[part]
            shift = place[part] - (np.cumsum(width) - width)
            pixel = np.repeat(shift, width)
            pixel += np.arange(len(pixel))
            block = self.block[part]
            yield pixel, np.repeat(block, width), np.repeat(table.take(block, 1), width, 1)


def _keep_nearest(keys: Integers, pixel: Integers, t: Floats, block: Integers) -> None:
    # Positive floats are in the order of their bits.
    found = t.view(np.int32).astype(np.int64)
    found <<= 32
    found |= block
    np.minimum.at(keys, pixel, found)


def keep_solids(eyes: Eyes, solids: Solids, quadrics: Quadrics, keys: Integers) -> None:
    """Enters the nearest quadrics into the keys of the pixels.

    Args:
        eyes: C cameras.
        solids: N quadrics.
        quadrics: Their coefficients.
        keys: [C H W]: the depth's bits above, the block's number `view N + quadric` below.
    """
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
    # Ellipsoids, the most, need no look at where they are cut.
    cut = np.isfinite(solids.cut).any(-1).take(rows.block % len(solids))
    for chosen, columns in ((~cut, 10), (cut, len(table))):
        for pixel, block, s in rows.only(chosen).pixels(eyes, table[:columns]):
            x, y = eyes.x.take(pixel), eyes.y.take(pixel)
            discriminant = (s[0] * x + s[1] * y + s[2]) * x + (s[3] * y + s[4]) * y + s[5]
            b = s[6] * x + s[7] * y + s[8]
            # Comparisons with NaN, of pixels that the lens does not reach, are False.
            with np.errstate(divide="ignore", invalid="ignore"):
                t = s[9] / (np.sqrt(np.maximum(discriminant, 0)) - b)
                met = (discriminant >= 0) & (t > NEAR)
                if columns > 10:
                    z = s[13] + t * (s[10] * x + s[11] * y + s[12])
                    met &= (z >= s[14]) & (z <= s[15])
            met = np.flatnonzero(met)
            _keep_nearest(keys, pixel.take(met), t.take(met), block.take(met))


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


def keep_faces(eyes: Eyes, faces: Faces, planes: Array, keys: Integers, first_block: int) -> None:
    """Enters the nearest parallelograms, as `keep_solids` does; blocks start at `first_block`."""
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
    for pixel, block, s in rows.pixels(eyes, table):
        x, y = eyes.x.take(pixel), eyes.y.take(pixel)
        w, p, q = (s[k] * x + s[k + 1] * y + s[k + 2] for k in (0, 3, 6))
        met = np.flatnonzero(
            (np.abs(p) <= w) & (np.abs(q) <= w) & (w > 0) & (w < np.float32(1 / NEAR))
        )
        _keep_nearest(keys, pixel.take(met), 1 / w.take(met), block.take(met) + first_block)


def first_depths(eyes: Eyes, solids: Solids, faces: Faces, rays: Array) -> tuple[Array, Array]:
    """Where single rays meet the shapes, in float64.

    Args:
        eyes: C cameras.
        solids: N quadrics.
        faces: M parallelograms.
        rays: [C, J, 2], ideal normalised coordinates.

    Returns:
        Depths [C, J, N] of the solids and [C, J, M] of the faces, mm; inf where there are none.
    """
    x, y, one = rays[..., 0], rays[..., 1], np.ones_like(rays[..., 0])
    d = np.stack([x, y, one], -1)
    squares = np.stack([x * x, x * y, x, y * x, y * y, y, x, y, one], -1)
    quadrics = Quadrics.of(eyes.R, eyes.centres, solids)
    discriminant = squares @ quadrics.S.reshape(len(d), -1, 9).swapaxes(-1, -2)
    b = d @ quadrics.b.swapaxes(-1, -2)
    with np.errstate(divide="ignore", invalid="ignore"):
        t = quadrics.c[:, None] / (np.sqrt(np.maximum(discriminant, 0)) - b)
        z = quadrics.start[:, None, :, 2] + t * (d @ quadrics.axes[:, :, 2].swapaxes(-1, -2))
        cut = solids.cut
        met = (discriminant >= 0) & (t > NEAR) & (z >= cut[:, 0]) & (z <= cut[:, 1])
        w, p, q = np.einsum("cji,cmki->kcjm", d, plane_forms(eyes.R, eyes.centres, faces))
        on = (np.abs(p) <= w) & (np.abs(q) <= w) & (w > 0)
        return np.where(met, t, np.inf), np.where(on, 1 / np.where(on, w, 1.0), np.inf)
