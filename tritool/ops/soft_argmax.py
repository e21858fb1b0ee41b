# SPDX-License-Identifier: Apache-2.0
"""Soft-argmax of heat maps and volumes, and the moments of the distribution behind it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tritool.grid import VoxelGrid
from tritool.ops import _check, composite
from tritool.ops._register import Function, expand_batched, register

__all__ = [
    "Moments",
    "SoftArgmax2d",
    "SoftArgmax3d",
    "SoftmaxMoments",
    "SoftmaxMomentsBackward",
    "soft_argmax2d",
    "soft_argmax3d",
    "softmax_moments2d",
    "softmax_moments3d",
]


class Moments(NamedTuple):
    """Moments of the softmax distribution over a map."""

    mean: Tensor
    """`[..., D]`, the soft-argmax."""
    covariance: Tensor
    """`[..., D, D]`, in the axes and squared units of the mean."""
    log_partition: Tensor
    """`[...]`, log sum exp(inverse_temperature * logits); a scaled logit minus it is log p."""


def soft_argmax2d(heatmaps: Tensor, *, inverse_temperature: float = 1.0) -> Tensor:
    r"""The mean position :math:`\sum_r r \, \mathrm{softmax}(\alpha H)(r)` of heat maps.

    Equations (1)-(2) of Iskakov et al., "Learnable Triangulation of Human Pose" (ICCV 2019), which
    uses `inverse_temperature=100`. One pass over the maps; channels-first and channels-last
    maps are read in place.

    Args:
        heatmaps: `[..., H, W]` logits; -inf masks a pixel. float16 and bfloat16 are read as such
            and summed in float32.
        inverse_temperature: The factor :math:`\alpha` of the logits, above 0.

    Returns:
        `[..., 2]`, pixels (x, y), the centre of the first pixel being (0, 0); float32, or float64
        for float64 maps. NaN, with zero gradient, for a map that holds NaN or +inf or nothing but
        -inf.

    Raises:
        TypeError: `heatmaps` is not a floating-point tensor.
        ValueError: It has fewer than two dimensions, or `inverse_temperature` is not from
            1e-30 to 1e30.

    Example:
        >>> heatmap = torch.zeros(48, 64)
        >>> heatmap[20, 30] = 1
        >>> soft_argmax2d(heatmap, inverse_temperature=100.0)
        tensor([30., 20.])
    """
    return _moments(heatmaps, "heatmaps", 2, inverse_temperature, covariance=False).mean


def soft_argmax3d(
    volumes: Tensor, *, inverse_temperature: float = 1.0, grid: VoxelGrid | None = None
) -> Tensor:
    r"""The mean position of volumes, in voxel indices or in the world.

    Equations (13)-(14) of Iskakov et al. (ICCV 2019). No volume of coordinates is ever made: the
    mean is taken in index coordinates and mapped by the affine grid.

    Args:
        volumes: `[..., X, Y, Z]` logits; -inf masks a voxel. float16 and bfloat16 are read as such
            and summed in float32.
        inverse_temperature: The factor of the logits, above 0.
        grid: Where the voxels lie; its batch is the first dimension of `volumes`, or 1.

    Returns:
        `[..., 3]`, voxel index (i, j, k), or world coordinates in the units of `grid`. NaN, with
        zero gradient, for a volume that holds NaN or +inf or nothing but -inf.

    Raises:
        TypeError: `volumes` is not a floating-point tensor.
        ValueError: It has fewer than three dimensions, does not fit `grid`, or
            `inverse_temperature` is not from 1e-30 to 1e30.
    """
    moments = _moments(volumes, "volumes", 3, inverse_temperature, covariance=False)
    return moments.mean if grid is None else _to_world(moments, volumes, grid).mean


def softmax_moments2d(logits: Tensor, *, inverse_temperature: float = 1.0) -> Moments:
    """Mean, covariance and log-partition of the softmax distribution over heat maps.

    Args:
        logits: `[..., H, W]`, as for `soft_argmax2d`.
        inverse_temperature: The factor of the logits, above 0.

    Returns:
        `Moments(mean [..., 2], covariance [..., 2, 2], log_partition [...])` in (x, y), pixels and
        pixels squared.

    Raises:
        TypeError: `logits` is not a floating-point tensor.
        ValueError: As for `soft_argmax2d`.
    """
    return _moments(logits, "logits", 2, inverse_temperature, covariance=True)


def softmax_moments3d(
    logits: Tensor, *, inverse_temperature: float = 1.0, grid: VoxelGrid | None = None
) -> Moments:
    """Mean, covariance and log-partition of the softmax distribution over volumes.

    Args:
        logits: `[..., X, Y, Z]`, as for `soft_argmax3d`.
        inverse_temperature: The factor of the logits, above 0.
        grid: Where the voxels lie; its batch is the first dimension of `logits`, or 1.

    Returns:
        `Moments(mean [..., 3], covariance [..., 3, 3], log_partition [...])` in voxel indices, or
        in world units.

    Raises:
        TypeError: `logits` is not a floating-point tensor.
        ValueError: As for `soft_argmax3d`.
    """
    moments = _moments(logits, "logits", 3, inverse_temperature, covariance=True)
    return moments if grid is None else _to_world(moments, logits, grid)


def _moments(
    logits: Tensor, name: str, dims: int, inverse_temperature: float, *, covariance: bool
) -> Moments:
    _check.tensors({name: logits})
    pattern = "[..., H, W]" if dims == 2 else "[..., X, Y, Z]"
    _check.trailing(name, logits, pattern, (None,) * dims)
    alpha = _check.positive_number("inverse_temperature", inverse_temperature)
    mean, second, log_partition, _ = SoftmaxMoments.apply(logits, dims, alpha, covariance)
    return Moments(mean, second, log_partition)


def _to_world(moments: Moments, volumes: Tensor, grid: VoxelGrid) -> Moments:
    size = tuple(volumes.shape[-3:])
    if size != grid.size:
        raise ValueError(f"grid must have the size of the volumes, {size}, got {grid.size}")
    batch = volumes.shape[0] if volumes.dim() > 3 else 1
    if grid.batch not in (1, batch):
        raise ValueError(
            f"grid must have batch 1 or that of the volumes, {batch}, got {grid.batch}"
        )
    dtype = torch.promote_types(moments.mean.dtype, grid.dtype)
    grid = grid.to(dtype)
    mean, covariance, log_partition = moments

    def to_world(index: Tensor) -> Tensor:
        return grid.to_world(index if volumes.dim() > 3 else index[None]).reshape(mean.shape)

    if covariance.dim() <= 1 and not (grid.origin.requires_grad or grid.axes.requires_grad):
        return Moments(to_world(mean.to(dtype)), covariance, log_partition)  # NaN stays NaN
    # A map without a mean goes through as 0, or its NaN would reach the gradient of the grid as 0 *
    # NaN.
    valid = ~mean.isnan().any(-1, keepdim=True)
    world = torch.where(valid, to_world(torch.where(valid, mean, 0).to(dtype)), torch.nan)
    if covariance.dim() > 1:
        axes = grid.axes.reshape(-1, *(1,) * max(volumes.dim() - 4, 0), 3, 3)
        spread = torch.where(valid[..., None], covariance, 0).to(dtype)
        # axes^T C axes, without a matmul: autocast and TF32 would round it.
        spread = (spread[..., :, :, None] * axes[..., None, :, :]).sum(-2)
        spread = (axes[..., :, :, None] * spread[..., :, None, :]).sum(-3)
        spread = spread.reshape(covariance.shape)
        covariance = torch.where(valid[..., None], spread, torch.nan)
    return Moments(world, covariance, log_partition)


class SoftmaxMoments(Function):
    """The op behind the functions of this module.

    `SoftmaxMoments.apply(logits, dims, inverse_temperature, with_covariance)`: logits `[batch, (X,)
    Y, Z]` with `dims` 2 or 3. Returns mean `[batch, dims]`, covariance `[batch, dims, dims]` (empty
    `[0]` if not asked for), log-partition `[batch]` and, not differentiable, the pair (level, sum)
    `[batch, 2]` that the backward needs.
    """

    @staticmethod
    def forward(
        logits: Tensor, dims: int, inverse_temperature: float, with_covariance: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Calls the kernel."""
        return torch.ops.tritool.softmax_moments.default(  # type: ignore[no-any-return]
            logits, dims, inverse_temperature, with_covariance
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Keeps the logits and, a few numbers a map, the results."""
        logits, ctx.dims, ctx.inverse_temperature, ctx.with_covariance = inputs
        mean, covariance, _, partition = output
        ctx.save_for_backward(logits, mean, covariance, partition)
        ctx.mark_non_differentiable(partition)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """The gradient to the logits."""
        grad_mean, grad_covariance, grad_log_partition, _ = grads
        if not ctx.with_covariance:  # an empty tensor, and so may its gradient be
            grad_covariance = None
        if grad_mean is None and grad_covariance is None and grad_log_partition is None:
            return None, None, None, None
        grad_logits = SoftmaxMomentsBackward.apply(
            grad_mean, grad_covariance, grad_log_partition, *ctx.saved_tensors,
            ctx.dims, ctx.inverse_temperature,
        )  # fmt: skip
        return grad_logits, None, None, None


class SoftmaxMomentsBackward(Function):
    """The vector-Jacobian product of `SoftmaxMoments`, differentiable in plain PyTorch."""

    @staticmethod
    def forward(
        grad_mean: Tensor | None,
        grad_covariance: Tensor | None,
        grad_log_partition: Tensor | None,
        logits: Tensor,
        mean: Tensor,
        covariance: Tensor,
        partition: Tensor,
        dims: int,
        inverse_temperature: float,
    ) -> Tensor:
        """Calls the kernel."""
        return torch.ops.tritool.softmax_moments_backward.default(  # type: ignore[no-any-return]
            grad_mean, grad_covariance, grad_log_partition,
            logits, mean, covariance, partition, dims, inverse_temperature,
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keeps the incoming gradients and the logits, of which the other inputs are functions."""
        *grads, logits, _, _, _, ctx.dims, ctx.inverse_temperature = inputs
        ctx.save_for_backward(*grads, logits)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients to the incoming ones and, in full, to the logits; none through the mean."""
        *grads, logits = ctx.saved_tensors
        results = composite.softmax_moments_double_backward(
            cotangent, grads, logits, ctx.dims, ctx.inverse_temperature
        )
        return *results, None, None, None, None, None


class SoftArgmax2d(SoftmaxMoments):
    """`SoftArgmax2d.apply(heatmaps, inverse_temperature)`, see `soft_argmax2d`."""

    @classmethod
    def apply(cls, heatmaps: Tensor, inverse_temperature: float = 1.0) -> Tensor:
        """The positions (x, y)."""
        mean: Tensor = SoftmaxMoments.apply(heatmaps, 2, inverse_temperature, False)[0]
        return mean


class SoftArgmax3d(SoftmaxMoments):
    """`SoftArgmax3d.apply(volumes, inverse_temperature)`, see `soft_argmax3d`."""

    @classmethod
    def apply(cls, volumes: Tensor, inverse_temperature: float = 1.0) -> Tensor:
        """The positions (i, j, k)."""
        mean: Tensor = SoftmaxMoments.apply(volumes, 3, inverse_temperature, False)[0]
        return mean


def _fake(
    logits: Tensor, dims: int, inverse_temperature: float, with_covariance: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch = logits.shape[: logits.dim() - dims]
    dtype = composite.accumulator_dtype(logits)
    return (
        logits.new_empty((*batch, dims), dtype=dtype),
        logits.new_empty((*batch, dims, dims) if with_covariance else (0,), dtype=dtype),
        logits.new_empty(batch, dtype=dtype),
        logits.new_empty((*batch, 2), dtype=dtype),
    )


def _fake_backward(
    grad_mean: Tensor | None, grad_covariance: Tensor | None, grad_log_partition: Tensor | None,
    logits: Tensor, *args: Any,
) -> Tensor:  # fmt: skip
    return torch.empty_like(logits)


def _vmap(
    call: Callable[..., Any], info: Any, in_dims: tuple[int | None, ...], *args: Any
) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
    outputs = call(*expand_batched(info.batch_size, in_dims, args, full=(0,)))
    return outputs, (0, 0 if args[3] else None, 0, 0)


def _vmap_backward(
    call: Callable[..., Any], info: Any, in_dims: tuple[int | None, ...], *args: Any
) -> tuple[Tensor, int]:
    return call(*expand_batched(info.batch_size, in_dims, args, full=tuple(range(7)))), 0


register(
    SoftmaxMoments,
    "softmax_moments(Tensor logits, int dims, float inverse_temperature, bool with_covariance) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    fake=_fake,
    composite=composite.softmax_moments,
    vmap=_vmap,
)
register(
    SoftmaxMomentsBackward,
    "softmax_moments_backward(Tensor? grad_mean, Tensor? grad_covariance, "
    "Tensor? grad_log_partition, Tensor logits, Tensor mean, Tensor covariance, "
    "Tensor partition, int dims, float inverse_temperature) -> Tensor",
    fake=_fake_backward,
    composite=composite.softmax_moments_backward,
    vmap=_vmap_backward,
)
