"""Sharded training (FSDP2): each process holds a share of the weights, their gradients, averages and optimizer states."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.optim import Optimizer

from kit.blank import blank
from kit.sharded_checkpoint import Keys, load_shares, mapped
from kit.values import check_choice, check_whole_number

GATHERED = StateDictOptions(full_state_dict=True, cpu_offload=True)  # whole, in the CPU memory of the first process


def allow_unused(trainer: L.Trainer):
    """Lets parameters have no gradient in a step, before the training begins. Only DDP has to be told, which otherwise waits
    for all of them; it then looks for those of each step, which takes a little time."""
    if isinstance(trainer.strategy, DDPStrategy):
        trainer.strategy._ddp_kwargs["find_unused_parameters"] = True


class ShardedStrategy(ModelParallelStrategy):
    """Strategy that shards each weight over all processes.

    Args:
        param_dtype: type in which weights are gathered and computed with, such as `bfloat16`; None: float32, as they are.
            Weights are kept, and gradients reduced, in float32.
        replicas: number of groups of processes, one per machine, say. Each group shards all weights (HSDP): weights are
            gathered within a group, and only gradients are averaged across groups.
        checkpoints: `whole`, gathered by the first process into one file, as without sharding; `sharded`, each process
            writes its own share, see `kit.sharded_checkpoint`.
    Raises:
        ValueError: for another type or kind of checkpoints, or replicas that do not divide the processes.
    """

    def __init__(self, param_dtype: str | None = None, replicas: int = 1, checkpoints: str = "whole"):
        super().__init__(data_parallel_size=1, tensor_parallel_size=1, save_distributed_checkpoint=False)
        if param_dtype not in (None, "float32", "bfloat16"):
            raise ValueError(f"trainer.strategy.param_dtype={param_dtype}; expected bfloat16, float32 or null")
        self.param_dtype = None if param_dtype is None else getattr(torch, param_dtype)
        check_choice("trainer.strategy.checkpoints", checkpoints, ("whole", "sharded"))
        check_whole_number("trainer.strategy.replicas", replicas, 1)
        self.replicas, self.in_shards = replicas, checkpoints == "sharded"

    def setup_environment(self):
        processes = self.num_nodes * self.num_processes
        if processes % self.replicas:
            raise ValueError(f"trainer.strategy.replicas={self.replicas} must divide the {processes} processes")
        # Lightning's names for the two dimensions of its mesh; by itself it would shard nothing
        self._data_parallel_size, self._tensor_parallel_size = self.replicas, processes // self.replicas
        super().setup_environment()

    def shard(self, model: nn.Module, units: Iterable[nn.Module]):
        """Shards a model unless it is sharded already: its units, which are gathered one at a time, and the rest of it."""
        if isinstance(model, FSDPModule):
            return
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")  # nothing changes it in place
        mesh, kept = self.device_mesh if self.replicas > 1 else self.device_mesh["tensor_parallel"], torch.float32
        policy = MixedPrecisionPolicy(param_dtype=self.param_dtype, reduce_dtype=kept)
        model.to(memory_format=torch.contiguous_format)  # other layouts cannot be sharded
        for unit in units:
            fully_shard(unit, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=MixedPrecisionPolicy(self.param_dtype, kept, output_dtype=kept))
        model._get_fsdp_state()._lazy_init()  # otherwise a unit that is called by itself first would take itself for the root

    def on_validation_end(self):
        """Lets go of what validation has gathered: while a weight is held whole, what a stage freezes is not the share that
        learns, and averages would begin whole."""
        let_go(self.lightning_module)

    def as_saved(self, tensors: dict) -> dict:
        """Prepares nested dicts of tensors for a checkpoint. All processes must call this.

        For sharded checkpoints tensors stay as they are. Otherwise they are gathered one after another in the memory of the
        first process, and the other processes get an empty dict.
        """
        if self.in_shards:
            return tensors

        def gather(_: Keys, x: Tensor) -> Tensor | None:
            x = whole(x)
            return x.cpu() if self.is_global_zero else None

        gathered = mapped(tensors, gather)
        return gathered if self.is_global_zero else {}

    def lightning_module_state_dict(self) -> dict:
        return self.as_saved(self.lightning_module.state_dict())

    def optimizer_state(self, optimizer: Optimizer) -> dict:
        return self.as_saved(getattr(optimizer, "_optimizer", optimizer).state_dict())  # without Lightning's wrapper

    def save_checkpoint(self, checkpoint: dict, filepath: str, storage_options=None):
        if self.in_shards or self.is_global_zero:
            self.checkpoint_io.save_checkpoint(checkpoint, self.broadcast(filepath) if self.in_shards else filepath)

    def load_checkpoint(self, checkpoint_path: str, weights_only: bool | None = True) -> dict:
        """Loads each process's share of weights, averages and optimizer states from a checkpoint, sharded or whole."""
        weights = dict(self.lightning_module.named_parameters())
        states = [[p for group in o.param_groups for p in group["params"]] for o in self.optimizers]

        def like(keys: Keys) -> Tensor | None:
            match keys:
                case ("state_dict" | "ema", name):
                    return weights.get(name)
                case ("optimizer_states", optimizer, "state", number, _):
                    return states[optimizer][number]

        checkpoint = load_shares(Path(checkpoint_path), lambda keys, x: as_shared(x, like(keys)))
        self.lightning_module.load_state_dict(checkpoint["state_dict"])
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            optimizer.load_state_dict(state)
        return checkpoint


def whole(x: Tensor) -> Tensor:
    """Returns a whole tensor, gathered from all processes if it is sharded; then all processes must call this."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def as_shared(x: Tensor, like: Tensor | None) -> Tensor:
    """Copies a whole tensor of a file to memory: this process's share if `like` is sharded and of its shape, else all of it.

    Needs no communication. For a tensor on the meta device, returns an empty tensor to fill.
    """
    if isinstance(like, DTensor) and like.shape == x.shape:
        own = torch.empty_like(like, dtype=x.dtype, requires_grad=False)
        return own if x.is_meta else own.copy_(share_of(x.to(like.device), own))
    return torch.empty_like(x, device="cpu") if x.is_meta else x.clone()


def share_of(x: Tensor, like: Tensor) -> Tensor:
    """Shards a whole tensor that all processes hold if `like` is sharded, in the same way and without communication."""
    if not isinstance(like, DTensor):
        return x
    replicated = DTensor.from_local(x, like.device_mesh, [Replicate()] * like.device_mesh.ndim, run_check=False)
    return replicated.redistribute(placements=like.placements)


def local(x: Tensor) -> Tensor:
    """Returns this process's share of a tensor, which uses the tensor's memory."""
    return x.to_local() if isinstance(x, DTensor) else x


def let_go(model: nn.Module):
    """Makes a sharded model drop the weights that it still holds whole since a forward pass without a backward pass."""
    for part in model.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def whole_model(model: nn.Module, build: Callable[[], nn.Module]) -> nn.Module | None:
    """Returns a model that can be used outside of training: itself, or if it is sharded, a whole copy made by `build`.

    If it is sharded, all processes must call this; the first one gets the copy, on the CPU, the others None.
    """
    if not isinstance(model, FSDPModule):
        return model
    weights = get_model_state_dict(model, options=GATHERED)
    if not weights:
        return None
    copy = blank(build)
    copy.load_state_dict(weights)
    return copy.eval()
