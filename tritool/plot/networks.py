# SPDX-License-Identifier: Apache-2.0
"""Pictures of what a network predicts for one sample: in its images, in space, in its volume.

Those of several networks beside each other (`tritool.plot.methods`) are here by name, too.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor

from tritool.data.recording import Array
from tritool.data.sample import Sample
from tritool.grid import VoxelGrid
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
    light,
    look_along,
    new_figure,
    nice_step,
    save_figure,
    scale_bar,
    title,
    up_direction,
    verbatim,
)
from tritool.plot.methods import plot_learning_curves, plot_methods
from tritool.skeletons import limbs, side

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "Prediction",
    "joint_colours",
    "plot_learning_curves",
    "plot_methods",
    "plot_prediction",
    "project_volume",
]

# More views than these are left out of a picture: they would be too small.
_MOST_VIEWS = 8
# Points along each side of the picture of a volume, and along the line of sight.
_VOLUME_PIXELS = 160
_VOLUME_DEPTHS = 80
# The colour of 2D joints: told apart from skin, and from both sides.
_READ = "#00c08b"


class Prediction(Protocol):
    """What a network gave for a batch: all on one device, B samples, C views, J joints."""

    @property
    def keypoints_3d(self) -> Tensor:
        """`[B, J, 3]`, the samples' unit."""

    @property
    def keypoints_2d(self) -> Tensor | None:
        """`[B, C, J, 2]`, pixels of the crops."""

    @property
    def confidences(self) -> Tensor | None:
        """`[B, C, J]`, or another shape, which is not drawn."""

    @property
    def volumes(self) -> Tensor | None:
        """`[B, J, X, Y, Z]`, logits."""

    @property
    def grid(self) -> VoxelGrid | None:
        """Where the volumes lie."""


def plot_prediction(
    path: str | os.PathLike[str],
    sample: Sample,
    prediction: Prediction,
    *,
    row: int = 0,
    name: str = "",
    root: str = "pelvis",
    inverse_temperature: float = 1.0,
) -> None:
    """Draws what a network predicted for one sample: in its images and in space.

    In the images, limbs with dots are the predicted 3D joints, projected; crosses the 2D joints
    read out of heat maps, if there are; rings the truth. Of a volume each joint's probability is
    shown: the largest along the line of sight, as a part of the largest of all.

    Args:
        path: the file, ``.png``, ``.pdf`` or ``.svg``; replaced if it exists.
        sample: what was seen.
        prediction: what was predicted for a batch with this sample in it.
        row: which of the batch the sample is.
        name: of the method.
        root: the joint that relative errors are relative to.
        inverse_temperature: of the softmax over volumes.

    Raises:
        ValueError: the prediction has other joints than the sample.
        OSError: the file cannot be written; what was there before is untouched.
    """
    points = _array(prediction.keypoints_3d[row])
    truth = _array(sample.keypoints_3d)
    if points.shape != truth.shape:
        raise ValueError(
            f"prediction must have keypoints_3d {truth.shape} as the sample, got {points.shape}"
        )
    volumes, grid = prediction.volumes, prediction.grid
    shown = min(len(sample.cameras), _MOST_VIEWS)
    columns = shown if shown <= 4 else math.ceil(shown / 2)
    rows = math.ceil(shown / columns)
    high, wide = sample.images.shape[-2:]

    width, left, right = 14.0, 0.03, 0.98
    tall = min(width * (right - left) / columns * high / wide, 4.4 if rows == 1 else 3.1)
    head, images, gap, space = 1.0, rows * tall, 0.75, 4.6
    total = head + images + gap + space + 0.35
    figure = new_figure(width, total)

    def below(top: float, height: float) -> dict[str, float]:
        """Where a row of panels is, inches from the top."""
        return {
            "left": left, "right": right, "top": 1 - top / total,
            "bottom": 1 - (top + height) / total,
        }  # fmt: skip

    _prediction_headline(figure, sample, points, truth, name, root, left)
    _key(figure, prediction, right)
    cells = figure.add_gridspec(rows, columns, wspace=0.03, hspace=0.04, **below(head, images))
    for view in range(shown):
        axes = figure.add_subplot(cells[divmod(view, columns)])
        _draw_view(axes, sample, prediction, row, view, points)

    up = up_direction(_array(sample.cameras.R))
    ahead = look_along(truth if np.isfinite(truth).any() else points, up)
    front = View.around(up, ahead, azimuth=12, elevation=8)
    side_on = View.around(up, ahead, azimuth=82, elevation=8)
    volume = volumes is not None and grid is not None
    # An empty column leaves the joints' names their room.
    widths = [1.0, 1.0, *[1.0] * volume, 0.18, 0.8]
    cells = figure.add_gridspec(
        1, len(widths), wspace=0.1, width_ratios=widths, **below(head + images + gap, space)
    )
    for column, (heading, eye) in enumerate(
        (("From the front", front), ("From the side", side_on))
    ):
        axes = figure.add_subplot(cells[column])
        _draw_poses(axes, eye, points, truth, sample.joint_names)
        title(axes, heading, "grey: truth; thin lines: errors")
    if volumes is not None and grid is not None:
        axes = figure.add_subplot(cells[2])
        logits = inverse_temperature * volumes[row]
        _draw_volume(axes, front, logits, grid, row, points, truth, sample.joint_names)
    _draw_joint_errors(figure.add_subplot(cells[-1]), points, truth, sample.joint_names)
    save_figure(path, figure)


def _prediction_headline(
    figure: Figure,
    sample: Sample,
    points: Array,
    truth: Array,
    name: str,
    root: str,
    left: float,
) -> None:
    error = np.linalg.norm(points - truth, axis=-1)
    text = [name] if name else []
    if np.isfinite(error).any():
        text.append(f"MPJPE {np.nanmean(error):.1f} mm")
        if root in sample.joint_names:
            at = sample.joint_names.index(root)
            relative = np.linalg.norm((points - points[at]) - (truth - truth[at]), axis=-1)
            if np.isfinite(relative).any():
                text[-1] += f", {np.nanmean(relative):.1f} mm relative to the {root}"
    else:
        text.append("no joint with both a prediction and a truth")
    known = np.isfinite(truth).all(axis=-1)
    missing = int((known & ~np.isfinite(points).all(axis=-1)).sum())
    note = [f"sample {sample.index}", sample.subject, sample.action.replace("_", " ")]
    note += [f"{int(sample.views.sum())} of {len(sample.cameras)} views"]
    note += [f"the first {_MOST_VIEWS} shown"] * (len(sample.cameras) > _MOST_VIEWS)
    note += [f"{missing} of {int(known.sum())} joints not found"] * (missing > 0)
    headline(figure, ":  ".join(text), "   |   ".join(part for part in note if part), left=left)


def _key(figure: Figure, prediction: Prediction, right: float) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=SIDE_COLOURS["l"], marker="o", markeredgecolor="white", linewidth=2,
               label="predicted in 3D, left"),
        Line2D([], [], color=SIDE_COLOURS["r"], marker="o", markeredgecolor="white", linewidth=2,
               label="right"),
        Line2D([], [], color="none", marker="o", markerfacecolor="none", markeredgecolor=GREY,
               markersize=8, label="truth"),
    ]  # fmt: skip
    if prediction.keypoints_2d is not None:
        handles.insert(
            2,
            Line2D([], [], color="none", marker="x", markeredgecolor=_READ, markersize=6,
                   markeredgewidth=1.6, label="read out of heat maps"),
        )  # fmt: skip
    figure.legend(
        handles=handles, loc="upper right", ncols=len(handles), frameon=False, fontsize=9.5,
        bbox_to_anchor=(right, 1 - 0.5 / figure.get_figheight()), labelcolor=INK,
        borderaxespad=0, handlelength=1.8, columnspacing=1.6,
    )  # fmt: skip


def _draw_view(
    axes: Axes, sample: Sample, prediction: Prediction, row: int, view: int, points: Array
) -> None:
    high, wide = sample.images.shape[-2:]
    axes.set_xlim(-0.5, wide - 0.5)
    axes.set_ylim(high - 0.5, -0.5)
    axes.set_aspect("equal")
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)
    label = f"view {view + 1}"
    if not bool(sample.views[view]):
        axes.set_facecolor(PALE)
        axes.text(
            0.5, 0.5, f"{label}: no image", transform=axes.transAxes, ha="center", color=GREY
        )  # fmt: skip
        return
    axes.imshow(sample.images[view].permute(1, 2, 0).cpu().numpy(), interpolation="antialiased")
    projected = _projected(_array(sample.cameras.projections[view]), points)
    names = sample.joint_names
    for a, b in limbs(names):
        colour = _limb_colour(names[a], names[b])
        for own, width in (("white", 3.4), (colour, 1.9)):
            axes.plot(*projected[[a, b]].T, color=own, linewidth=width, solid_capstyle="round")
    colours = [SIDE_COLOURS[side(joint)] for joint in names]
    axes.scatter(
        projected[:, 0], projected[:, 1], s=22, c=colours, edgecolors="white", linewidths=0.7,
        zorder=3,
    )  # fmt: skip
    truth = _array(sample.keypoints_2d[view])
    # Twice, for a rim that is seen on dark and on light ground.
    for rim, wide_rim in ((INK, 2.2), ("white", 1.2)):
        axes.scatter(
            truth[:, 0], truth[:, 1], s=62, facecolors="none", edgecolors=rim, linewidths=wide_rim,
            zorder=4,
        )  # fmt: skip
    if prediction.keypoints_2d is not None:
        read = _array(prediction.keypoints_2d[row, view])
        for mark, size, line in ((INK, 24.0, 2.2), (_READ, 20.0, 1.3)):
            axes.scatter(
                read[:, 0], read[:, 1], s=size, c=mark, marker="x", linewidths=line, zorder=5
            )
        error = np.linalg.norm(read - truth, axis=-1)
        if np.isfinite(error).any():
            label += f": heat maps {np.nanmean(error):.1f} px off"
    axes.text(
        0.015, 0.985, label, transform=axes.transAxes, va="top", fontsize=9, color="white",
        bbox={"facecolor": INK, "alpha": 0.65, "pad": 2.5, "linewidth": 0}, zorder=6,
    )  # fmt: skip
    axes.set_xlim(-0.5, wide - 0.5)
    axes.set_ylim(high - 0.5, -0.5)


def _draw_poses(axes: Axes, eye: View, points: Array, truth: Array, names: Sequence[str]) -> None:
    draw_skeleton(axes, eye, truth, names, colour="#b9c3cb", width=5.5, joints=False)
    for pair in zip(eye(points), eye(truth), strict=True):
        axes.plot(*np.stack(pair).T, color=INK, linewidth=0.9, zorder=2.5)
    draw_skeleton(axes, eye, points, names, width=2.6)
    bare(axes)
    found = _found(points, truth)
    axes.margins(0.1)
    axes.autoscale_view()
    if len(found):
        scale_bar(axes, nice_step(extent(found), 4), "mm")


def _draw_volume(
    axes: Axes,
    eye: View,
    logits: Tensor,
    grid: VoxelGrid,
    row: int,
    points: Array,
    truth: Array,
    names: Sequence[str],
) -> None:
    places = eye(_found(points, truth))
    window = None
    if len(places):
        middle, half = (places.max(axis=0) + places.min(axis=0)) / 2, np.ptp(places, axis=0) / 2
        window = np.stack([middle - half.max() - 200, middle + half.max() + 200])
    picture, corners = project_volume(logits, grid, eye, row=row, window=window)
    # White, darkened by each joint's colour as far as the joint may be there.
    image = np.ones((*picture.shape[1:], 3))
    for heat, colour in zip(picture, joint_colours(names), strict=True):
        image *= 1 - heat[..., None] ** 0.7 * (1 - colour)
    low, high = corners
    axes.imshow(
        image, origin="lower", extent=(low[0], high[0], low[1], high[1]), interpolation="bilinear"
    )
    draw_skeleton(axes, eye, truth, names, colour=GREY, width=0.9, joints=False)
    axes.set_aspect("equal", adjustable="box", anchor="N")
    axes.set_xlim(low[0], high[0])
    axes.set_ylim(low[1], high[1])
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_color(PALE)
    size = "x".join(map(str, grid.size))
    title(axes, "The volume, from the front", f"{size} voxels; a colour a joint; lines: truth")


def project_volume(
    logits: Tensor,
    grid: VoxelGrid,
    eye: View,
    *,
    row: int = 0,
    window: Array | None = None,
) -> tuple[Array, Array]:
    """Looks through volumes: the largest probability along each line of sight.

    Args:
        logits: [J, X, Y, Z] what the softmax is taken of.
        grid: where the voxels are.
        eye: from where.
        row: which of the grid's batch; a grid of batch 1 serves all.
        window: [2, 2] low and high corner of the picture, in the view's coordinates; None: all.

    Returns:
        [J, H, W] parts of each joint's largest probability in the picture, the first row at the
        bottom; and the picture's corners [2, 2], as `window`.
    """
    row = min(row, grid.batch - 1)
    origin = _array(grid.origin[row])
    steps = _array(grid.axes[row])
    size = np.array(grid.size)
    corners = np.stack(np.meshgrid(*([-0.5, n - 0.5] for n in size), indexing="ij"), axis=-1)
    box = origin + corners.reshape(8, 3) @ steps
    frame = np.stack([eye.right, eye.up, eye.away])
    low, high = (box @ frame.T).min(axis=0), (box @ frame.T).max(axis=0)
    if window is not None:
        low[:2], high[:2] = window

    def middles(axis: int, count: int) -> Array:
        step = (high[axis] - low[axis]) / count
        places: Array = low[axis] + (np.arange(count) + 0.5) * step
        return places

    across, upwards = middles(0, _VOLUME_PIXELS), middles(1, _VOLUME_PIXELS)
    probability = logits.detach().float().cpu().flatten(1).softmax(-1).reshape(logits.shape)
    picture = torch.zeros(len(logits), _VOLUME_PIXELS, _VOLUME_PIXELS)
    inverse = np.linalg.inv(steps)
    plane = across[None, :, None] * eye.right + upwards[:, None, None] * eye.up
    for depth in middles(2, _VOLUME_DEPTHS):
        index = (plane + depth * eye.away - origin) @ inverse
        # grid_sample counts the last axis first, from -1 to 1 between the outer faces.
        place = torch.from_numpy(((2 * index + 1) / size - 1)[..., ::-1].copy()).float()
        sampled = torch.nn.functional.grid_sample(
            probability[None], place[None, None], padding_mode="zeros", align_corners=False
        )
        picture = torch.maximum(picture, sampled[0, :, 0])
    peak = picture.amax(dim=(1, 2), keepdim=True)
    part = _array(picture / torch.where(peak > 0, peak, 1))
    return np.nan_to_num(part), np.stack([low[:2], high[:2]])


def joint_colours(joint_names: Sequence[str]) -> Array:
    """Gives each joint a colour [J, 3]: left cold, right warm, the middle purple."""
    from matplotlib.colors import hsv_to_rgb

    hues = {"l": (0.42, 0.66), "r": (0.0, 0.14), "": (0.74, 0.88)}
    sides = [side(name) for name in joint_names]
    colours = np.empty((len(sides), 3))
    for each, (first, last) in hues.items():
        own = [at for at, name in enumerate(sides) if name == each]
        for at, hue in zip(own, np.linspace(first, last, len(own)), strict=True):
            colours[at] = hsv_to_rgb((hue, 0.9, 0.8))
    return colours


def _draw_joint_errors(axes: Axes, points: Array, truth: Array, names: Sequence[str]) -> None:
    errors = np.linalg.norm(points - truth, axis=-1)
    finite = np.isfinite(errors)
    colours = [SIDE_COLOURS[side(name)] for name in names]
    axes.barh(range(len(names)), np.where(finite, errors, 0), 0.62, color=colours)
    right = float(np.nanmax(errors)) if finite.any() else 1.0
    right = 1.28 * max(right, 1e-6)
    for at, error in enumerate(errors):
        # A joint that is not known cannot be missed.
        text = f"{error:.0f}" if finite[at] else "-"
        if not finite[at] and np.isfinite(truth[at]).all():
            text = "not found"
        axes.text(
            (error if finite[at] else 0) + 0.015 * right, at, text, va="center", fontsize=8.5,
            color=INK if finite[at] else GREY,
        )  # fmt: skip
    axes.set_yticks(range(len(names)), [verbatim(name.replace("_", " ")) for name in names])
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlim(0, right)
    light(axes)
    axes.tick_params(axis="y", length=0)
    title(axes, "Error per joint", "mm, absolute")


def _projected(projection: Array, points: Array) -> Array:
    """Pixels [J, 2] of world points; NaN behind the camera."""
    homogeneous = points @ projection[:, :3].T + projection[:, 3]
    front = homogeneous[:, 2:] > 0
    pixels: Array = np.where(
        front, homogeneous[:, :2] / np.where(front, homogeneous[:, 2:], 1), np.nan
    )
    return pixels


def _found(points: Array, truth: Array) -> Array:
    both = np.concatenate([points, truth])
    found: Array = both[np.isfinite(both).all(axis=-1)]
    return found


def _limb_colour(first: str, second: str) -> str:
    sides = {side(first), side(second)} - {""}
    return SIDE_COLOURS[sides.pop() if len(sides) == 1 else ""]


def _array(tensor: Tensor) -> Array:
    return np.asarray(tensor.detach().cpu().double().numpy())
