# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import copy
import errno
import os
import resource
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from training_runs import tiny

from tritool.training import Config, state
from tritool.training.state import (
    CheckpointError,
    load_state,
    read_model,
    save_state,
    write_model,
)


def network(width: int = 4) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, width, (3, 2)), nn.BatchNorm2d(width), nn.Conv2d(width, 2, 1))


def trained() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(2, 3, 6, 5)).square().sum().backward()
        optimizer.step()
    return model, optimizer


def test_all_comes_back_bit_for_bit(tmp_path: Path) -> None:
    model, optimizer = trained()
    average = {name: value + 1 for name, value in model.state_dict().items()}
    path = tmp_path / "last.safetensors"
    told = {"best": 0.1 + 0.2, "validated": 2}
    save_state(path, model, tiny(), 3, optimizer=optimizer, ema=average, trainer=told)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask()

    other = network()
    # The layout of the weights is that of the network, not of the file.
    other[0].weight.data = other[0].weight.data.contiguous(memory_format=torch.channels_last)
    stepper = torch.optim.Adam(other.parameters(), lr=0.1)
    averaged: dict[str, torch.Tensor] = {}
    info = load_state(path, other, tiny(), optimizer=stepper, ema=averaged)
    assert (info["step"], info["kind"], info["trainer"]) == (3, "algebraic", told)
    for name, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], value)
        assert torch.equal(averaged[name], value + 1)
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        for key, value in optimizer.state[one].items():
            assert torch.equal(stepper.state[two][key], value)
    assert stepper.state[other[0].weight]["exp_avg"].stride() == other[0].weight.stride()

    weights, info = read_model(path, kind="algebraic")
    assert Config.from_dict(info["config"]) == tiny()
    assert all(torch.equal(weights[name], average[name]) for name in average)


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_weights_alone_in_half_precision(tmp_path: Path) -> None:
    model = network()
    state_dict = model.state_dict()
    state_dict["1.running_var"].fill_(1e6)
    state_dict["2.bias"][0] = 1e6
    path = tmp_path / "small.safetensors"
    write_model(path, model, tiny(), 5, dtype=torch.float16, notes={"error": 1.5})
    weights, info = read_model(path)
    assert info["step"] == 5
    assert info["notes"] == {"error": 1.5}
    assert {t.dtype for t in weights.values()} == {torch.float32, torch.int64}
    assert torch.equal(weights["0.weight"], state_dict["0.weight"].half().float())
    for exact in ("1.running_var", "2.bias"):
        assert torch.equal(weights[exact], state_dict[exact])
    # And from tensors by name, such as those of another file.
    write_model(path, weights, tiny(), 5)
    assert torch.equal(read_model(path)[0]["0.weight"], weights["0.weight"])
    with pytest.raises(CheckpointError, match="weights alone"):
        load_state(path, model, tiny())


def test_weights_alone_in_8_bits(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(64, 24, 3), nn.BatchNorm2d(24))
    with torch.no_grad():
        model[0].weight *= torch.logspace(-3, 3, 24)[:, None, None, None]
        model[0].weight[5] = 0
    path = tmp_path / "small.safetensors"
    write_model(path, model, tiny(), 5, dtype=torch.int8)
    state_dict = model.state_dict()
    weights, _ = read_model(path)
    assert weights.keys() == state_dict.keys()
    true, found = state_dict["0.weight"].flatten(1), weights["0.weight"].flatten(1)
    largest = true.abs().amax(1, keepdim=True)
    # Half a step of 127, in every channel, however small.
    assert ((found - true).abs() <= largest * (0.501 / 127)).all()
    assert (found != true).any()
    assert torch.equal(weights["0.bias"], state_dict["0.bias"].half().float())
    assert torch.equal(weights["1.running_var"], state_dict["1.running_var"])
    write_model(tmp_path / "half.safetensors", model, tiny(), 5, dtype=torch.float16)
    assert path.stat().st_size < 0.6 * (tmp_path / "half.safetensors").stat().st_size


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 4
    path.write_bytes(data)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def foreign(path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(2)}, path)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (cut, "damaged"),
        (flip, "checksum"),
        (empty, "damaged"),
        (foreign, "safetensors file of something else"),
    ],
)
def test_what_is_no_checkpoint_is_said(
    tmp_path: Path, harm: Callable[[Path], None], message: str
) -> None:
    path = tmp_path / "last.safetensors"
    model, optimizer = trained()
    save_state(path, model, tiny(), 3, optimizer=optimizer)
    harm(path)
    before = copy.deepcopy(model.state_dict())
    for read in (lambda: load_state(path, model, tiny()), lambda: read_model(path)):
        with pytest.raises(CheckpointError, match=message) as caught:
            read()
        assert str(caught.value).startswith(f"{path}: ")
        assert "\n" not in str(caught.value)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_checkpoints_of_something_else(tmp_path: Path) -> None:
    path = tmp_path / "last.safetensors"
    save_state(path, network(), tiny(), 3)
    with pytest.raises(CheckpointError, match=r"another network: 0.weight is \(4, 3, 3, 2\), here"):
        load_state(path, network(5), tiny())
    with pytest.raises(CheckpointError, match=r"training\.seed is 0, here 1"):
        load_state(path, network(), tiny(seed=1))
    with pytest.raises(CheckpointError, match=r"another network: 0.weight is not there"):
        load_state(path, network(), tiny(), ema={})
    with pytest.raises(CheckpointError, match="of kind algebraic, not volumetric"):
        read_model(path, kind="volumetric")
    with pytest.raises(FileNotFoundError):
        read_model(tmp_path / "none.safetensors")
    # How long a run goes on and what it tells may change.
    assert load_state(path, network(), tiny(steps=99, log_every=3, workers=1))["step"] == 3


def test_a_full_disk_leaves_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "last.safetensors"
    save_state(path, network(), tiny(), 3)
    before = path.read_bytes()

    def full(tensors: object, aside: Path, metadata: object) -> None:
        aside.write_bytes(before[:100])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(state, "_save_file", full)
        with pytest.raises(OSError, match="No space left") as caught:
            save_state(path, network(), tiny(), 4)
    assert caught.value.filename == str(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_that_the_system_refuses_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "last.safetensors"
    save_state(path, network(), tiny(), 3)
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, hard))
    try:
        with pytest.raises(OSError, match="cannot be written") as caught:
            save_state(path, network(), tiny(), 4)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.errno == errno.EFBIG
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
