# SPDX-License-Identifier: Apache-2.0
"""Unprojection of image features into a volume, the views aggregated on the way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tritool.grid import VoxelGrid
from tritool.ops import _check, composite
from tritool.ops._register import Function, expand_batched, register

__all__ = ["Unproject", "UnprojectBackward", "unproject"]

# Their places are the numbers that the kernels know (csrc/kernels/unproject.h).
_AGGREGATIONS = ("sum", "mean", "softmax", "max")
_OUTSIDE = ("zeros", "exclude")
_SAMPLINGS = ("center", "official")


def unproject(
    features: Tensor,
    projections: Tensor,
    grid: VoxelGrid | Tensor,
    *,
    aggregation: str = "softmax",
    confidences: Tensor | None = None,
    outside: str = "zeros",
    sampling: str = "center",
) -> Tensor:
    r"""Samples every view's features where it sees the voxels, and aggregates over the views.

    A voxel at :math:`X` is projected into every view, the features :math:`v_c` there are read
    bilinearly (zeros beyond the border), and the views are put together, channel by channel, with
    the confidences :math:`w_c`: equations (8)-(11) of Iskakov et al., "Learnable Triangulation of
    Human Pose" (ICCV 2019):

    - `"sum"`: :math:`\sum_c w_c v_c`, (8);
    - `"mean"`: :math:`\sum_c w_c v_c / \sum_c w_c`, (9);
    - `"softmax"`: :math:`\sum_c w_c e^{v_c} v_c / \sum_c w_c e^{v_c}`, (10)-(11);
    - `"max"`: the largest :math:`v_c`, the first of equals.

    Projection, sampling and aggregation are one operation: nothing per view is kept in memory,
    neither for the backward pass.

    Args:
        features: `[B, C, K, H, W]`; channels-last memory (stride 1 along K) is read in place and
            is the faster layout; float16 and bfloat16 are accumulated in float32.
        projections: `[B, C, 3, 4]`, world to pixels of the feature maps: those of the image,
            resized and cropped as the features are (`Cameras.crop`, `Cameras.resize`).
        grid: Where the voxels lie: a `VoxelGrid` of batch B, or any world points `[B, ..., 3]`.
        aggregation: `"sum"`, `"mean"`, `"softmax"` or `"max"`.
        confidences: `[B, C]` per view or `[B, C, K]` per view and channel, at least 0. 0: the view
            is absent, in every aggregation. Default: 1.
        outside: What a view means to a voxel that it does not see, because it lies behind the
            camera or a pixel or more beyond the image: `"zeros"`, a value of 0 that takes part (the
            paper); `"exclude"`, nothing. A voxel that no view takes part in is 0.
        sampling: `"center"`, pixel (0, 0) is the centre of the first; `"official"`, the mapping of
            the paper's published code, x (W - 1) / H and y (H - 1) / W, which its weights expect.

    B may be 1 in any argument; what broadcasts is read in place.

    Returns:
        `[B, K, X, Y, Z]`, or `[B, K, ...]` for points `[B, ..., 3]`, in the dtype of the features
        and channels-last if they are. A voxel is NaN, and passes no gradient, where the projection
        of a view that takes part is not a number or its confidence negative or not finite. A NaN
        among the features spoils the voxels that sample it, and no gradient but its own.

    Raises:
        TypeError: An argument is not a floating-point tensor, or `grid` neither tensor nor grid.
        ValueError: Shapes or devices do not fit, or an option is unknown.

    Example:
        >>> features = torch.zeros(1, 1, 1, 5, 7)  # one view, one channel
        >>> features[..., 3, 4] = 1.0
        >>> P = torch.tensor([[[[1.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]]]])
        >>> unproject(features, P, torch.tensor([[[8.0, 6, 2], [4, 3, 1], [3, 3, 1]]]))
        tensor([[[1., 1., 0.]]])
    """
    _check.one_of("aggregation", aggregation, _AGGREGATIONS)
    _check.one_of("outside", outside, _OUTSIDE)
    _check.one_of("sampling", sampling, _SAMPLINGS)
    frame, shape, size = _places(grid)
    tensors = {"features": features, "projections": projections, "grid": frame}
    if confidences is not None:
        tensors["confidences"] = confidences
    _check.tensors(tensors)
    _check.exactly("features", features, "[B, C, K, H, W]", (None,) * 5)
    views, channels = features.shape[1:3]
    _check.exactly("projections", projections, "[B, C, 3, 4]", (None, views, 3, 4), of="features")
    if confidences is not None:
        if confidences.dim() == 2:
            confidences = confidences[..., None]
            _check.exactly("confidences", confidences[..., 0], "[B, C]", (None, views), "features")
        else:
            pattern = "[B, C] or [B, C, K]"
            wanted = (None, views, channels)
            _check.exactly("confidences", confidences, pattern, wanted, of="features")
    if min(features.shape[-2:]) < 1:
        raise ValueError(f"features must have H and W of 1 or more, got {tuple(features.shape)}")

    batch = _check.broadcast_batch({name: tensor.shape[:1] for name, tensor in tensors.items()})
    dtype = composite.accumulator_dtype(features)
    features = features.expand(*batch, *features.shape[1:])
    volume: Tensor = Unproject.apply(
        features,
        projections.to(dtype).expand(*batch, views, 3, 4),
        frame.to(dtype).expand(*batch, *frame.shape[1:]),
        None if confidences is None else confidences.to(dtype).expand(*batch, views, channels),
        size,
        _AGGREGATIONS.index(aggregation),
        outside == "exclude",
        sampling == "official",
        features.stride(2) == 1 and features.stride(4) != 1,
    )
    return volume.reshape(*batch, channels, *shape)


def _places(grid: VoxelGrid | Tensor) -> tuple[Tensor, tuple[int, ...], tuple[int, ...]]:
    """What the op wants of a grid: its frame or points, the volume's shape, a frame's size."""
    if isinstance(grid, VoxelGrid):
        return torch.cat([grid.origin[:, None], grid.axes], 1), grid.size, grid.size
    if not isinstance(grid, Tensor):
        raise TypeError(f"grid must be a VoxelGrid or a tensor, got {type(grid).__name__}")
    if grid.dim() < 2 or grid.shape[-1] != 3:
        raise ValueError(f"grid must be [B, ..., 3] if it is points, got {tuple(grid.shape)}")
    shape = tuple(grid.shape[1:-1])
    return grid.flatten(1, -2) if grid.dim() > 2 else grid[:, None], shape, ()


class Unproject(Function):
    """The op behind `unproject`.

    `Unproject.apply(features, projections, grid, confidences, size, aggregation, exclude, official,
    channels_last)`: features `[batch, C, K, H, W]`, projections `[batch, C, 3, 4]`, confidences
    `[batch, C, K]` or None; grid `[batch, 4, 3]`, the origin and the three steps of a grid of
    `size` (X, Y, Z), or with `size` () the points `[batch, N, 3]`. All have the full batch,
    expanded where they broadcast. `aggregation` counts sum, mean, softmax, max from 0. Returns
    `[batch, K, N]`, with memory in the order of `[batch, N, K]` if `channels_last`.
    """

    @staticmethod
    def forward(
        features: Tensor,
        projections: Tensor,
        grid: Tensor,
        confidences: Tensor | None,
        size: tuple[int, ...],
        aggregation: int,
        exclude: bool,
        official: bool,
        channels_last: bool,
    ) -> Tensor:
        """Calls the kernel."""
        volume: Tensor = torch.ops.tritool.unproject.default(
            features, projections, grid, confidences,
            size, aggregation, exclude, official, channels_last,
        )  # fmt: skip
        return volume

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keeps the inputs; the backward samples again rather than store values per view."""
        *tensors, ctx.size, ctx.aggregation, ctx.exclude, ctx.official, _ = inputs
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        """The gradients that were asked for."""
        if grad is None:
            return (None,) * 9
        wanted = ctx.needs_input_grad[:4]
        grads = UnprojectBackward.apply(
            grad, *ctx.saved_tensors, ctx.size, ctx.aggregation, ctx.exclude, ctx.official,
            torch.are_deterministic_algorithms_enabled(), *wanted,
        )  # fmt: skip
        grads = (g if want else None for g, want in zip(grads, wanted, strict=True))
        return *grads, None, None, None, None, None


class UnprojectBackward(Function):
    """The vector-Jacobian product of `Unproject`, differentiable in plain PyTorch."""

    @staticmethod
    def forward(
        grad: Tensor,
        features: Tensor,
        projections: Tensor,
        grid: Tensor,
        confidences: Tensor | None,
        size: tuple[int, ...],
        aggregation: int,
        exclude: bool,
        official: bool,
        deterministic: bool,
        want_features: bool,
        want_projections: bool,
        want_grid: bool,
        want_confidences: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Calls the kernel; a gradient that is not wanted is an empty tensor."""
        return torch.ops.tritool.unproject_backward.default(  # type: ignore[no-any-return]
            grad, features, projections, grid, confidences, size, aggregation, exclude, official,
            deterministic, want_features, want_projections, want_grid, want_confidences,
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Keeps the inputs."""
        *tensors, ctx.size, ctx.aggregation, ctx.exclude, ctx.official = inputs[:9]
        ctx.wanted = inputs[10:]
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient of the gradients, by differentiating the composite twice."""
        grad, features, projections, grid, confidences = ctx.saved_tensors
        results = composite.unproject_double_backward(
            cotangents, grad, features, projections, grid, confidences,
            ctx.size, ctx.aggregation, ctx.exclude, ctx.official, ctx.wanted,
        )  # fmt: skip
        return *results, *(None,) * 9


def _fake(
    features: Tensor, projections: Tensor, grid: Tensor, confidences: Tensor | None,
    size: tuple[int, ...], aggregation: int, exclude: bool, official: bool, channels_last: bool,
) -> Tensor:  # fmt: skip
    *batch, _, channels, _, _ = features.shape
    count = size[0] * size[1] * size[2] if size else grid.shape[-2]
    if channels_last:
        return features.new_empty(*batch, count, channels).movedim(-1, -2)
    return features.new_empty(*batch, channels, count)


def _fake_backward(
    grad: Tensor, features: Tensor, projections: Tensor, grid: Tensor, confidences: Tensor | None,
    size: tuple[int, ...], aggregation: int, exclude: bool, official: bool, deterministic: bool,
    *wanted: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    def gradient_of(tensor: Tensor | None, want: bool) -> Tensor:
        return projections.new_empty(tensor.shape if want and tensor is not None else (0,))

    return (
        torch.empty_like(features) if wanted[0] else features.new_empty(0),
        gradient_of(projections, wanted[1]),
        gradient_of(grid, wanted[2]),
        gradient_of(confidences, wanted[3]),
    )


def _vmap(
    call: Callable[..., Any], info: Any, in_dims: tuple[int | None, ...], *args: Any
) -> tuple[Tensor, int]:
    return call(*expand_batched(info.batch_size, in_dims, args, full=(0, 1, 2, 3))), 0


def _vmap_backward(
    call: Callable[..., Any], info: Any, in_dims: tuple[int | None, ...], *args: Any
) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
    grads = call(*expand_batched(info.batch_size, in_dims, args, full=(0, 1, 2, 3, 4)))
    present = (True, True, True, args[4] is not None)
    return grads, tuple(0 if w and p else None for w, p in zip(args[10:], present, strict=True))


register(
    Unproject,
    "unproject(Tensor features, Tensor projections, Tensor grid, Tensor? confidences, "
    "SymInt[] size, int aggregation, bool exclude, bool official, bool channels_last) -> Tensor",
    fake=_fake,
    composite=composite.unproject,
    vmap=_vmap,
)
register(
    UnprojectBackward,
    "unproject_backward(Tensor grad, Tensor features, Tensor projections, Tensor grid, "
    "Tensor? confidences, SymInt[] size, int aggregation, bool exclude, bool official, "
    "bool deterministic, bool want_features, bool want_projections, bool want_grid, "
    "bool want_confidences) -> (Tensor, Tensor, Tensor, Tensor)",
    fake=_fake_backward,
    composite=composite.unproject_backward,
    vmap=_vmap_backward,
)
