# SPDX-License-Identifier: Apache-2.0
"""Demonstrations that need no data: geometry on a generated walk, networks in the studio."""

from tritool.demo.geometry import (
    STEPS,
    Pipeline,
    Report,
    generate_recording,
    run_demo,
    run_pipeline,
)

__all__ = ["STEPS", "Pipeline", "Report", "generate_recording", "run_demo", "run_pipeline"]
