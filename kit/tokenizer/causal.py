"""Causal convolution over time, of whole clips or chunk by chunk.

All convolutions here are 2D, over single frames; where time is mixed, the frames before are stacked as further channels. The
arithmetic is that of 3D convolutions, but 2D kernels are right everywhere: on CPUs with AMX, bfloat16 gradients of 3D kernels
can be NaN (torch 2.13: 192 -> 128 channels on 32 x 32, and others).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class Stream(dict):
    """Maps each module to what it has to remember of a clip that is coded chunk by chunk.

    Pass the same stream for every chunk of a clip, a new one for every clip.
    """

    def started(self, module: nn.Module) -> bool:
        """Returns whether a chunk has passed through `module` before, and records that one has now."""
        before = module in self
        self[module] = None
        return before


def each_frame(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Applies a function of pictures (N, C, H, W) to every frame of (B, C, T, H, W); no copies in channels-last layout."""
    return function(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (len(x), -1)).transpose(1, 2)


class CausalConv3d(nn.Conv2d):
    """3D convolution whose output at time t depends on inputs up to t; an odd kernel keeps the size of the input.

    The first frame, repeated, pads the past, so a still video gives a still output. The weight is
    (outputs, time * inputs, height, width), the oldest frame first.

    Args:
        kernel: (time, height, width). stride: of height and width.
    """

    def __init__(self, inputs: int, outputs: int, kernel: tuple[int, int, int] = (3, 3, 3), stride: int = 1):
        padding = ((kernel[1] - 1) // 2, (kernel[2] - 1) // 2)
        super().__init__(kernel[0] * inputs, outputs, kernel[1:], stride, padding)
        self.past = kernel[0] - 1

    def forward(self, x: Tensor, stream: Stream | None = None) -> Tensor:
        """x: (B, C, T, H, W), the next frames of the stream; without a stream, a whole clip."""
        if self.past:
            x = x.movedim(1, -1)  # so that slices and their gradients follow the order in memory, channels last
            context = None if stream is None else stream.get(self)
            if context is None:
                context = x[:, :1].expand(-1, self.past, -1, -1, -1)
            x = torch.cat([context, x], dim=1)
            if stream is not None:
                stream[self] = x[:, -self.past :].clone()  # a view would keep the whole chunk
            frames = x.shape[1] - self.past
            x = torch.cat([x[:, i : i + frames] for i in range(self.past + 1)], dim=-1).movedim(-1, 1)
        return each_frame(super().forward, x)


def fold(video: Tensor, tau: int, patch: int, started: bool = False) -> Tensor:
    """Trades resolution for channels: groups of `tau` frames, patches of `patch` x `patch` pixels.

    Args:
        video: (B, C, T, H, W); T = 1 + tau * n, or tau * n if the stream has `started`. The first frame, repeated tau
            times, is a group of its own.
    Returns:
        (B, C * tau * patch^2, F, H / patch, W / patch), channels last in memory
    """
    if not started:
        video = torch.cat([video[:, :, :1].expand(-1, -1, tau - 1, -1, -1), video], dim=2)
    B, C, T, H, W = video.shape
    x = video.view(B, C, T // tau, tau, H // patch, patch, W // patch, patch)
    return x.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4).movedim(-1, 1)


def unfold(x: Tensor, tau: int, patch: int, started: bool = False) -> Tensor:
    """Inverts `fold`: (B, C * tau * patch^2, F, h, w) -> (B, C, T, h * patch, w * patch)."""
    B, _, F, h, w = x.shape
    x = x.view(B, -1, tau, patch, patch, F, h, w).permute(0, 1, 5, 2, 6, 3, 7, 4)
    video = x.reshape(B, -1, F * tau, h * patch, w * patch)
    return video if started else video[:, :, tau - 1 :]
