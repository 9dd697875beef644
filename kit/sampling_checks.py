"""What a command checks, and tells its user, before it samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields

from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from kit.checkpoint import Loaded
from kit.generator.sampler import Sampling
from kit.sampling import windows
from kit.scales import TAU, latent_frames
from kit.words import typed_keys

MOST_NOTES = 9  # lines about prompts, of which there may be thousands


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
        raise ValueError("this generator makes pictures, of one frame: it cannot continue one; leave out image= and video=")
    if taken >= longest and sampling.extend == "reencode":
        most = max(1, longest - TAU)
        message = f"{taken} frames are given, but this generator makes clips of {longest}"
        raise ValueError(f"{message}: use history_frames={most} or less")
    if taken >= frames:
        raise ValueError(f"frames={frames}, of which {taken} are given: ask for more frames, or take fewer history_frames")
    if frames > trained and sampling.extend == "positions":
        print(f"note: {frames} frames in one sequence, {trained} were trained; extend=reencode stays within what was trained")
    elif frames > longest:
        how_made = f"{longest} at a time, each time from the last {overlap} on"
        print(f"note: {frames} frames, {how_made}; training saw {trained}, not what comes after them")


def check_none_samples(cfg: DictConfig, who: str):
    """Checks that no key is given on the command line that says how a generator samples, where none does.

    Args:
        who: what the command is about instead, in words.
    Raises:
        ValueError: if one is.
    """
    names = {"tokenizer", *(field.name for field in fields(Sampling))}
    if idle := [key for key in typed_keys() if key.split(".")[0] in names and OmegaConf.select(cfg, key) is not None]:
        raise ValueError(f"{', '.join(idle)}: how a generator samples, which {who} does not; leave it out")


def tell_notes(prompts: Sequence[str], sampling: Sampling, notes: Callable[[str], list[str]]):
    """Prints what a user should know of the prompts before generation begins, in MOST_NOTES lines at most.

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
    idle = {f"guidance.{name}" for name in sampling.guidance.unused}
    found += [f"{key} has no effect: guidance.kind={sampling.guidance.kind}" for key in typed_keys() if key in idle]
    distinct = list(dict.fromkeys(found))
    if len(distinct) > MOST_NOTES:
        distinct[MOST_NOTES - 1 :] = [f"and {len(distinct) - MOST_NOTES + 1} more such notes"]
    for note in distinct:
        print(f"note: {note}")
