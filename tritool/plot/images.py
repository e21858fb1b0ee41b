# SPDX-License-Identifier: Apache-2.0
"""Pictures of poses from single images: in the image, as the camera sees it, and from the side."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from tritool.data.recording import Array
from tritool.plot.drawing import (
    GREY,
    INK,
    PALE,
    SIDE_COLOURS,
    View,
    bare,
    draw_skeleton,
    extent,
    headline,
    new_figure,
    nice_step,
    save_figure,
    scale_bar,
    tint,
    title,
    verbatim,
)
from tritool.skeletons import limbs, side

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["plot_image_pose", "plot_poses"]

# Inches: the panels' height, the width of a skeleton, the least and the greatest of the image.
_HIGH, _WIDE = 5.6, 3.7
_IMAGE_WIDTHS = (3.0, 8.0)
_HEAD, _FOOT, _SIDE, _GAP = 1.35, 0.85, 0.4, 0.35
# Coordinates of a camera: x right, y down, z forward.
_UP, _AHEAD = np.array([0.0, -1.0, 0.0]), np.array([0.0, 0.0, 1.0])
# Free space around the skeletons, as a part of their extent.
_MARGIN = 0.06
# A dot is not paler than this, or its colour would be lost.
_PALEST = 0.15


def plot_image_pose(
    path: str | os.PathLike[str],
    image: npt.ArrayLike,
    keypoints_2d: npt.ArrayLike,
    keypoints_3d: npt.ArrayLike,
    confidences: npt.ArrayLike,
    joint_names: Sequence[str],
    *,
    name: str = "",
    note: str = "",
) -> None:
    """Draws the pose that was found in one image.

    Both skeletons in space are drawn to the same scale and without perspective. The less sure a
    joint, the paler its dot in the image.

    Args:
        path: the file, ``.png``, ``.pdf`` or ``.svg``; replaced if it exists.
        image: [H, W, 3] uint8, red, green, blue.
        keypoints_2d: [J, 2] pixels of the image, NaN where missing; they may lie outside of it.
        keypoints_3d: [J, 3] millimetres, coordinates of the camera (x right, y down, z forward);
            NaN where missing.
        confidences: [J] from 0 to 1; NaN is drawn as 0.
        joint_names: J names.
        name: of the image, for the heading.
        note: a line below it.

    Raises:
        ValueError: shapes do not fit.
        OSError: the file cannot be written; what was there before is untouched.
    """
    pixels = np.asarray(image)
    flat, points, sure = (
        np.asarray(values, dtype=np.float64) for values in (keypoints_2d, keypoints_3d, confidences)
    )
    count = len(joint_names)
    for label, values, shape in (
        ("keypoints_2d", flat, (count, 2)),
        ("keypoints_3d", points, (count, 3)),
        ("confidences", sure, (count,)),
    ):
        if values.shape != shape:
            raise ValueError(f"{label} must be {list(shape)} as joint_names, got {values.shape}")
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise ValueError(f"image must be uint8 [H, W, 3], got {pixels.dtype} {pixels.shape}")

    high, wide = pixels.shape[:2]
    across = float(np.clip(_HIGH * wide / high, *_IMAGE_WIDTHS))
    width = 2 * _SIDE + across + 2 * (_GAP + _WIDE)
    height = _HEAD + _HIGH + _FOOT
    figure = new_figure(width, height)

    def panel(left: float, own: float) -> Axes:
        place = (left / width, _FOOT / height, own / width, _HIGH / height)
        axes: Axes = figure.add_axes(place)
        return axes

    missing = int((~np.isfinite(points).all(axis=-1)).sum())
    parts = [note, f"{missing} of {count} joints not found" if missing else ""]
    said = [
        " ".join(text.splitlines())
        for text in (name or "A pose from one image", "   |   ".join(filter(None, parts)))
    ]
    headline(figure, *said, left=_SIDE / width)
    _fit(figure, said, 1 - _SIDE / width)
    _key(figure, _SIDE / width)
    axes = panel(_SIDE, across)
    _draw_image(axes, pixels, flat, sure, joint_names)
    title(axes, "In the image", "2D joints")
    front, aside = View.around(_UP, _AHEAD), View.around(_UP, _AHEAD, azimuth=90)
    views = (
        (front, "As the camera sees it", "3D, without perspective"),
        (aside, "From the side", "turned by 90 degrees: the camera is on the left"),
    )
    for number, (eye, heading, below) in enumerate(views):
        axes = panel(_SIDE + across + _GAP + number * (_WIDE + _GAP), _WIDE)
        _draw_space(axes, eye, (front, aside), points, joint_names)
        title(axes, heading, below)
    save_figure(path, figure)


def plot_poses(
    path: str | os.PathLike[str],
    images: Sequence[npt.ArrayLike],
    keypoints_2d: npt.ArrayLike,
    poses: Mapping[str, npt.ArrayLike],
    joint_names: Sequence[str],
    *,
    name: str = "",
    note: str = "",
) -> None:
    """Draws what several methods make of the same images: a row an image, two panels a method.

    All poses of a row have one scale, without perspective.

    Args:
        path: the file, ``.png``, ``.pdf`` or ``.svg``; replaced if it exists.
        images: N times [H, W, 3] uint8, red, green, blue.
        keypoints_2d: [N, J, 2] pixels of the images, NaN where missing.
        poses: [N, J, 3] by method, one unit, coordinates of the camera (x right, y down, z
            forward); NaN where missing.
        joint_names: J names.
        name: the heading.
        note: a line below it.

    Raises:
        ValueError: shapes do not fit, or there is no image or no method.
        OSError: the file cannot be written; what was there before is untouched.
    """
    count, joints = len(images), len(joint_names)
    flat = np.asarray(keypoints_2d, dtype=np.float64)
    drawn = {label: np.asarray(values, dtype=np.float64) for label, values in poses.items()}
    if not count or not drawn:
        raise ValueError(f"images and poses must not be empty, got {count} and {len(drawn)}")
    for label, values, last in [
        ("keypoints_2d", flat, 2), *((f"poses[{each!r}]", p, 3) for each, p in drawn.items())
    ]:  # fmt: skip
        if values.shape != (count, joints, last):
            raise ValueError(f"{label} must be {[count, joints, last]}, got {values.shape}")

    wide, high, gap, between = 1.75, 2.5, 0.08, 0.3
    method = 2 * wide + gap
    width = 2 * _SIDE + high + len(drawn) * (between + method)
    height = _HEAD + count * (high + gap) + 0.55
    figure = new_figure(width, height)
    headline(figure, name or "Poses from single images", note, left=_SIDE / width)
    _key(figure, _SIDE / width, sure=False)
    views = (View.around(_UP, _AHEAD), View.around(_UP, _AHEAD, azimuth=90))
    for row in range(count):
        bottom = (height - _HEAD - (row + 1) * high - row * gap) / height

        def panel(left: float, own: float, bottom: float = bottom) -> Axes:
            axes: Axes = figure.add_axes((left / width, bottom, own / width, high / height))
            return axes

        axes = panel(_SIDE, high)
        image = np.asarray(images[row])
        _draw_image(axes, image, flat[row], np.ones(joints), joint_names, thin=True)
        found = [pose[row][np.isfinite(pose[row]).all(-1)] for pose in drawn.values()]
        spreads = [
            np.ptp(view(points), axis=0) for points in found if len(points) for view in views
        ]
        spread = np.max([*spreads, (1e-6, 1e-6)], axis=0)
        half = max(float(spread[1]) / high, float(spread[0]) / wide) * (0.5 + _MARGIN)
        for number, (label, pose) in enumerate(drawn.items()):
            left = _SIDE + high + between + number * (method + between)
            for which, eye in enumerate(views):
                axes = panel(left + which * (wide + gap), wide)
                bare(axes)
                points = pose[row]
                known = points[np.isfinite(points).all(-1)]
                if len(known):
                    draw_skeleton(axes, eye, points, joint_names, width=2.2)
                    middle = (eye(known).max(axis=0) + eye(known).min(axis=0)) / 2
                    axes.set_xlim(middle[0] - half * wide, middle[0] + half * wide)
                    axes.set_ylim(middle[1] - half * high, middle[1] + half * high)
                if row == 0:
                    title(
                        axes,
                        label if which == 0 else "",
                        ("from the front", "from the side")[which],
                    )
    save_figure(path, figure)


def _draw_image(
    axes: Axes,
    image: Array,
    flat: Array,
    sure: Array,
    names: Sequence[str],
    *,
    thin: bool = False,
) -> None:
    high, wide = image.shape[:2]
    part = 0.6 if thin else 1.0
    axes.imshow(image, interpolation="antialiased")
    for a, b in limbs(names):
        sides = {side(names[a]), side(names[b])} - {""}
        colour = SIDE_COLOURS[sides.pop() if len(sides) == 1 else ""]
        # Twice, for a rim that is seen on dark and on light ground.
        for own, line in (("white", 4.2), (colour, 2.4)):
            axes.plot(
                *flat[[a, b]].T,
                color=own,
                linewidth=part * line,
                solid_capstyle="round",
                clip_on=False,
            )
    found = np.isfinite(flat).all(axis=-1)
    strength = np.clip(np.nan_to_num(sure), _PALEST, 1)
    rims = np.array([SIDE_COLOURS[side(name)] for name in names])
    faces = [tint(rim, float(each)) for rim, each in zip(rims, strength, strict=True)]
    # A white ring first: the rim has the colour of the limbs that meet here.
    across, down = flat[found].T
    axes.scatter(across, down, s=64 * part**2, c="white", linewidths=0, zorder=3, clip_on=False)
    axes.scatter(
        across, down, s=34 * part**2, c=[faces[at] for at in np.flatnonzero(found)],
        edgecolors=rims[found].tolist(), linewidths=1.2, zorder=4, clip_on=False,
    )  # fmt: skip
    # Joints beyond the border are shown, too.
    low, top = np.min([[-0.5, -0.5], *flat[found]], axis=0)
    right, bottom = np.max([[wide - 0.5, high - 0.5], *flat[found]], axis=0)
    axes.set_xlim(low, right)
    axes.set_ylim(bottom, top)
    axes.set_aspect("equal", adjustable="box", anchor="NW")
    axes.set_axis_off()


def _draw_space(
    axes: Axes, eye: View, views: Sequence[View], points: Array, names: Sequence[str]
) -> None:
    bare(axes)
    found = points[np.isfinite(points).all(axis=-1)]
    if not len(found):
        axes.text(
            0.5, 0.5, "no joint found", transform=axes.transAxes, ha="center", color=GREY
        )  # fmt: skip
        return
    draw_skeleton(axes, eye, points, names, width=3.0)
    # As large as the larger of the two needs, so that both have one scale.
    spread = np.max([np.ptp(view(found), axis=0) for view in views], axis=0)
    half = max(float(spread[1]) / _HIGH, float(spread[0]) / _WIDE) * (0.5 + _MARGIN) or 1.0
    across, upwards = (eye(found).max(axis=0) + eye(found).min(axis=0)) / 2
    axes.set_xlim(across - half * _WIDE, across + half * _WIDE)
    axes.set_ylim(upwards - half * _HIGH, upwards + half * _HIGH)
    scale_bar(axes, nice_step(extent(found), 4), "mm")


def _key(figure: Figure, left: float, *, sure: bool = True) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=SIDE_COLOURS[which], marker="o", markersize=6, linewidth=2.4,
               label=label)
        for which, label in (("l", "the person's left"), ("r", "right"), ("", "middle"))
    ]  # fmt: skip
    if sure:
        handles.append(
            Line2D([], [], color="none", marker="o", markersize=6.5, markeredgecolor=INK,
                   markerfacecolor=PALE, label="pale in the image: not sure")
        )  # fmt: skip
    figure.legend(
        handles=handles, loc="lower left", ncols=len(handles), frameon=False, fontsize=10,
        bbox_to_anchor=(left, 0.12 / figure.get_figheight()), labelcolor=INK, borderaxespad=0,
        borderpad=0, handlelength=1.8, columnspacing=1.8,
    )  # fmt: skip


def _fit(figure: Figure, said: Sequence[str], right: float) -> None:
    """Leaves the middle out of lines that would run beyond a part of the figure's width."""
    for text, whole in zip(figure.texts, said, strict=True):
        most = len(whole)
        while most > 2 and text.get_window_extent().x1 > right * figure.bbox.width:
            most -= 1
            line = f"{whole[: most // 2]} … {whole[len(whole) - most // 2 :]}"
            text.set_text(verbatim(line))
