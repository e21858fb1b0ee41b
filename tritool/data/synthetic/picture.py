# SPDX-License-Identifier: Apache-2.0
"""Samples at a glance: images side by side with the joints drawn over them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tritool.data.sample import Sample
from tritool.skeletons import limbs, side

__all__ = ["contact_sheet"]

_COLOURS = {"l": "#ff8c1a", "r": "#29b6f6", "": "#ffffff"}


def contact_sheet(samples: Sequence[Sample], path: str | Path, *, joints: bool = True) -> None:
    """Writes a picture: a row for each sample, its views side by side.

    Left joints are orange, right ones blue; visible joints filled, hidden ones hollow.

    Args:
        samples: At least one.
        path: The file to write; its ending says the format.
        joints: Whether joints are drawn.

    Raises:
        ValueError: There is no sample.
    """
    if not samples:
        raise ValueError("samples must be at least one, got none")
    from matplotlib.figure import Figure

    rows, columns = len(samples), max(len(sample.cameras) for sample in samples)
    height, width = samples[0].images.shape[-2:]
    inches = 2.0
    figure = Figure(figsize=(columns * inches, rows * inches * height / width))
    axes = figure.subplots(rows, columns, squeeze=False)
    figure.subplots_adjust(0, 0, 1, 1, 0.02, 0.02 * width / height)
    for row, sample in zip(axes, samples, strict=True):
        for axis in row:
            axis.set_axis_off()
        for view in range(len(sample.cameras)):
            axis = row[view]
            image = sample.images[view].permute(1, 2, 0).numpy()
            axis.imshow(image, interpolation="nearest")
            axis.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5))
            if joints:
                _draw_joints(axis, sample, view)
        row[0].text(
            0.02, 0.98, f"{sample.action}", transform=row[0].transAxes, va="top", color="white",
            fontsize=7, bbox={"facecolor": "black", "alpha": 0.5, "pad": 1, "linewidth": 0},
        )  # fmt: skip
    figure.savefig(path, dpi=96)


def _draw_joints(axis: object, sample: Sample, view: int) -> None:
    from matplotlib.axes import Axes

    assert isinstance(axis, Axes)
    points = sample.keypoints_2d[view].numpy()
    for a, b in limbs(sample.joint_names):
        which = side(sample.joint_names[b]) or side(sample.joint_names[a])
        axis.plot(*points[[a, b]].T, color=_COLOURS[which], linewidth=0.7, alpha=0.7)
    for point, name, seen in zip(
        points, sample.joint_names, sample.visibility[view].tolist(), strict=True
    ):
        colour = _COLOURS[side(name)]
        axis.plot(
            *point, "o", markersize=2.6, markeredgewidth=0.6, markeredgecolor=colour,
            markerfacecolor=colour if seen else "none",
        )  # fmt: skip
