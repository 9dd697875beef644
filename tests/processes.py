"""Commands of kit in processes of their own, forked from the test's: they need not import torch and Lightning again, which
takes longer than what most of them do. Some tests start interpreters instead, as users do."""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hydra.core.global_hydra import GlobalHydra
from lightning.pytorch.utilities import rank_zero_only
from tqdm import tqdm

from kit.cli import main
from kit.signals import PR_SET_PDEATHSIG


class Command:
    """A command in a forked process, the first of a session; offers what tests use of `subprocess.Popen`.

    Args:
        words: of the command line. said: file for what it writes to stderr; stdout is dropped. environment: variables to set.
    """

    def __init__(self, words: list[str], said: Path, **environment: str):
        self.returncode: int | None = None
        sys.stdout.flush(), sys.stderr.flush()
        gc.collect()
        self.pid = os.fork()
        if self.pid == 0:
            self._run(words, said, environment)

    @staticmethod
    def _run(words: list[str], said: Path, environment: dict[str, str]):
        status = 1
        gc.freeze()  # what the test has left, such as a closed video, may wait at its end for threads that are not here
        try:
            if sys.platform == "linux":  # else one left behind would keep open what the runner of the tests reads
                ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            tqdm.set_lock(threading.RLock())  # that of the test is shared: if this is killed, it may stay taken forever
            os.setsid()
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
            sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False, buffering=1)
            for package in ("pytorch", "fabric"):  # their messages and warnings would go to pytest
                logging.getLogger(f"lightning.{package}").handlers = [logging.StreamHandler(sys.stderr)]
            warnings.showwarning = lambda *told, **_: sys.stderr.write(warnings.formatwarning(*told[:4]))
            signal.signal(signal.SIGINT, signal.default_int_handler)
            os.environ.update(environment)
            GlobalHydra.instance().clear()  # of a command that the test is in
            rank_zero_only.rank = int(environment.get("RANK", 0))
            status = main(words)
        except SystemExit as stop:
            status = stop.code if isinstance(stop.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(status)

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float = 120.0) -> int:
        end = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired("kit", timeout)
            time.sleep(0.005)
        return self.returncode

    def kill(self):
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)


def children(number: int) -> list[int]:
    """Returns the ids of the processes that a process has started."""
    return [int(child) for child in Path(f"/proc/{number}/task/{number}/children").read_text().split()]


def demo_part(said: Path, words: list[str]):
    """Runs a part of the demo as `kit.verbs.demo.run` does, forked. Args: said: file for what it writes to stderr."""
    assert words[0] == "kit" and Command(words[1:], said).wait() == 0, said.read_text()[-2000:]


@contextmanager
def group(words: list[str], processes: int, folder: Path) -> Iterator[list[Command]]:
    """Starts a command in several processes, which find each other as under torchrun; kills those that are left at the end.

    Args:
        folder: for what each writes to stderr, `said_0` and so on.
    """
    with socket.socket() as any_port:
        any_port.bind(("127.0.0.1", 0))
        port = str(any_port.getsockname()[1])
    sizes = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "GROUP_RANK": "0"}
    shared = {**sizes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "tests"}
    folder.mkdir(parents=True, exist_ok=True)
    ranks = [str(rank) for rank in range(processes)]
    commands = [Command(words, folder / f"said_{rank}", RANK=rank, LOCAL_RANK=rank, **shared) for rank in ranks]
    try:
        yield commands
    finally:
        for command in commands:
            command.kill()


def together(words: list[str], processes: int, folder: Path):
    """Runs a command in a `group` of processes; fails if one of them does."""

    def texts() -> str:
        return "\n".join(file.read_text()[-3000:] for file in sorted(folder.glob("said_*")))

    end = time.monotonic() + 120
    with group(words, processes, folder) as commands:
        while any(command.poll() is None for command in commands):
            assert time.monotonic() < end, texts()
            assert not any(command.returncode for command in commands), texts()
            time.sleep(0.01)
        assert not any(command.returncode for command in commands), texts()
