"""The causal 3D multi-scale tokenizer: pixels <-> bits."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from kit.pixels import check_pixels, check_video
from kit.scales import ScaleSchedule, latent_frames, pixel_frames
from kit.tokenizer import autoencoder, infinity
from kit.tokenizer.causal import Stream
from kit.tokenizer.quantizer import Step, bits_to_feature, clip_of, feature_to_bits, frames_of, pyramid
from kit.values import check_choice, check_positive, from_values

ARCHITECTURES = {"fast": autoencoder, "infinity": infinity}  # each with an Encoder and a Decoder


@dataclass(frozen=True)
class TokenizerConfig:
    """Architecture of a tokenizer.

    Args:
        bits: d, bits per token.
        scales: shorter side of each scale's grid, coarse to fine, for the largest clips, whose shorter side is
            `shorter_side` pixels. Smaller clips have the scales below their latent grid's shorter side, and that side.
        architecture: `fast`, or `infinity`: that of Infinity's image tokenizer, which can load its public weights.
        patch: pixels per side folded into channels by the stem.
        widths: channels of each level, fine to coarse; each further level halves height and width.
        blocks: residual blocks per level.
        temporal: whether it is a video tokenizer; an image tokenizer codes single frames, and `inflate.py` turns it into a
            video tokenizer.
        amplitude: root mean square of a frame's feature, in units of a code's amplitude 1/sqrt(d); null leaves it to
            training. A handful of scales can only represent a limited amplitude; about 2 is best.
        learned_amplitude: whether the amplitude is trained, starting from that value.
        scale_bits: bits per token of each scale, the last one d; empty: d at every scale.
    Raises:
        ValueError: for an invalid value.
    """

    bits: int = 32
    scales: tuple[int, ...] = (1, 2, 3, 4)
    architecture: str = "fast"
    patch: int = 4
    widths: tuple[int, ...] = (128, 256, 256)
    blocks: int = 2
    amplitude: float | None = 2.0
    learned_amplitude: bool = False
    scale_bits: tuple[int, ...] = ()
    temporal: bool = True

    def __post_init__(self):
        for name in ("scales", "widths", "scale_bits"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for name, least in {"bits": 1, "patch": 1, "blocks": 0, "scales": 1, "widths": 1}.items():
            numbers = getattr(self, name)
            numbers = numbers if isinstance(numbers, tuple) else (numbers,)
            if not numbers or not all(isinstance(n, int) and n >= least for n in numbers):
                raise ValueError(f"tokenizer.{name}={listed(getattr(self, name))}; expected whole numbers of {least} or more")
        if list(self.scales) != sorted({*self.scales}):
            raise ValueError(f"tokenizer.scales={listed(self.scales)}; expected sides that rise, such as [1, 2, 4, 8]")
        check_choice("tokenizer.architecture", self.architecture, ARCHITECTURES)
        check_positive("tokenizer.amplitude", self.amplitude, optional=True)  # null: as training has it
        of = self.scale_bits
        if of and not (len(of) == len(self.scales) and 1 <= min(of) <= max(of) == of[-1] == self.bits):
            expected = f"{len(self.scales)} numbers of 1 to {self.bits}, the last one {self.bits}"
            raise ValueError(f"tokenizer.scale_bits={list(of)}; expected {expected}, as tokenizer.bits")
        if self.learned_amplitude and not self.amplitude:
            raise ValueError("tokenizer.learned_amplitude=true needs an amplitude to start from: tokenizer.amplitude=2")

    @property
    def compression(self) -> int:
        """Pixels per token of the latent grid, in height and in width."""
        return self.patch * 2 ** (len(self.widths) - 1)

    @property
    def shorter_side(self) -> int:
        """Pixels of a clip's shorter side: what the last scale's grid covers."""
        return self.compression * self.scales[-1]

    def check_sides(self, height: int, width: int):
        """Raises ValueError unless height and width are multiples of the compression."""
        c = self.compression
        if height % c or width % c or min(height, width) < c:
            raise ValueError(f"height and width must be multiples of {c}, got {height} x {width}")

    @functools.lru_cache(64)  # noqa: B019 (small and frozen; a schedule caches what it computes)
    def schedule(self, frames: int, height: int, width: int) -> ScaleSchedule:
        """The blocks of a clip of T x H x W pixels.

        Raises:
            ValueError: if T is not 1 + 4n, or not 1 for an image tokenizer, if H or W is not a multiple of the compression,
                or the shorter side exceeds `shorter_side`.
        """
        if frames > 1 and not self.temporal:
            raise ValueError(
                f"this is a tokenizer of images: it takes 1 frame, got {frames}; inflate it for video, or code frame by "
                f"frame with kit.tokenizer.streaming, as `reconstruct video=FILE` does"
            )
        c = self.compression
        self.check_sides(height, width)
        if min(height, width) > self.shorter_side:
            raise ValueError(
                f"this tokenizer's scales end at {self.scales[-1]}, so the shorter side must be at most {self.shorter_side} "
                f"pixels, got {height} x {width}; give other scales or another size (`reconstruct video=FILE` takes any)"
            )
        grid = (height // c, width // c)
        sides = [side for side in self.scales if side < min(grid)] + [min(grid)]
        bits = (*self.scale_bits[: len(sides) - 1], self.bits) if self.scale_bits else ()
        return ScaleSchedule.from_sides(latent_frames(frames), sides, grid, bits)

    def as_dict(self) -> dict:
        """Plain values, for a checkpoint."""
        return {k: listed(v) for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping) -> TokenizerConfig:
        """Builds it from the values of `as_dict`. Raises ValueError for an unknown key or an invalid value."""
        return from_values(cls, values, "tokenizer")


def listed(value):
    """Converts a tuple to a list, as configs write it; returns other values unchanged."""
    return list(value) if isinstance(value, tuple) else value


class Tokenizer(nn.Module):
    """Tokenizer: encoder, residual pyramid of bits, decoder (VideoAR eq. 1-3).

    Raises:
        ValueError: for widths that the architecture cannot have.
    """

    def __init__(self, config: TokenizerConfig):
        super().__init__()
        self.config = config
        layers = ARCHITECTURES[config.architecture]
        shape = {key: getattr(config, key) for key in ("bits", "patch", "widths", "blocks", "temporal")}
        self.encoder, self.decoder = layers.Encoder(**shape), layers.Decoder(**shape)
        self.amplitude = config.amplitude
        if config.learned_amplitude:
            self.amplitude = nn.Parameter(torch.tensor(float(config.amplitude)))
        self.to(memory_format=torch.channels_last)  # the layout in which bfloat16 convolutions are fast

    @property
    def layers(self) -> list[autoencoder.ResBlock]:
        """The residual blocks of encoder and decoder, which do nearly all of the work."""
        return [block for part in (self.encoder, self.decoder) for level in part.levels for block in level]

    @property
    def recompute(self) -> bool:
        """Whether the backward pass computes the residual blocks' activations again instead of storing them."""
        return self.encoder.levels[0].recompute

    @recompute.setter
    def recompute(self, recompute: bool):
        for level in (*self.encoder.levels, *self.decoder.levels):
            level.recompute = recompute

    def schedule(self, frames: int, height: int, width: int) -> ScaleSchedule:
        """The blocks of a clip of T x H x W pixels. Raises as `TokenizerConfig.schedule`."""
        return self.config.schedule(frames, height, width)

    def schedule_of(self, video: Tensor) -> ScaleSchedule:
        """The blocks of a video (B, 3, T, H, W). Raises as `schedule` and `check_video`."""
        check_video(video)
        return self.schedule(*video.shape[2:])

    def schedule_of_feature(self, feature: Tensor) -> ScaleSchedule:
        """The blocks of an encoded video (B, d, F, h, w). Raises as `schedule`."""
        F, h, w = feature.shape[2:]
        return self.schedule(pixel_frames(F), h * self.config.compression, w * self.config.compression)

    def encode(self, video: Tensor, stream: Stream | None = None) -> Tensor:
        """Encodes a video (B, 3, T, H, W) in [-1, 1] as its feature (B, d, F, h, w), float32.

        T = 1 + 4n, or 4n in a started stream.

        Raises:
            ValueError: if T is not 1 + 4n, or H or W not a multiple of the compression; else as `check_video`.
        """
        check_video(video)
        if stream is None:
            latent_frames(video.shape[2])
        self.config.check_sides(*video.shape[3:])
        feature = self.encoder(self._as_weights(video), stream).float()
        if self.amplitude is None:
            return feature
        square = feature.square().mean((1, 3, 4), keepdim=True)  # per latent frame
        return feature * torch.rsqrt(square + 1e-8) * (self.amplitude * self.config.bits**-0.5)

    def decode(self, feature: Tensor, stream: Stream | None = None) -> Tensor:
        """Decodes a feature (B, d, F, h, w) to a video (B, 3, T, H, W), float32, about [-1, 1], not clamped."""
        return self.decoder(self._as_weights(feature), stream).float()

    def _as_weights(self, x: Tensor) -> Tensor:
        """Casts what a caller has in float16 or float64, as numpy has it; autocast and FSDP cast it on."""
        return x.to(next(self.parameters()).dtype)

    def bits(self, video: Tensor) -> Tensor:
        """Encodes a video (B, 3, T, H, W) in [-1, 1] as bits (B, L, d). Raises as `check_pixels` and `schedule`."""
        check_pixels(video)
        schedule = self.schedule_of(video)
        return feature_to_bits(self.encode(video), schedule)

    def decode_bits(self, bits: Tensor, schedule: ScaleSchedule, scales: int | None = None) -> Tensor:
        """Decodes bits (B, L, d) to a video (B, 3, T, H, W) in [-1, 1], from the first `scales` of each frame if given."""
        return self.decode(bits_to_feature(bits, schedule, scales)).clamp(-1, 1)

    def forward(self, video: Tensor, kept: Tensor | None = None) -> tuple[Tensor, Tensor, list[Step]]:
        """Reconstructs a video for training, with a straight-through gradient.

        Args:
            kept: (B, K) bool, the scales of each clip that reach the decoder; None: all.
        Returns:
            output (B, 3, T, H, W), features (B * F, d, h, w) of the frames, and the steps of their pyramids.
        """
        features = frames_of(self.encode(video))
        schedule = self.schedule_of(video)
        kept = None if kept is None else kept.repeat_interleave(schedule.latent_frames, 0)
        steps = list(pyramid(features, schedule, kept=kept))
        straight_through = features + (steps[-1].total - features).detach()
        return self.decode(clip_of(straight_through, video.shape[0])), features, steps

    @torch.no_grad()
    def reconstruct(self, video: Tensor) -> Tensor:
        """Encodes a video as bits and decodes it: (B, 3, T, H, W) -> the same shape, in [-1, 1]. Raises as `bits`."""
        return self.decode_bits(self.bits(video), self.schedule_of(video))
