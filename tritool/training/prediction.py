# SPDX-License-Identifier: Apache-2.0
"""3D poses from single images, by a trained 2.5D network."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from tritool.cameras import Cameras
from tritool.data.recording import written_aside
from tritool.models import intrinsics_fallback
from tritool.skeletons import HUMAN36M_JOINTS
from tritool.training.config import Config, ConfigError
from tritool.training.evaluation import _checked_folder, _device
from tritool.training.state import CheckpointError, read_model
from tritool.training.weak import WeakTask

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = [
    "Crop",
    "ImagePrediction",
    "Predictions",
    "crop_image",
    "find_images",
    "open_image",
    "predict_images",
    "widened_box",
]

Box = tuple[int, int, int, int]
Paths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]

# What is looked for in folders.
_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
# Larger crops are a slip, and would fill the memory; three bytes each.
_MOST_PIXELS = 400_000_000
# Of the longer side of the image in a picture: more is not seen.
_PICTURED = 1400


@dataclass(frozen=True, eq=False)
class Crop:
    """The part of an image that the network sees.

    Attributes:
        pixels: `[3, H, W]`, uint8, red, green, blue; black beyond the border of the image.
        intrinsics: `[3, 3]`, float64, of these pixels.
        box: x0, y0, x1, y1: the part, pixels of the whole image, as `Cameras.crop` takes it.
    """

    pixels: Tensor
    intrinsics: Tensor
    box: Box


@dataclass(frozen=True, eq=False)
class ImagePrediction:
    """The pose that was found in one image of J joints; all tensors are on the CPU.

    Attributes:
        file: The image.
        size: Width and height of the whole image, pixels, after its EXIF orientation.
        box: x0, y0, x1, y1: the part that the network saw, pixels of the whole image.
        intrinsics: fx, fy, cx, cy of the whole image, pixels.
        intrinsics_assumed: They are a guess: `intrinsics_fallback`.
        keypoints_3d: `[J, 3]`, float32, millimetres, coordinates of the camera (x right, y down, z
            forward); of the size of a person with mean limbs.
        keypoints_2d: `[J, 2]`, float32, pixels of the whole image.
        confidences: `[J]`, float32, from 0 to 1.
        depth_known: The root's depth could be found; otherwise distance and pose mean little.
        picture: The file of the picture, if one was drawn.
    """

    file: str
    size: tuple[int, int]
    box: Box
    intrinsics: tuple[float, float, float, float]
    intrinsics_assumed: bool
    keypoints_3d: Tensor
    keypoints_2d: Tensor
    confidences: Tensor
    depth_known: bool = True
    picture: str | None = None

    @property
    def mean_confidence(self) -> float:
        """The mean over the joints that have one; NaN if none has."""
        return float(self.confidences.nanmean())

    @property
    def distance(self) -> float:
        """From the camera to the pelvis, metres."""
        pelvis = self.keypoints_3d[HUMAN36M_JOINTS.index("pelvis")]
        return float(pelvis.norm()) / 1000

    def to_json(self) -> dict[str, Any]:
        """The same as what JSON can hold; None where a number is not finite."""
        return {
            "file": self.file,
            "size": list(self.size),
            "box": list(self.box),
            "intrinsics": list(self.intrinsics),
            "intrinsics_assumed": self.intrinsics_assumed,
            "keypoints_3d": _numbers(self.keypoints_3d.tolist()),
            "keypoints_2d": _numbers(self.keypoints_2d.tolist()),
            "confidences": _numbers(self.confidences.tolist()),
            "depth_known": self.depth_known,
            "picture": self.picture,
        }


@dataclass(frozen=True, eq=False)
class Predictions:
    """The poses of several images, in the order of the images.

    Attributes:
        checkpoint: The network's file.
        step: After how many steps of training.
        joint_names: J names, in the order of all joints here.
        images: One for each image.
        output: The folder that was written to, if one was.
    """

    checkpoint: str
    step: int
    joint_names: tuple[str, ...]
    images: tuple[ImagePrediction, ...]
    output: str | None = None

    def to_json(self) -> dict[str, Any]:
        """All of it as what JSON can hold; None where a number is not finite."""
        return {
            "checkpoint": self.checkpoint,
            "step": self.step,
            "unit": "mm",
            "joint_names": list(self.joint_names),
            "images": [image.to_json() for image in self.images],
            "output": self.output,
        }

    def to_text(self) -> str:
        """A table with a line for each image, and what the figures rest on."""
        names = [Path(image.file).name for image in self.images]
        if len(set(names)) < len(names):
            names = [image.file for image in self.images]
        width = max(len("image"), *map(len, names))
        lines = [f"{'image':{width}}  confidence  pelvis at"]
        for name, image in zip(names, self.images, strict=True):
            sure = _shown(image.mean_confidence, "")
            lines.append(f"{name:{width}}  {sure:>10}  {_shown(image.distance, ' m'):>9}")
        assumed = sum(image.intrinsics_assumed for image in self.images)
        if assumed:
            which = f"{assumed} of " if assumed < len(self.images) else ""
            lines += [
                f"intrinsics assumed for {which}{_count(len(self.images), 'image')}: centred, the "
                "focal length that of the longer side;",
                "  with another, distances are wrong by about as much",
            ]
        unknown = sum(not image.depth_known for image in self.images)
        if unknown:
            lines.append(
                f"depth not determined in {_count(unknown, 'image')}: nothing of the pose to rely "
                "on"
            )
        lines.append("sizes and distances are those of a person with mean limbs")
        if self.output is not None:
            lines.append(f"written    {self.output}")
        return "\n".join(lines)


def predict_images(
    paths: Paths,
    checkpoint: str | os.PathLike[str],
    *,
    output: str | os.PathLike[str] | None = None,
    box: Sequence[float] | None = None,
    intrinsics: Sequence[float] | None = None,
    device: str | None = None,
    batch_size: int = 16,
    progress: Callable[[int], object] | None = None,
) -> Predictions:
    """Finds the 3D pose of one person in each image.

    Args:
        paths: Images, and folders of images, as `find_images` takes them.
        checkpoint: A network of kind "weak", as training leaves it.
        output: Folder for `predictions.json` and a picture of each image, `STEM.png`; made if need
            be. Nothing is written before all images have been read. None: nothing at all.
        box: x0, y0, x1, y1 around the person, pixels of the image after its EXIF orientation; the
            same in all images. It is widened to the shape of the network's images. None: the whole
            image. People who fill the box as those in training did are found best.
        intrinsics: fx, fy, cx, cy of the whole image, after its EXIF orientation, without lens
            distortion, pixels; the images then have one size. None: `intrinsics_fallback`, a guess.
        device: "cpu", "cuda" or "cuda:1"; None: a GPU if there is one.
        batch_size: Images at once.
        progress: Called with the number of images done since the last call; with `output` an image
            is done when its picture is drawn.

    Returns:
        The poses.

    Raises:
        CheckpointError: The checkpoint is damaged, or of another kind: one line.
        ImportError: A package is missing that reads checkpoints or images.
        OSError: A file cannot be read or written.
        ValueError: There is no image, or a damaged one; an option is impossible or does not fit an
            image; an image would be overwritten.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    area = None if box is None else _checked_box(box)
    camera = None if intrinsics is None else _checked_intrinsics(intrinsics)
    files = find_images(paths)
    folder = _checked_folder(output)
    pictures = [] if folder is None else _pictures(folder, files)
    network = _load(checkpoint, _device(device))

    found: list[ImagePrediction] = []
    for start in range(0, len(files), batch_size):
        part = [_seen(file, area, camera, network.size) for file in files[start:][:batch_size]]
        if camera is not None:
            _check_sizes(found[0] if found else part[0][0], [given for given, _ in part])
        found += network.predict(part)
        if folder is None and progress is not None:
            progress(len(part))
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        for at, picture in enumerate(pictures):
            found[at] = replace(found[at], picture=str(picture))
            _draw(found[at])
            if progress is not None:
                progress(1)
    result = Predictions(
        os.fspath(checkpoint),
        network.step,
        HUMAN36M_JOINTS,
        tuple(found),
        None if folder is None else str(folder),
    )
    if folder is not None:
        with written_aside(folder / "predictions.json") as aside:
            text = json.dumps(result.to_json(), indent=1, allow_nan=False)
            aside.write_text(text + "\n", encoding="utf-8")
    return result


def find_images(paths: Paths) -> tuple[Path, ...]:
    """The images that are meant: files as they are, folders as the images in them by name.

    Files in folders are known as images by their ending; hidden files and folders in folders are
    left out.

    Args:
        paths: A file or a folder, or several.

    Raises:
        OSError: There is no such file or folder, or a folder cannot be read.
        ValueError: There is no image, in a folder or at all.
    """
    given = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
    if not given:
        raise ValueError("paths must be at least one image, got none")
    found: list[Path] = []
    for path in map(Path, given):
        if not path.is_dir():
            path.stat()  # what is wrong with it in the system's own words
            found.append(path)
            continue
        inside = sorted(
            file for file in path.iterdir()
            if file.suffix.lower() in _SUFFIXES and not file.name.startswith(".") and file.is_file()
        )  # fmt: skip
        if not inside:
            raise ValueError(f"{path}: there is no image in this folder")
        found += inside
    return tuple(found)


def open_image(path: str | os.PathLike[str]) -> Image:
    """Reads an image, turned as its EXIF orientation says, in red, green and blue.

    Args:
        path: The file.

    Raises:
        ImportError: Pillow is not installed.
        OSError: The file cannot be read.
        ValueError: It is no image, a damaged one, or one of more than 8 bits a colour: one line.
    """
    try:
        from PIL import Image, ImageOps, UnidentifiedImageError
    except ImportError:
        raise ImportError("images need pillow; type: pip install 'tritool[train]'") from None
    with Path(path).open("rb"):  # an error of the system in its own words
        pass
    try:
        with Image.open(path) as image:
            # Others would be cut off at 255.
            deep = image.mode == "F" or image.mode.startswith("I")
            turned = None if deep else ImageOps.exif_transpose(image).convert("RGB")
    except UnidentifiedImageError:
        raise ValueError(f"{os.fspath(path)}: it is no image, or of an unknown kind") from None
    except MemoryError:
        raise
    except Exception as error:  # its readers raise this and that for a damaged file
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{os.fspath(path)}: it is a damaged image: {reason}") from None
    if turned is None:
        raise ValueError(f"{os.fspath(path)}: it has more than 8 bits a colour; save it with 8")
    return turned


def widened_box(box: Sequence[float], size: tuple[int, int]) -> Box:
    """The least box of whole pixels that holds a box and has the shape of the network's images.

    Widened about the centre, to within half a pixel; of the shape to within one pixel.

    Args:
        box: x0, y0, x1, y1, pixels, as `Cameras.crop` takes it.
        size: Width and height of the network's images.
    """
    x0, y0, x1, y1 = (math.floor(box[0]), math.floor(box[1]), math.ceil(box[2]), math.ceil(box[3]))
    wide, high = x1 - x0, y1 - y0
    # Whole numbers throughout: -(-a // b) is a / b rounded up.
    more_wide = max(wide, -(-high * size[0] // size[1]))
    more_high = max(high, -(-wide * size[1] // size[0]))
    x0, y0 = x0 - (more_wide - wide) // 2, y0 - (more_high - high) // 2
    return x0, y0, x0 + more_wide, y0 + more_high


def crop_image(
    image: Image, intrinsics: Tensor, size: tuple[int, int], box: Sequence[float] | None = None
) -> Crop:
    """Cuts a box out of an image, in the size of the network's images.

    Args:
        image: The whole image, red, green and blue.
        intrinsics: `[3, 3]`, float64, of the whole image.
        size: Width and height of the network's images.
        box: x0, y0, x1, y1, pixels; widened by `widened_box`. None: the whole image.

    Returns:
        The part, with the intrinsics that belong to it.

    Raises:
        ValueError: The box lies beside the image, or is far too large.
    """
    from PIL import Image

    whole = (0, 0, image.width, image.height)
    chosen = whole if box is None else box
    if not (chosen[0] < whole[2] and chosen[2] > 0 and chosen[1] < whole[3] and chosen[3] > 0):
        raise ValueError(
            f"box {_told(chosen)} lies beside the image, which has {whole[2]} x {whole[3]} pixels"
        )
    x0, y0, x1, y1 = used = widened_box(chosen, size)
    if (x1 - x0) * (y1 - y0) > _MOST_PIXELS:
        raise ValueError(f"box {_told(used)} is far too large: {x1 - x0} x {y1 - y0} pixels")
    # Edge to edge, as `Cameras.resize`, and without aliasing.
    scaled = image.crop(used).resize(size, Image.Resampling.LANCZOS)
    camera = Cameras(
        intrinsics[None], torch.eye(3, dtype=intrinsics.dtype)[None],
        torch.zeros(1, 3, dtype=intrinsics.dtype), image_size=whole[2:],
    )  # fmt: skip
    pixels = torch.from_numpy(np.asarray(scaled).copy()).permute(2, 0, 1).contiguous()
    return Crop(pixels, camera.crop(used).resize(size).K[0], used)


# ---- The network ----


@dataclass(frozen=True, eq=False)
class _Given:
    """What is known of an image before the network has seen it."""

    file: str
    size: tuple[int, int]
    intrinsics: tuple[float, float, float, float]
    assumed: bool


@dataclass(frozen=True, eq=False)
class _Network:
    """A trained network and the size of its images."""

    task: WeakTask
    size: tuple[int, int]
    step: int
    device: torch.device

    def predict(self, part: Sequence[tuple[_Given, Crop]]) -> list[ImagePrediction]:
        """The poses in some images."""
        pixels = torch.stack([crop.pixels for _, crop in part]).to(self.device)
        intrinsics = torch.stack([crop.intrinsics for _, crop in part]).float().to(self.device)
        with torch.no_grad():
            found = self.task.poses(self.task.images(pixels), intrinsics)
        rows = (found.pose, found.keypoints_2d, found.confidences)
        poses, flat, sure = (values.float().cpu() for values in rows)
        valid = found.valid.tolist()
        return [
            ImagePrediction(
                file=given.file,
                size=given.size,
                box=crop.box,
                intrinsics=given.intrinsics,
                intrinsics_assumed=given.assumed,
                keypoints_3d=poses[row],
                keypoints_2d=_in_whole_image(flat[row], crop.box, self.size),
                confidences=sure[row],
                depth_known=valid[row],
            )
            for row, (given, crop) in enumerate(part)
        ]


def _load(checkpoint: str | os.PathLike[str], device: torch.device) -> _Network:
    path = os.fspath(checkpoint)
    weights, info = read_model(checkpoint, kind=WeakTask.kind)
    try:
        config = Config.from_dict(info["config"])
    except ConfigError as error:
        raise CheckpointError(f"{path}: its configuration is not understood: {error}") from None
    part = getattr(getattr(config.data, "validation", None), "studio", None)
    size = getattr(part, "image_size", None)
    if size is None:
        raise CheckpointError(
            f"{path}: its configuration does not tell the size of the network's images, "
            "data.validation.studio.image_size"
        )
    # The network that taught it is not needed.
    task = WeakTask(replace(config, model=replace(config.model, pseudo_from=None)))
    try:
        task.model.load_state_dict(weights)
    except RuntimeError:
        raise CheckpointError(
            f"{path}: its weights are not those of the network in its configuration"
        ) from None
    task.model.to(device).eval()
    return _Network(task, (int(size[0]), int(size[1])), int(info["step"]), device)


def _seen(
    file: Path, box: Sequence[float] | None, camera: tuple[float, ...] | None, size: tuple[int, int]
) -> tuple[_Given, Crop]:
    image = open_image(file)
    K = intrinsics_fallback(image.size, dtype=torch.float64)
    if camera is not None:
        fx, fy, cx, cy = camera
        K = torch.tensor([[fx, 0, cx], [0, fy, cy], [0, 0, 1]], dtype=torch.float64)
    try:
        crop = crop_image(image, K, size, box)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    used = (float(K[0, 0]), float(K[1, 1]), float(K[0, 2]), float(K[1, 2]))
    return _Given(str(file), image.size, used, camera is None), crop


def _in_whole_image(flat: Tensor, box: Box, size: tuple[int, int]) -> Tensor:
    """Pixels [J, 2] of a crop in those of the whole image: `Cameras.resize` and `crop` undone."""
    corner = torch.tensor(box[:2], dtype=torch.float64)
    extent = torch.tensor(box[2:], dtype=torch.float64) - corner
    scale = extent / torch.tensor(size, dtype=torch.float64)
    return ((flat.double() + 0.5) * scale - 0.5 + corner).float()


# ---- Checks ----


def _checked_box(box: Sequence[float]) -> tuple[float, ...]:
    values = tuple(map(float, box))
    if len(values) != 4 or not all(map(math.isfinite, values)):
        raise ValueError(f"box must be four numbers x0, y0, x1, y1, got {_told(values)}")
    if not (values[0] < values[2] and values[1] < values[3]):
        raise ValueError(f"box must have x0 below x1 and y0 below y1, got {_told(values)}")
    return values


def _checked_intrinsics(intrinsics: Sequence[float]) -> tuple[float, ...]:
    values = tuple(map(float, intrinsics))
    if len(values) != 4 or not all(map(math.isfinite, values)):
        raise ValueError(f"intrinsics must be four numbers fx, fy, cx, cy, got {_told(values)}")
    if not (values[0] > 0 and values[1] > 0):
        raise ValueError(f"intrinsics must have fx and fy above 0, got {_told(values)}")
    return values


def _check_sizes(first: ImagePrediction | _Given, others: Sequence[_Given]) -> None:
    """The same numbers cannot be the intrinsics of images of several sizes."""
    for other in others:
        if other.size != first.size:
            sizes = [f"{image.size[0]} x {image.size[1]}" for image in (first, other)]
            raise ValueError(
                f"{other.file}: intrinsics are those of one camera, but this image has {sizes[1]} "
                f"pixels and {first.file} has {sizes[0]}"
            )


def _pictures(folder: Path, files: Sequence[Path]) -> list[Path]:
    """Where the picture of each image goes: names differ, and no image is overwritten."""
    # Some file systems do not tell capitals.
    stems = {file.stem.lower() for file in files}
    taken: set[str] = set()
    pictures: list[Path] = []
    for file in files:
        name, number = file.stem, 1
        while name.lower() in taken or (number > 1 and name.lower() in stems):
            number += 1
            name = f"{file.stem}-{number}"
        taken.add(name.lower())
        pictures.append(folder / f"{name}.png")
    there = {file.resolve() for file in files}
    for picture in pictures:
        if picture.resolve() in there:
            raise ValueError(f"{picture} is an image itself, it would be overwritten")
    return pictures


# ---- Pictures and words ----


def _draw(found: ImagePrediction) -> None:
    """What the network saw, black beyond the border, and the pose."""
    from tritool.plot.images import plot_image_pose

    assert found.picture is not None
    x0, y0, x1, y1 = found.box
    shown = min(1.0, _PICTURED / max(x1 - x0, y1 - y0))
    size = (max(1, round(shown * (x1 - x0))), max(1, round(shown * (y1 - y0))))
    scale = torch.tensor([size[0] / (x1 - x0), size[1] / (y1 - y0)])
    image = open_image(found.file).crop(found.box).resize(size)
    flat = (found.keypoints_2d - torch.tensor([x0, y0]) + 0.5) * scale - 0.5
    note = [
        f"mean confidence {_shown(found.mean_confidence, '')}",
        f"pelvis at {_shown(found.distance, ' m')}",
        "intrinsics assumed" if found.intrinsics_assumed else "intrinsics given",
        f"box {_told(found.box)} of {found.size[0]} x {found.size[1]} pixels",
    ]
    plot_image_pose(
        found.picture,
        np.asarray(image),
        flat.numpy(),
        found.keypoints_3d.numpy(),
        found.confidences.numpy(),
        HUMAN36M_JOINTS,
        name=Path(found.file).name,
        note="   |   ".join(note),
    )


def _numbers(values: list[Any]) -> list[Any]:
    """Nested lists of numbers, None in place of those that are not finite."""
    return [
        _numbers(value) if isinstance(value, list) else value if math.isfinite(value) else None
        for value in values
    ]


def _shown(value: float, unit: str) -> str:
    return f"{value:.2f}{unit}" if math.isfinite(value) else "unknown"


def _told(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.10g}" for value in values)


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
