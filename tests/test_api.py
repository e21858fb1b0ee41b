# SPDX-License-Identifier: Apache-2.0
"""The public names and signatures, against tests/api.json.

A change there is a decision, not an accident; after one, `python tests/test_api.py` writes the
file anew.
"""

from __future__ import annotations

import importlib
import inspect
import json
import re
from pathlib import Path

SNAPSHOT = Path(__file__).with_name("api.json")
MODULES = [
    "tritool",
    "tritool.ops",
    "tritool.models",
    "tritool.losses",
    "tritool.metrics",
    "tritool.data",
    "tritool.data.synthetic",
    "tritool.training",
    "tritool.reference",
    "tritool.cameras",
    "tritool.grid",
]


def signature_of(value: object) -> str:
    try:
        text = str(inspect.signature(value))  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return ""
    # How a named tuple's annotations print depends on the version of Python.
    text = re.sub(r"ForwardRef\('(\w+)'[^)]*\)", r"'\1'", text)
    return re.sub(r"\s+", " ", text)


def members(value: type) -> dict[str, str]:
    return {
        name: signature_of(member) if callable(member) else "property"
        for name, member in inspect.getmembers(value)
        if not name.startswith("_") and name in {n for k in own(value) for n in vars(k)}
    }


def own(value: type) -> list[type]:
    return [k for k in value.__mro__ if k.__module__.startswith("tritool")]


def public_api() -> dict[str, dict[str, object]]:
    api: dict[str, dict[str, object]] = {}
    for name in MODULES:
        module = importlib.import_module(name)
        api[name] = {}
        for public in sorted(module.__all__):
            value = getattr(module, public)
            if inspect.isclass(value):
                api[name][public] = {"class": signature_of(value), **members(value)}
            else:
                api[name][public] = signature_of(value)
    return api


def test_public_api_is_as_recorded() -> None:
    assert public_api() == json.loads(SNAPSHOT.read_text())


def test_every_public_function_is_documented() -> None:
    for name in MODULES:
        module = importlib.import_module(name)
        for public in module.__all__:
            value = getattr(module, public)
            if inspect.isclass(value) or (callable(value) and not hasattr(value, "__origin__")):
                assert inspect.getdoc(value), f"{name}.{public}"


if __name__ == "__main__":
    SNAPSHOT.write_text(json.dumps(public_api(), indent=2) + "\n")
