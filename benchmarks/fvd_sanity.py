"""Checks that FVD grows with damage: compares real clips, degraded in known ways, with other real clips.

    python benchmarks/fvd_sanity.py DIR I3D_WEIGHTS

One JSON line for each way; mean and standard deviation over three random choices of 40 and 40 clips, 16 frames each.
"""

from __future__ import annotations

import json
import statistics
import sys

import torch
import torch.nn.functional as F
from tqdm import tqdm

from kit.data.clips import FolderClips
from kit.evaluation.clips import choose
from kit.evaluation.detectors import load_i3d
from kit.evaluation.frechet import Gaussian, frechet_distance

FRAMES, CLIPS, SEEDS = 16, 40, 3


def spoil(clips: torch.Tensor, rng: torch.Generator) -> dict[str, torch.Tensor]:
    """Returns degraded versions of clips (n, 3, T, H, W) in [-1, 1], from none to strong."""
    orders = [torch.randperm(clips.shape[2], generator=rng) for _ in clips]
    frames = clips.transpose(1, 2).flatten(0, 1)
    blurred = F.interpolate(F.avg_pool2d(frames, 8), scale_factor=8, mode="bilinear").unflatten(0, (len(clips), -1))
    return {
        "nothing": clips,
        "frames shuffled": torch.stack([clip[:, order] for clip, order in zip(clips, orders)]),
        "first frame frozen": clips[:, :, :1].expand_as(clips),
        **{f"noise of {sd} added": (clips + sd * torch.randn(clips.shape, generator=rng)).clamp(-1, 1) for sd in (0.1, 0.3)},
        "blurred by 8 pixels": blurred.transpose(1, 2),
    }


def gaussian(detector, clips: torch.Tensor) -> Gaussian:
    result = Gaussian(detector.size)
    result.add(detector(clips))
    return result


def main(folder: str, weights: str):
    source, detector = FolderClips(folder, "all", frames=FRAMES), load_i3d(weights)
    found: dict[str, list[float]] = {}
    for seed in tqdm(range(SEEDS), unit="choice"):
        choices = choose(source.files, 2 * CLIPS, "random", False, seed, 0)
        clips = torch.stack([source.clip(*choice).video for choice in choices])
        real = gaussian(detector, clips[CLIPS:])
        for name, spoilt in spoil(clips[:CLIPS], torch.Generator().manual_seed(seed)).items():
            found.setdefault(name, []).append(frechet_distance(gaussian(detector, spoilt), real))
    for name, values in found.items():
        mean, spread = round(statistics.fmean(values), 1), round(statistics.stdev(values), 1)
        about = {"clips": CLIPS, "detector": detector.sha256[:16], "torch": torch.__version__}
        print(json.dumps({"spoilt": name, "fvd": mean, "sd": spread, **about}))


if __name__ == "__main__":
    main(*sys.argv[1:])
