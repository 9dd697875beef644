"""Scores against values computed by hand: measured on frames, kept, and averaged."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from kit.data.shapes import Shapes
from kit.evaluation.report import best_median_worst
from kit.evaluation.run import over_folds
from kit.evaluation.scores import PSNR, SSIM, CaptionScore, decibel
from kit.pixels import to_8_bits

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def pair_of_clips() -> tuple[torch.Tensor, torch.Tensor]:
    """Two clips of three frames, and copies with an error that grows from frame to frame."""
    real = torch.rand(2, 3, 3, 16, 20) * 1.2 - 0.6
    return real, real + torch.tensor([0.1, 0.2, 0.4]).view(1, 1, 3, 1, 1)


def batch_of(real: torch.Tensor) -> dict:
    return {"real": real, "name": [f"clip {n}" for n in range(len(real))]}


def scored(score, clips, batch):
    errors = score.add(clips[:1], {k: v[:1] for k, v in batch.items()})
    return errors + score.add(clips[1:], {k: v[1:] for k, v in batch.items()})


def test_psnr_by_hand(pair_of_clips):
    real, clips = pair_of_clips
    score = PSNR()
    errors = scored(score, clips, batch_of(real))
    found = score.result()
    assert found["by_frame"] == pytest.approx([10 * math.log10(4 / e**2) for e in (0.1, 0.2, 0.4)], abs=1e-4)
    assert found["value"] == pytest.approx(10 * math.log10(4 / ((0.01 + 0.04 + 0.16) / 3)), abs=1e-4)
    assert found["first_frame"] == pytest.approx(found["by_frame"][0])
    assert found["later_frames"] == pytest.approx(10 * math.log10(4 / 0.1), abs=1e-4)
    assert errors == pytest.approx([0.07, 0.07], abs=1e-4)
    library = peak_signal_noise_ratio(clips, real, data_range=(-1.0, 1.0), dim=(1, 2, 3, 4), reduction="elementwise_mean")
    assert found["value"] == pytest.approx(library.item(), abs=1e-4)


def test_ssim_is_the_librarys(pair_of_clips):
    real, clips = pair_of_clips
    score = SSIM()
    errors = scored(score, clips, batch_of(real))
    frames = [x.transpose(1, 2).flatten(0, 1) for x in (clips, real)]
    library = structural_similarity_index_measure(*frames, data_range=(-1.0, 1.0)).item()
    assert score.result()["value"] == pytest.approx(library, abs=1e-6) and sum(errors) / 2 == pytest.approx(1 - library)


def test_equal_clips_and_single_frames(pair_of_clips):
    real, _ = pair_of_clips
    for score, best in ((PSNR(), 100), (SSIM(), 1)):
        score.add(real[:, :, :1], batch_of(real[:, :, :1]))
        found = score.result()
        assert found["value"] == pytest.approx(best) and "later_frames" not in found and len(found["by_frame"]) == 1
    assert decibel(torch.tensor(0.0)) == pytest.approx(100)


def test_pixels_as_a_file_holds_them():
    pixels = to_8_bits(torch.tensor([-3.0, -1, -0.9999, 0, 0.5, 1, 2]))
    steps = (pixels + 1) * 127.5
    assert torch.allclose(steps, steps.round(), atol=1e-4) and pixels[0] == -1 == pixels[2] and pixels[-1] == 1
    assert torch.equal(to_8_bits(pixels), pixels)


def test_captions_of_real_clips_and_of_spoilt_ones():
    data = Shapes("val", frames=9, height=64, width=64, fps=12)
    items = [data[n] for n in range(4)]
    clips, captions = torch.stack([item["video"] for item in items]), [item["caption"] for item in items]
    score = CaptionScore(12)
    assert score.add(clips, {"caption": captions}) == [0] * 4
    found = score.result()
    assert found["value"] == found["shape"] == found["motion"] == 1 and found["by_frame"]["colour"] == [1] * 9
    drifting = clips.clone()
    drifting[:, :, 5:] = -drifting[:, :, 5:]  # the negative shows other colours
    score = CaptionScore(12)
    score.add(drifting, {"caption": captions})
    curve = score.result()["by_frame"]["colour"]
    assert curve[:5] == [1] * 5 and max(curve[5:]) < 1


@pytest.mark.parametrize("make", [PSNR, SSIM])
def test_a_score_goes_on_from_its_state(make, pair_of_clips, tmp_path):
    real, clips = pair_of_clips
    whole, first, rest = make(), make(), make()
    scored(whole, clips, batch_of(real))
    first.add(clips[:1], batch_of(real[:1]))
    torch.save(first.state(), tmp_path / "state.pt")
    rest.load(torch.load(tmp_path / "state.pt", weights_only=True))
    rest.add(clips[1:], batch_of(real[1:]))
    assert rest.result() == whole.result()


GROWTH = """
import torch
from kit.evaluation.scores import PSNR
from kit.pixels import to_8_bits

def used():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmRSS")).split()[1]) / 1000

torch.set_num_threads(1)
score, before = PSNR(), None
for n in range(12):
    clips = to_8_bits(torch.rand(16, 3, 16, 128, 128))
    score.add(clips, {"real": to_8_bits(clips * 0.5), "name": [str(n)] * 16})
    before = before or (used() if n == 3 else None)
print(used() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_memory_does_not_grow_with_the_clips():
    """With `keep_freed_memory` and scores kept as tensors it grew by 5 MB a clip."""
    done = subprocess.run([sys.executable, "-c", GROWTH], capture_output=True, text=True, check=True, cwd=ROOT)
    assert float(done.stdout) < 20, f"{done.stdout} MB more after 128 clips"


def test_folds_are_averaged_whatever_is_inside():
    folds = [{"value": 1.0, "at": {"N": 1.0, "N/2": 2.0}, "by_frame": [1.0, 2.0], "name": "x"},
             {"value": 3.0, "at": {"N": 3.0, "N/2": 6.0}, "by_frame": [3.0, 6.0], "name": "x"}]  # fmt: skip
    found = over_folds(folds)
    assert found == {"value": 2, "at": {"N": 2, "N/2": 4}, "by_frame": [2, 4], "name": "x", "folds": [1, 3], "spread": 2**0.5}
    assert over_folds(folds[:1])["spread"] is None


def test_best_median_and_worst():
    errors = {"frechet": [1.0, 9, 9], "psnr": [0.5, 0.1, 0.3, 0.2, 0.4]}
    assert best_median_worst(errors) == {"best": 1, "median": 2, "worst": 0}
    assert best_median_worst({"captions": [1, 0]}) == {"best": 1, "median": 1, "worst": 0}
