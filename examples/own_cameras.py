# SPDX-License-Identifier: Apache-2.0
"""Your own cameras: from K, R, t and lens distortion to 3D points and their reprojection error.

Replace the numbers by those of your calibration. World units are yours, here millimetres.
"""

from __future__ import annotations

import torch

import tritool
from tritool.ops import triangulate

F64 = torch.float64


def calibration() -> tritool.Cameras:
    """Three cameras as OpenCV calibrates them: K, R, t and k1 k2 p1 p2 k3."""
    K = torch.tensor([[1200.0, 0.0, 959.5], [0.0, 1200.0, 539.5], [0.0, 0.0, 1.0]], dtype=F64)
    angle = torch.tensor([-0.6, 0.0, 0.6], dtype=F64)  # about the vertical axis, radians
    cos, sin, zero, one = angle.cos(), angle.sin(), torch.zeros(3), torch.ones(3)
    R = torch.stack([cos, zero, -sin, zero, one, zero, sin, zero, cos], -1).view(3, 3, 3)
    t = torch.tensor([0.0, 0.0, 4000.0], dtype=F64).expand(3, 3)
    dist = torch.tensor([-0.12, 0.05, 4e-4, -3e-4, -0.01], dtype=F64).expand(3, 5)
    names = ("left", "middle", "right")
    return tritool.Cameras(K.expand(3, 3, 3), R, t, dist, image_size=(1920, 1080), names=names)


def main() -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the distance to the truth [N], mm, and the reprojection error [N, C], pixels."""
    cameras = calibration()
    for problem in cameras.problems():  # a transposed K, an R that is no rotation, ...
        print("calibration:", problem)
    print(cameras, "centres:", *cameras.centers.round().tolist())

    # What a detector would give: pixels of the distorted images, with a confidence each.
    torch.manual_seed(0)
    truth = 400.0 * torch.randn(8, 3, dtype=F64)
    measured = cameras.project(truth)
    measured = measured + 0.5 * torch.randn_like(measured)
    confidences = torch.ones(8, 3, dtype=F64)
    measured[0, 1] = torch.nan  # not detected: the view is left out
    measured[1, 2] += 80.0  # a wrong detection, and the detector knows it
    confidences[1, 2] = 0.02

    # Triangulation is linear, so the lens is taken out first; a weight multiplies its view's rows.
    # The last two arguments come close to the least reprojection error (docs/ops/triangulate.md).
    points = triangulate(
        cameras.undistort(measured), cameras.projections, confidences,
        mode="inhomogeneous", reweight=1,
    )  # fmt: skip

    # The error where the detector worked: project() puts the distortion back.
    errors = (cameras.project(points) - measured).norm(dim=-1)
    distances = (points - truth).norm(dim=-1)
    print("point   to the truth   reprojection error, px")
    for index, (distance, row) in enumerate(zip(distances, errors, strict=True)):
        views = "  ".join(f"{name} {e:5.2f}" for name, e in zip(cameras.names, row, strict=True))
        print(f"{index:5}   {distance:9.2f} mm   {views}")
    return distances, errors


if __name__ == "__main__":
    main()
