"""Prompt suites: made, interrupted, resumed and refused."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import av
import pytest
import torch

import kit.media
from kit.checkpoint import load_generator
from kit.cli import main
from kit.data.shapes import Shapes
from kit.evaluation import suites
from kit.evaluation.run_suite import next_steps
from kit.evaluation.suites import (
    Prompt,
    read_prompts,
    video_name,
    video_table,
    write_suite,
)
from kit.files import file_sha256, read_json, sole_user
from kit.generator.guidance import Guidance
from kit.generator.sampler import Sampling
from kit.media import write_video
from kit.sampling import sample_videos, seed_of
from tests.fixtures import frames_of

PROMPTS = [Prompt("a cat", 2), Prompt("a dog, close-up", 3), Prompt("in/out", 2)]
SETTINGS = {"model": "0123456789abcdef", "guidance": {"kind": "constant", "first": 3.0}, "size": (16, 16)}
HOW = dict(seed=5, batch_size=3, fps=8)


def fake(prompts: list[str], seeds: list[int]) -> torch.Tensor:
    """Returns clips of noise, each drawn from its seed; the rest of the batch changes them too, as it may with bfloat16."""
    company = 0.1 * len(set(seeds))
    return torch.stack([torch.rand(3, 5, 16, 16, generator=torch.Generator().manual_seed(seed)) * company for seed in seeds])


class Counted:
    """`fake` that counts its calls and raises KeyboardInterrupt in call number `stop`."""

    def __init__(self, stop: int = 0):
        self.calls, self.stop = 0, stop

    def __call__(self, prompts, seeds):
        self.calls += 1
        if self.calls == self.stop:
            raise KeyboardInterrupt
        return fake(prompts, seeds)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def written(path: Path, value) -> Path:
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return path


def test_prompts_of_a_text_file(tmp_path):
    path = tmp_path / "suite.txt"
    path.write_bytes("\ufeffa café \r\n\n  \na dog\r\na café\nA dog".encode())
    assert read_prompts(path, 3, 3) == [Prompt("a café", 3), Prompt("a dog", 3), Prompt("A dog", 3)]


def test_prompts_of_vbench(tmp_path):
    """A prompt for temporal flickering needs more videos, also if another dimension lists it, first or last."""
    entries = [
        {"prompt_en": "a bird", "dimension": ["color"], "auxiliary_info": {"color": {"color": "red"}}},
        {"prompt_en": "alley ", "dimension": ["scene", "background_consistency"]},
        {"prompt_en": "a bowl", "dimension": ["temporal_flickering"]},
        {"prompt_en": "a bird", "dimension": ["temporal_flickering"]},
        {"prompt_en": "a bowl", "dimension": ["object_class"]},
    ]
    path = written(tmp_path / "VBench_full_info.json", entries)
    assert read_prompts(path, 5, 25) == [Prompt("a bird", 25), Prompt("alley ", 5), Prompt("a bowl", 25)]
    assert read_prompts(path, 1, 2) == [Prompt("a bird", 2), Prompt("alley ", 1), Prompt("a bowl", 2)]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.txt", b"\n \n", r"a.txt holds no prompt; write one a line"),
        ("a.txt", b"a cat\na dog\ncaf\xe9\n", r"a.txt, line 3: not UTF-8; save the file"),
        ("a.json", b"[]", r"a.json holds no prompt"),
        ("a.json", b'[\n{"prompt_en": "a"', r"a.json, line 2: not JSON \(.*; the file may be cut off"),
        ("a.json", b'{"prompt_en": "a", "dimension": []}', r"a.json holds a dict, expected a list of prompts"),
        ("a.json", b'[{"prompt_en": "a", "dimension": []}, {"prompt": "b"}]', r'a.json, entry 2: .* found {"prompt": "b"}'),
        ("a.json", b'[{"prompt_en": " ", "dimension": []}]', r"a.json, entry 1: expected {.prompt_en.: a text"),
        ("a.json", b'[{"prompt_en": "a", "dimension": "color"}]', r"a.json, entry 1: .*a list of names"),
        ("a.json", b'["a cat"]', r'a.json, entry 1: .* found "a cat"'),
    ],
)
def test_bad_prompt_files(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=message):
        read_prompts(tmp_path / name, 5, 25)


def test_missing_prompt_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no prompts at .*none.txt; give a text file, one prompt a line"):
        read_prompts(tmp_path / "none.txt", 5, 25)


def test_names_are_those_that_vbench_looks_for():
    """Uses two prompts of VBench's list."""
    ukiyo = "A beautiful coastal beach in spring, waves lapping on sand by Hokusai, in the style of Ukiyo"
    assert video_name(ukiyo, 0) == f"{ukiyo}-0.mp4"
    assert video_name("A 3D model of a 1800s victorian house.", 4) == "A 3D model of a 1800s victorian house.-4.mp4"


@pytest.mark.parametrize(
    "text", ["a cat", "..", ".", "-0", "é" * 124 + "x", "x" * 249, "a/b", "a\0b", "/", "é" * 125, "x" * 250, "日本" * 200]
)
def test_every_prompt_has_a_name_that_a_file_can_have(tmp_path, text):
    names = {video_name(text, index) for index in range(9)}
    assert len(names) == 9
    for name in names:
        assert write_video(torch.zeros(3, 1, 16, 16), tmp_path / name, 8).is_file()
    assert {path.name for path in tmp_path.iterdir()} == names


def test_replaced_names_can_be_read_and_told_apart():
    assert video_name("in/out", 3).startswith("in out ") and video_name("in/out", 3).endswith("-3.mp4")
    assert len({video_name(text, 0) for text in ("in/out", "in\0out", "in out", "x" * 300, "x" * 301)}) == 5


def test_prompts_that_share_a_file_are_refused():
    with pytest.raises(ValueError, match="'a cat' and 'a cat' share the file 'a cat-0.mp4'; leave one out"):
        video_table([Prompt("a cat", 1), Prompt("a cat", 1)], 0)


def test_a_seed_depends_on_its_place_only():
    few, many = video_table(PROMPTS, 5), video_table([Prompt(p.text, 9) for p in PROMPTS] + [Prompt("new", 1)], 5)
    assert few.items() <= many.items()
    assert len({row["seed"] for row in many.values()}) == len(many) == 28
    assert few["a dog, close-up-2.mp4"] == {"prompt": "a dog, close-up", "index": 2, "seed": seed_of(5, 1, 2)}
    assert not {row["seed"] for row in few.values()} & {row["seed"] for row in video_table(PROMPTS, 6).values()}


def test_a_suite_is_made_and_can_be_traced_back(tmp_path):
    videos = write_suite(fake, PROMPTS, tmp_path / "s", SETTINGS, **HOW)
    table = json.loads((tmp_path / "s" / "videos.json").read_text())
    hashes = {name: {"sha256": file_sha256(videos / name)} for name in table}
    assert table == {name: entry | hashes[name] for name, entry in video_table(PROMPTS, 5).items()}
    assert videos == tmp_path / "s" / "videos" and {path.name for path in videos.iterdir()} == set(table)
    assert all(frames_of(path) == 5 for path in videos.iterdir())
    suite = json.loads((tmp_path / "s" / "suite.json").read_text())
    assert suite["guidance"] == {"kind": "constant", "first": 3.0} and suite["seed"] == 5 and suite["fps"] == 8


@pytest.mark.parametrize("call", [1, 2, 3])
def test_an_interrupted_suite_goes_on_as_if_it_had_not_been(tmp_path, call):
    write_suite(fake, PROMPTS, tmp_path / "whole", SETTINGS, **HOW)
    with pytest.raises(KeyboardInterrupt):
        write_suite(Counted(call), PROMPTS, tmp_path / "parts", SETTINGS, **HOW)
    before = contents(tmp_path / "parts")
    assert sum(name.endswith(".mp4") for name in before) == 3 * (call - 1)
    rest = Counted()
    for _ in range(2):  # the second time nothing is left to do
        write_suite(rest, PROMPTS, tmp_path / "parts", SETTINGS, **HOW)
        assert contents(tmp_path / "parts") == contents(tmp_path / "whole")
    assert rest.calls == 4 - call


def test_a_batch_stopped_in_its_middle_or_damaged_later_is_completed_alike(tmp_path):
    whole = write_suite(fake, PROMPTS, tmp_path / "whole", SETTINGS, **HOW)
    parts = write_suite(fake, PROMPTS, tmp_path / "parts", SETTINGS, **HOW)
    kept = parts / "a cat-0.mp4"
    before = kept.stat().st_mtime_ns
    (parts / "a cat-1.mp4").unlink()
    (parts / "a dog, close-up-0.mp4").write_bytes((parts / "a dog, close-up-0.mp4").read_bytes()[:-9])
    (parts / ".123.part.mp4").write_bytes(b"what a killed run leaves")
    write_suite(fake, PROMPTS, tmp_path / "parts", SETTINGS, **HOW)
    assert contents(whole) == contents(parts) and kept.stat().st_mtime_ns == before


def test_more_videos_of_a_prompt_are_added(tmp_path):
    """VBench picks still videos; a model with much motion needs more to pick from."""
    few = contents(write_suite(fake, PROMPTS, tmp_path, SETTINGS, **HOW))
    more = contents(write_suite(fake, [Prompt(p.text, 4) for p in PROMPTS], tmp_path, SETTINGS, **HOW))
    assert few.items() <= more.items() and len(more) == 12
    write_suite(Counted(1), PROMPTS, tmp_path, SETTINGS, **HOW)
    assert set(json.loads((tmp_path / "videos.json").read_text())) == set(more)


def test_the_bar_counts_videos_already_there(tmp_path, monkeypatch):
    bars = []

    class Bar:
        def __init__(self, total, initial, **_):
            self.total, self.seen = total, [initial]
            bars.append(self)

        def __enter__(self):
            return self

        def __exit__(self, *_): ...

        def update(self):
            self.seen.append(self.seen[-1] + 1)

    monkeypatch.setattr(suites, "tqdm", Bar)
    with pytest.raises(KeyboardInterrupt):
        write_suite(Counted(2), PROMPTS, tmp_path, SETTINGS, **HOW)
    write_suite(fake, PROMPTS, tmp_path, SETTINGS, **HOW)
    assert [bar.total for bar in bars] == [7, 7]
    assert [bar.seen for bar in bars] == [[0, 1, 2, 3], [3, 4, 5, 6, 7]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"settings": SETTINGS | {"model": "fedcba"}}, r"model is '0123456789abcdef' in its suite.json, now 'fedcba'"),
        ({"settings": SETTINGS | {"temperature": 0.5}}, r"temperature is None in its suite.json, now 0.5"),
        ({"settings": {"model": SETTINGS["model"]}}, r"guidance is {'kind': .* now None; give another folder, or delete"),
        ({"seed": 6}, r"seed is 5 in its suite.json, now 6"),
        ({"fps": 16}, r"fps is 8 in its suite.json, now 16"),
        ({"prompts": PROMPTS[::-1]}, r"prompts is '[0-9a-f]{16}' in its suite.json, now '[0-9a-f]{16}'"),
    ],
)
def test_videos_of_another_suite_are_kept(tmp_path, change, message):
    write_suite(fake, PROMPTS, tmp_path, SETTINGS, **HOW)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=message):
        write_suite(fake, **dict(folder=tmp_path, prompts=PROMPTS, settings=SETTINGS, **HOW) | change)
    assert contents(tmp_path) == before


def test_a_suite_without_a_video_may_still_change(tmp_path):
    def interrupted(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_suite(interrupted, PROMPTS, tmp_path, SETTINGS, **HOW)
    write_suite(fake, PROMPTS[:1], tmp_path, {**SETTINGS, "temperature": 0.5}, **HOW)
    assert read_json(tmp_path / "suite.json")["temperature"] == 0.5
    assert {v["prompt"] for v in read_json(tmp_path / "videos.json").values()} == {PROMPTS[0].text}


def test_videos_of_prompts_that_begin_with_a_full_stop_count_too(tmp_path):
    """Such files are hidden ones."""
    prompts = [Prompt("... and then a cat", 1)]
    write_suite(fake, prompts, tmp_path, SETTINGS, **HOW)
    with pytest.raises(ValueError, match="temperature is None in its suite.json, now 0.5"):
        write_suite(fake, prompts, tmp_path, {**SETTINGS, "temperature": 0.5}, **HOW)


def test_videos_of_unknown_origin_are_kept(tmp_path):
    write_video(torch.zeros(3, 1, 16, 16), tmp_path / "videos" / "a cat-0.mp4", 8)
    with pytest.raises(ValueError, match="holds videos but no suite.json .*; give another folder"):
        write_suite(fake, PROMPTS, tmp_path, SETTINGS, **HOW)


def test_the_same_clip_gives_the_same_file(tmp_path):
    """With x264's macroblock tree ten runs gave several different files at this size."""
    clip = Shapes("val", frames=17)[3]["video"]
    assert len({write_video(clip, tmp_path / "a.mp4", 8).read_bytes() for _ in range(12)}) == 1


def test_no_half_written_video_has_its_final_name(tmp_path, monkeypatch):
    """It does not exist under its name while frames are written, nor after an error."""
    seen = []

    def from_ndarray(*args, **kwargs):
        seen.append({path.name for path in tmp_path.iterdir()})
        if len(seen) == 80:
            raise MemoryError
        return av.VideoFrame.from_ndarray(*args, **kwargs)

    monkeypatch.setattr(kit.media, "av", SimpleNamespace(open=av.open, VideoFrame=SimpleNamespace(from_ndarray=from_ndarray)))
    with pytest.raises(MemoryError):
        write_video(torch.zeros(3, 81, 16, 16), tmp_path / "a.mp4", 8)
    assert set.union(*seen) == seen[-1] and len(seen[-1]) == 1 and seen[-1].pop().endswith(".part.mp4")
    assert list(tmp_path.iterdir()) == []


def test_a_killed_suite_has_whole_videos_and_goes_on(tmp_path):
    noise = "lambda prompts, seeds: torch.rand(1, 3, 61, 128, 128, generator=torch.Generator().manual_seed(seeds[0]))"
    code = (
        "import torch\nfrom kit.evaluation.suites import Prompt, write_suite\n"
        f"write_suite({noise}, [Prompt('a', 60)], {str(tmp_path)!r}, {{}}, seed=0, batch_size=1, fps=8)"
    )
    videos = tmp_path / "videos"
    process = subprocess.Popen([sys.executable, "-c", code])
    try:
        while not ((videos / "a-0.mp4").exists() and list(videos.glob(".*.part.mp4"))):
            assert process.poll() is None
            time.sleep(0.001)
    finally:
        process.kill()
        process.wait()
    whole = {path.name: path.read_bytes() for path in videos.glob("a-*.mp4")}
    assert all(frames_of(videos / name) == 61 for name in whole)
    write_suite(eval(noise), [Prompt("a", len(whole) + 1)], tmp_path, {}, seed=0, batch_size=1, fps=8)
    after = contents(videos)
    assert whole.items() <= after.items() and len(after) == len(whole) + 1  # and what was cut off is gone


@pytest.mark.parametrize(
    "words, told",
    [
        (["precision=half"], "precision=half; expected one of: float32, bfloat16"),
        (["protocol.samples=1.5"], "protocol.samples=1.5; expected a whole number of 1 or more"),
        (["protocol.flickering_samples=null"], "protocol.flickering_samples=null; expected a whole number"),
        (["protocol.frames=0"], "protocol.frames=0; expected"),
        (["protocol.frames=6"], "1 + 4n"),
        (["protocol.frames=9", "overlap=5"], "overlap=5 leaves nothing to add to clips of 5 frames"),
        (["batch_size=0"], "batch_size=0; expected"),
        (["protocol.seed=-1"], "protocol.seed=-1; expected"),
    ],
)
def test_a_wrong_command_does_not_take_the_folder(pair, tmp_path, capsys, words, told):
    prompts = written(tmp_path / "suite.txt", "a red ball")
    run = ["evaluate", "protocol=prompts", f"prompts={prompts}", f"ckpt={pair.generator}", f"root={tmp_path}", "name=out"]
    assert main([*run, *words]) == 1 and told in capsys.readouterr().err
    assert not list(tmp_path.rglob("suite.json"))


def test_the_command_that_reads_results_back_looks_where_the_videos_are(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    told = shlex.split(next_steps(Path("my runs/suite/videos"), "my runs", "suite").splitlines()[-1])
    assert told[:4] == ["python", "-m", "kit", "evaluate"] and main(told[3:]) == 1
    assert "my runs/suite has no suite.json" in capsys.readouterr().err


def test_a_suite_tells_of_words_that_were_never_trained(pair, tmp_path, capsys):
    prompts = written(tmp_path / "suite.txt", "a red zeppelin")
    run = ["evaluate", "protocol=prompts", f"prompts={prompts}", f"ckpt={pair.generator}", f"root={tmp_path}", "name=out"]
    assert main([*run, "protocol.samples=1", "protocol.flickering_samples=1"]) == 0
    assert "never seen in training, so without a meaning: zeppelin" in capsys.readouterr().out
    with sole_user(tmp_path / "out"):
        assert main(run) == 1
    assert "another process is at work in" in capsys.readouterr().err


def test_a_suite_of_a_trained_pair(pair, tmp_path):
    generator, tokenizer = load_generator(pair.generator)
    guidance = Guidance("constant", 2.0)

    def sample(prompts: list[str], seeds: list[int]) -> torch.Tensor:
        return sample_videos(generator, tokenizer, prompts, seeds, (5, 32, 32), Sampling(guidance), "float32", len(prompts))

    captions = ["a red ball moving right over a green field", "a blue cube growing over a dark background", "up/down"]
    prompts = read_prompts(written(tmp_path / "suite.txt", "\n".join(captions)), 2, 2)
    settings = {"generator": generator.hash, "guidance": guidance.kind, "temperature": 1.0, "frames": 5}
    how = dict(seed=1, batch_size=4, fps=generator.clip["fps"])
    videos = write_suite(sample, prompts, tmp_path / "whole", settings, **how)
    assert sorted(video_name(text, index) for text in captions for index in (0, 1)) == sorted(contents(videos))
    assert all(frames_of(path) == 5 for path in videos.iterdir())

    def stopped(prompts, seeds):
        if len(seeds) < 4:
            raise KeyboardInterrupt
        return sample(prompts, seeds)

    with pytest.raises(KeyboardInterrupt):
        write_suite(stopped, prompts, tmp_path / "parts", settings, **how)
    write_suite(sample, prompts, tmp_path / "parts", settings, **how)
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")
