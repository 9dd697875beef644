"""The verb `cache`: encodes clips once, for any number of trainings of generators."""

from __future__ import annotations

import shlex
import time
from pathlib import Path

from omegaconf import DictConfig

from kit.build import build_data
from kit.checkpoint import Loaded, load_tokenizer
from kit.data.cache import read_manifest
from kit.data.datamodule import ClipDataModule, check_videos
from kit.data.source import ClipSource
from kit.encode_ahead import choice_of, rounded_share, shaped
from kit.encoding import describe, write_cache
from kit.values import check_whole_number


def cache(cfg: DictConfig) -> Path:
    """Encodes clips of a data set once, for any number of trainings of a generator.

    Returns:
        the folder of the cache.
    Raises:
        ValueError: if the clips come from a cache already, or their number or shape is no whole numbers; else as
            `write_cache`.
    """
    check_whole_number("clips", cfg.clips, 1)
    tokenizer, folder, cfg = load_tokenizer(cfg.tokenizer_ckpt), Path(cfg.folder), cfg.copy()
    for key in ("frames", "height", "width"):
        check_whole_number(f"data.{key}", cfg.data[key], 1, optional=True)
        cfg.data[key] = cfg.data[key] or tokenizer.clip[key]
    data = build_data(cfg, tokenizer.model.config)
    check_videos(data)
    began = time.perf_counter()
    manifests = encode(data, cfg, tokenizer, folder)
    seconds = time.perf_counter() - began
    size = sum(file["bytes"] for manifest in manifests for file in manifest["files"].values()) / 2**20
    held = " + ".join(str(sum(manifest["clips"].get(split, 0) for manifest in manifests)) for split in ("train", "val"))
    print(f"in {folder}: {held} clips, {size:.1f} MiB, after {seconds:.0f} s; {len(data.unreadable)} files could not be read")
    words = ["conf=stage2_generator", "data=cached", f"data.root={folder}", f"tokenizer_ckpt={tokenizer.path}"]
    print(shlex.join(["python", "-m", "kit", "fit", *words]))
    return folder


def encode(data: ClipDataModule, cfg: DictConfig, tokenizer: Loaded, folder: Path) -> list[dict]:
    """Encodes clips of both splits, or in buckets those to validate on and each bucket's, see `kit.data.cache`.

    Returns:
        the manifest of each part. Raises as `write_cache`.
    """

    def part(place: Path, clip: dict, sources: dict[str, ClipSource], clips: dict[str, int], **more) -> dict:
        about = describe(clip, tokenizer.model, tokenizer.hash, choice_of(cfg.data.source, sources.values()), sources) | more
        print(f"{' + '.join(map(str, clips.values()))} clips, {about['schedule']}")
        if "train" in clips and clips["train"] < len(sources["train"].files):
            of = f"{len(sources['train'].files)} files of {sources['train'].name}"
            print(f"note: {clips['train']} of the {of} are encoded; give more clips for all")
        write_cache(place, about, sources, clips, tokenizer.model, data.workers)
        return read_manifest(place)

    train = data.train
    if not data.bucketed:
        sources, clips = {"train": train, "val": data.val}, {"train": cfg.clips, "val": cfg.val_clips}
        return [part(folder, data.clip, sources, clips)]
    buckets = list(map(str, train.buckets))
    parts = [part(folder, data.clip, {"val": data.val}, {"val": cfg.val_clips}, buckets=buckets)]
    for source, bucket, weight in zip(train.parts, train.buckets, train.weights, strict=True):
        clips = {"train": rounded_share(cfg.clips, weight / sum(train.weights))}
        parts.append(part(folder / str(bucket), shaped(data.clip, bucket), {"train": source}, clips))
    return parts
