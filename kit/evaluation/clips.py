"""Data sets of the clips that a protocol names: item n is always the same clip, and an unreadable clip is an error."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch.utils.data import Dataset, default_collate

from kit.data.clips import FolderClips
from kit.data.decode import UnreadableVideo
from kit.data.shapes import Shapes
from kit.data.ucf101 import UCF101
from kit.evaluation.protocol import Protocol, Real, digest

END = 4096  # bytes at each end of a file that its fingerprint reads


class Choice(NamedTuple):
    """A file and the clip to take from it; `start`, `top` and `left` from 0 to 1."""

    file: str
    start: float
    top: float
    left: float


class FileClips(Dataset):
    """Data set of clips of files: item n is {"video": (3, T, H, W), "caption", "label", "name", "size", "n"}.

    A clip that cannot be read as the protocol asks gives the item {"error": why}: an exception would lose its message on the
    way out of a worker process.

    Args:
        source: reads the files. choices: the clips, in their order.
    """

    def __init__(self, source: FolderClips, choices: list[Choice]):
        self.source, self.choices = source, choices

    def __len__(self) -> int:
        return len(self.choices)

    def words(self, n: int) -> dict:
        return {**self.source.words(self.choices[n].file), "name": self.choices[n].file, "n": n}

    def __getitem__(self, n: int) -> dict:
        choice, source = self.choices[n], self.source
        try:
            clip = source.clip(*choice)
        except UnreadableVideo as error:
            return {"error": str(error)}
        if clip.lacking:
            rate = f" at {source.fps:g} fps" if source.fps else ""
            return {"error": (
                f"{source.root / choice.file} is too short by {clip.lacking} of the protocol's {source.frames} frames{rate}; "
                f"take it out of the folder, or ask for fewer with protocol.frames="
            )}  # fmt: skip
        return {"video": clip.video, **self.words(n), "size": f"{clip.size[0]} x {clip.size[1]}"}


class DrawnClips(Dataset):
    """`clips` clips of the endless data set `shapes`, from number `first` on; items are like those of `FileClips`."""

    def __init__(self, source: Shapes, clips: int, first: int):
        self.source, self.clips, self.first = source, clips, first

    def __len__(self) -> int:
        return self.clips

    def words(self, n: int) -> dict:
        number = self.first + n
        return {**self.source.words(number), "name": f"shapes {self.source.split} {number}", "n": n}

    def __getitem__(self, n: int) -> dict:
        return {**self.source[self.first + n], **self.words(n), "size": f"{self.source.height} x {self.source.width}"}


class Words(Dataset):
    """Captions and labels of `total` clips without their pixels; `clips` are repeated from the start as often as needed."""

    def __init__(self, clips: FileClips | DrawnClips, total: int):
        self.clips, self.total = clips, total

    def __len__(self) -> int:
        return self.total

    def __getitem__(self, n: int) -> dict:
        return {**self.clips.words(n % len(self.clips)), "n": n}


class Together(Dataset):
    """Pairs of clips: item n of `clips`, with the pixels of item n of `real` as `real`."""

    def __init__(self, clips: FileClips, real: FileClips):
        self.clips, self.real = clips, real

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, n: int) -> dict:
        item, real = self.clips[n], self.real[n]
        return next((part for part in (item, real) if "error" in part), {**item, "real": real.get("video")})


def collate(items: list[dict]) -> dict:
    """A batch, or the first error among its items."""
    return next((item for item in items if "error" in item), None) or default_collate(items)


def choose(files: list[str], clips: int, start: str, random_crop: bool, seed: int, fold: int) -> list[Choice]:
    """Chooses `clips` clips, in an order drawn from seed and fold: each file once, then each again.

    The result depends on the arguments alone.
    """
    rng = np.random.default_rng((seed, 2, fold))
    order = [files[i] for _ in range(-(-clips // len(files))) for i in rng.permutation(len(files))][:clips]
    draws = rng.random((clips, 3))
    at = {"first": np.zeros(clips), "middle": np.full(clips, 0.5), "random": draws[:, 0]}[start]
    where = draws[:, 1:] if random_crop else np.full((clips, 2), 0.5)
    return [Choice(file, float(s), *map(float, place)) for file, s, place in zip(order, at, where)]


def fingerprint(source: FolderClips) -> str:
    """16 hex digits from the names, captions, labels, sizes, first and last bytes of a source's files."""
    return digest([(name, source.words(name), *_marks(source.root / name)) for name in sorted(source.files)])[:16]


def _marks(path: Path) -> tuple[int, str]:
    """Size of a file and its two ends in hex, which distinguish videos without reading all of them."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        ends = file.read(END)
        file.seek(max(size - END, 0))
        return size, (ends + file.read(END)).hex()


def real_source(protocol: Protocol, root: str | Path | None, **words: str) -> FolderClips | Shapes:
    """Builds the source of the protocol's real clips.

    Args:
        root: folder of the files; None for `shapes`. words: `captions` and `label_from` of `FolderClips`, where they are not
            its defaults; what they come to is part of the files' `fingerprint`.
    Raises:
        ValueError: if a folder or words are given for `shapes`, or no folder for other clips; else as the source.
    """
    real = protocol.real
    shape = dict(frames=protocol.frames, height=protocol.height, width=protocol.width, fps=protocol.fps)
    if real.kind == "shapes":
        given = {"real": root, **{f"real_{key}": value for key, value in words.items()}}
        if asked := [f"{key}={value}" for key, value in given.items() if value is not None]:
            raise ValueError(f"{asked[0]}: the protocol {protocol.name} draws its real clips, leave it out")
        return Shapes(split=real.split, seed=real.seed, **shape)
    if root is None:
        raise ValueError(f"the protocol {protocol.name} needs real=DIR, the folder of {_wanted(real)}")
    shape |= dict(root=root, split=real.split, backend=real.backend, seed=real.seed, **words)
    if real.kind == "ucf101":
        source = UCF101(official=real.official, **shape)
    else:
        source = FolderClips(val_every=real.val_every, **shape)
    for message in source.untold:  # of the split `val`: there is none beside it here
        warnings.warn(message, stacklevel=3)
    return source


def _wanted(real: Real) -> str:
    return "UCF-101's classes, with its split lists" if real.kind == "ucf101" else "real videos"


def real_clips(protocol: Protocol, source: FolderClips | Shapes, fold: int) -> FileClips | DrawnClips:
    """The real clips of a fold; the protocol must have its number of clips resolved.

    Raises:
        ValueError: if there are fewer than the protocol needs.
    """
    real = protocol.real
    if isinstance(source, Shapes):
        return DrawnClips(source, real.clips, fold * real.clips)
    if len(source.files) < real.clips and real.start != "random":
        raise ValueError(
            f"the protocol {protocol.name} needs {real.clips} real clips, {source.root} ({real.split}) has "
            f"{len(source.files)}; add some, or say protocol.real.clips={len(source.files)}, which makes it another protocol"
        )
    fold = fold if real.drawn_anew else 0
    return FileClips(source, choose(source.files, real.clips, real.start, real.random_crop, real.seed, fold))


def given_clips(protocol: Protocol, source: FolderClips, fold: int) -> FileClips:
    """The first frames of the given videos of a fold; each fold has its own videos.

    Raises:
        ValueError: if there are fewer than the protocol needs.
    """
    needed = protocol.samples * protocol.folds
    if len(source.files) < needed:
        raise ValueError(
            f"the protocol {protocol.name} needs {protocol.samples} videos for each of {protocol.folds} folds, "
            f"{source.root} has {len(source.files)}; make more, or say protocol.samples= and protocol.folds=, which makes it "
            f"another protocol"
        )
    choices = choose(source.files, needed, "first", False, protocol.real.seed, 0)
    return FileClips(source, choices[fold * protocol.samples : (fold + 1) * protocol.samples])
