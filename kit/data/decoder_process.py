"""Decoding in a process of its own: a file that hangs or crashes the decoder costs its clip, not the training."""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from kit.data import decode
from kit.data.decode import Decoder, UnreadableVideo

START, TRIES = 60.0, 3  # seconds that the process may take to start, and how often it is started
PAUSE = 60  # seconds between two pieces of an answer


class DecoderProcess:
    """A process that decodes videos on request.

    It starts with the first request, starts again after it died or was killed, and ends with this process. A process forked
    from this one gets a decoder process of its own.
    """

    def __init__(self):
        self._process, self._connection, self._owner = None, None, None
        self._answering = False  # whether a request has not been answered to its end

    def ask(self, path: Path, backend: str, numbers: list[int] | None, patience: float) -> Iterator:
        """Sends a request to `decode.serve`, and yields what it finds: frames, as `Decoder.pieces`, or the length and rate.

        Raises:
            UnreadableVideo: if the file is unreadable, kills the process, or has to be waited for longer than `patience`
                seconds.
            IndexError, ImportError: as `decode.open_video` and `Decoder.walk`. RuntimeError: if the process does not start.
        """
        if self._answering:  # a walk that was broken off, as by Ctrl-C in a notebook, which keeps hold of it
            self.stop()
        if self._owner != os.getpid():
            self._start()
        connection, self._answering = self._connection, True
        try:
            connection.send((path, backend, numbers, patience + 5))  # its own limit, should this process die
            waited = 0.0
            while True:
                begin = time.monotonic()
                if not connection.poll(patience - waited):
                    raise TimeoutError
                kind, found = connection.recv()
                waited += time.monotonic() - begin
                if kind != "found":
                    break
                yield found
        except (OSError, EOFError) as error:
            late = isinstance(error, TimeoutError | BlockingIOError)  # the latter: it halted amid its answer
            reason = f"it took more than {patience:g} s" if late else "the decoder died of it"
            self._stop_answering(connection)
            other = "; data.source.backend=pyav may read it" if backend == "decord" else ""
            raise UnreadableVideo(path, reason + other) from error
        except BaseException:  # Ctrl-C, or nobody wants the rest: a late answer must not pass for that of the next request
            self._stop_answering(connection)
            raise
        self._answering = False
        match kind:
            case "unreadable":
                raise UnreadableVideo(path, found)
            case "error":
                raise found
        yield found

    def _start(self):
        """Starts the process, more than once if it does not come: a busy machine, or Python on a network disk, may be slow.

        Raises:
            RuntimeError: if it does not come.
        """
        words = [sys.executable, "-P", decode.__file__]
        if not any(self._comes(words) for _ in range(TRIES)):
            raise RuntimeError(f"no process that decodes ({' '.join(words)}); data.source.patience=null does without")

    def _comes(self, words: list[str]) -> bool:
        ours, theirs = socket.socketpair()
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", PAUSE, 0))  # a C timeval; of `recv` alone
        with theirs:
            number = theirs.fileno()
            self._process = subprocess.Popen(
                [*words, str(number)], pass_fds=[number], stdin=subprocess.DEVNULL, start_new_session=True
            )
        self._connection, self._owner = Connection(ours.detach()), os.getpid()
        try:
            ready = self._connection.poll(START) and self._connection.recv() == "ready"
        except (EOFError, OSError):
            ready = False
        if not ready:
            self.stop()
        return ready

    def _stop_answering(self, connection: Connection):
        """Kills the process at the other end of a connection, unless another has taken its place."""
        if connection is self._connection:
            self.stop()

    def stop(self):
        """Kills the process."""
        self._answering = False
        if self._owner == os.getpid():
            self._connection.close()
            self._process.kill()
            with suppress(subprocess.TimeoutExpired):  # it may hang in the kernel, on a network disk
                self._process.wait(timeout=5)
        self._owner = None


class RemoteVideo(Decoder):
    """A video file that another process decodes; a walk is to be ended before the next begins."""

    def __init__(self, path: Path, backend: str, patience: float):
        self.path, self.backend, self.patience = path, backend, patience
        ((self._count, self.fps),) = decoder_process().ask(path, backend, None, patience)

    def __len__(self) -> int:
        return self._count

    def pieces(self, indices: Iterable[int]) -> Iterator[np.ndarray]:
        yield from decoder_process().ask(self.path, self.backend, [int(i) for i in indices], self.patience)

    def walk(self, indices: Iterable[int]) -> Iterator[np.ndarray]:
        for piece in self.pieces(indices):
            yield from piece


_held = threading.local()


def decoder_process() -> DecoderProcess:
    """Returns the decoder process of this thread."""
    if not hasattr(_held, "process"):
        _held.process = DecoderProcess()
    return _held.process


def open_video(path: str | Path, backend: str = "decord", patience: float | None = None) -> Decoder:
    """Opens a video as `decode.open_video` does, in another process if `patience` is given.

    Args:
        patience: seconds that it may take to open the file, and again to decode frames of it; None: decode in this process.
    Raises:
        as `decode.open_video`; UnreadableVideo also if the other process takes longer or dies.
    """
    return decode.open_video(path, backend) if patience is None else RemoteVideo(Path(path), backend, patience)
