# SPDX-License-Identifier: Apache-2.0
"""The compiled kernels as NumPy functions in the shape of `tritool.reference`, for every backend.

They are reached through the bridge (tests/native/bridge.cpp), without torch.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pytest
from scenes import AGGREGATIONS, Unprojection

Array = npt.NDArray[Any]

BACKENDS = ("cpu:baseline", "cpu:avx2", "cpu:avx512", "cuda-emulated")
CUDA = "cuda-emulated"


def _load_bridge() -> Any:
    """Load what `make native` builds, from build/native or the folder TRITOOL_BRIDGE."""
    default = Path(__file__).parent.parent / "build" / "native"
    folder = Path(os.environ.get("TRITOOL_BRIDGE", default))
    for path in sorted(folder.glob(f"tritool_bridge*{importlib.machinery.EXTENSION_SUFFIXES[0]}")):
        spec = importlib.util.spec_from_file_location("tritool_bridge", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    pytest.skip(reason=f"no tritool_bridge in {folder}; type: make native", allow_module_level=True)


bridge = _load_bridge()


class Moments(NamedTuple):
    """What `softmax_moments` returns, in the order in which its gradients come back."""

    mean: Array
    covariance: Array
    log_partition: Array
    partition: Array


class Alignment(NamedTuple):
    """What `rigid_align` returns."""

    rotation: Array
    translation: Array
    scale: Array


@dataclass(frozen=True)
class Kernels:
    """One backend in one dtype; arguments are converted, strides kept where they need not be."""

    backend: str
    dtype: type[np.floating[Any]]
    threads: int = 1
    items_per_unit: int = 0

    @property
    def _handle(self) -> Any:
        return bridge.Backend(
            self.backend, threads=self.threads, items_per_unit=self.items_per_unit
        )

    def cast(self, *arrays: Array | None) -> list[Any]:
        return [None if a is None else np.asarray(a).astype(self.dtype, copy=False) for a in arrays]

    def triangulate(
        self, points: Array, projections: Array, weights: Array | None = None, *, mode: str
    ) -> Array:
        arguments = self.cast(points, projections, weights)
        homogeneous = mode == "homogeneous"
        return np.asarray(bridge.triangulate(self._handle, *arguments, homogeneous=homogeneous))

    def triangulate_vjp(
        self,
        grad: Array,
        points: Array,
        projections: Array,
        weights: Array | None = None,
        *,
        mode: str,
        **want: bool,
    ) -> tuple[Array, Array, Array]:
        arguments = self.cast(grad, points, projections, weights)
        homogeneous = mode == "homogeneous"
        gradients: tuple[Array, Array, Array] = bridge.triangulate_backward(
            self._handle, *arguments, homogeneous=homogeneous, **want
        )
        return gradients

    def project(self, points: Array, projections: Array) -> Array:
        return np.asarray(bridge.project(self._handle, *self.cast(points, projections)))

    def project_vjp(
        self, grad: Array, points: Array, projections: Array, **want: bool
    ) -> tuple[Array, Array]:
        arguments = self.cast(grad, points, projections)
        gradients: tuple[Array, Array] = bridge.project_backward(self._handle, *arguments, **want)
        return gradients

    def unproject(self, scene: Unprojection, *, channels_last: bool = False) -> Array:
        """The volume, [B, K, X, Y, Z] or [B, K, ...]."""
        inputs, options = self._unproject_arguments(scene)
        volume = np.asarray(
            bridge.unproject(self._handle, *inputs, **options, channels_last=channels_last)
        )
        return volume.reshape(scene.shape)

    def unproject_vjp(
        self,
        grad: Array,
        scene: Unprojection,
        *,
        channels_last: bool = False,
        deterministic: bool = False,
        **want: bool,
    ) -> tuple[Array | None, ...]:
        """Gradients to features, projections, grid ([B, 4, 3] or points) and confidences.

        In the full batch, those to confidences for every channel.
        """
        inputs, options = self._unproject_arguments(scene)
        dtype = np.asarray(inputs[0]).dtype
        flat = np.asarray(grad).reshape(*grad.shape[:2], -1).astype(dtype, copy=False)
        gradients = bridge.unproject_backward(
            self._handle, flat, *inputs, **options,
            channels_last=channels_last, deterministic=deterministic, **want,
        )  # fmt: skip
        return tuple(None if g is None else np.asarray(g) for g in gradients)

    def _unproject_arguments(self, scene: Unprojection) -> tuple[list[Any], dict[str, Any]]:
        features, projections, grid, confidences = (
            scene.features, scene.projections, scene.grid, scene.confidences,
        )  # fmt: skip
        if features.dtype not in (np.float16, np.uint16):
            (features,) = self.cast(features)
        size: list[int] = []
        if isinstance(grid, tuple):
            origin, axes, shape = grid
            size, places = list(shape), np.concatenate([origin[:, None], axes], 1)
        else:
            places = grid.reshape(len(grid), int(np.prod(grid.shape[1:-1])), 3)
        if confidences is not None and confidences.ndim == 2:
            confidences = np.broadcast_to(
                confidences[..., None], (*confidences.shape, features.shape[2])
            )
        options = {
            "size": size,
            "aggregation": AGGREGATIONS.index(scene.aggregation),
            "exclude": scene.outside == "exclude",
            "official": scene.sampling == "official",
        }
        return [features, *self.cast(projections, places, confidences)], options

    def rigid_align(
        self,
        source: Array,
        target: Array,
        weights: Array | None = None,
        *,
        with_scale: bool = False,
    ) -> Alignment:
        arguments = self.cast(source, target, weights)
        return Alignment(*bridge.rigid_align(self._handle, *arguments, with_scale=with_scale))

    def rigid_align_vjp(
        self,
        grads: tuple[Array | None, Array | None, Array | None],
        source: Array,
        target: Array,
        weights: Array | None = None,
        *,
        with_scale: bool = False,
        **want: bool,
    ) -> tuple[Array, Array, Array]:
        arguments = self.cast(*grads, source, target, weights)
        gradients: tuple[Array, Array, Array] = bridge.rigid_align_backward(
            self._handle, *arguments, with_scale=with_scale, **want
        )
        return gradients

    def moments(self, logits: Array, dims: int, alpha: float = 1.0) -> Moments:
        if not _is_half(logits):
            (logits,) = self.cast(logits)
        return Moments(
            *bridge.softmax_moments(self._handle, logits, dims=dims, inverse_temperature=alpha)
        )

    def moments_vjp(
        self,
        grads: tuple[Array | None, Array | None, Array | None],
        logits: Array,
        moments: Moments,
        dims: int,
        alpha: float = 1.0,
    ) -> Array:
        if not _is_half(logits):
            (logits,) = self.cast(logits)
        mean, covariance, _, partition = moments
        return np.asarray(
            bridge.softmax_moments_backward(
                self._handle,
                *(None if g is None else np.array(g, order="C") for g in self.cast(*grads)),
                logits,
                mean,
                covariance,
                partition,
                dims=dims,
                inverse_temperature=alpha,
            )
        )

    def soft_argmax25d(
        self, heatmaps: Array, depth_maps: Array, alpha: float = 1.0
    ) -> tuple[Array, Array]:
        """Return the position and the partition."""
        if not _is_half(heatmaps):
            heatmaps, depth_maps = self.cast(heatmaps, depth_maps)
        result: tuple[Array, Array] = bridge.soft_argmax25d(
            self._handle, heatmaps, depth_maps, inverse_temperature=alpha
        )
        return result

    def soft_argmax25d_vjp(
        self,
        grad: Array,
        heatmaps: Array,
        depth_maps: Array,
        result: tuple[Array, Array],
        alpha: float = 1.0,
    ) -> tuple[Array, Array]:
        if not _is_half(heatmaps):
            heatmaps, depth_maps = self.cast(heatmaps, depth_maps)
        (grad,) = self.cast(grad)
        gradients: tuple[Array, Array] = bridge.soft_argmax25d_backward(
            self._handle,
            np.array(grad, order="C"),
            heatmaps,
            depth_maps,
            *result,
            inverse_temperature=alpha,
        )
        return gradients


def _is_half(array: Array) -> bool:
    """Whether these are float16, or the bits of bfloat16, which the kernels take as they are."""
    return array.dtype in (np.float16, np.uint16)


def _parameter(backend: str, dtype: type[np.floating[Any]]) -> Any:
    missing = backend not in bridge.backends()
    mark = pytest.mark.skipif(missing, reason=f"this processor does not run {backend}")
    return pytest.param(Kernels(backend, dtype), id=f"{backend}-{dtype.__name__}", marks=mark)


every_float32_kernel = pytest.mark.parametrize(
    "kernels", [_parameter(backend, np.float32) for backend in BACKENDS]
)
every_kernel = pytest.mark.parametrize(
    "kernels", [_parameter(b, dtype) for b in BACKENDS for dtype in (np.float32, np.float64)]
)


def other_workers(kernels: Kernels) -> Iterator[Kernels]:
    """Yield the same kernels on more threads, or on a device whose threads run in another order."""
    if kernels.backend != CUDA:
        for threads in (2, 3, 7, 100):
            yield replace(kernels, threads=threads)
        return
    try:
        for seed in (1, 2, 3):
            bridge.set_seed(seed)
            yield kernels
    finally:
        bridge.set_seed(0)


def assert_same_bits(actual: Any, expected: Any) -> None:
    """Compare arrays, or tuples of them, NaN with NaN and zeros by their sign."""
    for a, b in (
        zip(actual, expected, strict=True) if isinstance(actual, tuple) else [(actual, expected)]
    ):
        if a is None or b is None:
            assert a is b
            continue
        np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(np.signbit(a) & ~np.isnan(a), np.signbit(b) & ~np.isnan(b))


def assert_zero(*gradients: Array | None) -> None:
    for gradient in gradients:
        assert gradient is not None
        assert (gradient == 0.0).all()
