"""How the processes of a training's loader end: when the training does, whatever it ends with."""

from __future__ import annotations

import atexit
import multiprocessing.util  # first: what it does at exit, to wait for processes, is then done after `end_workers`
import signal

from kit.signals import ENDS


def leave_signals_to_the_trainer(worker: int):
    """Makes a loader's worker ignore what schedulers send to all processes of a job, and Ctrl-C.

    A worker that ended would stop the training with an error before the trainer has saved.
    """
    for number in (*ENDS, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


@atexit.register
def end_workers():
    """Kills loader workers that an error has left behind, at exit.

    They ignore signals, so this process would wait for them without end.
    """
    if workers := [process for process in multiprocessing.active_children() if process.daemon]:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would report each of them
        for process in workers:
            process.kill()
