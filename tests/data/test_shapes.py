"""The embedded data set: pure, captioned, balanced, held out, fast."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
import torch

from kit.data.paraphrase import OTHER_WORDS
from kit.data.shapes import (
    BACKGROUNDS,
    COLOURS,
    HELD_OUT,
    MOTIONS,
    SHAPES,
    TRAIN,
    Attributes,
    Shapes,
    parse_caption,
    trajectory,
)  # fmt: skip


def test_vocabulary_is_large_enough():
    assert len(COLOURS) >= 8 and len(SHAPES) >= 5 and len(MOTIONS) >= 9 and len(BACKGROUNDS) >= 4


def test_a_clip_is_a_function_of_seed_and_index():
    a, b = Shapes(seed=3)[7], Shapes(seed=3)[7]
    assert torch.equal(a["video"], b["video"]) and a["caption"] == b["caption"]
    assert not torch.equal(a["video"], Shapes(seed=4)[7]["video"])
    assert not torch.equal(a["video"], Shapes(seed=3)[8]["video"])


@pytest.mark.parametrize("frames, height, width, fps", [(17, 64, 64, 8), (1, 48, 80, 8), (33, 32, 32, 16), (5, 96, 64, 4)])
def test_any_size_length_and_rate(frames, height, width, fps):
    item = Shapes(frames=frames, height=height, width=width, fps=fps)[0]
    video = item["video"]
    assert video.shape == (3, frames, height, width) and video.dtype == torch.float32
    assert -1 <= video.min() < video.max() <= 1
    has_motion = any(motion in item["caption"] for motion in MOTIONS)
    assert has_motion == (frames > 1)


def test_a_clip_at_half_the_rate_shows_every_second_frame():
    slow, fast = Shapes(frames=9, fps=4)[5]["video"], Shapes(frames=17, fps=8)[5]["video"]
    torch.testing.assert_close(slow, fast[:, ::2], atol=1e-4, rtol=0)


def test_late_clips_are_what_long_ones_come_to_show():
    few, many = Shapes(frames=5, fps=8), Shapes(frames=70, fps=8)
    late = Shapes(frames=5, fps=8, late=0.5)
    starts = [late.start(n) for n in range(400)]
    chosen = [n for n, start in enumerate(starts) if start is not None]
    assert 160 < len(chosen) < 240 and 0 <= min(starts[n] for n in chosen) < 0.5 and 7.5 < max(starts[n] for n in chosen) <= 8
    for n in range(12):
        item = late[n]
        assert item["given"] == (n in chosen) and item["caption"] == few[n]["caption"]
        if n not in chosen:
            assert torch.equal(item["video"], few[n]["video"])
    for n in [n for n in chosen if "moving" in late.attributes(n).motion and starts[n] < 6][:4]:
        shown, whole = late[n]["video"], many[n]["video"]
        nearest = min(range(66), key=lambda f: (whole[:, f : f + 5] - shown).abs().mean())
        assert abs(nearest / 8 - starts[n]) <= 1 / 16


def test_neither_what_is_held_out_nor_pictures_are_late():
    assert all(Shapes("val", late=1.0).start(n) is None for n in range(20))
    assert all(Shapes(frames=1, late=1.0).start(n) is None for n in range(20))
    with pytest.raises(ValueError, match="late=30; expected a number from 0 to 1"):
        Shapes(late=30)


@pytest.mark.parametrize("seed", [-1, 1.5])
def test_a_seed_is_a_whole_number(seed):
    with pytest.raises(ValueError, match=f"seed={seed}; expected a whole number of 0 or more"):
        Shapes(seed=seed)


@pytest.mark.parametrize("fps", [0, float("nan"), float("inf")])
def test_rates_are_finite_numbers_above_0(fps):
    with pytest.raises(ValueError, match=f"fps={fps}; shapes are drawn"):
        Shapes(fps=fps)


def test_held_out_combinations_are_a_tenth_and_never_trained_on():
    everything = set(itertools.product(COLOURS, SHAPES, MOTIONS))
    assert len(HELD_OUT) == len(everything) // 10 and set(TRAIN) | HELD_OUT == everything
    for values in zip(*TRAIN):
        assert set(values) in (set(COLOURS), set(SHAPES), set(MOTIONS))
    train, val = (Shapes(split) for split in ("train", "val"))
    assert not any(train.attributes(n).held_out for n in range(500))
    assert any(train.attributes(n).background != val.attributes(n).background for n in range(50)), "drawn apart"
    assert all(val.attributes(n).held_out for n in range(100))
    with pytest.raises(ValueError, match="'train' and 'val'"):
        Shapes("test")[0]


def test_captions_and_attributes_are_inverse():
    for colour, shape, motion, background in itertools.product(COLOURS, SHAPES, MOTIONS, BACKGROUNDS):
        attributes = Attributes(colour, shape, motion, background)
        assert parse_caption(attributes.caption()) == attributes
    assert parse_caption("A  blue star growing on a dark background").motion == "growing"
    assert Attributes("orange", "ball", "growing", "in a blue sky").caption() == "an orange ball growing in a blue sky"


def test_no_other_word_is_ambiguous():
    """Each phrase has paraphrases; none contains another, or a word of the captions other than left and right."""
    phrases = [*COLOURS, *SHAPES, *MOTIONS, *BACKGROUNDS]
    others = [other for words in OTHER_WORDS.values() for other in words]
    assert sorted(OTHER_WORDS) == sorted(phrases) and len(set(others)) == len(others)
    words = {word for phrase in phrases for word in phrase.split()} - {"a", "on", "in", "left", "right"}
    assert not words & {word for other in others for word in other.split()}
    assert all(a == b or f" {a} " not in f" {b} " for a, b in itertools.product(others, others))


@pytest.mark.parametrize("frames", [17, 1])
def test_paraphrases_say_the_same_in_other_words(frames):
    plain, other = (Shapes("val", frames=frames, height=16, width=16, paraphrased=p) for p in (False, True))
    said = set()
    for n in range(300):
        attributes, caption = plain.attributes(n), other.caption(n)
        found = parse_caption(caption)
        assert found == attributes if frames > 1 else found.caption(still=True) == attributes.caption(still=True)
        assert not set(caption.replace(",", "").split()) & {*COLOURS, *SHAPES, "moving", "growing", "sky", "field", "beach"}
        assert len(caption.split()) <= 16  # words that the default condition reads
        said.add(caption)
    assert len(said) > 250
    item = other[3]
    assert item["caption"] == other.caption(3) == other[3]["caption"]
    assert torch.equal(item["video"], plain[3]["video"])


@pytest.mark.parametrize("caption", ["a red dog running", "a red blue ball growing on a dark background", ""])
def test_foreign_captions_are_refused(caption):
    with pytest.raises(ValueError, match="expected one of"):
        parse_caption(caption)


def path_of(motion):
    seconds = np.arange(17) / 8
    return trajectory(motion, seconds, 0.2, 1.0, 1.0, np.random.default_rng(1))


def test_motions_are_what_they_are_called():
    for motion, axis, sign in [("left", 0, -1), ("right", 0, 1), ("up", 1, -1), ("down", 1, 1)]:
        path = path_of(f"moving {motion}")
        assert (np.sign(np.diff(path[axis])) == sign).all() and np.ptp(path[1 - axis]) == 0
    assert (np.diff(path_of("growing")[2]) > 0).all() and (np.diff(path_of("shrinking")[2]) < 0).all()
    x, y, radius = path_of("standing still")
    assert np.ptp(x) == np.ptp(y) == np.ptp(radius) == 0
    x, y, _ = path_of("circling")
    assert np.ptp(np.hypot(x - (x.max() + x.min()) / 2, y - (y.max() + y.min()) / 2)) < 0.03
    x, y, _ = path_of("bouncing")
    assert np.ptp(x) == 0 and (np.diff(np.sign(np.diff(y))) != 0).sum() >= 2


def test_fast_enough_to_train_on():
    data = Shapes()
    data[0]
    begin = time.process_time()
    for n in range(50):
        data[n]
    assert 50 / (time.process_time() - begin) > 100, "clips/s of 17 x 64 x 64 on one core"
