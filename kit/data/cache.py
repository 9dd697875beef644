"""Cache of encoded clips: a generator trains on it without drawing, decoding or encoding a clip again.

A cache is a folder. Its `manifest.json` says what the clips are and which files hold them. Each split has files of up to
`CLIPS` clips, `train_00000.safetensors` and so on, with `feature` (n, d, F, h, w) float16 as `Tokenizer.encode` gives it,
`label` (n,) int64, and `given` (n,) int64, how many first latent frames of each clip are not to be predicted; captions are
in the header.

A cache of clips in buckets has a cache of training clips for each, in a subfolder of the bucket's name (17x96x160); its own
files are the clips to validate on, which have one shape.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError, safe_open

from kit.data.buckets import Bucket, read_shape
from kit.data.source import BucketPart, ClipSource
from kit.files import file_sha256, read_json
from kit.scales import latent_frames
from kit.values import check_whole_number, clip_shape, hash_of

MANIFEST = "manifest.json"
CLIPS = 512  # in a file


class CacheFile(NamedTuple):
    """Items `first` to `first + clips` - 1 of a split, and the file that holds them."""

    split: str
    name: str
    first: int
    clips: int


def files_of(clips: dict[str, int]) -> list[CacheFile]:
    """Lists the files of a cache, given the number of clips of each split."""
    return [
        CacheFile(split, f"{split}_{first // CLIPS:05d}.safetensors", first, min(CLIPS, total - first))
        for split, total in clips.items()
        for first in range(0, total, CLIPS)
    ]


def is_whole(path: Path, file: CacheFile) -> bool:
    """Whether a file exists, is not cut off, and holds the right number of clips."""
    try:
        with safe_open(path, "pt") as contents:
            return contents.get_slice("feature").get_shape()[0] == file.clips
    except (OSError, SafetensorError):
        return False


def read_manifest(folder: Path) -> dict:
    """Reads the manifest of a finished cache.

    Raises:
        FileNotFoundError: if there is no cache. ValueError: if it is not finished, or holds other than shapes and numbers.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no cache ({MANIFEST} is missing); `python -m kit cache` makes one")
    manifest = read_json(path)
    if "files" not in manifest:
        raise ValueError(f"the cache in {folder} is not finished; give the `python -m kit cache ...` that began it once more")
    try:
        _check_manifest(manifest)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        reason = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise ValueError(f"{path} is not as `python -m kit cache` writes it: {reason}; make the cache once more") from error
    return manifest


def _check_manifest(manifest: dict):
    """Checks that the numbers and shapes in a manifest are such. Raises ValueError, or whatever comes of a missing one."""
    clip_shape(manifest["about"]["clip"], "clip")
    for bucket in manifest["about"].get("buckets", []):
        read_shape(bucket)
    for split, number in manifest["clips"].items():
        check_whole_number(f"clips.{split}", number, 0)
    if (needed := sum(-(-number // CLIPS) for number in manifest["clips"].values())) > (found := len(manifest["files"])):
        raise ValueError(f"it lists {found} files, its clips need {needed}")


def of_manifest(folder: str, key: str):
    """Reads `frames`, `height`, `width` or `fps` of the clips in a cache, or its `buckets`. Raises as `read_manifest`."""
    about = read_manifest(Path(folder))["about"]
    return about.get("buckets", []) if key == "buckets" else about["clip"][key]


def open_cache(root: str | Path, split: str = "train", **shape_and_verify) -> CachedClips | CachedBuckets:
    """Opens the clips of a split of a cache, which for training may be in buckets; further arguments as `CachedClips`."""
    if split == "train" and of_manifest(root, "buckets"):
        return CachedBuckets(root, verify=shape_and_verify.get("verify", False))
    return CachedClips(root, split, **shape_and_verify)


class EncodedClips(ClipSource):
    """What the clips of a cache offer, in buckets or not.

    Attributes:
        root: the cache's folder. fps: frames per second of the clips. contents: hash of the files that hold them.
    """

    root: Path
    fps: float
    contents: str

    @property
    def name(self) -> str:
        return str(self.root)

    @property
    def native_fps(self) -> float:
        return self.fps

    @property
    def draws(self) -> dict:
        return {"contents": self.contents}


class CachedClips(EncodedClips):
    """Data set of the clips in a cache, read from disk as they are asked for.

    Items are {"feature": (d, F, h, w) float16, "caption": str, "label": int, "given": int}, numbered from 0 without end: the
    clips repeat.

    Args:
        root: the cache's folder. split: `train` or `val`.
        frames: T of the clips; None: as cached. With fewer, items are the beginnings of the clips, exactly as if encoded
            alone, because encoding is causal.
        height, width, fps: must be those of the cache; None accepts any.
        verify: compare the hash of each file now, which reads them all; else only their sizes.
    Attributes:
        contents: hash of the files of the split. classes, captioned, fps: those of the encoded data set.
    Raises:
        FileNotFoundError, ValueError: as `read_manifest`, if the clips have another shape, or if a file is damaged.
    """

    def __init__(
        self, root: str | Path, split: str = "train", frames: int | None = None, height: int | None = None,
        width: int | None = None, fps: float | None = None, verify: bool = False,
    ):  # fmt: skip
        self.root, manifest = Path(root), read_manifest(Path(root))
        about, self.count = manifest["about"], manifest["clips"].get(split)
        if self.count is None:
            raise ValueError(f"split={split!r} is not in the cache {root}; it has {', '.join(manifest['clips'])}")
        clip, asked = about["clip"], {"frames": frames, "height": height, "width": width, "fps": fps}
        for key, value in asked.items():
            if value is not None and value != clip[key] and not (key == "frames" and value < clip[key]):
                raise ValueError(f"data.{key}={value}, but the clips of the cache {root} have {clip[key]}; leave it out")
        self.latents = latent_frames(frames or clip["frames"])
        self.tokenizer, self.classes, self.captioned = about["tokenizer"], tuple(about["classes"]), about["captioned"]
        self.fps = clip["fps"]
        names = [file.name for file in files_of({split: self.count})]
        self.written = [self._check(name, manifest["files"], verify) for name in names]
        self.contents = hash_of(manifest["files"][name]["sha256"] for name in names)

    def _check(self, name: str, files: dict, verify: bool) -> tuple[str, int]:
        path = self.root / name
        if not path.is_file():
            raise FileNotFoundError(f"{path}, a part of the cache, is missing; make it once more with `python -m kit cache`")
        found = path.stat()
        if found.st_size != files[name]["bytes"] or verify and file_sha256(path) != files[name]["sha256"]:
            raise ValueError(f"{path} is damaged; remove it, and make it once more with `python -m kit cache`")
        return str(path), found.st_mtime_ns

    def __getitem__(self, n: int) -> dict:
        number, row = divmod(n % self.count, CLIPS)
        features, labels, given, captions = _open(*self.written[number])
        words = {"caption": captions[row], "label": labels[row]}
        return {"feature": features[row, :, : self.latents], "given": given[row], **words}

    def texts(self) -> list[dict]:
        return [{"caption": caption} for file in self.written for caption in _open(*file)[-1]]


class CachedBuckets(EncodedClips):
    """The training clips of a cache in buckets, for `BucketClips`.

    Args:
        root: the cache's folder. verify: as for `CachedClips`.
    Attributes:
        parts: bucket, such as 17x96x160 -> its clips. contents, classes, captioned, fps: as of `CachedClips`.
    Raises:
        as `CachedClips`.
    """

    def __init__(self, root: str | Path, verify: bool = False):
        self.root = Path(root)
        self.parts = {name: CachedClips(self.root / name, verify=verify) for name in of_manifest(root, "buckets")}
        first, *_ = self.parts.values()
        self.tokenizer, self.classes, self.captioned = first.tokenizer, first.classes, first.captioned
        self.fps = first.fps
        self.contents = hash_of(part.contents for part in self.parts.values())

    def texts(self) -> list[dict]:
        return [text for part in self.parts.values() for text in part.texts()]

    def in_buckets(self, buckets: Sequence[Bucket]) -> list[BucketPart | None]:
        """Finds the clips that were encoded in each bucket. Raises ValueError if the cache has no such bucket."""
        if missing := [str(bucket) for bucket in buckets if str(bucket) not in self.parts]:
            raise ValueError(f"data.buckets: the cache {self.root} has no {missing[0]}; choose from {', '.join(self.parts)}")
        parts = [self.parts[str(bucket)] for bucket in buckets]
        return [BucketPart(part, part.count, part.count) for part in parts]

    def __getitem__(self, n: int):
        raise ValueError(f"the clips of the cache {self.root} are in buckets: leave out data.buckets=, which are the cache's")


@functools.lru_cache(maxsize=64)
def _open(path: str, written: int):
    """Opens a file of a cache: its features, which stay on disk until they are read, labels, given frames and captions.

    Args:
        written: the file's time of modification, so that a rewritten file is opened anew.
    """
    file = safe_open(path, "pt")
    labels = file.get_tensor("label").tolist()
    given = file.get_tensor("given").tolist() if "given" in file.keys() else [0] * len(labels)  # noqa: SIM118, no dict
    return file.get_slice("feature"), labels, given, json.loads(file.metadata()["captions"])
