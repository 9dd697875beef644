"""Clips of a source by number and length, as samplers ask for them."""

from __future__ import annotations

import math
import operator

import torch
from torch.utils.data import Dataset

from kit.data.mixture import relabelled
from kit.data.source import ClipSource
from kit.pixels import check_pixels
from kit.scales import latent_frames


class Numbered(Dataset):
    """Data set of the clips of a source by (number, frames): the first `frames` frames of a clip, and its number as `n`.

    Single frames are taken from `images`, if given; their labels count if clips have the same class, else they are -1.
    `given` of an item is the number of its first latent frames that are not to be predicted, 0 if the source does not say.

    Args:
        size: height and width of the videos; None: any, as in buckets.
    """

    def __init__(self, source: ClipSource, images: ClipSource | None = None, size: tuple[int, int] | None = None):
        self.source, self.images, self.size = source, images, size

    def __getitem__(self, key: tuple[int, int]) -> dict:
        n, frames = key
        if frames == 1 and self.images is not None:
            item = relabelled({"given": 0, **self.images[n], "n": n}, self.images.classes, self.source.classes)
        else:
            item = {"given": 0, **self.source.beginning(n, frames), "n": n}
        try:
            check_item(item, frames, self.size, len(self.source.classes))
        except ValueError as error:
            raise ValueError(f"clip {n} of the data: {error}") from error
        for name, used in (("video", frames), ("feature", latent_frames(frames))):
            if name in item:
                item[name] = item[name][:, :used]
        return item


def check_item(item: dict, frames: int, size: tuple[int, int] | None, classes: int):
    """Checks an item of a source, which may be a user's own: its parts, and shape, type and range of its pixels.

    Pixels that are no numbers pass: their loss is lost, and `retries` leaves out the batch alone.

    Args:
        frames: least number of its frames. size: height and width; None: any. classes: how many there are; 0: none.
    Raises:
        ValueError: if something is amiss.
    """
    if missing := [key for key in ("caption", "label") if key not in item]:
        raise ValueError(f"it has no {' and no '.join(missing)}; expected video, caption ('' for none), label (-1 for none)")
    if not isinstance(item["caption"], str):
        raise ValueError(f"its caption is {item['caption']!r}; expected text, '' for none")
    try:
        known = operator.index(item["label"]) < (classes or math.inf)
    except TypeError:
        known = False
    if not known:
        raise ValueError(f"its label is {item['label']!r}; expected its place in `classes` of the data set, or -1")
    if (video := item.get("video")) is None:
        return
    if not isinstance(video, torch.Tensor):
        raise ValueError(f"its video is {type(video).__name__}; expected a tensor (3, T, H, W) in [-1, 1]")
    try:
        check_pixels(video[None])
    except ValueError:
        if video.ndim != 4 or video.isfinite().all():
            raise
    if video.dtype != torch.float32:
        raise ValueError(f"its video is {video.dtype}, expected torch.float32; .float() makes it that")
    _, found, *sides = video.shape
    if found < frames or size not in (None, tuple(sides)):
        height, width = size or sides
        raise ValueError(f"it has {found} x {sides[0]} x {sides[1]} pixels, expected {frames} x {height} x {width}")
