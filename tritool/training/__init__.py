# SPDX-License-Identifier: Apache-2.0
"""Configurations, training and evaluation of the networks.

What trains is imported when it is first asked for: reading a configuration is quick.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from tritool.training.config import Config, ConfigError, load_config, presets

if TYPE_CHECKING:
    from tritool.training.evaluation import compare as compare
    from tritool.training.evaluation import evaluate as evaluate
    from tritool.training.loop import TrainResult as TrainResult
    from tritool.training.loop import train as train
    from tritool.training.prediction import predict_images as predict_images
    from tritool.training.tasks import load_network as load_network

__all__ = [
    "Config",
    "ConfigError",
    "TrainResult",
    "compare",
    "evaluate",
    "load_config",
    "load_network",
    "predict_images",
    "presets",
    "train",
]

_LAZY = {
    "TrainResult": "loop",
    "train": "loop",
    "compare": "evaluation",
    "evaluate": "evaluation",
    "predict_images": "prediction",
    "load_network": "tasks",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
