"""Training that starts from a trained generator: fine-tuning."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kit.checkpoint import load_generator, load_tokenizer
from tests.fixtures import fit_generator, fit_tokenizer

STILL = ["recipe.generator.steps=2", "optimizer.lr=0", "callbacks.ema.decay=0"]


def weights(checkpoint, tokenizer=None):
    return load_generator(checkpoint, tokenizer)[0].model.state_dict()


def start(pair, folder, *words, tokenizer=None) -> int:
    given = ["init=weights", f"init.ckpt={pair.generator}"]
    return fit_generator(folder, "name=tuned", *given, *STILL, *words, tokenizer=tokenizer or pair.tokenizer)


def test_starts_with_the_given_weights(pair, tmp_path, caplog):
    assert start(pair, tmp_path) == 0
    assert "another" not in caplog.text
    given, tuned = weights(pair.generator), weights(tmp_path / "tuned" / "checkpoints" / "last.ckpt")
    assert given.keys() == tuned.keys()
    for name, weight in given.items():
        assert torch.equal(weight, tuned[name]) or name == "condition.encoder.seen", name


def test_another_condition_starts_anew(pair, tmp_path, caplog):
    assert start(pair, tmp_path, "condition.channels=16") == 0
    assert "the condition is another one (channels: 64, 16) and starts anew" in caplog.text
    given, tuned = weights(pair.generator), weights(tmp_path / "tuned" / "checkpoints" / "last.ckpt")
    assert tuned["condition.encoder.table.weight"].shape[1] == 16
    assert torch.equal(given["layers.0.mlp.up.weight"], tuned["layers.0.mlp.up.weight"])
    assert torch.equal(given["project.weight"], tuned["project.weight"])


def test_classes_take_the_place_of_captions(pair, tmp_path, caplog):
    assert start(pair, tmp_path, "condition.kind=class") == 0
    assert "kind: text, class) and starts anew" in caplog.text
    given, tuned = weights(pair.generator), weights(tmp_path / "tuned" / "checkpoints" / "last.ckpt")
    assert torch.equal(given["project.weight"], tuned["project.weight"])


def test_bits_of_another_tokenizer_are_told(pair, tmp_path, caplog):
    fit_tokenizer(tmp_path, "name=other", "recipe.tokenizer.steps=1")
    other = tmp_path / "other" / "checkpoints" / "last.ckpt"
    assert start(pair, tmp_path, tokenizer=other) == 0
    assert "spoke the bits of another tokenizer, and has to learn those of tokenizer_ckpt" in caplog.text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["generator.width=48"], "another architecture than the generator to train: width: 32, 48; make them alike"),
        (["history=full"], "history: scales, full"),
        (["init.ckpt=null"], "init.how=weights needs init.ckpt=PATH, the checkpoint of a generator to start from"),
        (["init.how=inflate"], "init.how=inflate; expected for a generator one of scratch, weights"),
        (["init.ckpt=nowhere.ckpt"], "no checkpoint at nowhere.ckpt"),
    ],
)
def test_what_cannot_start(pair, tmp_path, capsys, words, message):
    assert start(pair, tmp_path, *words) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "tuned" / "encoded_clips").exists(), "clips were encoded before the error"


def test_a_continued_run_keeps_its_own_weights(pair, tmp_path):
    """It does not need the checkpoint it started from any more."""
    assert start(pair, tmp_path, "optimizer.lr=1e-2") == 0
    last = tmp_path / "tuned" / "checkpoints" / "last.ckpt"
    before = weights(last)
    assert start(pair, tmp_path, "ckpt=last", "init.ckpt=gone.ckpt") == 0  # at its last step already: nothing to train
    for name, weight in weights(last).items():
        assert torch.equal(weight, before[name]), name


def test_the_window_and_where_it_looks_may_be_others(pair, tmp_path):
    assert start(pair, tmp_path, "window=1", "align=center") == 0


def test_the_relative_path_of_its_tokenizer_is_known_elsewhere_too(pair, tmp_path, monkeypatch):
    monkeypatch.chdir(pair.tokenizer.parent)
    assert fit_generator(tmp_path, "name=short", "recipe.generator.steps=1", tokenizer=Path(pair.tokenizer.name)) == 0
    monkeypatch.chdir(tmp_path)
    assert load_generator(tmp_path / "short" / "checkpoints" / "last.ckpt")[1].hash == load_tokenizer(pair.tokenizer).hash
