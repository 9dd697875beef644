"""Clips of a source as batches have them."""

from __future__ import annotations

from torch.utils.data import Dataset

from kit.data.mixture import label_among
from kit.pixels import check_pixels
from kit.scales import latent_frames


class Numbered(Dataset):
    """Clips of a source by (number, frames): so many of their first frames, and the number as `n`. Single frames are of
    `images`, where there are any; of their classes those count that clips have too.

    `given` of an item, where its source does not say, is 0: how many of its first latent frames are not to be predicted."""

    def __init__(self, source: Dataset, images: Dataset | None = None):
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
                raise ValueError(f"clip {n} of the data: {error}") from error
        for name, used in (("video", frames), ("feature", latent_frames(frames))):
            if name in item:
                item[name] = item[name][:, :used]
        return item
