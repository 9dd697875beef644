"""Sharded training (FSDP2): each process holds a share of the weights, their gradients, averages and optimizer state."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.optim import Optimizer

from kit.files import load_checked

WHOLE = StateDictOptions(full_state_dict=True)
GATHERED = StateDictOptions(full_state_dict=True, cpu_offload=True)  # by the first process, in its memory


class ShardedStrategy(ModelParallelStrategy):
    """All processes share out each weight. Checkpoints are whole, in one file, as without sharding.

    Args:
        param_dtype: what weights are gathered and computed with as, such as `bfloat16`; None: as they are, float32. They are
            kept, and their gradients reduced, in float32.
        replicas: how many groups of processes share out the weights, each all of them (HSDP), one for each machine, say:
            they then gather within a group and only average gradients with the others.
    Raises:
        ValueError: for another type, or replicas that do not divide the processes.
    """

    def __init__(self, param_dtype: str | None = None, replicas: int = 1):
        super().__init__(data_parallel_size=1, tensor_parallel_size=1, save_distributed_checkpoint=False)
        if param_dtype not in (None, "float32", "bfloat16"):
            raise ValueError(f"trainer.strategy.param_dtype={param_dtype}; expected bfloat16, float32 or null")
        self.param_dtype = None if param_dtype is None else getattr(torch, param_dtype)
        self.replicas = replicas

    def setup_environment(self):
        processes = self.num_nodes * self.num_processes
        if self.replicas < 1 or processes % self.replicas:
            raise ValueError(f"trainer.strategy.replicas={self.replicas} must divide the {processes} processes")
        # Lightning's names for the two sides of its mesh; by itself it would shard nothing
        self._data_parallel_size, self._tensor_parallel_size = self.replicas, processes // self.replicas
        super().setup_environment()

    def shard(self, model: nn.Module, units: Iterable[nn.Module]):
        """Shards a model, unless it is: the units, which are gathered one at a time, and what is left of it."""
        if isinstance(model, FSDPModule):
            return
        mesh, kept = self.device_mesh if self.replicas > 1 else self.device_mesh["tensor_parallel"], torch.float32
        policy = MixedPrecisionPolicy(param_dtype=self.param_dtype, reduce_dtype=kept)
        model.to(memory_format=torch.contiguous_format)  # another layout cannot be sharded
        for unit in units:
            fully_shard(unit, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=MixedPrecisionPolicy(self.param_dtype, kept, output_dtype=kept))
        model._get_fsdp_state()._lazy_init()  # else a unit that is called by itself first would take itself for the root

    def optimizer_state(self, optimizer: Optimizer) -> dict:
        """Whole, and of the form that the optimizer itself has without sharding; empty but for the first process."""
        optimizer = getattr(optimizer, "_optimizer", optimizer)  # out of Lightning's
        if not optimizer.state:  # of discriminators before their turn: torch would make one by a step of its own
            return optimizer.state_dict()
        found = get_optimizer_state_dict(self.model, optimizer, options=GATHERED)
        if not found:
            return {}
        number = {name: i for i, name in enumerate(self._names(optimizer))}
        groups = [{**group, "params": [number[name] for name in group["params"]]} for group in found["param_groups"]]
        return {"state": {number[name]: state for name, state in found["state"].items()}, "param_groups": groups}

    def load_checkpoint(self, checkpoint_path: str, weights_only: bool | None = True) -> dict:
        """Takes each process's share of weights and optimizer states from a whole checkpoint."""
        checkpoint = load_checked(Path(checkpoint_path), mmap=True)
        set_model_state_dict(self.model, checkpoint["state_dict"], options=WHOLE)
        for optimizer, given in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            if not given["state"]:
                optimizer.load_state_dict(given)
                continue
            names = self._names(optimizer)
            groups = [{**group, "params": [names[i] for i in group["params"]]} for group in given["param_groups"]]
            state = {"state": {names[i]: state for i, state in given["state"].items()}, "param_groups": groups}
            set_optimizer_state_dict(self.model, optimizer, state, options=WHOLE)
        return checkpoint

    def _names(self, optimizer: Optimizer) -> list[str]:
        """Of its parameters, in its own order, which is that of the numbers in its state."""
        names = {id(p): name for name, p in self.model.named_parameters()}
        return [names[id(p)] for group in optimizer.param_groups for p in group["params"]]


def whole(x: Tensor) -> Tensor:
    """A tensor, gathered from all processes where it is sharded; then all must ask."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def as_sharded(x: Tensor, like: Tensor) -> Tensor:
    """A whole tensor on the device of another, and sharded where that is; then all processes must ask."""
    x = x.to(like.device)
    return distribute_tensor(x, like.device_mesh, like.placements) if isinstance(like, DTensor) else x


def share_of(x: Tensor, like: Tensor) -> Tensor:
    """A whole tensor that all processes hold, sharded where another is, without a word between them."""
    if not isinstance(like, DTensor):
        return x
    replicated = DTensor.from_local(x, like.device_mesh, [Replicate()] * like.device_mesh.ndim, run_check=False)
    return replicated.redistribute(placements=like.placements)


def local(x: Tensor) -> Tensor:
    """This process's share of a tensor, which it shares memory with."""
    return x.to_local() if isinstance(x, DTensor) else x


def whole_model(model: nn.Module, build: Callable[[], nn.Module]) -> nn.Module | None:
    """A model that can be used outside of training: itself, or where it is sharded a copy, which `build` makes and which gets
    its weights; then all processes must ask, and the first alone has it, the others None."""
    if not isinstance(model, FSDPModule):
        return model
    weights = get_model_state_dict(model, options=GATHERED)
    if not weights:
        return None
    copy = build()
    copy.load_state_dict(weights)
    return copy.to(next(model.parameters()).device).eval()
