"""Infinity's public image tokenizer as a checkpoint of kit: python -m kit prepare infinity source=FILE."""

from __future__ import annotations

from pathlib import Path

from kit.checkpoint import save_tokenizer
from kit.tokenizer.infinity_weights import load_infinity


def prepare_infinity(source: Path | None = None) -> Path:
    """Converts a file of Infinity's image tokenizer to a checkpoint of kit, written beside it.

    Raises:
        FileNotFoundError: if there is no such file, saying where to get it. ValueError: as `load_infinity`.
    """
    if source is None or not source.is_file():
        found = "no file was given" if source is None else f"there is no {source}"
        raise FileNotFoundError(
            f"{found}: fetch infinity_vae_d32reg.pth, or another infinity_vae_*.pth, from "
            f"https://huggingface.co/FoundationVision/Infinity and give source=FILE"
        )
    tokenizer = load_infinity(source)
    side = tokenizer.config.shorter_side
    target = source.with_name(f"{source.stem}_kit.ckpt")
    save_tokenizer(tokenizer, {"frames": 1, "height": side, "width": side, "fps": 1.0}, target)  # a picture has no rate
    return target
