"""World: collectives give what one process would compute, one node listens on loopback only, and faults have names."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from drivetrain.strategies.errors import ConfigError, DistributedError, UnknownName
from drivetrain.strategies.world import World


def collectives_of_all_kinds() -> dict[str, Any]:
    world = World.start("cpu", timeout_s=30)
    mine = torch.arange(3, dtype=torch.float64) + 10 * world.rank
    before = mine.clone()
    result = {
        "sum": world.all_reduce(mine).tolist(),
        "mean": world.all_reduce(mine, "mean").tolist(),
        "max": world.all_reduce(mine, "max").tolist(),
        "min": world.all_reduce(mine.int(), "min").tolist(),
        "any": world.all_reduce(torch.tensor([world.rank == 1, False]), "max").tolist(),
        "half": world.all_reduce(torch.ones(2, dtype=torch.bfloat16)).tolist(),
        "transposed": world.all_reduce(torch.arange(4.0).view(2, 2).t()).tolist(),
        "gather": world.all_gather(mine[: 1 + world.rank]).tolist(),
        "gather_rows": world.all_gather(torch.full((world.rank, 2), world.rank)).tolist(),
        "gather_scalar": world.all_gather(torch.tensor(world.rank)).tolist(),
        "gather_none": list(world.all_gather(torch.empty(0, 3)).shape),
        "gather_bool": world.all_gather(torch.tensor([world.rank == 1])).tolist(),
        "broadcast": world.broadcast(mine, src=2).tolist(),
        "broadcast_json": world.broadcast_json({"rank": world.rank, "text": "ü" * world.rank}, src=1),
        "gather_json": world.gather_json(["x" * world.rank, None, 0.1]),
        "broadcast_object": world.broadcast_object({world.rank}, src=2),
        "gather_object": world.gather_object(slice(world.rank)),
        "backend": world.backend,
        "unchanged": bool((mine == before).all()),
    }
    world.barrier()
    world.stop()
    world.stop()
    result["group_is_gone"] = not dist.is_initialized()
    return result


def test_collectives_on_three_ranks_give_the_numbers_computed_by_hand(ranks: Any) -> None:
    expected = {
        "sum": [30.0, 33.0, 36.0],
        "mean": [10.0, 11.0, 12.0],
        "max": [20.0, 21.0, 22.0],
        "min": [0, 1, 2],
        "any": [True, False],
        "half": [3.0, 3.0],
        "transposed": [[0.0, 6.0], [3.0, 9.0]],
        "gather": [0.0, 10.0, 11.0, 20.0, 21.0, 22.0],
        "gather_rows": [[1, 1], [2, 2], [2, 2]],
        "gather_scalar": [0, 1, 2],
        "gather_none": [0, 3],
        "gather_bool": [False, True, False],
        "broadcast": [20.0, 21.0, 22.0],
        "broadcast_json": {"rank": 1, "text": "ü"},
        "gather_json": [["", None, 0.1], ["x", None, 0.1], ["xx", None, 0.1]],
        "broadcast_object": {2},
        "gather_object": [slice(0), slice(1), slice(2)],
        "backend": "gloo",
        "unchanged": True,
        "group_is_gone": True,
    }
    assert ranks(3, collectives_of_all_kinds) == [expected] * 3


def different_shapes() -> str:
    world = World.start("cpu", timeout_s=30)
    try:
        world.all_gather(torch.zeros(2, 3 + world.rank))
    except DistributedError as error:
        return str(error)
    return "nothing was raised"


def test_shapes_that_differ_beyond_dim_0_are_named_on_every_rank(ranks: Any) -> None:
    for message in ranks(2, different_shapes):
        assert "rank 0: (2, 3) torch.float32; rank 1: (2, 4) torch.float32" in message


def listeners() -> list[tuple[str, str]]:
    """Return (address, port) in hexadecimal of every listening TCP socket of this process."""
    mine = set()
    for fd in Path("/proc/self/fd").iterdir():
        try:
            target = os.readlink(fd)
        except FileNotFoundError:
            continue
        if target.startswith("socket:["):
            mine.add(target[8:-1])
    found = []
    for table in ("/proc/self/net/tcp", "/proc/self/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in mine:
                address, port = fields[1].split(":")
                found.append((address, port))
    return found


def start_and_list_listeners(master: str) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    os.environ["MASTER_ADDR"] = socket.gethostname() if master == "the host's name" else master
    os.environ.pop("GLOO_SOCKET_IFNAME", None)  # the fixture sets it
    # The fixture's processes are forked: only what opens here counts.
    before = listeners()
    world = World.start("cpu", timeout_s=30)
    world.all_reduce(torch.ones(4))
    world.new_group([0, 1])
    during = [entry for entry in listeners() if entry not in before]
    world.barrier()
    world.stop()
    assert "GLOO_SOCKET_IFNAME" not in os.environ
    return during, before


@pytest.mark.skipif(not Path("/proc/self/net/tcp").exists(), reason="waits for /proc/net: Linux only")
@pytest.mark.parametrize("master", ["127.0.0.1", "the host's name"])
def test_one_node_listens_on_loopback_only_by_whatever_name_it_goes(master: str, ranks: Any) -> None:
    results = ranks(2, start_and_list_listeners, master)
    assert results[0][0], "rank 0 hosts the store: the test would see nothing if it could not look"
    for during, _ in results:
        assert {address for address, _ in during} <= {"0100007F"}


def join_and_leave_alive() -> tuple[bool, float, bool]:
    dist.init_process_group("gloo")
    world = World.start("cpu")
    total = float(world.all_reduce(torch.ones(())))
    world.stop()
    alive = dist.is_initialized()
    dist.destroy_process_group()
    return alive, total, world.is_last


def test_an_existing_default_group_is_joined_and_left_alive(ranks: Any) -> None:
    assert ranks(2, join_and_leave_alive) == [(True, 2.0, False), (True, 2.0, True)]


def start_twice() -> list[float]:
    totals = []
    for _ in range(2):
        world = World.start("cpu", timeout_s=30)
        totals.append(float(world.all_reduce(torch.ones(()))))
        world.stop()
    return totals


def test_a_second_world_in_the_same_process_meets_the_others_again(ranks: Any) -> None:
    assert ranks(2, start_twice) == [[2.0, 2.0]] * 2


def start_without_rank_one() -> str:
    if os.environ["RANK"] == "1":
        time.sleep(3)
        return ""
    try:
        World.start("cpu", timeout_s=1)
    except DistributedError as error:
        return str(error)
    return "nothing was raised"


FORKS = """
import os, sys, torch
from drivetrain.strategies.world import World
torch.set_num_threads(1)
world = World.start("cpu", need_group=True)
child = os.fork()
if child == 0:
    sys.exit(3)  # not os._exit: the interpreter's end, with all that it runs and destroys
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), world.all_reduce(torch.ones(2)).tolist())
"""


@pytest.mark.slow
def test_a_fork_ends_with_its_own_code_and_leaves_the_groups_to_its_parent() -> None:
    """Their threads stayed there; destroying a group in the fork crashed it, and the interpreter's end would hang."""
    ended = subprocess.run([sys.executable, "-c", FORKS], capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "3 [1.0, 1.0]\n", "")


def test_a_rank_that_never_comes_is_named(ranks: Any) -> None:
    message = ranks(2, start_without_rank_one)[0]
    assert message.startswith("[rank 0/2] met no rank 1 at 127.0.0.1:")
    assert "Expected all 2" in message


def start_on_a_taken_port() -> str:
    if os.environ["RANK"] == "1":
        return ""
    taken = socket.socket()
    taken.bind(("127.0.0.1", int(os.environ["MASTER_PORT"])))
    taken.listen()
    try:
        World.start("cpu", timeout_s=1)
    except DistributedError as error:
        return str(error)
    return "nothing was raised"


def on_an_interface_that_is_not_there() -> str:
    os.environ["GLOO_SOCKET_IFNAME"] = "loo"
    with pytest.raises(ConfigError) as told:
        World.start("cpu", timeout_s=5)
    return str(told.value)


def test_an_interface_that_is_not_there_is_named_with_those_that_are(ranks: Any) -> None:
    for told in ranks(2, on_an_interface_that_is_not_there):
        assert "GLOO_SOCKET_IFNAME='loo': this machine" in told
        assert "Did you mean 'lo'?" in told


def without_a_name_server() -> str:
    os.environ.update(MASTER_ADDR="nowhere.invalid", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
    del os.environ["GLOO_SOCKET_IFNAME"]  # the fixture's loopback is refused for several nodes
    with pytest.raises(DistributedError) as told:
        World.start("cpu", timeout_s=1)
    return str(told.value)


def test_a_master_whose_name_nobody_knows_is_named(ranks: Any) -> None:
    """Not its port, which may be free."""
    for told in ranks(2, without_a_name_server):
        assert "No address is known for the name 'nowhere.invalid'" in told
        assert ".." not in told


def test_a_taken_port_is_named(ranks: Any) -> None:
    assert "could not listen on 127.0.0.1" in ranks(2, start_on_a_taken_port)[0]


def test_alone_there_is_no_group_and_every_collective_is_the_identity() -> None:
    world = World.start("cpu")
    tensor = torch.tensor([1.0, 2.0])
    assert not dist.is_initialized()
    assert (world.rank, world.size, world.backend, world.group()) == (0, 1, "none", None)
    assert world.is_main
    assert world.is_local_main
    assert world.is_last
    assert world.all_reduce(tensor, "mean") is tensor
    assert world.all_gather(tensor) is tensor
    assert world.all_gather(torch.tensor(3)).tolist() == [3]
    assert (world.gather_json(1), world.broadcast_json(2), world.gather_object(3)) == ([1], 2, [3])
    world.barrier()
    world.stop()


def test_one_rank_may_ask_for_a_group() -> None:
    world = World.start("cpu", need_group=True)
    assert world.backend == "gloo"
    assert dist.get_world_size() == 1
    world.stop()
    assert not dist.is_initialized()


def test_wrong_names_are_answered_with_the_right_ones() -> None:
    world = World.single()
    with pytest.raises(UnknownName, match=r"no axis 'word'\. Did you mean 'world'"):
        world.group("word")
    with pytest.raises(ConfigError, match=r"device='cdua'.*Did you mean 'cuda'"):
        World.single("cdua")


@pytest.mark.skipif(torch.accelerator.is_available(), reason="waits for a machine without accelerator")
def test_an_accelerator_that_is_not_there_is_refused_and_auto_says_why_cpu() -> None:
    with pytest.raises(ConfigError, match="device='cuda': this machine has no accelerator"):
        World.start("cuda")
    world = World.start("auto")
    assert (world.device.type, world.device_reason) == ("cpu", "no accelerator found")
