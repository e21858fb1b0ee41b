# SPDX-License-Identifier: Apache-2.0
"""Activation checkpointing that leaves batch norm's running statistics alone the second time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint


def run(block: nn.Module, x: Tensor, *, checkpointing: bool) -> Tensor:
    """`block(x)`; with checkpointing only `x` is kept for the backward, which calls `block` again.

    The result, the gradients and the running statistics are those without checkpointing.

    Args:
        block: A module without random numbers.
        x: Its argument.
        checkpointing: Trade time for memory. Without gradients it makes no difference.
    """
    if not (checkpointing and torch.is_grad_enabled()):
        return block(x)  # type: ignore[no-any-return]
    options: dict[str, Any] = {}
    if not torch.compiler.is_compiling():
        # The compiler recomputes the graph of the forward, updates of buffers left out; eager mode
        # calls the modules again.
        def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
            return nullcontext(), _statistics_kept(block)

        options["context_fn"] = contexts
    return checkpoint(  # type: ignore[no-any-return]
        block, x, use_reentrant=False, preserve_rng_state=False, **options
    )


@contextmanager
def _statistics_kept(block: nn.Module) -> Iterator[None]:
    """Inside, batch norms in training mode write their running statistics to copies."""
    # Without statistics at all they would keep fewer tensors for the backward than before, which
    # checkpointing takes for an error.
    norms = [m for m in block.modules() if isinstance(m, _BatchNorm) and m.training]
    kept = [dict(norm.named_buffers(recurse=False)) for norm in norms]
    for norm, buffers in zip(norms, kept, strict=True):
        for name, buffer in buffers.items():
            setattr(norm, name, buffer.clone())
    try:
        yield
    finally:
        for norm, buffers in zip(norms, kept, strict=True):
            for name, buffer in buffers.items():
                setattr(norm, name, buffer)
