"""Several runs of one command: Hydra's multiruns and launchers, the sweeps of W&B."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import wandb
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser

from kit.cli import main
from kit.confs import CONF
from kit.resolvers import register_resolvers
from kit.words import quoted
from tests.fixtures import CLIP, GENERATOR, QUICK, TOKENIZER

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("word", ["data.heigth=64,32", "data.heigth=64"])
def test_a_misspelt_key_of_a_multirun_is_told(word, capsys):
    assert main(["fit", "conf=stage1_tokenizer", "--multirun", "size=tiny,small", word]) == 1
    assert capsys.readouterr().err == "kit fit: no key data.heigth; did you mean data.height?\n"


def test_a_run_of_a_multirun_without_a_name_is_told(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["generate", "-m", "ckpt=x", "name=a,''"]) == 1
    assert "name= names no folder" in capsys.readouterr().err


def test_multirun_runs_once_for_each_value(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["fit", "conf=stage1_tokenizer", "--multirun", "name=s${seed}", "seed=1,2", "debug=smoke", f"root={tmp_path}"]
    assert main([*words, *CLIP, *TOKENIZER]) == 0
    assert all((tmp_path / f"s{seed}" / "checkpoints" / "last.ckpt").is_file() for seed in (1, 2))
    assert {path.name for path in tmp_path.iterdir()} == {"s1", "s2", "s0_multirun"}, "no folder of a job's number stays"
    assert [path.name for path in (tmp_path / "s0_multirun").iterdir()] == ["multirun.yaml"]


def test_a_launcher_runs_each_value_in_a_process_of_its_own(tmp_path, monkeypatch, capsys):
    """The error of a failed job is printed by the main process."""
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
    words = ["fit", "conf=stage1_tokenizer", "--multirun", "hydra/launcher=submitit_local", "name=s${seed}"]
    assert main([*words, *CLIP, *TOKENIZER, "seed=0,-1", "debug=smoke", f"root={tmp_path}"]) == 1
    assert (tmp_path / "s0" / "checkpoints" / "last.ckpt").is_file() and not (tmp_path / "s-1" / "checkpoints").exists()
    assert "seed=-1; expected a whole number of 0 or more" in capsys.readouterr().err


def test_jobs_of_slurm_have_a_process_for_each_device():
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    words = ["hydra/launcher=slurm", "trainer.devices=4", "trainer.num_nodes=2", "trainer=fsdp"]
    register_resolvers()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        launcher = compose("stage2_generator", words, return_hydra_config=True).hydra.launcher
    assert (launcher.nodes, launcher.tasks_per_node, launcher.gpus_per_node) == (2, 4, 4)


def test_slurm_is_told_how_many_devices_its_machines_have(tmp_path, capsys):
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    words = ["--multirun", "hydra/launcher=slurm", "trainer.devices=auto", "seed=0,1", f"root={tmp_path}"]
    assert main(["fit", "conf=stage1_tokenizer", *words]) == 1
    assert "trainer.devices=auto: give a number, of each machine" in capsys.readouterr().err


def test_folders_may_be_swept_and_a_name_is_no_number():
    parse = OverridesParser.create().parse_override
    assert parse(quoted("data.root=/a,/b", sweep=True)).is_sweep_override()
    assert parse(quoted("data.root=/a,/b")).value() == "/a,/b"
    for name in ("2024_01_15", "1e3", "007", "run-3.5"):
        assert parse(quoted(f"name={name}")).value() == name


def test_ctrl_c_ends_all_runs_of_a_multirun(tmp_path, monkeypatch, capsys):
    runs = []

    def verb(cfg):
        runs.append(cfg.seed)
        raise KeyboardInterrupt

    monkeypatch.setattr("kit.verbs.fit.fit", verb)
    assert main(["fit", "conf=stage1_tokenizer", "--multirun", "seed=1,2,3", f"root={tmp_path}"]) == 1
    assert runs == [1] and "interrupted" in capsys.readouterr().err


def test_a_run_that_fails_does_not_keep_the_others_of_a_multirun(tmp_path, monkeypatch):
    runs = []

    def verb(cfg):
        runs.append(cfg.seed)
        raise ValueError("told")

    monkeypatch.setattr("kit.verbs.fit.fit", verb)
    words = ["trainer.devices=auto", "callbacks.video_logger=false", f"root={tmp_path}"]
    assert main(["fit", "conf=stage1_tokenizer", "--multirun", "seed=1,2", *words]) == 1
    assert runs == [1, 2]


@pytest.mark.parametrize("name", ["generator", "ablation"])
def test_sweep_commands_run_as_an_agent_would_call_them(pair, tmp_path, monkeypatch, name):
    """W&B replaces ${args_no_hyphens} by key=value words; here by the first value of each parameter."""
    sweep = yaml.safe_load((CONF / "sweep" / f"{name}.yaml").read_text())
    words = [word for word in sweep["command"] if word not in ("${env}", "python", "-m", "kit")]
    values = [f"{key}={parameter['values'][0]}" for key, parameter in sweep["parameters"].items()]
    at = words.index("${args_no_hyphens}")
    words[at : at + 1] = values
    for key, value in {"WANDB_MODE": "offline", "WANDB_SWEEP_ID": "abc", "WANDB_RUN_ID": "run1"}.items():
        monkeypatch.setenv(key, value)
    monkeypatch.chdir(tmp_path)
    small = [*CLIP, *TOKENIZER, *GENERATOR, *QUICK, "recipe.generator.steps=2", "trainer.val_check_interval=2"]
    assert main([*words, *small, f"tokenizer_ckpt={pair.tokenizer}"]) == 0
    assert wandb.run is None, "the next training of this process is a run of its own"
    folder = {"generator": "sweep_generator/run1", "ablation": "ablation_standard_0"}[name]
    assert (tmp_path / "runs" / folder / "checkpoints" / "last.ckpt").is_file()
