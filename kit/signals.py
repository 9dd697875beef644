"""How processes end: at once while nothing would be lost, and not later than the one that launched them."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

PR_SET_PDEATHSIG = 1  # of Linux's prctl


@contextmanager
def ended_at_once() -> Iterator[None]:
    """Lets SIGTERM end the process while the block runs, in place of Lightning's handler, which waits for a step's end."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def end_with_launcher():
    """Has a further process of a training end when the one that launched it does, which it would wait for; on Linux."""
    if "LOCAL_RANK" in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
