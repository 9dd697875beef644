"""Reports what this machine can run: versions, devices, memory of each preset, and problems of a training's config."""

from __future__ import annotations

import math
import os
import platform
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
from hydra.errors import InstantiationException
from omegaconf import DictConfig, OmegaConf

from kit import machine
from kit.build import build_data, build_trainer, condition_kind, of_stage, plan_of
from kit.confs import CONF, compose, confs, located, trains
from kit.data.datamodule import ClipDataModule
from kit.evaluation.detectors import I3D_FILE
from kit.generator.condition import ConditionConfig, build_condition
from kit.generator.transformer import Generator, GeneratorConfig
from kit.optim import BYTES_AVERAGED, BYTES_TRAINED
from kit.perceptual import GET_VGG16, load_perceptual, vgg16_path
from kit.planning.plan import batches_of_all, clips_of_a_batch, costs, planned_tokenizer, shapes_of, stages_of
from kit.stages import StagePlan
from kit.start import given_start
from kit.tokenizer import Tokenizer, TokenizerConfig
from kit.values import check_number, check_whole_number, plain
from kit.words import refused, wrong_words

PACKAGES = {  # package -> the feature that needs it
    "torch": "", "lightning": "", "hydra-core": "", "torchmetrics": "", "av": "", "decord2": "data.source.backend=decord",
    "wandb": "logger=wandb", "tensorboard": "logger=tensorboard", "torchvision": "", "xformers": "",
    "transformers": "protocol.detector.kind=videomae and condition.encoder",
}  # fmt: skip


def versions() -> dict[str, str]:
    """Returns the version of each package, or what needs it if it is not installed."""
    found = {}
    for name, lacking in PACKAGES.items():
        absent = f"not installed{f' (needed for {lacking})' if lacking else ' (optional)'}"
        found[name] = machine.installed_version(name) or absent
    return found


def hardware() -> dict[str, str]:
    facts = {"python": platform.python_version(), "system": platform.platform(), "CPU cores": str(machine.cores())}
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        facts["memory"] = f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 1e9:.1f} GB"
    facts["free disk"] = f"{shutil.disk_usage('.').free / 1e9:.1f} GB"
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        facts[f"GPU {i}"] = f"{properties.name}, {properties.total_memory / 1e9:.0f} GB"
    if not torch.cuda.is_available():
        facts["GPU"] = "none that torch sees"
    facts["precision"] = f"{machine.precision()} (bfloat16 is {'' if machine.fast_bfloat16() else 'not '}fast here)"
    facts["default size"] = machine.machine_size()
    kernels = [k for k in ("flash", "mem_efficient", "cudnn", "math") if getattr(torch.backends.cuda, f"{k}_sdp_enabled")()]
    chosen_from = f"of {', '.join(kernels)}" if torch.cuda.is_available() else "for sampling, the plain formula for training"
    facts["attention"] = f"scaled_dot_product_attention of torch, {chosen_from}"
    facts["torch.compile"] = "works" if machine.can_compile() else "does not work here (on CPUs it needs a C++ compiler)"
    return facts


def metric_networks() -> dict[str, str]:
    """Returns for each metric the path of its network's weights, or how to get them."""
    i3d, vgg16 = machine.cache_folder() / I3D_FILE, vgg16_path()
    return {
        "FVD": str(i3d) if i3d.is_file() else "no weights yet: python -m kit prepare i3d",
        "LPIPS": str(vgg16) if vgg16.is_file() else f"no weights yet: {GET_VGG16}",
    }


@cache
def parameters(size: str) -> tuple[int, int]:
    """Counts the parameters of the tokenizer and the generator of a preset, without allocating them: once in a process.

    The generator's layers are all alike, so that two of them are enough.
    """
    import hydra

    cfg = OmegaConf.to_container(hydra.compose(f"size/{size}"))
    with torch.device("meta"):
        values = TokenizerConfig.from_dict(cfg["tokenizer"])
        generator = GeneratorConfig(**cfg["generator"], bits=values.bits, scales=len(values.scales))
        models = Tokenizer(values), *(Generator(replace(generator, layers=layers)) for layers in (1, 2))
        tokenizer, one, two = (sum(p.numel() for p in model.parameters()) for model in models)
    return tokenizer, one + (generator.layers - 1) * (two - one)


def presets() -> list[str]:
    """Returns a table of the presets: parameters, memory of weights, gradients, AdamW and EMA in training, and of weights in
    generation. A generator's training also holds the tokenizer's weights."""
    rows = [f"{'size':<8}{'tokenizer':>12}{'generator':>12}{'train tok.':>12}{'train gen.':>12}{'generate':>12}"]
    sizes = {path.stem: parameters(path.stem) for path in (CONF / "size").glob("*.yaml")}
    for size, (tokenizer, generator) in sorted(sizes.items(), key=lambda item: item[1][1]):
        trained = BYTES_TRAINED + BYTES_AVERAGED
        gigabytes = [trained * tokenizer / 1e9, trained * generator / 1e9 + 4 * tokenizer / 1e9]
        gigabytes.append(4 * (tokenizer + generator) / 1e9)
        cells = [f"{n / 1e6:.1f} M" for n in (tokenizer, generator)] + [f"{g:.2f} GB" for g in gigabytes]
        rows.append(f"{size:<8}" + "".join(f"{cell:>12}" for cell in cells))
    return rows + ["(train: weights, gradients, AdamW and EMA; generate: weights; activations come on top)"]


def training_config(name: str, words: Sequence[str] = ()) -> DictConfig:
    """Composes the config of a training.

    Args:
        name: as conf= takes it. words: key=value, as `fit` takes them.
    Raises:
        ValueError: if it is not a conf for training, it does not compose, or a word gives a value of the wrong kind.
    """
    path = located(name)
    if not trains(path):
        raise ValueError(f"not a training conf; choose from {', '.join(confs())}, or give a .yaml file of your own")
    try:
        cfg = compose(path, words)
        OmegaConf.resolve(cfg.copy())  # not itself: what a stage sets in `data`, other values there may be made of
    except Exception as error:  # whatever hydra or omegaconf raise, it is the config's problem
        raise ValueError(refused(path, list(words)) or f"does not compose: {error}") from error
    if wrong := wrong_words(cfg, path, list(words)):
        raise ValueError("; ".join(wrong))
    return cfg


def check_start(cfg: DictConfig):
    """Checks that the checkpoint to start from exists. Raises FileNotFoundError if not; else as `given_start`."""
    given = given_start(plain(cfg.init), cfg.module)
    if given and not Path(given[1]).is_file():
        raise FileNotFoundError(f"no checkpoint at {given[1]}")


def check_perceptual(cfg: DictConfig):
    """Checks that the weights of the perceptual loss, if there is one, can be loaded. Raises as `load_perceptual`."""
    if cfg.module == "tokenizer" and cfg.loss.perceptual.weight:
        load_perceptual(cfg.loss.perceptual.kind, cfg.loss.perceptual.weights)


def check_condition(cfg: DictConfig, parts: list[ClipDataModule]):
    """Checks what a generator is conditioned on, given the data of each stage; a pretrained text encoder is not looked up.

    Raises:
        as `condition_kind`, `ConditionConfig` and `build_condition`.
    """
    kind = condition_kind(cfg.condition.kind, parts)
    own = {"kind": kind, "classes": parts[0].classes if kind == "class" else (), "encoder": None, "revision": None}
    with torch.device("meta"):
        build_condition(ConditionConfig(**{**plain(cfg.condition), **own}), width=8)


def problems(cfg: DictConfig) -> list[str]:
    """Lists what is wrong with a training's config on this machine, as far as can be seen without running it.

    Also prints the schedule of each stage's clips.
    """
    found: list[str] = []

    def met(what: str, function: Callable, *given):
        """Calls a function and returns its result; if it raises, adds a problem named `what` and returns None."""
        try:
            return function(*given)
        except Exception as error:  # whatever any part raises is a problem to report
            cause = error.__cause__ if isinstance(error, InstantiationException) else error
            found.append(f"{what}: {cause}")

    def check_data(what: str, config: Callable[[], DictConfig]) -> ClipDataModule | None:
        def build() -> ClipDataModule:
            if OmegaConf.is_missing((given := config()).data, "root"):  # which hydra leaves out: a data set would miss it
                raise ValueError("data.root is missing; give data.root=...")
            return build_data(given)

        data = met(what, build)
        if data is not None and data.unreadable:
            unreadable = f"{len(data.unreadable)} of the files read so far cannot be read, such as {data.unreadable[0]}"
            found.append(f"{what}: {unreadable}; mend or remove them, others take their place")
        return data

    plan = met("stages", plan_of, cfg) if cfg.stages else StagePlan(())
    stages = plan.stages if plan else ()
    parts = [check_data(f"data of stage {stage.name}", lambda stage=stage: of_stage(cfg, stage)) for stage in stages]
    if not cfg.stages:
        parts = [check_data("data", lambda: cfg)]
    if cfg.module == "generator" and parts and None not in parts:
        met("condition", check_condition, cfg, parts)
    met("trainer", build_trainer, cfg)
    met("init.ckpt", check_start, cfg)
    met("loss.perceptual", check_perceptual, cfg)
    values, lacking = met("tokenizer", planned_tokenizer, cfg) or (None, None)
    if values is not None and plan is not None:
        for name, clips in (met("clips", clips_by_name, cfg) or {}).items():
            if summary := met(f"tokenizer and clips of {name}", about_clips, clips, values, batches_of_all(cfg)):
                print(f"clips of {name}: {summary}")
    if lacking is not None:
        found.append(f"tokenizer_ckpt: {lacking}")
    return found


def about_clips(clips: dict, tokenizer: TokenizerConfig, batches: int) -> str:
    """Describes clips in words: their schedule, and for a bucket their number in a step.

    Args:
        clips: the config's `data` for these clips, see `clips_by_name`. batches: of a step, on all devices.
    Raises:
        as `clips_of_a_batch`.
    """
    schedule = tokenizer.schedule(clips["frames"], clips["height"], clips["width"])
    return f"{schedule}, {clips_of_a_batch(clips, tokenizer) * batches} clips a step" if clips["buckets"] else str(schedule)


def clips_by_name(cfg: DictConfig) -> dict[str, dict]:
    """Returns the config's `data` for each stage's clips of one shape, and for each of its buckets."""
    named = {}
    for stage, _, data in stages_of(cfg):
        named[stage] = {**data, "buckets": []}
        if data["buckets"]:
            named |= {f"{stage}, {text}": bucket for text, bucket in shapes_of(data).items()}
    return named


def check_gpus(cfg: DictConfig):
    """Checks the numbers of conf/doctor.yaml about GPUs.

    Raises:
        ValueError: if a rate is not above 0, the share of it that is reached not above 0 and up to 1, or a number of GPUs no
            whole number of 1 or more.
    """
    for key, most, what in (
        ("tflops", math.inf, "TFLOP/s, a number above 0"),
        ("utilisation", 1, "a share, above 0 and up to 1"),
    ):
        check_number(key, cfg[key])
        if not 0 < cfg[key] <= most:
            raise ValueError(f"{key}={cfg[key]}; expected {what}")
    if cfg.gpus is None:
        raise ValueError("gpus=null; expected a list of whole numbers, such as gpus=[1,8]")
    for number in cfg.gpus:
        check_whole_number("gpus", number, 1)


def doctor(cfg: DictConfig) -> None:
    """Prints facts about the machine, packages, metric networks and presets, and with `check` the problems and costs of a
    training.

    Raises:
        ValueError: as `check_gpus`; at the end, if `check` is not a training's config or does not compose. Problems found in
            a config are only printed, because files that it needs may be made later.
    """
    check_gpus(cfg)
    for title, facts in (("this machine", hardware()), ("packages", versions()), ("metric networks", metric_networks())):
        print(f"{title}\n" + "\n".join(f"  {name:<14}{value}" for name, value in facts.items()))
    print("memory\n" + "\n".join(f"  {row}" for row in presets()))
    if cfg.check is None:
        return
    lost: ValueError | None = None
    fits = [] if cfg.gb is None else [f"fits={cfg.gb}GB"]
    sizes = [cfg.sizes] if isinstance(cfg.sizes, str) else cfg.sizes or []
    for words in [[*cfg.words, f"size={size}"] for size in sizes] or [[*cfg.words]]:
        name = " ".join([f"conf={cfg.check}", *words, *fits])
        try:
            checked = training_config(cfg.check, [*words, *fits])
        except ValueError as error:
            found, lost = [str(error)], error
        else:
            found = problems(checked)
            try:
                rows = costs(checked, cfg)
                print(f"cost, on paper, of {name}\n" + "\n".join(f"  {row}" for row in rows))
            except Exception as error:  # due to a problem found above, or a new one
                if not found:
                    found.append(f"cost: {error}")
        print(f"{name}: " + ("no problem found" if not found else ""))
        print("\n".join(f"  - {problem}" for problem in found), flush=True)
    if lost:
        raise ValueError(f"check={cfg.check}: {lost}")
