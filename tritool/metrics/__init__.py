# SPDX-License-Identifier: Apache-2.0
"""Measures of 3D poses in millimetres, and the tables that say how they were averaged."""

from tritool.metrics.poses import (
    AUC_THRESHOLDS,
    auc,
    mpjpe,
    n_mpjpe,
    pa_mpjpe,
    pck,
)
from tritool.metrics.report import (
    HUMAN36M_DAMAGED_SCENES,
    PoseErrors,
    PoseReport,
    Score,
)

__all__ = [
    "AUC_THRESHOLDS",
    "HUMAN36M_DAMAGED_SCENES",
    "PoseErrors",
    "PoseReport",
    "Score",
    "auc",
    "mpjpe",
    "n_mpjpe",
    "pa_mpjpe",
    "pck",
]
