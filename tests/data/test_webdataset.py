"""WebDataset shards: the same clips as from a folder, and errors."""

from __future__ import annotations

import gc
import io
import itertools
import json
import multiprocessing
import os
import re
import socket
import tarfile
import threading
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from torch.utils.data import DataLoader, Subset

from callbacks import RunSummary
from kit.cli import main
from kit.data import decode, webdataset
from kit.data.bucketed import BucketClips
from kit.data.buckets import Bucket
from kit.data.clips import FolderClips
from kit.data.datamodule import ClipDataModule
from kit.data.heads import read_heads
from kit.data.mixture import Mixture
from kit.data.shapes import Shapes
from kit.data.webdataset import ShardClips, list_shards, read_member, written_out
from kit.files import written_aside
from kit.media import write_video
from tests.fixtures import CLIP, QUICK, TOKENIZER

SHAPE = dict(frames=5, height=32, width=32)


pytestmark = pytest.mark.usefixtures("empty_cache")


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    for i in range(12):
        write_video(Shapes(frames=9, height=32, width=32, fps=8.0)[i]["video"], folder / f"{i:02d}.mp4", 8.0)
    return folder


def pack(path: Path, files: dict[str, bytes] | list[tuple[str, bytes]], **how):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **how) as tar:
        for name, contents in files.items() if isinstance(files, dict) else files:
            member = tarfile.TarInfo(name)
            member.size = len(contents)
            tar.addfile(member, io.BytesIO(contents))


@pytest.fixture
def packed(videos, tmp_path) -> Path:
    """Three shards of four clips; captions of two kinds, and classes."""
    for shard in range(3):
        files = {}
        for path in sorted(videos.glob("*.mp4"))[4 * shard : 4 * shard + 4]:
            files[f"{path.stem}.mp4"] = path.read_bytes()
            words = f"clip {path.stem}"
            kind, words = (".json", json.dumps({"caption": words})) if shard else (".txt", f"{words}\n")
            files[path.stem + kind] = words.encode()
            files[f"{path.stem}.cls"] = str(int(path.stem) % 2).encode()
        pack(tmp_path / "shards" / f"train-{shard}.tar", files)
    return tmp_path / "shards"


@pytest.mark.parametrize("given", [{"captions": "a.csv"}, {"label_from": "folder"}, {"filename_pattern": "(?P<label>.)"}])
def test_words_from_elsewhere_are_refused(packed, given):
    (key,) = given
    with pytest.raises(ValueError, match=f"{key}=.*: ShardClips does not use it; leave it out"):
        ShardClips(packed, **given, **SHAPE)


def test_items_are_those_of_the_files(packed, videos):
    source, files = ShardClips(packed, "all", **SHAPE), FolderClips(videos, "all", **SHAPE)
    assert [Path(name).name for name in source.files] == files.files
    assert source.captioned and source.classes == ("0", "1") and source.native_fps == files.native_fps
    for n in (0, 5, 11, 12):
        item = source[n]
        assert torch.equal(item["video"], files[n]["video"])
        assert item["caption"] == f"clip {n % 12:02d}" and item["label"] == n % 2


def test_their_clips_are_sorted_into_buckets_too(packed, videos, tmp_path):
    wide = torch.zeros(3, 6, 32, 64)
    pack(packed / "train-3.tar", {"wide.mp4": write_video(wide, tmp_path / "wide.mp4", 8.0).read_bytes()})
    clips = BucketClips(ShardClips(packed, "all", **SHAPE), [Bucket(5, 16, 32, 2), Bucket(9, 32, 32, 1)])
    assert clips.count == [1, 12] and clips[0]["video"].shape == (3, 5, 16, 32)
    files = FolderClips(videos, "all", 9, 32, 32)
    number = [Path(name).name for name in clips.parts[1].files].index(Path(clips.parts[1].file(0)).name)
    assert torch.equal(clips[1]["video"], files[number]["video"])


def test_splits_share_no_clip_and_epochs_go_shard_by_shard(packed):
    train, val = (ShardClips(packed, split, val_every=4, **SHAPE) for split in ("train", "val"))
    assert len(train.files) == 9 and len(val.files) == 3 and not set(train.files) & set(val.files)
    epochs = [[train.file(9 * epoch + i) for i in range(9)] for epoch in range(4)]
    for epoch in epochs:
        assert sorted(epoch) == sorted(train.files)
        assert len(list(itertools.groupby(train.members[name].shard for name in epoch))) == 3
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert len({train.members[epoch[0]].shard for epoch in epochs + [[train.file(9 * e)] for e in range(4, 20)]}) == 3


def test_a_part_of_the_files_is_gone_through_each_epoch(packed):
    """Such as those of a bucket."""
    train = ShardClips(packed, "train", val_every=4, **SHAPE)
    part = train.part(train.files[::2], 5, 16, 32)
    count = len(part.files)
    for epoch in range(3):
        assert sorted(part.file(epoch * count + i) for i in range(count)) == sorted(part.files)
    other = ShardClips(packed, "train", val_every=4, seed=1, **SHAPE)
    assert [other.file(n) for n in range(36)] != [train.file(n) for n in range(36)]


def test_a_shard_of_the_same_size_that_was_packed_anew_is_read_anew(videos, tmp_path):
    video, shard = (videos / "00.mp4").read_bytes(), tmp_path / "shards" / "a.tar"
    for seconds, caption in enumerate(("a dog", "a cat"), start=1):
        pack(shard, {"a.mp4": video, "a.txt": caption.encode()})
        os.utime(shard, (seconds, seconds))
        (words,) = ShardClips(shard.parent, "all", **SHAPE).texts()
        assert words["caption"] == caption


def test_a_shard_of_another_size_and_the_same_time_is_read_anew(tmp_path):
    files = {"a.mp4": b"a" * 20_000, "b.mp4": b"b" * 20_000}
    for count in (1, 2):
        pack(shard := tmp_path / "shards" / "a.tar", dict(list(files.items())[:count]))
        os.utime(shard, (1, 1))
        assert len(ShardClips(shard.parent, "all", **SHAPE).files) == count


def test_of_small_shards_some_hold_one_clip_out(tmp_path):
    for number in range(24):
        pack(tmp_path / "shards" / f"{number}.tar", {"a.mp4": b""})
    held_out, train = (ShardClips(tmp_path / "shards", split, val_every=4, **SHAPE).files for split in ("val", "train"))
    assert 0 < len(held_out) < 20 and len(held_out) + len(train) == 24


def test_held_out_clips_that_are_looked_at_are_of_all_shards(tmp_path):
    for shard in range(8):
        pack(tmp_path / f"{shard}.tar", {f"{n:02d}.mp4": b"x" for n in range(20)})
    val = ShardClips(str(tmp_path), "val", frames=1)
    assert len({val.members[val.file(n)].shard for n in range(12)}) > 4 and len(val.files) == 32
    assert {val.file(n) for n in range(32)} == set(val.files)


def test_bytes_that_a_storage_does_not_give_are_missed(packed):
    member = next(iter(ShardClips(packed, "all", **SHAPE).members.values()))
    assert len(read_member(member)) == member.size
    with pytest.raises(OSError, match="bytes came in place of 10000000; does the server answer requests of a Range"):
        read_member(member._replace(size=10_000_000))


def test_a_lost_shard_moves_no_clip_of_the_others_to_another_split(packed):
    held_out = set(ShardClips(packed, "val", val_every=3, **SHAPE).files)  # no divisor of a shard's 4 clips
    assert 3 <= len(held_out) <= 6
    (packed / "train-0.tar").write_bytes(b"lost")
    with pytest.warns(UserWarning, match="the shard .*train-0.tar is broken"):
        train = set(ShardClips(packed, "train", val_every=3, **SHAPE).files)
    assert 4 <= len(train) <= 6 and not train & held_out


def test_processes_that_begin_together_find_the_same(packed, monkeypatch):
    """Ranks of a training start at once with an empty cache folder and a slow disk."""

    def write_slowly(path, value):
        with written_aside(path) as aside:
            aside.write_text(json.dumps(value))
            time.sleep(0.2)

    monkeypatch.setattr(webdataset, "write_json", write_slowly)
    with ProcessPoolExecutor(4, multiprocessing.get_context("fork")) as pool:
        found = [pool.submit(files_of, str(packed)) for _ in range(4)]
        assert [future.result() for future in found] == [ShardClips(packed, "all", **SHAPE).files] * 4


def files_of(root: str) -> list[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return ShardClips(root, "all", **SHAPE).files


def test_no_room_for_an_index_is_no_damage_of_a_shard(packed, monkeypatch):
    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(webdataset, "write_json", full)
    with pytest.raises(OSError, match="No space left"):
        ShardClips(packed, "all", **SHAPE)


def test_no_room_to_unpack_a_clip_is_no_damage_of_it(packed, monkeypatch):
    """Else a training would go on without the larger clips."""
    pack(packed / "large.tar", {"large.mp4": bytes(20_000)})
    source = ShardClips(packed / "large.tar", "all", patience=None, **SHAPE)
    monkeypatch.setattr(webdataset.tempfile, "NamedTemporaryFile", lambda **_: open("/dev/full", "wb"))
    with pytest.raises(OSError, match="No space left"):
        source[0]
    assert not source.unreadable


def test_workers_give_the_same_items(packed):
    source = ShardClips(packed, "train", **SHAPE)
    expected = torch.stack([source[n]["video"] for n in range(12)])
    gc.collect()  # as in test_decoder_process.py
    loader = DataLoader(Subset(source, range(12)), batch_size=3, num_workers=2, multiprocessing_context="fork")
    assert torch.equal(torch.cat([batch["video"] for batch in loader]), expected)


def test_shards_in_object_storage_and_by_pattern(packed):
    """Uses the in-memory storage of fsspec."""
    storage = fsspec.filesystem("memory")
    for path in packed.iterdir():
        storage.pipe(f"/bucket/{path.name}", path.read_bytes())
    here, there = ShardClips(packed, "all", **SHAPE), ShardClips("memory://bucket", "all", **SHAPE)
    assert there.files[0] == "memory:///bucket/train-0.tar/00.mp4"
    assert torch.equal(there[7]["video"], here[7]["video"])
    assert list_shards("memory://bucket/train-[01].tar*") == ["memory:///bucket/train-0.tar", "memory:///bucket/train-1.tar"]
    assert len(ShardClips(str(packed / "train-2.tar"), "all", **SHAPE).files) == 4


class Shards(ThreadingHTTPServer):
    """Serves the files of a folder by ranges of their bytes, without a list of them.

    Attributes: asked, the range of each GET; cut, number of bytes after which an answer ends, while it is set.
    """

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), Range)
        self.folder, self.asked, self.cut = folder, [], None
        self.address = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, *_):
        """Says nothing of clients that end a connection."""


class Range(BaseHTTPRequestHandler):
    def do_HEAD(self):
        path = self.server.folder / self.path[1:]
        if not path.is_file():
            self.send_error(404)
            return b""
        contents, wanted = path.read_bytes(), self.headers.get("Range")
        first, last = re.fullmatch(r"bytes=(\d+)-(\d+)", wanted).groups() if wanted else (0, len(contents) - 1)
        part = contents[int(first) : int(last) + 1]
        self.send_response(206 if wanted else 200)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(part)))
        self.send_header("Last-Modified", self.date_time_string(path.stat().st_mtime))
        if wanted:
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(contents)}")
        self.end_headers()
        return part

    def do_GET(self):
        part = self.do_HEAD()
        self.server.asked.append(len(part))
        self.wfile.write(part[: self.server.cut])

    def log_message(self, *_):
        """Keeps the tests' output clean."""


@pytest.fixture
def decoded_here(monkeypatch):
    """Decodes files in the process that asks, whatever its patience with storage: another takes seconds to start."""
    monkeypatch.setattr("kit.data.clips.open_video", lambda path, backend, _: decode.open_video(path, backend))


@pytest.fixture
def server(packed, decoded_here, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = Shards(packed)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_shards_over_http(packed, server):
    """In a loader's worker too; of a clip just its own bytes come."""
    here = ShardClips(packed, "all", **SHAPE)
    there = ShardClips(f"{server.address}/train-{{0..2}}.tar", "all", **SHAPE)
    assert there.files == [f"{server.address}/{Path(name).parent.name}/{Path(name).name}" for name in here.files]
    server.asked.clear()
    gc.collect()
    (batch,) = DataLoader(Subset(there, [7]), num_workers=1, multiprocessing_context="fork")
    assert torch.equal(batch["video"][0], here[7]["video"]) and batch["caption"] == ["clip 07"]
    assert server.asked == [there.bytes_of(there.files[7])]


def test_a_shard_packed_anew_is_read_anew_where_no_time_is_told(packed, server, monkeypatch):
    """A server need not send one; the first header then tells of the change."""
    monkeypatch.setattr(Range, "date_time_string", lambda *_: "")
    for seconds, caption in enumerate(("a dog", "a cat")):
        with tarfile.open(packed / "train-0.tar", "w") as tar:
            for name, contents in (("a.mp4", b"video"), ("a.txt", caption.encode())):
                member = tarfile.TarInfo(name)
                member.size, member.mtime = len(contents), seconds
                tar.addfile(member, io.BytesIO(contents))
        (words,) = ShardClips(f"{server.address}/train-0.tar", "all", **SHAPE).texts()
        assert words["caption"] == caption


def test_a_connection_that_is_cut_off_costs_the_clip(packed, server):
    source = ShardClips(f"{server.address}/train-1.tar", "all", patience=None, **SHAPE)
    server.cut = 100
    with pytest.raises(OSError, match="cannot reach .*train-2.tar"):  # which is not broken
        ShardClips(f"{server.address}/train-2.tar", "all", **SHAPE)
    (place, *_) = source.files
    with pytest.warns(UserWarning, match=rf"cannot read the video {place}: Client\w*Error: "):
        assert source._read(place) is None
    server.cut = None
    assert source._read(place) is not None, "it is tried again"
    assert source.unreadable == [place] == [f"{server.address}/train-1.tar/04.mp4"]


def test_a_connection_that_is_cut_off_leaves_no_clip_out_of_the_buckets(server):
    """The sizes of clips are kept: one that did not come while they were read would be left out of all trainings."""
    source = ShardClips(f"{server.address}/train-1.tar", "all", patience=None, **SHAPE)
    server.cut = 100
    with pytest.raises(OSError, match=rf"cannot reach {source.files[0]} \(Client\w*Error: .*try again"):
        read_heads(source)
    server.cut = None
    assert list(read_heads(source)) == source.files


@pytest.mark.parametrize("root, told", [("train-{0..3}.tar", "train-3.tar"), ("train-*.tar", "train-*.tar")])
def test_shards_that_are_not_there_are_told(server, root, told):
    with pytest.raises(OSError, match=f"{re.escape(f'{server.address}/{told}')}"):
        ShardClips(f"{server.address}/{root}", "all", **SHAPE)


def test_a_server_that_is_down_is_told(tmp_path, capsys):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{unused.getsockname()[1]}"
    for root in ("train-*.tar", ""):
        with pytest.raises(OSError, match=re.escape(f"cannot reach {address}/{root} (Client")):
            ShardClips(f"{address}/{root}", **SHAPE)
    words = [f"root={tmp_path}", "data=shards", f"data.root={address}/train-{{0..2}}.tar", *CLIP, *TOKENIZER, *QUICK]
    assert main(["fit", "conf=stage1_tokenizer", *words]) == 1
    told = capsys.readouterr().err
    assert f"cannot reach {address}/train-0.tar (Client" in told and "Cannot connect to host" in told


def test_numbers_in_braces_are_written_out():
    assert written_out("a-{08..11}-{1..2}.tar") == [f"a-{i}-{j}.tar" for i in ("08", "09", "10", "11") for j in (1, 2)]
    assert written_out("a-{3..3}.tar") == ["a-3.tar"]
    assert written_out("{a..b}/{1,2}.tar") == ["{a..b}/{1,2}.tar"]
    with pytest.raises(ValueError, match=re.escape("data.root=a-{11..08}.tar: {11..08} holds no number")):
        ShardClips("a-{11..08}.tar", **SHAPE)


def test_brackets_may_be_part_of_a_name(tmp_path):
    shard = tmp_path / "clips [1]" / "a.tar"
    shard.parent.mkdir()
    shard.touch()
    assert list_shards(str(shard.parent)) == list_shards(str(shard)) == [str(shard)]
    assert list_shards(f"{tmp_path}/*/[ab].tar") == [str(shard)]
    assert list_shards(f"{shard.parent}/[ab]*.tar") == [str(shard)]


def test_hidden_files_are_no_clips(packed, videos):
    """Tars that are made on a Mac have a ._a.mp4 for a.mp4, which is no video."""
    clip = (videos / "00.mp4").read_bytes()
    pack(packed / "train-0.tar", {"./._00.mp4": b"attributes", "./00.mp4": clip, ".trash/01.mp4": clip, "._00.txt": b"\xff"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        files = ShardClips(packed / "train-0.tar", "all", **SHAPE).files
    assert files == [f"{packed}/train-0.tar/./00.mp4"]


def test_a_shard_is_read_through_once(packed, monkeypatch):
    ShardClips(packed, "all", **SHAPE)
    monkeypatch.setattr(webdataset.tarfile, "open", lambda *a, **k: pytest.fail("read through again"))
    ShardClips(packed, "all", **SHAPE)
    monkeypatch.undo()
    monkeypatch.setenv("KIT_CACHE", str(packed.parent / "cache"))
    pack(packed / "train-0.tar", {"new.gif": b"bytes"})
    assert any(name.endswith("new.gif") for name in ShardClips(packed, "all", **SHAPE).files)


def words_of(tmp_path, files: dict[str, bytes] | list[tuple[str, bytes]]) -> tuple[dict, list[str]]:
    """Captions of the clips of a shard with these files, and the warnings, but for their beginnings."""
    pack(tmp_path / "shards" / "a.tar", files)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        source = ShardClips(tmp_path / "shards", "train", **SHAPE)
        ShardClips(tmp_path / "shards", "val", **SHAPE)
    captions = {Path(name).name: source.words(name)["caption"] for name in source.members}
    return captions, [str(warning.message).replace(f"{tmp_path}/shards", "DIR") for warning in caught]


@pytest.mark.parametrize(
    ("words", "caption", "told"),
    [
        ({"b.txt": b"\xef\xbb\xbftwo\r\n"}, "two", ""),
        ({"b.json": b'\xef\xbb\xbf{"caption": " two"}'}, "two", ""),
        ({"b.txt": b"two", "b.json": b'{"caption": "three"}'}, "two", ""),
        (
            {"b.txt": b"\xff\xfetwo"},
            "",
            "1 of 2 clips in the shards DIR have a .txt that is not UTF-8, such as DIR/a.tar/b.mp4; ",
        ),
        ({"b.json": b"{x"}, "", "1 of 2 clips in the shards DIR have a .json without a text as its `caption`, such as"),
        ({"b.json": b'{"caption": 5}'}, "", "have a .json without a text as its `caption`"),
        ({"b.json": b'{"caption": "\\ud800"}'}, "", "have a .json without a text as its `caption`"),
        ({"b.json": b'["two"]'}, "", "have a .json without a text as its `caption`"),
        ({"b.json": b'{"width": 5}'}, "", "have a .json without a text as its `caption`"),
        ({"b.json": b'{"width": 5, "prompt": "two"}'}, "two", ""),
        ({"b.txt": b" ", "b.json": b'{"text": "two"}'}, "two", ""),
        ({"b.txt": b"", "b.json": b'{"width": 5}'}, "", "1 of 2 files in DIR have an empty caption or none, such as"),
        ({}, "", "1 of 2 files in DIR have an empty caption or none"),
        (
            {"b.txt": b"two", "b.cls": b"x"},
            "two",
            "1 of 2 clips in the shards DIR have no class, such as DIR/a.tar/a.mp4, so",
        ),
    ],
)
def test_words_that_are_wrong_are_told_and_not_taken(tmp_path, words, caption, told):
    found, warned = words_of(tmp_path, {"a.mp4": b"", "a.txt": b"one", "b.mp4": b"", **words})
    assert found == {"a.mp4": "one", "b.mp4": caption}
    assert len([text for text in warned if told in text]) == bool(told) and (told or not warned), warned


def test_pictures_beside_videos_are_no_clips_of_several_frames(tmp_path):
    assert set(words_of(tmp_path, {"a.mp4": b"", "a.txt": b"one", "b.jpg": b""})[0]) == {"a.mp4"}


def test_the_videos_of_a_sample_share_its_words(tmp_path):
    """WebDataset's key ends at the name's first point; `left.mp4` and `right.mp4` are fields of a sample."""
    files = {
        "x.y/1.left.mp4": b"",
        "x.y/1.right.mp4": b"",
        "x.y/1.txt": b"one",
        "x.y/1.right.txt": b"its own",
        "y/1.mp4": b"",
    }
    found, _ = words_of(tmp_path, files | {"y/1.txt": b"two"})
    assert found == {"1.left.mp4": "one", "1.right.mp4": "its own", "1.mp4": "two"}


@pytest.mark.parametrize("words", ["A.TXT", "A.Json"])
def test_suffixes_of_words_may_be_capitals_as_those_of_videos(tmp_path, words):
    assert words_of(tmp_path, {"A.MP4": b"", words: b'"one"'})[0] == {"A.MP4": "one" if words == "A.Json" else '"one"'}


def test_names_that_come_twice_are_told(tmp_path):
    files = [("a.mp4", b""), ("a.txt", b"one"), ("b.mp4", b""), ("b.txt", b"b"), ("a.mp4", b"new"), ("a.txt", b"two")]
    found, (told,) = words_of(tmp_path, files)
    assert found == {"a.mp4": "two", "b.mp4": "b"}
    assert "1 of 2 clips in the shards DIR have a name that comes more than once in its shard, where the last counts" in told


def test_indexes_of_another_meaning_are_not_taken(packed, tmp_path, monkeypatch):
    with monkeypatch.context() as before:
        before.setattr(webdataset, "INDEX", 1)
        before.setattr(webdataset, "read_index", lambda *_: {"a.mp4": [0, 1, "\ufeffone", None]})
        webdataset.index_of(str(packed / "train-0.tar"))
    assert "a.mp4" not in webdataset.index_of(str(packed / "train-0.tar"))


def test_names_in_another_encoding_are_read(tmp_path):
    pack(tmp_path / "shards" / "a.tar", {"caf\udce9.mp4": b"", "caf\udce9.txt": b"one"}, format=tarfile.GNU_FORMAT)
    source = ShardClips(tmp_path / "shards", "train", **SHAPE)
    assert [source.words(name)["caption"] for name in source.files] == ["one"]


def test_damage_costs_what_is_damaged(packed):
    whole = ShardClips(packed, "all", **SHAPE)
    expected = whole[5]["video"]
    cut, changed = packed / "train-0.tar", packed / "train-1.tar"
    cut.write_bytes(cut.read_bytes()[:1000])
    place = whole.members[whole.files[4]]
    contents = bytearray(changed.read_bytes())
    contents[place.offset : place.offset + place.size] = bytes(place.size)
    changed.write_bytes(contents)
    with pytest.warns(UserWarning, match="the shard .*train-0.tar is broken"):
        source = ShardClips(packed, "all", **SHAPE)
    assert len(source.files) == 8
    with pytest.warns(UserWarning, match=r"cannot read the video .*train-1.tar/04.mp4"):
        assert torch.equal(source[0]["video"], expected), "the next one takes its place"
    assert source.unreadable == [f"{packed}/train-0.tar", f"{packed}/train-1.tar/04.mp4"]


@pytest.mark.parametrize("how", ["cut", "damaged"])
def test_a_header_in_its_midst_that_cannot_be_read_is_not_the_end_of_a_shard(packed, how):
    """tarfile takes it for the end."""
    shard, contents = packed / "train-0.tar", bytearray((packed / "train-0.tar").read_bytes())
    with tarfile.open(shard) as tar:
        at = tar.getmember("02.mp4").offset
    contents[at + 100 : len(contents) if how == "cut" else at + 200] = b"" if how == "cut" else bytes(100)
    shard.write_bytes(contents)
    with pytest.warns(
        UserWarning, match=f"train-0.tar is broken: it has a damaged or cut header at byte {at}. It is left out"
    ):
        assert len(ShardClips(packed, "all", **SHAPE).files) == 8


def test_shards_joined_with_cat_are_read_to_the_end_of_the_last(packed):
    """tarfile ends at the first one's end, where tar writes zeros up to a whole 10 KiB."""
    whole, shards = ShardClips(packed, "all", **SHAPE), sorted(packed.iterdir())
    joined = packed / "joined" / "a.tar"
    joined.parent.mkdir()
    joined.write_bytes(b"".join(shard.read_bytes() for shard in shards))
    source = ShardClips(joined, "all", **SHAPE)
    assert [Path(name).name for name in source.files] == [Path(name).name for name in whole.files]
    for n in (0, 11):
        assert torch.equal(source[n]["video"], whole[n]["video"]) and source[n]["caption"] == f"clip {n:02d}"


def test_a_hole_is_not_the_end_of_a_shard(packed):
    """As in a download that went on elsewhere in the file."""
    shard = packed / "train-0.tar"
    contents = bytearray(shard.read_bytes())
    with tarfile.open(shard) as tar:
        at = tar.getmember("02.mp4").offset
    contents[at : at + 1024] = bytes(1024)
    shard.write_bytes(contents)
    with pytest.warns(UserWarning, match="train-0.tar is broken"):
        assert len(ShardClips(packed, "all", **SHAPE).files) == 8


def test_checkpoints_know_shards_that_were_moved(packed, tmp_path):
    """Else their held-out clips would be told to be others, some of which were trained on."""

    def settings(root: Path) -> dict:
        source = partial(Mixture, weights={"a": 1}, sources={"a": partial(ShardClips, root, patience=None)})
        return ClipDataModule(source, 5, 32, 32, 8.0, batch_size=1, val_clips=1, workers=0).settings

    before = settings(packed)
    assert settings(packed.rename(tmp_path / "elsewhere")) == before


def test_broken_shards_are_in_the_summary_of_a_run(packed, caplog):
    for shard in ("train-0.tar", "train-2.tar"):
        (packed / shard).write_bytes((packed / shard).read_bytes()[:1000])
    source = partial(ShardClips, packed, patience=None)
    with pytest.warns(UserWarning, match="is broken"):
        data = ClipDataModule(source, 5, 32, 32, 8.0, batch_size=1, val_clips=1, workers=0)
    RunSummary().on_fit_end(SimpleNamespace(datamodule=data), None)
    assert f"2 unreadable files were passed over: {packed}/train-0.tar, {packed}/train-2.tar" in caplog.text


class Hanging(MemoryFileSystem):
    """Storage that answers about a file only once `answers` is set, if its name is in `hung`."""

    protocol, hung, answers = "hanging", set(), threading.Event()

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.replace("hanging://", "memory://"))

    def cat_file(self, path, *args, **kwargs):
        if any(path.endswith(name) for name in self.hung):
            self.answers.wait()
        return super().cat_file(path, *args, **kwargs)


@pytest.fixture
def hanging(packed, decoded_here, monkeypatch):
    """The shards in a storage of which the first one's clips do not come."""
    fsspec.register_implementation("hanging", Hanging, clobber=True)
    storage = fsspec.filesystem("hanging")
    for path in packed.iterdir():
        storage.pipe(f"/bucket/{path.name}", path.read_bytes())
    source = ShardClips("hanging://bucket", "all", patience=0.2, **SHAPE)
    monkeypatch.setattr(Hanging, "answers", threading.Event())
    monkeypatch.setattr(Hanging, "hung", {"train-0.tar"})
    yield source
    Hanging.answers.set()


def test_storage_that_hangs_costs_its_clips_and_not_the_training(hanging, packed):
    """In a loader's worker too, which ends although a read hangs in it."""
    expected = ShardClips(packed, "all", **SHAPE)[4]["video"]
    gc.collect()
    (batch,) = DataLoader(Subset(hanging, [3]), num_workers=1, multiprocessing_context="fork")
    assert torch.equal(batch["video"][0], expected), "the next one takes its place"
    assert hanging.unreadable == ["hanging:///bucket/train-0.tar/03.mp4"]
    with pytest.warns(UserWarning, match="01.mp4: TimeoutError: it took more than 0.2 s to fetch"):
        hanging._read(hanging.files[1])
    Hanging.answers.set()
    assert hanging._read(hanging.files[1]) is not None, "it is tried again"


def test_storage_that_is_gone_ends_the_training(hanging, monkeypatch):
    monkeypatch.setattr("kit.data.patience.HUNG", 1)
    with (
        pytest.warns(UserWarning),
        pytest.raises(OSError, match="1 reads .* last of hanging:.*train-0.tar; ckpt=last resumes"),
    ):
        hanging[0]


@pytest.mark.parametrize(
    ("call", "place"),
    [("glob", "bucket"), ("exists", "bucket[1]"), ("info", "bucket/train-0.tar"), ("open", "bucket/train-0.tar")],
)
def test_storage_that_hangs_is_told_at_the_start(hanging, monkeypatch, call, place):
    """Whether it does not list its shards, or says nothing of one."""
    monkeypatch.setattr(Hanging, call, lambda self, *_, **__: self.answers.wait())
    monkeypatch.setenv("KIT_CACHE", f"{os.environ['KIT_CACHE']}_anew")
    why = "TimeoutError: it took more than 0.2 s to fetch"
    with pytest.raises(OSError, match=rf"cannot reach hanging:///?{re.escape(place)} \({why}\); try again"):
        ShardClips(f"hanging://{place}", "all", patience=0.2, **SHAPE)


@pytest.mark.parametrize("call", ["info", "open"])
def test_a_shard_that_cannot_be_reached_is_not_left_out(packed, monkeypatch, call):
    """It raises an error: another process might reach the shard, and would then train on other clips."""

    def times_out(*_, **__):
        raise TimeoutError("no answer")

    monkeypatch.setattr(webdataset, "list_shards", lambda *_: [str(packed / "train-0.tar")])
    monkeypatch.setattr(fsspec.implementations.local.LocalFileSystem, call, times_out)
    with pytest.raises(OSError, match=r"cannot reach .*train-0.tar \(TimeoutError: no answer\); try again"):
        ShardClips(packed, "all", **SHAPE)


def test_what_is_no_shard_is_told(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no \.tar there"):
        ShardClips(tmp_path, **SHAPE)
    pack(tmp_path / "a.tar", {"a.txt": b"words"})
    with pytest.raises(FileNotFoundError, match="no clips in its shards"):
        ShardClips(tmp_path, **SHAPE)


def test_a_tokenizer_trains_on_shards(packed, tmp_path):
    words = [f"root={tmp_path}", "data=shards", f"data.root={packed}", *CLIP, *TOKENIZER, *QUICK, "recipe.tokenizer.steps=3"]
    assert main(["fit", "conf=stage1_tokenizer", *words, "data.workers=1"]) == 0
