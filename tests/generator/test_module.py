"""The generator's loss: what each bit weighs, and its share of right bits."""

from __future__ import annotations

import pytest
import torch

from kit.generator.corruption import training_sequence
from kit.generator.module import POWERS, accuracy_by_block
from kit.run import BUILDERS, build_data
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
    sequence = training_sequence(torch.randn(2, 8, schedule.frames, *schedule.grid), schedule, None, None)
    logits = torch.randn(sequence.targets.shape)
    sizes = torch.tensor([b.h * b.w for b in schedule.blocks for _ in range(b.h * b.w)])
    weights = (sizes.max() / sizes) ** POWERS[scales]
    weights = (weights / weights.mean())[:, None] * (sequence.margins if bits == "margin" else 1)
    right = torch.where(sequence.targets, logits, -logits)
    expected = (weights * torch.log1p(torch.exp(-right))).mean()
    torch.testing.assert_close(module.bit_loss(logits, sequence, schedule), expected)


def test_right_bits_are_counted_in_their_frame_and_scale():
    schedule = ScaleSchedule(3, ((1, 1), (2, 3)), (2, 4))
    right = torch.ones(2, schedule.length, 4, dtype=torch.bool)
    for token, bit in ((0, 0), (0, 3), (2, 1), (7, 0), (20, 3)):  # each of one clip of two
        right[0, token, bit] = False
    expected = torch.tensor([[1 / 4, 1 / 48], [1 / 4, 0], [0, 1 / 48]])  # (0, 3) is a bit that the first scale has not
    torch.testing.assert_close(accuracy_by_block(right, schedule), 1 - expected)


def test_unknown_weights_are_told(pair):
    for key, known in (("scale_weights", "uniform, early"), ("bit_weights", "uniform, margin")):
        with pytest.raises(ValueError, match=f"loss.{key}=odd; expected one of: {known}"):
            module_of(pair, f"loss.{key}=odd")
