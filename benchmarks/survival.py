"""Kills a training (SIGKILL) again and again, also while it saves, and checks that it ends with the same weights and losses
as one that was never killed.

    python benchmarks/survival.py FOLDER [kills=50] [seed=0] [conf=stage1_tokenizer] [key=value ...]

Trains a tokenizer, or with conf=progressive tokenizer_ckpt=PATH a generator in three stages. Each kill, of all processes of
the training, prints a line: the moment, the step of the checkpoint that was left, and whether that was whole. The moments
take turns: while a save is under way, some time after a start's first save, and at any time from the start of the process
on, while it resumes or encodes clips too. Each training that reaches its end prints a line that compares its result; the last
line counts. Further words go to the training, such as trainer=fsdp trainer.devices=2 trainer.strategy.checkpoints=sharded.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from kit.checkpoint import kind_of, read_checkpoint
from kit.files import contents_hash
from runs import logged, machine_facts, parted

RUN = (
    "size=tiny", "data.frames=5", "data.height=32", "data.width=32", "data.batch_size=4", "data.val_clips=4",
    "data.workers=1", "trainer.val_check_interval=100", "trainer.log_every_n_steps=1", "callbacks.last.every=5",
    "callbacks.last.share=1", "callbacks.compile.least_steps=-1", "+logger.csv.flush_logs_every_n_steps=1",
)  # fmt: skip
TRAININGS = {
    "stage1_tokenizer": ("recipe.tokenizer.steps=600",),
    "progressive": (
        "stages.low.steps=200", "stages.low.data.height=16", "stages.low.data.width=16", "stages.low.data.batch_size=4",
        "stages.high.steps=200", "stages.long.steps=200", "stages.long.data.frames=9", "stages.long.data.batch_size=2",
        "recipe.generator.encoded_clips=400",
    ),
}  # fmt: skip
LATE = 50  # a training is not killed in its last LATE steps
MOMENTS = ("in a save", "after a save", "at any time")
SPREAD = 6.0  # seconds after a save in which it is killed


def start(root: Path, words: list[str]) -> subprocess.Popen:
    command = ["-m", "kit", "fit", f"root={root}", "name=run", "ckpt=last", *words]
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    return subprocess.Popen([sys.executable, *command], **quiet)


def saving(folder: Path) -> bool:
    """Returns whether a save is under way: a temporary file exists, or shards beside those of the last checkpoint."""
    return any(folder.glob(".*part*")) or len(list(folder.glob("last.shards/*"))) > 1


def step_of(checkpoint: Path) -> int:
    """Reads the step of a checkpoint; 0 if it does not exist yet. Raises ValueError if it is not whole."""
    return read(checkpoint)["global_step"] if checkpoint.exists() else 0


def read(checkpoint: Path) -> dict:
    return read_checkpoint(checkpoint, kind_of(checkpoint))


def wait(process: subprocess.Popen, condition: Callable[[], bool], pause: float = 0.001):
    """Waits until a condition holds, or the process ends."""
    while process.poll() is None and not condition():
        time.sleep(pause)


def wait_for_save(process: subprocess.Popen, last: Path, began: float) -> float:
    """Waits for the first save of a training that began at a time; returns the seconds that it took."""
    wait(process, lambda: last.exists() and last.stat().st_mtime > began)
    return time.time() - began


def kill_once(root: Path, words: list[str], moment: str, rng: random.Random, first_save: float) -> tuple[str, float]:
    """Starts or resumes the training, and kills it.

    Args:
        moment: of MOMENTS. first_save: seconds that the start before took to its first save.
    Returns:
        the moment in words, and the seconds to the first save of this start, or those given if it had none.
    """
    folder, began = root / "run" / "checkpoints", time.time()
    process = start(root, words)
    if moment == "at any time":
        delay, since = rng.uniform(0, first_save + SPREAD), "its start"
        wait(process, lambda: time.time() > began + delay)
    else:
        first_save = wait_for_save(process, folder / "last.ckpt", began)
        delay, since, saved = rng.uniform(0, SPREAD), "a save", time.time()
        if moment == "in a save":
            wait(process, lambda: not saving(folder), 0.0002)  # the end of an earlier one, which removes old shards last
            wait(process, lambda: saving(folder), 0.0002)
        else:
            wait(process, lambda: time.time() > saved + delay)
    if process.poll() is not None:
        return "none: the training had ended", first_save
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return "while saving" if moment == "in a save" else f"{delay:.2f} s after {since}", first_save


def main(folder: str, *words: str):
    own, words = parted(words, "kills", "seed", "conf")
    conf = own.get("conf", "stage1_tokenizer")
    words = [f"conf={conf}", *RUN, *TRAININGS[conf], *words]
    kills, rng = int(own.get("kills", 50)), random.Random(int(own.get("seed", 0)))
    whole, killed = Path(folder) / "whole", Path(folder) / "killed"
    begun, process, reached = time.time(), start(whole, words), whole / "run" / "checkpoints" / "last.ckpt"
    first_save = wait_for_save(process, reached, begun)
    process.wait()
    expected = read(reached)
    losses = logged(whole / "run", "train/loss")
    shutil.rmtree(killed, ignore_errors=True)
    last, survived, runs = killed / "run" / "checkpoints" / "last.ckpt", 0, 0
    for number in range(kills):
        if step_of(last) > expected["global_step"] - LATE:  # near the end: finish this training, then start anew
            runs += compare(killed, words, expected, losses)
            shutil.rmtree(killed)
        moment, first_save = kill_once(killed, words, MOMENTS[number % len(MOMENTS)], rng, first_save)
        try:
            step, good = step_of(last), True
        except ValueError as error:
            step, good = str(error), False
        survived += good
        print(json.dumps({"kill": number + 1, "moment": moment, "checkpoint_step": step, "whole": good}), flush=True)
    runs += compare(killed, words, expected, losses)
    found = {"kills": kills, "whole_checkpoints": survived, "trainings_alike": runs}
    print(json.dumps({**found, "conf": conf, **machine_facts()}), flush=True)


def compare(root: Path, words: list[str], expected: dict, losses: dict[int, float]) -> bool:
    """Finishes a training; returns whether its weights, averages, optimizer state and all logged losses equal the expected
    ones."""
    start(root, words).wait()
    found = read(root / "run" / "checkpoints" / "last.ckpt")
    parts = ("global_step", "state_dict", "ema", "optimizer_states")
    weights = contents_hash({k: found[k] for k in parts}) == contents_hash({k: expected[k] for k in parts})
    seen = logged(root / "run", "train/loss")
    alike = bool(seen) and all(losses[step] == loss for step, loss in seen.items())
    starts = len(list((root / "run" / "logs").glob("version_*")))
    row = {"starts": starts, "same_weights": weights, "losses_compared": len(seen), "same_losses": alike}
    print(json.dumps(row), flush=True)
    return weights and alike


if __name__ == "__main__":
    main(*sys.argv[1:])
