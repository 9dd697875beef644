"""From bits to pixels: streamed clips, given pictures and videos, and videos of any length."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kit.checkpoint import Loaded
from kit.generator.guidance import Guidance
from kit.generator.sampler import Sampling, sample_frames
from kit.sampling import sample_clips, sample_videos, seed_of, stream_clips, stream_samples, stream_video, windows
from kit.sampling_checks import tell_notes
from tests.fixtures import CLOSE, PROMPTS, RISING

pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.fixture
def tiny_pair(make_generator, make_tokenizer):
    """A generator, its tokenizer, and the schedule of 17 frames of 8 x 12 pixels."""
    tokenizer = make_tokenizer(scales=(1, 2))
    return make_generator(scales=2), tokenizer, tokenizer.schedule(17, 8, 12)


def sampled_bits(model, schedule, how: Sampling, history: torch.Tensor | None = None) -> torch.Tensor:
    """Samples bits (2, L, d) of whole clips for PROMPTS."""
    return torch.cat([frame.bits for frame in sample_frames(model, schedule, PROMPTS, [0, 1], how, history)], 1)


def test_streamed_pixels_are_those_of_the_whole_feature(tiny_pair):
    model, tokenizer, schedule = tiny_pair
    chunks = list(stream_clips(model, tokenizer, schedule, PROMPTS, [0, 1], Sampling(RISING)))
    assert [chunk.shape[2] for chunk in chunks] == [1, 4, 4, 4, 4]
    bits = sampled_bits(model, schedule, Sampling(RISING))
    video = torch.cat(chunks, 2)
    torch.testing.assert_close(video, tokenizer.decode_bits(bits, schedule), **CLOSE)
    assert video.shape == (2, 3, 17, 8, 12) and video.abs().max() <= 1
    assert torch.equal(sample_clips(model, tokenizer, schedule, PROMPTS, [0, 1], Sampling(RISING)), video)


@pytest.fixture
def loaded(tiny_pair):
    """The pair as of checkpoints."""
    model, tokenizer, _ = tiny_pair
    clip = {"frames": 17, "height": 8, "width": 12, "fps": 8.0}
    return [Loaded(part, clip, Path(), 0, "") for part in (model, tokenizer)]


HOW = {"size": (5, 8, 12), "sampling": Sampling(temperature=0.5), "precision": "float32"}


def test_seeds_may_be_numpys(loaded):
    expected = sample_videos(*loaded, PROMPTS, [0, 1], batch_size=1, **HOW)
    assert torch.equal(sample_videos(*loaded, PROMPTS, np.arange(2), batch_size=2, **HOW), expected)


@pytest.mark.parametrize(("prompts", "seeds"), [([], []), (PROMPTS, [0]), (PROMPTS, [0, 1, 2]), (PROMPTS, [0, -1])])
def test_prompts_and_seeds_that_do_not_fit_are_told_at_once(loaded, prompts, seeds):
    with pytest.raises(ValueError, match=f"{len(prompts)} prompts and {len(seeds)} seeds"):
        sample_videos(*loaded, prompts, seeds, batch_size=1, **HOW)


@pytest.mark.parametrize(
    ("history", "told"),
    [
        (torch.full((3, 1, 8, 12), 255.0), r"expected pixels in \[-1, 1\], found 255 to 255"),
        (torch.full((3, 1, 8, 12), float("nan")), r"expected pixels in \[-1, 1\]"),
        (torch.zeros(3, 8, 12), r"history=\(3, 8, 12\); expected a tensor \(3, T0, H, W\)"),
        (np.zeros((3, 1, 8, 12)), "history=ndarray; expected a tensor"),
    ],
)
def test_a_history_that_is_none_is_told(loaded, history, told):
    with pytest.raises(ValueError, match=told):
        sample_videos(*loaded, PROMPTS, [0, 1], batch_size=2, history=history, **HOW)


def test_numbers_of_numpy_are_refused_by_their_name():
    """They would end up in checkpoints, which hold plain values."""
    with pytest.raises(ValueError, match=r"temperature=0.5 \(float32 of numpy\); expected a number"):
        Sampling(temperature=np.float32(0.5))
    with pytest.raises(ValueError, match=r"overlap=5 \(int64 of numpy\); expected 1 \+ 4n frames"):
        Sampling(overlap=np.int64(5))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_a_history_may_have_other_floating_point_numbers(loaded, dtype):
    history = torch.tensor([-1.0, 0.5, 1.0]).repeat(3, 1, 8, 4)  # exact in all of them
    expected, found = (
        sample_videos(*loaded, PROMPTS, [0, 1], batch_size=2, history=given, **HOW) for given in (history, history.to(dtype))
    )
    assert torch.equal(found, expected)


@pytest.mark.parametrize("frames", [1, 9, 17])
def test_given_pixels_come_back_as_the_tokenizer_sees_them(tiny_pair, frames):
    """This holds for image-to-video (one frame) and continuation."""
    model, tokenizer, schedule = tiny_pair
    start = torch.rand(2, 3, frames, 8, 12, generator=torch.Generator().manual_seed(2)) * 2 - 1
    video = sample_clips(model, tokenizer, schedule, PROMPTS, [0, 1], Sampling(temperature=0.0), start)
    torch.testing.assert_close(video[:, :, :frames], tokenizer.reconstruct(start), **CLOSE)
    bits = sampled_bits(model, schedule, Sampling(temperature=0.0), tokenizer.bits(start))
    torch.testing.assert_close(video, tokenizer.decode_bits(bits, schedule), **CLOSE)


class Casts(TorchDispatchMode):
    """Counts how often each tensor of float32 is cast to bfloat16, by its address."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        if function is torch.ops.aten._to_copy.default and (args[0].dtype, made.dtype) == (torch.float32, torch.bfloat16):
            self.counts[args[0].data_ptr()] += 1
        return made


def test_bfloat16_casts_each_weight_once_a_frame(tiny_pair):
    """And samples what it samples when weights are cast at every use; afterwards the models are as frozen as before."""
    (model, tokenizer, schedule), clip = tiny_pair, {"frames": 17}
    generator, codec = (Loaded(m.requires_grad_(False), clip, Path(), 0, "") for m in (model, tokenizer))
    weights = {w.data_ptr() for m in (model, tokenizer) for w in m.parameters() if w.ndim > 1}  # not those of norms, small
    with Casts() as casts:
        pieces = list(stream_samples(generator, codec, PROMPTS, [0, 1], (17, 8, 12), Sampling(RISING), "bfloat16"))
    of_weights = {place: n for place, n in casts.counts.items() if place in weights}
    assert of_weights and max(of_weights.values()) <= len(pieces) == 5
    assert not any(w.requires_grad for m in (model, tokenizer) for w in m.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        expected = sample_clips(model, tokenizer, schedule, PROMPTS, [0, 1], Sampling(RISING))
    assert torch.equal(torch.cat(pieces, dim=2), expected)


# --- videos of any length --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "frames, longest, overlap, expected",
    [
        (17, 17, 9, [17]), (9, 17, 9, [9]), (25, 17, 9, [17, 17]), (33, 17, 1, [17, 17]), (37, 17, 13, [17] * 6),
        (29, 17, 9, [17, 17, 13]),
    ],
)  # fmt: skip
def test_windows_make_up_the_video(frames, longest, overlap, expected):
    assert windows(frames, longest, overlap) == expected
    assert sum(expected) - overlap * (len(expected) - 1) == frames


@pytest.mark.parametrize(
    "values, message",
    [
        ((18, 17, 9), "1 . 4n"),
        ((25, 17, 8), "1 . 4n"),
        ((25, 17, 17), "overlap=17 leaves nothing to add to clips of 17"),
        ((5, 1, 1), "extend=positions makes more than a picture"),
    ],
)
def test_impossible_windows_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        windows(*values)


@pytest.mark.parametrize("overlap", [1, 5, None])
def test_a_long_video_is_windows_that_go_on_from_each_other(tiny_pair, overlap):
    """The stream equals windows that are each made from the pixels before; frames come once, and any batch gives the same."""
    model, tokenizer, schedule = tiny_pair
    how = Sampling(RISING, overlap=overlap)
    pieces = list(stream_video(model, tokenizer, schedule, PROMPTS, [0, 1], 41, how))
    video, kept = torch.cat(pieces, 2), overlap or 9
    assert video.shape == (2, 3, 41, 8, 12) and max(piece.shape[2] for piece in pieces) == 4
    first = sample_clips(model, tokenizer, schedule, PROMPTS, [0, 1], how)
    assert torch.equal(video[:, :, :17], first)
    again = [seed_of(seed, 1) for seed in (0, 1)]
    second = sample_clips(model, tokenizer, schedule, PROMPTS, again, how, first[:, :, -kept:])
    torch.testing.assert_close(video[:, :, 17 : 34 - kept], second[:, :, kept:], **CLOSE)
    alone = torch.cat(list(stream_video(model, tokenizer, schedule, PROMPTS[1:], [1], 41, how)), 2)
    torch.testing.assert_close(alone, video[1:], **CLOSE)


def test_a_long_video_in_one_sequence(tiny_pair):
    model, tokenizer, schedule = tiny_pair
    how = Sampling(extend="positions")
    video = torch.cat(list(stream_video(model, tokenizer, schedule, PROMPTS, [0, 1], 33, how)), 2)
    assert torch.equal(video, sample_clips(model, tokenizer, schedule.with_latent_frames(9), PROMPTS, [0, 1], how))


@pytest.mark.parametrize("kind, idle", [("constant", ["last", "fine"]), ("falling", ["fine"]), ("rising", [])])
def test_guidance_that_its_kind_does_not_read_is_told(kind, idle, monkeypatch, capsys):
    typed = ["guidance.first", "guidance.last", "guidance.fine", "seed"]
    monkeypatch.setattr("kit.sampling_checks.typed_keys", lambda: typed)
    tell_notes([], Sampling(Guidance(kind, 2.0)), lambda text: [])
    told = [f"note: guidance.{name} has no effect: guidance.kind={kind}" for name in idle]
    assert capsys.readouterr().out.splitlines() == told


def test_of_many_notes_some_are_told_and_the_others_counted(capsys):
    tell_notes([f"prompt {n % 30}" for n in range(99)], Sampling(), lambda text: [f"{text} is odd"])
    lines = capsys.readouterr().out.splitlines()
    assert lines == [*(f"note: prompt {n} is odd" for n in range(8)), "note: and 22 more such notes"]


def test_each_window_costs_the_same(tiny_pair):
    """The number of blocks between frames does not depend on how many windows came before."""
    model, tokenizer, schedule = tiny_pair
    blocks, counts = [0], []
    stream = stream_video(model, tokenizer, schedule, PROMPTS, [0, 1], 81, on_block=lambda: blocks.append(0))
    for _ in stream:
        counts.append(len(blocks))
        blocks.clear()
    assert counts == [3, 2, 2, 2, 2] + [8, 2] * 8
