"""Captions of the files in a folder: from a table, or from files beside them."""

from __future__ import annotations

import csv
import itertools
import json
import unicodedata
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from kit.data.decode import PICTURES
from kit.data.listing import is_utf8, list_videos, stem_of
from kit.files import parse_json, read_text, written_aside

TABLES = ("captions.csv", "captions.jsonl", "captions.json")
METADATA = ("metadata.csv", "metadata.jsonl")  # of Hugging Face's datasets; a table of captions if it has a column of them
PROMPTS, VIDEOS = ("prompts.txt", "prompt.txt"), "videos.txt"  # line by line, as trainers of video models have them
FILE_COLUMNS = ("file", "file_name", "filename", "video", "path")  # the first that a table has, in small or capital letters
CAPTION_COLUMNS = ("caption", "text", "prompt")
BESIDE = (".txt", ".TXT", ".caption", ".json")  # suffixes of the files that hold a caption
TABULAR = (".csv", ".tsv", ".jsonl", ".json", ".parquet")

Tell = Callable[[str], None]


def captions_in(root: Path) -> Path | None:
    """Returns the table of captions in a folder, in small or capital letters as suffixes of videos may be; None without.

    Raises:
        ValueError: if there are several.
    """
    tables = sorted(path for path in root.glob("*") if path.name.lower() in TABLES and path.is_file())
    if len(tables) > 1:
        found, one = " and ".join(path.name for path in tables), f"name one with data.source.captions={tables[0]}"
        raise ValueError(f"{root} holds several tables of captions, {found}; keep one of them, or {one}")
    return tables[0] if tables else None


def read_captions(
    path: Path, names: Sequence[str], others: Sequence[str] = (), root: Path | None = None, tell: Tell = warnings.warn
) -> dict[str, str]:
    """Reads captions from a table: name -> caption, for those of `names` that it has.

    Args:
        path: csv with the columns, or jsonl with the keys, of a file and its caption, see FILE_COLUMNS and CAPTION_COLUMNS;
            json, a list of such rows or an object of file: caption; or txt, a caption a line, of the files in videos.txt
            beside it. A file is named by its path below the folder, or by its own name if no other has that, with or
            without its suffix, in any form of Unicode.
        others: further files that the table may have rows for. root: the folder, which paths in the table may begin with.
        tell: is told of rows without a file, and of files without a row.
    Raises:
        FileNotFoundError: if there is no such table.
        ValueError: if it is malformed, names the same file twice, or none of the files.
    """
    both = {name: (_composed(name), _composed(stem_of(name))) for name in dict.fromkeys((*names, *others))}
    find, captions = _finder([[both[name] for name in some] for some in (names, others)], root), {}
    for number, row in enumerate(_rows(path), start=1):
        file, caption = _cells(row)
        if not (isinstance(file, str) and isinstance(caption, str)):
            named = "named `file` and `caption`, in a csv by its first line and with commas between them"
            raise ValueError(f"{path}, row {number}: expected texts {named}; found {row}; add them")
        if None in row:  # csv puts values beyond the columns there
            raise ValueError(f"{path}, row {number}: more values than columns, {row[None]}; quote captions with commas")
        if (key := find(file)) in captions:
            raise ValueError(f"{path}, row {number}: a second caption for {file!r}; keep one for each file")
        if not is_utf8(caption):  # JSON can write half a letter
            raise ValueError(f"{path}, row {number}: {caption!r} cannot be written as UTF-8; write it anew")
        captions[key] = caption

    keys = {name: whole if whole in captions else stem for name, (whole, stem) in both.items()}
    unknown = captions.keys() - set(keys.values())
    if twice := [(name, stem) for name, (_, stem) in both.items() if stem in unknown]:
        raise ValueError(f"{path}: a second caption for {twice[0][0]!r}, named {twice[0][1]!r}; keep one for each file")
    missing = [name for name in names if keys[name] not in captions]
    if len(missing) == len(names):
        example = f", such as {min(unknown)!r}" if unknown else ""
        raise ValueError(
            f"{path} has {len(captions)} captions{example}, none of them for a file that is there; expected paths relative "
            f"to the data folder, such as {names[0]!r}"
        )
    if unknown:
        tell(f"{path} has captions for {len(unknown)} files that are not there, such as {min(unknown)!r}")
    if missing:
        tell(f"{path} has no caption for {len(missing)} of {len(names)} files, such as {missing[0]!r}; add their rows")
    return {name: captions[keys[name]] for name in names if keys[name] in captions}


def captions_beside(root: Path, names: Sequence[str], listed: Iterable[str], tell: Tell = warnings.warn) -> dict[str, str]:
    """Reads captions from the files beside the videos, `a.txt`, `a.caption` or `a.json` beside `a.mp4`: name -> caption.

    Args:
        listed: all files in the folder. tell: is told of files without one, if others have one.
    Raises:
        ValueError: if one is not UTF-8.
    """
    listed, captions = set(listed), {}
    for name in names:
        for file in (stem_of(name) + suffix for suffix in BESIDE):
            if file in listed and (caption := _caption_of(root / file)) is not None:
                captions[name] = caption
                if caption:
                    break
    if captions and (missing := [name for name in names if name not in captions]):
        what = f"{len(missing)} of {len(names)} files have no caption in a .txt beside them, such as {missing[0]!r}"
        tell(f"{root}: {what}; add them, or a captions.csv")
    return captions


def captions_by_others(root: Path, names: Sequence[str], listed: Sequence[str], tell: Tell = warnings.warn) -> dict[str, str]:
    """Reads captions from a table of METADATA or PROMPTS in a folder: name -> caption; empty without.

    Args:
        listed: all files in the folder. tell: is told of such a table that cannot be read, since it may be of something
            else, and of other files that look as if they held captions.
    """
    for table in (root / name for name in (*METADATA, *PROMPTS) if name in listed):
        try:
            if table.name in METADATA and not _has_captions(table) or table.name in PROMPTS and VIDEOS not in listed:
                continue
            return read_captions(table, names, pictures_among(listed), root, tell)
        except (ValueError, OSError) as error:
            tell(f"no captions are read: {error}")
            return {}
    videos = set(map(stem_of, names))
    tables = [name for name in listed if name.count("/") < 2 and stem_of(name) not in videos and _looks_tabular(name)]
    if tables:
        others = f" and {len(tables) - 1} others like it" if len(tables) > 1 else ""
        tell(
            f"{root} holds {tables[0]}{others}, in which no captions are looked for: a table of captions (csv, jsonl or "
            f"json, with the columns file and caption) is named with data.source.captions=PATH (of evaluate, real_captions)"
        )
    return {}


def caption_in(text: str) -> str | None:
    """Reads the caption of a JSON object, see CAPTION_COLUMNS, or that is a text by itself; None if it has none.

    Raises:
        ValueError: if it is neither, or its caption is no text.
    """
    caption = values = parse_json(text)
    if isinstance(values, dict):
        caption = next((values[key] for key in CAPTION_COLUMNS if values.get(key) is not None), None)
    if caption is None:
        return None
    if not isinstance(caption, str) or not is_utf8(caption):
        raise ValueError
    return caption.strip()


def write_captions(captions: dict[str, str], path: Path) -> None:
    """Writes name -> caption as a csv for `read_captions`."""
    with written_aside(path) as aside, open(aside, "w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerows([("file", "caption"), *sorted(captions.items())])


def is_captioned(folder: Path) -> bool:
    """Whether each video in the folder has its caption in captions.csv, and each caption its video."""

    def refuse(message: str):
        raise ValueError(message)

    try:
        return bool(read_captions(folder / "captions.csv", list_videos(folder), tell=refuse))
    except (FileNotFoundError, ValueError):
        return False


def _composed(file: str) -> str:
    """One of a name's forms: macOS decomposes the accents of file names, most editors compose them."""
    return unicodedata.normalize("NFC", file)


def _finder(kinds: Iterable[list[tuple[str, str]]], root: Path | None) -> Callable[[str], str]:
    """Returns a function from a file, as a table names it, to the path by which it is known, if it is.

    Args:
        kinds: paths with and without their suffixes, of the files themselves and of others, which come second.
    """
    paths, places = set(), []
    for known in kinds:
        places.append(defaultdict(set))
        for path in itertools.chain.from_iterable(known):
            paths.add(path)
            places[-1][path.rpartition("/")[2]].add(path)
    beginnings = (
        ("./", *(f"{_composed(str(path))}/" for path in (root, root.absolute(), root.resolve()))) if root else ("./",)
    )

    def find(file: str) -> str:
        file = _composed(file)
        for beginning in ("", *beginnings):
            if (known := file.removeprefix(beginning)) in paths:
                return known
        alike = next((found for kind in places if (found := kind.get(file))), ())  # a table may leave out the folder
        return next(iter(alike)) if len(alike) == 1 else file

    return find


def _cells(row) -> tuple:
    """Returns file and caption of a table's row; None for one that it does not have."""
    cells = {str(key).strip().lower(): value for key, value in row.items()} if isinstance(row, dict) else {}
    return tuple(next((cells[key] for key in keys if key in cells), None) for keys in (FILE_COLUMNS, CAPTION_COLUMNS))


def _caption_of(path: Path) -> str | None:
    """Reads the caption in a file beside a video; None if a .json holds none, or the file is a broken link."""
    if not path.is_file():
        return None
    if path.suffix != ".json":
        return " ".join(read_text(path).split())
    try:
        return caption_in(read_text(path))
    except ValueError:
        return None


def _has_captions(path: Path) -> bool:
    """Whether a table has columns of files and of captions, by its first row."""
    first = next(iter(_rows(path)), None)
    return first is not None and None not in _cells(first)


def pictures_among(names: Iterable[str]) -> list[str]:
    """Pictures among files: where videos are read, a table may have rows for them too."""
    return [name for name in names if name.lower().endswith(PICTURES)]


def _looks_tabular(name: str) -> bool:
    last = name.rpartition("/")[2].lower()
    return last.endswith(TABULAR) or last.endswith(".txt") and ("prompt" in last or "caption" in last)


def _rows(path: Path) -> list:
    """The rows of a caption table, not yet checked."""
    if not path.is_file():
        raise FileNotFoundError(f"captions={str(path)!r} is not a file; give a csv, jsonl or json, or leave it out")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            match path.suffix.lower():
                case ".csv":
                    table = csv.DictReader(file)
                    named = [str(key).strip().lower() for key in table.fieldnames or []]
                    read = [next((key for key in keys if key in named), "") for keys in (FILE_COLUMNS, CAPTION_COLUMNS)]
                    twice = [key for key in read if named.count(key) > 1]
                    if twice:  # a row keeps the last
                        raise ValueError(f"{path}: {named.count(twice[0])} columns named {twice[0]!r}; keep one of them")
                    return list(table)
                case ".jsonl":
                    lines = [(n, line) for n, line in enumerate(file, start=1) if line.strip()]
                    return [_json_of(line, n, path) for n, line in lines]
                case ".json":
                    table = parse_json(text := file.read())
                    if isinstance(table, dict):  # of a name that stands there twice it has kept one
                        return [{"file": k, "caption": v} for k, v in parse_json(text, object_pairs_hook=list)]
                    return list(table)
                case ".txt" if (videos := path.with_name(VIDEOS)).is_file():
                    files, captions = (
                        [line.strip() for line in text.splitlines()] for text in (read_text(videos), file.read())
                    )
                    if len(files) != len(captions):
                        raise ValueError(f"{path} has {len(captions)} lines, {videos} has {len(files)}; give one for each")
                    return [{"file": f, "caption": c} for f, c in zip(files, captions) if f]
    except (csv.Error, UnicodeDecodeError, json.JSONDecodeError, TypeError) as error:
        raise ValueError(f"{path} is not valid {path.suffix[1:]} in UTF-8: {error}") from error
    raise ValueError(
        f"captions={str(path)!r}: expected a file ending in .csv, .jsonl or .json, or a .txt with {VIDEOS} beside it"
    )


def _json_of(line: str, number: int, path: Path):
    try:
        return parse_json(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {number}: not JSON ({error.msg})") from error
