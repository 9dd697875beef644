"""Clips encoded ahead of the training: the same features, kept in a file."""

from __future__ import annotations

import pytest
import torch

from kit.checkpoint import load_tokenizer
from kit.data.features import encode_clips
from kit.data.shapes import Shapes
from tests.fixtures import fit_generator
from tests.test_training import losses


@pytest.fixture
def encode(pair, tmp_path, monkeypatch):
    """Encodes clips of 5 x 32 x 32 and says how many the tokenizer saw."""
    tokenizer = load_tokenizer(pair.tokenizer).model
    seen, original = [], tokenizer.encode
    monkeypatch.setattr(tokenizer, "encode", lambda video: seen.append(len(video)) or original(video))

    def run(clips=20, **about):
        seen.clear()
        source = Shapes(frames=5, height=32, width=32)
        encoded = encode_clips(source, tokenizer, clips, 0, tmp_path / "run" / "encoded.pt", about)
        return encoded, sum(seen), tokenizer, source

    return run


def test_items_are_the_features_of_the_clips_and_repeat(encode):
    encoded, seen, tokenizer, source = encode()
    assert seen == 20
    for n in (0, 19):
        expected = tokenizer.encode(source[n]["video"][None])[0]
        torch.testing.assert_close(encoded[n]["feature"].float(), expected, atol=0.02, rtol=0.02)
        for item in (encoded[n], encoded[n + 20]):
            assert (item["caption"], item["label"]) == (source[n]["caption"], source[n]["label"])
            assert torch.equal(item["feature"], encoded[n]["feature"])


def test_the_file_is_used_again_for_the_same_clips_only(encode):
    encoded, _, _, _ = encode(fps=8.0, source={"seed": 0})
    again, seen, _, _ = encode(fps=8.0, source={"seed": 0})
    assert seen == 0 and torch.equal(again.features, encoded.features) and again.captions == encoded.captions
    assert encode(fps=8.0, source={"seed": 1})[1] == 20
    assert encode(clips=5, fps=8.0, source={"seed": 1})[1] == 5


def test_training_on_encoded_clips_is_training_on_clips(pair, tmp_path):
    """The first pass over them gives the losses of fresh clips, up to the rounding of the features."""
    def fit(name, clips):
        words = [f"name={name}", f"recipe.generator.encoded_clips={clips}", "trainer.precision=32-true"]
        assert fit_generator(tmp_path, *words, "recipe.generator.steps=5", tokenizer=pair.tokenizer) == 0
        return torch.tensor(losses(tmp_path / name))

    torch.testing.assert_close(fit("encoded", 20), fit("fresh", 0), atol=2e-3, rtol=2e-3)


def test_a_new_run_encodes_anew_and_a_continued_one_does_not(pair, tmp_path):
    kept = tmp_path / "run" / "encoded_clips.pt"

    def fit(*words):
        assert fit_generator(tmp_path, "name=run", *words, tokenizer=pair.tokenizer) == 0
        return kept.stat().st_ino

    first = fit("recipe.generator.steps=6")
    assert fit("recipe.generator.steps=7", "ckpt=last") == first
    assert len(torch.load(kept, weights_only=True)["captions"]) == 24
    kept.write_bytes(b"of clips that are no more")
    fit("recipe.generator.steps=2", "overwrite=true")
    assert len(torch.load(kept, weights_only=True)["captions"]) == 8, "no more than are trained on"


def test_a_negative_number_is_named(pair, tmp_path, capsys):
    assert fit_generator(tmp_path, "recipe.generator.encoded_clips=-1", tokenizer=pair.tokenizer) == 1
    assert "encoded_clips=-1" in capsys.readouterr().err
