"""Exponential moving average of the weights."""

from __future__ import annotations

import lightning as L
import torch

from kit.fsdp import ShardedStrategy, let_go, local


class EMA(L.Callback):
    """Keeps a moving average of the trained weights, validates with it, and stores it in the checkpoint as `ema`.

    It works on sharded weights too; Lightning's EMAWeightAveraging copies the whole module.

    Early on the average follows faster, with decay (1 + n) / (10 + n) after n steps, so that it forgets the beginning.

    Args:
        decay: share of the old average kept at each optimizer step, in [0, 1).
    """

    def __init__(self, decay: float):
        if not 0 <= decay < 1:
            raise ValueError(f"decay must lie in [0, 1), got {decay}")
        self.decay, self.steps, self.average = decay, 0, None

    @torch.no_grad()
    def on_train_start(self, trainer, module):
        live = dict(self._averaged(module))
        if self.average is None:
            self.average = {name: p.detach().clone() for name, p in live.items()}
        else:  # from a checkpoint
            self.average = {name: a.to(live[name].device) for name, a in self.average.items()}

    @torch.no_grad()
    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.global_step == self.steps:  # gradients are being accumulated
            return
        self.steps = trainer.global_step
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        live = [local(p) for _, p in self._averaged(module)]
        torch._foreach_lerp_([local(average) for average in self.average.values()], live, 1 - decay)

    def on_validation_start(self, trainer, module):
        self._swap(module)

    def on_validation_end(self, trainer, module):
        self._swap(module)

    def on_save_checkpoint(self, trainer, module, checkpoint):
        if self.average is not None:
            strategy = trainer.strategy
            checkpoint["ema"] = strategy.as_saved(self.average) if isinstance(strategy, ShardedStrategy) else self.average

    def on_load_checkpoint(self, trainer, module, checkpoint):
        self.average = checkpoint.get("ema")

    def state_dict(self) -> dict:
        return {"steps": self.steps}

    def load_state_dict(self, state: dict):
        self.steps = state["steps"]

    @torch.no_grad()
    def _swap(self, module):
        if self.average is None:
            return
        let_go(module.model)  # what validation has gathered is a copy
        for name, p in self._averaged(module):
            live, average = local(p.detach()), local(self.average[name])
            held = live.clone()
            live.copy_(average)
            average.copy_(held)

    @staticmethod
    def _averaged(module):
        """The model's weights, with those that a stage freezes. A discriminator is not averaged."""
        return [(f"model.{name}", p) for name, p in module.model.named_parameters()]
