"""`kit prepare vizdoom`: each clip depends only on its number and the seed, however the work is divided."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from kit.cli import main
from kit.data.clips import FolderClips
from kit.machine import cache_folder
from kit.prepare import vizdoom
from kit.prepare.vizdoom import (
    ACTIONS,
    MAPS,
    Board,
    Form,
    Pulse,
    caption,
    form_of,
    motion,
    name_of,
    prepare_vizdoom,
    render,
    shares,
    started,
    work,
)
from tests.interrupted import wait_for
from tests.processes import Command

SMALL = Form(frames=9, height=32, width=48, tics=4, seed=0)
WORDS = ["frames=9", "height=32", "width=48", "fps=8.75"]  # the same
COUNT = len(ACTIONS) * len(MAPS)  # each action on each map

rendering = pytest.mark.skipif(
    subprocess.run([sys.executable, "-c", "import vizdoom"], capture_output=True).returncode != 0,
    reason="vizdoom is not installed: pip install 'kit-videoar[vizdoom]'",
)


pytestmark = pytest.mark.usefixtures("empty_cache")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with a clip of each action on each map, rendered by one worker."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KIT_CACHE", str(tmp_path_factory.mktemp("cache")))
        return prepare_vizdoom(COUNT, SMALL, workers=1)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def run(tmp_path, *words: str) -> int:
    return main(["prepare", "vizdoom", f"root={tmp_path / 'runs'}", *words])


@rendering
def test_clips_have_captions_and_the_action_or_the_map_as_class(folder):
    actions = FolderClips(folder, split="all", frames=9, height=32, width=48)
    assert actions.classes == tuple(sorted(ACTIONS)) and len(actions.files) == COUNT and actions.native_fps == 35 / 4
    item = actions[actions.files.index("walk_backward/castle_000008.mp4")]
    assert item["caption"] == "walking backward through a castle of pale brick and red stone"
    assert item["video"].shape == (3, 9, 32, 48) and actions.classes[item["label"]] == "walk_backward"
    assert len({item["caption"] for item in map(actions.__getitem__, range(COUNT))}) == COUNT
    assert FolderClips(folder, split="all", label_from="filename").classes == tuple(sorted(MAPS))


@rendering
def test_each_clip_moves_as_its_action_says(folder):
    """Each clip has motion; when the player turns left the picture moves to the right, and the other way round."""
    clips = FolderClips(folder, split="all", frames=9, height=32, width=48)
    for n, name in enumerate(clips.files):
        least = vizdoom.LEAST_FLASH if name.startswith("shoot") else vizdoom.LEAST_MOTION
        assert motion(clips[n]["video"]) > least / 2, name  # half: the codec smooths
    assert shift(clips, "turn_left") > 0 > shift(clips, "turn_right")


def shift(clips: FolderClips, action: str) -> float:
    """Returns by how many pixels per frame the pictures of an action's clips move to the right, on average."""
    found = []
    for n, name in enumerate(clips.files):
        if name.startswith(action):
            video = clips[n]["video"].mean(0)  # (T, H, W)
            errors = {by: _difference(video, by) for by in range(-24, 25)}
            found.append(min(errors, key=errors.get))
    return sum(found) / len(found)


def _difference(video: torch.Tensor, by: int) -> float:
    before, after = video[:-1], video[1:]
    width = video.shape[-1] - abs(by)
    first, second = max(-by, 0), max(by, 0)
    return (before[..., first : first + width] - after[..., second : second + width]).abs().mean().item()


@rendering
def test_pictures_are_in_colour_and_not_empty(folder):
    """The slime of the field is green, the sand of the arena is more red than blue."""
    clips = FolderClips(folder, split="all", frames=9, height=32, width=48)
    for n, name in enumerate(clips.files):
        video = clips[n]["video"]
        assert video.std() > 0.03, name
        red, green, blue = video[:, :, 16:].mean((1, 2, 3))
        assert "field" not in name or green > max(red, blue), name
        assert "arena" not in name or red > blue, name


def names_of(folder: Path) -> list[str]:
    """Returns the names of the clips that are whole: those that are being written are hidden."""
    return [path.relative_to(folder).as_posix() for path in folder.rglob("*.mp4") if not path.name.startswith(".")]


def clips_of(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in names_of(folder)}


def first_of(folder: Path, n: int) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in map(name_of, range(n))}


@rendering
def test_a_clip_does_not_depend_on_what_was_played_before():
    name = name_of(0)
    with started("maze", SMALL, armed=False) as game:
        first = render(game, name, SMALL)
        assert not torch.equal(render(game, name, SMALL._replace(seed=1)), first)
        assert torch.equal(render(game, name, SMALL), first)


@rendering
def test_more_clips_are_added_to_those_that_are_there(folder, tmp_path, capsys):
    made = SMALL.folder()
    assert run(tmp_path, "n=3", *WORDS, "workers=1") == 0 and f"{made}\n3 clips; to train on them" in capsys.readouterr().out
    before = {path: path.stat().st_mtime_ns for path in made.rglob("*.mp4")}
    assert run(tmp_path, "n=6", *WORDS, "workers=1") == 0 and "6 clips" in capsys.readouterr().out
    assert clips_of(made) == first_of(folder, 6) and len(before) == 3
    assert {path: path.stat().st_mtime_ns for path in before} == before

    before = {path: path.stat().st_mtime_ns for path in made.rglob("*")}
    assert run(tmp_path, "n=2", *WORDS) == 0 and "6 clips" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in made.rglob("*")} == before


@rendering
def test_other_forms_and_seeds_have_other_folders():
    others = [SMALL._replace(**{key: 2 * value + 2}) for key, value in SMALL._asdict().items()]
    assert len({form.folder() for form in (SMALL, *others)}) == 6


@contextmanager
def preparing(monkeypatch, tmp_path, clips: int, patience: float = vizdoom.PATIENCE) -> Iterator[Command]:
    """Runs `prepare vizdoom` with two workers in its own session; yields once both run and `clips` clips are made."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(vizdoom, "PATIENCE", patience)
    running = Command(["prepare", "vizdoom", f"n={COUNT}", *WORDS, "workers=2"], tmp_path / "said")
    try:
        wait_for(lambda: len(names_of(SMALL.folder())) >= clips and len(workers_of(running)) == 2, running, every=0.05)
        yield running
    finally:
        for process in session(running.pid):
            process.kill()
        running.wait()


def workers_of(running: Command) -> list[psutil.Process]:
    found = []
    for process in psutil.Process(running.pid).children():
        with suppress(psutil.Error):  # one that has just ended
            if "spawn_main" in " ".join(process.cmdline()):
                found.append(process)
    return found


def session(number: int) -> list[psutil.Process]:
    """Lists the processes of a session: the command, its workers and their engines."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.NoSuchProcess, ProcessLookupError):
            if os.getsid(process.pid) == number and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def is_over(number: int) -> bool:
    """Returns whether all processes of a session end within 60 seconds."""
    _, alive = psutil.wait_procs(session(number), timeout=60)
    return not alive


@rendering
def test_two_workers_that_are_stopped_make_what_one_makes(folder, monkeypatch, tmp_path):
    """They are stopped by Ctrl-C, which a terminal sends to the foreground group; no process is left behind."""
    with preparing(monkeypatch, tmp_path, clips=2) as running:
        os.killpg(running.pid, signal.SIGINT)
        assert running.wait(120) == 1 and is_over(running.pid)
    assert "interrupted" in (tmp_path / "said").read_text()
    assert {path.name for path in tmp_path.iterdir()} == {"cache", "runs", "said"}
    assert 2 <= len(FolderClips(SMALL.folder(), split="all").files) < COUNT  # with a caption each
    assert contents(prepare_vizdoom(COUNT, SMALL, workers=2)) == contents(folder)


@rendering
def test_workers_are_stopped_before_their_first_clip_too(monkeypatch, tmp_path):
    with preparing(monkeypatch, tmp_path, clips=0) as running:
        os.killpg(running.pid, signal.SIGINT)
        assert running.wait(120) == 1 and is_over(running.pid)
    said = (tmp_path / "said").read_text()
    assert "interrupted" in said and "Traceback" not in said


@rendering
@pytest.mark.parametrize("victim", ["worker", "engine"])
def test_a_process_that_dies_ends_the_others(monkeypatch, tmp_path, victim):
    """A process may die, for example, if memory runs out. An engine that dies in a bad moment leaves its worker waiting."""
    with preparing(monkeypatch, tmp_path, clips=2, patience=12) as running:
        if victim == "worker":
            workers_of(running)[0].kill()
        else:
            while running.poll() is None:  # one that is killed when its work is done is not missed
                for worker in workers_of(running):
                    with suppress(psutil.Error):  # it, or its engine, has just ended
                        for engine in worker.children():
                            engine.kill()
                time.sleep(0.02)
        assert running.wait(120) == 1 and is_over(running.pid)
    said = (tmp_path / "said").read_text()
    assert "a process that renders has died" in said and "run it again" in said and "Traceback" not in said


@rendering
def test_an_engine_that_does_not_answer_is_taken_for_dead(monkeypatch, tmp_path):
    with preparing(monkeypatch, tmp_path, clips=2, patience=12) as running:
        while not (engines := [engine for worker in workers_of(running) for engine in worker.children()]):
            time.sleep(0.02)
        engines[0].suspend()
        assert running.wait(120) == 1 and is_over(running.pid)
    said = (tmp_path / "said").read_text()
    assert "has died (it or its engine has not answered for 12 seconds); run it again" in said and "Traceback" not in said


def test_a_worker_that_waits_for_the_lock_of_a_killed_one_is_found(monkeypatch, tmp_path):
    """Before its first share too."""
    monkeypatch.setattr(vizdoom, "PATIENCE", 0.2)
    context = get_context("fork")
    board = Board(context, workers=2)
    killed = context.Process(target=lambda: board.taken.get_lock().acquire() and os.kill(os.getpid(), signal.SIGKILL))
    waits = context.Process(target=work, args=(1, [["walk"]], SMALL, tmp_path, board))
    killed.start(), killed.join()
    waits.start()
    try:
        pulse, end = Pulse(board), time.monotonic() + 10
        while not (halted := pulse.halted()) and time.monotonic() < end:
            time.sleep(0.01)
        assert halted == [1] and waits.is_alive()
    finally:
        waits.kill(), waits.join()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_are_noted_while_the_block_runs(number):
    before, noted = signal.getsignal(number), threading.Event()
    with vizdoom.signals_noted(noted.set) as came:
        assert not noted.is_set()
        os.kill(os.getpid(), number)
        assert noted.wait(5)
    assert came == [number] and signal.getsignal(number) is before


@rendering
def test_a_clip_that_cannot_be_had_is_told(monkeypatch):
    """Two minutes of walking forward are impossible, because a wall is in the way."""
    monkeypatch.setattr(vizdoom, "ATTEMPTS", 3)
    form = Form(frames=60, height=32, width=32, tics=70, seed=0)
    with started("maze", form, armed=False) as game, pytest.raises(ValueError, match="in 3 attempts .* take 120.0 s"):
        render(game, "walk_forward/maze_000000.mp4", form)


def test_a_player_at_a_wall_hardly_gets_on():
    steps = np.array([[8.0, 0.0]] * 8 + [[0.2, 0.0]] * 8)
    assert vizdoom.speed(steps.cumsum(0)) == pytest.approx(0.2) and vizdoom.speed(steps[::-1].cumsum(0)) == pytest.approx(8.0)


def test_motion_is_counted_in_levels():
    assert motion(torch.arange(5.0).view(1, 5, 1, 1).expand(3, 5, 4, 4) * 2 / 255) == pytest.approx(1.0)


def test_shares_are_of_one_map_and_weapon():
    names = [name_of(n) for n in range(1000)]
    dealt = shares(names)
    assert sorted(name for share in dealt for name in share) == sorted(names)
    for share in dealt:
        assert len({(Path(name).name.split("_")[0], name.startswith("shoot")) for name in share}) == 1


@pytest.mark.parametrize(
    "words, said",
    [
        (["frames=1"], "frames=1; expected a whole number of 2 or more"),
        (["height=33"], "height=33; expected an even number of pixels from 16 to 960"),
        (["width=1300"], "width=1300; expected an even number of pixels from 16 to 1280"),
        (["fps=17"], "fps=17; expected 35 divided by a whole number"),
        (["fps=0"], "fps=0; expected"),
        (["fps=70"], "fps=70; expected"),
        (["seed=-1"], "seed=-1; expected a whole number of 0 or more"),
        (["n=0"], "n=0; expected a whole number of 1 or more"),
        (["n=null"], "n=null; expected a whole number of 1 or more"),
        (["workers=0"], "workers=0; expected a whole number of 1 or more"),
    ],
)
def test_what_cannot_be_rendered_is_refused(tmp_path, capsys, words, said):
    assert run(tmp_path, *words) == 1
    assert said in capsys.readouterr().err and not cache_folder().exists()


def test_without_the_package_the_way_to_it_is_told(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "vizdoom", None)
    assert run(tmp_path) == 1
    assert "pip install 'kit-videoar[vizdoom]'" in capsys.readouterr().err


def test_rates_are_the_engine_s_steps_divided():
    assert [form_of(9, 32, 32, fps, 0).tics for fps in (35, 17.5, 11.67, 5)] == [1, 2, 3, 7]


def test_captions_are_plain_words():
    assert caption("step_left/labyrinth_000042.mp4") == "stepping to the left in a labyrinth of grey stone"
