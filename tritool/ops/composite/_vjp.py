# SPDX-License-Identifier: Apache-2.0
"""Reverse-mode differentiation of a function, as a value."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["vjp"]


def vjp(function: Callable[..., Any], *inputs: Tensor) -> tuple[Any, Callable[..., Any]]:
    """The outputs, and the function that takes their gradients to the inputs'."""
    outputs, pull = torch.func.vjp(function, *inputs)[:2]
    return outputs, pull
