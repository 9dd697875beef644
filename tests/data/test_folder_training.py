"""A folder of real clips trains, generates by label, and scores (on the shared Weizmann clips, where they are)."""

from __future__ import annotations

import json

from kit.cli import main
from tests.fixtures import GENERATOR, QUICK, TOKENIZER


def test_people_of_weizmann_in_a_reduced_form(shared, tmp_path):
    folder = shared / "data" / "weizmann"
    clips = ["data=clips", f"data.root={folder}", "data.frames=5", "data.height=32", "data.width=32", f"root={tmp_path}"]
    small = [*TOKENIZER, *(word for word in QUICK if "val_check" not in word), "trainer.val_check_interval=3"]
    assert main(["fit", "conf=stage1_tokenizer", *clips, *small, "name=tok", "trainer.max_steps=3"]) == 0
    tokenizer = tmp_path / "tok" / "checkpoints" / "last.ckpt"
    words = [*clips, *small, *GENERATOR, f"tokenizer_ckpt={tokenizer}", "name=gen", "trainer.max_steps=3"]
    assert main(["fit", "conf=stage2_generator", *words]) == 0
    generator = tmp_path / "gen" / "checkpoints" / "last.ckpt"
    assert main(["generate", f"ckpt={generator}", f"root={tmp_path}", "label=jumping_jack", "n=2"]) == 0
    assert len(list((tmp_path / "generated").glob("jumping_jack_seed*.mp4"))) == 2
    assert main(["generate", f"ckpt={generator}", f"root={tmp_path}", "label=swimming", "n=1"]) == 1
    assert main(["validate", f"ckpt={generator}", *clips, "clips=4", "name=scores"]) == 0
    metrics = json.loads((tmp_path / "scores" / "metrics.json").read_text())
    assert len(metrics["bit_accuracy"]) == 3 and "caption_accuracy" not in metrics
