# SPDX-License-Identifier: Apache-2.0
"""What holds for every op, from the table in cases.py: derivatives, transforms, graphs, autocast.

An op of the dispatcher's namespace without a case here, or without any of these, fails.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import CASES, OpCase
from torch import Tensor
from torch.autograd import forward_ad

from tritool.ops import _register

BATCH = 3
RAW = [(case, name) for case in CASES for name in case.raw]


def case_id(case: OpCase) -> str:
    return case.name


def raw_id(value: Any) -> str:
    return value.name if isinstance(value, OpCase) else str(value)


def arguments(case: OpCase, device: str, batch: int = BATCH) -> list[Tensor]:
    return [x.to(device).requires_grad_() for x in case.sample(batch)]


def outputs_of(result: Any) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def weighted_sum(function: Callable[..., Any]) -> Callable[..., Tensor]:
    """A scalar whose gradient sees every output, each entry with a weight of its own."""

    def scalar(*args: Tensor) -> Tensor:
        total = args[0].new_zeros(())
        for output in outputs_of(function(*args)):
            flat = output.reshape(-1)
            number = torch.arange(1, flat.numel() + 1, dtype=flat.dtype, device=flat.device)
            total = total + (flat * number.cos()).sum()
        return total

    return scalar


def assert_close(have: Any, want: Any, tolerance: float = 1e-10) -> None:
    for h, w in zip(outputs_of(have), outputs_of(want), strict=True):
        torch.testing.assert_close(h, w, rtol=tolerance, atol=tolerance)


def call_raw(case: OpCase, name: str, args: list[Tensor]) -> tuple[Any, tuple[Any, ...]]:
    op = getattr(torch.ops.tritool, name.split("/")[0]).default
    return op, case.raw[name](*args)


def test_every_op_of_the_namespace_has_a_case() -> None:
    defined = {
        name.removeprefix("tritool::").split(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("tritool::")
    }
    assert defined == {name.split("/")[0] for _, name in RAW}


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_gradcheck(case: OpCase, device: str) -> None:
    assert torch.autograd.gradcheck(
        case.function, arguments(case, device), check_batched_grad=True, check_undefined_grad=True
    )


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_gradgradcheck(case: OpCase, device: str) -> None:
    assert torch.autograd.gradgradcheck(
        case.function, arguments(case, device, batch=1), check_batched_grad=True
    )


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_third_derivative(case: OpCase, device: str) -> None:
    """The gradient of the gradient's gradient is right, too: not one order less, silently."""
    args = arguments(case, device, batch=1)

    def second(*inputs: Tensor) -> tuple[Tensor, ...]:
        first = torch.autograd.grad(weighted_sum(case.function)(*inputs), inputs, create_graph=True)
        norm = torch.stack([g.square().sum() for g in first]).sum()
        # A gradient that does not depend on an input (the grid enters linearly) is zero there.
        return torch.autograd.grad(
            norm, inputs, create_graph=True, allow_unused=True, materialize_grads=True
        )

    assert torch.autograd.gradcheck(second, args, fast_mode=True)


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_forward_mode_raises(case: OpCase, device: str) -> None:
    args = [x.detach() for x in arguments(case, device)]
    tangents = tuple(torch.ones_like(x) for x in args)
    with pytest.raises(RuntimeError, match=r"jvp|forward"):
        torch.func.jvp(case.function, tuple(args), tangents)
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match=r"jvp|forward"):
        case.function(*map(forward_ad.make_dual, args, tangents))
    with torch.no_grad(), forward_ad.dual_level(), pytest.raises(RuntimeError, match="jvp"):
        case.function(*map(forward_ad.make_dual, args, tangents))  # of which no_grad says nothing


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_func_transforms(case: OpCase, device: str) -> None:
    args = arguments(case, device)
    scalar = weighted_sum(case.function)
    want = torch.autograd.grad(scalar(*args), args)
    plain = tuple(x.detach() for x in args)
    every = tuple(range(len(args)))
    assert_close(torch.func.grad(scalar, argnums=every)(*plain), want)
    values, pull = torch.func.vjp(scalar, *plain)
    assert_close(pull(torch.ones_like(values)), want)
    # Per sample, with a dimension of size 1 in the place of the batch.
    per_sample = torch.vmap(torch.func.grad(scalar, argnums=every))
    each = [
        torch.func.grad(scalar, argnums=every)(*(x[b : b + 1] for x in plain)) for b in range(BATCH)
    ]
    got = per_sample(*(x[:, None] for x in plain))
    assert_close([g.squeeze(1) for g in got], [torch.cat(g) for g in zip(*each, strict=True)])
    jacobian = torch.func.jacrev(case.function, argnums=0)(*plain)
    reference = torch.autograd.functional.jacobian(lambda x: case.function(x, *plain[1:]), plain[0])
    assert_close(jacobian, reference)


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_vmap_over_each_argument(case: OpCase, device: str) -> None:
    """One argument mapped, in front and at the back, the others shared."""
    plain = [x.detach() for x in arguments(case, device)]
    for mapped, argument in enumerate(plain):
        stack = torch.stack([argument, argument * 1.001, argument * 0.999])
        for dim, stacked in ((0, stack), (-1, stack.movedim(0, -1))):
            in_dims = tuple(dim if i == mapped else None for i in range(len(plain)))
            inputs = [stacked if i == mapped else x for i, x in enumerate(plain)]
            got = outputs_of(torch.vmap(case.function, in_dims=in_dims)(*inputs))
            want = [
                outputs_of(case.function(*plain[:mapped], one, *plain[mapped + 1 :]))
                for one in stack
            ]
            assert_close(got, [torch.stack(w) for w in zip(*want, strict=True)])


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_compile(case: OpCase, dynamic: bool, device: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(case.function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for batch in (BATCH, BATCH + 2):
        args = arguments(case, device, batch)
        assert_close(compiled(*args), case.function(*args))
        want = torch.autograd.grad(weighted_sum(case.function)(*args), args)
        assert_close(torch.autograd.grad(weighted_sum(compiled)(*args), args), want)


def test_compile_dynamic_does_not_recompile(device: str) -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    case = CASES[0]
    compiled = torch.compile(case.function, fullgraph=True, dynamic=True, backend=counter)
    # Not 2, 3 or 4: sizes that are equal at first are taken for one, and those are fixed ones.
    for batch in (5, 6, 7, 9):
        compiled(*arguments(case, device, batch))
    assert counter.frame_count == 1


@pytest.mark.parametrize("case", [CASES[0], CASES[8]], ids=case_id)
def test_compile_with_inductor(case: OpCase, device: str) -> None:
    torch._dynamo.reset()
    args = arguments(case, device)
    compiled = torch.compile(weighted_sum(case.function), fullgraph=True)
    want = torch.autograd.grad(weighted_sum(case.function)(*args), args)
    assert_close(torch.autograd.grad(compiled(*args), args), want)


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_compiled_transforms(case: OpCase, device: str) -> None:
    """A transform inside a compiled function is right or an error, never silently wrong."""
    torch._dynamo.reset()
    plain = tuple(x.detach() for x in arguments(case, device))
    gradient = torch.func.grad(weighted_sum(case.function))
    assert_close(
        torch.compile(gradient, fullgraph=True, backend="aot_eager")(*plain), gradient(*plain)
    )


@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_export(case: OpCase, strict: bool, device: str) -> None:
    class Module(torch.nn.Module):
        def forward(self, *args: Tensor) -> Any:
            return case.function(*args)

    args = tuple(x.detach() for x in arguments(case, device))
    batch = torch.export.Dim("batch", min=1, max=1024)
    program = torch.export.export(
        Module(), args, dynamic_shapes=(tuple({0: batch} for _ in args),), strict=strict
    )
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert any(target.startswith("tritool.") for target in targets), targets
    other = tuple(x.detach() for x in arguments(case, device, batch=BATCH + 4))
    assert_close(program.module()(*other), case.function(*other))


@pytest.mark.parametrize(("case", "name"), RAW, ids=raw_id)
def test_opcheck(case: OpCase, name: str, device: str) -> None:
    op, args = call_raw(case, name, arguments(case, device))
    assert set(torch.library.opcheck(op, args).values()) == {"SUCCESS"}


@pytest.mark.parametrize(("case", "name"), RAW, ids=raw_id)
def test_raw_op_has_gradient_and_vmap(case: OpCase, name: str, device: str) -> None:
    op, args = call_raw(case, name, arguments(case, device))
    first = next(o for o in outputs_of(op(*args)) if o.requires_grad)
    first.sum().backward()
    plain = [x.detach() if isinstance(x, Tensor) else x for x in args]
    inputs = [x[None] if isinstance(x, Tensor) else x for x in plain]
    in_dims = tuple(0 if isinstance(x, Tensor) else None for x in plain)
    got = outputs_of(torch.vmap(op, in_dims=in_dims)(*inputs))
    for g, w in zip(got, outputs_of(op(*plain)), strict=True):
        torch.testing.assert_close(g.reshape(w.shape), w)


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_autocast(case: OpCase, device: str) -> None:
    """Geometry stays in float32 and the results do not change."""
    args = [x.detach().float() for x in arguments(case, device)]
    want = case.function(*args)
    with torch.autocast(device, dtype=torch.bfloat16):
        got = case.function(*args)
    for g, w in zip(outputs_of(got), outputs_of(want), strict=True):
        assert g.dtype == torch.float32
        torch.testing.assert_close(g, w, rtol=0, atol=0)


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_activation_checkpoint(case: OpCase, device: str) -> None:
    args = arguments(case, device)
    scalar = weighted_sum(case.function)
    want = torch.autograd.grad(scalar(*args), args)
    from torch.utils.checkpoint import checkpoint

    got = torch.autograd.grad(checkpoint(scalar, *args, use_reentrant=False), args)
    assert_close(got, want, 0)


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_stock_apply_gives_the_same(case: OpCase, monkeypatch: pytest.MonkeyPatch) -> None:
    """The short way to call a Function stands on a private name of torch; without it, the same."""
    args = arguments(case, "cpu")
    want = torch.autograd.grad(weighted_sum(case.function)(*args), args)
    monkeypatch.setattr(_register, "_transforms_active", lambda: True)
    assert_close(torch.autograd.grad(weighted_sum(case.function)(*args), args), want, 0)


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_same_bits_on_any_number_of_threads(case: OpCase) -> None:
    args = arguments(case, "cpu", batch=40)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(torch.autograd.grad(weighted_sum(case.function)(*args), args))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert_close(other, results[0], 0)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_cuda_graph(case: OpCase) -> None:
    """Both passes are captured, so nothing waits for the device, and replayed on new data."""
    args = [x.detach().cuda().requires_grad_() for x in case.sample(BATCH)]
    scalar = weighted_sum(case.function)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            torch.autograd.grad(scalar(*args), args)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = torch.autograd.grad(scalar(*args), args)
    with torch.no_grad():
        for x in args:
            x.mul_(1.001)
    graph.replay()
    torch.cuda.synchronize()
    assert_close(captured, torch.autograd.grad(scalar(*args), args))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_cuda_agrees_with_cpu_on_any_stream(case: OpCase) -> None:
    args = arguments(case, "cpu")
    want = torch.autograd.grad(weighted_sum(case.function)(*args), args)
    on_gpu = [x.detach().cuda().requires_grad_() for x in args]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.stream(stream):
            got = torch.autograd.grad(weighted_sum(case.function)(*on_gpu), on_gpu)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    stream.synchronize()
    assert_close([g.cpu() for g in got], want)
