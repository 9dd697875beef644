"""Scores of clips, taken as the clips pass: each adds batches, keeps its state as plain values, and gives a result.

`add` returns an error for each clip, by which the best, the median and the worst are found; `state` and `load` let an
interrupted evaluation continue, to the same last digit.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable

import torch
from torch import Tensor

from kit.evaluation.detectors import Detector
from kit.evaluation.frechet import Nested
from kit.evaluation.shapes_score import caption_hits
from kit.machine import device
from kit.perceptual import Perceptual
from kit.pixels import ssim

LEAST_ERROR = 4e-10  # mean squared error of 100 dB in [-1, 1], a floor: the PSNR of equal pictures is infinite


def decibel(error: Tensor) -> Tensor:
    """PSNR in dB from the mean squared error of pixels in [-1, 1]."""
    return -10 * (error.clamp_min(LEAST_ERROR) / 4).log10()


def by_frame(values: Tensor) -> dict:
    """Means of values (N, T), one for each clip and frame: of all, of the first and the later frames, of each frame."""
    means = values.mean(dim=0)
    return {"value": means.mean().item(), **apart(means), "by_frame": means.tolist()}


def apart(frames: Tensor) -> dict:
    """The value of the first frame, which is coded alone, and the mean of the later ones, from values (T,)."""
    return {"first_frame": frames[0].item(), **({"later_frames": frames[1:].mean().item()} if len(frames) > 1 else {})}


class FrechetScore:
    """Fréchet distance of clips from real ones.

    Args:
        total: number of clips to come. real: the statistics of the real clips; None while those are gathered.
    """

    def __init__(self, detector: Detector, total: int, real: Nested | None = None):
        self.detector, self.real, self.nested = detector, real, Nested(total, detector.size)

    def add(self, clips: Tensor, batch: dict) -> list[float]:
        features = self.detector(clips)
        for name, feature in zip(batch["name"], features):
            try:
                self.nested.add(feature[None])
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
        if self.real is None:
            return [0.0] * len(clips)
        return (features.double() - self.real.all.mean).norm(dim=1).tolist()

    def state(self) -> dict:
        return self.nested.state()

    def load(self, state: dict):
        self.nested = Nested.from_state(state)

    def result(self) -> dict:
        at = self.nested.distances(self.real)
        return {"value": at["N"], "at": at}


class FrameScore(ABC):
    """Score of each frame of clips against the same frame of `batch["real"]`.

    Attributes: values, (N, T), as plain numbers: small tensors, kept among large ones that come and go, would fragment the
    heap.
    """

    def __init__(self):
        self.values: list[list[float]] = []

    @abstractmethod
    def measure(self, frames: Tensor, real: Tensor) -> Tensor:
        """Compares frames with real ones, (n, 3, H, W) in [-1, 1] each: (n,)."""

    def add(self, clips: Tensor, batch: dict) -> list[float]:
        added = [self.measure(c.transpose(0, 1), r.transpose(0, 1)).tolist() for c, r in zip(clips, batch["real"])]
        for name, values in zip(batch["name"], added):
            if not all(map(math.isfinite, values)):
                raise ValueError(f"{name}: {type(self).__name__} is not finite: look at the weights it is measured with")
        self.values += added
        return [sum(values) / len(values) for values in added]

    def state(self) -> dict:
        return {"values": list(self.values)}

    def load(self, state: dict):
        self.values = list(state["values"])

    def result(self) -> dict:
        return by_frame(torch.tensor(self.values, dtype=torch.float64))


class PSNR(FrameScore):
    """Peak signal-to-noise ratio in dB; `values` are mean squared errors."""

    def measure(self, frames: Tensor, real: Tensor) -> Tensor:
        return (frames.double() - real.double()).square().mean(dim=(1, 2, 3))

    def result(self) -> dict:
        errors = torch.tensor(self.values, dtype=torch.float64)  # (N, T)
        parts = {"value": errors, "first_frame": errors[:, :1], "later_frames": errors[:, 1:]}
        means = {name: decibel(part.mean(dim=1)).mean().item() for name, part in parts.items() if part.numel()}
        return {**means, "by_frame": decibel(errors).mean(dim=0).tolist()}


class SSIM(FrameScore):
    """Structural similarity, 1 for equal frames."""

    def measure(self, frames: Tensor, real: Tensor) -> Tensor:
        return ssim(frames, real)

    def add(self, clips: Tensor, batch: dict) -> list[float]:
        return [1 - likeness for likeness in super().add(clips, batch)]


class LPIPS(FrameScore):
    """Learned perceptual distance, frame by frame."""

    def __init__(self, network: Perceptual):
        super().__init__()
        self.network = network.to(device())

    @torch.inference_mode()
    def measure(self, frames: Tensor, real: Tensor) -> Tensor:
        return self.network(frames.to(device()), real.to(device()))

    def result(self) -> dict:
        return {**super().result(), "name": self.network.name}


class CaptionScore:
    """Share of clips of `shapes` that show what their captions say, for whole clips and by frame, which shows drift.

    Motion cannot be seen in a frame: it is read from whole clips only.
    """

    def __init__(self, fps: float):
        self.fps, self.whole, self.frames = fps, [], []

    def add(self, clips: Tensor, batch: dict) -> list[float]:
        errors = []
        for clip, caption in zip(clips.cpu(), batch["caption"]):
            hits = caption_hits(clip, caption, self.fps)
            self.whole.append(hits)
            frames = [caption_hits(clip[:, t : t + 1], caption, self.fps) for t in range(clip.shape[1])]
            self.frames.append([{k: v for k, v in f.items() if k not in ("motion", "all")} for f in frames])
            errors.append(sum(not hit for hit in hits.values()))
        return errors

    def state(self) -> dict:
        return {"whole": list(self.whole), "frames": list(self.frames)}

    def load(self, state: dict):
        self.whole, self.frames = list(state["whole"]), list(state["frames"])

    def result(self) -> dict:
        share = {name: _share(hits.get(name) for hits in self.whole) for name in self.whole[0]}
        names, times = self.frames[0][0], range(len(self.frames[0]))
        drift = {name: [_share(frames[t][name] for frames in self.frames) for t in times] for name in names}
        return {"value": share.pop("all"), **share, "by_frame": drift}


def _share(hits: Iterable[bool | None]) -> float:
    known = [hit for hit in hits if hit is not None]
    return sum(known) / len(known)


Score = FrechetScore | FrameScore | CaptionScore
