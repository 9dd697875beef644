"""Runs that are killed, terminated, or out of disk space: what is saved, and how they resume."""

from __future__ import annotations

import errno
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import av
import pytest
import torch

import kit.encode_ahead
from callbacks import BestCheckpoint, LastCheckpoint, last_checkpoint
from kit.checkpoint import load_tokenizer, read_checkpoint
from kit.files import contents_hash, load_checked, not_saved, save_checked, written_aside
from kit.signals import end_with_launcher
from kit.tokenizer.module import TokenizerModule
from kit.training_checkpoint import TrainingCheckpointIO, save_training
from tests.fixtures import fit_generator, fit_tokenizer
from tests.interrupted import LENGTH, ROOT, STEPS, last, said, same, started, stopped_midway, wait_for
from tests.test_callbacks import trainer_at
from tests.test_training import losses


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


@pytest.mark.parametrize(
    "told, code, accumulate, workers, interpreter",
    [
        (signal.SIGTERM, 128 + signal.SIGTERM, 1, 1, True),
        (signal.SIGUSR1, 128 + signal.SIGTERM, 3, 0, False),
        (signal.SIGINT, 1, 1, 1, False),
    ],
)
def test_told_to_end_it_saves_between_two_steps(whole, tmp_path, told, code, accumulate, workers, interpreter):
    """All processes of the run get SIGTERM, as from a scheduler, or Ctrl-C."""
    every = ["callbacks.last.every=1000", f"data.workers={workers}"]
    with stopped_midway(tmp_path, f"optimizer.accumulate={accumulate}", *every, interpreter=interpreter) as process:
        os.killpg(process.pid, told)
    assert process.wait(timeout=60) == code
    assert "ckpt=last resumes from there" in said(tmp_path)
    saved = read_checkpoint(last(tmp_path), "tokenizer")
    assert 0 < saved["global_step"] < LENGTH and saved["ClipDataModule"]["batches_done"] == accumulate * saved["global_step"]
    assert len(losses(tmp_path / "run")) == accumulate * saved["global_step"], "the last step's loss is logged too"
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


def test_a_validation_that_was_interrupted_is_made_up_for(tmp_path, monkeypatch):
    """It is that of the fourth step, of which no checkpoint is saved before its validation."""
    steps = [
        *STEPS,
        "recipe.tokenizer.steps=7",
        "trainer.val_check_interval=2",
        "callbacks.last.every=1",
        "callbacks.last.share=1",
    ]
    validate = TokenizerModule.validation_step

    def interrupted(module, *batch):
        if module.trainer.global_step == 4:
            raise KeyboardInterrupt
        return validate(module, *batch)

    assert fit_tokenizer(tmp_path, *steps, name="whole") == 0
    with monkeypatch.context() as patch:
        patch.setattr(TokenizerModule, "validation_step", interrupted)
        assert fit_tokenizer(tmp_path, *steps, name="run") == 1
    assert fit_tokenizer(tmp_path, *steps, "ckpt=last", name="run") == 0
    scores = [losses(tmp_path / name, start, "val/psnr") for name, start in (("whole", 0), ("run", 0), ("run", 1))]
    assert len(scores[0]) == 3 and scores[1] + scores[2] == scores[0]
    assert same(*(read_checkpoint(tmp_path / name / "checkpoints" / "last.ckpt", "tokenizer") for name in ("run", "whole")))


def test_a_run_that_goes_back_to_its_best_goes_on_from_there(tmp_path, monkeypatch):
    """Also if it is killed before its first save: ckpt=last is not the later checkpoint that it left."""
    steps = [*STEPS, "trainer.val_check_interval=2"]
    assert fit_tokenizer(tmp_path, *steps, "recipe.tokenizer.steps=5", name="run") == 0
    best = last(tmp_path).with_name("best.ckpt")
    shutil.copy(best, kept := tmp_path / "kept.ckpt")
    with monkeypatch.context() as patch:
        patch.setattr("lightning.pytorch.loops.fit_loop._FitLoop.run", MagicMock(side_effect=KeyboardInterrupt))
        assert fit_tokenizer(tmp_path, *steps, "recipe.tokenizer.steps=6", f"ckpt={best}", name="run") == 1
    assert same(*(read_checkpoint(path, "tokenizer") for path in (last(tmp_path), kept)))


def test_a_run_that_was_moved_knows_its_best_score(tmp_path, recwarn):
    steps = [*STEPS, "trainer.val_check_interval=2"]
    assert fit_tokenizer(tmp_path, *steps, "recipe.tokenizer.steps=4", name="run") == 0
    (tmp_path / "run").rename(tmp_path / "moved")
    folder = tmp_path / "moved" / "checkpoints"
    before = read_checkpoint(folder / "last.ckpt", "tokenizer")
    (key,) = (key for key in before["callbacks"] if key.startswith("ModelCheckpoint"))
    assert fit_tokenizer(tmp_path, *steps, "recipe.tokenizer.steps=5", "ckpt=last", name="moved") == 0
    after = read_checkpoint(folder / "last.ckpt", "tokenizer")["callbacks"][key]
    assert after["best_model_score"] == before["callbacks"][key]["best_model_score"] is not None
    assert after["best_model_path"] == str(folder / "best.ckpt")
    assert fit_tokenizer(tmp_path, *steps, "recipe.tokenizer.steps=6", f"ckpt={folder / 'last.ckpt'}", name="other") == 0
    assert (tmp_path / "other" / "checkpoints" / "best.ckpt").is_file(), "another run has a best of its own"
    assert not [told for told in recwarn if "dirpath has changed" in str(told.message)]


@pytest.mark.parametrize("copied", [True, False])
def test_the_best_score_goes_with_the_best_checkpoint(tmp_path, copied):
    """A run whose folder was copied knows its best one, and what takes its place; one that starts from another's has none."""
    before, now = (BestCheckpoint(tmp_path / name, "best", monitor="val/psnr", mode="max") for name in ("before", "now"))
    before.best_model_path = before.kth_best_model_path = str(tmp_path / "before" / "best.ckpt")
    before.best_model_score = before.kth_value = torch.tensor(30.0)
    before.best_k_models = {before.best_model_path: before.best_model_score}
    own = tmp_path / "now" / "best.ckpt"
    if copied:
        own.parent.mkdir()
        own.touch()
    now.load_state_dict(before.state_dict())
    best = str(own) if copied else ""
    assert now.best_model_path == now.kth_best_model_path == best
    assert now.best_model_score == (30 if copied else None)
    assert list(now.best_k_models) == [best] * copied


def test_while_clips_are_encoded_sigterm_ends_the_run_at_once(pair, tmp_path, monkeypatch):
    handlers, write = [], kit.encode_ahead.write_cache
    before = signal.getsignal(signal.SIGTERM)

    def watched(*args):
        handlers.append(signal.getsignal(signal.SIGTERM))
        write(*args)

    monkeypatch.setattr(kit.encode_ahead, "write_cache", watched)
    words = ["recipe.generator.encoded_clips=4", "recipe.generator.steps=2", "trainer.val_check_interval=2"]
    assert fit_generator(tmp_path, *words, tokenizer=pair.tokenizer) == 0
    assert handlers == [signal.SIG_DFL] and signal.getsignal(signal.SIGTERM) == before


@pytest.mark.skipif(sys.platform != "linux", reason="a process is told of its parent's end by Linux only")
@pytest.mark.parametrize("launcher", ["lightning", "torchrun"])
def test_a_launched_process_ends_with_the_one_that_launched_it(launcher, tmp_path):
    """It may be waiting for the others, in a step that never ends, with a signal that it would heed after it. torchrun is no
    part of the training: then it may go on to save."""
    told = f"pathlib.Path({str(tmp_path / 'told')!r})"
    child = (
        f"import os, pathlib, signal, time; signal.signal(signal.SIGTERM, lambda *_: {told}.touch())\n"
        "from kit.signals import end_with_launcher as f; f(); print(os.getpid(), flush=True)\n"
        f"for _ in range(600): time.sleep(0.1); {told}.exists() and exit()"
    )
    own = {"lightning": {"NODE_RANK": "0", "MASTER_PORT": "1"}, "torchrun": {"TORCHELASTIC_RUN_ID": "a"}}[launcher]
    parent = f"import os, subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}], "
    parent += f"env={{**os.environ, 'LOCAL_RANK': '1', **{own}}}); time.sleep(100)"
    process = subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    number = int(process.stdout.readline())
    process.kill()
    end = time.monotonic() + 20
    while Path(f"/proc/{number}").exists() and Path(f"/proc/{number}/stat").read_text().split()[2] != "Z":
        assert time.monotonic() < end
        time.sleep(0.01)
    assert (tmp_path / "told").exists() == (launcher == "torchrun")


@pytest.mark.skipif(sys.platform != "linux", reason="a process is told of its parent's end by Linux only")
def test_who_launched_a_process_decides_how_it_ends(monkeypatch):
    """The first process of a training, whose variables Lightning sets too, does not end with the user's shell."""
    told = []
    monkeypatch.setattr("ctypes.CDLL", lambda _: SimpleNamespace(prctl=lambda *how: told.append(how)))
    names = ("LOCAL_RANK", "NODE_RANK", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "SLURM_PROCID")
    lightning = {"NODE_RANK": "0", "MASTER_PORT": "1"}
    for own, expected in (
        ({}, []),
        ({"LOCAL_RANK": "0", **lightning}, []),
        ({"LOCAL_RANK": "1", **lightning}, [signal.SIGKILL]),
        ({"LOCAL_RANK": "1", **lightning, "SLURM_PROCID": "1"}, [signal.SIGTERM]),
        ({"LOCAL_RANK": "0", "TORCHELASTIC_RUN_ID": "a"}, [signal.SIGTERM]),
        ({"LOCAL_RANK": "1"}, [signal.SIGTERM]),
    ):
        for name in names:
            monkeypatch.delenv(name, raising=False)
        for name, value in own.items():
            monkeypatch.setenv(name, value)
        told.clear()
        end_with_launcher()
        assert [number for _, number in told] == expected


def test_two_trainings_do_not_share_a_folder(whole, tmp_path, capsys):
    with stopped_midway(tmp_path) as process:
        for words in (["ckpt=last"], ["overwrite=true"]):
            assert fit_tokenizer(tmp_path, *words, name="run") == 1
            assert f"another process is at work in {tmp_path / 'run'}; wait for it" in capsys.readouterr().err
    assert process.wait() == 0
    assert same(read_checkpoint(last(tmp_path), "tokenizer"), whole)
    assert not list((tmp_path / "run").glob(".*lock"))


@pytest.fixture
def handlers():
    """Handlers of a program that trains by `kit.verbs.fit.fit`: signal -> handler."""
    own = {number: lambda *_: None for number in (signal.SIGTERM, signal.SIGINT)}
    before = {number: signal.signal(number, handler) for number, handler in own.items()}
    yield own
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("fails", [False, True])
def test_what_signals_did_before_they_do_again(fails, handlers, tmp_path, monkeypatch):
    train = TokenizerModule.training_step

    def step(module, *batch):
        assert signal.getsignal(signal.SIGINT) != handlers[signal.SIGINT]
        if fails:
            raise ValueError("no")
        return train(module, *batch)

    monkeypatch.setattr(TokenizerModule, "training_step", step)
    assert fit_tokenizer(tmp_path, *STEPS, "recipe.tokenizer.steps=1", name="run") == fails
    assert {number: signal.getsignal(number) for number in handlers} == handlers


def test_a_second_interrupt_does_what_it_did_before(handlers, tmp_path):
    callback = LastCheckpoint(str(tmp_path), every=1)
    callback.on_train_start(None, None)
    assert signal.getsignal(signal.SIGINT) != handlers[signal.SIGINT]
    signal.raise_signal(signal.SIGINT)
    assert callback.received == signal.SIGINT and signal.getsignal(signal.SIGINT) == handlers[signal.SIGINT]


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
    assert read_checkpoint(last(small_disk), "tokenizer")["global_step"] < LENGTH
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


def test_the_best_score_is_that_of_the_best_checkpoint_there_is(tmp_path, monkeypatch):
    """The first one is saved, those of later, better validations are not."""
    best, steps = tmp_path / "run" / "checkpoints" / "best.ckpt", []

    def fail(checkpoint, path):
        if path == best:
            steps.append(checkpoint["global_step"])
            if best.exists():
                raise OSError(errno.ENOSPC, "No space left on device")
        save_training(checkpoint, path)

    monkeypatch.setattr("kit.training_checkpoint.save_training", fail)
    words = [*STEPS, "trainer.val_check_interval=2", "recipe.tokenizer.steps=8", "callbacks.last.may_fail=9"]
    with pytest.warns(UserWarning, match="No space left on device"):
        assert fit_tokenizer(tmp_path, *words, name="run") == 0
    states = [read_checkpoint(path, "tokenizer")["callbacks"] for path in (best, last(tmp_path))]
    scores = [state[key]["best_model_score"] for state in states for key in state if key.startswith("ModelCheckpoint")]
    assert len(steps) > 1 and scores[0] == scores[1] is not None


@pytest.mark.parametrize("may_fail", [0, 1])
def test_a_failed_save_of_another_callback_is_not_forgotten(tmp_path, monkeypatch, may_fail):
    """The checkpoint at a stage's end fails, then `last.ckpt` succeeds: the failure still counts, once."""
    monkeypatch.setattr(
        "kit.training_checkpoint.save_training", save := MagicMock(side_effect=[OSError("no room"), None, None])
    )
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
        with pytest.raises(OSError, match="no room. Make room and resume with ckpt=last"):
            last._save(trainer, may_fail)
        trainer.global_step = 2  # told once
    last._save(trainer, 0)
    assert last.saved == 2 and save.call_count == 3


def test_a_failed_save_of_another_callback_ends_the_run_at_its_validation(tmp_path, monkeypatch):
    monkeypatch.setattr("kit.training_checkpoint.save_training", MagicMock(side_effect=OSError("no room")))
    io, last = TrainingCheckpointIO(), LastCheckpoint(str(tmp_path), every=100)
    strategy = SimpleNamespace(checkpoint_io=io, broadcast=lambda value: value)
    with pytest.warns(UserWarning, match="no room"):
        io.save_checkpoint({}, tmp_path / "best.ckpt")
    with pytest.raises(OSError, match="no room. Make room"):
        last.on_validation_end(SimpleNamespace(strategy=strategy, global_step=1, sanity_checking=False), None)


def test_after_a_validation_by_the_clock_a_step_is_saved_again(tmp_path, monkeypatch):
    """With what other callbacks have learned of it, such as the best score."""
    monkeypatch.setattr("kit.training_checkpoint.save_training", save := MagicMock())
    io, last = TrainingCheckpointIO(), LastCheckpoint(str(tmp_path), every=1)
    strategy = SimpleNamespace(checkpoint_io=io, broadcast=lambda value: value)
    trainer = trainer_at(1, strategy=strategy, global_step=1, sanity_checking=False, accumulate_grad_batches=1)
    trainer.save_checkpoint = lambda path, **_: io.save_checkpoint({}, path)
    last._save(trainer, may_fail=0)
    last.on_validation_end(trainer, SimpleNamespace(hparams=SimpleNamespace(optimizer={})))
    last.on_train_end(trainer, None)
    assert save.call_count == 2


@pytest.mark.parametrize("failures", [1, 2])
def test_a_failure_that_was_let_pass_does_not_fail_a_later_save(tmp_path, monkeypatch, failures):
    """The last save of a training may not fail, but failures before it are forgiven."""
    outcomes = [OSError("no room")] * failures + [None]
    monkeypatch.setattr("kit.training_checkpoint.save_training", MagicMock(side_effect=outcomes))
    io, last = TrainingCheckpointIO(), LastCheckpoint(str(tmp_path), every=1, may_fail=2)
    trainer = SimpleNamespace(strategy=SimpleNamespace(checkpoint_io=io, broadcast=lambda value: value))
    trainer.save_checkpoint = lambda path, **_: io.save_checkpoint({}, path)
    for trainer.global_step in range(1, failures + 1):
        with pytest.warns(UserWarning, match="no room"):
            last._save(trainer, may_fail=2)
    last.on_train_end(trainer, None)
    assert last.saved == trainer.global_step


def test_a_save_that_failed_is_tried_again_at_the_end_of_the_training(tmp_path, monkeypatch):
    """Although no step has been taken since: the last save may not fail."""
    monkeypatch.setattr("kit.training_checkpoint.save_training", save := MagicMock(side_effect=[OSError("no room"), None]))
    io, last = TrainingCheckpointIO(), LastCheckpoint(str(tmp_path), every=1, may_fail=1)
    trainer = SimpleNamespace(strategy=SimpleNamespace(checkpoint_io=io, broadcast=lambda value: value), global_step=1)
    trainer.save_checkpoint = lambda path, **_: io.save_checkpoint({}, path)
    with pytest.warns(UserWarning, match="no room"):
        last._save(trainer, may_fail=1)
    last.on_train_end(trainer, None)
    last.on_fit_end(trainer, None)
    assert save.call_count == 2 and last.saved == 1


def test_the_most_failures_in_a_row_are_told_although_saves_succeeded_between(tmp_path, monkeypatch):
    outcomes = [OSError("no room"), OSError("no room"), None, OSError("no disk"), None]
    monkeypatch.setattr("kit.training_checkpoint.save_training", MagicMock(side_effect=outcomes))
    io = TrainingCheckpointIO()
    with pytest.warns(UserWarning):
        for _ in outcomes:
            io.save_checkpoint({}, tmp_path / "last.ckpt")
    assert io.look() == (2, "no disk") and io.look()[0] == io.failed == 0


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


def test_a_file_and_its_name_reach_the_disk(tmp_path, monkeypatch):
    synced, sync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda number: (synced.append(os.path.isdir(f"/proc/self/fd/{number}")), sync(number)))
    save_checked({"step": 2}, tmp_path / "last.ckpt")
    assert synced == [False, True]


def test_a_hash_tells_apart_what_looks_alike():
    numbers = torch.arange(4)
    alike = [[[1], [2]], [[1, 2]], [{}, 1], {1: {}}, numbers, numbers.view(2, 2), numbers.int(), numbers.float()]
    assert len({contents_hash({"entry": value}) for value in alike}) == len(alike)
    long = torch.zeros(2, 5000, dtype=torch.long)  # printed, its middle would be left out
    long[1, 2500] = 1
    assert contents_hash({"entry": long[0]}) != contents_hash({"entry": long[1]})


def test_a_full_disk_costs_pictures_and_not_the_run(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("callbacks.video_logger.contact_sheet", full)
    monkeypatch.setattr("callbacks.code_use.bit_use_picture", full)
    words = ["recipe.tokenizer.steps=4", "trainer.val_check_interval=2", "callbacks.video_logger.clips=1"]
    with pytest.warns(UserWarning) as told:
        assert fit_tokenizer(tmp_path, *words, name="run") == 0
    for what in ("no pictures of step 2: .*No space left", "no picture of the bits' use of step 4"):
        assert any(re.search(what, str(warning.message)) for warning in told)


def test_a_run_from_another_ones_end_has_a_checkpoint_of_its_own(pair, tmp_path):
    assert fit_tokenizer(tmp_path, f"ckpt={pair.tokenizer}", name="other") == 0
    own = read_checkpoint(tmp_path / "other" / "checkpoints" / "last.ckpt", "tokenizer")
    assert own["global_step"] == 100 and same(own, read_checkpoint(pair.tokenizer, "tokenizer"))


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


def test_a_first_save_that_fails_has_none_before_it(tmp_path):
    path, full = tmp_path / "last.ckpt", OSError(errno.ENOSPC, "No space left on device")
    assert "whole" not in str(not_saved(path, full))
    path.touch()
    assert "the one before it is whole" in str(not_saved(path, full))


def test_a_file_is_replaced_and_not_written_over(tmp_path):
    path = tmp_path / "last.ckpt"
    path.write_text("old")
    with path.open() as before:
        with written_aside(path) as aside:
            aside.write_text("new")
        assert before.read() == "old" and path.read_text() == "new"


def test_a_folder_that_cannot_be_written_to_is_told_by_the_names_of_its_files(tmp_path):
    path = tmp_path / "config" / "config.yaml"
    with pytest.raises(FileNotFoundError, match="'.*/config/config.yaml'"), written_aside(path) as aside:
        path.parent.rmdir()
        aside.write_text("seed: 0")


def test_a_video_that_cannot_be_written_is_told_by_the_name_of_its_file(tmp_path):
    """The errors of PyAV do not let their file's name be changed, and those of a full disk have none."""
    path = tmp_path / "media" / "a.mp4"
    with pytest.raises(FileNotFoundError, match="'.*/media/a.mp4'"), written_aside(path) as aside:
        path.parent.rmdir()
        av.open(str(aside), "w")
    with pytest.raises(OSError, match="No space left on device: '.*/media/a.mp4'"), written_aside(path):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_flipped_bit_of_a_checkpoint_is_found(pair, tmp_path):
    contents = bytearray(pair.tokenizer.read_bytes())
    load_tokenizer(pair.tokenizer)
    weights = next(iter(read_checkpoint(pair.tokenizer, "tokenizer")["state_dict"].values()))
    place = contents.index(weights.numpy().tobytes())
    contents[place + 5] ^= 1
    (tmp_path / "flipped.ckpt").write_bytes(contents)
    with pytest.raises(ValueError, match="flipped.ckpt is damaged"):
        load_tokenizer(tmp_path / "flipped.ckpt")


def test_a_file_is_hashed_once_unless_it_changes(tmp_path, monkeypatch):
    path, weights = tmp_path / "last.ckpt", torch.arange(64.0)
    save_checked({"weights": weights}, path)
    monkeypatch.setattr("kit.files.contents_hash", hashed := MagicMock(wraps=contents_hash))
    for mmap in (True, False):
        assert torch.equal(load_checked(path, mmap)["weights"], weights)
    assert hashed.call_count == 1
    contents = bytearray(path.read_bytes())
    contents[contents.index(weights.numpy().tobytes()) + 5] ^= 1
    path.write_bytes(contents)
    os.utime(path, ns=(1, 1))
    with pytest.raises(ValueError, match="last.ckpt is damaged"):
        load_checked(path)
    with pytest.raises(FileNotFoundError):
        load_checked(tmp_path / "none.ckpt")


@pytest.mark.parametrize("error", [PermissionError("not yours"), MemoryError()])
def test_a_file_that_may_not_be_read_is_not_called_broken(error, tmp_path, monkeypatch):
    (tmp_path / "last.ckpt").touch()
    monkeypatch.setattr("torch.load", MagicMock(side_effect=error))
    with pytest.raises(type(error)):
        load_checked(tmp_path / "last.ckpt")


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
        global_step=0, max_steps=100, save_checkpoint=save, accumulate_grad_batches=1, should_stop=False,
        enable_validation=False, val_check_batch=None,
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
    rest = callback.rest_until
    callback.saved = None
    callback._save(trainer, 0)
    assert callback.rest_until == rest + 8, "a save out of turn counts, too"


@pytest.mark.parametrize("share", [0, -1, 1.5])
def test_a_share_that_is_none_is_told(share, tmp_path):
    with pytest.raises(ValueError, match="callbacks.last.share"):
        LastCheckpoint(tmp_path, every=1, share=share)
