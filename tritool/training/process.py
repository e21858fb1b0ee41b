# SPDX-License-Identifier: Apache-2.0
"""What a run needs of its process: device, signals, time, and a folder to itself."""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import gc
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch

__all__ = [
    "Stopped",
    "Stopping",
    "cores_left_to",
    "deterministic",
    "locked",
    "make_accelerator",
]

Stopped = Literal["SIGTERM", "time"]


def make_accelerator(precision: str, device: str | None) -> Any:
    """What places, distributes and scales: one for each process.

    Args:
        precision: "no", "bf16" or "fp16".
        device: "cpu", "cuda" or "cuda:1"; None: a GPU if there is one.

    Raises:
        ImportError: Accelerate is not installed.
        ValueError: There is no such device here, or it cannot compute so.
    """
    try:
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState
        from accelerate.utils import DistributedDataParallelKwargs
    except ImportError:
        raise ImportError("training needs accelerate; type: pip install 'tritool[train]'") from None
    wanted = None if device is None else torch.device(device)
    if wanted is not None and wanted.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be cpu or cuda, got {device}")
    gpu = torch.cuda.is_available() and (wanted is None or wanted.type == "cuda")
    if wanted is not None and wanted.type == "cuda":
        if not gpu:
            raise ValueError(f"device is {device}, but PyTorch finds no GPU here")
        if wanted.index is not None:
            torch.cuda.set_device(wanted)
    if precision == "fp16" and not gpu:
        raise ValueError("training.mixed_precision fp16 needs a GPU; on a CPU take bf16 or no")
    # It is one for the whole process, and would keep the device and precision of an earlier run.
    AcceleratorState._reset_state(reset_partial_state=True)
    # Not every network uses all its parameters in training.
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)
    joined_before = _in_a_group()
    accelerator = Accelerator(cpu=not gpu, mixed_precision=precision, kwargs_handlers=[unused])
    if _in_a_group() and not joined_before:
        atexit.register(_leave_group)
    return accelerator


def _in_a_group() -> bool:
    """Whether this process is one of several that compute together."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _leave_group() -> None:
    """Ends the threads that talk to the other processes, while Python can still free their tensors.

    Left to run, they may want to free one when the interpreter is shutting down; the process is
    then aborted, and a training that succeeded counts as failed. Not at the end of `train`: the
    group serves the next call too, and processes that joined once may not be able to again.
    """
    if _in_a_group():
        # Networks that wait for the garbage collector hold the group as well.
        gc.collect()
        torch.distributed.destroy_process_group()


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps a second run out of a folder.

    Raises:
        ValueError: Another run is in it.
    """
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{folder}: another run is writing there") from None
        yield


@contextlib.contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Inside, PyTorch uses algorithms that give the same bits each time, if that is wanted."""
    before = torch.are_deterministic_algorithms_enabled()
    if wanted:
        # cuBLAS wants to be told before it is first used.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


@contextlib.contextmanager
def cores_left_to(workers: int) -> Iterator[None]:
    """Inside, PyTorch computes with fewer threads, so that each worker has a core.

    Threads that share a core wait for each other in every layer, which costs far more than the
    thread that is given up.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, min(before, len(os.sched_getaffinity(0)) - workers)))
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Stopping:
    """Whether a run is to end early; inside, SIGTERM is noted instead of obeyed at once.

    Args:
        after_seconds: When the time is up; None: never.
    """

    def __init__(self, after_seconds: float | None) -> None:
        self.after_seconds = after_seconds
        self.start = time.monotonic()
        self._told = False
        self._before: Any = None

    def __enter__(self) -> Stopping:
        # Python lets only the main thread handle signals.
        self._main = threading.current_thread() is threading.main_thread()
        if self._main:
            self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        if self._main:
            # None: the handler was not set from Python, and cannot be from here.
            signal.signal(signal.SIGTERM, self._before or signal.SIG_DFL)

    def _note(self, *_: object) -> None:
        self._told = True

    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self.start

    def why(self) -> Stopped | None:
        """Why to stop now, if at all."""
        if self._told:
            return "SIGTERM"
        late = self.after_seconds is not None and self.seconds() >= self.after_seconds
        return "time" if late else None
