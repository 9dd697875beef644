"""Sharded training on two processes equals that on one: losses, averages, checkpoints, resuming with another number."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from unittest.mock import MagicMock

import lightning as L
import pytest
import torch

from callbacks import EMA
from kit.build import BUILDERS, build_data, build_trainer
from kit.checkpoint import read_checkpoint
from kit.cli import main
from kit.fsdp import ShardedStrategy, local
from kit.media import write_video
from tests.fixtures import CLIP, GENERATOR, QUICK, TOKENIZER, composed, moving
from tests.processes import group, together
from tests.test_training import losses

ROOT = Path(__file__).resolve().parents[1]
ONE = ["trainer.precision=32-true", "trainer.devices=1", "data.batch_size=4"]
TWO = ["trainer=fsdp", "recompute=true", "trainer.strategy.param_dtype=null", "trainer.devices=2", "data.batch_size=2"]
IN_SHARDS = [*TWO, "trainer.strategy.checkpoints=sharded"]
ALONE = [*(word for word in IN_SHARDS if "devices=2" not in word), "trainer.devices=1", "data.batch_size=4"]
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


STAGES = [  # with clipped and accumulated gradients, images, frozen parts, flips, masked frames and dropped conditions
    "~stages.low", "~stages.high", "~stages.long", "+stages.low={steps:2,data:{height:16,width:16,image_share:0.5}}",
    "+stages.some={steps:2,train:[head,layers.1.]}", "+stages.all={steps:2,data:{frames:9}}", "optimizer.name=adamw",
    "trainer.accumulate_grad_batches=2", "trainer.gradient_clip_val=0.05", "frame_mask=0.3", "drop_condition=0.3",
    "trainer.val_check_interval=4",
]  # fmt: skip


def fit(
    root: Path, name: str, tokenizer: Path | None, *words: str, conf: str = "stage2_generator", launched: bool = False
) -> Path:
    """Trains a generator in other processes, or a tokenizer if none is given; returns the run's folder.

    Args:
        launched: whether Lightning starts the further processes, as it does for users.
    """
    model = TOKENIZER if tokenizer is None else [*GENERATOR, f"tokenizer_ckpt={tokenizer}"]
    small = [word for word in [*CLIP, *QUICK, *model] if not word.startswith(("trainer.devices", "data.batch_size"))]
    run = [f"root={root}", f"name={name}", "optimizer.warmup=2", "callbacks.last.every=100"]
    command = ["fit", f"conf={conf}", *small, *run, *words]
    if launched:
        command, environment = [sys.executable, "-m", "kit", *command], {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
    else:
        (devices,) = (word.removeprefix("trainer.devices=") for word in words if word.startswith("trainer.devices="))
        together(command, int(devices), root / f"{name}_said")
    return root / name


def averages(run: Path) -> dict[str, torch.Tensor]:
    return read_checkpoint(run / "checkpoints" / "last.ckpt", "generator")["ema"]


def assert_near(x: torch.Tensor, expected: torch.Tensor):
    """Compares norms, not elements: for gradients near 0 rounding decides the direction of a step of Adam or Muon."""
    assert (x.float() - expected.float()).norm() <= 3e-2 * expected.float().norm()


def assert_alike(found: dict, expected: dict):
    """Checks that two checkpoints have nearly equal weights, averages and optimizer states."""
    for key in ("state_dict", "ema"):
        assert found[key].keys() == expected[key].keys()
        for name, tensor in expected[key].items():
            assert type(found[key][name]) is torch.Tensor and found[key][name].shape == tensor.shape
            assert_near(found[key][name], tensor)
    for a, b in zip(found["optimizer_states"], expected["optimizer_states"], strict=True):
        for ours, other in zip(a["param_groups"], b["param_groups"], strict=True):
            assert ours["params"] == other["params"] and ours["lr"] == pytest.approx(other["lr"])
        assert a["state"].keys() == b["state"].keys()
        for number, state in b["state"].items():
            assert a["state"][number].keys() == state.keys()
            for name, value in state.items():
                assert_near(torch.as_tensor(a["state"][number][name]), torch.as_tensor(value))


@pytest.fixture(scope="module")
def runs(pair, tmp_path_factory) -> tuple[Path, Path]:
    """Folders of two runs in three stages: on one process, and on two with sharded checkpoints."""
    root = tmp_path_factory.mktemp("sharded")
    sizes = f"+callbacks.sizes={{_target_:tests.test_fsdp.AverageSizes,folder:{root}}}"
    ways = {"one": ONE, "two": [*IN_SHARDS, sizes]}
    return tuple(fit(root, n, pair.tokenizer, *way, *STAGES, conf="progressive") for n, way in ways.items())


class AverageSizes(L.Callback):
    """Writes for each process how many elements of the moving averages it holds, and how many there are."""

    def __init__(self, folder: str):
        self.folder = Path(folder)

    def on_train_end(self, trainer, module):
        average = next(callback for callback in trainer.callbacks if isinstance(callback, EMA)).average.values()
        held = {"held": sum(local(a).numel() for a in average), "all": sum(a.numel() for a in average)}
        (self.folder / f"average_{trainer.global_rank}.json").write_text(json.dumps(held))


def test_each_process_holds_its_share_of_the_averages(runs):
    found = [json.loads((runs[1].parent / f"average_{rank}.json").read_text()) for rank in (0, 1)]
    assert all(share["held"] < 0.6 * share["all"] for share in found)
    assert sum(share["held"] for share in found) == found[0]["all"] == found[1]["all"]


@pytest.mark.parametrize("metric", ["train/loss", "train/grad_norm"])
def test_the_loss_is_that_of_one_process(runs, metric):
    one, two = (torch.tensor(losses(run, metric=metric)) for run in runs)
    assert len(one) == 6
    torch.testing.assert_close(two, one, **CLOSE)


@pytest.mark.parametrize("metric", ["val/loss", "val/bit_accuracy_scale3"])
def test_the_validation_is_that_of_one_process(runs, metric):
    """It is the mean over the clips of all processes, not over those of the first."""
    one, two = (torch.tensor(losses(run, metric=metric)) for run in runs)
    assert len(one) > 0
    torch.testing.assert_close(two, one, atol=1e-4, rtol=1e-4)


def test_checkpoints_are_alike(runs):
    one, two = (read_checkpoint(run / "checkpoints" / "last.ckpt", "generator") for run in runs)
    assert_alike(two, one)


def test_what_it_leaves_is_looked_at_and_sampled(runs, tmp_path):
    """The sharded checkpoint and the consolidated file give the same video."""
    media = runs[1] / "media"
    assert len(list(media.glob("step*.png"))) == len(list((runs[0] / "media").glob("step*.png"))) > 0
    stages = {f"{name}.{kind}" for name in ("last", "low", "some", "all") for kind in ("ckpt", "shards")}
    assert {p.name for p in (runs[1] / "checkpoints").iterdir()} == stages
    ckpt, made = runs[1] / "checkpoints" / "last.ckpt", tmp_path / "one.ckpt"
    assert main(["consolidate", f"ckpt={ckpt}", f"out={made}", f"root={tmp_path}"]) == 0
    for name, path in (("shards", ckpt), ("one", made)):
        assert main(["generate", f"ckpt={path}", "prompt=a red ball", f"root={tmp_path}", f"name={name}"]) == 0
    videos = [video.read_bytes() for video in sorted(tmp_path.rglob("*.mp4"))]
    assert len(videos) == 2 and videos[0] == videos[1]


def test_a_run_goes_on_with_another_number_of_processes(pair, tmp_path):
    """Runs resumed on 1 -> 2, 2 -> 1 and 2 -> 2 processes, from shards or one file, continue as on one process."""
    words = ["optimizer.name=muon", "callbacks.video_logger.clips=0"]
    for name, way in (("one", ONE), ("two", IN_SHARDS), ("alone", ALONE)):
        fit(tmp_path, name, pair.tokenizer, *way, *words, "recipe.generator.steps=3")
    for name, copy in (("one", "expected"), ("two", "same")):
        shutil.copytree(tmp_path / name, tmp_path / copy)
    ways = {"expected": ONE, "one": IN_SHARDS, "two": ONE, "alone": IN_SHARDS, "same": IN_SHARDS}
    more = [*words, "recipe.generator.steps=6", "ckpt=last"]
    expected, *others = (fit(tmp_path, name, pair.tokenizer, *way, *more) for name, way in ways.items())
    for resumed in others:
        assert len(losses(resumed, start=1)) == 3
        torch.testing.assert_close(torch.tensor(losses(resumed, start=1)), torch.tensor(losses(expected, start=1)), **CLOSE)
        for tensor, other in zip(averages(resumed).values(), averages(expected).values(), strict=True):
            assert_near(tensor, other)
    shards = {run.name: (run / "checkpoints" / "last.shards").exists() for run in others}
    assert shards == {"one": True, "two": False, "alone": True, "same": True}


def test_bfloat16_is_near(pair, tmp_path, runs):
    """Weights are gathered in bfloat16, and stored and reduced in float32."""
    words = [*TWO, "trainer.strategy.param_dtype=bfloat16", *STAGES, "callbacks.video_logger.clips=0"]
    run = fit(tmp_path, "bf16", pair.tokenizer, *words, conf="progressive")
    torch.testing.assert_close(torch.tensor(losses(run)), torch.tensor(losses(runs[0])), atol=2e-3, rtol=0)
    assert all(w.dtype == torch.float32 for w in averages(run).values())


@pytest.mark.usefixtures("compiler")
def test_compiled_layers_train_as_those_of_one_process_without(pair, tmp_path):
    """Compiled sharded layers with recomputing and clipped gradients give the losses of one process without compiling. Here
    alone layers become machine code, in processes that Lightning starts, as for users."""
    words = ["optimizer.name=adamw", "recipe.generator.steps=3", "trainer.gradient_clip_val=0.05", "data.image_share=0"]
    expected = fit(tmp_path, "one", pair.tokenizer, *ONE, *words)
    found = fit(tmp_path, "compiled", pair.tokenizer, *TWO, *words, "callbacks.compile.least_steps=0", launched=True)
    torch.testing.assert_close(torch.tensor(losses(found)), torch.tensor(losses(expected)), **CLOSE)


ADVERSARIAL = [  # under Muon, with clipped and accumulated gradients, and entropy over the whole batch
    "recipe.tokenizer.optimizer=muon", "optimizer.clip=0.5", "optimizer.accumulate=2", "loss.adversarial.weight=0.1",
    "loss.adversarial.adaptive=true",
    "loss.adversarial.lecam=0.1", "loss.entropy_weight=0.1", "loss.adversarial.width=16", "callbacks.ema.decay=0.9",
    "trainer.val_check_interval=4",
]  # fmt: skip


def test_a_tokenizer_and_its_discriminators_train_as_in_one_process_and_go_on_in_another_number(tmp_path):
    """A run on one process and a sharded one agree, then each is resumed in the other's way.

    The first two of four steps are before the discriminators' start; their checkpoints are one file.
    """
    metrics = ["train/loss", "train/entropy", "val/psnr"]
    ways = {"one": ONE, "two": TWO}

    def train(ways: dict, *words: str, start: int, metrics: list[str]):
        one, two = (fit(tmp_path, n, None, *way, *ADVERSARIAL, *words, conf="stage1_tokenizer") for n, way in ways.items())
        for metric in metrics:
            expected, found = (torch.tensor(losses(run, start, metric)) for run in (one, two))
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
        expected, found = (read_checkpoint(run / "checkpoints" / "last.ckpt", "tokenizer") for run in (one, two))
        assert_alike(found, expected)

    train(ways, "recipe.tokenizer.steps=2", "loss.adversarial.start=0.99", start=0, metrics=metrics)
    others = {"one": IN_SHARDS, "two": ONE}
    turn = ["recipe.tokenizer.steps=4", "loss.adversarial.start=0.5", "ckpt=last"]
    train(others, *turn, start=1, metrics=[*metrics, "train/discriminator", "train/lecam", "train/adversarial_weighted"])
    assert len(losses(tmp_path / "one", 1, "train/discriminator")) == 4
    assert len(list((tmp_path / "one" / "media").glob("step*.png"))) > 0
    assert "returned a view tensor" not in (tmp_path / "one_said" / "said_0").read_text(), "as FSDP2 warns"


def test_what_fsdp_cannot_do_for_a_tokenizer_is_told(tmp_path, capsys):
    word, words = "tokenizer.learned_amplitude=true", ["trainer=fsdp", "debug=smoke", f"root={tmp_path}"]
    assert main(["fit", "conf=stage1_tokenizer", *words, *CLIP, word]) == 1
    assert f"trainer=fsdp cannot train with {word}; set it to false" in capsys.readouterr().err


@pytest.mark.parametrize("word", ["param_dtype=float8", "checkpoints=half"])
def test_choices_are_told(word):
    with pytest.raises(ValueError, match=f"trainer.strategy.{word}; expected"):
        ShardedStrategy(**dict([word.split("=")]))


def test_groups_of_processes_that_each_hold_all_weights_train_as_one(pair, tmp_path):
    """HSDP on 2 x 2 processes, with Muon and clipped gradients, has the losses and averages of one process."""
    words = ["optimizer.name=muon", "callbacks.video_logger.clips=0", "trainer.gradient_clip_val=0.05"]
    four = [*TWO[:3], IN_SHARDS[-1], "trainer.devices=4", "data.batch_size=1", "trainer.strategy.replicas=2"]
    ways = {"one": ONE, "four": four}
    one, many = (fit(tmp_path, n, pair.tokenizer, *way, *words, "recipe.generator.steps=3") for n, way in ways.items())
    torch.testing.assert_close(torch.tensor(losses(many)), torch.tensor(losses(one)), **CLOSE)
    for name, expected in averages(one).items():
        assert_near(averages(many)[name], expected)


def test_validation_without_pictures_leaves_the_weights_as_they_were(pair, tmp_path):
    """Pictures, too, make a sharded model let go of the weights that it has gathered. On one process what differs is the
    losses, on two also the sizes of weights and averages."""
    words = [*CLIP, *QUICK, *GENERATOR, f"tokenizer_ckpt={pair.tokenizer}", "trainer=fsdp", "recipe.generator.steps=4"]
    words += [f"root={tmp_path}", "callbacks.video_logger.clips=0"]
    for every in (2, 50):
        assert main(["fit", "conf=stage2_generator", *words, f"name={every}", f"trainer.val_check_interval={every}"]) == 0
    assert losses(tmp_path / "2") == losses(tmp_path / "50")


@pytest.mark.parametrize("word", ["callbacks.ema=null", "trainer.num_sanity_val_steps=1"])
def test_after_a_validation_a_stage_freezes_and_averages_what_is_sharded(word, pair, tmp_path):
    """Also without averages or before there are any, and without pictures: those let go of what validation has gathered."""
    words = [
        *CLIP,
        *QUICK,
        *GENERATOR,
        "trainer=fsdp",
        "trainer.strategy.param_dtype=null",
        f"tokenizer_ckpt={pair.tokenizer}",
    ]
    words += [*STAGES[:3], "+stages.all={steps:1}", "+stages.some={steps:3,train:[head,layers.1.]}", "optimizer.lr=0.1"]
    words += ["optimizer.warmup=2", "trainer.accumulate_grad_batches=2", "trainer.val_check_interval=2"]
    words += ["callbacks.video_logger.clips=0"]
    assert main(["fit", "conf=progressive", f"root={tmp_path}", "name=run", *words, word]) == 0
    paths = (tmp_path / "run" / "checkpoints" / f"{name}.ckpt" for name in ("all", "some"))
    before, after = (read_checkpoint(path, "generator")["state_dict"] for path in paths)
    learned = ("model.head", "model.layers.1.", "model.condition.encoder.seen")
    frozen = [name for name in before if not name.startswith(learned)]
    assert not [name for name in frozen if not torch.equal(before[name], after[name])]


@pytest.mark.parametrize("conf", ["stage1_tokenizer", "stage2_generator"])
def test_recompute_reaches_the_model(conf, pair):
    given = [*GENERATOR, f"tokenizer_ckpt={pair.tokenizer}"] if conf == "stage2_generator" else TOKENIZER
    for word in ("false", "true"):
        cfg = composed(conf, *CLIP, *given, "data.batch_size=2", f"recompute={word}")
        module = BUILDERS[cfg.module](cfg, build_data(cfg))
        assert module.model.recompute == (word == "true") and "recompute" not in module.hparams


def test_groups_must_be_of_one_size():
    cfg = composed("stage2_generator", *CLIP, "trainer=fsdp", "trainer.devices=4", "trainer.strategy.replicas=3")
    with pytest.raises(ValueError, match="trainer.strategy.replicas=3 must divide the 4 processes"):
        build_trainer(cfg).strategy.setup_environment()


@pytest.mark.parametrize("trainer", ["default", "fsdp"])
def test_more_processes_than_devices_are_told(trainer, monkeypatch):
    for key, value in {"TORCHELASTIC_RUN_ID": "tests", "WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(key, value)
    cfg = composed("stage2_generator", *CLIP, f"trainer={trainer}")
    with pytest.raises(ValueError, match="torchrun has started 2 processes, but trainer.devices=1 and trainer.num_nodes=1"):
        build_trainer(cfg)


def test_processes_part_at_the_end_and_can_meet_again(pair, tmp_path):
    """The process group is closed at the end: a process that ends while threads of gloo run could be aborted."""
    words = [*CLIP, *QUICK, *GENERATOR, f"tokenizer_ckpt={pair.tokenizer}", "trainer=fsdp", "recipe.generator.steps=1"]
    for name in ("first", "second"):
        assert main(["fit", "conf=stage2_generator", *words, f"root={tmp_path}", f"name={name}"]) == 0
        assert not torch.distributed.is_initialized()


def test_gradients_are_added_up_in_float32_whatever_they_are_computed_in(monkeypatch):
    monkeypatch.setattr("kit.fsdp.fully_shard", sharded := MagicMock())
    strategy = ShardedStrategy(param_dtype="bfloat16")
    strategy._device_mesh = {"tensor_parallel": None}
    strategy.shard(MagicMock(), [MagicMock(), MagicMock()])
    policies = [call.kwargs["mp_policy"] for call in sharded.call_args_list]
    assert len(policies) == 3 and {policy.reduce_dtype for policy in policies} == {torch.float32}
    assert {policy.param_dtype for policy in policies} == {torch.bfloat16}


def test_processes_that_resume_from_different_places_do_not_train(tmp_path):
    """The folder of runs is one of each process, as where machines share none: the second finds no checkpoint."""
    fit(tmp_path / "0", "run", None, *ONE, "recipe.tokenizer.steps=1", conf="stage1_tokenizer")
    run = [f"root={tmp_path}/${{oc.env:RANK}}", "name=run", "ckpt=last", "recipe.tokenizer.steps=2", "trainer.devices=2"]
    small = [word for word in [*CLIP, *QUICK, *TOKENIZER] if not word.startswith("trainer.devices")]
    with group(["fit", "conf=stage1_tokenizer", *small, *run], 2, tmp_path) as commands:
        assert [command.wait() for command in commands] == [1, 1]
    assert "process 1 has another checkpoint to resume from than process 0 (" in (tmp_path / "said_0").read_text()
    assert (tmp_path / "0" / "run" / "checkpoints" / "last.ckpt").is_file()


def test_processes_with_different_clips_do_not_train(tmp_path):
    for rank in "01":
        for n in range(6):
            write_video(moving(5, 16, 16), tmp_path / rank / f"{n} of {rank}.mp4", 8)
    clips = ["data=clips", f"data.root={tmp_path}/${{oc.env:RANK}}"]
    run = [f"root={tmp_path}", "name=run", "recipe.tokenizer.steps=2", "trainer.devices=2", *clips]
    small = [word for word in [*CLIP, *QUICK, *TOKENIZER] if not word.startswith("trainer.devices")]
    with group(["fit", "conf=stage1_tokenizer", *small, *run], 2, tmp_path) as commands:
        assert [command.wait() for command in commands] == [1, 1]
    assert "process 1 has other clips than process 0 (0.file_sizes: " in (tmp_path / "said_0").read_text()
