# SPDX-License-Identifier: Apache-2.0
"""The 3D network: shapes, values against a second forward, derivatives, compilers."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tritool.models import V2V

LAST = torch.channels_last_3d


@functools.cache
def trained() -> V2V:
    """A narrow network with the statistics of data, not of initialisation."""
    torch.manual_seed(0)
    network = V2V(3, 2, width=2)
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm3d)]
    for norm in norms:
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, mean=0.3, std=0.2)
        norm.momentum = 1.0
    for name, parameter in network.named_parameters():
        if name.endswith(".bias") and parameter.eq(0).all():
            nn.init.normal_(parameter, std=0.2)
    with torch.no_grad():
        network.train()(volumes(4))
    for norm in norms:
        norm.momentum = 0.1
        norm.running_var *= torch.empty_like(norm.running_var).uniform_(0.8, 1.2)
    return network


def small(*, checkpointing: bool = False) -> V2V:
    network = copy.deepcopy(trained())
    network.checkpointing = checkpointing
    return network


def volumes(batch: int = 2, sides: tuple[int, int, int] = (32, 32, 32)) -> Tensor:
    return torch.randn(batch, 3, *sides, generator=torch.Generator().manual_seed(1))


def objective(scores: Tensor) -> Tensor:
    factors = torch.linspace(-1, 2, scores.numel(), dtype=scores.dtype).reshape(scores.shape)
    return (scores * factors).mean() + scores.square().mean()


# ---- Shapes ----


def test_shapes() -> None:
    with torch.device("meta"):
        assert V2V(32, 17)(torch.empty(2, 32, 64, 96, 32)).shape == (2, 17, 64, 96, 32)
    assert small().eval()(volumes(1, (32, 64, 32))).shape == (1, 2, 32, 64, 32)


def test_width_scales_every_channel() -> None:
    with torch.device("meta"):
        ours, wide = V2V(5, 3).state_dict(), V2V(5, 3, width=96).state_dict()
    ends = {"front_layers.0.block.0.weight": 1, "output_layer.weight": 0, "output_layer.bias": 0}
    assert ours.keys() == wide.keys()
    for name, tensor in ours.items():
        expected = list(tensor.shape)
        for axis in range(min(2, tensor.ndim)):
            if ends.get(name) != axis:
                expected[axis] *= 3
        assert list(wide[name].shape) == expected, name


def test_width_of_the_front() -> None:
    with torch.device("meta"):
        usual, wide = V2V(5, 3, width=8), V2V(5, 3, width=8, front_width=6)
        odd = V2V(5, 3, width=3, front_width=4)
        assert wide(torch.empty(2, 5, 32, 32, 32)).shape == (2, 3, 32, 32, 32)
        assert odd(torch.empty(2, 5, 32, 32, 32)).shape == (2, 3, 32, 32, 32)
    assert usual.front_layers[0].block[0].out_channels == 4
    assert wide.front_layers[0].block[0].out_channels == 6
    behind = {name for name in usual.state_dict() if not name.startswith("front_layers")}
    for name in behind:
        assert wide.state_dict()[name].shape == usual.state_dict()[name].shape, name


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((3, 32, 32, 32), "with K = 3"),
        ((1, 4, 32, 32, 32), "with K = 3"),
        ((1, 3, 32, 48, 32), "multiples of 32"),
        ((1, 3, 32, 32, 0), "multiples of 32"),
    ],
)
def test_shapes_that_do_not_fit(shape: tuple[int, ...], words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        small()(torch.zeros(shape))
    assert str(shape) in str(caught.value)


def test_volumes_must_be_floating_point() -> None:
    with pytest.raises(TypeError, match=r"volumes .* torch\.int64"):
        small()(torch.zeros(1, 3, 32, 32, 32, dtype=torch.int64))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"in_channels": 0, "out_channels": 1}, "in_channels must be at least 1, got 0"),
        ({"in_channels": 1, "out_channels": 0}, "out_channels must be at least 1, got 0"),
        ({"in_channels": 1, "out_channels": 1, "width": 5}, "width must be even"),
        ({"in_channels": 1, "out_channels": 1, "width": 0}, "at least 2, got 0"),
        (
            {"in_channels": 1, "out_channels": 1, "width": 0, "front_width": 4},
            "width must be at least 1, got 0",
        ),
        (
            {"in_channels": 1, "out_channels": 1, "front_width": 0},
            "front_width must be at least 1, got 0",
        ),
    ],
)
def test_settings_that_do_not_fit(settings: dict[str, int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        V2V(**settings)


# ---- Values ----


def plain(network: V2V, x: Tensor) -> Tensor:
    """The network once more, from its state dict alone and written out."""
    tensors = network.state_dict()

    def conv(name: str, x: Tensor) -> Tensor:
        weight = tensors[f"{name}.weight"]
        return F.conv3d(x, weight, tensors[f"{name}.bias"], padding=weight.shape[-1] // 2)

    def norm(name: str, x: Tensor) -> Tensor:
        weight, bias, mean, var = (
            tensors[f"{name}.{v}"][:, None, None, None]
            for v in ("weight", "bias", "running_mean", "running_var")
        )
        return (x - mean) / (var + 1e-5).sqrt() * weight + bias

    def basic(name: str, x: Tensor) -> Tensor:
        return norm(f"{name}.block.1", conv(f"{name}.block.0", x)).relu()

    def res(name: str, x: Tensor) -> Tensor:
        y = norm(f"{name}.res_branch.1", conv(f"{name}.res_branch.0", x)).relu()
        y = norm(f"{name}.res_branch.4", conv(f"{name}.res_branch.3", y))
        if f"{name}.skip_con.0.weight" in tensors:
            x = norm(f"{name}.skip_con.1", conv(f"{name}.skip_con.0", x))
        return (x + y).relu()

    def up(name: str, x: Tensor) -> Tensor:
        block = f"{name}.block"
        y = F.conv_transpose3d(
            x, tensors[f"{block}.0.weight"], tensors[f"{block}.0.bias"], stride=2
        )
        return norm(f"{block}.1", y).relu()

    x = basic("front_layers.0", x)
    for index in (1, 2, 3):
        x = res(f"front_layers.{index}", x)

    def inside(level: int, x: Tensor) -> Tensor:
        """The hourglass from a level inwards: half the size, everything further in, double."""
        prefix = "encoder_decoder."
        if level > 5:
            return res(f"{prefix}mid_res", x)
        skip = res(f"{prefix}skip_res{level}", x)
        x = res(f"{prefix}encoder_res{level}", F.max_pool3d(x, 2))
        x = res(f"{prefix}decoder_res{level}", inside(level + 1, x))
        return up(f"{prefix}decoder_upsample{level}", x) + skip

    x = inside(1, x)
    x = res("back_layers.0", x)
    x = basic("back_layers.2", basic("back_layers.1", x))
    return conv("output_layer", x)


def test_values_are_those_of_a_second_forward() -> None:
    network, x = small().double().eval(), volumes(1, (32, 64, 32)).double()
    with torch.no_grad():
        expected = plain(network, x)
        assert expected.std() > 1e-3
        torch.testing.assert_close(network(x), expected, rtol=1e-9, atol=1e-12)


def test_initial_weights() -> None:
    torch.manual_seed(0)
    network = V2V(32, 17)
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv3d | nn.ConvTranspose3d):
            assert module.bias.eq(0).all()
            outer, inner = module.weight.shape[:2]
            expected = (2 / ((outer + inner) * module.weight[0, 0].numel())) ** 0.5
            # Five standard errors of the estimate.
            error = 5 / (2 * module.weight.numel()) ** 0.5
            assert abs(module.weight.std().item() / expected - 1) < error, name


def test_modes() -> None:
    network, x = small(), volumes()
    before = copy.deepcopy(network.state_dict())
    network.eval()
    first = network(x)
    assert torch.equal(first, network(x))
    assert all(torch.equal(before[k], v) for k, v in network.state_dict().items())
    twin = copy.deepcopy(network)
    trained = network.train()(x)
    assert torch.equal(trained, twin.train()(x))
    assert not torch.equal(trained, first)
    changed = {k for k, v in network.state_dict().items() if not torch.equal(before[k], v)}
    assert changed == {k for k in before if "running_" in k or "num_batches" in k}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_channels_last_is_kept(dtype: torch.dtype) -> None:
    network, x = small().to(dtype).eval(), volumes(1).to(dtype)
    expected = network(x)
    assert expected.is_contiguous()
    result = network.to(memory_format=LAST)(x.to(memory_format=LAST))
    assert result.is_contiguous(memory_format=LAST)
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)


# ---- Derivatives ----


def test_gradients_reach_every_parameter() -> None:
    # In evaluation mode: batch statistics would cancel the biases before them.
    network, x = small().eval(), volumes(1).requires_grad_()
    objective(network(x)).backward()
    for name, tensor in [("volumes", x), *network.named_parameters()]:
        assert tensor.grad is not None, name
        assert tensor.grad.isfinite().all(), name
        assert tensor.grad.ne(0).any(), name


@pytest.mark.parametrize("training", [False, True])
def test_derivatives(training: bool) -> None:
    network = small().double().train(training)
    names, parameters = zip(*network.named_parameters(), strict=True)
    sizes = [p.numel() for p in parameters]

    def forward(x: Tensor, flat: Tensor) -> Tensor:
        pieces = zip(flat.split(sizes), parameters, strict=True)
        state = dict(zip(names, [v.view_as(p) for v, p in pieces], strict=True))
        return torch.func.functional_call(network, state, (x,))

    x = volumes(2 if training else 1).double().requires_grad_()
    flat = torch.cat([p.detach().flatten() for p in parameters]).requires_grad_()
    assert torch.autograd.gradcheck(forward, (x, flat), fast_mode=True, atol=1e-4)


def test_checkpointing_changes_memory_alone() -> None:
    results = []
    for checkpointing in (False, True):
        network, x = small(checkpointing=checkpointing), volumes().requires_grad_()
        saved = 0

        def keep(tensor: Tensor) -> Tensor:
            nonlocal saved
            saved += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            value = objective(network(x))
        value.backward()
        gradients = [p.grad for p in network.parameters()]
        results.append((saved, [value, x.grad, *gradients, *network.buffers()]))
    (plain, expected), (less, got) = results
    assert less < 0.5 * plain
    assert all(map(torch.equal, got, expected))


# ---- Compilers, precision ----


def test_compile() -> None:
    torch._dynamo.reset()
    network, x = small().eval(), volumes(1)
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), network(x), rtol=1e-4, atol=1e-5)


def test_compile_with_checkpointing() -> None:
    torch._dynamo.reset()
    eager, x = small(checkpointing=True), volumes(2)
    other = copy.deepcopy(eager)
    objective(eager(x)).backward()
    objective(torch.compile(other, fullgraph=True, backend="aot_eager")(x)).backward()
    for (name, ours), theirs in zip(other.named_buffers(), eager.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=name)
    for (name, ours), theirs in zip(other.named_parameters(), eager.parameters(), strict=True):
        scale = theirs.grad.abs().max().item() + 1
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-2, atol=1e-4 * scale, msg=name)


def test_export_with_any_batch() -> None:
    network = small().eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(network, (volumes(3),), dynamic_shapes={"volumes": {0: batch}})
    x = volumes(2)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(x), network(x), rtol=1e-4, atol=1e-5)


def test_autocast() -> None:
    network, x = small().eval(), volumes(1)
    expected = network(x)
    with torch.autocast("cpu", torch.bfloat16):
        result = network(x)
    assert result.dtype == torch.bfloat16
    assert (result.float() - expected).abs().max() < 0.1 * expected.abs().max()
