# SPDX-License-Identifier: Apache-2.0
"""Losses: scalars, averaged over the joints that count, safe where joints are missing."""

from tritool.losses.heatmaps import heatmap_mse
from tritool.losses.joints import l1, l2, mse, soft_mse
from tritool.losses.volumes import volumetric_loss, volumetric_nll

__all__ = ["heatmap_mse", "l1", "l2", "mse", "soft_mse", "volumetric_loss", "volumetric_nll"]
