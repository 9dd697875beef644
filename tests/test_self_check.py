"""The self-check of `inspect`: a healthy model passes, and each fault is found by its own check."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from kit.checkpoint import load_generator
from kit.cli import main
from kit.data.shapes import Shapes
from kit.generator import transformer
from kit.generator.kv_cache import Cache
from kit.generator.transformer import Generator
from kit.scales import ScaleSchedule
from kit.self_check import check_conditioning, check_scales, self_check
from kit.tokenizer.causal import CausalConv3d

HARDLY_LEARNED = {"tokenizer", "conditioning"}  # by the tiny pair, in 100 and 50 steps


@pytest.fixture
def found(pair):
    """A function that runs the self-check of the tiny pair, which hardly knows captions, and returns the names of failed
    checks."""
    generator, tokenizer = load_generator(pair.generator)
    clips = [Shapes("train", 5, 32, 32)[n] for n in range(6)]
    video = torch.stack([clip["video"] for clip in clips])

    def run(prompts: list[str] | None = None) -> set[str]:
        checks = self_check(generator.model, tokenizer.model, video, prompts or [clip["caption"] for clip in clips])
        return {check.name for check in checks if not check.ok}

    run.generator, run.tokenizer = generator.model, tokenizer.model
    return run


def test_a_healthy_model_has_no_fault(found):
    assert not found() - HARDLY_LEARNED


@pytest.mark.parametrize(
    "detail, ok", [((0.3, 0.7, 0.9), True), ((0.3, 0.9, 0.7), False), ((0.0, 0.0, 0.1), False), ((0.9, 0.9, 0.9), True)]
)
def test_scales_must_add_to_the_picture(detail, ok):
    """`detail` is the share of the picture's deviation from its mean colour that each number of scales shows."""
    video, schedule = torch.rand(2, 3, 5, 8, 8) * 2 - 1, ScaleSchedule(2, ((1, 1), (1, 2), (2, 2)))
    colour = video.mean(dim=(2, 3, 4), keepdim=True)
    tokenizer = SimpleNamespace(decode_bits=lambda bits, schedule, scales: colour + detail[scales - 1] * (video - colour))
    check = check_scales(tokenizer, video, torch.zeros(0), schedule)
    assert check.ok is ok and ("train the tokenizer longer" in check.line()) is not ok


def test_a_decoder_that_forgets_what_came_before(found, monkeypatch):
    forward = CausalConv3d.forward
    monkeypatch.setattr(CausalConv3d, "forward", lambda self, x, stream=None: forward(self, x, None))
    torch.manual_seed(0)
    for module in found.tokenizer.decoder.modules():
        if isinstance(module, CausalConv3d) and module.past:
            torch.nn.init.normal_(module.weight, std=0.1)
    assert "streaming" in found()


def test_a_generator_that_knows_nothing(found):
    torch.nn.init.normal_(found.generator.head.weight)
    assert "bits" in found()


def test_a_generator_before_any_training(found):
    """With all logits 0 only the checks of what was learned fail."""
    torch.nn.init.zeros_(found.generator.head.weight)
    assert found() - HARDLY_LEARNED <= {"bits", "conditioning"} and "bits" in found()


def test_prompts_that_are_not_heeded(found):
    for parameter in found.generator.condition.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    assert "conditioning" in found()
    assert "conditioning" not in found(["the same"] * 6)  # there is nothing to heed


@pytest.mark.parametrize("prompts", [["yes", "no"] * 4, ["yes"] * 4 + ["no"] * 4, ["yes"] * 7 + ["no"]])
def test_prompts_that_are_heeded(prompts):
    """The model predicts a clip's bits from its prompt; the check passes for any order of clips, and too few clips tell
    nothing."""
    schedule = ScaleSchedule(1, ((1, 1),))
    bits = torch.tensor([prompt == "yes" for prompt in prompts])[:, None, None].expand(-1, 1, 4)

    def model(inputs, schedule, condition):
        return condition[:, :, None].expand(-1, 1, 4)

    model.condition = lambda words, dropped: torch.tensor([[1.0 if w == "yes" else -1.0] for w in words]) * ~dropped[:, None]
    assert check_conditioning(model, None, bits, prompts, schedule).ok
    assert not check_conditioning(model, None, ~bits, prompts, schedule).ok

    def condition(words, dropped):  # without a prompt the history says as much, or more
        sure = torch.where(dropped, 1.0 if as_well else 3.0, 1.0)[:, None]
        return sure * torch.tensor([[1.0 if w == "yes" else -1.0] for w in words])

    model.condition = condition
    for as_well in (True, False):
        assert check_conditioning(model, None, bits, prompts, schedule).ok == as_well
    assert "too few" in check_conditioning(model, None, ~bits[:2], prompts[:2], schedule).found


def test_a_cache_that_loses_a_frame(found, monkeypatch):
    start = Cache.start_frame

    def lose(self, f):
        start(self, f)
        self.keys[..., self.condition : self.current.start, :] = 0

    monkeypatch.setattr(Cache, "start_frame", lose)
    assert found() - HARDLY_LEARNED == {"cache"}


def test_clips_of_a_batch_that_mix(found, monkeypatch):
    forward = Generator.forward

    def mixed(self, *args, **how):
        logits = forward(self, *args, **how)
        return logits + logits.mean(0, keepdim=True)

    monkeypatch.setattr(Generator, "forward", mixed)
    assert "batch" in found()


def test_positions_that_are_not_seen(found, monkeypatch):
    monkeypatch.setattr(transformer, "rotate", lambda x, table: x)
    assert "positions" in found() and "cache" not in found()


def test_positions_that_are_absolute(found, monkeypatch):
    monkeypatch.setattr(transformer, "rotate", lambda x, table: x + table[0].repeat(1, 2))
    assert "positions" in found() and "cache" not in found()


@pytest.mark.parametrize("part", ["tokenizer", "generator"])
def test_inspect_tells(part, pair, tmp_path, capsys):
    """A tokenizer gets the checks that concern it."""
    assert main(["inspect", f"ckpt={getattr(pair, part)}", f"root={tmp_path}", "name=out", "clips=4"]) == 0
    told = capsys.readouterr().out
    report = json.loads((tmp_path / "out" / "inspect.json").read_text())["self_check"]
    of_generator = {"bits", "conditioning", "cache", "batch", "positions"} if part == "generator" else set()
    assert set(report) == {"tokenizer", "streaming"} | of_generator
    for name in {"streaming", "cache"} & set(report):
        assert report[name]["ok"] is True and f"ok    {name:<13} {report[name]['found']}\n" in told
