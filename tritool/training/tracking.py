# SPDX-License-Identifier: Apache-2.0
"""What a run tells: learning curves in `metrics.jsonl`, TensorBoard, pictures of joints."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tritool.data.recording import written_aside
from tritool.data.sample import Batch

__all__ = ["Board", "Metrics", "picture_joints"]


class Metrics:
    """The file of learning curves: one JSON object a line.

    Args:
        path: The file; lines that a killed run wrote after its last checkpoint are removed.
        step: How many steps are done; later lines are removed.
        validated: After which step validation was last done; later such lines are removed.
    """

    def __init__(self, path: Path, step: int, validated: int) -> None:
        self.records: list[dict[str, Any]] = []
        if path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                record = _record(line)
                if record is None:
                    break  # the end of a file that was being written
                if record["step"] <= (validated if "validation" in record else step):
                    self.records.append(record)
        with written_aside(path) as aside:
            aside.write_text("".join(map(_line, self.records)), encoding="utf-8")
        self._file = path.open("a", encoding="utf-8")

    def write(self, record: Mapping[str, Any]) -> None:
        """Adds a line."""
        self.records.append(dict(record))
        self._file.write(_line(record))
        self._file.flush()

    def sync(self) -> None:
        """Waits until all lines are on the disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(record, allow_nan=False) + "\n"


def _record(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    fits = isinstance(record, dict) and isinstance(record.get("step"), int)
    return record if fits else None


class Board:
    """TensorBoard's files.

    Args:
        folder: Where they go.
        step: How many steps are done; what an earlier run wrote later is hidden.
    """

    def __init__(self, folder: Path, step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ImportError(
                "training.tensorboard needs tensorboard; type: pip install 'tritool[train]'"
            ) from None
        writer: Any = SummaryWriter
        self._writer = writer(str(folder), purge_step=step + 1)

    def scalars(self, group: str, values: Mapping[str, float | None], step: int) -> None:
        """Writes numbers; None is left out."""
        for name, value in values.items():
            if value is not None:
                self._writer.add_scalar(f"{group}/{name}", value, step)

    def picture(self, name: str, picture: npt.NDArray[np.uint8], step: int) -> None:
        """Writes a picture `[H, W, 3]`."""
        self._writer.add_image(name, picture, step, dataformats="HWC")

    def close(self) -> None:
        """Writes what is left."""
        self._writer.close()


_TRUE, _PREDICTED = (40, 200, 80), (230, 40, 200)


def picture_joints(
    batch: Batch, keypoints_2d: Tensor | None, keypoints_3d: Tensor
) -> list[npt.NDArray[np.uint8]]:
    """Draws true joints (rings, green) and predicted ones (dots, magenta) into the crops.

    Args:
        batch: On the CPU.
        keypoints_2d: `[B, C, J, 2]`, predicted; None: the predicted 3D joints are projected.
        keypoints_3d: `[B, J, 3]`, predicted, mm.

    Returns:
        B pictures `[H, C * W, 3]`: the views of a sample beside each other.
    """
    try:
        from PIL import Image, ImageDraw
    except ImportError:
        raise ImportError(
            "training.pictures needs Pillow; type: pip install 'tritool[train]'"
        ) from None
    if keypoints_2d is None:
        keypoints_2d = _projected(batch.projections, keypoints_3d)
    wide = batch.images.shape[-1]
    radius = max(1.0, batch.images.shape[-2] / 100)
    pictures = []
    for images, true, predicted in zip(
        batch.images, batch.keypoints_2d, keypoints_2d.cpu(), strict=True
    ):
        strip = images.permute(2, 0, 3, 1).flatten(1, 2).contiguous().numpy()
        picture = Image.fromarray(strip)
        pen = ImageDraw.Draw(picture)
        for view, (own, found) in enumerate(zip(true.tolist(), predicted.tolist(), strict=True)):
            for points, colour, filled in ((own, _TRUE, False), (found, _PREDICTED, True)):
                for x, y in points:
                    # Also false for NaN.
                    if not (0 <= x < wide and 0 <= y < batch.images.shape[-2]):
                        continue
                    x, size = x + view * wide, radius if filled else 1.8 * radius
                    box = (x - size, y - size, x + size, y + size)
                    pen.ellipse(box, outline=colour, fill=colour if filled else None)
        pictures.append(np.asarray(picture))
    return pictures


def _projected(projections: Tensor, points: Tensor) -> Tensor:
    """`[B, C, J, 2]`; NaN behind the camera."""
    ones = torch.ones_like(points[..., :1])
    x, y, w = torch.einsum(
        "bcij,bkj->bcki", projections.to(points), torch.cat([points, ones], -1)
    ).unbind(-1)
    ahead = w > 0
    w = torch.where(ahead, w, 1)
    return torch.where(ahead[..., None], torch.stack([x / w, y / w], -1), torch.nan)
