# SPDX-License-Identifier: Apache-2.0
"""Files in and out: recordings of calibrated views, and what was reconstructed from them."""

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

__all__ = [
    "Reconstruction",
    "Recording",
    "RecordingError",
    "Status",
    "make_recording",
    "read_recording",
    "write_reconstruction",
    "write_recording",
    "written_aside",
]
