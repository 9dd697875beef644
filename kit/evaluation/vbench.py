"""Reads VBench's results (Huang et al. 2023, arXiv 2311.17982), summarises them, and sets them beside the paper's.

VBench itself is not needed here: its evaluation runs separately, on the videos that `kit.evaluation.suites` makes, and
writes `*_eval_results.json`. Constants and formats are those of github.com/Vchitect/VBench, scripts/constant.py and
scripts/cal_final_score.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from kit.evaluation.suites import FLICKERING
from kit.files import read_json

# Lowest and highest raw value of each dimension, which become 0 and 1, and its weight.
QUALITY = {
    "subject_consistency": (0.1462, 1.0, 1.0),
    "background_consistency": (0.2615, 1.0, 1.0),
    FLICKERING: (0.6293, 1.0, 1.0),
    "motion_smoothness": (0.706, 0.9975, 1.0),
    "dynamic_degree": (0.0, 1.0, 0.5),
    "aesthetic_quality": (0.0, 1.0, 1.0),
    "imaging_quality": (0.0, 1.0, 1.0),
}
SEMANTIC = {
    "object_class": (0.0, 1.0, 1.0),
    "multiple_objects": (0.0, 1.0, 1.0),
    "human_action": (0.0, 1.0, 1.0),
    "color": (0.0, 1.0, 1.0),
    "spatial_relationship": (0.0, 1.0, 1.0),
    "scene": (0.0, 0.8222, 1.0),
    "appearance_style": (0.0009, 0.2855, 1.0),
    "temporal_style": (0.0, 0.364, 1.0),
    "overall_consistency": (0.0, 0.364, 1.0),
}
DIMENSIONS = (*QUALITY, *SEMANTIC)
QUALITY_WEIGHT, SEMANTIC_WEIGHT = 4, 1

# Table 1 of the paper, in percent as printed.
PAPER_MODELS = (
    "VideoAR 4B", "LaVie 3B", "VideoCrafter2 1B", "CogVideoX 5B", "Kling", "Step-Video 30B", "Gen-3", "Hunyuan 13B",
)  # fmt: skip
PAPER = {
    "total": (81.74, 77.08, 80.44, 81.61, 81.85, 81.83, 82.32, 83.24),
    "quality": (82.88, 78.78, 82.20, 82.75, 83.39, 84.46, 84.11, 85.09),
    "semantic": (77.15, 70.31, 73.42, 77.04, 75.68, 71.28, 75.17, 75.82),
    "subject_consistency": (95.51, 91.41, 96.85, 96.23, 98.33, 98.05, 97.10, 97.37),
    "background_consistency": (97.85, 97.47, 98.22, 96.52, 97.60, 97.67, 96.62, 97.76),
    FLICKERING: (98.83, 98.30, 98.41, 98.66, 99.30, 99.44, 98.61, 99.44),
    "motion_smoothness": (98.37, 96.38, 97.73, 96.92, 99.40, 99.08, 99.23, 98.99),
    "dynamic_degree": (61.39, 49.72, 42.50, 70.97, 46.94, 53.06, 60.14, 70.83),
    "aesthetic_quality": (63.42, 54.94, 63.13, 61.98, 61.21, 61.23, 63.34, 60.36),
    "imaging_quality": (60.71, 61.90, 67.22, 62.90, 65.62, 70.63, 66.82, 67.56),
    "object_class": (94.98, 91.82, 92.55, 85.23, 87.24, 80.56, 87.81, 86.10),
    "multiple_objects": (72.88, 33.32, 40.66, 62.11, 68.05, 50.55, 53.64, 68.55),
    "human_action": (94.40, 96.80, 95.00, 99.40, 93.40, 94.00, 96.40, 94.40),
    "color": (90.73, 86.39, 92.92, 82.81, 89.90, 88.25, 80.90, 91.60),
    "spatial_relationship": (56.14, 34.09, 35.86, 66.35, 73.03, 71.47, 65.09, 68.68),
    "scene": (50.52, 52.69, 55.29, 53.20, 50.86, 24.38, 54.57, 53.88),
    "appearance_style": (22.68, 23.56, 25.13, 24.91, 19.62, 23.17, 24.31, 19.80),
    "temporal_style": (25.11, 25.93, 25.84, 25.38, 24.17, 26.01, 24.71, 23.89),
    "overall_consistency": (27.44, 26.41, 28.23, 27.59, 26.42, 27.12, 26.69, 26.44),
}


class Measured(NamedTuple):
    """What VBench found in a dimension."""

    score: float  # raw, a fraction
    videos: list[str]  # file names of the videos that it was measured on, as far as VBench lists them


def read_vbench_results(path: str | Path) -> dict[str, Measured]:
    """Reads results by dimension, such as `subject_consistency`; any of the sixteen may be missing.

    Args:
        path: a `*_eval_results.json` of VBench, or a folder of them, such as one for each dimension.
    Raises:
        FileNotFoundError: if there is none.
        ValueError: if a file is not of VBench's format, a dimension is unknown or in two files, or a score out of range.
    """
    path = Path(path)
    files = sorted(path.glob("*_eval_results.json")) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise FileNotFoundError(f"no VBench results at {path}; give a *_eval_results.json, or the folder it is in")
    found: dict[str, Measured] = {}
    source: dict[str, Path] = {}
    for file in files:
        results = read_json(file)
        if not isinstance(results, dict):
            raise ValueError(f"{file}: expected {{dimension: [score, videos]}} of VBench, found {json.dumps(results)[:100]}")
        for name, result in results.items():
            if name not in DIMENSIONS:
                raise ValueError(f"{file}: unknown dimension {name!r}; the sixteen of VBench are {', '.join(DIMENSIONS)}")
            if name in found:
                raise ValueError(f"{name} is in both {source[name].name} and {file.name} of {path}; move one of them away")
            found[name], source[name] = _measured(file, name, result), file
    return found


def _measured(file: Path, name: str, result) -> Measured:
    """Checks and returns a dimension's [score, videos]."""
    score, *videos = result if isinstance(result, list) and result else [None]
    if not isinstance(score, int | float):
        raise ValueError(f"{file}: expected [score, videos] for {name}, found {json.dumps(result)[:100]}")
    if not abs(score) < 1.01:  # NaN fails too; a cosine may be below 0, and is rounded
        raise ValueError(
            f"{file}: {name} is {score}, expected a fraction; NaN means that VBench found no video, and an old VBench gives "
            "imaging_quality in percent: evaluate this dimension again"
        )
    listed = videos[0] if videos and isinstance(videos[0], list) else []
    paths = [video["video_path"] for video in listed if isinstance(video, dict) and "video_path" in video]
    return Measured(float(score), [Path(path).name for path in paths])


def vbench_scores(raw: dict[str, float]) -> dict:
    """VBench's summary of raw scores (fractions), in percent.

    Returns:
        `quality` and `semantic`, each if all its dimensions are there, `total` if both are; `missing`: the names of the
        dimensions that are not there.
    """
    scores: dict = {}
    for group, ranges in (("quality", QUALITY), ("semantic", SEMANTIC)):
        if ranges.keys() <= raw.keys():
            normalised = sum(weight * (raw[name] - low) / (high - low) for name, (low, high, weight) in ranges.items())
            scores[group] = 100 * normalised / sum(weight for _, _, weight in ranges.values())
    if len(scores) == 2:
        weighted = QUALITY_WEIGHT * scores["quality"] + SEMANTIC_WEIGHT * scores["semantic"]
        scores["total"] = weighted / (QUALITY_WEIGHT + SEMANTIC_WEIGHT)
    return {**scores, "missing": [name for name in DIMENSIONS if name not in raw]}


def vbench_table(rows: dict[str, dict[str, float]]) -> str:
    """A Markdown table in percent: what was measured beside Table 1 of the paper; `-` where a dimension is missing.

    Args:
        rows: name -> raw scores by dimension, fractions.
    """
    columns = [(name, {key: 100 * score for key, score in raw.items()} | vbench_scores(raw)) for name, raw in rows.items()]
    columns += [(f"{model} (paper)", {key: row[n] for key, row in PAPER.items()}) for n, model in enumerate(PAPER_MODELS)]
    lines = [["VBench, %", *(name for name, _ in columns)], ["---", *("---:" for _ in columns)]]
    for key in PAPER:
        lines.append([key.replace("_", " "), *(f"{values[key]:.2f}" if key in values else "-" for _, values in columns)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
