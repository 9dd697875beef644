"""Repeats the paper's ablation, with methods of ours added: trains generators on one tokenizer, one per method and seed.

    python benchmarks/ablation_generator.py FOLDER TOKENIZER [methods=standard,rope,...] [seeds=0,1,2] [key=value ...]

FOLDER keeps the runs (`conf=ablation`) and scores; a stopped benchmark continues there. TOKENIZER is a checkpoint; further
words go to `fit`, such as recipe.generator.steps=300 or data=clips data.root=DIR. Each generator is scored on held-out clips
at the length of its training and, on `shapes`, also at 65 frames by frame re-encoding: FVD, caption accuracy of clips and of
frames if captions can be read from pixels, and the share of correct bits by scale with the true history. Prints one JSON line
for each run.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from kit.evaluation.detectors import load_i3d
from runs import kit, parted

METHODS = ("standard", "rope", "flips", "inherited", "masked", "full", "center", "plus", "paper")
CLIPS, LONG_CLIPS, LONG = 64, 32, 65  # number of clips to score at each length; frames of the long ones


def scores(folder: Path, ckpt: Path, name: str, frames: int | None, data: list[str]) -> dict:
    """Evaluates samples of `frames` frames, or reads the result of an earlier evaluation."""
    result = folder / name / "evaluation.json"
    if not result.exists():
        size = [] if frames is None else [f"protocol.frames={frames}"]
        clips = CLIPS if frames is None else LONG_CLIPS
        real = ["protocol.folds=1", f"protocol.real.clips={clips}", "protocol.samples=null", "protocol.seed=0"]
        kit("evaluate", f"ckpt={ckpt}", f"root={folder}", f"name={name}", *data, *real, *size, "workers=0")
    found = json.loads(result.read_text())
    kept = {"protocol": "{name}@{hash}".format(**found["protocol"]), "fvd": round(found["metrics"]["fvd"]["value"], 1)}
    captions = found["metrics"].get("caption_accuracy", {})
    return kept | {name: value for name, value in captions.items() if name not in ("name", "value")}


def bit_accuracy(folder: Path, ckpt: Path, name: str, data: list[str]) -> dict:
    """Returns the share of correct bits by scale, and by frame and scale, with the true history."""
    report = folder / name / "inspect.json"
    if not report.exists():
        kit("inspect", f"ckpt={ckpt}", f"root={folder}", f"name={name}", *data)
    found = json.loads(report.read_text())
    return {key: found[key] for key in ("bit_accuracy", "bit_accuracy_by_frame")}


def measure(folder: Path, tokenizer: str, method: str, seed: int, words: list[str]) -> dict:
    """Finishes the training of a run, and scores it."""
    name = f"ablation_{method}_{seed}"
    ckpt = folder / name / "checkpoints" / "last.ckpt"
    run = ["conf=ablation", f"method={method}", f"seed={seed}", f"tokenizer_ckpt={tokenizer}", f"root={folder}"]
    kit("fit", *run, "callbacks.video_logger.clips=0", *words)
    given = [word for word in words if word.startswith("data")]
    root = next((word.removeprefix("data.root=") for word in given if word.startswith("data.root=")), None)
    protocol = ["protocol=shapes"] if root is None else ["protocol=weizmann", f"real={root}"]
    found = bit_accuracy(folder, ckpt, f"{name}_inspected", given)
    found["trained_length"] = scores(folder, ckpt, f"{name}_scores", None, protocol)
    if root is None:
        found["long"] = scores(folder, ckpt, f"{name}_long_scores", LONG, protocol)
    return found


def main(folder: Path, tokenizer: str, *words: str):
    load_i3d()  # FVD needs it, which is no news for after a training
    chosen, rest = parted(words, "methods", "seeds")
    for seed in map(int, chosen.get("seeds", "0,1,2").split(",")):
        for method in chosen.get("methods", ",".join(METHODS)).split(","):
            found = measure(folder, tokenizer, method, seed, rest)
            print(json.dumps({"method": method, "seed": seed, **found, "words": rest}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
