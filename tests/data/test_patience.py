"""Calls that may never return cost their time limit, and a storage that is gone ends the training."""

from __future__ import annotations

import os
import threading
import time

import pytest

from kit.data import patience
from kit.data.patience import HUNG, StorageHangs, call_within


def fails(error: Exception):
    raise error


def test_a_call_returns_and_raises_what_it_does_without_a_limit():
    for seconds in (None, 5):
        assert call_within(seconds, lambda: 7) == 7
        for error in (KeyError("gone"), TimeoutError("the storage's own")):
            with pytest.raises(type(error), match=error.args[0]):
                call_within(seconds, lambda: fails(error))


def test_calls_that_hang_are_left_alone_until_they_are_too_many():
    answers = threading.Event()
    try:
        began = time.monotonic()
        for _ in range(HUNG):
            with pytest.raises(TimeoutError, match="it took more than 0.02 s to fetch"):
                call_within(0.02, answers.wait)
        assert time.monotonic() - began < 5
        with pytest.raises(StorageHangs, match=f"{HUNG} reads have not been answered, each for more than 0.02 s"):
            call_within(0.02, lambda: 7)
        if (child := os.fork()) == 0:  # as a loader's worker, which has none of these threads
            os._exit(call_within(5, lambda: 7))
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    finally:
        answers.set()
    for thread in patience._hanging:
        thread.join(5)
    assert call_within(5, lambda: 7) == 7, "as soon as they are answered"
