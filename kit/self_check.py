"""Finds the fault when "the loss falls but samples are noise": checks equivalences and effects that must hold, on a user's
own checkpoint and clips."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from kit.generator.kv_cache import CachedGenerator
from kit.generator.losses import accuracy_by_block
from kit.generator.rope import positions, rotary_table
from kit.generator.sequence import teacher_forced
from kit.generator.transformer import Generator
from kit.machine import exact_float32, without_autocast
from kit.pixels import psnr
from kit.scales import ScaleSchedule
from kit.tokenizer import Tokenizer
from kit.tokenizer.causal import Stream
from kit.tokenizer.quantizer import bits_to_feature

ROUNDING = 2e-3  # largest difference, in standard deviations of the logits, between two float32 computations of one value
SHIFT = 5.0  # added to all positions
FEW = 6  # fewer clips than this tell nothing about prompts
PAIR = slice(2)  # the clips that equivalences are tried with, which hold for any


@dataclass(frozen=True)
class Check:
    """Result of a check: its name, whether it passed, what was found, and what a failure means."""

    name: str
    ok: bool
    found: str
    fault: str

    def line(self) -> str:
        return f"{'ok   ' if self.ok else 'FAULT'} {self.name:<13} {self.found}" + ("" if self.ok else f"; {self.fault}")


@torch.no_grad()
def self_check(model: Generator, tokenizer: Tokenizer, video: Tensor, prompts: list[str]) -> list[Check]:
    """Runs all checks of a generator and its tokenizer, in float32.

    Args:
        video: (B, 3, T, H, W) in [-1, 1], a few real clips, on the models' device. prompts: theirs.
    """
    schedule = tokenizer.schedule_of(video)
    with without_autocast(video.device), exact_float32():
        feature = tokenizer.encode(video)
        logits, (inputs, bits, _) = teacher_forced(model, feature, schedule, model.condition(prompts))
        return [
            *check_tokenizer(tokenizer, video),
            check_bits(logits, bits, schedule),
            check_conditioning(model, inputs, bits, prompts, schedule),
            check_cache(model, bits[PAIR], logits[PAIR], prompts[PAIR], schedule),
            check_batch(model, inputs[PAIR], logits[PAIR], prompts[PAIR], schedule),
            check_positions(model, inputs[PAIR], logits[PAIR], prompts[PAIR], schedule),
        ]


@torch.no_grad()
def check_tokenizer(tokenizer: Tokenizer, video: Tensor) -> list[Check]:
    """Runs the checks that need no generator, in float32; `video` as for `self_check`."""
    schedule = tokenizer.schedule_of(video)
    with without_autocast(video.device), exact_float32():
        bits = tokenizer.bits(video)
        return [check_scales(tokenizer, video, bits, schedule), check_streaming(tokenizer, bits[PAIR], schedule)]


def check_scales(tokenizer: Tokenizer, video: Tensor, bits: Tensor, schedule: ScaleSchedule) -> Check:
    """Checks that no scale worsens the reconstruction, and that all together are far better than a single colour."""
    by_scale = [psnr(tokenizer.decode_bits(bits, schedule, k + 1), video).item() for k in range(schedule.scales)]
    colour = psnr(video.mean(dim=(2, 3, 4), keepdim=True).expand_as(video), video).item()
    ok = by_scale[-1] > colour + 4 and all(later > sooner - 0.5 for sooner, later in zip(by_scale, by_scale[1:]))
    found = f"PSNR by scale {' '.join(f'{value:.1f}' for value in by_scale)} dB; one colour has {colour:.1f}"
    return Check("tokenizer", ok, found, "samples cannot be better: train the tokenizer longer, on such clips")


def check_streaming(tokenizer: Tokenizer, bits: Tensor, schedule: ScaleSchedule) -> Check:
    """Checks that frames decoded one after another, as in sampling, equal the clip decoded whole."""
    whole, stream, pieces = tokenizer.decode_bits(bits, schedule), Stream(), []
    feature = bits_to_feature(bits, schedule)
    for f in range(schedule.latent_frames):
        pieces.append(tokenizer.decode(feature[:, :, f : f + 1], stream))
    difference = (torch.cat(pieces, dim=2).clamp(-1, 1) - whole).abs().max().item()
    found = f"decoded frame by frame: pixels differ by {difference:.1e}"
    return Check("streaming", difference < 1e-3, found, "the decoder is not causal")


def check_bits(logits: Tensor, bits: Tensor, schedule: ScaleSchedule) -> Check:
    """Checks that the generator, given the true history, predicts bits better than their commoner value in other clips."""
    used = schedule.used_bits(bits.shape[-1]).to(bits.device)
    right = (((logits > 0) == bits) & used).float()
    ones = bits.float()
    others = (ones.sum(0) - ones) / max(1, len(bits) - 1)
    common = (((others > 0.5) == bits) & used).float()

    def by_scale(hits: Tensor) -> str:
        return " ".join(f"{share:.3f}" for share in accuracy_by_block(hits, schedule).mean(0).tolist())

    found = f"right by scale {by_scale(right)}; by the commoner value in the other clips {by_scale(common)}"
    return Check("bits", (right.sum() > common.sum()).item(), found, "the generator has learned nothing yet")


def check_conditioning(model: Generator, inputs: Tensor, bits: Tensor, prompts: list[str], schedule: ScaleSchedule) -> Check:
    """Checks that a clip's bits are likelier, beyond chance, given its own prompt than another clip's, and no less likely
    than given none. The history alone may say what a class says, so that a missing prompt costs little.
    """
    if len(prompts) < FEW or len(set(prompts)) == 1:
        why = f"{len(prompts)} clips are too few" if len(prompts) < FEW else "all clips have the same prompt"
        return Check("conditioning", True, f"not tried: {why}", "")
    used = schedule.used_bits(bits.shape[-1]).float().to(bits.device)
    twice = prompts * 2  # clips of a class may be adjacent: takes the next prompt that differs
    others = [next(words for words in twice[i:] if words != prompt) for i, prompt in enumerate(prompts)]

    def losses(words: list[str], dropped: bool = False) -> Tensor:
        condition = model.condition(words, torch.full((len(words),), dropped))
        logits = model(inputs, schedule, condition)
        each = F.binary_cross_entropy_with_logits(logits, bits.float(), reduction="none") * used
        return each.sum(dim=(1, 2)) / used.sum()

    own, other, none = losses(prompts), losses(others), losses(prompts, dropped=True)
    found = f"loss {own.mean():.4f} with their prompts, {other.mean():.4f} with others', {none.mean():.4f} with none"
    return Check(
        "conditioning", _above(other - own) and not _above(own - none), found, "prompts are not heeded, as far as seen"
    )


def _above(differences: Tensor) -> bool:
    """Returns whether the mean of numbers (n,) is above 0 by more than two standard errors."""
    return (differences.mean() > 2 * differences.std() / len(differences) ** 0.5).item()


def check_cache(model: Generator, bits: Tensor, logits: Tensor, prompts: list[str], schedule: ScaleSchedule) -> Check:
    """Checks that sampling, block by block with the cache, computes the same logits as training on the whole clip."""
    cached = CachedGenerator(model, schedule, model.condition(prompts))
    partial = [bits_to_feature(bits, schedule, scales=k + 1) for k in range(schedule.scales)]
    nothing, found = torch.zeros_like(partial[-1][:, :, 0]), []
    for b in schedule.blocks:
        before = partial[-1][:, :, b.f - 1] if b.f else nothing
        found.append(cached.block(b.f, b.k, partial[b.k - 1][:, :, b.f] if b.k else before, before))
    return _same("cache", torch.cat(found, dim=1), logits, "cached and whole", "sampling does not compute what was trained")


def check_batch(model: Generator, inputs: Tensor, logits: Tensor, prompts: list[str], schedule: ScaleSchedule) -> Check:
    """Checks that a clip's logits do not depend on the other clips of a batch, of which `logits` are."""
    alone = [model(inputs[i : i + 1], schedule, model.condition(prompts[i : i + 1])) for i in range(len(prompts))]
    return _same("batch", torch.cat(alone), logits, "alone and in a batch", "clips of a batch mix")


def check_positions(model: Generator, inputs: Tensor, logits: Tensor, prompts: list[str], schedule: ScaleSchedule) -> Check:
    """Checks that only distances between positions count: shifting all changes nothing, stretching time does."""
    condition = model.condition(prompts)

    def moved(stretch: float, shift: float) -> Tensor:
        where = positions(model.layout(schedule), model.condition.length, model.config.align).to(inputs.device)
        where = where * torch.tensor([stretch, 1.0, 1.0], device=inputs.device) + shift
        return model(inputs, schedule, condition, rotary=rotary_table(where, model.config.width // model.config.heads))

    if (spread := logits.std().item()) == 0:
        return Check("positions", True, "not tried: all logits are the same, as before any training", "")
    shifted, stretched = ((moved(*how) - logits).abs().max().item() / spread for how in ((1.0, SHIFT), (2.0, 0.0)))
    found = f"all moved: logits differ by {shifted:.1e} of their spread; time stretched: by {stretched:.1e}"
    ok = shifted < ROUNDING * 10 and (stretched > ROUNDING * 10 or schedule.latent_frames == 1)
    return Check("positions", ok, found, "positions are absolute, or not seen")


def _same(name: str, a: Tensor, b: Tensor, what: str, fault: str) -> Check:
    difference = (a - b).abs().max().item() / max(b.std().item(), torch.finfo(b.dtype).tiny)  # 0 before any training
    return Check(name, difference < ROUNDING, f"{what}: logits differ by {difference:.1e} of their spread", fault)
