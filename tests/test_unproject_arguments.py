# SPDX-License-Identifier: Apache-2.0
"""What `ops.unproject` says to bad arguments; its raw ops: memory safety, plain PyTorch."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import scenes
import torch
from torch import Tensor

from tritool import VoxelGrid, ops
from tritool.ops import composite

B, C, K, H, W = 2, 3, 4, 6, 7
FEATURES = torch.zeros(B, C, K, H, W)
PROJECTIONS = torch.zeros(1, C, 3, 4)
POINTS = torch.zeros(1, 5, 3)
GRID = VoxelGrid.cube(torch.zeros(1, 3), side=1.0, size=(2, 3, 4))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"features": torch.zeros(C, K, H, W)}, ValueError,
         "features must be [B, C, K, H, W], got (3, 4, 6, 7)"),
        ({"features": torch.zeros(1, B, C, K, H, W)}, ValueError,
         "features must be [B, C, K, H, W], got (1, 2, 3, 4, 6, 7)"),
        ({"features": torch.zeros(B, C, K, 0, W)}, ValueError,
         "features must have H and W of 1 or more, got (2, 3, 4, 0, 7)"),
        ({"features": torch.zeros(B, C, K, H, 0)}, ValueError,
         "features must have H and W of 1 or more, got (2, 3, 4, 6, 0)"),
        ({"features": FEATURES.long()}, TypeError,
         "features must have a floating-point dtype, got torch.int64"),
        ({"features": FEATURES.bool()}, TypeError,
         "features must have a floating-point dtype, got torch.bool"),
        ({"features": FEATURES.to(torch.complex64)}, TypeError,
         "features must have a floating-point dtype, got torch.complex64"),
        ({"features": FEATURES.numpy()}, TypeError,
         "features must be a tensor, got ndarray"),
        ({"projections": torch.zeros(C, 3, 4)}, ValueError,
         "projections must be [B, C, 3, 4] to fit features, [any, 3, 3, 4], got (3, 3, 4)"),
        ({"projections": torch.zeros(1, C + 1, 3, 4)}, ValueError,
         "projections must be [B, C, 3, 4] to fit features, [any, 3, 3, 4], got (1, 4, 3, 4)"),
        ({"projections": torch.zeros(1, C, 4, 4)}, ValueError,
         "projections must be [B, C, 3, 4] to fit features, [any, 3, 3, 4], got (1, 3, 4, 4)"),
        ({"projections": torch.zeros(3, C, 3, 4)}, ValueError,
         "batch dimensions must broadcast, got (2,) of features, (3,) of projections, "
         "(1,) of grid"),
        ({"projections": PROJECTIONS.int()}, TypeError,
         "projections must have a floating-point dtype, got torch.int32"),
        ({"projections": PROJECTIONS.to(torch.complex128)}, TypeError,
         "projections must have a floating-point dtype, got torch.complex128"),
        ({"projections": PROJECTIONS.to("meta")}, ValueError,
         "projections must be on the device of features, cpu, got meta"),
        ({"grid": torch.zeros(3)}, ValueError,
         "grid must be [B, ..., 3] if it is points, got (3,)"),
        ({"grid": torch.zeros(1, 5, 2)}, ValueError,
         "grid must be [B, ..., 3] if it is points, got (1, 5, 2)"),
        ({"grid": torch.zeros(3, 5, 3)}, ValueError,
         "batch dimensions must broadcast, got (2,) of features, (1,) of projections, "
         "(3,) of grid"),
        ({"grid": VoxelGrid.cube(torch.zeros(3, 3), 1.0, 2)}, ValueError,
         "batch dimensions must broadcast, got (2,) of features, (1,) of projections, "
         "(3,) of grid"),
        ({"grid": POINTS.to(torch.int16)}, TypeError,
         "grid must have a floating-point dtype, got torch.int16"),
        ({"grid": POINTS.to(torch.complex64)}, TypeError,
         "grid must have a floating-point dtype, got torch.complex64"),
        ({"grid": POINTS.to("meta")}, ValueError,
         "grid must be on the device of features, cpu, got meta"),
        ({"grid": VoxelGrid.cube(torch.zeros(1, 3, device="meta"), 1.0, 2)}, ValueError,
         "grid must be on the device of features, cpu, got meta"),
        ({"grid": (GRID.origin, GRID.axes, GRID.size)}, TypeError,
         "grid must be a VoxelGrid or a tensor, got tuple"),
        ({"confidences": torch.ones(C)}, ValueError,
         "confidences must be [B, C] or [B, C, K] to fit features, [any, 3, 4], got (3,)"),
        ({"confidences": torch.ones(B, C + 1)}, ValueError,
         "confidences must be [B, C] to fit features, [any, 3], got (2, 4)"),
        ({"confidences": torch.ones(B, C, K + 1)}, ValueError,
         "confidences must be [B, C] or [B, C, K] to fit features, [any, 3, 4], got (2, 3, 5)"),
        ({"confidences": torch.ones(B, C, 1)}, ValueError,
         "confidences must be [B, C] or [B, C, K] to fit features, [any, 3, 4], got (2, 3, 1)"),
        ({"confidences": torch.ones(B, C, K, 1)}, ValueError,
         "confidences must be [B, C] or [B, C, K] to fit features, [any, 3, 4], "
         "got (2, 3, 4, 1)"),
        ({"confidences": torch.ones(3, C)}, ValueError,
         "batch dimensions must broadcast, got (2,) of features, (1,) of projections, "
         "(1,) of grid, (3,) of confidences"),
        ({"confidences": torch.ones(B, C).bool()}, TypeError,
         "confidences must have a floating-point dtype, got torch.bool"),
        ({"confidences": torch.ones(B, C, device="meta")}, ValueError,
         "confidences must be on the device of features, cpu, got meta"),
        ({"confidences": [1.0] * C}, TypeError, "confidences must be a tensor, got list"),
        ({"aggregation": "median"}, ValueError,
         "aggregation must be one of 'sum', 'mean', 'softmax', 'max', got 'median'"),
        ({"aggregation": None}, ValueError,
         "aggregation must be one of 'sum', 'mean', 'softmax', 'max', got None"),
        ({"outside": "border"}, ValueError,
         "outside must be one of 'zeros', 'exclude', got 'border'"),
        ({"sampling": "corner"}, ValueError,
         "sampling must be one of 'center', 'official', got 'corner'"),
    ],
)  # fmt: skip
def test_bad_arguments_in_one_line(
    change: dict[str, Any], error: type[Exception], message: str
) -> None:
    arguments: dict[str, Any] = {"features": FEATURES, "projections": PROJECTIONS, "grid": GRID}
    ops.unproject(**arguments)  # is fine
    with pytest.raises(error) as caught:
        ops.unproject(**(arguments | change))
    assert str(caught.value) == message


# ---- Raw ops ----

FRAME = torch.zeros(1, 4, 3)


def raw_arguments(**change: Any) -> tuple[Any, ...]:
    """What `Unproject.forward` would give: full batches, one dtype, options as numbers."""
    arguments = {
        "features": FEATURES,
        "projections": PROJECTIONS.expand(B, C, 3, 4),
        "grid": FRAME.expand(B, 4, 3),
        "confidences": torch.ones(B, C, 1).expand(B, C, K),
        "size": (2, 3, 4),
        "aggregation": 2,
        "exclude": False,
        "official": False,
    }
    return tuple((arguments | change).values())


def call_backward(grad: Tensor, arguments: tuple[Any, ...]) -> Any:
    return torch.ops.tritool.unproject_backward(grad, *arguments, False, *(True,) * 4)


RAW_MISTAKES: list[dict[str, Any]] = [
    {"features": FEATURES[0, 0, 0]},
    {"features": FEATURES[:1]},
    {"features": torch.zeros(B, C + 1, K, H, W)},
    {"features": torch.zeros(B, C, K, 0, W)},
    {"features": torch.zeros(B, C, K + 1, H, W)},
    {"features": FEATURES.half(), "projections": PROJECTIONS.expand(B, C, 3, 4).half()},
    {"features": FEATURES.double()},
    {"features": FEATURES.long()},
    {"features": FEATURES.to(torch.complex64)},
    {"features": torch.zeros(1, 1, 1, 1, 1).expand(B, C, K, 1 << 16, 1 << 16)},
    {"projections": PROJECTIONS},
    {"projections": PROJECTIONS[:, :2].expand(B, 2, 3, 4)},
    {"projections": torch.zeros(B, C, 4, 3)},
    {"projections": torch.zeros(C, 3, 4)},
    {"projections": torch.zeros(1, B, C, 3, 4)},
    {"projections": PROJECTIONS.expand(B, C, 3, 4).double()},
    {"grid": FRAME},
    {"grid": torch.zeros(B, 3, 3)},
    {"grid": torch.zeros(B, 4, 2)},
    {"grid": torch.zeros(4, 3)},
    {"grid": torch.zeros(B, 4, 3, dtype=torch.float64)},
    {"confidences": torch.ones(B, C)},
    {"confidences": torch.ones(1, C, K)},
    {"confidences": torch.ones(B, C, 1)},
    {"confidences": torch.ones(B, C, K).half()},
    {"size": (2, 3)},
    {"size": (2, 3, 4, 5)},
    {"size": (2, 0, 4)},
    {"size": (2, -3, -4)},
    {"size": (1 << 20, 1 << 10, 4)},
    {"size": (1 << 31, 1, 1)},
    {"aggregation": 4},
    {"aggregation": -1},
]


def mistake_id(change: dict[str, Any]) -> str:
    return ", ".join(
        f"{name} {tuple(x.shape)} {x.dtype}" if isinstance(x, Tensor) else f"{name} {x}"
        for name, x in change.items()
    )


@pytest.mark.parametrize("change", RAW_MISTAKES, ids=mistake_id)
def test_raw_ops_are_memory_safe(change: dict[str, Any]) -> None:
    """What the Python checks would have caught never reaches a kernel."""
    grad = torch.zeros(B, K, 24)
    torch.ops.tritool.unproject(*raw_arguments(), False)
    call_backward(grad, raw_arguments())
    words = r"features|projections|grid|confidences|size|aggregation|voxels|unproject|grad"
    with pytest.raises(RuntimeError, match=words):
        torch.ops.tritool.unproject(*raw_arguments(**change), False)
    with pytest.raises(RuntimeError, match=words):
        call_backward(grad, raw_arguments(**change))


@pytest.mark.parametrize(
    "grad",
    [
        torch.zeros(B, K, 23),
        torch.zeros(B, K, 2, 3, 4),
        torch.zeros(1, K, 24),
        torch.zeros(B, K + 1, 24),
        torch.zeros(K, 24),
        torch.zeros(B, K, 24, dtype=torch.float64),
        torch.zeros(B, K, 24, dtype=torch.float16),
    ],
    ids=lambda grad: f"{tuple(grad.shape)} {grad.dtype}",
)
def test_raw_backward_wants_the_gradient_of_the_volume(grad: Tensor) -> None:
    with pytest.raises(RuntimeError, match="grad"):
        call_backward(grad, raw_arguments())


def test_raw_gradients_nobody_asked_for_are_not_made(device: str) -> None:
    arguments = [x.to(device) if isinstance(x, Tensor) else x for x in raw_arguments()]
    grad = torch.ones(B, K, 24, device=device)
    shapes = [x.shape for x in arguments[:4]]
    for wanted in ((True, False, False, False), (False, True, True, False), (False,) * 4):
        made = torch.ops.tritool.unproject_backward(grad, *arguments, False, *wanted)
        for gradient, want, shape in zip(made, wanted, shapes, strict=True):
            assert gradient.shape == (shape if want else (0,))
    without = [*arguments[:3], None, *arguments[4:]]
    made = torch.ops.tritool.unproject_backward(grad, *without, False, *(True,) * 4)
    assert made[3].numel() == 0


def test_raw_op_takes_any_strides(device: str) -> None:
    """Memory that overlaps and in any order is read where the strides say."""
    generator = torch.Generator().manual_seed(0)
    storage = torch.randn(400, generator=generator).to(device)
    features = storage.as_strided((B, C, K, H, W), (1, 2, 3, 5, 7), 11)
    projections = storage.as_strided((B, C, 3, 4), (3, 1, 1, 2))
    grid = storage.as_strided((B, 24, 3), (1, 5, 3), 4)
    w = storage.abs().as_strided((B, C, K), (5, 2, 1))
    options = ((), 2, False, False, False)
    have = torch.ops.tritool.unproject(features, projections, grid, w, *options)
    plain = [x.contiguous() for x in (features, projections, grid, w)]
    want = torch.ops.tritool.unproject(*plain, *options)
    torch.testing.assert_close(have, want, rtol=0, atol=0)
    assert (want != 0).any()


# ---- Plain PyTorch in the kernels' place ----


def spoilt_scene(dtype: torch.dtype, weighted: bool) -> list[Any]:
    """Features, projections, frame and confidences of six items, the last five with a defect each.

    A NaN pixel; a NaN matrix; confidences that are 0, of which one view's matrix is NaN; negative,
    NaN and infinite confidences; a matrix of which the depth is infinite.
    """
    scene = scenes.unprojection(
        np.random.default_rng(0),
        batch=(6, 6, 6, 6),
        channels=5,
        size=(5, 4, 3),
        confidences="channels",
    )
    features, projections, origin, axes, w = (torch.as_tensor(x) for x in scene.operands())
    features[1, 0, 2, 3, 4] = torch.nan
    projections[2, 1] = torch.nan
    projections[3, 1] = torch.nan
    w[3, 1] = 0
    w[3, 2, 1:3] = 0
    w[4, 0, 0], w[4, 1, 1], w[4, 2, 2] = -1.0, torch.nan, torch.inf
    projections[5, 0, 2, 3] = torch.inf
    tensors = [features, projections, torch.cat([origin[:, None], axes], 1), w]
    tensors = [x.to(dtype) for x in tensors]
    return [*tensors[:3], tensors[3] if weighted else None, (5, 4, 3)]


@pytest.mark.parametrize("exclude", [False, True], ids=["zeros", "exclude"])
@pytest.mark.parametrize("aggregation", range(4), ids=scenes.AGGREGATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_composite_agrees_with_the_kernels(
    dtype: torch.dtype, aggregation: int, exclude: bool
) -> None:
    rounding = 1e-5 if dtype == torch.float32 else 1e-11
    for weighted, official, last in itertools.product((True, False), repeat=3):
        arguments = (*spoilt_scene(dtype, weighted), aggregation, exclude, official)
        have = composite.unproject(*arguments, last)
        want = torch.ops.tritool.unproject(*arguments, last)
        assert have.stride() == want.stride()
        assert have.dtype == want.dtype
        torch.testing.assert_close(have, want, rtol=0, atol=rounding, equal_nan=True)
        assert want[0].isfinite().all()
        assert want[1:3].isnan().flatten(1).any(-1).all()
        # A gradient of NaN where the volume is NaN must not get through.
        grad = torch.where(want.isnan(), torch.nan, torch.ones_like(want).cumsum(-1).cos())
        if aggregation < 2:  # but for features, as these are linear in them
            grad = grad.nan_to_num(nan=0.5)
        options = (False, True, True, True, weighted)
        got = composite.unproject_backward(grad, *arguments, *options)
        wanted = torch.ops.tritool.unproject_backward(grad, *arguments, *options)
        for g, w in zip(got, wanted, strict=True):
            assert g.shape == w.shape
            assert g.dtype == w.dtype
            assert w.isfinite().all()
            size = float(w.abs().max()) if w.numel() else 0.0
            torch.testing.assert_close(g, w, rtol=0, atol=10 * rounding * size)
