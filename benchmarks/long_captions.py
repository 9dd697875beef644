"""Measures how well long samples on `shapes` match their captions, frame by frame and by kind of motion, beside real clips
and their reconstructions.

    python benchmarks/long_captions.py GENERATOR [clips=128] [frames=65] [key=value ...]     such as temperature=1

Some motions continue for ever as they began. Others do something new after some seconds: a moving shape leaves the picture
and enters again, a growing or shrinking one starts again. A generator trained on short clips has fully seen only the first
kind. Prints a JSON line for each kind: the share of clips in which a frame matches the caption, for every eighth frame.
"""

from __future__ import annotations

import json
import sys

import torch

from kit.checkpoint import load_generator
from kit.data.shapes import Shapes
from kit.evaluation.shapes_score import caption_hits
from kit.generator.sampler import Sampling
from kit.measures import reconstruct_batches
from kit.sampling import seed_of, stream_samples
from kit.values import plain
from runs import composed, parted

KINDS = {
    "goes on": ("bouncing", "circling", "standing still"),
    "leaves and returns": ("moving left", "moving right", "moving up", "moving down"),
    "starts again": ("growing", "shrinking"),
}
BATCH, EVERY = 32, 8


def readings(video: torch.Tensor, caption: str, fps: float) -> dict:
    """Returns whether single frames (colour, shape) and the whole clip (motion) match a caption, each as 0 or 1.

    Args:
        video: (3, T, H, W).
    """
    single = [caption_hits(video[:, f : f + 1], caption, fps) for f in range(0, video.shape[1], EVERY)]
    return {key: [float(hit[key]) for hit in single] for key in ("colour", "shape")} | {
        "motion": float(caption_hits(video, caption, fps)["motion"])
    }


def mean(found: list[dict]) -> dict:
    means = {key: torch.tensor([one[key] for one in found], dtype=torch.float64).mean(dim=0) for key in found[0]}
    return {key: value.round(decimals=3).tolist() for key, value in means.items()}


def main(checkpoint: str, *words: str):
    chosen, rest = parted(words, "clips", "frames")
    clips, frames = int(chosen.get("clips", 128)), int(chosen.get("frames", 65))
    how = composed("generate", rest)
    generator, tokenizer = load_generator(checkpoint)
    size = (frames, generator.clip["height"], generator.clip["width"])
    data = Shapes("val", *size, fps=generator.clip["fps"])
    found: dict[str, dict[str, list]] = {kind: {"samples": [], "reconstructions": [], "real": []} for kind in KINDS}
    for begin in range(0, clips, BATCH):
        batch = [data[n] for n in range(begin, min(begin + BATCH, clips))]
        captions, seeds = [clip["caption"] for clip in batch], [seed_of(0, 0, begin + i) for i in range(len(batch))]
        pieces = stream_samples(generator, tokenizer, captions, seeds, size, Sampling.of(plain(how)), how.precision)
        coded = reconstruct_batches(tokenizer, torch.stack([clip["video"] for clip in batch]), BATCH)
        for i, video in enumerate(torch.cat(list(pieces), dim=2)):
            motion = data.attributes(begin + i).motion
            kind = next(kind for kind, motions in KINDS.items() if motion in motions)
            for name, clip in (("samples", video), ("reconstructions", coded[i]), ("real", batch[i]["video"])):
                found[kind][name].append(readings(clip, captions[i], data.fps))
    for kind, of in found.items():
        of = {name: mean(hits) for name, hits in of.items() if hits}
        print(json.dumps({"motion": kind, "clips": len(found[kind]["real"]), "frames": frames, "words": rest, **of}))


if __name__ == "__main__":
    main(sys.argv[1], *sys.argv[2:])
