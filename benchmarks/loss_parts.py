"""Finds which part of the difference between two tokenizers' reconstructions changes rFVD, on held-out clips of `shapes`.

    python benchmarks/loss_parts.py PLAIN.ckpt OTHER.ckpt

Adds each part of the difference, such as its low frequencies, to the reconstructions of PLAIN, and prints one JSON line for
each. Uses 64 clips of the tokenizers' own size, and I3D from `python -m kit prepare i3d`.
"""

from __future__ import annotations

import json
import sys

import torch
import torch.nn.functional as F
from torch import Tensor

from kit.checkpoint import Loaded, load_tokenizer
from kit.data.shapes import Shapes
from kit.evaluation.detectors import Detector, load_i3d
from kit.evaluation.frechet import Gaussian, frechet_distance
from kit.evaluation.scores import decibel
from kit.pixels import to_8_bits

CLIPS, BATCH = 64, 8
BLUR = 5  # side, in pixels, of the box filter that gives the low frequencies
MOVES, AROUND = 0.1, 5  # a pixel that differs by MOVES from its mean over time, and AROUND pixels about it, count as moving


def parts(change: Tensor, real: Tensor) -> dict[str, Tensor]:
    """Splits a change of clips (N, 3, T, H, W) in three ways into two parts that add up to it; returns name -> part."""
    frames = F.pad(change.transpose(1, 2).flatten(0, 1), (BLUR // 2,) * 4, mode="replicate")
    low = F.avg_pool2d(frames, BLUR, 1).unflatten(0, (len(change), -1)).transpose(1, 2)
    still = change.mean(2, keepdim=True).expand_as(change)
    moving = ((real - real.mean(2, keepdim=True)).abs().amax((1, 2)) > MOVES).float()  # (N, H, W), in any frame
    moving = F.max_pool2d(moving, AROUND, 1, AROUND // 2)[:, None, None]
    return {
        "all": change, "low frequencies": low, "high frequencies": change - low, "what stays over time": still,
        "what changes over time": change - still, "where something moves": change * moving,
        "elsewhere": change * (1 - moving),
    }  # fmt: skip


def reconstructions(tokenizer: Loaded, real: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([tokenizer.model.reconstruct(clips) for clips in real.split(BATCH)])


def features(detector: Detector, clips: Tensor) -> Gaussian:
    result = Gaussian(detector.size)
    for part in to_8_bits(clips).split(BATCH):
        result.add(detector(part))
    return result


def main(plain: str, other: str):
    first, second, detector = load_tokenizer(plain), load_tokenizer(other), load_i3d()
    source = Shapes("val", **first.clip)
    real = torch.stack([source[n]["video"] for n in range(CLIPS)])
    expected, ours, theirs = features(detector, real), reconstructions(first, real), reconstructions(second, real)
    for name, change in {"nothing": torch.zeros_like(real), **parts(theirs - ours, real)}.items():
        found = ours + change
        error = (found - real).square().mean(dim=(1, 2, 3, 4))
        row = {"plain": plain, "other": other, "changed": name, "rfvd": frechet_distance(expected, features(detector, found))}
        print(json.dumps({**row, "psnr": decibel(error).mean().item()}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
