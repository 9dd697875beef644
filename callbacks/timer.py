"""Ends a training after a given time."""

from __future__ import annotations

from lightning.pytorch.callbacks import Timer

from kit.optim import batches_of_a_step


class StepTimer(Timer):
    """Lightning's timer, which ends a training after `duration`, but between two optimizer steps: gradients gathered of some
    of a step's batches would be lost."""

    state_key = "Timer"  # in checkpoints, as of Lightning's

    def on_train_batch_end(self, trainer, module, *args, **kwargs):
        if trainer.fit_loop.epoch_loop.batch_progress.total.processed % batches_of_a_step(trainer, module) == 0:
            super().on_train_batch_end(trainer, module, *args, **kwargs)
