"""The command line: python -m kit VERB [conf=NAME] [key=value ...]

A verb is a thin function over a Python API of the same name; Hydra composes its config from conf/.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import traceback
import warnings
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from kit.confs import CONF, confs, describe, first_comment, keep_config, located, misspelt_in, trains
from kit.data.decode import UnreadableVideo
from kit.values import check_whole_number
from kit.words import ELSEWHERE, INTERPOLATION, options_and_overrides, quoted, refused, wrong_words

if TYPE_CHECKING:
    from omegaconf import DictConfig


class Verb(NamedTuple):
    """A function of the verb's name, in a module that is imported when it is needed."""

    module: str
    conf: str | None  # config it uses without conf=
    help: str


VERBS = {
    "fit": Verb("kit.verbs.fit", None, "train a stage; ckpt=last continues it"),
    "validate": Verb("kit.verbs.validate", "validate", "score a checkpoint on held-out clips"),
    "reconstruct": Verb("kit.verbs.reconstruct", "reconstruct", "clips through the tokenizer and back, PSNR and SSIM"),
    "generate": Verb("kit.verbs.generate", "generate", "videos from prompt=, label= or prompts=FILE, image= or video="),
    "evaluate": Verb("kit.evaluation.run", "evaluate", "FVD, PSNR, SSIM, LPIPS and more, by a named protocol"),
    "table": Verb("kit.evaluation.report", "table", "results of one protocol side by side"),
    "inspect": Verb("kit.verbs.inspect", "inspect", "what each scale's bits hold, and how well they are predicted"),
    "cache": Verb("kit.verbs.cache", "cache", "encode clips once, for generators to train on"),
    "consolidate": Verb("kit.verbs.consolidate", "consolidate", "one file of a checkpoint in shards"),
    "prepare": Verb("kit.prepare.run", "prepare", "make what kit cannot ship: i3d, infinity, fluent_emoji, vizdoom"),
    "doctor": Verb("kit.planning.doctor", "doctor", "what this machine can run"),
    "demo": Verb("kit.verbs.demo", "demo", "train, sample, score on the embedded data: 15 to 30 minutes on 2 cores"),
}  # fmt: skip


# Errors that a user can fix; printed without a traceback.
MENDABLE = (ValueError, OSError, ImportError, MemoryError, UnreadableVideo)


def usage() -> str:
    width = max(map(len, VERBS))
    lines = [f"  {name:<{width}}  {verb.help}" for name, verb in VERBS.items()]
    return (
        "python -m kit VERB [conf=NAME] [key=value ...]\n\nverbs:\n" + "\n".join(lines) + "\n\n"
        "python -m kit VERB --help    its keys, their defaults and units\n"
        "python -m kit VERB ... --cfg job    the composed config\n"
        "python -m kit VERB ... --multirun key=a,b name='x${key}'    a run for each value, each with a name of its own\n\n"
        "first steps:\n"
        "  python -m kit demo\n"
        "  python -m kit fit conf=stage1_tokenizer && python -m kit fit conf=stage2_generator\n"
        '  python -m kit generate ckpt=runs/demo/generator/checkpoints/last.ckpt prompt="a red ball moving right over a '
        'green field" n=4 seed=0\n'
    )


def complain(message: str) -> int:
    print(f"kit: {message}", file=sys.stderr)
    return 2


def split(args: list[str]) -> tuple[str | None, list[str]]:
    """Splits arguments into the NAME of conf=NAME, or None, and the others."""
    names = [a.removeprefix("conf=") for a in args if a.startswith("conf=")]
    return (names[-1] if names else None), [a for a in args if not a.startswith("conf=")]


def main(argv: list[str] | None = None) -> int:
    """Runs a command line and returns its exit status: 0 success, 1 failure, 2 invalid command line.

    A training that SIGTERM ends, after it has saved, exits with 143.
    """
    own = sys.argv  # a verb sets it, for hydra and for Lightning's further ranks
    try:
        status = understand(argv)
        sys.stdout.flush()
        if status == 0:
            leave_process_group()
    except BrokenPipeError:  # the reader of a pipe, such as `head`, has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    finally:
        sys.argv = own
    return status


def understand(argv: list[str] | None) -> int:
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if args else 2
    verb = args.pop(0)
    if verb not in VERBS:
        return complain(f"unknown verb {verb!r}; choose from {', '.join(VERBS)}")
    conf, rest = split(args)
    if verb == "prepare" and rest and not rest[0].startswith("-") and "=" not in rest[0]:
        rest[0] = f"what={rest[0]}"
    conf = conf or VERBS[verb].conf
    if conf is None and not {"-h", "--help"} & set(rest):
        return complain(f"{verb} needs conf=NAME; choose from {', '.join(confs())}")
    try:
        path = located(conf or "stage1_tokenizer")
        if trains(path) != (verb == "fit"):
            choice = f"; choose from {', '.join(confs())}, or build yours on one of them" if verb == "fit" else ""
            raise ValueError(f"conf={conf} is not for {verb}{choice}")
        if {"-h", "--help"} & set(rest):
            if verb == "fit":
                print("conf=\n" + "".join(f"  {name:<26}{first_comment(name)}\n" for name in confs()))
            asked = f" conf={conf or path.stem}" if VERBS[verb].conf is None else ""
            print(f"python -m kit {verb}{asked} [key=value ...]: {VERBS[verb].help}\n\n{describe(path)}")
            return 0
    except ValueError as error:
        return complain(str(error))
    return Call(verb, path, rest).run()


def leave_process_group():
    """Closes the group of processes that trained together, as torch requires: a process that ends while threads of gloo run
    may be aborted.

    Not to be called after an error, when other processes may be waiting for this one in a collective operation.
    """
    distributed = sys.modules.get("torch.distributed")  # None if the verb did not import torch
    if distributed and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def set_threads(number: int | None):
    """Sets the number of CPU threads of torch; None and 0 leave torch's own choice, up to a container's quota.

    Raises:
        ValueError: if it is no whole number of 0 or more.
    """
    if number is not None and (type(number) is not int or number < 0):
        raise ValueError(f"threads={number}; expected a number of threads, or null for torch's own choice")
    import torch

    from kit.machine import cores

    if number or cores() < torch.get_num_threads():
        torch.set_num_threads(number or cores())


def worth_telling(record: logging.LogRecord) -> bool:
    return not any(part in record.getMessage() for part in ("litlogger", "Ignoring `Trainer(max_time="))


def silence():
    """Suppresses messages of Lightning that do not concern a user.

    These are an advertisement, the note that our own timer implements `trainer.max_time`, a warning to Lightning's authors,
    and the note that models which are not trained, such as a generator's tokenizer, are in eval mode.
    """
    for message in (".*LeafSpec", "Found .* in eval mode at the start of training"):
        warnings.filterwarnings("ignore", message)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(worth_telling)


WHERE = "\n(KIT_TRACEBACK=1 shows where)"


def explained(error: Exception, verb: str) -> str | None:
    """Says in a few lines what a user can mend; None for other errors, and where KIT_TRACEBACK asks for a traceback."""
    from hydra.errors import HydraException, InstantiationException
    from omegaconf.errors import (
        ConfigAttributeError,
        InterpolationKeyError,
        InterpolationResolutionError,
        InterpolationToMissingValueError,
        MissingMandatoryValue,
        UnsupportedInterpolationType,
    )

    if os.environ.get("KIT_TRACEBACK"):
        return None
    if isinstance(error, InstantiationException):  # hydra's, about an error of what it builds
        if isinstance(error.__cause__, TypeError | AttributeError):  # about a key or a value there, or a class of the user's
            return f"{' '.join(str(error).split())}{WHERE}"
        error = error.__cause__ or error  # which an error from another process has lost
    if isinstance(error, MissingMandatoryValue | InterpolationToMissingValueError):
        found = re.search(r"Missing mandatory value: (\S+)", str(error))
        key = found[1] if found else error.full_key
        return f"{key} is missing; give {key}=..."
    if isinstance(error, InterpolationKeyError | UnsupportedInterpolationType):
        return f"{error.full_key}: {str(error).splitlines()[0]}; {INTERPOLATION}"
    while isinstance(error, InterpolationResolutionError) and error.__context__:
        error = error.__context__  # omegaconf's, about an error of a function that the config calls
    if isinstance(error, ConfigAttributeError):  # such as ~seed has left
        return f"there is no {error.full_key}, which kit reads; set it, do not take it out{WHERE}"
    if isinstance(error, HydraException):
        said = re.sub(r"\s*To append to your default list use .*", "", str(error))  # nothing would read it
        return "\n".join(filter(None, (said, str(error.__cause__ or ""))))
    if re.search("allocate shared memory|workers are out of shared memory", str(error)):  # torch's; a GPU has such memory too
        room = "docker run --shm-size=1g makes it larger, fewer data.workers need less, data.workers=0 none"
        return f"the clips that workers hand over do not fit into /dev/shm: {room}{WHERE}"
    kind = type(error).__name__  # torch and Lightning may not be imported, which takes seconds
    if kind == "OutOfMemoryError":  # torch's, of a GPU
        room = {"fit": "fits=12GB, recompute=true or fewer clips a step", "cache": "a smaller data.height and data.width"}
        return f"{error}\n{room.get(verb, 'a smaller batch_size')} takes less{WHERE}"
    if type(error).__module__.startswith("wandb."):  # such as a server that is out of reach
        return f"{error}\nlogger.wandb.offline=true logs without W&B's server{WHERE}"
    if isinstance(error, MENDABLE) or kind == "MisconfigurationException":  # Lightning's
        text = str(error)
        if text.startswith("Caught ") and "\nOriginal Traceback " in text:  # torch's, around that of a loader's worker
            text = re.split(rf"\n(?:\w+\.)*{kind}: ", text)[-1].strip()
        return f"{text}{WHERE}"
    return None


class Call:
    """A call of a verb: hydra composes its config, and errors that a user can fix are reported without a traceback.

    Args:
        verb: its name. path: file of the conf. words: the other words of the command line.
    """

    def __init__(self, verb: str, path: Path, words: list[str]):
        self.verb, self.path, self.own_conf = verb, path, path.parent != CONF
        self.options, words = options_and_overrides(words)
        self.sweep = bool({"-m", "--multirun"} & set(self.options))
        self.overrides = [quoted(word, self.sweep) for word in words]
        self.begun, self.failed = False, False  # whether a run has, of a multirun any
        self.process = os.getpid()

    def run(self) -> int:
        """Runs the verb, or each run of a multirun; returns the exit status, see `main`."""
        import hydra

        from kit.resolvers import register_resolvers

        register_resolvers()
        silence()
        for note in misspelt_in(self.path) if self.own_conf else ():
            self.tell(f"note: {self.path.name}: {note}")
        if self.sweep and (reason := self.refusal()):  # before hydra makes a folder of all runs
            self.tell(reason)
            return 1
        kits = [f"--config-dir={CONF}"] if self.own_conf else []  # searched after the conf's own folder
        sys.argv = [sys.argv[0], f"--config-name={self.path.stem}", *kits, *self.options, *self.overrides]
        os.environ["HYDRA_FULL_ERROR"] = "1"  # its errors come here in place of being printed
        try:
            hydra.main(version_base="1.3", config_path=str(self.path.parent), config_name=self.path.stem)(self.task)()
        except KeyboardInterrupt:  # caught here, not in `task`, so that it ends a whole --multirun
            print(f"\nkit {self.verb}: interrupted", file=sys.stderr)
            return 1
        except SystemExit as stop:  # from hydra, which has printed why, or from Lightning after an interrupt
            return stop.code if isinstance(stop.code, int) else 1
        except Exception as error:
            reason = (None if self.begun else self.refusal()) or explained(error, self.verb)
            if reason:
                self.tell(reason)
            else:
                traceback.print_exc()
            return 1
        return int(self.failed)

    def task(self, cfg: DictConfig):
        """Calls the verb with a composed config; leaves no empty folder behind."""
        self.begun = True
        conf = self.path if self.own_conf else self.path.stem
        # Lightning starts further ranks with this command line.
        sys.argv = [sys.argv[0], self.verb, f"conf={conf}", *self.options, *self.overrides]
        try:
            if wrong := wrong_words(cfg, self.path, self.overrides):
                return self.fail(*wrong)
            set_threads(cfg.threads)
            check_whole_number("seed", cfg.seed, 0)
            getattr(import_module(VERBS[self.verb].module), self.verb)(cfg)
            if self.verb != "fit":  # which does so at its start
                keep_config(cfg, self.verb)
        except Exception as error:
            reason = explained(error, self.verb)
            if reason is None or os.getpid() != self.process:  # a job of hydra's launcher: the main process prints it
                raise
            self.fail(reason)
        finally:
            self.remove_empty_folders()

    def refusal(self) -> str | None:
        """Says why the config does not compose, see `refused`; None also if hydra's options name another config."""
        elsewhere = any(option.split("=")[0] in ELSEWHERE for option in self.options)
        return None if elsewhere else refused(self.path, self.overrides, self.sweep)

    def tell(self, *reasons: str):
        print(*(f"kit {self.verb}: {reason}" for reason in reasons), sep="\n", file=sys.stderr)

    def fail(self, *reasons: str):
        """Reports why a run has failed."""
        self.failed = True
        self.tell(*reasons)

    def remove_empty_folders(self):
        """Removes what hydra has made for a run: its folder; of a multirun, where that is elsewhere, the one above it too."""
        from hydra.core.hydra_config import HydraConfig

        folder = Path(HydraConfig.get().runtime.output_dir)
        with suppress(OSError):  # there is something in it
            folder.rmdir()
            if self.sweep:
                folder.parent.rmdir()
