"""Decoding in another process: the same frames, and a crash loses only one clip."""

from __future__ import annotations

import gc
import os
import re
import signal
import socket
import subprocess
import sys
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from unittest.mock import Mock, patch

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Subset

from kit.data import decode
from kit.data import decoder_process as decoder_process_file
from kit.data.clips import FolderClips
from kit.data.decode import UnreadableVideo
from kit.data.decoder_process import DecoderProcess, decoder_process, open_video
from kit.data.frames import fit, read_fitted
from kit.data.shapes import Shapes
from kit.media import video_writer, write_video


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    source = Shapes("train", 9, 32, 32, 8.0)
    for i in range(6):
        write_video(source[i]["video"], folder / f"{i}.mp4", 8.0)
    return folder


@pytest.mark.parametrize("backend", ["decord", "pyav"])
def test_another_process_decodes_alike(videos, backend):
    here, there = decode.open_video(videos / "0.mp4", backend), open_video(videos / "0.mp4", backend, 60.0)
    open_video(videos / "1.mp4", backend, 60.0)  # takes its place there
    assert (len(there), there.fps) == (len(here), here.fps)
    assert np.array_equal(there.frames([5, 0, 5]), here.frames([5, 0, 5]))
    assert all(np.array_equal(a, b) for a, b in zip(there.walk([1, 2]), here.walk([1, 2]), strict=True))
    with pytest.raises(IndexError, match="99"):
        there.frames([99])


@pytest.mark.parametrize("failures", [2, 3])
def test_a_process_that_does_not_start_is_started_again(videos, tmp_path, monkeypatch, failures):
    script = tmp_path / "decode.py"
    script.write_text(
        "import pathlib, runpy, sys\n"
        f"tries = pathlib.Path({str(tmp_path / 'tries')!r}); tries.open('a').write('x')\n"
        f"len(tries.read_text()) <= {failures} and sys.exit(1)\n"
        f"runpy.run_path({decode.__file__!r}, run_name='__main__')"
    )
    monkeypatch.setattr(decode, "__file__", str(script))
    process = DecoderProcess()
    if failures == 3:
        with pytest.raises(RuntimeError, match="no process that decodes .*data.source.patience=null does without"):
            next(process.ask(videos / "0.mp4", "pyav", None, 60.0))
    else:
        assert next(process.ask(videos / "0.mp4", "pyav", None, 60.0))[0] == 9
        process.stop()


def test_what_cannot_be_read_says_why_as_here(tmp_path):
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    for path in (tmp_path / "bad.mp4", tmp_path / "missing.mp4"):
        told = []
        for patience in (None, 60.0):
            with pytest.raises(UnreadableVideo) as error:
                open_video(path, "pyav", patience)
            told.append(str(error.value))
        assert told[0] == told[1]


@pytest.mark.parametrize(
    "number, reason",
    [(signal.SIGKILL, "died of it; data.source.backend=pyav may read it"), (signal.SIGSTOP, "more than 1 s")],
)
def test_decoder_that_dies_or_hangs_costs_its_clip_alone(videos, monkeypatch, number, reason):
    """A stopped decoder stands for one that hangs, a killed one for one that crashed."""
    source = FolderClips(videos, "all", frames=5, height=32, width=32, patience=60.0)
    expected = [source[n]["video"] for n in range(5)]
    hurt = decoder_process()._process
    os.kill(hurt.pid, number)
    ask = DecoderProcess.ask

    def impatient(self, path, backend, numbers, patience):  # with this one alone: another may take long to start
        return ask(self, path, backend, numbers, 1.0 if self._process is hurt else patience)

    monkeypatch.setattr(DecoderProcess, "ask", impatient)
    with pytest.warns(UserWarning, match=reason):
        assert torch.equal(source[0]["video"], expected[1]), "the next file takes its place"
    assert hurt.poll() is not None, "nothing is left behind"
    assert source.unreadable == [videos / source.file(0)]
    assert torch.equal(source[0]["video"], expected[0])


def test_a_decoder_that_halts_amid_its_answer_costs_its_clip(tmp_path, monkeypatch):
    """So many pixels are more than the socket holds: when their first bytes are there, the others are still to be sent."""
    monkeypatch.setattr("kit.data.decoder_process.PAUSE", 1)
    path, process = write_video(Shapes("train", 9, 256, 256, 8.0)[0]["video"], tmp_path / "0.mp4", 8.0), DecoderProcess()
    ((count, _),) = process.ask(path, "pyav", None, 60.0)
    halted, poll = process._process, process._connection.poll

    def halt_midway(seconds):
        came = poll(seconds)
        os.kill(halted.pid, signal.SIGSTOP)
        return came

    monkeypatch.setattr(process._connection, "poll", halt_midway)
    with pytest.raises(UnreadableVideo, match="it took more than 60 s"):
        list(process.ask(path, "pyav", list(range(count)), 60.0))
    assert halted.poll() is not None
    assert list(process.ask(path, "pyav", None, 60.0))[0][0] == count, "another takes its place"
    process.stop()


def test_pyav_is_not_recommended_for_what_it_could_not_read(videos):
    process = DecoderProcess()
    list(process.ask(videos / "0.mp4", "pyav", None, 60.0))
    os.kill(process._process.pid, signal.SIGKILL)
    with pytest.raises(UnreadableVideo, match="died of it. Check"):
        list(process.ask(videos / "0.mp4", "pyav", None, 60.0))


def test_each_thread_has_a_decoder_process_of_its_own():
    with ThreadPoolExecutor(1) as thread:
        assert thread.submit(decoder_process).result() is not decoder_process()


def test_an_interrupted_question_is_not_answered_later(videos, monkeypatch):
    """After Ctrl-C in a notebook, the next clip must not get the answer to the interrupted request."""
    expected = decode.open_video(videos / "1.mp4", "pyav").frames([0, 1])
    first, second = (open_video(videos / name, "pyav", 60.0) for name in ("0.mp4", "1.mp4"))
    with monkeypatch.context() as patch:

        def interrupt(seconds):
            raise KeyboardInterrupt

        patch.setattr(decoder_process()._connection, "poll", interrupt)
        with pytest.raises(KeyboardInterrupt):
            first.frames([0, 1])
    assert np.array_equal(second.frames([0, 1]), expected)


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    """A video of 9 frames, 56 MB, which come in three pieces."""
    clip = Shapes("val", 9, 64, 64, 8.0)[0]["video"]
    enlarged = torch.nn.functional.interpolate(clip, (1080, 1920))
    return write_video(enlarged, tmp_path_factory.mktemp("large") / "0.mp4", 8)


def test_an_answer_in_pieces_is_that_of_this_process(large):
    here, there = decode.open_video(large, "pyav"), open_video(large, "pyav", 60.0)
    numbers = [0, 1, 1, 3, 4, 5, 6, 8, 8]
    pieces = list(there.pieces(numbers))
    assert len(pieces) == 3 and np.array_equal(np.concatenate(pieces), here.frames(numbers))
    found, size = read_fitted(there, numbers, 32, 40, 0.2, 0.7)
    assert size == (1080, 1920) and torch.equal(found, fit(here.frames(numbers), 32, 40, 0.2, 0.7))


@pytest.mark.parametrize("how", ["closed", "held"])  # a notebook holds what an interrupt has left
def test_a_walk_that_is_broken_off_leaves_nothing_to_the_next(large, videos, how):
    expected = decode.open_video(videos / "1.mp4", "pyav").frames([0, 1])
    walk = open_video(large, "pyav", 60.0).walk(range(9))
    next(walk)
    if how == "closed":
        walk.close()
    assert np.array_equal(open_video(videos / "1.mp4", "pyav", 60.0).frames([0, 1]), expected)
    process = decoder_process()._process
    walk.close()
    assert np.array_equal(open_video(videos / "1.mp4", "pyav", 60.0).frames([0, 1]), expected)
    assert decoder_process()._process is process, "the end of the old one does not touch the new one"


def test_memory_holds_few_frames_of_a_large_file(tmp_path):
    """33 frames of 1080p are 205 MB, which the process that asks and the one that decodes would hold more than once."""
    path, frame = tmp_path / "large.mp4", torch.zeros(3, 1, 1080, 1920)
    with video_writer(path, 8, 1080, 1920) as add:
        for _ in range(33):
            add(frame)
    source, decoder = FolderClips(tmp_path, "all", frames=33, height=32, width=32, backend="pyav"), DecoderProcess()
    with patch.object(decoder_process_file, "decoder_process", lambda: decoder):
        len(open_video(path, "pyav", 60.0))
        before = peak_memory(decoder._process.pid)
        tracemalloc.start()
        assert source[0]["video"].shape == (3, 33, 32, 32)
        ours, theirs = tracemalloc.get_traced_memory()[1] / 2**20, peak_memory(decoder._process.pid) - before
        tracemalloc.stop()
    decoder.stop()
    assert 5 < ours < 100 and theirs < 400, (
        ours,
        theirs,
    )  # in pieces, and the codec keeps what others refer to; whole: 413, 699


def peak_memory(process: int) -> float:
    """Peak memory of a process in MiB."""
    return int(re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{process}/status").read_text())[1]) / 1024


def test_patience_is_above_nothing(videos):
    with pytest.raises(ValueError, match="patience=0; expected seconds above 0, or null"):
        FolderClips(videos, patience=0)


def test_forked_workers_have_a_reader_each(videos):
    source = FolderClips(videos, frames=5, height=32, width=32)
    expected = torch.stack([source[n]["video"] for n in range(20)])
    pid = decoder_process()._process.pid
    gc.collect()  # decord's readers of other tests, which must not be collected in a forked process: it would hang
    loader = DataLoader(Subset(source, range(20)), batch_size=2, num_workers=2, multiprocessing_context="fork")
    assert torch.equal(torch.cat([batch["video"] for batch in loader]), expected)
    assert decoder_process()._process.pid == pid and torch.equal(source[3]["video"], expected[3])


def test_the_process_ends_with_its_owner(videos):
    """It ends even if its owner is killed while it has a file open."""
    code = (
        "import time; from kit.data.decoder_process import open_video, decoder_process\n"
        f"open_video({str(videos / '0.mp4')!r}, 'pyav', 60.0)\n"
        "print(decoder_process()._process.pid, flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as owner:
        pid = int(owner.stdout.readline())
        owner.kill()
    end = time.monotonic() + 60
    while is_running(pid) and time.monotonic() < end:
        time.sleep(0.1)
    assert not is_running(pid)


def test_a_decoder_that_nobody_waits_for_ends_by_itself(videos):
    """It ends after its time limit even if it hangs with the interpreter's lock held, as after its owner was killed."""
    ours, theirs = socket.socketpair()
    code = (
        "import ctypes, sys; from multiprocessing.connection import Connection; from kit.data import decode\n"
        "decode.open_video = lambda *_: ctypes.PyDLL(None).sleep(60)\n"
        "decode.serve(Connection(int(sys.argv[1])))"
    )
    words = [sys.executable, "-c", code, str(theirs.fileno())]
    with theirs, subprocess.Popen(words, pass_fds=[theirs.fileno()]) as process:
        connection = Connection(ours.detach())
        assert connection.recv() == "ready"
        connection.send((videos / "0.mp4", "pyav", None, 1.0))
        assert process.wait(timeout=60) == 1


def test_the_limit_of_a_request_ends_with_its_answer(videos, monkeypatch):
    """Else a decoder that is asked nothing for a while, as during a validation, would end, and cost the next clip."""
    seen = Mock()
    seen.connection.recv.side_effect = [(videos / "0.mp4", "pyav", None, 1.0), EOFError]
    monkeypatch.setattr(decode, "faulthandler", seen.limit)
    monkeypatch.setattr(decode, "signal", Mock())
    monkeypatch.setattr(decode.os, "dup2", lambda *_: None)
    decode.serve(seen.connection)
    limit = ["limit.dump_traceback_later", "limit.cancel_dump_traceback_later"]
    talk = ["connection.send", "connection.recv"]
    assert [name for name, *_ in seen.mock_calls] == [*talk, *limit, *talk]


def is_running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().split(")")[-1].split()[0] != "Z"
    except OSError:
        return False
