"""Verbs for trained models: validate, reconstruct, consolidate, inspect. Each is a Python function too."""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import asdict
from pathlib import Path

import torch
from omegaconf import DictConfig
from torch import Tensor
from torch.utils.data import default_collate

from kit import sharded_checkpoint
from kit.build import build_data
from kit.checkpoint import Loaded, kind_of, load_generator, load_tokenizer
from kit.data.datamodule import ClipDataModule, check_videos
from kit.data.shapes import Shapes
from kit.evaluation.shapes_score import caption_accuracy
from kit.files import replacing, sole_user, write_json
from kit.generator.corruption import teacher_forced
from kit.generator.module import accuracy_by_block
from kit.generator.sampler import Sampling
from kit.inspection import bit_use, bit_use_picture, forced_and_free
from kit.machine import autocast, device, inference_precision
from kit.media import clip_by_clip, contact_sheet, write_video
from kit.pixels import psnr
from kit.reconstruction import Scores, reconstruct_file
from kit.request import file_stem
from kit.sampling import sample_clips, sample_videos
from kit.self_check import Check, self_check
from kit.values import check_whole_number, plain

CHECKED = 8  # number of clips that `inspect` self-checks and samples


def data_for(cfg: DictConfig, model: Loaded, frames: int | None = None) -> ClipDataModule:
    """Builds the data of `cfg` with clips of the shape that a checkpoint was trained on, and prints a description of it.

    Args:
        frames: T of the clips; None: as in training.
    Raises:
        ValueError: if `shown`, `clips` or `batch_size` is below 1; else as `build_data`.
    """
    for key in ("shown", "clips", "batch_size"):
        check_whole_number(key, cfg[key], 1)
    clip = {**model.clip, "frames": frames or model.clip["frames"]}
    cfg = cfg.copy()
    cfg.data.update({**clip, "batch_size": cfg.batch_size, "val_clips": cfg.clips, "workers": 0})
    if cfg.data.get("buckets"):  # those of the training; held-out clips have one shape
        cfg.data.buckets = []
    data = build_data(cfg)
    print("clips of {frames} x {height} x {width} at {fps:g} fps, held out of".format(**clip), data.about)
    if model.held_out is not None and model.held_out != data.settings["held_out"]:
        print(
            "  other clips than were held out of its training, some of which it may have learned: to score those, give the "
            "training's words for data, data.root and data.source.val_every"
        )
    return data


def check_classes(generator: Loaded, data: ClipDataModule):
    """Checks that the data has the classes that a class-conditional generator was trained on.

    Raises:
        ValueError: if it has other classes.
    """
    condition = generator.model.config.condition
    if condition.kind == "class" and condition.classes != data.classes:
        raise ValueError(
            f"this generator knows the classes {', '.join(condition.classes)}, the data has "
            f"{', '.join(data.classes) or 'none'}; give the data it was trained on, such as data=clips data.root=DIR"
        )


def held_out(data: ClipDataModule) -> dict:
    """Returns the held-out clips as one batch: of readable files each once, since their clips repeat.

    Raises:
        as `check_videos`; ValueError if none of the files can be read.
    """
    check_videos(data)

    numbers = [n for n in range(data.val_clips) if data.val.distinct(n)]
    if len(numbers) < data.val_clips:
        print(f"  clips={data.val_clips}, but {len(numbers)} held out: each is taken once")
    clips = [(n, data.val[n]) for n in numbers]
    clips = [clip for n, clip in clips if data.val.distinct(n)]  # not those whose file has turned out to be unreadable
    if len(clips) < len(numbers):
        print(f"  {len(numbers) - len(clips)} of {len(numbers)} cannot be read and are left out")
    if not clips:
        raise ValueError(f"clips={data.val_clips}: none of them can be read; give more, or mend the files")
    return default_collate(clips)


def validate(cfg: DictConfig) -> dict:
    """Scores a checkpoint on held-out clips, and prints the metrics.

    Writes metrics.json and contact_sheet.png to the run's folder, for a generator also mp4s in `samples`.

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
    print(f"in {folder}: metrics.json, contact_sheet.png{'' if alone else ', samples'}")
    return metrics


def reconstruct_batches(tokenizer: Loaded, video: Tensor, batch_size: int) -> Tensor:
    """Reconstructs clips (n, 3, T, H, W) with a tokenizer, in batches; the result is on the CPU."""
    model = tokenizer.model.to(device())
    with inference_precision():
        return torch.cat([model.reconstruct(part.to(device())).cpu() for part in video.split(batch_size)])


def validate_tokenizer(cfg: DictConfig) -> dict:
    tokenizer = load_tokenizer(cfg.ckpt)
    data = data_for(cfg, tokenizer)
    batch = held_out(data)
    video = batch["video"]
    output = reconstruct_batches(tokenizer, video, cfg.batch_size)
    groups = clip_by_clip({"real": video, "reconstruction": output}, cfg.shown)
    contact_sheet(groups, batch["caption"][: cfg.shown], Path(cfg.folder) / "contact_sheet.png")
    return {"clips": len(video), **reconstruction_metrics(output, batch, data)}


def reconstruction_metrics(output: Tensor, batch: dict, data: ClipDataModule) -> dict:
    """Measures reconstructions, which bound the quality of samples.

    Args:
        output: (n, 3, T, H, W), the reconstructed clips. batch: the real ones.
    Returns:
        the PSNR in dB, and for `Shapes` how often captions can still be read from the pixels.
    """
    metrics = {"reconstruction_psnr_db": psnr(output, batch["video"]).item()}
    if isinstance(data.val, Shapes):  # the only data whose captions can be read from pixels
        metrics["reconstruction_caption_accuracy"] = caption_accuracy(list(output), batch["caption"], data.fps)
    return metrics


def validate_generator(cfg: DictConfig) -> dict:
    generator, tokenizer = load_generator(cfg.ckpt, cfg.tokenizer)
    data = data_for(cfg, generator)
    batch = held_out(data)
    check_classes(generator, data)
    video, prompts = batch["video"], generator.model.condition.prompts(batch)
    output = reconstruct_batches(tokenizer, video, cfg.batch_size)
    seeds = [cfg.seed + i for i in range(len(prompts))]
    size, sampling = tuple(video.shape[2:]), Sampling.of(plain(cfg))
    samples = sample_videos(generator, tokenizer, prompts, seeds, size, sampling, cfg.precision, cfg.batch_size)

    folder = Path(cfg.folder)
    groups = clip_by_clip({"real": video, "reconstruction": output, "sample": samples}, cfg.shown)
    contact_sheet(groups, list(prompts)[: cfg.shown], folder / "contact_sheet.png")
    for i, (prompt, sample) in enumerate(zip(prompts, samples[: cfg.shown])):
        write_video(sample, folder / "samples" / f"{file_stem(prompt)}_seed{seeds[i]}.mp4", generator.clip["fps"])
    metrics = {
        "clips": len(video),
        **reconstruction_metrics(output, batch, data),
        **teacher_forced_metrics(generator, tokenizer, batch, cfg.batch_size),
        "sample_seconds": seconds_for_one(generator, tokenizer, prompts[0], size, sampling, cfg.precision),
    }
    if isinstance(data.val, Shapes) and generator.model.config.condition.kind == "text":
        metrics["caption_accuracy"] = caption_accuracy(list(samples), batch["caption"], data.fps)
    return metrics


def seconds_for_one(
    generator: Loaded, tokenizer: Loaded, prompt: str, size: tuple[int, int, int], sampling: Sampling, precision: str
) -> float:
    """Measures the seconds to sample and decode one clip: the median of three runs, after one to warm up."""
    model, codec, seconds = generator.model.to(device()), tokenizer.model.to(device()), []
    for _ in range(4):
        begin = time.perf_counter()
        with autocast(precision):
            sample_clips(model, codec, codec.schedule(*size), [prompt], [0], sampling).cpu()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds[1:])


@torch.no_grad()
def teacher_forced_metrics(generator: Loaded, tokenizer: Loaded, batch: dict, batch_size: int) -> dict:
    """Computes the share of correctly predicted bits with the true bits as history.

    Returns:
        `bit_accuracy` for each scale, and `bit_accuracy_by_frame` for each frame and scale.
    """
    model, codec = generator.model.to(device()), tokenizer.model.to(device())
    schedule, right = codec.schedule_of(batch["video"]), []
    prompts = model.condition.prompts(batch)
    for start in range(0, len(prompts), batch_size):
        part = slice(start, start + batch_size)
        with inference_precision():
            feature = codec.encode(batch["video"][part].to(device()))
            logits, sequence = teacher_forced(model, feature, schedule, model.condition(prompts[part]))
        right.append(((logits > 0) == sequence.targets).cpu())
    accuracy = accuracy_by_block(torch.cat(right), schedule)

    def rounded(shares: Tensor) -> list[float]:
        return [round(share, 4) for share in shares.tolist()]

    return {"bit_accuracy": rounded(accuracy.mean(0)), "bit_accuracy_by_frame": list(map(rounded, accuracy))}


def reconstruct(cfg: DictConfig) -> dict:
    """Writes originals and reconstructions side by side, and prints PSNR (dB) and SSIM after each scale.

    Takes a video file if `video` is given, else held-out clips of the data.

    Returns:
        `by_scale`: see `reconstruct_file`.
    Raises:
        ValueError: if the video would be overwritten by its reconstruction; else as `reconstruct_file` and `held_out`.
    """
    tokenizer, folder = load_tokenizer(cfg.ckpt), Path(cfg.folder)
    pattern = "reconstruction*.*"
    if cfg.video is not None and Path(cfg.video).resolve() in [path.resolve() for path in folder.glob(pattern)]:
        raise ValueError(f"video={cfg.video} would be overwritten by its reconstruction; give another name=")
    with sole_user(folder), replacing(folder, pattern):  # an earlier call may have written more clips
        if cfg.video is not None:
            by_scale = reconstruct_file(tokenizer, cfg.video, cfg.frames, folder)
        else:
            by_scale = reconstruct_held_out(tokenizer, cfg)
    print(json.dumps(by_scale, indent=2))
    print(f"in {folder}: reconstruction.png, reconstruction_*.mp4 (real | reconstruction)")
    return {"by_scale": by_scale}


def reconstruct_held_out(tokenizer: Loaded, cfg: DictConfig) -> list[dict]:
    """Reconstructs held-out clips; writes reconstruction.png and mp4s of the first `shown`. Returns as `reconstruct_file`."""
    data = data_for(cfg, tokenizer, cfg.frames)
    video = held_out(data)["video"]
    rows, by_scale, _ = per_scale(tokenizer, video, cfg.batch_size)
    folder, groups = Path(cfg.folder), clip_by_clip(rows, cfg.shown)
    contact_sheet(groups, [f"clip {i}" for i in range(len(groups))], folder / "reconstruction.png")
    side = torch.cat([video, rows[f"scales 1-{len(by_scale)}"]], dim=-1)
    for i, pair in enumerate(side[: cfg.shown]):
        write_video(pair, folder / f"reconstruction_{i}.mp4", data.fps)
    return by_scale


@torch.no_grad()
def per_scale(tokenizer: Loaded, video: Tensor, batch_size: int) -> tuple[dict[str, Tensor], list[dict], Tensor]:
    """Reconstructs clips from the first k scales of each frame, for each k of 1..K.

    Args:
        video: (n, 3, T, H, W) in [-1, 1].
    Returns:
        name -> videos (n, 3, T, H, W), the real clips first; for each k psnr_db and ssim, means over the clips; and the bits
        (n, L, d). All on the CPU.
    """
    model = tokenizer.model.to(device())
    schedule = model.schedule_of(video)
    rows, metrics = {"real": video}, []
    with inference_precision():
        bits = [model.bits(v.to(device())) for v in video.split(batch_size)]
    for k in range(1, schedule.scales + 1):
        with inference_precision():
            parts = [model.decode_bits(b, schedule, k).cpu() for b in bits]
        output = rows[f"scales 1-{k}"] = torch.cat(parts)
        scores = [Scores().add(o, v).values() for o, v in zip(output, video)]
        metrics.append({"scales": k} | {name: statistics.fmean(s[name] for s in scores) for name in scores[0]})
    return rows, metrics, torch.cat(bits).cpu()


def consolidate(cfg: DictConfig) -> Path:
    """Writes a sharded checkpoint as one file, keeps the shards, and returns the file's path.

    Raises:
        FileExistsError: if `out` is a file; else as `kind_of` and `sharded_checkpoint.consolidate`.
    """
    path = Path(cfg.ckpt)
    if cfg.out is not None and Path(cfg.out).exists():
        raise FileExistsError(f"out={cfg.out} is there already; give another name")
    kind_of(path)
    out = path.with_name(f"{path.stem}_whole{path.suffix}") if cfg.out is None else Path(cfg.out)
    sharded_checkpoint.consolidate(path, out)
    print(f"{out}: {out.stat().st_size / 2**20:.1f} MiB")
    return out


def inspect(cfg: DictConfig) -> dict:
    """Writes pictures of what each scale holds and of bit use, and inspect.json; prints the same numbers.

    For a generator also the share of correctly predicted bits, the self-check, and a picture of clips predicted with the true
    history and sampled without it.

    Returns:
        the contents of inspect.json.
    """
    folder = Path(cfg.folder)
    with sole_user(folder):
        is_generator = kind_of(cfg.ckpt) == "generator"
        generator, tokenizer = load_generator(cfg.ckpt, cfg.tokenizer) if is_generator else (None, load_tokenizer(cfg.ckpt))
        data = data_for(cfg, generator or tokenizer)
        if generator is not None:
            check_classes(generator, data)
        batch, checks, pictures = held_out(data), [], ["scales.png", "bit_use.png"]
        report = inspect_tokenizer(tokenizer, batch, cfg)
        if generator is not None:
            checks = inspect_generator(generator, tokenizer, batch, cfg)
            report |= teacher_forced_metrics(generator, tokenizer, batch, cfg.batch_size)
            pictures.append("samples.png")
        checked = {"self_check": {check.name: asdict(check) for check in checks}} if checks else {}
        write_json(folder / "inspect.json", report | checked)
    print(json.dumps(report, indent=2))
    print("\n".join([check.line() for check in checks] + [f"in {folder}: {', '.join(pictures)}, inspect.json"]))
    return report | checked


def inspect_tokenizer(tokenizer: Loaded, batch: dict, cfg: DictConfig) -> dict:
    """Writes pictures of what each scale holds and of the use of its bits.

    Returns:
        the schedule, PSNR and SSIM after each scale, and the mean entropy (bits) of each scale's bits.
    """
    rows, by_scale, bits = per_scale(tokenizer, batch["video"], cfg.batch_size)
    schedule, folder = tokenizer.model.schedule_of(batch["video"]), Path(cfg.folder)
    use = bit_use(bits, schedule)
    contact_sheet(clip_by_clip(rows, cfg.shown), list(batch["caption"])[: cfg.shown], folder / "scales.png")
    bit_use_picture(use["ones"], folder / "bit_use.png")
    entropy = use["entropy"].nanmean(1)
    return {"schedule": str(schedule), "by_scale": by_scale, "bit_entropy": [round(e.item(), 4) for e in entropy]}


def inspect_generator(generator: Loaded, tokenizer: Loaded, batch: dict, cfg: DictConfig) -> list[Check]:
    """Runs the self-check on the first `CHECKED` clips, and writes a picture of them: real, reconstructed, predicted with the
    true history, and sampled without it."""
    few = {key: value[:CHECKED] for key, value in batch.items()}
    model, codec, video = generator.model.to(device()), tokenizer.model.to(device()), few["video"].to(device())
    prompts = model.condition.prompts(few)
    checks = self_check(model, codec, video, prompts)
    with autocast(cfg.precision):
        feature, schedule = codec.encode(video), codec.schedule_of(video)
        rows = {"real": video, **forced_and_free(model, codec, feature, schedule, prompts, Sampling.of(plain(cfg)))}
    groups = clip_by_clip({name: videos.float().cpu() for name, videos in rows.items()}, len(prompts))
    contact_sheet(groups, list(prompts), Path(cfg.folder) / "samples.png")
    return checks
