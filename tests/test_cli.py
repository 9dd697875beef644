"""The command line: help is complete, errors name the user's keys, and a refused command leaves nothing behind."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
import wandb
import yaml
from hydra.utils import instantiate
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch.utils.data import DataLoader, Dataset

from kit.build import build_trainer
from kit.cli import VERBS, explained, main
from kit.confs import confs
from kit.words import options_and_overrides, quoted
from tests.fixtures import composed, fit_generator, fit_tokenizer

ROOT = Path(__file__).resolve().parents[1]


def test_help_names_every_verb(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(re.search(rf"^  {verb} +\w", text, re.M) for verb in VERBS)


def test_runs_of_the_multirun_that_help_shows_have_folders_of_their_own(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main([]) == 2
    shown = next(line for line in capsys.readouterr().out.splitlines() if "--multirun" in line).partition("    ")[0]
    words, folders = [word.replace("key", "seed") for word in shlex.split(shown.replace("a,b", "1,2"))[5:]], []
    monkeypatch.setattr("kit.verbs.fit.fit", lambda cfg: folders.append(cfg.folder))
    assert main(["fit", "conf=stage1_tokenizer", *words]) == 0
    assert folders == ["runs/x1", "runs/x2"]


def test_help_of_fit_lists_what_can_be_trained(capsys):
    assert main(["fit", "--help"]) == 0
    text = capsys.readouterr().out
    found = [re.search(rf"^  {name} +(\w.*)", text, re.M) for name in confs()]
    assert all(found) and "--- conf/stage1_tokenizer.yaml" in text
    assert all(re.search(r"\.$|: python -m kit ", line[1]) for line in found), "each line is a whole sentence"


def test_help_of_a_conf_shows_the_groups_that_it_chooses(capsys):
    assert main(["fit", "conf=ucf101_generator", "--help"]) == 0
    text = capsys.readouterr().out
    for name, shown in (("size/L", True), ("size/tiny", False), ("data/clips", True), ("data/shapes", False)):
        assert (f"--- conf/{name}.yaml" in text) == shown
    assert "  size=4B|L|XL|base|small|tiny\n" in text and "  images@data.images=cached|folder\n" in text


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb_shows_each_key_with_its_comment(verb, capsys):
    assert main([verb, "--help"]) == 0
    text = capsys.readouterr().out
    assert VERBS[verb].help in text and "name:" in text and "seed: 0" in text


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["paint"], "unknown verb 'paint'; choose from fit"),
        (["fit"], "fit needs conf=NAME; choose from ablation, paper_plan, progressive, stage0_image_tokenizer"),
        (["fit", "conf=stage9"], "no conf named 'stage9'"),
        (["fit", "conf=generate"], "conf=generate is not for fit; choose from ablation"),
        (["generate", "conf=stage1_tokenizer"], "conf=stage1_tokenizer is not for generate"),
        (["fit", "conf=nowhere.yaml"], "conf=nowhere.yaml: no such file"),
        (["fit", "conf=generate.yaml"], "conf=generate.yaml: kit has a generate.yaml too; give yours another name"),
        (["fit", "conf=broken.yaml"], "broken.yaml is no config: expected keys"),
        (["fit", "conf=word.yaml"], "word.yaml is no config: expected keys, and defaults as a list"),
        (["fit", "conf=latin.yaml"], "latin.yaml is no YAML in UTF-8: 'utf-8' codec can't decode byte 0xe9 in position 9"),
        (["fit", "conf=bare.yaml"], "conf=bare.yaml is not for fit; choose from ablation"),
        (["generate", "conf=mine.yaml"], "conf=mine.yaml is not for generate"),
        (["fit", "conf=itself.yaml"], "itself.yaml is built on itself"),
    ],
)
def test_mistakes_name_the_choices(words, expected, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, text in (
        ("generate", ""),
        ("broken", "- a list"),
        ("word", "defaults: stage1_tokenizer"),
        ("bare", "seed: 3"),
        ("mine", "defaults: [stage1_tokenizer]"),
        ("itself", "defaults: [itself, _self_]"),
    ):
        (tmp_path / f"{name}.yaml").write_text(text)
    (tmp_path / "latin.yaml").write_bytes("name: caf\u00e9".encode("latin-1"))
    assert main(words) == 2
    assert expected in capsys.readouterr().err


def test_a_training_says_nothing_that_is_no_users_business(pair, tmp_path, caplog, recwarn):
    """Lightning's advertisement, and its warnings about what is intended, are suppressed."""
    assert fit_generator(tmp_path, "debug=smoke", tokenizer=pair.tokenizer) == 0
    assert "GPU available" in caplog.text and "litlogger" not in caplog.text
    assert "validation  none: trainer.val_check_interval=50 is after the end" in caplog.text
    assert not [str(w.message) for w in recwarn if "LeafSpec" in str(w.message) or "eval mode" in str(w.message)]


def test_validations_come_between_two_steps():
    """`best.ckpt` would else hold the gathered gradients of some of a step's batches, which resuming loses."""
    for words, interval in (
        ([], 250),
        (["trainer.accumulate_grad_batches=4"], 252),
        (["trainer.val_check_interval=8"], 8),
    ):
        assert build_trainer(composed("stage2_generator", *words)).val_check_interval == interval


def test_shapes_need_a_rate(tmp_path, capsys):
    assert main(["fit", "conf=stage1_tokenizer", "size=tiny", "data.fps=0", "name=x", f"root={tmp_path}"]) == 1
    assert "fps=0; shapes are drawn" in capsys.readouterr().err


def test_a_key_that_was_taken_out_is_told(tmp_path, capsys):
    assert main(["fit", "conf=stage1_tokenizer", "size=tiny", "~trainer.max_steps", f"root={tmp_path}"]) == 1
    error = capsys.readouterr().err
    assert "there is no trainer.max_steps, which kit reads; set it" in error and "Traceback" not in error


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("fits=16GB", "no fits=16GB; choose from 12GB, 24GB"),
        ("size=huge", "no size=huge; choose from 4B, L, XL, base, small, tiny"),
        ("method=maskd", "no method=maskd; choose from center, "),
        ("data=mine", "no data=mine; choose from cached, clips, mixture, "),
        ("data=null", "data=null; choose from cached, clips, mixture, "),
        ("zzz=1", "no key zzz; there are name, root, "),
        ("data.qqqqqqqq=1", "no key data.qqqqqqqq; data has images, "),
        ("data.heigth=64", "no key data.heigth; did you mean data.height?\n"),
        ("trainer.fast_dev_run=true", "; +trainer.fast_dev_run=... adds it"),
        ("seed", "Error parsing override 'seed': missing EQUAL at '<EOF>'; expected key=value"),
        ("seed=1,2", "To sweep over it, add --multirun"),
        ("tokenizer_ckpt=a${", "override tokenizer_ckpt='a${'; ${KEY} stands for the value of another key; to a path with"),
        ("hydra.zzz=1", "Could not override 'hydra.zzz'"),
        ("hydra/launcher=zzz", "Could not find 'hydra/launcher/zzz'"),
        ("~data.zzz", "Could not delete from config. 'data.zzz' does not exist."),
        ("loss=full", "stage2_generator has no group loss; --help lists its groups and keys"),
        ("rate=4x8x8", "stage2_generator has no group rate; --help lists its groups and keys"),
    ],
)
def test_words_that_do_not_compose_are_refused_in_a_few_words(word, said, capsys):
    assert main(["fit", "conf=stage2_generator", word, "--cfg", "job"]) == 1
    told = capsys.readouterr().err
    assert told.startswith("kit fit: ") and said in told and "HYDRA_FULL_ERROR" not in told


@pytest.mark.parametrize("key", ["recipe", "recipe.generator", "generator", "data.source", "condition", "optimizer"])
def test_values_that_are_taken_out_as_a_whole_are_told(key, tmp_path, capsys):
    assert main(["fit", "conf=stage2_generator", f"{key}=null", f"root={tmp_path}"]) == 1
    told = capsys.readouterr().err
    assert told.startswith(f"kit fit: {key}=null; kit reads what is in it: ") and "Traceback" not in told


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["generate", "ckpt=x", "data=clips", "size=tiny"], "generate has no group data; --help lists its groups and keys"),
        (["evaluate", "data=clips", "data.root=x"], "evaluate has no group data; --help lists its groups and keys"),
        (["fit", "conf=stage1_tokenizer", "method=paper"], "stage1_tokenizer has no group method; --help lists its groups"),
        (["doctor", "size=tiny"], "doctor has no group size; --help lists its groups and keys"),
        (["generate", "data=clips", "hydra.searchpath=[file:///x]"], "Could not override 'data'. No match in the defaults l"),
    ],
)
def test_a_group_that_a_verb_does_not_have_is_refused_in_a_few_words(words, said, capsys):
    """Hydra's advice, `+data=clips`, would add values that nothing reads."""
    assert main(words) == 1
    told = capsys.readouterr().err
    assert told.startswith(f"kit {words[0]}: {said}") and "Traceback" not in told and "+data" not in told


@pytest.mark.parametrize(("path", "said"), [("a${b}", "Interpolation key 'b' not found"), ("${b:c}", "Unsupported interp")])
def test_a_path_that_reads_as_the_value_of_another_key_is_told(path, said):
    with pytest.raises(OmegaConfBaseException) as caught:
        _ = composed("generate", quoted(f"ckpt={path}")).ckpt
    told = explained(caught.value, "generate")
    assert told.startswith(f"ckpt: {said}") and told.endswith("to a path with ${ in it give a link without")


def test_a_call_from_python_leaves_its_command_line_as_it_was(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["mine.py", "--own"])
    assert main(["fit", "conf=stage1_tokenizer", "--cfg", "job"]) == 0
    assert sys.argv == ["mine.py", "--own"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["generate", "ckpt=nowhere.ckpt", "prompt=x"], "no checkpoint at nowhere.ckpt"),
        (["generate", "ckpt=nowhere.ckpt", "label=one, two (three)", "image=a, b [1].png"], "no checkpoint at nowhere.ckpt"),
        (["fit", "conf=stage2_generator", "root=/nonexistent"], "no checkpoint at /nonexistent/stage1_tokenizer"),
        (["fit", "conf=stage1_tokenizer", "data=clips", "data.root=/nonexistent"], "/nonexistent"),
        (["fit", "conf=stage1_tokenizer", "data.frames=16"], "a clip must have 1 + 4n frames, got 16; use 13 or 17"),
        (["fit", "conf=stage1_tokenizer", "data.height=72", "data.width=72"], "shorter side must be at most 64"),
        (["fit", "conf=stage1_tokenizer", "optimizer.name=sgd"], "optimizer.name=sgd; expected one of: adamw, muon"),
        (["fit", "conf=stage1_tokenizer", "+optimizer.momentum=0.9"], "optimizer has no momentum; its keys are name, lr, "),
        (["fit", "conf=stage1_tokenizer", "+callbacks.mine=true"], "callbacks.mine has no _target_"),
        (["fit", "conf=stage1_tokenizer", "data.source._target_=builtins.dict"], "data.source makes a dict; derive it from "),
        (["fit", "conf=stage1_tokenizer", "+callbacks.mine.every=2"], "callbacks.mine has no _target_"),
        (["fit", "conf=stage1_tokenizer", "data.fps=abc"], "data.fps=abc; expected a number such as 12"),
        (["fit", "conf=stage1_tokenizer", "tokenizer.scales=1"], "tokenizer.scales=1; expected values such as [1, 2, 4, 8]"),
        (["fit", "conf=stage1_tokenizer", "data=clips"], "data.root is missing; give data.root=..."),
        (["validate"], "ckpt is missing; give ckpt=..."),
        (["fit", "conf=stage1_tokenizer", "name=???"], "name is missing; give name=..."),
        (["validate", "ckpt=x", "threads=-2"], "threads=-2; expected a number of threads, or null"),
        (["table", "results=x", "threads=all"], "threads=all; expected a number of threads, or null"),
        (["fit", "conf=stage1_tokenizer", "threads=1.5"], "threads=1.5; expected a number of threads, or null"),
        (["fit", "conf=stage1_tokenizer", "seed=1.5"], "seed=1.5; expected a whole number of 0 or more"),
        (
            ["fit", "conf=stage1_tokenizer", "+data.source.speed=3"],
            "Shapes.__init__() got an unexpected keyword argument 'speed'",
        ),
        (["fit", "conf=stage1_tokenizer", "callbacks.video_logger.clips=-1"], "callbacks.video_logger.clips=-1; expected a"),
        (["generate", "ckpt=x", "guidance=3"], "guidance=3; expected values such as {'kind': 'constant'"),
        (["fit", "conf=stage1_tokenizer", "init.ckpt=x.ckpt"], "init.ckpt=x.ckpt, but init=scratch takes none"),
        (["fit", "conf=stage1_tokenizer", "data.batch_size=0"], "data.batch_size=0; expected a whole number of 1 or more"),
        (["fit", "conf=stage1_tokenizer", "data.workers=2.5"], "data.workers=2.5; expected a whole number of 0 or more"),
        (["fit", "conf=stage1_tokenizer", "data.image_share=3"], "data.image_share=3; expected a number from 0 to 1"),
        (["fit", "conf=stage1_tokenizer", "optimizer.lr=-1"], "optimizer.lr=-1; expected a number of 0 or more"),
        (["fit", "conf=stage1_tokenizer", "optimizer.clip=0"], "optimizer.clip=0; expected a number above 0, or null"),
        (["fit", "conf=stage1_tokenizer", "optimizer.betas=[0.9,1]"], "optimizer.betas=[0.9, 1]; expected two numbers"),
        (["fit", "conf=stage1_tokenizer", "optimizer.accumulate=0"], "optimizer.accumulate=0; expected a whole number of 1"),
        (["fit", "conf=stage1_tokenizer", "loss.motion_weight=-1"], "loss.motion_weight=-1; expected a number of 0 or more"),
        (["fit", "conf=stage1_tokenizer", "loss.adversarial.start=1"], "loss.adversarial.start=1; expected a share of the"),
        (
            ["fit", "conf=stage1_tokenizer", "loss.adversarial.weight=1", "loss.adversarial.width=12"],
            "width=12; expected a m",
        ),
        (
            ["fit", "conf=stage1_tokenizer", "loss.adversarial.weight=1", "loss.adversarial.layers=0"],
            "layers=0; expected a w",
        ),
        (
            ["fit", "conf=stage1_tokenizer", "scale_dropout.last=1.5"],
            "scale_dropout={'last': 1.5, 'p': 0.0}; expected `last`",
        ),
        (["fit", "conf=progressive", "trainer.max_steps=9"], "trainer.max_steps counts nothing beside stages; give stages."),
        (["fit", "conf=progressive", "recipe.generator.steps=9"], "recipe.generator.steps counts nothing beside stages"),
    ],
)
def test_bad_input_is_told_without_a_traceback(words, expected, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 1
    error = capsys.readouterr().err
    assert expected in error and "Traceback" not in error


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["validate", "ckpt=x", "name="], "name= names no folder; a run lies in <root>/<name>. Is a variable of the shell"),
        (["fit", "conf=stage1_tokenizer", "name=null"], "name=null names no folder"),
        (["generate", "ckpt=x", "root="], "root= names no folder"),
        (["fit", "conf=nameless.yaml"], "name= names no folder"),
        (["fit", "conf=stage1_tokenizer", "-m", "name="], "name= names no folder"),
        (["fit", "conf=ablation", "-m", "root="], "root= names no folder"),
    ],
)
def test_a_run_without_a_name_is_refused_before_a_folder_is_made(words, expected, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nameless.yaml").write_text("defaults: [stage1_tokenizer, _self_]\nname: ''\n")
    assert main(words) == 1
    assert expected in capsys.readouterr().err and [path.name for path in tmp_path.iterdir()] == ["nameless.yaml"]


@pytest.mark.parametrize(
    "words, way",
    [
        ("fit conf=stage1_tokenizer", "fits=12GB"),
        ("validate ckpt=x", "a smaller batch_size"),
        ("cache", "a smaller data.height and data.width"),
    ],
)
def test_a_full_gpu_is_told_without_a_traceback(words, way, capsys, monkeypatch, tmp_path):
    """The way out is of keys that the verb has."""
    seen, verb = [], words.split()[0]

    def full(cfg):
        seen.append(cfg)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(f"{VERBS[verb].module}.{verb}", full)
    assert main(words.split()) == 1
    error = capsys.readouterr().err
    assert "CUDA out of memory" in error and way in error and "Traceback" not in error
    keys = re.findall(r"\w+(?:\.\w+)+|\w+_\w+", error.splitlines()[-2].replace("fits=12GB", ""))
    assert all(OmegaConf.select(seen[0], key, default="absent") != "absent" for key in keys)


def test_a_server_of_wandb_that_is_out_of_reach_is_told_without_a_traceback(capsys, monkeypatch, tmp_path):
    def lost(cfg):
        raise wandb.errors.CommError("no answer from api.wandb.ai")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("kit.verbs.fit.fit", lost)
    assert main(["fit", "conf=stage1_tokenizer", "logger=wandb"]) == 1
    error = capsys.readouterr().err
    assert "no answer from api.wandb.ai\nlogger.wandb.offline=true logs without" in error and "Traceback" not in error


def test_cfg_job_prints_the_composed_config(capsys):
    assert main(["fit", "conf=stage1_tokenizer", "seed=7", "--cfg", "job"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["seed"] == 7


def test_further_ranks_are_started_with_words_that_parse(monkeypatch, tmp_path):
    """Lightning starts further ranks as `python -m kit` with the sys.argv of the running verb."""
    seen = []
    monkeypatch.setattr("kit.verbs.fit.fit", lambda cfg: seen.append((list(sys.argv[1:]), cfg.seed, cfg.root)))
    root = f"{tmp_path}/it's a, b"
    words = ["fit", "conf=stage1_tokenizer", "seed=3"]
    assert main([*words, f"root={root}"]) == 0
    assert main(seen[0][0]) == 0
    assert seen[0] == seen[1] and seen[0][0][:3] == words and seen[0][1:] == (3, root)


def test_hydras_options_may_stand_anywhere(capsys):
    words = ["a=1", "--cfg", "job", "b=2", "-m"]
    assert options_and_overrides(words) == (["--cfg", "job", "-m"], ["a=1", "b=2"])
    assert main(["fit", "conf=stage1_tokenizer", "seed=3", "--cfg", "job", "name=x"]) == 0
    assert "seed: 3" in capsys.readouterr().out


def test_wandb_is_told_the_data_and_the_trainer(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")  # which the logger sets too
    monkeypatch.setattr(wandb, "init", lambda **values: SimpleNamespace(**values))
    logger = instantiate(composed("stage2_generator", "logger=wandb", "name=x", "data.batch_size=3").logger.wandb)
    told = logger.experiment
    assert told.config["data"]["batch_size"] == 3 and told.config["trainer"]["max_steps"] > 0 and told.id is None
    json.dumps(told.config)


@pytest.mark.parametrize("logger", ["csv", "tensorboard"])
def test_loggers(logger, tmp_path):
    """The log of TensorBoard has the pictures too."""
    if logger == "tensorboard":
        read = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    words = [f"logger={logger}", "recipe.tokenizer.steps=2", "trainer.val_check_interval=2"]
    assert fit_tokenizer(tmp_path, *words) == 0
    (log,) = (tmp_path / "tokenizer" / "logs").glob("*/events*" if logger == "tensorboard" else "*/metrics.csv")
    if logger == "tensorboard":
        events = read.EventAccumulator(str(log)).Reload()
        assert set(events.Tags()["images"]) == {"bit_use", "samples"} and "val/psnr" in events.Tags()["scalars"]


def test_options_reach_the_model(pair, tmp_path):
    """window, history, align, frame mask, loss weights and a class condition train and are kept in the checkpoint."""
    words = ["window=1", "history=full", "align=center", "loss.scale_weights=early", "condition.kind=class"]
    words += ["correction.p_max=0.1", "recipe.generator.steps=2", "trainer.val_check_interval=2", "frame_mask=0.5"]
    assert fit_generator(tmp_path, *words, tokenizer=pair.tokenizer) == 0
    saved = torch.load(tmp_path / "generator" / "checkpoints" / "last.ckpt", weights_only=True)["hyper_parameters"]
    assert saved["generator"]["window"] == 1 and saved["generator"]["align"] == "center"
    assert saved["generator"]["history"] == "full"
    assert saved["generator"]["condition"]["kind"] == "class" and len(saved["generator"]["condition"]["classes"]) == 5
    assert saved["correction"]["p_max"] == 0.1


def test_a_refused_training_leaves_the_folder_as_it_is(pair, tmp_path, capsys):
    """What is kept there of the composed config stays that of the run in it."""
    assert fit_generator(tmp_path, "debug=smoke", tokenizer=pair.tokenizer) == 0
    folder = tmp_path / "generator"
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert "debug=smoke" in (folder / "config" / "overrides.yaml").read_text()
    switch = "+callbacks.stage_switch={_target_:callbacks.StageSwitch,folder:'',monitor:val/loss}"  # without stages
    for words in (
        ["optimizer.lr=9"],
        ["overwrite=true", "data.frames=6"],
        ["ckpt=last", "data.frames=6"],
        ["overwrite=true", switch],
    ):
        assert fit_generator(tmp_path, "debug=smoke", *words, tokenizer=pair.tokenizer) == 1
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_run_that_takes_the_folder_of_another_does_not_go_on_from_it(pair, tmp_path, monkeypatch):
    """Killed before its first checkpoint and started again with ckpt=last it begins anew."""
    assert fit_generator(tmp_path, "debug=smoke", tokenizer=pair.tokenizer) == 0
    last = tmp_path / "generator" / "checkpoints" / "last.ckpt"
    last.with_name("best.ckpt").touch()
    with monkeypatch.context() as patch:
        patch.setattr("lightning.pytorch.loops.fit_loop._FitLoop.run", MagicMock(side_effect=KeyboardInterrupt))
        assert fit_generator(tmp_path, "debug=smoke", "overwrite=true", tokenizer=pair.tokenizer) != 0
    assert not list(last.parent.glob("*.ckpt")) and "overwrite" in (last.parents[1] / "config" / "overrides.yaml").read_text()


def test_an_error_of_a_loaders_worker_is_told_without_its_traceback():
    class Failing(Dataset):
        def __getitem__(self, n):
            try:
                raise ValueError("bad file")
            except ValueError as error:
                raise ValueError("none of 5 videos\ncan be read") from error

    with pytest.raises(ValueError, match="Original Traceback") as caught:
        next(iter(DataLoader(Failing(), sampler=[0], num_workers=1)))
    assert explained(caught.value, "fit") == "none of 5 videos\ncan be read\n(KIT_TRACEBACK=1 shows where)"


def test_a_reader_that_has_seen_enough_gets_no_traceback():
    words = f"{sys.executable} -m kit evaluate --help | head -n 1"
    done = subprocess.run(words, cwd=ROOT, shell=True, capture_output=True, text=True)
    assert done.stdout.startswith("python -m kit evaluate") and done.stderr == ""


def test_a_refused_command_removes_its_own_folder_and_nothing_else(tmp_path, capsys):
    """A folder of that name may have been the user's."""
    words = ["generate", f"root={tmp_path}", "name=mine", "prompt=x"]
    assert main(words) == 1 and not (tmp_path / "mine").exists()
    (tmp_path / "mine" / "config").mkdir(parents=True)
    (tmp_path / "mine" / "config" / "own.yaml").write_text("a: 1")
    assert main(words) == 1 and (tmp_path / "mine" / "config" / "own.yaml").read_text() == "a: 1"
    assert "give ckpt=PATH" in capsys.readouterr().err
