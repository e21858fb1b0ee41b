# SPDX-License-Identifier: Apache-2.0
"""Scenes to unproject and point sets to align: plain generators and hypothesis strategies.

Plain NumPy, seeded throughout, as in rigs.py; world units are millimetres. Nothing is square.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import rigs
from hypothesis import strategies as st

Array = npt.NDArray[Any]
Grid = tuple[Array, Array, tuple[int, int, int]]  # origin [B, 3], axes [B, 3, 3], (X, Y, Z)

AGGREGATIONS = ("sum", "mean", "softmax", "max")
OUTSIDE = ("zeros", "exclude")
SAMPLINGS = ("center", "official")


# --- scenes to unproject -------------------------------------------------------------------------


@dataclass(frozen=True)
class Unprojection:
    """The arguments of `unproject`."""

    features: Array  # [B, C, K, H, W]
    projections: Array  # [B, C, 3, 4]
    grid: Grid | Array  # a frame or points [B, ..., 3]
    confidences: Array | None = None  # [B, C] or [B, C, K]
    aggregation: Any = "softmax"
    outside: Any = "zeros"
    sampling: Any = "center"

    @property
    def arguments(self) -> tuple[Array, Array, Grid | Array]:
        """What is given by position."""
        return self.features, self.projections, self.grid

    @property
    def options(self) -> dict[str, Any]:
        """What is given by name."""
        return {
            "aggregation": self.aggregation,
            "confidences": self.confidences,
            "outside": self.outside,
            "sampling": self.sampling,
        }

    @property
    def batch(self) -> int:
        """B of the result."""
        origin = self.grid[0] if isinstance(self.grid, tuple) else self.grid
        w = self.features if self.confidences is None else self.confidences
        sizes = {len(a) for a in (self.features, self.projections, origin, w)} - {1}
        return sizes.pop() if sizes else 1

    @property
    def points(self) -> Array:
        """[B, X, Y, Z, 3] or [B, ..., 3], B being 1 for a shared grid."""
        if not isinstance(self.grid, tuple):
            return self.grid
        origin, axes, size = self.grid
        index = np.moveaxis(np.indices(size, dtype=np.float64), 0, -1)
        return np.asarray(origin[:, None, None, None] + np.einsum("xyzn,bnd->bxyzd", index, axes))

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the result: [B, K, X, Y, Z] or [B, K, ...]."""
        return self.batch, self.features.shape[2], *self.points.shape[1:-1]

    def astype(self, dtype: npt.DTypeLike) -> Unprojection:
        """Round every array to a dtype."""
        grid = self.grid
        if isinstance(grid, tuple):
            grid = (grid[0].astype(dtype), grid[1].astype(dtype), grid[2])
        else:
            grid = grid.astype(dtype)
        return replace(
            self,
            features=self.features.astype(dtype),
            projections=self.projections.astype(dtype),
            grid=grid,
            confidences=None if self.confidences is None else self.confidences.astype(dtype),
        )

    def pixels(self) -> tuple[Array, Array]:
        """Project every voxel: pixels [B, C, ..., 2] as sampled, depths [B, C, ...]."""
        height, width = self.features.shape[-2:]
        points = self.points
        flat = points.reshape(len(points), 1, -1, 3)
        p = self.projections[:, :, None]
        h = (p[..., :3] * flat[..., None, :]).sum(-1) + p[..., 3]
        with np.errstate(all="ignore"):
            pixels = h[..., :2] / h[..., 2:]
        if self.sampling == "official":
            pixels = pixels * [(width - 1) / height, (height - 1) / width]
        shape = (*h.shape[:2], *points.shape[1:-1])
        return pixels.reshape(*shape, 2), h[..., 2].reshape(shape)

    def clear(self, margin: float = 0.1) -> Array:
        """Tell which voxels are away from what makes the result or its gradient jump.

        Args:
            margin: least distance in pixels from the borders of cells (at integer x or y, from -1
                to the map's size), in every view; a hundredth of it, relative to the largest
                depth, from depth 0.

        Returns:
            [B, 1, ...], to be multiplied with a gradient that comes in.
        """
        height, width = self.features.shape[-2:]
        pixels, depth = self.pixels()
        with np.errstate(all="ignore"):
            far = np.abs(pixels - np.round(pixels)) >= margin
            beside = (pixels < -1.0 - margin) | (pixels > np.array([width, height]) + margin)
            fine = far.all(-1) | beside.any(-1) | (depth < 0.0)
            fine &= np.abs(depth) >= 0.01 * margin * np.abs(depth).max(initial=0.0)
        clear = fine.all(1)[:, None]
        return np.asarray(np.broadcast_to(clear, (self.batch, *clear.shape[1:])))


def unprojection(
    rng: np.random.Generator,
    *,
    batch: Sequence[int] = (1, 1, 1, 1),
    views: int = 3,
    channels: int = 2,
    map_size: tuple[int, int] = (7, 10),
    size: Sequence[int] = (3, 4, 5),
    frame: bool = True,
    confidences: str | None = None,
    zero_confidences: float = 0.0,
    noise: float = 1.0,
    **options: Any,
) -> Unprojection:
    """Look at a volume from around it, and from within.

    Most voxels are in most maps, some beside them or less than a pixel from the border, some behind
    a camera.

    Args:
        rng: of everything drawn.
        batch: B, 1 or the common one, of features, projections, grid and confidences.
        views: C.
        channels: K.
        map_size: (H, W).
        size: (X, Y, Z), or the shape of a set of points.
        frame: whether the grid is a frame; points otherwise.
        confidences: None, "views" for [B, C], "channels" for [B, C, K].
        zero_confidences: share of confidences that are 0.
        noise: standard deviation of the features.
        **options: aggregation, outside, sampling.

    Returns:
        The scene.
    """
    height, width = map_size
    features = noise * rng.standard_normal((batch[0], views, channels, height, width))
    projections = np.stack([_around(rng, views, width, height) for _ in range(batch[1])])
    side = rigs.BOX_HIGH - rigs.BOX_LOW
    grid: Grid | Array
    if frame:
        # A turned, stretched and slightly sheared box around the middle of the volume.
        axes = rotations(rng, (batch[2],)) * rng.uniform(0.6, 1.2, (batch[2], 3, 1))
        axes = (axes + 0.1 * rng.standard_normal(axes.shape)) * 1500.0 / np.array(size)[:, None]
        middle = rigs.BOX_CENTER + rng.uniform(-100.0, 100.0, (batch[2], 3))
        origin = middle - ((np.array(size)[:, None] - 1) / 2 * axes).sum(-2)
        grid = (origin, axes, (size[0], size[1], size[2]))
    else:
        grid = rigs.BOX_LOW + side * rng.uniform(size=(batch[2], *size, 3))
    w = None
    if confidences is not None:
        shape = (batch[3], views) if confidences == "views" else (batch[3], views, channels)
        w = rng.uniform(0.05, 1.0, shape) * (rng.uniform(size=shape) >= zero_confidences)
    return Unprojection(features, projections, grid, w, **options)


def _around(rng: np.random.Generator, views: int, width: int, height: int) -> Array:
    """Draw projections [C, 3, 4] of cameras around the volume, one in five amid it."""
    azimuth, elevation = rng.uniform(0.0, 2.0 * np.pi, views), rng.uniform(-0.3, 0.9, views)
    amid = rng.uniform(size=views) < 0.2
    distance = np.where(amid, rng.uniform(300.0, 800.0, views), rng.uniform(2500.0, 6000.0, views))
    direction = np.stack(
        [
            np.cos(elevation) * np.cos(azimuth),
            np.cos(elevation) * np.sin(azimuth),
            np.sin(elevation),
        ],
        axis=-1,
    )
    # The volume, some 2 m wide, fills a half to all of the map.
    focal = rng.uniform(0.5, 1.2, views) * width * np.maximum(distance, 1500.0) / 2000.0
    rig = rigs.look_at(
        rigs.BOX_CENTER + distance[:, None] * direction,
        rigs.BOX_CENTER + rng.uniform(-150.0, 150.0, (views, 3)),
        focal=focal,
        image_size=(width, height),
        roll=rng.uniform(-0.5, 0.5, views),
    )
    return rig.projections


@st.composite
def unprojections(
    draw: st.DrawFn,
    *,
    max_batch: int = 3,
    max_views: int = 5,
    max_channels: int = 4,
    max_size: int = 6,
    aggregations: Sequence[str] = AGGREGATIONS,
    outside: Sequence[str] = OUTSIDE,
    samplings: Sequence[str] = SAMPLINGS,
) -> Unprojection:
    """Generate scenes, with shared and own operands, frames and points, confidences of 0."""
    common = draw(st.integers(1, max_batch))
    batch = [draw(st.sampled_from([1, common])) for _ in range(4)]
    height, width = draw(rigs.map_shapes(2, max_size=12))
    frame = draw(st.booleans())
    sizes = st.integers(1, max_size)
    rank = 3 if frame else draw(st.integers(0, 3))
    size = draw(st.lists(sizes, min_size=rank, max_size=rank))
    kind = draw(st.sampled_from([None, "views", "channels"]))
    return unprojection(
        draw(rigs.generators()),
        batch=batch,
        views=draw(st.integers(1, max_views)),
        channels=draw(st.integers(1, max_channels)),
        map_size=(height, width),
        size=size,
        frame=frame,
        confidences=kind,
        zero_confidences=draw(st.sampled_from([0.0, 0.3, 1.0])),
        noise=draw(st.sampled_from([1.0, 0.0, 30.0])),
        aggregation=draw(st.sampled_from(list(aggregations))),
        outside=draw(st.sampled_from(list(outside))),
        sampling=draw(st.sampled_from(list(samplings))),
    )


# --- point sets to align -------------------------------------------------------------------------


@dataclass(frozen=True)
class PointSets:
    """Arguments of `rigid_align`, and the motion that was applied."""

    kind: str
    source: Array  # [..., N, 3]
    target: Array  # [..., N, 3]
    weights: Array | None  # [..., N]
    rotation: Array  # [..., 3, 3]; not a solution where the target is reflected
    translation: Array  # [..., 3]
    scale: Array  # [...]
    reflected: bool = False

    @property
    def arguments(self) -> tuple[Array, Array, Array | None]:
        """What is given by position."""
        return self.source, self.target, self.weights

    def astype(self, dtype: npt.DTypeLike) -> PointSets:
        """Round the arguments to a dtype."""
        return replace(
            self,
            source=self.source.astype(dtype),
            target=self.target.astype(dtype),
            weights=None if self.weights is None else self.weights.astype(dtype),
        )


SHAPES = ("cloud", "planar", "nearly collinear", "cube", "simplex", "three points")
UNALIGNABLE = (
    "no point",
    "one point",
    "two points",
    "all weights zero",
    "one weight not zero",
    "two points not NaN",
    "all equal",
    "one source line",
    "one target line",
    "reflected cube",
    "reflected prism",
    "NaN weight",
    "negative weight",
    "infinite weight",
    "infinite coordinate",
)


def rotations(rng: np.random.Generator, shape: tuple[int, ...] = ()) -> Array:
    """Draw rotation matrices [..., 3, 3], uniformly."""
    q, r = np.linalg.qr(rng.standard_normal((*shape, 3, 3)))
    q = q * np.sign(np.diagonal(r, axis1=-2, axis2=-1))[..., None, :]
    return np.asarray(q * np.linalg.det(q)[..., None, None])


def point_shape(kind: str, rng: np.random.Generator, count: int, batch: tuple[int, ...]) -> Array:
    """Draw points [..., N, 3] some 500 mm around the origin; N is that of the shape or `count`."""
    if kind == "cube":
        points = np.stack(np.meshgrid(*[[-1.0, 1.0]] * 3), -1).reshape(8, 3)
        return 400.0 * np.broadcast_to(points, (*batch, 8, 3)) @ rotations(rng, batch)
    if kind == "simplex":
        points = np.array([[1.0, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]])
        return 400.0 * np.broadcast_to(points, (*batch, 4, 3)) @ rotations(rng, batch)
    extent = {"planar": [500.0, 300.0, 0.0], "nearly collinear": [500.0, 10.0, 5.0]}
    count = 3 if kind == "three points" else count
    cloud = rng.standard_normal((*batch, count, 3)) * extent.get(kind, [500.0, 400.0, 300.0])
    return np.asarray(cloud @ rotations(rng, batch))


def point_sets(
    kind: str,
    rng: np.random.Generator,
    *,
    count: int = 17,
    batch: tuple[int, ...] = (),
    noise: float = 0.0,
    reflect: bool = False,
    scaled: bool = False,
    weights: rigs.WeightKind | None = None,
    absent: float = 0.0,
) -> PointSets:
    """Move one of SHAPES.

    Args:
        kind: of SHAPES.
        rng: of everything drawn.
        count: N of a cloud and of planar and nearly collinear points.
        batch: of the sets.
        noise: standard deviation added to the target, mm.
        reflect: whether the target is mirrored.
        scaled: whether a scale in 0.5..2 is part of the motion.
        weights: None, or how they spread.
        absent: share of points that are absent, by weight 0 (if there are weights) or NaN; three
            of them always stay.

    Returns:
        The two sets. Mirrored cubes and simplices determine no rotation without noise.
    """
    shape = point_shape(kind, rng, count, batch)
    place = rng.uniform(-3000.0, 3000.0, (*batch, 3))
    source = shape + place[..., None, :]
    mirrored = shape * [1.0, 1.0, -1.0] if reflect else shape
    rotation = rotations(rng, batch)
    scale = rng.uniform(0.5, 2.0, batch) if scaled else np.ones(batch)
    center = rng.uniform(-3000.0, 3000.0, (*batch, 3))
    target = scale[..., None, None] * np.einsum("...ij,...nj->...ni", rotation, mirrored)
    target = target + center[..., None, :] + noise * rng.standard_normal(shape.shape)
    translation = center - scale[..., None] * np.einsum("...ij,...j->...i", rotation, place)
    w = None if weights is None else rigs.draw_weights(rng, source.shape[:-1], weights)

    dropped = (rng.uniform(size=source.shape[:-1]) < absent) & (np.arange(shape.shape[-2]) >= 3)
    junk = 1e4 * rng.standard_normal(source.shape)
    if w is None:
        source = np.where(dropped[..., None], np.nan, source)
    else:
        by_nan = dropped & (rng.uniform(size=dropped.shape) < 0.5)
        w = np.where(dropped & ~by_nan, 0.0, w)
        target = np.where(by_nan[..., None], np.nan, np.where(dropped[..., None], junk, target))
    return PointSets(kind, source, target, w, rotation, translation, scale, reflect)


@st.composite
def alignments(
    draw: st.DrawFn, *, kinds: Sequence[str] = SHAPES, max_noise: float = 100.0
) -> PointSets:
    """Generate point sets that determine a motion, reflected ones among them if noise is."""
    kind = draw(st.sampled_from(list(kinds)))
    noise = draw(st.sampled_from([0.0, 0.01 * max_noise, max_noise]))
    solid = kind in ("cloud", "planar")
    return point_sets(
        kind,
        draw(rigs.generators()),
        count=draw(st.integers(4, 20)),
        batch=draw(rigs.batch_shapes()),
        noise=noise if solid else min(noise, 1.0),
        reflect=solid and draw(st.booleans()),
        scaled=draw(st.booleans()),
        weights=draw(st.sampled_from([None, "one", "uniform", "log"])) if solid else None,
        absent=draw(st.sampled_from([0.0, 0.3])) if solid else 0.0,
    )


def unalignable(reason: str, rng: np.random.Generator) -> PointSets:
    """Draw two sets of points that determine no motion, for one of UNALIGNABLE."""
    counts = {"no point": 0, "one point": 1, "two points": 2}
    kind = "cube" if reason in ("reflected cube", "reflected prism") else "cloud"
    sets = point_sets(
        kind, rng, count=counts.get(reason, 6), reflect=reason.startswith("reflected")
    )
    source, target = sets.source.copy(), sets.target.copy()
    count = len(source)
    weights = np.ones(count) if kind == "cube" else rng.uniform(0.05, 1.0, count)
    point = rng.integers(count) if count else 0
    line = np.linspace(0.0, 700.0, count)[:, None] * rotations(rng)[0]
    if reason == "all weights zero":
        weights[:] = 0.0
    elif reason == "one weight not zero":
        weights[np.arange(count) != point] = 0.0
    elif reason == "two points not NaN":
        source[2:4, rng.integers(3)] = target[4:, rng.integers(3)] = np.nan
    elif reason == "all equal":
        source[:] = source[0]
    elif reason == "one source line":
        source = source[0] + line
    elif reason == "one target line":
        target = target[0] + line
    elif reason == "reflected prism":
        box = np.stack(np.meshgrid([-900.0, 900.0], *[[-300.0, 300.0]] * 2), -1).reshape(8, 3)
        source, target = box, -box @ rotations(rng)
    elif reason == "NaN weight":
        weights[point] = np.nan
    elif reason == "negative weight":
        weights[point] *= -1.0
    elif reason == "infinite weight":
        weights[point] = np.inf
    elif reason == "infinite coordinate":
        (source, target)[rng.integers(2)][point, rng.integers(3)] = np.inf
    return replace(sets, kind=reason, source=source, target=target, weights=weights)
