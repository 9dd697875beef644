"""Caches of encoded clips: the same features, written by one or several processes, and trained on by any generator."""

from __future__ import annotations

import errno
import multiprocessing
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
from lightning.fabric.utilities.data import AttributeDict
from omegaconf import OmegaConf
from safetensors import safe_open
from safetensors.torch import save_file

from kit import encoding
from kit.checkpoint import load_tokenizer
from kit.cli import main
from kit.data import cache
from kit.data.cache import MANIFEST, CachedClips, files_of, open_cache, read_manifest
from kit.data.clips import FolderClips
from kit.data.datamodule import ClipDataModule
from kit.data.mixture import Mixture
from kit.data.shapes import Shapes
from kit.encode_ahead import check_cache, choice_of, encode_ahead, encoded_clips_of, rounded_share
from kit.encoding import describe, write_cache
from kit.files import write_json
from kit.media import write_video
from tests.fixtures import CLIP, GENERATOR, QUICK, composed, fit_generator
from tests.test_training import losses

CLIP_SHAPE = {"frames": 5, "height": 32, "width": 32, "fps": 8.0}


@pytest.fixture(autouse=True)
def short_files(monkeypatch):
    monkeypatch.setattr(cache, "CLIPS", 16)


def write(pair, folder, train=20, val=4, seen=None, **how):
    """Writes a cache; appends to `seen` the number of clips in each batch that the tokenizer encodes."""
    tokenizer = load_tokenizer(pair.tokenizer)
    if seen is not None:
        original = tokenizer.model.encode
        tokenizer.model.encode = lambda video: seen.append(len(video)) or original(video)
    sources = {split: Shapes(split, **CLIP_SHAPE, late=0.5) for split in ("train", "val")}
    about = describe(CLIP_SHAPE, tokenizer.model, tokenizer.hash, how, sources)
    write_cache(folder, about, sources, {"train": train, "val": val}, tokenizer.model, 0)
    return tokenizer.model, sources


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.name[0] != "."}


def test_items_are_the_features_of_the_clips_and_repeat(pair, tmp_path):
    tokenizer, sources = write(pair, tmp_path)
    for split, numbers in (("train", (0, 15, 16, 19)), ("val", (0, 3))):
        clips, count = CachedClips(tmp_path, split), {"train": 20, "val": 4}[split]
        for n in numbers:
            source = sources[split][n]
            expected = tokenizer.encode(source["video"][None])[0]
            torch.testing.assert_close(clips[n]["feature"].float(), expected, atol=0.02, rtol=0.02)
            for item in (clips[n], clips[n + count]):
                assert all(item[key] == source[key] for key in ("caption", "label", "given"))
                assert torch.equal(item["feature"], clips[n]["feature"])
    assert (clips.classes, clips.captioned, clips.native_fps) == (sources["val"].classes, True, 8.0)


def test_fewer_frames_are_the_beginnings_of_the_clips(pair, tmp_path):
    tokenizer, sources = write(pair, tmp_path)
    image = CachedClips(tmp_path, "train", frames=1, height=32)[3]["feature"]
    expected = tokenizer.encode(sources["train"][3]["video"][None, :, :1])[0]
    torch.testing.assert_close(image.float(), expected, atol=0.02, rtol=0.02)


def test_a_file_that_was_made_anew_is_read_anew(pair, tmp_path):
    write(pair, tmp_path, train=2, val=1)
    assert CachedClips(tmp_path)[0]["feature"].any() and not list(tmp_path.glob(".train*")), "nor are locks left behind"
    path = tmp_path / "train_00000.safetensors"
    with safe_open(path, "pt") as file:
        zeros, words = (
            {name: torch.zeros_like(file.get_tensor(name)) for name in ("feature", "label", "given")},
            file.metadata(),
        )
    path.unlink()
    save_file(zeros, path, words)
    assert not CachedClips(tmp_path)[0]["feature"].any()


def test_files_are_encoded_once_and_added_to(pair, tmp_path):
    seen = []
    write(pair, tmp_path, seen=seen)
    assert sum(seen) == 24
    before, written = contents(tmp_path), tmp_path.stat().st_mtime_ns
    write(pair, tmp_path, seen=(again := []))
    assert not again and contents(tmp_path) == before
    assert tmp_path.stat().st_mtime_ns == written, "a finished cache may be read only: no lock is made in it"
    write(pair, tmp_path, train=40, seen=(more := []))
    assert sum(more) == 24, "the first 16 of 40 were there"
    assert contents(tmp_path)["train_00000.safetensors"] == before["train_00000.safetensors"]
    assert CachedClips(tmp_path).count == 40
    write(pair, tmp_path / "whole", train=40)
    assert contents(tmp_path) == contents(tmp_path / "whole")


def test_a_call_for_fewer_clips_keeps_all(pair, tmp_path):
    write(pair, tmp_path, train=40)
    before = contents(tmp_path)
    write(pair, tmp_path, train=20, seen=(again := []))
    assert not again and contents(tmp_path) == before and CachedClips(tmp_path).count == 40


def test_clips_that_another_process_asks_for_meanwhile_are_made_too(pair, tmp_path, monkeypatch):
    finish, claims = encoding._finish, [40]

    def late(folder, about, clips):
        if claims:
            encoding._claim(folder, about, {**clips, "train": claims.pop()})
        return finish(folder, about, clips)

    monkeypatch.setattr(encoding, "_finish", late)
    write(pair, tmp_path)
    assert CachedClips(tmp_path).count == 40
    write(pair, tmp_path / "whole", train=40)
    assert contents(tmp_path) == contents(tmp_path / "whole")


def test_a_full_disk_is_told(pair, tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "write_bytes", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match=r"train_00000.safetensors could not be saved: No space left on device \(\d+ MiB free"):
        write(pair, tmp_path)


def test_interrupted_it_goes_on_and_a_cut_file_is_written_anew(pair, tmp_path):
    write(pair, tmp_path / "whole")
    tokenizer = load_tokenizer(pair.tokenizer).model
    calls, original = [], type(tokenizer).encode

    def stopped(self, video, *_):
        calls.append(len(video))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(self, video)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(type(tokenizer), "encode", stopped)
        write(pair, tmp_path / "cut")
    with pytest.raises(ValueError, match="not finished"):
        CachedClips(tmp_path / "cut")
    first = tmp_path / "cut" / "train_00000.safetensors"
    first.write_bytes(first.read_bytes()[:-100])
    write(pair, tmp_path / "cut")
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_processes_share_the_work(pair, tmp_path):
    write(pair, tmp_path / "one", train=100)
    torch.set_num_threads(1)  # forked processes cannot use the threads of this one
    context, seen = multiprocessing.get_context("fork"), []
    counts, both, write_file = context.Queue(), context.Barrier(2), encoding._write

    def write_together(path, features):
        """Makes both processes write their first file before either begins its second."""
        if not seen:
            both.wait(60)
        write_file(path, features)

    def work():
        torch.set_num_threads(1)
        encoding._write = write_together  # in this process alone
        write(pair, tmp_path / "two", train=100, seen=seen)
        counts.put(sum(seen))

    workers = [context.Process(target=work) for _ in range(2)]
    for worker in workers:
        worker.start()
    found = [counts.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join()
    assert sum(found) == 104 and min(found) > 0
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


@pytest.mark.parametrize("error", [NotImplementedError("flock"), OSError(errno.ENOLCK, "No locks available")])
def test_a_file_system_without_locks_is_told(error, pair, tmp_path, monkeypatch):
    monkeypatch.setattr("filelock.FileLock.acquire", MagicMock(side_effect=error))
    with pytest.raises(
        OSError, match=r"lock cannot be locked \(.*(flock|No locks available)\); on another .* root=\.\.\., or"
    ):
        write(pair, tmp_path)


def test_a_file_that_was_removed_is_made_again_and_hashed_anew(pair, tmp_path):
    """The new file may come from another machine, where rounding differs, so its hash may differ."""
    write(pair, tmp_path)
    file = tmp_path / "train_00001.safetensors"
    file.unlink()
    manifest = read_manifest(tmp_path)
    manifest["files"][file.name]["sha256"] = "of another machine"
    encoding.write_json(tmp_path / "manifest.json", manifest)
    write(pair, tmp_path)
    assert read_manifest(tmp_path)["files"][file.name]["sha256"] == encoding.file_sha256(file)
    assert CachedClips(tmp_path, verify=True).count == 20


def test_other_clips_need_another_folder(pair, tmp_path):
    write(pair, tmp_path, seed=0)
    with pytest.raises(ValueError, match=r"holds other clips \(there, asked for: source.seed: 0, 1\)"):
        write(pair, tmp_path, seed=1)
    with pytest.raises(ValueError, match="0 clips of the split val"):
        write(pair, tmp_path / "none", val=0)


def test_damage_is_found(pair, tmp_path):
    write(pair, tmp_path)
    file = tmp_path / "train_00001.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
    CachedClips(tmp_path)
    with pytest.raises(ValueError, match="train_00001.safetensors is damaged"):
        CachedClips(tmp_path, verify=True)
    file.write_bytes(whole[:-9])
    with pytest.raises(ValueError, match="train_00001.safetensors is damaged"):
        CachedClips(tmp_path)
    file.unlink()
    with pytest.raises(FileNotFoundError, match="train_00001.safetensors, a part of the cache, is missing"):
        CachedClips(tmp_path)


def test_damage_and_changes_are_found_in_each_bucket(pair, tmp_path):
    buckets = ["5x32x32", "5x32x48"]
    for folder in (tmp_path, *(tmp_path / bucket for bucket in buckets)):
        write(pair, folder, train=2, val=1)
    manifest = read_manifest(tmp_path)
    write_json(tmp_path / MANIFEST, {**manifest, "about": {**manifest["about"], "buckets": buckets}})
    before, path = open_cache(tmp_path, verify=True).contents, tmp_path / buckets[1] / "train_00000.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert open_cache(tmp_path).contents == before, "as long as it is not asked for"
    with pytest.raises(ValueError, match="train_00000.safetensors is damaged"):
        open_cache(tmp_path, verify=True)
    path.unlink()
    write(pair, path.parent, train=3, val=1)
    assert open_cache(tmp_path).contents != before


@pytest.mark.parametrize("given, message", [({"height": 64}, "data.height=64, but the clips .* have 32"),
                                            ({"frames": 9}, "data.frames=9, but .* have 5"),
                                            ({"split": "all"}, "split='all' is not in the cache")])  # fmt: skip
def test_what_a_cache_does_not_hold_is_refused(pair, tmp_path, given, message):
    write(pair, tmp_path)
    with pytest.raises(ValueError, match=message):
        CachedClips(tmp_path, **given)


def test_late_clips_are_others_and_none_are_as_before():
    how, made = composed("stage2_generator").data.source, [Shapes("val", **CLIP_SHAPE)]
    assert "late" not in choice_of(how, made)
    assert choice_of(OmegaConf.merge(how, {"late": 0.5}), made) == {**choice_of(how, made), "late": 0.5}


def test_what_chooses_no_clips_makes_no_others():
    """How long a storage may take, for example: a cache stays valid where that changes."""
    how, made = OmegaConf.create({"_partial_": True, "seed": 0}), [Shapes("val", **CLIP_SHAPE)]
    assert choice_of(OmegaConf.merge(how, {"patience": 5.0, "verify": True}), made) == {"seed": 0}


def test_a_file_of_an_older_cache_has_no_given_frames(pair, tmp_path):
    write(pair, tmp_path, train=2, val=1)
    path = tmp_path / "train_00000.safetensors"
    with safe_open(path, "pt") as file:
        tensors, words = {name: file.get_tensor(name) for name in ("feature", "label")}, file.metadata()
    path.unlink()
    save_file(tensors, path, words)
    _, _, given, _ = cache._open(str(path), 0)
    assert given == [0, 0]


@pytest.mark.parametrize("clips, share, expected", [(10, 1.0, 10), (12, 0.7, 9), (10, 0.31, 4), (10, 0.001, 1)])
def test_each_bucket_has_its_share_of_the_clips_rounded_up(clips, share, expected):
    assert rounded_share(clips, share) == expected


def test_clips_of_all_batches_of_a_step_are_encoded_ahead():
    part = SimpleNamespace(cached=False, encode_ahead=MagicMock())
    cfg = composed("stage2_generator", "trainer.max_steps=7", "trainer.accumulate_grad_batches=3", "encoded_clips=5")
    encode_ahead(cfg, SimpleNamespace(parts=[part]), None)
    assert part.encode_ahead.call_args.args[1:] == (21, 5)


def test_the_list_of_files_is_a_part_of_what_it_is_of(pair, tmp_path):
    for i in range(3):
        write_video(Shapes("train", **CLIP_SHAPE)[i]["video"], tmp_path / "videos" / f"{i}.mp4", 8.0)
    tokenizer = load_tokenizer(pair.tokenizer)

    def about():
        return describe(CLIP_SHAPE, tokenizer.model, "hash", {}, {"train": FolderClips(tmp_path / "videos", **CLIP_SHAPE)})

    before = about()
    assert before["files"]["train"]["count"] == 2 and about() == before
    moved = (tmp_path / "videos").rename(tmp_path / "moved")
    moved.rename(tmp_path / "videos")
    assert about() == before
    file = tmp_path / "videos" / "0.mp4"
    file.write_bytes(file.read_bytes() + b"more")
    longer = about()
    assert longer != before, "another file of the same name"
    file.rename(tmp_path / "videos" / "00.mp4")
    assert about() != longer
    for words in ("old", "new"):
        rows = "".join(f"{name}.mp4,{words}\n" for name in ("00", "1", "2"))
        (tmp_path / "videos" / "captions.csv").write_text(f"file,caption\n{rows}")
        longer, before = about(), longer
        assert longer != before, "captions are kept in the cache"
    mixed = Mixture({"a": partial(FolderClips, tmp_path / "videos"), "b": Shapes}, {"a": 1, "b": 1}, **CLIP_SHAPE)
    assert describe(CLIP_SHAPE, tokenizer.model, "hash", {}, {"train": mixed})["files"]["train"]["count"] == 2


# --- through the command line ------------------------------------------------------------------------------------------


def test_each_stage_and_kind_of_clips_has_a_folder_of_its_own():
    cfg = SimpleNamespace(folder="run")
    parts = [(), ("x",), ("x", "images"), ("x_images",), ("images",), ("x", "images", "1x32x32"), ("x_images", "1x32x32")]
    assert len({encoded_clips_of(cfg, *each) for each in parts}) == len(parts)
    assert encoded_clips_of(cfg).name == "encoded_clips" and encoded_clips_of(cfg, "x").name == "encoded_clips_x"


def test_training_on_encoded_clips_is_training_on_clips(pair, tmp_path):
    """The first pass over encoded clips gives the same losses as fresh clips, up to the rounding of features; clips that the
    run encodes itself and clips of a cache give exactly the same."""

    def fit(name, clips, *words):
        words = [f"name={name}", f"recipe.generator.encoded_clips={clips}", "trainer.precision=32-true", *words]
        assert fit_generator(tmp_path, *words, "recipe.generator.steps=5", tokenizer=pair.tokenizer) == 0
        return torch.tensor(losses(tmp_path / name))

    fresh, own = fit("fresh", 0), fit("own", 20)
    torch.testing.assert_close(own, fresh, atol=2e-3, rtol=2e-3)
    words = [word for word in CLIP if word.startswith("data.")]
    assert main(["cache", f"root={tmp_path}", f"tokenizer_ckpt={pair.tokenizer}", "clips=20", "val_clips=4", *words]) == 0
    assert torch.equal(fit_cached(tmp_path, pair, "cached"), own)


def fit_cached(root, pair, name, *words):
    given = [word for word in (*CLIP, *QUICK) if not word.startswith(("data.frames", "data.height", "data.width"))]
    run = [f"root={root}", f"name={name}", f"tokenizer_ckpt={pair.tokenizer}", "data=cached", f"data.root={root / 'cache'}"]
    steps = ["recipe.generator.steps=5", "trainer.precision=32-true"]
    assert main(["fit", "conf=stage2_generator", *run, *given, *GENERATOR, *steps, *words]) == 0
    return torch.tensor(losses(root / name))


def test_a_cache_needs_no_videos_and_validates_alike(pair, tmp_path, capsys):
    for i in range(10):
        write_video(Shapes("train", **CLIP_SHAPE)[i]["video"], tmp_path / "videos" / f"{i % 2}" / f"{i}.mp4", 8.0)
    data = ["data=clips", f"data.root={tmp_path / 'videos'}", *[w for w in CLIP if w.startswith("data.")]]
    words = [f"root={tmp_path}", f"tokenizer_ckpt={pair.tokenizer}", *data]
    assert main(["cache", *words, "clips=20", "val_clips=4"]) == 0
    assert "0 files could not be read" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "videos")
    fit_cached(tmp_path, pair, "run", "trainer.val_check_interval=5")
    assert (tmp_path / "run" / "media" / "step000005.png").is_file()
    saved = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)["hyper_parameters"]
    assert saved["clip"] == CLIP_SHAPE and saved["generator"]["condition"]["classes"] == ["0", "1"]
    ckpt = f"ckpt={tmp_path / 'run' / 'checkpoints' / 'last.ckpt'}"
    for verb in (["validate", ckpt], ["cache", f"tokenizer_ckpt={pair.tokenizer}", "name=again"]):
        assert main([*verb, f"root={tmp_path}", "data=cached", f"data.root={tmp_path / 'cache'}"]) == 1
        assert "holds encoded clips; give the videos" in capsys.readouterr().err


class Kept(Shapes):
    """A source of a user's that has a folder and lists no files of it."""

    def __init__(self, *args, root, **kwargs):
        super().__init__(*args, **{**kwargs, "seed": len(root)})


def test_another_folder_of_a_source_that_lists_no_files_is_other_clips(pair, tmp_path, capsys):
    """Else a cache of the first folder's clips would pass for one of the second's."""
    words = ["cache", f"root={tmp_path}", f"tokenizer_ckpt={pair.tokenizer}", "clips=4", "val_clips=2"]
    words.append(f"data.source._target_={__name__}.Kept")
    assert main([*words, "+data.source.root=one"]) == 0
    assert main([*words, "+data.source.root=other"]) == 1
    assert "holds other clips (there, asked for: source.root: one, other)" in capsys.readouterr().err


def test_captions_that_a_training_does_not_read_to_their_end_are_told(pair, tmp_path):
    """On files, and on a cache of them."""
    long = "a red ball that moves over the green field from the left to the right and"
    for i, end in enumerate(("back", "away", "")):
        write_video(Shapes("train", **CLIP_SHAPE)[i]["video"], tmp_path / "videos" / f"{i}.mp4", 8.0)
        (tmp_path / "videos" / f"{i}.txt").write_text(f"{long} {end}")
    data = ["data=clips", f"data.root={tmp_path / 'videos'}", *[w for w in CLIP if w.startswith("data.")]]
    told = f"2 of 3 captions are longer than 16 words, such as '{long} away'; condition.length=17 reads them"
    with pytest.warns(UserWarning, match=told):
        assert fit_generator(tmp_path, *data, "recipe.generator.steps=1", tokenizer=pair.tokenizer) == 0
    words = [f"root={tmp_path}", f"tokenizer_ckpt={pair.tokenizer}", *data]
    assert main(["cache", *words, "clips=2", "val_clips=1"]) == 0
    with pytest.warns(UserWarning, match=told):
        fit_cached(tmp_path, pair, "run", "recipe.generator.steps=1", "data.val_clips=1")


def test_a_cache_has_the_tokenizers_shape_and_a_training_on_it_the_caches(pair, tmp_path, capsys):
    """Whatever size of clips a preset is for."""
    words = ["cache", f"root={tmp_path}", f"tokenizer_ckpt={pair.tokenizer}", "clips=2", "val_clips=2", "data.workers=0"]
    assert main([*words, "name=a (1)"]) == 0
    assert f"data=cached 'data.root={tmp_path}/a (1)' tokenizer_ckpt={pair.tokenizer}\n" in capsys.readouterr().out
    assert main(words) == 0
    clip = load_tokenizer(pair.tokenizer).clip
    for preset in ("size=tiny", "size=small", "size=L"):
        data = composed("stage2_generator", preset, "data=cached", f"data.root={tmp_path / 'cache'}").data
        assert (data.frames, data.height, data.width) == (clip["frames"], clip["height"], clip["width"]) == (5, 32, 32)
    assert main([*words, "data.height=abc"]) == 1
    assert "data.height=abc; expected a whole number" in capsys.readouterr().err


def test_wrong_use_of_a_cache_is_told(pair, tmp_path, capsys):
    cached = ["data=cached", f"data.root={tmp_path}", f"root={tmp_path}", *QUICK]
    assert main(["fit", "conf=stage2_generator", f"tokenizer_ckpt={pair.tokenizer}", *cached]) == 1
    told = capsys.readouterr().err
    assert f"kit fit: {tmp_path} holds no cache (manifest.json is missing)" in told and "full_key" not in told
    write(pair, tmp_path)
    assert main(["fit", "conf=stage1_tokenizer", *cached]) == 1
    assert "a tokenizer needs videos" in capsys.readouterr().err
    manifest = read_manifest(tmp_path)
    manifest["about"]["tokenizer"] = "another"
    encoding.write_json(tmp_path / "manifest.json", manifest)
    assert main(["fit", "conf=stage2_generator", f"tokenizer_ckpt={pair.tokenizer}", *cached]) == 1
    assert "are encoded by the tokenizer another" in capsys.readouterr().err


def test_pictures_that_another_tokenizer_has_encoded_are_refused(pair, tmp_path):
    write(pair, tmp_path)
    shape = dict(frames=5, height=32, width=32, fps=8.0, batch_size=2, val_clips=2, workers=0, image_share=0.5)
    data = ClipDataModule(Shapes, **shape, images=partial(CachedClips, tmp_path))
    ours = {"tokenizer_hash": load_tokenizer(pair.tokenizer).hash, "tokenizer_path": "ours.ckpt"}
    check_cache(data, SimpleNamespace(kind="generator", hparams=AttributeDict(ours)))
    with pytest.raises(ValueError, match=f"{tmp_path}.* are encoded by .* those of other .ours.ckpt."):
        check_cache(data, SimpleNamespace(kind="generator", hparams=AttributeDict(ours, tokenizer_hash="other")))


def test_a_new_run_encodes_anew_and_a_continued_one_does_not(pair, tmp_path):
    kept = tmp_path / "run" / "encoded_clips"

    def fit(*words):
        assert fit_generator(tmp_path, "name=run", "data.image_share=0", *words, tokenizer=pair.tokenizer) == 0
        return [path.stat().st_ino for path in sorted(kept.glob("*.safetensors"))]

    first = fit("recipe.generator.steps=6")
    assert fit("recipe.generator.steps=7", "ckpt=last") == first
    assert CachedClips(kept).count == 24
    (kept / "manifest.json").write_text("{}")
    fit("recipe.generator.steps=2", "overwrite=true")
    assert CachedClips(kept).count == 8, "no more than are trained on"


def test_another_number_of_encoded_clips_is_told_and_holds(pair, tmp_path, caplog, monkeypatch):
    read = []
    monkeypatch.setattr(
        CachedClips, "__getitem__", lambda self, n, get=CachedClips.__getitem__: read.append(self.count) or get(self, n)
    )

    def fit(clips, *words) -> set[int]:
        read.clear()
        caplog.clear()
        words = ["name=run", "data.image_share=0", f"recipe.generator.encoded_clips={clips}", *words]
        assert fit_generator(tmp_path, *words, tokenizer=pair.tokenizer) == 0
        return set(read)

    told = "resumes with other data than it began with (then, now): encoded_clips: "
    assert fit(12, "recipe.generator.steps=3") == {12}
    assert fit(12, "recipe.generator.steps=4", "ckpt=last") == {12} and told not in caplog.text
    assert fit(8, "recipe.generator.steps=5", "ckpt=last") == {8} and f"{told}12, 8" in caplog.text
    assert fit(16, "recipe.generator.steps=6", "ckpt=last") == {16} and f"{told}8, 16" in caplog.text


def test_a_run_that_ended_before_its_first_save_keeps_what_it_encoded(pair, tmp_path):
    def fit(*words) -> list[int]:
        words = ["name=run", "data.image_share=0", "recipe.generator.steps=6", *words]
        assert fit_generator(tmp_path, *words, tokenizer=pair.tokenizer) == 0
        return [path.stat().st_ino for path in sorted((tmp_path / "run" / "encoded_clips").glob("*.safetensors"))]

    first = fit()
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    assert fit("ckpt=last") == first


@pytest.mark.parametrize("number", ["null", "2.5", "0"])
def test_a_number_of_clips_that_is_none_is_named(tmp_path, capsys, number):
    assert main(["cache", f"clips={number}", f"root={tmp_path}"]) == 1
    assert f"clips={number}; expected a whole number of 1 or more" in capsys.readouterr().err
    assert not (tmp_path / "cache").exists()


def test_a_negative_number_is_named(pair, tmp_path, capsys):
    assert fit_generator(tmp_path, "recipe.generator.encoded_clips=-1", tokenizer=pair.tokenizer) == 1
    assert "encoded_clips=-1" in capsys.readouterr().err


def test_a_run_that_goes_on_knows_another_cache_and_clips_that_were_added(pair, tmp_path):
    def settings(name):
        source = partial(CachedClips, tmp_path / name)
        return ClipDataModule(source, 5, 32, 32, 8.0, batch_size=2, val_clips=2, workers=0).settings

    write(pair, tmp_path / "one", train=3, val=2)
    write(pair, tmp_path / "two", train=3, val=2)
    assert settings("one") == settings("two") and settings("one")["held_out"] is None
    write(pair, tmp_path / "two", train=4, val=2)
    assert settings("one") != settings("two")


def test_fewer_encoded_clips_than_files_are_told(pair, tmp_path, capsys):
    for n in range(9):
        write_video(torch.zeros(3, 5, 32, 32), tmp_path / "clips" / f"{n}.mp4", 8)
    data = ["data=clips", f"data.root={tmp_path / 'clips'}", "data.source.val_every=9"]
    for clips, told in ((7, True), (8, False)):
        words = [f"root={tmp_path}", f"name=cache{clips}", f"tokenizer_ckpt={pair.tokenizer}", *data, f"clips={clips}"]
        assert main(["cache", *words, "val_clips=1", "data.workers=0"]) == 0
        note = f"note: 7 of the 8 files of {tmp_path / 'clips'} are encoded"
        assert (note in capsys.readouterr().out) == told
    steps = ["recipe.generator.steps=2", "recipe.generator.batch_size=4", "trainer.val_check_interval=2", *data]
    with pytest.warns(UserWarning, match="encoded_clips=7: 7 of the 8 files of .* are trained on; encode more, or 0"):
        assert fit_generator(tmp_path, *steps, "encoded_clips=7", tokenizer=pair.tokenizer) == 0


def test_files_of_a_split():
    assert [tuple(s) for s in files_of({"train": 33, "val": 16})] == [
        ("train", "train_00000.safetensors", 0, 16), ("train", "train_00001.safetensors", 16, 16),
        ("train", "train_00002.safetensors", 32, 1), ("val", "val_00000.safetensors", 0, 16),
    ]  # fmt: skip
