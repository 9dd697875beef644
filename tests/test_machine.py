"""What kit takes the machine for, and what it says where that lacks something."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from kit import machine
from kit.cli import explained, set_threads
from kit.machine import cores, in_cache
from tests.fixtures import composed


@pytest.mark.parametrize(
    ("quota", "bound", "expected"),
    [
        (None, 6, 6),  # no container of Linux
        ("max 100000", 6, 6),
        ("200000 100000", 6, 2),
        ("250000 100000", 6, 3),
        ("50000 100000", 6, 1),
        ("1600000 100000", 6, 6),
        ("200000 100000", 1, 1),
    ],
)
def test_cores_are_those_that_a_container_and_its_affinity_leave(quota, bound, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "CPU_QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(bound)), raising=False)
    if quota is not None:
        (tmp_path / "cpu.max").write_text(quota + "\n")
    assert cores() == expected


@pytest.mark.parametrize(
    ("own", "allowed", "number", "expected"), [(8, 2, None, 2), (1, 2, None, 1), (8, 2, 3, 3), (8, 2, 0, 2)]
)
def test_threads_are_torchs_own_up_to_the_quota(own, allowed, number, expected, monkeypatch):
    """Else a container of two cores on a large machine has a thread for each of the machine's."""
    threads = [own]
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads[-1])
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.setattr(machine, "cores", lambda: allowed)
    set_threads(number)
    assert threads[-1] == expected


def test_training_is_where_sampling_is(monkeypatch):
    """Lightning's `auto` would take a Mac's GPU, which nothing else here uses."""
    for available, kind in ((False, "cpu"), (True, "cuda")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
        assert composed("stage1_tokenizer", "size=tiny").trainer.accelerator == machine.device().type == kind


def test_no_room_for_a_cache_is_told_with_the_way_out(tmp_path, monkeypatch):
    monkeypatch.setenv("KIT_CACHE", str(tmp_path / "kept"))
    assert in_cache("heads", "a.json") == tmp_path / "kept" / "heads" / "a.json" and (tmp_path / "kept" / "heads").is_dir()
    (tmp_path / "file").touch()
    monkeypatch.setenv("KIT_CACHE", str(tmp_path / "file"))
    with pytest.raises(OSError, match=r"file.*; KIT_CACHE=DIR says where there is"):
        in_cache("heads", "a.json")
    monkeypatch.delenv("KIT_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    with pytest.raises(OSError, match=r"home directory.*; KIT_CACHE=DIR says where"):
        in_cache("x")


@pytest.mark.parametrize(
    "said",
    [
        "unable to allocate shared memory(shm) for file </torch_1_2_3>: No space left on device (28)",
        "It is possible that dataloader's workers are out of shared memory. Please try to raise your shared memory limit.",
    ],
)
def test_little_shared_memory_is_told_with_the_way_out(said):
    told = explained(RuntimeError(f"Caught RuntimeError in DataLoader worker process 0.\n{said}"), "fit")
    assert told.startswith("the clips that workers hand over do not fit into /dev/shm: docker run --shm-size=1g")


def test_the_shared_memory_of_a_gpus_kernel_is_another():
    assert explained(RuntimeError("out of resource: shared memory, Required: 131072, Hardware limit: 101376"), "fit") is None
