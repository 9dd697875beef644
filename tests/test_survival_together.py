"""Trainings on two processes of which one is told to end, or has no room on its disk."""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kit.checkpoint import read_checkpoint
from tests import gated
from tests.fixtures import CLIP, QUICK, TOKENIZER
from tests.interrupted import STEPS, last, wait_for
from tests.processes import Command, group
from tests.test_fsdp import IN_SHARDS
from tests.test_training import losses

LENGTH = 6  # steps of the training
WAYS = {"whole": ["trainer.devices=2", "data.batch_size=2"], "sharded": IN_SHARDS}


@contextmanager
def stopped_at(step: int, root: Path, way: str, *overrides: str) -> Iterator[list[Command]]:
    """Starts or resumes a training, whose processes wait before a step while the block runs, and end after it. They wait
    for the next step's clips, which are read ahead."""
    gate = root / f"gate_{step}"
    small = [word for word in [*CLIP, *QUICK] if not word.startswith(("trainer.devices", "data.batch_size"))]
    words = [
        f"root={root}",
        "name=run",
        *small,
        *TOKENIZER,
        *STEPS,
        *WAYS[way],
        f"recipe.tokenizer.steps={LENGTH}",
        "ckpt=last",
    ]
    words += ["callbacks.video_logger.clips=0", "callbacks.last.every=2", *gated.words(gate, at=4 * step)]
    with group(["fit", "conf=stage1_tokenizer", *words, *overrides], 2, root) as commands:
        wait_for(gated.reached(gate).exists, commands[0])
        yield commands
        gate.touch()
        for command in commands:
            command.wait()


def step_of(root: Path) -> int:
    return read_checkpoint(last(root), "tokenizer")["global_step"]


def limit(process: Command, size: int):
    """Lets a process write no file larger than a size in bytes, in place of a full disk."""
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


@pytest.mark.parametrize("told, way", [(0, "sharded"), (1, "whole")])
def test_all_processes_save_and_end_where_one_is_told_to(told, way, tmp_path):
    with stopped_at(4, tmp_path, way) as commands:
        os.kill(commands[told].pid, signal.SIGTERM)
    assert [command.returncode for command in commands] == [128 + signal.SIGTERM] * 2
    assert step_of(tmp_path) == len(losses(tmp_path / "run")) == 4, "the step that it was at is done, and logged"
    with stopped_at(5, tmp_path, way) as commands:
        pass
    assert [command.returncode for command in commands] == [0, 0] and step_of(tmp_path) == LENGTH
    assert len(losses(tmp_path / "run", start=1)) == LENGTH - 4


@pytest.mark.parametrize("full, way", [(0, "whole"), (1, "sharded")])
def test_a_full_disk_of_one_process_leaves_the_last_checkpoint(full, way, tmp_path):
    """All processes stop after as many failures as are allowed, or go on and save once there is room."""
    with stopped_at(4, tmp_path, way) as commands:
        limit(commands[full], 2**16)
    assert [command.returncode for command in commands] == [1, 1]
    told = (tmp_path / "said_0").read_text()
    assert "last.ckpt could not be saved: File too large" in told and "Make room and resume with ckpt=last" in told
    assert step_of(tmp_path) == 2
    with stopped_at(5, tmp_path, way, "callbacks.last.may_fail=1000") as commands:
        assert step_of(tmp_path) == 4
        limit(commands[full], 2**16)
        (tmp_path / "gate_5").touch()
        wait_for(lambda: "could not be saved: File too large" in (tmp_path / "said_0").read_text(), commands[0])
        limit(commands[full], resource.RLIM_INFINITY)
    assert [command.returncode for command in commands] == [0, 0] and step_of(tmp_path) == LENGTH
