# SPDX-License-Identifier: Apache-2.0
"""One call that makes an op known to all of PyTorch: autograd, vmap, compile, export.

An op is one `torch.autograd.Function` per pass (forward and backward), whose `forward` calls the
dispatcher's op of the same name. `register` hands the very same static methods to the dispatcher,
so the op behaves alike whether it is reached through the class (eager, `torch.func`) or through the
graph that `torch.compile` and `torch.export` make of it. Forward-mode differentiation is not
defined and raises; it is never silently zero.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch.autograd import forward_ad

from tritool import _native

__all__ = ["Function", "expand_batched", "register"]

_LIBRARY = torch.library.Library("tritool", "FRAGMENT")
_native.available()


# Private to torch: without them every call takes the stock, slower path.
_transforms_active = getattr(torch._C, "_are_functorch_transforms_active", lambda: True)
_below_autograd = getattr(torch._C, "_AutoDispatchBelowAutograd", nullcontext)


class Function(torch.autograd.Function):
    """An `autograd.Function` whose call costs little where no `torch.func` transform is active.

    The stock `apply` of a class with `setup_context` binds the arguments to the signature of
    `forward` by inspection, on every call. All arguments are given here, by position, so there is
    nothing to bind.
    """

    @classmethod
    def apply(cls, *args: Any) -> Any:
        """Calls the op; every argument is given."""
        if _transforms_active():
            return super().apply(*args)
        if not torch.is_grad_enabled() and getattr(forward_ad, "_current_level", 0) < 0:
            # Nothing to record, and no tangents to refuse: past the dispatcher's autograd, whose
            # Python costs more than a frame's points do.
            with _below_autograd():
                return cls.forward(*args)
        return super(torch.autograd.Function, cls).apply(*args)  # type: ignore[misc]


def expand_batched(
    batch_size: int, in_dims: tuple[int | None, ...], args: tuple[Any, ...], full: tuple[int, ...]
) -> list[Any]:
    """The arguments of a vmapped op with the mapped dimension in front.

    An argument that is not mapped gets a dimension of size 1, which the op broadcasts; those whose
    position is in `full` are expanded, as the op wants its whole batch in them.
    """
    moved: list[Any] = []
    for position, (arg, dim) in enumerate(zip(args, in_dims, strict=True)):
        if not isinstance(arg, torch.Tensor):
            moved.append(arg)
        elif dim is not None:
            moved.append(arg.movedim(dim, 0))
        elif position in full:
            moved.append(arg.unsqueeze(0).expand(batch_size, *arg.shape))
        else:
            moved.append(arg.unsqueeze(0))
    return moved


def register(
    function: type[Function],
    schema: str,
    *,
    fake: Callable[..., Any],
    composite: Callable[..., Any],
    vmap: Callable[..., Any],
) -> None:
    """Defines `tritool::<schema>` and ties `function` to it.

    Args:
        function: The `autograd.Function` whose `forward` calls the op; its `backward` and
            `setup_context` become the op's autograd formula.
        schema: The op's signature in the dispatcher's language.
        fake: Shapes, dtypes and strides of the results, for tensors without data.
        composite: The op in plain PyTorch, which serves where the native library is absent.
        vmap: The batching rule `(call, info, in_dims, *args) -> (outputs, out_dims)`, where `call`
            is the op without the mapped dimension.
    """
    name = schema.split("(", 1)[0]
    _LIBRARY.define(schema)
    if not _native.available():
        _LIBRARY.impl(name, composite, "CompositeExplicitAutograd")
    qualified = f"tritool::{name}"
    torch.library.register_fake(qualified, fake, lib=_LIBRARY)
    torch.library.register_autograd(
        qualified,
        function.backward,
        setup_context=function.setup_context,
        lib=_LIBRARY,
    )
    op = getattr(torch.ops.tritool, name).default
    torch.library.register_vmap(qualified, partial(vmap, op), lib=_LIBRARY)
    function.vmap = staticmethod(partial(vmap, function.apply))  # type: ignore[method-assign]
    torch.compiler.allow_in_graph(function)
