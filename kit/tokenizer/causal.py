"""Convolution over time that sees the past only, whole or chunk by chunk."""

from __future__ import annotations

import torch
from torch import Tensor, nn

Stream = dict  # module -> its temporal context; hand the same one to every chunk of a clip, a new one to every clip


class CausalConv3d(nn.Conv3d):
    """3D convolution whose output at time t depends on inputs up to t; the size of the output is that of the input.

    Before the first frame the input is taken to be the first frame repeated, so a still video gives a still output.

    Args:
        kernel: (time, height, width), odd in space.
    """

    def __init__(self, inputs: int, outputs: int, kernel: tuple[int, int, int] = (3, 3, 3)):
        super().__init__(inputs, outputs, kernel, padding=(0, kernel[1] // 2, kernel[2] // 2))
        self.past = kernel[0] - 1

    def forward(self, x: Tensor, stream: Stream | None = None) -> Tensor:
        """x: (B, C, T, H, W), the next frames of the stream, or a whole clip without one."""
        if self.past:
            context = None if stream is None else stream.get(self)
            if context is None:
                context = x[:, :, :1].expand(-1, -1, self.past, -1, -1)
            x = torch.cat([context, x], dim=2)
            if stream is not None:
                stream[self] = x[:, :, -self.past :].clone()  # a view would keep the whole chunk
        return super().forward(x)


def fold(video: Tensor, tau: int, patch: int, started: bool = False) -> Tensor:
    """Trades resolution for channels: groups of `tau` frames, patches of `patch` x `patch` pixels.

    Args:
        video: (B, C, T, H, W); T = 1 + tau * n, or tau * n if the stream has `started`. The first frame is a group of its
            own, made whole by repeating it.
    Returns:
        (B, C * tau * patch^2, F, H / patch, W / patch)
    """
    if not started:
        video = torch.cat([video[:, :, :1].expand(-1, -1, tau - 1, -1, -1), video], dim=2)
    B, C, T, H, W = video.shape
    x = video.view(B, C, T // tau, tau, H // patch, patch, W // patch, patch)
    return x.permute(0, 1, 3, 5, 7, 2, 4, 6).reshape(B, -1, T // tau, H // patch, W // patch)


def unfold(x: Tensor, tau: int, patch: int, started: bool = False) -> Tensor:
    """The inverse of `fold`: (B, C * tau * patch^2, F, h, w) -> (B, C, T, h * patch, w * patch)."""
    B, _, F, h, w = x.shape
    x = x.view(B, -1, tau, patch, patch, F, h, w).permute(0, 1, 5, 2, 6, 3, 7, 4)
    video = x.reshape(B, -1, F * tau, h * patch, w * patch)
    return video if started else video[:, :, tau - 1 :]
