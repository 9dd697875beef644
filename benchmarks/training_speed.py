"""Measures training steps per second of `fit`, with data, losses, optimizer, averages and logs, without validation and saves.

    python benchmarks/training_speed.py steps=N CONF [key=value ...] [-- CONF [key=value ...]] ...

One device, clips of one shape and no images. Prints one JSON line for each training of N steps: the median rate of the later
half, memory, and the model's operations per second (`kit.planning.costs`) as a share of a GPU's peak.
"""

from __future__ import annotations

import itertools
import json
import platform
import statistics
import sys
import time

import lightning as L
import torch
from omegaconf import DictConfig, OmegaConf

from kit.build import accumulate_of
from kit.planning.costs import generator_cost, tokenizer_cost
from kit.planning.plan import clip_of, generator_config, tokenizer_on_paper
from kit.tokenizer import TokenizerConfig
from kit.verbs.fit import fit
from runs import composed

QUIET = (
    "overwrite=true", "+trainer.limit_val_batches=0", "logger=csv", "callbacks.checkpoint=null", "callbacks.last=null",
    "callbacks.video_logger=null", "+callbacks.stopwatch._target_=__main__.Stopwatch", "+trainer.enable_progress_bar=false",
    "callbacks.progress=null", "retries=0",
)  # fmt: skip
BEST = 989e12  # floating point operations a second of an H100 or H200 in bfloat16


class Stopwatch(L.Callback):
    """Records when training steps end, every `every` steps; only then it waits for the device.

    Attributes:
        ends: (step, seconds) pairs.
    """

    every = 10

    def __init__(self):
        self.ends = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        done = trainer.global_step
        if done and done % self.every == 0 and (not self.ends or self.ends[-1][0] != done):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.ends.append((done, time.monotonic()))

    def seconds(self) -> float:
        """Returns the seconds of a step, the median of the later half."""
        spans = [(b - a) / self.every for (_, a), (_, b) in itertools.pairwise(self.ends)]
        return statistics.median(spans[len(spans) // 2 :])


def clip_flops(cfg: DictConfig) -> float:
    """Returns the floating point operations of a clip in a training step."""
    if cfg.module == "tokenizer":
        late = range(cfg.trainer.max_steps)[-1:]  # with an adversarial loss, if there is one
        return tokenizer_cost(lambda: tokenizer_on_paper(cfg, clip_of(cfg.data)), late).flops
    tokenizer, size = (
        TokenizerConfig(**OmegaConf.to_container(cfg.tokenizer)),
        (cfg.data.frames, cfg.data.height, cfg.data.width),
    )
    generator = generator_config(cfg, tokenizer)
    return generator_cost(generator, tokenizer, *size, encoded=bool(cfg.encoded_clips), recompute=cfg.recompute).flops


def main(steps: str, *words: str):
    count = int(steps.removeprefix("steps="))
    if count < 2 * Stopwatch.every:
        raise SystemExit(f"steps={count}; expected {2 * Stopwatch.every} or more")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    for alone, group in itertools.groupby(words, lambda word: word == "--"):
        if alone:
            continue
        conf, *rest = group
        cfg = composed(conf, [*rest, *QUIET, f"trainer.max_steps={count}"])
        begin = time.monotonic()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        trainer = fit(cfg)
        watch = next(callback for callback in trainer.callbacks if isinstance(callback, Stopwatch))
        seconds, clips = watch.seconds(), cfg.data.batch_size * accumulate_of(cfg)
        flops = clip_flops(cfg) * clips
        found = {
            "steps_per_s": 1 / seconds, "clips_per_s": clips / seconds, "tflops": flops / seconds / 1e12,
            "share": flops / seconds / BEST, "first_s": watch.ends[0][1] - begin,
        }  # fmt: skip
        if torch.cuda.is_available():
            found |= {"peak_gb": torch.cuda.max_memory_allocated() / 1e9}
        about = {"conf": conf, "words": rest, "clips": clips, "precision": cfg.trainer.precision, "device": device}
        rounded = {key: float(f"{x:.3g}") for key, x in found.items()}
        print(json.dumps({**about, **rounded, "torch": torch.__version__}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
