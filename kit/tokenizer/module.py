"""TokenizerModule: losses and optimizer of the tokenizer, nothing else."""

from __future__ import annotations

import lightning as L
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio

from kit.optim import build_optimizer, warmup_cosine
from kit.tokenizer import Tokenizer, TokenizerConfig
from kit.tokenizer.losses import commitment_loss, entropy_loss, reconstruction_loss


def psnr(output: Tensor, video: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of clips in [-1, 1], (B, 3, T, H, W) -> scalar, the mean over clips."""
    return peak_signal_noise_ratio(output, video, data_range=(-1.0, 1.0), dim=(1, 2, 3, 4), reduction="elementwise_mean")


class TokenizerModule(L.LightningModule):
    """Trains a tokenizer.

    Args:
        tokenizer: values of `TokenizerConfig`.
        loss: `reconstruction` (l1 or l2), `commitment_weight`, `entropy_weight`, `entropy_inverse_temperature`.
        optimizer: `name`, `lr`, `betas`, `weight_decay`, `warmup` (steps).
        clip: `frames`, `height`, `width`, `fps` of the clips trained on.
        steps: of the whole training; the learning rate ends there.
    """

    kind = "tokenizer"

    def __init__(self, tokenizer: dict, loss: dict, optimizer: dict, clip: dict, steps: int):
        super().__init__()
        self.save_hyperparameters()
        self.model = Tokenizer(TokenizerConfig(**tokenizer))
        self.schedule = self.model.schedule(clip["frames"], clip["height"], clip["width"])
        self.loss, self.optimizer, self.steps = loss, optimizer, steps

    def training_step(self, batch: dict, _) -> Tensor:
        video = batch["video"]
        output, features, steps = self.model(video)
        terms = {
            "reconstruction": reconstruction_loss(output, video, self.loss["reconstruction"]),
            "commitment": commitment_loss(features, steps),
            "entropy": entropy_loss(steps, self.loss["entropy_inverse_temperature"]),
        }
        weights = {"commitment": self.loss["commitment_weight"], "entropy": self.loss["entropy_weight"]}
        total = sum(weights.get(name, 1.0) * term for name, term in terms.items())
        self.log("train/loss", total, prog_bar=True)
        self.log_dict({f"train/{name}": term for name, term in terms.items()})
        return total

    def validation_step(self, batch: dict, _):
        video = batch["video"]
        output = self.model.reconstruct(video)
        self.log("val/psnr", psnr(output, video), prog_bar=True, batch_size=len(video), sync_dist=True)
        self.log("val/l1", (output - video).abs().mean(), batch_size=len(video), sync_dist=True)

    def configure_optimizers(self):
        warmup = self.optimizer["warmup"]
        optimizer = build_optimizer(self.model, **{k: v for k, v in self.optimizer.items() if k != "warmup"})
        schedule = {"scheduler": warmup_cosine(optimizer, warmup, self.steps), "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": schedule}
