"""Linear layers whose result for a token does not depend on how many tokens there are."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ROWS = 16  # of fewer tokens a CPU computes a product by other kernels, which round differently


def product(x: Tensor, weight: Tensor) -> Tensor:
    """Computes x @ weight.T for x (..., inputs). On a CPU without gradients, as in sampling, a few tokens are computed among
    ROWS, so that a clip has the same logits in a small batch as in a large one."""
    missing = ROWS - x.shape[:-1].numel()
    if missing <= 0 or torch.is_grad_enabled() or x.device.type != "cpu":
        return F.linear(x, weight)
    return F.linear(F.pad(x.flatten(0, -2), (0, 0, 0, missing)), weight)[:-missing].unflatten(0, x.shape[:-1])


class Linear(nn.Linear):
    """nn.Linear without a bias, see `product`."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return product(x, self.weight)
