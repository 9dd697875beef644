"""Networks that turn a clip into a feature, for Fréchet distances.

A distance depends on the detector as much as on the clips.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from kit.evaluation.i3d import I3D, LEAST_FRAMES, SIDE
from kit.files import file_sha256, read_weights
from kit.machine import cache_folder, device
from kit.values import check_choice, hash_of

I3D_FILE = "i3d_kinetics400.safetensors"
PAIR = 2  # clips computed together, always: rounding depends on the size of a batch, results must not


class UnfitClips(ValueError):
    """Raised for clips that a detector does not take."""


@dataclass(frozen=True)
class Detector:
    """A network that gives each clip a feature.

    Args:
        kind: its name in a protocol. sha256: of its file of weights, or of several files together. size: D.
        least_frames, most_frames: of a clip; None: no limit.
        network: (2, 3, T, H, W) in [-1, 1], float32 -> (2, D).
    """

    kind: str
    sha256: str
    size: int
    least_frames: int
    most_frames: int | None
    network: Callable[[Tensor], Tensor]

    def check_frames(self, frames: int):
        """Checks that the detector takes clips of `frames` frames.

        Raises:
            UnfitClips: if it does not.
        """
        most = self.most_frames or frames
        if not self.least_frames <= frames <= most:
            takes = f"{self.least_frames}" if most == self.least_frames else f"{self.least_frames} or more"
            raise UnfitClips(f"the detector {self.kind} takes clips of {takes} frames, the protocol has {frames}")

    @torch.inference_mode()
    def __call__(self, clips: Tensor) -> Tensor:
        """Computes features: (n, 3, T, H, W) in [-1, 1] -> (n, D) float32 on the CPU.

        A clip's feature is the same whatever other clips it comes with.
        """
        features = []
        for pair in clips.float().split(PAIR):
            full = pair if len(pair) == PAIR else pair.expand(PAIR, -1, -1, -1, -1)
            features.append(self.network(full.to(device()))[: len(pair)].float().cpu())
        return torch.cat(features)


def resize_frames(clips: Tensor, side: int) -> Tensor:
    """Resizes each frame, (B, 3, T, H, W) -> (B, 3, T, side, side): bilinear, pixel centres aligned by area, antialiased."""
    frames = clips.transpose(1, 2).flatten(0, 1)
    frames = F.interpolate(frames, (side, side), mode="bilinear", align_corners=False, antialias=True)
    return frames.unflatten(0, (clips.shape[0], clips.shape[2])).transpose(1, 2)


def load_i3d(path: str | Path | None = None) -> Detector:
    """Loads I3D trained on Kinetics-400, the network that FVD is defined on; a feature is its 400 logits.

    Args:
        path: safetensors or a torch state dict, in float16 or float32; by default the file that `kit prepare i3d` writes.
    Raises:
        FileNotFoundError, ValueError: if the weights are missing, unreadable or another network's.
    """
    path = Path(path or cache_folder() / I3D_FILE)
    if not path.is_file():
        raise FileNotFoundError(
            f"no I3D weights at {path}; fetch them with `python -m kit prepare i3d`, or give detector_weights=PATH"
        )
    weights = {name: w.float() if w.is_floating_point() else w for name, w in read_weights(path).items()}
    model = I3D()
    expected, found = set(model.state_dict()), set(weights)
    counters = {name for name in expected if name.endswith("num_batches_tracked")}
    if found | counters != expected:
        odd = sorted((found | counters) ^ expected)[0]
        raise ValueError(f"{path} does not hold I3D: {len(found)} tensors, of which {odd!r} is not as expected")
    try:
        model.load_state_dict(weights, strict=False)
    except RuntimeError as error:
        raise ValueError(f"{path} does not hold I3D for 400 classes: {str(error).splitlines()[1].strip()}") from error
    model = model.eval().fuse().requires_grad_(False).to(device(), memory_format=torch.channels_last_3d)

    def network(clips: Tensor) -> Tensor:
        return model(resize_frames(clips, SIDE).contiguous(memory_format=torch.channels_last_3d))

    return Detector("i3d", file_sha256(path), 400, LEAST_FRAMES, None, network)


def load_videomae(path: str | Path | None = None) -> Detector:
    """Loads VideoMAE (Tong et al. 2022, arXiv 2203.12602); a feature is the mean of its last hidden states over all tokens.

    It weighs content more, and texture less, than I3D (Ge et al. 2024, arXiv 2404.12391).

    Args:
        path: folder with config.json and model.safetensors, as the Hugging Face library `transformers` saves it.
    Raises:
        ImportError: without transformers. FileNotFoundError, ValueError: if the folder is missing or holds another model.
    """
    try:
        from transformers import AutoConfig, VideoMAEModel
        from transformers.utils.logging import disable_progress_bar
    except ImportError as error:
        raise ImportError("the detector videomae needs a package: pip install 'kit-videoar[hf]'") from error
    if path is None or not (Path(path) / "model.safetensors").is_file():
        raise FileNotFoundError(
            f"the detector videomae needs detector_weights=DIR, a folder with config.json and model.safetensors, found {path}"
        )
    disable_progress_bar()
    config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    if config.model_type != "videomae":
        raise ValueError(f"{path} holds a model of type {config.model_type!r}, expected 'videomae'")
    model, report = VideoMAEModel.from_pretrained(path, local_files_only=True, use_safetensors=True, output_loading_info=True)
    if lacking := sorted({*report["missing_keys"], *(str(key) for key in report["mismatched_keys"])}):
        raise ValueError(f"{path} lacks {len(lacking)} weights of its config.json, such as {lacking[0]}; download it again")
    model = model.eval().requires_grad_(False).to(device())
    mean, std = (torch.tensor(v, device=device()).view(3, 1, 1, 1) for v in IMAGENET)

    def network(clips: Tensor) -> Tensor:
        pixels = ((resize_frames(clips, config.image_size) + 1) / 2 - mean) / std
        return model(pixel_values=pixels.transpose(1, 2)).last_hidden_state.mean(dim=1)

    parts = [file_sha256(Path(path) / name) for name in ("config.json", "model.safetensors")]
    sha256, frames = hash_of(["".join(parts)], 64), config.num_frames
    return Detector("videomae", sha256, config.hidden_size, frames, frames, network)


IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean and spread of pixels in [0, 1]
DETECTORS: dict[str, Callable[[str | Path | None], Detector]] = {"i3d": load_i3d, "videomae": load_videomae}


def load_detector(kind: str, path: str | Path | None, frames: int) -> Detector:
    """Loads a detector by its name in a protocol, for clips of `frames` frames.

    Raises:
        ValueError: for an unknown kind. UnfitClips: for a length it does not take. Else as the detector's own function.
    """
    check_choice("detector", kind, DETECTORS)
    detector = DETECTORS[kind](path)
    detector.check_frames(frames)
    return detector
