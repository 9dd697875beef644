"""Reads colour, shape, motion and background of a `shapes` clip back from its pixels, without any model.

The steps, all classical: fit a plane to the background's colours, robustly; call foreground what is neither background
nor its shadow; take the foreground's median colour; follow centre and size of the foreground over the frames; compare
its outline with the drawn shapes and its path with paths drawn from the data set's own law. The caption is never an
input of `read_clip`: `caption_accuracy` only compares it with the reading afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache

import numpy as np
import torch

from kit.data.paraphrase import caption_words
from kit.data.shapes import (
    BACKGROUNDS,
    COLOURS,
    MOTIONS,
    SHAPES,
    parse_caption,
    signed_distance,
    trajectory,
)
from kit.pixels import in_range

MIN_SIDE = 16  # pixels; in a smaller clip shapes cannot be told apart

FIT_SAMPLES = 4000  # pixels that the background is fitted to
SHADOW = (0.5, 1.1)  # brightness of the background in the shadow and beside it, relative to the fit
SHADING = (0.7, 1.5)  # brightness of the surface, relative to its median
CONTRAST = 0.15  # least distance of the foreground from the background, in RGB of [0, 1]
LEAST_AREA = 0.0025  # least area of a shape, in squared short sides
REACH = 1.8  # radii, of the disc of equal area; every shape lies within this distance of its centre

GRID = 32  # outlines are compared on GRID x GRID points
SOFTNESS = 0.23  # radii; blur of the drawn shapes, so that an outline blurred by an autoencoder still matches
OUTLINE_FRAMES = 8  # frames whose outlines are averaged

PATHS = 128  # paths drawn per motion
RADIUS_WEIGHT = 0.2  # short sides; distance that a change of the radius by a factor e counts as
FAR = 0.15  # short sides; a frame's distance counts as this at most, since the path may re-enter a frame earlier

# Beyond these limits a clip is called unreadable instead of getting the nearest label. Real clips stay well within them.
LEAST_BACKGROUND = 0.5  # share of pixels that agree with the fitted background
LEAST_CHROMA = 0.08  # of a colour, relative to its length: below, it is grey
LEAST_LIKENESS = 0.85  # correlation of the outline with that of a shape
LEAST_SEEN = 0.5  # share of frames that show the foreground
GREATEST_MISS = 0.1  # short sides (root mean square) between the foreground's path and that of a motion


@dataclass(frozen=True)
class Reading:
    """What a clip shows, in the words of the captions; None: cannot be read."""

    colour: str | None = None
    shape: str | None = None
    motion: str | None = None
    background: str | None = None


@dataclass(frozen=True)
class Track:
    """Where the foreground is in each frame: centre and radius in pixels, and whether it is seen at all; each (T,)."""

    x: np.ndarray
    y: np.ndarray
    radius: np.ndarray  # of the disc of equal area
    seen: np.ndarray  # large enough to be a shape


def read_clip(video: torch.Tensor | np.ndarray, fps: float) -> Reading:
    """Reads a clip from its pixels.

    Args:
        video: (3, T, H, W), floating point, in [-1, 1]; H and W at least 16. T may be 1, an image without motion.
        fps: frames per second.
    Raises:
        ValueError: if `video` has another shape, type or range or is not finite, or `fps` is not positive.
    """
    rgb = _checked(video, fps)
    backdrop = fit_background(rgb)
    distance = _distance_to_ray(rgb, backdrop[:, None], *SHADOW)
    if np.mean(distance < CONTRAST) < LEAST_BACKGROUND:
        return Reading()
    background = read_background(backdrop)
    ink = foreground_colour(rgb, distance)
    if ink is None:
        return Reading(background=background)
    cover = distance / (distance + _distance_to_ray(rgb, ink[:, None, None, None], *SHADING) + 1e-6)
    track = follow(cover > 0.5)
    if not track.seen.any():
        return Reading(background=background)
    return Reading(read_colour(ink), read_shape(cover, track), read_motion(track, fps, *rgb.shape[2:]), background)


def caption_accuracy(
    videos: Sequence[torch.Tensor | np.ndarray] | torch.Tensor | np.ndarray, captions: Sequence[str], fps: float
) -> dict[str, float]:
    """How often clips show what their captions say.

    Args:
        videos: N clips, each as `read_clip` takes it. captions: N captions of the grammar of `parse_caption`.
    Returns:
        fraction right in [0, 1] for "colour", "shape", "motion" and "background", and "all": everything the caption
        names right together. "motion" counts the captions that name one and is left out if none does.
    Raises:
        ValueError: if the numbers of videos and captions differ or are 0, or `read_clip` or `parse_caption` raises it.
    """
    if len(videos) != len(captions) or len(captions) == 0:
        raise ValueError(f"expected as many videos as captions, at least 1; found {len(videos)} and {len(captions)}")
    right: dict[str, list[bool]] = {}
    for video, caption in zip(videos, captions, strict=True):
        for name, hit in caption_hits(video, caption, fps).items():
            right.setdefault(name, []).append(hit)
    return {name: float(np.mean(right[name])) for name in ("colour", "shape", "motion", "background", "all")
            if name in right}  # fmt: skip


def caption_hits(video: torch.Tensor | np.ndarray, caption: str, fps: float) -> dict[str, bool]:
    """Compares a clip with its caption: name of an attribute -> whether the clip shows what the caption says.

    Attributes that the caption does not name are left out; `all` is whether all others are right. Arguments as for
    `caption_accuracy`.
    """
    targets = asdict(parse_caption(caption))
    if targets["motion"] not in caption_words(caption):  # caption of an image: `parse_caption` fills in a motion
        del targets["motion"]
    reading = read_clip(video, fps)
    hits = {name: getattr(reading, name) == value for name, value in targets.items()}
    return {**hits, "all": all(hits.values())}


def _checked(video: torch.Tensor | np.ndarray, fps: float) -> np.ndarray:
    """Checks a clip, and returns it as float32 RGB in [0, 1]. Raises: ValueError as `read_clip`."""
    if isinstance(video, torch.Tensor):
        if not video.is_floating_point():
            raise ValueError(f"expected a floating point video, found {video.dtype}")
        video = video.detach().float().cpu().numpy()
    if not isinstance(video, np.ndarray) or not np.issubdtype(video.dtype, np.floating):
        raise ValueError(f"expected a floating point video, found {getattr(video, 'dtype', type(video).__name__)}")
    if video.ndim != 4 or video.shape[0] != 3 or video.shape[1] < 1 or min(video.shape[2:]) < MIN_SIDE:
        raise ValueError(f"expected a video (3, T, H, W) with T >= 1, H and W >= {MIN_SIDE}, found {video.shape}")
    low, high = video.min(), video.max()
    if not in_range(low, high):
        raise ValueError(f"expected finite values in [-1, 1], found {low} to {high}")
    if not (0 < fps < np.inf):
        raise ValueError(f"expected positive frames per second, found {fps}")
    return video.astype(np.float32) * 0.5 + 0.5


def fit_background(rgb: np.ndarray) -> np.ndarray:
    """(3, H, W): the plane per channel near which most pixels of a clip (3, T, H, W) lie."""
    _, frames, height, width = rgb.shape
    ys, xs = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j].astype(np.float32)
    plane = np.stack([np.ones_like(xs), xs, ys])
    step = max(1, int((frames * height * width / FIT_SAMPLES) ** 0.5))
    design = np.repeat(plane[:, None, ::step, ::step], frames, axis=1).reshape(3, -1)
    pixels = rgb[:, :, ::step, ::step].reshape(3, -1)
    # start at the border, where the shape rarely is; then use all pixels that agree, ever more strictly
    weights = (np.abs(design[1:]).max(axis=0) > 0.8).astype(np.float32)
    for scale in (0.3, 0.2, 0.15, 0.1, 0.07, 0.05, 0.05, 0.05):
        weighted = design * weights
        fit = np.linalg.solve(weighted @ design.T + 1e-3 * np.eye(3), weighted @ pixels.T)
        misfit = ((pixels - fit.T.astype(np.float32) @ design) ** 2).sum(axis=0)
        weights = 1 / (1 + misfit / scale**2) ** 2
    return np.clip(np.einsum("kc,khw->chw", fit, plane), 0.02, 1).astype(np.float32)


def read_background(backdrop: np.ndarray) -> str:
    """The background whose mean colour is nearest to that of a fitted one, (3, H, W)."""
    mean = backdrop.mean(axis=(1, 2)) * 255
    return min(BACKGROUNDS, key=lambda name: float(np.sum((np.mean(BACKGROUNDS[name], axis=0) - mean) ** 2)))


def _distance_to_ray(rgb: np.ndarray, colour: np.ndarray, low: float, high: float) -> np.ndarray:
    """(T, H, W): distance of each pixel from the nearest brightness, `low` to `high`, of a colour (3, ...)."""
    brightness = np.clip((rgb * colour).sum(axis=0) / (colour * colour).sum(axis=0), low, high)
    return np.sqrt(((rgb - brightness * colour) ** 2).sum(axis=0))


def foreground_colour(rgb: np.ndarray, distance: np.ndarray) -> np.ndarray | None:
    """(3,): median colour of what is farthest from the background; None if nothing stands out."""
    farthest = np.quantile(distance.reshape(-1)[::3], 0.998)  # every third pixel will do
    if farthest < CONTRAST:
        return None
    return np.median(rgb[:, distance > 0.6 * farthest], axis=1)


def read_colour(ink: np.ndarray) -> str | None:
    """The colour of the nearest hue, which shading and fading do not change; None for grey."""
    if np.linalg.norm(ink - ink.mean()) < LEAST_CHROMA * np.linalg.norm(ink):
        return None
    return max(COLOURS, key=lambda name: float(_hue(np.array(COLOURS[name])) @ _hue(ink)))


def _hue(colour: np.ndarray) -> np.ndarray:
    """(3,): unit vector from grey towards a colour (3,)."""
    return (colour - colour.mean()) / np.linalg.norm(colour - colour.mean())


def follow(mask: np.ndarray) -> Track:
    """Centre and size of the foreground (T, H, W) in every frame, stray pixels left out."""
    frames, height, width = mask.shape
    ys, xs = np.arange(height, dtype=np.float32) + 0.5, np.arange(width, dtype=np.float32) + 0.5
    kept = mask
    for _ in range(3):
        columns, rows = kept.sum(axis=1), kept.sum(axis=2)
        area = columns.sum(axis=1)
        x, y = columns @ xs / np.maximum(area, 1), rows @ ys / np.maximum(area, 1)
        radius = np.sqrt(area / np.pi)
        across, down = (xs - x[:, None]) ** 2, (ys - y[:, None]) ** 2
        kept = mask & (across[:, None, :] + down[:, :, None] < (REACH * radius[:, None, None]) ** 2)
    return Track(x, y, radius, area > LEAST_AREA * min(height, width) ** 2)


def read_shape(cover: np.ndarray, track: Track) -> str | None:
    """The shape most like the foreground's outline in `cover` (T, H, W), averaged over the frames where it is largest.

    These show most detail and, where a path leaves the frame, are not cut by the border.
    """
    largest = np.argsort(-track.radius, kind="stable")[:OUTLINE_FRAMES]
    frames = largest[track.seen[largest]]
    offsets = np.linspace(-REACH, REACH, GRID) * track.radius[:, None]
    outline = np.mean([_sample(cover[t], track.y[t] + offsets[t], track.x[t] + offsets[t]) for t in frames], axis=0)
    likeness = _templates().reshape(len(SHAPES), -1) @ _standardised(outline).ravel()
    return SHAPES[int(likeness.argmax())] if likeness.max() > LEAST_LIKENESS else None


def _sample(image: np.ndarray, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """(len(y), len(x)): an image (H, W) at rows y and columns x in pixels, bilinear; 0 outside."""
    padded = np.pad(image, 1)
    y, x = np.clip(y + 0.5, 0, padded.shape[0] - 1.001), np.clip(x + 0.5, 0, padded.shape[1] - 1.001)
    row, column = y.astype(int), x.astype(int)
    v, u = (y - row)[:, None], x - column
    lines = padded[row] * (1 - v) + padded[row + 1] * v
    return lines[:, column] * (1 - u) + lines[:, column + 1] * u


@lru_cache(maxsize=1)
def _templates() -> np.ndarray:
    """(shapes, GRID, GRID): the outline of each shape as `read_shape` sees it, blurred and standardised."""
    fine = np.linspace(-2, 2, 400)
    offsets = np.linspace(-REACH, REACH, GRID)
    outlines = []
    for shape in SHAPES:
        inside = (signed_distance(shape, fine[None, :], fine[:, None]) < 0).astype(float)
        radius = np.sqrt(inside.mean() * 16 / np.pi)
        middle = inside.sum(axis=1) @ fine / inside.sum()  # from left to right all shapes are symmetric
        lines = np.exp(-0.5 * ((offsets[:, None] + (middle - fine) / radius) / SOFTNESS) ** 2)
        columns = np.exp(-0.5 * ((offsets[:, None] - fine / radius) / SOFTNESS) ** 2)
        outlines.append(_standardised(lines @ inside @ columns.T))
    return np.stack(outlines)


def _standardised(image: np.ndarray) -> np.ndarray:
    """Shifts and scales an image to mean 0 and length 1, so that the product of two images is their correlation."""
    image = image - image.mean()
    return image / max(np.linalg.norm(image), 1e-6)


def read_motion(track: Track, fps: float, height: int, width: int) -> str | None:
    """The motion with a path nearest to the foreground's, wherever in the frame.

    None if the foreground is seen in fewer than 3 frames or too small a share of them, or no path is near.
    """
    seen = track.seen
    if seen.sum() < 3 or seen.mean() < LEAST_SEEN:
        return None
    side = min(height, width)
    size = RADIUS_WEIGHT * np.log(track.radius[seen] / side)
    path = np.stack([track.x[seen] / side, track.y[seen] / side, size])
    apart = _paths(len(seen), fps, height / side, width / side)[..., seen] - path
    apart -= np.median(apart, axis=-1, keepdims=True)
    misses = np.minimum((apart**2).sum(axis=2), FAR**2).mean(axis=-1).min(axis=1)
    return MOTIONS[int(misses.argmin())] if misses.min() < GREATEST_MISS**2 else None


@lru_cache(maxsize=16)
def _paths(frames: int, fps: float, height: float, width: float) -> np.ndarray:
    """(motions, PATHS, 3, T): x, y and weighted log radius of paths that the data set could draw."""
    seconds = np.arange(frames) / fps
    rng = np.random.default_rng(0)
    drawn = np.array([
        [trajectory(motion, seconds, rng.uniform(0.17, 0.22), height, width, rng) for _ in range(PATHS)]
        for motion in MOTIONS
    ])  # fmt: skip
    drawn[:, :, 2] = RADIUS_WEIGHT * np.log(drawn[:, :, 2])
    return drawn
