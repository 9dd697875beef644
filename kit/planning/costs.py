"""Estimates what a training costs: tokens, floating point operations, GPU-hours. Nothing is allocated or computed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from kit.generator.transformer import Generator, GeneratorConfig
from kit.tokenizer import Tokenizer, TokenizerConfig


@dataclass(frozen=True)
class ClipCost:
    """Training cost of a clip, or of several.

    Args:
        tokens: without the condition's. flops: floating point operations of matrix products and convolutions, forward and
            backward; for a generator with the tokenizer's encoding.
    """

    tokens: int
    flops: float


def tokenizer_cost(tokenizer: TokenizerConfig, frames: int, height: int, width: int) -> ClipCost:
    """Returns the cost of a clip in the tokenizer's training, without discriminators and perceptual network.
    Raises as `Tokenizer.schedule`."""
    with torch.device("meta"):
        model, video = Tokenizer(tokenizer), torch.zeros(1, 3, frames, height, width)
        with FlopCounterMode(display=False) as counter:
            model(video)[0].sum().backward()
    return ClipCost(tokenizer.schedule(frames, height, width).length, counter.get_total_flops())


def generator_cost(
    generator: GeneratorConfig, tokenizer: TokenizerConfig, frames: int, height: int, width: int, encoded: bool = False,
    recompute: bool = False,
) -> ClipCost:  # fmt: skip
    """Returns the cost of a clip in the generator's training.

    Args:
        encoded: whether clips are encoded ahead; encoding is then not counted.
        recompute: whether the backward pass computes each layer again.
    Raises:
        as `Tokenizer.schedule`.
    """
    schedule = tokenizer.schedule(frames, height, width)
    tokens = schedule.length
    with torch.device("meta"):
        model, codec, video = Generator(generator), Tokenizer(tokenizer), torch.zeros(1, 3, frames, height, width)
        model.recompute = recompute
        history = schedule.grid[0] * schedule.grid[1] * (schedule.latent_frames - 1) if generator.history == "full" else 0
        condition = torch.zeros(1, model.condition.length, generator.width)
        with FlopCounterMode(display=False) as counter:
            model(torch.zeros(1, tokens + history, generator.inputs), schedule, condition).sum().backward()
            if not encoded:
                with torch.no_grad():
                    codec.encode(video)
    return ClipCost(tokens, counter.get_total_flops())


def stage_cost(clip: ClipCost, image: ClipCost | None, clips: int, image_share: float, latents: int) -> ClipCost:
    """Returns the cost of all steps of a stage.

    Args:
        clip, image: cost of one; image None: there are no images.
        clips: number of clips in all steps on all devices, if all were of clips.
        image_share: share of the steps that have images instead, `latents` images in place of each clip.
    """
    images = 0 if image is None else clips * image_share * latents
    clips = clips if image is None else clips * (1 - image_share)
    of = [(clip, clips)] + ([(image, images)] if image is not None else [])
    return ClipCost(round(sum(cost.tokens * n for cost, n in of)), sum(cost.flops * n for cost, n in of))


def gpu_hours(flops: float, tflops: float, utilisation: float) -> float:
    """Returns the GPU-hours of `flops` on GPUs of `tflops` TFLOP/s at peak, of which the share `utilisation` is reached."""
    return flops / (tflops * 1e12 * utilisation) / 3600
