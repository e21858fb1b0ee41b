# SPDX-License-Identifier: Apache-2.0
"""Train a network of tritool in a loop of your own, for cameras that hang elsewhere.

The small algebraic network of the package knows cameras at the height of people's heads. Here they
hang under the ceiling and look down. An ordinary PyTorch loop, with the 3D error as the loss, goes
on from its weights; your own data need only come as `tritool.data.Sample`.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.data import DataLoader

from tritool.data import Sample, collate
from tritool.data.synthetic import Studio, StudioSettings
from tritool.losses import heatmap_cross_entropy, soft_mse
from tritool.metrics import mpjpe
from tritool.models import normalize_images
from tritool.training import load_network

CEILING = StudioSettings(
    views=4, image_size=(128, 128), marked_sides=True, ring_radius=(2500.0, 3500.0),
    camera_height=(3300.0, 3900.0), area=300.0,
    actions=("standing", "walking", "reaching", "arms up", "arms out", "gesturing"),
)  # fmt: skip


@torch.no_grad()
def error(network: nn.Module, samples: list[Sample]) -> float:
    """Mean distance to the true joints, mm."""
    network.eval()
    found, true = [], []
    for batch in DataLoader(samples, batch_size=8, collate_fn=collate):
        output = network(normalize_images(batch.images), batch.projections, views=batch.views)
        found.append(output.keypoints_3d)
        true.append(batch.keypoints_3d)
    return float(mpjpe(torch.cat(found), torch.cat(true)))


def main(steps: int = 60, unseen: int = 40) -> tuple[float, float]:
    """Trains; returns the error on people that were never seen, mm, before and after."""
    torch.manual_seed(0)
    network = load_network("tritool:small-algebraic")
    test = [Studio(CEILING, length=unseen, seed=1)[index] for index in range(unseen)]
    before = error(network, test)
    print(f"cameras under the ceiling, weights of the package: {before:.1f} mm")

    loader = DataLoader(Studio(CEILING, length=4 * steps), batch_size=4, collate_fn=collate)
    optimiser = torch.optim.AdamW(network.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 1e-3, total_steps=steps)
    for step, batch in enumerate(loader):
        network.train()
        output = network(normalize_images(batch.images), batch.projections, views=batch.views)
        # Centimetres: beyond 20 of them an error counts less, as in the paper. Heat maps have a
        # quarter of the images' size, and pixel centres are whole numbers in both.
        loss = soft_mse(output.keypoints_3d / 10, batch.keypoints_3d / 10)
        cells = (batch.keypoints_2d + 0.5) / 4 - 0.5
        loss = loss + heatmap_cross_entropy(
            output.heatmaps, cells, sigma=1.5, inverse_temperature=20.0
        )
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 50.0)
        optimiser.step()
        schedule.step()
        if step % 20 == 19:
            print(f"step {step + 1}: {error(network, test):.1f} mm")
    return before, error(network, test)


if __name__ == "__main__":
    main()
