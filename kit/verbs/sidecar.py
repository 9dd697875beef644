"""The sidecar: the JSON beside a generated video, with the settings from which it can be made again."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

from kit.files import file_sha256, no_file, read_json
from kit.generator.sampler import Sampling
from kit.words import typed_keys

# keys of conf/generate.yaml that decide how a video looks, apart from prompt, label and seed
LOOKS = ("image", "video", "history_frames", "frames", "fps", "precision", *(field.name for field in fields(Sampling)))
CHECKPOINTS = ("ckpt", "tokenizer")  # these too; they may move
SETTINGS = (*CHECKPOINTS, *LOOKS)


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
    def own_settings(self) -> dict:
        """Settings with the seed of this video."""
        return {**self.settings, "seed": self.seed}

    @property
    def sidecar(self) -> dict:
        """What the JSON beside the finished mp4 holds. Raises OSError if there is no mp4."""
        return {**self.about, "video_sha256": file_sha256(self.path), "settings": self.own_settings}

    @property
    def sidecar_path(self) -> Path:
        return self.path.with_suffix(".json")

    @property
    def done(self) -> bool:
        """Whether the file was made with exactly these settings, and is still as it was written."""
        try:
            return read_json(self.sidecar_path) == self.sidecar
        except (OSError, ValueError):
            return False

    def differs(self, settings: dict) -> bool:
        """Returns whether the settings of a sidecar make another video; checkpoints may have moved."""
        return any(settings.get(name) != value for name, value in self.own_settings.items() if name not in CHECKPOINTS)


def read_sidecar(path: Path) -> dict:
    """Reads the JSON beside a video.

    Raises:
        FileNotFoundError: if it does not exist. ValueError: if it is not one of this version.
    """
    if not path.is_file():
        raise FileNotFoundError(f"settings={path}: {no_file(path)}; it is the JSON beside a video that `generate` has made")
    if path.suffix == ".mp4":
        raise ValueError(f"settings={path} is the video; give the JSON beside it, {path.with_suffix('.json').name}")
    sidecar = read_json(path)
    found = sidecar.get("settings") if isinstance(sidecar, dict) else None
    known = isinstance(found, dict) and {"seed", *SETTINGS} <= set(found) <= {"seed", "prompt", "label", *SETTINGS}
    if not known or not isinstance(found["guidance"], dict):
        raise ValueError(f"settings={path} is not the JSON beside a video that `generate` of this version of kit has made")
    return sidecar


def merged(values: dict, found: dict, typed: list[str]) -> dict:
    """Merges the values of conf/generate.yaml with a sidecar's settings.

    Args:
        typed: keys given on the command line, which take precedence; another prompt, picture or video replaces all that the
            sidecar says of the old one. `ckpt` and `tokenizer`, if given, say where the checkpoints are now.
    """
    if {"prompt", "label", "prompts"} & {*typed}:
        found = {**found, "prompt": None, "label": None}
    begins = {"image": "video", "video": "image"}  # key -> the key that it replaces
    left = {name for key, name in begins.items() if key in typed and values[key] is not None}
    found = {**found, **{name: None for name in left - {*typed}}}
    moved = {name: values[name] for name in CHECKPOINTS if values[name] is not None}
    result = {**values, "prompt": None, "label": None, "prompts": None, "n": 1, **found, **moved}
    for name, _, part in (key.partition(".") for key in typed):
        result[name] = {**result[name], part: values[name][part]} if part else values[name]
    if result["video"] is None and "history_frames" not in typed:  # they were those of a video that is left out now
        result["history_frames"] = None
    return result


def with_settings(values: dict) -> tuple[dict, dict]:
    """Merges the values of conf/generate.yaml with those of the sidecar that `settings` names, if any.

    `settings=FILE temperature=0.5` makes a variant of that video.

    Returns:
        the merged values, and the sidecar, which is empty without `settings`. If another picture or video is given, the
        sidecar lacks the hash of the old one.
    Raises:
        FileNotFoundError: if the picture or video that the sidecar names does not exist; else as `read_sidecar`.
    """
    if values["settings"] is None:
        return values, {}
    path, typed = Path(values["settings"]), typed_keys()
    sidecar = read_sidecar(path)
    found, result = sidecar["settings"], merged(values, sidecar["settings"], typed)
    given = found["image"] or found["video"]
    if any(result[name] != found[name] for name in ("image", "video")):  # another one is given
        sidecar = {key: value for key, value in sidecar.items() if key != "given_sha256"}
    elif given and not Path(given).is_file():
        raise FileNotFoundError(f"settings={path} is of a video that begins with {given}, which is not there")
    changed = [key for key in typed if key.split(".")[0] in ("prompt", "label", "prompts", "seed", "n", *LOOKS)]
    print(f"note: all but {', '.join(['where the checkpoints are', *changed])} is taken from {path}")
    return result, sidecar


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
