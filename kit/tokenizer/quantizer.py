"""Binary spherical code and the residual pyramid: bits <-> feature, and the input of the next block.

Each latent frame is coded on its own. For every scale, from coarse to fine: take the residual of the frame's feature
against the running sum, resize it down to the scale's grid, put it on the unit sphere, keep the signs. A token is then
d bits; its code is +-1/sqrt(d) (binary spherical quantization). The code is resized up and added to the running sum
(VideoAR eq. 2-3, after Infinity).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from kit.scales import ScaleSchedule

Grid = tuple[int, int]


def to_bits(x: Tensor) -> Tensor:
    """Takes signs as bits: True where x > 0."""
    return x > 0


def to_code(bits: Tensor) -> Tensor:
    """Maps bits (..., d) to points on the unit sphere, +-1/sqrt(d), float32."""
    return (bits.float() * 2 - 1) * bits.shape[-1] ** -0.5


def used_of(bits: Tensor, k: int, schedule: ScaleSchedule) -> Tensor:
    """Sets those of the bits (..., d) to False that scale k does not have (see `ScaleSchedule.bits`)."""
    d = bits.shape[-1]
    used = schedule.bits_of(k, d)
    return bits if used == d else bits & (torch.arange(d, device=bits.device) < used)


def residual_map(bits: Tensor, k: int, schedule: ScaleSchedule) -> Tensor:
    """Returns what scale k adds to the running sum: bits (N, h_k * w_k, d) -> (N, d, h, w) float32."""
    code = to_code(bits).contiguous()  # makes the map channels-last, which a GPU resizes far faster
    code[..., schedule.bits_of(k, bits.shape[-1]) :] = 0
    return up(tokens_to_map(code, schedule.grids[k]), schedule.grid)


def down(x: Tensor, grid: Grid) -> Tensor:
    """Resizes (..., h, w) down to `grid` by area."""
    return F.adaptive_avg_pool2d(x, grid) if x.shape[-2:] != grid else x


def up(x: Tensor, grid: Grid) -> Tensor:
    """Resizes (N, d, h, w) up to `grid`, bilinear."""
    return F.interpolate(x, grid, mode="bilinear", align_corners=False) if x.shape[-2:] != grid else x


def block_input(k: int, total: Tensor, before: Tensor, grid: Grid, inherit: str) -> Tensor:
    """Returns what block (f, k) reads, in training and in sampling: sums, resized to the block's grid (VideoAR eq. 6).

    Args:
        total: (N, d, h, w), sum of the frame's residual maps 0 to k - 1; not read for k = 0.
        before: (N, d, h, w), finished sum of the frame before; zero for the first frame.
        inherit: which blocks read `before`, see `GeneratorConfig`.
    Returns:
        (N, h_k * w_k, d), or 2 d if `inherit` is `all`
    """
    if k == 0:
        total = torch.zeros_like(before) if inherit == "none" else before
    sums = [total, before] if inherit == "all" else [total]
    return torch.cat([down(each, grid) for each in sums], dim=1).flatten(2).transpose(1, 2)


def tokens_to_map(tokens: Tensor, grid: Grid) -> Tensor:
    """Arranges tokens on their grid: (N, h * w, d) -> (N, d, h, w)."""
    return tokens.transpose(1, 2).unflatten(2, grid)


class Step(NamedTuple):
    """One scale of the pyramid."""

    residual: Tensor  # (N, d_k, h_k, w_k), before taking signs; d_k are the bits that the scale has
    label: Tensor  # (N, h_k * w_k, d) bool, signs of the residual
    bits: Tensor  # (N, h_k * w_k, d) bool, what entered the sum: the label, or the label with errors
    total: Tensor  # (N, d, h, w), running sum after this scale


def pyramid(
    feature: Tensor, schedule: ScaleSchedule, disturb: Callable[[int, Tensor], Tensor] | None = None,
    kept: Tensor | None = None,
) -> Iterator[Step]:  # fmt: skip
    """Quantises frames scale by scale, from coarse to fine (VideoAR eq. 2-3).

    Args:
        feature: (N, d, h, w), of N independent frames.
        disturb: maps (k, label) to the bits that enter the sum in place of the label; the residuals of the next scales, and
            so their labels, are then taken against the disturbed sum.
        kept: (N, K) bool; a scale that is not kept adds nothing to the sum (stochastic depth). None keeps all.
    Yields:
        a `Step` for each scale.
    """
    feature = feature.float()
    total = torch.zeros_like(feature)
    for k, grid in enumerate(schedule.grids):
        residual = down(feature - total, grid)
        label = used_of(to_bits(residual.flatten(2).transpose(1, 2)), k, schedule)
        bits = label if disturb is None else used_of(disturb(k, label), k, schedule)
        added = residual_map(bits, k, schedule)
        total = total + (added if kept is None else added * kept[:, k, None, None, None])
        yield Step(residual[:, : schedule.bits_of(k, residual.shape[1])], label, bits, total)


def frames_of(feature: Tensor) -> Tensor:
    """Moves a clip's frames into the batch: (B, d, F, h, w) -> (B * F, d, h, w)."""
    return feature.transpose(1, 2).flatten(0, 1)


def clip_of(frames: Tensor, batch: int) -> Tensor:
    """Inverts `frames_of`: (B * F, d, h, w) -> (B, d, F, h, w)."""
    return frames.unflatten(0, (batch, -1)).transpose(1, 2)


def sequence_of(blocks: list[Tensor], batch: int) -> Tensor:
    """Joins the blocks of each scale, (B * F, h_k * w_k, d), to the sequence (B, L, d) in the schedule's order."""
    return torch.cat(blocks, dim=1).unflatten(0, (batch, -1)).flatten(1, 2)


def feature_to_bits(feature: Tensor, schedule: ScaleSchedule) -> Tensor:
    """Quantises a feature (B, d, F, h, w) to bits (B, L, d)."""
    steps = pyramid(frames_of(feature), schedule)
    return sequence_of([step.label for step in steps], feature.shape[0])


def bits_to_feature(bits: Tensor, schedule: ScaleSchedule, scales: int | None = None) -> Tensor:
    """Sums the residual maps of bits (B, L, d) to a feature (B, d, F, h, w); of the first `scales` only, if given.

    Raises:
        ValueError: if there are not L tokens, the bits are numbers, or there are not as many scales.
    """
    if bits.shape[1] != schedule.length:
        raise ValueError(f"the schedule has {schedule.length} tokens ({schedule}), got bits of shape {tuple(bits.shape)}")
    if bits.dtype != torch.bool:
        raise ValueError(f"expected bits, True or False, got {bits.dtype}; of numbers they are those > 0")
    if scales is not None and not 1 <= scales <= schedule.scales:
        raise ValueError(f"expected 1 to {schedule.scales} scales, got {scales}")
    frames = bits.unflatten(1, (schedule.latent_frames, -1)).flatten(0, 1)
    parts = frames.split(schedule.tokens_per_scale, dim=1)[:scales]
    return clip_of(sum(residual_map(part, k, schedule) for k, part in enumerate(parts)), bits.shape[0])
