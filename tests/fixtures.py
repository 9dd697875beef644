"""A tiny tokenizer and generator, trained once for all tests through the command line."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from hydra import compose, initialize_config_dir

from kit.cli import CONF, main, register_resolvers

CLIP = ["trainer.accelerator=cpu", "trainer.devices=1", "data.frames=5", "data.height=32", "data.width=32", "data.workers=0"]
TOKENIZER = [
    "tokenizer.bits=8", "tokenizer.scales=[1,2,4]", "tokenizer.patch=4", "tokenizer.widths=[32,32]",
]  # fmt: skip
GENERATOR = ["generator.layers=2", "generator.width=32", "generator.heads=2", "recipe.generator.encoded_clips=24"]
QUICK = [
    "trainer.val_check_interval=50", "trainer.log_every_n_steps=1", "callbacks.video_logger.clips=1",
    "data.val_clips=4", "data.batch_size=4",
]  # fmt: skip


def composed(name: str, *overrides: str):
    """A conf as the command line would compose it."""
    register_resolvers()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose(name, list(overrides))


def fit_tokenizer(root: Path, *overrides: str, name: str = "tokenizer") -> int:
    words = [f"root={root}", f"name={name}", *CLIP, *TOKENIZER, *QUICK, "recipe.tokenizer.steps=150", *overrides]
    return main(["fit", "conf=stage1_tokenizer", *words])


def fit_generator(root: Path, *overrides: str, tokenizer: Path, name: str = "generator") -> int:
    words = [f"root={root}", f"name={name}", f"tokenizer_ckpt={tokenizer}", *CLIP, *TOKENIZER, *GENERATOR, *QUICK]
    return main(["fit", "conf=stage2_generator", *words, "recipe.generator.steps=50", *overrides])


@pytest.fixture(scope="session")
def pair(tmp_path_factory) -> SimpleNamespace:
    """root, tokenizer and generator: paths of the folder and the two checkpoints."""
    root = tmp_path_factory.mktemp("pair")
    assert fit_tokenizer(root) == 0
    tokenizer = root / "tokenizer" / "checkpoints" / "last.ckpt"
    assert fit_generator(root, tokenizer=tokenizer) == 0
    return SimpleNamespace(root=root, tokenizer=tokenizer, generator=root / "generator" / "checkpoints" / "last.ckpt")
