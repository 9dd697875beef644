"""Reading of a clip or a picture from a file, whole or a few frames at a time, for generation and reconstruction."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kit.data.decode import Decoder, is_picture, open_video
from kit.data.frames import fit, frame_numbers, read_fitted
from kit.files import no_file

CHUNK = 16  # frames of a long video held at a time


@dataclass(frozen=True)
class ClipFile:
    """A video file or a picture, and which of its frames make the clip.

    Args:
        video: decoder of the file. numbers: int (T,), of the file's frames, ascending.
        fps: frames per second of the clip.
    """

    video: Decoder
    numbers: np.ndarray
    fps: float

    def __len__(self) -> int:
        """T."""
        return len(self.numbers)

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) of the file's own frames, as a player shows them. Raises `UnreadableVideo`."""
        return self.video.frames(self.numbers[:1]).shape[1:3]

    def read(self, height: int, width: int) -> Tensor:
        """Reads the clip: (3, T, height, width) in [-1, 1], see `fit`. Raises `UnreadableVideo`."""
        return read_fitted(self.video, self.numbers, height, width)[0]

    def chunks(self, height: int, width: int) -> Iterator[Tensor]:
        """Yields what `read` returns, CHUNK frames at a time. Of the file's own frames only one is held at a time."""
        frames = (fit(pixels[None], height, width) for pixels in self.video.walk(self.numbers))
        while chunk := list(islice(frames, CHUNK)):
            yield torch.cat(chunk, dim=1)


def open_clip_file(path: str | Path, frames: int | None, fps: float, at_end: bool = False, backend: str = "pyav") -> ClipFile:
    """Opens a video or a picture, and chooses the frames of a clip.

    Args:
        frames: T; None: the whole file.
        fps: frames per second to take; 0: the file's own, which a picture always has.
        at_end: take the end of the video instead of its beginning.
        backend: see `kit.data.decode`. decord decodes ahead, up to the whole file: not for chunks of a long one.
    Raises:
        FileNotFoundError, ValueError (no frames, or more than there are) or `UnreadableVideo`.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{no_file(path)}: {path}")
    if frames is not None and frames < 1:
        raise ValueError(f"{frames} frames of {path} were asked for; ask for 1 or more")
    picture = is_picture(path)
    if picture and frames is not None and frames > 1:
        raise ValueError(f"{path} is a picture; {frames} frames were asked for: give a video, or ask for 1")
    video = open_video(path, backend)
    fps = video.fps if picture else fps or video.fps
    if frames is None:
        numbers = frame_numbers(len(video), video.fps, int(len(video) * fps / video.fps) + 1, fps, 0.0)
        return ClipFile(video, numbers[numbers < len(video)], fps)
    numbers = frame_numbers(len(video), video.fps, frames, fps, 1.0 if at_end else 0.0)
    if numbers[-1] >= len(video):
        raise ValueError(f"{path} has {len(video)} frames at {video.fps:g} fps, too short for {frames} frames at {fps:g}")
    return ClipFile(video, numbers, fps)


def read_clip_file(path: str | Path, frames: int, height: int, width: int, fps: float) -> Tensor:
    """Reads the beginning of a file: (3, T, H, W) in [-1, 1], scaled to cover the size, cut in the centre.

    Arguments and errors are those of `open_clip_file`.
    """
    return open_clip_file(path, frames, fps, backend="decord").read(height, width)
