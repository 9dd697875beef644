"""A clip or a picture from a file, for generation and reconstruction."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from kit.data.clips import fit, frame_numbers
from kit.data.decode import PICTURES, open_video


def read_clip_file(
    path: str | Path, frames: int, height: int, width: int, fps: float, at_end: bool = False, backend: str = "decord"
) -> Tensor:
    """(3, T, H, W) in [-1, 1]: scaled to cover the size, cut in the centre.

    Args:
        fps: frames per second to take; 0: the file's own.
        at_end: take the end of the video instead of its beginning.
    Raises:
        FileNotFoundError, ValueError (a picture where frames are asked for; too short) or `UnreadableVideo`.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    if path.suffix.lower() in PICTURES and frames > 1:
        raise ValueError(f"{path} is a picture; {frames} frames were asked for: give a video, or use image=")
    video = open_video(path, backend)
    numbers = frame_numbers(len(video), video.fps, frames, fps, 1.0 if at_end else 0.0)
    if numbers[-1] >= len(video):
        raise ValueError(
            f"{path} has {len(video)} frames at {video.fps:g} fps, too short for {frames} frames at {fps or video.fps:g}"
        )
    return fit(video.frames(numbers), height, width)
