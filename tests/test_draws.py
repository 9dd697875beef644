"""Random draws of training belong to a clip: the loss does not depend on how clips are distributed over batches."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import default_collate

from kit.build import BUILDERS, build_data, tokenizer_module
from kit.data.numbered import Numbered
from kit.draws import Draws
from tests.fixtures import CLIP, GENERATOR, TOKENIZER, composed


def test_each_clip_has_numbers_of_its_own():
    both, alone = Draws(3, [7, 9]), Draws(3, [9])
    for shape in ((4, 2), (), (5,)):
        drawn = both.rand(*shape)
        assert drawn.shape == (2, *shape)
        assert torch.equal(drawn[1], alone.rand(*shape)[0]) and not torch.equal(drawn[0], drawn[1])
    assert not torch.equal(Draws(4, [9]).rand(8), Draws(3, [9]).rand(8))
    assert torch.equal(Draws(3, torch.tensor([9])).rand(8), Draws(3, [9]).rand(8))


def test_seeds_share_no_clips_numbers():
    """Runs with seeds side by side are independent, for error bars: none has another's draws for other clips."""
    drawn = torch.cat([Draws(seed, range(100)).rand(4) for seed in range(4)])
    assert len(drawn.unique(dim=0)) == 400


@pytest.mark.parametrize("part", ["generator", "tokenizer"])
def test_the_loss_of_a_batch_is_the_mean_of_its_clips(part, pair):
    """This holds with flips, masked frames, dropped conditions and scale dropout, all that is random in training."""
    words = {
        "generator": ["correction.p_max=0.4", "frame_mask=0.5", "drop_condition=0.5", f"tokenizer_ckpt={pair.tokenizer}"],
        "tokenizer": ["scale_dropout.last=2", "scale_dropout.p=0.5"],
    }[part]
    conf = {"generator": "stage2_generator", "tokenizer": "stage1_tokenizer"}[part]
    cfg = composed(conf, *CLIP, *TOKENIZER, *GENERATOR, "size=tiny", "data.batch_size=4", *words)
    data = build_data(cfg)
    torch.manual_seed(0)
    module = BUILDERS[part](cfg, data)
    for p in module.model.parameters():  # of the generator the last layer is zero at first
        torch.nn.init.normal_(p, std=0.2) if not p.any() else None
    module.log = module.log_dict = lambda *args, **kwargs: None
    clips = [Numbered(data.train)[n, data.frames] for n in range(4)]

    def loss(items):
        batch = default_collate(items)
        if part == "generator":
            return module.training_step(batch, 0)
        output, *_ = module.model(batch["video"], module.kept_scales(batch["video"], Draws(module.seed, batch["n"])))
        return (output - batch["video"]).abs().mean()

    with torch.no_grad():
        torch.testing.assert_close(loss(clips), sum(loss([clip]) for clip in clips) / 4)
        torch.testing.assert_close(loss(clips), (loss(clips[1::2]) + loss(clips[::2])) / 2)


def test_the_seed_of_a_run_is_that_of_its_tokenizers_draws():
    clip = {"frames": 5, "height": 32, "width": 32, "fps": 8.0}
    assert tokenizer_module(composed("stage1_tokenizer", *CLIP, *TOKENIZER, "seed=3"), clip).seed == 3
