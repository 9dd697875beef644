"""Callbacks by themselves, told of moments that few trainings come to."""

from __future__ import annotations

import math
import signal
import threading
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from callbacks import BestCheckpoint, CodeUse, CompileLayers, LastCheckpoint, LossGuard, StageSwitch, VideoLogger
from kit.data.staged import StagedClips
from kit.generator.sampler import Sampling
from kit.inspection import bit_use
from kit.loop import validates_next
from kit.retries import LostLoss
from kit.scales import ScaleSchedule
from kit.stages import Stage, StagePlan
from kit.training_checkpoint import TrainingCheckpointIO


def trainer_at(batches: int, **more) -> SimpleNamespace:
    """A trainer that has gone through so many batches."""
    total = SimpleNamespace(processed=batches, ready=batches)
    loop = SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=SimpleNamespace(total=total)))
    return SimpleNamespace(fit_loop=loop, **more)


def test_a_validation_comes_where_it_is_due_and_wanted():
    trainer = trainer_at(4, val_check_batch=2, should_stop=False, enable_validation=False)
    assert not validates_next(trainer), "saves would wait for it forever"
    trainer.enable_validation = True
    assert validates_next(trainer)
    trainer.val_check_batch, trainer.should_stop = 3, True
    assert validates_next(trainer)


@pytest.mark.parametrize("saved", [0, 1])
def test_nothing_is_saved_amid_a_step(saved, tmp_path):
    """A validation by the clock may come between the batches of one; their gradients are in no checkpoint."""
    saves = []
    strategy = SimpleNamespace(
        checkpoint_io=SimpleNamespace(failed=0), broadcast=lambda x: x, reduce_boolean_decision=lambda x, all: x
    )
    trainer = trainer_at(
        4, strategy=strategy, global_step=1, max_steps=9, sanity_checking=False, training=False, accumulate_grad_batches=3,
        save_checkpoint=lambda *_, **__: saves.append(1),
    )  # fmt: skip
    last = LastCheckpoint(str(tmp_path), every=1)
    last.saved = saved
    last.on_validation_end(trainer, SimpleNamespace(hparams=SimpleNamespace(optimizer={})))
    assert saves == []


def test_told_to_end_it_saves_before_anything_else_can_fail(tmp_path, monkeypatch):
    """A logger may be gone by then, and another callback's save at this step may have failed."""
    io, saves = TrainingCheckpointIO(), []
    io.failed = io.most_failed = 1  # of another callback

    def save(*_, **__):
        io.failed = 0
        saves.append(1)

    monkeypatch.setattr("callbacks.last_checkpoint.write_logs", MagicMock(side_effect=ConnectionError("no server")))
    strategy = SimpleNamespace(checkpoint_io=io, broadcast=lambda x: x, reduce_boolean_decision=lambda x, all: x)
    trainer = trainer_at(4, strategy=strategy, global_step=4, max_steps=9, training=True, save_checkpoint=save)
    last = LastCheckpoint(str(tmp_path), every=100, may_fail=2)
    last.received = signal.SIGTERM
    with pytest.raises(ConnectionError):
        last._save_if_due(trainer)
    assert saves == [1] and last.saved == 4


def test_signals_are_left_alone_outside_of_the_main_thread(tmp_path):
    failed = []

    def start():
        try:
            LastCheckpoint(str(tmp_path), every=1).on_train_start(None, None)
        except ValueError as error:
            failed.append(error)

    thread = threading.Thread(target=start)
    thread.start(), thread.join()
    assert not failed


def test_a_best_checkpoint_that_was_not_saved_leaves_the_scores_as_they_were(tmp_path, monkeypatch):
    best = BestCheckpoint(tmp_path, "best", monitor="val/psnr", mode="max")
    path = best.best_model_path = best.kth_best_model_path = str(tmp_path / "best.ckpt")
    best.best_k_models, best.best_model_score = {path: torch.tensor(1.0)}, torch.tensor(1.0)
    better = {path: torch.tensor(9.0)}
    monkeypatch.setattr(ModelCheckpoint, "on_validation_end", lambda self, *_: self.best_k_models.update(better))
    strategy = SimpleNamespace(checkpoint_io=SimpleNamespace(failed=1), broadcast=lambda x: x)
    best.on_validation_end(SimpleNamespace(strategy=strategy), None)
    assert best.best_k_models == {path: 1.0}


def test_samples_of_a_validation_are_drawn_as_asked(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("callbacks.video_logger.forced_and_free", lambda *args: asked.append(args[-1]) or {})
    values = {"temperature": 0.3, "guidance": {"kind": "rising", "first": 1.0, "last": 5.0, "fine": 10.0}}
    module = SimpleNamespace(kind="generator", feature=lambda _: None, tokenizer=None, schedule=None)
    model = SimpleNamespace(condition=SimpleNamespace(prompts=lambda _: []))
    VideoLogger(str(tmp_path), sampling=values).rows(module, model, {})
    assert asked == [Sampling.of(values)] and asked[0].guidance.fine == 10.0


@pytest.mark.parametrize("value", [math.inf, -math.inf])
def test_an_infinite_loss_is_lost_too(value, tmp_path):
    data = SimpleNamespace(position_of=lambda n: (0, n))
    trainer = trainer_at(1, world_size=1, global_rank=0, global_step=3, precision_plugin=None, datamodule=data)
    guard = LossGuard(tmp_path)
    guard.on_train_batch_start(trainer, None, {"n": torch.arange(2)}, 0)
    guard.on_before_backward(trainer, None, torch.tensor(value))
    guard.on_after_backward(trainer, torch.nn.Linear(1, 1))
    with pytest.raises(LostLoss, match="the loss is -?inf at step 3"):
        guard.on_before_optimizer_step(trainer, None, None)
    assert (guard.mean, guard.count) == (0, 0)


def test_a_stage_ends_by_a_metric_that_is_logged_and_by_no_sanity_check():
    switch = StageSwitch("folder", "val/score")
    data = StagedClips(StagePlan((Stage("a", 9, patience=1),)), [], [9])
    trainer = SimpleNamespace(datamodule=data, sanity_checking=True, accumulate_grad_batches=1)
    trainer.callback_metrics = {"val/score": torch.tensor(0.1)}
    switch.on_validation_end(trainer, None)
    assert switch.best == math.inf
    trainer.sanity_checking, trainer.callback_metrics = False, {"val/loss": torch.tensor(0.1)}
    with pytest.raises(ValueError, match="monitor=val/score is not logged; choose from val/loss"):
        switch.on_validation_end(trainer, None)


def test_short_trainings_are_not_compiled(monkeypatch):
    monkeypatch.setattr("callbacks.compile.can_compile", lambda: True)
    compiles, module = CompileLayers(least_steps=4), SimpleNamespace(model=SimpleNamespace(layers=[]))
    for steps, compiled in ((3, False), (4, True)):
        compiles.on_fit_start(SimpleNamespace(max_steps=steps), module)
        assert compiles.compiled == compiled


def test_the_bits_use_is_that_of_all_devices(tmp_path):
    logged, use, schedule = {}, CodeUse(str(tmp_path)), ScaleSchedule(1, ((1, 1), (2, 2)))
    module = SimpleNamespace(device="cpu", schedule=schedule, log_dict=lambda values, **_: logged.update(values))
    here, there = torch.rand(4, 5, 6) < 0.5, torch.zeros(4, 5, 6, dtype=torch.bool)
    sums = iter([bit_use(there, schedule)["ones"] * 4, torch.tensor(4.0)])
    strategy = SimpleNamespace(reduce=lambda x, reduce_op: x + next(sums))
    trainer = SimpleNamespace(sanity_checking=False, is_global_zero=False, strategy=strategy)
    use.on_validation_batch_end(trainer, module, {"bits": here}, None, 0)
    use.on_validation_epoch_end(trainer, module)
    expected = bit_use(torch.cat([here, there]), schedule)["entropy"].mean(1)
    torch.testing.assert_close(torch.stack([logged[f"val/bit_entropy_scale{k}"] for k in (1, 2)]), expected)
