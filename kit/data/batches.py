"""Samplers that choose the clips of a batch as a function of the batch's number."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterator

from torch.utils.data import Sampler

from kit.data.bucketed import BucketClips

Batch = list[tuple[int, int]]  # (clip number, how many of its frames)


class EndlessSampler(Sampler[Batch], ABC):
    """Endless batches of one rank, from a given one on. A batch holds either clips or images; each kind is a stream of its
    own.

    Args:
        image_share: share of the batches, in [0, 1], that hold images. left_out: numbers of batches to leave out; the ones
            behind them move up.
    """

    def __init__(self, first_batch: int, rank: int, ranks: int, image_share: float, left_out: frozenset[int]):
        self.first_batch, self.rank, self.ranks = first_batch, rank, ranks
        self.image_share, self.left_out = image_share, left_out

    def __iter__(self) -> Iterator[Batch]:
        for i in numbers_from(self.first_batch, self.left_out):
            images = images_among(i, self.image_share)
            if images_among(i + 1, self.image_share) > images:
                yield self.images(images)
            else:
                yield self.clips(i - images)

    @abstractmethod
    def images(self, number: int) -> Batch:
        """Returns a batch of images; `number` is how many batches of images came before it."""

    @abstractmethod
    def clips(self, number: int) -> Batch:
        """Returns a batch of clips; `number` is how many batches of clips came before it."""

    def numbers(self, batch: int, size: int) -> list[int]:
        """Numbers of this rank's clips in a batch of a stream; `size` is how many clips a batch has on a rank."""
        return [(batch * size + j) * self.ranks + self.rank for j in range(size)]


class StreamSampler(EndlessSampler):
    """Batches of clips of one shape.

    With m batches of images before it, batch i holds clips [i - m, i - m + 1) * batch_size * ranks, whole, or the first
    frames of clips [m, m + 1) * image_batch * ranks, over all ranks.

    Args: frames: of a clip. image_batch: images in a batch of them, on a rank. Other arguments: see `EndlessSampler`.
    """

    def __init__(
        self, batch_size: int, first_batch: int, rank: int, ranks: int, frames: int,
        image_share: float = 0.0, image_batch: int = 0, left_out: frozenset[int] = frozenset(),
    ):  # fmt: skip
        super().__init__(first_batch, rank, ranks, image_share, left_out)
        self.batch_size, self.frames, self.image_batch = batch_size, frames, image_batch

    def images(self, number: int) -> Batch:
        return [(n, 1) for n in self.numbers(number, self.image_batch)]

    def clips(self, number: int) -> Batch:
        return [(n, self.frames) for n in self.numbers(number, self.batch_size)]


class BucketSampler(EndlessSampler):
    """Batches of one bucket each, the same bucket on all ranks.

    Each bucket has two streams, its clips and its images. Whose turn it is, and how far its stream is, are functions of the
    batch's number.

    Args: pictures: source of the images; None: the first frames of the clips. Other arguments: see `EndlessSampler`.
    """

    def __init__(
        self, source: BucketClips, first_batch: int, rank: int, ranks: int,
        image_share: float = 0.0, left_out: frozenset[int] = frozenset(), pictures: BucketClips | None = None,
    ):  # fmt: skip
        super().__init__(first_batch, rank, ranks, image_share, left_out)
        self.source, self.pictures = source, pictures

    def images(self, number: int) -> Batch:
        if self.pictures is not None:
            return self._batch(self.pictures, number)
        i, before = self.source.image_turns.of(number)
        return [(self.source.number(i, n), 1) for n in self.numbers(before, self.source.buckets[i].image_batch)]

    def clips(self, number: int) -> Batch:
        return self._batch(self.source, number)

    def _batch(self, source: BucketClips, number: int) -> Batch:
        i, before = source.clip_turns.of(number)
        bucket = source.buckets[i]
        return [(source.number(i, n), bucket.frames) for n in self.numbers(before, bucket.batch_size)]


def images_among(batches: int, image_share: float) -> int:
    """Returns how many of the first `batches` batches hold images."""
    return int(batches * image_share)


def numbers_from(first: int, left_out: frozenset[int]) -> Iterator[int]:
    """Yields 0, 1, 2, ... without those left out, from the `first`-th on."""
    return itertools.islice((n for n in itertools.count() if n not in left_out), first, None)
