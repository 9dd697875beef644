"""Sampling: generates blocks one after another with a key/value cache, adaptive guidance, seeds, and given history.

Shapes: B clips, R rows of the transformer (2B with guidance: conditioned, then unconditioned), d bits.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from kit.generator.mask import View
from kit.generator.transformer import Generator
from kit.machine import onto
from kit.scales import TAU, ScaleSchedule, latent_frames, pixel_frames
from kit.tokenizer.quantizer import block_input, residual_map
from kit.values import from_values

DRAWS = 32  # candidate draws of a token's bits, of which `top_p` takes one


def check_number(key: str, value: float):
    """Checks that a value is a finite number. Raises ValueError, naming `key`, if not."""
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{key} must be a number, got {value!r}")


@dataclass(frozen=True)
class Guidance:
    """Temporal-spatial adaptive guidance gamma(f, k), linear everywhere (method.md section 5).

    Block (f, k) has the logits free + gamma (conditioned - free).

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
        for name in ("first", "last", "fine"):
            check_number(f"guidance.{name}", getattr(self, name))

    def gamma(self, f: int, k: int, schedule: ScaleSchedule) -> float:
        """The guidance of block (f, k)."""
        F, K = schedule.latent_frames, schedule.scales
        if self.kind == "constant":
            return self.first
        if self.kind == "falling":
            return self.first + (self.last - self.first) * (f * K + k) / max(F * K - 1, 1)
        start = self.first + (self.last - self.first) * f / max(F - 1, 1)
        return start + (self.fine - start) * k / max(K - 1, 1)

    @property
    def neutral(self) -> bool:
        """Whether guidance changes nothing, so that the unconditioned rows can be left out."""
        return self.kind == "constant" and self.first == 1.0


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
        if self.extend not in ("reencode", "positions"):
            raise ValueError(f"extend must be reencode or positions, got {self.extend!r}")
        if self.overlap is not None and (not isinstance(self.overlap, int) or self.overlap < 1 or (self.overlap - 1) % TAU):
            raise ValueError(f"overlap must be 1 + {TAU}n frames, got {self.overlap}")

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


class Cache:
    """Keys and values, already rotated, of all tokens that the current block may see, for every layer.

    Layout along the tokens: condition, then up to `window` finished frames, then the current frame. Once the window is full,
    a finished frame takes the place of the oldest one, so cost and memory per frame stop growing. A finished frame keeps all
    its blocks, or with `history: full` only its history block.
    """

    def __init__(self, model: Generator, schedule: ScaleSchedule, rows: int, dtype: torch.dtype):
        config, (h, w) = model.config, schedule.grid
        self.condition, self.full = model.condition.length, config.history == "full"
        self.finished = h * w if self.full else schedule.tokens_per_frame  # tokens that a finished frame keeps
        past = schedule.latent_frames - 1  # frames that the last frame can see
        self.window = past if config.window is None else min(config.window, past)
        length = self.condition + self.window * self.finished + schedule.tokens_per_frame
        shape = (config.layers, rows, config.heads, length, config.width // config.heads)
        self.keys = torch.empty(shape, dtype=dtype, device=model.start.device)
        self.values = torch.empty_like(self.keys)
        self.current = slice(0, 0)  # places of this pass's tokens
        self.history = slice(0, 0)  # places of a history block's tokens, which precede them in the same pass

    def start_frame(self, f: int):
        """Starts frame f. The frame before it replaces the oldest one if the window is full."""
        home = self.condition + min(f, self.window) * self.finished
        place = self.condition + (f - 1) % max(self.window, 1) * self.finished  # where the frame before is kept
        before = slice(place, place + self.finished)
        if f and self.window and self.full:
            self.history = before
        elif f > self.window and self.window:  # the frame before is finished: it replaces the oldest one
            for store in (self.keys, self.values):
                store[..., before, :] = store[..., home : home + self.finished, :].clone()
        self.current = slice(home, home)

    def expect(self, blocks: Sequence[int]) -> Tensor | None:
        """Reserves places for a pass and returns its mask (tokens, all visible); None if every token sees everything.

        Args:
            blocks: tokens of each of the current frame's blocks in this pass, without a history block before them.
        """
        begin, read = self.current.stop, self.history.stop - self.history.start
        ends = list(itertools.accumulate(blocks, initial=begin))
        self.current = slice(begin, ends[-1])
        if not read and len(blocks) == 1:
            return None
        # number of keys each token sees: a history block does not see the frame after it, a block not the later blocks
        seen = torch.repeat_interleave(torch.tensor(ends), torch.tensor([read, *blocks]))
        return onto(torch.arange(ends[-1]) < seen[:, None], self.keys.device)

    def layer(self, index: int):
        """Returns the function `remember` of a layer, which stores new keys and values and returns all visible ones."""

        def remember(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
            read = self.history.stop - self.history.start
            for store, new in ((self.keys, keys), (self.values, values)):
                store[index, :, :, self.history] = new[:, :, :read]
                store[index, :, :, self.current] = new[:, :, read:]
            return self.keys[index, :, :, : self.current.stop], self.values[index, :, :, : self.current.stop]

        return remember

    def close(self):
        """Ends a pass."""
        self.history = slice(0, 0)


class CachedGenerator:
    """Runs a generator block by block; its logits equal those of `Generator.forward` over the whole clip.

    Args:
        condition: (R, S, D) from `model.condition`.
    """

    def __init__(self, model: Generator, schedule: ScaleSchedule, condition: Tensor):
        self.model, self.schedule, self.layout = model, schedule, model.layout(schedule)
        self.rotary = model.rotary(self.layout)
        dtype = condition.dtype
        if torch.is_autocast_enabled(condition.device.type):
            dtype = torch.get_autocast_dtype(condition.device.type)
        self.cache = Cache(model, schedule, condition.shape[0], dtype)
        self.earlier = None  # finished sum of the frame before the previous one
        self._run(condition, 0, [condition.shape[1]])

    def block(self, f: int, k: int, total: Tensor, before: Tensor) -> Tensor:
        """Computes the logits (R, h_k * w_k, d) of block (f, k); blocks must come in order.

        Args:
            total: (R, d, h, w), sum of the frame's residual maps so far; not read for k = 0.
            before: (R, d, h, w), the finished sum of the frame before, zero for the first frame.
        """
        return self.blocks(f, k, [total], before)

    def blocks(self, f: int, first: int, totals: Sequence[Tensor], before: Tensor) -> Tensor:
        """Computes the logits (R, tokens, d) of blocks (f, first), (f, first + 1), ..., one per total, in a single pass.

        This is for given frames, whose totals are all known. Otherwise as `block`.
        """
        inherit, blocks = self.model.config.inherit, [self.layout.block(f, first + i) for i in range(len(totals))]
        inputs = [block_input(b.k, total, before, (b.h, b.w), inherit) for total, b in zip(totals, blocks, strict=True)]
        begin, sizes = blocks[0].start, [b.h * b.w for b in blocks]
        if first == 0:
            self.cache.start_frame(f)
            if self.cache.history.stop:
                past = self.layout.block(f - 1, self.schedule.scales)
                begin = past.start
                inputs.insert(0, block_input(past.k, before, self.earlier, self.schedule.grid, inherit))
            self.earlier = before
        scale = onto(self.model.scales_of(self.layout)[begin : blocks[-1].stop], before.device)
        x = self.model.embed(torch.cat(inputs, dim=1), scale, first=blocks[0].stop if begin == 0 else 0)
        x = self._run(x, self.model.condition.length + begin, sizes)
        return self.model.logits(x[:, -sum(sizes) :])

    def _run(self, x: Tensor, position: int, blocks: Sequence[int]) -> Tensor:
        """Runs the layers on tokens (R, tokens, D), which see the cache and themselves; `blocks` as for `Cache.expect`."""
        rotary = tuple(t[position : position + x.shape[1]] for t in self.rotary)
        views = [View(slice(None), slice(None), self.cache.expect(blocks))]
        for i, layer in enumerate(self.model.layers):
            x = layer(x, rotary, views, self.cache.layer(i))
        self.cache.close()
        return x


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


def guided(logits: Tensor, gamma: float) -> Tensor:
    """Guides logits (2B, tokens, d), conditioned ones first: free + gamma (conditioned - free), (B, tokens, d)."""
    conditioned, free = logits.chunk(2)
    return free + gamma * (conditioned - free)


class FrameSampler:
    """Makes clips latent frame by latent frame, in order: reads frames that are given, samples the others.

    Args: as `sample_frames`.
    """

    def __init__(
        self, model: Generator, schedule: ScaleSchedule, prompts: Sequence[str], seeds: Sequence[int], how: Sampling,
        on_block: Callable[[], None],
    ):  # fmt: skip
        condition = model.condition(list(prompts))
        if not how.guidance.neutral:
            free = list(prompts) if how.negative is None else [how.negative] * len(prompts)
            dropped = torch.full((len(prompts),), how.negative is None)
            condition = torch.cat([condition, model.condition(free, dropped)])
        self.schedule, self.how, self.on_block = schedule, how, on_block
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
                logits = guided(logits, self.how.guidance.gamma(f, k, self.schedule))
            used = self.schedule.bits[k] if self.schedule.bits else logits.shape[-1]
            drawn = draw_bits(logits[..., :used], self.how.temperature, self.how.top_p, self.generators)
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
    how: Sampling = Sampling(),
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
    sampler = FrameSampler(model, schedule, prompts, seeds, how, on_block)
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
