"""validate, reconstruct, generate, inspect and demo, on a tiny trained pair."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from torch.utils.data import default_collate

from kit.checkpoint import Loaded, load_tokenizer, read_checkpoint
from kit.cli import main
from kit.data.clips import FolderClips
from kit.data.datamodule import ClipDataModule
from kit.data.mixture import Mixture
from kit.data.shapes import Shapes
from kit.files import sole_user
from kit.generator.condition import ConditionConfig
from kit.generator.sampler import Sampling
from kit.generator.sequence import training_sequence
from kit.machine import device
from kit.measures import per_scale, reconstruct_batches, teacher_forced_metrics
from kit.media import write_video
from kit.verbs.demo import summary
from kit.verbs.held_out import held_out
from kit.verbs.inspect import draw_samples
from kit.verbs.validate import seconds_for_one, validate_generator
from tests.fixtures import CLIP, GENERATOR, QUICK, TOKENIZER, composed, fit_tokenizer
from tests.processes import Command, children, demo_part

ROOT = Path(__file__).resolve().parents[2]
PROMPT = "a red ball moving right over a green field"


def run(verb, pair, tmp_path, *overrides, model="generator") -> int:
    return main([verb, f"ckpt={getattr(pair, model)}", f"root={tmp_path}", "name=out", *overrides])


def test_reconstruct_reports_each_scale(pair, tmp_path):
    assert run("reconstruct", pair, tmp_path, "clips=2", "data.source.seed=1", model="tokenizer") == 0
    assert (tmp_path / "out" / "reconstruction.png").is_file()


def test_each_scale_of_a_trained_tokenizer_lowers_the_error(pair):
    loaded = load_tokenizer(pair.tokenizer)
    video = torch.stack([Shapes("val", frames=5, height=32, width=32)[n]["video"] for n in range(8)])
    _, _, steps = loaded.model(video)
    feature = loaded.model.encode(video).transpose(1, 2).flatten(0, 1)
    errors = [(feature - step.total).square().mean().item() for step in steps]
    assert errors[0] > errors[1] > errors[2]
    psnrs = [row["psnr_db"] for row in per_scale(loaded, video, 8)[1]]
    assert psnrs == sorted(psnrs)


def test_inspect_and_validate(pair, tmp_path, capsys):
    assert run("inspect", pair, tmp_path, "clips=4") == 0
    report = json.loads((tmp_path / "out" / "inspect.json").read_text())
    assert len(report["by_scale"]) == len(report["bit_entropy"]) == len(report["bit_accuracy"]) == 3
    by_frame = np.array(report["bit_accuracy_by_frame"])
    assert by_frame.shape == (2, 3) and by_frame.mean(0) == pytest.approx(report["bit_accuracy"], abs=2e-4)
    assert Image.open(tmp_path / "out" / "bit_use.png").size[0] > 8 * 14

    assert run("validate", pair, tmp_path, "clips=4", "shown=2", "name=scores") == 0
    metrics = json.loads((tmp_path / "scores" / "metrics.json").read_text())
    assert set(metrics["caption_accuracy"]) == {"colour", "shape", "motion", "background", "all"}
    assert metrics["reconstruction_psnr_db"] > 10 and metrics["sample_seconds"] > 0
    assert len(list((tmp_path / "scores" / "samples").glob("*.mp4"))) == 2
    assert f"in {tmp_path / 'scores'}: metrics.json, contact_sheet.png and .webp, samples\n" in capsys.readouterr().out

    (tmp_path / "scores" / "videos").mkdir()
    (tmp_path / "scores" / "videos" / "a_suite-0.mp4").touch()
    (tmp_path / "scores" / "samples" / "mine.mp4").touch()
    assert run("validate", pair, tmp_path, "clips=4", "shown=1", "seed=5", "name=scores") == 0
    assert (tmp_path / "scores" / "videos" / "a_suite-0.mp4").is_file(), "what other verbs have made stays"
    samples = sorted(path.stem[-5:] for path in (tmp_path / "scores" / "samples").glob("*.mp4"))
    assert samples == ["mine", "seed5"], "of this call alone, and what is not of this verb"

    assert run("validate", pair, tmp_path, "clips=4", "name=tok", model="tokenizer") == 0
    metrics = json.loads((tmp_path / "tok" / "metrics.json").read_text())
    assert metrics["reconstruction_psnr_db"] > 10
    assert set(metrics["reconstruction_caption_accuracy"]) == {"colour", "shape", "motion", "background", "all"}


@pytest.fixture
def untrained(make_generator, make_tokenizer, tmp_path) -> tuple[Loaded, Loaded, dict]:
    """A generator and a tokenizer of random weights, and three clips of theirs."""
    models = (Loaded(model, {}, tmp_path, 0, "") for model in (make_generator(scales=2), make_tokenizer()))
    return *models, default_collate([Shapes("val", frames=5, height=8, width=8)[n] for n in range(3)])


def test_all_clips_are_scored_in_batches_of_any_size(untrained):
    generator, tokenizer, clips = untrained
    whole = teacher_forced_metrics(generator, tokenizer, clips, 3)
    output = reconstruct_batches(tokenizer, clips["video"], 3)
    assert teacher_forced_metrics(generator, tokenizer, clips, 2) == whole
    torch.testing.assert_close(reconstruct_batches(tokenizer, clips["video"], 2), output)


def test_scores_are_of_models_in_the_precision_that_is_asked_for(untrained):
    generator, tokenizer, clips = untrained
    exact, rounded = (reconstruct_batches(tokenizer, clips["video"], 3, p) for p in ("float32", "bfloat16"))
    assert exact.equal(reconstruct_batches(tokenizer, clips["video"], 3)) and not exact.equal(rounded)
    seen = []
    hook = generator.model.register_forward_hook(lambda *_: seen.append(torch.is_autocast_enabled(device().type)))
    for precision in ("float32", "bfloat16"):
        teacher_forced_metrics(generator, tokenizer, clips, 3, precision)
        seen.append(precision)
    hook.remove()
    assert seen == [False, "float32", True, "bfloat16"]


def test_bits_that_are_right_are_counted_by_frame_and_by_scale(untrained, monkeypatch):
    """Of the first of two frames all are right, of the second none."""
    generator, tokenizer, clips = untrained

    def predict(model, feature, schedule, condition):
        sequence = training_sequence(feature, schedule, None, None)
        right = torch.arange(schedule.length)[:, None] < schedule.frame(1).start
        return torch.where(sequence.targets.bool() == right, 1.0, -1.0), sequence

    monkeypatch.setattr("kit.measures.teacher_forced", predict)
    metrics = teacher_forced_metrics(generator, tokenizer, clips, 3)
    assert metrics == {"bit_accuracy": [0.5, 0.5], "bit_accuracy_by_frame": [[1.0, 1.0], [0.0, 0.0]]}


def test_the_time_for_a_clip_is_the_median_of_three_after_one_to_warm_up(untrained, monkeypatch):
    generator, tokenizer, _ = untrained
    ticks, asked = iter([0, 9, 10, 11, 20, 23, 30, 32]), []

    def sample(*given):
        asked.append(given)
        yield from (torch.zeros(1), torch.zeros(1))

    monkeypatch.setattr("kit.verbs.validate.time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    monkeypatch.setattr("kit.verbs.validate.stream_samples", sample)
    assert seconds_for_one(generator, tokenizer, PROMPT, (5, 8, 12), Sampling(), "bfloat16") == 2
    assert asked == [(generator, tokenizer, [PROMPT], [0], (5, 8, 12), Sampling(), "bfloat16")] * 4


@pytest.mark.parametrize("drawn, width", [(True, 16), (True, 8), (False, 16)])
def test_reconstructions_and_samples_are_scored_and_shown_each_as_what_it_is(drawn, width, tmp_path, monkeypatch):
    """Real clips are of zeros, reconstructions of 0.25 and samples of 0.5. Captions are read from drawn clips alone that are
    large enough."""
    video, written, sheets, asked = torch.zeros(3, 3, 5, 16, width), [], [], []
    condition = SimpleNamespace(kind="text", prompts=lambda batch: batch["caption"])
    model = SimpleNamespace(condition=condition, config=SimpleNamespace(condition=condition))
    val = Shapes("val", frames=5, height=16, width=width) if drawn else None
    data = SimpleNamespace(val=val, classes=(), fps=12, height=16, width=width)

    def in_place_of(name: str, function):
        monkeypatch.setattr(f"kit.verbs.validate.{name}", function)

    in_place_of("load_generator", lambda *given: (SimpleNamespace(model=model, clip={"fps": 8}), given))
    in_place_of("data_for", lambda *_: data)
    in_place_of("held_out", lambda _: {"video": video, "caption": ["a", "b", "c"]})
    in_place_of("check_classes", lambda *_: None)
    in_place_of("reconstruct_batches", lambda *_: video + 0.25)
    in_place_of("sample_videos", lambda *given: asked.append(given) or video + 0.5)
    in_place_of("teacher_forced_metrics", lambda *_: {})
    in_place_of("seconds_for_one", lambda *given: asked.append(given) or 1.5)
    in_place_of("caption_accuracy", lambda clips, captions, fps: (len(clips), clips[0].mean().item(), captions, fps))
    in_place_of("write_video", lambda clip, path, fps: written.append((clip.mean().item(), path.name, fps)))
    in_place_of("contact_sheet", lambda *given: sheets.append(given))
    in_place_of("moving_sheet", lambda *given: sheets.append(given))
    words = ["ckpt=x", "tokenizer=y", f"root={tmp_path}", "shown=2", "seed=7", "batch_size=2", "precision=float32"]
    metrics = validate_generator(composed("validate", *words))
    assert metrics.pop("reconstruction_psnr_db") == pytest.approx(18.06, abs=0.01)
    scores = {"reconstruction_caption_accuracy": 0.25, "caption_accuracy": 0.5}
    scores = {name: (3, level, ["a", "b", "c"], 12) for name, level in scores.items() if drawn and width == 16}
    assert metrics == {"clips": 3, "sample_seconds": 1.5, **scores}
    assert written == [(0.5, "a_seed7.mp4", 8), (0.5, "b_seed8.mp4", 8)]
    assert asked[0][1:5] == (("x", "y"), ["a", "b", "c"], [7, 8, 9], (5, 16, width)) and asked[0][6:] == ("float32", 2)
    assert asked[1][2:4] == ("a", (5, 16, width)) and asked[1][5:] == ("float32",)
    (groups, *still), (same, *moving) = sheets
    assert groups is same and [titles for titles, *_ in (still, moving)] == [["a", "b"]] * 2 and moving[-1] == 8
    levels = [{row: clip.mean().item() for row, clip in group.items()} for group in groups]
    assert levels == [{"real": 0, "reconstruction": 0.25, "sample": 0.5}] * 2


def test_a_generator_is_not_scored_on_other_classes(monkeypatch):
    model = SimpleNamespace(config=SimpleNamespace(condition=ConditionConfig("class", ("run", "jump"))))
    monkeypatch.setattr("kit.verbs.validate.load_generator", lambda *_: (SimpleNamespace(model=model), None))
    monkeypatch.setattr("kit.verbs.validate.data_for", lambda *_: SimpleNamespace(classes=("jump", "run")))
    monkeypatch.setattr("kit.verbs.validate.held_out", lambda _: {})
    with pytest.raises(ValueError, match="the data has.*give the data it was trained on"):
        validate_generator(composed("validate", "ckpt=x"))


@pytest.mark.parametrize("verb", ["validate", "inspect"])
def test_a_tokenizer_is_not_told_how_to_sample(verb, pair, tmp_path, capsys):
    assert run(verb, pair, tmp_path, "guidance={first: 3}", "temperature=0", model="tokenizer") == 1
    told = "guidance.first, temperature: how a generator samples, which a tokenizer does not; leave it out"
    assert told in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_inspect_samples_with_its_seed(make_generator, make_tokenizer, tmp_path):
    models = [Loaded(model, {}, tmp_path, 0, "") for model in (make_generator(scales=2), make_tokenizer())]
    few = {"video": Shapes("val", frames=5, height=8, width=8)[0]["video"][None], "caption": ["a red ball"]}
    for name, seed in {"a": 0, "b": 0, "c": 5}.items():
        draw_samples(*models, few, OmegaConf.create({"folder": str(tmp_path / name), "seed": seed, "precision": "float32"}))
    pictures = [(tmp_path / name / "samples.png").read_bytes() for name in "abc"]
    assert pictures[0] == pictures[1] != pictures[2]


@pytest.mark.parametrize("verb", ["validate", "inspect", "reconstruct"])
def test_what_models_show_is_of_one_process_and_of_some_clips(verb, pair, tmp_path, capsys):
    words = [verb, f"ckpt={pair.tokenizer}", f"root={tmp_path}", "name=out", "clips=4"]
    with sole_user(tmp_path / "out"):
        assert main(words) == 1
    assert f"another process is at work in {tmp_path / 'out'}" in capsys.readouterr().err
    for key in ("shown", "clips", "batch_size"):
        assert main([*words, f"{key}=0"]) == 1
        assert f"kit {words[0]}: {key}=0; expected a whole number of 1 or more" in capsys.readouterr().err


def demo_words(root: Path, *generator: str) -> list[str]:
    """Returns the words of a reduced demo."""
    lists = {"overrides": [*CLIP, *TOKENIZER, *QUICK], "generator_overrides": [*GENERATOR, *generator],
             "tokenizer_overrides": ["recipe.tokenizer.steps=4"]}  # fmt: skip
    lists = [f"{key}=[" + ",".join(f"'{value}'" for value in values) + "]" for key, values in lists.items()]
    return ["demo", f"root={root}", "clips=2", *lists]


def test_other_clips_than_those_held_out_are_told(tmp_path, capsys, caplog):
    """A tokenizer trained on a folder of clips is scored on `shapes`, or with another choice of held-out clips."""
    for n in range(6):
        write_video(Shapes(frames=5, height=32, width=32)[n]["video"], tmp_path / "clips" / f"{n}.mp4", 8)
    data = ["data=clips", f"data.root={tmp_path / 'clips'}"]
    assert fit_tokenizer(tmp_path, *data, "data.source.val_every=3", "recipe.tokenizer.steps=1") == 0
    assert f"{tmp_path / 'clips'}, 4 files to train on, 2 held out, neither captions nor classes" in caplog.text
    capsys.readouterr()
    ckpt = f"ckpt={tmp_path / 'tokenizer' / 'checkpoints' / 'last.ckpt'}"
    for words, told in (([*data, "data.source.val_every=3"], False), (data, True), ([], True)):
        assert main(["validate", ckpt, f"root={tmp_path}", "clips=2", *words]) == 0
        assert ("other clips than were held out of the tokenizer's training" in capsys.readouterr().out) == told


def test_a_held_out_file_that_cannot_be_read_is_left_out(tmp_path, capsys):
    """Another one's clip would stand in for it, and be scored twice."""
    for name in "acd":
        write_video(torch.zeros(3, 5, 32, 32), tmp_path / f"{name}.mp4", 8)
    (tmp_path / "b.mp4").write_text("not a video")
    source = partial(FolderClips, tmp_path, val_every=2)
    data = ClipDataModule(source, 5, 32, 32, 8.0, batch_size=1, val_clips=2, workers=0)
    with pytest.warns(UserWarning, match="cannot read the video"):
        assert len(held_out(data)["video"]) == 1
    assert data.unreadable == [tmp_path / "b.mp4"]
    assert "1 of 2 cannot be read and are left out" in capsys.readouterr().out


def test_of_a_mixture_too_each_held_out_file_is_taken_once(tmp_path, capsys):
    for name in "abcd":
        write_video(torch.full((3, 5, 32, 32), ord(name) / 127 - 1), tmp_path / f"{name}.mp4", 8)
    (tmp_path / "d.mp4").write_text("not a video")
    sources = {"folder": partial(FolderClips, tmp_path, val_every=2), "shapes": Shapes}
    source = partial(Mixture, sources, {"folder": 1, "shapes": 1})
    data = ClipDataModule(source, 5, 32, 32, 8.0, batch_size=1, val_clips=20, workers=0)
    drawn = sum(data.val.turns.of(n)[0] == "shapes" for n in range(20))
    with pytest.warns(UserWarning, match="cannot read the video"):
        assert len(held_out(data)["video"]) == drawn + 1
    told = capsys.readouterr().out
    assert f"clips=20, but {drawn + 2} held out: each is taken once" in told
    assert f"1 of {drawn + 2} cannot be read and are left out" in told


def test_no_readable_file_among_the_clips_is_told(tmp_path):
    for name in "ac":
        write_video(torch.zeros(3, 5, 32, 32), tmp_path / f"{name}.mp4", 8)
    (tmp_path / "b.mp4").write_text("not a video")
    write_video(torch.zeros(3, 5, 32, 32), tmp_path / "d.mp4", 8)
    data = ClipDataModule(partial(FolderClips, tmp_path, val_every=2), 5, 32, 32, 8.0, batch_size=1, val_clips=1, workers=0)
    with pytest.warns(UserWarning, match="cannot read"), pytest.raises(ValueError, match="clips=1: none of them can be read"):
        held_out(data)


def test_held_out_files_are_scored_once(pair, tmp_path, capsys):
    for n in range(4):
        write_video(Shapes(frames=5, height=32, width=32)[n]["video"], tmp_path / "clips" / f"{n}.mp4", 8)
    words = ["data=clips", f"data.root={tmp_path / 'clips'}", "data.source.val_every=2"]
    for clips, told in ((3, True), (2, False)):
        assert run("validate", pair, tmp_path, *words, f"clips={clips}", model="tokenizer") == 0
        assert json.loads((tmp_path / "out" / "metrics.json").read_text())["clips"] == 2
        assert ("clips=3, but 2 held out: each is taken once" in capsys.readouterr().out) == told


def test_reconstructions_of_another_call_do_not_stay(pair, tmp_path):
    for clips in (3, 1):
        assert main(["reconstruct", f"ckpt={pair.tokenizer}", f"root={tmp_path}", f"clips={clips}"]) == 0
        assert len(list((tmp_path / "reconstructed").glob("reconstruction_*.mp4"))) == clips


def test_the_short_demo_trains_less_than_half_as_long():
    short = composed("demo_short")
    parts = {"stage1_tokenizer": short.tokenizer_overrides, "stage2_generator": short.generator_overrides}
    for conf, words in parts.items():
        less, whole = (composed(conf, "size=tiny", *more).trainer.max_steps for more in (words, []))
        assert 0 < less < whole / 2
    assert short.name != composed("demo").name


def test_demo_killed_goes_on_leaves_what_it_promises_and_is_not_trained_again(tmp_path, monkeypatch):
    """A reduced demo is killed with all its processes once the generator has saved a step, then started again with the same
    words, and once more with nothing left to train."""

    saves = ["callbacks.last.every=5", "callbacks.last.share=1"]
    words, folder = demo_words(tmp_path, "recipe.generator.steps=60", *saves), tmp_path / "demo"
    last = folder / "generator" / "checkpoints" / "last.ckpt"
    monkeypatch.setattr("kit.verbs.demo.run", partial(demo_part, tmp_path / "said"))
    process = Command(words, tmp_path / "log.txt")
    try:
        while not last.exists():
            assert process.poll() is None, (tmp_path / "log.txt").read_text()[-2000:]
            time.sleep(0.02)
    finally:
        for number in (*children(process.pid), process.pid):
            os.kill(number, signal.SIGKILL)
        process.wait()
    begun = read_checkpoint(last, "generator")["global_step"]
    assert 0 < begun < 60 and not (folder / "metrics.json").exists()

    assert main(words) == 0
    assert read_checkpoint(last, "generator")["global_step"] == 60
    assert len(list((folder / "generator" / "logs").glob("version_*"))) == 2
    metrics = json.loads((folder / "metrics.json").read_text())
    assert {"colour", "shape", "motion", "background"} <= set(metrics["caption_accuracy"])
    assert {"reconstruction_psnr_db", "sample_seconds", "train_seconds"} <= set(metrics)
    assert all((folder / f"contact_sheet.{kind}").is_file() for kind in ("png", "webp"))
    assert len(list((folder / "videos").glob("*.mp4"))) >= 4

    before = last.read_bytes()
    assert main(words) == 0
    assert last.read_bytes() == before
    assert json.loads((folder / "metrics.json").read_text())["train_seconds"] == metrics["train_seconds"]


def test_what_the_demo_says_comes_next_can_be_pasted():
    """Also where its folder has blanks."""
    folder = Path("my runs/demo")
    scores = {"train_seconds": 60, "sample_seconds": 1, "reconstruction_psnr_db": 29, "caption_accuracy": {"colour": 1}}
    next_ones = summary(folder, folder / "tokenizer.ckpt", folder / "generator.ckpt", scores).partition("\nNext\n")[2]
    given = [[word for word in shlex.split(line) if word.startswith("ckpt=")] for line in next_ones.splitlines()]
    assert given == [["ckpt=my runs/demo/generator.ckpt"]] * 4 + [[], []]


def test_the_demo_hands_on_its_seed_and_threads(tmp_path, monkeypatch):
    parts = []
    monkeypatch.setattr("kit.verbs.demo.run", parts.append)
    assert main(["demo", f"root={tmp_path}", "seed=3", "threads=1"]) == 1, "nothing is there to tell the scores of"
    assert [words[1] for words in parts if {"seed=3", "threads=1"} <= set(words)] == ["fit", "fit", "validate", "generate"]


PART = """
import pathlib, signal, time
signal.signal(signal.SIGTERM, signal.default_int_handler)
try:
    pathlib.Path("began").touch()
    time.sleep(60)
except KeyboardInterrupt:
    time.sleep(1)  # as a training that ends its step
    pathlib.Path("saved").touch()
"""


@pytest.mark.parametrize("tell, number", [(os.killpg, signal.SIGINT), (os.kill, signal.SIGINT), (os.kill, signal.SIGTERM)])
def test_a_part_of_the_demo_saves_when_it_is_told_to_end(tmp_path, tell, number):
    """A terminal tells all processes, others only the first."""
    (tmp_path / "part.py").write_text(PART)
    heeded = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"  # which a shell's job may ignore
    code = f"{heeded}; import kit.verbs.demo; kit.verbs.demo.PATIENCE = 2.0; kit.verbs.demo.run(['part'])"
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, start_new_session=True, stderr=subprocess.DEVNULL
    ) as running:
        while running.poll() is None and not (tmp_path / "began").exists():
            time.sleep(0.01)
        tell(running.pid, number)
        assert running.wait(60) != 0 and (tmp_path / "saved").exists()
