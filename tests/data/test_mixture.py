"""Several data sets as one: each has its share, and none of its items is left out."""

from __future__ import annotations

import warnings
from collections import Counter
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from kit.build import build_data
from kit.cli import main
from kit.data.clips import FolderClips
from kit.data.datamodule import ClipDataModule
from kit.data.mixture import PERIOD, Mixture, label_among, shares
from kit.data.shapes import Shapes
from kit.data.source import ClipSource
from kit.media import write_video
from tests.fixtures import CLIP, QUICK, TOKENIZER, composed

SHAPE = dict(frames=5, height=32, width=32, fps=8.0)
THREE = {"a": partial(Shapes, seed=1), "b": partial(Shapes, seed=2), "c": partial(Shapes, seed=3)}


def test_shares_are_whole_numbers_of_a_period():
    assert shares({"a": 1, "b": 1, "c": 1}) == {"a": 334, "b": 333, "c": 333}
    assert shares({"a": 0.7, "b": 0.3}) == {"a": 700, "b": 300}
    assert shares({"a": 1, "b": 2}) == {"a": 333, "b": 667}
    assert shares({"a": 1e9, "b": 1}) == {"a": 999, "b": 1}


@pytest.mark.parametrize("split", ["train", "val"])
def test_each_source_has_its_share_and_gives_its_items_in_order(split):
    """Counts over two and a half periods which items of the sources are read."""
    mixture, asked = Mixture(THREE, {"a": 6, "b": 3, "c": 1}, split, **SHAPE), []

    class Counting:
        def __init__(self, name, source):
            self.name, self.classes = name, source.classes

        def __getitem__(self, n):
            asked.append((self.name, n))
            return {"label": -1}

    mixture.sources = {name: Counting(name, source) for name, source in mixture.sources.items()}
    for n in range(2500):
        mixture[n]
    assert Counter(name for name, _ in asked[:PERIOD]) == {"a": 600, "b": 300, "c": 100}
    for name in THREE:
        numbers = [n for other, n in asked if other == name]
        assert all(n == turn for turn, n in enumerate(numbers))  # of such long lists pytest compares for minutes
    hundred = Counter(name for name, _ in asked[:100])
    assert hundred["a"] < 75 and hundred["c"] > 2, "they take turns all the while"


def test_items_are_those_of_the_sources():
    mixture = Mixture(THREE, {"a": 1, "b": 1, "c": 1}, **SHAPE)
    sources = {name: build("train", **SHAPE) for name, build in THREE.items()}
    seen = Counter()
    for n in range(6):
        name = mixture.turns.order[n]
        expected = sources[name][seen[name]]
        assert torch.equal(mixture[n]["video"], expected["video"]) and mixture[n]["caption"] == expected["caption"]
        seen[name] += 1
    assert torch.equal(mixture[5]["video"], mixture[5]["video"])
    other = Mixture(THREE, {"a": 1, "b": 1, "c": 1}, seed=1, **SHAPE)
    assert other.turns.order != mixture.turns.order


def test_classes_are_those_of_all(tmp_path):
    for name, label in (("run_1", 0), ("run_2", 0), ("jump_1", 1), ("jump_2", 1)):
        write_video(Shapes("train", **SHAPE)[label]["video"], tmp_path / f"{name}.mp4", 8.0)
    mixture = Mixture(
        {"shapes": Shapes, "people": partial(FolderClips, root=tmp_path, val_every=4)}, {"shapes": 1, "people": 1}, **SHAPE
    )
    assert mixture.classes == tuple(sorted((*Shapes.classes, "run", "jump"))) and mixture.captioned
    words = {mixture.classes[item["label"]] for item in (mixture[n] for n in range(20))}
    assert words & {"run", "jump"} and words & set(Shapes.classes)
    for n in range(20):
        item = mixture[n]
        assert mixture.classes[item["label"]] in item["caption"]
    assert mixture.unreadable == []


def test_what_has_no_class_gets_none():
    assert [label_among(("a", "b", "c"), ("d", "c"), label) for label in (0, 1, -1)] == [-1, 2, -1]


@pytest.mark.parametrize(
    "weights, message",
    [({"a": 1, "b": -1, "c": 1}, "data.source.weights.b=-1; expected a number of 0 or more"),
     ({"a": 1, "b": None, "c": 1}, "data.source.weights.b=null; expected a number of 0 or more"),
     ({"a": 0, "b": 0, "c": 0.0}, "data.source.weights of a, b, c are 0; expected one above 0"),
     ({"a": 1, "b": 1}, "weights are of a, b, the sources are a, b, c"),
     ({"a": 1, "b": 1, "c": 1, "d": 1}, "weights are of a, b, c, d, the sources are a, b, c")],
)  # fmt: skip
def test_wrong_weights_are_told(weights, message):
    with pytest.raises(ValueError, match=message):
        Mixture(THREE, weights, **SHAPE)


def test_a_weight_of_nothing_leaves_its_source_out():
    mixture = Mixture(THREE, {"a": 3, "b": 0, "c": 1}, **SHAPE)
    assert set(mixture.sources) == {"a", "c"} and mixture.turns.counts == {"a": 750, "c": 250}


def test_sources_without_words_are_told_once(tmp_path):
    for i in range(2):
        write_video(Shapes("train", **SHAPE)[i]["video"], tmp_path / f"{'ab'[i]}.mp4", 8.0)
    mine = {"mine": partial(FolderClips, tmp_path)}
    with pytest.warns(UserWarning, match="of the sources of the mixture mine have neither captions nor classes, as others"):
        Mixture(mine | {"drawn": Shapes}, {"mine": 1, "drawn": 1}, **SHAPE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Mixture(mine | {"drawn": Shapes}, {"mine": 1, "drawn": 1}, "val", **SHAPE)
        Mixture(mine, {"mine": 1}, **SHAPE)


def test_a_source_that_is_not_partial_is_told():
    drawn = "+data.source.sources.drawn={_target_: kit.data.shapes.Shapes}"
    cfg = composed("stage1_tokenizer", "size=tiny", "data=mixture", *CLIP, drawn, "+data.source.weights.drawn=1")
    with pytest.raises(ValueError, match="data.source.sources.drawn would be of one split; add _partial_: true"):
        build_data(cfg)


def test_a_mixture_of_drawn_clips_tells_of_no_files():
    data = ClipDataModule(partial(Mixture, THREE, {"a": 1, "b": 1, "c": 1}), **SHAPE, batch_size=1, val_clips=1, workers=0)
    assert data.about == "mixture, captions"


def test_caches_are_not_mixed():
    def cached(**_):
        source = ClipSource()
        source.tokenizer = "0123"  # as `CachedClips` has it
        return source

    with pytest.raises(
        ValueError, match="the source mine is a cache of encoded clips, which cannot be mixed; give the videos"
    ):
        Mixture({"mine": cached, "drawn": Shapes}, {"mine": 1, "drawn": 1}, **SHAPE)


def test_what_a_mixture_draws_is_known_when_a_run_goes_on(tmp_path):
    for name, count in (("one", 3), ("two", 4)):
        for i in range(count):
            write_video(torch.zeros(3, 5, 16, 16), tmp_path / name / f"{i}.mp4", 8)

    def settings(folder="one", seed=0, weight=1.0, shapes=0, late=0.0):
        sources = {"shapes": partial(Shapes, seed=shapes, late=late), "folder": partial(FolderClips, tmp_path / folder)}
        source = partial(Mixture, sources, {"shapes": weight, "folder": 1.0}, seed=seed)
        return ClipDataModule(source, 5, 16, 16, 8.0, batch_size=2, val_clips=2, workers=0).settings

    assert settings() == settings()
    others = ({"folder": "two"}, {"seed": 3}, {"weight": 9.0}, {"shapes": 3}, {"late": 0.5})
    assert all(settings(**other) != settings() for other in others)
    assert settings(folder="two")["held_out"] != settings()["held_out"]

    def alone(late):
        return ClipDataModule(partial(Shapes, late=late), 5, 16, 16, 8.0, batch_size=2, val_clips=2, workers=0).settings

    assert alone(0.5) != alone(0.0)


def test_own_rates_must_agree(tmp_path):
    for folder, fps in (("slow", 5.0), ("fast", 10.0)):
        for i in range(2):
            write_video(Shapes("train", **SHAPE)[i]["video"], tmp_path / folder / f"{i}.mp4", fps)
    sources = {name: partial(FolderClips, root=tmp_path / name) for name in ("slow", "fast")}
    mixture = Mixture(sources, {"slow": 1, "fast": 1}, **{**SHAPE, "fps": 0})
    with pytest.raises(ValueError, match=r"frame rates differ \({'slow': 5.0, 'fast': 10.0}\); choose one with data.fps"):
        _ = mixture.native_fps
    mixture.sources = {name: SimpleNamespace(native_fps=rate) for name, rate in (("slow", 29.97003), ("fast", 29.96999))}
    assert mixture.native_fps == 29.97, "they are one to a thousandth"


def test_a_tokenizer_trains_on_a_mixture(tmp_path, capsys):
    """Uses the command line that conf/data/mixture.yaml shows."""
    words = [f"root={tmp_path}", "data=mixture", *CLIP, *TOKENIZER, *QUICK, "recipe.tokenizer.steps=3"]
    assert main(["fit", "conf=stage1_tokenizer", *words]) == 1
    assert "data=mixture needs data.source.sources" in capsys.readouterr().err
    for n in range(10):
        write_video(Shapes("train", frames=5, height=32, width=32)[n]["video"], tmp_path / "mine" / f"ball_{n}.mp4", 12)
    mine = f"{{_target_: kit.data.clips.FolderClips, _partial_: true, root: {tmp_path / 'mine'}}}"
    drawn = "{_target_: kit.data.shapes.Shapes, _partial_: true, late: 0.5}"
    words += ["trainer.val_check_interval=3", "callbacks.video_logger.clips=4"]  # pictures of both
    for name, weight, source in (("mine", 0.3, mine), ("drawn", 0.7, drawn)):
        words += [f"+data.source.sources.{name}={source}", f"+data.source.weights.{name}={weight}"]
    assert main(["fit", "conf=stage1_tokenizer", *words]) == 0


def test_a_source_of_hardly_any_weight_takes_nothing_from_the_others():
    assert shares({"a": 1e9, "b": 1, "c": 1}) == {"a": 999, "b": 1, "c": 1}
