"""Frozen pretrained text encoder from Hugging Face's `transformers`; its states are cached on disk by caption."""

from __future__ import annotations

import functools
import os
import sqlite3
import time
import warnings
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from kit.files import file_sha256
from kit.machine import autocast, cache_folder, device, exact_float32, onto
from kit.values import hash_of

KEPT = 4096  # captions whose states are held in memory
PATIENCE, REST = 60.0, 600.0  # seconds to wait for the cache, which another process may be writing, and to do without
MOVED = "KIT_TEXT_ENCODER"  # environment variable: folder of an encoder that was moved
DECIDING = (".json", ".txt", ".model", ".safetensors")  # suffixes of the files that an encoder's states depend on


class EncoderSource(NamedTuple):
    """Location and configuration of a text encoder.

    Fields: name, a folder or a name on the Hugging Face hub; options, arguments of `from_pretrained`; config, the
        configuration object of transformers; revision, `folder_revision` of a folder, the commit of a name on the hub.
    """

    name: str
    options: dict
    config: object
    revision: str

    @property
    def channels(self) -> int:
        """Size of the encoder's states; for CLIP, of its text half."""
        return getattr(self.config, "text_config", self.config).hidden_size

    @property
    def longest(self) -> int | None:
        """Maximum number of tokens of a text; None: no limit."""
        known = getattr(getattr(self.config, "text_config", self.config), "max_position_embeddings", None)
        return None if known is None else min(known, open_tokenizer(self).model_max_length)  # less where some are reserved


def find_encoder(name: str, revision: str | None = None) -> EncoderSource:
    """Finds a text encoder and reads its configuration.

    Args:
        name: a folder or a name on the hub; KIT_TEXT_ENCODER, if set, replaces it.
        revision: the required revision; None: any. A folder is not compared with a commit.
    Raises:
        ImportError: without transformers. FileNotFoundError: if there is no such encoder. ValueError: for another revision.
    """
    try:
        from transformers import AutoConfig
        from transformers.utils.logging import disable_progress_bar, set_verbosity_error
    except ImportError as error:
        raise ImportError("a pretrained text encoder needs a package: pip install 'kit-videoar[hf]'") from error
    disable_progress_bar(), set_verbosity_error()
    source = os.environ.get(MOVED) or name
    options, here = {"trust_remote_code": False}, Path(source).is_dir()
    found = folder_revision(Path(source)) if here else ""
    wanted = revision if revision and here == revision.startswith("files-") else None
    if here and wanted not in (None, found):
        raise ValueError(f"the text encoder in {source} is of revision {found}, the generator was trained with {wanted}")
    try:
        if not here:
            found = options["revision"] = hub_commit(source, wanted)
        config = AutoConfig.from_pretrained(source, **options)
    except (OSError, ValueError) as error:
        raise _missing(source, error) from error
    return EncoderSource(source, options, config, found)


def hub_commit(name: str, revision: str | None) -> str:
    """Returns the commit of a name on the hub that a revision (None: the branch main) is now.

    All of the encoder's files are then of this commit. Raises OSError or ValueError if there is none.
    """
    from transformers.utils import cached_file, extract_commit_hash

    return extract_commit_hash(cached_file(name, "config.json", revision=revision or "main"), None)


def open_tokenizer(source: EncoderSource):
    """Loads the tokenizer of a text encoder. Raises FileNotFoundError if there is none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source.name, **source.options)
    except (OSError, ValueError) as error:
        raise _missing(source.name, error) from error


def open_model(source: EncoderSource) -> nn.Module:
    """Loads a text encoder, frozen and in evaluation mode. Of CLIP it is the text half, of T5 the encoder.

    Raises:
        FileNotFoundError: if there are no weights as safetensors. ValueError: if some weights are missing.
    """
    from transformers import AutoModelForTextEncoding, CLIPTextModel

    kind = CLIPTextModel if source.config.model_type == "clip" else AutoModelForTextEncoding
    files = {"use_safetensors": True, "dtype": torch.float32, "output_loading_info": True}
    try:
        model, report = kind.from_pretrained(source.name, **files, **source.options)
    except (OSError, ValueError) as error:
        raise _missing(source.name, error) from error
    if lacking := sorted(key for key in report["missing_keys"] if "pooler" not in key and "position_ids" not in key):
        raise ValueError(f"the text encoder {source.name} lacks {len(lacking)} weights, such as {lacking[0]}; get it again")
    return model.eval().requires_grad_(False)


def _missing(name: str, error: Exception) -> FileNotFoundError:
    return FileNotFoundError(
        f"no text encoder {name}: {str(error).splitlines()[0]}; give condition.encoder= a folder or a name on the hub, "
        f"or say where it is now with {MOVED}=FOLDER"
    )


def folder_revision(folder: Path) -> str:
    """Returns `files-` and 16 hex digits: a hash of names and contents of the files that an encoder's states depend on."""
    files = sorted(path for path in folder.iterdir() if path.suffix in DECIDING)
    return "files-" + hash_of(["".join(f"{p.name} {file_sha256(p)} " for p in files)], 16)


class PretrainedEncoder(nn.Module):
    """Text encoder that returns the last hidden states of a frozen pretrained one, of the first `length` tokens of a text.

    Each text is encoded alone, so that its states do not depend on a batch, and only once: the states are kept in float16 in
    the folder `text` of kit's cache, 2 bytes for each of a token's channels. The pretrained encoder is loaded when the first
    new text comes. Its weights are not part of this module: checkpoints hold its name and revision.
    """

    unit = "tokens"

    def __init__(self, name: str, revision: str, channels: int, length: int):
        super().__init__()
        self.channels, self.length = channels, length
        source = functools.cache(lambda: self._source(name, revision))
        place = Path(os.environ.get(MOVED) or name)
        found = folder_revision(place) if place.is_dir() else ""  # it may hold another encoder than the commit asked for
        key = hash_of([f"{revision or name} {found} {channels} {length}"], 16)
        self.store = cache_folder() / "text" / f"{key}.sqlite"
        self.rests: dict[str, float] = {}  # until when the cache is not asked (SELECT), or told anything (INSERT)
        self.longest = functools.cache(lambda: source().longest)
        self.tokenizer = functools.cache(lambda: open_tokenizer(source()))
        self.model = functools.cache(lambda: open_model(source()).to(device()))
        self.states = functools.lru_cache(KEPT)(self._states)
        self.anchor = nn.Buffer(torch.zeros(0), persistent=False)  # tells the device that the module is on

    def _source(self, name: str, revision: str) -> EncoderSource:
        """Finds the encoder. Raises ValueError if its states have other channels; else as `find_encoder`."""
        source = find_encoder(name, revision)
        if source.channels != self.channels:
            raise ValueError(
                f"the text encoder {source.name} has {source.channels} channels, expected {self.channels}: it is another one"
            )
        return source

    def forward(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Returns states (B, length, channels), and which of them are of tokens, (B, length) bool."""
        x = torch.zeros(len(texts), self.length, self.channels, dtype=torch.float16)  # as they are kept
        mask = torch.zeros(len(texts), self.length, dtype=torch.bool)
        for row, known, text in zip(x, mask, texts):
            if text.strip():
                states = self.states(text)
                row[: len(states)], known[: len(states)] = states, True
        return onto(x, self.anchor.device).float(), onto(mask, self.anchor.device)

    def lengths(self, texts: list[str]) -> list[int]:
        return [len(ids) for ids in self.tokenizer()(texts)["input_ids"]] if texts else []

    def notes(self, text: str) -> list[str]:
        """Warns if the end of a text is not read."""
        (tokens,) = self.lengths([text])
        return [f"of {text!r} the first {self.length} of {tokens} tokens are read"] if tokens > self.length else []

    def _states(self, text: str) -> Tensor:
        """Returns the states of a text, (tokens, channels) float16, from the cache or computed now. Raises as `_ask`."""
        row = self._ask("SELECT float16 FROM states WHERE text = ?", text)
        if row is not None:
            return torch.frombuffer(bytearray(row[0]), dtype=torch.float16).unflatten(0, (-1, self.channels))
        states = self._encode(text)
        self._ask("INSERT OR REPLACE INTO states VALUES (?, ?)", text, states.numpy().tobytes())
        return states

    def _ask(self, statement: str, *values: str | bytes) -> tuple | None:
        """Runs a statement on the cache; returns the first row of its answer. Where a cache is locked for long, cannot be
        written or has no room, that is told once, and statements of this kind are done without for `REST` seconds.

        Raises:
            OSError: if the cache is damaged.
        """
        kind = statement.split()[0]
        if time.monotonic() < self.rests.get(kind, 0.0):
            return None
        try:
            self.store.parent.mkdir(parents=True, exist_ok=True)
            with closing(sqlite3.connect(self.store, timeout=PATIENCE)) as kept, kept:
                kept.execute("CREATE TABLE IF NOT EXISTS states (text TEXT PRIMARY KEY, float16 BLOB)")
                return kept.execute(statement, values).fetchone()
        except (sqlite3.OperationalError, OSError) as error:
            if not self.rests:
                way_out = "KIT_CACHE=DIR says where there is room"
                warnings.warn(f"the cache of captions {self.store} cannot be used now: {error}; {way_out}", stacklevel=2)
            self.rests[kind] = time.monotonic() + REST
        except sqlite3.Error as error:
            message = f"the cache of captions {self.store} cannot be used: {error}; remove it, and it is made again"
            raise OSError(message) from error
        return None

    @torch.no_grad()
    def _encode(self, text: str) -> Tensor:
        tokens = self.tokenizer()(text, truncation=True, max_length=self.length, return_tensors="pt").to(device())
        with autocast("float32"), exact_float32():  # a training rounds more, and its states are kept for sampling
            states = self.model()(**{key: tokens[key] for key in ("input_ids", "attention_mask")}).last_hidden_state
        return states[0].half().cpu()
