"""Measures what each choice in the tokenizer is worth: one changed at a time, three seeds, on `shapes` and on real clips.

    python benchmarks/ablation_tokenizer.py FOLDER REAL ST_LPIPS [key=value ...]

REAL holds `train` and `val`, folders of clips; ST_LPIPS is the file of that network's weights (docs/evaluation.md). Trains
and evaluates in FOLDER, where a stopped benchmark continues, and prints one JSON line for each run. The words go to all runs.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from kit.evaluation.detectors import load_i3d
from runs import kit

SEEDS = 3
STEPS = 150
CLIPS = 32  # that are evaluated
VARIANTS = {
    "default": [],
    "amplitude=null": ["tokenizer.amplitude=null"],
    "learned_amplitude": ["tokenizer.learned_amplitude=true"],
    "no entropy loss": ["loss.entropy_weight=0"],
    "entropy .1 to 0": ["loss.entropy_weight=0.1", "loss.entropy_weight_end=0"],
    "scale dropout": ["scale_dropout.last=2", "scale_dropout.p=0.1"],
    "scale_bits": ["tokenizer.scale_bits=[4,8,16,16]"],
}


def measure(folder: Path, data: str, variant: str, seed: int, real: Path, lpips: Path, words: list[str]) -> dict:
    """Returns the scores on held-out clips of a tokenizer, which is trained unless it was before."""
    name = f"{data}_{variant.replace(' ', '_').replace('=', '_')}_{seed}"
    result = folder / f"{name}_scores" / "evaluation.json"
    if not result.exists():
        train_and_score(folder, name, data, variant, seed, real, lpips, words)
    found = json.loads(result.read_text())
    values = {metric: round(score["value"], 4) for metric, score in found["metrics"].items() if "value" in score}
    return {"protocol": "{name}@{hash}".format(**found["protocol"]), **values}


def train_and_score(folder: Path, name: str, data: str, variant: str, seed: int, real: Path, lpips: Path, words: list[str]):
    """Runs `fit`, which continues a stopped training, and `evaluate`."""
    source = {"shapes": [], "real": ["data=clips", f"data.root={real / 'train'}", "data.source.val_every=1000"]}[data]
    brief = [f"recipe.tokenizer.steps={STEPS}", f"trainer.val_check_interval={STEPS}", "callbacks.compile.least_steps=-1"]
    quiet = ["callbacks.video_logger.clips=0", "data.val_clips=8", "callbacks.last.every=50"]
    run = ["conf=stage1_tokenizer", "size=tiny", f"root={folder}", f"name={name}", "ckpt=last", f"seed={seed}"]
    kit("fit", *run, *brief, *quiet, *source, *VARIANTS[variant], *words)
    clips = {"shapes": ["protocol=shapes"], "real": ["protocol=folder", f"real={real / 'val'}", "protocol.real.start=random"]}
    scored = [f"ckpt={folder / name}/checkpoints/last.ckpt", f"root={folder}", f"name={name}_scores", *clips[data]]
    same = [f"protocol.real.clips={CLIPS}", "protocol.samples=null", "protocol.folds=1", "protocol.seed=0"]
    size = ["protocol.frames=17", "protocol.height=64", "protocol.width=64"]
    metric = ["protocol.perceptual.kind=st-lpips", "protocol.perceptual.sha256=null", f"lpips_weights={lpips}"]
    kit("evaluate", *scored, *same, *size, *metric, "workers=0")


def main(folder: Path, real: Path, lpips: Path, *words: str):
    load_i3d()  # rFVD needs it, which is no news for after a training
    for seed in range(SEEDS):
        for data in ("shapes", "real"):
            for variant in VARIANTS:
                found = measure(folder, data, variant, seed, real, lpips, list(words))
                print(json.dumps({"data": data, "variant": variant, "seed": seed, **found}), flush=True)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]), *sys.argv[4:])
