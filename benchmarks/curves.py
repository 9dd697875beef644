"""Records the course of a generator's training: loss, correct bits and samples at given steps.

    python benchmarks/curves.py FOLDER TOKENIZER [every=500] [clips=64] [plot=FILE.png] [key=value ...]
    python benchmarks/curves.py LINES.jsonl plot=FILE.png     # of what was printed before

Trains in FOLDER, where a stopped benchmark continues, keeps a checkpoint every `every` steps, and runs `inspect` and
`validate` on each: held-out loss as logged, share of correct bits by scale with the true history, and caption accuracy of
free samples if captions can be read from pixels. Prints one JSON line for each checkpoint. FOLDER/inspect_STEP/samples.png
shows samples beside predictions from the true history. Further words go to `fit`, those about data also to the other verbs.
The plot needs matplotlib.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from runs import kit, logged, parted

NAME = "curves"


def train(folder: Path, tokenizer: str, every: int, words: list[str]) -> list[Path]:
    """Finishes the training, and returns the checkpoints by step."""
    kept = (folder / NAME / "steps").as_posix()
    keep = (
        "+callbacks.keep={_target_: lightning.pytorch.callbacks.ModelCheckpoint, "
        f"dirpath: {kept}, filename: '{{step}}', every_n_train_steps: {every}, save_top_k: -1}}"
    )
    run = ["conf=stage2_generator", f"root={folder}", f"name={NAME}", f"tokenizer_ckpt={tokenizer}", "ckpt=last"]
    kit("fit", *run, f"trainer.val_check_interval={every}", "callbacks.video_logger.clips=0", keep, *words)
    return sorted(Path(kept).glob("step=*.ckpt"), key=step_of)


def step_of(ckpt: Path) -> int:
    return int(ckpt.stem.split("=")[1])


def look(folder: Path, ckpt: Path, clips: int, data: list[str]) -> dict:
    """Returns the results of `inspect` and `validate` for a checkpoint, which run unless they did before."""
    step = step_of(ckpt)
    for verb, report in (("inspect", "inspect.json"), ("validate", "metrics.json")):
        if not (folder / f"{verb}_{step}" / report).exists():
            kit(verb, f"ckpt={ckpt}", f"root={folder}", f"name={verb}_{step}", f"clips={clips}", *data)
    found = json.loads((folder / f"validate_{step}" / "metrics.json").read_text())
    keys = ("bit_accuracy", "bit_accuracy_by_frame", "caption_accuracy")
    return {"step": step, **{key: found[key] for key in keys if key in found}}


def draw(rows: list[dict], path: str):
    """Plots loss, correct bits and caption accuracy over steps, and FVD if rows have it."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    steps = [row["step"] for row in rows]
    panels = {
        "loss (nats per bit)": {"held-out": [row["val_loss"] for row in rows]},
        "right bits, true history": {
            f"scale {k + 1}": [row["bit_accuracy"][k] for row in rows] for k in range(len(rows[0]["bit_accuracy"]))
        },
    }
    if "training_loss" in rows[0]:
        panels["loss (nats per bit)"]["training"] = [row["training_loss"] for row in rows]
    if "caption_accuracy" in rows[0]:
        panels["free samples show what they should"] = {
            name: [row["caption_accuracy"][name] for row in rows] for name in ("colour", "background", "motion", "shape")
        }
    if "fvd" in rows[0]:
        panels["FVD of free samples"] = {"": [row["fvd"] for row in rows]}
    figure, axes = plt.subplots(1, len(panels), figsize=(4 * len(panels), 3), layout="constrained")
    for axis, (title, lines) in zip(axes, panels.items(), strict=True):
        for name, values in lines.items():
            axis.plot(steps, values, marker=".", label=name)
        axis.set_title(title)
        axis.set_xlabel("steps")
        axis.grid(alpha=0.3)
        if len(lines) > 1:
            axis.legend(fontsize=8)
    figure.savefig(path, dpi=100)


def main(folder: Path, *words: str):
    if folder.is_file():
        draw([json.loads(line) for line in folder.read_text().splitlines()], parted(words, "plot")[0]["plot"])
        return
    tokenizer, *words = words
    chosen, rest = parted(words, "every", "clips", "plot")
    data = [word for word in rest if word.startswith("data")]
    checkpoints = train(folder, tokenizer, int(chosen.get("every", 500)), rest)
    losses, rows = logged(folder / NAME, "val/loss"), []
    for ckpt in checkpoints:
        found = look(folder, ckpt, int(chosen.get("clips", 64)), data)
        rows.append({**found, "val_loss": losses.get(found["step"]), "words": rest})
        print(json.dumps(rows[-1]), flush=True)
    if "plot" in chosen:
        draw(rows, chosen["plot"])


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
