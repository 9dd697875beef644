"""Runs that are killed, told to end, out of disk, or lose their loss: what is saved, and how they go on."""

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
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch

from callbacks import LastCheckpoint, LossGuard, last_checkpoint
from kit.checkpoint import TrainingCheckpointIO, load_tokenizer, read_checkpoint
from kit.data.shapes import Shapes
from kit.files import contents_hash, load_checked, save_checked
from kit.retries import DeadWorker, LostLoss, noticing_dead_workers, with_retries
from tests import gated
from tests.fixtures import CLIP, QUICK, TOKENIZER, fit_tokenizer

ROOT = Path(__file__).resolve().parents[1]
STEPS = ["trainer.precision=32-true", "callbacks.compile.least_steps=-1", "callbacks.ema.decay=0.9"]


def last(root: Path) -> Path:
    return root / "run" / "checkpoints" / "last.ckpt"


def started(root: Path, *overrides: str) -> subprocess.Popen:
    """A training of 40 steps of 4 clips, that goes on where it was, in another process."""
    words = [
        f"root={root}",
        "name=run",
        *CLIP,
        *TOKENIZER,
        *QUICK,
        *STEPS,
        "recipe.tokenizer.steps=40",
        "ckpt=last",
        *overrides,
    ]
    command = [sys.executable, "-m", "kit", "fit", "conf=stage1_tokenizer", *words]
    with open(root / "said", "w") as said:
        return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=said, start_new_session=True)


@contextmanager
def stopped_midway(root: Path, *overrides: str) -> Iterator[subprocess.Popen]:
    """While the block runs, such a training waits for the clips of its half-way, with what is before them done or about to
    be; afterwards they come."""
    gate = root / "gate"
    process = started(root, *gated.words(gate, at=80), *overrides)
    wait_for(gated.reached(gate).exists, process)
    yield process
    gate.touch()


def said(root: Path) -> str:
    """By the last one that was started."""
    return (root / "said").read_text()


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict:
    """The checkpoint of the same training, never interrupted."""
    root = tmp_path_factory.mktemp("whole")
    assert started(root).wait() == 0
    return read_checkpoint(last(root), "tokenizer")


def same(a: dict, b: dict) -> bool:
    """Whether two checkpoints have the same step, weights, averages and optimizer state, to the last bit."""
    parts = ("global_step", "state_dict", "ema", "optimizer_states")
    return contents_hash({key: a[key] for key in parts}) == contents_hash({key: b[key] for key in parts})


def wait_for(happened, process: subprocess.Popen, seconds: float = 60.0):
    end = time.monotonic() + seconds
    while not happened():
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.002)


def test_killed_while_saving_it_goes_on_to_the_same_weights(whole, tmp_path):
    """It saves at each step. benchmarks/survival.py does this 50 times."""
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
    """With all its processes, as schedulers tell it."""
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


def test_two_trainings_do_not_share_a_folder(whole, tmp_path, capsys):
    with stopped_midway(tmp_path) as process:
        for words in (["ckpt=last"], ["overwrite=true"]):
            assert fit_tokenizer(tmp_path, *words, name="run") == 1
            assert f"another process trains in {tmp_path / 'run'}; wait for it" in capsys.readouterr().err
    assert process.wait() == 0
    assert same(read_checkpoint(last(tmp_path), "tokenizer"), whole)
    assert not list((tmp_path / "run").glob(".*lock"))


def test_what_sigterm_did_before_it_does_again(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    assert fit_tokenizer(tmp_path, *STEPS, "recipe.tokenizer.steps=1", name="run") == 0
    assert signal.getsignal(signal.SIGTERM) == before


def fill(folder: Path):
    """Leaves a file system 1 MB, enough for logs and too little for a checkpoint."""
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
    """The run stops as configured, or goes on and saves once there is room."""
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


@pytest.mark.parametrize("may_fail", [0, 1])
def test_a_failed_save_of_another_callback_is_not_forgotten(tmp_path, monkeypatch, may_fail):
    """A stage's end, of which nothing is left, and then a `last.ckpt` that goes well."""
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
    """The last save of a training may not fail; that those before it did is over."""
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
    """As on some network file systems: the file is in its place all the same."""
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
    """As on a full disk: the process may not write files of more than 64 KiB."""
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


def place_of(state: dict) -> dict:
    """In the data, without the data's settings and the stages' names."""
    return {key: value for key, value in state.items() if key not in ("settings", "names")}


class Poisoned(Shapes):
    """Shapes whose clip 22 is no numbers."""

    def __getitem__(self, n):
        item = super().__getitem__(n)
        return {**item, "video": item["video"] * (float("nan") if n == 22 and self.split == "train" else 1)}


POISONED = ["data.source._target_=tests.test_survival.Poisoned", "recipe.tokenizer.steps=8", "callbacks.last.every=2"]


def test_a_lost_loss_goes_back_and_past_its_batch(tmp_path, monkeypatch):
    """Batch 5 has the clip; the last checkpoint is of step 4."""
    seen = []
    monkeypatch.setattr(
        "callbacks.LastCheckpoint.on_train_batch_start", lambda *a: seen.append(a[3]["n"][0].item()), raising=False
    )
    with pytest.warns(UserWarning, match="Going on from .*without that batch; 1 retries left"):
        assert fit_tokenizer(tmp_path, *STEPS, *POISONED, name="run") == 0
    assert seen == [0, 4, 8, 12, 16, 20, 16, 24, 28, 32]
    checkpoint = read_checkpoint(last(tmp_path), "tokenizer")
    assert checkpoint["global_step"] == 8 and place_of(checkpoint["ClipDataModule"]) == {"batches_done": 8, "left_out": [5]}
    assert 22 in torch.load(tmp_path / "run" / "lost_loss_step5.pt", weights_only=True)["n"]
    guard = next(state for name, state in checkpoint["callbacks"].items() if name.startswith("LossGuard"))
    assert guard["count"] == 8 and guard["mean"] > 0, "kept over a resume"
    seen.clear()
    more = [word for word in POISONED if "steps" not in word] + ["recipe.tokenizer.steps=10", "ckpt=last"]
    assert fit_tokenizer(tmp_path, *STEPS, *more, name="run") == 0
    assert seen == [36, 40], "still without it"


def test_a_stage_leaves_out_a_batch_of_its_own(tmp_path):
    """The last checkpoint is of the stage before the one whose batch is lost."""
    stages = "stages={first:{steps:4},second:{steps:7,data:{batch_size:16}}}"
    switch = "+callbacks.stage_switch={_target_:callbacks.StageSwitch,folder:'${folder}/checkpoints',monitor:val/psnr}"
    with pytest.warns(UserWarning, match="without that batch"):
        assert fit_tokenizer(tmp_path, *STEPS, POISONED[0], stages, switch, "callbacks.last.every=4", name="run") == 0
    state = read_checkpoint(last(tmp_path), "tokenizer")["StagedClips"]
    assert place_of(state) == {"batches_done": 11, "stage": 1, "ended": {0: 4}, "left_out": [[], [1]]}


def test_a_second_try_begins_without_what_the_first_held(tmp_path):
    class Model:
        def __init__(self):
            self.itself = self  # as trainer, module and optimizer hold each other

    before = []

    def train(resume, lost):
        if before:
            assert before[0]() is None
            return "done"
        before.append(weakref.ref(Model()))
        (tmp_path / "last.ckpt").touch()
        raise DeadWorker("a process of the loader died")

    with pytest.warns(UserWarning, match="with new processes"):
        assert with_retries(train, None, tmp_path / "last.ckpt", 1) == "done"


def test_a_worker_that_dies_is_made_up_for(whole, tmp_path):
    with stopped_midway(tmp_path, "data.workers=1", "callbacks.last.every=2") as process:
        os.kill(worker_of(process), signal.SIGKILL)
    assert process.wait() == 0 and "with new processes; 1 retries left" in said(tmp_path), said(tmp_path)
    assert same(read_checkpoint(last(tmp_path), "tokenizer"), whole)


def worker_of(process: subprocess.Popen) -> int:
    """A child of a training, which is a worker of its loader."""
    return int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[-1])


def test_what_no_retry_mends_is_raised(tmp_path):
    """Nothing to go on from, no retry left, or an error of another kind."""
    path, calls = tmp_path / "last.ckpt", []

    def fails(error, resume, places):
        calls.append((resume, places))
        raise error

    with pytest.raises(ValueError, match="retries=-1; expected 0 or more"):
        with_retries(lambda *_: pytest.fail("it began"), None, path, -1)
    lost, rewound = LostLoss("lost", (0, 7)), tmp_path / "best.ckpt"
    with pytest.raises(LostLoss):
        with_retries(partial(fails, lost), None, path, 2)
    path.write_text("of another run")
    with pytest.raises(LostLoss):
        with_retries(partial(fails, lost), None, path, 2)
    assert calls == [(None, [])] * 2
    with pytest.warns(UserWarning), pytest.raises(LostLoss):
        with_retries(partial(fails, lost), path, path, 2)
    assert calls[2:] == [(path, []), (path, [(0, 7)]), (path, [(0, 7)] * 2)]
    with pytest.raises(RuntimeError, match="out of memory"):
        with_retries(partial(fails, RuntimeError("out of memory")), path, path, 2)
    assert len(calls) == 6
    with pytest.warns(UserWarning), pytest.raises(LostLoss):
        with_retries(partial(fails, lost), rewound, path, 1)
    assert [resume for resume, _ in calls[6:]] == [rewound] * 2, "not from what another training has left"
    with pytest.raises(DeadWorker), noticing_dead_workers():
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")
    with pytest.raises(RuntimeError, match="out of memory"), noticing_dead_workers():
        raise RuntimeError("out of memory")


def announce(queue):
    """As a loader's worker does: the tensor itself is fetched later."""
    queue.put(torch.zeros(3))
    time.sleep(60)


def test_worker_that_dies_before_its_tensors_are_fetched_is_a_dead_one():
    processes = torch.multiprocessing.get_context("spawn")
    queue = processes.Queue()
    with pytest.raises(ConnectionError, match="elsewhere"), noticing_dead_workers():
        raise ConnectionError("elsewhere")
    worker = processes.Process(target=announce, args=(queue,))
    worker.start()
    assert queue._reader.poll(60)
    worker.kill()
    worker.join()
    with pytest.raises(DeadWorker, match="a process of the loader died"), noticing_dead_workers():
        queue.get(timeout=5)


def test_exploding_loss_is_as_bad_as_none(tmp_path, monkeypatch):
    """By a guard that has seen a hundred losses of 0.5; on a good one their mean goes on."""
    trainer = SimpleNamespace(
        world_size=1, global_rank=0, global_step=3, datamodule=SimpleNamespace(place_of=lambda n: (0, n)),
        fit_loop=SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=SimpleNamespace(total=SimpleNamespace(ready=8)))),
    )  # fmt: skip
    guard = LossGuard(tmp_path, explosion=4.0)
    guard.load_state_dict({"mean": 0.5, "count": 100})
    guard.on_train_batch_start(trainer, None, {"n": torch.arange(2)}, 7)
    guard.on_before_backward(trainer, None, torch.tensor(-1.9))
    assert guard.mean == pytest.approx(0.5 + 1.4 / 100)
    with pytest.raises(LostLoss, match="the loss is 2.1, far above their mean, 0.514, at step 3") as error:
        guard.on_before_backward(trainer, None, torch.tensor(2.1))
    assert error.value.place == (0, 7) and guard.mean == pytest.approx(0.514)
    assert (
        tmp_path / "lost_loss_step3.pt"
    ).is_file() and f"The batch is in {tmp_path / 'lost_loss_step3.pt'}, the last" in str(error.value)
    (tmp_path / "lost_loss_step3.pt").unlink()
    monkeypatch.setattr("torch.save", MagicMock(side_effect=OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(
        LostLoss, match="The batch is not kept .*lost_loss_step3.pt could not be saved: No space left on device"
    ):
        guard.on_before_backward(trainer, None, torch.tensor(2.1))
    assert not any(tmp_path.iterdir())


def test_two_processes_leave_out_what_one_of_them_lost(tmp_path):
    """Of batch 2, clips 16 to 23 over both."""
    alone = [word for word in CLIP if word != "trainer.devices=1"]
    words = [f"root={tmp_path}", "name=run", *alone, *TOKENIZER, *QUICK, *STEPS, *POISONED, "trainer.devices=2"]
    command = [sys.executable, "-m", "kit", "fit", "conf=stage1_tokenizer", *words]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    checkpoint = read_checkpoint(last(tmp_path), "tokenizer")
    assert checkpoint["global_step"] == 8 and place_of(checkpoint["ClipDataModule"]) == {"batches_done": 8, "left_out": [2]}
    assert 22 in torch.load(tmp_path / "run" / "lost_loss_step2.pt", weights_only=True)["n"]


def test_saves_take_no_more_than_their_share_of_the_time(tmp_path, monkeypatch):
    """Of steps of a second, where a save takes two: every step without a share, every ninth with a fifth of the time."""
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


def test_an_error_ends_the_process_although_workers_are_left(tmp_path):
    """They heed no SIGTERM, by which Python would end them."""
    code = (
        "from kit.data.datamodule import leave_sigterm_to_the_trainer as init; from torch.utils.data import DataLoader\n"
        "left = iter(DataLoader(range(9), num_workers=1, worker_init_fn=init)); next(left)\n"
        "raise ValueError('as told')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and done.stderr.endswith("ValueError: as told\n")
