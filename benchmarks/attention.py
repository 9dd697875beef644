"""Forward and backward of attention at the shapes of the `tiny` generator: the plain formula against the fused kernel.

python benchmarks/attention.py     one JSON line, medians in milliseconds
"""

from __future__ import annotations

import json
import platform
import statistics
import sys
import time
from pathlib import Path

import torch
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from kit.generator.transformer import attend  # noqa: E402
from kit.machine import keep_freed_memory  # noqa: E402


def milliseconds(attention, shape: tuple[int, ...], repeats: int = 20) -> float:
    """Median over `repeats` of one forward and backward pass in bfloat16; shape: (B, N, tokens, head_dim)."""
    q, k, v = (torch.randn(shape, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    mask = torch.ones(shape[2], shape[2], dtype=torch.bool).tril().expand(shape[0], 1, -1, -1).contiguous()
    seconds = []
    for _ in range(repeats + 3):
        begin = time.perf_counter()
        attention(q, k, v, mask).sum().backward()
        seconds.append(time.perf_counter() - begin)
    return round(1000 * statistics.median(seconds[3:]), 2)


if __name__ == "__main__":
    keep_freed_memory()
    shape = (8, 3, 441, 64)
    result = {
        "shape": shape, "plain_ms": milliseconds(attend, shape),
        "fused_ms": milliseconds(lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, attn_mask=m), shape),
        "threads": torch.get_num_threads(), "torch": torch.__version__, "machine": platform.machine(),
    }  # fmt: skip
    print(json.dumps(result))
