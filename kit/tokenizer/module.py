"""TokenizerModule: losses and optimizers of the tokenizer and its discriminators, nothing else."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from kit.draws import Draws
from kit.fsdp import ShardedStrategy
from kit.loop import logs_now
from kit.machine import onto, without_autocast
from kit.optim import KEYS, WarmupCosine, build_optimizer, check_optimizer, each_step, scheduled_optimizer
from kit.perceptual import Perceptual, load_perceptual
from kit.pixels import psnr
from kit.ranks import mean_over_ranks
from kit.tokenizer import Tokenizer, TokenizerConfig
from kit.tokenizer.discriminator import Discriminator, check_layers
from kit.tokenizer.losses import (
    adaptive_weight,
    adversarial_loss,
    check_losses,
    commitment_loss,
    discriminator_loss,
    entropy_loss,
    lecam_loss,
    motion_loss,
    perceptual_loss,
    reconstruction_loss,
)
from kit.tokenizer.quantizer import Step

ANCHOR_DECAY = 0.99  # of LeCAM's moving averages, per iteration
OF_OUTPUT = ("reconstruction", "motion", "perceptual")  # losses that depend on the decoder's output alone


class TokenizerModule(L.LightningModule):
    """Trains a tokenizer.

    An iteration is one step of the tokenizer's optimizer, and of the discriminators' where there are any: Lightning's
    `global_step` and all schedules count iterations.

    Args:
        tokenizer: values of `TokenizerConfig`.
        loss: see conf/loss/plain.yaml.
        optimizer: `name`, `lr`, `betas`, `weight_decay`, `warmup` (iterations), `clip` (norm of all gradients),
            `accumulate` (batches per iteration).
        clip: `frames`, `height`, `width`, `fps` of the clips trained on.
        steps: iterations of the whole training; the learning rate ends there.
        scale_dropout: stochastic depth: each of the `last` scales of a clip is left out with probability `p`.
        seed: for random choices of scales and frames, which depend on it and on the clips' numbers only.
        perceptual: network of the perceptual loss, if there is one; None: loads it as `loss` says.
        recompute: whether the backward pass computes each residual block again instead of storing its activations (activation
            checkpointing): less memory, a fifth more arithmetic.
    Raises:
        ValueError, FileNotFoundError: for wrong values, or a perceptual loss without its weights.
    """

    kind = "tokenizer"

    def __init__(
        self, tokenizer: dict, loss: dict, optimizer: dict, clip: dict, steps: int, scale_dropout: dict, seed: int,
        perceptual: Perceptual | None = None, recompute: bool = False,
    ):  # fmt: skip
        super().__init__()
        self.save_hyperparameters(ignore=["perceptual", "recompute"])
        self.automatic_optimization = False
        self.model = Tokenizer(TokenizerConfig.from_dict(tokenizer))
        self.model.recompute = recompute
        self.enter(clip)
        self.loss, self.optimizer, self.steps, self.seed = copy.deepcopy(loss), optimizer, steps, seed
        self.scale_dropout = scale_dropout
        check_optimizer(optimizer, (*KEYS, "clip", "accumulate"))
        check_losses(loss)
        last, p = scale_dropout["last"], scale_dropout["p"]
        if not (type(last) is int and 0 <= last < self.schedule.scales and 0 <= p < 1):
            raise ValueError(
                f"scale_dropout={scale_dropout}; expected `last`, 0 to {self.schedule.scales - 1} of the "
                f"{self.schedule.scales} scales, and `p`, 0 to below 1"
            )
        network, adversarial = loss["perceptual"], loss["adversarial"]
        self.perceptual = (perceptual or load_perceptual(network["kind"], network["weights"])) if network["weight"] else None
        self.discriminator, self.start = None, steps
        if adversarial["weight"]:
            self.discriminator = Discriminator(adversarial["dims"], adversarial["width"], adversarial["layers"])
            check_layers(adversarial["layers"], clip["height"], clip["width"])  # not only late in a training
            self.start = round(adversarial["start"] * steps)  # the discriminators' first iteration
            self.register_buffer("anchors", torch.zeros(len(adversarial["dims"]), 2))  # LeCAM's

    def enter(self, clip: dict):
        """Sets the clip shape for validation and for checkpoints. Each training batch has a shape of its own."""
        self.hparams["clip"] = clip
        self.schedule = self.model.schedule(clip["frames"], clip["height"], clip["width"])

    def configure_model(self):
        if self._trainer is None:  # `load_from_checkpoint` calls it without
            return
        strategy = self.trainer.strategy
        if isinstance(strategy, ShardedStrategy):
            strategy.shard(self.model, [self.model.encoder, self.model.decoder])
            if self.discriminator is not None:
                strategy.shard(self.discriminator, self.discriminator.parts)

    def on_train_start(self):
        if self.discriminator is not None and self.optimizers()[1].optimizer.state and self.global_step < self.start:
            rank_zero_warn(
                f"the adversarial loss pauses until iteration {self.start} of {self.steps}: loss.adversarial.start is a "
                f"share of the training, which had fewer iterations before"
            )

    def training_step(self, batch: dict, index: int):
        video = batch["video"]
        draws = Draws(self.seed, batch["n"])
        with inputs_of(self.model.decoder.head) as hidden:
            output, features, steps = self.model(video, self.kept_scales(video, draws))
        output = output.view_as(output)  # a gradient of this alone does not make a sharded model gather its weights
        terms = self.reconstruction_terms(video, output, features, steps, draws)
        loss = weighted_sum(terms)
        if adversarial := self.adversarial_share:
            terms["adversarial"], loss = self.adversarial_term(output, terms, hidden[0], adversarial)
        hidden.clear()  # the backward pass frees it
        self.backward_of(loss)
        self.log("train/loss", weighted_sum(terms), prog_bar=True, sync_dist=True)
        if adversarial:
            against = self.discriminator_terms(video, output.detach(), index % self.optimizer["accumulate"])
            self.backward_of(weighted_sum(against))
            terms |= against
        if logs_now(self):
            self.log("train/amplitude", amplitude_of(features), sync_dist=True)
            self.log_dict({f"train/{name}": term for name, (_, term) in terms.items()}, sync_dist=True)
            self.log_dict({f"train/{name}_weighted": weight * term for name, (weight, term) in terms.items()}, sync_dist=True)
        if (index + 1) % self.optimizer["accumulate"] == 0:
            self.step(discriminators=adversarial > 0)

    def reconstruction_terms(
        self, video: Tensor, output: Tensor, features: Tensor, steps: list[Step], draws: Draws
    ) -> dict[str, tuple]:
        """Computes the losses of a reconstruction (VideoAR eq. 4 but for the adversarial one): name -> (weight, loss).

        Args: as `Tokenizer.forward` returns them for the `video`.
        """
        kind, entropy_weight = self.loss["reconstruction"], self.entropy_weight
        terms = {
            "reconstruction": (self.loss["reconstruction_weight"], reconstruction_loss(output, video, kind)),
            "commitment": (self.loss["commitment_weight"], commitment_loss(features, steps)),
        }
        if entropy_weight or logs_now(self):  # without a weight it is only logged
            with torch.set_grad_enabled(entropy_weight != 0):
                terms["entropy"] = (entropy_weight, entropy_loss(steps, self.loss["entropy_inverse_temperature"]))
        if weight := self.loss["motion_weight"]:
            terms["motion"] = (weight, motion_loss(output, video, kind))
        if self.perceptual is not None:
            frames = some_frames(video.shape[2], self.loss["perceptual"]["frames"], draws)
            distance = perceptual_loss(self.perceptual, *(chosen_frames(x, frames) for x in (output, video)))
            terms["perceptual"] = (self.loss["perceptual"]["weight"], distance)
        return terms

    def kept_scales(self, video: Tensor, draws: Draws) -> Tensor | None:
        """Draws which scales of each clip reach the decoder, (B, K) bool; None: all."""
        last, p = self.scale_dropout["last"], self.scale_dropout["p"]
        if not last or not p:
            return None
        scales = self.model.schedule_of(video).scales
        last = min(last, scales - 1)  # the first scale stays, in small clips too
        kept = torch.ones(len(video), scales, dtype=torch.bool)
        kept[:, scales - last :] = draws.rand(last) >= p
        return onto(kept, self.device)

    @property
    def entropy_weight(self) -> float:
        """Entropy weight in this iteration: linear from `entropy_weight` to `entropy_weight_end` at the last iteration."""
        first, last = self.loss["entropy_weight"], self.loss["entropy_weight_end"]
        return first + (last - first) * min(1.0, self.global_step / max(1, self.steps - 1))

    def backward_of(self, loss: Tensor):
        """Backpropagates the loss of a batch.

        Turns off autocast, under which Lightning calls a training step, so that gradients are not rounded.
        """
        with without_autocast(self.device):
            self.manual_backward(loss / self.optimizer["accumulate"])

    @property
    def adversarial_share(self) -> float:
        """Share of the adversarial weight in this iteration: 0 until `start`, then rising to 1 over `warmup`."""
        done = self.global_step - self.start + 1
        if self.discriminator is None or done <= 0:
            return 0.0
        return min(1.0, done / max(1, round(self.loss["adversarial"]["warmup"] * self.steps)))

    def adversarial_term(self, output: Tensor, terms: dict, hidden: Tensor, share: float) -> tuple[tuple, Tensor]:
        """Computes weight and loss of fooling the discriminators, and the sum of all losses to backpropagate.

        The discriminators do not learn from it: only their gradient at the output is passed on to the tokenizer. The
        adaptive weight needs the gradient of the other losses there too, which is then passed on as well: the perceptual
        network is gone through once.

        Args:
            terms: the other losses, with their weights. hidden: (B, C, F, h, w), what the decoder's last layer
                made the output of. share: `adversarial_share`.
        Returns:
            (weight, loss) without a gradient, and the sum, whose gradient frees what `OF_OUTPUT` were computed from.
        """
        fake = output.detach().requires_grad_()
        loss = adversarial_loss(self.discriminator(fake))
        with without_autocast(self.device):
            (gradient,) = torch.autograd.grad(loss, fake)
        weight = share * self.loss["adversarial"]["weight"]
        if not self.loss["adversarial"]["adaptive"]:
            carrier = weighted_sum(terms) + (output * weight * gradient).sum()
        else:
            of_output = {name: term for name, term in terms.items() if name in OF_OUTPUT}
            rest = {name: term for name, term in terms.items() if name not in OF_OUTPUT}
            with without_autocast(self.device):
                (other,) = torch.autograd.grad(weighted_sum(of_output), output)
                weight = weight * adaptive_weight(*(self.model.decoder.head_gradient(hidden, x) for x in (other, gradient)))
            carrier = weighted_sum(rest) + (output * (other + weight * gradient)).sum()
        term = weight, loss.detach()  # `carrier` has the gradient of all losses, but not their value
        return term, weighted_sum({**terms, "adversarial": term}).detach() + (carrier - carrier.detach())

    def discriminator_terms(self, video: Tensor, output: Tensor, number: int) -> dict:
        """Computes the discriminators' losses, hinge and LeCAM, for batch `number` of an iteration, and updates LeCAM's
        averages."""
        real, fake = zip(*(logits.chunk(2) for logits in self.discriminator(torch.cat([video, output]))))  # one pass
        means = torch.stack([torch.stack([r.float().mean(), f.float().mean()]) for r, f in zip(real, fake)])
        means = mean_over_ranks(means.detach())
        batches = self.optimizer["accumulate"]
        seen = (self.global_step - self.start) * batches + number
        decay = ANCHOR_DECAY ** (1 / batches)
        self.anchors.lerp_(means, 1 - min(decay, seen / (seen + 1)))  # the mean of all batches at first
        return {
            "discriminator": (1.0, discriminator_loss(real, fake)),
            "lecam": (self.loss["adversarial"]["lecam"], lecam_loss(real, fake, self.anchors)),
        }

    def step(self, discriminators: bool):
        """Steps the tokenizer's optimizer and schedule, and the discriminators' if `discriminators`."""
        optimizers, schedules = self.optimizers(), self.lr_schedulers()
        optimizers, schedules = (x if isinstance(x, list) else [x] for x in (optimizers, schedules))
        turns = list(zip(optimizers, schedules))[: 2 if discriminators else 1]
        for number, (optimizer, schedule) in enumerate(turns):
            if self.optimizer["clip"]:
                self.clip_gradients(optimizer, self.optimizer["clip"], "norm")
            # Lightning counts its wrapper's steps; the discriminators bypass it, to leave `global_step` alone.
            with without_autocast(self.device):
                (optimizer if number == 0 else optimizer.optimizer).step()
            optimizer.zero_grad()
            schedule.step()

    def on_validation_model_zero_grad(self):
        """Keeps the gradients: an iteration of several batches may have accumulated some already."""

    def validation_step(self, batch: dict, _) -> dict:
        video = batch["video"]
        bits = self.model.bits(video)
        output = self.model.decode_bits(bits, self.model.schedule_of(video))
        self.log("val/psnr", psnr(output, video), prog_bar=True, batch_size=len(video), sync_dist=True)
        self.log("val/l1", (output - video).abs().mean(), batch_size=len(video), sync_dist=True)
        return {"bits": bits}  # for callbacks

    def configure_optimizers(self):
        optimizer, schedule = scheduled_optimizer(self.model, self.optimizer, self.steps)
        optimizers, schedules = [optimizer], [schedule]
        if self.discriminator is not None:
            adversarial = self.loss["adversarial"]
            optimizers.append(build_optimizer(self.discriminator, "adamw", adversarial["lr"], adversarial["betas"], 0.0))
            schedules.append(WarmupCosine(optimizers[1], 0, self.steps - self.start))
        return optimizers, each_step(schedules)


@contextmanager
def inputs_of(layer: nn.Module) -> Iterator[list[Tensor]]:
    """Lists what a layer is given within a block, detached."""
    given: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0].detach()))
    try:
        yield given
    finally:
        handle.remove()


def some_frames(frames: int, wanted: int | None, draws: Draws) -> Tensor | None:
    """Draws `wanted` frame numbers of each clip, (B, wanted), ascending; None: all frames."""
    if wanted is None or wanted >= frames:
        return None
    return draws.rand(frames).argsort(1)[:, :wanted].sort(1).values


def chosen_frames(video: Tensor, numbers: Tensor | None) -> Tensor:
    """Selects frames `numbers` (B, n) of each clip of (B, 3, T, H, W) -> (B, 3, n, H, W); None selects all."""
    if numbers is None:
        return video
    return video.gather(2, onto(numbers, video.device)[:, None, :, None, None].expand(-1, 3, -1, *video.shape[3:]))


def amplitude_of(features: Tensor) -> Tensor:
    """Root mean square of features (N, d, h, w) in units of a code's amplitude 1/sqrt(d)."""
    return features.detach().square().mean().sqrt() * features.shape[1] ** 0.5


def weighted_sum(terms: dict[str, tuple]) -> Tensor:
    """Sums losses, given as name -> (weight, loss), by their weights."""
    return sum(weight * term for weight, term in terms.values())
