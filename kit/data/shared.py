"""What the splits and stages of a training know of the same files: read once, and held once."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

Found = TypeVar("Found")

_found: ContextVar[dict[Hashable, object] | None] = ContextVar("found", default=None)


@contextmanager
def read_once() -> Iterator[None]:
    """While the block runs, `shared` makes each thing once.

    So all data sets that are built in it see the same files, even if some are added or removed meanwhile: two listings could
    hold out other files. Within another such block it is part of that.
    """
    if _found.get() is not None:
        yield
        return
    token = _found.set({})
    try:
        yield
    finally:
        _found.reset(token)


def shared(key: Hashable, make: Callable[[], Found]) -> Found:
    """Returns make(), or within a block of `read_once` what it returned there before for the same key: not to be changed."""
    if (found := _found.get()) is None:
        return make()
    if key not in found:
        found[key] = make()
    return found[key]
