# SPDX-License-Identifier: Apache-2.0
"""A person in a cube of voxels: the colours of a recording's images, unprojected and put together.

    python examples/unproject_images.py walk.npz -o person.png
    python examples/unproject_images.py walk.npz --images "img/{camera}_{frame:04}.jpg" --frame 25

Above: slices through the cube, each voxel in the mean colour of the views that see it. What lies in
the slice is sharp, all else is a ghost for each camera. Below: only voxels on whose colour all
views agree, the best along each line within a slab about the slice. The triangulated skeleton is
drawn over both: it comes from detected points and never saw a colour, so that both agree is a check
of the calibration, of the detections and of the order of the images.

The images are those that the recording names (keys `images` and `image_affine`), or `--images`, a
pattern with {camera} and {frame}. Voxels are sampled from images shrunk to about a pixel a voxel.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.image import imread
from torch import Tensor

from tritool import VoxelGrid, plot
from tritool.data.recording import Recording, RecordingError, read_recording
from tritool.ops import unproject
from tritool.reconstruction import reconstruct
from tritool.skeletons import side

# Light falls differently on a body's two sides: brightness counts less than the two hues.
OPPONENT = torch.tensor([[0.16, 0.32, 0.06], [-0.169, -0.331, 0.5], [0.5, -0.419, -0.081]])
AGREEMENT = 0.05  # standard deviation over the views at which agreement fades
SLAB = 0.25  # of the cube's side: how deep the lower pictures look


@dataclass(frozen=True)
class Colours:
    """What the cube holds."""

    grid: VoxelGrid
    mean: Tensor
    """[X, Y, Z, 3], red, green, blue in 0 to 1; 0 where no view looks."""
    agreement: Tensor
    """[X, Y, Z], 1 where all views show the same colour, down to 0; 0 where a view is missing."""


def read_images(path: Path, recording: Recording, row: int, pattern: str | None) -> list[Tensor]:
    """The images [3, H, W] of one frame, by camera, in 0 to 1."""
    if pattern is None:
        with np.load(path, allow_pickle=False) as file:
            files = [path.parent / name for name in file["images"][row]]
    else:
        frame = recording.frame_ids[row].item()
        try:
            files = [Path(pattern.format(camera=c, frame=frame)) for c in recording.camera_names]
        except (KeyError, IndexError) as error:
            raise ValueError(f"--images knows {{camera}} and {{frame}}, not {error}") from error
    images = []
    for file in files:
        pixels = imread(file)
        scale = np.iinfo(pixels.dtype).max if pixels.dtype.kind == "u" else 1
        colours = pixels[..., :3] if pixels.ndim == 3 else np.stack([pixels] * 3, -1)
        images.append(torch.from_numpy(np.float32(colours) / scale).movedim(-1, 0))
    return images


def frames_with_images(path: Path, recording: Recording) -> list[int]:
    """The rows for which the recording names an image of every camera."""
    with np.load(path, allow_pickle=False) as file:
        named = file["images"] if "images" in file else np.full((len(recording.frame_ids), 1), "")
    return np.flatnonzero((named != "").all(-1)).tolist()


def ideal_maps(
    recording: Recording, images: list[Tensor], affine: Tensor, shrink: int
) -> tuple[Tensor, Tensor]:
    """The images as pinhole cameras would see them, shrunk: maps [C, 4, H, W] and projections.

    The fourth channel is 1 inside of an image. `affine` [C, 3] is (s, x, y): the pixel p of the
    recording is the pixel s p + (x, y) of the image file.
    """
    own = [[image.shape[2], image.shape[1]] for image in images]
    sizes = own if recording.image_size is None else recording.image_size.tolist()
    columns, rows = (-(-max(size) // shrink) for size in zip(*sizes, strict=True))
    y, x = torch.meshgrid(
        torch.arange(rows * shrink), torch.arange(columns * shrink), indexing="ij"
    )
    ideal = torch.stack([x, y], -1)[:, :, None].double().expand(-1, -1, len(images), 2)
    places = recording.cameras.distort(ideal) * affine[:, :1] + affine[:, 1:]
    maps = []
    for image, at in zip(images, places.nan_to_num(-1e6).unbind(2), strict=True):
        size = torch.tensor([image.shape[2], image.shape[1]])
        grid = ((2 * at + 1) / size - 1).float()[None]
        inside = torch.cat([image, torch.ones_like(image[:1])])[None]
        fine = torch.nn.functional.grid_sample(inside, grid, align_corners=False)
        maps.append(torch.nn.functional.avg_pool2d(fine[0], shrink))
    whole = recording.cameras.crop([0, 0, columns * shrink, rows * shrink])
    return torch.stack(maps), whole.resize([columns, rows]).projections.float()


def unproject_colours(maps: Tensor, projections: Tensor, grid: VoxelGrid) -> Colours:
    """Mean and spread of the colours over the views, from one unprojection of sums."""
    colours, inside = maps[:, :3], maps[:, 3:]
    hues = torch.einsum("ij,cjhw->cihw", OPPONENT, colours / inside.clamp(min=1e-6))
    features = torch.cat([inside, colours, inside * hues.square()], 1)
    sums = unproject(features[None], projections[None], grid, aggregation="sum")[0].movedim(0, -1)
    views = sums[..., :1]
    mean = sums[..., 1:4] / views.clamp(min=1e-6)
    variance = sums[..., 4:] / views.clamp(min=1e-6) - (mean @ OPPONENT.T).square()
    variance = variance.clamp(min=0).sum(-1)
    # Over 3 x 3 x 3 voxels: one voxel agrees by chance, a body does not.
    variance = torch.nn.functional.avg_pool3d(
        variance[None], 3, stride=1, padding=1, count_include_pad=False
    )[0]
    agreement = torch.exp(-variance / (2 * AGREEMENT**2))
    return Colours(grid, mean, torch.where(views[..., 0] > len(maps) - 0.5, agreement, 0.0))


def axes_of_body(recording: Recording, pose: np.ndarray, center: np.ndarray) -> np.ndarray:
    """World directions in columns: to the body's left, away from who faces it, up."""
    up = plot.up_direction(recording.R)
    trunk = [
        ("hip" in name.lower() or "shoulder" in name.lower()) for name in recording.joint_names
    ]
    sides = np.array([side(name) for name in recording.joint_names])
    found = np.isfinite(pose).all(-1) & trunk
    left, right = (pose[found & (sides == letter)] for letter in "lr")
    if len(left) and len(right):
        across = left.mean(0) - right.mean(0)
    else:  # no body: as the first camera sees it
        across = np.cross(center + recording.R[0].T @ recording.t[0], up)
    across = across - (across @ up) * up
    across /= np.linalg.norm(across)
    return np.stack([across, np.cross(up, across), up], -1)


def draw(path: Path, colours: Colours, recording: Recording, poses: np.ndarray, note: str) -> None:
    """Slices above, where the views agree below; poses [A, J, 3]."""
    grid = colours.grid
    steps = grid.axes[0].double().numpy()
    spacing = np.linalg.norm(steps, axis=-1)
    across, away, up = steps / spacing[:, None]
    middle = (torch.tensor(grid.size) - 1) / 2
    center = grid.to_world(middle[None])[0].double().numpy()
    half = np.array(grid.size) * spacing / 2
    views = {  # by the axis that is cut: which axes go right and up
        "from the front": (1, 0, 2, plot.View(across, up, away)),
        "from the body's left": (0, 1, 2, plot.View(away, up, -across)),
        "from above": (2, 0, 1, plot.View(across, away, -up)),
    }
    figure = plot.new_figure(12.6, 9.4)
    plot.headline(figure, "The person, from the images' colours", note)
    panels = figure.subplots(
        2, 3, gridspec_kw={"left": 0.03, "right": 0.99, "top": 0.86, "bottom": 0.02, "hspace": 0.16}
    )
    for column, (name, (cut, right, high, view)) in enumerate(views.items()):
        index = grid.size[cut] // 2
        slab = slice(index - round(SLAB / 2 * grid.size[cut]), None)
        slab = slice(slab.start, index + round(SLAB / 2 * grid.size[cut]) + 1)
        agreement, where = colours.agreement.movedim(cut, 0)[slab].max(0)
        layers = colours.mean.movedim(cut, 0)
        best = layers[slab].gather(0, where[None, ..., None].expand(1, *where.shape, 3))[0]
        faded = 1 - agreement[..., None] * (1 - best)
        extent = (-half[right], half[right], -half[high], half[high])
        depth = SLAB * 2 * half[cut]
        titles = (f"Slice {name}", f"Views agree, {name}")
        notes = ("mean colour", f"within {depth:.0f} {recording.unit}")
        for panel, pixels, title, small in zip(
            panels[:, column], (layers[index], faded), titles, notes, strict=True
        ):
            # movedim has left the two other axes in order, and right comes before high.
            pixels = pixels.transpose(0, 1).clamp(0, 1).numpy()
            panel.imshow(pixels, origin="lower", extent=extent)
            for pose in poses:
                joints = recording.joint_names
                for colour, width in (("white", 2.6), (None, 1.2)):
                    plot.draw_skeleton(
                        panel, view, pose - center, joints, colour=colour, width=width, joints=False
                    )
            panel.set(xlim=extent[:2], ylim=extent[2:], xticks=[], yticks=[])
            plot.title(panel, title, small)
    plot.save_figure(path, figure)


def triangulated(recording: Recording, row: int) -> np.ndarray:
    """The poses [A, J, 3] of one frame; joints that fit their pixels badly are NaN."""
    found = reconstruct(recording, mode="inhomogeneous", reweight=1, min_confidence=0.3)
    errors = found.reprojection_error  # NaN where a view takes no part
    usual = np.median(errors[np.isfinite(errors)]) if np.isfinite(errors).any() else 0.0
    bad = (errors > 4 * usual).any(axis=2)
    return np.where(bad[..., None], np.nan, found.keypoints_3d)[row]


def middle_of(recording: Recording, pose: np.ndarray, joint: str | None) -> np.ndarray:
    """The joint's place; by default the pelvis, or the middle of the hips, or of all joints."""
    names = recording.joint_names
    if joint is not None and joint not in names:
        raise ValueError(f"no joint is called {joint}; there are {', '.join(names)}")
    wanted = [joint] if joint else []
    wanted = wanted or [name for name in names if "pelvis" in name.lower()]
    wanted = wanted or [name for name in names if "hip" in name.lower()] or list(names)
    places = pose[[names.index(name) for name in wanted]]
    if not np.isfinite(places).any():
        raise ValueError(
            f"{joint or 'the body'} was not found in this frame; try --point or --frame"
        )
    return np.nanmean(places, axis=0)


def run(options: argparse.Namespace) -> Colours:
    path, recording = options.recording, read_recording(options.recording)
    rows = frames_with_images(path, recording)
    if options.images is not None:
        rows = list(range(len(recording.frame_ids)))
    ids = [str(recording.frame_ids[row]) for row in rows]
    if not rows:
        raise ValueError(f"{path} names no images; give them with --images")
    if options.frame is not None and options.frame not in ids:
        raise ValueError(f"frame {options.frame} has no images; those that have: {', '.join(ids)}")
    row = rows[0 if options.frame is None else ids.index(options.frame)]
    images = read_images(path, recording, row, options.images)
    with np.load(path, allow_pickle=False) as file:
        given = file["image_affine"] if "image_affine" in file else [[1.0, 0, 0]] * len(images)
    affine = torch.as_tensor(np.asarray(given), dtype=torch.float64)

    poses = triangulated(recording, row)
    if not 0 <= options.actor < len(poses):
        raise ValueError(f"actor {options.actor} is not there; actors: 0 to {len(poses) - 1}")
    pose = poses[options.actor]
    center = np.array(options.point or middle_of(recording, pose, options.joint))
    rotation = torch.from_numpy(axes_of_body(recording, pose, center)).float()
    grid = VoxelGrid.cube(
        torch.from_numpy(center).float()[None], options.side, options.voxels, rotation
    )
    depths = (recording.R @ center + recording.t)[:, 2]
    pixels = np.median(recording.K[:, 0, 0] / np.abs(depths)) * options.side / options.voxels
    maps, projections = ideal_maps(recording, images, affine, max(1, round(float(pixels))))
    colours = unproject_colours(maps, projections, grid)
    note = (
        f"{path.name}, frame {recording.frame_ids[row]}: {len(images)} views, {options.voxels} "
        f"voxels of {options.side / options.voxels:.3g} {recording.unit} along each side"
    )
    draw(options.output, colours, recording, poses, note)
    print(f"{note}\nwrote {options.output}")
    return colours


def main(arguments: list[str] | None = None) -> Colours:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recording", type=Path, help="an .npz file as in docs/recordings.md")
    parser.add_argument("-o", "--output", type=Path, default=Path("unprojected.png"))
    parser.add_argument("--images", metavar="PATTERN", help="with {camera} and {frame}")
    parser.add_argument("--frame", metavar="ID", help="default: the first that has images")
    parser.add_argument("--actor", type=int, default=0, help="whom the cube is about")
    parser.add_argument("--joint", metavar="NAME", help="its middle; default: the pelvis")
    parser.add_argument("--point", type=float, nargs=3, metavar=("X", "Y", "Z"), help="its middle")
    parser.add_argument("--side", type=float, default=2500.0, help="of the cube, world unit")
    parser.add_argument("--voxels", type=int, default=128, help="along each side")
    try:
        return run(parser.parse_args(arguments))
    except (RecordingError, ValueError, OSError) as error:
        sys.exit(f"unproject_images.py: {error}")


if __name__ == "__main__":
    main()
