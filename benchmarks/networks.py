# SPDX-License-Identifier: Apache-2.0
"""Measures a training step of each network, beside the same network on plain PyTorch geometry.

Everything but the geometry is the same in both: the layers, their weights, the images. Versions
take turns within each round; peak memory is measured in a fresh process for each; a profile of one
step tells the share of tritool's operations. On a GPU both are also measured with what dominates
then made fast: layers compiled and under autocast to bfloat16. Writes one JSON,
benchmarks/results/<version>/networks--<machine>--<device>.json (with --quick to .benchmarks/).
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import bench
import torch
from bench import Json
from rivals.soft_argmax import soft_argmax2d_marginals, soft_argmax3d_marginals
from rivals.triangulate import dlt_eigh
from rivals.unproject import all_views, homogeneous
from run import ChildFailed, default_output, write
from suites.case import SEED
from suites.scene import room
from torch import Tensor

from tritool import VoxelGrid, losses
from tritool.models import AlgebraicTriangulation, RansacTriangulation, VolumetricTriangulation
from tritool.training.loop import channels_last

SCHEMA = 1
JOINTS = 17
VERSIONS = ("tritool", "plain PyTorch")
FAST = ", bfloat16, compiled"


@dataclass(frozen=True)
class Spec:
    """A network at one size."""

    network: str
    batch: int
    views: int
    pixels: int
    depth: int
    width: int
    deconv: int
    volume: int = 0
    channels: int = 0
    v2v_width: int = 32
    v2v_front_width: int | None = None

    @property
    def name(self) -> str:
        volume = f", {self.volume}^3 x {self.channels}, V2V of width {self.v2v_width}"
        if not self.volume:
            volume = ""
        return (
            f"{self.network}, {self.batch}x{self.views} images of {self.pixels}^2, "
            f"ResNet-{self.depth} of width {self.width}{volume}"
        )


def specs(quick: bool, device: str = "cpu") -> list[Spec]:
    """The paper's batch of 5 is for a GPU."""
    if quick:
        tiny = {"batch": 2, "views": 2, "pixels": 128, "depth": 18, "width": 2, "deconv": 4}
        return [
            Spec("ransac", **tiny),
            Spec("algebraic", **tiny),
            Spec("volumetric", **tiny, volume=32, channels=2, v2v_width=2),
        ]
    small = {"batch": 8, "views": 4, "pixels": 128, "depth": 18, "width": 16, "deconv": 32}
    small_v2v = {"v2v_width": 12, "v2v_front_width": 16}
    batch = 5 if device == "cuda" else 1
    paper = {"batch": batch, "views": 4, "pixels": 384, "depth": 152, "width": 64, "deconv": 256}
    return [
        Spec("ransac", **small),
        Spec("algebraic", **small),
        Spec("volumetric", **{**small, "batch": 4}, volume=32, channels=32, **small_v2v),
        Spec("algebraic", **paper),
        Spec("volumetric", **paper, volume=64, channels=32),
    ]


def training_step(spec: Spec, device: str, fast: bool = False) -> Callable[[], Tensor]:
    """Forward, loss, backward and an Adam step, on fixed random images and a ring of cameras.

    `fast`: the layers are compiled, and under autocast to bfloat16. The step returns its loss.
    """
    torch.manual_seed(SEED)
    generator = torch.Generator().manual_seed(SEED)
    projections, points = room(spec.batch * JOINTS, spec.views, generator)
    target = points.float().reshape(spec.batch, JOINTS, 3).to(device)
    projections = projections.float().expand(spec.batch, -1, -1, -1).contiguous().to(device)
    shape = (spec.batch, spec.views, 3, spec.pixels, spec.pixels)
    images = torch.randn(shape, generator=generator).to(device)
    centers = target.mean(1)
    options = {"width": spec.width, "deconv_channels": spec.deconv}
    if spec.network == "ransac":
        network: torch.nn.Module = RansacTriangulation(JOINTS, spec.depth, **options)
    elif spec.network == "algebraic":
        network = AlgebraicTriangulation(JOINTS, spec.depth, **options)
    else:
        network = VolumetricTriangulation(
            JOINTS, spec.depth, spec.volume, volume_channels=spec.channels,
            v2v_width=spec.v2v_width, v2v_front_width=spec.v2v_front_width,
            random_rotation=False, **options,
        )  # fmt: skip
    network = network.to(device).train()
    channels_last(network)
    optimizer = torch.optim.Adam([p for p in network.parameters() if p.requires_grad], lr=1e-6)
    cells = spec.pixels // 4
    places = (torch.rand(spec.batch, spec.views, JOINTS, 2, generator=generator) * cells).to(device)

    if fast:
        for name in ("backbone", "volume_net"):
            if hasattr(network, name):
                setattr(network, name, torch.compile(getattr(network, name)))

    def loss_of_step() -> Tensor:
        if spec.network == "ransac":
            heatmaps = network.backbone(images).heatmaps  # type: ignore[operator]
            return losses.heatmap_mse(heatmaps, places)
        if spec.network == "algebraic":
            found = network(images, projections).keypoints_3d
            return losses.soft_mse(found / 10, target / 10)
        output = network(images, projections, centers)
        return losses.l1(output.keypoints_3d / 10, target / 10)

    def step() -> Tensor:
        with torch.autocast(device, torch.bfloat16, enabled=fast):
            loss = loss_of_step()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


@contextmanager
def geometry(version: str) -> Iterator[None]:
    """Inside, the networks use tritool's operations or plain PyTorch for them."""
    if version.removesuffix(FAST) == "tritool":
        yield
        return
    algebraic, volumetric = "tritool.models.algebraic", "tritool.models.volumetric"
    with (
        mock.patch(f"{algebraic}.soft_argmax2d", plain_soft_argmax2d),
        mock.patch(f"{algebraic}.triangulate", plain_triangulate),
        mock.patch(f"{volumetric}.soft_argmax3d", plain_soft_argmax3d),
        mock.patch(f"{volumetric}.unproject", plain_unproject),
    ):
        yield


def plain_soft_argmax2d(heatmaps: Tensor, *, inverse_temperature: float) -> Tensor:
    height, width = heatmaps.shape[-2:]
    run = soft_argmax2d_marginals(height, width, inverse_temperature, str(heatmaps.device))
    return run(heatmaps)  # type: ignore[no-any-return]


def plain_triangulate(points: Tensor, projections: Tensor, weights: Tensor) -> Tensor:
    run = dlt_eigh(torch.float64)
    return run(points, projections.expand(*points.shape[:-1], 3, 4), weights)  # type: ignore[no-any-return]


def plain_soft_argmax3d(volumes: Tensor, *, inverse_temperature: float, grid: VoxelGrid) -> Tensor:
    assert inverse_temperature == 1.0
    return soft_argmax3d_marginals(grid.size, grid.origin, grid.axes)(volumes)  # type: ignore[no-any-return]


def plain_unproject(
    features: Tensor, projections: Tensor, grid: VoxelGrid, *, aggregation: str, **_: object
) -> Tensor:
    run = all_views(homogeneous(grid.points()), grid.size, aggregation)  # type: ignore[arg-type]
    return run(features, projections)


# ---- measuring ----


def versions_of(spec: Spec, device: str) -> tuple[str, ...]:
    """The baseline's training step has no geometry of ours to replace."""
    versions = VERSIONS[:1] if spec.network == "ransac" else VERSIONS
    return versions + tuple(name + FAST for name in versions) if device == "cuda" else versions


def op_shares(step: Callable[[], object], device: str) -> dict[str, float]:
    """The part of a step's time that each of tritool's operations takes, and all of them.

    On the CPU of the time of all operations, on a GPU of that of all kernels.
    """
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] if device == "cuda" else []
    step()
    with torch.profiler.profile(activities=activities) as profile:
        step()
        if device == "cuda":
            torch.cuda.synchronize()
    events = profile.key_averages()
    # An operation of ours has none of anyone's inside but those that make its tensors.
    kind = "device" if device == "cuda" else "cpu"
    total = sum(getattr(event, f"self_{kind}_time_total") for event in events)
    shares = {
        event.key: getattr(event, f"{kind}_time_total") / total
        for event in events
        if event.key.startswith("tritool::")
    }
    return {"all": sum(shares.values()), **shares}


def measure(request: Json) -> Json:
    """What a child process does: times of all versions, or the peak memory of one."""
    torch.set_num_threads(request["threads"])
    device = request["device"]
    spec = next(s for s in specs(request["quick"], device) if s.name == request["case"])

    def call(version: str) -> Callable[[], object]:
        step = training_step(spec, device, fast=version.endswith(FAST))

        def run() -> None:
            with geometry(version):
                step()

        return run

    if request["memory_of"]:
        return {"peak_mib": bench.peak_memory(call(request["memory_of"]), device)}
    calls = {version: call(version) for version in versions_of(spec, device)}
    times = bench.time_calls(calls, "tritool", device, request["seconds"])
    shares = {
        version: op_shares(calls[version], device)
        for version in calls
        if version.removesuffix(FAST) == "tritool"
    }
    return {"times": times, "op_shares": shares}


def ask(request: Json, malloc: dict[str, str]) -> Json:
    threads = {name: str(request["threads"]) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    done = subprocess.run(
        [sys.executable, __file__, "--request", json.dumps(request)],
        env={**os.environ, **threads, **malloc},
        stdout=subprocess.PIPE,
        text=True,
    )
    if done.returncode != 0:
        raise ChildFailed(f"the measuring process ended with status {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--seconds", type=float, help="for timing a case (default: 40, quick 0.1)")
    parser.add_argument("--only", metavar="TEXT", default="", help="cases whose name contains TEXT")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does everything run?")
    parser.add_argument("--output", type=Path, metavar="FILE")
    parser.add_argument("--request", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.request:
        print(json.dumps(measure(json.loads(options.request))))
        return 0
    if options.device == "cuda" and not torch.cuda.is_available():
        print("networks.py: --device cuda needs an NVIDIA GPU", file=sys.stderr)
        return 1
    threads = 1 if options.quick else len(os.sched_getaffinity(0))
    seconds = options.seconds or (0.1 if options.quick else 40.0)
    started = datetime.datetime.now(datetime.timezone.utc)
    load = os.getloadavg()[0]
    cases = []
    for spec in specs(options.quick, options.device):
        if options.only not in spec.name:
            continue
        request: Json = {
            "case": spec.name, "device": options.device, "threads": threads,
            "seconds": seconds, "quick": options.quick, "memory_of": "",
        }  # fmt: skip
        found = ask(request, bench.KEPT_PAGES if options.device == "cpu" else {})
        rows: list[Json] = []
        for version, times in found["times"].items():
            peak = ask(request | {"memory_of": version}, bench.RETURNED_PAGES)["peak_mib"]
            rows.append({"name": version, "times": times, "peak_memory_mib": peak})
            text = f"{times['median_ms']:.4g} ms, peak {peak:.4g} MiB"
            if version in found["op_shares"]:
                rows[-1]["op_shares"] = found["op_shares"][version]
                text += f", operations {100 * found['op_shares'][version]['all']:.2g} %"
            print(f"{spec.name}: {version}: {text}", file=sys.stderr)
        cases.append({"network": spec.network, "size": spec.name, "variants": rows})
    result = {
        "schema": SCHEMA,
        "suite": "networks",
        "quick": options.quick,
        "machine": bench.machine_slug(options.device),
        "device": options.device,
        "date": started.strftime("%Y-%m-%dT%H:%M:%SZ"),
        "settings": {
            "threads": threads,
            "seconds_per_case": seconds,
            "seed": SEED,
            "load_average": [round(load, 2), round(os.getloadavg()[0], 2)],
        },
        "environment": bench.environment(options.device),
        "cases": cases,
    }
    output = options.output or default_output(result, options.quick)
    write(output, result)
    print(f"networks.py: wrote {output}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
