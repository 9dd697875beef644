"""The checkpoint that a run continues from."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch.callbacks import Checkpoint


class LastCheckpoint(Checkpoint):
    """Keeps `last.ckpt` up to date: every so many optimizer steps, and when training ends.

    Being a `Checkpoint`, Lightning calls it after all other callbacks, so that it saves what they hold of this step.

    Args:
        folder: of the checkpoints. every: optimizer steps between two saves.
    """

    def __init__(self, folder: str, every: int):
        self.path, self.every, self.saved = Path(folder) / "last.ckpt", every, None

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.global_step and trainer.global_step % self.every == 0:
            self._save(trainer)

    def on_validation_end(self, trainer, module):
        if trainer.global_step and trainer.global_step == self.saved:  # once more, with what the validation told others
            self.saved = None
            self._save(trainer)

    def on_train_end(self, trainer, module):
        self._save(trainer)

    def on_load_checkpoint(self, trainer, module, checkpoint):
        self.saved = checkpoint["global_step"]

    def _save(self, trainer):
        if trainer.global_step != self.saved:
            self.saved = trainer.global_step
            trainer.save_checkpoint(self.path, weights_only=False)  # with optimizer and callbacks
