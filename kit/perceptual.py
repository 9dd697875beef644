"""Learned perceptual distance on a VGG16 trunk: LPIPS 0.1 (Zhang et al. 2018, arXiv 1801.03924) and its shift-tolerant
variant ST-LPIPS (Ghildyal and Liu 2022, arXiv 2207.13686), whose weights are not for commercial use.

torchmetrics' LPIPS needs torchvision, which kit does without.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
import torchmetrics
from torch import Tensor, nn

from kit.files import file_sha256, read_weights
from kit.machine import without_autocast
from kit.recompute import recomputed

CONVOLUTIONS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))  # channels, stage by stage
VGG16 = "https://download.pytorch.org/models/vgg16-397923af.pth"  # torchvision's IMAGENET1K_V1
VGG16_SHA256 = "397923af"  # its first digits
SAFELY = "check_hash=True, weights_only=True"
GET_VGG16 = f"""python -c "import torch; torch.hub.load_state_dict_from_url('{VGG16}', {SAFELY})\""""
GET_ST = "vgg_shift_tolerant.pth of the PyPI package stlpips-pytorch"


class Convolution(nn.Module):
    """Frozen 3 x 3 convolution, then ReLU.

    Its weights are neither parameters nor in the state dict, so that optimizers, moving averages and checkpoints of a
    training leave them out.
    """

    def __init__(self, weight: Tensor, bias: Tensor):
        super().__init__()
        weight = weight.contiguous(memory_format=torch.channels_last)  # features follow; a quarter faster on a CPU
        self.weight, self.bias = nn.Buffer(weight, persistent=False), nn.Buffer(bias, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(F.conv2d(x, self.weight, self.bias, padding=1), inplace=True)


class MaxPool(nn.MaxPool2d):
    """2 x 2 max pooling: (B, C, h, w) -> (B, C, h // 2, w // 2)."""

    least = 16  # pixels a side that four in a row need
    layers = 1  # number of layers that it counts as in a file of weights

    def __init__(self):
        super().__init__(2)


class BlurPool(nn.Module):
    """Blurred max pooling: 2 x 2 maximum at every pixel, blur, every other pixel: -> (B, C, h // 2 + 1, w // 2 + 1).

    ST-LPIPS pads by two pixels, one more than the blur needs, which its authors found to help against shifts.
    """

    least = 18  # pixels a side that four in a row need: the reflection takes h >= 4
    layers = 2

    def __init__(self):
        super().__init__()
        taps = torch.tensor([1.0, 2.0, 1.0]) / 4
        self.kernel = nn.Buffer(torch.outer(taps, taps)[None, None], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(F.max_pool2d(x, 2, 1), (2, 2, 2, 2), mode="reflect")
        return F.conv2d(x, self.kernel.expand(x.shape[1], -1, -1, -1), stride=2, groups=x.shape[1])


class Stage(nn.Module):
    """Stage of the trunk: pooling and convolutions, and a weight for differences in each output channel.

    Args:
        convolutions: weight and bias of each. head: (C,) weights of the channels, not negative.
    """

    def __init__(self, pool: nn.Module, convolutions: list[tuple[Tensor, Tensor]], head: Tensor):
        super().__init__()
        self.pool = pool
        self.convolutions = nn.Sequential(*(Convolution(*c) for c in convolutions))
        self.head = nn.Buffer(head, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        # Blurred pooling would keep more for the backward pass (int64 indices, padded copies) than the convolutions do,
        # and is quick to repeat.
        return self.convolutions(recomputed(self.pool, x))

    def distance(self, a: Tensor, b: Tensor) -> Tensor:
        """Distance of features (B, C, h, w) -> (B,): squared differences of directions, weighted, averaged over pixels."""
        return ((_direction(a) - _direction(b)).square().mean(dim=(2, 3)) * self.head).sum(dim=1)


def _direction(x: Tensor) -> Tensor:
    """Divides each pixel's features by their length; gradients are finite at zero (as in torchmetrics)."""
    return x * torch.rsqrt(x.square().sum(dim=1, keepdim=True) + 1e-8)


class Perceptual(nn.Module):
    """Perceptual distance between pictures, see `load_perceptual`.

    It has no parameters and is always in evaluation mode. It computes in the type of its weights, float32 as loaded, under
    autocast too.

    Args:
        name: name of the measure, for reports.
        sha256: hash of the file with the trunk's weights.
        stages: the five stages of VGG16.
        least: minimum side of a picture in pixels.
    """

    def __init__(self, name: str, sha256: str, stages: list[Stage], least: int):
        super().__init__()
        self.name, self.sha256, self.least = name, sha256, least
        self.stages = nn.ModuleList(stages)
        shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])  # of ImageNet's colours
        self.shift = nn.Buffer(shift[:, None, None], persistent=False)
        self.scale = nn.Buffer(scale[:, None, None], persistent=False)
        self.eval()

    def train(self, mode: bool = True) -> Perceptual:
        """Stays in evaluation mode, whatever a parent switches to."""
        return super().train(False)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Computes the distances (B,) of pictures (B, 3, H, W) and (B, 3, H, W) in [-1, 1]; zero for equal ones.

        Raises:
            ValueError: if the shapes are others or differ, the sides are too small, or the values are integers.
        """
        if a.shape != b.shape or a.ndim != 4 or a.shape[1] != 3:
            raise ValueError(f"{self.name}: expected (B, 3, H, W) twice, got {tuple(a.shape)} and {tuple(b.shape)}")
        if min(a.shape[2:]) < self.least:
            raise ValueError(f"{self.name}: pictures of {a.shape[2]} x {a.shape[3]} pixels, but it takes {self.least} a side")
        if not (a.is_floating_point() and b.is_floating_point()):
            raise ValueError(f"{self.name}: expected floats in [-1, 1], got {a.dtype} and {b.dtype}; integers need scaling")
        with without_autocast(a.device):
            # Not one batch of both: this way the one without gradient, such as a loss's target, stores no activations.
            a, b = ((x.to(self.shift.dtype) - self.shift) / self.scale for x in (a, b))
            total = 0
            for stage in self.stages:
                a, b = stage(a), stage(b)
                total = total + stage.distance(a, b)
            return total


def vgg16_path() -> Path:
    """Returns the path where torch.hub stores torchvision's VGG16."""
    return Path(torch.hub.get_dir(), "checkpoints", Path(VGG16).name)


MEASURES = {  # kind -> name, pattern of a convolution's name in the trunk's file (see `_build`), pooling
    "lpips": ("LPIPS (VGG16)", "features.{layer}", MaxPool),
    "st-lpips": ("ST-LPIPS (VGG16)", "net.slice{stage}.{layer}", BlurPool),
}
Source = Callable[[str, tuple[int, ...]], Tensor]  # gives a tensor by its name and shape


def load_perceptual(kind: str, path: str | Path | None = None) -> Perceptual:
    """Loads a measure on the CPU, with weights from files; nothing in them is executed.

    Args:
        kind: `lpips` or `st-lpips`.
        path: for `lpips`, torchvision's VGG16 (default: where torch.hub stores it); the heads come with torchmetrics. For
            `st-lpips`, trunk and heads, named as in the package stlpips-pytorch: .pt, .pth or .safetensors.
    Raises:
        FileNotFoundError: if there is no such file, or no path for `st-lpips`. ValueError: if the file is another one or
            broken, or the kind is unknown.
    """
    name = _measure(kind)[0]
    if kind == "lpips":
        path = Path(path or vgg16_path())
        digest = _sha256(path, f"torchvision's VGG16; get it with `{GET_VGG16}`, or give its path")
        if not digest.startswith(VGG16_SHA256):
            raise ValueError(
                f"{path} is not torchvision's VGG16: expected a sha256 beginning with {VGG16_SHA256}, found {digest}; get it "
                f"with `{GET_VGG16}`, after removing a broken download, or give another path"
            )
        heads = Path(torchmetrics.__file__).parent / "functional" / "image" / "lpips_models" / "vgg.pth"
        return _build(kind, digest, _of_file(path, name), _of_file(heads, name))
    if path is None:
        raise FileNotFoundError(f"st-lpips needs the path of its weights: {GET_ST}")
    digest = _sha256(Path(path), f"weights of ST-LPIPS; they are {GET_ST}")
    source = _of_file(Path(path), name)
    return _build(kind, digest, source, source)


def untrained_perceptual(kind: str) -> Perceptual:
    """Builds a measure on torch's default device whose weights are not initialised, to estimate what it costs.

    Raises:
        ValueError: if the kind is unknown.
    """

    def source(_, shape: tuple[int, ...]) -> Tensor:
        return torch.empty(shape)

    return _build(kind, "", source, source)


def _measure(kind: str) -> tuple[str, str, type[MaxPool | BlurPool]]:
    if kind not in MEASURES:
        raise ValueError(f"unknown perceptual distance {kind!r}; expected 'lpips' or 'st-lpips'")
    return MEASURES[kind]


def _build(kind: str, sha256: str, trunk: Source, heads: Source) -> Perceptual:
    """Builds a measure. The name of a convolution is made of its stage, from 1, and its layer, counted over the trunk with
    ReLUs and poolings."""
    name, convolution, make_pool = _measure(kind)
    pool, stages, layer, before = make_pool(), [], 0, 3
    for number, widths in enumerate(CONVOLUTIONS):
        layer += pool.layers if number else 0
        convolutions = []
        for width in widths:
            prefix = convolution.format(stage=number + 1, layer=layer)
            convolutions.append((trunk(f"{prefix}.weight", (width, before, 3, 3)), trunk(f"{prefix}.bias", (width,))))
            layer, before = layer + 2, width
        head = heads(f"lin{number}.model.1.weight", (1, before, 1, 1)).flatten()
        stages.append(Stage(pool if number else nn.Identity(), convolutions, head))
    return Perceptual(name, sha256, stages, pool.least)


def _sha256(path: Path, what: str) -> str:
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}: {what}")
    return file_sha256(path)


def _of_file(path: Path, owner: str) -> Source:
    weights = read_weights(path)

    def source(name: str, shape: tuple[int, ...]) -> Tensor:
        found = weights.get(name)
        if found is None or found.shape != shape:
            found = "none" if found is None else tuple(found.shape)
            raise ValueError(f"{path} does not hold the weights of {owner}: expected {name} of shape {shape}, found {found}")
        return found.float()

    return source
