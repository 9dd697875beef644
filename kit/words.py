"""The words of a command line, key=value: quotes them for hydra, whose grammar they meet, and says which of them do not fit
the config."""

from __future__ import annotations

import functools
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from kit.confs import choices, compose, leaves, nearest

if TYPE_CHECKING:
    from omegaconf import DictConfig

INTERPOLATION = "${KEY} stands for the value of another key; to a path with ${ in it give a link without"
SAID = ("prompt", "label", "negative")  # in which ${...} is text too; elsewhere it is the value of another key
FREE_TEXT = (
    *SAID, "settings", "image", "video", "videos", "real", "prompts",
)  # fmt: skip
PATHS = (
    "ckpt", "init.ckpt", "tokenizer", "tokenizer_ckpt", "out", "root", "source", "condition.encoder",
    "loss.perceptual.weights", "detector_weights", "lpips_weights", "data.root", "data.source.captions", "data.images.root",
    "data.images.captions", "real_captions",
)  # fmt: skip
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
    if text == "null" or re.fullmatch(r"""(['"])(\\.|(?!\1)[^\\])*\1""", text, re.DOTALL):
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


def sorted_out(conf: Path, overrides: list[str]) -> tuple[list[str], list[str]]:
    """Splits a command's words: those that choose a group's config or add and remove keys, which defaults depend on; and the
    keys that the others set."""

    def chooses(word: str) -> bool:
        return word[0] in "+~" or bool(choices(conf, word.split("=")[0].split("@")[0]))

    words = [word for word in overrides if "=" in word and not word.startswith(("-", "hydra"))]
    return [word for word in words if chooses(word)], [word.split("=")[0] for word in words if not chooses(word)]


def wrong_words(cfg: DictConfig, conf: Path, overrides: list[str]) -> list[str]:
    """Reports the words of a command whose values are of a wrong kind, or that its other words leave without effect."""
    return [*wrong_kinds(cfg, conf, overrides), *idle_beside_stages(cfg, overrides)]


def idle_beside_stages(cfg: DictConfig, overrides: list[str]) -> list[str]:
    """Reports words that set a number of steps where stages have their own."""
    keys = [word.split("=")[0] for word in overrides] if cfg.get("stages") else []
    idle = [key for key in keys if re.fullmatch(r"trainer\.max_steps|recipe\.\w+\.steps", key)]
    return [f"{key} counts nothing beside stages; give stages.NAME.steps, or stage_steps for all of them" for key in idle]


@functools.cache
def cached_compose(conf: Path, *words: str) -> DictConfig:
    """Composes a config that is only read, once for all runs of a sweep."""
    return compose(conf, words)


OPTIONAL = r"guidance|stages|(stages|callbacks)\.\w+"  # groups of values that null takes out


def wrong_kinds(cfg: DictConfig, conf: Path, overrides: list[str]) -> list[str]:
    """Reports the words that give a text where the config has a number, or one value or none where it has several."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    chosen, keys = sorted_out(conf, overrides)
    try:
        usual, wrong = cached_compose(conf, *chosen), []
    except Exception:  # reported elsewhere
        return []
    for key in keys:
        try:
            before, now = (OmegaConf.select(values, key) for values in (usual, cfg))
        except OmegaConfBaseException:  # it depends on a missing value
            continue
        several = OmegaConf.is_config(before) and now not in (None, False) and not OmegaConf.is_config(now)
        number = isinstance(before, int | float) and not key.startswith("trainer.")  # those take words too, such as auto
        if now is None and OmegaConf.is_dict(before) and before and not re.fullmatch(OPTIONAL, key):
            wrong.append(f"{key}=null; kit reads what is in it: {', '.join(map(str, before))}. Set those, or leave it out")
        if several or (number and isinstance(now, str)):
            example = OmegaConf.to_container(before) if several else before
            wrong.append(f"{key}={now}; expected {'values' if several else 'a number'} such as {example}")
    return wrong


def refused(conf: Path, words: list[str], sweep: bool = False) -> str | None:
    """Says why a conf does not compose with words as hydra takes them; None if it does, or if hydra has to say why.

    Args:
        sweep: whether key=a,b stands for several runs; the first value counts.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException

    def of_one_run(word: str) -> str:
        override = OverridesParser.create().parse_override(word)
        values = override.sweep_string_iterator() if override.is_discrete_sweep() else iter(())
        return next((f"{word.split('=')[0]}={value}" for value in values), word)

    if any(word.startswith("hydra.searchpath") for word in words):
        return None
    words = [word for word in words if not word.startswith("hydra")]
    try:
        words = [of_one_run(word) for word in words] if sweep else words
        compose(conf, words)
    except MissingConfigException as error:
        missing = error.missing_cfg_file or ""
        keys = (word.split("=")[0] for word in words)
        group = next((key for key in keys if missing.startswith(f"{key}/")), missing.rpartition("/")[0])
        if not group or not error.options:
            return None
        name, choice = missing.removeprefix(f"{group}/"), ", ".join(option for option in error.options if option[0] != "_")
        own = f"; one of yours lies in the folder {group} beside a conf of yours, and is chosen by its name without .yaml"
        return f"no {group}={name}; choose from {choice}{own if name.endswith('.yaml') else ''}"
    except ConfigCompositionException as error:
        found = re.match(r"Could not override '(.+)'", str(error))
        said = str(error).strip() + (f"; {INTERPOLATION}" if "${" in str(error) else "")
        return unknown_key(conf, words, found[1]) if found else said
    except HydraException as error:
        said = re.sub(r"\s*See https://hydra.cc\S* for details", "", str(error)).strip().replace("\n", ": ")
        return f"{said}; expected key=value, a value with brackets, braces or commas within in quotes"
    except Exception:  # such as a broken file
        none = next((word for word in words if word.endswith("=null") and choices(conf, word.partition("=")[0])), None)
        return f"{none}; choose from {', '.join(choices(conf, none.partition('=')[0]))}" if none else None
    return None


OPEN = ("trainer.", "logger.", "callbacks.", "stages.")  # beginnings of keys that others may be added to


def unknown_key(conf: Path, words: list[str], key: str) -> str:
    """Says what key is most like one that the config has not, or else which keys it has there."""
    from omegaconf import OmegaConf

    if choices(conf, key):  # a group of other confs, and so among the words that choose, with which this one does not compose
        return f"{conf.stem} has no group {key}; --help lists its groups and keys"
    cfg = compose(conf, sorted_out(conf, words)[0])
    above = key.rpartition(".")[0]
    while above and not OmegaConf.is_dict(OmegaConf.select(cfg, above)):
        above = above.rpartition(".")[0]
    like = nearest([key], [known for known in leaves(cfg) if not key.startswith(f"{known}.")])
    keys = ", ".join(map(str, OmegaConf.select(cfg, above) if above else cfg))
    message = like[0] if like else f"no key {key}; {f'{above} has' if above else 'there are'} {keys}"
    return f"{message}; +{key}=... adds it" if key.startswith(OPEN) else message


def typed_keys() -> list[str]:
    """Lists the keys given on the command line, such as `seed` and `guidance.first`; none if there is no command line.

    Of values in braces, guidance={first: 3}, it lists those that are there: the others stay as they are.
    """
    from hydra.core.hydra_config import HydraConfig
    from hydra.core.override_parser.overrides_parser import OverridesParser

    words = HydraConfig.get().overrides.task if HydraConfig.initialized() else []
    keys = []
    for given in OverridesParser.create().parse_overrides([word for word in words if word[0] != "~"]):
        key, value = given.key_or_group, given.value()
        keys += [f"{key}.{part}" for part in value] if isinstance(value, dict) else [key]
    return keys
