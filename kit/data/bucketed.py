"""The clips of a source in buckets, which take turns."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from kit.data.buckets import Bucket
from kit.data.mixture import Turns
from kit.data.source import ClipSource


class BucketClips(ClipSource):
    """The clips of a source, each in the bucket that it was sorted into.

    Each bucket is a data set of its own. With B buckets that have clips, item n is clip n // B of bucket n % B.

    Args:
        source: data set of all clips. buckets: candidates; one that no clip suits is left out, with a warning.
    Attributes:
        buckets, parts: the buckets in use and their data sets. count: number of files in each, or of encoded clips. weights:
            share of all clips that each gives, of any sum.
        clip_turns, image_turns: order in which the buckets, by number, give batches of clips and of images; their shares are
            such that all files of a source are used equally often, and that sources keep their shares of a mixture.
    Raises:
        as `ClipSource.in_buckets`.
    """

    def __init__(self, source: ClipSource, buckets: Sequence[Bucket]):
        found = source.in_buckets(buckets)
        if empty := [str(bucket) for bucket, part in zip(buckets, found, strict=True) if part is None]:
            warnings.warn(f"data.buckets: no file suits {', '.join(empty)} best; nothing is trained there", stacklevel=3)
        self.source, self.buckets = source, [bucket for bucket, part in zip(buckets, found) if part is not None]
        self.parts, self.count, self.weights = map(list, zip(*(part for part in found if part is not None)))
        self.sources, self.unit = (source, *self.parts), "encoded clips" if source.tokenizer else "files"
        self.classes, self.captioned, self.tokenizer = source.classes, source.captioned, source.tokenizer
        self.files, self.seed = source.files, source.seed
        self.clip_turns = self._turns([bucket.batch_size for bucket in self.buckets])
        self.image_turns = self._turns([bucket.image_batch for bucket in self.buckets])

    def _turns(self, sizes: list[int]) -> Turns:
        """Turns that give each bucket its share of all clips, given the number of clips in a batch of each."""
        return Turns({i: self.weights[i] / size for i, size in enumerate(sizes)}, self.source.seed)

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def native_fps(self) -> float:
        return self.source.native_fps

    @property
    def draws(self) -> dict:
        return self.source.draws

    def known_as(self) -> list[str]:
        return self.source.known_as()

    def listing(self) -> list[str]:
        return self.source.listing()

    def texts(self) -> list[dict]:
        return self.source.texts()

    def __getitem__(self, n: int) -> dict:
        """Returns item n. Raises: ValueError if no file of the source can be read."""
        number, i = divmod(n, len(self.parts))
        return self.parts[i][number]

    def beginning(self, n: int, frames: int) -> dict:
        number, i = divmod(n, len(self.parts))
        return self.parts[i].beginning(number, frames)

    def number(self, i: int, n: int) -> int:
        """Item number of clip n of bucket i."""
        return n * len(self.parts) + i

    def replace(self, encode: Callable[[ClipSource, Bucket, float, int], ClipSource], clips: int, images: int):
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
    def unreadable(self) -> list[Path | str]:
        """Files of which the head, or later a clip, could not be read."""
        return list(dict.fromkeys(path for source in self.sources for path in source.unreadable))
