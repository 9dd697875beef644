"""Commands that tests run in forked processes do not hold up the tests."""

from __future__ import annotations

import os
import signal
import sys
import time

import psutil
import pytest
from tqdm import tqdm

from tests.processes import Command


def test_one_that_is_killed_while_it_draws_a_bar_holds_up_no_other(monkeypatch, tmp_path):
    shared = tqdm.get_lock()

    def die(_):
        with tqdm.get_lock():
            os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr("tests.processes.main", die)
    assert Command([], tmp_path / "said").wait() == -signal.SIGKILL
    assert all(lock.acquire(timeout=5) for lock in shared.locks)
    shared.release()


@pytest.mark.skipif(sys.platform != "linux", reason="a process is told of its parent's end by Linux only")
def test_one_ends_with_the_process_that_started_it(monkeypatch, tmp_path):
    """That may be ended from outside, as pytest ends one whose test hangs."""
    monkeypatch.setattr("tests.processes.main", lambda _: time.sleep(20) or 0)
    if (starter := os.fork()) == 0:
        (tmp_path / "number").write_text(str(Command([], tmp_path / "said").pid))
        while not (tmp_path / "said").exists():
            time.sleep(0.01)
        os._exit(0)
    os.waitpid(starter, 0)
    number, end = int((tmp_path / "number").read_text()), time.monotonic() + 10
    while psutil.pid_exists(number) and psutil.Process(number).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < end
        time.sleep(0.01)
