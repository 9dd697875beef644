"""Stops a run at a bad loss or gradient, before it reaches the weights."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import lightning as L
import torch
from torch import Tensor

from kit.files import disk_errors, last_checkpoint, not_saved, written_aside
from kit.optim import gradient_norm
from kit.retries import LostLoss

SPAN = 100  # losses in the running mean, about
PIXELS = "video", "feature"  # what is large in a batch


@dataclass
class Backward:
    """A backward pass of the current optimizer step: its loss, its batch with the number of that, and the norm of the
    gradients after it, as far as they are gathered."""

    loss: Tensor
    batch: dict
    number: int
    norm: Tensor | None = None


class LossGuard(L.Callback):
    """Raises `LostLoss`, before the optimizer step, on a loss that is not finite or far above the ones before it, and on
    gradients that are not finite.

    It saves the batch; of one that is not the last of its optimizer step all but the pixels, which would take memory. The
    losses and gradients of a step are looked at together, since a GPU would have to wait each time.

    Args:
        folder: where `lost_loss_step<N>.pt` goes, written by the first process with a bad loss.
        explosion: a loss is bad if its size exceeds the running mean of the losses' sizes this many times, once there are
            100 in this stage; None: any finite loss is good. In adversarial training the losses of both sides count alike.
    """

    def __init__(self, folder: str, explosion: float | None = None):
        self.folder, self.explosion = Path(folder), explosion
        self.batch, self.step = None, []  # the batch at hand; all `Backward` of the current optimizer step
        self.stage, self.mean, self.count = 0, 0.0, 0

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.batch = batch
        if (stage := batch.get("stage", 0)) != self.stage:  # losses of different clips do not compare
            self.stage, self.mean, self.count = stage, 0.0, 0

    def on_before_backward(self, trainer, module, loss):
        for earlier in self.step:
            if earlier.batch is not self.batch:
                earlier.batch = {key: value for key, value in earlier.batch.items() if key not in PIXELS}
        scaler = self._scaler(trainer)
        loss = loss.detach() / (scaler.get_scale() if scaler else 1)
        self.step.append(Backward(loss, self.batch, trainer.fit_loop.epoch_loop.batch_progress.total.ready - 1))

    def on_after_backward(self, trainer, module):
        last = self.step[-1]
        bounded = self._scaler(trainer) is not None  # it leaves out steps with infinite gradients itself
        last.norm = torch.zeros_like(last.loss) if bounded else gradient_norm(module.parameters()).to(last.loss.device)

    def on_before_optimizer_step(self, trainer, module, optimizer):
        step, self.step = self.step, []
        found = torch.stack([x.float() for each in step for x in (each.loss, each.norm)]).tolist()
        own = self._first_fault(found[::2], found[1::2])
        of_all = [own] if trainer.world_size == 1 else self._of_all(trainer, own)
        if (fault := min(of_all)) == math.inf:
            return
        lost = step[int(fault) // 2]
        loss = lost.loss.item()
        if own != fault:
            message = "the loss or the gradients of another device are lost"
        elif fault % 2:
            message = f"the gradients are not finite, with a loss of {loss:g},"
        else:
            message = f"the loss is {loss:g}" + (f", far above their mean, {self.mean:g}," if math.isfinite(loss) else "")
        self._raise(trainer, message, lost, keep=trainer.global_rank == of_all.index(fault))

    def _first_fault(self, losses: list[float], norms: list[float]) -> float:
        """Returns twice the number of the first bad backward pass of a step, and 1 more if its loss is good; infinity if none
        is bad. Where a device's loss is bad, the gradients of all are: its own fault comes first."""
        for n, (loss, norm) in enumerate(zip(losses, norms, strict=True)):
            if not self._is_good(loss):
                return 2 * n
            if not math.isfinite(norm):
                return 2 * n + 1
        return math.inf

    def _is_good(self, loss: float) -> bool:
        """Whether a loss is finite and not too large; then it counts in the mean."""
        size = abs(loss)
        limit = self.explosion * self.mean if self.explosion and self.count >= SPAN else math.inf
        good = size <= limit and math.isfinite(size)
        if good:
            self.count += 1
            self.mean += (size - self.mean) / min(self.count, SPAN)
        return good

    def _raise(self, trainer, message: str, lost: Backward, keep: bool):
        path = self.folder / f"lost_loss_step{trainer.global_step}.pt"
        kept = self._keep(path, lost.batch) if keep else f"in {path}"
        last = last_checkpoint(self.folder)
        saved = f"the last good checkpoint is {last}" if last.is_file() else "no checkpoint is saved yet"
        raise LostLoss(
            f"{message} at step {trainer.global_step}; training stopped before the weights were touched. The batch is "
            f"{kept}, {saved}; a lower optimizer.lr or trainer.precision=32-true often helps",
            position=trainer.datamodule.position_of(lost.number),
        )

    @staticmethod
    def _keep(path: Path, batch: dict) -> str:
        """Saves the batch; says where it is, or why it could not be saved."""
        try:
            with disk_errors(), written_aside(path) as aside:
                torch.save(batch, aside)
        except OSError as error:
            return f"not kept ({not_saved(path, error)})"
        return f"in {path}"

    @staticmethod
    def _scaler(trainer) -> torch.amp.GradScaler | None:
        """Returns what multiplies losses under 16-mixed."""
        return getattr(trainer.precision_plugin, "scaler", None)

    @staticmethod
    def _of_all(trainer, fault: float) -> list[float]:
        return trainer.strategy.all_gather(torch.tensor(fault, device=trainer.strategy.root_device)).flatten().tolist()

    def state_dict(self) -> dict:
        return {"stage": self.stage, "mean": self.mean, "count": self.count}

    def load_state_dict(self, state: dict):
        self.stage, self.mean, self.count = state.get("stage", 0), state["mean"], state["count"]
