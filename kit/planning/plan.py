"""Works out what a training's config means: its stages, the clips and tokens of a step, memory, GPU-hours."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path

import torch
from omegaconf import DictConfig, ListConfig, OmegaConf

from kit.build import (
    accumulate_of,
    batch_size_of,
    generator_module,
    generator_values,
    of_stage,
    stages_in,
    tokenizer_config,
    tokenizer_module,
)  # fmt: skip
from kit.data import cache
from kit.data.buckets import read_shape
from kit.generator.condition import ConditionConfig
from kit.generator.module import GeneratorModule
from kit.generator.transformer import GeneratorConfig
from kit.perceptual import untrained_perceptual
from kit.planning.costs import ClipCost, generator_cost, gpu_hours, stage_cost, tokenizer_cost
from kit.planning.memory import training_memory
from kit.scales import latent_frames
from kit.tokenizer import Tokenizer, TokenizerConfig
from kit.tokenizer.module import TokenizerModule
from kit.values import plain

COLUMNS = "{:<{}}{:>14}{:>8}{:>9}{:>14}{:>8}{:>14} {:>11} {:>10}{:>9}{:>9}"


def stages_of(cfg: DictConfig) -> list[tuple[str, int, dict]]:
    """Lists name, steps and data of each stage, which `stage_steps` may shorten; a training without stages is one."""
    if not cfg.stages:
        return [(cfg.name, cfg.trainer.max_steps, data_of(cfg.copy()))]
    return [(stage.name, stage.steps, data_of(of_stage(cfg, stage))) for stage in stages_in(cfg).stages]


def data_of(cfg: DictConfig) -> dict:
    """Returns `data` as plain values, also if some are missing. Resolves it in `cfg`."""
    OmegaConf.resolve(cfg.data)
    return OmegaConf.to_container(cfg.data)


def shapes_of(data: dict) -> dict[str, dict]:
    """Returns a stage's data for each shape of its clips, shape -> data; without buckets there is one.

    Raises:
        ValueError: as `read_shape`.
    """
    shapes = data.get("buckets") or ["x".join(str(data[key]) for key in ("frames", "height", "width"))]
    return {str(text): {**data, **dict(zip(("frames", "height", "width"), read_shape(text)))} for text in shapes}


def planned_tokenizer(cfg: DictConfig) -> tuple[TokenizerConfig, str | None]:
    """Returns the config of the tokenizer to train, or of the one in `tokenizer_ckpt` that a generator is trained on.

    If that checkpoint does not exist yet, or its tokenizer cannot take the clips, returns the config's own tokenizer, and
    the reason.

    Raises:
        as `tokenizer_config`.
    """
    own = TokenizerConfig.from_dict(plain(cfg.tokenizer))
    if cfg.module == "tokenizer":
        return own, None
    if cfg.tokenizer_ckpt is not None and not Path(cfg.tokenizer_ckpt).is_file():
        return own, f"no checkpoint at {cfg.tokenizer_ckpt}; run conf=stage1_tokenizer first"
    made, stages = tokenizer_config(cfg), stages_of(cfg)
    try:
        for _, _, data in stages:
            for clips in shapes_of(data).values():
                made.schedule(clips["frames"], clips["height"], clips["width"])
    except ValueError as error:
        return own, f"{cfg.tokenizer_ckpt}: {error}"
    return made, None


def encodes(cfg: DictConfig, data: dict) -> bool:
    """Returns whether a training stage encodes clips as they come; with a cache or `encoded_clips` they are encoded ahead.

    Args:
        data: of the stage, see `stages_of`.
    """
    return not cfg.encoded_clips and not str(data["source"].get("_target_")).startswith(f"{cache.__name__}.")


def devices_of(cfg: DictConfig) -> int:
    """Returns the number of devices of all nodes; one per node where that depends on the machine."""
    devices = cfg.trainer.devices
    count = devices if isinstance(devices, int) and devices > 0 else len(devices) if isinstance(devices, ListConfig) else 1
    return count * cfg.trainer.get("num_nodes", 1)


def replicas_of(cfg: DictConfig) -> int | None:
    """Returns the number of groups of devices that each shard all weights; None: weights are not sharded."""
    strategy = cfg.trainer.get("strategy")
    return strategy.get("replicas") if isinstance(strategy, DictConfig) else None


def batches_of_all(cfg: DictConfig) -> int:
    """Returns the batches of an optimizer step, on all devices together."""
    return devices_of(cfg) * accumulate_of(cfg)


def generator_config(cfg: DictConfig, tokenizer: TokenizerConfig) -> GeneratorConfig:
    """Returns the config of the generator that a training's config describes, with the default condition."""
    return GeneratorConfig.from_dict(generator_values(cfg, tokenizer, asdict(ConditionConfig())))


def clips_of_a_batch(data: dict, tokenizer: TokenizerConfig) -> int:
    """Returns the clips in a batch on one device, for a stage's data. Raises as `batch_size_of`."""
    return batch_size_of(data, tokenizer, data["frames"], data["height"], data["width"])


def tokens_of_a_batch(data: dict, tokenizer: TokenizerConfig) -> int:
    """Returns the tokens in a batch on one device, without the condition's. Raises as `clips_of_a_batch`."""
    length = tokenizer.schedule(data["frames"], data["height"], data["width"]).length
    return clips_of_a_batch(data, tokenizer) * length


def clip_of(data: dict) -> dict:
    """Returns `frames`, `height`, `width` and `fps` of a stage's clips."""
    return {key: data[key] for key in ("frames", "height", "width", "fps")}


def tokenizer_on_paper(cfg: DictConfig, clip: dict) -> TokenizerModule:
    """Builds the module as `tokenizer_module`, but without reading the weights of a perceptual loss."""
    seen = cfg.loss.perceptual
    return tokenizer_module(cfg, clip, untrained_perceptual(seen.kind) if seen.weight else None)


def memory_of(
    cfg: DictConfig, data: dict, device: str, bfloat16: bool, tokenizer: TokenizerConfig | None = None
) -> tuple[int, int]:
    """Estimates the memory of a training stage on a device that holds all weights, see `training_memory`.

    Args:
        tokenizer: the training's; None: that of `planned_tokenizer`.
    Raises:
        ValueError: if the tokenizer cannot take the clips.
    """
    values = tokenizer or planned_tokenizer(cfg)[0]
    clip = clip_of(data)
    shape, clips = (clip["frames"], clip["height"], clip["width"]), clips_of_a_batch(data, values)
    encoded = cfg.module == "generator" and not encodes(cfg, data)

    def build() -> TokenizerModule | GeneratorModule:
        if cfg.module == "tokenizer":
            return tokenizer_on_paper(cfg, clip)
        return generator_module(cfg, clip, asdict(ConditionConfig()), Tokenizer(values), "", "")

    def batch(where: torch.device) -> dict:
        words = {"n": range(clips), "caption": [""] * clips, "label": [-1] * clips, "given": torch.zeros(clips)}
        if encoded:
            grid = values.schedule(*shape)
            return {"feature": torch.zeros(clips, values.bits, grid.latent_frames, *grid.grid, device=where), **words}
        return {"video": torch.zeros(clips, 3, *shape, device=where), **words}

    buckets = devices_of(cfg) > 1 and replicas_of(cfg) is None
    return training_memory(build, batch, device, bfloat16, bool(cfg.callbacks.get("ema")), accumulate_of(cfg), buckets)


def costs(cfg: DictConfig, doctor: DictConfig) -> list[str]:
    """Returns a table of the costs of each training stage, and the days that the training takes on some numbers of GPUs.

    Of a stage with buckets, the one with the most tokens in a step counts. The operations of the optimizer's step are left
    out: in every preset AdamW's are below 0.1 % of a step's. Muon's products of matrices, at size=tiny, whose recipe has it,
    are 9 % of a tokenizer's and 14 % of a generator's.

    Raises:
        ValueError: if the tokenizer cannot take the clips.
    """
    stages, cfg = stages_of(cfg), cfg.copy()
    cfg.trainer.max_steps = sum(steps for _, steps, _ in stages)  # the discriminators begin at a share of these
    tokenizer, _ = planned_tokenizer(cfg)
    generator = generator_config(cfg, tokenizer) if cfg.module == "generator" else None
    replicas = replicas_of(cfg)
    shares = 1 if replicas is None else devices_of(cfg) / replicas

    def cost(frames: int, data: dict, iterations: range) -> ClipCost:
        if generator is None:
            return tokenizer_cost(lambda: tokenizer_on_paper(cfg, clip_of({**data, "frames": frames})), iterations)
        size = (frames, data["height"], data["width"])
        return generator_cost(generator, tokenizer, *size, encoded=not encodes(cfg, data), recompute=cfg.recompute)

    heads = ("stage", "clip", "tokens", "steps", "clips a step", "images", "GFLOP a clip", "EFLOP", "hours")
    widest = max(12, *(len(name) for name, _, _ in stages))
    rows, total, begun = [COLUMNS.format(heads[0], widest, *heads[1:], "GB held", "at most")], 0.0, 0
    for name, steps, data in stages:
        data = max(shapes_of(data).values(), key=lambda data: tokens_of_a_batch(data, tokenizer))
        iterations, share = range(begun, begun := begun + steps), data["image_share"]
        clip, image = cost(data["frames"], data, iterations), cost(1, data, iterations) if share else None
        batch = clips_of_a_batch(data, tokenizer) * batches_of_all(cfg)
        held, most = memory_of(cfg, data, "cuda", True, tokenizer)
        memory = [f"{size / 1e9:,.1f}" for size in (held / shares, held / shares + most - held)]
        whole = stage_cost(clip, image, steps * batch, share, latent_frames(data["frames"]))
        hours = gpu_hours(whole.flops, doctor.tflops, doctor.utilisation)
        total += hours
        size = f"{data['frames']}x{data['height']}x{data['width']}"
        figures = (f"{clip.flops / 1e9:,.1f}", figure(whole.flops / 1e18, 4), figure(hours, 4))
        rows.append(COLUMNS.format(name, widest, size, clip.tokens, steps, batch, f"{share:.0%}", *figures, *memory))
    rows.append(
        f"in all {figure(total, 4)} GPU-hours at {doctor.utilisation:.0%} of {doctor.tflops:g} TFLOP/s: "
        + ", ".join(f"{duration(total / n)} on {n}" for n in doctor.gpus)
    )
    rows.append(
        "GB of each GPU's memory, in bfloat16 mixed precision, not compiled: held between steps, and at most within one"
        + (f"; what is held is shared out to {shares:.0f}" if shares > 1 else "")
    )
    return rows


def figure(number: float, digits: int) -> str:
    """Writes a number to at least `digits` digits, never as a power of ten."""
    return f"{number:,.{max(0, digits - 1 - math.floor(math.log10(abs(number) or 1)))}f}"


def duration(hours: float) -> str:
    """Writes hours in the largest unit that is not too large: days from 48 h on, h, min or s."""
    for unit, least, long in (("days", 48, 24), ("h", 1, 1), ("min", 1 / 60, 1 / 60)):
        if hours >= least:
            return f"{figure(hours / long, 3)} {unit}"
    return f"{figure(3600 * hours, 3)} s"
