"""The command line: python -m kit VERB [conf=NAME] [key=value ...]

A verb is a thin function over a Python API of the same name; Hydra composes its config from conf/.
"""

from __future__ import annotations

import difflib
import os
import re
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

from kit.data.decode import UnreadableVideo

PACKAGE = Path(__file__).resolve().parent
CONF = PACKAGE / "conf" if (PACKAGE / "conf").is_dir() else PACKAGE.parent / "conf"


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


def confs() -> list[str]:
    """Names that conf= takes for `fit`: those that say what to train, and those built on them."""
    import yaml

    def trains(path: Path) -> bool:
        values = yaml.safe_load(path.read_text()) or {}
        below = [name for name in values.get("defaults", []) if isinstance(name, str) and name != "_self_"]
        return "module" in values or any(trains(CONF / f"{name}.yaml") for name in below)

    return sorted(path.stem for path in CONF.glob("*.yaml") if trains(path))


def first_comment(conf: str) -> str:
    """What its file begins with."""
    return (CONF / f"{conf}.yaml").read_text().splitlines()[0].removeprefix("# ")


def describe(verb: str, conf: str) -> str:
    """Help of a verb: its config files with their comments, and the choices of each group."""
    import yaml

    text, seen, queue = [], set(), [conf]
    groups = {}
    while queue:
        name = queue.pop(0)
        path = CONF / f"{name}.yaml"
        if name in seen or not path.exists():
            continue
        seen.add(name)
        source = path.read_text()
        text.append(f"--- conf/{name}.yaml\n{source.strip()}")
        for entry in (yaml.safe_load(source) or {}).get("defaults", []):
            if isinstance(entry, str) and entry != "_self_":
                queue.append((Path(name).parent / entry).as_posix())  # of the same group
            elif isinstance(entry, dict):
                (group, choice), *_ = entry.items()
                group, at, package = group.removeprefix("optional ").removeprefix("override ").lstrip("/").partition("@")
                word = f"{group}@{Path(name).parent.name}.{package}" if at else group  # within the group that it is a part of
                if word in groups:  # chosen already, by what is built on this
                    continue
                groups[word] = sorted(p.stem for p in (CONF / group).glob("*.yaml"))
                choice = str(choice)
                queue.append(f"{group}/{choice if '$' not in choice else groups[word][-1]}")
    chosen = "\n".join(f"  {group}={'|'.join(names)}" for group, names in groups.items())
    return (
        f"python -m kit {verb}{' conf=' + conf if VERBS[verb].conf is None else ''} [key=value ...]: {VERBS[verb].help}\n\n"
        + (f"groups:\n{chosen}\n\n" if chosen else "")
        + "keys, with their defaults:\n\n" + "\n\n".join(text)
    )  # fmt: skip


def register_resolvers():
    """Values that depend on the machine, each a function of `kit.machine`: ${kit_precision:} and so on; and on a cache of
    clips."""
    from omegaconf import OmegaConf

    from kit import machine
    from kit.data.cache import of_manifest

    for name in ("machine_size", "precision", "devices", "processes", "wandb_offline", "sweep_run"):
        OmegaConf.register_new_resolver(f"kit_{name}", getattr(machine, name), replace=True)
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


def quoted(word: str, sweep: bool = False) -> str:
    """Quotes what is free text or a file's name for hydra, whose grammar would stumble over commas and brackets.

    Args:
        sweep: whether several paths, with commas between them, are a sweep.
    """
    key, equals, text = word.partition("=")
    if text.startswith("~/"):
        text = os.path.expanduser(text)
        word = f"{key}={text}"
    free = key in FREE_TEXT or (key in PATHS and not (sweep and "," in text))
    free = free or bool(text) and text[0] not in "[{" and not readable(word)
    if not equals or not free or text == "null" or (len(text) > 1 and text[0] == text[-1] and text[0] in "\"'"):
        return word
    text = re.sub(r"(\\*)'", r"\1\1\\'", text)  # of backslashes hydra minds those before a quote alone
    return f"{key}='" + re.sub(r"(\\+)$", r"\1\1", text) + "'"


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
    conf = conf or "stage1_tokenizer"
    if not (CONF / f"{conf}.yaml").exists():
        return complain(f"no conf named {conf!r}; choose from {', '.join(confs())}, or `python -m kit {verb} --help`")
    if (conf in confs()) != (verb == "fit"):
        return complain(f"conf={conf} is not for {verb}" + (f"; choose from {', '.join(confs())}" if verb == "fit" else ""))
    if {"-h", "--help"} & set(rest):
        if verb == "fit":
            print("conf=\n" + "".join(f"  {name:<26}{first_comment(name)}\n" for name in confs()))
        print(describe(verb, conf))
        return 0
    return run_verb(verb, conf, rest)


def run_verb(verb: str, conf: str, overrides: list[str]) -> int:
    """Composes the config and calls the verb; what a user can mend is told without a traceback."""
    import hydra
    from hydra.errors import InstantiationException
    from lightning.fabric.utilities.exceptions import MisconfigurationException
    from omegaconf.errors import InterpolationToMissingValueError, MissingMandatoryValue

    register_resolvers()
    failures: list[BaseException] = []
    here = os.getpid()

    def task(cfg):
        if wrong := wrong_kinds(cfg, conf, overrides):
            print("\n".join(f"kit {verb}: {told}" for told in wrong), file=sys.stderr)
            failures.append(ValueError(*wrong))
            return
        sys.argv = [sys.argv[0], verb, f"conf={conf}", *overrides]  # Lightning starts further ranks with these words
        if cfg.threads:
            import torch

            torch.set_num_threads(cfg.threads)
        try:
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

    sweep = bool({"-m", "--multirun"} & set(overrides))
    overrides = [quoted(word, sweep) for word in options_first(overrides)]
    sys.argv = [sys.argv[0], f"--config-name={conf}", *overrides]
    try:
        hydra.main(version_base="1.3", config_path=str(CONF), config_name=conf)(task)()
    except KeyboardInterrupt:  # out here, so that it ends a --multirun too
        print(f"\nkit {verb}: interrupted", file=sys.stderr)
        return 1
    except SystemExit as stop:  # of hydra, which has said why, or of Lightning after an interrupt
        for told in misspelt(conf, overrides) if stop.code == 1 and not failures else ():
            print(f"kit {verb}: {told}", file=sys.stderr)
        return stop.code if isinstance(stop.code, int) else 1
    return 1 if failures else 0


def groups_of(overrides: list[str]) -> list[str]:
    """The words that choose a group's config, or add and remove keys: what defaults depend on."""
    return [word for word in overrides if word[0] in "+~" or (CONF / word.split("=")[0].split("@")[0]).is_dir()]


def wrong_kinds(cfg, conf: str, overrides: list[str]) -> list[str]:
    """Of the words, those that put a text where the config has a number, or one value where it has several."""
    import hydra
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    chosen = groups_of([word for word in overrides if "=" in word and not word.startswith(("-", "hydra"))])
    try:
        usual, told = hydra.compose(conf, chosen), []
    except Exception:  # whatever is wrong with it was told, or will be
        return []
    for key in (word.split("=")[0] for word in overrides if word not in chosen and "=" in word):
        try:
            before, now = (OmegaConf.select(values, key) for values in (usual, cfg))
        except OmegaConfBaseException:  # hydra's own, or what depends on a value that is missing
            continue
        several = OmegaConf.is_config(before) and now not in (None, False) and not OmegaConf.is_config(now)
        number = isinstance(before, int | float) and not key.startswith("trainer.")  # it takes words, such as auto
        if several or (number and isinstance(now, str)):
            example = OmegaConf.to_container(before) if several else before
            told.append(f"{key}={now}; expected {'values' if several else 'a number'} such as {example}")
    return told


def misspelt(conf: str, overrides: list[str]) -> list[str]:
    """Of the words, those whose key the config has not, with the key most like it."""
    import hydra
    from omegaconf import DictConfig

    def leaves(node, prefix: str = "") -> list[str]:
        found = []
        for key in node:
            inner = node._get_node(key)
            found += [f"{prefix}{key}", *(leaves(inner, f"{prefix}{key}.") if isinstance(inner, DictConfig) else [])]
        return found

    chosen = groups_of([word for word in overrides if "=" in word and not word.startswith(("-", "hydra"))])
    try:
        with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
            known = leaves(hydra.compose(conf, chosen))
    except Exception:
        return []
    keys = [word.split("=")[0] for word in overrides if word not in chosen and "=" in word and word[0] not in "-"]
    nearest = {key: difflib.get_close_matches(key, known, 1) for key in keys if key not in known}
    return [f"no key {key}; did you mean {near[0]}?" for key, near in nearest.items() if near and not key.startswith("hydra")]
