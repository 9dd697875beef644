"""Checkpoints as files of models."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from kit.checkpoint import kind_of, load_generator, load_tokenizer, model_hash, save_tokenizer
from kit.cli import main
from kit.files import load_checked, save_checked
from kit.generator.module import GeneratorModule
from kit.tokenizer import Tokenizer, TokenizerConfig
from kit.tokenizer.module import TokenizerModule
from tests.fixtures import fit_tokenizer

CLIP = {"frames": 5, "height": 8, "width": 8, "fps": 8.0}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_and_named(value, tmp_path):
    model = Tokenizer(TokenizerConfig(bits=4, scales=(1, 2), patch=4, widths=(8,), blocks=1))
    save_tokenizer(model, CLIP, tmp_path / "good.ckpt")
    assert load_tokenizer(tmp_path / "good.ckpt").clip == CLIP

    with torch.no_grad():
        model.decoder.head.bias[1] = value  # a single number
    save_tokenizer(model, CLIP, tmp_path / "lost.ckpt")
    found = rf"lost.ckpt holds NaN or infinite weights, in 1 of {len(model.state_dict())} tensors, such as decoder.head.bias"
    with pytest.raises(ValueError, match=found):
        load_tokenizer(tmp_path / "lost.ckpt")


@pytest.mark.parametrize(
    ("value", "kind"), [(np.float64(0.5), r"numpy\.float64"), (np.zeros(2), r"numpy\.ndarray"), (Path("x"), r"pathlib\.\w+")]
)
def test_what_nobody_could_load_is_not_saved(value, kind, tmp_path):
    path = tmp_path / "last.ckpt"
    save_checked({"step": 1}, path)
    with pytest.raises(
        ValueError, match=rf"last.ckpt could not be saved: .* It holds hyper_parameters.loss\[1\].a \({kind}\)"
    ):
        save_checked({"step": 2, "hyper_parameters": {"loss": [1.0, {"a": value}]}}, path)
    assert load_checked(path) == {"step": 1} and list(tmp_path.iterdir()) == [path]


def test_what_a_callback_makes_of_the_loss_is_not_what_the_run_is_told_to_have(pair):
    """docs/extending.md has a callback change `module.loss`; a run that resumes would else begin with its last values."""
    module = TokenizerModule(**load_checked(pair.tokenizer)["hyper_parameters"])
    module.loss["adversarial"]["lr"] = module.loss["motion_weight"] = 7.0
    assert module.hparams.loss["motion_weight"] == 0.0 and module.hparams.loss["adversarial"]["lr"] == 1e-4


def test_lightning_loads_a_module_too(pair):
    module = TokenizerModule.load_from_checkpoint(pair.tokenizer, map_location="cpu")
    learned = load_checked(pair.tokenizer)["state_dict"]
    assert all(torch.equal(value, learned[name]) for name, value in module.state_dict().items())
    generator = GeneratorModule.load_from_checkpoint(pair.generator, map_location="cpu", tokenizer=module.model)
    assert generator.schedule == module.schedule


def test_generator_and_tokenizer_are_not_mixed_up(pair, tmp_path, capsys):
    assert main(["generate", f"ckpt={pair.tokenizer}", f"root={tmp_path}", "prompt=x"]) == 1
    assert "holds tokenizer, expected a generator checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize("values", [None, {"tokenizer": "gpt2"}])
def test_a_checkpoint_of_another_program_is_told(tmp_path, values):
    torch.save({"hyper_parameters": values, "state_dict": {}}, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match="other.ckpt holds something else, expected a tokenizer checkpoint of kit"):
        load_tokenizer(tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match="other.ckpt holds something else, expected a checkpoint of kit"):
        kind_of(tmp_path / "other.ckpt")


@pytest.mark.parametrize(("contents", "why"), [(b"a text", "it is no file of torch, or cut off"), (b"", "it is empty")])
@pytest.mark.parametrize("load", [load_tokenizer, kind_of])
def test_what_is_no_checkpoint_is_told(tmp_path, contents, why, load):
    path = tmp_path / "other.ckpt"
    path.write_bytes(contents)
    with pytest.raises(ValueError, match=f"other.ckpt is not a readable file of tensors: {why}"):
        load(path)


@pytest.mark.parametrize("damage", ["cut", "text"])
def test_broken_checkpoint_is_named(pair, tmp_path, capsys, damage):
    broken = tmp_path / "broken.ckpt"
    broken.write_bytes(pair.tokenizer.read_bytes()[:5000] if damage == "cut" else b"not a checkpoint")
    assert main(["reconstruct", f"ckpt={broken}", f"root={tmp_path}"]) == 1
    assert "broken.ckpt is not a readable file of tensors" in capsys.readouterr().err


def test_moved_tokenizer_is_found_by_its_new_path(pair, tmp_path, capsys):
    moved = shutil.copy(pair.tokenizer, tmp_path / "moved.ckpt")
    checkpoint = load_checked(pair.generator)
    checkpoint["hyper_parameters"]["tokenizer_path"] = "/gone.ckpt"
    save_checked(checkpoint, tmp_path / "generator.ckpt")
    with pytest.raises(FileNotFoundError, match="tokenizer=PATH"):
        load_generator(tmp_path / "generator.ckpt")
    assert load_generator(tmp_path / "generator.ckpt", moved)[1].hash == load_tokenizer(pair.tokenizer).hash


def test_wrong_tokenizer_is_refused_with_both_hashes(pair, tmp_path, capsys):
    assert fit_tokenizer(tmp_path, "recipe.tokenizer.steps=1", "trainer.val_check_interval=1", name="other") == 0
    other = tmp_path / "other" / "checkpoints" / "last.ckpt"
    assert main(["generate", f"ckpt={pair.generator}", f"root={tmp_path}", "prompt=x", f"tokenizer={other}"]) == 1
    error = capsys.readouterr().err
    assert load_tokenizer(other).hash in error and load_tokenizer(pair.tokenizer).hash in error


def test_hash_changes_with_any_weight(pair):
    loaded = load_tokenizer(pair.tokenizer)
    assert model_hash(load_tokenizer(pair.tokenizer).model) == loaded.hash
    loaded.model.decoder.head.bias.data[0] += 1e-3
    assert model_hash(loaded.model) != loaded.hash


def test_hash_changes_with_the_architecture_and_the_names_of_weights():
    """Two generators with another number of heads have the same weights."""

    def hashed(heads: int, name: str) -> str:
        model = nn.Module()
        model.config = SimpleNamespace(as_dict=lambda: {"heads": heads})
        model.register_buffer(name, torch.ones(2))
        return model_hash(model)

    assert hashed(1, "a") == hashed(1, "a")
    assert len({hashed(1, "a"), hashed(2, "a"), hashed(1, "b")}) == 3


def test_checkpoint_gives_the_averaged_weights(pair):
    checkpoint = torch.load(pair.tokenizer, weights_only=True)
    name = "model.decoder.head.weight"
    loaded = load_tokenizer(pair.tokenizer).model.decoder.head.weight
    assert torch.equal(loaded, checkpoint["ema"][name])
    assert not torch.equal(loaded, checkpoint["state_dict"][name])
