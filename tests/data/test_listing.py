"""The listing of a folder of videos: split, classes, captions."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import pytest

from kit.data.clips import FolderClips
from kit.data.heads import read_heads
from kit.data.listing import LEADING_WORDS, held_out_of, label_files, list_videos, split_files
from tests.data.videos import write


def test_split_is_by_file_disjoint_and_stable(videos):
    train, val = FolderClips(videos, "train", val_every=3), FolderClips(videos, "val", val_every=3, seed=4)
    names = list_videos(videos)
    assert val.files == [names[2], names[5]]
    assert sorted([*train.files, *val.files]) == names and not set(train.files) & set(val.files)
    assert {train.file(n) for n in range(50)} == set(train.files)


def test_what_runs_of_kit_log_is_no_data(tmp_path):
    for name in ("a.mp4", "b/c.mp4", "runs/x/media/step.mp4", "runs/x/config/overrides.yaml", "config/overrides.yaml"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert list_videos(tmp_path) == ["a.mp4", "b/c.mp4"]
    assert list_videos(tmp_path / "runs" / "x") == ["media/step.mp4"], "a run that is asked for by name"
    with pytest.raises(FileNotFoundError, match="holds no video but those of runs of kit, such as x"):
        list_videos(tmp_path / "runs")


@pytest.mark.parametrize(
    ("names", "way_out"),
    [
        (["clip/000.jpg", "clip/001.jpg"], r"It holds pictures such as clip/000\.jpg: data\.frames=1 takes each by itself"),
        (["00.tar.gz", "cover.png"], r"For shards such as 00\.tar\.gz use data=shards"),
    ],
)
def test_frames_and_shards_in_place_of_videos_are_told(names, way_out, tmp_path):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(FileNotFoundError, match=way_out):
        list_videos(tmp_path)


def test_links_are_followed_but_not_in_circles(tmp_path):
    for name in ("set/b/z.mp4", "set/a.mp4", "set/b/x.mp4/y.mp4", "set/.hidden/h.mp4", "set/.h.mp4", "beside/c.mp4"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    for link, to in (("loop", "."), ("b/up", ".."), ("far", "../beside"), ("dead.mp4", "gone"), ("self.mp4", "self.mp4")):
        (tmp_path / "set" / link).symlink_to(to)
    (tmp_path / "beside" / "back").symlink_to("../set")
    expected = ["a.mp4", "b/x.mp4/y.mp4", "b/z.mp4", "dead.mp4", "far/c.mp4", "self.mp4"]
    assert list_videos(tmp_path / "set") == expected
    (tmp_path / "link").symlink_to("set")
    assert list_videos(tmp_path / "link") == expected


def test_names_that_are_no_utf8_are_left_out(tmp_path):
    for name in (b"a.mp4", b"caf\xe9.mp4"):
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name)).touch()
    with pytest.warns(UserWarning, match=r"1 files of .* names that are no UTF-8 are left out, such as 'caf\\udce9.mp4'"):
        assert list_videos(tmp_path) == ["a.mp4"]


def test_a_broken_link_counts_as_unreadable(tmp_path, monkeypatch):
    """Its listing, which heads and caches are made from, says so too."""
    monkeypatch.setenv("KIT_CACHE", str(tmp_path / ".cache"))
    for name in ("a.mp4", "b.mp4"):
        write(tmp_path / name, count=2)
    (tmp_path / "c.mp4").symlink_to("/missing.mp4")
    clips = FolderClips(tmp_path, frames=1, split="all", height=32, width=32)
    assert clips.listing()[-1] == "c.mp4 -1"
    assert sorted(read_heads(clips)) == ["a.mp4", "b.mp4"] and [path.name for path in clips.skipped] == ["c.mp4"]


def test_small_folders_still_have_a_val_split():
    for names in (["a.mp4", "b.mp4"], ["a.mp4", "b.png"], ["a.png", "b.png"]):
        held_out = held_out_of(names, 5)
        assert split_files(names, "val", held_out) == names[1:] and split_files(names, "train", held_out) == names[:1]
    assert split_files(["a"], "val", set()) == split_files(["a"], "train", set()) == ["a"]


def test_pictures_do_not_move_the_held_out_videos():
    """Pictures do not change the split of videos beside them: image and video tokenizers may train on one folder."""
    videos, pictures = [f"{i:02d}.mp4" for i in range(20)], [f"{i:02d}_still.PNG" for i in range(7)]
    held_out = held_out_of(videos, 5)
    assert len(held_out) == 4 and held_out_of(sorted(videos + pictures), 5) == held_out | {"04_still.PNG"}


def test_single_file_is_in_both_splits_with_a_warning(tmp_path):
    write(tmp_path / "a.mp4")
    with pytest.warns(UserWarning, match="one video only"):
        val = FolderClips(tmp_path, "val")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert FolderClips(tmp_path, "train").files == val.files == ["a.mp4"]


def test_classes_from_file_names(videos):
    train, val = FolderClips(videos, frames=1), FolderClips(videos, "val", frames=1)
    assert train.classes == val.classes == ("walk", "wave_hand")
    for n in range(5):
        item, label = train[n], train.file(n).rsplit("_", 1)[0]
        assert train.classes[item["label"]] == label and item["caption"] == label.replace("_", " ")


def test_classes_from_folders(tmp_path):
    names = ["ride_bike/a_1.mp4", "ride_bike/b_2.mp4", "run/a_1.mp4", "run/deep/run/c_3.mp4"]
    for name in names:
        write(tmp_path / name, count=2)
    dataset = FolderClips(tmp_path, "train", frames=1)
    assert dataset.classes == ("ride_bike", "run")
    items = {dataset.file(n): dataset[n] for n in range(len(dataset.files))}
    assert (items["ride_bike/a_1.mp4"]["label"], items["ride_bike/a_1.mp4"]["caption"]) == (0, "ride bike")
    assert items["run/a_1.mp4"]["label"] == 1
    assert FolderClips(tmp_path, label_from="filename").classes == ("a", "b", "c")
    none = FolderClips(tmp_path, frames=1, label_from="none")
    assert none.classes == () and (none[0]["label"], none[0]["caption"]) == (-1, "")


def test_which_labels_auto_chooses():
    def auto(*names: str) -> list[str]:
        return sorted(set(label_files(names, "auto", r"^(?P<label>.+?)_+\d+$").values()))

    assert auto("x/a_1.mp4", "x/b_1.mp4", "x/b_2.mp4") == ["a", "b"]  # one folder tells nothing apart
    assert auto("a_1.mp4", "b_1.mp4") == []  # as many classes as files
    assert auto("a_1.mp4", "a_2.mp4") == []  # one class
    assert auto("a_1.mp4", "b_1.mp4", "b_2.mp4", "other.mp4") == []
    assert auto("my_long_word__0004.mp4", "b_1.mp4", "b_2.mp4") == ["b", "my_long_word"]
    assert label_files(["map__run__3.mp4"], "filename", "__(?P<label>.+)__") == {"map__run__3.mp4": "run"}


def test_what_keeps_labels_from_being_classes_is_told():
    folders = ["a/1.mp4", "a/2.mp4", "b/1.mp4", "b/2.mp4"]
    with pytest.warns(UserWarning, match="1 of 5 files lie in no folder, such as 'stray.mp4'"):
        assert label_files([*folders, "stray.mp4"], "auto", LEADING_WORDS) == {}
    names = ["jump_1.mp4", "jump_2.mp4", "walk_1.mp4", "walk_2.mp4"]
    with pytest.warns(UserWarning, match="1 of 5 files have names of another form, such as 'jump-3.mp4'"):
        assert label_files([*names, "jump-3.mp4"], "auto", LEADING_WORDS) == {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        label_files(folders, "auto", LEADING_WORDS)
        label_files(["x.mp4", "y_1.mp4"], "auto", LEADING_WORDS)
        label_files([*names, "jump-3.mp4"], "none", LEADING_WORDS)


def test_folders_that_are_a_split_hold_out_and_are_no_classes():
    names = ["test/c.mp4", "train/a.mp4", "train/b.mp4", "val/d.mp4"]
    assert held_out_of(names, 5) == {"test/c.mp4", "val/d.mp4"} and label_files(names, "auto", LEADING_WORDS) == {}
    deep = ["Train/jump/a.mp4", "Train/run/b.mp4", "validation/jump/c.mp4", "validation/run/d.mp4"]
    assert held_out_of(deep, 5) == set(deep[2:]) and set(label_files(deep, "auto", LEADING_WORDS).values()) == {"jump", "run"}
    assert held_out_of(["train/a.mp4", "val/b.mp4", "other/c.mp4"], 3) == {"other/c.mp4"}, "not all are of a split"
    assert held_out_of(["train/a.mp4", "train/b.mp4"], 2) == {"train/b.mp4"}
    assert set(label_files(names, "folder", LEADING_WORDS).values()) == {"test", "train", "val"}, "if that is asked for"


def test_held_out_clips_that_are_looked_at_are_of_all_classes(tmp_path):
    """Of a sorted list the first few would all be of the first class."""
    for label in "abcdefgh":
        for n in range(20):
            path = tmp_path / label / f"{n:02d}.mp4"
            path.parent.mkdir(exist_ok=True)
            path.touch()
    val, again = FolderClips(tmp_path, "val"), FolderClips(tmp_path, "val", seed=3)
    first = [val.file(n) for n in range(12)]
    assert len({name[0] for name in first}) > 4 and first == [again.file(n) for n in range(12)], "whatever the seed"
    assert {val.file(n) for n in range(32)} == set(val.files) and len(val.files) == 32
    assert [val.file(n) for n in range(32, 44)] == first


def test_a_folder_that_cannot_be_read_is_told(tmp_path, monkeypatch):
    for folder in ("a", "b", "lost+found"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.mp4").touch()
    scandir = os.scandir

    def failing(path):
        if Path(path).name in ("b", "lost+found"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", failing)
    with pytest.warns(UserWarning, match="/b cannot be read, what is in it is left out: .*Permission denied") as told:
        assert list_videos(tmp_path) == ["a/x.mp4"]
    assert len(told) == 1


def test_pictures_do_not_decide_on_the_split_of_videos():
    videos = [f"train/{name}.mp4" for name in "abcde"]
    assert held_out_of(videos, 5) == held_out_of([*videos, "val/p.png"], 5) - {"val/p.png"} == {"train/e.mp4"}
    assert held_out_of(["train/a.png", "val/p.png"], 5) == {"val/p.png"}


def test_frame_rates_are_looked_up_all_over_the_folder(tmp_path):
    for n in range(20):
        write(tmp_path / f"{n:02d}.mp4", count=2, rate=8 if n < 14 else 30)
    with pytest.warns(UserWarning, match="have 8 to 30 fps"):
        assert FolderClips(tmp_path, "all", frames=2).native_fps == 8
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert FolderClips(tmp_path, "all", frames=1).native_fps == 8
