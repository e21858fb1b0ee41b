# SPDX-License-Identifier: Apache-2.0
"""What tests of the command line look at."""

from __future__ import annotations

import pytest


def one_error_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that bad input gives, and nothing else."""
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("tritool: error: ")
    assert err.endswith("\n")
    assert err.count("\n") == 1
    return err
