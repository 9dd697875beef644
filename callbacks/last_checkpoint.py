"""The checkpoint that a run continues from."""

from __future__ import annotations

import signal
import threading
import time
from pathlib import Path

from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities import rank_zero_info

from kit.checkpoint import TrainingCheckpointIO
from kit.optim import batches_of_a_step
from kit.values import check_whole_number


class Preempted(SystemExit):
    """The run was told to end, and has saved. Its code is that of a process which the signal ended."""

    def __init__(self):
        super().__init__(128 + signal.SIGTERM)


class LastCheckpoint(Checkpoint):
    """Keeps `last.ckpt` up to date: every so many optimizer steps, as far as that leaves most of the time for training, when
    training ends, and when the process is told to end (SIGTERM, as schedulers send it before they take a machine away), after
    the step it is at.

    Being a `Checkpoint`, Lightning calls it after all other callbacks, so that it saves what they hold of this step.

    Args:
        folder: of the checkpoints. every: optimizer steps between two saves.
        share: of the time that they may take, above 0 and up to 1; a large model, or one of quick steps, is saved less often.
            The best checkpoint and those of stages are not counted.
        may_fail: saves in a row that may fail, for example on a full disk, before the run stops; the last of a training may
            not.
    Raises:
        ValueError: if `every` is below 1, `may_fail` below 0, or `share` is none.
    """

    def __init__(self, folder: str, every: int, share: float = 1.0, may_fail: int = 0):
        for key, value, least in (("every", every, 1), ("may_fail", may_fail, 0)):
            check_whole_number(f"callbacks.last.{key}", value, least)
        if not 0 < share <= 1:
            raise ValueError(f"callbacks.last.share={share}; expected a share of the time, above 0 and up to 1")
        self.share, self.rest_until = share, 0.0  # on the clock that `time.monotonic` reads
        self.path, self.every, self.may_fail = Path(folder) / "last.ckpt", every, may_fail
        self.saved = None
        self.told_to_end = False

    def on_fit_start(self, trainer, module):
        self._on_sigterm(signal.SIG_DFL)  # nothing to save yet: it ends at once

    def on_train_start(self, trainer, module):
        self._on_sigterm(self._end)

    @staticmethod
    def _on_sigterm(handler):
        """In place of Lightning's handler, which ends within a step; at the end Lightning brings back what was before."""
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)

    def _end(self, *_):
        self.told_to_end = True

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.fit_loop.epoch_loop.batch_progress.total.processed % batches_of_a_step(trainer, module):
            return  # the gradients gathered so far would be lost
        if trainer.strategy.reduce_boolean_decision(self.told_to_end, all=False):
            self._save(trainer, may_fail=0)
            rank_zero_info(f"  told to end: {self.path} is of step {trainer.global_step}; ckpt=last goes on from there")
            raise Preempted
        if trainer.global_step and trainer.global_step % self.every == 0:
            if trainer.strategy.broadcast(time.monotonic() >= self.rest_until):
                self._save(trainer, self.may_fail)

    def on_validation_end(self, trainer, module):
        if trainer.global_step and trainer.global_step == self.saved:  # once more, with what the validation told others
            self.saved = None
            self._save(trainer, self.may_fail)
        else:
            self._check(trainer, self.may_fail)  # other callbacks save here

    def on_train_end(self, trainer, module):
        self._save(trainer, may_fail=0)

    def on_fit_end(self, trainer, module):
        self._save(trainer, may_fail=0)  # where there was no step left to train

    def on_load_checkpoint(self, trainer, module, checkpoint):
        if self.path.is_file():  # else it is another run's that this one goes on from
            self.saved = checkpoint["global_step"]

    def _save(self, trainer, may_fail: int):
        if trainer.global_step != self.saved:
            begin = time.monotonic()
            trainer.save_checkpoint(self.path, weights_only=False)  # with optimizer and callbacks
            end = time.monotonic()
            self.rest_until = max(self.rest_until, end) + (end - begin) * (1 / self.share - 1)
            if self._check(trainer, may_fail):
                self.saved = trainer.global_step

    def _check(self, trainer, may_fail: int) -> bool:
        """Whether the last checkpoint of any kind has been saved.

        Raises:
            OSError: if more than `may_fail` in a row have failed since the last look, on all processes.
        """
        io = trainer.strategy.checkpoint_io
        if not isinstance(io, TrainingCheckpointIO):  # any other raises
            return True
        (worst, failure), failed = trainer.strategy.broadcast((io.look(), io.failed))  # in shards all fail alike
        if worst > may_fail:
            raise OSError(f"{failure}. Make room and go on with ckpt=last")
        return not failed
