# SPDX-License-Identifier: Apache-2.0
"""What a run trains: a network, its loss on a batch, and its answer to one.

The loop and the evaluation know tasks only; what belongs to one kind of network is here.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from tritool import losses
from tritool.data.sample import Batch
from tritool.grid import VoxelGrid
from tritool.models import (
    AlgebraicTriangulation,
    RansacTriangulation,
    VolumetricTriangulation,
    load_imagenet_trunk,
    load_official_checkpoint,
    normalize_images,
)
from tritool.training.config import KINDS, Config
from tritool.training.sampling import MODEL, seed_of

__all__ = [
    "AlgebraicTask",
    "Measured",
    "Prediction",
    "RansacTask",
    "Task",
    "Terms",
    "VolumetricTask",
    "build_task",
    "heatmap_cells",
    "joints_that_count",
    "load_network",
    "trained_task",
    "weights_file",
]

Terms = dict[str, Tensor]
# A sum and how many it is over.
Measured = tuple[Tensor, Tensor]

# Which part of `LearningRates` a parameter belongs to, by the start of its name; the first that
# fits, else the trunk's.
_PARTS = (
    ("backbone.deconv_layers.", "head"),
    ("backbone.final_layer.", "head"),
    ("backbone.alg_confidences.", "head"),
    ("backbone.vol_confidences.", "head"),
    ("log_temperature_factor", "head"),
    ("backbone.", "backbone"),
    ("process_features.", "volume"),
    ("volume_net.", "volume"),
)


@dataclass(frozen=True, eq=False)
class Prediction:
    """What a network says of a batch of B samples; None for what its kind does not have.

    Attributes:
        keypoints_3d: `[B, J, 3]`, millimetres; NaN where there is no prediction.
        keypoints_2d: `[B, C, J, 2]`, pixels of the crops; NaN where there is no view.
        heatmaps: `[B, C, J, H/4, W/4]`, before any softmax.
        confidences: `[B, C, J]`, weights of the views; `[B, C, K]` of a volumetric network.
        volumes: `[B, J, X, Y, Z]`, before the softmax.
        grid: Where the voxels lie.
    """

    keypoints_3d: Tensor
    keypoints_2d: Tensor | None = None
    heatmaps: Tensor | None = None
    confidences: Tensor | None = None
    volumes: Tensor | None = None
    grid: VoxelGrid | None = None


def joints_that_count(batch: Batch) -> Tensor:
    """`[B, J]`, boolean: joints that the losses are taken over.

    The 3D joint is known. A sample without any view teaches nothing.
    """
    return batch.keypoints_3d.isfinite().all(-1) & batch.views.any(1, keepdim=True)


class Task:
    """A network with its loss; one subclass a kind.

    Args:
        config: Of the run.

    Attributes:
        config: Of the run.
        model: The network: what checkpoints hold.
    """

    kind: ClassVar[str]
    # Whether the weights to keep are those of the least validation error, or else the last.
    keeps_best: ClassVar[bool] = True
    # What `measured` measures.
    measures: ClassVar[tuple[str, ...]] = ()

    def __init__(self, config: Config) -> None:
        self.config = config
        self.model = self._build(config.model)
        rates = config.training.learning_rate
        for name, parameter in self.model.named_parameters():
            if getattr(rates, _part(name)) == 0:
                parameter.requires_grad_(False)

    # ---- What a kind says ----

    def _build(self, settings: Any) -> nn.Module:
        """The network."""
        raise NotImplementedError

    def _loss(self, batch: Batch, images: Tensor, generator: torch.Generator | None) -> Terms:
        """The terms of the loss, already with their factors."""
        raise NotImplementedError

    def _predict(self, batch: Batch, images: Tensor) -> Prediction:
        """The network's answer; called in evaluation mode and without gradients."""
        raise NotImplementedError

    def counted(self, batch: Batch) -> int:
        """How many joints the loss of a batch is a mean over: how much it weighs beside others."""
        return int(joints_that_count(batch).sum())

    def begin_step(self, step: int) -> None:
        """Tells which step of training comes, from 0, before its loss is asked for."""

    def measured(self, batch: Batch, prediction: Prediction) -> dict[str, Measured]:
        """What validation measures besides errors in millimetres: `measures`, by name."""
        return {}

    # ---- What all have in common ----

    def loss(self, batch: Batch, generator: torch.Generator | None = None) -> tuple[Tensor, Terms]:
        """The loss of a batch.

        Args:
            batch: On the model's device.
            generator: Whose seed decides what is drawn at random (rotations, shifts), for each
                sample by its index: the same however a batch is cut into parts. None: PyTorch's
                own numbers.

        Returns:
            The sum of the terms, `[]`, and the terms by name, detached. Means over the joints that
            count (`joints_that_count`).
        """
        terms = self._loss(batch, self._images(batch), generator)
        total = torch.stack(list(terms.values())).sum()
        return total, {name: term.detach() for name, term in terms.items()}

    def predict(self, batch: Batch) -> Prediction:
        """The network's answer, in evaluation mode and without gradients.

        Args:
            batch: On the model's device.
        """
        with _evaluating(self.model), torch.no_grad():
            return self._predict(batch, self._images(batch))

    def loss_module(self) -> nn.Module:
        """The loss as a module of a batch, for what wraps modules (distribution)."""
        return _LossModule(self)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Trained parameters by part, each with its learning rate."""
        groups: dict[str, list[nn.Parameter]] = {}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                groups.setdefault(_part(name), []).append(parameter)
        rates = self.config.training.learning_rate
        return [
            {"name": part, "params": parameters, "lr": getattr(rates, part)}
            for part, parameters in groups.items()
        ]

    def train_mode(self) -> None:
        """Puts the network into training mode; frozen batch norms keep their statistics."""
        self.model.train()
        everything = self.config.training.freeze_batch_norm
        for module in self.model.modules():
            if isinstance(module, _BatchNorm):
                trained = any(p.requires_grad for p in module.parameters(recurse=False))
                if everything or not trained:
                    module.eval()

    def start_weights(self) -> list[str]:
        """Loads what the configuration says training starts from.

        Returns:
            What was loaded, a line for each file.

        Raises:
            OSError: A file cannot be read.
            ValueError: A file does not fit: one line with file and reason.
        """
        settings = self.config.model
        if settings.official_checkpoint is not None:
            return [str(load_official_checkpoint(self.model, settings.official_checkpoint))]
        if settings.imagenet_trunk is not None:
            return [str(load_imagenet_trunk(self.model, settings.imagenet_trunk))]
        if settings.backbone_from is not None:
            return [self._load_parts(settings.backbone_from)]
        return []

    def _load_parts(self, path: str) -> str:
        """Takes every tensor of a checkpoint of ours that fits this network by name and shape."""
        from tritool.training.state import read_model

        tensors, _ = read_model(weights_file(path))
        own = self.model.state_dict()
        fitting = {
            name: tensor
            for name, tensor in tensors.items()
            if name in own and own[name].shape == tensor.shape
        }
        lacking = [n for n in own if n.startswith("backbone.") and n not in fitting]
        # Branches of confidences belong to one kind of network and may start anew.
        lacking = [n for n in lacking if "_confidences." not in n]
        if lacking:
            raise ValueError(
                f"{path}: it has no {lacking[0]} of this network's shape; is it of another depth "
                "or width?"
            )
        self.model.load_state_dict(fitting, strict=False)
        return f"{path}: {len(fitting)} of {len(own)} tensors loaded"

    def _images(self, batch: Batch) -> Tensor:
        images = normalize_images(batch.images, order=self.config.model.channel_order)
        model_dtype = next(self.model.parameters()).dtype
        return images.to(model_dtype) if model_dtype == torch.float64 else images


class _LossModule(nn.Module):
    """A task's loss; the network is its only submodule."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.model = task.model
        self._task = task

    def forward(
        self, batch: Batch, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Terms]:
        return self._task.loss(batch, generator)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, a network is in evaluation mode; afterwards every module is as it was."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _part(name: str) -> str:
    return next((part for start, part in _PARTS if name.startswith(start)), "backbone")


def build_task(config: Config) -> Task:
    """The task of a configuration, with new weights.

    Raises:
        ValueError: The settings of the network do not fit together.
    """
    module, _, name = KINDS[config.kind].task.partition(":")
    made: Task = getattr(import_module(module), name)(config)
    return made


def _common(settings: Any) -> dict[str, Any]:
    """Arguments of all networks."""
    names = ("depth", "official_conventions", "width", "deconv_channels", "checkpointing")
    return {name: getattr(settings, name) for name in names}


def heatmap_cells(
    joints: Tensor, image: Sequence[int], cells: Sequence[int], *, official: bool = False
) -> Tensor:
    """Joints `[..., 2]`, pixels of images of `(H, W)`, in cells of heat maps of `(h, w)`."""
    down, across = image[0] / cells[0], image[1] / cells[1]
    x, y = joints.unbind(-1)
    if official:
        return torch.stack([x / across, y / down], -1)
    return torch.stack([(x + 0.5) / across - 0.5, (y + 0.5) / down - 0.5], -1)


def _heatmap_term(settings: Any, batch: Batch, heatmaps: Tensor, task: Task) -> Tensor:
    """The heat maps against Gaussians at the true joints of the views there are."""
    # Not as the maps are: half precision does not tell pixels apart.
    cells = heatmap_cells(
        batch.keypoints_2d,
        batch.images.shape[-2:],
        heatmaps.shape[-2:],
        official=task.config.model.official_conventions,
    )
    sigma, valid = settings.heatmap_sigma, batch.views[..., None]
    if settings.heatmap_loss == "mse":
        loss = losses.heatmap_mse(heatmaps, cells, sigma=sigma, valid=valid)
    else:
        alpha = task.config.model.inverse_temperature
        loss = losses.heatmap_cross_entropy(
            heatmaps, cells, sigma=sigma, inverse_temperature=alpha, valid=valid
        )
    weight: float = settings.heatmap_weight
    return weight * loss


def _drawn(batch: Batch, generator: torch.Generator | None, count: int) -> Tensor:
    """Numbers from a standard normal distribution, `[B, count]`, on the CPU."""
    if generator is None:
        return torch.randn(len(batch), count)
    seeds = [seed_of(generator.initial_seed(), MODEL, index) for index in batch.indices]
    return torch.stack(
        [torch.randn(count, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    )


def _unless(loss: Tensor, broken: Tensor) -> Tensor:
    """The loss, or NaN if the network gave no numbers anywhere.

    The losses leave out joints that are NaN. A network that has broken down would have none left,
    and a loss of 0.
    """
    return torch.where(broken.any(), torch.nan, loss)


class RansacTask(Task):
    """The 2D backbone, trained on heat maps; joints by robust triangulation of their peaks."""

    kind = "ransac"

    def _build(self, settings: Any) -> nn.Module:
        return RansacTriangulation(
            settings.num_joints,
            threshold=settings.threshold,
            pairs=settings.pairs,
            readout=settings.readout,
            inverse_temperature=settings.inverse_temperature,
            refine=settings.refine,
            **_common(settings),
        )

    def _loss(self, batch: Batch, images: Tensor, generator: torch.Generator | None) -> Terms:
        assert isinstance(self.model, RansacTriangulation)
        present = batch.views[..., None, None, None]
        heatmaps = self.model.backbone(torch.where(present, images, 0)).heatmaps
        return {"heatmaps": _heatmap_term(self.config.loss, batch, heatmaps, self)}

    def counted(self, batch: Batch) -> int:
        """How many 2D joints there are."""
        known = batch.keypoints_2d.isfinite().all(-1)
        return int((known & batch.views[..., None]).sum())

    def _predict(self, batch: Batch, images: Tensor) -> Prediction:
        # Random pairs, where they are asked for, are the same each time.
        generator = torch.Generator(images.device).manual_seed(self.config.training.seed)
        found = self.model(images, batch.projections, views=batch.views, generator=generator)
        return Prediction(
            found.keypoints_3d,
            found.keypoints_2d,
            found.heatmaps,
            found.inliers.to(found.keypoints_3d.dtype),
        )


def _triangulated(batch: Batch) -> Tensor:
    """`[B, J]`, boolean: known joints of samples with enough views."""
    return joints_that_count(batch) & (batch.views.sum(1, keepdim=True) > 1)


class AlgebraicTask(Task):
    """Weighted triangulation, trained on 3D joints and, if asked for, on heat maps."""

    kind = "algebraic"

    def _build(self, settings: Any) -> nn.Module:
        return AlgebraicTriangulation(
            settings.num_joints,
            use_confidences=settings.use_confidences,
            inverse_temperature=settings.inverse_temperature,
            **_common(settings),
        )

    def _loss(self, batch: Batch, images: Tensor, generator: torch.Generator | None) -> Terms:
        settings = self.config.loss
        found = self.model(images, batch.projections, views=batch.views)
        options = {"threshold": settings.threshold} if settings.position == "soft_mse" else {}
        distance = getattr(losses, settings.position)(
            found.keypoints_3d * settings.scale,
            batch.keypoints_3d.to(found.keypoints_3d.dtype) * settings.scale,
            valid=_triangulated(batch),
            **options,
        )
        numbers = found.keypoints_2d.isfinite().all(-1) & found.confidences.isfinite()
        terms = {"position": _unless(distance, batch.views[..., None] & ~numbers)}
        if settings.heatmap_weight > 0:
            terms["heatmaps"] = _heatmap_term(settings, batch, found.heatmaps, self)
        return terms

    def counted(self, batch: Batch) -> int:
        """How many 3D joints there are; the loss of the heat maps weighs as much."""
        return int(_triangulated(batch).sum())

    def _predict(self, batch: Batch, images: Tensor) -> Prediction:
        found = self.model(images, batch.projections, views=batch.views)
        return Prediction(found.keypoints_3d, found.keypoints_2d, found.heatmaps, found.confidences)


class VolumetricTask(Task):
    """Unprojection into a cube about the pelvis, trained on 3D joints and their voxels."""

    kind = "volumetric"

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        # Where the centre comes from at test time, if not from the truth; read when first needed.
        self._algebraic: Task | None = None

    def _build(self, settings: Any) -> nn.Module:
        return VolumetricTriangulation(
            settings.num_joints,
            volume_size=settings.volume_size,
            side=settings.side,
            aggregation=settings.aggregation,
            inverse_temperature=settings.inverse_temperature,
            volume_channels=settings.volume_channels,
            v2v_width=settings.v2v_width,
            v2v_front_width=settings.v2v_front_width,
            vertical=settings.vertical,
            pelvis=settings.pelvis,
            random_rotation=settings.random_rotation,
            outside=settings.outside,
            **_common(settings),
        )

    def _loss(self, batch: Batch, images: Tensor, generator: torch.Generator | None) -> Terms:
        settings = self.config.loss
        centers, rotation = self._true_centers(batch), None
        if self.model.training:
            drawn = _drawn(batch, generator, 4).to(centers)
            centers = centers + self.config.model.center_noise * drawn[:, :3]
            if self.config.model.random_rotation:
                # The distribution of a normal number is one from 0 to 1.
                rotation = 2 * math.pi * torch.special.ndtr(drawn[:, 3])
        found = self.model(images, batch.projections, centers, views=batch.views, rotation=rotation)
        counts = joints_that_count(batch) & centers.isfinite().all(-1, keepdim=True)
        broken = counts & ~found.keypoints_3d.isfinite().all(-1)
        scale = settings.scale
        grid = VoxelGrid(found.grid.origin * scale, found.grid.axes * scale, found.grid.size)
        target = batch.keypoints_3d.to(grid.dtype) * scale
        if not (settings.relative_single_view and batch.views.shape[1] == 1):
            loss = losses.volumetric_loss(
                found.volumes,
                grid,
                target,
                beta=settings.beta,
                inverse_temperature=self.config.model.inverse_temperature,
                valid=counts,
            )
            return {"volume": _unless(loss, broken)}
        # One view tells the shape, not the depth: joints relative to the pelvis, the pelvis itself
        # as it is (the official code's way with one view).
        predicted = found.keypoints_3d * scale
        distance = losses.l1(self._relative(predicted), self._relative(target), valid=counts)
        nll = losses.volumetric_nll(
            found.volumes,
            grid,
            target,
            inverse_temperature=self.config.model.inverse_temperature,
            valid=counts,
        )
        return {"volume": _unless(distance + settings.beta * nll, broken)}

    def _predict(self, batch: Batch, images: Tensor) -> Prediction:
        centers = self._centers(batch, images)
        found = self.model(images, batch.projections, centers, views=batch.views)
        return Prediction(
            found.keypoints_3d,
            confidences=found.confidences,
            volumes=found.volumes,
            grid=found.grid,
        )

    def _centers(self, batch: Batch, images: Tensor) -> Tensor:
        """The cubes' centres `[B, 3]` at test time."""
        source = self.config.model.algebraic_from
        if source is None:
            return self._true_centers(batch)
        if self._algebraic is None:
            self._algebraic = trained_task(source, self.config, "algebraic")
            self._algebraic.model.to(images.device)
        return self._mean_pelvis(self._algebraic.predict(batch).keypoints_3d)

    def _true_centers(self, batch: Batch) -> Tensor:
        return self._mean_pelvis(batch.keypoints_3d)

    def _mean_pelvis(self, joints: Tensor) -> Tensor:
        return joints[:, list(self.config.model.pelvis)].mean(1)

    def _relative(self, joints: Tensor) -> Tensor:
        """Joints relative to the pelvis; the pelvis's own joints as they are."""
        pelvis = list(self.config.model.pelvis)
        own = torch.zeros(joints.shape[-2], 1, dtype=torch.bool)
        own[pelvis] = True
        root = joints[:, pelvis].mean(1, keepdim=True)
        return torch.where(own.to(joints.device), joints, joints - root)


def weights_file(source: str) -> Path:
    """A checkpoint by its path, or, as "tritool:NAME", one that comes with the package.

    Raises:
        ValueError: There is none of that name.
    """
    name = source.removeprefix("tritool:")
    if name == source:
        return Path(source)
    folder = Path(__file__).parents[1] / "weights"
    path = folder / f"{name}.safetensors"
    if not path.exists():
        known = ", ".join(sorted(file.stem for file in folder.glob("*.safetensors"))) or "none"
        raise ValueError(f"{source}: no such weights come with the package; known are {known}")
    return path


def load_network(source: str | os.PathLike[str]) -> nn.Module:
    """A trained network, ready to use: no configuration, no data set.

    Args:
        source: A checkpoint of `train`, or `"tritool:NAME"` for weights that come with the package:
            `small-ransac`, `small-algebraic`, `small-volumetric`.

    Returns:
        The network of `tritool.models`, built as the checkpoint says, in evaluation mode, on the
        CPU, float32. It takes images as `tritool.models.normalize_images` makes them, of a size
        like that in training. A volumetric one comes without a model that finds the pelvis: give
        it `centers`.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is not one of ours, or damaged, or the package has no weights of that name.

    Example:
        >>> network = load_network("tritool:small-algebraic")
        >>> type(network).__name__, network.training
        ('AlgebraicTriangulation', False)
    """
    from tritool.training.state import read_model

    tensors, info = read_model(weights_file(os.fspath(source)))
    model = build_task(Config.from_dict(info["config"])).model
    model.load_state_dict(tensors)
    return model.eval()


def trained_task(source: str, config: Config, kind: str) -> Task:
    """A trained network beside that of a configuration, with the settings in its checkpoint.

    Raises:
        ValueError: The checkpoint is of another kind, or for another number of joints.
    """
    from tritool.training.state import read_model

    tensors, info = read_model(weights_file(source), kind=kind)
    settings = Config.from_dict(info["config"])
    if settings.model.num_joints != config.model.num_joints:
        raise ValueError(
            f"{source}: it is for {settings.model.num_joints} joints, not {config.model.num_joints}"
        )
    task = build_task(settings)
    task.model.load_state_dict(tensors)
    return task
