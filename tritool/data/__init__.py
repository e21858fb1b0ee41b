# SPDX-License-Identifier: Apache-2.0
"""Data in and out: recordings of calibrated views, and samples of images for the networks.

Generated samples are in `tritool.data.synthetic`.
"""

from tritool.data.mixture import Mixture, Portion, Remembered
from tritool.data.recording import (
    Reconstruction,
    Recording,
    RecordingError,
    Status,
    make_recording,
    read_recording,
    write_reconstruction,
    write_recording,
    written_aside,
)
from tritool.data.sample import Batch, Sample, collate
from tritool.data.undistort import undistorted

__all__ = [
    "Batch",
    "Mixture",
    "Portion",
    "Reconstruction",
    "Recording",
    "RecordingError",
    "Remembered",
    "Sample",
    "Status",
    "collate",
    "make_recording",
    "read_recording",
    "undistorted",
    "write_reconstruction",
    "write_recording",
    "written_aside",
]
