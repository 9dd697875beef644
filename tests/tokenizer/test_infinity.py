"""Infinity's image tokenizer: its weights load, and our modules compute what its modules compute.

The weights are random here: the published ones could not be downloaded.
"""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from kit.checkpoint import load_tokenizer
from kit.cli import main
from kit.data.shapes import Shapes
from kit.media import to_uint8
from kit.tokenizer import Tokenizer, TokenizerConfig
from kit.tokenizer.causal import Stream
from kit.tokenizer.infinity_weights import SCALES, infinity_name, load_infinity
from kit.tokenizer.inflate import inflate
from kit.tokenizer.quantizer import bits_to_feature, feature_to_bits
from tests.fixtures import CLIP, INFINITY, QUICK, infinity_file, infinity_shapes
from tests.plugin import past_gradients, randomise

CLOSE = {"atol": 2e-5, "rtol": 2e-5}
PUBLISHED = {"widths": (128, 256, 512, 512, 512), "blocks": 2}
VIDEO = {"architecture": "infinity", "patch": 1, "amplitude": None, **INFINITY}


# A second Infinity, as plain functions of its weights (flux_vqgan.py, multiscale_bsq.py).


def conv(w: dict[str, Tensor], name: str, x: Tensor, stride: int = 1, padding: int = 1) -> Tensor:
    return F.conv2d(x, w[f"{name}.conv.weight"], w[f"{name}.conv.bias"], stride=stride, padding=padding)


def norm_swish(w: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    y = F.group_norm(x, 32, w[f"{name}.norm.weight"], w[f"{name}.norm.bias"], eps=1e-6)
    return y * torch.sigmoid(y)


def block(w: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    y = conv(w, f"{name}.conv1", norm_swish(w, f"{name}.norm1", x))
    y = conv(w, f"{name}.conv2", norm_swish(w, f"{name}.norm2", y))
    if f"{name}.nin_shortcut.conv.weight" in w:
        x = conv(w, f"{name}.nin_shortcut", x, padding=0)
    return x + y


def encode(w: dict[str, Tensor], x: Tensor) -> Tensor:
    """Encodes as Infinity does: (B, 3, H, W) -> (B, d, h, w)."""
    x = conv(w, "encoder.conv_in", x)
    for i in range(len(INFINITY["widths"])):
        for j in range(INFINITY["blocks"]):
            x = block(w, f"encoder.down.{i}.block.{j}", x)
        if i < len(INFINITY["widths"]) - 1:
            x = conv(w, f"encoder.down.{i}.downsample.conv", F.pad(x, (0, 1, 0, 1)), stride=2, padding=0)
    x = block(w, "encoder.mid.block_2", block(w, "encoder.mid.block_1", x))
    return conv(w, "encoder.conv_out", norm_swish(w, "encoder.norm_out", x))


def decode(w: dict[str, Tensor], x: Tensor) -> Tensor:
    """Decodes as Infinity does: (B, d, h, w) -> (B, 3, H, W)."""
    x = conv(w, "decoder.conv_in", x)
    x = block(w, "decoder.mid.block_2", block(w, "decoder.mid.block_1", x))
    for i in reversed(range(len(INFINITY["widths"]))):
        for j in range(INFINITY["blocks"] + 1):
            x = block(w, f"decoder.up.{i}.block.{j}", x)
        if i > 0:
            x = conv(w, f"decoder.up.{i}.upsample.conv", x.repeat_interleave(2, 2).repeat_interleave(2, 3))
    return conv(w, "decoder.conv_out", norm_swish(w, "decoder.norm_out", x))


def quantize(x: Tensor, grids: tuple[tuple[int, int], ...]) -> tuple[Tensor, Tensor]:
    """Quantises (B, d, h, w) as Infinity does, trilinear with one frame: the sum of the residual maps, and bits (B, L, d)."""
    residual, total, bits = x[:, :, None], 0.0, []
    for grid in grids:
        part = F.interpolate(residual, (1, *grid), mode="area")
        unit = F.normalize(part, dim=1)
        code = torch.where(unit > 0, 1.0, -1.0) / x.shape[1] ** 0.5
        bits.append((code > 0).flatten(2).transpose(1, 2))
        code = F.interpolate(code, (1, *x.shape[2:]), mode="trilinear")
        residual, total = residual - code, total + code
    return total[:, :, 0], torch.cat(bits, 1)


@pytest.fixture
def weights(tmp_path) -> dict[str, Tensor]:
    return infinity_file(tmp_path / "infinity_vae_d8.pth")


@pytest.fixture
def image(weights, tmp_path) -> Tokenizer:
    return load_infinity(tmp_path / "infinity_vae_d8.pth").eval()


@pytest.fixture
def video(image) -> Tokenizer:
    tokenizer = randomise(Tokenizer(TokenizerConfig(**VIDEO, scales=SCALES)), seed=7)
    inflate(image, tokenizer)
    return tokenizer


@torch.no_grad()
def test_a_picture_becomes_what_infinity_makes_of_it(image, weights):
    picture = torch.rand(2, 3, 64, 80) * 2 - 1
    clip, schedule = picture[:, :, None], image.schedule(1, 64, 80)
    feature = encode(weights, picture)
    torch.testing.assert_close(image.encode(clip)[:, :, 0], feature, **CLOSE)
    total, bits = quantize(feature, schedule.grids)
    assert torch.equal(feature_to_bits(feature[:, :, None], schedule), bits)
    torch.testing.assert_close(bits_to_feature(bits, schedule)[:, :, 0], total)
    torch.testing.assert_close(image.decode(total[:, :, None])[:, :, 0], decode(weights, total), **CLOSE)


def test_the_config_comes_from_the_file(image):
    assert image.config == TokenizerConfig(**VIDEO, scales=SCALES, temporal=False)
    assert image.config.compression == 4 and image.config.scales[-1] * 4 == 64


@pytest.mark.parametrize(("bits", "levels"), [(16, 5), (32, 5), (64, 5), (14, 4)])
def test_names_and_shapes_at_the_published_sizes(bits, levels):
    """Each weight of ours has a weight of theirs of the same shape, apart from time, and none of theirs is left over."""
    widths = PUBLISHED["widths"][:levels]
    config = TokenizerConfig(bits, SCALES, "infinity", 1, widths, PUBLISHED["blocks"], amplitude=None, temporal=False)
    with torch.device("meta"):
        ours = Tokenizer(config).state_dict()
    found = {infinity_name(name, config): (w[:, :, 0] if w.ndim == 5 else w).shape for name, w in ours.items()}
    assert len(found) == len(ours)
    assert found == infinity_shapes(bits, **{**PUBLISHED, "widths": widths})
    assert config.compression == 2 ** (levels - 1)


def test_some_names_by_hand():
    """The names are those that PyTorch prints for the modules of flux_vqgan.py."""
    shapes = infinity_shapes(32, **PUBLISHED)
    assert shapes["encoder.down.1.block.0.nin_shortcut.conv.weight"] == (256, 128, 1, 1)
    assert shapes["encoder.down.3.downsample.conv.conv.weight"] == (512, 512, 3, 3)
    assert "encoder.down.4.downsample.conv.conv.weight" not in shapes
    assert shapes["encoder.conv_out.conv.weight"] == (32, 512, 3, 3)
    assert shapes["decoder.up.4.upsample.conv.conv.bias"] == (512,)
    assert shapes["decoder.up.1.block.0.nin_shortcut.conv.weight"] == (256, 512, 1, 1)
    assert shapes["decoder.up.0.block.2.norm2.norm.bias"] == (128,)
    assert "decoder.up.0.upsample.conv.conv.weight" not in shapes and "decoder.up.0.block.3.norm1.norm.bias" not in shapes


def change(path, **entries):
    """Sets tensors in a file of weights; None removes one."""
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["vae"] = {name: w for name, w in (checkpoint["vae"] | entries).items() if w is not None}
    torch.save(checkpoint, path)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"decoder.up.1.block.2.conv2.conv.bias": None}, r"up.1.block.2.conv2.conv.bias is missing, expected \(32,\)"),
        ({"encoder.mid.attn_1.q.conv.bias": torch.ones(64)}, "encoder.mid.attn_1.q.conv.bias is unknown"),
        ({"decoder.conv_in.conv.weight": torch.ones(64, 9, 3, 3)}, r"is \(64, 9, 3, 3\), expected \(64, 8, 3, 3\)"),
        ({"encoder.conv_out.conv.weight": None}, "has no encoder.conv_out.conv.weight, expected it of a tokenizer"),
        ({"encoder.down.0.block.0.conv2.conv.weight": None}, "has no encoder.down.0.block.0.conv2.conv.weight"),
        ({"encoder.down.0.block.1.conv2.conv.weight": None}, r"block.1.conv2.conv.weight is missing, .* \(32, 32, 3, 3\)"),
        ({f"decoder.more.{n}": torch.ones(1) for n in range(6)}, "decoder.more.3 is unknown and 2 more"),
        ({"quantizer.layernorm.weight": torch.ones(8)}, r"with weights of its own \(quantizer.layernorm.weight\)"),
    ],
)
def test_what_does_not_fit_is_named(weights, tmp_path, entries, message):
    path = tmp_path / "infinity_vae_d8.pth"
    change(path, **entries)
    with pytest.raises(ValueError, match=f"infinity_vae_d8.pth .*{message}"):
        load_infinity(path)


def test_other_files_are_refused(tmp_path):
    torch.save({"state_dict": {}}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="other.pth has no entry `vae`"):
        load_infinity(tmp_path / "other.pth")
    with pytest.raises(ValueError, match="tokenizer.architecture=slow; expected one of: fast, infinity"):
        Tokenizer(TokenizerConfig(architecture="slow"))
    with pytest.raises(ValueError, match="num_groups"):
        Tokenizer(TokenizerConfig(architecture="infinity", widths=(48,)))


@torch.no_grad()
def test_a_still_video_is_the_image(image, video):
    picture = torch.rand(1, 3, 1, 64, 64) * 2 - 1
    still = picture.expand(-1, -1, 9, -1, -1)
    feature = image.encode(picture)
    torch.testing.assert_close(video.encode(still), feature.expand(-1, -1, 3, -1, -1), **CLOSE)
    decoded = image.decode(feature)
    torch.testing.assert_close(video.decode(feature.expand(-1, -1, 3, -1, -1)), decoded.expand_as(still), **CLOSE)
    bits = feature_to_bits(feature, image.schedule_of(picture))
    assert (video.bits(still) == bits.repeat(1, 3, 1)).float().mean() > 0.999  # a bit in the balance may turn


def test_time_is_learned_from_there(video):
    """Every weight has a gradient, also the slices for past frames, which start at zero."""
    clip = torch.rand(1, 3, 5, 64, 64) * 2 - 1
    (video.train()(clip)[0] - clip).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in video.parameters())
    past = past_gradients(video)
    coarsest = (INFINITY["blocks"] + 2) + (INFINITY["blocks"] + 3)  # one kernel of each residual block there
    assert len(past) == coarsest + 2 and all(grad.abs().sum() > 0 for grad in past)


@torch.no_grad()
@pytest.mark.parametrize("latents", [(1, 1, 1), (1, 2), (2, 1)], ids=str)
def test_chunk_by_chunk_is_the_whole(latents):
    tokenizer = randomise(Tokenizer(TokenizerConfig(**VIDEO, scales=(1, 2, 4))))
    clip = torch.rand(1, 3, 9, 16, 16) * 2 - 1
    feature = tokenizer.encode(clip)
    assert feature.shape == (1, 8, 3, 4, 4) and not torch.allclose(feature[:, :, 1], feature[:, :, 2], **CLOSE)
    pixels = [4 * n for n in latents]
    pixels[0] -= 3
    stream = Stream()
    chunks = [tokenizer.encode(chunk, stream) for chunk in clip.split(pixels, dim=2)]
    torch.testing.assert_close(torch.cat(chunks, 2), feature, **CLOSE)
    outputs = [tokenizer.decode(chunk, stream) for chunk in feature.split(list(latents), dim=2)]
    torch.testing.assert_close(torch.cat(outputs, 2), tokenizer.decode(feature), **CLOSE)


@torch.no_grad()
def test_a_frame_changes_none_before(video):
    randomise(video)
    clip = torch.rand(1, 3, 9, 16, 16) * 2 - 1
    other = clip.clone()
    other[:, :, 5:] = 0.5
    before, after = video.encode(clip), video.encode(other)
    torch.testing.assert_close(after[:, :, :2], before[:, :, :2], **CLOSE)
    assert not torch.allclose(after[:, :, 2], before[:, :, 2], **CLOSE)


def test_scales_may_be_others_for_video(image):
    smaller = Tokenizer(TokenizerConfig(**VIDEO, scales=(1, 2, 4), scale_bits=(4, 8, 8)))
    inflate(image, smaller)
    assert torch.equal(smaller.decoder.norm.weight, image.decoder.norm.weight)
    fast = Tokenizer(TokenizerConfig(**{**VIDEO, "architecture": "fast"}))
    with pytest.raises(ValueError, match="architecture: infinity, fast"):
        inflate(image, fast)


def test_prepared_reconstructed_and_trained_by_command(weights, image, tmp_path, capsys):
    source, made = tmp_path / "infinity_vae_d8.pth", tmp_path / "infinity_vae_d8_kit.ckpt"
    assert main(["prepare", "infinity", f"source={source}", f"root={tmp_path}"]) == 0
    assert str(made) in capsys.readouterr().out
    loaded = load_tokenizer(made)
    assert loaded.model.config == image.config and loaded.clip["height"] == loaded.clip["width"] == 64
    assert all(torch.equal(w, image.state_dict()[name]) for name, w in loaded.model.state_dict().items())

    Image.fromarray(to_uint8(Shapes("val", 1, 64, 64)[0]["video"])[0]).save(tmp_path / "picture.png")
    assert main(["reconstruct", f"ckpt={made}", f"video={tmp_path / 'picture.png'}", f"root={tmp_path}"]) == 0

    shape = ["tokenizer.bits=8", "tokenizer.widths=[32,32,64]", "tokenizer.scales=[1,2,4,8]"]
    start = ["init=infinity", f"init.ckpt={made}", f"root={tmp_path}", *CLIP, *shape, *QUICK, "trainer.val_check_interval=1"]
    assert main(["fit", "conf=stage1_tokenizer", *start, "recipe.tokenizer.steps=1", "optimizer.lr=0", "name=still"]) == 0
    trained = load_tokenizer(tmp_path / "still" / "checkpoints" / "last.ckpt").model
    assert trained.config.temporal and trained.config.architecture == "infinity"
    assert torch.equal(trained.decoder.norm.weight, image.decoder.norm.weight)
    assert main(["fit", "conf=stage1_tokenizer", *start, "recipe.tokenizer.steps=1", "name=moved"]) == 0
    moved = torch.load(tmp_path / "moved" / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert not torch.equal(moved["model.decoder.norm.weight"], image.decoder.norm.weight)

    capsys.readouterr()
    assert main(["fit", "conf=stage1_tokenizer", *start, "name=other", "tokenizer.bits=4"]) == 1
    assert "differ in more than time (bits: 8, 4)" in capsys.readouterr().err
    assert main(["fit", "conf=stage1_tokenizer", *start, "name=resumed", f"ckpt={made}"]) == 1
    assert "infinity_vae_d8_kit.ckpt holds weights alone" in capsys.readouterr().err


def test_where_to_get_the_file_is_said(tmp_path, capsys):
    for words in ([], [f"source={tmp_path / 'gone.pth'}"]):
        assert main(["prepare", "infinity", f"root={tmp_path}", *words]) == 1
        error = capsys.readouterr().err
        assert "fetch infinity_vae_d32reg.pth" in error and "huggingface.co/FoundationVision/Infinity" in error
