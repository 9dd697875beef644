"""What the tokenizer is trained on. Each function returns a scalar that is zero at best."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kit.tokenizer.quantizer import Step


def reconstruction_loss(output: Tensor, video: Tensor, kind: str) -> Tensor:
    """Mean absolute (`l1`) or squared (`l2`) error of pixels in [-1, 1]; any equal shapes."""
    error = output.float() - video.float()
    if kind == "l1":
        return error.abs().mean()
    if kind == "l2":
        return error.square().mean()
    raise ValueError(f"unknown reconstruction loss {kind!r}; expected 'l1' or 'l2'")


def commitment_loss(feature: Tensor, steps: list[Step]) -> Tensor:
    """Squared distance of the feature (N, d, h, w) to its quantised sum, times d (beta term of VQ-VAE).

    The factor d makes it relative to the squared amplitude 1/d of a code, the same for any number of bits.
    """
    return (feature.float() - steps[-1].total.detach()).square().mean() * feature.shape[1]


def entropy_loss(steps: list[Step], inverse_temperature: float) -> Tensor:
    """1 - (entropy of a bit over the batch - mean entropy of a bit given its token), in bits; in [0, 1].

    Zero when every bit is certain for its token and balanced over the batch (MAGVIT-v2's entropy penalty, per bit as in
    BSQ-ViT). A bit's probability is sigmoid(inverse_temperature * u * sqrt(d)), u the residual on the unit sphere.
    """
    losses = []
    for step in steps:
        residual = step.residual.float()
        unit = residual * torch.rsqrt(residual.square().mean(1, keepdim=True) + 1e-8)  # sphere of radius sqrt(d)
        p = torch.sigmoid(inverse_temperature * unit).movedim(1, -1).flatten(0, -2)
        losses.append(1 - (_entropy(p.mean(0)).mean() - _entropy(p).mean()))
    return torch.stack(losses).mean()


def _entropy(p: Tensor) -> Tensor:
    """Of a Bernoulli variable, in bits."""
    p = p.clamp(1e-6, 1 - 1e-6)
    return -(p * p.log() + (1 - p) * (1 - p).log()) / math.log(2)
