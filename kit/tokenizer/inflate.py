"""Starts a tokenizer from a trained one: a video tokenizer from an image tokenizer (the paper's initialisation, section 3.1),
or one from another of the same architecture.

For a still video, an inflated tokenizer gives the image's bits in every latent frame and the image's reconstruction in every
frame: its kernels see the last time step only, the stem sees the last frame of each group, and the head makes all frames of
a group alike.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kit.scales import TAU
from kit.tokenizer import Tokenizer
from kit.values import differences

COLOURS = 3


def inflate(image: Tokenizer, video: Tokenizer):
    """Sets the weights of the video tokenizer `video` from the image tokenizer `image` of the same architecture.

    Their scales and `scale_bits` may differ: no weight depends on them.

    Raises:
        ValueError: if either is of the wrong kind, or they differ in more, naming the difference.
    """
    if image.config.temporal or not video.config.temporal:
        raise ValueError("inflate needs a tokenizer of images (tokenizer.temporal=false) and makes one of video of it")
    if others := differing(image, video, "temporal"):
        raise ValueError(f"the tokenizers of images and of video differ in more than time ({others}); make them alike")
    weights = {name: inflated(name, w, image.state_dict()[name]) for name, w in video.state_dict().items()}
    video.load_state_dict(weights)


def take_over(given: Tokenizer, tokenizer: Tokenizer):
    """Copies the weights of `given` into `tokenizer`. Their scales may differ, as in `inflate`.

    Raises:
        ValueError: if they differ in more, naming the difference.
    """
    if others := differing(given, tokenizer):
        raise ValueError(f"init.ckpt has another architecture than the tokenizer to train: {others}; make them alike")
    tokenizer.load_state_dict(given.state_dict())


def differing(a: Tokenizer, b: Tokenizer, *free: str) -> str:
    """Names the config values in which two tokenizers differ, except scales and the keys in `free`; empty if none do."""
    free = {*free, "scales", "scale_bits"}
    return "; ".join(differences(*({k: v for k, v in m.config.as_dict().items() if k not in free} for m in (a, b))))


def inflated(name: str, video: Tensor, image: Tensor) -> Tensor:
    """Expands a weight of the image tokenizer to the shape of the video tokenizer's weight of that name."""
    if name == "encoder.stem.weight":  # (out, colours * tau * patch^2, h, w): the last frame of each group
        groups = torch.zeros_like(video).unflatten(1, (COLOURS, TAU, -1))
        groups[:, :, -1] = image.unflatten(1, (COLOURS, -1))
        return groups.flatten(1, 3)
    if name.startswith("decoder.head."):  # (colours * tau * patch^2, ...): all frames of a group
        return image.unflatten(0, (COLOURS, 1, -1)).expand(-1, TAU, *[-1] * image.ndim).flatten(0, 2)
    if video.shape != image.shape:  # (out, time * in, h, w): the last slice of time
        kernel = torch.zeros_like(video)
        kernel[:, -image.shape[1] :] = image
        return kernel
    return image
