"""A video tokenizer inflated from an image tokenizer reconstructs still videos as that reconstructs images."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from kit.checkpoint import load_tokenizer
from kit.cli import main
from kit.data.decode import UnreadableVideo, open_video
from kit.data.shapes import Shapes
from kit.media import to_uint8
from kit.tokenizer import Tokenizer, TokenizerConfig
from kit.tokenizer.inflate import inflate
from kit.tokenizer.quantizer import feature_to_bits
from tests.fixtures import CLIP, QUICK, TOKENIZER
from tests.plugin import past_gradients, randomise

SHAPE = dict(bits=6, scales=(1, 2, 4), patch=2, widths=(8, 16), blocks=2)


@pytest.fixture
def image() -> Tokenizer:
    return randomise(Tokenizer(TokenizerConfig(**SHAPE, temporal=False)))


@pytest.fixture
def video(image) -> Tokenizer:
    tokenizer = randomise(Tokenizer(TokenizerConfig(**SHAPE)), seed=7)
    inflate(image, tokenizer)
    return tokenizer


@torch.no_grad()
def test_a_still_video_is_the_image(image, video):
    picture = torch.rand(2, 3, 1, 16, 24) * 2 - 1
    still = picture.expand(-1, -1, 9, -1, -1)
    feature = image.encode(picture)
    torch.testing.assert_close(video.encode(still), feature.expand(-1, -1, 3, -1, -1), atol=1e-5, rtol=1e-5)
    bits = feature_to_bits(feature, image.schedule_of(picture))
    assert torch.equal(video.bits(still), bits.repeat(1, 3, 1))
    torch.testing.assert_close(video.reconstruct(still), image.reconstruct(picture).expand_as(still), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_moving_video_is_the_image_of_each_groups_last_frame(image, video):
    """At the start the past has no influence."""
    clip = torch.rand(1, 3, 9, 16, 16) * 2 - 1
    feature = video.encode(clip)
    for latent, frame in enumerate((0, 4, 8)):
        torch.testing.assert_close(feature[:, :, latent : latent + 1], image.encode(clip[:, :, frame : frame + 1]))


def test_time_is_learned_from_there(video):
    """The slices for past frames, which start at zero, have gradients."""
    video.train()
    clip = torch.rand(1, 3, 9, 16, 16) * 2 - 1
    (video(clip)[0] - clip).square().mean().backward()
    past = past_gradients(video)
    assert len(past) == 2 * SHAPE["blocks"] + 2 and all(grad.abs().sum() > 0 for grad in past)


def test_what_does_not_fit_is_named(image, video):
    with pytest.raises(ValueError, match=r"temporal=false"):
        inflate(video, image)
    with pytest.raises(ValueError, match=r"differ in more than time \(bits: 6, 8; widths: \[8, 16\], \[8, 24\]\)"):
        inflate(image, Tokenizer(TokenizerConfig(**{**SHAPE, "bits": 8, "widths": (8, 24)})))
    with pytest.raises(ValueError, match="takes 1 frame, got 5; inflate it"):
        image.reconstruct(torch.zeros(1, 3, 5, 16, 16))


def test_images_then_video_by_command(tmp_path, capsys, caplog):
    """Trains stage 0 on a folder of pictures, one of them broken, then stage 1 from its checkpoint."""
    for n in range(6):
        Image.fromarray(to_uint8(Shapes("train", 1, 40, 32)[n]["video"])[0]).save(tmp_path / f"{n}.png")
    (tmp_path / "0.png").write_bytes(b"no picture")
    clip = [word for word in CLIP if "frames" not in word]
    words = [f"root={tmp_path}", *clip, *TOKENIZER, *QUICK, "recipe.tokenizer.steps=4", "trainer.val_check_interval=4"]
    data = ["data=clips", f"data.root={tmp_path}", "data.val_clips=1"]
    assert main(["fit", "conf=stage0_image_tokenizer", *words, *data, "name=images"]) == 0
    assert "1 unreadable files were passed over" in caplog.text
    images = tmp_path / "images" / "checkpoints" / "last.ckpt"
    assert not load_tokenizer(images).model.config.temporal

    start = [*words, "init=inflate", f"init.ckpt={images}", "data.frames=5", "optimizer.lr=0", "name=video"]
    assert main(["fit", "conf=stage1_tokenizer", *start]) == 0
    picture = Shapes("val", 1, 32, 32)[0]["video"][None]
    as_image, as_video = (load_tokenizer(tmp_path / n / "checkpoints" / "last.ckpt").model for n in ("images", "video"))
    torch.testing.assert_close(as_video.reconstruct(picture), as_image.reconstruct(picture), atol=1e-4, rtol=1e-4)
    assert main(["fit", "conf=stage1_tokenizer", *start[:-1], "name=other", "tokenizer.bits=4"]) == 1
    assert "differ in more than time (bits: 8, 4)" in capsys.readouterr().err


def test_training_goes_on_from_given_weights_with_other_losses(tmp_path, capsys):
    words = [f"root={tmp_path}", *CLIP, *TOKENIZER, *QUICK, "recipe.tokenizer.steps=3", "trainer.val_check_interval=3"]
    assert main(["fit", "conf=stage1_tokenizer", *words, "name=plain"]) == 0
    given = tmp_path / "plain" / "checkpoints" / "last.ckpt"
    start = [*words, "init=weights", f"init.ckpt={given}", "loss.adversarial.weight=0.1", "loss.adversarial.width=8"]
    assert main(["fit", "conf=stage1_tokenizer", *start, "optimizer.lr=0", "name=on"]) == 0
    as_given, on = (load_tokenizer(tmp_path / n / "checkpoints" / "last.ckpt").model.state_dict() for n in ("plain", "on"))
    for name, weight in as_given.items():
        torch.testing.assert_close(on[name], weight)
    assert main(["fit", "conf=stage1_tokenizer", *start, "name=other", "tokenizer.widths=[32,48]"]) == 1
    assert "another architecture than the tokenizer to train: widths: [32, 32], [32, 48]" in capsys.readouterr().err
    for lacking in ("init=weights", "init.how=inflate"):
        assert main(["fit", "conf=stage1_tokenizer", *words, lacking, "name=nothing"]) == 1
        assert "needs init.ckpt=PATH, the checkpoint of a tokenizer to start from" in capsys.readouterr().err

    old = torch.load(given, weights_only=True)
    old["state_dict"] = {name: w[:, :, None] if w.ndim == 4 else w for name, w in old["state_dict"].items()}
    old["ema"] = {}
    del old["sha256"]
    torch.save(old, tmp_path / "old.ckpt")
    with pytest.raises(ValueError, match="old.ckpt is of another version of kit, with other weights .*; train it again"):
        load_tokenizer(tmp_path / "old.ckpt")
    assert main(["fit", "conf=stage1_tokenizer", *words, "name=resumed", f"ckpt={tmp_path / 'old.ckpt'}"]) == 1
    assert "old.ckpt is of another version of kit, with other weights (decoder." in capsys.readouterr().err


def test_pictures_of_other_kinds(tmp_path):
    """Transparent pixels are white; turned pictures are shown upright; pictures of sixteen bits or more are refused, since
    they would be read as white or black."""
    for clear in ("clear.png", "clear.tif", "clear.avif"):
        Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(tmp_path / clear)
        assert open_video(tmp_path / clear).frames([0]).min() == 255 and open_video(tmp_path / clear).transparent
    Image.new("L", (8, 8), 100).save(tmp_path / "grey.png")
    Image.new("I;16", (8, 8), 30000).save(tmp_path / "deep.png")
    Image.new("F", (8, 8), 0.5).save(tmp_path / "deep.tif")
    assert (open_video(tmp_path / "grey.png").frames([0]) == 100).all()
    (turned := Image.Exif())[0x0112] = 6  # the orientation: to be turned clockwise
    Image.new("RGB", (8, 4)).save(tmp_path / "turned.jpg", exif=turned)
    assert open_video(tmp_path / "turned.jpg").frames([0]).shape == (1, 8, 4, 3)
    for deep in ("deep.png", "deep.tif"):
        with pytest.raises(UnreadableVideo, match=f"{deep}: ValueError: it has 16 bits a pixel or more, expected 8. Check"):
            open_video(tmp_path / deep)
