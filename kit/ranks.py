"""What the processes of a distributed training, its ranks, do together; each function must be called on all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.nn.functional import all_reduce

from kit.values import differences

T = TypeVar("T")


def distributed() -> bool:
    """Returns whether this process is one of several that train together."""
    return dist.is_available() and dist.is_initialized()


def everywhere(act: Callable[[], T]) -> list[T]:
    """Runs `act` on each process and returns all results, in rank order.

    Raises:
        on all processes, what is raised on any one: the others would wait for it.
    """
    try:
        outcome = act()
    except Exception as error:
        outcome = error
    every = [None] * dist.get_world_size()
    dist.all_gather_object(every, outcome)
    for outcome in every:
        if isinstance(outcome, Exception):
            raise outcome
    return every


def first(act: Callable[[], T]) -> T:
    """Runs `act` on the first process and returns its result on all of them. Raises as `everywhere`."""
    return everywhere(lambda: act() if dist.get_rank() == 0 else None)[0]


def agree(what: str, value: dict, way_out: str):
    """Checks that all processes of a distributed training hold the same plain values.

    Args:
        what: they are, and the way out, for the message.
    Raises:
        ValueError: on all processes, if they differ.
    """
    if not distributed():
        return
    every = everywhere(lambda: value)
    for rank, other in enumerate(every):
        if other != every[0]:
            found = "; ".join(differences(other, every[0]))
            raise ValueError(f"process {rank} has {what} than process 0 ({found}); {way_out}")


def from_all_ranks(x: Tensor) -> Tensor:
    """Gathers (n, ...) from each process of a distributed training: (ranks * n, ...) in rank order; else returns x itself."""
    if not distributed():
        return x
    found = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(found, x)
    return torch.cat(found)


def mean_over_ranks(x: Tensor) -> Tensor:
    """Averages x over all processes of a distributed training; without one, returns x itself.

    The gradient is right where the processes' gradients are averaged in turn, as DDP does.
    """
    if not distributed():
        return x
    return all_reduce(x) / dist.get_world_size()
