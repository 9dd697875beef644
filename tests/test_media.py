"""Videos and pictures as files."""

from __future__ import annotations

import av
import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image

from kit.data.decode import DecordDecoder, PyAVDecoder
from kit.data.shapes import Shapes
from kit.media import contact_sheet, moving_sheet, video_writer, write_video
from tests.fixtures import decoded, moving


def test_pixels_survive_the_video_file(tmp_path):
    clip = Shapes("val")[0]["video"]
    with av.open(str(write_video(clip, tmp_path / "x.mp4", 8))) as container:
        stream = container.streams.video[0]
        assert float(stream.average_rate) == 8
        read = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)])
    written = ((clip + 1) * 127.5).permute(1, 2, 3, 0).numpy()
    assert read.shape == (17, 64, 64, 3)
    assert np.abs(read - written).mean() < 3


def test_players_are_told_how_colours_are_coded(tmp_path):
    """Else they guess by the size, and show those of large videos otherwise."""
    path = write_video(moving(5, 32, 32), tmp_path / "a.mp4", 8)
    with av.open(str(path)) as container:
        frame = next(container.decode(video=0))
    assert (frame.colorspace, frame.color_range) == (5, 1), "ITU-R BT.601, from 16 to 235"
    ours, theirs = (np.stack(list(decoder(path).walk(range(5)))) for decoder in (PyAVDecoder, DecordDecoder))
    written = ((moving(5, 32, 32) + 1) * 127.5).permute(1, 2, 3, 0).numpy()
    assert (ours == theirs).all() and np.abs(ours - written).mean(axis=(0, 1, 2)).max() < 4


def test_frames_written_in_chunks_are_the_same_file(tmp_path):
    video = moving(9, 17, 31)
    with video_writer(tmp_path / "chunks.mp4", 8, 17, 31) as add:
        for chunk in video.split(4, dim=1):
            add(chunk)
    assert (tmp_path / "chunks.mp4").read_bytes() == write_video(video, tmp_path / "whole.mp4", 8).read_bytes()


@pytest.mark.parametrize("rate", [30000 / 1001, 12.5, 0.001])
def test_a_video_has_the_rate_it_is_given(tmp_path, rate):
    with av.open(str(write_video(moving(5, 16, 16), tmp_path / "a.mp4", rate))) as container:
        assert float(container.streams.video[0].average_rate) == pytest.approx(rate, rel=1e-6)


def test_odd_sizes_lose_nothing(tmp_path):
    """An mp4 has even sizes: it is that of a video whose last row and column are repeated."""
    video = moving(5, 17, 31)
    repeated = torch.cat([video, video[:, :, -1:]], dim=2)
    repeated = torch.cat([repeated, repeated[..., -1:]], dim=3)
    odd, even = (write_video(x, tmp_path / f"{x.shape[2]}.mp4", 8) for x in (video, repeated))
    assert decoded(odd).shape == (5, 18, 32, 3) and odd.read_bytes() == even.read_bytes()


def test_a_folder_may_have_a_colon(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert len(decoded(write_video(moving(1, 16, 16), "12:30/a.mp4", 8).absolute())) == 1


def test_sides_that_no_mp4_has_are_told(tmp_path):
    for height, width in ((1, 32), (32, 16386)):
        with pytest.raises(ValueError, match=f"2 to 16384 pixels a side, not {width} x {height}"):
            write_video(torch.zeros(3, 1, height, width), tmp_path / "out.mp4", 8)
    assert not any(tmp_path.iterdir())
    write_video(torch.zeros(3, 1, 2, 16384), tmp_path / "out.mp4", 8)


def test_a_caption_of_several_lines_has_one_on_a_contact_sheet(tmp_path):
    """Else the frames would cover its other lines."""
    sheets = [
        contact_sheet([{"real": torch.zeros(3, 1, 64, 64)}], [title], tmp_path / f"{number}.png")
        for number, title in enumerate(("a red ball\n over a\tfield\n", "a red ball over a field"))
    ]
    assert sheets[0].read_bytes() == sheets[1].read_bytes()


def test_a_long_title_is_whole_on_a_contact_sheet(tmp_path):
    """However narrow the frames are: of captions that differ in their last word alone one sees which is which."""
    sheets = [
        contact_sheet([{"real": torch.zeros(3, 1, 64, 64)}], [f"{'a red ball ' * 20}(seed {seed})"], tmp_path / f"{seed}.png")
        for seed in (1, 2)
    ]
    assert sheets[0].read_bytes() != sheets[1].read_bytes()


def test_titles_in_any_script_can_be_told_apart(tmp_path, monkeypatch):
    """Pillow's own font draws a box for each letter that is not English."""
    monkeypatch.setattr("kit.media.FONTS", ("none.ttf", f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf"))
    groups = [{"real": torch.zeros(3, 1, 64, 64)}]
    sheets = [contact_sheet(groups, [title], tmp_path / f"{title}.png").read_bytes() for title in ("красный", "зелёный")]
    assert sheets[0] != sheets[1]
    monkeypatch.setattr("kit.media.FONTS", ("none.ttf",))
    contact_sheet(groups, ["красный"], tmp_path / "boxes.png")


def test_a_moving_sheet_plays_each_clip_in_its_place(tmp_path):
    """Frame t of each clip is where its column and its row meet, for as long as `fps` says."""
    levels = torch.linspace(-1, 1, 5)
    flat = levels[:, None, None].expand(3, 5, 32, 48)
    groups = [{"real": flat, "sample": -flat}, {"real": flat, "sample": flat}]
    with Image.open(moving_sheet(groups, ["a red ball " * 20, "short"], tmp_path / "sheet.webp", fps=10)) as sheet:
        assert (sheet.n_frames, sheet.info["loop"]) == (5, 0)
        for t, level in enumerate(levels.tolist()):
            sheet.seek(t)
            sheet.load()
            assert sheet.info["duration"] == 100
            pixels = torch.as_tensor(np.array(sheet.convert("L"))).float()[-2 * 98 :, 96:] / 127.5 - 1
            for (row, column), sign in {(0, 0): 1, (1, 0): -1, (0, 1): 1, (1, 1): 1}.items():
                place = pixels[row * 98 :, column * 146 :][4:92, 4:140]
                assert (place - sign * level).abs().max() < 0.05, (t, row, column)


@pytest.mark.parametrize(("clips", "side", "size"), [(200, 64, (125 * 130 + 96, 130)), (2, 1000, (2 * 194 + 96, 194))])
def test_a_moving_sheet_of_many_or_large_clips_fits_its_format(tmp_path, clips, side, size):
    groups = [{"real": torch.zeros(3, 1, side, side)}] * clips
    with Image.open(moving_sheet(groups, [""] * clips, tmp_path / "sheet.webp", fps=8)) as sheet:
        assert sheet.size == (size[0], size[1] + 6)


def test_a_title_on_a_moving_sheet_keeps_to_its_column(tmp_path):
    """Also over tall and narrow clips, where few letters have room: it would cover the title beside it."""
    groups = [{"real": torch.zeros(3, 1, 96, 32)}] * 2
    texts = {"": None, "PURPLE STARS CIRCLING": None}
    for title in texts:
        with Image.open(moving_sheet(groups, [title, "a red ball " * 20], tmp_path / "sheet.webp", fps=8)) as sheet:
            texts[title] = np.array(sheet.convert("L")).astype(int)[:60, sheet.width - (sheet.width - 96) // 2 :]
    plain, beside = texts.values()
    assert np.abs(plain - beside).max() < 40  # a WebP's small losses
