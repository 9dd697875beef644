"""Lengths and frame sizes of the videos of a folder, read once and kept in kit's cache folder, and the buckets that suit."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from tqdm import tqdm

from kit.data.buckets import Bucket, suiting
from kit.data.decode import UnreadableVideo
from kit.data.frames import most_frames
from kit.files import locked, read_json, write_json
from kit.machine import in_cache
from kit.values import hash_of

if TYPE_CHECKING:
    from kit.data.clips import FolderClips

SAVE_EVERY = 30.0  # seconds; a kill loses the heads read since
READING = 2  # rises when files come to be read otherwise, so that heads of before are read again


class Head(NamedTuple):
    """What is known of a file before its clips are read: number of frames, frames per second, upright size in pixels."""

    count: int
    rate: float
    height: int
    width: int


def read_heads(source: FolderClips) -> dict[str, Head]:
    """Reads the heads of the readable files of a split: file name -> head.

    A head is kept in kit's cache folder as long as the file keeps its size in bytes. That a file cannot be read is kept too:
    all processes, and a run that continues, have to find the same.
    """
    root = str(source.root)
    about = f"{root if '://' in root else os.path.abspath(root)} {source.backend} {READING}"
    path = in_cache("heads", f"{hash_of([about], 32)}.json")
    lines = {name: f"{name} {source.bytes_of(name)}" for name in source.files}
    with locked(path.with_suffix(".lock")):
        kept = read_json(path) if path.exists() else {}
        _read_missing(source, {name: line for name, line in lines.items() if line not in kept}, kept, path)
    known = {name: kept[line] for name, line in lines.items()}
    for name, head in known.items():
        if head is None and (file := source.path_of(name)) not in source.skipped:
            again = f"its size and length could not be read before; remove {path} to have it tried again"
            source.skip(name, UnreadableVideo(file, again))
    return {name: Head(*head) for name, head in known.items() if head is not None}


def _read_missing(source: FolderClips, lines: dict[str, str], kept: dict[str, Head | None], path: Path):
    """Reads the heads of files (name -> `NAME BYTES`), adds them to `kept` by line, and saves `kept` at `path`."""
    saved = time.monotonic()
    for name, line in tqdm(lines.items(), desc="sizes and lengths", unit="file", disable=None if lines else True):
        kept[line] = source.head(name)
        if time.monotonic() - saved > SAVE_EVERY:
            write_json(path, kept)
            saved = time.monotonic()
    if lines:
        write_json(path, kept)


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
