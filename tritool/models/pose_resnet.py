# SPDX-License-Identifier: Apache-2.0
"""The 2D network: a residual trunk, three deconvolutions, heat maps and confidences."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from tritool.models import _checkpointing

__all__ = ["PoseResNet", "PoseResNetOutput"]

_STRIDE = 32  # of the trunk's last map
_POOLED = 4 * _STRIDE  # the confidence branches halve that map twice more
_NEAR_ZERO = 1e-3  # standard deviation of the weights that make an output


class PoseResNetOutput(NamedTuple):
    """What a `PoseResNet` makes of a batch of images of any batch dimensions, `[...]`.

    Attributes:
        heatmaps: `[..., J, H/4, W/4]`, before any softmax.
        features: `[..., K, H/4, W/4]`, what the heat maps are made of; at least 0.
        algebraic_confidences: `[..., J]` in (0, 1), a weight for each joint; None without the
            branch.
        volumetric_confidences: `[..., N]` in (0, 1), a weight for each channel of the maps to
            unproject; None without the branch.
    """

    heatmaps: Tensor
    features: Tensor
    algebraic_confidences: Tensor | None
    volumetric_confidences: Tensor | None


class PoseResNet(nn.Module):
    r"""Heat maps of joints, feature maps and confidences, from images.

    The backbone of Iskakov et al., "Learnable Triangulation of Human Pose" (ICCV 2019), section 3:
    the residual trunk :math:`g_\theta` of He et al. (CVPR 2016), with the stride of a bottleneck in
    its 3 x 3 convolution; three transposed convolutions 4 x 4 of stride 2, :math:`f_\theta`, as in
    Xiao et al., "Simple Baselines" (ECCV 2018); a 1 x 1 convolution :math:`h_\theta`; and the
    branches :math:`q_\phi` of equation (5) and :math:`d` of equation (9), on the trunk's last map.
    Parameters are named as in the official checkpoints, those of the trunk as in torchvision.

    Initial weights: normal by He's rule wherever a ReLU follows, with zero biases. The layers that
    make the outputs start near zero (normal, standard deviation 0.001): heat maps are flat, so that
    their soft-argmax has gradients everywhere, and confidences are all close to 1/2, so that
    training begins with equal weights.

    Args:
        depth: 18, 34, 50, 101 or 152.
        num_joints: J, the heat maps of an image.
        algebraic_confidences: Add the branch of J confidences, `alg_confidences`.
        volumetric_confidences: Confidences of the branch `vol_confidences`, 32 in the paper's
            networks, one for each channel that is unprojected; 0: no branch.
        width: Channels of the first convolution, 64 in the paper. All others of the trunk and of
            the branches grow and shrink with it.
        deconv_channels: K, the channels of every transposed convolution, 256 in the paper.
        checkpointing: In training keep only the input of each residual block and compute the block
            again in the backward pass: less memory, about a third more time, the same results.

    Raises:
        ValueError: `depth` is none of these, or a number is too small.

    Example:
        >>> network = PoseResNet(18, num_joints=5, width=8, deconv_channels=16).eval()
        >>> output = network(torch.zeros(2, 4, 3, 64, 96))
        >>> output.heatmaps.shape, output.features.shape
        (torch.Size([2, 4, 5, 16, 24]), torch.Size([2, 4, 16, 16, 24]))
    """

    def __init__(
        self,
        depth: int = 152,
        num_joints: int = 17,
        *,
        algebraic_confidences: bool = False,
        volumetric_confidences: int = 0,
        width: int = 64,
        deconv_channels: int = 256,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if depth not in _DEPTHS:
            raise ValueError(f"depth must be one of {', '.join(map(str, _DEPTHS))}, got {depth}")
        for name, value, least in (
            ("num_joints", num_joints, 1),
            ("volumetric_confidences", volumetric_confidences, 0),
            ("width", width, 1),
            ("deconv_channels", deconv_channels, 1),
        ):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        self.depth = depth
        self.num_joints = num_joints
        self.feature_channels = deconv_channels
        self.checkpointing = checkpointing
        block, counts = _DEPTHS[depth]

        self.conv1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        expansion = block.expansion
        self.layer1 = _stage(block, counts[0], width, width, stride=1)
        self.layer2 = _stage(block, counts[1], width * expansion, 2 * width, stride=2)
        self.layer3 = _stage(block, counts[2], 2 * width * expansion, 4 * width, stride=2)
        self.layer4 = _stage(block, counts[3], 4 * width * expansion, 8 * width, stride=2)

        channels = 8 * width * expansion
        self.alg_confidences = (
            _ConfidenceHead(channels, num_joints, width) if algebraic_confidences else None
        )
        self.vol_confidences = (
            _ConfidenceHead(channels, volumetric_confidences, width)
            if volumetric_confidences
            else None
        )
        self.deconv_layers = nn.Sequential(
            *_deconvolution(channels, deconv_channels),
            *_deconvolution(deconv_channels, deconv_channels),
            *_deconvolution(deconv_channels, deconv_channels),
        )
        self.final_layer = nn.Conv2d(deconv_channels, num_joints, 1)
        self._initialise()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
                # Scaled to keep the gradient's variance; a fully connected layer, which no batch
                # norm follows, to keep the activation's. (A transposed convolution's "fan_out"
                # counts its inputs: its weight is stored as that of the convolution it transposes.)
                nn.init.kaiming_normal_(
                    module.weight,
                    mode="fan_in" if isinstance(module, nn.Linear) else "fan_out",
                    nonlinearity="relu",
                )
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        outputs: list[nn.Module] = [self.final_layer]
        for branch in (self.alg_confidences, self.vol_confidences):
            if branch is not None:
                outputs.append(branch.head[-1])
        for layer in outputs:
            assert isinstance(layer.weight, Tensor)
            nn.init.normal_(layer.weight, std=_NEAR_ZERO)

    def forward(self, images: Tensor) -> PoseResNetOutput:
        """Heat maps, features and confidences of every image.

        Args:
            images: `[..., 3, H, W]` with at least one batch dimension, all of which the outputs
                have too: `[N, 3, H, W]`, or `[B, C, 3, H, W]` for C views. H and W are multiples of
                32, with a confidence branch at least 128. Values as the weights expect them:
                published weights take (x / 255 - mean) / std with ImageNet's mean and standard
                deviation.

        Raises:
            TypeError: `images` is not floating-point.
            ValueError: The shape does not fit.
        """
        self._check(images)
        batch = images.shape[:-3]
        x = images.flatten(0, images.ndim - 4)
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            for block in stage:
                x = _checkpointing.run(block, x, checkpointing=self.checkpointing)

        algebraic = None if self.alg_confidences is None else self.alg_confidences(x)
        volumetric = None if self.vol_confidences is None else self.vol_confidences(x)
        features = self.deconv_layers(x)
        heatmaps = self.final_layer(features)
        return PoseResNetOutput(
            heatmaps.unflatten(0, batch),
            features.unflatten(0, batch),
            None if algebraic is None else algebraic.unflatten(0, batch),
            None if volumetric is None else volumetric.unflatten(0, batch),
        )

    def _check(self, images: Tensor) -> None:
        if not images.is_floating_point():
            raise TypeError(f"images must be floating-point, got {images.dtype}")
        shape = tuple(images.shape)
        if images.ndim < 4 or shape[-3] != 3:
            raise ValueError(f"images must be [..., 3, H, W] with a batch dimension, got {shape}")
        if shape[-2] % _STRIDE or shape[-1] % _STRIDE:
            raise ValueError(
                f"images must be [..., 3, H, W] with H and W multiples of {_STRIDE}, got {shape}"
            )
        branches = self.alg_confidences is not None or self.vol_confidences is not None
        least = _POOLED if branches else _STRIDE
        if shape[-2] < least or shape[-1] < least:
            reason = " with confidence branches" if branches else ""
            raise ValueError(
                f"images must be [..., 3, H, W] with H and W at least {least}{reason}, got {shape}"
            )


class _BasicBlock(nn.Module):
    """Two 3 x 3 convolutions beside a shortcut (He et al., CVPR 2016, figure 5 left)."""

    expansion = 1

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _shortcut(in_channels, channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        shortcut = x if self.downsample is None else self.downsample(x)
        return self.relu(y + shortcut)  # type: ignore[no-any-return]


class _Bottleneck(nn.Module):
    """1 x 1, 3 x 3 and 1 x 1 convolution beside a shortcut (ibid., right), stride in the 3 x 3."""

    expansion = 4

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        out_channels = channels * self.expansion
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _shortcut(in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        shortcut = x if self.downsample is None else self.downsample(x)
        return self.relu(y + shortcut)  # type: ignore[no-any-return]


# The kind of block and how many of them layer1 to layer4 have (He et al., table 1).
_DEPTHS: dict[int, tuple[type[_BasicBlock] | type[_Bottleneck], tuple[int, int, int, int]]] = {
    18: (_BasicBlock, (2, 2, 2, 2)),
    34: (_BasicBlock, (3, 4, 6, 3)),
    50: (_Bottleneck, (3, 4, 6, 3)),
    101: (_Bottleneck, (3, 4, 23, 3)),
    152: (_Bottleneck, (3, 8, 36, 3)),
}


def _shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Sequential | None:
    """A projection where the identity does not fit, else None."""
    if stride == 1 and in_channels == out_channels:
        return None
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False),
        nn.BatchNorm2d(out_channels),
    )


def _stage(
    block: type[_BasicBlock] | type[_Bottleneck],
    count: int,
    in_channels: int,
    channels: int,
    stride: int,
) -> nn.Sequential:
    """Blocks in a row, of which the first takes the stride."""
    later = [block(channels * block.expansion, channels, 1) for _ in range(count - 1)]
    return nn.Sequential(block(in_channels, channels, stride), *later)


def _deconvolution(in_channels: int, out_channels: int) -> tuple[nn.Module, ...]:
    """A transposed convolution that doubles H and W, with its batch norm and ReLU."""
    return (
        nn.ConvTranspose2d(in_channels, out_channels, 4, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    )


class _ConfidenceHead(nn.Module):
    """Two convolutions, the mean over the map, three fully connected layers, a sigmoid."""

    def __init__(self, in_channels: int, count: int, width: int) -> None:
        super().__init__()
        wide, narrow = 8 * width, 4 * width
        self.features = nn.Sequential(
            nn.Conv2d(in_channels, wide, 3, padding=1),
            nn.BatchNorm2d(wide),
            nn.MaxPool2d(2),
            nn.ReLU(inplace=True),
            nn.Conv2d(wide, narrow, 3, padding=1),
            nn.BatchNorm2d(narrow),
            nn.MaxPool2d(2),
            nn.ReLU(inplace=True),
        )
        self.head = nn.Sequential(
            nn.Linear(narrow, wide),
            nn.ReLU(inplace=True),
            nn.Linear(wide, narrow),
            nn.ReLU(inplace=True),
            nn.Linear(narrow, count),
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.head(self.features(x).mean((2, 3))))
