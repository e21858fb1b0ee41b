# SPDX-License-Identifier: Apache-2.0
"""The operations: batched, differentiable, on CPU and CUDA."""

from tritool.ops.triangulate import Triangulate, triangulate

__all__ = ["Triangulate", "triangulate"]
