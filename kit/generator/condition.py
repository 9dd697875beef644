"""What a clip is generated from: a class, or a text. Condition tokens are the prefix of the sequence."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from kit.generator.pretrained import PretrainedEncoder
from kit.machine import from_all_ranks, onto

SIZE = 0.5  # root mean square of new condition tokens: bits come in at 1, and far smaller words would be learned late


@dataclass(frozen=True)
class ConditionConfig:
    """Args:
    kind: `text` or `class`.
    classes: names, for kind `class`.
    length: S, words or tokens read of a text.
    buckets, channels: words and size of their vectors in the table of the built-in text encoder.
    encoder, revision: a pretrained text encoder in its place, see `pretrained.find_encoder`; `channels` are its hidden size.
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


class TextEncoder(Protocol):
    """What any text encoder has to offer; a pretrained one can stand here.

    `forward` maps B texts to states (B, S, channels) and a mask (B, S), True where there is a word; `notes` says what a user
    should know of a text before it is used.
    """

    channels: int
    length: int

    def __call__(self, texts: list[str]) -> tuple[Tensor, Tensor]: ...

    def notes(self, text: str) -> list[str]: ...


class WordEncoder(nn.Module):
    """A learned vector for every word, found by the word's hash: nothing to download, no vocabulary to keep.

    Args:
        length: S; further words are not read.
    """

    def __init__(self, channels: int, length: int, buckets: int):
        super().__init__()
        self.channels, self.length = channels, length
        self.table = nn.Embedding(buckets, channels)
        self.seen = nn.Buffer(torch.zeros(buckets, dtype=torch.bool))  # buckets of the words that were trained
        nn.init.normal_(self.table.weight, std=SIZE)

    @staticmethod
    def split(text: str) -> list[str]:
        """A text's words."""
        return text.lower().replace(",", " ").replace(".", " ").split()

    def bucket(self, word: str) -> int:
        return zlib.crc32(word.encode()) % self.table.num_embeddings

    def words(self, texts: list[str]) -> Tensor:
        """(B, S) int64 on the CPU: bucket of each word, -1 where there is none."""
        ids = torch.full((len(texts), self.length), -1)
        for row, text in zip(ids, texts, strict=True):
            words = self.split(text)[: self.length]
            row[: len(words)] = torch.tensor([self.bucket(w) for w in words])
        return ids

    def forward(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        ids, device = self.words(texts), self.table.weight.device
        if self.training:  # DDP gives all ranks the buffers of the first: it has to know what the others read
            read = from_all_ranks(ids, device)
            self.seen[onto(read[read >= 0], device)] = True
        ids = onto(ids, device)
        return self.table(ids.clamp(min=0)), ids >= 0

    def notes(self, text: str) -> list[str]:
        """What a user should know of a text before it is used: words that are not read, or were never trained."""
        words, told = self.split(text), []
        if len(words) > self.length:
            told.append(f"of {text!r} the first {self.length} words are read, not: {' '.join(words[self.length :])}")
        seen = self.seen.tolist()
        if unknown := [w for w in dict.fromkeys(words[: self.length]) if not seen[self.bucket(w)]]:
            told.append(f"never seen in training, so without a meaning: {', '.join(unknown)}")
        return told


class TextCondition(nn.Module):
    """Texts -> (B, S, D). Places without a word hold learned vectors; a text without words is no condition."""

    def __init__(self, encoder: TextEncoder, width: int):
        super().__init__()
        self.encoder, self.length = encoder, encoder.length
        self.project = nn.Linear(encoder.channels, width, bias=False)
        nn.init.normal_(self.project.weight, std=encoder.channels**-0.5)  # keeps the size of the encoder's states
        self.empty = nn.Parameter(torch.randn(self.length, width) * SIZE)
        self.null = nn.Parameter(torch.randn(self.length, width) * SIZE)

    def prompts(self, batch: dict) -> list[str]:
        """What a batch of data is conditioned on."""
        return batch["caption"]

    def notes(self, text: str) -> list[str]:
        """What a user should know of a prompt before it is used."""
        return self.encoder.notes(text) if text.strip() else ["the prompt is empty: clips of any kind"]

    def forward(self, texts: list[str], dropped: Tensor | None = None) -> Tensor:
        """dropped: (B,) bool, whose condition is left out, for classifier-free guidance."""
        states, mask = self.encoder(texts)
        x = torch.where(mask[..., None], self.project(states), self.empty)
        without = ~mask.any(dim=1) if dropped is None else ~mask.any(dim=1) | onto(dropped, x.device)
        return torch.where(without[:, None, None], self.null, x)


class ClassCondition(nn.Module):
    """Class names -> (B, 1, D); one more learned vector stands for no class, whose name is empty."""

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
        """Of a class there is nothing to say. Raises ValueError for an unknown one."""
        self.check([text])
        return [] if text else ["no class: clips of any kind"]

    def check(self, labels: list[str]):
        """
        Raises:
            ValueError: for an unknown class.
        """
        unknown = sorted({label for label in labels if label} - set(self.classes))
        if unknown:
            raise ValueError(f"unknown class {unknown[0]!r}; this model knows: {', '.join(self.classes)}")

    def forward(self, labels: list[str], dropped: Tensor | None = None) -> Tensor:
        """Raises as `check`."""
        self.check(labels)
        ids = torch.tensor([self.classes.index(label) if label else len(self.classes) for label in labels])
        ids = onto(ids, self.table.weight.device)
        if dropped is not None:
            ids = torch.where(onto(dropped, ids.device), len(self.classes), ids)
        return self.table(ids)[:, None]


def build_condition(config: ConditionConfig, width: int) -> TextCondition | ClassCondition:
    """
    Raises:
        ValueError: for another kind than `text` and `class`.
    """
    if config.kind == "text":
        if config.encoder is None:
            encoder = WordEncoder(config.channels, config.length, config.buckets)
        else:
            encoder = PretrainedEncoder(config.encoder, config.revision or "", config.channels, config.length)
        return TextCondition(encoder, width)
    if config.kind == "class":
        return ClassCondition(config.classes, width)
    raise ValueError(f"condition.kind must be 'text' or 'class', got {config.kind!r}")
