# SPDX-License-Identifier: Apache-2.0
"""Rigid and similarity alignment of batched point sets, differentiable twice and more."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tritool.ops import _check, composite
from tritool.ops._register import Function, expand_batched, register

__all__ = ["RigidAlign", "RigidAlignBackward", "RigidTransform", "rigid_align"]


class RigidTransform(NamedTuple):
    """A motion with one scale: `target = scale * rotation @ source + translation`.

    Args:
        rotation: `[..., 3, 3]`, of determinant 1.
        translation: `[..., 3]`, unit of the target.
        scale: `[...]`.
    """

    rotation: Tensor
    translation: Tensor
    scale: Tensor

    def apply(self, points: Tensor) -> Tensor:
        """Moves points.

        Args:
            points: `[..., M, 3]`; batch dimensions broadcast with the transform's.

        Returns:
            `[..., M, 3]`. NaN, with zero gradient to the point and the transform, where either has
            a NaN.

        Raises:
            ValueError: The shape does not fit.
        """
        _check.trailing("points", points, "[..., M, 3]", (None, 3))
        _check.broadcast_batch({"points": points.shape[:-2], "rotation": self.rotation.shape[:-2]})
        known = ~(self.rotation.isnan().any(-1).any(-1) | self.translation.isnan().any(-1))
        known = known & ~self.scale.isnan()
        # What is NaN goes on as 0, or it would reach a gradient as 0 * NaN.
        rotation = torch.where(known[..., None, None], self.rotation, 0)
        translation = torch.where(known[..., None], self.translation, 0)
        scale = torch.where(known, self.scale, 0)
        there = ~points.isnan().any(-1, keepdim=True)
        points = torch.where(there, points, 0)
        # Not a matmul: autocast and TF32 would round it.
        turned = (rotation[..., None, :, :] * points[..., None, :]).sum(-1)
        moved = scale[..., None, None] * turned + translation[..., None, :]
        return torch.where(known[..., None, None] & there, moved, torch.nan)


def rigid_align(
    source: Tensor,
    target: Tensor,
    weights: Tensor | None = None,
    *,
    with_scale: bool = False,
) -> RigidTransform:
    r"""The motion that lays points onto their targets with the least weighted sum of squares.

    Minimises :math:`\sum_n w_n |y_n - (s R x_n + t)|^2` over rotations :math:`R`, translations
    :math:`t` and, with `with_scale`, scales :math:`s`, else :math:`s = 1`: Kabsch, "A discussion of
    the solution for the best rotation to relate two sets of vectors" (Acta Crystallographica A34,
    1978), with Umeyama's scale (IEEE PAMI 13, 1991). Never a reflection. Batch dimensions
    broadcast; an operand that broadcasts is read in place. The gradient is exact and finite also
    where singular values are equal, as for a cube or a sphere of points.

    Args:
        source: `[..., N, 3]`, the points x to move. NaN in any coordinate: the point is absent.
        target: `[..., N, 3]`, where they should go, y. NaN likewise.
        weights: `[..., N]`, at least 0. 0: the point is absent (and its weight's gradient 0). None:
            every point counts alike.
        with_scale: Whether to look for a scale too.

    Returns:
        `RigidTransform(rotation [..., 3, 3], translation [..., 3], scale [...])`, in the widest
        dtype of the arguments and at least float32. All NaN, with zero gradient to every argument,
        where the points that are present do not determine a rotation: fewer than three, all on a
        line, source or target all in one place, or a target that is the mirror image of the source
        about no axis in particular; also where a point that is present has an infinite coordinate
        or a weight that is negative or not finite.

    Raises:
        TypeError: An argument is not a floating-point tensor.
        ValueError: Shapes or devices do not fit.

    Example:
        >>> source = torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 2, 0], [0, 0, 3]])
        >>> quarter_turn = torch.tensor([[0.0, -1, 0], [1, 0, 0], [0, 0, 1]])
        >>> target = 2 * source @ quarter_turn.T + torch.tensor([5.0, 0, 0])
        >>> found = rigid_align(source, target, with_scale=True)
        >>> round(float(found.scale), 4)
        2.0
        >>> torch.allclose(found.apply(source), target, atol=1e-5)
        True
    """
    tensors = {"source": source, "target": target}
    if weights is not None:
        tensors["weights"] = weights
    _check.tensors(tensors)
    _check.trailing("source", source, "[..., N, 3]", (None, 3))
    count = source.shape[-2]
    _check.trailing("target", target, "[..., N, 3]", (count, 3), of="source")
    if weights is not None:
        _check.trailing("weights", weights, "[..., N]", (count,), of="source")

    dtype = _check.geometry_dtype(tensors.values())
    batch = _check.broadcast_batch(
        {"source": source.shape[:-2], "target": target.shape[:-2]}
        | ({"weights": weights.shape[:-1]} if weights is not None else {})
    )
    source = source.to(dtype).expand(*batch, count, 3)
    target = target.to(dtype).expand(*batch, count, 3)
    if weights is not None:
        weights = weights.to(dtype).expand(*batch, count)
    return RigidTransform(*RigidAlign.apply(source, target, weights, with_scale))


class RigidAlign(Function):
    """The op behind `rigid_align`.

    `RigidAlign.apply(source, target, weights, with_scale)`: source and target `[batch, N, 3]` and
    weights `[batch, N]` (or None), all in the full batch and of one dtype, float32 or float64.
    Returns rotation `[batch, 3, 3]`, translation `[batch, 3]` and scale `[batch]`.
    """

    @staticmethod
    def forward(
        source: Tensor, target: Tensor, weights: Tensor | None, with_scale: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Calls the kernel."""
        return torch.ops.tritool.rigid_align.default(  # type: ignore[no-any-return]
            source, target, weights, with_scale
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Keeps the inputs; the backward solves again rather than store the factors."""
        source, target, weights, ctx.with_scale = inputs
        ctx.save_for_backward(source, target, weights)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """The gradients that were asked for."""
        grad_rotation, grad_translation, grad_scale = grads
        if not ctx.with_scale:  # a constant
            grad_scale = None
        if grad_rotation is None and grad_translation is None and grad_scale is None:
            return None, None, None, None
        wanted = ctx.needs_input_grad
        results = RigidAlignBackward.apply(
            grad_rotation, grad_translation, grad_scale, *ctx.saved_tensors, ctx.with_scale,
            wanted[0], wanted[1], wanted[2],
        )  # fmt: skip
        return *(g if want else None for g, want in zip(results, wanted, strict=False)), None


class RigidAlignBackward(Function):
    """The vector-Jacobian product of `RigidAlign`, differentiable in plain PyTorch."""

    @staticmethod
    def forward(
        grad_rotation: Tensor | None,
        grad_translation: Tensor | None,
        grad_scale: Tensor | None,
        source: Tensor,
        target: Tensor,
        weights: Tensor | None,
        with_scale: bool,
        want_source: bool,
        want_target: bool,
        want_weights: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Calls the kernel; a gradient that is not wanted is an empty tensor."""
        return torch.ops.tritool.rigid_align_backward.default(  # type: ignore[no-any-return]
            grad_rotation, grad_translation, grad_scale, source, target, weights, with_scale,
            want_source, want_target, want_weights,
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Keeps the inputs."""
        ctx.save_for_backward(*inputs[:6])
        ctx.flags = inputs[6:]

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient of the gradients, by differentiating the composite twice."""
        with_scale, *wanted = ctx.flags
        *grads, source, target, weights = ctx.saved_tensors
        results = composite.rigid_align_double_backward(
            cotangents, grads, source, target, weights, with_scale, wanted
        )
        return *results, None, None, None, None


def _fake(
    source: Tensor, target: Tensor, weights: Tensor | None, with_scale: bool
) -> tuple[Tensor, Tensor, Tensor]:
    batch = source.shape[:-2]
    return source.new_empty(*batch, 3, 3), source.new_empty(*batch, 3), source.new_empty(batch)


def _fake_backward(
    grad_rotation: Tensor | None, grad_translation: Tensor | None, grad_scale: Tensor | None,
    source: Tensor, target: Tensor, weights: Tensor | None, with_scale: bool,
    want_source: bool, want_target: bool, want_weights: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    want_weights = want_weights and weights is not None
    return (
        source.new_empty(source.shape if want_source else (0,)),
        source.new_empty(source.shape if want_target else (0,)),
        source.new_empty(source.shape[:-1] if want_weights else (0,)),
    )


def _vmap(
    call: Callable[..., Any], info: Any, in_dims: tuple[int | None, ...], *args: Any
) -> tuple[tuple[Tensor, ...], tuple[int, int, int]]:
    return call(*expand_batched(info.batch_size, in_dims, args, full=(0, 1, 2))), (0, 0, 0)


def _vmap_backward(
    call: Callable[..., Any], info: Any, in_dims: tuple[int | None, ...], *args: Any
) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
    grads = call(*expand_batched(info.batch_size, in_dims, args, full=tuple(range(6))))
    present = (True, True, args[5] is not None)
    return grads, tuple(0 if w and p else None for w, p in zip(args[7:], present, strict=True))


register(
    RigidAlign,
    "rigid_align(Tensor source, Tensor target, Tensor? weights, bool with_scale) "
    "-> (Tensor rotation, Tensor translation, Tensor scale)",
    fake=_fake,
    composite=composite.rigid_align,
    vmap=_vmap,
)
register(
    RigidAlignBackward,
    "rigid_align_backward(Tensor? grad_rotation, Tensor? grad_translation, Tensor? grad_scale, "
    "Tensor source, Tensor target, Tensor? weights, bool with_scale, bool want_source, "
    "bool want_target, bool want_weights) -> (Tensor, Tensor, Tensor)",
    fake=_fake_backward,
    composite=composite.rigid_align_backward,
    vmap=_vmap_backward,
)
