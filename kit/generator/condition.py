"""Conditions: a class or a text -> condition tokens, which are the prefix of the generator's sequence."""

from __future__ import annotations

import textwrap
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from kit.generator.linear import Linear
from kit.generator.pretrained import PretrainedEncoder
from kit.machine import onto
from kit.ranks import from_all_ranks
from kit.values import check_choice, check_whole_number

SIZE = 0.5  # root mean square of new condition tokens; embedded bits have 1, and far smaller words would be learned late


@dataclass(frozen=True)
class ConditionConfig:
    """Configuration of a generator's condition.

    Args:
        kind: `text` or `class`.
        classes: class names, for kind `class`.
        length: S, words or tokens read of a text.
        buckets, channels: rows and row size of the built-in text encoder's table of word vectors.
        encoder, revision: pretrained text encoder to use instead, see `pretrained.find_encoder`; `channels` is its hidden
            size.
    Raises:
        ValueError: for another kind, or a number that is none or below 1.
    """

    kind: str = "text"
    classes: tuple[str, ...] = ()
    length: int = 16
    buckets: int = 4096
    channels: int = 64
    encoder: str | None = None
    revision: str | None = None

    def __post_init__(self):
        object.__setattr__(self, "classes", tuple(self.classes))
        check_choice("condition.kind", self.kind, ("text", "class"))
        for key in ("length", "buckets", "channels"):
            check_whole_number(f"condition.{key}", getattr(self, key), 1)


class TextEncoder(Protocol):
    """Interface of a text encoder, built-in or pretrained.

    Calling it maps B texts to states (B, S, channels) and a mask (B, S), True where there is a word; `notes` returns
    warnings to show a user before a text is used; `lengths` counts the units of each text, those beyond S too, of which the
    encoder could read `longest` (None: any number).
    """

    channels: int
    length: int
    unit: str

    def __call__(self, texts: list[str]) -> tuple[Tensor, Tensor]: ...

    def lengths(self, texts: list[str]) -> list[int]: ...

    def longest(self) -> int | None: ...

    def notes(self, text: str) -> list[str]: ...


class WordEncoder(nn.Module):
    """Text encoder with a learned vector per word, found by the word's hash: nothing to download, no vocabulary to store.

    Args:
        length: S; further words are not read.
    """

    unit = "words"

    def __init__(self, channels: int, length: int, buckets: int):
        super().__init__()
        self.channels, self.length = channels, length
        self.table = nn.Embedding(buckets, channels)
        self.seen = nn.Buffer(torch.zeros(buckets, dtype=torch.bool))  # buckets of words that occurred in training
        nn.init.normal_(self.table.weight, std=SIZE)

    @staticmethod
    def split(text: str) -> list[str]:
        """Splits a text into lower-case words, without commas and full stops."""
        return text.lower().replace(",", " ").replace(".", " ").split()

    def lengths(self, texts: list[str]) -> list[int]:
        return [len(self.split(text)) for text in texts]

    def longest(self) -> None:
        return None

    def bucket(self, word: str) -> int:
        return zlib.crc32(word.encode()) % self.table.num_embeddings

    def ids(self, texts: list[str]) -> Tensor:
        """Returns the bucket of each word, (B, S) int64 on the CPU; -1 where there is no word."""
        ids = torch.full((len(texts), self.length), -1)
        for row, text in zip(ids, texts, strict=True):
            words = self.split(text)[: self.length]
            row[: len(words)] = torch.tensor([self.bucket(w) for w in words])
        return ids

    def forward(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Returns the words' vectors (B, S, channels), and where there is a word, (B, S) bool."""
        ids = onto(self.ids(texts), self.table.weight.device)
        if self.training:  # DDP copies the first rank's buffers to all, so it must record what every rank reads
            buckets = len(self.seen)
            read = self.seen.new_zeros(buckets + 1)  # the last: of places without a word
            read[from_all_ranks(ids).flatten() % (buckets + 1)] = True
            self.seen |= read[:-1]
        return self.table(ids.clamp(min=0)), ids >= 0

    def notes(self, text: str) -> list[str]:
        """Lists warnings about a text: words that are not read, and words that never occurred in training."""
        if not (words := self.split(text)):
            return [f"{text!r} has no words: clips of any kind"]
        notes = []
        if len(words) > self.length:
            notes.append(f"of {text!r} the first {self.length} words are read, not: {' '.join(words[self.length :])}")
        seen = self.seen.tolist()
        if unknown := [w for w in dict.fromkeys(words[: self.length]) if not seen[self.bucket(w)]]:
            notes.append(f"never seen in training, so without a meaning: {', '.join(unknown)}")
        return notes


def check_classes(condition: ConditionConfig, classes: Sequence[str], whose: str, mend: str):
    """Checks that data has the classes that a class-conditional generator was trained on.

    Args:
        whose, mend: what has the classes, and what can be done about it, in words.
    Raises:
        ValueError: if it has others.
    """
    if condition.kind == "class" and tuple(condition.classes) != tuple(classes):
        known, found = ", ".join(condition.classes), ", ".join(classes) or "none"
        raise ValueError(f"this generator knows the classes {known}, {whose} {found}; {mend}")


class TextCondition(nn.Module):
    """Maps B texts to condition tokens (B, S, D).

    Places without a word hold learned vectors (`empty`); a text without words is no condition (`null`, learned too).
    """

    def __init__(self, encoder: TextEncoder, width: int):
        super().__init__()
        self.encoder, self.length = encoder, encoder.length
        self.project = Linear(encoder.channels, width)
        nn.init.normal_(self.project.weight, std=encoder.channels**-0.5)  # keeps the size of the encoder's states
        self.empty = nn.Parameter(torch.randn(self.length, width) * SIZE)
        self.null = nn.Parameter(torch.randn(self.length, width) * SIZE)

    def prompts(self, batch: dict) -> list[str]:
        """Returns the captions of a batch of data."""
        return batch["caption"]

    def notes(self, text: str) -> list[str]:
        """Lists warnings about a prompt, see `TextEncoder`."""
        return self.encoder.notes(text) if text.strip() else ["the prompt is empty: clips of any kind"]

    def cut(self, captions: set[str]) -> str | None:
        """Says which of the captions that it is trained on are not read to their end; None if all are."""
        texts = sorted(captions)
        lengths = self.encoder.lengths(texts)
        if not (cut := [text for text, length in zip(texts, lengths, strict=True) if length > self.length]):
            return None
        way_out, longest = f"condition.length={max(lengths)} reads them", self.encoder.longest()
        if longest is not None and max(lengths) > longest:
            way_out = f"the encoder reads {longest} at most: shorten them"
        message = f"{len(cut)} of {len(texts)} captions are longer than {self.length} {self.encoder.unit}"
        example = textwrap.shorten(cut[0], 200, placeholder=" ...")
        return f"{message}, such as {example!r}; {way_out}"

    def forward(self, texts: list[str], dropped: Tensor | None = None) -> Tensor:
        """Returns (B, S, D). dropped: (B,) bool, True where the condition is left out, for classifier-free guidance."""
        states, mask = self.encoder(texts)
        states = states.to(self.project.weight.dtype)  # a pretrained encoder's are float32, sharded weights bfloat16
        x = torch.where(mask[..., None], self.project(states), self.empty)
        without = ~mask.any(dim=1)
        if dropped is not None:
            without = without | onto(dropped, x.device)
        return torch.where(without[:, None, None], self.null, x)


class ClassCondition(nn.Module):
    """Maps B class names to condition tokens (B, 1, D). An empty name means no class and has a learned vector of its own.

    Raises:
        ValueError: if there are no classes.
    """

    length = 1

    def __init__(self, classes: tuple[str, ...], width: int):
        super().__init__()
        if not classes:
            raise ValueError(
                "condition kind 'class' needs classes, but the data has none: put the clips of each class into a folder "
                "of its own or name files LABEL_NUMBER, or use condition.kind=text"
            )
        self.classes = classes
        self.table = nn.Embedding(len(classes) + 1, width)
        nn.init.normal_(self.table.weight, std=SIZE)

    def prompts(self, batch: dict) -> list[str]:
        return ["" if label < 0 else self.classes[label] for label in batch["label"].tolist()]

    def notes(self, text: str) -> list[str]:
        """Notes if no class is given. Raises ValueError for an unknown class."""
        self.check([text])
        return [] if text else ["no class: clips of any kind"]

    def check(self, labels: list[str]):
        """Checks that each label is a known class or empty.

        Raises:
            ValueError: for an unknown class.
        """
        unknown = sorted({label for label in labels if label} - set(self.classes))
        if unknown:
            raise ValueError(f"unknown class {unknown[0]!r}; this model knows: {', '.join(self.classes)}")

    def forward(self, labels: list[str], dropped: Tensor | None = None) -> Tensor:
        """Returns (B, 1, D). dropped: as for `TextCondition.forward`. Raises as `check`."""
        self.check(labels)
        ids = torch.tensor([self.classes.index(label) if label else len(self.classes) for label in labels])
        ids = onto(ids, self.table.weight.device)
        if dropped is not None:
            ids = torch.where(onto(dropped, ids.device), len(self.classes), ids)
        return self.table(ids)[:, None]


def build_condition(config: ConditionConfig, width: int) -> TextCondition | ClassCondition:
    """Builds the condition that a config describes, with tokens of size `width`.

    Raises:
        ValueError: for kind `class` without classes.
    """
    if config.kind == "text":
        if config.encoder is None:
            encoder = WordEncoder(config.channels, config.length, config.buckets)
        else:
            encoder = PretrainedEncoder(config.encoder, config.revision or "", config.channels, config.length)
        return TextCondition(encoder, width)
    return ClassCondition(config.classes, width)
