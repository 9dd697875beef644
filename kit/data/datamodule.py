"""Clips as Lightning wants them: a DataModule of one resolution and duration, or of buckets."""

from __future__ import annotations

import atexit
import hashlib
import multiprocessing
import signal
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader, Dataset

from kit.checkpoint import differences
from kit.data.buckets import Bucket, BucketClips, image_buckets
from kit.data.cache import CachedClips
from kit.data.numbered import Numbered
from kit.data.sampler import BucketSampler, StreamSampler, numbers_from
from kit.optim import batches_of_a_step


def leave_sigterm_to_the_trainer(worker: int):
    """Schedulers send it to all processes of a job; a worker that ends of it would be missed before the trainer has saved."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


@atexit.register
def end_workers():
    """Ends those that an error has left behind: this process would wait for them, since they do not heed SIGTERM."""
    if workers := [process for process in multiprocessing.active_children() if process.daemon]:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # where torch would tell of each of them
        for process in workers:
            process.kill()


class ClipsOnDevice(L.LightningDataModule):
    """Clips go to the device that trains. Their numbers and labels stay: what is drawn and looked up by them is, on the CPU,
    and a GPU would be waited for to have them back."""

    def transfer_batch_to_device(self, batch: dict, device: torch.device, dataloader_idx: int) -> dict:
        pinned = device.type == "cuda"  # see `_loader`: elsewhere such a copy could be read before it is there
        clips = {key: batch[key].to(device, non_blocking=pinned) for key in ("video", "feature") if key in batch}
        return {**batch, **clips}


class ClipDataModule(ClipsOnDevice):
    """Training and validation clips of one resolution and duration, or training clips in buckets.

    Args:
        source: makes the data set of a split: source(split=, frames=, height=, width=, fps=) -> items numbered from 0
            without end, each {"video": (3, T, H, W) in [-1, 1], "caption": str, "label": int}, and of some "given": int,
            see `Numbered`.
        frames: T = 1 + 4n. height, width: pixels. fps: frames per second; 0: the files' own.
        batch_size: clips per rank and step. val_clips: clips of the validation split to use.
        workers: processes that make clips.
        image_share: of the training's batches, that hold first frames of clips alone, as many as there are latent frames in
            a batch of clips: images and video jointly, as in the paper's stage I.
        images: makes the data set that they are taken from instead, as `source` does, of clips of one frame.
        buckets: values of a `Bucket` each, which the training's clips are sorted into in place of `frames`, `height`, `width`
            and `batch_size`; validation keeps to these. None: all are alike.
    Raises:
        ValueError: if `frames` is not 1 + 4n, `image_share` is not in [0, 1], or `images` are given that none of the
            batches take, or that cannot be told from clips; as `BucketClips`.
    """

    def __init__(
        self, source: Callable[..., Dataset], frames: int, height: int, width: int, fps: float,
        batch_size: int, val_clips: int, workers: int, image_share: float = 0.0, buckets: Sequence[Mapping] = (),
        images: Callable[..., Dataset] | None = None,
    ):  # fmt: skip
        super().__init__()
        for key, number, least in (("batch_size", batch_size, 1), ("val_clips", val_clips, 1), ("workers", workers, 0)):
            if not isinstance(number, int) or number < least:
                raise ValueError(f"data.{key}={number}; expected a whole number, {least} or more")
        if not isinstance(image_share, int | float) or not 0 <= image_share <= 1:
            raise ValueError(f"data.image_share={image_share}; expected a share from 0 to 1")
        if images and not image_share:
            raise ValueError("data.images is given, but data.image_share=0 of the batches take them; raise it")
        if images and 1 in (frames, *(bucket["frames"] for bucket in buckets)):
            raise ValueError("data.images go beside clips of several frames; pictures alone are data=clips data.root=DIR")
        self.image_share, self.bucket = image_share, Bucket(frames, height, width, batch_size)
        self.image_batch = self.bucket.image_batch
        self.frames, self.height, self.width = frames, height, width
        self.batch_size, self.val_clips, self.workers = batch_size, val_clips, workers
        shape = dict(frames=frames, height=height, width=width, fps=fps)
        self.train, self.val = source(split="train", **shape), source(split="val", **shape)
        self.fps = fps or self.train.native_fps
        self.classes, self.captioned = tuple(self.train.classes), self.train.captioned
        self.images = images(split="train", frames=1, height=height, width=width) if images else None
        if buckets:
            shapes = [Bucket(**bucket) for bucket in buckets]
            self.train = BucketClips(self.train, shapes)
            if self.images is not None:
                self.images = BucketClips(self.images, image_buckets(shapes))
        self.sources = [source for source in (self.train, self.val, self.images) if source is not None]
        self.encode, self.batches, self.encoded, self.batches_done = None, 0, self.cached, 0
        self.left_out: frozenset[int] = frozenset()  # batches of the stream, by their numbers

    def encode_ahead(self, encode: Callable[..., CachedClips], batches: int):
        """Training shall read encoded clips: at its start `encode(source, bucket, share, number, images=)` makes or finds
        those of a source, of a shape, which are such a share of all clips, and of which so many batches on each rank read so
        many in all; `images` if they are of the source of that name."""
        self.encode, self.batches = encode, batches

    @property
    def bucketed(self) -> bool:
        """Whether the training's clips are in buckets."""
        return isinstance(self.train, BucketClips)

    @property
    def cached(self) -> bool:
        """Whether the clips are encoded ones, of a cache that was made before."""
        return isinstance(self.val, CachedClips)

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
        if self.encode is not None:
            self._encode()
            self.encode, self.encoded = None, True
        where = (self.batches_done, trainer.global_rank, trainer.world_size)
        if self.bucketed:
            stream = BucketSampler(self.train, *where, self.image_share, self.left_out, self.images)
        else:
            images = (self.image_share, self.image_batch)
            stream = StreamSampler(self.batch_size, *where, self.frames, *images, self.left_out)
        return self._loader(Numbered(self.train, self.images), self.encoded, batch_sampler=stream)

    def _encode(self):
        images = int(self.batches * self.image_share)  # of the batches, as a `Stream` counts them
        clips = self.batches - images
        if self.images is None:
            self.train = self._encoded(self.train, self.bucket, clips, images)
            return
        self.train = self._encoded(self.train, self.bucket, clips, 0)
        if not isinstance(self.images, CachedClips):
            (bucket,) = image_buckets([self.bucket])
            self.images = self._encoded(self.images, bucket, images, 0, images=True)

    def _encoded(self, source: Dataset, bucket: Bucket, clips: int, pictures: int, images: bool = False) -> Dataset:
        """A source with encoded clips in place of its own, as many as so many batches of clips and of images read; `bucket`
        is their shape, where it is not in buckets."""

        def encode(part: Dataset, shape: Bucket, share: float, needed: int) -> CachedClips:
            return self.encode(part, shape, share, needed * self.trainer.world_size, images)  # the processes share the work

        if isinstance(source, BucketClips):
            source.encode(encode, clips, pictures)
            return source
        return encode(source, bucket, 1.0, bucket.clips_needed(clips, pictures))

    def setup(self, stage: str | None = None):
        """
        Raises:
            ValueError: if there are more devices than clips to validate on.
        """
        ranks = self.trainer.world_size if self.trainer else 1
        if self.val_clips < ranks:
            raise ValueError(f"data.val_clips={self.val_clips} leaves some of the {ranks} devices without a clip; raise it")

    def val_dataloader(self) -> DataLoader:
        """As many clips, and so batches, on each device: sharded ones wait for each other in each."""
        rank, ranks = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        keys = [(n, self.frames) for n in range(rank, self.val_clips // ranks * ranks, ranks)]
        return self._loader(Numbered(self.val), self.cached, batch_size=self.batch_size, sampler=keys)

    def _loader(self, dataset: Numbered, encoded: bool, **order) -> DataLoader:
        on_cpu = self.trainer is None or self.trainer.strategy.root_device.type == "cpu"
        workers = 0 if encoded and on_cpu else self.workers  # its cores have better to do, and there is little to read
        prefetch = 4 if workers else None
        return DataLoader(
            dataset, num_workers=workers, persistent_workers=False, prefetch_factor=prefetch,
            pin_memory=not on_cpu and torch.cuda.is_available(), worker_init_fn=leave_sigterm_to_the_trainer, **order,
        )  # fmt: skip

    @property
    def about(self) -> str:
        """Where clips come from, how many files, and what is said of them."""
        train, val = (source.source if isinstance(source, BucketClips) else source for source in (self.train, self.val))
        parts = [str(getattr(train, "root", type(train).__name__.lower()))]
        if hasattr(train, "files"):
            parts.append(f"{len(train.files)} files to train on, {len(val.files)} held out")
        known = f"{len(self.classes)} classes" if self.classes else "neither captions nor classes"
        return ", ".join([*parts, "captions" if self.captioned else known])

    def place_of(self, batch: int) -> tuple[int, int]:
        """(0, number in the stream) of a batch by its number in the training."""
        return 0, next(numbers_from(batch, self.left_out))

    def leave_out(self, places: Iterable[tuple[int, int]]):
        """Batches that training shall not meet, by what `place_of` says of them, besides those that a checkpoint names."""
        self.left_out |= {number for _, number in places}

    @property
    def settings(self) -> dict:
        """What decides which clips a step's batches hold, as plain values; of files their names, by a hash."""
        buckets = [f"{bucket} x {bucket.batch_size}" for bucket in self.train.buckets] if self.bucketed else []
        sources = [source.source if isinstance(source, BucketClips) else source for source in self.sources]
        names = [name for source in sources for name in getattr(source, "files", ())]
        keys = ("seed", "weights", "late")
        draws = {key: [getattr(source, key) for source in sources if hasattr(source, key)] for key in keys}
        steps = {}
        if self.trainer is not None:
            batches = batches_of_a_step(self.trainer, self.trainer.lightning_module)
            steps = {"devices": self.trainer.world_size, "batches_of_a_step": batches}
        return {
            **self.clip, "batch_size": self.batch_size, "image_share": self.image_share, "buckets": buckets,
            "files": hash_of(names), "held_out": None if self.cached else hash_of(getattr(self.val, "files", ())),
            **draws, **steps,
        }  # fmt: skip

    def state_dict(self) -> dict:
        """The place in the data: batches that training has used up, and numbers of those that were left out."""
        done = self.trainer.fit_loop.epoch_loop.batch_progress.total.processed
        return {"batches_done": done, "left_out": sorted(self.left_out), "settings": self.settings}

    def load_state_dict(self, state: dict):
        self.batches_done = state["batches_done"]
        self.left_out |= set(state.get("left_out", ()))
        self.tell_changes(state.get("settings"))

    def tell_changes(self, began: dict | None):
        """Of the settings that a run began with, where they are known."""
        began = began or {}
        now = {key: value for key, value in self.settings.items() if key in began}  # those that kit knew of then
        for change in differences(began, now):
            rank_zero_info(f"  goes on with other data than it began with (then, now): {change}")


def hash_of(names: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(names).encode()).hexdigest()[:8]
