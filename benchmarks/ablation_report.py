"""Reports mean and spread over seeds of the lines of benchmarks/ablation_generator.py, as tables and, if asked, a picture.

    python benchmarks/ablation_report.py LINES.jsonl [FILE.png]

The tables are Markdown; the second has the bits frame by frame, of runs that have them so. The picture needs matplotlib.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

LAST = 8  # frames at the end of a long clip that are averaged

Runs = dict[str, list[dict]]


def read(path: str) -> Runs:
    """Reads the runs of each method; of several lines for one method and seed the last counts."""
    lines = [json.loads(line) for line in Path(path).read_text().splitlines()]
    last = {(line["method"], line["seed"]): line for line in lines}
    runs: Runs = {}
    for (method, _), line in last.items():
        runs.setdefault(method, []).append(line)
    return runs


def columns(run: dict) -> dict[str, float]:
    """Returns a run's numbers by column title; shares are in percent."""
    found = bit_columns(run["bit_accuracy"])
    for name, scores in (("short", run.get("trained_length")), ("long", run.get("long"))):
        if scores:
            found[f"FVD, {name}"] = scores["fvd"]
            found |= {f"{key}, {name}": 100 * scores[key] for key in ("colour", "shape", "motion") if key in scores}
            if name == "long":
                found |= {f"{key}, its end": 100 * sum(by[-LAST:]) / LAST for key, by in drift(scores).items()}
    return found


def drift(scores: dict) -> dict[str, list[float]]:
    """Returns the accuracy of each frame by attribute, without the background, which is always right."""
    return {key: by for key, by in scores.get("by_frame", {}).items() if key != "background"}


def bit_columns(shares: list[float]) -> dict[str, float]:
    """Returns shares of right bits by scale, in percent, by column title."""
    return {f"bits, scale {k}": 100 * share for k, share in enumerate(shares, start=1)}


def table(runs: Runs) -> str:
    """Returns a Markdown table with mean and standard deviation of each number, one row per method."""
    return markdown({(method, str(len(of))): list(map(columns, of)) for method, of in runs.items()}, "method", "seeds")


def table_by_frame(runs: Runs) -> str:
    """Returns a Markdown table of the bits of each latent frame and scale, a row per method and frame; "" without them."""
    found = {}
    for method, of in runs.items():
        by_frame = [run["bit_accuracy_by_frame"] for run in of if "bit_accuracy_by_frame" in run]
        for f, frame in enumerate(zip(*by_frame, strict=True), start=1):
            found[method, str(f)] = list(map(bit_columns, frame))
    return markdown(found, "method", "latent frame") if found else ""


def markdown(found: dict[tuple[str, ...], list[dict[str, float]]], *titles: str) -> str:
    """Returns a Markdown table, a row for each key of `found` with mean and standard deviation of its runs' numbers.

    Args:
        titles: of the keys' parts, the first columns.
    """
    heads = list(next(iter(found.values()))[0])
    rows = [[*titles, *heads], ["---"] * (len(titles) + len(heads))]
    for key, of in found.items():
        values = torch.tensor([[run[head] for head in heads] for run in of])
        spread = values.std(dim=0) if len(of) > 1 else [None] * len(heads)
        cells = [f"{mean:.{places(head)}f}" + ("" if sd is None else f" ± {sd:.{places(head)}f}")
                 for head, mean, sd in zip(heads, values.mean(dim=0), spread, strict=True)]  # fmt: skip
        rows.append([*key, *cells])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def places(head: str) -> int:
    """Returns the number of digits after the point that are significant in a column."""
    return 1 if head.startswith("bits") else 0


def draw(runs: Runs, path: str):
    """Plots the accuracy of each frame of the long clips, and of the motion of clips of both lengths."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(13, 3.6), layout="constrained")
    colours = {method: f"C{i}" for i, method in enumerate(runs)}
    for axis, kind in zip(axes, ("colour", "shape")):
        for method, of in runs.items():
            values = torch.tensor([drift(run["long"])[kind] for run in of])
            mean, spread = values.mean(dim=0), values.std(dim=0) if len(of) > 1 else torch.zeros(values.shape[1])
            frames = range(1, len(mean) + 1)
            axis.plot(frames, mean, color=colours[method], label=method)
            axis.fill_between(frames, mean - spread, mean + spread, color=colours[method], alpha=0.12, linewidth=0)
        axis.set_title(f"{kind} of each frame, trained on 17")
        axis.set_xlabel("frame")
        axis.set_ylim(0, 1.02)
        axis.axvline(17, color="0.6", linewidth=0.8)
    axes[0].legend(fontsize=8)
    for i, (method, of) in enumerate(runs.items()):
        for length, marker in (("trained_length", "o"), ("long", "x")):
            values = [run[length]["motion"] for run in of]
            axes[2].plot([i] * len(values), values, marker, color=colours[method])
    axes[2].set_title("motion of the clip: o 17 frames, x 65")
    axes[2].set_xticks(range(len(runs)), list(runs), rotation=30)
    axes[2].set_ylim(0, 1.02)
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    found = read(sys.argv[1])
    print("\n\n".join(filter(None, (table(found), table_by_frame(found)))))
    if len(sys.argv) > 2:
        draw(found, sys.argv[2])
