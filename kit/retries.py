"""A training that goes on from its last checkpoint by itself, after what going on can mend."""

from __future__ import annotations

import gc
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
Place = tuple[int, int]  # of a batch in the data, as a DataModule's `place_of` has it


class LostLoss(ValueError):
    """A loss that no step shall be made with, and the place of its batch."""

    def __init__(self, message: str, place: Place):
        super().__init__(message)
        self.place = place


class DeadWorker(RuntimeError):
    """A process of the loader died."""


@contextmanager
def noticing_dead_workers() -> Iterator[None]:
    """
    Raises:
        DeadWorker: in place of torch's error, which may come in the midst of a step; not where other devices would wait for
            this one in vain.
    """
    try:
        yield
    except (RuntimeError, OSError, EOFError) as error:
        if not _of_dead_worker(error) or (dist.is_initialized() and dist.get_world_size() > 1):
            raise
        raise DeadWorker(f"a process of the loader died: {error}") from error


def _of_dead_worker(error: Exception) -> bool:
    """Torch tells of it, or fails to fetch the tensors that the worker has announced."""
    frames = traceback.walk_tb(error.__traceback__)
    fetching = any(frame.f_globals.get("__name__") == "torch.multiprocessing.reductions" for frame, _ in frames)
    return str(error).startswith("DataLoader worker") if isinstance(error, RuntimeError) else fetching


def written(path: Path) -> int | None:
    """When, in nanoseconds; None where it does not exist."""
    return path.stat().st_mtime_ns if path.is_file() else None


def with_retries(train: Callable[[Path | None, list[Place]], T], resume: Path | None, last: Path, retries: int) -> T:
    """`train(resume, lost)`, and again when its loss is lost or a worker of the loader died: from `last`, if it wrote that.

    Args:
        train: of the checkpoint to go on from, and the places of batches that it shall leave out.
        last: the checkpoint that a training leaves on its way. retries: how many times.
    Raises:
        ValueError: if `retries` is below 0; else what `train` raises, once there is nothing to go on from or no retry left.
    """
    check_whole_number("retries", retries, 0)
    lost, before = [], written(last)
    for left in reversed(range(retries + 1)):
        try:
            return train(resume, lost)
        except (LostLoss, DeadWorker) as error:
            resume = last if written(last) != before else resume
            if resume is None or not left:
                raise
            lost = lost + [error.place] if isinstance(error, LostLoss) else lost
            way = "without that batch" if isinstance(error, LostLoss) else "with new processes"
            rank_zero_warn(f"{error}. Going on from {resume} {way}; {left - 1} retries left")
        gc.collect()  # the first training's model and optimizer, which hang in cycles
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    raise AssertionError("unreachable")
