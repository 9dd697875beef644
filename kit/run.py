"""A training run from a config, top to bottom: data, module, callbacks, loggers, trainer, fit."""

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
from kit.generator.module import GeneratorModule
from kit.generator.pretrained import find_encoder
from kit.machine import fast_float32_products, keep_freed_memory
from kit.retries import Place, noticing_dead_workers, with_retries
from kit.scales import latent_frames
from kit.sharding import ShardedStrategy, find_unused
from kit.stages import Stage, StagePlan
from kit.start import start
from kit.tokenizer import Tokenizer, TokenizerConfig
from kit.tokenizer.module import TokenizerModule
from kit.values import check_whole_number, equal_parts


def plain(node: DictConfig) -> dict:
    """Plain values of a config node, resolved; checkpoints hold nothing else."""
    return OmegaConf.to_container(node, resolve=True)


def build_data(cfg: DictConfig, tokenizer: TokenizerConfig | None = None) -> ClipDataModule:
    """
    Args:
        tokenizer: whose tokens `data.batch_tokens` counts; without one it is not looked at.
    Raises:
        ValueError: if so many tokens are less than a clip's, the tokenizer cannot take a bucket's clips, or a cache of
            pictures is asked for without its folder; else as `check_batch_parts`, and as `ClipDataModule`.
    """
    check_batch_parts(cfg)
    values = {k: v for k, v in plain(cfg.data).items() if k not in ("root", "batch_tokens")}
    images = values.pop("images", None)
    if images and images["root"] == "???":
        raise ValueError("data.images.root is missing: the folder of the cache that holds the pictures")
    if images and images["root"] is not None and (values["image_share"] or not cfg.get("stages")):
        values["images"] = images  # a stage without batches of images does without
    if values.get("buckets"):
        values["buckets"] = [bucket._asdict() for bucket in buckets_of(cfg, tokenizer)]
    if tokenizer is not None:
        values["batch_size"] = batch_size_of(cfg.data, tokenizer, values["frames"], values["height"], values["width"])
    return instantiate(values)


def check_batch_parts(cfg: DictConfig):
    """
    Raises:
        ValueError: if `fits` has a step go through the recipe's batch in parts, but the clips of a part are given otherwise.
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
    """Clips of that shape on each device and step, by the config's `data`. Raises: ValueError as `build_data`."""
    budget = data["batch_tokens"]
    if budget is None:
        return data["batch_size"]
    schedule = tokenizer.schedule(frames, height, width)
    if budget < schedule.length:
        raise ValueError(f"data.batch_tokens={budget}; a clip has {schedule.length}: {schedule}")
    return budget // schedule.length


def buckets_of(cfg: DictConfig, tokenizer: TokenizerConfig | None) -> list[Bucket]:
    """The shapes of `data.buckets` and their batches. Raises: ValueError as `build_data`."""
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
    """The config with a stage's own data.

    Raises:
        ValueError: if `data` has no such key.
    """
    try:
        return OmegaConf.merge(cfg, {"data": dict(stage.data)})
    except OmegaConfBaseException as error:
        raise ValueError(f"stages.{stage.name}.data: {str(error).splitlines()[0]}") from error


def plan_of(cfg: DictConfig) -> StagePlan:
    """The stages of a training that has some. Raises: ValueError as `StagePlan.of`, or if nothing moves on."""
    if not cfg.callbacks.get("stage_switch"):
        raise ValueError("stages need the callback that moves on: callbacks.stage_switch as in conf/progressive.yaml")
    return StagePlan.of(plain(cfg.stages))


def build_stages(cfg: DictConfig, plan: StagePlan, tokenizer: TokenizerConfig) -> StagedClips:
    """The data of all stages, so that what is wrong with a later one is told at once.

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
    """Batches on each device for one optimizer step; under manual optimization the module accumulates."""
    return cfg.optimizer.get("accumulate", cfg.trainer.accumulate_grad_batches)


def tokenizer_config(cfg: DictConfig) -> TokenizerConfig:
    """Of the tokenizer to train, or the one whose bits a generator is trained on.

    Raises:
        ValueError: as `TokenizerConfig.from_dict`, or if there is none to train on; else as `load_tokenizer`.
    """
    if cfg.module == "tokenizer":
        return TokenizerConfig.from_dict(plain(cfg.tokenizer))
    if cfg.tokenizer_ckpt is None:
        raise ValueError("tokenizer_ckpt=null: a generator is trained on a tokenizer's bits; give its checkpoint")
    return load_tokenizer(cfg.tokenizer_ckpt).model.config


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
    return tokenizer_module(cfg, data.clip)


def tokenizer_module(cfg: DictConfig, clip: dict) -> TokenizerModule:
    """A tokenizer's, for clips of one shape. Raises as `TokenizerModule`."""
    return TokenizerModule(
        plain(cfg.tokenizer), plain(cfg.loss), plain(cfg.optimizer), clip, cfg.trainer.max_steps, plain(cfg.scale_dropout),
        cfg.seed,
    )  # fmt: skip


def encoded_clips_of(cfg: DictConfig, *parts: str) -> Path:
    """The folder of a run's own cache of clips, of each stage and each bucket its own."""
    return Path(cfg.folder) / "_".join(("encoded_clips", *parts))


def choice_of(source: DictConfig) -> dict:
    """The plain values that choose the clips of a source, but for where its files lie: those are known by their list."""

    def chosen(values: dict) -> dict:  # of a mixture's sources too
        others = {"_partial_", "root", "patience", "verify"}
        if not values.get("late"):  # the same clips as before there was this key
            others.add("late")
        return {key: chosen(v) if isinstance(v, dict) else v for key, v in values.items() if key not in others}

    return chosen(plain(source))


def build_generator_module(cfg: DictConfig, data: ClipDataModule) -> GeneratorModule:
    tokenizer, condition = load_tokenizer(cfg.tokenizer_ckpt), condition_of(plain(cfg.condition), data)
    return generator_module(cfg, data.clip, condition, tokenizer.model, tokenizer.hash, str(tokenizer.path.resolve()))


def generator_values(cfg: DictConfig, tokenizer: TokenizerConfig, condition: dict) -> dict:
    """Values of a `GeneratorConfig`."""
    return {
        **plain(cfg.generator), "bits": tokenizer.bits, "scales": len(tokenizer.scales), "window": cfg.window,
        "history": cfg.history, "align": cfg.align, "condition": condition,
    }  # fmt: skip


def generator_module(
    cfg: DictConfig, clip: dict, condition: dict, tokenizer: Tokenizer, tokenizer_hash: str, tokenizer_path: str
) -> GeneratorModule:
    """A generator's, for clips of one shape.

    Args:
        condition: values of its `ConditionConfig`. The rest as for `GeneratorModule`.
    """
    return GeneratorModule(
        generator_values(cfg, tokenizer.config, condition), plain(cfg.correction), cfg.frame_mask, cfg.drop_condition,
        plain(cfg.loss), plain(cfg.optimizer), clip, cfg.trainer.max_steps, cfg.seed, tokenizer_hash=tokenizer_hash,
        tokenizer_path=tokenizer_path, tokenizer=tokenizer, recompute=cfg.recompute,
    )  # fmt: skip


def encode_ahead(cfg: DictConfig, data: ClipDataModule | StagedClips, module: GeneratorModule):
    """Training shall read encoded clips in place of those of the source: `encoded_clips`, or as many as it comes to.

    Raises:
        ValueError: if the number is below 1.
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
    """
    Raises:
        ValueError: if clips of a cache shall train a tokenizer, or are encoded by another than the generator's.
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
    """Values of `ConditionConfig`; `auto` takes classes where the data has nothing better to say."""
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
        place = find_encoder(str(Path(name).resolve()) if Path(name).is_dir() else name, condition["revision"])
        longest = place.longest
        if longest is not None and condition["length"] > longest:
            raise ValueError(
                f"condition.length={condition['length']}; the text encoder {place.name} reads {longest} tokens at most"
            )
        condition |= {"encoder": place.name, "revision": place.revision, "channels": place.channels}
    return {**condition, "kind": kind, "classes": list(data.classes) if kind == "class" else []}


BUILDERS = {"tokenizer": build_tokenizer_module, "generator": build_generator_module}


def check_length(trainer: DictConfig):
    """
    Raises:
        ValueError: if it has no number of steps, which learning rates and encoded clips go by, or takes few batches again and
            again without saying so.
    """
    check_whole_number("trainer.max_steps", trainer.max_steps, 1)
    if trainer.get("limit_train_batches") is not None:
        raise ValueError(
            f"trainer.limit_train_batches={trainer.limit_train_batches}: the data has no end, and the same batches would "
            f"come again and again; shorten a training by recipe.*.steps, or say that they shall: trainer.overfit_batches"
        )


def build_trainer(cfg: DictConfig) -> L.Trainer:
    """
    Raises:
        ValueError: as `check_length`.
    """
    check_length(cfg.trainer)
    loggers = [instantiate(c) for c in (cfg.get("logger") or {}).values()]
    logged = set() if loggers else {"learning_rate"}  # what there is nothing to do for without a logger
    callbacks = [instantiate(c) for name, c in cfg.callbacks.items() if c and name not in logged]
    return instantiate(cfg.trainer, callbacks=callbacks, logger=loggers, plugins=[TrainingCheckpointIO()])


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
    own = cfg.ckpt is not None and Path(cfg.ckpt).resolve().parent == last.resolve().parent
    if last.exists() and not own and not cfg.overwrite:
        raise FileExistsError(
            f"{cfg.folder} already holds a trained run; continue it with ckpt=last, keep it with another name=..., or "
            f"replace it with overwrite=true"
        )
    return None if cfg.ckpt is None else Path(cfg.ckpt)


def fit(cfg: DictConfig) -> L.Trainer:
    """Trains what `cfg` says (conf/fit.yaml), and goes on by itself as its `retries` say; returns the trainer, its model at
    `trainer.model`."""
    with sole_user(Path(cfg.folder)):
        resume = checkpoint_to_resume(cfg)
        if resume is None and cfg.ckpt != "last":  # the files behind the clips may have changed since
            remove_encoded_clips(Path(cfg.folder))
        last = Path(cfg.folder) / "checkpoints" / "last.ckpt"
        return with_retries(lambda *where: train(cfg, *where), resume, last, cfg.retries)


@contextmanager
def sole_user(folder: Path) -> Iterator[None]:
    """While the block runs nothing else that takes its folder so can enter it, but for further processes of this one.

    Raises:
        FileExistsError: if another has.
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


@rank_zero_only  # the other processes meet it before they encode
def remove_encoded_clips(folder: Path):
    for path in folder.glob("encoded_clips*"):
        shutil.rmtree(path)


def check_sharded_tokenizer(module: TokenizerModule):
    """
    Raises:
        ValueError: if it needs a weight whole that trainer=fsdp shares out, or would share out a single number.
    """
    for key, asked in (
        ("tokenizer.learned_amplitude", module.model.config.learned_amplitude),
        ("loss.adversarial.adaptive", module.discriminator is not None and module.loss["adversarial"]["adaptive"]),
    ):
        if asked:
            raise ValueError(f"trainer=fsdp cannot train with {key}=true; set it to false, or use trainer=default")


def train(cfg: DictConfig, resume: Path | None = None, lost: Sequence[Place] = ()) -> L.Trainer:
    """One training, see `fit`.

    Args:
        resume: checkpoint to go on from. lost: places of batches to leave out.
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
