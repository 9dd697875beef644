"""What callbacks that draw pictures share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import lightning as L
from lightning.pytorch.utilities import rank_zero_warn


@contextmanager
def may_fail(what: str, step: int) -> Iterator[None]:
    """Warns of an error of the disk in the block: a full one must not end a training over a picture."""
    try:
        yield
    except OSError as error:
        rank_zero_warn(f"no {what} of step {step}: {error}")


def log_picture(trainer: L.Trainer, name: str, picture: Path, video: Path | None = None):
    """Hands a picture, and a video as NAME_video, to the loggers that take such, as W&B's does."""
    for logger in trainer.loggers:
        if hasattr(logger, "log_image"):
            logger.log_image(name, [str(picture)], step=trainer.global_step)
            if video is not None:
                logger.log_video(f"{name}_video", [str(video)], step=trainer.global_step, format=["mp4"])
