"""Measures time per clip and peak memory of `kit evaluate` on 100 and 500 clips of 16 x 128 x 128: memory must not grow.

    python benchmarks/evaluation.py REAL_DIR TOKENIZER.ckpt [key=value ...]

One JSON line for each number of clips. The real clips' statistics are computed anew each time.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from runs import machine_facts

CLIPS = (100, 500)


def measure(clips: int, real: str, ckpt: str, overrides: list[str]) -> dict:
    words = [f"real={real}", f"ckpt={ckpt}", f"protocol.real.clips={clips}", "protocol.real.start=random", *overrides]
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "KIT_CACHE": f"{folder}/cache"}
        begin = time.perf_counter()
        command = [sys.executable, "-m", "kit", "evaluate", "protocol=folder", f"root={folder}", *words]
        process = subprocess.Popen(command, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            sys.exit(f"kit evaluate failed with status {status}")
        result = json.loads(next(Path(folder).glob("*/evaluation.json")).read_text())
        return {
            "clips": clips, "metrics": list(result["metrics"]), "seconds": round(time.perf_counter() - begin, 1),
            "peak_memory_gb": round(usage.ru_maxrss / 2**20, 3), **machine_facts(),
        }  # fmt: skip


if __name__ == "__main__":
    for count in CLIPS:
        print(json.dumps(measure(count, sys.argv[1], sys.argv[2], sys.argv[3:])), flush=True)
