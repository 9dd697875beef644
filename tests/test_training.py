"""Runs that stop and resume, averaged weights, NaN losses, checkpoints."""

from __future__ import annotations

import csv
import functools
import operator
import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, Timer
from torch import nn

from callbacks import EMA, BestCheckpoint, CompileLayers, KeptCheckpoints, LossGuard, StepTimer
from kit.build import build_trainer, slurm_environment
from kit.checkpoint import load_tokenizer, read_checkpoint
from kit.cli import main
from kit.data.batches import StreamSampler
from kit.data.datamodule import ClipDataModule
from kit.data.shapes import Shapes
from kit.data.staged import StagedClips
from kit.files import load_checked, save_checked
from kit.generator.module import GeneratorModule
from kit.stages import StagePlan
from kit.tokenizer.module import TokenizerModule
from kit.training_checkpoint import check_resume
from kit.values import plain
from kit.verbs.fit import train
from tests.fixtures import CLIP, GENERATOR, QUICK, TOKENIZER, composed, fit_generator, fit_tokenizer


def losses(folder: Path, start: int = 0, metric: str = "train/loss") -> list[float]:
    """Reads the training loss of each step, or another metric, as logged by start number `start` of a run."""
    rows = csv.DictReader((folder / "logs" / f"version_{start}" / "metrics.csv").open())
    return [float(row[metric]) for row in rows if row[metric]]


def interrupt_after(step: int, monkeypatch):
    """Interrupts trainings as Ctrl-C does, once `step` steps are done and logged."""

    def stop(self, trainer, *_):
        if trainer.global_step == step:
            for logger in trainer.loggers:
                logger.save()
            raise KeyboardInterrupt

    monkeypatch.setattr(LossGuard, "on_train_batch_end", stop)


@pytest.mark.parametrize("part, compiled", [("tokenizer", False), ("generator", False), ("generator", True)])
def test_resumed_run_gives_the_uninterrupted_loss_to_the_last_bit(part, compiled, pair, tmp_path, monkeypatch, traced):

    def fit(root, *overrides, status=0):
        steps = [
            "trainer.precision=32-true", f"recipe.{part}.steps=8", "trainer.val_check_interval=4",
            "callbacks.last.every=3", f"callbacks.compile.least_steps={0 if compiled else -1}", *overrides,
        ]  # fmt: skip
        fit_part = fit_tokenizer if part == "tokenizer" else partial(fit_generator, tokenizer=pair.tokenizer)
        assert fit_part(root, *steps, name="run") == status
        return root / "run"

    whole = fit(tmp_path / "whole")
    interrupt_after(5, monkeypatch)
    fit(tmp_path / "resumed", status=1)  # its last checkpoint is that of step 3
    monkeypatch.undo()
    resumed = fit(tmp_path / "resumed", "ckpt=last")
    assert len(losses(whole)) == 8 and bool(traced) == compiled
    assert losses(resumed, start=0) == losses(whole)[:4]  # the fifth was done, but not yet logged
    assert losses(resumed, start=1) == losses(whole)[3:]
    a, b = (read_checkpoint(run / "checkpoints" / "last.ckpt", part) for run in (whole, resumed))
    assert a["global_step"] == b["global_step"] == 8
    for key in ("state_dict", "ema"):
        assert all(torch.equal(a[key][name], b[key][name]) for name in a[key])


def test_compiled_layers_train_alike(pair, tmp_path, traced):
    """Losses are equal up to rounding, over batches of clips and images and validations; nothing stays compiled."""

    def fit(name, least_steps):
        joint = ["trainer.precision=32-true", "data.image_share=0.5"]
        words = [*joint, "recipe.generator.steps=6", "trainer.val_check_interval=3", f"name={name}"]
        assert fit_generator(tmp_path, *words, f"callbacks.compile.least_steps={least_steps}", tokenizer=pair.tokenizer) == 0
        return torch.tensor(losses(tmp_path / name))

    plain, fast = fit("plain", -1), fit("fast", 0)
    assert len(traced) == 2, "the layers of the second run only"
    torch.testing.assert_close(fast, plain, atol=1e-3, rtol=1e-3)
    assert torch.compile(torch.neg, backend="aot_eager")(torch.ones(1)) == -1, "compiling works as before"


def test_shapes_between_two_steps_compile_nothing():
    """Those of validations and samples: they vary."""

    class Layer(nn.Linear):
        def forward(self, x):
            return super().forward(x)

    compiled, layer, callback = [], Layer(3, 2), CompileLayers()
    layer.compile(dynamic=False, backend=lambda graph, _: compiled.append(len(compiled)) or graph.forward)
    callback.compiled = True
    for clips in (2, 4):
        callback.on_train_batch_start(None, None, None, 0)
        layer(torch.ones(clips, 3))
        callback.on_train_batch_end(None, None, None, None, 0)
        made = len(compiled)
        layer(torch.ones(clips + 1, 3))
        assert len(compiled) == made == clips // 2
    callback.on_exception(None, None, None)
    layer(torch.ones(9, 3))
    assert len(compiled) == 3, "compiling works as before"


def test_training_leaves_the_precision_of_float32_products_as_it_was(pair):
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize("every", [2, 3])
def test_the_last_checkpoint_is_that_of_the_last_step(tmp_path, every):
    """Resumed, the run logs the next step under its number, also where the last step was validated."""
    words = [f"trainer.val_check_interval={every}", "callbacks.video_logger.clips=0"]
    for steps in (4, 5):
        assert fit_tokenizer(tmp_path, *words, f"recipe.tokenizer.steps={steps}", "ckpt=last") == 0
        assert read_checkpoint(tmp_path / "tokenizer" / "checkpoints" / "last.ckpt", "tokenizer")["global_step"] == steps
    assert losses(tmp_path / "tokenizer", 1, "step")[-1] == 4, "counted from 0"


@pytest.mark.parametrize("verb", ["cache", "fit conf=stage1_tokenizer", "fit conf=stage2_generator"])
def test_pixels_of_another_range_are_told_before_they_are_learned(verb, pair, tmp_path, monkeypatch, capsys):
    made = Shapes.__getitem__
    monkeypatch.setattr(
        Shapes, "__getitem__", lambda self, n: {**made(self, n), "video": made(self, n)["video"] * 127.5 + 127.5}
    )
    given = f"tokenizer_ckpt={pair.tokenizer}"
    own = {"cache": ["clips=4", "val_clips=2", given], "fit conf=stage1_tokenizer": [*TOKENIZER, *QUICK]}
    clip = [word for word in CLIP if verb != "cache" or word.startswith("data")]
    assert main([*verb.split(), *clip, *own.get(verb, [*GENERATOR, *QUICK, given]), f"root={tmp_path}"]) == 1
    error = capsys.readouterr().err
    assert "clip 0 of the data: expected pixels in [-1, 1], found 4" in error and "Traceback" not in error


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda item: {"video": item["video"], "label": -1}, "clip 0 of the data: it has no caption; expected video, "),
        (lambda item: {**item, "label": "red"}, "its label is 'red'; expected its place in `classes`"),
        (lambda item: {**item, "video": item["video"].numpy()}, "its video is ndarray; expected a tensor"),
        (lambda item: {**item, "video": item["video"].double()}, "its video is torch.float64, expected torch.float32; "),
        (lambda item: {**item, "video": item["video"].half()}, "its video is torch.float16, expected torch.float32; "),
        (lambda item: {**item, "video": item["video"][:, :1]}, "it has 1 x 16 x 16 pixels, expected 5 x 16 x 16"),
        (lambda item: {**item, "video": item["video"][..., 1:]}, "it has 5 x 16 x 15 pixels, expected 5 x 16 x 16"),
    ],
)
def test_items_of_a_users_source_are_checked(change, told):
    class Own(Shapes):
        def __getitem__(self, n):
            return change(super().__getitem__(n))

    data = ClipDataModule(Own, 5, 16, 16, 8.0, batch_size=2, val_clips=2, workers=0)
    with pytest.raises(ValueError, match=re.escape(told)):
        next(iter(data.val_dataloader()))


def test_the_progress_bar_fits_into_80_columns(tmp_path, capsys):
    """With bars of 10 columns, which is tqdm's least."""
    assert fit_tokenizer(tmp_path, "recipe.tokenizer.steps=1000", "trainer.max_steps=4", "trainer.val_check_interval=2") == 0
    (last,) = re.findall(r"100%[^\r\n]*\[[^\r\n]*train/loss=[^\r\n]*val/psnr=[^\r\n]*\]", capsys.readouterr().out)[-1:]
    assert len(last) <= 80 and "Epoch" not in last and "v_num" not in last


def test_a_training_ends_after_its_time_and_goes_on(tmp_path, caplog):
    short = ["trainer.max_time=00:00:00:01", "recipe.tokenizer.steps=100000"]
    assert fit_tokenizer(tmp_path, "trainer.val_check_interval=3", *short) == 0
    ckpt = tmp_path / "tokenizer" / "checkpoints" / "last.ckpt"
    done = read_checkpoint(ckpt, "tokenizer")["global_step"]
    assert 0 < done < 100000
    for again in (0, 1):
        assert f"trainer.max_time is over at step {done} of 100000; with a longer one ckpt=last resumes" in caplog.text
        caplog.clear()
        assert again or fit_tokenizer(tmp_path, "trainer.val_check_interval=3", *short, "ckpt=last") == 0
    more = [f"recipe.tokenizer.steps={done + 2}", "trainer.val_check_interval=3", "ckpt=last"]
    assert fit_tokenizer(tmp_path, *more) == 0 and read_checkpoint(ckpt, "tokenizer")["global_step"] == done + 2


def test_a_training_that_came_to_its_end_in_time_is_not_told_to_go_on(monkeypatch, caplog):
    timer = StepTimer({"seconds": 1})
    monkeypatch.setattr(timer, "time_remaining", lambda: -0.5)
    for step in (4, 5):
        timer.on_fit_end(SimpleNamespace(global_step=step, max_steps=5), None)
    assert "over at step 4 of 5" in caplog.text and "step 5" not in caplog.text


def test_callbacks_of_kit_are_named_as_lightnings_in_checkpoints(tmp_path):
    """So were they before kit had its own, and so they are found in older checkpoints."""
    given = {"dirpath": tmp_path, "monitor": "val/psnr", "mode": "max"}
    assert BestCheckpoint(**given).state_key == ModelCheckpoint(**given).state_key
    assert StepTimer("00:00:00:01").state_key == Timer("00:00:00:01").state_key


@pytest.mark.parametrize(
    "words, told",
    [
        (["recipe.tokenizer.steps=-1"], "trainer.max_steps=-1; expected a whole number of 1 or more"),
        (["trainer.val_check_interval=0"], "trainer.val_check_interval=0; expected a whole number of 1 or more"),
        (["+trainer.limit_train_batches=3"], "trainer.limit_train_batches=3: the data has no end"),
        (["+trainer.overfit_batches=1"], "trainer.overfit_batches=1: the data has no end"),
        (["trainer.precision=bf16-true"], "trainer.precision=bf16-true; expected one of: 32-true, bf16-mixed, 16-mixed, "),
    ],
)
def test_trainers_that_do_something_else_are_told(words, told, tmp_path, capsys):
    assert fit_tokenizer(tmp_path, *words) == 1
    assert told in capsys.readouterr().err


def test_a_training_on_one_device_may_validate_by_the_clock(tmp_path):
    often = ["trainer.val_check_interval=00:00:00:01", "trainer.max_time=00:00:00:03", "recipe.tokenizer.steps=100000"]
    assert fit_tokenizer(tmp_path, *often) == 0
    assert (tmp_path / "tokenizer" / "checkpoints" / "best.ckpt").is_file()
    with pytest.raises(ValueError, match="00:00:00:01: each of 2 processes would validate by its own clock"):
        build_trainer(composed("stage1_tokenizer", *CLIP, often[0], "trainer.devices=2"))


def test_a_training_without_a_logger(tmp_path):
    assert fit_tokenizer(tmp_path, "recipe.tokenizer.steps=2", "trainer.val_check_interval=2", "logger=none") == 0
    run = tmp_path / "tokenizer"
    assert (run / "checkpoints" / "best.ckpt").is_file() and list((run / "media").glob("*.png"))
    assert not (run / "logs").exists()


def test_checkpoints_are_kept_to_go_back_to(tmp_path):
    """One every two steps of two batches, the last two of them; the training goes on from an earlier one."""
    kept = ["callbacks.kept.every=2", "optimizer.accumulate=2", "trainer.val_check_interval=8"]
    assert fit_tokenizer(tmp_path, *kept, "recipe.tokenizer.steps=7") == 0
    folder = tmp_path / "tokenizer" / "checkpoints"
    names = ["best.ckpt", "last.ckpt", "step=4.ckpt", "step=6.ckpt"]
    assert sorted(path.name for path in folder.iterdir()) == names
    before = read_checkpoint(folder / "step=4.ckpt", "tokenizer")
    assert (before["global_step"], before["ClipDataModule"]["batches_done"]) == (4, 8)
    scores = [state["best_model_score"] for name, state in before["callbacks"].items() if name.startswith("ModelCheckpoint")]
    assert scores and None not in scores, "saved after the validation that followed"
    assert fit_tokenizer(tmp_path, *kept, f"ckpt={folder / 'step=4.ckpt'}", "recipe.tokenizer.steps=5") == 0
    assert read_checkpoint(folder / "last.ckpt", "tokenizer")["global_step"] == 5
    assert sorted(path.name for path in folder.iterdir()) == names, "none is removed"
    again = read_checkpoint(folder / "step=4.ckpt", "tokenizer")
    assert again["ClipDataModule"]["batches_done"] == 8, "nor saved anew, amid the step that follows"


def test_a_save_that_failed_removes_no_kept_checkpoint(tmp_path):
    class Strategy(SimpleNamespace):
        def remove_checkpoint(self, path):
            path.unlink()

    def save(path, **_):
        if io.failed == 0:
            path.touch()

    io = SimpleNamespace(failed=0)
    total = SimpleNamespace(processed=0)
    trainer = SimpleNamespace(
        strategy=Strategy(checkpoint_io=io, broadcast=lambda x: x), save_checkpoint=save, is_global_zero=True, global_step=0,
        val_check_batch=1.0, should_stop=False, enable_validation=False, accumulate_grad_batches=1,
        fit_loop=SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=SimpleNamespace(total=total))),
    )  # fmt: skip
    module, kept = SimpleNamespace(hparams=SimpleNamespace(optimizer={})), KeptCheckpoints(str(tmp_path), every=1, keep=1)
    found = []
    for step in range(1, 4):
        trainer.global_step, io.failed = step, int(step == 2)
        kept.on_train_batch_end(trainer, module, None, None, 0)
        found.append([path.name for path in tmp_path.iterdir()])
    assert found == [["step=1.ckpt"], ["step=1.ckpt"], ["step=3.ckpt"]]
    with pytest.raises(ValueError, match="callbacks.kept.keep=0; expected a whole number of 1 or more"):
        KeptCheckpoints(str(tmp_path), keep=0)


def test_what_tells_of_a_trainings_health_is_logged(tmp_path):
    """Of a tokenizer with discriminators that accumulates two batches, with a row every three: the norm before clipping of
    the last step that was done by then."""
    words = ["recipe.tokenizer.steps=6", "optimizer.accumulate=2", "optimizer.clip=1e-3", "trainer.val_check_interval=4"]
    assert fit_tokenizer(tmp_path, *words, "trainer.log_every_n_steps=3", "loss.adversarial.weight=0.1") == 0
    run = tmp_path / "tokenizer"
    norms = losses(run, metric="train/grad_norm")
    assert len(norms) == len(set(norms)) == len(losses(run)) == 4 and min(norms) > 0.01
    for name in ("time/step", "time/waiting", "time/validation", "data/unreadable", "data/left_out"):
        assert min(losses(run, metric=name)) >= 0
    assert max(losses(run, metric="time/step")) > 0 and 0 < max(losses(run, metric="time/validation")) < 1


def test_time_is_measured_from_log_to_log(pair, tmp_path):
    """Of a generator that accumulates gradients: all batches of the steps between two rows count, and the validation."""
    words = ["recipe.generator.steps=6", "trainer.accumulate_grad_batches=3", "trainer.val_check_interval=6"]
    assert fit_generator(tmp_path, *words, "trainer.log_every_n_steps=2", tokenizer=pair.tokenizer) == 0
    run = tmp_path / "generator"
    assert len(losses(run, metric="time/step")) == 3 and len(set(losses(run, metric="train/grad_norm"))) == 3
    shares = [losses(run, metric=f"time/{name}") for name in ("validation", "waiting")]
    assert [share > 0 for share in shares[0]] == [False, True, True]
    assert all(waiting < validation for validation, waiting in zip(*shares) if validation), "which is no waiting"


def test_in_a_slurm_job_nothing_is_queued_again_by_lightning(monkeypatch):
    for name, value in {"NTASKS": "1", "JOB_NAME": "kit", "JOB_ID": "7", "PROCID": "0", "LOCALID": "0"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    (environment,) = slurm_environment()
    assert not environment.auto_requeue
    assert build_trainer(composed("stage1_tokenizer", *CLIP))._accelerator_connector.cluster_environment.auto_requeue is False
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a")
    assert slurm_environment() == []


def test_an_old_run_is_not_overwritten_unless_asked_for(own_pair, capsys):
    before = own_pair.tokenizer.read_bytes()
    assert fit_tokenizer(own_pair.root) == 1
    assert "ckpt=last" in capsys.readouterr().err
    assert own_pair.tokenizer.read_bytes() == before
    other = own_pair.root / "other.ckpt"
    other.write_bytes(before)
    assert fit_tokenizer(own_pair.root, f"ckpt={other}") == 1
    assert "already holds a trained run" in capsys.readouterr().err
    assert fit_tokenizer(own_pair.root, f"ckpt={own_pair.tokenizer}") == 0, "its own"


def test_finished_run_continued_is_left_as_it_is(own_pair):
    log = own_pair.tokenizer.parents[1] / "logs" / "version_0" / "metrics.csv"
    before = log.read_bytes(), own_pair.tokenizer.read_bytes()
    assert fit_tokenizer(own_pair.root, "ckpt=last") == 0
    assert read_checkpoint(own_pair.tokenizer, "tokenizer")["global_step"] == 100
    assert (log.read_bytes(), own_pair.tokenizer.read_bytes()) == before


def test_another_architecture_does_not_go_on(own_pair, capsys):
    assert fit_tokenizer(own_pair.root, "ckpt=last", "tokenizer.bits=4", "tokenizer.widths=[32,48]") == 1
    error = capsys.readouterr().err
    assert "is of another architecture (bits: 8, 4; widths: [32, 32], [32, 48])" in error and "Traceback" not in error
    assert fit_generator(own_pair.root, "ckpt=last", "generator.layers=3", tokenizer=own_pair.tokenizer) == 1
    assert "is of another architecture (layers: 2, 3)" in capsys.readouterr().err


def test_what_changed_since_a_run_began_is_told_or_refused(own_pair, tmp_path, capsys, caplog):
    words = ("ckpt=last", "loss.bit_weights=uniform", "optimizer.lr=1e-4", "data.batch_size=2")
    assert fit_generator(own_pair.root, *words, tokenizer=own_pair.tokenizer) == 0
    for change in ("loss.bit_weights: margin, uniform", "optimizer.lr: "):
        assert f"other settings than it began with (then, now): {change}" in caplog.text
    assert "resumes with other data than it began with (then, now): batch_size: 4, 2" in caplog.text
    assert fit_generator(own_pair.root, "ckpt=last", "optimizer.weight_decay=0.5", tokenizer=own_pair.tokenizer) == 1
    assert "cannot change that" in (error := capsys.readouterr().err) and "optimizer.weight_decay: " in error
    assert fit_tokenizer(tmp_path, "tokenizer.bits=8", "trainer.max_steps=1", "seed=1") == 0
    other = tmp_path / "tokenizer" / "checkpoints" / "last.ckpt"
    assert fit_generator(own_pair.root, "ckpt=last", tokenizer=other) == 1
    assert "tokenizer_hash: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("part", "key"),
    [
        *(("tokenizer", f"optimizer.{key}") for key in ("name", "betas", "weight_decay")),
        ("tokenizer", "loss.adversarial.betas"),
        ("generator", "tokenizer_hash"),
    ],
)
def test_what_its_states_depend_on_stays_as_it_began(pair, part, key):
    ckpt, data = getattr(pair, part), ClipDataModule(Shapes, 5, 32, 32, 8.0, batch_size=2, val_clips=2, workers=0)
    values = read_checkpoint(ckpt, part)["hyper_parameters"]
    tokenizer = load_tokenizer(pair.tokenizer).model
    module = TokenizerModule(**values) if part == "tokenizer" else GeneratorModule(**values, tokenizer=tokenizer)
    assert check_resume(ckpt, module, data) == []
    *above, last = key.split(".")
    values = functools.reduce(operator.getitem, above, module.hparams)
    assert last in values
    values[last] = "other"
    with pytest.raises(ValueError, match=f"began otherwise .{re.escape(key)}: .*, other.* and cannot change that"):
        check_resume(ckpt, module, data)


@pytest.mark.parametrize(("key", "value"), [("dims", [2]), ("width", 8), ("layers", 2), ("weight", 0.0)])
def test_other_discriminators_do_not_go_on(pair, tmp_path, key, value):
    checkpoint, ckpt = load_checked(pair.tokenizer), tmp_path / "last.ckpt"
    checkpoint["hyper_parameters"]["loss"]["adversarial"]["weight"] = 0.1
    save_checked(checkpoint, ckpt)
    module = SimpleNamespace(kind="tokenizer", model=load_tokenizer(ckpt).model, hparams=checkpoint["hyper_parameters"])
    data = ClipDataModule(Shapes, 5, 32, 32, 8.0, batch_size=2, val_clips=2, workers=0)
    assert check_resume(ckpt, module, data) == []
    module.hparams["loss"]["adversarial"][key] = value
    with pytest.raises(ValueError, match=f"is of another architecture .*loss.adversarial.{key}: "):
        check_resume(ckpt, module, data)


def test_weights_of_another_version_do_not_go_on(pair, tmp_path):
    checkpoint, model = load_checked(pair.tokenizer), load_tokenizer(pair.tokenizer).model
    module = SimpleNamespace(kind="tokenizer", model=model, hparams=checkpoint["hyper_parameters"])
    data = ClipDataModule(Shapes, 5, 32, 32, 8.0, batch_size=2, val_clips=2, workers=0)
    for weights in (checkpoint["state_dict"], checkpoint["ema"]):
        weights["model.decoder.head.bias"] = torch.zeros(5)
    save_checked(checkpoint, tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match="of another version of kit, with other weights .decoder.head.bias: .5,., "):
        check_resume(tmp_path / "last.ckpt", module, data)


def test_ema_is_the_average_of_the_weights():
    module, ema = torch.nn.Module(), EMA(decay=0.5)
    module.model, module.discriminator = torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)
    trainer = type("Trainer", (), {"global_step": 0})()
    ema.on_train_start(trainer, module)
    expected = module.model.weight.detach().clone()
    for step in range(1, 30):
        with torch.no_grad():
            module.model.weight.add_(1.0)
        trainer.global_step = step
        ema.on_train_batch_end(trainer, module, None, None, step)
        ema.on_train_batch_end(trainer, module, None, None, step)  # accumulation: no new step, no change
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * module.model.weight.detach()
    assert set(ema.average) == {"model.weight", "model.bias"}
    torch.testing.assert_close(ema.average["model.weight"], expected)
    live = module.model.weight.detach().clone()
    ema.on_validation_start(trainer, module)
    torch.testing.assert_close(module.model.weight.detach(), expected)
    ema.on_validation_end(trainer, module)
    assert torch.equal(module.model.weight, live)
    resumed, before = EMA(decay=0.5), ema.average["model.weight"].clone()
    resumed.on_load_checkpoint(trainer, module, {"ema": ema.average})
    resumed.load_state_dict(ema.state_dict())
    resumed.on_train_start(trainer, module)
    resumed.on_train_batch_end(trainer, module, None, None, 0)  # the first batch of several of a step
    assert torch.equal(resumed.average["model.weight"], before)


def test_ema_follows_faster_early_on():
    """After n steps its decay is (1 + n) / (10 + n): the first average of 0 and 1 has 9/11 of the new weight."""
    module, ema = torch.nn.Module(), EMA(decay=0.999)
    module.model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(module.model.weight)
    trainer = type("Trainer", (), {"global_step": 0})()
    ema.on_train_start(trainer, module)
    torch.nn.init.ones_(module.model.weight)
    for step, expected in ((1, 1 - 2 / 11), (2, 1 - 2 / 11 * 3 / 12)):
        trainer.global_step = step
        ema.on_train_batch_end(trainer, module, None, None, step)
        assert ema.average["model.weight"].item() == pytest.approx(expected)


@pytest.mark.parametrize("decay", [-0.1, 1, 1.5])
def test_a_decay_that_averages_nothing_is_told(decay):
    with pytest.raises(ValueError, match=rf"decay must lie in \[0, 1\), got {decay}"):
        EMA(decay)


@pytest.mark.parametrize("bad", ["loss is nan", "gradients are not finite"])
def test_nan_stops_before_the_weights_and_saves_the_batch(bad, tmp_path):
    """A clip of batch 2 is NaN, or the gradient of one weight is in step 2."""
    clip = {"frames": 1, "height": 16, "width": 16, "fps": 8}
    tokenizer = {"bits": 4, "scales": [1, 2], "patch": 8, "widths": [8], "blocks": 1}
    cfg = composed("stage1_tokenizer", "size=tiny")
    module = TokenizerModule(tokenizer, plain(cfg.loss), plain(cfg.optimizer), clip, 5, plain(cfg.scale_dropout), 0)

    class Poisoned(Shapes):
        def __getitem__(self, n):
            item = super().__getitem__(n)
            return {**item, "video": item["video"] * (float("nan") if n == 5 and bad == "loss is nan" else 1)}

    if bad != "loss is nan":
        module.model.encoder.stem.weight.register_hook(lambda grad: grad * (float("nan") if trainer.global_step == 2 else 1))
    data = ClipDataModule(Poisoned, 1, 16, 16, 8.0, batch_size=2, val_clips=1, workers=0)
    trainer = L.Trainer(
        accelerator="cpu", max_steps=5, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[LossGuard(tmp_path)], limit_val_batches=0,
    )  # fmt: skip
    with pytest.raises(ValueError, match=f"{bad}.* at step 2"):
        trainer.fit(module, datamodule=data)
    assert all(p.isfinite().all() for p in module.parameters())
    batch = torch.load(tmp_path / "lost_loss_step2.pt", weights_only=True)
    assert batch["n"].tolist() == [4, 5] and batch["video"].isnan().any() == (bad == "loss is nan")


def test_ranks_share_the_stream_without_overlap():
    both = [batches(StreamSampler(2, 3, rank, 2, 17), 2) for rank in (0, 1)]
    assert sorted(sum(sum(both, []), [])) == [(n, 17) for n in range(12, 20)]
    assert batches(StreamSampler(4, 0, 0, 1, 17), 3)[1:] == batches(StreamSampler(4, 1, 0, 1, 17), 2)


def test_each_rank_validates_as_many_clips():
    """The numbers must be equal, because sharded ranks wait for each other in every batch."""
    data = ClipDataModule(partial(Shapes), 1, 16, 16, 8.0, batch_size=2, val_clips=64, workers=0)
    cpu = SimpleNamespace(root_device=torch.device("cpu"))
    for ranks in (1, 3, 5):
        seen = []
        for rank in range(ranks):
            data.trainer = SimpleNamespace(global_rank=rank, world_size=ranks, strategy=cpu)
            data.setup()
            seen.append([batch["n"].tolist() for batch in data.val_dataloader()])
        assert len({tuple(map(len, batches)) for batches in seen}) == 1
        assert sorted(sum(sum(seen, []), [])) == list(range(64 // ranks * ranks))
    data.trainer = SimpleNamespace(global_rank=0, world_size=65, strategy=cpu)
    staged = StagedClips(StagePlan.of({"only": {"steps": 1}}), [data], [1])
    staged.trainer = data.trainer
    for each in (data, staged):
        with pytest.raises(ValueError, match="data.val_clips=64 leaves some of the 65 devices without a clip"):
            each.setup("fit")


def batches(sampler, n):
    return [batch for batch, _ in zip(sampler, range(n))]


@pytest.mark.parametrize("share", [0.25, 0.3, 1.0])
def test_images_and_clips_are_streams_of_their_own(share):
    """A share of the batches holds first frames; no item of either stream is left out, also if a stream begins later."""
    stream = batches(StreamSampler(2, 0, 0, 1, 17, share, 6), 40)
    images, clips = ([b for b in stream if b[0][1] == frames] for frames in (1, 17))
    assert len(images) == int(40 * share) and {len(b) for b in images} == {6} and {len(b) for b in clips} <= {2}
    for kind, frames in ((images, 1), (clips, 17)):
        assert sum(kind, []) == [(n, frames) for n in range(sum(map(len, kind)))]
    assert batches(StreamSampler(2, 17, 0, 1, 17, share, 6), 23) == stream[17:]


def test_images_and_video_jointly(pair, tmp_path, caplog):
    """Every other batch holds as many images as a batch of clips has latent frames, with the losses of runs on clips and on
    images alone; clips encoded ahead and during training give the same."""

    def fit(name, *words):
        steps = [f"name={name}", "recipe.generator.steps=6", "trainer.precision=32-true", "optimizer.lr=0"]
        assert fit_generator(tmp_path, *steps, *words, tokenizer=pair.tokenizer) == 0
        return torch.tensor(losses(tmp_path / name))

    joint = fit("joint", "data.image_share=0.5")
    assert "6 of 4 clips on 1 device(s), 50% of them of 8 images instead" in caplog.text
    fit("parts", "data.image_share=0.5", "trainer.accumulate_grad_batches=2", "recipe.generator.steps=1")
    assert "1 of 8 clips on 1 device(s), 50% of their batches of 8 images instead" in caplog.text
    torch.testing.assert_close(joint[::2], fit("clips")[:3])
    torch.testing.assert_close(joint[1::2], fit("images", "data.image_share=1")[:3])
    fresh = fit("fresh", "data.image_share=0.5", "recipe.generator.encoded_clips=0")
    torch.testing.assert_close(joint, fresh, atol=2e-3, rtol=2e-3)


def test_image_share_is_for_generators(tmp_path, capsys):
    assert fit_tokenizer(tmp_path, "data.image_share=0.5") == 1
    assert "data.image_share is for generators; conf=stage0_image_tokenizer trains" in capsys.readouterr().err
    assert fit_tokenizer(tmp_path, "data.image_share=2") == 1
    assert "data.image_share=2; expected a number from 0 to 1" in capsys.readouterr().err


@pytest.mark.parametrize("kind, kept", [("cpu", [True]), ("cuda", [])])
def test_freed_memory_is_kept_for_a_training_on_a_cpu_alone(kind, kept, monkeypatch):
    """Workers and gathered checkpoints of a training on a GPU would else keep what they once took."""
    called = []
    monkeypatch.setattr("kit.verbs.fit.device", lambda: torch.device(kind))
    monkeypatch.setattr("kit.verbs.fit.keep_freed_memory", lambda: called.append(True))
    monkeypatch.setattr("kit.verbs.fit.tokenizer_config", MagicMock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        train(composed("stage1_tokenizer", *CLIP))
    assert called == kept
