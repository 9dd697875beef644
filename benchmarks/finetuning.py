"""Measures fine-tuning on a user's captioned clips: whether samples show the clip that their prompt names.

    python benchmarks/finetuning.py FOLDER CLIPS TOKENIZER GENERATOR [names=64] [picture=FILE.png] [key=value ...]

CLIPS is a folder with captions, such as `python -m kit prepare fluent_emoji` makes; TOKENIZER and GENERATOR are the
checkpoints to start from, such as the demo's. Runs the three commands of docs/finetuning.md in FOLDER, where a stopped
benchmark continues; further words go to both trainings. Then finds the clips nearest to each sample, by comparing small time
averages. Prints one JSON line: how often the named clip is the nearest, and among the five nearest (by chance: 1 and 5 of all
clips), and the same for reconstructions of the clips, the best that the tokenizer allows.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from kit.checkpoint import load_generator
from kit.data.clips import FolderClips
from kit.generator.guidance import Guidance
from kit.generator.sampler import Sampling
from kit.measures import reconstruct_batches
from kit.media import contact_sheet
from kit.sampling import sample_videos
from runs import kit, parted

SIDE = 16  # pixels of the averages
SHOWN = 12
HOW = Sampling(guidance=Guidance("constant", 2.0), temperature=0.7)  # conf/sampling.yaml


def tune(stage: str, folder: Path, name: str, clips: str, start: str, words: list[str]) -> Path:
    """Finishes a training that starts from given weights, and returns its checkpoint."""
    data = ["data=clips", f"data.root={clips}", "data.source.val_every=100"]
    run = [f"conf={stage}", "size=tiny", f"root={folder}", f"name={name}", "ckpt=last", "init=weights", f"init.ckpt={start}"]
    kit("fit", *run, *data, *words)
    return folder / name / "checkpoints" / "last.ckpt"


def small(videos: Tensor) -> Tensor:
    """Averages videos (n, 3, T, H, W) over time and reduces them to vectors (n, 3 * SIDE * SIDE)."""
    return F.interpolate(videos.mean(2), (SIDE, SIDE), mode="area").flatten(1)


def nearest(videos: Tensor, clips: Tensor, names: list[int]) -> dict[str, float]:
    """Returns the share of videos whose own clip, given by `names`, is the nearest of all, and among the five nearest."""
    order = torch.cdist(small(videos), small(clips)).argsort(dim=1)[:, :5]
    right = order == torch.tensor(names)[:, None]
    return {"top1": round(right[:, 0].float().mean().item(), 3), "top5": round(right.any(1).float().mean().item(), 3)}


def main(folder: Path, clips: str, tokenizer: str, generator: str, *words: str):
    chosen, rest = parted(words, "names", "picture")
    codec = tune("stage1_tokenizer", folder, "tokenizer", clips, tokenizer, rest)
    model = tune("stage2_generator", folder, "generator", clips, generator, [f"tokenizer_ckpt={codec}", *rest])
    loaded, partner = load_generator(model)
    clip = loaded.clip
    train = FolderClips(clips, "train", clip["frames"], clip["height"], clip["width"], clip["fps"], val_every=100)
    items = [train[n] for n in range(len(train.files))]  # each file once, in an order of its own
    videos, captions = torch.stack([item["video"] for item in items]), [item["caption"] for item in items]
    names = list(range(min(int(chosen.get("names", 64)), len(items))))
    asked = [captions[n] for n in names]
    size = tuple(videos.shape[2:])
    samples = sample_videos(loaded, partner, asked, names, size, HOW, "float32", 16)
    again = reconstruct_batches(partner, videos[: len(names)], 16)
    if "picture" in chosen:
        rows = zip(videos, again, samples)
        groups = [{"real": v, "reconstruction": r, "sample": s} for v, r, s in rows][:SHOWN]
        contact_sheet(groups, asked[:SHOWN], Path(chosen["picture"]))
    counts = {"clips": len(items), "names": len(names)}
    found = {"samples": nearest(samples, videos, names), "reconstructions": nearest(again, videos, names)}
    print(json.dumps({**counts, **found, "words": rest, "torch": torch.__version__}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
