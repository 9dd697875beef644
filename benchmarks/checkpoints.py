"""Measures memory and time of saving a sharded training: gathered to one file by rank 0, in shards, then consolidated.

    python benchmarks/checkpoints.py FOLDER [size=small] [processes=2]

A generator of that size, sharded (FSDP2), with AdamW's state and a moving average: 16 bytes a weight. The processes run on
one machine over gloo. `mib` is the peak memory of a process during the save, above what it held before; `file_mib` the same
for file pages mapped to it, which matter when consolidating and which the system can take back. Prints one JSON line for
each process and way.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import init_device_mesh

from kit.build import generator_values
from kit.fsdp import ShardedStrategy
from kit.generator.transformer import Generator, GeneratorConfig
from kit.sharded_checkpoint import consolidate
from kit.tokenizer import TokenizerConfig
from kit.training_checkpoint import save_training
from kit.values import plain
from runs import composed, parted


def training(size: str) -> tuple[int, dict]:
    """Returns the number of weights of a generator, and its sharded checkpoint after a step; no process holds all of it."""
    cfg = composed("stage2_generator", [f"size={size}"])
    values = generator_values(cfg, TokenizerConfig(**plain(cfg.tokenizer)), {**plain(cfg.condition), "kind": "text"})
    with torch.device("meta"):
        model = Generator(GeneratorConfig.from_dict({**values, "condition": {**values["condition"], "classes": []}}))
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for unit in (*model.layers, model):
        fully_shard(unit, mesh=mesh)
    model.to_empty(device="cpu")
    optimizer = torch.optim.AdamW(model.parameters())
    for p in model.parameters():
        torch.nn.init.constant_(p, 0.1)
        p.grad = torch.zeros_like(p)
    optimizer.step()
    average = {name: p.detach().clone() for name, p in model.named_parameters()}
    checkpoint = {"state_dict": model.state_dict(), "ema": average, "optimizer_states": [optimizer.state_dict()]}
    return sum(p.numel() for p in model.parameters()), checkpoint


def memory(key: str) -> int:
    """Reads an entry of Linux's /proc/self/status, in bytes."""
    line = next(line for line in open("/proc/self/status") if line.startswith(key))
    return int(line.split()[1]) * 1024


class Most:
    """Peak of this process's own memory, and of files mapped to it, above the start of the block; in bytes, by polling."""

    def __enter__(self):
        self.before, self.own, self.files, self.over = (memory("RssAnon"), memory("RssFile")), 0, 0, threading.Event()
        self.began, self.thread = time.perf_counter(), threading.Thread(target=self.look)
        self.thread.start()
        return self

    def look(self):
        while not self.over.wait(0.005):
            own, files = memory("RssAnon") - self.before[0], memory("RssFile") - self.before[1]
            self.own, self.files = max(self.own, own), max(self.files, files)

    def __exit__(self, *_):
        self.seconds = time.perf_counter() - self.began
        self.over.set()
        self.thread.join()

    def tell(self, **about):
        figures = {"mib": round(self.own / 2**20), "file_mib": round(self.files / 2**20), "seconds": round(self.seconds, 1)}
        print(json.dumps({**about, **figures}), flush=True)


def saves(rank: int, processes: int, size: str, folder: Path):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/met_{os.getppid()}", rank=rank, world_size=processes)
    weights, checkpoint = training(size)
    for way in ("whole", "sharded"):
        strategy = SimpleNamespace(in_shards=way == "sharded", is_global_zero=rank == 0)
        dist.barrier()
        with Most() as most:
            contents = ShardedStrategy.as_saved(strategy, checkpoint)
            if contents:
                save_training(contents, folder / f"{way}.ckpt")
            del contents
            dist.barrier()
        most.tell(way=way, process=rank, weights=weights)
    dist.destroy_process_group()


def main(folder: str, *words: str):
    own, _ = parted(words, "size", "processes")
    processes, path = int(own.get("processes", 2)), Path(folder).resolve()
    path.mkdir(parents=True, exist_ok=True)
    torch.multiprocessing.spawn(saves, (processes, own.get("size", "small"), path), processes)
    with Most() as most:
        consolidate(path / "sharded.ckpt", path / "one.ckpt")
    most.tell(way="consolidate", process=0, bytes=(path / "one.ckpt").stat().st_size)


if __name__ == "__main__":
    main(*sys.argv[1:])
