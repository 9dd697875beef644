"""Names of files, and what is known of each, in a few blocks of memory.

A list of a million texts is a million objects, and reading one writes to it (Python counts references). Each process of a
loader would come to hold a copy of all; blocks stay shared.
"""

from __future__ import annotations

import reprlib
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import TypeVar

Value = TypeVar("Value")

STRIDE = 64  # of the names that are also kept as Python's own, in which a search begins: it is quick there


class Texts(Sequence[str]):
    """A sequence of texts that does not change. It equals a list of the same texts."""

    def __init__(self, texts: Iterable[str] = ()):
        parts = [text.encode(errors="surrogatepass") for text in texts]
        self._block, self._ends = b"".join(parts), array("q", accumulate(map(len, parts), initial=0))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, place: int | slice) -> str | list[str]:
        if isinstance(place, slice):
            return [self[i] for i in range(*place.indices(len(self)))]
        if place < 0:
            place += len(self)
        if not 0 <= place < len(self):
            raise IndexError(f"place {place} of {len(self)} texts")
        return self._block[self._ends[place] : self._ends[place + 1]].decode(errors="surrogatepass")

    def __iter__(self) -> Iterator[str]:
        return (self._block[begin:end].decode(errors="surrogatepass") for begin, end in pairwise(self._ends))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    def __repr__(self) -> str:  # a notebook would show a million
        return f"{len(self)} texts: {reprlib.repr(self[: reprlib.aRepr.maxlist + 1])}"


class Names(Texts):
    """A sequence of texts, each of which comes once, and whose places are found in logarithmic time."""

    def __init__(self, names: Iterable[str] = ()):
        super().__init__(names := list(names))
        self._sorted = array("q", sorted(range(len(names)), key=names.__getitem__))
        self._some = [names[place] for place in self._sorted[::STRIDE]]

    def index(self, name: str) -> int:
        """Returns the place of a name. Raises: ValueError if it is not there."""
        end = bisect_right(self._some, name) * STRIDE
        found = bisect_left(self._sorted, name, max(end - STRIDE, 0), min(end, len(self)), key=self.__getitem__)
        if found < len(self) and self[place := self._sorted[found]] == name:
            return place
        raise ValueError(f"{name!r} is not there")

    def __contains__(self, name: object) -> bool:
        try:
            self.index(name)
        except (TypeError, ValueError):
            return False
        return True


class ByName(Mapping[str, Value]):
    """Name -> value, in the order of the names.

    Args:
        names: each once. values: one for each name, such as `Texts`.
    """

    def __init__(self, names: Iterable[str], values: Sequence[Value]):
        self._names, self._values = Names(names), values

    def __getitem__(self, name: str) -> Value:
        try:
            return self._values[self._names.index(name)]
        except ValueError as error:
            raise KeyError(name) from error

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def values(self) -> Sequence[Value]:
        return self._values

    def unpacked(self) -> dict[str, Value]:
        """The dictionary of the same, in which many names are found sooner."""
        return dict(zip(self._names, self._values, strict=True))


def texts_by_name(texts: Mapping[str, str]) -> ByName[str]:
    """Packs a dictionary of texts."""
    return ByName(texts, Texts(texts.values()))
