"""A training run from a config: its folder, the checkpoint it resumes from, the clips it encodes, and the fit."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import lightning as L
from lightning.pytorch.callbacks import LambdaCallback
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only
from omegaconf import DictConfig

from kit.build import (
    BUILDERS,
    build_data,
    build_stages,
    build_trainer,
    plan_of,
    prepare_trainer_of_tokenizer,
    tokenizer_config,
)
from kit.confs import keep_config
from kit.encode_ahead import check_cache, encode_ahead, remove_encoded_clips
from kit.files import last_checkpoint, sole_user, tail_hash
from kit.machine import device, fast_float32_products, keep_freed_memory
from kit.ranks import agree
from kit.retries import BatchPosition, noticing_dead_workers, with_retries
from kit.sharded_checkpoint import remove_shards
from kit.signals import end_with_launcher
from kit.start import start
from kit.training_checkpoint import check_resume, copy_checkpoint
from kit.values import plain


def checkpoint_to_resume(cfg: DictConfig) -> Path | None:
    """Returns the checkpoint to resume from, see `ckpt` in conf/fit.yaml; None: start anew.

    Raises:
        FileExistsError: if a new run would take the folder of an old one, without `overwrite`.
        FileNotFoundError: if the checkpoint asked for does not exist.
    """
    last = last_checkpoint(Path(cfg.folder))
    if cfg.ckpt == "last":
        return last if last.exists() else None
    resume = None if cfg.ckpt is None else Path(cfg.ckpt)
    if resume is not None and not resume.is_file():
        raise FileNotFoundError(f"ckpt={cfg.ckpt}: no such checkpoint; ckpt=last continues the run in {cfg.folder}")
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
    with sole_user(Path(cfg.folder)), ending_wandb():
        resume = checkpoint_to_resume(cfg)
        return with_retries(lambda *where: train(cfg, *where), resume, last_checkpoint(Path(cfg.folder)), cfg.retries)


@contextmanager
def ending_wandb() -> Iterator[None]:
    """Ends the run of wandb after the block, if there is one: the next training of this process is another.

    W&B shows it as failed if the block ends by an error, or because it was asked to.
    """
    code = 1
    try:
        yield
        code = 0
    finally:
        wandb = sys.modules.get("wandb")
        if wandb and wandb.run:
            wandb.finish(exit_code=code)


def goes_on(cfg: DictConfig, resume: Path | None) -> bool:
    """Returns whether a checkpoint to resume from is one of the run's own folder."""
    return resume is not None and resume.resolve().parent == last_checkpoint(Path(cfg.folder)).parent.resolve()


@rank_zero_only
def take_folder(cfg: DictConfig, resume: Path | None):
    """Makes the run's folder that of the training which begins now.

    It keeps the config, and removes checkpoints of another run, which a restart with ckpt=last would take for its own, and
    the clips that it has encoded. If the training resumes from an earlier checkpoint of its own, that becomes the last one.
    """
    keep_config(cfg)
    last = last_checkpoint(Path(cfg.folder))
    if not goes_on(cfg, resume):
        for path in [last, *(last.parent.glob("*.ckpt") if cfg.overwrite else ())]:
            path.unlink(missing_ok=True)
            remove_shards(path)
        if cfg.ckpt != "last" and cfg.get("encoded_clips"):  # encode anew: the source files may have changed
            remove_encoded_clips(Path(cfg.folder))
    elif resume.resolve() != last.resolve():
        copy_checkpoint(resume, last)


def beginning(cfg: DictConfig, resume: Path | None, data: L.LightningDataModule) -> L.Callback:
    """Returns the callback that takes the run's folder, once all processes resume from the same checkpoint, and lets the
    training begin if they have the same clips: else they would train apart, or wait for each other forever.

    Args:
        resume: the checkpoint to resume from; None: none. data: of the training.
    Raises:
        ValueError: in its hooks, on all processes, if they differ.
    """

    def on_setup(*_, **__):
        found = {"bytes": resume.stat().st_size, "end": tail_hash(resume)} if resume else {}
        agree("another checkpoint to resume from", found, "all machines must share the folder of runs, root=")
        take_folder(cfg, resume)

    def on_train_start(*_):
        clips = {str(n): part.settings for n, part in enumerate(data.parts)}
        agree("other clips", clips, "all machines must find the same files in data.root")

    return LambdaCallback(setup=on_setup, on_train_start=on_train_start)


def train(cfg: DictConfig, resume: Path | None = None, lost: Sequence[BatchPosition] = ()) -> L.Trainer:
    """Runs a training once, without retries, see `fit`.

    Args:
        resume: checkpoint to resume from; None: start anew. lost: positions of batches to leave out.
    Raises:
        ValueError: if the config's parts do not fit together. LostLoss, DeadWorker: see `with_retries`.
    """
    L.seed_everything(cfg.seed, verbose=False)
    if device().type == "cpu":
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
            rank_zero_info(f"  resumes with other settings than it began with (then, now): {change}")
    for note in start(plain(cfg.init), module, resumed=resume is not None):
        rank_zero_info(f"  {note}")
    check_cache(data, module)
    if cfg.module == "generator" and cfg.encoded_clips:
        encode_ahead(cfg, data, module)
    # once data and callbacks have refused what they refuse, and before a checkpoint is loaded
    trainer = build_trainer(cfg, beginning(cfg, resume, data))
    if module.kind == "tokenizer":
        prepare_trainer_of_tokenizer(trainer, module)
    with fast_float32_products(), noticing_dead_workers():
        trainer.fit(module, datamodule=data, ckpt_path=resume, weights_only=True)
    return trainer
