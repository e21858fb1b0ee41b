# SPDX-License-Identifier: Apache-2.0
"""Two files: the recording, with cameras and measured 2D points, and the reconstruction made of it.

A recording is one ``.npz`` of plain arrays. Its axes are F frames, A actors, V views, J joints:

=================  ============  ===================================================================
``K``              V, 3, 3       intrinsics, pixels
``R``, ``t``       V, 3, 3; V, 3 world to camera, ``x_cam = R X + t``, world unit (millimetres)
``kp2d``           F, A, V, J, 2 measured pixels (x, y), lens distortion included; NaN where missing
``conf``           F, A, V, J    optional: confidence >= 0, 0 where missing
``dist``           V, 4 | 5 | 8  optional: ``k1 k2 p1 p2 [k3 [k4 k5 k6]]``, OpenCV's order
``lens``           ()            optional text: what ``dist`` means, a `tritool.cameras.Lens`;
                                 ``brown_conrady`` if left out
``image_size``     V, 2          optional: width, height of the image that ``K`` belongs to
``gt3d``           F, A, J, 3    optional: reference positions; NaN where missing
``board_points``   J, 3          optional: the joints are points of one rigid body, in its own frame
``joint_names``    J             optional text; likewise ``camera_names`` [V]
``frame_ids``      F             optional, numbers or text
``meta``           ()            optional: a JSON object; ``world_unit`` names the unit
=================  ============  ===================================================================

The centre of the first pixel is (0, 0). Nothing is ever unpickled.
"""

from __future__ import annotations

import contextlib
import csv
import enum
import errno
import json
import os
import secrets
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt
import torch

from tritool.cameras import Cameras, Distortion, Lens

if TYPE_CHECKING:
    from io import TextIOWrapper

Array = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

DEFAULT_UNIT = "mm"


class RecordingError(ValueError):
    """A recording that cannot be used; one line says which file, which key and what is wrong."""


class Status(enum.IntEnum):
    """Why a point was found or is missing."""

    FOUND = 0
    TOO_FEW_VIEWS = 1
    DEGENERATE = 2
    BEHIND_CAMERA = 3
    INVALID_INPUT = 4

    @property
    def meaning(self) -> str:
        """The status in words."""
        return _STATUS_MEANINGS[self]


_STATUS_MEANINGS = {
    Status.FOUND: "found",
    Status.TOO_FEW_VIEWS: "fewer than two views",
    Status.DEGENERATE: "rays nearly parallel",
    Status.BEHIND_CAMERA: "behind a camera that saw it",
    Status.INVALID_INPUT: "invalid pixel or confidence",
}


@dataclass(frozen=True, eq=False)
class Recording:
    """Calibrated cameras and the 2D points they measured, as `make_recording` checked them.

    Attributes:
        K: [V, 3, 3] intrinsics, pixels.
        R: [V, 3, 3] rotations, world to camera.
        t: [V, 3] translations, world to camera, world unit.
        dist: [V, n] distortion coefficients as ``lens`` wants them.
        lens: the lens model, see `tritool.cameras.Distortion`.
        kp2d: [F, A, V, J, 2] measured pixels, distorted; NaN where missing.
        conf: [F, A, V, J] confidences >= 0; 0 where missing.
        joint_names: J names.
        camera_names: V names.
        frame_ids: [F] numbers or text.
        meta: where the recording comes from; ``world_unit`` names the unit of lengths.
        image_size: [V, 2] width and height in pixels, if known.
        gt3d: [F, A, J, 3] reference positions, world unit, if known; NaN where missing.
        board_points: [J, 3] the joints in the frame of a rigid board, world unit, if they are one.
    """

    K: Array
    R: Array
    t: Array
    dist: Array
    lens: Lens
    kp2d: Array
    conf: Array
    joint_names: tuple[str, ...]
    camera_names: tuple[str, ...]
    frame_ids: npt.NDArray[Any]
    meta: Mapping[str, object]
    image_size: IntArray | None
    gt3d: Array | None
    board_points: Array | None

    @property
    def unit(self) -> str:
        """The unit of world lengths, millimetres unless ``meta`` names another."""
        return str(self.meta.get("world_unit", DEFAULT_UNIT))

    @property
    def cameras(self) -> Cameras:
        """The V cameras, in float64."""
        ideal = self.lens != "fisheye" and not self.dist.any()
        size = self.image_size
        return Cameras(
            torch.from_numpy(self.K),
            torch.from_numpy(self.R),
            torch.from_numpy(self.t),
            distortion=None if ideal else Distortion(torch.from_numpy(self.dist), self.lens),
            image_size=None if size is None else torch.from_numpy(size),
            names=self.camera_names,
        )


@dataclass(frozen=True, eq=False)
class Reconstruction:
    """3D points of a recording, and how far each can be trusted.

    Attributes:
        keypoints_3d: [F, A, J, 3] positions, world unit; NaN where ``status`` is not FOUND.
        reprojection_error: [F, A, V, J] distance in measured (distorted) pixels between the
            projected point and the measured one; NaN where the view took no part.
        weights: [F, A, V, J] the weight each view had; 0 where it took no part.
        views_used: [F, A, J] how many views took part.
        status: [F, A, J] a `Status` code.
        joint_names: J names.
        camera_names: V names.
        frame_ids: [F] the recording's.
        unit: of world lengths.
        settings: how the points were computed.
    """

    keypoints_3d: Array
    reprojection_error: Array
    weights: Array
    views_used: IntArray
    status: IntArray
    joint_names: tuple[str, ...]
    camera_names: tuple[str, ...]
    frame_ids: npt.NDArray[Any]
    unit: str = DEFAULT_UNIT
    settings: Mapping[str, object] = field(default_factory=dict)


def make_recording(
    K: npt.ArrayLike,
    R: npt.ArrayLike,
    t: npt.ArrayLike,
    kp2d: npt.ArrayLike,
    *,
    conf: npt.ArrayLike | None = None,
    dist: npt.ArrayLike | None = None,
    lens: str = "brown_conrady",
    image_size: npt.ArrayLike | None = None,
    joint_names: Sequence[str] = (),
    camera_names: Sequence[str] = (),
    frame_ids: npt.ArrayLike | None = None,
    meta: Mapping[str, object] | None = None,
    gt3d: npt.ArrayLike | None = None,
    board_points: npt.ArrayLike | None = None,
) -> Recording:
    """Makes a recording of arrays: converts to float64, fills in what is optional, checks it all.

    Args:
        K: [V, 3, 3] intrinsics, pixels.
        R: [V, 3, 3] rotations, world to camera.
        t: [V, 3] translations, world to camera, world unit.
        kp2d: [F, A, V, J, 2] measured pixels, distorted; NaN where missing.
        conf: [F, A, V, J] confidences >= 0; default 1 wherever ``kp2d`` is measured.
        dist: [V, n] distortion coefficients; default none.
        lens: what they mean: a lens model of `tritool.cameras.Distortion`.
        image_size: [V, 2] width and height, pixels.
        joint_names: J names; default ``joint_0`` and so on.
        camera_names: V names; default ``camera_0`` and so on.
        frame_ids: [F] numbers or text; default 0, 1, ...
        meta: anything JSON can hold; ``world_unit`` names the unit of lengths, default ``mm``.
        gt3d: [F, A, J, 3] reference positions, world unit; NaN where missing.
        board_points: [J, 3] the joints in the frame of a rigid board, world unit.

    Returns:
        The recording.

    Raises:
        RecordingError: an array is misshapen or holds what no camera or detector can mean.
    """
    kp2d = _numbers("kp2d", kp2d)
    if kp2d.ndim != 5 or kp2d.shape[-1] != 2:
        hint = "; one actor still has its axis: kp2d[:, None]" if kp2d.ndim == 4 else ""
        raise RecordingError(
            f"kp2d must be [frames, actors, views, joints, 2], got {kp2d.shape}{hint}"
        )
    if 0 in kp2d.shape:
        raise RecordingError(f"kp2d holds no point at all, its shape is {kp2d.shape}")
    frames, actors, views, joints, _ = kp2d.shape
    if views < 2:
        raise RecordingError(f"kp2d has {views} view, triangulation needs two or more")
    camera_names = _names("camera_names", camera_names, views, "camera")
    joint_names = _names("joint_names", joint_names, joints, "joint")

    K = _shaped("K", K, views=views, rows=3, columns=3)
    R = _shaped("R", R, views=views, rows=3, columns=3)
    t = _shaped("t", t, views=views, coordinates=3)
    dist = np.zeros((views, 5)) if dist is None else _distortion(dist, lens, views)
    measured = ~np.isnan(kp2d).any(axis=-1)
    confidences = np.zeros((frames, actors, views, joints))
    confidences[measured] = 1.0
    if conf is not None:
        given = _shaped("conf", conf, frames=frames, actors=actors, views=views, joints=joints)
        if (given < 0).any():
            raise RecordingError(f"conf must not be negative, its least is {np.nanmin(given):g}")
        confidences[measured] = given[measured]
    sizes = None
    if image_size is not None:
        size = _shaped("image_size", image_size, views=views, width_and_height=2)
        if not (np.isfinite(size) & (size >= 1) & (size == np.floor(size))).all():
            raise RecordingError("image_size must hold whole pixels (width, height) >= 1")
        sizes = size.astype(np.int64)
    if gt3d is not None:
        gt3d = _shaped("gt3d", gt3d, frames=frames, actors=actors, joints=joints, coordinates=3)
    if board_points is not None:
        board_points = _shaped("board_points", board_points, joints=joints, coordinates=3)
        if not np.isfinite(board_points).all():
            raise RecordingError("board_points holds NaN or infinity")
    meta = {} if meta is None else dict(meta)
    unit = meta.get("world_unit", DEFAULT_UNIT)
    if not isinstance(unit, str) or not unit.isprintable() or not unit.strip():
        raise RecordingError(f"meta names a world_unit that is no text: {unit!r}")
    recording = Recording(
        K=K,
        R=R,
        t=t,
        dist=dist,
        lens=cast("Lens", lens),
        kp2d=kp2d,
        conf=confidences,
        joint_names=joint_names,
        camera_names=camera_names,
        frame_ids=np.arange(frames) if frame_ids is None else _frame_ids(frame_ids, frames),
        meta=meta,
        image_size=sizes,
        gt3d=gt3d,
        board_points=board_points,
    )
    problems = recording.cameras.problems()
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise RecordingError(problems[0] + more)
    return recording


def read_recording(path: str | os.PathLike[str]) -> Recording:
    """Reads and checks a recording.

    Args:
        path: an ``.npz`` file as described at the top of this module.

    Returns:
        The recording, in float64.

    Raises:
        RecordingError: the file is missing or damaged, a key is missing, or a value is impossible.
    """
    try:
        arrays = _read_arrays(Path(path))
        missing = [key for key in ("K", "R", "t", "kp2d") if key not in arrays]
        if missing:
            held = ", ".join(sorted(arrays)) or "nothing"
            raise RecordingError(f"has no {' and no '.join(missing)}; it holds {held}")
        known = {key: arrays[key] for key in arrays if key in Recording.__dataclass_fields__}
        for key in ("joint_names", "camera_names"):
            if key in known:
                known[key] = _texts(key, known[key])
        if "lens" in known:
            known["lens"] = _texts("lens", known["lens"][None])[0]
        if "meta" in known:
            known["meta"] = _meta(known["meta"])
        return make_recording(**known)
    except RecordingError as error:
        raise RecordingError(f"{os.fspath(path)}: {error}") from error.__cause__


def write_recording(path: str | os.PathLike[str], recording: Recording) -> None:
    """Writes a recording as ``.npz``, all of it or nothing.

    Args:
        path: the file; replaced if it exists.
        recording: what to write.

    Raises:
        OSError: the file cannot be written; what was there before is untouched.
    """
    arrays: dict[str, npt.ArrayLike] = {}
    for key in Recording.__dataclass_fields__:
        value = getattr(recording, key)
        if value is not None:
            arrays[key] = json.dumps(dict(value)) if key == "meta" else np.asarray(value)
    with written_aside(path) as aside:
        _save_npz(aside, arrays)


def write_reconstruction(path: str | os.PathLike[str], reconstruction: Reconstruction) -> None:
    """Writes a reconstruction as ``.npz`` or ``.csv``, by the path's ending; all of it or nothing.

    The ``.npz`` holds the arrays of `Reconstruction` under their own names, ``status_meanings``
    (index a status to read it), ``units`` and the ``settings`` as JSON. The ``.csv`` is long: one
    line per frame, actor and joint, the position left empty where the point was not found.

    Args:
        path: the file, replaced if it exists.
        reconstruction: what to write.

    Raises:
        ValueError: the path ends in neither ``.npz`` nor ``.csv``.
        OSError: the file cannot be written; what was there before is untouched.
    """
    writers: dict[str, Callable[[Path, Reconstruction], None]] = {
        ".npz": _write_npz,
        ".csv": _write_csv,
    }
    suffix = Path(path).suffix.lower()
    if suffix not in writers:
        raise ValueError(f"{os.fspath(path)}: a reconstruction is written as .npz or .csv")
    with written_aside(path) as aside:
        writers[suffix](aside, reconstruction)


@contextlib.contextmanager
def written_aside(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Gives a temporary path in the folder of ``path``, renamed to it if the block succeeds.

    Readers see the old file or the whole new one. On any failure the temporary file is removed
    and ``path`` stays as it was.

    Args:
        path: the file to write; a symbolic link is followed.

    Yields:
        Where to write: an empty file with the ending of ``path``.

    Raises:
        OSError: naming ``path``, whichever step failed.
    """
    target = Path(os.path.realpath(path))
    aside = target.with_name(f".{target.stem}.{secrets.token_hex(4)}.part{target.suffix}")
    try:
        if target.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(target))
        # O_EXCL: never someone else's file. 0o666 less the umask, as an ordinary new file.
        os.close(os.open(aside, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        try:
            yield aside
            with aside.open("rb+") as file:
                os.fsync(file.fileno())  # the name must not reach the disk before the content
            aside.replace(target)
        except BaseException:
            with contextlib.suppress(OSError):
                aside.unlink()
            raise
    except OSError as error:
        reason = f"cannot be written: {error.strerror or error}"
        raise OSError(error.errno or errno.EIO, reason, os.fspath(path)) from error


def _save_npz(path: Path, arrays: Mapping[str, npt.ArrayLike]) -> None:
    with path.open("wb") as file:
        np.savez(file, **dict[str, Any](arrays))


def _write_npz(path: Path, reconstruction: Reconstruction) -> None:
    unit = reconstruction.unit
    _save_npz(
        path,
        {
            "keypoints_3d": reconstruction.keypoints_3d,
            "reprojection_error": reconstruction.reprojection_error,
            "weights": reconstruction.weights,
            "views_used": reconstruction.views_used.astype(np.int16),
            "status": reconstruction.status.astype(np.int8),
            "status_meanings": [status.meaning for status in Status],
            "joint_names": reconstruction.joint_names,
            "camera_names": reconstruction.camera_names,
            "frame_ids": reconstruction.frame_ids,
            "units": f"keypoints_3d: {unit}, reprojection_error: pixels as measured",
            "settings": json.dumps(dict(reconstruction.settings)),
        },
    )


def _write_csv(path: Path, reconstruction: Reconstruction) -> None:
    unit = reconstruction.unit
    with path.open("w", newline="", encoding="utf-8") as file:
        _write_csv_rows(file, reconstruction, [f"{axis}_{unit}" for axis in "xyz"])


def _write_csv_rows(file: TextIOWrapper, made: Reconstruction, axes: list[str]) -> None:
    table = csv.writer(file, lineterminator="\n")
    header = ["frame", "actor", "joint", *axes, "views", "mean_reprojection_error_px", "status"]
    table.writerow(header)
    used = np.isfinite(made.reprojection_error)
    total = np.where(used, made.reprojection_error, 0).sum(axis=2)
    error = np.divide(
        total, used.sum(axis=2), out=np.full(total.shape, np.nan), where=used.any(axis=2)
    )
    for frame, frame_id in enumerate(made.frame_ids):
        for actor in range(made.status.shape[1]):
            for joint, name in enumerate(made.joint_names):
                at = frame, actor, joint
                table.writerow(
                    [
                        frame_id,
                        actor,
                        name,
                        *map(_cell, made.keypoints_3d[at]),
                        made.views_used[at],
                        _cell(error[at]),
                        Status(made.status[at]).meaning,
                    ]
                )


def _cell(value: float) -> str:
    return f"{value:.12g}" if np.isfinite(value) else ""


def _read_arrays(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            start = file.read(6)
    except OSError as error:
        raise RecordingError(f"cannot be read: {error.strerror or error}") from error
    if not start:
        raise RecordingError("is empty")
    if not start.startswith(b"PK"):
        kind = "a single .npy array" if start == b"\x93NUMPY" else "no .npz file"
        raise RecordingError(f"is {kind}; a recording is an .npz of arrays (numpy.savez)")
    key = ""
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {}
            for key in archive.files:
                arrays[key] = archive[key]
    # Foreign bytes make the decoders raise nearly anything (zlib.error, struct.error, EOFError,
    # MemoryError on an absurd shape, ...), and all of it means one thing to the user.
    except Exception as error:
        if "allow_pickle" in str(error):
            raise RecordingError(
                f"{key} is a pickled object array, never loaded; save plain numbers or text"
            ) from error
        where = f"{key} cannot be read" if key else "cannot be read"
        damaged = isinstance(error, zipfile.BadZipFile | EOFError)
        reason = "the file is truncated or damaged" if damaged else " ".join(str(error).split())
        raise RecordingError(f"{where}: {reason or type(error).__name__}") from error
    for key, array in arrays.items():
        if not isinstance(array, np.ndarray):
            raise RecordingError(f"{key} is no array; a recording is an .npz of arrays")
    return arrays


def _numbers(key: str, value: object) -> Array:
    array = np.asarray(value)
    if array.dtype.kind not in "fiu":
        raise RecordingError(f"{key} must hold real numbers, got {array.dtype}")
    return array.astype(np.float64)


def _shaped(key: str, value: npt.ArrayLike, **axes: int) -> Array:
    array = _numbers(key, value)
    wanted = tuple(axes.values())
    if array.shape != wanted:
        raise RecordingError(f"{key} must be [{', '.join(axes)}] = {wanted}, got {array.shape}")
    return array


def _distortion(value: npt.ArrayLike, lens: str, views: int) -> Array:
    dist = _numbers("dist", value)
    try:
        count = len(Distortion(torch.from_numpy(dist), cast("Lens", lens)).coefficients)
    except ValueError as error:
        raise RecordingError(f"dist or lens is wrong: {error}") from error
    if count != views:
        raise RecordingError(f"dist must be [views = {views}, n], got {dist.shape}")
    return dist


def _frame_ids(value: npt.ArrayLike, frames: int) -> npt.NDArray[Any]:
    ids = np.asarray(value)
    if ids.shape != (frames,) or ids.dtype.kind not in "iuU":
        raise RecordingError(
            f"frame_ids must be {frames} whole numbers or texts, got {ids.dtype} {ids.shape}"
        )
    return ids


def _texts(key: str, array: npt.NDArray[Any]) -> tuple[str, ...]:
    if array.dtype.kind != "U" or array.ndim != 1:
        raise RecordingError(f"{key} must be a list of texts, got {array.dtype} {array.shape}")
    return tuple(map(str, array))


def _names(key: str, names: Sequence[str], count: int, default: str) -> tuple[str, ...]:
    if not names:
        return tuple(f"{default}_{index}" for index in range(count))
    if len(names) != count:
        raise RecordingError(f"{key} must hold {count} names, got {len(names)}")
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise RecordingError(f"{key} holds {twice!r} twice")
    return tuple(names)


def _meta(array: npt.NDArray[Any]) -> Mapping[str, object]:
    try:
        meta = json.loads(str(array[()]) if array.dtype.kind == "U" and array.ndim == 0 else "")
    except ValueError as error:
        raise RecordingError("meta must be one text holding a JSON object") from error
    if not isinstance(meta, dict):
        raise RecordingError("meta must be one text holding a JSON object")
    return meta
