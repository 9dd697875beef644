"""Plain values, as configs and checkpoints hold them, to what they describe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import TypeVar

T = TypeVar("T")


def from_values(by: type[T], values: Mapping, what: str, /, **besides) -> T:
    """A dataclass of plain values.

    Args:
        what: they are called. besides: values of the class that are not among them.
    Raises:
        ValueError: for a key that it has not; else as the class.
    """
    known = {f.name for f in fields(by)} - set(besides)
    if unknown := sorted(set(values) - known):
        raise ValueError(f"{what} has no {', '.join(unknown)}; its keys are {', '.join(sorted(known))}")
    return by(**values, **besides)


def equal_parts(batch_size: int, at_once: int | None) -> int:
    """The fewest equal parts of a batch that have `at_once` clips at most; None: it is whole.

    Raises:
        ValueError: if `at_once` is below 1.
    """
    if at_once is None or not isinstance(batch_size, int) or batch_size < 1:  # which is told of where it is used
        return 1
    if not isinstance(at_once, int) or at_once < 1:
        raise ValueError(f"at_once={at_once}; expected a number of clips, 1 or more, or null: all")
    return next(parts for parts in range(1, batch_size + 1) if batch_size % parts == 0 and batch_size // parts <= at_once)


def part_of(batch_size: int, at_once: int | None) -> int:
    """Clips of such a part."""
    parts = equal_parts(batch_size, at_once)
    return batch_size if parts == 1 else batch_size // parts


def batches_of(batch_size: int, at_once: int | None, accumulate: int) -> int:
    """How many such parts `accumulate` batches have."""
    return accumulate * equal_parts(batch_size, at_once)
