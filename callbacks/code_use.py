"""Shows how the tokenizer's bits are used."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import torch

from callbacks.pictures import log_picture, may_fail, thin_out
from kit.inspection import bit_use, bit_use_picture
from kit.tokenizer.losses import entropy_of

DEAD = 0.01  # bits of entropy, below which a bit is dead: alike in all but one of 1,200 tokens


class CodeUse(L.Callback):
    """Shows how the validation clips use the bits of the tokenizer.

    It writes a picture to `folder`/media with a cell for each bit of each scale, and logs the mean entropy of each scale's
    bits as `val/bit_entropy_scale<k>` and the number of dead bits, over all scales, as `val/dead_bits`. Coarse scales have
    few tokens: with few validation clips some of their bits are constant by chance.
    """

    def __init__(self, folder: str):
        self.folder, self.ones, self.clips = Path(folder) / "media", 0.0, 0

    def on_validation_epoch_start(self, trainer, module):
        self.ones, self.clips = 0.0, 0

    def on_validation_batch_end(self, trainer, module, outputs, batch, batch_idx, dataloader_idx=0):
        bits = outputs["bits"].cpu()
        self.ones += bit_use(bits, module.schedule)["ones"] * len(bits)
        self.clips += len(bits)

    def on_validation_epoch_end(self, trainer, module):
        if trainer.sanity_checking or not self.clips:
            return
        clips = torch.tensor(float(self.clips), device=module.device)
        ones, clips = (trainer.strategy.reduce(x, reduce_op="sum").cpu() for x in (self.ones.to(module.device), clips))
        ones = ones / clips
        entropy = entropy_of(ones)
        metrics = {f"val/bit_entropy_scale{k + 1}": e for k, e in enumerate(entropy.nanmean(1))}
        module.log_dict({**metrics, "val/dead_bits": (entropy < DEAD).float().sum()}, rank_zero_only=True)
        if trainer.is_global_zero:
            with may_fail("picture of the bits' use", step := trainer.global_step):
                picture = bit_use_picture(ones, self.folder / f"bit_use_step{step:06d}.png")
                log_picture(trainer, "bit_use", picture)
                thin_out(self.folder, "bit_use_step", step)
