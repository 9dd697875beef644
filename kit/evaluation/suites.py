"""Prompt suites: videos for each prompt, under the names that VBench looks for.

Facts about VBench are taken from github.com/Vchitect/VBench: vbench/__init__.py (file names), static_filter.py and
prompts/README.md (sampling).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from kit.files import file_sha256, read_json, read_lines, write_json
from kit.media import write_video
from kit.sampling import seed_of
from kit.values import hash_of

FLICKERING = "temporal_flickering"  # for this dimension VBench reads videos that hold still, so that more are needed
NAME_BYTES = 255  # longest file name on common file systems
READABLE_BYTES = 150  # kept of a prompt in a shortened file name
PARTS = ".*.part.mp4"  # what a killed run may leave of a video that it was writing


@dataclass(frozen=True)
class Prompt:
    """A prompt and the number of videos to make for it."""

    text: str
    samples: int


def read_prompts(path: str | Path, samples: int, flickering_samples: int) -> list[Prompt]:
    """Reads a prompt suite: a text file of one prompt a line, or VBench's VBench_full_info.json.

    Blank lines, and blanks around a line, are dropped. A repeated prompt is kept once, in its first place, with the greater
    number of videos.

    Args:
        samples: videos of a prompt.
        flickering_samples: videos of a prompt that VBench uses for temporal flickering; a text file does not mark these.
    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not UTF-8, not of the format or empty.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no prompts at {path}; give a text file, one prompt a line, or VBench_full_info.json")
    if path.suffix.lower() == ".json":
        found = [(text, flickering_samples if FLICKERING in names else samples) for text, names in _read_full_info(path)]
    else:
        found = [(line, samples) for line in read_lines(path)]
    if not found:
        raise ValueError(f"{path} holds no prompt; write one a line")
    wanted: dict[str, int] = {}
    for text, count in found:
        wanted[text] = max(count, wanted.get(text, 0))
    return [Prompt(text, count) for text, count in wanted.items()]


def _read_full_info(path: Path) -> list[tuple[str, list[str]]]:
    """Reads prompts and dimensions of VBench's list. The text is kept as it is: VBench looks for it in file names."""
    entries = read_json(path)
    if not isinstance(entries, list):
        raise ValueError(f"{path} holds a {type(entries).__name__}, expected a list of prompts as VBench_full_info.json has")
    for number, entry in enumerate(entries, 1):
        fields = entry if isinstance(entry, dict) else {}
        text, names = fields.get("prompt_en"), fields.get("dimension")
        if not isinstance(text, str) or not text.strip() or not isinstance(names, list):
            raise ValueError(
                f'{path}, entry {number}: expected {{"prompt_en": a text, "dimension": a list of names, ...}} as in '
                f"VBench_full_info.json, found {json.dumps(entry)[:100]}"
            )
    return [(entry["prompt_en"], entry["dimension"]) for entry in entries]


def video_name(text: str, index: int) -> str:
    """File name of a prompt's video number `index`, as VBench looks for it: `{prompt}-{index}.mp4`.

    A prompt that cannot be a POSIX file name (a slash, a NUL, too long) is shortened and distinguished by its hash.
    """
    name = f"{text}-{index}.mp4"
    if not re.search(r"[/\0]", text) and len(name.encode()) <= NAME_BYTES:
        return name
    readable = re.sub(r"[/\0]", " ", text).encode()[:READABLE_BYTES].decode(errors="ignore")
    return f"{readable} {hash_of([text], 12)}-{index}.mp4"


def video_table(prompts: list[Prompt], seed: int) -> dict[str, dict]:
    """All videos of a suite in their order: file name -> prompt, index and seed.

    Raises:
        ValueError: if two prompts would share a file.
    """
    table: dict[str, dict] = {}
    for place, prompt in enumerate(prompts):
        for index in range(prompt.samples):
            name = video_name(prompt.text, index)
            if name in table:
                raise ValueError(
                    f"the prompts {table[name]['prompt']!r} and {prompt.text!r} share the file {name!r}; leave one out"
                )
            table[name] = {"prompt": prompt.text, "index": index, "seed": seed_of(seed, place, index)}
    return table


def write_suite(
    sample: Callable[[list[str], list[int]], Tensor], prompts: list[Prompt], folder: str | Path, settings: dict, *,
    seed: int, batch_size: int, fps: float,
) -> Path:  # fmt: skip
    """Makes the videos of a suite that do not exist yet or are damaged; call it again after an interruption, one process at
    a time.

    The folder gets `videos`, with the videos and nothing else (VBench takes the suffix of any file there for that of the
    videos), `videos.json` (`video_table`, also of videos still to come, and the hash of each that is made) and `suite.json`
    (what all videos have in common).

    Args:
        sample: prompts and seeds, n each -> (n, 3, T, H, W) in [-1, 1].
        settings: what else decides how a video looks (the model's hash, guidance, ...), as JSON values; a folder made with
            other settings is refused. The number of videos of a prompt may change: more are added.
        batch_size: videos to make at once. seed: at least 0.
    Returns:
        the folder of the videos.
    Raises:
        ValueError: if the folder holds videos made with other settings.
    """
    folder = Path(folder)
    videos = folder / "videos"
    texts = json.dumps([prompt.text for prompt in prompts])
    common = {"seed": seed, "fps": fps, "prompts": hash_of([texts], 16)}
    table = video_table(prompts, seed)
    _claim(folder, settings | common)
    path = folder / "videos.json"
    known = read_json(path) if path.exists() else {}
    known |= {name: known.get(name, {}) | entry for name, entry in table.items()}
    write_json(path, known)
    videos.mkdir(exist_ok=True)
    for aside in videos.glob(PARTS):
        aside.unlink()

    names = list(table)
    missing = {name for name in names if not _is_whole(videos / name, known[name].get("sha256"))}
    with tqdm(total=len(names), initial=len(names) - len(missing), desc="suite", unit="video", disable=None) as bar:
        for start in range(0, len(names), batch_size):
            batch = names[start : start + batch_size]
            if missing.isdisjoint(batch):
                continue
            # Make the whole batch even if part of it exists: rounding may depend on the other clips of the batch.
            clips = sample([table[name]["prompt"] for name in batch], [table[name]["seed"] for name in batch])
            for name, clip in zip(batch, clips, strict=True):
                if name in missing:
                    known[name]["sha256"] = file_sha256(write_video(clip, videos / name, fps))
                    bar.update()
            write_json(path, known)
    return videos


def _is_whole(path: Path, sha256: str | None) -> bool:
    """Whether a video exists and is as it was written; None: its hash is not known, as of a run that was killed beside it."""
    return path.exists() and sha256 in (None, file_sha256(path))


def _claim(folder: Path, settings: dict):
    """Writes suite.json, or compares it if there is one. Raises: ValueError if the folder has videos of other settings."""
    path = folder / "suite.json"
    settings = json.loads(json.dumps(settings))  # as JSON returns them
    begun = any(not video.match(PARTS) for video in (folder / "videos").glob("*.mp4"))
    if path.exists() and not begun:
        (folder / "videos.json").unlink(missing_ok=True)
        write_json(path, settings)
    elif path.exists():
        found = read_json(path)
        for key in sorted(settings | found):
            if settings.get(key) != found.get(key):
                raise ValueError(
                    f"{folder} holds the videos of another suite: {key} is {found.get(key)!r} in its suite.json, "
                    f"now {settings.get(key)!r}; give another folder, or delete this one to make its videos anew"
                )
    elif (folder / "videos").exists():
        raise ValueError(f"{folder} holds videos but no suite.json that says how they were made; give another folder")
    else:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(path, settings)
