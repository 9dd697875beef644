"""What loaded models make of real clips, in batches and on the device: reconstructions, and bits with the true history."""

from __future__ import annotations

import statistics

import torch
from torch import Tensor

from kit.checkpoint import Loaded
from kit.generator.losses import accuracy_by_block
from kit.generator.sequence import teacher_forced
from kit.machine import autocast, device, exact_float32
from kit.pixels import psnr, ssim


def reconstruct_batches(tokenizer: Loaded, video: Tensor, batch_size: int, precision: str = "float32") -> Tensor:
    """Reconstructs clips (n, 3, T, H, W) in [-1, 1] with a tokenizer, in batches; the result, of that shape, is on the CPU.

    Args:
        precision: `float32` or `bfloat16`.
    """
    model = tokenizer.model.to(device())
    with autocast(precision), exact_float32():
        return torch.cat([model.reconstruct(part.to(device())).cpu() for part in video.split(batch_size)])


@torch.no_grad()
def per_scale(
    tokenizer: Loaded, video: Tensor, batch_size: int, precision: str = "float32"
) -> tuple[dict[str, Tensor], list[dict], Tensor]:
    """Reconstructs clips from the first k scales of each frame, for each k of 1..K.

    Args:
        video: (n, 3, T, H, W) in [-1, 1]. precision: `float32` or `bfloat16`.
    Returns:
        name -> videos (n, 3, T, H, W), the real clips first; for each k psnr_db and ssim, means over the clips; and the bits
        (n, L, d). All on the CPU.
    """
    model = tokenizer.model.to(device())
    schedule = model.schedule_of(video)
    rows, metrics = {"real": video}, []
    with autocast(precision), exact_float32():
        bits = [model.bits(v.to(device())) for v in video.split(batch_size)]
    for k in range(1, schedule.scales + 1):
        with autocast(precision), exact_float32():
            parts = [model.decode_bits(b, schedule, k).cpu() for b in bits]
        output = rows[f"scales 1-{k}"] = torch.cat(parts)
        similar = [ssim(o.transpose(0, 1), v.transpose(0, 1)).mean().item() for o, v in zip(output, video)]
        metrics.append({"scales": k, "psnr_db": psnr(output, video).item(), "ssim": statistics.fmean(similar)})
    return rows, metrics, torch.cat(bits).cpu()


@torch.no_grad()
def teacher_forced_metrics(
    generator: Loaded, tokenizer: Loaded, batch: dict, batch_size: int, precision: str = "float32"
) -> dict:
    """Computes the share of correctly predicted bits with the true bits as history.

    Args:
        batch: clips as a DataModule gives them: `video` (n, 3, T, H, W), and what the condition reads.
        precision: `float32` or `bfloat16`.
    Returns:
        `bit_accuracy` for each scale, and `bit_accuracy_by_frame` for each frame and scale.
    """
    model, codec = generator.model.to(device()), tokenizer.model.to(device())
    schedule, right = codec.schedule_of(batch["video"]), []
    prompts = model.condition.prompts(batch)
    for start in range(0, len(prompts), batch_size):
        part = slice(start, start + batch_size)
        with autocast(precision), exact_float32():
            feature = codec.encode(batch["video"][part].to(device()))
            logits, sequence = teacher_forced(model, feature, schedule, model.condition(prompts[part]))
        right.append(((logits > 0) == sequence.targets).cpu())
    accuracy = accuracy_by_block(torch.cat(right), schedule)

    def rounded(shares: Tensor) -> list[float]:
        return [round(share, 4) for share in shares.tolist()]

    return {"bit_accuracy": rounded(accuracy.mean(0)), "bit_accuracy_by_frame": list(map(rounded, accuracy))}
