"""The sequence that a generator is trained on: what each block reads (VideoAR eq. 6), and the bits that it is to predict."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from kit.draws import Draws
from kit.generator.transformer import Generator
from kit.machine import onto
from kit.scales import ScaleSchedule
from kit.tokenizer.quantizer import block_input, frames_of, pyramid, sequence_of


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
    B, d, frames, _, _ = feature.shape

    def flip(k: int, label: Tensor) -> Tensor:
        p = onto(rates[:, :, k].reshape(B * frames, 1, 1), label.device)
        u = onto(draws.rand(frames, *label.shape[1:]).flatten(0, 1), label.device)
        return label ^ (u < p)

    steps = list(pyramid(frames_of(feature), schedule, None if rates is None else flip))
    finished = steps[-1].total.unflatten(0, (B, frames))
    before = torch.cat([torch.zeros_like(finished[:, :1]), finished[:, :-1]], dim=1).flatten(0, 1)
    totals = [before, *(step.total for step in steps)]  # the last: of the history block, if there is one
    layout = schedule.layout(history)
    inputs = [block_input(k, total, before, grid, inherit) for k, (total, grid) in enumerate(zip(totals, layout.grids))]
    sequence = sequence_of(inputs, B)[:, : layout.sequence_length]
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
    return F.pad(sizes, (0, d - sizes.shape[-1]))
