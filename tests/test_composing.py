"""The tests' quick composition gives the configs that hydra's gives."""

from __future__ import annotations

from unittest import mock

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import CachingConfigRepository
from omegaconf import OmegaConf

from tests.fixtures import CLIP, composed


def test_configs_are_those_of_hydra(tmp_path):
    """Also once one of them is changed, and with a user's, which may change."""
    (tmp_path / "size").mkdir()
    own = (tmp_path / "size" / "mine.yaml", f"hydra.searchpath=[file://{tmp_path}]")

    def configs() -> list[dict]:
        found = []
        for bits in (7, 9):
            own[0].write_text(f"# @package _global_\nseed: {bits}\n")
            found += [composed("stage1_tokenizer", *CLIP, "size=tiny"), composed("stage1_tokenizer", "size=mine", own[1])]
            found += [composed("stage2_generator", "size=L", "~callbacks.ema", "+data.source.mine=[1]"), composed("generate")]
            OmegaConf.update(found[-4], "data.source.mine", 3, force_add=True)
        return [OmegaConf.to_container(config) for config in found]

    quick = configs()
    with mock.patch("hydra._internal.hydra.ConfigLoaderImpl", ConfigLoaderImpl):
        with mock.patch("hydra._internal.config_loader_impl.CachingConfigRepository", CachingConfigRepository):
            assert configs() == quick
