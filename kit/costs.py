"""What a training costs, on paper: tokens, floating point operations, GPU-hours. Nothing is allocated or computed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from kit.generator.transformer import Generator, GeneratorConfig
from kit.tokenizer import Tokenizer, TokenizerConfig


@dataclass(frozen=True)
class ClipCost:
    """Of a clip in a training step.

    Args:
        tokens: without the condition's. flops: of products of matrices and convolutions, forward and backward; for a
            generator with the tokenizer's encoding.
    """

    tokens: int
    flops: float


def tokenizer_cost(tokenizer: TokenizerConfig, frames: int, height: int, width: int) -> ClipCost:
    """Of the tokenizer's training, discriminators and a perceptual network not counted. Raises as `Tokenizer.schedule`."""
    with torch.device("meta"):
        model, video = Tokenizer(tokenizer), torch.zeros(1, 3, frames, height, width)
        with FlopCounterMode(display=False) as counter:
            model(video)[0].sum().backward()
    return ClipCost(tokenizer.schedule(frames, height, width).length, counter.get_total_flops())


def generator_cost(
    generator: GeneratorConfig, tokenizer: TokenizerConfig, frames: int, height: int, width: int, encoded: bool = False,
    recompute: bool = False,
) -> ClipCost:  # fmt: skip
    """Of the generator's training.

    Args:
        encoded: whether clips are encoded ahead, which then is not counted.
        recompute: whether the backward pass computes each layer once more.
    Raises: as `Tokenizer.schedule`.
    """
    schedule = tokenizer.schedule(frames, height, width)
    tokens = schedule.length
    with torch.device("meta"):
        model, codec, video = Generator(generator), Tokenizer(tokenizer), torch.zeros(1, 3, frames, height, width)
        model.recompute = recompute
        history = schedule.grid[0] * schedule.grid[1] * (schedule.frames - 1) if generator.history == "full" else 0
        condition = torch.zeros(1, model.condition.length, generator.width)
        with FlopCounterMode(display=False) as counter:
            model(torch.zeros(1, tokens + history, generator.inputs), schedule, condition).sum().backward()
            if not encoded:
                with torch.no_grad():
                    codec.encode(video)
    return ClipCost(tokens, counter.get_total_flops())


def stage_cost(clip: ClipCost, image: ClipCost | None, clips: int, image_share: float, latents: int) -> ClipCost:
    """Of all steps of a stage.

    Args:
        clip, image: of one. clips: of all its steps on all devices, were they all of clips.
        image_share: of the steps, that have images instead, `latents` for a clip.
    """
    images = 0 if image is None else clips * image_share * latents
    clips = clips if image is None else clips * (1 - image_share)
    of = [(clip, clips)] + ([(image, images)] if image is not None else [])
    return ClipCost(round(sum(cost.tokens * n for cost, n in of)), sum(cost.flops * n for cost, n in of))


def gpu_hours(flops: float, tflops: float, utilisation: float) -> float:
    """Of GPUs of so many TFLOP/s at best, of which that share is reached."""
    return flops / (tflops * 1e12 * utilisation) / 3600
