"""Buckets: clip shapes to train on side by side, and which of them suits a video."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

from kit.scales import latent_frames

AS_CLOSE = 0.05  # a bucket that keeps 1 - AS_CLOSE of what the best bucket keeps of a picture suits it as well


class Bucket(NamedTuple):
    """A clip shape, T x H x W pixels, and the number of such clips in a batch on one rank."""

    frames: int
    height: int
    width: int
    batch_size: int

    @property
    def image_batch(self) -> int:
        """Number of images in a batch of images: as many as there are latent frames in a batch of clips."""
        return self.batch_size * latent_frames(self.frames)

    def clips_needed(self, clips: int, images: int) -> int:
        """Number of clips that `clips` batches of clips and `images` batches of images read.

        Images are the first frames of the same clips, counted from the first clip, so the larger need decides.
        """
        return max(clips * self.batch_size, images * self.image_batch)

    def __str__(self) -> str:
        return f"{self.frames}x{self.height}x{self.width}"


def image_buckets(buckets: Sequence[Bucket]) -> list[Bucket]:
    """Buckets for pictures trained beside clips in `buckets`: each size once, with its largest batch of images."""
    sizes: dict[tuple[int, int], int] = {}
    for bucket in buckets:
        size = bucket.height, bucket.width
        sizes[size] = max(sizes.get(size, 0), bucket.image_batch)
    return [Bucket(1, *size, batch) for size, batch in sizes.items()]


def read_shape(text: str) -> tuple[int, int, int]:
    """Parses a bucket's shape as a config writes it, such as 17x96x160, into frames, height and width.

    Raises:
        ValueError: if the text has another form.
    """
    if not (found := re.fullmatch(r"([1-9]\d*)x([1-9]\d*)x([1-9]\d*)", str(text))):
        raise ValueError(f"data.buckets has {text}; expected FRAMESxHEIGHTxWIDTH, such as 17x96x160")
    frames, height, width = map(int, found.groups())
    return frames, height, width


def suiting(buckets: Sequence[Bucket], frames: int, height: int, width: int) -> int | None:
    """Chooses the bucket for a video of `frames` frames of height x width pixels.

    Only buckets that are not longer than the video are considered. Among those that crop away least of its picture (to
    within `AS_CLOSE`), the longest wins, then the one that enlarges the video least, the closest in aspect ratio, the
    largest, the first.

    Returns: the index of the bucket; None if the video is shorter than every bucket.
    """

    def apart(i: int) -> float:
        """Absolute difference of the log aspect ratios: minus the log of the share of the picture that cropping keeps."""
        return abs(math.log(buckets[i].height / buckets[i].width) - math.log(height / width))

    def order(i: int) -> tuple:
        _, h, w, _ = buckets[i]
        return -buckets[i].frames, max(1.0, h / height, w / width), round(apart(i), 9), -h * w

    fitting = [i for i, bucket in enumerate(buckets) if bucket.frames <= frames]
    least = min(map(apart, fitting), default=None)
    return min((i for i in fitting if apart(i) <= least - math.log(1 - AS_CLOSE)), key=order, default=None)
