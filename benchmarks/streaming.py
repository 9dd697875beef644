"""Measures peak memory and speed of `reconstruct video=FILE`, with an untrained tokenizer of `size=small`.

    python benchmarks/streaming.py

Prints one JSON line for each video of moving texture, each measured in a process of its own: memory must not grow with the
length. All scales are decoded and scored, and the mp4 is written, as the command does. Peak memory is that of the
process; `memory_before_mb` is what it took with only the libraries and the tokenizer loaded.
"""

from __future__ import annotations

import json
import multiprocessing
import re
import sys
import tempfile
import time
from contextlib import redirect_stdout
from pathlib import Path

import torch

from kit.checkpoint import Loaded
from kit.machine import fast_bfloat16
from kit.media import video_writer
from kit.tokenizer import Tokenizer, TokenizerConfig
from kit.values import plain
from kit.verbs.reconstruct import reconstruct_file
from runs import composed, machine_facts

VIDEOS = ((17, 128, 128), (170, 128, 128), (1700, 128, 128), (17, 1080, 1920), (170, 1080, 1920))


def make_video(path: Path, frames: int, height: int, width: int):
    """Writes a video of a texture that moves by 3 rows and 5 columns a frame."""
    coarse = torch.rand(1, 3, height // 8, width // 8, generator=torch.Generator().manual_seed(0))
    texture = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic")[0].clamp(0, 1)[:, None] * 2 - 1
    with video_writer(path, 24, height, width) as add:
        for n in range(frames):
            add(texture.roll((3 * n, 5 * n), (2, 3)))


def fresh_tokenizer() -> Loaded:
    config = TokenizerConfig(**plain(composed("stage1_tokenizer", ["size=small"]).tokenizer))
    return Loaded(Tokenizer(config).eval().requires_grad_(False), {"fps": 0}, Path("fresh"), 0, "")


def megabytes(what: str) -> int:
    """Returns `VmRSS`, or the peak `VmHWM`, of this process in MiB; getrusage would include the parent's memory."""
    return int(re.search(rf"{what}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) // 1024


def measure(path: Path, frames: int, height: int, width: int) -> dict:
    tokenizer, before, begin = fresh_tokenizer(), megabytes("VmRSS"), time.perf_counter()
    with redirect_stdout(sys.stderr):
        reconstruct_file(tokenizer, path, None, path.parent)
    seconds = time.perf_counter() - begin
    return {
        "frames": frames, "height": height, "width": width, "peak_memory_mb": megabytes("VmHWM"),
        "memory_before_mb": before, "seconds": round(seconds, 1), "frames_per_second": round(frames / seconds, 1),
        "bfloat16": fast_bfloat16(), "threads": torch.get_num_threads(), **machine_facts(),
    }  # fmt: skip


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder, multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for shape in VIDEOS:
            file = Path(folder) / "video.mp4"
            pool.apply(make_video, (file, *shape))
            print(json.dumps(pool.apply(measure, (file, *shape))), flush=True)
