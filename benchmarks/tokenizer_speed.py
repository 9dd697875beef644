"""Measures a tokenizer's speed at 17 x 128 x 128, batch 1: frames/s, FLOP/s, and share of this machine's convolution rate.

    python benchmarks/tokenizer_speed.py [size=small rate=4x8x8 ...]     two JSON lines, float32 and bfloat16

Random weights, one thread. Seconds are CPU seconds of the process, the minimum of several runs; GFLOP are counted by torch.
The convolution rate is that of a 3 x 3 convolution of 128 channels on 5 frames of 32 x 32; products of 2048 x 2048 matrices
serve to compare machines. `forward_backward` is encoder, pyramid and decoder under the squared error; `step` a training step
of the given words: all losses, the discriminators' turn if there are any, and the optimizers, without clipping and moving
average. With `recompute=true` their GFLOP contain the blocks' second forward pass.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable

import torch
from torch.nn import functional as F

from kit.build import tokenizer_module
from kit.machine import keep_freed_memory
from kit.planning.costs import Operations
from kit.planning.memory import Pretence, stepper
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


def gflop(work: Callable) -> float:
    """Counts the GFLOP of a call."""
    with Operations() as counted:
        work()
    return counted.total / 1e9


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
    cfg = composed("stage1_tokenizer", list(words))
    clip = {"frames": FRAMES, "height": SIDE, "width": SIDE, "fps": cfg.data.fps}
    video = torch.rand(1, 3, FRAMES, SIDE, SIDE) * 2 - 1
    for dtype in (torch.float32, torch.bfloat16):
        bfloat16 = dtype == torch.bfloat16
        torch.manual_seed(0)
        module = tokenizer_module(cfg, clip)
        model, take_step = module.model, stepper(module, Pretence(video.device), bfloat16)

        def forward_backward(model=model):
            with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
                loss = (model(video)[0] - video).square().mean()
            loss.backward()

        def step(take_step=take_step):
            take_step(lambda _: {"video": video, "n": range(1)}, 1)

        measured = rates(dtype)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            feature = model.encode(video)
            work = gflop(lambda: model.decode(model.encode(video)))
            encode, decode = seconds(lambda: model.encode(video), 5), seconds(lambda: model.decode(feature), 5)
        values = {
            "encode_fps": FRAMES / encode, "decode_fps": FRAMES / decode, "both_fps": FRAMES / (encode + decode),
            "parameters_M": sum(p.numel() for p in model.parameters()) / 1e6, "gflop": work, **measured,
            "share_of_convolution": work / (encode + decode) / measured["convolution_gflops"],
        }  # fmt: skip
        for name, training in (("forward_backward", forward_backward), ("step", step)):
            work, spent = gflop(training), seconds(training, 3)
            values |= {f"{name}_s": spent, f"{name}_gflop": work}
            values[f"{name}_share_of_convolution"] = work / spent / measured["convolution_gflops"]
        values["peak_MB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        about = {"words": words, "schedule": str(module.schedule), "dtype": str(dtype).removeprefix("torch."), "threads": 1}
        rounded = {name: float(f"{value:.3g}") for name, value in values.items()}
        print(json.dumps({**about, **rounded, **machine_facts()}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
