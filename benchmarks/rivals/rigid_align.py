# SPDX-License-Identifier: Apache-2.0
"""The similarity that moves one weighted point set onto another.

Sources: Umeyama, "Least-squares estimation of transformation parameters between two point
patterns" (PAMI 1991), for the decomposition by SVD; Horn, "Closed-form solution of absolute
orientation using unit quaternions" (JOSA A 1987), for that by a symmetric 4x4 matrix.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Similarity = tuple[Tensor, Tensor, Tensor]
"""Rotation [N, 3, 3], translation [N, 3], scale [N]."""


def _centred(source: Tensor, target: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
    """Both sets about their means, the means, and weights [N, J, 1] of sum 1."""
    share = (weights / weights.sum(-1, keepdim=True))[..., None]
    source_mean = (share * source).sum(-2, keepdim=True)
    target_mean = (share * target).sum(-2, keepdim=True)
    return source - source_mean, target - target_mean, source_mean, target_mean, share


def svd(source: Tensor, target: Tensor, weights: Tensor) -> Similarity:
    """The singular vectors of the 3x3 covariance, all poses in one call."""
    x, y, source_mean, target_mean, share = _centred(source, target, weights)
    u, singular, vh = torch.linalg.svd((share * y).mT @ x)
    sign = torch.ones_like(singular)
    sign[:, 2] = torch.linalg.det(u @ vh).sign()
    rotation = (u * sign[:, None]) @ vh
    scale = (singular * sign).sum(-1) / (share * x.square()).sum((-2, -1))
    moved = scale[:, None, None] * (source_mean @ rotation.mT)
    return rotation, (target_mean - moved)[:, 0], scale


def quaternion(source: Tensor, target: Tensor, weights: Tensor) -> Similarity:
    """The last eigenvector of Horn's symmetric 4x4 matrix is the rotation's quaternion."""
    x, y, source_mean, target_mean, share = _centred(source, target, weights)
    m = (share * x).mT @ y
    xx, yy, zz = m[:, 0, 0], m[:, 1, 1], m[:, 2, 2]
    odd = m - m.mT
    even = m + m.mT
    lower = [xx - yy - zz, yy - xx - zz, zz - xx - yy]
    upper = [xx + yy + zz, odd[:, 1, 2], odd[:, 2, 0], odd[:, 0, 1]]
    matrix = torch.stack(
        [
            *upper,
            *(upper[1], lower[0], even[:, 0, 1], even[:, 0, 2]),
            *(upper[2], even[:, 0, 1], lower[1], even[:, 1, 2]),
            *(upper[3], even[:, 0, 2], even[:, 1, 2], lower[2]),
        ],
        -1,
    ).unflatten(-1, (4, 4))
    values, vectors = torch.linalg.eigh(matrix)
    w, i, j, k = vectors[..., 3].unbind(-1)
    rotation = torch.stack(
        [
            *(1 - 2 * (j * j + k * k), 2 * (i * j - w * k), 2 * (i * k + w * j)),
            *(2 * (i * j + w * k), 1 - 2 * (i * i + k * k), 2 * (j * k - w * i)),
            *(2 * (i * k - w * j), 2 * (j * k + w * i), 1 - 2 * (i * i + j * j)),
        ],
        -1,
    ).unflatten(-1, (3, 3))
    scale = values[:, 3] / (share * x.square()).sum((-2, -1))
    moved = scale[:, None, None] * (source_mean @ rotation.mT)
    return rotation, (target_mean - moved)[:, 0], scale


def numpy_loop(source: Tensor, target: Tensor, weights: Tensor) -> Similarity:
    """One pose at a time, in float64, as evaluation scripts do it; no gradient, on the CPU."""
    found = [
        _numpy_one(*(tensor.double().numpy() for tensor in pose))
        for pose in zip(source, target, weights, strict=True)
    ]
    rotation, translation, scale = (
        torch.from_numpy(np.stack(part)).to(source.dtype) for part in zip(*found, strict=True)
    )
    return rotation, translation, scale


def _numpy_one(
    source: npt.NDArray[np.float64],
    target: npt.NDArray[np.float64],
    weights: npt.NDArray[np.float64],
) -> tuple[npt.NDArray[np.float64], ...]:
    share = weights / weights.sum()
    source_mean, target_mean = share @ source, share @ target
    x, y = source - source_mean, target - target_mean
    u, singular, vh = np.linalg.svd((share[:, None] * y).T @ x)
    if np.linalg.det(u @ vh) < 0:
        u[:, 2] *= -1
        singular[2] *= -1
    rotation = u @ vh
    scale = singular.sum() / (share @ x**2).sum()
    return rotation, target_mean - scale * rotation @ source_mean, scale
