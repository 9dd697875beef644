"""Compares the built-in word table with pretrained text encoders: caption accuracy of samples, also for paraphrased prompts.

    python benchmarks/text_encoders.py FOLDER TOKENIZER [encoders=words,NAME] [seeds=0,1,2] [clips=128] [key=value ...]

Trains on `shapes` once with its captions and once with paraphrased ones, in FOLDER, where a stopped benchmark continues;
further words go to `fit`. Scores each generator on held-out combinations, with the captions and with paraphrases as prompts.
Prints a JSON line for each run.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from runs import kit, parted

PARAPHRASED = "data.source.paraphrased={}"


def scores(folder: Path, ckpt: Path, name: str, paraphrased: bool, clips: str) -> dict[str, float]:
    """Returns the caption accuracy of samples, which is measured unless it was before."""
    report = folder / name / "metrics.json"
    if not report.exists():
        kit("validate", f"ckpt={ckpt}", f"root={folder}", f"name={name}", f"clips={clips}", PARAPHRASED.format(paraphrased))
    return json.loads(report.read_text())["caption_accuracy"]


def main(folder: Path, tokenizer: str, *words: str):
    chosen, rest = parted(words, "encoders", "seeds", "clips")
    clips, asked = chosen.get("clips", "128"), {"captions": False, "paraphrases": True}
    for seed in chosen.get("seeds", "0,1,2").split(","):
        for encoder in chosen.get("encoders", "words").split(","):
            for trained, paraphrased in asked.items():
                name = f"{Path(encoder).name}_{trained}_{seed}"
                run = ["conf=stage2_generator", f"root={folder}", f"name={name}", "ckpt=last", f"seed={seed}"]
                given = [] if encoder == "words" else [f"condition.encoder={encoder}"]
                kit("fit", *run, f"tokenizer_ckpt={tokenizer}", *given, PARAPHRASED.format(paraphrased), *rest)
                ckpt = folder / name / "checkpoints" / "last.ckpt"
                found = {key: scores(folder, ckpt, f"{name}_{key}", other, clips) for key, other in asked.items()}
                print(json.dumps({"encoder": Path(encoder).name, "trained_on": trained, "seed": int(seed), **found,
                                  "words": rest}), flush=True)  # fmt: skip


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
