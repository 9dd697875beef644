"""Reads and writes files: writes replace a file completely or not at all, and reads detect damage."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import torch
from filelock import AcquireReturnProxy, FileLock, Timeout
from lightning_utilities.core.rank_zero import rank_zero_only
from safetensors.torch import load_file
from torch import Tensor

from kit.values import hash_of

SILENCE = 10.0  # seconds that a process waits for another before it says so
TABLES = (".csv", ".tsv", ".json", ".jsonl")  # suffixes of files whose lines are rows


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """Yields a temporary path to write to, which is renamed to `path` at the end of the block.

    A kill, an error or a full disk leaves nothing half-written at `path`. The temporary path is always the same, so the next
    write replaces what a kill left there. An error of the system names `path`.
    """
    name = hash_of([path.name], 12)  # short, for long names
    aside = path.with_name(f".{name}.part{path.suffix}")  # PyAV chooses the container by the suffix
    path.parent.mkdir(parents=True, exist_ok=True)
    aside.unlink(missing_ok=True)  # in a shared folder it may be a link that somebody has put there
    try:
        yield aside
        os.replace(aside, path)
    except OSError as error:
        if error.errno is None or str(error.filename or aside) != str(aside):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error  # anew: the name in PyAV's errors cannot be changed
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def replacing(folder: Path, pattern: str) -> Iterator[None]:
    """Removes at the end of the block the files of this pattern that it did not write anew; after an error they stay."""
    before = {path: path.stat().st_mtime_ns for path in folder.glob(pattern)}
    yield
    for path, written in before.items():
        if path.stat().st_mtime_ns == written:
            path.unlink()


def locked(path: Path, wait: bool = True) -> AcquireReturnProxy:
    """Takes a lock file, for a `with` block that several processes enter in turn.

    Waits without limit for another process that holds it, which may compute for long. Rank 0 says so: the other may be
    stopped.

    Raises:
        Timeout: if another process holds it, without `wait`. OSError: if the file system has no locks, or the file cannot be
            made.
    """
    lock = FileLock(path)
    try:
        return lock.acquire(SILENCE if wait else 0)
    except Timeout:
        if not wait:
            raise
        if getattr(rank_zero_only, "rank", 0) == 0:
            warnings.warn(
                f"waiting for another process, which is at work on the same and holds {path}; is it stopped?", stacklevel=3
            )
        return lock.acquire()
    except (NotImplementedError, OSError) as error:
        elsewhere = "on another file system it can: root=..., or KIT_CACHE=DIR for what is kept for later runs"
        raise OSError(f"{path} cannot be locked ({error}); {elsewhere}") from error


def _removed_if_possible(path: Path):
    with suppress(OSError):  # Windows removes no file that is open
        path.unlink()


@contextmanager
def sole_user(folder: Path) -> Iterator[None]:
    """Locks a run's folder while the block runs; warns if the file system has no locks.

    Only rank 0 takes the lock, so further ranks of the same command may enter.

    Raises:
        FileExistsError: if another command holds the lock.
    """
    path = folder / ".lock"
    with ExitStack() as stack:
        rank = getattr(rank_zero_only, "rank", 0)  # Lightning, which sets it, takes long to import
        if rank == 0 and os.environ.get("NODE_RANK", "0") == "0":
            folder.mkdir(parents=True, exist_ok=True)
            try:
                stack.enter_context(FileLock(path, timeout=0))
                stack.callback(_removed_if_possible, path)
            except Timeout as error:
                way_out = f"wait for it, or give another name=. If its machine crashed, and so never let go, remove {path}"
                raise FileExistsError(f"another process is at work in {folder}; {way_out}") from error
            except (NotImplementedError, OSError) as error:
                warnings.warn(
                    f"{folder} cannot be locked ({error}): see to it yourself that one process alone is there", stacklevel=4
                )
        yield


def last_checkpoint(folder: Path) -> Path:
    """Returns the path of the checkpoint that ckpt=last resumes from, of the run in a folder."""
    return folder / "checkpoints" / "last.ckpt"


HASH = "sha256"  # key of the hash in a file written by `save_checked`
whole_files: set[tuple] = set()  # those that this process has found to be what was saved, by device, inode, size and time


def save_checked(contents: dict, path: Path):
    """Writes tensors and plain values with their hash to a file for `load_checked`.

    A kill, an error or a full disk leaves the previous file as it was.

    Raises:
        OSError: if the file cannot be written. ValueError: if it holds what `load_checked` does not read.
    """
    try:
        with disk_errors(), written_aside(path) as aside:
            with open(aside, "wb") as file:
                torch.save({**contents, HASH: contents_hash(contents)}, file)
                file.flush()
                os.fsync(file.fileno())
            if kinds := torch.serialization.get_unsafe_globals_in_checkpoint(aside):
                found = ", ".join(itertools.islice(not_plain(contents), 3)) or ", ".join(sorted(kinds))
                problem = f"{path} could not be saved: nobody could load it, which executes nothing"
                raise ValueError(
                    f"{problem}. It holds {found}; expected tensors and plain values, such as float(x) of numpy's x"
                )
        sync_folder(path.parent)
    except OSError as error:
        raise not_saved(path, error) from error


def not_plain(value: object, place: str = "") -> Iterator[str]:
    """Yields where a checkpoint holds more than tensors and plain values, and of what class that is."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from not_plain(item, f"{place}.{key}" if place else str(key))
    elif isinstance(value, list | tuple | set):
        for number, item in enumerate(value):
            yield from not_plain(item, f"{place}[{number}]")
    elif type(value).__module__ not in ("builtins", "torch", "torch.nn.parameter") or isinstance(value, range):
        yield f"{place} ({type(value).__module__}.{type(value).__name__})"


def sync_folder(folder: Path):
    """Flushes the file names of a folder to the disk, so that renamed files survive a power loss.

    Does nothing where the file system cannot: the files are in place in any case.
    """
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def disk_errors() -> Iterator[None]:
    """Converts the RuntimeError that torch may raise for a full disk to the OSError that caused it.

    Raises:
        OSError: the cause.
    """
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error.__context__, OSError):
            raise
        raise error.__context__ from error


def not_saved(path: Path, cause: OSError) -> OSError:
    """Builds the error for a file that could not be saved, with the reason, free space, and whether an old file exists."""
    room = f" ({shutil.disk_usage(path.parent).free / 2**20:.0f} MiB free there)" if path.parent.is_dir() else ""
    before = "; the one before it is whole" if path.exists() else ""
    return OSError(f"{path} could not be saved: {cause.strerror or cause}{room}{before}")


def load_checked(path: Path, mmap: bool = False) -> dict:
    """Loads a file written by `save_checked`, or a torch file of another program, on the CPU; nothing in it is executed.

    A process hashes a file once, unless it changes: a training that resumes looks at its checkpoint before it loads it.

    Args:
        mmap: leave tensors in the file until they are used.
    Raises:
        FileNotFoundError, PermissionError: if it cannot be opened.
        ValueError: if it is broken, does not hold a dict, or differs from its hash.
    """
    try:
        found = path.stat()  # before it is read, since another save may replace it
        contents = torch.load(path, "cpu", weights_only=True, mmap=mmap)
    except (FileNotFoundError, PermissionError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # damage can raise anything
        raise ValueError(f"{path} is not a readable file of tensors: {_reason(path, error)}") from error
    if not isinstance(contents, dict):
        raise ValueError(f"{path} holds {type(contents).__name__}, expected what kit saves")
    saved = contents.pop(HASH, None)  # files of other programs have none
    version = found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
    if saved is None or version in whole_files:
        return contents
    if saved != contents_hash(contents):
        raise ValueError(
            f"{path} is damaged: its contents are not those that were saved. Take another, or a copy; if you changed it "
            f"yourself, save it without its entry {HASH!r}"
        )
    whole_files.add(version)
    return contents


def _reason(path: Path, error: Exception) -> str:
    """Says why a file of tensors cannot be read: of what torch has not written, its own errors are of anything."""
    if path.suffix != ".safetensors" and not zipfile.is_zipfile(path):
        return "it is empty" if not path.stat().st_size else "it is no file of torch, or cut off"
    if "weights_only" in str(error):
        return "it holds more than tensors and plain values"
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def no_file(path: Path) -> str:
    """Says in words why there is no file at a path."""
    return "a folder, not a file" if path.is_dir() else "no such file"


def contents_hash(contents: dict) -> str:
    """Computes the SHA-256 of tensors and plain values, in their order."""
    digest = hashlib.sha256()

    def take(value):
        if isinstance(value, Tensor):
            digest.update(f"{value.dtype} {tuple(value.shape)}".encode())
            if not value.is_meta:  # in the index of a sharded checkpoint, whose shards have hashes of their own
                digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        elif isinstance(value, dict):
            digest.update(f"{len(value)} entries".encode())
            for key, item in value.items():
                digest.update(f"{key!r}:".encode())
                take(item)
        elif isinstance(value, list | tuple):
            digest.update(f"{len(value)} items".encode())
            for item in value:
                take(item)
        else:
            digest.update(repr(value).encode())

    take(contents)
    return digest.hexdigest()


def write_json(path: Path, value: dict):
    with written_aside(path) as aside:
        aside.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def file_sha256(path: str | Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tail_hash(path: Path) -> str:
    """Returns 16 hex digits: a hash of the last 64 KiB of a file, where a checkpoint lists the checksums of its parts."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 2**16))
        return hashlib.sha256(file.read()).hexdigest()[:16]


def read_weights(path: Path) -> dict[str, Tensor]:
    """Reads a state dict from a safetensors or torch file; nothing in it is executed.

    Raises:
        ValueError: if the file is broken or does not hold a dict.
    """
    try:
        weights = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # damage can raise anything
        raise ValueError(f"{path} is not a readable file of weights: {_reason(path, error)}") from error
    if not isinstance(weights, dict):
        raise ValueError(f"{path} holds {type(weights).__name__}, expected a dict of weights")
    return weights


def read_text(path: Path) -> str:
    """Reads a UTF-8 text file. Raises ValueError, naming the line, if it is not UTF-8."""
    data = path.read_bytes()
    try:
        return data.decode().removeprefix("\ufeff")  # byte order mark of some editors
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}, line {line}: not UTF-8; save the file in that encoding") from error


def read_lines(path: Path) -> list[str]:
    """Reads the lines of a text file, each without blanks around it; blank ones are left out.

    Raises:
        ValueError: if it is a table, whose lines are rows; else as `read_text`.
    """
    if path.suffix.lower() in TABLES:
        raise ValueError(f"{path} is a table; write what is wanted of it into a text file, one a line")
    return [line.strip() for line in read_text(path).split("\n") if line.strip()]


def parse_json(text: str, **how):
    """Parses as `json.loads`. Raises json.JSONDecodeError also for what is nested too deeply."""
    try:
        return json.loads(text, **how)
    except RecursionError as error:
        raise json.JSONDecodeError("nested too deeply", text, 0) from error


def read_json(path: Path):
    """Reads a JSON file. Raises ValueError, naming the line, if it is not JSON."""
    try:
        return parse_json(read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}: not JSON ({error.msg}); the file may be cut off") from error
