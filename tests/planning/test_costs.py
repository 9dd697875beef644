"""Estimated costs against formulas, and as the doctor prints them."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from omegaconf import OmegaConf
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.module_tracker import ModuleTracker

from kit.generator.mask import SHORT
from kit.generator.sequence import teacher_forced
from kit.generator.transformer import Generator, GeneratorConfig
from kit.planning.costs import ClipCost, generator_cost, gpu_hours, stage_cost, tokenizer_cost
from kit.planning.memory import without_trainer
from kit.planning.plan import clip_of, costs, duration, figure, tokenizer_on_paper
from kit.tokenizer import Tokenizer, TokenizerConfig
from tests.fixtures import CLIP, composed
from tests.fixtures import TOKENIZER as TINY

TOKENIZER = TokenizerConfig(bits=16, scales=(1, 2, 4, 8), patch=4, widths=(32, 64))
GENERATOR = GeneratorConfig(layers=4, width=192, heads=3, bits=16, scales=4)


@pytest.mark.parametrize("frames, side", [(17, 64), (101, 64), (1, 32)])
def test_a_generators_step_is_six_operations_a_weight_and_token_and_attention(frames, side):
    cost = generator_cost(GENERATOR, TOKENIZER, frames, side, side, encoded=True)
    model = Generator(GENERATOR)
    tokens = cost.tokens + model.condition.length
    assert cost.tokens == TOKENIZER.schedule(frames, side, side).length
    weights = sum(p.numel() for p in model.layers.parameters())
    S, schedule = model.condition.length, TOKENIZER.schedule(frames, side, side)
    by_frame = S * S + sum(schedule.tokens_per_frame * (S + schedule.frame(f).stop) for f in range(schedule.latent_frames))
    seen = tokens**2 if tokens <= SHORT else by_frame
    expected = 6 * weights * tokens + 12 * GENERATOR.layers * GENERATOR.width * seen
    assert cost.flops == pytest.approx(expected, rel=0.01)


def test_encoding_is_one_forward_pass_of_the_encoder():
    ahead, along = (generator_cost(GENERATOR, TOKENIZER, 5, 32, 64, encoded) for encoded in (True, False))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        Tokenizer(TOKENIZER).encode(torch.zeros(1, 3, 5, 32, 64))
    assert along.flops - ahead.flops == counter.get_total_flops() > 0


def test_history_blocks_cost_too():
    full = GeneratorConfig(**{**vars(GENERATOR), "history": "full"})
    costs = [generator_cost(config, TOKENIZER, 9, 32, 32, encoded=True) for config in (GENERATOR, full)]
    assert costs[0].tokens == costs[1].tokens and costs[0].flops < costs[1].flops
    model, schedule = Generator(full), TOKENIZER.schedule(9, 32, 32)
    with FlopCounterMode(display=False) as counter:
        condition = torch.zeros(1, model.condition.length, full.width)
        teacher_forced(model, torch.zeros(1, 16, 3, *schedule.grid), schedule, condition)[0].sum().backward()
    assert costs[1].flops == counter.get_total_flops()


FULL = (  # of a step with everything; the weights of the perceptual network are not there
    "loss=full", "loss.adversarial.width=8", "loss.perceptual.kind=st-lpips", "loss.perceptual.frames=2",
)  # fmt: skip


@pytest.mark.parametrize("words", [(), ("recompute=true",), FULL], ids=["plain", "recompute", "full"])
def test_a_tokenizers_step_on_paper_is_the_real_one(words, monkeypatch):
    """Of four iterations the discriminators miss the first."""
    for name in ("__enter__", "__exit__"):  # its hooks on modules do not go with torch.autograd.grad
        monkeypatch.setattr(ModuleTracker, name, lambda *_: None)
    cfg = composed("stage1_tokenizer", *CLIP, *TINY, *words)
    cfg.trainer.max_steps, clip = 4, clip_of(cfg.data)
    module = without_trainer(tokenizer_on_paper(cfg, clip), lambda **_: None)

    def real(start: int) -> int:
        module.start = start
        with FlopCounterMode(display=False) as counter:
            module.training_step({"video": torch.zeros(1, 3, 5, 32, 32), "n": [0]}, 0)
        return counter.get_total_flops()

    before, after = real(module.steps), real(0)
    assert (after > 1.02 * before) == (words is FULL)  # discriminators of 8 channels
    cost = tokenizer_cost(lambda: tokenizer_on_paper(cfg, clip), range(4))
    assert cost == ClipCost(module.schedule.length, before / 4 + 3 * after / 4)
    assert tokenizer_cost(lambda: tokenizer_on_paper(cfg, clip), range(3, 4)).flops == after


def test_discriminators_begin_at_a_share_of_all_stages(monkeypatch):
    """Stages have other steps than the recipe: the same training costs the same, however it is put down."""
    monkeypatch.setattr("kit.planning.plan.memory_of", lambda *_: (0, 0))
    switch = "+callbacks.stage_switch={_target_: callbacks.StageSwitch, folder: x, monitor: val/psnr}"

    def exaflop(*words: str) -> float:
        cfg = composed("stage1_tokenizer", *CLIP, *TINY, *FULL, "loss.perceptual.weight=0", *words)
        OmegaConf.resolve(cfg)
        rows = [line.split() for line in costs(cfg, composed("doctor"))]
        return sum(float(row[-4]) for row in rows if row[1] == "5x32x32")

    plain = exaflop("recipe.tokenizer.steps=1000")
    assert exaflop(switch, "stages={a:{steps:600},b:{steps:400}}") == pytest.approx(plain, rel=1e-3)


def test_costs_need_no_weights_of_the_perceptual_network():
    words = [*CLIP, *TINY, "loss.perceptual.kind=st-lpips", "loss.adversarial.weight=0"]

    def row(*more: str) -> list[float]:
        cfg = composed("stage1_tokenizer", *words, *more)
        OmegaConf.resolve(cfg)
        return [float(word.replace(",", "")) for word in costs(cfg, composed("doctor"))[1].split()[-5:]]

    without, seen = row("loss.perceptual.weight=0"), row("loss.perceptual.weight=1")
    assert all(a < b for a, b in zip(without, seen)), "operations, hours and memory"


@pytest.mark.parametrize("layers", [1, 5])
@pytest.mark.parametrize("recompute", [False, True])
def test_layers_cost_alike(layers, recompute):
    """Those of a model are worked out from a model of one layer and one of two."""
    schedule = TOKENIZER.schedule(5, 32, 32)
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        model = Generator(replace(GENERATOR, layers=layers))
        model.recompute = recompute
        inputs = torch.zeros(1, schedule.length, GENERATOR.inputs)
        model(inputs, schedule, torch.zeros(1, model.condition.length, GENERATOR.width)).sum().backward()
    cost = generator_cost(replace(GENERATOR, layers=layers), TOKENIZER, 5, 32, 32, encoded=True, recompute=recompute)
    assert cost.flops == counter.get_total_flops() > 0


def test_images_replace_clips_frame_for_frame():
    clip, image = ClipCost(50, 1000.0), ClipCost(10, 100.0)
    assert stage_cost(clip, None, 8, 0.0, 5) == ClipCost(400, 8000.0)
    assert stage_cost(clip, image, 8, 0.25, 5) == ClipCost(6 * 50 + 2 * 5 * 10, 6 * 1000.0 + 10 * 100.0)
    assert gpu_hours(3.6e18, tflops=100, utilisation=0.5) == 20


@pytest.fixture
def table(monkeypatch):
    """Returns the table of a progressive training's costs, of models in which each frame costs 1 TFLOP, given words."""
    gpu = lambda cfg, data, device, bfloat16, *_: (8e9, 10e9) if (device, bfloat16) == ("cuda", True) else None  # noqa: E731
    monkeypatch.setattr("kit.planning.plan.memory_of", gpu)
    cost = lambda *given, recompute, **_: ClipCost(10 * given[2], (2 if recompute else 1) * 1e12 * given[2])  # noqa: E731
    monkeypatch.setattr("kit.planning.plan.generator_cost", cost)

    def of(*words: str) -> list[str]:
        cfg = composed("progressive", "size=tiny", *words)
        OmegaConf.resolve(cfg)
        return costs(cfg, composed("doctor", "tflops=100", "utilisation=0.5", "gpus=[1,2]"))[1:]

    return of


def test_a_stage_costs_what_all_its_steps_devices_and_batches_do(table):
    """Images take the place of a share of the clips of five latent frames, five of one frame for each."""
    steps = ["stages.low.steps=1000", "stages.high.steps=500", "stages.long=null", "data.batch_size=8"]
    rows = table(*steps, "trainer.devices=2", "trainer.num_nodes=3", "trainer.accumulate_grad_batches=2")
    low, high, in_all, _ = (row.split() for row in rows)
    assert low == ["low", "17x32x32", "170", "1000", "192", "20%", "17,000.0", "2.803", "15.57", "8.0", "10.0"]
    assert high == ["high", "17x64x64", "170", "500", "96", "50%", "17,000.0", "0.5280", "2.933", "8.0", "10.0"]
    assert " ".join(in_all) == "in all 18.51 GPU-hours at 50% of 100 TFLOP/s: 18.5 h on 1, 9.25 h on 2"


def test_the_bucket_with_the_most_tokens_in_a_step_counts(table):
    """It need not be the one with the longest or the largest clips."""
    words = ["+stages.low.data.batch_tokens=850", "+stages.low.data.buckets=[33x32x32,5x64x64,17x48x64]"]
    assert table(*words)[0].split()[1] == "5x64x64"


def test_what_is_held_is_shared_out_under_fsdp(monkeypatch):
    monkeypatch.setattr("kit.planning.plan.memory_of", lambda *_: (8e9, 10e9))
    doctor, sharded = composed("doctor"), ("trainer=fsdp", "trainer.devices=4")

    def memory(*words: str) -> list[str]:
        cfg = composed("stage2_generator", "size=tiny", *CLIP, *words)
        OmegaConf.resolve(cfg)
        _, row, *_, note = costs(cfg, doctor)
        return [*row.split()[-2:], *re.findall("what is held is shared out to ([0-9])", note)]

    assert [memory(), memory(*sharded)] == [["8.0", "10.0"], ["2.0", "4.0", "4"]]
    assert memory(*sharded, "trainer.strategy.replicas=2") == ["4.0", "6.0", "2"]


def test_computing_layers_once_more_costs_a_third_of_them():
    once, again = (generator_cost(GENERATOR, TOKENIZER, 9, 32, 32, encoded=True, recompute=r) for r in (False, True))
    assert 1.25 < again.flops / once.flops < 1 + 1 / 3


def test_the_doctor_counts_blocks_that_are_computed_once_more(monkeypatch):
    monkeypatch.setattr("kit.planning.plan.memory_of", lambda *_: (0, 0))

    def gflop(recompute: str) -> float:
        cfg = composed("stage1_tokenizer", "size=tiny", "data.frames=5", f"recompute={recompute}")
        OmegaConf.resolve(cfg)
        return float(costs(cfg, composed("doctor"))[1].split()[6].replace(",", ""))

    assert 1.15 < gflop("true") / gflop("false") < 1 + 1 / 3, "not all is in the blocks"


def test_the_doctor_counts_a_generators_layers_that_are_computed_once_more(table):
    assert table("recompute=true")[0].split()[6] == "34,000.0"


def test_costs_are_not_told_as_powers_of_ten():
    hours = (15_937, 664 * 24, 48, 47, 0.5, 8.864e-05, 8.66e-08)
    assert [duration(h) for h in hours] == [
        "664 days",
        "664 days",
        "2.00 days",
        "47.0 h",
        "30.0 min",
        "0.319 s",
        "0.000312 s",
    ]
    assert [figure(x, 4) for x in (15_937.4, 1_334, 8.864e-05)] == ["15,937", "1,334", "0.00008864"]
