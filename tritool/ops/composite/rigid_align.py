# SPDX-License-Identifier: Apache-2.0
"""Rigid alignment in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tritool.ops.composite._solve3 import solve3
from tritool.ops.composite._vjp import vjp

__all__ = ["rigid_align", "rigid_align_backward", "rigid_align_double_backward"]


def rigid_align(
    source: Tensor, target: Tensor, weights: Tensor | None, with_scale: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """See `tritool.ops.rigid_align`; the arguments are those of `RigidAlign.apply`."""
    start = _rotation_by_svd(source, target, weights)
    return _transform(source, target, weights, with_scale, start)


def rigid_align_backward(
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
    """The gradients that are wanted, and empty tensors for the others."""
    start = _rotation_by_svd(source, target, weights)
    given = [grad_rotation, grad_translation, grad_scale]
    wanted = [want_source, want_target, want_weights and weights is not None]
    grads = _gradient(given, source, target, weights, with_scale, start, wanted)
    results = [grads.pop(0) if want else source.new_empty(0) for want in wanted]
    return results[0], results[1], results[2]


def rigid_align_double_backward(
    cotangents: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    source: Tensor,
    target: Tensor,
    weights: Tensor | None,
    with_scale: bool,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """The gradients of <cotangents, gradients of RigidAlign> to grads and the op's arguments."""
    start = torch.ops.tritool.rigid_align.default(
        *(x if x is None else x.detach() for x in (source, target, weights)), with_scale
    )[0]
    wanted = [*wanted[:2], wanted[2] and weights is not None]
    arguments = [*grads, source, target, weights]

    def gradient(*inputs: Tensor) -> tuple[Tensor, ...]:
        left = list(inputs)
        values: list[Any] = [left.pop(0) if x is not None else None for x in arguments]
        moved, to, given = values[3:]
        return tuple(_gradient(values[:3], moved, to, given, with_scale, start, wanted))

    _, pull = vjp(gradient, *(x for x in arguments if x is not None))
    results = list(pull(tuple(c for c, want in zip(cotangents, wanted, strict=True) if want)))
    return tuple(results.pop(0) if x is not None else None for x in arguments)


def _gradient(
    grads: Sequence[Tensor | None], source: Tensor, target: Tensor, weights: Tensor | None,
    with_scale: bool, start: Tensor, wanted: Sequence[bool],
) -> list[Tensor]:  # fmt: skip
    """The wanted gradients of <grads, transform>, as functions to be differentiated again."""
    inputs: list[Any] = [source, target, weights]
    chosen = [i for i, want in enumerate(wanted) if want]

    def forward(*changed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        all_inputs = list(inputs)
        for i, tensor in zip(chosen, changed, strict=True):
            all_inputs[i] = tensor
        return _transform(all_inputs[0], all_inputs[1], all_inputs[2], with_scale, start)

    outputs, pull = vjp(forward, *(inputs[i] for i in chosen))
    invalid = start.isnan().any(-1).any(-1)

    def clean(grad: Tensor | None, output: Tensor) -> Tensor:
        # An incoming NaN must not survive as 0 * NaN where there is no transform.
        if grad is None:
            return torch.zeros_like(output)
        return torch.where(invalid[(...,) + (None,) * (grad.dim() - invalid.dim())], 0, grad)

    return list(pull(tuple(clean(g, o) for g, o in zip(grads, outputs, strict=True))))


class _Moments(NamedTuple):
    """Of the points that are present, in float64; weights are relative to the largest."""

    source_mean: Tensor
    target_mean: Tensor
    moment: Tensor  # [..., 3, 3], sum w (y - my) (x - mx)^T
    source_spread: Tensor  # sum w |x - mx|^2
    target_spread: Tensor


def _moments(
    source: Tensor, target: Tensor, weights: Tensor | None, valid: Tensor | None
) -> _Moments:
    """The moments; where `valid` is false those of no points at all."""
    present = ~(source.isnan() | target.isnan()).any(-1)
    if weights is not None:
        present = present & (weights != 0)
    if valid is not None:
        present = present & valid[..., None]
    source = torch.where(present[..., None], source, 0).double()
    target = torch.where(present[..., None], target, 0).double()
    if weights is None:
        weights = present.double()
    else:
        weights = torch.where(present, weights, 0).double()
        # The transform does not depend on the weights' scale; the rounding of products would.
        scale = weights.detach().sum(-1, keepdim=True)
        weights = weights / torch.where((scale > 0) & scale.isfinite(), scale, 1)
        weights = torch.where(weights < 0, torch.nan, weights)
    total = weights.sum(-1)
    share = (weights / torch.where(total == 0, 1, total)[..., None])[..., None]
    source_mean, target_mean = (share * source).sum(-2), (share * target).sum(-2)
    x, y = source - source_mean[..., None, :], target - target_mean[..., None, :]
    weighted = weights[..., None] * y
    return _Moments(
        source_mean,
        target_mean,
        weighted.mT @ x,
        (weights[..., None] * x.square()).sum((-2, -1)),
        (weighted * y).sum((-2, -1)),
    )


def _rotation_by_svd(source: Tensor, target: Tensor, weights: Tensor | None) -> Tensor:
    """The rotation [..., 3, 3], without gradient, NaN where it is not determined."""
    with torch.no_grad():
        moments = _moments(source, target, weights, None)
        spread = (moments.source_spread * moments.target_spread).sqrt()
        finite = moments.moment.isfinite().all(-1).all(-1) & spread.isfinite()
        u, s, vt = torch.linalg.svd(torch.where(finite[..., None, None], moments.moment, 0))
        sign = torch.linalg.det(u @ vt).sign()
        flip = torch.stack([torch.ones_like(sign), torch.ones_like(sign), sign], -1)
        rotation = (u * flip[..., None, :]) @ vt
        tau = 1e-6 if source.dtype == torch.float32 else 1e-13
        valid = (s[..., 1] + sign * s[..., 2] > tau * s[..., 0]) & (s[..., 0] > tau * spread)
        return torch.where((valid & finite)[..., None, None], rotation, torch.nan)


def _transform(
    source: Tensor, target: Tensor, weights: Tensor | None, with_scale: bool, start: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The transform by Newton steps from the rotation `start`, from which it has its derivatives.

    The rotation makes R^T M symmetric. With S its symmetric part and [c]x = R^T M - M^T R a step
    is R (Cayley transform of (tr(S) I - S)^-1 c), which stays a rotation. After k steps from the
    solution, held constant, the derivatives are right up to order 2^k - 1: three steps serve seven.
    Nothing here knows of singular vectors, so that equal singular values are no special case.
    """
    valid = ~start.isnan().any(-1).any(-1)
    moments = _moments(source, target, weights, valid)
    eye = torch.eye(3, dtype=torch.float64, device=source.device)
    rotation = torch.where(valid[..., None, None], start.detach().double(), eye)
    for _ in range(2):  # to a rotation in float64, from one in float32
        rotation = rotation @ (3 * eye - rotation.mT @ rotation) / 2
    moment = torch.where(valid[..., None, None], moments.moment, eye)
    for _ in range(3):
        polar = rotation.mT @ moment
        symmetric = (polar + polar.mT) / 2
        trace = symmetric.diagonal(dim1=-2, dim2=-1).sum(-1)
        step = solve3(trace[..., None, None] * eye - symmetric, _axis(polar - polar.mT))
        # I + ([b]x + [b]x^2 / 2) / (1 + |b|^2 / 4)
        twist = _twist(step)
        norm = 1 + step.square().sum(-1)[..., None, None] / 4
        rotation = rotation + rotation @ (twist + twist @ twist / 2) / norm
    scale = torch.ones_like(moments.source_spread)
    if with_scale:
        spread = torch.where(valid, moments.source_spread, 1)
        scale = (rotation * moment).sum((-2, -1)) / spread
    turned = (rotation @ moments.source_mean[..., None]).squeeze(-1)
    translation = moments.target_mean - scale[..., None] * turned
    dtype = source.dtype
    return (
        torch.where(valid[..., None, None], rotation.to(dtype), torch.nan),
        torch.where(valid[..., None], translation.to(dtype), torch.nan),
        torch.where(valid, scale.to(dtype), torch.nan),
    )


def _axis(skew: Tensor) -> Tensor:
    """The vector b of [b]x."""
    return torch.stack([skew[..., 2, 1], skew[..., 0, 2], skew[..., 1, 0]], -1)


def _twist(b: Tensor) -> Tensor:
    """The matrix [b]x."""
    x, y, z = b.unbind(-1)
    zero = torch.zeros_like(x)
    entries = torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], -1)
    return entries.reshape(*entries.shape[:-1], 3, 3)
