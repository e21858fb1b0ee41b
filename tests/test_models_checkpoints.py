# SPDX-License-Identifier: Apache-2.0
"""Published weights: official names and shapes, what fits where, files that are none."""

from __future__ import annotations

import argparse
import pickle
import re
import struct
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import official_names as official
import pytest
import torch
from torch import Tensor, nn

from tritool.models import V2V, PoseResNet, load_imagenet_trunk, load_official_checkpoint

ROOT = Path(__file__).resolve().parent.parent


class Network(nn.Module):
    """A network's parts under the names of the official code."""

    def __init__(self, backbone: PoseResNet, volume_net: V2V | None = None) -> None:
        super().__init__()
        self.backbone = backbone
        if volume_net is not None:
            channels = volume_net.in_channels
            self.process_features = nn.Sequential(nn.Conv2d(backbone.feature_channels, channels, 1))
            self.volume_net = volume_net


def shapes(model: nn.Module) -> official.Shapes:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def tiny(depth: int = 18, joints: int = 5, **settings: Any) -> PoseResNet:
    return PoseResNet(depth, joints, **{"width": 4, "deconv_channels": 8, **settings})


def tiny_network(joints: int = 5) -> Network:
    return Network(tiny(joints=joints), V2V(3, joints, width=2))


def saved(content: Any, path: Path) -> Path:
    torch.save(content, path)
    return path


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(model: nn.Module, expected: dict[str, Tensor]) -> bool:
    ours = model.state_dict()
    return ours.keys() == expected.keys() and all(torch.equal(ours[k], expected[k]) for k in ours)


# ---- Names ----


def test_the_rules_count_as_the_official_files_do() -> None:
    # 151 convolutions of the trunk's main path and 4 shortcuts, each with the 5 of a batch norm.
    assert len(official.trunk(152)) == 6 * (151 + 4)
    assert len(official.backbone()) == len(official.trunk()) + 3 * 6 + 2


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, official.backbone()),
        ({"algebraic_confidences": True}, official.backbone(algebraic=True)),
        ({"volumetric_confidences": 32}, official.backbone(volumetric=True)),
    ],
    ids=["plain", "algebraic", "volumetric"],
)
def test_backbone_has_the_official_names(
    settings: dict[str, Any], expected: official.Shapes
) -> None:
    with torch.device("meta"):
        assert shapes(PoseResNet(**settings)) == expected


def test_volume_network_has_the_official_names() -> None:
    with torch.device("meta"):
        assert shapes(V2V(32, 17)) == official.volume_net()


@pytest.mark.parametrize("depth", [50, 101, 152])
def test_trunk_has_the_names_of_torchvision(depth: int) -> None:
    with torch.device("meta"):
        ours = shapes(PoseResNet(depth))
    heads = ("deconv_layers", "final_layer")
    assert {k: v for k, v in ours.items() if not k.startswith(heads)} == official.trunk(depth)


def counted(expected: official.Shapes) -> dict[str, Tensor]:
    """Tensors of these shapes, each full of its own number and small on disk."""
    return {
        name: torch.tensor(float(index)).expand(shape) if shape else torch.tensor(index)
        for index, (name, shape) in enumerate(expected.items())
    }


@pytest.mark.parametrize("kind", ["algebraic", "volumetric", "volumetric with confidences"])
def test_official_like_file_loads_strictly(kind: str, tmp_path: Path) -> None:
    with torch.device("meta"):
        if kind == "algebraic":
            expected = official.algebraic_network()
            model = Network(PoseResNet(algebraic_confidences=True))
        else:
            confidence = "with" in kind
            expected = official.volumetric_network(confidence=confidence)
            backbone = PoseResNet(volumetric_confidences=32 if confidence else 0)
            model = Network(backbone, V2V(32, 17))
    model.to_empty(device="cpu")
    tensors = counted(expected)
    path = saved({f"module.{k}": v for k, v in tensors.items()}, tmp_path / "weights.pth")
    report = load_official_checkpoint(model, path, strict=True)
    assert set(report.loaded) == set(expected)
    assert report.missing == report.unexpected == ()
    assert not report.resized
    for name, tensor in model.state_dict().items():
        assert tensor.eq(tensors[name].flatten()[0] if tensor.ndim else tensors[name]).all(), name


# ---- What fits where ----


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model", "model_state_dict"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_wrapped_files(wrapper: str | None, prefix: str, tmp_path: Path) -> None:
    source, model = tiny(), tiny()
    content: Any = {prefix + k: v for k, v in source.state_dict().items()}
    if wrapper:
        content = {"epoch": 3, wrapper: content}
    report = load_official_checkpoint(model, saved(content, tmp_path / "a.pth"), strict=True)
    assert same(model, state(source))
    assert len(report.loaded) == len(source.state_dict())
    assert str(report) == f"{tmp_path / 'a.pth'}: {len(report.loaded)} tensors loaded"


def test_files_before_the_zip_format(tmp_path: Path) -> None:
    source, model = tiny(), tiny()
    torch.save(source.state_dict(), tmp_path / "a.pth", _use_new_zipfile_serialization=False)
    load_official_checkpoint(model, tmp_path / "a.pth", strict=True)
    assert same(model, state(source))


def test_files_without_counters(tmp_path: Path) -> None:
    source, model = tiny(), tiny()
    content = {k: v for k, v in source.state_dict().items() if "num_batches" not in k}
    report = load_official_checkpoint(model, saved(content, tmp_path / "a.pth"), strict=True)
    assert report.missing == ()
    assert len(report.loaded) == len(content)
    assert same(model, state(source))


def test_dtype_is_the_model_s(tmp_path: Path) -> None:
    source, model = tiny().double(), tiny()
    load_official_checkpoint(model, saved(source.state_dict(), tmp_path / "a.pth"))
    assert same(model, state(source.float()))


def test_backbone_file_into_a_network(tmp_path: Path) -> None:
    source, model = tiny(), tiny_network()
    rest = {k: v for k, v in state(model).items() if not k.startswith("backbone.")}
    report = load_official_checkpoint(model, saved(source.state_dict(), tmp_path / "a.pth"))
    assert same(model.backbone, state(source))
    assert all(torch.equal(model.state_dict()[k], v) for k, v in rest.items())
    counters = {k for k in rest if k.endswith("num_batches_tracked")}
    assert set(report.missing) == rest.keys() - counters
    assert report.unexpected == ()
    assert "left as they were: process_features (2), volume_net (" in str(report)


def test_network_file_into_its_parts(tmp_path: Path) -> None:
    source = tiny_network()
    path = saved(source.state_dict(), tmp_path / "a.pth")
    backbone, volume_net = tiny(), V2V(3, 5, width=2)
    report = load_official_checkpoint(backbone, path)
    assert same(backbone, state(source.backbone))
    assert report.missing == ()
    assert all(k.startswith(("process_features.", "volume_net.")) for k in report.unexpected)
    assert "not used: process_features (2), volume_net (" in str(report)
    report = load_official_checkpoint(volume_net, path)
    assert same(volume_net, state(source.volume_net))
    assert all(k.startswith(("process_features.", "backbone.")) for k in report.unexpected)


def test_strict_names_what_is_left_over(tmp_path: Path) -> None:
    with_branch, without = tiny(algebraic_confidences=True), tiny()
    path = saved(with_branch.state_dict(), tmp_path / "a.pth")
    before = state(without)
    with pytest.raises(ValueError, match=r"a\.pth: .* no place for alg_confidences \(20\)"):
        load_official_checkpoint(without, path, strict=True)
    assert same(without, before)
    load_official_checkpoint(without, path)
    before = state(with_branch)
    path = saved(without.state_dict(), tmp_path / "b.pth")
    with pytest.raises(ValueError, match=r"b\.pth: it lacks 18 tensors .* alg_confidences"):
        load_official_checkpoint(with_branch, path, strict=True)
    assert same(with_branch, before)
    report = load_official_checkpoint(with_branch, path)
    assert {k.split(".")[0] for k in report.missing} == {"alg_confidences"}


@pytest.mark.parametrize("here", [3, 9])
def test_heads_of_another_number_of_joints(here: int, tmp_path: Path) -> None:
    there = 6

    def network(joints: int) -> Network:
        return Network(tiny(joints=joints, algebraic_confidences=True), V2V(3, joints, width=2))

    source, model = network(there), network(here)
    for parameter in source.parameters():
        nn.init.normal_(parameter)
    path = saved(source.state_dict(), tmp_path / "a.pth")
    torch.manual_seed(1)
    report = load_official_checkpoint(model, path, strict=True)
    heads = ["backbone.final_layer", "backbone.alg_confidences.head.4", "volume_net.output_layer"]
    names = {f"{head}.{kind}" for head in heads for kind in ("weight", "bias")}
    assert report.resized == dict.fromkeys(names, (there, here))
    assert set(report.loaded) == model.state_dict().keys() - names
    for name, ours in model.state_dict().items():
        theirs = source.state_dict()[name]
        kept = min(here, there) if name in names else None
        assert torch.equal(ours[:kept] if kept else ours, theirs[:kept] if kept else theirs), name
        if kept and kept < here:
            new = ours[kept:]
            if name.endswith("bias"):
                assert new.eq(0).all()
            else:
                limit = (6 / (ours[:, 0].numel() + ours[0].numel())) ** 0.5
                assert 0.5 * limit < new.abs().max() <= limit
    text = str(report)
    expected = f"the first {here} of 6 joints" if here < there else "all 6 joints, 3 drawn anew"
    assert f"  backbone.final_layer.weight: {expected}\n" in text


# ---- ImageNet ----


def classifier(depth: int = 18, width: int = 4) -> dict[str, Tensor]:
    """A state dict like torchvision's."""
    network = PoseResNet(depth, 5, width=width, deconv_channels=8)
    heads = ("deconv_layers", "final_layer")
    trunk = {k: v for k, v in network.state_dict().items() if not k.startswith(heads)}
    channels = 8 * width * (4 if depth > 34 else 1)
    return trunk | {"fc.weight": torch.zeros(10, channels), "fc.bias": torch.zeros(10)}


@pytest.mark.parametrize("whole", [False, True])
def test_imagenet_trunk(whole: bool, tmp_path: Path) -> None:
    content = classifier()
    backbone = tiny(algebraic_confidences=True)
    model = tiny_network() if whole else backbone
    before = state(model)
    report = load_imagenet_trunk(model, saved(content, tmp_path / "resnet.pth"))
    prefix = "backbone." if whole else ""
    trunk = {prefix + k for k in content if not k.startswith("fc.")}
    assert set(report.loaded) == trunk
    assert report.unexpected == ("fc.weight", "fc.bias")
    for name, tensor in model.state_dict().items():
        expected = content[name.removeprefix(prefix)] if name in trunk else before[name]
        assert torch.equal(tensor, expected), name


def test_imagenet_trunk_is_complete_or_not_loaded(tmp_path: Path) -> None:
    content = classifier()
    for gone in ("bn1.weight", "layer4."):
        part = {k: v for k, v in content.items() if not k.startswith(gone)}
        model = tiny()
        before = state(model)
        with pytest.raises(ValueError, match=rf"a\.pth: it lacks \d+ .*{gone}"):
            load_imagenet_trunk(model, saved(part, tmp_path / "a.pth"))
        assert same(model, before)


def test_imagenet_trunk_of_torchvision(tmp_path: Path) -> None:
    models = pytest.importorskip("torchvision.models", reason="torchvision is not installed")
    theirs = models.resnet50(weights=None)
    model = PoseResNet(50)
    report = load_imagenet_trunk(model, saved(theirs.state_dict(), tmp_path / "resnet50.pth"))
    assert set(report.loaded) == set(official.trunk(50))
    assert report.unexpected == ("fc.weight", "fc.bias")
    assert torch.equal(model.layer4[2].conv3.weight, theirs.layer4[2].conv3.weight)


# ---- What does not fit ----


@pytest.mark.parametrize("load", [load_official_checkpoint, load_imagenet_trunk])
@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (lambda: classifier(34), r"it has \d+ tensors too many, such as layer1\.2\."),
        (lambda: classifier(50), r"such as layer1\.0\.bn3\.bias"),
        (lambda: classifier(width=6), r"conv1\.weight is \(6, 3, 7, 7\), the model's \(4, 3"),
        (lambda: classifier() | {"conv1.weight": torch.zeros(4, 3, 5, 5)}, "conv1.weight is"),
        (lambda: classifier() | {"bn1.bias": torch.zeros(4).int()}, "bn1.bias is of torch.int32"),
        (lambda: classifier() | {"bn1.bias": torch.zeros(4).to_sparse()}, "not a plain tensor"),
        (lambda: classifier() | {"bn1.bias": torch.zeros(4, device="meta")}, "not a plain"),
        (lambda: classifier() | {"module.bn1.bias": torch.zeros(4)}, "holds bn1.bias twice"),
        (lambda: classifier() | {"bn1.bias": 3}, "'bn1.bias' is of type int"),
        (lambda: {"x": torch.zeros(2)}, "no tensor in it has a name of the model's"),
        (lambda: {1: torch.zeros(2)}, "no dict of named tensors"),
        (lambda: {"state_dict": {}}, "no dict of named tensors"),
        (lambda: torch.zeros(2), "no dict of named tensors"),
        (lambda: [classifier()], "no dict of named tensors"),
        (lambda: {"a": argparse.Namespace()}, r"Python objects .*argparse\.Namespace"),
    ],
)
def test_files_that_do_not_fit(
    load: Callable[..., Any], content: Callable[[], Any], reason: str, tmp_path: Path
) -> None:
    model = tiny()
    before = state(model)
    path = saved(content(), tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=reason) as caught:
        load(model, path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)
    assert same(model, before)


def test_the_last_tensor_counts_as_much_as_the_first(tmp_path: Path) -> None:
    model = tiny_network()
    before = state(model)
    content = {k: torch.ones_like(v) for k, v in before.items()}
    last = list(content)[-2]
    content[last] = torch.ones(7, 7)
    with pytest.raises(ValueError, match=re.escape(last)):
        load_official_checkpoint(model, saved(content, tmp_path / "a.pth"))
    assert same(model, before)


def test_model_without_memory(tmp_path: Path) -> None:
    path = saved(tiny().state_dict(), tmp_path / "a.pth")
    with torch.device("meta"):
        model = tiny()
    with pytest.raises(ValueError, match="of the model is on the meta device"):
        load_official_checkpoint(model, path)


# ---- Files that are none ----


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"PK",
        b"PK\x03\x04" + bytes(100),
        b"<!DOCTYPE html>\n<html>",
        b"version https://git-lfs.github.com/spec/v1\n",
        b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M",
        pickle.dumps({"conv1.weight": 1}, protocol=2),
        bytes(range(200)),
        struct.pack("<Q", 10**9) + b"{}",
    ],
)
def test_files_of_other_kinds(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"not a file of torch\.save|damaged") as caught:
        load_official_checkpoint(tiny(), path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_other_zip_files(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.pth", "w") as archive:
        archive.writestr("poem.txt", "none")
    with pytest.raises(ValueError, match=r"a\.pth: it is damaged, incomplete or not a file"):
        load_official_checkpoint(tiny(), tmp_path / "a.pth")


@pytest.mark.parametrize("zipped", [True, False])
def test_incomplete_files(zipped: bool, tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    torch.save(tiny().state_dict(), path, _use_new_zipfile_serialization=zipped)
    whole = path.read_bytes()
    model = tiny()
    before = state(model)
    for share in (0.1, 0.5, 0.99):
        path.write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(ValueError, match=r"a\.pth: it is damaged"):
            load_official_checkpoint(model, path)
    assert same(model, before)


def test_flipped_bits_are_noticed(tmp_path: Path) -> None:
    path = saved({"conv1.weight": torch.ones(4, 3, 7, 7)}, tmp_path / "a.pth")
    content = bytearray(path.read_bytes())
    content[content.index(struct.pack("<4f", 1, 1, 1, 1)) + 6] ^= 4
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.pth: it is damaged: the checksum of a/data/0"):
        load_official_checkpoint(tiny(), path)


def test_nothing_but_tensors_is_unpickled(tmp_path: Path) -> None:
    class Intruder:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "was here",))

    path = saved({"conv1.weight": Intruder()}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match="Python objects besides tensors"):
        load_official_checkpoint(tiny(), path)
    assert not (tmp_path / "was here").exists()


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.pth"):
        load_official_checkpoint(tiny(), tmp_path / "none.pth")
    with pytest.raises(IsADirectoryError):
        load_official_checkpoint(tiny(), tmp_path)


def test_safetensors(tmp_path: Path) -> None:
    package = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    source, model = tiny(), tiny()
    path = tmp_path / "weights.pth"  # the name does not matter
    package.save_file(source.state_dict(), path)
    load_official_checkpoint(model, path, strict=True)
    assert same(model, state(source))
    content = path.read_bytes()
    path.write_bytes(content[:-8])
    with pytest.raises(ValueError, match=r"weights\.pth: it is damaged"):
        load_official_checkpoint(model, path)


def test_safetensors_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    header = b'{"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ImportError, match=r"a\.safetensors needs .* pip install safetensors"):
        load_official_checkpoint(tiny(), path)


# ---- The page ----


def test_parameter_counts_on_the_page() -> None:
    page = (ROOT / "docs" / "models.md").read_text()
    rows = re.findall(r"^\| `(\w+\([^`]*\))` \| [^|]*\| ([\d.]+) \|$", page, re.MULTILINE)
    assert len(rows) >= 6
    with torch.device("meta"):
        for code, millions in rows:
            model = eval(code, {"PoseResNet": PoseResNet, "V2V": V2V})
            count = sum(p.numel() for p in model.parameters())
            assert f"{count / 1e6:.1f}" == millions, code
