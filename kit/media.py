"""Videos and pictures for people to look at. Videos are (3, T, H, W) in [-1, 1]."""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from kit.files import written_aside
from kit.pixels import to_bytes

COLUMNS = 8  # frames of a video in a contact sheet
LINES, LINES_MOVING = 16, 4  # of a title, at most
NARROWEST_TITLE = 88  # pixels: where clips are narrower, their titles push them apart
FONTS = "NotoSansCJK-Regular.ttc", "DejaVuSans.ttf"  # of the machine, for letters that Pillow's own font lacks
NARROWEST, WIDEST = 2, 16384  # pixels of a side that libx264 takes
WEBP_WIDEST = 16383  # pixels of a side that a WebP has


def to_uint8(video: Tensor) -> np.ndarray:
    """(3, T, H, W) in [-1, 1] -> (T, H, W, 3) in 0..255, rounded."""
    return to_bytes(video.detach()).permute(1, 2, 3, 0).cpu().numpy()


class Oversized(ValueError):
    """Raised for sides that a format does not have."""


@contextmanager
def video_writer(path: Path, fps: float, height: int, width: int) -> Iterator[Callable[[Tensor], None]]:
    """Writes an H.264 mp4 that browsers play, whole or not at all. Its sizes are even, as the format requires: of odd ones
    the last row or column is there twice.

    Yields:
        a function that adds the next frames (3, n, height, width), any number of them.
    Raises:
        Oversized: if a side is too short or too long for the format.
    """
    if not NARROWEST <= min(height, width) <= max(height, width) <= WIDEST:
        raise Oversized(f"{path}: an mp4 has {NARROWEST} to {WIDEST} pixels a side, not {width} x {height}; cut the picture")
    twice = (0, 0), (0, height % 2), (0, width % 2), (0, 0)  # of a video (T, H, W, 3)
    with written_aside(path.absolute()) as aside, av.open(str(aside), "w") as container:  # `12:30/a.mp4` reads as a protocol
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        stream.width, stream.height, stream.pix_fmt = width + width % 2, height + height % 2, "yuv420p"
        stream.codec_context.colorspace = Colorspace.ITU601  # FFmpeg's choice for RGB; players guess another for large videos
        stream.codec_context.color_range = ColorRange.MPEG
        # With its macroblock tree x264 writes the same small frames differently from run to run. `veryfast` takes half the
        # time of the default, for files of the same size.
        stream.options = {"crf": "12", "mbtree": "0", "preset": "veryfast"}

        def add(video: Tensor):
            for frame in np.pad(to_uint8(video), twice, mode="edge"):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))

        yield add
        container.mux(stream.encode())


def write_video(video: Tensor, path: str | Path, fps: float) -> Path:
    """Writes one clip as `video_writer` does."""
    path = Path(path)
    with video_writer(path, fps, *video.shape[-2:]) as add:
        add(video)
    return path


def spread(frames: int) -> list[int]:
    """Numbers of at most COLUMNS of `frames` frames, evenly spread from the first to the last."""
    return sorted(set(np.linspace(0, frames - 1, COLUMNS).round().astype(int).tolist()))


def clip_by_clip(rows: dict[str, Tensor], clips: int) -> list[dict[str, Tensor]]:
    """Regroups videos by clip, as `contact_sheet` takes them.

    Args:
        rows: row name -> videos (n, 3, T, H, W). clips: number of clips to take, from the first.
    Returns:
        row name -> video (3, T, H, W), for each clip.
    """
    return [dict(zip(rows, videos)) for videos in zip(*(videos[:clips] for videos in rows.values()), strict=True)]


def font_for(text: str, size: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    """Returns Pillow's own font, which has the letters of English alone, or for others the first of FONTS that is there."""
    for name in () if text.isascii() else FONTS:
        with suppress(OSError):
            return ImageFont.truetype(name, size)
    return ImageFont.load_default(size)


def wrapped(text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width: int, most: int) -> list[str]:
    """Breaks a text, with its own line breaks taken for blanks, into at most `most` lines of at most `width` pixels."""
    text = " ".join(text.split())
    start = round(1.2 * width * len(text) / (font.getlength(text) or 1))  # a line may have narrower ones than the whole
    for letters in range(max(start, 5), 4, -1):
        lines = textwrap.wrap(text, letters, max_lines=most, placeholder=" ...")
        if all(font.getlength(line) <= width for line in lines):
            break
    return lines


def contact_sheet(groups: list[dict[str, Tensor]], titles: list[str], path: str | Path, height: int = 64) -> Path:
    """Writes one PNG: for each group its title, and below it a row of frames for each of its videos.

    Args:
        groups: each row name -> video.
        titles: of the groups, such as prompts, in as many lines as they need.
        height: pixels of a frame in the picture, approximately: frames are enlarged by a whole factor and never reduced.
    """
    font = font_for("".join(titles), 13)
    margin, gap, line = 108, 2, 16
    first = next(iter(groups[0].values()))
    zoom = max(1, round(height / first.shape[-2]))
    frame_h, frame_w = first.shape[-2] * zoom, first.shape[-1] * zoom
    width = margin + max(len(spread(v.shape[1])) for g in groups for v in g.values()) * (frame_w + gap)
    rows = []
    for group, title in zip(groups, titles, strict=True):
        rows.append(wrapped(title, font, width - 8, LINES) or [""])
        rows.extend(group.items())

    total = sum(line * len(row) + 4 if isinstance(row, list) else frame_h + gap for row in rows)
    sheet = Image.new("RGB", (width, total + 6), "white")
    draw = ImageDraw.Draw(sheet)
    y = 2
    for row in rows:
        if isinstance(row, list):
            for text in row:
                draw.text((4, y + 2), text, fill="black", font=font)
                y += line
            y += 4
            continue
        name, video = row
        draw.text((4, y + frame_h // 2 - 8), name, fill=(90, 90, 90), font=font)
        for column, pixels in enumerate(to_uint8(video[:, spread(video.shape[1])])):
            picture = Image.fromarray(pixels).resize((frame_w, frame_h), Image.Resampling.NEAREST)
            sheet.paste(picture, (margin + column * (frame_w + gap), y))
        y += frame_h + gap
    path = Path(path)
    with written_aside(path) as aside:
        sheet.save(aside)
    return path


def moving_sheet(groups: list[dict[str, Tensor]], titles: list[str], path: str | Path, fps: float, height: int = 96) -> Path:
    """Writes one animated WebP, which browsers play over and over: for each group a column under its title, with all frames
    of its videos one below another. Of many, as many groups as the format has room for.

    Args:
        groups, titles: as of `contact_sheet`; all videos are of one shape. fps: frames a second.
        height: pixels of a frame in the picture, roughly: it is enlarged by a whole factor, or reduced to twice that height.
    """
    font, margin, gap, line = font_for("".join(titles), 12), 96, 2, 15
    names, (T, H, W) = list(groups[0]), next(iter(groups[0].values())).shape[1:]
    zoom = max(1, round(height / H)) if H <= 2 * height else 2 * height / H
    h, w = round(H * zoom), round(W * zoom)
    step = max(w, NARROWEST_TITLE) + gap  # from one column to the next
    groups = groups[: max(1, (WEBP_WIDEST - margin) // step)]
    heads = [wrapped(title, font, step - 6, LINES_MOVING) for title in titles[: len(groups)]]
    top = line * max(map(len, heads)) + 6

    def corner(column: int, row: int) -> tuple[int, int]:
        return margin + column * step, top + row * (h + gap)

    empty = Image.new("RGB", corner(len(groups), len(names)), "white")
    draw = ImageDraw.Draw(empty)
    for column, lines in enumerate(heads):
        draw.multiline_text((corner(column, 0)[0], 2), "\n".join(lines), fill="black", font=font, spacing=2)
    for row, name in enumerate(names):
        draw.text((4, corner(0, row)[1] + h // 2 - 8), name, fill=(90, 90, 90), font=font)
    pictures = [empty.copy() for _ in range(T)]
    for (column, group), (row, name) in itertools.product(enumerate(groups), enumerate(names)):
        for picture, frame in zip(pictures, to_uint8(group[name]), strict=True):
            how = Image.Resampling.NEAREST if zoom >= 1 else Image.Resampling.BOX
            picture.paste(Image.fromarray(frame).resize((w, h), how), corner(column, row))
    path = Path(path)
    with written_aside(path) as aside:
        duration = round(1000 / fps)  # milliseconds
        pictures[0].save(aside, save_all=True, append_images=pictures[1:], duration=duration, loop=0, quality=80)
    return path
