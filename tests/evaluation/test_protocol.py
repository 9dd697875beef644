"""Protocols: everything that a score depends on is part of the hash."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from kit.confs import CONF
from kit.evaluation.protocol import Network, Protocol, Real
from kit.perceptual import VGG16_SHA256
from kit.prepare.i3d import I3D_SHA256
from kit.values import differences, plain
from tests.fixtures import composed

SHIPPED = sorted(path.stem for path in (CONF / "protocol").glob("*.yaml"))
SUITES = ("prompts", "vbench")


def shipped(name: str, *overrides: str) -> dict:
    return plain(composed("evaluate", f"protocol={name}", *overrides).protocol)


@pytest.fixture
def protocol() -> Protocol:
    return Protocol.from_dict(shipped("weizmann"))


def test_the_shipped_ones_are_those_that_were_promised():
    assert {"ucf101_paper", "ucf101_train10k", "shapes", "weizmann", "folder", *SUITES} == set(SHIPPED)


@pytest.mark.parametrize("name", [name for name in SHIPPED if name not in SUITES])
def test_shipped_protocols_say_everything(name):
    protocol = Protocol.from_dict(shipped(name))
    assert protocol.name == name and protocol.detector.kind == "i3d" and len(protocol.detector.sha256) == 64
    assert protocol.hash in str(protocol) and f"{protocol.frames} frames" in str(protocol)


def test_the_shipped_ones_want_the_networks_that_kit_helps_to():
    protocol = Protocol.from_dict(shipped("folder"))
    assert (protocol.detector.sha256, protocol.perceptual.sha256) == (I3D_SHA256, VGG16_SHA256)


def test_ucf101_by_the_literature():
    paper, train10k = (Protocol.from_dict(shipped(name)) for name in ("ucf101_paper", "ucf101_train10k"))
    assert (paper.real.split, paper.real.clips, paper.frames) == ("val", 3783, 17)
    assert (train10k.real.split, train10k.real.clips, train10k.samples, train10k.frames) == ("train", 10000, 10000, 16)
    assert all((p.height, p.width, p.folds) == (128, 128, 4) for p in (paper, train10k))


CHANGES = [
    {"name": "other"}, {"frames": 15}, {"height": 32}, {"width": 32}, {"fps": 8}, {"samples": 100}, {"folds": 3}, {"seed": 1},
    {"fingerprint": "abc"}, {"detector": Network("i3d", "0")}, {"perceptual": Network("st-lpips")},
    *({"real": replace(Real("folder", clips=512, start="random"), **change)} for change in (
        {"kind": "ucf101"}, {"split": "val"}, {"clips": 100}, {"start": "first"}, {"random_crop": True}, {"val_every": 4},
        {"official": 2}, {"backend": "pyav"}, {"seed": 3},
    )),
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_the_hash_changes_with_anything(protocol, change):
    assert protocol.resolved(**change).hash != protocol.hash


def test_the_hash_survives_a_file_and_another_order(protocol):
    values = json.loads(json.dumps(protocol.as_dict()))
    assert Protocol.from_dict(values).hash == protocol.hash == values["hash"]
    assert Protocol.from_dict(dict(reversed(values.items()))).hash == protocol.hash


def test_one_value_has_one_hash(protocol):
    assert protocol.resolved(fps=12).hash == protocol.resolved(fps=12.0).hash
    assert protocol.resolved(fps=None).hash == protocol.resolved(fps=0).hash


def test_the_seed_is_that_of_the_command_line():
    assert Protocol.from_dict(shipped("folder", "seed=7")).seed == 7


def test_real_statistics_are_kept_apart(protocol):
    """Their hash depends on the detector, and on the fold if folds have different clips, but not on the samples."""
    assert protocol.real_hash(0, "a") != protocol.real_hash(1, "a") != protocol.real_hash(1, "b")
    assert protocol.resolved(samples=3, seed=5, folds=9).real_hash(0, "a") == protocol.real_hash(0, "a")
    still = protocol.resolved(real=replace(protocol.real, start="middle"))
    assert still.real_hash(0, "a") == still.real_hash(1, "a") != protocol.real_hash(0, "a")
    cropped = protocol.resolved(real=replace(protocol.real, start="middle", random_crop=True))
    assert cropped.real_hash(0, "a") != cropped.real_hash(1, "a")
    shape = ({"frames": 15}, {"height": 32}, {"width": 32}, {"fps": 8})
    for change in (*shape, {"fingerprint": "other"}, {"conventions": {"version": 3}}):
        assert protocol.resolved(**change).real_hash(0, "a") != protocol.real_hash(0, "a")


def test_differences_are_told(protocol):
    other = protocol.resolved(folds=3, detector=Network("videomae", None))
    told = differences(protocol.as_dict(), other.as_dict())
    assert told[0] == "detector.kind: i3d, videomae" and told[-1] == "folds: 2, 3" and len(told) == 3


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["protocol.frames=0"], "protocol.frames=0; expected a whole number of 1 or more"),
        (["protocol.height=15"], "protocol.height=15; expected a whole number of 16 or more"),
        (["protocol.width=15"], "protocol.width=15; expected a whole number of 16 or more"),
        (["protocol.folds=0"], "protocol.folds=0; expected a whole number of 1 or more"),
        (["protocol.samples=1"], "protocol.samples=1; expected a whole number of 2 or more"),
        (["protocol.real.start=end"], "protocol.real.start=end; expected one of: first, middle, random"),
        (["protocol.real.kind=kinetics"], "protocol.real.kind=kinetics; expected one of"),
        (["protocol.real.clips=1"], "protocol.real.clips=1; expected a whole number of 2 or more"),
        (["protocol.frames=16.5"], "protocol.frames=16.5; expected a whole number"),
        (["protocol.frames=abc"], "protocol.frames=abc; expected a whole number"),
        (["protocol.frames=null"], "protocol.frames=null; expected a whole number"),
        (["protocol.fps=-1"], "protocol.fps=-1; expected frames per second"),
        (["protocol.fps=nan"], "protocol.fps=nan; expected frames per second"),
        (["protocol.fps=inf"], "protocol.fps=inf; expected frames per second"),
        (["protocol.detector.sha256=11223344"], "protocol.detector.sha256=11223344 is a number, expected a text or null"),
        (["protocol.perceptual.sha256=39e7"], "protocol.perceptual.sha256=.* is a number, expected a text or null"),
        (["protocol.real.kind=shapes"], "protocol.real.split='all'; shapes are drawn for `train` or `val`"),
        (["+protocol.crop=centre"], "unexpected keyword argument 'crop'; see `python -m kit evaluate --help`"),
    ],
)
def test_values_that_make_no_sense(overrides, message):
    with pytest.raises(ValueError, match=message):
        Protocol.from_dict(shipped("folder", *overrides))


@pytest.mark.parametrize("override", ["protocol.real.start=random", "protocol.real.random_crop=true"])
def test_drawn_clips_have_no_other_start_or_crop(override):
    with pytest.raises(ValueError, match="say protocol.real.start=first, without random_crop"):
        Protocol.from_dict(shipped("shapes", override))
