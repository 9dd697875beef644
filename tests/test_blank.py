"""Models that are built to be filled."""

from __future__ import annotations

from unittest.mock import Mock

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.utils._python_dispatch import TorchDispatchMode

from kit.blank import blank
from kit.checkpoint import load_generator_alone
from kit.fsdp import whole_model


class Drawn(TorchDispatchMode):
    """Lists the sizes of the tensors that initial weights are drawn into."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in (torch.ops.aten.normal_.default, torch.ops.aten.uniform_.default):
            self.sizes.append(args[0].numel())
        return function(*args, **(kwargs or {}))


def test_a_blank_model_draws_nothing():
    with Drawn() as drawn:
        model = blank(lambda: nn.Sequential(nn.Linear(3, 4), nn.Embedding(5, 2)))
        assert not drawn.sizes and model[0].weight.shape == (4, 3) and model[0].weight.requires_grad
        nn.Linear(3, 4)
        assert drawn.sizes == [12, 4], "others are drawn as ever"


def test_a_generator_is_loaded_without_drawing_its_layers(pair):
    with Drawn() as drawn:
        generator, _ = load_generator_alone(pair.generator)
    assert not drawn.sizes
    saved = torch.load(pair.generator, weights_only=True)["ema"]
    assert all(torch.equal(w, saved[f"model.{name}"]) for name, w in generator.model.named_parameters())


def test_a_whole_copy_of_a_sharded_model_is_built_blank(monkeypatch):
    weights = nn.Linear(3, 4).state_dict()
    monkeypatch.setattr("kit.fsdp.get_model_state_dict", lambda *_, **__: weights)
    with Drawn() as drawn:
        copy = whole_model(Mock(FSDPModule), lambda: nn.Linear(3, 4))
    assert not drawn.sizes and not copy.training
    assert all(torch.equal(w, weights[name]) for name, w in copy.state_dict().items())
