"""The scale schedule: number, order and offsets of blocks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kit.scales import Block, ScaleSchedule, latent_frames, pixel_frames

UCF = ScaleSchedule.from_sides(5, (1, 2, 3, 4, 6, 8))
TALL = ScaleSchedule(2, ((1, 1), (2, 1), (3, 2)))


@pytest.mark.parametrize("frames, latents", [(1, 1), (5, 2), (17, 5), (33, 9), (65, 17)])
def test_the_first_pixel_frame_is_alone_and_then_four_make_a_latent_frame(frames, latents):
    assert latent_frames(frames) == latents
    assert pixel_frames(latents) == frames


@pytest.mark.parametrize("frames, hint", [(0, "1 or 5"), (-3, "1 or 5"), (4, "1 or 5"), (16, "13 or 17")])
def test_other_lengths_are_refused_with_the_nearest_good_ones(frames, hint):
    with pytest.raises(ValueError, match=hint):
        latent_frames(frames)


def test_ucf_example_of_the_paper():
    """5 frames x scales 1 2 3 4 6 8 give 30 steps and 5 * (1 + 4 + 9 + 16 + 36 + 64) tokens."""
    assert UCF.scales == 6
    assert len(UCF.blocks) == 30
    assert UCF.tokens_per_frame == 130
    assert UCF.length == 650
    assert UCF.grid == (8, 8)
    assert str(UCF) == "5 latent frames x scales 1 2 3 4 6 8 = 650 tokens in 30 steps"


def test_text_to_video_grid_is_not_square():
    """384 x 672 pixels give a grid of 24 x 42; every scale keeps the aspect ratio as well as whole cells allow."""
    schedule = ScaleSchedule.from_sides(9, (1, 2, 4, 8, 12, 24), grid=(24, 42))
    assert schedule.grids == ((1, 2), (2, 4), (4, 7), (8, 14), (12, 21), (24, 42))
    assert len(schedule.blocks) == 9 * 6
    assert schedule.length == 9 * (2 + 8 + 28 + 112 + 252 + 1008)
    assert "24x42" in str(schedule)
    tall = ScaleSchedule.from_sides(9, (1, 2, 4, 8, 12, 24), grid=(42, 24))
    assert tall.grids == tuple((w, h) for h, w in schedule.grids)


@pytest.mark.parametrize("schedule", [UCF, TALL, ScaleSchedule(3, ((2, 2),))], ids=str)
def test_blocks_fill_the_sequence_frame_by_frame_and_from_coarse_to_fine(schedule):
    start = 0
    for i, b in enumerate(schedule.blocks):
        assert (b.f, b.k) == divmod(i, schedule.scales)
        assert (b.h, b.w) == schedule.grids[b.k]
        assert (b.start, b.stop) == (start, start + b.h * b.w)
        assert b.slice == slice(b.start, b.stop)
        assert schedule.block(b.f, b.k) == b
        start = b.stop
    assert start == schedule.length == schedule.coordinates.shape[0]


def test_a_frame_slice_holds_its_blocks():
    for f in range(UCF.latent_frames):
        assert UCF.frame(f) == slice(UCF.block(f, 0).start, UCF.block(f, 5).stop)


@pytest.mark.parametrize("f, k", [(-1, 0), (5, 0), (0, -1), (0, 6)])
def test_there_is_no_block_outside(f, k):
    with pytest.raises(IndexError, match=rf"no block \({f}, {k}\) among 5 frames of 6 scales"):
        UCF.block(f, k)


def test_coordinates_written_out():
    """Each token has (f, k, y, x); rows come first."""
    frame = [[0, 0, 0], [1, 0, 0], [1, 1, 0], [2, 0, 0], [2, 0, 1], [2, 1, 0], [2, 1, 1], [2, 2, 0], [2, 2, 1]]
    assert TALL.coordinates.tolist() == [[f, *token] for f in range(2) for token in frame]
    assert TALL.coordinates.dtype == torch.int64


def test_coordinates_agree_with_blocks():
    for b in UCF.blocks:
        f, k, y, x = UCF.coordinates[b.slice].unbind(1)
        assert f.unique().tolist() == [b.f] and k.unique().tolist() == [b.k]
        assert (y * b.w + x).tolist() == list(range(b.h * b.w))


def test_with_frames_keeps_the_scales():
    longer = UCF.with_latent_frames(9)
    assert longer.grids == UCF.grids and longer.latent_frames == 9 and longer.length == 9 * 130
    assert longer.blocks[:30] == UCF.blocks


def test_history_repeats_the_finest_grid_after_each_frame():
    longer = TALL.with_history()
    assert longer.grids == (*TALL.grids, TALL.grid) and longer.latent_frames == TALL.latent_frames
    assert longer.length == TALL.length + TALL.latent_frames * 6
    assert TALL.layout("full") == longer and TALL.layout("scales") is TALL
    assert longer.sequence_length == longer.length - 6, "no frame reads the last one"
    assert TALL.sequence_length == TALL.length
    assert longer.history_k == TALL.scales and TALL.history_k is None
    assert ScaleSchedule(2, TALL.grids, (1, 2, 4)).with_history() == longer, "bits of scales are none of its blocks'"


def test_schedules_are_values():
    """Schedules of equal content are equal and hashable, whatever sequence type the grids have."""
    same = ScaleSchedule(2, [[1, 1], [2, 1], [3, 2]])
    assert same == TALL and hash(same) == hash(TALL)
    assert same.block(0, 1) == Block(0, 1, 2, 1, 1, 3)


def test_a_number_of_frames_is_whole_whatever_its_type():
    """Caches take 2.0 and numpy's 2 for 2, which then stands for all three."""
    assert type(ScaleSchedule(np.int64(2), TALL.grids).latent_frames) is int
    with pytest.raises(TypeError):
        ScaleSchedule(2.0, TALL.grids)


@pytest.mark.parametrize(
    "frames, grids, message",
    [
        (0, ((1, 1),), "at least one frame"),
        (1, (), "at least one frame"),
        (1, ((2, 2), (1, 2)), "must grow"),
        (1, ((2, 2), (2, 1)), "must grow"),
    ],
)
def test_impossible_schedules_are_refused(frames, grids, message):
    with pytest.raises(ValueError, match=message):
        ScaleSchedule(frames, grids)


def test_last_side_must_be_the_shorter_side_of_the_grid():
    with pytest.raises(ValueError, match="shorter side"):
        ScaleSchedule.from_sides(1, (1, 2, 4), grid=(6, 8))
