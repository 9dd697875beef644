"""Reconstructs clips of any length and size with a tokenizer, a few frames at a time.

A clip is padded to a shape that has a schedule, and the output is cropped, so that each output frame belongs to an input
frame. Padding repeats the last frame in time, and the outermost column and row on the right and at the bottom.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from kit.pixels import check_pixels
from kit.scales import whole_groups
from kit.tokenizer import Tokenizer, TokenizerConfig
from kit.tokenizer.causal import Stream
from kit.tokenizer.quantizer import clip_of, frames_of, pyramid


def scaled_size(height: int, width: int, shorter_side: int) -> tuple[int, int]:
    """Returns (height, width) of a picture resized to `shorter_side`, with its aspect ratio up to rounding."""
    scale = shorter_side / min(height, width)
    return round(height * scale), round(width * scale)


def coded_size(config: TokenizerConfig, height: int, width: int) -> tuple[int, int]:
    """Returns (height, width) of the smallest clip with all scales of a tokenizer that covers the given size.

    Raises:
        ValueError: if the shorter side is longer than the tokenizer's.
    """
    c, short = config.compression, config.shorter_side
    if min(height, width) > short:
        raise ValueError(
            f"this tokenizer takes clips whose shorter side has {short} pixels or less, got {height} x {width}; resize "
            f"them to {' x '.join(map(str, scaled_size(height, width, short)))}"
        )
    return max(short, -(-height // c) * c), max(short, -(-width // c) * c)


def pad_to(video: Tensor, frames: int, height: int, width: int) -> Tensor:
    """Pads (B, C, T, H, W) to (B, C, frames, height, width) by repeating the last frame, row and column."""
    T, H, W = video.shape[2:]
    return F.pad(video, (0, width - W, 0, height - H, 0, frames - T), mode="replicate")


def regrouped(chunks: Iterable[Tensor], tau: int) -> Iterator[Tensor]:
    """Regroups frames into chunks of first 1 + tau * n, then tau * n frames, as soon as they arrive; the rest comes last.

    Args:
        chunks: (3, n, H, W), of any n.
    Raises:
        ValueError: if a chunk has another number of dimensions, or frames differ in size.
    """
    rest, lead = None, 1
    for chunk in chunks:
        if chunk.ndim != 4:
            raise ValueError(f"expected frames (3, n, H, W), found {tuple(chunk.shape)}")
        if rest is not None and chunk.shape[2:] != rest.shape[2:]:
            raise ValueError(f"frames of {tuple(rest.shape[2:])} pixels, then of {tuple(chunk.shape[2:])}; resize them alike")
        rest = chunk if rest is None else torch.cat([rest, chunk], dim=1)
        whole = rest.shape[1] - (rest.shape[1] - lead) % tau
        if whole > 0:
            yield rest[:, :whole]
            rest, lead = rest[:, whole:].clone(), 0  # a view would keep the whole chunk
    if rest is not None and rest.shape[1]:
        yield rest


@torch.no_grad()
def stream_scales(tokenizer: Tokenizer, chunks: Iterable[Tensor], scales: Collection[int]) -> Iterator[tuple[Tensor, Tensor]]:
    """Reconstructs a clip from the first k scales of each frame, for each k of `scales`, in memory independent of its length.

    Args:
        chunks: (3, n, H, W) in [-1, 1], of any n: the frames of one clip, on the tokenizer's device. The shorter side of
            H x W has at most `shorter_side` pixels. A tokenizer of images codes each frame as a picture of its own.
        scales: ascending, from 1 to K.
    Yields:
        frames (3, n, H, W), regrouped, and their reconstructions (len(scales), 3, n, H, W) in [-1, 1]. Up to rounding they
        equal those of the whole clip, however it is chunked.
    Raises:
        ValueError: as `check_pixels`, `coded_size` and `regrouped`.
    """
    tau, done = tokenizer.encoder.tau, 0
    stream = Stream()
    for frames in regrouped(chunks, tau):
        check_pixels(frames[None])
        n, height, width = frames.shape[1:]
        size = coded_size(tokenizer.config, height, width)
        padded = pad_to(frames[None], whole_groups(done + n, tau) - done, *size)
        done += n
        steps = pyramid(frames_of(tokenizer.encode(padded, stream)), tokenizer.schedule(1, *size))
        features = torch.cat([clip_of(step.total, 1) for k, step in enumerate(steps, start=1) if k in scales])
        yield frames, tokenizer.decode(features, stream)[:, :, :n, :height, :width].clamp(-1, 1)


def reconstruct_stream(tokenizer: Tokenizer, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
    """Encodes chunks (3, n, H, W) of a clip as bits and decodes them, in chunks of other lengths; see `stream_scales`."""
    for _, outputs in stream_scales(tokenizer, chunks, [len(tokenizer.config.scales)]):
        yield outputs[0]
