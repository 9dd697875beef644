"""Compares the PSNR of a video tokenizer over training, from scratch and inflated from an image tokenizer, with three seeds.

    python benchmarks/inflation.py FOLDER [key=value ...]     such as data=clips data.root=DIR

Trains in FOLDER, where a stopped benchmark continues, and prints one JSON line for each way: mean and standard deviation of
val/psnr (held-out clips).
"""

from __future__ import annotations

import json
import os
import statistics
import sys
from pathlib import Path

import torch

from runs import kit, logged

SEEDS, IMAGE_STEPS, STEPS, EVERY = 3, 400, 400, 50


def train(folder: Path, conf: str, name: str, steps: int, *words: str) -> Path:
    """Finishes the training of a stage, and returns its checkpoint."""
    short = [f"recipe.tokenizer.steps={steps}", f"trainer.val_check_interval={EVERY}", "callbacks.video_logger.clips=0"]
    run = [f"conf={conf}", f"root={folder}", f"name={name}", "ckpt=last", *short, *words]
    kit("fit", *run)
    return folder / name / "checkpoints" / "last.ckpt"


def main(folder: Path, *words: str):
    curves: dict[str, list[dict[int, float]]] = {"scratch": [], "inflated": []}
    for seed in range(SEEDS):
        at = [f"seed={seed}", *words]
        image = train(folder, "stage0_image_tokenizer", f"image_{seed}", IMAGE_STEPS, *at)
        train(folder, "stage1_tokenizer", f"scratch_{seed}", STEPS, *at)
        train(folder, "stage1_tokenizer", f"inflated_{seed}", STEPS, "init=inflate", f"init.ckpt={image}", *at)
        for way, found in curves.items():
            found.append(logged(folder / f"{way}_{seed}", "val/psnr"))
    for way, found in curves.items():
        mean = {step: round(statistics.fmean(c[step] for c in found), 2) for step in found[0]}
        spread = {step: round(statistics.stdev(c[step] for c in found), 2) for step in found[0]}
        row = {"start": way, "psnr_db": mean, "sd": spread, "image_steps": IMAGE_STEPS * (way == "inflated"), "words": words}
        print(json.dumps({**row, "seeds": SEEDS, "cpus": os.cpu_count(), "torch": torch.__version__}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
