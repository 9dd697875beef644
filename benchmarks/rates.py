"""Compares the quality of tokenizers of several bit rates on real clips with JPEG at the same bits per frame.

    python benchmarks/rates.py FOLDER REAL [steps=400] [only=4x8x8,32] [picture=FILE.png] [words of fit ...]

REAL holds `train` and `val`, folders of clips: 17 frames, shorter side 128, the middle of each file of `val`. Trains
`size=small` with Muon in FOLDER, where a stopped benchmark continues, and prints one JSON line for each rate. Only JPEG's
entropy-coded data counts as its bits: headers, and the tables fitted to each frame, are left out in its favour.
"""

from __future__ import annotations

import io
import json
import os
import re
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from kit.checkpoint import load_tokenizer
from kit.data.clips import FolderClips
from kit.media import contact_sheet, to_uint8
from kit.pixels import from_bytes, psnr, ssim, to_8_bits
from runs import kit, parted

RATES = [(latent, bits) for latent in ("4x16x16", "4x8x8") for bits in (16, 32, 48)]
FRAMES, SIDE, FPS = 17, 128, 25
RECIPE = {"optimizer": "muon", "lr": 3e-3, "warmup": 40, "batch_size": 4}


def train(folder: Path, real: Path, latent: str, bits: int, steps: int, more: list[str]) -> Path:
    """Finishes a training of stage 1 with the user's words `more`, and returns its checkpoint."""
    name = "_".join([latent, str(bits), str(steps), *(re.sub(r"[^\w.]+", "-", word) for word in more)])
    data = ["data=clips", f"data.root={real / 'train'}", "data.source.val_every=1000", "data.val_clips=4"]
    augmented = ["data.source.flip=true", "data.source.random_crop=true"]
    recipe = [f"recipe.tokenizer.{key}={value}" for key, value in {**RECIPE, "steps": steps}.items()]
    run = ["conf=stage1_tokenizer", "size=small", f"rate={latent}", f"tokenizer.bits={bits}", f"root={folder}"]
    words = [*run, f"name={name}", "ckpt=last", *data, *augmented, *recipe, f"trainer.val_check_interval={steps}", *more]
    kit("fit", *words)
    return folder / name / "checkpoints" / "last.ckpt"


def scan_bits(jpeg: bytes) -> int:
    """Counts the bits of the entropy-coded data of a baseline JPEG file."""
    start = jpeg.index(b"\xff\xda")
    return 8 * (len(jpeg) - start - 2 - int.from_bytes(jpeg[start + 2 : start + 4], "big") - 2)


def jpeg_clip(video: Tensor, quality: int) -> tuple[float, Tensor]:
    """Returns the mean bits of a frame as JPEG, and the decoded clip (3, T, H, W) in [-1, 1]."""
    bits, shown = [], []
    for frame in to_uint8(video):
        file = io.BytesIO()
        Image.fromarray(frame).save(file, "JPEG", quality=quality, optimize=True)
        bits.append(scan_bits(file.getvalue()))
        shown.append(np.asarray(Image.open(file)))
    pixels = torch.from_numpy(np.stack(shown)).permute(3, 0, 1, 2)
    return float(np.mean(bits)), from_bytes(pixels)


def jpeg_at(video: Tensor, bits: float) -> tuple[float, Tensor]:
    """Returns the PSNR in dB of a clip (3, T, H, W) as JPEG at `bits` a frame, and the decoded clip.

    The PSNR is interpolated between the two qualities around `bits`, the clip is that of the lower one. If the lowest quality
    takes more than `bits`, both are of that quality.
    """
    points, worse = [], None
    for quality in range(1, 96):
        used, shown = jpeg_clip(video, quality)
        points.append((used, psnr(shown[None], video[None]).item()))
        if used > bits:
            break
        worse = shown
    return float(np.interp(bits, *zip(*points))), shown if worse is None else worse


def main(folder: Path, real: Path, steps: int, only: str, picture: str, words: list[str]):
    rates = [rate for rate in RATES if not only or only == f"{rate[0]},{rate[1]}"]
    if not rates:
        raise SystemExit(f"only={only}; expected one of {', '.join(f'{latent},{bits}' for latent, bits in RATES)}")
    clips = FolderClips(real / "val", "all", frames=FRAMES, height=SIDE, width=SIDE, fps=0)
    video = torch.stack([clips[n]["video"] for n in range(len(clips.files))])
    for latent, bits in rates:
        tokenizer = load_tokenizer(train(folder, real, latent, bits, steps, words)).model
        with torch.no_grad():
            output = to_8_bits(torch.cat([tokenizer.reconstruct(v[None]) for v in video]))
        schedule = tokenizer.schedule_of(video)
        spent = int(schedule.used_bits(bits)[: schedule.tokens_per_frame].sum())  # bits of a latent frame
        pictures, truth = (x.transpose(1, 2).flatten(0, 1) for x in (output, video))
        jpeg = [jpeg_at(v, spent * schedule.latent_frames / FRAMES) for v in video]
        found = {
            "rate": latent, "d": bits, "words": words, "tokens": schedule.tokens_per_frame, "bits_per_latent_frame": spent,
            "kbit_per_s": round(spent * FPS / 4 / 1000, 1), "psnr": round(psnr(output, video).item(), 2),
            "ssim": round(ssim(pictures, truth).mean().item(), 4),
            "jpeg_psnr": round(float(np.mean([value for value, _ in jpeg])), 2), "iterations": steps, "clips": len(video),
            "parameters_M": round(sum(p.numel() for p in tokenizer.parameters()) / 1e6, 1),
            "by_clip": [round(psnr(o[None], v[None]).item(), 2) for o, v in zip(output, video)],
            "cpus": os.cpu_count(), "torch": torch.__version__,
        }  # fmt: skip
        print(json.dumps(found), flush=True)
        if picture:
            groups = [{"real": v, "kit": o, "JPEG": j} for v, o, (_, j) in zip(video, output, jpeg)]
            contact_sheet(groups, [Path(name).stem for name in clips.files], picture, height=SIDE)


if __name__ == "__main__":
    given, words = parted(tuple(sys.argv[3:]), "steps", "only", "picture")
    steps, only, picture = int(given.get("steps", 400)), given.get("only", ""), given.get("picture", "")
    main(Path(sys.argv[1]), Path(sys.argv[2]), steps, only, picture, words)
