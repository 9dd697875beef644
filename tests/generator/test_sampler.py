"""Sampling: the cache against the full forward pass, guidance, temperature, seeds, and given history."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from kit.generator.guidance import Guidance
from kit.generator.kv_cache import Cache, CachedGenerator
from kit.generator.sampler import Frame, Sampling, draw_bits, sample_frames
from kit.generator.sequence import training_sequence
from kit.scales import ScaleSchedule
from kit.tokenizer.quantizer import bits_to_feature
from tests.fixtures import CLOSE, PROMPTS, RISING

SCHEDULE = ScaleSchedule(5, ((1, 1), (2, 2), (2, 3)))
FALLING = Guidance("falling", first=5.0, last=3.0)

pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.fixture
def seen(monkeypatch):
    """Records (f, k, logits) of every block that goes through the cached generator."""
    calls, blocks = [], CachedGenerator.blocks

    def spy(self, f, first, totals, before):
        logits = blocks(self, f, first, totals, before)
        parts = logits.split(self.schedule.tokens_per_scale[first : first + len(totals)], dim=1)
        calls.extend((f, k, part) for k, part in enumerate(parts, start=first))
        return logits

    monkeypatch.setattr(CachedGenerator, "blocks", spy)
    return calls


def sample(model, prompts=PROMPTS, seeds=(0, 1), schedule=SCHEDULE, history=None, **how) -> torch.Tensor:
    """Samples bits (B, L, d) of whole clips; `how` as for `Sampling`."""
    frames = sample_frames(model, schedule, list(prompts), list(seeds), Sampling(**how), history)
    return torch.cat([frame.bits for frame in frames], 1)


def inputs_from(
    bits: torch.Tensor, schedule: ScaleSchedule = SCHEDULE, inherit: str = "first", history: str = "scales"
) -> torch.Tensor:
    """Builds the inputs of all blocks from finished bits: partial sums of a block's frame, or the sum of the frame before.

    With `inherit` `all` the sum of the frame before, zero for the first frame, is appended to every input. With `history`
    `full` the finished sum of each frame but the last follows its blocks.
    """
    partial = [bits_to_feature(bits, schedule, scales=k + 1) for k in range(schedule.scales)]
    nothing, inputs = torch.zeros_like(partial[-1][:, :, 0]), []
    for f in range(schedule.latent_frames):
        before = partial[-1][:, :, f - 1] if f else nothing
        totals = [nothing if inherit == "none" else before, *(part[:, :, f] for part in partial)]
        grids = [*schedule.grids, schedule.grid] if history == "full" and f + 1 < schedule.latent_frames else schedule.grids
        for total, grid in zip(totals, grids):
            read = torch.cat([total, before], 1) if inherit == "all" else total
            inputs.append(F.interpolate(read, grid, mode="area").flatten(2).transpose(1, 2))
    return torch.cat(inputs, 1)


def full_logits(model, bits: torch.Tensor, dropped: bool = False, prompts=PROMPTS, schedule=SCHEDULE) -> torch.Tensor:
    """Computes logits (B, L, d) in one masked forward pass over the whole clip."""
    condition = model.condition(list(prompts), torch.full((len(prompts),), dropped))
    return model(inputs_from(bits, schedule, **model.config.reads), schedule, condition)


def random_bits(tokens: int, batch: int = 2, d: int = 4) -> torch.Tensor:
    return torch.rand(batch, tokens, d, generator=torch.Generator().manual_seed(5)) < 0.5


# --- the cache -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance", [Guidance(), RISING], ids=["free", "guided"])
@pytest.mark.parametrize("window", [None, 0, 1, 2])
@pytest.mark.parametrize("align, inherit", [("grid", "first"), ("center", "first"), ("sequence", "all"), ("grid", "none")])
@pytest.mark.parametrize("history", ["scales", "full"])
def test_cached_logits_are_those_of_the_full_forward(make_generator, seen, window, guidance, align, inherit, history):
    """They agree at every (frame, scale), in conditioned and unconditioned rows."""
    model = make_generator(window=window, align=align, inherit=inherit, history=history)
    bits = sample(model, guidance=guidance)
    rows = [full_logits(model, bits)] + ([] if guidance.neutral else [full_logits(model, bits, dropped=True)])
    expected = torch.cat(rows)
    assert [(f, k) for f, k, *_ in seen] == [(b.f, b.k) for b in SCHEDULE.blocks]
    for b, (*_, logits) in zip(SCHEDULE.blocks, seen):
        torch.testing.assert_close(logits, expected[:, b.slice], **CLOSE, msg=lambda m: f"block {b.f, b.k}: {m}")


@pytest.mark.parametrize("history", ["scales", "full"])
def test_a_smaller_clip_has_the_first_scales(make_generator, seen, history):
    """The cache is right for fewer scales too, and a history block is not taken for a scale that the clip does not have."""
    model, small = make_generator(history=history, align="center"), replace(SCHEDULE, grids=SCHEDULE.grids[:-1])
    bits = sample(model, schedule=small)
    expected = full_logits(model, bits, schedule=small)
    for b, (*_, logits) in zip(small.blocks, seen, strict=True):
        torch.testing.assert_close(logits, expected[:, b.slice], **CLOSE)
    layout, used = model.layout(small), {*range(small.scales), *([model.config.scales] if history == "full" else [])}
    assert set(model.scales_of(layout).tolist()) == used


def test_a_larger_clip_than_the_model_knows_is_refused(make_generator):
    large = replace(SCHEDULE, grids=(*SCHEDULE.grids, SCHEDULE.grid))
    with pytest.raises(ValueError, match="speaks 3 scales, the schedule has 4"):
        sample(make_generator(), schedule=large)


@pytest.mark.parametrize("clips, tokens", [(1, 11), (2, 10), (2, 6 * 11)])
def test_a_history_that_does_not_fit_is_refused(make_generator, clips, tokens):
    with pytest.raises(ValueError, match=rf"bits \(2, tokens, d\) of up to 5 whole frames .* got \({clips}, {tokens}, 4\)"):
        sample(make_generator(), history=random_bits(tokens, batch=clips))


@pytest.mark.parametrize("seeds", [(0,), (0, 1, 2)])
def test_each_prompt_needs_a_seed(make_generator, seeds):
    with pytest.raises(ValueError, match=f"each of the 2 prompts needs a seed, got {len(seeds)}"):
        sample(make_generator(), seeds=seeds)


@pytest.mark.parametrize("given", [1, 2, 5])
@pytest.mark.parametrize("window", [None, 0, 1, 2])
@pytest.mark.parametrize("inherit", ["first", "all", "none"])
@pytest.mark.parametrize("history", ["scales", "full"])
def test_a_given_frame_goes_through_in_one_pass(make_generator, seen, monkeypatch, window, inherit, history, given):
    """All logits equal the full forward pass; a given frame takes one pass, a frame to make one pass per scale."""
    model, bits = make_generator(window=window, inherit=inherit, history=history), random_bits(SCHEDULE.length)
    passes, run = [], CachedGenerator._run
    monkeypatch.setattr(CachedGenerator, "_run", lambda self, *args: passes.append(args) or run(self, *args))
    made = sample(model, history=bits[:, : given * SCHEDULE.tokens_per_frame], guidance=RISING)
    assert len(passes) == 1 + given + (SCHEDULE.latent_frames - given) * SCHEDULE.scales
    expected = torch.cat([full_logits(model, made), full_logits(model, made, dropped=True)])
    logits = torch.cat([part for *_, part in seen], 1)
    torch.testing.assert_close(logits, expected, **CLOSE)


@pytest.mark.parametrize("history", ["scales", "full"])
@pytest.mark.parametrize("window", [None, 1])
def test_cached_logits_in_mixed_precision(make_generator, seen, window, history):
    model = make_generator(window=window, history=history)
    with torch.autocast("cpu", torch.bfloat16):
        assert CachedGenerator(model, SCHEDULE, model.condition(PROMPTS)).cache.keys.dtype == torch.bfloat16
        bits = sample(model, guidance=RISING)
        expected = torch.cat([full_logits(model, bits), full_logits(model, bits, dropped=True)])
    logits = torch.cat([logits for *_, logits in seen], 1)
    assert logits.dtype == torch.float32
    assert (logits - expected).abs().mean() < 0.02 * expected.std()
    exact = torch.cat([full_logits(model, bits), full_logits(model, bits, dropped=True)])
    assert not torch.equal(expected, exact) and (expected - exact).abs().mean() < 0.05 * exact.std()


@pytest.mark.parametrize("history", ["scales", "full"])
def test_window_matters(make_generator, history):
    """The window changes logits, so the comparisons above are meaningful."""
    bits = random_bits(SCHEDULE.length)
    models = [make_generator(window=window, history=history) for window in (None, 2, 1, 0)]
    logits = [full_logits(model, bits)[:, SCHEDULE.frame(4)] for model in models]
    assert all((a - b).abs().max() > 1e-3 for a, b in zip(logits, logits[1:]))


@pytest.mark.parametrize("inherit", ["first", "all", "none"])
@pytest.mark.parametrize("history", ["scales", "full"])
def test_training_and_sampling_read_the_same_inputs(make_generator, monkeypatch, inherit, history):
    """With the bits of a real feature as history the sampler reads exactly the inputs that training uses for that feature."""
    feature = torch.randn(2, 4, 5, 2, 3, generator=torch.Generator().manual_seed(3))
    inputs, bits, _ = training_sequence(feature, SCHEDULE, None, None, inherit, history)
    model, read = make_generator(inherit=inherit, history=history), []
    embed = model.embed
    monkeypatch.setattr(model, "embed", lambda x, *args, **kwargs: read.append(x) or embed(x, *args, **kwargs))
    assert torch.equal(sample(model, history=bits), bits)
    assert torch.equal(torch.cat(read, 1), inputs)


@pytest.mark.parametrize("history", ["scales", "full"])
@pytest.mark.parametrize("inherit", ["first", "all"])
def test_bits_of_a_block_move_later_logits_only(make_generator, inherit, history):
    """Flipped bits of a block change the logits of later blocks only, for every block."""
    model, bits = make_generator(inherit=inherit, history=history), random_bits(SCHEDULE.length)
    clean = full_logits(model, bits)
    for b in SCHEDULE.blocks:
        other = bits.clone()
        other[:, b.slice] ^= True
        moved = (full_logits(model, other) - clean).abs().amax((0, 2)) > 1e-5
        assert not moved[: b.stop].any(), (b.f, b.k)
        assert moved[b.stop :].any() or b.stop == SCHEDULE.length, (b.f, b.k)


@pytest.mark.parametrize("history, kept", [("scales", SCHEDULE.tokens_per_frame), ("full", 6)])
def test_cache_does_not_grow_with_the_clip(make_generator, monkeypatch, history, kept):
    """With a window, its size and the keys that a block attends to are those of window + 1 frames for any length of clip."""
    made, attended, update_of = [], [], Cache.update_of

    def spy(self, index):
        update_cache = update_of(self, index)

        def counted(keys, values):
            found = update_cache(keys, values)
            attended.append(found[0].shape[2])
            return found

        made.append(self)
        return counted

    monkeypatch.setattr(Cache, "update_of", spy)
    model = make_generator(window=2, history=history)
    for frames in (2, 3, 7, 20):
        made.clear(), attended.clear()
        sample(model, schedule=SCHEDULE.with_latent_frames(frames))
        caches = {id(cache): cache for cache in made}
        assert len(caches) == 1
        most = 3 + min(2, frames - 1) * kept + SCHEDULE.tokens_per_frame
        assert made[0].keys.shape == made[0].values.shape == (2, 2, 2, most, 16)
        assert max(attended) == most


# --- guidance --------------------------------------------------------------------------------------------------------


def test_rising_guidance_of_the_paper():
    """Gamma of the first scale goes from 1 to 5 over the frames; within each frame gamma rises to 10."""
    schedule = ScaleSchedule.from_sides(5, (1, 2, 3, 4, 6, 8))
    first = [RISING.gamma(f, 0, schedule) for f in range(5)]
    assert first == pytest.approx([1, 2, 3, 4, 5])
    for f in range(5):
        steps = [RISING.gamma(f, k, schedule) for k in range(6)]
        assert steps[0] == pytest.approx(1 + f) and steps[-1] == pytest.approx(10)
        assert [b - a for a, b in zip(steps, steps[1:])] == pytest.approx([(10 - (1 + f)) / 5] * 5)


def test_falling_guidance_of_the_paper():
    """Gamma goes from 5 at the first block to 3 at the last one, in equal steps."""
    gammas = [FALLING.gamma(b.f, b.k, SCHEDULE) for b in SCHEDULE.blocks]
    assert gammas[0] == pytest.approx(5) and gammas[-1] == pytest.approx(3)
    assert [b - a for a, b in zip(gammas, gammas[1:])] == pytest.approx([-2 / 14] * 14)


def test_constant_guidance_and_what_is_neutral():
    assert {Guidance("constant", first=2.5).gamma(b.f, b.k, SCHEDULE) for b in SCHEDULE.blocks} == {2.5}
    assert Guidance().neutral and Guidance("constant", first=1.0).neutral
    assert not any(g.neutral for g in (RISING, FALLING, Guidance("constant", first=2.0)))


@pytest.mark.parametrize("guidance", [RISING, FALLING], ids=lambda g: g.kind)
def test_guidance_of_one_block_is_defined(guidance):
    assert guidance.gamma(0, 0, ScaleSchedule(1, ((1, 1),))) == guidance.first


def test_unknown_guidance_is_refused():
    with pytest.raises(ValueError, match="guidance.kind=up; expected one of: rising, falling, constant"):
        Guidance("up")
    for name in ("first", "last", "fine"):
        with pytest.raises(ValueError, match=f"guidance.{name}=much; expected a number"):
            Guidance(**{name: "much"})


@pytest.mark.parametrize("guidance", [RISING, FALLING, Guidance("constant", first=3.0)], ids=lambda g: g.kind)
def test_guidance_moves_logits_away_from_the_unconditioned_ones(make_generator, guidance):
    """Greedy bits are the signs of free + gamma (conditioned - free), all three recomputed from the finished clip."""
    model = make_generator()
    bits = sample(model, guidance=guidance, temperature=0.0)
    conditioned, free = full_logits(model, bits), full_logits(model, bits, dropped=True)
    gamma = torch.cat([torch.full((b.h * b.w, 1), guidance.gamma(b.f, b.k, SCHEDULE)) for b in SCHEDULE.blocks])
    guided = free + gamma * (conditioned - free)
    sure = guided.abs() > 1e-4
    assert torch.equal((guided > 0)[sure], bits[sure])
    assert ((conditioned > 0) != bits).any()  # and without guidance they would not be


def test_guidance_of_one_everywhere_is_no_guidance(make_generator):
    model = make_generator()
    everywhere = Guidance("rising", first=1.0, last=1.0, fine=1.0)
    for t in (0.0, 1.0):
        assert torch.equal(sample(model, guidance=everywhere, temperature=t), sample(model, temperature=t))


# --- temperature and seeds -------------------------------------------------------------------------------------------


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@pytest.mark.parametrize("temperature", [0.25, 1.0, 4.0])
@pytest.mark.parametrize("logit", [-2.0, 0.0, 1.0])
def test_bits_are_drawn_at_the_temperature(temperature, logit):
    """The share of ones is sigmoid(logit / temperature), within 5 standard errors."""
    n = 20_000
    share = draw_bits(torch.full((1, n, 1), logit), temperature, 1.0, generators(0)).float().mean().item()
    p = 1 / (1 + torch.tensor(-logit / temperature).exp().item())
    assert abs(share - p) < 5 * (p * (1 - p) / n) ** 0.5 + 1e-9


def test_temperature_ends_at_greedy_and_at_noise():
    """Bits with extreme logits are certain at usual temperatures, and random at a huge one."""
    logits = torch.where(random_bits(5000, batch=1), 30.0, -30.0)
    for temperature in (0.0, 1e-3, 1.0):
        assert torch.equal(draw_bits(logits, temperature, 1.0, generators(0)), logits > 0)
    wrong = (draw_bits(logits, 1e6, 1.0, generators(0)) != (logits > 0)).float().mean()
    assert abs(wrong - 0.5) < 5 * 0.5 / logits.numel() ** 0.5


@pytest.mark.parametrize(
    "value, message",
    [
        ({"temperature": -1}, "temperature must be 0 or more, got -1"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1, got 0.0"),
        ({"top_p": 1.5}, "top_p must be above 0 and at most 1, got 1.5"),
        ({"extend": "more"}, "extend=more; expected one of: reencode, positions"),
        ({"overlap": 8}, r"overlap=8; expected 1 \+ 4n frames"),
    ],
)
def test_impossible_sampling_is_refused(value, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**value)


@pytest.mark.parametrize("top_p, likeliest, others", [(1.0, 0.54, 0.10), (0.9, 0.60, 0.03), (0.5, 0.99, 0.0)])
def test_top_p_keeps_to_the_likeliest_codes(top_p, likeliest, others):
    """Bits with p = .9 and .6 make codes with .54, .36, .06 and .04; the last two are not in the nucleus of .9."""
    p = torch.tensor([0.9, 0.6])
    bits = draw_bits((p / (1 - p)).log().expand(1, 20_000, 2), 1.0, top_p, generators(0))[0]
    assert abs(bits.all(-1).float().mean() - likeliest) < 0.03
    assert (~bits[:, 0]).float().mean() <= others + 0.01


def test_top_p_minds_only_the_bits_that_a_scale_has(make_generator, monkeypatch):
    seen = []

    def greedy(logits, *how):
        seen.append(logits.shape[-1])
        return logits > 0

    monkeypatch.setattr("kit.generator.sampler.draw_bits", greedy)
    schedule = ScaleSchedule(2, SCHEDULE.grids, (2, 3, 4))
    bits = sample(make_generator(), schedule=schedule, top_p=0.5)
    assert seen == [2, 3, 4] * 2 and not bits[:, ~schedule.used_bits(4)].any()


def test_top_p_weighs_the_bits_of_a_token_together():
    """If all codes are equally likely, each bit stays random in a nucleus of codes."""
    bits = draw_bits(torch.zeros(1, 2000, 16), 1.0, 0.3, generators(0))
    assert abs(bits.float().mean() - 0.5) < 5 * 0.5 / bits.numel() ** 0.5


def test_guidance_leads_away_from_a_negative_prompt(make_generator):
    model = make_generator()
    bits = sample(model, guidance=Guidance("constant", first=3.0), temperature=0.0, negative="a green cube")
    conditioned, against = full_logits(model, bits), full_logits(model, bits, prompts=["a green cube"] * 2)
    guided = against + 3 * (conditioned - against)
    sure = guided.abs() > 1e-4
    assert torch.equal((guided > 0)[sure], bits[sure])
    assert not torch.equal(bits, sample(model, guidance=Guidance("constant", first=3.0), temperature=0.0))


def test_temperature_zero_is_greedy_and_needs_no_seed(make_generator):
    model = make_generator()
    bits = sample(model, temperature=0.0)
    logits = full_logits(model, bits)
    sure = logits.abs() > 1e-4
    assert sure.float().mean() > 0.99 and torch.equal((logits > 0)[sure], bits[sure])
    assert torch.equal(sample(model, seeds=(7, 8), temperature=0.0), bits)
    assert not torch.equal(sample(model, temperature=1.0), bits)


@pytest.mark.parametrize("guidance", [Guidance(), RISING], ids=["free", "guided"])
def test_a_clip_depends_on_its_own_seed_alone(make_generator, guidance):
    """It is the same in any batch and at any place in it."""
    model = make_generator()
    both = sample(model, guidance=guidance)
    for i in range(2):
        assert torch.equal(sample(model, PROMPTS[i : i + 1], (i,), guidance=guidance), both[i : i + 1])
    swapped = sample(model, PROMPTS[::-1], (1, 0), guidance=guidance)
    assert torch.equal(swapped, both.flip(0))
    assert torch.equal(sample(model, guidance=guidance), both)
    assert not torch.equal(sample(model, seeds=(0, 2), guidance=guidance)[1], both[1])
    nucleus = sample(model, guidance=guidance, top_p=0.8)
    assert torch.equal(sample(model, PROMPTS[1:], (1,), guidance=guidance, top_p=0.8), nucleus[1:])
    assert not torch.equal(nucleus, both)


def test_logits_of_a_clip_are_the_same_in_any_batch(make_generator, seen):
    """They are to the last bit: of the many bits of a video one would at times be drawn otherwise."""
    model = make_generator()
    sample(model, PROMPTS * 5, range(10))
    together = [logits[:2] for *_, logits in seen]
    seen.clear()
    sample(model)
    for b, expected, (*_, logits) in zip(SCHEDULE.blocks, together, seen, strict=True):
        assert torch.equal(logits, expected), (b.f, b.k)


def test_prompts_matter(make_generator):
    model = make_generator()
    bits = sample(model, seeds=(0, 0))
    assert not torch.equal(bits[0], bits[1])


# --- frames and history ----------------------------------------------------------------------------------------------


def test_a_frame_is_its_bits_and_their_sum(make_generator):
    model = make_generator()
    frames = list(sample_frames(model, SCHEDULE, PROMPTS, [0, 1]))
    assert len(frames) == 5 and all(isinstance(frame, Frame) for frame in frames)
    feature = bits_to_feature(torch.cat([frame.bits for frame in frames], 1), SCHEDULE)
    torch.testing.assert_close(torch.stack([frame.feature for frame in frames], 2), feature)


@pytest.mark.parametrize("window", [None, 1])
@pytest.mark.parametrize("guidance", [Guidance(), RISING], ids=["free", "guided"])
@pytest.mark.parametrize("given", [1, 3, 5])
def test_history_is_kept_and_continued(make_generator, window, guidance, given):
    """Given bits come back; every later greedy bit is the sign of the full forward pass's (guided) logit for that clip."""
    model = make_generator(window=window)
    history = random_bits(given * SCHEDULE.tokens_per_frame)
    bits = sample(model, guidance=guidance, temperature=0.0, history=history)
    assert torch.equal(bits[:, : history.shape[1]], history)
    logits = full_logits(model, bits)
    if not guidance.neutral:
        free = full_logits(model, bits, dropped=True)
        gamma = torch.cat([torch.full((b.h * b.w, 1), guidance.gamma(b.f, b.k, SCHEDULE)) for b in SCHEDULE.blocks])
        logits = free + gamma * (logits - free)
    new = slice(history.shape[1], None)
    sure = logits[:, new].abs() > 1e-4
    assert torch.equal((logits > 0)[:, new][sure], bits[:, new][sure])


def test_going_on_from_its_own_beginning_gives_the_same_clip(make_generator):
    model = make_generator()
    bits = sample(model, temperature=0.0)
    for given in range(1, 5):
        history = bits[:, : given * SCHEDULE.tokens_per_frame]
        assert torch.equal(sample(model, temperature=0.0, history=history), bits)


def test_what_follows_depends_on_the_history(make_generator):
    model, n = make_generator(), SCHEDULE.tokens_per_frame
    history = random_bits(n)
    a, b = sample(model, history=history), sample(model, history=~history)
    assert not torch.equal(a[:, n:], b[:, n:])
