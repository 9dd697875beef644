"""The verb `inspect`: how bits are used, what is predicted with and without the true history, and the self-check."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import torch
from omegaconf import DictConfig
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from kit.checkpoint import Loaded, kind_of, load_generator, load_tokenizer
from kit.files import sole_user, write_json, written_aside
from kit.generator.corruption import teacher_forced
from kit.generator.sampler import Sampling
from kit.generator.transformer import Generator
from kit.held_out import check_classes, data_for, held_out
from kit.machine import autocast, device
from kit.media import clip_by_clip, contact_sheet
from kit.reconstruction import per_scale
from kit.sampling import sample_clips
from kit.scales import ScaleSchedule
from kit.self_check import Check, self_check
from kit.tokenizer import Tokenizer
from kit.tokenizer.losses import entropy_of
from kit.validation import teacher_forced_metrics
from kit.values import plain

CHECKED = 8  # number of clips that are self-checked and sampled


def inspect(cfg: DictConfig) -> dict:
    """Writes pictures of what each scale holds and of bit use, and inspect.json; prints the same numbers.

    For a generator also the share of correctly predicted bits, the self-check, and a picture of clips predicted with the true
    history and sampled without it.

    Returns:
        the contents of inspect.json.
    """
    folder = Path(cfg.folder)
    with sole_user(folder):
        is_generator = kind_of(cfg.ckpt) == "generator"
        generator, tokenizer = load_generator(cfg.ckpt, cfg.tokenizer) if is_generator else (None, load_tokenizer(cfg.ckpt))
        data = data_for(cfg, generator or tokenizer)
        if generator is not None:
            check_classes(generator, data)
        batch, checks, pictures = held_out(data), [], ["scales.png", "bit_use.png"]
        report = inspect_tokenizer(tokenizer, batch, cfg)
        if generator is not None:
            checks = inspect_generator(generator, tokenizer, batch, cfg)
            report |= teacher_forced_metrics(generator, tokenizer, batch, cfg.batch_size)
            pictures.append("samples.png")
        checked = {"self_check": {check.name: asdict(check) for check in checks}} if checks else {}
        write_json(folder / "inspect.json", report | checked)
    print(json.dumps(report, indent=2))
    print("\n".join([check.line() for check in checks] + [f"in {folder}: {', '.join(pictures)}, inspect.json"]))
    return report | checked


def inspect_tokenizer(tokenizer: Loaded, batch: dict, cfg: DictConfig) -> dict:
    """Writes pictures of what each scale holds and of the use of its bits.

    Returns:
        the schedule, PSNR and SSIM after each scale, and the mean entropy (bits) of each scale's bits.
    """
    rows, by_scale, bits = per_scale(tokenizer, batch["video"], cfg.batch_size)
    schedule, folder = tokenizer.model.schedule_of(batch["video"]), Path(cfg.folder)
    use = bit_use(bits, schedule)
    contact_sheet(clip_by_clip(rows, cfg.shown), list(batch["caption"])[: cfg.shown], folder / "scales.png")
    bit_use_picture(use["ones"], folder / "bit_use.png")
    entropy = use["entropy"].nanmean(1)
    return {"schedule": str(schedule), "by_scale": by_scale, "bit_entropy": [round(e.item(), 4) for e in entropy]}


def inspect_generator(generator: Loaded, tokenizer: Loaded, batch: dict, cfg: DictConfig) -> list[Check]:
    """Runs the self-check on the first `CHECKED` clips, and writes a picture of them: real, reconstructed, predicted with the
    true history, and sampled without it."""
    few = {key: value[:CHECKED] for key, value in batch.items()}
    model, codec, video = generator.model.to(device()), tokenizer.model.to(device()), few["video"].to(device())
    prompts = model.condition.prompts(few)
    checks = self_check(model, codec, video, prompts)
    with autocast(cfg.precision):
        feature, schedule = codec.encode(video), codec.schedule_of(video)
        rows = {"real": video, **forced_and_free(model, codec, feature, schedule, prompts, Sampling.of(plain(cfg)))}
    groups = clip_by_clip({name: videos.float().cpu() for name, videos in rows.items()}, len(prompts))
    contact_sheet(groups, list(prompts), Path(cfg.folder) / "samples.png")
    return checks


@torch.no_grad()
def forced_and_free(
    model: Generator, tokenizer: Tokenizer, feature: Tensor, schedule: ScaleSchedule, prompts: list[str], sampling: Sampling
) -> dict[str, Tensor]:
    """Reconstructs clips, predicts each block from the true earlier ones, and samples their prompts freely.

    Args:
        feature: (B, d, F, h, w) of the clips.
    Returns:
        name -> (B, 3, T, H, W): `reconstruction`, `teacher-forced`, and `free sample`, with seeds 0, 1, and so on.
    """
    logits, sequence = teacher_forced(model, feature, schedule, model.condition(prompts))
    return {
        "reconstruction": tokenizer.decode_bits(sequence.targets, schedule),
        "teacher-forced": tokenizer.decode_bits(logits > 0, schedule),
        "free sample": sample_clips(model, tokenizer, schedule, prompts, range(len(prompts)), sampling),
    }


def bit_use(bits: Tensor, schedule: ScaleSchedule) -> dict[str, Tensor]:
    """Computes the share of ones and the entropy of every bit at every scale.

    Args:
        bits: (B, L, d) bool.
    Returns:
        `ones` (K, d) in [0, 1], and `entropy` (K, d) in bits: 1 is balanced, 0 is a dead bit; NaN where a scale does not
        have the bit.
    """
    scale = schedule.coordinates[:, 1]
    ones = torch.stack([bits[:, scale == k].float().mean((0, 1)) for k in range(schedule.scales)])
    for k in range(schedule.scales):
        ones[k, schedule.bits_of(k, bits.shape[-1]) :] = torch.nan
    return {"ones": ones, "entropy": entropy_of(ones)}


def bit_use_picture(ones: Tensor, path: str | Path) -> Path:
    """Draws the share of ones (K, d) to a picture at `path`, with a row for each scale and a cell for each bit.

    White is balanced, red always one, blue always zero; bits that a scale does not have are left out.
    """
    K, d = ones.shape
    font, margin, line, cell = ImageFont.load_default(12), 76, 22, 14  # pixels
    picture = Image.new("RGB", (margin + d * cell + 4, line + K * cell + 4), "white")
    draw = ImageDraw.Draw(picture)
    draw.text((4, 3), f"share of ones of {d} bits: white 0.5, red 1, blue 0", fill="black", font=font)
    for k in range(K):
        y = line + k * cell
        draw.text((4, y), f"scale {k + 1}", fill="black", font=font)
        for bit in range(int(ones[k].isfinite().sum())):
            lean = 2 * ones[k, bit].item() - 1
            fade = round(255 * (1 - abs(lean)))
            colour = (255, fade, fade) if lean > 0 else (fade, fade, 255)
            x = margin + bit * cell
            draw.rectangle((x, y, x + cell - 2, y + cell - 2), fill=colour, outline=(200, 200, 200))
    path = Path(path)
    with written_aside(path) as aside:
        picture.save(aside)
    return path
