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

from kit.data.cache import CachedBuckets
from kit.data.clips import FolderClips, most_frames
from kit.data.heads import read_heads
from kit.data.mixture import Mixture, Turns
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

    With B buckets that have files, item n is clip n // B of bucket n % B. Of a mixture, each bucket is a mixture of the
    sources that have files for it.

    Args:
        source: data set of all files, a mixture of such, or a cache in buckets.
        buckets: candidates; one that suits no file is left out, with a warning.
    Attributes:
        buckets, parts: the buckets in use and their data sets. count: number of files in each, or of encoded clips. weights:
            share of all clips that each gives, of any sum.
        clip_turns, image_turns: order in which the buckets, by number, give batches of clips and of images; their shares are
            such that all files of a source are used equally often, and that sources keep their shares of a mixture.
    Raises:
        ValueError: if the source has no files to sort, none of them suits a bucket, or a cache has no such bucket.
    """

    def __init__(self, source: FolderClips | Mixture | CachedBuckets, buckets: Sequence[Bucket]):
        cached = isinstance(source, CachedBuckets)
        found = [source.part(str(bucket)) for bucket in buckets] if cached else sorted_files(source, buckets)
        if empty := [str(bucket) for bucket, part in zip(buckets, found, strict=True) if part is None]:
            warnings.warn(f"data.buckets: no file suits {', '.join(empty)} best; nothing is trained there", stacklevel=3)
        self.source, self.buckets = source, [bucket for bucket, part in zip(buckets, found) if part is not None]
        self.parts, self.count, self.weights = map(list, zip(*(part for part in found if part is not None)))
        self.sources, self.unit = (source, *self.parts), "encoded clips" if cached else "files"
        self.clip_turns = self._turns([bucket.batch_size for bucket in self.buckets])
        self.image_turns = self._turns([bucket.image_batch for bucket in self.buckets])

    def _turns(self, sizes: list[int]) -> Turns:
        """Turns that give each bucket its share of all clips, given the number of clips in a batch of each."""
        return Turns({i: self.weights[i] / size for i, size in enumerate(sizes)}, self.source.seed)

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
                clips, and how many of them are read; returns the encoded data set.
            clips, images: number of batches of clips and of images that are read, of all buckets together.
        """
        for i, (part, bucket, weight) in enumerate(zip(self.parts, self.buckets, self.weights, strict=True)):
            own, pictures = self.clip_turns.within(i, clips), self.image_turns.within(i, images)
            self.parts[i] = encode(part, bucket, weight / sum(self.weights), bucket.clips_needed(own, pictures))

    def __str__(self) -> str:
        each = zip(self.buckets, self.count, strict=True)
        return ", ".join(f"{bucket} ({count} {self.unit}, {bucket.batch_size} clips a batch)" for bucket, count in each)

    @property
    def unreadable(self) -> list[Path]:
        """Files of which the head, or later a clip, could not be read."""
        return list(dict.fromkeys(path for source in self.sources for path in getattr(source, "unreadable", ())))


def sorted_files(source: FolderClips | Mixture, buckets: Sequence[Bucket]) -> list[tuple[Dataset, int, float] | None]:
    """Sorts the files of a source into buckets.

    Returns:
        of each bucket its data set, the number of its files, and its share of all clips, of any sum; None: it has no files.
    Raises:
        as `folders_of` and `sort_files`.
    """
    folders = folders_of(source)
    files = {name: sort_files(folder, buckets) for name, folder in folders.items()}
    found: list[tuple[Dataset, int, float] | None] = []
    for i, bucket in enumerate(buckets):
        parts = {name: folders[name].part(each[i], *bucket[:3]) for name, each in files.items() if each[i]}
        count = sum(len(part.files) for part in parts.values())
        if not parts:
            found.append(None)
        elif isinstance(source, Mixture):
            shares = {name: source.weights[name] * len(files[name][i]) / sum(map(len, files[name])) for name in parts}
            found.append((source.of_parts(parts, shares), count, sum(shares.values())))
        else:
            found.append((*parts.values(), count, count))
    return found


def folders_of(source: Dataset) -> dict[str, FolderClips]:
    """Returns the data sets of files that a source consists of, by their names in a mixture.

    Raises:
        ValueError: if it has others.
    """
    folders = source.sources if isinstance(source, Mixture) else {"": source}
    if others := [type(folder).__name__ for folder in folders.values() if not isinstance(folder, FolderClips)]:
        raise ValueError(
            f"data.buckets sorts video files by their size and length; {others[0]} has no such files: take data=clips, "
            f"ucf101 or shards, a mixture of those, or data.buckets=[]"
        )
    return folders


def sort_files(folder: FolderClips, buckets: Sequence[Bucket]) -> list[list[str]]:
    """Sorts the readable files of a folder into the buckets that suit them: the files of each bucket.

    Warns about files that are too short for every bucket, which are left out.

    Raises:
        ValueError: if all files are too short, or none can be read.
    """
    files: list[list[str]] = [[] for _ in buckets]
    if not (heads := read_heads(folder)):
        raise folder.nothing_readable()
    for name, head in heads.items():
        frames = most_frames(head.count, head.rate, folder.fps)
        if (i := suiting(buckets, frames, head.height, head.width)) is not None:
            files[i].append(name)
    if lost := len(heads) - sum(map(len, files)):
        shapes = ", ".join(map(str, buckets))
        message = f"{lost} of {len(heads)} files in {folder.root} are shorter than each of data.buckets, {shapes}"
        if lost == len(heads):
            raise ValueError(f"{message}; add a shorter one")
        warnings.warn(f"{message}, and left out; add a shorter one", stacklevel=4)
    return files
