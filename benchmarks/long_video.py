"""Measures time per latent frame and peak memory of `generate frames=N`, for untrained models of `size=tiny` and one video.

    python benchmarks/long_video.py [key=value ...]     such as size=small or guidance.kind=rising

Prints one JSON line for 5, 50 and 500 latent frames, each measured in a process of its own: neither may grow with the length.
Frames are sampled, decoded and written to an mp4, as the command does. A later window re-encodes the frames that it begins
with, so the time per latent frame is the time of a window divided by the latent frames that it adds. A single video is
computed as a batch of two, as the command does (see `stream_samples`).
"""

from __future__ import annotations

import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from streaming import megabytes

from kit.checkpoint import Loaded
from kit.generator.sampler import Sampling
from kit.generator.transformer import Generator
from kit.media import video_writer
from kit.planning.plan import generator_config
from kit.sampling import stream_samples
from kit.scales import latent_frames, pixel_frames
from kit.tokenizer import Tokenizer, TokenizerConfig
from kit.values import plain
from runs import composed, machine_facts

LENGTHS = (5, 50, 500)  # latent frames
COUNTED = 20  # number of windows over which the early and the late time are medians


def fresh_pair(words: list[str]) -> tuple[Loaded, Loaded, Sampling, str]:
    """Builds an untrained generator and tokenizer from a config, and reads how to sample."""
    of_model = [word for word in words if word.split("=")[0] in ("size", "history", "window")]
    cfg = composed("stage2_generator", ["size=tiny", *of_model])
    how = composed("generate", [word for word in words if word not in of_model])
    values = TokenizerConfig(**plain(cfg.tokenizer))
    config = generator_config(cfg, values)
    clip = {key: cfg.data[key] for key in ("frames", "height", "width", "fps")}
    models = (Generator(config).eval().requires_grad_(False), Tokenizer(values).eval().requires_grad_(False))
    return *(Loaded(model, clip, Path("fresh"), 0, "") for model in models), Sampling.of(plain(how)), how.precision


def measure(latents: int, words: list[str]) -> dict:
    generator, tokenizer, how, precision = fresh_pair(words)
    clip, before = generator.clip, megabytes("VmRSS")
    longest, overlap = how.window(clip["frames"], pixel_frames(latents))
    added = latent_frames(longest) - latent_frames(overlap)  # latent frames that a later window adds
    size, seconds, begin = (pixel_frames(latents), clip["height"], clip["width"]), [], time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, video_writer(Path(folder) / "long.mp4", clip["fps"], *size[1:]) as add:
        for piece in stream_samples(generator, tokenizer, ["a red ball moving right"], [0], size, how, precision):
            add(piece[0])
            now = time.perf_counter()
            seconds.append(now - begin)
            begin = now
    later = seconds[latent_frames(longest) :]
    windows = [sum(later[n : n + added]) / added for n in range(0, len(later) // added * added, added)]
    found = {
        "latent_frames": latents, "seconds_of_video": round(size[0] / clip["fps"], 1), "peak_mb": megabytes("VmHWM"),
        "memory_before_mb": before, "words": words, "threads": torch.get_num_threads(), **machine_facts(),
    }  # fmt: skip
    if windows:
        early, late = windows[2 : 2 + COUNTED], windows[-COUNTED:]  # from about the tenth latent frame on
        found["ms_per_latent_frame"] = round(1000 * statistics.median(windows), 1)
        found["last_over_tenth"] = round(statistics.median(late) / statistics.median(early), 3)
    return found


def main(*words: str):
    for latents in LENGTHS:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            print(json.dumps(pool.apply(measure, (latents, list(words)))), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
