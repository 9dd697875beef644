"""torch.compile for the layers of a generator."""

from __future__ import annotations

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info

from kit.machine import can_compile

SHAPES = 64  # of clips and of images that layers are compiled for; further shapes run uncompiled


class CompileLayers(L.Callback):
    """Compiles a transformer's layers for training; validation and sampling, whose shapes vary, compile nothing more.

    Args:
        least_steps: a run with fewer steps is not compiled, since compiling takes some ten seconds. Neither is one on a
            machine that cannot compile: no C++ compiler, no Triton.
    """

    def __init__(self, least_steps: int = 300):
        self.least_steps, self.compiled = least_steps, False

    def on_fit_start(self, trainer, module):
        layers = getattr(module.model, "layers", None)
        if layers is None or not 0 <= self.least_steps <= trainer.max_steps or not can_compile():
            return
        rank_zero_info("  compiling the layers: the first step of each shape takes some ten seconds")
        torch._dynamo.config.cache_size_limit = max(SHAPES, torch._dynamo.config.cache_size_limit)
        for layer in layers:
            layer.compile(dynamic=False)
        self.compiled = True

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if self.compiled:
            torch.compiler.set_stance("default")

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if self.compiled:  # until the next step no other shapes are compiled
            torch.compiler.set_stance("eager_on_recompile")

    def on_fit_end(self, trainer, module):
        if self.compiled:
            torch.compiler.set_stance("default")

    def on_exception(self, trainer, module, exception):
        self.on_fit_end(trainer, module)
