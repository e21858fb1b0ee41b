# SPDX-License-Identifier: Apache-2.0
"""Triangulation of points seen by several cameras."""

from __future__ import annotations

from functools import partial

import torch
from rivals import installed
from rivals import triangulate as rivals

from suites.case import SEED, Array, Case, Spec, Variant
from suites.scene import room
from tritool import ops, reference


def triangulate(quick: bool) -> list[Spec]:
    def spec(points: int, views: int, **flags: bool) -> Spec:
        return Spec(
            op="triangulate",
            size=f"N={points} C={views}",
            shape={"N": points, "C": views},
            unit="mm",
            tolerance=1.0,
            build=partial(triangulate_case, points, views),
            **flags,
        )

    if quick:
        return [spec(51, 4, headline=True, memory=True)]
    return [
        spec(
            points,
            views,
            headline=views == 4 and points in (68, 100011),
            memory=points == 100011,
        )
        for views in (4, 2, 8, 31)
        for points in (68, 1003, 100011)
    ]


def triangulate_case(count: int, views: int, device: str) -> Case:
    """The joints of people in a room, 1 px of noise; every point sees the same cameras."""
    generator = torch.Generator().manual_seed(SEED)
    projections, points_3d = room(count, views, generator)
    exact = torch.from_numpy(reference.project(points_3d.numpy(), projections.numpy()))
    points = exact + torch.randn(exact.shape, generator=generator, dtype=torch.float64)
    weights = 0.1 + 0.9 * torch.rand((count, views), generator=generator)
    inputs = {"points": points, "projections": projections, "weights": weights}
    inputs = {
        name: tensor.to(device, torch.float32).contiguous() for name, tensor in inputs.items()
    }

    uses = ("points", "projections", "weights")
    variants = [
        Variant("tritool", "tritool", ops.triangulate, uses),
        Variant("batched svd", "pytorch", rivals.dlt_svd, uses),
        Variant("eigh of A^T A, float64", "pytorch", rivals.dlt_eigh(torch.float64), uses),
        Variant("eigh of A^T A, float32", "pytorch", rivals.dlt_eigh(torch.float32), uses),
    ]
    if count <= 1003:
        variants.append(Variant("loop of torch.svd", "pytorch", rivals.dlt_svd_loop, uses))
    if views == 2:
        uses, note = ("points", "projections"), "no weights"
        variants.append(Variant("tritool, no weights", "tritool", ops.triangulate, uses, note=note))
        if installed("kornia"):
            variants += [
                Variant(
                    f"kornia triangulate_points, {solver}",
                    "package",
                    rivals.kornia_triangulate(solver),
                    uses,
                    note=note,
                )
                for solver in ("eigh", "cofactor")
            ]
        if device == "cpu" and installed("cv2"):
            variants.append(
                Variant(
                    "OpenCV triangulatePoints",
                    "package",
                    rivals.opencv_triangulate,
                    uses,
                    differentiable=False,
                    note=f"{note}, no gradient",
                )
            )
    return Case(
        inputs=inputs,
        wrt=("points", "weights"),
        reference=reference.triangulate,
        vjp=_triangulate_vjp,
        variants=variants,
    )


def _triangulate_vjp(
    grad: Array, points: Array, projections: Array, weights: Array | None = None
) -> dict[str, Array]:
    grads = reference.triangulate_vjp(grad, points, projections, weights)
    named = zip(("points", "projections", "weights"), grads, strict=True)
    return {name: value for name, value in named if value is not None}
