"""The verb `generate`: prompts to mp4s, each with the settings that made it beside it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from omegaconf import DictConfig
from torch import Tensor
from tqdm import tqdm

from kit import __version__
from kit.checkpoint import Loaded, load_generator
from kit.data.read import open_clip_file
from kit.files import file_sha256, write_json
from kit.generator.sampler import Sampling
from kit.machine import autocast, device, exact_float32
from kit.media import contact_sheet, spread, video_writer
from kit.run import plain
from kit.sampling import stream_video, windows
from kit.scales import TAU, latent_frames

SHOWN = 16  # clips on the contact sheet, at most


def stream_samples(
    generator: Loaded, tokenizer: Loaded, prompts: Sequence[str], seeds: Sequence[int], size: tuple[int, int, int],
    how: Sampling, precision: str, history: Tensor | None = None, on_block: Callable[[], None] = lambda: None,
) -> Iterator[Tensor]:  # fmt: skip
    """`stream_video` with trained models, on this machine's device.

    A single clip is made twice: alone it would go through other kernels, which round otherwise. From two on, float32 clips
    come out the same in any batch.

    Args:
        size: T, H, W. precision: `float32` or `bfloat16`. history: (3, T0, H, W), the same for all.
    Yields:
        (B, 3, n, H, W) float32 in [-1, 1] on the CPU.
    """
    wanted, (frames, height, width) = len(prompts), size
    if wanted == 1:
        prompts, seeds = [*prompts] * 2, [*seeds] * 2
    model, codec = generator.model.to(device()), tokenizer.model.to(device())
    schedule = codec.schedule(generator.clip["frames"], height, width)
    given = None if history is None else history.to(device()).expand(len(prompts), -1, -1, -1, -1)
    pieces = stream_video(model, codec, schedule, prompts, seeds, frames, how, given, on_block)
    while True:
        with autocast(precision), exact_float32():  # not while the caller is at work
            piece = next(pieces, None)
        if piece is None:
            return
        yield piece[:wanted].float().cpu()


def sample_videos(
    generator: Loaded, tokenizer: Loaded, prompts: Sequence[str], seeds: Sequence[int], size: tuple[int, int, int],
    how: Sampling, precision: str, batch_size: int, history: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """(n, 3, T, H, W), one clip for each prompt, a batch at a time, with a progress bar; arguments as of `stream_samples`."""
    done = []
    with progress(len(prompts), size[0], generator, how, batch_size) as bar:
        for start in range(0, len(prompts), batch_size):
            part = slice(start, start + batch_size)
            given = (prompts[part], seeds[part], size, how, precision, history, bar.update)
            done.append(torch.cat(list(stream_samples(generator, tokenizer, *given)), dim=2))
    return torch.cat(done)


def progress(clips: int, frames: int, generator: Loaded, how: Sampling, batch_size: int) -> tqdm:
    """A bar over the blocks of all batches."""
    longest, overlap = how.window(generator.clip["frames"], frames)
    latents = sum(map(latent_frames, windows(frames, longest, overlap)))
    batches = -(-clips // batch_size)
    return tqdm(total=batches * latents * generator.model.config.scales, desc="generate", unit="block", disable=None)


@dataclass(frozen=True)
class Job:
    """A video to make, and all that decides how it looks. `settings` are keys of conf/generate.yaml."""

    prompt: str
    seed: int
    settings: dict
    about: dict  # what the settings meant: hashes, versions
    path: Path

    def sidecar(self) -> dict:
        return {**self.about, "settings": {**self.settings, "seed": self.seed}}

    @property
    def sidecar_path(self) -> Path:
        return self.path.with_suffix(".json")

    @property
    def done(self) -> bool:
        """Whether this very video is there."""
        try:
            return self.path.is_file() and json.loads(self.sidecar_path.read_text()) == self.sidecar()
        except (OSError, ValueError):
            return False


def generate(cfg: DictConfig) -> list[Path]:
    """Writes an mp4 for each prompt and seed, and a contact sheet, to the run's folder; returns the mp4s' paths.

    Beside each mp4 lies a JSON with its settings, from which `settings=FILE` makes it again. Videos that are there, made with
    the same settings, are kept. Frames are written as they come: memory does not grow with the length.
    """
    cfg, expected = with_settings(cfg)
    if cfg.ckpt is None:
        raise ValueError("give ckpt=PATH, a generator's checkpoint, or settings=FILE, of a video made before")
    generator, tokenizer = load_generator(cfg.ckpt, cfg.tokenizer)
    check_models(expected, generator, tokenizer)
    condition, clip = generator.model.condition, generator.clip
    key, prompts = prompts_of(cfg, generator.model.config.condition.kind)
    how = Sampling.of(plain(cfg))
    for prompt in dict.fromkeys([*prompts, *([] if how.negative is None else [how.negative])]):
        for note in condition.notes(prompt):
            print(f"note: {note}")
    history, given = history_of(cfg, clip)
    frames = cfg.frames or max(clip["frames"], 0 if history is None else history.shape[1])
    check_length(frames, history, how, clip["frames"])

    fps, size = cfg.fps or clip["fps"], (frames, clip["height"], clip["width"])
    files = {"ckpt": generator.path, "tokenizer": tokenizer.path, "image": cfg.image, "video": cfg.video}
    settings = {name: None if path is None else str(Path(path).resolve()) for name, path in files.items()}
    settings |= {"history_frames": cfg.history_frames, "frames": frames, "fps": fps, "precision": cfg.precision}
    settings |= asdict(how)
    about = {
        "kit": __version__, "torch": torch.__version__, "device": device().type, "generator_hash": generator.hash,
        "tokenizer_hash": tokenizer.hash, **given,
    }  # fmt: skip
    folder = Path(cfg.folder)
    jobs = []
    for number, prompt in enumerate(prompts):
        stem = file_stem(prompt) if cfg.prompts is None else f"{number:04d}_{file_stem(prompt)}"
        for seed in range(cfg.seed, cfg.seed + cfg.n):
            jobs.append(Job(prompt, seed, {**settings, key: prompt}, about, folder / f"{stem}_seed{seed}.mp4"))
    open_jobs = [job for job in jobs if not job.done]
    if len(open_jobs) < len(jobs):
        print(f"{len(jobs) - len(open_jobs)} of {len(jobs)} videos are there already, made with the same settings")

    shown: dict[str, Tensor] = {}
    with progress(len(open_jobs), frames, generator, how, cfg.batch_size) as bar:
        for start in range(0, len(open_jobs), cfg.batch_size):
            batch = open_jobs[start : start + cfg.batch_size]
            words = [job.prompt for job in batch], [job.seed for job in batch]
            pieces = stream_samples(generator, tokenizer, *words, size, how, cfg.precision, history, bar.update)
            shown |= write_videos(batch, pieces, frames, fps)
    for job in open_jobs:
        print(job.path)
    if shown:
        groups = [{"sample": clip} for clip in shown.values()][:SHOWN]
        stem = "contact_sheet" if cfg.prompts is not None else file_stem(prompts[0])
        print(contact_sheet(groups, list(shown)[:SHOWN], folder / f"{stem}.png"))
    return [job.path for job in jobs]


def write_videos(jobs: list[Job], pieces: Iterator[Tensor], frames: int, fps: float) -> dict[str, Tensor]:
    """Writes the videos of a batch and then their sidecars; none of them if a piece fails.

    Returns:
        title -> (3, n, H, W), frames for the contact sheet.
    """
    picks, seen, begin = spread(frames), [], 0
    with ExitStack() as stack:
        writers = None
        for piece in pieces:
            if writers is None:
                writers = [stack.enter_context(video_writer(job.path, fps, *piece.shape[-2:])) for job in jobs]
            for write, video in zip(writers, piece):
                write(video)
            seen.append(piece[:, :, [p - begin for p in picks if begin <= p < begin + piece.shape[2]]])
            begin += piece.shape[2]
        for job in jobs:  # of the video that this one takes the place of
            job.sidecar_path.unlink(missing_ok=True)
    for job in jobs:
        write_json(job.sidecar_path, job.sidecar())
    return {f"{job.prompt} (seed {job.seed})": video for job, video in zip(jobs, torch.cat(seen, dim=2))}


def with_settings(cfg: DictConfig) -> tuple[DictConfig, dict]:
    """`cfg` with the values of the video whose sidecar `settings` names; and that sidecar, empty without one.

    `ckpt` and `tokenizer`, where they are given, say where the checkpoints are now.
    Raises:
        FileNotFoundError, ValueError: if there is no such file, or it is no sidecar.
    """
    if cfg.settings is None:
        return cfg, {}
    path = Path(cfg.settings)
    if not path.is_file():
        raise FileNotFoundError(f"settings={path}: no such file; it is the JSON beside a video that `generate` has made")
    try:
        sidecar = json.loads(path.read_text(encoding="utf-8"))
        values = dict(sidecar["settings"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"settings={path} is not the JSON beside a video that `generate` has made") from error
    cfg = cfg.copy()
    for name in ("ckpt", "tokenizer"):
        if cfg[name] is not None:
            values.pop(name, None)
    if unknown := sorted(set(values) - set(cfg)):
        raise ValueError(f"settings={path}: unknown settings {', '.join(map(str, unknown))}; it is of another version of kit")
    for name, value in {"prompt": None, "label": None, "prompts": None, "n": 1, **values}.items():
        cfg[name] = value
    return cfg, sidecar


def check_models(expected: dict, generator: Loaded, tokenizer: Loaded):
    """
    Raises:
        ValueError: if a sidecar names other models than those loaded.
    """
    for key, loaded in (("generator_hash", generator), ("tokenizer_hash", tokenizer)):
        if expected.get(key, loaded.hash) != loaded.hash:
            raise ValueError(
                f"the settings are of a model with {key} {expected[key]}, {loaded.path} has {loaded.hash}; say with "
                f"{key.removesuffix('_hash').replace('generator', 'ckpt')}= where the one is that it was made with"
            )


def prompts_of(cfg: DictConfig, kind: str) -> tuple[str, list[str]]:
    """What to generate: `prompt` or `label`, whichever the model was trained on, and the texts.

    Raises:
        ValueError: if it is the other one, if several are given, or a file of prompts has none. FileNotFoundError.
    """
    given = [name for name in ("prompt", "label", "prompts") if cfg[name] is not None]
    if len(given) > 1:
        raise ValueError(f"give one of prompt=, label= and prompts=, not both {' and '.join(f'{name}=' for name in given)}")
    wanted, other = ("prompt", "label") if kind == "text" else ("label", "prompt")
    if cfg[other] is not None:
        raise ValueError(f"this generator was trained on {'captions' if kind == 'text' else 'classes'}: use {wanted}=")
    if cfg.prompts is not None:
        path = Path(cfg.prompts)
        if not path.is_file():
            raise FileNotFoundError(f"prompts={path}: no such file; it holds one {wanted} a line")
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
        if not any(lines):
            raise ValueError(f"prompts={path} holds no {wanted}; write one a line")
        return wanted, [line for line in lines if line]
    if cfg[wanted] is None and kind == "class":
        raise ValueError("this generator was trained on classes: give label=")
    return wanted, [cfg[wanted] or ""]


def file_stem(prompt: str) -> str:
    """A prompt as part of a file name."""
    return re.sub(r"[^a-z0-9]+", "_", prompt.lower()).strip("_")[:80] or "video"


def history_of(cfg: DictConfig, clip: dict) -> tuple[Tensor | None, dict]:
    """(3, T0, H, W) from image= or video=, at the size of the training clips, and what it was; None and nothing without.

    Raises:
        ValueError: for both, or a video too short; as `open_clip_file`.
    """
    if cfg.image is None and cfg.video is None:
        return None, {}
    if cfg.image is not None and cfg.video is not None:
        raise ValueError("give image= or video=, not both")
    path = Path(cfg.image or cfg.video)
    frames = 1 if cfg.image is not None else cfg.history_frames
    latent_frames(frames)
    try:
        file = open_clip_file(path, frames, clip["fps"], at_end=True)
    except ValueError as error:
        raise ValueError(f"{error}; say with history_frames= how many to go on from: 1, 5, 9 and so on") from error
    height, width = file.size
    if height * clip["width"] != width * clip["height"]:
        print(f"note: {path} is {width} x {height}: scaled, and cut in the centre to {clip['width']} x {clip['height']}")
    return file.read(clip["height"], clip["width"]), {"given_sha256": file_sha256(path)}


def check_length(frames: int, history: Tensor | None, how: Sampling, trained: int):
    """
    Raises:
        ValueError: if the frames are not 1 + 4n, or not more than are given, or those are more than a window goes on from.
    """
    latent_frames(frames)
    longest, overlap = how.window(trained, frames)
    windows(frames, longest, overlap)
    if history is not None and history.shape[1] >= frames:
        raise ValueError(f"the given video has {history.shape[1]} frames; ask for more with frames=, found {frames}")
    if history is not None and history.shape[1] >= longest:
        raise ValueError(
            f"{history.shape[1]} frames are given, but this generator makes clips of {longest}: go on from "
            f"{max(1, longest - TAU)} or fewer (history_frames=)"
        )
    if frames > trained and how.extend == "positions":
        print(f"note: {frames} frames in one sequence, {trained} were trained; extend=reencode stays within what was trained")
