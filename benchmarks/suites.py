# SPDX-License-Identifier: Apache-2.0
"""What is measured: one function per operation lists its sizes, another builds a case of it.

To add an operation, write one such function and name it in `OPERATIONS`; timing, accuracy, memory,
report and tests follow.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import rivals
import torch
from torch import Tensor

from tritool import VoxelGrid, ops, reference

SEED = 20240607
Kind = Literal["tritool", "pytorch", "compiled", "package"]
Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Variant:
    """One way to compute an operation: a function of the inputs named in `uses`."""

    name: str
    kind: Kind
    run: Callable[..., Tensor]
    uses: tuple[str, ...]
    differentiable: bool = True
    note: str = ""


@dataclass(frozen=True)
class Case:
    """One operation at one size, with everything needed to check and time it."""

    inputs: dict[str, Tensor]
    """float32, on the device."""
    wrt: tuple[str, ...]
    """The inputs that forward + backward differentiates."""
    reference: Callable[..., Array]
    """The result in float64, from the inputs of a variant as float64 arrays."""
    vjp: Callable[..., dict[str, Array]]
    """Its gradients in float64, from the incoming gradient and the same inputs."""
    variants: Sequence[Variant]
    batch_dims: int = 1
    """Leading dimensions of the differentiable inputs that number independent items."""


@dataclass(frozen=True)
class Spec:
    """A case that has not been built yet."""

    op: str
    size: str
    shape: dict[str, int]
    unit: Literal["px", "mm"]
    tolerance: float
    """Accurate: all results finite, 99.9 % of them within this distance of float64."""
    build: Callable[[str], Case]
    """Makes the case on a device."""
    headline: bool = False
    """Goes into the README's table."""
    memory: bool = False
    """Large enough for its peak memory to mean something."""

    @property
    def name(self) -> str:
        return f"{self.op} {self.size}"


def float64(inputs: dict[str, Tensor]) -> dict[str, Array]:
    return {name: tensor.detach().cpu().double().numpy() for name, tensor in inputs.items()}


# ---- soft-argmax ----


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
    if rivals.installed("kornia"):
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
    return [spec(4, 17, 64, headline=True, memory=True), spec(1, 17, 32)]


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


# ---- triangulation ----


def triangulate(quick: bool) -> list[Spec]:
    def spec(points: int, views: int, **flags: bool) -> Spec:
        return Spec(
            op="triangulate",
            size=f"N={points} C={views}",
            shape={"N": points, "C": views},
            unit="mm",
            tolerance=1.0,
            build=partial(_triangulate_case, points, views),
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


def _triangulate_case(count: int, views: int, device: str) -> Case:
    """The joints of people in a room, 1 px of noise; every point sees the same cameras."""
    generator = torch.Generator().manual_seed(SEED)
    projections, points_3d = _scene(count, views, generator)
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
        if rivals.installed("kornia"):
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
        if device == "cpu" and rivals.installed("cv2"):
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


def _scene(count: int, views: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Projections `[C, 3, 4]` of cameras 4 to 5.5 m away, points in a box of 2 x 2 x 1.9 m; mm."""
    kinds: dict[str, Any] = {"generator": generator, "dtype": torch.float64}
    angle = 2 * math.pi * (torch.arange(views) + 0.3 * torch.rand(views, **kinds)) / views
    radius = 4000 + 1500 * torch.rand(views, **kinds)
    height = 1400 + 200 * torch.rand(views, **kinds)
    centers = torch.stack([radius * angle.cos(), radius * angle.sin(), height], -1)
    forward = torch.nn.functional.normalize(torch.tensor([0.0, 0.0, 950.0]) - centers, dim=-1)
    up = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64).expand_as(forward)
    right = torch.nn.functional.normalize(torch.linalg.cross(forward, up), dim=-1)
    rotation = torch.stack([right, torch.linalg.cross(forward, right), forward], -2)
    intrinsics = torch.tensor(
        [[1145.0, 0.0, 512.0], [0.0, 1143.0, 508.0], [0.0, 0.0, 1.0]], dtype=torch.float64
    )
    extrinsics = torch.cat([rotation, -rotation @ centers[..., None]], -1)
    low, high = torch.tensor([[-1000.0, -1000.0, 0.0], [1000.0, 1000.0, 1900.0]])
    points = low + (high - low) * torch.rand((count, 3), **kinds)
    return intrinsics @ extrinsics, points


# ---- projection ----


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

    return [spec(33, 4)] if quick else [spec(100000, 4, headline=True, memory=True)]


def _project_case(count: int, views: int, device: str) -> Case:
    projections, points = _scene(count, views, torch.Generator().manual_seed(SEED))
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


OPERATIONS = (soft_argmax2d, soft_argmax25d, soft_argmax3d, triangulate, project)


def specs(quick: bool = False) -> list[Spec]:
    """All cases, or tiny ones that only show that everything runs."""
    return [spec for operation in OPERATIONS for spec in operation(quick)]
