"""Causality: latent frames depend on the past only, and a clip in chunks gives the result of the whole clip."""

from __future__ import annotations

import pytest
import torch

from kit.machine import keep_freed_memory
from kit.tokenizer import TokenizerConfig
from kit.tokenizer.causal import CausalConv3d, Stream, fold, unfold

CLOSE = {"atol": 2e-5, "rtol": 2e-5}
FRAMES = 17


def video_of(frames: int = FRAMES, batch: int = 1, height: int = 8, width: int = 8, seed: int = 0) -> torch.Tensor:
    return torch.rand(batch, 3, frames, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def group_of(j: int) -> int:
    """Returns the latent frame of pixel frame j: the first is alone, then come groups of four."""
    return (j + 3) // 4


@pytest.fixture
def tokenizer(make_tokenizer):
    with torch.no_grad():
        yield make_tokenizer()


def changed_frames(a: torch.Tensor, b: torch.Tensor) -> list[bool]:
    """Returns for each frame of (B, C, T, H, W) whether the two videos differ."""
    return [not torch.allclose(x, y, **CLOSE) for x, y in zip(a.unbind(2), b.unbind(2))]


def test_a_pixel_frame_changes_its_latent_frame_and_none_before(tokenizer):
    video = video_of()
    clean = tokenizer.encode(video)
    assert clean.shape == (1, 4, 5, 2, 2)
    for j in range(FRAMES):
        other = video.clone()
        other[:, :, j] = video_of(1, seed=1 + j)[:, :, 0]
        changed = changed_frames(clean, tokenizer.encode(other))
        assert not any(changed[: group_of(j)]), j
        assert changed[group_of(j)], j


def test_a_latent_frame_changes_its_pixel_frames_and_none_before(tokenizer):
    feature = torch.randn(1, 4, 5, 2, 2)
    clean = tokenizer.decode(feature)
    assert clean.shape == (1, 3, FRAMES, 8, 8)
    for f in range(5):
        other = feature.clone()
        other[:, :, f] += torch.randn(1, 4, 2, 2)
        changed = changed_frames(clean, tokenizer.decode(other))
        assert [c for j, c in enumerate(changed) if group_of(j) <= f] == [group_of(j) == f for j in range(1 + 4 * f)]


def test_an_image_is_the_first_frame_of_a_video(tokenizer):
    video = video_of()
    image = video[:, :, :1]
    torch.testing.assert_close(tokenizer.encode(image), tokenizer.encode(video)[:, :, :1], **CLOSE)
    bits = tokenizer.bits(video)
    assert torch.equal(tokenizer.bits(image), bits[:, tokenizer.schedule_of(video).frame(0)])
    torch.testing.assert_close(tokenizer.reconstruct(image), tokenizer.reconstruct(video)[:, :, :1], **CLOSE)


@pytest.mark.parametrize("latents", [(1, 1, 1, 1, 1), (1, 4), (2, 3), (3, 1, 1), (5,)], ids=str)
def test_chunk_by_chunk_is_the_whole(tokenizer, latents):
    """Encodes and decodes with a stream; `latents` are the chunks' numbers of latent frames."""
    video = video_of()
    feature = tokenizer.encode(video)
    pixels = [4 * n for n in latents]
    pixels[0] -= 3
    encoding, decoding = Stream(), Stream()
    chunks = [tokenizer.encode(chunk, encoding) for chunk in video.split(pixels, dim=2)]
    assert [chunk.shape[2] for chunk in chunks] == list(latents)
    torch.testing.assert_close(torch.cat(chunks, 2), feature, **CLOSE)
    outputs = [tokenizer.decode(chunk, decoding) for chunk in feature.split(list(latents), dim=2)]
    assert [output.shape[2] for output in outputs] == pixels
    torch.testing.assert_close(torch.cat(outputs, 2), tokenizer.decode(feature), **CLOSE)


def test_encoder_and_decoder_may_share_a_stream_and_a_new_stream_is_a_new_clip(tokenizer):
    video = video_of()
    for _ in range(2):
        stream = Stream()
        chunks = [tokenizer.decode(tokenizer.encode(v, stream), stream) for v in video.split([1, 4, 4, 8], dim=2)]
        torch.testing.assert_close(torch.cat(chunks, 2), tokenizer.decode(tokenizer.encode(video)), **CLOSE)


def test_a_stream_does_not_grow(tokenizer):
    stream = Stream()

    def held() -> int:
        return sum(x.untyped_storage().nbytes() for x in stream.values() if isinstance(x, torch.Tensor))

    sizes = []
    for chunk in video_of(33).split([1, 8, 4, 4, 16], dim=2):
        tokenizer.decode(tokenizer.encode(chunk, stream), stream)
        sizes.append(held())
    assert len(set(sizes)) == 1 and sizes[0] > 0


@pytest.mark.parametrize("kernel", [(1, 1, 1), (3, 3, 3), (2, 1, 3), (4, 3, 1)])
def test_convolution_repeats_the_first_frame_before_the_first(kernel):
    """It equals an ordinary convolution of the clip with copies of its first frame in front."""
    conv = CausalConv3d(2, 3, kernel)
    x = torch.randn(1, 2, 6, 5, 4)
    past = kernel[0] - 1
    longer = torch.cat([x[:, :, :1]] * past + [x], dim=2)
    padding = (0, kernel[1] // 2, kernel[2] // 2)
    weight = conv.weight.unflatten(1, (kernel[0], 2)).transpose(1, 2)  # (out, in, time, h, w)
    expected = torch.nn.functional.conv3d(longer, weight, conv.bias, padding=padding)
    torch.testing.assert_close(conv(x), expected)
    assert conv(x).shape[2:] == x.shape[2:]


@pytest.mark.parametrize("patch, frames", [(1, 5), (2, 9), (4, 1)])
def test_unfold_undoes_fold(patch, frames):
    video = video_of(frames, batch=2, height=8, width=12)
    folded = fold(video, 4, patch)
    assert folded.shape == (2, 3 * 4 * patch**2, (frames + 3) // 4, 8 // patch, 12 // patch)
    assert folded.movedim(1, -1).is_contiguous()
    assert torch.equal(unfold(folded, 4, patch), video)
    later = video_of(8, batch=2, height=8, width=12)
    assert torch.equal(unfold(fold(later, 4, patch, started=True), 4, patch, started=True), later)


def test_fold_keeps_frames_and_patches_together():
    video = video_of(9, height=4, width=6)
    folded = fold(video, 4, 2)
    group = video[0, :, 5:9, 2:4, 4:6]  # latent frame 2, cell (1, 2)
    assert sorted(folded[0, :, 2, 1, 2].tolist()) == sorted(group.flatten().tolist())


def test_a_still_video_has_still_features_and_repeats_itself(tokenizer):
    """Every latent frame equals that of the image, so all groups of four frames are decoded alike."""
    image = video_of(1)
    feature = tokenizer.encode(image.expand(-1, -1, FRAMES, -1, -1))
    torch.testing.assert_close(feature, tokenizer.encode(image).expand_as(feature), **CLOSE)
    output = tokenizer.decode(feature)
    torch.testing.assert_close(output[:, :, 1:13], output[:, :, 5:17], **CLOSE)
    torch.testing.assert_close(output[:, :, 0], output[:, :, 4], **CLOSE)


def test_clips_of_a_batch_do_not_meet(tokenizer):
    video = video_of(9, batch=3)
    feature = tokenizer.encode(video)
    torch.testing.assert_close(feature, torch.cat([tokenizer.encode(v) for v in video.split(1)]), **CLOSE)
    alone = torch.cat([tokenizer.decode(z) for z in feature.split(1)])
    torch.testing.assert_close(tokenizer.decode(feature), alone, **CLOSE)


@pytest.mark.parametrize("height, width, grids", [(8, 12, ((1, 2), (2, 3))), (16, 8, ((2, 1), (4, 2)))])
def test_sizes_need_not_be_square(tokenizer, height, width, grids):
    video = video_of(5, height=height, width=width)
    schedule = tokenizer.schedule_of(video)
    assert schedule.grids == grids and schedule.latent_frames == 2
    assert tokenizer.encode(video).shape == (1, 4, 2, height // 4, width // 4)
    assert tokenizer.bits(video).shape == (1, schedule.length, 4)
    assert tokenizer.reconstruct(video).shape == video.shape


def test_decoding_the_coarse_scales_only(tokenizer):
    """Fewer scales give a clip of the same shape and another picture."""
    video = video_of(5)
    bits, schedule = tokenizer.bits(video), tokenizer.schedule_of(video)
    coarse, fine = tokenizer.decode_bits(bits, schedule, scales=1), tokenizer.decode_bits(bits, schedule)
    assert coarse.shape == fine.shape == video.shape
    assert not torch.allclose(coarse, fine)
    assert fine.abs().max() <= 1


@pytest.mark.parametrize(
    "size, message",
    [
        ((6, 8, 8), "1 \\+ 4n"),
        ((5, 10, 8), "multiples of 4"),
        ((5, 8, 10), "multiples of 4"),
        ((5, 16, 16), "shorter side must be at most"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(tokenizer, size, message):
    with pytest.raises(ValueError, match=message):
        tokenizer.schedule(*size)


def test_config_is_plain_values_and_back():
    config = TokenizerConfig(bits=4, scales=[1, 2], patch=2, widths=[8, 16, 16], blocks=1)
    assert config.compression == 8
    assert TokenizerConfig(**config.as_dict()) == config
    assert config.as_dict()["scales"] == [1, 2]


@pytest.mark.parametrize(
    ("video", "message"),
    [
        (torch.full((1, 3, 5, 8, 8), 200, dtype=torch.uint8), "expected a floating point video .* found torch.uint8"),
        (torch.zeros(1, 1, 5, 8, 8), r"found torch.float32 \(1, 1, 5, 8, 8\)"),
        (torch.zeros(3, 5, 8, 8), r"found torch.float32 \(3, 5, 8, 8\)"),
        (torch.full((1, 3, 5, 8, 8), 200.0), r"expected pixels in \[-1, 1\], found 200 to 200; scale them first"),
        (torch.full((1, 3, 5, 8, 8), float("nan")), r"expected pixels in \[-1, 1\], found nan"),
        (torch.zeros(1, 3, 6, 8, 8), "1 \\+ 4n frames, got 6; use 5 or 9"),
    ],
)
def test_wrong_pixels_are_refused(make_tokenizer, video, message):
    with pytest.raises(ValueError, match=message):
        make_tokenizer().reconstruct(video)
    with pytest.raises(ValueError, match=message):
        make_tokenizer().bits(video)


@pytest.mark.parametrize("inputs, outputs, kernel", [(192, 128, (1, 1, 1)), (64, 192, (3, 3, 3)), (32, 256, (1, 3, 3))])
def test_bfloat16_gradients_do_not_depend_on_what_memory_held(inputs, outputs, kernel):
    """On CPUs with AMX, 3D kernels of these shapes read beyond their data, where NaN gave NaN gradients."""
    keep_freed_memory()
    conv = CausalConv3d(inputs, outputs, kernel).to(memory_format=torch.channels_last)
    x = torch.randn(1, inputs, 5, 32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        y = conv(x)
    grad = torch.randn(y.shape, dtype=y.dtype)
    spoilt = [torch.full((n,), torch.nan) for n in [1_000, 10_000, 100_000, 1_000_000] * 8]
    del spoilt
    y.backward(grad)
    exact = torch.autograd.grad(conv(x), conv.weight, grad.float())[0]
    assert (conv.weight.grad - exact).norm() < 0.02 * exact.norm()
