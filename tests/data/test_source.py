"""A data set of one's own: what it need not say has a default, and what it lacks is told."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from kit.cli import main
from kit.data.bucketed import BucketClips
from kit.data.buckets import Bucket
from kit.data.datamodule import ClipDataModule
from kit.data.mixture import Mixture
from kit.data.numbered import Numbered
from kit.data.shapes import Shapes
from kit.data.source import ClipSource
from tests.fixtures import CLIP, GENERATOR, QUICK, TOKENIZER

SHAPE = {"frames": 5, "height": 32, "width": 32, "fps": 8}
LOADING = {"batch_size": 2, "val_clips": 2, "workers": 0}


class Stripes(ClipSource):
    """Stripes that move: the least that a data set has to be. Its clips are longer than asked."""

    def __init__(self, split: str, frames: int, height: int, width: int, fps: float, **of_shapes):
        self.shape, self.captioned = (frames + 3, height, width), True

    def __getitem__(self, n):
        frames, _, width = self.shape
        rows = torch.arange(width) / 8 + torch.arange(frames)[:, None, None] * (1 + n % 3)
        return {"video": rows.sin().expand(3, *self.shape), "caption": f"stripes at speed {n % 3}", "label": -1}


class Drawing(Stripes):
    draws = {"weights": np.ones(2)}


class Strange(Dataset):
    def __init__(self, **_): ...


def test_it_trains_is_cached_mixed_and_validated(tmp_path):
    trainer, shape = CLIP[:2], [word for word in CLIP if word.startswith("data.")]
    own = ["data.source._target_=tests.data.test_source.Stripes", f"root={tmp_path}", *shape]
    few = ["trainer.max_steps=2", *(word for word in QUICK if "val_check" not in word), "trainer.val_check_interval=2"]
    assert main(["fit", "conf=stage1_tokenizer", *own, *trainer, *few, *TOKENIZER, "name=codec"]) == 0
    codec = f"tokenizer_ckpt={tmp_path / 'codec' / 'checkpoints' / 'last.ckpt'}"
    assert main(["cache", *own, codec, "clips=8", "val_clips=4", "name=cached"]) == 0
    cached = ["data=cached", f"data.root={tmp_path / 'cached'}", f"root={tmp_path}", *trainer, *few]
    assert main(["fit", "conf=stage2_generator", *cached, codec, *GENERATOR, "name=generator"]) == 0
    generator = tmp_path / "generator" / "checkpoints" / "last.ckpt"
    assert main(["validate", f"ckpt={generator}", f"root={tmp_path}", own[0], "clips=2", "name=scores"]) == 0
    mixture = Mixture({"own": Stripes, "drawn": Shapes}, {"own": 1, "drawn": 1}, "train", **SHAPE)
    assert {mixture[n]["label"] >= 0 for n in range(9)} == {True, False}
    data = ClipDataModule(partial(Mixture, {"own": Stripes}, {"own": 1}), **SHAPE, **LOADING)
    assert data.about == "mixture, captions" and not data.captions and data.settings["draws"][0]["sources"] == {"own": {}}


def test_it_is_looked_at_without_a_trainer():
    data = ClipDataModule(Stripes, **SHAPE, **LOADING)
    for loader in (data.train_dataloader(), data.val_dataloader()):
        assert next(iter(loader))["video"].shape == (2, 3, 5, 32, 32)


def test_words_that_an_item_lacks_are_told_in_a_mixture_too():
    class Silent(Stripes):
        def __getitem__(self, n):
            return {"video": super().__getitem__(n)["video"], "caption": ""}

    mixture = Mixture({"own": Silent}, {"own": 1}, **SHAPE)
    for source, images in ((mixture, None), (Stripes("train", **SHAPE), mixture)):
        with pytest.raises(ValueError, match="clip 0 of the data: it has no label; expected"):
            Numbered(source, images)[0, 1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"caption": None}, "its caption is None; expected text, '' for none"),
        ({"caption": float("nan")}, "its caption is nan; expected text"),  # of a table's empty cell
        ({"label": 2}, "its label is 2; expected its place in `classes` of the data set, or -1"),
        ({"label": 0.5}, "its label is 0.5; expected"),
        ({"label": None}, "its label is None; expected"),
    ],
)
def test_a_caption_that_is_no_text_and_a_label_without_a_class_are_told(words, message):
    class Own(Stripes):
        classes = ("a", "b")

        def __getitem__(self, n):
            return super().__getitem__(n) | {"label": np.int64(1)} | (words if n else {})

    clips = Numbered(Own("train", **SHAPE))
    assert clips[0, 5]["label"] == 1
    with pytest.raises(ValueError, match=f"clip 1 of the data: {message}"):
        clips[1, 5]


def test_a_checkpoint_holds_plain_values_of_it():
    class Own(Stripes):
        classes, native_fps, files = np.array(["a", "b"]), np.float64(8), [Path("a.npy")]

    data = ClipDataModule(Own, **{**SHAPE, "fps": 0}, **LOADING)
    assert data.classes == ("a", "b") and data.fps == 8.0
    json.dumps([data.settings, data.classes, data.captioned])


def test_what_it_lacks_is_told():
    with pytest.raises(ValueError, match="data.source makes a Strange; derive it from kit.data.source.ClipSource"):
        ClipDataModule(Strange, **SHAPE, **LOADING)
    with pytest.raises(ValueError, match="data.images makes a Strange; derive it"):
        ClipDataModule(Stripes, **SHAPE, **LOADING, image_share=0.5, images=Strange)
    with pytest.raises(ValueError, match="data.source.sources.own makes a Strange; derive it"):
        Mixture({"own": Strange}, {"own": 1}, **SHAPE)
    with pytest.raises(ValueError, match="data.source: `draws` of Drawing holds more than plain values"):
        ClipDataModule(Drawing, **SHAPE, **LOADING)
    with pytest.raises(ValueError, match="Stripes has no such files"):
        BucketClips(Stripes("train", **SHAPE), [Bucket(5, 32, 32, 1)])
    with pytest.raises(ValueError, match="clips of stripes have no frame rate of their own; give data.fps=N"):
        ClipDataModule(Stripes, **{**SHAPE, "fps": 0}, **LOADING)


def test_a_place_in_the_stream_counts_the_batches_that_are_left_out():
    data = ClipDataModule(Shapes, **SHAPE, **LOADING)
    data.leave_out([(0, 2)])
    assert [data.position_of(n) for n in range(4)] == [(0, 0), (0, 1), (0, 3), (0, 4)]
