"""Checkpoints, caches, shards, pictures and captions that strangers have made: nothing in them is executed, and none of them
takes the machine's memory or its files."""

from __future__ import annotations

import json
import tarfile
import tracemalloc
import warnings
from pathlib import Path

import pytest
import torch
from PIL import Image

from kit.build import build_data
from kit.checkpoint import load_tokenizer
from kit.cli import main
from kit.data import cache
from kit.data.captions import captions_beside, read_captions
from kit.data.decode import PictureDecoder, UnreadableVideo
from kit.data.webdataset import LONGEST, ShardClips, index_of
from kit.files import load_checked, read_json, save_checked, write_json, written_aside
from kit.sharded_checkpoint import load_whole
from tests.data.test_cache import write as write_cache
from tests.fixtures import composed
from tests.test_sharded_checkpoint import copied, saved  # noqa: F401, a fixture

DEEP = "[" * 100_000


def called(trace: Path) -> dict:
    """Values that hydra takes for a call, which writes a file."""
    path = {"_target_": "pathlib.Path", "_args_": [str(trace)]}
    return {"_target_": "kit.files.write_json", "path": path, "value": "called"}


def with_clip(path: Path, to: Path, **values) -> Path:
    """Writes a checkpoint as another, whole as kit saves it, with other values of its clips."""
    contents = load_checked(path)
    contents["hyper_parameters"]["clip"] |= values
    save_checked(contents, to)
    return to


@pytest.mark.parametrize("key", ["frames", "height", "fps"])
@pytest.mark.parametrize("verb", ["validate", "inspect", "reconstruct", "cache"])
def test_what_a_checkpoint_says_of_its_clips_calls_nothing(pair, tmp_path, capsys, verb, key):
    path = with_clip(pair.tokenizer, tmp_path / "tokenizer.ckpt", **{key: called(tmp_path / "trace")})
    word = "tokenizer_ckpt" if verb == "cache" else "ckpt"
    assert main([verb, f"{word}={path}", f"root={tmp_path / 'runs'}"]) == 1
    assert f"tokenizer.ckpt: clip: {key}={{'_target_'" in capsys.readouterr().err and not (tmp_path / "trace").exists()


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"fps": "${oc.env:HOME}"}, "clip: fps=${oc.env:HOME}; expected a number above 0"),
        ({"width": 0}, "clip: width=0; expected a whole number of 1 or more"),
        ({"fps": float("nan")}, "clip: fps=nan; expected a number above 0"),
        ([5, 8, 8], "clip is a list; expected frames, height, width and fps of clips"),
        ({}, "clip lacks frames, height, width, fps; expected"),
        (None, "t.ckpt: clip is a NoneType; expected frames"),
    ],
)  # fmt: skip
def test_clips_that_have_no_shape_are_refused(pair, tmp_path, values, told):
    contents = load_checked(pair.tokenizer)
    clip = contents["hyper_parameters"]["clip"]
    contents["hyper_parameters"]["clip"] = clip | values if values and isinstance(values, dict) else values
    save_checked(contents, tmp_path / "t.ckpt")
    with pytest.raises(ValueError) as refused:
        load_tokenizer(tmp_path / "t.ckpt")
    assert told in str(refused.value)


def test_other_entries_of_a_checkpoint_s_clips_reach_no_config(pair, tmp_path):
    more = {"_target_": "os.getcwd", "source": called(tmp_path / "trace")}
    found = load_tokenizer(with_clip(pair.tokenizer, tmp_path / "t.ckpt", **more)).clip
    assert found == load_tokenizer(pair.tokenizer).clip and list(found) == ["frames", "height", "width", "fps"]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda trace: {"about": {"clip": {"fps": called(trace)}}}, "clip: fps={'_target_'"),
        (lambda trace: {"about": {"clip": {"frames": "${oc.env:HOME}"}}}, "clip: frames=${oc.env:HOME}; expected a whole"),
        (lambda _: {"about": {"buckets": ["../../elsewhere"]}}, "data.buckets has ../../elsewhere; expected FRAMESxHEIGHT"),
        (lambda _: {"clips": {"train": 10**15}}, "it lists 3 files, its clips need 625"),
        (lambda _: {"clips": {"train": 0.5}}, "clips.train=0.5; expected a whole number"),
    ],
)  # fmt: skip
def test_what_a_cache_says_of_its_clips_calls_nothing(pair, tmp_path, monkeypatch, change, told):
    monkeypatch.setattr(cache, "CLIPS", 16)
    write_cache(pair, tmp_path / "cache")
    path, trace = tmp_path / "cache" / cache.MANIFEST, tmp_path / "trace"
    manifest = read_json(path)
    for key, values in change(trace).items():
        for name, value in values.items():
            manifest[key][name] = manifest[key].get(name, {}) | value if isinstance(value, dict) else value
    write_json(path, manifest)
    with pytest.raises(Exception) as refused:
        build_data(composed("stage2_generator", "data=cached", f"data.root={tmp_path / 'cache'}"))
    assert told in str(refused.value) and not trace.exists()


def test_data_s_sizes_call_nothing_wherever_they_come_from(tmp_path):
    cfg = composed("stage1_tokenizer")
    for key in ("height", "fps"):
        given = cfg.copy()
        given.data[key] = called(tmp_path / "trace")
        with pytest.raises(ValueError, match=rf"data.{key}=\{{'_target_'.*; expected a"):
            build_data(given)
    assert not (tmp_path / "trace").exists()


def test_a_picture_that_is_a_program_is_no_picture(tmp_path):
    """Pillow hands PostScript to Ghostscript, whatever the file's name."""
    Image.new("RGB", (8, 8)).save(tmp_path / "a.eps")
    (tmp_path / "a.eps").rename(tmp_path / "a.png")
    with pytest.raises(UnreadableVideo, match="cannot identify image file"):
        PictureDecoder(tmp_path / "a.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "b.png", format="JPEG")  # of another kind than its name says: read as it is
    assert len(PictureDecoder(tmp_path / "b.png")) == 1


def test_a_text_of_any_size_in_a_shard_takes_little_memory(tmp_path):
    with tarfile.open(tmp_path / "s.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        for name in ("a.mp4", "b.mp4", "c.mp4"):
            tar.addfile(tarfile.TarInfo(name))
        info = tarfile.TarInfo("a.txt")
        info.size = 2**25
        (tmp_path / "zeros").touch()
        with open(tmp_path / "zeros", "r+b") as zeros:
            zeros.truncate(info.size)
            tar.addfile(info, zeros)
    tracemalloc.start()
    index = index_of(str(tmp_path / "s.tar"))
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 16 * LONGEST and index["a.mp4"][2:] == [None, None, f"a .txt of more than {LONGEST} bytes"]
    with pytest.warns(UserWarning, match=f"1 of 3 clips .* have a .txt of more than {LONGEST} bytes, such as .*a.mp4"):
        ShardClips(tmp_path, "all")


def test_json_that_is_nested_too_deeply_is_no_caption(tmp_path):
    (tmp_path / "a.mp4").touch(), (tmp_path / "a.json").write_text(DEEP)
    assert captions_beside(tmp_path, ["a.mp4"], ["a.mp4", "a.json"]) == {}
    for suffix, told in (
        ("json", "is not valid json in UTF-8: nested too deeply"),
        ("jsonl", "line 1: not JSON .nested too"),
    ):
        (tmp_path / f"table.{suffix}").write_text(DEEP)
        with pytest.raises(ValueError, match=told):
            read_captions(tmp_path / f"table.{suffix}", ["a.mp4"])
    with pytest.raises(ValueError, match="line 1: not JSON .nested too deeply"):
        read_json(tmp_path / "a.json")
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        for name in ("a.mp4", "a.json"):
            tar.add(tmp_path / name, name)
    assert index_of(str(tmp_path / "s.tar"))["a.mp4"][4] == "a .json without a text as its `caption`"


def test_an_index_without_its_shards_is_no_checkpoint(saved, tmp_path):  # noqa: F811
    """Its tensors would be whatever lay in memory."""
    path = copied(saved, tmp_path)
    index = torch.load(path, weights_only=True)
    torch.save({key: index[key] for key in ("state_dict", "hyper_parameters", "global_step")}, path)
    with pytest.raises(ValueError, match="last.ckpt lacks its entry 'shards'"):
        load_whole(path)


@pytest.mark.parametrize("change", ["slot", "files", "parts"])
def test_an_index_names_no_files_but_its_own(saved, tmp_path, change):  # noqa: F811
    path = copied(saved, tmp_path)
    index = torch.load(path, weights_only=True)
    shards, other = index["shards"], "../../private/__0_0.distcp"
    if change == "slot":
        shards["slot"] = other
    elif change == "files":
        shards["files"][other] = "0" * 64
    else:
        name, parts = next(iter(shards["parts"].items()))
        shards["parts"][name] = [(offsets, sizes, other, *where) for offsets, sizes, _, *where in parts]
    index.pop("sha256")
    torch.save(index, path)
    with pytest.raises(ValueError, match="names files that are no shards of its own, such as .*private"):
        load_whole(path)


def test_a_link_in_the_place_of_a_temporary_file_is_not_followed(tmp_path):
    (tmp_path / "mine").write_text("mine")
    with written_aside(tmp_path / "a.json") as aside:
        aside.write_text("1")
    aside.symlink_to(tmp_path / "mine")
    write_json(tmp_path / "a.json", {})
    assert (tmp_path / "mine").read_text() == "mine" and json.loads((tmp_path / "a.json").read_text()) == {}


def test_captions_are_text(tmp_path):
    """Whatever stands in them."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (tmp_path / "captions.csv").write_text('file,caption\na.mp4,"${oc.env:HOME} {_target_: x} <script>"\n')
        assert read_captions(tmp_path / "captions.csv", ["a.mp4"]) == {"a.mp4": "${oc.env:HOME} {_target_: x} <script>"}
