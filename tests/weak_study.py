# SPDX-License-Identifier: Apache-2.0
"""What views teach about depth, without a network: maps of a few samples are the parameters.

The tests look at single results; run as a script, this prints the tables of
docs/weak_supervision.md, in some minutes.
"""

from __future__ import annotations

import torch
import weak_scenes
from torch import Tensor
from weak_scenes import HUMAN36M_JOINTS, PAIR, PELVIS, SIZE

from tritool import losses
from tritool.models.reconstruct import reconstruct_pose
from tritool.ops import soft_argmax25d
from tritool.skeletons import limbs

LIMBS = limbs(HUMAN36M_JOINTS)
MAP = (SIZE[1] // 4, SIZE[0] // 4)  # (H, W)
# As much weight on a moved joint as if the squares were summed over the cells.
FIRM = losses.WeakLossSettings(heatmap=float(MAP[0] * MAP[1]))
PRIOR = losses.WeakLossSettings(heatmap=FIRM.heatmap, alpha=0.0, bending=3.0, bending_margin=0.3)


def cells(xy: Tensor) -> Tensor:
    """Pixels of the images in cells of the maps."""
    return (xy + 0.5) / 4 - 0.5


def gaussians(target: Tensor, size: tuple[int, int] = MAP) -> Tensor:
    """Maps [..., H, W] of height 1 and sigma 2 around cells [..., 2]."""
    rows, columns = torch.meshgrid(torch.arange(size[0]), torch.arange(size[1]), indexing="ij")
    x, y = target[..., None, None, :].unbind(-1)
    return torch.exp(-((columns - x) ** 2 + (rows - y) ** 2) / 8)


class Direct:
    """Maps of a few samples as parameters in place of a network."""

    def __init__(self, seed: int, depth: Tensor, scene: weak_scenes.Views) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.target = cells(scene.xy).float()
        maps = gaussians(self.target)
        noise = 0.15 * torch.randn(depth.shape, generator=generator)
        start = (depth.float() + noise)[..., None, None]
        self.heatmaps = maps.requires_grad_()
        self.depth_maps = start.expand_as(maps).clone().requires_grad_()
        self.scene = scene
        self.mean = losses.mean_limb_lengths(scene.pose, LIMBS, pair=PAIR).float()

    def relative_depth_and_loss(
        self, settings: losses.WeakLossSettings
    ) -> tuple[Tensor, losses.WeakLoss]:
        read = soft_argmax25d(self.heatmaps, self.depth_maps, inverse_temperature=20.0)
        relative = read[..., 2] - read[..., PELVIS, None, 2]
        found = reconstruct_pose(
            4 * read[..., :2] + 1.5,
            relative,
            self.scene.K.float(),
            pair=PAIR,
            min_ratio=0.01,
            depth_range=(1.0, 100.0),
        )
        return relative, losses.weak_total(
            settings,
            heatmaps=self.heatmaps,
            target=self.target,
            poses=found.pose,
            valid=found.valid,
            mean_lengths=self.mean,
            limbs=LIMBS,
        )

    def descend(self, *phases: tuple[int, losses.WeakLossSettings]) -> tuple[Tensor, float]:
        """The depth [B, C, J] in the end and the loss of the last phase."""
        groups = [
            {"params": [self.heatmaps], "lr": 1e-3},
            {"params": [self.depth_maps], "lr": 2e-2},
        ]
        optimizer = torch.optim.Adam(groups)
        steps = sum(count for count, _ in phases)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min(1.0, 2 - 2 * step / steps)
        )
        for count, settings in phases:
            for _ in range(count):
                optimizer.zero_grad()
                self.relative_depth_and_loss(settings)[1].total.backward()
                optimizer.step()
                schedule.step()
        with torch.no_grad():
            depth, loss = self.relative_depth_and_loss(phases[-1][1])
        return depth, loss.total.item()


def errors(depth: Tensor, scene: weak_scenes.Views) -> tuple[Tensor, Tensor]:
    """Mean difference of each sample [B] to the true and to the reversed depths, torso lengths."""
    truth = scene.relative_depth
    return (depth - truth).abs().mean((1, 2)), (depth + truth).abs().mean((1, 2))


def written(seeds: int = 6, steps: int = 400) -> dict[str, list[str]]:
    """The tables, by name, as lines of Markdown."""
    return {"residual": residuals(50 * seeds), "basins": basins(seeds, steps)}


def residuals(people: int) -> list[str]:
    """What remains of consistency where 2D and intrinsics are exact."""
    lines = ["| cameras at | true depths | reversed | flat |", "| --- | --- | --- | --- |"]
    for metres in (2, 3, 5, 8):
        scene = weak_scenes.views(0, batch=people, distance=(1000.0 * metres, 1000.0 * metres + 1))
        each = []
        for factor in (1.0, -1.0, 0.0):
            found = reconstruct_pose(
                scene.xy, factor * scene.relative_depth, scene.K, pair=PAIR, min_ratio=0.01
            )
            loss = losses.multi_view_consistency(found.pose, valid=found.valid)
            each.append(f"{loss.item():.2f}")
        lines.append(f"| {metres} m | {' | '.join(each)} |")
    return lines


def basins(seeds: int, steps: int) -> list[str]:
    """Where descents end."""
    lines = [
        "| cameras at | heatmap | start | in the right basin | median error | median loss |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    loose = losses.WeakLossSettings()
    quarter = steps // 4
    runs = {
        "true": (1.0, ((steps, FIRM),)),
        "reversed": (-1.0, ((steps, FIRM),)),
        "flat": (0.0, ((steps, FIRM),)),
        "flat, knees first": (0.0, ((quarter, PRIOR), (steps - quarter, FIRM))),
        "reversed, knees first": (-1.0, ((quarter, PRIOR), (steps - quarter, FIRM))),
    }
    plain = {name: (runs[name][0], ((steps, loose),)) for name in ("true", "reversed")}
    for metres, distance in (("2 to 3 m", (2000.0, 3000.0)), ("5 m", (5000.0, 5001.0))):
        for factor, group in ((FIRM.heatmap, runs), (loose.heatmap, plain)):
            for name, (sign, phases) in group.items():
                right, other, total = [], [], []
                for seed in range(seeds):
                    scene = weak_scenes.views(seed, batch=4, distance=distance)
                    direct = Direct(seed, sign * scene.relative_depth, scene)
                    depth, loss = direct.descend(*phases)
                    each = errors(depth, scene)
                    right.append(each[0])
                    other.append(each[1])
                    total.append(loss)
                error, mirrored = torch.cat(right), torch.cat(other)
                count = f"{int((error < mirrored).sum())} of {len(error)}"
                middle = f"{error.median():.2f} | {torch.tensor(total).median():.3f}"
                lines.append(f"| {metres} | {factor:.0f} | {name} | {count} | {middle} |")
    return lines


if __name__ == "__main__":
    for title, table in written().items():
        print(f"<!-- study:{title} -->", *table, "<!-- study:end -->", "", sep="\n")
