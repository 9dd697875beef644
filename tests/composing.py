"""Composes the configs of hundreds of tiny commands in a fifth of the time that hydra takes, which is most of theirs."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import yaml
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import CachingConfigRepository
from hydra._internal.defaults_list import _create_interpolation_map
from hydra.plugins.config_source import ConfigResult
from omegaconf import DictConfig

from kit.confs import CONF


class Repository(CachingConfigRepository):
    """Reads each of kit's own confs once. A user's, which tests write, are read for each command."""

    kept: dict[str, ConfigResult | None] = {}

    def __init__(self, delegate):
        super().__init__(delegate)
        if [source.path for source in self.get_sources() if source.scheme() == "file"] == [str(CONF)]:
            self.cache = self.kept

    def initialize_sources(self, config_search_path):
        self.cache = dict(self.cache)  # further folders may have other confs
        super().initialize_sources(config_search_path)


class Loader(ConfigLoaderImpl):
    """Merges once those of kit's own confs that are chosen together; gives a copy."""

    merged: dict[str, DictConfig] = {}

    def _compose_config_from_defaults_list(self, defaults, repo) -> DictConfig:
        compose = super()._compose_config_from_defaults_list
        if repo.cache is not Repository.kept:
            return compose(defaults, repo)
        if str(defaults) not in self.merged:
            self.merged[str(defaults)] = compose(defaults, repo)
        return copy.deepcopy(self.merged[str(defaults)])

    def _load_single_config(self, default, repo) -> ConfigResult:
        result = super()._load_single_config(default, repo)
        return dataclasses.replace(result, config=copy.deepcopy(result.config))  # which merging changes


def interpolation_map(overrides, defaults_list, self_added) -> DictConfig | None:
    needed = any(default.is_interpolation() for default in defaults_list)
    return _create_interpolation_map(overrides, defaults_list, self_added) if needed else None


@contextmanager
def composing_quickly() -> Iterator[None]:
    """Has hydra use these classes; PyYAML read with libyaml where it is there; and hydra not compose a config once more only
    to read `hydra.mode`, which no conf sets."""
    with ExitStack() as stack:
        for name, value in {
            "hydra._internal.config_loader_impl.CachingConfigRepository": Repository,
            "hydra._internal.hydra.ConfigLoaderImpl": Loader,
            "hydra._internal.defaults_list._create_interpolation_map": interpolation_map,
            "hydra._internal.hydra.Hydra.get_mode": mock.Mock(return_value=None),
            "yaml.SafeLoader": getattr(yaml, "CSafeLoader", yaml.SafeLoader),
        }.items():
            stack.enter_context(mock.patch(name, value))
        yield
