"""Calls of a storage that may never answer."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from itertools import islice
from typing import TypeVar

T = TypeVar("T")

AT_ONCE = 64  # items of a sequence in a call: of small ones, a thread for each would take most of the time
HUNG = 16  # calls left hanging in a process at a time; with more the storage counts as gone

_hanging: set[threading.Thread] = set()


class StorageHangs(OSError):
    """Too many calls of a storage hang: what it holds is not unreadable, but out of reach."""


def call_within(seconds: float | None, function: Callable[[], T]) -> T:
    """Calls a function in a thread; None: in this one, without limit.

    A call that takes too long cannot be stopped. It is left to itself, in a thread that does not keep the process from
    ending, and counts as hanging until the storage answers or gives up.

    Raises:
        TimeoutError: if it takes longer than `seconds`. StorageHangs: if `HUNG` such calls hang already. Else as `function`.
    """
    if seconds is None:
        return function()
    _hanging.intersection_update(thread for thread in _hanging.copy() if thread.is_alive())  # in a forked process none is
    if len(_hanging) >= HUNG:
        raise StorageHangs(f"{HUNG} reads have not been answered, each for more than {seconds:g} s")
    answer: Future[T] = Future()

    def call():
        try:
            answer.set_result(function())
        except BaseException as error:
            answer.set_exception(error)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    try:
        return answer.result(seconds)
    except TimeoutError:
        if answer.done():  # the function's own
            raise
        _hanging.add(thread)
        raise TimeoutError(f"it took more than {seconds:g} s to fetch") from None


def each_within(seconds: float | None, items: Iterable[T]) -> Iterator[T]:
    """Yields items that come from a storage; each `AT_ONCE` of them may take `seconds`. Raises as `call_within`."""
    items = iter(items)
    while some := call_within(seconds, lambda: list(islice(items, AT_ONCE))):
        yield from some
