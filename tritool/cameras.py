# SPDX-License-Identifier: Apache-2.0
"""Cameras: intrinsics, poses and lens distortion of a rig, in plain PyTorch.

Conventions: pixels are (x, y), the centre of the first pixel is (0, 0); a world point `X` has the
camera coordinates `R X + t` (x right, y down, z forward) and an undistorted camera projects it by
`P = K [R | t]`. World units are the user's.

A lens model maps ideal normalised coordinates `(x, y) = (X/Z, Y/Z)` to distorted ones, so it does
not change when the image is cropped or resized. Every model is one-to-one only on a disc around the
optical axis; beyond it the formula folds back over the image. Here a point outside of that disc is
NaN, in both directions, instead of a plausible wrong pixel.

Products are written out as multiplications and additions: matmul would round geometry to TF32 or,
under autocast, to half precision.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

__all__ = ["Cameras", "Distortion", "Lens"]

Lens = Literal["pinhole", "brown_conrady", "fisheye", "human36m"]

_COEFFICIENT_COUNTS: dict[str, tuple[int, ...]] = {
    "brown_conrady": (4, 5, 8),
    "fisheye": (4,),
    "human36m": (5,),
}

# The search for the one-to-one disc: samples, the largest radius (89.94 degrees off the axis), and
# the least radial magnification that counts as one-to-one. Between the last few thousandths and the
# exact fold the inverse is too ill-conditioned to be of use.
_SAMPLES = 2048  # a power of two, for the bisection
_MAX_RADIUS = 1000.0
_MIN_MAGNIFICATION = 1e-3

_NEWTON_STEPS = 16

# On the circle of radius r the symmetric part of the tangential Jacobian is, in the basis
# (radial, angular) and with the angle a between (x, y) and q = (p2, p1),
#   OpenCV: |q| r [[6 cos a, 2 sin a], [2 sin a, 2 cos a]],
#   Human3.6M: |q| r [[4 cos a, 1.5 sin a], [1.5 sin a, cos a]].
# Gershgorin's theorem bounds what it takes off the radial and the angular magnification.
_TANGENTIAL_BOUNDS = {
    "brown_conrady": (40.0**0.5, 8.0**0.5),
    "human36m": (18.25**0.5, 3.25**0.5),
}


@dataclass(frozen=True, eq=False)
class Distortion:
    """The lens model of C cameras, on normalised coordinates.

    With `s = x^2 + y^2`:

    - `brown_conrady`: `k1 k2 p1 p2 [k3 [k4 k5 k6]]`, OpenCV's order and formula (Brown 1966;
      the rational denominator as in Claus and Fitzgibbon 2005):
      `x g + 2 p1 x y + p2 (s + 2 x^2)`, `y g + p1 (s + 2 y^2) + 2 p2 x y`,
      `g = (1 + k1 s + k2 s^2 + k3 s^3) / (1 + k4 s + k5 s^2 + k6 s^3)`.
    - `human36m`: `k1 k2 p1 p2 k3`, in OpenCV's order too, but with the formula of the Human3.6M
      release (Ionescu et al., TPAMI 2014): `x (g + m) + p2 s`, `y (g + m) + p1 s`,
      `m = p1 y + p2 x`, `g = 1 + k1 s + k2 s^2 + k3 s^3`. The cross and square terms have half of
      OpenCV's factor and the term in `s` has the same, so no OpenCV coefficients are equivalent.
      The release stores `k = (k1, k2, k3)` and `p = (p1, p2)` apart.
    - `fisheye`: `k1 k2 k3 k4` of OpenCV's fisheye module (Kannala and Brandt 2006): the radius
      becomes `a (1 + k1 a^2 + k2 a^4 + k3 a^6 + k4 a^8)`, `a` the angle off the axis.

    The models are used on the disc of radius `radius_limit` only, where they are one-to-one: there
    the symmetric part of the Jacobian is positive definite, which on a convex set suffices.

    Args:
        coefficients: [C, n], float32 or float64, without unit.
        lens: the model's name.

    Raises:
        TypeError: if the coefficients are no float32 or float64 tensor.
        ValueError: if the lens is unknown or the number of coefficients does not fit it.

    The methods raise the same for points whose dtype, device or shape does not fit.
    """

    coefficients: Tensor
    lens: Lens = "brown_conrady"

    def __post_init__(self) -> None:
        """Checks the name and the number of coefficients."""
        if self.lens not in _COEFFICIENT_COUNTS:
            known = ", ".join(_COEFFICIENT_COUNTS)
            raise ValueError(f"lens of a distortion must be one of {known}, got {self.lens!r}")
        _require_float(self.coefficients, "distortion")
        counts = _COEFFICIENT_COUNTS[self.lens]
        if self.coefficients.ndim != 2 or self.coefficients.shape[1] not in counts:
            wanted = " or ".join(map(str, counts))
            raise ValueError(
                f"distortion must be [C, n] with n = {wanted} for lens {self.lens!r}, "
                f"got {tuple(self.coefficients.shape)}"
            )

    @property
    def radius_limit(self) -> Tensor:
        """[C], the largest ideal radius (tangent of the angle off the axis) that is mapped.

        Found to 0.1 percent from below, at most 1000; not differentiable.
        """
        return self._detached()._sample_radii()[0]

    def distort(self, points: Tensor) -> Tensor:
        """Maps ideal normalised points to distorted ones.

        Args:
            points: [..., C, 2], ideal normalised coordinates.

        Returns:
            [..., C, 2], distorted normalised coordinates; NaN with zero gradient for points that
            are not finite or lie outside of `radius_limit`.
        """
        _require_points(points, self.coefficients)
        inside = self._inside(points)
        x, y = _masked(points, inside).unbind(-1)
        (u, v), _ = self._evaluate(x, y)
        return _nan_unless(inside, torch.stack([u, v], -1))

    def undistort(self, points: Tensor) -> Tensor:
        """Maps distorted normalised points to ideal ones, the inverse of `distort`.

        Newton's method runs without gradient to the working precision; two more steps, recorded,
        give the exact first and second derivatives in the points and the coefficients.

        Args:
            points: [..., C, 2], distorted normalised coordinates.

        Returns:
            [..., C, 2], ideal normalised coordinates; NaN with zero gradient for points that are
            not finite or that no ideal point within `radius_limit` maps to.
        """
        _require_points(points, self.coefficients)
        finite = points.isfinite().all(-1)
        x, y, converged = self._detached()._solve(*_masked(points, finite).detach().unbind(-1))
        solved = finite & converged
        # The axis is its own inverse: a harmless stand-in wherever there is no solution.
        x, y = torch.where(solved, x, 0.0), torch.where(solved, y, 0.0)
        u, v = _masked(points, solved).unbind(-1)
        # One step from a constant is right to first order in the inputs, the second step squares
        # that error; what autograd sees is then right to second order and beyond.
        for _ in range(2):
            step_x, step_y, _ = self._newton_step(x, y, u, v)
            x, y = x - step_x, y - step_y
        return _nan_unless(solved, torch.stack([x, y], -1))

    def _detached(self) -> Distortion:
        return replace(self, coefficients=self.coefficients.detach())

    def _inside(self, points: Tensor) -> Tensor:
        """[..., C], whether ideal points lie on the disc; False for points that are not finite."""
        x, y = points.detach().unbind(-1)
        return x * x + y * y <= self.radius_limit.square()

    def _radial(self, s: Tensor) -> tuple[Tensor, Tensor]:
        """The radial factor g and its derivative in s = r^2, both [..., C]."""
        k = self.coefficients.unbind(-1)
        if self.lens == "fisheye":
            return _fisheye_factor(s, k)
        factor, slope = _cubic(s, k[0], k[1], k[4] if len(k) > 4 else torch.zeros_like(k[0]))
        if len(k) == 8:
            denominator, denominator_slope = _cubic(s, k[5], k[6], k[7])
            factor = factor / denominator
            slope = (slope - factor * denominator_slope) / denominator
            # Past a pole the formula means nothing, even where numerator and denominator have
            # both changed sign; -inf keeps such radii out of the one-to-one disc.
            factor = torch.where(denominator > 0, factor, -torch.inf)
        return factor, slope

    def _evaluate(
        self, x: Tensor, y: Tensor
    ) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor, Tensor, Tensor]]:
        """The distorted point and the Jacobian (du/dx, du/dy, dv/dx, dv/dy)."""
        s = x * x + y * y
        g, slope = self._radial(s)
        u, v = x * g, y * g
        mixed = 2 * slope * x * y
        u_x, u_y, v_x, v_y = g + 2 * slope * x * x, mixed, mixed, g + 2 * slope * y * y
        if self.lens == "fisheye":
            return (u, v), (u_x, u_y, v_x, v_y)
        p1, p2 = self.coefficients[:, 2], self.coefficients[:, 3]
        m = p1 * y + p2 * x
        if self.lens == "human36m":
            u, v = u + x * m + p2 * s, v + y * m + p1 * s
            u_x, u_y = u_x + m + 3 * p2 * x, u_y + p1 * x + 2 * p2 * y
            v_x, v_y = v_x + p2 * y + 2 * p1 * x, v_y + m + 3 * p1 * y
        else:
            u, v = u + 2 * x * m + p2 * s, v + 2 * y * m + p1 * s
            cross = 2 * (p1 * x + p2 * y)
            u_x, u_y = u_x + 2 * m + 4 * p2 * x, u_y + cross
            v_x, v_y = v_x + cross, v_y + 2 * m + 4 * p1 * y
        return (u, v), (u_x, u_y, v_x, v_y)

    def _newton_step(
        self, x: Tensor, y: Tensor, u: Tensor, v: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What to subtract from (x, y) to get closer to (u, v), and the residual."""
        (fu, fv), (u_x, u_y, v_x, v_y) = self._evaluate(x, y)
        du, dv = fu - u, fv - v
        determinant = u_x * v_y - u_y * v_x
        step_x = (v_y * du - u_y * dv) / determinant
        step_y = (u_x * dv - v_x * du) / determinant
        return step_x, step_y, torch.hypot(du, dv)

    def _sample_radii(self) -> tuple[Tensor, Tensor]:
        """The limit of the one-to-one disc [C] and the distorted radii of the samples [C, N].

        The samples are equidistant in r / (1 + r). Beyond the limit the distorted radius is +inf,
        so that the samples of each camera are in ascending order.
        """
        coefficients = self.coefficients
        r = _sample_radius(
            torch.arange(_SAMPLES, dtype=coefficients.dtype, device=coefficients.device)
        )[:, None]
        s = r * r
        g, slope = self._radial(s)
        radial, angular = g + 2 * s * slope, g
        if self.lens == "fisheye":
            # Per radian rather than per tangent, which vanishes towards 90 degrees by itself.
            radial = radial * (1 + s)
        else:
            q = torch.hypot(coefficients[:, 2], coefficients[:, 3]) * r
            radial_loss, angular_loss = _TANGENTIAL_BOUNDS[self.lens]
            radial, angular = radial - radial_loss * q, angular - angular_loss * q
        one_to_one = (radial > _MIN_MAGNIFICATION) & (angular > 0)
        inside = one_to_one.to(torch.int32).cumprod(0).bool()
        limit = torch.where(inside, r, 0.0).amax(0)
        radii = torch.where(inside, r * g, torch.inf)
        return limit, radii.T.contiguous()

    def _solve(self, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The ideal point of a finite distorted one, and whether it was found; all [..., C]."""
        limit, radii = self._sample_radii()
        # Start: the radial part alone, inverted by linear interpolation between the samples.
        distorted = torch.hypot(u, v)
        query = distorted.movedim(-1, 0).reshape(len(radii), -1)
        left = torch.zeros_like(query, dtype=torch.int64)
        stride = _SAMPLES // 2
        while stride:  # bisection, as torch.searchsorted, which warns under vmap
            below = radii.gather(1, left + stride) < query
            left = torch.where(below, left + stride, left)
            stride //= 2
        left = left.clamp_max(_SAMPLES - 2)
        low, high = radii.gather(1, left), radii.gather(1, left + 1)
        position = left + (query - low) / (high - low)
        start = _sample_radius(position).reshape(distorted.movedim(-1, 0).shape).movedim(0, -1)
        scale = torch.minimum(start, limit) / distorted.clamp_min(torch.finfo(u.dtype).tiny)
        x, y = u * scale, v * scale
        best_x, best_y, best = x, y, torch.full_like(x, torch.inf)
        step_x, step_y = torch.zeros_like(x), torch.zeros_like(y)
        for _ in range(_NEWTON_STEPS):
            new_x, new_y, residual = self._newton_step(x, y, u, v)
            better = residual < best
            best_x, best_y = torch.where(better, x, best_x), torch.where(better, y, best_y)
            best = torch.where(better, residual, best)
            # A step that did not help is taken back and tried again at a quarter of its length.
            step_x = torch.where(better, new_x, step_x / 4)
            step_y = torch.where(better, new_y, step_y / 4)
            x, y = best_x - step_x, best_y - step_y
            shrink = (limit / torch.hypot(x, y)).clamp_max(1)
            x, y = x * shrink, y * shrink
        # The map is one-to-one on the disc: whatever satisfies the equation there is the solution.
        tolerance = 64 * torch.finfo(u.dtype).eps * (1 + distorted)
        inside = best_x * best_x + best_y * best_y <= limit.square()
        return best_x, best_y, inside & (best <= tolerance)


@dataclass(frozen=True, init=False, eq=False, repr=False)
class Cameras:
    """A rig of C calibrated cameras, immutable; the arguments become read-only attributes.

    Shapes, dtypes and devices are checked at once, values only by `problems`.

    Args:
        K: [C, 3, 3], `[[fx, skew, cx], [0, fy, cy], [0, 0, 1]]`, pixels; float32 or float64.
        R: [C, 3, 3], the rotation from the world to the camera.
        t: [C, 3], the translation from the world to the camera, world units.
        distortion: a `Distortion`, or the coefficients [C, n] of the model named by `lens`; None
            for pinhole cameras.
        image_size: (width, height) of all cameras, or [C, 2], pixels; kept as [C, 2].
        names: C different names.
        lens: the model of a plain tensor `distortion`, default `brown_conrady`. With None or a
            `Distortion` it may only repeat what they say.

    Raises:
        TypeError: if tensors are not float32 or float64, or differ in dtype or device; the same
            for points given to a method.
        ValueError: if shapes, the lens or the names do not fit.

    Example:
        >>> K = torch.tensor([[[1000.0, 0.0, 639.5], [0.0, 1000.0, 359.5], [0.0, 0.0, 1.0]]])
        >>> cameras = Cameras(K, torch.eye(3)[None], torch.zeros(1, 3), image_size=(1280, 720))
        >>> cameras.project(torch.tensor([0.1, 0.0, 1.0]))
        tensor([[739.5000, 359.5000]])
    """

    K: Tensor
    R: Tensor
    t: Tensor
    distortion: Distortion | None
    image_size: Tensor | None
    names: tuple[str, ...] | None

    def __init__(
        self,
        K: Tensor,
        R: Tensor,
        t: Tensor,
        distortion: Distortion | Tensor | None = None,
        image_size: Tensor | Sequence[float] | None = None,
        names: Sequence[str] | None = None,
        *,
        lens: Lens | None = None,
    ) -> None:
        """Checks and stores a rig."""
        _require_float(K, "K")
        if K.ndim != 3 or K.shape[0] == 0 or K.shape[1:] != (3, 3):
            raise ValueError(f"K must be [C, 3, 3] with C >= 1, got {tuple(K.shape)}")
        model = _as_distortion(distortion, lens)
        tensors = [("R", R, (3, 3)), ("t", t, (3,))]
        if model is not None:
            tensors.append(("distortion", model.coefficients, model.coefficients.shape[1:]))
        for name, tensor, shape in tensors:
            _require_like(tensor, name, K)
            if tensor.shape != (len(K), *shape):
                wanted = ", ".join(map(str, shape))
                raise ValueError(
                    f"{name} must be [C, {wanted}] with C = {len(K)}, got {tuple(tensor.shape)}"
                )
        if image_size is not None:
            image_size = _per_camera(image_size, "image_size", K, 2)
        if names is not None:
            names = _checked_names(names, len(K))
        values = (K, R, t, model, image_size, names)
        for field, value in zip(fields(self), values, strict=True):
            object.__setattr__(self, field.name, value)

    def __len__(self) -> int:
        """The number of cameras C."""
        return self.K.shape[0]

    def __repr__(self) -> str:
        """Says how many cameras there are, of which lens, and their names and sizes."""
        parts = [f"{len(self)} x {self.lens}"]
        if self.names is not None:
            parts.append("names=(" + ", ".join(self.names) + ")")
        if self.image_size is not None:
            sizes = [f"{width:g}x{height:g}" for width, height in self.image_size.tolist()]
            same = len(set(sizes)) == 1
            parts.append("image_size=" + (sizes[0] if same else "(" + ", ".join(sizes) + ")"))
        dtype = str(self.dtype).removeprefix("torch.")
        return f"Cameras({', '.join(parts)}, {dtype}, {self.device})"

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of every tensor of the rig."""
        return self.K.dtype

    @property
    def device(self) -> torch.device:
        """The device of every tensor of the rig."""
        return self.K.device

    @property
    def lens(self) -> Lens:
        """The name of the lens model."""
        return "pinhole" if self.distortion is None else self.distortion.lens

    @property
    def projections(self) -> Tensor:
        """[C, 3, 4], `K [R | t]`: world to ideal (undistorted) pixels."""
        cam_from_world = torch.cat([self.R, self.t[:, :, None]], -1)
        return (self.K[:, :, :, None] * cam_from_world[:, None, :, :]).sum(-2)

    @property
    def centers(self) -> Tensor:
        """[C, 3], the centres of projection `-R^T t`, world units."""
        return -(self.R * self.t[:, :, None]).sum(-2)

    def project(self, points: Tensor) -> Tensor:
        """Projects world points into every camera, lens distortion included.

        Args:
            points: [..., 3], world units.

        Returns:
            [..., C, 2], pixels; NaN with zero gradient in the views where the depth is not
            positive, the point is not finite, or it lies outside of what the lens model maps.
        """
        _require_like(points, "points", self.K)
        if points.ndim < 1 or points.shape[-1] != 3:
            raise ValueError(f"points must be [..., 3], got {tuple(points.shape)}")
        given = points.isfinite().all(-1)
        X, Y, Z = _masked(points, given)[..., None, None, :].unbind(-1)
        in_camera = self.R[..., 0] * X + self.R[..., 1] * Y + self.R[..., 2] * Z + self.t
        depth = in_camera[..., 2].detach()
        ratio = in_camera[..., :2].detach() / depth[..., None]
        visible = given[..., None] & (depth > 0) & ratio.isfinite().all(-1)
        if self.distortion is not None:
            visible = visible & self.distortion._inside(ratio)
        x, y, z = _masked(in_camera, visible).unbind(-1)
        z = torch.where(visible, z, 1.0)
        x, y = x / z, y / z
        if self.distortion is not None:
            (x, y), _ = self.distortion._evaluate(x, y)
        return _nan_unless(visible, self._to_pixels(x, y))

    def distort(self, points: Tensor) -> Tensor:
        """Moves ideal pixels to where the lens images them.

        Args:
            points: [..., C, 2], pixels of undistorted cameras of the same K.

        Returns:
            [..., C, 2], pixels; NaN with zero gradient for points that are not finite or lie
            outside of what the lens model maps.
        """
        return self._map_pixels(points, Distortion.distort)

    def undistort(self, points: Tensor) -> Tensor:
        """Moves measured pixels to where undistorted cameras of the same K would see them.

        What comes out fits `projections`. Differentiable, twice, in the points, the coefficients
        and K.

        Args:
            points: [..., C, 2], pixels as measured.

        Returns:
            [..., C, 2], ideal pixels; NaN with zero gradient for points that are not finite and
            pixels that the lens model does not reach.
        """
        return self._map_pixels(points, Distortion.undistort)

    def crop(self, box: Tensor | Sequence[float]) -> Cameras:
        """The cameras of the images cut to a box, as `image[y0:y1, x0:x1]` does.

        Args:
            box: [C, 4] or [4], `x0, y0, x1, y1` in pixels: pixel (x0, y0) becomes (0, 0), the new
                size is (x1 - x0, y1 - y0). It may reach beyond the image (padding).

        Returns:
            The cameras with shifted principal points and the new `image_size`.
        """
        corners = _per_camera(box, "box", self.K, 4)
        first, last = corners[:, :2], corners[:, 2:]
        return self._with_pixels(torch.ones_like(first), -first, last - first)

    def resize(self, size: Tensor | Sequence[float]) -> Cameras:
        """The cameras of the images scaled to a size, edge to edge.

        Pixel centres are integers, so the image spans [-0.5, width - 0.5] and, with
        `s = new width / width`, a pixel moves to `x' = (x + 0.5) s - 0.5`; the same for y. This is
        how image libraries resize (`align_corners=False`).

        Args:
            size: [C, 2] or [2], the new (width, height) in pixels.

        Returns:
            The cameras with the new K and `image_size`.

        Raises:
            ValueError: if the cameras have no `image_size`.
        """
        if self.image_size is None:
            raise ValueError("resize needs cameras with image_size, got image_size None")
        new_size = _per_camera(size, "size", self.K, 2)
        scale = new_size / self.image_size
        return self._with_pixels(scale, scale / 2 - 0.5, new_size)

    def to(self, *args: Any, **kwargs: Any) -> Cameras:
        """The cameras on another device or in another dtype; arguments as of `torch.Tensor.to`."""
        return self._each(lambda tensor: tensor.to(*args, **kwargs), self.names)

    def select(self, index: int | str | slice | Sequence[int] | Sequence[str] | Tensor) -> Cameras:
        """Some of the cameras, in the order asked for; always a batch, also for one.

        Args:
            index: a position or a name, several of them, a slice, or a tensor [M] of positions or
                [C] of booleans.

        Returns:
            The chosen cameras.

        Raises:
            ValueError: if there is no such camera.
        """
        rows = self._rows(index)
        names = None if self.names is None else tuple(self.names[row] for row in rows)
        return self._each(lambda tensor: tensor[rows], names)

    def problems(self) -> list[str]:
        """What is wrong with the values of this calibration, one line per finding.

        Reads the values, so it waits for the device; for use when a file has been read.

        Returns:
            Sentences that name the camera; empty if K, R, t, the distortion and the image size are
            those of a camera.
        """
        names = self.names or [str(row) for row in range(len(self))]
        return [
            f"camera {name}: {problem}"
            for row, name in enumerate(names)
            for problem in self._problems_of(row)
        ]

    def _each(self, change: Callable[[Tensor], Tensor], names: tuple[str, ...] | None) -> Cameras:
        """The cameras with every tensor changed in the same way."""
        distortion, size = self.distortion, self.image_size
        if distortion is not None:
            distortion = replace(distortion, coefficients=change(distortion.coefficients))
        size = None if size is None else change(size)
        return Cameras(change(self.K), change(self.R), change(self.t), distortion, size, names)

    def _problems_of(self, row: int) -> list[str]:
        tensors = {"K": self.K, "R": self.R, "t": self.t, "image_size": self.image_size}
        if self.distortion is not None:
            tensors["distortion"] = self.distortion.coefficients
        found: list[str] = []
        for key, tensor in tensors.items():
            if tensor is None:
                continue
            value = tensor[row].detach().cpu().double()
            if not bool(value.isfinite().all()):
                found.append(f"{key} is not finite")
            elif key == "K":
                found += _intrinsic_problems(value)
            elif key == "R":
                found += _rotation_problems(value)
            elif key == "image_size" and not bool((value > 0).all()):
                found.append("image_size must be positive, got {:g}x{:g}".format(*value.tolist()))
        return found

    def _to_pixels(self, x: Tensor, y: Tensor) -> Tensor:
        K = self.K
        u = K[:, 0, 0] * x + K[:, 0, 1] * y + K[:, 0, 2]
        v = K[:, 1, 1] * y + K[:, 1, 2]
        return torch.stack([u, v], -1)

    def _map_pixels(
        self, points: Tensor, mapping: Callable[[Distortion, Tensor], Tensor]
    ) -> Tensor:
        _require_points(points, self.K)
        finite = points.isfinite().all(-1)
        if self.distortion is None:
            return _nan_unless(finite, points)
        K = self.K
        u, v = _masked(points, finite).unbind(-1)
        y = (v - K[:, 1, 2]) / K[:, 1, 1]
        x = (u - K[:, 0, 2] - K[:, 0, 1] * y) / K[:, 0, 0]
        mapped = mapping(self.distortion, torch.stack([x, y], -1))
        known = finite & mapped.detach().isfinite().all(-1)
        return _nan_unless(known, self._to_pixels(*_masked(mapped, known).unbind(-1)))

    def _with_pixels(self, scale: Tensor, shift: Tensor, image_size: Tensor) -> Cameras:
        """The cameras whose pixels are `scale * pixel + shift`, both [C, 2]."""
        top = self.K[:, :2] * scale[:, :, None] + self.K[:, 2:] * shift[:, :, None]
        return replace(self, K=torch.cat([top, self.K[:, 2:]], 1), image_size=image_size)

    def _rows(self, index: int | str | slice | Sequence[int] | Sequence[str] | Tensor) -> list[int]:
        count = len(self)
        if isinstance(index, slice):
            index = list(range(count))[index]
        if isinstance(index, Tensor):
            index = (index.nonzero()[:, 0] if index.dtype == torch.bool else index).tolist()
        entries = [index] if isinstance(index, (int, str)) else list(index)
        if not entries:
            raise ValueError("index must choose at least one camera, got none")
        names = list(self.names or ())
        rows: list[int] = []
        for entry in entries:
            row = names.index(entry) if isinstance(entry, str) and entry in names else entry
            if isinstance(row, str) or not -count <= row < count:
                known = f" ({', '.join(names)})" if names else ""
                raise ValueError(f"index must be one of {count} cameras{known}, got {entry!r}")
            rows.append(row % count)
        return rows


def _sample_radius(position: Tensor) -> Tensor:
    """The ideal radius at a (fractional) sample number."""
    u = position * (_MAX_RADIUS / (1 + _MAX_RADIUS) / (_SAMPLES - 1))
    return u / (1 - u)


def _arctan_ratio(s: Tensor) -> tuple[Tensor, Tensor]:
    """`arctan(sqrt(s)) / sqrt(s)` and its derivative in s, smooth through s = 0."""
    near = s < 0.01
    small = torch.where(near, s, 0.0)
    series, series_slope = torch.zeros_like(s), torch.zeros_like(s)
    for n in reversed(range(9)):
        series_slope = series + small * series_slope
        series = (-1) ** n / (2 * n + 1) + small * series
    large = torch.where(near, 1.0, s)
    r = large.sqrt()
    ratio = torch.atan(r) / r
    ratio_slope = (1 / (1 + large) - ratio) / (2 * large)
    return torch.where(near, series, ratio), torch.where(near, series_slope, ratio_slope)


def _cubic(s: Tensor, first: Tensor, second: Tensor, third: Tensor) -> tuple[Tensor, Tensor]:
    """`1 + first s + second s^2 + third s^3` and its derivative in s."""
    value = 1 + s * (first + s * (second + s * third))
    return value, first + s * (2 * second + 3 * s * third)


def _fisheye_factor(s: Tensor, k: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """Distorted over ideal radius of the fisheye model and its derivative in s = r^2."""
    ratio, ratio_slope = _arctan_ratio(s)
    a = s * ratio * ratio  # the squared angle off the axis
    a_slope = ratio * ratio + 2 * s * ratio * ratio_slope
    factor = 1 + a * (k[0] + a * (k[1] + a * (k[2] + a * k[3])))
    slope = k[0] + a * (2 * k[1] + a * (3 * k[2] + 4 * a * k[3]))
    return ratio * factor, ratio_slope * factor + ratio * slope * a_slope


def _masked(points: Tensor, keep: Tensor) -> Tensor:
    """The points with zeros, and no gradient, where `keep` is False."""
    return torch.where(keep[..., None], points, 0.0)


def _nan_unless(keep: Tensor, points: Tensor) -> Tensor:
    """The points with NaN, and no gradient, where `keep` is False."""
    return torch.where(keep[..., None], points, torch.nan)


def _as_distortion(distortion: Distortion | Tensor | None, lens: Lens | None) -> Distortion | None:
    if lens is not None and lens not in get_args(Lens):
        raise ValueError(f"lens must be one of {', '.join(get_args(Lens))}, got {lens!r}")
    if isinstance(distortion, Distortion):
        if lens not in (None, distortion.lens):
            raise ValueError(f"lens must be {distortion.lens!r} like the distortion, got {lens!r}")
        return distortion
    if distortion is None:
        if lens not in (None, "pinhole"):
            raise ValueError(f"lens {lens!r} needs distortion coefficients, got None")
        return None
    if lens == "pinhole":
        raise ValueError("distortion must be None for lens 'pinhole', got coefficients")
    return Distortion(distortion, lens or "brown_conrady")


def _per_camera(values: Tensor | Sequence[float], name: str, like: Tensor, columns: int) -> Tensor:
    """[C, columns] in the dtype of `like`, from one row for all cameras or one row for each."""
    if not isinstance(values, Tensor):
        values = torch.as_tensor(values, dtype=like.dtype, device=like.device)
    if values.device != like.device:
        raise TypeError(f"{name} must be on {like.device} like K, got {values.device}")
    if values.shape not in ((columns,), (len(like), columns)):
        raise ValueError(
            f"{name} must be [{columns}] or [C, {columns}] with C = {len(like)}, "
            f"got {tuple(values.shape)}"
        )
    return values.to(like.dtype).expand(len(like), columns)


def _checked_names(names: Sequence[str], count: int) -> tuple[str, ...]:
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"names must be a sequence of {count} strings, got {names!r}")
    if len(names) != count or len(set(names)) != count:
        raise ValueError(f"names must be {count} different names, got {list(names)}")
    return tuple(names)


def _require_float(value: Tensor, name: str) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if value.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{name} must be float32 or float64, got {value.dtype}")


def _require_like(value: Tensor, name: str, like: Tensor) -> None:
    """Checks that a tensor has the dtype and the device of another one, the rig's."""
    _require_float(value, name)
    if value.dtype != like.dtype:
        raise TypeError(f"{name} must be {like.dtype} like the cameras, got {value.dtype}")
    if value.device != like.device:
        raise TypeError(f"{name} must be on {like.device} like the cameras, got {value.device}")


def _require_points(points: Tensor, like: Tensor) -> None:
    _require_like(points, "points", like)
    if points.ndim < 2 or points.shape[-2:] != (len(like), 2):
        raise ValueError(
            f"points must be [..., C, 2] with C = {len(like)}, got {tuple(points.shape)}"
        )


def _intrinsic_problems(K: Tensor) -> list[str]:
    fx, fy = float(K[0, 0]), float(K[1, 1])
    bottom = K[2].tolist()
    if bottom != [0, 0, 1] and float(K[2, 0]) != 0 and float(K[0, 2]) == 0:
        return ["K looks transposed: the principal point stands in the last row"]
    found: list[str] = []
    if fx == 0 or fy == 0:
        found.append(f"K is singular: focal lengths {fx:g}, {fy:g}")
    elif fx < 0 or fy < 0:
        found.append(f"K has a negative focal length: {fx:g}, {fy:g}")
    if bottom != [0, 0, 1]:
        found.append("the last row of K must be 0 0 1, got {:g} {:g} {:g}".format(*bottom))
    if float(K[1, 0]) != 0:
        found.append(f"K[1, 0] must be 0, got {float(K[1, 0]):g}")
    return found


def _rotation_problems(R: Tensor) -> list[str]:
    error = float((R @ R.T - torch.eye(3, dtype=R.dtype)).abs().max())
    # Files often hold four decimals.
    if error > 1e-3:
        return [f"R is not a rotation: R R^T differs from the identity by {error:.3g}"]
    if float(torch.linalg.det(R)) < 0:
        return ["R is not a rotation but a reflection: its determinant is -1"]
    return []
