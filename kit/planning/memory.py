"""Estimates the memory of a training without using it: runs steps on meta tensors, which have shape, type and lifetime but
no contents, and sums up the sizes of those alive at once."""

from __future__ import annotations

import functools
import warnings
import weakref
from collections.abc import Callable, Hashable

import lightning as L
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

GPU = "xpu"  # device type that stands for any GPU: torch allows autocast to it on machines without one
# What is computed in bfloat16, and in float32, under autocast (aten/src/ATen/autocast_mode.h), as far as models call it.
HALVED = {  # on either device
    F.linear, F.conv2d, F.conv_transpose2d, torch.matmul, torch.bmm, Tensor.matmul, Tensor.__matmul__,
    F.scaled_dot_product_attention,
}  # fmt: skip
FLOAT = {
    "cpu": {F.softmax, torch.softmax, Tensor.softmax, F.interpolate, F.mse_loss},
    GPU: {
        F.softmax, torch.softmax, Tensor.softmax, F.interpolate, F.mse_loss, F.l1_loss, F.group_norm, F.layer_norm,
        F.binary_cross_entropy_with_logits, torch.rsqrt, Tensor.rsqrt, torch.exp, Tensor.exp, torch.log, Tensor.log,
        Tensor.pow, torch.pow, torch.sum, Tensor.sum, torch.norm, Tensor.norm,
    },
}  # fmt: skip


def signature(x) -> Hashable:
    """Returns what the outputs of an operation on meta tensors depend on: of a tensor its shape, strides and type."""
    if isinstance(x, Tensor):
        return x.shape, x.stride(), x.dtype, x.device
    if isinstance(x, list | tuple):
        return tuple(map(signature, x))
    return type(x), x  # 1, 1.0 and True are equal


class Repeated(TorchDispatchMode):
    """Runs an operation on meta tensors once for each kind of arguments, and from then on makes tensors like those it made.

    torch computes shapes in Python for most operations, which takes half a millisecond each; a model repeats few kinds.
    """

    def __init__(self):
        super().__init__()
        self.made: dict[Hashable, list[tuple]] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if not fresh(function):
            return function(*args, **kwargs)
        with torch._C.DisableTorchFunction():
            kind = function, signature(args), *((name, signature(x)) for name, x in kwargs.items())
            if kind in self.made:
                made = [torch.empty_strided(*shape, dtype=dtype, device="meta") for shape, dtype in self.made[kind]]
                return made[0] if len(function._schema.returns) == 1 else tuple(made)
        made = function(*args, **kwargs)
        with torch._C.DisableTorchFunction():
            several = made if isinstance(made, tuple) else (made,)
            given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
            meta = all(isinstance(x, Tensor) and x.device.type == "meta" for x in several)
            if meta and given.isdisjoint(x.untyped_storage()._cdata for x in several):
                self.made[kind] = [((x.shape, x.stride()), x.dtype) for x in several]
        return made


@functools.cache
def fresh(function: torch._ops.OpOverload) -> bool:
    """Returns whether an operation says of itself that it makes new tensors alone; a few that do give views nonetheless."""
    schema = function._schema
    arguments = [*schema.arguments, *schema.returns]
    return all(x.alias_info is None for x in arguments) and {str(x.type) for x in schema.returns} == {"Tensor"}


class Held(Repeated):
    """Counts the bytes of tensors on a device that were created in this context and are alive.

    Attributes: now, bytes alive; most, the maximum so far.
    """

    def __init__(self, device: str = "meta"):
        super().__init__()
        self.device = device
        self.now = self.most = 0
        self.storages = weakref.WeakSet()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = super().__torch_dispatch__(function, types, args, kwargs)
        with torch._C.DisableTorchFunction():
            for x in made if isinstance(made, list | tuple) else (made,):
                if isinstance(x, Tensor):
                    self._hold(x)
        return made

    def _hold(self, x: Tensor):
        storage = x.untyped_storage()
        if storage.device.type == self.device and storage not in self.storages:
            self.storages.add(storage)
            self.now += storage.nbytes()
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self._release, storage.nbytes())

    def _release(self, size: int):
        self.now -= size


class Pretence(TorchFunctionMode):
    """Makes meta tensors stand for tensors on a device: they report it, are created when it is asked for, and are computed
    with in the types of its autocast.

    Args:
        device: with an index, which distinguishes it from the real CPU, where small tensors are.
    Attributes: halves, id of a weight -> its copy in bfloat16, which autocast caches until it ends; None outside a step.
    """

    def __init__(self, device: torch.device):
        super().__init__()
        self.device, self.halves = device, None

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function == Tensor.device.__get__:  # a new object each time
            found = function(*args)
            return self.device if found.type == "meta" else found
        if function is torch._C._nn._parse_to:  # Module.to, which reads its arguments
            return function(*args, **(kwargs or {}))
        cast = self._place
        if torch.is_autocast_enabled(self.device.type):
            cast = self._half if function in HALVED else self._float if function in FLOAT[self.device.type] else cast
        args, kwargs = [cast(x) for x in args], {name: cast(x) for name, x in (kwargs or {}).items()}
        if self.device.type == GPU:
            function = FUSED.get(function, function)
        return function(*args, **kwargs)

    def _place(self, x):
        return torch.device("meta") if isinstance(x, torch.device) and x == self.device else x

    def _half(self, x):
        if not isinstance(x, Tensor) or x.dtype != torch.float32:
            return x
        if self.halves is None or not (x.is_leaf and x.requires_grad):
            return x.bfloat16()
        if id(x) not in self.halves:
            self.halves[id(x)] = x.bfloat16()
        return self.halves[id(x)]

    @staticmethod
    def _float(x):
        return x.float() if isinstance(x, Tensor) and x.is_floating_point() else x


def fused_attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    """Takes the memory that scaled_dot_product_attention takes on a GPU: stores no scores, casts a mask to q's type."""
    if attn_mask is not None:
        attn_mask = torch.zeros_like(attn_mask, dtype=q.dtype).masked_fill(~attn_mask, float("-inf"))
        attn_mask = attn_mask.expand(*q.shape[:3], k.shape[2])
    return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, attn_mask, True)[0]


class FusedNorm(torch.autograd.Function):
    """Takes the memory that rms_norm takes on a GPU: its kernel stores its input and one number per token.

    On meta tensors torch runs the plain formula, which stores more.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, torch.empty_like(x[..., :1], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, _) -> tuple[Tensor, Tensor]:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)


def fused_norm(x: Tensor, shape: tuple[int, ...], weight: Tensor, eps: float | None = None) -> Tensor:
    return FusedNorm.apply(x, weight)


FUSED = {F.scaled_dot_product_attention: fused_attention, F.rms_norm: fused_norm}  # on meta tensors torch runs plain formulas


def backward(loss: Tensor):
    """Runs the backward pass. `Tensor.backward` would leave a `Pretence` before layers are recomputed."""
    run = torch.autograd.Variable._execution_engine.run_backward
    run((loss,), (torch.ones_like(loss),), False, False, (), allow_unreachable=True, accumulate_grad=True)


def training_memory(
    build: Callable[[], L.LightningModule], batch: Callable[[torch.device], dict], device: str, bfloat16: bool, ema: bool,
    accumulate: int = 1, buckets: bool = False,
) -> tuple[int, int]:  # fmt: skip
    """Returns the bytes that a training holds between its steps, and at most within one.

    Compiled layers take less; buffers of libraries and rounding by an allocator come on top.

    Args:
        build: makes the module. batch: makes a batch on a device.
        device: `cpu` or `cuda`, which this machine need not have. bfloat16: whether it trains in mixed precision.
        ema: whether it keeps a moving average. accumulate: batches per step.
        buckets: whether DDP holds a copy of the gradients, in the buckets that it sums up over devices.
    """
    where = torch.device(GPU if device == "cuda" else device, 0)
    with warnings.catch_warnings(), Pretence(where) as pretence, Held() as held:
        warnings.simplefilter("ignore")
        module = on_paper(build, where)
        take_step = stepper(module, pretence, bfloat16)
        copies = [p.detach().clone() for p in module.model.parameters()] if ema else []
        copies += [torch.empty_like(p) for p in module.parameters() if buckets and p.requires_grad]
        between, held.most = held.now, held.now
        take_step(batch, accumulate)
        del copies
    return between, held.most


def on_paper(build: Callable[[], L.LightningModule], where: torch.device) -> L.LightningModule:
    """Builds a module of meta tensors that stand for tensors on the device of the `Pretence` that this is called in."""
    with torch.device("meta"):
        module = build()
    module.to(where)
    tokenizer = getattr(module, "tokenizer", None)
    if tokenizer is not None:
        tokenizer.to(where)
    return module


def without_trainer(module: L.LightningModule, update: Callable) -> L.LightningModule:
    """Lets a module take training steps without a trainer: nothing is logged, and `update` is called in place of `step`."""
    module.log = lambda *_, **__: None
    module.manual_backward, module.step = backward, update
    return module


def stepper(module: L.LightningModule, pretence: Pretence, bfloat16: bool) -> Callable:
    """Returns a function that takes a training step of a module without a trainer, but not its first: the state of its
    optimizers exists.

    Its arguments are a function that makes a batch on a device, and the number of batches per step.
    """
    optimizers, _ = module.configure_optimizers()
    for optimizer in optimizers:
        for group in optimizer.param_groups:  # torch's default on a GPU
            if "foreach" in group:
                group["foreach"] = pretence.device.type == GPU

    def update(**_):
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = torch.zeros_like(p)
    update()
    without_trainer(module, update)
    if module.kind == "tokenizer":
        module.start = 0  # the discriminators learn from the first step on

    def take_step(batch: Callable[[torch.device], dict], accumulate: int):
        for index in range(accumulate)[-2:]:  # two are enough: from the second on, each adds to existing gradients
            pretence.halves = {}
            with torch.autocast(pretence.device.type, torch.bfloat16, enabled=bfloat16):
                loss = module.training_step(batch(pretence.device), index)
            pretence.halves = None
            if module.automatic_optimization:
                backward(loss)
        if module.automatic_optimization:
            update()

    return take_step
