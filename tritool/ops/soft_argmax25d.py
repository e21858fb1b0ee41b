# SPDX-License-Identifier: Apache-2.0
"""Soft-argmax of heat maps, and the mean of a second map under the same distribution."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tritool.ops import _check, composite
from tritool.ops._register import Function, expand_batched, register

__all__ = ["SoftArgmax25d", "SoftArgmax25dBackward", "soft_argmax25d"]


def soft_argmax25d(
    heatmaps: Tensor, depth_maps: Tensor, *, inverse_temperature: float = 1.0
) -> Tensor:
    r"""Mean position :math:`\sum_r r \, p_r` and mean depth :math:`\sum_r D_r \, p_r` of maps.

    :math:`p = \mathrm{softmax}(\alpha H)`. The latent 2.5D pose of Iqbal et al., "Hand Pose
    Estimation via Latent 2.5D Heatmap Regression" (ECCV 2018): a network gives each joint a heat
    map H and a map D of its depth relative to the root. One pass over both maps, each read in
    place: the halves `head[:, :J]` and `head[:, J:]` of a head of 2 J channels cost no copy,
    channels-first or channels-last.

    Args:
        heatmaps: `[..., H, W]` logits; -inf masks a pixel.
        depth_maps: `[..., H, W]`, in any unit; the batches of the two broadcast. What it holds
            where p is 0 in the dtype of the result does not count, whatever it is. Where the
            dtypes differ, both maps are converted to the wider one; float16 and bfloat16 are read
            as such and summed in float32.
        inverse_temperature: The factor :math:`\alpha` of the logits, above 0.

    Returns:
        `[..., 3]`: pixels (x, y), the centre of the first pixel being (0, 0), and the depth in the
        unit of `depth_maps`; float32, or float64 for float64 maps. All NaN, with zero gradient, for
        a heat map that holds NaN or +inf or nothing but -inf. The depth alone is NaN, with zero
        gradient, where `depth_maps` is NaN or infinite and p is not 0.

    Raises:
        TypeError: An argument is not a floating-point tensor.
        ValueError: The maps have fewer than two dimensions, different sizes or devices, or batches
            that do not broadcast, or `inverse_temperature` is not from 1e-30 to 1e30.

    Example:
        >>> heatmap, depth_map = torch.zeros(2, 48, 64)
        >>> heatmap[20, 30] = 1
        >>> depth_map[20, 30] = 256
        >>> soft_argmax25d(heatmap, depth_map, inverse_temperature=100.0)
        tensor([ 30.,  20., 256.])
    """
    maps = {"heatmaps": heatmaps, "depth_maps": depth_maps}
    _check.tensors(maps)
    for name, tensor in maps.items():
        _check.trailing(name, tensor, "[..., H, W]", (None, None))
    size = tuple(heatmaps.shape[-2:])
    if tuple(depth_maps.shape[-2:]) != size:
        raise ValueError(
            f"depth_maps must be [..., H, W] with H, W = {size} as in heatmaps, "
            f"got {tuple(depth_maps.shape)}"
        )
    alpha = _check.positive_number("inverse_temperature", inverse_temperature)
    batch = _check.broadcast_batch({name: tensor.shape[:-2] for name, tensor in maps.items()})
    dtype = torch.promote_types(heatmaps.dtype, depth_maps.dtype)
    full = [tensor.to(dtype) for tensor in maps.values()]
    if heatmaps.shape != depth_maps.shape:
        full = [tensor.expand(*batch, *size) for tensor in full]
    position: Tensor = SoftArgmax25d.apply(*full, alpha)[0]
    return position


class SoftArgmax25d(Function):
    """The op behind `soft_argmax25d`.

    `SoftArgmax25d.apply(heatmaps, depth_maps, inverse_temperature)`: both maps `[batch, H, W]`, of
    one dtype. Returns the position `[batch, 3]` and, not differentiable, the pair (level, sum)
    `[batch, 2]` that the backward needs.
    """

    @staticmethod
    def forward(
        heatmaps: Tensor, depth_maps: Tensor, inverse_temperature: float
    ) -> tuple[Tensor, Tensor]:
        """Calls the kernel."""
        return torch.ops.tritool.soft_argmax25d.default(  # type: ignore[no-any-return]
            heatmaps, depth_maps, inverse_temperature
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Keeps the maps and, five numbers a map, the results."""
        heatmaps, depth_maps, ctx.inverse_temperature = inputs
        position, partition = output
        ctx.save_for_backward(heatmaps, depth_maps, position, partition)
        ctx.mark_non_differentiable(partition)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """The gradients to both maps."""
        grad, _ = grads
        if grad is None:
            return None, None, None
        to_maps = SoftArgmax25dBackward.apply(grad, *ctx.saved_tensors, ctx.inverse_temperature)
        return *to_maps, None


class SoftArgmax25dBackward(Function):
    """The vector-Jacobian product of `SoftArgmax25d`, differentiable in plain PyTorch."""

    @staticmethod
    def forward(
        grad: Tensor,
        heatmaps: Tensor,
        depth_maps: Tensor,
        position: Tensor,
        partition: Tensor,
        inverse_temperature: float,
    ) -> tuple[Tensor, Tensor]:
        """Calls the kernel."""
        return torch.ops.tritool.soft_argmax25d_backward.default(  # type: ignore[no-any-return]
            grad, heatmaps, depth_maps, position, partition, inverse_temperature
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Keeps the incoming gradient and the maps, of which the other inputs are functions."""
        grad, heatmaps, depth_maps, _, _, ctx.inverse_temperature = inputs
        ctx.save_for_backward(grad, heatmaps, depth_maps)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients to the incoming one and, in full, to the maps; none through the results."""
        grad, heatmaps, depth_maps = ctx.saved_tensors
        results = composite.soft_argmax25d_double_backward(
            cotangents, grad, heatmaps, depth_maps, ctx.inverse_temperature
        )
        return *results, None, None, None


def _fake(
    heatmaps: Tensor, depth_maps: Tensor, inverse_temperature: float
) -> tuple[Tensor, Tensor]:
    batch = heatmaps.shape[:-2]
    dtype = composite.accumulator_dtype(heatmaps)
    position = heatmaps.new_empty((*batch, 3), dtype=dtype)
    return position, heatmaps.new_empty((*batch, 2), dtype=dtype)


def _fake_backward(
    grad: Tensor, heatmaps: Tensor, depth_maps: Tensor, *args: Any
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(heatmaps), torch.empty_like(depth_maps)


def _vmap(
    call: Callable[..., Any], info: Any, in_dims: tuple[int | None, ...], *args: Any
) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
    # Both ops want the whole batch in each of their tensors.
    full = tuple(range(len(args)))
    return call(*expand_batched(info.batch_size, in_dims, args, full=full)), (0, 0)


register(
    SoftArgmax25d,
    "soft_argmax25d(Tensor heatmaps, Tensor depth_maps, float inverse_temperature) "
    "-> (Tensor, Tensor)",
    fake=_fake,
    composite=composite.soft_argmax25d,
    vmap=_vmap,
)
register(
    SoftArgmax25dBackward,
    "soft_argmax25d_backward(Tensor grad, Tensor heatmaps, Tensor depth_maps, Tensor position, "
    "Tensor partition, float inverse_temperature) -> (Tensor, Tensor)",
    fake=_fake_backward,
    composite=composite.soft_argmax25d_backward,
    vmap=_vmap,
)
