"""Measures what a folder of many files costs before and during a training: time at its start, and memory.

    python benchmarks/many_files.py [files=1000000] [stages=1]

Makes so many empty files with captions of 20 words in a temporary folder, opens both splits of each stage as a training
does, and prints a JSON line: seconds until they are open, seconds for the hashes by which a checkpoint knows them, memory
(MB, beyond what the process has before) that stays after that, and that a forked process, as a loader's, comes to have of
its own once it has looked up every file and its caption.
"""

from __future__ import annotations

import functools
import json
import os
import random
import re
import sys
import tempfile
import time
from pathlib import Path

from kit.data.clips import FolderClips
from kit.data.datamodule import ClipDataModule
from kit.data.shared import read_once
from runs import machine_facts, parted

WORDS = "a man woman dog cat runs walks through the city forest at night slowly while camera follows sun over river".split()


def memory(kind: str) -> float:
    """Memory of this process in MB; `kind` as in smaps_rollup."""
    return int(re.search(rf"{kind}:\s+(\d+)", Path("/proc/self/smaps_rollup").read_text())[1]) * 1024 / 1e6


def make(folder: Path, files: int):
    draw = random.Random(0)
    with open(folder / "captions.csv", "w") as captions:
        captions.write("file,caption\n")
        for n in range(files):
            name = f"part{n // 1000:05d}/clip_{n:08d}_scene.mp4"
            if n % 1000 == 0:
                (folder / name).parent.mkdir()
            os.close(os.open(folder / name, os.O_CREAT))
            captions.write(f"{name},{' '.join(draw.choices(WORDS, k=20))}\n")


def own_after_an_epoch(source: FolderClips) -> float:
    """Returns the memory that a forked process comes to have of its own."""
    reader, writer = os.pipe()
    if not (child := os.fork()):
        try:
            before = memory("Private_Dirty")
            for n in range(len(source.files)):
                source.words(source.file(n))
            os.write(writer, str(memory("Private_Dirty") - before).encode())
        finally:
            os._exit(0)
    os.close(writer), os.waitpid(child, 0)
    with open(reader) as told:
        return float(told.read())


def main(*words: str):
    own, _ = parted(words, "files", "stages")
    files, stages = int(own.get("files", 1_000_000)), int(own.get("stages", 1))
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder), files)
        before, began = memory("Rss"), time.perf_counter()
        source = functools.partial(FolderClips, folder, backend="pyav")
        shape = dict(frames=17, height=64, width=64, fps=12, batch_size=8, val_clips=1, workers=0)
        with read_once():
            parts = [ClipDataModule(source, **shape) for _ in range(stages)]
        opened = time.perf_counter() - began
        for part in parts:
            part.settings  # noqa: B018
        hashed = time.perf_counter() - began - opened
        held, worker = memory("Rss") - before, own_after_an_epoch(parts[0].train)
    row = dict(files=files, stages=stages, open_s=opened, hashes_s=hashed, held_mb=held, worker_mb=worker)
    print(json.dumps({key: round(value, 1) for key, value in row.items()} | machine_facts()))


if __name__ == "__main__":
    main(*sys.argv[1:])
