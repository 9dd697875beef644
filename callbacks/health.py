"""Logs what tells early that a training is not well."""

from __future__ import annotations

import time

import lightning as L
import torch

from kit.loop import batches_done, batches_of_a_step, between_steps, logs_now
from kit.optim import gradient_norm


class Health(L.Callback):
    """Logs, where losses are written, of the first process:

    - `train/grad_norm`: norm of the model's gradients before they are clipped, of the last step;
    - `time/step`: seconds per optimizer step since the last such step, and of these, as shares, `time/waiting`: between
      batches, for clips and for saves, and `time/validation`;
    - `data/unreadable`: files that could not be read so far, and `data/left_out`: batches left out after a lost loss;
    - `memory/gpu_gb`: most memory of the GPU that tensors took so far.
    """

    def __init__(self):
        self.since, self.first = None, 0  # when the time began that is looked at, and its first batch
        self.ended = self.begun = None  # when the last batch ended; when a validation began
        self.waiting = self.validation = 0.0

    def on_train_start(self, trainer, module):
        self._begin(trainer)

    def _begin(self, trainer):
        self.since = self.ended = time.monotonic()
        self.first, self.waiting, self.validation = batches_done(trainer), 0.0, 0.0

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.waiting += time.monotonic() - self.ended

    def on_after_backward(self, trainer, module):
        """Of a tokenizer with discriminators once for each side; the model's gradients are then the same. A tokenizer's rows
        may be written amid a step, and show the norm of the one before."""
        batches = batches_of_a_step(trainer, module)
        seen = logs_now(module) or not module.automatic_optimization and batches > 1
        if not seen or (batches_done(trainer) + 1) % batches:  # the batch at hand is not its last
            return
        scaler = getattr(trainer.precision_plugin, "scaler", None)  # of 16-mixed, which has multiplied the loss
        module.log("train/grad_norm", gradient_norm(module.model.parameters()) / (scaler.get_scale() if scaler else 1))

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.ended = time.monotonic()
        written = between_steps(trainer, module) or not module.automatic_optimization
        if not logs_now(module) or not written:
            return
        passed, data = self.ended - self.since, trainer.datamodule
        steps = (batches_done(trainer) - self.first) / batches_of_a_step(trainer, module)
        found = {
            "time/step": passed / steps,
            "time/waiting": self.waiting / passed,
            "time/validation": self.validation / passed,
            "data/unreadable": float(len(data.unreadable)),
            "data/left_out": float(sum(len(part.left_out) for part in data.parts)),
        }
        if module.device.type == "cuda":
            found["memory/gpu_gb"] = torch.cuda.max_memory_allocated(module.device) / 1e9
        module.log_dict(found)
        self._begin(trainer)

    def on_validation_start(self, trainer, module):
        self.begun = time.monotonic()

    def on_validation_end(self, trainer, module):
        if self.ended is not None:  # else before the training
            self.validation += time.monotonic() - self.begun
            self.ended += time.monotonic() - self.begun
