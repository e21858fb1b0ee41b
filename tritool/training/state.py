# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: weights, optimizer and where training stands, in one safetensors file.

A file appears whole or not at all, and what is read from it is checked first. Names of tensors:
`model.NAME`, `ema.NAME` and `optimizer.NAME.KEY`, NAME as in the network's own `state_dict`. The
header holds JSON under "tritool". No random state is kept: what is drawn depends on the seed and
the number of the step.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable, Mapping, MutableMapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tritool.data.recording import written_aside
from tritool.training.config import Config

__all__ = ["CheckpointError", "load_state", "read_model", "save_state", "write_model"]

VERSION = 1
_KEY = "tritool"
# What may differ between a run and its continuation: how long it goes on and what it tells.
_FREE = frozenset(
    {
        "name",
        "training.steps",
        "training.epochs",
        "training.workers",
        "training.log_every",
        "training.validate_every",
        "training.save_every",
        "training.validation_samples",
        "training.pictures",
        "training.tensorboard",
        # First weights: the checkpoint's replace them.
        "model.backbone_from",
        "model.official_checkpoint",
        "model.imagenet_trunk",
    }
)
# Statistics of batch norm: few, and without an upper bound, so they are never stored in float16.
_STATISTICS = ("running_mean", "running_var")


class CheckpointError(ValueError):
    """What is wrong with a checkpoint, in one line that starts with the file's name."""


def save_state(
    path: str | os.PathLike[str],
    model: nn.Module,
    config: Config,
    step: int,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    ema: Mapping[str, Tensor] | None = None,
    trainer: Mapping[str, Any] | None = None,
) -> None:
    """Writes all that training needs to go on.

    Args:
        path: The file; one that is there is replaced once the new one is whole and on the disk.
        model: The network.
        config: Of the run.
        step: How many steps are done.
        optimizer: Over parameters of `model`.
        ema: The averaged weights, by the names of `model.state_dict()`.
        trainer: What else there is to remember, as JSON holds it.

    Raises:
        OSError: The file cannot be written; the old one is untouched.
    """
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    if ema is not None:
        tensors |= {f"ema.{name}": tensor for name, tensor in ema.items()}
    if optimizer is not None:
        for name, state in _optimizer_states(model, optimizer):
            tensors |= {f"optimizer.{name}.{key}": value for key, value in state.items()}
    _write(Path(path), tensors, config, step, {"trainer": dict(trainer or {})})


def load_state(
    path: str | os.PathLike[str],
    model: nn.Module,
    config: Config,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    ema: MutableMapping[str, Tensor] | None = None,
) -> dict[str, Any]:
    """Reads what `save_state` wrote into a network, its optimizer and its averaged weights.

    Args:
        path: The file.
        model: The network; untouched if anything raises.
        config: Of the run; the checkpoint's must be the same but for lengths, intervals, outputs
            and first weights.
        optimizer: Over parameters of `model`, with nothing in it yet.
        ema: Filled with the averaged weights.

    Returns:
        The header: `step`, `kind`, `config`, `trainer`, `version`.

    Raises:
        OSError: The file cannot be read.
        CheckpointError: It is no checkpoint, damaged, without a state of training, or of another
            network or configuration: one line.
    """
    tensors, info = _read(path)
    if "trainer" not in info:
        raise CheckpointError(f"{path}: it has weights alone; training cannot go on from it")
    _check_config(path, info["config"], config)
    weights = _below("model.", tensors)
    _check_fits(path, weights, model.state_dict())
    averaged = _below("ema.", tensors)
    if ema is not None:
        _check_fits(path, averaged, model.state_dict())
    parameters = dict(model.named_parameters())
    states: dict[str, dict[str, Tensor]] = {}
    for name, value in _below("optimizer.", tensors).items():
        parameter, _, key = name.rpartition(".")
        if parameter not in parameters:
            raise CheckpointError(f"{path}: there is no parameter {parameter} in this network")
        states.setdefault(parameter, {})[key] = value

    model.load_state_dict(weights)
    if ema is not None:
        own = model.state_dict()
        ema.update({name: _like(value, own[name]) for name, value in averaged.items()})
    if optimizer is not None:
        for name, state in states.items():
            # In the layout of the parameter: other layouts may round in another way.
            optimizer.state[parameters[name]] = {
                key: _like(value, parameters[name])
                if value.shape == parameters[name].shape
                else value.clone()
                for key, value in state.items()
            }
    return info


def write_model(
    path: str | os.PathLike[str],
    model: nn.Module | Mapping[str, Tensor],
    config: Config,
    step: int,
    *,
    dtype: torch.dtype | None = None,
    notes: Mapping[str, Any] | None = None,
) -> None:
    """Writes the weights alone, for use and publication.

    Args:
        path: The file.
        model: The network, or its tensors by name.
        config: Of the run.
        step: After how many steps.
        dtype: Of the stored weights, such as `torch.float16` for half the size, or `torch.int8` for
            a quarter: whole numbers with a scale for each output channel, and small tensors in
            float16. The statistics of batch norm, and tensors that would overflow, stay as they
            are. None: all do.
        notes: What else the header is to say, as JSON holds it.

    Raises:
        OSError: The file cannot be written; an old one is untouched.
    """
    own = model.state_dict() if isinstance(model, nn.Module) else model
    tensors = {}
    for name, tensor in own.items():
        stored = tensor
        if dtype is not None and tensor.is_floating_point() and not name.endswith(_STATISTICS):
            rounded = _rounded(tensor) if dtype == torch.int8 else None
            if rounded is not None:
                stored, tensors[f"scale.{name}"] = rounded
            else:
                smaller = tensor.to(torch.float16 if dtype == torch.int8 else dtype)
                # As finite as before: nothing has overflowed.
                if bool((smaller.isfinite() == tensor.isfinite()).all()):
                    stored = smaller
        tensors[f"model.{name}"] = stored
    _write(Path(path), tensors, config, step, {"notes": dict(notes or {})})


def read_model(
    path: str | os.PathLike[str], *, kind: str | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads the weights of a checkpoint, the averaged ones if there are any.

    Args:
        path: What `save_state` or `write_model` wrote.
        kind: The kind of network that it must be of; None: any.

    Returns:
        The tensors by name, float32 where they are stored with fewer bits, on the CPU; and the
        header: `step`, `kind`, `config`, `version`.

    Raises:
        OSError: The file cannot be read.
        CheckpointError: It is no checkpoint, damaged, or of another kind: one line.
    """
    tensors, info = _read(path)
    if kind is not None and info["kind"] != kind:
        raise CheckpointError(f"{path}: it is of kind {info['kind']}, not {kind}")
    weights = _below("ema.", tensors) or _below("model.", tensors)
    scales = _below("scale.", tensors)
    half = (torch.float16, torch.bfloat16)
    return {
        name: tensor.float() * scales[name]
        if name in scales
        else (tensor.float() if tensor.dtype in half else tensor.clone())
        for name, tensor in weights.items()
    }, info


def _rounded(weights: Tensor) -> tuple[Tensor, Tensor] | None:
    """Whole numbers of 8 bits and the scales of the channels; None if it is not worth it."""
    if weights.ndim < 2 or weights.numel() < 1024 or not weights.isfinite().all():
        return None
    scale = weights.abs().amax(tuple(range(1, weights.ndim)), keepdim=True).float() / 127
    # Of a channel of zeros.
    scale = torch.where(scale > 0, scale, 1)
    return (weights / scale).round().to(torch.int8), scale


# ---- Files ----


def _write(
    path: Path, tensors: Mapping[str, Tensor], config: Config, step: int, more: Mapping[str, Any]
) -> None:
    ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    info = {
        "version": VERSION,
        "kind": config.kind,
        "step": step,
        "config": config.to_dict(),
        "crc32": _checksum(ready),
        **more,
    }
    with written_aside(path) as aside:
        _save_file(ready, aside, {_KEY: json.dumps(info, allow_nan=False)})
    _sync_folder(path)


def _save_file(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    # Its own way to a file goes through a file of another name, which a killed run would leave.
    path.write_bytes(_safetensors().torch.save(tensors, metadata))


def _read(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All tensors and the header, checked."""
    with Path(path).open("rb"):  # an error of the system in its own words
        pass
    safetensors = _safetensors()
    try:
        with safetensors.safe_open(os.fspath(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        reason = str(error).partition("\n")[0]
        raise CheckpointError(f"{path}: it is no checkpoint, or a damaged one: {reason}") from None
    try:
        info = json.loads(metadata[_KEY])
        version, kind, step = info["version"], info["kind"], info["step"]
        fits = isinstance(kind, str) and isinstance(step, int) and isinstance(info["config"], dict)
        if not fits:
            raise ValueError(_KEY)
    except (KeyError, TypeError, ValueError):
        raise CheckpointError(f"{path}: it is a safetensors file of something else") from None
    if version != VERSION:
        raise CheckpointError(f"{path}: it is of version {version}; this program reads {VERSION}")
    if info.get("crc32") != _checksum(tensors):
        raise CheckpointError(f"{path}: it is damaged: the checksum is another")
    return tensors, info


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError:
        raise ImportError(
            "checkpoints need safetensors; type: pip install 'tritool[train]'"
        ) from None
    return safetensors


def _checksum(tensors: Mapping[str, Tensor]) -> int:
    value = 0
    for name in sorted(tensors):
        value = zlib.crc32(name.encode(), value)
        # Of zero bytes there is no view.
        if tensors[name].numel():
            data: Any = tensors[name].reshape(-1).view(torch.uint8).numpy()
            value = zlib.crc32(data, value)
    return value


def _sync_folder(path: Path) -> None:
    """Makes the new name last, too, where the system can."""
    folder = os.open(os.path.dirname(os.path.realpath(path)), os.O_RDONLY)
    try:
        os.fsync(folder)
    except OSError:
        pass  # some network file systems cannot; the file itself is on the disk
    finally:
        os.close(folder)


# ---- What fits ----


def _optimizer_states(
    model: nn.Module, optimizer: torch.optim.Optimizer
) -> Iterable[tuple[str, dict[str, Tensor]]]:
    for name, parameter in model.named_parameters():
        if parameter in optimizer.state:
            state = optimizer.state[parameter]
            yield name, {key: torch.as_tensor(value) for key, value in state.items()}


def _below(start: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {n.removeprefix(start): t for n, t in tensors.items() if n.startswith(start)}


def _like(value: Tensor, other: Tensor) -> Tensor:
    """A copy with dtype, device and layout of another tensor."""
    return torch.empty_like(other, requires_grad=False).copy_(value)


def _check_fits(
    path: str | os.PathLike[str], weights: Mapping[str, Tensor], own: Mapping[str, Tensor]
) -> None:
    for name in [*own, *weights]:
        there = tuple(weights[name].shape) if name in weights else "not there"
        here = tuple(own[name].shape) if name in own else "none"
        if there != here:
            raise CheckpointError(
                f"{path}: it is of another network: {name} is {there}, here {here}"
            )


def _check_config(path: str | os.PathLike[str], there: Mapping[str, Any], config: Config) -> None:
    # Once through JSON, as the other has been.
    here = json.loads(json.dumps(config.to_dict()))
    # Settings that a newer program has added have their defaults in the file of an older one.
    try:
        there = json.loads(json.dumps(Config.from_dict(there).to_dict()))
    except ValueError as error:
        raise CheckpointError(f"{path}: its configuration is of another version: {error}") from None
    old, new = _flat(there), _flat(here)
    for name in sorted(old.keys() | new.keys()):
        if name not in _FREE and old.get(name) != new.get(name):
            raise CheckpointError(
                f"{path}: it is of another configuration: {name} is {old.get(name)!r}, "
                f"here {new.get(name)!r}"
            )


def _flat(values: Mapping[str, Any], start: str = "") -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            result |= _flat(value, f"{start}{key}.")
        else:
            result[f"{start}{key}"] = value
    return result
