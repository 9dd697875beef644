"""Generates pixels from prompts: samples latent frames and decodes them, for a clip or for a video of any length, with models
in memory or with those of checkpoints."""

from __future__ import annotations

import operator
from collections import deque
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from kit.checkpoint import Loaded
from kit.generator.sampler import Sampling, sample_frames
from kit.generator.transformer import Generator
from kit.machine import autocast, device, exact_float32, keeping_cast_weights
from kit.pixels import check_pixels
from kit.scales import ScaleSchedule, latent_frames, pixel_frames
from kit.tokenizer import Tokenizer
from kit.tokenizer.causal import Stream
from kit.tokenizer.quantizer import feature_to_bits


def seed_of(*place: int) -> int:
    """Derives a 32-bit seed from a place in numbered work, such as (seed, fold, clip), whatever else is generated."""
    return int(np.random.SeedSequence(place).generate_state(1)[0])


@torch.no_grad()
def stream_clips(
    model: Generator, tokenizer: Tokenizer, schedule: ScaleSchedule, prompts: Sequence[str], seeds: Sequence[int],
    sampling: Sampling = Sampling(), history: Tensor | None = None, on_block: Callable[[], None] = lambda: None,
) -> Iterator[Tensor]:  # fmt: skip
    """Generates clips and yields pixels as they come, in [-1, 1]: (B, 3, 1, H, W), then (B, 3, 4, H, W) per latent frame.

    Args:
        history: (B, 3, T0, H, W) in [-1, 1], T0 = 1 + 4n: an image or the beginning of a video to continue.
        on_block: called after each block.
    Raises:
        ValueError: if the history has other scales than the schedule; else as `check_pixels` and `sample_frames`.
    """
    bits = None
    if history is not None:
        check_pixels(history)
        given = tokenizer.schedule_of(history)
        if given.grids != schedule.grids:
            raise ValueError(f"history has the scales {given.grids}, the clip to make {schedule.grids}: resize it")
        bits = feature_to_bits(tokenizer.encode(history), given)
    stream = Stream()
    for frame in sample_frames(model, schedule, prompts, seeds, sampling, bits, on_block):
        yield tokenizer.decode(frame.feature[:, :, None], stream).clamp(-1, 1)


def sample_clips(*args, **kwargs) -> Tensor:
    """Generates whole clips (B, 3, T, H, W) in [-1, 1]; arguments as for `stream_clips`."""
    return torch.cat(list(stream_clips(*args, **kwargs)), dim=2)


def windows(frames: int, longest: int, overlap: int) -> list[int]:
    """Returns the pixel frames of each window of a video of `frames` frames.

    Each window but the first begins with the last `overlap` frames of the one before. All numbers are 1 + 4n.

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
    frames: int, sampling: Sampling = Sampling(), history: Tensor | None = None, on_block: Callable[[], None] = lambda: None,
) -> Iterator[Tensor]:  # fmt: skip
    """Generates videos of any length by frame re-encoding: encodes the end of each window as a clip of its own and continues
    it, so that the cost of a window, in time and memory, does not depend on how many came before.

    Args:
        schedule: of a window. frames: pixel frames of the whole video, 1 + 4n; up to one window this is `stream_clips`.
        history: as for `stream_clips`, shorter than a window.
    Yields:
        (B, 3, n, H, W), the frames in their order.
    """
    longest, overlap = sampling.window(pixel_frames(schedule.latent_frames), frames)
    recent: deque[Tensor] = deque(maxlen=latent_frames(overlap))
    for number, length in enumerate(windows(frames, longest, overlap)):
        part = schedule.with_latent_frames(latent_frames(length))
        those = [seed_of(seed, number) if number else seed for seed in seeds]
        again = overlap if number else 0  # frames of this window that were yielded already
        given = torch.cat(list(recent), dim=2)[:, :, -overlap:] if number else history
        for pixels in stream_clips(model, tokenizer, part, prompts, those, sampling, given, on_block):
            recent.append(pixels)
            if again:  # 1 + 4n frames; the pieces, of 1 and then 4, add up to it exactly
                again -= pixels.shape[2]
            else:
                yield pixels


def stream_samples(
    generator: Loaded, tokenizer: Loaded, prompts: Sequence[str], seeds: Sequence[int], size: tuple[int, int, int],
    sampling: Sampling, precision: str, history: Tensor | None = None, on_block: Callable[[], None] = lambda: None,
) -> Iterator[Tensor]:  # fmt: skip
    """Generates videos with trained models on this machine's device, by `stream_video`.

    A single clip is computed as a batch of two, because a batch of one uses other kernels, which round differently. In
    batches of two or more, a float32 clip is the same to the last bit in any batch (see `kit.generator.linear`; tested on
    CPUs and on an H200). With several threads that holds for `size=tiny`: products of wider models are divided among
    threads by the size of the batch, and rounding can turn a bit.

    Args:
        size: T, H, W. precision: `float32` or `bfloat16`. history: (3, T0, H, W) in [-1, 1], the same for all.
        on_block: called after each block.
    Yields:
        (B, 3, n, H, W) float32 in [-1, 1] on the CPU.
    Raises:
        ValueError: if there is no prompt, a seed for each is not given, or the history is no such tensor; else as
            `stream_video`.
    """
    check_seeds(prompts, seeds)
    if history is not None and not (torch.is_tensor(history) and history.ndim == 4):
        found = tuple(history.shape) if torch.is_tensor(history) else type(history).__name__
        raise ValueError(f"history={found}; expected a tensor (3, T0, H, W) in [-1, 1], an image has T0 = 1")
    wanted, (frames, height, width) = len(prompts), size
    seeds = list(map(operator.index, seeds))  # a user's may be numpy's
    if wanted == 1:
        prompts, seeds = [*prompts] * 2, [*seeds] * 2
    model, codec = generator.model.to(device()), tokenizer.model.to(device())
    schedule = codec.schedule(generator.clip["frames"], height, width)
    given = None if history is None else history.to(device()).expand(len(prompts), -1, -1, -1, -1)
    pieces = stream_video(model, codec, schedule, prompts, seeds, frames, sampling, given, on_block)
    while True:
        with keeping_cast_weights(model, codec), autocast(precision), exact_float32():  # not while the caller works
            piece = next(pieces, None)
        if piece is None:
            return
        yield piece[:wanted].float().cpu()


def check_seeds(prompts: Sequence[str], seeds: Sequence[int]):
    """Raises ValueError unless there are prompts, and as many seeds, from 0."""
    if not prompts or len(seeds) != len(prompts) or min(seeds) < 0:
        found = f"{len(prompts)} prompts and {len(seeds)} seeds" + (f" from {min(seeds)}" if len(seeds) else "")
        raise ValueError(f"{found}; expected a prompt or more, and for each a seed of 0 or more")


def sample_videos(
    generator: Loaded, tokenizer: Loaded, prompts: Sequence[str], seeds: Sequence[int], size: tuple[int, int, int],
    sampling: Sampling, precision: str, batch_size: int, history: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Generates a clip for each prompt, `batch_size` at a time, with a progress bar.

    Args:
        batch_size: clips at a time; the rest as for `stream_samples`.
    Returns:
        (n, 3, T, H, W) float32 in [-1, 1], on the CPU.
    Raises: as `stream_samples`.
    """
    check_seeds(prompts, seeds)
    done = []
    with progress(len(prompts), generator, tokenizer, size, sampling, batch_size) as bar:
        for start in range(0, len(prompts), batch_size):
            part = slice(start, start + batch_size)
            given = (prompts[part], seeds[part], size, sampling, precision, history, bar.update)
            done.append(torch.cat(list(stream_samples(generator, tokenizer, *given)), dim=2))
    return torch.cat(done)


def progress(
    clips: int, generator: Loaded, tokenizer: Loaded, size: tuple[int, int, int], sampling: Sampling, batch_size: int
) -> tqdm:
    """Makes a progress bar that counts the blocks of all batches. Args: as `sample_videos`."""
    frames, *sides = size
    longest, overlap = sampling.window(generator.clip["frames"], frames)
    latents = sum(map(latent_frames, windows(frames, longest, overlap)))
    scales = tokenizer.model.schedule(1, *sides).scales  # a small clip has fewer than the tokenizer
    batches = -(-clips // batch_size)
    return tqdm(total=batches * latents * scales, desc="generate", unit="block", disable=None)
