"""Files in a folder of videos: their names, which are held out, and their labels."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath

from kit.data.decode import PICTURES
from kit.data.shared import shared
from kit.values import hash_of

SUFFIXES = (
    ".mp4", ".mkv", ".webm", ".avi", ".mov", ".mpg", ".mpeg", ".gif", ".m4v",
    ".mts", ".m2ts", ".ts", ".3gp", ".3g2", ".wmv", ".asf", ".flv", ".f4v", ".ogv", ".vob", ".mxf", ".qt", ".divx",
)  # fmt: skip
RUN = "/config/overrides.yaml"  # what lies in the folder of each of kit's runs
LEARNED_FROM, KEPT_OUT = {"train", "training"}, {"val", "valid", "validation", "test", "testing", "dev"}  # names of folders
LABEL_SOURCES = ("auto", "folder", "filename", "none")
LEADING_WORDS = r"^(?P<label>.+?)_+\d+$"  # jumping_jack_00000004 -> jumping_jack


def list_videos(root: Path, pictures: bool = False) -> list[str]:
    """Lists the video files (and pictures, if `pictures`) in a folder and its subfolders: sorted posix paths relative to it.

    Folders of kit's runs below it are passed over: what a run logs there is no data.

    Raises:
        FileNotFoundError: if the folder does not exist or holds none.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"no folder {root}; expected one that holds video files")
    names, suffixes = files_below(root), SUFFIXES + PICTURES * pictures
    videos = [name for name in without_runs(names) if name.lower().endswith(suffixes)]
    if odd := [name for name in videos if not is_utf8(name)]:
        found = f"{len(odd)} files of {root} with names that are no UTF-8 are left out, such as {ascii(odd[0])}"
        warnings.warn(f"{found}; rename them", stacklevel=7)
        videos = [name for name in videos if is_utf8(name)]
    if not videos:
        what = "no video or picture" if pictures else "no video"
        runs = runs_among(names)
        but = f" but those of runs of kit, such as {min(runs)}" if runs else ""
        expected = f"expected files ending in {', '.join(suffixes)}"
        raise FileNotFoundError(f"{root} holds {what}{but}; {expected}{_way_out(names)}")
    return videos


def _way_out(names: Sequence[str]) -> str:
    """Returns what to do with files of which none is a video: frames of clips, or shards; "" if they are neither."""
    if shards := [name for name in names if name.lower().endswith((".tar", ".tar.gz", ".tgz"))]:
        return f". For shards such as {shards[0]} use data=shards, as .tar, uncompressed"
    if pictures := [name for name in without_runs(names) if name.lower().endswith(PICTURES)]:
        make = "ffmpeg -framerate 25 -pattern_type glob -i 'DIR/*.png' -crf 10 -pix_fmt yuv420p DIR.mp4"
        found = f"It holds pictures such as {pictures[0]}: data.frames=1 takes each by itself"
        return f". {found}; if they are a clip's frames, make a video of them ({make})"
    return ""


def runs_among(names: Iterable[str]) -> set[PurePosixPath]:
    """Folders of kit's runs among files."""
    return {PurePosixPath(name).parents[1] for name in names if name.endswith(RUN)}


def without_runs(names: Sequence[str]) -> Sequence[str]:
    """Returns the files that lie in no run of kit."""
    runs = runs_among(names)
    return [name for name in names if runs.isdisjoint(PurePosixPath(name).parents)] if runs else names


def files_below(root: Path) -> list[str]:
    """Lists the files in a folder and its subfolders, but for hidden ones: sorted posix paths relative to it.

    Links to folders are followed, except back to one that they lie in, whose files would come again and again.
    """
    return shared((files_below, root), lambda: _walk(root))


def _walk(root: Path) -> list[str]:
    found, folders = [], [("", (os.path.realpath(root),))]
    while folders:
        prefix, chain = folders.pop()
        try:
            entries = list(os.scandir(chain[-1]))
        except OSError as error:
            if prefix != "lost+found/":  # which nobody may read
                warnings.warn(f"{chain[-1]} cannot be read, what is in it is left out: {error}", stacklevel=9)
            continue
        for entry in entries:
            name, link = prefix + entry.name, entry.is_symlink()
            if entry.name.startswith("."):
                continue
            if entry.is_dir(follow_symlinks=False) or link and os.path.isdir(entry.path):
                place = os.path.realpath(entry.path) if link else entry.path
                if place not in chain:
                    folders.append((f"{name}/", (*chain, place)))
            else:
                found.append(name)
    return sorted(found)


def is_utf8(name: str) -> bool:
    """Returns whether the name of a file, or a caption, can be written to logs and checkpoints."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def held_out_of(names: Sequence[str], every: int) -> set[str]:
    """Chooses the files to hold out: those in folders such as `val` and `test` if all others are in `train`; else every
    `every`-th video, and every `every`-th picture; of two or more at least one.

    Videos and pictures are counted apart, so that the same videos are held out with and without pictures.
    """
    pictures = [name for name in names if name.lower().endswith(PICTURES)]
    videos = [name for name in names if not name.lower().endswith(PICTURES)]
    tops = {name: name.partition("/")[0].lower() if "/" in name else "" for name in names}
    found = {tops[name] for name in videos or pictures}
    if LEARNED_FROM & found and KEPT_OUT & found and found <= LEARNED_FROM | KEPT_OUT:
        return {name for name, top in tops.items() if top in KEPT_OUT}
    return {name for kind in (videos, pictures) for name in kind[every - 1 :: every] or kind[1:][-1:]}


def split_files(names: Sequence[str], split: str, held_out: set[str]) -> list[str]:
    """Selects the files of a split: `train`, `val` (the held-out ones, or the last file if there are none) or `all`.

    A single file is in every split.
    """
    held_out = held_out or {names[-1]}
    if split == "all" or len(names) == 1:
        return list(names)
    return [name for name in names if (name in held_out) == (split == "val")]


def label_files(names: Sequence[str], source: str, pattern: str) -> dict[str, str]:
    """Maps file names to class names; empty if the files have no classes.

    Args:
        source: "folder" is the innermost folder, "filename" the group `label` of the regular expression `pattern` in the
            file name without its suffix, "none" no classes; "auto" is the first of these that distinguishes files, but not
            folders such as `train` and `test`.
    Raises:
        ValueError: if a file has no such label, or the pattern no such group.
    """
    folders = {name: name.rpartition("/")[0].rpartition("/")[2] for name in names}
    splits = {folder.lower() for folder in folders.values()} <= LEARNED_FROM | KEPT_OUT
    words = {name: _filename_label(name, pattern) for name in names}
    match source:
        case "auto" if all(folders.values()) and len(set(folders.values())) > 1 and not splits:
            return folders
        case "auto" if all(words.values()) and 1 < len(set(words.values())) < len(names):
            return words
        case "auto" | "none":
            if source == "auto":
                _tell_odd_ones(folders, "lie in no folder")
                _tell_odd_ones(words, "have names of another form")
            return {}
    labels = folders if source == "folder" else words
    for name, label in labels.items():
        if not label:
            expected = "a folder named after its class" if source == "folder" else f"a name that matches {pattern!r}"
            raise ValueError(f"label_from={source!r}: {name} has no label, expected {expected}; or set `label_from`")
    return labels


def _tell_odd_ones(labels: dict[str, str], what: str):
    """Warns if only a few files without a label keep the labels of the others from being classes."""
    odd = [name for name, label in labels.items() if not label]
    if odd and 1 < len(set(labels.values()) - {""}) < len(labels) - len(odd):
        message = f"{len(odd)} of {len(labels)} files {what}, such as {odd[0]!r}, so the others' are no classes either"
        warnings.warn(f"{message}; move or rename them, or set label_from", stacklevel=9)


def _filename_label(name: str, pattern: str) -> str:
    try:
        match = re.search(pattern, stem_of(name).rpartition("/")[2])
        return match["label"] if match else ""
    except (re.error, IndexError) as error:
        raise ValueError(f"filename_pattern={pattern!r}: {error}; expected one such as {LEADING_WORDS!r}") from error


def held_out_hash(files: Iterable[str]) -> str:
    """Returns the hash by which a checkpoint knows the held-out files of its training, named as by `ClipSource.known_as`."""
    return hash_of(files)


def stem_of(name: str) -> str:
    """Returns a file's path without its suffix: `a/b` of `a/b.mp4`."""
    folder, slash, last = name.rpartition("/")
    return folder + slash + (last[:dot] if (dot := last.rfind(".")) > 0 else last)
