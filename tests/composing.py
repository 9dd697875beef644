"""Composes the configs of hundreds of tiny commands in a small part of the time that hydra takes, which is most of theirs."""

from __future__ import annotations

import copy
import dataclasses
import functools
import pickle
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import omegaconf.grammar_parser
import yaml
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import CachingConfigRepository
from hydra._internal.defaults_list import DefaultsList, Overrides, _create_interpolation_map, create_defaults_list
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.plugins.config_source import ConfigResult
from omegaconf import DictConfig

from kit.confs import CONF
from kit.machine import machine_size


class Repository(CachingConfigRepository):
    """Reads each of kit's own confs once. A user's, which tests write, are read for each command."""

    kept: dict[str, ConfigResult | None] = {}

    def __init__(self, delegate):
        self.delegate, self.cache = delegate, {}
        if [source.path for source in self.get_sources() if source.scheme() == "file"] == [str(CONF)]:
            self.cache = self.kept

    def initialize_sources(self, config_search_path):
        self.delegate, self.cache = copy.deepcopy(self.delegate), dict(self.cache)  # further folders may have other confs
        super().initialize_sources(config_search_path)


class Loader(ConfigLoaderImpl):
    """Merges once those of kit's own confs that are chosen together; gives a copy, which pickle makes fastest."""

    merged: dict[str, bytes] = {}

    def _compose_config_from_defaults_list(self, defaults, repo) -> DictConfig:
        compose = super()._compose_config_from_defaults_list
        if repo.cache is not Repository.kept:
            return compose(defaults, repo)
        if str(defaults) not in self.merged:
            self.merged[str(defaults)] = pickle.dumps(compose(defaults, repo))
        return pickle.loads(self.merged[str(defaults)])

    def _load_single_config(self, default, repo) -> ConfigResult:
        result = super()._load_single_config(default, repo)
        return dataclasses.replace(result, config=copy.deepcopy(result.config))  # which merging changes


chosen: dict[str, DefaultsList] = {}  # a command's conf and the words that choose confs -> those that are composed


def defaults_list(repo, config_name, overrides_list, **how) -> DefaultsList:
    """Finds once which of kit's own confs are composed by words that choose them; other words do not matter to that."""
    find = functools.partial(create_defaults_list, repo, config_name, overrides_list, **how)
    if repo.cache is not Repository.kept:
        return find()
    words = vars(Overrides(repo, overrides_list)).copy()
    others = words.pop("config_overrides")
    key = str((config_name, how, words, machine_size()))  # with what conf/fit.yaml chooses a size by
    if key not in chosen:
        chosen[key] = find()
    return dataclasses.replace(chosen[key], config_overrides=others)


def interpolation_map(overrides, defaults_list, self_added) -> DictConfig | None:
    needed = any(default.is_interpolation() for default in defaults_list)
    return _create_interpolation_map(overrides, defaults_list, self_added) if needed else None


@functools.cache
def parsed(rule: str, text: str):
    return parse_rule(OverridesParser.create(), text, rule)


def parsed_once(_, text: str, rule: str):
    found = parsed(rule, text)
    return copy.copy(found) if isinstance(found, Override) else found  # which gets the loader of its command


parse_rule = OverridesParser.parse_rule


@contextmanager
def composing_quickly() -> Iterator[None]:
    """Has hydra use these classes and functions, and omegaconf parse each interpolation once; PyYAML read with libyaml where
    it is there; and hydra not compose a config once more only to read `hydra.mode`, which no conf sets."""
    parse = functools.cache(omegaconf.grammar_parser.parse)
    with ExitStack() as stack:
        for name, value in {
            "hydra._internal.config_loader_impl.CachingConfigRepository": Repository,
            "hydra._internal.config_loader_impl.create_defaults_list": defaults_list,
            "hydra._internal.hydra.ConfigLoaderImpl": Loader,
            "hydra._internal.defaults_list._create_interpolation_map": interpolation_map,
            "hydra._internal.hydra.Hydra.get_mode": mock.Mock(return_value=None),
            "hydra.core.override_parser.overrides_parser.OverridesParser.parse_rule": parsed_once,
            "omegaconf.base.parse": parse,
            "omegaconf._utils.parse": parse,
            "yaml.SafeLoader": getattr(yaml, "CSafeLoader", yaml.SafeLoader),
        }.items():
            stack.enter_context(mock.patch(name, value))
        yield
