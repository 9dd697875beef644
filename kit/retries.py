"""A training that goes on from its last checkpoint by itself, after what going on can mend."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from lightning.pytorch.utilities import rank_zero_warn

T = TypeVar("T")
Place = tuple[int, int]  # of a batch in the data, as a DataModule's `place_of` has it


class LostLoss(ValueError):
    """A loss that no step shall be made with, and the place of its batch."""

    def __init__(self, message: str, place: Place):
        super().__init__(message)
        self.place = place


def is_dead_worker(error: BaseException) -> bool:
    """Whether a process of the loader died; torch may tell so in the midst of a step."""
    return isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker")


def written(path: Path) -> int | None:
    """When, in nanoseconds; None where it does not exist."""
    return path.stat().st_mtime_ns if path.is_file() else None


def with_retries(train: Callable[[Path | None, list[Place]], T], resume: Path | None, last: Path, retries: int) -> T:
    """`train(resume, lost)`; when its loss is lost or a worker of the loader died, again from `last`, once that is its own.

    Args:
        train: of the checkpoint to go on from, and the places of batches that it shall leave out.
        last: the checkpoint that a training leaves on its way. retries: how many times.
    Raises:
        what `train` raises, once there is nothing to go on from or no retry left.
    """
    lost, before = [], written(last)
    for left in reversed(range(retries + 1)):
        try:
            return train(resume, lost)
        except (LostLoss, RuntimeError) as error:
            if not (isinstance(error, LostLoss) or is_dead_worker(error)) or not left:
                raise
            if written(last) == (before if resume is None else None):
                raise
            lost = lost + [error.place] if isinstance(error, LostLoss) else lost
            way = "without that batch" if isinstance(error, LostLoss) else "with new processes"
            rank_zero_warn(f"{error}. Going on from {last} {way}; {left - 1} retries left")
        resume = last
    raise AssertionError("unreachable")
