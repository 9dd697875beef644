"""Builds and runs a training from a config: data, module, callbacks, loggers, trainer, fit."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import lightning as L
from filelock import FileLock, Timeout
from hydra.utils import instantiate
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only, rank_zero_warn
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from kit.checkpoint import TrainingCheckpointIO, check_resume, load_tokenizer
from kit.data.buckets import Bucket, read_shape
from kit.data.cache import CachedClips, describe, write_cache
from kit.data.datamodule import ClipDataModule
from kit.data.staged import StagedClips
from kit.fsdp import ShardedStrategy, find_unused
from kit.generator.module import GeneratorModule
from kit.generator.pretrained import find_encoder
from kit.machine import fast_float32_products, keep_freed_memory
from kit.retries import BatchPosition, noticing_dead_workers, with_retries
from kit.scales import latent_frames
from kit.stages import Stage, StagePlan
from kit.start import start
from kit.tokenizer import Tokenizer, TokenizerConfig
from kit.tokenizer.module import TokenizerModule
from kit.values import check_whole_number, equal_parts


def plain(node: DictConfig) -> dict:
    """Converts a config node to plain values, resolved; checkpoints hold nothing else."""
    return OmegaConf.to_container(node, resolve=True)


def build_data(cfg: DictConfig, tokenizer: TokenizerConfig | None = None) -> ClipDataModule:
    """Builds the DataModule that `data` describes.

    Args:
        tokenizer: gives the number of tokens of a clip, for `data.batch_tokens`; None: `data.batch_tokens` is ignored.
    Raises:
        ValueError: if `data.batch_tokens` is less than one clip, the tokenizer cannot take a bucket's clips, or
            `data.images` lacks the folder of its cache; else as `check_batch_parts` and `ClipDataModule`.
    """
    check_batch_parts(cfg)
    values = {k: v for k, v in plain(cfg.data).items() if k not in ("root", "batch_tokens")}
    images = values.pop("images", None)
    if images and images["root"] == "???":
        raise ValueError("data.images.root is missing: the folder of the cache that holds the pictures")
    if images and images["root"] is not None and (values["image_share"] or not cfg.get("stages")):
        values["images"] = images  # a stage that has no batches of images ignores them
    if values.get("buckets"):
        values["buckets"] = [bucket._asdict() for bucket in buckets_of(cfg, tokenizer)]
    if tokenizer is not None:
        values["batch_size"] = batch_size_of(cfg.data, tokenizer, values["frames"], values["height"], values["width"])
    return instantiate(values)


def check_batch_parts(cfg: DictConfig):
    """Checks that the batches of a step add up to the recipe's, if `fits` splits that into parts.

    Raises:
        ValueError: if the number of clips in a part, or of parts in a step, was set to another value.
    """
    if not (recipe := cfg.get("recipe")):
        return
    key, recipe = f"recipe.{cfg.module}", recipe[cfg.module]
    parts = equal_parts(recipe.batch_size, recipe.at_once)
    given = "batch_tokens" if cfg.data.get("batch_tokens") else "batch_size"
    if parts > 1 and accumulate_of(cfg) != parts * recipe.accumulate:
        raise ValueError(
            f"{accumulate_of(cfg)} batches are accumulated, but {key}.at_once={recipe.at_once} (fits=) splits "
            f"{key}.batch_size={recipe.batch_size} into {parts}: give {key}.accumulate, which counts whole ones"
        )
    if parts > 1 and (given == "batch_tokens" or cfg.data.batch_size != recipe.batch_size // parts):
        raise ValueError(
            f"data.{given}={cfg.data[given]}, but {key}.at_once={recipe.at_once} (fits=) splits {key}.batch_size="
            f"{recipe.batch_size} into {parts}, and a step would have {parts} times as many clips: give {key}.batch_size, or "
            f"{key}.at_once=null and {key}.accumulate"
        )


def batch_size_of(data: Mapping, tokenizer: TokenizerConfig, frames: int, height: int, width: int) -> int:
    """Returns the number of clips of a shape in a batch on one device.

    Args:
        data: the config's `data`, with `batch_size` and `batch_tokens`.
    Raises:
        ValueError: if `batch_tokens` is less than one clip; else as `TokenizerConfig.schedule`.
    """
    budget = data["batch_tokens"]
    if budget is None:
        return data["batch_size"]
    schedule = tokenizer.schedule(frames, height, width)
    if budget < schedule.length:
        raise ValueError(f"data.batch_tokens={budget}; a clip has {schedule.length}: {schedule}")
    return budget // schedule.length


def buckets_of(cfg: DictConfig, tokenizer: TokenizerConfig | None) -> list[Bucket]:
    """Reads the shapes in `data.buckets` and works out their batch sizes. Raises ValueError as `build_data`."""
    buckets = []
    for text in cfg.data.get("buckets") or []:
        shape, batch_size = read_shape(text), cfg.data.batch_size
        try:
            latent_frames(shape[0])
            if tokenizer is not None:
                tokenizer.schedule(*shape)
                batch_size = batch_size_of(cfg.data, tokenizer, *shape)
        except ValueError as error:
            raise ValueError(f"data.buckets, {text}: {error}") from error
        buckets.append(Bucket(*shape, batch_size))
    return buckets


def of_stage(cfg: DictConfig, stage: Stage) -> DictConfig:
    """Returns the config with the values that a stage sets in `data`.

    Raises:
        ValueError: if the stage sets a key that `data` does not have.
    """
    try:
        return OmegaConf.merge(cfg, {"data": dict(stage.data)})
    except OmegaConfBaseException as error:
        raise ValueError(f"stages.{stage.name}.data: {str(error).splitlines()[0]}") from error


def plan_of(cfg: DictConfig) -> StagePlan:
    """Reads the stages of a training that has them.

    Raises:
        ValueError: if the callback that switches stages is missing; else as `StagePlan.of`.
    """
    if not cfg.callbacks.get("stage_switch"):
        raise ValueError("stages need the callback that moves on: callbacks.stage_switch as in conf/progressive.yaml")
    return StagePlan.of(plain(cfg.stages))


def build_stages(cfg: DictConfig, plan: StagePlan, tokenizer: TokenizerConfig) -> StagedClips:
    """Builds the data of all stages at once, so that errors in a later one are found at the start.

    Raises:
        ValueError: if the tokenizer cannot take a stage's clips, or a generator's stages have different classes.
    """
    parts = [build_data(of_stage(cfg, stage), tokenizer) for stage in plan.stages]
    for part in parts:
        tokenizer.schedule(part.frames, part.height, part.width)
    classes = {part.classes for part in parts}
    if len(classes) > 1 and cfg.module == "generator":
        raise ValueError(f"the stages' data have other classes: {'; '.join(', '.join(c) or 'none' for c in classes)}")
    return StagedClips(plan, parts, [stage.steps * accumulate_of(cfg) for stage in plan.stages])


def accumulate_of(cfg: DictConfig) -> int:
    """Returns the number of batches on each device per optimizer step; under manual optimization the module accumulates
    them."""
    return cfg.optimizer.get("accumulate", cfg.trainer.accumulate_grad_batches)


def tokenizer_config(cfg: DictConfig) -> TokenizerConfig:
    """Returns the config of the tokenizer to train, or of the one whose bits the generator is trained on.

    Raises:
        ValueError: if a generator is to be trained and `tokenizer_ckpt` is null; else as `TokenizerConfig.from_dict` or
            `load_tokenizer`.
    """
    if cfg.module == "tokenizer":
        return TokenizerConfig.from_dict(plain(cfg.tokenizer))
    if cfg.tokenizer_ckpt is None:
        raise ValueError("tokenizer_ckpt=null: a generator is trained on a tokenizer's bits; give its checkpoint")
    return load_tokenizer(cfg.tokenizer_ckpt).model.config


def build_tokenizer_module(cfg: DictConfig, data: ClipDataModule) -> TokenizerModule:
    """Builds the module that trains a tokenizer on the clips of `data`.

    Raises:
        ValueError: if the trainer is set to accumulate or clip gradients, which the module does itself, or to float16, or the
            data has batches of images; else as `TokenizerModule`.
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
    return tokenizer_module(cfg, data.clip)


def tokenizer_module(cfg: DictConfig, clip: dict) -> TokenizerModule:
    """Builds the module that trains a tokenizer on clips of one shape.

    Args:
        clip: `frames`, `height`, `width`, `fps`.
    Raises:
        as `TokenizerModule`.
    """
    return TokenizerModule(
        plain(cfg.tokenizer), plain(cfg.loss), plain(cfg.optimizer), clip, cfg.trainer.max_steps, plain(cfg.scale_dropout),
        cfg.seed,
    )  # fmt: skip


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


def build_generator_module(cfg: DictConfig, data: ClipDataModule) -> GeneratorModule:
    tokenizer, condition = load_tokenizer(cfg.tokenizer_ckpt), condition_of(plain(cfg.condition), data)
    return generator_module(cfg, data.clip, condition, tokenizer.model, tokenizer.hash, str(tokenizer.path.resolve()))


def generator_values(cfg: DictConfig, tokenizer: TokenizerConfig, condition: dict) -> dict:
    """Collects the values of a `GeneratorConfig` from a training's config.

    Args:
        tokenizer: config of the tokenizer whose bits it is trained on. condition: values of its `ConditionConfig`.
    """
    return {
        **plain(cfg.generator), "bits": tokenizer.bits, "scales": len(tokenizer.scales), "window": cfg.window,
        "history": cfg.history, "align": cfg.align, "condition": condition,
    }  # fmt: skip


def generator_module(
    cfg: DictConfig, clip: dict, condition: dict, tokenizer: Tokenizer, tokenizer_hash: str, tokenizer_path: str
) -> GeneratorModule:
    """Builds the module that trains a generator on clips of one shape.

    Args:
        condition: values of its `ConditionConfig`. clip, tokenizer, tokenizer_hash, tokenizer_path: see `GeneratorModule`.
    """
    return GeneratorModule(
        generator_values(cfg, tokenizer.config, condition), plain(cfg.correction), cfg.frame_mask, cfg.drop_condition,
        plain(cfg.loss), plain(cfg.optimizer), clip, cfg.trainer.max_steps, cfg.seed, tokenizer_hash=tokenizer_hash,
        tokenizer_path=tokenizer_path, tokenizer=tokenizer, recompute=cfg.recompute,
    )  # fmt: skip


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
        given = of_stage(cfg, stage).data if stage else cfg.data

        def encode(source, bucket, share, needed, images, part=part, stage=stage, given=given):
            of = [stage.name] if stage else []
            folder = encoded_clips_of(cfg, *of, *["images"] * images, *[str(bucket)] * part.bucketed)
            how = choice_of(given.images if images else given.source)
            sources, clips = {"train": source}, {"train": max(1, min(math.ceil(cfg.encoded_clips * share), needed))}
            clip = {**part.clip, "frames": bucket.frames, "height": bucket.height, "width": bucket.width}
            about = describe(clip, module.tokenizer, module.hparams.tokenizer_hash, how, sources)
            write_cache(folder, about, sources, clips, module.tokenizer, part.workers)
            return CachedClips(folder)

        steps = stage.steps if stage else cfg.trainer.max_steps
        part.encode_ahead(encode, steps * accumulate_of(cfg))


def check_cache(data: ClipDataModule | StagedClips, module: L.LightningModule):
    """Checks that clips from a cache suit the module.

    Raises:
        ValueError: if the module trains a tokenizer, which needs videos, or if the clips were encoded by another tokenizer
            than the generator's.
    """
    for part in data.parts if isinstance(data, StagedClips) else [data]:
        if part.cached and module.kind == "tokenizer":
            raise ValueError(f"{part.val.root} holds encoded clips, which a generator trains on; a tokenizer needs videos")
        for clips in (part.val, part.images):
            if isinstance(clips, CachedClips) and clips.tokenizer != module.hparams.tokenizer_hash:
                raise ValueError(
                    f"the clips in {clips.root} are encoded by the tokenizer {clips.tokenizer}, the generator is to learn "
                    f"those of {module.hparams.tokenizer_hash} ({module.hparams.tokenizer_path}); give tokenizer_ckpt=, or "
                    f"make another cache"
                )


def condition_of(condition: dict, data: ClipDataModule) -> dict:
    """Returns the values of a `ConditionConfig` for this data. Warns if the data has neither captions nor classes.

    Args:
        condition: values of the config's `condition`. Its kind `auto` becomes `class` if the data has classes and no
            captions, else `text`. A pretrained text encoder is looked up.
    Raises:
        ValueError: if `length` exceeds what the text encoder reads; else as `find_encoder`.
    """
    kind = condition["kind"]
    if not data.classes and not data.captioned:
        rank_zero_warn(
            "the clips have neither captions nor classes: the generator learns without words. Captions go into captions.csv "
            "(file,caption) in the folder or a .txt beside each file; classes are folders, or names such as jump_001.mp4"
        )
    if kind == "auto":
        kind = "class" if data.classes and not data.captioned else "text"
    if kind == "text" and condition["encoder"] is not None:
        name = condition["encoder"]
        encoder = find_encoder(str(Path(name).resolve()) if Path(name).is_dir() else name, condition["revision"])
        longest = encoder.longest
        if longest is not None and condition["length"] > longest:
            raise ValueError(
                f"condition.length={condition['length']}; the text encoder {encoder.name} reads {longest} tokens at most"
            )
        condition |= {"encoder": encoder.name, "revision": encoder.revision, "channels": encoder.channels}
    return {**condition, "kind": kind, "classes": list(data.classes) if kind == "class" else []}


BUILDERS = {"tokenizer": build_tokenizer_module, "generator": build_generator_module}


def check_length(trainer: DictConfig):
    """Checks that the trainer has a number of steps and uses the whole data.

    Raises:
        ValueError: if `max_steps` is not a whole number of 1 or more, which the learning rate and the number of encoded clips
            depend on, or if `limit_train_batches` is set, which would repeat the same batches.
    """
    check_whole_number("trainer.max_steps", trainer.max_steps, 1)
    if trainer.get("limit_train_batches") is not None:
        raise ValueError(
            f"trainer.limit_train_batches={trainer.limit_train_batches}: the data has no end, and the same batches would "
            f"come again and again; shorten a training by recipe.*.steps, or say that they shall: trainer.overfit_batches"
        )


def build_trainer(cfg: DictConfig) -> L.Trainer:
    """Builds the Lightning trainer with its loggers and callbacks. Raises ValueError as `check_length`."""
    check_length(cfg.trainer)
    loggers = [instantiate(c) for c in (cfg.get("logger") or {}).values()]
    logged = set() if loggers else {"learning_rate"}  # callbacks that fail without a logger
    callbacks = [instantiate(c) for name, c in cfg.callbacks.items() if c and name not in logged]
    return instantiate(cfg.trainer, callbacks=callbacks, logger=loggers, plugins=[TrainingCheckpointIO()])


def checkpoint_to_resume(cfg: DictConfig) -> Path | None:
    """Returns the checkpoint to resume from, see `ckpt` in conf/fit.yaml; None: start anew.

    Raises:
        FileExistsError: if a new run would take the folder of an old one, without `overwrite`.
        FileNotFoundError: if the checkpoint asked for does not exist.
    """
    last = Path(cfg.folder) / "checkpoints" / "last.ckpt"
    if cfg.ckpt == "last":
        return last if last.exists() else None
    if cfg.ckpt is not None:
        if not Path(cfg.ckpt).is_file():
            raise FileNotFoundError(f"ckpt={cfg.ckpt}: no such checkpoint; ckpt=last continues the run in {cfg.folder}")
    own = cfg.ckpt is not None and Path(cfg.ckpt).resolve().parent == last.resolve().parent
    if last.exists() and not own and not cfg.overwrite:
        raise FileExistsError(
            f"{cfg.folder} already holds a trained run; continue it with ckpt=last, keep it with another name=..., or "
            f"replace it with overwrite=true"
        )
    return None if cfg.ckpt is None else Path(cfg.ckpt)


def fit(cfg: DictConfig) -> L.Trainer:
    """Runs the training that `cfg` describes (conf/fit.yaml), with up to `retries` restarts from its last checkpoint.

    Returns:
        the trainer; the trained module is its `model`.
    Raises:
        as `sole_user`, `checkpoint_to_resume`, `with_retries` and `train`.
    """
    with sole_user(Path(cfg.folder)):
        resume = checkpoint_to_resume(cfg)
        if resume is None and cfg.ckpt != "last":  # encode anew: the source files may have changed
            remove_encoded_clips(Path(cfg.folder))
        last = Path(cfg.folder) / "checkpoints" / "last.ckpt"
        return with_retries(lambda *where: train(cfg, *where), resume, last, cfg.retries)


@contextmanager
def sole_user(folder: Path) -> Iterator[None]:
    """Locks a run's folder while the block runs; warns if the file system has no locks.

    Only rank 0 takes the lock, so further ranks of the same command may enter.

    Raises:
        FileExistsError: if another command holds the lock.
    """
    path = folder / ".lock"
    with ExitStack() as stack:
        if rank_zero_only.rank == 0 and os.environ.get("NODE_RANK", "0") == "0":
            folder.mkdir(parents=True, exist_ok=True)
            try:
                stack.enter_context(FileLock(path, timeout=0))
                stack.callback(path.unlink, missing_ok=True)
            except Timeout as error:
                raise FileExistsError(
                    f"another process is at work in {folder}; wait for it, or give another name="
                ) from error
            except (NotImplementedError, OSError) as error:
                rank_zero_warn(f"{folder} cannot be locked ({error}): see to it yourself that one process alone is there")
        yield


@rank_zero_only  # the other processes wait for rank 0 before they encode
def remove_encoded_clips(folder: Path):
    for path in folder.glob("encoded_clips*"):
        shutil.rmtree(path)


def check_sharded_tokenizer(module: TokenizerModule):
    """Checks that a tokenizer can be trained with sharded weights (trainer=fsdp).

    Raises:
        ValueError: if it learns its amplitude, a single number that cannot be sharded, or has the adaptive adversarial
            weight, which needs an unsharded weight of the decoder.
    """
    for key, asked in (
        ("tokenizer.learned_amplitude", module.model.config.learned_amplitude),
        ("loss.adversarial.adaptive", module.discriminator is not None and module.loss["adversarial"]["adaptive"]),
    ):
        if asked:
            raise ValueError(f"trainer=fsdp cannot train with {key}=true; set it to false, or use trainer=default")


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
    with fast_float32_products(), noticing_dead_workers():
        trainer.fit(module, datamodule=data, ckpt_path=resume, weights_only=True)
    return trainer
