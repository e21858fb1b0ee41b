# SPDX-License-Identifier: Apache-2.0
"""From heat maps to 3D joints, and the gradient of the 3D error back to every pixel.

Four cameras around a room see 17 joints. The heat maps, which a network would make, peak a cell or
two off the truth. A bias on every cell is trained by the 3D error alone: no 2D label is used.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

import tritool
from tritool.ops import project, soft_argmax2d, triangulate

HEIGHT, WIDTH = 48, 64  # cells of a heat map


def ring(views: int, radius: float = 4500.0) -> tritool.Cameras:
    """Cameras around the origin that look at its height of 1 m; millimetres, z up."""
    angle = torch.arange(views) * (2 * math.pi / views) + 0.3
    forward = -torch.stack([angle.cos(), angle.sin(), torch.zeros(views)], -1)
    down = torch.tensor([0.0, 0.0, -1.0]).expand(views, 3)
    R = torch.stack([torch.linalg.cross(down, forward), down, forward], -2)
    center = -radius * forward + torch.tensor([0.0, 0.0, 1000.0])
    K = torch.tensor([[1145.0, 0.0, 639.5], [0.0, 1145.0, 479.5], [0.0, 0.0, 1.0]])
    t = -(R @ center[..., None]).squeeze(-1)
    return tritool.Cameras(K.expand(views, 3, 3), R, t, image_size=(1280, 960))


def peaks(cells: Tensor) -> Tensor:
    """Heat maps [..., H, W] with a Gaussian peak of height 1 at cells [..., 2]."""
    x, y = torch.arange(WIDTH), torch.arange(HEIGHT)[:, None]
    square = (x - cells[..., :1, None]) ** 2 + (y - cells[..., 1:, None]) ** 2
    return torch.exp(-square / 8)


def main(steps: int = 100) -> tuple[float, float]:
    """Trains, and returns the mean 3D error in mm before and after."""
    torch.manual_seed(0)
    cameras = ring(4)
    truth = torch.randn(17, 3) * torch.tensor([250.0, 250.0, 450.0])
    truth = truth + torch.tensor([0.0, 0.0, 1000.0])
    # The heat maps are smaller than the images: so are the cameras that belong to them.
    small = cameras.resize((WIDTH, HEIGHT))
    seen = project(truth, small.projections).movedim(1, 0)  # [C, J, 2], cells
    detections = peaks(seen + 1.5 * torch.randn_like(seen))  # [C, J, H, W]

    bias = torch.zeros_like(detections, requires_grad=True)
    optimiser = torch.optim.Adam([bias], lr=0.01)
    errors = []
    for step in range(steps + 1):
        cells = soft_argmax2d(detections + bias, inverse_temperature=20.0)  # [C, J, 2]
        points = triangulate(cells.movedim(0, 1), small.projections)  # [J, 3]
        error = (points - truth).norm(dim=-1).mean()
        errors.append(error.item())
        optimiser.zero_grad()
        error.backward()
        if step % 20 == 0:
            cells_reached = (bias.grad != 0).float().mean()
            print(f"step {step:3}: {errors[-1]:6.2f} mm, gradient in {cells_reached:.0%} of cells")
        optimiser.step()
    return errors[0], errors[-1]


if __name__ == "__main__":
    main()
