"""Causal 3D encoder and decoder (VideoAR eq. 1).

Time is folded once, in the stem; everything after it runs at the latent frame rate. Nothing normalises over time, so a
latent frame depends on past pixels only, and a clip can be coded chunk by chunk (see `causal.Stream`). Wherever resolution
or the number of channels changes, a fixed shortcut carries the input past the convolution, which learns the remainder
(residual autoencoding, DC-AE, arXiv 2410.10733).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kit.machine import in_its_type
from kit.recompute import recomputed
from kit.scales import TAU
from kit.tokenizer.causal import CausalConv3d, Stream, each_frame, fold, unfold


class ChannelNorm(nn.LayerNorm):
    """Layer normalisation over the channels, separately at each place of each latent frame."""

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C, T, H, W) -> the same shape; makes no copy of channels-last layout."""
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        with in_its_type(x):
            return F.layer_norm(x.movedim(1, -1), self.normalized_shape, weight, bias, self.eps).movedim(-1, 1)


def kernel(temporal: bool) -> tuple[int, int, int]:
    """Returns the kernel (time, height, width) of a convolution over past frames, or over its own frame only."""
    return (3 if temporal else 1, 3, 3)


class ResBlock(nn.Module):
    """Residual block x + conv(act(norm(conv(act(norm(x)))))), initialised as the identity.

    Where the number of channels changes, the shortcut is a 1 x 1 x 1 convolution.

    Args:
        temporal: whether the first convolution sees past frames, or its own frame only.
        norm: normalisation layer, made from the number of channels.
    """

    def __init__(self, inputs: int, outputs: int, temporal: bool, norm: type[nn.Module] = ChannelNorm):
        super().__init__()
        self.norm1, self.conv1 = norm(inputs), CausalConv3d(inputs, outputs, kernel(temporal))
        self.norm2, self.conv2 = norm(outputs), CausalConv3d(outputs, outputs, (1, 3, 3))
        self.shortcut = nn.Identity() if inputs == outputs else CausalConv3d(inputs, outputs, (1, 1, 1))
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)

    def forward(self, x: Tensor, stream: Stream | None = None) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)), stream)
        return self.shortcut(x) + self.conv2(F.silu(self.norm2(y)), stream)


class Level(nn.ModuleList):
    """Residual blocks of one resolution, one after another."""

    recompute = False  # whether the backward pass computes the blocks' activations again instead of storing them

    def forward(self, x: Tensor, stream: Stream | None = None) -> Tensor:
        again = self.recompute and stream is None and torch.is_grad_enabled()  # a stream would remember a chunk twice
        for block in self:
            x = recomputed(block, x) if again else block(x, stream)
        return x


def residual_levels(widths: tuple[int, ...], blocks: int, temporal: bool) -> nn.ModuleList:
    """Builds the residual blocks of each level, fine to coarse. Time is mixed at the coarsest level, where it is cheapest."""
    coarsest = len(widths) - 1
    return nn.ModuleList(
        Level(ResBlock(c, c, temporal and i == coarsest) for _ in range(blocks)) for i, c in enumerate(widths)
    )


def fit_channels(x: Tensor, channels: int) -> Tensor:
    """Changes the number of channels without weights: (N, C, ...) -> (N, channels, ...).

    Takes the means of groups of neighbouring channels, or repeats each channel; left-over channels are dropped.
    """
    if x.shape[1] >= channels:
        size = x.shape[1] // channels
        return x[:, : size * channels].unflatten(1, (channels, size)).mean(2)
    return x.repeat_interleave(-(-channels // x.shape[1]), dim=1)[:, :channels]


class Downsample(nn.Conv2d):
    """Halves height and width: (B, C, F, h, w) -> (B, C', F, h / 2, w / 2); the shortcut turns 2 x 2 places into channels."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return each_frame(lambda f: super(Downsample, self).forward(f) + self.shortcut(f), x)

    def shortcut(self, frames: Tensor) -> Tensor:
        return fit_channels(F.pixel_unshuffle(frames, 2), self.out_channels)


class Upsample(nn.ConvTranspose2d):
    """Doubles height and width: (B, C, F, h, w) -> (B, C', F, 2 h, 2 w); the shortcut turns channels into 2 x 2 places."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return each_frame(lambda f: super(Upsample, self).forward(f) + self.shortcut(f), x)

    def shortcut(self, frames: Tensor) -> Tensor:
        return F.pixel_shuffle(fit_channels(frames, 4 * self.out_channels), 2)


class FromLatent(CausalConv3d):
    """Maps a feature (B, d, F, h, w) to the coarsest level's channels, (B, C, F, h, w), with a shortcut."""

    def __init__(self, inputs: int, outputs: int, temporal: bool):
        super().__init__(inputs, outputs, kernel(temporal))

    def forward(self, x: Tensor, stream: Stream | None = None) -> Tensor:
        y = super().forward(x, stream)
        return y + fit_channels(x, self.out_channels).to(y.dtype)  # a float32 feature would make all that follows float32


class Encoder(nn.Module):
    """Encodes pixels as the feature of F = 1 + (T - 1) / 4 latent frames.

    Args:
        bits: d, channels of the feature.
        patch: side of the pixel patch that the stem folds into channels.
        widths: channels of each level, from fine to coarse; each further level halves height and width.
        blocks: residual blocks per level.
        temporal: whether it folds and mixes time; if not, each pixel frame is coded alone, as one latent frame.
    """

    def __init__(self, bits: int, patch: int, widths: tuple[int, ...], blocks: int, temporal: bool):
        super().__init__()
        self.patch, self.tau = patch, TAU if temporal else 1
        self.make_layers(3 * self.tau * patch**2, bits, widths, blocks, temporal)

    def make_layers(self, inputs: int, outputs: int, widths: tuple[int, ...], blocks: int, temporal: bool):
        """Builds stem, levels, downsampling, norm and head: all that another architecture does differently."""
        self.stem = CausalConv3d(inputs, widths[0], (1, 1, 1))
        self.levels = residual_levels(widths, blocks, temporal)
        self.downs = nn.ModuleList(Downsample(a, b) for a, b in zip(widths, widths[1:]))
        self.norm, self.head = ChannelNorm(widths[-1]), CausalConv3d(widths[-1], outputs, kernel(temporal))

    def forward(self, video: Tensor, stream: Stream | None = None) -> Tensor:
        """Encodes a video (B, 3, T, H, W) in [-1, 1] as its feature (B, d, F, h, w)."""
        started = stream is not None and stream.started(self)
        x = self.stem(fold(video, self.tau, self.patch, started))
        for i, level in enumerate(self.levels):
            if i:
                x = self.downs[i - 1](x)
            x = level(x, stream)
        y = self.head(F.silu(self.norm(x)), stream)
        return y + self.shortcut(x).to(y.dtype)

    def shortcut(self, x: Tensor) -> Tensor:
        """Carries x past norm, activation and head. Taken after the activation, its mean, and so most bits, would be above
        0."""
        return fit_channels(x, self.head.out_channels)


class Decoder(nn.Module):
    """Decodes a feature to pixels; the mirror image of `Encoder`, with the same arguments."""

    def __init__(self, bits: int, patch: int, widths: tuple[int, ...], blocks: int, temporal: bool):
        super().__init__()
        self.patch, self.tau = patch, TAU if temporal else 1
        self.make_layers(bits, 3 * self.tau * patch**2, widths, blocks, temporal)

    def make_layers(self, inputs: int, outputs: int, widths: tuple[int, ...], blocks: int, temporal: bool):
        """Builds the layers, as `Encoder.make_layers`."""
        self.levels = residual_levels(widths, blocks, temporal)[::-1]
        widths = widths[::-1]
        self.stem = FromLatent(inputs, widths[0], temporal)
        self.ups = nn.ModuleList(Upsample(a, b) for a, b in zip(widths, widths[1:]))
        self.norm, self.head = ChannelNorm(widths[-1]), CausalConv3d(widths[-1], outputs, (1, 3, 3))

    def forward(self, feature: Tensor, stream: Stream | None = None) -> Tensor:
        """Decodes a feature (B, d, F, h, w) to pixels (B, 3, T, H, W), not clamped."""
        x = self.stem(feature, stream)
        for i, level in enumerate(self.levels):
            if i:
                x = self.ups[i - 1](x)
            x = level(x, stream)
        x = self.head(F.silu(self.norm(x)), stream)
        started = stream is not None and stream.started(self)
        return unfold(x, self.tau, self.patch, started)

    def head_gradient(self, hidden: Tensor, gradient: Tensor) -> Tensor:
        """Computes the gradient at the head's weight from its input and the gradient at the pixels, without the weight,
        which may be sharded.

        Args:
            hidden: (B, C, F, h, w), the head's input. gradient: (B, 3, T, H, W), that at the pixels of a whole clip.
        Returns:
            the gradient in the weight's shape, float32; the mean over processes is the caller's.
        """
        gradient = F.pad(gradient, (0, 0, 0, 0, self.tau - 1, 0))  # `unfold` drops these frames
        gradient = fold(gradient, self.tau, self.patch, started=True).to(hidden.dtype)
        frames = [x.transpose(1, 2).flatten(0, 1) for x in (hidden, gradient)]
        return nn.grad.conv2d_weight(frames[0], self.head.weight.shape, frames[1], padding=self.head.padding).float()
