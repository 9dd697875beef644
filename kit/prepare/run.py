"""Prepares what kit needs from outside and cannot ship: python -m kit prepare WHAT."""

from __future__ import annotations

import shlex
from pathlib import Path

from omegaconf import DictConfig

from kit.data.listing import list_videos
from kit.files import file_sha256
from kit.prepare.fluent_emoji import prepare_fluent_emoji
from kit.prepare.i3d import prepare_i3d
from kit.prepare.infinity import prepare_infinity
from kit.prepare.vizdoom import form_of, prepare_vizdoom
from kit.values import check_choice


def source_of(cfg: DictConfig) -> Path | None:
    return Path(cfg.source) if cfg.source else None


PREPARES = {
    "i3d": lambda cfg: prepare_i3d(source_of(cfg)),
    "infinity": lambda cfg: prepare_infinity(source_of(cfg)),
    "fluent_emoji": lambda cfg: prepare_fluent_emoji(source_of(cfg)),
    "vizdoom": lambda cfg: prepare_vizdoom(cfg.n, form_of(cfg.frames, cfg.height, cfg.width, cfg.fps, cfg.seed), cfg.workers),
}


def use_of(path: Path) -> str:
    """What to print about the result: the hash of a file, or how to train on a folder of clips."""
    if path.is_file():
        return f"sha256 {file_sha256(path)}"
    root = shlex.quote(f"data.root={path}")
    return f"{len(list_videos(path))} clips; to train on them:\npython -m kit fit conf=stage1_tokenizer data=clips {root}"


def prepare(cfg: DictConfig) -> Path:
    """Prepares `cfg.what`, and prints its path and its hash or use."""
    check_choice("what", cfg.what, PREPARES)
    path = PREPARES[cfg.what](cfg)
    print(f"{path}\n{use_of(path)}")
    return path
