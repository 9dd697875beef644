"""Looks into models with real clips: how bits are used, and what is predicted with and without the true history."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from kit.files import written_aside
from kit.generator.sampler import Sampling
from kit.generator.sequence import teacher_forced
from kit.generator.transformer import Generator
from kit.sampling import sample_clips
from kit.scales import ScaleSchedule
from kit.tokenizer import Tokenizer
from kit.tokenizer.losses import entropy_of


@torch.no_grad()
def forced_and_free(
    model: Generator, tokenizer: Tokenizer, feature: Tensor, schedule: ScaleSchedule, prompts: list[str], sampling: Sampling,
    seed: int = 0,
) -> dict[str, Tensor]:  # fmt: skip
    """Reconstructs clips, predicts each block from the true earlier ones, and samples their prompts freely.

    Args:
        feature: (B, d, F, h, w) of the clips.
    Returns:
        name -> (B, 3, T, H, W): `reconstruction`, `teacher-forced`, and `free sample`, with seeds from `seed` on.
    """
    logits, sequence = teacher_forced(model, feature, schedule, model.condition(prompts))
    return {
        "reconstruction": tokenizer.decode_bits(sequence.targets, schedule),
        "teacher-forced": tokenizer.decode_bits(logits > 0, schedule),
        "free sample": sample_clips(model, tokenizer, schedule, prompts, range(seed, seed + len(prompts)), sampling),
    }


def bit_use(bits: Tensor, schedule: ScaleSchedule) -> dict[str, Tensor]:
    """Computes the share of ones and the entropy of every bit at every scale.

    Args:
        bits: (B, L, d) bool.
    Returns:
        `ones` (K, d) in [0, 1], and `entropy` (K, d) in bits: 1 is balanced, 0 is a dead bit; NaN where a scale does not
        have the bit.
    """
    scale = schedule.scale_of_tokens
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
    title = f"share of ones of {d} bits: white 0.5, red 1, blue 0"
    width = max(margin + d * cell, 4 + round(font.getlength(title))) + 4
    picture = Image.new("RGB", (width, line + K * cell + 4), "white")
    draw = ImageDraw.Draw(picture)
    draw.text((4, 3), title, fill="black", font=font)
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
