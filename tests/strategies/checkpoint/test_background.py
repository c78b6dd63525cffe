"""A save that goes on beside the training writes the state of one step, loses nothing, and never says too little."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from drivetrain.strategies.checkpoint import Checkpoint, CheckpointStore, Keep, SaveHandle, background
from drivetrain.strategies.checkpoint.background import Background, Staging
from drivetrain.strategies.checkpoint.together import Alone
from drivetrain.strategies.checkpoint.writer import TensorFile
from drivetrain.strategies.errors import CheckpointError
from drivetrain.strategies.world import World
from torch import Tensor


class Gate:
    """Holds up every write to a disk until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open = threading.Event()
        self.writes = 0
        real = os.write

        def write(*args: Any) -> int:
            self.writes += 1
            assert self.open.wait(30)
            return real(*args)

        monkeypatch.setattr(os, "write", write)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    found = Gate(monkeypatch)
    yield found
    found.open.set()


def save(saver: CheckpointStore, step: int, **options: Any) -> SaveHandle:
    tensors = {"w": torch.full((1000,), float(step)), "v": torch.full((70, 3), float(step)).t()}
    return saver.save(step, tensors, {"step": step}, rank_values={"step": step}, wait=False, **options)


def test_what_is_written_is_the_state_at_the_call_whatever_changes_afterwards(tmp_path: Path, gate: Gate) -> None:
    """Tensors, tensors within values, and plain values: none of them is looked at again after `save` has returned."""
    saver = CheckpointStore(tmp_path)
    weights, inner = torch.ones(10_000), torch.ones(5)
    values: dict[str, Any] = {"list": [1, {"inner": inner, "n": 1}]}
    own = {"rng": torch.ones(3)}
    meta = {"metrics": {"loss": 1.0}}
    handle = saver.save(1, {"w": weights}, values, rank_tensors=own, rank_values={"own": values}, meta=meta, wait=False)
    weights += 1
    inner += 1
    own["rng"] += 1
    values["list"][1]["n"] = 2
    values["list"].append(2)
    meta["metrics"]["loss"] = 2.0
    assert (handle.done, handle.path, handle.failed) == (False, None, False)
    assert saver.list() == []
    gate.open.set()
    info = handle.wait()
    assert (handle.done, handle.path, info.step, info.meta["metrics"]) == (True, info.path, 1, {"loss": 1.0})
    with saver.open(1) as checkpoint:
        assert torch.equal(checkpoint.tensor("w"), torch.ones(10_000))
        assert torch.equal(checkpoint.rank_tensor("rng", 0), torch.ones(3))
        for value in (checkpoint.value("list"), checkpoint.rank_value("own", 0)["list"]):
            assert torch.equal(value[1].pop("inner"), torch.ones(5))
            assert value == [1, {"n": 1}]


def test_one_save_is_under_way_and_the_next_one_waits_for_it(tmp_path: Path, gate: Gate) -> None:
    """Back-pressure: the copy of the first is not overwritten before it is on the disk. So in another folder too."""
    world = Alone()
    saver, other = CheckpointStore(tmp_path / "a", world), CheckpointStore(tmp_path / "b", world)
    first = save(saver, 1)
    threading.Timer(0.2, gate.open.set).start()
    second = save(other, 2)
    assert first.done
    assert saver.verify(1) == []
    second.wait()
    save(saver, 3)
    assert saver.latest() is not None  # waits, too
    assert [info.step for info in saver.list()] == [1, 3]
    assert saver.save(4, {}, {}).step == 4  # and one that is waited for


def test_the_memory_for_the_copy_is_taken_once(tmp_path: Path) -> None:
    world = Alone()
    saver = CheckpointStore(tmp_path, world)
    staging = Background.of(world).staging
    for step in range(1, 4):
        save(saver, step).wait()
        assert staging.num_bytes == 4000 + 840
        pointers = [block.data_ptr() for block in staging._blocks]
        save(CheckpointStore(tmp_path / "other", world), step).wait()
        assert [block.data_ptr() for block in staging._blocks] == pointers


def test_the_copy_is_the_file_byte_for_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over the ends of blocks, for tensors of every kind, also when the state grows and shrinks between saves."""
    monkeypatch.setattr(background, "BLOCK", 1000)
    staging = Staging()
    for n, size in enumerate((300, 7000, 10, 0, 9000)):
        tensors = {"a": torch.randn(size), "b": torch.randn(20, 30).t(), "c": torch.rand(size) > 0.5, "d": torch.tensor(1.0)}
        file = TensorFile(tensors)
        file.write(tmp_path / str(n))
        assert b"".join(bytes(part) for part in staging.take(file)) == (tmp_path / str(n)).read_bytes()


def test_training_tensors_are_let_go_of_once_they_are_copied(tmp_path: Path, gate: Gate) -> None:
    """At most one copy beside the training's own: what the training frees meanwhile is free."""
    import weakref

    tensor = torch.ones(10)
    alive = weakref.ref(tensor.untyped_storage())
    handle = CheckpointStore(tmp_path).save(1, {"w": tensor}, {"v": tensor}, rank_tensors={"r": tensor}, wait=False)
    del tensor
    assert alive() is None
    gate.open.set()
    handle.wait()


# -- what goes wrong ------------------------------------------------------------------------------------------------------
def refuse(*args: Any) -> int:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_an_error_of_the_writer_is_raised_by_the_next_save_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saver = CheckpointStore(tmp_path)
    save(saver, 1).wait()
    told = threading.Event()
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", refuse)
        handle = save(saver, 2, on_failure=told.set)
        assert told.wait(10)
    assert (handle.done, handle.failed, handle.path) == (True, True, None)
    with pytest.raises(CheckpointError, match=r"Saving step 2 .*No space left(.|\n)*Nothing was committed"):
        save(saver, 3)
    assert [info.step for info in saver.list()] == [1]
    assert save(saver, 3).wait().step == 3
    with pytest.raises(CheckpointError, match="Saving step 2"):
        handle.wait()


@pytest.mark.parametrize("how", ["wait", "settle"])
def test_an_error_that_somebody_was_told_of_is_not_raised_again(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saver = CheckpointStore(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", refuse)
        handle = save(saver, 2)
        with pytest.raises(CheckpointError, match="Saving step 2"):
            handle.wait() if how == "wait" else saver.settle()
    assert saver.latest() is None
    assert save(saver, 2).wait().step == 2


PROGRAM = """
import os, sys, torch
from drivetrain.strategies.checkpoint import CheckpointStore
saver = CheckpointStore(sys.argv[1])
saver.save(1, {"w": torch.ones(3_000_000)}, {}, wait=False)
if sys.argv[2] == "fails":
    real = os.write
    os.write = lambda fd, data: real(fd, data) if fd < 3 else 1 / 0
"""


def test_a_program_that_ends_without_waiting_has_saved(tmp_path: Path) -> None:
    run = subprocess.run([sys.executable, "-c", PROGRAM, tmp_path, "ends"], capture_output=True, text=True, check=True)
    assert (run.stdout, run.stderr) == ("", "")
    assert [info.step for info in CheckpointStore(tmp_path).list()] == [1]
    assert CheckpointStore(tmp_path).verify(1) == []


def test_an_error_that_nobody_asked_for_is_told_when_the_program_ends(tmp_path: Path) -> None:
    program = PROGRAM.replace("saver.save(", "if sys.argv[2] == 'fails': os.write = lambda *a: 1 / 0\nsaver.save(")
    run = subprocess.run([sys.executable, "-c", program, tmp_path, "fails"], capture_output=True, text=True, check=True)
    assert "drivetrain: Saving step 1 in" in run.stderr
    assert "ZeroDivisionError" in run.stderr


def test_what_was_to_be_removed_goes_after_the_commit_and_stays_when_there_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gate: Gate
) -> None:
    gate.open.set()
    saver = CheckpointStore(tmp_path)
    for step in (1, 2, 3):
        save(saver, step).wait()
    saver.protect(2)
    gate.open.clear()
    handle = save(saver, 4, remove=[1, 2, 4, 77])
    time.sleep(0.05)
    assert [info.step for info in saver.list()] == [1, 2, 3]
    gate.open.set()
    handle.wait()
    assert [info.step for info in saver.list()] == [2, 3, 4]
    monkeypatch.setattr(os, "write", refuse)
    with pytest.raises(CheckpointError, match="No space left"):
        save(saver, 5, remove=[3]).wait()
    assert [info.step for info in saver.list()] == [2, 3, 4]


# -- kills ----------------------------------------------------------------------------------------------------------------
def train_and_save(root: Path, told: int) -> None:
    """Change the weights without a pause, save every few changes, keep two: until the kill."""
    saver = CheckpointStore(root)
    newest = saver.latest()
    step = newest.step if newest else 0
    weights = {f"w{i}": torch.full((500_000,), float(step)) for i in range(3)}
    handle: SaveHandle | None = None
    os.pwrite(told, struct.pack("q", 1), 8)
    while True:
        step += 1
        for w in weights.values():
            w += 1
        if step % 2 == 0:
            if handle is not None:
                os.pwrite(told, struct.pack("q", handle.wait().step), 0)
            old = [info.step for info in saver.list()][:-1]
            handle = saver.save(step, weights, {"step": step}, meta={"step": step}, remove=old, wait=False)


def saving(root: Path) -> bool:
    return root.exists() and any(p.name.startswith(".tmp-step") for p in root.iterdir())


def random_kills(root: Path, kills: int, seed: int) -> int:
    generator = random.Random(seed)
    told = os.open(root.parent / "told", os.O_RDWR | os.O_CREAT)
    os.pwrite(told, struct.pack("qq", 0, 0), 0)  # the last save that was over, and whether the process has begun
    half_written = 0
    for n in range(kills):
        os.pwrite(told, struct.pack("q", 0), 8)
        pid = os.fork()
        if pid == 0:
            with contextlib.suppress(BaseException):
                train_and_save(root, told)
            os._exit(1)
        while not struct.unpack("q", os.pread(told, 8, 8))[0]:
            time.sleep(0.001)
        time.sleep(generator.uniform(0, 0.05))
        while n % 2 and not saving(root):  # every other one is to fall into a save
            time.sleep(0.0005)
        time.sleep(generator.uniform(0, 0.01))
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL
        half_written += saving(root)
        over = struct.unpack("q", os.pread(told, 8, 0))[0]
        saver = CheckpointStore(root)
        latest = saver.latest()
        assert latest is not None or over == 0
        if latest is not None:
            assert latest.step >= over
            assert latest.notes == ()
            for info in saver.list():
                with Checkpoint(info.path) as checkpoint:
                    seen = {checkpoint.value("step"), checkpoint.meta["step"], info.step}
                    for name in checkpoint.names():
                        seen |= set(checkpoint.tensor(name).unique().tolist())
                assert seen == {info.step}, "values of different steps in one checkpoint"
    os.close(told)
    return half_written


def test_twenty_kills_of_a_training_that_saves_beside_it_lose_nothing(tmp_path: Path, capsys: Any) -> None:
    seed = 20261122
    hits = random_kills(tmp_path / "run", 20, seed)
    with capsys.disabled():
        print(f"\n[20 SIGKILLs beside the training, seed {seed}: {hits} hit a half-written save, 0 lost] ", end="")
    assert hits >= 5, "too few kills fell into a save to prove anything"


@pytest.mark.slow
def test_three_hundred_kills_of_a_training_that_saves_beside_it_lose_nothing(tmp_path: Path, capsys: Any) -> None:
    seed = time.time_ns() % 10**9
    hits = random_kills(tmp_path / "run", 300, seed)
    with capsys.disabled():
        print(f"\n[300 SIGKILLs beside the training, seed {seed}: {hits} hit a half-written save, 0 lost] ", end="")
    assert hits >= 75


# -- many ranks -----------------------------------------------------------------------------------------------------------
def trains(root: Path, failing: int | None) -> Any:
    """Save in the background while the main threads talk over both groups of the world, without a pause."""
    world = World.start("cpu")
    saver = CheckpointStore(root, world)
    weights = {f"w{i}": torch.zeros(1000 * (i + 1)) for i in range(4)}
    handles: list[SaveHandle] = []
    text = ""
    try:
        for step in range(1, 25):
            total = world.all_reduce(torch.tensor(float(world.rank + step)))
            assert float(total) == sum(r + step for r in range(world.size))
            for w in weights.values():
                w += 1
            if step % 4 == 0:
                old = [h.step for h in handles[:-1]]
                if step == 12 and world.rank == failing:
                    handles[-1].wait()  # or it might be that one that fails
                    os.write = refuse
                handles.append(saver.save(step, weights, {"step": step}, rank_values={"step": step}, remove=old, wait=False))
            for n in range(20):
                assert world.gather_json([world.rank, n]) == [[r, n] for r in range(world.size)]
        handles[-1].wait()
    except CheckpointError as error:
        text = str(error)
    infos = [info.step for info in saver.list()]
    for info in saver.list():
        with Checkpoint(info.path) as checkpoint:
            seen = {checkpoint.value("step")} | {checkpoint.rank_value("step", r) for r in range(world.size)}
            for name in checkpoint.names():
                seen |= set(checkpoint.tensor(name).unique().tolist())
        assert seen == {info.step}
    memory = Background.of(world).staging.num_bytes
    world.barrier()
    world.stop()
    return infos, memory, text


@pytest.mark.parametrize("n", [2, 4])
def test_saves_beside_the_training_do_not_meet_its_collectives(n: int, ranks: Any, tmp_path: Path) -> None:
    told = ranks(n, trains, tmp_path, None)
    assert all(answer[2] == "" for answer in told)
    assert told[0][0] == [20, 24]
    assert sum(answer[1] for answer in told) == 10_000 * 4  # each rank copies its share alone


@pytest.mark.parametrize("failing", [0, 1])
def test_an_error_of_one_ranks_writer_is_raised_on_all(failing: int, ranks: Any, tmp_path: Path) -> None:
    told = ranks(2, trains, tmp_path, failing)
    for infos, _, text in told:
        assert f"[rank {failing}/2] Saving step 12" in text
        assert "No space left" in text
        assert infos == [4, 8]


def stops_at_once(root: Path) -> list[int]:
    """Stop the world while a save is under way, then start another one in the same process."""
    steps: list[int] = []
    for step in (1, 2):
        world = World.start("cpu")
        saver = CheckpointStore(root, world)
        saver.save(step, {"w": torch.zeros(500_000)}, {}, wait=False)
        world.stop()
        steps = [info.step for info in saver.list()]
    return steps


def test_a_world_that_stops_finishes_its_save(ranks: Any, tmp_path: Path) -> None:
    assert ranks(2, stops_at_once, tmp_path) == [[1, 2], [1, 2]]


def dies_beside(root: Path, victim: int) -> str:
    """One rank is killed while it writes; the other one is told and goes on."""
    world = World.start("cpu")
    saver = CheckpointStore(root, world)
    saver.save(1, {"w": torch.zeros(10), "v": torch.zeros(10)}, {})
    if world.rank == victim:
        os.write = lambda *args: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment, misc]
    handle = saver.save(2, {"w": torch.ones(10), "v": torch.ones(10)}, {}, wait=False)
    with pytest.raises(RuntimeError, match=r"."):  # gloo's own error
        handle.wait(20)
    (root / f"told-{world.rank}").write_text("")
    os._exit(0)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_dies_in_its_writer_does_not_hang_the_other(victim: int, ranks: Any, tmp_path: Path) -> None:
    with pytest.raises(Exception, match="rank"):
        ranks(2, dies_beside, tmp_path, victim, timeout=25)
    assert (tmp_path / f"told-{1 - victim}").exists()
    assert [info.step for info in CheckpointStore(tmp_path).list()] == [1]
    # The run that takes the folder next clears what was half written, also if it saves nothing.
    if victim == 0:  # rank 1 cannot delete what rank 0 made
        assert [p.name[:18] for p in tmp_path.glob(".tmp-*")] == [".tmp-step-00000002"]
    CheckpointStore(tmp_path).claim()
    assert sorted(p.name for p in tmp_path.glob(".*")) == [".lock"]
    save(CheckpointStore(tmp_path), 3).wait()
    assert CheckpointStore(tmp_path).prune(Keep(last=1)) == [1]


def test_a_process_forked_in_a_save_leaves_it_alone(tmp_path: Path, gate: Gate) -> None:
    """As the workers of a loader are: they neither finish the save nor wait for it."""
    saver = CheckpointStore(tmp_path)
    handle = save(saver, 1)
    pid = os.fork()
    if pid == 0:
        signal.alarm(10)
        saver.join()
        saver.settle()
        os._exit(0 if threading.active_count() == 1 else 1)
    assert os.waitpid(pid, 0)[1] == 0
    gate.open.set()
    assert handle.wait().step == 1


def test_staging_is_as_big_as_the_state(tmp_path: Path) -> None:
    """No more than one copy: 64 MiB blocks, the last one just as big as what is left."""
    tensors: dict[str, Tensor] = {f"w{i}": torch.empty(3 * 2**20, dtype=torch.uint8) for i in range(50)}
    staging = Staging()
    staging.take(TensorFile(tensors))
    assert staging.num_bytes == 150 * 2**20


def test_temporary_names_of_other_programs_are_cleared_and_ones_own_are_not(tmp_path: Path, gate: Gate) -> None:
    """Two worlds of one process may save into one folder at the same time: neither clears the other's half."""
    first = save(CheckpointStore(tmp_path), 1)
    while not gate.writes:
        time.sleep(0.001)
    (tmp_path / ".tmp-step-00000009-old").mkdir()
    second = save(CheckpointStore(tmp_path), 2)
    while gate.writes < 2:
        time.sleep(0.001)
    assert len([p for p in tmp_path.iterdir() if p.name.startswith(".tmp")]) == 2
    gate.open.set()
    assert [first.wait().step, second.wait().step] == [1, 2]
    assert sorted(p.name for p in tmp_path.iterdir()) == [".lock", "step-00000001", "step-00000002"]
