"""Clips as Lightning wants them, one DataModule for each stage's resolution and duration."""

from __future__ import annotations

import atexit
import functools
import hashlib
import itertools
import multiprocessing
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader, Dataset, Sampler

from kit.checkpoint import differences
from kit.data.buckets import Bucket, BucketClips, ClipsNeeded, image_buckets
from kit.data.cache import CachedClips
from kit.data.mixture import label_among
from kit.optim import batches_of_a_step
from kit.scales import latent_frames
from kit.stages import StagePlan, place, starts


class StreamSampler(Sampler[list[tuple[int, int]]]):
    """Batches of one rank, from a given one on, without end: lists of (clip number, how many of its frames).

    Clips and images are streams of their own. With m batches of images before it, batch i holds clips [i - m, i - m + 1) *
    batch_size * ranks, whole, or the first frames of clips [m, m + 1) * image_batch * ranks: the place in the data is one
    number.

    Args:
        frames: of a clip. image_share: of the batches, in [0, 1], that hold images. left_out: numbers of batches that are
            not given, so that the ones behind them move up.
    """

    def __init__(
        self, batch_size: int, first_batch: int, rank: int, ranks: int, frames: int,
        image_share: float = 0.0, image_batch: int = 0, left_out: frozenset[int] = frozenset(),
    ):  # fmt: skip
        self.batch_size, self.first_batch, self.rank, self.ranks = batch_size, first_batch, rank, ranks
        self.frames, self.image_share, self.image_batch, self.left_out = frames, image_share, image_batch, left_out

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for i in numbers_from(self.first_batch, self.left_out):
            images = int(i * self.image_share)  # batches of images before this one
            if int((i + 1) * self.image_share) > images:
                yield self._images(images)
            else:
                yield self._clips(i - images)

    def _images(self, number: int) -> list[tuple[int, int]]:
        """A batch of images, by how many of them came before."""
        return [(n, 1) for n in self._numbers(number, self.image_batch)]

    def _clips(self, number: int) -> list[tuple[int, int]]:
        """A batch of clips, likewise."""
        return [(n, self.frames) for n in self._numbers(number, self.batch_size)]

    def _numbers(self, batch: int, size: int) -> list[int]:
        """Of this rank's clips in a batch of a stream whose batches have that size."""
        return [(batch * size + j) * self.ranks + self.rank for j in range(size)]


class BucketSampler(StreamSampler):
    """Batches of one rank, each of one bucket, the same for all ranks. Each bucket has two streams, its clips and its images;
    whose turn it is, and so how far its stream is, is a function of the batch's number too.

    Args: as of `StreamSampler`; images: the source of batches of images, where it is not first frames of the clips.
    """

    def __init__(
        self, source: BucketClips, first_batch: int, rank: int, ranks: int,
        image_share: float = 0.0, left_out: frozenset[int] = frozenset(), images: BucketClips | None = None,
    ):  # fmt: skip
        self.source, self.images, self.first_batch, self.rank, self.ranks = source, images, first_batch, rank, ranks
        self.image_share, self.left_out = image_share, left_out

    def _images(self, number: int) -> list[tuple[int, int]]:
        if self.images is not None:
            return self._batch(self.images, number)
        i, before = self.source.image_turns.of(number)
        return [(self.source.number(i, n), 1) for n in self._numbers(before, self.source.buckets[i].image_batch)]

    def _clips(self, number: int) -> list[tuple[int, int]]:
        return self._batch(self.source, number)

    def _batch(self, source: BucketClips, number: int) -> list[tuple[int, int]]:
        i, before = source.clip_turns.of(number)
        bucket = source.buckets[i]
        return [(source.number(i, n), bucket.frames) for n in self._numbers(before, bucket.batch_size)]


def numbers_from(first: int, left_out: frozenset[int]) -> Iterator[int]:
    """0, 1, 2, ... without those left out, from the `first`-th on."""
    return itertools.islice((n for n in itertools.count() if n not in left_out), first, None)


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


class Numbered(Dataset):
    """Clips of a source by (number, frames): so many of their first frames, and the number as `n`. Single frames are of
    `images`, where there are any; of their classes those count that clips have too."""

    def __init__(self, source: Dataset, images: Dataset | None = None):
        self.source, self.images = source, images

    def __getitem__(self, key: tuple[int, int]) -> dict:
        n, frames = key
        if frames == 1 and self.images is not None:
            item = {**self.images[n], "n": n}
            item["label"] = label_among(self.source.classes, self.images.classes, item["label"])
        else:
            item = {**self.source[n], "n": n}
        for name, used in (("video", frames), ("feature", latent_frames(frames))):
            if name in item:
                item[name] = item[name][:, :used]
        return item


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
            without end, each {"video": (3, T, H, W) in [-1, 1], "caption": str, "label": int}.
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
        self.encode, self.encoded, self.batches_done = None, self.cached, 0
        self.left_out: frozenset[int] = frozenset()  # batches of the stream, by their numbers

    def encode_ahead(self, encode: Callable[..., CachedClips]):
        """Training shall read encoded clips: at its start `encode(source, bucket, share, needed, ranks=, images=)` makes or
        finds those of a source, of a shape, which are such a share of all clips, and of which each of so many ranks reads
        so many; `images` if they are of the source of that name."""
        self.encode = encode

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
            self._encode(functools.partial(self.encode, ranks=trainer.world_size))  # the processes share the work
            self.encode, self.encoded = None, True
        where = (self.batches_done, trainer.global_rank, trainer.world_size)
        if self.bucketed:
            stream = BucketSampler(self.train, *where, self.image_share, self.left_out, self.images)
        else:
            images = (self.image_share, self.image_batch)
            stream = StreamSampler(self.batch_size, *where, self.frames, *images, self.left_out)
        return self._loader(Numbered(self.train, self.images), self.encoded, batch_sampler=stream)

    def _encode(self, encode: Callable[..., CachedClips]):
        encode = functools.partial(encode, images=False)
        if self.images is None:
            self.train = encoded(self.train, self.bucket, encode)
            return
        self.train = encoded(self.train, self.bucket, of_batches(0, encode))
        if not isinstance(self.images, CachedClips):
            (bucket,) = image_buckets([self.bucket])
            self.images = encoded(self.images, bucket, of_batches(1, functools.partial(encode, images=True)))

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
        names = "\n".join(name for source in sources for name in getattr(source, "files", ()))
        steps = {}
        if self.trainer is not None:
            batches = batches_of_a_step(self.trainer, self.trainer.lightning_module)
            steps = {"devices": self.trainer.world_size, "batches_of_a_step": batches}
        return {
            **self.clip, "batch_size": self.batch_size, "image_share": self.image_share, "buckets": buckets,
            "files": hashlib.sha256(names.encode()).hexdigest()[:8], **steps,
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


def encoded(source: Dataset, bucket: Bucket, encode: Callable[..., CachedClips]) -> Dataset:
    """A source with encoded clips in place of its own; `bucket` is their shape, where it is not in buckets."""
    if isinstance(source, BucketClips):
        source.encode(encode)
        return source
    return encode(source, bucket, 1.0, bucket.clips_needed)


def of_batches(kind: int, encode: Callable[..., CachedClips]) -> Callable[..., CachedClips]:
    """`encode` for a source that batches of clips (kind 0) or of images (1) alone read."""

    def encode_those(source: Dataset, bucket: Bucket, share: float, needed: ClipsNeeded) -> CachedClips:
        return encode(source, bucket, share, lambda *batches: needed(batches[kind], 0))

    return encode_those


class Unsized:
    """What is iterated over anew each time; Lightning takes it for a loader that does not know its length."""

    def __init__(self, begin: Callable[[], Iterator[dict]]):
        self.begin = begin

    def __iter__(self) -> Iterator[dict]:
        return self.begin()


class StagedClips(ClipsOnDevice):
    """Clips of one stage after another. Whatever else a `ClipDataModule` knows, it knows of the stage being trained.

    The data leads and `StageSwitch` follows: batches carry the number of their stage as `stage`.

    Args:
        plan: its stages. parts: a DataModule for each. batches: how many each has, on a rank, where none ends early.
    """

    def __init__(self, plan: StagePlan, parts: list[ClipDataModule], batches: list[int]):
        super().__init__()
        self.plan, self.parts, self.planned = plan, parts, batches
        self.stage = 0  # the one being trained
        self.ended: dict[int, int] = {}  # batches of stages that are over, or whose end is decided
        self.batches_done, self.handed_out = 0, 0

    def __getattr__(self, name: str):
        if name.startswith("__") or "parts" not in self.__dict__:  # while unpickling or copying
            raise AttributeError(name)
        return getattr(self.parts[self.stage], name)

    def setup(self, stage: str):
        for part in self.parts:
            part.trainer = self.trainer
            part.setup(stage)

    @property
    def batches(self) -> list[int]:
        """How many each stage has, as far as is known."""
        return [self.ended.get(i, n) for i, n in enumerate(self.planned)]

    @property
    def began(self) -> int:
        """Batches of the stages before the one being trained."""
        return starts(self.batches)[self.stage]

    def enter(self, stage: int):
        """Goes on with another stage."""
        self.ended |= {i: self.batches[i] for i in range(stage)}
        self.stage = stage

    def end_stage(self, multiple: int):
        """The stage being trained ends with the batches that are already under way, rounded up to a multiple."""
        batches = -(-(self.handed_out - self.began) // multiple) * multiple
        self.ended[self.stage] = min(batches, self.batches[self.stage])

    @property
    def finished(self) -> bool:
        """Whether no stage has a batch left."""
        return place(self.batches, self.batches_done) is None

    @property
    def unreadable(self) -> list[Path]:
        return [path for part in self.parts for path in part.unreadable]

    def train_dataloader(self) -> Unsized:
        return Unsized(self._train_batches)

    def val_dataloader(self) -> Unsized:
        return Unsized(lambda: iter(self.parts[self.stage].val_dataloader()))

    def _train_batches(self) -> Iterator[dict]:
        self.handed_out = self.batches_done
        while (where := place(self.batches, self.handed_out)) is not None:
            stage, self.parts[where[0]].batches_done = where
            for batch in self.parts[stage].train_dataloader():
                self.handed_out += 1
                yield {**batch, "stage": stage}
                if self.handed_out >= starts(self.batches)[stage + 1]:
                    break

    def place_of(self, batch: int) -> tuple[int, int]:
        """(stage, number in its stream) of a batch by its number in the training."""
        stage, number = place(self.batches, batch)
        return stage, self.parts[stage].place_of(number)[1]

    def leave_out(self, places: Iterable[tuple[int, int]]):
        """As of a `ClipDataModule`."""
        for stage, number in places:
            self.parts[stage].leave_out([(0, number)])

    def state_dict(self) -> dict:
        """The place in the data: batches that training has used up, the stage, how long the ones before it were, and what
        was left out of each."""
        return {
            "batches_done": self.trainer.fit_loop.epoch_loop.batch_progress.total.processed,
            "stage": self.stage, "names": [stage.name for stage in self.plan.stages], "ended": dict(self.ended),
            "left_out": [sorted(part.left_out) for part in self.parts],
            "settings": [part.settings for part in self.parts],
        }  # fmt: skip

    def load_state_dict(self, state: dict):
        """
        Raises:
            ValueError: if stages that are over, or the one it was in, are others now, or a step has other batches: the place
                in the data is counted in batches.
        """
        begun = [stage.name for stage in self.plan.stages[: state["stage"] + 1]]
        if (before := state.get("names", begun)[: state["stage"] + 1]) != begun:
            raise ValueError(f"the stages begun so far were {', '.join(before)}, now {', '.join(begun)}: those must stay")
        for part, began in zip(self.parts, state.get("settings", ())):
            now = part.settings["batches_of_a_step"]
            if (then := began.get("batches_of_a_step", now)) != now:
                raise ValueError(f"a step had {then} batches on each device, now {now}: in stages that cannot change")
        self.batches_done, self.stage, self.ended = state["batches_done"], state["stage"], dict(state["ended"])
        for part, left_out in zip(self.parts, state.get("left_out", ())):
            part.left_out |= set(left_out)
        for part, began in zip(self.parts, state.get("settings", ())):
            part.tell_changes(began)
