"""Builds what an evaluation needs from a config: protocol, real clips, candidate, metric networks."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace

from omegaconf import DictConfig

from kit.checkpoint import Loaded, kind_of, load_generator, load_tokenizer
from kit.data.clips import FolderClips
from kit.data.listing import held_out_hash
from kit.data.shapes import Shapes
from kit.evaluation.candidates import Candidate, GivenVideos, Reconstructions, Samples
from kit.evaluation.clips import fingerprint, real_source
from kit.evaluation.detectors import Detector, UnfitClips, load_detector
from kit.evaluation.protocol import Network, Protocol
from kit.generator.condition import ConditionConfig, check_classes
from kit.generator.sampler import Sampling
from kit.machine import check_precision
from kit.perceptual import Perceptual, load_perceptual
from kit.sampling_checks import check_none_samples, check_video_length, tell_notes
from kit.scales import whole_groups
from kit.values import plain

METRICS = ("frechet", "psnr", "ssim", "lpips", "captions")
ANOTHER = "which makes it another protocol"


@dataclass(frozen=True)
class Tools:
    """The metrics to measure, their networks, and why other metrics are left out."""

    metrics: tuple[str, ...]
    detector: Detector | None
    perceptual: Perceptual | None
    left_out: dict[str, str]


def build_protocol(cfg: DictConfig) -> tuple[Protocol, FolderClips | Shapes]:
    """Builds the protocol, completed by what depends on its real clips, and the source of these clips.

    Raises:
        ValueError, FileNotFoundError: for a wrong value, or real clips that are not there.
    """
    protocol = Protocol.from_dict(plain(cfg.protocol))
    words = {key: cfg[f"real_{key}"] for key in ("captions", "label_from") if cfg[f"real_{key}"] is not None}
    source, real = real_source(protocol, cfg.real, **words), protocol.real
    if isinstance(source, Shapes):
        if not (real.clips and protocol.fps):
            raise ValueError("shapes are drawn: say how many and how fast with protocol.real.clips= and protocol.fps=")
        return protocol.resolved(fingerprint=f"drawn, seed {real.seed}"), source
    tell_slower(source, protocol, "real")
    real = replace(real, clips=real.clips or len(source.files))
    return protocol.resolved(real=real, fingerprint=fingerprint(source)), source


def build_candidate(cfg: DictConfig, protocol: Protocol, source: FolderClips | Shapes) -> tuple[Candidate, Protocol]:
    """Builds what is to be scored, and completes the protocol with the number of clips that it makes.

    Raises:
        ValueError: if no candidate or two are given, or it makes clips of another kind than the protocol's.
    """
    if (cfg.ckpt is None) == (cfg.videos is None):
        raise ValueError("give ckpt=CHECKPOINT, of a tokenizer or a generator, or videos=DIR")
    check_precision(cfg.precision)
    if cfg.videos is not None:
        return _given_videos(cfg, protocol, source)
    if cfg.paired:
        raise ValueError("paired=true is for videos=DIR; a tokenizer's reconstructions are paired anyway, samples never")
    shape = (protocol.frames, protocol.height, protocol.width)
    if kind_of(cfg.ckpt) == "tokenizer":
        check_none_samples(cfg, "a tokenizer")
        if protocol.folds > 1 and not protocol.real.drawn_anew:
            raise ValueError(
                f"protocol.folds={protocol.folds} would score the same reconstructions again: say protocol.folds=1 or "
                f"protocol.real.start=random"
            )
        tokenizer = load_tokenizer(cfg.ckpt)
        check_size(tokenizer, shape)
        tell_learned([tokenizer], protocol, source)
        if protocol.samples not in (None, protocol.real.clips):
            print(
                f"{protocol.real.clips} real clips, each reconstructed once: protocol.samples={protocol.samples} is not used"
            )
        return Reconstructions(tokenizer, cfg.precision), protocol.resolved(samples=protocol.real.clips)
    generator, tokenizer = load_generator(cfg.ckpt, cfg.tokenizer)
    check_fit(generator.clip, generator.model.config.condition, protocol, source)
    check_size(tokenizer, shape)
    tell_learned([generator, tokenizer], protocol, source)
    sampling = Sampling.of(plain(cfg))
    check_video_length(tokenizer, (whole_groups(shape[0]), *shape[1:]), None, sampling, generator.clip["frames"])
    tell_notes(captions_read(generator, protocol, source), sampling, generator.model.condition.notes)
    protocol = protocol.resolved(samples=protocol.samples or protocol.real.clips)
    return Samples(generator, tokenizer, sampling, cfg.precision, shape), protocol


def _given_videos(cfg: DictConfig, protocol: Protocol, source: FolderClips | Shapes) -> tuple[GivenVideos, Protocol]:
    check_none_samples(cfg, "videos=DIR")
    shape = dict(frames=protocol.frames, height=protocol.height, width=protocol.width, fps=protocol.fps)
    videos = FolderClips(cfg.videos, "all", label_from="none", captions=False, backend=protocol.real.backend, **shape)
    samples = protocol.samples or len(videos.files) // protocol.folds
    if samples < 2:
        raise ValueError(f"protocol.folds={protocol.folds} of {len(videos.files)} videos have no two each; say fewer")
    protocol = protocol.resolved(samples=samples)
    if cfg.paired:
        if odd := sorted(set(videos.files) ^ set(source.files)):
            raise ValueError(
                f"paired=true needs the same file names in videos={cfg.videos} and real={cfg.real}; {odd[0]} is in one only"
            )
        real = protocol.real
        if (real.start, real.random_crop, protocol.folds, protocol.samples) != ("first", False, 1, real.clips):
            raise ValueError(
                f"paired=true compares each file from its start, {len(videos.files)} in all: say protocol.real.start=first "
                f"protocol.real.random_crop=false protocol.folds=1, and neither clips nor samples"
            )
    if protocol.real.start != "first":
        print(
            f"the given videos are scored from their first frame on, the real ones from a {protocol.real.start} one; for the "
            f"same moments say protocol.real.start=first"
        )
    if not protocol.fps:  # each file at its own rate
        rate, theirs = videos.native_fps, source.native_fps
        if abs(theirs - rate) > 0.01 * rate:
            print(f"the given videos have {rate:g} frames per second, the real ones {theirs:g}: motions differ by that alone")
    tell_slower(videos, protocol, "given")
    return GivenVideos(videos, cfg.paired), protocol


def tell_slower(source: FolderClips, protocol: Protocol, which: str):
    """Prints a note if videos are slower than the protocol's clips."""
    if not protocol.fps or protocol.frames == 1:
        return
    with warnings.catch_warnings(action="ignore"):  # all are taken at one rate
        rate = source.native_fps
    if rate < 0.99 * protocol.fps:
        print(f"the {which} videos have {rate:g} frames per second, the protocol {protocol.fps:g}: frames are taken twice")


def check_size(tokenizer: Loaded, shape: tuple[int, int, int]):
    """Checks that the tokenizer takes clips of the shape (T, H, W).

    Raises:
        ValueError: if it does not.
    """
    frames, height, width = shape
    try:
        tokenizer.model.schedule(whole_groups(frames), height, width)
    except ValueError as error:
        raise ValueError(f"protocol.frames={frames}, protocol.height={height}, protocol.width={width}: {error}") from error


def captions_read(generator: Loaded, protocol: Protocol, source: FolderClips | Shapes) -> list[str]:
    """Returns the captions of the real clips that a generator of texts samples for, without empty ones."""
    if generator.model.config.condition.kind != "text":
        return []
    words = source.texts() or map(source.words, range(protocol.real.clips))
    return [each["caption"] for each in words if each["caption"].strip()]


def tell_learned(models: list[Loaded], protocol: Protocol, source: FolderClips | Shapes):
    """Prints a note for each model if clips of the split `val` are others than were held out of its training."""
    if not source.files or protocol.real.split != "val":
        return
    ours = held_out_hash(source.known_as())
    for model in models:
        if model.held_out not in (None, ours):
            unlike = f"the real clips are others than were held out of the {model.kind}'s training"
            print(f"{unlike}: some of them it may have learned")


def check_fit(clip: dict, condition: ConditionConfig, protocol: Protocol, source: FolderClips | Shapes):
    """Checks that a generator was trained on clips like the protocol's.

    Args:
        clip, condition: what the generator was trained on.
    Raises:
        ValueError: if that has another size, rate or classes than the protocol's clips.
    """
    for key in ("height", "width", "fps"):
        expected = getattr(protocol, key) or source.native_fps
        if abs(clip[key] - expected) > 0.01 * expected:
            raise ValueError(
                f"the protocol {protocol.name} has {key}={expected:g}, the generator was trained with {clip[key]:g}; take "
                f"another generator, or say protocol.{key}={clip[key]:g}, {ANOTHER}"
            )
    if condition.kind == "text" and not source.captioned:
        prompts = "their classes' names" if source.classes else "the empty prompt"
        print(f"the real clips have no captions: samples are of {prompts}; a table elsewhere is given as real_captions=PATH")
    check_classes(condition, source.classes, "the protocol's real clips have", "score it against clips of those")


def build_tools(
    cfg: DictConfig, protocol: Protocol, candidate: Candidate, source: FolderClips | Shapes
) -> tuple[Tools, Protocol]:
    """Loads the networks that the metrics need, and completes the protocol with their hashes.

    With `metrics=auto` a metric whose weights are missing is left out, and the result says so; a metric that is asked for by
    name, or whose weights are given, must have them.

    Raises:
        ValueError, FileNotFoundError, ImportError: if a metric is unknown, does not fit or lacks its weights.
    """
    readable = isinstance(source, Shapes) and candidate.captioned
    wanted, left_out = wanted_metrics(cfg.metrics, candidate.paired, readable), {}

    def load(metric: str, function, kind: str, weights: str | None, *more):
        if metric not in wanted:
            return None
        try:
            return function(kind, weights, *more)
        except (FileNotFoundError, ImportError, UnfitClips) as error:
            if cfg.metrics != "auto" or (weights is not None and not isinstance(error, UnfitClips)):
                raise
            left_out[metric] = str(error)

    detector = load("frechet", load_detector, protocol.detector.kind, cfg.detector_weights, protocol.frames)
    perceptual = load("lpips", load_perceptual, protocol.perceptual.kind, cfg.lpips_weights)
    if detector:
        protocol = protocol.resolved(detector=_checked("detector", protocol.detector, detector.sha256))
    if perceptual:
        protocol = protocol.resolved(perceptual=_checked("perceptual", protocol.perceptual, perceptual.sha256))
    metrics = tuple(metric for metric in wanted if metric not in left_out)
    if not metrics:
        raise ValueError("nothing to measure. " + " ".join(f"{name}: {why}." for name, why in left_out.items()))
    return Tools(metrics, detector, perceptual, left_out), protocol


def wanted_metrics(asked: str | list[str], paired: bool, captioned: bool) -> list[str]:
    """Chooses the metrics to measure.

    Args:
        asked: names, or `auto` for all that are possible.
        paired: whether each clip has its real one. captioned: whether each has a caption of `shapes`.
    Raises:
        ValueError: if a metric is unknown or cannot be measured on such clips.
    """
    possible = ["frechet", *(["psnr", "ssim", "lpips"] if paired else []), *(["captions"] if captioned else [])]
    wanted = possible if asked == "auto" else [asked] if isinstance(asked, str) else list(asked)
    for name in wanted:
        if name not in METRICS:
            raise ValueError(f"unknown metric {name!r}; expected auto or some of [{','.join(METRICS)}]")
        if name not in possible:
            why = "it reads what captions of shapes describe" if name == "captions" else "it compares clips in pairs"
            raise ValueError(f"{name} has nothing to measure here: {why}; possible are [{','.join(possible)}]")
    return wanted


def _checked(key: str, network: Network, sha256: str) -> Network:
    """Returns the protocol's network with the hash of the weights that were loaded.

    Raises:
        ValueError: if the protocol asks for other weights.
    """
    if not sha256.startswith(network.sha256 or ""):
        raise ValueError(
            f"the protocol needs {network.kind} weights with sha256 {network.sha256[:16]}, found {sha256[:16]}; take the "
            f"right file (`python -m kit prepare i3d` fetches I3D's), or say protocol.{key}.sha256=null, {ANOTHER}"
        )
    return replace(network, sha256=network.sha256 or sha256)
