"""Decoding: both backends give the right frames of good files, and one clear error for bad ones."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path

import av
import numpy as np
import pytest

from kit.data import decode
from kit.data.decode import BACKENDS, PyAVDecoder, UnreadableVideo, load_backend, open_video, unpad_rows, upright

CLIPS = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "clips"
FOUND = sorted(CLIPS.glob("*.*"))
COUNT = 60
STEP = 4  # of brightness from frame to frame

both_backends = pytest.mark.parametrize("backend", BACKENDS)


def ramp(height: int = 48, width: int = 80) -> list[np.ndarray]:
    """Returns grey frames; frame i has the brightness STEP * i."""
    return [np.full((height, width, 3), STEP * i, np.uint8) for i in range(COUNT)]


def noise(height: int, width: int, count: int = 4) -> list[np.ndarray]:
    return list(np.random.default_rng(0).integers(0, 255, (count, height, width, 3), dtype=np.uint8))


def write(path: Path, images: list, codec="libx264", pix_fmt="yuv420p", gop=10, rotation=0, **options) -> Path:
    with av.open(str(path), "w", options={"movflags": "faststart"} if path.suffix == ".mp4" else {}) as container:
        stream = container.add_stream(codec, rate=25, options=options)
        stream.height, stream.width = images[0].shape[:2]
        stream.pix_fmt, stream.gop_size, stream.bit_rate = pix_fmt, gop, 4_000_000
        if rotation:
            stream.set_display_rotation(rotation)
        for image in images:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, "rgb24")))
        container.mux(stream.encode())
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
    "open_gop.mp4": {"codec": "libx265", "x265-params": "open-gop=1:bframes=4:keyint=20:log-level=none"},
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


def test_upright_turns_counterclockwise():
    image = np.arange(6).reshape(2, 3, 1)
    assert upright(image, 90)[:, :, 0].tolist() == [[2, 5], [1, 4], [0, 3]]
    assert upright(image, -180)[:, :, 0].tolist() == [[5, 4, 3], [2, 1, 0]]
    assert np.array_equal(upright(image, 0.0), image)


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
    error, other = caught.value, {"decord": "pyav", "pyav": "decord"}[backend]
    assert error.path == broken[kind] and error.backend == backend and error.reason
    for part in (str(broken[kind]), f"backend={backend!r}", error.reason, f"it may also be read with backend={other!r}"):
        assert part in str(error)


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
    error = UnreadableVideo("a.mp4", "too short", "pyav")
    copy = pickle.loads(pickle.dumps(error))
    assert str(copy) == str(error) and copy.reason == "too short" and isinstance(copy, RuntimeError)


def test_unknown_backend_names_the_choices():
    with pytest.raises(ValueError, match="'opencv'.*decord, pyav"):
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
