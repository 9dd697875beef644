"""The listing of a folder of videos: split, classes, captions."""

from __future__ import annotations

import json
import os
import unicodedata
import warnings
from pathlib import Path

import pytest
from PIL import Image

from kit.data.clips import FolderClips
from kit.data.heads import read_heads
from kit.data.listing import LEADING_WORDS, captions_beside, held_out_of, label_files, list_videos, read_captions, split_files
from tests.data.videos import write, write_bad


def test_split_is_by_file_disjoint_and_stable(videos):
    train, val = FolderClips(videos, "train", val_every=3), FolderClips(videos, "val", val_every=3, seed=4)
    names = list_videos(videos)
    assert val.files == [names[2], names[5]]
    assert sorted(train.files + val.files) == names and not set(train.files) & set(val.files)
    assert {train.file(n) for n in range(50)} == set(train.files)


def test_what_runs_of_kit_log_is_no_data(tmp_path):
    for name in ("a.mp4", "b/c.mp4", "runs/x/media/step.mp4", "runs/x/config/overrides.yaml", "config/overrides.yaml"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert list_videos(tmp_path) == ["a.mp4", "b/c.mp4"]
    assert list_videos(tmp_path / "runs" / "x") == ["media/step.mp4"], "a run that is asked for by name"
    with pytest.raises(FileNotFoundError, match="holds no video but those of runs of kit, such as x"):
        list_videos(tmp_path / "runs")


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


def test_a_table_may_have_captions_of_pictures_too(tmp_path):
    for name in ("a.mp4", "b.mp4"):
        write(tmp_path / name, count=2)
    Image.new("RGB", (32, 32)).save(tmp_path / "p0.png")
    write_captions(tmp_path / "captions.csv", {"a.mp4": "x", "b": "y", "p0": "z"})
    for frames, name, caption in ((2, "b.mp4", "y"), (1, "p0.png", "z")):
        assert FolderClips(tmp_path, frames=frames, split="all").words(name)["caption"] == caption


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


def write_captions(path: Path, captions: dict[str, str]) -> Path:
    rows = [{"file": file, "caption": caption} for file, caption in captions.items()]
    text = {
        ".csv": "file,caption\n" + "".join(f'{row["file"]},"{row["caption"]}"\n' for row in rows),
        ".jsonl": "\n".join(map(json.dumps, rows)) + "\n",
        ".json": json.dumps(captions),
    }
    path.write_text(text[path.suffix], encoding="utf-8")
    return path


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "json"])
@pytest.mark.parametrize("where", ["default", "given"])
def test_captions_from_a_table(tmp_path, suffix, where):
    names = ["a_1.mp4", "sub/a_2.mp4", "b_1.mp4"]
    for name in names:
        write(tmp_path / "videos" / name, count=2)
    captions = {"a_1.mp4": "a cat, and a dog", "sub/a_2": "über", "b_1.mp4": ""}
    path = tmp_path / "videos" / f"captions.{suffix}" if where == "default" else tmp_path / f"texts.{suffix}"
    write_captions(path, captions)
    dataset = FolderClips(tmp_path / "videos", frames=1, captions=None if where == "default" else path, val_every=3)
    val = FolderClips(tmp_path / "videos", "val", frames=1, captions=dataset.captions, val_every=3)
    found = {d.file(n): d[n] for d in (dataset, val) for n in range(len(d.files))}
    assert found["a_1.mp4"]["caption"] == "a cat, and a dog" and found["sub/a_2.mp4"]["caption"] == "über"
    assert found["b_1.mp4"]["caption"] == "" and found["b_1.mp4"]["label"] == dataset.classes.index("b")


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "json"])
def test_a_table_may_begin_with_a_byte_order_mark(tmp_path, suffix):
    """Spreadsheets on Windows write one."""
    path = write_captions(tmp_path / f"c.{suffix}", {"a.mp4": "x"})
    path.write_text("\ufeff" + path.read_text(encoding="utf-8"), encoding="utf-8")
    assert read_captions(path, ["a.mp4"]) == {"a.mp4": "x"}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("c.csv", "file,text\na.mp4,hello\n", r"c\.csv, row 1: expected texts named `file` and `caption`.*text"),
        ("c.csv", "file,caption\na.mp4,x\nb.mp4\n", "row 2: expected texts"),
        ("c.csv", "file,caption\na.mp4,x\nb.mp4,y\nzebra.mp4,z\n", "1 files that are not there, such as 'zebra.mp4'"),
        ("c.csv", "file,caption\na.mp4,x\n", "no caption for 1 files, such as 'b.mp4'"),
        ("c.csv", "file,caption\na.mp4,x\na.mp4,y\nb.mp4,z\n", "row 2: a second caption for 'a.mp4'"),
        ("c.csv", "file,caption\na.mp4,x\na,y\nb.mp4,z\n", r"c\.csv: a second caption for 'a.mp4', named 'a'; keep one"),
        ("c.csv", "file,caption,caption\na.mp4,x,y\nb.mp4,z,u\n", r"c\.csv: 2 columns named 'caption'; keep one"),
        ("c.json", '{"a.mp4": "x", "b": "y", "a.mp4": "z"}', "row 3: a second caption for 'a.mp4'"),
        ("c.jsonl", '{"file": "a.mp4", "caption": "x"}\n{"file": \n', r"c\.jsonl, line 2: not JSON"),
        (
            "c.csv",
            "file,caption\na.mp4,a dog, running\nb.mp4,x\n",
            "row 1: more values than columns, .*quote captions",
        ),
        ("c.csv", "file;caption\na.mp4;a dog, running\nb.mp4;x\n", "row 1: expected texts .* with commas between them"),
        ("c.jsonl", '"a.mp4"\n', "row 1: expected texts"),
        ("c.json", '{"a.mp4": 5, "b": "x"}', "row 1: expected texts"),
        ("c.jsonl", '{"file": "a.mp4", "caption": "x \\ud83d"}\n', r"row 1: 'x \\ud83d' cannot be written as UTF-8"),
        ("c.json", "5", r"c\.json is not valid json"),
        ("c.txt", "a.mp4 x", r"expected a file ending in \.csv, \.jsonl or \.json"),
    ],
)
def test_bad_captions_say_what_is_wrong(tmp_path, name, text, message):
    for video in ("a.mp4", "b.mp4"):
        write_bad(tmp_path / video)
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        FolderClips(tmp_path, captions=tmp_path / name)


def test_rows_by_the_name_with_and_without_suffix_may_be_of_two_files(tmp_path):
    captions = {"a.mp4": "x", "a": "y"}
    assert read_captions(write_captions(tmp_path / "c.json", captions), ["a.mov", "a.mp4"]) == {"a.mov": "y", "a.mp4": "x"}
    assert read_captions(tmp_path / "c.json", ["a.mp4"], ["a.mp4", "a.png"]) == {"a.mp4": "x"}


def test_file_names_match_in_any_form_of_unicode(tmp_path):
    """macOS writes the accents of file names apart."""
    names = [unicodedata.normalize("NFD", "é.mp4"), "ü.mp4"]
    rows = {unicodedata.normalize("NFC", "é"): "x", unicodedata.normalize("NFD", "ü.mp4"): "y"}
    assert read_captions(write_captions(tmp_path / "c.csv", rows), names) == {names[0]: "x", names[1]: "y"}


@pytest.mark.parametrize("kind", ["csv", "txt"])
def test_captions_without_words_are_told_once(tmp_path, kind):
    captions = {"a.mp4": "", "b.mp4": " ", "c.mp4": "a cat"}
    for name, caption in captions.items():
        (tmp_path / name).touch()
        if kind == "txt":
            (tmp_path / name).with_suffix(".txt").write_text(caption)
    if kind == "csv":
        write_captions(tmp_path / "captions.csv", captions)
    with pytest.warns(UserWarning, match="2 of 3 files in .* have an empty caption or none, such as 'a.mp4'") as told:
        FolderClips(tmp_path), FolderClips(tmp_path, "val")
    assert len(told) == 1


def test_captions_in_texts_beside_the_files(tmp_path):
    names = ["a.mp4", "deep/b.mp4"]
    assert captions_beside(tmp_path, names) == {}
    (tmp_path / "deep").mkdir()
    (tmp_path / "a.txt").write_text("a red ball,\nmoving\n")
    with pytest.raises(ValueError, match="1 of 2 files have no caption in a .txt beside them, such as 'deep/b.mp4'"):
        captions_beside(tmp_path, names)
    (tmp_path / "deep" / "b.txt").write_text("\ufeffa blue star")
    assert captions_beside(tmp_path, names) == {"a.mp4": "a red ball, moving", "deep/b.mp4": "a blue star"}


@pytest.mark.parametrize("name", ["Captions.csv", "captions.CSV", "a.TXT"])
def test_names_of_caption_files_may_have_capitals(tmp_path, name):
    (tmp_path / "a.MP4").touch()
    (tmp_path / name).write_text("a red ball" if name == "a.TXT" else "file,caption\na.MP4,a red ball\n")
    assert FolderClips(tmp_path).words("a.MP4")["caption"] == "a red ball"


def test_of_several_tables_of_captions_one_is_to_be_named(tmp_path):
    (tmp_path / "a.mp4").touch()
    (tmp_path / "captions.csv").write_text("file,caption\na.mp4,a red ball\n")
    (tmp_path / "captions.json").write_text('{"a.mp4": "a blue star"}')
    with pytest.raises(ValueError, match="holds several tables of captions, captions.csv and captions.json; keep one"):
        FolderClips(tmp_path)
    assert FolderClips(tmp_path, captions=tmp_path / "captions.json").words("a.mp4")["caption"] == "a blue star"


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
