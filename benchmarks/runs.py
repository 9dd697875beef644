"""Functions that several benchmarks use."""

from __future__ import annotations

import csv
import os
import platform
import subprocess
import sys
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf

from kit.confs import compose, located
from kit.resolvers import register_resolvers


def composed(conf: str, words: list[str]) -> DictConfig:
    """Composes a conf as its verb does, and resolves its interpolations."""
    register_resolvers()
    cfg = compose(located(conf), words)
    OmegaConf.resolve(cfg)
    return cfg


def machine_facts() -> dict[str, str | int | None]:
    """Returns what a measurement depends on: the processor, its cores, torch's version, and kit's commit (None outside git),
    with a + if files were changed since."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    describe = ["git", "describe", "--always", "--match=", "--dirty=+"]
    commit = subprocess.run(describe, cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip() or None
    return {
        "machine": models[0] if models else platform.machine(), "cpus": os.cpu_count(), "torch": torch.__version__,
        "commit": commit,
    }  # fmt: skip


def kit(*words: str):
    """Runs a verb of kit; its output goes to stderr, apart from the benchmark's own lines."""
    subprocess.run([sys.executable, "-m", "kit", *words], check=True, stdout=sys.stderr)


def parted(words: tuple[str, ...], *own: str) -> tuple[dict[str, str], list[str]]:
    """Splits words key=value into a dictionary of a benchmark's `own` keys, and the others, which are for a verb."""
    chosen = [word for word in words if word.split("=")[0] in own]
    return dict(word.split("=", 1) for word in chosen), [word for word in words if word not in chosen]


def logged(run: Path, metric: str) -> dict[int, float]:
    """Reads a metric from the logs of all starts of a run: iteration -> value."""
    found = {}
    for log in sorted((run / "logs").glob("version_*/metrics.csv")):
        with log.open() as lines:
            found |= {int(row["step"]) + 1: round(float(row[metric]), 4) for row in csv.DictReader(lines) if row.get(metric)}
    return found
