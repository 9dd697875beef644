"""Encoder and decoder: shortcuts around layers that change resolution or channels, blocks recomputed and compiled."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from callbacks import CompileLayers
from kit.data.shapes import Shapes
from kit.inspection import bit_use
from kit.tokenizer import Tokenizer, TokenizerConfig
from kit.tokenizer.autoencoder import ChannelNorm, Downsample, FromLatent, ResBlock, Upsample, fit_channels
from kit.tokenizer.causal import Stream
from kit.tokenizer.module import inputs_of
from tests.fixtures import CLOSE, INFINITY
from tests.plugin import randomise


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


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_videos_of_other_floating_point_numbers_are_those_of_float32(dtype, make_tokenizer):
    tokenizer, video = make_tokenizer(), torch.tensor([-1.0, 0.5, 0.25, 1.0]).repeat(2, 3, 5, 8, 2)  # exact in all of them
    feature = tokenizer.encode(video)
    assert torch.equal(tokenizer.encode(video.to(dtype)), feature)
    assert torch.equal(tokenizer.reconstruct(video.to(dtype)), tokenizer.reconstruct(video))
    torch.testing.assert_close(tokenizer.decode(feature.double()), tokenizer.decode(feature))


def test_clips_of_sizes_that_cannot_be_are_told(make_tokenizer):
    tokenizer = make_tokenizer()
    with pytest.raises(ValueError, match=r"a clip must have 1 \+ 4n frames, got 8"):
        tokenizer.encode(torch.zeros(1, 3, 8, 8, 8))
    with pytest.raises(ValueError, match="height and width must be multiples of 4, got 8 x 10"):
        tokenizer.encode(torch.zeros(1, 3, 5, 8, 10))


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


@pytest.mark.filterwarnings("ignore:User provided device_type")
def test_norms_keep_the_type_of_their_input_on_a_gpu():
    """There autocast would compute them, and all up to the next convolution, in float32."""
    with FakeTensorMode(), torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        torch.set_autocast_enabled("cuda", True)  # where there is none, torch.autocast has left it off
        norm, x = ChannelNorm(8), torch.empty(2, 8, 3, 4, 4, dtype=torch.bfloat16, device="cuda")
        norm.weight, norm.bias = (nn.Parameter(torch.empty(8, device="cuda")) for _ in range(2))
        assert F.layer_norm(x.movedim(1, -1), (8,), norm.weight.to(x.dtype), norm.bias.to(x.dtype)).dtype == torch.float32
        assert norm(x).dtype == torch.bfloat16
        assert torch.is_autocast_enabled("cuda")


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


def test_heads_read_what_is_normalised_and_activated():
    model, seen = randomise(Tokenizer(TokenizerConfig(bits=4, scales=(1, 2), patch=2, widths=(8, 16), blocks=1))), []
    for part in (model.encoder, model.decoder):
        part.norm.register_forward_hook(lambda module, inputs, output: seen.append(nn.functional.silu(output)))
        part.head.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    model.reconstruct(torch.rand(1, 3, 5, 8, 8))
    assert torch.equal(*seen[:2]) and torch.equal(*seen[2:])


@pytest.mark.parametrize("temporal, past", [(True, 2), (False, 0)])
def test_blocks_of_the_coarsest_level_alone_see_past_frames(temporal, past):
    model = Tokenizer(TokenizerConfig(bits=4, scales=(1, 2), patch=2, widths=(8, 16, 24), blocks=1, temporal=temporal))
    assert [block.conv1.past for block in model.layers] == [0, 0, past, past, 0, 0]


def test_a_new_block_changes_nothing():
    x = torch.randn(2, 8, 3, 4, 4)
    assert torch.equal(ResBlock(8, 8, temporal=True)(x), x)


@pytest.mark.parametrize("frames", [5, 1])
def test_the_gradient_of_the_head_is_autograds(frames):
    decoder = randomise(
        Tokenizer(TokenizerConfig(bits=4, scales=(1, 2), patch=2, widths=(8, 16), temporal=frames > 1)).decoder
    )
    feature, video = torch.randn(2, 4, 1 + frames // 4, 2, 3), torch.randn(2, 3, frames, 8, 12)
    with inputs_of(decoder.head) as hidden:
        output = decoder(feature)
    slope, expected = torch.autograd.grad((output - video).pow(4).sum(), [output, decoder.head.weight])
    torch.testing.assert_close(decoder.head_gradient(*hidden, slope), expected, atol=1e-3, rtol=1e-4)


def trained(model: Tokenizer, video: torch.Tensor) -> dict[str, torch.Tensor]:
    """Returns the reconstruction of a training step, and the gradient of each weight."""
    output, _, _ = model(video)
    model.zero_grad()
    (output - video).square().mean().backward()
    return {"output": output.detach(), **{name: p.grad for name, p in model.named_parameters()}}


@pytest.mark.parametrize("frames", [5, 1])
@pytest.mark.parametrize(
    "config", [{"patch": 2, "widths": (8, 16, 16)}, {"architecture": "infinity", **INFINITY, "patch": 1}]
)
def test_what_is_recomputed_is_what_was(config, frames):
    """Reconstruction and gradients are the same to the last bit, of clips and images, and less is kept for the backward
    pass."""
    model = randomise(Tokenizer(TokenizerConfig(**{"bits": 8, **config}, scales=(1, 2, 4), temporal=frames > 1)))
    video, names, sizes, found = torch.rand(2, 3, frames, 16, 16) * 2 - 1, [*model.state_dict()], [], []
    for model.recompute in (False, True):
        held = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x, held=held: held.update({x.data_ptr(): x.nbytes}) or x, lambda x: x
        ):
            found.append(trained(model, video))
        sizes.append(sum(held.values()))
    assert model.recompute and [*model.state_dict()] == names
    assert all(level.recompute for part in (model.encoder, model.decoder) for level in part.levels)
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert sizes[1] < 0.75 * sizes[0]


def test_a_stream_goes_through_recomputed_blocks_once(make_tokenizer):
    """Gradients through a clip that is coded chunk by chunk are those of the whole."""
    model, video, found = make_tokenizer(), torch.rand(1, 3, 9, 8, 8) * 2 - 1, []
    model.recompute = True
    for chunks in ([9], [1, 8]):
        model.zero_grad()
        stream = Stream()
        torch.cat([model.encode(chunk, stream) for chunk in video.split(chunks, dim=2)], dim=2).pow(3).sum().backward()
        found.append([p.grad.clone() for p in model.encoder.parameters()])
    torch.testing.assert_close(*found, **CLOSE)


@pytest.mark.usefixtures("traced")
def test_compiled_blocks_train_alike():
    """Also recomputed; weights keep their names, and clips coded chunk by chunk are as before."""
    plain = randomise(Tokenizer(TokenizerConfig(bits=4, scales=(1, 2), patch=2, widths=(8,), blocks=1)))
    model, video, stream = copy.deepcopy(plain), torch.rand(2, 3, 5, 4, 4) * 2 - 1, Stream()
    run, module, callback = SimpleNamespace(max_steps=3), SimpleNamespace(model=model), CompileLayers(least_steps=0)
    callback.on_fit_start(run, module)
    assert len(model.layers) == 2 and all(block._compiled_call_impl is not None for block in model.layers)
    callback.on_train_batch_start(run, module, None, 0)
    model.recompute = True
    torch.testing.assert_close(trained(model, video), trained(plain, video), atol=1e-4, rtol=1e-4)
    callback.on_train_batch_end(run, module, None, None, 0)
    with torch.no_grad():
        chunks = [model.encode(chunk, stream) for chunk in video.split([1, 4], dim=2)]
        torch.testing.assert_close(torch.cat(chunks, dim=2), plain.encode(video), **CLOSE)
    callback.on_fit_end(run, module)
    assert [*model.state_dict()] == [*plain.state_dict()]
