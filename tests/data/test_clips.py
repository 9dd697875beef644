"""The folder data set: which frames of which file an item shows, its caption and label, and bad input."""

from __future__ import annotations

import pickle
import warnings
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Subset

from kit.data.clips import FolderClips
from kit.data.decode import UnreadableVideo
from kit.data.frames import fit, frame_numbers
from tests.data.videos import COUNT, same, shown, write, write_bad
from tests.fixtures import composed

DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"


def test_item_format(videos):
    item = FolderClips(videos, frames=5, height=16, width=24)[3]
    assert item["video"].shape == (3, 5, 16, 24) and item["video"].dtype == torch.float32
    assert item["video"].is_contiguous() and item["video"].abs().max() <= 1
    assert isinstance(item["caption"], str) and isinstance(item["label"], int)


def test_the_confs_defaults_are_the_class_s():
    shown = composed("stage1_tokenizer", "data=clips", "data.root=videos").data.source
    usual = {argument.name: argument.default for argument in fields(FolderClips)}
    assert {key: usual[key] for key in shown if key[0] != "_" and key != "root"} == {
        key: value for key, value in shown.items() if key[0] != "_" and key != "root"
    }


@pytest.mark.parametrize("backend", ["decord", "pyav"])
def test_consecutive_frames_at_the_files_own_rate(videos, backend):
    dataset = FolderClips(videos, frames=6, backend=backend)
    starts = set()
    for n in range(12):
        numbers = shown(dataset[n])
        assert numbers == list(range(numbers[0], numbers[0] + 6))
        starts.add(numbers[0])
    assert len(starts) > 4  # random


@pytest.mark.parametrize(("fps", "step"), [(12, 2), (8, 3), (24, 1), (0, 1), (48, 0.5)])
def test_fps_picks_the_nearest_frames(tmp_path, fps, step):
    write(tmp_path / "a.mp4", count=41)
    write(tmp_path / "b.mp4", count=41)
    numbers = shown(FolderClips(tmp_path, "val", frames=5, fps=fps)[0])
    exact = 20 + step * (np.arange(5) - 2)  # around the middle of the file
    assert np.abs(np.array(numbers) - exact).max() <= 0.5
    assert len(set(numbers)) == (3 if step == 0.5 else 5)


def test_frame_numbers():
    assert frame_numbers(100, 25, 4, None, 0).tolist() == [0, 1, 2, 3]
    assert frame_numbers(100, 25, 4, None, 1).tolist() == [96, 97, 98, 99]
    assert frame_numbers(100, 30, 4, 8, 0).tolist() == [0, 4, 8, 11]  # 0, 3.75, 7.5, 11.25
    assert frame_numbers(3, 25, 5, 25, 0.7).tolist() == [0, 1, 2, 3, 4]  # too short: from the beginning, and beyond
    assert frame_numbers(9, 25, 1, 25, 0.5).tolist() == [4]
    for start in np.random.default_rng(0).random(200):
        numbers = frame_numbers(50, 29.97, 17, 12, start)
        assert numbers[0] >= 0 and numbers[-1] <= 49


def test_val_takes_the_middle_and_repeats(videos):
    dataset = FolderClips(videos, "val", frames=4, seed=0)
    assert dataset.files == ["wave_hand_000.mp4"]  # of 30 frames
    assert shown(dataset[0]) == [13, 14, 15, 16]
    assert same(dataset[0], FolderClips(videos, "val", frames=4, seed=9)[1])


def test_item_is_a_function_of_seed_and_number(videos):
    dataset = FolderClips(videos, frames=3, height=16, width=16, seed=5)
    order = [7, 0, 30, 7, 2, 100_000]
    first = [dataset[n] for n in order]
    other = FolderClips(videos, frames=3, height=16, width=16, seed=5)
    assert all(same(item, other[n]) for n, item in reversed(list(zip(order, first, strict=True))))
    assert same(first[0], first[3]) and not same(first[0], first[1])
    changed = FolderClips(videos, frames=3, height=16, width=16, seed=6)
    assert not all(same(item, changed[n]) for n, item in zip(order, first, strict=True))


def test_every_epoch_shows_every_file_once_in_a_new_order(videos):
    dataset = FolderClips(videos, seed=1)
    count = len(dataset.files)
    epochs = [[dataset.file(n) for n in range(e * count, (e + 1) * count)] for e in range(4)]
    assert all(sorted(epoch) == dataset.files for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    other = FolderClips(videos, seed=2)
    assert [other.file(n) for n in range(4 * count)] != [name for epoch in epochs for name in epoch]


def test_all_takes_the_middle_of_each_file_in_order_and_repeats(videos):
    dataset = FolderClips(videos, "all", frames=4, height=16, width=16)
    count = len(dataset.files)
    assert [dataset.file(n) for n in range(2 * count)] == list(dataset.files) * 2
    assert shown(dataset[0]) == [15, 16, 17, 18]  # walk_001.mp4 has 34 frames
    assert same(dataset[0], dataset[count])


@pytest.mark.parametrize("context", ["fork", "spawn"])
@pytest.mark.parametrize("backend", ["decord", "pyav"])
def test_workers_give_what_the_main_process_gives(videos, backend, context):
    dataset = FolderClips(videos, frames=3, height=16, width=16, backend=backend)
    alone = [dataset[n] for n in range(6)]  # decodes before the fork, too
    workers = 2 if context == "fork" else 1
    loader = DataLoader(
        dataset, batch_size=2, sampler=range(6), num_workers=workers, multiprocessing_context=context, timeout=60
    )
    batches = list(loader)
    assert torch.equal(torch.cat([b["video"] for b in batches]), torch.stack([item["video"] for item in alone]))
    assert [c for b in batches for c in b["caption"]] == [item["caption"] for item in alone]
    assert torch.cat([b["label"] for b in batches]).tolist() == [item["label"] for item in alone]


def test_pickled_copy_is_the_same(videos):
    dataset = FolderClips(videos, frames=2)
    assert same(pickle.loads(pickle.dumps(dataset))[4], dataset[4])


def test_unreadable_file_is_reported_once_and_replaced_by_the_next(tmp_path):
    for i in range(4):
        write(tmp_path / f"{i}.mp4", count=10 + i)
    bad = write_bad(tmp_path / "1_bad.mp4")
    dataset = FolderClips(tmp_path, frames=2, height=16, width=16, val_every=100)
    assert "1_bad.mp4" in dataset.files
    with pytest.warns(UserWarning, match="1_bad.mp4") as caught:
        items = [dataset[n] for n in range(12)]
    assert len(caught) == 1
    assert list(dataset.skipped) == [bad] and dataset.skipped[bad]
    n = next(n for n in range(12) if dataset.file(n) == "1_bad.mp4")
    fresh = FolderClips(tmp_path, frames=2, height=16, width=16, val_every=100)
    with pytest.warns(UserWarning):
        assert same(fresh[n], items[n])  # whatever was read before
    good = dataset._read(dataset.file(n + 1), *np.random.default_rng((0, 1, n)).random(4))
    assert torch.equal(items[n]["video"], good)


def test_what_workers_could_not_read_is_counted_once(tmp_path):
    """Two workers fail to read the file; the training process counts it once."""
    for i in range(3):
        write(tmp_path / f"{i}.mp4", count=10 + i)
    bad = write_bad(tmp_path / "1_bad.mp4")
    dataset = FolderClips(tmp_path, frames=2, height=16, width=16, val_every=100)
    assert dataset.unreadable == []
    assert len(list(DataLoader(Subset(dataset, range(12)), batch_size=3, num_workers=2))) == 4
    assert dataset.unreadable == [bad]


def test_native_rate_tells_of_an_unreadable_file(tmp_path):
    write(tmp_path / "1.mp4")
    write(tmp_path / "2.mp4")
    bad = write_bad(tmp_path / "0.mp4")
    dataset = FolderClips(tmp_path, frames=2, height=16, width=16, val_every=100)
    with pytest.warns(UserWarning, match="0.mp4"):
        assert dataset.native_fps > 0
    assert dataset.unreadable == [bad]


@pytest.mark.parametrize("suffix", ["MTS", "m2ts", "ts", "3gp", "3g2", "wmv", "asf", "flv", "f4v", "vob", "mxf"])
def test_videos_of_cameras_and_players_are_read(tmp_path, suffix):
    write(tmp_path / f"a.{suffix}", count=20)
    assert shown(FolderClips(tmp_path, "all", frames=17, height=32, width=40)[0]) == list(range(2, 19))


def test_files_of_different_rates_are_told(tmp_path):
    for name, rate in (("a", 10), ("b", 60), ("c", 61)):
        write(tmp_path / f"{name}.mp4", count=4, rate=rate)
    with pytest.warns(UserWarning, match="have 10 to 61 fps, .*data.fps=N .* takes all at one rate"):
        assert FolderClips(tmp_path, "all", frames=2).native_fps == 60
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert FolderClips(tmp_path, "all", frames=1).native_fps == 60  # pictures do not move
        (tmp_path / "a.mp4").unlink()
        assert FolderClips(tmp_path, "all", frames=2).native_fps == 60.5


def test_failure_in_one_clip_of_a_file_does_not_change_its_others(videos, monkeypatch):
    """Which clips are skipped must not depend on the order in which items are read."""
    from kit.data import clips

    dataset = FolderClips(videos, frames=2, height=16, width=16)
    expected = [dataset[n] for n in range(14)]
    n = 3
    later = next(m for m in range(7, 14) if dataset.file(m) == dataset.file(n))
    original = clips.open_video

    def fails(path, backend, patience):
        raise UnreadableVideo(path, "a bad sector")

    monkeypatch.setattr(clips, "open_video", lambda p, *how: (fails if p.name == dataset.file(n) else original)(p, *how))
    with pytest.warns(UserWarning, match="a bad sector"):
        assert not same(dataset[n], expected[n])
    monkeypatch.setattr(clips, "open_video", original)
    assert same(dataset[later], expected[later])


@pytest.mark.filterwarnings("ignore:cannot read")
def test_the_one_readable_file_stands_in_for_all_others(tmp_path):
    for i in range(10):
        write_bad(tmp_path / f"{i}_bad.mp4")
    write(tmp_path / "good.mp4", count=4, rate=20)
    dataset = FolderClips(tmp_path, "all", frames=2, height=16, width=16)
    assert dataset.native_fps == 20
    assert [shown(dataset[n]) for n in range(4)] == [[1, 2]] * 4


@pytest.mark.parametrize("verify", [False, True])
def test_all_files_unreadable_is_an_error_with_reasons(tmp_path, verify):
    for i in range(5):
        write_bad(tmp_path / f"{i}.mp4")
    with pytest.warns(UserWarning), pytest.raises(ValueError, match=r"none of the 4 train videos.*mp4: .*; check them"):
        FolderClips(tmp_path, verify=verify)[0]


def test_verify_finds_bad_and_short_files_at_once(tmp_path):
    for i in range(3):
        write(tmp_path / f"{i}.mp4", count=8 if i < 2 else 3 * COUNT // 4)
    write_bad(tmp_path / "3.mp4")
    write(tmp_path / "4.mp4")
    with pytest.warns(UserWarning) as caught:
        dataset = FolderClips(tmp_path, frames=10, verify=True)
    messages = [str(warning.message) for warning in caught]
    assert len(messages) == 2 and "3.mp4" in messages[0] and "2 of 4 files" in messages[1]
    assert list(dataset.skipped) == [tmp_path / "3.mp4"]
    assert dataset.short == {tmp_path / "0.mp4": 2, tmp_path / "1.mp4": 2}


def test_short_file_holds_its_last_frame_and_warns_once(tmp_path):
    write(tmp_path / "a.mp4", count=4)
    write(tmp_path / "b.mp4", count=4)
    dataset = FolderClips(tmp_path, frames=7)
    with pytest.warns(UserWarning, match=r"too short for a clip of 7 frames.*a\.mp4 by 3 frames") as caught:
        items = [dataset[n] for n in range(4)]
    assert len(caught) == 1
    assert all(shown(item) == [0, 1, 2, 3, 3, 3, 3] for item in items)


@pytest.mark.parametrize(("height", "width"), [(16, 16), (20, 64), (64, 20), (48, 48), (7, 9)])
@pytest.mark.parametrize(("rows", "columns"), [(32, 40), (40, 32)])
def test_fit_covers_and_crops_the_centre(height, width, rows, columns):
    y, x = np.mgrid[:rows, :columns]
    image = np.stack([255 * y / (rows - 1), 255 * x / (columns - 1), 0 * x], axis=-1).astype(np.uint8)
    clip = fit(np.stack([image] * 2), height, width)
    assert clip.shape == (3, 2, height, width) and clip.dtype == torch.float32
    assert torch.all(clip[2] == -1)
    down, across = (clip[0, 0].mean(1) + 1) / 2, (clip[1, 0].mean(0) + 1) / 2
    assert abs(down.mean() - 0.5) < 0.02 and abs(across.mean() - 0.5) < 0.02  # the centre
    scale = max(height / rows, width / columns)  # the same in both directions: no distortion
    assert float(down[-1] - down[0]) == pytest.approx((height - 1) / scale / (rows - 1), abs=0.05)
    assert float(across[-1] - across[0]) == pytest.approx((width - 1) / scale / (columns - 1), abs=0.05)


def test_fit_averages_when_it_shrinks():
    stripes = np.zeros((1, 64, 64, 3), np.uint8)
    stripes[:, :, ::4] = 255
    assert (fit(stripes, 16, 16) + 0.5).abs().max() < 0.2  # a quarter of white, nowhere a stripe
    assert torch.equal(fit(stripes, 64, 64)[0, 0, 0, :2], torch.tensor([1.0, -1.0]))


def test_fit_crops_where_it_is_told():
    image = np.zeros((1, 10, 30, 3), np.uint8)
    image[:, :, 20:] = 255
    assert fit(image, 10, 10, left=0.0).max() == -1 and fit(image, 10, 10, left=1.0).min() == 1


def test_flip_and_random_crop(tmp_path):
    for i in range(2):
        write(tmp_path / f"{i}.mp4", count=1, height=32, width=96, tint=200)
    plain = FolderClips(tmp_path, frames=1, height=32, width=96)
    flipped = FolderClips(tmp_path, frames=1, height=32, width=96, flip=True)
    mirrored = 0
    for n in range(12):
        a, b = plain[n]["video"], flipped[n]["video"]
        mirrored += torch.equal(a.flip(-1), b)
        assert torch.equal(a, b) or torch.equal(a.flip(-1), b)
    assert 0 < mirrored < 12
    name = flipped.files[0]
    assert torch.equal(flipped._read(name, top=0.1, left=0.1, mirror=0.9), plain._read(name))  # of a draw of its own
    crops = FolderClips(tmp_path, frames=1, height=32, width=32, random_crop=True)
    assert len({round(float(crops[n]["video"][2].mean()), 2) for n in range(8)}) > 2
    centred = FolderClips(tmp_path, frames=1, height=32, width=32)
    assert len({float(centred[n]["video"][2].mean()) for n in range(8)}) == 1
    assert same(crops[2], FolderClips(tmp_path, frames=1, height=32, width=32, random_crop=True)[2])
    val = {"split": "val", "frames": 1, "height": 32, "width": 32}
    assert same(FolderClips(tmp_path, **val)[0], FolderClips(tmp_path, **val, random_crop=True, flip=True)[0])


def test_no_folder_and_no_video(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder .*nowhere; expected one that holds video files"):
        FolderClips(tmp_path / "nowhere")
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(FileNotFoundError, match=r"holds no video; expected files ending in \.mp4"):
        FolderClips(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "test"}, "split=test; expected one of: train, val"),
        ({"label_from": "name"}, "label_from=name; expected one of: auto, folder, filename, none"),
        ({"label_from": "folder"}, "label_from='folder': .*mp4 has no label"),
        ({"label_from": "filename", "filename_pattern": "^(?P<label>x)"}, "has no label, expected a name that matches"),
        ({"filename_pattern": "("}, r"filename_pattern='\('"),
        ({"filename_pattern": ".*"}, r"filename_pattern='\.\*'.*expected one such as"),
        ({"frames": 0}, "frames=0; expected a whole number of 1 or more"),
        ({"width": -3}, "width=-3"),
        ({"fps": -1}, "fps=-1"),
        ({"fps": float("nan")}, "fps=nan"),
        ({"fps": float("inf")}, "fps=inf"),
        ({"seed": -1}, "seed=-1"),
        ({"val_every": 1}, "val_every=1; expected a whole number of 2 or more"),
        ({"backend": "opencv"}, "backend=opencv; expected one of: decord, pyav"),
    ],
)
def test_bad_arguments(videos, arguments, message):
    with pytest.raises(ValueError, match=message):
        FolderClips(videos, **arguments)


def test_an_empty_path_is_not_the_folder_that_the_command_runs_in(videos, monkeypatch):
    monkeypatch.chdir(videos)
    with pytest.raises(ValueError, match="Is a variable of the shell unset?"):
        FolderClips("")


def test_missing_captions_and_negative_item(videos):
    with pytest.raises(FileNotFoundError, match="captions=.*nothing.csv"):
        FolderClips(videos, captions=videos / "nothing.csv")
    with pytest.raises(IndexError, match="-1"):
        FolderClips(videos)[-1]


@pytest.mark.skipif(not (DATA / "weizmann").is_dir(), reason=f"the data in {DATA} are not there")
@pytest.mark.parametrize("backend", ["decord", "pyav"])
def test_real_folders(backend):
    actions = FolderClips(DATA / "weizmann", frames=9, fps=12, backend=backend)
    assert len(actions.classes) == 4 and actions[0]["video"].std() > 0.1
    emoji = FolderClips(DATA / "fluent_emoji", frames=9, height=32, width=32, backend=backend)
    assert emoji.classes == () and emoji[0]["caption"] and emoji[0]["label"] == -1
    wild = FolderClips(DATA / "clips", "val", frames=5, height=48, width=64, backend=backend)
    assert all(wild[n]["video"].shape == (3, 5, 48, 64) for n in range(3)) and not wild.skipped
