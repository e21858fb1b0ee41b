# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

settings.register_profile("tritool", derandomize=True, deadline=None, max_examples=30)
settings.load_profile("tritool")

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.cuda,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
        ],
    ),
]


def pytest_report_header() -> str:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none: CUDA tests skip"
    return f"torch {torch.__version__}, GPU: {gpu}"


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def shared_data() -> Path:
    """The folder of real recordings, which is no part of the repository."""
    folder = Path(os.environ.get("TRITOOL_SHARED", Path(__file__).parents[2] / "shared")) / "data"
    if not folder.is_dir():
        pytest.skip(reason=f"no recordings in {folder}")
    return folder
