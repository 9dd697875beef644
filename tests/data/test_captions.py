"""Captions of a folder's files: tables of several kinds, and files beside the videos."""

from __future__ import annotations

import json
import unicodedata
import warnings
from pathlib import Path

import pytest
from PIL import Image

from kit.data.captions import captions_beside, read_captions
from kit.data.clips import FolderClips
from tests.data.videos import write, write_bad


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
        ("c.csv", "file,words\na.mp4,hello\n", r"c\.csv, row 1: expected texts named `file` and `caption`.*words"),
        ("c.csv", "file,caption\na.mp4,x\nb.mp4\n", "row 2: expected texts"),
        (
            "c.csv",
            "file,caption\nzebra.mp4,z\n",
            "has 1 captions, such as 'zebra.mp4', none of them for a file",
        ),
        ("c.csv", "file,caption\n", "has 0 captions, none of them for a file"),
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
        ("c.txt", "a.mp4 x", r"expected a file ending in \.csv, \.jsonl or \.json, or a \.txt with videos.txt beside it"),
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


def test_a_table_may_have_captions_of_pictures_too(tmp_path):
    for name in ("a.mp4", "b.mp4"):
        write(tmp_path / name, count=2)
    Image.new("RGB", (32, 32)).save(tmp_path / "p0.png")
    write_captions(tmp_path / "captions.csv", {"a.mp4": "x", "b": "y", "p0": "z"})
    for frames, name, caption in ((2, "b.mp4", "y"), (1, "p0.png", "z")):
        assert FolderClips(tmp_path, frames=frames, split="all").words(name)["caption"] == caption


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
    listed = ["a.txt", "deep/b.json", "deep/b.txt"]
    assert captions_beside(tmp_path, names, []) == {}
    (tmp_path / "deep").mkdir()
    (tmp_path / "a.txt").write_text("a red ball,\nmoving\n")
    (tmp_path / "deep" / "b.json").write_text('{"text": " a green cross"}')
    with pytest.warns(UserWarning, match="1 of 2 files have no caption in a .txt beside them, such as 'deep/b.mp4'"):
        assert captions_beside(tmp_path, names, listed[:1]) == {"a.mp4": "a red ball, moving"}
    assert captions_beside(tmp_path, names, listed[:2])["deep/b.mp4"] == "a green cross"
    (tmp_path / "deep" / "b.txt").write_text("\ufeffa blue star")
    assert captions_beside(tmp_path, names, listed) == {"a.mp4": "a red ball, moving", "deep/b.mp4": "a blue star"}
    (tmp_path / "deep" / "b.txt").write_text("")
    assert captions_beside(tmp_path, names, listed)["deep/b.mp4"] == "a green cross", "an empty text hides no other"
    (tmp_path / "deep" / "b.json").write_text('{"fps": 24}')
    assert captions_beside(tmp_path, names, listed)["deep/b.mp4"] == ""
    assert captions_beside(tmp_path, names, listed[1:2]) == {}, "a .json of other things is no caption"


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


KINDS = {  # how others lay out their captions of a.mp4 and v/b.mp4
    "Hugging Face": {"metadata.csv": "file_name,text\na.mp4,x\nv/b.mp4,y\n"},
    "Hugging Face, by line": {
        "metadata.jsonl": '{"file_name": "a.mp4", "caption": "x"}\n{"file_name": "v/b.mp4", "caption": "y"}\n'
    },
    "lists": {"prompts.txt": "x\ny\n", "videos.txt": "a.mp4\nv/b.mp4\n"},
    "beside": {"a.caption": "x", "v/b.caption": "y"},
    "bare names": {"captions.csv": "Video, Caption,score\na.mp4,x,1\nb.mp4,y,2\n"},
    "paths": {"captions.csv": "path,text\n./a.mp4,x\n{root}/v/b.mp4,y\n"},
    "a part of a larger set": {"captions.csv": "file,caption\na.mp4,x\nv/b.mp4,y\nv/c.mp4,z\n"},
}


def lay_out(root: Path, files: dict[str, str]):
    for name in ("a.mp4", "v/b.mp4"):
        write(root / name, count=2)
    for name, text in files.items():
        (root / name).write_text(text.format(root=root) if "{root}" in text else text)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:.* has captions for 1 files that are not there, such as 'v/c.mp4'")
def test_captions_of_other_programs_are_read(tmp_path, kind):
    lay_out(tmp_path, KINDS[kind])
    clips = FolderClips(tmp_path, "all", frames=1)
    assert {name: clips.words(name)["caption"] for name in clips.files} == {"a.mp4": "x", "v/b.mp4": "y"}


def test_rows_without_a_file_and_files_without_a_row_are_told(tmp_path):
    path = write_captions(tmp_path / "c.csv", {"a.mp4": "x", "gone.mp4": "y", "lost.mp4": "z"})
    with pytest.warns(UserWarning) as told:
        assert read_captions(path, ["a.mp4", "b.mp4"]) == {"a.mp4": "x"}
    assert [str(warning.message) for warning in told] == [
        f"{path} has captions for 2 files that are not there, such as 'gone.mp4'",
        f"{path} has no caption for 1 of 2 files, such as 'b.mp4'; add their rows",
    ]


def test_a_bare_name_of_several_files_is_of_none(tmp_path):
    path = write_captions(tmp_path / "c.csv", {"a.mp4": "x", "v/b.mp4": "y", "c": "z"})
    with pytest.warns(UserWarning):
        assert read_captions(path, ["u/a.mp4", "v/a.mp4", "v/b.mp4", "w/c.mp4"]) == {"v/b.mp4": "y", "w/c.mp4": "z"}
    with pytest.raises(ValueError, match="row 2: a second caption for 'v/b'"):
        read_captions(write_captions(tmp_path / "c.json", {"b": "x", "v/b": "y"}), ["v/b.mp4"])


@pytest.mark.parametrize(
    "files",
    [
        {"metadata.csv": "file_name,label\na.mp4,0\nv/b.mp4,1\n"},
        {"OpenVid.tsv": "video\tcaption\na.mp4\tx\n"},
        {"v/captions.csv": "file,caption\nb.mp4,y\n"},
        {"prompts.txt": "x\ny\n"},
        {"train.parquet": ""},
    ],
    ids=lambda files: min(files),
)
def test_files_that_may_hold_captions_and_are_not_read_are_told(tmp_path, files):
    lay_out(tmp_path, files)
    with pytest.warns(UserWarning, match=f"{tmp_path} holds {min(files)}, in which no captions are looked for: a table"):
        assert not FolderClips(tmp_path, frames=1).captioned
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (tmp_path / min(files)).unlink()
        (tmp_path / "a.json").write_text('{"fps": 24}')  # of a video, such as a sidecar
        (tmp_path / "README.txt").touch()
        FolderClips(tmp_path, frames=1)


def test_lists_that_do_not_match_are_told(tmp_path):
    lay_out(tmp_path, {"prompts.txt": "x\n", "videos.txt": "a.mp4\nv/b.mp4\n"})
    with pytest.warns(UserWarning, match="no captions are read: .*prompts.txt has 1 lines, .*videos.txt has 2; give one for"):
        FolderClips(tmp_path)
    with pytest.raises(ValueError, match="prompts.txt has 1 lines"):
        FolderClips(tmp_path, captions=tmp_path / "prompts.txt")


def test_a_path_that_is_there_is_that_file_also_where_it_begins_like_the_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = ["1.mp4", "2.mp4", "videos/1.mp4"]
    path = write_captions(tmp_path / "c.csv", {"videos/1.mp4": "x", "1.mp4": "y", "videos/2.mp4": "z"})
    assert read_captions(path, names, root=Path("videos")) == {"videos/1.mp4": "x", "1.mp4": "y", "2.mp4": "z"}


def test_texts_beside_the_files_count_before_tables_of_other_programs(tmp_path):
    lay_out(tmp_path, {"a.txt": "x", "v/b.txt": "y", "metadata.csv": "file_name,text\na.mp4,u\nv/b.mp4,w\n"})
    assert FolderClips(tmp_path, "all", frames=1).words("a.mp4")["caption"] == "x"
    (tmp_path / "captions.csv").write_text("file,caption\na.mp4,u\nv/b.mp4,w\n")
    assert FolderClips(tmp_path, "all", frames=1).words("a.mp4")["caption"] == "u"


@pytest.mark.parametrize(
    ("name", "contents", "told"),
    [
        (
            "metadata.csv",
            "file_name,text\nfür.mp4,x\n".encode("latin-1"),
            "no captions are read: .*metadata.csv is not valid",
        ),
        ("metadata.jsonl", b"{\n}", "no captions are read: .*metadata.jsonl, line 1: not JSON"),
        ("metadata.csv", b"path,text\nindex.html,x\n", "no captions are read: .*none of them for a file that is there"),
        ("metadata.csv", None, "no captions are read: .*metadata.csv.* is not a file"),
        ("a.json", b'{"caption": "f\xfcr"}', ""),
    ],
    ids=["encoding", "json", "other things", "broken link", "beside"],
)
@pytest.mark.filterwarnings("error")
def test_files_of_other_things_do_not_end_the_start(tmp_path, name, contents, told):
    lay_out(tmp_path, {})
    if contents is None:
        (tmp_path / name).symlink_to(tmp_path / "gone")
    else:
        (tmp_path / name).write_bytes(contents)
    (tmp_path / "v" / "b.txt").symlink_to(tmp_path / "gone")
    if not told:
        assert not FolderClips(tmp_path, frames=1).captioned
        return
    with pytest.warns(UserWarning, match=told):
        assert not FolderClips(tmp_path, frames=1).captioned
    assert not FolderClips(tmp_path, frames=1, captions=False).captioned, "not even looked at"


def test_pictures_elsewhere_do_not_take_a_bare_name(tmp_path):
    path = write_captions(tmp_path / "c.csv", {"a": "x", "thumbs/b": "y"})
    assert read_captions(path, ["v/a.mp4"], ["thumbs/a.jpg", "thumbs/b.jpg"]) == {"v/a.mp4": "x"}


def test_columns_that_are_not_read_may_stand_twice(tmp_path):
    (tmp_path / "c.csv").write_text("file,caption,path,path\na.mp4,x,y,z\n")
    assert read_captions(tmp_path / "c.csv", ["a.mp4"]) == {"a.mp4": "x"}


def test_what_a_split_to_validate_on_would_tell_is_kept(tmp_path):
    lay_out(tmp_path, {"captions.csv": "file,caption\na.mp4,x\n"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        val = FolderClips(tmp_path, "val", frames=1)
    assert "captions.csv has no caption for 1 of 2 files, such as 'v/b.mp4'" in val.untold[0]


def test_runs_of_kit_hold_no_captions(tmp_path):
    lay_out(tmp_path, {})
    (tmp_path / "run" / "config").mkdir(parents=True)
    (tmp_path / "run" / "config" / "overrides.yaml").touch()
    (tmp_path / "run" / "metrics.csv").touch()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert not FolderClips(tmp_path, frames=1).captioned
    assert told == []
    (tmp_path / "run" / "config" / "overrides.yaml").unlink()
    with pytest.warns(UserWarning, match="holds run/metrics.csv, in which no captions are looked for"):
        FolderClips(tmp_path, frames=1)
