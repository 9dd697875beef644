"""A training run from a config, top to bottom: data, module, callbacks, loggers, trainer, fit."""

from __future__ import annotations

from pathlib import Path

import lightning as L
from hydra.utils import instantiate
from lightning.pytorch.utilities import rank_zero_info
from omegaconf import DictConfig, OmegaConf

from kit.checkpoint import AtomicCheckpointIO, check_resume, load_tokenizer
from kit.data.datamodule import ClipDataModule
from kit.data.features import encode_clips
from kit.generator.module import GeneratorModule
from kit.generator.pretrained import find_encoder
from kit.machine import fast_float32_products, keep_freed_memory
from kit.start import start
from kit.tokenizer.module import TokenizerModule


def plain(node: DictConfig) -> dict:
    """Plain values of a config node, resolved; checkpoints hold nothing else."""
    return OmegaConf.to_container(node, resolve=True)


def build_data(cfg: DictConfig) -> ClipDataModule:
    return instantiate({k: v for k, v in plain(cfg.data).items() if k != "root"})


def build_tokenizer_module(cfg: DictConfig, data: ClipDataModule) -> TokenizerModule:
    """
    Raises:
        ValueError: if Lightning is told to do what the module does itself.
    """
    if cfg.trainer.accumulate_grad_batches != 1 or cfg.trainer.gradient_clip_val is not None:
        raise ValueError("the tokenizer accumulates and clips by itself: use optimizer.accumulate= and optimizer.clip=")
    if str(cfg.trainer.precision).startswith("16"):
        raise ValueError(f"trainer.precision={cfg.trainer.precision}: the tokenizer trains in bf16-mixed or 32-true")
    if data.image_share:
        raise ValueError(
            "data.image_share is for generators; conf=stage0_image_tokenizer trains a tokenizer on images, and init=inflate "
            "goes on from it with video"
        )
    return TokenizerModule(
        plain(cfg.tokenizer), plain(cfg.loss), plain(cfg.optimizer), data.clip, cfg.trainer.max_steps,
        plain(cfg.scale_dropout), cfg.seed,
    )  # fmt: skip


def encoded_clips_of(cfg: DictConfig) -> Path:
    """Where a run keeps its encoded clips."""
    return Path(cfg.folder) / "encoded_clips.pt"


def build_generator_module(cfg: DictConfig, data: ClipDataModule) -> GeneratorModule:
    tokenizer = load_tokenizer(cfg.tokenizer_ckpt)
    values = tokenizer.model.config
    generator = {
        **plain(cfg.generator), "bits": values.bits, "scales": len(values.scales), "window": cfg.window,
        "history": cfg.history, "align": cfg.align, "condition": condition_of(plain(cfg.condition), data),
    }  # fmt: skip
    return GeneratorModule(
        generator, plain(cfg.correction), cfg.frame_mask, cfg.drop_condition, plain(cfg.loss), plain(cfg.optimizer),
        data.clip, cfg.trainer.max_steps, cfg.seed,
        tokenizer_hash=tokenizer.hash, tokenizer_path=str(tokenizer.path.resolve()), tokenizer=tokenizer.model,
    )  # fmt: skip


def encode_ahead(cfg: DictConfig, data: ClipDataModule, module: GeneratorModule):
    """Puts encoded clips in the place of those of the training."""
    about = {**data.clip, "source": {k: v for k, v in plain(cfg.data.source).items() if k != "_partial_"}}
    about["tokenizer"] = module.hparams.tokenizer_hash
    data.train = encode_clips(data.train, module.tokenizer, cfg.encoded_clips, data.workers, encoded_clips_of(cfg), about)


def condition_of(condition: dict, data: ClipDataModule) -> dict:
    """Values of `ConditionConfig`; `auto` takes classes where the data has nothing better to say."""
    kind = condition["kind"]
    if kind == "auto":
        kind = "class" if data.classes and not data.captioned else "text"
    if kind == "text" and condition["encoder"] is not None:
        name = condition["encoder"]
        place = find_encoder(str(Path(name).resolve()) if Path(name).is_dir() else name, condition["revision"])
        condition |= {"encoder": place.name, "revision": place.revision, "channels": place.channels}
    return {**condition, "kind": kind, "classes": list(data.classes) if kind == "class" else []}


BUILDERS = {"tokenizer": build_tokenizer_module, "generator": build_generator_module}


def build_trainer(cfg: DictConfig) -> L.Trainer:
    callbacks = [instantiate(c) for c in cfg.callbacks.values() if c]
    loggers = [instantiate(c) for c in cfg.logger.values()] if cfg.logger else False
    return instantiate(cfg.trainer, callbacks=callbacks, logger=loggers, plugins=[AtomicCheckpointIO()])


def checkpoint_to_resume(cfg: DictConfig) -> Path | None:
    """Where to go on from, see `ckpt` in conf/fit.yaml.

    Raises:
        FileExistsError: if a new run would take the folder of an old one.
        FileNotFoundError: if the checkpoint asked for does not exist.
    """
    last = Path(cfg.folder) / "checkpoints" / "last.ckpt"
    if cfg.ckpt == "last":
        return last if last.exists() else None
    if cfg.ckpt is not None:
        if not Path(cfg.ckpt).is_file():
            raise FileNotFoundError(f"ckpt={cfg.ckpt}: no such checkpoint; ckpt=last continues the run in {cfg.folder}")
        return Path(cfg.ckpt)
    if last.exists() and not cfg.overwrite:
        raise FileExistsError(
            f"{cfg.folder} already holds a trained run; continue it with ckpt=last, keep it with another name=..., or "
            f"replace it with overwrite=true"
        )
    return None


def fit(cfg: DictConfig) -> L.Trainer:
    """Trains what `cfg` says (conf/fit.yaml); returns the trainer, its model at `trainer.model`."""
    resume = checkpoint_to_resume(cfg)
    L.seed_everything(cfg.seed, verbose=False)
    keep_freed_memory()
    if resume is None:  # the files behind the clips may have changed since
        encoded_clips_of(cfg).unlink(missing_ok=True)
    data = build_data(cfg)
    module = BUILDERS[cfg.module](cfg, data)
    if resume is not None:
        check_resume(resume, module.kind, module.model, dict(module.hparams.loss))
    for note in start(plain(cfg.init), module, resumed=resume is not None):
        rank_zero_info(f"  {note}")
    if cfg.module == "generator" and cfg.encoded_clips:
        encode_ahead(cfg, data, module)
    trainer = build_trainer(cfg)
    if trainer.world_size > 1 and getattr(module, "discriminator", None) is not None and cfg.trainer.get("strategy") is None:
        raise ValueError(
            "adversarial training on several devices needs trainer.strategy=ddp_find_unused_parameters_true (with a + before "
            "it), or trainer.devices=1"
        )
    with fast_float32_products():
        trainer.fit(module, datamodule=data, ckpt_path=resume, weights_only=True)
    return trainer
