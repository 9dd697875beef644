"""The verb `generate`: makes an mp4 of each prompt, with a JSON of its settings (the sidecar) beside it."""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from torch import Tensor
from tqdm import tqdm

from kit import __version__
from kit.build import plain
from kit.checkpoint import Loaded, load_generator
from kit.data.read import open_clip_file
from kit.files import file_sha256, read_json, read_text, sole_user, write_json
from kit.generator.sampler import Sampling
from kit.machine import autocast, device, exact_float32
from kit.media import contact_sheet, spread, video_writer
from kit.sampling import stream_video, windows
from kit.scales import TAU, latent_frames
from kit.values import check_whole_number

SHOWN = 16  # clips on the contact sheet, at most


def stream_samples(
    generator: Loaded, tokenizer: Loaded, prompts: Sequence[str], seeds: Sequence[int], size: tuple[int, int, int],
    how: Sampling, precision: str, history: Tensor | None = None, on_block: Callable[[], None] = lambda: None,
) -> Iterator[Tensor]:  # fmt: skip
    """Generates videos with trained models on this machine's device, by `stream_video`.

    A single clip is computed as a batch of two, because a batch of one uses other kernels, which round differently. In
    batches of two or more, a float32 clip is the same to the last bit in any batch (tested on CPUs and on an H200).

    Args:
        size: T, H, W. precision: `float32` or `bfloat16`. history: (3, T0, H, W) in [-1, 1], the same for all.
        on_block: called after each block.
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
        with autocast(precision), exact_float32():  # must not stay in force while the caller works
            piece = next(pieces, None)
        if piece is None:
            return
        yield piece[:wanted].float().cpu()


def sample_videos(
    generator: Loaded, tokenizer: Loaded, prompts: Sequence[str], seeds: Sequence[int], size: tuple[int, int, int],
    how: Sampling, precision: str, batch_size: int, history: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Generates a clip for each prompt, `batch_size` at a time, with a progress bar.

    Args:
        others: as for `stream_samples`.
    Returns:
        (n, 3, T, H, W) float32 in [-1, 1], on the CPU.
    """
    done = []
    with progress(len(prompts), size[0], generator, how, batch_size) as bar:
        for start in range(0, len(prompts), batch_size):
            part = slice(start, start + batch_size)
            given = (prompts[part], seeds[part], size, how, precision, history, bar.update)
            done.append(torch.cat(list(stream_samples(generator, tokenizer, *given)), dim=2))
    return torch.cat(done)


def progress(clips: int, frames: int, generator: Loaded, how: Sampling, batch_size: int) -> tqdm:
    """Makes a progress bar that counts the blocks of all batches."""
    longest, overlap = how.window(generator.clip["frames"], frames)
    latents = sum(map(latent_frames, windows(frames, longest, overlap)))
    batches = -(-clips // batch_size)
    return tqdm(total=batches * latents * generator.model.config.scales, desc="generate", unit="block", disable=None)


SETTINGS = (  # keys of conf/generate.yaml that decide how a video looks, apart from prompt, label and seed
    "ckpt", "tokenizer", "image", "video", "history_frames", "frames", "fps", "precision",
    "guidance", "negative", "temperature", "top_p", "extend", "overlap",
)  # fmt: skip
WHOLE_NUMBERS = {"n": 1, "batch_size": 1, "seed": 0, "frames": 1, "history_frames": 1, "overlap": 1}  # key -> minimum


@dataclass(frozen=True)
class Job:
    """A video to make, with everything that decides how it looks.

    Args:
        settings: values of conf/generate.yaml.
        about: versions, and hashes of the models and of a given picture or video, which the settings refer to.
        path: of the mp4.
    """

    prompt: str
    seed: int
    settings: dict
    about: dict
    path: Path

    @property
    def sidecar(self) -> dict:
        return {**self.about, "settings": {**self.settings, "seed": self.seed}}

    @property
    def sidecar_path(self) -> Path:
        return self.path.with_suffix(".json")

    @property
    def done(self) -> bool:
        """Whether the file exists and was made with exactly these settings."""
        try:
            return self.path.is_file() and read_json(self.sidecar_path) == self.sidecar
        except (OSError, ValueError):
            return False

    def differs(self, settings: dict) -> bool:
        """Returns whether the settings of a sidecar make another video; checkpoints may have moved."""
        return any(
            settings.get(name) != value
            for name, value in self.sidecar["settings"].items()
            if name not in ("ckpt", "tokenizer")
        )


def generate(cfg: DictConfig) -> list[Path]:
    """Writes an mp4 for each prompt and seed, and a contact sheet, to the run's folder.

    Each mp4 gets a JSON with its settings beside it, from which `settings=FILE` makes it again. Videos that exist already and
    have the same settings are kept. Frames are written as they are generated, so memory does not grow with the length.

    Returns:
        the paths of the mp4s.
    Raises:
        ValueError: if no checkpoint is given; else as the functions called here.
    """
    values, expected = with_settings(plain(cfg))
    check_numbers(values)
    if values["ckpt"] is None:
        raise ValueError("give ckpt=PATH, a generator's checkpoint, or settings=FILE, of a video made before")
    generator, tokenizer = load_generator(values["ckpt"], values["tokenizer"])
    condition, clip, how = generator.model.condition, generator.clip, Sampling.of(values)
    key, prompts = prompts_of(values, generator.model.config.condition.kind)
    for note in notes_on(prompts, how, condition.notes):
        print(f"note: {note}")
    history, given = history_of(values, clip)
    about = {
        "kit": __version__, "torch": torch.__version__, "device": device().type, "generator_hash": generator.hash,
        "tokenizer_hash": tokenizer.hash, **given,
    }  # fmt: skip
    check_same(expected, about)
    frames = values["frames"] or usual_length(history, how, clip["frames"])
    check_length(tokenizer, (frames, clip["height"], clip["width"]), history, how, clip["frames"])

    files = {"ckpt": generator.path, "tokenizer": tokenizer.path, "image": values["image"], "video": values["video"]}
    settings = {name: values[name] for name in SETTINGS} | {"frames": frames, "fps": values["fps"] or clip["fps"]}
    settings |= {"guidance": asdict(how.guidance)}
    settings |= {name: None if path is None else str(Path(path).resolve()) for name, path in files.items()}
    seeds, folder = range(values["seed"], values["seed"] + values["n"]), Path(cfg.folder)
    jobs = [
        Job(prompt, seed, {**settings, key: prompt}, about, folder / f"{file_stem(prompt)}_seed{seed}.mp4")
        for prompt in prompts
        for seed in seeds
    ]
    check_paths(jobs, values["settings"])
    with sole_user(folder):
        return make_videos(jobs, generator, tokenizer, values, history, how)


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
    jobs: list[Job], generator: Loaded, tokenizer: Loaded, values: dict, history: Tensor | None, how: Sampling
) -> list[Path]:  # fmt: skip
    """Makes the videos that do not exist yet, and a contact sheet; returns the paths of all videos."""
    missing = [job for job in jobs if not job.done]
    if len(missing) < len(jobs):
        print(f"{len(jobs) - len(missing)} of {len(jobs)} videos are there already, made with the same settings")
    clip, frames = generator.clip, jobs[0].settings["frames"]
    size = (frames, clip["height"], clip["width"])
    with progress(len(missing), frames, generator, how, values["batch_size"]) as bar:
        for start in range(0, len(missing), values["batch_size"]):
            batch = missing[start : start + values["batch_size"]]
            words = [job.prompt for job in batch], [job.seed for job in batch]
            write_videos(
                batch, stream_samples(generator, tokenizer, *words, size, how, values["precision"], history, bar.update)
            )
    print("\n".join(map(str, [*(job.path for job in missing), show(jobs[:SHOWN], sheet_path(jobs))])))
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


def typed_keys() -> list[str]:
    """Lists the keys given on the command line, such as `seed` and `guidance.first`; none if there is no command line."""
    words = HydraConfig.get().overrides.task if HydraConfig.initialized() else []
    return [word.split("=")[0].lstrip("+") for word in words if word[0] != "~"]


def with_settings(values: dict) -> tuple[dict, dict]:
    """Merges the values of conf/generate.yaml with those of the sidecar that `settings` names.

    Keys given on the command line take precedence over the sidecar: `settings=FILE temperature=0.5` makes a variant of that
    video. `ckpt` and `tokenizer`, if given, say where the checkpoints are now.

    Returns:
        the merged values, and the sidecar, which is empty without `settings`. If another picture or video is given, the
        sidecar lacks the hash of the old one.
    Raises:
        FileNotFoundError: if the sidecar, or the picture or video that it names, does not exist.
        ValueError: if the file is not a sidecar of this version.
    """
    if values["settings"] is None:
        return values, {}
    path = Path(values["settings"])
    if not path.is_file():
        raise FileNotFoundError(f"settings={path}: no such file; it is the JSON beside a video that `generate` has made")
    sidecar = read_json(path)
    found = sidecar.get("settings") if isinstance(sidecar, dict) else None
    known = isinstance(found, dict) and {"seed", *SETTINGS} <= set(found) <= {"seed", "prompt", "label", *SETTINGS}
    if not known or not isinstance(found["guidance"], dict):
        raise ValueError(f"settings={path} is not the JSON beside a video that `generate` of this version of kit has made")
    typed = typed_keys()
    if {"prompt", "label", "prompts"} & {*typed}:
        found = {**found, "prompt": None, "label": None}
    begins = {"image": ("video", "history_frames"), "video": ("image",)}  # key -> the keys that it replaces
    left = {name for key, others in begins.items() if key in typed and values[key] is not None for name in others}
    found = {**found, **{name: None for name in left - {*typed}}}
    moved = {name: values[name] for name in ("ckpt", "tokenizer") if values[name] is not None}
    merged = {**values, "prompt": None, "label": None, "prompts": None, "n": 1, **found, **moved}
    for name, _, part in (key.partition(".") for key in typed):
        merged[name] = {**merged[name], part: values[name][part]} if part else values[name]
    if any(merged[name] != found[name] for name in ("image", "video")):  # another one is given
        sidecar = {key: value for key, value in sidecar.items() if key != "given_sha256"}
    elif any(found[name] is not None and not Path(found[name]).is_file() for name in ("image", "video")):
        given = found["image"] or found["video"]
        raise FileNotFoundError(f"settings={path} is of a video that begins with {given}, which is not there")
    changed = [key for key in typed if key.split(".")[0] in ("prompt", "label", "prompts", "seed", "n", *SETTINGS[2:])]
    print(f"note: all but {', '.join(['where the checkpoints are', *changed])} is taken from {path}")
    return merged, sidecar


def check_numbers(values: dict):
    """Checks the numbers among the values of conf/generate.yaml.

    Raises:
        ValueError: if one is of the wrong kind or out of range, naming its key.
    """
    for name, least in WHOLE_NUMBERS.items():
        check_whole_number(name, values[name], least, optional=name in ("frames", "history_frames", "overlap"))
    if values["seed"] + values["n"] > 2**63:
        raise ValueError(f"seed={values['seed']}: expected a number below 2^63")
    if values["fps"] is not None and not (isinstance(values["fps"], int | float) and 0 < values["fps"] < float("inf")):
        raise ValueError(f"fps={values['fps']}: expected frames per second, above 0, or null: as trained")


def check_same(expected: dict, about: dict):
    """Checks that a video will be made from the same models and files as before.

    Args:
        expected: the sidecar; empty: nothing is checked. about: the same hashes of what is loaded now.
    Raises:
        ValueError: if a hash in the sidecar differs.
    """
    ways = {"generator_hash": "ckpt=", "tokenizer_hash": "tokenizer=", "given_sha256": None}
    for key, way in ways.items():
        if key in expected and expected[key] != about.get(key):
            mend = f"say with {way} where the one is that it was made with" if way else "the picture or video has changed"
            raise ValueError(f"the settings are of a video with {key} {expected[key]}, found {about.get(key)}: {mend}")


def prompts_of(values: dict, kind: str) -> tuple[str, list[str]]:
    """Reads the prompts or labels to generate from `prompt`, `label` or the file `prompts`.

    Args:
        kind: of the model's condition, `text` or `class`.
    Returns:
        `prompt` or `label`, whichever the model was trained on, and the texts without duplicates. A text model without any
        gets an empty prompt.
    Raises:
        ValueError: if the model was trained on the other one, more than one key is given, a class model gets no label, or the
            file has no text. FileNotFoundError: if there is no such file.
    """
    given = [name for name in ("prompt", "label", "prompts") if values[name] is not None]
    if len(given) > 1:
        raise ValueError(f"give one of prompt=, label= and prompts=, not both {' and '.join(f'{name}=' for name in given)}")
    wanted, other = ("prompt", "label") if kind == "text" else ("label", "prompt")
    if values[other] is not None:
        raise ValueError(f"this generator was trained on {'captions' if kind == 'text' else 'classes'}: use {wanted}=")
    if values["prompts"] is not None:
        path = Path(values["prompts"])
        if not path.is_file():
            raise FileNotFoundError(f"prompts={path}: no such file; it holds one {wanted} a line")
        lines = [line.strip() for line in read_text(path).split("\n")]
        if not any(lines):
            raise ValueError(f"prompts={path} holds no {wanted}; write one a line")
        return wanted, list(dict.fromkeys(line for line in lines if line))
    if values[wanted] is None and kind == "class":
        raise ValueError("this generator was trained on classes: give label=")
    return wanted, ["" if values[wanted] is None else str(values[wanted])]


def notes_on(prompts: list[str], how: Sampling, notes: Callable[[str], list[str]]) -> list[str]:
    """Lists notes on the prompts that a user should see before generation begins.

    Args:
        notes: the condition's notes on a text.
    Raises:
        ValueError: for the first class that the model does not know.
    """
    told = [note for prompt in prompts for note in notes(prompt)]
    if how.negative is not None:
        told += [f"negative: {note}" for note in notes(how.negative)]
        if how.guidance.neutral:
            told.append("negative has no effect without guidance (guidance.first=1)")
    return list(dict.fromkeys(told))


def file_stem(prompt: str) -> str:
    """Converts a prompt to part of a file name. Adds a hash if letters, signs or length are lost, to keep names distinct."""
    stem = re.sub(r"[^a-z0-9]+", "_", prompt.lower()).strip("_")
    whole = len(stem) <= 80 and stem in (prompt, prompt.replace(" ", "_"))
    return (stem if whole else f"{stem[:72]}_{zlib.crc32(prompt.encode()):08x}".strip("_")) or "video"


def history_of(values: dict, clip: dict) -> tuple[Tensor | None, dict]:
    """Reads the frames to begin with, from `image` or the end of `video`.

    Args:
        clip: `frames`, `height`, `width`, `fps` of the training clips.
    Returns:
        (3, T0, H, W) in [-1, 1], at the size of the training clips, and the file's hash as `given_sha256`; None and an empty
        dict if neither is given.
    Raises:
        ValueError: if both are given, `history_frames` is given without a video, or the video is too short; else as
            `open_clip_file`.
    """
    if values["history_frames"] is not None and values["video"] is None:
        raise ValueError(f"history_frames={values['history_frames']} are those of a video to go on from; give video=FILE too")
    if values["image"] is None and values["video"] is None:
        return None, {}
    if values["image"] is not None and values["video"] is not None:
        raise ValueError("give image= or video=, not both")
    path = Path(values["image"] or values["video"])
    frames = 1 if values["image"] is not None else values["history_frames"] or max(1, min(9, clip["frames"] - TAU))
    latent_frames(frames)
    try:
        file = open_clip_file(path, frames, clip["fps"], at_end=values["image"] is None)
    except ValueError as error:
        raise ValueError(f"{error}; say with history_frames= how many to go on from: 1, 5, 9 and so on") from error
    height, width = file.size
    if height * clip["width"] != width * clip["height"]:
        print(f"note: {path} is {width} x {height}: scaled, and cut in the centre to {clip['width']} x {clip['height']}")
    if file.video.transparent:
        print(f"note: transparent areas of {path} become white")
    return file.read(clip["height"], clip["width"]), {"given_sha256": file_sha256(path)}


def usual_length(history: Tensor | None, how: Sampling, trained: int) -> int:
    """Returns the pixel frames of a video if `frames` is not set: those of a training clip.

    With `extend: positions` and a history that is no shorter than a training clip, a clip's new frames (all but the first)
    are added to the history.
    """
    taken = 0 if history is None else history.shape[1]
    return taken + trained - 1 if how.extend == "positions" and taken >= trained > 1 else trained


def check_length(tokenizer: Loaded, size: tuple[int, int, int], history: Tensor | None, how: Sampling, trained: int):
    """Checks that a video of this length can be made, and prints a note if it is longer than the training clips.

    Args:
        size: T, H, W of the video. history: (3, T0, H, W), the given frames. trained: T of the training clips.
    Raises:
        ValueError: if T is not 1 + 4n or not above T0, T0 is too long for one window, or the tokenizer cannot take T frames,
            such as one of images.
    """
    frames = size[0]
    latent_frames(frames)
    longest, overlap = how.window(trained, frames)
    windows(frames, longest, overlap)
    tokenizer.model.schedule(min(frames, longest), *size[1:])
    taken = 0 if history is None else history.shape[1]
    if taken >= longest == 1 and how.extend == "reencode":
        raise ValueError("this generator makes pictures, of one frame: it cannot go on from one; leave out image= and video=")
    if taken >= longest and how.extend == "reencode":
        least = max(1, longest - TAU)
        told = f"{taken} frames are given, but this generator makes clips of {longest}"
        raise ValueError(f"{told}: use history_frames={least} or less")
    if taken >= frames:
        raise ValueError(f"frames={frames}, of which {taken} are given: ask for more frames, or take fewer history_frames")
    if frames > trained and how.extend == "positions":
        print(f"note: {frames} frames in one sequence, {trained} were trained; extend=reencode stays within what was trained")
    elif frames > longest:
        how_made = f"{longest} at a time, each time from the last {overlap} on"
        print(f"note: {frames} frames, {how_made}; training saw {trained}, not what comes after them")
