"""Optimizers and their schedule."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

def orthogonalise(x: Tensor, phases: tuple[int, ...] = (2, 3)) -> Tensor:
    """The matrix with the singular vectors of x (m, n) and all singular values about 1, by Newton-Schulz iterations.

    An iteration x <- (a + b A + c A^2) x with A = x x' multiplies x from the left by a polynomial in A. The factors of a
    phase are gathered on the small side (m x m) before x is touched; more than three iterations a phase would let
    rounding errors of A grow.
    """
    if x.shape[0] > x.shape[1]:
        return orthogonalise(x.T, phases).T
    x = x / (x.norm() + 1e-7)
    for iterations in phases:
        gram = x @ x.T
        factor = None
        for _ in range(iterations):
            polynomial = -4.7750 * gram + 2.0315 * gram @ gram
            polynomial.diagonal().add_(3.4445)
            factor = polynomial if factor is None else polynomial @ factor
            gram = polynomial @ gram @ polynomial
        x = factor @ x
    return x


class Muon(torch.optim.AdamW):
    """Muon for parameters of two or more dimensions, AdamW for the others, in one optimizer.

    A matrix moves along its orthogonalised momentum (Jordan et al. 2024), scaled so that the root mean square of an
    update is that of AdamW (0.2, Moonlight, arXiv 2502.16982). Convolution kernels count as (outputs, rest) matrices,
    which `torch.optim.Muon` does not take; on matrices the two agree.

    Args:
        matrices, others: parameters of either kind.
        lr, weight_decay: of both. betas: of AdamW. momentum: of Muon.
    """

    def __init__(self, matrices, others, lr, betas=(0.9, 0.95), weight_decay=0.0, momentum=0.95):
        groups = [{"params": list(others), "muon": False}, {"params": list(matrices), "muon": True}]
        super().__init__([g for g in groups if g["params"]], lr=lr, betas=betas, weight_decay=weight_decay)
        self.momentum = momentum

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = self.param_groups
        self.param_groups = [g for g in groups if not g["muon"]]
        super().step()
        self.param_groups = groups
        for group in groups:
            if group["muon"]:
                for p in group["params"]:
                    if p.grad is not None:
                        self._move(p, group["lr"], group["weight_decay"])
        return loss

    def _move(self, p: Tensor, lr: float, weight_decay: float):
        state = self.state[p]
        momentum = state.setdefault("momentum", torch.zeros_like(p))
        momentum.lerp_(p.grad, 1 - self.momentum)
        update = orthogonalise(p.grad.lerp(momentum, self.momentum).flatten(1))
        scale = 0.2 * max(update.shape) ** 0.5
        p.mul_(1 - lr * weight_decay).add_(update.view(p.shape), alpha=-lr * scale)


def build_optimizer(
    module: nn.Module, name: str, lr: float, betas: tuple[float, float] = (0.9, 0.95), weight_decay: float = 0.05
) -> torch.optim.Optimizer:
    """`adamw` (the paper's) or `muon`; biases, norms, embeddings and single vectors are not decayed by AdamW.

    Raises:
        ValueError: for another name.
    """
    embeddings = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
    parameters = [p for p in module.parameters() if p.requires_grad]
    matrices = [p for p in parameters if p.ndim > 1 and id(p) not in embeddings]
    others = [p for p in parameters if p.ndim < 2 or id(p) in embeddings]
    if name == "adamw":
        groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=lr, betas=tuple(betas))
    if name == "muon":
        return Muon(matrices, others, lr=lr, betas=tuple(betas), weight_decay=weight_decay)
    raise ValueError(f"optimizer.name must be 'adamw' or 'muon', got {name!r}")


def warmup_cosine(optimizer: torch.optim.Optimizer, warmup: int, steps: int, floor: float = 0.01):
    """Learning rate factor: linear from 0 over `warmup` steps, then a cosine down to `floor` at `steps`."""

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        progress = min(1.0, (step - warmup) / max(1, steps - warmup))
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
