"""Multi-scale Temporal RoPE: positions of tokens, and the rotation of their queries and keys (VideoAR eq. 7, figure 2).

Condition token i is at (i, i, i): rotated by i on every axis, as in ordinary RoPE, but with each axis's frequencies. Token
(f, k, y, x) is at (f, y, x) + |c|, with y, x on the raw integer grid of its own scale and |c| the condition's length.
Scales of a frame share f; only the learned scale embedding tells them apart.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kit.scales import ScaleSchedule
from kit.values import check_choice

ALIGN = ("grid", "center", "sequence")
BASE = 10_000.0  # of the frequencies, as in RoPE


def positions(schedule: ScaleSchedule, condition_length: int, align: str = "grid") -> Tensor:
    """Returns the position (time, height, width) of every condition token and schedule token, (S + L, 3) float32.

    Args:
        align: `grid` is the paper: raw indices, so a coarse grid lies in the corner of the plane. `center` puts each
            coarse cell at the centre of the area it covers on the finest grid. `sequence` uses the index in the sequence
            on all axes; we take it for the baseline of the paper's ablation, which does not name it.
    Raises:
        ValueError: for another `align`.
    """
    check_choice("align", align, ALIGN)
    if align == "sequence":
        return torch.arange(condition_length + schedule.length, dtype=torch.float32)[:, None].expand(-1, 3)
    f, k, y, x = schedule.coordinates.unbind(1)
    tokens = torch.stack([f, y, x], dim=1).float()
    if align == "center":
        h, w = schedule.grid
        cell = torch.tensor([(h / hk, w / wk) for hk, wk in schedule.grids], device=k.device)[k]
        tokens[:, 1:] = (tokens[:, 1:] + 0.5) * cell - 0.5
    condition = torch.arange(condition_length, dtype=torch.float32, device=tokens.device)[:, None].expand(-1, 3)
    return torch.cat([condition, tokens + condition_length])


def rotary_table(positions: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """Returns cosine and sine of the rotation angles, each (tokens, head_dim / 2) float32.

    A quarter of the pairs rotates with time; height and width share the rest evenly. Pair i of an axis with n pairs has the
    frequency BASE^(-i / n).
    """
    pairs = head_dim // 2
    time = pairs // 4
    height = (pairs - time) // 2
    angles = []
    for axis, n in enumerate((time, height, pairs - time - height)):
        frequencies = BASE ** (-torch.arange(n, dtype=torch.float32, device=positions.device) / n)
        angles.append(positions[:, axis, None] * frequencies)
    angle = torch.cat(angles, dim=1)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Rotates each pair (i, i + head_dim / 2) of x (B, N, tokens, head_dim) by its token's angles, from `rotary_table`."""
    cos, sin = (t.to(x.dtype) for t in table)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)
