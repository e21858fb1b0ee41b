# SPDX-License-Identifier: Apache-2.0
"""Voxel grids: where the voxels of a volume lie in the world."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree

__all__ = ["VoxelGrid"]


@dataclass(frozen=True, eq=False)
class VoxelGrid:
    """A batch of B affine grids of X x Y x Z voxels in the world.

    The voxel (i, j, k) is centred at `origin + i axes[:, 0] + j axes[:, 1] + k axes[:, 2]`: a row
    of `axes` is the step to the next voxel along one index, its length the voxel's extent. The
    rows need not be orthogonal. Everything is differentiable in `origin` and `axes`, and the grid
    is a pytree whose leaves they are, so it goes through `torch.func` and `torch.export`.

    Args:
        origin: [B, 3], the centre of voxel (0, 0, 0), world units; float32 or float64.
        axes: [B, 3, 3], the steps, world units.
        size: the numbers of voxels (X, Y, Z).

    Raises:
        TypeError: if the tensors are not float32 or float64, or differ in dtype or device; the
            same for points given to a method.
        ValueError: if shapes or the size do not fit.

    Example:
        >>> grid = VoxelGrid.cube(torch.zeros(1, 3), side=2000.0, size=4)
        >>> grid.to_world(torch.tensor([[0.0, 1.5, 3.5]]))  # a centre, the middle, a face
        tensor([[-750.,    0., 1000.]])
    """

    origin: Tensor
    axes: Tensor
    size: tuple[int, int, int]

    def __post_init__(self) -> None:
        """Checks the tensors and the size."""
        _require_float(self.origin, "origin")
        if self.origin.ndim != 2 or self.origin.shape[1] != 3:
            raise ValueError(f"origin must be [B, 3], got {tuple(self.origin.shape)}")
        _require_like(self.axes, "axes", self.origin)
        if self.axes.shape != (self.origin.shape[0], 3, 3):
            raise ValueError(
                "axes must be [B, 3, 3] with B = "
                f"{self.origin.shape[0]}, got {tuple(self.axes.shape)}"
            )
        object.__setattr__(self, "size", _checked_size(self.size))

    @classmethod
    def cube(
        cls,
        center: Tensor,
        side: float | Sequence[float] | Tensor,
        size: int | Sequence[int] = 64,
        rotation: Tensor | None = None,
        corner_aligned: bool = False,
    ) -> VoxelGrid:
        """A cube or box of voxels around a centre.

        By default the voxels fill the box: their spacing is `side / size`, and the box's faces lie
        half a voxel outside of the outermost centres. With `corner_aligned` the outermost centres
        lie on the faces and the spacing is `side / (size - 1)`, as in the official code of
        learnable triangulation. In both cases the box is centred at `center`.

        Args:
            center: [B, 3], world units; float32 or float64.
            side: the edge length in world units: one number; three numbers, one for each axis of
                the grid; or a tensor, [] or [B] for cubes, [B, 3] for boxes.
            size: the number of voxels along every axis, or (X, Y, Z).
            rotation: [B, 3, 3] or [3, 3], the world from the box: its column a is the direction
                of the grid's axis a, `axes[:, a] = spacing[a] * rotation[:, :, a]`. Default: the
                axes of the world.
            corner_aligned: spread the voxel centres from face to face.

        Returns:
            The grid, differentiable in `center`, `side` and `rotation`.

        Raises:
            TypeError: if the tensors are not float32 or float64, or differ in dtype or device.
            ValueError: if shapes do not fit, or with `corner_aligned` an axis has one voxel only.
        """
        _require_float(center, "center")
        if center.ndim != 2 or center.shape[1] != 3:
            raise ValueError(f"center must be [B, 3], got {tuple(center.shape)}")
        counts = _checked_size((size,) * 3 if isinstance(size, int) else size)
        if corner_aligned and min(counts) < 2:
            raise ValueError(
                f"size must be at least 2 along every axis if corner_aligned, got {counts}"
            )
        if rotation is None:
            rotation = torch.eye(3, dtype=center.dtype, device=center.device)
        _require_like(rotation, "rotation", center)
        # By the number of dimensions first: comparing B with 3 would fix B in an exported program.
        if rotation.ndim not in (2, 3) or (
            rotation.shape != (center.shape[0], 3, 3)[3 - rotation.ndim :]
        ):
            raise ValueError(
                f"rotation must be [B, 3, 3] or [3, 3] with B = {center.shape[0]}, "
                f"got {tuple(rotation.shape)}"
            )
        # Scalars stay Python numbers: copying them to the device would wait for it.
        steps = [
            length / (count - 1 if corner_aligned else count) * rotation[..., :, a]
            for a, (length, count) in enumerate(zip(_box_sides(side, center), counts, strict=True))
        ]
        origin = center
        for step, count in zip(steps, counts, strict=True):
            origin = origin - (count - 1) / 2 * step
        axes = torch.stack([step.expand_as(center) for step in steps], 1)
        return cls(origin, axes, counts)

    @property
    def batch(self) -> int:
        """The number of grids B."""
        return self.origin.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the frame and of world coordinates."""
        return self.origin.dtype

    @property
    def device(self) -> torch.device:
        """The device of the frame and of world coordinates."""
        return self.origin.device

    def points(self) -> Tensor:
        """The voxels' centres, [B, X, Y, Z, 3], world units."""
        i, j, k = (torch.arange(n, dtype=self.dtype, device=self.device) for n in self.size)
        x, y, z = self.axes[..., None, None, None, :].unbind(-5)
        # One index, and one dimension of the result, after the other.
        along_i = self.origin[..., None, None, None, :] + i[:, None, None, None] * x
        return along_i + j[:, None, None] * y + k[:, None] * z

    def to_world(self, index: Tensor) -> Tensor:
        """World coordinates of voxel indices; fractions lie between the voxels' centres.

        Args:
            index: [B, ..., 3], (i, j, k) in voxels; B may be 1 here or in the grid.

        Returns:
            [B, ..., 3], world units.
        """
        origin, axes = self._frame_for(index, "index")
        i, j, k = index[..., :1], index[..., 1:2], index[..., 2:]
        return origin + i * axes[..., 0, :] + j * axes[..., 1, :] + k * axes[..., 2, :]

    def to_index(self, world: Tensor) -> Tensor:
        """Voxel indices of world coordinates, the inverse of `to_world`.

        Args:
            world: [B, ..., 3], world units; B may be 1 here or in the grid.

        Returns:
            [B, ..., 3], (i, j, k) in voxels, not rounded; not finite if the axes are dependent.
        """
        origin, axes = self._frame_for(world, "world")
        first, second, third = axes.unbind(-2)
        # Cramer's rule: matmul and inverse would round to TF32 or wait for the device.
        normals = torch.stack(
            [
                torch.linalg.cross(second, third),
                torch.linalg.cross(third, first),
                torch.linalg.cross(first, second),
            ],
            -2,
        )
        volume = (first * normals[..., 0, :]).sum(-1)
        return (normals * (world - origin)[..., None, :]).sum(-1) / volume[..., None]

    def to(self, *args: Any, **kwargs: Any) -> VoxelGrid:
        """The grid on another device or in another dtype; arguments as of `torch.Tensor.to`."""
        return VoxelGrid(self.origin.to(*args, **kwargs), self.axes.to(*args, **kwargs), self.size)

    def _frame_for(self, points: Tensor, name: str) -> tuple[Tensor, Tensor]:
        """Origin and axes with dimensions of size one inserted after the batch, for `points`."""
        _require_like(points, name, self.origin)
        fits = points.ndim >= 2 and points.shape[-1] == 3
        if not fits or (self.batch != 1 and points.shape[0] not in (1, self.batch)):
            raise ValueError(
                f"{name} must be [B, ..., 3] with B = {self.batch}, got {tuple(points.shape)}"
            )
        between = (1,) * (points.ndim - 2)
        return (
            self.origin.reshape(-1, *between, 3),
            self.axes.reshape(-1, *between, 3, 3),
        )


def _require_float(value: Tensor, name: str) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if value.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{name} must be float32 or float64, got {value.dtype}")


def _require_like(value: Tensor, name: str, like: Tensor) -> None:
    """Checks that a tensor has the dtype and the device of another one, the grid's."""
    _require_float(value, name)
    if value.dtype != like.dtype:
        raise TypeError(f"{name} must be {like.dtype} like the grid, got {value.dtype}")
    if value.device != like.device:
        raise TypeError(f"{name} must be on {like.device} like the grid, got {value.device}")


def _checked_size(size: Sequence[int]) -> tuple[int, int, int]:
    if len(size) != 3 or any(isinstance(n, bool) or not isinstance(n, int) for n in size):
        raise ValueError(f"size must be three integers (X, Y, Z), got {size!r}")
    if min(size) < 1:
        raise ValueError(f"size must be at least 1 along every axis, got {tuple(size)}")
    return (size[0], size[1], size[2])


def _box_sides(side: float | Sequence[float] | Tensor, center: Tensor) -> Sequence[float | Tensor]:
    """The edge lengths along the grid's three axes: numbers, or tensors [B, 1] or [1, 1]."""
    if isinstance(side, Tensor):
        _require_like(side, "side", center)
        if side.shape not in ((), (center.shape[0],), (center.shape[0], 3)):
            raise ValueError(
                f"side must be [], [B] or [B, 3] with B = {center.shape[0]}, "
                f"got {tuple(side.shape)}"
            )
        boxes = side if side.ndim == 2 else side.reshape(-1, 1).expand(-1, 3)
        return boxes[..., None].unbind(1)
    sides = (side,) * 3 if isinstance(side, (int, float)) else tuple(side)
    if len(sides) != 3:
        raise ValueError(f"side must be one number or three, got {side!r}")
    return sides


def _flatten(grid: VoxelGrid) -> tuple[list[Tensor], tuple[int, int, int]]:
    return [grid.origin, grid.axes], grid.size


def _flatten_with_keys(
    grid: VoxelGrid,
) -> tuple[list[tuple[_pytree.KeyEntry, Any]], tuple[int, int, int]]:
    keys = _pytree.GetAttrKey("origin"), _pytree.GetAttrKey("axes")
    return [(keys[0], grid.origin), (keys[1], grid.axes)], grid.size


def _unflatten(leaves: Iterable[Any], size: Any) -> VoxelGrid:
    # Not through the constructor: the leaves of a tree need not be tensors of the grid's shapes
    # (batched under vmap, gradients, placeholders).
    grid = object.__new__(VoxelGrid)
    for name, leaf in zip(("origin", "axes"), leaves, strict=True):
        object.__setattr__(grid, name, leaf)
    object.__setattr__(grid, "size", tuple(size))
    return grid


# torch.export.register_dataclass would make the three sizes leaves too, and rebuild through the
# constructor; this is the function it stands on.
_pytree.register_pytree_node(
    VoxelGrid,
    _flatten,
    _unflatten,
    serialized_type_name="tritool.VoxelGrid",
    flatten_with_keys_fn=_flatten_with_keys,
)
