"""The held-out clips that a trained model is looked at with."""

from __future__ import annotations

from omegaconf import DictConfig
from torch.utils.data import default_collate

from kit.build import build_data
from kit.checkpoint import Loaded
from kit.data.datamodule import ClipDataModule, check_videos
from kit.values import check_whole_number

TRAINED_ON = "give the data it was trained on, such as data=clips data.root=DIR"  # the way out if the data does not suit


def data_for(cfg: DictConfig, *models: Loaded, frames: int | None = None) -> ClipDataModule:
    """Builds the data of `cfg` with clips of the shape that a model was trained on, and prints a description of it, and which
    models had other clips held out of their training.

    Args:
        models: the first one's clips have that shape.
        frames: T of the clips; None: as in training.
    Raises:
        ValueError: if `shown`, `clips` or `batch_size` is below 1; else as `build_data`.
    """
    for key in ("shown", "clips", "batch_size"):
        check_whole_number(key, cfg[key], 1)
    clip = {**models[0].clip, "frames": frames or models[0].clip["frames"]}
    cfg = cfg.copy()
    cfg.data.update({**clip, "batch_size": cfg.batch_size, "val_clips": cfg.clips, "workers": 0})
    if cfg.data.get("buckets"):  # those of the training; held-out clips have one shape
        cfg.data.buckets = []
    data = build_data(cfg)
    print("clips of {frames} x {height} x {width} at {fps:g} fps, held out of".format(**clip), data.about)
    for model in models:
        if model.held_out not in (None, data.settings["held_out"]):
            print(
                f"  other clips than were held out of the {model.kind}'s training, some of which it may have learned: to "
                f"score those, give the training's words for data, data.root and data.source.val_every"
            )
    return data


def held_out(data: ClipDataModule) -> dict:
    """Returns the held-out clips as one batch: of readable files each once, since their clips repeat.

    Raises:
        as `check_videos`; ValueError if none of the files can be read.
    """
    check_videos(data)

    numbers = [n for n in range(data.val_clips) if data.val.distinct(n)]
    if len(numbers) < data.val_clips:
        print(f"  clips={data.val_clips}, but {len(numbers)} held out: each is taken once")
    clips = [(n, data.held_out[n, data.frames]) for n in numbers]
    clips = [clip for n, clip in clips if data.val.distinct(n)]  # not those whose file has turned out to be unreadable
    if len(clips) < len(numbers):
        print(f"  {len(numbers) - len(clips)} of {len(numbers)} cannot be read and are left out")
    if not clips:
        raise ValueError(f"clips={data.val_clips}: none of them can be read; give more, or mend the files")
    return default_collate(clips)
