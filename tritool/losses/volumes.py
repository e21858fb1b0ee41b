# SPDX-License-Identifier: Apache-2.0
"""Losses of volumetric heat maps: how likely the true voxel is, and that beside the position."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tritool.grid import VoxelGrid
from tritool.losses._mean import joint_weights, weighted_mean
from tritool.losses.joints import l1
from tritool.ops import SoftmaxMoments, _check, softmax_moments3d

__all__ = ["volumetric_loss", "volumetric_nll"]


def volumetric_nll(
    volumes: Tensor,
    grid: VoxelGrid,
    target: Tensor,
    *,
    inverse_temperature: float = 1.0,
    valid: Tensor | None = None,
) -> Tensor:
    r"""The negative log-likelihood of the voxels that hold the true joints.

    The second term of equation (16) of Iskakov et al. (ICCV 2019), without its factor
    :math:`\beta`: :math:`-\log p(r^*)` with :math:`p = \mathrm{softmax}(\alpha V)` over the voxels
    and :math:`r^*` the voxel whose centre is nearest, along the grid's axes, to the true joint. It
    is the log-partition minus one logit, so no volume of probabilities and none of coordinates is
    made, and it stays exact where the probability underflows.

    Args:
        volumes: `[..., J, X, Y, Z]` logits; float16 and bfloat16 are read as such.
        grid: Where the voxels lie; its batch is the first dimension of `volumes`, or 1.
        target: `[..., J, 3]`, world units of `grid`. A joint that is NaN or outside of the grid
            does not count, and neither does a volume without a softmax (NaN or +inf in it, or
            nothing but -inf).
        inverse_temperature: The factor :math:`\alpha` of the logits, above 0.
        valid: `[..., J]` or what broadcasts to it; boolean, or weights of at least 0.

    Returns:
        `[]`, nats, float32 or float64: the mean over the joints that count, weighted by `valid`. 0,
        with zero gradient, if none does; infinite if a true voxel is masked by -inf; NaN, with zero
        gradient, if the weight of a joint that counts is negative or not finite.

    Raises:
        TypeError: An argument is not a floating-point tensor.
        ValueError: Shapes or devices do not fit, or `inverse_temperature` is not from 1e-30 to
            1e30.

    Example:
        >>> grid = VoxelGrid.cube(torch.zeros(1, 3), side=2500.0, size=16)
        >>> nll = volumetric_nll(torch.zeros(1, 17, 16, 16, 16), grid, torch.zeros(1, 17, 3))
        >>> torch.allclose(nll, torch.tensor(16.0**3).log())  # nothing is known
        True
    """
    _check_volumes(volumes, grid, target)
    alpha = _check.positive_number("inverse_temperature", inverse_temperature)
    log_partition = SoftmaxMoments.apply(volumes, 3, alpha, False)[2]
    return _nll(volumes, log_partition, grid, target, alpha, valid)


def volumetric_loss(
    volumes: Tensor,
    grid: VoxelGrid,
    target: Tensor,
    *,
    beta: float = 0.01,
    inverse_temperature: float = 1.0,
    valid: Tensor | None = None,
) -> Tensor:
    r"""Absolute error of the soft-argmax plus :math:`\beta` times `volumetric_nll`.

    Equation (16) of Iskakov et al. (ICCV 2019), as a mean over joints and, for the absolute error,
    coordinates, as in the official code. The same as `l1(soft_argmax3d(volumes, grid=grid), target)
    + beta * volumetric_nll(volumes, grid, target)`, in one pass over the volumes. The paper's
    `beta` of 0.01 belongs to a grid in **centimetres**. For millimetres, `beta=0.1` keeps the
    balance, and the loss is 10 times as large.

    Args:
        volumes: `[..., J, X, Y, Z]` logits; float16 and bfloat16 are read as such.
        grid: Where the voxels lie; its batch is the first dimension of `volumes`, or 1.
        target: `[..., J, 3]`, world units of `grid`. Which joints count: see `volumetric_nll`. A
            joint outside of the grid still counts in the absolute error.
        beta: At least 0; 0 leaves the absolute error.
        inverse_temperature: The factor of the logits, above 0.
        valid: `[..., J]` or what broadcasts to it; boolean, or weights of at least 0.

    Returns:
        `[]`, unit of `grid`; 0, infinite and NaN as for `volumetric_nll`.

    Raises:
        TypeError: An argument is not a floating-point tensor.
        ValueError: As for `volumetric_nll`, or `beta` is negative or not finite.
    """
    if not (beta >= 0 and math.isfinite(beta)):
        raise ValueError(f"beta must be a finite number of at least 0, got {beta}")
    _check_volumes(volumes, grid, target)
    mean, _, log_partition = softmax_moments3d(
        volumes, inverse_temperature=inverse_temperature, grid=grid
    )
    error = l1(mean, target, valid=valid)
    if beta == 0:  # 0 times the infinite likelihood of a masked voxel is NaN
        return error
    nll = _nll(volumes, log_partition, grid, target, float(inverse_temperature), valid)
    return error + beta * nll


def _check_volumes(volumes: Tensor, grid: VoxelGrid, target: Tensor) -> None:
    if not isinstance(grid, VoxelGrid):
        raise TypeError(f"grid must be a VoxelGrid, got {type(grid).__name__}")
    _check.tensors({"volumes": volumes, "target": target, "grid": grid.origin})
    if volumes.dim() < 4 or tuple(volumes.shape[-3:]) != grid.size:
        raise ValueError(
            f"volumes must be [..., J, X, Y, Z] of the size of grid, {grid.size}, "
            f"got {tuple(volumes.shape)}"
        )
    if target.shape != (*volumes.shape[:-3], 3):
        raise ValueError(
            f"target must be [..., J, 3] to fit volumes, {(*volumes.shape[:-3], 3)}, "
            f"got {tuple(target.shape)}"
        )
    if grid.batch not in (1, volumes.shape[0]):
        raise ValueError(
            f"grid must have batch 1 or that of volumes, {volumes.shape[0]}, got {grid.batch}"
        )


def _nll(
    volumes: Tensor,
    log_partition: Tensor,
    grid: VoxelGrid,
    target: Tensor,
    alpha: float,
    valid: Tensor | None,
) -> Tensor:
    # Half a voxel belongs to the upper neighbour. Comparisons with NaN are false.
    voxel = (grid.to_index(target.to(grid.dtype)) + 0.5).floor()
    inside = torch.stack(
        [(n >= 0) & (n < size) for n, size in zip(voxel.unbind(-1), grid.size, strict=True)], -1
    ).all(-1)
    i, j, k = torch.where(inside[..., None], voxel, 0).long().unbind(-1)
    position = (i * grid.size[1] + j) * grid.size[2] + k
    logit = volumes.flatten(-3).gather(-1, position[..., None])[..., 0]

    counts = inside & log_partition.isfinite()
    weights = joint_weights(counts, valid, log_partition.dtype)
    nll = log_partition - alpha * logit.to(log_partition.dtype)
    return weighted_mean(torch.where(weights != 0, nll, 0), weights)
