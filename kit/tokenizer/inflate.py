"""A tokenizer that starts as a trained one: of video from one of images (the paper's initialisation, section 3.1), or alike.

An inflated one gives, of a still video, the image's bits in every latent frame and the image's reconstruction in every
frame: kernels look at the last moment only, the stem at the last frame of each group, and the head paints all frames of a
group alike.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kit.scales import TAU
from kit.tokenizer import Tokenizer

COLOURS = 3


def inflate(image: Tokenizer, video: Tokenizer):
    """Sets the weights of `video` from those of `image`; both of one architecture but for time. Their scales may differ, and
    the scales' bits: no weight depends on them.

    Raises:
        ValueError: if one is not what it should be, or they differ in more, naming the difference.
    """
    if image.config.temporal or not video.config.temporal:
        raise ValueError("inflate needs a tokenizer of images (tokenizer.temporal=false) and makes one of video of it")
    if told := differing(image, video, "temporal"):
        raise ValueError(f"the tokenizers of images and of video differ in more than time: {told}; make them alike")
    weights = {name: inflated(name, w, image.state_dict()[name]) for name, w in video.state_dict().items()}
    video.load_state_dict(weights)


def take_over(given: Tokenizer, tokenizer: Tokenizer):
    """Sets the weights of `tokenizer` to those of `given`. Their scales may differ, as in `inflate`.

    Raises:
        ValueError: if they differ in more, naming the difference.
    """
    if told := differing(given, tokenizer):
        raise ValueError(f"init.ckpt has another architecture than the tokenizer to train: {told}; make them alike")
    tokenizer.load_state_dict(given.state_dict())


def differing(a: Tokenizer, b: Tokenizer, *free: str) -> str:
    """In which values that weights depend on two tokenizers differ, those named in `free` left out."""
    free = {*free, "scales", "scale_bits"}
    a, b = ({k: v for k, v in model.config.as_dict().items() if k not in free} for model in (a, b))
    return ", ".join(f"{key} {a[key]} and {b[key]}" for key in a if a[key] != b[key])


def inflated(name: str, video: Tensor, image: Tensor) -> Tensor:
    """The image's weight in the shape of the video's."""
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
