# SPDX-License-Identifier: Apache-2.0
"""The sections of a configuration as frozen dataclasses: network, loss, data and training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

from tritool.training._parse import ConfigError, build, build_plain, nearest, plain

if TYPE_CHECKING:
    from torch.utils.data import Dataset

    from tritool.data import Sample
    from tritool.data.synthetic import StudioSettings

__all__ = [
    "AlgebraicSettings",
    "DataSettings",
    "HeatmapLoss",
    "LearningRates",
    "NetworkSettings",
    "PositionLoss",
    "RansacSettings",
    "Schedule",
    "StudioPart",
    "SyntheticData",
    "TrainingSettings",
    "VolumetricLoss",
    "VolumetricSettings",
    "above",
    "at_least",
]

Aggregation = Literal["sum", "mean", "conf", "softmax", "max"]
HeatmapKind = Literal["mse", "cross_entropy"]
Part = Literal["train", "validation"]


def at_least(section: object, least: float, *names: str) -> None:
    """Raises for a setting of the section that is given and below the least."""
    for name in names:
        value = getattr(section, name)
        if value is not None and value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")


def above(section: object, bound: float, *names: str) -> None:
    """Raises for a setting of the section that is given and not above the bound."""
    for name in names:
        value = getattr(section, name)
        if value is not None and value <= bound:
            raise ValueError(f"{name} must be above {bound}, got {value}")


# ---- Networks ----


@dataclass(frozen=True)
class NetworkSettings:
    """What all networks have in common: the 2D backbone and where its first weights come from.

    Attributes:
        num_joints: J; the data must have as many.
        depth: Of the residual trunk: 18, 34, 50, 101 or 152.
        width: Channels of its first convolution, 64 in the papers.
        deconv_channels: Channels of the transposed convolutions, 256 in the paper.
        official_conventions: Sample and scale as the official code does, for its weights.
        checkpointing: Less memory in training for about a third more time.
        channel_order: In which order the network takes the colours; official weights take "bgr".
        pelvis: The joint that errors are taken relative to, or joints whose mean that is; also the
            centre of the volume.
        backbone_from: A checkpoint of this package whose `backbone.*` training starts from.
        official_checkpoint: A checkpoint of the official code that training starts from.
        imagenet_trunk: A classification network's weights that the trunk starts from.
    """

    num_joints: int = 17
    depth: int = 152
    width: int = 64
    deconv_channels: int = 256
    official_conventions: bool = False
    checkpointing: bool = False
    channel_order: Literal["rgb", "bgr"] = "rgb"
    pelvis: tuple[int, ...] = (0,)
    backbone_from: str | None = None
    official_checkpoint: str | None = None
    imagenet_trunk: str | None = None

    def __post_init__(self) -> None:
        """Checks the values."""
        at_least(self, 1, "num_joints", "width", "deconv_channels")
        if self.depth not in (18, 34, 50, 101, 152):
            raise ValueError(f"depth must be one of 18, 34, 50, 101, 152, got {self.depth}")
        if not self.pelvis or not all(0 <= joint < self.num_joints for joint in self.pelvis):
            raise ValueError(
                f"pelvis must be joints from 0 to {self.num_joints - 1}, got {list(self.pelvis)}"
            )
        starts = ("backbone_from", "official_checkpoint", "imagenet_trunk")
        given = [name for name in starts if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{given[1]} cannot be given beside {given[0]}")


@dataclass(frozen=True)
class RansacSettings(NetworkSettings):
    """The baseline: 2D joints, triangulated robustly. Only the 2D backbone is trained.

    Attributes:
        threshold: Reprojection error of an inlier, pixels of the network's images.
        pairs: How many random pairs of views are tried; none: all.
        readout: How a joint is read from its heat map.
        inverse_temperature: Of the soft-argmax, where that is the readout.
        refine: End with a Huber refinement of the reprojection errors.
    """

    kind: Literal["ransac"] = "ransac"
    threshold: float = 15.0
    pairs: int | None = None
    readout: Literal["argmax", "soft_argmax"] = "argmax"
    inverse_temperature: float = 100.0
    refine: bool = True

    def __post_init__(self) -> None:
        """Checks the values."""
        super().__post_init__()
        above(self, 0, "threshold", "inverse_temperature")
        at_least(self, 1, "pairs")


@dataclass(frozen=True)
class AlgebraicSettings(NetworkSettings):
    """Soft-argmax and a differentiable triangulation, weighted by learnt confidences.

    Attributes:
        use_confidences: Learn a weight for each joint and view.
        inverse_temperature: Of the soft-argmax; 100 in the paper.
    """

    kind: Literal["algebraic"] = "algebraic"
    use_confidences: bool = True
    inverse_temperature: float = 100.0

    def __post_init__(self) -> None:
        """Checks the values."""
        super().__post_init__()
        above(self, 0, "inverse_temperature")


@dataclass(frozen=True)
class VolumetricSettings(NetworkSettings):
    """Features unprojected into a volume around the pelvis, and a 3D network in it.

    Attributes:
        volume_size: Voxels along an edge, a multiple of 32.
        side: Length of an edge, millimetres.
        aggregation: How the views are put together in a voxel.
        inverse_temperature: Of the soft-argmax in the volume; 1 in the paper.
        volume_channels: Channels that are unprojected, 32 in the paper.
        v2v_width: Channels of the 3D network, 32 in the paper.
        v2v_front_width: Channels of its first convolution; none: half of `v2v_width`, as there.
        vertical: The world's axis that the volume is turned about in training.
        random_rotation: Turn it, by a random angle for each sample.
        outside: What a view that does not see a voxel gives: zeros (the paper), or nothing at all.
        center_noise: Standard deviation of a random shift of the centre along each axis, in
            training, millimetres: for centres that are predicted at test time.
        algebraic_from: The checkpoint of an algebraic network that predicts the centre at test
            time; none: the true pelvis is the centre, as always in training.
    """

    kind: Literal["volumetric"] = "volumetric"
    volume_size: int = 64
    side: float = 2500.0
    aggregation: Aggregation = "softmax"
    inverse_temperature: float = 1.0
    volume_channels: int = 32
    v2v_width: int = 32
    v2v_front_width: int | None = None
    vertical: Literal["x", "y", "z", "-x", "-y", "-z"] = "z"
    random_rotation: bool = True
    outside: Literal["zeros", "exclude"] = "zeros"
    center_noise: float = 0.0
    algebraic_from: str | None = None

    def __post_init__(self) -> None:
        """Checks the values."""
        super().__post_init__()
        above(self, 0, "side", "inverse_temperature")
        at_least(self, 1, "volume_channels", "v2v_width")
        at_least(self, 0, "center_noise")
        if self.volume_size < 32 or self.volume_size % 32:
            raise ValueError(f"volume_size must be a multiple of 32, got {self.volume_size}")


# ---- Losses ----


@dataclass(frozen=True)
class HeatmapLoss:
    """Difference of the heat maps to Gaussians at the true 2D joints.

    Attributes:
        heatmap_loss: The squared difference to Gaussians of height 1, or the cross entropy of the
            softmax (at the network's inverse temperature) and Gaussians of sum 1.
        heatmap_weight: Factor of this loss.
        heatmap_sigma: Standard deviation of the Gaussians, cells of the heat map.
    """

    heatmap_loss: HeatmapKind = "mse"
    heatmap_weight: float = 1.0
    heatmap_sigma: float = 2.0

    def __post_init__(self) -> None:
        """Checks the values."""
        above(self, 0, "heatmap_weight", "heatmap_sigma")


@dataclass(frozen=True)
class PositionLoss:
    """Distance of the 3D joints, and optionally of the heat maps.

    Attributes:
        position: Which distance; "soft_mse" is equation (15) of the paper.
        threshold: Of "soft_mse", squared, in the unit of `scale`; 400 is (20 cm)^2.
        scale: Millimetres are multiplied by it before the distance is taken; 0.1: centimetres.
        heatmap_loss: Which loss of the heat maps: see `HeatmapLoss`.
        heatmap_weight: Its factor; 0: none, as in the paper.
        heatmap_sigma: Standard deviation of its Gaussians, cells of the heat map.
    """

    position: Literal["soft_mse", "mse", "l1", "l2"] = "soft_mse"
    threshold: float = 400.0
    scale: float = 0.1
    heatmap_loss: HeatmapKind = "mse"
    heatmap_weight: float = 0.0
    heatmap_sigma: float = 2.0

    def __post_init__(self) -> None:
        """Checks the values."""
        above(self, 0, "threshold", "scale", "heatmap_sigma")
        at_least(self, 0, "heatmap_weight")


@dataclass(frozen=True)
class VolumetricLoss:
    """Absolute error of the 3D joints, and how unlikely their true voxels are: equation (16).

    Attributes:
        beta: Factor of the likelihood.
        scale: Millimetres are multiplied by it before the error is taken; 0.1: centimetres.
        relative_single_view: Where a batch has one view, compare joints relative to the pelvis,
            and the pelvis itself where it is: one view does not tell the depth.
    """

    beta: float = 0.01
    scale: float = 0.1
    relative_single_view: bool = True

    def __post_init__(self) -> None:
        """Checks the values."""
        above(self, 0, "scale")
        at_least(self, 0, "beta")


# ---- Data ----


class DataSettings(Protocol):
    """What every kind of data offers."""

    @property
    def kind(self) -> str:
        """The name in `DATA`."""
        ...

    def dataset(self, part: Part) -> Dataset[Sample]:
        """The samples to train on, or those to validate on."""
        ...


@dataclass(frozen=True)
class StudioPart:
    """Some samples of the studio.

    Attributes:
        length: How many.
        seed: Other seeds are other people, poses, rooms and cameras.
        studio: What the studio is like; in a file also `preset: NAME` beside what differs from it.
    """

    length: int
    seed: int
    studio: StudioSettings

    def __post_init__(self) -> None:
        """Checks the values."""
        at_least(self, 1, "length")
        at_least(self, 0, "seed")

    @classmethod
    def parse(cls, values: object, where: str) -> StudioPart:
        """Reads `length`, `seed` and, under `studio`, settings or a preset of them."""
        from tritool.data.synthetic import StudioSettings

        if not isinstance(values, Mapping):
            raise ConfigError(f"{where} must be a mapping of settings, got {values!r}")
        rest = dict(values)
        studio = rest.pop("studio", {})
        for key in rest:
            if key not in ("length", "seed"):
                known = nearest(str(key), ("length", "seed", "studio"))
                raise ConfigError(f"{where}.{key} is unknown{known}")
        for key in ("length", "seed"):
            if key not in rest:
                raise ConfigError(f"{where}.{key} is missing")
        settings = StudioSettings()
        if isinstance(studio, Mapping):
            studio = dict(studio)
            preset = studio.pop("preset", None)
            if preset is not None:
                try:
                    settings = StudioSettings.preset(preset)
                except (TypeError, ValueError) as error:
                    raise ConfigError(f"{where}.studio.preset: {error}") from None
            studio = {**plain(settings), **studio}
        settings = build(StudioSettings, studio, f"{where}.studio")
        numbers = build_plain(_Numbers, rest, where)
        try:
            return cls(numbers.length, numbers.seed, settings)
        except ValueError as error:
            raise ConfigError(f"{where}.{error}") from None


@dataclass(frozen=True)
class _Numbers:
    length: int
    seed: int


@dataclass(frozen=True)
class SyntheticData:
    """The studio of `tritool.data.synthetic`: pictures made as they are needed.

    Attributes:
        train: What is trained on.
        validation: What is validated on; another seed, so that nobody is in both.
    """

    train: StudioPart
    validation: StudioPart
    kind: Literal["synthetic"] = "synthetic"

    def __post_init__(self) -> None:
        """Checks the values."""
        if self.train.seed == self.validation.seed:
            raise ValueError(
                f"validation.seed must differ from train.seed, got {self.train.seed} for both"
            )

    def dataset(self, part: Part) -> Dataset[Sample]:
        """The samples to train on, or those to validate on."""
        from tritool.data.synthetic import Studio

        chosen = self.train if part == "train" else self.validation
        return Studio(chosen.studio, length=chosen.length, seed=chosen.seed)


# ---- Training ----


@dataclass(frozen=True)
class LearningRates:
    """Of each part of the network; 0 freezes a part, its batch norm included.

    Attributes:
        backbone: The residual trunk.
        head: The transposed convolutions, the heat maps and the confidences.
        volume: What comes after unprojection, and the convolution before it.
    """

    backbone: float = 1e-4
    head: float = 1e-4
    volume: float = 1e-3

    def __post_init__(self) -> None:
        """Checks the values."""
        at_least(self, 0, "backbone", "head", "volume")
        if not any((self.backbone, self.head, self.volume)):
            raise ValueError("backbone, head and volume cannot all be 0: nothing would be trained")

    @classmethod
    def parse(cls, values: object, where: str) -> LearningRates:
        """Reads a mapping, or one number for all parts."""
        if isinstance(values, int | float | str) and not isinstance(values, bool):
            try:
                rate = float(values)
            except ValueError:
                raise ConfigError(f"{where} must be a number, got {values!r}") from None
            values = {"backbone": rate, "head": rate, "volume": rate}
        return build_plain(cls, values, where)


@dataclass(frozen=True)
class Schedule:
    """How the learning rates change.

    Attributes:
        kind: "constant"; "cosine" down to `final` at the last step; "step": times `gamma` at each
            of `milestones`.
        warmup: Steps at the beginning over which the rates rise in a line from 0.
        milestones: Steps.
        gamma: Factor.
        final: Fraction of the rates.
    """

    kind: Literal["constant", "cosine", "step"] = "constant"
    warmup: int = 0
    milestones: tuple[int, ...] = ()
    gamma: float = 0.1
    final: float = 0.0

    def __post_init__(self) -> None:
        """Checks the values."""
        at_least(self, 0, "warmup", "final")
        above(self, 0, "gamma")
        if self.final > 1:
            raise ValueError(f"final must be at most 1, got {self.final}")
        if list(self.milestones) != sorted(set(self.milestones)):
            raise ValueError(f"milestones must rise, got {list(self.milestones)}")
        if bool(self.milestones) != (self.kind == "step"):
            raise ValueError(
                "milestones must be given for kind step, and only there, "
                f"got {list(self.milestones)} for kind {self.kind}"
            )


@dataclass(frozen=True)
class TrainingSettings:
    """How the network is trained.

    Attributes:
        steps: How many steps; this or `epochs`.
        epochs: How many times each sample is seen.
        batch_size: Samples of a step, over all processes.
        accumulate: Parts that each process computes its samples of a step in, for memory's sake.
        learning_rate: Of each part of the network, or one number for all.
        optimizer: "adam" or "adamw".
        weight_decay: Its strength.
        schedule: How the learning rates change.
        gradient_clip: Largest norm of the gradient; none: not clipped.
        mixed_precision: "no", "bf16" or "fp16".
        ema: Decay of a running average of the weights, which is then what is validated; none: no
            average.
        freeze_batch_norm: Use the statistics that batch norm has, and leave them.
        sync_batch_norm: Take batch norm's statistics over all processes; on GPUs only.
        deterministic: On a GPU, too, use algorithms that give the same bits each time.
        channels_last: Keep the weights of convolutions with the channels last: the same network,
            1.3 to 2 times as fast on CPUs.
        seed: Of the first weights, the order of samples and everything drawn.
        workers: Processes that make samples beside each training process; 0: it makes them itself.
        views: Fewest and most views of a batch, drawn for each; none: all there are.
        log_every: Steps.
        validate_every: Steps.
        save_every: Steps.
        validation_samples: How many samples of the validation part are used during training;
            none: all.
        pictures: How many of them are drawn for TensorBoard.
        tensorboard: Write for TensorBoard.
    """

    steps: int | None = None
    epochs: float | None = None
    batch_size: int = 8
    accumulate: int = 1
    learning_rate: LearningRates = field(default_factory=LearningRates)
    optimizer: Literal["adam", "adamw"] = "adam"
    weight_decay: float = 0.0
    schedule: Schedule = field(default_factory=Schedule)
    gradient_clip: float | None = None
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    ema: float | None = None
    freeze_batch_norm: bool = False
    sync_batch_norm: bool = False
    deterministic: bool = False
    channels_last: bool = True
    seed: int = 0
    workers: int = 0
    views: tuple[int, int] | None = None
    log_every: int = 10
    validate_every: int = 500
    save_every: int = 500
    validation_samples: int | None = None
    pictures: int = 4
    tensorboard: bool = True

    def __post_init__(self) -> None:
        """Checks the values."""
        at_least(self, 1, "steps", "batch_size", "accumulate")
        at_least(self, 1, "log_every", "validate_every", "save_every", "validation_samples")
        at_least(self, 0, "weight_decay", "seed", "workers", "pictures")
        above(self, 0, "epochs", "gradient_clip")
        if (self.steps is None) == (self.epochs is None):
            given = "neither" if self.steps is None else "both"
            raise ValueError(f"steps or epochs must be given, got {given}")
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"batch_size must be a multiple of accumulate, got {self.batch_size} and "
                f"{self.accumulate}"
            )
        if self.ema is not None and not 0 < self.ema < 1:
            raise ValueError(f"ema must be between 0 and 1, got {self.ema}")
        if self.views is not None and not 1 <= self.views[0] <= self.views[1]:
            raise ValueError(f"views must be [fewest, most], at least 1, got {list(self.views)}")
        if self.freeze_batch_norm and self.sync_batch_norm:
            raise ValueError("sync_batch_norm cannot be given beside freeze_batch_norm")

    def total_steps(self, length: int) -> int:
        """How many steps there are with so many samples to train on."""
        if self.steps is not None:
            return self.steps
        assert self.epochs is not None
        return max(1, -int(-self.epochs * length // self.batch_size))
