"""The scale schedule: the blocks of a clip. This is the only place that knows grids, lengths and offsets.

A clip has T = 1 + TAU * n pixel frames and F = 1 + n latent frames; each latent frame is written as K residual maps of
growing size (h_k, w_k). Block (f, k) is latent frame f at scale k, both counted from 0. The sequence holds all blocks
of frame 0 from coarse to fine, then those of frame 1, and so on.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from kit.machine import made_to_last

TAU = 4  # pixel frames per latent frame, after the first frame, which is coded alone


def latent_frames(frames: int) -> int:
    """Returns F, the number of latent frames of a clip of T pixel frames.

    Raises:
        ValueError: if T is not 1 + 4n.
    """
    if frames < 1 or (frames - 1) % TAU:
        below = max(1, (frames - 1) // TAU * TAU + 1)
        raise ValueError(f"a clip must have 1 + {TAU}n frames, got {frames}; use {below} or {below + TAU}")
    return 1 + (frames - 1) // TAU


def pixel_frames(latents: int) -> int:
    """Returns T, the number of pixel frames of a clip of F latent frames."""
    return 1 + TAU * (latents - 1)


def whole_groups(frames: int, tau: int = TAU) -> int:
    """Rounds a number of pixel frames up to the next T = 1 + tau * n; tau is 1 for an image tokenizer."""
    return frames + (1 - frames) % tau


@dataclass(frozen=True)
class Block:
    """Block (f, k): tokens [start, stop) of the sequence, an (h, w) grid in row-major order."""

    f: int
    k: int
    h: int
    w: int
    start: int
    stop: int

    @property
    def slice(self) -> slice:
        return slice(self.start, self.stop)


@dataclass(frozen=True)
class ScaleSchedule:
    """Schedule of a clip: F latent frames, each of K scales (VideoAR eq. 5).

    Args:
        latent_frames: F, number of latent frames.
        grids: (h_k, w_k) from coarse to fine; the last one is the latent grid (h, w).
        bits: d_k, how many of a token's d bits, its first ones, each scale has; empty: all d. The other bits are False, add
            nothing to the sum, and are not predicted.
        history: whether the last grid is that of history blocks, see `with_history`.
    Raises:
        ValueError: if there is no frame or no scale, the grids shrink, or `bits` is not one positive number per scale.
    """

    latent_frames: int
    grids: tuple[tuple[int, int], ...]
    bits: tuple[int, ...] = ()
    history: bool = False

    def __post_init__(self):
        object.__setattr__(self, "latent_frames", operator.index(self.latent_frames))  # 4.0 and numpy's 4 equal 4 in caches
        object.__setattr__(self, "grids", tuple((int(h), int(w)) for h, w in self.grids))
        object.__setattr__(self, "bits", tuple(self.bits))
        if self.bits and (len(self.bits) != len(self.grids) or min(self.bits) < 1):
            raise ValueError(f"each of the {len(self.grids)} scales needs 1 bit or more, got {self.bits}")
        if self.latent_frames < 1 or not self.grids:
            raise ValueError(f"a schedule needs at least one frame and one scale, got {self.latent_frames} and {self.grids}")
        for (h, w), (next_h, next_w) in zip(self.grids, self.grids[1:]):
            if next_h < h or next_w < w:
                raise ValueError(f"scales must grow from coarse to fine, got {self.grids}")

    @classmethod
    def from_sides(
        cls,
        latent_frames: int,
        sides: list[int] | tuple[int, ...],
        grid: tuple[int, int] | None = None,
        bits: tuple[int, ...] = (),
    ) -> ScaleSchedule:
        """Builds a schedule from one side per scale; on a non-square latent `grid` the other side follows its aspect ratio.

        Args:
            sides: for a square grid the sides h_k = w_k; otherwise the shorter side of each scale.
            grid: (h, w); None: square, the last side.
        Raises:
            ValueError: if the grid's shorter side is not the last of `sides`; else as the class.
        """
        h, w = grid or (sides[-1], sides[-1])
        short = min(h, w)
        if short != sides[-1]:
            raise ValueError(f"the last scale {sides[-1]} must be the shorter side of the latent grid {h} x {w}")
        return cls(latent_frames, tuple((max(1, round(s * h / short)), max(1, round(s * w / short))) for s in sides), bits)

    @property
    def scales(self) -> int:
        """K, the number of scales."""
        return len(self.grids)

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w) of the latent grid."""
        return self.grids[-1]

    @property
    def tokens_per_scale(self) -> list[int]:
        """Tokens of one frame at each scale, from coarse to fine."""
        return [h * w for h, w in self.grids]

    @property
    def tokens_per_frame(self) -> int:
        return sum(self.tokens_per_scale)

    @property
    def length(self) -> int:
        """L, tokens of the whole clip, without the condition."""
        return self.latent_frames * self.tokens_per_frame

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        """All blocks in the order they are generated."""
        return tuple(self._walk())

    def _walk(self) -> Iterator[Block]:
        start = 0
        for f in range(self.latent_frames):
            for k, (h, w) in enumerate(self.grids):
                yield Block(f, k, h, w, start, start + h * w)
                start += h * w

    def block(self, f: int, k: int) -> Block:
        """Returns block (f, k). Raises IndexError outside the schedule."""
        if not (0 <= f < self.latent_frames and 0 <= k < self.scales):
            raise IndexError(f"no block ({f}, {k}) among {self.latent_frames} frames of {self.scales} scales")
        return self.blocks[f * self.scales + k]

    def frame(self, f: int) -> slice:
        """Returns the slice of all tokens of frame f."""
        return slice(f * self.tokens_per_frame, (f + 1) * self.tokens_per_frame)

    def with_latent_frames(self, latent_frames: int) -> ScaleSchedule:
        """Returns a schedule of the same scales with another number of latent frames."""
        return replace(self, latent_frames=latent_frames)

    def layout(self, history: str) -> ScaleSchedule:
        """Returns the blocks of a generator's sequence: these, and with `history: full` those of `with_history`."""
        return self.with_history() if history == "full" else self

    @functools.lru_cache(64)  # noqa: B019 (small and frozen)
    def with_history(self) -> ScaleSchedule:
        """Returns the layout of a generator with `history: full`: each frame ends with one more block, at full grid.

        This history block carries the frame's finished sum and is not predicted. The last frame's, which no frame reads, is
        left out of the sequence.
        """
        return ScaleSchedule(self.latent_frames, (*self.grids, self.grid), history=True)

    @property
    def history_k(self) -> int | None:
        """k of the history blocks; None: there are none."""
        return self.scales - 1 if self.history else None

    @property
    def sequence_length(self) -> int:
        """Tokens of a generator's sequence: L without the last frame's history block."""
        return self.length - (self.tokens_per_scale[-1] if self.history else 0)

    def bits_of(self, k: int, d: int) -> int:
        """Returns d_k, how many of a token's d bits scale k has."""
        return self.bits[k] if self.bits else d

    def used_bits(self, d: int) -> torch.Tensor:
        """Returns which bits of each token its scale has, (L, d) bool."""
        scale = self.scale_of_tokens
        used = torch.tensor([self.bits_of(k, d) for k in range(self.scales)], device=scale.device)[scale]
        return torch.arange(d, device=scale.device) < used[:, None]

    @cached_property
    @made_to_last
    def coordinates(self) -> torch.Tensor:
        """(L, 4) int64: f, k, y, x of every token; y, x on the grid of its own scale."""
        parts = []
        for b in self.blocks:
            y, x = torch.meshgrid(torch.arange(b.h), torch.arange(b.w), indexing="ij")
            head = torch.tensor([b.f, b.k]).expand(b.h * b.w, 2)
            parts.append(torch.cat([head, torch.stack([y.flatten(), x.flatten()], 1)], 1))
        return torch.cat(parts)

    @property
    def frame_of_tokens(self) -> torch.Tensor:
        """(L,) int64: f of every token."""
        return self.coordinates[:, 0]

    @property
    def scale_of_tokens(self) -> torch.Tensor:
        """(L,) int64: k of every token."""
        return self.coordinates[:, 1]

    def __str__(self) -> str:
        scales = " ".join(f"{h}x{w}" if h != w else f"{h}" for h, w in self.grids)
        return f"{self.latent_frames} latent frames x scales {scales} = {self.length} tokens in {len(self.blocks)} steps"
