"""A pretrained text encoder of Hugging Face's `transformers`, frozen, its states kept on disk by caption."""

from __future__ import annotations

import functools
import hashlib
import os
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from kit.files import file_sha256
from kit.machine import autocast, cache_folder, device

KEPT = 4096  # captions whose states are held in memory
MOVED = "KIT_TEXT_ENCODER"  # names the folder of an encoder that is not where it was
DECIDING = (".json", ".txt", ".model", ".safetensors")  # files of an encoder that its states depend on


class Place(NamedTuple):
    """Where an encoder is.

    Fields: name, a folder, or a name on the Hugging Face hub; words, for `from_pretrained`; config, of transformers;
    revision, of a folder as `folder_revision`, of a name on the hub the commit.
    """

    name: str
    words: dict
    config: object
    revision: str

    @property
    def channels(self) -> int:
        """Of its states. CLIP: of its text half."""
        return getattr(self.config, "text_config", self.config).hidden_size

    @property
    def longest(self) -> int | None:
        """Tokens of a text that it can take at most; None: any number."""
        known = getattr(getattr(self.config, "text_config", self.config), "max_position_embeddings", None)
        return None if known is None else min(known, open_tokenizer(self).model_max_length)  # less, where some are set apart


def find_encoder(name: str, revision: str | None = None) -> Place:
    """
    Args:
        name: a folder or a name on the hub; where KIT_TEXT_ENCODER names a folder, that one is taken.
        revision: that it must have; None: whatever is there. A folder is not compared with a commit.
    Raises:
        ImportError: without transformers. FileNotFoundError: if there is no such encoder. ValueError: for another revision.
    """
    try:
        from transformers import AutoConfig
        from transformers.utils.logging import disable_progress_bar, set_verbosity_error
    except ImportError as error:
        raise ImportError("a pretrained text encoder needs a package: pip install 'kit-videoar[hf]'") from error
    disable_progress_bar(), set_verbosity_error()
    place = os.environ.get(MOVED) or name
    words = {"trust_remote_code": False}
    found = folder_revision(Path(place)) if Path(place).is_dir() else None
    if revision and (found is not None) == revision.startswith("files-"):
        if found is None:
            words["revision"] = revision
        elif found != revision:
            raise ValueError(f"the text encoder in {place} is of revision {found}, the generator was trained with {revision}")
    try:
        config = AutoConfig.from_pretrained(place, **words)
    except (OSError, ValueError) as error:
        raise _missing(place, error) from error
    return Place(place, words, config, found or config._commit_hash or "")


def open_tokenizer(place: Place):
    """Its tokenizer. Raises FileNotFoundError."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(place.name, **place.words)
    except (OSError, ValueError) as error:
        raise _missing(place.name, error) from error


def open_model(place: Place) -> nn.Module:
    """The encoder, in evaluation mode. CLIP: its text half; T5: its encoder.

    Raises:
        FileNotFoundError: if there are no weights as safetensors. ValueError: if some are missing.
    """
    from transformers import AutoModelForTextEncoding, CLIPTextModel

    kind = CLIPTextModel if place.config.model_type == "clip" else AutoModelForTextEncoding
    files = {"use_safetensors": True, "dtype": torch.float32, "output_loading_info": True}
    try:
        model, report = kind.from_pretrained(place.name, **files, **place.words)
    except (OSError, ValueError) as error:
        raise _missing(place.name, error) from error
    if lacking := sorted(key for key in report["missing_keys"] if "pooler" not in key and "position_ids" not in key):
        raise ValueError(f"the text encoder {place.name} lacks {len(lacking)} weights, such as {lacking[0]}; get it again")
    return model.eval().requires_grad_(False)


def _missing(place: str, error: Exception) -> FileNotFoundError:
    return FileNotFoundError(
        f"no text encoder {place}: {str(error).splitlines()[0]}; give condition.encoder= a folder or a name on the hub, "
        f"or say where it is now with {MOVED}=FOLDER"
    )


def folder_revision(folder: Path) -> str:
    """`files-` and 16 hex digits of the names and contents of an encoder's files that decide its states."""
    files = sorted(path for path in folder.iterdir() if path.suffix in DECIDING)
    return "files-" + hashlib.sha256("".join(f"{p.name} {file_sha256(p)} " for p in files).encode()).hexdigest()[:16]


class PretrainedEncoder(nn.Module):
    """Last hidden states of a frozen encoder, for texts of at most `length` tokens.

    Each text goes through it alone, so that its states are a function of the text and not of a batch, and only once: they are
    kept in float16 in the folder `text` of kit's cache. The encoder is loaded when a text is new. Its weights are no part of
    this module: checkpoints hold its name and revision.
    """

    def __init__(self, name: str, revision: str, channels: int, length: int):
        super().__init__()
        self.channels, self.length = channels, length
        key = hashlib.sha256(f"{revision or name} {length}".encode()).hexdigest()[:16]
        self.store = cache_folder() / "text" / f"{key}.sqlite"
        place = functools.cache(lambda: find_encoder(name, revision))
        self.tokenizer = functools.cache(lambda: open_tokenizer(place()))
        self.model = functools.cache(lambda: open_model(place()).to(device()))
        self.states = functools.lru_cache(KEPT)(self._states)
        self.place = nn.Buffer(torch.zeros(0), persistent=False)  # is where the module is

    def forward(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        x = torch.zeros(len(texts), self.length, self.channels)
        mask = torch.zeros(len(texts), self.length, dtype=torch.bool)
        for row, words, text in zip(x, mask, texts):
            if text.strip():
                states = self.states(text)
                row[: len(states)], words[: len(states)] = states, True
        return x.to(self.place.device), mask.to(self.place.device)

    def notes(self, text: str) -> list[str]:
        """What a user should know of a text before it is used: that its end is not read."""
        tokens = len(self.tokenizer()(text)["input_ids"])
        return [f"of {text!r} the first {self.length} of {tokens} tokens are read"] if tokens > self.length else []

    def _states(self, text: str) -> Tensor:
        """(tokens, channels) float16, from the cache or computed now.

        Raises:
            OSError: if the cache cannot be used.
        """
        self.store.parent.mkdir(parents=True, exist_ok=True)
        try:
            with closing(sqlite3.connect(self.store, timeout=60)) as kept, kept:
                kept.execute("CREATE TABLE IF NOT EXISTS states (text TEXT PRIMARY KEY, float16 BLOB)")
                row = kept.execute("SELECT float16 FROM states WHERE text = ?", (text,)).fetchone()
            if row is not None:
                return torch.frombuffer(bytearray(row[0]), dtype=torch.float16).unflatten(0, (-1, self.channels))
            states = self._encode(text)
            with closing(sqlite3.connect(self.store, timeout=60)) as kept, kept:
                kept.execute("INSERT OR REPLACE INTO states VALUES (?, ?)", (text, states.numpy().tobytes()))
            return states
        except sqlite3.Error as error:
            told = f"the cache of captions {self.store} cannot be used: {error}; remove it, and it is made again"
            raise OSError(told) from error

    @torch.no_grad()
    def _encode(self, text: str) -> Tensor:
        words = self.tokenizer()(text, truncation=True, max_length=self.length, return_tensors="pt").to(device())
        with autocast("float32"):
            states = self.model()(**{key: words[key] for key in ("input_ids", "attention_mask")}).last_hidden_state
        return states[0].half().cpu()
