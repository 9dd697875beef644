"""Ends a training after a given time."""

from __future__ import annotations

from lightning.pytorch.callbacks import Timer
from lightning.pytorch.utilities import rank_zero_info

from kit.loop import between_steps


class StepTimer(Timer):
    """Lightning's timer, which ends a training after `duration`, but between two optimizer steps: gradients gathered of some
    of a step's batches would be lost."""

    state_key = "Timer"  # in checkpoints, as of Lightning's

    def on_train_batch_end(self, trainer, module, *args, **kwargs):
        if between_steps(trainer, module):
            super().on_train_batch_end(trainer, module, *args, **kwargs)

    def on_fit_end(self, trainer, module):
        left, done = self.time_remaining(), f"step {trainer.global_step} of {trainer.max_steps}"
        if left is not None and left <= 0 and trainer.global_step < trainer.max_steps:
            rank_zero_info(f"  trainer.max_time is over at {done}; with a longer one ckpt=last resumes from there")
