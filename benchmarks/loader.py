"""Measures how fast clips are loaded from a folder of videos, beside the decoder alone, and whether memory stays constant.

    python benchmarks/loader.py DIR [frames=17] [height=128] [width=128] [clips=400] [long=10000]
                                    [workers=0,1,2,4] [long_workers=4]

Prints a JSON line for each: clips/s of the decoder alone (decord, the same frames, neither resized nor checked), of the data
set with and without a decoder process of its own, and of the loader with each number of workers; then the memory of the
loader's processes (PSS: a shared page counts in part for each) over many clips.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from pathlib import Path

from torch.utils.data import DataLoader

from kit.data import decode
from kit.data.batches import StreamSampler
from kit.data.clips import FolderClips
from kit.data.frames import frame_numbers
from kit.data.numbered import Numbered
from runs import parted


def alone(source: FolderClips, clips: int) -> float:
    """Returns clips/s of the decoder alone."""
    began = time.perf_counter()
    for n in range(clips):
        video = decode.open_video(source.root / source.file(n), "decord")
        numbers = frame_numbers(len(video), video.fps, source.frames, source.fps, 0.5)
        video.frames(numbers.clip(max=len(video) - 1))
    return clips / (time.perf_counter() - began)


def of_items(source: FolderClips, clips: int) -> float:
    source[0]
    began = time.perf_counter()
    for n in range(clips):
        source[n]
    return clips / (time.perf_counter() - began)


def loader_of(source: FolderClips, workers: int, batch_size: int = 8) -> DataLoader:
    stream = StreamSampler(batch_size, 0, 0, 1, source.frames)
    return DataLoader(Numbered(source), num_workers=workers, batch_sampler=stream)


def of_loader(source: FolderClips, clips: int, workers: int, look=lambda done: None) -> float:
    batches = iter(loader_of(source, workers))
    done = len(next(batches)["n"])
    began, first = time.perf_counter(), done
    while done < clips:
        done += len(next(batches)["n"])
        look(done)
    return (done - first) / (time.perf_counter() - began)


def memory() -> float:
    """Returns the memory of this process and all its descendants, in MiB."""
    total, waiting = 0, [os.getpid()]
    while waiting:
        pid = waiting.pop()
        try:
            rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
            waiting += map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
        except OSError:  # it has just ended
            continue
        total += sum(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:"))
    return total / 1024


def main(root: str, *words: str):
    own, _ = parted(words, "frames", "height", "width", "clips", "long", "workers", "long_workers")
    frames, height, width = (int(own.get(k, v)) for k, v in (("frames", 17), ("height", 128), ("width", 128)))
    clips, long, many = int(own.get("clips", 400)), int(own.get("long", 10000)), int(own.get("long_workers", 4))

    def source(**how) -> FolderClips:
        return FolderClips(root, "train", frames, height, width, **how)

    def tell(**row):
        print(json.dumps(row), flush=True)

    rates = {"decoder alone": [], "data set, in this process": [], "data set, with a process of its own": []}
    for _ in range(3):  # in turns: the machine's speed changes
        rates["decoder alone"].append(alone(source(), clips))
        rates["data set, in this process"].append(of_items(source(patience=None), clips))
        rates["data set, with a process of its own"].append(of_items(source(), clips))
    for what, found in rates.items():
        tell(what=what, clips_per_s=round(statistics.median(found), 1))
    for workers in map(int, own.get("workers", "0,1,2,4").split(",")):
        tell(what="loader", workers=workers, clips_per_s=round(of_loader(source(), clips, workers), 1))

    seen: list[tuple[int, float]] = []

    def look(done: int):
        if done >= (len(seen) + 1) * long // 10:
            seen.append((done, round(memory(), 1)))

    rate = of_loader(source(), long, many, look)
    tell(what="memory", workers=many, clips_per_s=round(rate, 1), mib_after_clips=seen)


if __name__ == "__main__":
    main(*sys.argv[1:])
