"""Fixtures that several tests share."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import nn

from kit.generator.condition import ConditionConfig
from kit.generator.transformer import Generator, GeneratorConfig
from kit.machine import can_compile
from kit.tokenizer import Tokenizer, TokenizerConfig
from kit.tokenizer.causal import CausalConv3d
from tests.composing import composing_quickly
from tests.fixtures import own_pair, pair  # noqa: F401  fixtures
from tests.interrupted import whole  # noqa: F401  likewise

LONG = (  # files that take the longest, from a minute down: first, so that at the end no process waits long for another
    "test_fsdp.py", "test_survival.py", "test_confs.py", "test_vizdoom.py", "test_evaluate.py", "test_survival_together.py",
    "test_detectors.py", "test_stages.py", "test_readme.py", "test_cache.py", "test_verbs.py", "test_training.py",
    "test_shapes_score.py", "test_retries.py", "test_doctor.py", "test_folder_training.py", "test_multirun.py",
    "test_notebook.py",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]):
    order = {name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: order.get(item.path.name, len(LONG)))


def pytest_collection_finish():
    """Has the garbage collector leave out what is imported: to look through it all again and again takes a while."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Makes torch use one thread: that is fastest for small tensors, and always gives the same results."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed():
    """Seeds torch, so that a test draws the same numbers whether it runs alone or with others."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def own_environment():
    """Restores the environment after a test: Lightning puts a port there, which further trainings would take too."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """Sets a temporary cache folder for evaluations in place of the user's."""
    os.environ["KIT_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    """Sets a cache folder of the test's own; for a whole file: pytestmark = pytest.mark.usefixtures("empty_cache")."""
    monkeypatch.setenv("KIT_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="session", autouse=True)
def quick_composition():
    with composing_quickly():
        yield


@pytest.fixture(scope="session")
def videomae(tmp_path_factory) -> Path:
    """A folder with a tiny VideoMAE of random weights for clips of 4 frames, as a cheap detector."""
    from transformers import VideoMAEConfig, VideoMAEModel

    torch.manual_seed(0)
    size = dict(image_size=32, patch_size=16, num_frames=4, tubelet_size=2)
    layers = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    folder = tmp_path_factory.mktemp("videomae")
    VideoMAEModel(VideoMAEConfig(**size, **layers)).save_pretrained(folder)
    return folder


@pytest.fixture
def compiler():
    """Skips a test where torch.compile does not work; to ask takes seconds."""
    if not can_compile():
        pytest.skip("torch.compile does not work here")


@pytest.fixture
def traced():
    """Has modules be compiled without machine code, which takes half a minute: they are traced and differentiated as ever.
    Gives the list of those that were."""
    compile_module, found = nn.Module.compile, []

    def trace(self, **how):
        found.append(self)
        compile_module(self, backend="aot_eager", **how)

    with mock.patch.object(nn.Module, "compile", trace), mock.patch("callbacks.compile.can_compile", return_value=True):
        yield found


@pytest.fixture
def terminal():
    """Gives programs that a test starts something to read from, as a user's terminal does."""
    here, there = os.pipe()
    before = os.dup(0)
    os.dup2(here, 0)
    os.write(there, b"yes\n")
    yield
    os.dup2(before, 0)
    for descriptor in (here, there, before):
        os.close(descriptor)


@pytest.fixture
def no_grad():
    """Turns gradients off; for a whole file: pytestmark = pytest.mark.usefixtures("no_grad")."""
    with torch.no_grad():
        yield


@pytest.fixture
def shared() -> Path:
    """The folder of files shared between checkouts, beside this one."""
    folder = Path(__file__).resolve().parents[1].parent / "shared"
    if not folder.is_dir():
        pytest.skip(f"no shared files at {folder}")
    return folder


@torch.no_grad()
def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Gives every parameter random values: heads and residuals that start at zero would hide errors."""
    rng = torch.Generator().manual_seed(seed)
    for p in module.parameters():
        if p.ndim > 1:
            p.normal_(std=(p.shape[1] * p[0, 0].numel()) ** -0.5, generator=rng)
        else:
            p.add_(torch.randn(p.shape, generator=rng), alpha=0.3)
    return module.eval()


def past_gradients(module: nn.Module) -> list[torch.Tensor]:
    """Returns for each causal convolution the gradient of the part of its weight that sees past frames."""
    mixing = [m for m in module.modules() if isinstance(m, CausalConv3d) and m.past]
    return [m.weight.grad.unflatten(1, (m.past + 1, -1))[:, :-1] for m in mixing]


@pytest.fixture
def make_tokenizer():
    """Builds a tiny tokenizer of random weights: 4 x 4 pixels per cell, 8 x 8 pixels for the default scales."""

    def make(scales=(1, 2), bits=4, seed=0) -> Tokenizer:
        return randomise(Tokenizer(TokenizerConfig(bits, scales, patch=2, widths=(8, 16), blocks=1)), seed)

    return make


@pytest.fixture
def make_generator():
    """Builds a tiny generator of random weights."""

    words = ConditionConfig(length=3, buckets=64)

    def make(scales=3, bits=4, layers=2, seed=0, condition=words, **config) -> Generator:
        return randomise(Generator(GeneratorConfig(layers, 32, 2, bits, scales, condition=condition, **config)), seed)

    return make
