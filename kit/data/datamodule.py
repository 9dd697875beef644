"""Clips as Lightning wants them, one DataModule for each stage's resolution and duration."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import lightning as L
from torch.utils.data import DataLoader, Dataset, Sampler

from kit.data.features import EncodedClips
from kit.scales import latent_frames


class StreamSampler(Sampler[int]):
    """Clip numbers of one rank, from a given batch on, without end.

    Batch i holds clips [i, i + 1) * batch_size * ranks of the stream, so the place in the data is one number.
    """

    def __init__(self, batch_size: int, first_batch: int, rank: int, ranks: int):
        self.batch_size, self.first_batch, self.rank, self.ranks = batch_size, first_batch, rank, ranks

    def __iter__(self) -> Iterator[int]:
        n = self.first_batch * self.batch_size * self.ranks + self.rank
        while True:
            yield n
            n += self.ranks


class Numbered(Dataset):
    """A source whose items carry their number `n`."""

    def __init__(self, source: Dataset):
        self.source = source

    def __getitem__(self, n: int) -> dict:
        return {**self.source[n], "n": n}


class ClipDataModule(L.LightningDataModule):
    """Training and validation clips of one resolution and duration.

    Args:
        source: makes the data set of a split: source(split=, frames=, height=, width=, fps=) -> items numbered from 0
            without end, each {"video": (3, T, H, W) in [-1, 1], "caption": str, "label": int}.
        frames: T = 1 + 4n. height, width: pixels. fps: frames per second; 0: the files' own.
        batch_size: clips per rank and step. val_clips: clips of the validation split to use.
        workers: processes that make clips.
    """

    def __init__(
        self, source: Callable[..., Dataset], frames: int, height: int, width: int, fps: float,
        batch_size: int, val_clips: int, workers: int,
    ):  # fmt: skip
        super().__init__()
        latent_frames(frames)  # complains about a wrong length before anything starts
        self.frames, self.height, self.width = frames, height, width
        self.batch_size, self.val_clips, self.workers = batch_size, val_clips, workers
        shape = dict(frames=frames, height=height, width=width, fps=fps)
        self.train, self.val = source(split="train", **shape), source(split="val", **shape)
        self.fps = fps or self.train.native_fps
        self.sources = (self.train, self.val)
        self.classes, self.captioned = tuple(self.train.classes), self.train.captioned
        self.batches_done = 0

    @property
    def unreadable(self) -> list[Path]:
        """Files that could not be read so far, in this process or a worker."""
        return [path for source in self.sources for path in getattr(source, "unreadable", [])]

    @property
    def clip(self) -> dict:
        """Shape of a clip, as plain values for a checkpoint."""
        return {"frames": self.frames, "height": self.height, "width": self.width, "fps": self.fps}

    def train_dataloader(self) -> DataLoader:
        trainer = self.trainer
        sampler = StreamSampler(self.batch_size, self.batches_done, trainer.global_rank, trainer.world_size)
        return self._loader(self.train, sampler, 0 if isinstance(self.train, EncodedClips) else self.workers)

    def val_dataloader(self) -> DataLoader:
        rank, ranks = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        if self.val_clips < ranks:
            raise ValueError(f"data.val_clips={self.val_clips} leaves some of the {ranks} devices without a clip; raise it")
        return self._loader(self.val, range(rank, self.val_clips, ranks), self.workers)

    def _loader(self, dataset: Dataset, sampler, workers: int) -> DataLoader:
        return DataLoader(
            Numbered(dataset), self.batch_size, sampler=sampler, num_workers=workers,
            persistent_workers=False, prefetch_factor=4 if workers else None,
        )  # fmt: skip

    def state_dict(self) -> dict:
        """The place in the data: batches that training has used up."""
        return {"batches_done": self.trainer.fit_loop.epoch_loop.batch_progress.total.processed}

    def load_state_dict(self, state: dict):
        self.batches_done = state["batches_done"]
