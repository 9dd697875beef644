"""Adversarial and perceptual training of the tokenizer: each loss by hand, order of steps, weights, schedules, resume."""

from __future__ import annotations

import csv
import math
import re
import shutil
from functools import partial

import lightning as L
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from callbacks import LossGuard
from kit.checkpoint import load_tokenizer, read_checkpoint
from kit.data.datamodule import ClipDataModule
from kit.data.shapes import Shapes
from kit.draws import Draws
from kit.perceptual import load_perceptual
from kit.tokenizer.discriminator import Discriminator, PatchDiscriminator
from kit.tokenizer.losses import (
    adaptive_weight,
    adversarial_loss,
    check_losses,
    discriminator_loss,
    entropy_loss,
    lecam_loss,
    motion_loss,
    perceptual_loss,
)
from kit.tokenizer.module import TokenizerModule, amplitude_of, chosen_frames, inputs_of, some_frames, weighted_sum
from kit.tokenizer.quantizer import bits_to_feature, to_code, tokens_to_map
from kit.values import plain
from tests import fixtures
from tests.fixtures import QUICK, composed, fit_tokenizer
from tests.processes import together

SMALL, TOKENIZER_WORDS = [word for word in fixtures.CLIP if "devices" not in word], fixtures.TOKENIZER
ADVERSARIAL = ["loss.adversarial.weight=0.1", "loss.adversarial.width=8", "loss.adversarial.layers=2"]
CLIP = {"frames": 5, "height": 16, "width": 16, "fps": 8}
TOKENIZER = {"bits": 4, "scales": [1, 2], "patch": 4, "widths": [8, 8], "blocks": 1}


def make_module(*overrides: str, steps: int = 10, kind: type[TokenizerModule] = TokenizerModule) -> TokenizerModule:
    cfg = composed("stage1_tokenizer", "size=tiny", "optimizer.warmup=0", *ADVERSARIAL, *overrides)
    torch.manual_seed(0)
    return kind(TOKENIZER, plain(cfg.loss), plain(cfg.optimizer), CLIP, steps, plain(cfg.scale_dropout), 0)


class Recorder(L.Callback):
    """Records what each batch logged, and the weights after it."""

    def __init__(self):
        self.logged, self.weights = [], []

    def on_train_batch_end(self, trainer, module, *_):
        self.logged.append({k: v.item() for k, v in trainer.callback_metrics.items()})
        self.weights.append({name: p.detach().clone() for name, p in module.named_parameters()})


def train(module: TokenizerModule, steps: int, batch_size: int = 2, precision: str = "32-true", **trainer) -> Recorder:
    recorder = Recorder()
    data = ClipDataModule(partial(Shapes), 5, 16, 16, 8.0, batch_size, val_clips=1, workers=0)
    quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    how = {"limit_val_batches": 0, "log_every_n_steps": 1, **trainer, "accelerator": "cpu", "precision": precision}
    trainer = L.Trainer(callbacks=[recorder], max_steps=steps, **how, **quiet)
    trainer.fit(module, datamodule=data)
    recorder.trainer = trainer
    return recorder


def changed(before: dict, after: dict, prefix: str) -> bool:
    return any(not torch.equal(before[name], after[name]) for name in before if name.startswith(prefix))


MAPS = [torch.tensor([[2.0, -1.0]]), torch.tensor([[0.5]])]
OTHERS = [torch.tensor([[-3.0, 0.0]]), torch.tensor([[1.5]])]


def test_adversarial_losses_by_hand():
    first = (0 + 2) / 2 + (0 + 1) / 2  # relu(1 - real), relu(1 + fake) of the first map
    second = 0.5 + 2.5
    assert discriminator_loss(MAPS, OTHERS).item() == pytest.approx((first + second) / 2)
    assert adversarial_loss(OTHERS).item() == pytest.approx(-(-1.5 + 1.5) / 2)
    anchors = torch.tensor([[1.0, 0.5], [0.0, 2.0]])  # means of real and of fake
    first = (1.5**2 + 0) / 2 + (4.0**2 + 1.0**2) / 2  # relu(real - 0.5)^2, relu(1 - fake)^2
    assert lecam_loss(MAPS, OTHERS, anchors).item() == pytest.approx((first + 0 + 0) / 2)


def test_adaptive_weight_is_the_ratio_of_pulls():
    assert adaptive_weight(torch.tensor([3.0, 4.0]), torch.tensor([2.0, 0.0])).item() == pytest.approx(5 / 2, rel=1e-3)
    assert adaptive_weight(torch.tensor([1e9]), torch.tensor([0.0])).item() == 1e4


@pytest.mark.parametrize("kind, power", [("l1", 1), ("l2", 2)])
def test_motion_loss_by_hand(kind, power):
    output, video = torch.rand(2, 2, 3, 5, 4, 4) * 2 - 1
    errors = [(output[:, :, t] - output[:, :, t - 1]) - (video[:, :, t] - video[:, :, t - 1]) for t in range(1, 5)]
    torch.testing.assert_close(motion_loss(output, video, kind), torch.stack(errors).abs().pow(power).mean())
    assert motion_loss(output + 0.3, output, kind) < 1e-6, "a still error is none of motion"
    assert motion_loss(output[:, :, :1], video[:, :, :1], kind) == 0


def test_perceptual_loss_is_the_mean_over_frames(shared):
    network = load_perceptual("st-lpips", shared / "weights" / "stlpips_vgg_fp16.pt")
    video, output = torch.rand(2, 3, 3, 32, 32) * 2 - 1, torch.rand(2, 3, 3, 32, 32) * 2 - 1
    frames = [network(output[b, :, t][None], video[b, :, t][None]) for b in range(2) for t in range(3)]
    assert torch.allclose(perceptual_loss(network, output, video), torch.cat(frames).mean(), atol=1e-5)
    assert perceptual_loss(network, video, video).item() == 0


def test_some_frames_are_drawn_of_each_clip_by_its_number():
    """The draw does not depend on the rest of the batch or on the device."""
    video = torch.randn(2, 3, 5, 4, 4)
    assert some_frames(5, None, Draws(0, [0])) is some_frames(5, 9, Draws(0, [0])) is None
    assert chosen_frames(video, None) is video
    drawn = some_frames(17, 2, Draws(0, range(200))).tolist()
    assert all(first < second for first, second in drawn)
    assert {frame for frames in drawn for frame in frames} == set(range(17))
    again, others = (some_frames(17, 2, Draws(seed, [3, 150])).tolist() for seed in (0, 1))
    assert again == [drawn[3], drawn[150]] != others
    numbers = torch.tensor([[0, 3], [2, 4]])
    expected = torch.stack([video[0][:, [0, 3]], video[1][:, [2, 4]]])
    assert torch.equal(chosen_frames(video, numbers), expected)


def test_the_amplitude_of_codes_is_one():
    code = to_code(torch.rand(2, 12, 16) < 0.5)
    assert amplitude_of(3 * tokens_to_map(code, (3, 4))).item() == pytest.approx(3)


def test_patch_discriminators():
    frames, motion = (PatchDiscriminator(dims, 8, 2).eval() for dims in (2, 3))
    video = torch.rand(2, 3, 5, 16, 24)
    assert frames(video).shape == (10, 1, 1, 4, 6) and motion(video).shape == (2, 1, 5, 4, 6)
    assert motion(video[:, :, :1]).shape == (2, 1, 1, 4, 6)
    still = video[:, :, :1].expand(-1, -1, 5, -1, -1)
    assert torch.allclose(frames(still)[:5], frames(still)[:1].expand(5, -1, -1, -1, -1), atol=1e-6), "each frame alone"
    shuffled = video[:, :, [2, 0, 1, 4, 3]]
    assert torch.allclose(frames(shuffled).view(2, 5, -1)[:, 1], frames(video).view(2, 5, -1)[:, 0], atol=1e-6)
    assert not torch.allclose(motion(shuffled)[:, :, 1], motion(video)[:, :, 0], atol=1e-3), "neighbours in time count"
    with pytest.raises(ValueError, match="2 or 3 dims, got 4"):
        PatchDiscriminator(4, 8, 2)


def test_discriminators_learn_to_tell_noise_from_flat_clips():
    torch.manual_seed(0)
    discriminator = Discriminator((2, 3), 8, 2)
    optimizer = torch.optim.AdamW(discriminator.parameters(), 1e-2)
    for _ in range(30):
        real, fake = torch.rand(4, 3, 3, 16, 16) * 2 - 1, torch.rand(4, 3, 3, 1, 1).expand(-1, -1, -1, 16, 16)
        loss = discriminator_loss(discriminator(real), discriminator(fake))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.2


class FarthestPixel(torch.nn.Module):
    """Stands for a perceptual distance: of two pictures the largest difference."""

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a - b).abs().amax((1, 2, 3))


def entropy_by_hand(feature: torch.Tensor) -> torch.Tensor:
    """1 - (entropy over the batch - entropy given the token) of the bits of a feature (B, d, F, 2, 2), in 1 x 1 and 2 x 2."""

    def entropy(p: torch.Tensor) -> torch.Tensor:
        return torch.special.entr(p).add(torch.special.entr(1 - p)).mean() / math.log(2)

    coarse = feature.mean((3, 4), keepdim=True)
    losses = []
    for residual in (coarse, feature - coarse.sign() / feature.shape[1] ** 0.5):
        p = 1 / (1 + (-2 * residual / residual.square().mean(1, keepdim=True).sqrt()).exp())
        losses.append(1 - entropy(p.mean((0, 2, 3, 4))) + entropy(p))
    return sum(losses) / 2


@pytest.mark.parametrize("kind, power", [("l1", 1), ("l2", 2)])
def test_losses_of_a_step_are_those_of_its_tensors(kind, power, monkeypatch):
    """The losses logged by the first iteration, raw and weighted, and their sum equal those computed here by hand."""
    monkeypatch.setattr("kit.tokenizer.module.load_perceptual", lambda *_: FarthestPixel())
    weights = {"reconstruction": 3.0, "motion": 2.0, "commitment": 0.5, "entropy": 0.01, "perceptual": 0.3}
    words = [f"loss.{name}{'.' if name == 'perceptual' else '_'}weight={weight}" for name, weight in weights.items()]
    module = make_module(f"loss.reconstruction={kind}", "loss.adversarial.lecam=0.2", *words)
    video = torch.stack([Shapes("train", 5, 16, 16, 8.0)[n]["video"] for n in range(2)])
    with torch.no_grad():
        output, feature = module.model(video)[0], module.model.encode(video)
        code = bits_to_feature(module.model.bits(video), module.schedule)
        real, fake = module.discriminator(video), module.discriminator(output)
    error = output - video
    expected = {
        "reconstruction": error.abs().pow(power).mean(),
        "motion": (error[:, :, 1:] - error[:, :, :-1]).abs().pow(power).mean(),
        "commitment": (feature - code).square().sum(1).mean(),
        "entropy": entropy_by_hand(feature),
        "perceptual": error.abs().amax((1, 3, 4)).mean(),
        "adversarial": -sum(f.mean() for f in fake) / 2,
        "discriminator": sum((1 - r).clamp(min=0).mean() + (1 + f).clamp(min=0).mean() for r, f in zip(real, fake)) / 2,
        "lecam": sum(
            (r - f.mean()).clamp(min=0).square().mean() + (r.mean() - f).clamp(min=0).square().mean()
            for r, f in zip(real, fake)
        ) / 2,
    }  # fmt: skip
    weights |= {"adversarial": 0.1, "discriminator": 1.0, "lecam": 0.2}
    logged = train(module, 1).logged[0]
    for name, loss in expected.items():
        assert logged[f"train/{name}"] == pytest.approx(loss.item(), rel=1e-4, abs=1e-5), name
        assert logged[f"train/{name}_weighted"] == pytest.approx(weights[name] * loss.item(), rel=1e-4, abs=1e-5), name
    ours = sum(weights[name] * loss for name, loss in expected.items() if name not in ("discriminator", "lecam"))
    assert logged["train/loss"] == pytest.approx(ours.item(), rel=1e-4)
    for anchor, r, f in zip(module.anchors, real, fake):
        assert anchor.tolist() == pytest.approx([r.mean().item(), f.mean().item()], abs=1e-5)


def test_an_entropy_without_weight_is_computed_only_to_be_logged(monkeypatch):
    """That it is logged changes nothing that is learned."""
    asked, weights = [], {}

    def entropy(*given) -> torch.Tensor:
        asked.append(torch.is_grad_enabled())
        return entropy_loss(*given)

    monkeypatch.setattr("kit.tokenizer.module.entropy_loss", entropy)
    for every in (1, 2):
        module = make_module("loss.entropy_weight=0", "loss.adversarial.weight=0")
        recorder = train(module, 2, log_every_n_steps=every)
        assert "train/entropy" in recorder.logged[-1] and recorder.logged[-1]["train/entropy_weighted"] == 0
        weights[every] = module.state_dict()
    assert asked == [False] * 3
    assert not changed(*weights.values(), prefix="model.")


def test_anchors_are_the_mean_of_all_batches_at_first_and_then_of_about_a_hundred_iterations(monkeypatch):
    real, fake = torch.rand(2, 2, 3, 5, 16, 16) * 2 - 1

    def means(module, scale: float = 1.0) -> torch.Tensor:
        with torch.no_grad():
            maps = [module.discriminator(clips * scale) for clips in (real, fake)]
        return torch.tensor([[r.mean(), f.mean()] for r, f in zip(*maps)])

    for batches in (1, 4):
        module, found = make_module(f"optimizer.accumulate={batches}"), []
        for seen in range(6):
            scale = (seen + 1) / 6
            found.append(means(module, scale))
            monkeypatch.setattr(TokenizerModule, "global_step", seen // batches)
            module.discriminator_terms(real * scale, fake * scale, seen % batches)
            torch.testing.assert_close(module.anchors, torch.stack(found).mean(0))
        module.anchors.zero_()
        monkeypatch.setattr(TokenizerModule, "global_step", 1000)
        for number in range(batches):
            terms = module.discriminator_terms(real, fake, number)
        torch.testing.assert_close(module.anchors, 0.01 * means(module), atol=1e-6, rtol=1e-4)
        maps = [module.discriminator(clips) for clips in (real, fake)]
        torch.testing.assert_close(terms["lecam"][1], lecam_loss(*maps, module.anchors))


def test_the_discriminators_have_an_optimizer_of_their_own():
    (_, against), schedules = make_module(
        "loss.adversarial.lr=3e-4", "loss.adversarial.betas=[0.4,0.8]"
    ).configure_optimizers()
    assert isinstance(against, torch.optim.AdamW)
    for group in against.param_groups:
        assert (group["initial_lr"], group["betas"], group["weight_decay"]) == (3e-4, (0.4, 0.8), 0.0)
    assert all(schedule["interval"] == "step" for schedule in schedules), "or their rates are logged once"


def test_the_tokenizers_optimizer_is_that_of_the_config():
    words = ["name=adamw", "lr=2e-3", "betas=[0.5,0.6]", "weight_decay=0.3", "warmup=4"]
    (ours, _), (course, _) = make_module(*(f"optimizer.{word}" for word in words)).configure_optimizers()
    assert {group["weight_decay"] for group in ours.param_groups} == {0.3, 0.0}
    rates = []
    for _ in range(5):
        rates.append([group["lr"] for group in ours.param_groups])
        ours.step()
        course["scheduler"].step()
    for group, *found in zip(ours.param_groups, *rates):
        assert group["betas"] == (0.5, 0.6)
        assert found == pytest.approx([5e-4, 1e-3, 1.5e-3, 2e-3, 2e-3])


def test_the_perceptual_term_compares_with_the_clips(shared, monkeypatch):
    weights = shared / "weights" / "stlpips_vgg_fp16.pt"
    if not weights.is_file():
        pytest.skip(f"no {weights}")
    words = ["loss.perceptual.weight=0.5", "loss.perceptual.kind=st-lpips", f"loss.perceptual.weights={weights}"]
    monkeypatch.setitem(TOKENIZER, "scales", [1, 2, 4])
    monkeypatch.setitem(CLIP, "height", 32)
    monkeypatch.setitem(CLIP, "width", 32)
    module = make_module(*words)
    video = torch.stack([Shapes("train", 5, 32, 32, 8.0)[n]["video"] for n in range(2)])
    terms, of = {}, module.reconstruction_terms
    monkeypatch.setattr(module, "reconstruction_terms", lambda *args: terms.update(of(*args)) or terms)
    monkeypatch.setattr(module, "backward_of", lambda loss: None)
    monkeypatch.setattr(module, "log", lambda *_, **__: None)
    monkeypatch.setattr(module, "step", lambda **_: None)
    monkeypatch.setattr(TokenizerModule, "global_step", 0)
    module.training_step({"video": video, "n": torch.arange(2)}, 0)
    weight, found = terms["perceptual"]
    assert weight == 0.5
    torch.testing.assert_close(found, perceptual_loss(module.perceptual, module.model(video)[0], video))


def test_two_processes_train_adversarially_as_one(tmp_path):
    """The adaptive weight uses the gradients of all clips."""
    words = [*ADVERSARIAL, "loss.adversarial.adaptive=true", "data.batch_size=4", "optimizer.name=adamw", "optimizer.clip=1"]
    for name, more in (("one", []), ("two", ["trainer.devices=2", "data.batch_size=2"])):
        run = [
            f"root={tmp_path}",
            f"name={name}",
            *SMALL,
            *TOKENIZER_WORDS,
            *QUICK,
            *words,
            "recipe.tokenizer.steps=4",
            *more,
        ]
        command = ["fit", "conf=stage1_tokenizer", "trainer.precision=32-true", *run]
        together(command, 1 if name == "one" else 2, tmp_path / f"{name}_said")
    one, two = (read_checkpoint(tmp_path / name / "checkpoints" / "last.ckpt", "tokenizer") for name in ("one", "two"))
    assert any(name.startswith("discriminator") for name in one["state_dict"])
    for name, weight in one["state_dict"].items():
        torch.testing.assert_close(two["state_dict"][name], weight, atol=1e-4, rtol=1e-3, msg=name)


def test_iterations_count_once_and_the_discriminators_wait_for_their_turn():
    """Discriminators start at 40 % of ten iterations, their weight rises over 40 %; learning rates follow iterations too."""
    module = make_module("loss.adversarial.start=0.4", "loss.adversarial.warmup=0.4")
    recorder = train(module, 10)
    assert recorder.trainer.global_step == 10 == len(recorder.logged)
    shares = [row.get("train/adversarial_weighted", 0) / row.get("train/adversarial", 1) / 0.1 for row in recorder.logged]
    assert shares == pytest.approx([0, 0, 0, 0, 0.25, 0.5, 0.75, 1, 1, 1], rel=1e-4)
    turns = [changed(a, b, "discriminator") for a, b in zip(recorder.weights, recorder.weights[1:])]
    assert turns == [False] * 3 + [True] * 6
    assert all(changed(a, b, "model") for a, b in zip(recorder.weights, recorder.weights[1:]))
    main, against = recorder.trainer.optimizers
    assert main.param_groups[0]["lr"] == pytest.approx(0.01 * main.param_groups[0]["initial_lr"])
    assert against.param_groups[0]["lr"] == pytest.approx(0.01 * 1e-4)


def test_the_tokenizers_turn_leaves_no_gradient_in_the_discriminators():
    module = make_module()
    video = torch.rand(2, 3, 5, 16, 16) * 2 - 1
    module.adversarial_term(module.model(video)[0], {}, None, 1.0)[1].backward()
    assert all(p.grad is None for p in module.discriminator.parameters())
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in module.model.decoder.parameters())
    assert all(p.requires_grad for p in module.discriminator.parameters())


def test_adaptive_weight_scales_the_adversarial_term():
    module = make_module("loss.adversarial.adaptive=true", "loss.adversarial.weight=0.5")
    video = torch.rand(2, 3, 5, 16, 16) * 2 - 1
    with inputs_of(module.model.decoder.head) as hidden:
        output = module.model(video)[0]
    terms = {"reconstruction": (1.0, (output - video).square().mean()), "entropy": (9.0, output.sum() * 1e9)}
    last = module.model.decoder.head.weight
    fooling = adversarial_loss(module.discriminator(output))
    pulls = [torch.autograd.grad(x, last, retain_graph=True)[0].norm() for x in (terms["reconstruction"][1], fooling)]
    (weight, loss), _ = module.adversarial_term(output, terms, *hidden, module.adversarial_share)
    assert weight.item() == pytest.approx((0.5 * pulls[0] / (pulls[1] + 1e-4)).item(), rel=1e-4)
    assert loss.item() == pytest.approx(fooling.item())


@pytest.mark.parametrize("adaptive", [True, False])
def test_what_is_backpropagated_is_the_weighted_sum_of_all_losses(adaptive):
    """Its value and its gradients, with the perceptual network gone through backwards once."""

    class OfBlurred(nn.Module):
        def forward(self, a, b):
            return (F.avg_pool2d(a, 4) - F.avg_pool2d(b, 4)).square().mean(dim=(1, 2, 3))

    module = make_module(f"loss.adversarial.adaptive={adaptive}", "loss.motion_weight=0.3", "loss.entropy_weight=0.1")
    module.perceptual, module.loss["perceptual"]["weight"], passes = OfBlurred(), 0.5, []
    video, draws = torch.rand(2, 3, 5, 16, 16) * 2 - 1, Draws(0, torch.arange(2))

    def step():
        with inputs_of(module.model.decoder.head) as hidden:
            output, features, steps = module.model(video)
        return output, *hidden, module.reconstruction_terms(video, output, features, steps, draws)

    module.perceptual.register_full_backward_hook(lambda *_: passes.append(1))
    output, hidden, terms = step()
    term, loss = module.adversarial_term(output, terms, hidden, 0.7)
    loss.backward()
    found = {name: p.grad for name, p in module.model.named_parameters() if p.grad is not None}
    assert len(passes) == 1 and all(p.grad is None for p in module.discriminator.parameters())
    module.zero_grad()

    output, _, terms = step()
    whole = weighted_sum({**terms, "adversarial": (term[0], adversarial_loss(module.discriminator(output)))})
    whole.backward()
    assert loss.item() == pytest.approx(whole.item(), rel=1e-6)
    for name, p in module.model.named_parameters():
        torch.testing.assert_close(found.get(name), p.grad, atol=1e-7, rtol=1e-4, msg=name)


def test_accumulated_batches_are_one_large_batch(monkeypatch):
    """This holds for the losses that are means over clips; the entropy is of the whole batch, and is left out here."""
    words = ["loss.entropy_weight=0", "optimizer.clip=null", "optimizer.name=adamw", "loss.adversarial.lecam=0"]
    terms, numbers = TokenizerModule.discriminator_terms, []
    monkeypatch.setattr(
        TokenizerModule, "discriminator_terms", lambda self, *args: numbers.append(args[-1]) or terms(self, *args)
    )
    whole = train(make_module(*words), 3, batch_size=4)
    parts = train(make_module(*words, "optimizer.accumulate=2"), 3, batch_size=2)
    assert numbers == [0] * 3 + [0, 1] * 3
    assert parts.trainer.global_step == 3 and len(parts.logged) == 6
    for name, p in whole.weights[-1].items():
        # within the hinge's margins this bias has no gradient, and Adam scales up what rounding makes of it
        atol = 3e-4 if name.startswith("discriminator") and name.endswith("head.bias") else 2e-5
        assert torch.allclose(p, parts.weights[-1][name], atol=atol), name
    assert changed(parts.weights[0], parts.weights[1], "model")
    assert not changed(parts.weights[1], parts.weights[2], "model")


def test_validation_leaves_accumulated_gradients_alone():
    """Lightning would zero them before a validation, which comes here between the two batches of an iteration."""
    words = ["optimizer.accumulate=2"]
    without = train(make_module(*words), 3)
    within = train(make_module(*words), 3, limit_val_batches=1, val_check_interval=3, check_val_every_n_epoch=None)
    assert len(within.logged) == 6 and all(torch.equal(p, within.weights[-1][n]) for n, p in without.weights[-1].items())


def test_values_that_make_no_sense():
    with pytest.raises(ValueError, match="optimizer.accumulate=0; expected a whole number of 1 or more"):
        make_module("optimizer.accumulate=0")
    with pytest.raises(ValueError, match="loss.adversarial.start=1; expected a share of the training"):
        make_module("loss.adversarial.start=1")
    loss = plain(composed("stage1_tokenizer", "size=tiny").loss)
    for part, keys in (
        ("", ("reconstruction_weight", "motion_weight", "commitment_weight", "entropy_weight", "entropy_weight_end")),
        ("", ("entropy_inverse_temperature",)),
        ("perceptual", ("weight", "frames")),
        ("adversarial", ("weight", "lr", "lecam", "warmup", "start")),
    ):
        for key in keys:
            wrong = {**loss, part: {**loss[part], key: -1}} if part else {**loss, key: -1}
            with pytest.raises(ValueError, match=f"loss.{part and part + '.'}{key}=-1; expected a"):
                check_losses(wrong)
    for word in ("loss.reconstruction=l3", "loss.entropy_inverse_temperature=0", "loss.perceptual.frames=0",
                 "loss.perceptual.frames=1.5",
                 "loss.adversarial.betas=[0.5]", "loss.adversarial.dims=[]"):  # fmt: skip
        with pytest.raises(ValueError, match=f"{re.escape(word)}; expected"):  # at once, not in the first step
            make_module(word)
    with pytest.raises(ValueError, match="loss.adversarial.layers=5; expected at most 4 for clips of 16 x 16 pixels"):
        make_module("loss.adversarial.layers=5")
    with pytest.raises(ValueError, match="expected at most 3 for clips of 8 x 24 pixels"):  # of a bucket
        make_module("loss.adversarial.layers=4").discriminator(torch.zeros(1, 3, 5, 8, 24))


def test_gradients_are_clipped_each_for_itself():
    """With plain gradient descent at rate 1 the change of the weights is the clipped gradient."""
    module = make_module("optimizer.clip=0.01")

    def plain_descent():
        parts = (module.model, module.discriminator)
        optimizers = [torch.optim.SGD(part.parameters(), 1.0) for part in parts]
        return optimizers, [torch.optim.lr_scheduler.ConstantLR(o, factor=1.0) for o in optimizers]

    module.configure_optimizers = plain_descent
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    after = train(module, 1).weights[0]
    for prefix in ("model", "discriminator"):
        moved = [(after[n] - before[n]).square().sum() for n in before if n.startswith(prefix)]
        assert math.sqrt(sum(moved)) == pytest.approx(0.01, rel=1e-3)


def losses(folder, start: int) -> list[list[str]]:
    rows = csv.DictReader((folder / "logs" / f"version_{start}" / "metrics.csv").open())
    return [[row["train/loss"], row["train/discriminator"], row["train/lecam"]] for row in rows if row["train/loss"]]


def test_an_adversarial_run_resumes_to_the_last_bit(tmp_path, monkeypatch):
    words = [*ADVERSARIAL, "trainer.precision=32-true", "recipe.tokenizer.steps=8", "trainer.val_check_interval=4",
             "callbacks.last.every=3", "loss.adversarial.start=0.2", "optimizer.accumulate=2"]  # fmt: skip

    def stop(self, trainer, *_):
        if trainer.global_step == 5:
            for logger in trainer.loggers:
                logger.save()
            raise KeyboardInterrupt

    assert fit_tokenizer(tmp_path / "whole", *words, name="run") == 0
    with monkeypatch.context() as patched:
        patched.setattr(LossGuard, "on_train_batch_end", stop, raising=False)
        assert fit_tokenizer(tmp_path / "resumed", *words, name="run") == 1
    assert fit_tokenizer(tmp_path / "resumed", *words, "ckpt=last", name="run") == 0
    longer = ["recipe.tokenizer.steps=10", "loss.adversarial.start=0.9", "ckpt=last"]
    shutil.copytree(tmp_path / "resumed", tmp_path / "longer")
    with pytest.warns(UserWarning, match="the adversarial loss pauses until iteration 9 of 10"):
        assert fit_tokenizer(tmp_path / "longer", *words, *longer, name="run") == 0
    whole, resumed = losses(tmp_path / "whole" / "run", 0), losses(tmp_path / "resumed" / "run", 1)
    assert resumed == whole[-len(resumed) :] and len(resumed) >= 5
    a, b = (read_checkpoint(tmp_path / n / "run" / "checkpoints" / "last.ckpt", "tokenizer") for n in ("whole", "resumed"))
    for key in ("state_dict", "ema"):
        assert a[key].keys() == b[key].keys() and all(torch.equal(a[key][name], b[key][name]) for name in a[key])
    assert any(name.startswith("discriminator") for name in a["state_dict"])
    assert not any(name.startswith(("discriminator", "perceptual")) for name in a["ema"])
    assert not any(name.startswith("perceptual") for name in a["state_dict"])
    load_tokenizer(tmp_path / "whole" / "run" / "checkpoints" / "last.ckpt")


def test_full_losses_train_with_weights_and_stop_without(tmp_path, shared, capsys, monkeypatch):
    few = ["loss=full", "loss.adversarial.width=8", "recipe.tokenizer.steps=2", "trainer.val_check_interval=2"]
    weights = f"loss.perceptual.weights={shared / 'weights' / 'stlpips_vgg_fp16.pt'}"
    judged = ["loss.perceptual.kind=st-lpips", "loss.perceptual.frames=2", weights]
    assert fit_tokenizer(tmp_path, *few, *judged, name="full") == 0
    rows = list(csv.DictReader((tmp_path / "full" / "logs" / "version_0" / "metrics.csv").open()))
    assert all(float(row["train/perceptual"]) > 0 for row in rows if row["train/loss"])
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    assert fit_tokenizer(tmp_path, *few, name="without") == 1
    error = capsys.readouterr().err
    assert "vgg16-397923af.pth" in error and "load_state_dict_from_url" in error


def test_a_plain_run_does_not_go_on_with_discriminators(tmp_path, capsys):
    short = ["recipe.tokenizer.steps=2", "trainer.val_check_interval=2"]
    assert fit_tokenizer(tmp_path, *short, name="run") == 0
    assert fit_tokenizer(tmp_path, *short, *ADVERSARIAL, "ckpt=last", name="run") == 1
    error = capsys.readouterr().err
    assert "loss.adversarial.weight: 0, above 0" in error and "Traceback" not in error
    assert fit_tokenizer(tmp_path, *short, "trainer.precision=16-mixed", name="half") == 1
    assert "the tokenizer trains in bf16-mixed or 32-true" in capsys.readouterr().err


@pytest.mark.parametrize("word", ["trainer.accumulate_grad_batches=2", "trainer.gradient_clip_val=0.5"])
def test_lightnings_own_words_are_answered(tmp_path, capsys, word):
    assert fit_tokenizer(tmp_path, word) == 1
    assert "use optimizer.accumulate= and optimizer.clip=" in capsys.readouterr().err


class Automatic(TokenizerModule):
    """The module without discriminators, under Lightning's automatic optimization."""

    def __init__(self, *args):
        super().__init__(*args)
        self.automatic_optimization = True

    def training_step(self, batch: dict, index: int):
        found = []
        self.backward_of, self.step = found.append, (lambda discriminators: None)
        super().training_step(batch, index)
        return found[0]

    def configure_optimizers(self):
        (optimizer,), (course,) = super().configure_optimizers()
        schedule = course["scheduler"]
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_manual_optimization_is_the_automatic_one(precision):
    """Weights are equal to the last bit: backward, update, clipping and schedule come at the same points."""
    words = ["loss.adversarial.weight=0", "optimizer.warmup=2"]
    manual = train(make_module(*words), 5, precision=precision).weights[-1]
    automatic = train(make_module(*words, kind=Automatic), 5, precision=precision, gradient_clip_val=1.0).weights[-1]
    assert all(torch.equal(p, automatic[name]) for name, p in manual.items())


@pytest.mark.parametrize("name", ["motion", "perceptual"])
def test_the_adaptive_weight_heeds_all_losses_of_pixels(name):
    module = make_module("loss.adversarial.adaptive=true")
    video = torch.rand(2, 3, 5, 16, 16) * 2 - 1
    with inputs_of(module.model.decoder.head) as hidden:
        output = module.model(video)[0]

    def of(output):
        return (output - video).square().mean()

    one, three = (
        module.adversarial_term(output, {"reconstruction": (1.0, of(output)), **more}, *hidden, 1.0)[0][0]
        for more in ({}, {name: (2.0, of(output))})
    )
    assert three.item() == pytest.approx(3 * one.item(), rel=1e-3)


def test_a_discriminator_by_hand():
    discriminator, video = PatchDiscriminator(2, 8, 2), torch.rand(2, 3, 1, 16, 16)
    x = F.leaky_relu(discriminator.convolutions[0](video), 0.2)
    x = F.leaky_relu(F.group_norm(discriminator.convolutions[1](x), 8), 0.2)
    torch.testing.assert_close(discriminator(video), discriminator.head(x))


def test_scores_of_a_validation_by_hand(monkeypatch):
    """The sign of an error is of no account."""
    module, logged = make_module(), {}
    monkeypatch.setattr(module, "log", lambda name, value, **_: logged.__setitem__(name, value))
    video = torch.rand(2, 3, 5, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        module.eval().validation_step({"video": video}, 0)
        error = module.model.reconstruct(video) - video
    assert error.min() < 0 < error.max()
    torch.testing.assert_close(logged["val/l1"], error.abs().mean())
    expected = (10 * torch.log10(4 / error.square().mean((1, 2, 3, 4)))).mean()
    torch.testing.assert_close(logged["val/psnr"], expected)
