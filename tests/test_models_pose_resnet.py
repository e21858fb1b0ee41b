# SPDX-License-Identifier: Apache-2.0
"""The 2D network: shapes, values against a second forward, derivatives, compilers."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tritool.models import PoseResNet, PoseResNetOutput

DEPTHS = (18, 34, 50, 101, 152)


def small(depth: int = 18, *, branches: bool = True, checkpointing: bool = False) -> PoseResNet:
    """A narrow network whose running statistics are not those of initialisation."""
    torch.manual_seed(0)
    network = PoseResNet(
        depth,
        num_joints=5,
        algebraic_confidences=branches,
        volumetric_confidences=3 if branches else 0,
        width=4,
        deconv_channels=6,
        checkpointing=checkpointing,
    )
    return live(network)


def live(network: PoseResNet) -> PoseResNet:
    """Statistics and outputs as after training, so that nothing hides behind zeros and ones."""
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, mean=0.1, std=0.2)
        norm.momentum = 1.0
    for name, parameter in network.named_parameters():
        last = name.endswith(("final_layer.weight", "head.4.weight"))
        if last or (name.endswith(".bias") and parameter.eq(0).all()):
            nn.init.normal_(parameter, std=0.2)
    with torch.no_grad():
        network.train()(images(4))
    for norm in norms:
        norm.momentum = 0.1
        norm.running_var *= torch.empty_like(norm.running_var).uniform_(0.8, 1.2)
    return network


def images(*batch: int, height: int = 128, width: int = 160) -> Tensor:
    return torch.randn(*batch, 3, height, width, generator=torch.Generator().manual_seed(1))


def outputs(result: PoseResNetOutput) -> list[Tensor]:
    return [tensor for tensor in result if tensor is not None]


def objective(result: PoseResNetOutput) -> Tensor:
    """A scalar that no normalisation can make constant."""
    total = torch.zeros((), dtype=result.heatmaps.dtype)
    for tensor in outputs(result):
        factors = torch.linspace(-1, 2, tensor.numel(), dtype=tensor.dtype).reshape(tensor.shape)
        total = total + (tensor * factors).sum() + tensor.square().mean()
    return total


# ---- Shapes ----


@pytest.mark.parametrize("depth", DEPTHS)
def test_shapes_at_every_depth(depth: int) -> None:
    with torch.device("meta"):
        network = PoseResNet(depth, algebraic_confidences=True, volumetric_confidences=32)
        result = network(torch.empty(2, 3, 384, 320))
    assert result.heatmaps.shape == (2, 17, 96, 80)
    assert result.features.shape == (2, 256, 96, 80)
    assert result.algebraic_confidences.shape == (2, 17)
    assert result.volumetric_confidences.shape == (2, 32)
    trunk = [n for n, _ in network.named_modules() if n.startswith("layer") and "conv" in n]
    # The depth of a residual network counts its convolutions and its classifier.
    assert len(trunk) + 2 == depth


def test_batch_dimensions_lead() -> None:
    network = small().eval()
    views = images(2, 3)
    together = network(views)
    assert together.heatmaps.shape == (2, 3, 5, 32, 40)
    assert together.features.shape == (2, 3, 6, 32, 40)
    assert together.algebraic_confidences.shape == (2, 3, 5)
    assert together.volumetric_confidences.shape == (2, 3, 3)
    for b in range(2):
        for ours, alone in zip(together, network(views[b]), strict=True):
            torch.testing.assert_close(ours[b], alone)


def test_outputs_without_branches_are_none() -> None:
    result = small(branches=False)(images(2, height=32, width=64))
    assert result.heatmaps.shape == (2, 5, 8, 16)
    assert result.algebraic_confidences is None
    assert result.volumetric_confidences is None


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((3, 128, 128), "with a batch dimension"),
        ((2, 1, 128, 128), r"\[\.\.\., 3, H, W\]"),
        ((2, 3, 128, 100), "multiples of 32"),
        ((2, 3, 0, 128), "at least 128 with confidence branches"),
        ((2, 3, 96, 128), "at least 128 with confidence branches"),
    ],
)
def test_shapes_that_do_not_fit(shape: tuple[int, ...], words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        small()(torch.zeros(shape))
    assert str(shape) in str(caught.value)


def test_images_must_be_floating_point() -> None:
    with pytest.raises(TypeError, match=r"images .* torch\.uint8"):
        small()(torch.zeros(1, 3, 128, 128, dtype=torch.uint8))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"depth": 20}, "depth must be one of 18, 34, 50, 101, 152, got 20"),
        ({"num_joints": 0}, "num_joints must be at least 1"),
        ({"width": 0}, "width must be at least 1"),
        ({"deconv_channels": 0}, "deconv_channels must be at least 1"),
        ({"volumetric_confidences": -1}, "volumetric_confidences must be at least 0"),
    ],
)
def test_settings_that_do_not_fit(settings: dict[str, int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        PoseResNet(**settings)


# ---- Values ----


class Plain:
    """The network once more, from its state dict alone."""

    def __init__(self, network: PoseResNet) -> None:
        self.tensors = network.state_dict()

    def conv(self, name: str, x: Tensor, stride: int = 1, padding: int = 0) -> Tensor:
        bias = self.tensors.get(f"{name}.bias")
        return F.conv2d(x, self.tensors[f"{name}.weight"], bias, stride, padding)

    def norm(self, name: str, x: Tensor) -> Tensor:
        def vector(v: str) -> Tensor:
            return self.tensors[f"{name}.{v}"][:, None, None]

        scale = vector("weight") / (vector("running_var") + 1e-5).sqrt()
        return (x - vector("running_mean")) * scale + vector("bias")

    def block(self, name: str, x: Tensor, stride: int) -> Tensor:
        if f"{name}.conv3.weight" in self.tensors:
            y = self.norm(f"{name}.bn1", self.conv(f"{name}.conv1", x)).relu()
            y = self.norm(f"{name}.bn2", self.conv(f"{name}.conv2", y, stride, 1)).relu()
            y = self.norm(f"{name}.bn3", self.conv(f"{name}.conv3", y))
        else:
            y = self.norm(f"{name}.bn1", self.conv(f"{name}.conv1", x, stride, 1)).relu()
            y = self.norm(f"{name}.bn2", self.conv(f"{name}.conv2", y, 1, 1))
        if f"{name}.downsample.0.weight" in self.tensors:
            x = self.norm(f"{name}.downsample.1", self.conv(f"{name}.downsample.0", x, stride))
        return (x + y).relu()

    def confidences(self, name: str, x: Tensor) -> Tensor:
        for conv, norm in ((0, 1), (4, 5)):
            x = self.conv(f"{name}.features.{conv}", x, 1, 1)
            x = F.max_pool2d(self.norm(f"{name}.features.{norm}", x), 2).relu()
        x = x.mean((-2, -1))
        for index in (0, 2, 4):
            layer = f"{name}.head.{index}"
            x = x @ self.tensors[f"{layer}.weight"].T + self.tensors[f"{layer}.bias"]
            x = x.relu() if index < 4 else 1 / (1 + (-x).exp())
        return x

    def __call__(self, x: Tensor) -> PoseResNetOutput:
        x = F.max_pool2d(self.norm("bn1", self.conv("conv1", x, 2, 3)).relu(), 3, 2, 1)
        for stage in range(1, 5):
            block = 0
            while f"layer{stage}.{block}.conv1.weight" in self.tensors:
                stride = 2 if stage > 1 and block == 0 else 1
                x = self.block(f"layer{stage}.{block}", x, stride)
                block += 1
        algebraic = self.confidences("alg_confidences", x)
        volumetric = self.confidences("vol_confidences", x)
        for index in (0, 3, 6):
            weight = self.tensors[f"deconv_layers.{index}.weight"]
            x = F.conv_transpose2d(x, weight, stride=2, padding=1)
            x = self.norm(f"deconv_layers.{index + 1}", x).relu()
        return PoseResNetOutput(self.conv("final_layer", x), x, algebraic, volumetric)


@pytest.mark.parametrize("depth", [18, 50])
def test_values_are_those_of_a_second_forward(depth: int) -> None:
    network = small(depth).double().eval()
    x = images(2).double()
    with torch.no_grad():
        for ours, theirs in zip(network(x), Plain(network)(x), strict=True):
            assert theirs.std() > 1e-6  # nothing to compare otherwise
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_trunk_is_that_of_torchvision() -> None:
    models = pytest.importorskip("torchvision.models", reason="torchvision is not installed")
    for depth in (18, 50):
        theirs = getattr(models, f"resnet{depth}")(weights=None).eval()
        ours = PoseResNet(depth).eval()
        state = {k: v for k, v in theirs.state_dict().items() if not k.startswith("fc.")}
        missing, unexpected = ours.load_state_dict(state, strict=False)
        assert not unexpected
        assert {name.split(".")[0] for name in missing} == {"deconv_layers", "final_layer"}
        x = images(1, height=64, width=96)
        with torch.no_grad():
            for network in (ours, theirs):
                y = network.maxpool(network.relu(network.bn1(network.conv1(x))))
                for stage in range(1, 5):
                    y = getattr(network, f"layer{stage}")(y)
                network.result = y
        torch.testing.assert_close(ours.result, theirs.result)


def test_initial_weights() -> None:
    torch.manual_seed(0)
    network = PoseResNet(18, algebraic_confidences=True, volumetric_confidences=32)
    for name, fan in (
        ("layer1.0.conv1", 64 * 9),
        ("layer4.1.conv2", 512 * 9),
        ("deconv_layers.3", 256 * 16),
        ("alg_confidences.head.0", 256),
    ):
        weight = network.get_submodule(name).weight
        assert abs(weight.std().item() / math.sqrt(2 / fan) - 1) < 0.05, name
    assert network.final_layer.weight.std() < 2e-3
    assert all(p.eq(0).all() for n, p in network.named_parameters() if n.endswith(".bias"))
    with torch.no_grad():
        result = network.train()(images(2))
    # Flat maps, equal weights: also after the factor 100 before the softmax.
    assert 100 * result.heatmaps.flatten(-2).std(-1).max() < 5
    assert (result.algebraic_confidences - 0.5).abs().max() < 0.05
    assert (result.volumetric_confidences - 0.5).abs().max() < 0.05


def test_modes() -> None:
    network, x = small(), images(2)
    before = copy.deepcopy(network.state_dict())
    network.eval()
    first, second = network(x), network(x)
    assert all(map(torch.equal, first, second))
    assert all(torch.equal(before[k], v) for k, v in network.state_dict().items())
    twin = copy.deepcopy(network)
    trained, again = network.train()(x), twin.train()(x)
    assert all(map(torch.equal, trained, again))
    assert not torch.equal(trained.heatmaps, first.heatmaps)
    changed = {k for k, v in network.state_dict().items() if not torch.equal(before[k], v)}
    assert changed == {k for k in before if "running_" in k or "num_batches" in k}


def test_channels_last_is_kept() -> None:
    network, x = small().eval(), images(2)
    expected = network(x)
    last = torch.channels_last
    result = network.to(memory_format=last)(x.to(memory_format=last))
    assert result.heatmaps.is_contiguous(memory_format=last)
    assert result.features.is_contiguous(memory_format=last)
    for ours, theirs in zip(result, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


# ---- Derivatives ----


def test_gradients_reach_every_parameter() -> None:
    # In evaluation mode: batch statistics would cancel the biases before them.
    network, x = small().eval(), images(2).requires_grad_()
    objective(network(x)).backward()
    for name, tensor in [("images", x), *network.named_parameters()]:
        assert tensor.grad is not None, name
        assert tensor.grad.isfinite().all(), name
        assert tensor.grad.ne(0).any(), name


@pytest.mark.parametrize("training", [False, True])
def test_derivatives(training: bool) -> None:
    torch.manual_seed(0)
    network = live(PoseResNet(18, 2, width=2, deconv_channels=2)).double().train(training)
    names, parameters = zip(*network.named_parameters(), strict=True)
    sizes = [p.numel() for p in parameters]

    def forward(x: Tensor, flat: Tensor) -> tuple[Tensor, ...]:
        pieces = zip(flat.split(sizes), parameters, strict=True)
        state = dict(zip(names, [v.view_as(p) for v, p in pieces], strict=True))
        return tuple(outputs(torch.func.functional_call(network, state, (x,))))

    x = images(2, height=32, width=64).double().requires_grad_()
    flat = torch.cat([p.detach().flatten() for p in parameters]).requires_grad_()
    assert torch.autograd.gradcheck(forward, (x, flat), fast_mode=True, atol=1e-4)


def test_checkpointing_changes_memory_alone() -> None:
    results = []
    for checkpointing in (False, True):
        network, x = small(50, checkpointing=checkpointing), images(2).requires_grad_()
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
    assert less < 0.6 * plain
    assert all(map(torch.equal, got, expected))


# ---- Compilers, precision ----


@pytest.mark.parametrize("depth", [18, 50])
def test_compile(depth: int) -> None:
    torch._dynamo.reset()
    network, x = small(depth).eval(), images(1, 2)
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for ours, theirs in zip(compiled(x), network(x), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_compile_with_checkpointing() -> None:
    torch._dynamo.reset()
    eager, x = small(checkpointing=True), images(2)
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
    program = torch.export.export(network, (images(3),), dynamic_shapes={"images": {0: batch}})
    x = images(2)
    with torch.no_grad():
        for ours, theirs in zip(program.module()(x), network(x), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_autocast() -> None:
    network, x = small().eval(), images(2)
    expected = network(x)
    with torch.autocast("cpu", torch.bfloat16):
        result = network(x)
    for ours, theirs in zip(result, expected, strict=True):
        assert ours.dtype == torch.bfloat16
        assert (ours.float() - theirs).abs().max() < 0.1 * theirs.abs().max()
