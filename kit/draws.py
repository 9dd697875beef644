"""Random numbers of training that belong to clips: they depend on a seed and a clip's number, and neither on the other clips
of the batch, nor on the number of devices, nor on what was drawn before."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


class Draws:
    """A stream of numbers for each clip of a batch.

    Args:
        seed: of all. numbers: of the clips.
    """

    def __init__(self, seed: int, numbers: Iterable[int]):
        self.streams = [torch.Generator().manual_seed(seed * 1_000_000_007 + int(n)) for n in numbers]

    def rand(self, *shape: int) -> Tensor:
        """(B, *shape) uniform in [0, 1), float32, on the CPU: the next numbers of each clip."""
        return torch.stack([torch.rand(shape, generator=stream) for stream in self.streams])
