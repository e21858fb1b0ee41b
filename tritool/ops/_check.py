# SPDX-License-Identifier: Apache-2.0
"""The checks of the public functions: what an argument is, what it should be, in one line."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

__all__ = [
    "align_batch",
    "broadcast_batch",
    "exactly",
    "geometry_dtype",
    "one_of",
    "positive_number",
    "tensors",
    "trailing",
]


def tensors(arguments: Mapping[str, Tensor]) -> None:
    """Every argument is a real floating-point tensor, all on one device."""
    first_name, first_device = "", None
    for name, tensor in arguments.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must have a floating-point dtype, got {tensor.dtype}")
        if first_device is None:
            first_name, first_device = name, tensor.device
        elif tensor.device != first_device:
            raise ValueError(
                f"{name} must be on the device of {first_name}, {first_device}, got {tensor.device}"
            )


def trailing(
    name: str, tensor: Tensor, pattern: str, sizes: Sequence[int | None], *, of: str = ""
) -> None:
    """The last dimensions have these sizes; None: any."""
    fits = tensor.dim() >= len(sizes) and all(
        want is None or have == want
        for have, want in zip(tensor.shape[-len(sizes) :], sizes, strict=True)
    )
    if not fits:
        letter = pattern.strip("[]").split(", ")[1]  # of the first of them: C views, N points
        given = f" with {letter} = {sizes[0]} as in {of}" if of else ""
        raise ValueError(f"{name} must be {pattern}{given}, got {tuple(tensor.shape)}")


def exactly(
    name: str, tensor: Tensor, pattern: str, sizes: Sequence[int | None], of: str = ""
) -> None:
    """All dimensions have these sizes; None: any."""
    if tensor.dim() != len(sizes) or any(
        want is not None and have != want for have, want in zip(tensor.shape, sizes, strict=True)
    ):
        like = f" to fit {of}, {list(sizes)}" if of else ""
        like = like.replace("None", "any")
        raise ValueError(f"{name} must be {pattern}{like}, got {tuple(tensor.shape)}")


def one_of(name: str, value: str, choices: Sequence[str]) -> None:
    """An option is one of these."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def broadcast_batch(batches: Mapping[str, Sequence[int]]) -> tuple[int, ...]:
    """The common batch shape."""
    shapes = [tuple(batch) for batch in batches.values()]
    longest = shapes[0]
    for shape in shapes:
        longest = shape if len(shape) > len(longest) else longest
    if all(longest[len(longest) - len(shape) :] == shape for shape in shapes):
        return longest  # nearly always, without the general question's cost
    try:
        return tuple(torch.broadcast_shapes(*shapes))
    except RuntimeError:
        given = ", ".join(f"{tuple(batch)} of {name}" for name, batch in batches.items())
        raise ValueError(f"batch dimensions must broadcast, got {given}") from None


def align_batch(tensor: Tensor, batch: Sequence[int], trailing_dims: int) -> Tensor:
    """A view of the tensor with all of the batch's dimensions, of size 1 where it broadcasts."""
    missing = len(batch) + trailing_dims - tensor.dim()
    return tensor[(None,) * missing] if missing else tensor


def geometry_dtype(arguments: Iterable[Tensor]) -> torch.dtype:
    """The widest dtype of the arguments, at least float32: half a projection's bits say nothing."""
    dtype = torch.float32
    for tensor in arguments:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def positive_number(name: str, value: float) -> float:
    """A number above 0 that is neither 0 nor infinite in float32, not even times 1.44."""
    if isinstance(value, Tensor):
        raise TypeError(
            f"{name} must be a number, got a tensor; to learn it, multiply the input by it"
        )
    number = float(value)
    if not 1e-30 <= number <= 1e30:
        raise ValueError(f"{name} must be a number from 1e-30 to 1e30, got {value}")
    return number
