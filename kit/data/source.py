"""What a data set of clips offers, besides its items, to trainings, caches, mixtures and buckets."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from torch.utils.data import Dataset

if TYPE_CHECKING:
    from kit.data.buckets import Bucket


ITEMS = ("__getitem__", "beginning")  # a source's ways to give an item


class ClipSource(Dataset):
    """The clips of a split, numbered from 0 without end.

    Item n is a pure function of n: {"video": (3, T, H, W) in [-1, 1], "caption": str, "label": int, an index into `classes`
    or -1}; of encoded clips "feature": (d, F, h, w) in place of "video". It may have "given": int, how many first latent
    frames are not to be predicted.

    A data set of one's own derives from this class and has `__getitem__`; the rest says what else is known of the clips.

    Attributes:
        classes: their names; empty: there are none. captioned: whether captions are more than the classes' names.
        tokenizer: hash of the tokenizer that has encoded the clips; None: they are videos.
        files: names of the files that the clips are of; empty: they are of none. seed: of what is drawn at random.
    """

    classes: Sequence[str] = ()
    captioned = False
    tokenizer: str | None = None
    files: Sequence[str] = ()
    seed = 0

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        item, beginning = (next(i for i, base in enumerate(cls.__mro__) if name in vars(base)) for name in ITEMS)
        if item < beginning:  # which would pass over these items
            cls.beginning = ClipSource.beginning

    def beginning(self, n: int, frames: int) -> dict:
        """Item n with `frames` or more of its first frames, for a source that need not read them all: batches of images take
        the first frames of clips."""
        return self[n]

    @property
    def name(self) -> str:
        """Where the clips come from, in words."""
        return type(self).__name__.lower()

    @property
    def native_fps(self) -> float:
        """Frames per second of clips that are asked for at their own rate. Raises ValueError if they have none."""
        raise ValueError(f"clips of {self.name} have no frame rate of their own; give data.fps=N")

    @property
    def draws(self) -> dict:
        """Plain values, besides the names of files, that decide which clip an item is."""
        return {}

    @property
    def unreadable(self) -> list[Path | str]:
        """Paths or addresses of files that could not be read so far, in this process or a worker."""
        return []

    def known_as(self) -> list[str]:
        """Names of the files by which checkpoints know them, wherever they lie."""
        return list(map(str, self.files))

    def listing(self) -> list[str]:
        """`NAME BYTES` of each file, which tells others of its name; with `texts` it identifies the clips of a cache."""
        return []

    def texts(self) -> list[dict]:
        """`caption`, and `label` if it is known, of each file or encoded clip."""
        return []

    def distinct(self, n: int) -> bool:
        """Whether item n of held-out clips is no repetition of an earlier one, as far as is known by now."""
        return True

    def in_buckets(self, buckets: Sequence[Bucket]) -> list[BucketPart | None]:
        """Sorts the clips into buckets: the part of each; None: it has no clips.

        Raises:
            ValueError: if there is nothing to sort them by.
        """
        raise ValueError(
            f"data.buckets sorts video files by their size and length; {type(self).__name__} has no such files: take "
            f"data=clips, ucf101 or shards, a mixture of those, or data.buckets=[]"
        )


def check_source(source: object, key: str):
    """Checks what the function that the config names at `key` has made.

    Raises:
        ValueError: if it is no `ClipSource`, or a checkpoint could not hold its `draws`.
    """
    if not isinstance(source, ClipSource):
        raise ValueError(f"{key} makes a {type(source).__name__}; derive it from kit.data.source.ClipSource")
    try:
        json.dumps(source.draws)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{key}: `draws` of {type(source).__name__} holds more than plain values ({error})") from error


class BucketPart(NamedTuple):
    """The clips of a source that are in one bucket; how many files or encoded clips they are of; their share of all clips, of
    any sum."""

    clips: ClipSource
    count: int
    weight: float
