"""The checkpoint that a run continues from."""

from __future__ import annotations

import signal
import threading
import time
from contextlib import suppress
from pathlib import Path

from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities import rank_zero_info

from kit.loop import between_steps, validates_next, write_logs
from kit.signals import ENDS
from kit.training_checkpoint import TrainingCheckpointIO, save_failed
from kit.values import check_whole_number


class Preempted(SystemExit):
    """Raised when a scheduler's signal has ended the run, after it has saved.

    Its exit code is that of a process which SIGTERM ended.
    """

    def __init__(self):
        super().__init__(128 + signal.SIGTERM)


class LastCheckpoint(Checkpoint):
    """Keeps `last.ckpt` up to date.

    It saves every `every` optimizer steps, as far as `share` allows, when training ends, and when SIGTERM, SIGUSR1 or Ctrl-C
    asks the process to end, after the current step. Where a validation follows a step, it saves after that: Lightning does
    not make up for a validation that is lost after a save.

    Because it is a `Checkpoint`, Lightning calls it after all other callbacks, so that it saves what they hold of this step.

    Args:
        folder: of the checkpoints. every: optimizer steps between two saves.
        share: share of the time that saving may take, above 0 and up to 1: a large model, or one of quick steps, is saved
            less often. The best checkpoint, those of stages and those kept are not counted.
        may_fail: number of saves in a row that may fail, for example on a full disk, before the run stops; the last save of
            a training may not fail.
    Raises:
        ValueError: if `every` is below 1, `may_fail` below 0, or `share` out of its range.
    """

    def __init__(self, folder: str, every: int, share: float = 1.0, may_fail: int = 0):
        for key, value, least in (("every", every, 1), ("may_fail", may_fail, 0)):
            check_whole_number(f"callbacks.last.{key}", value, least)
        if not 0 < share <= 1:
            raise ValueError(f"callbacks.last.share={share}; expected a share of the time, above 0 and up to 1")
        self.share, self.rest_until = share, 0.0  # in seconds of `time.monotonic`
        self.path, self.every, self.may_fail = Path(folder) / "last.ckpt", every, may_fail
        self.saved = None
        self.received = 0  # signal that has asked this process to end
        self.interrupt = None  # what Ctrl-C did before

    def on_train_start(self, trainer, module):
        for number in ENDS:  # in place of Lightning's, which ends within a step
            self._on_signal(number, self._end)
        self.interrupt = self._on_signal(signal.SIGINT, self._end)  # Lightning restores both when the training ends

    @staticmethod
    def _on_signal(number, handler):
        """Sets the handler of a signal, where it can be set; returns the one before."""
        before = signal.getsignal(number)
        if threading.current_thread() is threading.main_thread():
            signal.signal(number, handler or signal.SIG_DFL)
        return before

    def _end(self, number, _):
        self.received = number
        if number == signal.SIGINT:
            self._on_signal(signal.SIGINT, self.interrupt)
            with suppress(RuntimeError):  # it came while something else was being printed
                rank_zero_info("\n  saving after this step; Ctrl-C once more ends at once")

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if between_steps(trainer, module) and not validates_next(trainer):  # else gathered gradients would be lost
            self._save_if_due(trainer)

    def on_validation_end(self, trainer, module):
        if trainer.sanity_checking:
            return
        self._check(trainer, self.may_fail)  # of checkpoints that other callbacks save here
        if not between_steps(trainer, module):  # a validation by the clock: gathered gradients would be lost
            return
        if trainer.global_step == self.saved:  # before a validation by the clock: again, with what other callbacks learned
            self.saved = None
            self._save(trainer, self.may_fail)
        else:
            self._save_if_due(trainer)

    def _save_if_due(self, trainer):
        if trainer.strategy.reduce_boolean_decision(self.received != 0, all=False):
            self._check(trainer, self.may_fail)  # of what other callbacks saved at this step
            self._save(trainer, may_fail=0)
            if trainer.training:  # else Lightning has written them, before a validation
                write_logs(trainer)
            rank_zero_info(f"  ended by a signal: {self.path} is of step {trainer.global_step}; ckpt=last resumes from there")
            raise KeyboardInterrupt if self.received == signal.SIGINT else Preempted
        if trainer.global_step >= trainer.max_steps:  # later, Lightning would count this step's logs twice on resuming
            self._save(trainer, self.may_fail)
        elif trainer.global_step and trainer.global_step % self.every == 0:
            if trainer.strategy.broadcast(time.monotonic() >= self.rest_until):
                self._save(trainer, self.may_fail)

    def on_train_end(self, trainer, module):
        self._save(trainer, may_fail=0)

    def on_fit_end(self, trainer, module):
        self._save(trainer, may_fail=0)  # for a run with no step left to train

    def on_load_checkpoint(self, trainer, module, checkpoint):
        if self.path.is_file():  # else this run continues from another run's checkpoint
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
        """Whether the last save of a checkpoint, of any kind, succeeded.

        Raises:
            OSError: on all processes, if more than `may_fail` saves in a row have failed since the last look.
        """
        io = trainer.strategy.checkpoint_io
        if not isinstance(io, TrainingCheckpointIO):  # any other raises when a save fails
            return True
        worst, failure = trainer.strategy.broadcast(io.look())  # with shards all fail alike
        if worst > may_fail:
            raise OSError(f"{failure}. Make room and resume with ckpt=last")
        return not save_failed(trainer)
