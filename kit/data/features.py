"""Clips encoded once, ahead of the generator's training, so that its steps neither draw, decode nor encode."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

from kit.files import load_checked, save_checked
from kit.machine import device, inference_precision
from kit.tokenizer import Tokenizer


class EncodedClips(Dataset):
    """Items {"feature": (d, F, h, w) float16, "caption": str, "label": int}, numbered from 0 without end: they repeat.

    Args:
        features: (N, d, F, h, w) of `Tokenizer.encode`. captions, labels: N each.
    """

    def __init__(self, features: Tensor, captions: list[str], labels: list[int]):
        self.features, self.captions, self.labels = features, captions, labels

    def __getitem__(self, n: int) -> dict:
        n %= len(self.captions)
        return {"feature": self.features[n], "caption": self.captions[n], "label": self.labels[n]}


def encode_clips(source: Dataset, tokenizer: Tokenizer, clips: int, workers: int, path: Path, about: dict) -> EncodedClips:
    """Features of clips 0 to `clips` - 1 of a source, kept in a file and taken from it the next time.

    Args:
        about: plain values that say what the clips are, and of which tokenizer; a file about others is replaced.
    Raises:
        ValueError: if there are fewer clips than one.
    """
    if clips < 1:
        raise ValueError(f"encoded_clips={clips}; expected a number of clips, or 0 for fresh ones")
    about = json.loads(json.dumps({**about, "clips": clips}))
    if path.exists():
        kept = load_checked(path)
        if kept.pop("about") == about:
            return EncodedClips(**kept)
    model = tokenizer.to(device()).eval()
    features, captions, labels = [], [], []
    loader = DataLoader(Subset(source, range(clips)), batch_size=16, num_workers=workers)
    with torch.no_grad(), tqdm(total=clips, desc="encode", unit="clip", disable=None) as bar:
        for batch in loader:
            with inference_precision():
                feature = model.encode(batch["video"].to(device()))
            features.append(feature.half().cpu())
            captions += batch["caption"]
            labels += batch["label"].tolist()
            bar.update(len(features[-1]))
    kept = {"features": torch.cat(features), "captions": captions, "labels": labels}
    save_checked({**kept, "about": about}, path)
    return EncodedClips(**kept)
