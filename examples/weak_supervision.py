# SPDX-License-Identifier: Apache-2.0
"""Depth from views that nobody labelled: a small network before and after it has seen them.

First a network learns 2D joints from labelled images, which make flat poses. Then it also sees
people from four sides at once, without labels and without knowing where the cameras stand, and has
to give poses that agree. A run that was stopped goes on where it was.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import torch

from tritool.data import collate
from tritool.plot import plot_poses
from tritool.training import Config, evaluate, load_config, train
from tritool.training.tasks import build_task

LABELS_ONLY = (
    "loss.alpha=0", "loss.psi=0", "loss.bending=0", "loss.bending_steps=0",
    "data.images=31", "training.batch_size=32", "model.reconstruction=flat",
)  # fmt: skip
BOTH = ("loss.pretrain_steps=0", "training.learning_rate=1.5e-3")


def poses(config: Config, checkpoint: Path, count: int) -> tuple[torch.Tensor, ...]:
    """Poses [N, J, 3], mm, true ones and 2D joints of people not seen before, and the images."""
    task = build_task(replace(config, model=replace(config.model, backbone_from=str(checkpoint))))
    task.start_weights()
    data = config.data.dataset("validation")
    batch = collate([data[index] for index in range(count)])
    found = task.predict(batch)
    motion = torch.linalg.solve(batch.intrinsics, batch.projections)[:, 0]  # [N, 3, 4]
    turned = [
        (points - points[:, :1]) @ motion[:, :, :3].mT
        for points in (found.keypoints_3d, batch.keypoints_3d)
    ]
    return (*turned, found.keypoints_2d[:, 0], batch.images[:, 0].permute(0, 2, 3, 1))


def main(
    folder: Path = Path("weak-supervision"), steps: tuple[int, int] = (2000, 1600), images: int = 4
) -> tuple[float, float]:
    """Trains and draws; returns N-MPJPE, mm, before and after."""
    drawn, errors, start = {}, [], []
    for label, settings, count in (
        ("2D labels alone", LABELS_ONLY, steps[0]),
        ("and unlabelled views", BOTH, steps[1]),
    ):
        config = load_config("small-weak", overrides=[*settings, *start], steps=count)
        run = folder / label.replace(" ", "-")
        train(config, run, device="cpu", progress=sys.stderr.isatty())
        found, truth, joints, pictures = poses(config, run / "best.safetensors", images)
        average = evaluate(config, run / "best.safetensors", device="cpu").report.average
        errors.append(average["n_mpjpe"].value)
        print(f"{label}: N-MPJPE {errors[-1]:.1f} mm, PA-MPJPE {average['pa_mpjpe'].value:.1f} mm")
        drawn[f"{label}: {errors[-1]:.0f} mm"] = found
        start = [f"model.backbone_from={run / 'best.safetensors'}"]
    plot_poses(
        folder / "before_and_after.png",
        list(pictures.numpy()),
        joints,
        {**drawn, "truth": truth},
        config.data.dataset("validation")[0].joint_names,
        name="Depth from views that nobody labelled",
        note="one image each, of people that the network has not seen; errors: N-MPJPE",
    )
    print(f"written {folder / 'before_and_after.png'}")
    return errors[0], errors[1]


if __name__ == "__main__":
    main()
