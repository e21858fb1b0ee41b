# SPDX-License-Identifier: Apache-2.0
"""Published weights into the networks: everything is checked first, then everything is copied."""

from __future__ import annotations

import os
import re
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["LoadReport", "load_imagenet_trunk", "load_official_checkpoint"]

_TRUNK = frozenset({"conv1", "bn1", "layer1", "layer2", "layer3", "layer4"})
# Under which names training programs keep the weights beside other things.
_WRAPPERS = ("state_dict", "model_state_dict", "model")
# Layers with one row of weights for each joint.
_JOINT_ROWS = re.compile(
    r"(?:^|\.)(?:final_layer|alg_confidences\.head\.4|output_layer)\.(?:weight|bias)$"
)
# Batch norm's count of batches: files from before PyTorch 0.4.1 lack it, and nothing here uses it.
_COUNTER = ".num_batches_tracked"
# The number at the start of what torch.save wrote before version 1.6, as pickled there.
_LEGACY = 0x1950A86A20F9469CFC6C.to_bytes(10, "little")


@dataclass(frozen=True)
class LoadReport:
    """Which tensors of a file went into a model; `str` of it is a text for people.

    Attributes:
        path: The file.
        loaded: Names of the model's tensors that the file replaced as a whole.
        missing: Names of the model's tensors that the file does not have and that stay as they
            were.
        unexpected: Names of the file's tensors for which the model has no place.
        resized: For each head of another number of joints, the rows in the file and in the model:
            the first ones were copied, further ones of the model drawn anew.
    """

    path: str
    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    resized: Mapping[str, tuple[int, int]]

    def __str__(self) -> str:
        """The counts, with names down to the part of the network."""
        lines = [f"{self.path}: {len(self.loaded)} tensors loaded"]
        for name, (there, here) in self.resized.items():
            text = f"all {there} joints, {here - there} drawn anew"
            if there > here:
                text = f"the first {here} of {there} joints"
            lines.append(f"  {name}: {text}")
        if self.missing:
            lines.append(f"  left as they were: {_summary(self.missing)}")
        if self.unexpected:
            lines.append(f"  not used: {_summary(self.unexpected)}")
        return "\n".join(lines)


def load_official_checkpoint(
    model: nn.Module, path: str | os.PathLike[str], *, strict: bool = False
) -> LoadReport:
    """Loads a checkpoint of the official code of learnable triangulation, in whole or in part.

    The code is that of Iskakov et al., "Learnable Triangulation of Human Pose" (ICCV 2019). The
    file may hold a whole network or its backbone alone, and the model may be either, or a `V2V`.
    Each part of the network (`layer3`, `deconv_layers`, `volume_net`, ...) fits as a whole or not
    at all. A head of another number of joints, J' in the file and J in the model, gets the first
    min(J, J') filters and biases; the rest is drawn by Glorot's uniform rule, with bias 0.

    Args:
        model: A `PoseResNet`, a `V2V`, or a network that has them as `backbone` and `volume_net`.
            It is left untouched if anything raises.
        path: A file of `torch.save` or safetensors: a state dict, or a dict that holds one as
            `"state_dict"`, `"model_state_dict"` or `"model"`. A prefix `module.` is ignored. Only
            tensors are ever unpickled.
        strict: Raise if either side has tensors that the other has not.

    Returns:
        What was loaded and what was not.

    Raises:
        OSError: The file cannot be read.
        ImportError: The file is of safetensors, and that package is not installed.
        ValueError: The file is no checkpoint, is damaged, or does not fit; the message is one line
            with file and reason.
    """
    return _load(model, path, allowed=lambda part: True, complete=strict, strict=strict)


def load_imagenet_trunk(model: nn.Module, path: str | os.PathLike[str]) -> LoadReport:
    """Loads the trunk of a classification network, as published by torchvision, complete.

    Args:
        model: A `PoseResNet`, or a network that has one as `backbone`. It is left untouched if
            anything raises.
        path: As for `load_official_checkpoint`. The tensors of the classifier and of all else
            besides the trunk are not used.

    Returns:
        What was loaded; `missing` lists the rest of the model.

    Raises:
        OSError: The file cannot be read.
        ImportError: The file is of safetensors, and that package is not installed.
        ValueError: The file is no checkpoint, is damaged, or does not hold this trunk; the message
            is one line with file and reason.
    """
    return _load(model, path, allowed=lambda part: part in _TRUNK, complete=True, strict=False)


def _load(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    allowed: Callable[[str], bool],
    complete: bool,
    strict: bool,
) -> LoadReport:
    """Loads the parts that are allowed; all of those have to be there if `complete`."""
    source = os.fspath(path)
    tensors = _read(source)
    try:
        targets = model.state_dict()
        wanted = {name for name in targets if allowed(_part(name))}
        translated = _translated(tensors, wanted)
        _check_parts(set(translated.values()), wanted, complete=complete)
        names = {key: name for key, name in translated.items() if name in wanted}
        unexpected = tuple(key for key in tensors if key not in names)
        if strict and unexpected:
            raise ValueError(f"the model has no place for {_summary(unexpected)}")
        resized: dict[str, tuple[int, int]] = {}
        values: dict[str, Tensor] = {}
        for key, name in names.items():
            value, target = tensors[key], targets[name]
            _check_tensor(name, value, target)
            if value.shape != target.shape:
                resized[name] = (value.shape[0], target.shape[0])
                value = _with_rows_of(value, target)
            values[name] = value
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    with torch.no_grad():
        for name, value in values.items():
            targets[name].copy_(value)
    return LoadReport(
        path=source,
        loaded=tuple(name for name in targets if name in values and name not in resized),
        missing=tuple(
            name for name in targets if name not in values and not name.endswith(_COUNTER)
        ),
        unexpected=unexpected,
        resized=resized,
    )


def _part(name: str) -> str:
    """The part of a network that a tensor belongs to."""
    first, *rest = name.split(".")
    return rest[0] if first == "backbone" and rest else first


def _summary(names: Iterable[str]) -> str:
    """Names for people: the parts that they belong to, with counts."""
    counts = Counter(_part(name) for name in names)
    return ", ".join(f"{part} ({count})" for part, count in counts.items())


# ---- Fitting ----


def _translated(tensors: Iterable[str], wanted: set[str]) -> dict[str, str]:
    """The names in the file, as the model would call them.

    A network's file may go into its backbone or its volume network alone, and the other way round.
    """

    def without(prefix: str) -> dict[str, str]:
        return {key: key[len(prefix) :] for key in tensors if key.startswith(prefix)}

    candidates = [
        {key: key for key in tensors},
        {key: f"backbone.{key}" for key in tensors},
        without("backbone."),
        without("volume_net."),
    ]
    best = max(candidates, key=lambda names: len(wanted.intersection(names.values())))
    if wanted.isdisjoint(best.values()):
        raise ValueError(
            "no tensor in it has a name of the model's; the first one is "
            f"{next(iter(tensors))}, the model's {min(wanted, default='none')}"
        )
    return best


def _check_parts(found: set[str], wanted: set[str], *, complete: bool) -> None:
    """Raises if a part of the network is there in pieces, or is not there and ought to be."""
    found = {name for name in found if not name.endswith(_COUNTER)}
    wanted = {name for name in wanted if not name.endswith(_COUNTER)}
    shared = {_part(name) for name in found & wanted}
    absent = sorted(name for name in wanted - found if complete or _part(name) in shared)
    if absent:
        raise ValueError(
            f"it lacks {len(absent)} tensors of the model's, such as {absent[0]}; "
            "is it of another network or depth?"
        )
    excess = sorted(name for name in found - wanted if _part(name) in shared)
    if excess:
        raise ValueError(
            f"it has {len(excess)} tensors too many, such as {excess[0]}; "
            "is it of another network or depth?"
        )


def _check_tensor(name: str, value: Tensor, target: Tensor) -> None:
    """Raises if a tensor of the file cannot be copied to its place."""
    if target.is_meta:
        raise ValueError(f"{name} of the model is on the meta device and cannot hold values")
    if value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized:
        raise ValueError(f"{name} is not a plain tensor of values")
    if value.is_floating_point() != target.is_floating_point() or value.is_complex():
        raise ValueError(f"{name} is of {value.dtype}, the model's of {target.dtype}")
    same = value.shape == target.shape
    rows = _JOINT_ROWS.search(name) is not None and value.ndim > 0
    if not same and not (rows and value.shape[1:] == target.shape[1:]):
        raise ValueError(
            f"{name} is {tuple(value.shape)}, the model's {tuple(target.shape)}; "
            "is it of another depth or width?"
        )


def _with_rows_of(value: Tensor, target: Tensor) -> Tensor:
    """The first rows of `value`, followed by new ones if `target` has more."""
    result = torch.zeros(target.shape, dtype=target.dtype)
    if target.ndim > 1:
        nn.init.xavier_uniform_(result)
    rows = min(len(value), len(target))
    result[:rows] = value[:rows]
    return result


# ---- Reading ----


def _read(path: str) -> dict[str, Tensor]:
    """The tensors of a file, on the CPU, by name without `module.`."""
    with open(path, "rb") as file:
        head = file.read(64)
        size = file.seek(0, os.SEEK_END)
    # A safetensors file starts with the length of its header, a JSON object.
    header = int.from_bytes(head[:8], "little")
    try:
        if head.startswith(b"PK\x03\x04"):
            _check_sums(path)
            return _named(_unpickle(path))
        if head.startswith(b"\x80") and _LEGACY in head:
            return _named(_unpickle(path))
        if head[8:9] == b"{" and header <= size - 8:
            return _named(_read_safetensors(path))
        raise ValueError("it is not a file of torch.save or safetensors")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _check_sums(path: str) -> None:
    """Raises if a zip archive is not what was written: PyTorch itself does not look."""
    try:
        with zipfile.ZipFile(path) as archive:
            wrong = archive.testzip()
    except Exception:  # whatever damaged bytes lead to
        raise ValueError("it is damaged or incomplete") from None
    if wrong is not None:
        raise ValueError(f"it is damaged: the checksum of {wrong} does not match")


def _unpickle(path: str) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever damaged bytes lead to
        text = " ".join(str(error).split())
        foreign = re.search(r"Unsupported (?:global: GLOBAL|class) ([\w.]+)", text)
        if foreign:
            reason = f"it holds Python objects besides tensors ({foreign[1]}), never loaded here"
        else:
            reason = "it is damaged, incomplete or not a file of torch.save"
        raise ValueError(reason) from None


def _read_safetensors(path: str) -> Any:
    try:
        from safetensors.torch import load_file
    except ImportError:
        raise ImportError(
            f"{path} needs the package safetensors: pip install safetensors"
        ) from None
    try:
        return load_file(path, device="cpu")
    except Exception:  # of its own, derived from nothing more special
        raise ValueError("it is damaged or incomplete") from None


def _named(content: Any) -> dict[str, Tensor]:
    """The state dict in what was read."""
    if isinstance(content, Mapping):
        for wrapper in _WRAPPERS:
            if isinstance(content.get(wrapper), Mapping):
                content = content[wrapper]
                break
    if not isinstance(content, Mapping) or not content:
        raise ValueError("it holds no dict of named tensors")
    tensors: dict[str, Tensor] = {}
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            kind = type(value).__name__
            raise ValueError(f"it holds no dict of named tensors: {key!r} is of type {kind}")
        name = key.removeprefix("module.")
        if name in tensors:
            raise ValueError(f"it holds {name} twice, with and without module.")
        tensors[name] = value
    return tensors
