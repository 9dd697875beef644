"""Memory for time: what a part has computed is dropped, and computed once more when the backward pass needs it."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.utils.checkpoint import checkpoint


def recomputed(part: Callable[..., Tensor], *inputs) -> Tensor:
    """`part(*inputs)` under activation checkpointing, for a part in which nothing is random."""
    return checkpoint(part, *inputs, use_reentrant=False, preserve_rng_state=False, determinism_check="none")
