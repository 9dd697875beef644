"""`kit prepare fluent_emoji`: downloads are checked before they are opened, and stopped ones continue."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import tarfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kit.cli import main
from kit.data.clips import FolderClips
from kit.data.decode import open_video
from kit.machine import cache_folder
from kit.prepare import fluent_emoji
from kit.prepare.fluent_emoji import FPS, FRAMES, SIDE, TARBALL, animation, caption, prepare_fluent_emoji
from tests.processes import Command

LEVELS = [5 * n for n in range(30)]


pytestmark = pytest.mark.usefixtures("empty_cache")


def webp(frames: list[np.ndarray]) -> bytes:
    """Encodes RGBA frames (H, W, 4) as a lossless WebP; one frame gives a still picture."""
    first, *rest = map(Image.fromarray, frames)
    file = io.BytesIO()
    first.save(file, "WEBP", save_all=bool(rest), append_images=rest, duration=42, lossless=True)
    return file.getvalue()


def grey(level: int) -> np.ndarray:
    return np.full((96, 96, 4), (level, level, level, 255), np.uint8)


def package(path: Path, pictures: dict[str, bytes]) -> Path:
    """Writes a tarball in the layout of npm packages."""
    contents = {"package.json": b"{}", "assets/.gitkeep": b""} | {f"assets/{code}.webp": w for code, w in pictures.items()}
    with tarfile.open(path, "w:gz", compresslevel=1) as archive:
        for name, content in contents.items():
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def hash_of(path: Path) -> str:
    return "sha512-" + base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode()


@pytest.fixture
def archive(tmp_path, monkeypatch) -> Path:
    """A package with two animated emoji and a still one, in place of the real one."""
    moving = webp([grey(level) for level in LEVELS])
    path = package(tmp_path / "emoji.tgz", {"1f385-1f3fb": moving, "0023-fe0f-20e3": webp([grey(0)]), "1f300": moving})
    monkeypatch.setattr(fluent_emoji, "INTEGRITY", hash_of(path))
    return path


class Registry(ThreadingHTTPServer):
    """Serves a package at the path that npm registries use.

    Attributes: cut, number of bytes after which the next answer ends; ranges, whether Range requests are answered; asked, the
        Range of each request.
    """

    def __init__(self, package: Path):
        super().__init__(("127.0.0.1", 0), Answer)
        self.content = package.read_bytes()
        self.cut, self.ranges, self.asked = None, True, []


class Answer(BaseHTTPRequestHandler):
    def do_GET(self):
        registry, wanted = self.server, self.headers.get("Range")
        registry.asked.append(wanted)
        if self.path != "/@lobehub/fluent-emoji-anim-1/-/fluent-emoji-anim-1-1.0.0.tgz":
            return self.send_error(404)
        start = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1]) if wanted and registry.ranges else 0
        if start >= len(registry.content):
            return self.send_error(416)
        rest = registry.content[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(rest)))
        self.end_headers()
        self.wfile.write(rest[: registry.cut])
        registry.cut = None

    def log_message(self, *_):
        """Keeps the tests' output clean."""


@pytest.fixture
def registry(archive, tmp_path, monkeypatch):
    """A server with the package, which a fake npm on the PATH names as its registry."""
    server = Registry(archive)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    npm(tmp_path, monkeypatch, f'[ "$*" = "config get registry" ] && echo http://127.0.0.1:{server.server_port}/')
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def npm(folder: Path, monkeypatch, line: str) -> None:
    program = folder / "bin" / "npm"
    program.parent.mkdir(exist_ok=True)
    program.write_text(f"#!/bin/sh\n{line}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent))


def run(tmp_path, *words: str) -> int:
    return main(["prepare", "fluent_emoji", f"root={tmp_path / 'runs'}", *words])


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_package_becomes_captioned_clips(registry, tmp_path, capsys):
    assert run(tmp_path) == 0
    folder = cache_folder() / "fluent_emoji"
    told = capsys.readouterr().out
    assert f"{folder}\n2 clips" in told and f"fit conf=stage1_tokenizer data=clips data.root={folder}" in told
    assert "1 pictures that do not move, 0 that cannot be read" in told
    assert names(folder) == ["1f300.mp4", "1f385-1f3fb.mp4", "captions.csv"]
    assert names(cache_folder()) == ["fluent_emoji", "fluent_emoji.lock"]  # the package itself is not kept

    clips = FolderClips(folder, split="all", frames=FRAMES, height=SIDE, width=SIDE)
    assert [clips[n]["caption"] for n in range(2)] == ["cyclone", "father christmas fitzpatrick type-1-2"]
    assert clips[0]["video"].shape == (3, FRAMES, SIDE, SIDE) and clips.native_fps == FPS
    expected = np.array(LEVELS)[np.linspace(0, len(LEVELS) - 1, FRAMES).astype(int)] / 127.5 - 1
    assert np.abs(clips[0]["video"].mean((0, 2, 3)).numpy() - expected).max() < 0.02

    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert run(tmp_path) == 0 and len(registry.asked) == 1
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_a_package_at_hand_is_taken_and_kept(archive, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert run(tmp_path, f"source={archive}") == 0
    assert archive.is_file() and len(names(cache_folder() / "fluent_emoji")) == 3


def test_transparent_pictures_are_composed_on_white():
    """A half-transparent box moves and leaves no trace."""
    frames = [np.zeros((64, 64, 4), np.uint8) for _ in range(FRAMES)]
    expected = np.full((FRAMES, 64, 64, 3), 255)
    for n, (frame, seen) in enumerate(zip(frames, expected)):
        frame[8:24, n : n + 16] = (255, 0, 0, 128)
        seen[8:24, n : n + 16] = (255, 127, 127)
        frame[40:56, 2 * n : 2 * n + 8] = (0, 0, 255, 255)
        seen[40:56, 2 * n : 2 * n + 8] = (0, 0, 255)
    video = (animation(webp(frames)).permute(1, 2, 3, 0).numpy() + 1) * 127.5
    assert np.abs(video - expected).max() <= 1


def test_a_cut_download_goes_on_from_where_it_was(registry, tmp_path, capsys):
    registry.cut = 100
    assert run(tmp_path) == 1
    assert "stopped after 100 bytes" in (told := capsys.readouterr().err) and "run it again" in told
    assert (cache_folder() / TARBALL).stat().st_size == 100 and names(cache_folder() / "fluent_emoji") == []
    assert run(tmp_path) == 0
    assert registry.asked == [None, "bytes=100-"]


def test_a_server_that_gives_no_parts_gives_the_whole(registry, tmp_path):
    registry.ranges = False
    cache_folder().mkdir()
    (cache_folder() / TARBALL).write_bytes(registry.content[:100])
    assert run(tmp_path) == 0 and registry.asked == ["bytes=100-"]


def test_a_download_that_is_there_is_not_asked_for(registry, tmp_path):
    cache_folder().mkdir()
    (cache_folder() / TARBALL).write_bytes(registry.content)
    assert run(tmp_path) == 0 and registry.asked == []


@pytest.mark.parametrize("there", ["beginning", "as much"])
def test_what_has_another_hash_is_removed_unopened(registry, tmp_path, capsys, there):
    foreign = b"x" * (100 if there == "beginning" else len(registry.content))
    cache_folder().mkdir()
    (cache_folder() / TARBALL).write_bytes(foreign)
    assert run(tmp_path) == 1
    told = capsys.readouterr().err
    assert f"expected {fluent_emoji.INTEGRITY}" in told and "is removed" in told
    assert not (cache_folder() / TARBALL).exists() and names(cache_folder() / "fluent_emoji") == []
    assert run(tmp_path) == 0


def test_a_foreign_package_at_hand_is_refused(tmp_path, capsys):
    path = package(tmp_path / "other.tgz", {})
    assert run(tmp_path, f"source={path}") == 1
    told = capsys.readouterr().err
    assert hash_of(path) in told and "npm pack" in told and path.is_file()
    assert run(tmp_path, f"source={tmp_path / 'missing.tgz'}") == 1
    assert "missing.tgz' is not a file" in capsys.readouterr().err


def test_without_npm_the_way_out_is_told(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert run(tmp_path) == 1
    told = capsys.readouterr().err
    assert "npm" in told and "is not installed" in told and "source=FILE.tgz" in told


@pytest.mark.parametrize("line, said", [("echo undefined", "undefined"), ("echo no such key >&2; exit 1", "no such key")])
def test_an_npm_that_names_no_registry(tmp_path, monkeypatch, capsys, line, said):
    npm(tmp_path, monkeypatch, line)
    assert run(tmp_path) == 1
    told = capsys.readouterr().err
    assert "`npm config get registry` should print an address" in told and said in told and "source=FILE.tgz" in told


def test_npm_does_not_wait_for_an_answer(terminal, tmp_path, monkeypatch):
    """Corepack, in its place, asks before it fetches it, and nobody would see that."""
    npm(tmp_path, monkeypatch, "read yes && echo fetching || echo http://127.0.0.1/")
    assert fluent_emoji.registry() == "http://127.0.0.1/"


def test_a_registry_without_the_package_or_none_at_all(registry, tmp_path, monkeypatch, capsys):
    npm(tmp_path, monkeypatch, f"echo http://127.0.0.1:{registry.server_port}/elsewhere")
    assert run(tmp_path) == 1
    assert "HTTP Error 404" in (told := capsys.readouterr().err) and "source=FILE.tgz" in told
    npm(tmp_path, monkeypatch, "echo http://127.0.0.1:9")
    assert run(tmp_path) == 1
    assert "stopped after 0 bytes" in (told := capsys.readouterr().err) and "source=FILE.tgz" in told


def test_broken_pictures_are_named_and_left_out(tmp_path, monkeypatch, capsys):
    whole = webp([grey(level) for level in LEVELS])
    damaged = {"1f301": whole[: len(whole) // 2], "1f302": b"", "1f303": b"RIFF" + bytes(100)}
    path = package(tmp_path / "emoji.tgz", damaged | {"1f300": whole, "../../1f304": whole})
    monkeypatch.setattr(fluent_emoji, "INTEGRITY", hash_of(path))
    assert run(tmp_path, f"source={path}") == 0
    assert "3 that cannot be read: 1f301, 1f302, 1f303" in capsys.readouterr().out
    folder = cache_folder() / "fluent_emoji"
    assert names(folder) == ["1f300.mp4", "1f304.mp4", "captions.csv"]  # no path of the archive is written to
    assert len(FolderClips(folder, split="all").files) == 2


def test_a_killed_conversion_goes_on(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    codes = [f"{0x1F400 + n:x}" for n in range(50)]
    frames = [rng.integers(0, 256, (96, 96, 4), np.uint8) for _ in range(FRAMES)]
    path = package(tmp_path / "emoji.tgz", dict.fromkeys(codes, webp(frames)))
    monkeypatch.setattr(fluent_emoji, "INTEGRITY", hash_of(path))
    running = Command(["prepare", "fluent_emoji", f"source={path}", f"root={tmp_path}"], tmp_path / "said")
    folder = cache_folder() / "fluent_emoji"
    while running.poll() is None and len(list(folder.glob("[!.]*.mp4"))) < 2:
        time.sleep(0.01)
    running.kill()
    running.wait()
    kept = {mp4: mp4.stat().st_mtime_ns for mp4 in folder.glob("[!.]*.mp4")}
    assert 2 <= len(kept) < len(codes) and not (folder / "captions.csv").exists()
    assert all(len(open_video(mp4)) == FRAMES for mp4 in kept)

    prepare_fluent_emoji(path)
    assert names(folder) == [*(f"{code}.mp4" for code in codes), "captions.csv"]
    assert {mp4: mp4.stat().st_mtime_ns for mp4 in kept} == kept


def test_captions_are_those_of_the_shared_clips(shared):
    table = shared / "data" / "fluent_emoji" / "captions.json"
    if not table.is_file():
        pytest.skip(f"no {table}")
    expected = json.loads(table.read_text(encoding="utf-8"))
    assert {code: caption(code) for code in expected} == expected


@pytest.mark.parametrize(
    "code, name", [("0023-fe0f-20e3", "number sign combining enclosing keycap"), ("1f468-200d-1f692", "man fire engine")]
)
def test_signs_that_show_nothing_are_not_named(code, name):
    assert caption(code) == name
