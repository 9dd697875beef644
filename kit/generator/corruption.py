"""Cross-Frame Error Correction: training on histories with errors (VideoAR eq. 8).

Bits are flipped before they become context, more in later frames, and the labels are re-quantised against the flipped
sums, so that the model learns to correct what went wrong before.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from kit.draws import Draws
from kit.generator.transformer import Generator
from kit.machine import onto
from kit.scales import ScaleSchedule
from kit.tokenizer.quantizer import block_input, frames_of, pyramid, sequence_of
from kit.values import check_number

MOST = 0.5  # a bit flipped more often than not would carry information again


@dataclass(frozen=True)
class FlipLaw:
    """Flip probability of block (f, k): U(p_min + delta f, p_max + delta f), one draw per block and sample (VideoAR eq. 8).

    Args:
        p_min, p_max: range in the first frame. delta: added to both per latent frame; neither exceeds `MOST`.
        inherit: the first block of a later frame draws from U(rate of the previous frame's last block, p_max + delta f).
    Raises:
        ValueError: for what is no number, a negative delta, or p_min and p_max that are not ascending within [0, 1].
    """

    p_min: float = 0.0
    p_max: float = 0.25
    delta: float = 0.01
    inherit: bool = True

    def __post_init__(self):
        for key in ("p_min", "p_max", "delta"):
            check_number(f"correction.{key}", getattr(self, key))
        if not (0 <= self.p_min <= self.p_max <= 1 and self.delta >= 0):
            raise ValueError(f"flip probabilities need 0 <= p_min <= p_max <= 1 and delta >= 0, got {self}")

    def draw(self, schedule: ScaleSchedule, draws: Draws) -> Tensor:
        """Draws flip probabilities (B, F, K)."""
        F, K = schedule.latent_frames, schedule.scales
        step = self.delta * torch.arange(F, dtype=torch.float32)[None, :, None]
        low, high = (self.p_min + step).clamp(max=MOST), (self.p_max + step).clamp(max=MOST)
        u = draws.rand(F, K)
        rates = low + u * (high - low)
        if self.inherit:
            for f in range(1, F):  # in order: with a single scale a frame's first block is also its last
                before = rates[:, f - 1, -1]
                rates[:, f, 0] = before + u[:, f, 0] * (high[:, f, 0] - before)
        return rates


class TrainingSequence(NamedTuple):
    """Inputs and targets of all blocks of a clip.

    With `inherit: all` the inputs have 2 d channels; with `history: full` each frame but the last has h * w more input
    tokens, those of its history block.
    """

    inputs: Tensor  # (B, L, d) float32, zero for block (0, 0)
    targets: Tensor  # (B, L, d) bool
    margins: Tensor  # (B, L, d) float32: distance of each target from the other bit, in code amplitudes, see `margin`


def training_sequence(
    feature: Tensor, schedule: ScaleSchedule, rates: Tensor | None, draws: Draws | None,
    inherit: str = "first", history: str = "scales",
) -> TrainingSequence:  # fmt: skip
    """Builds inputs (VideoAR eq. 6) and targets of clips, whose bits are flipped before they become context (eq. 8).

    Args:
        feature: (B, d, F, h, w), continuous, from the tokenizer's encoder.
        rates: (B, F, K) flip probabilities; None flips nothing. draws: random numbers that decide the flips.
        inherit, history: see `GeneratorConfig`.
    """
    B, d, F, _, _ = feature.shape

    def flip(k: int, label: Tensor) -> Tensor:
        p = onto(rates[:, :, k].reshape(B * F, 1, 1), label.device)
        u = onto(draws.rand(F, *label.shape[1:]).flatten(0, 1), label.device)
        return label ^ (u < p)

    steps = list(pyramid(frames_of(feature), schedule, None if rates is None else flip))
    finished = steps[-1].total.unflatten(0, (B, F))
    before = torch.cat([torch.zeros_like(finished[:, :1]), finished[:, :-1]], dim=1).flatten(0, 1)
    totals = [before, *(step.total for step in steps)]  # the last: of the history block, if there is one
    grids = schedule.layout(history).grids
    inputs = [block_input(k, total, before, grid, inherit) for k, (total, grid) in enumerate(zip(totals, grids))]
    sequence = sequence_of(inputs, B)[:, : schedule.sequence_length(history)]
    margins = [margin(step.residual, d) for step in steps]
    return TrainingSequence(sequence, sequence_of([step.label for step in steps], B), sequence_of(margins, B))


def teacher_forced(
    model: Generator, feature: Tensor, schedule: ScaleSchedule, condition: Tensor
) -> tuple[Tensor, TrainingSequence]:
    """Predicts clips with their true bits as history: logits (B, L, d), and the sequence with the targets."""
    sequence = training_sequence(feature, schedule, None, None, **model.config.reads)
    return model(sequence.inputs, schedule, condition), sequence


def margin(residual: Tensor, d: int) -> Tensor:
    """Measures each residual in code amplitudes: (N, d_k, h_k, w_k) -> (N, h_k * w_k, d), 0 for bits a scale does not have.

    This is proportional to the cost of a wrong bit at each place its token covers: with code +-a and residual r, the right
    bit leaves the squared error (|r| - a)^2, the wrong one (|r| + a)^2.
    """
    sizes = residual.abs().flatten(2).transpose(1, 2) * d**0.5
    return nn.functional.pad(sizes, (0, d - sizes.shape[-1]))
