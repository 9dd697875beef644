"""Finds and reads config files, kit's own in conf/ and a user's anywhere: which of them train, their help, keys misspelt."""

from __future__ import annotations

import difflib
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from omegaconf import DictConfig

PACKAGE = Path(__file__).resolve().parent
CONF = PACKAGE / "conf" if (PACKAGE / "conf").is_dir() else PACKAGE.parent / "conf"


def located(conf: str) -> Path:
    """Finds the file of a conf: kit's own by name, a user's by path.

    Raises:
        ValueError: if there is none, or a user's has the name of one of kit's, which hydra would take in its place.
    """
    path = Path(conf).expanduser()
    if path.suffix != ".yaml":
        path = CONF / f"{conf}.yaml"
        if not path.is_file():
            raise ValueError(f"no conf named {conf!r}; choose from {', '.join(confs())}, or give a .yaml file of your own")
    elif not path.is_file():
        raise ValueError(f"conf={conf}: no such file")
    elif path.resolve().parent != CONF and (CONF / path.name).exists():
        raise ValueError(f"conf={conf}: kit has a {path.name} too; give yours another name")
    return path.resolve()


def values_of(path: Path) -> dict:
    """Reads the values that a config file itself sets.

    Raises:
        ValueError: if it is not YAML with keys, or its `defaults` are not a list.
    """
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no YAML in UTF-8: {error}") from error
    if not isinstance(values, dict) or not isinstance(values.get("defaults", []), list):
        raise ValueError(f"{path} is no config: expected keys, and defaults as a list such as [stage2_generator, _self_]")
    return values


def compose(path: Path, words: Iterable[str] = (), beside_it: Path | None = None) -> DictConfig:
    """Composes the config of a conf with words as hydra takes them; also works in a command that has another config.

    Args:
        beside_it: a further folder to search for configs that it is built on.
    """
    import hydra
    from hydra.core.global_hydra import GlobalHydra
    from hydra.initialize import get_gh_backup, restore_gh_from_backup

    kits = []
    if path.parent != CONF:
        own = (values_of(path).get("hydra") or {}).get("searchpath") or []
        others = [*own, *(f"file://{folder}" for folder in (beside_it, CONF) if folder)]
        kits = ["hydra.searchpath=[" + ", ".join(f"'{place}'" for place in others) + "]"]
    around = get_gh_backup()
    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_dir(str(path.parent), version_base="1.3"):
            return hydra.compose(path.stem, [*kits, *words])
    finally:
        restore_gh_from_backup(around)


def keep_config(cfg: DictConfig, verb: str = "fit"):
    """Writes a composed config, and the words of the command line, to `config` in the run's folder.

    Args:
        verb: of the command. In the folder of a training another verb's go to `config/VERB`, beside the training's own.
    """
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf

    from kit.files import written_aside

    words = list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []
    folder = Path(cfg.folder) / "config"
    if verb != "fit" and (folder.parent / "checkpoints").is_dir():
        folder /= verb
    for name, values in {"config": cfg, "overrides": OmegaConf.create(words)}.items():
        with written_aside(folder / f"{name}.yaml") as aside:
            OmegaConf.save(values, aside)


def beside(path: Path, name: str) -> Path:
    """Returns the path of a config that the one at `path` is built on: in the same folder if it exists there, else kit's."""
    own = path.parent / f"{name}.yaml"
    return own if own.exists() else CONF / f"{name}.yaml"


def trains(path: Path, within: tuple[Path, ...] = ()) -> bool:
    """Returns whether a conf is for `fit`: it says what to train, or is built on one that does.

    Raises:
        ValueError: if it is built on itself; else as `values_of`.
    """
    if path in within:
        raise ValueError(f"{path} is built on itself; name in its defaults what else it is built on")
    values = values_of(path)
    names = [name for name in values.get("defaults", []) if isinstance(name, str) and name != "_self_"]
    below = [beside(path, name.lstrip("/")) for name in names]
    return "module" in values or any(trains(found, (*within, path)) for found in below if found.exists())


def confs() -> list[str]:
    """Lists the names that conf= takes for `fit`."""
    return sorted(path.stem for path in CONF.glob("*.yaml") if trains(path))


def first_comment(conf: str) -> str:
    """Returns the first line of a conf's file, a comment."""
    return (CONF / f"{conf}.yaml").read_text().splitlines()[0].removeprefix("# ")


def describe(conf: Path) -> str:
    """Describes a conf: the choices of each of its groups, and the config files it is made of, with their comments."""
    text, seen, queue = [], set(), [conf.stem]
    groups = {}
    while queue:
        name = queue.pop(0)
        path = beside(conf, name)
        if name in seen or not path.exists():
            continue
        seen.add(name)
        text.append(f"--- {path.relative_to(CONF.parent) if path.is_relative_to(CONF) else path}\n{path.read_text().strip()}")
        for entry in values_of(path).get("defaults", []):
            if isinstance(entry, str) and entry != "_self_":
                queue.append((Path(name).parent / entry).as_posix())  # in the same group
            elif isinstance(entry, dict):
                (group, choice), *_ = entry.items()
                group, at, package = group.removeprefix("optional ").removeprefix("override ").lstrip("/").partition("@")
                word = f"{group}@{Path(name).parent.name}.{package}" if at else group  # within the group that it is a part of
                if word in groups:  # chosen already, by a config that is built on this one
                    continue
                groups[word] = choices(conf, group)
                choice = str(choice)
                queue.append(f"{group}/{choice if '$' not in choice else groups[word][-1]}")
    chosen = "\n".join(f"  {group}={'|'.join(names)}" for group, names in groups.items())
    return (f"groups:\n{chosen}\n\n" if chosen else "") + "keys, with their defaults:\n\n" + "\n\n".join(text)


def choices(conf: Path, group: str) -> list[str]:
    """Lists the choices of a group: kit's, and those beside a user's conf; not those that others are built on, as `_base`."""
    return sorted({path.stem for folder in (CONF, conf.parent) for path in (folder / group).glob("[!_]*.yaml")})


def misspelt_in(conf: Path) -> list[str]:
    """Reports keys in a user's conf that the configs it is built on do not have, but that resemble one they have.

    Hydra adds such keys without complaint, since they may be intended.
    """
    import yaml
    from omegaconf import OmegaConf

    values = values_of(conf)
    defaults = {"defaults": values.pop("defaults", [])}
    with tempfile.TemporaryDirectory() as folder:
        alone = Path(folder).resolve() / conf.name
        alone.write_text(yaml.safe_dump(defaults))
        try:
            known, keys = leaves(compose(alone, beside_it=conf.parent)), leaves(OmegaConf.create(values))
            added = [key for key in keys if key not in known and f"{key}._target_" in keys]
            empty = [key for key in known if not any(other.startswith(f"{key}.") for other in known)]  # such as `weights: {}`
            own = ("stages.", *(f"{key}." for key in added + empty))  # names of one's own, and objects such as callbacks
            return nearest([key for key in keys if not f"{key}.".startswith(own)], known)
        except Exception:  # reported elsewhere
            return []


def leaves(node: DictConfig, prefix: str = "") -> list[str]:
    """Lists all keys, those of groups of keys too, such as `data` and `data.fps`."""
    from omegaconf import DictConfig

    found = []
    for key in node:
        inner = node._get_node(key)
        found += [f"{prefix}{key}", *(leaves(inner, f"{prefix}{key}.") if isinstance(inner, DictConfig) else [])]
    return found


def nearest(keys: list[str], known: list[str]) -> list[str]:
    """Suggests a known key for each unknown key that resembles one."""
    like = {key: difflib.get_close_matches(key, known, 1) for key in keys if key not in known}
    return [f"no key {key}; did you mean {near[0]}?" for key, near in like.items() if near]
