"""How processes end: at once while nothing would be lost, and not later than the one that launched them."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

PR_SET_PDEATHSIG = 1  # of Linux's prctl
# what schedulers send before they take a machine away; the latter, where a job asks for it, would end a process at once
ENDS = [getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name)]


@contextmanager
def ended_at_once() -> Iterator[None]:
    """Lets SIGTERM end the process while the block runs, in place of Lightning's handler, which waits for a step's end."""
    with _on_sigterm(signal.SIG_DFL):
        yield


@contextmanager
def interrupted_by_sigterm() -> Iterator[None]:
    """Lets SIGTERM raise KeyboardInterrupt while the block runs, as Ctrl-C does."""
    with _on_sigterm(signal.default_int_handler):
        yield


@contextmanager
def _on_sigterm(handler: Callable | signal.Handlers) -> Iterator[None]:
    """Sets the handler of SIGTERM while the block runs, in the main thread; others cannot have one."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def end_with_launcher():
    """Makes a process of a training end with the one that launched it, for which it would else wait forever. On Linux.

    Lightning's launcher is the training's first process, without which no step can end: no signal is waited for. Others, such
    as torchrun, take no part in the training, and a process saves before it ends.
    """
    if "LOCAL_RANK" not in os.environ or sys.platform != "linux":
        return
    found = os.environ.keys()
    by_lightning = {"NODE_RANK", "MASTER_PORT"} <= found and not {"TORCHELASTIC_RUN_ID", "SLURM_PROCID"} & found
    if by_lightning and os.environ["LOCAL_RANK"] == "0":  # the first process itself, in a later training
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL if by_lightning else signal.SIGTERM)
