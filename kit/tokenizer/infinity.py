"""Encoder and decoder of Infinity's image tokenizer (Han et al. 2024, arXiv 2412.04431; its bsq_vae/flux_vqgan.py), made
causal. On images they compute what Infinity computes, so they can load its weights (`infinity_weights.py`).

Clips are coded as in `autoencoder.py`: time is folded in the stem and mixed at the coarsest level, and each latent frame is
normalised on its own.
"""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn
from torch.nn import functional as F

from kit.tokenizer import autoencoder
from kit.tokenizer.autoencoder import Level, ResBlock, kernel
from kit.tokenizer.causal import CausalConv3d, Stream, each_frame

MIDDLE = 2  # additional residual blocks at the coarsest level, last in the encoder and first in the decoder


class FrameNorm(nn.GroupNorm):
    """Group normalisation, separate for each latent frame.

    Raises:
        ValueError: if the number of channels is not a multiple of 32.
    """

    def __init__(self, channels: int):
        super().__init__(32, channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C, T, H, W)"""
        return each_frame(super().forward, x)


class Downsample(nn.Conv2d):
    """Halves height and width of every frame; pads with zeros at the bottom and on the right only."""

    def __init__(self, channels: int):
        super().__init__(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return each_frame(super().forward, F.pad(x, (0, 1, 0, 1)))


class Upsample(CausalConv3d):
    """Doubles height and width of every frame: nearest-neighbour resizing, then a convolution."""

    def __init__(self, channels: int):
        super().__init__(channels, channels, (1, 3, 3))

    def forward(self, x: Tensor, stream: Stream | None = None) -> Tensor:
        return super().forward(F.interpolate(x, scale_factor=(1, 2, 2), mode="nearest"), stream)


def level(inputs: int, outputs: int, blocks: int, temporal: bool) -> Level:
    """Builds the residual blocks of a level; the first one changes the channels."""
    widths = (inputs, *[outputs] * blocks)
    return Level(ResBlock(a, b, temporal, FrameNorm) for a, b in pairwise(widths))


class Encoder(autoencoder.Encoder):
    """Encodes pixels as a feature; has `blocks` residual blocks per level, and MIDDLE more at the coarsest."""

    def make_layers(self, inputs: int, outputs: int, widths: tuple[int, ...], blocks: int, temporal: bool):
        *fine, coarsest = pairwise((widths[0], *widths))
        self.stem = CausalConv3d(inputs, widths[0], (1, 3, 3))
        self.levels = nn.ModuleList(level(a, b, blocks, temporal=False) for a, b in fine)
        self.levels.append(level(*coarsest, blocks + MIDDLE, temporal))
        self.downs = nn.ModuleList(Downsample(c) for c in widths[:-1])
        self.norm, self.head = FrameNorm(widths[-1]), CausalConv3d(widths[-1], outputs, kernel(temporal))

    def shortcut(self, x: Tensor) -> Tensor:
        """Returns 0: Infinity has no shortcut here."""
        return x.new_zeros(())


class Decoder(autoencoder.Decoder):
    """Decodes a feature to pixels; has one more residual block per level than the encoder."""

    def make_layers(self, inputs: int, outputs: int, widths: tuple[int, ...], blocks: int, temporal: bool):
        widths = widths[::-1]
        self.stem = CausalConv3d(inputs, widths[0], kernel(temporal))
        self.levels = nn.ModuleList([level(widths[0], widths[0], MIDDLE + blocks + 1, temporal)])
        self.levels.extend(level(a, b, blocks + 1, temporal=False) for a, b in pairwise(widths))
        self.ups = nn.ModuleList(Upsample(c) for c in widths[:-1])
        self.norm, self.head = FrameNorm(widths[-1]), CausalConv3d(widths[-1], outputs, (1, 3, 3))
