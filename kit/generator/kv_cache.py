"""The generator run block by block: keys and values of all that a block may see are kept, so each token is computed once.

Shapes: R rows, d bits, D width of the transformer.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from kit.generator.mask import View
from kit.generator.transformer import Generator
from kit.machine import onto
from kit.scales import ScaleSchedule
from kit.tokenizer.quantizer import block_input


class Cache:
    """Keys and values, already rotated, of all tokens that the current block may see, for every layer.

    Layout along the tokens: condition, then up to `window` finished frames, then the current frame. Once the window is full,
    a finished frame takes the place of the oldest one, so cost and memory per frame stop growing. A finished frame keeps all
    its blocks, or with `history: full` only its history block.
    """

    def __init__(self, model: Generator, schedule: ScaleSchedule, rows: int, dtype: torch.dtype):
        config, (h, w) = model.config, schedule.grid
        self.condition, self.full = model.condition.length, config.history == "full"
        self.frame_tokens = h * w if self.full else schedule.tokens_per_frame  # tokens that a finished frame keeps
        past = schedule.latent_frames - 1  # frames that the last frame can see
        self.window = past if config.window is None else min(config.window, past)
        length = self.condition + self.window * self.frame_tokens + schedule.tokens_per_frame
        shape = (config.layers, rows, config.heads, length, config.width // config.heads)
        self.keys = torch.empty(shape, dtype=dtype, device=model.start.device)
        self.values = torch.empty_like(self.keys)
        self.current = slice(0, 0)  # places of this pass's tokens
        self.history = slice(0, 0)  # places of a history block's tokens, which precede them in the same pass

    def start_frame(self, f: int):
        """Starts frame f. The frame before it replaces the oldest one if the window is full."""
        home = self.condition + min(f, self.window) * self.frame_tokens
        place = self.condition + (f - 1) % max(self.window, 1) * self.frame_tokens  # where the frame before is kept
        before = slice(place, place + self.frame_tokens)
        if f and self.window and self.full:
            self.history = before
        elif f > self.window and self.window:  # the frame before is finished: it replaces the oldest one
            for store in (self.keys, self.values):
                store[..., before, :] = store[..., home : home + self.frame_tokens, :].clone()
        self.current = slice(home, home)

    def reserve(self, blocks: Sequence[int]) -> Tensor | None:
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

    def update_of(self, index: int):
        """Returns the function `update_cache` of a layer, which stores new keys and values and returns all visible ones."""

        def update_cache(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
            read = self.history.stop - self.history.start
            for store, new in ((self.keys, keys), (self.values, values)):
                store[index, :, :, self.history] = new[:, :, :read]
                store[index, :, :, self.current] = new[:, :, read:]
            return self.keys[index, :, :, : self.current.stop], self.values[index, :, :, : self.current.stop]

        return update_cache

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
                past = self.layout.block(f - 1, self.layout.history_k)
                begin = past.start
                inputs.insert(0, block_input(past.k, before, self.earlier, self.schedule.grid, inherit))
            self.earlier = before
        scale = onto(self.model.scales_of(self.layout)[begin : blocks[-1].stop], before.device)
        x = self.model.embed(torch.cat(inputs, dim=1), scale, first=blocks[0].stop if begin == 0 else 0)
        x = self._run(x, self.model.condition.length + begin, sizes)
        return self.model.logits(x[:, -sum(sizes) :])

    def _run(self, x: Tensor, position: int, blocks: Sequence[int]) -> Tensor:
        """Runs the layers on tokens (R, tokens, D), which see the cache and themselves; `blocks` as for `Cache.reserve`."""
        rotary = tuple(t[position : position + x.shape[1]] for t in self.rotary)
        views = [View(slice(None), slice(None), self.cache.reserve(blocks))]
        for i, layer in enumerate(self.model.layers):
            x = layer(x, rotary, views, self.cache.update_of(i))
        self.cache.close()
        return x
