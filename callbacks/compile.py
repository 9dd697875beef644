"""torch.compile for the layers of a generator or the residual blocks of a tokenizer."""

from __future__ import annotations

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info

from kit.machine import can_compile

SHAPES = 64  # of clips and of images, at each level of a tokenizer, that layers are compiled for; further ones run uncompiled


class CompileLayers(L.Callback):
    """Compiles a model's layers, one by one, for training; validation and sampling, whose shapes vary, compile nothing more.

    A tokenizer's are its residual blocks: its whole encoder and decoder take three times as long to compile and, on a CPU,
    are slower than uncompiled. What is compiled keeps its weights and their names.

    Args:
        least_steps: a run with fewer steps is not compiled, since compiling takes some ten seconds, of a tokenizer more.
            Neither is one on a machine that cannot compile: no C++ compiler, no Triton. -1: no run is.
    """

    def __init__(self, least_steps: int = 300):
        self.least_steps, self.compiled = least_steps, False

    def on_fit_start(self, trainer, module):
        if not 0 <= self.least_steps <= trainer.max_steps or not can_compile():
            return
        rank_zero_info("  compiling the layers: the first step of each shape takes some ten seconds")
        torch._dynamo.config.cache_size_limit = max(SHAPES, torch._dynamo.config.cache_size_limit)
        for layer in module.model.layers:
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
