"""The tokenizer: pixels <-> bits."""

from kit.tokenizer.tokenizer import Tokenizer, TokenizerConfig

__all__ = ["Tokenizer", "TokenizerConfig"]
