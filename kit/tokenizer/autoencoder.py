"""Causal 3D encoder and decoder.

Time is folded once, in the stem; everything after it runs at the latent frame rate. Nothing normalises over time, so a
latent frame depends on past pixels only, and a clip can be coded chunk by chunk (see `causal.Stream`). Wherever resolution
or the number of channels changes, a fixed shortcut carries what was there past the convolution, which learns the rest
(residual autoencoding, DC-AE, arXiv 2410.10733).
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from kit.scales import TAU
from kit.tokenizer.causal import CausalConv3d, Stream, each_frame, fold, unfold


class ChannelNorm(nn.LayerNorm):
    """Layer normalisation over the channels of each place of each latent frame on its own."""

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C, T, H, W); in channels-last layout nothing is moved."""
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        return F.layer_norm(x.movedim(1, -1), self.normalized_shape, weight, bias, self.eps).movedim(-1, 1)


def kernel(temporal: bool) -> tuple[int, int, int]:
    """Of a convolution that looks at the past, or at its own frame only."""
    return (3 if temporal else 1, 3, 3)


class ResBlock(nn.Module):
    """x + conv(act(norm(conv(act(norm(x)))))), starting as the identity; x goes through a matrix where channels change.

    Args:
        temporal: whether the first convolution looks at the past, or at its own frame only.
        norm: channels -> normalisation.
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


def residual_levels(widths: tuple[int, ...], blocks: int, temporal: bool) -> nn.ModuleList:
    """Residual blocks of each level, fine to coarse. Time is mixed where that is cheapest, at the coarsest level."""
    coarsest = len(widths) - 1
    return nn.ModuleList(
        nn.ModuleList(ResBlock(c, c, temporal and i == coarsest) for _ in range(blocks)) for i, c in enumerate(widths)
    )


def fit_channels(x: Tensor, channels: int) -> Tensor:
    """(N, C, ...) -> (N, channels, ...): means of neighbouring channels, or each repeated; what is left over is left out."""
    if x.shape[1] >= channels:
        size = x.shape[1] // channels
        return x[:, : size * channels].unflatten(1, (channels, size)).mean(2)
    return x.repeat_interleave(-(-channels // x.shape[1]), dim=1)[:, :channels]


class Downsample(nn.Conv2d):
    """(B, C, F, h, w) -> (B, C', F, h / 2, w / 2); the shortcut turns each 2 x 2 places into channels."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return each_frame(lambda f: super(Downsample, self).forward(f) + self.shortcut(f), x)

    def shortcut(self, frames: Tensor) -> Tensor:
        return fit_channels(F.pixel_unshuffle(frames, 2), self.out_channels)


class Upsample(nn.ConvTranspose2d):
    """(B, C, F, h, w) -> (B, C', F, 2 h, 2 w); the shortcut turns channels into 2 x 2 places."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return each_frame(lambda f: super(Upsample, self).forward(f) + self.shortcut(f), x)

    def shortcut(self, frames: Tensor) -> Tensor:
        return F.pixel_shuffle(fit_channels(frames, 4 * self.out_channels), 2)


class FromLatent(CausalConv3d):
    """Feature (B, d, F, h, w) -> (B, C, F, h, w), the coarsest level's channels, with a shortcut."""

    def __init__(self, inputs: int, outputs: int, temporal: bool):
        super().__init__(inputs, outputs, kernel(temporal))

    def forward(self, x: Tensor, stream: Stream | None = None) -> Tensor:
        y = super().forward(x, stream)
        return y + fit_channels(x, self.out_channels).to(y.dtype)  # a float32 feature would make all that follows float32


class Encoder(nn.Module):
    """Pixels -> feature, F = 1 + (T - 1) / 4 latent frames.

    Args:
        bits: d, channels of the feature.
        patch: side of the pixel patch that the stem folds into channels.
        widths: channels of each level, from fine to coarse; each level halves height and width.
        blocks: residual blocks per level.
        temporal: whether it knows time; without, each frame is a picture of its own and a latent frame.
    """

    def __init__(self, bits: int, patch: int, widths: tuple[int, ...], blocks: int, temporal: bool):
        super().__init__()
        self.patch, self.tau = patch, TAU if temporal else 1
        self.make_layers(3 * self.tau * patch**2, bits, widths, blocks, temporal)

    def make_layers(self, inputs: int, outputs: int, widths: tuple[int, ...], blocks: int, temporal: bool):
        """Stem, levels, what is between them, norm and head: all that another architecture has otherwise."""
        self.stem = CausalConv3d(inputs, widths[0], (1, 1, 1))
        self.levels = residual_levels(widths, blocks, temporal)
        self.downs = nn.ModuleList(Downsample(a, b) for a, b in zip(widths, widths[1:]))
        self.norm, self.head = ChannelNorm(widths[-1]), CausalConv3d(widths[-1], outputs, kernel(temporal))

    def forward(self, video: Tensor, stream: Stream | None = None) -> Tensor:
        """video: (B, 3, T, H, W) in [-1, 1] -> (B, d, F, h, w)."""
        x = self.stem(fold(video, self.tau, self.patch, _started(self, stream)))
        for i, level in enumerate(self.levels):
            if i:
                x = self.downs[i - 1](x)
            for block in level:
                x = block(x, stream)
        y = self.head(F.silu(self.norm(x)), stream)
        return y + self.shortcut(x).to(y.dtype)

    def shortcut(self, x: Tensor) -> Tensor:
        """Past norm and head: after the activation means would be above 0, and so would most bits."""
        return fit_channels(x, self.head.out_channels)


class Decoder(nn.Module):
    """Feature -> pixels; the mirror image of `Encoder`, with the same arguments."""

    def __init__(self, bits: int, patch: int, widths: tuple[int, ...], blocks: int, temporal: bool):
        super().__init__()
        self.patch, self.tau = patch, TAU if temporal else 1
        self.make_layers(bits, 3 * self.tau * patch**2, widths, blocks, temporal)

    def make_layers(self, inputs: int, outputs: int, widths: tuple[int, ...], blocks: int, temporal: bool):
        """As the encoder's."""
        self.levels = residual_levels(widths, blocks, temporal)[::-1]
        widths = widths[::-1]
        self.stem = FromLatent(inputs, widths[0], temporal)
        self.ups = nn.ModuleList(Upsample(a, b) for a, b in zip(widths, widths[1:]))
        self.norm, self.head = ChannelNorm(widths[-1]), CausalConv3d(widths[-1], outputs, (1, 3, 3))

    def forward(self, feature: Tensor, stream: Stream | None = None) -> Tensor:
        """feature: (B, d, F, h, w) -> (B, 3, T, H, W), not clamped."""
        x = self.stem(feature, stream)
        for i, level in enumerate(self.levels):
            if i:
                x = self.ups[i - 1](x)
            for block in level:
                x = block(x, stream)
        x = self.head(F.silu(self.norm(x)), stream)
        return unfold(x, self.tau, self.patch, _started(self, stream))


def _started(module: nn.Module, stream: Stream | None) -> bool:
    """Whether the stream has passed through `module` before; notes that it has now."""
    if stream is None:
        return False
    return stream.setdefault(module, False) or bool(stream.update({module: True}))
