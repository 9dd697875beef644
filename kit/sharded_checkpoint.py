"""Sharded checkpoints: each process writes its own share of the sharded tensors, and none ever holds all of them.

A sharded checkpoint is a file and a folder that belong together: `last.ckpt`, the index, and `last.shards`. The index is an
ordinary checkpoint, except that sharded tensors are on the meta device and that it records where their parts are. It is
written last, and shards are part of a checkpoint only if the index names their slot: of the two slots in the folder, a
save goes to the one that the index does not name, so that a kill or a full disk leaves the previous save intact.

`torch.distributed.checkpoint` writes and reads the shards. It would read the locations of their parts from `.metadata`, a
pickle, and loading a pickle may execute code; so the index holds them too, as plain values, and `.metadata` is never opened
here.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict
from torch.distributed.tensor import DTensor

from kit.files import disk_errors, file_sha256, load_checked, not_saved, save_checked
from kit.ranks import everywhere, first

Keys = tuple[str | int, ...]  # keys of a tensor in a checkpoint, the outermost first
Take = Callable[[Keys, Tensor], Tensor]  # returns a replacement for a tensor; for one on the meta device, a tensor to fill
ANOTHER = "another checkpoint, or a fresh copy of this one"
SHARDS = "shards"  # entry of an index: the slot in the folder, its files' SHA-256, the parts of each tensor
SLOTS = ("a", "b")  # subfolders that saves alternate between
ALIGNED = 64  # bytes; tensors of any type may begin at a multiple of it


def folder_of(path: Path) -> Path:
    """Returns the folder of a checkpoint's shards."""
    return path.with_suffix(".shards")


def remove_shards(path: Path):
    """Removes the shards, if any, of a checkpoint that is gone or no longer sharded."""
    shutil.rmtree(folder_of(path), ignore_errors=True)


def mapped(value: Any, change: Callable[[Keys, Tensor], Any], keys: Keys = ()) -> Any:
    """Copies nested dicts, lists and tuples, with each tensor replaced by `change(keys, tensor)`."""
    if isinstance(value, Tensor):
        return change(keys, value)
    if isinstance(value, dict):
        return {key: mapped(item, change, (*keys, key)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        items = [mapped(item, change, (*keys, i)) for i, item in enumerate(value)]
        return items if isinstance(value, list) else tuple(items)
    return value


class _Writer(dcp.FileSystemWriter):
    """Writes shards.

    Attributes: parts, of each tensor as plain values: offsets and sizes in it; file, first byte and number of bytes. The
        first process knows them when all have written.
    """

    def write_data(self, plan, planner):
        with disk_errors():
            return super().write_data(plan, planner)

    def finish(self, metadata, results):
        stored = {result.index: result.storage_data for written in results for result in written}
        self.parts = {
            name: [
                (list(chunk.offsets), list(chunk.sizes), place.relative_path, place.offset, place.length)
                for chunk in tensor.chunks
                for place in [stored[MetadataIndex(name, chunk.offsets)]]
            ]
            for name, tensor in metadata.state_dict_metadata.items()
        }
        super().finish(metadata, results)


def save_shards(checkpoint: dict, path: Path):
    """Saves a sharded checkpoint. All processes must call this, with a path on a file system that all of them see.

    What is not sharded is saved from the first process.

    Raises:
        OSError: on all processes, if one cannot write; the previous save is then intact.
    """
    shared: dict[str, Tensor] = {}

    def part(keys: Keys, x: Tensor) -> Tensor:
        if not isinstance(x, DTensor):
            return x
        shared[_name(keys)] = x
        return torch.empty(x.shape, dtype=x.dtype, device="meta")

    index = mapped(checkpoint, part)
    slot = first(lambda: _cleared(path))
    folder = folder_of(path) / slot
    try:
        writer = _written(shared, folder, path)
        files = everywhere(lambda: {f.name: file_sha256(f) for f in sorted(folder.glob(f"__{dist.get_rank()}_*"))})
        hashes = {name: value for each in files for name, value in each.items()}

        def finish():
            if missing := [name for name in hashes if not (folder / name).is_file()]:
                raise OSError(f"{folder / missing[0]} is missing; all processes must save to one file system")
            save_checked({**index, SHARDS: {"slot": slot, "files": hashes, "parts": writer.parts}}, path)

        first(finish)
    except OSError:
        first(lambda: shutil.rmtree(folder, ignore_errors=True))
        raise
    first(lambda: shutil.rmtree(folder_of(path) / _other(slot), ignore_errors=True))


def _written(tensors: dict[str, Tensor], folder: Path, path: Path) -> _Writer:
    """Writes tensors to a folder. Raises OSError on all processes, naming the checkpoint."""
    writer = _Writer(folder)
    try:
        dcp.save(tensors, storage_writer=writer)
    except CheckpointException as error:
        full = [cause for cause, _ in error.failures.values() if isinstance(cause, OSError)]
        if not full:
            raise
        raise not_saved(path, full[0]) from error
    return writer


def _name(keys: Keys) -> str:
    return "/".join(map(str, keys))


def _cleared(path: Path) -> str:
    """Returns the slot that the last checkpoint does not use, emptied of what a killed save has left."""
    taken = None
    if path.is_file() and folder_of(path).is_dir():
        try:
            taken = load_checked(path, mmap=True).get(SHARDS, {}).get("slot")
        except ValueError:  # a broken checkpoint, which cannot be loaded anyway
            pass
    slot = _other(taken)
    if (folder_of(path) / slot).exists():
        shutil.rmtree(folder_of(path) / slot)
    return slot


def _other(slot: str | None) -> str:
    return next(s for s in SLOTS if s != slot)


class _Reader(dcp.FileSystemReader):
    """Reads tensors whose parts are where the index says."""

    def __init__(self, folder: Path, tensors: dict[str, Tensor], parts: dict[str, list[tuple]]):
        super().__init__(folder)
        self.metadata = Metadata({}, storage_data={})
        for name, x in tensors.items():
            chunks = [ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)) for offsets, sizes, *_ in parts[name]]
            self.metadata.state_dict_metadata[name] = TensorStorageMetadata(TensorProperties(x.dtype), x.shape, chunks)
            for i, (offsets, _, *where) in enumerate(parts[name]):
                self.metadata.storage_data[MetadataIndex(name, offsets, i)] = _StorageInfo(*where)

    def read_metadata(self, *_, **__) -> Metadata:
        return self.metadata


def described(path: Path) -> dict:
    """Loads a checkpoint without its tensors in memory: they stay in its file or, if sharded, are on the meta device.
    Raises as `load_checked`."""
    contents = load_checked(path, mmap=True)
    contents.pop(SHARDS, None)
    return contents


def in_memory(_: Keys, x: Tensor) -> Tensor:
    return torch.empty_like(x, device="cpu") if x.is_meta else x


def load_whole(path: Path, take: Take = in_memory) -> dict:
    """Loads a checkpoint, sharded or not, with whole tensors on the CPU, on one process alone. Raises as `load_checked`."""
    return _filled(path, load_checked(path), take, lambda act: act())


def load_shares(path: Path, take: Take) -> dict:
    """Loads a checkpoint, sharded or not, on all processes, of which each takes its own share. All must call this.

    Raises:
        as `load_checked`, on all processes.
    """
    contents = {}
    everywhere(lambda: contents.update(load_checked(path, mmap=True)))
    return _filled(path, contents, take, everywhere, dist.get_rank(), dist.get_world_size())


def _filled(
    path: Path, contents: dict, take: Take, run: Callable[[Callable[[], None]], object], rank: int = 0, ranks: int = 1
) -> dict:  # fmt: skip
    """Returns the checkpoint `contents` with its tensors replaced by what `take` returns, filled from the shards if any.

    Args:
        run: runs what may fail; with several processes, of which each checks some of the files, it fails on all of them.
    """
    shards, given, taken = contents.pop(SHARDS, None), {}, {}

    def one(keys: Keys, x: Tensor) -> Tensor:
        if x.is_meta and shards is None:
            raise ValueError(f"{path} lacks its entry {SHARDS!r}, which says where its tensors lie; take {ANOTHER}")
        own = take(keys, x)
        if x.is_meta:
            given[_name(keys)], taken[_name(keys)] = x, own
        return own

    if shards is None:
        return mapped(contents, one)
    _check_names(path, shards)
    folder = folder_of(path) / shards["slot"]
    run(lambda: _check(path, {folder / name: shards["files"][name] for name in list(shards["files"])[rank::ranks]}))
    filled = mapped(contents, one)
    run(lambda: _fill(taken, _Reader(folder, given, shards["parts"])))
    return filled


def _fill(tensors: dict[str, Tensor], reader: _Reader):
    """Fills tensors from shards. Raises ValueError if that fails.

    Avoids torch's `load`, which warns of `no_dist`.
    """
    try:
        _load_state_dict(tensors, reader, no_dist=True)
    except CheckpointException as error:
        raise ValueError(f"{reader.path} could not be read: {next(iter(error.failures.values()))[0]}") from error


def _check_names(path: Path, shards: dict):
    """Checks that a checkpoint's shards lie in its own folder and all have hashes. Raises ValueError if not."""
    if missing := [key for key in ("slot", "files", "parts") if key not in shards]:
        raise ValueError(f"{path}: its entry {SHARDS!r} lacks {', '.join(missing)}; take {ANOTHER}")
    named = {where[0] for parts in shards["parts"].values() for _, _, *where in parts}
    strange = [name for name in (*shards["files"], *named) if Path(name).name != name or name not in shards["files"]]
    if strange or shards["slot"] not in SLOTS:
        other = (strange or [shards["slot"]])[0]
        raise ValueError(f"{path} names files that are no shards of its own, such as {other}; take {ANOTHER}")


def _check(path: Path, files: dict[Path, str]):
    """Checks the hashes of a checkpoint's shard files.

    Raises:
        ValueError: if one is missing or not what was saved.
    """
    for file, expected in files.items():
        if not file.is_file():
            raise ValueError(
                f"{path} is in shards, and {file} is missing; keep {folder_of(path).name} beside it. If a training is saving "
                f"there just now, try again"
            )
        if file_sha256(file) != expected:
            raise ValueError(
                f"{file} is damaged, or of another save than {path}: take another checkpoint, or a copy of both. If a "
                f"training is saving there just now, try again"
            )


def consolidate(path: Path, out: Path):
    """Converts a sharded checkpoint to one file, the same as if it had been saved whole.

    Its tensors go through an unnamed file beside `out`, not through memory, so twice its size must be free there.

    Raises:
        ValueError: if it is one file already, or `out` is the checkpoint itself; else as `load_checked`.
        OSError: if there is too little space.
    """
    index = load_checked(path, mmap=True)
    if SHARDS not in index:
        raise ValueError(f"{path} is one file already")
    if out.resolve() == path.resolve():
        raise ValueError(f"out={out} is the checkpoint in shards itself; give another name")
    sizes = []
    mapped(index, lambda _, x: sizes.append(x.numel() * x.element_size()))
    out.parent.mkdir(parents=True, exist_ok=True)
    needed, free = 2 * sum(sizes), shutil.disk_usage(out.parent).free
    if free < needed:  # a memory-mapped file on a full disk would kill the process
        raise OSError(f"{out} needs {needed / 2**20:.0f} MiB of room while it is made, {free / 2**20:.0f} MiB are free there")
    with tempfile.TemporaryFile(dir=out.parent) as file:

        def on_disk(keys: Keys, x: Tensor) -> Tensor:
            if not x.is_meta or not x.numel():
                return in_memory(keys, x)
            start = -(-file.seek(0, os.SEEK_END) // ALIGNED) * ALIGNED
            data = np.memmap(file, np.uint8, "r+", start, x.numel() * x.element_size())
            return torch.from_numpy(data).view(x.dtype).view(x.shape)

        save_checked(load_whole(path, take=on_disk), out)
