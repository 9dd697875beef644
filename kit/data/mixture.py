"""Several data sets as one, in given shares."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from kit.data.buckets import Bucket
from kit.data.source import BucketPart, ClipSource, check_source
from kit.values import check_number

PERIOD = 1000  # items; each source has its share of every period, to a thousandth


def shares(weights: Mapping[str, float]) -> dict[str, int]:
    """Number of items of each source among `PERIOD`, in proportion to the weights: largest remainders, at least one.

    Raises:
        ValueError: if a weight is not above 0.
    """
    if wrong := {name: weight for name, weight in weights.items() if not weight > 0}:
        raise ValueError(f"weights {wrong}; expected numbers above 0")
    total = sum(weights.values())
    exact = {name: PERIOD * weight / total for name, weight in weights.items()}
    counts = {name: max(int(share), 1) for name, share in exact.items()}
    by_remainder = sorted(exact, key=lambda name: counts[name] - exact[name])
    for name in by_remainder[: max(PERIOD - sum(counts.values()), 0)]:
        counts[name] += 1
    return counts


class Turns:
    """Order in which sources take turns: each has its share of every `PERIOD` turns, in an order drawn from `seed`.

    Args:
        weights: name -> share, of any sum.
    Raises: as `shares`.
    """

    def __init__(self, weights: Mapping, seed: int):
        self.counts = shares(weights)
        order = [name for name, count in self.counts.items() for _ in range(count)]
        self.order = [order[i] for i in np.random.default_rng(seed).permutation(len(order))]
        self.before = [self.order[:i].count(name) for i, name in enumerate(self.order)]  # its earlier turns in the period

    def of(self, n: int) -> tuple:
        """Returns the source whose turn n is, and how many turns it had before."""
        period, turn = divmod(n, len(self.order))
        name = self.order[turn]
        return name, period * self.counts[name] + self.before[turn]

    def within(self, name, n: int) -> int:
        """Number of turns of a source among the first n."""
        period, turn = divmod(n, len(self.order))
        return period * self.counts[name] + self.order[:turn].count(name)


def label_among(classes: Sequence[str], own: Sequence[str], label: int) -> int:
    """Converts a label of a source with the classes `own` to an index into `classes`; -1 if the class is not there."""
    name = own[label] if label >= 0 and own else None
    return classes.index(name) if name in classes else -1


def relabelled(item: dict, own: Sequence[str], classes: Sequence[str]) -> dict:
    """Returns an item of a source with the classes `own` with its label as an index into `classes`. A label that is missing
    or no number is left as it is: `Numbered` reports it."""
    label = item.get("label")
    return item if label is None or isinstance(label, str) else {**item, "label": label_among(classes, own, label)}


class Mixture(ClipSource):
    """Data set that mixes items of several endless sources, which take `Turns`.

    Item n is a pure function of n, as the items of the sources are, and no item of a source is left out.

    Args:
        sources: name -> function that builds a data set, as `source` of `ClipDataModule`. weights: name -> share, of any
            sum; 0 leaves the source out.
        split, shape: for the sources, which all have the same `frames`, `height`, `width` and `fps`.
        seed: of the order of turns.
    Attributes:
        classes: those of all sources, sorted. captioned: whether any source is: one that has only classes is captioned by
            their names. Those left out count too, so that all stages of a training, each with its weights, agree in both.
    Raises:
        ValueError: if there are no sources, the names of `sources` and `weights` differ, a weight is no number of 0 or more,
            all are 0, or a source holds encoded clips.
    """

    def __init__(
        self, sources: Mapping[str, Callable[..., ClipSource]], weights: Mapping[str, float], split: str = "train",
        seed: int = 0, **shape,
    ):  # fmt: skip
        if not sources:
            raise ValueError("data=mixture needs data.source.sources and data.source.weights, see conf/data/mixture.yaml")
        if set(sources) != set(weights):
            raise ValueError(f"data.source.weights are of {', '.join(weights)}, the sources are {', '.join(sources)}")
        for name, weight in weights.items():
            check_number(f"data.source.weights.{name}", weight, 0)
        if not any(weights.values()):
            raise ValueError(f"data.source.weights of {', '.join(weights)} are 0; expected one above 0")
        opened = {name: build(split=split, **shape) for name, build in sources.items()}
        for name, source in opened.items():
            check_source(source, f"data.source.sources.{name}")
        if encoded := [name for name, source in opened.items() if source.tokenizer]:
            raise ValueError(
                f"the source {encoded[0]} is a cache of encoded clips, which cannot be mixed; give the videos it is of, and "
                f"encode the mixture: python -m kit cache data=mixture ..."
            )
        self.classes = tuple(sorted({name for source in opened.values() for name in source.classes}))
        self.captioned = any(source.captioned for source in opened.values())
        self.seed, self.sources = seed, {name: source for name, source in opened.items() if weights[name]}
        self.weights = {name: weights[name] for name in self.sources}
        self.turns = Turns(self.weights, seed)
        wordless = [name for name, source in self.sources.items() if not (source.captioned or source.classes)]
        if wordless and len(wordless) < len(self.sources) and split != "val":  # which another mixture reports
            message = f"of the sources of the mixture {', '.join(wordless)} have neither captions nor classes, as others have"
            warnings.warn(f"{message}: their clips train without a condition; caption them, or take them out", stacklevel=3)

    def of_parts(self, parts: Mapping[str, ClipSource], weights: Mapping[str, float]) -> Mixture:
        """The same mixture of parts of its sources, in shares of their own."""
        mixture = copy.copy(self)
        mixture.sources, mixture.weights, mixture.turns = dict(parts), dict(weights), Turns(weights, self.seed)
        return mixture

    def __getitem__(self, n: int) -> dict:
        name, number = self.turns.of(n)
        return self._relabelled(name, self.sources[name][number])

    def beginning(self, n: int, frames: int) -> dict:
        name, number = self.turns.of(n)
        return self._relabelled(name, self.sources[name].beginning(number, frames))

    def _relabelled(self, name: str, item: dict) -> dict:
        return relabelled({"given": 0, **item}, self.sources[name].classes, self.classes)

    def distinct(self, n: int) -> bool:
        name, number = self.turns.of(n)
        return self.sources[name].distinct(number)

    @property
    def draws(self) -> dict:
        sources = {name: source.draws for name, source in self.sources.items()}
        return {"seed": self.seed, "weights": self.weights, "sources": sources}

    @property
    def files(self) -> list[str]:
        """Files of all sources, as SOURCE/FILE."""
        return [f"{name}/{file}" for name, source in self.sources.items() for file in source.files]

    def known_as(self) -> list[str]:
        return [f"{name}/{file}" for name, source in self.sources.items() for file in source.known_as()]

    def listing(self) -> list[str]:
        """The lines of all sources, each with its source's name."""
        return [f"{name}: {line}" for name, source in self.sources.items() for line in source.listing()]

    def texts(self) -> list[dict]:
        return [text for source in self.sources.values() for text in source.texts()]

    def in_buckets(self, buckets: Sequence[Bucket]) -> list[BucketPart | None]:
        """Sorts the clips of each source; a bucket's part is a mixture of the sources that have clips for it. A source keeps
        its share of all clips, in the buckets together."""
        # sources without files, which are refused, come before any file is read
        by_files = sorted(self.sources, key=lambda name: len(self.sources[name].files) > 0)
        sorted_clips = {name: self.sources[name].in_buckets(buckets) for name in by_files}
        whole = {name: sum(part.weight for part in parts if part) for name, parts in sorted_clips.items()}
        found = []
        for i in range(len(buckets)):
            parts = {name: sorted_clips[name][i] for name in self.sources if sorted_clips[name][i]}
            shares = {name: self.weights[name] * part.weight / whole[name] for name, part in parts.items()}
            clips = self.of_parts({name: part.clips for name, part in parts.items()}, shares) if parts else None
            count = sum(part.count for part in parts.values())
            found.append(BucketPart(clips, count, sum(shares.values())) if parts else None)
        return found

    @property
    def native_fps(self) -> float:
        """Frame rate of the sources. Raises: ValueError if they differ."""
        rates = {name: round(source.native_fps, 3) for name, source in self.sources.items()}
        if len(set(rates.values())) > 1:
            raise ValueError(f"the sources' own frame rates differ ({rates}); choose one with data.fps")
        return next(iter(rates.values()))

    @property
    def unreadable(self) -> list[Path | str]:
        return [path for source in self.sources.values() for path in source.unreadable]
