# SPDX-License-Identifier: Apache-2.0
"""Soft-argmax of heat maps and of volumes."""

from __future__ import annotations

from functools import partial

import torch
from rivals import installed
from rivals import soft_argmax as rivals
from torch import Tensor

from suites.case import SEED, Case, Spec, Variant
from tritool import VoxelGrid, ops, reference


def soft_argmax2d(quick: bool) -> list[Spec]:
    def spec(batch: tuple[int, ...], height: int, width: int, **flags: bool) -> Spec:
        letters = "BCJHW" if len(batch) == 3 else "BJHW"
        shape = dict(zip(letters, (*batch, height, width), strict=True))
        return Spec(
            op="soft_argmax2d",
            size="x".join(map(str, (*batch, height, width))),
            shape=shape,
            unit="px",
            tolerance=0.01,
            build=partial(_soft_argmax2d_case, (*batch, height, width)),
            **flags,
        )

    if quick:
        return [spec((1, 3), 12, 16, headline=True)]
    return [
        spec((4, 4, 17), 96, 96, headline=True, memory=True),
        spec((1, 17), 64, 64),
        spec((16, 17), 256, 256, memory=True),
    ]


def _soft_argmax2d_case(shape: tuple[int, ...], device: str) -> Case:
    alpha = 100.0
    heatmaps = _peaks(shape, dims=2, height=0.5, noise=0.02).to(device)
    uses = ("heatmaps",)
    height, width = shape[-2:]
    variants = [
        Variant("tritool", "tritool", partial(ops.soft_argmax2d, inverse_temperature=alpha), uses),
        Variant(
            "softmax + marginal sums",
            "pytorch",
            rivals.soft_argmax2d_marginals(height, width, alpha, device),
            uses,
        ),
        Variant(
            "softmax @ grid",
            "pytorch",
            rivals.soft_argmax2d_grid(height, width, alpha, device),
            uses,
        ),
    ]
    if installed("kornia"):
        kornia = rivals.kornia_soft_argmax2d(alpha)
        run = lambda heatmaps: kornia(heatmaps.flatten(0, -4)).unflatten(0, shape[:-3])  # noqa: E731
        variants.append(Variant("kornia spatial_soft_argmax2d", "package", run, uses))
    return Case(
        inputs={"heatmaps": heatmaps},
        wrt=uses,
        reference=partial(reference.soft_argmax2d, inverse_temperature=alpha),
        vjp=lambda grad, heatmaps: {
            "heatmaps": reference.soft_argmax2d_vjp(grad, heatmaps, inverse_temperature=alpha)
        },
        variants=variants,
        batch_dims=len(shape) - 2,
    )


def soft_argmax25d(quick: bool) -> list[Spec]:
    def spec(batch: int, joints: int, height: int, width: int, **flags: bool) -> Spec:
        return Spec(
            op="soft_argmax25d",
            size=f"{batch}x{joints}x{height}x{width}",
            shape={"B": batch, "J": joints, "H": height, "W": width},
            unit="px",
            tolerance=0.01,
            build=partial(_soft_argmax25d_case, (batch, joints, height, width)),
            **flags,
        )

    if quick:
        return [spec(2, 3, 12, 16)]
    return [spec(32, 17, 64, 48, headline=True, memory=True), spec(1, 17, 64, 48)]


def _soft_argmax25d_case(shape: tuple[int, ...], device: str) -> Case:
    """Heat maps and latent depth maps, both halves of one head, in units of about a pixel."""
    alpha = 100.0
    _, joints, height, width = shape
    generator = torch.Generator().manual_seed(SEED + 2)
    depth_maps = torch.randn(shape, generator=generator).mul_(10)
    head = torch.cat([_peaks(shape, dims=2, height=0.5, noise=0.02), depth_maps], 1).to(device)
    uses = ("heatmaps", "depth_maps")
    grids = (height, width, alpha, device)
    return Case(
        inputs={"heatmaps": head[:, :joints], "depth_maps": head[:, joints:]},
        wrt=uses,
        reference=partial(reference.soft_argmax25d, inverse_temperature=alpha),
        vjp=lambda grad, heatmaps, depth_maps: dict(
            zip(
                uses,
                reference.soft_argmax25d_vjp(grad, heatmaps, depth_maps, inverse_temperature=alpha),
                strict=True,
            )
        ),
        variants=[
            Variant(
                "tritool", "tritool", partial(ops.soft_argmax25d, inverse_temperature=alpha), uses
            ),
            Variant(
                "softmax + marginal sums + weighted sum",
                "pytorch",
                rivals.soft_argmax25d_marginals(*grids),
                uses,
            ),
            Variant(
                "softmax @ grid, softmax @ depth",
                "pytorch",
                rivals.soft_argmax25d_products(*grids),
                uses,
            ),
        ],
        batch_dims=2,
    )


def soft_argmax3d(quick: bool) -> list[Spec]:
    def spec(batch: int, joints: int, side: int, **flags: bool) -> Spec:
        return Spec(
            op="soft_argmax3d",
            size=f"{batch}x{joints}x{side}x{side}x{side}",
            shape={"B": batch, "J": joints, "X": side, "Y": side, "Z": side},
            unit="mm",
            tolerance=1.0,
            build=partial(_soft_argmax3d_case, batch, joints, side),
            **flags,
        )

    if quick:
        return [spec(1, 3, 8)]
    return [
        spec(4, 17, 64, headline=True, memory=True),
        *(spec(batch, 17, side) for batch, side in ((1, 64), (1, 32), (4, 32), (4, 16))),
    ]


def _soft_argmax3d_case(batch: int, joints: int, side: int, device: str) -> Case:
    """World coordinates in a cube of 2.5 m, as in the volumetric method of Iskakov et al."""
    volumes = _peaks((batch, joints, side, side, side), dims=3, height=20.0, noise=0.5).to(device)
    uses = ("volumes",)
    center = torch.tensor([[120.0, -340.0, 950.0]], device=device).repeat(batch, 1)
    grid = VoxelGrid.cube(center, 2500.0, side)
    index = torch.stack(torch.meshgrid(*[torch.arange(side)] * 3, indexing="ij"), -1)
    coordinates = grid.to_world(
        index.reshape(1, -1, 3).repeat(batch, 1, 1).to(device, torch.float32)
    )
    frame = (grid.origin.double().cpu().numpy(), grid.axes.double().cpu().numpy())
    return Case(
        inputs={"volumes": volumes},
        wrt=uses,
        reference=partial(reference.soft_argmax3d, grid=frame),
        vjp=lambda grad, volumes: {
            "volumes": reference.soft_argmax3d_vjp(grad, volumes, grid=frame)[0]
        },
        variants=[
            Variant("tritool", "tritool", partial(ops.soft_argmax3d, grid=grid), uses),
            Variant(
                "softmax + marginal sums",
                "pytorch",
                rivals.soft_argmax3d_marginals((side,) * 3, grid.origin, grid.axes),
                uses,
            ),
            Variant(
                "softmax, bmm with coordinates",
                "pytorch",
                rivals.soft_argmax3d_coordinates(coordinates.contiguous()),
                uses,
            ),
        ],
        batch_dims=2,
    )


def _peaks(shape: tuple[int, ...], dims: int, height: float, noise: float) -> Tensor:
    """Gaussian peaks of sigma 2 on noise.

    Their height keeps exp(alpha * difference) above float32's denormal numbers, which some
    processors add slowly: a test of the algorithms, not of that.
    """
    generator = torch.Generator().manual_seed(SEED)
    maps = torch.randn(shape, generator=generator).mul_(noise)
    place = torch.rand((*shape[:-dims], dims), generator=generator)
    peak = torch.ones(())
    for axis, size in enumerate(shape[-dims:]):
        distance = torch.arange(size) - (0.2 + 0.6 * place[..., axis, None]) * (size - 1)
        profile = torch.exp(-distance.square() / 8)
        peak = peak[..., None] * profile[(..., *(None,) * axis, slice(None))] if axis else profile
    return maps.add_(peak, alpha=height)
