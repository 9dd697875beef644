"""From prompts to pixels: sampled frames through the tokenizer's decoder, for a clip or for a video of any length."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from kit.generator.sampler import Sampling, sample_frames
from kit.generator.transformer import Generator
from kit.scales import ScaleSchedule, latent_frames, pixel_frames
from kit.tokenizer import Tokenizer
from kit.tokenizer.quantizer import feature_to_bits


def seed_of(*place: int) -> int:
    """A seed of 32 bits for each place in numbered work, such as (seed, fold, clip), whatever else is made."""
    return int(np.random.SeedSequence(place).generate_state(1)[0])


@torch.no_grad()
def stream_clips(
    model: Generator, tokenizer: Tokenizer, schedule: ScaleSchedule, prompts: Sequence[str], seeds: Sequence[int],
    how: Sampling = Sampling(), history: Tensor | None = None, on_block: Callable[[], None] = lambda: None,
) -> Iterator[Tensor]:  # fmt: skip
    """Pixels as they come: (B, 3, 1, H, W), then (B, 3, 4, H, W) for each further latent frame, in [-1, 1].

    Args:
        history: (B, 3, T0, H, W) in [-1, 1], T0 = 1 + 4n: an image or the beginning of a video to go on from.
        on_block: called after each block.
    """
    bits = None
    if history is not None:
        given = tokenizer.schedule_of(history)
        if given.grids != schedule.grids:
            raise ValueError(f"history has the scales {given.grids}, the clip to make {schedule.grids}: resize it")
        bits = feature_to_bits(tokenizer.encode(history), given)
    stream: dict = {}
    for frame in sample_frames(model, schedule, prompts, seeds, how, bits, on_block):
        yield tokenizer.decode(frame.feature[:, :, None], stream).clamp(-1, 1)


def sample_clips(*args, **kwargs) -> Tensor:
    """Whole clips (B, 3, T, H, W) in [-1, 1]; arguments as for `stream_clips`."""
    return torch.cat(list(stream_clips(*args, **kwargs)), dim=2)


def windows(frames: int, longest: int, overlap: int) -> list[int]:
    """Pixel frames of each window of a video of `frames`, each but the first beginning with the last `overlap` of the one
    before; all counts 1 + 4n, and so all windows.

    Raises:
        ValueError: if a count is not 1 + 4n, or windows of `longest` frames add nothing to the overlap.
    """
    latent_frames(frames), latent_frames(overlap)
    if overlap >= longest and frames > longest:
        mend = "use less" if longest > 1 else "extend=positions makes more than a picture"
        raise ValueError(f"overlap={overlap} leaves nothing to add to clips of {longest} frames; {mend}")
    lengths, made = [min(frames, longest)], min(frames, longest)
    while made < frames:
        lengths.append(min(longest, overlap + frames - made))
        made += lengths[-1] - overlap
    return lengths


@torch.no_grad()
def stream_video(
    model: Generator, tokenizer: Tokenizer, schedule: ScaleSchedule, prompts: Sequence[str], seeds: Sequence[int],
    frames: int, how: Sampling = Sampling(), history: Tensor | None = None, on_block: Callable[[], None] = lambda: None,
) -> Iterator[Tensor]:  # fmt: skip
    """Videos of any length: the end of each window is encoded and continued as a clip of its own (frame re-encoding), so
    that what a window costs, in time and memory, does not depend on how many came before.

    Args:
        schedule: of a window; `frames`: pixel frames of the whole, 1 + 4n. For no more than a window this is `stream_clips`.
        history: as for `stream_clips`, less than a window.
    Yields:
        (B, 3, n, H, W), the frames in their order.
    """
    longest, overlap = how.window(pixel_frames(schedule.frames), frames)
    recent: deque[Tensor] = deque(maxlen=latent_frames(overlap))
    for number, length in enumerate(windows(frames, longest, overlap)):
        part = schedule.with_frames(latent_frames(length))
        those = [seed_of(seed, number) if number else seed for seed in seeds]
        again = overlap if number else 0  # frames of this window that were shown already
        given = torch.cat(list(recent), dim=2)[:, :, -overlap:] if number else history
        for pixels in stream_clips(model, tokenizer, part, prompts, those, how, given, on_block):
            recent.append(pixels)
            if again:  # 1 + 4n frames, as the pieces add up to
                again -= pixels.shape[2]
            else:
                yield pixels
