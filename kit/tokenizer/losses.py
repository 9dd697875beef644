"""Losses of the tokenizer and its discriminators (VideoAR eq. 4). Each loss is a scalar."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from kit.optim import check_betas
from kit.perceptual import Perceptual
from kit.ranks import mean_over_ranks
from kit.tokenizer.quantizer import Step
from kit.values import check_choice, check_number, check_positive, check_share, check_whole_number

DISTANCES = {"l1": F.l1_loss, "l2": F.mse_loss}  # between pixels


def check_losses(loss: Mapping):
    """Checks the values of conf/loss/plain.yaml, except those that build a network.

    Raises:
        ValueError: if one makes no sense, naming its key.
    """
    perceptual, adversarial = loss["perceptual"], loss["adversarial"]
    check_choice("loss.reconstruction", loss["reconstruction"], DISTANCES)
    for key in ("reconstruction_weight", "motion_weight", "commitment_weight", "entropy_weight", "entropy_weight_end"):
        check_number(f"loss.{key}", loss[key], least=0)
    check_positive("loss.entropy_inverse_temperature", loss["entropy_inverse_temperature"])  # at 0 no bit becomes certain
    check_number("loss.perceptual.weight", perceptual["weight"], least=0)
    check_whole_number("loss.perceptual.frames", perceptual["frames"], 1, optional=True)
    for key in ("weight", "lr", "lecam"):
        check_number(f"loss.adversarial.{key}", adversarial[key], least=0)
    check_betas("loss.adversarial.betas", adversarial["betas"])
    check_share("loss.adversarial.warmup", adversarial["warmup"])
    if not 0 <= adversarial["start"] < 1:
        raise ValueError(f"loss.adversarial.start={adversarial['start']}; expected a share of the training, 0 to below 1")


def reconstruction_loss(output: Tensor, video: Tensor, kind: str) -> Tensor:
    """Mean absolute (`l1`) or squared (`l2`) error of pixels in [-1, 1]; any equal shapes."""
    return DISTANCES[kind](output.float(), video.float())


def motion_loss(output: Tensor, video: Tensor, kind: str) -> Tensor:
    """`reconstruction_loss` of the differences between consecutive frames of (B, 3, T, H, W), against flicker; 0 if T = 1."""
    if output.shape[2] == 1:
        return output.new_zeros(())
    return reconstruction_loss(output.float().diff(dim=2), video.float().diff(dim=2), kind)


def perceptual_loss(network: Perceptual, output: Tensor, video: Tensor) -> Tensor:
    """Mean perceptual distance between the frames of two videos, both (B, 3, T, H, W) in [-1, 1]."""
    return network(*(x.float().transpose(1, 2).flatten(0, 1) for x in (output, video))).mean()


def commitment_loss(feature: Tensor, steps: list[Step]) -> Tensor:
    """Squared distance of the feature (N, d, h, w) to its quantised sum, times d (beta term of VQ-VAE).

    The factor d makes it relative to the squared amplitude 1/d of a code, the same for any number of bits.
    """
    return (feature.float() - steps[-1].total.detach()).square().mean() * feature.shape[1]


def entropy_loss(steps: list[Step], inverse_temperature: float) -> Tensor:
    """1 - (entropy of a bit over the batch - mean entropy of a bit given its token), in bits; in [0, 1].

    It is 0 when every bit is certain for its token and balanced over the batch of all devices, or its part where batches are
    accumulated (MAGVIT-v2's entropy penalty, per bit as in BSQ-ViT). A bit's probability is
    sigmoid(inverse_temperature * u * sqrt(d)), u the residual on the unit sphere.
    """
    losses = []
    for step in steps:
        residual = step.residual.float()
        unit = residual * torch.rsqrt(residual.square().mean(1, keepdim=True) + 1e-8)  # sphere of radius sqrt(d)
        p = torch.sigmoid(inverse_temperature * unit).movedim(1, -1).flatten(0, -2)
        losses.append(1 - (entropy_of(mean_over_ranks(p.mean(0))).mean() - entropy_of(p).mean()))
    return torch.stack(losses).mean()


def discriminator_loss(real: Sequence[Tensor], fake: Sequence[Tensor]) -> Tensor:
    """Hinge loss of the discriminators, given one map of logits from each for real and for fake clips; their mean."""
    return torch.stack([F.relu(1 - r.float()).mean() + F.relu(1 + f.float()).mean() for r, f in zip(real, fake)]).mean()


def adversarial_loss(fake: list[Tensor]) -> Tensor:
    """Adversarial loss of the decoder: minus the discriminators' mean logit for its output."""
    return -torch.stack([f.float().mean() for f in fake]).mean()


def lecam_loss(real: Sequence[Tensor], fake: Sequence[Tensor], anchors: Tensor) -> Tensor:
    """Penalises logits of real clips above the average logit of fake ones, and logits of fake ones below that of real ones.

    This is LeCAM's regulariser (Tseng et al. 2021, arXiv 2104.03310), one-sided as in its authors' code.

    Args:
        anchors: (discriminators, 2), moving averages of the mean logits of real and of fake clips.
    """
    terms = [
        F.relu(r.float() - anchor[1]).square().mean() + F.relu(anchor[0] - f.float()).square().mean()
        for r, f, anchor in zip(real, fake, anchors)
    ]
    return torch.stack(terms).mean()


def adaptive_weight(reference: Tensor, adversarial: Tensor) -> Tensor:
    """Ratio of the gradient norms of two losses at the decoder's last layer (VQGAN, arXiv 2012.09841, eq. 7), from the clips
    of all devices.

    Args:
        reference, adversarial: gradients of the losses of this device's clips at the layer's weight.
    Returns:
        a scalar in [0, 10,000].
    """
    norms = [mean_over_ranks(gradient).norm() for gradient in (reference, adversarial)]
    return (norms[0] / (norms[1] + 1e-4)).clamp(0, 1e4)


def entropy_of(p: Tensor) -> Tensor:
    """Entropy in bits of binary variables that are one with probability p, any shape."""
    p = p.clamp(1e-6, 1 - 1e-6)
    return -(p * p.log() + (1 - p) * (1 - p).log()) / math.log(2)
