"""Sampling: generates blocks one after another, with a key/value cache, guidance, a seed for each clip, and given frames.

Shapes: B clips, R rows of the transformer (2B with guidance: conditioned, then unconditioned), d bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from kit.generator.guidance import Guidance, guided
from kit.generator.kv_cache import CachedGenerator
from kit.generator.transformer import Generator
from kit.machine import onto
from kit.scales import TAU, ScaleSchedule, latent_frames, pixel_frames
from kit.tokenizer.quantizer import residual_map
from kit.values import as_word, check_choice, check_number, from_values

DRAWS = 32  # candidate draws of a token's bits, of which `top_p` takes one


@dataclass(frozen=True)
class Sampling:
    """How bits are drawn.

    Args:
        temperature: of the bits; 0 takes the likelier value of each.
        top_p: share of a token's draws, the likeliest, from which one is chosen, see `draw_bits`; 1: off.
        negative: text or class that guidance leads away from; None: no condition.
        extend: how a video grows longer than the training clips: `reencode` encodes its end and continues from that, see
            `sampling.stream_video`; `positions` continues the sequence, at positions that were not trained.
        overlap: pixel frames, 1 + 4n, that are re-encoded; None: about half a clip. With more, windows re-encode what was
            re-encoded before, each time with some loss.
    Raises:
        ValueError: for a temperature below 0, a `top_p` outside of (0, 1], another `extend`, or an overlap that is not
            1 + 4n.
    """

    guidance: Guidance = Guidance()
    temperature: float = 1.0
    top_p: float = 1.0
    negative: str | None = None
    extend: str = "reencode"
    overlap: int | None = None

    def __post_init__(self):
        check_number("temperature", self.temperature)
        check_number("top_p", self.top_p)
        if not self.temperature >= 0:
            raise ValueError(f"temperature must be 0 or more, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        check_choice("extend", self.extend, ("reencode", "positions"))
        if self.overlap is not None and (not isinstance(self.overlap, int) or self.overlap < 1 or (self.overlap - 1) % TAU):
            raise ValueError(f"{as_word('overlap', self.overlap)}; expected 1 + {TAU}n frames, a whole number")

    def window(self, trained: int, frames: int) -> tuple[int, int]:
        """Returns the pixel frames of a window and of its overlap with the next one.

        Args:
            trained: pixel frames of a training clip. frames: of the whole video.
        """
        overlap = pixel_frames((latent_frames(trained) + 1) // 2) if self.overlap is None else self.overlap
        return (frames if self.extend == "positions" else trained), overlap

    @classmethod
    def of(cls, values: Mapping) -> Sampling:
        """Builds it from plain values of the same names, with `guidance` the values of `Guidance`; ignores other keys."""
        chosen = {field.name: values[field.name] for field in fields(cls) if field.name in values}
        negative = None if values.get("negative") is None else str(values["negative"])
        guidance = from_values(Guidance, values.get("guidance") or {}, "guidance")
        return cls(**{**chosen, "negative": negative, "guidance": guidance})


def draw_bits(logits: Tensor, temperature: float, top_p: float, generators: list[torch.Generator]) -> Tensor:
    """Draws bits (B, tokens, d), bool, as independent Bernoulli variables; takes the likelier values at temperature 0.

    With `top_p` below 1 a token's d bits are drawn DRAWS times, and one draw is chosen at random among the likeliest share
    `top_p` of them, rounded up: a nucleus sample of the bits' joint distribution over 2^d codes.

    Each clip draws from its own generator, so its bits do not depend on the batch.
    """
    if temperature == 0:
        return logits > 0
    p = torch.sigmoid(logits / temperature)

    def uniform(*shape: int) -> Tensor:
        return onto(torch.stack([torch.rand(shape, generator=g) for g in generators]), logits.device)

    if top_p == 1:
        return uniform(*p.shape[1:]) < p
    bits = uniform(DRAWS, *p.shape[1:]) < p[:, None]  # (B, DRAWS, tokens, d)
    likelihood = torch.where(bits, p[:, None], 1 - p[:, None]).log().sum(-1)
    best_first = likelihood.argsort(dim=1, descending=True, stable=True)
    lot = (uniform(1, p.shape[1]) * math.ceil(top_p * DRAWS)).long()
    chosen = best_first.gather(1, lot)[..., None].expand(-1, -1, -1, p.shape[2])
    return bits.gather(1, chosen)[:, 0]


class Frame(NamedTuple):
    """A generated latent frame."""

    bits: Tensor  # (B, tokens of a frame, d) bool
    feature: Tensor  # (B, d, h, w), the sum of its residual maps


class FrameSampler:
    """Makes clips latent frame by latent frame, in order: reads frames that are given, samples the others.

    Args: as `sample_frames`.
    """

    def __init__(
        self, model: Generator, schedule: ScaleSchedule, prompts: Sequence[str], seeds: Sequence[int], sampling: Sampling,
        on_block: Callable[[], None],
    ):  # fmt: skip
        condition = model.condition(list(prompts))
        if not sampling.guidance.neutral:
            free = list(prompts) if sampling.negative is None else [sampling.negative] * len(prompts)
            dropped = torch.full((len(prompts),), sampling.negative is None)
            condition = torch.cat([condition, model.condition(free, dropped)])
        self.schedule, self.sampling, self.on_block = schedule, sampling, on_block
        self.cached = CachedGenerator(model, schedule, condition)
        self.copies = condition.shape[0] // len(prompts)  # rows of a clip: 2 with guidance
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.finished = condition.new_zeros(len(prompts), model.config.bits, *schedule.grid, dtype=torch.float32)

    def read(self, f: int, bits: Tensor) -> Frame:
        """Reads a given frame's bits (B, tokens of a frame, d) in a single pass, for later frames to see."""
        totals = [self.finished]  # what block k reads: the frame before, then the sums after each scale
        for k, part in enumerate(bits.split(self.schedule.tokens_per_scale, dim=1)):
            totals.append(self._add(totals[-1], part, k))
        self.cached.blocks(f, 0, [self._rows(total) for total in totals[:-1]], self._rows(self.finished))
        return self._finish([bits], totals[-1])

    def sample(self, f: int) -> Frame:
        """Samples a frame, scale by scale."""
        total, bits = self.finished, []
        for k in range(self.schedule.scales):
            logits = self.cached.block(f, k, self._rows(total), self._rows(self.finished))
            if self.copies == 2:
                logits = guided(logits, self.sampling.guidance.gamma(f, k, self.schedule))
            used = self.schedule.bits_of(k, logits.shape[-1])
            drawn = draw_bits(logits[..., :used], self.sampling.temperature, self.sampling.top_p, self.generators)
            bits.append(F.pad(drawn, (0, logits.shape[-1] - used)))
            total = self._add(total, bits[-1], k)
        return self._finish(bits, total)

    def _rows(self, feature: Tensor) -> Tensor:
        """(B, d, h, w) -> (R, d, h, w)."""
        return feature.repeat(self.copies, 1, 1, 1)

    def _add(self, total: Tensor, bits: Tensor, k: int) -> Tensor:
        """Adds the residual map of scale k to the frame's sum, which the first scale starts anew."""
        self.on_block()
        residual = residual_map(bits, k, self.schedule)
        return residual if k == 0 else total + residual

    def _finish(self, bits: list[Tensor], total: Tensor) -> Frame:
        self.finished = total
        return Frame(torch.cat(bits, dim=1), total)


@torch.no_grad()
def sample_frames(
    model: Generator,
    schedule: ScaleSchedule,
    prompts: Sequence[str],
    seeds: Sequence[int],
    sampling: Sampling = Sampling(),
    history: Tensor | None = None,
    on_block: Callable[[], None] = lambda: None,
) -> Iterator[Frame]:
    """Generates clips, latent frame by latent frame.

    Args:
        prompts: B texts or class names. seeds: B numbers; a clip depends on its own seed only.
        history: (B, tokens of the given frames, d) bool, bits of the first frames, for image-to-video and continuation.
        on_block: called after each block.
    Yields:
        a `Frame` for each of the schedule's frames, the given ones first.
    Raises:
        ValueError: if numbers of prompts, seeds and given clips differ, the given frames are not whole or too many, or
            the schedule has more scales than the model.
    """
    if len(seeds) != len(prompts):
        raise ValueError(f"each of the {len(prompts)} prompts needs a seed, got {len(seeds)}")
    if schedule.scales > model.config.scales:
        raise ValueError(f"this generator speaks {model.config.scales} scales, the schedule has {schedule.scales}")
    given = 0 if history is None else given_frames(history, schedule, len(prompts))
    sampler = FrameSampler(model, schedule, prompts, seeds, sampling, on_block)
    for f in range(schedule.latent_frames):
        yield sampler.read(f, history[:, schedule.frame(f)]) if f < given else sampler.sample(f)


def given_frames(history: Tensor, schedule: ScaleSchedule, clips: int) -> int:
    """Returns how many latent frames `history` holds.

    Raises:
        ValueError: if they are not those of as many clips, not whole, or more than the schedule has.
    """
    frames, rest = divmod(history.shape[1], schedule.tokens_per_frame)
    if len(history) != clips or rest or frames > schedule.latent_frames:
        raise ValueError(
            f"history must be bits ({clips}, tokens, d) of up to {schedule.latent_frames} whole frames of "
            f"{schedule.tokens_per_frame} tokens, got {tuple(history.shape)}"
        )
    return frames
