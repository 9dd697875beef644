"""First-person 3D clips as a captioned data set: python -m kit prepare vizdoom.

The clips are rendered on this machine; in each the player holds one action. The MIT-licensed package vizdoom renders them:
the engine of Doom with maps made for research and the pictures of Freedoom (BSD).
"""

from __future__ import annotations

import math
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from kit.data.captions import is_captioned, write_captions
from kit.data.frames import fit
from kit.files import locked
from kit.machine import cores, in_cache
from kit.media import write_video
from kit.values import check_whole_number

MAPS = {  # name -> the package's scenario, words of the caption
    "maze": ("my_way_home", "a maze of brown brick"),
    "castle": ("deathmatch", "a castle of pale brick and red stone"),
    "field": ("health_gathering", "a walled field of green slime"),
    "labyrinth": ("health_gathering_supreme", "a labyrinth of grey stone"),
    "arena": ("defend_the_center", "a round arena of sand"),
}
ACTIONS = {  # name -> the engine's button, words of the caption
    "walk_forward": ("MOVE_FORWARD", "walking forward through"),
    "walk_backward": ("MOVE_BACKWARD", "walking backward through"),
    "turn_left": ("TURN_LEFT", "turning left in"),
    "turn_right": ("TURN_RIGHT", "turning right in"),
    "step_left": ("MOVE_LEFT", "stepping to the left in"),
    "step_right": ("MOVE_RIGHT", "stepping to the right in"),
    "shoot": ("ATTACK", "shooting a pistol in"),
}
HELD = {name: np.eye(len(ACTIONS), dtype=int)[n].tolist() for n, name in enumerate(ACTIONS)}  # action -> state of all buttons
SHOOT = "shoot"
MOVES = [name for name in ACTIONS if name != SHOOT]
STILL = ("turn_left", "turn_right", SHOOT)  # the player stays in place

TICS = 35  # steps of the engine per second
SIZES = ((160, 120), (320, 240), (640, 480), (800, 600), (1024, 768), (1280, 960))  # the engine's screens, width and height
LEAST_MOTION, LEAST_FLASH = 3.0, 0.5  # least `motion` of a clip that moves, that shoots
LEAST_SPEED = 2.0  # of a player who walks: map units per step of the engine, out of 8 at most; slower clips are dropped
ATTEMPTS = 300  # until a clip is given up
SHARE = 32  # clips that an engine renders before it is closed
PATIENCE = 120.0  # seconds without a step after which an engine is taken for dead

# Settings that name a start-up script for each game that the engine knows. `started` names a file that does not exist:
# without it the engine looks for one in the current folder, and leaves a folder there.
SCRIPTS = [f"{game}.AutoExec" for game in ("Doom", "Heretic", "Hexen", "Strife", "Chex")]


class Form(NamedTuple):
    """Shape, rate and seed of clips.

    Fields: frames, of a clip; height, width, pixels; tics, steps of the engine from frame to frame; seed.
    """

    frames: int
    height: int
    width: int
    tics: int
    seed: int

    @property
    def fps(self) -> float:
        return TICS / self.tics

    def folder(self) -> Path:
        """Folder in kit's cache folder for clips of this form, rendered by this version of the engine."""
        name = f"{self.frames}x{self.height}x{self.width}_{self.fps:g}fps_seed{self.seed}"
        return in_cache(f"vizdoom_{engine().__version__}", name)


def engine():
    """Imports and returns the package vizdoom.

    Raises:
        ImportError: if it is not installed, saying how to.
    """
    try:
        import vizdoom
    except ImportError as error:
        raise ImportError("first-person clips need a package: pip install 'kit-videoar[vizdoom]'") from error
    return vizdoom


def form_of(frames: int, height: int, width: int, fps: float, seed: int) -> Form:
    """Builds a `Form` from checked values.

    Args:
        fps: frames per second, the engine's steps divided by a whole number.
    Raises:
        ValueError: for values that cannot be rendered.
    """
    most = SIZES[-1]
    for key, value, least, top in (("height", height, 16, most[1]), ("width", width, 16, most[0])):
        if not least <= value <= top or value % 2:
            raise ValueError(f"{key}={value}; expected an even number of pixels from {least} to {top}")
    check_whole_number("frames", frames, 2)
    tics = round(TICS / fps) if fps > 0 else 0
    if tics < 1 or not math.isclose(TICS / tics, fps, rel_tol=1e-3):
        raise ValueError(f"fps={fps}; expected {TICS} divided by a whole number, such as 35, 17.5, 7 or 5")
    check_whole_number("seed", seed, 0)
    return Form(frames, height, width, tics, seed)


def name_of(number: int) -> str:
    """File name of a clip, from its action and map, which take turns: 8 -> walk_backward/castle_000008.mp4."""
    action = list(ACTIONS)[number % len(ACTIONS)]
    map_name = list(MAPS)[number // len(ACTIONS) % len(MAPS)]
    return f"{action}/{map_name}_{number:06d}.mp4"


def parts_of(name: str) -> tuple[str, str, int]:
    """Splits a file name into its parts: walk_backward/castle_000008.mp4 -> walk_backward, castle, 8."""
    path = PurePosixPath(name)
    map_name, number = path.stem.split("_")
    return path.parent.name, map_name, int(number)


def caption(name: str) -> str:
    """Caption of a clip, from its file name.

    walk_backward/castle_000008.mp4 -> walking backward through a castle of pale brick and red stone.
    """
    action, map_name, _ = parts_of(name)
    return f"{ACTIONS[action][1]} {MAPS[map_name][1]}"


@contextmanager
def started(map_name: str, form: Form, armed: bool) -> Iterator:
    """Runs a game on a map, off screen, with the buttons of ACTIONS; `armed`: the player's weapon is seen."""
    vizdoom = engine()
    width, height = next(size for size in SIZES if size[0] >= form.width and size[1] >= form.height)
    game = vizdoom.DoomGame()
    with tempfile.TemporaryDirectory() as folder:
        settings = Path(folder, "settings.ini")
        settings.write_text("".join(f"[{section}]\nPath={folder}/none.cfg\n" for section in SCRIPTS))
        game.set_doom_config_path(str(settings))
        game.set_doom_game_path(str(Path(vizdoom.__file__).with_name("freedoom2.wad")))  # not some Doom on this machine
        game.set_doom_scenario_path(str(Path(vizdoom.scenarios_path, f"{MAPS[map_name][0]}.wad")))
        game.set_doom_map("map01")
        game.set_doom_skill(1)
        game.set_episode_timeout(0)
        game.set_available_buttons([getattr(vizdoom.Button, button) for button, _ in ACTIONS.values()])
        game.set_available_game_variables([vizdoom.GameVariable.POSITION_X, vizdoom.GameVariable.POSITION_Y])
        game.set_screen_resolution(getattr(vizdoom.ScreenResolution, f"RES_{width}X{height}"))
        game.set_screen_format(vizdoom.ScreenFormat.RGB24)
        game.set_render_hud(False)
        game.set_render_screen_flashes(False)
        game.set_render_weapon(armed)
        game.set_window_visible(False)
        game.init()
        try:
            yield game
        finally:
            game.close()


def play(game, action: str, form: Form, rng: np.random.Generator, check: Callable[[], None]) -> np.ndarray | None:
    """Plays one attempt at a clip: uint8 (T, H, W, 3) at the size of the engine's screen.

    The player wanders for some seconds, so that each clip begins elsewhere, and then holds the action.

    Returns: None if the game ends before the clip does, or a player who walks hardly moves.
    """
    game.set_seed(int(rng.integers(2**31)))
    game.new_episode()
    if action == SHOOT:  # not each map arms the player
        game.send_game_command("give pistol")
        game.send_game_command("use pistol")
    for move in rng.choice(MOVES, 5):
        game.make_action(HELD[move], int(rng.integers(15, 36)))
    frames, positions = [], []
    for _ in range(form.frames):
        check()
        game.make_action(HELD[action], form.tics)
        if game.is_episode_finished():  # the player is dead, or has found the way out
            return None
        state = game.get_state()
        frames.append(state.screen_buffer.copy())
        positions.append(state.game_variables.copy())
    return np.stack(frames) if action in STILL or speed(np.stack(positions)) >= LEAST_SPEED * form.tics else None


def speed(positions: np.ndarray) -> float:
    """Distance in map units per frame, between the ends of the second half of (T, 2) positions.

    The second half is enough, since a player who has met a wall stays there.
    """
    half = positions[(len(positions) - 1) // 2 :]
    return float(np.linalg.norm(half[-1] - half[0])) / (len(half) - 1)


def motion(video: Tensor) -> float:
    """Mean absolute difference of successive frames of (3, T, H, W) in [-1, 1], in levels of 0 to 255."""
    return 127.5 * video.diff(dim=1).abs().mean().item()


def render(game, name: str, form: Form, check: Callable[[], None] = lambda: None) -> Tensor:
    """Renders the clip of a name, (3, T, H, W) in [-1, 1].

    The clip depends on name and form alone, whatever was played before.

    Args:
        check: called before each attempt and each frame; it may raise.
    Raises:
        ValueError: if no attempt succeeds, since the player always dies or hardly anything moves.
    """
    action, _, number = parts_of(name)
    least = LEAST_FLASH if action == SHOOT else LEAST_MOTION
    rng = np.random.default_rng((form.seed, number))
    for _ in range(ATTEMPTS):
        check()
        frames = play(game, action, form, rng, check)
        if frames is not None and motion(video := fit(frames, form.height, form.width)) >= least:
            return video
    raise ValueError(
        f"{name}: in {ATTEMPTS} attempts the player died, met a wall or saw nothing move; {form.frames} frames take "
        f"{form.frames / form.fps:.1f} s, ask for fewer"
    )


@contextmanager
def signals_noted(note: Callable[[], None]) -> Iterator[list[int]]:
    """Makes Ctrl-C and SIGTERM call `note` and do nothing else while the block runs.

    Workers can thus close their engines: an engine whose process has ended waits for it forever. Outside the main thread
    signals do what they always do.

    Yields: the numbers of the signals that came.
    """
    came: list[int] = []

    def handle(number, _):
        came.append(number)
        note()

    main = threading.current_thread() is threading.main_thread()
    handlers = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM) if main}
    try:
        yield came
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def shares(names: list[str]) -> list[list[str]]:
    """Divides clips into shares, one for each start of an engine.

    A share has one map, and either all of its clips shoot or none; it is small, for the progress bar.
    """
    kinds: dict[tuple[str, bool], list[str]] = {}
    for name in names:
        action, map_name, _ = parts_of(name)
        kinds.setdefault((map_name, action == SHOOT), []).append(name)
    return [kind[n : n + SHARE] for kind in kinds.values() for n in range(0, len(kind), SHARE)]


class Board:
    """What the worker processes and the process that waits for them share.

    Only `taken` has a lock. A worker that is killed keeps it only if that happens in the instant that it takes a share.

    Fields: taken, number of shares begun; made, number of clips of each worker; steps, number of frames and attempts of
    each; stop, whether to stop before the next; errors, what was raised.
    """

    def __init__(self, context, workers: int):
        self.taken = context.Value("q", 0)
        self.made = context.RawArray("q", workers)
        self.steps = context.RawArray("q", workers)
        self.stop = context.RawValue("b", False)
        self.errors = context.SimpleQueue()


def work(number: int, shares: list[list[str]], form: Form, folder: Path, board: Board) -> None:
    """Renders shares that nobody has begun until there are none, or until it is told to stop. Runs in a worker process.

    The process leads a group of its own: its engine is the only other in it, and signals to the terminal's group do not
    reach them.
    """
    os.setpgrp()
    torch.set_num_threads(1)

    def check():
        board.steps[number] += 1
        if board.stop.value or not parent_process().is_alive():
            sys.exit()

    try:
        check()  # now it has begun, so that it is found if a worker that was killed has kept the lock of `taken`
        while (share := take(board, shares)) is not None:
            check()
            action, map_name, _ = parts_of(share[0])
            with started(map_name, form, armed=action == SHOOT) as game:
                for name in share:
                    write_video(render(game, name, form, check), folder / name, form.fps)
                    board.made[number] += 1
    except Exception as error:
        board.errors.put(error)
        sys.exit(1)


class Pulse:
    """Finds workers that have come to a halt.

    An engine that is killed while it holds the lock that it shares with its worker (a kernel short of memory may do so)
    leaves the worker waiting for that lock forever; likewise a worker that is killed as it takes a share, the others.
    """

    def __init__(self, board: Board):
        self.board = board
        self.last = [(0, math.inf) for _ in board.steps]  # steps of each worker, when the last was seen

    def halted(self) -> list[int]:
        """Returns the numbers of the workers that have begun and made no step for PATIENCE seconds."""
        now = time.monotonic()
        for n, steps in enumerate(self.board.steps):
            if steps != self.last[n][0]:
                self.last[n] = steps, now
        return [n for n, (_, since) in enumerate(self.last) if now - since > PATIENCE]


def take(board: Board, shares: list[list[str]]) -> list[str] | None:
    with board.taken.get_lock():
        board.taken.value += 1
        return shares[board.taken.value - 1] if board.taken.value <= len(shares) else None


def render_all(names: list[str], form: Form, folder: Path, workers: int) -> None:
    """Writes the clips of these names, in `workers` processes with an engine each.

    Raises:
        KeyboardInterrupt: after Ctrl-C or SIGTERM; the clips that exist are whole. A second one kills the processes.
        ChildProcessError: if a process or its engine dies or does not answer. ValueError: as `render`.
        OSError: if a clip cannot be written.
    """
    context = get_context("spawn")
    board, dealt, why = Board(context, workers), shares(names), None

    def stop():
        if board.stop.value:  # the second request
            for process in filter(BaseProcess.is_alive, processes):
                process.kill()
        board.stop.value = True

    processes = [context.Process(target=work, args=(n, dealt, form, folder, board)) for n in range(workers)]
    with signals_noted(stop) as came, tqdm(total=len(names), desc="vizdoom", unit="clip", disable=None) as bar:
        try:
            start(processes)
            pulse = Pulse(board)
            while alive := [process.sentinel for process in processes if process.is_alive()]:
                wait(alive, timeout=0.5)
                bar.update(sum(board.made) - bar.n)
                for process in (processes[n] for n in pulse.halted() if processes[n].is_alive()):
                    why = f"it or its engine has not answered for {PATIENCE:g} seconds"
                    process.kill()
                if any(process.exitcode for process in processes):
                    board.stop.value = True
        finally:
            board.stop.value = True
            for process in processes:
                end(process)
    if came:
        raise KeyboardInterrupt
    error = board.errors.get() if not board.errors.empty() else None
    if isinstance(error, (ValueError, OSError)):
        raise error
    if any(process.exitcode for process in processes):
        code = next(process.exitcode for process in processes if process.exitcode)
        why = why or error or (f"killed by signal {-code}" if code < 0 else f"its exit code is {code}")
        raise ChildProcessError(f"a process that renders has died ({why}); run it again to continue from there")


def start(processes: list[BaseProcess]) -> None:
    """Starts workers so that Ctrl-C does not reach them, even before they lead groups of their own."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        for process in processes:
            process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end(process: BaseProcess) -> None:
    """Waits for a worker that was told to stop, and ends the engine of one that was killed."""
    if process.pid is not None:  # else it was never started
        process.join()
        if process.exitcode < 0:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def prepare_vizdoom(n: int, form: Form, workers: int | None = None) -> Path:
    """Makes a folder of at least `n` captioned mp4s of one form. Existing ones are kept, the others rendered.

    Args:
        workers: number of processes that render, one for each core if None; the clips do not depend on it.
    Returns: the folder, in kit's cache folder; a clip's own folder is its action, the first word of its name its map.
    Raises:
        ImportError: without the package vizdoom. ValueError: if n or workers is below 1, and as `render`.
        KeyboardInterrupt: see `render_all`; the next call continues from there.
    """
    check_whole_number("n", n, 1)
    check_whole_number("workers", workers, 1, optional=True)
    folder = form.folder()
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder.with_name(f"{folder.name}.lock")):  # a second run waits for the first
        missing = [name for name in map(name_of, range(n)) if not (folder / name).exists()]
        try:
            if missing:
                render_all(missing, form, folder, workers or cores())
        finally:  # a run that was stopped leaves a folder that can be used
            if not is_captioned(folder):
                names = [path.relative_to(folder).as_posix() for path in folder.glob("*/[!.]*.mp4")]
                write_captions({name: caption(name) for name in names}, folder / "captions.csv")
    return folder
