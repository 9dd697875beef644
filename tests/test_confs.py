"""Confs: each composes and instantiates, at every size; a user's are built on them; what they choose is what docs say."""

from __future__ import annotations

import re

import pytest
import torch
from omegaconf import OmegaConf

from kit.build import build_data, build_trainer
from kit.cli import main
from kit.confs import CONF, confs
from kit.generator.transformer import Generator, GeneratorConfig
from kit.planning.doctor import training_config
from kit.tokenizer import Tokenizer, TokenizerConfig
from tests.fixtures import composed

SIZES = sorted(path.stem for path in (CONF / "size").glob("*.yaml"))


@pytest.fixture
def own_conf(tmp_path):
    """A user's conf, built on one of kit's, with a choice of its own for the group `data`."""
    folder = tmp_path / "my confs"
    (folder / "data").mkdir(parents=True)
    (folder / "data" / "few.yaml").write_text("defaults: [shapes]\nval_clips: 3\n")
    (folder / "mine.yaml").write_text(
        "# Mine.\ndefaults: [stage1_tokenizer, {override data: few}, _self_]\nrecipe: {tokenizer: {steps: 7}}\n"
    )
    return folder / "mine.yaml"


def test_a_users_stages_are_no_misspelt_keys(own_conf, capfd):
    own_conf.write_text("defaults: [progressive, _self_]\nstages: {low: {steps: 5, data: {frames: 5}}, mine: {steps: 2}}\n")
    assert main(["fit", f"conf={own_conf}", "--cfg", "job"]) == 0
    assert "note" not in capfd.readouterr().err


@pytest.mark.parametrize(
    "text, meant, own",
    [
        (
            "defaults: [stage1_tokenizer, _self_]\n"
            "callbacks: {emma: {_target_: lightning.pytorch.callbacks.Timer, duration: null}, vidoe_logger: {clips: 0}}\n",
            "callbacks.video_logger",
            "emma",
        ),
        (
            "defaults: [stage1_tokenizer, {override data: mixture}, _self_]\n"
            "data: {source: {weights: {wind: 1, drawn: 2}}, val_clps: 3}\n",
            "data.val_clips",
            "weights",
        ),
    ],
)
def test_a_users_callbacks_and_weights_of_sources_are_no_misspelt_keys(own_conf, capfd, text, meant, own):
    own_conf.write_text(text)
    assert main(["fit", f"conf={own_conf}", "--cfg", "job"]) == 0
    told = capfd.readouterr().err
    assert f"did you mean {meant}?" in told and own not in told


def test_conf_takes_a_file_built_on_one_of_kits(own_conf, capfd):
    assert main(["fit", f"conf={own_conf}", "--cfg", "job", "--resolve"]) == 0
    cfg = OmegaConf.create(capfd.readouterr().out)
    assert (cfg.data.val_clips, cfg.trainer.max_steps, cfg.name, cfg.module) == (3, 7, "stage1_tokenizer", "tokenizer")
    assert main(["fit", f"conf={own_conf}", "--help"]) == 0
    assert f"--- {own_conf}\n# Mine." in (text := capfd.readouterr().out) and "--- conf/stage1_tokenizer.yaml" in text
    assert main(["doctor", f"check={own_conf}"]) == 0
    assert f"conf={own_conf}: no problem found" in capfd.readouterr().out
    for word, told in (
        ("data.val_clps=1", "no key data.val_clps; did you mean data.val_clips?"),
        ("recipe.tokenizer.steps=many", "recipe.tokenizer.steps=many; expected a number such as 7"),
    ):
        assert main(["fit", f"conf={own_conf}", word]) == 1
        assert told in capfd.readouterr().err


def test_a_users_group_goes_before_kits_of_its_name(own_conf, capfd):
    """This holds for the verb, its help and the doctor; without the user's conf kit's group is used."""
    (own_conf.parent / "size").mkdir()
    (own_conf.parent / "size" / "tiny.yaml").write_text(
        "# @package _global_\ndefaults: [/size/small]\ntokenizer: {bits: 7}\n"
    )
    for conf, bits in ((str(own_conf), 7), ("stage1_tokenizer", 16)):
        assert main(["fit", f"conf={conf}", "size=tiny", "--cfg", "job", "--resolve"]) == 0
        assert OmegaConf.create(capfd.readouterr().out).tokenizer.bits == bits
        assert training_config(conf, ["size=tiny"]).tokenizer.bits == bits
    assert main(["fit", f"conf={own_conf}", "--help"]) == 0
    told = capfd.readouterr().out
    assert "data=cached|clips|few|" in told and "{bits: 7}" in told


def test_a_users_own_search_path_counts(own_conf, tmp_path, capfd):
    """Both the conf's search path and one on the command line are used."""
    (tmp_path / "more" / "data").mkdir(parents=True)
    (tmp_path / "more" / "data" / "elsewhere.yaml").write_text("defaults: [shapes]\nval_clips: 5\n")
    path = f"['file://{tmp_path / 'more'}']"
    assert main(["fit", f"conf={own_conf}", "data=elsewhere", f"hydra.searchpath={path}", "--cfg", "job"]) == 0
    assert OmegaConf.create(capfd.readouterr().out).data.val_clips == 5
    own_conf.write_text(own_conf.read_text() + f"hydra: {{searchpath: {path}}}\n")
    assert main(["fit", f"conf={own_conf}", "data=elsewhere", "--cfg", "job"]) == 0
    assert OmegaConf.create(capfd.readouterr().out).data.val_clips == 5
    assert training_config(str(own_conf), ["data=elsewhere"]).data.val_clips == 5


def test_a_misspelt_key_in_a_users_conf_is_told(own_conf, capfd):
    """Hydra adds an unknown key without complaint, and it would have no effect."""
    assert main(["fit", f"conf={own_conf}", "--cfg", "job"]) == 0
    assert "note" not in capfd.readouterr().err, "of groups' choices beside it, and of keys that there are"
    own_conf.write_text(own_conf.read_text() + "data: {val_clps: 3}\n")
    assert main(["fit", f"conf={own_conf}", "--cfg", "job"]) == 0
    assert "note: mine.yaml: no key data.val_clps; did you mean data.val_clips?" in capfd.readouterr().err


OF_ONE_SIZE = ("paper_plan", "ucf101_tokenizer", "ucf101_generator")  # or of data that is not here


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", [name for name in confs() if name not in OF_ONE_SIZE])
def test_every_conf_composes_and_instantiates_at_every_size(name, size):
    cfg = composed(name, f"size={size}")
    OmegaConf.resolve(cfg)
    data, trainer = build_data(cfg), build_trainer(cfg)
    values = TokenizerConfig(**OmegaConf.to_container(cfg.tokenizer))
    generator = GeneratorConfig(**OmegaConf.to_container(cfg.generator), bits=values.bits, scales=len(values.scales))
    with torch.device("meta"):
        tokenizer = Tokenizer(values)
        assert Generator(generator).head.out_features == values.bits
    assert tokenizer.schedule(data.frames, data.height, data.width).grid[0] == values.scales[-1]
    assert trainer.max_steps == cfg.recipe[cfg.module].steps


@pytest.mark.parametrize("name", sorted(p.stem for p in CONF.glob("*.yaml") if p.stem not in ("fit", "recipe", "sampling")))
def test_every_conf_of_a_verb_composes(name):
    assert "seed" in composed(name)


COMMENTED = ["generate", "consolidate", "models", "sampling", "demo", "doctor", "evaluate", "prepare", "table"]

GROUPS = [
    "data/shapes", "data/clips", "protocol/folder", "protocol/prompts", "loss/plain",
    "init/inflate", "init/weights", "init/infinity", "rate/4x8x8", "rate/4x16x16",
]  # fmt: skip


@pytest.mark.parametrize("name", COMMENTED + GROUPS)
def test_every_value_has_a_comment(name):
    """Exceptions are targets, and keys that the line above explains (height, then width)."""
    lines = (CONF / f"{name}.yaml").read_text().splitlines()
    values = [line for line in lines if re.match(r"\s*\w+: \S", line) and not re.match(r"\s*(_\w+_|root|name):", line)]
    explained = [line for line in values if "#" in line or re.match(r"\s*(last|fine|seed):", line)]
    assert values == explained and values


@pytest.mark.parametrize(
    ("conf", "size", "share"),
    [
        ("stage1_tokenizer", "tiny", 0), ("stage2_generator", "tiny", 0.3), ("stage2_generator", "small", 0),
        ("stage3_generator_highres", "tiny", 0.2), ("stage4_generator_long", "tiny", 0),
    ],
)  # fmt: skip
def test_whose_batches_hold_images(conf, size, share):
    assert composed(conf, f"size={size}").data.image_share == share


@pytest.mark.parametrize("rate, tokens", [("size", 130), ("4x16x16", 130), ("4x8x8", 341)])
def test_rates_fit_their_clips(rate, tokens):
    cfg = composed("stage1_tokenizer", "size=small", f"rate={rate}")
    with torch.device("meta"):
        tokenizer = Tokenizer(TokenizerConfig(**OmegaConf.to_container(cfg.tokenizer)))
    assert tokenizer.schedule(cfg.data.frames, cfg.data.height, cfg.data.width).tokens_per_frame == tokens


def test_the_ablation_is_the_measured_one_on_any_machine(monkeypatch):
    """Model, steps and clips are those of docs/ablation.md also where a GPU has another size, unless words say else."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)

    def chosen(*words: str) -> tuple:
        cfg = composed("ablation", "trainer.devices=1", *words)
        return cfg.generator.width, cfg.data.batch_size, cfg.trainer.max_steps, cfg.encoded_clips

    assert composed("stage2_generator", "trainer.devices=1").generator.width == 512
    assert chosen() == (192, 8, 1000, 4000)
    assert chosen("size=small", "recipe.generator.steps=5", "recipe.generator.encoded_clips=0") == (512, 64, 5, 0)


def test_methods_add_one_thing_after_another():
    """Each method of the ablation changes only its own keys against the one before; `paper` is the same for all sizes."""
    recipe = ("generator.inherit", "loss.scale_weights", "loss.bit_weights")
    keys = (*recipe, "align", "correction.p_max", "correction.delta", "correction.inherit", "frame_mask", "history")
    before, changed = None, {}
    for method in ("standard", "rope", "flips", "inherited", "masked", "full", "center"):
        cfg = composed("ablation", f"method={method}")
        now = {key: OmegaConf.select(cfg, key) for key in keys}
        changed[method] = {key: value for key, value in now.items() if before and value != before[key]}
        assert [now[key] for key in recipe] == ["all", "early", "uniform"] and not cfg.data.image_share
        assert cfg.name == f"ablation_{method}_0"
        before = now
    assert changed == {
        "standard": {}, "rope": {"align": "grid"}, "flips": {"correction.p_max": 0.1, "correction.delta": 0.01},
        "inherited": {"correction.inherit": True}, "masked": {"frame_mask": 0.1}, "full": {"history": "full"},
        "center": {"align": "center"},
    }  # fmt: skip
    cfgs = (composed("stage2_generator", f"method={method}", "size=tiny") for method in ("plus", "inherited"))
    plus, inherited = ({key: OmegaConf.select(cfg, key) for key in keys} for cfg in cfgs)
    assert plus == {**inherited, "align": "center"}
    large = composed("stage2_generator", "size=L")
    for size in ("tiny", "L"):
        paper = composed("stage2_generator", "method=paper", f"size={size}")
        assert {key: OmegaConf.select(paper, key) for key in keys} == {key: OmegaConf.select(large, key) for key in keys}


def test_where_a_protocol_of_ones_own_lies_is_told(capsys):
    assert main(["evaluate", "protocol=/a/mine.yaml"]) == 1
    told = "no protocol=/a/mine.yaml; choose from folder, prompts, .* one of yours lies in the folder protocol beside a conf"
    assert re.search(told, capsys.readouterr().err)


def test_confs_may_lie_where_hydras_option_says(tmp_path, capfd):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine.yaml").write_text("defaults: [shapes]\nval_clips: 5\n")
    assert main(["fit", "conf=stage1_tokenizer", "data=mine", "--config-dir", str(tmp_path), "--cfg", "job"]) == 0
    assert OmegaConf.create(capfd.readouterr().out).data.val_clips == 5
