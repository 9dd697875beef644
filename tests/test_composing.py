"""The tests' quick composition gives the configs that hydra's gives."""

from __future__ import annotations

from contextlib import ExitStack
from unittest import mock

import omegaconf.grammar_parser
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import CachingConfigRepository
from hydra._internal.defaults_list import create_defaults_list
from omegaconf import OmegaConf

from tests.composing import parse_rule
from tests.fixtures import CLIP, composed

HYDRAS = {
    "hydra._internal.hydra.ConfigLoaderImpl": ConfigLoaderImpl,
    "hydra._internal.config_loader_impl.CachingConfigRepository": CachingConfigRepository,
    "hydra._internal.config_loader_impl.create_defaults_list": create_defaults_list,
    "hydra.core.override_parser.overrides_parser.OverridesParser.parse_rule": parse_rule,
    "omegaconf.base.parse": omegaconf.grammar_parser.parse,
    "omegaconf._utils.parse": omegaconf.grammar_parser.parse,
}


def test_configs_are_those_of_hydra(tmp_path):
    """Also once one of them is changed, and with a user's, which may change."""
    (tmp_path / "size").mkdir()
    own = (tmp_path / "size" / "mine.yaml", f"hydra.searchpath=[file://{tmp_path}]")

    def configs() -> list[dict]:
        found = []
        for bits in (7, 9):
            own[0].write_text(f"# @package _global_\ndefaults: [/size/tiny]\nseed: {bits}\n")
            found += [composed("stage1_tokenizer", *CLIP, "size=tiny"), composed("stage1_tokenizer", "size=mine", own[1])]
            found += [composed("stage2_generator", "size=L", "~callbacks.ema", "+data.source.mine=[1]"), composed("generate")]
            OmegaConf.update(found[-4], "data.source.mine", 3, force_add=True)
        return [OmegaConf.to_container(config, resolve=True) for config in found]

    quick = configs()
    with ExitStack() as stack:
        for name, value in HYDRAS.items():
            stack.enter_context(mock.patch(name, value))
        assert configs() == quick
