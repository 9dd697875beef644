"""Files in a folder of videos: their names, which are held out, their labels and captions."""

from __future__ import annotations

import csv
import json
import os
import re
import unicodedata
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath

from kit.data.decode import PICTURES
from kit.files import read_text, written_aside
from kit.values import hash_of

SUFFIXES = (
    ".mp4", ".mkv", ".webm", ".avi", ".mov", ".mpg", ".mpeg", ".gif", ".m4v",
    ".mts", ".m2ts", ".ts", ".3gp", ".3g2", ".wmv", ".asf", ".flv", ".f4v", ".ogv", ".vob", ".mxf", ".qt", ".divx",
)  # fmt: skip
CAPTION_FILES = ("captions.csv", "captions.jsonl", "captions.json")
RUN = "/config/overrides.yaml"  # what lies in the folder of each of kit's runs
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
    runs = {PurePosixPath(name).parents[1] for name in names if name.endswith(RUN)}
    videos = [name for name in names if name.lower().endswith(suffixes)]
    if runs:
        videos = [name for name in videos if runs.isdisjoint(PurePosixPath(name).parents)]
    if odd := [name for name in videos if not is_utf8(name)]:
        found = f"{len(odd)} files of {root} with names that are no UTF-8 are left out, such as {ascii(odd[0])}"
        warnings.warn(f"{found}; rename them", stacklevel=4)
        videos = [name for name in videos if is_utf8(name)]
    if not videos:
        what = "no video or picture" if pictures else "no video"
        but = f" but those of runs of kit, such as {min(runs)}" if runs else ""
        raise FileNotFoundError(f"{root} holds {what}{but}; expected files ending in {', '.join(suffixes)}")
    return videos


def files_below(root: Path) -> list[str]:
    """Lists the files in a folder and its subfolders, but for hidden ones: sorted posix paths relative to it.

    Links to folders are followed, except back to one that they lie in, whose files would come again and again.
    """
    found, folders = [], [("", (os.path.realpath(root),))]
    while folders:
        prefix, chain = folders.pop()
        try:
            entries = list(os.scandir(chain[-1]))
        except OSError:  # such as lost+found, which nobody may read
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
    return not any("\ud800" <= letter <= "\udfff" for letter in name)


def held_out_of(names: Sequence[str], every: int) -> set[str]:
    """Chooses the files to hold out: every `every`-th video, and every `every`-th picture; of two or more at least one.

    Videos and pictures are counted apart, so that the same videos are held out with and without pictures.
    """
    pictures = [name for name in names if name.lower().endswith(PICTURES)]
    videos = [name for name in names if not name.lower().endswith(PICTURES)]
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
            file name without its suffix, "none" no classes; "auto" is the first of these that distinguishes files.
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
        warnings.warn(f"{message}; move or rename them, or set label_from", stacklevel=6)


def _filename_label(name: str, pattern: str) -> str:
    try:
        match = re.search(pattern, PurePosixPath(name).stem)
        return match["label"] if match else ""
    except (re.error, IndexError) as error:
        raise ValueError(f"filename_pattern={pattern!r}: {error}; expected one such as {LEADING_WORDS!r}") from error


def read_captions(path: Path, names: Sequence[str], others: Sequence[str] = ()) -> dict[str, str]:
    """Reads captions from a table with one row for each of `names`: name -> caption.

    Args:
        others: further files that the table may have rows for.
        path: csv with the columns, or jsonl with the keys, `file` and `caption`; or json, a list of such rows or an object
            of file: caption. `file` is the name, with or without its suffix, in any form of Unicode.
    Raises:
        FileNotFoundError: if there is no such table.
        ValueError: if it is malformed, names unknown files or the same file twice, or lacks a file.
    """

    def written(file: str) -> str:  # macOS decomposes the accents of file names, most editors compose them
        return unicodedata.normalize("NFC", file)

    captions: dict[str, str] = {}
    for number, row in enumerate(_rows(path), start=1):
        file, caption = (row.get(key) if isinstance(row, dict) else None for key in ("file", "caption"))
        if not (isinstance(file, str) and isinstance(caption, str)):
            named = "named `file` and `caption`, in a csv by its first line and with commas between them"
            raise ValueError(f"{path}, row {number}: expected texts {named}; found {row}; add them")
        if None in row:  # csv puts values beyond the columns there
            raise ValueError(f"{path}, row {number}: more values than columns, {row[None]}; quote captions with commas")
        if written(file) in captions:
            raise ValueError(f"{path}, row {number}: a second caption for {file!r}; keep one for each file")
        if not is_utf8(caption):  # JSON can write half a letter
            raise ValueError(f"{path}, row {number}: {caption!r} cannot be written as UTF-8; write it anew")
        captions[written(file)] = caption

    both = {name: (written(name), written(str(PurePosixPath(name).with_suffix("")))) for name in (*names, *others)}
    keys = {name: whole if whole in captions else stem for name, (whole, stem) in both.items()}
    unknown = captions.keys() - set(keys.values())
    if twice := [(name, stem) for name, (_, stem) in both.items() if stem in unknown]:
        raise ValueError(f"{path}: a second caption for {twice[0][0]!r}, named {twice[0][1]!r}; keep one for each file")
    if unknown := sorted(unknown):
        example = f"such as {unknown[0]!r}; expected paths relative to the data folder, such as {names[0]!r}"
        raise ValueError(f"{path} has captions for {len(unknown)} files that are not there, {example}")
    if missing := [name for name in names if keys[name] not in captions]:
        raise ValueError(f"{path} has no caption for {len(missing)} files, such as {missing[0]!r}; add their rows")
    return {name: captions[keys[name]] for name in names}


def captions_in(root: Path) -> Path | None:
    """Returns the table of captions in a folder, in small or capital letters as suffixes of videos may be; None without.

    Raises:
        ValueError: if there are several.
    """
    tables = sorted(path.name for path in root.glob("*") if path.name.lower() in CAPTION_FILES and path.is_file())
    if len(tables) > 1:
        named = f"name one with data.source.captions={root / tables[0]}"
        raise ValueError(f"{root} holds several tables of captions, {' and '.join(tables)}; keep one of them, or {named}")
    return root / tables[0] if tables else None


def held_out_hash(files: Iterable[str]) -> str:
    """Returns the hash by which a checkpoint knows the held-out files of its training, named as by `ClipSource.known_as`."""
    return hash_of(files)


def captions_beside(root: Path, names: Sequence[str]) -> dict[str, str]:
    """Reads captions from the text files beside the videos, a.txt beside a.mp4: name -> caption; empty if there are none.

    Raises:
        ValueError: if only some files have one, or it is not UTF-8.
    """
    texts = {name: (root / name).with_suffix(".txt") for name in names}
    texts |= {name: capitals for name, path in texts.items() if (capitals := path.with_suffix(".TXT")).is_file()}
    missing = [name for name, path in texts.items() if not path.is_file()]
    if len(missing) == len(names):
        return {}
    if missing:
        message = f"{len(missing)} of {len(names)} files have no caption in a .txt beside them, such as {missing[0]!r}"
        raise ValueError(f"{root}: {message}; add them, or a captions.csv")
    return {name: " ".join(read_text(path).split()) for name, path in texts.items()}


def _rows(path: Path) -> list:
    """The rows of a caption table, not yet checked."""
    if not path.is_file():
        raise FileNotFoundError(f"captions={str(path)!r} is not a file; give a csv, jsonl or json, or leave it out")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            match path.suffix.lower():
                case ".csv":
                    table = csv.DictReader(file)
                    named = table.fieldnames or []
                    if twice := [key for key in ("file", "caption") if named.count(key) > 1]:  # a row keeps the last
                        raise ValueError(f"{path}: {named.count(twice[0])} columns named {twice[0]!r}; keep one of them")
                    return list(table)
                case ".jsonl":
                    lines = [(n, line) for n, line in enumerate(file, start=1) if line.strip()]
                    return [_json_of(line, n, path) for n, line in lines]
                case ".json":
                    table = json.loads(text := file.read())
                    if isinstance(table, dict):  # of a name that stands there twice it has kept one
                        return [{"file": k, "caption": v} for k, v in json.loads(text, object_pairs_hook=list)]
                    return list(table)
    except (csv.Error, UnicodeDecodeError, json.JSONDecodeError, TypeError) as error:
        raise ValueError(f"{path} is not valid {path.suffix[1:]} in UTF-8: {error}") from error
    raise ValueError(f"captions={str(path)!r}: expected a file ending in .csv, .jsonl or .json")


def _json_of(line: str, number: int, path: Path):
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {number}: not JSON ({error.msg})") from error


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
