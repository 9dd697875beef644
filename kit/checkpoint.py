"""Checkpoints as files of models: loaded without executing code, and rebuilt into models by path."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from kit.blank import blank
from kit.files import save_checked
from kit.generator.transformer import Generator, GeneratorConfig
from kit.sharded_checkpoint import described, load_whole
from kit.tokenizer import Tokenizer, TokenizerConfig
from kit.values import clip_shape

CONFIGS = {"generator": GeneratorConfig.from_dict, "tokenizer": TokenizerConfig.from_dict}
KINDS = tuple(CONFIGS)  # also the keys of the architecture's values in a checkpoint
UNSTAGED, STAGED = "ClipDataModule", "StagedClips"  # keys of the data's state, which Lightning names after the class


def save_tokenizer(model: Tokenizer, clip: dict, path: str | os.PathLike):
    """Saves a tokenizer as a checkpoint for `load_tokenizer`; it holds no training to resume.

    Args:
        clip: `frames`, `height`, `width`, `fps` of the clips it is for.
    """
    values = {"tokenizer": model.config.as_dict(), "clip": clip}
    weights = {f"model.{name}": w for name, w in model.state_dict().items()}
    save_checked({"hyper_parameters": values, "state_dict": weights, "global_step": 0}, Path(path))


def read_checkpoint(path: str | os.PathLike, kind: str, load: Callable[[Path], dict] = load_whole) -> dict:
    """Loads a checkpoint of kit, sharded or not, on the CPU; nothing in it is executed.

    Args:
        kind: `tokenizer` or `generator`, what it should hold. load: `described` if only shapes are needed.
    Raises:
        FileNotFoundError: if there is none. ValueError: if a file is broken, damaged, foreign, or of the other kind.
    """
    checkpoint, found = _read(path, load)
    if found != kind:
        raise ValueError(f"{path} holds {found}, expected a {kind} checkpoint of kit")
    return checkpoint


def read_tokenizer_config(path: str | os.PathLike) -> TokenizerConfig:
    """Returns the architecture of a trained tokenizer, which is not built. Raises as `read_checkpoint`."""
    return TokenizerConfig.from_dict(read_checkpoint(path, "tokenizer", described)["hyper_parameters"]["tokenizer"])


def kind_of(path: str | os.PathLike) -> str:
    """Returns what a checkpoint holds, `tokenizer` or `generator`. Raises as `read_checkpoint`."""
    kind = _read(path, described)[1]
    if kind not in KINDS:
        raise ValueError(f"{path} holds {kind}, expected a checkpoint of kit")
    return kind


def _read(path: str | os.PathLike, load: Callable[[Path], dict]) -> tuple[dict, str]:
    path = Path(path)
    if path.is_dir():
        raise FileNotFoundError(f"{path} is a folder; of a checkpoint in shards give the file beside it, {path.stem}.ckpt")
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}; train one with `python -m kit fit`, or give its path")
    checkpoint = load(path)
    values = checkpoint.get("hyper_parameters") or {}  # of other programs they may be None, or name a tokenizer
    return checkpoint, next((kind for kind in KINDS if isinstance(values.get(kind), dict)), "something else")


def weights_of(checkpoint: dict, averaged: bool = True) -> dict[str, torch.Tensor]:
    """Returns a model's weights: the moving average if the checkpoint has one, unless `averaged` is False."""
    weights = dict(checkpoint["state_dict"])
    if averaged:
        weights.update(checkpoint.get("ema", {}))
    return {name.removeprefix("model."): w for name, w in weights.items() if name.startswith("model.")}


def model_hash(model: nn.Module) -> str:
    """Hashes weights and architecture of a model to 16 hex digits."""
    digest = hashlib.sha256(json.dumps(model.config.as_dict(), sort_keys=True).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().float().numpy().tobytes())
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Loaded:
    """A model from a checkpoint, in evaluation mode.

    Args:
        clip: `frames`, `height`, `width`, `fps` of the clips it was trained on.
        steps: optimizer steps it was trained for.
        hash: `model_hash`.
        held_out: hash of the held-out files' names, see `ClipDataModule.settings`; None if that is not known.
    """

    model: nn.Module
    clip: dict
    path: Path
    steps: int
    hash: str
    held_out: str | None = None

    @property
    def kind(self) -> str:
        """`tokenizer` or `generator`."""
        return type(self.model).__name__.lower()


def load_tokenizer(path: str | os.PathLike) -> Loaded:
    """Loads a trained `Tokenizer`. Raises as `read_checkpoint`; ValueError also if weights are not finite."""
    checkpoint = read_checkpoint(path, "tokenizer")
    values = checkpoint["hyper_parameters"]
    model = Tokenizer(TokenizerConfig.from_dict(values["tokenizer"]))
    return _loaded(model, checkpoint, path)


def load_generator(path: str | os.PathLike, tokenizer: str | os.PathLike | None = None) -> tuple[Loaded, Loaded]:
    """Loads a trained `Generator` and its tokenizer.

    Args:
        tokenizer: path of the tokenizer's checkpoint; default is the one it was trained with.
    Raises:
        as `read_checkpoint`; ValueError also if the tokenizer is not the one the generator was trained on, or weights are
            not finite.
    """
    checkpoint = read_checkpoint(path, "generator")
    values = checkpoint["hyper_parameters"]
    try:
        partner = load_tokenizer(tokenizer or values["tokenizer_path"])
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"the generator {path} needs its tokenizer: {error}; if it was moved, give tokenizer=PATH"
        ) from error
    if partner.hash != values["tokenizer_hash"]:
        raise ValueError(
            f"wrong tokenizer: {partner.path} has hash {partner.hash}, but the generator {path} was trained on the "
            f"tokenizer {values['tokenizer_hash']} ({values['tokenizer_path']}); give that one as tokenizer=PATH"
        )
    return _generator(checkpoint, path), partner


def load_generator_alone(path: str | os.PathLike) -> tuple[Loaded, str]:
    """Loads a trained `Generator`, and the hash of the tokenizer it was trained on. Raises as `load_tokenizer`."""
    checkpoint = read_checkpoint(path, "generator")
    return _generator(checkpoint, path), checkpoint["hyper_parameters"]["tokenizer_hash"]


def _generator(checkpoint: dict, path: str | os.PathLike) -> Loaded:
    config = GeneratorConfig.from_dict(checkpoint["hyper_parameters"]["generator"])
    return _loaded(blank(lambda: Generator(config)), checkpoint, path)


def _loaded(model: nn.Module, checkpoint: dict, path: str | os.PathLike) -> Loaded:
    weights = weights_of(checkpoint)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip()
        raise ValueError(f"{path} is of another version of kit, with other weights ({reason}); train it again") from error
    if lost := [name for name, w in weights.items() if not w.isfinite().all()]:  # signs of NaN are bits like any others
        raise ValueError(
            f"{path} holds NaN or infinite weights, in {len(lost)} of {len(weights)} tensors, such as {lost[0]}: its "
            f"training failed; take an earlier checkpoint"
        )
    model.eval().requires_grad_(False)
    clip = clip_shape(checkpoint["hyper_parameters"].get("clip"), f"{path}: clip")
    held_out = data_settings(checkpoint).get("held_out")
    return Loaded(model, clip, Path(path), checkpoint["global_step"], model_hash(model), held_out)


def data_settings(checkpoint: dict) -> dict:
    """Returns `ClipDataModule.settings` of a checkpoint's training, in the stage it was in; empty if they are not known."""
    if staged := checkpoint.get(STAGED):
        return dict(enumerate(staged.get("settings", ()))).get(staged["stage"], {})
    return checkpoint.get(UNSTAGED, {}).get("settings", {})
