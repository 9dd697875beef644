"""Compares the estimated memory of a training (`kit.planning.plan.memory_of`) with what it takes on this machine.

    python benchmarks/memory.py CONF [key=value ...]

Trains three steps. On a CPU it measures the process's memory above what it was before the module was built (a training on
small clips warms up libraries first), with an allocator that returns freed memory; on a GPU torch's `max_memory_allocated`.
Prints one JSON line.
"""

from __future__ import annotations

import gc
import json
import os
import sys

if __name__ == "__main__" and "MALLOC_MMAP_THRESHOLD_" not in os.environ:  # read by glibc when a process starts
    os.environ |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
    os.execv(sys.executable, [sys.executable, *sys.argv])

import torch
from omegaconf import DictConfig

from kit.build import BUILDERS, build_data, build_trainer, tokenizer_config
from kit.planning.plan import memory_of, stages_of
from runs import composed, machine_facts

QUIET = (
    "trainer.max_steps=3", "+trainer.limit_val_batches=0", "data.workers=0", "logger=csv",
    "callbacks.checkpoint=null", "callbacks.last=null", "callbacks.video_logger=null", "callbacks.compile=null",
    "callbacks.learning_rate=null",
)  # fmt: skip
SMALL = ("data.height=32", "data.width=32", "data.batch_size=1")


def of_process(key: str) -> int:
    """Reads an entry of Linux's /proc/self/status, in bytes."""
    line = next(line for line in open("/proc/self/status") if line.startswith(key))
    return int(line.split()[1]) * 1024


def train(cfg: DictConfig) -> int:
    """Runs a training and returns its peak memory in bytes."""
    data = build_data(cfg, tokenizer_config(cfg))
    gc.collect()
    before = of_process("VmRSS")
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # resets the peak, VmHWM
    module, trainer = BUILDERS[cfg.module](cfg, data), build_trainer(cfg)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    trainer.fit(module, datamodule=data)
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else of_process("VmHWM") - before


def main(conf: str, *words: str):
    cfg = composed(conf, [*words, *QUIET])
    whole = [word for word in words if not word.startswith("fits=")]  # the small batch is not split
    train(composed(conf, [*whole, *QUIET, *SMALL, f"data.frames={min(5, cfg.data.frames)}"]))
    measured = train(cfg)
    device, data = "cuda" if torch.cuda.is_available() else "cpu", stages_of(cfg)[0][2]
    _, most = memory_of(cfg, data, device, bfloat16="bf16" in cfg.trainer.precision)
    about = {"conf": conf, "words": words, "device": device, "precision": cfg.trainer.precision, "clips": data["batch_size"]}
    figures = {"estimated_gb": most / 1e9, "measured_gb": measured / 1e9, "ratio": most / measured}
    print(json.dumps(about | {key: round(x, 3) for key, x in figures.items()} | machine_facts()), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
