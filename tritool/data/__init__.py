# SPDX-License-Identifier: Apache-2.0
"""Data in and out: recordings of calibrated views, and samples of images for the networks."""

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

__all__ = [
    "Batch",
    "Reconstruction",
    "Recording",
    "RecordingError",
    "Sample",
    "Status",
    "collate",
    "make_recording",
    "read_recording",
    "write_reconstruction",
    "write_recording",
    "written_aside",
]
