"""The generator's loss: the weight of each bit, and the accuracy of bits."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch

from kit.build import BUILDERS, build_data
from kit.checkpoint import load_generator
from kit.data.shapes import Shapes
from kit.draws import Draws
from kit.fsdp import ShardedStrategy
from kit.generator import module as module_file
from kit.generator.losses import POWERS, accuracy_by_block, bit_loss, weights_of_scales
from kit.generator.mask import draw_kept_frames
from kit.generator.sequence import training_sequence
from kit.scales import ScaleSchedule
from tests.fixtures import CLIP, GENERATOR, TOKENIZER, composed


def module_of(pair, *words: str):
    run = [*CLIP, *TOKENIZER, *GENERATOR, "size=tiny", "data.batch_size=4", f"tokenizer_ckpt={pair.tokenizer}", *words]
    cfg = composed("stage2_generator", *run)
    return BUILDERS["generator"](cfg, build_data(cfg))


@pytest.mark.parametrize("bits", ["uniform", "margin"])
@pytest.mark.parametrize("scales", ["uniform", "early"])
def test_the_loss_by_hand(pair, scales, bits):
    module = module_of(pair, f"loss.scale_weights={scales}", f"loss.bit_weights={bits}")
    schedule = module.schedule
    sequence = training_sequence(torch.randn(2, 8, schedule.latent_frames, *schedule.grid), schedule, None, None)
    logits = torch.randn(sequence.targets.shape)
    sizes = torch.tensor([b.h * b.w for b in schedule.blocks for _ in range(b.h * b.w)])
    weights = (sizes.max() / sizes) ** POWERS[scales]
    weights = (weights / weights.mean())[:, None] * (sequence.margins if bits == "margin" else 1)
    right = torch.where(sequence.targets, logits, -logits)
    expected = (weights * torch.log1p(torch.exp(-right))).mean()
    torch.testing.assert_close(bit_loss(logits, sequence, schedule, **module.loss), expected)


def test_the_weights_of_scales_by_hand():
    """A token of the first scale covers four of the second, and weighs as much or twice as much."""
    schedule = ScaleSchedule(2, ((1, 1), (2, 2)))
    assert torch.equal(weights_of_scales(schedule, 3, "uniform"), torch.ones(10, 3))
    expected = torch.tensor([2.0, 1, 1, 1, 1] * 2)[:, None].expand(10, 3) / 1.2
    torch.testing.assert_close(weights_of_scales(schedule, 3, "early"), expected)


def test_given_frames_are_not_to_be_predicted(pair):
    """Logits of given frames have no gradient; those of other frames have the same gradient as without given frames."""
    module = module_of(pair, "data.frames=13")
    schedule = module.schedule
    sequence = training_sequence(torch.randn(3, 8, schedule.latent_frames, *schedule.grid), schedule, None, None)
    logits = torch.randn(sequence.targets.shape, requires_grad=True)

    def gradient(given):
        (found,) = torch.autograd.grad(bit_loss(logits, sequence, schedule, **module.loss, given=given), logits)
        return found.unflatten(1, (schedule.latent_frames, -1))

    everywhere, found = gradient(None), gradient(torch.tensor([0, 1, 3]))
    assert torch.equal(gradient(torch.zeros(3, dtype=torch.long)), everywhere)
    for clip, given in enumerate((0, 1, 3)):
        assert not found[clip, :given].any() and torch.equal(found[clip, given:], everywhere[clip, given:])


def late_clips() -> dict:
    """A batch of 8 clips, of some of which the first frames are given."""
    clips = Shapes("train", 13, 32, 32, late=0.4)
    return torch.utils.data.default_collate([{**clips[n], "n": n} for n in range(8)])


def test_a_training_step_by_hand(pair):
    """Flipped bits, hidden frames and dropped conditions come from the clips' own draws, and each changes the loss."""
    words = ["correction.p_max=0.4", "frame_mask=0.4", "drop_condition=0.5", "data.frames=13", "data.batch_size=8", "seed=3"]
    module = module_of(pair, *words)
    module.model.load_state_dict(load_generator(pair.generator)[0].model.state_dict())  # a new one heeds nothing yet
    batch = late_clips()
    draws, model = Draws(3, batch["n"]), module.model
    feature = module.tokenizer.encode(batch["video"])
    schedule = module.tokenizer.schedule_of(batch["video"])
    rates = module.law.draw(schedule, draws)
    sequence = training_sequence(feature, schedule, rates, draws, **model.config.reads)
    kept = draw_kept_frames(schedule.latent_frames, 0.4, draws)
    dropped = draws.rand() < 0.5
    clean = training_sequence(feature, schedule, None, None, **model.config.reads)

    def loss(sequence=sequence, kept=kept, dropped=dropped, given=batch["given"]):
        condition = model.condition(model.condition.prompts(batch), dropped)
        return bit_loss(model(sequence.inputs, schedule, condition, kept), sequence, schedule, **module.loss, given=given)

    assert 0 < dropped.sum() < 8 and not kept.all() and 0 < batch["given"].sum() < 8
    found = module.training_step(batch, 0)
    torch.testing.assert_close(found, loss())
    for other in (
        loss(sequence=clean),
        loss(kept=None),
        loss(dropped=torch.zeros(8, dtype=torch.bool)),
        loss(dropped=~dropped),
        loss(given=None),
    ):
        assert abs(other - found) > 1e-5


def test_without_the_frame_mask_clips_have_no_masks_of_their_own(pair, monkeypatch):
    """The loss is, to the last bit, that of frames which might be hidden and are not: all draws stay the same."""
    module = module_of(pair, "correction.p_max=0.4", "drop_condition=0.5", "data.frames=13", "seed=3")
    module.model.load_state_dict(load_generator(pair.generator)[0].model.state_dict())
    forward, batch, found = module.model.forward, late_clips(), []

    def spy(inputs, schedule, condition, kept):
        found.append(kept)
        return forward(inputs, schedule, condition, kept)

    monkeypatch.setattr(module.model, "forward", spy)
    module.frame_mask = 0.0
    without = module.training_step(batch, 0)
    module.frame_mask = 1e-9
    assert torch.equal(module.training_step(batch, 0), without)
    assert found[0] is None and found[1].all()


def test_what_is_logged_by_hand(pair, monkeypatch):
    """Of bits that coarse scales lack none counts; a validation is without flips, and over the given frames too."""
    module = module_of(pair, "correction.p_max=0", "correction.delta=0", "frame_mask=0", "drop_condition=0", "data.frames=13")
    module.model.load_state_dict(load_generator(pair.generator)[0].model.state_dict())
    schedule = replace(module.schedule, bits=(2, 4, 8))
    logged, batch = {}, late_clips()
    monkeypatch.setattr(module_file, "logs_now", lambda _: True)
    monkeypatch.setattr(module.tokenizer, "schedule_of_feature", lambda _: schedule)
    monkeypatch.setattr(module, "log", lambda name, value, **_: logged.update({name: value}))
    monkeypatch.setattr(module, "log_dict", lambda values, **_: logged.update(values))
    module.training_step(batch, 0)
    module.validation_step(batch, 0)
    feature = module.tokenizer.encode(batch["video"])
    sequence = training_sequence(feature, schedule, None, None, **module.model.config.reads)
    logits = module.model(sequence.inputs, schedule, module.model.condition(module.model.condition.prompts(batch)))
    right = (logits > 0) == sequence.targets
    assert logged["train/bit_accuracy"].item() == pytest.approx(right[:, schedule.used_bits(8)].float().mean().item())
    torch.testing.assert_close(logged["val/loss"], bit_loss(logits, sequence, schedule, **module.loss))
    by_scale = [logged[f"val/bit_accuracy_scale{k + 1}"] for k in range(3)]
    torch.testing.assert_close(torch.stack(by_scale), accuracy_by_block(right, schedule).mean(0))


def test_a_validation_disturbs_nothing(pair, monkeypatch):
    """However much a training flips, hides and drops, a validation is of clean clips with their conditions."""
    words = ["correction.p_max=0.5", "correction.delta=0.1", "frame_mask=1", "drop_condition=1", "data.frames=13"]
    module = module_of(pair, *words)
    module.model.load_state_dict(load_generator(pair.generator)[0].model.state_dict())
    logged, batch = {}, late_clips()
    monkeypatch.setattr(module, "log", lambda name, value, **_: logged.update({name: value}))
    monkeypatch.setattr(module, "log_dict", lambda values, **_: logged.update(values))
    module.validation_step(batch, 0)
    feature, condition = module.tokenizer.encode(batch["video"]), module.model.condition(batch["caption"])
    sequence = training_sequence(feature, module.schedule, None, None, **module.model.config.reads)
    logits = module.model(sequence.inputs, module.schedule, condition)
    torch.testing.assert_close(logged["val/loss"], bit_loss(logits, sequence, module.schedule, **module.loss))


def test_the_optimizer_is_that_of_the_config(pair):
    words = ["name=adamw", "betas=[0.5,0.6]", "weight_decay=0.3"]
    (optimizer,), _ = module_of(pair, *(f"optimizer.{word}" for word in words)).configure_optimizers()
    assert all(group["betas"] == (0.5, 0.6) for group in optimizer.param_groups)
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.3, 0.0}


def test_the_learning_rate_and_the_clip_of_the_config(pair):
    module = module_of(pair, "data.width=16", "optimizer.lr=0.01", "optimizer.warmup=4", "trainer.max_steps=20")
    assert module.schedule == module.tokenizer.schedule(5, 32, 16)
    (optimizer,), (course,) = module.configure_optimizers()
    assert course["interval"] == "step"
    rates = []
    for _ in range(21):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        course["scheduler"].step()
    assert rates[:4] == pytest.approx([0.0025, 0.005, 0.0075, 0.01]) and rates[20] == pytest.approx(1e-4)


def test_right_bits_are_counted_in_their_frame_and_scale():
    schedule = ScaleSchedule(3, ((1, 1), (2, 3)), (2, 4))
    right = torch.ones(2, schedule.length, 4, dtype=torch.bool)
    for token, bit in ((0, 0), (0, 3), (2, 1), (7, 0), (20, 3)):  # each of one clip of two
        right[0, token, bit] = False
    expected = torch.tensor([[1 / 4, 1 / 48], [1 / 4, 0], [0, 1 / 48]])  # (0, 3) is a bit that the first scale has not
    torch.testing.assert_close(accuracy_by_block(right, schedule), 1 - expected)


@pytest.mark.parametrize("key", ["frame_mask", "drop_condition"])
def test_probabilities_are_no_percentages(pair, key):
    with pytest.raises(ValueError, match=f"{key}=10; expected a number from 0 to 1"):
        module_of(pair, f"{key}=10")


def test_unknown_weights_are_told(pair):
    for key, known in (("scale_weights", "uniform, early"), ("bit_weights", "uniform, margin")):
        with pytest.raises(ValueError, match=f"loss.{key}=odd; expected one of: {known}"):
            module_of(pair, f"loss.{key}=odd")


def test_a_generators_optimizer_has_the_keys_that_it_takes(pair):
    with pytest.raises(ValueError, match="optimizer has no clip; its keys are name, lr, betas, weight_decay, warmup$"):
        module_of(pair, "+optimizer.clip=1")


def test_clips_are_encoded_in_the_type_that_a_sharded_model_computes_in(pair):
    """Such a training has no autocast of its own, and the tokenizer is not sharded."""
    module, seen, batch = module_of(pair), [], {"video": torch.zeros(1, 3, 5, 32, 32)}
    watch = module.tokenizer.encoder.head.register_forward_hook(lambda *given: seen.append(given[2].dtype))
    for dtype in ("bfloat16", "float32"):
        strategy = Mock(ShardedStrategy, param_dtype=getattr(torch, dtype))
        module._trainer = SimpleNamespace(strategy=strategy)
        module.configure_model()
        assert module.feature(batch).dtype == torch.float32
    watch.remove()
    assert seen == [torch.bfloat16, torch.float32]
