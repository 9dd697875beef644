"""Models whose weights are about to be loaded."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch import nn
from torch.overrides import TorchFunctionMode

M = TypeVar("M", bound=nn.Module)


class _Undrawn(TorchFunctionMode):
    """Leaves tensors as they are that functions of torch.nn.init would fill."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(function, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return function(*args, **kwargs)


def blank(build: Callable[[], M]) -> M:
    """Builds a model without drawing initial weights, which takes long for a large one; its weights are arbitrary until all
    are loaded."""
    with _Undrawn():
        return build()
