"""A folder of video files as a data set: clips with captions and class labels."""

from __future__ import annotations

import copy
import csv
import functools
import glob
import itertools
import json
import math
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from kit.data.decode import PICTURES, UnreadableVideo, load_backend
from kit.data.decoder_process import open_video
from kit.data.heads import Head
from kit.files import written_aside

ORDERS = 64  # of files in an epoch that are held: of each bucket that of its clips, and that of its images
SUFFIXES = (".mp4", ".mkv", ".webm", ".avi", ".mov", ".mpg", ".mpeg", ".gif", ".m4v")
CAPTION_FILES = ("captions.csv", "captions.jsonl", "captions.json")
LABEL_SOURCES = ("auto", "folder", "filename", "none")
LEADING_WORDS = r"^(?P<label>.+?)_+\d+$"  # jumping_jack_00000004 -> jumping_jack


def list_videos(root: Path, pictures: bool = False) -> list[str]:
    """The video files, and pictures where they will do, in a folder and the folders below it, as sorted posix paths
    relative to it.

    Raises:
        FileNotFoundError: if the folder does not exist or holds none.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"root={str(root)!r} is not a folder; set `root` to a folder of video files")
    names = glob.glob("**/*", root_dir=root, recursive=True)  # follows links to folders, passes over hidden files
    suffixes = SUFFIXES + PICTURES * pictures
    videos = sorted(Path(name).as_posix() for name in names if name.lower().endswith(suffixes))
    if not videos:
        what = "no video or picture" if pictures else "no video"
        raise FileNotFoundError(f"root={str(root)!r} holds {what}; expected files ending in {', '.join(suffixes)}")
    return videos


def split_files(names: Sequence[str], split: str, every: int) -> list[str]:
    """Every `every`-th name for `val`, at least one; the others for `train`; `all`. A single name is in each."""
    if split == "all":
        return list(names)
    held_out = list(names[every - 1 :: every] or names[-1:])
    if split == "val" or len(names) == 1:
        return held_out
    return [name for name in names if name not in set(held_out)]


def label_files(names: Sequence[str], source: str, pattern: str) -> dict[str, str]:
    """Name -> class name, or nothing at all if the files have no classes.

    Args:
        source: "folder" is the innermost folder, "filename" the group `label` of the regular expression `pattern` in
            the file name without its suffix, "none" no classes; "auto" is the first of these that tells files apart.
    Raises:
        ValueError: if a file has no such label, or the pattern no such group.
    """
    folders = {name: PurePosixPath(name).parent.name for name in names}
    words = {name: _filename_label(name, pattern) for name in names}
    match source:
        case "auto" if all(folders.values()) and len(set(folders.values())) > 1:
            return folders
        case "auto" if all(words.values()) and 1 < len(set(words.values())) < len(names):
            return words
        case "auto" | "none":
            return {}
    labels = folders if source == "folder" else words
    for name, label in labels.items():
        if not label:
            expected = "a folder named after its class" if source == "folder" else f"a name that matches {pattern!r}"
            raise ValueError(f"label_from={source!r}: {name} has no label, expected {expected}; or set `label_from`")
    return labels


def _filename_label(name: str, pattern: str) -> str:
    try:
        match = re.search(pattern, PurePosixPath(name).stem)
        return match["label"] if match else ""
    except (re.error, IndexError) as error:
        raise ValueError(f"filename_pattern={pattern!r}: {error}; expected one such as {LEADING_WORDS!r}") from error


def read_captions(path: Path, names: Sequence[str]) -> dict[str, str]:
    """Name -> caption from a table with one row for each of `names`.

    Args:
        path: csv with the columns, or jsonl with the keys, `file` and `caption`; or json, a list of such rows or an
            object of file: caption. `file` is the name, with or without its suffix.
    Raises:
        FileNotFoundError: if there is no such table.
        ValueError: if it is malformed, names unknown files or the same file twice, or lacks a file.
    """
    captions: dict[str, str] = {}
    for number, row in enumerate(_rows(path), start=1):
        file, caption = (row.get(key) if isinstance(row, dict) else None for key in ("file", "caption"))
        if not (isinstance(file, str) and isinstance(caption, str)):
            raise ValueError(f"{path}, row {number}: expected texts named `file` and `caption`, found {row}; add them")
        if file in captions:
            raise ValueError(f"{path}, row {number}: a second caption for {file!r}; keep one for each file")
        captions[file] = caption

    keys = {name: name if name in captions else str(PurePosixPath(name).with_suffix("")) for name in names}
    if unknown := sorted(captions.keys() - set(keys.values())):
        example = f"such as {unknown[0]!r}; expected paths relative to the data folder, such as {names[0]!r}"
        raise ValueError(f"{path} has captions for {len(unknown)} files that are not there, {example}")
    if missing := [name for name, key in keys.items() if key not in captions]:
        raise ValueError(f"{path} has no caption for {len(missing)} files, such as {missing[0]!r}; add their rows")
    return {name: captions[key] for name, key in keys.items()}


def _rows(path: Path) -> list:
    """The rows of a caption table, not yet checked."""
    if not path.is_file():
        raise FileNotFoundError(f"captions={str(path)!r} is not a file; give a csv, jsonl or json, or leave it out")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            match path.suffix.lower():
                case ".csv":
                    return list(csv.DictReader(file))
                case ".jsonl":
                    return [json.loads(line) for line in file if line.strip()]
                case ".json":
                    table = json.load(file)
                    named = isinstance(table, dict)
                    return [{"file": k, "caption": v} for k, v in table.items()] if named else list(table)
    except (csv.Error, UnicodeDecodeError, json.JSONDecodeError, TypeError) as error:
        raise ValueError(f"{path} is not valid {path.suffix[1:]} in UTF-8: {error}") from error
    raise ValueError(f"captions={str(path)!r}: expected a file ending in .csv, .jsonl or .json")


def write_captions(captions: dict[str, str], path: Path) -> None:
    """Writes name -> caption as a csv for `read_captions`."""
    with written_aside(path) as aside, open(aside, "w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerows([("file", "caption"), *sorted(captions.items())])


def is_captioned(folder: Path) -> bool:
    """Whether each video in the folder has its caption in captions.csv, and each caption its video."""
    try:
        return bool(read_captions(folder / "captions.csv", list_videos(folder)))
    except (FileNotFoundError, ValueError):
        return False


def frame_numbers(count: int, rate: float, frames: int, fps: float | None, start: float) -> np.ndarray:
    """Which frames of a file make a clip: int (T,). Numbers of `count` and more mean that the file is too short.

    Args:
        count, rate: number of frames and frames per second of the file.
        fps: frames per second of the clip, the file's own if None or 0; the nearest frame is taken at each step.
        start: from 0, the clip begins with the file, to 1, it ends with the file.
    """
    step = rate / fps if fps else 1.0
    slack = max(count - 1 - step * (frames - 1), 0)
    return np.floor(start * slack + step * np.arange(frames) + 0.5).astype(int)


def most_frames(count: int, rate: float, fps: float | None) -> int:
    """How many frames the longest clip of a file has for which it is not too short; arguments as of `frame_numbers`."""
    step = rate / fps if fps else 1.0
    return math.ceil((count - 0.5) / step)


def fit(video: np.ndarray, height: int, width: int, top: float = 0.5, left: float = 0.5) -> Tensor:
    """Resizes uint8 (T, H, W, 3) until it just covers (height, width), and crops it.

    Args:
        top, left: where the crop lies, 0 to 1; 0.5 is the centre.
    Returns: float32 (3, T, height, width) in [-1, 1].
    """
    clip = torch.from_numpy(np.ascontiguousarray(video)).permute(0, 3, 1, 2)
    scale = max(height / clip.shape[2], width / clip.shape[3])
    size = [max(round(side * scale), least) for side, least in zip(clip.shape[2:], (height, width), strict=True)]
    clip = F.interpolate(clip, size, mode="bilinear", antialias=True)
    y, x = round(top * (size[0] - height)), round(left * (size[1] - width))
    clip = clip[:, :, y : y + height, x : x + width].permute(1, 0, 2, 3).contiguous()
    return clip.float() / 127.5 - 1


@functools.lru_cache(maxsize=ORDERS)
def _order(seed: int, epoch: int, count: int) -> np.ndarray:
    """The order of `count` files in an epoch: a permutation (count,)."""
    return np.random.default_rng((seed, 0, epoch)).permutation(count)


class Clip(NamedTuple):
    """A clip of a file.

    Fields: video, (3, T, H, W) in [-1, 1]; lacking, how many of its last frames are the file's last one, held; size,
        (H, W) of the file's own frames.
    """

    video: Tensor
    lacking: int
    size: tuple[int, int]


@dataclass(eq=False)
class FolderClips(Dataset):
    """The data set: item n is {"video": (3, T, H, W) in [-1, 1], "caption": str, "label": int}.

    Item n is a pure function of (seed, n), for any n >= 0. `train` is endless: it goes through its files in a new order
    each epoch and takes a random clip of each. `val` and `all` take the middle clip of file n modulo their number. The last
    frame of a file that is too short is held. The label is an index into `classes`, -1 without classes; the caption is
    the given one, else the name of the class, else empty. A file that cannot be read is reported once and recorded,
    and the next file of the stream takes its place.

    Args:
        root: folder of videos, for clips of one frame also of pictures. split: `val`, every `val_every`-th file of the
            sorted list, `train`, the others, or `all`.
        frames: T, 1 gives images. height, width: pixels. fps: frames per second, each file's own if None or 0.
        seed: another seed is another stream. backend: of `kit.data.decode`.
        label_from, filename_pattern: see `label_files`. captions: see `read_captions`; by default the file
            captions.csv, .jsonl or .json in the folder, if there is one.
        flip: mirror half of the training clips; wrong where captions tell left from right.
        random_crop: crop training clips anywhere instead of in the centre.
        verify: read a clip of every file now, to learn of unreadable and short files at once.
        patience: seconds that a file may take to open, and to decode; what takes longer, or crashes the decoder, is
            unreadable. None: decode in this process, which then waits or dies with it.

    Attributes: files (this split's, relative to root), classes (sorted names, the same in both splits), unreadable (files
        that this process or a loader's worker could not read), and of this process: skipped (file -> why it was not
        readable), short (file -> how many frames it lacked).
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
    captions: str | Path | None = None
    val_every: int = 5
    flip: bool = False
    random_crop: bool = False
    verify: bool = False
    patience: float | None = 60.0

    files: list[str] = field(init=False, repr=False)
    classes: tuple[str, ...] = field(init=False, repr=False)
    spare: list[str] = field(init=False, repr=False, default_factory=list)
    skipped: dict[Path, str] = field(init=False, repr=False)
    short: dict[Path, int] = field(init=False, repr=False)

    def __post_init__(self):
        self._check_arguments()
        names = self._names()
        self.files = self._files_of_split(names)
        if self.split == "val" and len(names) == 1:
            warnings.warn(f"{self.root} holds one video only: it is used for training and validation", stacklevel=3)
        self._labels, self._captions = self._labels_of(names), self._captions_of(names)
        self.classes = tuple(sorted(set(self._labels.values())))
        self._begin_records()
        if self.verify:
            readable = sum(self._read(name) is not None for name in self.files)
            if not readable:
                raise self.nothing_readable()
            self._tell_short()

    def _begin_records(self) -> None:
        """Of files that are too short or cannot be read."""
        self.skipped, self.short, self._told_short = {}, {}, False
        self._places = {name: place for place, name in enumerate((*self.files, *self.spare))}
        self._unreadable = torch.zeros(len(self._places), dtype=torch.bool).share_memory_()  # one for all workers

    def _names(self) -> list[str]:
        """Of all files, in order."""
        self.root = Path(self.root)
        return list_videos(self.root, pictures=self.frames == 1)

    def _files_of_split(self, names: list[str]) -> list[str]:
        return split_files(names, self.split, self.val_every)

    def _labels_of(self, names: list[str]) -> dict[str, str]:
        return label_files(names, self.label_from, self.filename_pattern)

    def _captions_of(self, names: list[str]) -> dict[str, str]:
        table = self.captions or next(filter(Path.is_file, map(self.root.joinpath, CAPTION_FILES)), None)
        return read_captions(Path(table), names) if table else {}

    @contextmanager
    def _at(self, name: str) -> Iterator[Path]:
        """Where the file lies meanwhile. Raises: UnreadableVideo if it cannot be had."""
        yield self.path_of(name)

    def path_of(self, name: str) -> Path:
        """The file, for those who are told of it."""
        return self.root / name

    def _check_arguments(self) -> None:
        for key, choices in (("split", ("train", "val", "all")), ("label_from", LABEL_SOURCES)):
            if getattr(self, key) not in choices:
                raise ValueError(f"{key}={getattr(self, key)!r}; expected one of: {', '.join(choices)}")
        for key, least in (("frames", 1), ("height", 1), ("width", 1), ("fps", 0), ("seed", 0), ("val_every", 2)):
            if (getattr(self, key) or 0) < least:
                raise ValueError(f"{key}={getattr(self, key)}; expected {least} or more")
        if self.patience is not None and self.patience <= 0:
            raise ValueError(f"patience={self.patience}; expected seconds above 0, or null")
        load_backend(self.backend)

    def listing(self) -> list[str]:
        """`NAME BYTES` of each file of the split: what a cache of its clips is known by."""
        return [f"{name} {(self.root / name).stat().st_size}" for name in self.files]

    @property
    def captioned(self) -> bool:
        """Whether captions were given, rather than made of class names."""
        return bool(self._captions)

    @property
    def native_fps(self) -> float:
        """Frames per second of the first readable files: their median.

        Raises:
            ValueError: if none of the first ten can be read.
        """
        rates = []
        for name in self.files[:10]:
            try:
                with self._at(name) as path:
                    rates.append(open_video(path, self.backend, self.patience).fps)
            except UnreadableVideo as error:
                self.skip(name, error)
        if not rates:
            raise self.nothing_readable()
        return float(np.median(rates))

    def file(self, n: int) -> str:
        """The file that item n is taken from, if it can be read."""
        epoch, position = divmod(n, len(self.files))
        return self.files[self._order_of(epoch)[position] if self.split == "train" else position]

    def _order_of(self, epoch: int) -> np.ndarray:
        """Places of the files in the order of a training's epoch."""
        return _order(self.seed, epoch, len(self.files))

    def __getitem__(self, n: int) -> dict:
        if n < 0:
            raise IndexError(f"item {n}; expected a number of 0 or more")
        draws = np.random.default_rng((self.seed, 1, n)).random(4) if self.split == "train" else np.full(4, 0.5)
        for name in self._candidates(n):
            video = self._read(name, *draws)
            if video is not None:
                self._tell_short()
                return {"video": video, **self.words(name)}
        raise self.nothing_readable()

    def words(self, name: str) -> dict:
        """`caption` and `label` of a file."""
        label = self._labels.get(name, "")
        caption = self._captions.get(name, " ".join(label.replace("_", " ").split()))
        return {"caption": caption, "label": self.classes.index(label) if label else -1}

    def _candidates(self, n: int) -> Iterator[str]:
        """The file of item n, then those of the items after it, until each file had its turn; then the spare ones."""
        seen = set()
        for name in map(self.file, itertools.count(n)):
            yield name
            seen.add(name)
            if len(seen) == len(self.files):
                break
        yield from self.spare

    def _read(self, name: str, start=0.5, top=0.5, left=0.5, mirror=0.5) -> Tensor | None:
        """A clip of a file, or None if it cannot be read; the four numbers in [0, 1) choose the clip."""
        try:
            clip = self.clip(name, start, *((top, left) if self.random_crop else ()))
        except UnreadableVideo as error:
            self.skip(name, error)
            return None
        if clip.lacking:
            self.short[self.path_of(name)] = clip.lacking
        return clip.video.flip(-1) if self.flip and mirror < 0.5 else clip.video

    def clip(self, name: str, start: float = 0.5, top: float = 0.5, left: float = 0.5) -> Clip:
        """A clip of a file; `start` as in `frame_numbers`, `top` and `left` as in `fit`.

        Raises:
            UnreadableVideo: if the file cannot be read.
        """
        with self._at(name) as path:
            video = open_video(path, self.backend, self.patience)
            numbers = frame_numbers(len(video), video.fps, self.frames, self.fps, start)
            pixels = video.frames(np.minimum(numbers, len(video) - 1))
        lacking = int((numbers >= len(video)).sum())
        return Clip(fit(pixels, self.height, self.width, top, left), lacking, pixels.shape[1:3])

    def head(self, name: str) -> Head | None:
        """How long and how large a file is, or None if it cannot be read."""
        try:
            with self._at(name) as path:
                video = open_video(path, self.backend, self.patience)
                height, width = video.frames([0]).shape[1:3]
        except UnreadableVideo as error:
            self.skip(name, error)
            return None
        return Head(len(video), video.fps, height, width)

    def part(self, files: list[str], frames: int, height: int, width: int) -> FolderClips:
        """The data set of some of the files alone, with clips of another shape. Where none of them can be read, the others
        stand in."""
        part, own = copy.copy(self), set(files)
        part.files, part.frames, part.height, part.width = files, frames, height, width
        part.spare = [name for name in self.files if name not in own]
        part._begin_records()
        return part

    def skip(self, name: str, error: UnreadableVideo) -> None:
        """Only keeps a record: were the file not tried again, items would depend on history."""
        self.skipped[self.path_of(name)] = error.reason
        place = self._places[name]
        if not self._unreadable[place]:
            self._unreadable[place] = True
            warnings.warn(f"{error} Until then the clip of another file is taken instead.", stacklevel=4)

    @property
    def unreadable(self) -> list[Path]:
        names = list(self._places)
        return [self.path_of(names[place]) for place in self._unreadable.nonzero().flatten().tolist()]

    def _tell_short(self) -> None:
        if self.short and not self._told_short:
            self._told_short = True
            path, lacking = next(iter(self.short.items()))
            found = f"{len(self.short)} of {len(self.files)} files, such as {path} by {lacking} frames"
            way_out = "their last frame is held. Ask for fewer frames or a higher fps."
            warnings.warn(f"too short for a clip of {self.frames} frames so far: {found}; {way_out}", stacklevel=3)

    def nothing_readable(self) -> ValueError:
        what = f"none of the {len(self.files)} {self.split} videos in {self.root} can be read"
        reasons = "; ".join(f"{path.name}: {reason}" for path, reason in itertools.islice(self.skipped.items(), 3))
        return ValueError(f"{what} with backend={self.backend!r} ({reasons}); check them or try another backend")
