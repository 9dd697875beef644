"""Clips in WebDataset shards, on a disk or in object storage.

Shards are tar files with `KEY.mp4`, and beside it `KEY.txt` (a caption), `KEY.json` (with `caption`) or `KEY.cls` (a class).
Unlike in a stream, items are numbered: a tar is read through once to learn where its files lie, then only where an item
lies.
"""

from __future__ import annotations

import glob
import itertools
import json
import re
import tarfile
import tempfile
import warnings
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import fsspec
import numpy as np
from tqdm import tqdm

from kit.data.captions import caption_in
from kit.data.clips import FolderClips, NotDelivered
from kit.data.decode import PICTURES, UnreadableVideo
from kit.data.heads import Head
from kit.data.listing import SUFFIXES, split_files
from kit.data.names import ByName
from kit.data.patience import StorageHangs, call_within, each_within
from kit.data.shared import shared
from kit.files import locked, read_json, write_json
from kit.machine import in_cache
from kit.values import hash_of

WORDS = (".txt", ".json", ".cls")  # files that hold the caption or class of a clip
LONGEST = 2**20  # bytes of such a file; an archive of little size may hold one of any
TIMES = ("mtime", "LastModified", "last_modified", "ETag", "etag", "Last-Modified")  # by which storages tell of a change
INDEX = 7  # what an index means; another number with each change, so that those kept before are made anew


class Member(NamedTuple):
    """Where the bytes of a clip lie."""

    shard: str
    offset: int
    size: int


class Members(Sequence[Member]):
    """Where the bytes of clips lie, in a few blocks of memory.

    Args:
        places: (number of the shard, offset, size) of each clip.
    """

    def __init__(self, shards: Sequence[str], places: Sequence[tuple[int, int, int]]):
        self._shards, self._places = shards, np.array(places, np.int64).reshape(-1, 3)

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, place: int) -> Member:
        shard, offset, size = self._places[place].tolist()
        return Member(self._shards[shard], offset, size)


RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")  # as in train-{000..127}.tar


def list_shards(root: str, patience: float | None = None) -> list[str]:
    """Lists the tar files in a folder, or those that match a pattern, sorted.

    Args:
        root: path or address (s3://, gs://, https:// and so on, as `fsspec` has it) of a folder, a tar, or a pattern with *.
            Numbers in braces, such as {000..127}, stand for each of them: over http there may be no list to choose from.
        patience: seconds that the storage may take to list them; None: without limit.
    Raises:
        FileNotFoundError: if there are none. OSError: if the storage does not answer. ValueError: as `written_out`.
    """
    return sorted(shard for each in written_out(root) for shard in shards_at(each, patience))


def written_out(root: str) -> list[str]:
    """Writes out the numbers in braces, with the leading zeros of the first.

    Raises:
        ValueError: if the last is below the first.
    """
    if not (found := RANGE.search(root)):
        return [root]
    first, last = found.groups()
    if int(last) < int(first):
        raise ValueError(f"data.root={root}: {found[0]} holds no number; expected the lower one first")
    numbers = (f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1))
    return [text for number in numbers for text in written_out(root[: found.start()] + number + root[found.end() :])]


def shards_at(root: str, patience: float | None) -> list[str]:
    """Lists the tar files as `list_shards`, but for numbers in braces."""
    files, path = fsspec.core.url_to_fs(root)
    if "://" in root and root.endswith(".tar") and not glob.has_magic(root):  # whether it is there, its index says
        return [files.unstrip_protocol(path)]
    folder = path.partition("*")[0].rpartition("/")[0] if "*" in path else path
    try:
        if "[" in folder and call_within(patience, lambda: files.exists(folder)):  # part of a name
            path = glob.escape(folder) + path[len(folder) :]
        pattern = path if "*" in path or path.endswith(".tar") else f"{path.rstrip('/')}/*.tar"
        names = call_within(patience, lambda: files.glob(pattern))
    except Exception as error:  # each storage has kinds of its own
        raise unreachable(root, error) from error
    if not names:
        expected = "give their folder, or a pattern as DIR/train-*.tar; a .tar.gz must be unpacked first, with gunzip"
        raise FileNotFoundError(f"data.root={root}: no .tar there; {expected}")
    return [name if "://" not in root else files.unstrip_protocol(name) for name in names]


class BrokenShard(Exception):
    """A tar that cannot be read to its end."""


def unreachable(address: str, error: Exception) -> OSError:
    """Returns the error for a shard that its storage did not deliver, or shards that it did not list.

    It may do so another time: leaving the shard out would silently train on less, and on other data on each machine.
    """
    if isinstance(error, FileNotFoundError):
        error = error.__cause__ or error  # over http, where it only repeats the address
    message = f"cannot reach {address} ({type(error).__name__}: {error})"
    return OSError(f"{message}; try again, or take it out of data.root")


def index_of(shard: str, patience: float | None = None) -> dict[str, list]:
    """Index of a shard: file name -> offset, size, caption and class (None where its shard has none), and what is wrong with
    these in words.

    It is kept in kit's cache folder as long as the shard keeps its size and time; where the storage tells no time, its first
    header, which has that of a file.

    Args:
        patience: see `ShardClips`.
    Raises:
        BrokenShard: if the tar cannot be read to its end. OSError: as `unreachable`.
    """
    try:
        files, path = fsspec.core.url_to_fs(shard)
        about = call_within(patience, lambda: files.info(path))
        written = next((about[key] for key in TIMES if about.get(key)), None)
        if written is None:
            written = call_within(patience, lambda: files.cat_file(path, 0, tarfile.BLOCKSIZE)).hex()
    except Exception as error:  # each storage has kinds of its own
        raise unreachable(shard, error) from error
    state = json.dumps([INDEX, shard, about["size"], str(written)])
    kept = in_cache("shards", f"{hash_of([state], 32)}.json")
    with locked(kept.with_suffix(".lock")):  # the processes of a training begin together
        if not kept.exists():
            try:
                index = read_index(files, path, about["size"], patience)
            except tarfile.TarError as error:
                raise BrokenShard(error) from error
            except Exception as error:
                raise unreachable(shard, error) from error
            write_json(kept, index)
        return read_json(kept)


def members_of(files: fsspec.AbstractFileSystem, path: str) -> Iterator[tuple[tarfile.TarInfo, bytes]]:
    """Yields the members of a tar, or of several joined with `cat`, each with its contents if it holds words.

    Raises:
        tarfile.ReadError: if it is damaged; whatever the storage raises.
    """
    with files.open(path, "rb") as file:
        more = True
        while more:
            with tarfile.open(fileobj=file, mode="r:", errors="replace") as tar:
                for member in tar:
                    wordy = member.isfile() and PurePosixPath(member.name).suffix.lower() in WORDS
                    yield member, tar.extractfile(member).read(LONGEST + 1) if wordy else b""
            more = to_next_tar(file, tar.offset)


def to_next_tar(file, end: int) -> bool:
    """Goes to the tar that follows one in a file, behind blocks of zeros; returns whether there is any.

    Args:
        end: byte at which the first has no more members.
    Raises:
        tarfile.ReadError: if it is no end: tarfile takes a header that it cannot read for one.
    """
    file.seek(at := end)
    while (block := file.read(tarfile.BLOCKSIZE)) and not block.strip(b"\0"):
        at += tarfile.BLOCKSIZE
    if block and at == end:
        raise tarfile.ReadError(f"it has a damaged or cut header at byte {at}")
    file.seek(at)
    return bool(block)


def read_index(files: fsspec.AbstractFileSystem, path: str, size: int | None, patience: float | None) -> dict[str, list]:
    """Reads the index of a shard, see `index_of`. Raises: tarfile.TarError, TimeoutError, whatever the storage raises."""
    videos, words, count, end = {}, defaultdict(dict), Counter(), 0
    for member, contents in each_within(patience, members_of(files, path)):
        name, end = PurePosixPath(member.name), member.offset_data + member.size
        if not member.isfile() or any(part.startswith(".") for part in name.parts):  # hidden: a Mac puts ._a.mp4 there
            continue
        suffix = name.suffix.lower()
        if suffix in SUFFIXES + PICTURES:
            videos[member.name] = [member.offset_data, member.size]
        elif suffix in WORDS:
            words[str(name.with_suffix(""))][suffix] = contents
        count[member.name] += 1
    if size is not None and end > size:
        raise tarfile.ReadError(f"it ends after {size} bytes, in the midst of a file")
    twice = {str(PurePosixPath(name).with_suffix("")) for name, times in count.items() if times > 1}
    index = {}
    for name, place in videos.items():
        video = PurePosixPath(name)
        key = str(video.with_suffix(""))
        sample = str(video.with_name(video.name.partition(".")[0]))  # in which `left` may be a field
        caption, label, faults = words_of(words.get(key) or words.get(sample, {}))
        faults += ["a name that comes more than once in its shard, where the last counts"] * (key in twice)
        index[name] = [*place, caption, label, " and ".join(faults)]
    return index


def read_member(member: Member) -> bytes:
    """Reads the bytes of a clip alone; an opened file would read megabytes ahead. Raises whatever the storage raises."""
    files, path = fsspec.core.url_to_fs(member.shard)
    contents = files.cat_file(path, member.offset, member.offset + member.size)
    if len(contents) != member.size:
        raise OSError(f"{len(contents)} bytes came in place of {member.size}; does the server answer requests of a Range?")
    return contents


def words_of(words: dict[str, bytes]) -> tuple[str | None, str | None, list[str]]:
    """Caption and class (None if missing) and what is wrong with them, from the contents of the files beside a clip.

    Args:
        words: suffix -> contents.
    """
    texts, faults = {}, []
    for suffix, contents in words.items():
        if len(contents) > LONGEST:
            faults.append(f"a {suffix} of more than {LONGEST} bytes")
            continue
        try:
            texts[suffix] = contents.decode("utf-8-sig").strip()
        except UnicodeDecodeError:
            faults.append(f"a {suffix} that is not UTF-8")
    caption = texts.get(".txt")
    if not caption and ".json" in texts:
        try:
            caption, lacking = caption_in(texts[".json"]) or caption, False
        except ValueError:
            lacking = True
        if lacking or caption is None and ".cls" not in texts:
            faults.append("a .json without a text as its `caption`")
    return caption, texts.get(".cls"), faults


@dataclass(eq=False)
class ShardClips(FolderClips):
    """Data set of the clips in WebDataset shards, which `FolderClips` numbers, reads and skips.

    Training goes through the shards in a new order each epoch, and through the files of each shard in a new order, so that
    clips that are near each other in the stream are near on the disk.

    A broken shard is reported, recorded as unreadable and left out; one that cannot be reached ends the training at its
    start. Captions and classes are the shards' own; there are classes only if all clips have one. Of each shard every
    `val_every`-th file is held out.

    Args:
        root: see `list_shards`.
        patience: seconds also for the bytes of a clip to come, before it is opened, and for the storage to list its shards
            and each `AT_ONCE` files of one. Storage that leaves `HUNG` clips without an answer at a time ends the training.
    """

    unused = ("label_from", "filename_pattern", "captions")

    members: ByName[Member] = field(init=False, repr=False)
    counts: tuple[int, ...] = field(init=False, repr=False, default=())  # this split's files in each shard
    broken: list[str] = field(init=False, repr=False)  # shards that are left out

    def _names(self) -> Sequence[str]:
        self.members, _, self.broken = self._contents()
        return list(self.members)

    def _contents(self) -> tuple[ByName[Member], dict[str, dict[str, str]], list[str]]:
        """What `_read_shards` has found, while the data set is made."""
        return shared((type(self), str(self.root), self.frames == 1), self._read_shards)

    def _read_shards(self) -> tuple[ByName[Member], dict[str, dict[str, str]], list[str]]:
        """The clips of the shards by name, what is known of `caption` and `label` of them, and the shards that are broken."""
        wanted, shards = SUFFIXES + PICTURES * (self.frames == 1), list_shards(str(self.root), self.patience)
        places, words, faulty, broken = {}, {"caption": {}, "label": {}}, defaultdict(list), []
        for number, shard in enumerate(tqdm(shards, desc="index", unit="shard", disable=None)):
            try:
                index = index_of(shard, self.patience)
            except BrokenShard as error:
                warnings.warn(f"the shard {shard} is broken: {error}. It is left out; check or replace it.", stacklevel=7)
                broken.append(shard)
                continue
            for file, (offset, size, caption, label, fault) in index.items():
                if not file.lower().endswith(wanted):
                    continue
                places[name := f"{shard}/{file}"] = (number, offset, size)
                for what, text in (("caption", caption), ("label", label)):
                    if text is not None:
                        words[what][name] = text
                if fault:
                    faulty[fault].append(name)
        if not places:
            raise FileNotFoundError(f"data.root={self.root}: no clips in its shards; they end in {', '.join(wanted)}")
        for fault, names in faulty.items():
            message = f"{len(names)} of {len(places)} clips in the shards {self.root} have {fault}, such as {names[0]}"
            self._tell(f"{message}; pack their shards anew to mend it")
        return ByName(places, Members(shards, list(places.values()))), words, broken

    def _files_of_split(self, names: Sequence[str]) -> list[str]:
        """Splits each shard on its own, so that a shard that is lost or added moves no clip of another."""
        held_out = set()
        members = zip(names, self.members.values(), strict=True)
        for shard, files in itertools.groupby(members, lambda each: each[1].shard):
            first = zlib.crc32(PurePosixPath(shard).name.encode()) % self.val_every  # of small shards some hold one out
            held_out |= {name for name, _ in list(files)[first :: self.val_every]}
        return split_files(names, self.split, held_out)

    def _begin_records(self) -> None:
        super()._begin_records()
        shards = itertools.groupby(self.files, lambda name: self.members[name].shard)
        self.counts = tuple(len(list(files)) for _, files in shards)

    def _labels_of(self, names: Sequence[str]) -> Mapping[str, str]:
        labels = self._contents()[1]["label"]
        without = [name for name in names if not labels.get(name)]
        if without and len(without) < len(names):
            message = f"{len(without)} of {len(names)} clips in the shards {self.root} have no class, such as {without[0]}"
            self._tell(f"{message}, so the others' are no classes either; give them a .cls, or take them out")
        return {} if without else labels

    def _captions_of(self, names: Sequence[str]) -> Mapping[str, str]:
        return self._contents()[1]["caption"]

    def _drawn_order(self, count: int, seed: int, epoch: int) -> np.ndarray:
        """Order of a training epoch: the shards in a drawn order, and the files of each too."""
        rng, starts = np.random.default_rng((seed, 0, epoch)), np.cumsum((0, *self.counts))
        shards = rng.permutation(len(self.counts))
        return np.concatenate([starts[shard] + rng.permutation(self.counts[shard]) for shard in shards])

    @contextmanager
    def _at(self, name: str) -> Iterator[Path]:
        contents = self._fetched(name)
        with tempfile.NamedTemporaryFile(suffix=PurePosixPath(name).suffix) as file:
            file.write(contents)  # where there is no room, that is no fault of the clip
            file.flush()
            try:
                yield Path(file.name)
            except UnreadableVideo as error:
                raise UnreadableVideo(self.path_of(name), error.reason) from error

    def _fetched(self, name: str) -> bytes:
        """The bytes of a clip. Raises: NotDelivered if its storage does not give them; StorageHangs."""
        member = self.members[name]
        try:
            return call_within(self.patience, lambda: read_member(member))
        except StorageHangs as error:
            raise StorageHangs(f"{error}, the last of {member.shard}; ckpt=last resumes once its storage answers") from error
        except Exception as error:  # each storage has kinds of its own
            raise NotDelivered(self.path_of(name), f"{type(error).__name__}: {error}") from error

    def head(self, name: str) -> Head | None:
        """Reads as `FolderClips.head`. Raises OSError as `unreachable` if the storage does not deliver the clip."""
        try:
            return super().head(name)
        except NotDelivered as error:
            raise unreachable(error.path, error.__cause__) from error

    @property
    def unreadable(self) -> list[str]:
        """Broken shards, and files of the others that could not be read so far, in this process or a worker."""
        return [*self.broken, *super().unreadable]

    def path_of(self, name: str) -> str:
        return name  # as it is: a Path would make https:/ of https://

    def known_as(self) -> list[str]:  # the shard's own name and what is in it
        return [name[len(self.members[name].shard.rpartition("/")[0]) + 1 :] for name in self.files]

    def bytes_of(self, name: str) -> int:
        return self.members[name].size
