"""What callbacks that draw pictures share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import lightning as L
import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from PIL import Image

from kit.media import Oversized
from kit.retries import of_dead_worker

MOST = 200  # steps of which a run keeps pictures


@contextmanager
def may_fail(what: str, step: int) -> Iterator[None]:
    """Warns in place of ending a training over a picture, whatever went wrong in the block: disk and memory may be full, of a
    GPU too, and encoders and loggers have errors of their own."""
    try:
        yield
    except Exception as error:
        if of_dead_worker(error):  # which torch reports wherever Python happens to be
            raise
        expected = isinstance(error, OSError | Oversized | torch.OutOfMemoryError)
        rank_zero_warn(f"no {what} of step {step}: {error if expected else repr(error)}")


def thin_out(folder: Path, kind: str, now: int):
    """Removes pictures until there are those of `MOST` steps, which span the run: each time of the step nearest to its
    neighbours, but first those of an earlier run that came further.

    Args:
        kind: what comes before the step in the names of the files, as in `step000250.png`. now: the step just shown.
    """
    texts = {path.stem.removeprefix(kind) for path in folder.glob(f"{kind}[0-9]*")}
    steps = sorted(int(text) for text in texts if text.isdecimal())
    while len(steps) > MOST:
        nearest = min(range(1, len(steps) - 1), key=lambda i: steps[i + 1] - steps[i - 1])
        for path in folder.glob(f"{kind}{steps.pop(-1 if steps[-1] > now else nearest):06d}.*"):
            path.unlink(missing_ok=True)


def log_picture(trainer: L.Trainer, name: str, picture: Path, video: Path | None = None):
    """Hands a picture, and a video as NAME_video, to loggers that take such: W&B's takes both, TensorBoard's the picture.

    It comes to lie at the step of the validation's metrics, for which Lightning counts the batches of a tokenizer that
    accumulates gradients.
    """
    step = trainer.fit_loop.epoch_loop._batches_that_stepped
    for logger in trainer.loggers:
        if hasattr(logger, "log_image"):
            logger.log_image(name, [str(picture)], step=step)
            if video is not None:
                logger.log_video(f"{name}_video", [str(video)], step=step, format=["mp4"])
        elif hasattr(logger.experiment, "add_image"):
            logger.experiment.add_image(name, np.asarray(Image.open(picture).convert("RGB")), step, dataformats="HWC")
