"""Several processes save and look together: each tensor is written once, one outcome on all ranks, whichever rank fails."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import random
import re
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from drivetrain.strategies.checkpoint import Checkpoint, CheckpointStore, Keep, Shard, layout
from drivetrain.strategies.checkpoint.divide import Unit, divide
from drivetrain.strategies.checkpoint.layout import check_cover
from drivetrain.strategies.errors import CheckpointError, ConfigError
from drivetrain.strategies.world import World

Action = Callable[..., Any]


def with_world(action: Action, *args: Any) -> Any:
    world = World.start("cpu")
    try:
        return action(world, *args)
    finally:
        world.stop()


def save_like_ddp(world: World, root: Path, step: int) -> tuple[str, int]:
    """Every rank holds the same eight tensors, and its own random state."""
    tensors = {f"w{i}": torch.full((100 * (i + 1),), float(step)) for i in range(8)} | {"tied": torch.zeros(1)}
    tensors["same"] = tensors["tied"]
    info = CheckpointStore(root, world).save(
        step,
        tensors,
        {"optimizer": {"step": torch.tensor(step)}},
        rank_values={"position": world.rank * 10},
        rank_tensors={"rng": torch.full((5,), world.rank)},
        meta={"step": step},
    )
    return str(info.path), info.num_bytes


def save_steps(world: World, root: Path, steps: range) -> None:
    for step in steps:
        save_like_ddp(world, root, step)


@pytest.mark.parametrize("n", [2, 4])
def test_what_all_ranks_hold_is_written_once_and_evenly(n: int, ranks: Any, tmp_path: Path) -> None:
    told = ranks(n, with_world, save_like_ddp, tmp_path, 3)
    assert len(set(told)) == 1
    with Checkpoint(told[0][0]) as checkpoint:
        assert checkpoint.world_size == n
        written = Counter(piece["file"] for entry in checkpoint.manifest["tensors"].values() for piece in entry["pieces"])
        assert sum(written.values()) == 8 + 1 + 1
        sizes = [entry["bytes"] for name, entry in checkpoint.manifest["files"].items() if name.startswith("shard")]
        assert len(sizes) == n
        assert max(sizes) < 1.5 * min(sizes)
        for i in range(8):
            assert torch.equal(checkpoint.tensor(f"w{i}"), torch.full((100 * (i + 1),), 3.0))
        assert checkpoint.aliases == {"same": "tied"}
        assert checkpoint.value("optimizer")["step"] == 3
        for rank in range(n):
            assert checkpoint.rank_value("position", rank) == rank * 10
            assert torch.equal(checkpoint.rank_tensor("rng", rank), torch.full((5,), rank))
    assert CheckpointStore(tmp_path).verify(told[0][0]) == []


def save_shards(world: World, root: Path) -> str:
    """Rows over the ranks, as fsdp cuts them (the last rank may be empty); a grid, as fsdp with tp; a replica on two ranks."""
    r, n = world.rank, world.size
    whole = torch.arange(7 * 6).reshape(7, 6).float()
    rows = whole.tensor_split(n)
    first = sum(len(part) for part in rows[:r])
    few = torch.arange(3).split(1)
    tensors = {
        "rows": Shard(rows[r], (first, 0), (7, 6)),
        "few": Shard(few[r] if r < 3 else torch.empty(0, dtype=torch.int64), (min(r, 3),), (3,)),
        "grid": Shard(whole[(r // 2) * 4 : (r // 2) * 4 + 4, (r % 2) * 3 : (r % 2) * 3 + 3], (r // 2 * 4, r % 2 * 3), (7, 6)),
        "replicated": Shard(whole[:, (r % 2) * 3 : (r % 2) * 3 + 3], (0, r % 2 * 3), (7, 6)),
        "full": torch.ones(5),
        f"stage{r}": torch.full((3,), float(r)),
    }
    return str(CheckpointStore(root, world).save(1, tensors, {}).path)


def test_shards_of_any_cut_are_one_tensor_when_read(ranks: Any, tmp_path: Path) -> None:
    path = ranks(4, with_world, save_shards, tmp_path)[0]
    whole = torch.arange(7 * 6).reshape(7, 6).float()
    with Checkpoint(path) as checkpoint:
        pieces = {name: len(entry["pieces"]) for name, entry in checkpoint.manifest["tensors"].items()}
        assert pieces == {"rows": 4, "few": 3, "grid": 4, "replicated": 2, "full": 1} | {f"stage{r}": 1 for r in range(4)}
        for name in ("rows", "grid", "replicated"):
            assert torch.equal(checkpoint.tensor(name), whole)
            generator = random.Random(1)
            for _ in range(60):  # what a rank of some other cut asks for
                offset = [generator.randrange(7), generator.randrange(6)]
                shape = [generator.randint(0, 7 - offset[0]), generator.randint(0, 6 - offset[1])]
                expected = whole[offset[0] : offset[0] + shape[0], offset[1] : offset[1] + shape[1]]
                assert torch.equal(checkpoint.tensor(name, offset=offset, shape=shape), expected)
        assert torch.equal(checkpoint.tensor("few"), torch.arange(3))
        assert [int(checkpoint.tensor(f"stage{r}")[0]) for r in range(4)] == [0, 1, 2, 3]


def fails_on_one(world: World, root: Path, what: str, rank: int) -> list[str]:
    """Try to save step 2 while something is wrong on one rank; then save step 3. Return what each rank was told."""
    saver = CheckpointStore(root, world)
    weights = {"w": torch.ones(100), "v": torch.ones(90)}
    saver.save(1, weights, {})
    here = world.rank == rank
    tensors = dict(weights)
    rank_values: dict[str, Any] = {"r": print} if what == "value" and here else {"r": 1}
    if what == "shape" and here:
        tensors["w"] = torch.ones(50)
    real = os.write

    def refuse(*args: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if what == "disk" and here:
        os.write = refuse
    try:
        saver.save(2, tensors, {}, rank_values=rank_values)
        text = "saved"
    except (CheckpointError, ConfigError) as error:
        text = f"{type(error).__name__}: {error}"
    finally:
        os.write = real
    left = sorted(p.name for p in root.iterdir()) if world.is_main else []
    world.barrier()
    saver.save(3, weights, {})
    return [text, *left]


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("disk", r"CheckpointError: \[rank {rank}/2\] Saving step 2 .*No space left on device(.|\n)*Nothing was committed"),
        ("value", r"ConfigError: \[rank {rank}/2\] Saving step 2 .*r: function"),
        ("shape", r"ConfigError: .*Ranks disagree about the tensor 'w'"),
    ],
)
def test_what_goes_wrong_on_one_rank_is_raised_on_all_and_nothing_stays(
    what: str, message: str, rank: int, ranks: Any, tmp_path: Path
) -> None:
    told = ranks(2, with_world, fails_on_one, tmp_path, what, rank)
    assert told[0][0].partition("]")[2] == told[1][0].partition("]")[2]
    for text, *_ in told:
        assert re.match(message.replace("{rank}", str(rank)), text), text
    assert told[0][1:] == [".lock", "step-00000001"]
    assert [info.step for info in CheckpointStore(tmp_path).list()] == [1, 3]
    assert CheckpointStore(tmp_path).verify(3) == []


def look_and_prune(world: World, root: Path) -> Any:
    saver = CheckpointStore(root, world)
    latest = saver.latest()
    assert latest is not None
    with saver.open(latest.path):
        pass
    saver.protect(1)
    gone = saver.prune(Keep(last=1))
    return latest.step, latest.notes, gone, [info.step for info in saver.list()]


def test_ranks_agree_on_the_newest_whole_one_and_on_what_is_deleted(ranks: Any, tmp_path: Path) -> None:
    """The damaged file is one that rank 1 looks at."""
    ranks(2, with_world, save_steps, tmp_path, range(1, 6))
    shard = tmp_path / "step-00000005" / "shard-00001-of-00002.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    (tmp_path / "step-00000004" / "values.json").unlink()
    told = ranks(2, with_world, look_and_prune, tmp_path)
    assert told[0] == told[1]
    step, notes, gone, left = told[0]
    assert step == 3
    assert [note.split(" ")[0] for note in notes] == ["step-00000005", "step-00000004"]
    assert gone == [2, 4]
    assert left == [1, 3, 5]


def none_is_whole(world: World, root: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        CheckpointStore(root, world).latest()
    return str(error.value)


def test_every_rank_is_told_when_none_is_whole(ranks: Any, tmp_path: Path) -> None:
    ranks(2, with_world, save_like_ddp, tmp_path, 1)
    (tmp_path / "step-00000001" / "values-00001.json").write_text("")
    told = ranks(2, with_world, none_is_whole, tmp_path)
    assert told[0] == told[1]
    assert "values-00001.json has 0 bytes" in told[0]


# -- kills ----------------------------------------------------------------------------------------------------------------
def killed_at(world: World, root: Path, victim: int, k: int) -> None:
    """Save step 2 while rank `victim` is killed at its k-th call that changes the disk; without a kill, go on to 3."""
    saver = CheckpointStore(root, world)
    count = 0

    def call(name: str, real: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        nonlocal count
        if name != "open" or args[1] & (os.O_WRONLY | os.O_RDWR):
            count += 1
            if count == k:
                os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)

    if world.rank == victim:
        for name in ("open", "write", "fsync", "rename", "mkdir", "unlink", "rmdir"):
            setattr(os, name, functools.partial(call, name, getattr(os, name)))
    saver.save(2, {f"w{i}": torch.full((10,), 2.0) for i in range(4)}, {"step": 2}, rank_values={"step": 2})


def kill_every_call(ranks: Any, root: Path, victim: int, points: range) -> int:
    CheckpointStore(root).save(1, {f"w{i}": torch.full((10,), 1.0) for i in range(4)}, {"step": 1})
    kills = 0
    for k in points:
        with contextlib.suppress(Exception):
            ranks(2, with_world, killed_at, root, victim, k, timeout=20)
            return kills
        kills += 1
        latest = CheckpointStore(root).latest()
        assert latest is not None
        assert latest.notes == ()
        with Checkpoint(latest.path) as checkpoint:
            seen = {checkpoint.value("step")} | {int(v) for name in checkpoint.names() for v in checkpoint.tensor(name)}
        assert seen == {latest.step}
    return kills


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_is_killed_in_a_save_leaves_whole_checkpoints(victim: int, ranks: Any, tmp_path: Path) -> None:
    assert kill_every_call(ranks, tmp_path, victim, range(2, 9, 3)) == 3


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_is_killed_at_any_call_leaves_whole_checkpoints(victim: int, ranks: Any, tmp_path: Path) -> None:
    assert kill_every_call(ranks, tmp_path, victim, range(1, 60)) >= (15 if victim == 0 else 6)


# -- dividing the work ----------------------------------------------------------------------------------------------------
def unit(name: str, size: int, offset: int = 0, full: int | None = None) -> Unit:
    return Unit(name, "float32", (full or size,), (offset,), (size,))


def test_work_is_divided_the_same_way_everywhere_and_to_holders_only() -> None:
    units = [unit(f"w{i}", size) for i, size in enumerate([100, 90, 50, 40, 30, 10])]
    forward = divide(dict.fromkeys(units, (0, 1)), 2)
    assert forward == divide(dict.fromkeys(reversed(units), (0, 1)), 2)
    loads = [sum(u.num_bytes for u, rank in forward.items() if rank == r) // 4 for r in (0, 1)]
    assert loads == [170, 150]  # the biggest first, to who has the least
    assert divide({units[0]: (1,), units[1]: (1, 2), units[2]: (2,)}, 4) == {units[0]: 1, units[1]: 2, units[2]: 2}
    with pytest.raises(ConfigError, match="Ranks disagree about the tensor 'w'"):
        divide({unit("w", 3): (0,), unit("w", 4): (1,)}, 2)


@pytest.mark.parametrize(
    ("shape", "pieces", "fault"),
    [
        ((4,), [((0,), (2,)), ((2,), (2,))], None),
        ((), [((), ())], None),
        ((0, 3), [((0, 0), (0, 3))], None),
        ((2, 2), [((0, 0), (1, 2)), ((1, 0), (1, 1)), ((1, 1), (1, 1))], None),
        ((4,), [((0,), (2,))], "hold 2 of 4"),
        ((4,), [], "hold 0 of 4"),
        ((4,), [((0,), (2,)), ((1,), (2,))], "overlap"),
        ((4,), [((0,), (2,)), ((3,), (2,))], "outside"),
        ((2, 2), [((0, 0), (2, 1)), ((0, 0), (2, 1))], "overlap"),
        ((2, 3), [((0, 0), (2, 2)), ((0, 1), (2, 1))], "overlap"),
    ],
)
def test_pieces_must_tile_their_tensor(shape: tuple[int, ...], pieces: list[Any], fault: str | None) -> None:
    found = check_cover("w", shape, pieces)
    assert (found is None) == (fault is None)
    assert fault is None or fault in str(found)


def test_thousands_of_pieces_are_checked_in_no_time() -> None:
    """Linear for a cut along dimension 0: 20,000 pieces in under a second of calls, where pairs would be 2e8."""
    assert check_cover("w", (20_000, 3), [((i, 0), (1, 3)) for i in range(20_000)]) is None
    assert layout.count((2**40, 2**40)) == 2**80
