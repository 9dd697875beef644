"""From prompts to pixels: sampled frames through the tokenizer's decoder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from kit.generator.sampler import Guidance, sample_frames
from kit.generator.transformer import Generator
from kit.scales import ScaleSchedule
from kit.tokenizer import Tokenizer
from kit.tokenizer.quantizer import feature_to_bits


def seed_of(*place: int) -> int:
    """A seed of 32 bits for each place in numbered work, such as (seed, fold, clip), whatever else is made."""
    return int(np.random.SeedSequence(place).generate_state(1)[0])


@torch.no_grad()
def stream_clips(
    model: Generator, tokenizer: Tokenizer, schedule: ScaleSchedule, prompts: Sequence[str], seeds: Sequence[int],
    guidance: Guidance = Guidance(), temperature: float = 1.0, history: Tensor | None = None,
) -> Iterator[Tensor]:  # fmt: skip
    """Pixels as they come: (B, 3, 1, H, W), then (B, 3, 4, H, W) for each further latent frame, in [-1, 1].

    Args:
        history: (B, 3, T0, H, W) in [-1, 1], T0 = 1 + 4n: an image or the beginning of a video to go on from.
    """
    bits = None
    if history is not None:
        given = tokenizer.schedule_of(history)
        if given.grids != schedule.grids:
            raise ValueError(f"history has the scales {given.grids}, the clip to make {schedule.grids}: resize it")
        bits = feature_to_bits(tokenizer.encode(history), given)
    stream: dict = {}
    for frame in sample_frames(model, schedule, list(prompts), list(seeds), guidance, temperature, bits):
        yield tokenizer.decode(frame.feature[:, :, None], stream).clamp(-1, 1)


def sample_clips(*args, **kwargs) -> Tensor:
    """Whole clips (B, 3, T, H, W) in [-1, 1]; arguments as for `stream_clips`."""
    return torch.cat(list(stream_clips(*args, **kwargs)), dim=2)
