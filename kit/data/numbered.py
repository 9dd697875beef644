"""Clips of a source by number and length, as samplers ask for them."""

from __future__ import annotations

from torch.utils.data import Dataset

from kit.data.mixture import label_among
from kit.data.source import ClipSource
from kit.pixels import check_pixels
from kit.scales import latent_frames


class Numbered(Dataset):
    """Data set of the clips of a source by (number, frames): the first `frames` frames of a clip, and its number as `n`.

    Single frames are taken from `images`, if given; their labels count if clips have the same class, else they are -1.
    `given` of an item is the number of its first latent frames that are not to be predicted, 0 if the source does not say.
    """

    def __init__(self, source: ClipSource, images: ClipSource | None = None):
        self.source, self.images = source, images

    def __getitem__(self, key: tuple[int, int]) -> dict:
        n, frames = key
        if frames == 1 and self.images is not None:
            item = {"given": 0, **self.images[n], "n": n}
            item["label"] = label_among(self.source.classes, self.images.classes, item["label"])
        else:
            item = {"given": 0, **self.source[n], "n": n}
        if "video" in item:
            try:
                check_pixels(item["video"][None])
            except ValueError as error:
                if item["video"].isfinite().all():  # else its loss is lost, and `retries` leaves out the batch alone
                    raise ValueError(f"clip {n} of the data: {error}") from error
        for name, used in (("video", frames), ("feature", latent_frames(frames))):
            if name in item:
                item[name] = item[name][:, :used]
        return item
