"""What a command asks to be generated: prompts, numbers, given frames and length, read from its values and checked."""

from __future__ import annotations

import re
import zlib
from pathlib import Path

from torch import Tensor

from kit.data.listing import is_utf8
from kit.data.read import open_clip_file
from kit.files import file_sha256, no_file, read_lines
from kit.generator.sampler import Sampling
from kit.scales import TAU, latent_frames
from kit.values import check_whole_number
from kit.words import SAID

WHOLE_NUMBERS = {"n": 1, "batch_size": 1, "seed": 0, "frames": 1, "history_frames": 1, "overlap": 1}  # key -> minimum
SLOWEST, FASTEST = 0.001, 1000  # frames per second of an mp4: far lower ones it would round to 0, and play at 24


def check_numbers(values: dict):
    """Checks the numbers among the values of conf/generate.yaml.

    Raises:
        ValueError: if one is of the wrong kind or out of range, naming its key.
    """
    for name, least in WHOLE_NUMBERS.items():
        check_whole_number(name, values[name], least, optional=name in ("frames", "history_frames", "overlap"))
    if values["seed"] + values["n"] > 2**32:  # torch's generator keeps 32 bits
        raise ValueError(f"seed={values['seed']}: expected a number below 2^32")
    if values["fps"] is not None and not (isinstance(values["fps"], int | float) and SLOWEST <= values["fps"] <= FASTEST):
        raise ValueError(f"fps={values['fps']}: expected frames per second, {SLOWEST} to {FASTEST}, or null: as trained")


def check_texts(values: dict):
    """Checks the paths among the values of conf/generate.yaml, and that they and the texts can be written to the JSON beside
    a video.

    Raises:
        ValueError: if a path is empty, or one of them cannot be written, naming its key.
    """
    for name in ("prompt", "label", "negative", "image", "video", "ckpt", "tokenizer"):
        text = values[name]
        if text == "" and name not in SAID:
            raise ValueError(f"{name}= names no file. Is a variable of the shell unset?")
        if text is not None and not is_utf8(str(text) if name in SAID else str(Path(text).resolve())):
            raise ValueError(f"{name}={text!r} is not UTF-8, in which the settings are kept; write or name it anew")


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
            raise FileNotFoundError(f"prompts={path}: {no_file(path)}; it holds one {wanted} a line")
        if not (lines := read_lines(path)):
            raise ValueError(f"prompts={path} holds no {wanted}; write one a line")
        return wanted, list(dict.fromkeys(lines))
    if values[wanted] is None and kind == "class":
        raise ValueError("this generator was trained on classes: give label=")
    return wanted, ["" if values[wanted] is None else str(values[wanted])]


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
        raise ValueError(f"history_frames={values['history_frames']} are those of a video to continue; give video=FILE too")
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
        raise ValueError(f"{error}; say with history_frames= how many to continue from: 1, 5, 9 and so on") from error
    height, width = file.size
    if height * clip["width"] != width * clip["height"]:
        print(f"note: {path} is {width} x {height}: scaled, and cut in the centre to {clip['width']} x {clip['height']}")
    if frames > 1 and file.video.fps < 0.99 * clip["fps"]:
        rates = f"{file.video.fps:g} frames per second, the generator's clips {clip['fps']:g}"
        print(f"note: {path} has {rates}: frames are taken twice")
    for note in file.video.notes():
        print(f"note: {note}")
    return file.read(clip["height"], clip["width"]), {"given_sha256": file_sha256(path)}


def usual_length(history: Tensor | None, sampling: Sampling, trained: int) -> int:
    """Returns the pixel frames of a video if `frames` is not set: those of a training clip.

    With `extend: positions` and a history that is no shorter than a training clip, a clip's new frames (all but the first)
    are added to the history.
    """
    taken = 0 if history is None else history.shape[1]
    return taken + trained - 1 if sampling.extend == "positions" and taken >= trained else trained
