"""A training run from a config: its folder, where it goes on from, the clips it encodes, and the fit."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import lightning as L
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only
from omegaconf import DictConfig
from torch.utils.data import Dataset

from kit.build import (
    BUILDERS,
    accumulate_of,
    build_data,
    build_stages,
    build_trainer,
    check_sharded_tokenizer,
    of_stage,
    plan_of,
    tokenizer_config,
)
from kit.checkpoint import last_checkpoint
from kit.confs import keep_config
from kit.data.buckets import Bucket
from kit.data.cache import CachedClips, describe, share_of, write_cache
from kit.data.datamodule import ClipDataModule
from kit.data.staged import StagedClips
from kit.files import sole_user
from kit.fsdp import ShardedStrategy, find_unused
from kit.generator.module import GeneratorModule
from kit.machine import fast_float32_products, keep_freed_memory
from kit.retries import BatchPosition, noticing_dead_workers, with_retries
from kit.sharded_checkpoint import remove_shards
from kit.signals import end_with_launcher, ended_at_once
from kit.stages import Stage
from kit.start import start
from kit.training_checkpoint import check_resume, copy_checkpoint
from kit.values import check_whole_number, plain


def encoded_clips_of(cfg: DictConfig, *parts: str) -> Path:
    """Returns the folder of the clips that a run encodes for itself.

    Args:
        parts: names of the stage and the bucket, if any, each of which has a folder of its own.
    """
    return Path(cfg.folder) / "_".join(("encoded_clips", *parts))


def choice_of(source: DictConfig) -> dict:
    """Returns the plain values that choose the clips of a source. The folder is not among them: a cache lists its files."""

    def chosen(values: dict) -> dict:  # recursive: a mixture has sources within
        others = {"_partial_", "root", "patience", "verify"}
        if not values.get("late"):  # chooses the same clips as before this key existed: older caches stay valid
            others.add("late")
        return {key: chosen(v) if isinstance(v, dict) else v for key, v in values.items() if key not in others}

    return chosen(plain(source))


def encode_ahead(cfg: DictConfig, data: ClipDataModule | StagedClips, module: GeneratorModule):
    """Makes training read clips that are encoded once at its start: `encoded_clips` of them in each stage, or fewer if it
    does not read as many.

    Raises:
        ValueError: if `encoded_clips` is below 1.
    """
    check_whole_number("encoded_clips", cfg.encoded_clips, 1)
    staged = isinstance(data, StagedClips)
    stages = data.plan.stages if staged else [None]
    for stage, part in zip(stages, data.parts if staged else [data], strict=True):
        if part.cached:
            continue
        steps = stage.steps if stage else cfg.trainer.max_steps
        part.encode_ahead(partial(encoded, cfg, part, stage, module), steps * accumulate_of(cfg))


def encoded(
    cfg: DictConfig, part: ClipDataModule, stage: Stage | None, module: GeneratorModule,
    source: Dataset, bucket: Bucket, share: float, needed: int, images: bool,
) -> CachedClips:  # fmt: skip
    """Encodes clips into the run's folder, or finds those that it encoded before.

    Args:
        part: the data that the clips are of. stage: its stage; None: the training has none.
        source, bucket, share, needed, images: see `ClipDataModule.encode_ahead`.
    """
    data, of = (of_stage(cfg, stage).data, [stage.name]) if stage else (cfg.data, [])
    folder = encoded_clips_of(cfg, *of, *["images"] * images, *[str(bucket)] * part.bucketed)
    how = choice_of(data.images if images else data.source)
    sources, clips = {"train": source}, {"train": min(share_of(cfg.encoded_clips, share), max(1, needed))}
    clip = {**part.clip, "frames": bucket.frames, "height": bucket.height, "width": bucket.width}
    about = describe(clip, module.tokenizer, module.hparams.tokenizer_hash, how, sources)
    with ended_at_once():  # files that are whole stay
        write_cache(folder, about, sources, clips, module.tokenizer, part.workers)
    return CachedClips(folder)


def check_cache(data: ClipDataModule | StagedClips, module: L.LightningModule):
    """Checks that clips from a cache suit the module.

    Raises:
        ValueError: if the module trains a tokenizer, which needs videos, or if the clips were encoded by another tokenizer
            than the generator's.
    """
    for part in data.parts if isinstance(data, StagedClips) else [data]:
        if part.cached and module.kind == "tokenizer":
            raise ValueError(f"{part.val.name} holds encoded clips, which a generator trains on; a tokenizer needs videos")
        for clips in (part.val, part.images):
            if clips is not None and clips.tokenizer not in (None, module.hparams.get("tokenizer_hash")):
                raise ValueError(
                    f"the clips in {clips.name} are encoded by the tokenizer {clips.tokenizer}, the generator is to learn "
                    f"those of {module.hparams.tokenizer_hash} ({module.hparams.tokenizer_path}); give tokenizer_ckpt=, or "
                    f"make another cache"
                )


def checkpoint_to_resume(cfg: DictConfig) -> Path | None:
    """Returns the checkpoint to resume from, see `ckpt` in conf/fit.yaml; None: start anew.

    Raises:
        FileExistsError: if a new run would take the folder of an old one, without `overwrite`.
        FileNotFoundError: if the checkpoint asked for does not exist.
    """
    last = last_checkpoint(Path(cfg.folder))
    if cfg.ckpt == "last":
        return last if last.exists() else None
    if cfg.ckpt is not None:
        if not Path(cfg.ckpt).is_file():
            raise FileNotFoundError(f"ckpt={cfg.ckpt}: no such checkpoint; ckpt=last continues the run in {cfg.folder}")
    resume = None if cfg.ckpt is None else Path(cfg.ckpt)
    if any(last.parent.glob("*.ckpt")) and not goes_on(cfg, resume) and not cfg.overwrite:
        raise FileExistsError(
            f"{cfg.folder} already holds a trained run; continue it with ckpt=last, keep it with another name=..., or "
            f"replace it with overwrite=true"
        )
    return resume


def fit(cfg: DictConfig) -> L.Trainer:
    """Runs the training that `cfg` describes (conf/fit.yaml), with up to `retries` restarts from its last checkpoint.

    Returns:
        the trainer; the trained module is its `model`.
    Raises:
        as `sole_user`, `checkpoint_to_resume`, `with_retries` and `train`.
    """
    end_with_launcher()
    with sole_user(Path(cfg.folder)):
        resume = checkpoint_to_resume(cfg)
        try:
            return with_retries(lambda *where: train(cfg, *where), resume, last_checkpoint(Path(cfg.folder)), cfg.retries)
        finally:
            finish_wandb()


def finish_wandb():
    """Ends the run of wandb, if there is one: the next training of this process is another."""
    wandb = sys.modules.get("wandb")
    if wandb and wandb.run:
        wandb.finish()


def goes_on(cfg: DictConfig, resume: Path | None) -> bool:
    """Returns whether a checkpoint to resume from is one of the run's own folder."""
    return resume is not None and resume.resolve().parent == last_checkpoint(Path(cfg.folder)).parent.resolve()


@rank_zero_only
def take_folder(cfg: DictConfig, resume: Path | None):
    """Makes the run's folder that of the training which begins now: its config, and no checkpoints of another run, which a
    restart with ckpt=last would take for its own. A training that goes on from an earlier checkpoint of its own begins with
    a copy of that as the last one."""
    keep_config(cfg)
    last = last_checkpoint(Path(cfg.folder))
    if not goes_on(cfg, resume):
        for path in [last, *(last.parent.glob("*.ckpt") if cfg.overwrite else ())]:
            path.unlink(missing_ok=True)
            remove_shards(path)
    elif resume.resolve() != last.resolve():
        copy_checkpoint(resume, last)


@rank_zero_only  # the other processes wait for rank 0 before they encode
def remove_encoded_clips(folder: Path):
    for path in folder.glob("encoded_clips*"):
        shutil.rmtree(path)


def train(cfg: DictConfig, resume: Path | None = None, lost: Sequence[BatchPosition] = ()) -> L.Trainer:
    """Runs a training once, without retries, see `fit`.

    Args:
        resume: checkpoint to resume from; None: start anew. lost: positions of batches to leave out.
    Raises:
        ValueError: if the config's parts do not fit together. LostLoss, DeadWorker: see `with_retries`.
    """
    L.seed_everything(cfg.seed, verbose=False)
    keep_freed_memory()
    codec = tokenizer_config(cfg)
    if cfg.stages:
        plan = plan_of(cfg)
        cfg.trainer.max_steps = plan.steps
        data = build_stages(cfg, plan, codec)
    else:
        data = build_data(cfg, codec)
    data.leave_out(lost)
    module = BUILDERS[cfg.module](cfg, data)
    if resume is not None:
        for change in check_resume(resume, module, data):
            rank_zero_info(f"  goes on with other settings than it began with (then, now): {change}")
    for note in start(plain(cfg.init), module, resumed=resume is not None):
        rank_zero_info(f"  {note}")
    check_cache(data, module)
    if cfg.module == "generator" and cfg.encoded_clips:
        if cfg.ckpt != "last" and not goes_on(cfg, resume):  # encode anew: the source files may have changed
            remove_encoded_clips(Path(cfg.folder))
        encode_ahead(cfg, data, module)
    trainer = build_trainer(cfg)
    if module.kind == "tokenizer" and isinstance(trainer.strategy, ShardedStrategy):
        check_sharded_tokenizer(module)
    adversarial = getattr(module, "discriminator", None) is not None
    if adversarial and trainer.world_size > 1 and not find_unused(trainer.strategy):
        raise ValueError(
            "adversarial training on several devices needs trainer.strategy=ddp_find_unused_parameters_true (with a + before "
            "it), or trainer.devices=1"
        )
    take_folder(cfg, resume)
    with fast_float32_products(), noticing_dead_workers():
        trainer.fit(module, datamodule=data, ckpt_path=resume, weights_only=True)
    return trainer
