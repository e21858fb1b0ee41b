# SPDX-License-Identifier: Apache-2.0
"""Voxel grids: where the voxels lie, both conventions, inverses, gradients and transforms."""

from __future__ import annotations

import copy
import dataclasses
import doctest
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

import tritool.grid
from tritool.grid import VoxelGrid


def make_grid(dtype=torch.float64, batch=2, size=(3, 4, 5), seed=0):
    generator = torch.Generator().manual_seed(seed)
    origin = 1000 * torch.randn(batch, 3, generator=generator, dtype=torch.float64)
    skewed = 20 * torch.randn(batch, 3, 3, generator=generator, dtype=torch.float64)
    axes = skewed + 50 * torch.eye(3, dtype=torch.float64)
    return VoxelGrid(origin.to(dtype), axes.to(dtype), size)


def quarter_turn(dtype=torch.float64):
    """About z: the box's first axis points along the world's y."""
    return torch.tensor([[0.0, -1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]], dtype=dtype)


def test_points_are_the_definition():
    grid = make_grid()
    points = grid.points()
    assert points.shape == (2, 3, 4, 5, 3)
    assert grid.batch == 2
    origin, axes = grid.origin.numpy(), grid.axes.numpy()
    for b, i, j, k in itertools.product(range(2), range(3), range(4), range(5)):
        expected = origin[b] + i * axes[b, 0] + j * axes[b, 1] + k * axes[b, 2]
        np.testing.assert_allclose(points[b, i, j, k], expected, rtol=0, atol=1e-10)


def test_points_are_the_world_of_the_indices():
    for dtype in (torch.float32, torch.float64):
        grid = make_grid(dtype)
        ranges = [torch.arange(n, dtype=dtype) for n in grid.size]
        index = torch.stack(torch.meshgrid(*ranges, indexing="ij"), -1)
        assert torch.equal(grid.to_world(index[None]), grid.points())
        atol = 1e-12 if dtype == torch.float64 else 1e-4
        back = grid.to_index(grid.points())
        torch.testing.assert_close(back, index.expand_as(back), rtol=0, atol=atol)


@pytest.mark.parametrize("corner_aligned", [False, True])
def test_cube_conventions(corner_aligned):
    center = torch.tensor([[10.0, -20.0, 900.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    grid = VoxelGrid.cube(center, 2500.0, corner_aligned=corner_aligned)
    assert grid.size == (64, 64, 64)
    points = grid.points()
    first, last = points[:, 0, 0, 0], points[:, -1, -1, -1]
    torch.testing.assert_close((first + last) / 2, center)
    # From face to face, or half a voxel inside the faces.
    spacing = 2500 / 63 if corner_aligned else 2500 / 64
    margin = 0 if corner_aligned else spacing / 2
    torch.testing.assert_close(first, center - 1250 + margin)
    torch.testing.assert_close(last, center + 1250 - margin)
    torch.testing.assert_close(
        points[:, 1, 0, 0] - first, spacing * torch.eye(3).double()[:1].expand(2, 3)
    )


def test_corner_aligned_is_the_formula_of_the_official_code():
    # Coordinate i along an axis: centre - side / 2 + i side / (n - 1).
    center = np.array([30.0, -40.0, 950.0])
    points = VoxelGrid.cube(torch.tensor(center)[None], 2500.0, 64, corner_aligned=True).points()
    along = np.arange(64)[:, None] * (2500 / 63) + (center - 1250)
    np.testing.assert_allclose(points[0, :, 0, 0, 0], along[:, 0])
    np.testing.assert_allclose(points[0, 0, :, 0, 1], along[:, 1])
    np.testing.assert_allclose(points[0, 0, 0, :, 2], along[:, 2])


def test_box_turned_about_its_centre():
    center = torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.float64)
    grid = VoxelGrid.cube(center, (8.0, 4.0, 2.0), (4, 2, 8), rotation=quarter_turn())
    expected = torch.tensor([[0, 2.0, 0], [-2.0, 0, 0], [0, 0, 0.25]], dtype=torch.float64)
    torch.testing.assert_close(grid.axes[0], expected)
    torch.testing.assert_close(grid.points().mean((1, 2, 3)), center)
    # A box point and its world: center + R (index - middle) * spacing.
    local = torch.tensor([4.0, 0.0, 0.0], dtype=torch.float64)
    face = grid.to_index((center[0] + quarter_turn() @ local)[None])
    torch.testing.assert_close(face, torch.tensor([[3.5, 0.5, 3.5]], dtype=torch.float64))


def test_ways_to_give_the_sides():
    center = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, 9.0]], dtype=torch.float64)
    rotation = torch.stack([quarter_turn(), torch.eye(3).double(), quarter_turn().T])

    def axes(side, **options):
        return VoxelGrid.cube(center, side, 4, rotation, **options).axes

    cube = axes(8)
    assert torch.equal(cube, axes(torch.tensor(8.0, dtype=torch.float64)))
    assert torch.equal(cube, axes((8, 8.0, 8)))
    assert torch.equal(cube, axes(torch.full((3, 3), 8.0, dtype=torch.float64)))
    # One dimension of a tensor is the batch, three numbers are the axes.
    per_batch = axes(torch.tensor([4.0, 8.0, 16.0], dtype=torch.float64))
    assert per_batch.norm(dim=-1).tolist() == [[1, 1, 1], [2, 2, 2], [4, 4, 4]]
    assert axes([4.0, 8.0, 16.0]).norm(dim=-1).tolist() == [[1, 2, 4]] * 3
    assert torch.equal(axes(8, corner_aligned=True), cube * 4 / 3)


@settings(deadline=None, max_examples=50)
@given(
    st.integers(0, 10_000),
    st.tuples(*[st.integers(1, 9)] * 3),
    st.tuples(*[st.floats(-100, 100)] * 3),
)
def test_law_index_and_world_are_inverse(seed, size, index):
    grid = make_grid(size=size, seed=seed)
    index = torch.tensor([index, index], dtype=torch.float64)
    world = grid.to_world(index)
    condition = torch.linalg.cond(grid.axes).max().item()
    back = grid.to_index(world)
    torch.testing.assert_close(back, index, rtol=1e-13 * condition, atol=1e-11 * condition)


@settings(deadline=None, max_examples=50)
@given(
    st.tuples(*[st.integers(2, 7)] * 3),
    st.tuples(*[st.floats(0.5, 5000)] * 3),
    st.booleans(),
    st.floats(0, 7),
)
def test_law_cube_is_centred_and_as_large_as_asked(size, side, corner_aligned, angle):
    c, s = np.cos(angle), np.sin(angle)
    turn = torch.tensor([[c, -s, 0], [s, c, 0], [0, 0, 1]])
    center = torch.tensor([[3.0, -2.0, 1.0]], dtype=torch.float64)
    grid = VoxelGrid.cube(center, side, size, turn, corner_aligned)
    middle = torch.tensor([[(n - 1) / 2 for n in size]], dtype=torch.float64)
    torch.testing.assert_close(grid.to_world(middle), center, rtol=0, atol=1e-9)
    half = torch.tensor([list(side)], dtype=torch.float64) / 2
    corner = grid.to_index(center + half @ turn.T)
    beyond = 0.0 if corner_aligned else 0.5
    torch.testing.assert_close(corner, 2 * middle + beyond, rtol=0, atol=1e-9)


def test_batches_broadcast():
    grid, single = make_grid(batch=2), make_grid(batch=1)
    index = torch.rand(2, 6, 7, 3, dtype=torch.float64)
    assert grid.to_world(index).shape == (2, 6, 7, 3)
    assert torch.equal(
        grid.to_world(index[:1])[1], grid.to_world(index[:1].expand(2, -1, -1, -1))[1]
    )
    assert single.to_world(index).shape == (2, 6, 7, 3)
    assert torch.equal(single.to_index(index)[1], single.to_index(index[1:])[0])
    assert grid.to_world(index[:, 0, 0]).shape == (2, 3)
    assert grid.to_world(index[:, :0]).shape == (2, 0, 7, 3)


def test_dependent_axes_have_no_index():
    flat = VoxelGrid(torch.zeros(1, 3), torch.ones(1, 3, 3), (2, 2, 2))
    assert not flat.to_index(torch.tensor([[1.0, 2.0, 3.0]])).isfinite().any()


def test_gradients():
    grid = make_grid()
    frame = (grid.origin.clone().requires_grad_(), grid.axes.clone().requires_grad_())
    points = torch.rand(2, 2, 3, dtype=torch.float64, requires_grad=True)
    for method in (VoxelGrid.to_world, VoxelGrid.to_index):
        inputs = (*frame, points)
        call = lambda o, a, p, method=method: method(VoxelGrid(o, a, grid.size), p)  # noqa: E731
        assert gradcheck(call, inputs)
        assert gradgradcheck(call, inputs)
    assert gradcheck(lambda o, a: VoxelGrid(o, a, (2, 1, 3)).points(), frame)
    center = torch.rand(2, 3, dtype=torch.float64, requires_grad=True)
    side = torch.tensor([3.0, 4.0], dtype=torch.float64, requires_grad=True)
    turn = quarter_turn().requires_grad_()
    assert gradcheck(lambda c, s, r: VoxelGrid.cube(c, s, 3, r).points(), (center, side, turn))


def test_is_a_pytree():
    grid = make_grid()
    leaves, spec = torch.utils._pytree.tree_flatten(grid)
    assert [leaf is part for leaf, part in zip(leaves, (grid.origin, grid.axes), strict=True)] == [
        True,
        True,
    ]
    twin = torch.utils._pytree.tree_unflatten(leaves, spec)
    assert isinstance(twin, VoxelGrid)
    assert twin.size == grid.size
    paths = torch.utils._pytree.tree_flatten_with_path(grid)[0]
    assert [torch.utils._pytree.keystr(path) for path, _ in paths] == [".origin", ".axes"]
    gradient = torch.func.grad(lambda g: g.points().sum())(grid)
    assert isinstance(gradient, VoxelGrid)
    torch.testing.assert_close(gradient.origin, torch.full_like(grid.origin, 3 * 4 * 5))
    mapped = torch.func.vmap(VoxelGrid.points)(grid)
    torch.testing.assert_close(mapped, grid.points())


def test_exports_and_compiles():
    class World(torch.nn.Module):
        def forward(self, grid, index):
            return grid.to_world(index), grid.points()

    grid, index = make_grid(), torch.rand(2, 7, 3, dtype=torch.float64)
    program = torch.export.export(World(), (grid, index))
    other = make_grid(seed=1)
    for got, expected in zip(program.module()(other, index), World()(other, index), strict=True):
        torch.testing.assert_close(got, expected)

    def run(center, world):
        cube = VoxelGrid.cube(center, 100.0, 4)
        return cube.points(), cube.to_index(world)

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="eager")
    center = torch.rand(2, 3, dtype=torch.float64)
    for got, expected in zip(compiled(center, index), run(center, index), strict=True):
        torch.testing.assert_close(got, expected)


def test_autocast_leaves_geometry_alone():
    grid = make_grid(torch.float32)
    index = 10 * torch.rand(2, 9, 3)
    expected = grid.to_index(grid.to_world(index)), grid.points()
    with torch.autocast("cpu", torch.bfloat16):
        got = grid.to_index(grid.to_world(index)), grid.points()
        made = VoxelGrid.cube(torch.zeros(1, 3), 10.0, rotation=quarter_turn(torch.float32))
    assert made.dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_to_copy_and_immutability():
    grid = make_grid()
    single = grid.to(torch.float32)
    assert (single.dtype, single.axes.dtype, single.size) == (
        torch.float32,
        torch.float32,
        grid.size,
    )
    assert grid.to("meta").points().device.type == "meta"
    assert torch.equal(copy.deepcopy(grid).points(), grid.points())
    with pytest.raises(dataclasses.FrozenInstanceError):
        grid.size = (1, 1, 1)
    with pytest.raises(TypeError, match="origin must be float32 or float64"):
        grid.to(torch.bfloat16)


def test_docstring_examples():
    assert doctest.testmod(tritool.grid).failed == 0


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"origin": torch.zeros(3)}, ValueError, r"origin must be \[B, 3\], got \(3,\)"),
        ({"origin": [[0, 0, 0]]}, TypeError, r"origin must be a torch.Tensor, got list"),
        ({"axes": torch.zeros(3, 3)}, ValueError, r"axes must be \[B, 3, 3\] with B = 2, got"),
        ({"axes": torch.zeros(1, 3, 3)}, ValueError, r"axes must be .*got \(1, 3, 3\)"),
        ({"axes": torch.zeros(2, 3, 3).double()}, TypeError, r"axes must be torch.float32"),
        ({"axes": torch.zeros(2, 3, 3, device="meta")}, TypeError, r"axes must be on cpu"),
        ({"size": (4, 4)}, ValueError, r"size must be three integers"),
        ({"size": (4, 4, 2.0)}, ValueError, r"size must be three integers"),
        ({"size": (4, 0, 4)}, ValueError, r"size must be at least 1"),
    ],
)
def test_wrong_construction_is_refused(change, error, message):
    fields = {"origin": torch.zeros(2, 3), "axes": torch.zeros(2, 3, 3), "size": (4, 4, 4)}
    with pytest.raises(error, match=message):
        VoxelGrid(**{**fields, **change})


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"center": torch.zeros(3)}, ValueError, r"center must be \[B, 3\], got \(3,\)"),
        ({"side": (1.0, 2.0)}, ValueError, r"side must be one number or three"),
        ({"side": torch.ones(5)}, ValueError, r"side must be \[\], \[B\] or \[B, 3\] with B = 2"),
        ({"side": torch.ones(2).double()}, TypeError, r"side must be torch.float32"),
        ({"size": 0}, ValueError, r"size must be at least 1"),
        ({"size": (4, 1, 4), "corner_aligned": True}, ValueError, r"size must be at least 2"),
        ({"rotation": torch.eye(3)[None]}, ValueError, r"rotation must be .*got \(1, 3, 3\)"),
        ({"rotation": torch.eye(4)}, ValueError, r"rotation must be .*got \(4, 4\)"),
    ],
)
def test_wrong_cube_is_refused(change, error, message):
    with pytest.raises(error, match=message):
        VoxelGrid.cube(**{"center": torch.zeros(2, 3), "side": 10.0, **change})


def test_wrong_points_are_refused():
    grid = make_grid()
    for method, name in ((grid.to_world, "index"), (grid.to_index, "world")):
        with pytest.raises(
            ValueError, match=rf"{name} must be \[B, ..., 3\] with B = 2, got \(3, 3\)"
        ):
            method(torch.zeros(3, 3, dtype=torch.float64))
        with pytest.raises(ValueError, match=f"{name} must be"):
            method(torch.zeros(3, dtype=torch.float64))
        with pytest.raises(TypeError, match=f"{name} must be torch.float64"):
            method(torch.zeros(2, 3))
