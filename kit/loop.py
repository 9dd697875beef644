"""Where Lightning's training loop stands."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import lightning as L

if TYPE_CHECKING:
    from omegaconf import DictConfig


def batches_done(trainer: L.Trainer) -> int:
    """Returns the batches that training has used on each device, over all its starts."""
    return trainer.fit_loop.epoch_loop.batch_progress.total.processed


def batches_of_a_step(trainer: L.Trainer, module: L.LightningModule) -> int:
    """Returns the batches on each device per optimizer step."""
    return accumulated(module.hparams.optimizer, trainer)


def accumulated(optimizer: Mapping, trainer: L.Trainer | DictConfig) -> int:
    """As `batches_of_a_step`, from the config's `optimizer` and the trainer or its config: a module under manual optimization
    accumulates by the first."""
    return optimizer.get("accumulate", trainer.accumulate_grad_batches)


def between_steps(trainer: L.Trainer, module: L.LightningModule) -> bool:
    """Returns whether no gradients are gathered, which no checkpoint keeps: a step's batches are all done."""
    return batches_done(trainer) % batches_of_a_step(trainer, module) == 0


def validates_next(trainer: L.Trainer) -> bool:
    """Returns whether a validation follows the batch that has just been trained on.

    A validation by the clock (`trainer.val_check_interval=00:10:00`) cannot be foreseen.
    """
    every = trainer.val_check_batch
    due = trainer.should_stop or (isinstance(every, int) and batches_done(trainer) % every == 0)
    return trainer.enable_validation and due


def logs_now(module: L.LightningModule) -> bool:
    """Returns whether the values logged by this training step are written: one step in `trainer.log_every_n_steps`.

    The other steps need not compute them or gather them from all processes. Without a trainer nothing is written.
    """
    return module._trainer is not None and module._trainer._logger_connector.should_update_logs


def write_logs(trainer: L.Trainer):
    """Writes what this training step has logged if it is due, as Lightning does after the hook `on_train_batch_end`: for a
    callback that ends the run there."""
    trainer._logger_connector.update_train_step_metrics()
