"""Decoding of video files behind one small interface, by decord (the default) or PyAV.

A decoder is opened for one clip and then dropped: an open decord reader may crash when threads share it and hangs when a
forked process inherits it. This file imports nothing from kit, and nothing slow, because `kit.data.decoder_process` runs it.
"""

from __future__ import annotations

import faulthandler
import importlib
import math
import os
import re
import signal
import struct
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from fractions import Fraction
from itertools import islice
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from PIL import Image, ImageOps

if TYPE_CHECKING:
    import av

# Containers that store a time with every frame and seek exactly, as FFmpeg calls them. AVI has no such times, a seek in MPEG
# lands anywhere near, and each frame of a GIF needs the ones before it.
SEEKABLE_FORMATS = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm")
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".avif", ".bmp", ".tif", ".tiff")
FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "BMP", "TIFF", "GIF")  # Pillow knows some that are programs, as PostScript
REORDERED = 16  # frames that a codec may store out of order, at most
FAR = 32  # frames; a seek pays if the wanted frame is farther ahead
TICK = 0.001  # seconds: Matroska's times are rounded to it
PIECE = 16 * 2**20  # bytes of decoded frames that are handed on together, about


class UnreadableVideo(RuntimeError):
    """A file that cannot be opened or decoded, whatever the backend's own error was.

    Attributes: path (the file), reason (what the backend said).
    """

    def __init__(self, path: str | Path, reason: str):
        super().__init__(path, reason)  # as given, so that it can be pickled by a worker process
        self.path, self.reason = path, reason

    def __str__(self) -> str:
        if is_picture(self.path):
            return f"cannot read the picture {self.path}: {self.reason}. Check or remove the file."
        return f"cannot read the video {self.path}: {self.reason}. Check, re-encode or remove the file."


class Decoder(ABC):
    """An opened video file.

    Attributes: path; fps, the average number of frames per second; transparent, whether parts were, which are white now;
    moves, whether it is a picture of several frames, of which the first is read.
    `len` is the number of frames.
    Class attributes: module, what is imported; package, what pip installs for it.
    """

    module: ClassVar[str]
    package: ClassVar[str]
    path: Path
    fps: float
    transparent: bool = False
    moves: bool = False

    def notes(self) -> list[str]:
        """Says in words what of the file is not read as it is."""
        first = f"{self.path} moves; its first frame is taken, as of every picture: a gif or mp4 is read whole"
        white = f"transparent areas of {self.path} become white"
        return [first] * self.moves + [white] * self.transparent

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def walk(self, indices: Iterable[int]) -> Iterator[np.ndarray]:
        """Yields the frames with these numbers, one by one, as a player shows them: uint8 RGB (H, W, 3). Goes forward
        through the file once.

        Args:
            indices: ascending, repeats allowed.
        Raises:
            as `frames`, when that frame is reached.
        """

    def pieces(self, indices: Iterable[int]) -> Iterator[np.ndarray]:
        """Yields what `walk` does, several frames at a time, (n, H, W, 3): all of a small clip, few of a large one."""
        held = []
        for frame in self.walk(indices):
            held.append(frame)
            if len(held) * frame.nbytes >= PIECE:
                yield np.stack(held)
                held = []
        if held:
            yield np.stack(held)

    def frames(self, indices: Iterable[int]) -> np.ndarray:
        """The frames with these numbers, in this order, as a player shows them: uint8 RGB (T, H, W, 3).

        Raises:
            UnreadableVideo: if one of them cannot be decoded.
            IndexError: if there are no indices or one is not in [0, len).
        """
        indices = _valid_indices(indices, len(self))
        ascending = sorted(set(indices))
        found = dict(zip(ascending, self.walk(ascending), strict=True))
        return np.stack([found[i] for i in indices])


def open_video(path: str | Path, backend: str = "decord") -> Decoder:
    """Opens a video file, or a picture. What decord would read wrongly or cannot open goes to PyAV.

    Raises:
        UnreadableVideo: if the file is missing, damaged or holds no video.
        ValueError, ImportError: as `load_backend`.
    """
    path, decoder = Path(path), load_backend(backend)
    if is_picture(path):
        return PictureDecoder(path)
    if decoder is DecordDecoder and decord_is_right(path):
        with suppress(UnreadableVideo):
            return DecordDecoder(path)
    return load_backend("pyav")(path)


def is_picture(path: str | Path) -> bool:
    return Path(path).suffix.lower() in PICTURES


def decord_is_right(path: Path) -> bool:
    """Returns whether decord reads a file as players show it, by its header. It does not:

    - if it is AVI, MPEG or GIF: frames are wrong;
    - if an edit list cuts some of its frames away: they are counted, and visible ones come more than once;
    - if it is mirrored, or its pixels are not square: both are ignored;
    - if it has more than 8 bits a channel: colours differ from PyAV's, which continues where decord meets damage.

    A file that PyAV cannot open is left to it, too: its errors say more.
    """
    try:
        import av

        with av.open(str(path.absolute())) as container:
            stream = _video_stream(container)
            visible = stream.duration * stream.time_base * stream.average_rate if stream.frames else 0
            return (
                container.format.name in SEEKABLE_FORMATS
                and abs(stream.frames - visible) < 0.5
                and display_width(stream.width, stream.sample_aspect_ratio) == stream.width
                and stream.format.components[0].bits == 8
                and not _mirrored(path)
            )
    except Exception:
        return False


def load_backend(name: str) -> type[Decoder]:
    """Imports a backend's package, and returns its decoder class.

    Raises:
        ValueError: if there is no such backend.
        ImportError: if its package is not installed.
    """
    if name not in BACKENDS:
        raise ValueError(f"backend={name}; expected one of: {', '.join(BACKENDS)}")
    decoder = BACKENDS[name]
    try:
        importlib.import_module(decoder.module)
    except ImportError as error:
        raise ImportError(f"the video backend {name!r} needs a package: pip install {decoder.package}") from error
    return decoder


class DecordDecoder(Decoder):
    """Decodes with decord, which is fast and turns rotated files upright by itself.

    While the caller works on a frame of `walk`, decord decodes ahead without limit and keeps the frames in memory. It reports
    damage that it meets there in place of a sound frame, or not, by chance: after an error the answer is that of PyAV, which
    gives the same pixels.
    """

    module, package = "decord", "decord2"

    def __init__(self, path: Path):
        import decord

        self.path = path
        with _reporting(path):
            self._reader = decord.VideoReader(str(path.absolute()), ctx=decord.cpu(0), num_threads=1)
            times = self._reader.get_frame_timestamp(range(len(self._reader)))[:, 0]
            known = times.min() > -1e9  # unknown ones are the least number there is
            self.fps = true_rate(self._reader.get_avg_fps(), times.tolist() if known else [])

    def __len__(self) -> int:
        return len(self._reader)

    def walk(self, indices: Iterable[int]) -> Iterator[np.ndarray]:
        indices, given = _valid_indices(indices, len(self)), 0
        with suppress(Exception):
            for pixels in self._walk(indices):
                given += 1
                yield pixels
        if given < len(indices):
            with _reporting(self.path):
                yield from islice(PyAVDecoder(self.path).walk(indices), given, None)  # all, so that chance has no part in it

    def _walk(self, indices: list[int]) -> Iterator[np.ndarray]:
        position = -FAR - 1
        for index in indices:
            if index - position > FAR:
                position = self._start_before(index)
                self._reader.seek_accurate(position)
            while position <= index:  # by single frames: get_batch fails on widths such as 16, 96 and 144
                frame = self._reader.next()
                position += 1
            yield unpad_rows(frame.asnumpy())

    def _start_before(self, index: int) -> int:
        """Returns a frame at or before `index` that decord seeks to exactly.

        decord misses frames stored right after a keyframe but shown before it (open groups of pictures). Where every frame
        is a keyframe, there are none.
        """
        keys = [key for key in self._reader.get_key_indices() if key <= index]
        while keys and len(keys) <= index and keys[-1] > max(0, index - REORDERED):
            index = keys.pop() - 1
        return index


class PyAVDecoder(Decoder):
    """Decodes with PyAV (FFmpeg).

    It counts packets to know the length, because the headers of GIF, WebM or MPEG do not state it.
    """

    module, package = "av", "av"

    def __init__(self, path: Path):
        import av

        self.path = path
        with _reporting(path):
            _require_content(path)
            with av.open(str(path.absolute())) as container:
                stream = _video_stream(container)
                packets = [(p.pts, p.is_keyframe) for p in container.demux(stream) if p.size and not p.is_discard]
                if not packets:
                    raise ValueError("its video stream is empty")
                times = {pts for pts, _ in packets}
                known = None not in times and len(times) == len(packets)
                times = sorted(times) if known else []
                header = stream.average_rate or stream.guessed_rate
                self.fps = true_rate(header, [float(pts * stream.time_base) for pts in times])
                self._size = stream.height, display_width(stream.width, stream.sample_aspect_ratio)
                self._seekable = known and container.format.name in SEEKABLE_FORMATS
        self._count = len(packets)
        if self._seekable:
            self._number = {pts: number for number, pts in enumerate(times)}  # time -> number of the frame
            self._keyframes = sorted(pts for pts, is_keyframe in packets if is_keyframe)

    def __len__(self) -> int:
        return self._count

    def walk(self, indices: Iterable[int]) -> Iterator[np.ndarray]:
        indices = _valid_indices(indices, len(self))
        with _reporting(self.path):
            found = 0
            for numbered in self._ways(indices[0]):
                for pixels in _forward(numbered, indices[found:], self._size):
                    found += 1
                    yield pixels
                if found == len(indices):
                    return
            raise ValueError(f"frame {indices[found]} of {len(self)} cannot be decoded")

    def _ways(self, first: int) -> Iterator[Iterator[tuple[int, av.VideoFrame]]]:
        """Yields numbered frames for each way to decode: from the keyframe before frame `first`, then from the start of the
        file.

        The start is for containers that cannot seek, and for a seek that landed too late.
        """
        if self._seekable:
            yield self._from_keyframe(first)
        yield self._from_start()

    def _from_start(self) -> Iterator[tuple[int, av.VideoFrame]]:
        yield from enumerate(self._decode())

    def _from_keyframe(self, first: int) -> Iterator[tuple[int, av.VideoFrame]]:
        """Numbered frames from the last keyframe shown at or before frame `first`."""
        keyframe = max((pts for pts in self._keyframes if self._number[pts] <= first), default=None)
        for frame in self._decode(keyframe):
            yield self._number.get(frame.pts, -1), frame

    def _decode(self, seek_to: int | None = None) -> Iterator[av.VideoFrame]:
        import av

        with av.open(str(self.path.absolute())) as container:  # absolute: `10:30.mp4` alone reads as a protocol
            stream = _video_stream(container)
            stream.codec_context.thread_count = 1  # parallelism belongs to the loader's workers
            if seek_to is not None:
                container.seek(seek_to, stream=stream)
            yield from container.decode(stream)


class PictureDecoder(Decoder):
    """Decodes a picture as a video of one frame at one frame per second; transparent areas become white."""

    module, package = "PIL", "pillow"
    fps = 1.0

    def __init__(self, path: Path):
        self.path = path
        with _reporting(path), Image.open(path, formats=FORMATS) as picture:
            if picture.mode.startswith(("I", "F")):  # its conversion to RGBA would be white, or black
                raise ValueError("it has 16 bits a pixel or more, expected 8")
            self.moves = getattr(picture, "is_animated", False) and picture.format != "MPO"  # of photos with a preview
            upright = ImageOps.exif_transpose(picture).convert("RGBA")
            self.transparent = upright.getextrema()[-1][0] < 255
            self._pixels = np.array(Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright))[..., :3]

    def __len__(self) -> int:
        return 1

    def walk(self, indices: Iterable[int]) -> Iterator[np.ndarray]:
        for _ in _valid_indices(indices, 1):
            yield self._pixels


BACKENDS: dict[str, type[Decoder]] = {"decord": DecordDecoder, "pyav": PyAVDecoder}


def true_rate(header: float | None, times: Sequence[float]) -> float:
    """Returns the average number of frames per second.

    It is what the header says, unless the times contradict it by more than 1 %: those of files of variable rate may.

    Args:
        header: the rate that the file states. times: of its frames in seconds, ascending; none if they are not known.
    Raises:
        ValueError: if neither gives a rate.
    """
    steps, seconds = len(times) - 1, times[-1] - times[0] if times else 0
    stated = bool(header) and 0 < header < math.inf
    if seconds > 0 and not (stated and abs(steps / header - seconds) <= 0.01 * seconds + TICK):
        return _valid_rate(round(steps / seconds, 3))  # rounded, since decord's times are: both backends say the same
    return _valid_rate(header)


def display_width(width: int, aspect: Fraction | None) -> int:
    """Returns the width of a frame as shown.

    Args:
        width: as stored. aspect: of a pixel, width by height. One that is square to 1 %, or beyond 8 to 1, is ignored.
    """
    stretched = aspect and 0.01 < abs(aspect - 1) and 1 / 8 <= aspect <= 8
    return round(width * aspect) if stretched else width


def upright(pixels: np.ndarray, matrix: Sequence[float]) -> np.ndarray:
    """Turns and mirrors an image (H, W, 3) as a file's display matrix says, in quarter turns.

    Args:
        matrix: (a, b, u, c, d, v, x, y, w): the pixel at column p, row q is shown at column ap + cq, row bp + dq.
    """
    a, b, _, c, d = matrix[:5]
    if abs(b) > abs(a):
        pixels, a, d = pixels.swapaxes(0, 1), c, b
    return pixels[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]


def _display_matrix(frame: av.VideoFrame) -> Sequence[float]:
    """Returns the display matrix of a frame, at least what `upright` takes of it."""
    try:
        matrix = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:  # beside data that PyAV has no name for, such as EXIF, it gives the rotation alone
        angle = math.radians(-frame.rotation)
        return math.cos(angle), math.sin(angle), 0, -math.sin(angle), math.cos(angle)
    return (1, 0, 0, 0, 1) if matrix is None else struct.unpack("=9i", matrix)


def unpad_rows(frame: np.ndarray) -> np.ndarray:
    """Removes the padding of decord's rows: (H, W, C) -> (H, W, 3); C > 3 means rows of W pixels followed by padding."""
    height, width, _ = frame.shape
    return frame.reshape(height, -1)[:, : 3 * width].reshape(height, width, 3)


def _forward(
    numbered: Iterator[tuple[int, av.VideoFrame]], indices: Sequence[int], size: tuple[int, int]
) -> Iterator[np.ndarray]:
    """Yields the frames with ascending `indices` as shown; stops at the first that is missing.

    Args:
        size: (H, W) as shown, before they are turned; 0 where the header has none. Frames of another are scaled to it, as
            decord does: a stream may change its size in its midst.
    """
    at, frame, matrices = -1, None, {}
    height, width = size
    for index in indices:
        while at < index:
            at, frame = next(numbered, (math.inf, None))
        if at > index:
            return
        pixels = frame.to_ndarray(format="rgb24", width=width or None, height=height or None)
        if (turned := frame.rotation) not in matrices:  # a frame whose side data was read stays until garbage is collected
            matrices[turned] = _display_matrix(frame)
        yield upright(pixels, matrices[turned])


def _video_stream(container: av.container.InputContainer) -> av.VideoStream:
    """Returns the stream that FFmpeg considers the main one, as decord does: it is not always the first.

    Raises:
        ValueError: if there is none, or it is but a part of a picture, as in the HEIC files of phones.
    """
    stream = container.streams.best("video")
    if stream is None:
        raise ValueError("the file holds no video stream")
    if stream.disposition & stream.disposition.dependent:
        raise ValueError("it holds a picture in tiles, which are not put together here: save it as jpg or png")
    return stream


def _mirrored(path: Path) -> bool:
    """Whether a track of an mp4 or mov file is mirrored when shown: the determinant of its display matrix is below 0.

    PyAV gives that matrix with decoded frames only, and to decode one takes longer than all the rest of the header.
    """
    with path.open("rb") as file:
        while len(head := file.read(16)) == 16:
            size, kind, large = struct.unpack(">I4sQ", head)
            size = large if size == 1 else size
            if kind == b"moov":
                return any(a * d < b * c for a, b, _, c, d in _matrices(file.read(size)))
            if size < 8:  # 0: the last one extends to the end
                break
            file.seek(size - len(head), os.SEEK_CUR)
    return False


def _matrices(header: bytes) -> Iterator[tuple[int, ...]]:
    """Yields what `upright` takes of the display matrix of each track (`tkhd`) in the header of an mp4 or mov file."""
    for track in re.finditer(rb"tkhd([\0\1])", header):
        yield struct.unpack_from(">5i", header, track.end() + (51 if track[1] == b"\1" else 39))


def _require_content(path: Path) -> None:
    if path.stat().st_size == 0:
        raise ValueError("the file is empty")


def _valid_rate(fps: float | None) -> float:
    if not fps or not 0 < fps < float("inf"):
        raise ValueError(f"its frame rate is {fps}")
    return float(fps)


def _valid_indices(indices: Iterable[int], count: int) -> list[int]:
    indices = [int(i) for i in indices]
    if not indices or min(indices) < 0 or max(indices) >= count:
        raise IndexError(f"frame numbers {indices} of a video of {count} frames; expected one or more in [0, {count})")
    return indices


@contextmanager
def _reporting(path: Path) -> Iterator[None]:
    """Turns any error into `UnreadableVideo`, because error types differ between backends and kinds of damage."""
    try:
        yield
    except UnreadableVideo:
        raise
    except Exception as error:
        summary = next(iter(str(error).splitlines()), "no reason given").rstrip(".")
        raise UnreadableVideo(path, f"{type(error).__name__}: {summary}") from error


def serve(connection: Connection):
    """Decodes for a `kit.data.decoder_process.DecoderProcess` at the other end until it closes the connection.

    A request is (path, backend, numbers, seconds). It asks for the frames with these numbers or, if `numbers` is None, for
    the number of frames and the frames per second. The answers are ("found", frames) for some frames after others, and at
    last ("done", frames or both numbers), ("unreadable", reason) or ("error", error). An answer that takes more than
    `seconds` ends this process.
    """
    for name in ("SIGTERM", "SIGUSR1", "SIGINT"):  # they go to a whole job; the asking process ends this one
        if hasattr(signal, name):  # Windows has no SIGUSR1
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    video, opened = None, None

    def answer(*told):
        try:
            connection.send(told)
        except OSError:  # nobody waits for it any more
            sys.exit()

    connection.send("ready")
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), sys.stderr.fileno())  # decoders report each damaged frame there, without its file
        while True:
            try:
                path, backend, numbers, seconds = connection.recv()
            except (EOFError, OSError):  # OSError: closed without reading the last answer
                return
            faulthandler.dump_traceback_later(seconds, exit=True, file=nowhere)  # works while a decoder holds the GIL
            try:
                if numbers is None or opened != (path, backend):
                    video, opened = None, None  # one file at a time
                    video, opened = open_video(path, backend), (path, backend)
                found = None
                for piece in [(len(video), video.fps)] if numbers is None else video.pieces(numbers):
                    if found is not None:
                        faulthandler.cancel_dump_traceback_later()  # who asked may take its time with it
                        answer("found", found)
                        faulthandler.dump_traceback_later(seconds, exit=True, file=nowhere)
                    found = piece
                end = "done", found
            except UnreadableVideo as error:
                end = "unreadable", error.reason
            except Exception as error:
                end = "error", error
            faulthandler.cancel_dump_traceback_later()
            answer(*end)


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])))
