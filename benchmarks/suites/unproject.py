# SPDX-License-Identifier: Apache-2.0
"""Unprojection of several views' features into a cube around a person."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from rivals import unproject as rivals
from torch import Tensor

from suites.case import SEED, Array, Case, Spec, Variant, difference
from suites.scene import room
from tritool import VoxelGrid, ops, reference

SIDE = 2500.0  # of the cube, mm


def unproject(quick: bool) -> list[Spec]:
    def spec(
        aggregation: rivals.Aggregation,
        batch: int = 1,
        voxels: int = 64,
        channels_last: bool = False,
        *,
        views: int = 4,
        channels: int = 32,
        cells: tuple[int, int] = (96, 96),
        **flags: bool,
    ) -> Spec:
        shape = {"B": batch, "C": views, "K": channels, "H": cells[0], "W": cells[1]}
        maps = "x".join(map(str, shape.values()))
        volume = dict.fromkeys("XYZ", voxels)
        layout = ", channels last" if channels_last else ""
        return Spec(
            op="unproject",
            size=f"{aggregation}, {maps} to {voxels}^3{layout}",
            shape=shape | volume,
            unit="value",
            tolerance=1e-3,
            build=partial(_unproject_case, aggregation, tuple(shape.values()), voxels, layout),
            **flags,
        )

    if quick:
        tiny = partial(spec, voxels=8, channels=5, cells=(10, 12))
        return [
            tiny("softmax", batch=2, headline=True, memory=True),
            tiny("softmax", channels_last=True),
            tiny("sum"),
            tiny("mean", batch=2),
            tiny("max"),
        ]
    return [
        spec("softmax", headline=True, memory=True),
        spec("softmax", channels_last=True, memory=True),
        spec("sum", memory=True),
        spec("mean"),
        spec("max"),
        *(spec("softmax", batch=batch) for batch in (2, 4)),
        *(spec("softmax", voxels=voxels) for voxels in (16, 32)),
        *(spec("softmax", views=views) for views in (2, 8)),
        *(spec("softmax", channels=channels) for channels in (8, 64)),
    ]


def _unproject_case(
    aggregation: rivals.Aggregation, shape: tuple[int, ...], voxels: int, layout: str, device: str
) -> Case:
    """Every camera's map is the square around the cube: all of its voxels are in all views."""
    generator = torch.Generator().manual_seed(SEED)
    batch, views, _, height, width = shape
    projections, _ = room(0, views, generator)
    center = torch.tensor([0.0, 0.0, 950.0]) + 100 * torch.randn((batch, 3), generator=generator)
    corners = VoxelGrid.cube(center.double(), SIDE, 2, corner_aligned=True).points()
    cropped = torch.stack([_crop(projections, cube, height, width) for cube in corners])
    features = torch.randn(shape, generator=generator).to(device)
    if layout:
        features = features.movedim(2, -1).contiguous().movedim(-1, 2)
    inputs = {"features": features, "projections": cropped.to(device, torch.float32)}
    if aggregation == "mean":
        confidences = 0.1 + 0.9 * torch.rand(shape[:2], generator=generator)
        inputs["confidences"] = confidences.to(device)
    uses = tuple(inputs)

    grid = VoxelGrid.cube(center.to(device), SIDE, voxels)
    world = rivals.homogeneous(grid.points())
    size = (voxels,) * 3
    frame = (grid.origin.double().cpu().numpy(), grid.axes.double().cpu().numpy(), size)
    build = {"world": world, "size": size, "aggregation": aggregation}
    variants = [
        Variant(
            "tritool",
            "tritool",
            partial(ops.unproject, grid=grid, aggregation=aggregation),
            uses,
        ),
        Variant("grid_sample, all views", "pytorch", rivals.all_views(**build), uses),
        Variant("loop over views", "pytorch", rivals.view_by_view(**build), uses),
    ]
    if aggregation in ("sum", "mean"):
        variants.append(Variant("embedding_bag", "pytorch", rivals.bags(**build), uses))
    return Case(
        inputs=inputs,
        wrt=tuple(name for name in uses if name != "projections"),
        reference=partial(reference.unproject, grid=frame, aggregation=aggregation),
        vjp=partial(_vjp, grid=frame, aggregation=aggregation),
        variants=variants,
        error=difference,
    )


def _vjp(grad: Array, **inputs: Any) -> dict[str, Array]:
    features, _, _, confidences = reference.unproject_vjp(grad, **inputs)
    named = {"features": features, "confidences": confidences}
    return {name: value for name, value in named.items() if value is not None}


def _crop(projections: Tensor, points: Tensor, height: int, width: int) -> Tensor:
    """Projections to maps of the least rectangles that show the points; the pixels change alike."""
    seen = torch.from_numpy(reference.project(points.reshape(-1, 3).numpy(), projections.numpy()))
    low, high = seen.amin(0), seen.amax(0)
    center = (low + high) / 2
    scale = ((torch.tensor([width, height]) - 1) / (high - low)).amin(-1)
    move = torch.zeros(len(projections), 3, 3, dtype=torch.float64)
    move[:, 0, 0] = move[:, 1, 1] = scale
    move[:, :2, 2] = (torch.tensor([width, height]) - 1) / 2 - scale[:, None] * center
    move[:, 2, 2] = 1.0
    return move @ projections
