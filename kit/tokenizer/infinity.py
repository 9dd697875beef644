"""The encoder and decoder of Infinity's tokenizer of images (Han et al. 2024, arXiv 2412.04431; its bsq_vae/flux_vqgan.py),
made causal: of a picture they compute what Infinity computes, so they can take its weights (`infinity_weights.py`).

A clip passes them as it passes those of `autoencoder.py`: time is folded in the stem and mixed at the coarsest level, and
each latent frame is normalised on its own.
"""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn
from torch.nn import functional as F

from kit.tokenizer import autoencoder
from kit.tokenizer.autoencoder import ResBlock, kernel
from kit.tokenizer.causal import CausalConv3d, Stream, each_frame

MIDDLE = 2  # further residual blocks at the coarsest level, last in the encoder and first in the decoder


class FrameNorm(nn.GroupNorm):
    """Group normalisation of each latent frame on its own.

    Raises:
        ValueError: if the channels do not make 32 groups.
    """

    def __init__(self, channels: int):
        super().__init__(32, channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C, T, H, W)"""
        return each_frame(super().forward, x)


class Downsample(nn.Conv2d):
    """Halves height and width of every frame; zeros are added below and to the right only."""

    def __init__(self, channels: int):
        super().__init__(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return each_frame(super().forward, F.pad(x, (0, 1, 0, 1)))


class Upsample(CausalConv3d):
    """Doubles height and width of every frame: each place four times, then a convolution."""

    def __init__(self, channels: int):
        super().__init__(channels, channels, (1, 3, 3))

    def forward(self, x: Tensor, stream: Stream | None = None) -> Tensor:
        return super().forward(F.interpolate(x, scale_factor=(1, 2, 2), mode="nearest"), stream)


def level(inputs: int, outputs: int, blocks: int, temporal: bool) -> nn.ModuleList:
    """Residual blocks, the first of which changes the channels."""
    widths = (inputs, *[outputs] * blocks)
    return nn.ModuleList(ResBlock(a, b, temporal, FrameNorm) for a, b in pairwise(widths))


class Encoder(autoencoder.Encoder):
    """Pixels -> feature; `blocks` residual blocks per level."""

    def make_layers(self, inputs: int, outputs: int, widths: tuple[int, ...], blocks: int, temporal: bool):
        *fine, coarsest = pairwise((widths[0], *widths))
        self.stem = CausalConv3d(inputs, widths[0], (1, 3, 3))
        self.levels = nn.ModuleList(level(a, b, blocks, temporal=False) for a, b in fine)
        self.levels.append(level(*coarsest, blocks + MIDDLE, temporal))
        self.downs = nn.ModuleList(Downsample(c) for c in widths[:-1])
        self.norm, self.head = FrameNorm(widths[-1]), CausalConv3d(widths[-1], outputs, kernel(temporal))

    def shortcut(self, x: Tensor) -> Tensor:
        """None."""
        return x.new_zeros(())


class Decoder(autoencoder.Decoder):
    """Feature -> pixels; one residual block per level more than the encoder has."""

    def make_layers(self, inputs: int, outputs: int, widths: tuple[int, ...], blocks: int, temporal: bool):
        widths = widths[::-1]
        self.stem = CausalConv3d(inputs, widths[0], kernel(temporal))
        self.levels = nn.ModuleList([level(widths[0], widths[0], MIDDLE + blocks + 1, temporal)])
        self.levels.extend(level(a, b, blocks + 1, temporal=False) for a, b in pairwise(widths))
        self.ups = nn.ModuleList(Upsample(c) for c in widths[:-1])
        self.norm, self.head = FrameNorm(widths[-1]), CausalConv3d(widths[-1], outputs, (1, 3, 3))
