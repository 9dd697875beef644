"""The verb `reconstruct`: held-out clips, or a video file of any length and size, through a tokenizer and back."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from omegaconf import DictConfig
from torch import Tensor
from torchmetrics.aggregation import MeanMetric
from torchmetrics.image import PeakSignalNoiseRatio
from tqdm import tqdm

from kit.checkpoint import Loaded, load_tokenizer
from kit.data.read import ClipFile, open_clip_file
from kit.files import replacing, sole_user
from kit.machine import autocast, device, inference_precision
from kit.measures import per_scale
from kit.media import clip_by_clip, contact_sheet, spread, video_writer, write_video
from kit.pixels import ssim
from kit.scales import whole_groups
from kit.tokenizer import Tokenizer
from kit.tokenizer.streaming import coded_size, scaled_size, stream_scales
from kit.values import check_whole_number


def reconstruct(cfg: DictConfig) -> dict:
    """Writes originals and reconstructions side by side, and prints PSNR (dB) and SSIM after each scale.

    Takes a video file if `video` is given, else held-out clips of the data.

    Returns:
        `by_scale`: see `reconstruct_file`.
    Raises:
        ValueError: if `frames` is no whole number, or the video would be overwritten by its reconstruction; else as
            `reconstruct_file` and `held_out`.
    """
    check_whole_number("frames", cfg.frames, 1, optional=True)
    tokenizer, folder = load_tokenizer(cfg.ckpt), Path(cfg.folder)
    pattern = "reconstruction*.*"
    if cfg.video is not None and Path(cfg.video).resolve() in [path.resolve() for path in folder.glob(pattern)]:
        raise ValueError(f"video={cfg.video} would be overwritten by its reconstruction; give another name=")
    with sole_user(folder), replacing(folder, pattern):  # an earlier call may have written more clips
        if cfg.video is not None:
            by_scale = reconstruct_file(tokenizer, cfg.video, cfg.frames, folder)
        else:
            by_scale = reconstruct_held_out(tokenizer, cfg)
    print(json.dumps(by_scale, indent=2))
    print(f"in {folder}: reconstruction.png, reconstruction_*.mp4 (real | reconstruction)")
    return {"by_scale": by_scale}


def reconstruct_held_out(tokenizer: Loaded, cfg: DictConfig) -> list[dict]:
    """Reconstructs held-out clips; writes reconstruction.png and mp4s of the first `shown`. Returns as `reconstruct_file`."""
    from kit.verbs.held_out import data_for, held_out  # with Lightning, which takes seconds and no video file needs

    data = data_for(cfg, tokenizer, frames=cfg.frames)
    video = held_out(data)["video"]
    rows, by_scale, _ = per_scale(tokenizer, video, cfg.batch_size, inference_precision())
    folder, groups = Path(cfg.folder), clip_by_clip(rows, cfg.shown)
    contact_sheet(groups, [f"clip {i}" for i in range(len(groups))], folder / "reconstruction.png")
    side = torch.cat([video, rows[f"scales 1-{len(by_scale)}"]], dim=-1)
    for i, pair in enumerate(side[: cfg.shown]):
        write_video(pair, folder / f"reconstruction_{i}.mp4", data.fps)
    return by_scale


class Scores:
    """PSNR and SSIM of a clip that comes in chunks: PSNR of the squared error of all pixels, SSIM as the mean over frames."""

    def __init__(self):
        self.psnr = PeakSignalNoiseRatio(data_range=(-1.0, 1.0))
        self.ssim = MeanMetric()

    def add(self, output: Tensor, real: Tensor) -> Scores:
        """Adds a chunk: a reconstruction and the real frames, (3, n, H, W) in [-1, 1] each, on the CPU."""
        with torch.autocast("cpu", enabled=False):
            self.psnr.update(output, real)
            self.ssim.update(ssim(output.transpose(0, 1), real.transpose(0, 1)))
        return self

    def values(self) -> dict[str, float]:
        return {"psnr_db": self.psnr.compute().item(), "ssim": self.ssim.compute().item()}


def fitting_note(tokenizer: Tokenizer, own: tuple[int, int], clip: ClipFile) -> str:
    """Describes in words how a video is resized, taken at another rate and padded before it is encoded, and written.

    Args:
        own: (H, W) of the video.
    """
    scaled = scaled_size(*own, tokenizer.config.shorter_side)
    coded = coded_size(tokenizer.config, *scaled)
    whole = whole_groups(len(clip), tokenizer.encoder.tau)
    rates = [f"{fps:g}" for fps in (clip.video.fps, clip.fps)]
    size = "{1} x {0}".format(*own)
    size += " -> {1} x {0} (resized)".format(*scaled) if scaled != own else ""
    size += ", padded to {1} x {0}".format(*coded) if coded != scaled else ""
    size += ", its last row twice in the mp4" if scaled[0] % 2 else ""  # of real | reconstruction the width is even
    length = f"{len(clip)} frame{'s' * (len(clip) != 1)}"
    if rates[0] != rates[1]:
        length = f"{len(clip.video)} frames at {rates[0]} fps -> {len(clip)} at {rates[1]}"
    return f"{size}; {length}" + (f" padded to {whole}" if whole != len(clip) else "")


def reconstruct_file(tokenizer: Loaded, path: str | Path, frames: int | None, folder: Path) -> list[dict]:
    """Reconstructs a video file; writes reconstruction.png and reconstruction_0.mp4 (real | reconstruction) to `folder`.

    The video is resized so that its shorter side is the tokenizer's; padding is cut off again.

    Args:
        frames: T, any number; None: the whole file. Frames are taken at the frame rate of the training, for a tokenizer of
            images at the file's own.
    Returns:
        for each k of 1..K the `psnr_db` and `ssim` of the reconstruction from the first k scales.
    Raises:
        as `open_clip_file`; UnreadableVideo also in the middle of the file: then no mp4 is left behind.
    """
    model = tokenizer.model.to(device())
    clip = open_clip_file(path, frames, tokenizer.clip["fps"] if model.config.temporal else 0)  # images have no rate
    own = clip.size
    size = scaled_size(*own, model.config.shorter_side)
    print(f"{path}: {fitting_note(model, own, clip)}", *(f"note: {note}" for note in clip.video.notes()), sep="\n")
    scores = {k: Scores() for k in range(1, len(model.config.scales) + 1)}
    chunks = (chunk.to(device()) for chunk in clip.chunks(*size))
    shown, done = [], 0
    with (
        video_writer(folder / "reconstruction_0.mp4", clip.fps, size[0], 2 * size[1]) as write,
        tqdm(total=len(clip), desc="reconstruct", unit="frame", disable=None) as bar,
        autocast(inference_precision()),
    ):
        for real, outputs in stream_scales(model, chunks, scores):
            real, outputs = real.cpu(), outputs.cpu()
            write(torch.cat([real, outputs[-1]], dim=-1))
            for score, output in zip(scores.values(), outputs, strict=True):
                score.add(output, real)
            here = [number - done for number in spread(len(clip)) if 0 <= number - done < real.shape[1]]
            shown.append(torch.cat([real[None], outputs])[:, :, here])
            done += real.shape[1]
            bar.update(real.shape[1])
    rows = dict(zip(["real", *(f"scales 1-{k}" for k in scores)], torch.cat(shown, dim=2)))
    contact_sheet([rows], [Path(path).name], folder / "reconstruction.png")
    return [{"scales": k, **score.values()} for k, score in scores.items()]
