"""The functions that configs call, such as ${kit_precision:}."""

from __future__ import annotations

import netrc
import os
from pathlib import Path

from omegaconf import OmegaConf

from kit import machine
from kit.data.cache import of_manifest
from kit.values import as_word, equal_parts


def within(root: str, name: str) -> str:
    """Returns the path of a run's folder.

    Raises:
        ValueError: if either is empty: it would be the folder of all runs, or /.
    """
    for key, value in {"name": name, "root": root}.items():
        if value is None or not str(value).strip():
            problem = "names no folder; a run lies in <root>/<name>. Is a variable of the shell unset?"
            raise ValueError(f"{as_word(key, value)} {problem}")
    return f"{root}/{name}"


def part_of(batch_size: int, at_once: int | None) -> int:
    """Returns the number of clips in each of the `equal_parts` of a batch."""
    parts = equal_parts(batch_size, at_once)
    return batch_size if parts == 1 else batch_size // parts


def batches_of(batch_size: int, at_once: int | None, accumulate: int) -> int:
    """Returns the number of `equal_parts` in `accumulate` batches."""
    return accumulate * equal_parts(batch_size, at_once)


def cached(folder: str, key: str):
    """Reads a value of a cache as `of_manifest` does; a list as the config that omegaconf wants in its place."""
    value = of_manifest(folder, key)
    return OmegaConf.create(value) if isinstance(value, list) else value


def processes(devices: int | str | list) -> int:
    """Returns the number of processes on each machine of a cluster, one for each of `trainer.devices`.

    Raises:
        ValueError: if `devices` is not a number: what it selects on this machine, other machines may not have.
    """
    if isinstance(devices, int) or str(devices).isdigit():
        return int(devices)
    raise ValueError(f"hydra/launcher=slurm, trainer.devices={devices}: give a number, of each machine: trainer.devices=8")


def wandb_offline() -> bool:
    """Returns whether W&B has no key to log in with, and was not told a mode.

    It looks for one in the environment, and in the file of passwords where `wandb login` puts them, as of a login `user`:
    those of other servers may be there too.
    """
    if any(os.environ.get(f"WANDB_{name}") for name in ("API_KEY", "IDENTITY_TOKEN_FILE", "MODE")):
        return False
    try:
        known = netrc.netrc(Path(os.environ.get("NETRC") or "~/.netrc").expanduser()).hosts
    except (OSError, netrc.NetrcParseError):
        return True
    return not any(host == "api.wandb.ai" or login == "user" for host, (login, *_) in known.items())


def sweep_run() -> str:
    """Returns `/RUN_ID` for a run started by an agent of a W&B sweep, else an empty string."""
    return f"/{os.environ['WANDB_RUN_ID']}" if os.environ.get("WANDB_SWEEP_ID") else ""


RESOLVERS = {
    "kit_within": within,
    "kit_part_of": part_of,
    "kit_batches_of": batches_of,
    "kit_cached": cached,
    "kit_processes": processes,
    "kit_wandb_offline": wandb_offline,
    "kit_sweep_run": sweep_run,
    "kit_machine_size": machine.machine_size,
    "kit_precision": machine.precision,
    "kit_accelerator": machine.accelerator,
    "kit_devices": machine.devices,
}


def register_resolvers():
    """Lets configs call these functions by their names there."""
    for name, function in RESOLVERS.items():
        OmegaConf.register_new_resolver(name, function, replace=True)
