"""Data set of the video files in a folder: clips with captions and class labels."""

from __future__ import annotations

import copy
import itertools
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from kit.data.buckets import Bucket
from kit.data.captions import captions_beside, captions_by_others, captions_in, pictures_among, read_captions
from kit.data.decode import UnreadableVideo, load_backend
from kit.data.decoder_process import open_video
from kit.data.frames import frame_numbers, read_fitted
from kit.data.heads import Head, sort_files
from kit.data.listing import (
    LABEL_SOURCES,
    LEADING_WORDS,
    files_below,
    held_out_of,
    label_files,
    list_videos,
    split_files,
    without_runs,
)
from kit.data.names import ByName, Names, texts_by_name
from kit.data.shared import read_once, shared
from kit.data.source import BucketPart, ClipSource
from kit.values import check_choice, check_whole_number

RATES = 10  # files whose frame rate is looked up
SAME_RATE = 1.05  # rates that differ by no more than this factor count as one
ORDERS = 4  # file orders of epochs kept in memory: that of the clips and that of the images, and the next of each
OF_ITEMS = {  # arguments that names, labels and captions of files do not depend on
    "split", "frames", "height", "width", "fps", "seed", "backend", "val_every", "flip", "random_crop", "verify", "patience",
}  # fmt: skip


def permutation(count: int, seed: int, epoch: int) -> np.ndarray:
    """Draws an order of `count` files: a permutation (count,)."""
    return np.random.default_rng((seed, 0, epoch)).permutation(count)


def spread_first(count: int, few: int) -> list[int]:
    """Numbers from 0 to `count` - 1: first `few` of them, evenly spread, then the others."""
    spread = [count * n // few for n in range(few)]
    return list(dict.fromkeys((*spread, *range(count))))


class Clip(NamedTuple):
    """A clip of a file.

    Fields: video, (3, T, H, W) in [-1, 1]; lacking, how many of its last frames repeat the file's last frame because the
    file is too short; size, (H, W) of the file's own frames.
    """

    video: Tensor
    lacking: int
    size: tuple[int, int]


class NotDelivered(UnreadableVideo):
    """A file that its storage did not deliver: it may do so another time."""


@dataclass(eq=False)
class FolderClips(ClipSource):
    """Data set of video files: item n is {"video": (3, T, H, W) in [-1, 1], "caption": str, "label": int}.

    Item n is a pure function of (seed, n), for any n >= 0. `train` is endless: it goes through its files in a new order each
    epoch and takes a random clip of each. `val` goes through its files in one shuffled order and takes the middle clip of
    each, `all` the middle clip of file n modulo the number of files. A file that is too short is extended by its last frame.
    The label is an index into `classes`, -1 without classes; the caption is the given one, else the name of the class, else
    empty. A file that cannot be read is reported once and recorded, and the next file of the stream takes its place.

    Args:
        root: folder of videos; for clips of one frame also of pictures. split: `val`, every `val_every`-th file of the
            sorted list, `train`, the others, or `all`.
        frames: T, 1 gives images. height, width: pixels. fps: frames per second, each file's own if None or 0.
        seed: each seed gives another stream. backend: see `kit.data.decode`.
        label_from, filename_pattern: see `label_files`. captions: see `read_captions`; by default the table in the folder,
            see `captions_in`, or files beside the videos, see `captions_beside`, or what other programs have, see
            `captions_by_others`. False: none.
        flip: mirror half of the training clips; wrong where captions tell left from right.
        random_crop: crop training clips anywhere instead of in the centre.
        verify: read a clip of every file now, to learn of unreadable and short files at once.
        patience: seconds that a file may take to open, and again to decode; a file that takes longer or crashes the decoder
            is unreadable. None: decode in this process, which such a file then hangs or kills.

    Attributes: files (this split's, relative to root), classes (sorted names, the same in both splits), unreadable (files
    that this process or a loader's worker could not read), and of this process: skipped (file -> why it was not readable),
    short (file -> how many frames it lacked).
    Raises:
        FileNotFoundError, ValueError, ImportError: for wrong arguments; ValueError from an item if no file can be read.
    """

    root: str | Path
    split: str = "train"
    frames: int = 17
    height: int = 64
    width: int = 64
    fps: float | None = None
    seed: int = 0
    backend: str = "decord"
    label_from: str = "auto"
    filename_pattern: str = LEADING_WORDS
    captions: str | Path | bool | None = None
    val_every: int = 5
    flip: bool = False
    random_crop: bool = False
    verify: bool = False
    patience: float | None = 60.0

    unused: ClassVar[tuple[str, ...]] = ()  # arguments that a subclass has no use for

    files: Names = field(init=False, repr=False)
    classes: tuple[str, ...] = field(init=False, repr=False)
    spare: Names = field(init=False, repr=False, default_factory=Names)
    untold: list[str] = field(init=False, repr=False, default_factory=list)
    skipped: dict[Path | str, str] = field(init=False, repr=False)
    short: dict[Path | str, int] = field(init=False, repr=False)

    def __post_init__(self):
        self._check_arguments()
        about = repr({**{k: v for k, v in vars(self).items() if k not in OF_ITEMS}, "pictures": self.frames == 1})
        key, of_split = (type(self), about), (type(self), about, self.split, self.val_every)
        with read_once():
            names = self._names()
            self.files = shared(of_split, lambda: Names(self._files_of_split(names)))
            self._labels, self._captions = shared(key, lambda: self._words_of(names))
        if self.split == "val" and len(names) == 1:
            warnings.warn(f"{self.root} holds one video only: it is used for training and validation", stacklevel=3)
        self.classes = tuple(sorted(set(self._labels.values())))
        self._numbers = {label: number for number, label in enumerate(self.classes)}
        self._begin_records()
        if self.verify:
            readable = sum(self._read(name) is not None for name in self.files)
            if not readable:
                raise self.nothing_readable()
            self._tell_short()

    def _words_of(self, names: Sequence[str]) -> tuple[ByName[str], ByName[str]]:
        """Labels and captions of the files of all splits, whichever this one is. Warns of those that have no words as a
        caption where others have."""
        labels, captions = self._labels_of(names), self._captions_of(names)
        if captions and (without := [name for name in names if not captions.get(name, labels.get(name, "")).strip()]):
            message = f"{len(without)} of {len(names)} files in {self.root} have an empty caption or none, such as"
            self._tell(f"{message} {without[0]!r}: they train without a condition; caption them, or take them out")
        return texts_by_name(labels), texts_by_name(captions)

    def _tell(self, message: str) -> None:
        """Warns of something about the files of all splits; in the split `val`, beside which another warns of it, it is kept
        in `untold`."""
        if self.split != "val":
            warnings.warn(message, stacklevel=7)
        else:
            self.untold.append(message)

    def _begin_records(self) -> None:
        """Starts empty records of the files that are too short or cannot be read."""
        self.skipped, self.short, self._told_short = {}, {}, False
        self._orders: dict[tuple[int, int, int], np.ndarray] = {}  # seed, epoch, number of files -> positions in `files`
        count = len(self.files) + len(self.spare)
        self._unreadable = torch.zeros(count, dtype=torch.bool).share_memory_()  # one for all workers

    def _names(self) -> Sequence[str]:
        """Names of all files, in order."""
        self.root = Path(self.root)
        return shared((list_videos, self.root, self.frames == 1), lambda: list_videos(self.root, pictures=self.frames == 1))

    def _files_of_split(self, names: Sequence[str]) -> list[str]:
        return split_files(names, self.split, held_out_of(names, self.val_every))

    def _labels_of(self, names: Sequence[str]) -> Mapping[str, str]:
        return label_files(names, self.label_from, self.filename_pattern)

    def _captions_of(self, names: Sequence[str]) -> Mapping[str, str]:
        if self.captions is False:
            return {}
        listed = without_runs(files_below(self.root)) if self.root.is_dir() else []
        if table := self.captions or captions_in(self.root):
            return read_captions(Path(table), names, pictures_among(listed), self.root, self._tell)
        if captions := captions_beside(self.root, names, listed, self._tell):
            return captions
        return captions_by_others(self.root, names, listed, self._tell)

    @contextmanager
    def _at(self, name: str) -> Iterator[Path]:
        """Yields the path of the file, valid while the block runs. Raises: UnreadableVideo if it cannot be fetched."""
        yield self.root / name

    def path_of(self, name: str) -> Path | str:
        """Path of a file, or its address, for messages and records."""
        return self.root / name

    def _check_arguments(self) -> None:
        if str(self.root) == "":  # as a path it would be the folder that the command runs in
            raise ValueError("an empty path names no folder of videos. Is a variable of the shell unset?")
        for key, choices in (("split", ("train", "val", "all")), ("label_from", LABEL_SOURCES)):
            check_choice(key, getattr(self, key), choices)
        for key, least in (("frames", 1), ("height", 1), ("width", 1), ("seed", 0), ("val_every", 2)):
            check_whole_number(key, getattr(self, key), least)
        usual = {argument.name: argument.default for argument in fields(self)}
        for key in self.unused:
            if getattr(self, key) != usual[key]:
                raise ValueError(f"{key}={getattr(self, key)}: {type(self).__name__} does not use it; leave it out")
        if not 0 <= (self.fps or 0) < math.inf:
            raise ValueError(f"fps={self.fps}; expected frames per second, or 0: the files' own")
        if self.patience is not None and self.patience <= 0:
            raise ValueError(f"patience={self.patience}; expected seconds above 0, or null")
        load_backend(self.backend)

    @property
    def name(self) -> str:
        return str(self.root)

    @property
    def draws(self) -> dict:
        return {"seed": self.seed}

    def listing(self) -> list[str]:
        return [f"{known} {self.bytes_of(name)}" for known, name in zip(self.known_as(), self.files, strict=True)]

    def bytes_of(self, name: str) -> int:
        """Size of a file; -1 if it is gone, as one behind a broken link: whoever reads it will report it."""
        try:
            return os.path.getsize(os.path.join(self.root, name))
        except OSError:
            return -1

    def texts(self) -> list[dict]:
        quick = copy.copy(self)
        quick._labels, quick._captions = self._labels.unpacked(), self._captions.unpacked()
        return [quick.words(name) for name in self.files]

    @property
    def captioned(self) -> bool:
        """Whether captions were given, rather than made of class names."""
        return bool(self._captions)

    @property
    def native_fps(self) -> float:
        """Median frame rate of ten readable files, from the first to the last. Warns if rates differ, since each clip has
        its file's.

        Raises:
            ValueError: if no file can be read.
        """
        rates = []
        for place in spread_first(len(self.files), RATES):
            name = self.files[place]
            try:
                with self._at(name) as path:
                    rates.append(open_video(path, self.backend, self.patience).fps)
            except UnreadableVideo as error:
                self.skip(name, error)
            if len(rates) == RATES:
                break
        if not rates:
            raise self.nothing_readable()
        if self.frames > 1 and max(rates) > SAME_RATE * min(rates):
            found = f"files in {self.root} have {min(rates):.4g} to {max(rates):.4g} fps, so the same motion has other speeds"
            warnings.warn(f"{found}; data.fps=N (of a protocol: protocol.fps=N) takes all at one rate", stacklevel=2)
        return float(np.median(rates))

    def file(self, n: int) -> str:
        """Name of the file that item n is taken from, if that file can be read."""
        epoch, position = divmod(n, len(self.files))
        match self.split:
            case "train":
                position = self._order(self.seed, epoch, self._drawn_order)[position]
            case "val":  # of many a few are looked at: from all over, and the same whatever the seed
                position = self._order(0, 0, permutation)[position]
        return self.files[position]

    def distinct(self, n: int) -> bool:  # not the second of a file, nor of another file because its own cannot be read
        return n < len(self.files) and self.path_of(self.file(n)) not in self.skipped

    def _order(self, seed: int, epoch: int, draw: Callable[[int, int, int], np.ndarray]) -> np.ndarray:
        """Order of the files in an epoch, as positions in `files`: draw(count, seed, epoch), of the last ones kept."""
        key = seed, epoch, len(self.files)
        if key not in self._orders:
            if len(self._orders) >= ORDERS:
                del self._orders[next(iter(self._orders))]  # the one that was drawn first
            self._orders[key] = draw(len(self.files), seed, epoch)
        return self._orders[key]

    def _drawn_order(self, count: int, seed: int, epoch: int) -> np.ndarray:
        """Order of a training epoch."""
        return permutation(count, seed, epoch)

    def __getitem__(self, n: int) -> dict:
        return self._item(n, self.frames)

    def beginning(self, n: int, frames: int) -> dict:
        return self._item(n, frames)

    def _item(self, n: int, frames: int) -> dict:
        """Item n with the first `frames` frames of its clip."""
        if n < 0:
            raise IndexError(f"item {n}; expected a number of 0 or more")
        draws = np.random.default_rng((self.seed, 1, n)).random(4) if self.split == "train" else np.full(4, 0.5)
        for name in self._candidates(n):
            video = self._read(name, *draws, frames=frames)
            if video is not None:
                self._tell_short()
                return {"video": video, **self.words(name)}
        raise self.nothing_readable()

    def words(self, name: str) -> dict:
        """`caption` and `label` of a file."""
        label = self._labels.get(name, "")
        caption = self._captions.get(name, " ".join(label.replace("_", " ").split()))
        return {"caption": caption, "label": self._numbers[label] if label else -1}

    def _candidates(self, n: int) -> Iterator[str]:
        """Yields the files to try for item n: its own, those of the next items until each file had its turn, the spare
        ones."""
        seen = set()
        for name in map(self.file, itertools.count(n)):
            yield name
            seen.add(name)
            if len(seen) == len(self.files):
                break
        yield from self.spare

    def _read(self, name: str, start=0.5, top=0.5, left=0.5, mirror=0.5, frames: int | None = None) -> Tensor | None:
        """The beginning of a clip of a file, or None if it cannot be read; the four numbers in [0, 1) choose the clip."""
        fewer = {"frames": frames} if frames is not None and frames < self.frames else {}
        try:
            clip = self.clip(name, start, *((top, left) if self.random_crop else ()), **fewer)
        except UnreadableVideo as error:
            self.skip(name, error)
            return None
        if clip.lacking:
            self.short[self.path_of(name)] = clip.lacking
        return clip.video.flip(-1) if self.flip and mirror < 0.5 else clip.video

    def clip(
        self, name: str, start: float = 0.5, top: float = 0.5, left: float = 0.5, frames: int | None = None
    ) -> Clip:  # fmt: skip
        """A clip of a file; `start` as in `frame_numbers`, `top` and `left` as in `fit`. Of the clip that these choose, only
        the first `frames` frames are read; None: all.

        Raises:
            UnreadableVideo: if the file cannot be read.
        """
        with self._at(name) as path:
            video = open_video(path, self.backend, self.patience)
            numbers = frame_numbers(len(video), video.fps, self.frames, self.fps, start)
            shown = np.minimum(numbers, len(video) - 1)[:frames]
            pixels, size = read_fitted(video, shown, self.height, self.width, top, left)
        return Clip(pixels, int((numbers >= len(video)).sum()), size)

    def head(self, name: str) -> Head | None:
        """Reads the length, frame rate and frame size of a file; None if it cannot be read.

        Raises:
            NotDelivered: heads are kept, and it would be left out for good.
        """
        try:
            with self._at(name) as path:
                video = open_video(path, self.backend, self.patience)
                height, width = video.frames([0]).shape[1:3]
        except NotDelivered:
            raise
        except UnreadableVideo as error:
            self.skip(name, error)
            return None
        return Head(len(video), video.fps, height, width)

    def part(self, files: list[str], frames: int, height: int, width: int) -> FolderClips:
        """Data set of some of the files, with clips of another shape. If none of them can be read, the other files
        stand in."""
        part, own = copy.copy(self), set(files)
        part.files, part.frames, part.height, part.width = Names(files), frames, height, width
        part.spare = Names(name for name in self.files if name not in own)
        part._begin_records()
        return part

    def in_buckets(self, buckets: Sequence[Bucket]) -> list[BucketPart | None]:
        """Puts each file into the bucket that suits it. Raises as `sort_files`."""
        each = zip(buckets, sort_files(self, buckets), strict=True)
        return [BucketPart(self.part(files, *b[:3]), len(files), len(files)) if files else None for b, files in each]

    def skip(self, name: str, error: UnreadableVideo) -> None:
        """Records a file that cannot be read, and warns the first time.

        The file is tried again whenever its turn comes: otherwise an item would depend on which items were read before.
        """
        self.skipped[self.path_of(name)] = error.reason
        place = self.files.index(name) if name in self.files else len(self.files) + self.spare.index(name)
        if not self._unreadable[place]:
            self._unreadable[place] = True
            warnings.warn(f"{error} A training takes the clip of another file in its place.", stacklevel=4)

    @property
    def unreadable(self) -> list[Path | str]:
        count, places = len(self.files), self._unreadable.nonzero().flatten().tolist()
        names = [self.files[place] if place < count else self.spare[place - count] for place in places]
        return [self.path_of(name) for name in names]

    def _tell_short(self) -> None:
        if self.short and not self._told_short:
            self._told_short = True
            path, lacking = next(iter(self.short.items()))
            found = f"{len(self.short)} of {len(self.files)} files, such as {path} by {lacking} frames"
            way_out = "their last frame is held. Ask for fewer frames or a higher fps."
            warnings.warn(f"too short for a clip of {self.frames} frames so far: {found}; {way_out}", stacklevel=3)

    def nothing_readable(self) -> ValueError:
        kind = "videos" if self.split == "all" else f"{self.split} videos"
        what = f"none of the {len(self.files)} {kind} in {self.root} can be read"
        reasons = "; ".join(f"{Path(path).name}: {reason}" for path, reason in itertools.islice(self.skipped.items(), 3))
        return ValueError(f"{what} ({reasons}); check them")
