"""The verb `doctor`: reports on a machine, and on a training before it begins."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from hydra import initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from kit.build import accumulate_of, check_batch_parts
from kit.cli import main
from kit.confs import CONF
from kit.evaluation.detectors import I3D_FILE
from kit.generator.transformer import Generator
from kit.planning.doctor import (
    check_gpus,
    check_perceptual,
    doctor,
    hardware,
    metric_networks,
    parameters,
    presets,
    problems,
    training_config,
    versions,
)
from kit.planning.plan import batches_of_all, costs, generator_config, planned_tokenizer
from kit.resolvers import batches_of, part_of, register_resolvers
from kit.tokenizer import Tokenizer, TokenizerConfig
from kit.values import equal_parts, plain
from kit.words import at_commas
from tests.data.videos import write, write_bad
from tests.fixtures import CLIP, TOKENIZER, composed, fit_tokenizer

SIZES = sorted(path.stem for path in (CONF / "size").glob("*.yaml"))


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Changes to an empty folder, which has no runs."""
    monkeypatch.chdir(tmp_path)
    register_resolvers()


def test_doctor_reports_and_finds_a_configs_problem(capsys, monkeypatch):
    monkeypatch.setattr("kit.machine.can_compile", lambda: False)  # a first compile takes half a minute
    assert main(["doctor", "check=stage2_generator"]) == 0
    text = capsys.readouterr().out
    assert all(size in text for size in SIZES) and "torch.compile does not work here" in " ".join(text.split())
    assert "no checkpoint at runs/stage1_tokenizer/checkpoints/last.ckpt" in text
    assert main(["doctor", "check=generate"]) == 1
    assert "check=generate: not a training conf; choose from ablation, paper_plan" in capsys.readouterr().err


def test_what_the_machine_has_is_told_in_its_units(monkeypatch):
    monkeypatch.setattr("os.sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 2_000_000}.get)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(total=9e9, used=6e9, free=3e9))
    for name, found in {"can_compile": True, "fast_bfloat16": False, "precision": "32-true", "machine_size": "tiny"}.items():
        monkeypatch.setattr(f"kit.machine.{name}", lambda found=found: found)
    facts = hardware()
    assert [facts[name] for name in ("memory", "free disk", "GPU")] == ["8.2 GB", "3.0 GB", "none that torch sees"]
    assert facts["precision"] == "32-true (bfloat16 is not fast here)" and facts["torch.compile"] == "works"


def test_what_is_not_installed_is_told_with_what_needs_it(monkeypatch):
    monkeypatch.setattr("kit.machine.installed_version", {"torch": "2.13.0"}.get)
    found = [versions()[name] for name in ("torch", "wandb", "xformers")]
    assert found == ["2.13.0", "not installed (needed for logger=wandb)", "not installed (optional)"]


def test_networks_are_told_where_they_are_or_how_to_get_them(tmp_path, monkeypatch):
    monkeypatch.setattr("kit.machine.cache_folder", lambda: tmp_path)
    monkeypatch.setattr("kit.planning.doctor.vgg16_path", lambda: tmp_path / "vgg16.pth")
    assert all(told.startswith("no weights yet: ") for told in metric_networks().values())
    for path in (files := [tmp_path / I3D_FILE, tmp_path / "vgg16.pth"]):
        path.touch()
    assert list(metric_networks().values()) == list(map(str, files))


def test_presets_are_listed_with_their_memory(monkeypatch):
    """A weight is trained in 20 bytes and used in 4; a generator's training holds the tokenizer too."""
    monkeypatch.setattr("kit.planning.doctor.parameters", lambda size: (10**9, 10**9 * (5 if size == "tiny" else 3)))
    *_, last, _ = presets()
    assert last.split() == "tiny 1000.0 M 5000.0 M 20.00 GB 104.00 GB 24.00 GB".split()


def test_parameters_are_those_of_the_models():
    cfg = composed("stage2_generator", "size=tiny")
    tokenizer = TokenizerConfig.from_dict(plain(cfg.tokenizer))
    with torch.device("meta"):
        models = Tokenizer(tokenizer), Generator(generator_config(cfg, tokenizer))
    with initialize_config_dir(str(CONF), version_base="1.3"):
        assert parameters("tiny") == tuple(sum(p.numel() for p in model.parameters()) for model in models)


@pytest.mark.parametrize("conf, stages", [("progressive", 3), ("stage1_tokenizer", 1)])
def test_the_doctor_tells_what_each_stage_costs(conf, stages, capsys):
    assert main(["doctor", f"check={conf}", "gpus=[1,16]"]) == 0
    table = capsys.readouterr().out.split("cost, on paper, of ")[1].splitlines()[1:]
    figures = [[float(word.replace(",", "")) for word in line.split()[-3:]] for line in table[1 : 1 + stages]]
    assert {len(line) for line in table[1 : 1 + stages]} == {len(table[0])}, "figures stand under their heads"
    hours = [figure[0] for figure in figures]
    assert all(0 < held < most for _, held, most in figures)
    assert min(hours) > 0 and table[1 + stages].endswith(" on 16")
    assert float(table[1 + stages].split()[2].replace(",", "")) == pytest.approx(sum(hours), rel=0.01)


def test_the_doctor_costs_presets(capsys):
    assert main(["doctor", "check=stage1_tokenizer", "sizes=[tiny,small]", "gb=12"]) == 0
    tables = capsys.readouterr().out.split("cost, on paper, of ")[1:]
    names = [f"conf=stage1_tokenizer size={size} fits=12GB" for size in ("tiny", "small")]
    assert [table.splitlines()[0] for table in tables] == names
    rows = [table.splitlines()[2].split() for table in tables]
    assert float(rows[0][-2]) < float(rows[1][-2]) and [row[4] for row in rows] == ["8", "16"], (
        "as many as without, and 8 at once"
    )


@pytest.mark.parametrize(
    "check, words, problem",
    [
        ("stage1_tokenizer", "data=clips,data.root=nowhere", "data: no folder nowhere"),
        ("stage1_tokenizer", "loss.perceptual.weight=1,loss.perceptual.weights=nowhere", "loss.perceptual: no file nowhere"),
        ("stage1_tokenizer", "init=inflate,init.ckpt=nowhere.ckpt", "init.ckpt: no checkpoint at nowhere.ckpt"),
        ("stage1_tokenizer", "init=weights,init.ckpt=.", "init.ckpt: no checkpoint at [.]"),
        ("stage2_generator", "condition.kind=words", "condition: condition.kind=words; expected one of: text, class"),
        ("stage2_generator", "condition.length=0", "condition: condition.length=0; expected a whole number of 1 or more"),
        ("progressive", "callbacks.stage_switch=null", "stages need the callback that moves on"),
        ("stage2_generator", "tokenizer_ckpt=null", "tokenizer_ckpt=null: a generator is trained on a tokenizer's bits"),
        ("stage1_tokenizer", "+tokenizer.depth=3", "tokenizer has no depth; its keys are amplitude, "),
        ("stage1_tokenizer", "tokenizer.scales=[1,4,2]", r"tokenizer.scales=\[1, 4, 2\]; expected sides that rise"),
        (
            "stage2_generator",
            "trainer=fsdp,trainer.strategy.replicas=0,trainer.devices=2",
            "trainer: trainer.strategy.replicas=0; expected a whole number of 1 or more",
        ),
    ],
)
def test_what_a_training_would_stop_at(check, words, problem):
    found = problems(training_config(check, at_commas(words)))
    assert any(re.match(f".*{problem}", told) for told in found)


@pytest.mark.parametrize(
    "check, words",
    [("stage2_generator", ["data=clips", "data.root=nowhere"]), ("progressive", ["stages.low.steps=0"])],
)
def test_what_is_wrong_with_data_or_stages_is_no_problem_of_the_condition(check, words):
    assert not [problem for problem in problems(training_config(check, words)) if problem.startswith("condition")]


def test_weights_of_a_perceptual_loss_are_needed_if_it_has_a_weight(monkeypatch):
    monkeypatch.setattr("kit.planning.doctor.load_perceptual", Mock(side_effect=FileNotFoundError))
    check_perceptual(composed("stage1_tokenizer", "loss.perceptual.weight=0"))
    with pytest.raises(FileNotFoundError):
        check_perceptual(composed("stage1_tokenizer", "loss.perceptual.weight=1"))


@pytest.fixture
def told(monkeypatch, capsys):
    """Returns what the doctor tells of a training, given problems that are found before its costs meet an error."""
    for name in ("hardware", "versions", "metric_networks", "presets"):
        monkeypatch.setattr(f"kit.planning.doctor.{name}", dict)
    monkeypatch.setattr("kit.planning.doctor.costs", Mock(side_effect=ValueError("too wide")))

    def of(found: list[str], *words: str) -> str:
        monkeypatch.setattr("kit.planning.doctor.problems", lambda _: found)
        doctor(composed("doctor", *words))
        return capsys.readouterr().out.split("memory")[1].strip()

    return of


def test_what_the_costs_meet_is_a_problem_if_there_is_no_other(told):
    name = "conf=stage1_tokenizer size=tiny"
    words = ("check=stage1_tokenizer", "sizes=tiny")
    assert told([], *words) == f"{name}: \n  - cost: too wide"
    assert told(["data: none"], *words) == f"{name}: \n  - data: none"


def test_a_training_is_looked_at_in_each_size_with_the_words_and_the_fit_that_are_given(told, monkeypatch):
    asked = []
    monkeypatch.setattr("kit.planning.doctor.training_config", lambda *given: asked.append(given))
    told([], "check=x", "words=[debug]", "sizes=[base,L]", "gb=24")
    assert asked == [("x", ["debug", f"size={size}", "fits=24GB"]) for size in ("base", "L")]


def test_without_a_training_to_check_none_is_told_of(told):
    assert told([]) == ""


def test_problems_are_listed_and_words_given_in_brackets(capsys):
    assert main(["doctor", "check=stage1_tokenizer", "words=[tokenizer.scales=[1,4,2],init=weights,init.ckpt=nowhere]"]) == 0
    told = capsys.readouterr().out
    assert "\n  - tokenizer: tokenizer.scales=[1, 4, 2]; expected sides that rise" in told
    assert "\n  - init.ckpt: no checkpoint at nowhere" in told and "no problem found" not in told


def test_a_bucket_that_is_none_is_one_problem_among_others():
    words = ["data.buckets=[5x32]", "init=weights", "init.ckpt=nowhere.ckpt"]
    first, *others = problems(training_config("stage1_tokenizer", words))
    assert first == "data: data.buckets has 5x32; expected FRAMESxHEIGHTxWIDTH, such as 17x96x160"
    assert "init.ckpt: no checkpoint at nowhere.ckpt" in others


def test_classes_that_a_folder_lacks_are_told(tmp_path):
    write(tmp_path / "a.mp4"), write(tmp_path / "b.mp4")
    words = ["data=clips", f"data.root={tmp_path}", "data.source.label_from=none", "condition.kind=class"]
    with pytest.warns(UserWarning, match="neither captions nor classes"):
        told = problems(training_config("stage2_generator", words))
    assert any(
        problem.startswith("condition: condition kind 'class' needs classes, but the data has none") for problem in told
    )


def test_files_that_cannot_be_read_are_counted(tmp_path, capsys):
    write(tmp_path / "clips" / "a.mp4")
    write_bad(tmp_path / "clips" / "b.mp4"), write_bad(tmp_path / "clips" / "c.mp4")
    assert main(["doctor", "check=stage1_tokenizer", f"words=[data=clips,data.root={tmp_path / 'clips'}]"]) == 0
    told = capsys.readouterr().out
    assert f"  - data: 1 of the files read so far cannot be read, such as {tmp_path / 'clips' / 'b.mp4'}; " in told


@pytest.mark.parametrize(
    "words, said",
    [
        ("data.batch_size=abc", "data.batch_size=abc; expected a number such as 8"),
        ("size=huge", "no size=huge; choose from 4B, L, XL, base, small, tiny"),
        ("method=maskd", "no method=maskd; choose from center, "),
        ("data.heigth=64", "did you mean data.height"),
    ],
)
def test_words_that_do_not_fit_are_an_error(words, said, capsys):
    assert main(["doctor", "check=stage2_generator", f"words=[{words}]"]) == 1
    assert re.search(said, capsys.readouterr().err)


@pytest.mark.parametrize(
    "word, said",
    [
        ("utilisation=35", "utilisation=35; expected a share, above 0 and up to 1"),
        ("tflops=0", "tflops=0; expected TFLOP/s, a number above 0"),
        ("gpus=[1,0]", "gpus=0; expected a whole number of 1 or more"),
        ("gpus=null", "gpus=null; expected a list of whole numbers"),
    ],
)
def test_numbers_of_gpus_that_make_no_sense_are_refused(word, said, capsys):
    assert main(["doctor", "check=stage1_tokenizer", word]) == 1
    assert said in capsys.readouterr().err


def test_gpus_may_be_used_to_the_full():
    check_gpus(composed("doctor", "utilisation=1"))


def test_a_folder_that_is_not_given_is_told_by_its_key(capsys):
    assert main(["doctor", "check=stage1_tokenizer", "words=[data=clips]"]) == 0
    assert "  - data: data.root is missing; give data.root=...\n" in capsys.readouterr().out


@pytest.fixture
def row(monkeypatch):
    """Returns the costs of a generator's training but for its memory, given words."""
    monkeypatch.setattr("kit.planning.plan.memory_of", lambda *_: (0, 0))
    doctor = composed("doctor")

    def of(*words: str) -> list[str]:
        cfg = composed("stage2_generator", *words)
        OmegaConf.resolve(cfg)
        return costs(cfg, doctor)[1].split()

    return of


def untrained(root: Path, *words: str) -> Path:
    """Writes the checkpoint of a tokenizer whose training has just begun."""
    quick = (
        "recipe.tokenizer.steps=1",
        "data.batch_size=1",
        "callbacks.video_logger.clips=0",
        "+trainer.limit_val_batches=0",
    )
    assert fit_tokenizer(root, *quick, *words) == 0
    return root / "tokenizer" / "checkpoints" / "last.ckpt"


def test_a_generator_is_costed_with_the_tokenizer_it_is_trained_on(row, tmp_path):
    here = f"tokenizer_ckpt={untrained(tmp_path, 'tokenizer.scales=[1,4]')}"
    clip = ["data.frames=5", "data.height=32", "data.width=32", "size=tiny"]
    assert (row(here, *clip)[2], row(*TOKENIZER, *clip)[2]) == ("34", "42"), "tokens"


def test_a_tokenizer_that_does_not_take_the_clips_is_told(tmp_path, capsys):
    """The costs are then computed for the tokenizer of the size."""
    words = f"tokenizer_ckpt={untrained(tmp_path)}"
    assert main(["doctor", "check=stage2_generator", "sizes=[small]", f"words=[{words}]"]) == 0
    told = capsys.readouterr().out
    assert "  - tokenizer_ckpt: " in told and "this tokenizer's scales end at 4" in told
    assert "cost, on paper, of conf=stage2_generator" in told and "GPU-hours" in told


def test_a_tokenizer_that_does_not_take_the_clips_of_a_bucket_is_told(tmp_path, monkeypatch):
    small = TokenizerConfig(bits=8, scales=(1, 2, 4), patch=4, widths=(8, 8))
    (tmp_path / "last.ckpt").touch()
    monkeypatch.setattr("kit.planning.plan.tokenizer_config", lambda _: small)
    clip = [f"tokenizer_ckpt={tmp_path / 'last.ckpt'}", "size=tiny", "data.height=32", "data.width=32"]
    for buckets, told in (("[5x32x32]", False), ("[5x32x32,5x64x64]", True)):
        made, lacking = planned_tokenizer(composed("stage2_generator", *clip, f"data.buckets={buckets}"))
        assert (made == small) == (lacking is None) == (not told)
        assert not told or "this tokenizer's scales end at 4" in lacking


def test_devices_are_counted(row):
    devices = ("1", "2", "[0,1]", "-1", "auto")
    batches = {word: batches_of_all(composed("stage2_generator", f"trainer.devices={word}")) for word in devices}
    assert batches == {"1": 1, "2": 2, "[0,1]": 2, "-1": 1, "auto": 1}
    assert row("size=tiny", *CLIP, "trainer.devices=2")[4] == "16"


def test_stages_that_are_shortened_cost_less(row):
    cfg = composed("progressive", "stage_steps=2", *TOKENIZER, "tokenizer.scales=[1,2,4,8]")
    OmegaConf.resolve(cfg)
    assert [line.split()[3] for line in costs(cfg, composed("doctor"))[1:4]] == ["2", "2", "2"]


def test_clips_that_are_encoded_before_are_not_encoded_in_training(pair, row, tmp_path):
    """This holds for clips that the run encodes ahead, and for a cache."""
    clip = ["data.frames=5", "data.height=32", "data.width=32"]
    given = [f"root={tmp_path}", f"tokenizer_ckpt={pair.tokenizer}"]
    assert main(["cache", *given, *clip, "clips=4", "val_clips=4", "data.workers=0"]) == 0
    given = [given[1], "size=tiny"]
    cached = row(*given, "data=cached", f"data.root={tmp_path / 'cache'}", "encoded_clips=0", "data.image_share=0")
    own = row(*given, *clip, "data.image_share=0")
    fresh = row(*given, *clip, "encoded_clips=0", "data.image_share=0")
    assert float(cached[7]) == float(own[7]) < float(fresh[7])


@pytest.mark.parametrize("conf", ["ucf101_generator", "ucf101_tokenizer"])
def test_what_fits_has_as_many_clips_a_step(conf):
    def step(*words: str) -> tuple[int, int]:
        cfg = composed(conf, "data.root=x", *words)
        return cfg.data.batch_size * accumulate_of(cfg), cfg.data.batch_size

    (whole, _), (parts, at_once) = step(), step("fits=24GB")
    assert whole == parts and at_once == 8


def test_batches_that_do_not_come_from_the_recipe_are_not_split():
    def config(conf: str, *words: str) -> DictConfig:
        return training_config(conf, ["size=small", "fits=12GB", *words])

    def found(conf: str, *words: str) -> str:
        with pytest.raises(ValueError) as error:
            check_batch_parts(config(conf, *words))
        return str(error.value)

    told = "splits recipe.generator.batch_size=64 into 4, and a step would have 4 times as many"
    for word in ("data.batch_size=32", "data.batch_tokens=9000"):
        text = found("stage2_generator", word)
        assert told in text and text.startswith(f"{word}, but")
    for conf, key, word in (
        ("stage1_tokenizer", "tokenizer", "optimizer.accumulate"),
        ("stage2_generator", "generator", "trainer.accumulate_grad_batches"),
    ):
        assert f"give recipe.{key}.accumulate, which counts whole ones" in found(conf, f"{word}=8")
        check_batch_parts(config(conf, "debug=smoke"))
    wrong = f"data of stage long: data.batch_size=4, but recipe.generator.at_once=16 (fits=) {told}"
    assert any(wrong in problem for problem in problems(config("progressive")))


def test_equal_parts():
    assert [equal_parts(12, n) for n in (None, 20, 12, 11, 5, 1)] == [1, 1, 1, 2, 3, 12]
    assert (part_of(64, 16), batches_of(64, 16, 2)) == (16, 8)
    assert (part_of(0, 4), batches_of(0, 4, 2)) == (0, 2), "what is wrong with it is told by who uses it"
    with pytest.raises(ValueError, match="at_once=0; expected a whole number of 1 or more"):
        equal_parts(8, 0)
