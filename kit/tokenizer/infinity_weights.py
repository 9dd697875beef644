"""Loads Infinity's image tokenizer from its public weights (Han et al. 2024, arXiv 2412.04431).

Names and shapes are those of github.com/FoundationVision/Infinity, infinity/models/bsq_vae/: flux_vqgan.py, conv.py, and
vae.py for the values the weights were trained with. Its quantizer (multiscale_bsq.py) has no weights and equals ours without
an amplitude: residuals resized by area, their signs / sqrt(d), resized up bilinearly and summed.
"""

from __future__ import annotations

import re
from pathlib import Path

from torch import Tensor

from kit.files import read_weights
from kit.tokenizer import Tokenizer, TokenizerConfig
from kit.tokenizer.infinity import MIDDLE

SCALES = (1, 2, 4, 6, 8, 12, 16)  # Infinity's for 256 x 256 pixels (utils/dynamic_resolution.py)
PARTS = ("encoder.", "decoder.")  # a file also holds the quantizer, and what the tokenizer was trained against
QUANTIZERS = ("quantizer.", "quantize.")  # two names for the same part
LAYERS = {
    "norm1": "norm1.norm", "conv1": "conv1.conv", "norm2": "norm2.norm", "conv2": "conv2.conv",
    "shortcut": "nin_shortcut.conv",
}  # fmt: skip


def load_infinity(path: Path) -> Tokenizer:
    """Loads an image tokenizer that computes what Infinity's does.

    Args:
        path: a file from Infinity, such as infinity_vae_d32reg.pth. Nothing in it is executed.
    Raises:
        ValueError: if it holds something else, naming the first weights that are missing, unknown or of another shape.
    """
    weights = read_weights(path).get("vae")
    if not isinstance(weights, dict):
        raise ValueError(f"{path} has no entry `vae`, expected one: give a tokenizer of Infinity, infinity_vae_*.pth")
    learned = [key for key in weights if key.startswith(QUANTIZERS) and not key.endswith((".mask", ".zero"))]
    if learned:
        raise ValueError(f"{path} has a quantizer with weights of its own ({learned[0]}), expected one without")
    tokenizer = Tokenizer(config_of(weights, path))
    ours = tokenizer.state_dict()
    names = {name: infinity_name(name, tokenizer.config) for name in ours}
    shapes = {names[name]: tuple(w.shape) for name, w in ours.items()}
    wrong = [f"{name} is missing, expected {shape}" for name, shape in shapes.items() if name not in weights]
    wrong += [f"{name} is unknown" for name in weights if name.startswith(PARTS) and name not in shapes]
    wrong += [
        f"{name} is {tuple(weights[name].shape)}, expected {shape}"
        for name, shape in shapes.items() if name in weights and weights[name].shape != shape
    ]  # fmt: skip
    if wrong:
        more = f" and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        raise ValueError(f"{path} is not a tokenizer of Infinity as published: {'; '.join(wrong[:4])}{more}")
    tokenizer.load_state_dict({name: weights[names[name]] for name in ours})
    return tokenizer


def config_of(weights: dict[str, Tensor], path: Path) -> TokenizerConfig:
    """Reads bits, widths and blocks from the names and shapes of the weights.

    Raises:
        ValueError: if a weight that this needs is missing.
    """
    numbers = re.findall(r"encoder\.down\.(\d+)\.block\.(\d+)\.", " ".join(weights)) or [("0", "0")]
    levels, blocks = (1 + max(map(int, column)) for column in zip(*numbers))
    head, *kernels = telling = ["encoder.conv_out.conv.weight"] + [
        f"encoder.down.{level}.block.0.conv2.conv.weight" for level in range(levels)
    ]
    if missing := [name for name in telling if name not in weights]:
        raise ValueError(f"{path} has no {missing[0]}, expected it of a tokenizer of Infinity, infinity_vae_*.pth")
    return TokenizerConfig(
        bits=weights[head].shape[0], scales=SCALES, architecture="infinity", patch=1,
        widths=tuple(weights[name].shape[0] for name in kernels), blocks=blocks, amplitude=None, temporal=False,
    )  # fmt: skip


def infinity_name(name: str, config: TokenizerConfig) -> str:
    """Returns Infinity's name of one of our weights: encoder.levels.1.0.conv1.bias -> encoder.down.1.block.0.conv1.conv.bias.

    Infinity counts levels from fine to coarse in the decoder too, and names the middle blocks `mid`.
    """
    part, *layer, leaf = name.split(".")
    coarsest = len(config.widths) - 1
    match [int(word) if word.isdigit() else word for word in layer]:
        case ["stem"]:
            there = "conv_in.conv"
        case ["norm"]:
            there = "norm_out.norm"
        case ["head"]:
            there = "conv_out.conv"
        case ["downs", i]:
            there = f"down.{i}.downsample.conv.conv"
        case ["ups", i]:
            there = f"up.{coarsest - i}.upsample.conv.conv"
        case ["levels", i, j, inner] if part == "encoder":
            block = f"down.{i}.block.{j}" if j < config.blocks else f"mid.block_{j - config.blocks + 1}"
            there = f"{block}.{LAYERS[inner]}"
        case ["levels", i, j, inner]:
            j -= MIDDLE if i == 0 else 0
            block = f"up.{coarsest - i}.block.{j}" if j >= 0 else f"mid.block_{j + MIDDLE + 1}"
            there = f"{block}.{LAYERS[inner]}"
    return f"{part}.{there}.{leaf}"
