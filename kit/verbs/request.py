"""What a command asks to be generated: prompts, numbers, given frames and length, read from its values and checked."""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from kit.checkpoint import Loaded
from kit.data.listing import is_utf8
from kit.data.read import open_clip_file
from kit.files import file_sha256, read_text
from kit.generator.sampler import Sampling
from kit.sampling import windows
from kit.scales import TAU, latent_frames
from kit.values import check_whole_number
from kit.words import SAID

WHOLE_NUMBERS = {"n": 1, "batch_size": 1, "seed": 0, "frames": 1, "history_frames": 1, "overlap": 1}  # key -> minimum
TABLES = (".csv", ".tsv", ".json", ".jsonl")
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
            raise FileNotFoundError(f"prompts={path}: no such file; it holds one {wanted} a line")
        if not (lines := read_lines(path)):
            raise ValueError(f"prompts={path} holds no {wanted}; write one a line")
        return wanted, list(dict.fromkeys(lines))
    if values[wanted] is None and kind == "class":
        raise ValueError("this generator was trained on classes: give label=")
    return wanted, ["" if values[wanted] is None else str(values[wanted])]


def read_lines(path: Path) -> list[str]:
    """Reads the lines of a text file, each without blanks around it; blank ones are left out.

    Raises:
        ValueError: if it is a table, whose lines are no prompts; else as `read_text`.
    """
    if path.suffix.lower() in TABLES:
        raise ValueError(f"{path} is no list of lines; write the prompts or labels into a text file, one a line")
    return [line.strip() for line in read_text(path).split("\n") if line.strip()]


def notes_on(prompts: list[str], sampling: Sampling, notes: Callable[[str], list[str]]) -> list[str]:
    """Lists notes on the prompts that a user should see before generation begins.

    Args:
        notes: the condition's notes on a text.
    Raises:
        ValueError: for the first class that the model does not know.
    """
    found = [note for prompt in prompts for note in notes(prompt)]
    if sampling.negative is not None:
        found += [f"negative: {note}" for note in notes(sampling.negative)]
        if sampling.guidance.neutral:
            found.append("negative has no effect without guidance (guidance.first=1)")
    return list(dict.fromkeys(found))


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
    if file.video.moves:
        print(
            f"note: {path} moves; its first frame is taken, as of every picture: make it a gif or mp4 to go on from its end"
        )
    if file.video.transparent:
        print(f"note: transparent areas of {path} become white")
    return file.read(clip["height"], clip["width"]), {"given_sha256": file_sha256(path)}


def usual_length(history: Tensor | None, sampling: Sampling, trained: int) -> int:
    """Returns the pixel frames of a video if `frames` is not set: those of a training clip.

    With `extend: positions` and a history that is no shorter than a training clip, a clip's new frames (all but the first)
    are added to the history.
    """
    taken = 0 if history is None else history.shape[1]
    return taken + trained - 1 if sampling.extend == "positions" and taken >= trained else trained


def check_video_length(
    tokenizer: Loaded, size: tuple[int, int, int], history: Tensor | None, sampling: Sampling, trained: int
):
    """Checks that a video of this length can be made, and prints a note if it is longer than the training clips.

    Args:
        size: T, H, W of the video. history: (3, T0, H, W), the given frames. trained: T of the training clips.
    Raises:
        ValueError: if T is not 1 + 4n or not above T0, T0 is too long for one window, or the tokenizer cannot take T frames,
            such as one of images.
    """
    frames = size[0]
    latent_frames(frames)
    longest, overlap = sampling.window(trained, frames)
    windows(frames, longest, overlap)
    tokenizer.model.schedule(min(frames, longest), *size[1:])
    taken = 0 if history is None else history.shape[1]
    if taken >= longest == 1 and sampling.extend == "reencode":
        raise ValueError("this generator makes pictures, of one frame: it cannot go on from one; leave out image= and video=")
    if taken >= longest and sampling.extend == "reencode":
        least = max(1, longest - TAU)
        message = f"{taken} frames are given, but this generator makes clips of {longest}"
        raise ValueError(f"{message}: use history_frames={least} or less")
    if taken >= frames:
        raise ValueError(f"frames={frames}, of which {taken} are given: ask for more frames, or take fewer history_frames")
    if frames > trained and sampling.extend == "positions":
        print(f"note: {frames} frames in one sequence, {trained} were trained; extend=reencode stays within what was trained")
    elif frames > longest:
        how_made = f"{longest} at a time, each time from the last {overlap} on"
        print(f"note: {frames} frames, {how_made}; training saw {trained}, not what comes after them")
