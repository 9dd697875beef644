"""Bits, codes and the residual pyramid, against loops written from the method."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from kit.scales import ScaleSchedule
from kit.tokenizer.losses import commitment_loss, entropy_loss, reconstruction_loss
from kit.tokenizer.quantizer import (
    Step,
    bits_to_feature,
    block_input,
    clip_of,
    feature_to_bits,
    frames_of,
    pyramid,
    sequence_of,
    to_bits,
    to_code,
    tokens_to_map,
)

SCHEDULES = [
    ScaleSchedule.from_sides(3, (1, 2, 3, 4, 6, 8)),
    ScaleSchedule(2, ((1, 1), (2, 3), (3, 5))),
    ScaleSchedule(2, ((3, 4),)),
]
each_schedule = pytest.mark.parametrize("schedule", SCHEDULES, ids=str)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def feature_for(schedule: ScaleSchedule, batch: int = 2, d: int = 5) -> torch.Tensor:
    return noise(batch, d, schedule.latent_frames, *schedule.grid)


def area(x: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Resizes (d, h, w) by area, cell by cell: the mean of all pixels that a cell touches."""
    (h, w), (hk, wk) = x.shape[1:], grid
    rows = [(i * h // hk, -(-(i + 1) * h // hk)) for i in range(hk)]
    columns = [(j * w // wk, -(-(j + 1) * w // wk)) for j in range(wk)]
    return torch.stack([torch.stack([x[:, a:b, c:e].mean((1, 2)) for c, e in columns], 1) for a, b in rows], 1)


def walk_frame(feature: torch.Tensor, grids, disturb=lambda k, y, x, bits: bits):
    """Computes the pyramid of a frame (d, h, w) token by token: for each scale labels, bits entering the sum, and the sum."""
    d, h, w = feature.shape
    total, labels, entered, totals = torch.zeros_like(feature), [], [], []
    for k, grid in enumerate(grids):
        residual = area(feature - total, grid)
        label, bits, code = [], [], torch.empty(d, *grid)
        for y in range(grid[0]):
            for x in range(grid[1]):
                unit = residual[:, y, x] / residual[:, y, x].norm()
                label.append((unit > 0).tolist())
                bits.append(disturb(k, y, x, label[-1]))
                code[:, y, x] = torch.tensor([1.0 if bit else -1.0 for bit in bits[-1]]) / math.sqrt(d)
        total = total + F.interpolate(code[None], (h, w), mode="bilinear", align_corners=False)[0]
        labels.append(torch.tensor(label))
        entered.append(torch.tensor(bits))
        totals.append(total)
    return labels, entered, totals


@pytest.mark.parametrize("d", [1, 5, 48])
def test_bits_survive_their_code(d):
    """Converts random tokens to codes and back, and those with all bits 0 or all 1, which token readers tend to refuse."""
    bits = torch.cat([noise(20, d) > 0, torch.zeros(1, d, dtype=torch.bool), torch.ones(1, d, dtype=torch.bool)])
    code = to_code(bits)
    torch.testing.assert_close(code.norm(dim=1), torch.ones(22))
    torch.testing.assert_close(code.abs(), torch.full((22, d), d**-0.5))
    assert torch.equal(to_bits(code), bits)
    assert to_bits(torch.zeros(d)).tolist() == [False] * d


@each_schedule
@pytest.mark.parametrize("value", [False, True])
def test_all_zero_and_all_one_clips_survive_the_feature(schedule, value):
    bits = torch.full((2, schedule.length, 5), value)
    assert torch.equal(feature_to_bits(bits_to_feature(bits, schedule), schedule), bits)


def test_with_one_scale_every_clip_survives_the_feature():
    schedule = ScaleSchedule(3, ((3, 4),))
    bits = noise(2, schedule.length, 5) > 0
    assert torch.equal(feature_to_bits(bits_to_feature(bits, schedule), schedule), bits)


@each_schedule
@pytest.mark.parametrize("flips", [False, True])
def test_pyramid_is_the_walk_of_the_method(schedule, flips):
    """Labels, entered bits and running sums are equal, with and without flipped bits in the sum."""
    frames = frames_of(feature_for(schedule))
    N, d = frames.shape[:2]
    flip = [noise(N, h * w, d, seed=k) > 0.7 for k, (h, w) in enumerate(schedule.grids)]
    steps = list(pyramid(frames, schedule, (lambda k, label: label ^ flip[k]) if flips else None))
    assert len(steps) == schedule.scales
    for n in range(N):

        def disturb(k, y, x, bits):
            mine = flip[k][n, y * schedule.grids[k][1] + x].tolist()
            return [a != b for a, b in zip(bits, mine)] if flips else bits

        labels, entered, totals = walk_frame(frames[n], schedule.grids, disturb)
        for k, step in enumerate(steps):
            assert torch.equal(step.label[n], labels[k])
            assert torch.equal(step.bits[n], entered[k])
            torch.testing.assert_close(step.total[n], totals[k])


def test_a_flip_changes_later_labels_and_no_earlier_ones():
    schedule = SCHEDULES[0]
    frames = frames_of(feature_for(schedule))
    clean = list(pyramid(frames, schedule))
    flipped = list(pyramid(frames, schedule, lambda k, label: ~label if k == 2 else label))
    same = [torch.equal(a.label, b.label) for a, b in zip(clean, flipped)]
    assert same == [True, True, True, False, False, False]


@each_schedule
def test_the_sum_of_the_bits_is_the_sum_of_the_walk(schedule):
    """After every scale the decoder's sum of bits equals the encoder's."""
    feature = feature_for(schedule)
    steps = list(pyramid(frames_of(feature), schedule))
    bits = feature_to_bits(feature, schedule)
    assert torch.equal(bits, sequence_of([step.label for step in steps], 2))
    for k, step in enumerate(steps):
        torch.testing.assert_close(bits_to_feature(bits, schedule, scales=k + 1), clip_of(step.total, 2))
    torch.testing.assert_close(bits_to_feature(bits, schedule), clip_of(steps[-1].total, 2))


@each_schedule
def test_frames_and_clips_are_coded_on_their_own(schedule):
    """The tokens of a frame equal those of that frame coded alone; tokens are in frame-major order."""
    feature = feature_for(schedule)
    bits = feature_to_bits(feature, schedule)
    assert bits.shape == (2, schedule.length, 5) and bits.dtype == torch.bool
    back = bits_to_feature(bits, schedule)
    assert back.shape == feature.shape and back.dtype == torch.float32
    alone = schedule.with_latent_frames(1)
    for b in range(2):
        for f in range(schedule.latent_frames):
            one = feature_to_bits(feature[b : b + 1, :, f : f + 1], alone)
            assert torch.equal(bits[b : b + 1, schedule.frame(f)], one)
            torch.testing.assert_close(back[b : b + 1, :, f : f + 1], bits_to_feature(one, alone))


def test_tokens_are_rows_of_their_grid():
    tokens = torch.arange(6).view(1, 6, 1)
    assert tokens_to_map(tokens, (2, 3))[0, 0].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert torch.equal(tokens_to_map(tokens, (2, 3)).flatten(2).transpose(1, 2), tokens)


def test_frames_of_and_clip_of_are_inverse():
    feature = feature_for(SCHEDULES[0])
    frames = frames_of(feature)
    assert torch.equal(frames[3 + 1], feature[1, :, 1])
    assert torch.equal(clip_of(frames, 2), feature)


@pytest.mark.parametrize("grid", [(1, 1), (2, 2), (3, 3), (3, 5), (6, 8), (8, 8)])
@pytest.mark.parametrize("inherit", ["first", "all", "none"])
@pytest.mark.parametrize("k", [0, 1])
def test_a_block_reads_sums_resized_by_area(grid, inherit, k):
    """The first block of a frame reads the frame before, or nothing; the others their own frame, or both."""
    total, before = noise(2, 3, 8, 8), noise(2, 3, 8, 8) + 1
    own = total if k else before * (inherit != "none")
    read = torch.cat([own, before], 1) if inherit == "all" else own
    expected = torch.stack([area(frame, grid) for frame in read])
    torch.testing.assert_close(block_input(k, total, before, grid, inherit), expected.flatten(2).transpose(1, 2))


@pytest.mark.parametrize("tokens", [SCHEDULES[0].length - 1, SCHEDULES[0].length + 1, SCHEDULES[0].tokens_per_frame])
def test_wrong_number_of_tokens_is_refused(tokens):
    with pytest.raises(ValueError, match="390 tokens"):
        bits_to_feature(torch.zeros(1, tokens, 4, dtype=torch.bool), SCHEDULES[0])


@pytest.mark.parametrize(("scales", "type"), [(0, bool), (-1, bool), (7, bool), (None, float), (None, int)])
def test_other_bits_and_scales_than_there_are_are_refused(scales, type):
    with pytest.raises(ValueError, match="expected (1 to 6 scales|bits, True or False)"):
        bits_to_feature(torch.zeros(1, SCHEDULES[0].length, 4, dtype=type), SCHEDULES[0], scales)


# --- the tokenizer's training path -----------------------------------------------------------------------------------


@pytest.fixture
def trained_on(make_tokenizer):
    """A tokenizer, a video, and what its training path returns."""
    model = make_tokenizer()
    video = noise(2, 3, 5, 8, 8).clamp(-1, 1)
    return model, video, *model(video)


def test_training_path_decodes_the_bits(trained_on):
    model, video, output, features, steps = trained_on
    assert torch.equal(sequence_of([step.label for step in steps], 2), model.bits(video))
    torch.testing.assert_close(output.clamp(-1, 1), model.reconstruct(video))
    torch.testing.assert_close(clip_of(features, 2), model.encode(video))


def test_gradient_passes_straight_through_the_bits(trained_on):
    """The gradient at the feature is the decoder's gradient at the quantised feature, unchanged."""
    model, _, output, features, steps = trained_on
    weight = noise(*output.shape)
    quantised = clip_of(steps[-1].total.detach(), 2).requires_grad_()
    (expected,) = torch.autograd.grad((model.decode(quantised) * weight).sum(), quantised)
    (actual,) = torch.autograd.grad((output * weight).sum(), features)
    torch.testing.assert_close(clip_of(actual, 2), expected)


@pytest.mark.parametrize("kind", ["l1", "l2", "commitment", "entropy"])
def test_every_loss_is_positive_and_reaches_all_weights_of_the_encoder(trained_on, kind):
    model, video, output, features, steps = trained_on
    if kind == "commitment":
        loss = commitment_loss(features, steps)
    elif kind == "entropy":
        loss = entropy_loss(steps, inverse_temperature=2.0)
    else:
        loss = reconstruction_loss(output, video, kind)
    assert loss > 0
    loss.backward()
    for name, p in model.encoder.named_parameters():
        assert p.grad is not None and p.grad.abs().max() > 1e-7, name


def step_of(residual: torch.Tensor, total: torch.Tensor) -> Step:
    return Step(residual, None, None, total)


def test_reconstruction_loss_by_hand():
    output, video = torch.tensor([0.0, 0.5, -1.0]), torch.tensor([1.0, 0.5, 1.0])
    assert reconstruction_loss(output, video, "l1").item() == pytest.approx(3 / 3)
    assert reconstruction_loss(output, video, "l2").item() == pytest.approx(5 / 3)


def test_commitment_loss_by_hand():
    """With d = 2 and the final sum (0, 2) the squared distances are 1 and 0, which gives 2 * 0.5."""
    feature = torch.tensor([1.0, 2.0]).view(1, 2, 1, 1)
    totals = torch.zeros(1, 2, 1, 1), torch.tensor([0.0, 2.0]).view(1, 2, 1, 1)
    assert commitment_loss(feature, [step_of(feature, t) for t in totals]).item() == pytest.approx(1.0)


def test_entropy_loss_by_hand():
    """Two tokens of d = 2 at (+-1, 1) / sqrt(2): one bit balanced over the batch, one the same for both tokens."""
    residual = torch.tensor([[3.0, 3.0], [-0.2, 0.2]]).view(2, 2, 1, 1)

    def entropy(p: float) -> float:
        return -(p * math.log2(p) + (1 - p) * math.log2(1 - p))

    token = entropy(1 / (1 + math.exp(-2.0)))  # inverse temperature 2, times u sqrt(d) = 1
    expected = 1 - ((1 + token) / 2 - token)
    loss = entropy_loss([step_of(residual, residual)], inverse_temperature=2.0)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("tokens, expected", [([[1, 1], [-1, -1]], 0.0), ([[1, 1], [1, 1]], 1.0)])
def test_entropy_loss_is_zero_for_sure_and_balanced_bits_and_one_for_unused_ones(tokens, expected):
    residual = torch.tensor(tokens, dtype=torch.float32).view(2, 2, 1, 1)
    loss = entropy_loss([step_of(residual, residual)] * 3, inverse_temperature=50.0)
    assert loss.item() == pytest.approx(expected, abs=1e-3)


def test_entropy_of_an_exact_match_is_finite():
    residual = torch.zeros(2, 2, 1, 1, requires_grad=True)
    entropy_loss([step_of(residual, residual)], inverse_temperature=2.0).backward()
    assert residual.grad.isfinite().all()
