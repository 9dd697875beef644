"""Trainings in stages: which stage a step belongs to, what a stage changes, and how they stop and resume."""

from __future__ import annotations

import csv
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import nn

from callbacks import RunSummary, StageSwitch
from kit.build import plan_of
from kit.checkpoint import STAGED, data_settings, load_generator, read_checkpoint
from kit.cli import main
from kit.data.datamodule import ClipDataModule
from kit.data.shapes import Shapes
from kit.data.staged import StagedClips
from kit.stages import Stage, StagePlan, locate, starts
from kit.tokenizer import TokenizerConfig
from tests.fixtures import CLIP, GENERATOR, QUICK, TOKENIZER, composed, fit_tokenizer
from tests.test_training import interrupt_after, losses

PLAN = [
    "+stages.low={steps:4,data:{height:16,width:16,image_share:0.25},lr:0.02,warmup:2}",
    "+stages.high={steps:3}",
    "+stages.long={steps:3,data:{frames:9,batch_size:2}}",
]
ALIKE = ["trainer.precision=32-true"]


def fit_stages(root: Path, tokenizer: Path, *words: str, name: str = "run", conf: str = "progressive") -> int:
    run = [f"root={root}", f"name={name}", f"tokenizer_ckpt={tokenizer}"]
    # what the example's own stages would add to the test's
    own = [] if conf != "progressive" else ["~stages.low", "~stages.high", "~stages.long"]
    return main(["fit", f"conf={conf}", *run, *own, *CLIP, *GENERATOR, *QUICK, *ALIKE, *words])


def weights(folder: Path, which: str = "last") -> dict[str, torch.Tensor]:
    return read_checkpoint(folder / "checkpoints" / f"{which}.ckpt", "generator")["state_dict"]


def column(folder: Path, name: str, start: int = 0) -> list[float]:
    rows = csv.DictReader((folder / "logs" / f"version_{start}" / "metrics.csv").open())
    return [float(row[name]) for row in rows if row.get(name)]


def learning_rates(folder: Path, start: int = 0) -> list[float]:
    names = csv.DictReader((folder / "logs" / f"version_{start}" / "metrics.csv").open()).fieldnames
    return column(folder, next(name for name in names if "lr" in name), start)


# --- plans -----------------------------------------------------------------------------------------------------------


def test_a_step_is_located_among_stages():
    lengths = [3, 1, 2]
    assert starts(lengths) == [0, 3, 4, 6]
    assert [locate(lengths, i) for i in range(6)] == [(0, 0), (0, 1), (0, 2), (1, 0), (2, 0), (2, 1)]
    assert locate(lengths, 6) is None


def test_stages_may_be_numbered():
    assert [stage.name for stage in StagePlan.of({1: {"steps": 3}, 2: {"steps": 4}}).stages] == ["1", "2"]


def test_stages_can_be_tried_out():
    plan = plan_of(composed("progressive", "debug=smoke"))
    assert [stage.name for stage in plan.stages] == ["low", "high", "long"] and plan.steps == 6
    for wrong in ("0", "abc"):
        with pytest.raises(ValueError, match=f"stage_steps={wrong}; expected a whole number of 1 or more"):
            plan_of(composed("progressive", f"stage_steps={wrong}"))


def test_plan_from_plain_values():
    values = {"a": {"steps": 3, "lr": 0.1}, "b": {"steps": 4, "data": {"frames": 9}, "train": ["layers"]}}
    plan = StagePlan.of(values)
    assert [stage.name for stage in plan.stages] == ["a", "b"] and plan.steps == 7
    assert plan.stages[0].data == {} and plan.stages[1].data == {"frames": 9} and plan.stages[1].train == ["layers"]


@pytest.mark.parametrize(
    "stage, message",
    [({"steps": 0}, "stages.a.steps=0; expected a whole number of 1 or more"),
     ({}, "stages.a needs steps"),
     ({"steps": 2, "lr": 0.0}, "stages.a.lr=0.0; expected a number above 0"),
     ({"steps": 2, "lr": float("inf")}, "stages.a.lr=inf; expected a number above 0"),
     ({"steps": 2, "patience": 0}, "stages.a.patience=0"),
     ({"steps": 2, "lr": "fast"}, "stages.a.lr=fast; expected a number above 0"),
     ({"steps": 2, "train": "head"}, r"stages.a.train=head; expected beginnings of names, such as \[head\]"),
     ({"steps": 2, "train": []}, "stages.a.train=.*; expected beginnings of names"),
     ({"steps": 2, "data": None}, "stages.a.data=None; expected keys and values of data"),
     ({"steps": 2, "speed": 3}, "stages.a has no speed; its keys are data, lr, patience, steps, train, warmup")],
)  # fmt: skip
def test_wrong_stages_are_refused(stage, message):
    with pytest.raises(ValueError, match=message):
        StagePlan.of({"a": stage})


def test_a_stage_can_be_left_out_and_has_a_name_of_its_own():
    assert [stage.name for stage in StagePlan.of({"a": None, "b": {"steps": 3}}).stages] == ["b"]
    with pytest.raises(ValueError, match="stages: none is left; give one"):
        StagePlan.of({"a": None})
    for name in ("last", "best"):  # whose checkpoint would take the stage's place
        with pytest.raises(ValueError, match=f"stages.{name}: .*{name}.ckpt"):
            StagePlan.of({name: {"steps": 3}})


def test_smaller_clips_have_the_first_scales():
    config = TokenizerConfig(bits=8, scales=(1, 2, 4, 8), patch=4, widths=(8, 8), scale_bits=(2, 4, 6, 8))
    assert config.schedule(5, 64, 64).grids == ((1, 1), (2, 2), (4, 4), (8, 8))
    assert config.schedule(5, 32, 32).grids == ((1, 1), (2, 2), (4, 4))
    assert config.schedule(5, 32, 32).bits == (2, 4, 8), "what the finest scale codes, it codes with all bits"
    assert config.schedule(5, 48, 64).grids == ((1, 1), (2, 3), (4, 5), (6, 8))
    with pytest.raises(ValueError, match="at most 64 pixels, got 72 x 72"):
        config.schedule(5, 72, 72)


# --- trainings -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(pair, tmp_path_factory) -> Path:
    """The folder of a run of three stages."""
    root = tmp_path_factory.mktemp("stages")
    assert fit_stages(root, pair.tokenizer, *PLAN) == 0
    return root / "run"


def test_one_stage_is_the_plain_training(pair, tmp_path):
    plain = ["recipe.generator.steps=5", "data.image_share=0.5"]
    assert fit_stages(tmp_path, pair.tokenizer, *plain, name="plain", conf="stage2_generator") == 0
    assert fit_stages(tmp_path, pair.tokenizer, "+stages.only={steps:5,data:{image_share:0.5}}", name="staged") == 0
    assert losses(tmp_path / "staged") == losses(tmp_path / "plain")
    a, b = weights(tmp_path / "staged"), weights(tmp_path / "plain")
    assert all(torch.equal(a[name], b[name]) for name in b)


def test_each_stage_has_its_clips_and_its_learning_rate(whole):
    assert column(whole, "stage") == [0] * 4 + [1] * 3 + [2] * 3
    lr = learning_rates(whole)
    assert lr[:2] == pytest.approx([0.01, 0.02]), "the first stage's own peak and warm-up"
    assert lr[3] == pytest.approx(0.02 * (0.01 + 0.99 / 2)), "half of its own cosine"
    assert lr[4] == pytest.approx(8e-3 / 40) and lr[7] == pytest.approx(8e-3 / 40), "then the config's, anew with each stage"
    for name, frames, side in (("low", 5, 16), ("high", 5, 32), ("long", 9, 32)):
        checkpoint = read_checkpoint(whole / "checkpoints" / f"{name}.ckpt", "generator")
        clip = checkpoint["hyper_parameters"]["clip"]
        assert (clip["frames"], clip["height"], clip["width"]) == (frames, side, side)
        assert (whole / f"encoded_clips_{name}" / "manifest.json").exists()
    assert not (whole / "checkpoints" / "best.ckpt").exists()


@pytest.mark.parametrize("step", [2, 4, 5, 7])
def test_a_resumed_run_knows_its_stage_and_its_place(step, whole, pair, tmp_path, monkeypatch):
    """A run stopped within a stage or at its end, and resumed, equals an uninterrupted run to the last bit."""
    words = [*PLAN, "callbacks.last.every=1"]
    interrupt_after(step + 1, monkeypatch)
    assert fit_stages(tmp_path, pair.tokenizer, *words) == 1
    monkeypatch.undo()
    assert fit_stages(tmp_path, pair.tokenizer, *words, "ckpt=last") == 0
    assert losses(tmp_path / "run", start=1) == losses(whole)[step:]
    assert learning_rates(tmp_path / "run", start=1) == learning_rates(whole)[step:]
    a, b = (read_checkpoint(run / "checkpoints" / "last.ckpt", "generator") for run in (whole, tmp_path / "run"))
    for key in ("state_dict", "ema"):
        assert all(torch.equal(a[key][name], b[key][name]) for name in a[key])


def test_other_steps_of_a_stage_that_is_over_change_nothing(whole, pair, tmp_path, monkeypatch):
    interrupt_after(6, monkeypatch)
    assert fit_stages(tmp_path, pair.tokenizer, *PLAN, "callbacks.last.every=1") == 1
    monkeypatch.undo()
    longer = [PLAN[0].replace("steps:4", "steps:9"), *PLAN[1:]]
    assert fit_stages(tmp_path, pair.tokenizer, *longer, "ckpt=last") == 0
    assert losses(tmp_path / "run", start=1) == losses(whole)[5:]


@pytest.mark.parametrize("step", [4, 6])
def test_a_stage_that_is_shortened_below_where_it_was_costs_the_others_no_step(step, pair, tmp_path, monkeypatch):
    """A run that is in the stage ends it at once; for a run that is past it nothing changes."""
    interrupt_after(step, monkeypatch)
    assert fit_stages(tmp_path, pair.tokenizer, *PLAN, "callbacks.last.every=1") == 1
    monkeypatch.undo()
    shorter = [PLAN[0].replace("steps:4", "steps:2"), *PLAN[1:]]
    assert fit_stages(tmp_path, pair.tokenizer, *shorter, "ckpt=last") == 0
    assert column(tmp_path / "run", "stage", start=1) == {4: [1] * 3 + [2] * 3, 6: [1] * 2 + [2] * 3}[step]


def test_a_stage_can_end_on_a_plateau(pair, tmp_path, monkeypatch, caplog):
    """With a tiny learning rate validations do not improve, so the stage ends; a resumed run keeps its end."""
    plan = ["+stages.stuck={steps:40,lr:1.0e-30,patience:2}", "+stages.then={steps:3,data:{frames:9}}"]
    words = [*plan, "trainer.val_check_interval=2", "callbacks.last.every=1"]
    assert fit_stages(tmp_path, pair.tokenizer, *words, name="whole") == 0
    stages = column(tmp_path / "whole", "stage")
    stuck = stages.count(0)
    assert 6 <= stuck < 40 and stages == [0] * stuck + [1] * 3
    assert "val/loss is no better than 2 validations ago" in caplog.text
    interrupt_after(stuck, monkeypatch)  # its end is decided, the next stage has not begun
    assert fit_stages(tmp_path, pair.tokenizer, *words, name="resumed") == 1
    monkeypatch.undo()
    assert fit_stages(tmp_path, pair.tokenizer, *words, "ckpt=last", name="resumed") == 0
    assert losses(tmp_path / "resumed", start=1) == losses(tmp_path / "whole")[stuck - 1 :]
    assert fit_stages(tmp_path, pair.tokenizer, *words, "ckpt=last", name="resumed") == 0, "a finished one is left as it is"
    assert read_checkpoint(tmp_path / "resumed/checkpoints/last.ckpt", "generator")["global_step"] == stuck + 3


def test_a_run_that_ended_on_a_plateau_says_why_it_does_not_go_on(pair, tmp_path, caplog):
    words = ["+stages.stuck={steps:40,lr:1.0e-30,patience:1}", "trainer.val_check_interval=2"]
    assert fit_stages(tmp_path, pair.tokenizer, *words) == 0
    assert "to continue, add a stage" not in caplog.text
    patient = [words[0].replace("patience:1", "patience:9"), words[1]]
    assert fit_stages(tmp_path, pair.tokenizer, *patient, "ckpt=last") == 0
    count = len(losses(tmp_path / "run"))
    assert f"stage stuck, the last, ended on its plateau after {count} of 40 batches; to continue, add a stage" in caplog.text
    further = "+stages.then={steps:3}"
    assert fit_stages(tmp_path, pair.tokenizer, *patient, further, "ckpt=last") == 0
    assert read_checkpoint(tmp_path / "run/checkpoints/last.ckpt", "generator")["global_step"] == count + 3


def test_a_stage_can_leave_parts_as_they_are(pair, tmp_path):
    plan = ["+stages.all={steps:2}", "+stages.some={steps:2,train:[head,layers.1.]}", "+stages.again={steps:1}"]
    assert fit_stages(tmp_path, pair.tokenizer, *plan) == 0
    all_, some, again = (weights(tmp_path / "run", name) for name in ("all", "some", "again"))
    for name in all_:
        learns = name.startswith(("model.head", "model.layers.1."))
        assert torch.equal(all_[name], some[name]) != learns, name
        assert "condition" in name or not torch.equal(some[name], again[name]), name


@pytest.mark.parametrize("train", [None, ["head"]])
def test_ddp_waits_for_no_gradients_of_parts_that_do_not_learn(train, tmp_path):
    plan = SimpleNamespace(stages=[SimpleNamespace(name="a", train=train)])
    data = mock.create_autospec(StagedClips, instance=True, plan=plan)
    trainer, module = SimpleNamespace(strategy=DDPStrategy(), datamodule=data), SimpleNamespace(model=nn.ModuleDict())
    module.model["head"] = nn.Linear(2, 2)
    StageSwitch(tmp_path, "val/loss").setup(trainer, module, "fit")
    assert trainer.strategy._ddp_kwargs == ({} if train is None else {"find_unused_parameters": True})


def test_wrong_plans_of_a_run_are_told(pair, tmp_path, capsys):
    for plan, told in (
        (["+stages.a={steps:2,train:[heads]}"], "stages.a.train: no parameter's name begins with heads; the parts are"),
        (["+stages.a={steps:2}", "+stages.b={steps:2,data:{height:30}}"], "multiples of 8, got 30 x 32"),
        (["+stages.a={steps:2,data:{batch_tokens:30}}"], "data.batch_tokens=30; a clip has 42"),
        (["+stages.a={steps:2,data:{hight:16}}"], "hight"),
    ):
        assert fit_stages(tmp_path, pair.tokenizer, *plan, "overwrite=true") == 1
        error = capsys.readouterr().err
        assert told in error and "Traceback" not in error


def test_an_adaptive_loss_weighs_by_a_layer_that_need_not_learn(tmp_path):
    words = ["loss.adversarial.weight=0.1", "loss.adversarial.adaptive=true", "callbacks.checkpoint=null"]
    switch = "+callbacks.stage_switch={_target_:callbacks.StageSwitch,folder:'${folder}/checkpoints',monitor:val/psnr}"
    assert fit_tokenizer(tmp_path, *words, switch, "stages={a:{steps:2,train:[encoder]}}") == 0


def test_stages_and_their_switch_come_together(pair, tmp_path, capsys):
    stage = "+stages.a={steps:2}"
    for words, told in (
        ([stage, "callbacks.stage_switch=null"], "stages need the callback that moves on"),
        (["stages=null"], "callbacks.stage_switch is for trainings in stages"),
    ):
        own = ["~stages.low", "~stages.high", "~stages.long"] if stage in words else []
        run = [f"root={tmp_path}", "name=run", f"tokenizer_ckpt={pair.tokenizer}", "overwrite=true", *own]
        assert main(["fit", "conf=progressive", *run, *CLIP, *GENERATOR, *QUICK, *words]) == 1
        error = capsys.readouterr().err
        assert told in error and "Traceback" not in error


def test_a_budget_of_tokens_makes_the_batch(pair, tmp_path, caplog):
    plan = ["+stages.low={steps:1,data:{height:16,width:16}}", "+stages.high={steps:1}"]
    words = ["data.batch_tokens=100", "trainer.accumulate_grad_batches=2"]
    assert fit_stages(tmp_path, pair.tokenizer, *plan, *words) == 0
    assert "low: 2 latent frames x scales 1 2 = 10 tokens in 4 steps, 20 clips a step" in caplog.text
    assert "high: 2 latent frames x scales 1 2 4 = 42 tokens in 6 steps, 4 clips a step" in caplog.text


def test_a_tokenizer_in_stages_goes_on_too(tmp_path, monkeypatch):
    def fit(name, *words):
        plan = "stages={low:{steps:3,data:{height:16,width:16}},high:{steps:2,lr:1e-3}}"
        switch = "_target_:callbacks.StageSwitch,folder:${folder}/checkpoints,monitor:val/psnr,mode:max"
        run = [
            f"root={tmp_path}",
            f"name={name}",
            plan,
            f"+callbacks.stage_switch={{{switch}}}",
            "optimizer.accumulate=2",
            "callbacks.last.every=1",
        ]
        return main(["fit", "conf=stage1_tokenizer", *run, *CLIP, *TOKENIZER, *QUICK, *ALIKE, *words])

    assert fit("whole") == 0
    interrupt_after(2, monkeypatch)
    assert fit("resumed") == 1
    monkeypatch.undo()
    assert fit("resumed", "ckpt=last") == 0
    assert losses(tmp_path / "whole")[2:] == losses(tmp_path / "resumed", start=1)
    assert column(tmp_path / "whole", "stage") == [0] * 6 + [1] * 4, "logged with each batch"


def test_learning_rates_follow_steps_of_several_batches(tmp_path):
    plan = "stages={low:{steps:3,data:{height:16,width:16}},high:{steps:2,lr:1e-3},then:{steps:1,lr:1e-3,warmup:0}}"
    switch = (
        "+callbacks.stage_switch={_target_:callbacks.StageSwitch,folder:'${folder}/checkpoints',monitor:val/psnr,mode:max}"
    )
    assert fit_tokenizer(tmp_path, plan, switch, "optimizer.accumulate=2", "optimizer.warmup=4", *ALIKE, name="run") == 0
    with open(tmp_path / "run/logs/version_0/metrics.csv") as log:
        name = next(key for key in csv.DictReader(log).fieldnames if key.startswith("lr"))
    peak = composed("stage1_tokenizer", "size=tiny").optimizer.lr
    steps = [peak * share for share in (0.25, 0.5, 0.75)] + [1e-3 * share for share in (0.25, 0.5, 1)]
    assert column(tmp_path / "run", name) == pytest.approx([rate for rate in steps for _ in range(2)])


def test_each_stage_has_its_own_plateau(monkeypatch):
    switch = StageSwitch("folder", "val/loss")
    switch.best, switch.waited = 0.5, 1
    trainer = SimpleNamespace(datamodule=SimpleNamespace(stage=0, enter=lambda stage: None))
    monkeypatch.setattr(switch, "_enter", lambda *_: None)
    switch.on_train_batch_start(trainer, None, {"stage": 0}, 0)
    assert (switch.best, switch.waited) == (0.5, 1)
    switch.on_train_batch_start(trainer, None, {"stage": 1}, 1)
    assert (switch.best, switch.waited) == (float("inf"), 0)


def test_a_run_that_goes_on_with_less_patience_has_lost_it():
    """Validations that were waited for count, and the end that is decided stays, although other batches are under way."""
    switch = StageSwitch("folder", "val/loss")
    switch.load_state_dict({"best": 0.5, "waited": 4})
    data = StagedClips(StagePlan((Stage("a", 9, patience=2), Stage("b", 9))), [], [9, 9])
    metrics = {"val/loss": torch.tensor(0.7)}
    trainer = SimpleNamespace(datamodule=data, sanity_checking=False, callback_metrics=metrics, accumulate_grad_batches=1)
    module = SimpleNamespace(hparams=SimpleNamespace(optimizer={}))
    for data.handed_out in (5, 6):
        switch.on_validation_end(trainer, module)
        assert data.ended == {0: 5}


def test_a_stage_that_ends_early_ends_with_a_whole_step_and_not_beyond_its_own():
    for handed_out, length in ((7, 4), (8, 4), (13, 9)):
        data = StagedClips(StagePlan((Stage("a", 2), Stage("b", 5), Stage("c", 2))), [], [4, 9, 4])
        data.enter(1)
        assert data.ended == {0: 4}, "the one before is over"
        data.handed_out = handed_out
        data.end_stage(2)
        assert data.batches == [4, length, 4]


def test_batches_are_of_one_stage_after_another_from_where_a_training_is():
    """The last stage is ended within its first step of two batches; the one to validate on is the one that is trained."""
    parts = [SimpleNamespace(val_dataloader=lambda stage=stage: [stage]) for stage in range(3)]
    for part in parts:
        part.train_dataloader = lambda part=part: ({"n": n} for n in count(part.batches_done))
    data = StagedClips(StagePlan((Stage("a", 3), Stage("b", 2), Stage("c", 4))), parts, [3, 2, 4])
    data.batches_done = 1
    batches = iter(data.train_dataloader())
    seen = [next(batches) for _ in range(5)]
    data.enter(2)
    data.end_stage(2)
    seen.extend(batches)
    assert [(batch["stage"], batch["n"]) for batch in seen] == [(0, 1), (0, 2), (1, 0), (1, 1), (2, 0), (2, 1)]
    assert list(data.val_dataloader()) == [2]


def test_a_batch_is_left_out_of_its_own_stage_under_its_number_there():
    left = [[], []]
    parts = [SimpleNamespace(position_of=lambda n: (0, 10 * n), leave_out=numbers.extend) for numbers in left]
    data = StagedClips(StagePlan((Stage("a", 3), Stage("b", 2))), parts, [3, 2])
    places = [data.position_of(batch) for batch in range(5)]
    assert places == [(0, 0), (0, 10), (0, 20), (1, 0), (1, 10)]
    data.leave_out(places[2:4])
    assert left == [[(0, 20)], [(0, 0)]]


def test_each_stage_leaves_out_again_what_it_left_out_and_tells_what_has_changed():
    told = [[], []]
    parts = [SimpleNamespace(left_out=frozenset({9}), tell_changes=changes.append) for changes in told]
    data = StagedClips(StagePlan((Stage("a", 4), Stage("b", 4))), parts, [4, 4])
    state = {"batches_done": 5, "stage": 1, "ended": {0: 3}, "left_out": [[], [2]], "settings": [{"fps": 8}, {"fps": 12}]}
    data.load_state_dict(state)
    assert [part.left_out for part in parts] == [{9}, {2, 9}] and told == [[{"fps": 8}], [{"fps": 12}]]
    assert (data.stage, data.batches_done, data.batches) == (1, 5, [3, 4])


def test_each_stage_needs_a_clip_to_validate_on_for_each_device():
    parts = [ClipDataModule(Shapes, 5, 32, 32, 8.0, batch_size=1, val_clips=clips, workers=0) for clips in (2, 1)]
    data = StagedClips(StagePlan((Stage("a", 1), Stage("b", 1))), parts, [1, 1])
    data.trainer = SimpleNamespace(world_size=2, global_rank=0)
    with pytest.raises(ValueError, match="data.val_clips=1 leaves some of the 2 devices without a clip"):
        data.setup("fit")


def test_of_all_stages_each_thing_is_told_once():
    a = SimpleNamespace(unreadable=["x.mp4", "y.mp4"], about="shapes", captions={"a ball"})
    b = SimpleNamespace(unreadable=["y.mp4", "z.mp4"], about="films", captions={"a cat"})
    data = StagedClips(StagePlan((Stage("a", 1), Stage("b", 1), Stage("c", 1))), [a, b, a], [1, 1, 1])
    assert data.unreadable == ["x.mp4", "y.mp4", "z.mp4"]
    assert data.about == "shapes; then films" and data.captions == {"a ball", "a cat"}


@pytest.mark.parametrize("mode, worse", [("min", 0.7), ("max", 0.3)])
def test_what_is_better_depends_on_the_metric(mode, worse):
    switch = StageSwitch("folder", "val/score", mode)
    data = StagedClips(StagePlan((Stage("a", 9, patience=2),)), [], [9])
    trainer = SimpleNamespace(datamodule=data, sanity_checking=False, accumulate_grad_batches=1)
    module = SimpleNamespace(hparams=SimpleNamespace(optimizer={}))
    for score, waited in ((0.5, 0), (worse, 1), (1 - worse, 0), (1 - worse, 1), (worse, 2)):
        trainer.callback_metrics = {"val/score": torch.tensor(score)}
        switch.on_validation_end(trainer, module)
        assert switch.waited == waited and bool(data.ended) == (waited == 2)


def test_what_a_run_in_stages_cannot_go_on_with_is_told(whole, pair, tmp_path, monkeypatch, capsys):
    interrupt_after(6, monkeypatch)  # in the second
    assert fit_stages(tmp_path, pair.tokenizer, *PLAN, "callbacks.last.every=1") == 1
    monkeypatch.undo()
    capsys.readouterr()
    for words, told in (
        (
            [*PLAN, "trainer.accumulate_grad_batches=2"],
            "a step had 1 batches on each device, now 2: in stages that cannot change",
        ),
        (PLAN[1:], "the stages begun so far were low, high, now high, long: those must stay"),
    ):
        assert fit_stages(tmp_path, pair.tokenizer, *words, "ckpt=last") == 1
        error = capsys.readouterr().err
        assert told in error and "Traceback" not in error
    left = (tmp_path / "run" / "checkpoints" / "last.ckpt").read_bytes()
    other = f"ckpt={whole / 'checkpoints' / 'last.ckpt'}"
    for words in ([*PLAN, "trainer.accumulate_grad_batches=2"], PLAN[1:]):
        assert fit_stages(tmp_path, pair.tokenizer, *words, other, "overwrite=true") == 1
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").read_bytes() == left, "a refused command changes nothing"
    assert fit_stages(tmp_path, pair.tokenizer, *PLAN[:2], "ckpt=last") == 0, "one that has not begun may go"


def test_a_run_in_stages_and_one_without_do_not_go_on_with_each_other(whole, pair, tmp_path, capsys):
    last = whole / "checkpoints" / "last.ckpt"
    assert fit_stages(tmp_path, pair.tokenizer, f"ckpt={last}", conf="stage2_generator") == 1
    assert "is of a training in stages, this one is without stages" in capsys.readouterr().err
    assert fit_stages(tmp_path, pair.tokenizer, *PLAN, f"ckpt={pair.generator}") == 1
    assert "is of a training without stages, this one is in stages" in capsys.readouterr().err


def test_what_a_stage_leaves_can_be_sampled(whole, tmp_path):
    generator, tokenizer = load_generator(whole / "checkpoints" / "low.ckpt")
    assert generator.held_out == tokenizer.held_out is not None, "so that it is told when others are scored"
    assert tokenizer.model.schedule(5, 16, 16).scales == generator.model.config.scales - 1
    words = ["prompt=a red ball", f"root={tmp_path}", "name=video"]
    assert main(["generate", f"ckpt={whole / 'checkpoints' / 'low.ckpt'}", *words]) == 0
    assert len(list((tmp_path / "video").rglob("*.mp4"))) == 1


def test_a_checkpoint_knows_the_clips_of_the_stage_that_it_is_of():
    staged = {"stage": 1, "settings": [{"held_out": "a"}, {"held_out": "b"}, {"held_out": "c"}]}
    assert data_settings({STAGED: staged}) == {"held_out": "b"}
    assert data_settings({STAGED: {"stage": 1}}) == data_settings({}) == {}


def test_a_stage_is_named_by_itself():
    with pytest.raises(ValueError, match="stages.x.warmup=-1"):
        Stage("x", 3, warmup=-1)


# --- stage by stage --------------------------------------------------------------------------------------------------


def test_each_run_starts_with_the_moving_average_of_the_one_before(pair, tmp_path, monkeypatch):
    """Stages 2, 3 and 4 as runs of their own, which find each other's checkpoints: more pixels, so one more scale, then more
    frames."""
    begun, tell = [], RunSummary.on_fit_start

    def begin(self, trainer, module):
        begun.append((module.schedule, {f"model.{k}": w.clone() for k, w in module.model.state_dict().items()}))
        tell(self, trainer, module)

    monkeypatch.setattr(RunSummary, "on_fit_start", begin)
    words = [f"root={tmp_path}", f"tokenizer_ckpt={pair.tokenizer}", *CLIP, *GENERATOR, *QUICK, *ALIKE]
    plan = {
        "stage2_generator": ["data.height=16", "data.width=16", "data.image_share=0.2"],
        "stage3_generator_highres": [],
        "stage4_generator_long": ["data.frames=9"],
    }
    for conf, clip in plan.items():
        assert main(["fit", f"conf={conf}", *words, "recipe.generator.steps=2", *clip]) == 0
    assert [(schedule.scales, schedule.latent_frames) for schedule, _ in begun] == [(2, 2), (3, 2), (3, 3)]
    for conf, (_, first) in zip(plan, begun[1:]):
        left = read_checkpoint(tmp_path / conf / "checkpoints" / "last.ckpt", "generator")
        assert all(torch.equal(first[name], average) for name, average in left["ema"].items())
        assert any(not torch.equal(left["state_dict"][name], average) for name, average in left["ema"].items())


def test_a_plan_is_shortened_stage_by_stage():
    assert [stage.steps for stage in StagePlan((Stage("a", 1), Stage("b", 9))).shortened(5).stages] == [1, 5]
