"""Sampling: blocks one after another with a key/value cache, adaptive guidance, seeds, and given history.

Shapes: B clips, R rows of the transformer (2B with guidance: conditioned, then unconditioned), d bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from kit.generator.transformer import Generator
from kit.scales import ScaleSchedule
from kit.tokenizer.quantizer import next_input, residual_map, used_of


@dataclass(frozen=True)
class Guidance:
    """Temporal-spatial adaptive guidance gamma(f, k), linear everywhere (method.md section 5).

    Args:
        kind: `rising` (class-conditional, as on UCF-101): gamma of a frame's first scale goes from `first` at the first
            frame to `last` at the last one, then to `fine` over the scales of the frame. `falling` (text to video): from
            `first` to `last` over all blocks in their order. `constant`: `first` everywhere.
        first, last, fine: values of gamma; 1 is no guidance.
    """

    kind: str = "constant"
    first: float = 1.0
    last: float = 1.0
    fine: float = 1.0

    def __post_init__(self):
        if self.kind not in ("rising", "falling", "constant"):
            raise ValueError(f"guidance.kind must be 'rising', 'falling' or 'constant', got {self.kind!r}")

    def gamma(self, f: int, k: int, schedule: ScaleSchedule) -> float:
        """The guidance of block (f, k)."""
        F, K = schedule.frames, schedule.scales
        if self.kind == "constant":
            return self.first
        if self.kind == "falling":
            return self.first + (self.last - self.first) * (f * K + k) / max(F * K - 1, 1)
        start = self.first + (self.last - self.first) * f / max(F - 1, 1)
        return start + (self.fine - start) * k / max(K - 1, 1)

    @property
    def neutral(self) -> bool:
        """Whether it changes nothing, so that the unconditioned rows can be left out."""
        return self.kind == "constant" and self.first == 1.0


class Cache:
    """Keys and values of all that the current block may see, for every layer, already rotated.

    Layout along the tokens: condition, then up to `window` finished frames, then the frame at work. Once the window is
    full a finished frame takes the place of the oldest, so cost and memory per frame stop growing.
    """

    def __init__(self, model: Generator, schedule: ScaleSchedule, rows: int, dtype: torch.dtype):
        config = model.config
        self.condition, self.per_frame = model.condition.length, schedule.tokens_per_frame
        past = schedule.frames - 1  # frames that the last one can look back at
        self.window = past if config.window is None else min(config.window, past)
        length = self.condition + (self.window + 1) * self.per_frame
        shape = (config.layers, rows, config.heads, length, config.width // config.heads)
        self.keys = torch.empty(shape, dtype=dtype, device=model.start.device)
        self.values = torch.empty_like(self.keys)
        self.begin = 0  # where the next tokens go

    def start_frame(self, f: int):
        """Opens frame f; what is older than the window gives way."""
        home = self.condition + min(f, self.window) * self.per_frame
        if f > self.window and self.window:  # the frame at work is finished: it moves over the oldest one
            oldest = self.condition + (f - 1) % self.window * self.per_frame
            for store in (self.keys, self.values):
                finished = store[..., home : home + self.per_frame, :].clone()
                store[..., oldest : oldest + self.per_frame, :] = finished
        self.begin = home

    def layer(self, index: int):
        """`remember` of that layer: stores new keys and values and returns all visible ones."""

        def remember(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
            end = self.begin + keys.shape[2]
            self.keys[index, :, :, self.begin : end] = keys
            self.values[index, :, :, self.begin : end] = values
            return self.keys[index, :, :, :end], self.values[index, :, :, :end]

        return remember


class CachedGenerator:
    """The generator, block by block: its logits equal those of `Generator.forward` over the whole clip.

    Args:
        condition: (R, S, D) from `model.condition`.
    """

    def __init__(self, model: Generator, schedule: ScaleSchedule, condition: Tensor):
        self.model, self.schedule = model, schedule
        self.rotary = model.rotary(schedule)
        self.cache = None
        self.rows = condition.shape[0]
        self._run(condition, 0)

    def block(self, f: int, k: int, total: Tensor, before: Tensor) -> Tensor:
        """Logits (R, h_k * w_k, d) of block (f, k); blocks must come in order.

        Args:
            total: (R, d, h, w), sum of the frame's residual maps so far; for k = 0 that of the frame before.
            before: (R, d, h, w), the finished sum of the frame before.
        """
        b = self.schedule.block(f, k)
        scale = torch.full((b.h * b.w,), k, device=total.device)
        inputs = next_input(total, (b.h, b.w), before if self.model.config.inherit == "all" else None)
        if k == 0:
            self.cache.start_frame(f)
        x = self.model.embed(inputs, scale, first=b.stop if b.start == 0 else 0)
        return self.model.read(self._run(x, self.model.condition.length + b.start))

    def _run(self, x: Tensor, position: int) -> Tensor:
        """Hidden states (R, tokens, D) -> the same, seeing the cache and themselves."""
        rotary = tuple(t[position : position + x.shape[1]] for t in self.rotary)
        if self.cache is None:
            dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
            self.cache = Cache(self.model, self.schedule, self.rows, dtype)
        for i, layer in enumerate(self.model.layers):
            x = layer(x, rotary, None, self.cache.layer(i))
        self.cache.begin += x.shape[1]
        return x


def draw_bits(logits: Tensor, temperature: float, generators: list[torch.Generator]) -> Tensor:
    """Bits from independent Bernoulli variables, (B, tokens, d) bool; the likelier ones at temperature 0.

    Each clip draws from its own generator, so it comes out the same in any batch.
    """
    if not temperature >= 0:
        raise ValueError(f"temperature must be 0 or more, got {temperature}")
    if temperature == 0:
        return logits > 0
    u = torch.stack([torch.rand(logits.shape[1:], generator=g) for g in generators]).to(logits.device)
    return u < torch.sigmoid(logits / temperature)


class Frame(NamedTuple):
    """A generated latent frame."""

    bits: Tensor  # (B, tokens of a frame, d) bool
    feature: Tensor  # (B, d, h, w), the sum of its residual maps


@torch.no_grad()
def sample_frames(
    model: Generator,
    schedule: ScaleSchedule,
    prompts: list[str],
    seeds: list[int],
    guidance: Guidance = Guidance(),
    temperature: float = 1.0,
    history: Tensor | None = None,
) -> Iterator[Frame]:
    """Generates clips, latent frame by latent frame.

    Args:
        prompts: B texts or class names. seeds: B numbers; a clip depends on its own seed only.
        history: (B, tokens of the given frames, d) bool, bits of the first frames, for image-to-video and continuation.
    Yields:
        a `Frame` for each of the schedule's frames, the given ones first.
    Raises:
        ValueError: if numbers of prompts, seeds and given clips differ, the given frames are not whole or too many, or
            the schedule has not the model's number of scales.
    """
    B, h, w = len(prompts), *schedule.grid
    if len(seeds) != B:
        raise ValueError(f"each of the {B} prompts needs a seed, got {len(seeds)}")
    if schedule.scales != model.config.scales:
        raise ValueError(f"this generator speaks {model.config.scales} scales, the schedule has {schedule.scales}")
    if history is not None:
        given, rest = divmod(history.shape[1], schedule.tokens_per_frame)
        if len(history) != B or rest or given > schedule.frames:
            raise ValueError(
                f"history must be bits ({B}, tokens, d) of up to {schedule.frames} whole frames of "
                f"{schedule.tokens_per_frame} tokens, got {tuple(history.shape)}"
            )
    condition = model.condition(prompts)
    if not guidance.neutral:
        condition = torch.cat([condition, model.condition(prompts, torch.ones(B, dtype=torch.bool))])
    rows = condition.shape[0] // B
    cached = CachedGenerator(model, schedule, condition)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    total = condition.new_zeros(B, model.config.bits, h, w, dtype=torch.float32)

    for f in range(schedule.frames):
        bits, before = [], total
        for k in range(schedule.scales):
            logits = cached.block(f, k, total.repeat(rows, 1, 1, 1), before.repeat(rows, 1, 1, 1))
            b = schedule.block(f, k)
            if history is not None and b.stop <= history.shape[1]:
                bits.append(history[:, b.slice])
            else:
                if rows == 2:
                    conditioned, free = logits.chunk(2)
                    logits = free + guidance.gamma(f, k, schedule) * (conditioned - free)
                bits.append(used_of(draw_bits(logits, temperature, generators), k, schedule))
            residual = residual_map(bits[-1], k, schedule)
            total = residual if k == 0 else total + residual
        yield Frame(torch.cat(bits, dim=1), total)
