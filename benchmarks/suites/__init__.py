# SPDX-License-Identifier: Apache-2.0
"""What is measured: one function per operation lists its sizes, another builds a case of it.

To add an operation, write a module with such a function and name it in `OPERATIONS`; timing,
accuracy, memory, report and tests follow.
"""

from __future__ import annotations

from suites.case import SEED, Case, Spec, Variant, float64
from suites.project import project
from suites.rigid_align import rigid_align
from suites.soft_argmax import soft_argmax2d, soft_argmax3d, soft_argmax25d
from suites.triangulate import triangulate
from suites.unproject import unproject

__all__ = ["OPERATIONS", "SEED", "Case", "Spec", "Variant", "float64", "specs"]

OPERATIONS = (
    soft_argmax2d,
    soft_argmax25d,
    soft_argmax3d,
    triangulate,
    unproject,
    rigid_align,
    project,
)


def specs(quick: bool = False) -> list[Spec]:
    """All cases, or tiny ones that only show that everything runs."""
    return [spec for operation in OPERATIONS for spec in operation(quick)]
