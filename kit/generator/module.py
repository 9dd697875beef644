"""GeneratorModule: the bit loss and the optimizer of the generator, nothing else."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import lightning as L
import torch
from torch import Tensor

from kit.draws import Draws
from kit.fsdp import ShardedStrategy
from kit.generator.corruption import FlipLaw
from kit.generator.losses import BIT_WEIGHTS, POWERS, accuracy_by_block, bit_loss
from kit.generator.mask import draw_kept_frames
from kit.generator.sequence import teacher_forced, training_sequence
from kit.generator.transformer import Generator, GeneratorConfig
from kit.loop import logs_now
from kit.machine import onto
from kit.optim import KEYS, check_optimizer, each_step, scheduled_optimizer
from kit.tokenizer import Tokenizer
from kit.values import check_choice, check_share, from_values


class GeneratorModule(L.LightningModule):
    """Trains a generator on the bits of a frozen tokenizer.

    Args:
        generator: values of `GeneratorConfig` (with `bits` and `scales` of the tokenizer).
        correction: values of `FlipLaw` (Cross-Frame Error Correction); p_max = 0 and delta = 0 turn it off.
        frame_mask: p_mask of the Random Frame Mask, in [0, 1].
        drop_condition: probability of training without the condition, for guidance.
        loss: `scale_weights`, see `losses.weights_of_scales`; `bit_weights`: `uniform` (the paper), or `margin`, which weighs
            each bit by the cost of a wrong value, see `sequence.margin`.
        optimizer, clip, steps: as for `TokenizerModule`.
        seed: for flips, masks and dropped conditions, which depend on it and on the clips' numbers only.
        tokenizer_hash: hash of the tokenizer whose bits this generator predicts.
        tokenizer_path: path of that tokenizer's checkpoint.
        tokenizer: the tokenizer itself; it is not trained and not saved here.
        recompute: whether the backward pass computes each layer again instead of storing its activations (activation
            checkpointing): less memory, a third more arithmetic.
    Raises:
        ValueError: for values out of range, or a clip that the tokenizer cannot take.
    """

    kind = "generator"

    def __init__(
        self, generator: dict, correction: dict, frame_mask: float, drop_condition: float, loss: dict, optimizer: dict,
        clip: dict, steps: int, seed: int, tokenizer_hash: str, tokenizer_path: str, tokenizer: Tokenizer,
        recompute: bool = False,
    ):  # fmt: skip
        super().__init__()
        for key, known in (("scale_weights", POWERS), ("bit_weights", BIT_WEIGHTS)):
            check_choice(f"loss.{key}", loss[key], known)
        for key, share in (("frame_mask", frame_mask), ("drop_condition", drop_condition)):
            check_share(key, share)
        check_optimizer(optimizer, KEYS)
        self.save_hyperparameters(ignore=["tokenizer", "recompute"])
        self.model = Generator(GeneratorConfig.from_dict(generator))
        self.model.recompute = recompute
        self.law = from_values(FlipLaw, correction, "correction")
        self.frame_mask, self.drop_condition, self.seed = frame_mask, drop_condition, seed
        self.loss, self.optimizer, self.steps = copy.deepcopy(loss), optimizer, steps
        self.encodes_in_bfloat16 = False  # whether the tokenizer, which is not sharded, does as the sharded model does
        self.__dict__["tokenizer"] = tokenizer  # bypasses nn.Module, which would register it as a submodule
        tokenizer.eval().requires_grad_(False)
        self.enter(clip)

    def enter(self, clip: dict):
        """Sets the clip shape for validation and for checkpoints. Each training batch has a shape of its own."""
        self.hparams["clip"] = clip
        self.schedule = self.tokenizer.schedule(clip["frames"], clip["height"], clip["width"])

    def configure_model(self):
        if self._trainer is None:  # `load_from_checkpoint` calls it without
            return
        strategy = self.trainer.strategy
        if isinstance(strategy, ShardedStrategy):
            strategy.shard(self.model, [self.model.condition, *self.model.layers])
            self.encodes_in_bfloat16 = strategy.param_dtype == torch.bfloat16

    def on_fit_start(self):
        self.tokenizer.to(self.device)

    def on_validation_start(self):
        self.tokenizer.to(self.device)

    def training_step(self, batch: dict, _) -> Tensor:
        feature = self.feature(batch)
        schedule = self.tokenizer.schedule_of_feature(feature)
        draws = Draws(self.seed, batch["n"])
        rates = self.law.draw(schedule, draws)
        sequence = training_sequence(feature, schedule, rates, draws, **self.model.config.reads)
        kept = draw_kept_frames(schedule.latent_frames, self.frame_mask, draws)
        dropped = draws.rand() < self.drop_condition
        condition = self.model.condition(self.model.condition.prompts(batch), dropped)
        logits = self.model(sequence.inputs, schedule, condition, kept if self.frame_mask else None)  # None: one mask for all
        loss = bit_loss(logits, sequence, schedule, **self.loss, given=batch["given"])
        self.log("train/loss", loss, prog_bar=True, sync_dist=True)
        if logs_now(self):
            used = onto(schedule.used_bits(logits.shape[-1]), logits.device)
            right = (((logits > 0) == sequence.targets) & used).sum() / (len(feature) * used.sum())
            self.log("train/bit_accuracy", right, sync_dist=True)
        return loss

    def validation_step(self, batch: dict, _):
        feature = self.feature(batch)
        schedule = self.tokenizer.schedule_of_feature(feature)
        condition = self.model.condition(self.model.condition.prompts(batch))
        logits, sequence = teacher_forced(self.model, feature, schedule, condition)
        accuracy = accuracy_by_block((logits > 0) == sequence.targets, schedule).mean(0)
        metrics = {f"val/bit_accuracy_scale{k + 1}": a for k, a in enumerate(accuracy)}
        loss = bit_loss(logits, sequence, schedule, **self.loss)
        self.log("val/loss", loss, prog_bar=True, batch_size=len(logits), sync_dist=True)
        self.log_dict(metrics, batch_size=len(logits), sync_dist=True)

    def configure_optimizers(self):
        optimizer, schedule = scheduled_optimizer(self.model, self.optimizer, self.steps)
        return [optimizer], each_step([schedule])

    @torch.no_grad()
    def feature(self, batch: dict) -> Tensor:
        """Returns the feature of a batch, (B, d, F, h, w) float32; encodes the clips unless that was done ahead."""
        if "feature" in batch:
            return batch["feature"].float()
        with torch.autocast(self.device.type, torch.bfloat16) if self.encodes_in_bfloat16 else nullcontext():
            return self.tokenizer.encode(batch["video"])
