"""Clips encoded once: what a generator trains on without drawing, decoding or encoding a clip again.

A cache is a folder with `manifest.json`, which says what the clips are and which files hold them, and for each split files of
up to `SHARD` clips, `train_00000.safetensors` and so on: `feature` (n, d, F, h, w) float16, of `Tokenizer.encode`; `label`
(n,) int64; `given` (n,) int64, how many latent frames of each are not to be predicted; and in the header the captions.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from kit.data.numbered import Numbered
from kit.files import file_sha256, read_json, write_json, written_aside
from kit.machine import device, inference_precision
from kit.scales import latent_frames
from kit.tokenizer import Tokenizer

MANIFEST = "manifest.json"
SHARD, BATCH = 512, 16  # clips of a file, and encoded at a time


class Shard(NamedTuple):
    """Items `first` to `first + clips` - 1 of a split, and the file that holds them."""

    split: str
    file: str
    first: int
    clips: int


def shards_of(clips: dict[str, int]) -> list[Shard]:
    """Of so many clips of each split."""
    return [
        Shard(split, f"{split}_{first // SHARD:05d}.safetensors", first, min(SHARD, total - first))
        for split, total in clips.items()
        for first in range(0, total, SHARD)
    ]


def describe(clip: dict, tokenizer: Tokenizer, tokenizer_hash: str, how: dict, sources: dict[str, Dataset]) -> dict:
    """What clips a cache holds, as plain values.

    Args:
        clip: `frames`, `height`, `width`, `fps`. how: plain values that choose the clips, the config's `data.source`.
        sources: split -> data set; its files count too, by names, sizes, captions and classes, where it has a `listing` of
            them.
    """
    schedule = tokenizer.schedule(clip["frames"], clip["height"], clip["width"])
    files = {split: _files_of(source) for split, source in sources.items() if hasattr(source, "listing")}
    first = next(iter(sources.values()))
    about = {
        "tokenizer": tokenizer_hash, "schedule": str(schedule), "clip": clip, "source": how, "files": files,
        "classes": first.classes, "captioned": first.captioned,
    }  # fmt: skip
    return json.loads(json.dumps(about))


def _files_of(source: Dataset) -> dict:
    names, words = source.listing(), source.said()
    hashes = {"sha256": "\n".join(names), "words": json.dumps(words)}
    return {"count": len(names), **{key: hashlib.sha256(text.encode()).hexdigest() for key, text in hashes.items()}}


def write_cache(
    folder: Path, about: dict, sources: dict[str, Dataset], clips: dict[str, int], tokenizer: Tokenizer, workers: int
):  # fmt: skip
    """Encodes the first clips of each split, but for the files that are there already.

    Any number of processes can do this together, on all machines that share the folder: each takes files that no other is
    at, and returns when all are there. Killed and started again, it goes on; asked for more clips, it adds them.

    Args:
        about: see `describe`. sources, clips: split -> data set, and how many of its items.
        workers: processes that make clips.
    Raises:
        ValueError: if the folder holds other clips, or a number of clips is below 1.
    """
    for split, number in clips.items():
        if number < 1:
            raise ValueError(f"{number} clips of the split {split}; expected 1 or more")
    _claim(folder, about, clips)
    model, frames, shards, met = tokenizer.to(device()).eval(), about["clip"]["frames"], shards_of(clips), set()
    with tqdm(total=sum(clips.values()), desc="encode", unit="clip", disable=None) as bar:
        for seconds in (0, -1):  # first what is free; then, however long it takes, what others were at: they may be dead
            for shard in shards:
                try:
                    with _locked(folder / shard.file, seconds):
                        if not is_whole(folder / shard.file, shard):
                            _write(folder / shard.file, _encoded(sources[shard.split], shard, model, frames, workers, bar))
                        elif shard not in met:
                            bar.update(shard.clips)
                    met.add(shard)
                except Timeout:
                    continue
    _finish(folder, about, clips)


@contextmanager
def _locked(path: Path, seconds: float) -> Iterator[None]:
    """Raises: Timeout if another process has it for so long; OSError where there are no locks."""
    lock = FileLock(path.with_name(f".{path.name}.lock"), timeout=seconds)
    try:
        lock.acquire()
    except NotImplementedError as error:
        told = f"{path.parent} is on a file system without locks, which encoding needs; choose another with root=..."
        raise OSError(told) from error
    try:
        yield
    finally:
        lock.release()


def _claim(folder: Path, about: dict, clips: dict[str, int]):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / MANIFEST
    with _locked(path, -1):
        found = read_json(path) if path.exists() else {"about": about, "clips": None}
        if found["about"] != about:
            keys = [key for key in about if found["about"].get(key) != about[key]]
            told = "; ".join(f"{key}: {found['about'].get(key)}, asked for {about[key]}" for key in keys)
            raise ValueError(f"{folder} holds other clips ({told}); choose another folder with name=..., or remove this one")
        if found["clips"] != clips or not all(is_whole(folder / shard.file, shard) for shard in shards_of(clips)):
            write_json(path, {"about": about, "clips": clips})  # not finished, or no longer: of what is written new hashes


def is_whole(path: Path, shard: Shard) -> bool:
    """Whether a file holds what it should: it is cut off, or of fewer or more clips, else."""
    try:
        with safe_open(path, "pt") as file:
            return file.get_slice("feature").get_shape()[0] == shard.clips
    except (OSError, SafetensorError):
        return False


def _encoded(
    source: Dataset, shard: Shard, model: Tokenizer, frames: int, workers: int, bar: tqdm
) -> Iterator[tuple[Tensor, Tensor, Tensor, list[str]]]:  # fmt: skip
    """Feature (b, d, F, h, w), label (b,), given (b,) and captions of a file's clips, some at a time."""
    items = [(n, frames) for n in range(shard.first, shard.first + shard.clips)]
    for batch in DataLoader(Numbered(source), sampler=items, batch_size=BATCH, num_workers=workers):
        with torch.no_grad(), inference_precision():
            feature = model.encode(batch["video"].to(device()))
        yield feature.half().cpu(), batch["label"], batch["given"], batch["caption"]
        bar.update(len(feature))


def _write(path: Path, parts: Iterator[tuple[Tensor, Tensor, Tensor, list[str]]]):
    *numbers, captions = zip(*parts, strict=True)
    tensors = {name: torch.cat(each).contiguous() for name, each in zip(("feature", "label", "given"), numbers, strict=True)}
    with written_aside(path) as aside:
        aside.write_bytes(save(tensors, {"captions": json.dumps(sum(captions, []))}))  # `save_file` lets no one else read it


def _finish(folder: Path, about: dict, clips: dict[str, int]):
    """Says in the manifest that all files are there, and their hashes."""
    path = folder / MANIFEST
    with _locked(path, -1):
        found = read_json(path)
        if "files" in found or found["clips"] != clips:  # finished by another, or another has begun to add to it
            return
        files = {}
        for shard in shards_of(clips):
            file = folder / shard.file
            files[shard.file] = {"bytes": file.stat().st_size, "sha256": file_sha256(file)}
            file.with_name(f".{file.name}.lock").unlink(missing_ok=True)
        write_json(path, {"about": about, "clips": clips, "files": files})


def read_manifest(folder: Path) -> dict:
    """
    Raises:
        FileNotFoundError: if there is no cache. ValueError: if it is not finished.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no cache ({MANIFEST} is missing); `python -m kit cache` makes one")
    manifest = read_json(path)
    if "files" not in manifest:
        raise ValueError(f"the cache in {folder} is not finished; give the `python -m kit cache ...` that began it once more")
    return manifest


def of_manifest(folder: str, key: str):
    """`frames`, `height`, `width` or `fps` of the clips in a cache. Raises as `read_manifest`."""
    return read_manifest(Path(folder))["about"]["clip"][key]


class CachedClips(Dataset):
    """Items {"feature": (d, F, h, w) float16, "caption": str, "label": int, "given": int} of a cache, numbered from 0
    without end: they repeat. Read from the disk as they are asked for.

    Args:
        root: the cache's folder. split: `train` or `val`.
        frames: T of the clips, None: as they are; fewer are their beginnings, which causal encoding leaves as they were.
        height, width, fps: as they are; None: whatever they are.
        verify: compare the hash of each file now, which reads them all; else only their sizes.
    Attributes:
        tokenizer: hash of the one they are encoded by. classes, captioned, native_fps: as of the data set they were of.
    Raises:
        FileNotFoundError, ValueError: as `read_manifest`, if the clips are of another shape, or a file is damaged.
    """

    def __init__(
        self, root: str | Path, split: str = "train", frames: int | None = None, height: int | None = None,
        width: int | None = None, fps: float | None = None, verify: bool = False,
    ):  # fmt: skip
        self.root, manifest = Path(root), read_manifest(Path(root))
        about, self.count = manifest["about"], manifest["clips"].get(split)
        if self.count is None:
            raise ValueError(f"split={split!r} is not in the cache {root}; it has {', '.join(manifest['clips'])}")
        clip, asked = about["clip"], {"frames": frames, "height": height, "width": width, "fps": fps}
        for key, value in asked.items():
            if value is not None and value != clip[key] and not (key == "frames" and value < clip[key]):
                raise ValueError(f"data.{key}={value}, but the clips of the cache {root} have {clip[key]}; leave it out")
        self.latents = latent_frames(frames or clip["frames"])
        self.tokenizer, self.classes, self.captioned = about["tokenizer"], tuple(about["classes"]), about["captioned"]
        self.native_fps = clip["fps"]
        self.written = [self._check(shard.file, manifest["files"], verify) for shard in shards_of({split: self.count})]

    def _check(self, name: str, files: dict, verify: bool) -> tuple[str, int]:
        path = self.root / name
        if not path.is_file():
            raise FileNotFoundError(f"{path}, a part of the cache, is missing; make it once more with `python -m kit cache`")
        found = path.stat()
        if found.st_size != files[name]["bytes"] or verify and file_sha256(path) != files[name]["sha256"]:
            raise ValueError(f"{path} is damaged; remove it, and make it once more with `python -m kit cache`")
        return str(path), found.st_mtime_ns

    def __getitem__(self, n: int) -> dict:
        number, place = divmod(n % self.count, SHARD)
        features, labels, given, captions = _open(*self.written[number])
        words = {"caption": captions[place], "label": labels[place]}
        return {"feature": features[place, :, : self.latents], "given": given[place], **words}


@functools.lru_cache(maxsize=64)
def _open(path: str, written: int):
    """Features of a file that stay there until they are asked for, labels, how many frames are given, and captions."""
    file = safe_open(path, "pt")
    labels = file.get_tensor("label").tolist()
    given = file.get_tensor("given").tolist() if "given" in file.keys() else [0] * len(labels)  # noqa: SIM118, no dict
    return file.get_slice("feature"), labels, given, json.loads(file.metadata()["captions"])
