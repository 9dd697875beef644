"""Evaluation protocols: everything besides the model that a number depends on. No number leaves kit without its protocol."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property

from kit.values import check_choice, check_whole_number, hash_of

STARTS = ("first", "middle", "random")
SOURCES = ("folder", "ucf101", "shapes")

# Conventions of every protocol of kit, part of its hash: a change here makes new results incomparable with old ones.
CONVENTIONS = {
    "version": 2,
    "given": "given videos are taken from their first frames",
    "resize": "before the model, each frame to cover the size, bilinear, antialiased, 8 bits, then cut in the centre",
    "pixels": "clips are scored as 8-bit pixels in [-1, 1]",
    "detector_input": "each frame bilinear to the detector's size, antialiased",
    "frechet": "float64, unbiased covariance",
    "psnr": "of a clip from its mean squared error, then the mean over clips; by frame likewise; at most 100 dB",
    "ssim": "of each frame in [0, 1], Gaussian window of 11 pixels and sigma 1.5, edges reflected, then the mean",
    "lpips": "version 0.1, of each frame, then the mean",
    "prompts": "sample n is for the caption or class of real clip n, modulo their number",
}


@dataclass(frozen=True)
class Real:
    """The choice of real clips.

    Args:
        kind: `folder`, `ucf101` or `shapes`. split: `train`, `val` (UCF-101: the test list) or `all`.
        clips: number of clips; None: each file once.
        start: where a clip begins in its file: `first`, `middle`, or `random`, which may use a file more than once.
        random_crop: crop anywhere instead of in the centre.
        val_every: 5 holds out every fifth file of a folder. official: number of UCF-101's split.
        backend: decoder. seed: of the order, the starts and the crops, or of the drawn `shapes`.
    """

    kind: str
    split: str = "all"
    clips: int | None = None
    start: str = "middle"
    random_crop: bool = False
    val_every: int = 5
    official: int = 1
    backend: str = "decord"
    seed: int = 0

    def __post_init__(self):
        for key, choices in (("kind", SOURCES), ("start", STARTS), ("split", ("train", "val", "all"))):
            check_choice(f"protocol.real.{key}", getattr(self, key), choices)
        if self.kind == "shapes" and self.split == "all":
            raise ValueError("protocol.real.split='all'; shapes are drawn for `train` or `val`")
        if self.kind == "shapes" and (self.start, self.random_crop) != ("first", False):  # the protocol would say what is not
            raise ValueError(
                "shapes are drawn, each from its start and whole: say protocol.real.start=first, without random_crop"
            )
        check_whole_number("protocol.real.clips", self.clips, 2, optional=True)
        for key, least in (("val_every", 2), ("official", 1), ("seed", 0)):
            check_whole_number(f"protocol.real.{key}", getattr(self, key), least)

    @property
    def drawn_anew(self) -> bool:
        """Whether the real clips differ from fold to fold."""
        return self.kind == "shapes" or self.start == "random" or self.random_crop


@dataclass(frozen=True)
class Network:
    """A metric network: its kind and the first digits of its weight file's sha256, or None if any weights will do."""

    kind: str
    sha256: str | None = None


@dataclass(frozen=True)
class Protocol:
    """An evaluation protocol.

    Args:
        frames: T, frames of a clip that are scored. height, width: pixels. fps: frames per second; 0: each file's own.
        samples: number of clips made or given in each fold; None: as many as real ones.
        folds: number of repetitions, each with other random clips and other samples. seed: of the samples.
        detector: network of the Fréchet distance. perceptual: `lpips` or `st-lpips`.
        fingerprint: of names, contents and captions of the real files; filled in when they are known.
    Raises:
        ValueError: for a value that makes no sense, with its key.
    """

    name: str
    real: Real
    frames: int
    height: int
    width: int
    fps: float
    samples: int | None
    folds: int
    seed: int
    detector: Network
    perceptual: Network
    fingerprint: str | None = None
    conventions: dict = field(default_factory=lambda: dict(CONVENTIONS))

    def __post_init__(self):
        for key, least in {"frames": 1, "height": 16, "width": 16, "folds": 1, "seed": 0}.items():
            check_whole_number(f"protocol.{key}", getattr(self, key), least)
        check_whole_number("protocol.samples", self.samples, 2, optional=True)
        if not isinstance(self.fps or 0, int | float) or not 0 <= (self.fps or 0) < math.inf:
            raise ValueError(f"protocol.fps={self.fps}; expected frames per second, or 0 for each file's own")
        for key, sha256 in (("detector", self.detector.sha256), ("perceptual", self.perceptual.sha256)):
            if not isinstance(sha256, str | None):  # digits alone, or with an e, are read as a number
                raise ValueError(
                    f"protocol.{key}.sha256={sha256} is a number, expected a text or null; put it in quotes twice: "
                    f"\"protocol.{key}.sha256='...'\""
                )
        object.__setattr__(self, "fps", float(self.fps or 0))  # one spelling, one hash

    @classmethod
    def from_dict(cls, values: dict) -> Protocol:
        """Builds a protocol from plain values, such as `as_dict` gives.

        Raises:
            ValueError: also for a key that no protocol has.
        """
        values = {key: value for key, value in values.items() if key != "hash"}
        try:
            parts = {"real": Real(**values["real"])}
            parts |= {key: Network(**values[key]) for key in ("detector", "perceptual")}
            return cls(**{**values, **parts})
        except TypeError as error:
            raise ValueError(f"protocol {values.get('name')!r}: {error}; see `python -m kit evaluate --help`") from error

    def as_dict(self) -> dict:
        """Plain values, with the hash over all of them."""
        return {**asdict(self), "hash": self.hash}

    @cached_property
    def hash(self) -> str:
        """12 hex digits; results may be compared if they have the same."""
        return digest(asdict(self))[:12]

    def real_hash(self, fold: int, detector: str | None) -> str:
        """Hash of all that the statistics of a fold's real clips depend on.

        Args:
            detector: hash of the detector's weights, or the name of a score that needs none.
        """
        parts = (asdict(self.real), self.frames, self.height, self.width, self.fps, self.fingerprint, self.conventions)
        return digest([*parts, fold if self.real.drawn_anew else 0, detector])[:24]

    def resolved(self, **values) -> Protocol:
        """Returns a copy with values that are known only when the data is."""
        return replace(self, **values)

    def __str__(self) -> str:
        clips = f"{self.real.clips} clips of {self.real.kind} {self.real.split}"
        clips += f" ({self.real.start} start{', random crop' if self.real.random_crop else ''}, files {self.fingerprint})"
        detector = f"{self.detector.kind} {(self.detector.sha256 or 'any')[:8]}"
        rate = f"{self.fps:g}" if self.fps else "their own"
        return (
            f"{self.name}@{self.hash}: {self.samples} against {clips}, {self.frames} frames of {self.height} x {self.width} "
            f"(resized and cut before the model) at {rate} fps, {self.folds} fold{'s' * (self.folds > 1)}, seed {self.seed}, "
            f"detector {detector}, {self.perceptual.kind}"
        )


def digest(values) -> str:
    """sha256 of plain values, independent of the order of their keys."""
    return hash_of([json.dumps(values, sort_keys=True)], 64)
