# SPDX-License-Identifier: Apache-2.0
"""Learn how far to trust each camera: the weights of triangulation are trained by the 3D error.

Five cameras, one of which is noisy (a bad lens, a hidden corner). One number a camera is trained on
points whose position is known; then the weights are used on points that were never seen.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tritool.ops import project, triangulate

NOISE = torch.tensor([2.0, 2.0, 25.0, 2.0, 2.0])  # of each camera, pixels


def ring(views: int, radius: float = 4500.0) -> Tensor:
    """Projections [C, 3, 4] of cameras around the origin; millimetres, z up."""
    angle = torch.arange(views) * (2 * math.pi / views) + 0.3
    forward = -torch.stack([angle.cos(), angle.sin(), torch.zeros(views)], -1)
    down = torch.tensor([0.0, 0.0, -1.0]).expand(views, 3)
    R = torch.stack([torch.linalg.cross(down, forward), down, forward], -2)
    t = torch.tensor([0.0, 0.0, radius]).expand(views, 3)
    K = torch.tensor([[1145.0, 0.0, 639.5], [0.0, 1145.0, 359.5], [0.0, 0.0, 1.0]])
    return K @ torch.cat([R, t[..., None]], -1)


def observe(projections: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Positions [N, 3] and what the cameras say of them, [N, C, 2]."""
    truth = 500.0 * torch.randn(count, 3)
    pixels = project(truth, projections)
    return truth, pixels + NOISE[:, None] * torch.randn_like(pixels)


def mean_error(pixels: Tensor, projections: Tensor, weights: Tensor, truth: Tensor) -> Tensor:
    """Mean distance to the truth, mm; the weights [C] are the same for all points."""
    points = triangulate(pixels, projections, weights, mode="inhomogeneous")
    return (points - truth).norm(dim=-1).mean()


def main(steps: int = 150) -> tuple[Tensor, float, float]:
    """Trains; returns the weights, and the error on new points with equal and learned weights."""
    torch.manual_seed(0)
    projections = ring(len(NOISE))
    truth, pixels = observe(projections, 500)
    scores = torch.zeros(len(NOISE), requires_grad=True)
    optimiser = torch.optim.Adam([scores], lr=0.05)
    for step in range(steps):
        # Softmax: positive, and of a fixed sum, as a common factor of the weights changes nothing.
        error = mean_error(pixels, projections, scores.softmax(0), truth)
        optimiser.zero_grad()
        error.backward()
        optimiser.step()
        if step % 25 == 0:
            rounded = [round(w, 3) for w in scores.softmax(0).tolist()]
            print(f"step {step:3}: {error.item():6.2f} mm, weights {rounded}")

    weights = scores.softmax(0).detach()
    truth, pixels = observe(projections, 2000)
    equal = mean_error(pixels, projections, torch.ones(len(NOISE)), truth).item()
    learned = mean_error(pixels, projections, weights, truth).item()
    print(f"on new points: {equal:.2f} mm with equal weights, {learned:.2f} mm with the learned")
    return weights, equal, learned


if __name__ == "__main__":
    main()
