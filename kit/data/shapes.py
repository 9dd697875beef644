"""The embedded data set `shapes`: captioned clips of shaded shapes, drawn on the fly.

A clip is a pure function of (seed, index): nothing is downloaded or stored, and any resolution, length and frame
rate can be asked for. Each clip shows one shape in one colour doing one motion before one background, and its
caption says so: "a red ball moving right over a green field".
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np
import torch

from kit.data.paraphrase import caption_words, paraphrase
from kit.data.source import ClipSource
from kit.values import check_share, check_whole_number

COLOURS = {
    "red": (225, 40, 40), "orange": (245, 140, 30), "yellow": (250, 225, 40), "green": (45, 205, 75),
    "cyan": (40, 210, 220), "blue": (45, 85, 235), "purple": (145, 55, 205), "pink": (250, 120, 190),
}  # fmt: skip
SHAPES = ("ball", "square", "triangle", "star", "ring")
MOTIONS = ("moving left", "moving right", "moving up", "moving down",
           "growing", "shrinking", "bouncing", "circling", "standing still")  # fmt: skip
# phrase in the caption -> the two colours its gradient runs between, top to bottom
BACKGROUNDS = {
    "over a green field": ((38, 84, 44), (96, 148, 82)),
    "on a dark background": ((22, 24, 34), (62, 64, 78)),
    "in a blue sky": ((120, 172, 232), (204, 226, 248)),
    "on a sandy beach": ((206, 178, 128), (242, 228, 196)),
}

TRANSLATION_SPEED = 0.22  # short sides of the frame per second
GROWTH_SPEED = 0.3  # base radii per second
GROWTH_PERIOD = 4.0  # seconds after which growing and shrinking start again
CIRCLE_PERIOD = 2.0  # seconds per turn
BOUNCE_PERIOD = 1.0  # seconds per bounce
LATEST = 8.0  # seconds; every motion has repeated by then
LIGHT = np.array([-0.5, -0.6, 0.62], dtype=np.float32)  # towards the light: from the upper left, out of the picture


@dataclass(frozen=True)
class Attributes:
    """What a clip shows. `background` and `motion` are the phrases of the caption."""

    colour: str
    shape: str
    motion: str
    background: str

    @property
    def held_out(self) -> bool:
        """Whether this combination of colour, shape and motion is kept from training."""
        return (self.colour, self.shape, self.motion) in HELD_OUT

    def caption(self, still: bool = False) -> str:
        """One sentence; `still` leaves the motion out, as for an image."""
        article = "an" if self.colour[0] in "aeiou" else "a"
        words = [article, self.colour, self.shape, *([] if still else [self.motion]), self.background]
        return " ".join(words)


def parse_caption(caption: str) -> Attributes:
    """The attributes a caption or a paraphrase names; the inverse of `Attributes.caption`.

    Raises:
        ValueError: if the caption does not name one COLOUR, SHAPE and BACKGROUND, and one MOTION or none.
    """
    text = caption_words(caption)

    def find(kind: str, options) -> str:
        hits = [option for option in options if f" {option} " in f" {text} "]
        if len(hits) != 1:
            raise ValueError(f"caption {caption!r} names {len(hits)} {kind}s; expected one of: {', '.join(options)}")
        return hits[0]

    background = find("background", BACKGROUNDS)
    text = text.replace(background, "")  # it may name a colour of its own: "over a green field"
    has_motion = any(motion in text for motion in MOTIONS)
    return Attributes(
        find("colour", COLOURS), find("shape", SHAPES),
        find("motion", MOTIONS) if has_motion else "standing still", background,
    )  # fmt: skip


def _held_out() -> frozenset[tuple[str, str, str]]:
    """A tenth of all (colour, shape, motion), drawn once; every single value still occurs in training."""
    combinations = list(itertools.product(COLOURS, SHAPES, MOTIONS))
    chosen = np.random.default_rng(2601).permutation(len(combinations))[: len(combinations) // 10]
    return frozenset(combinations[i] for i in chosen)


HELD_OUT = _held_out()
TRAIN = tuple(c for c in itertools.product(COLOURS, SHAPES, MOTIONS) if c not in HELD_OUT)
COMBINATIONS = {"train": TRAIN, "val": sorted(HELD_OUT)}  # of each split


def attributes_of(rng: np.random.Generator, split: str) -> Attributes:
    """Draws what to show: `train` from the combinations of training, `val` from the held-out ones."""
    if split not in COMBINATIONS:
        raise ValueError(f"shapes has the splits 'train' and 'val', not {split!r}")
    choice = COMBINATIONS[split][rng.integers(len(COMBINATIONS[split]))]
    return Attributes(*choice, list(BACKGROUNDS)[rng.integers(len(BACKGROUNDS))])


def signed_distance(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Distance to the outline of a shape of radius about 1, negative inside. x right, y down; shapes broadcast."""
    if shape == "ball":
        return np.sqrt(x * x + y * y) - 0.92
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - 0.8
    if shape == "ring":
        return np.abs(np.sqrt(x * x + y * y) - 0.7) - 0.28
    if shape == "triangle":
        y = y - 0.18  # centre of its box, not of its mass
        return np.maximum(y, np.abs(x) * 0.8660254 - y * 0.5) - 0.58
    if shape == "star":
        x, y = np.broadcast_arrays(np.abs(x), -y)  # fold into one tenth of the star by mirrors at 36 and 72 degrees
        for kx, ky in ((0.809017, -0.587785), (-0.809017, -0.587785)):
            inside = 2 * np.maximum(kx * x + ky * y, 0)
            x, y = x - inside * kx, y - inside * ky
        x, y = np.abs(x), y - 1.12  # the tip; the edge runs from it to the notch at 0.45 of the radius
        edge_x, edge_y = 0.45 * 1.12 * 0.587785, 0.45 * 1.12 * 0.809017 - 1.12
        length = np.hypot(edge_x, edge_y)
        return (y * edge_x - x * edge_y) / length
    raise ValueError(f"unknown shape {shape!r}; expected one of {', '.join(SHAPES)}")


def trajectory(motion: str, seconds: np.ndarray, radius: float, height: float, width: float, rng: np.random.Generator):
    """Computes place and size of the shape in each frame.

    Args:
        seconds: (T,) time of each frame.
        radius, height, width: in short sides of the frame.
    Returns:
        centre x, centre y and radius, each (T,), in short sides. Translation leaves the frame and enters again on the other
            side; growing and shrinking start again after `GROWTH_PERIOD`, so every motion goes on for ever.
    """
    still = np.zeros_like(seconds)
    margin = radius * 1.3
    x = rng.uniform(margin, width - margin) + still
    y = rng.uniform(margin, height - margin) + still
    radii = radius + still
    phase = rng.uniform(0, 1)

    def travel(extent: float, sign: int) -> np.ndarray:
        middle = extent / 2 + (phase - 0.5) * 0.12  # where it is after one second
        reach = extent + 2 * margin
        return (middle + sign * TRANSLATION_SPEED * (seconds - 1) + margin) % reach - margin

    match motion:
        case "moving left":
            x = travel(width, -1)
        case "moving right":
            x = travel(width, 1)
        case "moving up":
            y = travel(height, -1)
        case "moving down":
            y = travel(height, 1)
        case "growing" | "shrinking":
            grown = (GROWTH_SPEED * seconds + 0.2 * phase) % (GROWTH_SPEED * GROWTH_PERIOD)
            radii = radius * (0.5 + grown if motion == "growing" else 1.5 - grown)
            x = width / 2 + (x - width / 2) * 0.6
            y = height / 2 + (y - height / 2) * 0.6
        case "bouncing":
            floor = height - margin
            y = floor - 0.38 * np.abs(np.sin(np.pi * (seconds / BOUNCE_PERIOD + phase)))
        case "circling":
            angle = 2 * np.pi * (seconds / CIRCLE_PERIOD + phase)
            x = width / 2 + (x - width / 2) * 0.3 + 0.19 * np.cos(angle)
            y = height / 2 + (y - height / 2) * 0.3 + 0.19 * np.sin(angle)
        case "standing still":
            pass
        case _:
            raise ValueError(f"unknown motion {motion!r}; expected one of {', '.join(MOTIONS)}")
    return x, y, radii


def _background(phrase: str, height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """(3, H, W) in [0, 255]: a gradient, mostly from top to bottom, of slightly varying brightness."""
    top, bottom = (np.array(c, dtype=np.float32)[:, None, None] for c in BACKGROUNDS[phrase])
    tilt = rng.uniform(-0.5, 0.5)
    ys = np.linspace(-0.5, 0.5, height, dtype=np.float32)[:, None]
    xs = np.linspace(-0.5, 0.5, width, dtype=np.float32)[None, :]
    along = np.clip(0.5 + ys * (1 - abs(tilt)) + xs * tilt, 0, 1)
    return (top + (bottom - top) * along) * np.float32(rng.uniform(0.93, 1.05))


def _shade(shape: str, x: np.ndarray, y: np.ndarray, distance: np.ndarray) -> np.ndarray:
    """Brightness of the surface, about 0.6 to 1.15: a sphere under a light, or a bevelled plate."""
    if shape == "ball":
        z = np.sqrt(np.maximum(0.85 - x * x - y * y, 0))
        return 0.58 + 0.5 * np.maximum(LIGHT[0] * x + LIGHT[1] * y + LIGHT[2] * z, 0)
    return 0.9 + 0.14 * (LIGHT[0] * x + LIGHT[1] * y) + 0.4 * np.maximum(distance, -0.25)


def render(
    attributes: Attributes, rng: np.random.Generator, frames: int, height: int, width: int, fps: float, start: float = 0.0
):  # fmt: skip
    """Draws a clip; `rng` decides place, size and light within what `attributes` say, `start` is the time of its first frame.

    Returns: float32 array (3, T, H, W) in [-1, 1].
    """
    side = min(height, width)
    seconds = np.float32(start) + np.arange(frames, dtype=np.float32) / fps
    radius = rng.uniform(0.17, 0.22)
    xs, ys, radii = trajectory(attributes.motion, seconds, radius, height / side, width / side, rng)
    background = _background(attributes.background, height, width, rng)
    colour = np.array(COLOURS[attributes.colour], dtype=np.float32) * np.float32(rng.uniform(0.92, 1.04))

    # Everything that differs from the background lies in a box around the centre: 1.2 radii, shadow and blur included.
    xs, ys, radii = (np.asarray(a * side, dtype=np.float32)[:, None, None] for a in (xs, ys, radii))
    half = int(np.ceil(radii.max() * 1.75)) + 1
    left, top = np.floor(xs).astype(int) - half, np.floor(ys).astype(int) - half
    offsets = np.arange(2 * half + 1, dtype=np.float32) + 0.5
    x = (left + offsets[None, None, :] - xs) / radii
    y = (top + offsets[None, :, None] - ys) / radii

    distance = signed_distance(attributes.shape, x, y)
    cover = np.clip(0.5 - distance * radii, 0, 1)
    shadow = np.clip(0.5 - signed_distance(attributes.shape, x - 0.28, y - 0.34) / 0.5, 0, 1) * 0.42 * (1 - cover)
    light = _shade(attributes.shape, x, y, distance) * cover
    keep = 1 - cover - shadow

    video = np.repeat(background[:, None], frames, axis=1)
    size = 2 * half + 1
    for t in range(frames):
        l, u = int(left[t, 0, 0]), int(top[t, 0, 0])
        rows = slice(max(u, 0), max(min(u + size, height), 0))
        columns = slice(max(l, 0), max(min(l + size, width), 0))
        inner = (t, slice(rows.start - u, rows.stop - u), slice(columns.start - l, columns.stop - l))
        patch = video[:, t, rows, columns]
        patch *= keep[inner]
        patch += colour[:, None, None] * light[inner]
    np.clip(video, 0, 255, out=video)
    video *= 1 / 127.5
    video -= 1
    return video


@dataclass(frozen=True)
class Shapes(ClipSource):
    """Data set of drawn clips: item n is {"video": (3, T, H, W) in [-1, 1], "caption": str, "label": int, "given": int}.

    Args:
        split: `train` (combinations of training) or `val` (the held-out tenth).
        frames: T, 1 gives images. height, width: pixels. fps: frames per second.
        seed: each seed gives another endless set of clips.
        paraphrased: whether captions say the same in other words (`kit.data.paraphrase`).
        late: share of the training clips that begin at a random time up to `LATEST` seconds, and so show what a long video
            shows towards its end. Their first latent frame is `given`, because the caption does not say what is in sight at
            that time.
    Raises:
        ValueError: if `fps` is no finite number above 0, `seed` is no whole number of 0 or more, or `late` is not in [0, 1].
    """

    split: str = "train"
    frames: int = 17
    height: int = 64
    width: int = 64
    fps: float = 8.0
    seed: int = 0
    paraphrased: bool = False
    late: float = 0.0

    classes = SHAPES  # `label` is the shape, for class-conditional models
    captioned = True

    def __post_init__(self):
        if not 0 < self.fps < math.inf:
            raise ValueError(f"fps={self.fps}; shapes are drawn, they have no rate of their own: give one above 0")
        check_whole_number("seed", self.seed, 0)
        check_share("late", self.late)

    def attributes(self, n: int) -> Attributes:
        """What clip n shows, without drawing it."""
        return attributes_of(self._rng(n), self.split)

    def caption(self, n: int) -> str:
        return self._caption(self.attributes(n), n)

    def _caption(self, shown: Attributes, n: int) -> str:
        still = self.frames == 1
        if not self.paraphrased:
            return shown.caption(still)
        rng = self._rng(n, 1)
        return paraphrase(shown.colour, shown.shape, None if still else shown.motion, shown.background, rng)

    def words(self, n: int) -> dict:
        """`caption` and `label` of clip n."""
        shown = self.attributes(n)
        return {"caption": self._caption(shown, n), "label": SHAPES.index(shown.shape)}

    def __getitem__(self, n: int) -> dict:
        rng = self._rng(n)
        shown = attributes_of(rng, self.split)
        start = self.start(n)
        video = render(shown, rng, self.frames, self.height, self.width, self.fps, start or 0.0)
        return {"video": torch.from_numpy(video), **self.words(n), "given": 0 if start is None else 1}

    @property
    def draws(self) -> dict:
        return {"seed": self.seed, "late": self.late}

    def start(self, n: int) -> float | None:
        """Time in seconds at which clip n begins if it is a late one, else None."""
        chance, time = self._rng(n, 2).random(2)
        return time * LATEST if self.split == "train" and self.frames > 1 and chance < self.late else None

    def _rng(self, n: int, *use: int) -> np.random.Generator:
        """Random numbers of clip n: for what it shows or, by `use`, for its words (1) or for when it begins (2)."""
        return np.random.default_rng((self.seed, 0 if self.split == "train" else 1, n, *use))
