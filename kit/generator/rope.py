"""Multi-scale Temporal RoPE: where a token sits, and how its queries and keys are turned.

Condition token i sits at (i, i, i): turned by i alone, as in ordinary RoPE, but with each axis's frequencies. Token
(f, k, y, x) sits at (f, y, x) + |c|, with y, x on the raw integer grid of its own scale and |c| the condition's length;
scales of a frame share f and are told apart by the learned scale embedding alone (VideoAR eq. 7, figure 2).
"""

from __future__ import annotations

import torch
from torch import Tensor

from kit.scales import ScaleSchedule

ALIGN = ("grid", "center", "sequence")


def positions(schedule: ScaleSchedule, condition_length: int, align: str = "grid") -> Tensor:
    """(S + L, 3) float32: time, height, width of every condition token and every token of the schedule.

    Args:
        align: `grid` is the paper: raw indices, so a coarse grid lies in the corner of the plane. `center` puts each
            coarse cell at the centre of what it covers on the finest grid. `sequence` has the place in the sequence on
            all axes: what the paper's ablation compares with, as far as it says.
    Raises:
        ValueError: for another `align`.
    """
    if align not in ALIGN:
        raise ValueError(f"align must be one of {', '.join(ALIGN)}, got {align!r}")
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


BASE = 10_000.0


def rotary_table(positions: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """Cosine and sine, each (tokens, head_dim / 2) float32.

    A quarter of the pairs turns with time, the rest is shared evenly by height and width; each axis has its own ladder
    of frequencies from 1 down to 1 / BASE.
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
    """Turns each pair (i, i + head_dim / 2) of (B, N, tokens, head_dim) by its token's angles."""
    cos, sin = (t.to(x.dtype) for t in table)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)
