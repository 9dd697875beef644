"""How long and how large the videos of a folder are: read once, and kept."""

from __future__ import annotations

import hashlib
import os
from typing import TYPE_CHECKING, NamedTuple

from filelock import FileLock
from tqdm import tqdm

from kit.files import read_json, write_json
from kit.machine import cache_folder

if TYPE_CHECKING:
    from kit.data.clips import FolderClips

AT_ONCE = 1000  # heads that are read before they are written down


class Head(NamedTuple):
    """What is known of a file before its clips are: how many frames, how many a second, and their size in pixels, upright."""

    count: int
    rate: float
    height: int
    width: int


def read_heads(source: FolderClips) -> dict[str, Head]:
    """Of the files of a split that can be read, by their names. They are kept in kit's cache folder while a file has its size
    in bytes: of all processes one reads them, and a run that goes on does not read them again."""
    about = f"{os.path.abspath(source.root)} {source.backend}"
    path = cache_folder() / "heads" / f"{hashlib.sha256(about.encode()).hexdigest()[:32]}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = dict(zip(source.files, source.listing(), strict=True))
    with FileLock(path.with_suffix(".lock")):
        kept = read_json(path) if path.exists() else {}
        missing = [name for name, line in lines.items() if line not in kept]
        with tqdm(total=len(missing), desc="sizes and lengths", unit="file", disable=None if missing else True) as bar:
            for first in range(0, len(missing), AT_ONCE):
                for name in missing[first : first + AT_ONCE]:
                    if (head := source.head(name)) is not None:
                        kept[lines[name]] = head
                    bar.update()
                write_json(path, kept)
    return {name: Head(*kept[line]) for name, line in lines.items() if line in kept}
