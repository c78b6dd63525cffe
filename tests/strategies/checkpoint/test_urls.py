"""Checkpoints behind a URL: the same content and the same checks; committed by putting the manifest last."""

from __future__ import annotations

import itertools
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from drivetrain.strategies.checkpoint import Checkpoint, CheckpointStore, Keep
from drivetrain.strategies.checkpoint.urls import UrlPath, UrlSink, path_of
from drivetrain.strategies.errors import CheckpointError, ConfigError, MissingDependency

fsspec = pytest.importorskip("fsspec", reason="waits for fsspec")
_numbers = itertools.count()


@pytest.fixture
def url() -> Iterator[str]:
    """A place in memory of its own."""
    root = f"memory://run {next(_numbers)} ä/checkpoints"
    yield root
    fsspec.filesystem("memory").rm(root, recursive=True) if fsspec.filesystem("memory").exists(root) else None


def save(store: CheckpointStore, step: int, **options: Any) -> Any:
    tensors = {"w": torch.arange(700_000.0) + step, "half": torch.full((5, 3), step).bfloat16()}  # over two chunks
    return store.save(step, tensors, {"value": [step, torch.tensor(step)]}, meta={"step": step}, **options)


def files_of(path: Any) -> list[str]:
    return sorted(found.name for found in path.iterdir())


def test_what_is_saved_is_read_back(url: str) -> None:
    info = save(CheckpointStore(url), 3)
    assert str(info.path).endswith("/checkpoints/step-00000003")
    again = CheckpointStore(url)
    assert [i.step for i in again.list()] == [3]
    with again.open(3) as checkpoint, Checkpoint(str(info.path)) as by_url:
        assert torch.equal(checkpoint.tensor("w"), torch.arange(700_000.0) + 3)
        assert torch.equal(checkpoint.tensor("w", offset=(300_000,), shape=(5,)), torch.arange(300_003.0, 300_008.0))
        assert torch.equal(by_url.tensor("half"), torch.full((5, 3), 3).bfloat16())
        assert checkpoint.value("value") == [3, torch.tensor(3)]
        assert checkpoint.meta == {"step": 3}


def test_a_file_url_is_the_local_path(tmp_path: Path) -> None:
    place = tmp_path / "a b"
    store = CheckpointStore(f"file://{tmp_path}/a%20b")
    assert save(store, 1).path == place / "step-00000001"
    assert type(store) is CheckpointStore
    assert CheckpointStore(place).verify(f"file://{tmp_path}/a%20b/step-00000001") == []


def test_the_same_bytes_lie_behind_a_url_and_on_a_disk(url: str, tmp_path: Path) -> None:
    local, remote = save(CheckpointStore(tmp_path), 1).path, save(CheckpointStore(url), 1).path
    assert files_of(local) == files_of(remote)
    for name in files_of(local):
        if name != "manifest.json":  # has the time
            assert (local / name).read_bytes() == (remote / name).read_bytes()


def test_the_manifest_is_put_last_and_only_whole(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    put = UrlPath.write_bytes
    store = CheckpointStore(url)
    store.claim()
    monkeypatch.setattr(UrlPath, "write_bytes", lambda self, data: (seen.append(files_of(self.parent)), put(self, data))[1])
    info = save(store, 1)
    assert seen == [[name for name in files_of(info.path) if name != "manifest.json"]]


@pytest.mark.parametrize("last", [1, 2, 3])
def test_a_save_that_breaks_off_leaves_no_checkpoint(last: int, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the first file, the second, and the manifest; as after a kill, nothing is cleared up."""
    store = CheckpointStore(url)
    save(store, 1)
    count = itertools.count(1)

    def breaks(method: Any) -> Any:
        def maybe(*arguments: Any, **options: Any) -> Any:
            if next(count) >= last:
                raise OSError("the network is gone")
            return method(*arguments, **options)

        return maybe

    with monkeypatch.context() as patch:
        fs = type(fsspec.filesystem("memory"))
        patch.setattr(fs, "open", breaks(fs.open))
        patch.setattr(fs, "pipe_file", breaks(fs.pipe_file))
        patch.setattr(UrlPath, "remove_all", lambda self: None)
        with pytest.raises(CheckpointError, match="the network is gone"):
            save(store, 2)
    again = CheckpointStore(url)
    assert again.latest().step == 1  # type: ignore[union-attr]
    assert save(again, 2).path.name == "step-00000002"
    assert [info.step for info in again.list()] == [1, 2]
    assert again.verify(2) == []


def test_what_a_killed_save_left_is_cleared_by_the_next(url: str) -> None:
    store = CheckpointStore(url)
    left = store.root / "step-00000007"
    (left / "shard-00000-of-00001.safetensors").write_bytes(b"half")
    assert store.list() == []
    save(store, 1)
    assert not left.exists()


def test_a_step_that_is_saved_again_takes_the_place_of_the_old_one(url: str) -> None:
    store = CheckpointStore(url)
    save(store, 1)
    assert save(store, 1).path.name == "step-00000001.2"
    assert [info.path.name for info in store.list()] == ["step-00000001.2"]


def test_prune_and_remove_take_the_manifest_first(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = CheckpointStore(url)
    for step in (1, 2, 3):
        save(store, step)
    assert store.prune(Keep(last=2)) == [1]
    assert not (store.root / "step-00000001").exists()
    monkeypatch.setattr(UrlPath, "remove_all", lambda self: None)  # a kill in between
    assert store.remove([2]) == []
    assert [info.step for info in CheckpointStore(url).list()] == [3]


def test_damage_is_named_and_the_earlier_one_used(url: str) -> None:
    store = CheckpointStore(url)
    for step in (1, 2):
        save(store, step)
    broken = store.root / "step-00000002" / "shard-00000-of-00001.safetensors"
    data = bytearray(broken.read_bytes())
    data[-1] ^= 1
    broken.write_bytes(bytes(data))
    info = CheckpointStore(url).latest()
    assert info is not None
    assert info.step == 1
    assert "crc32 mismatch" in info.notes[0]
    with store.open(2) as checkpoint, pytest.raises(CheckpointError, match=r"crc32 mismatch.*Nothing was loaded"):
        checkpoint.require_whole()
    for cut in (b"", bytes(data[:100])):
        broken.write_bytes(cut)
        assert "the manifest says" in store.verify(2)[0]
    broken.unlink()
    assert "is missing" in store.verify(2)[0]


def test_a_save_beside_the_training_goes_there_too(url: str) -> None:
    store = CheckpointStore(url)
    weight = torch.ones(10)
    handle = store.save(1, {"w": weight}, {}, wait=False)
    weight.zero_()
    assert handle.wait().step == 1
    with store.open(1) as checkpoint:
        assert torch.equal(checkpoint.tensor("w"), torch.ones(10))


def test_there_is_no_such_checkpoint_says_what_there_is(url: str) -> None:
    store = CheckpointStore(url)
    with pytest.raises(CheckpointError, match=r"step 5 .*There is none in memory://"):
        store.open(5)
    save(store, 1)
    with pytest.raises(CheckpointError, match="There are: step-00000001"):
        store.open(5)
    with pytest.raises(CheckpointError, match="it holds checkpoints"):
        store.open(url)


def test_a_protocol_that_nobody_knows_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"floppy://a: .*Expected a path, or a URL that fsspec knows: memory://"):
        CheckpointStore("floppy://a")


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(MissingDependency, match=r"s3://bucket/run: .*s3fs"):
        CheckpointStore("s3://bucket/run")
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(MissingDependency, match="pip install fsspec"):
        CheckpointStore("memory://run")


def test_a_url_is_never_taken_for_a_local_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save(CheckpointStore("memory://not-here"), 1)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ConfigError, match="is no local path"):
        os.fspath(path_of("memory://not-here"))


def _two_ranks_save(root: str) -> list[Any]:
    from drivetrain.strategies.world import World

    world = World.start()
    store = CheckpointStore(root, world)
    try:
        store.save(1, {"a": torch.ones(4), "b": torch.ones(4)}, {})
        return []
    except CheckpointError as error:
        return [str(error)]
    finally:
        world.stop()


def test_ranks_that_do_not_see_one_place_are_told(ranks: Any) -> None:
    """Memory is each process' own: rank 0 misses what rank 1 wrote."""
    found = ranks(2, _two_ranks_save, "memory://apart")
    assert all("All ranks must see one folder" in told[0] for told in found)


def owner_of(store: CheckpointStore) -> Any:
    return json.loads((store.root / ".owner.json").read_bytes())


def taken_by_another(store: CheckpointStore, **told: Any) -> None:
    (store.root / ".owner.json").write_bytes(json.dumps(owner_of(store) | {"word": "another"} | told).encode())


def began(process: int) -> str:
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19]


def test_a_run_whose_folder_another_one_took_is_refused_before_it_writes(url: str) -> None:
    """The other one is on another machine: a job that was started again while the first still hung."""
    store = CheckpointStore(url)
    store.claim()
    save(store, 1)
    taken_by_another(store, host="node7", process=12)
    before = files_of(store.root)
    with pytest.raises(
        CheckpointError, match=r"belongs to process 12 on node7 .since .* end one of them, or give it another name"
    ):
        save(store, 2)
    with pytest.raises(CheckpointError, match="belongs to process 12 on node7"):
        save(CheckpointStore(url), 2)  # another store of this process is no way around
    assert files_of(store.root) == before
    store.claim()  # asked for by name, it is ours again
    save(store, 3)
    assert owner_of(store)["process"] == os.getpid()


def test_a_run_that_loses_its_folder_within_a_save_does_not_commit(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = CheckpointStore(url)
    save(store, 1)
    write = UrlSink.finish

    def takes(self: Any) -> None:
        write(self)
        taken_by_another(store, host="node7")

    monkeypatch.setattr(UrlSink, "finish", takes)
    with pytest.raises(CheckpointError, match="on node7"):
        save(store, 2)
    assert [info.step for info in store.list()] == [1]


def test_a_process_of_this_machine_keeps_its_folder_as_long_as_it_lives(url: str) -> None:
    store = CheckpointStore(url)
    save(store, 1)
    parent = os.getppid()
    taken_by_another(store, process=parent, began=began(parent))
    with pytest.raises(
        CheckpointError, match=f"process {parent} on .* is saving checkpoints in memory://.* End it, or give this run"
    ):
        store.claim()
    taken_by_another(store, process=parent, began="1")  # another process had this number
    store.claim()
    assert owner_of(store)["process"] == os.getpid()


def test_a_run_that_ended_leaves_the_folder_to_others(url: str) -> None:
    store = CheckpointStore(url)
    store.claim()
    save(store, 1)
    store.unclaim()
    assert owner_of(store)["ended"]
    taken_by_another(store, process=os.getppid(), began=began(os.getppid()))  # alive, and done with it
    save(store, 2)
    assert [info.step for info in store.list()] == [1, 2]
