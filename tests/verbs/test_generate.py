"""`generate`: videos, their settings files, pictures and videos to continue, and errors for bad input."""

from __future__ import annotations

import io
import json
import shutil
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from tqdm import tqdm

from kit.checkpoint import load_generator
from kit.cli import main
from kit.data.read import open_clip_file
from kit.data.shapes import Shapes
from kit.files import sole_user
from kit.generator.guidance import Guidance
from kit.generator.sampler import Sampling
from kit.media import write_video
from kit.sampling import sample_clips, sample_videos, stream_samples
from kit.sampling_checks import check_video_length
from kit.tokenizer import Tokenizer
from kit.verbs.generate import check_paths, make_videos, show, write_videos
from kit.verbs.request import check_numbers, check_texts, file_stem, history_of, prompts_of, usual_length
from kit.verbs.sidecar import SETTINGS, Job, merged, read_sidecar
from tests.fixtures import frames_of

PROMPT = "a red ball moving right over a green field"
GUIDED = Sampling(Guidance("constant", 2.0), temperature=1.0)


def run(pair, tmp_path, *words, name="out") -> int:
    return main(["generate", f"ckpt={pair.generator}", f"root={tmp_path}", f"name={name}", *words])


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.mp4")}


@pytest.fixture
def loaded(pair):
    return load_generator(pair.generator)


def test_writes_videos_and_a_contact_sheet(pair, tmp_path):
    assert run(pair, tmp_path, "prompt=it's a red, shiny [ball] = fun", "n=3", "seed=4") == 0
    videos = sorted((tmp_path / "out").glob("*.mp4"))
    assert [v.stem[-5:] for v in videos] == ["seed4", "seed5", "seed6"]
    assert all(frames_of(v) == 5 for v in videos)
    assert len(list((tmp_path / "out").glob("*.png"))) == 1


def test_that_a_contact_sheet_has_not_all_videos_is_told(pair, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("kit.verbs.generate.SHOWN", 2)
    for n, told in ((2, False), (3, True)):
        assert run(pair, tmp_path, f"prompt={PROMPT}", f"n={n}") == 0
        note = "the contact sheet shows the first 2 of 3 videos"
        assert (note in (said := capsys.readouterr().out)) == ("the contact sheet" in said) == told


def test_a_training_keeps_its_config(pair, tmp_path):
    """Videos may be made in the folder of the training itself."""
    before = tmp_path / "out" / "config" / "overrides.yaml"
    for folder in (before.parent, tmp_path / "out" / "checkpoints"):
        folder.mkdir(parents=True)
    before.write_text("- optimizer.lr=9")
    assert run(pair, tmp_path, f"prompt={PROMPT}") == 0
    assert before.read_text() == "- optimizer.lr=9" and not before.with_name("config.yaml").exists()
    assert f"prompt={PROMPT}" in (before.parent / "generate" / "overrides.yaml").read_text().replace("'", "")


def test_goes_on_from_an_image_and_from_a_video(pair, tmp_path):
    clip = Shapes("val", frames=9, height=32, width=32)[0]["video"]
    pixels = ((clip[:, 0].permute(1, 2, 0) + 1) * 127.5).round().to(torch.uint8).numpy()
    Image.fromarray(pixels).save(tmp_path / "first.png")
    write_video(clip, tmp_path / "before.mp4", 8)
    assert run(pair, tmp_path, f"image={tmp_path / 'first.png'}", "prompt=x") == 0
    more = ["history_frames=1", "frames=9", "overlap=1"]
    assert run(pair, tmp_path, f"video={tmp_path / 'before.mp4'}", "prompt=x", *more, name="more") == 0
    assert frames_of(next((tmp_path / "more").glob("*.mp4"))) == 9


def test_a_video_is_gone_on_with_from_its_end_at_the_generators_rate(tmp_path):
    levels = torch.linspace(-0.9, 0.9, 20)
    write_video(levels.view(1, 20, 1, 1).expand(3, 20, 32, 32), tmp_path / "ramp.mp4", 16)
    values = {"image": None, "video": str(tmp_path / "ramp.mp4"), "history_frames": 5}
    history, _ = history_of(values, {"frames": 9, "height": 32, "width": 32, "fps": 8.0})
    torch.testing.assert_close(history.mean((0, 2, 3)), levels[[11, 13, 15, 17, 19]], atol=0.02, rtol=0)


@pytest.mark.parametrize("rate, taken, told", [(4, 5, True), (7.95, 5, False), (12, 5, False), (4, 1, False)])
def test_a_video_slower_than_the_generators_clips_is_told(tmp_path, capsys, rate, taken, told):
    path = write_video(torch.zeros(3, 20, 32, 32), tmp_path / "slow.mp4", rate)
    values = {"image": None, "video": str(path), "history_frames": taken}
    history_of(values, {"frames": 9, "height": 32, "width": 32, "fps": 8.0})
    note = f"slow.mp4 has {rate} frames per second, the generator's clips 8: frames are taken twice"
    assert (note in (said := capsys.readouterr().out)) == ("taken twice" in said) == told


@pytest.mark.parametrize("size, told", [((16, 32), False), ((32, 16), True)])
def test_a_video_is_given_in_the_clips_size_and_it_is_told_if_it_is_cut(tmp_path, capsys, size, told):
    path = write_video(torch.zeros(3, 5, *size), tmp_path / "given.mp4", 8)
    values = {"image": None, "video": str(path), "history_frames": 1}
    history, _ = history_of(values, {"frames": 9, "height": 32, "width": 64, "fps": 8.0})
    assert history.shape == (3, 1, 32, 64)
    note = "given.mp4 is 16 x 32: scaled, and cut in the centre to 64 x 32"
    assert (note in (said := capsys.readouterr().out)) == ("cut" in said) == told


@pytest.mark.parametrize("trained, taken", [(1, 1), (5, 1), (9, 5), (33, 9)])
def test_how_many_frames_of_a_video_are_gone_on_with(trained, taken, tmp_path):
    write_video(torch.zeros(3, 9, 32, 32), tmp_path / "dark.mp4", 8)
    values = {"image": None, "video": str(tmp_path / "dark.mp4"), "history_frames": None}
    assert history_of(values, {"frames": trained, "height": 32, "width": 32, "fps": 8.0})[0].shape[1] == taken


def test_an_animated_image_gives_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (32, 32), (shade, shade, shade)) for shade in (20, 120, 220)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:], duration=100)
    values = {"image": str(tmp_path / "a.gif"), "video": None, "history_frames": None}
    history, _ = history_of(values, {"frames": 9, "height": 32, "width": 32, "fps": 8.0})
    assert history.shape[1] == 1 and history.mean().item() == pytest.approx(20 / 127.5 - 1, abs=0.05)
    with pytest.raises(ValueError, match="history_frames=5 are those of a video to continue"):
        history_of({"image": None, "video": None, "history_frames": 5}, {"frames": 9})


def test_clip_begins_with_the_given_image(loaded):
    image = Shapes("val", frames=1, height=32, width=32)[3]["video"]
    clip = sample_videos(*loaded, ["x"], [0], (5, 32, 32), GUIDED, "float32", 16, image)
    torch.testing.assert_close(clip[0, :, :1], loaded[1].model.reconstruct(image[None])[0].clamp(-1, 1), atol=1e-4, rtol=0)


@pytest.mark.parametrize("how", [GUIDED, Sampling(top_p=0.9), Sampling(GUIDED.guidance, overlap=1)], ids=str)
def test_a_clip_is_the_same_in_any_batch(loaded, how):
    """In float32 a clip is the same to the last bit alone, in a batch of two, and in one of five."""
    size = (5 if how.overlap is None else 13, 32, 32)
    prompts, seeds = [PROMPT, "a blue star", ""] * 2, [0, 1, 2, 3, 4, 0]
    together = sample_videos(*loaded, prompts, seeds, size, how, "float32", 6)
    for batch in (1, 2, 5):
        assert torch.equal(sample_videos(*loaded, prompts, seeds, size, how, "float32", batch), together), batch
    assert not torch.equal(together[0], together[3])  # another seed


@pytest.mark.parametrize("side, scales", [(32, 3), (16, 2)])
def test_progress_ends_at_its_total(loaded, monkeypatch, side, scales):
    bars = []

    def bar(**how) -> tqdm:
        bars.append(tqdm(**{**how, "disable": False, "file": io.StringIO()}))
        return bars[-1]

    monkeypatch.setattr("kit.sampling.tqdm", bar)
    sample_videos(*loaded, [PROMPT] * 3, [0, 1, 2], (13, side, side), Sampling(overlap=1), "float32", 2)
    assert bars[0].n == bars[0].total == 2 * 3 * 2 * scales  # batches, windows, latent frames, scales


def test_bfloat16_is_near(loaded):
    """Only most clips are near: a bit with a logit near 0 can flip, which changes everything after it."""
    prompts = [Shapes("train", frames=5, height=32, width=32, fps=8.0)[n]["caption"] for n in range(9)]
    words = (prompts, range(9), (5, 32, 32), Sampling(temperature=0.0))
    exact, rounded = (sample_videos(*loaded, *words, precision, 9) for precision in ("float32", "bfloat16"))
    apart = (exact - rounded).abs().mean((1, 2, 3, 4))
    assert apart.min() > 0 and apart.median() < 0.01


def test_mixed_precision_ends_with_each_piece(loaded):
    for _ in stream_samples(*loaded, [PROMPT], [0], (5, 32, 32), Sampling(), "bfloat16"):
        assert not torch.is_autocast_enabled("cpu")


def test_float32_is_exact_while_a_piece_is_made(loaded, monkeypatch):
    seen = []
    for model in (loaded[0].model, loaded[1].model.decoder):
        flag = lambda *_: seen.append((torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()))  # noqa: E731
        model.register_forward_pre_hook(flag)
    list(stream_samples(*loaded, [PROMPT], [0], (5, 32, 32), Sampling(), "float32"))
    assert set(seen) == {(False, "highest")}


def test_samples_are_those_of_the_models(loaded):
    generator, tokenizer = loaded
    prompts = [PROMPT, "a blue star"]
    clips = sample_videos(*loaded, prompts, [0, 1], (5, 32, 32), GUIDED, "float32", 2)
    expected = sample_clips(generator.model, tokenizer.model, tokenizer.model.schedule(5, 32, 32), prompts, [0, 1], GUIDED)
    assert torch.equal(clips, expected)


# --- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_video_is_made_again_from_its_settings(pair, tmp_path, precision):
    """Videos of a batch, with an image and settings other than the defaults, are the same byte for byte."""
    Image.new("RGB", (32, 32), "orange").save(tmp_path / "first.png")
    words = [f"prompt={PROMPT}", "n=3", "seed=5", "top_p=0.9", "negative=a blue star", "guidance.kind=rising", "fps=10"]
    words.append(f"precision={precision}")
    assert run(pair, tmp_path, *words, f"image={tmp_path / 'first.png'}", "frames=9", "overlap=1") == 0
    made = contents(tmp_path / "out")
    sidecar = json.loads((tmp_path / "out" / "a_red_ball_moving_right_over_a_green_field_seed6.json").read_text())
    assert sidecar["settings"]["seed"] == 6 and len(sidecar["given_sha256"]) == 64
    assert sidecar["settings"]["fps"] == 10 == open_clip_file(next((tmp_path / "out").glob("*.mp4")), None, 0).video.fps
    for name in made:
        again = [f"settings={tmp_path / 'out' / name.replace('mp4', 'json')}", f"root={tmp_path}", f"name=again_{name[-5]}"]
        assert main(["generate", *again]) == 0
    assert {k: v for folder in tmp_path.glob("again_*") for k, v in contents(folder).items()} == made and len(made) == 3


def test_the_command_line_goes_before_the_settings(pair, tmp_path, capsys):
    """The result is as if all keys were given on the command line; a key given with its default value counts too."""
    for name in ("first", "second"):
        Image.new("RGB", (32, 32), "orange" if name == "first" else "blue").save(tmp_path / f"{name}.png")
    how = ["seed=5", "top_p=0.9", "guidance.kind=rising", "guidance.last=4", f"image={tmp_path / 'first.png'}"]
    assert run(pair, tmp_path, f"prompt={PROMPT}", *how) == 0
    path = next((tmp_path / "out").glob("*.json"))

    changes = ["prompt=a blue star", "n=2", "seed=0", "guidance.last=2.0", f"image={tmp_path / 'second.png'}"]
    again = [f"settings={path}", f"root={tmp_path}", "name=again", *changes]
    assert main(["generate", *again]) == 0
    told = "all but where the checkpoints are, prompt, n, seed, guidance.last, image is taken from"
    assert told in capsys.readouterr().out
    by_hand = ["top_p=0.9", "guidance.kind=rising", *changes]
    assert main(["generate", f"ckpt={pair.generator}", f"root={tmp_path}", "name=by_hand", *by_hand]) == 0
    assert contents(tmp_path / "again") == contents(tmp_path / "by_hand") and len(contents(tmp_path / "again")) == 2
    made = json.loads((tmp_path / "again" / "a_blue_star_seed1.json").read_text())["settings"]
    assert (made["seed"], made["top_p"], made["guidance"]["last"]) == (1, 0.9, 2.0)
    assert main(["generate", f"settings={path}", f"root={tmp_path}", "name=braces", "guidance={last: 3}"]) == 0
    (made,) = (json.loads(file.read_text())["settings"] for file in (tmp_path / "braces").glob("*.json"))
    assert (made["guidance"]["kind"], made["guidance"]["last"]) == ("rising", 3)


def test_a_variant_does_not_take_the_place_of_its_original(pair, tmp_path, capsys):
    assert run(pair, tmp_path, f"prompt={PROMPT}", "seed=1") == 0
    before, path = contents(tmp_path / "out"), next((tmp_path / "out").glob("*.json"))
    again = ["generate", f"settings={path}", f"root={tmp_path}", "name=out"]
    for words in ([], ["seed=0", "n=2"]):
        assert main([*again, "temperature=0.5", *words]) == 1
        assert "would be overwritten by a variant; give another name=" in capsys.readouterr().err
    assert main(again) == 0 and main([*again, "seed=9"]) == 0 and before.items() <= contents(tmp_path / "out").items()


def test_a_label_may_be_the_number_0():
    values = {"prompt": None, "label": 0, "prompts": None}
    assert prompts_of(values, "class") == ("label", ["0"])


def test_a_model_of_classes_needs_a_label():
    values = {"prompt": None, "label": None, "prompts": None}
    assert prompts_of(values, "text") == ("prompt", [""])
    with pytest.raises(ValueError, match="trained on classes: give label="):
        prompts_of(values, "class")


def test_settings_of_other_models_are_refused(pair, loaded, tmp_path, capsys):
    assert run(pair, tmp_path, f"prompt={PROMPT}") == 0
    path = next((tmp_path / "out").glob("*.json"))
    sidecar = json.loads(path.read_text())
    for name, model in zip(("generator", "tokenizer"), loaded):
        assert sidecar[f"{name}_hash"] == model.hash
    path.write_text(json.dumps(sidecar | {"generator_hash": "0123"}))
    assert main(["generate", f"settings={path}", f"root={tmp_path}", "name=again"]) == 1
    assert "generator_hash 0123" in (error := capsys.readouterr().err) and "ckpt=" in error
    moved = shutil.copy(pair.generator, tmp_path / "moved.ckpt")
    path.write_text(json.dumps(sidecar | {"settings": sidecar["settings"] | {"ckpt": "/gone.ckpt"}}))
    assert main(["generate", f"settings={path}", f"ckpt={moved}", f"root={tmp_path}", "name=again"]) == 0


def test_settings_are_data(pair, tmp_path, capsys):
    """Prompts are not interpolated, and only a video's settings are read from the file."""
    odd = "a red ${oc.env:HOME} ball ${nope}"
    (tmp_path / "list.txt").write_text(f"\ufeff{odd}\n", encoding="utf-8")
    assert run(pair, tmp_path, f"prompts={tmp_path / 'list.txt'}") == 0
    path = next((tmp_path / "out").glob("*.json"))
    sidecar = json.loads(path.read_text())
    assert sidecar["settings"]["prompt"] == odd
    assert main(["generate", f"settings={path}", f"root={tmp_path}", "name=again"]) == 0
    assert contents(tmp_path / "again") == contents(tmp_path / "out")
    for change in ({"folder": str(tmp_path / "elsewhere")}, {"guidance": 3}):
        path.write_text(json.dumps(sidecar | {"settings": sidecar["settings"] | change}))
        assert main(["generate", f"settings={path}", f"root={tmp_path}", "name=evil"]) == 1
        assert "is not the JSON beside a video" in capsys.readouterr().err
    path.write_text(json.dumps(sidecar | {"settings": sidecar["settings"] | {"frames": "five"}}))
    assert main(["generate", f"settings={path}", f"root={tmp_path}", "name=evil"]) == 1
    assert "frames=five; expected a whole number of 1 or more" in capsys.readouterr().err
    assert not (tmp_path / "elsewhere").exists()


def test_a_video_in_place_of_its_settings_is_told(tmp_path):
    path = write_video(torch.zeros(3, 1, 32, 32), tmp_path / "ball.mp4", 8)
    with pytest.raises(ValueError, match="ball.mp4 is the video; give the JSON beside it, ball.json"):
        read_sidecar(path)


def test_another_picture_is_another_video(pair, tmp_path, capsys, monkeypatch):
    Image.new("RGB", (32, 32), "orange").save(tmp_path / "first.png")
    with monkeypatch.context() as there:
        there.chdir(tmp_path)
        assert run(pair, tmp_path, f"prompt={PROMPT}", "image=first.png") == 0
    path = next((tmp_path / "out").glob("*.json"))
    assert json.loads(path.read_text())["settings"]["image"] == str(tmp_path / "first.png"), "found from other folders too"
    Image.new("RGB", (32, 32), "blue").save(tmp_path / "first.png")
    assert main(["generate", f"settings={path}", f"root={tmp_path}", "name=again"]) == 1
    assert "the picture or video has changed" in capsys.readouterr().err
    (tmp_path / "first.png").unlink()
    assert main(["generate", f"settings={path}", f"root={tmp_path}", "name=again"]) == 1
    assert "first.png, which is not there" in capsys.readouterr().err


@pytest.mark.parametrize(
    "prompt, stem",
    [
        ("a red ball", "a_red_ball"),
        ("A red, ball!", "a_red_ball_"),
        ("jumping_jack", "jumping_jack"),
        ("", "video"),
        ("猫", "85deb210"),
        ("un café", "un_caf_"),
        ("x" * 99, "x" * 72),
    ],
)
def test_file_names_tell_prompts_apart(prompt, stem):
    assert file_stem(prompt).startswith(stem) and len(file_stem(prompt)) <= 81
    for other in {f"{prompt}é", f"{prompt}.", f"{prompt} ", f"{prompt}A", prompt.swapcase()} - {prompt}:
        assert file_stem(prompt).lower() != file_stem(other).lower()


def test_prompts_that_would_share_a_file_are_refused(pair, tmp_path, capsys):
    (tmp_path / "list.txt").write_text("a red ball\na_red_ball")
    assert run(pair, tmp_path, f"prompts={tmp_path / 'list.txt'}") == 1
    told = "the prompts 'a red ball' and 'a_red_ball' share the file a_red_ball_seed0.mp4; leave one out"
    assert told in capsys.readouterr().err and not list(tmp_path.rglob("*.mp4"))


def test_what_is_gone_on_from_is_not_overwritten(pair, tmp_path, capsys):
    """The given file is a video of the same prompt, seed and folder, or a picture at the contact sheet's path."""
    assert run(pair, tmp_path, f"prompt={PROMPT}") == 0
    (video,), (sheet,) = ((tmp_path / "out").glob(pattern) for pattern in ("*.mp4", "*.png"))
    before = video.read_bytes(), sheet.read_bytes()
    for key, path in (("video", video), ("image", sheet)):
        assert run(pair, tmp_path, f"prompt={PROMPT}", f"{key}={path}") == 1
        assert f"{key}={path} would be overwritten by what is made of it; give another name=" in capsys.readouterr().err
    assert (video.read_bytes(), sheet.read_bytes()) == before
    assert run(pair, tmp_path, f"prompt={PROMPT}", f"video={video}", name="more") == 0


def test_what_is_gone_on_from_is_known_under_a_relative_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = Path("out") / "x_seed0.mp4"
    job = Job("x", 0, {"image": None, "video": str(path.resolve())}, {}, path)
    with pytest.raises(ValueError, match=f"video={path} would be overwritten"):
        check_paths([job], None)


def test_two_processes_do_not_write_to_a_folder(pair, tmp_path, capsys):
    with sole_user(tmp_path / "out"):
        assert run(pair, tmp_path, f"prompt={PROMPT}") == 1
    assert f"another process is at work in {tmp_path / 'out'}" in capsys.readouterr().err
    assert run(pair, tmp_path, f"prompt={PROMPT}") == 0 and not (tmp_path / "out" / ".lock").exists()


def test_further_machines_of_a_command_enter_its_folder(tmp_path, monkeypatch):
    with sole_user(tmp_path):
        monkeypatch.setenv("NODE_RANK", "1")
        with sole_user(tmp_path):
            pass
        assert (tmp_path / ".lock").exists(), "which the first still holds"


def test_settings_with_another_beginning(pair, tmp_path):
    """A picture replaces a video with its keys, and the other way round; a video is left out with its keys."""
    clip = Shapes("val", frames=9, height=32, width=32)[0]["video"]
    write_video(clip, tmp_path / "before.mp4", 12)
    Image.new("RGB", (32, 32), "orange").save(tmp_path / "first.png")
    given = [f"video={tmp_path / 'before.mp4'}", "history_frames=1", "frames=9", "overlap=1"]
    assert run(pair, tmp_path, f"prompt={PROMPT}", *given, name="0") == 0
    changes = [f"image={tmp_path / 'first.png'}"], [f"video={tmp_path / 'before.mp4'}", "history_frames=1"]
    for n, words in enumerate(changes):
        settings = next((tmp_path / str(n)).glob("*.json"))
        assert main(["generate", f"root={tmp_path}", f"name={n + 1}", f"settings={settings}", *words]) == 0
    assert contents(tmp_path / "0") == contents(tmp_path / "2") != contents(tmp_path / "1")
    settings = next((tmp_path / "0").glob("*.json"))
    assert main(["generate", f"root={tmp_path}", "name=3", f"settings={settings}", "video=null"]) == 0
    assert run(pair, tmp_path, f"prompt={PROMPT}", "frames=9", "overlap=1", name="4") == 0
    assert contents(tmp_path / "3") == contents(tmp_path / "4")


def test_frames_to_go_on_from_count_if_they_are_typed():
    """Without a video they are refused then; those of a video that is left out are not."""
    values = dict.fromkeys(SETTINGS) | {"history_frames": 5}
    for typed, kept in ((["history_frames"], 5), ([], None)):
        assert merged(values, values, typed)["history_frames"] == kept


def test_no_guidance_is_kept_as_what_it_is(pair, tmp_path):
    assert run(pair, tmp_path, f"prompt={PROMPT}", "guidance=null") == 0
    settings = next((tmp_path / "out").glob("*.json"))
    assert json.loads(settings.read_text())["settings"]["guidance"]["first"] == 1.0
    assert main(["generate", f"root={tmp_path}", "name=again", f"settings={settings}"]) == 0
    assert contents(tmp_path / "again") == contents(tmp_path / "out")


def test_more_than_a_clip_is_gone_on_with_at_positions(pair, tmp_path, capsys):
    """The default length adds all frames of a clip but its first to the history."""
    write_video(Shapes("val", frames=17, height=32, width=32)[0]["video"], tmp_path / "before.mp4", 12)
    given = [f"prompt={PROMPT}", f"video={tmp_path / 'before.mp4'}", "history_frames=9"]
    assert run(pair, tmp_path, *given, "extend=positions") == 0
    assert frames_of(next((tmp_path / "out").glob("*.mp4"))) == 13
    assert run(pair, tmp_path, *given, "extend=positions", "frames=9", name="less") == 1
    assert "frames=9, of which 9 are given" in capsys.readouterr().err


@pytest.mark.parametrize("taken, at_positions, otherwise", [(0, 9, 9), (5, 9, 9), (9, 17, 9), (13, 21, 9)])
def test_how_long_a_video_is_unless_it_is_said(taken, at_positions, otherwise):
    history = torch.zeros(3, taken, 8, 8) if taken else None
    assert usual_length(history, Sampling(extend="positions"), 9) == at_positions
    assert usual_length(history, Sampling(), 9) == otherwise


def test_a_tokenizer_of_images_makes_no_videos(loaded):
    generator, tokenizer = loaded
    of_images = SimpleNamespace(model=Tokenizer(replace(tokenizer.model.config, temporal=False)))
    for how, frames, longest in ((Sampling(extend="positions"), 5, 1), (Sampling(), 5, 5)):
        with pytest.raises(ValueError, match="this is a tokenizer of images: it takes 1 frame, got 5"):
            check_video_length(of_images, (frames, 32, 32), None, how, longest)
    check_video_length(of_images, (1, 32, 32), None, Sampling(extend="positions"), 1)


def test_a_video_left_without_its_settings_is_made_again(pair, tmp_path, monkeypatch):
    """A kill between the two writes leaves no settings, in particular not those of the previous video."""
    assert run(pair, tmp_path, f"prompt={PROMPT}") == 0
    before = contents(tmp_path / "out")
    monkeypatch.setattr("kit.verbs.generate.write_json", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert run(pair, tmp_path, f"prompt={PROMPT}", "temperature=1.5") != 0
    monkeypatch.undo()
    assert contents(tmp_path / "out") != before and not list((tmp_path / "out").glob("*.json"))
    assert run(pair, tmp_path, f"prompt={PROMPT}") == 0 and contents(tmp_path / "out") == before


def test_what_is_there_already_is_kept(pair, tmp_path, capsys):
    """A stopped list of prompts continues; other settings make all videos anew. The contact sheet shows all of them."""
    (tmp_path / "list.txt").write_text(f"{PROMPT}\n\n  a blue star\na red ball\n a red ball")
    words = [f"prompts={tmp_path / 'list.txt'}", "n=2"]
    assert run(pair, tmp_path, *words) == 0
    out = tmp_path / "out"
    whole, names = contents(out), sorted(path.name for path in out.glob("*.mp4"))
    assert names[:2] == ["a_blue_star_seed0.mp4", "a_blue_star_seed1.mp4"] and len(names) == 6
    sheet = (out / "contact_sheet.png").read_bytes()
    (out / names[1]).unlink(), (out / names[4]).with_suffix(".json").unlink()
    (out / names[2]).write_bytes(whole[names[2]][:-9])
    kept = (out / names[0]).stat().st_mtime_ns
    capsys.readouterr()
    assert run(pair, tmp_path, *words) == 0
    assert "3 of 6 videos are there already" in capsys.readouterr().out
    assert contents(out) == whole and (out / names[0]).stat().st_mtime_ns == kept
    assert (out / "contact_sheet.png").read_bytes() == sheet
    assert run(pair, tmp_path, *words, "temperature=1.0") == 0
    assert "there already" not in capsys.readouterr().out and contents(out) != whole


@pytest.mark.parametrize("there, batches", [("036", [[1, 2], [4, 5]]), ("13", [[0, 2], [4, 5], [6]]), ("0123456", [])])
def test_videos_that_lack_are_made_in_batches_and_all_are_shown(monkeypatch, there, batches):
    jobs = [SimpleNamespace(prompt=f"{n}", seed=n, path=Path(f"{n}.mp4"), done=f"{n}" in there) for n in range(7)]
    jobs[0].settings, made, given = {"frames": 5}, [], []

    def bar(count, *_):
        given.append(count)
        return nullcontext(SimpleNamespace(update=len))

    monkeypatch.setattr("kit.verbs.generate.progress", bar)
    monkeypatch.setattr("kit.verbs.generate.stream_samples", lambda *given: given)
    monkeypatch.setattr("kit.verbs.generate.write_videos", lambda batch, pieces: made.append((batch, *pieces)))
    monkeypatch.setattr("kit.verbs.generate.show", lambda *shown: given.append(shown))
    values, generator = {"batch_size": 2, "precision": "float32"}, SimpleNamespace(clip={"height": 8, "width": 12})
    paths = make_videos(jobs, generator, None, values, None, Sampling())
    assert paths == [job.path for job in jobs] and given == [7 - len(there), (jobs, Path("contact_sheet.png"))]
    for numbers, (batch, _, _, prompts, seeds, size, *_, update) in zip(batches, made, strict=True):
        assert batch == [jobs[n] for n in numbers] and seeds == numbers and prompts == [f"{n}" for n in numbers]
        assert size == (5, 8, 12) and update is len


def test_each_video_of_a_batch_is_written_to_its_own_file_and_shown_with_its_seed(tmp_path, monkeypatch):
    jobs = [Job("x", seed, {"fps": 8 + seed}, {}, tmp_path / f"{seed}.mp4") for seed in (0, 4)]
    shades = torch.tensor([-0.5, 0.5]).view(2, 1, 1, 1, 1)
    write_videos(jobs, iter([shades.expand(2, 3, frames, 16, 32) for frames in (1, 4)]))
    files = [open_clip_file(job.path, None, 0) for job in jobs]
    assert [(len(file), file.size, file.video.fps) for file in files] == [(5, (16, 32), 8), (5, (16, 32), 12)]
    assert all(job.done for job in jobs)
    monkeypatch.setattr("kit.verbs.generate.contact_sheet", lambda *given: given)
    (first, second), titles, _ = show(jobs, tmp_path / "sheet.png")
    assert [group["sample"].mean().item() for group in (first, second)] == pytest.approx([-0.5, 0.5], abs=0.02)
    assert titles == ["x (seed 0)", "x (seed 4)"]


def test_nothing_half_written_is_left(pair, tmp_path, monkeypatch):
    stream = stream_samples

    def stopped(*args, **kwargs):
        yield next(stream(*args, **kwargs))
        raise KeyboardInterrupt

    monkeypatch.setattr("kit.verbs.generate.stream_samples", stopped)
    assert run(pair, tmp_path, f"prompt={PROMPT}") != 0
    assert not (tmp_path / "out").exists(), "nor an empty folder"


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["label=ball"], "trained on captions: use prompt="),
        (["prompt=x", "label=ball"], "not both prompt= and label="),
        (["prompt=x", "frames=6"], "1 + 4n"),
        (["prompt=x", "image=nowhere.png"], "no such file: nowhere.png"),
        (["prompt=x", "temperature=-1"], "temperature must be 0 or more"),
        (["prompt=x", "top_p=0"], "top_p must be above 0"),
        (["prompt=x", "guidance.kind=strong"], "guidance.kind=strong; expected one of: rising, falling, constant"),
        (["prompt=x", "precision=half"], "expected one of: float32, bfloat16"),
        (["prompt=x", "frames=33", "overlap=5"], "overlap=5 leaves nothing to add to clips of 5 frames"),
        (["prompts=nowhere.txt"], "prompts=nowhere.txt: no such file; it holds one prompt a line"),
        (["prompt=x", "overlap=8"], "overlap=8; expected 1 + 4n frames"),
        (["prompt=x", "overlap=0"], "overlap=0; expected a whole number of 1 or more"),
        (["prompt=x", "n=0"], "n=0; expected a whole number of 1 or more"),
        (["prompt=x", "batch_size=0"], "batch_size=0; expected a whole number of 1 or more"),
        (["prompt=x", "seed=-1"], "seed=-1; expected a whole number of 0 or more"),
        (["settings=."], "settings=.: a folder, not a file; it is the JSON beside a video"),
        (["settings=nowhere.json"], "settings=nowhere.json: no such file"),
        (["prompt=x", "top_p=null"], "top_p=null; expected a number"),
        (["prompt=x", "temperature=null"], "temperature=null; expected a number"),
        (["prompt=x", "guidance.first=nan"], "guidance.first=nan; expected a number"),
        (["prompt=x", "guidance.last=inf"], "guidance.last=inf; expected a number"),
        (["prompt=x", "+guidance.strength=3"], "guidance has no strength; its keys are fine, first, kind, last"),
        (["prompt=x", "seed=4294967296"], "seed=4294967296: expected a number below 2^32"),
        (["prompt=x", "image="], "image= names no file. Is a variable of the shell unset?"),
        (["prompt=x", "tokenizer="], "tokenizer= names no file"),
        (["prompt=caf\udce9"], "prompt='caf\\udce9' is not UTF-8"),
        (["prompt=x", "negative=caf\udce9"], "negative='caf\\udce9' is not UTF-8"),
        (["prompt=x", "image=caf\udce9.png"], "image='caf\\udce9.png' is not UTF-8"),
        (["prompt=x", "fps=-5"], "fps=-5: expected frames per second, 0.001 to 1000"),
        (["prompt=x", "fps=0.0001"], "fps=0.0001: expected frames per second, 0.001 to 1000"),
        (["prompt=x", "fps=1e12"], "fps=1000000000000.0: expected frames per second, 0.001 to 1000"),
    ],
)
def test_explains_bad_input(pair, tmp_path, capsys, words, expected):
    assert run(pair, tmp_path, *words) == 1
    assert expected in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_numbers_are_whole_and_seeds_have_32_bits():
    values = {"batch_size": 1, "frames": None, "history_frames": None, "overlap": None, "fps": None}
    check_numbers({**values, "seed": 2**32 - 2, "n": 2})
    with pytest.raises(ValueError, match="expected a number below 2"):
        check_numbers({**values, "seed": 2**32 - 2, "n": 3})
    for key, wrong in (("n", True), ("frames", 0), ("history_frames", 0)):
        with pytest.raises(ValueError, match=f"{key}={wrong}; expected a whole number of 1 or more"):
            check_numbers({**values, "seed": 0, "n": 1, key: wrong})


def test_the_slowest_and_the_fastest_rate_are_taken_and_text_is_not():
    values = {"n": 1, "seed": 0, "batch_size": 1, "frames": None, "history_frames": None, "overlap": None}
    for rate in (0.001, 1000):
        check_numbers({**values, "fps": rate})
    with pytest.raises(ValueError, match="fps=fast: expected frames per second"):
        check_numbers({**values, "fps": "fast"})


def test_a_relative_path_is_kept_with_its_folder(monkeypatch):
    """So the folder's name too must be UTF-8."""
    values = dict.fromkeys(("prompt", "label", "negative", "image", "video", "ckpt", "tokenizer"))
    monkeypatch.setattr("os.getcwd", lambda: "/caf\udce9")
    for key in ("image", "video"):
        with pytest.raises(ValueError, match=f"{key}='a.mp4' is not UTF-8"):
            check_texts({**values, key: "a.mp4"})


def test_a_picture_and_a_video_do_not_go_together():
    values = {"image": "a.png", "video": "b.mp4", "history_frames": None}
    with pytest.raises(ValueError, match="give image= or video=, not both"):
        history_of(values, {"frames": 9})


def test_what_is_gone_on_with_has_frames_that_a_tokenizer_takes():
    with pytest.raises(ValueError, match=r"1 \+ 4n"):
        history_of({"image": None, "video": "a.mp4", "history_frames": 6}, {"frames": 9})


def test_explains_bad_files(pair, tmp_path, capsys):
    (tmp_path / "empty.txt").write_text(" \n")
    assert run(pair, tmp_path, f"prompts={tmp_path / 'empty.txt'}") == 1
    assert "holds no prompt; write one a line" in capsys.readouterr().err
    (tmp_path / "latin.txt").write_bytes(b"a ball\n\xe9t\xe9\n")
    assert run(pair, tmp_path, f"prompts={tmp_path / 'latin.txt'}") == 1
    assert "latin.txt, line 2: not UTF-8" in capsys.readouterr().err
    (tmp_path / "captions.csv").write_text("file,caption\na.mp4,a red ball\n")
    assert run(pair, tmp_path, f"prompts={tmp_path / 'captions.csv'}") == 1
    assert "captions.csv is a table; write what is wanted of it into a text file" in capsys.readouterr().err
    (tmp_path / "other.json").write_text("[]")
    assert run(pair, tmp_path, f"settings={tmp_path / 'other.json'}") == 1
    assert "is not the JSON beside a video" in capsys.readouterr().err
    write_video(Shapes("val", frames=5, height=32, width=32)[0]["video"], tmp_path / "short.mp4", 8)
    assert run(pair, tmp_path, "prompt=x", f"video={tmp_path / 'short.mp4'}", "history_frames=9", "frames=13") == 1
    assert "too short for 9 frames" in (error := capsys.readouterr().err) and "history_frames=" in error
    assert run(pair, tmp_path, "prompt=x", f"video={tmp_path / 'short.mp4'}", "history_frames=5", "frames=9") == 1
    assert "use history_frames=1 or less" in capsys.readouterr().err
    assert main(["generate", f"root={tmp_path}", "prompt=x"]) == 1
    assert "give ckpt=PATH" in capsys.readouterr().err


def test_the_first_frame_of_a_moving_picture_is_told(tmp_path, capsys):
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "two.png", save_all=True, append_images=frames[1:])
    values = {"image": None, "video": str(tmp_path / "two.png"), "history_frames": 1}
    given, _ = history_of(values, {"frames": 5, "height": 32, "width": 32, "fps": 8})
    assert given[0].min() == 1 and "two.png moves; its first frame is taken" in capsys.readouterr().out


def test_notes_tell_what_is_done_with_odd_input(pair, tmp_path, capsys):
    Image.new("RGBA", (40, 30), (255, 165, 0, 128)).save(tmp_path / "wide.png")
    words = [f"image={tmp_path / 'wide.png'}", "prompt=a red zeppelin", "frames=9", "extend=positions"]
    assert run(pair, tmp_path, *words) == 0
    told = capsys.readouterr().out
    assert "never seen in training, so without a meaning: zeppelin" in told
    assert "wide.png is 40 x 30: scaled, and cut in the centre to 32 x 32" in told
    assert "note: transparent areas of" in told
    assert "9 frames in one sequence, 5 were trained" in told
    Image.new("RGBA", (40, 30), "orange").save(tmp_path / "wide.png")
    assert run(pair, tmp_path, f"image={tmp_path / 'wide.png'}", "prompt=", "frames=9", "overlap=1", name="empty") == 0
    told = capsys.readouterr().out
    assert "transparent" not in told and "moves" not in told
    assert "the prompt is empty" in told and "9 frames, 5 at a time, each time from the last 1 on" in told
    assert run(pair, tmp_path, f"prompt={PROMPT}", "negative=x", "guidance.first=1", name="neutral") == 0
    assert "negative has no effect without guidance" in capsys.readouterr().out
