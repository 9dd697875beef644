"""Clips of any length and size through a tokenizer and back, a few frames at a time.

A clip is padded to what a schedule can write, and the output is cut back, so that each output frame belongs to an input
frame: in time by its last frame, at the right and at the bottom by its outermost column and row.
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
    """(height, width) of a picture resized to this shorter side, its aspect ratio kept up to rounding."""
    scale = shorter_side / min(height, width)
    return round(height * scale), round(width * scale)


def coded_size(config: TokenizerConfig, height: int, width: int) -> tuple[int, int]:
    """(height, width) of the smallest clip that a tokenizer can write and that covers this one.

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
    """(B, C, T, H, W) -> (B, C, frames, height, width): the last frame, row and column repeated."""
    T, H, W = video.shape[2:]
    return F.pad(video, (0, width - W, 0, height - H, 0, frames - T), mode="replicate")


def regrouped(chunks: Iterable[Tensor], tau: int) -> Iterator[Tensor]:
    """The same frames, 1 + tau * n at first and then tau * n at a time, as soon as they have come; at the end what is left.

    Args:
        chunks: (3, n, H, W), of any n.
    Raises:
        ValueError: for another number of dimensions, or if frames differ in size.
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
    """What the first k scales of each frame hold, for each k of `scales`. Memory does not grow with the clip.

    Args:
        chunks: (3, n, H, W) in [-1, 1], of any n: the frames of one clip, on the tokenizer's device. The shorter side of
            H x W has at most `shorter_side` pixels. A tokenizer of images codes each frame as a picture of its own.
        scales: ascending, from 1 to K.
    Yields:
        frames (3, n, H, W), regrouped, and their reconstructions (len(scales), 3, n, H, W) in [-1, 1]: up to rounding those
        of the whole clip, however it was divided.
    Raises:
        ValueError: as `check_pixels`, `coded_size` and `regrouped`.
    """
    tau, done = tokenizer.encoder.tau, 0
    stream: Stream = {}
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
    """Through the bits and back: (3, n, H, W) -> the same frames, in other chunks of that form; see `stream_scales`."""
    for _, outputs in stream_scales(tokenizer, chunks, [len(tokenizer.config.scales)]):
        yield outputs[0]
