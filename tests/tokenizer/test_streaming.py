"""Clips of any length, size and chunking: each output frame equals that of the whole clip, padded by hand."""

from __future__ import annotations

import gc

import pytest
import torch

from kit.tokenizer import Tokenizer, TokenizerConfig
from kit.tokenizer.streaming import coded_size, pad_to, reconstruct_stream, regrouped, scaled_size, stream_scales
from tests.plugin import randomise

CLOSE = {"atol": 2e-5, "rtol": 2e-5}


def clip_of(frames: int, height: int = 8, width: int = 8) -> torch.Tensor:
    return torch.rand(3, frames, height, width) * 2 - 1


def chunked(clip: torch.Tensor, lengths) -> list[torch.Tensor]:
    return list(clip.split(list(lengths), dim=1))


def joined(chunks) -> torch.Tensor:
    return torch.cat(list(chunks), dim=1)


def whole(tokenizer: Tokenizer, clip: torch.Tensor) -> torch.Tensor:
    """Reconstructs a whole clip, padded here row by row and frame by frame."""
    frames, height, width = clip.shape[1:]
    while (clip.shape[1] - 1) % tokenizer.encoder.tau:
        clip = torch.cat([clip, clip[:, -1:]], dim=1)
    while clip.shape[2] % 4 or clip.shape[2] < 8:
        clip = torch.cat([clip, clip[:, :, -1:]], dim=2)
    while clip.shape[3] % 4 or clip.shape[3] < 8:
        clip = torch.cat([clip, clip[..., -1:]], dim=3)
    pictures = [clip] if tokenizer.config.temporal else clip.split(1, dim=1)
    return joined(tokenizer.reconstruct(p[None])[0] for p in pictures)[:, :frames, :height, :width]


@pytest.fixture(params=[True, False], ids=["video", "images"])
def tokenizer(request):
    """A tokenizer with 4 x 4 pixels per cell and a shorter side of 8 pixels."""
    shape = dict(bits=4, scales=(1, 2), patch=2, widths=(8, 16), blocks=1)
    return randomise(Tokenizer(TokenizerConfig(**shape, temporal=request.param)))


@pytest.mark.parametrize(
    "lengths", [(17,), (1,) * 17, (1, 16), (5, 12), (1, 4, 4, 8), (2, 3, 7, 1, 4), (16, 1), (0, 3, 0, 14)], ids=str
)
def test_every_chunking_is_the_whole(tokenizer, lengths):
    clip = clip_of(17)
    output = joined(reconstruct_stream(tokenizer, chunked(clip, lengths)))
    torch.testing.assert_close(output, whole(tokenizer, clip), **CLOSE)


@pytest.mark.parametrize("frames", range(1, 10))
def test_every_length_comes_back(tokenizer, frames):
    clip = clip_of(frames)
    for lengths in ((frames,), (1,) * frames, (frames // 2, frames - frames // 2)):
        output = joined(reconstruct_stream(tokenizer, chunked(clip, lengths)))
        torch.testing.assert_close(output, whole(tokenizer, clip), **CLOSE)


@pytest.mark.parametrize("size", [(5, 7), (7, 5), (8, 13), (21, 8), (6, 30), (1, 1)], ids=str)
def test_every_size_comes_back(tokenizer, size):
    clip = clip_of(6, *size)
    output = joined(reconstruct_stream(tokenizer, chunked(clip, (4, 2))))
    assert output.shape == clip.shape
    torch.testing.assert_close(output, whole(tokenizer, clip), **CLOSE)


def test_50_x_70_on_a_tokenizer_of_64():
    config = TokenizerConfig(bits=4, scales=(1, 2, 8), patch=4, widths=(8, 16), blocks=1)
    tokenizer, clip = randomise(Tokenizer(config)), clip_of(3, 50, 70)
    assert coded_size(config, 50, 70) == (64, 72)
    with torch.no_grad():
        expected = tokenizer.reconstruct(pad_to(clip[None], 5, 64, 72))[0, :, :3, :50, :70]
    torch.testing.assert_close(joined(reconstruct_stream(tokenizer, chunked(clip, (1, 2)))), expected, **CLOSE)


def test_frames_come_with_what_each_number_of_scales_holds(tokenizer):
    """Outputs are what the first k scales decode to, and come with the given frames."""
    clip = clip_of(9)
    frames, outputs = zip(*stream_scales(tokenizer, chunked(clip, (4, 5)), [1, 2]))
    assert torch.equal(joined(frames), clip)
    outputs = torch.cat(outputs, dim=2)
    assert not torch.allclose(outputs[0], outputs[1])
    pictures = [clip] if tokenizer.config.temporal else clip.split(1, dim=1)
    for k in (1, 2):
        parts = []
        for p in pictures:
            schedule = tokenizer.schedule_of(p[None])
            with torch.no_grad():
                parts.append(tokenizer.decode_bits(tokenizer.bits(p[None]), schedule, k)[0])
        torch.testing.assert_close(outputs[k - 1], joined(parts), **CLOSE)


def test_a_group_is_coded_when_it_is_complete(tokenizer):
    """No frame beyond a group is read before the group comes out, and no frame is held back."""
    asked = []

    def frames():
        for chunk in clip_of(9).split(1, dim=1):
            asked.append(chunk)
            yield chunk

    lengths = [(len(asked), output.shape[1]) for output in reconstruct_stream(tokenizer, frames())]
    assert lengths == ([(1, 1), (5, 4), (9, 4)] if tokenizer.config.temporal else [(n, 1) for n in range(1, 10)])


def test_what_is_held_does_not_grow(tokenizer):
    """Counts the bytes of all tensors that Python knows, after each chunk but the first."""

    def held() -> int:
        storages = [x.untyped_storage() for x in gc.get_objects() if type(x) is torch.Tensor]
        return sum({s.data_ptr(): s.nbytes() for s in storages}.values())

    chunks = (clip_of(6) for _ in range(8))  # whole groups and a half: 5, 4, 8, 4, 8 ... frames
    after = [held() for _ in reconstruct_stream(tokenizer, chunks)]
    assert len(after) >= 8 and len(set(after[1::2])) == len(set(after[2:-1:2])) == 1
    rest = list(regrouped([clip_of(6)], 4))[-1]
    assert rest.untyped_storage().nbytes() == rest.nbytes, "the chunk that it is of is let go"


@pytest.mark.parametrize("lengths", [(17,), (1,) * 17, (2, 3, 7, 1, 4), (0, 3, 0, 12)], ids=str)
def test_regrouped_frames_are_whole_groups_up_to_the_last(lengths):
    clip = clip_of(sum(lengths), 1, 1)
    groups = list(regrouped(chunked(clip, lengths), 4))
    assert torch.equal(joined(groups), clip)
    assert len(groups) == 1 or groups[0].shape[1] % 4 == 1
    assert all(group.shape[1] % 4 == 0 for group in groups[1:-1])
    assert list(regrouped([], 4)) == list(regrouped([clip[:, :0]], 4)) == []


def test_no_gradients_are_kept(tokenizer):
    """With gradients each chunk would keep the graph of all chunks before it."""
    tokenizer.requires_grad_(True)
    assert not any(output.requires_grad for output in reconstruct_stream(tokenizer, clip_of(9).split(3, dim=1)))


@pytest.mark.parametrize(
    ("chunks", "message"),
    [
        ([clip_of(5, 9, 12)], r"shorter side has 8 pixels or less, got 9 x 12; resize them to 8 x 11"),
        ([clip_of(2), clip_of(2, 8, 9)], r"frames of \(8, 8\) pixels, then of \(8, 9\)"),
        ([clip_of(5) * 200], r"expected pixels in \[-1, 1\]"),
        ([clip_of(5)[None]], r"expected frames \(3, n, H, W\), found \(1, 3, 5, 8, 8\)"),
    ],
)
def test_wrong_chunks_are_refused(tokenizer, chunks, message):
    with pytest.raises(ValueError, match=message):
        list(reconstruct_stream(tokenizer, chunks))


@pytest.mark.parametrize(
    ("own", "scaled", "coded"),
    [
        ((1080, 1920), (128, 228), (128, 240)),
        ((1920, 1080), (228, 128), (240, 128)),
        ((128, 128), (128, 128), (128, 128)),
        ((50, 70), (128, 179), (128, 192)),
        ((101, 1000), (128, 1267), (128, 1280)),
        ((1, 3), (128, 384), (128, 384)),
    ],
    ids=str,
)
def test_sizes(own, scaled, coded):
    config = TokenizerConfig(scales=(1, 2, 8), patch=4, widths=(8, 8, 8))
    assert (config.compression, config.shorter_side) == (16, 128)
    assert scaled_size(*own, 128) == scaled
    assert coded_size(config, *scaled) == coded
    Tokenizer(config).schedule(1, *coded)
