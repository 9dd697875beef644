"""Candidates to score: a tokenizer's reconstructions, a generator's samples, or given videos."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from kit.checkpoint import Loaded
from kit.data.clips import FolderClips
from kit.evaluation.clips import DrawnClips, FileClips, Together, Words, fingerprint, given_clips
from kit.evaluation.protocol import Protocol
from kit.generator.sampler import Sampling
from kit.machine import autocast, device
from kit.sampling import seed_of, stream_samples
from kit.scales import whole_groups
from kit.tokenizer.streaming import pad_to


class Clips:
    """Clips to score, as they are in the batches of a data set.

    Attributes:
        row: what one of them is called. paired: whether each has its real clip. one_size: whether all must have the same
            number of pixels before they are resized.
    """

    row = "clip"
    paired = False
    one_size = False

    def make(self, batch: dict) -> Tensor:
        """Returns the clips of a batch, (n, 3, T, H, W) in [-1, 1] on the CPU."""
        return batch["video"]


class RealClips(Clips):
    """The real clips themselves."""

    row = "real"


class Candidate(Clips, ABC):
    """What a protocol compares with real clips.

    Attributes:
        distance: what its Fréchet distance is called. captioned: whether the clips show what the captions of real ones say.
        path: where it lies.
    """

    distance = "fvd"
    captioned = True
    path: Path

    @abstractmethod
    def about(self) -> dict:
        """Returns plain values that decide how the clips look; where a checkpoint lies is not among them."""

    @abstractmethod
    def dataset(self, protocol: Protocol, real: FileClips | DrawnClips, fold: int) -> Dataset:
        """Returns what the clips of a fold are made from; item n is for clip n."""


@dataclass(frozen=True)
class Reconstructions(Candidate):
    """Real clips, encoded and decoded by a tokenizer.

    A length that is not 1 + 4n is padded by the last frame, and cut back.
    """

    tokenizer: Loaded
    precision: str
    row = "reconstruction"
    paired = True
    distance = "rfvd"

    def about(self) -> dict:
        return {"kind": "tokenizer", "hash": self.tokenizer.hash, "steps": self.tokenizer.steps, "precision": self.precision}

    @property
    def path(self) -> Path:
        return self.tokenizer.path

    def dataset(self, protocol: Protocol, real: FileClips | DrawnClips, fold: int) -> Dataset:
        return real

    def make(self, batch: dict) -> Tensor:
        video = batch["video"]
        frames = video.shape[2]
        padded = pad_to(video, whole_groups(frames), *video.shape[3:])
        padded = padded if len(padded) > 1 else padded.expand(2, -1, -1, -1, -1)  # see `stream_samples`
        with autocast(self.precision):
            output = self.tokenizer.model.to(device()).reconstruct(padded.to(device()))
        return output.float().cpu()[: len(video), :, :frames]


@dataclass(frozen=True)
class Samples(Candidate):
    """A generator's samples for the captions or classes of the real clips, in their order, each with a seed of its own.

    Args:
        shape: (T, H, W) of the clips that are scored.
    """

    generator: Loaded
    tokenizer: Loaded
    sampling: Sampling
    precision: str
    shape: tuple[int, int, int]
    row = "sample"

    @property
    def captioned(self) -> bool:
        return self.generator.model.config.condition.kind == "text"

    def about(self) -> dict:
        return {
            "kind": "generator", "hash": self.generator.hash, "steps": self.generator.steps,
            "tokenizer_hash": self.tokenizer.hash, **asdict(self.sampling), "precision": self.precision,
        }  # fmt: skip

    @property
    def path(self) -> Path:
        return self.generator.path

    def dataset(self, protocol: Protocol, real: FileClips | DrawnClips, fold: int) -> Dataset:
        return Seeded(Words(real, protocol.samples), (protocol.seed, fold))

    def make(self, batch: dict) -> Tensor:
        return self.sample(self.generator.model.condition.prompts(batch), batch["seed"].tolist())

    def sample(self, prompts: list[str], seeds: list[int]) -> Tensor:
        """Samples a clip for each prompt: (n, 3, T, H, W) in [-1, 1] on the CPU."""
        size = (whole_groups(self.shape[0]), *self.shape[1:])
        pieces = stream_samples(self.generator, self.tokenizer, prompts, seeds, size, self.sampling, self.precision)
        return torch.cat(list(pieces), dim=2)[:, :, : self.shape[0]]


class Seeded(Dataset):
    """Adds a `seed` to each item, derived from `place` and the item's number."""

    def __init__(self, items: Dataset, place: tuple[int, int]):
        self.items, self.place = items, place

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, n: int) -> dict:
        return {**self.items[n], "seed": seed_of(*self.place, n)}


@dataclass(frozen=True)
class GivenVideos(Candidate):
    """Videos of a folder, all of one size.

    Args:
        paired: whether each belongs to the real clip of the same file name.
    """

    source: FolderClips
    paired: bool
    row = "video"
    one_size = True
    captioned = False

    def about(self) -> dict:
        return {"kind": "videos", "files": fingerprint(self.source), "paired": self.paired}

    @property
    def path(self) -> Path:
        return Path(self.source.root)

    def dataset(self, protocol: Protocol, real: FileClips | DrawnClips, fold: int) -> Dataset:
        clips = given_clips(protocol, self.source, fold)
        return Together(clips, real) if self.paired else clips
