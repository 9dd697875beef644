"""Checkpoints to go back to."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch.callbacks import Checkpoint

from kit.loop import between_steps, validates_next
from kit.values import check_whole_number


class KeptCheckpoints(Checkpoint):
    """Saves `step=N.ckpt` every so many optimizer steps, from which a training can go on if it went wrong later.

    Like `LastCheckpoint` it saves between two steps, and after a validation that follows.

    Args:
        folder: of the checkpoints. every: optimizer steps between two; 0: none. keep: how many stay, those written last.
    Raises:
        ValueError: if `every` is below 0 or `keep` below 1.
    """

    def __init__(self, folder: str, every: int = 0, keep: int = 2):
        for key, value, least in (("every", every, 0), ("keep", keep, 1)):
            check_whole_number(f"callbacks.kept.{key}", value, least)
        self.folder, self.every, self.keep = Path(folder), every, keep
        self.saved = 0  # step of the last one

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if not validates_next(trainer):
            self._save_if_due(trainer, module)

    def on_validation_end(self, trainer, module):
        if not trainer.sanity_checking:
            self._save_if_due(trainer, module)

    def _save_if_due(self, trainer, module):
        step = trainer.global_step
        if not self.every or step % self.every or step == self.saved or not between_steps(trainer, module):
            return
        self.saved = step
        trainer.save_checkpoint(self.folder / f"step={step}.ckpt", weights_only=False)
        if trainer.is_global_zero:  # a save that failed has left nothing, and so takes no other's place
            written = sorted(self.folder.glob("step=*.ckpt"), key=lambda path: path.stat().st_mtime_ns)
            for path in written[: -self.keep]:
                trainer.strategy.remove_checkpoint(path)
