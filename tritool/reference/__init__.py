# SPDX-License-Identifier: Apache-2.0
"""The operations of tritool in NumPy float64: what they compute, before how they compute it fast.

Every function here is written after the formulas of K. Iskakov, E. Burkov, V. Lempitsky and
Y. Malkov, "Learnable Triangulation of Human Pose", ICCV 2019 (equation numbers refer to it), and is
followed by its vector-Jacobian product `<name>_vjp`, derived by hand; `refine` and
`robust_triangulate`, which iterate and choose, have none. The module depends on NumPy alone and
shares neither code nor method with the compiled kernels: their agreement is evidence.

Conventions: all inputs are converted to float64; batch dimensions lead and broadcast; a pixel is
(x, y) with (0, 0) the centre of the first; `projections [..., C, 3, 4]` map world to pixels.
Invalid data are NaN or weight 0; a result that cannot be computed is NaN, and its gradient is
exactly 0 whatever gradient comes in. Values never raise, shapes do.
"""

from tritool.reference._common import BoolArray as BoolArray
from tritool.reference._common import FloatArray as FloatArray
from tritool.reference.project import project, project_vjp
from tritool.reference.rigid_align import RigidTransform, rigid_align, rigid_align_vjp
from tritool.reference.robust import Loss as Loss
from tritool.reference.robust import RobustTriangulation, refine, robust_triangulate
from tritool.reference.soft_argmax import Grid as Grid
from tritool.reference.soft_argmax import (
    Moments,
    soft_argmax2d,
    soft_argmax2d_vjp,
    soft_argmax3d,
    soft_argmax3d_vjp,
    soft_argmax25d,
    soft_argmax25d_vjp,
    softmax_moments2d,
    softmax_moments2d_vjp,
    softmax_moments3d,
    softmax_moments3d_vjp,
)
from tritool.reference.triangulate import Mode as Mode
from tritool.reference.triangulate import triangulate, triangulate_vjp
from tritool.reference.unproject import Aggregation as Aggregation
from tritool.reference.unproject import Frame as Frame
from tritool.reference.unproject import Outside as Outside
from tritool.reference.unproject import Sampling as Sampling
from tritool.reference.unproject import unproject, unproject_vjp

__all__ = [
    "Moments",
    "RigidTransform",
    "RobustTriangulation",
    "project",
    "project_vjp",
    "refine",
    "rigid_align",
    "rigid_align_vjp",
    "robust_triangulate",
    "soft_argmax2d",
    "soft_argmax2d_vjp",
    "soft_argmax3d",
    "soft_argmax3d_vjp",
    "soft_argmax25d",
    "soft_argmax25d_vjp",
    "softmax_moments2d",
    "softmax_moments2d_vjp",
    "softmax_moments3d",
    "softmax_moments3d_vjp",
    "triangulate",
    "triangulate_vjp",
    "unproject",
    "unproject_vjp",
]
