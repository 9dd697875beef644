"""Buckets: training on clips of several shapes and durations, each video in the bucket that suits it.

A bucket is a clip shape, frames x height x width, and the number of such clips in a batch. Files are sorted into buckets by
their length and frame size (`Head`). Each bucket is then a data set of its own, numbered as `FolderClips` does, and the
buckets take turns.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from torch.utils.data import Dataset

from kit.data.clips import FolderClips, most_frames
from kit.data.heads import read_heads
from kit.data.mixture import Turns
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
        return -buckets[i].frames, max(1.0, h / height, w / width), round(apart(i), 9), -h * w, i

    fitting = [i for i, bucket in enumerate(buckets) if bucket.frames <= frames]
    least = min(map(apart, fitting), default=None)
    return min((i for i in fitting if apart(i) <= least - math.log(1 - AS_CLOSE)), key=order, default=None)


class BucketClips(Dataset):
    """The clips of a source sorted into buckets, each file in the bucket that suits it (see `suiting`).

    With B buckets that have files, item n is clip n // B of bucket n % B.

    Args:
        source: data set of all files. buckets: candidates; a bucket that suits no file is left out, with a warning.
    Attributes:
        buckets, parts: the buckets in use and their data sets. files: number of files in each.
        clip_turns, image_turns: order in which the buckets, by number, give batches of clips and of images; their shares are
            such that all files are used equally often.
    Raises:
        ValueError: if the source has no files to sort, or none of them suits a bucket.
    """

    def __init__(self, source: FolderClips, buckets: Sequence[Bucket]):
        if not isinstance(source, FolderClips):
            raise ValueError(
                f"data.buckets sorts video files by their size and length; {type(source).__name__} has no such files: "
                f"take data=clips, ucf101 or shards, or data.buckets=[]"
            )
        sorted_in: list[list[str]] = [[] for _ in buckets]
        if not (heads := read_heads(source)):
            raise source.nothing_readable()
        for name, head in heads.items():
            frames = most_frames(head.count, head.rate, source.fps)
            if (i := suiting(buckets, frames, head.height, head.width)) is not None:
                sorted_in[i].append(name)
        tell(buckets, sorted_in, len(heads))
        used = [i for i, names in enumerate(sorted_in) if names]
        self.source, self.buckets = source, [buckets[i] for i in used]
        self.parts: list[Dataset] = [source.part(sorted_in[i], *buckets[i][:3]) for i in used]
        self.files, self.sources = [len(sorted_in[i]) for i in used], (source, *self.parts)
        self.clip_turns = self._turns([bucket.batch_size for bucket in self.buckets])
        self.image_turns = self._turns([bucket.image_batch for bucket in self.buckets])

    def _turns(self, sizes: list[int]) -> Turns:
        """Turns that use all files equally often, given the number of clips in a batch of each bucket."""
        return Turns({i: self.files[i] / size for i, size in enumerate(sizes)}, self.source.seed)

    @property
    def classes(self) -> tuple[str, ...]:
        return self.source.classes

    def __getitem__(self, n: int) -> dict:
        """Returns item n. Raises: ValueError if no file of the source can be read."""
        number, i = divmod(n, len(self.parts))
        return self.parts[i][number]

    def number(self, i: int, n: int) -> int:
        """Item number of clip n of bucket i."""
        return n * len(self.parts) + i

    def encode(self, encode: Callable[[Dataset, Bucket, float, int], Dataset], clips: int, images: int):
        """Replaces the clips of each bucket by encoded ones.

        Args:
            encode: called as encode(part, bucket, share, needed) with a bucket's data set, the bucket, its share of the
                files, and how many of its clips are read; returns the encoded data set.
            clips, images: number of batches of clips and of images that are read, of all buckets together.
        """
        for i, (part, bucket, files) in enumerate(zip(self.parts, self.buckets, self.files, strict=True)):
            own, pictures = self.clip_turns.within(i, clips), self.image_turns.within(i, images)
            self.parts[i] = encode(part, bucket, files / sum(self.files), bucket.clips_needed(own, pictures))

    def __str__(self) -> str:
        each = zip(self.buckets, self.files, strict=True)
        return ", ".join(f"{bucket} ({files} files, {bucket.batch_size} clips a batch)" for bucket, files in each)

    @property
    def unreadable(self) -> list[Path]:
        """Files of which the head, or later a clip, could not be read."""
        return list(dict.fromkeys(path for source in self.sources for path in source.unreadable))


def tell(buckets: Sequence[Bucket], sorted_in: list[list[str]], readable: int):
    """Warns about buckets without files, and about files that are too short for every bucket.

    Raises:
        ValueError: if all files are too short.
    """
    if lost := readable - sum(map(len, sorted_in)):
        message = f"{lost} of {readable} files are shorter than each of data.buckets, {', '.join(map(str, buckets))}"
        if lost == readable:
            raise ValueError(f"{message}; add a shorter one")
        warnings.warn(f"{message}, and left out; add a shorter one", stacklevel=4)
    if empty := [str(bucket) for bucket, names in zip(buckets, sorted_in, strict=True) if not names]:
        warnings.warn(f"data.buckets: no file suits {', '.join(empty)} best; nothing is trained there", stacklevel=4)
