"""Estimates what a training costs: tokens, floating point operations, GPU-hours. Nothing is allocated or computed."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch.utils.flop_counter import FlopCounterMode

from kit.generator.transformer import Generator, GeneratorConfig
from kit.planning.memory import Repeated
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
        with Repeated(), FlopCounterMode(display=False) as counter:
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
    history = schedule.grid[0] * schedule.grid[1] * (schedule.latent_frames - 1) if generator.history == "full" else 0
    with torch.device("meta"), Repeated():
        inputs = torch.zeros(1, schedule.length + history, generator.inputs)

        def flops_with(layers: int) -> int:
            model = Generator(replace(generator, layers=layers))
            model.recompute = recompute
            condition = torch.zeros(1, model.condition.length, generator.width)
            with FlopCounterMode(display=False) as counter:
                model(inputs, schedule, condition).sum().backward()
            return counter.get_total_flops()

        one, two = flops_with(1), flops_with(2)
        with FlopCounterMode(display=False) as encoding, torch.no_grad():
            if not encoded:
                Tokenizer(tokenizer).encode(torch.zeros(1, 3, frames, height, width))
    layers = generator.layers - 1  # all alike
    return ClipCost(schedule.length, one + layers * (two - one) + encoding.get_total_flops())


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
