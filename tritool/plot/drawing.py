# SPDX-License-Identifier: Apache-2.0
"""What all pictures share: figures and their headings, colours, orthographic views, bodies.

By matplotlib's objects: no pyplot, no global state. A scene is drawn by orthographic projection on
plain axes, so that lengths can be compared by eye.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from tritool.data.recording import Array, Recording, written_aside
from tritool.skeletons import limbs, side

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, GREY, PALE = "#22303c", "#8a97a3", "#e3e8ec"
# Okabe and Ito's palette, told apart by colour-blind eyes too; left is blue and right vermilion.
SIDE_COLOURS = {"l": "#0072b2", "r": "#d55e00", "": INK}
CAMERA_COLOURS = (
    "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a5195", "#8c6d31", "#b22222", "#5f7a8a",
)  # fmt: skip
# Where the axes and headings begin, as a part of the figure's width.
LEFT = 0.07
# A camera axis this close to a world axis means that axis, the rest being the cameras' tilt.
SNAP_DEGREES = 30.0


@dataclass(frozen=True)
class View:
    """An orthographic view of the world.

    Attributes:
        right: [3] the world direction that points right in the picture.
        up: [3] the one that points up.
        away: [3] the one that points away from the eye.
    """

    right: Array
    up: Array
    away: Array

    @classmethod
    def around(
        cls, up: Array, ahead: Array, *, azimuth: float = 0.0, elevation: float = 0.0
    ) -> View:
        """Looks along ``ahead`` and walks around: azimuth to the right, elevation up, degrees."""
        ahead = _unit(ahead - (ahead @ up) * up)
        right = np.cross(ahead, up)
        a, e = math.radians(azimuth), math.radians(elevation)
        level = math.cos(a) * ahead - math.sin(a) * right
        away = math.cos(e) * level - math.sin(e) * up
        return cls(np.cross(level, up), math.sin(e) * level + math.cos(e) * up, away)

    def __call__(self, points: npt.ArrayLike) -> Array:
        """Maps world points [..., 3] into the picture [..., 2], in world units."""
        return np.asarray(points, dtype=np.float64) @ np.stack([self.right, self.up], axis=-1)

    def depth(self, points: npt.ArrayLike) -> Array:
        """Returns how far away [...] world points [..., 3] are: for drawing the near ones last."""
        depth: Array = np.asarray(points, dtype=np.float64) @ self.away
        return depth


def new_figure(width: float, height: float) -> Figure:
    """Makes a figure that needs no display.

    Args:
        width: inches.
        height: inches.

    Returns:
        An empty figure with a canvas of its own.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def save_figure(path: str | os.PathLike[str], figure: Figure, *, dpi: int = 140) -> None:
    """Writes a figure, all of it or nothing.

    Args:
        path: the file, replaced if it exists; its ending tells the format.
        figure: what to write.
        dpi: pixels an inch, for formats that have pixels.

    Raises:
        OSError: the file cannot be written; what was there before is untouched.
    """
    with written_aside(path) as aside:
        figure.savefig(aside, dpi=dpi)


def headline(figure: Figure, text: str, note: str, *, left: float = LEFT) -> None:
    """Heads a figure, with a note in grey below; ``left`` is a part of its width."""
    height = figure.get_figheight()
    figure.text(left, 1 - 0.42 / height, verbatim(text), fontsize=17, fontweight="bold", color=INK)
    figure.text(left, 1 - 0.68 / height, verbatim(note), fontsize=10.5, color=GREY)


def title(axes: Axes, text: str, note: str = "") -> None:
    """Heads an axes, with a note in grey below the title."""
    pad = 8 + 12 * len(note.splitlines())
    axes.set_title(text, loc="left", fontsize=12, fontweight="bold", color=INK, pad=pad)
    if note:
        axes.annotate(
            note, (0, 1), (0, 6), xycoords="axes fraction", textcoords="offset points",
            fontsize=9, color=GREY, va="bottom",
        )  # fmt: skip


def verbatim(text: str) -> str:
    """Keeps matplotlib from reading a user's text as mathematics."""
    return text.replace("$", r"\$")


def tint(colour: str, strength: float) -> tuple[float, ...]:
    """Mixes a colour with white; 1 leaves it as it is."""
    from matplotlib.colors import to_rgb

    return tuple(1 - strength * (1 - part) for part in to_rgb(colour))


def up_direction(R: Array) -> Array:
    """Guesses which way is up, from the cameras: they are mostly held upright.

    Args:
        R: [V, 3, 3] rotations, world to camera.

    Returns:
        [3] a unit vector: a world axis if one is near, for then the rest is the cameras' tilt.
    """
    up = _unit(-R[:, 1].mean(axis=0))
    axis = int(np.abs(up).argmax())
    if abs(up[axis]) < math.cos(math.radians(SNAP_DEGREES)):
        return up
    snapped = np.zeros(3)
    snapped[axis] = np.sign(up[axis])
    return snapped


def draw_cameras(
    axes: Axes, view: View, recording: Recording, size: float, *, beside: bool = True
) -> None:
    """Draws each camera as the pyramid it sees, ``size`` world units deep.

    Args:
        axes: where.
        view: from where.
        recording: whose cameras.
        size: depth of the pyramids, world unit.
        beside: whether names stand beside the cameras, away from what they see, or, to take less
            width, above or below them.
    """
    for index, name in enumerate(recording.camera_names):
        colour = CAMERA_COLOURS[index % len(CAMERA_COLOURS)]
        centre, corners = _pyramid(recording, index, size)
        tip, base = view(centre), view(corners)
        x, y = _unit(tip - base.mean(axis=0) + 1e-9 * size) * 12
        if not beside:
            x, y = 0.0, math.copysign(11, y)
        axes.fill(*base.T, facecolor=colour, alpha=0.18, edgecolor=colour, linewidth=1.1)
        for corner in base:
            axes.plot(*np.stack([tip, corner], axis=-1), color=colour, linewidth=1.1)
        axes.plot(*tip, "o", color=colour, markersize=4.5)
        axes.annotate(
            verbatim(name),
            (float(tip[0]), float(tip[1])),
            (float(x), float(y)),
            textcoords="offset points",
            ha="left" if x > 6 else "right" if x < -6 else "center",
            va="center",
            fontsize=9,
            fontweight="bold",
            color=colour,
        )


def draw_skeleton(
    axes: Axes,
    view: View,
    points: Array,
    joint_names: Sequence[str],
    *,
    colour: str | None = None,
    width: float = 2.6,
    joints: bool = True,
    **style: Any,
) -> None:
    """Draws one body, or bare points where the names are not those of a body.

    Args:
        axes: where.
        view: from where.
        points: [J, 3] joints, NaN where missing.
        joint_names: J names.
        colour: of all limbs; default by the side of the body.
        width: of the limbs, points.
        joints: whether to draw the joints as dots.
        style: passed to matplotlib's ``plot``.
    """
    places, depth = view(points), view.depth(points)
    # The farthest first, so that near limbs cover far ones.
    for a, b in sorted(limbs(joint_names), key=lambda limb: -(depth[limb[0]] + depth[limb[1]])):
        sides = {side(joint_names[a]), side(joint_names[b])} - {""}
        own = colour or SIDE_COLOURS[sides.pop() if len(sides) == 1 else ""]
        axes.plot(
            *places[[a, b]].T, color=own, linewidth=width, solid_capstyle="round", **style
        )  # fmt: skip
    if joints:
        dots = np.array([colour or SIDE_COLOURS[side(name)] for name in joint_names])
        found = np.isfinite(places).all(axis=-1)
        axes.scatter(
            places[found, 0], places[found, 1], s=(1.6 * width) ** 2, c=dots[found],
            edgecolors="white", linewidths=0.5, zorder=3, alpha=style.get("alpha"),
        )  # fmt: skip


def draw_floor(axes: Axes, view: View, up: Array, points: Array, height: float) -> float:
    """Draws a grid on the floor under some points.

    Args:
        axes: where.
        view: from where.
        up: [3] the direction up.
        points: [N, 3] what the floor should extend under, world unit.
        height: of the floor along ``up``, world unit.

    Returns:
        The spacing of the grid, world unit.
    """
    east = _unit(np.cross(up, np.roll(np.abs(up).round(), 1) + 1e-3 * np.roll(up, 2)))
    north = np.cross(up, east)
    flat = points @ np.stack([east, north], axis=-1)
    low, high = flat.min(axis=0), flat.max(axis=0)
    step = nice_step(float((high - low).max()), 8)
    low, high = np.floor(low / step) * step, np.ceil(high / step) * step
    corner = height * up
    for along, across, own, other in ((east, north, 0, 1), (north, east, 1, 0)):
        for at in np.arange(low[own], high[own] + step / 2, step):
            ends = [corner + at * along + end * across for end in (low[other], high[other])]
            axes.plot(*view(ends).T, color=PALE, linewidth=0.8, zorder=0)
    return step


def nice_step(extent: float, pieces: int) -> float:
    """Returns the smallest of 1, 2, 5 x 10^n that cuts an extent into no more than some pieces."""
    if not extent > 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(extent / pieces))
    return next(power * digit for digit in (1, 2, 5, 10) if power * digit * pieces >= extent)


def bare(axes: Axes) -> None:
    """Leaves only what was drawn: no frame, no ticks, equal lengths."""
    axes.set_axis_off()
    axes.set_aspect("equal", adjustable="datalim")


def light(axes: Axes) -> None:
    """Thins the frame and ticks out, for the data to stand before them."""
    for edge in ("top", "right"):
        axes.spines[edge].set_visible(False)
    for edge in ("left", "bottom"):
        axes.spines[edge].set_color(GREY)
    axes.tick_params(colors=INK, labelsize=9, length=3, color=GREY)
    axes.xaxis.label.set_color(INK)
    axes.yaxis.label.set_color(INK)


def scale_bar(axes: Axes, length: float, unit: str) -> None:
    """Draws a length to compare with at the lower left of a `bare` axes."""
    from matplotlib.transforms import blended_transform_factory

    left = axes.get_xlim()[0]
    across = blended_transform_factory(axes.transData, axes.transAxes)
    axes.plot([left, left + length], [0.0, 0.0], color=INK, linewidth=2, transform=across)
    axes.text(
        left + length / 2, -0.015, verbatim(f"{length:g} {unit}"), transform=across,
        ha="center", va="top", fontsize=9, color=INK,
    )  # fmt: skip


def look_along(points: Array, up: Array) -> Array:
    """Finds the level direction [3] along which points [N, 3] are seen at their broadest."""
    found = points[np.isfinite(points).all(axis=-1)]
    level = np.eye(3) - np.outer(up, up)
    if len(found) < 2:
        return _unit(level[int(np.abs(up).argmin())])
    spread = (found - found.mean(axis=0)) @ level
    broadest = np.linalg.svd(spread, full_matrices=False)[2][0]
    return np.cross(up, broadest)


def extent(points: Array) -> float:
    """Returns the diagonal of the box around points [N, 3]; 1 if they are one."""
    return float(np.linalg.norm(np.ptp(points, axis=0))) or 1.0


def _pyramid(recording: Recording, index: int, size: float) -> tuple[Array, Array]:
    """Centre [3] of a camera and the corners [4, 3] of its image at depth ``size``."""
    K, R, t = recording.K[index], recording.R[index], recording.t[index]
    # Without a size the principal point stands in for the middle of the image.
    wide, high = 2 * K[:2, 2] if recording.image_size is None else recording.image_size[index]
    corners = np.array([[0, 0, 1], [wide, 0, 1], [wide, high, 1], [0, high, 1]], dtype=np.float64)
    rays = corners @ np.linalg.inv(K).T * size
    return -R.T @ t, (rays - t) @ R


def _unit(vector: Array) -> Array:
    unit: Array = vector / np.linalg.norm(vector)
    return unit
