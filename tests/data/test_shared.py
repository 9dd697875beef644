"""Splits and stages of a training read a folder once, and so agree on what it holds."""

from __future__ import annotations

import functools
import tarfile

import pytest

from kit.build import build_data, build_stages, plan_of
from kit.data import clips, listing
from kit.data.clips import ORDERS, FolderClips
from kit.data.datamodule import ClipDataModule
from kit.data.shared import read_once, shared
from kit.data.webdataset import ShardClips
from kit.tokenizer import TokenizerConfig
from kit.values import plain
from tests.data.videos import write
from tests.fixtures import composed


def test_a_thing_is_made_once_within_a_block():
    made = []

    def make():
        made.append(0)
        return len(made)

    assert (shared("a", make), shared("a", make)) == (1, 2)  # outside, each time
    with read_once():
        assert (shared("a", make), shared("b", make), shared("a", make)) == (3, 4, 3)
        with read_once():
            assert shared("a", make) == 3  # a part of the outer one
        assert shared("a", make) == 3
    with pytest.raises(ZeroDivisionError), read_once():
        shared("a", lambda: 1 / 0)
    assert shared("a", make) == 5


@pytest.fixture
def folder(tmp_path):
    for name in "abcde":
        write(tmp_path / f"v/{name}.mp4", count=5)
    (tmp_path / "v/captions.csv").write_text(
        "file,caption\n" + "".join(f"{name}.mp4,the letter {name}\n" for name in "abcde")
    )
    return tmp_path / "v"


@pytest.fixture
def walks(monkeypatch):
    """The folders that are walked through from now on."""
    seen, walk = [], listing._walk
    monkeypatch.setattr(listing, "_walk", lambda root: seen.append(root) or walk(root))
    return seen


def test_a_data_set_walks_through_its_folder_once(folder, walks):
    FolderClips(folder, frames=5)
    assert walks == [folder]


def test_a_file_that_comes_between_the_splits_is_in_neither(folder, walks, monkeypatch):
    """It would move the files held out: what the first split trains on would be among them."""
    split, files = clips.split_files, []

    def split_and_add(names, *rest):
        write(folder / f"{len(files)}.mp4", count=5)
        files.append(split(names, *rest))
        return files[-1]

    monkeypatch.setattr(clips, "split_files", split_and_add)
    shape = dict(frames=5, height=16, width=16, fps=0)
    data = ClipDataModule(functools.partial(FolderClips, folder), **shape, batch_size=1, val_clips=1, workers=0)
    assert sorted([*data.train.files, *data.val.files]) == [f"{name}.mp4" for name in "abcde"] and len(walks) == 1
    assert data.train._captions is data.val._captions
    assert "0.mp4" in FolderClips(folder, split="all", frames=5).files  # a later one sees it


def test_stages_share_what_they_read(folder, walks):
    cfg = composed("progressive", "size=tiny", "data=clips", f"data.root={folder}", "data.val_clips=1")
    data = build_stages(cfg, plan_of(cfg), TokenizerConfig.from_dict(plain(cfg.tokenizer)))
    assert len(data.parts) > 1 and len(walks) == 1
    assert len({id(part.train._captions) for part in data.parts}) == 1


def test_words_are_shared_only_by_data_sets_that_read_the_same(folder):
    with read_once():
        captioned, without = FolderClips(folder, frames=5), FolderClips(folder, frames=5, captions=False)
        labelled = FolderClips(folder, frames=5, label_from="filename", filename_pattern="(?P<label>.)")
    assert captioned[0]["caption"] != without[0]["caption"] == ""
    assert (captioned.classes, labelled.classes) == ((), tuple("abcde"))


def test_pictures_are_listed_for_clips_of_one_frame_alone(folder):
    (folder / "p.png").write_bytes(b"")
    with read_once():
        videos, frames = FolderClips(folder, "all", frames=5), FolderClips(folder, "all", frames=1)
    assert len(videos.files) == 5 and len(frames.files) == 6


def test_shards_are_read_once(tmp_path, folder):
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        for name in "abcde":
            tar.add(folder / f"{name}.mp4", f"{name}.mp4")
    (tmp_path / "t.tar").write_bytes(b"no tar" * 200)
    with read_once(), pytest.warns(UserWarning, match="t.tar is broken") as said:
        train, val = (ShardClips(tmp_path, split, frames=5) for split in ("train", "val"))
    assert train.members is val.members and len([one for one in said if "is broken" in str(one.message)]) == 1
    assert train.unreadable == val.unreadable == [str(tmp_path / "t.tar")]
    assert train[0]["video"].shape == val[0]["video"].shape == (3, 5, 64, 64)


def test_orders_of_few_epochs_are_kept(folder):
    source = FolderClips(folder, frames=5)
    files = [source.file(n) for n in range(100 * len(source.files))]
    assert len(source._orders) == ORDERS
    assert files[:8] == [source.file(n) for n in range(8)]  # drawn again, the same
    part = source.part(source.files[:2], 5, 16, 16)
    assert {part.file(n) for n in range(40)} == set(source.files[:2])


def test_the_listing_of_a_training_is_that_of_its_config(folder, walks):
    build_data(composed("stage1_tokenizer", "data=clips", f"data.root={folder}", "data.val_clips=1"))
    assert len(walks) == 1
