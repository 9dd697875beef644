"""The parts of a training, built from its config: data, modules, callbacks, loggers and trainer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import lightning as L
from hydra.utils import instantiate
from lightning.fabric.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from lightning.pytorch.utilities import rank_zero_warn
from omegaconf import DictConfig, OmegaConf, open_dict

from kit.checkpoint import load_tokenizer, read_tokenizer_config
from kit.data.buckets import Bucket, read_shape
from kit.data.datamodule import ClipDataModule
from kit.data.shared import read_once
from kit.data.staged import StagedClips
from kit.fsdp import ShardedStrategy, allow_unused
from kit.generator.module import GeneratorModule
from kit.generator.pretrained import find_encoder
from kit.loop import accumulated
from kit.perceptual import Perceptual
from kit.scales import latent_frames
from kit.stages import Stage, StagePlan
from kit.tokenizer import Tokenizer, TokenizerConfig
from kit.tokenizer.module import TokenizerModule
from kit.training_checkpoint import TrainingCheckpointIO
from kit.values import SIZES, check_choice, check_number, check_whole_number, equal_parts, plain


def build_data(cfg: DictConfig, tokenizer: TokenizerConfig | None = None) -> ClipDataModule:
    """Builds the DataModule that `data` describes.

    Args:
        tokenizer: gives the number of tokens of a clip, for `data.batch_tokens`; None: `data.batch_tokens` is ignored.
    Raises:
        ValueError: if sizes or fps are no numbers, `data.batch_tokens` is less than one clip, the tokenizer cannot take a
            bucket's clips, `data.source` or the folder of `data.images`' cache is missing, or a source of a mixture is not
            partial; else as `check_batch_parts` and `ClipDataModule`.
    """
    check_batch_parts(cfg)
    values = {k: v for k, v in plain(cfg.data).items() if k not in ("root", "batch_tokens")}
    for key in SIZES:  # these and fps may come from a checkpoint or cache, in which `_target_` could stand
        check_whole_number(f"data.{key}", values[key], 1)
    if values["fps"] is not None:
        check_number("data.fps", values["fps"], 0)
    source = values.get("source") or {}
    if source == "???":
        raise ValueError("data.source is missing: what builds the clips, _target_ and _partial_: true, as in conf/data")
    mixed = source.get("sources") or {} if source.get("_target_") == "kit.data.mixture.Mixture" else {}
    if whole := [name for name, part in mixed.items() if not (part or {}).get("_partial_")]:
        raise ValueError(f"data.source.sources.{whole[0]} would be of one split; add _partial_: true to its values")
    images = values.pop("images", None)
    root = (images or {}).get("root", "")  # a source of the user's own may have none; null: no pictures
    if root == "???":
        raise ValueError("data.images.root is missing: the folder of the cache that holds the pictures")
    if images and root is None and not images["_target_"].startswith("kit."):
        own = "write it to images/mine.yaml beside your conf, and choose it there with `override images@data.images: mine`"
        raise ValueError(f"data.images._target_={images['_target_']} stands among the values of images=folder; {own}")
    if images and root is not None and (values["image_share"] or not cfg.get("stages")):
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
    """Returns the config with the values that a stage sets in `data`. Raises ValueError as `set_values`."""
    cfg = cfg.copy()
    set_values(cfg.data, stage.data, f"stages.{stage.name}.data")
    return cfg


def set_values(node: DictConfig, values: Mapping, at: str, named_freely: bool = False):
    """Sets values in a config, nested ones one by one; a source of another class takes the place of the one that was there.

    Args:
        at: name of the values in messages. named_freely: whether keys may be new.
    Raises:
        ValueError: for a new key, except within `sources` and `weights` of a mixture.
    """
    for key, value in values.items():
        if not (named_freely or key in node.keys()):
            raise ValueError(f"{at} has no {key}; its keys are {', '.join(map(str, node))}")
        now = node.get(key) if isinstance(value, Mapping) else None
        if isinstance(now, DictConfig) and value.get("_target_", now.get("_target_")) == now.get("_target_"):
            set_values(now, value, f"{at}.{key}", named_freely or key in ("sources", "weights"))
        else:
            with open_dict(node):
                node[key] = value


def stages_in(cfg: DictConfig) -> StagePlan:
    """Reads the stages in a config, which `stage_steps` may shorten.

    What a stage sets in `data` keeps its interpolations for the data that it is set in: `${data.fps}` is then the stage's.

    Raises:
        as `StagePlan.of` and `StagePlan.shortened`.
    """
    values = plain(cfg.stages)
    for name, stage in values.items():
        if isinstance(stage, dict) and isinstance(stage.get("data"), dict):
            stage["data"] = OmegaConf.to_container(cfg.stages[name].data)
    return StagePlan.of(values).shortened(cfg.get("stage_steps"))


def plan_of(cfg: DictConfig) -> StagePlan:
    """Reads the stages of a training that has them.

    Raises:
        ValueError: if the callback that switches stages is missing; else as `stages_in` and `of_stage`.
    """
    if not cfg.callbacks.get("stage_switch"):
        raise ValueError("stages need the callback that moves on: callbacks.stage_switch as in conf/progressive.yaml")
    plan = stages_in(cfg)
    for stage in plan.stages:
        of_stage(cfg, stage)
    return plan


def build_stages(cfg: DictConfig, plan: StagePlan, tokenizer: TokenizerConfig) -> StagedClips:
    """Builds the data of all stages at once, so that errors in a later one are found at the start.

    Raises:
        ValueError: if the tokenizer cannot take a stage's clips.
    """
    with read_once():
        parts = [build_data(of_stage(cfg, stage), tokenizer) for stage in plan.stages]
    for part in parts:
        tokenizer.schedule(part.frames, part.height, part.width)
    return StagedClips(plan, parts, [stage.steps * accumulate_of(cfg) for stage in plan.stages])


def accumulate_of(cfg: DictConfig) -> int:
    """Returns the number of batches on each device per optimizer step."""
    return accumulated(cfg.optimizer, cfg.trainer)


def tokenizer_config(cfg: DictConfig) -> TokenizerConfig:
    """Returns the config of the tokenizer to train, or of the one whose bits the generator is trained on.

    Raises:
        ValueError: if a generator is to be trained and `tokenizer_ckpt` is null; else as `TokenizerConfig.from_dict` or
            `read_tokenizer_config`.
    """
    if cfg.module == "tokenizer":
        return TokenizerConfig.from_dict(plain(cfg.tokenizer))
    if cfg.tokenizer_ckpt is None:
        raise ValueError("tokenizer_ckpt=null: a generator is trained on a tokenizer's bits; give its checkpoint")
    return read_tokenizer_config(cfg.tokenizer_ckpt)


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
            "continues from it with video"
        )
    return tokenizer_module(cfg, data.clip)


def tokenizer_module(cfg: DictConfig, clip: dict, perceptual: Perceptual | None = None) -> TokenizerModule:
    """Builds the module that trains a tokenizer on clips of one shape.

    Args:
        clip: `frames`, `height`, `width`, `fps`. perceptual: see `TokenizerModule`.
    Raises:
        as `TokenizerModule`.
    """
    return TokenizerModule(
        plain(cfg.tokenizer), plain(cfg.loss), plain(cfg.optimizer), clip, cfg.trainer.max_steps, plain(cfg.scale_dropout),
        cfg.seed, perceptual, recompute=cfg.recompute,
    )  # fmt: skip


def build_generator_module(cfg: DictConfig, data: ClipDataModule) -> GeneratorModule:
    """Builds the module that trains a generator on the clips of `data`. Warns if it does not read their captions to the end.

    Raises:
        as `condition_of`, `load_tokenizer` and `GeneratorModule`.
    """
    tokenizer, condition = load_tokenizer(cfg.tokenizer_ckpt), condition_of(plain(cfg.condition), data)
    module = generator_module(cfg, data.clip, condition, tokenizer.model, tokenizer.hash, str(tokenizer.path.resolve()))
    if condition["kind"] == "text" and (message := module.model.condition.cut(data.captions)):
        rank_zero_warn(message)
    return module


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


def condition_kind(kind: str, parts: Sequence[ClipDataModule]) -> str:
    """Returns what the clips of all stages are conditioned on, `text` or `class`. Warns of stages without words, and of those
    whose classes' names serve as captions.

    Args:
        kind: that of the config's `condition`. `auto` becomes `class` if there are classes and no captions, else `text`.
        parts: the data of each stage.
    Raises:
        ValueError: if it is `class`, and stages have different classes.
    """
    classes = list(dict.fromkeys(part.classes for part in parts))
    captioned = any(part.captioned for part in parts)
    if wordless := [part.about for part in parts if not (part.classes or part.captioned)]:
        whose = "the clips" if len(wordless) == len(parts) else f"of the stages' data {'; '.join(wordless)}: the clips"
        rank_zero_warn(
            f"{whose} have neither captions nor classes: the generator learns without words. Captions go into captions.csv "
            f"(file,caption) in the folder, a table of another name (data.source.captions=PATH) or a .txt beside each file; "
            f"classes are folders, or names such as jump_001.mp4"
        )
    if kind == "auto":
        kind = "class" if any(classes) and not captioned else "text"
    if kind == "text" and captioned and (named := [part.about for part in parts if part.classes and not part.captioned]):
        rank_zero_warn(f"stages have captions, so of {'; '.join(named)} the classes' names serve as captions")
    if kind == "class" and len(classes) > 1:
        raise ValueError(
            f"the stages' data have other classes: {'; '.join(', '.join(names) or 'none' for names in classes)}; give "
            f"condition.kind=text, which takes their names as captions, or data=mixture with all sources in each stage, with "
            f"a weight of 0 for those it leaves out"
        )
    return kind


def condition_of(condition: dict, data: ClipDataModule) -> dict:
    """Returns the values of a `ConditionConfig` for this data.

    Args:
        condition: values of the config's `condition`, see `condition_kind`. A pretrained text encoder is looked up.
    Raises:
        ValueError: if `length` exceeds what the text encoder reads; else as `condition_kind` and `find_encoder`.
    """
    kind = condition_kind(condition["kind"], data.parts)
    if kind == "text" and condition["encoder"] is not None:
        name = condition["encoder"]
        encoder = find_encoder(str(Path(name).resolve()) if Path(name).is_dir() else name, condition["revision"])
        longest = encoder.longest
        if longest is not None and condition["length"] > longest:
            raise ValueError(
                f"condition.length={condition['length']}; the text encoder {encoder.name} reads {longest} tokens at most"
            )
        condition = {**condition, "encoder": encoder.name, "revision": encoder.revision, "channels": encoder.channels}
    return {**condition, "kind": kind, "classes": list(data.classes) if kind == "class" else []}


BUILDERS = {"tokenizer": build_tokenizer_module, "generator": build_generator_module}


PRECISIONS = "32-true", "bf16-mixed", "16-mixed", "32", "bf16", "16"  # those of Lightning's in which weights are float32


def check_trainer(trainer: DictConfig):
    """Checks that the trainer has a number of steps, a precision that models train in, and uses the whole data.

    Raises:
        ValueError: for another precision than `PRECISIONS`; if `max_steps`, which the learning rate and the number of encoded
            clips depend on, `accumulate_grad_batches` or a `val_check_interval` in batches is no whole number of 1 or more;
            or if `limit_train_batches` or `overfit_batches` is set, which need data that ends.
    """
    check_whole_number("trainer.max_steps", trainer.max_steps, 1)
    check_whole_number("trainer.accumulate_grad_batches", trainer.accumulate_grad_batches, 1)
    if isinstance(interval := trainer.get("val_check_interval"), int):  # else by the clock, or Lightning says what is wrong
        check_whole_number("trainer.val_check_interval", interval, 1)
    check_choice("trainer.precision", str(trainer.precision), PRECISIONS)
    for key in ("limit_train_batches", "overfit_batches"):
        if trainer.get(key):
            raise ValueError(
                f"trainer.{key}={trainer[key]}: the data has no end to take a part of; shorten a training by recipe.*.steps, "
                f"or try it out with debug=smoke"
            )


def build_trainer(cfg: DictConfig, *more: L.Callback) -> L.Trainer:
    """Builds the Lightning trainer with its loggers and callbacks.

    Args:
        more: callbacks to come after the config's.
    Raises:
        ValueError: if a logger or a callback has no `_target_`, or several processes are to validate by the clock; else as
            `check_trainer` and `check_launch`.
    """
    check_trainer(cfg.trainer)
    for group in ("logger", "callbacks"):
        if empty := [
            f"{group}.{name}"
            for name, values in (cfg.get(group) or {}).items()
            if values and not (isinstance(values, Mapping) and "_target_" in values)
        ]:
            raise ValueError(f"{empty[0]} has no _target_, so it makes nothing; give the class, or mend its name")
    loggers = [instantiate(c) for c in (cfg.get("logger") or {}).values()]
    parts, interval = accumulate_of(cfg), cfg.trainer.get("val_check_interval")
    every = {"val_check_interval": -(-interval // parts) * parts} if isinstance(interval, int) else {}  # after whole steps
    logged = set() if loggers else {"learning_rate"}  # callbacks that fail without a logger
    callbacks = [instantiate(c) for name, c in cfg.callbacks.items() if c and name not in logged]
    plugins = [TrainingCheckpointIO(), *slurm_environment()]
    trainer = instantiate(cfg.trainer, **every, callbacks=[*callbacks, *more], logger=loggers, plugins=plugins)
    check_launch(trainer)
    if trainer.world_size > 1 and isinstance(interval, str):
        raise ValueError(
            f"trainer.val_check_interval={interval}: each of {trainer.world_size} processes would validate by its own clock, "
            f"and wait for the others; give a number of batches"
        )
    return trainer


def slurm_environment() -> list[SLURMEnvironment]:
    """Returns Lightning's environment of a SLURM job, if this is one. It does not queue the job again by itself: that would
    save amid a step, to a file of its own that `ckpt=last` does not resume from."""
    by_slurm = SLURMEnvironment.detect() and not TorchElasticEnvironment.detect()
    return [SLURMEnvironment(auto_requeue=False)] if by_slurm else []


def check_launch(trainer: L.Trainer):
    """Checks that torchrun, if it is at work, has started a process for each device.

    Lightning lets each process of a trainer with one device train by itself, all in one folder.

    Raises:
        ValueError: if there are more or fewer processes.
    """
    devices, nodes = trainer.num_devices, trainer.num_nodes
    if TorchElasticEnvironment.detect() and (started := TorchElasticEnvironment().world_size()) != devices * nodes:
        raise ValueError(
            f"torchrun has started {started} processes, but trainer.devices={devices} and trainer.num_nodes={nodes}: give "
            f"torchrun's --nproc-per-node as trainer.devices, its --nnodes as trainer.num_nodes"
        )


def prepare_trainer_of_tokenizer(trainer: L.Trainer, module: TokenizerModule):
    """Prepares a trainer for a tokenizer's discriminators, and checks that its devices can train the tokenizer.

    Raises:
        ValueError: with sharded weights (trainer=fsdp), if it learns its amplitude, a single number that cannot be sharded.
    """
    if module.discriminator is not None:  # of two networks that take turns one is unused
        allow_unused(trainer)
    if isinstance(trainer.strategy, ShardedStrategy) and module.model.config.learned_amplitude:
        raise ValueError(
            "trainer=fsdp cannot train with tokenizer.learned_amplitude=true; set it to false, or use trainer=default"
        )
