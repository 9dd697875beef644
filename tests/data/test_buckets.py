"""Buckets: which one suits a video, in which order they give batches, and trainings on clips of several shapes."""

from __future__ import annotations

import shutil
from collections import Counter
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from kit.build import buckets_of
from kit.cli import main
from kit.data import heads
from kit.data.batches import BucketSampler
from kit.data.bucketed import BucketClips
from kit.data.buckets import Bucket, read_shape, suiting
from kit.data.clips import FolderClips
from kit.data.datamodule import ClipDataModule
from kit.data.frames import frame_numbers, most_frames
from kit.data.heads import Head, read_heads
from kit.data.mixture import Mixture
from kit.data.shapes import Shapes
from kit.files import read_json
from kit.media import write_video
from kit.planning.doctor import problems, training_config
from kit.planning.plan import costs
from kit.tokenizer import TokenizerConfig
from tests.fixtures import CLIP, GENERATOR, QUICK, TOKENIZER, composed
from tests.test_training import batches, interrupt_after, losses

WIDE, TALL, LONG = Bucket(5, 16, 32, 3), Bucket(5, 32, 16, 3), Bucket(9, 24, 24, 2)
FILES = {  # name -> frames, height, width
    **{f"wide_{i}": (6, 36, 64) for i in range(1, 5)},
    **{f"tall_{i}": (6, 64, 36) for i in range(1, 4)},
    **{f"square_{i}": (12, 40, 40) for i in range(1, 4)},
}


def write(folder: Path, files: dict[str, tuple[int, int, int]], fps: float = 8.0) -> Path:
    """Writes videos of different hue, each brighter from frame to frame; files: name -> (frames, height, width)."""
    for number, (name, (frames, height, width)) in enumerate(files.items()):
        hue = torch.tensor([number / len(files), 1 - number / len(files), (number * 0.37) % 1])[:, None, None, None]
        video = (hue * torch.linspace(0.3, 1, frames)[None, :, None, None] * 2 - 1).expand(3, frames, height, width)
        write_video(video, folder / f"{name}.mp4", fps)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder of wide, tall and square videos; `tall_2` and `wide_4` are held out."""
    return write(tmp_path_factory.mktemp("mixed"), FILES)


@pytest.fixture
def clips(folder) -> BucketClips:
    source = FolderClips(folder, "all", 5, 32, 32, patience=None, backend="pyav")
    return BucketClips(source, [WIDE, TALL, LONG])


# --- which bucket --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shapes, video, expected",
    [
        (["17x96x160", "17x160x96", "17x128x128"], (50, 1080, 1920), 0),
        (["17x96x160", "17x160x96", "17x128x128"], (50, 1920, 1080), 1),
        (["17x96x160", "17x160x96", "17x128x128"], (50, 500, 560), 2),
        (["17x96x128", "17x128x96"], (50, 300, 300), 0),  # as far from each: the first
        (["17x128x96", "17x96x128"], (50, 300, 300), 0),
        (["17x64x128", "17x64x64"], (50, 100, 141), 1),  # a ratio of 1.41 is nearer to 1 than to 2, as ratios go; 1.42 is not
        (["17x64x128", "17x64x64"], (50, 100, 142), 0),
        (["17x64x64", "33x64x64", "65x64x64"], (64, 64, 64), 1),  # the longest that there are frames for
        (["17x64x64", "33x64x64", "65x64x64"], (65, 64, 64), 2),
        (["17x64x64", "33x64x64"], (16, 64, 64), None),
        (["17x160x96", "5x64x64"], (9, 160, 96), 1),  # too short for its shape: cut off, not held
        (["17x96x176", "33x64x112"], (40, 90, 160), 1),  # 3 % and 2 % are cut off: alike, so the longer one
        (["17x96x176", "33x64x112"], (20, 90, 160), 0),
        (["17x96x160", "33x96x96"], (40, 96, 160), 0),  # longer, but 40 % would be cut off
        (["17x100x100", "33x96x100"], (40, 100, 100), 1),  # 4 % more would be cut off
        (["17x100x100", "33x94x100"], (40, 100, 100), 0),  # 6 %
        (["17x64x64", "33x128x128"], (40, 100, 100), 1),  # longer, though enlarged
        (["17x64x64", "17x128x128"], (40, 100, 100), 0),  # not enlarged
        (["17x92x160", "17x88x160"], (40, 90, 160), 1),  # nor in height, though as near in shape
        (["17x160x92", "17x160x88"], (40, 160, 90), 1),  # nor in width
        (["17x64x112", "17x48x86"], (40, 90, 160), 1),  # nearer in shape, though smaller
        (["17x64x64", "17x128x128"], (40, 128, 128), 1),  # the larger one, where both need not be
        (["17x64x64", "17x64x64"], (40, 128, 128), 0),
    ],
)  # fmt: skip
def test_the_bucket_that_suits_a_video(shapes, video, expected):
    assert suiting([Bucket(*read_shape(text), 1) for text in shapes], *video) == expected


@pytest.mark.parametrize("text", ["17x96", "17x96x160x3", "0x96x96", "17x-96x96", "clip", 17])
def test_wrong_shapes_are_told(text):
    with pytest.raises(ValueError, match=f"data.buckets has {text}; expected FRAMESxHEIGHTxWIDTH"):
        read_shape(text)


def test_most_frames_are_what_a_clip_may_have_without_holding_the_last():
    for count in (1, 2, 7, 30, 31):
        for rate, fps in ((8.0, None), (8.0, 0), (25.0, 8.0), (30000 / 1001, 12.0), (8.0, 24.0), (12.0, 8.0)):
            most = most_frames(count, rate, fps)
            assert frame_numbers(count, rate, most, fps, 0.0).max() < count
            assert frame_numbers(count, rate, most + 1, fps, 0.0).max() >= count


# --- heads ---------------------------------------------------------------------------------------------------------------


def test_heads_are_read_once(folder, tmp_path, monkeypatch):
    own = tmp_path / "own"
    shutil.copytree(folder, own)
    source = FolderClips(own, "all", patience=None)
    found = read_heads(source)
    assert found["wide_1.mp4"] == Head(6, 8.0, 36, 64) and found["square_2.mp4"] == Head(12, 8.0, 40, 40)
    read = []
    monkeypatch.setattr(FolderClips, "head", lambda self, name: read.append(name) or Head(1, 8.0, 2, 2))
    assert read_heads(FolderClips(own, "train", patience=None)).items() <= found.items() and not read
    write(own, {"tall_1": (9, 64, 36)})
    assert read_heads(FolderClips(own, "all", patience=None))["tall_1.mp4"].count == 1 and read == ["tall_1.mp4"]
    read.clear()
    monkeypatch.chdir(tmp_path)
    assert read_heads(FolderClips("own", "all", patience=None)) and not read
    assert len(read_heads(FolderClips(own, "all", patience=None, backend="pyav"))) == len(read) == len(found)
    monkeypatch.setattr(heads, "READING", heads.READING + 1)
    read.clear()
    assert len(read_heads(FolderClips(own, "all", patience=None))) == len(read) == len(found)


def test_a_file_that_could_not_be_read_is_the_same_to_all(folder, tmp_path, monkeypatch):
    """A later process does not try the file again: it might succeed, and would then sort the files differently."""
    own = tmp_path / "own"
    shutil.copytree(folder, own)
    good = (own / "tall_1.mp4").read_bytes()
    (own / "tall_1.mp4").write_bytes(b"x" * len(good))
    with pytest.warns(UserWarning, match="tall_1"):
        found = read_heads(FolderClips(own, "all", patience=None))
    assert len(found) == 9
    (own / "tall_1.mp4").write_bytes(good)
    later = FolderClips(own, "all", patience=None)
    with pytest.warns(UserWarning, match="could not be read before; remove .*json to have it tried again"):
        assert read_heads(later) == found
    assert later.unreadable == [own / "tall_1.mp4"]


def test_where_a_bucket_has_no_readable_file_others_stand_in(folder, tmp_path):
    own = tmp_path / "own"
    shutil.copytree(folder, own)
    clips = BucketClips(FolderClips(own, "all", 5, 32, 32, patience=None), [WIDE, TALL, LONG])
    for i in (1, 2, 3):
        (own / f"tall_{i}.mp4").write_bytes(b"lost since")
    with pytest.warns(UserWarning, match="tall_"):
        item = clips[clips.number(1, 0)]
    assert item["video"].shape == (3, 5, 32, 16) and item["caption"] in ("wide", "square")
    assert {path.name for path in clips.unreadable} == {"tall_1.mp4", "tall_2.mp4", "tall_3.mp4"}


def test_how_many_clips_of_a_bucket_are_read(clips):
    """The number of clips to encode per bucket equals what the sampler reads."""
    for share in (0.0, 0.4):
        stream = iter(BucketSampler(clips, 0, 0, 1, share))
        seen, count, images = [set() for _ in clips.buckets], 60, int(60 * share)
        for _ in range(count):
            for n, _ in next(stream):
                number, i = divmod(n, len(clips.parts))
                seen[i].add(number)
        reads, shares = [], []
        clips.parts, kept = list(clips.parts), clips.parts
        clips.replace(
            lambda part, _, of_all, read: (reads.append(read), shares.append(of_all), part)[-1], count - images, images
        )
        clips.parts = kept
        assert sum(shares) == pytest.approx(1)
        assert reads == [len(numbers) for numbers in seen]


def test_many_heads_are_written_down_on_the_way(folder, tmp_path, monkeypatch):
    own = tmp_path / "own"
    shutil.copytree(folder, own)
    monkeypatch.setattr(heads, "SAVE_EVERY", 0.0)
    read, head = [], FolderClips.head

    def killed(self, name):
        read.append(name)
        if len(read) == 6:
            raise KeyboardInterrupt
        return head(self, name)

    monkeypatch.setattr(FolderClips, "head", killed)
    with pytest.raises(KeyboardInterrupt):
        read_heads(FolderClips(own, "all", patience=None))
    assert len(read_heads(FolderClips(own, "all", patience=None))) == 10 and len(read) == 6 + 5


# --- the stream ----------------------------------------------------------------------------------------------------------


def test_each_file_is_in_the_bucket_that_suits_it(clips):
    kinds = [{name.split("_")[0] for name in part.files} for part in clips.parts]
    assert kinds == [{"wide"}, {"tall"}, {"square"}] and clips.count == [4, 3, 3]
    assert str(clips).startswith("5x16x32 (4 files, 3 clips a batch), 5x32x16 (3 files")
    for i, bucket in enumerate(clips.buckets):
        item, again = clips[clips.number(i, 4)], clips[clips.number(i, 4)]
        assert item["video"].shape[1:] == bucket[:3] and torch.equal(item["video"], again["video"])
        assert item["caption"] == ("wide", "tall", "square")[i]


def test_what_is_known_of_a_source_is_known_of_it_in_buckets(folder):
    clips, other = (
        BucketClips(FolderClips(folder, "all", 5, 32, 32, seed=seed, patience=None, backend="pyav"), [WIDE, TALL, LONG])
        for seed in (3, 4)
    )
    for key in ("name", "native_fps", "draws", "files", "seed", "classes", "captioned"):
        assert getattr(clips, key) == getattr(clips.source, key)
    assert clips.texts() == clips.source.texts() and len(clips.texts()) == 10
    assert clips.listing() == clips.source.listing() and len(clips.listing()) == 10
    assert clips.clip_turns.order != other.clip_turns.order and clips.image_turns.order != other.image_turns.order


def test_at_a_higher_rate_files_have_more_frames(folder):
    source = FolderClips(folder, "all", 5, 32, 32, fps=16.0, patience=None, backend="pyav")
    assert BucketClips(source, [WIDE, TALL, Bucket(17, 24, 24, 1)]).count == [4, 3, 3]


def buckets_by(stream: list, clips: BucketClips) -> list[int]:
    """Returns the bucket of each batch, after a check that all clips of a batch are from one."""
    places = [{n % len(clips.parts) for n, _ in batch} for batch in stream]
    assert all(len(place) == 1 for place in places)
    return [place.pop() for place in places]


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_a_batch_is_a_function_of_its_number(clips, share):
    """It does not depend on where a stream begins; batches left out only shift the later ones."""
    whole = batches(BucketSampler(clips, 0, 0, 1, share), 1200)
    for first in (1, 7, 999, 1003):
        assert batches(BucketSampler(clips, first, 0, 1, share), 20) == whole[first : first + 20]
    left_out = batches(BucketSampler(clips, 0, 0, 1, share, frozenset({2, 5})), 20)
    assert left_out == [batch for i, batch in enumerate(whole) if i not in (2, 5)][:20]
    assert batches(BucketSampler(clips, 3, 0, 1, share, frozenset({2, 5})), 9) == left_out[3:12]


def test_ranks_are_in_the_same_bucket_and_share_its_clips(clips):
    """Two ranks together read the same clips as one rank with doubled batches, bucket by bucket."""
    ranks = [batches(BucketSampler(clips, 3, rank, 2, 0.25), 60) for rank in (0, 1)]
    assert buckets_by(ranks[0], clips) == buckets_by(ranks[1], clips)
    assert [batch[0][1] for batch in ranks[0]] == [batch[0][1] for batch in ranks[1]], "images or clips"
    keys = [key for rank in ranks for batch in rank for key in batch if key[1] > 1]
    assert len(keys) == len(set(keys))
    clips.buckets = [bucket._replace(batch_size=2 * bucket.batch_size) for bucket in clips.buckets]
    for a, b, both in zip(*ranks, batches(BucketSampler(clips, 3, 0, 1, 0.25), 60), strict=True):
        assert sorted(a + b) == sorted(both)


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_every_file_is_used_equally_often(clips, share):
    """This holds for batches of different sizes, for clips and for images; and no clip of a bucket is left out."""
    stream = batches(BucketSampler(clips, 0, 0, 1, share), 2000)
    assert {len(batch) for batch in stream if batch[0][1] == 9} == {2}
    for images in (False, True)[: 1 + bool(share)]:
        keys = [key for batch in stream for key in batch if (key[1] == 1) == images]
        uses = Counter(clips.parts[n % 3].file(n // 3) for n, _ in keys)
        assert len(uses) == 10 and max(uses.values()) < 1.02 * min(uses.values()) + 2, uses
        for i in range(3):
            numbers = [n // 3 for n, _ in keys if n % 3 == i]
            assert numbers == list(range(len(numbers)))
    first = Counter(buckets_by(stream[:100], clips))
    assert min(first.values()) > 10, "they take turns all the while"


def test_one_bucket_is_the_plain_stream(folder):
    shape = dict(frames=5, height=32, width=32, fps=0, batch_size=3, val_clips=1, workers=0, image_share=0.25)
    source = partial(FolderClips, root=folder, patience=None)

    class Alone:
        global_rank, world_size, strategy = 0, 1, SimpleNamespace(root_device=torch.device("cpu"))

    plain, bucket = (ClipDataModule(source, **shape, buckets=b) for b in ((), [Bucket(5, 32, 32, 3)._asdict()]))
    plain.trainer = bucket.trainer = Alone()
    for a, b, _ in zip(plain.train_dataloader(), bucket.train_dataloader(), range(6)):
        assert torch.equal(a["video"], b["video"]) and torch.equal(a["n"], b["n"]) and a["caption"] == b["caption"]


@pytest.fixture
def mixed(folder, tmp_path) -> BucketClips:
    """Two folders in shares of 3 to 1, of which the smaller has no tall videos, in buckets."""
    write(tmp_path / "few", {"wide_1": (6, 36, 64), "wide_2": (6, 36, 64), "square_1": (12, 40, 40)})
    shape = dict(frames=5, height=32, width=32)
    sources = {
        "many": partial(FolderClips, folder, patience=None),
        "few": partial(FolderClips, tmp_path / "few", patience=None),
    }
    return BucketClips(Mixture(sources, {"many": 3, "few": 1}, "all", **shape), [WIDE, TALL, LONG])


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_the_sources_of_a_mixture_keep_their_shares_in_buckets(mixed, share):
    """Of each source all files are used equally often, and no clip of a bucket is left out."""
    assert mixed.count == [6, 3, 4] and [list(part.sources) for part in mixed.parts] == [
        ["many", "few"],
        ["many"],
        ["many", "few"],
    ]
    stream = batches(BucketSampler(mixed, 0, 0, 1, share), 3000)
    for images in (False, True)[: 1 + bool(share)]:
        uses = {"many": Counter(), "few": Counter()}
        for n, frames in (key for batch in stream for key in batch):
            number, i = divmod(n, len(mixed.parts))
            if (frames == 1) == images:
                name, turn = mixed.parts[i].turns.of(number)
                uses[name][mixed.parts[i].sources[name].file(turn)] += 1
        assert sum(uses["many"].values()) == pytest.approx(3 * sum(uses["few"].values()), rel=0.02)
        for files, of_source in ((10, uses["many"]), (3, uses["few"])):
            assert len(of_source) == files and max(of_source.values()) < 1.05 * min(of_source.values()) + 2


def test_clips_of_a_mixture_have_their_buckets_shape(mixed):
    assert str(mixed).startswith("5x16x32 (6 files, 3 clips a batch), 5x32x16 (3 files")
    for i, bucket in enumerate(mixed.buckets):
        items = [mixed[mixed.number(i, n)] for n in range(4)]
        assert {item["video"].shape[1:] for item in items} == {bucket[:3]}
        assert {item["caption"] for item in items} == {("wide", "tall", "square")[i]}
        assert {mixed.classes[item["label"]] for item in items} == {("wide", "tall", "square")[i]}


# --- what cannot be ------------------------------------------------------------------------------------------------------


def test_files_that_suit_no_bucket_and_buckets_that_suit_no_file_are_told(folder):
    source = partial(FolderClips, folder, "all", 5, 32, 32, patience=None)
    with pytest.warns(UserWarning, match="no file suits 9x16x64 best; nothing is trained there"):
        clips = BucketClips(source(), [WIDE, Bucket(9, 16, 64, 1), LONG])
    assert clips.buckets == [WIDE, LONG] and clips.number(1, 4) == 9
    with pytest.warns(UserWarning, match="7 of 10 files in .* are shorter than each of data.buckets, 9x24x24, and left out"):
        assert BucketClips(source(), [LONG]).count == [3]
    with pytest.raises(
        ValueError, match="10 of 10 files in .* are shorter than each of data.buckets, 17x32x32; add a shorter"
    ):
        BucketClips(source(), [Bucket(17, 32, 32, 1)])


def test_unreadable_files_are_counted(folder, tmp_path):
    own = tmp_path / "own"
    shutil.copytree(folder, own)
    for name in ("wide_1", "wide_3"):
        (own / f"{name}.mp4").write_bytes(b"no video")
    with pytest.warns(UserWarning, match="cannot read the video"):
        clips = BucketClips(FolderClips(own, "all", 5, 32, 32, patience=None), [WIDE, TALL, LONG])
    assert clips.count == [2, 3, 3]
    assert {path.name for path in clips.unreadable} == {"wide_1.mp4", "wide_3.mp4"}
    (own / "wide_2.mp4").write_bytes(b"lost since")
    with pytest.warns(UserWarning, match="wide_2"):
        assert clips[clips.number(0, clips.parts[0].files.index("wide_2.mp4"))]["caption"] == "wide"
    clips.replace(lambda part, bucket, share, read: [], 1, 0)
    assert len(clips.unreadable) == 3, "also once its clips are encoded"
    for path in own.iterdir():
        path.write_bytes(b"no video either")
    with pytest.raises(ValueError, match="none of the 10 videos"), pytest.warns(UserWarning):
        BucketClips(FolderClips(own, "all", 5, 32, 32, patience=None), [WIDE])


def test_buckets_are_checked_by_the_tokenizer():
    tokenizer = TokenizerConfig(bits=8, scales=(1, 2, 4), patch=4, widths=(32, 32))
    for word, message in (
        ("[5x32x30]", "data.buckets, 5x32x30: height and width must be multiples of 8"),
        ("[5x32x32,5x40x48]", "data.buckets, 5x40x48: .*shorter side must be at most 32"),
        ("[6x32x32]", r"data.buckets, 6x32x32: a clip must have 1 \+ 4n frames"),
        ("[17x32x32]", "data.buckets, 17x32x32: data.batch_tokens=100; a clip has 105"),
    ):
        cfg = composed("stage1_tokenizer", "data=clips", "data.root=x", "data.batch_tokens=100", f"data.buckets={word}")
        with pytest.raises(ValueError, match=message):
            buckets_of(cfg, tokenizer)
    words = ["data=clips", "data.root=x", "data.batch_tokens=100", "data.buckets=[5x32x32,5x16x16,1x16x48]"]
    cfg = composed("stage1_tokenizer", *words, "data.batch_size=7")
    assert [bucket.batch_size for bucket in buckets_of(cfg, tokenizer)] == [2, 10, 6]
    assert [bucket.batch_size for bucket in buckets_of(cfg, None)] == [7, 7, 7]


def test_only_files_can_be_sorted():
    with pytest.raises(
        ValueError, match="Shapes has no such files: take data=clips, ucf101 or shards, a mixture of those, or data"
    ):
        ClipDataModule(Shapes, 5, 32, 32, 8.0, 2, 1, 0, buckets=[WIDE._asdict()])


# --- trainings -----------------------------------------------------------------------------------------------------------

BOTH = ["data.buckets=[5x16x32,5x32x16]", "data.batch_tokens=90"]
ALIKE = ["trainer.precision=32-true", "data.source.patience=null"]


def fit(conf: str, root: Path, folder: Path, *words: str, name: str = "run", tokenizer: Path | None = None) -> int:
    data = ["data=clips", f"data.root={folder}", "data.source.label_from=none"]
    model = [*GENERATOR, f"tokenizer_ckpt={tokenizer}/checkpoints/last.ckpt"] if tokenizer else TOKENIZER
    return main(["fit", f"conf={conf}", f"root={root}", f"name={name}", *data, *CLIP, *model, *QUICK, *ALIKE, *words])


@pytest.fixture(scope="module")
def tokenizer(folder, tmp_path_factory) -> Path:
    """The folder of a tokenizer's run in two buckets, with scale dropout."""
    root = tmp_path_factory.mktemp("tokenizer")
    words = [*BOTH, "recipe.tokenizer.steps=6", "scale_dropout.last=2", "scale_dropout.p=0.5", "optimizer.accumulate=2"]
    assert fit("stage1_tokenizer", root, folder, *words) == 0
    return root / "run"


@pytest.fixture(scope="module")
def generator(folder, tokenizer, tmp_path_factory) -> Path:
    """The folder of a generator's run in two buckets, with batches of images; its clips are encoded during training."""
    root = tmp_path_factory.mktemp("generator")
    words = [*BOTH, "recipe.generator.encoded_clips=0", "recipe.generator.steps=8", "data.image_share=0.25"]
    assert fit("stage2_generator", root, folder, *words, tokenizer=tokenizer) == 0
    return root / "run"


def test_a_tokenizer_trains_in_buckets(tokenizer):
    assert len(losses(tokenizer)) == 12 and np.isfinite(losses(tokenizer)).all()


@pytest.mark.parametrize("encoded", [0, 9])
def test_a_run_in_buckets_goes_on_to_the_last_bit(encoded, folder, tokenizer, generator, tmp_path, monkeypatch, caplog):
    """A stopped and resumed run has the losses of an uninterrupted one, with clips encoded during training or ahead."""
    words = [
        *BOTH, f"recipe.generator.encoded_clips={encoded}", "recipe.generator.steps=8", "data.image_share=0.25",
        "callbacks.last.every=1",
    ]  # fmt: skip
    if encoded:
        assert fit("stage2_generator", tmp_path, folder, *words, name="whole", tokenizer=tokenizer) == 0
        found = {path.parent.name: read_json(path)["clips"] for path in (tmp_path / "whole").glob("*/manifest.json")}
        assert found == {"encoded_clips_5x16x32": {"train": 7}, "encoded_clips_5x32x16": {"train": 3}}, "as 6 files to 2"
    interrupt_after(4, monkeypatch)
    assert fit("stage2_generator", tmp_path, folder, *words, tokenizer=tokenizer) == 1
    monkeypatch.undo()
    assert fit("stage2_generator", tmp_path, folder, *words, "ckpt=last", tokenizer=tokenizer) == 0
    assert losses(tmp_path / "run", start=1) == losses(tmp_path / "whole" if encoded else generator)[3:]
    assert "5x16x32 (6 files, 4 clips a batch), 5x32x16 (2 files, 4 clips a batch)" in caplog.text


def test_the_loss_of_a_batch_is_that_of_a_plain_run_of_its_shape(folder, tokenizer, generator, tmp_path):
    """The losses of each bucket's batches equal those of a run on its files alone.

    The generator is trained already and has learning rate 0; nothing is drawn at random but the clips.
    """
    words = [
        "init=weights", f"init.ckpt={generator}/checkpoints/last.ckpt", "optimizer.lr=0", "recipe.generator.steps=8",
        "recipe.generator.encoded_clips=0", "correction.p_max=0", "correction.delta=0", "frame_mask=0", "drop_condition=0",
        "data.batch_tokens=90", "data.source.val_every=1000", "loss.scale_weights=early", "data.image_share=0",
    ]  # fmt: skip

    def run(name: str, kinds: tuple[str, ...], *shape: str) -> list[float]:
        own = write(tmp_path / f"clips_{name}", {"z_held_out": (6, 32, 32)})
        for path in (path for path in folder.iterdir() if path.name.startswith(kinds)):
            shutil.copy(path, own)
        assert fit("stage2_generator", tmp_path, own, *words, *shape, name=name, tokenizer=tokenizer) == 0
        return losses(tmp_path / name)

    plain = [
        run("wide", ("wide",), "data.height=16", "data.width=32"), run("tall", ("tall",), "data.height=32", "data.width=16"),
    ]  # fmt: skip
    both = run("both", ("wide", "tall"), BOTH[0])
    clips = BucketClips(FolderClips(tmp_path / "clips_both", patience=None), [Bucket(5, 16, 32, 4), Bucket(5, 32, 16, 4)])
    turns = [clips.clip_turns.of(i) for i in range(8)]
    assert {bucket for bucket, _ in turns} == {0, 1}
    assert both == pytest.approx([plain[bucket][number] for bucket, number in turns], abs=1e-6)
    assert not set(plain[0]) & set(plain[1])


def test_a_stage_can_have_buckets(folder, tokenizer, tmp_path, caplog):
    stages = "stages={few:{steps:1,data:{height:16,width:16}},all:{steps:3,data:{buckets:[5x16x32,9x24x24]}}}"
    switch = "+callbacks.stage_switch={_target_:callbacks.StageSwitch,folder:${folder}/checkpoints,monitor:val/loss}"
    words = [stages, switch, "recipe.generator.encoded_clips=8"]
    assert fit("stage2_generator", tmp_path, folder, *words, tokenizer=tokenizer) == 0
    assert "stage 2 of 2, all: 5x16x32 (5 files, 4 clips a batch), 9x24x24 (3 files, 4 clips a batch)" in caplog.text
    assert (tmp_path / "run" / "encoded_clips_all.9x24x24" / "manifest.json").exists()


def test_a_cache_in_buckets_is_what_a_training_encodes_for_itself(folder, tokenizer, tmp_path, capsys):
    """Training on it has the losses of one that encodes the same clips ahead; given once more, the command adds clips."""
    words = [*BOTH, "recipe.generator.steps=8", "data.image_share=0.25", "recipe.generator.encoded_clips=8"]
    assert fit("stage2_generator", tmp_path, folder, *words, name="whole", tokenizer=tokenizer) == 0

    def encode(clips: int) -> int:
        data = ["data=clips", f"data.root={folder}", "data.source.label_from=none", *CLIP[2:], *ALIKE[1:], BOTH[0]]
        ckpt = f"tokenizer_ckpt={tokenizer}/checkpoints/last.ckpt"
        return main(["cache", *data, ckpt, f"root={tmp_path}", f"clips={clips}", "val_clips=2"])

    def cached(name: str, *words: str) -> int:
        run = [f"root={tmp_path}", f"name={name}", "data=cached", f"data.root={tmp_path / 'cache'}", "trainer.devices=1"]
        model = [*GENERATOR, f"tokenizer_ckpt={tokenizer}/checkpoints/last.ckpt"]
        return main(["fit", "conf=stage2_generator", *run, *model, *QUICK, *ALIKE[:1], *words, "data.val_clips=2"])

    assert encode(8) == 0
    assert "8 + 2 clips" in capsys.readouterr().out
    assert cached("run", *BOTH[1:], *words[2:4]) == 0
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    assert encode(12) == 0
    assert "12 + 2 clips" in capsys.readouterr().out
    assert read_json(tmp_path / "cache" / "5x16x32" / "manifest.json")["clips"] == {"train": 9}
    words = ["data=cached", f"data.root={tmp_path / 'cache'}", f"tokenizer_ckpt={tokenizer}/checkpoints/last.ckpt"]
    assert list(training_config("stage2_generator", words).data.buckets) == ["5x16x32", "5x32x16"]
    assert cached("few", *BOTH[1:], "data.buckets=[5x32x16]", "recipe.generator.steps=2") == 0
    for word, told in (
        ("data.buckets=[5x16x16]", "has no 5x16x16; choose from 5x16x32, 5x32x16"),
        ("data.buckets=[]", "are in buckets: leave out data.buckets="),
    ):
        assert cached("wrong", word) == 1
        assert told in capsys.readouterr().err


@pytest.mark.parametrize("encoded", [0, 9])
def test_a_mixture_in_buckets_goes_on_to_the_last_bit(encoded, folder, tokenizer, tmp_path, monkeypatch):
    sources = [
        f"+data.source.sources.{name}={{_target_:kit.data.clips.FolderClips,_partial_:true,root:'{folder}',patience:null,seed:{n}}}"
        for n, name in enumerate(("a", "b"))
    ]
    weights = ["+data.source.weights.a=2", "+data.source.weights.b=1"]
    words = [
        *BOTH, *sources, *weights, f"recipe.generator.encoded_clips={encoded}", "recipe.generator.steps=6",
        "callbacks.last.every=1", "data.image_share=0.25",
    ]  # fmt: skip

    def run(name: str, *more: str) -> int:
        model = [*GENERATOR, f"tokenizer_ckpt={tokenizer}/checkpoints/last.ckpt"]
        run = ["fit", "conf=stage2_generator", f"root={tmp_path}", f"name={name}", "data=mixture"]
        return main([*run, *CLIP, *model, *QUICK, *ALIKE[:1], *words, *more])

    assert run("whole") == 0
    interrupt_after(3, monkeypatch)
    assert run("run") == 1
    monkeypatch.undo()
    assert run("run", "ckpt=last") == 0
    assert losses(tmp_path / "run", start=1) == losses(tmp_path / "whole")[2:]


def test_doctor_tells_of_each_bucket(folder, capsys):
    words = ["data=clips", f"data.root={folder}", *CLIP, *TOKENIZER, "data.batch_tokens=90", "optimizer.accumulate=2"]
    cfg = composed("stage1_tokenizer", *words, "data.buckets=[5x16x32,9x24x24]")
    assert problems(cfg) == []
    assert "5x16x32: 2 latent frames x scales 1x2 2x4 = 20 tokens in 4 steps, 8 clips a step" in capsys.readouterr().out
    row = costs(cfg, composed("doctor"))[1]
    assert row.split()[1:3] == ["9x24x24", "42"], "the one with the most tokens in a step, four times 42"
    (problem,) = problems(composed("stage1_tokenizer", *words, "data.buckets=[5x16x32,5x24x20]"))
    assert problem.startswith("tokenizer and clips of stage1_tokenizer, 5x24x20: height and width must be multiples of 8")
