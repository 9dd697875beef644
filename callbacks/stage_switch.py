"""Moves a training from one stage to the next."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info

from kit.data.staged import StagedClips
from kit.fsdp import allow_unused
from kit.loop import batches_done, batches_of_a_step
from kit.stages import Stage, locate, starts
from kit.values import check_choice


class StageSwitch(L.Callback):
    """Follows the stages of `StagedClips`.

    With the first batch of a stage the module gets its clips' shape, the optimizer its learning rate, and the parts that
    shall not learn are frozen; model and optimizer stay. A stage ends after its steps, or on a plateau, and leaves a
    checkpoint of its name, from which training can continue.

    It must come after the callbacks that hold something of a step, such as EMA, so that its checkpoints have the current
    state.

    Args:
        folder: of the checkpoints.
        monitor, mode: validation metric that shows a plateau, and whether `min` or `max` is better.
    """

    def __init__(self, folder: str, monitor: str, mode: str = "min"):
        check_choice("mode", mode, ("min", "max"))
        self.folder, self.monitor, self.sign = Path(folder), monitor, 1 if mode == "min" else -1
        self.best, self.waited = float("inf"), 0

    def on_load_checkpoint(self, trainer, module, checkpoint):
        """Sets the number of steps to that of all stages.

        A stage that is over may have been longer than it is planned now; the others keep their steps.
        """
        if isinstance(trainer.datamodule, StagedClips):
            steps = sum(trainer.datamodule.batches) // batches_of_a_step(trainer, module)
            trainer.fit_loop.epoch_loop.max_steps = steps
            tell_if_over(trainer.datamodule)

    def setup(self, trainer, module, stage):
        """Checks that the stages can be trained.

        Raises:
            ValueError: if there are no stages, or a stage shall train parts that do not exist.
        """
        if not isinstance(trainer.datamodule, StagedClips):
            raise ValueError("callbacks.stage_switch is for trainings in stages: give stages, or callbacks.stage_switch=null")
        chosen = [stage for stage in trainer.datamodule.plan.stages if stage.train is not None]
        for stage in chosen:
            check_names(module, stage)
        if chosen:
            allow_unused(trainer)

    def on_train_start(self, trainer, module):
        data = trainer.datamodule
        self._enter(trainer, module)
        if data.finished:
            trainer.should_stop = True
        else:  # of a run that resumes at a stage's end the next one's, see `on_train_batch_end`
            self._set_learning_rate(trainer, module, locate(data.batches, data.batches_done)[0])

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if batch["stage"] != trainer.datamodule.stage:
            trainer.datamodule.enter(batch["stage"])
            self.best, self.waited = float("inf"), 0
            self._enter(trainer, module)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        data = trainer.datamodule
        module.log("stage", torch.tensor(float(data.stage)))  # a number would wait for a GPU
        if batches_done(trainer) == data.began + data.batches[data.stage]:
            trainer.save_checkpoint(self.folder / f"{data.plan.stages[data.stage].name}.ckpt", weights_only=False)
            if data.stage == len(data.plan.stages) - 1:
                trainer.should_stop = True
            else:  # the next step's learning rate is logged before that step begins
                self._set_learning_rate(trainer, module, data.stage + 1)

    def on_validation_end(self, trainer, module):
        data = trainer.datamodule
        patience = data.plan.stages[data.stage].patience
        if patience is None or trainer.sanity_checking:
            return
        if self.monitor not in trainer.callback_metrics:
            known = ", ".join(sorted(trainer.callback_metrics))
            raise ValueError(f"callbacks.stage_switch.monitor={self.monitor} is not logged; choose from {known}")
        found = self.sign * trainer.callback_metrics[self.monitor].item()
        self.best, self.waited = (found, 0) if found < self.best else (self.best, self.waited + 1)
        if self.waited >= patience and data.stage not in data.ended:  # above it: a run that resumes with less patience
            rank_zero_info(f"  {self.monitor} is no better than {patience} validations ago: this stage ends")
            data.end_stage(batches_of_a_step(trainer, module))

    def state_dict(self) -> dict:
        return {"best": self.best, "waited": self.waited}

    def load_state_dict(self, state: dict):
        self.best, self.waited = state["best"], state["waited"]

    def _enter(self, trainer, module):
        data = trainer.datamodule
        stage = data.plan.stages[data.stage]
        module.enter(data.clip)
        self._set_learning_rate(trainer, module, data.stage)
        learning = freeze_all_but(module, stage.train)
        number = f"stage {data.stage + 1} of {len(data.plan.stages)}"
        of_a_step = data.batch_size * batches_of_a_step(trainer, module) * trainer.world_size
        clips = f"{data.train}" if data.bucketed else f"{module.schedule}, {of_a_step} clips a step"
        rank_zero_info(f"  {number}, {stage.name}: {clips}, {learning}")

    def _set_learning_rate(self, trainer, module, number: int):
        data, given = trainer.datamodule, module.hparams.optimizer
        stage = data.plan.stages[number]
        trainer.lr_scheduler_configs[0].scheduler.begin(
            lr=given["lr"] if stage.lr is None else stage.lr,
            warmup=given["warmup"] if stage.warmup is None else stage.warmup,
            steps=stage.steps, began=starts(data.batches)[number] // batches_of_a_step(trainer, module),
        )  # fmt: skip


def tell_if_over(data: StagedClips):
    """Says why a training whose last stage has ended on its plateau does not continue, whatever its patience is now."""
    batches, planned = data.batches[-1], data.planned[-1]
    if data.finished and batches < planned:
        message = f"stage {data.plan.stages[-1].name}, the last, ended on its plateau after {batches} of {planned} batches"
        rank_zero_info(f"  {message}; to continue, add a stage after it")


def check_names(module: L.LightningModule, stage: Stage):
    """Checks the names of the parts that a stage shall train.

    Raises:
        ValueError: if one of `stage.train` is not the beginning of any parameter's name.
    """
    names = [name for name, _ in module.model.named_parameters()]
    for beginning in stage.train:
        if not any(name.startswith(beginning) for name in names):
            parts = ", ".join(name for name, _ in module.model.named_children())
            raise ValueError(f"stages.{stage.name}.train: no parameter's name begins with {beginning}; the parts are {parts}")


def freeze_all_but(module: L.LightningModule, beginnings: tuple[str, ...] | None) -> str:
    """Freezes the model's parameters whose names begin with none of `beginnings` (None: none); says which learn."""
    for name, p in module.model.named_parameters():
        p.requires_grad_(beginnings is None or name.startswith(tuple(beginnings)))
    return "all weights learn" if beginnings is None else f"{', '.join(beginnings)} learn"
