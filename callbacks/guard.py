"""Stops a run at a bad loss, before it reaches the weights."""

from __future__ import annotations

import math
from pathlib import Path

import lightning as L
import torch

from kit.files import disk_errors, last_checkpoint, not_saved, written_aside
from kit.retries import LostLoss

SPAN = 100  # losses in the running mean, about


class LossGuard(L.Callback):
    """Raises `LostLoss`, before the optimizer step, on a loss that is not finite or far above the ones before it.

    It saves the batch with that loss.

    Args:
        folder: where `lost_loss_step<N>.pt` goes, written by the first process with a bad loss.
        explosion: a loss is bad if its size exceeds the running mean of the losses' sizes this many times, once there are
            100 in this stage; None: any finite loss is good. In adversarial training the losses of both sides count alike.
    """

    def __init__(self, folder: str, explosion: float | None = None):
        self.folder, self.explosion, self.batch = Path(folder), explosion, None
        self.stage, self.mean, self.count = 0, 0.0, 0

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.batch = batch
        if (stage := batch.get("stage", 0)) != self.stage:  # losses of different clips do not compare
            self.stage, self.mean, self.count = stage, 0.0, 0

    def on_before_backward(self, trainer, module, loss):
        scaler = getattr(trainer.precision_plugin, "scaler", None)  # of 16-mixed, which has multiplied the loss by then
        loss = loss.item() / (scaler.get_scale() if scaler else 1)
        size = abs(loss)
        limit = self.explosion * self.mean if self.explosion and self.count >= SPAN else math.inf
        good = size <= limit and math.isfinite(size)
        if good:
            self.count += 1
            self.mean += (size - self.mean) / min(self.count, SPAN)
        where = [good] if trainer.world_size == 1 else self._of_all(trainer, good)
        if all(where):
            return
        path = self.folder / f"lost_loss_step{trainer.global_step}.pt"
        kept = f"in {path}"
        if trainer.global_rank == where.index(False):
            kept = self._keep(path)
        far = f", far above their mean, {self.mean:g}," if math.isfinite(size) else ""
        message = "the loss of another device is lost" if good else f"the loss is {loss:g}{far}"
        last = last_checkpoint(self.folder)
        saved = f"the last good checkpoint is {last}" if last.is_file() else "no checkpoint is saved yet"
        data, batch = trainer.datamodule, trainer.fit_loop.epoch_loop.batch_progress.total.ready - 1
        raise LostLoss(
            f"{message} at step {trainer.global_step}; training stopped before the weights were touched. The batch is "
            f"{kept}, {saved}; a lower optimizer.lr or trainer.precision=32-true often helps",
            position=data.position_of(batch),
        )

    def _keep(self, path: Path) -> str:
        """Saves the batch; says where it is, or why it could not be saved."""
        try:
            with disk_errors(), written_aside(path) as aside:
                torch.save(self.batch, aside)
        except OSError as error:
            return f"not kept ({not_saved(path, error)})"
        return f"in {path}"

    @staticmethod
    def _of_all(trainer, good: bool) -> list[bool]:
        flag = torch.tensor(good, device=trainer.strategy.root_device)
        return trainer.strategy.all_gather(flag).flatten().tolist()

    def state_dict(self) -> dict:
        return {"stage": self.stage, "mean": self.mean, "count": self.count}

    def load_state_dict(self, state: dict):
        self.stage, self.mean, self.count = state.get("stage", 0), state["mean"], state["count"]
