"""`kit evaluate`, on a tiny trained pair: the same command gives the same result, also after interruptions."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from kit.cli import main
from kit.data.shapes import Shapes
from kit.evaluation import run
from kit.evaluation.candidates import Reconstructions, Samples
from kit.evaluation.clips import FileClips, Together, choose, given_clips
from kit.evaluation.report import curves, details, read_result, side_by_side, told_apart, write_page
from kit.machine import cache_folder
from kit.media import write_video
from tests.fixtures import fit_generator

# Six clips of 4 frames with a small VideoMAE: the way is the same, at a hundredth of the cost.
SMALL = [
    "protocol.real.clips=6", "protocol.samples=6", "protocol.frames=4", "protocol.height=32", "protocol.width=32",
    "protocol.detector.kind=videomae", "protocol.detector.sha256=null", "workers=0",
]  # fmt: skip


@pytest.fixture
def evaluate(tmp_path, videomae):
    """A function that runs the verb and returns its exit status."""

    def go(*words: str, protocol: str = "shapes", name: str = "out", without: set = frozenset()) -> int:
        small = [word for word in SMALL if word not in without and not (without and "detector" in word)]
        common = [f"protocol={protocol}", *small, f"detector_weights={videomae}", f"root={tmp_path}", f"name={name}"]
        return main(["evaluate", *common, *words])

    return go


@pytest.fixture
def read(tmp_path):
    return lambda name="out": json.loads((tmp_path / name / "evaluation.json").read_text())


@pytest.fixture(scope="session")
def videos(tmp_path_factory) -> Path:
    """A folder of seven videos of 6 frames."""
    folder = tmp_path_factory.mktemp("videos")
    for n in range(7):
        write_video(Shapes("val", frames=6, height=32, width=32, seed=4)[n]["video"], folder / f"ball_{n:03d}.mp4", 12)
    return folder


@pytest.mark.parametrize("key", ["videos", "real"])
def test_the_report_and_the_clips_keep_apart(evaluate, videos, tmp_path, capsys, key):
    """Clips in the evaluation's folder would be replaced by the report's, and those would be scored as clips."""
    other = {"videos": "real", "real": "videos"}[key]
    for place in (tmp_path / "out" / "clips", tmp_path / "out", tmp_path):
        shutil.copytree(videos, place, dirs_exist_ok=True)
        before = sorted(tmp_path.rglob("*.mp4"))
        assert evaluate(f"{key}={place}", f"{other}={videos}", protocol="folder") == 1
        assert f"{key}={place} and the evaluation's folder" in capsys.readouterr().err
        assert sorted(tmp_path.rglob("*.mp4")) == before


def test_a_length_that_cannot_be_made_is_told_before_the_real_clips_are_scored(evaluate, pair, capsys):
    words = ["protocol.frames=9", "overlap=5"]
    assert evaluate(f"ckpt={pair.generator}", *words, without={"protocol.frames=4"}) == 1
    assert "overlap=5" in capsys.readouterr().err and not (cache_folder() / "real").exists()


def test_a_tokenizer(evaluate, read, pair, tmp_path, capsys):
    assert evaluate(f"ckpt={pair.tokenizer}", "metrics=[frechet,psnr,ssim,captions]") == 0
    result = read()
    metrics, protocol = result["metrics"], result["protocol"]
    assert set(metrics) == {"rfvd", "psnr", "ssim", "caption_accuracy", "caption_accuracy_of_real"}
    assert len(metrics["rfvd"]["folds"]) == 2 and metrics["rfvd"]["spread"] > 0 and metrics["rfvd"]["value"] > 0
    assert len(metrics["psnr"]["by_frame"]) == len(metrics["ssim"]["by_frame"]) == 4
    assert 5 < metrics["psnr"]["value"] < 40 and {"first_frame", "later_frames"} <= set(metrics["psnr"])
    drift = metrics["caption_accuracy"]["by_frame"]
    assert set(drift) == {"colour", "shape", "background"} and all(len(values) == 4 for values in drift.values())
    assert metrics["caption_accuracy_of_real"]["colour"] == metrics["caption_accuracy_of_real"]["background"] == 1
    assert result["of"]["kind"] == "tokenizer" and len(protocol["detector"]["sha256"]) == 64
    folder = tmp_path / "out"
    assert {p.name for p in folder.iterdir()} == {"config", "evaluation.json", "contact_sheet.png", "report.html", "clips"}
    assert len(list((folder / "clips").glob("*.mp4"))) == 6
    page = (folder / "report.html").read_text()
    assert page.count("<video") == 6 and page.count("<polyline") == 8 and protocol["hash"] in page
    printed = capsys.readouterr().out
    assert printed.count(f"[shapes@{protocol['hash']}]") == 5 and f"protocol shapes@{protocol['hash']}: 6 against" in printed


def test_a_curve_that_falls_is_not_said_to_rise(tmp_path):
    metric = {"value": 24.0, "spread": None, "by_frame": [30.0, 20.0, 22.0]}
    write_page(tmp_path, "title", [], [], [], curves({"metrics": {"psnr": metric}}))
    assert "PSNR, first frame to last; lowest 20.00, highest 30.00" in (tmp_path / "report.html").read_text()


def test_a_single_frame_has_no_curve():
    assert curves({"metrics": {"psnr": {"value": 24.0, "spread": None, "by_frame": [24.0]}}}) == []


def test_samples_of_a_tokenizer_are_said_to_be_unused(evaluate, read, pair, capsys):
    assert evaluate(f"ckpt={pair.tokenizer}", "metrics=[psnr]", "protocol.samples=9") == 0
    assert "protocol.samples=9 is not used" in capsys.readouterr().out and read()["protocol"]["samples"] == 6
    assert evaluate(f"ckpt={pair.tokenizer}", "metrics=[psnr]", "protocol.samples=null") == 0
    assert "is not used" not in capsys.readouterr().out


def test_a_generator(evaluate, read, pair, tmp_path):
    assert evaluate(f"ckpt={pair.generator}") == 0
    result = read()
    assert set(result["metrics"]) == {"fvd", "caption_accuracy", "caption_accuracy_of_real"}
    assert result["of"]["guidance"]["kind"] == "constant" and result["of"]["temperature"] == 0.7
    assert evaluate(f"ckpt={pair.generator}", "temperature=1.5", name="hot") == 0
    assert read("hot")["metrics"]["fvd"]["value"] != result["metrics"]["fvd"]["value"]
    assert read("hot")["protocol"] == result["protocol"]


@pytest.mark.parametrize("kind", ["tokenizer", "generator"])
@pytest.mark.parametrize("change", ["nothing", "batch_size=1", "batch_size=4", "workers=2"])
def test_the_same_command_gives_the_same_number(evaluate, read, pair, kind, change):
    words = [f"ckpt={getattr(pair, kind)}", "protocol.folds=1", *(["metrics=[frechet,psnr,ssim]"] * (kind == "tokenizer"))]
    assert evaluate(*words, name="first") == 0
    assert evaluate(*words, *([change] if "=" in change else []), name="second") == 0
    first, second = read("first"), read("second")
    assert run.result_lines(first) == run.result_lines(second)
    if "batch_size" not in change:  # else the digits that are not printed may differ, by the machine
        assert first == second


@pytest.mark.parametrize(("half", "told"), [(1105.0, False), (1107.0, True), (1250.0, True), (None, False)])
def test_a_distance_that_still_falls_with_the_number_of_clips_says_so(half, told):
    at = {"N/2": half, "N": 1053.0} if half else {"N": 1053.0}
    found = details("fvd", {"value": 1053.0, "at": at, "folds": [1053.0], "spread": None})
    assert ("more clips" in found) == told and ("at N/2 clips" in found) == bool(half)


def test_samples_that_were_told_a_class_are_not_asked_for_more(evaluate, pair, tmp_path, capsys):
    assert fit_generator(tmp_path, "condition.kind=class", "recipe.generator.steps=1", tokenizer=pair.tokenizer) == 0
    given = f"ckpt={tmp_path / 'generator' / 'checkpoints' / 'last.ckpt'}"
    assert evaluate(given, "protocol.folds=1", "overwrite=true") == 0
    assert "FVD" in (told := capsys.readouterr().out) and "caption accuracy" not in told
    assert evaluate(given, "metrics=[captions]") == 1
    assert main(["validate", given, f"root={tmp_path}", "name=v", "clips=2"]) == 0
    assert "caption_accuracy" not in json.loads((tmp_path / "v" / "metrics.json").read_text())


def test_each_fold_has_samples_of_its_own(evaluate, pair, monkeypatch):
    seeds = []
    sample = Samples.sample

    def noted(self, prompts, given):
        seeds.append(given)
        return sample(self, prompts, given)

    monkeypatch.setattr(Samples, "sample", noted)
    folds = ["protocol.folds=2", "protocol.samples=4", "protocol.real.clips=4", "metrics=[captions]"]
    assert evaluate(f"ckpt={pair.generator}", *folds) == 0
    assert len({seed for given in seeds for seed in given}) == 8, "those on the contact sheet are drawn twice"


@pytest.mark.parametrize("kind", ["tokenizer", "generator"])
def test_an_interrupted_run_goes_on(evaluate, read, pair, kind, monkeypatch, tmp_path):
    """A run stopped in the second fold does not repeat the first, and gives the result of an uninterrupted run."""
    words = [f"ckpt={getattr(pair, kind)}", "batch_size=2", *(["metrics=[frechet,psnr,ssim]"] * (kind == "tokenizer"))]
    assert evaluate(*words, name="whole") == 0
    candidate = Reconstructions if kind == "tokenizer" else Samples
    made, make = [], candidate.make

    def stopped(self, batch):
        if len(made) == 4:
            raise RuntimeError("power cut")
        made.append(batch)
        return make(self, batch)

    monkeypatch.setattr(run, "SAVE_EVERY", 0)
    monkeypatch.setattr(candidate, "make", stopped)
    assert evaluate(*words) == 1
    assert not (tmp_path / "out" / "evaluation.json").exists()
    counted = []
    monkeypatch.setattr(candidate, "make", lambda self, batch: counted.append(batch) or make(self, batch))
    assert evaluate(*words) == 0
    assert len(counted) == 2 + 3  # two batches left of six, and the three clips shown
    assert read() == read("whole")


def test_a_state_of_another_run_is_not_used(evaluate, read, pair, monkeypatch):
    make = Samples.make

    def stopped(self, batch):
        if 4 in batch["n"]:
            raise RuntimeError("power cut")
        return make(self, batch)

    monkeypatch.setattr(run, "SAVE_EVERY", 0)
    monkeypatch.setattr(Samples, "make", stopped)
    assert evaluate(f"ckpt={pair.generator}", "batch_size=2") == 1
    monkeypatch.setattr(Samples, "make", make)
    assert evaluate(f"ckpt={pair.generator}", "batch_size=2", "temperature=0") == 0
    assert evaluate(f"ckpt={pair.generator}", "batch_size=2", "temperature=0", name="clean") == 0
    assert read() == read("clean")


def test_real_clips_are_read_once(evaluate, videos, monkeypatch):
    words = ["protocol.folds=1", f"real={videos}", f"videos={videos}"]
    assert evaluate(*words, protocol="weizmann") == 0
    adds = []
    monkeypatch.setattr(run.RealClips, "make", lambda self, batch: adds.append(batch))
    assert evaluate(*words, "protocol.seed=3", protocol="weizmann", name="again") == 0
    assert adds == []
    monkeypatch.setattr(run, "computed_by", lambda: {"kit": "of another version, which may decode otherwise"})
    assert evaluate(*words, "protocol.seed=3", protocol="weizmann", name="later") == 1
    assert len(adds) == 1, "the real clips are read again, which are not made here"


def test_videos_against_videos(evaluate, read, videos, tmp_path):
    assert evaluate(f"real={videos}", f"videos={videos}", "protocol.real.start=first", protocol="folder") == 0
    result = read()
    assert set(result["metrics"]) == {"fvd"} and abs(result["metrics"]["fvd"]["value"]) < 1e-6
    assert result["of"]["kind"] == "videos" and result["metrics"]["fvd"]["spread"] is None


def test_held_out_clips_that_training_may_have_seen_are_told(evaluate, videos, pair, capsys):
    words = [f"ckpt={pair.tokenizer}", "metrics=[psnr]", "protocol.folds=1"]  # trained on shapes
    assert evaluate(*words) == 0
    assert "may have learned" not in capsys.readouterr().out
    few = ["protocol.real.split=val", "protocol.real.val_every=3", "protocol.real.clips=2"]
    assert evaluate(*words, *few, f"real={videos}", protocol="folder", name="other") == 0
    assert (
        "others than were held out of the tokenizer's training: some of them it may have learned" in capsys.readouterr().out
    )


def test_videos_slower_than_the_protocol_are_told(evaluate, videos, capsys):
    for fps, told in ((24, True), (12, False)):
        assert evaluate(f"videos={videos}", f"protocol.fps={fps}", "protocol.folds=1", "overwrite=true") == 0
        note = "the given videos have 12 frames per second, the protocol 24: frames are taken twice"
        assert (note in capsys.readouterr().out) == told
        both = [f"real={videos}", f"videos={videos}", f"protocol.fps={fps}", "overwrite=true"]
        assert evaluate(*both, protocol="folder", name="folder") == 0
        assert (note.replace("given", "real") in capsys.readouterr().out) == told


def test_more_folds_than_the_videos_allow_are_told(evaluate, videos, capsys):
    assert evaluate(f"real={videos}", f"videos={videos}", "protocol.folds=5", "protocol.samples=null", protocol="folder") == 1
    assert "protocol.folds=5 of 7 videos have no two each; say fewer" in capsys.readouterr().err


def test_given_reconstructions_in_pairs(evaluate, read, videos, tmp_path):
    """Copies of the real videos have no error; with two of them swapped they have."""
    copies = Path(shutil.copytree(videos, tmp_path / "copies"))
    words = [f"real={videos}", "paired=true", "protocol.real.start=first", "protocol.real.clips=7", "protocol.samples=7"]
    measured = "metrics=[frechet,psnr,ssim]"
    assert evaluate(*words, measured, f"videos={copies}", protocol="folder") == 0
    metrics = read()["metrics"]
    assert metrics["psnr"]["value"] == 100 and metrics["ssim"]["value"] == pytest.approx(1)
    (copies / "ball_000.mp4").rename(copies / "swap")
    (copies / "ball_001.mp4").rename(copies / "ball_000.mp4")
    (copies / "swap").rename(copies / "ball_001.mp4")
    assert evaluate(*words, measured, f"videos={copies}", protocol="folder", name="swapped") == 0
    assert read("swapped")["metrics"]["psnr"]["value"] < 90


def test_lpips_is_labelled_by_its_kind(evaluate, read, pair, shared):
    weights = shared / "weights" / "stlpips_vgg_fp16.pt"
    words = [f"lpips_weights={weights}", "protocol.perceptual.kind=st-lpips", "protocol.perceptual.sha256=null"]
    assert evaluate(f"ckpt={pair.tokenizer}", *words, "metrics=[lpips]", "protocol.folds=1") == 0
    result = read()
    assert result["metrics"]["lpips"]["name"] == "ST-LPIPS (VGG16)" and 0 < result["metrics"]["lpips"]["value"] < 2
    assert result["protocol"]["perceptual"]["kind"] == "st-lpips" and len(result["protocol"]["perceptual"]["sha256"]) == 64


def test_crops_and_captions_are_part_of_the_protocol(evaluate, read, videos, tmp_path):
    """Captions added to the same files, or random crops, change the protocol's hash."""
    copies = Path(shutil.copytree(videos, tmp_path / "copies"))
    words = [f"real={copies}", f"videos={videos}"]
    assert evaluate(*words, protocol="folder", name="a") == 0
    rows = "".join(f"{path.name},a ball\n" for path in copies.glob("*.mp4"))
    (copies / "captions.csv").write_text(f"file,caption\n{rows}")
    assert evaluate(*words, protocol="folder", name="b") == 0
    assert evaluate(*words, "protocol.real.random_crop=true", protocol="folder", name="c") == 0
    assert len({read(name)["protocol"]["hash"] for name in "abc"}) == 3


def test_other_files_of_the_same_names_and_sizes_are_not_taken_from_the_cache(evaluate, read, tmp_path, videos):
    """Files that differ only in content, here in the last byte, have another fingerprint."""
    copies = Path(shutil.copytree(videos, tmp_path / "copies"))
    assert evaluate(f"real={copies}", f"videos={videos}", protocol="folder", name="a") == 0
    for path in copies.glob("*.mp4"):
        path.write_bytes(path.read_bytes()[:-1] + b"\0")
    assert evaluate(f"real={copies}", f"videos={videos}", protocol="folder", name="b") == 0
    assert read("a")["protocol"]["fingerprint"] != read("b")["protocol"]["fingerprint"]


def test_damaged_statistics_are_computed_again(evaluate, read, videos):
    words = [f"real={videos}", f"videos={videos}", "protocol.real.seed=77"]
    before = set((cache_folder() / "real").glob("*.pt"))
    assert evaluate(*words, protocol="folder", name="a") == 0
    (kept,) = set((cache_folder() / "real").glob("*.pt")) - before
    kept.write_bytes(kept.read_bytes()[:1000])
    assert evaluate(*words, protocol="folder", name="b") == 0
    assert read("a")["metrics"] == read("b")["metrics"]


def test_a_generator_of_classes(evaluate, read, pair, tmp_path, capsys):
    """Evaluates a class-conditional generator on UCF-101's layout; refuses data with other classes."""
    root = tmp_path / "UCF-101"
    for n in range(101):
        for group in (1, 2):
            name = f"Class{n:03d}/v_Class{n:03d}_g0{group}_c01.mp4"
            write_video(Shapes("val", 6, 32, 32)[n]["video"], root / name, 12)
    for kind, group in (("train", 1), ("test", 2)):
        lines = [f"Class{n:03d}/v_Class{n:03d}_g0{group}_c01.avi" for n in range(101)]
        (root / "ucfTrainTestlist").mkdir(exist_ok=True)
        (root / "ucfTrainTestlist" / f"{kind}list01.txt").write_text("\n".join(lines))
    data = ["data=ucf101", f"data.root={root}", "data.fps=12", "recipe.generator.steps=2", "recipe.generator.encoded_clips=0"]
    assert fit_generator(tmp_path, *data, "trainer.val_check_interval=2", tokenizer=pair.tokenizer, name="classes") == 0
    ckpt = tmp_path / "classes" / "checkpoints" / "last.ckpt"
    assert evaluate(f"ckpt={ckpt}", f"real={root}", "protocol.folds=2", protocol="ucf101_train10k") == 0
    result = read()
    assert set(result["metrics"]) == {"fvd"} and result["protocol"]["real"]["kind"] == "ucf101"
    assert "real" in (tmp_path / "out" / "report.html").read_text()
    assert evaluate(f"ckpt={ckpt}", "metrics=[captions]", name="other") == 1
    assert "this generator knows the classes Class000" in capsys.readouterr().err


def test_captions_with_words_that_were_never_trained_are_told(evaluate, pair, videos, tmp_path, capsys):
    shutil.copytree(videos, tmp_path / "captioned")
    rows = [f"ball_{n:03d}.mp4,a red zeppelin" for n in range(7)]
    (tmp_path / "captioned" / "captions.csv").write_text("\n".join(["file,caption", *rows]))
    assert evaluate(f"ckpt={pair.generator}", f"real={tmp_path / 'captioned'}", protocol="folder") == 0
    assert "note: never seen in training, so without a meaning: zeppelin\n" in capsys.readouterr().out


def test_captions_that_lie_elsewhere_and_classes_of_the_training_are_given(evaluate, read, pair, videos, tmp_path, capsys):
    """Else the samples would be for what folders are called."""
    for n, folder in enumerate("aabbbbb"):
        (tmp_path / "clips" / folder).mkdir(parents=True, exist_ok=True)
        shutil.copy(videos / f"ball_{n:03d}.mp4", tmp_path / "clips" / folder)
    rows = [f"ball_{n:03d}.mp4,a red ball over a {'field' if n else 'zeppelin'}" for n in range(7)]
    (tmp_path / "captions.csv").write_text("\n".join(["file,caption", *rows]))
    words = [f"ckpt={pair.generator}", f"real={tmp_path / 'clips'}"]
    assert evaluate(*words, protocol="folder") == 0
    said = capsys.readouterr().out
    assert "have no captions: samples are of their classes' names; a table elsewhere is given as real_captions=" in said
    assert evaluate(*words, f"real_captions={tmp_path / 'captions.csv'}", protocol="folder", name="captioned") == 0
    said = capsys.readouterr().out
    assert "have no captions" not in said and "never seen in training, so without a meaning: zeppelin" in said
    assert evaluate(*words, "real_label_from=none", protocol="folder", name="unlabelled") == 0
    assert "samples are of the empty prompt" in capsys.readouterr().out
    assert len({read(name)["protocol"]["hash"] for name in ("out", "captioned", "unlabelled")}) == 3
    (tmp_path / "captions.csv").write_text("\n".join(["file,caption", *rows[:6]]))
    held_out = ["protocol.real.split=val", "protocol.real.val_every=3", "protocol.real.clips=2", "protocol.samples=2"]
    with pytest.warns(UserWarning, match="captions.csv has no caption for 1 of 7 files, such as 'b/ball_006.mp4'"):
        assert (
            evaluate(*words, *held_out, f"real_captions={tmp_path / 'captions.csv'}", protocol="folder", name="held_out") == 0
        )


def test_what_lacks_its_weights_is_left_out_and_said(evaluate, read, pair, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    words = [f"ckpt={pair.tokenizer}", "protocol.folds=1", "protocol.detector.kind=i3d", "detector_weights=null"]
    assert evaluate(*words) == 0
    result, told = read(), capsys.readouterr().out
    assert set(result["left_out"]) == {"frechet", "lpips"} and "psnr" in result["metrics"]
    assert "frechet is left out: no I3D weights" in told and "python -m kit prepare i3d" in told
    assert evaluate(*words, "metrics=[frechet]") == 1
    assert "python -m kit prepare i3d" in capsys.readouterr().err
    assert evaluate(*words[:-1], "detector_weights=nowhere.safetensors") == 1, "weights that are given must be there"
    assert "no I3D weights at nowhere.safetensors" in capsys.readouterr().err


def test_results_side_by_side_if_they_may(evaluate, pair, tmp_path, capsys):
    words = [f"ckpt={pair.generator}", "metrics=[captions]"]
    assert evaluate(*words, name="a") == evaluate(*words, "temperature=0", name="b") == 0
    capsys.readouterr()
    assert main(["table", f"root={tmp_path}", f"results={tmp_path}/*/evaluation.json"]) == 0
    shown = capsys.readouterr().out
    assert evaluate(*words, "protocol.seed=9", name="c") == 0
    capsys.readouterr()
    assert shown.startswith("shapes@") and "| a | " in shown and "| b | " in shown
    assert main(["table", f"root={tmp_path}", f"results=[{tmp_path}/a/evaluation.json,{tmp_path}/c/evaluation.json]"]) == 1
    refused = capsys.readouterr().err
    assert "follow different protocols" in refused and "seed: 0, 9" in refused
    for words in ("5", "[a,null]"):
        assert main(["table", f"root={tmp_path}", f"results={words}"]) == 1
        assert "expected a path of evaluation.json, or several as [PATH,PATH]" in capsys.readouterr().err
    with pytest.raises(ValueError, match="no results to show"):
        side_by_side([])
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(ValueError, match="x.json is not a result of"):
        read_result(tmp_path / "x.json")
    with pytest.raises(FileNotFoundError, match="no result at"):
        read_result(tmp_path / "y.json")


def test_the_result_of_something_else_is_kept(evaluate, read, pair, tmp_path, capsys):
    words = [f"ckpt={pair.generator}", "metrics=[captions]", "protocol.folds=1"]
    assert evaluate(*words) == evaluate(*words) == 0  # the same again is no loss
    before = read()
    assert evaluate(*words, "temperature=0") == 1
    assert "is the result of another evaluation (temperature: 0.7, 0" in capsys.readouterr().err and read() == before
    assert evaluate(f"ckpt={pair.generator}", "metrics=[frechet]", "protocol.folds=1") == 1
    assert "metrics: captions, not measured" in capsys.readouterr().err
    assert evaluate(*words, "seed=5") == 1
    assert "(seed: 0, 5)" in capsys.readouterr().err
    other = torch.load(pair.generator, weights_only=True)
    del other["sha256"]
    other["ema"]["model.head.weight"] *= 2
    torch.save(other, tmp_path / "other.ckpt")  # of as many steps, on the same tokenizer
    assert evaluate(f"ckpt={tmp_path / 'other.ckpt'}", *words[1:]) == 1
    assert "is the result of another evaluation (hash: " in capsys.readouterr().err and read() == before
    assert evaluate(*words, "temperature=0", "overwrite=true") == 0
    assert read()["of"]["temperature"] == 0


def test_an_altered_protocol_is_found_out(evaluate, read, pair, tmp_path):
    assert evaluate(f"ckpt={pair.generator}", "metrics=[captions]") == 0
    path = tmp_path / "out" / "evaluation.json"
    path.write_text(path.read_text().replace('"samples": 6', '"samples": 10000'))
    with pytest.raises(ValueError, match="its protocol does not match its hash"):
        read_result(path)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "give ckpt=CHECKPOINT, of a tokenizer or a generator, or videos=DIR"),
        (["ckpt={generator}", "videos={videos}"], "give ckpt=CHECKPOINT"),
        (["ckpt={generator}", "real={videos}"], "draws its real clips, leave it out"),
        (["ckpt={generator}", "real_captions=captions.csv"], "real_captions=captions.csv: the protocol shapes draws its"),
        (["ckpt={generator}", "protocol.height=64"], "has height=64, the generator was trained with 32"),
        (["ckpt={generator}", "protocol.fps=8"], "has fps=8, the generator was trained with 12"),
        (["ckpt={generator}", "precision=int8"], "precision=int8; expected one of: float32, bfloat16"),
        (["ckpt={generator}", "metrics=[psnr]"], "psnr has nothing to measure here: it compares clips in pairs"),
        (["ckpt={generator}", "metrics=[fvd]"], "unknown metric 'fvd'; expected auto or some of [frechet,"),
        (["ckpt={generator}", "paired=true"], "paired=true is for videos=DIR"),
        (
            ["ckpt={tokenizer}", "guidance.first=3", "negative=x"],
            "guidance.first, negative: how a generator samples, which a",
        ),
        (["ckpt={tokenizer}", "tokenizer={tokenizer}"], "tokenizer: how a generator samples, which a tokenizer does not"),
        (
            ["protocol=folder", "videos={videos}", "real={videos}", "top_p=0.5"],
            "top_p: how a generator samples, which videos=",
        ),
        (["ckpt={generator}", "protocol.detector.sha256=0123"], "needs videomae weights with sha256 0123, found"),
        (["ckpt={generator}", "protocol.frames=5", "metrics=[frechet]"], "takes clips of 4 frames, the protocol has 5"),
        (["ckpt={generator}", "protocol.real.clips=null"], "say how many and how fast"),
        (["videos={videos}", "metrics=[captions]"], "captions has nothing to measure here: it reads what captions of"),
        (
            ["protocol=folder", "videos={videos}", "real="],
            "real= names no folder of videos. Is a variable of the shell unset?",
        ),
        (["protocol=folder", "videos=", "real={videos}"], "videos= names no folder of videos. Is a variable of the"),
        (["protocol=weizmann", "videos={videos}"], "needs real=DIR, the folder of real videos"),
        (["protocol=folder", "ckpt={generator}", "real={videos}", "protocol.real.clips=9"], "needs 9 real clips"),
        (["protocol=folder", "videos={videos}", "real={videos}", "protocol.samples=8"], "needs 8 videos for each of 1 folds"),
        (["protocol=folder", "videos={videos}", "real={videos}", "protocol.fps=2"], "is too short by"),
        (["protocol=folder", "videos={videos}", "real={videos}", "paired=true"], "say protocol.real.start=first"),
        (
            [
                "protocol=folder",
                "videos={videos}",
                "real={videos}",
                "paired=true",
                "protocol.real.start=first",
                "protocol.samples=7",
                "protocol.real.clips=7",
                "protocol.real.random_crop=true",
            ],
            "real.random_crop=false",
        ),
        (["ckpt={tokenizer}", "protocol.height=48", "protocol.width=48"], "protocol.frames=4, protocol.height=48"),
        (["protocol=folder", "ckpt={tokenizer}", "real={videos}", "protocol.folds=2"], "would score the same recons"),
        (["ckpt={generator}", "prompts={videos}"], "prompts= and results= are for prompt suites"),
        (["protocol=vbench", "ckpt={generator}", "real={videos}"], "it takes no videos=, real=, paired= or metrics="),
        (["protocol=ucf101_paper", "videos={videos}", "real={videos}"], "videos of 1 classes, UCF-101 has 101"),
    ],
)
def test_bad_input_is_explained(evaluate, pair, videos, capsys, tmp_path, words, expected):
    words = [word.format(generator=pair.generator, tokenizer=pair.tokenizer, videos=videos) for word in words]
    unfit = {*SMALL[:5]} if "protocol=vbench" in words else set()  # a suite has none of these
    assert evaluate(*words, without=unfit) == 1
    error = capsys.readouterr().err
    assert expected in error and "Traceback" not in error
    assert not (tmp_path / "out" / "evaluation.json").exists()


@pytest.mark.parametrize("workers", [0, 1])
def test_bad_files_are_named(evaluate, videos, tmp_path, capsys, workers):
    given = Path(shutil.copytree(videos, tmp_path / "given"))
    words = [f"real={videos}", f"videos={given}", f"workers={workers}", "protocol.samples=7"]
    write_video(torch.zeros(3, 6, 48, 48), given / "ball_003.mp4", 12)
    assert evaluate(*words, protocol="folder") == 1
    assert "videos of mixed sizes: " in (error := capsys.readouterr().err) and "48 x 48" in error
    (given / "ball_003.mp4").write_bytes(b"no video")
    assert evaluate(*words, protocol="folder") == 1
    assert "cannot read the video" in (error := capsys.readouterr().err) and "ball_003.mp4" in error
    write_video(torch.zeros(3, 2, 32, 32), given / "ball_003.mp4", 12)
    assert evaluate(*words, protocol="folder") == 1
    assert "ball_003.mp4 is too short by 2 of the protocol's 4 frames" in capsys.readouterr().err


def test_broken_models_and_weights_are_found_out(evaluate, pair, shared, capsys, tmp_path, videomae, monkeypatch):
    nan = Path(shutil.copytree(videomae, tmp_path / "nan"))
    from safetensors.torch import load_file, save_file

    save_file({n: w * float("nan") for n, w in load_file(nan / "model.safetensors").items()}, nan / "model.safetensors")
    assert evaluate(f"ckpt={pair.generator}", f"detector_weights={nan}") == 1
    assert "shapes val 0: features are not finite" in capsys.readouterr().err
    broken = tmp_path / "broken.safetensors"
    weights = torch.load(shared / "weights" / "stlpips_vgg_fp16.pt", weights_only=True)
    save_file({n: (w * float("nan")).contiguous() for n, w in weights.items()}, broken)
    st = ["protocol.perceptual.kind=st-lpips", "protocol.perceptual.sha256=null", f"lpips_weights={broken}"]
    assert evaluate(f"ckpt={pair.tokenizer}", "metrics=[lpips]", *st) == 1
    assert "shapes val 0: LPIPS is not finite: look at the weights" in capsys.readouterr().err
    monkeypatch.setattr(Samples, "make", lambda self, batch: torch.full((len(batch["n"]), 3, 4, 32, 32), float("nan")))
    assert evaluate(f"ckpt={pair.generator}") == 1
    assert "the sample for shapes val 0 holds NaN or infinite pixels" in capsys.readouterr().err


def test_clips_are_chosen_alike_each_time():
    files = [f"{n}.mp4" for n in range(5)]
    first = choose(files, 12, "random", True, 3, 0)
    assert first == choose(files, 12, "random", True, 3, 0) != choose(files, 12, "random", True, 3, 1)
    assert sorted(choice.file for choice in first[:5]) == sorted(choice.file for choice in first[5:10]) == files
    assert first != choose(files, 12, "random", True, 4, 0)
    assert len({choice.start for choice in first}) == 12 and all(0 <= choice.top < 1 for choice in first)
    assert all(len({choice.start, choice.top, choice.left}) == 3 for choice in first), "each is a draw of its own"
    middle = choose(files, 5, "middle", False, 3, 0)
    assert {(c.start, c.top, c.left) for c in middle} == {(0.5, 0.5, 0.5)} and sorted(c.file for c in middle) == files


def test_each_fold_has_given_videos_of_its_own():
    source = SimpleNamespace(files=[f"{n}.mp4" for n in range(7)])
    protocol = SimpleNamespace(samples=3, folds=2, real=SimpleNamespace(seed=0))
    first, second = ({choice.file for choice in given_clips(protocol, source, fold).choices} for fold in (0, 1))
    assert len(first) == len(second) == 3 and not first & second


def test_videos_of_all_folds_are_of_one_size(evaluate, videos, tmp_path, capsys):
    """A fold in which all have another size than in the first."""
    given, second = tmp_path / "given", choose([f"{n}.mp4" for n in range(4)], 4, "first", False, 0, 0)[2:]
    for n in range(4):
        side = 48 if f"{n}.mp4" in [choice.file for choice in second] else 32
        write_video(torch.zeros(3, 6, side, side), given / f"{n}.mp4", 12)
    words = [f"real={videos}", f"videos={given}", "protocol.folds=2", "protocol.samples=2"]
    assert evaluate(*words, protocol="folder") == 1
    assert "videos of mixed sizes: " in (error := capsys.readouterr().err) and "48 x 48" in error


def test_a_pair_has_the_error_of_either():
    good, bad = {"video": 1}, {"error": "unreadable"}
    assert [Together([a], [b])[0] for a, b in ((good, bad), (bad, good))] == [bad, bad]
    assert Together([good], [{"video": 2}])[0] == {"video": 1, "real": 2}


@pytest.mark.parametrize(
    "folders, names",
    [
        (["runs/a", "runs/b"], ["a", "b"]),
        (["x/out/a", "y/out/a", "y/out/b"], ["x/out/a", "y/out/a", "y/out/b"]),
        (["runs/x/a", "runs/y/a"], ["x/a", "y/a"]),
        (["a", "x/a"], ["a", "x/a"]),
        (["runs/a", "runs/a"], ["a", "a"]),
    ],
)
def test_results_of_folders_of_one_name_are_told_apart(folders, names):
    assert told_apart(list(map(Path, folders))) == names


def test_a_suite_and_its_results(pair, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("kit.evaluation.run_suite.SHOWN", 1)
    (tmp_path / "prompts.txt").write_text("a red ball moving right over a green field\na blue ring\n")
    words = ["evaluate", "protocol=vbench", f"root={tmp_path}", "name=suite"]
    assert main([*words, f"ckpt={pair.generator}", f"prompts={tmp_path / 'prompts.txt'}", "protocol.samples=2"]) == 0
    folder = tmp_path / "suite"
    assert sorted(p.name for p in (folder / "videos").iterdir()) == [
        "a blue ring-0.mp4", "a blue ring-1.mp4",
        "a red ball moving right over a green field-0.mp4", "a red ball moving right over a green field-1.mp4",
    ]  # fmt: skip
    assert (folder / "contact_sheet.png").is_file() and (folder / "report.html").read_text().count("<video") == 1
    printed = capsys.readouterr().out
    assert f"vbench evaluate --videos_path {folder / 'videos'}" in printed
    assert "contact_sheet.png, report.html; the last two show the first 1 of 2 prompts" in printed

    of_blue = [{"video_path": f"/elsewhere/videos/a blue ring-{n}.mp4", "video_results": 0.9} for n in range(2)]
    (tmp_path / "x_eval_results.json").write_text(json.dumps({"color": [0.9, of_blue], "scene": [0.5, []]}))
    assert main([*words, f"results={tmp_path / 'x_eval_results.json'}"]) == 0
    printed = capsys.readouterr().out
    assert "| color | 90.00 | 90.73 |" in printed and "no results for subject_consistency" in printed
    result = json.loads((folder / "evaluation.json").read_text())
    assert result["raw"] == {"color": 0.9, "scene": 0.5} and result["protocol"]["hash"] in printed
    assert result["of"]["kind"] == "generator" and result["protocol"]["suite"] == "vbench" and "total" not in result["scores"]
    assert result["protocol"]["videos"] == 4, "with more videos of a prompt it is another protocol"
    foreign = tmp_path / "foreign_eval_results.json"
    foreign.write_text(json.dumps({"color": [0.9, [*of_blue, {"video_path": "a cat-0.mp4"}]]}))
    assert main([*words, f"results={foreign}"]) == 1
    assert "foreign_eval_results.json: color was measured on a cat-0.mp4, which is no video of" in capsys.readouterr().err
    assert main(["table", f"root={tmp_path}", f"results={folder / 'evaluation.json'}"]) == 1
    assert "it is a prompt suite's, whose table is vbench.md beside it" in capsys.readouterr().err
    assert main([*words[:-1], "name=elsewhere", f"results={tmp_path / 'x_eval_results.json'}"]) == 1
    assert "has no suite.json" in capsys.readouterr().err
    assert main([*words, "protocol=prompts", f"results={tmp_path}"]) == 1
    assert "the protocol prompts has no such tool" in capsys.readouterr().err
    assert main([*words, f"ckpt={pair.generator}"]) == 1
    assert "needs ckpt=GENERATOR and prompts=FILE" in capsys.readouterr().err


def test_file_clips_say_what_they_are(tmp_path):
    from kit.data.clips import FolderClips

    for name in ("ball_001.mp4", "ball_002.mp4"):
        write_video(torch.zeros(3, 6, 32, 48), tmp_path / name, 12)
    source = FolderClips(tmp_path, "all", frames=4, height=16, width=24)
    item = FileClips(source, choose(["ball_002.mp4"], 1, "first", False, 0, 0))[0]
    assert item["video"].shape == (3, 4, 16, 24) and item["size"] == "32 x 48" and item["name"] == "ball_002.mp4"
