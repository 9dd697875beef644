"""Measures attention in training on a CPU: the plain formula against the fused kernel at the shapes of the `tiny` generator,
and all tokens at once against frame by frame for sequences of growing length.

python benchmarks/attention.py     JSON lines, in milliseconds: medians for attention alone, minima for training steps
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path

import torch
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from kit.generator import mask  # noqa: E402
from kit.generator.transformer import Generator, GeneratorConfig, attend  # noqa: E402
from kit.machine import keep_freed_memory  # noqa: E402
from kit.scales import ScaleSchedule  # noqa: E402
from runs import machine_facts  # noqa: E402


def milliseconds(attention, shape: tuple[int, ...], repeats: int = 20) -> float:
    """Returns the median milliseconds of a forward and backward pass in bfloat16; shape: (B, N, tokens, head_dim)."""
    q, k, v = (torch.randn(shape, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    mask = torch.ones(shape[2], shape[2], dtype=torch.bool).tril().expand(shape[0], 1, -1, -1).contiguous()
    seconds = []
    for _ in range(repeats + 3):
        begin = time.perf_counter()
        attention(q, k, v, mask).sum().backward()
        seconds.append(time.perf_counter() - begin)
    return round(1000 * statistics.median(seconds[3:]), 2)


def steps(frames: int, grid: int, batch: int, repeats: int = 5) -> dict:
    """Times forward and backward passes of a generator with `tiny`'s layers, for scales of side 1, 2, 4, ... up to `grid`."""
    torch.manual_seed(0)
    sides = [side for side in (1, 2, 4, 8, 16) if side <= grid]
    schedule = ScaleSchedule(frames, tuple((side, side) for side in sides))
    model = Generator(GeneratorConfig(layers=4, width=192, heads=3, bits=16, scales=len(sides)))
    inputs, kept = torch.randn(batch, schedule.length, 16), torch.rand(batch, frames) > 0.1
    seconds = {"whole": [], "by_frame": []}
    for _ in range(repeats):  # in turns: the machine's speed changes
        for way, found in seconds.items():
            mask.SHORT = schedule.length + 1000 if way == "whole" else 0
            begin = time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16):
                model(inputs, schedule, model.condition(["a red ball"] * batch), kept).square().sum().backward()
            found.append(time.perf_counter() - begin)
    return {"tokens": schedule.length, "batch": batch, **{f"{way}_ms": round(1000 * min(s)) for way, s in seconds.items()}}


if __name__ == "__main__":
    keep_freed_memory()
    shape = (8, 3, 441, 64)
    result = {
        "shape": shape, "plain_ms": milliseconds(attend, shape),
        "fused_ms": milliseconds(lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, attn_mask=m), shape),
        "threads": torch.get_num_threads(), **machine_facts(),
    }  # fmt: skip
    print(json.dumps(result), flush=True)
    for sequence in ((5, 8, 8), (9, 8, 4), (17, 8, 2), (5, 16, 2), (9, 16, 1), (17, 16, 1)):
        print(json.dumps(steps(*sequence)), flush=True)
