"""Stages whose clips come from other sources: of another class, another folder, in other shares."""

from __future__ import annotations

import re
from collections import Counter
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hydra.errors import InstantiationException

from kit.build import build_data, build_stages, condition_kind, of_stage, plan_of
from kit.checkpoint import read_checkpoint
from kit.data.clips import FolderClips
from kit.data.mixture import Mixture
from kit.data.shapes import Shapes
from kit.planning.doctor import problems, training_config
from kit.planning.plan import encodes, stages_of
from kit.stages import Stage
from kit.tokenizer import TokenizerConfig
from kit.values import plain
from tests.data.videos import shown, write
from tests.fixtures import CLIP, composed
from tests.test_stages import fit_stages
from tests.test_training import interrupt_after, losses

DRAWN = {"_target_": "kit.data.shapes.Shapes", "_partial_": True}
TINY = TokenizerConfig(bits=8, scales=(1, 2, 4), patch=4, widths=(8, 8))


def folder(path: Path) -> dict:
    return {"_target_": "kit.data.clips.FolderClips", "_partial_": True, "root": str(path)}


def staged(cfg, **data):
    return of_stage(cfg, Stage("a", 1, data=data)).data


def word(values: dict) -> str:
    """Writes a dictionary as hydra takes it."""
    return re.sub("[' ]", "", str(values)).replace("True", "true")


def mixture(*words: str):
    given = [f"+data.source.sources.{name}={word(DRAWN | {'seed': seed})}" for seed, name in enumerate("ab")]
    weights = [f"+data.source.weights.{name}=1" for name in "ab"]
    return composed("progressive", "data=mixture", *CLIP, *given, *weights, *words)


# --- what a stage sets -----------------------------------------------------------------------------------------------


def test_a_stage_changes_single_keys_of_its_source():
    cfg = composed("progressive")
    whole, data = plain(cfg.data), staged(cfg, source={"seed": 3}, frames=9)
    assert plain(data) == {**whole, "source": {**whole["source"], "seed": 3}, "frames": 9}
    assert plain(cfg.data) == whole, "of the stage alone"


def test_a_source_of_another_class_takes_the_place_of_the_one_before():
    given = folder("clips")
    assert plain(staged(composed("progressive"), source=given).source) == given
    again = staged(composed("progressive", "data=clips", "data.root=one"), source={"_target_": given["_target_"], "seed": 2})
    assert again.source.root == "one" and again.source.seed == 2, "the same class keeps its values"
    assert staged(composed("progressive", "data=clips", "data.root=one"), root="two").source.root == "two"


def test_a_stage_weighs_the_sources_of_a_mixture_and_adds_some():
    source = staged(mixture(), source={"weights": {"b": 0, "c": 2}, "sources": {"c": folder("clips"), "a": {"late": 0.5}}})
    source = plain(source.source)
    assert source["weights"] == {"a": 1, "b": 0, "c": 2} and source["sources"]["c"] == folder("clips")
    assert source["sources"]["a"] == {**DRAWN, "seed": 0, "late": 0.5} and source["sources"]["b"] == {**DRAWN, "seed": 1}


def test_what_a_stage_makes_of_other_values_is_made_of_its_own():
    values = "{frames:9,height:24,width:${.height},source:{seed:${data.frames}},val_clips:${stages.long.steps}}"
    cfg = composed("progressive", *CLIP, f"++stages.long.data={values}", "stages.low.data={height:16,width:${data.height}}")
    expected = {"frames": 9, "height": 24, "width": 24, "val_clips": cfg.stages.long.steps}
    for data in (stages_of(cfg)[-1][2], of_stage(cfg, plan_of(cfg).stages[-1]).data):
        assert {key: data[key] for key in expected} == expected and data["source"]["seed"] == 9
    assert stages_of(cfg)[0][2]["width"] == 16 != cfg.data.height


@pytest.mark.parametrize(
    "data, message",
    [({"hight": 16}, "stages.a.data has no hight; its keys are .*height"),
     ({"source": {"sed": 1}}, "stages.a.data.source has no sed; its keys are _target_, _partial_, seed"),
     ({"source": {"weights": {"a": 1}}}, "stages.a.data.source has no weights")],
)  # fmt: skip
def test_keys_that_the_data_lacks_are_told(data, message):
    with pytest.raises(ValueError, match=message):
        staged(composed("progressive"), **data)


# --- the clips that come of it ---------------------------------------------------------------------------------------


def parts_of(cfg, **stages):
    cfg.stages = {name: {"steps": 1, "data": data} for name, data in stages.items()}
    return build_stages(cfg, plan_of(cfg), TINY).parts


def test_folders_of_other_rates_follow_each_other(tmp_path):
    write(tmp_path / "slow" / "a.mp4", 12, 4), write(tmp_path / "fast" / "a.mp4", 40, 24)
    cfg = composed("progressive", "data=clips", f"data.root={tmp_path / 'slow'}", "data.fps=4", *CLIP)
    slow, fast, own = parts_of(cfg, slow={}, fast={"root": str(tmp_path / "fast"), "fps": 8}, own={"fps": 0})
    assert [part.fps for part in (slow, fast, own)] == [4, 8, 4] and slow.val.root != fast.val.root
    assert [set(torch.tensor(shown(part.val[0])).diff().tolist()) for part in (slow, fast)] == [{1}, {3}]


def test_a_source_that_is_built_too_early_is_told(tmp_path):
    write(tmp_path / "a.mp4", 9)
    source = {key: value for key, value in folder(tmp_path).items() if key != "_partial_"}
    with pytest.raises(InstantiationException, match="data.source is a FolderClips already, .* add _partial_: true"):
        parts_of(composed("progressive", *CLIP), filmed={"source": source})


def test_shares_of_a_mixture_change_from_stage_to_stage():
    both, first, second = parts_of(
        mixture(), both={}, first={"source": {"weights": {"b": 0}}}, second={"source": {"weights": {"a": 1, "b": 3}}}
    )
    assert Counter(both.train.turns.of(n)[0] for n in range(1000)) == {"a": 500, "b": 500}
    assert Counter(second.train.turns.of(n)[0] for n in range(1000)) == {"a": 250, "b": 750}
    for n in range(3):
        assert torch.equal(first.train[n]["video"], Shapes(seed=0, **first.clip)[n]["video"])
    assert first.settings["draws"] != both.settings["draws"], "which a run that goes on tells"


def test_data_without_a_source_are_told():
    """As of a config of one's own that names none."""
    with pytest.raises(ValueError, match="data.source is missing: what builds the clips"):
        build_data(composed("stage1_tokenizer", "data=_base"))


def test_a_source_that_is_left_out_gives_no_clips_but_its_classes(tmp_path):
    write(tmp_path / "jump" / "a.mp4", 9), write(tmp_path / "run" / "a.mp4", 9)
    shape = dict(frames=5, height=32, width=32, fps=8.0)
    sources = {"drawn": Shapes, "filmed": partial(FolderClips, tmp_path)}
    left, both = (Mixture(sources, {"drawn": 2, "filmed": weight}, **shape) for weight in (0, 2))
    assert left.classes == both.classes and {"jump", "ball"} < set(left.classes) and left.captioned
    alone = Mixture({"drawn": Shapes}, {"drawn": 1}, **shape)
    assert left.files == [] != both.files and left.turns.order == alone.turns.order
    item = left[0]
    assert left.classes[item["label"]] == alone.classes[alone[0]["label"]] and torch.equal(item["video"], alone[0]["video"])


# --- what clips are conditioned on -----------------------------------------------------------------------------------


def data(classes: tuple[str, ...] = (), captioned: bool = False) -> SimpleNamespace:
    return SimpleNamespace(classes=classes, captioned=captioned, about=" ".join(classes) or "clips")


def test_all_stages_decide_what_clips_are_conditioned_on(recwarn):
    run, jump, captions = data(("run",)), data(("jump",)), data(captioned=True)
    assert [condition_kind("auto", [part]) for part in (run, captions)] == ["class", "text"]
    assert condition_kind("auto", [run, run]) == "class" and condition_kind("text", [run, jump]) == "text"
    assert not recwarn.list
    assert condition_kind("auto", [run, captions]) == "text"
    assert "stages have captions, so of run the classes' names serve as captions" in str(recwarn.pop().message)
    assert condition_kind("auto", [data(), captions]) == "text"
    assert "of the stages' data clips: the clips have neither captions nor classes" in str(recwarn.pop().message)
    for kind, parts, told in (("auto", [run, jump], "run; jump"), ("class", [run, captions], "run; none")):
        with pytest.raises(ValueError, match=f"other classes: {told}; give condition.kind=text.* weight of 0"):
            condition_kind(kind, parts)


# --- trainings and their doctor --------------------------------------------------------------------------------------


def test_a_run_goes_on_across_a_change_of_sources(pair, tmp_path, monkeypatch, caplog):
    """Drawn clips, then a folder of another rate, then both: stopped before the second stage and resumed."""
    for i in range(3):
        write(tmp_path / "clips" / f"{i}.mp4", 12, 6)
        (tmp_path / "clips" / f"{i}.txt").write_text(f"clip {i}")
    filmed = folder(tmp_path / "clips") | {"patience": "null"}
    both = {"_target_": "kit.data.mixture.Mixture", "_partial_": True, "weights": {"a": 1, "b": 2},
            "sources": {"a": DRAWN, "b": filmed}}  # fmt: skip
    plan = ["+stages.drawn={steps:2}", f"+stages.filmed={{steps:2,data:{{fps:6,source:{word(filmed)}}}}}",
            f"+stages.both={{steps:2,data:{{source:{word(both)}}}}}", "callbacks.last.every=1"]  # fmt: skip
    assert fit_stages(tmp_path, pair.tokenizer, *plan, name="whole") == 0
    for told in ("shapes, captions; then ", "2 files to train on, 1 held out, captions; then mixture"):
        assert told in caplog.text
    interrupt_after(3, monkeypatch)
    assert fit_stages(tmp_path, pair.tokenizer, *plan) == 1
    monkeypatch.undo()
    assert fit_stages(tmp_path, pair.tokenizer, *plan, "ckpt=last") == 0
    assert "resumes with other data" not in caplog.text
    assert losses(tmp_path / "run", start=1) == losses(tmp_path / "whole")[2:]
    a, b = (read_checkpoint(tmp_path / run / "checkpoints" / "last.ckpt", "generator") for run in ("whole", "run"))
    assert all(torch.equal(a["ema"][key], b["ema"][key]) for key in a["ema"])
    encoded = {path.name for path in (tmp_path / "run").glob("encoded_clips*")}
    assert encoded == {f"encoded_clips_{stage}" for stage in ("drawn", "filmed", "both")}


def test_the_doctor_looks_at_the_data_of_each_stage(tmp_path):
    write(tmp_path / "clips" / "a.mp4")
    words = ["data=clips", f"data.root={tmp_path / 'clips'}", "data.source.patience=null"]
    cfg = training_config("progressive", [*words, "+stages.long.data.root=nowhere"])
    told = [problem for problem in problems(cfg) if problem.startswith("data of stage")]
    assert len(told) == 1 and re.match("data of stage long: .*nowhere", told[0])
    drawn = {**DRAWN, "seed": 4}
    *_, (_, _, last) = stages_of(training_config("progressive", [*words, f"+stages.long.data.source={word(drawn)}"]))
    assert last["source"] == drawn
    cached = {**last, "source": {"_target_": "kit.data.cache.open_cache"}}
    cfg = composed("progressive", "encoded_clips=0")
    assert [encodes(cfg, given) for given in (last, cached)] == [True, False]
    wrong = problems(training_config("progressive", ["+stages.long.data.source.sed=1"]))
    assert any("stages: stages.long.data.source has no sed" in problem for problem in wrong)
