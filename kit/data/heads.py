"""How long and how large the videos of a folder are: read once, and kept."""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from filelock import FileLock
from tqdm import tqdm

from kit.data.decode import UnreadableVideo
from kit.files import read_json, write_json
from kit.machine import cache_folder

if TYPE_CHECKING:
    from kit.data.clips import FolderClips

SAVE_EVERY = 30.0  # seconds; what a kill loses at most


class Head(NamedTuple):
    """What is known of a file before its clips are: how many frames, how many a second, and their size in pixels, upright."""

    count: int
    rate: float
    height: int
    width: int


def read_heads(source: FolderClips) -> dict[str, Head]:
    """Of the files of a split that can be read, by their names. They are kept in kit's cache folder while a file has its size
    in bytes, and so is that one cannot be read: all processes, and a run that goes on, have to find the same."""
    root = str(source.root)
    about = f"{root if '://' in root else os.path.abspath(root)} {source.backend}"
    path = cache_folder() / "heads" / f"{hashlib.sha256(about.encode()).hexdigest()[:32]}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = {name: f"{name} {line.rpartition(' ')[2]}" for name, line in zip(source.files, source.listing(), strict=True)}
    with FileLock(path.with_suffix(".lock")):
        kept = read_json(path) if path.exists() else {}
        _read_missing(source, {name: line for name, line in lines.items() if line not in kept}, kept, path)
    known = {name: kept[line] for name, line in lines.items()}
    for name, head in known.items():
        if head is None and (file := source.path_of(name)) not in source.skipped:
            again = f"its size and length could not be read before; remove {path} to have it tried again"
            source.skip(name, UnreadableVideo(file, again, source.backend))
    return {name: Head(*head) for name, head in known.items() if head is not None}


def _read_missing(source: FolderClips, lines: dict[str, str], kept: dict[str, Head | None], path: Path):
    """Adds heads to those that are kept in a file."""
    saved = time.monotonic()
    for name, line in tqdm(lines.items(), desc="sizes and lengths", unit="file", disable=None if lines else True):
        kept[line] = source.head(name)
        if time.monotonic() - saved > SAVE_EVERY:
            write_json(path, kept)
            saved = time.monotonic()
    if lines:
        write_json(path, kept)
