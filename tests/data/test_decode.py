"""Decoding: both backends give the right frames of good files, and one clear error for bad ones."""

from __future__ import annotations

import ast
import gc
import pickle
import struct
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from kit.data import decode
from kit.data.decode import (
    BACKENDS,
    DecordDecoder,
    PyAVDecoder,
    UnreadableVideo,
    display_width,
    load_backend,
    open_video,
    true_rate,
    unpad_rows,
    upright,
)
from kit.media import write_video

CLIPS = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "clips"
FOUND = sorted(CLIPS.glob("*.*"))
COUNT = 60
STEP = 4  # of brightness from frame to frame
ALONE = "pools=none:frame-threads=1:log-level=none"  # x265: its threads may wait for each other forever at the end

both_backends = pytest.mark.parametrize("backend", BACKENDS)


def ramp(height: int = 48, width: int = 80) -> list[np.ndarray]:
    """Returns grey frames; frame i has the brightness STEP * i."""
    return [np.full((height, width, 3), STEP * i, np.uint8) for i in range(COUNT)]


def noise(height: int, width: int, count: int = 4) -> list[np.ndarray]:
    return list(np.random.default_rng(0).integers(0, 255, (count, height, width, 3), dtype=np.uint8))


def write(
    path: Path,
    images: list,
    codec="libx264",
    pix_fmt="yuv420p",
    gop=10,
    rotation=0,
    rate=25,
    times=(),
    aspect=None,
    **options,
) -> Path:
    """Writes a video. Args: times: of the frames, in milliseconds; aspect: of a pixel."""
    with av.open(str(path), "w", options={"movflags": "faststart"} if path.suffix == ".mp4" else {}) as container:
        stream = container.add_stream(codec, rate=rate, options=options)
        stream.height, stream.width = images[0].shape[:2]
        stream.pix_fmt, stream.gop_size, stream.bit_rate = pix_fmt, gop, 4_000_000
        if rotation:
            stream.set_display_rotation(rotation)
        if times:
            stream.codec_context.time_base = Fraction(1, 1000)
        if aspect:
            stream.codec_context.sample_aspect_ratio = Fraction(aspect)
        for number, image in enumerate(images):
            frame = av.VideoFrame.from_ndarray(image, "rgb24")
            if times:
                frame.pts, frame.time_base = times[number], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def trim(path: Path, start: int, stop: int) -> Path:
    """Writes the frames from `start` to `stop` of a video of 25 fps as phones do: an edit list hides the others."""
    trimmed = path.with_stem("trimmed")
    with av.open(str(path)) as source, av.open(str(trimmed), "w", options={"avoid_negative_ts": "disabled"}) as container:
        stream = container.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                shift = int(start / 25 / packet.time_base)
                packet.pts, packet.dts, packet.stream = packet.pts - shift, packet.dts - shift, stream
                container.mux(packet)
    content = bytearray(trimmed.read_bytes())
    struct.pack_into(">I", content, content.index(b"elst") + 12, (stop - start) * 1000 // 25)  # it counts milliseconds
    trimmed.write_bytes(content)
    return trimmed


def set_matrix(path: Path, *matrix: int) -> Path:
    """Puts (a, b, c, d) of a display matrix into the header of an mp4 of one track."""
    a, b, c, d = (number << 16 for number in matrix)
    content = bytearray(path.read_bytes())
    struct.pack_into(">9i", content, content.index(b"tkhd") + 44, a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(content)
    return path


def damage(path: Path, number: int) -> Path:
    """Overwrites a packet of a video by noise."""
    with av.open(str(path)) as container:
        packet = list(container.demux(video=0))[number]
        place, size = packet.pos, packet.size
    content = bytearray(path.read_bytes())
    content[place : place + size] = np.random.default_rng(0).bytes(size)
    path.write_bytes(content)
    return path


def write_audio(path: Path) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=44100, layout="mono")
        for i in range(20):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 44100, 1024 * i
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def numbers_seen(frames: np.ndarray) -> list[int]:
    """Returns the numbers of frames of the ramp, read from their brightness."""
    return np.rint(frames.mean(axis=(1, 2, 3)) / STEP).astype(int).tolist()


@pytest.mark.skipif(not FOUND, reason=f"the clips in {CLIPS} are not there")
def test_all_shared_clips_are_there():
    assert len(FOUND) == 19


@pytest.mark.skipif(not FOUND, reason=f"the clips in {CLIPS} are not there")
@pytest.mark.parametrize("path", FOUND, ids=lambda path: path.name)
def test_backends_agree_on_clips_from_the_wild(path):
    decord, pyav = (open_video(path, backend) for backend in ("decord", "pyav"))
    count = len(decord)
    assert len(pyav) == count >= 10
    assert pyav.fps == pytest.approx(decord.fps, rel=1e-3)
    indices = [count - 1, 0, count // 3, count // 3 + 2, count // 2]
    a, b = decord.frames(indices), pyav.frames(indices)
    assert a.shape == b.shape and a.dtype == b.dtype == np.uint8 and a.ndim == 4 and a.shape[3] == 3
    assert np.abs(a.astype(int) - b).mean(axis=(1, 2, 3)).max() < 1.5
    assert a.std() > 5  # a picture, not an empty buffer


CONTAINERS = {
    "b_frames.mp4": {"bf": "3"},
    "open_gop.mp4": {"codec": "libx265", "x265-params": f"open-gop=1:bframes=4:keyint=20:{ALONE}"},
    "open_gop.mkv": {"x264-params": "open-gop=1:bframes=3:b-adapt=0:keyint=10:scenecut=0"},
    "mpeg4.avi": {"codec": "mpeg4", "bf": "2"},
    "long_groups.avi": {"gop": 25},
    "mpeg2.mpg": {"codec": "mpeg2video", "bf": "2"},
    "vp8.webm": {"codec": "libvpx", "deadline": "realtime", "cpu-used": "8"},
    "quick.mov": {"codec": "mpeg4"},
    "grey.gif": {"codec": "gif", "pix_fmt": "gray"},
}


@both_backends
@pytest.mark.parametrize("name", CONTAINERS)
def test_frames_are_those_asked_for_in_that_order(tmp_path, name, backend):
    path = write(tmp_path / name, ramp(), **CONTAINERS[name])
    video = open_video(path, backend)
    assert len(video) == COUNT and video.fps == pytest.approx(25, rel=0.01)
    indices = [COUNT - 1, 9, 10, 11, 10, 38, 0]
    assert numbers_seen(video.frames(indices)) == indices
    for index in (0, 17, 29, 30, 31, 44, COUNT - 1):  # each from its own seek
        assert numbers_seen(open_video(path, backend).frames([index])) == [index]
        assert numbers_seen(video.frames([index])) == [index]


@both_backends
@pytest.mark.parametrize("name", CONTAINERS)
def test_a_walk_goes_forward_from_any_frame_and_may_stand_still(tmp_path, name, backend):
    video = open_video(write(tmp_path / name, ramp(), **CONTAINERS[name]), backend)
    for indices in (range(COUNT), [3, 3, 4, 40, 40, 41, COUNT - 1]):
        assert numbers_seen(np.stack(list(video.walk(indices)))) == list(indices)


def counting(monkeypatch) -> list[int]:
    """Returns a list to which the time of every frame that PyAV decodes from now on is added."""
    decoded, original = [], PyAVDecoder._decode

    def counted(self, seek_to=None):
        for frame in original(self, seek_to):
            decoded.append(frame.pts)
            yield frame

    monkeypatch.setattr(PyAVDecoder, "_decode", counted)
    return decoded


@pytest.mark.parametrize(("name", "most"), [("b_frames.mp4", 10), ("vp8.webm", 10), ("mpeg4.avi", 56)])
def test_pyav_decodes_from_the_keyframe_where_seeking_is_exact(tmp_path, monkeypatch, name, most):
    video = open_video(write(tmp_path / name, ramp(), **CONTAINERS[name]), "pyav")
    decoded = counting(monkeypatch)
    assert numbers_seen(video.frames([55])) == [55]
    assert len(decoded) <= most
    decoded.clear()
    video.frames([2])
    assert len(decoded) <= 3  # not on to the end


@pytest.mark.parametrize("name", ["b_frames.mp4", "vp8.webm", "grey.gif"])
def test_a_walk_decodes_each_frame_once_and_none_before_its_turn(tmp_path, monkeypatch, name):
    video = open_video(write(tmp_path / name, ramp(), **CONTAINERS[name]), "pyav")
    decoded = counting(monkeypatch)
    for number, _ in enumerate(video.walk(range(COUNT)), start=1):
        assert len(decoded) == number


def test_pyav_starts_over_when_a_seek_lands_too_late(tmp_path, monkeypatch):
    video = open_video(write(tmp_path / "a.mp4", ramp()), "pyav")
    exact = PyAVDecoder._from_keyframe
    monkeypatch.setattr(PyAVDecoder, "_from_keyframe", lambda self, first: exact(self, first + 15))
    assert numbers_seen(video.frames([20, 41])) == [20, 41]
    assert numbers_seen(np.stack(list(video.walk([20, 41])))) == [20, 41]


@both_backends
@pytest.mark.parametrize("rotation", [90, 180, -90])
def test_rotation_flag_is_applied(tmp_path, backend, rotation):
    image = np.zeros((96, 160, 3), np.uint8)
    image[:48, :80] = 255  # the stored upper left corner is white
    video = open_video(write(tmp_path / "a.mp4", [image] * 3, rotation=rotation), backend)
    frame = video.frames([1])[0]
    assert frame.shape == ((96, 160, 3) if rotation == 180 else (160, 96, 3))
    height, width = frame.shape[0] // 2, frame.shape[1] // 2
    corners = {"top left": frame[:height, :width], "bottom left": frame[height:, :width]}
    corners |= {"top right": frame[:height, width:], "bottom right": frame[height:, width:]}
    white = [name for name, corner in corners.items() if corner.mean() > 200]
    assert white == [{90: "bottom left", 180: "bottom right", -90: "top right"}[rotation]]


MATRICES = [
    *((1, 0, 0, 1), (0, 1, -1, 0), (-1, 0, 0, -1), (0, -1, 1, 0)),
    *((-1, 0, 0, 1), (1, 0, 0, -1), (0, 1, 1, 0), (0, -1, -1, 0)),  # mirrored
]


def shown(image: np.ndarray, a: int, b: int, c: int, d: int) -> np.ndarray:
    """What a player shows, pixel by pixel: that at column p, row q comes to column ap + cq, row bp + dq."""
    places = {(b * p + d * q, a * p + c * q): image[q, p] for q, p in np.ndindex(image.shape[:2])}
    rows, columns = (sorted({place[axis] for place in places}) for axis in (0, 1))
    return np.array([[places[row, column] for column in columns] for row in rows])


@pytest.mark.parametrize("matrix", MATRICES, ids=str)
def test_upright_turns_and_mirrors(matrix):
    image = np.arange(18).reshape(2, 3, 3)
    a, b, c, d = (number << 16 for number in matrix)
    assert np.array_equal(upright(image, (a, b, 0, c, d, 0, 0, 0, 1 << 30)), shown(image, *matrix))


@both_backends
@pytest.mark.parametrize("matrix", MATRICES, ids=str)
def test_a_display_matrix_is_applied(tmp_path, backend, matrix):
    """Front cameras of phones mirror, too."""
    image = np.zeros((32, 48, 3), np.uint8)
    image[:16, :24], image[:16, 24:] = 200, 100
    path = write(tmp_path / "a.mp4", [image] * 3, crf="1")
    stored = open_video(path, backend).frames([1])[0]
    assert np.array_equal(open_video(set_matrix(path, *matrix), backend).frames([1])[0], shown(stored, *matrix))


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_frames_of_a_camera_that_hold_exif_are_read(tmp_path, orientation):
    """PyAV gives no data beside a frame if it has no name for a part of it."""
    exif, pixels = Image.Exif(), np.zeros((48, 64, 3), np.uint8)
    exif[0x112], pixels[:16, :32] = orientation, 255
    Image.fromarray(pixels).save(tmp_path / "photo.jpg", exif=exif)
    with av.open(str(tmp_path / "camera.avi"), "w") as container:
        stream = container.add_stream("mjpeg", rate=8, width=64, height=48, pix_fmt="yuvj420p")
        for number in range(3):
            packet = av.Packet((tmp_path / "photo.jpg").read_bytes())
            packet.stream, packet.pts, packet.dts, packet.time_base = stream, number, number, Fraction(1, 8)
            container.mux(packet)
    shown = open_video(tmp_path / "photo.jpg").frames([0])
    assert np.abs(open_video(tmp_path / "camera.avi").frames([2]).astype(int) - shown).mean() < 3


def test_a_photo_with_a_preview_does_not_move(tmp_path):
    photo, other = Image.new("RGB", (64, 64)), Image.new("RGB", (64, 64), "white")
    for name, format in (("photo.jpg", "MPO"), ("moving.webp", "WEBP")):
        photo.save(tmp_path / name, format, save_all=True, append_images=[other])
    assert [open_video(tmp_path / name).moves for name in ("photo.jpg", "moving.webp")] == [False, True]


def test_headers_of_large_files_are_read(tmp_path):
    """These have sizes and times of 64 bits."""
    path = set_matrix(write(tmp_path / "a.mp4", ramp()[:3]), -1, 0, 0, 1)
    content, large = path.read_bytes(), struct.pack(">I4sQ", 1, b"free", 24) + bytes(8)
    place = content.index(b"moov") - 4
    path.write_bytes(content[:place] + large + content[place:])
    assert decode._mirrored(path)
    track = b"tkhd\1" + bytes(51) + struct.pack(">9i", -1, 0, 0, 0, 1, 0, 0, 0, 1)
    assert list(decode._matrices(track)) == [(-1, 0, 0, 0, 1)]


@both_backends
@pytest.mark.parametrize(("start", "stop"), [(0, 60), (1, 60), (15, 60), (15, 40), (20, 59), (0, 35)])
@pytest.mark.parametrize("b_frames", ["0", "3"])
def test_frames_that_are_cut_away_are_not_counted(tmp_path, backend, start, stop, b_frames):
    path = trim(write(tmp_path / "a.mp4", ramp(), gop=100, bf=b_frames), start, stop)
    video = open_video(path, backend)
    assert len(video) == stop - start and video.fps == 25
    assert numbers_seen(video.frames(range(len(video)))) == list(range(start, stop))
    assert numbers_seen(video.frames([len(video) - 1])) == [stop - 1]


@pytest.mark.parametrize("number", [20, 25, 40])
@pytest.mark.parametrize("indices", [[15], [18, 19], [20, 21, 30], range(12, 30)], ids=str)
def test_of_a_damaged_file_each_try_gives_the_same(tmp_path, number, indices):
    """decord reads ahead, and may report what is damaged there in place of a frame that is sound."""
    path = damage(write(tmp_path / "a.mp4", noise(96, 128, 50), bf="0"), number)

    def answer(backend):
        try:
            return open_video(path, backend).frames(indices).tobytes()
        except UnreadableVideo as error:
            return str(error)

    assert {answer("decord") for _ in range(15)} == {answer("pyav")}


VARIABLE = [33 * n for n in range(30)] + [957 + 100 * n for n in range(1, 31)]  # 60 frames, 3957 ms: 14.91 fps


@both_backends
@pytest.mark.parametrize(("name", "stated"), [("a.mkv", True), ("a.mkv", False), ("a.mp4", True)])
def test_a_variable_rate_is_the_average(tmp_path, backend, name, stated):
    path = write(tmp_path / name, ramp(), rate=30, times=VARIABLE)
    if not stated:
        content = path.read_bytes()
        place = content.index(b"\x23\xe3\x83\x84")  # DefaultDuration, 8 bytes with what follows; they become void
        path.write_bytes(content[:place] + b"\xec\x86" + bytes(6) + content[place + 8 :])
    video = open_video(path, backend)
    assert len(video) == COUNT and video.fps == 14.91


@both_backends
@pytest.mark.parametrize("name", ["a.mkv", "a.mp4", "a.mov", "a.webm"])
@pytest.mark.parametrize("rate", [24, Fraction(30000, 1001), Fraction(17), 60])
@pytest.mark.parametrize("count", [1, 2, 3, 25])
def test_a_constant_rate_is_what_the_file_states(tmp_path, backend, name, rate, count):
    path = write(tmp_path / name, ramp(32, 32)[:count], rate=rate, **({"codec": "libvpx"} if name == "a.webm" else {}))
    assert open_video(path, backend).fps == pytest.approx(float(rate), rel=1e-4)
    with av.open(str(path)) as container:
        assert open_video(path, backend).fps == float(container.streams.video[0].average_rate)


def test_rates_of_a_header_and_of_times():
    assert true_rate(30.0, [0, 0.033, 0.067]) == 30.0
    assert true_rate(30.0, [0, 0.1, 0.2]) == 10.0
    assert [true_rate(30.0, [n / rate for n in range(100)]) for rate in (29.9, 29.0)] == [30.0, 29.0]
    for nothing in (None, 0, float("nan"), float("inf")):
        assert true_rate(nothing, [0, 1, 3]) == 0.667
    for times in ([], [5], [5, 5]):
        assert true_rate(25.0, times) == 25.0
        with pytest.raises(ValueError, match="frame rate is None"):
            true_rate(None, times)


@both_backends
@pytest.mark.parametrize(("aspect", "width"), [("2", 96), ("128/117", 53), ("1/2", 24), ("2880/2873", 48), ("100", 48)])
def test_pixels_are_shown_as_wide_as_they_are(tmp_path, backend, aspect, width):
    image = np.zeros((32, 48, 3), np.uint8)
    image[:, :24] = 255
    path = write(tmp_path / "a.mp4", [image] * 3, aspect=aspect)
    frame = open_video(path, backend).frames([1])[0]
    assert frame.shape == (32, width, 3)
    assert frame[:, : width // 2 - 4].min() > 245 and frame[:, width // 2 + 4 :].max() < 10
    turned = open_video(set_matrix(path, 0, 1, -1, 0), backend).frames([1])[0]
    assert turned.shape == (width, 32, 3)


@both_backends
def test_a_stream_that_changes_its_size_keeps_that_of_its_start(tmp_path, backend):
    parts = [write(tmp_path / f"{height}.webm", ramp(height)[:10], "libvpx") for height in (48, 96)]
    path, stream = tmp_path / "a.webm", None
    with av.open(str(path), "w") as joined:
        for seconds, part in zip((0, 0.4), parts, strict=True):
            with av.open(str(part)) as container:
                stream = stream or joined.add_stream_from_template(container.streams.video[0])
                for packet in filter(lambda packet: packet.size, container.demux(video=0)):
                    later = round(seconds / packet.time_base)
                    packet.stream, packet.pts, packet.dts = stream, packet.pts + later, packet.dts + later
                    joined.mux(packet)
    frames = open_video(path, backend).frames([9, 19, 19])
    assert frames.shape == (3, 48, 80, 3) and np.abs(frames - 9.0 * STEP).max() <= STEP
    assert open_video(path, backend).frames([19]).shape == (1, 48, 80, 3)


def box(kind: bytes, *content: bytes) -> bytes:
    return struct.pack(">I4s", 8 + sum(map(len, content)), kind) + b"".join(content)


def write_tiled(path: Path, side: int = 64) -> Path:
    """Writes a picture of two tiles, left and right, as phones write their photos (HEIC, ISO/IEC 23008-12)."""
    tile = write(path.with_suffix(".mp4"), noise(side, side, 1), "libx265", **{"x265-params": f"bframes=0:{ALONE}"})
    with av.open(str(tile)) as container:
        (stream,) = container.streams.video
        coded = b"".join(bytes(packet) for packet in container.demux(stream) if packet.size)
        settings = bytes(stream.codec_context.extradata)
    grid = struct.pack(">BBBBHH", 0, 0, 0, 1, 2 * side, side)  # items: 1 is the grid, 2 and 3 are its tiles

    def header(start: int) -> bytes:
        tiles = [struct.pack(">HHHHII", item, 0, 0, 1, start, len(coded)) for item in (2, 3)]
        kinds = ((1, 0, b"grid"), (2, 1, b"hvc1"), (3, 1, b"hvc1"))
        sizes = [box(b"ispe", struct.pack(">III", 0, width, side)) for width in (2 * side, side)]
        places = [struct.pack(">IHH", 1 << 24, 0x4400, 3), struct.pack(">HHHHII", 1, 1, 0, 1, 0, len(grid)), *tiles]
        items = [box(b"infe", struct.pack(">IHH4sB", 2 << 24 | hidden, item, 0, kind, 0)) for item, hidden, kind in kinds]
        of_items = struct.pack(">II", 0, 3) + bytes([0, 1, 1, 0x81, 0, 2, 2, 0x82, 0x83, 0, 3, 2, 0x82, 0x83])
        return box(
            b"meta", bytes(4), box(b"hdlr", bytes(8), b"pict", bytes(13)), box(b"pitm", struct.pack(">IH", 0, 1)),
            box(b"iloc", *places), box(b"iinf", struct.pack(">IH", 0, 3), *items),
            box(b"iref", bytes(4), box(b"dimg", struct.pack(">HHHH", 1, 2, 2, 3))),
            box(b"iprp", box(b"ipco", *sizes, box(b"hvcC", settings)), box(b"ipma", of_items)), box(b"idat", grid),
        )  # fmt: skip

    kind = box(b"ftyp", b"heic", bytes(4), b"mif1heic")
    path.write_bytes(kind + header(len(kind) + len(header(0)) + 8) + box(b"mdat", coded))
    return path


@both_backends
def test_a_picture_in_tiles_is_not_taken_for_one_of_them(tmp_path, backend):
    path = write_tiled(tmp_path / "photo.heic")
    with pytest.raises(UnreadableVideo, match="photo.heic: .*it holds a picture in tiles.*save it as jpg or png"):
        open_video(path, backend)


def test_display_width():
    aspects = (None, Fraction(1), Fraction(64, 45), Fraction(8, 9), Fraction(100), Fraction(1, 100))
    assert [display_width(720, aspect) for aspect in aspects] == [720, 720, 1024, 640, 720, 720]


@pytest.mark.parametrize(("name", "options"), CONTAINERS.items(), ids=str)
def test_decord_is_used_where_it_is_right(tmp_path, name, options):
    expected = DecordDecoder if Path(name).suffix in (".mp4", ".mov", ".mkv", ".webm") else PyAVDecoder
    assert type(open_video(write(tmp_path / name, ramp(), **options), "decord")) is expected


@both_backends
def test_ten_bits(tmp_path, backend):
    """Both backends give the same pixels."""
    path = write(tmp_path / "a.mp4", noise(48, 80), pix_fmt="yuv420p10le")
    assert np.array_equal(open_video(path, backend).frames([1]), PyAVDecoder(path).frames([1]))


@pytest.mark.parametrize("width", [16, 24, 32, 48, 64, 96, 100, 144])
def test_narrow_videos_are_not_garbled(tmp_path, width):
    """decord returns frames of some widths with padded rows, as if they had more channels."""
    path = write(tmp_path / "a.mp4", noise(48, width), crf="1")
    decord, pyav = (open_video(path, backend).frames(range(4)) for backend in ("decord", "pyav"))
    assert decord.shape == (4, 48, width, 3)
    assert np.abs(decord.astype(int) - pyav).mean() < 1.5


def test_unpad_rows():
    image = noise(5, 6, 1)[0]
    padded = np.zeros((5, 24), np.uint8)
    padded[:, :18] = image.reshape(5, 18)
    assert np.array_equal(unpad_rows(padded.reshape(5, 6, 4)), image)
    assert np.array_equal(unpad_rows(image), image)


@both_backends
def test_main_stream_is_not_always_the_first(tmp_path, backend):
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        streams = [container.add_stream("libx264", rate=25) for _ in range(2)]
        for stream, (height, width) in zip(streams, ((32, 32), (128, 160)), strict=True):
            stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
            stream.disposition = av.stream.Disposition.default if height == 128 else av.stream.Disposition.comment
        for _ in range(5):
            for stream in streams:
                image = noise(stream.height, stream.width, 1)[0]
                container.mux(stream.encode(av.VideoFrame.from_ndarray(image, "rgb24")))
        for stream in streams:
            container.mux(stream.encode())
    assert open_video(tmp_path / "a.mkv", backend).frames([0]).shape == (1, 128, 160, 3)


@pytest.fixture
def broken(tmp_path) -> dict[str, Path]:
    """Files that no backend can open."""
    whole = write(tmp_path / "whole.mp4", ramp()).read_bytes()
    contents = {
        "header": whole[:48],
        "without_index": whole[-400:],
        "empty": b"",
        "text": b"this is not a video\n" * 50,
        "random": np.random.default_rng(0).bytes(5000),
        "audio": write_audio(tmp_path / "audio.mp4").read_bytes(),
    }
    paths = {name: tmp_path / f"{name}.mp4" for name in contents}
    for name, path in paths.items():
        path.write_bytes(contents[name])
    (tmp_path / "folder.mp4").mkdir()
    return paths | {"missing": tmp_path / "missing.mp4", "folder": tmp_path / "folder.mp4"}


@both_backends
@pytest.mark.parametrize("kind", ["header", "without_index", "empty", "text", "random", "audio", "missing", "folder"])
def test_broken_files_are_one_clear_error(broken, kind, backend):
    with pytest.raises(UnreadableVideo) as caught:
        open_video(broken[kind], backend)
    error = caught.value
    assert error.path == broken[kind] and error.reason
    assert str(error) == f"cannot read the video {error.path}: {error.reason}. Check, re-encode or remove the file."
    if kind == "audio":
        assert error.reason == "ValueError: the file holds no video stream"


@both_backends
def test_truncated_file_gives_its_beginning_and_fails_at_its_end(tmp_path, backend):
    path = write(tmp_path / "a.mp4", noise(96, 96, 40))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    video = open_video(path, backend)
    assert 10 < len(video) < 30
    assert video.frames(range(10)).shape == (10, 96, 96, 3)
    try:
        assert video.frames([len(video) - 1]).shape == (1, 96, 96, 3)  # the cut frame may be made up for ...
    except UnreadableVideo as error:
        assert str(path) in str(error)  # ... or be reported


def test_frames_that_never_come_are_an_error(tmp_path, monkeypatch):
    video = open_video(write(tmp_path / "a.avi", ramp(), codec="mpeg4"), "pyav")
    monkeypatch.setattr(video, "_count", COUNT + 5)
    with pytest.raises(UnreadableVideo, match=f"frame {COUNT + 2} of {COUNT + 5} cannot be decoded"):
        video.frames([1, COUNT + 2])


@both_backends
@pytest.mark.parametrize("indices", [[], [-1], [COUNT]])
def test_wrong_indices_are_the_callers_mistake(tmp_path, backend, indices):
    video = open_video(write(tmp_path / "a.mp4", ramp()), backend)
    with pytest.raises(IndexError, match=str(COUNT)):
        video.frames(indices)


def test_error_survives_the_way_from_a_worker():
    error = UnreadableVideo("a.mp4", "too short")
    copy = pickle.loads(pickle.dumps(error))
    assert str(copy) == str(error) and copy.reason == "too short" and isinstance(copy, RuntimeError)


def test_the_file_that_another_process_runs_needs_nothing_of_kit():
    """Where kit is not installed that process could not import it."""
    nodes = list(ast.walk(ast.parse(Path(decode.__file__).read_text())))
    modules = [node.module for node in nodes if isinstance(node, ast.ImportFrom)]
    modules += [name.name for node in nodes if isinstance(node, ast.Import) for name in node.names]
    assert "numpy" in modules and not [module for module in modules if module.split(".")[0] == "kit"]


def test_unknown_backend_names_the_choices():
    with pytest.raises(ValueError, match="backend=opencv; expected one of: decord, pyav"):
        open_video("a.mp4", "opencv")


@pytest.mark.parametrize(("backend", "module", "package"), [("decord", "decord", "decord2"), ("pyav", "av", "av")])
def test_missing_package_names_what_to_install(monkeypatch, backend, module, package):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=f"{backend}.*pip install {package}$"):
        load_backend(backend)


@pytest.mark.parametrize("fps", [None, 0, -1, float("nan"), float("inf")])
def test_nonsensical_frame_rates_are_refused(fps):
    with pytest.raises(ValueError, match="frame rate"):
        decode._valid_rate(fps)


@both_backends
def test_a_name_may_have_a_colon(tmp_path, monkeypatch, backend):
    """FFmpeg takes what comes before a colon for a protocol."""
    write(tmp_path / "10-30.mp4", ramp(48, 80)[:3]).rename(tmp_path / "10:30.mp4")
    monkeypatch.chdir(tmp_path)
    assert open_video("10:30.mp4", backend).frames([0, 2]).shape == (2, 48, 80, 3)


def test_frames_are_freed_as_they_are_passed(tmp_path):
    """PyAV's frames whose side data was read refer to themselves: they filled the memory until garbage was collected."""
    path = write_video(torch.zeros(3, 60, 32, 32), tmp_path / "a.mp4", 8)
    gc.collect()
    gc.disable()
    try:
        for _ in PyAVDecoder(path).walk(range(60)):
            pass
        frames = sum(type(each).__name__ == "SideDataContainer" for each in gc.get_objects())
    finally:
        gc.enable()
    assert frames <= 1
