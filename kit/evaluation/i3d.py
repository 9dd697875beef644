"""I3D: the Inception-v1 network inflated to 3D (Carreira and Zisserman 2017, arXiv 1705.07750) that FVD is defined on."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

SIDE = 224  # pixels of its input
LEAST_FRAMES = 9  # with fewer, the last pooling has nothing to average over

# Output channels of the branches 1x1, 1x1 -> 3x3, 1x1 -> 3x3, pooling -> 1x1 (table of Inception-v1).
MIXED = {
    "3b": (64, 96, 128, 16, 32, 32), "3c": (128, 128, 192, 32, 96, 64),
    "4b": (192, 96, 208, 16, 48, 64), "4c": (160, 112, 224, 24, 64, 64), "4d": (128, 128, 256, 24, 64, 64),
    "4e": (112, 144, 288, 32, 64, 64), "4f": (256, 160, 320, 32, 128, 128),
    "5b": (256, 160, 320, 32, 128, 128), "5c": (384, 192, 384, 48, 128, 128),
}  # fmt: skip


def pad_same(x: Tensor, kernel: tuple[int, int, int], stride: tuple[int, int, int]) -> Tensor:
    """Pads (B, C, T, H, W) with zeros as TensorFlow's SAME does: the odd one goes to the end."""
    pads = []
    for size, k, s in zip(x.shape[:1:-1], kernel[::-1], stride[::-1]):
        total = max((-(-size // s) - 1) * s + k - size, 0)
        pads += [total // 2, total - total // 2]
    return F.pad(x, pads)


def max_pool(x: Tensor, kernel: tuple[int, int, int], stride: tuple[int, int, int]) -> Tensor:
    """Maximum pooling with SAME padding by zeros, which serve as well as minus infinity since all inputs come out of a ReLU.

    It pools over height and width, then over time: the same maximum, several times faster on a CPU than max_pool3d.
    """
    x = pad_same(x, kernel, stride)
    frames = F.max_pool2d(x.transpose(1, 2).flatten(0, 1), kernel[1:], stride[1:]).unflatten(0, x.shape[:1] + x.shape[2:3])
    last = x.shape[2] - kernel[0]
    taps = [frames[:, start : start + last + 1 : stride[0]] for start in range(kernel[0])]
    return functools.reduce(torch.maximum, taps).transpose(1, 2)


class Unit(nn.Module):
    """Convolution, batch norm, ReLU."""

    def __init__(self, channels: int, out: int, kernel: int = 1, stride: int = 1):
        super().__init__()
        self.conv = nn.Conv3d(channels, out, kernel, stride, padding=kernel // 2 if stride == 1 else 0, bias=False)
        self.bn = nn.BatchNorm3d(out, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        if self.conv.stride != (1, 1, 1):  # else the convolution's own padding is SAME
            x = pad_same(x, self.conv.kernel_size, self.conv.stride)
        return F.relu(self.bn(self.conv(x)), inplace=True)

    def fuse(self):
        """Merges the batch norm into the convolution."""
        self.conv, self.bn = fuse_conv_bn_eval(self.conv, self.bn), nn.Identity()


class Mixed(nn.Module):
    def __init__(self, channels: int, b0: int, b1a: int, b1b: int, b2a: int, b2b: int, b3: int):
        super().__init__()
        self.b0 = Unit(channels, b0)
        self.b1a, self.b1b = Unit(channels, b1a), Unit(b1a, b1b, 3)
        self.b2a, self.b2b = Unit(channels, b2a), Unit(b2a, b2b, 3)
        self.b3 = Unit(channels, b3)

    def forward(self, x: Tensor) -> Tensor:
        pooled = max_pool(x, (3, 3, 3), (1, 1, 1))
        return torch.cat([self.b0(x), self.b1b(self.b1a(x)), self.b2b(self.b2a(x)), self.b3(pooled)], dim=1)


class Logits(nn.Module):
    def __init__(self, channels: int, classes: int):
        super().__init__()
        self.conv = nn.Conv3d(channels, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.avg_pool3d(x, (2, 7, 7), 1)).mean(dim=(2, 3, 4))


class I3D(nn.Module):
    """(B, 3, T, 224, 224) in [-1, 1], T >= 9 -> logits (B, classes), averaged over time."""

    def __init__(self, classes: int = 400):
        super().__init__()
        self.Conv3d_1a_7x7 = Unit(3, 64, 7, 2)
        self.Conv3d_2b_1x1 = Unit(64, 64)
        self.Conv3d_2c_3x3 = Unit(64, 192, 3)
        channels = 192
        for name, branches in MIXED.items():
            setattr(self, f"Mixed_{name}", Mixed(channels, *branches))
            channels = branches[0] + branches[2] + branches[4] + branches[5]
        self.Logits = Logits(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = max_pool(self.Conv3d_1a_7x7(x), (1, 3, 3), (1, 2, 2))
        x = max_pool(self.Conv3d_2c_3x3(self.Conv3d_2b_1x1(x)), (1, 3, 3), (1, 2, 2))
        for name in MIXED:
            if name == "4b":
                x = max_pool(x, (3, 3, 3), (2, 2, 2))
            elif name == "5b":
                x = max_pool(x, (2, 2, 2), (2, 2, 2))
            x = getattr(self, f"Mixed_{name}")(x)
        return self.Logits(x)

    def fuse(self) -> I3D:
        """Merges batch norms into their convolutions, for faster inference. The weights then have other names."""
        for unit in self.modules():
            if isinstance(unit, Unit):
                unit.fuse()
        return self
