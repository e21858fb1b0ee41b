# SPDX-License-Identifier: Apache-2.0
"""Rigid alignment with scale of predicted poses with true ones, as for PA-MPJPE."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from rivals import rigid_align as rivals

from suites.case import SEED, Array, Case, Spec, Variant, distance
from tritool import ops, reference

JOINTS = 17


def rigid_align(quick: bool) -> list[Spec]:
    def spec(poses: int, **flags: bool) -> Spec:
        return Spec(
            op="rigid_align",
            size=f"N={poses} J={JOINTS}",
            shape={"N": poses, "J": JOINTS},
            unit="mm",
            tolerance=0.1,
            build=partial(_rigid_align_case, poses),
            **flags,
        )

    if quick:
        return [spec(13, headline=True, memory=True)]
    return [spec(100000, headline=True, memory=True), spec(1000), spec(16)]


def _rigid_align_case(poses: int, device: str) -> Case:
    """Poses the size of a body about 1 m away, turned anywhere, scaled by 1.3, off by 30 mm."""
    generator = torch.Generator().manual_seed(SEED)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    source = 1000 * normal(poses, 1, 3) + 300 * normal(poses, JOINTS, 3)
    rotation, _ = torch.linalg.qr(normal(poses, 3, 3))
    rotation *= torch.linalg.det(rotation).sign()[:, None, None]
    target = 1.3 * (source @ rotation.mT) + 1000 * normal(poses, 1, 3)
    target += 30 * normal(poses, JOINTS, 3)
    weights = 0.1 + 0.9 * torch.rand((poses, JOINTS), generator=generator)
    inputs = {"source": source, "target": target, "weights": weights}
    inputs = {name: tensor.to(device, torch.float32) for name, tensor in inputs.items()}
    uses = tuple(inputs)
    variants = [
        Variant("tritool", "tritool", partial(ops.rigid_align, with_scale=True), uses),
        Variant("batched svd of 3x3", "pytorch", rivals.svd, uses),
        Variant("eigh of Horn's 4x4", "pytorch", rivals.quaternion, uses),
    ]
    if device == "cpu" and poses <= 1000:
        variants.append(
            Variant(
                "NumPy, one pose at a time",
                "package",
                rivals.numpy_loop,
                uses,
                differentiable=False,
                note="float64, no gradient",
            )
        )
    points = inputs["source"].double().cpu().numpy()
    return Case(
        inputs=inputs,
        wrt=("source", "target"),
        reference=partial(reference.rigid_align, with_scale=True),
        vjp=_vjp,
        variants=variants,
        error=lambda found, expected: distance(_moved(points, *found), _moved(points, *expected)),
    )


def _moved(points: Array, rotation: Array, translation: Array, scale: Array) -> Array:
    """The points where the transform puts them: what its parts mean together."""
    moved: Array = scale[:, None, None] * (points @ np.swapaxes(rotation, -1, -2))
    return moved + translation[:, None]


def _vjp(
    grads: tuple[Array, ...], source: Array, target: Array, weights: Array
) -> dict[str, Array]:
    grad_source, grad_target, _ = reference.rigid_align_vjp(
        grads, source, target, weights, with_scale=True
    )
    return {"source": grad_source, "target": grad_target}
