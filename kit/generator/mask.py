"""Attention masks: block-causal attention, its window, and the Random Frame Mask (VideoAR eq. 9)."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from kit.draws import Draws
from kit.machine import made_to_last, onto
from kit.scales import ScaleSchedule

CONDITION = -1  # the frame number that stands for the condition
SHORT = 2048  # up to this many tokens, a single attention over all of them is no slower (benchmarks/attention.py)


def visible(
    query_f: Tensor, query_k: Tensor, key_f: Tensor, key_k: Tensor, window: int | None = None, history_k: int | None = None
) -> Tensor:
    """Returns which query tokens, at frame f and scale k, see which key tokens. Arguments broadcast; the result is bool.

    A token sees the condition; its own frame's coarser blocks and its own block; all blocks of the `window` frames
    before (None: of all frames before). The condition sees itself.

    With `history: full` each frame ends with a history block, of scale `history_k`, the only block of the frame that later
    frames see. It is computed in the same pass as the next frame's first block; it sees the same frames as that block, and
    itself.
    """
    own = (key_f == query_f) & (key_k <= query_k)
    if history_k is not None:
        own &= (query_k < history_k) | (key_k == history_k)
        query_f = query_f + (query_k == history_k)
    past = (key_f < query_f) if window is None else (key_f < query_f) & (key_f >= query_f - window)
    if history_k is not None:
        past &= key_k == history_k
    return (key_f == CONDITION) | own | past


def draw_kept_frames(frames: int, p_mask: float, draws: Draws) -> Tensor:
    """Draws which frames later ones may see, (B, F) bool; each is dropped with probability `p_mask`. Training only."""
    return draws.rand(frames) >= p_mask


class View(NamedTuple):
    """A group of a sequence's queries and the keys that they see.

    Fields: queries; keys, a slice or token numbers (n,); mask, True where a query may see a key, (queries, keys) or (B, 1,
        queries, keys), None if every query sees every key.
    """

    queries: slice
    keys: slice | Tensor
    mask: Tensor | None


class Part(NamedTuple):
    """A `View` in which no frame is dropped, and what is needed to drop some.

    Fields: view; query_f, key_f, frame numbers of its queries (queries, 1) and keys (keys,); looks_back, whether it has
        keys of other frames, which can be dropped.
    """

    view: View
    query_f: Tensor
    key_f: Tensor
    looks_back: bool


def attention_views(
    layout: ScaleSchedule, condition_length: int, tokens: int, window: int | None = None, kept: Tensor | None = None,
    device: torch.device | str = "cpu",
) -> list[View]:  # fmt: skip
    """Splits the attention of a sequence into views.

    Up to `SHORT` tokens there is one view of all. A longer sequence has a view for the condition and for each frame, with
    the keys up to that frame: nearly half of a full mask would be hidden, and its size is the square of the length.

    Args:
        layout: the schedule, for `history: full` with history blocks (`ScaleSchedule.layout`).
        tokens: how many of its tokens are in the sequence; the last frame's history block is not.
        kept: (B, F) bool from `draw_kept_frames`; a frame always sees itself, and all see the condition.
    Raises:
        ValueError: if the sequence ends within a block.
    """
    # cached for short sequences, which repeat from step to step; masks of long ones are too large to keep
    parts = (short_parts if condition_length + tokens <= SHORT else parts_of)(
        layout, condition_length, tokens, window, torch.device(device)
    )
    views = []
    for view, query_f, key_f, looks_back in parts:
        if kept is not None and looks_back:
            shown = onto(torch.cat([kept.new_ones(len(kept), 1), kept], dim=1), device)[:, key_f + 1]  # (B, keys)
            may = shown[:, None] | (query_f == key_f)
            view = view._replace(mask=(may if view.mask is None else may & view.mask)[:, None])
        views.append(view)
    return views


def parts_of(
    layout: ScaleSchedule, condition_length: int, tokens: int, window: int | None, device: torch.device
) -> list[Part]:
    """Computes the views of `attention_views` before frames are dropped; same arguments. Raises likewise."""
    S, blocks = condition_length, [b for b in layout.blocks if b.stop <= tokens]
    if blocks[-1].stop != tokens:
        raise ValueError(f"{tokens} tokens end within a block of {layout}")
    spans = [(0, S), *((S + b.start, S + b.stop) for b in blocks)]
    here = functools.partial(torch.tensor, device="cpu")  # whatever the default device: Python reads the block rule below
    f, k = here([CONDITION, *(b.f for b in blocks)]), here([0, *(b.k for b in blocks)])
    lengths = here([stop - start for start, stop in spans])
    token_f, token_k = (onto(x.repeat_interleave(lengths), device) for x in (f, k))
    rule = functools.partial(visible, window=window, history_k=layout.history_k)
    sees = rule(f[:, None], k[:, None], f[None], k[None])  # (blocks, blocks)
    frames = f.unique()[not S :]
    parts = []
    for group in frames[None] if S + tokens <= SHORT else frames[:, None]:
        own = torch.isin(f, group).nonzero().flatten()
        seen = sees[own].any(0)
        queries = slice(spans[own[0]][0], spans[own[-1]][1])
        keys = joined([span for span, is_seen in zip(spans, seen.tolist(), strict=True) if is_seen], device)
        key_f, query_f = token_f[keys], token_f[queries, None]
        mask = None if sees[own][:, seen].all() else rule(query_f, token_k[queries, None], key_f, token_k[keys])
        looks_back = bool((sees[own] & (f[own, None] != f) & (f != CONDITION)).any())
        parts.append(Part(View(queries, keys, mask), query_f, key_f, looks_back))
    return parts


short_parts = functools.lru_cache(16)(made_to_last(parts_of))


def joined(spans: list[tuple[int, int]], device: torch.device | str) -> slice | Tensor:
    """Joins spans of token numbers, in order: a slice if they are contiguous, else all numbers (n,)."""
    if all(before[1] == after[0] for before, after in zip(spans, spans[1:])):
        return slice(spans[0][0], spans[-1][1])
    return torch.cat([torch.arange(start, stop, device=device) for start, stop in spans])
