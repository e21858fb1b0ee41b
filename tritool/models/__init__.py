# SPDX-License-Identifier: Apache-2.0
"""The networks of learnable triangulation, in PyTorch, and the readers of published weights.

`PoseResNet` turns images into heat maps, features and confidences, `V2V` volumes into volumes.
Their parameters are named as in the official checkpoints of Iskakov et al., "Learnable
Triangulation of Human Pose" (ICCV 2019), which `load_official_checkpoint` reads;
`load_imagenet_trunk` reads the classification weights that training starts from.
"""

from tritool.models.checkpoints import LoadReport, load_imagenet_trunk, load_official_checkpoint
from tritool.models.images import normalize_images
from tritool.models.pose_resnet import PoseResNet, PoseResNetOutput
from tritool.models.v2v import V2V

__all__ = [
    "V2V",
    "LoadReport",
    "PoseResNet",
    "PoseResNetOutput",
    "load_imagenet_trunk",
    "load_official_checkpoint",
    "normalize_images",
]
