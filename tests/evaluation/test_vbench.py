"""VBench's results and the paper's table."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kit.evaluation.vbench import DIMENSIONS, PAPER, PAPER_MODELS, read_vbench_results, vbench_scores, vbench_table


def written(path: Path, value) -> Path:
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return path


def result(score) -> list:
    """Returns the result of one dimension in VBench's format."""
    return [score, [{"video_path": "videos/a cat-0.mp4", "video_results": score}]]


def paper(model: str) -> dict[str, float]:
    """Returns a model's raw scores from the paper's table, as fractions."""
    return {name: PAPER[name][PAPER_MODELS.index(model)] / 100 for name in DIMENSIONS}


def test_results_of_one_file_and_of_a_folder(tmp_path):
    one = written(tmp_path / "results_1_eval_results.json", {"scene": result(0.5), "color": result(1)})
    assert read_vbench_results(one) == {"scene": (0.5, ["a cat-0.mp4"]), "color": (1.0, ["a cat-0.mp4"])}
    written(tmp_path / "results_2_eval_results.json", {"temporal_style": result(-0.01)})
    written(tmp_path / "results_2_full_info.json", [])
    written(tmp_path / "results_3_eval_results.json", {"human_action": [0.25], "object_class": [1, ["of another format"]]})
    found = read_vbench_results(tmp_path)
    scores = {"scene": 0.5, "color": 1.0, "temporal_style": -0.01, "human_action": 0.25, "object_class": 1.0}
    assert {name: measured.score for name, measured in found.items()} == scores
    assert found["human_action"].videos == found["object_class"].videos == [] != found["scene"].videos


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"i2v_subject": result(0.5)}, r"x_eval_results.json: unknown dimension 'i2v_subject'; the sixteen of VBench are"),
        ({"scene": 0.5}, r"x_eval_results.json: expected \[score, videos\] for scene, found 0.5"),
        ({"scene": []}, r"expected \[score, videos\] for scene, found \[\]"),
        ({"imaging_quality": result(66.8)}, r"imaging_quality is 66.8, expected a fraction; .* in percent: evaluate"),
        ({"scene": result(float("nan"))}, r"scene is nan, expected a fraction; NaN means that VBench found no video"),
        ([1], r"x_eval_results.json: expected {dimension: \[score, videos\]} of VBench, found \[1\]"),
        ('{"scene": [0.5,', r"x_eval_results.json, line 1: not JSON"),
    ],
)
def test_bad_results(tmp_path, value, message):
    with pytest.raises(ValueError, match=message):
        read_vbench_results(written(tmp_path / "x_eval_results.json", value))


def test_results_missing_or_double(tmp_path):
    for path in (tmp_path, tmp_path / "none.json"):
        with pytest.raises(FileNotFoundError, match=r"no VBench results at .*; give a \*_eval_results.json, or the folder"):
            read_vbench_results(path)
    for name in "ab":
        written(tmp_path / f"{name}_eval_results.json", {"scene": result(0.5)})
    with pytest.raises(ValueError, match="scene is in both a_eval_results.json and b_eval_results.json .* move one of them"):
        read_vbench_results(tmp_path)


@pytest.mark.parametrize("model", PAPER_MODELS)
def test_scores_are_those_of_the_paper(model):
    scores = vbench_scores(paper(model))
    assert scores.pop("missing") == []
    printed = {name: PAPER[name][PAPER_MODELS.index(model)] for name in ("quality", "semantic", "total")}
    assert scores == pytest.approx(printed, abs=0.025)  # the dimensions are rounded to 0.01


def test_scores_need_all_their_dimensions():
    raw = paper("VideoAR 4B")
    del raw["scene"]
    scores = vbench_scores(raw)
    assert scores["missing"] == ["scene"] and set(scores) == {"quality", "missing"}
    assert vbench_scores({}) == {"missing": list(DIMENSIONS)}


def test_table_beside_the_paper():
    raw = paper("Kling")
    del raw["scene"]
    lines = vbench_table({"mine": raw}).splitlines()
    assert lines[0].startswith("| VBench, % | mine | VideoAR 4B (paper) | LaVie 3B (paper) |")
    assert len(lines) == 2 + 19 and {line.count("|") for line in lines} == {2 + 1 + 8 + 0}
    assert lines[2].startswith("| total | - | 81.74 | 77.08 |")
    assert lines[3].startswith("| quality | 83.3") and lines[4].startswith("| semantic | - | 77.15 |")
    assert "| dynamic degree | 46.94 | 61.39 |" in "\n".join(lines)
    assert any(line.startswith("| scene | - | 50.52 |") for line in lines)
