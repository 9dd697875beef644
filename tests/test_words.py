"""The words of a command line: what they mean to hydra, whatever is in them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser

from kit.confs import compose, located
from kit.resolvers import register_resolvers
from kit.words import at_commas, quoted, typed_keys, wrong_words
from tests.fixtures import composed


def test_commas_within_brackets_and_quotes_divide_nothing():
    parse = OverridesParser.create().parse_override
    words = "data=clips, data.root=/a b,'prompt=a, b',data.buckets=[17x96x160,17x160x96],name=it's"
    expected = ["data=clips", "data.root=/a b", "prompt=a, b", "data.buckets=[17x96x160,17x160x96]", "name=it's"]
    assert parse(quoted(f"words=[{words}]")).value() == expected
    assert at_commas("seed=choice(1,2),name=a") == ["seed=choice(1,2)", "name=a"]
    assert parse(quoted("words=[]")).value() == []
    assert parse(quoted("tokenizer_overrides=['debug=smoke']")).value() == ["debug=smoke"]


@pytest.mark.parametrize(
    "key", ["ckpt", "init.ckpt", "root", "results", "loss.perceptual.weights", "data.source.captions", "data.root"]
)
def test_files_may_have_any_names(key):
    """File names that hydra's grammar does not accept work too."""
    parse = OverridesParser.create().parse_override
    for path in (
        "runs/a (1)/last.ckpt",
        "/my [clips]/it's x=1",
        "a/b c",
        "a/{b}/ü.csv",
        "é",
        "step=3.ckpt",
        "a\\b\\'c\\",
        "'a' b",
    ):
        assert parse(quoted(f"{key}={path}")).value() == path
    if key != "results":  # which may be several
        assert parse(quoted(f"{key}=/a, b/c")).value() == "/a, b/c"
    assert parse(quoted(f"{key}=~/a")).value() == str(Path("~/a").expanduser())
    for word in ("data.buckets=[17x96x160,17x160x96", "seed=1,2", "name=s${seed}"):
        assert quoted(word) == word, "what is no text stays as it is"


def test_commas_between_the_paths_of_a_sweep_part_its_runs():
    assert quoted("ckpt=a.ckpt,b.ckpt", sweep=True) == "ckpt=a.ckpt,b.ckpt"
    assert quoted("ckpt=a.ckpt,b.ckpt") == "ckpt='a.ckpt,b.ckpt'", "one file, outside a sweep"


def test_typed_keys_are_those_of_the_command_line(monkeypatch):
    words = ["seed=3", "guidance={first: 3, last: 4}", "~negative", "+new.key=1"]
    monkeypatch.setattr(HydraConfig, "initialized", lambda: True)
    monkeypatch.setattr(HydraConfig, "get", lambda: SimpleNamespace(overrides=SimpleNamespace(task=words)))
    assert typed_keys() == ["seed", "guidance.first", "guidance.last", "new.key"]


def test_a_trainer_takes_words_where_it_has_numbers():
    register_resolvers()
    conf = located("stage1_tokenizer")
    for word, fits in (("trainer.devices=auto", True), ("data.fps=fast", False)):
        assert (not wrong_words(compose(conf, [word]), conf, [word])) == fits


@pytest.mark.parametrize("text", ["a ${seed}", "${nope:x}'s", "a\\${seed}", "\\\\${seed}\\", "${seed", "$ {seed}"])
def test_prompts_are_not_interpolated(text):
    """Paths are, such as those of a sweep, and a text in quotes of its own is hydra's."""
    for key in ("prompt", "label", "negative"):
        assert composed("generate", quoted(f"{key}={text}"))[key] == text
    assert list(composed("doctor", quoted(f"words=[name={text}]")).words) == [f"name={text}"]
    assert composed("generate", quoted("prompt='a ${seed}'")).prompt == "a 0"
    assert composed("generate", quoted("root=/a [1]/${seed}")).root == "/a [1]/0"
    assert composed("generate", quoted("ckpt=runs/g${seed}/a,b.ckpt")).ckpt == "runs/g0/a,b.ckpt"


@pytest.mark.parametrize("text", ['"Stop" says the sign, and "go"', "'a' or 'b'", "'a\\'", "'", "'it's'"])
def test_a_text_that_begins_and_ends_with_a_quote_is_not_one_in_quotes(text):
    assert composed("generate", quoted(f"prompt={text}")).prompt == text
