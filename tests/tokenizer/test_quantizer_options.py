"""Options of the quantizer: fewer bits on coarse scales, stochastic depth, learned amplitude, entropy schedule."""

from __future__ import annotations

import csv
import re
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from callbacks import CodeUse
from kit.cli import main
from kit.draws import Draws
from kit.generator.corruption import FlipLaw
from kit.generator.losses import accuracy_by_block, weights_of_scales
from kit.generator.sampler import Sampling, sample_frames
from kit.generator.sequence import training_sequence
from kit.inspection import bit_use
from kit.scales import ScaleSchedule
from kit.tokenizer import Tokenizer, TokenizerConfig
from kit.tokenizer.losses import entropy_loss
from kit.tokenizer.module import TokenizerModule
from kit.tokenizer.quantizer import bits_to_feature, block_input, feature_to_bits, pyramid
from kit.values import plain
from tests.fixtures import composed, fit_generator, fit_tokenizer
from tests.plugin import randomise

GRIDS = ((1, 1), (2, 2), (4, 4))
FEWER = ScaleSchedule(2, GRIDS, (2, 3, 6))
SHAPE = dict(bits=6, scales=(1, 2, 4), patch=2, widths=(8, 8), blocks=1)
CLIP = {"frames": 5, "height": 16, "width": 16, "fps": 8}


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make_module(*overrides: str, steps: int = 11) -> TokenizerModule:
    cfg = composed("stage1_tokenizer", "size=tiny", *overrides)
    arguments = plain(cfg.loss), plain(cfg.optimizer), CLIP, steps, plain(cfg.scale_dropout), 0
    return TokenizerModule({**SHAPE, "scales": [1, 2, 4], "widths": [8, 8]}, *arguments)


def test_the_schedule_knows_which_bits_there_are():
    used = FEWER.used_bits(6)
    assert used.shape == (FEWER.length, 6)
    assert used.sum(1).tolist() == ([2] + [3] * 4 + [6] * 16) * 2
    assert used[1].tolist() == [True] * 3 + [False] * 3
    assert FEWER.used_bits(6)[: FEWER.tokens_per_frame].sum() == 2 + 3 * 4 + 6 * 16
    assert ScaleSchedule(2, GRIDS).used_bits(6).shape == (2 * 21, 6) and ScaleSchedule(2, GRIDS).used_bits(6).all()
    assert FEWER.with_latent_frames(7).bits == FEWER.bits
    for wrong in ((2, 6), (0, 3, 6)):
        with pytest.raises(ValueError, match="each of the 3 scales needs 1 bit or more"):
            ScaleSchedule(2, GRIDS, wrong)
    for wrong in ((2, 3, 7), (2, 6), (0, 3, 6), (2, 3, 3), (7, 3, 6)):
        with pytest.raises(ValueError, match="scale_bits=.*expected 3 numbers of 1 to 6, the last one 6"):
            TokenizerConfig(**SHAPE, scale_bits=wrong)


@pytest.mark.parametrize(
    "key, value, told",
    [
        ("scales", [], "scales=[]; expected whole numbers of 1 or more"),
        ("scales", [0, 1], "scales=[0, 1]; expected whole"),
        ("scales", [1, 2, 4, 4], "scales=[1, 2, 4, 4]; expected sides that rise, such as"),
        ("scales", [1, 8, 4], "scales=[1, 8, 4]; expected sides that rise"),
        ("widths", [], "widths=[]; expected"),
        ("patch", 0, "patch=0; expected"),
        ("bits", 0, "bits=0; expected"),
        ("bits", "many", "bits=many; expected"),
        ("amplitude", 0, "amplitude=0; expected a number above 0, or null"),
        ("amplitude", float("inf"), "amplitude=inf; expected a number above 0, or null"),
        ("depth", 3, "tokenizer has no depth; its keys are amplitude, architecture, bits"),
    ],
)
def test_values_that_no_tokenizer_can_have(key, value, told):
    with pytest.raises(ValueError, match=re.escape(told)):
        TokenizerConfig.from_dict({**SHAPE, key: value})


@pytest.mark.parametrize("flips", [False, True])
def test_a_bit_that_a_scale_lacks_is_the_pyramid_without_that_scale(flips):
    """Each channel on its own is a pyramid of the scales that have it."""
    feature = noise(3, 6, 4, 4)
    turned = [noise(3, h * w, 6, seed=k + 1) > 0.7 for k, (h, w) in enumerate(GRIDS)]
    steps = list(pyramid(feature, FEWER, (lambda k, label: label ^ turned[k]) if flips else None))
    for channel in range(6):
        total = torch.zeros(3, 4, 4)
        for k, (grid, step) in enumerate(zip(GRIDS, steps)):
            if channel >= FEWER.bits[k]:
                assert not step.label[..., channel].any() and not step.bits[..., channel].any()
            else:
                residual = F.adaptive_avg_pool2d((feature[:, channel] - total)[:, None], grid)[:, 0]
                torch.testing.assert_close(step.residual[:, channel], residual)
                assert torch.equal(step.label[..., channel], residual.flatten(1) > 0)
                entered = step.label[..., channel] ^ (turned[k][..., channel] & flips)
                assert torch.equal(step.bits[..., channel], entered)
                code = (entered.float() * 2 - 1).view(3, 1, *grid) * 6**-0.5
                total = total + F.interpolate(code, (4, 4), mode="bilinear", align_corners=False)[:, 0]
            torch.testing.assert_close(step.total[:, channel], total)
    assert [step.residual.shape[1] for step in steps] == [2, 3, 6]


def test_bits_and_feature_agree_with_the_training_path():
    tokenizer = randomise(Tokenizer(TokenizerConfig(**SHAPE, scale_bits=(2, 3, 6)))).eval()
    video = noise(2, 3, 5, 16, 16).clamp(-1, 1)
    with torch.no_grad():
        output, _, _ = tokenizer(video)
        bits, schedule = tokenizer.bits(video), tokenizer.schedule_of(video)
        assert not (bits & ~schedule.used_bits(6)).any()
        torch.testing.assert_close(tokenizer.reconstruct(video), output.clamp(-1, 1))
    everywhere = Tokenizer(TokenizerConfig(**SHAPE, scale_bits=(6, 6, 6)))
    everywhere.load_state_dict(tokenizer.state_dict())
    whole = randomise(Tokenizer(TokenizerConfig(**SHAPE)))
    whole.load_state_dict(tokenizer.state_dict())
    with torch.no_grad():
        assert torch.equal(everywhere.bits(video), whole.bits(video))


def test_bits_a_scale_lacks_are_neither_read_nor_predicted():
    feature = noise(2, 6, 2, 4, 4)
    rates = FlipLaw(p_max=0.5).draw(FEWER, Draws(0, range(2)))
    _, targets, margins = training_sequence(feature, FEWER, rates, Draws(1, range(2)))
    used = FEWER.used_bits(6)
    assert not (targets & ~used).any() and targets[:, used].any()
    assert not margins[:, ~used].any() and (margins[:, used] > 0).all()
    torch.testing.assert_close(margins[:, 0, :2], feature[:, :2, 0].mean((2, 3)).abs() * 6**0.5)
    bits = feature_to_bits(feature, FEWER)
    torch.testing.assert_close(bits_to_feature(bits | ~used, FEWER), bits_to_feature(bits, FEWER))

    for kind in ("uniform", "early"):
        weights = weights_of_scales(FEWER, 6, kind)
        assert weights.mean().item() == pytest.approx(1) and torch.equal(weights > 0, used)
    logits, others = noise(2, FEWER.length, 6), noise(2, FEWER.length, 6, seed=5)
    others = torch.where(used, logits, others)
    weights = weights_of_scales(FEWER, 6, "uniform")
    one, other = (F.binary_cross_entropy_with_logits(x, targets.float(), weight=weights) for x in (logits, others))
    assert one.item() == other.item()
    by_hand = F.binary_cross_entropy_with_logits(logits[:, used], targets[:, used].float())
    torch.testing.assert_close(one, by_hand)
    right = (logits > 0) == targets
    assert torch.equal(accuracy_by_block(right, FEWER), accuracy_by_block(right | ~used, FEWER))


def test_stochastic_depth_leaves_out_what_it_says():
    feature, schedule = noise(2, 6, 4, 4), ScaleSchedule(1, GRIDS)
    kept = torch.tensor([[True, True, True], [True, False, True]])
    whole, some = list(pyramid(feature, schedule)), list(pyramid(feature, schedule, kept=kept))
    for a, b in zip(whole, some):
        torch.testing.assert_close(a.total[0], b.total[0])
    assert torch.equal(some[1].total[1], some[0].total[1])
    torch.testing.assert_close(some[2].residual[1], (feature - some[0].total)[1])

    tokenizer = randomise(Tokenizer(TokenizerConfig(**SHAPE)))
    video = noise(2, 3, 5, 16, 16).clamp(-1, 1)
    kept = torch.tensor([[True, True, True], [True, False, False]])  # of each clip, for all of its frames
    bits, schedule = tokenizer.bits(video), tokenizer.schedule_of(video)
    with torch.no_grad():
        whole, first = tokenizer(video, kept)[0].clamp(-1, 1)
        torch.testing.assert_close(whole, tokenizer.decode_bits(bits, schedule)[0])
        torch.testing.assert_close(first, tokenizer.decode_bits(bits, schedule, 1)[1])


def test_scales_are_left_out_at_the_given_rate_and_again_the_same_way():
    def kept(module, first: int, side: int = 16) -> torch.Tensor:
        return module.kept_scales(torch.zeros(4, 3, 1, side, side), Draws(module.seed, torch.arange(4) + first))

    module = make_module("scale_dropout.last=2", "scale_dropout.p=0.3")
    drawn = torch.cat([kept(module, 4 * i) for i in range(500)])
    assert drawn[:, 0].all()
    assert ((~drawn[:, 1:]).float().mean(0) - 0.3).abs().max() < 0.05  # 5 standard errors of 2,000
    joint = (~drawn[:, 1] & ~drawn[:, 2]).float().mean().item()
    assert joint == pytest.approx(0.09, abs=0.035)
    assert torch.equal(drawn[8:12], kept(module, 8))
    small = torch.cat([kept(module, 4 * i, 8) for i in range(50)])
    assert small.shape == (200, 2) and small[:, 0].all() and not small[:, 1].all(), "the first one stays"
    assert kept(make_module(), 0) is None
    for words in (["scale_dropout.last=3"], ["scale_dropout.last=-1"], ["scale_dropout.p=1"]):
        with pytest.raises(ValueError, match="scale_dropout=.*0 to 2 of the 3 scales"):
            make_module(*words)


@pytest.mark.parametrize("amplitude", [1.5, 2])
def test_learned_amplitude_is_the_features_and_is_trained(amplitude):
    tokenizer = Tokenizer(TokenizerConfig(**SHAPE, amplitude=amplitude, learned_amplitude=True))
    assert tokenizer.amplitude.item() == amplitude
    randomise(tokenizer)
    video = noise(2, 3, 5, 16, 16).clamp(-1, 1)
    with torch.no_grad():
        tokenizer.amplitude.fill_(1.25)
    feature = tokenizer.encode(video)
    rms = feature.square().mean((1, 3, 4)).sqrt() * 6**0.5
    torch.testing.assert_close(rms, torch.full_like(rms, 1.25))
    assert feature.square().mean(1).std() > 0.01, "each frame has that size, but not each of its places"
    (tokenizer(video)[0] - video).square().mean().backward()
    assert tokenizer.amplitude.grad.abs() > 0
    with pytest.raises(ValueError, match="learned_amplitude=true needs an amplitude to start from"):
        TokenizerConfig(**SHAPE, amplitude=None, learned_amplitude=True)


def test_a_frame_without_any_feature_has_no_amplitude():
    tokenizer = Tokenizer(TokenizerConfig(**SHAPE))
    tokenizer.encoder.register_forward_hook(lambda module, inputs, feature: feature * 0)
    assert not tokenizer.encode(torch.zeros(1, 3, 5, 16, 16)).any()


def test_entropy_weight_goes_in_a_straight_line():
    module = make_module("loss.entropy_weight=0.1", "loss.entropy_weight_end=0.02")
    seen = []
    for step in (0, 5, 10, 12):
        module._trainer = SimpleNamespace(global_step=step)
        seen.append(module.entropy_weight)
    assert seen == pytest.approx([0.1, 0.06, 0.02, 0.02])
    module = make_module("loss.entropy_weight=0.3")
    module._trainer = SimpleNamespace(global_step=7)
    assert module.entropy_weight == pytest.approx(0.3)


def test_entropy_is_of_the_bits_there_are():
    feature = noise(4, 6, 4, 4).requires_grad_()
    few = entropy_loss(list(pyramid(feature, FEWER))[:1], 2.0)
    alone = entropy_loss(list(pyramid(feature[:, :2], ScaleSchedule(1, GRIDS)))[:1], 2.0)
    torch.testing.assert_close(few, alone)
    torch.testing.assert_close(*(torch.autograd.grad(loss, feature)[0] for loss in (few, alone)))


def test_bit_use_has_no_value_where_there_is_no_bit():
    bits = feature_to_bits(noise(2, 6, 2, 4, 4), FEWER)
    use = bit_use(bits, FEWER)
    assert use["ones"].isnan().sum(1).tolist() == use["entropy"].isnan().sum(1).tolist() == [4, 3, 0]


def test_bit_use_of_a_validation_is_of_all_its_clips_and_of_no_other(tmp_path):
    """Of batches of 3 clips and 1 each clip counts as much, and nothing of the validation before is left."""
    logged, use, schedule = {}, CodeUse(str(tmp_path)), ScaleSchedule(1, GRIDS)
    module = SimpleNamespace(device="cpu", schedule=schedule, log_dict=lambda values, **_: logged.update(values))
    strategy = SimpleNamespace(reduce=lambda x, reduce_op: x)
    trainer = SimpleNamespace(sanity_checking=False, is_global_zero=False, strategy=strategy)
    before, clips = noise(2, schedule.length, 6) > 1, noise(4, schedule.length, 6, seed=1) > 0
    clips[..., 0] = False  # a dead bit
    for batches in ([before], clips.split([3, 1])):
        use.on_validation_epoch_start(trainer, module)
        for number, bits in enumerate(batches):
            use.on_validation_batch_end(trainer, module, {"bits": bits}, None, number)
        use.on_validation_epoch_end(trainer, module)
    expected = bit_use(clips, schedule)["entropy"]
    found = torch.stack([logged[f"val/bit_entropy_scale{k + 1}"] for k in range(3)])
    torch.testing.assert_close(found, expected.mean(1))
    assert logged["val/dead_bits"] == (expected < 0.01).sum() >= 3


def test_by_command(tmp_path):
    """With all options at once: trains, looks at bit use, trains a generator on it, inspects, samples."""
    options = ["tokenizer.scale_bits=[2,4,8]", "tokenizer.learned_amplitude=true", "loss.entropy_weight_end=0"]
    depth = ["scale_dropout.last=1", "scale_dropout.p=0.2"]
    assert fit_tokenizer(tmp_path, *options, *depth, "recipe.tokenizer.steps=6", "trainer.val_check_interval=3") == 0
    pictures = sorted((tmp_path / "tokenizer" / "media").glob("bit_use_step*.png"))
    assert [p.name for p in pictures] == ["bit_use_step000003.png", "bit_use_step000006.png"]
    shown = Image.open(pictures[-1])
    assert shown.size[0] >= 76 + 8 * 14
    assert shown.getpixel((76 + 6 * 14 + 5, 22 + 5)) == (255, 255, 255)  # no cell: scale 1 has 2 bits
    (log,) = (tmp_path / "tokenizer" / "logs").glob("version_0/metrics.csv")
    rows = [row for row in csv.DictReader(log.open()) if row["val/dead_bits"]]
    assert all(0 <= float(row[f"val/bit_entropy_scale{k}"]) <= 1 for row in rows for k in (1, 2, 3))
    assert len(rows) == 2 and all(0 <= float(row["val/dead_bits"]) <= 14 for row in rows)

    tokenizer = tmp_path / "tokenizer" / "checkpoints" / "last.ckpt"
    assert fit_generator(tmp_path, "recipe.generator.steps=4", "trainer.val_check_interval=4", tokenizer=tokenizer) == 0
    generator = tmp_path / "generator" / "checkpoints" / "last.ckpt"
    assert main(["inspect", f"ckpt={generator}", f"root={tmp_path}", "name=seen", "clips=2"]) == 0
    assert main(["generate", f"ckpt={generator}", f"root={tmp_path}", "name=made", "prompt=a red square", "n=1"]) == 0
    assert list((tmp_path / "made").glob("*.mp4"))


def test_samples_have_no_bit_that_a_scale_lacks(make_generator):
    """Greedy samples are the signs of the full forward pass's logits for bits that the scale has, else 0."""
    model = make_generator(bits=6, scales=3)
    greedy = torch.cat([frame.bits for frame in sample_frames(model, FEWER, ["a"], [0], Sampling(temperature=0.0))], 1)
    inputs, _, _ = training_sequence(bits_to_feature(greedy, FEWER), FEWER, None, None, model.config.inherit)
    partial = [bits_to_feature(greedy, FEWER, k + 1) for k in range(3)]  # what the blocks read, whatever its own bits are
    for b in FEWER.blocks:
        before = partial[-1][:, :, b.f - 1] * (b.f > 0)
        inputs[:, b.slice] = block_input(b.k, partial[b.k - 1][:, :, b.f], before, (b.h, b.w), model.config.inherit)
    with torch.no_grad():
        logits = model(inputs, FEWER, model.condition(["a"]))
    assert torch.equal(greedy, (logits > 0) & FEWER.used_bits(6))
    bits = torch.cat([frame.bits for frame in sample_frames(model, FEWER, ["a"], [0])], 1)
    assert not (bits & ~FEWER.used_bits(6)).any() and bits.any()
