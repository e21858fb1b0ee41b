# SPDX-License-Identifier: Apache-2.0
"""The networks, in PyTorch: images and cameras to 3D joints; readers of published weights.

`AlgebraicTriangulation` triangulates the 2D joints of all views with learned confidences,
`VolumetricTriangulation` unprojects features of all views into a volume, `RansacTriangulation` is
the baseline of both: Iskakov et al., "Learnable Triangulation of Human Pose" (ICCV 2019).
`WeaklySupervisedPose` finds a pose in one image and learns without 3D labels; `reconstruct_pose`
and its like turn what it finds into 3D: Iqbal et al., "Weakly-Supervised 3D Human Pose Learning via
Multi-view Images in the Wild" (CVPR 2020).

They are built of `PoseResNet`, images into heat maps, features and confidences, and of `V2V`,
volumes into volumes. Parameters are named as in the official checkpoints of learnable
triangulation, which `load_official_checkpoint` reads; `load_imagenet_trunk` reads the
classification weights that training starts from.
"""

from tritool.models.algebraic import AlgebraicOutput, AlgebraicTriangulation
from tritool.models.checkpoints import LoadReport, load_imagenet_trunk, load_official_checkpoint
from tritool.models.images import normalize_images
from tritool.models.pose_resnet import PoseResNet, PoseResNetOutput
from tritool.models.ransac import RansacOutput, RansacTriangulation
from tritool.models.reconstruct import (
    Reconstruction,
    absolute_scale,
    augmented_intrinsics,
    flip_affine,
    intrinsics_fallback,
    map_points,
    mirrored_joints,
    reconstruct_pose,
    reconstruct_pose_median,
    rotation_affine,
)
from tritool.models.v2v import V2V
from tritool.models.volumetric import VolumetricOutput, VolumetricTriangulation
from tritool.models.weak25d import WeaklySupervisedPose, WeakOutput

__all__ = [
    "V2V",
    "AlgebraicOutput",
    "AlgebraicTriangulation",
    "LoadReport",
    "PoseResNet",
    "PoseResNetOutput",
    "RansacOutput",
    "RansacTriangulation",
    "Reconstruction",
    "VolumetricOutput",
    "VolumetricTriangulation",
    "WeakOutput",
    "WeaklySupervisedPose",
    "absolute_scale",
    "augmented_intrinsics",
    "flip_affine",
    "intrinsics_fallback",
    "load_imagenet_trunk",
    "load_official_checkpoint",
    "map_points",
    "mirrored_joints",
    "normalize_images",
    "reconstruct_pose",
    "reconstruct_pose_median",
    "rotation_affine",
]
