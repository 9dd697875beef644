"""A tiny tokenizer and generator, trained once for all tests through the command line."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch

from kit.cli import main
from kit.confs import compose, located
from kit.data.shapes import Shapes
from kit.files import locked
from kit.generator.guidance import Guidance
from kit.resolvers import register_resolvers

CLIP = ["trainer.accelerator=cpu", "trainer.devices=1", "data.frames=5", "data.height=32", "data.width=32", "data.workers=0"]
TOKENIZER = [
    "tokenizer.bits=8", "tokenizer.scales=[1,2,4]", "tokenizer.patch=4", "tokenizer.widths=[32,32]",
]  # fmt: skip
GENERATOR = ["generator.layers=2", "generator.width=32", "generator.heads=2", "recipe.generator.encoded_clips=24"]
QUICK = [
    "trainer.val_check_interval=50", "trainer.log_every_n_steps=1", "callbacks.video_logger.clips=1",
    "data.val_clips=4", "data.batch_size=4", "callbacks.last.share=1", "callbacks.compile.least_steps=-1",
]  # fmt: skip


# of what is sampled with models of random weights
PROMPTS = ["a red ball", "a blue star"]
RISING = Guidance("rising", first=1.0, last=5.0, fine=10.0)
CLOSE = {"atol": 2e-5, "rtol": 2e-5}

INFINITY = {"bits": 8, "widths": (32, 32, 64), "blocks": 2}  # a tiny tokenizer of Infinity's kind, 4 x 4 pixels per token


def infinity_shapes(bits: int, widths: tuple[int, ...], blocks: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes in the entry `vae` of infinity_vae_*.pth, taken from its public source (infinity/models/bsq_vae)."""
    shapes = {}

    def conv(name: str, inputs: int, outputs: int, side: int = 3):
        shapes.update({f"{name}.conv.weight": (outputs, inputs, side, side), f"{name}.conv.bias": (outputs,)})

    def norm(name: str, channels: int):
        shapes.update({f"{name}.norm.weight": (channels,), f"{name}.norm.bias": (channels,)})

    def block(name: str, inputs: int, outputs: int):
        norm(f"{name}.norm1", inputs)
        conv(f"{name}.conv1", inputs, outputs)
        norm(f"{name}.norm2", outputs)
        conv(f"{name}.conv2", outputs, outputs)
        if inputs != outputs:
            conv(f"{name}.nin_shortcut", inputs, outputs, 1)

    last, channels = len(widths) - 1, widths[0]
    conv("encoder.conv_in", 3, channels)
    for i, width in enumerate(widths):
        for j in range(blocks):
            block(f"encoder.down.{i}.block.{j}", channels, width)
            channels = width
        if i < last:
            conv(f"encoder.down.{i}.downsample.conv", channels, channels)
    conv("decoder.conv_in", bits, channels)
    for side in ("encoder", "decoder"):
        block(f"{side}.mid.block_1", channels, channels)
        block(f"{side}.mid.block_2", channels, channels)
    norm("encoder.norm_out", channels)
    conv("encoder.conv_out", channels, bits)
    for i in range(last, -1, -1):
        for j in range(blocks + 1):
            block(f"decoder.up.{i}.block.{j}", channels, widths[i])
            channels = widths[i]
        if i > 0:
            conv(f"decoder.up.{i}.upsample.conv", channels, channels)
    norm("decoder.norm_out", channels)
    conv("decoder.conv_out", channels, 3)
    return shapes


def infinity_file(path: Path) -> dict[str, torch.Tensor]:
    """Writes a file like infinity_vae_*.pth, of random weights; returns those of its entry `vae`."""
    rng = torch.Generator().manual_seed(0)
    weights = {}
    for name, shape in infinity_shapes(**INFINITY).items():
        scale = torch.Size(shape[1:]).numel() ** -0.5 if len(shape) > 1 else 0.3
        weights[name] = torch.randn(shape, generator=rng) * scale + name.endswith("norm.weight")
    mask = 2 ** torch.arange(INFINITY["bits"] - 1, -1, -1)
    others = {"quantizer.lfq.mask": mask, "quantize.lfq.mask": mask, "perceptual_model.lin0.weight": torch.ones(1, 64, 1, 1)}
    torch.save({"vae": weights | others, "step": 3}, path)
    return weights


def composed(name: str, *overrides: str):
    """Composes a conf as the command line does."""
    register_resolvers()
    return compose(located(name), overrides)


def moving(frames: int, height: int, width: int) -> torch.Tensor:
    """A clip (3, T, H, W) in which something moves."""
    return Shapes("val", frames=frames, height=height, width=width)[0]["video"]


def decoded(path: Path) -> np.ndarray:
    """All frames of a video, (T, H, W, 3), uint8."""
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def frames_of(path: Path) -> int:
    """Counts the frames of a video that can be decoded."""
    with av.open(str(path)) as container:
        return sum(1 for _ in container.decode(video=0))


def fit_tokenizer(root: Path, *overrides: str, name: str = "tokenizer") -> int:
    """Trains a tokenizer for 100 steps, unless overrides say otherwise; stages have steps of their own."""
    steps = [] if any(word.startswith("stages=") for word in overrides) else ["recipe.tokenizer.steps=100"]
    words = [f"root={root}", f"name={name}", *CLIP, *TOKENIZER, *QUICK, *steps, *overrides]
    return main(["fit", "conf=stage1_tokenizer", *words])


def fit_generator(root: Path, *overrides: str, tokenizer: Path, name: str = "generator") -> int:
    words = [f"root={root}", f"name={name}", f"tokenizer_ckpt={tokenizer}", *CLIP, *TOKENIZER, *GENERATOR, *QUICK]
    return main(["fit", "conf=stage2_generator", *words, "recipe.generator.steps=50", *overrides])


@pytest.fixture(scope="session")
def pair(tmp_path_factory) -> SimpleNamespace:
    """A trained tokenizer and generator: paths `root` of the folder, `tokenizer` and `generator` of the checkpoints.

    The first process of xdist that needs them trains them for all.
    """
    base = tmp_path_factory.getbasetemp()
    root = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "pair"
    tokenizer, generator = (root / kind / "checkpoints" / "last.ckpt" for kind in ("tokenizer", "generator"))
    with locked(root.with_suffix(".lock")):
        if not (root / "trained").exists():
            assert fit_tokenizer(root) == 0
            assert fit_generator(root, tokenizer=tokenizer) == 0
            (root / "trained").touch()
    return SimpleNamespace(root=root, tokenizer=tokenizer, generator=generator)


@pytest.fixture
def own_pair(pair, tmp_path) -> SimpleNamespace:
    """A copy of `pair` that a test may change."""
    root = Path(shutil.copytree(pair.root, tmp_path / "pair"))
    moved = {part: root / path.relative_to(pair.root) for part, path in vars(pair).items()}
    return SimpleNamespace(**moved)
