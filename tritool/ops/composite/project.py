# SPDX-License-Identifier: Apache-2.0
"""Projection in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tritool.ops.composite._vjp import vjp

__all__ = [
    "project",
    "project_backward",
    "project_double_backward",
]


def project(points: Tensor, projections: Tensor) -> Tensor:
    """See `tritool.ops.project`; the arguments are those of `Project.apply`."""
    homogeneous = (projections[..., :3] @ points[..., None, :, None]).squeeze(-1)
    image = homogeneous + projections[..., 3]
    visible = (image[..., 2:] > 0) & image.isfinite().all(-1, keepdim=True)
    # Once more on harmless values, so that no NaN is differentiated.
    safe_points = torch.where(points.isfinite(), points, 0)[..., None, :, None]
    safe = torch.where(visible[..., None], projections, 0)
    image = (safe[..., :3] @ safe_points).squeeze(-1) + safe[..., 3]
    pixels = image[..., :2] / torch.where(visible, image[..., 2:], 1)
    return torch.where(visible & pixels.isfinite().all(-1, keepdim=True), pixels, torch.nan)


def project_backward(
    grad: Tensor, points: Tensor, projections: Tensor, want_points: bool, want_projections: bool
) -> tuple[Tensor, Tensor]:
    """The gradients that are wanted, and empty tensors for the others."""
    wanted = (want_points, want_projections)
    grads = _project_gradient(grad, points, projections, wanted)
    results = [grads.pop(0) if want else points.new_empty(0) for want in wanted]
    return results[0], results[1]


def project_double_backward(
    cotangents: Sequence[Tensor],
    grad: Tensor,
    points: Tensor,
    projections: Tensor,
    wanted: Sequence[bool],
) -> tuple[Tensor, ...]:
    """The gradients of <cotangents, gradients of Project> to grad, points and projections."""

    def gradient(*inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(_project_gradient(inputs[0], inputs[1], inputs[2], wanted))

    _, pull = vjp(gradient, grad, points, projections)
    given = tuple(c for c, want in zip(cotangents, wanted, strict=True) if want)
    grads: tuple[Tensor, ...] = pull(given)
    return grads


def _project_gradient(
    grad: Tensor, points: Tensor, projections: Tensor, wanted: Sequence[bool]
) -> list[Tensor]:
    pixels, pull = vjp(project, points, projections)
    grads = pull(torch.where(pixels.isnan(), 0, grad))
    return [g for g, want in zip(grads, wanted, strict=True) if want]
