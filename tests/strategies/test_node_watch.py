"""The watch between nodes: who failed is heard elsewhere, in its own words; strangers are not listened to.

Here each rank counts as a node of its own, on one loopback; tests/trainer/launch/test_nodes.py has hosts and cut lines.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from drivetrain.strategies.environment import node_timeout_s
from drivetrain.strategies.errors import ConfigError, DistributedError
from drivetrain.strategies.interfaces import Interface, choose_interface, interfaces
from drivetrain.strategies.node_watch import NodeWatch, news_of_all
from drivetrain.strategies.world import World


def a_node_each(act: Callable[[World, NodeWatch], Any]) -> Callable[[], Any]:
    """Return a function for `ranks` in which each rank thinks that it is alone on its node, and the others elsewhere."""

    def run() -> Any:
        os.environ.update(LOCAL_RANK="0", LOCAL_WORLD_SIZE="1", GROUP_RANK=os.environ["RANK"])
        world = World.start("cpu", timeout_s=60)
        watch = world._node_watch
        assert watch is not None
        try:
            return act(world, watch)
        finally:
            world.barrier()
            world.stop()

    return run


def fails(world: World, watch: NodeWatch) -> Any:
    watch.on_lost = lambda error: None
    if world.rank == 1:
        watch.tell("[rank 1/3] ValueError: boom", 3)
    news = watch.wait_for_news(60)
    assert news is not None
    return news.rank, news.text, news.exit_code, news_of_all(0) == news


def test_what_one_rank_failed_of_is_heard_on_every_other(ranks: Any) -> None:
    assert ranks(3, a_node_each(fails)) == [(1, "[rank 1/3] ValueError: boom", 3, True)] * 3


def ends_without_a_word(world: World, watch: NodeWatch) -> str:
    if world.rank == 2:
        watch._stopped = True
        for sock in watch._buffers:
            sock.shutdown(socket.SHUT_RDWR)
        return ""
    news = watch.wait_for_news(60)
    return news.text if news else ""


def test_a_rank_that_says_no_goodbye_is_named(ranks: Any) -> None:
    *others, _ = ranks(3, a_node_each(ends_without_a_word))
    for told in others:
        assert told.startswith("[rank 2/3] on node 2 (")
        assert "ended without a word: it was killed" in told


def is_lost(world: World, watch: NodeWatch) -> str:
    told: list[str] = []
    ended = threading.Event()

    def note(error: DistributedError) -> None:
        told.append(str(error))
        ended.set()

    world.when_lost(note)
    world.barrier()
    if world.rank == 0:
        watch._silent(2)  # what the kernel reports of a connection, made up
    if world.rank < 2:
        assert ended.wait(60)
    return "".join(told)


def test_a_lost_node_ends_all_that_are_left_and_all_name_it(ranks: Any) -> None:
    first, second, lost = ranks(3, a_node_each(is_lost))
    assert first.startswith("[rank 0/3] node 2 (")
    assert second.startswith("[rank 1/3] node 2 (")
    assert "does not answer" in second
    assert lost == ""


def meets_a_stranger(world: World, watch: NodeWatch) -> bool:
    if world.rank == 0:
        assert watch._listener is not None
        for words in (b"GET / HTTP/1.1\n\n", b'{"hello": "guessed", "rank": 1}\n', b"[]\n", b"\xff" * 300_000):
            with socket.create_connection(watch._listener.getsockname()) as stranger:
                stranger.settimeout(30)
                try:
                    stranger.sendall(words)
                    assert stranger.recv(10) == b""  # shown the door
                except ConnectionError:
                    pass
    world.barrier()
    return watch.news is None and float(world.all_reduce(torch.ones(()))) == 2


def test_strangers_are_shown_the_door_and_change_nothing(ranks: Any) -> None:
    assert ranks(2, a_node_each(meets_a_stranger)) == [True, True]


def leaves(world: World, watch: NodeWatch) -> bool:
    world.barrier()
    if world.rank == 1:
        watch.stop()
        watch.stop()
        return True
    return watch.wait_for_news(1.0) is None


def test_who_says_goodbye_is_not_missed(ranks: Any) -> None:
    assert ranks(2, a_node_each(leaves)) == [True, True]


def not_watched() -> bool:
    os.environ.update(LOCAL_RANK="0", LOCAL_WORLD_SIZE="1", GROUP_RANK=os.environ["RANK"], DRIVETRAIN_NODE_TIMEOUT="0")
    world = World.start("cpu", timeout_s=60)
    world.barrier()
    world.when_lost(print)
    world.stop()
    return world._node_watch is None


def test_it_can_be_switched_off(ranks: Any) -> None:
    assert ranks(2, not_watched) == [True, True]


@pytest.mark.parametrize("value", ["1", "-5", "soon"])
def test_a_timeout_that_makes_no_sense_is_refused(value: str) -> None:
    with pytest.raises(ConfigError, match="DRIVETRAIN_NODE_TIMEOUT"):
        node_timeout_s({"DRIVETRAIN_NODE_TIMEOUT": value})


def another_size() -> str:
    if os.environ["RANK"] == "1":
        os.environ["WORLD_SIZE"] = "3"
    return started()


def the_same_rank() -> str:
    os.environ["RANK"] = "1"
    # Nobody is rank 0, so somebody else has to hold the store, as torchrun's agent does.
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    return started()


def started() -> str:
    os.environ.update(LOCAL_RANK="0", LOCAL_WORLD_SIZE="1", GROUP_RANK=os.environ["RANK"])
    try:
        World.start("cpu", timeout_s=60).stop()
    except DistributedError as error:
        return str(error)
    return "nothing was raised"


def test_ranks_that_were_told_different_sizes_all_hear_it_at_once(ranks: Any) -> None:
    """Otherwise one waits for a third rank, and the other finds a group that does not fit."""
    for told in ranks(2, another_size):
        assert "told different numbers of ranks" in told
        assert "start each node with the same number of nodes and of processes" in told


def test_two_processes_with_one_rank_all_hear_it_at_once(ranks: Any) -> None:
    """What two nodes with the same --node-rank are."""
    store: Any = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    def run() -> str:
        os.environ["MASTER_PORT"] = str(store.port)
        return the_same_rank()

    for told in ranks(2, run):
        assert "two processes say that they are rank 1" in told
        assert "--node-rank" in told


def test_the_interface_is_the_one_that_leads_there() -> None:
    assert choose_interface("127.0.0.1", 29500) == Interface("lo", "127.0.0.1")
    assert Interface("lo", "127.0.0.1") in interfaces()
    for found in interfaces():
        assert choose_interface(found.address, 29500).address == found.address


def test_a_name_that_is_no_interface_or_the_loopback_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"GLOO_SOCKET_IFNAME='loo'.*has no interface 'loo'. Did you mean 'lo'\?"):
        choose_interface("10.0.0.1", 29500, "loo")
    with pytest.raises(ConfigError, match="is the loopback interface, on which no other node is reached"):
        choose_interface("10.0.0.1", 29500, "lo")
    assert choose_interface("127.0.0.1", 29500, "lo") == Interface("lo", "127.0.0.1")
