# SPDX-License-Identifier: Apache-2.0
"""What a studio is like: every number that can be chosen, checked when it is given."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from tritool.data.synthetic.poses import ACTIONS

__all__ = ["Preset", "StudioSettings"]

Preset = Literal["easy", "default", "occluded"]

MAX_VIEWS = 31


@dataclass(frozen=True)
class StudioSettings:
    """Settings of a `Studio`. Pairs are the least and the greatest value; lists are taken too.

    Attributes:
        views: Number of cameras C, 1 to 31.
        image_size: Width and height of the crops, pixels.
        full_size: Width and height of the cameras' images, pixels.
        ring_radius: Horizontal distance of the cameras to what they look at, mm; at least 1800.
        camera_height: Height of the cameras above the floor, mm.
        field_of_view: Horizontal opening of the cameras, degrees.
        distortion: Largest absolute k1 of the lenses (Brown-Conrady; k2 and the tangential
            coefficients follow in proportion), without unit, at most 0.3; 0 for pinhole cameras.
        fixed_rig: The same cameras in all samples, which look at the middle of the room; otherwise
            each sample has new ones, which look at the subject.
        rig_seed: What a fixed rig is drawn from. Studios of other seeds but the same `rig_seed`
            have the same cameras.
        area: Half the side of the square in which the subject stands, mm, at most 1000.
        crop_margin: Free space on each side of the body in the crops, as a part of its extent.
        crop_jitter: Standard deviation of a crop's centre, as a part of its side.
        subjects: Number of different bodies in different clothes.
        marked_sides: Everybody's left arm and leg are blue, the right ones orange: left and right
            are easily told, which small networks learn in minutes instead of hours.
        actions: What they do, of `ACTIONS`.
        obstacles: Number of things between the subject and the cameras, close to it.
        distractors: Number of other people around.
        clutter: Number of things at the walls of the room.
        drop_views: Probability with which a view is absent; of C views at least min(C, 2) are
            there.
        noise: Standard deviation of the sensor's noise, grey levels.
        blur: Standard deviation of the blur, pixels of the crop, at most 0.8.
        exposure: Factor on the brightness.
        colour_cast: Standard deviation of the factors on red, green and blue.

    Raises:
        TypeError: A value is of another type.
        ValueError: A value is impossible.
    """

    views: int = 4
    image_size: tuple[int, int] = (128, 128)
    full_size: tuple[int, int] = (1000, 1000)
    ring_radius: tuple[float, float] = (2500.0, 6000.0)
    camera_height: tuple[float, float] = (500.0, 2800.0)
    field_of_view: tuple[float, float] = (38.0, 60.0)
    distortion: float = 0.0
    fixed_rig: bool = False
    rig_seed: int = 0
    area: float = 400.0
    crop_margin: tuple[float, float] = (0.06, 0.22)
    crop_jitter: float = 0.02
    subjects: int = 64
    marked_sides: bool = False
    actions: tuple[str, ...] = ACTIONS
    obstacles: tuple[int, int] = (0, 2)
    distractors: tuple[int, int] = (0, 1)
    clutter: tuple[int, int] = (2, 6)
    drop_views: float = 0.0
    noise: tuple[float, float] = (0.0, 8.0)
    blur: tuple[float, float] = (0.2, 0.7)
    exposure: tuple[float, float] = (0.75, 1.35)
    colour_cast: float = 0.05

    def __post_init__(self) -> None:
        """Checks every value."""
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, list):
                object.__setattr__(self, field.name, tuple(value))
        _whole(self, "views", 1, MAX_VIEWS)
        _whole(self, "rig_seed", 0, math.inf)
        _whole(self, "subjects", 1, math.inf)
        for name in ("image_size", "full_size"):
            _pair(self, name, 16, 8192, whole=True, ordered=False)
        for name in ("obstacles", "distractors", "clutter"):
            _pair(self, name, 0, 50, whole=True)
        _pair(self, "ring_radius", 1800, 50000)
        _pair(self, "camera_height", 0, 20000, above=True)
        _pair(self, "field_of_view", 5, 120)
        _pair(self, "crop_margin", 0, 5)
        _pair(self, "noise", 0, 100)
        _pair(self, "blur", 0, 0.8)
        _pair(self, "exposure", 0, 10, above=True)
        _number(self, "distortion", 0, 0.3)
        _number(self, "area", 0, 1000)
        # A ring around the middle of the room must hold the subject wherever it stands.
        if self.fixed_rig and self.ring_radius[0] < 1500 + 2**0.5 * self.area:
            raise ValueError(
                f"ring_radius of a fixed rig must be at least 1500 + 1.42 area = "
                f"{1500 + 2**0.5 * self.area:.0f}, got {self.ring_radius!r}"
            )
        _number(self, "crop_jitter", 0, 1)
        _number(self, "drop_views", 0, 1)
        _number(self, "colour_cast", 0, 0.5)
        for name in ("fixed_rig", "marked_sides"):
            if not isinstance(value := getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {value!r}")
        self._check_actions()

    def _check_actions(self) -> None:
        if not isinstance(self.actions, tuple):
            raise TypeError(f"actions must be a sequence of names, got {self.actions!r}")
        wrong = [action for action in self.actions if action not in ACTIONS]
        if wrong or not self.actions or len(set(self.actions)) != len(self.actions):
            raise ValueError(
                f"actions must be different ones of {', '.join(ACTIONS)}, got {self.actions}"
            )

    @classmethod
    def preset(cls, name: Preset, **changes: Any) -> StudioSettings:
        """Settings by name.

        Args:
            name: `easy`: nothing in the way, an even light, four cameras at chest height and above;
                `default`: for training; `occluded`: much in the way, other people, for evaluation.
            **changes: Settings to be different from the preset's.
        """
        if name not in get_args(Preset):
            raise ValueError(f"preset must be one of {', '.join(get_args(Preset))}, got {name!r}")
        values: dict[str, Any] = {
            "easy": {
                "obstacles": (0, 0),
                "distractors": (0, 0),
                "clutter": (0, 3),
                "camera_height": (1000.0, 2200.0),
                "noise": (0.0, 2.0),
                "blur": (0.2, 0.4),
                "exposure": (0.9, 1.1),
                "colour_cast": 0.02,
                "actions": ("standing", "walking", "reaching", "arms up", "arms out", "gesturing"),
            },
            "default": {},
            "occluded": {"obstacles": (3, 6), "distractors": (1, 2), "crop_jitter": 0.03},
        }[name]
        return cls(**values | changes)


def _is_number(value: object, whole: bool) -> bool:
    kinds: tuple[type, ...] = (int,) if whole else (int, float)
    return isinstance(value, kinds) and not isinstance(value, bool)


def _whole(settings: StudioSettings, name: str, low: float, high: float) -> None:
    value = getattr(settings, name)
    if not _is_number(value, whole=True):
        raise TypeError(f"{name} must be a whole number, got {value!r}")
    _within(name, (value,), low, high, False)


def _number(settings: StudioSettings, name: str, low: float, high: float) -> None:
    value = getattr(settings, name)
    if not _is_number(value, whole=False):
        raise TypeError(f"{name} must be a number, got {value!r}")
    _within(name, (value,), low, high, False)


def _pair(
    settings: StudioSettings,
    name: str,
    low: float,
    high: float,
    *,
    whole: bool = False,
    ordered: bool = True,
    above: bool = False,
) -> None:
    value = getattr(settings, name)
    kind = "whole numbers" if whole else "numbers"
    if not isinstance(value, tuple) or not all(_is_number(each, whole) for each in value):
        raise TypeError(f"{name} must be two {kind}, got {value!r}")
    if len(value) != 2:
        raise ValueError(f"{name} must be two {kind}, got {len(value)}: {value!r}")
    _within(name, value, low, high, above)
    if ordered and value[0] > value[1]:
        raise ValueError(f"{name} must be the least and the greatest value, got {value!r}")


def _within(name: str, values: Sequence[float], low: float, high: float, above: bool) -> None:
    fits = all((low < each if above else low <= each) and each <= high for each in values)
    if not fits:
        start = f"more than {low:g}" if above else f"{low:g}"
        until = "or more" if high == math.inf else f"to {high:g}"
        got = values[0] if len(values) == 1 else values
        raise ValueError(f"{name} must be {start} {until}, got {got!r}")
