"""Checkpoints of trainings: saved so that a failure leaves the one before whole, and compared with the run that resumes."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import lightning as L
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_warn
from torch.distributed.tensor import DTensor

from kit.checkpoint import CONFIGS, STAGED, UNSTAGED, read_checkpoint, weights_of
from kit.files import save_checked, written_aside
from kit.sharded_checkpoint import described, folder_of, load_whole, mapped, remove_shards, save_shards
from kit.values import differences

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


def save_failed(trainer: L.Trainer) -> bool:
    """Returns, on all processes alike, whether the last save of a checkpoint, of any kind, has failed: with shards they fail
    together. An IO other than `TrainingCheckpointIO` raises where one does."""
    return trainer.strategy.broadcast(getattr(trainer.strategy.checkpoint_io, "failed", 0) > 0)


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
    """Copies a training's checkpoint, with its shards if it has any. A full disk leaves the one that was at `to`."""
    sharded, part = folder_of(path).is_dir(), folder_of(to).with_suffix(".part")
    with written_aside(to) as aside:
        shutil.copyfile(path, aside)
        if sharded:
            shutil.rmtree(part, ignore_errors=True)  # of a copy that was killed
            try:
                shutil.copytree(folder_of(path), part)
                remove_shards(to)
                part.rename(folder_of(to))
            finally:
                shutil.rmtree(part, ignore_errors=True)
    if not sharded:
        remove_shards(to)


def check_resume(path: str | os.PathLike, module: L.LightningModule, data: L.LightningDataModule) -> list[str]:
    """Checks whether a training can resume from a checkpoint.

    Args:
        module: the module to resume, with its settings as hyperparameters. data: its clips, in stages or not.
    Returns:
        the settings that differ from those at the checkpoint's start, as `differences` lists them.
    Raises:
        ValueError: if the checkpoint is of another architecture, has other discriminators, another optimizer or tokenizer,
            naming each difference; if one training is in stages and the other is not, or has begun others; if the checkpoint
            has the weights of another version of kit, or holds weights alone; else as `read_checkpoint`.
    """
    kind, model = module.kind, module.model
    checkpoint = read_checkpoint(path, kind, described)
    if "optimizer_states" not in checkpoint:
        raise ValueError(f"{path} holds weights alone, no training to continue; start anew from them, see `init`")
    ways, ours = {UNSTAGED: "without stages", STAGED: "in stages"}, type(data).__qualname__
    if theirs := next((name for name in ways if name in checkpoint and name != ours), None):
        raise ValueError(
            f"{path} is of a training {ways[theirs]}, this one is {ways[ours]} and would not find its place in the data; "
            f"start anew from its weights: init=weights init.ckpt={path} and another name=..."
        )
    if STAGED in checkpoint:
        data.check_state(checkpoint[STAGED])
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
    adversarial = loss.get("adversarial", {})
    shape = {key: adversarial[key] for key in ("dims", "width", "layers")} if adversarial.get("weight") else {}
    return {"weight": "above 0" if shape else 0, **shape}
