"""Files that are whole or not there, and weights that are what they claim to be."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to, renamed to it at the end: a kill, an error or a full disk leaves nothing
    half-written under `path`, and the next write takes the place of what a kill left."""
    name = hashlib.sha256(path.name.encode()).hexdigest()[:12]  # short, for long names
    aside = path.with_name(f".{name}.part{path.suffix}")  # the suffix tells PyAV the container
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield aside
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def replacing(folder: Path, pattern: str) -> Iterator[None]:
    """The block's files of that pattern take the place of all there were: those that it does not write anew go after it. An
    error leaves them."""
    before = {path: path.stat().st_mtime_ns for path in folder.glob(pattern)}
    yield
    for path, written in before.items():
        if path.stat().st_mtime_ns == written:
            path.unlink()


HASH = "sha256"  # entry of a file that `save_checked` wrote


def save_checked(contents: dict, path: Path):
    """Writes tensors and plain values, and a hash of them, to a file for `load_checked`; a kill, an error or a full disk
    leaves what was there.

    Raises:
        OSError: if it cannot be written.
    """
    try:
        with disk_errors(), written_aside(path) as aside, open(aside, "wb") as file:
            torch.save({**contents, HASH: contents_hash(contents)}, file)
            file.flush()
            os.fsync(file.fileno())
        sync_folder(path.parent)
    except OSError as error:
        raise not_saved(path, error) from error


def sync_folder(folder: Path):
    """Returns when its files' names have reached the disk, where the file system can say so: those renamed are there after a
    power loss. They are in place already, so that it cannot is no reason to call the file lost."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def disk_errors() -> Iterator[None]:
    """
    Raises:
        OSError: where torch tells of a full disk by a RuntimeError, as it does or does not.
    """
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error.__context__, OSError):
            raise
        raise error.__context__ from error


def not_saved(path: Path, cause: OSError) -> OSError:
    """An error that says why, how much room there is, and what is still there."""
    room = f" ({shutil.disk_usage(path.parent).free / 2**20:.0f} MiB free there)" if path.parent.is_dir() else ""
    before = "; the one before it is whole" if path.exists() else ""
    return OSError(f"{path} could not be saved: {cause.strerror or cause}{room}{before}")


def load_checked(path: Path, mmap: bool = False) -> dict:
    """What `save_checked` wrote, on the CPU; nothing in it is executed.

    Args:
        mmap: leave tensors in the file until they are used.
    Raises:
        FileNotFoundError, PermissionError: if it cannot be opened. ValueError: if the file is broken, holds something else
            than a dict, or not what was saved.
    """
    try:
        contents = torch.load(path, "cpu", weights_only=True, mmap=mmap)
    except (FileNotFoundError, PermissionError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # of any kind, as the damage is
        told = next(iter(str(error).splitlines()), "") or type(error).__name__
        told = "it is no file of torch, or holds more than tensors and plain values" if "weights_only" in told else told
        raise ValueError(f"{path} is not a readable file of tensors: {told}") from error
    if not isinstance(contents, dict):
        raise ValueError(f"{path} holds {type(contents).__name__}, expected what kit saves")
    saved = contents.pop(HASH, None)  # files of other programs have none
    if saved is not None and saved != contents_hash(contents):
        raise ValueError(
            f"{path} is damaged: its contents are not those that were saved. Take another, or a copy; if you changed it "
            f"yourself, save it without its entry {HASH!r}"
        )
    return contents


def contents_hash(contents: dict) -> str:
    """SHA-256 of tensors and plain values, in their order."""
    digest = hashlib.sha256()

    def take(value):
        if isinstance(value, Tensor):
            digest.update(f"{value.dtype} {tuple(value.shape)}".encode())
            if not value.is_meta:  # of an index, whose shards have hashes of their own
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


def read_weights(path: Path) -> dict[str, Tensor]:
    """A state dict from safetensors, or from a torch file; nothing in it is executed.

    Raises:
        ValueError: if it is broken or something else.
    """
    try:
        weights = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"{path} is not a readable file of weights: {str(error).splitlines()[0]}") from error
    if not isinstance(weights, dict):
        raise ValueError(f"{path} holds {type(weights).__name__}, expected a dict of weights")
    return weights


def read_text(path: Path) -> str:
    """Raises: ValueError naming the line that is not UTF-8."""
    data = path.read_bytes()
    try:
        return data.decode().removeprefix("\ufeff")  # a mark that some editors put first
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}, line {line}: not UTF-8; save the file in that encoding") from error


def read_json(path: Path):
    """Raises: ValueError naming the line that is not JSON."""
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}: not JSON ({error.msg}); the file may be cut off") from error
