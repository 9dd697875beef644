"""Restarts a training from its last checkpoint after errors that a restart can fix."""

from __future__ import annotations

import gc
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from lightning.pytorch.utilities import rank_zero_warn

from kit.values import check_whole_number

T = TypeVar("T")
LONG = 3600  # seconds after which a failure counts as the first
BatchPosition = tuple[int, int]  # of a batch in the data, as a DataModule's `position_of` returns it


class LostLoss(ValueError):
    """The loss of a batch must not be used for a step. Holds the batch's position in the data."""

    def __init__(self, message: str, position: BatchPosition):
        super().__init__(message)
        self.position = position


class DeadWorker(RuntimeError):
    """A worker process of the data loader died.

    Torch notices it with the signal that the system sends at a child's death (SIGCHLD), at once or as soon as the main thread
    runs Python again; should that be lost, within 5 seconds of waiting for a batch (its MP_STATUS_CHECK_INTERVAL).
    """


@contextmanager
def noticing_dead_workers() -> Iterator[None]:
    """Converts torch's error about a dead loader worker, which may come in the middle of a step, to a `DeadWorker`.

    With several devices torch's error is raised as it is: the others would wait for this one in vain.

    Raises:
        DeadWorker: if a worker process of the data loader died.
    """
    try:
        yield
    except Exception as error:  # of any kind: where torch's comes, others may take it and raise their own
        if not any(map(of_dead_worker, _with_causes(error))) or (dist.is_initialized() and dist.get_world_size() > 1):
            raise
        raise DeadWorker(f"a process of the loader died: {error}") from error


def _with_causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yields an error and those that it was raised from, or while they were handled."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def of_dead_worker(error: BaseException) -> bool:
    """Returns whether an error is of a dead worker: torch says so, or failed to fetch tensors that it had announced."""
    if isinstance(error, RuntimeError):
        return str(error).startswith("DataLoader worker")
    frames = traceback.walk_tb(error.__traceback__)
    fetching = any(frame.f_globals.get("__name__") == "torch.multiprocessing.reductions" for frame, _ in frames)
    return fetching and isinstance(error, OSError | EOFError)


def written(path: Path) -> int | None:
    """Returns when a file was written, in nanoseconds; None if it does not exist."""
    return path.stat().st_mtime_ns if path.is_file() else None


def with_retries(train: Callable[[Path | None, list[BatchPosition]], T], resume: Path | None, last: Path, retries: int) -> T:
    """Runs `train(resume, lost)`, and again after a lost loss or a dead loader worker: from `last` if a run wrote it, else
    from `resume`.

    Args:
        train: takes the checkpoint to resume from, and the positions of batches to leave out.
        last: the checkpoint that a training writes as it runs.
        retries: maximum number of further runs, one after another: after a run of `LONG` seconds, which wrote `last`, as many
            may follow again.
    Raises:
        ValueError: if `retries` is below 0; else what `train` raises if there is no checkpoint to resume from, or no retry
            left.
    """
    check_whole_number("retries", retries, 0)
    lost, left, before = [], retries, written(last)
    while True:
        began, at_start = time.monotonic(), written(last)
        try:
            return train(resume, lost)
        except (LostLoss, DeadWorker) as error:
            resume = last if written(last) not in (None, before) else resume
            if time.monotonic() - began > LONG and written(last) != at_start:
                left = retries
            if resume is None or not left:
                raise
            left -= 1
            lost = lost + [error.position] if isinstance(error, LostLoss) else lost
            way = "without that batch" if isinstance(error, LostLoss) else "with new processes"
            rank_zero_warn(f"{error}. Resuming from {resume} {way}; {left} retries left")
        gc.collect()  # frees the failed run's model and optimizer, which are in reference cycles
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
