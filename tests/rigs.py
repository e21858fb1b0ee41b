# SPDX-License-Identifier: Apache-2.0
"""Camera rigs, observations, hypothesis strategies and an exact triangulation to test against.

Plain NumPy, seeded throughout. World units are millimetres, z is up, and the volume people stand in
is the box of 2 x 2 x 1.9 m on the floor around the origin. No image is square and no map is, so
that an exchange of x and y shows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal, localcontext
from fractions import Fraction
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st

Array = npt.NDArray[Any]
WeightKind = Literal["one", "uniform", "log"]

BOX_LOW = np.array([-1000.0, -1000.0, 0.0])
BOX_HIGH = np.array([1000.0, 1000.0, 1900.0])
BOX_CENTER = (BOX_LOW + BOX_HIGH) / 2


# --- rigs ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rig:
    """C cameras, `x_cam = R X + t`, millimetres and pixels."""

    K: Array  # [C, 3, 3]
    R: Array  # [C, 3, 3]
    t: Array  # [C, 3]
    image_size: tuple[int, int]  # (W, H)

    @property
    def projections(self) -> Array:
        """[C, 3, 4], world to pixels."""
        return np.asarray(self.K @ np.concatenate([self.R, self.t[..., None]], axis=-1))

    @property
    def centers(self) -> Array:
        """[C, 3], the camera centres in the world."""
        return np.asarray(-np.einsum("cij,ci->cj", self.R, self.t))

    def __len__(self) -> int:
        return len(self.t)

    def __getitem__(self, views: slice | Sequence[int]) -> Rig:
        """Return the rig of some of the views."""
        index = np.arange(len(self))[views]
        return Rig(self.K[index], self.R[index], self.t[index], self.image_size)


def look_at(
    centers: npt.ArrayLike,
    targets: npt.ArrayLike,
    *,
    focal: npt.ArrayLike,
    image_size: tuple[int, int],
    roll: npt.ArrayLike = 0.0,
    principal_offset: npt.ArrayLike = 0.0,
) -> Rig:
    """Build a rig of upright cameras (but for `roll`, radians) that look at their targets.

    Args:
        centers: [C, 3].
        targets: [C, 3] or [3]; no target straight above or below its camera.
        focal: [C] or scalar, pixels.
        image_size: (W, H).
        roll: [C] or scalar, radians about the optical axis.
        principal_offset: [C, 2] or scalar, pixels from the image centre.

    Returns:
        The rig.
    """
    centers = np.asarray(centers, dtype=np.float64)
    forward = np.asarray(targets, dtype=np.float64) - centers
    forward /= np.linalg.norm(forward, axis=-1, keepdims=True)
    right = np.cross(forward, [0.0, 0.0, 1.0])
    right /= np.linalg.norm(right, axis=-1, keepdims=True)
    down = np.cross(forward, right)
    cos, sin = np.cos(np.asarray(roll))[..., None], np.sin(np.asarray(roll))[..., None]
    R = np.stack([cos * right + sin * down, cos * down - sin * right, forward], axis=-2)
    t = -np.einsum("cij,cj->ci", R, centers)

    K = np.zeros((len(centers), 3, 3))
    K[:, 0, 0] = K[:, 1, 1] = focal
    K[:, :2, 2] = (np.array(image_size) - 1) / 2 + np.asarray(principal_offset)
    K[:, 2, 2] = 1.0
    return Rig(K, R, t, image_size)


def ring(
    views: int,
    radius: float = 4500.0,
    *,
    height: float = 1500.0,
    focal: float = 1145.0,
    image_size: tuple[int, int] = (1280, 720),
) -> Rig:
    """Build a rig of cameras evenly around the volume, looking at its centre."""
    angle = np.linspace(0.0, 2.0 * np.pi, views, endpoint=False) + 0.3
    centers = np.stack(
        [radius * np.cos(angle), radius * np.sin(angle), np.full(views, height)], axis=-1
    )
    return look_at(centers, BOX_CENTER, focal=focal, image_size=image_size)


def h36m4() -> Rig:
    """Build four cameras in the corners of a room, 4 to 5.5 m away, like Human3.6M's."""
    angle = np.deg2rad([35.0, 142.0, 222.0, 318.0])
    distance = np.array([4000.0, 5500.0, 4600.0, 5100.0])
    centers = np.stack(
        [distance * np.cos(angle), distance * np.sin(angle), [1500.0, 1600.0, 1400.0, 1550.0]],
        axis=-1,
    )
    offset = [[12.0, 14.0], [8.0, 7.0], [19.0, 1.0], [14.0, 2.0]]
    return look_at(
        centers, BOX_CENTER, focal=1145.0, image_size=(1000, 1002), principal_offset=offset
    )


def h36m2() -> Rig:
    """Build two neighbouring cameras of `h36m4`."""
    return h36m4()[:2]


def parallel_pair(distance: float, baseline: float = 100.0) -> Rig:
    """Build two cameras side by side with parallel axes, at a distance from the volume."""
    shift = np.array([[-baseline / 2, 0.0, 0.0], [baseline / 2, 0.0, 0.0]])
    targets = BOX_CENTER + shift
    return look_at(targets - [0.0, distance, 0.0], targets, focal=1145.0, image_size=(1000, 1002))


def par2() -> Rig:
    """Build a stereo pair, 100 mm apart at 5 m."""
    return parallel_pair(5000.0)


def far2() -> Rig:
    """Build a stereo pair, 100 mm apart at 50 m: the worst rig that still means something."""
    return parallel_pair(50000.0)


def pan31() -> Rig:
    """Build 31 cameras on a dome of 2.8 m, like Panoptic's high-definition ones."""
    k = np.arange(31)
    z = 0.05 + 0.85 * (k + 0.5) / 31
    angle = k * np.pi * (3.0 - np.sqrt(5.0))  # the golden angle spreads them evenly
    horizontal = np.sqrt(1.0 - z**2)
    direction = np.stack([horizontal * np.cos(angle), horizontal * np.sin(angle), z], axis=-1)
    return look_at(
        BOX_CENTER + 2800.0 * direction, BOX_CENTER, focal=1400.0, image_size=(1920, 1080)
    )


RIGS: dict[str, Callable[[], Rig]] = {
    "h36m4": h36m4,
    "h36m2": h36m2,
    "par2": par2,
    "far2": far2,
    "pan31": pan31,
}


# --- observations --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Observations:
    """What the cameras of a rig see of N points: the arguments of `triangulate`, and the truth."""

    truth: Array  # [N, 3], mm
    points: Array  # [N, C, 2], pixels
    projections: Array  # [C, 3, 4]
    weights: Array  # [N, C]


def observe(
    rig: Rig, count: int, *, noise: float = 0.0, weights: WeightKind = "one", seed: int = 0
) -> Observations:
    """Draw points in the box and project them.

    Args:
        rig: the cameras.
        count: number of points.
        noise: standard deviation in pixels, per coordinate.
        weights: all 1, uniform in 0.05..1, or log-uniform in 1e-6..1.
        seed: of everything drawn.

    Returns:
        The observations.
    """
    rng = np.random.default_rng(seed)
    truth = rng.uniform(BOX_LOW, BOX_HIGH, size=(count, 3))
    x = np.einsum("cij,nj->nci", rig.projections[..., :3], truth) + rig.projections[..., 3]
    points = x[..., :2] / x[..., 2:] + noise * rng.standard_normal((count, len(rig), 2))
    return Observations(
        truth, points, rig.projections, draw_weights(rng, (count, len(rig)), weights)
    )


def draw_weights(rng: np.random.Generator, shape: tuple[int, ...], kind: WeightKind) -> Array:
    """Draw positive weights of one of three spreads."""
    if kind == "one":
        return np.ones(shape)
    if kind == "uniform":
        return rng.uniform(0.05, 1.0, size=shape)
    return np.asarray(10.0 ** rng.uniform(-6.0, 0.0, size=shape))


# --- strategies ----------------------------------------------------------------------------------


def generators() -> st.SearchStrategy[np.random.Generator]:
    """Generate seeded generators, for what hypothesis has no need to shrink."""
    return st.integers(0, 2**32 - 1).map(np.random.default_rng)


@st.composite
def rigs(draw: st.DrawFn, *, min_views: int = 2, max_views: int = 6, crowd: bool = True) -> Rig:
    """Generate rigs that look roughly at the volume, all of it in front; sometimes 31 views."""
    crowded = crowd and draw(st.integers(0, 9)) == 9
    views = 31 if crowded else draw(st.integers(min_views, max_views))
    rng = draw(generators())
    azimuth = rng.uniform(0.0, 2.0 * np.pi, views)
    elevation = rng.uniform(-0.2, 1.1, views)
    distance = rng.uniform(3000.0, 8000.0, views)
    direction = np.stack(
        [
            np.cos(elevation) * np.cos(azimuth),
            np.cos(elevation) * np.sin(azimuth),
            np.sin(elevation),
        ],
        axis=-1,
    )
    return look_at(
        BOX_CENTER + distance[:, None] * direction,
        BOX_CENTER + rng.uniform(-250.0, 250.0, (views, 3)),
        focal=rng.uniform(600.0, 2000.0, views),
        image_size=draw(st.sampled_from([(1000, 1002), (1920, 1080), (640, 480)])),
        roll=rng.uniform(-np.pi, np.pi, views) * draw(st.sampled_from([0.0, 1.0])),
        principal_offset=rng.uniform(-30.0, 30.0, (views, 2)),
    )


@st.composite
def observations(
    draw: st.DrawFn,
    *,
    max_points: int = 6,
    min_views: int = 2,
    max_noise: float = 5.0,
    kinds: Sequence[WeightKind] = ("one", "uniform", "log"),
) -> tuple[Rig, Observations]:
    """Generate a rig and what it sees of one or more points."""
    rig = draw(rigs(min_views=min_views))
    noise = draw(st.sampled_from([0.0, 0.1 * max_noise, max_noise]))
    kind = draw(st.sampled_from(list(kinds)))
    count = draw(st.integers(1, max_points))
    seed = draw(st.integers(0, 2**32 - 1))
    return rig, observe(rig, count, noise=noise, weights=kind, seed=seed)


def batch_shapes() -> st.SearchStrategy[tuple[int, ...]]:
    """Generate batch shapes of up to three dimensions, also none, and with empty ones."""
    return st.lists(st.sampled_from([1, 2, 3, 0]), max_size=3).map(tuple)


@st.composite
def map_shapes(draw: st.DrawFn, dims: int, *, max_size: int = 40) -> tuple[int, ...]:
    """Generate sizes 1..max_size of a map with `dims` axes, no two of them equal."""
    sizes = st.integers(1, max_size)
    return tuple(draw(st.lists(sizes, min_size=dims, max_size=dims, unique=True)))


@st.composite
def logits(
    draw: st.DrawFn,
    dims: int,
    *,
    max_size: int | None = None,
    batch: st.SearchStrategy[tuple[int, ...]] | None = None,
    masks: bool = True,
    dtype: npt.DTypeLike = np.float64,
) -> Array:
    """Generate maps [..., H, W] (dims 2) or volumes [..., X, Y, Z] (dims 3).

    Args:
        draw: given by hypothesis.
        dims: number of map axes; their sizes are all different.
        max_size: largest size; 40 in 2D, 12 in 3D by default.
        batch: batch shapes; `batch_shapes()` by default.
        masks: whether some maps have -inf, up to all of one.
        dtype: of the result.

    Returns:
        Finite values on several scales and offsets, and -inf.
    """
    shape = draw(map_shapes(dims, max_size=max_size or (40 if dims == 2 else 12)))
    lead = draw(batch_shapes() if batch is None else batch)
    scale = draw(st.sampled_from([1.0, 0.0, 1e-3, 20.0, 1e3]))
    offset = draw(st.sampled_from([0.0, 100.0, -1e4]))
    rng = draw(generators())
    values = scale * rng.standard_normal((*lead, *shape)) + offset
    if masks:
        share = draw(st.sampled_from([0.0, 0.0, 0.3, 0.95, 1.0]))
        values = np.where(rng.uniform(size=values.shape) < share, -np.inf, values)
    return values.astype(dtype)


@dataclass(frozen=True)
class Degenerate:
    """Arguments of `triangulate` (one point) that determine no point, and why."""

    reason: str
    points: Array  # [C, 2]
    projections: Array  # [C, 3, 4]
    weights: Array  # [C]


DEGENERACIES = (
    "no view",
    "one view",
    "one weight not zero",
    "all weights zero",
    "one point not NaN",
    "same view twice",
    "coincident cameras",
    "parallel rays",
    "NaN weight",
    "negative weight",
    "infinite weight",
    "NaN projection",
    "infinite point",
)


@st.composite
def degeneracies(draw: st.DrawFn, reasons: Sequence[str] = DEGENERACIES) -> Degenerate:
    """Generate points that cannot be triangulated."""
    return degenerate(draw(st.sampled_from(list(reasons))), draw(rigs()), draw(generators()))


def degenerate(reason: str, rig: Rig, rng: np.random.Generator) -> Degenerate:
    """Spoil the view of a point by a rig of two or more cameras, for one of DEGENERACIES."""
    truth = rng.uniform(BOX_LOW, BOX_HIGH)
    if reason == "coincident cameras":  # turned and zoomed, but in one place
        first = rig[:1]
        rig = look_at(
            np.repeat(first.centers, 2, axis=0),
            BOX_CENTER + rng.uniform(-250.0, 250.0, (2, 3)),
            focal=[900.0, 1300.0],
            image_size=rig.image_size,
        )
    views = {"no view": 0, "one view": 1, "same view twice": 1, "parallel rays": 2}
    rig = rig[: views.get(reason, len(rig))]
    x = rig.projections[..., :3] @ truth + rig.projections[..., 3]
    if reason == "parallel rays":  # the image of a point at infinity
        x = rig.projections[..., :3] @ (BOX_CENTER - rig.centers.mean(0))
    points = x[:, :2] / x[:, 2:]
    projections = rig.projections.copy()
    weights = rng.uniform(0.05, 1.0, len(rig))
    view = rng.integers(len(rig)) if len(rig) else 0
    others = np.arange(len(rig)) != view

    if reason == "one weight not zero":
        weights[others] = 0.0
    elif reason == "all weights zero":
        weights[:] = 0.0
    elif reason == "one point not NaN":
        points[others, rng.integers(2)] = np.nan
    elif reason == "same view twice":
        points, projections = points.repeat(2, axis=0), projections.repeat(2, axis=0)
        weights = np.array([0.7, 0.4])
    elif reason == "NaN weight":
        weights[view] = np.nan
    elif reason == "negative weight":
        weights[view] *= -1.0
    elif reason == "infinite weight":
        weights[view] = np.inf
    elif reason == "NaN projection":
        projections[view, rng.integers(3), rng.integers(4)] = np.nan
    elif reason == "infinite point":
        points[view, rng.integers(2)] = np.inf
    return Degenerate(reason, points, projections, weights)


# --- an exact triangulation ----------------------------------------------------------------------

_DIGITS = 150
_ROOT_TOLERANCE = Decimal(10) ** -110
_STEP = Fraction(1, 10**30)


def exact_triangulate(
    points: Array,
    projections: Array,
    weights: Array | None = None,
    *,
    mode: str = "homogeneous",
) -> Array:
    """Triangulate one point without rounding, as a second opinion on `tritool.reference`.

    The matrix A^T A is formed in rational numbers. Its smallest eigenvalue lambda is found in 150
    digits by Newton's method on the characteristic polynomial from 0, which rises to the smallest
    root and cannot pass it; then (A3^T A3 - lambda) y = -A3^T a4 by Cramer's rule.

    Args:
        points: [C, 2].
        projections: [C, 3, 4].
        weights: [C], positive; 1 by default.
        mode: as in `triangulate`.

    Returns:
        [3], rounded to float64 once.
    """
    exact = _exact_point(*_rational(points, projections, weights), mode)
    return np.array([float(value) for value in exact])


def exact_triangulate_vjp(
    grad: Array,
    points: Array,
    projections: Array,
    weights: Array | None = None,
    *,
    mode: str = "homogeneous",
) -> tuple[Array, Array, Array]:
    """Differentiate `exact_triangulate` by central differences with steps of 1e-30.

    In 150 digits neither truncation nor cancellation reaches the digits of a float64.

    Args:
        grad: [3].
        points: as in `exact_triangulate`.
        projections: as in `exact_triangulate`.
        weights: as in `exact_triangulate`.
        mode: as in `exact_triangulate`.

    Returns:
        The gradients to points, projections and weights.
    """
    arguments = _rational(points, projections, weights)
    cotangent = [Decimal(float(g)) for g in grad]
    results = []
    for argument in arguments:
        result = np.zeros(argument.shape)
        for index in np.ndindex(argument.shape):
            value = argument[index]
            ends = []
            for step in (_STEP, -_STEP):
                argument[index] = value + step
                ends.append(_exact_point(*arguments, mode))
            argument[index] = value
            with localcontext() as context:
                context.prec = _DIGITS
                slopes = ((a - b) / _decimal(2 * _STEP) for a, b in zip(*ends, strict=True))
                result[index] = float(sum(g * s for g, s in zip(cotangent, slopes, strict=True)))
        results.append(result)
    return results[0], results[1], results[2]


def _rational(
    points: Array, projections: Array, weights: Array | None
) -> tuple[Array, Array, Array]:
    """Convert to object arrays of fractions; every finite float is one exactly."""
    weights = np.ones(len(points)) if weights is None else weights
    to_fraction = np.frompyfunc(lambda value: Fraction(float(value)), 1, 1)
    points, projections, weights = (
        np.asarray(to_fraction(array), dtype=object).reshape(np.shape(array))
        for array in (points, projections, weights)
    )
    return points, projections, weights


def _exact_point(points: Array, projections: Array, weights: Array, mode: str) -> list[Decimal]:
    rows = points[:, :, None] * projections[:, 2:, :] - projections[:, :2, :]
    a = (weights[:, None, None] * rows).reshape(-1, 4)
    gram = a.T @ a
    with localcontext() as context:
        context.prec = _DIGITS
        m = np.array([[_decimal(value) for value in row] for row in gram], dtype=object)
        shift = _smallest_eigenvalue(m) if mode == "homogeneous" else Decimal(0)
        b = m[:3, :3] - shift * np.array(
            [[Decimal(int(i == j)) for j in range(3)] for i in range(3)]
        )
        determinant = _determinant3(b)
        solution = []
        for column in range(3):
            replaced = b.copy()
            replaced[:, column] = -m[:3, 3]
            solution.append(_determinant3(replaced) / determinant)
        return solution


def _smallest_eigenvalue(m: Array) -> Decimal:
    """Newton's method from below on det(lambda I - M), by Faddeev and LeVerrier's coefficients."""
    identity = np.array([[Decimal(int(i == j)) for j in range(4)] for i in range(4)], dtype=object)
    coefficients, product = [Decimal(1)], identity
    for k in range(1, 5):
        product = m @ product
        coefficients.append(-Decimal(product.trace()) / k)
        product = product + coefficients[-1] * identity
    root = Decimal(0)
    for _ in range(1000):
        value = slope = Decimal(0)
        for coefficient in coefficients:  # Horner's scheme, with the derivative
            slope = slope * root + value
            value = value * root + coefficient
        if slope == 0:
            return root
        step = value / slope
        root -= step
        if abs(step) <= _ROOT_TOLERANCE * abs(root):
            return root
    raise ArithmeticError("the smallest eigenvalue is not simple")


def _determinant3(m: Array) -> Decimal:
    (a, b, c), (d, e, f), (g, h, i) = m
    return Decimal(a * (e * i - f * h) - b * (d * i - f * g) + c * (d * h - e * g))


def _decimal(value: Fraction) -> Decimal:
    return Decimal(value.numerator) / Decimal(value.denominator)
