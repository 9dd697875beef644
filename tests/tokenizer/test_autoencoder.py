"""The shortcuts around what changes resolution or channels: what is left of each layer when its convolution says nothing."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kit.tokenizer.autoencoder import Downsample, LatentConv, Upsample, fit_channels


def silent(layer: nn.Module) -> nn.Module:
    for p in layer.parameters():
        nn.init.zeros_(p)
    return layer


def test_channels_are_averaged_repeated_or_left_out():
    x = torch.arange(6.0)[None]
    assert fit_channels(x, 3).tolist() == [[0.5, 2.5, 4.5]]
    assert fit_channels(x, 6).tolist() == x.tolist()
    assert fit_channels(x, 4).tolist() == [[0, 1, 2, 3]]
    assert fit_channels(x[:, :2], 6).tolist() == [[0, 0, 0, 1, 1, 1]]
    assert fit_channels(x[:, :2], 5).tolist() == [[0, 0, 0, 1, 1]]


@pytest.mark.parametrize("inputs, outputs", [(4, 4), (4, 8), (6, 3), (3, 5), (8, 2)])
def test_silent_resampling_keeps_what_it_can(inputs, outputs):
    """Each 2 x 2 places become neighbouring channels, and the reverse."""
    x = torch.randn(2, inputs, 3, 4, 6)
    down = silent(Downsample(inputs, outputs))(x)
    cells = x.unflatten(3, (2, 2)).unflatten(5, (3, 2)).permute(0, 1, 4, 6, 2, 3, 5).flatten(1, 3)  # (B, C * 4, T, h, w)
    assert down.shape == (2, outputs, 3, 2, 3)
    torch.testing.assert_close(down, fit_channels(cells, outputs))
    up = silent(Upsample(inputs, outputs))(x)
    assert up.shape == (2, outputs, 3, 8, 12)
    places = fit_channels(x, 4 * outputs).unflatten(1, (outputs, 2, 2))  # (B, C, y, x, T, h, w)
    torch.testing.assert_close(up, places.permute(0, 1, 4, 5, 2, 6, 3).flatten(3, 4).flatten(4, 5))


def test_the_latent_has_a_shortcut_of_its_own_frame():
    x = torch.randn(2, 12, 5, 3, 3)
    torch.testing.assert_close(silent(LatentConv(12, 4, temporal=True))(x), x.unflatten(1, (4, 3)).mean(2))
    torch.testing.assert_close(silent(LatentConv(12, 24, temporal=True))(x), x.repeat_interleave(2, dim=1))
