"""Builds objects from plain values, as configs and checkpoints hold them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import TypeVar

T = TypeVar("T")


def from_values(by: type[T], values: Mapping, what: str, /, **besides) -> T:
    """Builds a dataclass from plain values.

    Args:
        by: the dataclass. what: name used in error messages. besides: fields set by the caller.
    Raises:
        ValueError: for an unknown key; else as the class.
    """
    known = {f.name for f in fields(by)} - set(besides)
    if unknown := sorted(set(values) - known):
        raise ValueError(f"{what} has no {', '.join(unknown)}; its keys are {', '.join(sorted(known))}")
    return by(**values, **besides)


def check_whole_number(key: str, value: int | None, least: int, optional: bool = False):
    """Checks that a value is a whole number of at least `least`, or None if `optional`.

    Raises:
        ValueError: if not, naming its key.
    """
    if not (value is None and optional) and (type(value) is not int or value < least):
        raise ValueError(f"{key}={value}; expected a whole number of {least} or more")


def equal_parts(batch_size: int, at_once: int | None) -> int:
    """Returns the smallest number of equal parts of a batch that have at most `at_once` clips each; None: one part.

    Raises:
        ValueError: if `at_once` is below 1.
    """
    if at_once is None or not isinstance(batch_size, int) or batch_size < 1:  # it is reported where it is used
        return 1
    check_whole_number("at_once", at_once, 1)
    return next(parts for parts in range(1, batch_size + 1) if batch_size % parts == 0 and batch_size // parts <= at_once)


def part_of(batch_size: int, at_once: int | None) -> int:
    """Returns the number of clips in each of the `equal_parts` of a batch."""
    parts = equal_parts(batch_size, at_once)
    return batch_size if parts == 1 else batch_size // parts


def batches_of(batch_size: int, at_once: int | None, accumulate: int) -> int:
    """Returns the number of `equal_parts` in `accumulate` batches."""
    return accumulate * equal_parts(batch_size, at_once)


def differences(a: dict, b: dict, prefix: str = "") -> list[str]:
    """Lists what differs between plain values, nested or not, as `key: this, that`.

    Ignores keys named `hash`, which only follow from the others.
    """
    told = []
    for key in sorted(set(a) | set(b)):
        this, that = a.get(key), b.get(key)
        if isinstance(this, dict) and isinstance(that, dict):
            told += differences(this, that, f"{prefix}{key}.")
        elif this != that and key != "hash":
            told.append(f"{prefix}{key}: {this}, {that}")
    return told
