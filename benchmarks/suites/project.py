# SPDX-License-Identifier: Apache-2.0
"""Projection of points into all cameras."""

from __future__ import annotations

from functools import partial

import torch
from rivals import project as rivals

from suites.case import SEED, Case, Spec, Variant
from suites.scene import room
from tritool import ops, reference


def project(quick: bool) -> list[Spec]:
    def spec(points: int, views: int, **flags: bool) -> Spec:
        return Spec(
            op="project",
            size=f"N={points} C={views}",
            shape={"N": points, "C": views},
            unit="px",
            tolerance=0.01,
            build=partial(_project_case, points, views),
            **flags,
        )

    if quick:
        return [spec(33, 4)]
    return [spec(100000, 4, headline=True, memory=True), spec(1000, 4), spec(100000, 31)]


def _project_case(count: int, views: int, device: str) -> Case:
    projections, points = room(count, views, torch.Generator().manual_seed(SEED))
    inputs = {"points": points, "projections": projections}
    uses = ("points", "projections")
    return Case(
        inputs={name: tensor.to(device, torch.float32) for name, tensor in inputs.items()},
        wrt=("points",),
        reference=reference.project,
        vjp=lambda grad, points, projections: {
            "points": reference.project_vjp(grad, points, projections)[0]
        },
        variants=[
            Variant("tritool", "tritool", ops.project, uses),
            Variant("einsum", "pytorch", rivals.project_einsum, uses),
            Variant("one matmul", "pytorch", rivals.project_matmul, uses),
        ],
    )
