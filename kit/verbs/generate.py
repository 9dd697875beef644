"""The verb `generate`: makes an mp4 of each prompt, with a JSON of its settings (the sidecar) beside it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path

import torch
from omegaconf import DictConfig
from torch import Tensor

from kit import __version__
from kit.checkpoint import Loaded, load_generator
from kit.data.read import open_clip_file
from kit.files import read_json, sole_user, write_json
from kit.generator.sampler import Sampling
from kit.machine import device
from kit.media import contact_sheet, spread, video_writer
from kit.sampling import progress, stream_samples
from kit.sampling_checks import check_video_length, tell_notes
from kit.values import plain
from kit.verbs.request import (
    check_numbers,
    check_texts,
    file_stem,
    history_of,
    prompts_of,
    usual_length,
)
from kit.verbs.sidecar import SETTINGS, Job, check_same, with_settings

SHOWN = 16  # clips on the contact sheet, at most


def generate(cfg: DictConfig) -> list[Path]:
    """Writes an mp4 for each prompt and seed, and a contact sheet, to the run's folder.

    Each mp4 gets a JSON with its settings beside it, from which `settings=FILE` makes it again. Videos that exist already
    and have the same settings are kept, unless they are damaged. Frames are written as they are generated, so memory does not
    grow with the length.

    Returns:
        the paths of the mp4s.
    Raises:
        ValueError: if no checkpoint is given; else as the functions called here.
    """
    values, expected = with_settings(plain(cfg))
    check_numbers(values)
    check_texts(values)
    if values["ckpt"] is None:
        raise ValueError("give ckpt=PATH, a generator's checkpoint, or settings=FILE, of a video made before")
    generator, tokenizer = load_generator(values["ckpt"], values["tokenizer"])
    condition, clip, sampling = generator.model.condition, generator.clip, Sampling.of(values)
    key, prompts = prompts_of(values, generator.model.config.condition.kind)
    tell_notes(prompts, sampling, condition.notes)
    history, given = history_of(values, clip)
    about = {
        "kit": __version__, "torch": torch.__version__, "device": device().type, "generator_hash": generator.hash,
        "tokenizer_hash": tokenizer.hash, **given,
    }  # fmt: skip
    check_same(expected, about)
    frames = values["frames"] or usual_length(history, sampling, clip["frames"])
    check_video_length(tokenizer, (frames, clip["height"], clip["width"]), history, sampling, clip["frames"])

    files = {"ckpt": generator.path, "tokenizer": tokenizer.path, "image": values["image"], "video": values["video"]}
    settings = {name: values[name] for name in SETTINGS} | {"frames": frames, "fps": values["fps"] or clip["fps"]}
    settings |= {"guidance": asdict(sampling.guidance)}
    settings |= {name: None if path is None else str(Path(path).resolve()) for name, path in files.items()}
    seeds, folder = range(values["seed"], values["seed"] + values["n"]), Path(cfg.folder)
    jobs = [
        Job(prompt, seed, {**settings, key: prompt}, about, folder / f"{file_stem(prompt)}_seed{seed}.mp4")
        for prompt in prompts
        for seed in seeds
    ]
    check_paths(jobs, values["settings"])
    with sole_user(folder):
        return make_videos(jobs, generator, tokenizer, values, history, sampling)


def check_paths(jobs: list[Job], settings: str | None):
    """Checks that each video gets a file of its own.

    Args:
        settings: the JSON that settings were taken from.
    Raises:
        ValueError: if two prompts would share a file, or a video or the contact sheet would overwrite the picture or video
            that the videos are made from, or the one whose settings they take.
    """
    given = {jobs[0].settings[key]: key for key in ("image", "video") if jobs[0].settings[key]}
    for job in jobs if settings else ():
        if job.sidecar_path.resolve() == Path(settings).resolve() and job.differs(read_json(Path(settings))["settings"]):
            raise ValueError(
                f"settings={settings} and its video would be overwritten by a variant; give another name= or seed="
            )
    for path in [sheet_path(jobs), *(job.path for job in jobs)]:
        if key := given.get(str(path.resolve())):
            raise ValueError(f"{key}={path} would be overwritten by what is made of it; give another name=")
    taken: dict[Path, str] = {}
    for job in jobs:
        if taken.setdefault(job.path, job.prompt) != job.prompt:
            raise ValueError(
                f"the prompts {taken[job.path]!r} and {job.prompt!r} share the file {job.path.name}; leave one out"
            )


def sheet_path(jobs: list[Job]) -> Path:
    """Returns the path of the contact sheet, which is named after the prompt if there is only one."""
    prompts = {job.prompt for job in jobs}
    return jobs[0].path.with_name(f"{file_stem(*prompts) if len(prompts) == 1 else 'contact_sheet'}.png")


def make_videos(
    jobs: list[Job], generator: Loaded, tokenizer: Loaded, values: dict, history: Tensor | None, sampling: Sampling
) -> list[Path]:  # fmt: skip
    """Makes the videos that do not exist yet, and a contact sheet; returns the paths of all videos."""
    missing = [job for job in jobs if not job.done]
    if len(missing) < len(jobs):
        print(f"{len(jobs) - len(missing)} of {len(jobs)} videos are there already, made with the same settings")
    clip, frames = generator.clip, jobs[0].settings["frames"]
    size = (frames, clip["height"], clip["width"])
    with progress(len(missing), generator, tokenizer, size, sampling, values["batch_size"]) as bar:
        for start in range(0, len(missing), values["batch_size"]):
            batch = missing[start : start + values["batch_size"]]
            words = [job.prompt for job in batch], [job.seed for job in batch]
            write_videos(
                batch, stream_samples(generator, tokenizer, *words, size, sampling, values["precision"], history, bar.update)
            )
    print("\n".join(map(str, [*(job.path for job in missing), show(jobs[:SHOWN], sheet_path(jobs))])))
    if len(jobs) > SHOWN:
        print(f"note: the contact sheet shows the first {SHOWN} of {len(jobs)} videos")
    return [job.path for job in jobs]


def write_videos(jobs: list[Job], pieces: Iterator[Tensor]):
    """Writes the videos of a batch, then their sidecars; writes none of them if a piece fails.

    Args:
        pieces: (B, 3, n, H, W) in [-1, 1], the frames in their order.
    """
    with ExitStack() as stack:
        writers = []
        for piece in pieces:
            if not writers:
                for job in jobs:
                    writers.append(stack.enter_context(video_writer(job.path, job.settings["fps"], *piece.shape[-2:])))
            for write, video in zip(writers, piece):
                write(video)
        for job in jobs:  # remove the sidecar of an older video before its mp4 is replaced
            job.sidecar_path.unlink(missing_ok=True)
    for job in jobs:
        write_json(job.sidecar_path, job.sidecar)


def show(jobs: list[Job], path: Path) -> Path:
    """Draws a contact sheet of finished videos."""
    groups = []
    for job in jobs:
        file = open_clip_file(job.path, None, 0)
        few = replace(file, numbers=file.numbers[spread(len(file))])
        groups.append({"sample": few.read(*file.size)})
    return contact_sheet(groups, [f"{job.prompt} (seed {job.seed})" for job in jobs], path)
