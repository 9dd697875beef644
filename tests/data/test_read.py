"""Reading clips from a file: which frames are taken, at once or in chunks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from kit.data import read
from kit.data.read import open_clip_file, read_clip_file
from kit.media import write_video


@pytest.fixture
def video(tmp_path):
    """A video of 20 frames of 36 x 50 at 10 fps, each brighter than the one before."""
    return write_video(torch.linspace(-1, 1, 20)[None, :, None, None].expand(3, -1, 36, 50), tmp_path / "a.mp4", 10)


def test_chunks_are_the_clip(video, monkeypatch):
    monkeypatch.setattr(read, "CHUNK", 8)
    clip = open_clip_file(video, None, 0)
    assert len(clip) == 20 and clip.fps == 10 and clip.size == (36, 50)
    chunks = list(clip.chunks(16, 22))
    assert [chunk.shape for chunk in chunks] == [(3, 8, 16, 22), (3, 8, 16, 22), (3, 4, 16, 22)]
    assert torch.equal(torch.cat(chunks, dim=1), clip.read(16, 22))


def test_chunks_are_read_when_they_are_asked_for(video, monkeypatch):
    clip, walked = open_clip_file(video, None, 0), []

    def walk(numbers):
        for number in numbers:
            walked.append(number)
            yield np.zeros((36, 50, 3), np.uint8)

    monkeypatch.setattr(clip.video, "walk", walk)
    next(clip.chunks(16, 22))
    assert walked == list(range(read.CHUNK))


@pytest.mark.parametrize(
    ("fps", "numbers"),
    [
        (0, range(20)),
        (10, range(20)),
        (5, range(0, 20, 2)),
        (4, [0, 3, 5, 8, 10, 13, 15, 18]),
        (2.7, [0, 4, 7, 11, 15, 19]),
        (20, [*range(20), *range(1, 20)]),
    ],
)
def test_the_whole_file_at_another_rate(video, fps, numbers):
    clip = open_clip_file(video, None, fps)
    assert clip.numbers.tolist() == sorted(numbers) and clip.fps == (fps or 10)
    as_many = open_clip_file(video, len(clip), fps)
    assert as_many.numbers.tolist() == clip.numbers.tolist()
    with pytest.raises(ValueError, match=f"too short for {len(clip) + 1} frames at {fps or 10}"):
        open_clip_file(video, len(clip) + 1, fps)


def test_a_picture_is_one_frame_at_any_rate(tmp_path):
    Image.new("RGB", (50, 36), "red").save(tmp_path / "a.png")
    for frames in (None, 1):
        clip = open_clip_file(tmp_path / "a.png", frames, 12)
        assert (len(clip), clip.fps, clip.size) == (1, 1.0, (36, 50))
    assert read_clip_file(tmp_path / "a.png", 1, 8, 8, 12).shape == (3, 1, 8, 8)
    with pytest.raises(ValueError, match="is a picture; 5 frames were asked for: give a video, or ask for 1"):
        open_clip_file(tmp_path / "a.png", 5, 12)


def test_no_frames_and_no_file(video):
    with pytest.raises(ValueError, match="0 frames of .* were asked for; ask for 1 or more"):
        open_clip_file(video, 0, 0)
    with pytest.raises(FileNotFoundError, match="no such file: nowhere.mp4"):
        open_clip_file("nowhere.mp4", None, 0)
    with pytest.raises(FileNotFoundError, match=f"a folder, not a file: {video.parent}"):
        open_clip_file(video.parent, None, 0)


def test_the_end_of_a_file(video):
    assert open_clip_file(video, 5, 0, at_end=True).numbers.tolist() == [15, 16, 17, 18, 19]
