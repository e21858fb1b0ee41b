# SPDX-License-Identifier: Apache-2.0
"""A demonstration that needs no data: a generated walk, filmed by five generated cameras.

The detections are as unlike the truth as a real detector's: noisy, worse where the body hides the
joint, sometimes on the other side's joint altogether; and the confidences know some of it.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from tritool import plot
from tritool.data.recording import (
    Array,
    Recording,
    make_recording,
    write_recording,
    written_aside,
)
from tritool.ops import soft_argmax2d, triangulate
from tritool.reconstruction import Spread, reconstruct, summarise
from tritool.skeletons import HUMAN36M_JOINTS, limbs

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SEED = 7
FRAMES = 90
FRAMES_PER_SECOND = 30.0
IMAGE_SIZE = (1280, 720)
HEATMAP_SIZE = (48, 64)
# Standard deviation of their peaks, cells.
PEAK_WIDTH = 3.5
# How sharply the soft-argmax reads heat maps whose peaks are about 1 high.
INVERSE_TEMPERATURE = 16.0
# The advances `run_demo` reports.
STEPS = 6

METHODS: dict[str, dict[str, Any]] = {
    "plain": {"weighting": "none"},
    "confidence-weighted": {},
    "the same, inhomogeneous, reweighted once": {"mode": "inhomogeneous", "reweight": 1},
}


@dataclass(frozen=True, eq=False)
class Pipeline:
    """One frame from heat maps to 3D points, and the gradient of their error all the way back.

    Attributes:
        frame: which frame of the recording.
        heatmaps: [C, J, H, W] what a network might have put out.
        boxes: [C, 4] where in the images the heat maps lie, x0, y0, x1, y1, pixels.
        pixels: [C, J, 2] their soft-argmax, image pixels as measured.
        truth: [C, J, 2] where the joints are in the images.
        points: [J, 3] the triangulated joints, mm.
        error: mean distance of the points to the truth, mm.
        grad_pixels: [C, J, 2] gradient of the error, mm per pixel.
        grad_heatmaps: [C, J, H, W] gradient of the error, mm per unit of heat.
    """

    frame: int
    heatmaps: Array
    boxes: Array
    pixels: Array
    truth: Array
    points: Array
    error: float
    grad_pixels: Array
    grad_heatmaps: Array


@dataclass(frozen=True)
class Report:
    """What the demonstration found.

    Attributes:
        errors: distance of the joints to the truth for each method, mm.
        pipeline_frame: the frame taken from heat maps to 3D.
        pipeline_error: mean distance to the truth there, mm.
        written: the files made.
    """

    errors: dict[str, Spread]
    pipeline_frame: int
    pipeline_error: float
    written: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Returns the same as what JSON can hold."""
        return asdict(self) | {"unit": "mm", "seed": SEED}

    def to_text(self) -> str:
        """Returns the same for people, a table first."""
        width = max(map(len, self.errors))
        lines = [
            f"a generated walk: {FRAMES} frames, 17 joints, {len(_RIG)} cameras",
            "",
            f"{'distance to the truth, mm':{width}}   median     mean     90 %",
        ]
        lines += [
            f"{name:{width}} {each.median:8.1f} {each.mean:8.1f} {each.p90:8.1f}"
            for name, each in self.errors.items()
        ]
        lines += [
            "",
            f"frame {self.pipeline_frame} from heat maps by soft-argmax and triangulation: "
            f"{self.pipeline_error:.1f} mm,",
            "and its gradient back to every pixel of the heat maps: see the picture",
            "",
            *(f"written  {path}" for path in self.written),
        ]
        return "\n".join(lines)


def run_demo(folder: Path, *, progress: Callable[[int], object] | None = None) -> Report:
    """Generates a recording, reconstructs it in several ways, and draws what came out.

    Args:
        folder: where to put ``demo.png``, ``errors.csv`` and ``recording.npz``; it must exist.
        progress: called with 1 after each of `STEPS` steps.

    Returns:
        The errors and the files written.

    Raises:
        OSError: a file cannot be written.
    """
    advance = progress or (lambda done: None)
    recording = generate_recording()
    write_recording(folder / "recording.npz", recording)
    advance(1)
    errors: dict[str, Spread] = {}
    joint_errors: dict[str, Array] = {}
    for name, options in METHODS.items():
        reconstruction = reconstruct(recording, **options)
        spread = summarise(recording, reconstruction).reference_error
        assert spread is not None  # the recording has its truth
        errors[name] = spread
        distances = np.linalg.norm(reconstruction.keypoints_3d[:, 0] - _truth(recording), axis=-1)
        joint_errors[name] = np.nanmean(distances, axis=0)
        advance(1)
    with written_aside(folder / "errors.csv") as aside, aside.open("w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["method", "points", "median_mm", "mean_mm", "p90_mm"])
        for name, each in errors.items():
            table.writerow([name, each.count, each.median, each.mean, each.p90])
    pipeline = run_pipeline(recording, _telling_frame(recording))
    advance(1)
    draw_demo(folder / "demo.png", recording, pipeline, errors, joint_errors)
    advance(1)
    written = tuple(str(folder / name) for name in ("demo.png", "errors.csv", "recording.npz"))
    return Report(errors, pipeline.frame, pipeline.error, written)


# Azimuth in degrees, distance and height in mm of each camera.
_RIG = (
    (15.0, 4300.0, 1900.0),
    (85.0, 4100.0, 2600.0),
    (155.0, 4300.0, 1500.0),
    (230.0, 4200.0, 2300.0),
    (305.0, 4100.0, 1600.0),
)


def generate_recording(seed: int = SEED) -> Recording:
    """Generates the walk and what the detector made of it.

    Args:
        seed: of the detector's errors; the walk and the cameras are always the same.

    Returns:
        `FRAMES` frames of one actor with the 17 joints of Human3.6M, mm, z up; ``gt3d`` is true.
    """
    random = np.random.default_rng(seed)
    K, R, t, dist = _rig()
    walk, left = walker()
    empty = np.full((FRAMES, 1, len(_RIG), len(HUMAN36M_JOINTS), 2), np.nan)
    cameras = make_recording(K, R, t, empty, dist=dist, image_size=[IMAGE_SIZE] * len(_RIG)).cameras
    # [F, J, C, 2] to [F, C, J, 2]
    true = cameras.project(torch.from_numpy(walk)).movedim(2, 1).numpy()
    hidden = _hidden(walk, left, -np.einsum("vji,vj->vi", R, t))

    noise = random.normal(size=true.shape) * np.where(hidden, 9.0, 2.0)[..., None]
    # The commonest gross error: the joint of the other side.
    mirror = [HUMAN36M_JOINTS.index(_mirrored(name)) for name in HUMAN36M_JOINTS]
    swapped = random.random(hidden.shape) < np.where(hidden, 0.25, 0.01)
    pixels = np.where(swapped[..., None], true[:, :, mirror], true) + noise

    believed = np.where(swapped, 0.25, np.where(hidden, 0.4, 0.85))
    confidence = np.clip(believed + 0.1 * random.normal(size=hidden.shape), 0.02, 1.0)
    missed = random.random(hidden.shape) < np.where(hidden, 0.1, 0.01)
    outside = ((pixels < 0) | (pixels > np.array(IMAGE_SIZE) - 1)).any(axis=-1)
    pixels[missed | outside] = np.nan
    return make_recording(
        K,
        R,
        t,
        pixels[:, None],
        conf=confidence[:, None],
        dist=dist,
        image_size=[IMAGE_SIZE] * len(_RIG),
        joint_names=HUMAN36M_JOINTS,
        camera_names=[f"camera {1 + index}" for index in range(len(_RIG))],
        meta={"name": "tritool demo: a generated walk", "world_unit": "mm", "seed": seed},
        gt3d=walk[:, None],
    )


def walker() -> tuple[Array, Array]:
    """Makes the figure walk three seconds on an arc, by a gait of plain sines.

    Returns:
        The joints [F, J, 3] in the order of Human3.6M, mm, z up; and the walker's left [F, 3].
    """
    time = np.arange(FRAMES) / FRAMES_PER_SECOND
    speed, radius, cadence, middle = 1150.0, 3200.0, 0.9, 2.1
    turn = (time - time.mean()) * speed / radius + middle
    outward = np.stack([np.cos(turn), np.sin(turn), np.zeros(FRAMES)], axis=-1)
    ahead = np.stack([-np.sin(turn), np.cos(turn), np.zeros(FRAMES)], axis=-1)
    up = np.broadcast_to([0.0, 0.0, 1.0], ahead.shape)
    left = -outward

    def swing(length: float, angle: Array) -> Array:
        """A segment hanging down, swung ahead by an angle [F] in degrees."""
        a = np.radians(angle)[:, None]
        segment: Array = length * (np.sin(a) * ahead - np.cos(a) * up)
        return segment

    body: dict[str, Array] = {"pelvis": np.zeros((FRAMES, 3))}
    body["spine"] = 240 * up + 12 * ahead
    body["neck"] = body["spine"] + 260 * up + 22 * ahead
    body["nose"] = body["neck"] + 95 * up + 85 * ahead
    body["head_top"] = body["neck"] + 215 * up + 20 * ahead
    stride = 2 * math.pi * cadence * time
    for name, sign, phase in (("l", 1.0, stride), ("r", -1.0, stride + math.pi)):
        thigh = 26 * np.sin(phase) + 4
        # The knee bends while the leg swings forward.
        knee = 6 + 52 * np.clip(np.cos(phase), 0, None) ** 2
        body[f"{name}_hip"] = sign * 105 * left - 20 * up
        body[f"{name}_knee"] = body[f"{name}_hip"] + swing(430.0, thigh)
        body[f"{name}_ankle"] = body[f"{name}_knee"] + swing(420.0, thigh - knee)
        arm = -24 * np.sin(phase) + 2
        body[f"{name}_shoulder"] = body["neck"] + sign * 175 * left - 45 * up
        body[f"{name}_elbow"] = body[f"{name}_shoulder"] + swing(285.0, arm) + sign * 45 * left
        body[f"{name}_wrist"] = body[f"{name}_elbow"] + swing(255.0, arm + 28) + sign * 10 * left
    joints = np.stack([body[name] for name in HUMAN36M_JOINTS], axis=1)
    # The lower foot stands on the floor, 80 mm below its ankle.
    lift = 80 - joints[..., 2].min(axis=1)
    # The arc bends around a point beside the rig, so that its middle is the rig's.
    place = radius * (outward - [math.cos(middle), math.sin(middle), 0.0])
    return joints + (place + lift[:, None] * up)[:, None], left


def run_pipeline(recording: Recording, frame: int) -> Pipeline:
    """Takes one frame from heat maps to 3D, and the error's gradient back.

    Args:
        recording: of `generate_recording`.
        frame: which frame.

    Returns:
        All that went forward and came back.
    """
    target = torch.from_numpy(_truth(recording)[frame])
    weights = torch.from_numpy(recording.conf[frame, 0].T)
    truth = recording.cameras.project(target).movedim(1, 0)  # [C, J, 2]
    boxes = _boxes(truth)
    detected = torch.from_numpy(recording.kp2d[frame, 0])
    heatmaps = _heatmaps(_into(boxes, detected), _into(boxes, truth), weights.T)

    heatmaps.requires_grad_()
    cells = soft_argmax2d(heatmaps, inverse_temperature=INVERSE_TEMPERATURE)
    # Back to image pixels before the triangulation: in heat-map cells, whose size differs from view
    # to view, the linear solution would weight the views by it.
    pixels = _out_of(boxes, cells)
    cameras = recording.cameras
    points = triangulate(cameras.undistort(pixels.movedim(0, 1)), cameras.projections, weights)
    error = torch.linalg.vector_norm(points - target, dim=-1).mean()
    grad_pixels, grad_heatmaps = torch.autograd.grad(error, (pixels, heatmaps))
    return Pipeline(
        frame=frame,
        heatmaps=heatmaps.detach().numpy(),
        boxes=boxes.numpy(),
        pixels=pixels.detach().numpy(),
        truth=truth.numpy(),
        points=points.detach().numpy(),
        error=error.item(),
        grad_pixels=grad_pixels.numpy(),
        grad_heatmaps=grad_heatmaps.numpy(),
    )


def draw_demo(
    path: Path,
    recording: Recording,
    pipeline: Pipeline,
    errors: dict[str, Spread],
    joint_errors: dict[str, Array],
) -> None:
    """Draws the demonstration on one page.

    Args:
        path: the picture, replaced if it exists.
        recording: of `generate_recording`.
        pipeline: of `run_pipeline`.
        errors: distance to the truth for each method, mm.
        joint_errors: [J] mean distance to the truth of each joint, mm, for each method.

    Raises:
        OSError: the picture cannot be written.
    """
    figure = plot.new_figure(14.0, 9.6)
    plain, weighted, *_ = errors.values()
    plot.headline(
        figure,
        "From pixels to 3D, and the gradient back to the pixels",
        f"a generated walk, {len(recording.camera_names)} cameras, a noisy detector: joints "
        f"{plain.mean:.0f} mm off with plain triangulation, {weighted.mean:.0f} mm with "
        "confidences as weights",
    )
    grid = figure.add_gridspec(
        2, 12, height_ratios=(1.2, 1), left=plot.LEFT, right=0.975, top=0.835, bottom=0.07,
        hspace=0.42, wspace=1.4,
    )  # fmt: skip
    cells = (grid[0, :8], grid[0, 8:], grid[1, :6], grid[1, 6:9], grid[1, 9:])
    scene, image, bars, heat, gradient = (figure.add_subplot(cell) for cell in cells)

    _draw_walk(scene, recording, pipeline)
    offsets = pipeline.pixels - pipeline.truth
    # What a small step along the gradient promises at each point, from where it is to the truth.
    promise = (pipeline.grad_pixels * offsets).sum(axis=-1)
    view = int(promise.max(axis=1).argmax())
    joint = int(promise[view].argmax())
    _draw_image(image, recording, pipeline, view, joint)
    _draw_joint_errors(bars, joint_errors)
    _draw_heat(heat, gradient, pipeline, view, joint)
    plot.save_figure(path, figure)


def _draw_walk(axes: Axes, recording: Recording, pipeline: Pipeline) -> None:
    walk = _truth(recording)
    view = plot.View.around(np.array([0.0, 0, 1]), np.array([0.0, 1, 0]), azimuth=4, elevation=22)
    centres = recording.cameras.centers.numpy()
    plot.draw_floor(axes, view, np.array([0.0, 0, 1]), np.concatenate([centres, walk[:, 0]]), 0.0)
    for centre in centres:
        foot = centre * [1, 1, 0]
        axes.plot(*view([centre, foot]).T, color=plot.GREY, linewidth=0.7, linestyle=":", zorder=1)
    plot.draw_cameras(axes, view, recording, 700.0)
    for name in ("l_ankle", "r_ankle", "l_wrist", "r_wrist"):
        trail = view(walk[:, HUMAN36M_JOINTS.index(name)])
        colour = plot.SIDE_COLOURS[name[0]]
        axes.plot(*trail.T, color=colour, linewidth=0.9, alpha=0.45)
    for frame in range(pipeline.frame % 16, len(walk), 16):
        if frame != pipeline.frame:
            plot.draw_skeleton(
                axes, view, walk[frame], HUMAN36M_JOINTS, width=1.5, joints=False, alpha=0.22
            )
    plot.draw_skeleton(axes, view, pipeline.points, HUMAN36M_JOINTS, width=2.6)
    plot.bare(axes)
    axes.margins(x=0.02, y=0.09)
    axes.autoscale_view()
    plot.title(
        axes,
        "The walk",
        f"floor grid in metres; pale: the truth; full: frame {pipeline.frame}, triangulated from "
        f"heat maps, {pipeline.error:.0f} mm off",
    )


def _draw_image(
    axes: Axes, recording: Recording, pipeline: Pipeline, view: int, joint: int
) -> None:
    truth, pixels = pipeline.truth[view], pipeline.pixels[view]
    confidence = recording.conf[pipeline.frame, 0, view]
    for a, b in limbs(HUMAN36M_JOINTS):
        axes.plot(*truth[[a, b]].T, color=plot.PALE, linewidth=5, solid_capstyle="round", zorder=1)
    for start, end in zip(truth, pixels, strict=True):
        axes.plot([start[0], end[0]], [start[1], end[1]], color=plot.GREY, linewidth=0.8, zorder=2)
    dots = axes.scatter(
        pixels[:, 0], pixels[:, 1], c=confidence, cmap="viridis", vmin=0, vmax=1, s=46,
        edgecolors="white", linewidths=0.7, zorder=4,
    )  # fmt: skip
    # Against the gradient: where each point should go for the 3D error to fall.
    pull = -pipeline.grad_pixels[view]
    strength = np.linalg.norm(pull, axis=-1)
    x0, y0, x1, y1 = pipeline.boxes[view]
    longest = 0.16 * (y1 - y0)
    axes.quiver(
        pixels[:, 0], pixels[:, 1], *(pull * longest / strength.max()).T, angles="xy",
        scale_units="xy", scale=1, color="#d55e00", width=0.008, zorder=5,
    )  # fmt: skip
    axes.annotate(
        HUMAN36M_JOINTS[joint], (pixels[joint, 0], pixels[joint, 1]), (-12, -2), zorder=6,
        textcoords="offset points", ha="right", va="center", fontsize=9, color=plot.INK,
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1},
    )  # fmt: skip
    axes.set_aspect("equal", adjustable="box")
    axes.set_xlim(x0, x1)
    axes.set_ylim(y1, y0)
    axes.set_xlabel("x [px]")
    axes.set_ylabel("y [px]")
    plot.light(axes)
    inside = axes.inset_axes((1.06, 0.0, 0.035, 0.4))
    bar = axes.figure.colorbar(dots, cax=inside, ticks=[0, 0.5, 1])
    bar.ax.set_title("confidence", fontsize=9, color=plot.INK, loc="left")
    bar.ax.tick_params(labelsize=8, length=0)
    bar.outline.set_visible(False)
    plot.title(
        axes,
        f"What {recording.camera_names[view]} saw",
        f"arrows: down the gradient of the 3D error,\nlongest "
        f"{strength.max():.2f} mm per px; pale: the truth",
    )


def _draw_joint_errors(axes: Axes, joint_errors: dict[str, Array]) -> None:
    plain, weighted, *_ = joint_errors.values()
    colours = {"plain": plot.GREY, "confidence-weighted": "#009e73"}
    order = np.argsort(plain)
    rows = np.arange(len(order))
    axes.hlines(rows, weighted[order], plain[order], color=plot.PALE, linewidth=4, zorder=1)
    for name, colour in colours.items():
        axes.plot(joint_errors[name][order], rows, "o", color=colour, markersize=6, label=name)
    axes.set_yticks(rows, [HUMAN36M_JOINTS[joint] for joint in order])
    axes.set_xlim(left=0)
    axes.set_xlabel("mean distance to the truth [mm]")
    axes.grid(axis="x", color=plot.PALE, linewidth=0.8)
    axes.set_axisbelow(True)
    plot.light(axes)
    axes.legend(loc="lower right", frameon=False, fontsize=9.5)
    plot.title(axes, "Error of each joint", "all frames")


def _draw_heat(heat: Axes, gradient: Axes, pipeline: Pipeline, view: int, joint: int) -> None:
    boxes = torch.from_numpy(pipeline.boxes[view : view + 1])
    places = [
        _into(boxes, torch.from_numpy(pixels[None, None, view, joint]))[0, 0].numpy()
        for pixels in (pipeline.truth, pipeline.pixels)
    ]
    change = -pipeline.grad_heatmaps[view, joint]
    largest = float(np.abs(change).max())
    name = HUMAN36M_JOINTS[joint]
    heat.imshow(pipeline.heatmaps[view, joint], cmap="magma", vmin=0, vmax=1)
    gradient.imshow(change, cmap="RdBu_r", vmin=-largest, vmax=largest)
    for axes, ink in ((heat, "white"), (gradient, plot.INK)):
        (x, y), (u, v) = places
        axes.plot(
            x, y, "o", color=ink, markersize=24, markerfacecolor="none", markeredgewidth=1.2,
        )  # fmt: skip
        axes.plot(u, v, "+", color=ink, markersize=9, markeredgewidth=1.4)
        axes.set_xticks([])
        axes.set_yticks([])
        for edge in axes.spines.values():
            edge.set_color(plot.PALE)
    wide, high = HEATMAP_SIZE
    plot.title(
        heat,
        f"Heat map of {name}",
        f"{wide} x {high} cells; ring: the truth,\ncross: the soft-argmax",
    )
    plot.title(gradient, "Its gradient", "red: more heat lowers the\n3D error; blue: less does")


def _rig() -> tuple[Array, Array, Array, Array]:
    """K [C, 3, 3], R [C, 3, 3], t [C, 3] and distortion [C, 5] of the cameras."""
    wide, high = IMAGE_SIZE
    K = np.array([[900.0, 0, (wide - 1) / 2], [0, 900.0, (high - 1) / 2], [0, 0, 1]])
    rotations, translations = [], []
    for azimuth, distance, height in _RIG:
        a = math.radians(azimuth)
        centre = np.array([distance * math.cos(a), distance * math.sin(a), height])
        ahead = np.array([0.0, 0.0, 900.0]) - centre
        ahead /= np.linalg.norm(ahead)
        right = np.cross(ahead, [0.0, 0.0, 1.0])
        right /= np.linalg.norm(right)
        R = np.stack([right, np.cross(ahead, right), ahead])
        rotations.append(R)
        translations.append(-R @ centre)
    dist = np.array([-0.20, 0.05, 0.0005, -0.0004, 0.0])
    count = len(_RIG)
    return (
        np.tile(K, (count, 1, 1)),
        np.array(rotations),
        np.array(translations),
        np.tile(dist, (count, 1)),
    )


def _hidden(walk: Array, left: Array, centres: Array) -> Any:
    """[F, C, J] whether the walker's own body hides a joint: its side is turned away."""
    pelvis = walk[:, :1]
    beside = ((walk - pelvis) * left[:, None]).sum(axis=-1)  # [F, J], mm to the left
    towards = centres - pelvis  # [F, C, 3]
    towards /= np.linalg.norm(towards, axis=-1, keepdims=True)
    facing = (towards * left[:, None]).sum(axis=-1)  # [F, C], 1: from the left
    # More than half the body's width behind its middle, as this camera sees it.
    return -facing[:, :, None] * beside[:, None] > 60


def _mirrored(name: str) -> str:
    other = {"l_": "r_", "r_": "l_"}.get(name[:2])
    return name if other is None else other + name[2:]


def _truth(recording: Recording) -> Array:
    """[F, J, 3] the true joints of a generated recording, mm."""
    assert recording.gt3d is not None
    return recording.gt3d[:, 0]


def _telling_frame(recording: Recording) -> int:
    """The frame in which the detector is grossly wrong most often."""
    true = recording.cameras.project(torch.from_numpy(_truth(recording))).movedim(2, 1).numpy()
    misses = np.linalg.norm(recording.kp2d[:, 0] - true, axis=-1) > 25
    # Near the middle of the walk, where every camera sees the whole body.
    start = FRAMES // 4
    return start + int(misses[start:-start].sum(axis=(1, 2)).argmax())


def _boxes(pixels: torch.Tensor) -> torch.Tensor:
    """[C, 4] boxes of the heat maps' proportions around points [C, J, 2], with a margin."""
    low, high = pixels.amin(dim=1), pixels.amax(dim=1)
    middle, size = (low + high) / 2, high - low
    shape = torch.tensor(HEATMAP_SIZE, dtype=pixels.dtype)
    half = 0.6 * (size / shape).amax(dim=1, keepdim=True) * shape
    return torch.cat([middle - half, middle + half], dim=1)


def _into(boxes: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
    """Image pixels [C, J, 2] to heat-map cells, as `Cameras.crop` and `resize` move them."""
    scale = torch.tensor(HEATMAP_SIZE) / (boxes[:, 2:] - boxes[:, :2])
    return (pixels - boxes[:, None, :2] + 0.5) * scale[:, None] - 0.5


def _out_of(boxes: torch.Tensor, cells: torch.Tensor) -> torch.Tensor:
    """The inverse of `_into`."""
    scale = torch.tensor(HEATMAP_SIZE) / (boxes[:, 2:] - boxes[:, :2])
    return (cells + 0.5) / scale[:, None] - 0.5 + boxes[:, None, :2]


def _heatmaps(
    detected: torch.Tensor, truth: torch.Tensor, confidence: torch.Tensor
) -> torch.Tensor:
    """[C, J, H, W]: a peak where the joint was detected, a lower one at the truth, and noise.

    Args:
        detected: [C, J, 2] cells, NaN where nothing was.
        truth: [C, J, 2] cells.
        confidence: [C, J].
    """
    wide, high = HEATMAP_SIZE
    x, y = torch.arange(wide), torch.arange(high)[:, None]

    def peak(at: torch.Tensor, sigma: float) -> torch.Tensor:
        dx, dy = x - at[..., 0, None, None], y - at[..., 1, None, None]
        return torch.exp(-(dx * dx + dy * dy) / (2 * sigma * sigma))

    missed = detected.isnan().any(dim=-1)
    main = peak(torch.where(missed[..., None], truth, detected), PEAK_WIDTH)
    height = torch.where(missed, 0.3, 0.6 + 0.4 * confidence)[..., None, None]
    heat = torch.maximum(height * main, 0.92 * height * peak(truth, PEAK_WIDTH))
    noise = torch.randn(
        *missed.shape, high // 4, wide // 4,
        generator=torch.Generator().manual_seed(SEED), dtype=heat.dtype,
    )  # fmt: skip
    blurred = torch.nn.functional.interpolate(
        noise, size=(high, wide), mode="bicubic", align_corners=False
    )
    return heat + 0.04 * blurred
