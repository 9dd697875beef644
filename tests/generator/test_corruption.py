"""Cross-Frame Error Correction: the flip probabilities, and the generator's inputs and targets."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from kit.draws import Draws
from kit.generator import sequence
from kit.generator.corruption import FlipLaw
from kit.generator.sequence import training_sequence
from kit.scales import ScaleSchedule
from kit.tokenizer.quantizer import bits_to_feature, feature_to_bits, pyramid

SCHEDULE = ScaleSchedule(3, ((1, 1), (2, 2), (3, 4)))
N = 4000  # samples of the statistics


def draws_of(clips: int, seed: int = 0) -> Draws:
    return Draws(seed, range(clips))


def feature_of(schedule: ScaleSchedule, batch: int = 2, d: int = 6) -> torch.Tensor:
    return torch.randn(batch, d, schedule.latent_frames, *schedule.grid, generator=torch.Generator().manual_seed(7)) * 0.6


def assert_uniform(x: torch.Tensor, low: float, high: float):
    """Checks range, mean and variance of samples of U(low, high), within 5 standard errors."""
    width = high - low
    assert x.min() >= low - 1e-6 and x.max() <= high + 1e-6
    assert abs(x.mean() - (low + high) / 2) < 5 * width / 12**0.5 / len(x) ** 0.5
    assert abs(x.var() / (width**2 / 12) - 1) < 5 * 0.9 / len(x) ** 0.5


@pytest.mark.parametrize("inherit", [False, True])
@pytest.mark.parametrize("law", [dict(), dict(p_min=0.05, p_max=0.2, delta=0.04)], ids=["paper", "other"])
def test_rates_follow_the_law_in_every_block(law, inherit):
    """Rates are U(p_min + delta f, p_max + delta f), except for the first block of a later frame if rates are inherited."""
    law = FlipLaw(**law, inherit=inherit)
    rates = law.draw(SCHEDULE, draws_of(N))
    assert rates.shape == (N, 3, 3)
    for f in range(3):
        for k in range(3):
            if not (inherit and f and k == 0):
                assert_uniform(rates[:, f, k], law.p_min + law.delta * f, law.p_max + law.delta * f)


def test_paper_is_the_default():
    assert FlipLaw() == FlipLaw(p_min=0.0, p_max=0.25, delta=0.01, inherit=True)


@pytest.mark.parametrize("value", [{"p_min": -0.1}, {"p_min": 0.3}, {"p_max": 1.1}, {"delta": -0.01}])
def test_impossible_laws_are_refused(value):
    with pytest.raises(ValueError, match="flip probabilities need 0 <= p_min <= p_max <= 1 and delta >= 0, got FlipLaw"):
        FlipLaw(**value)
    with pytest.raises(ValueError, match="correction.p_max=null; expected a number"):
        FlipLaw(p_max=None)


@pytest.mark.parametrize("scales", [1, 3])
def test_first_block_of_a_frame_inherits_from_the_last_one_before(scales):
    """The rate of (f, 0) is U(rate of (f - 1, K - 1), p_max + delta f): its place in that range is uniform and independent of
    it."""
    schedule = ScaleSchedule(4, SCHEDULE.grids[:scales])
    rates = FlipLaw().draw(schedule, draws_of(N))
    for f in range(1, 4):
        before, first, high = rates[:, f - 1, -1], rates[:, f, 0], 0.25 + 0.01 * f
        assert (first >= before - 1e-6).all()
        place = (first - before) / (high - before)
        assert_uniform(place, 0.0, 1.0)
        assert torch.corrcoef(torch.stack([place, before]))[0, 1].abs() < 5 / N**0.5


def test_rates_are_drawn_for_each_block_and_sample():
    rates = FlipLaw(inherit=False).draw(SCHEDULE, draws_of(N)).flatten(1)
    assert (torch.corrcoef(rates.T) - torch.eye(9)).abs().max() < 5 / N**0.5
    assert rates.unique().numel() > 0.99 * rates.numel()


def test_rates_end_at_one_half():
    """A bit that is flipped with a probability above 1/2 would carry information again."""
    rates = FlipLaw(p_max=0.45, delta=0.2).draw(ScaleSchedule(5, SCHEDULE.grids), draws_of(N))
    assert rates.max() <= 0.5
    assert rates[:, 1].max() > 0.49
    assert (rates[:, 3:, 1:] == 0.5).all() and (rates[:, 4] == 0.5).all()  # (3, 0) may inherit a lower rate


def test_rates_come_from_the_generator():
    draws = [FlipLaw().draw(SCHEDULE, draws_of(2, seed)) for seed in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    assert not FlipLaw(p_max=0.0, delta=0.0).draw(SCHEDULE, draws_of(2)).any()


def expected_sequence(feature: torch.Tensor, schedule: ScaleSchedule, rates: torch.Tensor, inherit: str = "first"):
    """Computes inputs and targets in a loop over (sample, frame, scale), for rates of 0 (keep) and 1 (flip)."""
    d, inputs, targets = feature.shape[1], [], []
    for b in range(len(feature)):
        total = torch.zeros(1, d, *schedule.grid)
        for f in range(schedule.latent_frames):
            here = feature[b : b + 1, :, f]
            context = before = total  # block (f, 0) reads the flipped sum of frame f - 1
            total = torch.zeros_like(total)
            for k, grid in enumerate(schedule.grids):
                read = torch.cat([context, before], 1) if inherit == "all" else context
                inputs.append(F.interpolate(read, grid, mode="area").flatten(2)[0].T)
                label = F.interpolate(here - total, grid, mode="area") > 0
                targets.append(label.flatten(2)[0].T)
                bits = ~label if rates[b, f, k] else label
                code = torch.where(bits, 1.0, -1.0) * d**-0.5
                total = total + F.interpolate(code, schedule.grid, mode="bilinear", align_corners=False)
                context = total
    return (torch.cat(x).unflatten(0, (len(feature), -1)) for x in (inputs, targets))


@pytest.mark.parametrize("inherit", ["first", "all"])
@pytest.mark.parametrize("seed", range(4))
def test_inputs_and_targets_are_the_walk_with_flipped_bits(seed, inherit):
    """Each block is flipped completely or not at all: inputs are sums of flipped bits, and targets are taken against them."""
    feature = feature_of(SCHEDULE)
    rates = (draws_of(2, seed).rand(3, 3) < 0.5).float()
    inputs, targets, _ = training_sequence(feature, SCHEDULE, rates, draws_of(2), inherit)
    expected_inputs, expected_targets = expected_sequence(feature, SCHEDULE, rates, inherit)
    torch.testing.assert_close(inputs, expected_inputs)
    assert torch.equal(targets, expected_targets)
    assert not torch.equal(targets, feature_to_bits(feature, SCHEDULE))


@pytest.mark.parametrize("rates", [None, torch.zeros(2, 3, 3)], ids=["None", "zero"])
def test_without_flips_the_sequence_is_clean(rates):
    feature = feature_of(SCHEDULE)
    inputs, targets, _ = training_sequence(feature, SCHEDULE, rates, draws_of(2))
    bits = feature_to_bits(feature, SCHEDULE)
    assert inputs.shape == targets.shape == (2, SCHEDULE.length, 6)
    assert inputs.dtype == torch.float32 and targets.dtype == torch.bool
    assert torch.equal(targets, bits)
    expected_inputs, _ = expected_sequence(feature, SCHEDULE, torch.zeros(2, 3, 3))
    torch.testing.assert_close(inputs, expected_inputs)
    assert not inputs[:, SCHEDULE.block(0, 0).slice].any()
    last = F.interpolate(bits_to_feature(bits, SCHEDULE)[:, :, 0], (1, 1), mode="area")
    torch.testing.assert_close(inputs[:, SCHEDULE.block(1, 0).slice], last.flatten(2).transpose(1, 2))


def test_a_margin_is_what_a_wrong_bit_costs():
    """With codes +-a and residual r wrong bits cost 4 a |r| of squared error; tried on the finest scale, also after flips."""
    d, n = 6, SCHEDULE.tokens_per_frame
    feature = feature_of(SCHEDULE, batch=1, d=d)
    finest = torch.arange(SCHEDULE.length) % n >= n - 12
    for flipped in (False, True):
        rates = torch.zeros(1, 3, 3)
        rates[:, :, 0] = float(flipped)  # the coarsest scale's bits are all wrong
        _, targets, margins = training_sequence(feature, SCHEDULE, rates, draws_of(1))
        entered = targets ^ (flipped & (torch.arange(SCHEDULE.length) % n == 0))[:, None]
        right = (feature - bits_to_feature(entered, SCHEDULE)).square().sum()
        assert margins.shape == targets.shape and margins.dtype == torch.float32 and (margins >= 0).all()
        for token in torch.where(finest)[0]:
            for bit in range(d):
                wrong = entered.clone()
                wrong[0, token, bit] ^= True
                cost = (feature - bits_to_feature(wrong, SCHEDULE)).square().sum() - right
                torch.testing.assert_close(cost, 4 * margins[0, token, bit] / d, rtol=1e-3, atol=1e-4)


def assert_rate(flips: torch.Tensor, rate: torch.Tensor):
    """Checks the share of flips in each row of (..., n) against its rate, within 5 standard errors."""
    bound = 5 * (rate * (1 - rate) / flips.shape[-1]).sqrt() + 1e-6
    assert ((flips.float().mean(-1) - rate).abs() <= bound).all()


def test_measured_flips_match_their_rates_in_every_block(monkeypatch):
    """Flips are counted in each frame and scale, where the bits enter the sum; those of two frames are independent."""
    seen = []

    def spy(*args):
        for step in pyramid(*args):
            seen.append(step.bits ^ step.label)
            yield step

    monkeypatch.setattr(sequence, "pyramid", spy)
    feature = feature_of(SCHEDULE, batch=3, d=2000)
    rates = FlipLaw(p_max=0.4, delta=0.02).draw(SCHEDULE, draws_of(3))
    training_sequence(feature, SCHEDULE, rates, draws_of(len(feature), 1))
    for k, flips in enumerate(seen):
        flips = flips.unflatten(0, (3, 3)).flatten(2)
        assert_rate(flips, rates[:, :, k])
        assert_rate(flips[:, 0] & flips[:, 1], rates[:, 0, k] * rates[:, 1, k])


def test_flipped_bits_are_what_the_next_frame_reads():
    """With one scale, block (f + 1, 0) reads exactly the flipped bits of frame f."""
    schedule = ScaleSchedule(4, ((12, 12),))
    feature = feature_of(schedule, batch=3, d=16)
    rates = FlipLaw(p_max=0.4, delta=0.02).draw(schedule, draws_of(3))
    inputs, targets, _ = training_sequence(feature, schedule, rates, draws_of(len(feature), 1))
    for f in range(3):
        entered = inputs[:, schedule.frame(f + 1)] > 0
        assert_rate((entered ^ targets[:, schedule.frame(f)]).flatten(1), rates[:, f, 0])
