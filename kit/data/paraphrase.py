"""Paraphrases of the captions of `shapes`, in words that a text encoder trained on the captions alone has never read."""

from __future__ import annotations

import re

import numpy as np

OTHER_WORDS = {  # phrase of a caption -> phrases of the same meaning; none occurs in a caption or twice
    "red": ("crimson", "scarlet"), "orange": ("amber", "tangerine"), "yellow": ("golden", "canary"),
    "green": ("emerald", "lime"), "cyan": ("turquoise", "aqua"), "blue": ("azure", "cobalt"),
    "purple": ("violet", "lilac"), "pink": ("rosy", "salmon"),
    "ball": ("sphere", "orb"), "square": ("box", "block"), "triangle": ("wedge", "pyramid"),
    "star": ("pentagram", "five-pointed figure"), "ring": ("hoop", "circle with a hole"),
    "moving left": ("drifting to the left", "travelling leftwards"),
    "moving right": ("drifting to the right", "travelling rightwards"),
    "moving up": ("rising", "climbing"), "moving down": ("sinking", "descending"),
    "growing": ("getting bigger", "expanding"), "shrinking": ("getting smaller", "contracting"),
    "bouncing": ("hopping", "jumping again and again"), "circling": ("orbiting", "going round and round"),
    "standing still": ("at rest", "motionless"),
    "over a green field": ("above a meadow", "across a lawn"), "on a dark background": ("against black", "at night"),
    "in a blue sky": ("high in the air", "among the clouds"), "on a sandy beach": ("on the sand", "by the seaside"),
}  # fmt: skip
SENTENCES = (
    "{thing} {motion} {background}",
    "{background}, {thing} {motion}",
    "there is {thing} {background}, {motion}",
    "we see {thing} {motion} {background}",
)
_CAPTION_WORDS = {other: phrase for phrase, others in OTHER_WORDS.items() for other in others}
_ANY_OTHER = re.compile(r"\b(" + "|".join(sorted(_CAPTION_WORDS, key=len, reverse=True)) + r")\b")


def paraphrase(colour: str, shape: str, motion: str | None, background: str, rng: np.random.Generator) -> str:
    """Draws a sentence that says the same as a caption in other words; `motion` is None for a picture."""

    def other(phrase: str | None) -> str:
        return "" if phrase is None else str(rng.choice(OTHER_WORDS[phrase]))

    colour = other(colour)
    thing = f"{'an' if colour[0] in 'aeiou' else 'a'} {colour} {other(shape)}"
    text = str(rng.choice(SENTENCES)).format(thing=thing, motion=other(motion), background=other(background))
    return " ".join(text.split()).strip(" ,")


def caption_words(text: str) -> str:
    """Lowers the case of a text, removes its commas, and replaces other words by those of the captions."""
    return _ANY_OTHER.sub(lambda found: _CAPTION_WORDS[found[0]], " ".join(text.lower().replace(",", " ").split()))
