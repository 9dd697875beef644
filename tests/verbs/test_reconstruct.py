"""`reconstruct video=FILE`: any length and size, in chunks, with the scores of the whole clip."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kit.checkpoint import Loaded, load_tokenizer
from kit.cli import main
from kit.data import read
from kit.data.decode import PyAVDecoder, UnreadableVideo
from kit.data.read import ClipFile, open_clip_file
from kit.measures import per_scale
from kit.media import write_video
from kit.tokenizer import Tokenizer, TokenizerConfig
from kit.verbs.reconstruct import Scores, fitting_note, reconstruct_file
from tests.fixtures import decoded, moving
from tests.plugin import randomise


@pytest.fixture
def tokenizer(tmp_path) -> Loaded:
    """A tokenizer of random weights with a shorter side of 16 pixels; frames are taken at the file's own rate."""
    model = Tokenizer(TokenizerConfig(bits=4, scales=(1, 2, 4), patch=2, widths=(8, 16), blocks=1))
    return Loaded(randomise(model), {"frames": 5, "height": 16, "width": 16, "fps": 0}, tmp_path / "x.ckpt", 0, "")


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


@pytest.mark.parametrize(
    ("frames", "size", "coded"), [(1, (16, 16), (16, 16)), (3, (20, 34), (16, 27)), (22, (40, 24), (27, 16))], ids=str
)
def test_each_frame_of_a_file_comes_back(tokenizer, tmp_path, frames, size, coded):
    path = write_video(moving(frames, *size), tmp_path / "a.mp4", 8)
    by_scale = reconstruct_file(tokenizer, path, None, tmp_path / "out")
    assert [row["scales"] for row in by_scale] == [1, 2, 3]
    written = decoded(tmp_path / "out" / "reconstruction_0.mp4")
    assert written.shape == (frames, coded[0] + coded[0] % 2, 2 * coded[1], 3)
    real = ((open_clip_file(path, None, 0).read(*coded) + 1) * 127.5).permute(1, 2, 3, 0).numpy()
    assert np.abs(written[:, : coded[0], : coded[1]] - real).mean() < 6  # through yuv420p


def test_scores_are_those_of_the_whole_clip(tokenizer, tmp_path, monkeypatch):
    """Scores of a clip that needs no padding, in chunks that do not divide it, equal those of `per_scale`."""
    monkeypatch.setattr(read, "CHUNK", 3)
    monkeypatch.setattr("kit.verbs.reconstruct.inference_precision", lambda: "float32")  # bfloat16 rounds them apart
    path = write_video(moving(13, 16, 24), tmp_path / "a.mp4", 8)
    for frames in (None, 5):
        streamed = reconstruct_file(tokenizer, path, frames, tmp_path / "out")
        clip = open_clip_file(path, frames, 0).read(16, 24)
        _, whole, _ = per_scale(tokenizer, clip[None], 1)
        for a, b in zip(streamed, whole, strict=True):
            assert a == pytest.approx(b, rel=1e-4)


def test_the_video_shows_the_reconstruction_from_all_scales(tokenizer, tmp_path, monkeypatch):
    """Those from one, two and three scales are black, grey and white."""

    def scales(_, chunks, __):
        for real in chunks:
            yield real, torch.stack([torch.full_like(real, shade) for shade in (-1.0, 0.0, 1.0)])

    monkeypatch.setattr("kit.verbs.reconstruct.stream_scales", scales)
    reconstruct_file(tokenizer, write_video(moving(5, 16, 24), tmp_path / "a.mp4", 8), None, tmp_path)
    shown = decoded(tmp_path / "reconstruction_0.mp4")
    assert shown[:, :, 26:].min() > 240 > shown[:, :, :22].mean()


def test_scores_of_several_clips_are_their_means(tokenizer):
    clips = torch.stack([moving(5, 16, 16), torch.zeros(3, 5, 16, 16)])
    each = [per_scale(tokenizer, clip[None], 1)[1] for clip in clips]
    for row, one, other in zip(per_scale(tokenizer, clips, 2)[1], *each, strict=True):
        for name in ("psnr_db", "ssim"):
            assert row[name] == pytest.approx((one[name] + other[name]) / 2, rel=0.02) and one[name] != other[name]


def test_scores_add_up():
    real, output = (torch.rand(3, 13, 16, 20, generator=torch.Generator().manual_seed(n)) * 2 - 1 for n in (0, 1))
    scores = Scores()
    for r, o in zip(real.split(4, dim=1), output.split(4, dim=1)):
        scores.add(o, r)
    assert scores.values() == pytest.approx(Scores().add(output, real).values(), rel=1e-5)
    assert scores.values()["psnr_db"] == pytest.approx(10 * np.log10(4 / (output - real).square().mean().item()), rel=1e-5)
    assert Scores().add(real, real).values()["ssim"] == pytest.approx(1)


def test_the_contact_sheet_shows_the_first_and_the_last_frame(tokenizer, tmp_path):
    """The clip has 40 frames, each brighter than the one before; the sheet has 8 columns and 4 rows."""
    video = torch.linspace(-1, 1, 40)[None, :, None, None].expand(3, -1, 16, 16)
    reconstruct_file(tokenizer, write_video(video, tmp_path / "a.mp4", 8), None, tmp_path / "out")
    sheet = np.asarray(Image.open(tmp_path / "out" / "reconstruction.png").convert("L")).astype(int)
    assert sheet.shape[1] == 108 + 8 * 66 and sheet.shape[0] > 4 * 66
    columns = [sheet[60, 108 + 66 * n + 32] for n in range(8)]
    assert columns == sorted(columns) and columns[0] < 8 and columns[-1] > 247


@pytest.mark.parametrize(
    ("own", "frames", "temporal", "note"),
    [
        ((1080, 1920), 50, True, "1920 x 1080 -> 228 x 128 (resized), padded to 232 x 128; 50 frames padded to 53"),
        ((1080, 1920), 50, False, "1920 x 1080 -> 228 x 128 (resized), padded to 232 x 128; 50 frames"),
        ((128, 128), 17, True, "128 x 128; 17 frames"),
        ((130, 128), 1, True, "128 x 130, padded to 128 x 136; 1 frame"),
        ((175, 128), 1, True, "128 x 175, padded to 128 x 176, its last row twice in the mp4; 1 frame"),
        ((320, 256), 2, True, "256 x 320 -> 128 x 160 (resized); 2 frames padded to 5"),
    ],
)
def test_the_note_says_what_is_done(own, frames, temporal, note):
    config = TokenizerConfig(scales=(1, 16), patch=8, widths=(8,), blocks=0, bits=4, temporal=temporal)
    assert fitting_note(Tokenizer(config), own, clip_of(frames, 25.0, frames, 25.0)) == note


def clip_of(count: int, rate: float, frames: int, fps: float) -> ClipFile:
    """A clip of `frames` frames at `fps` of a file of `count` at `rate`."""

    class File(list):
        pass

    video = File(range(count))
    video.fps = rate
    return ClipFile(video, np.arange(frames), fps)


def test_the_note_says_that_the_rate_changes():
    model = Tokenizer(TokenizerConfig(scales=(1, 16), patch=8, widths=(8,), blocks=0, bits=4))
    assert (
        fitting_note(model, (128, 128), clip_of(40, 25.0, 16, 10.0))
        == "128 x 128; 40 frames at 25 fps -> 16 at 10 padded to 17"
    )
    assert fitting_note(model, (128, 128), clip_of(300, 30000 / 1001, 17, 29.97)) == "128 x 128; 17 frames"


def test_a_damaged_frame_in_the_middle_leaves_no_video(tokenizer, tmp_path, monkeypatch):
    path, walk = write_video(moving(40, 16, 16), tmp_path / "a.mp4", 8), PyAVDecoder.walk

    def damaged(self, indices):
        for number, pixels in enumerate(walk(self, indices)):
            if number == 30:
                raise UnreadableVideo(path, "frame 30 is damaged")
            yield pixels

    monkeypatch.setattr(PyAVDecoder, "walk", damaged)
    with pytest.raises(UnreadableVideo, match="frame 30 is damaged"):
        reconstruct_file(tokenizer, path, None, tmp_path / "out")
    assert left_in(tmp_path / "out") == []


def test_an_interrupt_leaves_no_video_and_the_one_before(tokenizer, tmp_path, monkeypatch):
    path = write_video(moving(40, 16, 16), tmp_path / "a.mp4", 8)
    reconstruct_file(tokenizer, path, 5, tmp_path / "out")
    add = Scores.add

    def interrupted(self, output, real):
        if output.shape[1] < 16:  # the last chunk
            raise KeyboardInterrupt
        return add(self, output, real)

    monkeypatch.setattr(Scores, "add", interrupted)
    with pytest.raises(KeyboardInterrupt):
        reconstruct_file(tokenizer, path, None, tmp_path / "out")
    assert left_in(tmp_path / "out") == ["reconstruction.png", "reconstruction_0.mp4"]
    assert len(decoded(tmp_path / "out" / "reconstruction_0.mp4")) == 5


@pytest.mark.parametrize("name", ["moviepy_bbb_0_30.webm", "imageio_newtonscradle.gif", "mmaction2_test.avi", "lbbc2a.mpg"])
def test_clips_from_the_wild(tokenizer, tmp_path, shared, name):
    path = shared / "data" / "clips" / name
    reconstruct_file(tokenizer, path, 24, tmp_path / "out")
    assert len(decoded(tmp_path / "out" / "reconstruction_0.mp4")) == 24


def run(pair, tmp_path, *words) -> int:
    return main(["reconstruct", f"ckpt={pair.tokenizer}", f"root={tmp_path}", "name=out", *words])


def test_command_on_a_file(pair, tmp_path, capsys):
    fps = load_tokenizer(pair.tokenizer).clip["fps"]
    path = write_video(moving(9, 40, 60), tmp_path / "a.mp4", fps)
    assert run(pair, tmp_path, f"video={path}") == 0
    said = capsys.readouterr().out
    assert f"{path}: 60 x 40 -> 48 x 32 (resized); 9 frames\n" in said
    assert [row["scales"] for row in json.loads(said[said.index("[") : said.rindex("]") + 1])] == [1, 2, 3]
    assert decoded(tmp_path / "out" / "reconstruction_0.mp4").shape == (9, 32, 96, 3)
    assert run(pair, tmp_path, f"video={path}", "frames=3") == 0
    assert "3 frames padded to 5" in capsys.readouterr().out
    assert len(decoded(tmp_path / "out" / "reconstruction_0.mp4")) == 3
    assert run(pair, tmp_path, f"video={write_video(moving(9, 32, 32), tmp_path / 'fast.mp4', 2 * fps)}") == 0
    assert f"32 x 32; 9 frames at {2 * fps:g} fps -> 5 at {fps:g}\n" in capsys.readouterr().out


def test_its_own_input_and_what_an_error_meets_stay(pair, tmp_path, capsys):
    path = write_video(moving(9, 32, 32), tmp_path / "a.mp4", 8)
    assert run(pair, tmp_path, f"video={path}") == 0
    made = tmp_path / "out" / "reconstruction_0.mp4"
    before = made.read_bytes()
    assert run(pair, tmp_path, f"video={made}") == 1
    assert f"video={made} would be overwritten by its reconstruction; give another name=" in capsys.readouterr().err
    assert run(pair, tmp_path, f"video={tmp_path / 'nowhere.mp4'}") == 1
    assert made.read_bytes() == before


def test_command_on_a_picture(pair, tmp_path, capsys):
    """It is seen through in places, and moves."""
    pictures = [Image.new("RGBA", (50, 70), colour) for colour in ("#ff000080", "blue")]
    pictures[0].save(tmp_path / "a.png", save_all=True, append_images=pictures[1:])
    assert run(pair, tmp_path, f"video={tmp_path / 'a.png'}") == 0
    told = capsys.readouterr().out
    assert "a.png: 50 x 70 -> 32 x 45 (resized), padded to 32 x 48, its last row twice in the mp4; 1 frame\n" in told
    assert "a.png moves; its first frame is taken" in told and "transparent areas of" in told
    assert decoded(tmp_path / "out" / "reconstruction_0.mp4").shape == (1, 46, 64, 3)


@pytest.mark.parametrize(
    ("words", "expected"),
    [(["video=nowhere.mp4"], "no such file: nowhere.mp4"), (["video={}", "frames=99"], "too short for 99 frames"),
     (["video={}", "frames=0"], "frames=0; expected a whole number of 1 or more"),
     (["video={}", "frames=2.5"], "frames=2.5; expected a whole number"), (["video={}", "frames=x"], "frames=x; expected a")],
)  # fmt: skip
def test_command_explains_bad_input(pair, tmp_path, capsys, words, expected):
    path = write_video(moving(9, 16, 16), tmp_path / "a.mp4", 8)
    assert run(pair, tmp_path, *[word.format(path) for word in words]) == 1
    assert expected in capsys.readouterr().err
