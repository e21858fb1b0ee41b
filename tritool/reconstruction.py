# SPDX-License-Identifier: Apache-2.0
"""From a recording to 3D points, and the figures that tell how good they are."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from tritool.cameras import Cameras
from tritool.data.recording import Array, Reconstruction, Recording, Status
from tritool.ops import rigid_align, triangulate

Mode = Literal["homogeneous", "inhomogeneous"]
Weighting = Literal["confidence", "none"]

# At 0.1 degrees and a focal length of 1000 pixels one pixel of noise moves the point along the rays
# by half its distance: whatever comes out is noise.
MIN_PARALLAX_DEGREES = 0.1
# Three points always fit a board almost exactly; four begin to test it.
MIN_BOARD_POINTS = 4


@dataclass(frozen=True)
class Spread:
    """How a set of errors is spread; the figures are None where there is none.

    Attributes:
        count: number of errors.
        median: the median.
        mean: the mean.
        p90: the 90th percentile.
    """

    count: int
    median: float | None
    mean: float | None
    p90: float | None

    @classmethod
    def of(cls, errors: npt.NDArray[Any]) -> Spread:
        """Describes the finite ones among errors of any shape."""
        finite = errors[np.isfinite(errors)]
        if finite.size == 0:
            return cls(0, None, None, None)
        p90 = float(np.percentile(finite, 90))
        return cls(finite.size, float(np.median(finite)), float(finite.mean()), p90)


@dataclass(frozen=True)
class Summary:
    """What was found, what is missing and why, and how far off it is.

    Attributes:
        total: points looked for, frames x actors x joints.
        found: points found.
        missing: how many points are missing, by reason; reasons that do not occur are left out.
        reprojection_error: over all views that took part, measured pixels.
        camera_errors: the same for each camera, by name.
        worst_camera: the camera of the largest median error, if there is any error.
        reference_error: distances to the recording's ``gt3d``, world unit, if it has one.
        board_error: distances to the recording's rigid board, moved onto each frame, if it has one.
        unit: of world lengths.
    """

    total: int
    found: int
    missing: Mapping[str, int]
    reprojection_error: Spread
    camera_errors: Mapping[str, Spread]
    worst_camera: str | None
    reference_error: Spread | None
    board_error: Spread | None
    unit: str

    def to_json(self) -> dict[str, Any]:
        """Returns the same figures as what JSON can hold."""
        return asdict(self)


def reconstruct(
    recording: Recording,
    *,
    mode: Mode = "homogeneous",
    reweight: int = 0,
    min_confidence: float = 0.0,
    weighting: Weighting = "confidence",
    chunk: int = 16384,
    progress: Callable[[int], object] | None = None,
) -> Reconstruction:
    """Triangulates every joint of every frame, in float64.

    Measured pixels are undistorted, then triangulated by weighted DLT (Iskakov et al.,
    "Learnable Triangulation of Human Pose", ICCV 2019, eq. 3-4). The reprojection error is measured
    where the detector worked: in distorted pixels, against what was measured. A point is given up
    (NaN, with a `Status`) if fewer than two views take part, if all their rays are within 0.1
    degrees of parallel, or if it comes out behind a camera that took part.

    Args:
        recording: F frames, A actors, V views, J joints.
        mode: "homogeneous" or "inhomogeneous", see `tritool.ops.triangulate`.
        reweight: rounds of dividing each view by its depth, see there.
        min_confidence: views less confident than this take no part.
        weighting: "confidence" weights each view by it; "none" by 1, but for confidence 0.
        chunk: points computed at once: bounds the memory, changes no result.
        progress: called with the number of points done since the last call.

    Returns:
        The points [F, A, J, 3] and what is known of each.

    Raises:
        ValueError: an option is out of its range.
    """
    if weighting not in ("confidence", "none"):
        raise ValueError(f'weighting must be "confidence" or "none", got {weighting!r}')
    if not (min_confidence >= 0 and math.isfinite(min_confidence)):
        raise ValueError(f"min_confidence must be finite and >= 0, got {min_confidence}")
    if chunk < 1:
        raise ValueError(f"chunk must be 1 or more, got {chunk}")

    frames, actors, views, joints, _ = recording.kp2d.shape
    pixels = torch.from_numpy(recording.kp2d).movedim(2, 3).reshape(-1, views, 2)
    confidences = torch.from_numpy(recording.conf).movedim(2, 3).reshape(-1, views)

    measured = ~pixels.isnan().any(dim=-1)
    broken = measured & (confidences != 0)
    broken &= pixels.isinf().any(dim=-1) | ~confidences.isfinite()
    invalid = broken.any(dim=-1)
    takes_part = measured & (confidences > 0) & (confidences >= min_confidence)
    takes_part &= ~invalid[:, None]
    weights = confidences if weighting == "confidence" else torch.ones_like(confidences)
    weights = torch.where(takes_part, weights, 0.0)

    cameras = recording.cameras
    parts = []
    with torch.no_grad():
        for start in range(0, len(pixels), chunk):
            part = slice(start, start + chunk)
            parts.append(_reconstruct_chunk(cameras, pixels[part], weights[part], mode, reweight))
            if progress is not None:
                progress(len(parts[-1][0]))
    points, errors, weights, status = (torch.cat(each) for each in zip(*parts, strict=True))
    status = torch.where(invalid, int(Status.INVALID_INPUT), status)

    def by_view(values: torch.Tensor) -> Array:
        return values.reshape(frames, actors, joints, views).movedim(3, 2).contiguous().numpy()

    shape = frames, actors, joints
    return Reconstruction(
        keypoints_3d=points.reshape(*shape, 3).numpy(),
        reprojection_error=by_view(errors),
        weights=by_view(weights),
        views_used=(weights > 0).sum(dim=-1).reshape(shape).numpy(),
        status=status.reshape(shape).numpy(),
        joint_names=recording.joint_names,
        camera_names=recording.camera_names,
        frame_ids=recording.frame_ids,
        unit=recording.unit,
        settings={
            "mode": mode,
            "reweight": reweight,
            "min_confidence": min_confidence,
            "weighting": weighting,
        },
    )


def _reconstruct_chunk(
    cameras: Cameras, pixels: torch.Tensor, weights: torch.Tensor, mode: Mode, reweight: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Points [N, 3], reprojection errors [N, V], weights [N, V] and status [N] of N points."""
    projections = cameras.projections
    undistorted = cameras.undistort(pixels)
    # A pixel that no ray of the lens reaches cannot be undistorted: that view saw nothing.
    weights = torch.where(undistorted.isfinite().all(dim=-1), weights, 0.0)
    used = weights > 0
    points = triangulate(undistorted, projections, weights, mode=mode, reweight=reweight)

    depths = points @ projections[:, 2, :3].mT + projections[:, 2, 3]
    behind = (used & ~(depths > 0)).any(dim=-1)
    parallel = _parallax(cameras, undistorted, used) < math.radians(MIN_PARALLAX_DEGREES)
    status = torch.full(behind.shape, int(Status.FOUND))
    # The last reason that applies stands, from the least to the most fundamental.
    for reason, applies in (
        (Status.BEHIND_CAMERA, behind),
        (Status.DEGENERATE, parallel | ~points.isfinite().all(dim=-1)),
        (Status.TOO_FEW_VIEWS, used.sum(dim=-1) < 2),
    ):
        status = torch.where(applies, int(reason), status)

    found = (status == Status.FOUND)[:, None]
    points = torch.where(found, points, math.nan)
    errors = torch.linalg.vector_norm(cameras.project(points) - pixels, dim=-1)
    return points, torch.where(found & used, errors, math.nan), weights, status


def _parallax(cameras: Cameras, undistorted: torch.Tensor, used: torch.Tensor) -> torch.Tensor:
    """Largest angle between the lines of sight of two used views, [N], radians; 0 below two.

    Measured between the rays themselves, not at the point: of parallel rays the point is noise.
    Rays that face each other count as parallel too, for the point may slide along them.
    """
    pixels = torch.nn.functional.pad(undistorted, (0, 1), value=1.0)
    rays = torch.einsum("vij,nvj->nvi", (cameras.K @ cameras.R).inverse(), pixels)
    rays = torch.nn.functional.normalize(rays.nan_to_num(), dim=-1)
    cosines = (rays @ rays.mT).abs()
    both = used[:, :, None] & used[:, None, :]
    return torch.where(both, cosines, 1.0).amin(dim=(-2, -1)).clamp(max=1.0).acos()


def summarise(recording: Recording, reconstruction: Reconstruction) -> Summary:
    """Sums a reconstruction up.

    Args:
        recording: what was reconstructed.
        reconstruction: what `reconstruct` made of it.

    Returns:
        The counts and errors.
    """
    status = reconstruction.status
    counts = {each: int((status == each).sum()) for each in Status}
    cameras = {
        name: Spread.of(reconstruction.reprojection_error[:, :, view])
        for view, name in enumerate(reconstruction.camera_names)
    }
    medians = {name: each.median for name, each in cameras.items() if each.median is not None}
    reference = board = None
    if recording.gt3d is not None:
        offsets = reconstruction.keypoints_3d - recording.gt3d
        reference = Spread.of(np.linalg.norm(offsets, axis=-1))
    if recording.board_points is not None:
        board = Spread.of(board_distances(reconstruction.keypoints_3d, recording.board_points))
    return Summary(
        total=status.size,
        found=counts[Status.FOUND],
        missing={
            each.meaning: count
            for each, count in counts.items()
            if count and each is not Status.FOUND
        },
        reprojection_error=Spread.of(reconstruction.reprojection_error),
        camera_errors=cameras,
        worst_camera=max(medians, key=medians.__getitem__) if medians else None,
        reference_error=reference,
        board_error=board,
        unit=reconstruction.unit,
    )


def board_distances(points: Array, board: Array) -> Array:
    """Measures how far points are from a rigid board, moved onto each set of them.

    Args:
        points: [..., J, 3] reconstructed points, NaN where missing.
        board: [J, 3] the same points in the board's frame, same unit.

    Returns:
        [..., J] distances; NaN for missing points, and for sets of fewer than four points or of
        points that are all on a line.
    """
    found = np.isfinite(points).all(axis=-1)
    enough = found.sum(axis=-1) >= MIN_BOARD_POINTS
    target = torch.from_numpy(np.where((found & enough[..., None])[..., None], points, np.nan))
    source = torch.from_numpy(board)
    moved = rigid_align(source, target).apply(source)
    return np.asarray(torch.linalg.vector_norm(moved - target, dim=-1))
