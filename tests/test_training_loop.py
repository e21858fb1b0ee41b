# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import errno
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from training_runs import hide_joints, same, tensors, tiny, tiny_values

from tritool.data import Portion
from tritool.training import ConfigError, loop, state, train
from tritool.training.config import Config
from tritool.training.loop import TrainingError, channels_last, learning_rate_factor
from tritool.training.sampling import Order
from tritool.training.sections import Schedule
from tritool.training.state import CheckpointError, read_model

# The last argument says what happens in the process.
SCRIPT = """
import os, signal, sys
import torch
torch.set_num_threads(1)
from tritool.training import load_config, loop, state, train

def kill():
    os.kill(os.getpid(), signal.SIGKILL)

what, calls = sys.argv[3], [0]
if what == "killed while writing":
    def half(tensors, path, metadata, save=state._save_file):
        calls[0] += 1
        save(tensors, path, metadata)
        if path.name.startswith(".last.") and calls[0] >= 2:
            os.truncate(path, path.stat().st_size // 2)
            kill()
    state._save_file = half
if what == "killed in a step":
    def step(self, batches, step=loop._Trainer._step):
        calls[0] += 1
        if calls[0] == 2:
            self.accelerator.backward(self.loss(batches[0])[0])
            kill()
        return step(self, batches)
    loop._Trainer._step = step
if what == "joints missing":
    import atexit
    import torch.distributed
    from training_runs import hide_joints
    hide_joints()
    # Runs after what `train` registers. Threads of a group that is left when Python shuts down
    # may abort the process, now and then.
    atexit.register(lambda: print("in a group:", torch.distributed.is_initialized()))
result = train(load_config(sys.argv[1]), sys.argv[2], device="cpu")
print(result.step, result.stopped)
"""


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in lines(folder) if "loss" in line]


def in_processes(
    folder: Path, config: Config, what: str, *launcher: str
) -> subprocess.CompletedProcess[str]:
    """Trains outside of this process."""
    folder.mkdir(parents=True, exist_ok=True)
    source, script = folder / "source.yaml", folder / "script.py"
    source.write_text(yaml.safe_dump(config.to_dict()))
    script.write_text(SCRIPT)
    return subprocess.run(
        [sys.executable, *launcher, str(script), str(source), str(folder), what],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent)},
    )


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ---- A run ----


def test_what_a_run_leaves(tmp_path: Path) -> None:
    config = tiny(
        steps=4,
        validate_every=2,
        log_every=2,
        tensorboard=True,
        pictures=1,
        ema=0.5,
        schedule={"kind": "cosine", "warmup": 2},
        gradient_clip=10.0,
    )
    before = torch.random.get_rng_state()
    handler = signal.getsignal(signal.SIGTERM)
    result = train(config, tmp_path, device="cpu")
    assert torch.equal(torch.random.get_rng_state(), before)
    assert signal.getsignal(signal.SIGTERM) is handler

    assert (result.step, result.stopped) == (4, None)
    written = lines(tmp_path)
    assert [sorted(line) for line in written] == [
        ["gradient_norm", "heatmaps", "loss", "lr", "position", "seconds", "step"],
        ["step", "validation"],
    ] * 2
    assert [line["step"] for line in written] == [2, 2, 4, 4]
    assert [step for step, _ in result.losses] == [2, 4]
    total = written[0]["position"] + written[0]["heatmaps"]
    assert total == pytest.approx(written[0]["loss"], rel=1e-6)
    # The second step ends the warm-up, the fourth is the last of the cosine.
    assert written[0]["lr"] == {"backbone": 1e-3, "head": 1e-3}
    assert written[2]["lr"]["head"] == pytest.approx(0, abs=1e-12)
    validation = written[3]["validation"]
    assert validation == result.validation
    assert (validation["poses"], validation["missing"]) == (2, 0)
    assert result.best == min(
        written[1]["validation"]["mpjpe_absolute"], validation["mpjpe_absolute"]
    )

    names = sorted(path.name for path in tmp_path.iterdir() if not path.name.startswith("."))
    assert names == [
        "best.safetensors", "config.yaml", "last.safetensors", "metrics.jsonl", "tensorboard",
    ]  # fmt: skip
    assert Config.from_dict(yaml.safe_load((tmp_path / "config.yaml").read_text())) == config
    assert json.loads(json.dumps(result.to_json()))["step"] == 4
    assert "4 steps" in result.to_text()
    # What is validated and kept as best is the averaged network.
    averaged, info = read_model(tmp_path / "last.safetensors")
    assert info["step"] == 4
    own = tensors(tmp_path / "last.safetensors")
    assert not torch.equal(averaged["backbone.conv1.weight"], own["model.backbone.conv1.weight"])

    # Again: nothing is left to do, and nothing changes.
    again = train(config, tmp_path, device="cpu")
    assert again.losses == result.losses
    assert lines(tmp_path) == written


def test_it_learns(tmp_path: Path) -> None:
    config = tiny(steps=25, batch_size=5, learning_rate=3e-3, save_every=100)
    result = train(config, tmp_path, device="cpu")
    first = sum(loss for _, loss in result.losses[:5])
    last = sum(loss for _, loss in result.losses[-5:])
    assert last < 0.8 * first


@pytest.mark.parametrize(
    "training",
    [
        {"ema": 0.9, "views": [1, 2], "accumulate": 2, "freeze_batch_norm": True},
        {"learning_rate": {"backbone": 0, "head": 1e-3}, "optimizer": "adamw", "workers": 1},
    ],
)
def test_a_stopped_run_goes_on_to_the_same_bits(tmp_path: Path, training: dict[str, Any]) -> None:
    whole = tiny(steps=5, validate_every=2, log_every=2, **training)
    train(whole, tmp_path / "whole", device="cpu")
    part = tmp_path / "part"
    # Stops after each step, and where a line of the learning curve is half gathered.
    stops = [train(whole, part, device="cpu", stop_after_seconds=1e-9).stopped for _ in range(5)]
    assert stops == ["time"] * 4 + [None]
    assert same(tmp_path / "whole" / "last.safetensors", part / "last.safetensors")
    assert losses(tmp_path / "whole") == losses(part)
    if "learning_rate" in training:
        # Frozen: weights and statistics of batch norm stay.
        first, last = (tensors(tmp_path / "whole" / f"{n}.safetensors") for n in ("best", "last"))
        trunk = [n for n in first if "backbone.layer" in n or "bn1" in n]
        assert trunk
        assert all(torch.equal(first[n], last[n]) for n in trunk)


def test_a_killed_run_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    config = tiny(steps=5, save_every=1, validate_every=2)
    killed, last = tmp_path / "killed", tmp_path / "killed" / "last.safetensors"
    # First while the second checkpoint is being written, then in the middle of the third step.
    for what, done in (("killed while writing", 1), ("killed in a step", 2)):
        process = in_processes(killed, config, what)
        assert process.returncode == -signal.SIGKILL, process.stderr
        assert read_model(last)[1]["step"] == done
        with (killed / "metrics.jsonl").open("a") as file:
            file.write('{"step": 4, "loss": 1.0}\n{"step": 5, "lo')
    train(config, killed, device="cpu")
    train(config, tmp_path / "whole", device="cpu")
    for name in ("last.safetensors", "best.safetensors"):
        assert same(tmp_path / "whole" / name, killed / name)
    assert losses(tmp_path / "whole") == losses(killed)
    told = [line for line in lines(killed) if "validation" in line]
    assert told == [line for line in lines(tmp_path / "whole") if "validation" in line]
    assert not list(killed.glob("*.part*"))
    assert not list(killed.glob(".*.part*"))


def test_sigterm_saves_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny(steps=5, save_every=100, validate_every=2)
    step = loop._Trainer._step

    def told(self: Any, batches: Any) -> Any:
        if self.step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, batches)

    with monkeypatch.context() as patch:
        patch.setattr(loop._Trainer, "_step", told)
        result = train(config, tmp_path / "told", device="cpu")
    # The step is finished; the validation that is due comes when the run goes on.
    assert (result.step, result.stopped, result.validation) == (2, "SIGTERM", None)
    assert read_model(result.checkpoint)[1]["step"] == 2
    train(config, tmp_path / "told", device="cpu")
    train(config, tmp_path / "whole", device="cpu")
    for name in ("last.safetensors", "best.safetensors"):
        assert same(tmp_path / "whole" / name, tmp_path / "told" / name)
    steps = [line["step"] for line in lines(tmp_path / "told") if "validation" in line]
    assert steps == [2, 4, 5]


# ---- Several processes and parts ----


def test_cut_batches_do_as_whole_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By two processes, and by one in two parts; the parts have unequal numbers of joints."""
    values = tiny_values(
        steps=3, batch_size=4, freeze_batch_norm=True, validate_every=3, learning_rate=1e-4
    )
    values["loss"]["heatmap_weight"] = 0.0
    config = Config.from_dict(values)
    values["training"]["accumulate"] = 2
    in_parts = Config.from_dict(values)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    launcher = ("-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={port}")
    process = in_processes(tmp_path / "two", config, "joints missing", *launcher)
    assert process.returncode == 0, process.stderr
    told = sorted(process.stdout.splitlines())
    assert told == ["3 None"] * 2 + ["in a group: False"] * 2

    hide_joints(monkeypatch)
    train(config, tmp_path / "one", device="cpu")
    train(in_parts, tmp_path / "parts", device="cpu")
    for name in ("two", "parts"):
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
        one, other = (lines(tmp_path / each)[-1]["validation"] for each in ("one", name))
        assert other == pytest.approx(one, rel=1e-4)
    # Were the parts weighted alike, it would show.
    first = lines(tmp_path / "one")[0]["gradient_norm"]
    for name in ("two", "parts"):
        assert lines(tmp_path / name)[0]["gradient_norm"] == pytest.approx(first, rel=1e-3)


# ---- What goes wrong ----


def poisoned(monkeypatch: pytest.MonkeyPatch, step: int, gradient: bool = False) -> None:
    """From a step on the loss, or its gradient alone, is NaN."""
    from tritool.training.tasks import AlgebraicTask

    loss = AlgebraicTask.loss
    calls = [0]

    def wrong(self: Any, *arguments: Any) -> Any:
        calls[0] += 1
        total, terms = loss(self, *arguments)
        if calls[0] < step:
            return total, terms
        if gradient:
            total.register_hook(lambda grad: grad * torch.nan)
            return total, terms
        return total * torch.nan, terms

    monkeypatch.setattr(AlgebraicTask, "loss", wrong)


@pytest.mark.parametrize("gradient", [False, True])
def test_no_number_stops_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gradient: bool
) -> None:
    config = tiny(steps=6, save_every=2)
    poisoned(monkeypatch, 4, gradient)
    with pytest.raises(TrainingError) as caught:
        train(config, tmp_path, device="cpu")
    samples = ", ".join(map(str, Order([Portion(5)], 2, 0).samples(3)))
    assert str(caught.value).startswith("step 4: ")
    assert ("gradient" if gradient else "loss is nan") in str(caught.value)
    assert f"samples of the batch: {samples}." in str(caught.value)
    weights, info = read_model(tmp_path / "last.safetensors")
    assert info["step"] == 2
    assert all(weight.isfinite().all() for weight in weights.values())


def test_a_full_disk_stops_training_and_leaves_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = state._save_file
    calls = [0]

    def full(*arguments: Any) -> None:
        calls[0] += 1
        if calls[0] > 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(*arguments)

    config = tiny(steps=4, save_every=2)
    with monkeypatch.context() as patch:
        patch.setattr(state, "_save_file", full)
        with pytest.raises(OSError, match="No space left"):
            train(config, tmp_path / "run", device="cpu")
    assert read_model(tmp_path / "run" / "last.safetensors")[1]["step"] == 2
    train(config, tmp_path / "run", device="cpu")
    train(config, tmp_path / "whole", device="cpu")
    last = "last.safetensors"
    assert same(tmp_path / "run" / last, tmp_path / "whole" / last)


def test_folders_of_other_runs(tmp_path: Path) -> None:
    train(tiny(steps=2), tmp_path, device="cpu")
    before = (tmp_path / "last.safetensors").read_bytes()
    with pytest.raises(CheckpointError, match=r"training\.batch_size is 2, here 1"):
        train(tiny(steps=2, batch_size=1), tmp_path, device="cpu")
    with pytest.raises(ValueError, match="2 steps are done, more than the 1 asked for"):
        train(tiny(steps=1), tmp_path, device="cpu")
    with loop.locked(tmp_path), pytest.raises(ValueError, match="another run"):
        train(tiny(steps=2), tmp_path, device="cpu")
    assert (tmp_path / "last.safetensors").read_bytes() == before
    result = train(tiny(steps=1, batch_size=1), tmp_path, device="cpu", resume=False)
    assert result.step == 1
    assert [line["step"] for line in lines(tmp_path)] == [1, 1]


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ({"views": [1, 3]}, r"training.views must be at most the 2 of the data, got \[1, 3\]"),
        ({"mixed_precision": "fp16"}, "needs a GPU"),
    ],
)
def test_settings_that_do_not_fit(tmp_path: Path, training: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train(tiny(**training), tmp_path, device="cpu")


def test_devices_and_joints_that_there_are_not(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="device must be cpu or cuda, got meta"):
        train(tiny(), tmp_path, device="meta")
    with pytest.raises(ValueError, match="stop_after_seconds must be above 0"):
        train(tiny(), tmp_path, device="cpu", stop_after_seconds=0)
    values = tiny_values()
    values["model"]["num_joints"] = 5
    with pytest.raises(ValueError, match=r"model\.num_joints must be 17 as in the data, got 5"):
        train(Config.from_dict(values), tmp_path, device="cpu")
    assert issubclass(ConfigError, ValueError)


# ---- Parts ----


def test_every_epoch_has_every_sample_once_in_another_order() -> None:
    order = Order([Portion(10)], 4, seed=3)
    seen = [sample for step in range(5) for sample in order.samples(step)]
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert seen[:10] != seen[10:]
    # From any step, without those before.
    assert Order([Portion(10)], 4, seed=3).samples(3) == seen[12:16]
    assert Order([Portion(10)], 4, seed=4).samples(0) != seen[:4]


def test_schedules() -> None:
    def factors(schedule: Schedule) -> list[float]:
        return [learning_rate_factor(schedule, step, 6) for step in range(6)]

    assert factors(Schedule()) == [1] * 6
    assert factors(Schedule(warmup=4)) == [0.25, 0.5, 0.75, 1, 1, 1]
    stepped = factors(Schedule(kind="step", milestones=(2, 4)))
    assert stepped == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])
    waved = factors(Schedule(kind="cosine", final=0.5))
    assert waved[0] == 1
    assert waved[-1] == pytest.approx(0.5)
    assert waved == sorted(waved, reverse=True)


def test_channels_last_is_the_same_network() -> None:
    from tritool.models import V2V

    torch.manual_seed(0)
    model = V2V(8, 3, width=8).eval()
    x = torch.randn(1, 8, 32, 32, 32)
    expected = model(x)
    parameters = list(model.parameters())
    channels_last(model)
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert any(
        p.dim() == 5 and p.is_contiguous(memory_format=torch.channels_last_3d) for p in parameters
    )
    torch.testing.assert_close(model(x), expected, rtol=1e-3, atol=1e-4)
