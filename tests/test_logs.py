"""What a training logs, when, and that it does not make a GPU wait."""

from __future__ import annotations

import csv
import errno
import sys
from contextlib import nullcontext, suppress
from functools import partial
from types import SimpleNamespace
from unittest.mock import Mock, patch

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from tqdm import tqdm

from callbacks import ProgressBar, RunSummary, VideoLogger
from callbacks.pictures import log_picture, may_fail, thin_out
from kit.data.datamodule import ClipDataModule
from kit.data.read import open_clip_file
from kit.data.shapes import Shapes
from kit.data.staged import StagedClips
from kit.generator.module import GeneratorModule
from kit.inspection import bit_use_picture
from kit.logs import CSVLogger
from kit.media import write_video
from kit.resolvers import wandb_offline
from kit.tokenizer.module import TokenizerModule
from kit.verbs.fit import ending_wandb
from tests.fixtures import fit_generator, fit_tokenizer
from tests.test_training import losses


@pytest.mark.parametrize("part", ["tokenizer", "generator"])
def test_what_is_not_written_is_not_made(part, pair, tmp_path):
    """Steps three and six of seven are written; only the loss, which the progress bar shows, is computed in all."""
    module, kept = (TokenizerModule, "train/entropy") if part == "tokenizer" else (GeneratorModule, "train/bit_accuracy")
    log, seen = module.log, []

    def spy(self, name, *args, **kwargs):
        seen.append(name)
        return log(self, name, *args, **kwargs)

    fit = fit_tokenizer if part == "tokenizer" else partial(fit_generator, tokenizer=pair.tokenizer)
    words = [f"recipe.{part}.steps=7", "trainer.log_every_n_steps=3", "trainer.val_check_interval=7"]
    with patch.object(module, "log", spy):
        assert fit(tmp_path, *words, name="run") == 0
    assert seen.count("train/loss") == 7 and seen.count(kept) == 2
    assert len(losses(tmp_path / "run", metric=kept)) == len(losses(tmp_path / "run")) == 2


def test_a_full_disk_keeps_the_log_and_its_rows(tmp_path, monkeypatch):
    """The second save brings a new column, the third more rows of it; neither has room at first."""
    log = CSVLogger(tmp_path, "logs")
    path = tmp_path / "logs" / "version_0" / "metrics.csv"

    class Full(csv.DictWriter):
        def writerows(self, rows):
            self.writer.writerow(["half a row"])
            raise OSError(errno.ENOSPC, "No space left on device")

    for step, metrics in enumerate([{"a": 1.0}, {"a": 2.0, "b": 3.0}, {"b": 4.0}]):
        log.log_metrics(metrics, step)
        before = path.read_text() if path.exists() else ""
        with monkeypatch.context() as patched:
            patched.setattr("csv.DictWriter", Full)
            with pytest.warns(UserWarning, match="metrics.csv could not be written: No space left.*; 1 rows are kept"):
                log.save()
        assert (path.read_text() if path.exists() else "") == before
        log.save()
    assert path.read_text().splitlines() == ["a,b,step", "1.0,,0", "2.0,3.0,1", ",4.0,2"]


@pytest.mark.parametrize("kind", [ClipDataModule, StagedClips])
def test_clips_alone_are_moved(kind):
    """Other values stay on the CPU, because fetching them back would wait for the GPU."""
    batch = {"video": torch.zeros(2, 3, 1, 8, 8), "n": torch.arange(2), "label": torch.ones(2).long(), "caption": ["a", "b"]}
    moved = kind.transfer_batch_to_device(None, batch, torch.device("meta"), 0)
    assert moved.keys() == batch.keys() and moved["video"].is_meta
    assert all(moved[key] is batch[key] for key in ("n", "label", "caption"))


def test_a_run_tells_at_its_start_what_it_will_train():
    """Three steps of two batches of four clips, on two devices; discriminators are no part of the model."""
    module = nn.Module()
    with torch.device("meta"):
        module.model = nn.Module()
        module.model.encoder, module.model.decoder = nn.Linear(1000, 10000, False), nn.Linear(1000, 20000, False)
        module.discriminator = nn.Linear(1000, 40000, False)
    module.kind, module.schedule, module.hparams = "tokenizer", "its scales", SimpleNamespace(optimizer={})
    data = ClipDataModule(Shapes, 5, 32, 32, 8.0, batch_size=4, val_clips=2, workers=0)
    trainer = SimpleNamespace(
        datamodule=data, max_steps=3, accumulate_grad_batches=2, world_size=2, val_check_interval=6, precision="32-true",
        strategy=SimpleNamespace(root_device="cpu"), default_root_dir="runs/a",
    )  # fmt: skip
    lines = RunSummary.lines(trainer, module)
    of_them = "discriminators 40.00 M, decoder 20.00 M, encoder 10.00 M"
    assert lines["model"] == f"tokenizer, 30.00 M parameters ({of_them})"
    assert lines["clip"] == "5 x 32 x 32 at 8 fps -> its scales"
    assert lines["steps"] == "3 of 8 clips on 2 device(s), 48 clips in all"
    assert lines["memory"].startswith("up to 1.12 GB for weights, gradients and optimizer, 0.12 GB for EMA")
    trainer.val_check_interval = 7
    told = RunSummary.lines(trainer, module)["validation"]
    assert "validation" not in lines and "trainer.val_check_interval=7 is after the end" in told


def test_the_progress_bar_shows_scores_and_numbers_neither_epoch_nor_log():
    bar, loss = ProgressBar(), {"train/loss": 0.5}
    bar._trainer = trainer = SimpleNamespace(
        loggers=[SimpleNamespace(version=3)], progress_bar_metrics=loss, current_epoch=0, max_epochs=1, num_training_batches=9
    )
    bar.train_progress_bar = tqdm(disable=True)
    bar.on_train_epoch_start(trainer)
    assert (bar.train_progress_bar.desc, bar.train_progress_bar.total) == ("", 9)
    assert bar.get_metrics(trainer, None) == loss


def test_each_kind_of_logger_is_handed_pictures_as_it_takes_them(tmp_path):
    """W&B's takes files, of videos too; TensorBoard's takes pixels; others, as the CSV log, take none."""
    pixels = torch.randint(256, (6, 8, 3), dtype=torch.uint8).numpy()
    Image.fromarray(pixels).save(path := tmp_path / "picture.png")
    wandb, tensorboard = Mock(spec=["log_image", "log_video"]), Mock(spec=["experiment"])
    others = Mock(experiment=Mock(spec=["log_metrics"]), spec=["experiment"])
    loop = SimpleNamespace(epoch_loop=SimpleNamespace(_batches_that_stepped=7))
    trainer = SimpleNamespace(loggers=[wandb, tensorboard, others], fit_loop=loop)
    log_picture(trainer, "samples", path, tmp_path / "video.mp4")
    wandb.log_image.assert_called_once_with("samples", [str(path)], step=7)
    wandb.log_video.assert_called_once_with("samples_video", [str(tmp_path / "video.mp4")], step=7, format=["mp4"])
    ((name, shown, step), how) = tensorboard.experiment.add_image.call_args
    assert (name, step, how) == ("samples", 7, {"dataformats": "HWC"}) and np.array_equal(shown, pixels)
    assert not others.experiment.mock_calls


@pytest.mark.parametrize("accumulate", [1, 2])
def test_pictures_lie_at_the_step_of_their_validations_metrics(accumulate, tmp_path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    words = ["logger=tensorboard", f"recipe.tokenizer.accumulate={accumulate}", "recipe.tokenizer.steps=2"]
    assert fit_tokenizer(tmp_path, *words, "trainer.val_check_interval=2") == 0
    (events,) = tmp_path.rglob("events.out.tfevents*")
    log = event_accumulator.EventAccumulator(str(events)).Reload()
    steps = {
        name: [event.step for event in log.Scalars(name)] for name in ("val/psnr", "val/loss") if name in log.scalars.Keys()
    }
    steps |= {name: [event.step for event in log.Images(name)] for name in log.images.Keys()}
    assert len(steps) > 2 and len(set(map(tuple, steps.values()))) == 1, steps


@pytest.mark.parametrize(
    ("passwords", "offline"),
    [
        (None, True),
        ("machine github.com login me password key", True),
        ("machine github.com", True),
        ("machine github.com login me password key\nmachine api.wandb.ai login user password key", False),
        ("machine wandb.example.org\n  login user\n  password key", False),
    ],
)
@pytest.mark.parametrize("variable", ["HOME", "NETRC"])
def test_passwords_of_other_servers_are_no_key_of_wandb(passwords, offline, variable, tmp_path, monkeypatch):
    """Told to go online without a key, it ends the training."""
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_MODE", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    path = tmp_path / (".netrc" if variable == "HOME" else "passwords")
    if variable == "NETRC":
        monkeypatch.setenv("NETRC", str(path))
    if passwords is not None:
        path.write_text(passwords)
        path.chmod(0o600)
    assert wandb_offline() == offline
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_MODE"):
        with monkeypatch.context() as set_now:
            set_now.setenv(name, "disabled")
            assert not wandb_offline(), "W&B's own matter then"


@pytest.mark.parametrize("error", [None, ValueError("a lost loss"), SystemExit(143)])
def test_wandb_is_told_whether_a_training_has_come_to_its_end(error, monkeypatch):
    """By itself it would show each as finished."""
    wandb = Mock()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    with suppress(ValueError, SystemExit), ending_wandb():
        if error is not None:
            raise error
    wandb.finish.assert_called_once_with(exit_code=int(error is not None))


def test_more_clips_than_a_video_has_room_for_end_no_training(tmp_path):
    """Of many clips one below another; a training of hours would end at its first validation."""
    with pytest.warns(UserWarning, match="no pictures of step 7: .*an mp4 has 2 to 16384 pixels a side"):
        with may_fail("pictures", 7):
            write_video(torch.zeros(3, 1, 257 * 64, 64), tmp_path / "step000007.mp4", 8.0)


@pytest.mark.parametrize(
    "error, said",
    [(torch.OutOfMemoryError("CUDA out of memory"), "CUDA out"), (RuntimeError("cuBLAS"), r"RuntimeError\('cuBLAS'\)")],
)
def test_no_error_of_pictures_ends_a_training(error, said):
    """Libraries of a full GPU, encoders of videos and loggers have errors of their own."""
    with pytest.warns(UserWarning, match=f"no pictures of step 7: {said}"):
        with may_fail("pictures", 7):
            raise error


def test_a_loader_that_dies_while_pictures_are_made_is_noticed():
    """Torch reports it in whatever Python is doing."""
    with pytest.raises(RuntimeError, match="DataLoader worker"), may_fail("pictures", 7):
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")


def test_a_video_of_a_validation_has_a_row_for_each_clip(tmp_path, monkeypatch):
    """Of a real clip and what a model makes of it, side by side."""
    colours = {"real": torch.tensor([-1.0, -0.5]), "sample": torch.tensor([0.5, 1.0])}
    rows = {name: each.view(2, 1, 1, 1, 1).expand(2, 3, 5, 32, 48) for name, each in colours.items()}
    callback, thinned = VideoLogger(str(tmp_path), clips=2), []
    monkeypatch.setattr("callbacks.video_logger.thin_out", lambda *words: thinned.append(words))
    monkeypatch.setattr(callback, "rows", lambda *_: rows)
    data = SimpleNamespace(held_out={(0, 5): {"caption": "a"}, (1, 5): {"caption": "b"}}, frames=5, fps=8)
    trainer = SimpleNamespace(
        datamodule=data, loggers=[], global_step=3, precision_plugin=SimpleNamespace(val_step_context=nullcontext),
        fit_loop=SimpleNamespace(epoch_loop=SimpleNamespace(_batches_that_stepped=3)),
    )  # fmt: skip
    callback._show(trainer, SimpleNamespace(device="cpu"), None)
    file = open_clip_file(tmp_path / "media" / "step000003.mp4", None, 0)
    assert file.size == (64, 96) and len(file) == 5 and file.video.fps == 8
    assert thinned == [(tmp_path / "media", "step", 3)]
    found = file.read(64, 96)[0, 0, 16::32, 24::48]
    assert torch.allclose(found, torch.stack(list(colours.values()), 1), atol=0.05)


@pytest.mark.parametrize(("kind", "suffixes"), [("step", ("png", "mp4")), ("bit_use_step", ("png",))])
def test_pictures_of_a_long_run_thin_out(tmp_path, monkeypatch, kind, suffixes):
    """The folder does not grow without end, and the first and the last validation stay."""
    monkeypatch.setattr("callbacks.pictures.MOST", 8)
    others = {"bit_use_step000007.png", "step7 (copy).png", "step.txt"} if kind == "step" else {"step000007.png"}
    for name in others:
        (tmp_path / name).touch()
    most, steps = 0, range(250_000, 250_000 * 101, 250_000)  # whose names come to be longer than six digits
    for step in steps:
        for suffix in suffixes:
            (tmp_path / f"{kind}{step:06d}.{suffix}").touch()
        thin_out(tmp_path, kind, step)
        left = {path.name for path in tmp_path.iterdir()}
        most = max(most, len(left))
        assert {f"{kind}{shown:06d}.{suffix}" for shown in (steps[0], step) for suffix in suffixes} | others <= left
    kept = sorted(int(name.removeprefix(kind)[:-4]) for name in left if name.endswith("png") and name not in others)
    gaps = [b - a for a, b in zip(kept, kept[1:])]
    assert most <= 8 * len(suffixes) + len(others) and len(kept) == 8
    assert max(gaps) <= 2 * 99 / 7 * 250_000  # twice as far apart as if evenly spread


def test_pictures_of_an_earlier_run_that_came_further_go_first(tmp_path, monkeypatch):
    monkeypatch.setattr("callbacks.pictures.MOST", 8)
    for step in range(100, 900, 100):
        (tmp_path / f"step{step:06d}.png").touch()
    for step in (110, 120, 130):
        (tmp_path / f"step{step:06d}.png").touch()
        thin_out(tmp_path, "step", step)
    assert sorted(int(path.stem[4:]) for path in tmp_path.iterdir()) == [100, 110, 120, 130, 200, 300, 400, 500]


def test_a_constant_bit_shows_at_a_glance(tmp_path):
    """In the picture of the bits' use one that is always 1 is red, always 0 blue; a balanced one is white."""
    picture = Image.open(bit_use_picture(torch.tensor([[0.5, 0.5, 0.5], [1.0, 0.0, 0.5]]), tmp_path / "use.png"))
    red, blue, white = (255, 0, 0), (0, 0, 255), (255, 255, 255)
    cells = [[picture.getpixel((76 + 14 * bit + 6, 22 + 14 * scale + 6)) for bit in range(3)] for scale in range(2)]
    assert cells == [[white, white, white], [red, blue, white]]


def test_what_the_colours_mean_is_whole_over_few_bits(tmp_path):
    pictures = [Image.open(bit_use_picture(torch.full((1, d), 0.5), tmp_path / f"{d}.png")) for d in (3, 40)]
    few, many = (np.nonzero((np.array(picture.convert("L"))[:20] < 128).any(0))[0].max() for picture in pictures)
    assert many - 20 < few <= many  # the last column of pixels with a letter; 40 has one more than 3
