# SPDX-License-Identifier: Apache-2.0
"""The ops in plain PyTorch: for second derivatives, and where nothing is compiled.

Slow beside the kernels and accurate: geometry is computed in float64 whatever comes in. The
formulas here are for autograd, the ones for the kernels are in csrc/math; tests compare both with
tritool.reference.
"""

from __future__ import annotations

from tritool.ops.composite.project import project, project_backward, project_double_backward
from tritool.ops.composite.rigid_align import (
    rigid_align,
    rigid_align_backward,
    rigid_align_double_backward,
)
from tritool.ops.composite.soft_argmax import (
    accumulator_dtype,
    softmax_moments,
    softmax_moments_backward,
    softmax_moments_double_backward,
)
from tritool.ops.composite.soft_argmax25d import (
    soft_argmax25d,
    soft_argmax25d_backward,
    soft_argmax25d_double_backward,
)
from tritool.ops.composite.triangulate import (
    triangulate,
    triangulate_backward,
    triangulate_double_backward,
)
from tritool.ops.composite.unproject import (
    unproject,
    unproject_backward,
    unproject_double_backward,
)

__all__ = [
    "accumulator_dtype",
    "project",
    "project_backward",
    "project_double_backward",
    "rigid_align",
    "rigid_align_backward",
    "rigid_align_double_backward",
    "soft_argmax25d",
    "soft_argmax25d_backward",
    "soft_argmax25d_double_backward",
    "softmax_moments",
    "softmax_moments_backward",
    "softmax_moments_double_backward",
    "triangulate",
    "triangulate_backward",
    "triangulate_double_backward",
    "unproject",
    "unproject_backward",
    "unproject_double_backward",
]
