"""The verb `consolidate`: one file of a checkpoint in shards."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig

from kit import sharded_checkpoint
from kit.checkpoint import kind_of


def consolidate(cfg: DictConfig) -> Path:
    """Writes a sharded checkpoint as one file, keeps the shards, and returns the file's path.

    Without `out` the file is NAME_whole.ckpt, which replaces the one before.

    Raises:
        FileExistsError: if `out` exists; else as `kind_of` and `sharded_checkpoint.consolidate`.
    """
    path = Path(cfg.ckpt)
    if cfg.out is not None and Path(cfg.out).exists():
        raise FileExistsError(f"out={cfg.out} is there already; give another name")
    kind_of(path)
    out = path.with_name(f"{path.stem}_whole{path.suffix}") if cfg.out is None else Path(cfg.out)
    sharded_checkpoint.consolidate(path, out)
    print(f"{out}: {out.stat().st_size / 2**20:.1f} MiB")
    return out
