"""Shortcuts around layers that change resolution or channels: the output of a layer whose convolution gives 0."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kit.data.shapes import Shapes
from kit.inspection import bit_use
from kit.tokenizer import Tokenizer, TokenizerConfig
from kit.tokenizer.autoencoder import Downsample, FromLatent, ResBlock, Upsample, fit_channels


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
    """Each 2 x 2 pixels become neighbouring channels, and the reverse."""
    x = torch.randn(2, inputs, 3, 4, 6)
    down = silent(Downsample(inputs, outputs))(x)
    cells = x.unflatten(3, (2, 2)).unflatten(5, (3, 2)).permute(0, 1, 4, 6, 2, 3, 5).flatten(1, 3)  # (B, C * 4, T, h, w)
    assert down.shape == (2, outputs, 3, 2, 3)
    torch.testing.assert_close(down, fit_channels(cells, outputs))
    up = silent(Upsample(inputs, outputs))(x)
    assert up.shape == (2, outputs, 3, 8, 12)
    places = fit_channels(x, 4 * outputs).unflatten(1, (outputs, 2, 2))  # (B, C, y, x, T, h, w)
    torch.testing.assert_close(up, places.permute(0, 1, 4, 5, 2, 6, 3).flatten(3, 4).flatten(4, 5))


def test_bits_of_a_fresh_tokenizer_are_balanced_at_every_scale():
    """The shortcut into the latent has mean 0."""
    torch.manual_seed(0)
    tokenizer = Tokenizer(TokenizerConfig(bits=16, scales=(1, 2, 4), patch=4, widths=(48, 96)))
    video = torch.stack([Shapes("train", 5, 32, 32)[n]["video"] for n in range(24)])
    with torch.no_grad():
        ones = bit_use(tokenizer.bits(video), tokenizer.schedule_of(video))["ones"]
    assert ((ones.mean(1) - 0.5).abs() < 0.2).all()


def test_bfloat16_stays_bfloat16_to_the_end():
    """A shortcut must not turn the activations after it into float32."""
    tokenizer, seen = Tokenizer(TokenizerConfig(bits=8, scales=(1, 2), patch=4, widths=(16, 32))), set()
    for module in tokenizer.modules():
        if isinstance(module, (ResBlock, Downsample, Upsample, FromLatent)):
            module.register_forward_hook(lambda m, i, y: seen.add((type(m).__name__, y.dtype)))
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        tokenizer.reconstruct(torch.rand(1, 3, 5, 16, 16))
    assert {dtype for _, dtype in seen} == {torch.bfloat16} and len(seen) == 4


def test_the_latent_has_a_shortcut_of_its_own_frame():
    x = torch.randn(2, 12, 5, 3, 3)
    torch.testing.assert_close(silent(FromLatent(12, 4, temporal=True))(x), x.unflatten(1, (4, 3)).mean(2))
    torch.testing.assert_close(silent(FromLatent(12, 24, temporal=True))(x), x.repeat_interleave(2, dim=1))


def test_the_feature_has_a_shortcut_past_norm_and_activation():
    encoder, seen = Tokenizer(TokenizerConfig(bits=4, scales=(1, 2), patch=2, widths=(8, 16), blocks=1)).encoder, []
    encoder.norm.register_forward_hook(lambda module, inputs, output: seen.extend(inputs))
    silent(encoder.head)
    feature = encoder(torch.rand(1, 3, 5, 8, 8))
    torch.testing.assert_close(feature, fit_channels(seen[0], 4))


def test_a_new_block_changes_nothing():
    x = torch.randn(2, 8, 3, 4, 4)
    assert torch.equal(ResBlock(8, 8, temporal=True)(x), x)
