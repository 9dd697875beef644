"""The reader of shapes clips: right on real and degraded clips, at chance if pixels and captions are unrelated."""

from __future__ import annotations

import itertools
import math
from dataclasses import asdict
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from kit.data.shapes import BACKGROUNDS, COLOURS, MOTIONS, SHAPES, Attributes, Shapes
from kit.evaluation import shapes_score
from kit.evaluation.shapes_score import Reading, fit_background

read_clip = partial(shapes_score.read_clip, fps=8.0)  # of `Shapes` without other words
caption_accuracy = partial(shapes_score.caption_accuracy, fps=8.0)
CHANCE = {"colour": 1 / 8, "shape": 1 / 5, "motion": 1 / 9, "background": 1 / 4}


def accuracy(data: Shapes, clips: int, change=lambda video, n: video, caption=None) -> dict[str, float]:
    """`caption_accuracy` on the first clips of a data set, a few at a time to spare memory."""
    parts = [
        caption_accuracy(
            [change(data[n]["video"], n) for n in numbers], [(caption or data.caption)(n) for n in numbers], fps=data.fps
        )
        for numbers in np.arange(clips).reshape(-1, 25).tolist()
    ]
    return {name: float(np.mean([part[name] for part in parts])) for name in parts[0]}


def degrade(video: torch.Tensor, n: int, blur: float = 1.0) -> torch.Tensor:
    """Degrades a clip like a lossy autoencoder: blur (in 1/64 sides), colour cast, block artefacts, noise, 8-bit rounding."""
    rng = torch.Generator().manual_seed(n)
    _, frames, height, width = video.shape
    kernel = torch.exp(-0.5 * (torch.arange(-5, 6) / blur * 64 / min(height, width)) ** 2)
    kernel = (kernel / kernel.sum()).expand(3, 1, 1, 11)
    images = F.conv2d(F.pad(video.transpose(0, 1), (5, 5, 5, 5), mode="replicate"), kernel, groups=3)
    blurred = F.conv2d(images, kernel.transpose(2, 3), groups=3).transpose(0, 1)
    gain, cast = 0.06 * (2 * torch.rand(2, 3, 1, 1, 1, generator=rng) - 1)
    blocks = 0.03 * torch.randn(1, 3 * frames, math.ceil(height / 8), math.ceil(width / 8), generator=rng)
    blocks = F.interpolate(blocks, scale_factor=8)[0, :, :height, :width].unflatten(0, (3, frames))
    noisy = blurred * (1 + gain) + cast + blocks + 0.05 * torch.randn(video.shape, generator=rng)
    return ((noisy.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1


def any_caption(n: int) -> str:
    """Draws a caption uniformly from the whole grammar, whatever clip n shows."""
    rng = np.random.default_rng((7, n))
    values = (str(rng.choice(list(options))) for options in (COLOURS, SHAPES, MOTIONS, BACKGROUNDS))
    return Attributes(*values).caption()


def within_chance(found: float, chance: float, clips: int, sigmas: float = 4) -> bool:
    """Returns whether an accuracy is that of guessing, within `sigmas` standard deviations of the binomial distribution."""
    return abs(found - chance) <= sigmas * math.sqrt(chance * (1 - chance) / clips)


def clip_of(motion: str, shape: str = "star", split: str = "train") -> torch.Tensor:
    data = Shapes(split=split)
    return next(
        data[n]["video"] for n in itertools.count()
        if (data.attributes(n).motion, data.attributes(n).shape) == (motion, shape)
    )  # fmt: skip


def test_held_out_clips_are_read_right():
    found = accuracy(Shapes(split="val"), 300)
    assert list(found) == ["colour", "shape", "motion", "background", "all"]
    assert min(found[name] for name in CHANCE) >= 0.98, found
    assert found["all"] >= 0.97, found


def test_clips_of_every_combination_are_read_right():
    """Uses training clips: the held-out tenth of the combinations lacks many pairs of shape and motion."""
    assert min(accuracy(Shapes(split="train"), 150).values()) >= 0.98


def test_degraded_clips_are_read_right():
    found = accuracy(Shapes(split="val"), 200, degrade)
    assert min(found[name] for name in CHANCE) >= 0.95, found


def test_shapes_are_told_apart_under_heavy_blur():
    assert accuracy(Shapes(split="train"), 100, lambda video, n: degrade(video, n, blur=2.0))["shape"] >= 0.97


@pytest.mark.parametrize(
    "size",
    [
        {"height": 48, "width": 80},
        {"height": 80, "width": 48, "fps": 5.0},
        {"height": 128, "width": 128},
        {"fps": 17.0},
        {"fps": 5.0, "frames": 33},
        {"fps": 17.0, "frames": 33, "height": 48, "width": 80},
    ],
    ids=str,
)
@pytest.mark.parametrize("change", [lambda video, n: video, degrade], ids=["clean", "degraded"])
def test_other_sizes_lengths_and_frame_rates(size, change):
    found = accuracy(Shapes(split="train", seed=1, **size), 25, change)
    assert min(found[name] for name in CHANCE) >= 0.95, found


def test_images_have_no_motion():
    data = Shapes(split="val", frames=1)
    found = accuracy(data, 150)
    assert list(found) == ["colour", "shape", "background", "all"]
    assert min(found.values()) >= 0.98, found
    assert read_clip(data[0]["video"]).motion is None


def test_motion_counts_only_the_captions_that_name_one():
    still, moving = Shapes(split="val", frames=1), Shapes(split="val")
    wrong = asdict(moving.attributes(1)) | {"motion": "standing still"}
    assert moving.attributes(1).motion != "standing still"
    videos = [still[0]["video"], moving[0]["video"], moving[1]["video"]]
    found = caption_accuracy(videos, [still.caption(0), moving.caption(0), Attributes(**wrong).caption()])
    assert found == {"colour": 1, "shape": 1, "motion": 1 / 2, "background": 1, "all": pytest.approx(2 / 3)}


def test_captions_of_other_clips_score_at_chance():
    clips = 300
    found = accuracy(Shapes(split="val"), clips, caption=any_caption)
    for name, chance in CHANCE.items():
        assert within_chance(found[name], chance, clips), (name, found)
    assert found["all"] <= 0.02


@pytest.mark.parametrize("kind", ["white", "faint", "blobs"])
def test_noise_scores_no_better_than_chance(kind):
    rng = torch.Generator().manual_seed(0)

    def noise(video: torch.Tensor, n: int) -> torch.Tensor:
        if kind == "blobs":
            coarse = torch.randn(1, 3, 5, 6, 6, generator=rng)
            return F.interpolate(coarse, video.shape[1:], mode="trilinear")[0].mul(0.5).clamp(-1, 1)
        return torch.randn(video.shape, generator=rng).mul(1.0 if kind == "white" else 0.1).clamp(-1, 1)

    clips = 100
    found = accuracy(Shapes(split="val"), clips, noise, any_caption)
    for name, chance in CHANCE.items():
        assert found[name] <= chance or within_chance(found[name], chance, clips), (name, found)
    assert found["all"] <= 0.02


def test_noise_is_unreadable():
    assert read_clip(torch.rand(3, 17, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1) == Reading()


@pytest.mark.parametrize("phrase", BACKGROUNDS)
def test_bare_background_shows_nothing_else(phrase):
    top, bottom = (torch.tensor(colour).view(3, 1, 1, 1) / 127.5 - 1 for colour in BACKGROUNDS[phrase])
    bare = (top + (bottom - top) * torch.linspace(0, 1, 64).view(1, 1, 64, 1)).expand(3, 17, 64, 64)
    assert read_clip(bare) == Reading(background=phrase)
    assert read_clip(degrade(bare, 0)) == Reading(background=phrase)


@pytest.mark.parametrize("value", [-1.0, 0.0, 1.0])
@pytest.mark.parametrize("shape", [(3, 17, 64, 64), (3, 1, 16, 16)])
def test_flat_clips_do_not_crash(value, shape):
    reading = read_clip(torch.full(shape, value))
    assert (reading.colour, reading.shape, reading.motion) == (None, None, None)


def disc(xs: torch.Tensor, ys: torch.Tensor, radii: torch.Tensor, colour: tuple[int, int, int]) -> torch.Tensor:
    """Draws a flat disc on dark grey, without the data set: xs, ys, radii (T,) as shares of the side of 64 pixels."""
    grid = (torch.arange(64) + 0.5) / 64
    near = (grid - xs[:, None, None]) ** 2 + (grid[:, None] - ys[:, None, None]) ** 2 < radii[:, None, None] ** 2
    return torch.where(near, torch.tensor(colour).view(3, 1, 1, 1), torch.tensor(45)) / 127.5 - 1


SECONDS = torch.arange(17) / 8


@pytest.mark.parametrize(
    ("motion", "xs", "ys", "radii"),
    [
        ("standing still", 0.5, 0.4, 0.2),
        ("moving right", 0.3 + 0.2 * SECONDS, 0.5, 0.2),
        ("moving left", 0.7 - 0.25 * SECONDS, 0.5, 0.2),
        ("moving up", 0.4, 0.7 - 0.18 * SECONDS, 0.2),
        ("moving down", 0.6, 0.3 + 0.22 * SECONDS, 0.2),
        ("growing", 0.5, 0.5, 0.12 + 0.05 * SECONDS),
        ("shrinking", 0.5, 0.5, 0.26 - 0.05 * SECONDS),
        ("bouncing", 0.4, 0.75 - 0.35 * torch.sin(math.pi * SECONDS).abs(), 0.18),
        ("circling", 0.5 + 0.2 * torch.cos(math.pi * SECONDS), 0.5 + 0.2 * torch.sin(math.pi * SECONDS), 0.2),
    ],
)
def test_discs_drawn_by_hand(motion, xs, ys, radii):
    """The clips do not depend on how the data set draws and moves shapes."""
    video = disc(*(torch.as_tensor(part) + 0 * SECONDS for part in (xs, ys, radii)), colour=(220, 50, 40))
    assert read_clip(video) == Reading("red", "ball", motion, "on a dark background")


@pytest.mark.parametrize(
    ("motion", "axis", "mirrored"),
    [
        ("moving left", 3, "moving right"),
        ("moving up", 2, "moving down"),
        ("moving right", 1, "moving left"),
        ("growing", 1, "shrinking"),
        ("growing", 3, "growing"),
    ],
)
def test_motion_follows_the_pixels(motion, axis, mirrored):
    """A clip flipped in space or time shows another motion."""
    video = clip_of(motion)
    assert read_clip(video).motion == motion
    assert read_clip(video.flip(axis)).motion == mirrored


def test_frame_rate_tells_speed():
    """A bounce at a quarter of its speed is not read as bouncing."""
    video = clip_of("bouncing")
    assert read_clip(video).motion == "bouncing"
    assert read_clip(video[:, :5].repeat_interleave(4, 1)[:, :17]).motion != "bouncing"


def test_grey_and_shapeless_things_have_no_name():
    still = torch.full((17,), 0.5)
    assert read_clip(disc(still, still, 0.4 * still, (200, 200, 200))).colour is None
    bar = torch.full((3, 17, 64, 64), -0.6)
    bar[0, :, 30:34, 8:56] = 0.9
    assert read_clip(bar).shape is None


def test_jumping_about_is_no_motion():
    rng = torch.Generator().manual_seed(0)
    xs, ys = 0.2 + 0.6 * torch.rand(2, 17, generator=rng)
    reading = read_clip(disc(xs, ys, torch.full((17,), 0.15), (220, 50, 40)))
    assert (reading.colour, reading.shape, reading.motion) == ("red", "ball", None)


def test_what_is_gone_most_of_the_time_has_no_motion():
    """A still speck has no motion either."""
    still = torch.full((17,), 0.5)
    video = disc(still, still, torch.where(torch.arange(17) < 6, 0.15, 0.0), (220, 50, 40))
    video[:, :, :2, :2] = video[:, :1, 32:33, 32:33]
    assert read_clip(video) == Reading("red", "ball", None, "on a dark background")


def test_specks_are_left_out():
    """The upper quarter has stray pixels of the shape's own colour, at other places in every frame."""
    video = disc(0.75 - 0.22 * SECONDS, 0.5 + 0 * SECONDS, 0.15 + 0 * SECONDS, (220, 50, 40))
    specks = torch.rand(17, 64, 64, generator=torch.Generator().manual_seed(0)) < 0.1
    specks[:, 16:] = False
    video = torch.where(specks, torch.tensor([220, 50, 40]).view(3, 1, 1, 1) / 127.5 - 1, video)
    assert read_clip(video) == Reading("red", "ball", "moving left", "on a dark background")


def test_a_large_shape_does_not_bend_the_background():
    video = disc(torch.tensor([0.4]), torch.tensor([0.45]), torch.tensor([0.36]), (240, 60, 60))
    assert np.abs(fit_background(video.numpy() * 0.5 + 0.5) - 45 / 255).max() < 0.01


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_leaving_the_frame_is_read(shape):
    reading = read_clip(clip_of("moving left", shape)[:, :, :, 20:])
    assert (reading.shape, reading.motion) == (shape, "moving left")


def test_a_clip_reads_the_same_alone_and_in_any_batch():
    data = Shapes(split="val")
    videos, captions = torch.stack([data[n]["video"] for n in range(6)]), [data.caption(n) for n in range(6)]
    captions[2] = captions[3]  # one that is wrong
    alone = [caption_accuracy([video], [caption]) for video, caption in zip(videos, captions, strict=True)]
    together = caption_accuracy(videos, captions)
    assert together == caption_accuracy(videos.flip(0), captions[::-1])
    assert together == {name: pytest.approx(np.mean([one[name] for one in alone])) for name in together}
    assert together["all"] == pytest.approx(5 / 6)


def test_arrays_and_tensors_of_any_float_type_are_read_alike_and_left_alone():
    video = Shapes(split="val")[0]["video"]
    before = video.clone()
    readings = {read_clip(v) for v in (video, video.numpy(), video.double().numpy(), video.half(), video.bfloat16())}
    assert len(readings) == 1
    assert torch.equal(video, before)


@pytest.mark.parametrize(
    ("video", "message"),
    [
        (torch.zeros(17, 3, 64, 64), r"\(3, T, H, W\).*found \(17, 3, 64, 64\)"),
        (torch.zeros(1, 3, 17, 64, 64), r"\(3, T, H, W\).*found \(1, 3, 17, 64, 64\)"),
        (torch.zeros(3, 0, 64, 64), r"T >= 1.*found \(3, 0, 64, 64\)"),
        (torch.zeros(3, 2, 8, 64), r"H and W >= 16, found \(3, 2, 8, 64\)"),
        (torch.zeros(3, 2, 64, 64, dtype=torch.uint8), r"floating point.*found torch.uint8"),
        (np.zeros((3, 2, 64, 64), dtype=np.int64), r"floating point.*found int64"),
        ([[0.0]], r"floating point.*found list"),
        (torch.full((3, 2, 64, 64), 1.5), r"\[-1, 1\], found 1.5 to 1.5"),
        (torch.full((3, 2, 64, 64), -255.0), r"\[-1, 1\], found -255.0"),
        (torch.full((3, 2, 64, 64), math.inf), r"\[-1, 1\], found inf"),
        (torch.zeros(3, 2, 64, 64).index_fill(3, torch.tensor(5), math.nan), r"finite.*found nan"),
    ],
)
def test_bad_videos(video, message):
    with pytest.raises(ValueError, match=message):
        read_clip(video)
    with pytest.raises(ValueError, match=message):
        caption_accuracy([video], ["a red ball moving right over a green field"])


@pytest.mark.parametrize("fps", [0.0, -8.0, math.nan, math.inf])
def test_bad_frame_rate(fps):
    with pytest.raises(ValueError, match=f"positive frames per second, found {fps}"):
        read_clip(torch.zeros(3, 2, 64, 64), fps=fps)


def test_bad_captions():
    video = torch.zeros(3, 2, 64, 64)
    with pytest.raises(ValueError, match="found 2 and 1"):
        caption_accuracy([video, video], ["a red ball moving right over a green field"])
    with pytest.raises(ValueError, match="at least 1; found 0 and 0"):
        caption_accuracy([], [])
    with pytest.raises(ValueError, match="names 0 colours"):
        caption_accuracy([video], ["a grey ball moving right over a green field"])
