"""Checkpoints: written to another file and renamed, loaded without executing code, rebuilt into models by path."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from torch.distributed.tensor import DTensor

from kit.files import save_checked, written_aside
from kit.generator.transformer import Generator, GeneratorConfig
from kit.sharded_checkpoint import described, folder_of, load_whole, mapped, remove_shards, save_shards
from kit.tokenizer import Tokenizer, TokenizerConfig
from kit.values import differences

CONFIGS = {"generator": GeneratorConfig.from_dict, "tokenizer": TokenizerConfig.from_dict}
KINDS = tuple(CONFIGS)  # also the keys of the architecture's values in a checkpoint


# the optimizer's state or the weights depend on these, so a resumed run cannot change them
KEPT = ("optimizer.name", "optimizer.betas", "optimizer.weight_decay", "loss.adversarial.betas", "tokenizer_hash")


class TrainingCheckpointIO(TorchCheckpointIO):
    """Saves and loads checkpoints so that a kill or a full disk leaves the previous one whole, see `save_training`.

    A failed save is warned of and counted; `LastCheckpoint` decides when there are too many.

    Attributes: failed, failed saves in a row; most_failed, the most in a row since the last `look`; failure, the reason of
        the last one.
    """

    def __init__(self):
        super().__init__()
        self.failed, self.most_failed, self.failure = 0, 0, None

    def look(self) -> tuple[int, str | None]:
        """Returns the most failed saves in a row since the last `look`, even if one succeeded after, and the last reason."""
        worst, self.most_failed = self.most_failed, 0
        return worst, self.failure

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | os.PathLike, storage_options=None):
        try:
            save_training(checkpoint, Path(path))
            self.failed = 0
        except OSError as error:
            self.failed, self.failure = self.failed + 1, str(error)
            self.most_failed = max(self.most_failed, self.failed)
            rank_zero_warn(f"{error}; {self.failed} in a row", stacklevel=2)

    def load_checkpoint(self, path: str | os.PathLike, map_location=None, weights_only: bool | None = True) -> dict[str, Any]:
        return load_whole(Path(path))  # the receiver moves tensors to their devices

    def remove_checkpoint(self, path: str | os.PathLike):
        if self.failed:  # Lightning removes an older checkpoint for the sake of the new one, which is not there
            return
        super().remove_checkpoint(path)
        remove_shards(Path(path))


def save_training(checkpoint: dict, path: Path):
    """Saves a training's checkpoint: sharded, by all processes, if it has sharded tensors; else as one file.
    Raises as `save_shards`."""
    shared = []
    mapped(checkpoint, lambda _, x: shared.append(isinstance(x, DTensor)))
    if any(shared):
        save_shards(checkpoint, path)
    else:
        save_checked(checkpoint, path)
        remove_shards(path)


def copy_checkpoint(path: Path, to: Path):
    """Copies a training's checkpoint, with its shards if it has any."""
    if folder_of(path).is_dir():
        remove_shards(to)
        shutil.copytree(folder_of(path), folder_of(to))
    with written_aside(to) as aside:
        shutil.copyfile(path, aside)


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
    values = checkpoint.get("hyper_parameters", {})
    return checkpoint, next((kind for kind in KINDS if kind in values), "something else")


def check_resume(path: str | os.PathLike, module: L.LightningModule, data: L.LightningDataModule) -> list[str]:
    """Checks whether a training can resume from a checkpoint.

    Args:
        module: the module to resume, with its settings as hyperparameters. data: its clips, in stages or not.
    Returns:
        the settings that differ from those at the checkpoint's start, as `differences` lists them.
    Raises:
        ValueError: if the checkpoint is of another architecture, has other discriminators, another optimizer or tokenizer,
            naming each difference; if one training is in stages and the other is not; if the checkpoint has the weights of
            another version of kit, or holds weights alone; else as `read_checkpoint`.
    """
    kind, model = module.kind, module.model
    checkpoint = read_checkpoint(path, kind, described)
    if "optimizer_states" not in checkpoint:
        raise ValueError(f"{path} holds weights alone, no training to continue; start anew from them, see `init`")
    ours = type(data).__qualname__  # as Lightning names its state
    if theirs := next((name for name in ("ClipDataModule", "StagedClips") if name in checkpoint and name != ours), None):
        ways = {"ClipDataModule": "without stages", "StagedClips": "in stages"}
        raise ValueError(
            f"{path} is of a training {ways[theirs]}, this one is {ways[ours]} and would not find its place in the data; "
            f"start anew from its weights: init=weights init.ckpt={path} and another name=..."
        )
    began, now = checkpoint["hyper_parameters"], dict(module.hparams)
    differing = differences(CONFIGS[kind](began[kind]).as_dict(), model.config.as_dict())
    differing += differences(_discriminators(began["loss"]), _discriminators(now["loss"]), "loss.adversarial.")
    if differing:
        raise ValueError(
            f"{path} is of another architecture ({'; '.join(differing)}); give the values it was trained with, or start anew "
            f"with another name=..."
        )
    given, ours = ({name: tuple(w.shape) for name, w in ws.items()} for ws in (weights_of(checkpoint), model.state_dict()))
    if differing := differences(given, ours):
        raise ValueError(
            f"{path} is of another version of kit, with other weights ({differing[0]}); start anew: another name=..."
        )
    changed = differences(
        *({k: v for k, v in values.items() if k not in (kind, "clip", "tokenizer_path")} for values in (began, now))
    )
    if kept := [line for line in changed if line.startswith(tuple(f"{key}: " for key in KEPT))]:
        raise ValueError(
            f"{path} began otherwise ({'; '.join(kept)}) and cannot change that; give the values it began with, or "
            f"start anew from its weights: init=weights init.ckpt={path} and another name=..."
        )
    return changed


def _discriminators(loss: dict) -> dict:
    """Returns the values that decide which discriminators a run has."""
    against = loss.get("adversarial", {})
    shape = {key: against[key] for key in ("dims", "width", "layers")} if against.get("weight") else {}
    return {"weight": "above 0" if shape else 0, **shape}


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


def load_tokenizer(path: str | os.PathLike, averaged: bool = True) -> Loaded:
    """Loads a trained `Tokenizer`. Raises as `read_checkpoint`."""
    checkpoint = read_checkpoint(path, "tokenizer")
    values = checkpoint["hyper_parameters"]
    model = Tokenizer(TokenizerConfig.from_dict(values["tokenizer"]))
    return _loaded(model, checkpoint, path, averaged)


def load_generator(path: str | os.PathLike, tokenizer: str | os.PathLike | None = None) -> tuple[Loaded, Loaded]:
    """Loads a trained `Generator` and its tokenizer.

    Args:
        tokenizer: path of the tokenizer's checkpoint; default is the one it was trained with.
    Raises:
        as `read_checkpoint`; ValueError also if the tokenizer is not the one the generator was trained on.
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
    """Loads a trained `Generator`, and the hash of the tokenizer it was trained on. Raises as `read_checkpoint`."""
    checkpoint = read_checkpoint(path, "generator")
    return _generator(checkpoint, path), checkpoint["hyper_parameters"]["tokenizer_hash"]


def _generator(checkpoint: dict, path: str | os.PathLike) -> Loaded:
    config = GeneratorConfig.from_dict(checkpoint["hyper_parameters"]["generator"])
    return _loaded(Generator(config), checkpoint, path, True)


def _loaded(model: nn.Module, checkpoint: dict, path: str | os.PathLike, averaged: bool) -> Loaded:
    try:
        model.load_state_dict(weights_of(checkpoint, averaged))
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip()
        raise ValueError(f"{path} is of another version of kit, with other weights ({reason}); train it again") from error
    model.eval().requires_grad_(False)
    clip, held_out = checkpoint["hyper_parameters"]["clip"], data_settings(checkpoint).get("held_out")
    return Loaded(model, clip, Path(path), checkpoint["global_step"], model_hash(model), held_out)


def data_settings(checkpoint: dict) -> dict:
    """Returns `ClipDataModule.settings` of a checkpoint's training, in the stage it was in; empty if they are not known."""
    if staged := checkpoint.get("StagedClips"):
        return dict(enumerate(staged.get("settings", ()))).get(staged["stage"], {})
    return checkpoint.get("ClipDataModule", {}).get("settings", {})
