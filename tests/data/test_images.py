"""Batches of images from a source of their own, beside clips."""

from __future__ import annotations

import shutil
import tarfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import kit.data.clips
from kit.build import build_data
from kit.cli import main
from kit.data.bucketed import BucketClips
from kit.data.buckets import Bucket, image_buckets
from kit.data.clips import FolderClips
from kit.data.datamodule import ClipDataModule
from kit.data.mixture import Mixture
from kit.data.numbered import Numbered
from kit.data.shapes import SHAPES, Shapes
from kit.data.webdataset import ShardClips
from kit.files import read_json
from tests.data.test_buckets import FILES, write
from tests.fixtures import CLIP, composed, fit_generator, fit_tokenizer
from tests.test_training import interrupt_after, losses

SHAPE = dict(frames=5, height=32, width=32, fps=8.0, batch_size=2, val_clips=1, workers=0)
ALONE = SimpleNamespace(
    global_rank=0, world_size=1, accumulate_grad_batches=1, strategy=SimpleNamespace(root_device=torch.device("cpu")),
    lightning_module=SimpleNamespace(hparams=SimpleNamespace(optimizer={})),
)  # fmt: skip


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """A folder of wide and tall pictures of the classes `star`, which `Shapes` has too, and `tree`."""
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for i in range(8):
        (root / ("star" if i % 2 else "tree")).mkdir(exist_ok=True)
        size = (32, 64) if i < 5 else (64, 32)
        pixels = rng.integers(0, 255, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize(size[::-1]).save(root / ("star" if i % 2 else "tree") / f"{i}.png")
    return root


def module(pictures: Path, source=Shapes, **values) -> ClipDataModule:
    data = ClipDataModule(source, **{**SHAPE, "image_share": 0.5, **values}, images=partial(FolderClips, pictures))
    data.trainer = ALONE
    return data


def test_every_other_batch_is_of_pictures(pictures):
    """Such a batch has as many pictures as a batch of clips has latent frames, in the order of their source."""
    data = module(pictures)
    clips, images = Shapes(frames=5, height=32, width=32, fps=8.0), FolderClips(pictures, "train", 1, 32, 32)
    for i, batch in zip(range(6), data.train_dataloader()):
        source, size, first = (images, 4, i // 2 * 4) if i % 2 else (clips, 2, i // 2 * 2)
        expected = [source[n] for n in range(first, first + size)]
        assert batch["n"].tolist() == list(range(first, first + size))
        assert torch.equal(batch["video"], torch.stack([item["video"] for item in expected]))
        assert batch["caption"] == [item["caption"] for item in expected]
        if i % 2:
            assert batch["label"].tolist() == [SHAPES.index("star") if c == "star" else -1 for c in batch["caption"]]
        else:
            assert batch["label"].tolist() == [item["label"] for item in expected]
    assert {"star", "tree"} == {images.words(name)["caption"] for name in images.files}


def test_pictures_may_come_from_a_source_without_a_root():
    own = "+data.images={_target_: kit.data.shapes.Shapes, _partial_: true, seed: 5}"
    cfg = composed("stage2_generator", "size=tiny", *CLIP, "~data.images", own, "data.image_share=0.5")
    assert (images := build_data(cfg).images).seed == 5 and images[0]["video"].shape == (3, 1, 32, 32)


def test_a_source_among_the_values_of_a_folder_of_pictures_is_told():
    """Their root=null stands for no pictures: such a source would not be read."""
    own = ["data.images._target_=mine.Pictures", "data.image_share=0.5"]
    with pytest.raises(
        ValueError, match=r"data.images._target_=mine.Pictures stands among the values of images=folder; write"
    ):
        build_data(composed("stage2_generator", "size=tiny", *CLIP, *own))


def test_pictures_are_sorted_into_the_sizes_of_the_buckets(pictures, tmp_path):
    """Each size is used once, with its largest batch."""
    wide, long, tall = Bucket(5, 16, 32, 3), Bucket(9, 16, 32, 2), Bucket(5, 32, 16, 3)
    assert image_buckets([wide, long, tall]) == [Bucket(1, 16, 32, 6), Bucket(1, 32, 16, 6)]
    assert image_buckets([long, wide._replace(batch_size=1)]) == [Bucket(1, 16, 32, 6)]
    folder = write(tmp_path, FILES)
    source, buckets = partial(FolderClips, folder, patience=None), [b._asdict() for b in (wide, tall)]
    data = module(pictures, source, buckets=buckets)
    seen = {}
    for i, batch in zip(range(40), data.train_dataloader()):
        assert (batch["video"].shape[2] == 1) == (i % 2 == 1)
        if i % 2:
            names = [data.images.parts[n % 2].file(n // 2) for n in batch["n"].tolist()]
            seen.setdefault(batch["video"].shape[3:], set()).update(names)
            assert len(names) == 6
    assert {shape: len(names) for shape, names in seen.items()} == {(16, 32): 4, (32, 16): 3}
    assert not set.intersection(*seen.values()) and set.union(*seen.values()) == set(data.images.source.files)


def test_a_generator_learns_from_clips_and_pictures(pair, pictures, tmp_path, monkeypatch, caplog):
    """Losses are the same with clips encoded during training, ahead or in a cache, and after a resume."""

    def fit(name, *words, expected=0):
        steps = [f"name={name}", "recipe.generator.steps=6", "trainer.precision=32-true", "data.image_share=0.5"]
        status = fit_generator(tmp_path, *steps, *words, "callbacks.last.every=1", tokenizer=pair.tokenizer)
        assert status == expected
        return losses(tmp_path / name, start=0)

    folder = f"data.images.root={pictures}"
    ahead = fit("ahead", folder)
    assert "50% of them of 8 pictures instead" in caplog.text
    found = {path.parent.name: read_json(path) for path in (tmp_path / "ahead").glob("*/manifest.json")}
    counts = {name: manifest["clips"] for name, manifest in found.items()}
    assert counts == {"encoded_clips": {"train": 12}, "encoded_clips_images": {"train": 24}}
    sources = {name: manifest["about"]["source"]["_target_"].rpartition(".")[2] for name, manifest in found.items()}
    assert sources == {"encoded_clips": "Shapes", "encoded_clips_images": "FolderClips"}
    torch.testing.assert_close(
        torch.tensor(ahead), torch.tensor(fit("fresh", folder, "recipe.generator.encoded_clips=0")), atol=2e-3, rtol=2e-3
    )
    assert max(abs(a - b) for a, b in zip(ahead, fit("first_frames"))) > 1e-3, "first frames of clips are other images"
    interrupt_after(4, monkeypatch)
    fit("stopped", folder, expected=1)
    monkeypatch.undo()
    fit("stopped", folder, "ckpt=last")
    assert losses(tmp_path / "stopped", start=1) == ahead[3:]

    words = [*CLIP[3:5], "data.frames=1", "data=clips", f"data.root={pictures}", "clips=24", "val_clips=1"]
    assert main(["cache", f"root={tmp_path}", "name=cache", f"tokenizer_ckpt={pair.tokenizer}", *words]) == 0
    cached = ("images@data.images=cached", f"data.images.root={tmp_path / 'cache'}")
    assert fit("cached", *cached) == ahead


def test_what_all_processes_read_is_encoded(pictures):
    """Of clips and of pictures, as many as three processes read in four batches of clips and four of images."""
    for own, expected in (
        (True, [(Bucket(5, 32, 32, 2), 24, False), (Bucket(1, 32, 32, 4), 48, True)]),
        (False, [(Bucket(5, 32, 32, 2), 48, False)]),  # first frames of clips that no batch of clips has, too
    ):
        data = module(pictures)
        data.images = data.images if own else None
        data.trainer, asked = SimpleNamespace(**{**vars(ALONE), "world_size": 3}), []
        data.encode_ahead(lambda part, bucket, share, needed, images: asked.append((bucket, needed, images)) or part, 8, 100)
        data.train_dataloader()
        assert asked == expected


def test_a_run_knows_the_files_that_it_began_with(pictures, tmp_path, caplog):
    began = module(pictures)
    began.tell_changes(began.settings)
    assert "other data" not in caplog.text
    shutil.copytree(pictures, tmp_path / "more")
    with (tmp_path / "more" / "star" / "1.png").open("ab") as file:
        file.write(b"another picture of the same name")
    changed, before = module(tmp_path / "more"), dict(began.settings)
    changed.tell_changes({key: value for key, value in before.items() if key != "file_sizes"})  # of an older checkpoint
    assert "other data" not in caplog.text
    changed.tell_changes(before)
    assert "it began with (then, now): file_sizes: " in caplog.text and "files: " not in caplog.text
    shutil.copy(pictures / "star" / "1.png", tmp_path / "more" / "star" / "0.png")
    module(tmp_path / "more").tell_changes(began.settings)
    assert "resumes with other data than it began with (then, now): files: " in caplog.text
    caplog.clear()
    other = ClipDataModule(Shapes, **SHAPE, image_share=0.5, images=partial(FolderClips, pictures, seed=1))
    other.trainer = ALONE
    other.tell_changes(began.settings)
    assert "resumes with other data than it began with (then, now): draws: " in caplog.text


def test_a_run_knows_the_captions_that_it_began_with(pictures, tmp_path, caplog):
    shutil.copytree(pictures, tmp_path / "captioned")
    began = {}
    for words in ("a drawing", "a drawing", "another drawing"):
        for picture in (tmp_path / "captioned").rglob("*.png"):
            picture.with_suffix(".txt").write_text(words)
        assert "other data" not in caplog.text
        (now := module(tmp_path / "captioned")).tell_changes(began)
        began = now.settings
    assert "resumes with other data than it began with (then, now): words: " in caplog.text


def test_only_clips_go_to_the_training_device(pictures):
    batch = next(iter(module(pictures).train_dataloader()))
    moved = module(pictures).transfer_batch_to_device(batch, torch.device("meta"), 0)
    assert moved.keys() == batch.keys() and moved["video"].device.type == "meta"
    assert {moved[key].device.type for key in ("n", "label", "given")} == {"cpu"}


def test_what_cannot_be(pair, pictures, tmp_path, capsys):
    with pytest.raises(ValueError, match="data.images go beside clips of several frames"):
        module(pictures, frames=1)
    root = f"data.images.root={pictures}"
    for words, told in (
        ([root, "data.image_share=0"], "data.images is given, but data.image_share=0 of the batches take them"),
        ([root, "data.image_share=0.5", "data.frames=1"], "pictures alone are data=clips"),
        (["images@data.images=cached"], "data.images.root is missing"),
    ):
        assert fit_generator(tmp_path, *words, tokenizer=pair.tokenizer) == 1
        assert told in capsys.readouterr().err
    assert fit_tokenizer(tmp_path, root, "data.image_share=0.5") == 1
    assert "data.image_share is for generators" in capsys.readouterr().err
    empty = tmp_path / "empty"
    empty.mkdir()
    assert fit_generator(tmp_path, f"data.images.root={empty}", "data.image_share=0.5", tokenizer=pair.tokenizer) == 1
    assert str(empty) in capsys.readouterr().err


def test_the_share_of_images_and_the_devices_decide_which_clips_a_step_holds():
    def settings(devices: int = 1, **more) -> dict:
        data = ClipDataModule(Shapes, 5, 16, 16, 8.0, batch_size=2, val_clips=2, workers=0, **more)
        module = SimpleNamespace(hparams=SimpleNamespace(optimizer={}))
        data.trainer = SimpleNamespace(world_size=devices, lightning_module=module, accumulate_grad_batches=1)
        return data.settings

    assert settings() == settings()
    assert [key for key, value in settings(image_share=0.5).items() if value != settings()[key]] == ["image_share"]
    assert [key for key, value in settings(devices=2).items() if value != settings()[key]] == ["devices"]


def buckets_of(videos: Path) -> BucketClips:
    return BucketClips(FolderClips(videos, fps=8, frames=9), [Bucket(5, 32, 32, 2), Bucket(9, 32, 48, 2)])


def in_shards(videos: Path) -> ShardClips:
    with tarfile.open(videos.parent / "packed.tar", "w") as tar:
        tar.add(videos, "")
    return ShardClips(videos.parent / "packed.tar", frames=9, height=32, width=48, seed=3)


@pytest.mark.parametrize(
    "source",
    [
        lambda videos: FolderClips(videos, frames=9, flip=True, random_crop=True),
        lambda videos: FolderClips(videos, frames=9, fps=8, backend="pyav", patience=None, height=32, width=48),
        lambda videos: FolderClips(videos, "val", frames=99),  # too short
        in_shards,
        buckets_of,
        lambda videos: Mixture(
            {"a": partial(FolderClips, videos), "b": Shapes}, {"a": 2, "b": 1}, frames=9, height=32, width=48, fps=8
        ),
    ],
    ids=["decord", "pyav", "short", "shards", "buckets", "mixture"],
)
def test_of_the_first_frames_of_a_clip_no_others_are_read(videos, source, monkeypatch):
    source, asked, read = source(videos), [], kit.data.clips.read_fitted
    monkeypatch.setattr(
        kit.data.clips, "read_fitted", lambda video, numbers, *rest: asked.append(len(numbers)) or read(video, numbers, *rest)
    )
    for n in range(6):
        whole, some = Numbered(source)[n, 5], source.beginning(n, 1)
        assert torch.equal(some["video"][:, :1], whole["video"][:, :1])
        assert all(some[key] == whole[key] for key in ("caption", "label")) and some.get("given", 0) == whole["given"]
        assert torch.equal(Numbered(source)[n, 1]["video"], whole["video"][:, :1])
    assert asked and asked == [5, 1, 1] * (len(asked) // 3)


def test_a_source_s_own_items_are_those_of_images_too(videos):
    """One that derives from a source that reads less, and changes its items; and one that reads less itself."""

    class Darken:  # of any source
        def __getitem__(self, n):
            return super().__getitem__(n) | {"video": torch.zeros(3, self.frames, self.height, self.width)}

    class Mixed(Darken, FolderClips): ...

    class Further(Mixed): ...

    class Own(FolderClips):
        def __getitem__(self, n):
            return super().__getitem__(n) | {"video": torch.zeros(3, self.frames, self.height, self.width)}

    class Quick(Own):
        def beginning(self, n, frames):
            return super().beginning(n, frames) | {"video": torch.ones(3, frames, self.height, self.width)}

    for kind, shown in ((Mixed, 0), (Further, 0), (Own, 0), (Quick, 1)):
        assert (Numbered(kind(videos, frames=5))[2, 1]["video"] == shown).all()
