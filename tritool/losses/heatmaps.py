# SPDX-License-Identifier: Apache-2.0
"""Losses of 2D heat maps: squared error to a Gaussian at the true joint, and cross entropy."""

from __future__ import annotations

import torch
from torch import Tensor

from tritool.losses._mean import joint_weights, weighted_mean
from tritool.ops import _check

__all__ = ["heatmap_cross_entropy", "heatmap_mse"]


def heatmap_mse(
    heatmaps: Tensor, target: Tensor, *, sigma: float = 2.0, valid: Tensor | None = None
) -> Tensor:
    r"""Mean squared difference of heat maps to Gaussians of height 1 at the true joints.

    The Gaussian :math:`\exp(-|r - r^*|^2 / 2 \sigma^2)` is evaluated at the centres of the cells,
    with the joint :math:`r^*` where it is, not rounded to a cell. Of a joint beyond the border the
    map holds what reaches inside: the tail, and further away zeros.

    Args:
        heatmaps: `[..., J, H, W]`, as the network gives them, before any softmax. float16 and
            bfloat16 are read as such and summed in float32.
        target: `[..., J, 2]`, (x, y) in cells of the map, the centre of the first cell being
            (0, 0). A joint that is not finite does not count.
        sigma: Standard deviation of the Gaussian in cells, above 0.
        valid: `[..., J]` or what broadcasts to it; boolean, or weights of at least 0. None: every
            joint counts alike.

    Returns:
        `[]`, float32 or float64: the mean over cells and the joints that count, weighted by
        `valid`. 0, with zero gradient, if none does; NaN, with zero gradient, if the map of a joint
        that counts is not finite, or its weight negative or not finite.

    Raises:
        TypeError: An argument is not a tensor of the right kind.
        ValueError: Shapes or devices do not fit, or `sigma` is not above 0.

    Example:
        >>> target = torch.tensor([[3.0, 2.0]])
        >>> heatmaps = torch.zeros(1, 5, 8)
        >>> heatmaps[0, 2, 3] = 1  # the right place, but without the slopes
        >>> round(float(heatmap_mse(heatmaps, target, sigma=0.5)), 4)
        0.0019
        >>> float(heatmap_mse(heatmaps, target * torch.nan))  # nothing is known
        0.0
    """
    present, weights, sigma = _checked(heatmaps, target, sigma, valid)
    counts = weights != 0
    dtype = weights.dtype

    height, width = heatmaps.shape[-2:]
    x, y = torch.where(present[..., None], target, 0).to(dtype).unbind(-1)
    # The one tensor of the maps' size that is kept: product, difference and mask are in one place.
    difference = _slope(y, height, sigma)[..., :, None] * _slope(x, width, sigma)[..., None, :]
    difference = difference.sub_(heatmaps)
    # A map that is not finite makes the loss NaN in the end, not here.
    broken = ~difference.detach().sum((-2, -1)).isfinite()
    difference = difference.masked_fill_((broken | ~counts)[..., None, None], 0)
    mean = weighted_mean(difference.square().sum((-2, -1)) / max(height * width, 1), weights)
    return torch.where((broken & counts).any(), torch.nan, mean)


def heatmap_cross_entropy(
    heatmaps: Tensor,
    target: Tensor,
    *,
    sigma: float = 2.0,
    inverse_temperature: float = 1.0,
    valid: Tensor | None = None,
) -> Tensor:
    r"""Cross entropy of the heat maps' softmax and Gaussians at the true joints.

    :math:`-\sum_r q(r) \log p(r)`, with :math:`p = \mathrm{softmax}(\alpha H)` over the cells,
    the distribution that a soft-argmax takes the mean of, and :math:`q` the Gaussian of
    `heatmap_mse` scaled to a sum of 1. Unlike the squared error, whose gradient is small until
    there is a peak, it pushes hardest where the network knows least; networks that are small or
    trained briefly tell left from right much sooner with it.

    Args:
        heatmaps: `[..., J, H, W]`, as the network gives them, before any softmax. float16 and
            bfloat16 are read as such and summed in float32.
        target: `[..., J, 2]`, (x, y) in cells of the map, the centre of the first cell being
            (0, 0). A joint that is not finite does not count, nor one that is beyond the border:
            no distribution over the cells has its mean there.
        sigma: Standard deviation of the Gaussian in cells, above 0. The narrowest that joints
            between cells still shape is about 0.5.
        inverse_temperature: :math:`\alpha`, above 0: as in the soft-argmax that follows.
        valid: `[..., J]` or what broadcasts to it; boolean, or weights of at least 0. None: every
            joint counts alike.

    Returns:
        `[]`, float32 or float64: the mean over the joints that count, weighted by `valid`; not 0
        but the entropy of the Gaussian where the maps are perfect. 0, with zero gradient, if no
        joint counts; NaN, with zero gradient, if the map of a joint that counts is not finite, or
        its weight negative or not finite.

    Raises:
        TypeError: An argument is not a tensor of the right kind.
        ValueError: Shapes or devices do not fit, or a setting is not above 0.

    Example:
        >>> target = torch.tensor([[3.0, 2.0]])
        >>> flat = heatmap_cross_entropy(torch.zeros(1, 5, 8), target)
        >>> round(float(flat), 4)  # log(5 * 8)
        3.6889
    """
    present, weights, sigma = _checked(heatmaps, target, sigma, valid)
    alpha = _check.positive_number("inverse_temperature", inverse_temperature)
    dtype = weights.dtype
    height, width = heatmaps.shape[-2:]
    edge = torch.tensor([width, height], dtype=dtype, device=target.device) - 0.5
    inside = present & ((target >= -0.5) & (target <= edge)).all(-1)
    weights = torch.where(inside, weights, 0)
    counts = weights != 0
    broken = ~heatmaps.detach().to(dtype).sum((-2, -1)).isfinite()

    x, y = torch.where(inside[..., None], target, 0).to(dtype).unbind(-1)
    # The Gaussian is a product of two, each scaled to a sum of 1, however narrow it is.
    columns, rows = _exponent(x, width, sigma).softmax(-1), _exponent(y, height, sigma).softmax(-1)
    logits = alpha * heatmaps.to(dtype).masked_fill((broken | ~counts)[..., None, None], 0)
    # Not a matmul: autocast and TF32 would round it.
    expected = ((logits * columns[..., None, :]).sum(-1) * rows).sum(-1)
    # Maps without cells have no joint inside.
    entropy = torch.where(counts, logits.flatten(-2).logsumexp(-1) - expected, 0)
    mean = weighted_mean(entropy, weights)
    return torch.where((broken & counts).any(), torch.nan, mean)


def _checked(
    heatmaps: Tensor, target: Tensor, sigma: float, valid: Tensor | None
) -> tuple[Tensor, Tensor, float]:
    """Which joints `[..., J]` are known, their weights in the dtype of the loss, and sigma."""
    _check.tensors({"heatmaps": heatmaps, "target": target})
    _check.trailing("heatmaps", heatmaps, "[..., J, H, W]", (None, None, None))
    if target.shape != (*heatmaps.shape[:-2], 2):
        raise ValueError(
            f"target must be [..., J, 2] to fit heatmaps, {(*heatmaps.shape[:-2], 2)}, "
            f"got {tuple(target.shape)}"
        )
    sigma = _check.positive_number("sigma", sigma)
    dtype = _check.geometry_dtype((heatmaps, target))
    present = target.isfinite().all(-1)
    return present, joint_weights(present, valid, dtype), sigma


def _slope(center: Tensor, size: int, sigma: float) -> Tensor:
    """The Gaussian along one axis, [..., size]; that of the map is the product of two."""
    return _exponent(center, size, sigma).exp()


def _exponent(center: Tensor, size: int, sigma: float) -> Tensor:
    """The exponent of that, [..., size]."""
    cells = torch.arange(size, dtype=center.dtype, device=center.device)
    return -0.5 * ((cells - center[..., None]) / sigma).square()
