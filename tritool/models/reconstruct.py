# SPDX-License-Identifier: Apache-2.0
"""From 2.5D to 3D in closed form: pixels, relative depths and one known length give the pose.

Also what goes with it: intrinsics of augmented crops, intrinsics of unknown cameras, and the scale
that a pose of unknown size gets from mean lengths of limbs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tritool.ops import _check
from tritool.ops._limbs import checked_lengths, checked_limbs, take
from tritool.skeletons import _plain, side

__all__ = [
    "Reconstruction",
    "absolute_scale",
    "augmented_intrinsics",
    "flip_affine",
    "intrinsics_fallback",
    "map_points",
    "mirrored_joints",
    "reconstruct_pose",
    "reconstruct_pose_median",
    "rotation_affine",
]


class Reconstruction(NamedTuple):
    """What `reconstruct_pose` finds.

    Attributes:
        pose: `[..., J, 3]`, camera coordinates (x to the right, y down, z away from the camera) in
            the unit of `length`.
        root_depth: `[...]`, the depth Z of the root, to which the relative depths are added.
        discriminant: `[...]`, that of the quadratic equation for Z, before any clamping. Not above
            0: no pose has these pixels, these relative depths and this length.
        valid: `[...]`, boolean: the equation determines Z well, and it is in front of the camera.
            Leave the others out of losses.
    """

    pose: Tensor
    root_depth: Tensor
    discriminant: Tensor
    valid: Tensor


def reconstruct_pose(
    xy: Tensor,
    relative_depth: Tensor,
    K: Tensor,
    *,
    pair: tuple[int, int],
    length: float = 1.0,
    min_spread: float = 1e-6,
    min_ratio: float = 1e-6,
    depth_range: tuple[float, float] | None = None,
) -> Reconstruction:
    r"""The pose with given pixels and relative depths in which two joints are `length` apart.

    With the normalised image coordinates :math:`m_j = K^{-1} (x_j, y_j, 1)` and the relative depths
    :math:`z_j`, the joints are :math:`(Z + z_j) m_j`, and the distance of the pair (k, l) gives a
    quadratic equation for the root's depth Z, of which the larger solution is taken: Iqbal et al.,
    "Hand Pose Estimation via Latent 2.5D Heatmap Regression" (ECCV 2018). The other one is a pair
    seen nearly end-on from close by. Differentiable in everything; float32 at least, also under
    autocast. Nothing is read back from the device.

    Where the pair is seen end-on, Z hardly follows from it and its gradients explode. `min_spread`
    and `min_ratio` bound what is divided by and the square root; where they do, the pose is finite,
    but not `length` apart, and `valid` is False.

    Args:
        xy: `[..., J, 2]`, pixels of the image that `K` belongs to.
        relative_depth: `[..., J]`, depth of each joint minus that of the root, in the unit of
            `length`.
        K: `[..., 3, 3]`, pixels from camera coordinates, up to a factor; the batches of the three
            broadcast. The last row is (0, 0, 1) times that factor, the rest may be anything
            invertible: skew, and the rotation of a crop, `augmented_intrinsics`, are included.
        pair: Two joints: which length is known. Neck and pelvis, say.
        length: Their distance, above 0. It sets the unit of everything.
        min_spread: Least squared distance of the pair in normalised image coordinates, above 0.
        min_ratio: Least squared cosine of the angle between the pair and the direction, parallel to
            the image plane, in which it is seen, from 0 (no solution) to 1 (parallel to the image
            plane); below 1. The square root is clamped there.
        depth_range: Least and greatest Z; it is clamped to that, and what had to be is not `valid`.
            None: it is left alone.

    Returns:
        `Reconstruction(pose [..., J, 3], root_depth [...], discriminant [...], valid [...])`,
        float32 or float64. All NaN, with zero gradient, and `valid` False where a joint of the pair
        is not finite or `K` is not a matrix as above. Another joint that is not finite is NaN
        alone.

    Raises:
        TypeError: An argument is not a floating-point tensor.
        ValueError: Shapes or devices do not fit, or a number is not as above.

    Example:
        >>> K = torch.tensor([[1000.0, 0, 500], [0, 1000, 400], [0, 0, 1]])
        >>> pelvis, neck, wrist = [500.0, 400], [500.0, 200], [600.0, 300]
        >>> found = reconstruct_pose(
        ...     torch.tensor([pelvis, neck, wrist]), torch.tensor([0.0, 0, -0.5]), K, pair=(1, 0)
        ... )
        >>> found.pose  # a neck 200 of 1000 above the pelvis is 5 lengths away
        tensor([[ 0.0000,  0.0000,  5.0000],
                [ 0.0000, -1.0000,  5.0000],
                [ 0.4500, -0.4500,  4.5000]])
    """
    joints = _check_25d(xy, relative_depth, K)
    (k,), (l,) = checked_limbs("pair", (pair,), joints)
    length = _check.positive_number("length", length)
    _check_guards(min_spread, min_ratio, depth_range)
    rays, depths, known = _known_rays(xy, relative_depth, K)
    root = _root_depth(
        (rays[..., k, :], rays[..., l, :]),
        (depths[..., k], depths[..., l]),
        known[..., k] & known[..., l],
        rays.new_full((), length),
        min_spread,
        min_ratio,
        depth_range,
    )
    return _with_pose(root, rays, depths, known)


def reconstruct_pose_median(
    xy: Tensor,
    relative_depth: Tensor,
    K: Tensor,
    *,
    limbs: Sequence[tuple[int, int]],
    lengths: Sequence[float] | Tensor,
    min_spread: float = 1e-6,
    min_ratio: float = 0.01,
    depth_range: tuple[float, float] | None = None,
) -> Reconstruction:
    """As `reconstruct_pose`, with the median of the root depths that several limbs give.

    Each limb with its mean length gives one estimate; those seen end-on, or with a joint missing,
    give none. A person differs from the mean and any one limb may be foreshortened, so the median
    is steadier than one pair at test time, after the idea of NVIDIA's DeepStream sample for 3D body
    pose. No bone of the pose has exactly its mean length then.

    Args:
        xy: `[..., J, 2]`, pixels.
        relative_depth: `[..., J]`, in the unit of `lengths`.
        K: `[..., 3, 3]`, as for `reconstruct_pose`.
        limbs: L pairs of joints, at least one.
        lengths: L numbers above 0, or `[L]`: the mean length of each.
        min_spread: As for `reconstruct_pose`: a limb below it gives no estimate.
        min_ratio: As for `reconstruct_pose`: a limb below it gives no estimate.
        depth_range: As for `reconstruct_pose`: a limb beyond it gives no estimate.

    Returns:
        As `reconstruct_pose`. The median of an even number is the lower one of the middle two, so
        that root depth and discriminant are those of one limb. NaN, with zero gradient, and not
        `valid` where no limb gives an estimate.

    Raises:
        TypeError: An argument is not a floating-point tensor.
        ValueError: Shapes or devices do not fit, or a number is not as above.
    """
    joints = _check_25d(xy, relative_depth, K)
    first, second = checked_limbs("limbs", limbs, joints)
    _check_guards(min_spread, min_ratio, depth_range)
    rays, depths, known = _known_rays(xy, relative_depth, K)
    mean = checked_lengths("lengths", lengths, len(limbs), rays)
    # One estimate a limb, in the place of the last dimension.
    each = _root_depth(
        (take(rays, first, -2), take(rays, second, -2)),
        (take(depths, first, -1), take(depths, second, -1)),
        take(known, first, -1) & take(known, second, -1),
        mean,
        min_spread,
        min_ratio,
        depth_range,
    )
    order = torch.where(each.valid, each.root_depth.detach(), torch.inf).argsort(-1)
    middle = (each.valid.sum(-1, keepdim=True) - 1).clamp(min=0).div(2, rounding_mode="floor")
    chosen = order.gather(-1, middle)
    valid = each.valid.any(-1)
    # Without any estimate the first limb stands there, and is not used.
    depth = torch.where(each.valid, each.root_depth, 1).gather(-1, chosen)[..., 0]
    root = _Root(
        torch.where(valid, depth, torch.nan),
        torch.where(valid, each.discriminant.gather(-1, chosen)[..., 0], torch.nan),
        valid,
        valid,
    )
    return _with_pose(root, rays, depths, known)


class _Root(NamedTuple):
    """The depth of the root, the discriminant, whether there is a depth, whether it is sound."""

    root_depth: Tensor
    discriminant: Tensor
    known: Tensor
    valid: Tensor


def _root_depth(
    rays: tuple[Tensor, Tensor],
    depths: tuple[Tensor, Tensor],
    known: Tensor,
    length: Tensor,
    min_spread: float,
    min_ratio: float,
    depth_range: tuple[float, float] | None,
) -> _Root:
    """Solves the quadratic equation; all arguments are finite.

    With d = m_k - m_l and e = z_k - z_l the bone is Z d + (e m_l + z_k d, e), in which d and m_l
    have two coordinates. So a = |d|^2, b = 2 (e d.m_l + a z_k), and, the rest of b^2 - 4 a c
    cancelling, (b^2 - 4 a c) / 4 = a length^2 - e^2 (a + (d x m_l)^2), the square of d times the
    bone: no large terms are subtracted. docs/weak_supervision.md, section 2.
    """
    ray_k, ray_l = rays
    z_k, z_l = depths
    d, e = ray_k - ray_l, z_k - z_l
    a = d.square().sum(-1)
    cross = d[..., 0] * ray_l[..., 1] - d[..., 1] * ray_l[..., 0]
    quarter = a * length.square() - e.square() * (a + cross.square())

    spread = a.clamp(min=min_spread)
    floor = min_ratio * spread * length.square()
    sound = (quarter > floor) & (a > min_spread)
    # The root of what is above the floor only: its slope at 0 is infinite.
    bounded = torch.where(quarter > floor, quarter, floor)
    positive = bounded > 0
    root = torch.where(positive, torch.where(positive, bounded, 1).sqrt(), 0)
    depth = (root - e * (d * ray_l).sum(-1)) / spread - z_k
    sound = sound & (depth > 0)
    if depth_range is not None:
        sound = sound & (depth >= depth_range[0]) & (depth <= depth_range[1])
        depth = depth.clamp(*depth_range)
    return _Root(
        torch.where(known, depth, torch.nan),
        torch.where(known, 4 * quarter, torch.nan),
        known,
        sound & known,
    )


def _with_pose(root: _Root, rays: Tensor, depths: Tensor, known: Tensor) -> Reconstruction:
    # Where there is no depth, 0 goes on, or NaN would reach a gradient as 0 * NaN.
    depth = torch.where(root.known, root.root_depth, 0)[..., None] + depths
    pose = torch.cat([depth[..., None] * rays, depth[..., None]], -1)
    there = known & root.known[..., None]
    pose = torch.where(there[..., None], pose, torch.nan)
    return Reconstruction(pose, root.root_depth, root.discriminant, root.valid)


def _known_rays(xy: Tensor, relative_depth: Tensor, K: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Normalised coordinates [..., J, 2], depths [..., J], both 0 where not known [..., J]."""
    dtype = _check.geometry_dtype((xy, relative_depth, K))
    K = K.to(dtype)
    determinant = K[..., 0, 0] * K[..., 1, 1] - K[..., 0, 1] * K[..., 1, 0]
    scale = K[..., 2, 2]
    usable = K.isfinite().all(-1).all(-1) & (determinant != 0) & (scale != 0)
    # A transposed matrix, say, must not pass for another camera.
    usable = usable & (K[..., 2, :2] == 0).all(-1)
    identity = torch.eye(3, dtype=dtype, device=K.device)
    K = torch.where(usable[..., None, None], K, identity)
    K = K / K[..., 2:, 2:]
    known = (xy.isfinite().all(-1) & relative_depth.isfinite()) & usable[..., None]

    pixels = torch.where(known[..., None], xy.to(dtype), 0) - K[..., None, :2, 2]
    x, y = pixels.unbind(-1)
    (a, b), (c, d) = (row.unbind(-1) for row in K[..., None, :2, :2].unbind(-2))
    rays = torch.stack([d * x - b * y, a * y - c * x], -1) / (a * d - b * c)[..., None]
    rays = torch.where(known[..., None], rays, 0)
    return rays, torch.where(known, relative_depth.to(dtype), 0), known


def augmented_intrinsics(K: Tensor, affine: Tensor) -> Tensor:
    """The intrinsics of an image that was moved by an affine map: cropped, scaled, turned, flipped.

    A pose that is reconstructed from pixels of the moved image with these is the one that the
    original pixels and `K` give, in the original camera's coordinates; the relative depths stay as
    they are. In a flipped image what looks like the left side is the right one: reorder the joints
    by `mirrored_joints` as well.

    Args:
        K: `[..., 3, 3]`.
        affine: `[..., 2, 3]`, pixels of the moved image from those of the original one; the batches
            broadcast.

    Returns:
        `[..., 3, 3]`, in the wider dtype and at least float32. No triangle of zeros any more if the
        map turns.

    Raises:
        TypeError: An argument is not a floating-point tensor.
        ValueError: Shapes or devices do not fit.
    """
    _check.tensors({"K": K, "affine": affine})
    _check.trailing("K", K, "[..., 3, 3]", (3, 3))
    _check.trailing("affine", affine, "[..., 2, 3]", (2, 3))
    _check.broadcast_batch({"K": K.shape[:-2], "affine": affine.shape[:-2]})
    dtype = _check.geometry_dtype((K, affine))
    K, affine = K.to(dtype), affine.to(dtype)
    # Not a matmul: autocast and TF32 would round it.
    top = (affine[..., :, :, None] * K[..., None, :, :]).sum(-2)
    last = K[..., 2:, :].expand(*top.shape[:-2], 1, 3)
    return torch.cat([top, last], -2)


def map_points(points: Tensor, affine: Tensor) -> Tensor:
    """Pixels moved by an affine map.

    Args:
        points: `[..., J, 2]`.
        affine: `[..., 2, 3]`; the batches broadcast.

    Returns:
        `[..., J, 2]`, in the wider dtype and at least float32; NaN stays NaN.

    Raises:
        TypeError: An argument is not a floating-point tensor.
        ValueError: Shapes or devices do not fit.
    """
    _check.tensors({"points": points, "affine": affine})
    _check.trailing("points", points, "[..., J, 2]", (None, 2))
    _check.trailing("affine", affine, "[..., 2, 3]", (2, 3))
    _check.broadcast_batch({"points": points.shape[:-2], "affine": affine.shape[:-2]})
    dtype = _check.geometry_dtype((points, affine))
    points, affine = points.to(dtype), affine.to(dtype)[..., None, :, :]
    return (affine[..., :2] * points[..., None, :]).sum(-1) + affine[..., 2]


def rotation_affine(angle: Tensor, size: tuple[int, int], *, scale: Tensor | float = 1.0) -> Tensor:
    """The map that turns and scales an image about its centre.

    Args:
        angle: `[...]`, radians; positive turns x towards y, clockwise as one looks at the image.
        size: (W, H) of the image.
        scale: `[...]`, or a number, above 0: above 1 enlarges.

    Returns:
        `[..., 2, 3]`, moved pixels from original ones; in the dtype of `angle`, at least float32.

    Raises:
        TypeError: `angle` is not a floating-point tensor.
        ValueError: `size` is not two numbers of at least 1.
    """
    _check.tensors({"angle": angle})
    width, height = _checked_size(size)
    angle = angle.to(_check.geometry_dtype((angle,)))
    cos, sin = scale * angle.cos(), scale * angle.sin()
    x, y = (width - 1) / 2, (height - 1) / 2
    rows = [cos, -sin, x - cos * x + sin * y, sin, cos, y - sin * x - cos * y]
    return torch.stack(rows, -1).reshape(*cos.shape, 2, 3)


def flip_affine(
    width: int, *, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None
) -> Tensor:
    """The map that flips an image left to right.

    Args:
        width: W of the image.
        dtype: Of the result.
        device: Of the result.

    Returns:
        `[2, 3]`, flipped pixels from original ones; its own inverse.

    Raises:
        ValueError: `width` is below 1.
    """
    _checked_size((width, 1))
    rows = [[-1.0, 0.0, width - 1.0], [0.0, 1.0, 0.0]]
    return torch.tensor(rows, dtype=dtype, device=device)


def mirrored_joints(joint_names: Sequence[str]) -> tuple[int, ...]:
    """Which joint of a flipped image is which of the original one.

    Args:
        joint_names: J names, spelled as for `tritool.skeletons.limbs`.

    Returns:
        J indices: the joint of the same name on the other side of the body, or the joint itself.
        Its own inverse.

    Raises:
        ValueError: A joint of one side has no counterpart.

    Example:
        >>> mirrored_joints(["pelvis", "r_hip", "l_hip"])
        (0, 2, 1)
    """
    keys = [(_plain(name).removeprefix(f"{side(name)}_"), side(name)) for name in joint_names]
    other = {"l": "r", "r": "l", "": ""}
    at = {key: index for index, key in enumerate(keys)}
    for name, (bare, which) in zip(joint_names, keys, strict=True):
        if (bare, other[which]) not in at:
            raise ValueError(f"joint_names must name both sides, got {name!r} without counterpart")
    return tuple(at[bare, other[which]] for bare, which in keys)


def intrinsics_fallback(
    image_size: tuple[int, int], *, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Intrinsics of a camera of which nothing is known: focal length max(W, H), centred.

    A choice, not a measurement: a field of view of 53 degrees along the longer side, of a common
    lens. With a wrong focal length distances from the camera are wrong by about as much; the pose
    itself changes little. Take that of the whole image, then crop.

    Args:
        image_size: (W, H) of the whole image.
        dtype: Of the result.

    Returns:
        `[3, 3]`; the centre of the image is ((W - 1) / 2, (H - 1) / 2).

    Raises:
        ValueError: `image_size` is not two numbers of at least 1.
    """
    width, height = _checked_size(image_size, "image_size")
    focal = float(max(width, height))
    rows = [[focal, 0.0, (width - 1) / 2], [0.0, focal, (height - 1) / 2], [0.0, 0.0, 1.0]]
    return torch.tensor(rows, dtype=dtype)


def absolute_scale(
    pose: Tensor,
    confidences: Tensor | None,
    mean_lengths: Sequence[float] | Tensor,
    limbs: Sequence[tuple[int, int]],
) -> Tensor:
    r"""The factor that brings the limbs of a pose closest to mean lengths.

    Minimises :math:`\sum w (s l - \bar\mu)^2` over s, with the lengths l of the pose's limbs and
    w the product of the confidences of their two ends: :math:`s = \sum w l \bar\mu / \sum w l^2`.

    Args:
        pose: `[..., J, 3]`, any unit. A limb with a joint that is not finite does not count.
        confidences: `[..., J]`, at least 0. None: every limb counts alike.
        mean_lengths: L numbers above 0, or `[L]`; millimetres, say.
        limbs: L pairs of joints, at least one.

    Returns:
        `[...]`, unit of `mean_lengths` over that of `pose`, to multiply the pose with. NaN, with
        zero gradient, where no limb counts or all have length 0, or the confidence of a joint that
        is there is negative or not finite.

    Raises:
        TypeError: An argument is not a floating-point tensor.
        ValueError: Shapes or devices do not fit, or a length is not above 0.
    """
    tensors = {"pose": pose} | ({} if confidences is None else {"confidences": confidences})
    _check.tensors(tensors)
    _check.trailing("pose", pose, "[..., J, 3]", (None, 3))
    if confidences is not None and confidences.shape != pose.shape[:-1]:
        raise ValueError(
            f"confidences must be [..., J] to fit pose, {tuple(pose.shape[:-1])}, "
            f"got {tuple(confidences.shape)}"
        )
    first, second = checked_limbs("limbs", limbs, pose.shape[-2])
    dtype = _check.geometry_dtype(tensors.values())
    pose = pose.to(dtype)
    mean = checked_lengths("mean_lengths", mean_lengths, len(limbs), pose)
    known = pose.isfinite().all(-1)
    weights = known.to(dtype)
    wrong = torch.zeros_like(known)
    if confidences is not None:
        wrong = known & ~((confidences >= 0) & confidences.isfinite())
        weights = torch.where(known & ~wrong, confidences.to(dtype), 0)
    joints = torch.where(known[..., None], pose, 0)
    w = take(weights, first, -1) * take(weights, second, -1)
    square = (take(joints, first, -2) - take(joints, second, -2)).square().sum(-1)
    nonzero = square > 0
    l = torch.where(nonzero, torch.where(nonzero, square, 1).sqrt(), 0)
    total = (w * square).sum(-1)
    determined = (total > 0) & ~wrong.any(-1)
    scale = (w * l * mean).sum(-1) / torch.where(determined, total, 1)
    return torch.where(determined, scale, torch.nan)


# ---- Checks ----


def _check_25d(xy: Tensor, relative_depth: Tensor, K: Tensor) -> int:
    """J, of arguments that fit."""
    _check.tensors({"xy": xy, "relative_depth": relative_depth, "K": K})
    _check.trailing("xy", xy, "[..., J, 2]", (None, 2))
    joints = xy.shape[-2]
    if relative_depth.dim() < 1 or relative_depth.shape[-1] != joints:
        raise ValueError(
            f"relative_depth must be [..., J] with J = {joints} as in xy, "
            f"got {tuple(relative_depth.shape)}"
        )
    _check.trailing("K", K, "[..., 3, 3]", (3, 3))
    _check.broadcast_batch(
        {
            "xy": xy.shape[:-2],
            "relative_depth": relative_depth.shape[:-1],
            "K": K.shape[:-2],
        }
    )
    return joints


def _check_guards(
    min_spread: float, min_ratio: float, depth_range: tuple[float, float] | None
) -> None:
    if not (min_spread > 0 and math.isfinite(min_spread)):
        raise ValueError(f"min_spread must be a finite number above 0, got {min_spread}")
    if not 0 <= min_ratio < 1:
        raise ValueError(f"min_ratio must be a number from 0 to below 1, got {min_ratio}")
    if depth_range is not None and not 0 <= depth_range[0] < depth_range[1]:
        raise ValueError(
            f"depth_range must be two numbers, at least 0 and rising, got {depth_range}"
        )


def _checked_size(size: tuple[int, int], name: str = "size") -> tuple[int, int]:
    if len(size) != 2 or any(not n >= 1 for n in size):
        raise ValueError(f"{name} must be (W, H), each at least 1, got {size}")
    return size
