"""Runs that are killed, terminated, or out of disk space: what is saved, and how they resume."""

from __future__ import annotations

import errno
import os
import re
import resource
import shutil
import signal
import subprocess
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch

from callbacks import LastCheckpoint, last_checkpoint
from kit.checkpoint import TrainingCheckpointIO, load_tokenizer, read_checkpoint
from kit.files import load_checked, save_checked
from tests.fixtures import fit_tokenizer
from tests.interrupted import STEPS, last, said, same, started, stopped_midway, wait_for


def test_killed_while_saving_it_goes_on_to_the_same_weights(whole, tmp_path):
    """The run saves at each step. benchmarks/survival.py does this 50 times."""
    folder = last(tmp_path).parent
    process = started(tmp_path, "callbacks.last.every=1")
    wait_for(lambda: last(tmp_path).is_file() and any(folder.glob(".*part*")), process)
    process.kill()
    process.wait()
    assert read_checkpoint(last(tmp_path), "tokenizer")["global_step"] > 0
    assert started(tmp_path).wait() == 0
    assert same(read_checkpoint(last(tmp_path), "tokenizer"), whole)
    assert not list(folder.glob(".*part*")), "nor is anything left behind"


@pytest.mark.parametrize("accumulate, workers", [(1, 1), (3, 0)])
def test_told_to_end_it_saves_between_two_steps(whole, tmp_path, accumulate, workers):
    """All processes of the run get SIGTERM, as from a scheduler."""
    every = ["callbacks.last.every=1000", f"data.workers={workers}"]
    with stopped_midway(tmp_path, f"optimizer.accumulate={accumulate}", *every) as process:
        os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(timeout=60) == 128 + signal.SIGTERM
    assert "ckpt=last goes on from there" in said(tmp_path)
    saved = read_checkpoint(last(tmp_path), "tokenizer")
    assert 0 < saved["global_step"] < 40 and saved["ClipDataModule"]["batches_done"] == accumulate * saved["global_step"]
    if accumulate == 1:
        assert started(tmp_path).wait() == 0
        assert same(read_checkpoint(last(tmp_path), "tokenizer"), whole)


def test_out_of_time_it_ends_between_two_steps(tmp_path, monkeypatch):
    """Time is over after the fourth batch; a step has three."""

    def remaining(timer, trainer):
        trainer.should_stop = trainer.fit_loop.epoch_loop.batch_progress.total.processed >= 4

    monkeypatch.setattr("lightning.pytorch.callbacks.Timer._check_time_remaining", remaining)
    assert fit_tokenizer(tmp_path, *STEPS, "optimizer.accumulate=3", "trainer.max_time=00:01:00:00", name="run") == 0
    saved = read_checkpoint(last(tmp_path), "tokenizer")
    assert (saved["global_step"], saved["ClipDataModule"]["batches_done"]) == (2, 6)


def test_two_trainings_do_not_share_a_folder(whole, tmp_path, capsys):
    with stopped_midway(tmp_path) as process:
        for words in (["ckpt=last"], ["overwrite=true"]):
            assert fit_tokenizer(tmp_path, *words, name="run") == 1
            assert f"another process is at work in {tmp_path / 'run'}; wait for it" in capsys.readouterr().err
    assert process.wait() == 0
    assert same(read_checkpoint(last(tmp_path), "tokenizer"), whole)
    assert not list((tmp_path / "run").glob(".*lock"))


def test_what_sigterm_did_before_it_does_again(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    assert fit_tokenizer(tmp_path, *STEPS, "recipe.tokenizer.steps=1", name="run") == 0
    assert signal.getsignal(signal.SIGTERM) == before


def fill(folder: Path):
    """Fills a file system up to 1 MB, which is enough for logs but not for a checkpoint."""
    with open(folder / "filler", "wb") as file:
        os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(folder).free - 2**20)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 32 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("no file system of its own can be mounted here: that needs root")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


@pytest.mark.parametrize("may_fail", [1, 1000])
def test_a_full_disk_leaves_the_last_checkpoint_whole(whole, small_disk, may_fail):
    """The run stops after the configured number of failures, or continues and saves once there is space."""
    with stopped_midway(small_disk, "callbacks.last.every=2", f"callbacks.last.may_fail={may_fail}") as process:
        fill(small_disk)
    if may_fail == 1000:
        wait_for(lambda: "could not be saved: No space left on device" in said(small_disk), process)
        (small_disk / "filler").unlink()
        assert process.wait() == 0
        assert same(read_checkpoint(last(small_disk), "tokenizer"), whole)
        return
    assert process.wait() == 1
    told = said(small_disk)
    assert told.count("could not be saved: No space left on device") >= 1 + may_fail and "ckpt=last" in told
    assert read_checkpoint(last(small_disk), "tokenizer")["global_step"] < 40
    (small_disk / "filler").unlink()
    assert started(small_disk).wait() == 0
    assert same(read_checkpoint(last(small_disk), "tokenizer"), whole)


def test_the_best_checkpoint_stays_until_the_next_one_is_saved(tmp_path):
    """Lightning removes the old one after a save that, for all it knows, has succeeded."""
    old, io = tmp_path / "best_step=20.ckpt", TrainingCheckpointIO()
    for failed, kept in ((1, True), (0, False)):
        old.touch()
        io.failed = failed
        io.remove_checkpoint(old)
        assert old.exists() == kept


@pytest.mark.parametrize("may_fail", [0, 1])
def test_a_failed_save_of_another_callback_is_not_forgotten(tmp_path, monkeypatch, may_fail):
    """The checkpoint at a stage's end fails, then `last.ckpt` succeeds: the failure still counts, once."""
    monkeypatch.setattr("kit.checkpoint.save_training", save := MagicMock(side_effect=[OSError("no room"), None, None]))
    io, last = TrainingCheckpointIO(), LastCheckpoint(str(tmp_path), every=1, may_fail=may_fail)
    strategy = SimpleNamespace(checkpoint_io=io, broadcast=lambda value: value)
    trainer = SimpleNamespace(strategy=strategy, global_step=1)
    trainer.save_checkpoint = lambda path, **_: io.save_checkpoint({}, path)
    with pytest.warns(UserWarning, match="no room; 1 in a row"):
        io.save_checkpoint({}, tmp_path / "low.ckpt")
    if may_fail:
        last._save(trainer, may_fail)
        trainer.global_step = 2
    else:
        with pytest.raises(OSError, match="no room. Make room and go on with ckpt=last"):
            last._save(trainer, may_fail)
        trainer.global_step = 2  # told once
    last._save(trainer, 0)
    assert last.saved == 2 and save.call_count == 3


@pytest.mark.parametrize("failures", [1, 2])
def test_a_failure_that_was_let_pass_does_not_fail_a_later_save(tmp_path, monkeypatch, failures):
    """The last save of a training may not fail, but failures before it are forgiven."""
    outcomes = [OSError("no room")] * failures + [None]
    monkeypatch.setattr("kit.checkpoint.save_training", MagicMock(side_effect=outcomes))
    io, last = TrainingCheckpointIO(), LastCheckpoint(str(tmp_path), every=1, may_fail=2)
    trainer = SimpleNamespace(strategy=SimpleNamespace(checkpoint_io=io, broadcast=lambda value: value))
    trainer.save_checkpoint = lambda path, **_: io.save_checkpoint({}, path)
    for trainer.global_step in range(1, failures + 1):
        with pytest.warns(UserWarning, match="no room"):
            last._save(trainer, may_fail=2)
    last.on_train_end(trainer, None)
    assert last.saved == trainer.global_step


def test_a_folder_that_cannot_be_synced_loses_no_save(tmp_path, monkeypatch):
    """Some network file systems cannot sync a folder; the file is in place all the same."""
    sync = os.fsync

    def files_alone(descriptor):
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.EINVAL, "Invalid argument")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", files_alone)
    save_checked({"step": 2}, tmp_path / "last.ckpt")
    assert load_checked(tmp_path / "last.ckpt") == {"step": 2}


def test_a_full_disk_costs_pictures_and_not_the_run(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("callbacks.video_logger.contact_sheet", full)
    monkeypatch.setattr("callbacks.code_use.bit_use_picture", full)
    words = ["recipe.tokenizer.steps=4", "trainer.val_check_interval=2", "callbacks.video_logger.clips=1"]
    with pytest.warns(UserWarning) as told:
        assert fit_tokenizer(tmp_path, *words, name="run") == 0
    for what in ("no pictures of step 2: .*No space left", "no picture of the bits' use at step 4"):
        assert any(re.search(what, str(warning.message)) for warning in told)


def test_a_run_from_another_ones_end_has_a_checkpoint_of_its_own(pair, tmp_path):
    assert fit_tokenizer(tmp_path, f"ckpt={pair.tokenizer}", name="other") == 0
    own = read_checkpoint(tmp_path / "other" / "checkpoints" / "last.ckpt", "tokenizer")
    assert own["global_step"] == 150 and same(own, read_checkpoint(pair.tokenizer, "tokenizer"))


def test_failed_save_leaves_what_was_there(tmp_path):
    """A limit of 64 KiB for files stands for a full disk."""
    path = tmp_path / "last.ckpt"
    save_checked({"step": 1}, path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, limits[1]))
        with pytest.raises(OSError, match=r"last.ckpt could not be saved: File too large .*the one before it is whole"):
            save_checked({"step": 2, "weights": torch.zeros(2**18)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert load_checked(path) == {"step": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]


def test_a_flipped_bit_of_a_checkpoint_is_found(pair, tmp_path):
    contents = bytearray(pair.tokenizer.read_bytes())
    load_tokenizer(pair.tokenizer)
    weights = next(iter(read_checkpoint(pair.tokenizer, "tokenizer")["state_dict"].values()))
    place = contents.index(weights.numpy().tobytes())
    contents[place + 5] ^= 1
    (tmp_path / "flipped.ckpt").write_bytes(contents)
    with pytest.raises(ValueError, match="flipped.ckpt is damaged"):
        load_tokenizer(tmp_path / "flipped.ckpt")


def test_saves_take_no_more_than_their_share_of_the_time(tmp_path, monkeypatch):
    """Steps take a second and saves two: with share 1 every step is saved, with share 0.2 every eighth."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(last_checkpoint.time, "monotonic", lambda: clock.now)
    saved = []

    def save(path, weights_only):
        clock.now += 2
        saved.append(trainer.global_step)

    progress = SimpleNamespace(total=SimpleNamespace(processed=0))
    trainer = SimpleNamespace(
        global_step=0, save_checkpoint=save, accumulate_grad_batches=1,
        fit_loop=SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=progress)),
        strategy=SimpleNamespace(
            broadcast=lambda x: x, reduce_boolean_decision=lambda x, all: x, checkpoint_io=None,
        ),
    )  # fmt: skip
    module = SimpleNamespace(hparams=SimpleNamespace(optimizer={}))
    for share, expected in ((1, list(range(1, 21))), (0.2, [1, 9, 17])):
        trainer.global_step = progress.total.processed = clock.now = 0
        saved.clear()
        callback = LastCheckpoint(tmp_path, every=1, share=share)
        for step in range(1, 21):
            clock.now += 1
            trainer.global_step = progress.total.processed = step
            callback.on_train_batch_end(trainer, module, None, None, step)
        assert saved == expected


@pytest.mark.parametrize("share", [0, -1, 1.5])
def test_a_share_that_is_none_is_told(share, tmp_path):
    with pytest.raises(ValueError, match="callbacks.last.share"):
        LastCheckpoint(tmp_path, every=1, share=share)
