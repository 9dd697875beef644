"""Capabilities of this machine, and the defaults that follow from them."""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import math
import os
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from torch import Tensor

from kit.values import check_choice

CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")  # Linux, of the container


@functools.cache
def fast_bfloat16() -> bool:
    """Whether training in bfloat16 is faster than in float32 here: CUDA from Ampere on, CPUs with AVX-512 BF16 or AMX."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported() and _cpu_has_bf16()


def _cpu_has_bf16() -> bool:
    """Returns whether the CPU has bfloat16 instructions; mkldnn also accepts CPUs that only emulate them."""
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


@functools.cache
def can_compile() -> bool:
    """Whether torch.compile works here: it needs a C++ compiler, or Triton on a GPU."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.compile(torch.sin)(torch.zeros(2, device=device)).sum().item() == 0
    except Exception:  # its type varies: a missing compiler, header or driver
        return False


def device() -> torch.device:
    """Returns the device that trained models run on."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def made_to_last(function: Callable) -> Callable:
    """Decorates a function whose result is cached.

    Runs it outside inference mode, with the CPU as default device, so that the cached tensors serve any caller, training
    included.
    """

    @functools.wraps(function)
    def make(*args):
        with torch.inference_mode(False), torch.device("cpu"):
            return function(*args)

    return make


def onto(x: torch.Tensor, where: torch.device | str) -> torch.Tensor:
    """Moves a small tensor to a device without waiting for a GPU's pending work, as `to` would."""
    where = torch.device(where)
    return x.pin_memory().to(where, non_blocking=True) if where.type == "cuda" and x.device.type == "cpu" else x.to(where)


def check_precision(precision: str):
    """Checks the name of a precision. Raises ValueError unless it is `float32` or `bfloat16`."""
    check_choice("precision", precision, ("float32", "bfloat16"))


def autocast(precision: str):
    """Returns a context in which models compute in `float32` or `bfloat16`. Raises as `check_precision`."""
    check_precision(precision)
    return torch.autocast(device().type, torch.bfloat16, enabled=precision == "bfloat16")


@contextmanager
def keeping_cast_weights(*models: torch.nn.Module):
    """Lets `autocast`, entered within the block, cast each weight of frozen models once, not at every use: only what requires
    gradients does it keep. For computing without gradients."""
    frozen = [p for model in models for p in model.parameters() if not p.requires_grad]
    for p in frozen:
        p.requires_grad_(True)
    try:
        yield
    finally:
        for p in frozen:
            p.requires_grad_(False)


def without_autocast(device: torch.device):
    """Returns a context in which models on a device compute in the types of their weights and inputs."""
    there = torch.amp.is_autocast_available(device.type)  # not on the meta device
    return torch.autocast(device.type, enabled=False) if there else nullcontext()


def in_its_type(x: Tensor):
    """Returns a context in which a norm of `x` is computed in its type; the kernels keep its statistics in float32. A GPU's
    autocast would cast `x` to float32, and all that comes after it."""
    return nullcontext() if x.device.type in ("cpu", "meta") else torch.autocast(x.device.type, enabled=False)


def inference_precision() -> str:
    """Returns the name of the precision that suits this machine, see `autocast`."""
    return "bfloat16" if fast_bfloat16() else "float32"


def machine_size() -> str:
    """Returns the size preset that suits this machine."""
    return "small" if torch.cuda.is_available() else "tiny"


def precision() -> str:
    """Returns Lightning's name of the training precision for this machine."""
    return "bf16-mixed" if fast_bfloat16() else "32-true"


def devices() -> int | str:
    """Returns Lightning's `devices`: all GPUs, or one CPU process, whose threads use all cores."""
    return "auto" if torch.cuda.is_available() else 1


def accelerator() -> str:
    """Returns Lightning's name of the kind of `device`."""
    return device().type


def cores() -> int:
    """Returns how many CPU cores this process may use: of those that it is bound to, what a container's quota leaves."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = map(int, CPU_QUOTA.read_text().split())  # in microseconds; `max` for no quota
    except (OSError, ValueError):
        return bound
    return max(1, min(bound, math.ceil(quota / period)))


def installed_version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def cache_folder() -> Path:
    """Returns the folder for files kept for later runs: KIT_CACHE, else `kit` in XDG_CACHE_HOME, else ~/.cache/kit."""
    return Path(os.environ.get("KIT_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kit")


def in_cache(*parts: str) -> Path:
    """Returns a path in `cache_folder`, and makes the folder that it lies in.

    Raises:
        OSError: if that cannot be made, as where HOME is not the user's own.
    """
    try:
        path = cache_folder().joinpath(*parts)
        path.parent.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home
        raise OSError(f"no room for what is kept for later runs: {error}; KIT_CACHE=DIR says where there is") from error
    return path


@contextmanager
def fast_float32_products():
    """Lets torch compute float32 matrix products from bfloat16 or TF32 parts in a block: accurate enough for training."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def exact_float32():
    """Keeps a GPU from computing float32 convolutions and products in TF32 in a block: too inaccurate for measurements."""
    before = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before[0]
        torch.set_float32_matmul_precision(before[1])


def keep_freed_memory():
    """Makes glibc keep freed blocks instead of returning them to the system, which costs page faults at every allocation.

    Training on a CPU allocates the same blocks again at each step. Does nothing where there is no glibc.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    for parameter, value in ((-3, 1 << 30), (-1, (1 << 31) - 1), (-2, 1 << 28)):  # mmap threshold, trim threshold, top pad
        mallopt(parameter, value)
