# SPDX-License-Identifier: Apache-2.0
"""`official_conventions`: the official code's names, and its formulas in plain PyTorch and loops.

The official code is `karfly/learnable-triangulation-pytorch`. Backbone and 3D network are compared
with second forwards of their own elsewhere; here is what lies between and after them.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import official_names as official
import pytest
import rigs
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tritool.models import (
    AlgebraicTriangulation,
    VolumetricTriangulation,
    load_official_checkpoint,
)

HEIGHT, WIDTH = 128, 160  # the official code takes squares only; its formulas tell the sides apart
JOINTS, CHANNELS, VOXELS, SIDE = 3, 4, 32, 2500.0
CONFIDENT = ("conf", "mean")
AXES = {"z": (0.0, 0.0, 1.0), "y": (0.0, 1.0, 0.0)}

# ---- Names ----

NETWORKS: dict[str, tuple[type[nn.Module], dict[str, Any], official.Shapes]] = {
    "algebraic": (AlgebraicTriangulation, {}, official.algebraic_network()),
    "algebraic, no confidences": (
        AlgebraicTriangulation,
        {"use_confidences": False},
        official.prefixed("backbone.", official.backbone()),
    ),
    **{
        f"volumetric, {aggregation}": (
            VolumetricTriangulation,
            {"aggregation": aggregation},
            official.volumetric_network(confidence=aggregation in CONFIDENT),
        )
        for aggregation in ("sum", "mean", "conf", "softmax", "max")
    },
}


def empty(name: str) -> nn.Module:
    """A network of the official size, without memory."""
    kind, settings, _ = NETWORKS[name]
    with torch.device("meta"):
        return kind(official_conventions=True, **settings)


@pytest.mark.parametrize("name", NETWORKS)
def test_names_and_shapes_are_the_official_ones(name: str) -> None:
    ours = {key: tuple(tensor.shape) for key, tensor in empty(name).state_dict().items()}
    assert ours == NETWORKS[name][2]


@pytest.mark.parametrize("name", ["algebraic", "volumetric, softmax", "volumetric, conf"])
def test_official_like_files_load_strictly(name: str, tmp_path: Path) -> None:
    expected = NETWORKS[name][2]
    tensors = {
        key: torch.tensor(float(index)).expand(shape) if shape else torch.tensor(index)
        for index, (key, shape) in enumerate(expected.items())
    }
    torch.save({f"module.{key}": value for key, value in tensors.items()}, tmp_path / "weights.pth")
    network = empty(name).to_empty(device="cpu")
    report = load_official_checkpoint(network, tmp_path / "weights.pth", strict=True)
    assert set(report.loaded) == set(expected)
    for key, tensor in network.state_dict().items():
        assert torch.equal(tensor.flatten()[-1], tensors[key].flatten()[-1]), key


# ---- Networks and scenes ----


def lively(network: nn.Module, dtype: torch.dtype) -> Any:
    """Weights that make the outputs differ from place to place, view to view, joint to joint."""
    generator = torch.Generator().manual_seed(0)
    heads = ("final_layer", "process_features", "output_layer", "confidences.head.4")
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.endswith("weight") and any(head in name for head in heads):
                # Larger ones saturate the sigmoid of confidences: all views alike.
                std = 0.01 if "confidences" in name else 1.0
                parameter.normal_(std=std, generator=generator)
    return network.eval().to(dtype)


def algebraic(dtype: torch.dtype = torch.float64, joints: int = JOINTS, **settings: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"width": 4, "deconv_channels": 6}
    network = AlgebraicTriangulation(joints, 18, official_conventions=True, **sizes, **settings)
    return lively(network, dtype)


def volumetric(dtype: torch.dtype = torch.float64, *, whole: bool = False, **settings: Any) -> Any:
    """Unless `whole`, a single layer stands in for the 3D network, to be quick."""
    torch.manual_seed(0)
    sizes = {"width": 4, "deconv_channels": 6, "volume_channels": CHANNELS, "v2v_width": 2}
    settings = {"official_conventions": True, "inverse_temperature": 2.0, **sizes, **settings}
    network = VolumetricTriangulation(JOINTS, 18, VOXELS, SIDE, **settings)
    if not whole:
        network.volume_net = nn.Sequential()
        network.volume_net.output_layer = nn.Conv3d(CHANNELS, JOINTS, 1)
    return lively(network, dtype)


def images() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 3, 3, HEIGHT, WIDTH, generator=generator, dtype=torch.float64)


def projections() -> Tensor:
    """Three cameras around the first person; around the second ones inside of the cube."""
    scenes = [
        rigs.ring(3, radius, height=1500.0, focal=150.0, image_size=(WIDTH, HEIGHT))
        for radius in (4500.0, 900.0)
    ]
    return torch.stack([torch.from_numpy(rig.projections) for rig in scenes])


def centers() -> Tensor:
    return torch.tensor([[40.0, -70.0, 950.0], [-30.0, 20.0, 900.0]], dtype=torch.float64)


# ---- Algebraic ----


def algebraic_formulas(
    heatmaps: Tensor, confidences: Tensor | None, matrices: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """One scene: joints `[J, 3]`, `[C, J, 2]` and weights `[C, J]`, from `[C, J, h, w]`."""
    views, joints, rows, columns = heatmaps.shape
    points = torch.zeros(views, joints, 2, dtype=heatmaps.dtype)
    weights = torch.zeros(views, joints, dtype=heatmaps.dtype)
    results = []
    for j in range(joints):
        for c in range(views):
            p = torch.softmax(temperature * heatmaps[c, j].flatten(), 0).reshape(rows, columns)
            x = sum(column * p[:, column].sum() for column in range(columns))
            y = sum(row * p[row].sum() for row in range(rows))
            points[c, j] = torch.stack([x * (WIDTH / columns), y * (HEIGHT / rows)])
        raw = torch.ones(views) if confidences is None else confidences[:, j]
        weights[:, j] = raw / raw.sum() + 1e-5
        equations = []
        for c in range(views):
            for axis in (0, 1):
                row = points[c, j, axis] * matrices[c, 2] - matrices[c, axis]
                equations.append(weights[c, j] * row)
        solution = torch.linalg.svd(torch.stack(equations)).Vh[-1]
        results.append(solution[:3] / solution[3])
    return torch.stack(results), points, weights


@pytest.mark.parametrize("use_confidences", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_algebraic_formulas(use_confidences: bool, dtype: torch.dtype) -> None:
    network = algebraic(dtype, use_confidences=use_confidences, inverse_temperature=5.0)
    matrices = projections()
    with torch.no_grad():
        output = network(images().to(dtype), matrices.to(dtype))
        parts = network.backbone(images().to(dtype))
    assert output.confidences.std(1).max() > 1e-3 or not use_confidences
    assert output.confidences.min() > 0.01
    close = {"rtol": 1e-9, "atol": 1e-7} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-2}
    for b in range(2):
        raw = parts.algebraic_confidences[b].double() if use_confidences else None
        # In float64, whatever the network's: the formulas themselves, not their rounding.
        joints, points, weights = algebraic_formulas(
            parts.heatmaps[b].double(), raw, matrices[b].to(dtype).double(), 5.0
        )
        torch.testing.assert_close(output.confidences[b].double(), weights, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(output.keypoints_2d[b].double(), points, **close)
        torch.testing.assert_close(output.keypoints_3d[b].double(), joints, **close)


def test_algebraic_conventions_matter() -> None:
    network, other = algebraic(inverse_temperature=5.0), algebraic(inverse_temperature=5.0)
    other.official_conventions = False
    with torch.no_grad():
        ours = network(images(), projections()).keypoints_2d
        theirs = other(images(), projections()).keypoints_2d
    torch.testing.assert_close(ours + 1.5, theirs)


# ---- Volumetric ----


def turn(axis: tuple[float, float, float], angle: float) -> Tensor:
    """The rotation about an axis of length 1, right-handed."""
    x, y, z = axis
    cross = torch.tensor([[0.0, -z, y], [z, 0.0, -x], [-y, x, 0.0]], dtype=torch.float64)
    return (
        torch.eye(3, dtype=torch.float64)
        + math.sin(angle) * cross
        + (1 - math.cos(angle)) * cross @ cross
    )


def official_voxels(center: Tensor, rotation: Tensor) -> Tensor:
    """`[X, Y, Z, 3]`: from face to face of the cube, the indices along the world's axes, turned."""
    steps = torch.arange(VOXELS, dtype=torch.float64)
    axes = [center[a] - SIDE / 2 + steps * SIDE / (VOXELS - 1) for a in range(3)]
    voxels = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1)
    return (voxels - center) @ rotation.T + center


def official_volume(
    features: Tensor, confidences: Tensor | None, matrices: Tensor, voxels: Tensor, aggregation: str
) -> Tensor:
    """One scene: the aggregated volume `[K, X, Y, Z]` from `[C, K, h, w]`."""
    rows, columns = features.shape[-2:]
    points = F.pad(voxels.reshape(-1, 3), (0, 1), value=1.0)
    seen = []
    for c in range(len(features)):
        scale = torch.tensor([columns / WIDTH, rows / HEIGHT, 1.0], dtype=torch.float64)
        x, y, depth = ((scale[:, None] * matrices[c]) @ points.T).unbind(0)
        behind = depth <= 0
        depth = torch.where(depth == 0, 1, depth)
        # The official code divides by the sides of the other direction.
        places = torch.stack([2 * (x / depth / rows - 0.5), 2 * (y / depth / columns - 0.5)], -1)
        sampled = F.grid_sample(features[c][None], places[None, None], align_corners=True)[0, :, 0]
        sampled[:, behind] = 0
        seen.append(sampled.reshape(-1, *voxels.shape[:3]))
    values = torch.stack(seen)
    if aggregation in CONFIDENT:
        assert confidences is not None
        shares = confidences / confidences.sum(0) if aggregation == "mean" else confidences
        return sum(values[c] * shares[c, :, None, None, None] for c in range(len(values)))
    if aggregation == "softmax":
        return (torch.softmax(values, 0) * values).sum(0)
    return values.amax(0) if aggregation == "max" else values.sum(0)


def volumetric_formulas(
    network: VolumetricTriangulation, x: Tensor, matrices: Tensor, angles: list[float], axis: str
) -> tuple[Tensor, Tensor]:
    """Joints `[B, J, 3]` and volumes before the softmax, in float64."""
    parts = network.backbone(x)
    results, volumes = [], []
    for b, center in enumerate(centers()):
        voxels = official_voxels(center, turn(AXES[axis], angles[b]))
        features = network.process_features(parts.features[b])
        raw = parts.volumetric_confidences
        volume = network.volume_net(
            official_volume(
                features, None if raw is None else raw[b], matrices[b], voxels, network.aggregation
            )[None]
        )[0]
        joints = []
        for logits in volume:
            p = torch.softmax(network.inverse_temperature * logits.flatten(), 0)
            joints.append((p[:, None] * voxels.reshape(-1, 3)).sum(0))
        results.append(torch.stack(joints))
        volumes.append(volume)
    return torch.stack(results), torch.stack(volumes)


@pytest.mark.parametrize("aggregation", ["sum", "mean", "conf", "softmax", "max"])
@pytest.mark.parametrize("axis", ["z", "y"])
def test_volumetric_formulas(aggregation: str, axis: str) -> None:
    angles = [0.0, 0.0] if axis == "z" else [0.7, -2.1]
    network = volumetric(aggregation=aggregation, vertical=axis)
    x, matrices = images(), projections()
    rotation = None if axis == "z" else torch.tensor(angles, dtype=torch.float64)
    with torch.no_grad():
        output = network(x, matrices, centers(), rotation=rotation)
        joints, volumes = volumetric_formulas(network, x, matrices, angles, axis)
    assert (joints - centers()[:, None]).norm(dim=-1).min() > 10
    if network.use_confidences:
        assert output.confidences.std(1).max() > 1e-3
        assert output.confidences.min() > 0.01
    torch.testing.assert_close(output.volumes, volumes, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(output.keypoints_3d, joints, rtol=0, atol=1e-6)
    for b in range(2):
        voxels = official_voxels(centers()[b], turn(AXES[axis], angles[b]))
        torch.testing.assert_close(output.grid.points()[b], voxels, rtol=0, atol=1e-9)


def test_volumetric_formulas_in_float32() -> None:
    network, twin = volumetric(torch.float32, whole=True), volumetric(whole=True)
    x, matrices = images().float(), projections().float()
    with torch.no_grad():
        output = network(x, matrices, centers().float())
        joints, volumes = volumetric_formulas(twin, x.double(), matrices.double(), [0.0] * 2, "z")
    torch.testing.assert_close(output.volumes.double(), volumes, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(output.keypoints_3d.double(), joints, rtol=0, atol=0.1)


def test_volumetric_conventions_matter() -> None:
    network, other = volumetric(), volumetric(official_conventions=False, upright=False)
    with torch.no_grad():
        ours = network(images(), projections(), centers()).keypoints_3d
        theirs = other(images(), projections(), centers()).keypoints_3d
    assert (ours - theirs).norm(dim=-1).max() > 1


@pytest.mark.parametrize(("pelvis", "joints"), [(None, (6,)), ((11, 12), (11, 12))])
def test_the_cube_stands_around_the_official_pelvis(pelvis: Any, joints: tuple[int, ...]) -> None:
    model = algebraic(joints=17)
    network = volumetric(algebraic=model, pelvis=pelvis)
    with torch.no_grad():
        found = model(images(), projections()).keypoints_3d
        output = network(images(), projections())
    expected = torch.stack([found[:, joint] for joint in joints]).mean(0)
    torch.testing.assert_close(output.centers, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("axis", ["z", "y"])
def test_training_turns_the_official_cube_about_the_vertical(axis: str) -> None:
    network = volumetric(vertical=axis).train()
    grid = network(
        images(), projections(), centers(), generator=torch.Generator().manual_seed(3)
    ).grid
    up = torch.tensor(AXES[axis], dtype=torch.float64)
    steps = grid.axes * (VOXELS - 1) / SIDE
    vertical = AXES[axis].index(1.0)
    torch.testing.assert_close(steps[:, vertical], up.expand(2, 3))
    cosines = steps.diagonal(dim1=1, dim2=2)[:, (vertical + 1) % 3]
    assert (cosines < 0.99).all()
    assert cosines[0] != cosines[1]
