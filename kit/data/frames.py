"""Which frames of a file make a clip, and how they are resized."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kit.data.decode import Decoder
from kit.pixels import from_bytes


def frame_numbers(count: int, rate: float, frames: int, fps: float | None, start: float) -> np.ndarray:
    """Chooses the frames of a file that make a clip: int (T,). Numbers of `count` and more mean that the file is too short.

    Args:
        count, rate: number of frames and frames per second of the file.
        frames: T. fps: frames per second of the clip, the file's own if None or 0; the nearest frame is taken at each step.
        start: place of the clip, from 0 (it begins with the file) to 1 (it ends with the file).
    """
    step = rate / fps if fps else 1.0
    slack = max(count - 1 - step * (frames - 1), 0)
    return np.floor(start * slack + step * np.arange(frames) + 0.5).astype(int)


def most_frames(count: int, rate: float, fps: float | None) -> int:
    """Number of frames of the longest clip that a file is long enough for; arguments as for `frame_numbers`."""
    step = rate / fps if fps else 1.0
    return math.ceil((count - 0.5) / step)


def read_fitted(
    video: Decoder, numbers: Iterable[int], height: int, width: int, top: float = 0.5, left: float = 0.5
) -> tuple[Tensor, tuple[int, int]]:
    """Reads frames of a video, resized as they come: all frames of a large file at once would take much memory.

    Args:
        numbers: of T frames, ascending, repeats allowed. The rest as for `fit`.
    Returns:
        the result of `fit`, and (H, W) of the file's own frames.
    Raises:
        UnreadableVideo: if one of them cannot be decoded.
    """
    fitted = []
    for pixels in video.pieces(numbers):
        size = pixels.shape[1:3]
        fitted.append(fit(pixels, height, width, top, left))
    return torch.cat(fitted, dim=1) if len(fitted) > 1 else fitted[0], size


def fit(video: np.ndarray, height: int, width: int, top: float = 0.5, left: float = 0.5) -> Tensor:
    """Resizes uint8 (T, H, W, 3) until it just covers (height, width), and crops it.

    Args:
        top, left: where the crop lies, 0 to 1; 0.5 is the centre.
    Returns: float32 (3, T, height, width) in [-1, 1].
    """
    clip = torch.from_numpy(np.ascontiguousarray(video)).permute(0, 3, 1, 2)
    scale = max(height / clip.shape[2], width / clip.shape[3])
    size = [round(side * scale) for side in clip.shape[2:]]
    clip = F.interpolate(clip, size, mode="bilinear", antialias=True)
    y, x = round(top * (size[0] - height)), round(left * (size[1] - width))
    clip = clip[:, :, y : y + height, x : x + width].permute(1, 0, 2, 3).contiguous()
    return from_bytes(clip)
