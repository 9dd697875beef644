"""Videos whose frames tell their numbers by their brightness."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import torch

COUNT = 60
STEP = 4  # of brightness from frame to frame


def write(path: Path, count: int = COUNT, rate: int = 24, height: int = 32, width: int = 40, tint: int = 0) -> Path:
    """Writes a video whose frame i has brightness STEP * i; `tint` adds to blue in its upper left corner."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate, options={"crf": "4"})
        stream.height, stream.width, stream.pix_fmt, stream.gop_size = height, width, "yuv420p", 12
        for i in range(count):
            image = np.full((height, width, 3), STEP * i, np.uint8)
            image[: height // 2, : width // 2, 2] = np.clip(STEP * i + tint, 0, 255)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, "rgb24")))
        container.mux(stream.encode())
    return path


def write_bad(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("not a video")
    return path


def shown(item: dict) -> list[int]:
    """Returns the numbers of the file's frames that an item shows."""
    return torch.round((item["video"][0].mean(dim=(1, 2)) + 1) * 127.5 / STEP).int().tolist()


def same(a: dict, b: dict) -> bool:
    return torch.equal(a["video"], b["video"]) and (a["caption"], a["label"]) == (b["caption"], b["label"])
