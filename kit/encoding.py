"""Encodes clips once and writes them to a cache, see `kit.data.cache`: alone, or together with other processes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from filelock import AcquireReturnProxy, Timeout
from safetensors.torch import save
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from kit.data.cache import MANIFEST, CacheFile, files_of, is_whole
from kit.data.numbered import Numbered
from kit.data.source import ClipSource
from kit.files import file_sha256, locked, not_saved, read_json, write_json, written_aside
from kit.machine import autocast, device, inference_precision
from kit.tokenizer import Tokenizer
from kit.values import differences, hash_of

BATCH = 16  # clips encoded at a time


def describe(clip: dict, tokenizer: Tokenizer, tokenizer_hash: str, how: dict, sources: dict[str, ClipSource]) -> dict:
    """Describes the clips of a cache as plain values, for its manifest.

    Args:
        clip: `frames`, `height`, `width`, `fps`. how: plain values that choose the clips, the config's `data.source`.
        sources: split -> data set. If it has files, their names, sizes, captions and classes count too.
    """
    schedule = tokenizer.schedule(clip["frames"], clip["height"], clip["width"])
    files = {split: _listing_of(source) for split, source in sources.items() if len(source.files)}
    first = next(iter(sources.values()))
    about = {
        "tokenizer": tokenizer_hash, "schedule": str(schedule), "clip": clip, "source": how, "files": files,
        "classes": first.classes, "captioned": first.captioned,
    }  # fmt: skip
    return json.loads(json.dumps(about))


def _listing_of(source: ClipSource) -> dict:
    lines = source.listing()
    return {"count": len(lines), "sha256": hash_of(lines, 64), "words": hash_of([json.dumps(source.texts())], 64)}


def write_cache(
    folder: Path, about: dict, sources: dict[str, ClipSource], clips: dict[str, int], tokenizer: Tokenizer, workers: int
):  # fmt: skip
    """Encodes the first clips of each split, and writes the files of the cache that do not exist yet.

    Any number of processes can do this together, on all machines that share the folder: each takes files that no other is
    writing, and returns when all files exist. A killed run continues when it is started again; a call for more clips adds
    them, one for fewer keeps those that are there.

    Args:
        about: see `describe`. sources: split -> data set. clips: split -> number of its items to encode.
        workers: number of processes that load clips.
    Raises:
        ValueError: if the folder holds other clips, or a number of clips is below 1.
    """
    for split, number in clips.items():
        if number < 1:
            raise ValueError(f"{number} clips of the split {split}; expected 1 or more")
    if _holds(folder, about, clips):  # before anything is written: a finished cache may be read only
        return
    claimed = _claim(folder, about, clips)
    model, files, met = tokenizer.to(device()).eval(), files_of(claimed), set()
    with tqdm(total=sum(claimed.values()), desc="encode", unit="clip", disable=None) as bar:
        for wait in (False, True):  # first the free files; then wait for those of others, who may have died
            for file in files:
                try:
                    with _locked(folder / file.name, wait):
                        if not is_whole(folder / file.name, file):
                            parts = _encoded(sources[file.split], file, model, about["clip"], workers, bar)
                            _write(folder / file.name, parts)
                        elif file not in met:
                            bar.update(file.clips)
                    met.add(file)
                except Timeout:
                    continue
    if not _finish(folder, about, claimed):  # another process has claimed more meanwhile
        write_cache(folder, about, sources, clips, tokenizer, workers)


def _locked(path: Path, wait: bool = True) -> AcquireReturnProxy:
    """Takes the lock of a file, as `locked`."""
    return locked(path.with_name(f".{path.name}.lock"), wait)


def _holds(folder: Path, about: dict, clips: dict[str, int]) -> bool:
    """Whether a finished cache holds these clips, or more, in files that are whole."""
    path = folder / MANIFEST
    found = read_json(path) if path.is_file() else {}
    enough = found.get("about") == about and all(found["clips"].get(split, 0) >= n for split, n in clips.items())
    return enough and "files" in found and all(is_whole(folder / file.name, file) for file in files_of(found["clips"]))


def _claim(folder: Path, about: dict, clips: dict[str, int]) -> dict[str, int]:
    """Notes in the manifest what the cache will hold: `clips`, or more where it has or will have more; returns that.

    Raises:
        ValueError: if the folder holds other clips.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / MANIFEST
    with _locked(path):
        found = read_json(path) if path.exists() else {"about": about, "clips": {}}
        if found["about"] != about:
            raise ValueError(
                f"{folder} holds other clips (there, asked for: {'; '.join(differences(found['about'], about))}); choose "
                f"another with name=..., or remove it: they are encoded anew"
            )
        clips = {split: max(number, found["clips"].get(split, 0)) for split, number in clips.items()}
        if found["clips"] != clips or not all(is_whole(folder / file.name, file) for file in files_of(clips)):
            write_json(path, {"about": about, "clips": clips})  # without hashes: not finished until `_finish` adds them
    return clips


def _encoded(
    source: ClipSource, file: CacheFile, model: Tokenizer, clip: dict, workers: int, bar: tqdm
) -> Iterator[tuple[Tensor, Tensor, Tensor, list[str]]]:  # fmt: skip
    """Yields the encoded clips of a file in batches: feature (b, d, F, h, w), label (b,), given (b,) and captions."""
    items = [(n, clip["frames"]) for n in range(file.first, file.first + file.clips)]
    clips = Numbered(source, size=(clip["height"], clip["width"]))
    for batch in DataLoader(clips, sampler=items, batch_size=BATCH, num_workers=workers):
        with torch.no_grad(), autocast(inference_precision()):
            feature = model.encode(batch["video"].to(device()))
        yield feature.half().cpu(), batch["label"], batch["given"], batch["caption"]
        bar.update(len(feature))


def _write(path: Path, parts: Iterator[tuple[Tensor, Tensor, Tensor, list[str]]]):
    *numbers, captions = zip(*parts, strict=True)
    tensors = {name: torch.cat(each).contiguous() for name, each in zip(("feature", "label", "given"), numbers, strict=True)}
    try:
        with written_aside(path) as aside:
            aside.write_bytes(save(tensors, {"captions": json.dumps(sum(captions, []))}))  # `save_file` makes files private
    except OSError as error:
        raise not_saved(path, error) from error


def _finish(folder: Path, about: dict, clips: dict[str, int]) -> bool:
    """Writes the hashes of all files to the manifest, which marks the cache as finished; returns False if another process has
    asked for more clips than `clips` meanwhile."""
    path = folder / MANIFEST
    with _locked(path):
        found = read_json(path)
        if "files" in found or found["clips"] != clips:  # another has finished it, or is adding to it
            return found["clips"] == clips
        files = {}
        for file in files_of(clips):
            whole = folder / file.name
            files[file.name] = {"bytes": whole.stat().st_size, "sha256": file_sha256(whole)}
            whole.with_name(f".{file.name}.lock").unlink(missing_ok=True)
        write_json(path, {"about": about, "clips": clips, "files": files})
    return True
