# SPDX-License-Identifier: Apache-2.0
"""What a call costs where there is next to nothing to compute: one frame of one person.

    taskset -c 0 python benchmarks/calls.py

tritool's public functions beside PyTorch functions that check their arguments, on one frame (17
joints, 4 views) or on inputs as small. All take turns. Writes one JSON,
benchmarks/results/<version>/calls--<machine>--<device>.json (with --quick to .benchmarks/).
"""

from __future__ import annotations

import argparse
import datetime
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import bench
import torch
from run import default_output, write
from suites.case import SEED
from suites.scene import room
from torch import Tensor

from tritool import VoxelGrid, ops

SCHEMA = 1
REFERENCE = "torch.linalg.solve"
JOINTS, VIEWS = 17, 4

Function = Callable[..., Any]


def functions(device: str) -> dict[str, tuple[Function, tuple[Tensor, ...]]]:
    """Every function with its arguments."""
    generator = torch.Generator().manual_seed(SEED)
    projections, points = room(JOINTS, VIEWS, generator)
    projections, points = projections.float().to(device), points.float().to(device)
    pixels = ops.project(points, projections)
    draw = lambda *shape: torch.randn(shape, generator=generator).to(device)  # noqa: E731
    grid = VoxelGrid.cube(torch.zeros(1, 3, device=device), 500.0, 2)
    return {
        REFERENCE: (torch.linalg.solve, (draw(JOINTS, 4, 4), draw(JOINTS, 4, 1))),
        "torch.linalg.svd": (torch.linalg.svd, (draw(JOINTS, 2 * VIEWS, 4),)),
        "torch.linalg.eigh": (torch.linalg.eigh, (draw(JOINTS, 4, 4),)),
        "torch.nn.functional.grid_sample": (
            lambda *maps: torch.nn.functional.grid_sample(*maps, align_corners=True),
            (draw(1, 1, 4, 4), draw(1, 1, 1, 2)),
        ),
        "tritool.ops.triangulate": (ops.triangulate, (pixels, projections)),
        "tritool.ops.project": (ops.project, (points, projections)),
        "tritool.ops.rigid_align": (ops.rigid_align, (points, points)),
        "tritool.ops.soft_argmax2d": (ops.soft_argmax2d, (draw(JOINTS, 4, 5),)),
        "tritool.ops.unproject": (
            lambda features, views: ops.unproject(features, views, grid),
            (draw(1, VIEWS, 1, 4, 5), projections[None]),
        ),
    }


def recorded(function: Function, arguments: tuple[Tensor, ...]) -> Callable[[], object]:
    """The call and its gradients to all arguments."""
    leaves = [argument.clone().requires_grad_() for argument in arguments]
    results = bench.parts(function(*leaves))
    some = [n for n, result in enumerate(results) if result.requires_grad]
    grads = [torch.ones_like(results[n]) for n in some]

    def call() -> object:
        results = bench.parts(function(*leaves))
        return torch.autograd.grad([results[n] for n in some], leaves, grads, allow_unused=True)

    return call


def unrecorded(function: Function, arguments: tuple[Tensor, ...]) -> Callable[[], object]:
    def call() -> object:
        with torch.no_grad():
            return function(*arguments)

    return call


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures and writes."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="does everything run?")
    parser.add_argument("--output", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("calls.py: --device cuda needs an NVIDIA GPU", file=sys.stderr)
        return 1
    torch.set_num_threads(1)
    started = datetime.datetime.now(datetime.timezone.utc)
    load = os.getloadavg()[0]
    seconds = 0.1 if options.quick else 10.0
    made = functions(options.device)
    modes = {"no_grad": unrecorded, "forward_backward": recorded}
    times = {
        mode: bench.time_calls(
            {name: prepare(*each) for name, each in made.items()},
            REFERENCE,
            options.device,
            seconds,
        )
        for mode, prepare in modes.items()
    }
    result = {
        "schema": SCHEMA,
        "suite": "calls",
        "quick": options.quick,
        "machine": bench.machine_slug(options.device),
        "device": options.device,
        "date": started.strftime("%Y-%m-%dT%H:%M:%SZ"),
        "settings": {
            "threads": 1,
            "seconds": seconds,
            "seed": SEED,
            "load_average": [round(load, 2), round(os.getloadavg()[0], 2)],
        },
        "environment": bench.environment(options.device),
        "reference": REFERENCE,
        "calls": [{"name": name, **{mode: times[mode][name] for mode in modes}} for name in made],
    }
    output = options.output or default_output(result, options.quick)
    write(output, result)
    print(f"calls.py: wrote {output}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
