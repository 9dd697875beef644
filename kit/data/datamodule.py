"""Lightning DataModule for clips of one resolution and duration, or of several in buckets."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader

from kit.data.batches import BucketSampler, StreamSampler, images_among, numbers_from
from kit.data.bucketed import BucketClips
from kit.data.buckets import Bucket, image_buckets
from kit.data.listing import held_out_hash
from kit.data.numbered import Numbered
from kit.data.shared import read_once
from kit.data.source import ClipSource, check_source
from kit.data.workers import leave_signals_to_the_trainer
from kit.loop import batches_done, batches_of_a_step
from kit.values import check_positive, check_share, check_whole_number, differences, hash_of

SHOWN = 3  # classes that the description of the data names


class ClipsOnDevice(L.LightningDataModule):
    """DataModule that moves only the clips of a batch to the training device.

    Clip numbers and labels stay on the CPU, where draws and look-ups use them: fetching them back would wait for the GPU.
    """

    def transfer_batch_to_device(self, batch: dict, device: torch.device, dataloader_idx: int) -> dict:
        pinned = device.type == "cuda"  # see `_loader`; else the copy might be read before it is complete
        clips = {key: batch[key].to(device, non_blocking=pinned) for key in ("video", "feature") if key in batch}
        return {**batch, **clips}


class ClipDataModule(ClipsOnDevice):
    """Training and validation clips of one resolution and duration, or training clips in buckets.

    Args:
        source: builds the data set of a split: source(split=, frames=, height=, width=, fps=) -> `ClipSource`.
        frames: T = 1 + 4n. height, width: pixels. fps: frames per second; 0: the files' own.
        batch_size: clips in a batch on a rank. val_clips: number of clips of the validation split to use.
        workers: number of processes that load clips.
        image_share: share of the training batches that hold images only, namely first frames of clips, as many as there are
            latent frames in a batch of clips. It trains images and video jointly, as the paper's stage I does.
        images: builds the data set that images are taken from instead; called as `source`, for clips of one frame.
        buckets: values of a `Bucket` each. Training clips are sorted into these; `frames`, `height`, `width` and
            `batch_size` then apply to validation only. Empty: all clips have one shape.
    Raises:
        ValueError: if `source` is no function, `frames` is not 1 + 4n, `image_share` is not in [0, 1], or `images` are given
            although no batch takes them or clips have one frame too; as `BucketClips`.
    """

    def __init__(
        self, source: Callable[..., ClipSource], frames: int, height: int, width: int, fps: float,
        batch_size: int, val_clips: int, workers: int, image_share: float = 0.0, buckets: Sequence[Mapping] = (),
        images: Callable[..., ClipSource] | None = None,
    ):  # fmt: skip
        super().__init__()
        for key, number, least in (("batch_size", batch_size, 1), ("val_clips", val_clips, 1), ("workers", workers, 0)):
            check_whole_number(f"data.{key}", number, least)
        check_share("data.image_share", image_share)
        if images and not image_share:
            raise ValueError("data.images is given, but data.image_share=0 of the batches take them; raise it")
        if images and 1 in (frames, *(bucket["frames"] for bucket in buckets)):
            raise ValueError("data.images go beside clips of several frames; pictures alone are data=clips data.root=DIR")
        if not callable(source):
            raise ValueError(
                f"data.source is a {type(source).__name__} already, of one split; add _partial_: true to its values"
            )
        self.image_share, self.bucket = image_share, Bucket(frames, height, width, batch_size)
        self.image_batch = self.bucket.image_batch
        self.frames, self.height, self.width = frames, height, width
        self.batch_size, self.val_clips, self.workers = batch_size, val_clips, workers
        shape = dict(frames=frames, height=height, width=width, fps=fps)
        with read_once():
            self.train, self.val = source(split="train", **shape), source(split="val", **shape)
            self.images = images(split="train", frames=1, height=height, width=width) if images else None
        check_source(self.train, "data.source")
        self.fps = fps or float(self.train.native_fps)  # plain values, for checkpoints; a user's may be numpy's
        check_positive(f"fps of {self.train.name}", self.fps)
        self.classes, self.captioned = tuple(map(str, self.train.classes)), bool(self.train.captioned)
        if self.images is not None:
            check_source(self.images, "data.images")
        if buckets:
            shapes = [Bucket(**bucket) for bucket in buckets]
            self.train = BucketClips(self.train, shapes)
            if self.images is not None:
                self.images = BucketClips(self.images, image_buckets(shapes))
        self.sources = [source for source in (self.train, self.val, self.images) if source is not None]
        self.bucketed = bool(buckets)
        self.encoder, self.batches, self.encoded_clips = None, 0, 0
        self.reads_encoded, self.batches_done = self.cached, 0
        self.left_out: frozenset[int] = frozenset()  # numbers of batches in the stream

    def encode_ahead(self, encoder: Callable[..., ClipSource], batches: int, clips: int):
        """Makes training read encoded clips, which are made or found at its start.

        Args:
            encoder: called as encoder(source, bucket, share, needed, images) for each data set and bucket; returns encoded
                clips. `bucket` is their shape, `share` their share of all clips, `needed` how many of them all ranks
                together read, and `images` whether they are of the data set `images`.
            batches: number of batches that training reads on each rank.
            clips: number of encoded clips, of all data sets and buckets, after which they repeat.
        """
        self.encoder, self.batches, self.encoded_clips = encoder, batches, clips

    @property
    def parts(self) -> list[ClipDataModule]:
        """The data of each stage; a training without stages is one."""
        return [self]

    @property
    def cached(self) -> bool:
        """Whether the clips come encoded, from a cache that was made before."""
        return self.val.tokenizer is not None

    @property
    def unreadable(self) -> list[Path | str]:
        """Files that could not be read so far, in this process or a worker; each once."""
        return list(dict.fromkeys(path for source in self.sources for path in source.unreadable))

    @property
    def captions(self) -> set[str]:
        """The captions of its files, class names where there are none; empty if it has no files."""
        return {text["caption"] for source in self.sources for text in source.texts()} - {""}

    @property
    def clip(self) -> dict:
        """Shape of a clip, as plain values for a checkpoint."""
        return {"frames": self.frames, "height": self.height, "width": self.width, "fps": self.fps}

    def train_dataloader(self) -> DataLoader:
        if self.encoder is not None:
            self._encode_sources()
            self.encoder, self.reads_encoded = None, True
        where = (self.batches_done, *self._rank_and_ranks)
        if self.bucketed:
            stream = BucketSampler(self.train, *where, self.image_share, self.left_out, self.images)
        else:
            images = (self.image_share, self.image_batch)
            stream = StreamSampler(self.batch_size, *where, self.frames, *images, self.left_out)
        size = None if self.bucketed else (self.height, self.width)
        return self._loader(Numbered(self.train, self.images, size), self.reads_encoded, batch_sampler=stream)

    def _encode_sources(self):
        images = images_among(self.batches, self.image_share)
        clips = self.batches - images
        if self.images is None:
            self.train = self._encoded(self.train, self.bucket, clips, images)
            return
        self.train = self._encoded(self.train, self.bucket, clips, 0)
        if self.images.tokenizer is None:
            (bucket,) = image_buckets([self.bucket])
            self.images = self._encoded(self.images, bucket, images, 0, images=True)

    def _encoded(self, source: ClipSource, bucket: Bucket, clips: int, pictures: int, images: bool = False) -> ClipSource:
        """Returns a source with encoded clips in place of its own.

        Args:
            bucket: shape of the clips, for a source that is not in buckets.
            clips, pictures: number of batches of clips and of images that are read. images: whether it is the source
                `images`.
        """

        def encode(part: ClipSource, shape: Bucket, share: float, needed: int) -> ClipSource:
            return self.encoder(part, shape, share, needed * self.trainer.world_size, images)  # the processes share the work

        if isinstance(source, BucketClips):
            source.replace(encode, clips, pictures)
            return source
        return encode(source, bucket, 1.0, bucket.clips_needed(clips, pictures))

    def setup(self, stage: str | None = None):
        """Checks that each device has a clip to validate on.

        Raises:
            ValueError: if there are more devices than clips to validate on.
        """
        _, ranks = self._rank_and_ranks
        if self.val_clips < ranks:
            raise ValueError(f"data.val_clips={self.val_clips} leaves some of the {ranks} devices without a clip; raise it")

    @property
    def _rank_and_ranks(self) -> tuple[int, int]:
        """This process's number, and how many there are; (0, 1) without a trainer."""
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    @property
    def held_out(self) -> Numbered:
        """The clips to validate on, by number and frames."""
        return Numbered(self.val, size=(self.height, self.width))

    def val_dataloader(self) -> DataLoader:
        """Loader with equally many clips, and so batches, on each device.

        Devices that share a sharded model wait for each other in every batch.
        """
        rank, ranks = self._rank_and_ranks
        keys = [(n, self.frames) for n in range(rank, self.val_clips // ranks * ranks, ranks)]
        return self._loader(self.held_out, self.cached, batch_size=self.batch_size, sampler=keys)

    def _loader(self, dataset: Numbered, encoded: bool, **order) -> DataLoader:
        on_cpu = self.trainer is None or self.trainer.strategy.root_device.type == "cpu"
        workers = 0 if encoded and on_cpu else self.workers  # reading is cheap, and training needs the cores
        return DataLoader(
            dataset, num_workers=workers, persistent_workers=False,
            pin_memory=not on_cpu and torch.cuda.is_available(), worker_init_fn=leave_signals_to_the_trainer, **order,
        )  # fmt: skip

    @property
    def about(self) -> str:
        """Describes the data in words: where clips come from, how many files, captions or classes."""
        parts = [self.train.name]
        if len(self.train.files):
            parts.append(f"{len(self.train.files)} files to train on, {len(self.val.files)} held out")
        some = ", ".join([*self.classes[:SHOWN], *["..."] * (len(self.classes) > SHOWN)])  # folders may not be classes
        known = f"{len(self.classes)} classes ({some})" if self.classes else "neither captions nor classes"
        return ", ".join([*parts, "captions" if self.captioned else known])

    def position_of(self, batch: int) -> tuple[int, int]:
        """Returns (0, number in the stream) of a batch, given its number in the training."""
        return 0, next(numbers_from(batch, self.left_out))

    def leave_out(self, positions: Iterable[tuple[int, int]]):
        """Leaves out batches, given by their `position_of`, in addition to those that a checkpoint names."""
        self.left_out |= {number for _, number in positions}

    @functools.cached_property
    def file_sizes(self) -> str:
        """Hash of the names and sizes of all files, looked up once: others may have come under the same names."""
        return hash_of(line for source in self.sources for line in source.listing())

    @functools.cached_property
    def words(self) -> str:
        """Hash of the captions and classes of all files, looked up once."""
        return hash_of(repr(text) for source in self.sources if len(source.files) for text in source.texts())

    @functools.cached_property
    def names(self) -> str:
        """Hash of the names of all files, computed once."""
        return hash_of(name for source in self.sources for name in source.known_as())

    @functools.cached_property
    def names_held_out(self) -> str | None:
        """Hash of the names of the held-out files, computed once; None: of a cache of clips, which has none."""
        return None if self.cached else held_out_hash(self.val.known_as())

    @property
    def settings(self) -> dict:
        """Plain values that decide which clips the batches of a step hold; of files, hashes of their names, sizes and words,
        of caches one of what they hold."""
        buckets = [f"{bucket} x {bucket.batch_size}" for bucket in self.train.buckets] if self.bucketed else []
        steps = {}
        if self.trainer is not None:
            batches = batches_of_a_step(self.trainer, self.trainer.lightning_module)
            steps = {"devices": self.trainer.world_size, "batches_of_a_step": batches}
        return {
            **self.clip, "batch_size": self.batch_size, "image_share": self.image_share, "buckets": buckets,
            "files": self.names, "file_sizes": self.file_sizes, "words": self.words, "held_out": self.names_held_out,
            "draws": [source.draws for source in self.sources], "encoded_clips": self.encoded_clips, **steps,
        }  # fmt: skip

    def state_dict(self) -> dict:
        """The place in the data: number of batches that training has used, numbers of those left out, and `settings`."""
        return {"batches_done": batches_done(self.trainer), "left_out": sorted(self.left_out), "settings": self.settings}

    def load_state_dict(self, state: dict):
        self.batches_done = state["batches_done"]
        self.left_out |= set(state.get("left_out", ()))
        self.tell_changes(state.get("settings"))

    def tell_changes(self, began: dict | None):
        """Prints which settings differ from those that the run began with, as far as these are known."""
        began = began or {}
        now = {key: value for key, value in self.settings.items() if key in began}  # without keys that kit has added since
        for change in differences(began, now):
            rank_zero_info(f"  resumes with other data than it began with (then, now): {change}")


def check_videos(data: ClipDataModule):
    """Checks that the data holds videos.

    Raises:
        ValueError: if it holds encoded clips, from a cache.
    """
    if data.cached:
        raise ValueError(f"{data.val.name} holds encoded clips; give the videos they are of: data=clips data.root=DIR")
