"""Cross-Frame Error Correction: training on histories with errors (VideoAR eq. 8).

Bits are flipped before they become context, more in later frames, and the labels are re-quantised against the flipped
sums (`sequence.training_sequence`), so that the model learns to correct what went wrong before.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kit.draws import Draws
from kit.scales import ScaleSchedule
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
