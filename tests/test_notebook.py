"""The notebook runs through the public API, on trained checkpoints."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

import kit.cli
from tests.fixtures import fit_generator, fit_tokenizer

NOTEBOOK = Path(__file__).resolve().parents[1] / "notebooks" / "scale_tokens.ipynb"


def test_scale_tokens(tmp_path, monkeypatch):
    """The tokenizer has fewer bits at coarse scales; what they lack is neither spent nor counted."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("matplotlib")
    often = "trainer.val_check_interval=1"
    assert fit_tokenizer(tmp_path, "recipe.tokenizer.steps=1", "tokenizer.scale_bits=[2,4,8]", often) == 0
    trained = tmp_path / "tokenizer" / "checkpoints" / "last.ckpt"
    assert fit_generator(tmp_path, "recipe.generator.steps=1", often, tokenizer=trained) == 0
    monkeypatch.setenv("KIT_RUNS", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(NOTEBOOK.parents[1]))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert all(not cell.get("outputs") for cell in notebook.cells), "commit the notebook without outputs"
    notebook.cells.append(nbformat.v4.new_code_cell("print('frames', axis.get_xticks())"))  # of the last plot with axes
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(NOTEBOOK.parent)}}).execute()
    text = "".join(o.get("text", "") for c in notebook.cells if c.cell_type == "code" for o in c.outputs)
    pictures = sum("image/png" in o.get("data", {}) for c in notebook.cells if c.cell_type == "code" for o in c.outputs)
    assert pictures == 6
    spent = 1 * 2 + 4 * 4 + 16 * 8
    assert f"{spent} bits per latent frame, {2 * spent} per clip of 5 frames" in text and "nan" not in text
    assert "frames [0 1]" in text  # and none between them
    assert text.count("PSNR") == 3 and text.count("right (always") == 3


def first_cell() -> list[str]:
    """Returns the lines of the cell that loads the checkpoints."""
    return next(cell["source"] for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code")


@pytest.mark.parametrize(
    ("demo", "part", "chosen"),
    [
        ("demo", "tokenizer", "runs/notebook"),
        ("demo", "generator", "runs/demo"),
        ("demo_short", "generator", "runs/demo_short"),
    ],
)
def test_a_demo_that_was_interrupted_is_not_completed_with_a_tiny_generator(tmp_path, monkeypatch, demo, part, chosen):
    """The demo could not be resumed then: its generator is of another architecture."""
    choice = [line for line in first_cell() if line.startswith(("demos =", "runs ="))]
    (tmp_path / "runs" / demo / part / "checkpoints").mkdir(parents=True)
    (tmp_path / "runs" / demo / part / "checkpoints" / "last.ckpt").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("KIT_RUNS", raising=False)
    exec("".join(choice), found := {"os": os, "Path": Path})
    assert found["runs"] == Path(chosen)


def test_without_a_demo_it_trains_and_an_interrupted_training_is_gone_on_with(tmp_path, monkeypatch, capsys):
    """On any machine a pair of the size that so few steps teach something."""
    pytest.importorskip("matplotlib")
    commands, results = [], [None, 1, None, None]

    def main(words: list[str]) -> int:
        commands.append(words)
        steps = ["recipe.tokenizer.steps=2", "recipe.generator.steps=2", "trainer.val_check_interval=2"]
        result = kit_main(
            [*words, *steps, "recipe.generator.encoded_clips=8", "data.batch_size=4", "trainer.accelerator=cpu"]
        )
        return results[len(commands) - 1] or result

    kit_main = kit.cli.main
    monkeypatch.setattr(kit.cli, "main", main)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("KIT_RUNS", raising=False)
    with pytest.raises(RuntimeError, match="Run this cell again to go on"):
        exec("".join(first_cell()), {})
    exec("".join(first_cell()), found := {})
    assert [words[1] for words in commands] == ["conf=stage1_tokenizer", "conf=stage2_generator"] * 2
    assert all({"size=tiny", "ckpt=last"} <= set(words) for words in commands)
    assert found["generator"].model.config.width == 64 and found["video"].shape == (32, 3, 5, 32, 32)
