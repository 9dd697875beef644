"""Sharded checkpoints: each process writes and reads its own shard, a failed save leaves no trace, consolidation."""

from __future__ import annotations

import os
import pickle
import resource
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

import kit.sharded_checkpoint
from kit.cli import main
from kit.files import contents_hash, load_checked, save_checked
from kit.fsdp import ShardedStrategy, as_shared, whole
from kit.sharded_checkpoint import load_shares, load_whole, mapped, save_shards
from kit.training_checkpoint import TrainingCheckpointIO, copy_checkpoint, save_training


def contents(step: int) -> dict:
    """Returns a checkpoint as of a training at this step: some tensors have rows for all processes, some for few."""
    weights = {
        "w": torch.arange(21e3).view(7000, 3) + step,
        "b": torch.tensor([step + 0.5]),
        "half": torch.ones(3).bfloat16(),
    }
    return {
        "global_step": step, "hyper_parameters": {"generator": {}, "scales": (1, 2)}, "state_dict": weights,
        "optimizer_states": [{"state": {0: {"moment": weights["w"] * 2, "step": torch.tensor(float(step))}}}],
    }  # fmt: skip


def shared_out(checkpoint: dict) -> dict:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return mapped(checkpoint, lambda _, x: distribute_tensor(x, mesh, [Shard(0)]) if x.ndim else x)


def processes(number: int, act, path: Path):
    """Calls `act(path)` in `number` processes at once."""
    torch.multiprocessing.start_processes(_process, (number, act, path), number, start_method="fork")


def _process(rank: int, number: int, act, path: Path):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{path.parent}/met_{act.__name__}", rank=rank, world_size=number)
    act(path)
    dist.destroy_process_group()


def saves(path: Path):
    """Saves step 1 in shards and as one file; then tries saves that fail on one process or after all have written."""
    checkpoint = shared_out(contents(1))
    strategy = SimpleNamespace(in_shards=False, is_global_zero=dist.get_rank() == 0)
    gathered = ShardedStrategy.as_saved(strategy, checkpoint)
    if dist.get_rank() == 0:
        save_checked(gathered, path.with_name("gathered.ckpt"))
    save_training(checkpoint, path)

    def fails(told: str):
        with pytest.raises(OSError, match=f"last.ckpt could not be saved: {told}.*the one before it is whole"):
            save_training(shared_out(contents(2)), path)
        assert [place.name for place in (path.parent / "last.shards").iterdir()] == ["a"]

    if dist.get_rank() == 1:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**10, before[1]))
    fails("File too large")
    if dist.get_rank() == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    write, kit.sharded_checkpoint.save_checked = (
        kit.sharded_checkpoint.save_checked,
        lambda *_: pytest.fail("the others do not write"),
    )
    if dist.get_rank() == 0:
        kit.sharded_checkpoint.save_checked = no_room
    fails("No space left")
    kit.sharded_checkpoint.save_checked = write
    hashed = kit.sharded_checkpoint.file_sha256
    kit.sharded_checkpoint.file_sha256 = lambda file: (hashed(file), dist.get_rank() and file.unlink())[0]
    with pytest.raises(OSError, match="__1_0.distcp is missing; all processes must save to one file system"):
        save_training(shared_out(contents(2)), path)
    kit.sharded_checkpoint.file_sha256 = lambda _: os.kill(os.getpid(), signal.SIGKILL)
    save_training(shared_out(contents(3)), path)


def no_room(_, path: Path):
    raise kit.sharded_checkpoint.not_saved(path, OSError(28, "No space left on device"))


def goes_on(path: Path):
    """Loads step 1 in another number of processes, from shards and from one file, then saves steps 4 and 5."""
    expected, now = contents(1), shared_out(contents(0))

    def like(keys):
        value = now
        for key in keys:
            value = value[key]
        return value

    for given in (path, path.with_name("gathered.ckpt")):
        taken = load_shares(given, lambda keys, x: as_shared(x, like(keys)))
        assert taken["state_dict"]["w"].placements == (Shard(0),)
        assert taken["state_dict"]["w"].to_local().shape[0] == (2334, 2334, 2332)[dist.get_rank()]
        assert contents_hash(mapped(taken, lambda _, x: whole(x))) == contents_hash(expected)
    if dist.get_rank() == 0:
        flip(path.parent / "last.shards" / "a" / "__1_0.distcp")
    dist.barrier()
    with pytest.raises(ValueError, match="__1_0.distcp is damaged, or of another save"):
        load_shares(path, lambda keys, x: as_shared(x, like(keys)))
    if dist.get_rank() == 0:
        (path.parent / "last.shards" / "b" / "__7_0.distcp").touch()  # of a killed save of more processes
    dist.barrier()
    save_shards(shared_out(contents(4)), path)
    assert len(list((path.parent / "last.shards" / "b").glob("__*"))) == 3
    dist.barrier()
    save_shards(shared_out(contents(5)), path)


def flip(file: Path):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """The sharded checkpoint of step 1; later saves failed, the last because the processes were killed."""
    path = tmp_path_factory.mktemp("shards") / "last.ckpt"
    with pytest.raises(torch.multiprocessing.ProcessExitedException, match="SIGKILL"):
        processes(2, saves, path)
    return path


def copied(saved: Path, folder: Path) -> Path:
    shutil.copytree(saved.parent, folder, dirs_exist_ok=True)
    return folder / saved.name


def test_a_save_that_fails_or_is_killed_leaves_the_one_before(saved):
    """Shards of all processes are whole; the files of the killed save are still there."""
    assert contents_hash(load_whole(saved)) == contents_hash(contents(1))
    assert len(list((saved.parent / "last.shards").glob("b/__*"))) == 2


def test_another_number_of_processes_goes_on_and_clears_up(saved, tmp_path):
    path = copied(saved, tmp_path)
    processes(3, goes_on, path)
    assert contents_hash(load_whole(path)) == contents_hash(contents(5))
    assert [place.name for place in (tmp_path / "last.shards").iterdir()] == ["a"]
    other = copied(path, tmp_path / "other")
    TrainingCheckpointIO().remove_checkpoint(other)
    assert [p.name for p in other.parent.iterdir() if not p.name.startswith("met_")] == ["gathered.ckpt"]
    save_training(contents(6), path)
    assert load_checked(path)["global_step"] == 6 and not (tmp_path / "last.shards").exists()


@pytest.mark.parametrize("lacks", ["copytree", "copyfile"])
def test_a_copy_that_finds_no_room_leaves_what_was_there(saved, tmp_path, monkeypatch, lacks):
    """With room for the shards there may be none for the index."""
    path, last = copied(saved, tmp_path / "best"), copied(saved, tmp_path / "run")
    shards = last.with_suffix(".shards")
    (shards / "own").touch()
    with monkeypatch.context() as patch:
        patch.setattr(f"shutil.{lacks}", MagicMock(side_effect=OSError(28, "No space left on device")))
        with pytest.raises(OSError, match="No space left"):
            copy_checkpoint(path, last)
    assert contents_hash(load_whole(last)) == contents_hash(contents(1)) and (shards / "own").exists()
    copy_checkpoint(path, last)
    assert contents_hash(load_whole(last)) == contents_hash(contents(1)) and not (shards / "own").exists()
    assert not list(last.parent.glob("*.part")), "nothing is left of the way there"


def test_a_checkpoint_that_is_broken_can_be_saved_over(saved, tmp_path):
    path = copied(saved, tmp_path)
    path.write_bytes(path.read_bytes()[:-100])
    assert kit.sharded_checkpoint._cleared(path) in kit.sharded_checkpoint.SLOTS


def test_a_copy_of_one_file_leaves_no_shards_of_what_was_there(saved, tmp_path):
    last = copied(saved, tmp_path / "run")
    copy_checkpoint(saved.with_name("gathered.ckpt"), last)
    assert contents_hash(load_whole(last)) == contents_hash(contents(1))
    assert not last.with_suffix(".shards").exists()


def test_a_copy_goes_on_after_one_that_was_killed(saved, tmp_path):
    last = copied(saved, tmp_path / "run")
    (last.with_suffix(".part") / "a").mkdir(parents=True)
    copy_checkpoint(saved, last)
    assert contents_hash(load_whole(last)) == contents_hash(contents(1))
    assert not list(last.parent.glob("*.part")), "nothing is left of the way there"


def test_one_file_of_it_is_what_a_whole_save_holds(saved, tmp_path, capsys):
    path = copied(saved, tmp_path)
    words = ["consolidate", f"ckpt={path}", f"root={tmp_path}"]
    assert main(words) == 0
    made = tmp_path / "last_whole.ckpt"
    assert str(made) in capsys.readouterr().out
    assert contents_hash(load_checked(made)) == contents_hash(load_checked(tmp_path / "gathered.ckpt"))
    names = {"gathered.ckpt", "last.ckpt", "last.shards", "last_whole.ckpt", "met_saves", "consolidated"}
    assert {p.name for p in tmp_path.iterdir()} == names, "nothing is left of the way there"
    assert main(words) == 0, "what it made before it makes anew"
    other = tmp_path / "gathered.ckpt"
    before = other.read_bytes()
    for word, told in (
        (f"ckpt={made}", "is one file already"),
        (f"out={other}", "gathered.ckpt is there already; give another name"),
        (f"out={path}", "give another name"),
        (f"ckpt={tmp_path / 'last.shards'}", "give the file beside it, last.ckpt"),
    ):
        assert main([*words, word]) == 1
        assert told in capsys.readouterr().err
    assert other.read_bytes() == before


def test_no_room_for_one_file_is_told_before_it_is_made(saved, tmp_path, monkeypatch, capsys):
    """There is room for the file, not for its tensors as well."""
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=250_000))
    assert main(["consolidate", f"ckpt={saved}", f"out={tmp_path / 'one.ckpt'}", f"root={tmp_path}"]) == 1
    assert "one.ckpt needs 0 MiB of room while it is made, 0 MiB are free" in capsys.readouterr().err


class Poison:
    def __reduce__(self):
        return os.mkdir, (os.environ["POISONED"],)


def test_loading_opens_no_pickle(saved, tmp_path, monkeypatch):
    path, victim = copied(saved, tmp_path), tmp_path / "poisoned"
    monkeypatch.setenv("POISONED", str(victim))
    (tmp_path / "last.shards" / "a" / ".metadata").write_bytes(pickle.dumps(Poison()))
    load_whole(path)
    assert not victim.exists()


@pytest.mark.parametrize("damage, told", [(flip, "is damaged, or of another"), (Path.unlink, "missing; keep last.shards")])
def test_shards_that_are_not_what_was_saved_are_refused(saved, tmp_path, damage, told):
    path = copied(saved, tmp_path)
    damage(tmp_path / "last.shards" / "a" / "__1_0.distcp")
    with pytest.raises(ValueError, match=told):
        load_whole(path)


def test_an_index_that_was_changed_is_refused(saved, tmp_path):
    path = copied(saved, tmp_path)
    index = torch.load(path, weights_only=True)
    index["shards"]["slot"] = "b"
    torch.save(index, path)
    with pytest.raises(ValueError, match="last.ckpt is damaged"):
        load_whole(path)
