"""Patch discriminators, which judge whether neighbourhoods of a clip are real: one by single frames, one by motion too."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from kit.tokenizer.causal import CausalConv3d
from kit.values import check_whole_number

GROUPS = 8  # groups of channels in the normalisation


def check_layers(layers: int, height: int, width: int):
    """Checks that discriminators leave something of a clip. Raises ValueError if `layers` halvings take a side to below 1."""
    most = min(height, width).bit_length() - 1
    if layers > most:
        raise ValueError(f"loss.adversarial.layers={layers}; expected at most {most} for clips of {height} x {width} pixels")


class PatchDiscriminator(nn.Module):
    """Maps a clip to logits, one per neighbourhood (PatchGAN, Isola et al. 2017, arXiv 1611.07004).

    Args:
        dims: 2 sees each frame alone, 3 the frames before it too.
        width: channels of the first layer, a multiple of 8. layers: number of halvings of height and width.
    Raises:
        ValueError: for other dims, widths or numbers of layers.
    """

    def __init__(self, dims: int, width: int, layers: int):
        super().__init__()
        if dims not in (2, 3):
            raise ValueError(f"loss.adversarial.dims: a discriminator has 2 or 3 dims, got {dims}")
        check_whole_number("loss.adversarial.layers", layers, 1)
        if type(width) is not int or width < GROUPS or width % GROUPS:
            raise ValueError(f"loss.adversarial.width={width}; expected a multiple of {GROUPS}")
        self.dims = dims
        past = 3 if dims == 3 else 1
        widths = [3, *(width * 2 ** min(n, 2) for n in range(layers))]
        self.convolutions = nn.ModuleList(CausalConv3d(a, b, (past, 4, 4), stride=2) for a, b in zip(widths, widths[1:]))
        self.norms = nn.ModuleList(nn.GroupNorm(GROUPS, b) for b in widths[2:])  # the first convolution has none, as is usual
        self.head = CausalConv3d(widths[-1], 1, (past, 3, 3))

    def forward(self, video: Tensor) -> Tensor:
        """(B, 3, T, H, W) in [-1, 1] -> (B, 1, T, H / 2^layers, W / 2^layers), or (B * T, 1, 1, ...) in two dims."""
        x = video.transpose(1, 2).flatten(0, 1)[:, :, None] if self.dims == 2 else video
        for n, convolution in enumerate(self.convolutions):
            x = convolution(x)
            x = F.leaky_relu(self.norms[n - 1](x) if n else x, 0.2)
        return self.head(x)


class Discriminator(nn.Module):
    """Several patch discriminators side by side.

    Args:
        dims: one for each discriminator, such as (2, 3). width, layers: the same for all.
    Raises:
        ValueError: without dims; else as `PatchDiscriminator`.
    """

    def __init__(self, dims: tuple[int, ...], width: int, layers: int):
        super().__init__()
        self.layers = layers
        if not dims:
            raise ValueError(
                "loss.adversarial.dims=[]; expected 2, 3 or both, or loss.adversarial.weight=0: no discriminator"
            )
        self.parts = nn.ModuleList(PatchDiscriminator(d, width, layers) for d in dims)

    def forward(self, video: Tensor) -> list[Tensor]:
        """Returns each discriminator's map of logits for a video (B, 3, T, H, W) in [-1, 1]. Raises as `check_layers`."""
        check_layers(self.layers, *video.shape[3:])
        return [part(video) for part in self.parts]
