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
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

from kit.confs import CONF, confs, describe, first_comment, located, misspelt, misspelt_in, trains, wrong_kinds
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
    "prepare": Verb("kit.prepare:prepare", "prepare", "make what kit cannot ship: i3d, infinity, fluent_emoji, vizdoom"),
    "doctor": Verb("kit.doctor:doctor", "doctor", "what this machine can run"),
    "demo": Verb("kit.demo:demo", "demo", "train, generate and score on the embedded data, a quarter of an hour on 2 cores"),
}  # fmt: skip


FREE_TEXT = (
    "prompt", "label", "negative", "settings", "image", "video", "videos", "real", "prompts", "data.root", "data.images.root",
)  # fmt: skip
PATHS = ("ckpt", "out", "tokenizer", "condition.encoder", "tokenizer_ckpt", "detector_weights", "lpips_weights", "source")

# What a user can mend; told without a traceback.
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
    """Values that depend on the machine, each a function of `kit.machine`: ${kit_precision:} and so on; on a cache of clips;
    and on how many clips fit at once."""
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
    """Takes conf=NAME out of the arguments."""
    names = [a.removeprefix("conf=") for a in args if a.startswith("conf=")]
    return (names[-1] if names else None), [a for a in args if not a.startswith("conf=")]


WORDS = ("words", "overrides", "tokenizer_overrides", "generator_overrides")  # of doctor and demo: words for another conf


def quoted(word: str, sweep: bool = False) -> str:
    """Quotes what is free text or a file's name for hydra, whose grammar would stumble over commas and brackets.

    Args:
        sweep: whether several paths, with commas between them, are a sweep.
    """
    key, equals, text = word.partition("=")
    if text.startswith("~/"):
        text = os.path.expanduser(text)
        word = f"{key}={text}"
    if key in WORDS and text[:1] == "[" and text[-1:] == "]":
        return f"{key}=[{','.join(as_text(part) for part in at_commas(text[1:-1]))}]"
    free = key in FREE_TEXT or (key in PATHS and not (sweep and "," in text))
    free = free or bool(text) and text[0] not in "[{" and not readable(word)
    if not equals or not free:
        return word
    return f"{key}={as_text(text)}"


def as_text(text: str) -> str:
    """In quotes, as hydra takes any text; what is in quotes already, or null, as it is."""
    if text == "null" or (len(text) > 1 and text[0] == text[-1] and text[0] in "\"'"):
        return text
    text = re.sub(r"(\\*)'", r"\1\1\\'", text)  # of backslashes hydra minds those before a quote alone
    return "'" + re.sub(r"(\\+)$", r"\1\1", text) + "'"


def at_commas(text: str) -> list[str]:
    """What commas divide, but for those within brackets, or within quotes that a part begins with."""
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


VALUED = ("--cfg", "-c", "--package", "-p", "--config-path", "-cp", "--config-name", "-cn", "--config-dir", "-cd")


def options_first(words: list[str]) -> list[str]:
    """Hydra's own options before the overrides, between which it does not look for any."""
    options, overrides, rest = [], [], iter(words)
    for word in rest:
        if not word.startswith("-"):
            overrides.append(word)
            continue
        options.append(word)
        if word in VALUED:
            options += [value for value in [next(rest, None)] if value is not None]
    return options + overrides


def readable(word: str) -> bool:
    """Whether hydra's grammar takes it."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        OverridesParser.create().parse_override(word)
    except HydraException:
        return False
    return True


def main(argv: list[str] | None = None) -> int:
    """Runs a command line; returns its exit status: 0 done, 1 failed, 2 not understood."""
    try:
        status = understand(argv)
        sys.stdout.flush()
        if status == 0:
            leave_process_group()
    except BrokenPipeError:  # the reader of a pipe, such as `head`, has seen enough
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
    """Processes that trained together part, as torch asks for: one that ends while threads of gloo run may be aborted. Not
    after an error, when others may wait for this one in the midst of an exchange."""
    distributed = sys.modules.get("torch.distributed")  # not there where nothing was imported to train
    if distributed and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def set_threads(number: int | None):
    """Of torch; null and 0 leave its own choice. Raises: ValueError if negative."""
    if number and number < 0:
        raise ValueError(f"threads={number}; expected a number of threads, or null for torch's own choice")
    if number:
        import torch

        torch.set_num_threads(number)


def worth_telling(record: logging.LogRecord) -> bool:
    return not any(part in record.getMessage() for part in ("litlogger", "Ignoring `Trainer(max_time="))


def silence():
    """What Lightning says that is no user's business: an advertisement, that our own timer keeps `trainer.max_time`, a
    warning to its own authors, and that models which are not trained, such as a generator's tokenizer, are in eval mode."""
    for told in (".*LeafSpec", "Found .* in eval mode at the start of training"):
        warnings.filterwarnings("ignore", told)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(worth_telling)


def run_verb(verb: str, path: Path, overrides: list[str]) -> int:
    """Composes the config and calls the verb; what a user can mend is told without a traceback."""
    import hydra
    from hydra.errors import InstantiationException
    from lightning.fabric.utilities.exceptions import MisconfigurationException
    from omegaconf.errors import InterpolationToMissingValueError, MissingMandatoryValue

    register_resolvers()
    silence()
    failures: list[BaseException] = []
    here = os.getpid()
    conf, own = path.stem, [] if path.parent == CONF else [f"--config-dir={CONF}"]  # behind the conf's own folder

    def task(cfg):
        if wrong := wrong_kinds(cfg, path, overrides):
            print("\n".join(f"kit {verb}: {told}" for told in wrong), file=sys.stderr)
            failures.append(ValueError(*wrong))
            return
        # Lightning starts further ranks with these words.
        sys.argv = [sys.argv[0], verb, f"conf={path if own else conf}", *overrides]
        try:
            set_threads(cfg.threads)
            resolve(VERBS[verb].function)(cfg)
        except (MissingMandatoryValue, InterpolationToMissingValueError) as error:
            found = re.search(r"Missing mandatory value: (\S+)", str(error))
            key = found[1] if found else error.full_key
            print(f"kit {verb}: {key} is missing; give {key}=...", file=sys.stderr)
            failures.append(error)
        except (*MENDABLE, InstantiationException, MisconfigurationException) as error:
            cause = error.__cause__ if isinstance(error, InstantiationException) else error
            mendable = isinstance(cause, (*MENDABLE, MisconfigurationException))
            if os.environ.get("KIT_TRACEBACK") or not mendable or os.getpid() != here:
                raise  # from another process, a job of hydra's launcher, to this one, which tells of it
            print(f"kit {verb}: {cause}\n(KIT_TRACEBACK=1 shows where)", file=sys.stderr)
            failures.append(error)

    for told in misspelt_in(path) if own else ():
        print(f"kit {verb}: note: {path.name}: {told}", file=sys.stderr)
    sweep = bool({"-m", "--multirun"} & set(overrides))
    overrides = [quoted(word, sweep) for word in options_first(overrides)]
    sys.argv = [sys.argv[0], f"--config-name={conf}", *own, *overrides]
    try:
        hydra.main(version_base="1.3", config_path=str(path.parent), config_name=conf)(task)()
    except KeyboardInterrupt:  # out here, so that it ends a --multirun too
        print(f"\nkit {verb}: interrupted", file=sys.stderr)
        return 1
    except SystemExit as stop:  # of hydra, which has said why, or of Lightning after an interrupt
        for told in misspelt(path, overrides) if stop.code == 1 and not failures else ():
            print(f"kit {verb}: {told}", file=sys.stderr)
        return stop.code if isinstance(stop.code, int) else 1
    return 1 if failures else 0
