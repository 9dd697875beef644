"""Pixels in [-1, 1]: their checks, their 8 bits, their PSNR and SSIM."""

from __future__ import annotations

import torch
from torch import Tensor

TOLERANCE = 1e-3  # how far beyond [-1, 1] rounding may carry a pixel
LEAST_SIDE = 6  # pixels of a side that SSIM needs


def in_range(low: float | Tensor, high: float | Tensor) -> bool:
    """Whether pixels from `low` to `high` lie in [-1, 1] up to rounding; NaN does not."""
    return bool(low >= -1 - TOLERANCE and high <= 1 + TOLERANCE)


def check_video(video: Tensor):
    """Checks the shape and type of a video.

    Raises:
        ValueError: if the video is not (B, 3, T, H, W), floating point.
    """
    if video.ndim != 5 or video.shape[1] != 3 or not video.is_floating_point():
        raise ValueError(f"expected a floating point video (B, 3, T, H, W), found {video.dtype} {tuple(video.shape)}")


def check_pixels(video: Tensor):
    """Checks a video and the range of its pixels.

    Raises:
        ValueError: if pixels lie outside [-1, 1] by more than rounding, or the video has another shape or type.
    """
    check_video(video)
    low, high = video.aminmax()
    if not in_range(low, high):
        raise ValueError(f"expected pixels in [-1, 1], found {low.item():g} to {high.item():g}; scale them first")


def to_bytes(pixels: Tensor) -> Tensor:
    """Rounds pixels in [-1, 1] to 0..255, uint8."""
    return ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def from_bytes(pixels: Tensor) -> Tensor:
    """Converts 0..255 to [-1, 1], float32."""
    return pixels.float() / 127.5 - 1


def to_8_bits(pixels: Tensor) -> Tensor:
    """Rounds pixels in [-1, 1] to the 256 values that a file can hold."""
    return from_bytes(to_bytes(pixels))


def psnr(output: Tensor, video: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of clips in [-1, 1], (B, 3, T, H, W) -> scalar, the mean over clips."""
    from torchmetrics.functional.image import peak_signal_noise_ratio  # takes seconds, which readers of clips need not wait

    return peak_signal_noise_ratio(output, video, data_range=(-1.0, 1.0), dim=(1, 2, 3, 4), reduction="elementwise_mean")


def ssim(frames: Tensor, real: Tensor) -> Tensor:
    """Structural similarity of frames in [-1, 1], (N, 3, H, W) -> (N,); 1 for equal frames.

    Computed on [0, 1], where black is 0: the term that compares brightness would otherwise take middle grey for black. Its
    window of 11 x 11 pixels reaches over the edges, into the picture's mirror image, by half of that.

    Raises:
        ValueError: if a side is shorter than that half.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    if min(real.shape[-2:]) < LEAST_SIDE:
        height, width = real.shape[-2:]
        found = f"SSIM compares pictures of {LEAST_SIDE} pixels a side or more, not {width} x {height}"
        raise ValueError(f"{found}; take larger clips, or of an evaluation metrics=[...] without it")
    shifted = ((x.float() + 1) / 2 for x in (frames, real))
    return structural_similarity_index_measure(*shifted, data_range=(0.0, 1.0), reduction="none").reshape(-1)
