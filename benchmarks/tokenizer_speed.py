"""Measures a tokenizer's speed at 17 x 128 x 128, batch 1: frames/s, FLOP/s, and share of this machine's convolution rate.

    python benchmarks/tokenizer_speed.py [size=small rate=4x8x8 ...]     two JSON lines, float32 and bfloat16

Random weights, one thread. Seconds are CPU seconds of the process, the minimum of several runs. The convolution rate is that
of a 3 x 3 convolution of 128 channels on 5 frames of 32 x 32; products of 2048 x 2048 matrices serve to compare machines.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable

import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from kit.machine import keep_freed_memory
from kit.tokenizer import Tokenizer, TokenizerConfig
from kit.values import plain
from runs import composed, machine_facts

FRAMES, SIDE = 17, 128


def seconds(work: Callable, repeats: int) -> float:
    """Measures the CPU seconds of a call: the minimum of `repeats`, after one to warm up."""
    found = []
    for _ in range(repeats + 1):
        begin = time.process_time()
        work()
        found.append(time.process_time() - begin)
    return min(found[1:])


@torch.no_grad()
def rates(dtype: torch.dtype) -> dict:
    """Measures GFLOP/s of a convolution and of a matrix product."""
    x = torch.randn(5, 128, 32, 32).to(dtype, memory_format=torch.channels_last)
    w = torch.randn(128, 128, 3, 3).to(dtype, memory_format=torch.channels_last)
    a, b = (torch.randn(2048, 2048).to(dtype) for _ in range(2))
    convolution = 2 * 9 * 128 * x.numel() / seconds(lambda: F.conv2d(x, w, padding=1), 10)
    return {"convolution_gflops": convolution / 1e9, "product_gflops": 2 * 2048**3 / seconds(lambda: a @ b, 3) / 1e9}


def main(*words: str):
    torch.set_num_threads(1)
    keep_freed_memory()
    model = Tokenizer(TokenizerConfig(**plain(composed("stage1_tokenizer", list(words)).tokenizer)))
    video = torch.rand(1, 3, FRAMES, SIDE, SIDE) * 2 - 1
    schedule = model.schedule_of(video)
    with torch.no_grad(), FlopCounterMode(display=False) as counted:
        feature = model.encode(video)
        model.decode(feature)

    def train():
        output, _, _ = model(video)
        (output - video).square().mean().backward()

    for dtype in (torch.float32, torch.bfloat16):
        measured = rates(dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            with torch.no_grad():
                encode, decode = seconds(lambda: model.encode(video), 5), seconds(lambda: model.decode(feature), 5)
            step = seconds(train, 3)
        gflop = counted.get_total_flops() / 1e9
        values = {
            "encode_fps": FRAMES / encode, "decode_fps": FRAMES / decode, "both_fps": FRAMES / (encode + decode),
            "forward_backward_s": step, "parameters_M": sum(p.numel() for p in model.parameters()) / 1e6, "gflop": gflop,
            **measured, "share_of_convolution": gflop / (encode + decode) / measured["convolution_gflops"],
            "peak_MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        }  # fmt: skip
        about = {"words": words, "schedule": str(schedule), "dtype": str(dtype).removeprefix("torch."), "threads": 1}
        rounded = {name: float(f"{value:.3g}") for name, value in values.items()}
        print(json.dumps({**about, **rounded, **machine_facts()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
