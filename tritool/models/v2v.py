# SPDX-License-Identifier: Apache-2.0
"""The 3D network: an encoder and decoder of volumes."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tritool.models import _checkpointing

__all__ = ["V2V"]

_LEVELS = 5  # halvings of the volume
_CHANNELS_LAST = torch.channels_last_3d


class V2V(nn.Module):
    r"""Volumes to volumes of the same size, by an encoder and decoder with residual blocks.

    The network :math:`u_\nu` of equation (12) of Iskakov et al., "Learnable Triangulation of Human
    Pose" (ICCV 2019), which follows V2V-PoseNet of Moon et al. (CVPR 2018). Parameters are named as
    in the official checkpoints. Initial weights are normal by Glorot's rule, biases zero.

    Args:
        in_channels: Channels of the volumes that go in, K.
        out_channels: Channels of those that come out, one for each joint, J.
        width: Channels at full resolution, 32 in the paper, an even number; all others grow and
            shrink with it.
        front_width: Channels of the first convolution, half of `width` in the paper. All that is
            in the volumes passes through them: a narrow network wants no fewer than 16.
        checkpointing: In training keep only the input of each block and compute the block again in
            the backward pass: much less memory, about a third more time, the same results.

    Raises:
        ValueError: A number is too small, or `width` odd without a `front_width`.

    Example:
        >>> network = V2V(4, 2, width=2).eval()
        >>> network(torch.zeros(1, 4, 32, 64, 32)).shape
        torch.Size([1, 2, 32, 64, 32])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        width: int = 32,
        front_width: int | None = None,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        for name, value in (("in_channels", in_channels), ("out_channels", out_channels)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if front_width is None and (width < 2 or width % 2):
            raise ValueError(f"width must be even and at least 2, got {width}")
        front = width // 2 if front_width is None else front_width
        for name, value in (("width", width), ("front_width", front)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.checkpointing = checkpointing
        self.front_layers = nn.Sequential(
            _Convolution(in_channels, front, 7),
            _Residual(front, width),
            _Residual(width, width),
            _Residual(width, width),
        )
        self.encoder_decoder = _EncoderDecoder(width)
        self.back_layers = nn.Sequential(
            _Residual(width, width),
            _Convolution(width, width, 1),
            _Convolution(width, width, 1),
        )
        self.output_layer = nn.Conv3d(width, out_channels, 1)
        self._initialise()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv3d | nn.ConvTranspose3d):
                nn.init.xavier_normal_(module.weight)
                assert module.bias is not None
                nn.init.zeros_(module.bias)

    def forward(self, volumes: Tensor) -> Tensor:
        """Volumes of scores, before any softmax.

        Args:
            volumes: `[B, K, X, Y, Z]`; X, Y and Z are multiples of 32.

        Returns:
            `[B, J, X, Y, Z]`; `channels_last_3d` if `volumes` is.

        Raises:
            TypeError: `volumes` is not floating-point.
            ValueError: The shape does not fit.
        """
        if not volumes.is_floating_point():
            raise TypeError(f"volumes must be floating-point, got {volumes.dtype}")
        shape = tuple(volumes.shape)
        if volumes.ndim != 5 or shape[1] != self.in_channels:
            raise ValueError(
                f"volumes must be [B, K, X, Y, Z] with K = {self.in_channels}, got {shape}"
            )
        multiple = 2**_LEVELS
        if any(side < multiple or side % multiple for side in shape[2:]):
            raise ValueError(
                "volumes must be [B, K, X, Y, Z] with X, Y and Z multiples of "
                f"{multiple}, got {shape}"
            )
        x = volumes
        for block in self.front_layers:
            x = _checkpointing.run(block, x, checkpointing=self.checkpointing)
        x = self.encoder_decoder(x, checkpointing=self.checkpointing)
        for block in self.back_layers:
            x = _checkpointing.run(block, x, checkpointing=self.checkpointing)
        scores: Tensor = self.output_layer(x)
        if not volumes.is_contiguous() and volumes.is_contiguous(memory_format=_CHANNELS_LAST):
            # PyTorch's 1 x 1 x 1 convolution on the CPU does not keep it.
            scores = scores.contiguous(memory_format=_CHANNELS_LAST)
        return scores


class _EncoderDecoder(nn.Module):
    """Halves a volume five times and doubles it again, adding what each size had on the way down.

    Level i, from 1, lies between the sizes i - 1 and i, counted from the full one.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        channels = [width, 2 * width, *[4 * width] * (_LEVELS - 1)]
        for level in range(1, _LEVELS + 1):
            outer, inner = channels[level - 1], channels[level]
            self.add_module(f"encoder_res{level}", _Residual(outer, inner))
            self.add_module(f"decoder_res{level}", _Residual(inner, inner))
            self.add_module(f"decoder_upsample{level}", _Upsampling(inner, outer))
            self.add_module(f"skip_res{level}", _Residual(outer, outer))
        self.mid_res = _Residual(channels[-1], channels[-1])

    def forward(self, x: Tensor, *, checkpointing: bool) -> Tensor:
        def run(name: str, x: Tensor) -> Tensor:
            return _checkpointing.run(getattr(self, name), x, checkpointing=checkpointing)

        skipped = []
        for level in range(1, _LEVELS + 1):
            skipped.append(run(f"skip_res{level}", x))
            x = F.max_pool3d(x, 2)
            x = run(f"encoder_res{level}", x)
        x = run("mid_res", x)
        for level in range(_LEVELS, 0, -1):
            x = run(f"decoder_res{level}", x)
            x = run(f"decoder_upsample{level}", x) + skipped[level - 1]
        return x


class _Convolution(nn.Module):
    """A convolution of stride 1, batch norm and ReLU."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int) -> None:
        super().__init__()
        self.block = nn.Sequential(
            nn.Conv3d(in_channels, out_channels, kernel, padding=kernel // 2),
            nn.BatchNorm3d(out_channels),
            nn.ReLU(inplace=True),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)  # type: ignore[no-any-return]


class _Upsampling(nn.Module):
    """A transposed convolution that doubles X, Y and Z, batch norm and ReLU."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.block = nn.Sequential(
            nn.ConvTranspose3d(in_channels, out_channels, 2, stride=2),
            nn.BatchNorm3d(out_channels),
            nn.ReLU(inplace=True),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)  # type: ignore[no-any-return]


class _Residual(nn.Module):
    """Two 3 x 3 x 3 convolutions beside the identity, or a projection where that does not fit."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.res_branch = nn.Sequential(
            nn.Conv3d(in_channels, out_channels, 3, padding=1),
            nn.BatchNorm3d(out_channels),
            nn.ReLU(inplace=True),
            nn.Conv3d(out_channels, out_channels, 3, padding=1),
            nn.BatchNorm3d(out_channels),
        )
        self.skip_con = nn.Sequential()  # the identity
        if in_channels != out_channels:
            self.skip_con.append(nn.Conv3d(in_channels, out_channels, 1))
            self.skip_con.append(nn.BatchNorm3d(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.res_branch(x) + self.skip_con(x), inplace=True)
