"""Buckets: clips of several shapes and durations in one training, each of the bucket that suits its video.

A bucket is a shape, frames x height x width, and how many such clips make a batch. Files are sorted into buckets by what
their heads say; each bucket then is a data set of its own, as `FolderClips` numbers it, and they take turns.
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

AS_CLOSE = 0.05  # share of a picture: where two buckets' shapes differ by less in what they cut off it, they are alike


class Bucket(NamedTuple):
    """Clips of T x H x W pixels, and how many of them a batch has on a rank."""

    frames: int
    height: int
    width: int
    batch_size: int

    @property
    def image_batch(self) -> int:
        """How many images a batch of images has: as many as there are latent frames in a batch of clips."""
        return self.batch_size * latent_frames(self.frames)

    def clips_needed(self, clips: int, images: int) -> int:
        """How many of its clips so many batches of clips, and of images, need: images are frames of the first of them."""
        return max(clips * self.batch_size, images * self.image_batch)

    def __str__(self) -> str:
        return f"{self.frames}x{self.height}x{self.width}"


def image_buckets(buckets: Sequence[Bucket]) -> list[Bucket]:
    """For pictures beside clips in these buckets: each size once, with the largest of its batches of images."""
    sizes: dict[tuple[int, int], int] = {}
    for bucket in buckets:
        size = bucket.height, bucket.width
        sizes[size] = max(sizes.get(size, 0), bucket.image_batch)
    return [Bucket(1, *size, batch) for size, batch in sizes.items()]


def read_shape(text: str) -> tuple[int, int, int]:
    """Frames, height and width of a bucket as a config has it, such as 17x96x160.

    Raises:
        ValueError: if it is something else.
    """
    if not (found := re.fullmatch(r"([1-9]\d*)x([1-9]\d*)x([1-9]\d*)", str(text))):
        raise ValueError(f"data.buckets has {text}; expected FRAMESxHEIGHTxWIDTH, such as 17x96x160")
    frames, height, width = map(int, found.groups())
    return frames, height, width


def suiting(buckets: Sequence[Bucket], frames: int, height: int, width: int) -> int | None:
    """Number of the bucket that suits a video of so many frames of so many pixels; None if it is shorter than each.

    Of those that it is long enough for, the ones that cut off least of its picture; of these the longest, then the one that
    it need be enlarged least for, then the one closest in shape, the largest, the first.
    """

    def apart(i: int) -> float:
        """From the video's aspect ratio: the logarithm of the share of its picture that stays, but for the sign."""
        return abs(math.log(buckets[i].height / buckets[i].width) - math.log(height / width))

    def order(i: int) -> tuple:
        _, h, w, _ = buckets[i]
        return -buckets[i].frames, max(1.0, h / height, w / width), round(apart(i), 9), -h * w, i

    fitting = [i for i, bucket in enumerate(buckets) if bucket.frames <= frames]
    least = min(map(apart, fitting), default=None)
    return min((i for i in fitting if apart(i) <= least - math.log(1 - AS_CLOSE)), key=order, default=None)


class BucketClips(Dataset):
    """The clips of a source in buckets, each file in the one that suits it, see `suiting`. Item n is clip n // B of bucket
    n % B, of the B buckets that have any.

    Args:
        source: of all files. buckets: of which those that suit no file are left out, and told.
    Attributes:
        buckets, parts: their shapes and their data sets. files: how many each has.
        clip_turns, image_turns: whose batches of clips and of images come when, by the buckets' numbers: of each in such a
            share that all files are used equally often.
    Raises:
        ValueError: if the source has no files to sort, or they suit no bucket.
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
        """For batches of so many clips of each bucket."""
        return Turns({i: self.files[i] / size for i, size in enumerate(sizes)}, self.source.seed)

    @property
    def classes(self) -> tuple[str, ...]:
        return self.source.classes

    def __getitem__(self, n: int) -> dict:
        """Raises: ValueError if no file of the source can be read."""
        number, i = divmod(n, len(self.parts))
        return self.parts[i][number]

    def number(self, i: int, n: int) -> int:
        """Of clip n of bucket i."""
        return n * len(self.parts) + i

    def encode(self, encode: Callable[[Dataset, Bucket, float, int], Dataset], clips: int, images: int):
        """Puts encoded clips in the place of each bucket's: of its clips, its shape, its share of the files, and how many of
        them so many batches of clips and of images, of all buckets, read."""
        for i, (part, bucket, files) in enumerate(zip(self.parts, self.buckets, self.files, strict=True)):
            own, pictures = self.clip_turns.within(i, clips), self.image_turns.within(i, images)
            self.parts[i] = encode(part, bucket, files / sum(self.files), bucket.clips_needed(own, pictures))

    def __str__(self) -> str:
        each = zip(self.buckets, self.files, strict=True)
        return ", ".join(f"{bucket} ({files} files, {bucket.batch_size} clips a batch)" for bucket, files in each)

    @property
    def unreadable(self) -> list[Path]:
        """Files whose head, or later a clip, could not be read."""
        return list(dict.fromkeys(path for source in self.sources for path in source.unreadable))


def tell(buckets: Sequence[Bucket], sorted_in: list[list[str]], readable: int):
    """Warns of buckets without files, and of files that are too short for each.

    Raises:
        ValueError: if all are.
    """
    if lost := readable - sum(map(len, sorted_in)):
        told = f"{lost} of {readable} files are shorter than each of data.buckets, {', '.join(map(str, buckets))}"
        if lost == readable:
            raise ValueError(f"{told}; add a shorter one")
        warnings.warn(f"{told}, and left out; add a shorter one", stacklevel=4)
    if empty := [str(bucket) for bucket, names in zip(buckets, sorted_in, strict=True) if not names]:
        warnings.warn(f"data.buckets: no file suits {', '.join(empty)} best; nothing is trained there", stacklevel=4)
