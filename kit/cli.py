"""The command line: python -m kit VERB [conf=NAME] [key=value ...]

A verb is a thin function over a Python API of the same name; Hydra composes its config from conf/.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

from kit.confs import CONF, confs, describe, first_comment, keep_config, located, misspelt_in, refused, trains, wrong_words
from kit.data.decode import UnreadableVideo


class Verb(NamedTuple):
    function: str  # module:function, imported when it is needed
    conf: str | None  # config it uses without conf=
    help: str


VERBS = {
    "fit": Verb("kit.run:fit", None, "train a stage; ckpt=last continues it"),
    "validate": Verb("kit.verbs:validate", "validate", "score a checkpoint on held-out clips"),
    "reconstruct": Verb("kit.verbs:reconstruct", "reconstruct", "clips through the tokenizer and back, PSNR and SSIM"),
    "generate": Verb("kit.generation:generate", "generate", "videos from prompt=, label= or prompts=FILE, image= or video="),
    "evaluate": Verb("kit.evaluation.run:evaluate", "evaluate", "FVD, PSNR, SSIM, LPIPS and more, by a named protocol"),
    "table": Verb("kit.evaluation.report:show_table", "table", "results of one protocol side by side"),
    "inspect": Verb("kit.verbs:inspect", "inspect", "what each scale's bits hold, and how well they are predicted"),
    "cache": Verb("kit.verbs:cache", "cache", "encode clips once, for generators to train on"),
    "consolidate": Verb("kit.verbs:consolidate", "consolidate", "one file of a checkpoint in shards"),
    "prepare": Verb("kit.prepare.run:prepare", "prepare", "make what kit cannot ship: i3d, infinity, fluent_emoji, vizdoom"),
    "doctor": Verb("kit.planning.doctor:doctor", "doctor", "what this machine can run"),
    "demo": Verb("kit.demo:demo", "demo", "train, generate, score on the embedded data: 15 minutes on 2 cores with bfloat16"),
}  # fmt: skip


SAID = ("prompt", "label", "negative")  # in which ${...} is text too; elsewhere it is the value of another key
FREE_TEXT = (
    *SAID, "settings", "image", "video", "videos", "real", "prompts",
)  # fmt: skip
PATHS = (
    "ckpt", "out", "tokenizer", "condition.encoder", "tokenizer_ckpt", "detector_weights", "lpips_weights", "source",
    "data.root", "data.images.root",
)  # fmt: skip

# Errors that a user can fix; printed without a traceback.
MENDABLE = (ValueError, OSError, ImportError, MemoryError, UnreadableVideo)


def usage() -> str:
    width = max(map(len, VERBS))
    lines = [f"  {name:<{width}}  {verb.help}" for name, verb in VERBS.items()]
    return (
        "python -m kit VERB [conf=NAME] [key=value ...]\n\nverbs:\n" + "\n".join(lines) + "\n\n"
        "python -m kit VERB --help    its keys, their defaults and units\n"
        "python -m kit VERB ... --cfg job    the composed config      --multirun key=a,b,c    one run for each value\n\n"
        "first steps:\n"
        "  python -m kit demo\n"
        "  python -m kit fit conf=stage1_tokenizer && python -m kit fit conf=stage2_generator\n"
        '  python -m kit generate ckpt=runs/demo/generator/checkpoints/last.ckpt prompt="a red ball moving right over a '
        'green field" n=4 seed=0\n'
    )


def register_resolvers():
    """Registers the functions that configs can call.

    These are functions of `kit.machine`, such as ${kit_precision:}, for values that depend on the machine; `kit_cached` for
    values of a cache of clips; and `batches_of` and `part_of` for batches in parts.
    """
    from omegaconf import OmegaConf

    from kit import machine
    from kit.data.cache import of_manifest
    from kit.values import batches_of, part_of

    for name in ("machine_size", "precision", "devices", "processes", "wandb_offline", "sweep_run"):
        OmegaConf.register_new_resolver(f"kit_{name}", getattr(machine, name), replace=True)
    for function in (batches_of, part_of):
        OmegaConf.register_new_resolver(f"kit_{function.__name__}", function, replace=True)
    OmegaConf.register_new_resolver("kit_cached", of_manifest, replace=True)


def resolve(function: str) -> Callable:
    module, name = function.split(":")
    return getattr(import_module(module), name)


def complain(message: str) -> int:
    print(f"kit: {message}", file=sys.stderr)
    return 2


def split(args: list[str]) -> tuple[str | None, list[str]]:
    """Splits arguments into the NAME of conf=NAME, or None, and the others."""
    names = [a.removeprefix("conf=") for a in args if a.startswith("conf=")]
    return (names[-1] if names else None), [a for a in args if not a.startswith("conf=")]


WORDS = ("words", "overrides", "tokenizer_overrides", "generator_overrides")  # of doctor and demo: words for another conf


def quoted(word: str, sweep: bool = False) -> str:
    """Quotes the value of a word key=value if it is free text or a file name, since hydra's grammar fails on commas and
    brackets in it.

    Args:
        sweep: whether commas between paths separate the values of a sweep.
    """
    key, equals, text = word.partition("=")
    if text.startswith("~/"):
        text = os.path.expanduser(text)
        word = f"{key}={text}"
    if key in WORDS and text[:1] == "[" and text[-1:] == "]":
        return f"{key}=[{','.join(as_text(part) for part in at_commas(text[1:-1]))}]"
    free = key in FREE_TEXT or (key in PATHS and not (sweep and "," in text))
    free = free or key == "name" and bool(re.fullmatch(r"[-+.\w]*\d[-+.\w]*", text))  # 2024_01_15 is no number
    free = free or bool(text) and text[0] not in "[{" and not readable(word)
    if not equals or not free:
        return word
    return f"{key}={as_text(text, literal=key in SAID)}"


def as_text(text: str, literal: bool = True) -> str:
    """Puts a text in quotes, so that hydra takes it as it is; leaves null and quoted texts as they are.

    Args:
        literal: whether ${...} in it is text too, not the value of another key.
    """
    if text == "null" or (len(text) > 1 and text[0] == text[-1] and text[0] in "\"'"):
        return text
    if literal:
        text = re.sub(r"(\\*)\$\{", r"\1\1\\${", text)  # omegaconf halves backslashes before ${
    text = re.sub(r"(\\*)'", r"\1\1\\'", text)  # hydra unescapes only backslashes before a quote
    return "'" + re.sub(r"(\\+)$", r"\1\1", text) + "'"


def at_commas(text: str) -> list[str]:
    """Splits a text at commas, except within brackets or within quotes that begin a part."""
    parts, depth, quote = [""], 0, ""
    for letter in text:
        if quote or (letter in "\"'" and not parts[-1].strip()):
            quote = "" if letter == quote else quote or letter
        else:
            depth += (letter in "[{(") - (letter in "]})")
        if letter == "," and not depth and not quote:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts if part.strip()]


ELSEWHERE = ("--config-path", "-cp", "--config-name", "-cn", "--config-dir", "-cd")  # hydra's: other confs than kit's
VALUED = ("--cfg", "-c", "--package", "-p", *ELSEWHERE)


def options_and_overrides(words: list[str]) -> tuple[list[str], list[str]]:
    """Parts hydra's own options, with their values, from the overrides: hydra does not find options that come between
    overrides."""
    options, overrides, rest = [], [], iter(words)
    for word in rest:
        if not word.startswith("-"):
            overrides.append(word)
            continue
        options.append(word)
        if word in VALUED:
            options += [value for value in [next(rest, None)] if value is not None]
    return options, overrides


def readable(word: str) -> bool:
    """Returns whether hydra's grammar accepts a word."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        OverridesParser.create().parse_override(word)
    except HydraException:
        return False
    return True


def main(argv: list[str] | None = None) -> int:
    """Runs a command line and returns its exit status: 0 success, 1 failure, 2 invalid command line."""
    try:
        status = understand(argv)
        sys.stdout.flush()
        if status == 0:
            leave_process_group()
    except BrokenPipeError:  # the reader of a pipe, such as `head`, has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
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
    return run_verb(verb, path, rest)


def leave_process_group():
    """Closes the group of processes that trained together, as torch requires: a process that ends while threads of gloo run
    may be aborted.

    Not to be called after an error, when other processes may be waiting for this one in a collective operation.
    """
    distributed = sys.modules.get("torch.distributed")  # None if the verb did not import torch
    if distributed and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def set_threads(number: int | None):
    """Sets the number of CPU threads of torch; None and 0 leave torch's own choice. Raises ValueError if negative."""
    if number and number < 0:
        raise ValueError(f"threads={number}; expected a number of threads, or null for torch's own choice")
    if number:
        import torch

        torch.set_num_threads(number)


def worth_telling(record: logging.LogRecord) -> bool:
    return not any(part in record.getMessage() for part in ("litlogger", "Ignoring `Trainer(max_time="))


def silence():
    """Suppresses messages of Lightning that do not concern a user.

    These are an advertisement, the note that our own timer implements `trainer.max_time`, a warning to Lightning's authors,
    and the note that models which are not trained, such as a generator's tokenizer, are in eval mode.
    """
    for told in (".*LeafSpec", "Found .* in eval mode at the start of training"):
        warnings.filterwarnings("ignore", told)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(worth_telling)


def run_verb(verb: str, path: Path, overrides: list[str]) -> int:
    """Composes the config and calls the verb; prints errors that a user can fix without a traceback.

    Args:
        path: file of the conf. overrides: the other words of the command line.
    Returns:
        the exit status, see `main`.
    """
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.errors import InstantiationException
    from lightning.fabric.utilities.exceptions import MisconfigurationException
    from omegaconf.errors import InterpolationToMissingValueError, MissingMandatoryValue

    register_resolvers()
    silence()
    failures: list[BaseException] = []
    here = os.getpid()
    conf, own = path.stem, [] if path.parent == CONF else [f"--config-dir={CONF}"]  # searched after the conf's own folder

    def fail(message: str, error: Exception):
        print(message, file=sys.stderr)
        failures.append(error)
        with suppress(OSError):  # unless it is empty
            Path(HydraConfig.get().runtime.output_dir).rmdir()

    def task(cfg):
        if wrong := wrong_words(cfg, path, overrides):
            fail("\n".join(f"kit {verb}: {told}" for told in wrong), ValueError(*wrong))
            return
        # Lightning starts further ranks with this command line.
        sys.argv = [sys.argv[0], verb, f"conf={path if own else conf}", *options, *overrides]
        try:
            set_threads(cfg.threads)
            resolve(VERBS[verb].function)(cfg)
            if verb != "fit":  # which does so at its start
                keep_config(cfg)
        except (MissingMandatoryValue, InterpolationToMissingValueError) as error:
            found = re.search(r"Missing mandatory value: (\S+)", str(error))
            key = found[1] if found else error.full_key
            fail(f"kit {verb}: {key} is missing; give {key}=...", error)
        except (*MENDABLE, InstantiationException, MisconfigurationException) as error:
            cause = error.__cause__ if isinstance(error, InstantiationException) else error
            mendable = isinstance(cause, (*MENDABLE, MisconfigurationException))
            if os.environ.get("KIT_TRACEBACK") or not mendable or os.getpid() != here:
                raise  # in another process, a job of hydra's launcher, to the main process, which prints it
            fail(f"kit {verb}: {cause}\n(KIT_TRACEBACK=1 shows where)", error)
        except RuntimeError as error:
            if type(error).__name__ != "OutOfMemoryError" or os.environ.get("KIT_TRACEBACK"):  # torch's, of a GPU
                raise
            room = "fits=12GB, recompute=true or fewer clips a step" if verb == "fit" else "a smaller batch_size"
            fail(f"kit {verb}: {error}\n{room} takes less\n(KIT_TRACEBACK=1 shows where)", error)

    for told in misspelt_in(path) if own else ():
        print(f"kit {verb}: note: {path.name}: {told}", file=sys.stderr)
    options, words = options_and_overrides(overrides)
    sweep = bool({"-m", "--multirun"} & set(options))
    overrides = [quoted(word, sweep) for word in words]
    elsewhere = any(option.split("=")[0] in ELSEWHERE for option in options)
    if not elsewhere and (told := refused(path, overrides, sweep)):
        print(f"kit {verb}: {told}", file=sys.stderr)
        return 1
    sys.argv = [sys.argv[0], f"--config-name={conf}", *own, *options, *overrides]
    try:
        hydra.main(version_base="1.3", config_path=str(path.parent), config_name=conf)(task)()
    except KeyboardInterrupt:  # caught here, not in `task`, so that it ends a whole --multirun
        print(f"\nkit {verb}: interrupted", file=sys.stderr)
        return 1
    except SystemExit as stop:  # from hydra, which has printed why, or from Lightning after an interrupt
        return stop.code if isinstance(stop.code, int) else 1
    return 1 if failures else 0
