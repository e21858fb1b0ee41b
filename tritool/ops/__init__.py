# SPDX-License-Identifier: Apache-2.0
"""The operations: batched, differentiable, on CPU and CUDA. Start reading at a function."""

from tritool.ops.project import Project, project
from tritool.ops.rigid_align import RigidAlign, RigidTransform, rigid_align
from tritool.ops.robust import RobustTriangulation, refine, robust_triangulate
from tritool.ops.soft_argmax import (
    Moments,
    SoftArgmax2d,
    SoftArgmax3d,
    SoftmaxMoments,
    soft_argmax2d,
    soft_argmax3d,
    softmax_moments2d,
    softmax_moments3d,
)
from tritool.ops.soft_argmax25d import SoftArgmax25d, soft_argmax25d
from tritool.ops.triangulate import Triangulate, triangulate
from tritool.ops.unproject import Unproject, unproject

__all__ = [
    "Moments",
    "Project",
    "RigidAlign",
    "RigidTransform",
    "RobustTriangulation",
    "SoftArgmax2d",
    "SoftArgmax3d",
    "SoftArgmax25d",
    "SoftmaxMoments",
    "Triangulate",
    "Unproject",
    "project",
    "refine",
    "rigid_align",
    "robust_triangulate",
    "soft_argmax2d",
    "soft_argmax3d",
    "soft_argmax25d",
    "softmax_moments2d",
    "softmax_moments3d",
    "triangulate",
    "unproject",
]
