"""Trainings in another process that tests interrupt, and what they leave."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kit.checkpoint import read_checkpoint
from kit.files import contents_hash
from tests import gated
from tests.fixtures import CLIP, QUICK, TOKENIZER
from tests.processes import Command

ROOT = Path(__file__).resolve().parents[1]
LENGTH = 20  # steps of a training
STEPS = ["trainer.precision=32-true", "callbacks.ema.decay=0.9"]


def last(root: Path) -> Path:
    return root / "run" / "checkpoints" / "last.ckpt"


def started(root: Path, *overrides: str, interpreter: bool = False) -> Command | subprocess.Popen:
    """Starts or resumes a training of LENGTH steps of 4 clips in another process.

    Args:
        interpreter: whether in an interpreter of its own, as for users.
    """
    words = [
        f"root={root}",
        "name=run",
        *CLIP,
        *TOKENIZER,
        *QUICK,
        *STEPS,
        f"recipe.tokenizer.steps={LENGTH}",
        "ckpt=last",
        *overrides,
    ]
    command = ["fit", "conf=stage1_tokenizer", *words]
    if not interpreter:
        return Command(command, root / "said")
    command = [sys.executable, "-m", "kit", *command]
    with open(root / "said", "w") as said:
        return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=said, start_new_session=True)


@contextmanager
def stopped_midway(root: Path, *overrides: str, interpreter: bool = False) -> Iterator[Command | subprocess.Popen]:
    """Starts a training that waits at its middle while the block runs: the steps before are done, or about to be. After the
    block it continues."""
    gate = root / "gate"
    process = started(root, *gated.words(gate, at=4 * LENGTH // 2), *overrides, interpreter=interpreter)
    try:
        wait_for(gated.reached(gate).exists, process)
        yield process
    except BaseException:
        process.kill()
        raise
    gate.touch()


def said(root: Path) -> str:
    """Returns what the last training that was started wrote to stderr."""
    return (root / "said").read_text()


@pytest.fixture(scope="session")
def whole(tmp_path_factory) -> dict:
    """The checkpoint of the same training without interruption."""
    root = tmp_path_factory.mktemp("whole")
    assert started(root).wait() == 0
    return read_checkpoint(last(root), "tokenizer")


def same(a: dict, b: dict) -> bool:
    """Returns whether two checkpoints have the same step, weights, averages and optimizer state, to the last bit."""
    parts = ("global_step", "state_dict", "ema", "optimizer_states")
    return contents_hash({key: a[key] for key in parts}) == contents_hash({key: b[key] for key in parts})


def wait_for(happened, process: Command | subprocess.Popen, every: float = 0.002):
    """Waits until `happened()`, asked every so many seconds; fails if the process ends before, or after five minutes."""
    end = time.monotonic() + 300
    while not happened():
        assert process.poll() is None and time.monotonic() < end
        time.sleep(every)
