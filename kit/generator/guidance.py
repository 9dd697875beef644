"""Adaptive guidance: how far each block is led from its unconditioned logits towards its conditioned ones."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kit.scales import ScaleSchedule
from kit.values import check_choice, check_number


@dataclass(frozen=True)
class Guidance:
    """Temporal-spatial adaptive guidance gamma(f, k), linear everywhere.

    Block (f, k) has the logits free + gamma (conditioned - free).

    Args:
        kind: `rising` (class-conditional, as on UCF-101): gamma of a frame's first scale goes from `first` at the first
            frame to `last` at the last one, then to `fine` over the scales of the frame. `falling` (text to video): from
            `first` to `last` over all blocks in their order. `constant`: `first` everywhere.
        first, last, fine: values of gamma; 1 is no guidance.
    """

    kind: str = "constant"
    first: float = 1.0
    last: float = 1.0
    fine: float = 1.0

    def __post_init__(self):
        check_choice("guidance.kind", self.kind, ("rising", "falling", "constant"))
        for name in ("first", "last", "fine"):
            check_number(f"guidance.{name}", getattr(self, name))

    @property
    def unused(self) -> tuple[str, ...]:
        """Names of the values that this kind does not read."""
        return {"constant": ("last", "fine"), "falling": ("fine",), "rising": ()}[self.kind]

    def gamma(self, f: int, k: int, schedule: ScaleSchedule) -> float:
        """The guidance of block (f, k)."""
        F, K = schedule.latent_frames, schedule.scales
        if self.kind == "constant":
            return self.first
        if self.kind == "falling":
            return self.first + (self.last - self.first) * (f * K + k) / max(F * K - 1, 1)
        start = self.first + (self.last - self.first) * f / max(F - 1, 1)
        return start + (self.fine - start) * k / max(K - 1, 1)

    @property
    def neutral(self) -> bool:
        """Whether guidance changes nothing, so that the unconditioned rows can be left out."""
        return self.kind == "constant" and self.first == 1.0


def guided(logits: Tensor, gamma: float) -> Tensor:
    """Guides logits (2B, tokens, d), conditioned ones first: free + gamma (conditioned - free), (B, tokens, d)."""
    conditioned, free = logits.chunk(2)
    return free + gamma * (conditioned - free)
