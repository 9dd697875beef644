"""Functions that several benchmarks use."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from kit.confs import compose, located, register_resolvers


def composed(conf: str, words: list[str]) -> DictConfig:
    """Composes a conf as its verb does, and resolves its interpolations."""
    register_resolvers()
    cfg = compose(located(conf), words)
    OmegaConf.resolve(cfg)
    return cfg


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
