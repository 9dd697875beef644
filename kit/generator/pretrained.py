"""A pretrained text encoder of Hugging Face's `transformers`, frozen, its states kept on disk by caption."""

from __future__ import annotations

import functools
import hashlib
import os
import sqlite3
from contextlib import closing
from pathlib import Path

import torch
from torch import Tensor, nn

from kit.files import file_sha256
from kit.machine import autocast, cache_folder, device

KEPT = 4096  # captions whose states are held in memory
MOVED = "KIT_TEXT_ENCODER"  # names the folder of an encoder that is not where it was


def open_encoder(name: str, revision: str = ""):
    """Tokenizer and text encoder of `transformers`, in evaluation mode, and the revision that they are of.

    Args:
        name: a folder, or a name on the Hugging Face hub. CLIP: its text half; T5: its encoder.
        revision: for a name on the hub a commit, for a folder the digest of its config and weights; empty: whatever is there.
    Raises:
        ImportError: without transformers. FileNotFoundError, ValueError: if there is no such encoder, or another revision.
    """
    try:
        from transformers import AutoConfig, AutoModelForTextEncoding, AutoTokenizer, CLIPTextModel
        from transformers.utils.logging import disable_progress_bar
    except ImportError as error:
        raise ImportError("a pretrained text encoder needs a package: pip install 'kit-videoar[hf]'") from error
    disable_progress_bar()
    place = os.environ.get(MOVED) or name
    local = Path(place).is_dir()
    found = folder_revision(Path(place)) if local else None
    if local and revision and found != revision:
        raise ValueError(f"the text encoder in {place} is of revision {found}, the generator was trained with {revision}")
    where = {} if local or not revision else {"revision": revision}
    files = {"use_safetensors": True, "dtype": torch.float32, "output_loading_info": True}
    try:
        config = AutoConfig.from_pretrained(place, **where)
        kind = CLIPTextModel if config.model_type == "clip" else AutoModelForTextEncoding
        model, report = kind.from_pretrained(place, **files, **where)
        tokenizer = AutoTokenizer.from_pretrained(place, **where)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"no text encoder {place}: {str(error).splitlines()[0]}; give condition.encoder= a folder or a name on the hub, "
            f"or say where it is now with {MOVED}=FOLDER"
        ) from error
    if lacking := sorted(key for key in report["missing_keys"] if "pooler" not in key and "position_ids" not in key):
        raise ValueError(f"the text encoder {place} lacks {len(lacking)} weights, such as {lacking[0]}; download it again")
    return tokenizer, model.eval().requires_grad_(False), found or config._commit_hash or ""


def folder_revision(folder: Path) -> str:
    """16 hex digits of an encoder's files that decide its states."""
    names = sorted(p for p in folder.iterdir() if p.suffix == ".safetensors" or p.name in ("config.json", "tokenizer.json"))
    return hashlib.sha256("".join(file_sha256(path) for path in names).encode()).hexdigest()[:16]


class PretrainedEncoder(nn.Module):
    """Last hidden states of a frozen encoder, for texts of at most `length` tokens.

    Each text goes through it alone, so that its states are a function of the text and not of a batch, and only once: they are
    kept in float16 in the folder `text` of kit's cache. The encoder is loaded when a text is new. Its weights are no part of
    this module: checkpoints hold its name and revision.
    """

    def __init__(self, name: str, revision: str, channels: int, length: int):
        super().__init__()
        self.name, self.revision, self.channels, self.length = name, revision, channels, length
        key = hashlib.sha256(f"{name if not revision else ''} {revision} {length}".encode()).hexdigest()[:16]
        self.store = cache_folder() / "text" / f"{key}.sqlite"
        self.loaded = functools.cache(lambda: open_encoder(name, revision))
        self.states = functools.lru_cache(KEPT)(self._states)
        self.place = nn.Buffer(torch.zeros(0), persistent=False)  # is where the module is

    def forward(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        found = [self.states(text) for text in texts]
        x = torch.zeros(len(texts), self.length, self.channels)
        mask = torch.zeros(len(texts), self.length, dtype=torch.bool)
        for row, (states, text) in enumerate(zip(found, texts)):
            if text.strip():
                x[row, : len(states)], mask[row, : len(states)] = states, True
        return x.to(self.place.device), mask.to(self.place.device)

    def notes(self, text: str) -> list[str]:
        tokenizer = self.loaded()[0]
        tokens = len(tokenizer(text)["input_ids"])
        return [f"of {text!r} the first {self.length} of {tokens} tokens are read"] if tokens > self.length else []

    def _states(self, text: str) -> Tensor:
        """(tokens, channels) float16, from the cache or computed now."""
        self.store.parent.mkdir(parents=True, exist_ok=True)
        with closing(sqlite3.connect(self.store, timeout=60)) as kept, kept:
            kept.execute("CREATE TABLE IF NOT EXISTS states (text TEXT PRIMARY KEY, float16 BLOB)")
            row = kept.execute("SELECT float16 FROM states WHERE text = ?", (text,)).fetchone()
        if row is None:
            states = self._encode(text)
            with closing(sqlite3.connect(self.store, timeout=60)) as kept, kept:
                kept.execute("INSERT OR REPLACE INTO states VALUES (?, ?)", (text, states.numpy().tobytes()))
            return states
        return torch.frombuffer(bytearray(row[0]), dtype=torch.float16).unflatten(0, (-1, self.channels))

    @torch.no_grad()
    def _encode(self, text: str) -> Tensor:
        tokenizer, model, _ = self.loaded()
        words = tokenizer(text, truncation=True, max_length=self.length, return_tensors="pt").to(device())
        with autocast("float32"):
            states = model.to(device())(**{k: words[k] for k in ("input_ids", "attention_mask")}).last_hidden_state
        return states[0].half().cpu()
