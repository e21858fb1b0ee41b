# SPDX-License-Identifier: Apache-2.0
"""Tiny runs for the tests of training: two cameras, images of 32 x 64."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch

from tritool.training.config import Config

STUDIO = {"preset": "easy", "views": 2, "image_size": [32, 64], "clutter": [0, 0]}
VALUES: dict[str, Any] = {
    "name": "tiny",
    "model": {
        "kind": "algebraic",
        "depth": 18,
        "width": 4,
        "deconv_channels": 8,
        "use_confidences": False,
        "inverse_temperature": 10.0,
    },
    "data": {
        "kind": "synthetic",
        "train": {"length": 5, "seed": 1, "studio": STUDIO},
        "validation": {"length": 2, "seed": 2, "studio": STUDIO},
    },
    "loss": {"heatmap_weight": 1.0},
    "training": {
        "steps": 4,
        "batch_size": 2,
        "learning_rate": 1e-3,
        "log_every": 1,
        "validate_every": 100,
        "save_every": 2,
        "tensorboard": False,
    },
}


def tiny_values(**training: Any) -> dict[str, Any]:
    values = copy.deepcopy(VALUES)
    values["training"] |= training
    return values


def tiny(**training: Any) -> Config:
    return Config.from_dict(tiny_values(**training))


def hide_joints(monkeypatch: Any = None) -> None:
    """Makes some 3D joints of the studio's samples unknown, another number in each."""
    from tritool.data.synthetic import Studio

    draw = Studio.__getitem__

    def partly_known(self: Studio, index: int) -> Any:
        sample = draw(self, index)
        sample.keypoints_3d[5 : 5 + 5 * (sample.index % 3)] = torch.nan
        return sample

    (setattr if monkeypatch is None else monkeypatch.setattr)(Studio, "__getitem__", partly_known)


def tensors(path: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return dict(load_file(path))


def same(first: Path, second: Path) -> bool:
    """Whether two checkpoints hold the same bits."""
    one, two = tensors(first), tensors(second)
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
