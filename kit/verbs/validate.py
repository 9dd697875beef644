"""The verb `validate`: scores a checkpoint on held-out clips."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig
from torch import Tensor

from kit.checkpoint import Loaded, kind_of, load_generator, load_tokenizer
from kit.data.datamodule import ClipDataModule
from kit.data.shapes import Shapes
from kit.evaluation.shapes_score import MIN_SIDE, caption_accuracy
from kit.files import replacing, sole_user, write_json
from kit.generator.condition import check_classes
from kit.generator.sampler import Sampling
from kit.measures import reconstruct_batches, teacher_forced_metrics
from kit.media import clip_by_clip, contact_sheet, moving_sheet, write_video
from kit.pixels import psnr
from kit.sampling import sample_videos, stream_samples
from kit.sampling_checks import check_none_samples
from kit.values import plain
from kit.verbs.held_out import TRAINED_ON, data_for, held_out
from kit.verbs.request import file_stem


def validate(cfg: DictConfig) -> dict:
    """Scores a checkpoint on held-out clips, and prints the metrics.

    Writes metrics.json, contact_sheet.png and, moving, contact_sheet.webp to the run's folder, for a generator also mp4s in
    `samples`.

    Returns:
        the metrics.
    Raises:
        as `sole_user`, `data_for`, `check_videos` and `check_classes`.
    """
    folder = Path(cfg.folder)
    with sole_user(folder), replacing(folder / "samples", "*_seed*.mp4"):
        alone = kind_of(cfg.ckpt) == "tokenizer"
        metrics = validate_tokenizer(cfg) if alone else validate_generator(cfg)
        write_json(folder / "metrics.json", metrics)
    print(json.dumps(metrics, indent=2))
    print(f"in {folder}: metrics.json, contact_sheet.png and .webp{'' if alone else ', samples'}")
    return metrics


def validate_tokenizer(cfg: DictConfig) -> dict:
    check_none_samples(cfg, "a tokenizer")
    tokenizer = load_tokenizer(cfg.ckpt)
    data = data_for(cfg, tokenizer)
    batch = held_out(data)
    video = batch["video"]
    output = reconstruct_batches(tokenizer, video, cfg.batch_size, cfg.precision)
    show(cfg, {"real": video, "reconstruction": output}, batch["caption"], tokenizer.clip["fps"])
    return {"clips": len(video), **reconstruction_metrics(output, batch, data)}


def validate_generator(cfg: DictConfig) -> dict:
    generator, tokenizer = load_generator(cfg.ckpt, cfg.tokenizer)
    data = data_for(cfg, generator, tokenizer)
    batch = held_out(data)
    check_classes(generator.model.config.condition, data.classes, "the data has", TRAINED_ON)
    video, prompts = batch["video"], generator.model.condition.prompts(batch)
    output = reconstruct_batches(tokenizer, video, cfg.batch_size, cfg.precision)
    seeds = [cfg.seed + i for i in range(len(prompts))]
    size, sampling = tuple(video.shape[2:]), Sampling.of(plain(cfg))
    samples = sample_videos(generator, tokenizer, prompts, seeds, size, sampling, cfg.precision, cfg.batch_size)

    folder = Path(cfg.folder)
    show(cfg, {"real": video, "reconstruction": output, "sample": samples}, prompts, generator.clip["fps"])
    for i, (prompt, sample) in enumerate(zip(prompts, samples[: cfg.shown])):
        write_video(sample, folder / "samples" / f"{file_stem(prompt)}_seed{seeds[i]}.mp4", generator.clip["fps"])
    metrics = {
        "clips": len(video),
        **reconstruction_metrics(output, batch, data),
        **teacher_forced_metrics(generator, tokenizer, batch, cfg.batch_size, cfg.precision),
        "sample_seconds": seconds_for_one(generator, tokenizer, prompts[0], size, sampling, cfg.precision),
    }
    if can_be_read(data) and generator.model.config.condition.kind == "text":
        metrics["caption_accuracy"] = caption_accuracy(list(samples), batch["caption"], data.fps)
    return metrics


def show(cfg: DictConfig, rows: dict[str, Tensor], titles: Sequence[str], fps: float):
    """Writes the first `shown` clips as contact sheets, a still and a moving one.

    Args:
        rows: row name -> videos (n, 3, T, H, W). titles: n captions or classes.
    """
    groups, sheet = clip_by_clip(rows, cfg.shown), Path(cfg.folder) / "contact_sheet.png"
    contact_sheet(groups, list(titles)[: cfg.shown], sheet)
    moving_sheet(groups, list(titles)[: cfg.shown], sheet.with_suffix(".webp"), fps)


def reconstruction_metrics(output: Tensor, batch: dict, data: ClipDataModule) -> dict:
    """Measures reconstructions, which bound the quality of samples.

    Args:
        output: (n, 3, T, H, W), the reconstructed clips. batch: the real ones.
    Returns:
        the PSNR in dB, and how often captions can still be read from the pixels, if they can be read at all.
    """
    metrics = {"reconstruction_psnr_db": psnr(output, batch["video"]).item()}
    if can_be_read(data):
        metrics["reconstruction_caption_accuracy"] = caption_accuracy(list(output), batch["caption"], data.fps)
    return metrics


def can_be_read(data: ClipDataModule) -> bool:
    """Returns whether captions can be read from the pixels of the data's clips: if they are of `Shapes`, and large enough."""
    return isinstance(data.val, Shapes) and min(data.height, data.width) >= MIN_SIDE


def seconds_for_one(
    generator: Loaded, tokenizer: Loaded, prompt: str, size: tuple[int, int, int], sampling: Sampling, precision: str
) -> float:
    """Measures the seconds to sample and decode one clip, as `generate` does: the median of three runs, after one to warm
    up."""
    seconds = []
    for _ in range(4):
        begin = time.perf_counter()
        for _ in stream_samples(generator, tokenizer, [prompt], [0], size, sampling, precision):
            pass
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds[1:])
