"""The bit loss, what it weighs, and the share of right bits."""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn import functional as F

from kit.generator.sequence import TrainingSequence
from kit.machine import made_to_last, onto
from kit.scales import ScaleSchedule

POWERS = {"uniform": 0.0, "early": 0.5}  # a token's weight: the number of finest-scale tokens it covers, to this power
BIT_WEIGHTS = ("uniform", "margin")


def bit_loss(
    logits: Tensor, sequence: TrainingSequence, schedule: ScaleSchedule, scale_weights: str, bit_weights: str,
    given: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Computes the weighted binary cross-entropy of logits (B, L, d), averaged over bits.

    Args:
        scale_weights: see `weights_of_scales`. bit_weights: `uniform` (the paper), or `margin`: by the cost of a wrong value.
        given: (B,) number of leading latent frames of each clip whose bits count as right, with loss 0; None: none.
    """
    weights = onto(weights_of_scales(schedule, logits.shape[-1], scale_weights), logits.device)
    if bit_weights == "margin":
        weights = weights * sequence.margins
    if given is not None:
        asked = schedule.frame_of_tokens >= given[:, None]  # (B, L)
        weights = weights * onto(asked[..., None], logits.device)
    return F.binary_cross_entropy_with_logits(logits, sequence.targets.float(), weight=weights)


@functools.lru_cache(64)
@made_to_last
def weights_of_scales(schedule: ScaleSchedule, d: int, kind: str) -> Tensor:
    """Returns the weight of each bit's loss by its scale, (L, d) with mean 1; 0 for bits that a scale does not have.

    `uniform` is the paper's plain average over bits; `early` weighs a token by the square root of the number of finest-scale
    tokens it covers (as Infinity does).
    """
    h, w = schedule.grid
    weights = torch.tensor([(h * w / (b.h * b.w)) ** POWERS[kind] for b in schedule.blocks for _ in range(b.h * b.w)])
    weights = weights[:, None] * schedule.used_bits(d)
    return weights / weights.mean()


def accuracy_by_block(right: Tensor, schedule: ScaleSchedule) -> Tensor:
    """Returns the share of right bits in each frame and scale, (F, K). right: (B, L, d) bool."""
    d = right.shape[-1]
    shares = torch.stack([right[:, b.slice, : schedule.bits_of(b.k, d)].float().mean() for b in schedule.blocks])
    return shares.view(schedule.latent_frames, schedule.scales)
