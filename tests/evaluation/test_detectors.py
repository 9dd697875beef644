"""The detectors: I3D's arithmetic, its real weights on real clips, VideoMAE, and what they refuse."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from kit.data.clips import FolderClips
from kit.data.read import read_clip_file
from kit.evaluation.detectors import load_detector, load_i3d, resize_frames
from kit.evaluation.frechet import Gaussian, frechet_distance
from kit.evaluation.i3d import I3D, max_pool, pad_same
from tests.plugin import randomise

PANCAKE = 129  # "flipping pancake" in the alphabet of Kinetics-400
POOLINGS = [((1, 3, 3), (1, 2, 2)), ((3, 3, 3), (1, 1, 1)), ((3, 3, 3), (2, 2, 2)), ((2, 2, 2), (2, 2, 2))]


@pytest.fixture
def i3d(shared):
    return load_i3d(shared / "weights" / "i3d_kinetics400_fp16.pt")


@pytest.mark.parametrize(("kernel", "stride"), POOLINGS)
@pytest.mark.parametrize("size", [(8, 28, 28), (9, 29, 15)])
def test_pooling_is_max_pool3d(kernel, stride, size):
    x = torch.rand(2, 3, *size)
    assert torch.equal(max_pool(x, kernel, stride), F.max_pool3d(pad_same(x, kernel, stride), kernel, stride))


def test_same_padding_puts_the_odd_one_last():
    """TensorFlow's rule: ceil(n / s) outputs; 8 inputs at kernel 7 and stride 2 need 5 zeros, 2 before and 3 after."""
    padded = pad_same(torch.ones(1, 1, 8, 9, 1), (7, 3, 1), (2, 2, 1))
    assert padded.shape == (1, 1, 13, 11, 1)
    assert padded[0, 0, :, 5, 0].tolist() == [0, 0, *[1] * 8, 0, 0, 0]


def test_fused_batch_norms_change_nothing():
    model = randomise(I3D(classes=5))
    x = torch.rand(1, 3, 9, 224, 224) * 2 - 1
    with torch.no_grad():
        plain = model(x)
        assert torch.allclose(model.fuse()(x), plain, atol=1e-4 * plain.abs().max())


def test_resized_frames_of_the_same_size_are_the_same():
    x = torch.rand(1, 3, 2, 20, 20)
    assert torch.allclose(resize_frames(x, 20), x)
    assert torch.allclose(resize_frames(torch.full_like(x, 0.3), 31), torch.tensor(0.3))


def test_i3d_recognises_a_flipped_pancake(i3d, shared):
    clip = read_clip_file(shared / "data" / "clips" / "decord_flipping_a_pancake.mkv", 64, 256, 340, 25)
    share = i3d(clip[None]).softmax(-1)[0]
    assert share.argmax() == PANCAKE and share[PANCAKE] > 0.95


def test_a_clip_has_one_feature_in_any_company(i3d, shared):
    clips = FolderClips(shared / "data" / "weizmann", "all", frames=9)
    video = torch.stack([clips[n]["video"] for n in (0, 20, 40)])
    together = i3d(video)
    assert torch.equal(i3d(video[1:2])[0], together[1]) and torch.equal(i3d(video.flip(0)).flip(0), together)


def variants(clips: torch.Tensor) -> dict[str, torch.Tensor]:
    """Returns degraded versions of clips (n, 3, T, H, W) that a distance must rank, from none to strong."""
    rng = torch.Generator().manual_seed(0)
    order = torch.stack([torch.randperm(clips.shape[2], generator=rng) for _ in clips])
    return {
        "real": clips,
        "shuffled": torch.stack([clip[:, frames] for clip, frames in zip(clips, order)]),
        "frozen": clips[:, :, :1].expand_as(clips),
        "noise": torch.rand(clips.shape, generator=rng) * 2 - 1,
    }


def test_distances_have_the_order_of_sanity(i3d, shared):
    """Compares half of the clips with the degraded other half; the order is the published one, see docs/evaluation.md."""
    clips = FolderClips(shared / "data" / "weizmann", "all", frames=16)
    video = torch.stack([clips[n]["video"] for n in range(0, 72, 6)])
    reference = Gaussian(400)
    reference.add(i3d(video[::2]))
    found = []
    for spoilt in variants(video[1::2]).values():
        gaussian = Gaussian(400)
        gaussian.add(i3d(spoilt))
        found.append(frechet_distance(gaussian, reference))
    assert found == sorted(found) and found[3] > 2 * found[0]


@pytest.mark.parametrize("damage", ["missing", "text", "other", "classes"])
def test_wrong_i3d_weights(tmp_path, damage):
    path = tmp_path / "weights.safetensors"
    if damage == "text":
        path.write_text("no weights")
    elif damage == "other":
        save_file({"layer.weight": torch.zeros(2)}, path)
    elif damage == "classes":
        save_file(I3D(classes=7).state_dict(), path)
    expected = {
        "missing": "python -m kit prepare i3d", "text": "not a readable file of weights",
        "other": "does not hold I3D: 1 tensors", "classes": "does not hold I3D for 400 classes",
    }  # fmt: skip
    with pytest.raises((ValueError, FileNotFoundError), match=expected[damage]) as error:
        load_i3d(path)
    assert "weights.safetensors" in str(error.value)


def test_frames_are_averaged_where_they_shrink():
    """One bright column of four stays a quarter bright; without antialiasing it would be half or none."""
    clips = torch.zeros(1, 3, 2, 64, 64)
    clips[..., 1::4] = 1
    shrunk = resize_frames(clips, 16)
    assert shrunk.shape == (1, 3, 2, 16, 16)
    torch.testing.assert_close(shrunk[..., 2:-2], torch.full((1, 3, 2, 16, 12), 0.25))


def test_unknown_detector_and_too_few_frames(i3d):
    with pytest.raises(ValueError, match="detector=c3d; expected one of: i3d, videomae"):
        load_detector("c3d", None, 16)
    with pytest.raises(ValueError, match="i3d takes clips of 9 or more frames, the protocol has 8"):
        i3d.check_frames(8)


def test_videomae(videomae: Path):
    """Features equal those of the library's model on frames prepared as the library does."""
    from transformers import VideoMAEModel

    detector = load_detector("videomae", videomae, 4)
    assert detector.size == 16 and len(detector.sha256) == 64
    with pytest.raises(ValueError, match="videomae takes clips of 4 frames, the protocol has 16"):
        detector.check_frames(16)
    clips = torch.rand(3, 3, 4, 32, 32) * 2 - 1
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    pixels = (((clips + 1) / 2).permute(0, 2, 3, 4, 1) - mean) / std
    model = VideoMAEModel.from_pretrained(videomae).eval()
    with torch.no_grad():
        expected = model(pixels.permute(0, 1, 4, 2, 3)).last_hidden_state.mean(1)
    assert torch.allclose(detector(clips), expected, atol=1e-5)
    assert torch.equal(detector(clips[2:])[0], detector(clips)[2])


def test_videomae_refuses_other_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match="needs detector_weights=DIR"):
        load_detector("videomae", tmp_path, 4)
    with pytest.raises(FileNotFoundError, match="needs detector_weights=DIR"):
        load_detector("videomae", None, 4)
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="holds a model of type 'vit'"):
        load_detector("videomae", tmp_path, 4)


def test_videomae_needs_all_the_weights_of_its_config(videomae, tmp_path):
    """Missing weights are refused, because transformers would fill them at random."""
    folder = Path(shutil.copytree(videomae, tmp_path / "deeper"))
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"num_hidden_layers": 1', '"num_hidden_layers": 2'))
    with pytest.raises(ValueError, match="deeper lacks .* weights of its config.json, such as"):
        load_detector("videomae", folder, 4)
    config.write_text(config.read_text().replace('"num_hidden_layers": 2', '"num_hidden_layers": 1') + "\n")
    assert load_detector("videomae", folder, 4).sha256 != load_detector("videomae", videomae, 4).sha256
