# SPDX-License-Identifier: Apache-2.0
"""A studio without a download: people made of quadrics, filmed by calibrated cameras."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist

import numpy as np
import torch
from torch.utils.data import Dataset

from tritool.data.sample import Sample
from tritool.data.synthetic.body import BONES, Pose, put_on_floor
from tritool.data.synthetic.cameras import Rig, crop_boxes, draw_rig
from tritool.data.synthetic.eyes import Eyes, Floats
from tritool.data.synthetic.figure import Subject, draw_subject, lowest, posed
from tritool.data.synthetic.poses import draw_pose
from tritool.data.synthetic.render import render
from tritool.data.synthetic.scene import (
    Scene,
    Thing,
    draw_clutter,
    draw_obstacle,
    draw_room,
    seat,
)
from tritool.data.synthetic.settings import StudioSettings
from tritool.data.synthetic.shapes import Array, Blocks, Flags, Solids, boxes, joined
from tritool.data.synthetic.trace import first_depths
from tritool.skeletons import HUMAN36M_JOINTS

__all__ = ["Studio"]

# What chance is drawn for; each has its own stream of numbers.
_SUBJECT, _SAMPLE, _RIG, _IMAGE = range(4)

# 256 equally likely values of a standard normal distribution: a byte looks up a grain of noise.
_NOISE = np.array([NormalDist().inv_cdf((k + 0.5) / 256) for k in range(256)], np.float32)

# Below this a sitting person sits on the floor, mm.
_LOWEST_SEAT = 150.0


class Studio(Dataset[Sample]):
    """Images of one person from several sides, with the truth about its joints.

    A sample depends on the settings, the seed and its index alone: not on the order in which
    samples are asked for, nor on workers and threads. Subjects belong to a seed, so studios of
    different seeds show different people.

    World: millimetres, z up, the floor at z = 0, the subject near the origin. The joints are
    HUMAN36M_JOINTS. Crops show nothing (black) beyond the cameras' images.

    A joint is visible in a view if it lies in the crop and in the full image, and if on the ray to
    it nothing lies in front but what belongs to the joint itself: the flesh of the limbs that meet
    there. Other parts of the body hide it if they are nearer by more than its limb is thick.

    Args:
        settings: What the studio is like; None for the defaults.
        length: Number of samples.
        seed: Where chance starts, 0 or more.

    Raises:
        ValueError: length or seed is out of range.

    Example:
        >>> studio = Studio(StudioSettings(views=3, image_size=(96, 128)), length=1000, seed=1)
        >>> studio[7].images.shape
        torch.Size([3, 3, 128, 96])
    """

    def __init__(
        self, settings: StudioSettings | None = None, *, length: int, seed: int = 0
    ) -> None:
        """Draws nothing yet."""
        for name, value, least in (("length", length, 1), ("seed", seed, 0)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be a whole number, got {value!r}")
            if value < least:
                raise ValueError(f"{name} must be {least} or more, got {value}")
        self.settings = StudioSettings() if settings is None else settings
        if not isinstance(self.settings, StudioSettings):
            raise TypeError(f"settings must be StudioSettings, got {type(settings).__name__}")
        self.length = length
        self.seed = seed

    def __len__(self) -> int:
        """The number of samples."""
        return self.length

    def __getitem__(self, index: int) -> Sample:
        """Draws one sample; a negative index counts from the end."""
        if not -self.length <= index < self.length:
            raise IndexError(f"index must be in a studio of {self.length} samples, got {index}")
        index = int(index) % self.length
        rng = np.random.default_rng([self.seed, _SAMPLE, index])
        take = draw_take(self.settings, self.seed, rng)
        return _filmed(
            take, self.settings, index, np.random.default_rng([self.seed, _IMAGE, index])
        )


@dataclass(frozen=True, eq=False)
class Take:
    """One moment before it is filmed.

    Attributes:
        scene: All there is to see; the subject's quadrics come first.
        rig: The cameras of the full images.
        joints: [17, 3], the subject's, mm.
        outline: [N, 3], points around the subject's flesh, mm.
        tolerance: [17], mm, as of `Subject`.
        subject: Its name.
        action: What it does.
    """

    scene: Scene
    rig: Rig
    joints: Array
    outline: Array
    tolerance: Array
    subject: str
    action: str


@lru_cache(maxsize=512)
def _subject(seed: int, which: int, marked: bool) -> Subject:
    return draw_subject(np.random.default_rng([seed, _SUBJECT, which]), marked=marked)


def draw_take(settings: StudioSettings, seed: int, rng: np.random.Generator) -> Take:
    """Draws who does what where, what is around, and the cameras."""
    which = int(rng.integers(settings.subjects))
    subject = _subject(seed, which, settings.marked_sides)
    action = settings.actions[int(rng.integers(len(settings.actions)))]
    spot = np.array([*rng.uniform(-settings.area, settings.area, 2), 0.0])
    pose = _grounded(subject, draw_pose(rng, subject.body, action)).moved(spot)
    flesh = posed(subject, pose)
    furniture = _seat_of(rng, subject, pose, flesh) if action == "sitting" else None

    target = np.array([0.0, 0.0, 900.0])
    if settings.fixed_rig:
        rig_rng = np.random.default_rng([settings.rig_seed, _RIG, settings.views])
    else:
        rig_rng = rng
        target = np.array([*spot[:2], 0.6 * float(pose.joints[0, :, 2].max())])
    rig = draw_rig(
        rig_rng,
        settings.views,
        target=target,
        radius=settings.ring_radius,
        height=settings.camera_height,
        field_of_view=settings.field_of_view,
        full_size=settings.full_size,
        distortion=settings.distortion,
    )
    others = _draw_others(rng, settings, seed, which, pose.joints[0], rig.centres)
    people = np.stack([pose.joints[0], *(other.joints[0] for other, _ in others)])

    room = draw_room(rng, rig.centres)
    things = (
        [furniture]
        + [
            draw_obstacle(rng, pose.joints[0], rig.centres, people)
            for _ in range(int(rng.integers(settings.obstacles[0], settings.obstacles[1] + 1)))
        ]
        + [
            draw_clutter(rng, room, rig.centres, people)
            for _ in range(int(rng.integers(settings.clutter[0], settings.clutter[1] + 1)))
        ]
    )
    present = [thing for thing in things if thing is not None]
    solids = [flesh, *(solid.of_nobody() for _, solid in others)]
    solids += [thing.round for thing in present if thing.round is not None]
    faces = boxes(joined([Blocks.none(), *(thing.blocks for thing in present)]))
    shadows = np.array([[*joints[:, :2].mean(0), 330.0] for joints in people])
    return Take(
        scene=Scene(room, joined(solids), faces, shadows),
        rig=rig,
        joints=pose.joints[0],
        outline=_outline(flesh),
        tolerance=subject.tolerance,
        subject=f"studio-{seed}-{which:03d}",
        action=action,
    )


def _grounded(subject: Subject, pose: Pose) -> Pose:
    return put_on_floor(pose, np.array([lowest(posed(subject, pose))]))


def _seat_of(rng: np.random.Generator, subject: Subject, pose: Pose, flesh: Solids) -> Thing | None:
    """What a sitting person sits on, unless that is the floor."""
    height = lowest(flesh, subject.bones == BONES.index("pelvis")) + 15
    if height < _LOWEST_SEAT:
        return None
    return seat(rng, pose.joints[0, 0], pose.turns[0, 0, :, 1], height)


def _draw_others(
    rng: np.random.Generator,
    settings: StudioSettings,
    seed: int,
    which: int,
    joints: Array,
    cameras: Array,
) -> list[tuple[Pose, Solids]]:
    """Other people, who stand in nobody's way but the cameras' views."""
    found: list[tuple[Pose, Solids]] = []
    for _ in range(int(rng.integers(settings.distractors[0], settings.distractors[1] + 1))):
        # Somebody else, if there is anybody.
        step = int(rng.integers(1, max(settings.subjects, 2)))
        other = _subject(seed, (which + step) % settings.subjects, settings.marked_sides)
        action = settings.actions[int(rng.integers(len(settings.actions)))]
        pose = _grounded(other, draw_pose(rng, other.body, action))
        for _ in range(8):
            angle, away = rng.uniform(-np.pi, np.pi), rng.uniform(700, 2300)
            spot = joints[0] * [1, 1, 0] + away * np.array([np.cos(angle), np.sin(angle), 0])
            there = pose.moved(spot)
            taken = np.stack([joints, *(each.joints[0] for each, _ in found)]).reshape(-1, 3)
            between = there.joints[0][:, None, :2] - taken[None, :, :2]
            to_cameras = there.joints[0][:, None, :2] - cameras[None, :, :2]
            if (
                np.linalg.norm(between, axis=-1).min() > 300
                and np.linalg.norm(to_cameras, axis=-1).min() > 900
            ):
                found.append((there, posed(other, there)))
                break
    return found


def _outline(flesh: Solids) -> Array:
    """[N, 3], the ends of the closed quadrics' axes: the open ones lie within those."""
    closed = np.isinf(flesh.cut[:, 0])
    reach = flesh.axes[closed] * flesh.high[closed][..., None]
    centre = flesh.origin[closed][:, None]
    return np.concatenate([centre + reach, centre - reach]).reshape(-1, 3)


def _filmed(take: Take, settings: StudioSettings, index: int, rng: np.random.Generator) -> Sample:
    width, height = settings.image_size
    boxes = crop_boxes(
        rng,
        take.rig.project(take.outline),
        margin=settings.crop_margin,
        jitter=settings.crop_jitter,
        image_size=settings.image_size,
    )
    cameras = take.rig.cameras.crop(torch.from_numpy(boxes)).resize((width, height))
    views = _present(rng, settings)
    eyes = Eyes.of(cameras.select(torch.from_numpy(views)), width, height)
    pixels = cameras.project(torch.from_numpy(take.joints)).movedim(0, 1).numpy()
    visibility = np.zeros(pixels.shape[:2], bool)
    visibility[views] = visible(take, eyes, pixels[views], boxes[views], settings)
    colours = render(eyes, take.scene)
    images = np.zeros((len(views), 3, height, width), np.uint8)
    images[views] = _developed(rng, colours, eyes, boxes[views], settings)
    pixels[~views] = np.nan
    return Sample(
        images=torch.from_numpy(images),
        cameras=cameras.to(torch.float32),
        keypoints_3d=torch.from_numpy(take.joints.astype(np.float32)),
        keypoints_2d=torch.from_numpy(pixels.astype(np.float32)),
        visibility=torch.from_numpy(visibility),
        views=torch.from_numpy(views),
        boxes=torch.from_numpy(boxes.astype(np.float32)),
        joint_names=HUMAN36M_JOINTS,
        index=index,
        subject=take.subject,
        action=take.action,
    )


def _present(rng: np.random.Generator, settings: StudioSettings) -> Flags:
    """[C], which views are there."""
    chance = rng.random(settings.views)
    # The least likely to be dropped stay in any case.
    stay = np.argsort(-chance)[: min(2, settings.views)]
    present: Flags = chance >= settings.drop_views
    present[stay] = True
    return present


def visible(take: Take, eyes: Eyes, pixels: Array, boxes: Array, settings: StudioSettings) -> Flags:
    """[C, J], the rule of `Studio`."""
    size = np.array([eyes.width, eyes.height])
    inside = ((pixels >= -0.5) & (pixels < size - 0.5)).all(-1)
    # The same point in the full image.
    sides = boxes[:, None, 2:] - boxes[:, None, :2]
    full = (pixels + 0.5) * sides / size - 0.5 + boxes[:, None, :2]
    inside &= ((full >= -0.5) & (full < np.array(settings.full_size) - 0.5)).all(-1)
    rays = eyes.rays(np.where(inside[..., None], pixels, 0.0))
    solids, faces = first_depths(eyes, take.scene.solids, take.scene.faces, rays)
    depth = np.einsum("cj,ij->ci", eyes.R[:, 2], take.joints) - np.einsum(
        "cj,cj->c", eyes.R[:, 2], eyes.centres
    )[:, None]  # fmt: skip
    limit = depth - take.tolerance
    hidden = (solids < limit[..., None]) & ~take.scene.solids.own.T[None]
    result: Flags = inside & ~hidden.any(-1) & ~(faces < limit[..., None]).any(-1)
    return result


def _developed(
    rng: np.random.Generator,
    colours: Floats,
    eyes: Eyes,
    boxes: Array,
    settings: StudioSettings,
) -> np.typing.NDArray[np.uint8]:
    """[C, 3, H, W]: blur, exposure, noise, and black beyond the full image."""
    views, height, width = len(boxes), eyes.height, eyes.width
    result = np.empty((views, 3, height, width), np.uint8)
    # The outer weights of [w, 1 - 2 w, w] with the wanted standard deviation.
    outer = (rng.uniform(*settings.blur, views) ** 2 / 2).astype(np.float32)
    gain = rng.uniform(*settings.exposure, (views, 1)) * (
        1 + settings.colour_cast * rng.standard_normal((views, 3))
    )
    gain = (255 * np.clip(gain, 0, None)).astype(np.float32)
    strength = rng.uniform(*settings.noise, views).astype(np.float32)
    # One plane at a time stays in the cache.
    for view in range(views):
        grains = _NOISE * strength[view] + np.float32(0.5)  # and rounding
        for channel in range(3):
            plane = colours[channel].reshape(views, height, width)[view]
            for axis in (0, 1):
                plane = _blurred(plane, outer[view], axis)
            plane *= gain[view, channel]
            raw = np.frombuffer(rng.bytes(height * width), np.uint8).reshape(height, width)
            plane += grains.take(raw)
            np.clip(plane, 0, 255, out=plane)
            result[view, channel] = plane
    for each, (x0, y0, x1, y1) in zip(result, boxes, strict=True):
        for axis, first, last, count, limit in (
            (2, x0, x1, width, settings.full_size[0]),
            (1, y0, y1, height, settings.full_size[1]),
        ):
            place = (np.arange(count) + 0.5) * (last - first) / count - 0.5 + first
            beyond = (place < -0.5) | (place >= limit - 0.5)
            if beyond.any():
                each[(slice(None),) * axis + (beyond,)] = 0
    return result


def _blurred(plane: Floats, outer: Floats, axis: int) -> Floats:
    """Three taps along an axis of [H, W]; beyond the border is what is at the border."""
    result, weighted = plane * (1 - 2 * outer), plane * outer
    into, source = (result, weighted) if axis == 0 else (result.T, weighted.T)
    into[:-1] += source[1:]
    into[1:] += source[:-1]
    into[0] += source[0]
    into[-1] += source[-1]
    return result
