"""Files that are whole or not there, and weights that are what they claim to be."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to, renamed to it at the end: a kill, an error or a full disk leaves nothing
    half-written under `path`, and the next write takes the place of what a kill left."""
    name = hashlib.sha256(path.name.encode()).hexdigest()[:12]  # short, for long names
    aside = path.with_name(f".{name}.part{path.suffix}")  # the suffix tells PyAV the container
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield aside
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def write_json(path: Path, value: dict):
    with written_aside(path) as aside:
        aside.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def file_sha256(path: str | Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_weights(path: Path) -> dict[str, Tensor]:
    """A state dict from safetensors, or from a torch file; nothing in it is executed.

    Raises:
        ValueError: if it is broken or something else.
    """
    try:
        weights = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"{path} is not a readable file of weights: {str(error).splitlines()[0]}") from error
    if not isinstance(weights, dict):
        raise ValueError(f"{path} holds {type(weights).__name__}, expected a dict of weights")
    return weights


def read_text(path: Path) -> str:
    """Raises: ValueError naming the line that is not UTF-8."""
    data = path.read_bytes()
    try:
        return data.decode().removeprefix("\ufeff")  # a mark that some editors put first
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}, line {line}: not UTF-8; save the file in that encoding") from error


def read_json(path: Path):
    """Raises: ValueError naming the line that is not JSON."""
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}: not JSON ({error.msg}); the file may be cut off") from error
