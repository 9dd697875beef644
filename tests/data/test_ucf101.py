"""UCF-101: its layout and its official lists are checked, and what is missing is named."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from kit.checkpoint import load_generator
from kit.cli import main
from kit.data.shapes import Shapes
from kit.data.ucf101 import UCF101, read_list
from kit.media import write_video
from tests.fixtures import CLIP, GENERATOR, QUICK, TOKENIZER

CLASSES = [f"Class{n:03d}" for n in range(101)]
SHAPE = dict(frames=5, height=32, width=32)


@pytest.fixture
def ucf101(tmp_path) -> Path:
    """A data set of 101 classes with two files each, the first for training; a single file is a real video."""
    root = tmp_path / "UCF-101"
    for name in CLASSES:
        (root / name).mkdir(parents=True)
        for group in (1, 2):
            (root / name / f"v_{name}_g0{group}_c01.avi").touch()
    write_video(Shapes("val", 9, 48, 64)[0]["video"], root / "Class000" / "v_Class000_g02_c01.mp4", 25)
    (root / "Class000" / "v_Class000_g02_c01.avi").unlink()
    lists = tmp_path / "ucfTrainTestlist"
    lists.mkdir()
    train = "".join(f"{name}/v_{name}_g01_c01.avi {n}\n" for n, name in enumerate(CLASSES, 1))
    (lists / "trainlist01.txt").write_text(train)
    (lists / "testlist01.txt").write_text("".join(f"{name}/v_{name}_g02_c01.avi\r\n" for name in CLASSES))
    return root


def test_official_splits_and_classes(ucf101):
    train, val, both = (UCF101(ucf101, split, **SHAPE) for split in ("train", "val", "all"))
    assert all("_g01_" in name for name in train.files) and all("_g02_" in name for name in val.files)
    assert len(train.files) == len(val.files) == 101 and sorted([*train.files, *val.files]) == sorted(both.files)
    assert train.classes == val.classes == tuple(CLASSES)
    item = val[0]  # converted to mp4, which is all the same
    assert item["video"].shape == (3, 5, 32, 32) and item["label"] == 0 and item["caption"] == "Class000"


def test_lists_may_lie_inside_or_beside(ucf101, tmp_path):
    assert len(UCF101(ucf101, "val", **SHAPE).files) == 101
    moved = (tmp_path / "ucfTrainTestlist").rename(tmp_path / "lists")
    with pytest.raises(FileNotFoundError, match="testlist01.txt is missing; unpack UCF101TrainTestSplits"):
        UCF101(ucf101, "val", **SHAPE)
    inside = moved.rename(ucf101 / "ucfTrainTestlist")
    assert len(UCF101(ucf101, "val", **SHAPE).files) == 101
    shutil.copytree(inside, tmp_path / "ucfTrainTestlist")
    (inside / "testlist01.txt").write_text("Class003/v_Class003_g02_c01.avi\n")
    assert len(UCF101(ucf101, "val", **SHAPE).files) == 1, "those inside go first"


def test_missing_videos_are_named(ucf101):
    (ucf101 / "Class007" / "v_Class007_g02_c01.avi").unlink()
    (ucf101 / "Class009" / "v_Class009_g02_c01.avi").unlink()
    with pytest.raises(FileNotFoundError, match="2 of 101 videos .* not in .*: Class007/v_Class007_g02_c01, Class009"):
        UCF101(ucf101, "val", **SHAPE)
    assert len(UCF101(ucf101, "train", **SHAPE).files) == 101


def test_missing_classes_are_counted(ucf101):
    (ucf101 / "Class007").rename(ucf101.parent / "elsewhere")
    with pytest.raises(ValueError, match="videos of 100 classes, UCF-101 has 101; unpack all of it"):
        UCF101(ucf101, "val", **SHAPE)


def test_wrong_arguments_and_lists(ucf101, tmp_path):
    with pytest.raises(ValueError, match="official=4; UCF-101 has the official splits 1, 2 and 3"):
        UCF101(ucf101, official=4, **SHAPE)
    with pytest.raises(ValueError, match="val_every=3: UCF101 does not use it; leave it out"):
        UCF101(ucf101, val_every=3, **SHAPE)
    with pytest.raises(FileNotFoundError, match="trainlist02.txt is missing"):
        UCF101(ucf101, official=2, **SHAPE)
    (tmp_path / "list.txt").write_text("Class000/v_Class000_g01_c01.avi 1\n\nv_Class000_g01_c01.avi\n")
    with pytest.raises(ValueError, match="list.txt, line 3: expected `Class/v_Class_g01_c01.avi 1`, found 'v_Class000"):
        read_list(tmp_path / "list.txt")
    (tmp_path / "list.txt").write_text("Class000/v_Class000_g01_c01.avi Class000/v_Class000_g01_c02.avi 1")
    with pytest.raises(ValueError, match="list.txt, line 1: expected"):
        read_list(tmp_path / "list.txt")
    (tmp_path / "list.txt").write_text("Class000/v_Class000_g01_c01.avi 1\r\n", encoding="utf-8-sig")
    assert read_list(tmp_path / "list.txt") == ["Class000/v_Class000_g01_c01"]
    (tmp_path / "list.txt").write_text("Class000/v_Class000_g01_c01.avi 1\n", encoding="utf-16")
    with pytest.raises(ValueError, match="list.txt, line 1: not UTF-8; save the file in that encoding"):
        read_list(tmp_path / "list.txt")
    (tmp_path / "list.txt").write_text("\n")
    with pytest.raises(ValueError, match="split list .*list.txt is empty; unpack it anew"):
        read_list(tmp_path / "list.txt")


def test_the_papers_recipes_train(ucf101, tmp_path):
    """Trains tokenizer and generator by the paper's recipes, reduced, on a data set of real videos."""
    video = next(ucf101.rglob("*.mp4"))
    for path in ucf101.rglob("*.avi"):
        shutil.copy(video, path.with_suffix(".mp4"))
        path.unlink()
    small = [*CLIP, *QUICK, f"root={tmp_path}", f"data.root={ucf101}", "data.fps=12"]
    alone = ["loss=plain", "recipe.tokenizer.steps=2"]
    assert main(["fit", "conf=ucf101_tokenizer", *small, *TOKENIZER, *alone]) == 0
    assert main(["fit", "conf=ucf101_generator", *small, *GENERATOR, "recipe.generator.steps=2"]) == 0
    generator, tokenizer = load_generator(tmp_path / "ucf101_generator" / "checkpoints" / "last.ckpt")
    assert len(generator.model.config.condition.classes) == 101 and tokenizer.steps == 2
