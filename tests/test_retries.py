"""Runs that lose a loss or a loader worker: they resume from the last checkpoint and leave out the lost batch."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
import weakref
from functools import partial
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch

from callbacks import LossGuard
from kit.checkpoint import read_checkpoint
from kit.data.shapes import Shapes
from kit.data.workers import end_workers, leave_signals_to_the_trainer
from kit.retries import DeadWorker, LostLoss, noticing_dead_workers, with_retries
from tests.fixtures import CLIP, QUICK, TOKENIZER, fit_tokenizer
from tests.interrupted import ROOT, STEPS, last, said, same, stopped_midway
from tests.processes import children, together


def progress_of(state: dict) -> dict:
    """Returns the progress from a DataModule's state, without its settings and the stages' names."""
    return {key: value for key, value in state.items() if key not in ("settings", "names")}


class Poisoned(Shapes):
    """Shapes whose training clip 22 is NaN."""

    def __getitem__(self, n):
        item = super().__getitem__(n)
        return {**item, "video": item["video"] * (float("nan") if n == 22 and self.split == "train" else 1)}


POISONED = ["data.source._target_=tests.test_retries.Poisoned", "recipe.tokenizer.steps=8", "callbacks.last.every=2"]


def test_a_lost_loss_goes_back_and_past_its_batch(tmp_path, monkeypatch):
    """Batch 5 has the NaN clip; the last checkpoint is of step 4."""
    seen = []
    monkeypatch.setattr(
        "callbacks.LastCheckpoint.on_train_batch_start", lambda *a: seen.append(a[3]["n"][0].item()), raising=False
    )
    with pytest.warns(UserWarning, match="Resuming from .*without that batch; 1 retries left"):
        assert fit_tokenizer(tmp_path, *STEPS, *POISONED, name="run") == 0
    assert seen == [0, 4, 8, 12, 16, 20, 16, 24, 28, 32]
    checkpoint = read_checkpoint(last(tmp_path), "tokenizer")
    assert checkpoint["global_step"] == 8
    assert progress_of(checkpoint["ClipDataModule"]) == {
        "batches_done": 8,
        "left_out": [5],
    }
    assert 22 in torch.load(tmp_path / "run" / "lost_loss_step5.pt", weights_only=True)["n"]
    guard = next(state for name, state in checkpoint["callbacks"].items() if name.startswith("LossGuard"))
    assert guard["count"] == 8 and guard["mean"] > 0, "kept over a resume"
    seen.clear()
    more = [word for word in POISONED if "steps" not in word] + ["recipe.tokenizer.steps=10", "ckpt=last"]
    assert fit_tokenizer(tmp_path, *STEPS, *more, name="run") == 0
    assert seen == [36, 40], "still without it"


def test_a_stage_leaves_out_a_batch_of_its_own(tmp_path):
    """A batch of the second stage is lost when the last checkpoint is of the first."""
    stages = "stages={first:{steps:4},second:{steps:7,data:{batch_size:16}}}"
    switch = "+callbacks.stage_switch={_target_:callbacks.StageSwitch,folder:'${folder}/checkpoints',monitor:val/psnr}"
    with pytest.warns(UserWarning, match="without that batch"):
        assert fit_tokenizer(tmp_path, *STEPS, POISONED[0], stages, switch, "callbacks.last.every=4", name="run") == 0
    state = read_checkpoint(last(tmp_path), "tokenizer")["StagedClips"]
    assert progress_of(state) == {"batches_done": 11, "stage": 1, "ended": {0: 4}, "left_out": [[], [1]]}


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
        os.kill(children(process.pid)[-1], signal.SIGKILL)
    assert process.wait() == 0 and "with new processes; 1 retries left" in said(tmp_path), said(tmp_path)
    assert same(read_checkpoint(last(tmp_path), "tokenizer"), whole)


@pytest.mark.parametrize("saves", [True, False])
def test_after_a_long_run_that_saved_as_many_retries_follow_again(saves, tmp_path, monkeypatch):
    """Six runs fail of which each takes two hours; one retry is allowed."""
    path, clock, runs = tmp_path / "last.ckpt", [0.0], []
    path.touch()
    monkeypatch.setattr("kit.retries.time", SimpleNamespace(monotonic=lambda: clock[0]))

    def train(resume, lost):
        runs.append(resume)
        if len(runs) > 6:
            return "done"
        clock[0] += 7200
        if saves:
            os.utime(path, ns=(len(runs), len(runs)))
        raise DeadWorker("a process of the loader died")

    with pytest.warns(UserWarning, match="0 retries left"):
        if saves:
            assert with_retries(train, path, path, 1) == "done"
        else:
            with pytest.raises(DeadWorker):
                with_retries(train, path, path, 1)
    assert len(runs) == (7 if saves else 2)


def test_what_no_retry_mends_is_raised(tmp_path):
    """This holds if there is no checkpoint to resume from, no retry left, or the error is of another kind."""
    path, calls = tmp_path / "last.ckpt", []

    def fails(error, resume, places):
        calls.append((resume, places))
        raise error

    with pytest.raises(ValueError, match="retries=-1; expected a whole number of 0 or more"):
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
    with pytest.raises(DeadWorker, match="unsupported callable"), noticing_dead_workers():
        try:
            raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")  # amid any code, as `inspect`'s
        except Exception as error:
            raise TypeError("unsupported callable") from error
    with pytest.raises(RuntimeError, match="out of memory"), noticing_dead_workers():
        raise RuntimeError("out of memory")


def announce(queue):
    """Puts a tensor into a queue as a loader worker does: the reader fetches the tensor itself later."""
    queue.put(torch.zeros(3))
    time.sleep(60)


def test_worker_that_dies_before_its_tensors_are_fetched_is_a_dead_one():
    processes = torch.multiprocessing.get_context("fork")
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


def test_a_worker_that_dies_is_noticed_behind_the_error_that_others_make_of_it():
    with pytest.raises(DeadWorker, match="a process of the loader died: 'no batch'"), noticing_dead_workers():
        try:
            raise RuntimeError("DataLoader worker (pid 3) is killed by signal: Killed.")
        except RuntimeError:
            raise KeyError("no batch")  # noqa: B904, as a library may


@pytest.mark.parametrize("scaler", [None, torch.amp.GradScaler("cpu", init_scale=65536.0)], ids=["plain", "float16"])
def test_exploding_loss_is_as_bad_as_none(scaler, tmp_path, monkeypatch):
    """The guard has seen a hundred losses of 0.5; a normal loss updates their mean, an exploding one raises."""

    def loss(value: float) -> torch.Tensor:  # as Lightning hands it over
        return torch.tensor(value * (scaler.get_scale() if scaler else 1))

    trainer = SimpleNamespace(
        world_size=1, global_rank=0, global_step=3, precision_plugin=SimpleNamespace(scaler=scaler),
        datamodule=SimpleNamespace(position_of=lambda n: (0, n)),
        fit_loop=SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=SimpleNamespace(total=SimpleNamespace(ready=8)))),
    )  # fmt: skip
    guard, module = LossGuard(tmp_path, explosion=4.0), torch.nn.Linear(1, 1)

    def step_with(value: float):
        guard.on_before_backward(trainer, module, loss(value))
        guard.on_after_backward(trainer, module)
        guard.on_before_optimizer_step(trainer, module, None)

    guard.load_state_dict({"mean": 0.5, "count": 100})
    guard.on_train_batch_start(trainer, None, {"n": torch.arange(2)}, 7)
    step_with(-1.9)
    assert guard.mean == pytest.approx(0.5 + 1.4 / 100)
    with pytest.raises(LostLoss, match="the loss is 2.1, far above their mean, 0.514, at step 3") as error:
        step_with(2.1)
    assert error.value.position == (0, 7) and guard.mean == pytest.approx(0.514)
    batch = tmp_path / "lost_loss_step3.pt"
    assert batch.is_file() and f"The batch is in {batch}, no checkpoint is saved yet" in str(error.value)
    batch.unlink()
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "last.ckpt").touch()
    with pytest.raises(LostLoss, match="the last good checkpoint is .*last.ckpt"):
        step_with(2.1)
    batch.unlink()
    shutil.rmtree(tmp_path / "checkpoints")
    monkeypatch.setattr("torch.save", MagicMock(side_effect=OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(
        LostLoss, match="The batch is not kept .*lost_loss_step3.pt could not be saved: No space left on device"
    ):
        step_with(2.1)
    assert not any(tmp_path.iterdir())

    guard.on_train_batch_start(trainer, None, {"n": torch.arange(2), "stage": 1}, 8)
    step_with(2.1)
    assert guard.state_dict() == {"stage": 1, "mean": pytest.approx(2.1), "count": 1}, "a stage's losses are its own"

    guard.load_state_dict({"stage": 1, "mean": 0.5, "count": 99})
    guard.on_train_batch_start(trainer, None, {"n": torch.arange(2), "stage": 1}, 9)
    step_with(2.1)  # the hundredth of the stage, in which the run goes on
    with pytest.raises(LostLoss):
        step_with(2.1)

    module.weight.grad = torch.tensor([[torch.inf]])
    if scaler:  # which leaves the step out by itself, and lowers its factor
        step_with(0.5)
    else:
        with pytest.raises(LostLoss, match="the gradients are not finite, with a loss of 0.5, at step 3"):
            step_with(0.5)


@pytest.mark.parametrize("fault", ["the loss is nan", "the gradients are not finite, with a loss of 0.5,"])
def test_the_batch_that_was_lost_is_left_out_wherever_in_its_step_it_comes(fault, tmp_path):
    """The second of the three batches of a step; the others are good, but gradients add up."""
    total, module = SimpleNamespace(ready=0), torch.nn.Linear(1, 1)
    trainer = SimpleNamespace(
        world_size=1, global_rank=0, global_step=3, precision_plugin=None,
        datamodule=SimpleNamespace(position_of=lambda n: (0, n)),
        fit_loop=SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=SimpleNamespace(total=total))),
    )  # fmt: skip
    guard, nan = LossGuard(tmp_path), float("nan")
    for number in range(3):
        total.ready = number + 1
        guard.on_train_batch_start(trainer, None, {"n": torch.tensor([number]), "video": torch.zeros(9)}, number)
        guard.on_before_backward(trainer, None, torch.tensor(nan if number == 1 and "loss is" in fault else 0.5))
        module.weight.grad = torch.tensor([[nan if number else 1.0]])
        guard.on_after_backward(trainer, module)
    assert ["video" in each.batch for each in guard.step] == [False, False, True], "large clips are not all held"
    with pytest.raises(LostLoss, match=f"{fault} at step 3") as error:
        guard.on_before_optimizer_step(trainer, module, None)
    assert error.value.position == (0, 1)
    assert torch.load(tmp_path / "lost_loss_step3.pt", weights_only=True)["n"].tolist() == [1]


@pytest.mark.parametrize("other", [0.0, 1.0, 2.0])
def test_the_device_with_the_first_fault_keeps_its_batch(other, tmp_path):
    """This one's second batch has a loss that is too large, and that is all its own: no gradient tells the others. The other
    device has lost the loss or the gradients of its first batch, or the loss of its second."""
    total = SimpleNamespace(ready=0)
    strategy = SimpleNamespace(root_device="cpu", all_gather=lambda own: torch.stack([own, torch.tensor(other)]))
    trainer = SimpleNamespace(
        world_size=2, global_rank=0, global_step=3, precision_plugin=None, strategy=strategy,
        datamodule=SimpleNamespace(position_of=lambda n: (0, n)),
        fit_loop=SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=SimpleNamespace(total=total))),
    )  # fmt: skip
    guard, module = LossGuard(tmp_path, explosion=4.0), torch.nn.Linear(1, 1)
    guard.load_state_dict({"mean": 0.5, "count": 100})
    for number, value in enumerate((0.5, 9.0)):
        total.ready = number + 1
        guard.on_train_batch_start(trainer, None, {"n": torch.tensor([number])}, number)
        guard.on_before_backward(trainer, None, torch.tensor(value))
        guard.on_after_backward(trainer, module)
    own = other == 2.0
    with pytest.raises(LostLoss, match="the loss is 9, far above" if own else "of another device are lost") as error:
        guard.on_before_optimizer_step(trainer, module, None)
    assert error.value.position == (0, int(other) // 2)
    assert (tmp_path / "lost_loss_step3.pt").exists() == own


def test_two_processes_leave_out_what_one_of_them_lost(tmp_path):
    """Batch 2 has clips 16 to 23, distributed over both; clip 22 is NaN."""
    alone = [word for word in CLIP if word != "trainer.devices=1"]
    words = [f"root={tmp_path}", "name=run", *alone, *TOKENIZER, *QUICK, *STEPS, *POISONED, "trainer.devices=2"]
    together(["fit", "conf=stage1_tokenizer", *words], 2, tmp_path / "said")
    checkpoint = read_checkpoint(last(tmp_path), "tokenizer")
    assert checkpoint["global_step"] == 8
    assert progress_of(checkpoint["ClipDataModule"]) == {"batches_done": 8, "left_out": [2]}
    assert 22 in torch.load(tmp_path / "run" / "lost_loss_step2.pt", weights_only=True)["n"]


def test_an_error_ends_the_process_although_workers_are_left(tmp_path):
    """Workers ignore SIGTERM, with which Python would end them."""
    code = (
        "from kit.data.workers import leave_signals_to_the_trainer as init; from torch.utils.data import DataLoader\n"
        "left = iter(DataLoader(range(9), num_workers=1, worker_init_fn=init)); next(left)\n"
        "raise ValueError('as told')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and done.stderr.endswith("ValueError: as told\n")


def test_at_exit_workers_alone_are_killed(monkeypatch):
    """Other children of the process are left to whoever started them, and their ends are reported as before."""
    handled = {}
    monkeypatch.setattr("signal.signal", handled.__setitem__)
    worker, other = MagicMock(daemon=True), MagicMock(daemon=False)
    for alive, reported in (([other], True), ([worker, other], False)):
        monkeypatch.setattr("multiprocessing.active_children", lambda alive=alive: alive)
        end_workers()
        assert (worker.kill.called, other.kill.called, signal.SIGCHLD not in handled) == (not reported, False, reported)


def test_workers_leave_both_signals_to_the_trainer(monkeypatch):
    handled = {}
    monkeypatch.setattr("signal.signal", handled.__setitem__)
    leave_signals_to_the_trainer(0)
    assert handled == dict.fromkeys((signal.SIGTERM, signal.SIGUSR1, signal.SIGINT), signal.SIG_IGN)
