"""Estimates what a training costs: tokens, floating point operations, GPU-hours. Nothing is allocated or computed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from kit.generator.transformer import Generator, GeneratorConfig
from kit.planning.memory import Pretence, Repeated, on_paper, without_trainer
from kit.tokenizer import Tokenizer, TokenizerConfig
from kit.tokenizer.module import TokenizerModule


class Operations(TorchDispatchMode):
    """Counts floating point operations as torch's FlopCounterMode, whose hooks on modules `torch.autograd.grad` refuses.

    Attributes: total, the number so far.
    """

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        made = function(*args, **kwargs)
        if function._overloadpacket in flop_registry:
            self.total += flop_registry[function._overloadpacket](*args, **kwargs, out_val=made)
        return made


@dataclass(frozen=True)
class ClipCost:
    """Training cost of a clip, or of several.

    Args:
        tokens: without the condition's. flops: floating point operations of matrix products and convolutions, forward and
            backward; for a generator with the tokenizer's encoding.
    """

    tokens: int
    flops: float


def tokenizer_cost(build: Callable[[], TokenizerModule], iterations: range) -> ClipCost:
    """Returns the cost of a clip in the tokenizer's training, with its discriminators and perceptual network.

    Args:
        build: makes the module. iterations: averaged over: the discriminators begin at one of their own.
    """
    where = torch.device("cpu", 0)
    with Pretence(where), Repeated():
        module = without_trainer(on_paper(build, where), lambda **_: None)
        frames, height, width = (module.hparams["clip"][key] for key in ("frames", "height", "width"))
        batch = {"video": torch.zeros(1, 3, frames, height, width, device=where), "n": range(1)}
        late = sum(n >= module.start for n in iterations) / len(iterations)

        def flops_with(start: int) -> int:
            module.start = start
            with Operations() as operations:
                module.training_step(batch, 0)
            return operations.total

        flops = sum(share * flops_with(start) for share, start in ((1 - late, module.steps), (late, 0)) if share)
    return ClipCost(module.schedule.length, flops)


def generator_cost(
    generator: GeneratorConfig, tokenizer: TokenizerConfig, frames: int, height: int, width: int, encoded: bool = False,
    recompute: bool = False,
) -> ClipCost:  # fmt: skip
    """Returns the cost of a clip in the generator's training.

    Args:
        encoded: whether clips are encoded ahead; encoding is then not counted.
        recompute: whether the backward pass computes each layer again.
    Raises:
        as `Tokenizer.schedule`.
    """
    schedule = tokenizer.schedule(frames, height, width)
    with torch.device("meta"), Repeated():
        inputs = torch.zeros(1, schedule.layout(generator.history).sequence_length, generator.inputs)

        def flops_with(layers: int) -> int:
            model = Generator(replace(generator, layers=layers))
            model.recompute = recompute
            condition = torch.zeros(1, model.condition.length, generator.width)
            with Operations() as operations:
                model(inputs, schedule, condition).sum().backward()
            return operations.total

        one, two = flops_with(1), flops_with(2)
        with Operations() as encoding, torch.no_grad():
            if not encoded:
                Tokenizer(tokenizer).encode(torch.zeros(1, 3, frames, height, width))
    layers = generator.layers - 1  # all alike
    return ClipCost(schedule.length, one + layers * (two - one) + encoding.total)


def stage_cost(clip: ClipCost, image: ClipCost | None, clips: int, image_share: float, latents: int) -> ClipCost:
    """Returns the cost of all steps of a stage.

    Args:
        clip, image: cost of one; image None: there are no images.
        clips: number of clips in all steps on all devices, if all were of clips.
        image_share: share of the steps that have images instead, `latents` images in place of each clip.
    """
    if image is None:
        of = [(clip, clips)]
    else:
        of = [(clip, clips * (1 - image_share)), (image, clips * image_share * latents)]
    return ClipCost(round(sum(cost.tokens * n for cost, n in of)), sum(cost.flops * n for cost, n in of))


def gpu_hours(flops: float, tflops: float, utilisation: float) -> float:
    """Returns the GPU-hours of `flops` on GPUs of `tflops` TFLOP/s at peak, of which the share `utilisation` is reached."""
    return flops / (tflops * 1e12 * utilisation) / 3600
