"""Clips that a training of a generator encodes for itself before it starts, and the checks of those from a cache."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import lightning as L
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from omegaconf import DictConfig

from kit.build import accumulate_of, of_stage
from kit.data.buckets import Bucket
from kit.data.cache import CachedClips
from kit.data.datamodule import ClipDataModule
from kit.data.source import ClipSource
from kit.data.staged import StagedClips
from kit.encoding import describe, write_cache
from kit.generator.module import GeneratorModule
from kit.signals import ended_at_once
from kit.stages import Stage
from kit.values import check_whole_number, plain


def encoded_clips_of(cfg: DictConfig, *parts: str) -> Path:
    """Returns the folder of the clips that a run encodes for itself.

    Args:
        parts: names of the stage and the bucket, if any, each of which has a folder of its own. Points join them, which names
            of stages have not: of a stage `x` the `images` are not a stage `x_images`.
    """
    return Path(cfg.folder) / "_".join(filter(None, ("encoded_clips", ".".join(parts))))


def encode_ahead(cfg: DictConfig, data: ClipDataModule | StagedClips, module: GeneratorModule):
    """Makes training read clips that are encoded once at its start: `encoded_clips` of them in each stage, or fewer if it
    does not read as many.

    Raises:
        ValueError: if `encoded_clips` is below 1.
    """
    check_whole_number("encoded_clips", cfg.encoded_clips, 1)
    stages = data.plan.stages if isinstance(data, StagedClips) else [None]
    for stage, part in zip(stages, data.parts, strict=True):
        if part.cached:
            continue
        steps = stage.steps if stage else cfg.trainer.max_steps
        part.encode_ahead(partial(clips_for_run, cfg, part, stage, module), steps * accumulate_of(cfg), cfg.encoded_clips)


def clips_for_run(
    cfg: DictConfig, part: ClipDataModule, stage: Stage | None, module: GeneratorModule,
    source: ClipSource, bucket: Bucket, share: float, needed: int, images: bool,
) -> CachedClips:  # fmt: skip
    """Encodes clips into the run's folder, or finds those that it encoded before.

    Args:
        part: the data that the clips are of. stage: its stage; None: the training has none.
        source, bucket, share, needed, images: see `ClipDataModule.encode_ahead`.
    """
    data, of = (of_stage(cfg, stage).data, [stage.name]) if stage else (cfg.data, [])
    folder = encoded_clips_of(cfg, *of, *["images"] * images, *[str(bucket)] * part.bucketed)
    how = choice_of(data.images if images else data.source, [source])
    most = rounded_share(cfg.encoded_clips, share)
    sources, clips = {"train": source}, {"train": min(most, max(1, needed))}
    if most < min(needed, len(source.files)):
        rank_zero_warn(
            f"encoded_clips={cfg.encoded_clips}: {most} of the {len(source.files)} files of {source.name} are trained on; "
            f"encode more, or 0: none ahead"
        )
    about = describe(shaped(part.clip, bucket), module.tokenizer, module.hparams.tokenizer_hash, how, sources)
    with ended_at_once():  # files that are whole stay
        write_cache(folder, about, sources, clips, module.tokenizer, part.workers)
    found = CachedClips(folder)
    found.count = min(found.count, most)  # a run may be resumed with fewer than it has encoded
    return found


def check_cache(data: ClipDataModule | StagedClips, module: L.LightningModule):
    """Checks that clips from a cache suit the module.

    Raises:
        ValueError: if the module trains a tokenizer, which needs videos, or if the clips were encoded by another tokenizer
            than the generator's.
    """
    for part in data.parts:
        for clips in (part.val, part.images):
            if clips is None or clips.tokenizer is None:
                continue
            if module.kind == "tokenizer":
                raise ValueError(f"{clips.name} holds encoded clips, which a generator trains on; a tokenizer needs videos")
            if clips.tokenizer != module.hparams.tokenizer_hash:
                raise ValueError(
                    f"the clips in {clips.name} are encoded by the tokenizer {clips.tokenizer}, the generator is to learn "
                    f"those of {module.hparams.tokenizer_hash} ({module.hparams.tokenizer_path}); give tokenizer_ckpt=, or "
                    f"make another cache"
                )


@rank_zero_only  # the other processes wait for rank 0 before they encode
def remove_encoded_clips(folder: Path):
    for path in folder.glob("encoded_clips*"):
        shutil.rmtree(path)


def shaped(clip: dict, bucket: Bucket) -> dict:
    """Returns the values of a clip in the shape of a bucket."""
    return {**clip, "frames": bucket.frames, "height": bucket.height, "width": bucket.width}


def rounded_share(clips: int, share: float) -> int:
    """Returns the number of clips of a part that has a share of all: rounded up, so at least one."""
    return max(1, math.ceil(clips * share))


def choice_of(source: DictConfig, sources: Iterable[ClipSource]) -> dict:
    """Returns the plain values that choose the clips of a source.

    Args:
        sources: what it makes. If they list files the folder is not among the values: a cache lists these, wherever they lie.
    """
    listed = any(len(made.files) for made in sources)

    def chosen(values: dict) -> dict:  # recursive: a mixture has sources within
        others = {"_partial_", "patience", "verify", *["root"] * listed}
        if not values.get("late"):  # chooses the same clips as before this key existed: older caches stay valid
            others.add("late")
        return {key: chosen(v) if isinstance(v, dict) else v for key, v in values.items() if key not in others}

    return chosen(plain(source))
