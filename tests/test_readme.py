"""Every command of the README runs, in reduced form, in the order of the page."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from kit.build import build_data
from kit.cli import VERBS, main, split
from kit.data.shapes import Shapes
from kit.evaluation import detectors
from kit.evaluation.detectors import Detector
from kit.media import write_video
from kit.words import quoted
from tests.fixtures import CLIP, GENERATOR, INFINITY, QUICK, TOKENIZER, composed, infinity_file

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
CODE = "\n".join(re.findall(r"```\n(.*?)```", README, re.S))


def commands() -> list[list[str]]:
    """Returns the words of each `python -m kit` line, without comments."""
    lines = [line for line in CODE.splitlines() if line.startswith("python -m kit ")]
    return [shlex.split(line, comments=True)[3:] for line in lines]


def reduced(words: list[str], videos: Path) -> list[str]:
    """Reduces a command to small clips, few steps, and folders that exist."""
    words = [re.sub("^(data.root|real|videos)=DIR$", rf"\1={videos}", word) for word in words]
    small = [*CLIP, *TOKENIZER, *QUICK, *GENERATOR, "trainer.max_steps=2", "trainer.val_check_interval=2"]
    if words[0] == "fit" and "--help" not in words:
        words += [word for word in small if "stage0" not in words[1] or "data.frames" not in word]
    if "conf=progressive" in words:  # stages have steps of their own
        words = [*(word for word in words if word != "trainer.max_steps=2"), "stage_steps=1"]
    if "init=infinity" in words:  # as the file is
        words += [f"tokenizer.bits={INFINITY['bits']}", f"tokenizer.widths={list(INFINITY['widths'])}".replace(" ", "")]
        words += ["tokenizer.patch=1", "tokenizer.scales=[1,2,4,8]"]
    if words[0] == "cache":
        words += ["clips=8", "val_clips=4", *[word for word in CLIP if word.startswith("data.")]]
    if words[0] == "demo":
        words += ["clips=2", "overrides=[" + ",".join(f"'{word}'" for word in small) + "]"]
    if "check=paper_plan" in words:
        words += ["words=[generator.layers=1,stages.II.data.frames=5,stages.III.data.frames=9]"]
    if words[0] in ("validate", "inspect", "reconstruct"):
        words += ["clips=2"]
    if words[0] == "evaluate":
        words += ["protocol.real.clips=2", "protocol.samples=2", "protocol.height=32", "protocol.width=32"]
        words += ["protocol.frames=5", "metrics=[captions]"] if "protocol=shapes" in words else ["protocol.frames=9"]
    return words


def test_readme_commands_run(tmp_path, monkeypatch, capfd):
    videos = tmp_path / "videos"
    for n in range(6):
        write_video(
            Shapes(frames=9, height=32, width=32)[n]["video"], videos / f"{('jump', 'jumping_jack')[n % 2]}_{n}.mp4", 8
        )
    infinity_file(tmp_path / "infinity_vae_d32.pth")
    monkeypatch.chdir(tmp_path)
    found = commands()
    assert {words[0] for words in found} >= {"fit", "generate", "validate", "reconstruct", "inspect", "doctor", "evaluate"}
    offline = False
    for words in found:
        if offline and "videos=DIR" in words:
            continue  # it needs what could not be fetched
        status, said = main(reduced(words, videos)), capfd.readouterr().err
        if words[0] == "prepare" and "pip could not download" in said:
            offline = True
            continue
        assert status == 0, f"python -m kit {shlex.join(words)}\n{said[-2000:]}"


def test_make_targets_of_the_readme_exist():
    targets = re.findall(r"^make (\w+)", CODE, re.M)
    makefile = (ROOT / "Makefile").read_text()
    assert targets == ["demo", "test"]
    assert all(re.search(rf"^{target}:", makefile, re.M) for target in targets)
    assert "make test" in (ROOT / ".ci" / "run").read_text()


PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES)
def test_files_named_in_the_docs_exist(page):
    for name in re.findall(r"`((?:kit|conf|callbacks|notebooks|tests|docs)/[\w./]*)", (ROOT / page).read_text()):
        assert (ROOT / name.split(":")[0]).exists(), f"{page} names {name}"


def anchors(page: Path) -> set[str]:
    """Returns the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_of_the_docs_lead_somewhere(page):
    for link in re.findall(r"\]\((?!https?:)([^)]*)\)", (ROOT / page).read_text()):
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists() and (not anchor or anchor in anchors(target)), f"{page} links to {link}"


@pytest.mark.parametrize("page", PAGES)
def test_commands_of_the_docs_have_keys_that_there_are(page):
    """Their configs compose, with the first value of each key that a sweep varies."""
    blocks = re.findall(r"^```\n(.*?)^```", (ROOT / page).read_text(), re.S | re.M)
    text, found = "\n".join(blocks).replace("\\\n", " "), []
    for line in re.findall(r"^(?:[A-Z_]+=\S+ )*python -m kit (\w.*)", text, re.M):
        verb, *words = shlex.split(line, comments=True)
        conf, words = split([word for word in words if not word.startswith("-") and "=" in word])
        words = [quoted(re.sub(r"=([^\[{,]+),.*", r"=\1", word) if "prompt" not in word else word) for word in words]
        found.append(composed(conf or VERBS[verb].conf or "stage1_tokenizer", *words))  # the last: fit --help
    assert all(found) and len(found) >= text.count("\npython -m kit ") - text.count("\npython -m kit --help")


def test_what_extending_shows_works(pair, tmp_path, monkeypatch):
    """Its source gives clips, its config composes and gives the source, its callback and its calls from Python run."""
    text = (
        (ROOT / "docs" / "extending.md").read_text().replace("runs/demo/generator/checkpoints/last.ckpt", str(pair.generator))
    )
    source, callback, *calls = re.findall(r"^```python\n(.*?)^```", text, re.S | re.M)
    (tmp_path / "mine_of_extending.py").write_text(source)
    (tmp_path / "data").mkdir()
    config = re.search(r"^```yaml\n(.*?)^```", text, re.S | re.M)[1].replace(
        "mine.ArrayClips", "mine_of_extending.ArrayClips"
    )
    (tmp_path / "data" / "arrays.yaml").write_text(config)
    np.save(tmp_path / "clips.npy", np.zeros((10, 17, 20, 30, 3), np.uint8))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    cfg = composed("stage1_tokenizer", "data=arrays", f"hydra.searchpath=[file://{tmp_path}]", "data.workers=0")
    data = build_data(cfg)
    video = next(iter(data.val_dataloader()))["video"]
    assert video.shape[1:] == (3, 17, 64, 64) and (video == -1).all() and data.about == "arrayclips, captions"
    train = [data.train[n]["caption"] for n in range(16)]
    assert len(set(train[:8])) == 8 and train[:8] != train[8:]

    detector = Detector("fake", "", 2, 1, None, lambda pair: pair.flatten(2).mean(2)[:, :2])
    monkeypatch.setattr(detectors, "load_detector", lambda kind, path, frames: detector)
    names: dict = {}
    exec(callback, names)
    module = SimpleNamespace(loss={})
    names["Calmer"]().on_train_batch_start(SimpleNamespace(global_step=500), module, None, 0)
    assert module.loss == {"motion_weight": 0.05} and "motion_weight" in cfg.loss
    exec("\n".join(calls), names)
    assert names["coarse"].shape[1] == 1 and names["samples"].shape == (4, 3, 5, 32, 32)


def test_functions_named_in_the_paper_map_exist():
    for file, name in re.findall(r"`(kit/[\w/]+\.py):([\w.]+)`", (ROOT / "docs" / "paper_map.md").read_text()):
        assert re.search(rf"(def|class) {name.split('.')[-1]}\b|^{name} ", (ROOT / file).read_text(), re.M), (file, name)
