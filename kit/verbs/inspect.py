"""The verb `inspect`: how bits are used, the self-check, and what is predicted with and without the true history."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from omegaconf import DictConfig

from kit.checkpoint import Loaded, kind_of, load_generator, load_tokenizer
from kit.files import sole_user, write_json
from kit.generator.condition import check_classes
from kit.generator.sampler import Sampling
from kit.inspection import bit_use, bit_use_picture, forced_and_free
from kit.machine import autocast, device
from kit.measures import per_scale, teacher_forced_metrics
from kit.media import clip_by_clip, contact_sheet
from kit.sampling_checks import check_none_samples
from kit.self_check import Check, check_tokenizer, self_check
from kit.values import plain
from kit.verbs.held_out import TRAINED_ON, data_for, held_out

CHECKED = 8  # number of clips that are self-checked and sampled


def inspect(cfg: DictConfig) -> dict:
    """Prints the self-check as soon as it is made; then writes pictures of what each scale holds and of bit use, and
    inspect.json, and prints the same numbers.

    For a generator also the share of correctly predicted bits, its part of the self-check, and a picture of clips predicted
    with the true history and sampled without it.

    Returns:
        the contents of inspect.json.
    """
    folder = Path(cfg.folder)
    with sole_user(folder):
        is_generator = kind_of(cfg.ckpt) == "generator"
        if not is_generator:
            check_none_samples(cfg, "a tokenizer")
        generator, tokenizer = load_generator(cfg.ckpt, cfg.tokenizer) if is_generator else (None, load_tokenizer(cfg.ckpt))
        data = data_for(cfg, *filter(None, (generator, tokenizer)))
        if generator is not None:
            check_classes(generator.model.config.condition, data.classes, "the data has", TRAINED_ON)
        batch, pictures = held_out(data), ["scales.png", "bit_use.png"]
        few = {key: value[:CHECKED] for key, value in batch.items()}
        checks = checks_of(generator, tokenizer, few)
        print("\n".join(check.line() for check in checks), flush=True)
        report = inspect_tokenizer(tokenizer, batch, cfg)
        if generator is not None:
            draw_samples(generator, tokenizer, few, cfg)
            report |= teacher_forced_metrics(generator, tokenizer, batch, cfg.batch_size, cfg.precision)
            pictures.append("samples.png")
        checked = {"self_check": {check.name: asdict(check) for check in checks}}
        write_json(folder / "inspect.json", report | checked)
    print(json.dumps(report, indent=2))
    print(f"in {folder}: {', '.join(pictures)}, inspect.json")
    return report | checked


def inspect_tokenizer(tokenizer: Loaded, batch: dict, cfg: DictConfig) -> dict:
    """Writes pictures of what each scale holds and of the use of its bits.

    Returns:
        the schedule, PSNR and SSIM after each scale, and the mean entropy (bits) of each scale's bits.
    """
    rows, by_scale, bits = per_scale(tokenizer, batch["video"], cfg.batch_size, cfg.precision)
    schedule, folder = tokenizer.model.schedule_of(batch["video"]), Path(cfg.folder)
    use = bit_use(bits, schedule)
    contact_sheet(clip_by_clip(rows, cfg.shown), list(batch["caption"])[: cfg.shown], folder / "scales.png")
    bit_use_picture(use["ones"], folder / "bit_use.png")
    entropy = use["entropy"].nanmean(1)
    return {"schedule": str(schedule), "by_scale": by_scale, "bit_entropy": [round(e.item(), 4) for e in entropy]}


def checks_of(generator: Loaded | None, tokenizer: Loaded, few: dict) -> list[Check]:
    """Runs the self-check on a few clips."""
    codec, video = tokenizer.model.to(device()), few["video"].to(device())
    if generator is None:
        return check_tokenizer(codec, video)
    model = generator.model.to(device())
    return self_check(model, codec, video, model.condition.prompts(few))


def draw_samples(generator: Loaded, tokenizer: Loaded, few: dict, cfg: DictConfig):
    """Writes a picture of a few clips: real, reconstructed, predicted with the true history, and sampled without it."""
    model, codec, video = generator.model.to(device()), tokenizer.model.to(device()), few["video"].to(device())
    prompts = model.condition.prompts(few)
    with autocast(cfg.precision):
        feature, schedule = codec.encode(video), codec.schedule_of(video)
        made = forced_and_free(model, codec, feature, schedule, prompts, Sampling.of(plain(cfg)), cfg.seed)
    groups = clip_by_clip({name: videos.float().cpu() for name, videos in {"real": video, **made}.items()}, len(prompts))
    contact_sheet(groups, list(prompts), Path(cfg.folder) / "samples.png")
