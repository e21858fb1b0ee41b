# SPDX-License-Identifier: Apache-2.0
"""Training: one step after the other, stopped and continued at any of them."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tritool.data.recording import written_aside
from tritool.data.sample import Batch, collate
from tritool.metrics import mpjpe
from tritool.training._parse import write_yaml
from tritool.training.config import Config
from tritool.training.process import (
    Stopped,
    Stopping,
    cores_left_to,
    deterministic,
    locked,
    make_accelerator,
)
from tritool.training.sampling import (
    MODEL,
    Order,
    SizedSamples,
    portions_of,
    seed_of,
    training_batches,
)
from tritool.training.sections import Schedule
from tritool.training.state import load_state, save_state, write_model
from tritool.training.tasks import Task, build_task
from tritool.training.tracking import Board, Metrics, picture_joints

__all__ = ["TrainResult", "TrainingError", "learning_rate_factor", "train"]

LAST, BEST, METRICS = "last.safetensors", "best.safetensors", "metrics.jsonl"


class TrainingError(ValueError):
    """Training cannot go on: one line with the step and the samples."""


@dataclass(frozen=True)
class TrainResult:
    """What a run came to.

    Attributes:
        step: How many steps are done, those of earlier runs included.
        losses: Step and mean loss of each line of the learning curve.
        validation: The last validation: `mpjpe_absolute` and `mpjpe_relative` in millimetres, None
            without a pose; `poses` and `missing`. None if there was none yet.
        best: The error of the weights in `best.safetensors`, mm: the least of all validations, or
            that of the last where nothing may be chosen by 3D labels.
        checkpoint: What training goes on from.
        stopped: "SIGTERM" or "time" if it ended early, else None.
        seconds: How long this run took.
    """

    step: int
    losses: tuple[tuple[int, float], ...]
    validation: Mapping[str, Any] | None
    best: float | None
    checkpoint: Path
    stopped: Stopped | None
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """For machines."""
        return {
            "step": self.step,
            "loss": self.losses[-1][1] if self.losses else None,
            "validation": None if self.validation is None else dict(self.validation),
            "best": self.best,
            "checkpoint": str(self.checkpoint),
            "stopped": self.stopped,
            "seconds": round(self.seconds, 3),
        }

    def to_text(self) -> str:
        """One line."""
        parts = [f"{self.step} steps"]
        if self.losses:
            parts.append(f"loss {self.losses[-1][1]:.4g}")
        error = None if self.validation is None else _score(self.validation)
        if error is not None:
            parts.append(f"validation {error:.1f} mm")
        if self.best is not None:
            parts.append(f"best {self.best:.1f} mm")
        if self.stopped is not None:
            parts.append("stopped: " + ("time is up" if self.stopped == "time" else "SIGTERM"))
        return f"{', '.join(parts)}, {self.seconds:.0f} s; {self.checkpoint}"


def train(
    config: Config,
    output: str | os.PathLike[str],
    *,
    resume: bool = True,
    device: str | None = None,
    progress: bool | None = None,
    stop_after_seconds: float | None = None,
) -> TrainResult:
    """Trains a network, or goes on where its training stopped.

    Under `torchrun` or `accelerate launch` every process calls it with the same arguments. On
    SIGTERM the current step is finished, everything is saved, and the result says so.

    Args:
        config: Of the run.
        output: Folder for `last.safetensors` (what training goes on from), `best.safetensors`
            (the weights of the best validation; of the last one, where nothing may be chosen by 3D
            labels), `metrics.jsonl`, `config.yaml` and `tensorboard`.
        resume: Go on from `last.safetensors` if it is there; otherwise start anew, in its place.
        device: "cpu", "cuda" or "cuda:1"; None: a GPU if there is one.
        progress: Show a bar on standard error.
        stop_after_seconds: After so long, finish the step, validate, save and return. The schedule
            of the learning rates stays that of the whole run.

    Raises:
        CheckpointError: The folder has a checkpoint of another run, or a damaged one.
        TrainingError: The loss or its gradient is no number: the line names step and samples.
            Nothing of that step is kept.
        ImportError: A package of `tritool[train]` is not installed.
        OSError: A file cannot be written; the last checkpoint stays as it was.
        ValueError: Settings do not fit the data, the machine or each other.
    """
    if stop_after_seconds is not None and not stop_after_seconds > 0:
        raise ValueError(f"stop_after_seconds must be above 0, got {stop_after_seconds}")
    accelerator = make_accelerator(config.training.mixed_precision, device)
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    where = accelerator.device
    with contextlib.ExitStack() as stack:
        if accelerator.is_main_process:
            stack.enter_context(locked(folder))
        stack.enter_context(torch.random.fork_rng([where] if where.type == "cuda" else []))
        stack.enter_context(deterministic(config.training.deterministic))
        if where.type == "cpu":
            stack.enter_context(cores_left_to(config.training.workers))
        stopping = stack.enter_context(Stopping(stop_after_seconds))
        trainer = _Trainer(config, folder, accelerator, stopping, resume)
        stack.callback(trainer.close)
        return trainer.run(bool(progress))


def learning_rate_factor(schedule: Schedule, step: int, total: int) -> float:
    """What the learning rates are multiplied by at a step, counted from 0."""
    if step < schedule.warmup:
        return (step + 1) / schedule.warmup
    if schedule.kind == "step":
        return float(schedule.gamma ** sum(step >= at for at in schedule.milestones))
    if schedule.kind == "cosine":
        done = (step - schedule.warmup) / max(1, total - 1 - schedule.warmup)
        wave = (1 + math.cos(math.pi * min(done, 1))) / 2
        return schedule.final + (1 - schedule.final) * wave
    return 1.0


class _Trainer:
    """A run: what it has, and the steps."""

    def __init__(
        self, config: Config, folder: Path, accelerator: Any, stopping: Stopping, resume: bool
    ) -> None:
        self.config, self.folder, self.accelerator = config, folder, accelerator
        self.stopping = stopping
        self.settings = settings = config.training
        self.parts = accelerator.num_processes * settings.accumulate
        if settings.batch_size % self.parts:
            raise ValueError(
                f"training.batch_size must be a multiple of {self.parts}, processes times "
                f"accumulate, got {settings.batch_size}"
            )
        self.data: SizedSamples = config.data.dataset("train")
        self.total = settings.total_steps(len(self.data))
        self.order = Order(portions_of(self.data), settings.batch_size, settings.seed, self.parts)
        self._check_data()

        torch.manual_seed(settings.seed)
        self.task = build_task(config)
        self.last = folder / LAST
        continued = resume and self.last.exists()
        if not continued:
            self.task.start_weights()
        self.model = self.task.model.to(accelerator.device)
        if settings.channels_last:
            channels_last(self.model)
        self.optimizer = _optimizer(self.task)
        self.rates = {group["name"]: group["lr"] for group in self.optimizer.param_groups}
        self.ema: dict[str, Tensor] | None = None
        if settings.ema is not None:
            self.ema = {n: t.detach().clone() for n, t in self.model.state_dict().items()}

        self.step, self.validated = 0, 0
        self.best: float | None = None
        self.validation: dict[str, Any] | None = None
        # Sums of what the next line of the learning curve is the mean of.
        self.sums: dict[str, float] = {}
        self.summed = 0
        self.norm = math.nan
        scaler: dict[str, Any] | None = None
        if continued:
            scaler = self._load()
        self._wrap(scaler)
        self.metrics: Metrics | None = None
        self.board: Board | None = None
        if accelerator.is_main_process:
            self._start_files(continued)
        # Nobody writes before all have read.
        accelerator.wait_for_everyone()

    def _check_data(self) -> None:
        lengths = [portion.length for portion in portions_of(self.data)]
        firsts = [self.data[sum(lengths[:which])] for which in range(len(lengths))]
        joints = len(firsts[0].joint_names)
        cameras = max(len(first.cameras) for first in firsts)
        if joints != self.config.model.num_joints:
            raise ValueError(
                f"model.num_joints must be {joints} as in the data, "
                f"got {self.config.model.num_joints}"
            )
        views = self.settings.views
        if views is not None and views[1] > cameras:
            raise ValueError(
                f"training.views must be at most the {cameras} of the data, got {list(views)}"
            )

    def _wrap(self, scaler: Mapping[str, Any] | None) -> None:
        """Puts the loss and the optimizer into the hands of Accelerate."""
        module = self.task.loss_module()
        if self.settings.sync_batch_norm and self.accelerator.num_processes > 1:
            if self.accelerator.device.type != "cuda":
                raise ValueError("training.sync_batch_norm needs GPUs")
            convert: Any = nn.SyncBatchNorm.convert_sync_batchnorm
            module = convert(module)
        self.task.train_mode()
        self.loss = self.accelerator.prepare_model(module)
        self.stepper = self.accelerator.prepare_optimizer(self.optimizer)
        if scaler is not None and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(dict(scaler))

    def _start_files(self, continued: bool) -> None:
        for leaving in self.folder.glob(".*.part*"):
            leaving.unlink()  # what a killed run was writing
        if not continued:
            for name in (LAST, BEST):
                (self.folder / name).unlink(missing_ok=True)
        with written_aside(self.folder / "config.yaml") as aside:
            aside.write_text(write_yaml(self.config.to_dict()), encoding="utf-8")
        self.metrics = Metrics(self.folder / METRICS, self.step, self.validated)
        if self.settings.tensorboard:
            self.board = Board(self.folder / "tensorboard", self.step)

    # ---- The steps ----

    def run(self, progress: bool) -> TrainResult:
        """All steps that are left."""
        stopped: Stopped | None = None
        # A run that was told to end had no time for the validation that was due.
        if self.step > self.validated and self._validation_due():
            self._validate()
            self._save()
        batches = training_batches(
            self.data,
            self.order,
            range(self.step, self.total),
            parts=self.parts,
            own=self._own_parts(),
            views=self.settings.views,
            workers=self.settings.workers,
            pin_memory=self.accelerator.device.type == "cuda",
        )
        with contextlib.closing(batches), self._bar(progress) as bar:
            while self.step < self.total and stopped is None:
                stopped = self._step([next(batches) for _ in self._own_parts()])
                bar.update()
                if self.step == self.total:
                    stopped = None
                if self.step % self.settings.log_every == 0 or self.step == self.total:
                    bar.set_postfix(loss=f"{self.sums['loss'] / self.summed:.4g}", refresh=False)
                    self._log()
                # SIGTERM leaves little time: saving comes first, and validation when it goes on.
                if stopped != "SIGTERM" and (self._validation_due() or stopped == "time"):
                    self._validate()
                saving = self.step % self.settings.save_every == 0 or self.step == self.total
                if saving or stopped is not None:
                    self._save()
        return TrainResult(
            step=self.step,
            losses=self._curve(),
            validation=self.validation,
            best=self.best,
            checkpoint=self.last,
            stopped=stopped,
            seconds=self.stopping.seconds(),
        )

    def _own_parts(self) -> range:
        first = self.accelerator.process_index * self.settings.accumulate
        return range(first, first + self.settings.accumulate)

    def _step(self, batches: list[Batch]) -> Stopped | None:
        """One step; `batches` are this process's parts of its batch."""
        accelerator, device = self.accelerator, self.accelerator.device
        self.task.begin_step(self.step)
        factor = learning_rate_factor(self.settings.schedule, self.step, self.total)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rates[group["name"]] * factor
        # Losses are means over the joints of a part. Weighted by these, their sum over all parts is
        # the mean over the whole batch, however it is cut.
        counts = [self.task.counted(batch) for batch in batches]
        everything = sum(counts)
        if accelerator.num_processes > 1:
            mine = torch.tensor(float(everything), dtype=torch.float64)
            everything = int(accelerator.reduce(mine.to(device), "sum"))
        sums: dict[str, Tensor] = {}
        for at, (part, batch, count) in enumerate(
            zip(self._own_parts(), batches, counts, strict=True)
        ):
            share = count / max(1, everything)
            # Also PyTorch's own numbers: whatever a network draws without being asked.
            torch.manual_seed(seed_of(self.settings.seed, MODEL, self.step, part))
            # One seed for all parts: tasks draw for each sample, however the batch is cut.
            source = torch.Generator().manual_seed(seed_of(self.settings.seed, MODEL, self.step))
            final = at + 1 == len(batches)
            waiting = contextlib.nullcontext() if final else accelerator.no_sync(self.loss)
            with waiting:
                loss, terms = self.loss(batch.to(device, non_blocking=True), source)
                # Gradients are averaged over processes; these are to be added.
                accelerator.backward(loss * (share * accelerator.num_processes))
            for name, value in {"loss": loss.detach(), **terms}.items():
                sums[name] = sums.get(name, 0) + value.double() * share

        why = self.stopping.why()
        flags = [float(why == "SIGTERM"), float(why == "time")]
        numbers = torch.cat([torch.stack(list(sums.values())), torch.tensor(flags).to(device)])
        if accelerator.num_processes > 1:
            numbers = accelerator.reduce(numbers, "sum")
        clip = self.settings.gradient_clip
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        norm = accelerator.clip_grad_norm_(parameters, math.inf if clip is None else clip)
        *values, told, late, norm = torch.cat([numbers, norm.double()[None]]).tolist()
        means = dict(zip(sums, values, strict=True))
        self._check_finite(means, norm)
        self.stepper.step()
        self.stepper.zero_grad()
        self._average()
        self.step += 1
        self.norm = norm
        for name, value in means.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.summed += 1
        return "SIGTERM" if told else "time" if late else None

    def _check_finite(self, means: Mapping[str, float], norm: float) -> None:
        wrong = next((f"{n} is {v}" for n, v in means.items() if not math.isfinite(v)), None)
        # In float16 the gradient may overflow: that step is left out, with a smaller scale after.
        if wrong is None and not math.isfinite(norm) and self.accelerator.scaler is None:
            wrong = f"the norm of the gradient is {norm}"
        if wrong is None:
            return
        samples = ", ".join(map(str, self.order.samples(self.step)))
        raise TrainingError(
            f"step {self.step + 1}: {wrong}; samples of the batch: {samples}. "
            f"Nothing of this step is kept"
        )

    def _average(self) -> None:
        """Moves the averaged weights towards the current ones."""
        if self.ema is None:
            return
        # At the beginning quicker: the first weights are random.
        assert self.settings.ema is not None
        decay = min(self.settings.ema, (1 + self.step) / (10 + self.step))
        for name, value in self.model.state_dict().items():
            if value.is_floating_point():
                self.ema[name].lerp_(value, 1 - decay)
            else:
                self.ema[name].copy_(value)

    # ---- Telling ----

    def _log(self) -> None:
        if self.metrics is not None:
            means = {name: value / self.summed for name, value in self.sums.items()}
            # A float16 gradient may have been infinite, which JSON cannot say.
            if math.isfinite(self.norm):
                means["gradient_norm"] = self.norm
            rates = {group["name"]: group["lr"] for group in self.optimizer.param_groups}
            seconds = round(self.stopping.seconds(), 3)
            self.metrics.write({"step": self.step, **means, "lr": rates, "seconds": seconds})
            if self.board is not None:
                self.board.scalars("training", means, self.step)
                self.board.scalars("learning rate", rates, self.step)
        self.sums, self.summed = {}, 0

    def _curve(self) -> tuple[tuple[int, float], ...]:
        records = [] if self.metrics is None else self.metrics.records
        return tuple((record["step"], record["loss"]) for record in records if "loss" in record)

    def _bar(self, progress: bool) -> Any:
        import sys

        from tqdm import tqdm

        return tqdm(
            total=self.total,
            initial=self.step,
            unit=" steps",
            file=sys.stderr,
            disable=not (progress and self.accelerator.is_main_process),
        )

    def close(self) -> None:
        """Closes the files."""
        for file in (self.metrics, self.board):
            if file is not None:
                file.close()

    # ---- Validation ----

    def _validation_due(self) -> bool:
        return self.step % self.settings.validate_every == 0 or self.step == self.total

    def _validate(self) -> None:
        """Measures the network, and keeps it if it is the best yet."""
        with self._averaged():
            self.validation = self._measured()
            self.validated = self.step
            score = _score(self.validation)
            better = score is not None and (self.best is None or score < self.best)
            better = better or not self.task.keeps_best
            if better:
                self.best = score
            if self.metrics is None:
                return
            self.metrics.write({"step": self.step, "validation": self.validation})
            if self.board is not None:
                self.board.scalars("validation", self.validation, self.step)
            if better:
                notes = {"validation": self.validation}
                write_model(self.folder / BEST, self.model, self.config, self.step, notes=notes)

    def _measured(self) -> dict[str, Any]:
        """Errors over the samples of the validation part, shared among the processes."""
        data: SizedSamples = self.config.data.dataset("validation")
        count = len(data)
        if self.settings.validation_samples is not None:
            count = min(count, self.settings.validation_samples)
        own = list(range(self.accelerator.process_index, count, self.accelerator.num_processes))
        size = max(1, self.settings.batch_size // self.parts)
        device, pelvis = self.accelerator.device, self.config.model.pelvis
        names = self.task.measures
        sums = torch.zeros(5 + 2 * len(names), dtype=torch.float64, device=device)
        for start in range(0, len(own), size):
            here = collate([data[index] for index in own[start : start + size]])
            batch = here.to(device)
            prediction = self.task.predict(batch)
            found, true = prediction.keypoints_3d.double(), batch.keypoints_3d.double()
            absolute = mpjpe(found, true, reduction="pose")
            relative = mpjpe(found, true, root=pelvis, reduction="pose")
            missing = true.isfinite().all(-1) & ~found.isfinite().all(-1)
            for at, errors in ((0, absolute), (2, relative)):
                sums[at] += errors.nansum()
                sums[at + 1] += errors.isfinite().sum()
            sums[4] += missing.sum()
            if names:
                measured = self.task.measured(batch, prediction)
                sums[5:] += torch.stack([part for name in names for part in measured[name]])
            if self.board is not None and start < self.settings.pictures:
                self._draw(start, here, prediction)
        if self.accelerator.num_processes > 1:
            sums = self.accelerator.reduce(sums, "sum")
        absolute_sum, poses, relative_sum, relative_poses, missed, *more = sums.tolist()
        pairs = zip(names, more[::2], more[1::2], strict=True)
        return {
            "mpjpe_absolute": absolute_sum / poses if poses else None,
            "mpjpe_relative": relative_sum / relative_poses if relative_poses else None,
            "poses": int(poses),
            "missing": int(missed),
            **{name: total / count if count else None for name, total, count in pairs},
        }

    def _draw(self, start: int, batch: Batch, prediction: Any) -> None:
        assert self.board is not None
        points = None if prediction.keypoints_2d is None else prediction.keypoints_2d.cpu()
        pictures = picture_joints(batch, points, prediction.keypoints_3d.cpu())
        for at, picture in enumerate(pictures, start):
            if at < self.settings.pictures:
                self.board.picture(f"validation/{batch.indices[at - start]}", picture, self.step)

    @contextlib.contextmanager
    def _averaged(self) -> Iterator[None]:
        """Inside, the network has the averaged weights, if there are any."""
        if self.ema is None:
            yield
            return
        own = {name: value.clone() for name, value in self.model.state_dict().items()}
        self.model.load_state_dict(self.ema)
        try:
            yield
        finally:
            self.model.load_state_dict(own)

    # ---- Checkpoints ----

    def _save(self) -> None:
        if self.metrics is None:  # not the main process
            return
        self.metrics.sync()
        scaler = self.accelerator.scaler
        trainer = {
            "validated": self.validated,
            "validation": self.validation,
            "best": self.best,
            "sums": self.sums,
            "summed": self.summed,
            "scaler": None if scaler is None else scaler.state_dict(),
        }
        save_state(
            self.last,
            self.model,
            self.config,
            self.step,
            optimizer=self.optimizer,
            ema=self.ema,
            trainer=trainer,
        )

    def _load(self) -> dict[str, Any] | None:
        """Takes over where a run stopped; gives the state of float16's scale."""
        info = load_state(
            self.last, self.model, self.config, optimizer=self.optimizer, ema=self.ema
        )
        trainer = info["trainer"]
        self.step = info["step"]
        if self.step > self.total:
            raise ValueError(
                f"{self.last}: {self.step} steps are done, more than the {self.total} asked for"
            )
        self.validated, self.validation = trainer["validated"], trainer["validation"]
        self.best, self.sums, self.summed = trainer["best"], trainer["sums"], trainer["summed"]
        scaler: dict[str, Any] | None = trainer["scaler"]
        return scaler


# ---- Parts ----


def _score(validation: Mapping[str, Any]) -> float | None:
    """What the best is the least of, millimetres."""
    absolute = validation["mpjpe_absolute"]
    score: float | None = validation["mpjpe_relative"] if absolute is None else absolute
    return score


def _optimizer(task: Task) -> torch.optim.Optimizer:
    settings = task.config.training
    kind: Any = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[settings.optimizer]
    made: torch.optim.Optimizer = kind(task.parameter_groups(), weight_decay=settings.weight_decay)
    return made


def channels_last(model: nn.Module) -> None:
    """Lays out the weights of convolutions with the channels last; they stay the same tensors."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    for parameter in model.parameters():
        shape = parameter.shape
        # With fewer than 8 channels oneDNN 3.12 (PyTorch 2.13, CPU) writes where it must not in the
        # gradient of some layers; there is nothing to win with so few. Images have 3.
        if len(shape) in formats and shape[0] >= 8 and (shape[1] >= 8 or shape[1] == 3):
            parameter.data = parameter.data.contiguous(memory_format=formats[len(shape)])
