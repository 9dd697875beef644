"""Stops a run whose loss is no longer a number, before it reaches the weights."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import torch


class NonFiniteGuard(L.Callback):
    """Raises on a NaN or infinite loss, before the optimizer step, and saves the batch that made it.

    Args:
        folder: where `nonfinite_step<N>.pt` goes.
    """

    def __init__(self, folder: str):
        self.folder, self.batch = Path(folder), None

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.batch = batch

    def on_before_backward(self, trainer, module, loss):
        if torch.isfinite(loss):
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"nonfinite_step{trainer.global_step}.pt"
        torch.save(self.batch, path)
        raise ValueError(
            f"the loss is {loss.item()} at step {trainer.global_step}; training stopped before the weights were touched. "
            f"The batch is in {path}, the last good checkpoint in {self.folder / 'checkpoints'}; a lower optimizer.lr or "
            f"trainer.precision=32-true often helps"
        )
