"""Processes that enter something in turn, and what they say meanwhile."""

from __future__ import annotations

import multiprocessing
import os
import re
import time
import warnings

import pytest
from filelock import FileLock
from lightning_utilities.core.rank_zero import rank_zero_only

from kit.files import locked, sole_user


@pytest.mark.parametrize("rank", [0, 1])
def test_one_that_waits_for_another_says_so(tmp_path, monkeypatch, rank):
    """Of several of a training the first does. It goes on where the other is killed."""
    monkeypatch.setattr("kit.files.SILENCE", 0.05)
    monkeypatch.setattr(rank_zero_only, "rank", rank, raising=False)
    processes, path, told = multiprocessing.get_context("fork"), tmp_path / "a.lock", []
    held = processes.Event()

    def hold():
        with FileLock(path):
            held.set()
            time.sleep(1 if rank else 60)

    other = processes.Process(target=hold)
    other.start()
    assert held.wait(30)

    def tell(message, **_):
        told.append(message)
        other.kill()

    monkeypatch.setattr(warnings, "warn", tell)
    with locked(path):
        other.join(5)
    assert ["holds" in message and str(path) in message for message in told] == [True] * (rank == 0)
    with locked(path):
        pass


def test_a_lock_that_is_never_let_go_can_be_removed_as_the_message_says(tmp_path):
    """On a network disk the lock of a machine that crashed may stay."""
    with FileLock(tmp_path / ".lock"):
        with (
            pytest.raises(FileExistsError, match="wait for it, or give another name=.* remove ") as refused,
            sole_user(tmp_path),
        ):
            pass
        (path,) = re.findall(r"remove (\S+)$", str(refused.value))
        os.remove(path)
        with sole_user(tmp_path):
            with pytest.raises(FileExistsError), sole_user(tmp_path):
                pass
