# SPDX-License-Identifier: Apache-2.0
"""Losses: scalars, averaged over the joints that count, safe where joints are missing."""

from tritool.losses.heatmaps import heatmap_cross_entropy, heatmap_mse
from tritool.losses.joints import l1, l2, mse, soft_mse
from tritool.losses.multi_view import (
    limb_depth_bound,
    limb_length_loss,
    mean_limb_lengths,
    multi_view_consistency,
    published_limb_lengths,
)
from tritool.losses.volumes import volumetric_loss, volumetric_nll
from tritool.losses.weak import (
    DepthSign,
    WeakLoss,
    WeakLossSettings,
    bending,
    bending_prior,
    depth_sign_check,
    weak_total,
)

__all__ = [
    "DepthSign",
    "WeakLoss",
    "WeakLossSettings",
    "bending",
    "bending_prior",
    "depth_sign_check",
    "heatmap_cross_entropy",
    "heatmap_mse",
    "l1",
    "l2",
    "limb_depth_bound",
    "limb_length_loss",
    "mean_limb_lengths",
    "mse",
    "multi_view_consistency",
    "published_limb_lengths",
    "soft_mse",
    "volumetric_loss",
    "volumetric_nll",
    "weak_total",
]
