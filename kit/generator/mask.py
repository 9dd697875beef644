"""Who sees whom: block-causal attention, its window, and the Random Frame Mask (VideoAR eq. 9)."""

from __future__ import annotations

import torch
from torch import Tensor

from kit.draws import Draws
from kit.scales import ScaleSchedule

CONDITION = -1  # the frame number that stands for the condition


def visible(
    query_f: Tensor, query_k: Tensor, key_f: Tensor, key_k: Tensor, window: int | None = None, history_k: int | None = None
) -> Tensor:
    """The rule. Arguments broadcast; returns bool.

    A token sees the condition; its own frame's coarser blocks and its own block; all blocks of the `window` frames
    before (None: of all frames before). The condition sees itself.

    With `history: full` each frame ends with a history block, of scale `history_k`: it is all that later frames see of the
    frame. It rides in the pass of the next frame's first block and sees the frames that this one sees, and itself.
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
    """(B, F) bool: which frames may be seen by later ones; each is dropped with probability `p_mask`. Training only."""
    return draws.rand(frames) >= p_mask


def attention_mask(
    schedule: ScaleSchedule, condition_length: int, window: int | None = None, kept: Tensor | None = None,
    history: str = "scales",
) -> Tensor:  # fmt: skip
    """True where attention is allowed.

    Args:
        schedule: with the history blocks, for `full` (`ScaleSchedule.with_history`).
        kept: (B, F) bool from `draw_kept_frames`; a frame always sees itself, and all see the condition.
    Returns:
        (S + L, S + L), or (B, 1, S + L, S + L) with `kept`. Rows are queries.
    """
    f, k, _, _ = schedule.coordinates.unbind(1)
    condition = torch.full((condition_length,), CONDITION)
    f, k = torch.cat([condition, f]), torch.cat([torch.zeros_like(condition), k])
    history_k = schedule.scales - 1 if history == "full" else None
    mask = visible(f[:, None], k[:, None], f[None], k[None], window, history_k)
    if kept is None:
        return mask
    mask = mask.to(kept.device)
    f = f.to(kept.device)
    shown = torch.cat([kept.new_ones(len(kept), 1), kept], dim=1)[:, f + 1]  # (B, S + L), by the key's frame
    return (mask & (shown[:, None, :] | (f[:, None] == f[None])))[:, None]
