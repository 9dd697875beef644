"""Checks plain values, as configs and checkpoints hold them, and builds objects from them."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from omegaconf import DictConfig

T = TypeVar("T")

SIZES = ("frames", "height", "width")  # of a clip


def plain(node: DictConfig) -> dict:
    """Converts a config node to plain values, resolved; checkpoints hold nothing else."""
    from omegaconf import OmegaConf

    return OmegaConf.to_container(node, resolve=True)


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


def as_word(key: str, value) -> str:
    """Writes a key and its value as a word of the command line; of numpy's numbers, which checks refuse, their class too."""
    of_numpy = f" ({type(value).__name__} of numpy)" if type(value).__module__ == "numpy" else ""
    return f"{key}={'null' if value is None else value}{of_numpy}"


def check_whole_number(key: str, value: int | None, least: int, optional: bool = False):
    """Checks that a value is a whole number of at least `least`, or None if `optional`.

    Raises:
        ValueError: if not, naming its key.
    """
    if not (value is None and optional) and (type(value) is not int or value < least):
        raise ValueError(f"{as_word(key, value)}; expected a whole number of {least} or more")


def check_positive(key: str, value: float | None, optional: bool = False):
    """Checks that a value is a finite number above 0, or None if `optional`. Raises ValueError, naming its key, if not."""
    if not (value is None and optional) and not (isinstance(value, int | float) and 0 < value < math.inf):
        raise ValueError(f"{as_word(key, value)}; expected a number above 0{', or null' if optional else ''}")


def check_number(key: str, value: float, least: float = -math.inf):
    """Checks that a value is a finite number of at least `least`. Raises ValueError, naming its key, if not."""
    if not isinstance(value, int | float) or not math.isfinite(value) or value < least:
        raise ValueError(f"{as_word(key, value)}; expected a number{f' of {least} or more' if math.isfinite(least) else ''}")


def check_share(key: str, value: float):
    """Checks that a value is a share or a probability. Raises ValueError, naming its key, unless it is from 0 to 1."""
    if not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ValueError(f"{as_word(key, value)}; expected a number from 0 to 1")


def clip_shape(values: object, where: str) -> dict:
    """Takes the shape of clips out of a file, which a stranger may have made: `frames`, `height`, `width` and `fps`.

    What builds the data for these takes `_target_` among its values for something to call, and `${...}` for a reference.

    Args:
        where: the file and key, used in error messages.
    Raises:
        ValueError: if one is missing or no number.
    """
    expected = f"expected {', '.join(SIZES)} and fps of clips"
    if not isinstance(values, Mapping):
        raise ValueError(f"{where} is a {type(values).__name__}; {expected}")
    if missing := [key for key in (*SIZES, "fps") if key not in values]:
        raise ValueError(f"{where} lacks {', '.join(missing)}; {expected}")
    for key in SIZES:
        check_whole_number(f"{where}: {key}", values[key], 1)
    check_positive(f"{where}: fps", values["fps"])
    return {key: values[key] for key in (*SIZES, "fps")}


def check_choice(key: str, value: str, choices: Iterable[str]):
    """Checks that a value is one of some names. Raises ValueError, naming its key and the choices, if not."""
    if value not in (choices := list(choices)):
        raise ValueError(f"{as_word(key, value)}; expected one of: {', '.join(choices)}")


def equal_parts(batch_size: int, at_once: int | None) -> int:
    """Returns the smallest number of equal parts of a batch that have at most `at_once` clips each; None: one part.

    Raises:
        ValueError: if `at_once` is below 1.
    """
    if at_once is None or not isinstance(batch_size, int) or batch_size < 1:  # it is reported where it is used
        return 1
    check_whole_number("at_once", at_once, 1)
    return next(parts for parts in range(1, batch_size + 1) if batch_size % parts == 0 and batch_size // parts <= at_once)


def hash_of(texts: Iterable[str], digits: int = 8) -> str:
    """Returns the first hex digits, of 64, of the SHA-256 of texts, such as names of files, in their order."""
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:digits]


def differences(a: dict, b: dict, prefix: str = "") -> list[str]:
    """Lists what differs between plain values, nested or not, as `key: this, that`.

    Ignores keys named `hash`, which only follow from the others.
    """
    found = []
    for key in sorted(set(a) | set(b)):
        this, that = a.get(key), b.get(key)
        if isinstance(this, dict) and isinstance(that, dict):
            found += differences(this, that, f"{prefix}{key}.")
        elif this != that and key != "hash":
            found.append(f"{prefix}{key}: {this}, {that}")
    return found
