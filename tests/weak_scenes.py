# SPDX-License-Identifier: Apache-2.0
"""People in front of cameras for the tests of weak supervision: poses, pixels and true 2.5D.

Joints are those of `HUMAN36M_JOINTS`; world units are millimetres, z up. Seeded throughout.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tritool.skeletons import HUMAN36M_JOINTS

PELVIS, NECK = HUMAN36M_JOINTS.index("pelvis"), HUMAN36M_JOINTS.index("neck")
PAIR = (NECK, PELVIS)
SIZE = (128, 96)  # (W, H) of the images of `Views`; not square


def at(name: str) -> int:
    return HUMAN36M_JOINTS.index(name)


def uniform(generator: torch.Generator, low: float, high: float, *shape: int) -> Tensor:
    noise = torch.rand(*shape, generator=generator, dtype=torch.float64)
    return low + (high - low) * noise


def rotations(generator: torch.Generator, *shape: int) -> Tensor:
    """[*shape, 3, 3], uniform."""
    q, r = torch.linalg.qr(torch.randn(*shape, 3, 3, generator=generator, dtype=torch.float64))
    q = q * r.diagonal(dim1=-2, dim2=-1).sign()[..., None, :]
    return q * torch.linalg.det(q)[..., None, None]


def people(generator: torch.Generator, count: int) -> Tensor:
    """Bodies [count, 17, 3] with pelvis near the origin; knees bend forwards, elbows backwards.

    They walk, squat and wave; everyone has limbs of the same length.
    """
    joints: dict[str, Tensor] = {}
    lean, turn = uniform(generator, -0.1, 0.4, count), uniform(generator, 0, 2 * math.pi, count)

    def vector(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        return torch.stack(torch.broadcast_tensors(x, y, z), -1)

    zero = torch.zeros(count, dtype=torch.float64)
    # x is the body's front, y its left, z up.
    up = vector(lean.sin(), zero, lean.cos())
    joints["pelvis"] = vector(zero, zero, zero)
    joints["spine"] = 246 * up
    joints["neck"] = 492 * up
    nod = lean + uniform(generator, -0.3, 0.3, count)
    head = vector(nod.sin(), zero, nod.cos())
    joints["nose"] = joints["neck"] + 100 * head + 60 * vector(nod.cos(), zero, -nod.sin())
    joints["head_top"] = joints["neck"] + 220 * head
    for side, sign in (("l", 1.0), ("r", -1.0)):
        across = vector(zero, zero + sign, zero)
        # Angles in the plane of front and up, from hanging down; the shank bends backwards.
        swing, bend = uniform(generator, -0.3, 1.2, count), uniform(generator, 0.1, 1.6, count)
        spread = uniform(generator, 0.0, 0.3, count) * sign
        joints[f"{side}_hip"] = 129 * across
        knee = vector(swing.sin(), spread.sin(), -swing.cos())
        shank = vector((swing - bend).sin(), 0.5 * spread.sin(), -(swing - bend).cos())
        joints[f"{side}_knee"] = joints[f"{side}_hip"] + 487 * unit(knee)
        joints[f"{side}_ankle"] = joints[f"{side}_knee"] + 402 * unit(shank)
        swing, bend = uniform(generator, -0.6, 1.5, count), uniform(generator, 0.1, 1.8, count)
        spread = uniform(generator, 0.1, 0.9, count) * sign
        joints[f"{side}_shoulder"] = joints["neck"] + 169 * across - 20 * up
        arm = vector(swing.sin(), spread.sin(), -swing.cos())
        fore = vector((swing + bend).sin(), 0.3 * spread.sin(), -(swing + bend).cos())
        joints[f"{side}_elbow"] = joints[f"{side}_shoulder"] + 282 * unit(arm)
        joints[f"{side}_wrist"] = joints[f"{side}_elbow"] + 250 * unit(fore)
    body = torch.stack([joints[name] for name in HUMAN36M_JOINTS], 1)
    cos, sin, one = turn.cos(), turn.sin(), torch.ones_like(turn)
    rows = [cos, -sin, zero, sin, cos, zero, zero, zero, one]
    upright = torch.stack(rows, -1).reshape(count, 3, 3)
    place = uniform(generator, -150, 150, count, 1, 3)
    return body @ upright.mT + place


def unit(v: Tensor) -> Tensor:
    return v / v.norm(dim=-1, keepdim=True)


@dataclass(frozen=True)
class Views:
    """B people in C views each, and what a perfect network would say; neck to pelvis is 1."""

    camera_mm: Tensor  # [B, C, J, 3], camera coordinates, mm
    K: Tensor  # [B, C, 3, 3]
    xy: Tensor  # [B, C, J, 2], pixels of images of SIZE
    relative_depth: Tensor  # [B, C, J]
    pose: Tensor  # [B, C, J, 3]
    root_depth: Tensor  # [B, C]


def views(
    seed: int,
    *,
    batch: int = 2,
    count: int = 4,
    distance: tuple[float, float] = (2000.0, 3000.0),
    skew: bool = False,
) -> Views:
    """Cameras in a ring around people; the body fills most of each image."""
    generator = torch.Generator().manual_seed(seed)
    world = people(generator, batch)
    width, height = SIZE
    far = uniform(generator, *distance, batch, count)
    azimuth = torch.arange(count, dtype=torch.float64) * (2 * math.pi / count)
    azimuth = azimuth + uniform(generator, -0.3, 0.3, batch, count)
    elevation = uniform(generator, -0.1, 0.35, batch, count)
    forward = -torch.stack(
        [
            elevation.cos() * azimuth.cos(),
            elevation.cos() * azimuth.sin(),
            elevation.sin(),
        ],
        -1,
    )
    down = torch.tensor([0.0, 0, -1], dtype=torch.float64).expand_as(forward)
    right = unit(torch.linalg.cross(down, forward, dim=-1))
    rotation = torch.stack([right, torch.linalg.cross(forward, right, dim=-1), forward], -2)
    center = -far[..., None] * forward
    camera = torch.einsum("bcij,bcnj->bcni", rotation, world[:, None] - center[..., None, :])
    focal = 0.85 * height * far / 2000
    K = torch.zeros(batch, count, 3, 3, dtype=torch.float64)
    K[..., 0, 0], K[..., 1, 1], K[..., 2, 2] = 1.02 * focal, 0.97 * focal, 1
    K[..., 0, 1] = 0.05 * focal if skew else 0
    K[..., 0, 2] = width / 2 + uniform(generator, -2, 2, batch, count)
    K[..., 1, 2] = height / 2 + uniform(generator, -2, 2, batch, count)
    pixels = torch.einsum("bcij,bcnj->bcni", K, camera)
    length = (camera[..., NECK, :] - camera[..., PELVIS, :]).norm(dim=-1)
    pose = camera / length[..., None, None]
    root = pose[..., PELVIS, 2]
    return Views(
        camera_mm=camera,
        K=K,
        xy=pixels[..., :2] / pixels[..., 2:],
        relative_depth=pose[..., 2] - root[..., None],
        pose=pose,
        root_depth=root,
    )
