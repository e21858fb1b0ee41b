# SPDX-License-Identifier: Apache-2.0
"""Pictures of recordings and reconstructions."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import numpy as np

from tritool.data.recording import Array, Reconstruction, Recording, Status
from tritool.plot.drawing import (
    CAMERA_COLOURS,
    GREY,
    INK,
    LEFT,
    PALE,
    SIDE_COLOURS,
    View,
    bare,
    draw_cameras,
    draw_floor,
    draw_skeleton,
    extent,
    headline,
    light,
    look_along,
    new_figure,
    nice_step,
    save_figure,
    scale_bar,
    tint,
    title,
    up_direction,
    verbatim,
)
from tritool.skeletons import limbs

if TYPE_CHECKING:
    from matplotlib.axes import Axes

STATUS_COLOURS = {
    Status.FOUND: "#c5dfdd",
    Status.TOO_FEW_VIEWS: "#e69f00",
    Status.DEGENERATE: "#cc79a7",
    Status.BEHIND_CAMERA: "#d55e00",
    Status.INVALID_INPUT: INK,
}


def plot_reconstruction(
    path: str | os.PathLike[str], recording: Recording, reconstruction: Reconstruction
) -> None:
    """Draws one picture of a reconstruction: the scene, the errors, and what is missing when.

    The frame shown is the one with the most points, and among those the one of the least
    reprojection error.

    Args:
        path: the file, ``.png``, ``.pdf`` or ``.svg``; replaced if it exists.
        recording: what was reconstructed.
        reconstruction: what was made of it.

    Raises:
        OSError: the file cannot be written; what was there before is untouched.
    """
    frame = _representative_frame(reconstruction)
    points = reconstruction.keypoints_3d[frame]
    up = up_direction(recording.R)
    ahead = look_along(points, up)

    figure = new_figure(14.0, 9.0)
    grid = figure.add_gridspec(
        2, 12, height_ratios=(1.55, 1), left=LEFT, right=0.975, top=0.86, bottom=0.08,
        hspace=0.36, wspace=1.6,
    )  # fmt: skip
    scene, close, above = (
        figure.add_subplot(grid[0, columns]) for columns in (slice(0, 5), slice(5, 8), slice(8, 12))
    )
    cameras, time = (figure.add_subplot(grid[1, cols]) for cols in (slice(0, 5), slice(5, 12)))

    name = str(recording.meta.get("name", ""))
    found = int((reconstruction.status == Status.FOUND).sum())
    heading = f"{found} of {reconstruction.status.size} points found"
    shown = f"shown: frame {reconstruction.frame_ids[frame]}"
    headline(figure, heading, "   |   ".join(text for text in (name, shown) if text))

    _draw_scene(scene, recording, points, View.around(up, ahead, azimuth=35, elevation=22))
    _draw_close(close, recording, points, View.around(up, ahead, azimuth=20, elevation=5), frame)
    _draw_above(above, recording, points, View.around(up, _map_ahead(up, ahead), elevation=90))
    _draw_camera_errors(cameras, reconstruction)
    _draw_time(time, reconstruction)
    save_figure(path, figure)


def _draw_scene(axes: Axes, recording: Recording, points: Array, view: View) -> None:
    up = up_direction(recording.R)
    centres = _centres(recording)
    found = points[np.isfinite(points).all(axis=-1)]
    everything = np.concatenate([centres, found])
    # Below everything found there is the floor, as far as can be told.
    floor = float((found @ up).min()) if len(found) else float((centres @ up).min())
    step = draw_floor(axes, view, up, everything, floor)
    size = 0.1 * extent(everything)
    for centre in centres:
        foot = centre + (floor - centre @ up) * up
        axes.plot(*view([centre, foot]).T, color=GREY, linewidth=0.7, linestyle=":", zorder=0.5)
    draw_cameras(axes, view, recording, size)
    _draw_actors(axes, view, recording, points, width=1.8)
    bare(axes)
    axes.margins(0.03)
    axes.autoscale_view()
    title(axes, "The scene", verbatim(f"floor grid {step:g} {recording.unit}"))


def _draw_close(axes: Axes, recording: Recording, points: Array, view: View, frame: int) -> None:
    if recording.gt3d is not None:
        for reference in recording.gt3d[frame]:
            draw_skeleton(
                axes, view, reference, recording.joint_names, colour=GREY, width=1.2, joints=False
            )
    _draw_actors(axes, view, recording, points, width=3.0)
    bare(axes)
    found = points[np.isfinite(points).all(axis=-1)]
    axes.margins(0.08)
    axes.autoscale_view()
    title(axes, "The points", "close by")
    if len(found):
        scale_bar(axes, nice_step(extent(found), 4), recording.unit)
    legend = []
    if limbs(recording.joint_names) and len(points) == 1:
        legend += [(SIDE_COLOURS["l"], "left"), (SIDE_COLOURS["r"], "right")]
    if recording.gt3d is not None:
        legend += [(GREY, "reference")]
    for row, (colour, text) in enumerate(legend):
        axes.text(
            1.0, 1.0 - 0.05 * row, text, transform=axes.transAxes, color=colour, fontsize=9.5,
            ha="right", va="top", fontweight="bold",
        )  # fmt: skip


def _draw_above(axes: Axes, recording: Recording, points: Array, view: View) -> None:
    centres = _centres(recording)
    everything = np.concatenate([centres, points[np.isfinite(points).all(axis=-1)]])
    draw_cameras(axes, view, recording, 0.1 * extent(everything), beside=False)
    _draw_actors(axes, view, recording, points, width=1.6)
    axes.set_aspect("equal", adjustable="datalim")
    axes.margins(0.2)
    axes.autoscale_view()
    light(axes)
    axes.grid(color=PALE, linewidth=0.8)
    axes.set_axisbelow(True)
    title(axes, "From above", "cameras and points")
    axes.set_xlabel(verbatim(f"{_axis_name(view.right)} [{recording.unit}]"))
    axes.set_ylabel(verbatim(f"{_axis_name(view.up)} [{recording.unit}]"))


def _draw_actors(axes: Axes, view: View, recording: Recording, points: Array, width: float) -> None:
    # One body is coloured by its sides, several by who is who.
    several = len(points) > 1
    for actor, pose in enumerate(points):
        colour = CAMERA_COLOURS[-1 - actor % len(CAMERA_COLOURS)] if several else None
        draw_skeleton(axes, view, pose, recording.joint_names, colour=colour, width=width)


def _draw_camera_errors(axes: Axes, reconstruction: Reconstruction) -> None:
    labels = []
    for row, name in enumerate(reconstruction.camera_names):
        errors = reconstruction.reprojection_error[:, :, row]
        errors = errors[np.isfinite(errors)]
        if errors.size == 0:
            labels.append(f"{verbatim(name)}\nunused")
            continue
        least, low, median, high, most = np.percentile(errors, (5, 25, 50, 75, 95))
        colour = CAMERA_COLOURS[row % len(CAMERA_COLOURS)]
        axes.plot([least, most], [row, row], "|-", color=GREY, linewidth=1.2, markersize=12)
        axes.barh(row, high - low, 0.55, left=low, color=tint(colour, 0.5), zorder=2)
        axes.plot([median, median], [row - 0.27, row + 0.27], color=INK, linewidth=2.4)
        labels.append(f"{verbatim(name)}\n{median:.3g} px")
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.set_xlim(left=0)
    axes.set_xlabel("reprojection error [measured px]")
    light(axes)
    axes.grid(axis="x", color=PALE, linewidth=0.8)
    axes.set_axisbelow(True)
    title(axes, "Reprojection error per camera", "line: median, box: middle half, whiskers: 5-95 %")


def _draw_time(axes: Axes, reconstruction: Reconstruction) -> None:
    status = reconstruction.status.reshape(len(reconstruction.status), -1)
    ids = reconstruction.frame_ids
    ordered = ids.dtype.kind in "iu" and bool((np.diff(ids.astype(np.int64)) > 0).all())
    start = ids.astype(np.float64) if ordered else np.arange(len(ids), dtype=np.float64)
    edges = np.append(start, start[-1] + 1)
    below = np.zeros(len(status))
    for each in Status:
        count = (status == each).sum(axis=1)
        if not count.any():
            continue
        share = 100 * count.sum() / status.size
        axes.stairs(
            below + count, edges, baseline=below, fill=True, color=STATUS_COLOURS[each],
            label=f"{each.meaning}  {share:.1f} %", linewidth=0,
        )  # fmt: skip
        below = below + count
    axes.set_xlim(edges[0], edges[-1])
    axes.set_ylim(0, status.shape[1])
    axes.set_xlabel("frame" if ordered else "frame, in the order of the file")
    axes.set_ylabel("joints" if reconstruction.status.shape[1] == 1 else "joints of all actors")
    light(axes)
    axes.legend(
        loc="lower left", bbox_to_anchor=(0.0, 1.005), ncols=len(Status), frameon=False,
        fontsize=9, labelcolor=GREY, borderpad=0, borderaxespad=0.2, handlelength=1.0,
        columnspacing=1.4,
    )  # fmt: skip
    # The blank note leaves the legend its line below the title.
    title(axes, "Found and missing over time", " ")


def _representative_frame(reconstruction: Reconstruction) -> int:
    found = (reconstruction.status == Status.FOUND).sum(axis=(1, 2))
    errors = reconstruction.reprojection_error.reshape(len(found), -1)
    finite = np.isfinite(errors)
    mean = np.where(finite, errors, 0).sum(axis=1) / np.maximum(finite.sum(axis=1), 1)
    return int(np.lexsort((mean, -found))[0])


def _map_ahead(up: Array, ahead: Array) -> Array:
    """The direction at the top of a map: x or y or z points right, if ``up`` is a world axis."""
    if np.abs(up).max() < 1:
        return ahead
    axes = [sign * axis for axis in np.eye(3) for sign in (1.0, -1.0) if axis @ up == 0]
    # Right must be a positive axis, the top one too if that can be had.
    return max(axes, key=lambda top: (np.cross(top, up).sum(), top.sum()))


def _centres(recording: Recording) -> Array:
    centres: Array = -np.einsum("vji,vj->vi", recording.R, recording.t)
    return centres


def _axis_name(direction: Array) -> str:
    axis = int(np.abs(direction).argmax())
    if abs(direction[axis]) < 0.999:
        return "level distance"
    return f"{'-' if direction[axis] < 0 else ''}{'xyz'[axis]}"
