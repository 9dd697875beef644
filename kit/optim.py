"""Optimizers and their schedule."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from kit.fsdp import local, share_of, whole
from kit.values import check_choice, check_number, check_positive, check_whole_number

BYTES_TRAINED, BYTES_AVERAGED = 16, 4  # of a float32 parameter with its gradient and AdamW's moments; of its moving average
NAMES = ("adamw", "muon")
BUILT_OF = ("name", "lr", "betas", "weight_decay")  # keys of the config's `optimizer` that `build_optimizer` takes
KEYS = (*BUILT_OF, "warmup")
PHASES = (2, 3)  # Newton-Schulz iterations per phase; more than three in one would let rounding errors grow


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Computes the norm of all gradients together, on their device. If they are sharded, all processes must call this."""
    return whole(nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))


def orthogonalise(x: Tensor) -> Tensor:
    """Sets all singular values of x (..., m, n) to about 1, keeping its singular vectors, by Newton-Schulz iterations.

    An iteration x <- (a + b A + c A^2) x with A = x x' multiplies x from the left by a polynomial in A. The factors of a
    phase are multiplied on the small side (m x m) before x is.
    """
    if x.shape[-2] > x.shape[-1]:
        return orthogonalise(x.mT).mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for iterations in PHASES:
        gram = x @ x.mT
        factor = polynomial = _polynomial(gram)
        for _ in range(iterations - 1):
            gram = polynomial @ gram @ polynomial  # of what x would be by now
            polynomial = _polynomial(gram)
            factor = polynomial @ factor
        x = factor @ x
    return x


def _polynomial(gram: Tensor) -> Tensor:
    polynomial = -4.7750 * gram + 2.0315 * gram @ gram
    polynomial.diagonal(dim1=-2, dim2=-1).add_(3.4445)
    return polynomial


def orthogonalise_all(matrices: list[Tensor]) -> list[Tensor]:
    """Orthogonalises matrices (m, n); those of one shape, or its transpose, in one batch: fewer, larger products."""
    done: list[Tensor] = [torch.empty(0)] * len(matrices)
    alike: dict[tuple[int, int], list[int]] = {}
    for i, x in enumerate(matrices):
        alike.setdefault((min(x.shape), max(x.shape)), []).append(i)
    for (rows, _), places in alike.items():
        wide = [matrices[i] if matrices[i].shape[0] == rows else matrices[i].mT for i in places]
        for i, x in zip(places, orthogonalise(torch.stack(wide))):
            done[i] = x if matrices[i].shape[0] == rows else x.mT
    return done


class Muon(torch.optim.Optimizer):
    """Muon for matrices, Adam for the rest, in one optimizer.

    A matrix moves along its orthogonalised momentum (Jordan et al. 2024), scaled so that the root mean square of an
    update is that of AdamW (0.2, Moonlight, arXiv 2502.16982). Convolution kernels, which `torch.optim.Muon` does not take,
    count as (outputs, rest) matrices, those of transposed convolutions as (inputs, rest); on matrices the two agree. Of
    sharded parameters only Muon's updates are gathered: what goes element by element is done on each process's share, without
    what torch spends on every operation of a sharded tensor.

    Args:
        matrices: parameters of two or more dimensions. others: any parameters; they are not decayed.
        lr: for both. betas: of Adam. weight_decay: of the matrices. momentum: of Muon.
    """

    def __init__(self, matrices, others, lr, betas=(0.9, 0.95), weight_decay=0.0, momentum=0.95):
        groups = [{"params": list(matrices), "muon": True}, {"params": list(others), "muon": False}]
        defaults = {"lr": lr, "betas": tuple(betas), "weight_decay": weight_decay, "momentum": momentum, "eps": 1e-8}
        super().__init__([g for g in groups if g["params"]], defaults)

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            (self._muon if group["muon"] else self._adam)([p for p in group["params"] if p.grad is not None], group)
        return loss

    def _kept(self, p: Tensor, name: str) -> Tensor:
        """Returns a tensor of a parameter's state, initially 0."""
        if name not in self.state[p]:
            self.state[p][name] = torch.zeros_like(p)
        return self.state[p][name]

    def _muon(self, parameters: list[Tensor], group: dict):
        updates = []
        for p in parameters:
            momentum = self._kept(p, "momentum")
            local(momentum).lerp_(local(p.grad), 1 - group["momentum"])
            updates.append(whole(p.grad.lerp(momentum, group["momentum"])).flatten(1))
        for p, update in zip(parameters, orthogonalise_all(updates)):
            scale = 0.2 * max(update.shape) ** 0.5
            update = local(share_of(update.reshape(p.shape), p))
            local(p).mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"] * scale)

    def _adam(self, parameters: list[Tensor], group: dict):
        """Updates parameters by Adam without weight decay (Kingma and Ba 2015, algorithm 1)."""
        if not parameters:
            return
        for p in parameters:
            self.state[p]["step"] = self.state[p].get("step", 0) + 1
        grads, unbiased = [local(p.grad) for p in parameters], []
        for i, (values, beta) in enumerate(zip((grads, torch._foreach_mul(grads, grads)), group["betas"]), start=1):
            moments = [local(self._kept(p, f"moment{i}")) for p in parameters]
            torch._foreach_lerp_(moments, values, 1 - beta)
            unbiased.append(torch._foreach_div(moments, [1 - beta ** self.state[p]["step"] for p in parameters]))
        first, second = unbiased
        torch._foreach_sqrt_(second)
        torch._foreach_add_(second, group["eps"])
        torch._foreach_addcdiv_([local(p) for p in parameters], first, second, value=-group["lr"])


def check_optimizer(values: Mapping, keys: Sequence[str]):
    """Checks the name, keys and numbers of the config's `optimizer`.

    Args:
        keys: those that it may have.
    Raises:
        ValueError: for an unknown name or key, or if a number makes no sense, naming its key.
    """
    if unknown := sorted(set(values) - set(keys)):
        raise ValueError(f"optimizer has no {', '.join(unknown)}; its keys are {', '.join(keys)}")
    check_choice("optimizer.name", values["name"], NAMES)
    for key in ("lr", "weight_decay"):
        check_number(f"optimizer.{key}", values[key], least=0)
    check_whole_number("optimizer.warmup", values["warmup"], 0)
    check_whole_number("optimizer.accumulate", values.get("accumulate", 1), 1)
    check_positive("optimizer.clip", values.get("clip"), optional=True)
    check_betas("optimizer.betas", values["betas"])


def check_betas(key: str, betas: Sequence[float]):
    """Checks the betas of Adam. Raises ValueError, naming their key, unless they are two numbers, each from 0 to below 1."""
    if len(betas) != 2 or not all(isinstance(beta, int | float) and 0 <= beta < 1 for beta in betas):
        raise ValueError(f"{key}={list(betas)}; expected two numbers, each from 0 to below 1")


def build_optimizer(
    module: nn.Module, name: str, lr: float, betas: tuple[float, float] = (0.9, 0.95), weight_decay: float = 0.05
) -> torch.optim.Optimizer:
    """Builds `adamw` (the paper's) or `muon`. Only weights of linear and convolution layers are decayed (and use Muon).

    Raises:
        ValueError: for another name.
    """
    check_choice("optimizer.name", name, NAMES)
    layers = (nn.Linear, nn.modules.conv._ConvNd)
    weights = {id(m.weight) for m in module.modules() if isinstance(m, layers)}
    parameters = [p for p in module.parameters() if p.requires_grad]
    matrices = [p for p in parameters if id(p) in weights]
    others = [p for p in parameters if id(p) not in weights]
    if name == "adamw":
        groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
        foreach = any(isinstance(p, DTensor) for p in parameters) or None  # by default torch takes sharded ones one by one

        def keep_foreach(optimizer: torch.optim.Optimizer):
            for group in optimizer.param_groups:  # a checkpoint's may be of a run that was not sharded, or was
                group["foreach"] = foreach

        optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, betas=tuple(betas), foreach=foreach)
        optimizer.register_load_state_dict_post_hook(keep_foreach)
        return optimizer
    return Muon(matrices, others, lr=lr, betas=tuple(betas), weight_decay=weight_decay)


COURSE = ("warmup", "steps", "began", "base_lrs")  # attributes that define the schedule of WarmupCosine
FLOOR = 0.01  # learning rate at the end of the schedule, as a share of its peak


class WarmupCosine(torch.optim.lr_scheduler.LRScheduler):
    """Learning rate: step i of `warmup` has (i + 1) / warmup of the peak, then a cosine down to FLOOR of it at `steps`."""

    def __init__(self, optimizer: torch.optim.Optimizer, warmup: int, steps: int):
        self.warmup, self.steps, self.began = warmup, steps, 0
        super().__init__(optimizer)

    def begin(self, lr: float, warmup: int, steps: int, began: int):
        """Switches to a new schedule with peak `lr`, counted from step `began` of the training; the next step follows it."""
        self.warmup, self.steps, self.began = warmup, steps, began
        self.base_lrs = [lr] * len(self.base_lrs)
        for group, rate in zip(self.optimizer.param_groups, self.get_lr()):
            group["lr"] = rate

    def get_lr(self) -> list[float]:
        return [lr * self.factor(self.last_epoch - self.began) for lr in self.base_lrs]

    def factor(self, step: int) -> float:
        """Returns the learning rate after `step` steps of the schedule, as a share of its peak."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        progress = min(1.0, (step - self.warmup) / max(1, self.steps - self.warmup))
        return FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * progress))

    def state_dict(self) -> dict:
        """Returns the position only; the schedule itself comes from the config."""
        return {key: value for key, value in super().state_dict().items() if key not in COURSE}

    def load_state_dict(self, state: dict):
        """Restores the position, keeps the present schedule, and sets the optimizer's learning rates by it."""
        super().load_state_dict({key: value for key, value in state.items() if key not in COURSE})
        for group, base, rate in zip(self.optimizer.param_groups, self.base_lrs, self.get_lr()):
            group["initial_lr"], group["lr"] = base, rate


def scheduled_optimizer(module: nn.Module, values: Mapping, steps: int) -> tuple[torch.optim.Optimizer, WarmupCosine]:
    """Builds a module's optimizer from the config's `optimizer`, with a schedule that ends at `steps`.

    Raises: as `build_optimizer`.
    """
    optimizer = build_optimizer(module, **{key: values[key] for key in BUILT_OF})
    return optimizer, WarmupCosine(optimizer, values["warmup"], steps)


def each_step(schedules: Sequence[WarmupCosine]) -> list[dict]:
    """Returns schedules as Lightning takes them from `configure_optimizers`, to be logged by steps, not epochs."""
    return [{"scheduler": schedule, "interval": "step"} for schedule in schedules]
